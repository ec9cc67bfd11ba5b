"""Grades exercise 11, the sampler, on a tiny model in plain PyTorch (tiny.py).

What is fed to the model comes first, then how a row ends, then what is drawn: so that the
first failure names its cause.
"""

from collections import Counter

import pytest
import torch
from common import chi_square

from exercises.tiny import TinyModel

PROMPTS = [[5, 1, 7], [8, 9, 10, 11, 12, 13, 14], [5, 4, 3, 8, 7]]  # 1 is no padding here
SMALL = [[5, 3, 4], [3, 4, 5, 3, 4, 3, 5], [5, 4, 3, 3, 5]]  # of a vocabulary of 6
SPECIAL = [[2], [0, 3, 0], [4, 2], [3, 4, 5, 1, 2]]  # pads and ends of responses in prompts
SAMPLING = {"max_tokens": 12, "eos_ids": [1, 2], "pad_id": 1, "samples": 16}  # pad is an EOS


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sampled(impl, model=None, prompts=None, seed=0, **options):
    model = TinyModel().eval() if model is None else model
    options = SAMPLING | {"generator": seeded(seed)} | options
    given = [list(prompt) for prompt in prompts or PROMPTS]
    out = impl.sample(model, given, **options)
    fields = ("prompt", "prompt_mask", "tokens", "mask", "logp")
    whole = all(torch.is_tensor(getattr(out, name, None)) for name in fields)
    assert whole, f"return siren.Rollout({', '.join(fields)}), all of them tensors"
    return out


# ------------------------------------------------------------------------------ the prompts
@pytest.mark.ex11
@pytest.mark.parametrize("prompts", [PROMPTS, SPECIAL, PROMPTS[:1]])
def test_ex11_prompts(impl, prompts):
    out = sampled(impl, prompts=prompts, max_tokens=2)
    width = max(map(len, prompts))
    size = (len(prompts) * 16, width)
    assert tuple(out.prompt.shape) == size, (
        f"prompts are padded to the longest, one row per sample: {list(size)}"
    )
    same = out.prompt_mask.dtype == torch.bool and out.prompt_mask.shape == out.prompt.shape
    assert same, f"prompt_mask is bool, {list(size)}"
    lengths = torch.tensor([len(prompt) for prompt in prompts]).repeat_interleave(16)
    own = out.prompt_mask.sum(1)
    assert torch.equal(own.sort().values, lengths.sort().values), (
        "prompt_mask comes from positions, not from ids: a prompt may hold pad_id"
    )
    for row, (ids, mask) in enumerate(zip(out.prompt, out.prompt_mask)):
        last = mask[len(mask) - int(mask.sum()) :].all()
        assert last, "pad prompts on the left: all of them end in the last column"
        idea = f"row {row} is sample {row % 16} of prompt {row // 16}: i * samples + j"
        assert ids[mask].tolist() == prompts[row // 16], idea
        assert (ids[~mask] == 1).all(), "the padding of a prompt is pad_id"


def watched_calls(model):
    """What the model is called with, a dictionary for each call."""
    calls = []

    def watch(_, args, given):
        calls.append(dict(zip(["input_ids"], args)) | given)

    model.register_forward_pre_hook(watch, with_kwargs=True)
    return calls


@pytest.mark.ex11
def test_ex11_cache(impl):
    model = TinyModel().eval()
    calls = watched_calls(model)
    out = sampled(impl, model)
    assert calls, "call the model"
    fed = [call["input_ids"].shape[1] for call in calls]
    assert fed[0] == 7, "the first call takes the prompts, padded to the longest of 7 tokens"
    assert len(fed) > 1, (
        "you called the model only once: go on to max_tokens, until the last row has ended"
    )
    assert set(fed[1:]) == {1}, (
        f"after the prompt feed one token at a time, not {max(fed[1:])}: the rest is cached"
    )
    assert not out.logp.requires_grad, "sampling keeps no graph: use torch.no_grad()"
    cached = all(call.get("past_key_values") is not None for call in calls[1:])
    assert cached, "after the prompt pass past_key_values, the last call's out.past_key_values"


@pytest.mark.ex11
def test_ex11_padding_is_hidden(impl):
    model = TinyModel().eval()
    calls = watched_calls(model)
    out = sampled(impl, model)
    first = calls[0]
    rows = len(first["input_ids"])  # a prompt may be read once for all of its samples
    mask = out.prompt_mask[:: len(out.prompt_mask) // rows]
    seen = first.get("attention_mask")
    hidden = seen is not None and torch.equal(seen.bool(), mask)
    assert hidden, (
        "left padding is attended to: attention_mask is 0 there, and 1 at the prompt"
    )
    places = first.get("position_ids")
    due = (mask.cumsum(1) - 1)[mask].tolist()
    right = places is not None and places.expand(mask.shape)[mask].tolist() == due
    assert right, "position_ids count a row's own tokens from 0: not the padding on its left"
    for count, call in enumerate(calls[1:], start=1):
        seen = call.get("attention_mask")
        wide = seen is not None and seen.shape[1] == mask.shape[1] + count
        assert wide, "attention_mask has a column for each token so far, the past included"


# ----------------------------------------------------------------------------- how rows end
def check_responses(out, eos_ids, pad_id, max_tokens, rows):
    """Where each row must end, by its tokens alone."""
    shapes = {tuple(x.shape) for x in (out.tokens, out.mask, out.logp)}
    assert len(shapes) == 1, f"tokens, mask and logp are [B, T], not {shapes}"
    assert len(out.tokens) == rows, f"a row per sample: {rows} rows, not {len(out.tokens)}"
    assert out.mask.dtype == torch.bool, "mask is a bool tensor"
    assert not out.tokens.dtype.is_floating_point, "tokens are ids, so whole numbers"
    width = out.tokens.shape[1]
    assert 1 <= width <= max_tokens, f"at most max_tokens = {max_tokens} tokens, not {width}"
    for row, (ids, mask, logp) in enumerate(zip(out.tokens.tolist(), out.mask, out.logp)):
        idea = "every response has a first token, also where its prompt ends with an EOS"
        begun = mask.any() or ids[0] in eos_ids
        assert begun, f"{idea}: row {row}, {ids}"
        ends = [place for place, token in enumerate(ids) if token in eos_ids]
        length = ends[0] + 1 if ends else width
        at = f"row {row}, {ids}"
        if not ends:
            idea = (
                "only EOS or max_tokens end a response: go on to max_tokens while one goes on"
            )
            assert width == max_tokens, f"{idea}; {at}"
        rest = ids[length:]
        assert set(rest) <= {pad_id}, (
            f"rows must end at EOS, each on its own, and have pad_id from there on: {at}"
        )
        due = [place < length for place in range(width)]
        idea = why_not(ids, mask.tolist(), due, pad_id)
        assert mask.tolist() == due, f"{idea}; {at}"
        assert not logp[length:].any(), f"padding has a logp of 0; {at}"
        assert (logp[:length] <= 0).all(), f"logp is the logarithm of a probability; {at}"


def why_not(ids, mask, due, pad_id):
    """What the mask of a row seems to be, in place of what is due."""
    if sum(mask) == sum(due) - 1 and mask == sorted(mask, reverse=True):
        return "EOS belongs to the response, or is never trained: its mask is True"
    if mask == [token != pad_id for token in ids]:
        return (
            "a drawn pad_id is a token as others are: masks come from positions, not from ids"
        )
    return "the mask is True from the first token to the end, EOS included, then False"


@pytest.mark.ex11
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_tokens": 40, "samples": 3},
        {"max_tokens": 1},
        {"eos_ids": [2]},
        {"eos_ids": [2], "pad_id": 0},
        {"eos_ids": [2], "pad_id": 3},
        {"eos_ids": [2], "pad_id": 3, "prompts": SPECIAL},
        {"eos_ids": [4, 2], "pad_id": 0, "temperature": 1.5},
        {"eos_ids": [0], "pad_id": 0},
        {"eos_ids": [2], "pad_id": 0, "prompts": SPECIAL},
        {"eos_ids": [3, 1, 5], "pad_id": 5, "prompts": SPECIAL},
        {"eos_ids": [2, 0], "pad_id": 2, "prompts": SPECIAL[:1]},
    ],
    ids=str,
)
def test_ex11_responses_end(impl, options):
    """In a vocabulary of 6: pads and ends of responses are drawn often."""
    given = SAMPLING | options
    prompts = given.pop("prompts", SMALL)
    out = sampled(impl, TinyModel(vocab=6).eval(), prompts, **given)
    rows = len(prompts) * given["samples"]
    check_responses(out, given["eos_ids"], given["pad_id"], given["max_tokens"], rows)
    if given["max_tokens"] == 40:
        ends = out.mask.sum(1)
        assert ends.min() < ends.max(), "each row ends on its own, not all of them at once"


@pytest.mark.ex11
def test_ex11_one_sample_by_default(impl):
    model = TinyModel().eval()
    given = {"max_tokens": 5, "eos_ids": [1], "pad_id": 0, "generator": seeded()}
    out = impl.sample(model, [list(prompt) for prompt in PROMPTS], **given)
    assert len(out.mask) == 3, "samples is 1 by default: a row for each prompt"
    del given["generator"]  # then the global one draws
    first, second = (
        impl.sample(model, [list(PROMPTS[1])] * 9, **given, temperature=2.0) for _ in range(2)
    )
    differ = first.tokens.shape != second.tokens.shape or (first.tokens != second.tokens).any()
    idea = "without a generator torch's global one draws, anew at each call"
    assert differ, f"{idea}: draw, with no seed of your own, and don't take the likeliest"
    model.train()  # watch.py: nobody asked the sampler to change that
    impl.sample(model, [list(prompt) for prompt in PROMPTS], **given)


# ---------------------------------------------------------------------------- what is drawn
@pytest.mark.ex11
def test_ex11_the_generator_decides(impl):
    first, second, other = (sampled(impl, seed=seed) for seed in (3, 3, 4))
    torch.rand(5)  # the global generator has moved on
    third = sampled(impl, seed=3)
    differ = first.tokens.shape != other.tokens.shape or not torch.equal(
        first.tokens, other.tokens
    )
    assert differ, "another seed gives other tokens: draw, don't take the likeliest"
    for again in (second, third):
        repeats = torch.equal(first.tokens, again.tokens) and torch.equal(
            first.logp, again.logp
        )
        assert repeats, "draw with the generator: the same seed gives the same tokens"
    rows = {tuple(row.tolist()) for row in first.tokens[:16]}
    assert len(rows) > 1, "the samples of a prompt are drawn one by one, they are no copies"


@torch.no_grad()
def logp_of(model, prompt, tokens, temperature, places=0, seen_pads=0):
    """log-probabilities by a full pass over one row."""
    ids = torch.tensor([[1] * seen_pads + prompt + tokens])
    position_ids = torch.arange(ids.shape[1])[None] + places
    logits = model(input_ids=ids, position_ids=position_ids).logits[0, -len(tokens) - 1 : -1]
    log_pi = (logits / temperature).log_softmax(-1)
    return log_pi.gather(1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.mark.ex11
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
@pytest.mark.parametrize("vocab, pad_id", [(300, 1), (6, 3)])
def test_ex11_logp(impl, temperature, vocab, pad_id):
    """With pad_id = 3, which is no EOS here, pads are drawn, and often."""
    model = TinyModel(vocab=vocab, sharp=2.0).eval()
    prompts = PROMPTS if vocab == 300 else SMALL
    options = {"max_tokens": 9, "pad_id": pad_id, "eos_ids": [1, 2] if pad_id == 1 else [2]}
    out = sampled(impl, model, prompts, temperature=temperature, **options)
    for row in range(0, len(out.mask), 5):
        prompt, tokens = prompts[row // 16], out.tokens[row][out.mask[row]].tolist()
        got = out.logp[row][out.mask[row]]
        due = logp_of(model, prompt, tokens, temperature)
        if torch.allclose(got, due, atol=1e-4):
            continue
        idea = wrong_logp(model, prompt, tokens, temperature, got)
        raise AssertionError(
            f"{idea}: row {row} at temperature {temperature} has {got[:4].tolist()} in place"
            f" of {due[:4].tolist()}, those of a pass over this row alone"
        )


def wrong_logp(model, prompt, tokens, temperature, got):
    """Which mistake gives these log-probabilities?"""
    due = logp_of(model, prompt, tokens, temperature)
    typical = {
        "logp is of the distribution drawn from: logits / temperature": logp_of(
            model, prompt, tokens, 1.0
        ),
        "logp is of the distribution drawn from: logits / temperature, not times": logp_of(
            model, prompt, tokens, 1 / temperature
        ),
        "logp is the logarithm of the probability": due.exp(),
        "logp is that of each token, not of the response so far": due.cumsum(0),
        "later positions are one too many: a row's n-th token has position n - 1": logp_of(
            model, prompt, tokens, temperature, places=1
        ),
    }
    for idea, values in typical.items():
        if torch.allclose(got, values, atol=1e-4) and temperature != 1:
            return idea
        if torch.allclose(got, values, atol=1e-4) and not torch.allclose(
            values, due, atol=1e-4
        ):
            return idea
    if torch.allclose(got, due, atol=0.01, rtol=0.01):
        return "logp is nearly right: was something added to the probability before its log?"
    near = torch.isclose(got, due, atol=1e-4)
    if (due[~near] < got[~near].min() - 0.01).all() and (due[near] > due[~near].max()).all():
        return "log-probabilities of rare tokens are cut off: they may be as low as they are"
    if torch.allclose(got[:1], due[:1], atol=1e-4):
        return (
            "the first token of a row is right, later ones are not: what goes along from step"
            " to step (cache, attention_mask, position of a row's own tokens, last token)?"
        )
    return "logp is log_softmax(logits / temperature) at the token that was drawn"


@torch.no_grad()
def two_tokens(model, prompt, temperature):
    """The exact probabilities of the first two tokens, where 0 ends a response."""

    def pi(ids):
        return (model(torch.tensor([ids])).logits[0, -1].double() / temperature).softmax(-1)

    first = pi(prompt)
    found = {(0,): first[0].item()}
    for a in range(1, len(first)):
        second = pi([*prompt, a])
        found |= {(a, b): (first[a] * second[b]).item() for b in range(len(first))}
    return found


@pytest.mark.ex11
@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.8])
def test_ex11_frequencies(impl, temperature):
    """The first two tokens, of a left-padded prompt, against exact probabilities."""
    model = TinyModel(vocab=6).eval()
    prompts = [[3, 4]] * 1000 + [[5, 3, 4, 3, 5]]
    options = {"max_tokens": 2, "eos_ids": [0], "pad_id": 0, "samples": 4}
    out = sampled(impl, model, prompts, temperature=temperature, **options)
    rows = zip(out.tokens[:4000].tolist(), out.mask[:4000].tolist())
    observed = Counter(tuple(x for x, m in zip(ids, mask) if m) for ids, mask in rows)
    expected = two_tokens(model, prompts[0], temperature)
    odd = set(observed) - set(expected)
    assert not odd, f"a response ends at the first EOS (0) or after two tokens, unlike {odd}"
    last = {row[1] for row in out.tokens[out.mask[:, -1]].tolist()}
    assert len(last) > 1, f"the last token is drawn as the others are, it isn't always {last}"
    whole = two_tokens(model, prompts[0], 1.0)
    at = f"at temperature {temperature}"
    if temperature != 1 and fits(observed, whole):
        raise AssertionError(f"tokens are drawn at temperature 1, {at}")
    chi_square(
        observed, expected, f"tokens are not drawn with the model's probabilities, {at}"
    )
    check_samples_are_independent(out.tokens[:4000, 0], expected)


def check_samples_are_independent(tokens, expected):
    """How often the first tokens of two samples agree; 4 samples of each prompt."""
    share = Counter()
    for ids, probability in expected.items():
        share[ids[0]] += probability
    equal = int((tokens[0::4] == tokens[1::4]).sum())
    pairs = len(tokens) // 4
    rate = sum(p**2 for p in share.values())
    far = 5 * (pairs * rate * (1 - rate)) ** 0.5
    idea = "the samples of a prompt are drawn independently: two may well be the same"
    due = f"the first tokens of {equal} pairs of {pairs} agree, not about {pairs * rate:.0f}"
    assert abs(equal - pairs * rate) < far, f"{idea}; {due}"


def fits(observed, expected):
    try:
        chi_square(observed, expected, "")
    except AssertionError:
        return False
    return True


@pytest.mark.ex11
@torch.no_grad()
def test_ex11_rare_tokens(impl):
    """The first token in a vocabulary of 300: nothing is cut off."""
    model = TinyModel(vocab=300, sharp=0.8).eval()
    options = {"max_tokens": 1, "eos_ids": [0], "pad_id": 0, "samples": 12_000}
    out = sampled(impl, model, [[3, 4, 299]], **options)
    observed = Counter(out.tokens[:, 0].tolist())
    pi = model(torch.tensor([[3, 4, 299]])).logits[0, -1].double().softmax(-1)
    likeliest = pi.argsort(descending=True)
    for size in (1, 5, 10, 20, 32, 40, 50, 64, 100, 128, 200, 290):
        tail = pi[likeliest[size:]].sum().item() * 12_000
        drawn = sum(observed[token] for token in likeliest[size:].tolist())
        idea = "draw from all tokens, the rare ones, too: no top-k, no top-p"
        assert tail < 12 or drawn > 0, f"{idea} (none but the {size} likeliest were drawn)"
    expected = dict(enumerate(pi.tolist()))
    chi_square(observed, expected, "tokens are not drawn with the model's probabilities")
