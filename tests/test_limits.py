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
    LOSSES,
    chi_square,
    make,
    oracle_entropy,
    oracle_nucleus,
    oracle_peaks,
    oracle_probs,
    oracle_q,
    same,
    same_stats,
    sampled,
    seeded,
    small_model,
    value_and_grad,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import siren
from exercises import reference

# --------------------------------------------------------------- large vocabularies, precision


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
    H, size = [], []
    for group in groups:
        stats = siren.token_stats(z[group], torch.ones(len(group)).long(), top_p)
        H.append(stats["nucleus_entropy"])
        size.append(stats["nucleus_size"])
        inside = siren.nucleus(z[group].log_softmax(-1), top_p) > -math.inf
        assert torch.equal(size[-1], inside.sum(-1))
    H, size = torch.cat(H), torch.cat(size)
    (grad,) = torch.autograd.grad(H.sum(), z)
    assert size.max() > 100
    for i, row in enumerate(z.detach().numpy()):
        q = oracle_q(row, top_p)
        due = oracle_entropy(q)
        same(H[i], due, f"H' of row {i}")
        same(size[i], float((q > 0).sum()), f"|V_p| of row {i}", tol=1e-3)  # p is rounded
        slope = np.zeros_like(q)
        slope[q > 0] = -q[q > 0] * (np.log(q[q > 0]) + due)
        got = np.sort(grad[i].numpy())  # of tied tokens any may be inside
        same(got, np.sort(slope), f"gradient of row {i}", tol=1e-7)


@pytest.mark.parametrize("top_p", [0.5, 0.8, 0.999999, 0.99999999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_forbidden_tokens_are_outside_and_bring_no_nan(top_p, dtype):
    z = torch.tensor([[1.0, -math.inf, 0.5, 0.2, -math.inf]], dtype=dtype).requires_grad_()
    inside = reference.nucleus_mask(z, top_p)
    assert not inside[0, [1, 4]].any(), "logit -inf: never in the nucleus"
    stats = siren.token_stats(z, torch.tensor([2]), top_p)
    (stats["nucleus_entropy"] + stats["logp"]).sum().backward()
    assert torch.isfinite(z.grad).all(), "0 * inf in the gradient"
    full = oracle_entropy(oracle_probs(np.array([1, 0.5, 0.2])))
    same(stats["entropy"], [full], "0 log 0 = 0", tol=1e-6)
    assert stats["nucleus_size"] == inside.sum()
    expected = oracle_entropy(oracle_q(z.detach()[0].double().numpy(), top_p))
    same(stats["nucleus_entropy"], [expected], "forbidden tokens", tol=1e-6)


def test_low_precision_logits_are_scored_in_float32():
    z = torch.randn(5, 3000, generator=seeded(6)).bfloat16()
    stats = siren.token_stats(z, torch.zeros(5).long(), 0.8)
    H, size = stats["nucleus_entropy"], stats["nucleus_size"]
    assert {stats[name].dtype for name in ("logp", "nucleus_entropy", "entropy")} == {
        torch.float32
    }, "sums over a vocabulary need at least float32"
    for i, row in enumerate(z.double().numpy()):
        idea = "bfloat16 logits: convert before the softmax, not after"
        same(H[i], oracle_entropy(oracle_q(row, 0.8)), idea, tol=1e-5)
        assert abs(size[i].item() - len(oracle_nucleus(row, 0.8))) <= 1, idea


def test_autocast_changes_no_entropy():
    z = torch.randn(5, 300, generator=seeded(6))
    ids = torch.zeros(5).long()
    expected = siren.token_stats(z, ids, 0.8)
    with torch.autocast("cpu", torch.bfloat16):
        got = siren.token_stats(z, ids, 0.8)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("tau", [0.1, 0.3, 0.5, 0.55, 0.7, 0.8, 0.9, 0.93])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_quantile_that_is_one_of_the_values_is_a_peak(tau, dtype):
    """n * tau + 1 values: rounding must not push the quantile above the value that it is."""
    for n in (10, 20, 50, 100, 1000, 5000):  # 0.55 * 100 is 55.00000000000001
        H = torch.arange(1, n + 2).to(dtype)[None] / n
        peak = siren.peak_mask(H, torch.ones_like(H).bool(), tau)
        assert peak.sum() == n + 1 - math.ceil(n * Fraction(str(tau))), f"{n + 1} values"


@given(
    st.floats(-1e4, 1e4, width=32), st.integers(2, 40), st.sampled_from(["dr_grpo", "grpo"])
)
def test_equal_rewards_teach_nothing(reward, size, rule):
    """Not a little either: GRPO divides by a standard deviation that is nearly 0."""
    adv = siren.group_advantages(torch.full((2 * size,), reward), size, rule)
    assert not adv.any()


@pytest.mark.parametrize("policy", [0.0, 0.37, 100.0, 1e6])
@pytest.mark.parametrize("gap", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("kind", ["anchor", "bonus", "none"])
def test_the_regularisers_part_is_not_lost_in_a_large_loss(policy, gap, kind):
    H = torch.full((2, 3), 1 + gap, dtype=F64)
    how = (torch.tensor(policy), H.float(), H > 0, 1.0, 0.005, 0.8, kind)
    part = siren.siren_loss(*how)[1]["regularizer_loss"]
    due = {"anchor": 0.005 * gap**2, "bonus": -0.005 * (1 + gap), "none": 0.0}[kind]
    assert part.item() == pytest.approx(due, rel=1e-3, abs=0)


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2, 0.1])
def test_approx_kl_of_a_small_update_is_no_noise(size):
    """At a learning rate of 1e-6 the ratios differ from 1 by little."""
    logp = torch.randn(8, 64, generator=seeded(5), dtype=F64) - 3
    old = (logp + size * torch.randn(8, 64, generator=seeded(6), dtype=F64)).float()
    change = (logp.float() - old).double().numpy()  # what a user has: float32
    ones = torch.ones(8, 64).bool()
    kl = siren.policy_loss(logp.float(), old, torch.zeros(8), ones, 64)[1]["approx_kl"]
    terms = change**2 / 2 + change**3 / 6 + change**4 / 24 + change**5 / 120
    assert kl.item() == pytest.approx(terms.mean(), rel=1e-4)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("tau", [0.0, 0.3, 0.8, 1.0])
def test_an_entropy_that_is_no_number_stays_to_be_seen(tau, place):
    """Whoever copies the loss must see it: a mean without it would look healthy."""
    H = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.5, 0.0, 0.0, 0.0]])
    mask = torch.ones(2, 4).bool()
    H[0, place] = torch.nan
    loss, info = siren.siren_loss(torch.tensor(0.0), H, mask, 1.0, 1.0, peak_quantile=tau)
    assert loss.isnan() and info["h_agg"].isnan()
    mask[0, place] = False  # padding may hold anything
    loss, info = siren.siren_loss(torch.tensor(0.0), H, mask, 1.0, 1.0, peak_quantile=tau)
    assert loss.isfinite() and info["h_agg"].isfinite()


@pytest.mark.parametrize("tau", [-0.1, 1.5, math.nan])
def test_a_quantile_that_is_none_is_refused(tau):
    with pytest.raises(ValueError, match="must be 0 to 1"):
        siren.peak_mask(torch.ones(1, 4), torch.ones(1, 4).bool(), tau)


def test_parts_have_the_gradient_of_their_own_random_numbers():
    """With dropout the backward pass must draw again what the forward pass has drawn."""
    x = torch.randn(6, 50, generator=seeded(1), requires_grad=True)

    def dropped(rows):
        kept = torch.nn.functional.dropout(rows, 0.5)
        return {"kept": kept, "own": kept.detach() / rows.detach()}

    torch.manual_seed(3)
    found = siren.in_parts(dropped, 2, x)
    found["kept"].sum().backward()
    assert torch.equal(x.grad, found["own"]) and 0 < (x.grad == 0).float().mean() < 1


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.8, 1.0])
def test_peaks_of_bfloat16_entropies(tau):
    """Their quantiles are taken of the numbers that they are, in float64."""
    H = torch.rand(30, 50, generator=seeded(7)).bfloat16()  # many ties
    mask = torch.arange(50) < torch.arange(30)[:, None] * 2
    peak = siren.peak_mask(H, mask, tau)
    assert torch.equal(peak, torch.from_numpy(oracle_peaks(H.double(), mask, tau)))


@pytest.mark.parametrize("B, T", [(700, 25_000), (5, 3_500_000)])
def test_peaks_of_more_than_16_million_tokens(B, T):
    """torch.quantile refuses more than 2**24 elements."""
    assert B * T > 2**24
    H = torch.arange(1.0, T + 1).expand(B, T)
    peak = siren.peak_mask(H, torch.ones(1, 1).bool().expand(B, T), 0.8)
    assert (peak.sum(1) == T - math.ceil(0.8 * (T - 1))).all() and peak[:, -1].all()


# --------------------------------------------------------------------------- what does not fit


TWO = {"entropy": torch.ones(2, 3), "mask": torch.ones(2, 3).bool()}  # two responses
FITS = {  # function -> arguments that it accepts
    siren.group_advantages: {"rewards": torch.zeros(6), "group_size": 2},
    siren.nucleus: {"log_pi": torch.zeros(4), "top_p": 0.8},
    siren.token_stats: {"logits": torch.zeros(4), "tokens": torch.tensor(1)},
    siren.peak_mask: TWO | {"quantile": 0.8},
    siren.policy_loss: {
        "logp": torch.zeros(2, 3),
        "old_logp": torch.zeros(2, 3),
        "adv": torch.zeros(2),
        "mask": TWO["mask"],
        "max_tokens": 3,
    },
    siren.siren_loss: TWO | {"loss": torch.zeros(()), "anchor": 1.0, "beta": 0.2},
}
NO_BOOL = {"mask": torch.ones(2, 3)}
ONE_COLUMN = {"mask": torch.ones(2, 1).bool()}
REFUSED = [  # function, what does not fit, words of the error
    *[(siren.group_advantages, {"algorithm": x}, f"{x!r}") for x in ("Dr.GRPO", "", None)],
    *[(siren.group_advantages, {"group_size": x}, f"{x}") for x in (0, 1, 4, -2)],
    *[
        (siren.group_advantages, {"rewards": torch.tensor([1, 0, x, 0])}, "finite floats")
        for x in (1, True, math.nan, math.inf, -math.inf)
    ],
    (siren.group_advantages, {"rewards": torch.tensor([True, False])}, "torch.bool"),
    *[(siren.nucleus, {"top_p": x}, f"top_p {x}") for x in (0.0, -0.1, 1.01, math.nan)],
    *[(siren.token_stats, {"top_p": x}, f"top_p {x}") for x in (0.0, 80)],
    *[
        (
            siren.token_stats,
            {"logits": torch.zeros(size), "tokens": torch.zeros(ids).long()},
            "",
        )
        for size, ids in (
            ((2, 9, 5), (2, 4)),
            ((9, 5), (4,)),
            ((2, 3, 5), (1, 3)),
            ((5,), (1,)),
        )
    ],
    *[(siren.peak_mask, wrong, "mask") for wrong in (NO_BOOL, ONE_COLUMN)],
    *[(siren.policy_loss, {"algorithm": x}, f"{x!r}") for x in ("ppo", "GRPO", None)],
    *[(siren.policy_loss, {"max_tokens": x}, f"max_tokens {x}") for x in (0, -1)],
    *[(siren.policy_loss, wrong, "mask") for wrong in (NO_BOOL, ONE_COLUMN)],
    *[(siren.policy_loss, {"logp": torch.zeros(size)}, "logp") for size in ((2, 1), (3,))],
    *[(siren.policy_loss, {"old_logp": torch.zeros(size)}, "logp") for size in ((2, 1), (6,))],
    *[
        (siren.policy_loss, {"adv": torch.zeros(size)}, "adv")
        for size in (3, (2, 1), (3, 2), ())
    ],
    *[(siren.siren_loss, wrong, "mask") for wrong in (NO_BOOL, ONE_COLUMN)],
    (siren.siren_loss, {"entropy": torch.ones(2, 1)}, "mask"),
    *[(siren.siren_loss, {"regularizer": x}, f"{x!r}") for x in ("kl", "Anchor", None)],
]


@pytest.mark.parametrize("function, changes, words", REFUSED)
def test_what_does_not_fit_is_refused(function, changes, words):
    """In one line: a broadcast or a misspelt name must not train something else in silence."""
    function(**FITS[function])
    with pytest.raises(ValueError) as caught:
        function(**FITS[function] | changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)


# -------------------------------------------------------------------- hidden states and chunks


@pytest.mark.parametrize("chunk", [0, 3])
def test_gradcheck_stats_in_chunks(chunk):
    b = make((3, 3), V=7, seed=8)
    head = torch.nn.Linear(7, 7).double()
    torch.nn.init.eye_(head.weight)

    def run(x):
        stats = siren.stats_in_chunks(x, head, b.tokens.flatten(), 0.8, 1.4, chunk)
        return stats["logp"], stats["nucleus_entropy"]

    b.logits[:, 1::3] /= 6  # steep softmaxes are for other tests: finite differences
    x = b.logits.flatten(0, 1).requires_grad_()
    assert run(x)[0].requires_grad and run(x)[1].requires_grad
    assert torch.autograd.gradcheck(run, x)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("chunk", [0, 1, 4, 1000])
def test_hidden_states_and_head_equal_logits(with_bias, chunk):
    hidden = torch.randn(15, 4, generator=seeded(19), dtype=F64)
    tokens = torch.randint(9, (15,), generator=seeded(19))
    a, b = torch.randn(2, 15, generator=seeded(20), dtype=F64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = torch.nn.Linear(4, 9, bias=with_bias, dtype=F64)

    def run(fused):
        head.zero_grad()
        x = hidden.clone().requires_grad_()
        if fused:
            stats = siren.stats_in_chunks(x, head, tokens, 0.8, 0.9, chunk)
        else:
            stats = siren.token_stats(head(x), tokens, 0.8, 0.9)
        (a * stats["logp"] + b * stats["nucleus_entropy"]).sum().backward()
        return stats, [x.grad, *(p.grad.clone() for p in head.parameters())]

    stats, grads = run(fused=False)
    stats2, grads2 = run(fused=True)
    same_stats(stats2, stats, "from hidden states")
    for one, two in zip(grads, grads2):
        same(two, one, "gradient with respect to hidden states, weight or bias", tol=1e-12)


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_garbage_in_the_padding_of_hidden_states_never_arrives(monkeypatch, garbage):
    model = small_model()
    cfg = siren.Config(max_tokens=12)
    rollout = sampled(reference, model, samples=4)
    hidden = siren.forward(model, rollout).detach()
    hidden[~rollout.mask] = garbage
    hidden.requires_grad_()
    monkeypatch.setattr(siren, "forward", lambda model, part: hidden)
    stats = siren.score(model, rollout, cfg)
    (stats["logp"].sum() + stats["nucleus_entropy"].sum()).backward()
    assert all(x.isfinite().all() for x in stats.values()) and hidden.grad.isfinite().all()
    assert not hidden.grad[~rollout.mask].any() and hidden.grad[rollout.mask].any()


# -------------------------------------------------------------------------------------- memory


def kept_for_backward(inputs, run):
    """Element counts of the tensors that autograd keeps, without the inputs' own storage."""
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


def test_chunking_keeps_nothing_beside_the_given_logits():
    logits = torch.randn(18, 600, generator=seeded(23), dtype=F64, requires_grad=True)
    tokens = logits.argmax(-1)
    full = logits.numel()
    control, _ = kept_for_backward([logits], lambda: logits.softmax(-1).square().sum())
    assert max(control) == full, "the recorder itself is blind"
    sizes, stats = kept_for_backward(
        [logits], lambda: siren.in_parts(siren.token_stats, 4, logits, tokens)
    )
    assert sum(sizes) < full / 4, "all chunks are kept: recompute them in the backward"
    (stats["logp"] + stats["nucleus_entropy"]).sum().backward()
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("trained", [True, False])
def test_chunked_head_never_holds_all_logits(trained):
    hidden = torch.randn(24, 4, requires_grad=True)
    head = torch.nn.Linear(4, 600, bias=False).requires_grad_(trained)
    tokens = torch.zeros(24).long()

    def run():
        stats = siren.stats_in_chunks(hidden, head, tokens, 0.8, 1.0, chunk=3)
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
    """Refuses to make a float64 tensor, as Apple's MPS does; but peak_mask may: it goes to the
    CPU for that."""

    allowed = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.dtype == F64 and not self.allowed:
                raise TypeError(f"{func}: this device has no float64")
        return out

    def peak_mask(self, *args):
        self.allowed = True
        peak = true_peak_mask(*args)
        self.allowed = False
        return peak


true_peak_mask = siren.peak_mask


def test_the_stand_in_refuses_float64():
    with NoFloat64(), pytest.raises(TypeError, match="no float64"):
        torch.ones(2).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("knobs", LOSSES)
def test_the_method_and_the_sampler_need_no_float64(monkeypatch, dtype, knobs):
    model = small_model().to(dtype)
    cfg = siren.Config(micro_batch_size=3, max_tokens=12, chunk=5, **knobs)
    run = SimpleNamespace(cfg=cfg, model=model, weights=list(model.parameters()))
    with NoFloat64() as mode:
        monkeypatch.setattr(siren, "peak_mask", mode.peak_mask)
        run.optimizer = torch.optim.AdamW(run.weights, lr=1e-3)
        rollout = sampled(reference, model, samples=4)
        adv = siren.group_advantages(torch.tensor([1.0, 0, 0, 0] * 3), 4, cfg.algorithm)
        with torch.no_grad():
            old = siren.score(model, rollout, cfg)
        peak = siren.peak_mask(old["nucleus_entropy"], rollout.mask, 0.8)
        run.anchor = siren.aggregate_entropy(old["nucleus_entropy"], peak, rollout.mask)
        stats = siren.update(run, rollout, old["logp"], adv)
    assert math.isfinite(stats["grad_norm"]) and stats["grad_norm"] > 0


class OnApple(torch.Tensor):
    """A tensor of a device without float64: only what .cpu() gives may become float64."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        if func is torch.Tensor.cpu:
            return out.as_subclass(torch.Tensor)
        wide = isinstance(out, torch.Tensor) and out.dtype == F64
        if wide and any(isinstance(x, OnApple) for x in tree_leaves(args)):
            raise TypeError(f"{func}: this device has no float64")
        return out


def test_the_quantile_of_a_device_without_float64_is_placed_on_the_cpu():
    entropy = torch.rand(5, 30, generator=seeded(2))
    mask = torch.arange(30) < torch.tensor([30, 7, 1, 0, 12])[:, None]
    with pytest.raises(TypeError, match="no float64"):
        mask.sum(1).as_subclass(OnApple).double()
    peak = siren.peak_mask(entropy.as_subclass(OnApple), mask.as_subclass(OnApple), 0.8)
    assert type(peak) is OnApple and peak.as_subclass(torch.Tensor).sum() == 6 + 2 + 1 + 3
    assert torch.equal(peak.as_subclass(torch.Tensor), siren.peak_mask(entropy, mask, 0.8))


# --------------------------------------------------------------------------------------- draws


def some_policies(dtype, V=700):
    """pi [40, V]: peaked, flat, and with tokens of probability 0 at the start and the end."""
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


# ------------------------------------------------------------------------ empty and wild input


@pytest.mark.parametrize("B, T", [(0, 3), (2, 0), (0, 0), (2, 3)])
@pytest.mark.parametrize("knobs", LOSSES)
def test_empty_batches_have_loss_0_and_gradient_0(B, T, knobs):
    """Of the whole loss there remains beta * anchor^2, which has no gradient."""
    b = make((6,) * 3, seed=21)
    tensors = {k: x[:B] if x.dim() == 1 else x[:B, :T] for k, x in vars(b).items()}
    b = SimpleNamespace(**tensors)
    b.mask = b.mask & False
    loss, grad, stats = value_and_grad(reference, b, max_tokens=6, **knobs)
    rest = 0.7 * ANCHOR**2 if knobs["regularizer"] == "anchor" else 0.0
    same(loss, rest, "no token at all")
    assert grad.shape == b.logits.shape and not grad.any()
    assert not any(x for name, x in stats.items() if name != "regularizer_loss")


def test_a_wild_ratio_stays_finite():
    logp = torch.full((1, 1), 300.0, requires_grad=True)  # exp(300) overflows float32
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, stats = siren.policy_loss(logp, torch.zeros(1, 1), torch.tensor([-1.0]), mask, 1)
    loss.backward()
    same(loss, math.exp(20), "the log-ratio is clamped to [-20, 20]", tol=1e-5)
    assert torch.isfinite(stats["approx_kl"]) and torch.isfinite(logp.grad).all()


# -------------------------------------------------------------------------------- hostile text


HOSTILE = [  # head, the part repeated to fill the length, tail
    *[("", r"\boxed{", ""), ("", r"\boxed{1}", ""), (r"\boxed{" * 100_000, "}", "")],
    *[("", "{", ""), (r"\boxed{", "{", "}"), (r"\boxed{", "\\", "}"), (r"\boxed", " ", "{4}")],
    *[
        ("", "9", ""),
        (r"\boxed{", "9", "}"),
        (r"\boxed{0.", "3", "}"),
        (r"\boxed{4", " ", "x}"),
    ],
    *[("", "1/", ""), (r"\boxed{", "1/", "1}"), (r"\boxed{1", ",000", "x}")],
    *[(r"\boxed{", "-", "4}"), (r"\boxed{", "$", "}"), (r"\boxed{", r"\frac{", "}")],
    *[
        (r"\boxed{4", r"\text{a}", "}"),
        (r"\boxed{4", r"\text{", "}"),
        (r"\boxed{4", " cm", "}"),
    ],
]


@pytest.mark.parametrize("head, repeated, tail", HOSTILE)
def test_hostile_responses_cost_no_time(head, repeated, tail):
    for size in (2_000, 20_000, 200_000, 1_000_000):  # quadratic code fails at a small size
        text = head[: size // 2] + repeated * (size // len(repeated)) + tail
        start = time.process_time()
        assert siren.verify(text, "5") is False
        seconds = time.process_time() - start
        assert seconds < 2, (
            f"{seconds:.1f} s for {size} characters, {head[:20]!r} {repeated!r}"
        )


EXPONENTS = ["1e10000000", "1e-10000000", "1E+9999999", "10^{10000000}", "2^{9^{9^{9^{9}}}}"]


@pytest.mark.parametrize("box", [*EXPONENTS, "9**9**9**9", "1.0e10000000/3", "99999999!"])
def test_huge_exponents_are_not_evaluated(box):
    start = time.process_time()
    assert siren.verify(rf"\boxed{{{box}}}", "5") is False
    assert type(siren.verify(r"\boxed{5}", box)) is bool
    assert time.process_time() - start < 2, "a short answer can stand for a gigantic number"


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
    text = "".join(parts)
    value = siren.normalize(text)
    if isinstance(value, Fraction):  # then there are digits and commas between thousands alone
        groups = text.strip().split(",")
        assert value == int("".join(groups))
        assert all(map(str.isdigit, groups)) and {len(group) for group in groups[1:]} <= {3}


# ----------------------------------------------------------------------------- the file itself


DRIVER = """
z = torch.randn(4, 5, 9, requires_grad=True)
tokens, mask = torch.randint(9, (4, 5)), torch.ones(4, 5, dtype=torch.bool)
adv = group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]), 2)
old = token_stats(z.detach(), tokens)["logp"]
for regularizer in ("anchor", "bonus", "none"):
    for algorithm in ("dr_grpo", "grpo"):
        now = token_stats(z, tokens, top_p=0.9, temperature=0.7)
        policy, _ = policy_loss(now["logp"], old, adv, mask, 5, algorithm=algorithm)
        loss, stats = siren_loss(
            policy, now["nucleus_entropy"], mask, 1.0, beta=0.1, regularizer=regularizer
        )
        loss.backward()
assert torch.isfinite(loss) and z.grad.abs().sum() > 0 and nucleus(z, 0.8).isfinite().any()
print("copied", len(stats))
"""
MEMORY = """
head = torch.nn.Linear(9, 300)
stats = stats_in_chunks(z.flatten(0, 1), head, tokens.flatten(), 0.9, 1.0, chunk=3)
stats["nucleus_entropy"].sum().backward()
assert head.weight.grad.abs().sum() > 0
"""


@pytest.mark.parametrize("end", ["# === end: copy to here", "# ---"])
def test_the_block_to_copy_needs_only_torch(tmp_path, end):
    """Also together with in_parts and stats_in_chunks, which stand below it."""
    text = Path(siren.__file__).read_text(encoding="utf-8")
    begin = "# === begin: copy from here"
    for mark in (begin, "# === end: copy to here"):
        assert text.count(mark) == 1, "the markers of the block to copy"
    block = text[text.index(begin) : text.index(end, text.index(begin))]
    assert "import" not in block.split("\n", 1)[1].replace("importance", "")
    script = tmp_path / "copied.py"
    memory = MEMORY if "def stats_in_chunks" in block else ""
    script.write_text("import torch\n\n" + block + DRIVER + memory, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, f"the block is not self-contained: {done.stderr[-600:]}"
    assert done.stdout.startswith("copied")


def test_doctests():
    result = doctest.testmod(siren)
    assert result.attempted > 0, "no worked example in any docstring"
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples are wrong"
