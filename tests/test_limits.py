"""What siren.py must stand: large vocabularies, little memory, low precision, hostile text.

Against the oracles of common.py: numpy, float64, straight from the definitions.
"""

from __future__ import annotations

import doctest
import math
import os
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import (
    ANCHOR,
    F64,
    GRPO,
    LOSSES,
    WITH_EMPTY,
    chi_square,
    loss_of,
    make,
    oracle_entropy,
    oracle_nucleus,
    oracle_probs,
    oracle_q,
    oracle_stats,
    same,
    same_stats,
    sampled,
    seeded,
    small_model,
    value_and_grad,
)  # fmt: skip
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import siren

# ------------------------------------------------------------ large vocabularies, precision


def large_vocabulary(V=3000):
    """Uniform, flat, peaked and tied rows, and rows with tokens of logit -inf."""
    z = [torch.randn(V, generator=seeded(1), dtype=F64) * scale for scale in (0, 0.1, 1, 3, 9)]
    z += [row.bfloat16().to(F64) for row in z]  # many tokens tie
    forbidden = torch.arange(V) % 3 == 0
    return torch.stack(z + [row.masked_fill(forbidden, -math.inf) for row in z])


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.8, 0.999, 1.0])
@pytest.mark.parametrize("subset", ["all", "each"])
def test_nuclei_of_1_to_3000_tokens(top_p, subset):
    """The likeliest 64, 1024 or all are sorted: alone and beside flatter rows."""
    z = large_vocabulary().requires_grad_()
    groups = [range(len(z))] if subset == "all" else [[i] for i in range(len(z))]
    H, grad, size, sizes = [], [], [], []
    for group in groups:
        tokens, mask = torch.full((len(group), 1), 1), torch.ones(len(group), 1)
        stats = siren.token_stats(z[group][:, None], tokens, mask, top_p)
        H.append(stats["nucleus_entropy"][:, 0])
        size.append(stats["nucleus_size"][:, 0])
        sizes.append(siren.nucleus_mask(z[group], top_p).sum(-1))
    (grad,) = torch.autograd.grad(torch.cat(H).sum(), z)
    assert torch.equal(torch.cat(size), torch.cat(sizes)) and max(map(max, sizes)) > 100
    for i, row in enumerate(z.detach().numpy()):
        q = oracle_q(row, top_p)
        due = oracle_entropy(q)
        same(torch.cat(H)[i], due, f"H' of row {i}")
        same(torch.cat(size)[i], float((q > 0).sum()), f"|V_p| of row {i}", tol=1e-3)  # rounded p
        slope = np.zeros_like(q)
        slope[q > 0] = -q[q > 0] * (np.log(q[q > 0]) + due)
        got = np.sort(grad[i].numpy())  # of tied tokens any may be inside
        same(got, np.sort(slope), f"gradient of row {i}", tol=1e-7)


@pytest.mark.parametrize("top_p", [0.5, 0.8, 0.999999, 0.99999999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_forbidden_tokens_are_outside_and_bring_no_nan(top_p, dtype):
    z = torch.tensor([[1.0, -math.inf, 0.5, 0.2, -math.inf]], dtype=dtype).requires_grad_()
    inside = siren.nucleus_mask(z, top_p)
    assert not inside[0, [1, 4]].any(), "logit -inf: never in the nucleus"
    stats = siren.token_stats(z[None], torch.tensor([[2]]), torch.ones(1, 1), top_p)
    (stats["nucleus_entropy"] + stats["logp"]).sum().backward()
    assert torch.isfinite(z.grad).all(), "0 * inf in the gradient"
    full = oracle_entropy(oracle_probs(np.array([1, 0.5, 0.2])))
    same(stats["entropy"], [[full]], "0 log 0 = 0", tol=1e-6)
    assert stats["nucleus_size"] == inside.sum()
    same(stats["nucleus_entropy"][0], siren.nucleus_entropy(z, top_p), "forbidden tokens")


def test_low_precision_logits_are_scored_in_float32():
    z = torch.randn(5, 3000, generator=seeded(6)).bfloat16()
    H, size = siren.nucleus_entropy(z, 0.8), siren.nucleus_mask(z, 0.8).sum(-1)
    assert H.dtype == torch.float32, "sums over a vocabulary need at least float32"
    for i, row in enumerate(z.double().numpy()):
        idea = "bfloat16 logits: convert before the softmax, not after"
        same(H[i], oracle_entropy(oracle_q(row, 0.8)), idea, tol=1e-5)
        assert abs(size[i].item() - len(oracle_nucleus(row, 0.8))) <= 1, idea


@pytest.mark.parametrize("tau", [0.1, 0.3, 0.5, 0.7, 0.8, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_quantile_that_is_one_of_the_values_is_a_peak(tau, dtype):
    """n * tau + 1 values: rounding must not push the quantile above the value that it is."""
    for n in (10, 50, 100, 1000, 5000):
        H = torch.arange(1, n + 2).to(dtype)[None] / n
        peak = siren.peak_mask(H, torch.ones_like(H), tau)
        assert peak.sum() == n + 1 - round(n * tau), f"{n + 1} values"


# --------------------------------------------------------------------------- token_stats, in chunks


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("chunk", [0, 5])
def test_token_stats_against_oracle(temperature, chunk):
    b = make(WITH_EMPTY, seed=2)
    expected = oracle_stats(b.logits, b.tokens, 0.8, temperature)
    b.logits.requires_grad_()
    stats = siren.token_stats(b.logits, b.tokens, b.mask, 0.8, temperature, chunk=chunk)
    assert set(stats) == set(expected)
    for name, value in expected.items():
        idea = f"{name} (logits are divided by the temperature first), 0 in padding"
        same(stats[name], np.where(b.mask, value, 0.0), idea)
    assert not stats["nucleus_size"].is_floating_point() and stats["logp"].requires_grad
    assert not stats["entropy"].requires_grad


@pytest.mark.parametrize("chunk", [0, 3])
def test_gradcheck_token_stats(chunk):
    b = make((3, 3), V=7, seed=8)

    def run(x):
        stats = siren.token_stats(x, b.tokens, b.mask, 0.8, 1.4, chunk=chunk)
        return stats["logp"], stats["nucleus_entropy"]

    b.logits[:, 1::3] /= 6  # steep softmaxes are for other tests: finite differences dislike them
    b.logits.requires_grad_()
    assert run(b.logits)[0].requires_grad and run(b.logits)[1].requires_grad
    assert torch.autograd.gradcheck(run, b.logits)


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
@pytest.mark.parametrize("knobs", LOSSES)
def test_chunking_changes_nothing(chunk, knobs):
    b = make(WITH_EMPTY, seed=18)
    knobs = {"temperature": 0.8, **knobs}
    loss, grad, stats = value_and_grad(siren, b, **knobs)
    loss2, grad2, stats2 = value_and_grad(siren, b, chunk=chunk, **knobs)
    same(loss2, loss, "chunked loss", tol=1e-12)
    same(grad2, grad, "chunked gradient", tol=1e-12)
    same_stats(stats2, stats, "chunked")


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("chunk", [0, 1, 4, 1000])
def test_hidden_states_and_head_equal_logits(with_bias, chunk):
    hidden = torch.randn(3, 5, 4, generator=seeded(19), dtype=F64)
    tokens, mask = torch.randint(9, (3, 5), generator=seeded(19)), torch.arange(15).view(3, 5) < 12
    a, b = torch.randn(2, 3, 5, generator=seeded(20), dtype=F64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = torch.nn.Linear(4, 9, bias=with_bias, dtype=F64)

    def run(fused):
        head.zero_grad()
        x = hidden.clone().requires_grad_()
        outputs, given = (x, head) if fused else (head(x), None)
        stats = siren.token_stats(
            outputs, tokens, mask, 0.8, 0.9, head=given, chunk=chunk if fused else 0
        )
        (a * stats["logp"] + b * stats["nucleus_entropy"]).sum().backward()
        return stats, [x.grad, *(p.grad.clone() for p in head.parameters())]

    stats, grads = run(fused=False)
    stats2, grads2 = run(fused=True)
    same_stats(stats2, stats, "from hidden states")
    for one, two in zip(grads, grads2):
        same(two, one, "gradient with respect to hidden states, weight or bias", tol=1e-12)


# ------------------------------------------------------------------------------------- memory


def kept_for_backward(inputs, run):
    """Element counts of the tensors that autograd keeps, leaving out the inputs' own storage."""
    own = {x.untyped_storage().data_ptr() for x in inputs}
    kept = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()
    return sorted(x.untyped_storage().nbytes() // x.element_size() for x in kept.values()), out


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                size = x.untyped_storage().nbytes() // x.element_size()
                self.elements = max(self.elements, size)
        return out


def test_chunking_keeps_one_copy_of_given_logits_and_no_more():
    b = make((6, 6, 6), V=600, seed=23)
    b.logits.requires_grad_()
    full = b.logits.numel()
    control, _ = kept_for_backward([b.logits], lambda: b.logits.softmax(-1).square().sum())
    assert max(control) == full, "the recorder itself is blind"
    sizes, (loss, _) = kept_for_backward([b.logits], lambda: loss_of(siren, b, chunk=4))
    *rest, largest = sizes
    assert largest <= full, "more than the selected logits is kept for backward"
    assert sum(rest) < full / 4, "all chunks together are kept: recompute them in the backward"
    loss.backward()
    assert b.logits.grad.abs().sum() > 0


@pytest.mark.parametrize("trained", [True, False])
def test_chunked_head_never_holds_all_logits(trained):
    hidden = torch.randn(3, 8, 4, requires_grad=True)
    head = torch.nn.Linear(4, 600, bias=False).requires_grad_(trained)
    tokens, mask = torch.zeros(3, 8).long(), torch.ones(3, 8)

    def run():
        stats = siren.token_stats(hidden, tokens, mask, 0.8, head=head, chunk=3)
        return (stats["logp"] + stats["nucleus_entropy"]).sum()

    with Largest() as largest:
        run().backward()
    assert hidden.grad.abs().sum() > 0 and (head.weight.grad is not None) == trained
    idea = "the logits of more than one chunk exist at a time, forward or backward"
    assert 3 * 600 <= largest.elements < 24 * 600 / 2, idea
    sizes, _ = kept_for_backward([hidden, head.weight], run)
    assert sum(sizes) < 600, "nothing of size V outlives its chunk"


# -------------------------------------------------------------------- a device without float64


class NoFloat64(TorchDispatchMode):
    """Refuses to make a float64 tensor, as Apple's MPS does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.dtype == F64:
                raise TypeError(f"{func}: this device has no float64")
        return out


def test_the_stand_in_refuses_float64():
    with NoFloat64(), pytest.raises(TypeError, match="no float64"):
        torch.ones(2).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("knobs", LOSSES)
def test_the_method_and_the_sampler_need_no_float64(dtype, knobs):
    model = small_model().to(dtype)
    cfg = siren.Config(group_size=4, micro_batch_size=3, max_tokens=12, chunk=5, **knobs)
    with NoFloat64():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        rollout = sampled(siren, model, samples=4)
        rewards = torch.tensor([1.0, 0, 0, 0] * 3)
        old = siren.score(model, rollout, cfg)
        peak = siren.peak_mask(old["nucleus_entropy"], rollout.mask, 0.8)
        h_agg = siren.aggregate_entropy(old["nucleus_entropy"], peak, rollout.mask)
        stats = siren.update(model, optimizer, rollout, old["logp"], rewards, h_agg, cfg)
        siren.nucleus_mask(torch.zeros(2, 9), 0.8)
    assert math.isfinite(stats["grad_norm"]) and stats["grad_norm"] > 0


# -------------------------------------------------------------------------------------------- draws


def test_logits_that_are_no_numbers_stop_the_sampler():
    model = small_model()
    model.lm_head.weight.data[3] = math.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        sampled(siren, model)


def some_policies(dtype, V=700):
    """pi [40, V]: peaked, flat, and with tokens of probability 0 at the start and at the end."""
    z = torch.randn(40, V, generator=seeded(1), dtype=F64) * torch.linspace(0, 12, 40)[:, None]
    z[::2, : V // 3], z[1::2, V // 2 :] = -math.inf, -math.inf
    return z.softmax(-1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_draw_inverts_the_cumulative_sum(dtype):
    pi = some_policies(dtype)
    for seed in range(20):
        u = torch.rand(40, 1, generator=seeded(seed)).double().numpy()[:, 0]
        ids = siren.draw(pi, seeded(seed))
        assert ids.shape == (40, 1)
        for p, x, j in zip(pi.double().numpy(), u, ids[:, 0]):
            mass, eps = np.cumsum(p), 1e-5 if dtype is torch.float32 else 1e-12
            before, after = (mass[j] - p[j]) / mass[-1], mass[j] / mass[-1]
            assert before - eps <= x < after + eps, "the first whose running sum exceeds u"


@pytest.mark.parametrize("u", [0.0, 2.0**-24, 0.25, 0.5, 1 - 2.0**-24])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_token_of_probability_0_is_never_drawn(monkeypatch, u, dtype):
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, u))
    for scale in (1.0, 0.999, 1.001):  # what rounding may make of a sum of 1, and more
        for pi in (some_policies(dtype), some_policies(dtype, 5), torch.eye(40, dtype=dtype)):
            ids = siren.draw(pi * scale, None)
            assert (ids < pi.shape[1]).all() and (pi.gather(1, ids) > 0).all()


def test_frequencies_of_draw():
    pi = torch.tensor([0.0, 0.5, 0.001, 0.0, 0.299, 0.2, 0.0])
    ids = siren.draw(pi.expand(200_000, 7), seeded())[:, 0].tolist()
    chi_square(Counter(ids), dict(enumerate(pi.tolist())), "draw follows pi")
    assert not set(ids) & {0, 3, 6}


# ----------------------------------------------------------------------------- empty and wild input


@pytest.mark.parametrize("rule", [{}, GRPO])
@pytest.mark.parametrize("size", [5, 1])
def test_groups_must_fill_the_batch(rule, size):
    with pytest.raises(ValueError):
        siren.group_advantages(torch.zeros(12), size, **rule)


@pytest.mark.parametrize("B, T", [(0, 3), (2, 0), (0, 0), (2, 3)])
@pytest.mark.parametrize("knobs", LOSSES)
def test_empty_batches_have_loss_0_and_gradient_0(B, T, knobs):
    for chunk in (0, 1):
        b = make((6,) * 3, seed=21)
        b = SimpleNamespace(**{k: x[:B] if x.dim() == 1 else x[:B, :T] for k, x in vars(b).items()})
        b.mask = b.mask & False
        loss, grad, stats = value_and_grad(siren, b, **knobs, chunk=chunk)
        assert loss == 0 and grad.shape == b.logits.shape and not grad.any()
        assert not any(stats.values())


def test_a_wild_ratio_stays_finite():
    logp = torch.full((1, 1), 300.0, requires_grad=True)  # exp(300) overflows float32
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, stats = siren.policy_loss(logp, torch.zeros(1, 1), torch.tensor([-1.0]), mask)
    loss.backward()
    same(loss, math.exp(20), "the log-ratio is clamped to [-20, 20]", tol=1e-5)
    assert torch.isfinite(stats["approx_kl"]) and torch.isfinite(logp.grad).all()


def test_an_unknown_regularizer_is_refused():
    with pytest.raises(ValueError, match="anchor, bonus or none"):
        loss_of(siren, make(), regularizer="kl")


# --------------------------------------------------------------- a whole update, a whole evaluation


@pytest.mark.parametrize("knobs", LOSSES)
def test_update_is_the_same_for_every_micro_batch_size(knobs):
    """Gradients of all weights, from hidden states and the head, on a model in float64."""
    model = small_model().double()
    out = sampled(siren, model, samples=4)
    b = make((6,) * len(out.mask), seed=3)
    rewards, old_logp, found = b.adv, out.logp + b.old_logp[:, :1] / 9, []
    for size in (1, 5, 12):
        sizes = {"group_size": 4, "micro_batch_size": size, "max_tokens": 12}
        cfg = siren.Config(beta=0.7, grad_clip=1e6, **sizes, **knobs)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)
        stats = siren.update(model, optimizer, out, old_logp, rewards, ANCHOR, cfg)
        found.append((stats, torch.cat([p.grad.flatten() for p in model.parameters()])))
    for stats, grad in found[:-1]:
        same(grad, found[-1][1], "gradient", tol=1e-7)
        same_stats(stats, found[-1][0], "stats")
    assert found[0][1].abs().max() > 1e-3


def test_evaluate_counts_what_the_model_answers():
    """Each token is an answer: the mean is the policy's own probability of it."""
    model, k = small_model(vocab=6), 2000
    task = SimpleNamespace(decode=lambda ids: str(ids[0]), answer_form=str, equal=None)
    task.eos_ids, task.pad_id = [0], 0
    problems = [
        SimpleNamespace(prompt=[3, 4], answer="4.0"),
        SimpleNamespace(prompt=[5], answer="x"),
    ]
    cfg = siren.Config(max_tokens=1, eval_samples=k, eval_temperature=0.7)
    values = siren.evaluate(model, task, problems, cfg)
    first = siren.respond(model, task, problems, cfg, "0/eval", k, 0.7).tokens[:k, 0].tolist()
    assert values[f"avg@{k}"] == first.count(4) / k / 2 and 0 < first.count(4) < k
    logits = model(torch.tensor([problems[0].prompt])).logits[0, -1] / 0.7
    right, likeliest = logits.softmax(-1)[4].item() / 2, float(logits.argmax() == 4) / 2
    assert abs(values[f"avg@{k}"] - right) < 2.3 * math.sqrt(right / k), "half of the problems"
    assert values[f"maj@{k}"] == likeliest and values[f"pass@{k}"] == 0.5
    assert values[f"distinct@{k}"] <= 6 / k and len(values) == 4


# ------------------------------------------------------------------------- hostile text

HOSTILE = [  # head, the part repeated to fill the length, tail
    *[("", r"\boxed{", ""), ("", r"\boxed{1}", ""), (r"\boxed{" * 100_000, "}", "")],
    *[("", "{", ""), (r"\boxed{", "{", "}"), (r"\boxed{", "\\", "}"), (r"\boxed", " ", "{4}")],
    *[("", "9", ""), (r"\boxed{", "9", "}"), (r"\boxed{0.", "3", "}"), (r"\boxed{4", " ", "x}")],
    *[("", "1/", ""), (r"\boxed{", "1/", "1}"), (r"\boxed{1", ",000", "x}")],
    *[(r"\boxed{", "-", "4}"), (r"\boxed{", "$", "}"), (r"\boxed{", r"\frac{", "}")],
    *[(r"\boxed{4", r"\text{a}", "}"), (r"\boxed{4", r"\text{", "}"), (r"\boxed{4", " cm", "}")],
]


@pytest.mark.parametrize("head, repeated, tail", HOSTILE)
def test_hostile_responses_cost_no_time(head, repeated, tail):
    for size in (2_000, 20_000, 200_000, 1_000_000):  # quadratic code fails at a small size
        text = head[: size // 2] + repeated * (size // len(repeated)) + tail
        start = time.perf_counter()
        assert siren.verify(text, "5") is False
        seconds = time.perf_counter() - start
        assert seconds < 2, f"{seconds:.1f} s for {size} characters, {head[:20]!r} {repeated!r}"


EXPONENTS = ["1e10000000", "1e-10000000", "1E+9999999", "10^{10000000}", "2^{9^{9^{9^{9}}}}"]


@pytest.mark.parametrize("box", [*EXPONENTS, "9**9**9**9", "1.0e10000000/3", "99999999!"])
def test_huge_exponents_are_not_evaluated(box):
    start = time.perf_counter()
    assert siren.verify(rf"\boxed{{{box}}}", "5") is False
    assert type(siren.verify(r"\boxed{5}", box)) is bool
    assert time.perf_counter() - start < 2, "a short answer can stand for a gigantic number"


def test_code_is_only_text():
    code = "__import__('os').getpid()"
    assert siren.verify(rf"\boxed{{{code}}}", str(os.getpid())) is False
    assert isinstance(siren.normalize(code), str)


PIECES = [r"\boxed{", r"\frac", r"\text{", "{", "}", "^", "−", *r"0123456789/.,-%$\ "]


answers = st.text() | st.lists(st.sampled_from(PIECES), max_size=20).map("".join)


@given(text=answers, answer=answers)
def test_verifier_never_raises(text, answer):
    for response in (text, rf"\boxed{{{text}}}"):
        assert type(siren.verify(response, answer)) is bool
    assert isinstance(siren.normalize(text), (Fraction, str))


@given(parts=st.lists(st.sampled_from([*"0123456789", " ", "{5}", ",", r"\,", r"\text{1}"])))
def test_a_number_is_written_in_one_piece(parts):
    value, text = siren.normalize("".join(parts)), "".join(parts)
    if isinstance(value, Fraction):  # as no sign but the digits and their commas stands there
        bare = text.replace(r"\,", " ").replace("{5}", " 5 ").replace(r"\text{1}", " 1 ")
        assert len(bare.split()) == 1 and value == int(bare.strip().replace(",", ""))


# ---------------------------------------------------------------------------------- the file itself


DRIVER = """
z = torch.randn(4, 5, 9, requires_grad=True)
tokens, mask = torch.randint(9, (4, 5)), torch.ones(4, 5, dtype=torch.bool)
adv = group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]), 2)
old = z.detach().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
head = torch.nn.Linear(9, 300)
for knobs in ({}, {"chunk": 3}, {"regularizer": "bonus"}, {"head": head}, {"algorithm": "grpo"}):
    anchor = micro_batch_anchor(0.5, 0.6, 1.0)
    loss, stats = siren_loss(z, tokens, old, adv, mask, anchor, beta=0.1, **knobs)
    loss.backward()
assert torch.isfinite(loss) and z.grad.abs().sum() > 0 and nucleus_mask(z, 0.8).any()
print("copied", len(stats))
"""


def test_the_block_to_copy_needs_only_torch(tmp_path):
    text = Path(siren.__file__).read_text(encoding="utf-8")
    begin, end = "# === begin: copy from here", "# === end: copy to here"
    assert text.count(begin) == 1 and text.count(end) == 1, "the markers of the block to copy"
    block = text[text.index(begin) : text.index(end)]
    assert block.count("\n") <= 220 and "import" not in block.split("\n", 1)[1]
    script = tmp_path / "copied.py"
    script.write_text("import torch\n\n" + block + DRIVER, encoding="utf-8")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, f"the block is not self-contained: {done.stderr[-600:]}"
    assert done.stdout.startswith("copied")


def test_doctests():
    result = doctest.testmod(siren)
    assert result.attempted > 0, "no worked example in any docstring"
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples are wrong"
