r"""Tests of siren.py, in its order: what is expected is worked out a second time, slowly, by the
definitions.

    python -m pytest test_siren.py

Letters: B responses, T positions, V vocabulary, z logits, H nucleus entropy H', tau quantile.
The code under test is reached through the fixture `impl` alone (conftest.py): with --impl PATH,
another module takes its place, and only the tests that are marked as an exercise's run.
"""

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from common import (
    ANCHOR,
    F64,
    GRPO,
    KNOBS,
    LOSSES,
    OVER_TOKENS,
    PROMPTS,
    REGULARIZERS,
    SAMPLING,
    WITH_EMPTY,
    chi_square,
    logp_alone,
    loss_of,
    make,
    oracle_aggregate,
    oracle_entropy,
    oracle_nucleus,
    oracle_peaks,
    oracle_policy,
    oracle_probs,
    oracle_q,
    oracle_siren,
    oracle_stats,
    padded,
    rows,
    same,
    same_stats,
    sampled,
    seeded,
    small_model,
    t,
    value_and_grad,
)  # fmt: skip
from hypothesis import assume, given
from hypothesis import strategies as st


def ex(number, *values):
    """A case that also grades this exercise: it uses only what student.py's function has."""
    return pytest.param(*values, marks=getattr(pytest.mark, f"ex{number}"))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small models are faster so, and numbers repeat."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------------- 2. sampler


@pytest.mark.ex11
def test_sampling_repeats(impl):
    model, seeds = small_model(), (3, 3, 4)
    first, second, other = (sampled(impl, model, samples=8, generator=seeded(s)) for s in seeds)
    idea = "draw with the generator: the same seed gives the same tokens"
    assert torch.equal(first.tokens, second.tokens), idea
    assert torch.equal(first.logp, second.logp), idea
    differ = first.tokens.shape != other.tokens.shape or not torch.equal(first.tokens, other.tokens)
    assert differ, "another seed gives other tokens: draw, don't take the likeliest"


@pytest.mark.parametrize("temperature, batch", [(1.0, 1024), (0.7, 1024), (1.0, 8), (0.7, 40)])
def test_sampled_logp_is_that_of_a_full_pass(impl, temperature, batch):
    model = small_model()
    out = sampled(impl, model, temperature=temperature, batch=batch)
    head, hidden = model.get_output_embeddings(), impl.forward(model, out)
    stats = impl.token_stats(hidden, out.tokens, out.mask, 0.8, temperature, head)
    assert len(out.mask) == 48, "a row per sample"
    same(out.logp, stats["logp"], "log-probabilities with and without cache", tol=1e-5)


@pytest.mark.ex11
@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logp_is_that_of_the_row_alone(impl, temperature):
    model = small_model()
    out = sampled(impl, model, temperature=temperature)
    ends = out.mask.sum(1)
    assert ends.min() < ends.max() <= 12, "rows must end at EOS, each on its own, or at max_tokens"
    for row in range(0, len(out.mask), 7):  # without padding or neighbours
        prompt, tokens = PROMPTS[row // 16], out.tokens[row, : ends[row]]
        alone = logp_alone(model, prompt, tokens, temperature)
        unscaled = logp_alone(model, prompt, tokens)
        mistakes = {"logp is of the distribution drawn from: logits / temperature": unscaled}
        idea = "left padding must not change a row: hide it (attention_mask, position_ids)"
        same(out.logp[row, : ends[row]], alone, idea, 1e-5, mistakes if temperature != 1 else {})


@pytest.mark.ex11
@torch.no_grad()
def test_position_ids_count_a_rows_own_tokens(impl):
    """With learned absolute positions; rotary ones, as in small_model, only see differences."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 32}
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(**sizes, **drop, initializer_range=0.4)).eval()
    out = sampled(impl, model)
    for row in range(0, len(out.mask), 7):
        alone = logp_alone(model, PROMPTS[row // 16], out.tokens[row][out.mask[row]])
        idea = "positions count a row's own tokens, not the padding on its left"
        same(out.logp[row][out.mask[row]], alone, idea, tol=1e-5)


@pytest.mark.ex11
@pytest.mark.parametrize("options", [{"samples": 16}, {"max_tokens": 40}])
def test_rollout_layout(impl, options):
    out = impl.sample(small_model(), PROMPTS, generator=seeded(), **SAMPLING | options)
    assert len(out.mask) == 3 * options.get("samples", 1), "a row per sample, by default one"
    shapes = {out.tokens.shape, out.mask.shape, out.logp.shape}
    assert len(shapes) == 1, f"tokens, mask and logp are [B, T], not {shapes}"
    for row, response in enumerate(out.responses()):
        left = out.mask[row, : len(response)].all() and not out.mask[row, len(response) :].any()
        assert left, "the mask is True from the first token on, then False"
        assert not set(response[:-1]) & {1, 2}, "a response goes on after EOS: it ends there"
        whole = len(response) == options.get("max_tokens", 12) or set(response[-1:]) & {1, 2}
        assert whole, "EOS belongs to the response, or is never trained; without, on to max_tokens"
        assert (out.tokens[row, len(response) :] == 1).all(), "after a response there are pads"
        assert not out.logp[row, len(response) :].any(), "padding has a logp of 0"


def test_eos_is_trained(impl):
    out = sampled(impl, small_model(), samples=4)
    logits = torch.zeros(*out.tokens.shape, 32, requires_grad=True)
    old_logp, adv = torch.full(out.tokens.shape, -math.log(32)), torch.ones(len(out.mask))
    impl.siren_loss(logits, out.tokens, old_logp, adv, out.mask, 0.0, beta=0.0)[0].backward()
    ended = [(row, len(r) - 1) for row, r in enumerate(out.responses()) if r[-1] in (1, 2)]
    assert ended
    for row, last in ended:
        token = out.tokens[row, last]
        assert logits.grad[row, last, token] < 0, "a rewarded EOS must become more likely"
        assert not logits.grad[row, last + 1 :].any(), "padding after EOS is trained"


@pytest.mark.parametrize("batch", [ex(11, {}), {"batch": 10**6}])
@torch.no_grad()
def test_sampled_frequencies_follow_the_model(impl, batch):
    """The first two tokens, of a left-padded prompt, against exact probabilities."""
    model, count = small_model(vocab=6), 20_000
    prompts = [[3, 4], [5, 3, 4, 3, 5]]
    options = {"max_tokens": 2, "eos_ids": [0], "pad_id": 0} | batch
    out = impl.sample(model, prompts, samples=count, generator=seeded(), **options)
    observed = Counter(map(tuple, out.responses()[:count]))
    first = model(input_ids=torch.tensor([prompts[0]])).logits[0, -1].double().softmax(-1)
    expected = {(0,): first[0].item()}
    for a in range(1, 6):
        ids = torch.tensor([[*prompts[0], a]])
        second = model(input_ids=ids).logits[0, -1].double().softmax(-1)
        expected |= {(a, b): (first[a] * second[b]).item() for b in range(6)}
    assert math.isclose(sum(expected.values()), 1, rel_tol=1e-5), "the test's own arithmetic"
    odd = set(observed) - set(expected)
    assert not odd, f"a response ends at the first EOS (0) or after two tokens, unlike {odd}"
    chi_square(observed, expected, "tokens are not drawn with the model's probabilities")


# --------------------------------------------------------------------------------- 3. verifier

HALF = r"\frac{1}{2}"
RIGHT = [  # in the box, the known answer
    *[("5", "5"), (" 5 ", "5"), ("+5", "5"), ("5.", "5"), ("007", "7"), ("-3", "-3"), ("−3", "-3")],
    *[("-0", "0"), ("5.0", "5"), (".5", "0.5"), ("0.50", "1/2"), ("1/2", "0.5"), ("2/4", "1/2")],
    *[("4/2", "2"), ("-1/2", "-0.5"), (HALF, "1/2"), (HALF, "0.5"), ("0.5", HALF)],
    *[(r"\dfrac{1}{2}", "1/2"), (r"\tfrac{1}{2}", "1/2"), (r"\frac12", "0.5"), (r"\frac 12", HALF)],
    *[(r"-\frac{3}{4}", "-0.75"), (r"\frac{-3}{4}", "-3/4"), (r"\frac{ 3 }{ 4 }", "3/4")],
    *[("1,234,567", "1234567"), ("1{,}234", "1234"), ("1,234.5", "1234.5"), ("1000", "1,000")],
    *[(r"10,\!000", "10000"), ("- 5", "-5"), ("1 / 2", "0.5"), (r"\left(5\right)", "(5)")],
    *[(r"50\%", "0.5"), (r"50\%", HALF), (r"50\%", "50%"), ("50%", "1/2"), (r"5 \%", ".05")],
    *[("$5$", "5"), ("5", "$5$"), (r"\$5", "5"), ("{5}", "5"), (r"\(5\)", "5"), ("60", "60 ")],
    *[("60", r"\boxed{60}"), (HALF, r"so \boxed{0.5}"), (r"\displaystyle 5", "5")],
    *[(r"\text{east}", "east"), (r"\text{east}", r"\text{east}"), ("x+1", "x+1")],
    *[("x + 1", "x+1"), ("(1, 2)", "(1,2)")],
    *[(r"\left(1,2\right)", "(1,2)"), (r"\{1, 2\}", r"\{1,2\}")],
    *[(r"\sqrt{2}", r"\sqrt{2}"), (r"\sqrt2", r"\sqrt{2}"), ("x^2", "x^{2}"), (r"2\pi", r"2\pi")],
    *[("5 cm", "5 cm"), (r"5\text{ cm}", "5 cm")],
    *[("10cm", "10 cm"), (r"1\frac{1}{2}", r"1\frac{1}{2}")],
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
]  # fmt: skip
WRONG = [
    *[("5", "6"), ("5", "-5"), ("-5", "5"), ("−5", "5"), ("", "5"), (" ", "5"), ("", "")],
    *[("1,23", "123"), ("12,34", "1234"), ("1,2,3", "123"), ("1.2.3", "1.23"), ("1 234", "1234")],
    *[("1/2", "2"), ("1/3", "0.333"), (HALF, "2"), (r"\frac{2}{1}", "1/2"), ("0.5", "5")],
    *[("1/0", "5"), (r"\frac{1}{0}", "0"), ("1/2/3", "1/6"), (r"\frac{x+1}{2}", "x+1/2")],
    *[("50", "0.5"), (r"50\%", "5"), (r"50\%", "50"), ("50%", "50"), ("5%%", "5"), (".5", "5")],
    *[("x+1", "x+2"), (r"\text{east}", "west"), ("--5", "5")],
    *[("5-", "5"), ("5/", "5"), ("+-5", "-5")],
    *[("5 or 6", "5"), ("5, 6", "56"), ("5 6", "56"), ("²", "2"), ("٣", "3"), ("{5", "5")],
    *[("0x10", "16"), ("1_000", "1000"), ("inf", "5")],
    *[("nan", "5"), ("1e3", "1000"), ("(1,2)", "12")],
    # a mixed number is text: neither a sum nor a product, and its digits stay apart
    *[(r"1\frac{1}{2}", "11/2"), (r"1\frac{1}{2}", "3/2")],
    *[(r"1\frac{1}{2}", "0.5"), ("1 1/2", "1.5")],
    *[("5.5", r"1 \frac{1}{2}"), ("5.5", r"5\frac{1}{2}")],
    *[(r"\frac{1}{2}3", "1/23"), (r"3\frac12", "31/2")],
    # digits are never joined
    *[("5  6", "56"), (r"5\ 6", "56"), (r"5\;6", "56"), (r"5\text{ }6", "56"), (r"5\!6", "56")],
    *[("1, 234", "1234"), ("1 , 234", "1234"), ("1, !234", "1234")],
    *[("{5}{6}", "56"), (r"5~6", "56")],
    *[(r"1\,296", "1296"), (r"\text{5}6", "56"), (r"\mathrm{5}\mathrm{6}", "56"), ("1. 5", "1.5")],
    *[("2^{1}0", "2^{10}"), (r"\sqrt{2}5", r"\sqrt{25}"), (r"\frac1{23}", r"\frac12 3")],
    # units and words after a number make it text
    *[("5x", "5"), ("x5", "5"), ("5 cm", "5"), (r"5\text{ cm}", "5"), (r"5\text{cm}", "5")],
    *[(r"5\text{ cm}^2", "5"), ("5 cm", "5 m"), ("3 quarters", "3"), ("5 hundredths", "5")],
    *[("5 trillion", "5"), ("5 millions", "5"), (r"90^{\circ}", "90"), ("90°", "90"), ("x=5", "5")],
]  # fmt: skip
EXTRACT = [  # response, the content of its last balanced box
    *[("the answer is 5", None), ("", None), (r"\boxed", None), (r"\boxed{", None)],
    *[(r"so \boxed{5}.", "5"), (r"\boxed{1}, no: \boxed{2}", "2"), (r"\boxed{}", "")],
    *[(r"\boxed{\frac{1}{2}}", HALF), (r"\boxed{\text{a {b} c}} }{", r"\text{a {b} c}")],
    *[(r"\boxed{\boxed{5}}", "5"), (r"\boxed{1} and \boxed{2", "1"), (r"}}\boxed{5}}}", "5")],
    *[(r"\boxed{\frac{1}{2}", None), (r"a line break \\\boxed{5}", "5"), (r"\boxed {7}", "7")],
    *[(r"\boxed{\{1\}}", r"\{1\}"), (r"\boxed{1\}", None), (r"\{\boxed{5}\}", "5")],
]


@pytest.mark.parametrize("box, answer", RIGHT)
def test_right_answers(impl, box, answer):
    text = rf"First \boxed{{41}}, in the end \boxed{{{box}}}. Done."
    assert impl.verify(text, answer) is True, f"{box!r} is {answer!r}"


@pytest.mark.parametrize("box, answer", WRONG)
def test_wrong_answers(impl, box, answer):
    assert impl.verify(rf"So it is \boxed{{{box}}}.", answer) is False, f"{box!r} is not {answer!r}"
    if "{5" not in box:  # nor the other way round
        assert impl.verify(rf"\boxed{{{answer}}}", box) is False


@pytest.mark.parametrize("text, expected", EXTRACT)
def test_extraction(impl, text, expected):
    got = impl.extract_answer(text)
    assert (got if got is None else got.strip()) == expected, "the last balanced box counts"
    if expected is None:
        assert impl.verify(text, "5") is False, "no box, no reward"


def test_the_last_box_decides(impl):
    assert impl.verify(r"\boxed{5} wait \boxed{6}", "5") is False, "guessing twice must not pay"
    assert impl.verify(r"\boxed{6} wait \boxed{5}", "5") is True


def test_answer_form_stands_in_for_a_missing_box(impl):
    def last_word(text):
        return text.split()[-1] if text.split() else None

    assert impl.extract_answer("it is 7", last_word) == "7"
    assert impl.verify("it is 7", "7", answer_form=last_word) is True
    assert impl.verify("it is 7", "8", answer_form=last_word) is False
    assert impl.verify("", "7", answer_form=last_word) is False
    assert impl.extract_answer(r"\boxed{6} or 7", last_word) == "6", "a box comes first"


def test_a_tasks_own_equality_decides(impl):
    asked = []

    def equal(given, answer):
        asked.append((given, answer))
        return given == "a right one"

    assert impl.verify(r"\boxed{a right one}", r"\boxed{5}", equal=equal) is True
    assert impl.verify(r"\boxed{5}", "5", equal=equal) is False
    assert impl.verify("without a box", "5", equal=equal) is False
    assert asked == [("a right one", "5"), ("5", "5")], "no answer, no question"


def test_normalize_types(impl):
    assert impl.normalize(r"\frac{6}{4}") == Fraction(3, 2)
    assert isinstance(impl.normalize("0.125"), Fraction), "decimals are exact fractions, no floats"
    assert isinstance(impl.normalize("x+1"), str) and isinstance(impl.normalize(""), str)


@given(n=st.integers(-(10**9), 10**9), d=st.integers(1, 10**6), k=st.integers(2, 99))
def test_fractions_compare_by_value(impl, n, d, k):
    assert impl.verify(rf"\boxed{{\frac{{{n * k}}}{{{d * k}}}}}", f"{n}/{d}") is True
    assert impl.verify(rf"\boxed{{{n:,}}}", str(n)) is True, "thousands separators"
    assert impl.verify(rf"\boxed{{{n + 1}/{d}}}", f"{n}/{d}") is False


# ------------------------------------------------------------------- 4. the method: advantages


@pytest.mark.parametrize("rule", [ex(1, {}), GRPO])
def test_advantages_against_oracle(impl, rule):
    rewards = np.array([1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0.25])
    expected = np.zeros(12)
    for a in range(0, 12, 4):
        group = rewards[a : a + 4]
        expected[a : a + 4] = group - group.mean()
        if rule:
            expected[a : a + 4] /= group.std(ddof=1) + 1e-6
    got = impl.group_advantages(t(rewards), 4, **rule)
    same(got, expected, "advantage = reward - mean of the group of consecutive rows")


@pytest.mark.parametrize("rule", [ex(1, {}), GRPO])
@given(size=st.integers(2, 6), groups=st.integers(1, 4), shift=st.integers(-9, 9))
def test_advantages_are_centred_and_blind_to_a_shift(impl, rule, size, groups, shift):
    rewards = t([(i * i + size) % 5 / 4 for i in range(size * groups)])
    adv = impl.group_advantages(rewards, size, **rule)
    same(adv.view(groups, size).sum(1), [0.0] * groups, "advantages of a group sum to 0")
    shifted = impl.group_advantages(rewards + shift, size, **rule)
    same(shifted, adv, "only differences of rewards within a group count")
    silent = adv.abs().sum() == 0 and len(set(rewards.tolist())) == len(rewards)
    assert not silent, "different rewards must get different advantages"


# ---------------------------------------------------- the policy nucleus and its entropy


@pytest.mark.ex3
@pytest.mark.parametrize("top_p", [0.3, 0.8, 0.95, 1.0])
def test_nucleus_against_oracle(impl, top_p):
    b = make(seed=1)
    mask = impl.nucleus_mask(b.logits, top_p)
    assert mask.dtype == torch.bool and mask.shape == b.logits.shape, "the mask is bool [..., V]"
    for i in np.ndindex(*b.tokens.shape):
        expected = sorted(map(int, oracle_nucleus(b.logits[i].numpy(), top_p)))
        got = mask[i].nonzero()[:, 0].tolist()
        idea = "the fewest tokens that reach top_p"
        if top_p == 1:
            idea = "top_p = 1 keeps every token, however unlikely"
        assert got == expected, f"{idea}: {got}, not {expected}, at {i} for top_p {top_p}"


@pytest.mark.ex4
@pytest.mark.parametrize("top_p", [0.3, 0.8, 0.95, 1.0])
def test_nucleus_entropy_against_oracle(impl, top_p):
    b = make(seed=1)
    expected = oracle_stats(b.logits, b.tokens, top_p)["nucleus_entropy"]
    same(impl.nucleus_entropy(b.logits, top_p), expected, "entropy, renormalised, in nats")


VECTORS = [  # p = 0.8: probabilities, H'
    ((0.9, 0.05, 0.03, 0.02), 0.0),
    ((0.6, 0.3, 0.06, 0.04), 0.636514),
    ((0.5, 0.25, 0.15, 0.1), 0.980990),
    ((0.25, 0.25, 0.25, 0.25), math.log(4)),
]


@pytest.mark.ex4
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("probabilities, expected", VECTORS)
def test_vectors(impl, probabilities, expected, dtype):
    z = t(probabilities).log().to(dtype)
    H = impl.nucleus_entropy(z, 0.8)
    same(H, expected, "your nucleus leaves out the token that crosses p", tol=1e-6)
    exact = expected > 0 or H.item() == 0
    assert exact, "a one-token nucleus has H' of exactly 0, for `H' > 0` rests on it"


vectors = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12)
levels = st.floats(0.05, 0.99)


def away_from_ties(z, p):
    """The nucleus is well defined only where no cumulative mass equals p up to rounding."""
    assume(np.abs(np.cumsum(np.sort(oracle_probs(np.array(z)))[::-1]) - p).min() > 1e-6)


@pytest.mark.ex3
@given(z=vectors, p=levels)
def test_nucleus_is_minimal_and_reaches_p(impl, z, p):
    kept, at = oracle_probs(np.array(z))[impl.nucleus_mask(t(z), p).numpy()], f"logits {z}, p {p}"
    assert kept.sum() >= p - 1e-9, f"your nucleus leaves out the token that crosses p: {at}"
    assert kept.size > 0, f"the nucleus is never empty: {at}"
    smallest = kept.sum() - kept.min() < p + 1e-9
    assert smallest, f"your nucleus is not the smallest that reaches p: {at}"


@pytest.mark.ex3
@given(z=vectors, p=st.tuples(levels, levels), shift=st.floats(-50, 50), data=st.data())
def test_nucleus_under_a_shift_a_permutation_and_a_larger_p(impl, z, p, shift, data):
    small, large = (impl.nucleus_mask(t(z), x) for x in sorted(p))
    assert small.sum() <= large.sum(), "a larger p never needs fewer tokens"
    away_from_ties(z, max(p))
    same(impl.nucleus_mask(t(z) + shift, max(p)).sum(), large.sum(), "softmax ignores a shift")
    assume(np.diff(np.sort(z)).min() > 1e-6)  # of equal tokens any may be inside
    assert not (small & ~large).any(), "a larger p may only add tokens"
    same(impl.nucleus_mask(t(z) + shift, max(p)), large, "softmax ignores a shift")
    order = data.draw(st.permutations(range(len(z))))
    idea = "map the nucleus from the sorted order back to token ids"
    same(impl.nucleus_mask(t(z)[order], max(p)), large[order], idea)


@pytest.mark.ex4
@given(z=vectors, p=levels, shift=st.floats(-50, 50), data=st.data())
def test_entropy_is_bounded_and_blind_to_shift_and_order(impl, z, p, shift, data):
    full = oracle_entropy(oracle_probs(np.array(z)))
    same(impl.nucleus_entropy(t(z), 1.0), full, "top_p = 1 keeps every token")
    away_from_ties(z, p)
    H, size = impl.nucleus_entropy(t(z), p), len(oracle_nucleus(np.array(z), p))
    idea = f"renormalise on the nucleus before taking the entropy: logits {z}, p {p}"
    assert 0 <= H.item() <= math.log(size) + 1e-9, idea
    same(impl.nucleus_entropy(t(z) + shift, p), H, "softmax ignores a shift")
    order = data.draw(st.permutations(range(len(z))))
    same(impl.nucleus_entropy(t(z)[order], p), H, "H' must not depend on token ids")


def gradcheck(function, x):
    """Is autograd's gradient that of finite differences? False also where there is no gradient."""
    if not function(x).requires_grad:
        return False
    return torch.autograd.gradcheck(function, x, raise_exception=False)


@pytest.mark.ex4
def test_closed_form_gradient(impl):
    z = make(seed=11).logits.requires_grad_()
    H = impl.nucleus_entropy(z, 0.8)
    assert H.requires_grad, "H' has no gradient: only the choice of the set is not differentiated"
    (grad,) = torch.autograd.grad(H.sum(), z)
    assert torch.isfinite(grad).all(), "0 * log 0 in the backward pass: mask before, not after"
    for i in np.ndindex(*z.shape[:-1]):
        q = oracle_q(z[i].detach().numpy(), 0.8)
        inside, H = q > 0, oracle_entropy(q)
        expected = np.zeros_like(q)
        expected[inside] = -q[inside] * (np.log(q[inside]) + H)
        same(grad[i], expected, "dH'/dz_j = -q_j (log q_j + H') inside the nucleus, 0 outside")
        outside = grad[i].numpy()[~inside]
        assert (np.abs(outside) < 1e-12).all(), "a logit outside the nucleus gets a gradient"


@pytest.mark.ex4
def test_gradcheck_nucleus_entropy(impl):
    z = make((3, 3), V=7, seed=7).logits[:, :4].requires_grad_()
    right = gradcheck(lambda x: impl.nucleus_entropy(x, 0.8), z)
    assert right, "autograd's gradient of H' is not that of its value: was a part detached?"


# ------------------------------------------------------------------- peaks and aggregation


def ragged_entropies(dtype):
    """H' [40, 11] with zeros, ties, empty rows and padding that must not matter, and its mask."""
    g = seeded(3)
    H = torch.rand(40, 11, generator=g, dtype=F64)
    H[::3] *= torch.rand(14, 11, generator=g) < 0.4  # many zeros
    H[1::3] = (H[1::3] * 4).ceil() / 4  # many ties
    mask = torch.arange(11) < torch.arange(40)[:, None] % 12
    return torch.where(mask, H, 5.0).to(dtype), mask


TAUS = pytest.mark.parametrize("tau", [0.0, 0.25, 0.5, 0.8, 0.93, 1.0])


@TAUS
@pytest.mark.parametrize("dtype", [ex(5, F64), torch.float32])
def test_peaks_against_oracle(impl, tau, dtype):
    H, mask = ragged_entropies(dtype)
    peak = impl.peak_mask(H, mask, tau)
    assert peak.dtype == torch.bool and peak.shape == mask.shape, "the mask is bool [B, T]"
    expected = oracle_peaks(H, mask, tau)
    for i in range(40):
        idea = f"peaks of a {int(mask[i].sum())}-token response: its own quantile, inside the mask"
        if tau == 0:
            idea = "quantile 0 switches the mask off: every token of the response"
        assert peak[i].tolist() == expected[i].tolist(), idea


@TAUS
@pytest.mark.parametrize("dtype", [ex(6, F64), torch.float32])
def test_aggregate_against_oracle(impl, tau, dtype):
    H, mask = ragged_entropies(dtype)
    peak, tol = oracle_peaks(H, mask, tau), 1e-12 if dtype is F64 else 1e-6
    got = impl.aggregate_entropy(H, torch.from_numpy(peak), mask)
    same(got, oracle_aggregate(H, peak, mask), "mean of the per-response means", tol)


def mostly_sharp():
    """H' of three responses, mostly 0, and their mask."""
    H = torch.zeros(3, 12, dtype=F64)
    H[0, [2, 7]] = t([0.4, 1.0])  # 2 of 12 tokens: q = 0
    H[2, 3] = 0.6  # the row below it is all 0
    return H, torch.arange(12) < torch.tensor([12, 12, 6])[:, None]


@pytest.mark.ex5
def test_quantile_of_0_selects_only_positions_with_entropy(impl):
    H, mask = mostly_sharp()
    peak = impl.peak_mask(H, mask, 0.8)
    assert torch.equal(peak, H > 0), "q = 0: `H' >= 0` holds everywhere; peaks also need H' > 0"


@pytest.mark.ex5
@pytest.mark.parametrize(
    "H, lengths, expected, idea",
    [
        (
            [[1, 1, 1, 1, 1], [0.2, 0.7, 0.7, 0.7, 0.1], [0.3, 9, 9, 9, 9], [0.1, 0.5, 0.9, 9, 9]],
            [5, 5, 1, 3],
            [[1, 1, 1, 1, 1], [0, 1, 1, 1, 0], [1, 0, 0, 0, 0], [0, 0, 1, 0, 0]],
            "H' >= q: every token tied with the quantile is a peak",
        ),
        (
            [[1.0, 0.0], [0.0, 0.0], [9.0, 9.0]],
            [1, 2, 0],
            [[1, 0], [0, 0], [0, 0]],
            "neither a response without entropy nor one without a token has a peak",
        ),
        (
            [[1, 2, 3], [10, 20, 30]],
            [3, 3],
            [[0, 0, 1]] * 2,
            "your quantile is over the batch; every response has its own",
        ),
    ],
)
def test_peaks_by_hand(impl, H, lengths, expected, idea):
    mask = torch.arange(len(H[0])) < torch.tensor(lengths)[:, None]
    assert impl.peak_mask(t(H), mask, 0.8).int().tolist() == expected, idea


@pytest.mark.ex6
def test_silent_and_empty_responses(impl):
    H, mask = mostly_sharp()
    got = impl.aggregate_entropy(H, H > 0, mask)
    same(got, (0.7 + 0 + 0.6) / 3, "a response of all 0 counts 0")
    H, mask = t([[1, 0], [0, 0], [9, 9]]), torch.tensor([[1, 0], [1, 1], [0, 0]]).bool()
    got = impl.aggregate_entropy(H, (H > 0) & mask, mask)
    same(got, 0.5, "mean over the responses that have a token")


def test_entropy_aggregation_by_hand(impl):
    H = t([[0, 1, 2, 3, 4, 5], [2, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    mask = torch.tensor([[1] * 6, [1] + [0] * 5, [0] * 6], dtype=torch.bool)
    peak = impl.peak_mask(H, mask, 0.8)
    same(impl.aggregate_entropy(H, peak, mask), (4.5 + 2) / 2, "q = 4 is itself a peak")


# ------------------------------------------------------------------------ the policy loss


@pytest.mark.parametrize("knobs", [ex(2, {}), GRPO])
@pytest.mark.parametrize("clips", [{}, {"clip_low": 0.1, "clip_high": 0.5}])
@pytest.mark.parametrize("max_tokens", [None, 20])
def test_policy_loss_against_oracle(impl, knobs, clips, max_tokens):
    b = make(WITH_EMPTY, seed=4)
    knobs = knobs | clips | {"max_tokens": max_tokens}
    expected, clip_fraction, kl = oracle_policy(b.logp, b.old_logp, b.adv, b.mask, **knobs)
    loss, stats = impl.policy_loss(b.logp, b.old_logp, b.adv, b.mask, **knobs)
    same(loss, expected, f"policy loss, {knobs}")
    same(stats["clip_fraction"], clip_fraction, "share of the tokens in the mask", tol=1e-6)
    assert "approx_kl" not in stats or abs(stats["approx_kl"] - kl) < 1e-9, "k3 estimator"


@pytest.mark.parametrize(
    "knobs, expected, why",
    [
        ex(2, {}, 5 / 8, "(-1/4 + 6/4) / 2; the empty row is left out"),
        ex(2, {"max_tokens": 10}, 0.25, "divide by max_tokens where it is given"),
        (GRPO, 0.5, "(-1 + 2) / 2: each response's own length"),
        (GRPO | {"max_tokens": 10}, 0.5, "(-1 + 2) / 2: whatever the budget"),
    ],
)
def test_lengths_by_hand(impl, knobs, expected, why):
    # ratio 1, so the token losses are -1 (one token) and +2 (three tokens); T = 4; third row empty
    zero, adv = torch.zeros(3, 4, dtype=F64), t([1.0, -2.0, 7.0])
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    same(impl.policy_loss(zero, zero, adv, mask, **knobs)[0], expected, why)


CLIPS = [  # advantage, ratio, keywords, loss, gradient with respect to logp, clip fraction
    (1, 1.1, {}, -1.1, -1.1, 0),
    (1, 1.5, {}, -1.2, 0, 1),
    (1, 0.5, {}, -0.5, -0.5, 0),
    (-1, 0.9, {}, 0.9, 0.9, 0),
    (-1, 0.5, {}, 0.8, 0, 1),
    (-1, 1.5, {}, 1.5, 1.5, 0),
    (1, 1.25, {"clip_high": 0.28}, -1.25, -1.25, 0),
    (1, 1.5, {"clip_high": 0.28}, -1.28, 0, 1),
    (-1, 0.75, {"clip_high": 0.28}, 0.8, 0, 1),
    (-1, 0.75, {"clip_low": 0.3}, 0.75, 0.75, 0),
    (0, 1.5, {}, 0, 0, 0),
]


def one_token_loss(impl, adv, ratio, **knobs):
    """(loss, gradient with respect to logp, stats) of one response of one token."""
    logp = t([[math.log(ratio)]]).requires_grad_()
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, stats = impl.policy_loss(logp, t([[0.0]]), t([adv]), mask, **knobs)
    assert loss.requires_grad, "the loss has no gradient: it flows through the ratio"
    loss.backward()
    return loss.detach(), logp.grad, stats


@pytest.mark.ex2
@pytest.mark.parametrize("adv, ratio, knobs, expected, gradient, clipped", CLIPS)
def test_clipping_by_hand(impl, adv, ratio, knobs, expected, gradient, clipped):
    loss, slope, stats = one_token_loss(impl, adv, ratio, **knobs)
    same(loss, expected, "PPO: the larger of the clipped and the unclipped loss")
    side = "clipping stops the move that the advantage asks for, never the way back"
    same(slope, [[gradient]], side)
    assert gradient != 0 or slope.item() == 0, f"{side}: gradient must be exactly 0"
    same(stats["clip_fraction"], clipped, "clip_fraction: where the clipped term is the smaller")
    kl = stats.get("approx_kl", torch.tensor(ratio - 1 - math.log(ratio)))  # no student has it
    same(kl, ratio - 1 - math.log(ratio), "k3 estimator", tol=1e-6)


@pytest.mark.parametrize("knobs", [ex(2, {}), GRPO])
def test_gradcheck_policy_loss(impl, knobs):
    b = make(WITH_EMPTY, seed=9)

    def run(logp):
        return impl.policy_loss(logp, b.old_logp, b.adv, b.mask, clip_high=0.28, **knobs)[0]

    right = gradcheck(run, b.logp.clone().requires_grad_())
    assert right, "autograd's gradient is not that of the loss: was a part detached?"


# ------------------------------------------------------------------------- token_stats and the loss


@pytest.mark.parametrize("knobs", REGULARIZERS)
@pytest.mark.parametrize("rule", [{}, GRPO])
@pytest.mark.parametrize("quantile", [0.8, 0.0])
def test_siren_loss_against_oracle(impl, knobs, rule, quantile):
    b = make(WITH_EMPTY, seed=5)
    knobs = {**KNOBS, **knobs, **rule, "temperature": 1.3, "max_tokens": 9, "clip_high": 0.3}
    knobs |= {"peak_quantile": quantile, "top_p": 0.8 if quantile else 1.0}
    expected, expected_stats = oracle_siren(b, ANCHOR, **knobs)
    loss, grad, stats = value_and_grad(impl, b, **knobs)
    same(loss, expected, "loss")
    assert set(stats) == set(expected_stats) and torch.isfinite(grad).all()
    same_stats(stats, expected_stats, "against the oracle")


@pytest.mark.parametrize("anchor", [0.0, 0.9, 2.5])
def test_the_loss_is_the_formula(impl, anchor):
    """L = L_DrGRPO + beta * (H_agg - H*)^2, in so many words, also in its gradient."""
    b = make(WITH_EMPTY, seed=5)
    loss, grad, _ = value_and_grad(impl, b, anchor)
    z = b.logits.clone().requires_grad_()
    logp = z.log_softmax(-1).gather(-1, b.tokens[..., None])[..., 0]
    policy, _ = impl.policy_loss(logp, b.old_logp, b.adv, b.mask)
    H = impl.nucleus_entropy(z, KNOBS["top_p"])
    peak = impl.peak_mask(H, b.mask, KNOBS["peak_quantile"])
    formula = policy + KNOBS["beta"] * (impl.aggregate_entropy(H, peak, b.mask) - anchor) ** 2
    formula.backward()
    same(loss, formula, "the loss")
    same(grad, z.grad, "its gradient")


@pytest.mark.parametrize("knobs", [ex(7, {}), *({"temperature": 1.2, **k} for k in REGULARIZERS)])
def test_gradcheck_siren_loss(impl, knobs):
    b = make((6, 1, 0, 4), V=5, seed=10)

    def run(z):
        b.logits = z
        return loss_of(impl, b, **knobs)[0]

    right = gradcheck(run, b.logits.clone().requires_grad_())
    assert right, "autograd's gradient is not that of the loss: was a part detached?"


def entropy_moved_by_a_step(impl, anchor, **knobs):
    """How far one gradient step on the regulariser alone moves H_agg."""
    b = make(seed=12)
    b.old_logp, b.adv = b.logp, b.adv * 0  # nothing but the regulariser acts
    _, grad, before = value_and_grad(impl, b, anchor, **knobs)
    b.logits = b.logits - 0.1 * grad
    after = loss_of(impl, b, anchor, **knobs)[1]
    return float(after["h_agg"]) - float(before["h_agg"])


@pytest.mark.ex7
def test_one_step_moves_entropy_to_the_anchor(impl):
    up, down = (entropy_moved_by_a_step(impl, anchor) for anchor in (2.2, 0.2))
    assert up != 0 and down != 0, "the regulariser has no gradient: was H_agg detached?"
    assert up > 1e-4, "below the anchor the penalty must raise entropy"
    assert down < -1e-4, "above the anchor the penalty must lower entropy: it is not a bonus"


def test_one_step_without_an_anchor(impl):
    up = entropy_moved_by_a_step(impl, 0.2, regularizer="bonus")
    assert up > 1e-4, "the bonus is -beta * H_agg: it raises it"
    assert entropy_moved_by_a_step(impl, 0.2, regularizer="none") == 0


@pytest.mark.ex7
def test_only_peaks_are_regularised(impl):
    b = make(seed=13)
    b.old_logp, b.adv = b.logp, b.adv * 0
    _, grad, _ = value_and_grad(impl, b)
    H = oracle_stats(b.logits, b.tokens, 0.8)["nucleus_entropy"]
    peak = oracle_peaks(H, b.mask, 0.8)
    assert (grad.numpy()[~peak] == 0).all(), (
        "a position that is not a peak gets an entropy gradient"
    )
    assert (np.abs(grad.numpy()[peak]).sum(-1) > 0).all(), "a peak gets no entropy gradient"


@pytest.mark.ex7
def test_mostly_sharp_response_end_to_end(impl):
    sharp, flat = [0.97, 0.01, 0.01, 0.01], [0.25] * 4
    z = t([[sharp, sharp, flat, sharp, sharp, sharp], [sharp] * 6]).log()
    zero, mask = torch.zeros(2, 6, dtype=F64), torch.ones(2, 6, dtype=torch.bool)
    stats = impl.siren_loss(z, zero.long(), zero, t([0, 0]), mask, 1.0, beta=1.0)[1]
    same(stats["h_agg"], math.log(4) / 2, "H_agg jumps down if q = 0 selects every token")
    peaks = stats.get("peak_fraction", torch.tensor(1 / 12))  # no student has it
    same(peaks, 1 / 12, "one peak in twelve tokens", tol=1e-6)


@pytest.mark.parametrize("knobs", [ex(7, {}), GRPO])
@pytest.mark.parametrize("dim", [0, 1])
def test_padding_changes_nothing(impl, knobs, dim):
    b = make(WITH_EMPTY, seed=16)
    knobs = knobs | {"max_tokens": 6}
    loss, grad, stats = value_and_grad(impl, b, **knobs)
    loss2, grad2, stats2 = value_and_grad(impl, padded(b, 3, dim), **knobs)
    same(loss2, loss, "padding changes the loss")
    same(grad2.narrow(dim, 0, b.logits.shape[dim]), grad, "padding changes the gradient")
    assert (grad2.narrow(dim, b.logits.shape[dim], 3) == 0).all(), "padding gets a gradient"
    assert (grad[~b.mask] == 0).all(), "padding gets a gradient"
    same_stats(stats2, stats, "padding changes it")


@pytest.mark.parametrize("knobs", [ex(7, {}), GRPO])
def test_order_of_the_batch_changes_nothing(impl, knobs):
    b, order = make(seed=17), torch.tensor([3, 0, 7, 6, 1, 5, 2, 4])
    loss, grad, _ = value_and_grad(impl, b, **knobs)
    loss2, grad2, _ = value_and_grad(impl, rows(b, order), **knobs)
    same(loss2, loss, "the loss depends on the order of the rows")
    same(grad2, grad[order], "the gradient depends on the order of the rows")


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("names, knobs", [ex(7, ("old_logp",), {}), (("old_logp", "logits"), GRPO)])
def test_garbage_in_padding_never_arrives(impl, garbage, names, knobs):
    b = make(WITH_EMPTY, seed=20)
    loss, grad, stats = value_and_grad(impl, b, **knobs)
    for name in names:
        getattr(b, name)[~b.mask] = garbage
    loss2, grad2, stats2 = value_and_grad(impl, b, **knobs)
    idea = f"padded {names[-1]} reaches it: NaN * 0 is NaN, so select before computing"
    same(loss2, loss, f"loss: {idea}")
    same(grad2, grad, f"gradient: {idea}")
    same_stats(stats2, stats, idea)


@pytest.mark.parametrize("knobs", [ex(7, {}), *LOSSES])
def test_batch_without_tokens(impl, knobs):
    b = make((0, 0), seed=21)
    loss, grad, stats = value_and_grad(impl, b, **knobs)
    assert torch.isfinite(loss) and (grad == 0).all(), "no token at all: 0 / 0"
    assert all(torch.isfinite(torch.as_tensor(x)) for x in stats.values()), "no token at all: 0 / 0"
    assert stats["h_agg"] == 0 and stats["policy_loss"] == 0, "no token at all: 0"


def test_inputs_are_never_written_to(impl):
    b = make(WITH_EMPTY, seed=22)
    before = {name: (x.clone(), x._version) for name, x in vars(b).items()}
    for chunk in (0, 4):
        accumulate(impl, b, 2, chunk=chunk, algorithm="grpo")
        loss_of(impl, b, chunk=chunk, temperature=0.5)
    impl.token_stats(b.logits, b.tokens, b.mask, 0.8)
    impl.group_advantages(b.adv, 2, algorithm="grpo")
    for name, x in vars(b).items():
        unchanged = torch.equal(x, before[name][0]) and x._version == before[name][1]
        assert unchanged, f"{name} was written to in place"


# ------------------------------------------------------------- exact micro-batches, the update


def accumulate(impl, b, size, exact=True, **knobs):
    """Sums of loss, gradient and stats over micro-batches of `size` rows, by their shares."""
    H = impl.nucleus_entropy(b.logits, KNOBS["top_p"])
    peak = impl.peak_mask(H, b.mask, KNOBS["peak_quantile"])
    h_agg, parts = impl.aggregate_entropy(H, peak, b.mask), []
    for start in range(0, len(b.adv), size):
        some = slice(start, start + size)
        micro, anchor = rows(b, some), ANCHOR
        if exact:
            h_micro = impl.aggregate_entropy(H[some], peak[some], micro.mask)
            anchor = impl.micro_batch_anchor(h_micro, h_agg, ANCHOR)
        loss, grad, stats = value_and_grad(impl, micro, anchor, **knobs)
        shares = micro.mask.any(1).sum() / b.mask.any(1).sum(), micro.mask.sum() / b.mask.sum()
        stats = {k: x * shares[k in OVER_TOKENS] for k, x in stats.items()}
        parts.append((loss * shares[0], grad * shares[0], stats))
    stats = {name: sum(part[2][name] for part in parts) for name in parts[0][2]}
    return sum(part[0] for part in parts), torch.cat([part[1] for part in parts]), stats


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("knobs", [ex(8, {}), {"algorithm": "grpo"}])
def test_micro_batches_add_up(impl, size, knobs):
    for dtype, tol in ((F64, 1e-7), (torch.float32, 1e-6)):  # a share, 3 / 7, is float32
        b = make(WITH_EMPTY, seed=14, dtype=dtype)  # size 1: one micro-batch has no token at all
        loss, grad, stats = value_and_grad(impl, b, **knobs)
        loss_sum, grad_sum, stats_sum = accumulate(impl, b, size, **knobs)
        same(loss_sum, loss, "the micro-batches' losses, by their shares, add up", tol)
        same(grad_sum, grad, "the penalty's gradient depends on the micro-batch size", tol)
        same_stats(stats_sum, stats, "shares add up")
        if dtype is F64:
            expected, _ = oracle_siren(b, ANCHOR, **KNOBS, **knobs)
            same(loss_sum, expected, "shares add up to the definition", tol)


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("knobs", [k for k in LOSSES if k["regularizer"] != "anchor"])
def test_linear_losses_add_up_by_themselves(impl, size, knobs):
    b = make(WITH_EMPTY, seed=14)
    loss, grad, stats = value_and_grad(impl, b, **knobs)
    loss_sum, grad_sum, stats_sum = accumulate(impl, b, size, exact=False, **knobs)
    same(loss_sum, loss, "loss", 1e-7)
    same(grad_sum, grad, "gradient", 1e-7)
    same_stats(stats_sum, stats, "shares add up")


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_square_per_micro_batch_adds_the_variance(impl, size):
    """Mean of squares = square of the mean + variance: what the official code optimises."""
    b = make(seed=15)
    exact, _, _ = accumulate(impl, b, size)
    per_micro, _, _ = accumulate(impl, b, size, exact=False)
    h = []
    for start in range(0, 8, size):
        micro = rows(b, slice(start, start + size))
        h.append(oracle_siren(micro, ANCHOR, **KNOBS)[1]["h_agg"])
    same(np.mean(h), oracle_siren(b, ANCHOR, **KNOBS)[1]["h_agg"], "H_agg is linear")
    excess = KNOBS["beta"] * np.var(h)
    same(per_micro - exact, excess, "penalty excess = beta * variance of the micro-batches' H_agg")
    assert size == 8 or excess > 1e-4, "this batch could not have told the two apart"


@pytest.mark.ex8
def test_gaps_of_micro_batches_are_the_minibatchs(impl):
    h, h_agg = t([0.2, 1.5, 0.0]), t(0.7)
    gaps = h - torch.stack([torch.as_tensor(impl.micro_batch_anchor(x, h_agg, 0.9)) for x in h])
    same(gaps, [-0.2] * 3, "the gap of each micro-batch is that of the mini-batch, H_agg - H*")
    same(impl.micro_batch_anchor(h_agg, h_agg, 0.9), 0.9, "one micro-batch alone: its anchor is H*")


# -------------------------------------------------------------------------------- 6. evaluation


@pytest.mark.ex9
def test_pass_at_k_against_all_subsets(impl):
    for n in range(1, 9):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            hits = [min(subset) < c for subset in itertools.combinations(range(n), k)]
            same(impl.pass_at_k(n, c, k), np.mean(hits), f"unbiased pass@k, {n=} {c=} {k=}")


@pytest.mark.ex9
def test_pass_at_k_is_stable_for_many_samples(impl):
    same(impl.pass_at_k(10_000, 1, 100), 0.01, "binomials overflow: use products or integers")
    same(impl.pass_at_k(1000, 0, 1000), 0.0, "nothing correct")


MAJORITIES = [  # answers, correct, k, maj@k, why
    (["1", "2", "2"], "2", 3, 1, "the most frequent answer wins"),
    (["2", "1", "1"], "2", 3, 0, "one correct answer is not a majority"),
    (["2", "1", "1", "3", "4"], "1", 5, 1, "the most frequent answer wins, also with two of five"),
    (["2", "1", "1", "2"], "2", 4, 1, "tie: the answer given first"),
    (["2", "2", "1", "1"], "2", 4, 1, "tie: the answer given first, not the last"),
    (["1", "2", "2", "1"], "2", 4, 0, "tie: the answer given first, not the last or the correct"),
    (["3", "1", "2", "2", "1"], "1", 5, 1, "tie of the leaders: the one of them given first"),
    (["3", "1", "2", "2", "1"], "3", 5, 0, "first given, but not among the leaders"),
    ([None, None, None, "2"], "2", 4, 1, "None is not a vote"),
    ([None, "1", None, "2"], "1", 4, 1, "None is not a vote, not even in a tie"),
    ([None, None], "2", 2, 0, "nobody voted"),
    (["2", "1", None, None], "2", 2, 0.5, "blocks of k: [2, 1] is right, [None, None] is not"),
    (["2", "2", "1", "1", "1", "1"], "2", 2, 1 / 3, "mean over the blocks"),
    (["2", "1", "2"], "2", 1, 2 / 3, "k = 1 is the mean accuracy"),
    (["2", "2", "1"], "2", 2, 1, "votes beyond the last whole block are not used"),
    (["", "", "2"], "2", 3, 0, "an empty text is a vote: None alone is none"),
    (["2", "0.5", "1/2"], "2", 3, 1, "votes are compared as they are given, not by value"),
]


@pytest.mark.ex10
@pytest.mark.parametrize("given_answers, correct, k, expected, why", MAJORITIES)
def test_maj_at_k(impl, given_answers, correct, k, expected, why):
    same(float(impl.maj_at_k(given_answers, correct, k)), expected, why)


# ------------------------------------------------------------------------------ the exercises
# Together with the tests above that are marked, these grade exercises/student.py. They come first
# there, work on numbers that fit into one's head, and each failure names the idea that is missing.


@pytest.mark.ex1
def test_ex1_advantages(impl):
    r = t([1, 0, 0, 0, 1, 1, 1, 0])
    groups, interleaved = r.view(2, 4), r.view(4, 2)
    centred = (groups - groups.mean(1, keepdim=True)).view(-1)
    stds = r[:4].std(), r[:4].std(correction=0), centred.std()
    mistakes = {f"no division by the standard deviation, {s:.2f}": centred / s for s in stds}
    mistakes |= {
        "the mean is of the response's own group, not of the batch": r - r.mean(),
        "a group is consecutive rows": (interleaved - interleaved.mean(0)).view(-1),
        "the group's mean includes the response itself": centred * 4 / 3,
        "subtract the mean, not the median": r - t([0, 0, 0, 0, 1, 1, 1, 1]),
        "mind the sign: reward - mean": -centred,
    }
    expected = [0.75, -0.25, -0.25, -0.25, 0.25, 0.25, 0.25, -0.75]
    same(impl.group_advantages(r, 4), expected, "reward - mean of its group", mistakes=mistakes)
    assert r.tolist() == [1, 0, 0, 0, 1, 1, 1, 0], "rewards was written to: return a new tensor"
    same(impl.group_advantages(t([1, 1, 1]), 3), [0.0] * 3, "equal rewards teach nothing")


@pytest.mark.ex2
def test_ex2_clipped_loss(impl):
    _, slope, _ = one_token_loss(impl, 1, 1.0)
    assert slope < 0, "a loss is minimised: its gradient must make a token with A > 0 likelier"
    cases = [(1, 0.5), (1, 1.5), (-1, 0.5), (-1, 1.5), (0, 1.5)]
    got = torch.stack([one_token_loss(impl, *case)[0] for case in cases])
    a, ratio = t(cases).T
    free, held = ratio * a, ratio.clamp(0.8, 1.2) * a
    mistakes = {
        "the ratio is not clipped": -free,
        "the way back is never clipped: take the smaller of both terms": -held,
        "the gain is the smaller of both terms, not the larger": -torch.maximum(free, held),
        "for A < 0 you clip on the wrong side: there the ratio is held from below": torch.where(
            a > 0, -torch.minimum(free, held), -torch.maximum(free, held)
        ),
    }
    idea = "-min(r A, clip(r) A) for (A, r) = " + ", ".join(map(str, cases))
    same(got, [-0.5, -1.2, 0.8, 1.5, 0], idea, mistakes=mistakes)
    fractions = [float(one_token_loss(impl, *case)[2]["clip_fraction"]) for case in cases]
    same(fractions, [0, 1, 1, 0, 0], "clip_fraction: where the clipped term is the smaller one")


@pytest.mark.ex2
def test_ex2_masks_and_means(impl):
    zero, mask = torch.zeros(3, 4, dtype=F64), torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [0] * 4])
    mask, adv = mask.bool(), t([1.0, -2.0, 7.0])  # the token losses are -1, once, and 2, 3 times

    def result(old_logp=zero, **knobs):
        return impl.policy_loss(zero, old_logp, adv, mask, **knobs)

    mistakes = {
        "divide by the budget, not by each response's own length": (-1 + 2) / 2,
        "divide by budget and responses, not by the number of tokens": (-1 + 6) / 4,
        "leave out empty responses when dividing by their number": (-1 + 6) / 4 / 3,
        "padding reaches the loss: its tokens are not part of the sums": (-4 + 8 - 28) / 4 / 2,
        "padding reaches the loss: neither summed nor counted": (-4 + 8 - 28) / 4 / 3,
    }
    idea = "sum over tokens / max_tokens, then mean over responses; max_tokens=None means T"
    same(result()[0], (-1 / 4 + 6 / 4) / 2, idea, mistakes=mistakes)
    same(result(max_tokens=10)[0], (-1 / 10 + 6 / 10) / 2, "divide by max_tokens where given")
    idea = "padding reaches the loss: its tokens are not part of the sums"
    same(result(zero.masked_fill(~mask, -1.0))[0], result()[0], idea)
    nan = result(zero.masked_fill(~mask, math.nan))[0]
    assert torch.isfinite(nan), "NaN in padding: select before computing, since NaN * 0 is NaN"
    clipped = result(t([[-1.0] * 4, [0.0] * 4, [-1.0] * 4]))[1]["clip_fraction"]
    same(clipped, 1 / 4, "clip_fraction: the share of the tokens in the mask")
    idea = "a response counts although its advantage is 0: divide by all that have a token"
    silent = impl.policy_loss(zero, zero, t([1.0, 0.0, 7.0]), mask)[0]
    same(silent, (-1 / 4 + 0) / 2, idea)
    loss, stats = impl.policy_loss(zero[2:], zero[2:], adv[2:], mask[2:])
    same([loss, stats["clip_fraction"]], [0, 0], "no token at all: the loss is 0, not 0 / 0")


@pytest.mark.ex2
def test_ex2_gradient_with_rubbish_in_padding(impl):
    b = make(WITH_EMPTY, seed=4)
    grads = []
    for rubbish in (0.0, math.nan):
        x, y = (x.masked_fill(~b.mask, rubbish).requires_grad_() for x in (b.logp, b.old_logp))
        grads += torch.autograd.grad(impl.policy_loss(x, y, b.adv, b.mask)[0], x)
    idea = "NaN in padding reaches the gradient: select before computing, since NaN * 0 is NaN"
    same(grads[1], grads[0], idea)


@pytest.mark.ex3
def test_ex3_nucleus(impl):
    z = t([0.5, 0.25, 0.15, 0.1]).log()
    try:
        impl.nucleus_mask(z, 0.4)
    except IndexError:
        raise AssertionError("logits [..., V]: work along the last dimension, -1") from None
    for p, size in ((0.4, 1), (0.6, 2), (0.8, 3), (0.95, 4)):
        mask = impl.nucleus_mask(z, p)
        kept = z.exp()[mask].sum().item()
        idea = f"your nucleus leaves out the token that crosses p = {p}: its mass is {kept:.2f}"
        assert kept >= p, idea
        got = mask.sum().item()
        assert got == size, f"your nucleus is not the smallest: {got} tokens instead of {size}"
    order = torch.tensor([2, 0, 3, 1])
    got = impl.nucleus_mask(z[order], 0.6).tolist()
    idea = "sort by probability, then map the mask back from the sorted order to token ids"
    assert got == [False, True, False, True], idea
    same(impl.nucleus_mask(z + 3, 0.6), impl.nucleus_mask(z, 0.6), "logits are not probabilities")
    tied = impl.nucleus_mask(torch.zeros(4), 0.5).sum().item()
    assert tied == 2, f"of 4 equally likely tokens 2 reach p = 0.5, not {tied}: no threshold on pi"
    every = impl.nucleus_mask(t([0.0, -800.0]), 1.0).tolist()  # exp(-800) is 0 in float64
    assert every == [True, True], "top_p = 1 keeps every token, even one whose pi is rounded to 0"
    both, idea = torch.stack([z, z.flip(0)]), "every position apart: work along the last dimension"
    assert impl.nucleus_mask(both, 0.6).int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]], idea


@pytest.mark.ex4
def test_ex4_nucleus_entropy(impl):
    p = np.array([0.5, 0.25, 0.15, 0.1])
    inside = p[:3]
    right, a_logit_of_0 = oracle_entropy(inside / inside.sum()), oracle_probs(np.log([*inside, 1]))
    mistakes = {
        "nearly right: was an epsilon added in the log, or a float64 made float32?": right,
        "in nats: the natural logarithm, not log2": right / math.log(2),
        "renormalise on the nucleus: q = pi / pi(V_p) sums to 1": oracle_entropy(inside),
        "log q, not log pi": -(inside * np.log(inside)).sum() / inside.sum(),
        "tokens outside the nucleus count": oracle_entropy(p),
        "a logit of 0 is not out: it must be -inf": oracle_entropy(a_logit_of_0),
        "your nucleus leaves out the token that crosses p": oracle_entropy(p[:2] / p[:2].sum()),
        "entropy has a minus sign": -right,
        "0 * log 0 is NaN: mask log q as well": math.nan,
    }
    z = t(p).log()
    same(impl.nucleus_entropy(z, 0.8), right, "H' of .5 .25 .15 .1 at p = 0.8", mistakes=mistakes)
    impl.nucleus_entropy(z.requires_grad_(), 0.8).requires_grad_().backward()
    grad, q = torch.zeros(4) if z.grad is None else z.grad, inside / inside.sum()
    assert torch.isfinite(grad).all(), "0 * log 0 in the backward pass: mask before, not after"
    mistakes = {"H' has no gradient: was it detached?": torch.zeros(4)}
    idea = "dH'/dz_j = -q_j (log q_j + H') in the nucleus, 0 outside: was a part detached?"
    same(grad, [*(-q * (np.log(q) + right)), 0], idea, mistakes=mistakes)
    same(impl.nucleus_entropy(torch.zeros(4, dtype=F64), 0.8), math.log(4), "equal options: ln 4")


@pytest.mark.ex5
def test_ex5_peaks(impl):
    peak = impl.peak_mask(t([[1, 2, 3, 4, 5], [10, 20, 30, 40, 50]]), torch.ones(2, 5).bool(), 0.8)
    assert peak[0].any(), "your quantile is over the batch; every response has its own"
    H, mask = t([[1, 2, 3, 9, 9, 9]]), torch.tensor([[1, 1, 1, 0, 0, 0]]).bool()
    peak = impl.peak_mask(H, mask, 0.8)
    assert H.tolist() == [[1, 2, 3, 9, 9, 9]], "entropy was written to: H_agg still needs it"
    assert not peak[~mask].any(), "a peak lies in the response: AND with the mask"
    assert peak[0, 2], "padding is not part of the quantile"
    tied = impl.peak_mask(t([[0.2, 0.7, 0.7, 0.7, 0.1]]), torch.ones(1, 5).bool(), 0.8)
    assert tied.int().tolist() == [[0, 1, 1, 1, 0]], "H' >= q: what equals the quantile is a peak"
    sharp = impl.peak_mask(t([[0.0] * 9 + [1.0]]), torch.ones(1, 10).bool(), 0.8)
    assert sharp.sum() == 1, "q = 0: `H' >= 0` holds everywhere; a peak also needs H' > 0"
    faint = impl.peak_mask(t([[0.0] * 9 + [1e-9]]), torch.ones(1, 10).bool(), 0.8)
    assert faint.sum() == 1, "a peak needs H' > 0, however small: no threshold"
    two = impl.peak_mask(t([[1.0, 2.0, 4.0, 3.0]]), torch.ones(1, 4).bool(), 0.7)
    assert two.int().tolist() == [[0, 0, 1, 0]], "q is interpolated linearly between two values"
    off = impl.peak_mask(t([[0.0, 2.0, 9.0]]), torch.tensor([[1, 1, 0]]).bool(), 0.0)
    assert off.int().tolist() == [[1, 1, 0]], "quantile 0: every token of the response is a peak"


@pytest.mark.ex6
def test_ex6_aggregation(impl):
    H = t([[1, 3, 5, 0], [2, 0, 0, 0], [0, 0, 0, 0], [9, 9, 9, 9]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    peak = (H >= 2) & mask
    mistakes = {"divide by the number of peaks, not by the length": 8 / 3}
    one = impl.aggregate_entropy(H[:1], peak[:1], mask[:1])
    same(one, 4.0, "H_i: the mean over the peaks", mistakes=mistakes)
    two = impl.aggregate_entropy(H[:2], peak[:2], mask[:2])
    same(two, 3.0, "mean over responses of each one's mean: long responses don't weigh more")
    silent, idea = impl.aggregate_entropy(H[:3], peak[:3], mask[:3]), "a response without a peak"
    same(silent, 2.0, f"{idea} counts 0, and it counts", mistakes={f"{idea}: 0 / 0": math.nan})
    same(impl.aggregate_entropy(H, peak, mask), 2.0, "a response without a token is left out")
    same(impl.aggregate_entropy(H[3:], peak[3:], mask[3:]), 0.0, "no response at all: 0")
    same(impl.aggregate_entropy(H, H >= 2, mask), 2.0, "no peak in padding: AND with the mask")
    H = torch.where(mask, H, math.nan).requires_grad_()
    got = impl.aggregate_entropy(H, peak, mask)
    assert got.requires_grad, "H_agg has no gradient: was the entropy detached?"
    (slope,) = torch.autograd.grad(got, H)
    idea = "NaN in padding reaches H_agg: select before computing, since NaN * 0 is NaN"
    same(got, 2.0, idea)
    expected = t([[0, 1 / 6, 1 / 6, 0], [1 / 3, 0, 0, 0], [0] * 4, [0] * 4])
    mistakes = {idea: torch.where(mask, expected, math.nan)}
    same(slope, expected, "its gradient: 1 / (peaks * responses) at the peaks", mistakes=mistakes)


@pytest.mark.ex7
def test_ex7_value(impl):
    b, knobs = make(WITH_EMPTY, seed=5), KNOBS | {"max_tokens": 9}
    loss, _, stats = value_and_grad(impl, b, max_tokens=9)
    expected, due = oracle_siren(b, ANCHOR, **knobs)
    mask, H = b.mask.numpy(), oracle_stats(b.logits, b.tokens, 0.8)["nucleus_entropy"]
    full = oracle_siren(b, ANCHOR, **knobs | {"top_p": 1.0})[1]
    mistakes = {
        "H_agg: entropies of the nucleus, not of the whole vocabulary": full["h_agg"],
        "H_agg: at the peaks only, not at every token": oracle_aggregate(H, mask, mask),
        "H_agg: at the peaks only": H[mask].mean(),
    }
    idea = "H_agg: aggregate_entropy of nucleus_entropy at the peaks of peak_mask"
    same(stats["h_agg"], due["h_agg"], idea, 1e-6, mistakes)
    gap = due["h_agg"] - ANCHOR
    peak, beta = oracle_peaks(H, mask, 0.8), KNOBS["beta"]
    h_i = [oracle_aggregate(H[[i]], peak[[i]], mask[[i]]) for i in range(8) if mask[i].any()]
    per_response = beta * np.mean((np.array(h_i) - ANCHOR) ** 2)
    mistakes = {
        "the penalty is weighted by beta": gap**2,
        "the penalty is squared": beta * abs(gap),
        "the penalty is (H_agg - anchor)^2, not a bonus": -beta * due["h_agg"],
        "square H_agg - anchor once, not per response": per_response,
        "square H_agg - anchor once, not per token": beta * np.mean((H[peak] - ANCHOR) ** 2),
        "the gap is H_agg - anchor, and not 0": 0.0,
    }
    idea = "the penalty is beta * (H_agg - anchor)^2"
    same(stats["regularizer_loss"], due["regularizer_loss"], idea, 1e-6, mistakes)
    earlier = oracle_stats(b.logits.roll(1, 1), b.tokens, 0.8)["logp"]
    shifted = oracle_policy(earlier, b.old_logp, b.adv, b.mask, max_tokens=9)[0]
    mistakes = {"logits[:, t] predicts tokens[:, t]: do not shift": shifted}
    same(stats["policy_loss"], due["policy_loss"], "the policy loss", 1e-6, mistakes)
    same(loss, expected, "the loss is the sum of both terms")
    assert entropy_moved_by_a_step(impl, 2.2), "the penalty has no gradient: was H_agg detached?"
    for name, value in (("top_p", 0.5), ("peak_quantile", 0.3)):
        got = value_and_grad(impl, b, **{name: value})[2]["h_agg"]
        other = oracle_siren(b, ANCHOR, **KNOBS | {name: value})[1]["h_agg"]
        same(got, other, f"{name} is an argument: {name} = {value} must change H_agg", 1e-6)


@pytest.mark.ex8
def test_ex8_gap_and_parts(impl):
    h_micro, h_agg, anchor = t(1.5), t(0.7), 0.9
    mistakes = {
        "the gap of each micro-batch must be H_agg - H*, that of ALL rows": anchor,
        "mind the sign: h_micro minus the new anchor is the gap": 1.5 + 0.7 - 0.9,
        "that is the gap; the anchor is what h_micro minus the gap gives": 0.7 - 0.9,
        "h_micro is that of the micro-batch, not of all rows": 0.7 - (1.5 - 0.9),
        "take the gap itself, not its square": 1.5 - (0.7 - 0.9) ** 2,
    }
    idea = "h_micro - (the new anchor) = H_agg - H*"
    same(impl.micro_batch_anchor(h_micro, h_agg, anchor), 1.7, idea, mistakes=mistakes)
    same(impl.micro_batch_anchor(h_micro, t(1.0), 0.9), 1.4, f"{idea}, above the anchor as below")
    b = make(WITH_EMPTY, seed=14)  # with size 1, one micro-batch has no token at all
    loss, grad, stats = value_and_grad(impl, b)
    for size in (4, 3, 2, 1):
        loss_sum, grad_sum, stats_sum = accumulate(impl, b, size)
        at = f"micro-batches of {size}"
        assert torch.isfinite(grad_sum).all(), f"{at}: one without tokens gives 0 / 0"
        for name in ("policy_loss", "h_agg", "regularizer_loss"):
            same(stats_sum[name], stats[name], f"{at}: shares of {name} add up", 1e-6)
        idea = f"{at}: the gradient is 2 beta (H_agg of ALL rows - H*) times the part's"
        same(grad_sum, grad, idea, 1e-6)
        same(loss_sum, loss, f"{at}: the losses of the parts add up", 1e-6)


@pytest.mark.ex9
def test_ex9_pass_at_k(impl):
    mistakes = {
        "biased: 1 - (1 - c/n)^k draws with replacement; count the subsets": 1 - 0.6**2,
        "nearly right: logarithms are rounded, so use products or integers": 0.7,
        "c/n is avg@k": 0.4,
        "k c / n counts a subset with two right ones twice": 0.8,
        "that is the chance that all are wrong": 0.3,
        "the k samples are some of the n, not all": 1.0,
        "at least one is right, not exactly one": 0.6,
        "at least one is right, not all k": 0.1,
    }
    same(impl.pass_at_k(5, 2, 2), 0.7, "1 - C(n - c, k) / C(n, k)", mistakes=mistakes)


@pytest.mark.ex11
def test_ex11_prompts(impl):
    out, lengths = sampled(impl, small_model(), max_tokens=1), t([3, 7, 5])
    assert out.prompt.shape == (48, 7), "prompts are padded to the longest, one row per sample"
    idea = "prompt_mask comes from positions, not from ids: a prompt may hold pad_id"
    same(out.prompt_mask.sum(1).sort().values, lengths.sort().values.repeat_interleave(16), idea)
    for row, (ids, mask) in enumerate(zip(out.prompt, out.prompt_mask)):
        assert mask[-1], "pad prompts on the left: all of them end in the last column"
        idea = f"row {row} is sample {row % 16} of prompt {row // 16}: i * samples + j"
        assert ids[mask].tolist() == PROMPTS[row // 16], idea


@pytest.mark.ex11
def test_ex11_cache(impl):
    model, fed = small_model(), []

    def watch(_, args, given):
        fed.append(given.get("input_ids", args[0] if args else None).shape[1])

    model.register_forward_pre_hook(watch, with_kwargs=True)
    out = sampled(impl, model)
    assert fed[0] == 7, "the first call takes the prompts, padded to the longest of 7 tokens"
    assert set(fed[1:]) == {1}, f"after the prompt feed one token at a time, not {max(fed[1:])}"
    assert not out.logp.requires_grad, "sampling keeps no graph: use torch.no_grad()"
