r"""Tests of siren.py: expected values are worked out a second time, slowly, from the definitions.

    pytest test_siren.py

Letters: B responses, T positions, V vocabulary, z logits, H nucleus entropy H', tau quantile.
The code under test is reached through the fixture `impl` alone (conftest.py): with --impl PATH,
another module takes its place, and only the tests that are marked as an exercise's run.
"""

import dataclasses
import doctest
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PHASES = (Phase.generate, Phase.shrink)  # without `explain`, which is slow
PROFILE = {
    "derandomize": True,
    "phases": PHASES,
    "deadline": None,
    "max_examples": 60,
    "database": None,
}
settings.register_profile("fixed", **PROFILE, report_multiple_bugs=False)  # one failure, no group
settings.load_profile("fixed")

HERE = Path(__file__).resolve().parent
F64 = torch.float64
ANCHOR = 0.9
KNOBS = {"beta": 0.7, "top_p": 0.8, "peak_quantile": 0.8}
LENGTHS = (6, 1, 4, 5, 2, 6, 3, 5)  # 6 tokens: the 0.8-quantile is exactly the fifth value (a tie)
WITH_EMPTY = (6, 1, 4, 0, 2, 6, 3, 5)
AGGREGATIONS = ("constant", "sequence", "token")
REGULARIZERS = ("anchor", "bonus", "none")
# the official code's rules, and GRPO's, as keywords; {} is the definition
EXCLUSIVE, STRICT, SCALED = {"inclusive": False}, {"strict": True}, {"scale_by_std": True}


def ex(number, *values):
    """A case that also grades this exercise: it uses only what student.py's function has."""
    return pytest.param(*values, marks=getattr(pytest.mark, f"ex{number}"))


def t(x):
    return torch.tensor(x, dtype=F64)


def same(actual, expected, idea, tol=1e-9, mistakes=None):
    """Equal in shape and value; `idea` says what a wrong answer has probably missed.

    mistakes: idea -> the value that one gets without it, for a message that knows.
    """
    actual, expected = (torch.as_tensor(x, dtype=F64).detach() for x in (actual, expected))
    assert actual.shape == expected.shape, f"{idea}: shape {actual.shape}, not {expected.shape}"
    for missed, value in (mistakes or {}).items():
        if torch.allclose(actual, torch.as_tensor(value, dtype=F64), rtol=1e-4, equal_nan=True):
            idea = missed
    wrong = ~torch.isclose(actual, expected, rtol=tol, atol=tol)
    got, due, count = actual[wrong][:4].tolist(), expected[wrong][:4].tolist(), wrong.sum().item()
    assert count == 0, f"{idea}: {count} of {wrong.numel()} differ, {got} instead of {due}"


def same_stats(actual, expected, idea):
    for name in expected:
        same(actual[name], expected[name], f"stats[{name!r}]: {idea}", tol=1e-6)


def make(lengths=LENGTHS, V=11, seed=0, dtype=F64):
    """A ragged off-policy batch: some ratios are clipped, some nuclei hold one token."""
    g = torch.Generator().manual_seed(seed)
    B, T = len(lengths), 6
    logits = torch.randn(B, T, V, generator=g, dtype=F64) * 2
    logits[:, 1::3] *= 6
    tokens = logits.argsort(-1)[..., -2]
    tokens[:, ::2] = logits.argmax(-1)[:, ::2]
    logp = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    old_logp = logp + 0.4 * torch.randn(B, T, generator=g, dtype=F64)
    adv = torch.randn(B, generator=g, dtype=F64)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    floats = {"logits": logits, "logp": logp, "old_logp": old_logp, "adv": adv}
    floats = {name: x.to(dtype) for name, x in floats.items()}
    return SimpleNamespace(tokens=tokens, mask=mask, **floats)


def loss_of(impl, b, **knobs):
    knobs = KNOBS | knobs
    return impl.siren_loss(b.logits, b.tokens, b.old_logp, b.adv, b.mask, ANCHOR, **knobs)


def value_and_grad(impl, b, **knobs):
    """Loss, its gradient with respect to the logits, and the stats."""
    b = SimpleNamespace(**vars(b) | {"logits": b.logits.detach().clone().requires_grad_()})
    loss, stats = loss_of(impl, b, **knobs)
    loss.backward()
    return loss.detach(), b.logits.grad, stats


def rows(b, index):
    return SimpleNamespace(**{name: x[index] for name, x in vars(b).items()})


def padded(b, extra, dim):
    """`b` with `extra` more columns (dim 1) or empty rows (dim 0) of plausible rubbish."""
    out = {}
    for name, x in vars(b).items():
        if x.dim() <= dim:
            out[name] = x
            continue
        filler = x.narrow(dim, 0, extra).flip(dim)
        filler = torch.zeros_like(filler) if name == "mask" else filler + (name == "old_logp") * 9
        out[name] = torch.cat([x, filler], dim)
    return SimpleNamespace(**out)


# === oracles: numpy, float64, loops, straight from the definitions ===


def oracle_probs(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def oracle_nucleus(z, top_p, inclusive=True):
    """Indices: the smallest set that reaches top_p | all whose running mass stays within top_p."""
    p, mass, keep = oracle_probs(z), 0.0, []
    if inclusive and top_p >= 1:
        return list(np.flatnonzero(np.isfinite(z)))
    for j in np.argsort(-p, kind="stable"):
        mass += p[j]
        if not inclusive and mass > top_p:
            break
        keep.append(j)
        if inclusive and mass >= top_p:
            break
    return keep


def oracle_q(z, top_p, inclusive=True):
    """The distribution renormalised on the nucleus, 0 elsewhere (everywhere for an empty set)."""
    p, q = oracle_probs(z), np.zeros_like(z)
    keep = oracle_nucleus(z, top_p, inclusive)
    if keep:
        q[keep] = p[keep] / p[keep].sum()
    return q


def oracle_entropy(q):
    return -sum(x * math.log(x) for x in q.ravel() if x > 0) + 0.0


def oracle_stats(logits, tokens, top_p, temperature=1.0, inclusive=True):
    logits, tokens = np.asarray(logits, dtype=np.float64) / temperature, np.asarray(tokens)
    shape = tokens.shape
    names = ("logp", "entropy", "nucleus_entropy", "nucleus_size")
    out = {name: np.zeros(shape) for name in names}
    for i in np.ndindex(shape):
        z = logits[i]
        out["logp"][i] = math.log(oracle_probs(z)[tokens[i]])
        out["entropy"][i] = oracle_entropy(oracle_probs(z))
        out["nucleus_entropy"][i] = oracle_entropy(oracle_q(z, top_p, inclusive))
        out["nucleus_size"][i] = len(oracle_nucleus(z, top_p, inclusive))
    return out


def oracle_peaks(H, mask, tau, strict=False):
    H, mask = np.asarray(H, dtype=np.float64), np.asarray(mask)
    peak = np.zeros(mask.shape, dtype=bool)
    for i in range(len(H)):
        if not mask[i].any():
            continue
        q = np.quantile(H[i][mask[i]], tau)  # linear interpolation, this response's own tokens
        for s in np.flatnonzero(mask[i]):
            peak[i, s] = H[i, s] > 0 and (H[i, s] > q if strict else H[i, s] >= q)
    return peak


def oracle_aggregate(H, peak, mask):
    H, peak, mask = np.asarray(H, dtype=np.float64), np.asarray(peak), np.asarray(mask)
    means = []
    for i in range(len(H)):
        if mask[i].any():
            means.append(H[i][peak[i]].mean() if peak[i].any() else 0.0)
    return float(np.mean(means)) if means else 0.0


def oracle_token_loss(logp, old, adv, clip_low=0.2, clip_high=0.2, dual_clip=None):
    ratio = math.exp(min(max(logp - old, -20), 20))
    loss = max(-adv * ratio, -adv * min(max(ratio, 1 - clip_low), 1 + clip_high))
    return min(loss, dual_clip * -adv) if dual_clip is not None and adv < 0 else loss


def oracle_policy(logp, old_logp, adv, mask, aggregation="constant", max_tokens=None, **clips):
    per_response = []
    for i in range(len(adv)):
        new, old, a = np.asarray(logp[i]), np.asarray(old_logp[i]), float(adv[i])
        here = np.flatnonzero(np.asarray(mask[i]))
        losses = [oracle_token_loss(new[s], old[s], a, **clips) for s in here]
        if losses:
            per_response.append(losses)
    if aggregation == "constant":
        return np.mean([sum(x) / (max_tokens or mask.shape[1]) for x in per_response])
    if aggregation == "sequence":
        return np.mean([np.mean(x) for x in per_response])
    return np.mean([x for losses in per_response for x in losses])


def oracle_siren(b, anchor, beta, top_p, peak_quantile, regularizer="anchor", **knobs):
    """(loss, stats) of one whole mini-batch."""
    strict = knobs.pop("strict", False)
    lens = {k: knobs.pop(k) for k in ("temperature", "inclusive") if k in knobs}
    s = oracle_stats(b.logits, b.tokens, top_p, **lens)
    mask, H = b.mask.numpy(), s["nucleus_entropy"]
    peak = oracle_peaks(H, mask, peak_quantile, strict)
    h_agg = oracle_aggregate(H, peak, mask)
    policy = oracle_policy(s["logp"], b.old_logp, b.adv, b.mask, **knobs)
    term = {"anchor": beta * (h_agg - anchor) ** 2, "bonus": -beta * h_agg, "none": 0.0}
    log_ratio = (s["logp"] - b.old_logp.numpy())[mask]
    return policy + term[regularizer], {
        "policy_loss": policy,
        "regularizer_loss": term[regularizer],
        "entropy": s["entropy"][mask].mean(),
        "nucleus_entropy": h_agg,
        "peak_fraction": peak.sum() / mask.sum(),
        "nucleus_size": s["nucleus_size"][mask].mean(),
        "approx_kl": (np.exp(log_ratio) - 1 - log_ratio).mean(),
    }


# === 1. values against the oracles ===


@pytest.mark.parametrize("top_p", [0.3, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("rule", [ex(3, {}), EXCLUSIVE])
def test_nucleus_against_oracle(impl, top_p, rule):
    if top_p == 1.0 and rule:
        top_p = 0.999  # cumulative mass against exactly 1 is rounding, not a rule
    b = make(seed=1)
    mask = impl.nucleus_mask(b.logits, top_p, **rule)
    assert mask.dtype == torch.bool and mask.shape == b.logits.shape, "the mask is bool [..., V]"
    for i in np.ndindex(*b.tokens.shape):
        expected = sorted(map(int, oracle_nucleus(b.logits[i].numpy(), top_p, **rule)))
        got = mask[i].nonzero()[:, 0].tolist()
        idea = "the fewest tokens that reach top_p"
        if top_p == 1:
            idea = "top_p = 1 keeps every token, however unlikely"
        assert got == expected, f"{idea}: {got}, not {expected}, at {i} for top_p {top_p}"


@pytest.mark.parametrize("top_p", [0.3, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("rule", [ex(4, {}), EXCLUSIVE])
def test_nucleus_entropy_against_oracle(impl, top_p, rule):
    if top_p == 1.0 and rule:
        top_p = 0.999
    b = make(seed=1)
    H = impl.nucleus_entropy(b.logits, top_p, **rule)
    for i in np.ndindex(*b.tokens.shape):
        expected = oracle_entropy(oracle_q(b.logits[i].numpy(), top_p, **rule))
        same(H[i], expected, "entropy, renormalised, in nats")


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("inclusive", [True, False])
def test_token_stats_against_oracle(impl, temperature, inclusive):
    b = make(seed=2)
    stats = impl.token_stats(
        b.logits, b.tokens, 0.8, temperature=temperature, inclusive=inclusive, chunk=5
    )
    expected = oracle_stats(b.logits, b.tokens, 0.8, temperature, inclusive)
    assert set(stats) == set(expected)
    for name in expected:
        same(stats[name], expected[name], f"{name} (logits are divided by the temperature first)")
    assert not stats["nucleus_size"].is_floating_point()


def ragged_entropies(dtype):
    """H' [40, 11] with zeros, ties, empty rows and padding that must not matter, and its mask."""
    g = torch.Generator().manual_seed(3)
    H = torch.rand(40, 11, generator=g, dtype=F64)
    H[::3] *= torch.rand(14, 11, generator=g) < 0.4  # many zeros
    H[1::3] = (H[1::3] * 4).ceil() / 4  # many ties
    mask = torch.arange(11) < torch.arange(40)[:, None] % 12
    H = torch.where(mask, H, 5.0).to(dtype)  # padding must not matter, however large
    return H, mask, 1e-12 if dtype is F64 else 1e-6


def rules_and_dtypes(number):
    """The definition in float64 is an exercise; float32 and the official rule are not."""
    rest = [({}, torch.float32), (STRICT, F64), (STRICT, torch.float32)]
    return pytest.mark.parametrize("rule, dtype", [ex(number, {}, F64), *rest])


@pytest.mark.parametrize("tau", [0.0, 0.25, 0.5, 0.8, 0.93, 1.0])
@rules_and_dtypes(5)
def test_peaks_against_oracle(impl, tau, rule, dtype):
    H, mask, _ = ragged_entropies(dtype)
    peak = impl.peak_mask(H, mask, tau, **rule)
    assert peak.dtype == torch.bool and peak.shape == mask.shape, "the mask is bool [B, T]"
    expected = oracle_peaks(H, mask, tau, **rule)
    for i in range(40):
        idea = f"peaks of a {int(mask[i].sum())}-token response: its own quantile, inside the mask"
        assert peak[i].tolist() == expected[i].tolist(), idea


@pytest.mark.parametrize("tau", [0.0, 0.25, 0.5, 0.8, 0.93, 1.0])
@rules_and_dtypes(6)
def test_aggregate_against_oracle(impl, tau, rule, dtype):
    H, mask, tol = ragged_entropies(dtype)
    peak = oracle_peaks(H, mask, tau, **rule)
    h_agg = oracle_aggregate(H, peak, mask)
    got = impl.aggregate_entropy(H, torch.from_numpy(peak), mask)
    same(got, h_agg, "mean of the per-response means", tol)


@pytest.mark.parametrize("tau", [0.25, 0.5, 0.8, 0.93, 1.0])
@rules_and_dtypes(8)
def test_totals_against_oracle(impl, tau, rule, dtype):
    H, mask, tol = ragged_entropies(dtype)
    totals = impl.minibatch_totals(H, mask, tau, **rule)
    h_agg = oracle_aggregate(H, oracle_peaks(H, mask, tau, **rule), mask)
    same(totals["h_agg"], h_agg, "H_agg of the mini-batch", tol)
    assert totals["responses"] == mask.any(1).sum(), "responses: the rows that have a token"
    assert totals["tokens"] == mask.sum(), "tokens: those in the mask"


@pytest.mark.parametrize("rule", [{}, STRICT])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_totals_without_peak_mask(impl, rule, dtype):
    """tau = 0: the mask is off, and every token counts, also where H' is 0."""
    H, mask, tol = ragged_entropies(dtype)
    totals = impl.minibatch_totals(H, mask, 0.0, **rule)
    same(totals["h_agg"], oracle_aggregate(H, mask, mask), "H_agg of the mini-batch", tol)
    assert totals["responses"] == mask.any(1).sum() and totals["tokens"] == mask.sum()


@pytest.mark.parametrize("rule", [ex(1, {}), SCALED])
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


@pytest.mark.parametrize("rule", [{}, SCALED])
@pytest.mark.parametrize("size", [5, 1])
def test_groups_must_fill_the_batch(impl, rule, size):
    with pytest.raises(ValueError):
        impl.group_advantages(torch.zeros(12), size, **rule)


# the definition alone, then every combination
POLICY_KNOBS = [{"aggregation": a, "dual_clip": d} for a in AGGREGATIONS for d in (None, 1.5)]


@pytest.mark.parametrize("knobs", [ex(2, {}), *POLICY_KNOBS])
@pytest.mark.parametrize("clip_high", [0.2, 0.5])
def test_policy_loss_against_oracle(impl, knobs, clip_high):
    b = make(WITH_EMPTY, seed=4)
    for max_tokens in (None, 20):
        knobs = knobs | {"clip_high": clip_high, "max_tokens": max_tokens}
        expected = oracle_policy(b.logp, b.old_logp, b.adv, b.mask, **knobs)
        loss, _ = impl.policy_loss(b.logp, b.old_logp, b.adv, b.mask, **knobs)
        same(loss, expected, f"policy loss, {knobs}")


@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("official", [False, True])
def test_siren_loss_against_oracle(impl, regularizer, aggregation, official):
    b = make(WITH_EMPTY, seed=5)
    knobs = KNOBS | {"regularizer": regularizer, "aggregation": aggregation, "temperature": 1.3}
    knobs |= {"dual_clip": 3.0, "max_tokens": 9, "inclusive": not official, "strict": official}
    expected, expected_stats = oracle_siren(b, ANCHOR, **knobs)
    loss, grad, stats = value_and_grad(impl, b, **knobs)
    same(loss, expected, f"loss, regularizer {regularizer}")
    assert torch.isfinite(grad).all(), "0/0 or 0 * inf in the gradient (an empty nucleus?)"
    same_stats(stats, expected_stats, "against the oracle")


def test_low_precision_logits_are_scored_in_float32(impl):
    z = torch.randn(5, 3000, generator=torch.Generator().manual_seed(6)).bfloat16()
    H, size = impl.nucleus_entropy(z, 0.8), impl.nucleus_mask(z, 0.8).sum(-1)
    assert H.dtype == torch.float32, "sums over a vocabulary need at least float32"
    for i, row in enumerate(z.double().numpy()):
        idea = "bfloat16 logits: convert before the softmax, not after"
        same(H[i], oracle_entropy(oracle_q(row, 0.8)), idea, tol=1e-5)
        assert abs(size[i].item() - len(oracle_nucleus(row, 0.8))) <= 1, idea


# === 2. values by hand ===

VECTORS = [  # p = 0.8: probabilities, H' of the definition, H' of the official rule
    ((0.9, 0.05, 0.03, 0.02), 0.0, 0.0),
    ((0.6, 0.3, 0.06, 0.04), 0.636514, 0.0),
    ((0.5, 0.25, 0.15, 0.1), 0.980990, 0.636514),
    ((0.25, 0.25, 0.25, 0.25), math.log(4), math.log(3)),
]


@pytest.mark.ex4
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("probabilities, definition, official", VECTORS)
def test_vectors(impl, probabilities, definition, official, dtype):
    z = t(probabilities).log().to(dtype)
    idea = "your nucleus leaves out the token that crosses p"
    same(impl.nucleus_entropy(z, 0.8), definition, idea, tol=1e-6)
    if definition == 0:
        H = impl.nucleus_entropy(z, 0.8).item()
        assert H == 0, "a one-token nucleus has H' of exactly 0, for `H' > 0` rests on it"


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("probabilities, definition, official", VECTORS)
def test_vectors_of_the_official_rule(impl, probabilities, definition, official, dtype):
    z = t(probabilities).log().to(dtype)
    idea = "the official rule keeps only tokens whose cumulative mass is <= p"
    same(impl.nucleus_entropy(z, 0.8, inclusive=False), official, idea, tol=1e-6)


@pytest.mark.parametrize(
    "knobs, expected, why",
    [
        ex(2, {}, 5 / 8, "constant: (-1/4 + 6/4) / 2; the empty row is left out"),
        ex(2, {"max_tokens": 10}, 0.25, "constant: divide by max_tokens where it is given"),
        ({"aggregation": "sequence"}, 0.5, "sequence: (-1 + 2) / 2"),
        ({"aggregation": "token"}, 5 / 4, "token: (-1 + 6) / 4"),
    ],
)
def test_aggregations_by_hand(impl, knobs, expected, why):
    # ratio 1, so the token losses are -1 (one token) and +2 (three tokens); T = 4; third row empty
    zero, adv = torch.zeros(3, 4, dtype=F64), t([1.0, -2.0, 7.0])
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    same(impl.policy_loss(zero, zero, adv, mask, **knobs)[0], expected, why)


def test_entropy_aggregation_by_hand(impl):
    H = t([[0, 1, 2, 3, 4, 5], [2, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    mask = torch.tensor([[1] * 6, [1] + [0] * 5, [0] * 6], dtype=torch.bool)
    for strict, expected in ((False, (4.5 + 2) / 2), (True, (5 + 0) / 2)):
        peak = impl.peak_mask(H, mask, 0.8, strict=strict)
        same(impl.aggregate_entropy(H, peak, mask), expected, f"q = 4 is itself a peak, {strict=}")


CLIPS = [  # advantage, ratio, keywords, loss, gradient with respect to logp
    (1, 1.1, {}, -1.1, -1.1),
    (1, 1.5, {}, -1.2, 0),
    (1, 0.5, {}, -0.5, -0.5),
    (-1, 0.9, {}, 0.9, 0.9),
    (-1, 0.5, {}, 0.8, 0),
    (-1, 1.5, {}, 1.5, 1.5),
    (1, 1.25, {"clip_high": 0.28}, -1.25, -1.25),
    (1, 1.5, {"clip_high": 0.28}, -1.28, 0),
    (-1, 0.75, {"clip_high": 0.28}, 0.8, 0),
    (-1, 0.75, {"clip_low": 0.3}, 0.75, 0.75),
    (-1, 2.5, {"dual_clip": 3.0}, 2.5, 2.5),
    (-1, 5.0, {"dual_clip": 3.0}, 3.0, 0),
    (-2, 5.0, {"dual_clip": 3.0}, 6.0, 0),
    (1, 5.0, {"dual_clip": 3.0}, -1.2, 0),
    (1, 0.2, {"dual_clip": 3.0}, -0.2, -0.2),
    (0, 1.5, {}, 0, 0),
]


CLIP_CASES = [row if "dual_clip" in row[2] else ex(2, *row) for row in CLIPS]


def one_token_loss(impl, adv, ratio, **knobs):
    """(loss, gradient with respect to logp, stats) of one response of one token."""
    logp = t([[math.log(ratio)]]).requires_grad_()
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, stats = impl.policy_loss(logp, t([[0.0]]), t([adv]), mask, **knobs)
    assert loss.requires_grad, "the loss has no gradient: it flows through the ratio"
    loss.backward()
    return loss.detach(), logp.grad, stats


@pytest.mark.parametrize("adv, ratio, knobs, expected, gradient", CLIP_CASES)
def test_clipping_by_hand(impl, adv, ratio, knobs, expected, gradient):
    loss, slope, stats = one_token_loss(impl, adv, ratio, **knobs)
    same(
        loss, expected, "PPO: the larger of the clipped and unclipped loss; dual clip caps at c|A|"
    )
    side = "clipping stops the move that the advantage asks for, never the way back"
    same(slope, [[gradient]], side)
    assert gradient != 0 or slope.item() == 0, f"{side}: gradient must be exactly 0"
    clipped = {(1, 1.5): 1, (-1, 0.5): 1, (1, 1.1): 0, (-1, 0.9): 0}.get((adv, ratio))
    if clipped is not None:
        same(stats["clip_fraction"], clipped, "clip fraction")


@pytest.mark.parametrize("adv, ratio, knobs, expected, gradient", CLIPS)
def test_approximate_kl_by_hand(impl, adv, ratio, knobs, expected, gradient):
    _, _, stats = one_token_loss(impl, adv, ratio, **knobs)
    same(stats["approx_kl"], ratio - 1 - math.log(ratio), "k3 estimator")


def test_a_wild_ratio_stays_finite(impl):
    logp = torch.full((1, 1), 300.0, requires_grad=True)  # exp(300) overflows float32
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, stats = impl.policy_loss(logp, torch.zeros(1, 1), torch.tensor([-1.0]), mask)
    loss.backward()
    same(loss, math.exp(20), "the log-ratio is clamped to [-20, 20]", tol=1e-5)
    assert torch.isfinite(stats["approx_kl"]) and torch.isfinite(logp.grad).all()


# === 3. properties ===

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


@given(z=vectors, p=levels)
def test_entropy_is_between_0_and_log_of_nucleus_size(impl, z, p):
    H, size = impl.nucleus_entropy(t(z), p).item(), impl.nucleus_mask(t(z), p).sum().item()
    assert 0 <= H <= math.log(size) + 1e-9, "renormalise on the nucleus before taking the entropy"


@pytest.mark.ex4
@given(z=vectors, p=levels)
def test_entropy_is_at_most_that_of_equal_options(impl, z, p):
    away_from_ties(z, p)
    H, size = impl.nucleus_entropy(t(z), p).item(), len(oracle_nucleus(np.array(z), p))
    idea = f"renormalise on the nucleus before taking the entropy: logits {z}, p {p}"
    assert 0 <= H <= math.log(size) + 1e-9, idea


@pytest.mark.ex3
@given(z=vectors, p=levels, shift=st.floats(-50, 50))
def test_shifting_the_logits_keeps_the_nucleus(impl, z, p, shift):
    away_from_ties(z, p)
    same(impl.nucleus_mask(t(z) + shift, p), impl.nucleus_mask(t(z), p), "softmax ignores a shift")


@pytest.mark.ex4
@given(z=vectors, p=levels, shift=st.floats(-50, 50))
def test_shifting_the_logits_keeps_the_entropy(impl, z, p, shift):
    away_from_ties(z, p)
    same(impl.nucleus_entropy(t(z) + shift, p), impl.nucleus_entropy(t(z), p), "shift of logits")


@pytest.mark.parametrize("rule", [ex(3, {}), EXCLUSIVE])
@given(z=vectors, p=levels, data=st.data())
def test_permuting_the_vocabulary_permutes_the_nucleus(impl, rule, z, p, data):
    away_from_ties(z, p)
    assume(np.diff(np.sort(z)).min() > 1e-6)  # of equal tokens any may be inside
    order = data.draw(st.permutations(range(len(z))))
    one, two = (impl.nucleus_mask(x, p, **rule) for x in (t(z)[order], t(z)))
    same(one, two[order], "map the nucleus from the sorted order back to token ids")


@pytest.mark.parametrize("rule", [ex(4, {}), EXCLUSIVE])
@given(z=vectors, p=levels, data=st.data())
def test_permuting_the_vocabulary_keeps_the_entropy(impl, rule, z, p, data):
    away_from_ties(z, p)
    order = data.draw(st.permutations(range(len(z))))
    one, two = (impl.nucleus_entropy(x, p, **rule) for x in (t(z), t(z)[order]))
    same(one, two, "H' must not depend on token ids")


@pytest.mark.ex4
@given(z=vectors)
def test_p_of_1_is_the_full_entropy(impl, z):
    full = oracle_entropy(oracle_probs(np.array(z)))
    same(impl.nucleus_entropy(t(z), 1.0), full, "top_p = 1 keeps every token")


@given(z=vectors)
def test_token_stats_at_p_of_1(impl, z):
    stats = impl.token_stats(t(z), torch.tensor(0), 1.0)
    same(stats["entropy"], oracle_entropy(oracle_probs(np.array(z))), "full entropy")
    assert stats["nucleus_size"] == len(z), "top_p = 1 keeps every token"


@pytest.mark.parametrize("rule", [ex(3, {}), EXCLUSIVE])
@given(z=vectors, p=st.tuples(levels, levels))
def test_nucleus_grows_with_p(impl, rule, z, p):
    small, large = (impl.nucleus_mask(t(z), x, **rule) for x in sorted(p))
    assert not (small & ~large).any(), "a larger p may only add tokens"


@pytest.mark.parametrize("rule", [ex(1, {}), SCALED])
@given(size=st.integers(2, 6), groups=st.integers(1, 4), shift=st.integers(-9, 9))
def test_advantages_are_centred_and_blind_to_a_shift(impl, rule, size, groups, shift):
    rewards = t([(i * i + size) % 5 / 4 for i in range(size * groups)])
    adv = impl.group_advantages(rewards, size, **rule)
    same(adv.view(groups, size).sum(1), [0.0] * groups, "advantages of a group sum to 0")
    shifted = impl.group_advantages(rewards + shift, size, **rule)
    same(shifted, adv, "only differences of rewards within a group count")
    silent = adv.abs().sum() == 0 and len(set(rewards.tolist())) == len(rewards)
    assert not silent, "different rewards must get different advantages"


# === 4. gradients ===


def gradcheck(function, x):
    """Is autograd's gradient that of finite differences? False also where there is no gradient."""
    if not function(x).requires_grad:
        return False
    return torch.autograd.gradcheck(function, x, raise_exception=False)


@pytest.mark.parametrize("rule", [ex(4, {}), EXCLUSIVE])
def test_gradcheck_nucleus_entropy(impl, rule):
    z = make((3, 3), V=7, seed=7).logits[:, :4].requires_grad_()
    right = gradcheck(lambda x: impl.nucleus_entropy(x, 0.8, **rule), z)
    assert right, "autograd's gradient of H' is not that of its value: was a part detached?"


@pytest.mark.parametrize("chunk", [0, 3])
def test_gradcheck_token_stats(impl, chunk):
    b = make((3, 3), V=7, seed=8)
    names = ("logp", "entropy", "nucleus_entropy")

    def run(x):
        stats = impl.token_stats(x, b.tokens, 0.8, temperature=1.4, chunk=chunk)
        return tuple(stats[name] for name in names)

    b.logits[:, 1::3] /= 6  # steep softmaxes are for other tests: finite differences dislike them
    b.logits.requires_grad_()
    assert run(b.logits)[0].requires_grad and run(b.logits)[2].requires_grad
    assert torch.autograd.gradcheck(run, b.logits)


@pytest.mark.parametrize(
    "knobs", [ex(2, {}), *({"aggregation": a, "dual_clip": 3.0} for a in AGGREGATIONS)]
)
def test_gradcheck_policy_loss(impl, knobs):
    b = make(WITH_EMPTY, seed=9)

    def run(logp):
        return impl.policy_loss(logp, b.old_logp, b.adv, b.mask, clip_high=0.28, **knobs)[0]

    right = gradcheck(run, b.logp.clone().requires_grad_())
    assert right, "autograd's gradient is not that of the loss: was a part detached?"


@pytest.mark.parametrize(
    "knobs", [ex(7, {}), *({"regularizer": r, "temperature": 1.2} for r in REGULARIZERS)]
)
def test_gradcheck_siren_loss(impl, knobs):
    b = make((6, 1, 0, 4), V=5, seed=10)

    def run(z):
        b.logits = z
        return loss_of(impl, b, **knobs)[0]

    right = gradcheck(run, b.logits.clone().requires_grad_())
    assert right, "autograd's gradient is not that of the loss: was a part detached?"


@pytest.mark.parametrize("rule", [ex(4, {}), EXCLUSIVE])
def test_closed_form_gradient(impl, rule):
    z = make(seed=11).logits.requires_grad_()
    H = impl.nucleus_entropy(z, 0.8, **rule)
    assert H.requires_grad, "H' has no gradient: only the choice of the set is not differentiated"
    (grad,) = torch.autograd.grad(H.sum(), z)
    assert torch.isfinite(grad).all(), "0 * log 0 in the backward pass: mask before, not after"
    for i in np.ndindex(*z.shape[:-1]):
        q = oracle_q(z[i].detach().numpy(), 0.8, **rule)
        inside, H = q > 0, oracle_entropy(q)
        expected = np.zeros_like(q)
        expected[inside] = -q[inside] * (np.log(q[inside]) + H)
        same(grad[i], expected, "dH'/dz_j = -q_j (log q_j + H') inside the nucleus, 0 outside")
        outside = grad[i].numpy()[~inside]
        assert (outside == 0).all(), "a logit outside the nucleus gets a gradient"


def test_empty_official_nucleus_gives_zero_not_nan(impl):
    z = t([[0.9, 0.05, 0.03, 0.02], [0.5, 0.25, 0.15, 0.1]]).log().requires_grad_()
    assert impl.nucleus_mask(z, 0.8, inclusive=False)[0].sum() == 0
    H = impl.nucleus_entropy(z, 0.8, inclusive=False)
    H.sum().backward()
    assert H[0] == 0 and (z.grad[0] == 0).all(), "empty set: value 0 and gradient 0, no 0/0"
    assert H[1] > 0 and torch.isfinite(z.grad[1]).all() and z.grad[1].abs().sum() > 0


@pytest.mark.parametrize("top_p", [0.8, 1.0])
@pytest.mark.parametrize("inclusive", [True, False])
def test_forbidden_tokens_bring_no_nan(impl, top_p, inclusive):
    z = t([[1.0, -math.inf, 0.5, 0.2, -math.inf]]).requires_grad_()
    top_p = top_p if inclusive else 0.8
    assert not impl.nucleus_mask(z, top_p)[0, [1, 4]].any(), "logit -inf: never in the nucleus"
    stats = impl.token_stats(z, torch.tensor([2]), top_p, inclusive=inclusive)
    (stats["nucleus_entropy"] + stats["logp"]).sum().backward()
    assert torch.isfinite(z.grad).all(), "0 * inf in the gradient"
    full = oracle_entropy(oracle_probs(np.array([1, 0.5, 0.2])))
    same(stats["entropy"], [full], "0 log 0 = 0")


def entropy_moved_by_a_step(impl, anchor, **knobs):
    """How far one gradient step on the regulariser alone moves H_agg."""
    b = make(seed=12)
    b.old_logp, b.adv = b.logp, b.adv * 0  # nothing but the regulariser acts
    z = b.logits.clone().requires_grad_()
    args, knobs = (b.tokens, b.old_logp, b.adv, b.mask, anchor), KNOBS | knobs
    loss, before = impl.siren_loss(z, *args, **knobs)
    loss.backward()
    _, after = impl.siren_loss((z - 0.1 * z.grad).detach(), *args, **knobs)
    before, after = (torch.as_tensor(stats["nucleus_entropy"]) for stats in (before, after))
    return (after - before).detach().item()


@pytest.mark.ex7
def test_one_step_moves_entropy_to_the_anchor(impl):
    up, down = (entropy_moved_by_a_step(impl, anchor) for anchor in (2.2, 0.2))
    assert up != 0 and down != 0, "the regulariser has no gradient: was H_agg detached?"
    assert up > 1e-4, "below the anchor the penalty must raise entropy"
    assert down < -1e-4, "above the anchor the penalty must lower entropy: it is no bonus"


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
    assert (grad.numpy()[~peak] == 0).all(), "a position that is no peak gets an entropy gradient"
    assert (np.abs(grad.numpy()[peak]).sum(-1) > 0).all(), "a peak gets no entropy gradient"


# === 5. invariances ===


def accumulate(impl, b, size, with_h_agg=True, **knobs):
    """Sums of loss, gradient and stats over micro-batches of `size` rows."""
    H = impl.nucleus_entropy(b.logits, KNOBS["top_p"])
    whole = impl.minibatch_totals(H, b.mask, KNOBS["peak_quantile"])
    if not with_h_agg:
        del whole["h_agg"]
    parts = []
    for start in range(0, len(b.adv), size):
        micro = rows(b, slice(start, start + size))
        parts.append(value_and_grad(impl, micro, whole=whole, **knobs))
    loss = sum(part[0] for part in parts)
    stats = {name: sum(part[2][name] for part in parts) for name in parts[0][2]}
    return loss, torch.cat([part[1] for part in parts]), stats


LOSS_KNOBS = [{"regularizer": r, "aggregation": a} for r in REGULARIZERS for a in AGGREGATIONS]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("knobs", [ex(8, {}), *LOSS_KNOBS])
def test_micro_batches_add_up(impl, size, knobs):
    for dtype, tol in ((F64, 1e-12), (torch.float32, 1e-6)):
        b = make(WITH_EMPTY, seed=14, dtype=dtype)  # size 1: one micro-batch has no token at all
        tol = tol if knobs else 1e-6  # in an exercise a share, 3 / 8, may well be float32
        loss, grad, stats = value_and_grad(impl, b, **knobs)
        loss_sum, grad_sum, stats_sum = accumulate(impl, b, size, **knobs)
        same(loss_sum, loss, "shares of the loss add up to the mini-batch's", tol=tol)
        same(grad_sum, grad, "the penalty's gradient depends on the micro-batch size", tol=tol)
        same_stats(stats_sum, stats, "shares add up")
        if dtype is F64:
            expected, _ = oracle_siren(b, ANCHOR, **KNOBS, **knobs)
            same(loss_sum, expected, "shares add up to the definition", max(tol, 1e-9))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_per_micro_batch_square_adds_the_variance(impl, size):
    """Mean of squares = square of the mean + variance: what the official code optimises."""
    b = make(seed=15)
    exact, _, _ = accumulate(impl, b, size)
    per_micro, _, _ = accumulate(impl, b, size, with_h_agg=False)
    h = []
    for start in range(0, 8, size):
        micro = rows(b, slice(start, start + size))
        h.append(oracle_siren(micro, ANCHOR, **KNOBS)[1]["nucleus_entropy"])
    same(np.mean(h), oracle_siren(b, ANCHOR, **KNOBS)[1]["nucleus_entropy"], "H_agg is linear")
    excess = KNOBS["beta"] * np.var(h)
    same(per_micro - exact, excess, "penalty excess = beta * variance of the micro-batches' H_agg")
    assert size == 8 or excess > 1e-4, "this batch could not have told the two apart"


@pytest.mark.ex8
def test_totals_carry_no_gradient(impl):
    z = make(WITH_EMPTY).logits.requires_grad_()
    H = impl.nucleus_entropy(z, 0.8)
    mask = make(WITH_EMPTY).mask
    assert H.requires_grad, "H' has no gradient to stop"
    for name, x in impl.minibatch_totals(H, mask, 0.8).items():
        assert not torch.as_tensor(x).requires_grad, f"{name} must be computed without gradient"
    assert not impl.peak_mask(H, mask, 0.8).requires_grad, "a mask has no gradient"


AGGREGATION_KNOBS = [{"aggregation": a} for a in AGGREGATIONS]


@pytest.mark.parametrize("knobs", [ex(7, {}), *AGGREGATION_KNOBS])
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


@pytest.mark.parametrize("knobs", [ex(7, {}), *AGGREGATION_KNOBS])
def test_order_of_the_batch_changes_nothing(impl, knobs):
    b, order = make(seed=17), torch.tensor([3, 0, 7, 6, 1, 5, 2, 4])
    loss, grad, _ = value_and_grad(impl, b, **knobs)
    loss2, grad2, _ = value_and_grad(impl, rows(b, order), **knobs)
    same(loss2, loss, "the loss depends on the order of the rows")
    same(grad2, grad[order], "the gradient depends on the order of the rows")


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
@pytest.mark.parametrize("official", [False, True])
def test_chunking_changes_nothing(impl, chunk, official):
    b = make(seed=18)
    knobs = {"inclusive": not official, "strict": official, "temperature": 0.8}
    loss, grad, stats = value_and_grad(impl, b, **knobs)
    loss2, grad2, stats2 = value_and_grad(impl, b, chunk=chunk, **knobs)
    same(loss2, loss, "chunked loss", tol=1e-12)
    same(grad2, grad, "chunked gradient", tol=1e-12)
    same_stats(stats2, stats, "chunked")


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("chunk", [0, 1, 4, 1000])
def test_hidden_states_and_head_equal_logits(impl, with_bias, chunk):
    g = torch.Generator().manual_seed(19)
    shapes = {"hidden": (3, 5, 4), "weight": (9, 4), "bias": (9,)}
    tokens = torch.randint(9, (3, 5), generator=g)
    leaves = {k: torch.randn(s, generator=g, dtype=F64) for k, s in shapes.items()}
    if not with_bias:
        del leaves["bias"]
    coefficients = torch.randn(2, 3, 5, generator=g, dtype=F64)

    def run(fused):
        p = {name: x.clone().requires_grad_() for name, x in leaves.items()}
        head = {"weight": p["weight"], "bias": p.get("bias")}
        x = p["hidden"]
        if not fused:
            x = torch.einsum("btd,vd->btv", x, p["weight"]) + p.get("bias", 0)
            head = {}
        stats = impl.token_stats(
            x, tokens, 0.8, temperature=0.9, chunk=chunk if fused else 0, **head
        )
        a, b = coefficients
        (a * stats["logp"] + b * stats["nucleus_entropy"]).sum().backward()
        return stats, {name: x.grad for name, x in p.items()}

    stats, grads = run(fused=False)
    stats2, grads2 = run(fused=True)
    same_stats(stats2, stats, "from hidden states")
    for name in grads:
        same(grads2[name], grads[name], f"gradient with respect to {name}", tol=1e-12)


@pytest.mark.parametrize("top_p", [0.5, 0.999999, 0.99999999])
def test_forbidden_tokens_are_never_in_the_nucleus(impl, top_p):
    logits = torch.zeros(1, 8).index_fill(1, torch.tensor([1, 3, 5, 7]), -math.inf)
    stats = impl.token_stats(logits, torch.tensor([0]), top_p)
    expected = impl.nucleus_mask(logits, top_p)
    assert not expected[0, 1::2].any() and stats["nucleus_size"] == expected.sum()
    same(stats["nucleus_entropy"], impl.nucleus_entropy(logits, top_p), "forbidden tokens")


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "knobs", [ex(7, {}), *({"aggregation": a, "dual_clip": 3.0} for a in AGGREGATIONS)]
)
def test_garbage_in_padding_never_arrives(impl, garbage, knobs):
    b = make(WITH_EMPTY, seed=20)
    loss, grad, stats = value_and_grad(impl, b, **knobs)
    b.old_logp = b.old_logp.masked_fill(~b.mask, garbage)
    loss2, grad2, stats2 = value_and_grad(impl, b, **knobs)
    idea = "padded old_logp reaches it: NaN * 0 is NaN, so select before computing"
    same(loss2, loss, f"loss: {idea}")
    same(grad2, grad, f"gradient: {idea}")
    same_stats(stats2, stats, idea)


@pytest.mark.parametrize("knobs", [ex(7, {}), *LOSS_KNOBS])
def test_batch_without_tokens_is_finite(impl, knobs):
    b = make((0, 0), seed=21)
    loss, grad, stats = value_and_grad(impl, b, **knobs)
    assert torch.isfinite(loss) and (grad == 0).all(), "no token at all: 0 / 0"
    assert all(torch.isfinite(torch.as_tensor(x)) for x in stats.values()), "no token at all: 0 / 0"
    assert stats["nucleus_entropy"] == 0 and stats["policy_loss"] == 0, "no token at all: 0"


@pytest.mark.parametrize("chunk", [0, 4])
def test_inputs_are_never_written_to(impl, chunk):
    b = make(WITH_EMPTY, seed=22)
    before = {name: (x.clone(), x._version) for name, x in vars(b).items()}
    accumulate(impl, b, 2, chunk=chunk, temperature=0.5, dual_clip=3.0)
    loss_of(impl, b, chunk=chunk, temperature=0.5, inclusive=False)
    impl.token_stats(b.logits, b.tokens, 0.8)
    impl.group_advantages(b.adv, 2, scale_by_std=True)
    for name, x in vars(b).items():
        unchanged = torch.equal(x, before[name][0]) and x._version == before[name][1]
        assert unchanged, f"{name} was written to in place"


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
    return [x.numel() for x in kept.values()], out


def test_chunking_keeps_no_vocabulary_sized_tensor(impl):
    b = make((6, 6, 6), V=600, seed=23)
    b.logits.requires_grad_()
    full = b.logits.numel()
    control, _ = kept_for_backward([b.logits], lambda: b.logits.softmax(-1).square().sum())
    assert max(control) == full, "the recorder itself is blind"
    sizes, (loss, _) = kept_for_backward([b.logits], lambda: loss_of(impl, b, chunk=4))
    assert max(sizes, default=0) < full, "a [B, T, V] tensor beside the input is kept for backward"
    assert sum(sizes) < full / 4, "all chunks together are kept: recompute them in the backward"
    loss.backward()
    assert b.logits.grad.abs().sum() > 0


def test_chunked_head_never_holds_all_logits(impl):
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    size = x.untyped_storage().nbytes() // x.element_size()
                    self.elements = max(self.elements, size)
            return out

    hidden = torch.randn(3, 8, 4, requires_grad=True)
    weight = torch.randn(600, 4, requires_grad=True)
    with Largest() as largest:
        stats = impl.token_stats(hidden, torch.zeros(3, 8).long(), 0.8, weight=weight, chunk=3)
        (stats["logp"] + stats["nucleus_entropy"]).sum().backward()
    assert weight.grad.abs().sum() > 0
    idea = "the logits of more than one chunk exist at a time, forward or backward"
    assert largest.elements < 24 * 600 / 2, idea


# === 6. the official code's rules ===


def official_nucleus_entropy(logits, p):
    """Written from its description, in torch so that autograd can differentiate it."""
    probs = logits.softmax(-1)
    ordered, index = probs.sort(-1, descending=True)
    kept = torch.zeros_like(probs).scatter(-1, index, (ordered.cumsum(-1) <= p).to(probs.dtype))
    q = probs * kept / (probs * kept).sum(-1, keepdim=True).clamp(min=1e-20)
    return -(q * (q + 1e-20).log()).sum(-1)


@pytest.mark.parametrize("p", [0.5, 0.8])
def test_exclusive_rule_equals_the_official_one(impl, p):
    z = torch.randn(60, 50, generator=torch.Generator().manual_seed(24)) * 2.5
    one, two = z.clone().requires_grad_(), z.clone().requires_grad_()
    H, official = impl.nucleus_entropy(one, p, inclusive=False), official_nucleus_entropy(two, p)
    H.sum().backward()
    official.sum().backward()
    same(H, official, "official nucleus entropy", tol=1e-5)
    same(one.grad, two.grad, "gradient of the official nucleus entropy", tol=1e-5)
    assert (official == 0).any() and (official > 0).any()


def test_official_peaks_are_strictly_above_the_quantile(impl):
    b = make(seed=25)
    H = official_nucleus_entropy(b.logits, 0.8) * b.mask
    peak = impl.peak_mask(H, b.mask, 0.8, strict=True)
    for i in range(len(H)):
        own = H[i][b.mask[i]]
        expected = own > torch.quantile(own, 0.8)
        assert torch.equal(peak[i][b.mask[i]], expected), "strict: H' > q, not H' >= q"
        assert not peak[i][~b.mask[i]].any()


def test_policy_loss_equals_seq_mean_token_sum_norm(impl):
    b = make(seed=26)
    one, two = b.logp.clone().requires_grad_(), b.logp.clone().requires_grad_()
    log_ratio = (two - b.old_logp * 3).clamp(-20, 20)
    ratio, adv = log_ratio.exp(), b.adv[:, None]
    surrogate = torch.maximum(-adv * ratio, -adv * ratio.clamp(0.8, 1.2))
    surrogate = torch.where(adv < 0, torch.minimum(-adv * 3.0, surrogate), surrogate)
    official = ((surrogate * b.mask).sum(-1) / b.mask.shape[-1]).mean()
    loss, _ = impl.policy_loss(one, b.old_logp * 3, b.adv, b.mask, dual_clip=3.0)
    loss.backward()
    official.backward()
    same(loss, official, "sum over tokens / T, mean over responses, dual clip 3")
    same(one.grad, two.grad, "its gradient")
    assert ((ratio > 3) & (adv < 0) & b.mask).any()


# === 7. responses without entropy ===


def mostly_sharp():
    """H' of three responses, mostly 0, and their mask."""
    H = torch.zeros(3, 12, dtype=F64)
    H[0, [2, 7]] = t([0.4, 1.0])  # 2 of 12 tokens: q = 0
    H[2, 3] = 0.6  # the row below it is all 0
    return H, torch.arange(12) < torch.tensor([12, 12, 6])[:, None]


@pytest.mark.parametrize("rule", [ex(5, {}), STRICT])
def test_quantile_of_0_selects_only_positions_with_entropy(impl, rule):
    H, mask = mostly_sharp()
    peak = impl.peak_mask(H, mask, 0.8, **rule)
    assert torch.equal(peak, H > 0), "q = 0: `H' >= 0` holds everywhere; peaks also need H' > 0"


@pytest.mark.ex6
def test_silent_response_counts_0(impl):
    H, mask = mostly_sharp()
    got = impl.aggregate_entropy(H, H > 0, mask)
    same(got, (0.7 + 0 + 0.6) / 3, "a response of all 0 counts 0")


ONE_SILENT_ONE_EMPTY = [[1.0, 0.0], [0.0, 0.0], [9.0, 9.0]], [[1, 0], [1, 1], [0, 0]]


@pytest.mark.ex5
def test_peaks_of_silent_and_empty_responses(impl):
    H, mask = (torch.tensor(x) for x in ONE_SILENT_ONE_EMPTY)
    peak = impl.peak_mask(H.double(), mask.bool(), 0.8)
    idea = "neither a response without entropy nor one without a token has a peak"
    assert peak.tolist() == [[True, False], [False, False], [False, False]], idea


@pytest.mark.ex6
def test_empty_response_is_left_out_but_silent_one_counts(impl):
    H, mask = (torch.tensor(x) for x in ONE_SILENT_ONE_EMPTY)
    got = impl.aggregate_entropy(H.double(), (H > 0) & mask.bool(), mask.bool())
    same(got, 0.5, "mean over the responses that have a token")


@pytest.mark.ex8
def test_totals_of_silent_and_empty_responses(impl):
    H, mask = (torch.tensor(x) for x in ONE_SILENT_ONE_EMPTY)
    totals = impl.minibatch_totals(H.double(), mask.bool(), 0.8)
    assert totals["responses"] == 2, "responses: the rows that have a token"
    assert totals["tokens"] == 3, "tokens: those in the mask"
    same(totals["h_agg"], 0.5, "mean over the responses that have a token")
    nothing = impl.minibatch_totals(H.double(), mask.bool() & False, 0.8)
    same(nothing["h_agg"], 0.0, "no response at all: 0")


TIES = [[1, 1, 1, 1, 1], [0.2, 0.7, 0.7, 0.7, 0.1], [0.3, 9, 9, 9, 9], [0.1, 0.5, 0.9, 9, 9]]


@pytest.mark.parametrize(
    "rule, expected, idea",
    [
        ex(
            5,
            {},
            [[1, 1, 1, 1, 1], [0, 1, 1, 1, 0], [1, 0, 0, 0, 0], [0, 0, 1, 0, 0]],
            "H' >= q: every token tied with the quantile is a peak",
        ),
        (STRICT, [[0] * 5, [0] * 5, [0] * 5, [0, 0, 1, 0, 0]], "strict: no tied token is a peak"),
    ],
)
def test_ties_and_one_token_responses(impl, rule, expected, idea):
    mask = torch.arange(5) < torch.tensor([5, 5, 1, 3])[:, None]
    assert impl.peak_mask(t(TIES), mask, 0.8, **rule).int().tolist() == expected, idea


@pytest.mark.ex5
def test_every_response_has_its_own_quantile(impl):
    peak = impl.peak_mask(t([[1, 2, 3], [10, 20, 30]]), torch.ones(2, 3).bool(), 0.8)
    idea = "your quantile is over the batch; every response has its own"
    assert peak.int().tolist() == [[0, 0, 1]] * 2, idea


def sharp_response_stats(impl):
    sharp, flat = [0.97, 0.01, 0.01, 0.01], [0.25] * 4
    z = t([[sharp, sharp, flat, sharp, sharp, sharp], [sharp] * 6]).log()
    zero, mask = torch.zeros(2, 6, dtype=F64), torch.ones(2, 6, dtype=torch.bool)
    return impl.siren_loss(z, zero.long(), zero, t([0, 0]), mask, 1.0, beta=1.0)[1]


@pytest.mark.ex7
def test_mostly_sharp_response_end_to_end(impl):
    got = sharp_response_stats(impl)["nucleus_entropy"]
    same(got, math.log(4) / 2, "H_agg jumps down if q = 0 selects every token")


def test_mostly_sharp_response_has_one_peak(impl):
    stats = sharp_response_stats(impl)
    same_stats(stats, {"peak_fraction": 1 / 12}, "one peak in twelve tokens")


# === 8. verifier ===

RIGHT = [  # in the box, the known answer
    *[("5", "5"), (" 5 ", "5"), ("+5", "5"), ("5.", "5"), ("007", "7"), ("-3", "-3"), ("−3", "-3")],
    *[("-0", "0"), ("5.0", "5"), (".5", "0.5"), ("0.50", "1/2"), ("1/2", "0.5"), ("2/4", "1/2")],
    *[("4/2", "2"), ("-1/2", "-0.5"), (r"\frac{1}{2}", "1/2"), (r"\frac{1}{2}", "0.5")],
    *[(r"\dfrac{1}{2}", "1/2"), (r"\tfrac{1}{2}", "1/2"), (r"\frac12", "0.5")],
    *[(r"-\frac{3}{4}", "-0.75"), (r"\frac{-3}{4}", "-3/4"), ("0.5", r"\frac{1}{2}")],
    *[("1,234,567", "1234567"), ("1{,}234", "1234"), ("1,234.5", "1234.5"), ("1000", "1,000")],
    *[(r"50\%", "0.5"), (r"50\%", "50"), ("50%", "50"), ("$5$", "5"), ("5", "$5$"), (r"\$5", "5")],
    *[(r"5\text{ cm}", "5"), (r"5\text{cm}", "5"), ("5 cm", "5"), (r"5\text{ cm}^2", "5")],
    *[(r"\text{east}", "east"), (r"\text{east}", r"\text{east}"), ("x+1", "x+1")],
    *[("x + 1", "x+1"), ("(1, 2)", "(1,2)"), (r"\left(1,2\right)", "(1,2)")],
    *[(r"\sqrt{2}", r"\sqrt{2}"), (r"2\pi", r"2\pi"), (r"\{1,2\}", r"\{1,2\}")],
]
WRONG = [
    *[("5", "6"), ("5", "-5"), ("-5", "5"), ("−5", "5"), ("", "5"), (" ", "5"), ("1,23", "123")],
    *[("12,34", "1234"), ("1,2,3", "123"), ("1.2.3", "1.23"), ("5x", "5"), ("x5", "5")],
    *[("1/2", "2"), ("1/3", "0.333"), (r"\frac{1}{2}", "2"), (r"\frac{2}{1}", "1/2")],
    *[
        ("0.5", "5"),
        (r"50\%", "5"),
        ("50", "0.5"),
        (".5", "5"),
        ("1/0", "5"),
        (r"\frac{1}{0}", "0"),
    ],
    *[("x+1", "x+2"), (r"\text{east}", "west"), ("--5", "5"), ("5-", "5"), ("5/", "5")],
    *[("1/2/3", "1/6"), ("5 or 6", "5"), ("5, 6", "56"), ("5 6", "56"), ("²", "2")],
    *[("0x10", "16"), ("1_000", "1000"), ("inf", "5"), ("nan", "5"), ("{5", "5"), ("(1,2)", "12")],
    *[(r"1\frac{1}{2}", "11/2"), (r"\frac{1}{2}3", "1/23"), (r"\frac{x+1}{2}", "x+1/2")],
]
EXTRACT = [  # response, the content of its last balanced box
    *[("the answer is 5", None), ("", None), (r"\boxed", None), (r"\boxed{", None)],
    *[(r"so \boxed{5}.", "5"), (r"\boxed{1}, no: \boxed{2}", "2"), (r"\boxed{}", "")],
    *[(r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{\text{a {b} c}} }{", r"\text{a {b} c}")],
    *[(r"\boxed{\boxed{5}}", "5"), (r"\boxed{1} and \boxed{2", "1"), (r"}}\boxed{5}}}", "5")],
    *[(r"\boxed{\frac{1}{2}", None), (r"a line break \\\boxed{5}", "5")],
]


@pytest.mark.parametrize("box, answer", RIGHT)
def test_right_answers(impl, box, answer):
    text = rf"First \boxed{{41}}, in the end \boxed{{{box}}}. Done."
    assert impl.verify(text, answer) is True, f"{box!r} is {answer!r}"


@pytest.mark.parametrize("box, answer", WRONG)
def test_wrong_answers(impl, box, answer):
    assert impl.verify(rf"So it is \boxed{{{box}}}.", answer) is False, f"{box!r} is not {answer!r}"


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


def test_normalize_types(impl):
    assert impl.normalize(r"\frac{6}{4}") == Fraction(3, 2)
    assert isinstance(impl.normalize("0.125"), Fraction), "decimals are exact fractions, no floats"
    assert isinstance(impl.normalize("x+1"), str) and isinstance(impl.normalize(""), str)


pieces = st.sampled_from(
    [r"\boxed{", r"\frac", r"\text{", "{", "}", "^", "−", *r"0123456789/.,-%$\ "]
)
answers = st.text() | st.lists(pieces, max_size=20).map("".join)


@given(text=answers, answer=answers)
def test_verifier_never_raises(impl, text, answer):
    for response in (text, rf"\boxed{{{text}}}"):
        assert type(impl.verify(response, answer)) is bool
    assert isinstance(impl.normalize(text), (Fraction, str))


@given(n=st.integers(-(10**9), 10**9), d=st.integers(1, 10**6), k=st.integers(2, 99))
def test_fractions_compare_by_value(impl, n, d, k):
    assert impl.verify(rf"\boxed{{\frac{{{n * k}}}{{{d * k}}}}}", f"{n}/{d}") is True
    assert impl.verify(rf"\boxed{{{n:,}}}", str(n)) is True, "thousands separators"
    assert impl.verify(rf"\boxed{{{n + 1}/{d}}}", f"{n}/{d}") is False


HOSTILE = [  # head, the part repeated to fill the length, tail
    *[("", r"\boxed{", ""), ("", r"\boxed{1}", ""), (r"\boxed{" * 100_000, "}", "")],
    *[("", "{", ""), (r"\boxed{", "{", "}"), (r"\boxed{", "\\", "}"), (r"\boxed", " ", "{4}")],
    *[("", "9", ""), (r"\boxed{", "9", "}"), (r"\boxed{0.", "3", "}"), (r"\boxed{4", " ", "x}")],
    *[
        ("", "1/", ""),
        (r"\boxed{", "1/", "1}"),
        (r"\boxed{1", ",000", "x}"),
        (r"\boxed{", "-", "4}"),
    ],
    *[(r"\boxed{", "$", "}"), (r"\boxed{", r"\frac{", "}"), (r"\boxed{4", r"\text{a}", "}")],
    *[(r"\boxed{4", r"\text{", "}"), (r"\boxed{4", " cm", "}")],
]


@pytest.mark.parametrize("head, repeated, tail", HOSTILE)
def test_hostile_responses_cost_no_time(impl, head, repeated, tail):
    for size in (2_000, 20_000, 200_000, 1_000_000):  # quadratic code fails at a small size
        text = head[: size // 2] + repeated * (size // len(repeated)) + tail
        start = time.perf_counter()
        assert impl.verify(text, "5") is False
        seconds = time.perf_counter() - start
        assert seconds < 2, f"{seconds:.1f} s for {size} characters, {head[:20]!r} {repeated!r}"


EXPONENTS = ["1e10000000", "1e-10000000", "1E+9999999", "10^{10000000}", "2^{9^{9^{9^{9}}}}"]


@pytest.mark.parametrize("box", [*EXPONENTS, "9**9**9**9", "1.0e10000000/3", "99999999!"])
def test_huge_exponents_are_not_evaluated(impl, box):
    start = time.perf_counter()
    assert impl.verify(rf"\boxed{{{box}}}", "5") is False
    assert type(impl.verify(r"\boxed{5}", box)) is bool
    assert time.perf_counter() - start < 2, "a short answer can stand for a gigantic number"


def test_code_is_only_text(impl):
    code = "__import__('os').getpid()"
    assert impl.verify(rf"\boxed{{{code}}}", str(os.getpid())) is False
    assert isinstance(impl.normalize(code), str)


# === 9. metrics ===


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
    (["2", "1", "1", "2"], "2", 4, 1, "tie: the answer given first"),
    (["2", "2", "1", "1"], "2", 4, 1, "tie: the answer given first, not the last"),
    (["1", "2", "2", "1"], "2", 4, 0, "tie: the answer given first, not the last or the correct"),
    (["3", "1", "2", "2", "1"], "1", 5, 1, "tie of the leaders: the one of them given first"),
    (["3", "1", "2", "2", "1"], "3", 5, 0, "first given, but not among the leaders"),
    ([None, None, None, "2"], "2", 4, 1, "None is no vote"),
    ([None, "1", None, "2"], "1", 4, 1, "None is no vote, not even in a tie"),
    ([None, None], "2", 2, 0, "nobody voted"),
    (["2", "1", None, None], "2", 2, 0.5, "blocks of k: [2, 1] is right, [None, None] is not"),
    (["2", "2", "1", "1", "1", "1"], "2", 2, 1 / 3, "mean over the blocks"),
    (["2", "1", "2"], "2", 1, 2 / 3, "k = 1 is the mean accuracy"),
    (["2", "2", "1"], "2", 2, 1, "votes beyond the last whole block are not used"),
    (["2", "1", "1", "3", "4"], "1", 5, 1, "the most frequent answer wins, also with two of five"),
]


@pytest.mark.ex10
@pytest.mark.parametrize("given_answers, correct, k, expected, why", MAJORITIES)
def test_maj_at_k(impl, given_answers, correct, k, expected, why):
    same(float(impl.maj_at_k(given_answers, correct, k)), expected, why)


# === 10. the file itself ===

DRIVER = """
z = torch.randn(4, 5, 9, requires_grad=True)
tokens, mask = torch.randint(9, (4, 5)), torch.ones(4, 5, dtype=torch.bool)
adv = group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]), 2)
old = z.detach().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
for knobs in ({}, {"chunk": 3}, {"regularizer": "bonus"}, {"inclusive": False, "strict": True}):
    loss, stats = siren_loss(z, tokens, old, adv, mask, 1.0, beta=0.1, **knobs)
    loss.backward()
assert torch.isfinite(loss) and z.grad.abs().sum() > 0
print("copied", len(stats))
"""


def test_the_block_to_copy_needs_only_torch(impl, tmp_path):
    text = Path(impl.__file__).read_text(encoding="utf-8")
    begin, end = "# === begin: copy from here", "# === end: copy to here"
    assert text.count(begin) == 1 and text.count(end) == 1, "the markers of the block to copy"
    block = text[text.index(begin) : text.index(end)]
    script = tmp_path / "copied.py"
    script.write_text("import torch\n\n" + block + DRIVER, encoding="utf-8")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, f"the block is not self-contained: {done.stderr[-600:]}"
    assert done.stdout.startswith("copied")


def test_doctests(impl):
    result = doctest.testmod(impl)
    assert result.attempted > 0, "no worked example in any docstring"
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples are wrong"


@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.8, 0.999])
def test_the_unsorted_nucleus_is_the_sorted_one(impl, inclusive, top_p):
    """Peaked, flat, uniform and tied rows of a large vocabulary; 1 to 3000 options."""
    rng = torch.Generator().manual_seed(1)
    rows = [torch.randn(3000, generator=rng, dtype=F64) * scale for scale in (0, 0.1, 1, 3, 9)]
    rows += [row.bfloat16().to(F64) for row in rows]  # many tokens tie
    z = torch.stack(rows).requires_grad_()
    slow = impl.nucleus_entropy(z, top_p, inclusive=inclusive)
    (slow_grad,) = torch.autograd.grad(slow.sum(), z)
    stats = impl.token_stats(z, torch.zeros(len(z), dtype=torch.long), top_p, inclusive=inclusive)
    (fast_grad,) = torch.autograd.grad(stats["nucleus_entropy"].sum(), z)
    sizes = impl.nucleus_mask(z, top_p, inclusive=inclusive).sum(-1)
    assert sizes.max() > 100 and torch.equal(stats["nucleus_size"], sizes)
    same(stats["nucleus_entropy"], slow, "nucleus entropy without a sort")
    same(fast_grad, slow_grad, "its gradient, of tied tokens too")


# ------------------------------------------------------------------------------ the sampler


def small_model(vocab=32, context=64, seed=0):
    """A random two-layer model, sharp enough that its tokens differ in probability."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": context}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(
            Qwen2Config(vocab_size=vocab, **sizes, **heads, initializer_range=0.4)
        )
    return model.eval()


PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [5, 4, 3, 8, 7]]
SAMPLING = {"max_tokens": 12, "eos_ids": [1, 2], "pad_id": 1}  # pad is EOS, as in many chat models


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small models are faster so, and numbers repeat."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def sampled(impl, model, **options):
    """16 samples a prompt, seeded."""
    given = {"samples": 16, "generator": drawn(), **SAMPLING, **options}
    return impl.sample(model, PROMPTS, **given)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logp_is_that_of_a_full_pass(impl, temperature):
    model = small_model()
    out = sampled(impl, model, temperature=temperature)
    stats = impl.token_stats(**impl.forward(model, out), top_p=0.8, temperature=temperature)
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
        ids = torch.cat([torch.tensor(prompt), tokens])[None]
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() / temperature
        alone = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        unscaled = (logits * temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
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
        prompt, tokens = PROMPTS[row // 16], out.tokens[row][out.mask[row]]
        ids = torch.cat([torch.tensor(prompt), tokens])[None]
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        alone = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        idea = "positions count a row's own tokens, not the padding on its left"
        same(out.logp[row][out.mask[row]], alone, idea, tol=1e-5)


@pytest.mark.ex11
def test_rollout_layout(impl):
    out = sampled(impl, small_model())
    assert out.prompt.shape == (48, 7), "prompts are padded to the longest, one row a sample"
    shapes = {out.tokens.shape, out.mask.shape, out.logp.shape}
    assert len(shapes) == 1, f"tokens, mask and logp are [B, T], not {shapes}"
    for row, response in enumerate(out.responses()):
        own = out.prompt[row][out.prompt_mask[row]].tolist()
        assert own == PROMPTS[row // 16], "row i * samples + j is sample j of prompt i"
        left = out.mask[row, : len(response)].all() and not out.mask[row, len(response) :].any()
        assert left, "the mask is True from the first token on, then False"
        assert not set(response[:-1]) & {1, 2}, "a response goes on after EOS: it ends there"
        whole = len(response) == 12 or response[-1] in (1, 2)
        assert whole, "EOS belongs to the response: outside the mask it would never be trained"
        assert (out.tokens[row, len(response) :] == 1).all(), "after a response there are pads"
        assert not out.logp[row, len(response) :].any(), "padding has a logp of 0"


def test_eos_is_trained(impl):
    model = small_model()
    out = impl.sample(model, PROMPTS, samples=4, generator=drawn(), **SAMPLING)
    logits = torch.zeros(*out.tokens.shape, 32, requires_grad=True)
    adv = torch.ones(len(out.mask))
    impl.siren_loss(
        logits, out.tokens, logits.detach().log_softmax(-1)[..., 0], adv, out.mask, 0.0, beta=0.0
    )[0].backward()
    ended = [(row, len(r) - 1) for row, r in enumerate(out.responses()) if r[-1] in (1, 2)]
    assert ended
    for row, last in ended:
        token = out.tokens[row, last]
        assert logits.grad[row, last, token] < 0, "a rewarded EOS must become more likely"
        assert not logits.grad[row, last + 1 :].any(), "padding after EOS is trained"


@pytest.mark.parametrize("batch", [ex(11, {}), {"batch": 10**6}])
@torch.no_grad()
def test_sampled_frequencies_follow_the_model(impl, batch):
    """Chi-square of the first two tokens, of a left-padded prompt, against exact probabilities."""
    model, count = small_model(vocab=6), 20_000
    prompts = [[3, 4], [5, 3, 4, 3, 5]]
    options = {"max_tokens": 2, "eos_ids": [0], "pad_id": 0} | batch
    out = impl.sample(model, prompts, samples=count, generator=drawn(), **options)
    observed = {}
    for response in out.responses()[:count]:
        observed[tuple(response)] = observed.get(tuple(response), 0) + 1
    first = model(input_ids=torch.tensor([prompts[0]])).logits[0, -1].double().softmax(-1)
    expected = {(0,): first[0].item()}
    for a in range(1, 6):
        ids = torch.tensor([[*prompts[0], a]])
        second = model(input_ids=ids).logits[0, -1].double().softmax(-1)
        expected |= {(a, b): (first[a] * second[b]).item() for b in range(6)}
    assert math.isclose(sum(expected.values()), 1, rel_tol=1e-5), "the test's own arithmetic"
    odd = set(observed) - set(expected)
    assert not odd, f"a response ends at the first EOS (0) or after two tokens, unlike {odd}"
    likely = {key: p * count for key, p in expected.items() if p * count >= 5}
    chi2 = sum((observed.get(key, 0) - due) ** 2 / due for key, due in likely.items())
    freedom = len(likely) - 1
    idea = "tokens are not drawn with the model's probabilities"
    enough = freedom + 4.5 * math.sqrt(2 * freedom)
    assert chi2 < enough, f"{idea}: chi-square {chi2:.1f} on {freedom}"


@pytest.mark.ex11
def test_sampling_repeats(impl):
    first, second, other = (
        sampled(impl, small_model(), samples=8, generator=drawn(seed)) for seed in (3, 3, 4)
    )
    idea = "draw with the generator: the same seed gives the same tokens"
    assert torch.equal(first.tokens, second.tokens), idea
    assert torch.equal(first.logp, second.logp), idea
    differ = first.tokens.shape != other.tokens.shape or not torch.equal(first.tokens, other.tokens)
    assert differ, "another seed gives other tokens: draw, don't take the likeliest"


def test_sampling_in_batches(impl):
    model = small_model()
    split = sampled(impl, model, samples=8, generator=drawn(3), batch=8)
    stats = impl.token_stats(**impl.forward(model, split), top_p=0.8)
    assert len(split.mask) == 24
    same(split.logp, stats["logp"], "rows sampled in another batch", tol=1e-5)


def test_evaluation_truncates_to_the_nucleus(impl):
    model = small_model()
    out = impl.sample(model, PROMPTS, samples=32, top_p=0.5, generator=drawn(), **SAMPLING)
    part = impl.forward(model, out)
    logits = part["x"] @ part["weight"].T
    inside = impl.nucleus_mask(logits, 0.5).gather(-1, out.tokens[..., None])[..., 0]
    assert inside[out.mask].all(), "a token outside the nucleus was sampled"


def test_sampler_refuses(impl):
    with pytest.raises(impl.ConfigError, match="must fit 16 tokens"):
        impl.sample(small_model(context=16), PROMPTS, **SAMPLING)
    broken = small_model()
    broken.lm_head.weight.data[3] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        impl.sample(broken, PROMPTS, **SAMPLING)


# ------------------------------------------------------------------------------ the exercises
# Together with the tests above that are marked, these grade exercises/student.py. They come first
# there, work on numbers that fit into one's head, and each failure names the idea that is missing.


@pytest.mark.ex1
def test_ex1_advantages(impl):
    r = t([1, 0, 0, 0, 1, 1, 1, 0])
    groups, interleaved = r.view(2, 4), r.view(4, 2)
    centred = groups - groups.mean(1, keepdim=True)
    by_std = {ddof: centred / groups.std(1, correction=ddof, keepdim=True) for ddof in (0, 1)}
    mistakes = {
        "the mean is of the response's own group, not of the batch": r - r.mean(),
        "a group is consecutive rows": (interleaved - interleaved.mean(0)).view(-1),
        "no division by the standard deviation, unlike GRPO": by_std[1].view(-1),
        "no division by the std, unlike GRPO": by_std[0].view(-1),
        "the group's mean includes the response itself": centred.view(-1) * 4 / 3,
    }
    expected = [0.75, -0.25, -0.25, -0.25, 0.25, 0.25, 0.25, -0.75]
    same(impl.group_advantages(r, 4), expected, "reward - mean of its group", mistakes=mistakes)
    assert r.tolist() == [1, 0, 0, 0, 1, 1, 1, 0], "rewards was written to: return a new tensor"
    same(impl.group_advantages(t([1, 1, 1]), 3), [0.0] * 3, "equal rewards teach nothing")


@pytest.mark.ex2
def test_ex2_clipped_loss(impl):
    _, slope, _ = one_token_loss(impl, 1, 1.0)
    assert slope < 0, "a loss is minimised: its gradient must make a token with A > 0 likelier"
    cases = [(1, 0.5), (1, 1.5), (-1, 0.5), (-1, 1.5)]
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
    same(got, [-0.5, -1.2, 0.8, 1.5], idea, mistakes=mistakes)
    fractions = [float(one_token_loss(impl, *case)[2]["clip_fraction"]) for case in cases]
    same(fractions, [0, 1, 1, 0], "clip_fraction: where the clipped term is the smaller one")


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
        "padding reaches the loss: its tokens are no part of the sums": (-4 + 8 - 28) / 4 / 2,
        "padding reaches the loss: neither summed nor counted": (-4 + 8 - 28) / 4 / 3,
    }
    idea = "sum over tokens / max_tokens, then mean over responses; max_tokens=None means T"
    same(result()[0], (-1 / 4 + 6 / 4) / 2, idea, mistakes=mistakes)
    same(result(max_tokens=10)[0], (-1 / 10 + 6 / 10) / 2, "divide by max_tokens where given")
    idea = "padding reaches the loss: its tokens are no part of the sums"
    same(result(zero.masked_fill(~mask, -1.0))[0], result()[0], idea)
    nan = result(zero.masked_fill(~mask, math.nan))[0]
    assert torch.isfinite(nan), "NaN in padding: select before computing, since NaN * 0 is NaN"
    clipped = result(t([[-1.0] * 4, [0.0] * 4, [-1.0] * 4]))[1]["clip_fraction"]
    same(clipped, 1 / 4, "clip_fraction: the share of the tokens in the mask")


@pytest.mark.ex2
def test_ex2_gradient_with_rubbish_in_padding(impl):
    b = make(WITH_EMPTY, seed=4)
    grads = []
    for rubbish in (0.0, math.nan):
        logp, old_logp = (x.masked_fill(~b.mask, rubbish) for x in (b.logp, b.old_logp))
        logp.requires_grad_()
        impl.policy_loss(logp, old_logp, b.adv, b.mask)[0].backward()
        grads.append(logp.grad)
    idea = "NaN in padding reaches the gradient: select before computing, since NaN * 0 is NaN"
    same(grads[1], grads[0], idea)


@pytest.mark.ex3
def test_ex3_nucleus(impl):
    z = t([0.5, 0.25, 0.15, 0.1]).log()
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
    both = torch.stack([z, z.flip(0)])
    idea = "every position has its own nucleus: work along the last dimension"
    assert impl.nucleus_mask(both, 0.6).int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]], idea


@pytest.mark.ex4
def test_ex4_nucleus_entropy(impl):
    p = np.array([0.5, 0.25, 0.15, 0.1])
    inside = p[:3]
    right = oracle_entropy(inside / inside.sum())
    mistakes = {
        "in nats: the natural logarithm, not log2": right / math.log(2),
        "renormalise on the nucleus: q = pi / pi(V_p) sums to 1": oracle_entropy(inside),
        "log q, not log pi": -(inside * np.log(inside)).sum() / inside.sum(),
        "tokens outside the nucleus count": oracle_entropy(p),
        "a logit of 0 is not out: it must be -inf": oracle_entropy(
            oracle_probs(np.log([*p[:3], 1]))
        ),
        "your nucleus leaves out the token that crosses p": oracle_entropy(p[:2] / p[:2].sum()),
        "entropy has a minus sign": -right,
        "0 * log 0 is NaN: mask log q as well": math.nan,
    }
    z = t(p).log()
    same(impl.nucleus_entropy(z, 0.8), right, "H' of .5 .25 .15 .1 at p = 0.8", mistakes=mistakes)
    same(impl.nucleus_entropy(torch.zeros(4, dtype=F64), 0.8), math.log(4), "equal options: ln 4")


@pytest.mark.ex5
def test_ex5_peaks(impl):
    mask = torch.ones(2, 5, dtype=torch.bool)
    peak = impl.peak_mask(t([[1, 2, 3, 4, 5], [10, 20, 30, 40, 50]]), mask, 0.8)
    assert peak[0].any(), "your quantile is over the batch; every response has its own"
    H, mask = t([[1, 2, 3, 9, 9, 9]]), torch.tensor([[1, 1, 1, 0, 0, 0]]).bool()
    peak = impl.peak_mask(H, mask, 0.8)
    assert H.tolist() == [[1, 2, 3, 9, 9, 9]], "entropy was written to: H_agg still needs it"
    assert not peak[~mask].any(), "a peak lies in the response: AND with the mask"
    assert peak[0, 2], "padding is no part of the quantile"
    tied = impl.peak_mask(t([[0.2, 0.7, 0.7, 0.7, 0.1]]), torch.ones(1, 5).bool(), 0.8)
    assert tied.int().tolist() == [[0, 1, 1, 1, 0]], "H' >= q: what equals the quantile is a peak"
    sharp = impl.peak_mask(t([[0.0] * 9 + [1.0]]), torch.ones(1, 10).bool(), 0.8)
    assert sharp.sum() == 1, "q = 0: `H' >= 0` holds everywhere; a peak also needs H' > 0"
    two = impl.peak_mask(t([[1.0, 2.0, 4.0, 3.0]]), torch.ones(1, 4).bool(), 0.7)
    assert two.int().tolist() == [[0, 0, 1, 0]], "q is interpolated linearly between two values"


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
    silent = impl.aggregate_entropy(H[:3], peak[:3], mask[:3])
    assert torch.isfinite(silent), "a response without a peak: 0 / 0"
    same(silent, 2.0, "a response without a peak counts 0, and it counts")
    same(impl.aggregate_entropy(H, peak, mask), 2.0, "a response without a token is left out")
    same(impl.aggregate_entropy(H[3:], peak[3:], mask[3:]), 0.0, "no response at all: 0")
    idea = "a peak outside the mask is padding: AND with the mask"
    same(impl.aggregate_entropy(H, H >= 2, mask), 2.0, idea)


@pytest.mark.ex7
def test_ex7_value(impl):
    b, knobs = make(WITH_EMPTY, seed=5), KNOBS | {"max_tokens": 9}
    loss, _, stats = value_and_grad(impl, b, max_tokens=9)
    expected, due = oracle_siren(b, ANCHOR, **knobs)
    mask, H = b.mask.numpy(), oracle_stats(b.logits, b.tokens, 0.8)["nucleus_entropy"]
    full = oracle_siren(b, ANCHOR, **knobs | {"top_p": 1.0})[1]
    mistakes = {
        "H_agg: entropies of the nucleus, not of the whole vocabulary": full["nucleus_entropy"],
        "H_agg: at the peaks only, not at every token": oracle_aggregate(H, mask, mask),
        "H_agg: at the peaks only": H[mask].mean(),
    }
    idea = "H_agg: aggregate_entropy of nucleus_entropy at the peaks of peak_mask"
    same(stats["nucleus_entropy"], due["nucleus_entropy"], idea, 1e-6, mistakes)
    gap = due["nucleus_entropy"] - ANCHOR
    peak, beta = oracle_peaks(H, mask, 0.8), KNOBS["beta"]
    h_i = [H[i][peak[i]].mean() if peak[i].any() else 0.0 for i in range(8) if mask[i].any()]
    mistakes = {
        "the penalty is weighted by beta": gap**2,
        "the penalty is squared": beta * abs(gap),
        "the penalty is (H_agg - anchor)^2, not a bonus": -beta * due["nucleus_entropy"],
        "square H_agg - anchor once, not per response": beta
        * np.mean((np.array(h_i) - ANCHOR) ** 2),
        "square H_agg - anchor once, not per token": beta * np.mean((H[peak] - ANCHOR) ** 2),
        "the gap is H_agg - anchor, and not 0": 0.0,
    }
    idea = "the penalty is beta * (H_agg - anchor)^2"
    same(stats["regularizer_loss"], due["regularizer_loss"], idea, 1e-6, mistakes)
    earlier = oracle_stats(b.logits.roll(1, 1), b.tokens, 0.8)["logp"]
    shifted = oracle_policy(earlier, b.old_logp, b.adv, b.mask, max_tokens=9)
    mistakes = {"logits[:, t] predicts tokens[:, t]: do not shift": shifted}
    same(stats["policy_loss"], due["policy_loss"], "the policy loss", 1e-6, mistakes)
    same(loss, expected, "the loss is the sum of both terms")


@pytest.mark.ex8
def test_ex8_parts_add_up(impl):
    b = make(WITH_EMPTY, seed=14)  # with size 1, one micro-batch has no token at all
    loss, grad, stats = value_and_grad(impl, b)
    for size in (4, 3, 2, 1):
        loss_sum, grad_sum, stats_sum = accumulate(impl, b, size)
        at = f"micro-batches of {size}"
        assert torch.isfinite(grad_sum).all(), f"{at}: one without tokens gives 0 / 0"
        idea = f"{at}: a part divides by the mini-batch's responses, not by its own"
        same(stats_sum["policy_loss"], stats["policy_loss"], idea, 1e-6)
        idea = f"{at}: a part's H_agg is its share: it weighs by its number of responses"
        same(stats_sum["nucleus_entropy"], stats["nucleus_entropy"], idea, 1e-6)
        parts = [oracle_siren(rows(b, slice(i, i + size)), ANCHOR, **KNOBS) for i in _starts(size)]
        n = [int(b.mask[i : i + size].any(1).sum()) for i in _starts(size)]
        squares = sum(k * part[1]["regularizer_loss"] for k, part in zip(n, parts)) / sum(n)
        mistakes = {
            f"{at}: squared per micro-batch; square the whole mini-batch's H_agg": squares,
            f"{at}: a part adds its share of the penalty": len(n) * stats["regularizer_loss"],
        }
        idea = f"{at}: the penalties of the parts add up to beta * (H_agg of ALL rows - H*)^2"
        same(stats_sum["regularizer_loss"], stats["regularizer_loss"], idea, 1e-6, mistakes)
        idea = f"{at}: the gradient is 2 beta (H_agg of ALL rows - H*) times the part's"
        same(grad_sum, grad, idea, 1e-6)
        same(loss_sum, loss, f"{at}: the losses of the parts add up", 1e-6)


def _starts(size):
    """The first rows of the micro-batches, without one that has no token (its oracle is empty)."""
    return [i for i in range(0, 8, size) if any(WITH_EMPTY[i : i + size])]


@pytest.mark.ex9
def test_ex9_pass_at_k(impl):
    mistakes = {
        "biased: 1 - (1 - c/n)^k draws with replacement; count the subsets": 1 - 0.6**2,
        "c/n is avg@k": 0.4,
        "k c / n counts a subset with two right ones twice": 0.8,
        "that is the chance that all are wrong": 0.3,
        "the k samples are some of the n, not all": 1.0,
    }
    same(impl.pass_at_k(5, 2, 2), 0.7, "1 - C(n - c, k) / C(n, k)", mistakes=mistakes)


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


# ------------------------------------------------------------------------------ the toy world


@pytest.fixture(scope="session")
def toy():
    import toy_env

    return toy_env


def written_by_the_teacher(world, order):
    """His response without slips and noise, and whether he met a gap on a right sum."""
    total, right, met, words = order[0], order[0], False, [str(order[0])]
    for term in order[1:]:
        met |= (right, term) in world.gaps
        total, right = world.gaps.get((total, term), total + term), right + term
        words += [str(term), str(total)]
    return " ".join([*words, "<eos>"]), met


@pytest.mark.parametrize("terms", [(8, 5, 1), (3, 9, 4, 6), (1, 1, 7, 9, 4), (9, 2, 2, 8, 5, 3)])
def test_gap_free_share_against_all_orders_and_the_verifier(impl, toy, terms):
    world = toy.ToyWorld()
    orders = list(itertools.permutations(terms))
    free = 0
    for order in orders:
        text, met = written_by_the_teacher(world, order)
        free += not met
        verdict = impl.verify(text, str(sum(terms)), answer_form=world.answer_form)
        assert verdict == (int(text.split()[-2]) == sum(terms))
        assert met or verdict, "an order that meets no gap ends in the right total"
    assert world.gap_free_share(terms) == Fraction(free, len(orders))


def test_splits_share_no_multiset_and_grades_hold(toy):
    world = toy.ToyWorld(min_terms=5, max_terms=7)
    terms_of = {}
    for split in ("test", "validation"):
        for name, problems in world.heldout(100, split).items():
            assert len({tuple(p.prompt) for p in problems}) == 100
            for problem in problems:
                terms = [token - 3 for token in problem.prompt[:-1]]
                share = world.gap_free_share(terms)
                low, high = (0.3, 1) if name == "easy" else (1e-9, 0.12)
                assert low <= share <= high
                assert sum(terms) == int(problem.answer) and 20 <= sum(terms) <= 38
                terms_of.setdefault(split, set()).add(tuple(sorted(terms)))
    trained = world.train_problems(3000, "0/1")
    terms_of["train"] = {tuple(sorted(t - 3 for t in p.prompt[:-1])) for p in trained}
    assert len({len(p.prompt) for p in trained}) == 3, "5, 6 and 7 terms: left padding is real"
    for one, two in itertools.combinations(terms_of.values(), 2):
        assert not one & two, "a held-out problem, in whatever order, must not be trained on"


def test_toy_problems_are_functions_of_the_seed(toy):
    world = toy.load(seed="1")
    assert world.train_problems(50, "a") == toy.load(seed="1").train_problems(50, "a")
    assert world.train_problems(50, "a") != world.train_problems(50, "b")
    assert world.gaps != toy.ToyWorld().gaps
    text = "8 3 1 5 2 6 = <pad> <eos> 252"
    assert world.decode(world.encode(text)) == text
    with pytest.raises(ValueError, match="no such option"):
        toy.load(colour="red")


def test_shipped_base_is_good_enough_to_learn_from(impl, toy):
    cfg = impl.Config(eval_prompts=100, eval_samples=8, eval_temperature=1.0)
    world = toy.ToyWorld()
    model = world.build_model()
    easy, hard = (impl.evaluate(model, world, p, cfg) for p in world.heldout(100).values())
    assert 0.2 < easy["avg@8"] < 0.6 and 0.02 < hard["avg@8"] < 0.25
    assert easy["distinct@8"] > 0.8 and hard["pass@8"] > 2 * hard["maj@8"]


# ------------------------------------------------------------------------ training and resuming

SMALL = {"prompts": 8, "group_size": 4, "eval_prompts": 4, "eval_samples": 4, "threads": 1}
TIMING = ("seconds", "tokens_per_second")


def run(impl, folder, how=None, **options):
    """The records of a small run, without the fields that hold times."""
    cfg = impl.Config(out=str(folder), **{**SMALL, **options})
    records = impl.train(cfg, **(how or {}))
    return [{k: v for k, v in r.items() if k not in TIMING} for r in records]


def on_disk(folder):
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING} for line in lines]


def command(folder, *flags):
    small = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]
    return [sys.executable, "siren.py", f"--out={folder}", *small, *flags]


def test_same_seed_same_file_and_other_seed_another(impl, tmp_path):
    one, two = (run(impl, tmp_path / name, steps=3) for name in "ab")
    assert one == two == on_disk(tmp_path / "a") == on_disk(tmp_path / "b")
    assert one[1] != run(impl, tmp_path / "c", steps=1, seed=1)[1]
    fields = "step reward entropy nucleus_entropy anchor peak_fraction nucleus_size clip_fraction "
    fields += (
        "approx_kl grad_norm response_tokens easy/avg@4 easy/maj@4 hard/pass@4 hard/distinct@4"
    )
    assert set(fields.split()) <= set(one[-1])
    assert one[1]["anchor"] == one[1]["nucleus_entropy"] == one[3]["anchor"]


@pytest.mark.parametrize("options", [{}, {"regularizer": "bonus"}, {"aggregation": "token"}])
def test_micro_batch_size_does_not_matter(impl, tmp_path, options):
    options |= {"steps": 3}
    runs = [run(impl, tmp_path / str(n), micro_batch_size=n, **options) for n in (3, 64)]
    for small, large in zip(*runs, strict=True):
        for key in small:
            same(small[key], large[key], f"{key} at step {small['step']}", tol=1e-4)


def test_penalty_per_micro_batch_does_matter(impl, tmp_path):
    options = {"steps": 2, "micro_batch_size": 2, "anchor": 0.0, "beta": 1.0}
    ours, theirs = (
        run(impl, tmp_path / str(rule), penalty_per_micro_batch=rule, **options)[2]
        for rule in (False, True)
    )
    gap = theirs["regularizer_loss"] - ours["regularizer_loss"]
    assert gap > 0.01, "the mean of squares exceeds the square of the mean by the variance"


def test_resumed_run_repeats_an_uninterrupted_one(impl, tmp_path):
    whole = run(impl, tmp_path / "whole", steps=6, save_every=2)
    stop = SimpleNamespace(is_set=lambda: len(on_disk(tmp_path / "cut")) == 4)  # after step 3
    cut = run(impl, tmp_path / "cut", {"stop": stop}, steps=6, save_every=2)
    assert [r["step"] for r in cut] == [0, 1, 2, 3]
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "rewa')  # killed while writing the line after the checkpoint
    resumed = run(impl, tmp_path / "cut", {"resume": True}, steps=6, save_every=2)
    assert resumed == whole == on_disk(tmp_path / "cut")
    one, two = (impl.load_checkpoint(tmp_path / name)["model"] for name in ("whole", "cut"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_stopped_process_resumes_with_the_same_numbers(impl, tmp_path, how):
    flags = ("--steps=8", "--save-every=3")
    process = subprocess.Popen(
        command(tmp_path / "cut", *flags), stderr=subprocess.PIPE, text=True, cwd=HERE
    )
    deadline = time.monotonic() + 120
    file = tmp_path / "cut" / "metrics.jsonl"
    while not (file.exists() and file.read_text().count("\n") >= 5) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL if how == "kill" else signal.SIGINT)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == (-9 if how == "kill" else 130)
    assert how == "kill" or f"--resume --out {tmp_path / 'cut'}" in errors
    again = [sys.executable, "siren.py", "--resume", f"--out={tmp_path / 'cut'}"]
    done = subprocess.run(again, capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0 and "H_agg / anchor" in done.stdout, done.stderr[-500:]
    assert (tmp_path / "cut" / "curves.png").stat().st_size > 10_000
    assert on_disk(tmp_path / "cut") == run(impl, tmp_path / "whole", steps=8, save_every=3)


def test_ten_steps_raise_the_reward_and_move_the_entropy(impl, tmp_path):
    """H_agg is pulled to the anchor from both sides; without a regulariser the reward rises."""
    options = {"steps": 10, "prompts": 64, "group_size": 8, "mini_batches": 8, "warmup_steps": 2}
    options |= {"eval_prompts": 128, "eval_samples": 8, "eval_temperature": 1.0}
    plain = run(impl, tmp_path / "plain", regularizer="none", **options)
    gains = [plain[-1][f"{name}/avg@8"] - plain[0][f"{name}/avg@8"] for name in ("easy", "hard")]
    assert sum(gains) / 2 > 0.03, f"held-out accuracy changed by {gains}"
    options |= {"prompts": 16, "lr": 1e-3, "eval_prompts": 4, "mini_batches": 4}
    plain = run(impl, tmp_path / "base", regularizer="none", **options)
    up = run(impl, tmp_path / "up", anchor=2.5, beta=1.0, **options)
    down = run(impl, tmp_path / "down", anchor=0.0, beta=1.0, **options)
    start = plain[1]["nucleus_entropy"]
    assert down[-1]["nucleus_entropy"] < plain[-1]["nucleus_entropy"] < up[-1]["nucleus_entropy"]
    assert up[-1]["nucleus_entropy"] > start + 0.1 and down[-1]["nucleus_entropy"] < start - 0.1


def test_five_to_seven_terms_train(impl, tmp_path):
    world = "toy_env:min_terms=5,max_terms=7,base_steps=40"
    records = run(impl, tmp_path, task=world, steps=2, max_tokens=18)
    assert all(math.isfinite(r["grad_norm"]) and r["entropy"] > 0 for r in records[1:])


def test_non_finite_gradients_are_skipped_then_stop_the_run(impl, tmp_path, monkeypatch):
    true_loss, calls = impl.siren_loss, []

    def sometimes_nan(*args, **kwargs):
        loss, stats = true_loss(*args, **kwargs)
        calls.append(1)
        return (loss * float("nan") if len(calls) in bad else loss), stats

    monkeypatch.setattr(impl, "siren_loss", sometimes_nan)
    bad = {2, 3}
    records = run(impl, tmp_path / "two", steps=2)
    assert [r.get("skipped_updates") for r in records] == [None, 2, 0]
    assert math.isfinite(records[1]["grad_norm"])
    bad = set(range(calls.count(1), 10**6))
    with pytest.raises(impl.DivergedError, match="not finite"):
        run(impl, tmp_path / "all", steps=9)
    saved = impl.load_checkpoint(tmp_path / "all")
    assert saved["state"]["step"] == 2 and all(v.isfinite().all() for v in saved["model"].values())
    bad = set()
    again = run(impl, tmp_path / "all", {"resume": True}, steps=4)
    assert [r["skipped_updates"] for r in again[3:]] == [0, 0], "it gets another try"


def test_diverging_weights_stop_with_one_line(impl, tmp_path, capsys):
    flags = ["--lr=1e30", "--steps=9", "--warmup-steps=0", f"--out={tmp_path}", "--prompts=8"]
    assert impl.main([*flags, "--eval-prompts=4"]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "not finite" in line and "lower --lr" in line and "Traceback" not in line


# ------------------------------------------------------------------------------ the command line

BAD_FLAGS = """
--lr=-1            | --lr -1.0: must be float in (0, inf)
--lr=inf           | --lr inf: must be
--lr=fast          | invalid float value: 'fast'
--top-p=0          | --top-p 0.0: must be float in (0, 1]
--top-p=1.5        | --top-p 1.5: must be float in (0, 1]
--group-size=1     | --group-size 1: must be int in [2, inf)
--beta=nan         | --beta nan: must be
--regularizer=kl   | --regularizer kl: must be str in anchor|bonus|none
--mini-batches=99  | --mini-batches 99: must be at most --prompts 32
--steps=1.5        | invalid int value: '1.5'
--learning-rate=1  | unrecognized arguments: --learning-rate=1
--device=tpu9      | --device tpu9:
--task=nowhere     | --task nowhere:
--task=toy_env:x=1 | no such option
--task=toy_env:gap | --task toy_env:gap:
--task=json        | --task json:
--task=.here       | --task .here:
--task=math        | --task math:
--lora-rank=2      | --lora-rank 2: needs --model
--recompute        | --recompute True: needs --model
--threads=99999    | --threads 99999: must be int in [0, 1024]
--eval-prompts=1000000 | the number of easy test prompts
--max-tokens=400   | must fit 256 tokens
--out=/proc/none   | --out /proc/none: can't be written
"""


@pytest.mark.parametrize("line", BAD_FLAGS.strip().splitlines())
def test_bad_flag_is_one_clear_line(impl, tmp_path, capsys, line):
    flag, message = (part.strip() for part in line.split("|", 1))
    assert impl.main([f"--out={tmp_path}", flag]) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert message in shown[-1] and "Traceback" not in "".join(shown), shown


def test_a_run_is_not_overwritten_by_accident(impl, tmp_path, capsys):
    run(impl, tmp_path, steps=1)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert impl.main([f"--out={tmp_path}", "--steps=1"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert impl.main([f"--out={tmp_path}", "--resume", "--beta=0.5"]) == 2
    assert "beta is 0.2" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert len(run(impl, tmp_path, {"overwrite": True}, steps=2)) == 3


@pytest.mark.parametrize("left", [0, 1, 1000, -1000])
def test_truncated_checkpoint_is_refused(impl, tmp_path, capsys, left):
    run(impl, tmp_path, steps=1)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:left])
    assert impl.main([f"--out={tmp_path}", "--resume"]) == 2
    assert "is no whole checkpoint" in capsys.readouterr().err
    assert impl.main([f"--out={tmp_path / 'nowhere'}", "--resume"]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("torn", [b"K", b"\x80", b"\x80\x02}q\xff", b"PK\x03\x04"])
def test_no_bytes_break_the_resume(impl, tmp_path, capsys, torn):
    run(impl, tmp_path, steps=1)
    lines = (tmp_path / "metrics.jsonl").read_bytes()
    for broken in (torn + lines, lines.splitlines()[0] + b"\n"):
        (tmp_path / "metrics.jsonl").write_bytes(broken)
        assert impl.main([f"--out={tmp_path}", "--resume", "--steps=2"]) == 2
        shown = capsys.readouterr().err.strip().splitlines()
        assert "metrics.jsonl is damaged; restore it" in shown[-1], shown
    (tmp_path / "metrics.jsonl").write_bytes(lines)
    (tmp_path / "checkpoint.pt").write_bytes(torn)
    assert impl.main([f"--out={tmp_path}", "--resume", "--steps=2"]) == 2
    assert "is no whole checkpoint" in capsys.readouterr().err


def test_bad_input_found_late_leaves_the_folder_free(impl, tmp_path, capsys):
    flags = [f"--out={tmp_path}", "--prompts=8", "--steps=0", "--eval-prompts=4"]
    assert impl.main([*flags, "--max-tokens=400"]) == 2
    assert impl.main(flags) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory\nat all"), OSError(28, "full")]
)
def test_a_full_machine_is_one_line(impl, tmp_path, capsys, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(impl, "training_step", fail)
    assert impl.main([f"--out={tmp_path}", "--steps=1", "--eval-prompts=4"]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("siren.py: stopped: ") and str(error).splitlines()[0] in line


def test_stopped_before_the_first_step(impl, tmp_path):
    stop = threading.Event()
    stop.set()
    assert [r["step"] for r in run(impl, tmp_path, {"stop": stop}, steps=2)] == [0]
    assert impl.load_checkpoint(tmp_path)["state"]["step"] == 0


def test_help_documents_every_knob(impl, capsys):
    with pytest.raises(SystemExit) as done:
        impl.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert done.value.code == 0
    for field in dataclasses.fields(impl.Config):
        assert f"--{field.name.replace('_', '-')}" in text
        assert field.metadata["doc"] and f"default {field.default}" in text


def test_import_runs_nothing_and_config_is_frozen(impl):
    code = (
        "import siren; import sys; print('transformers' in sys.modules, 'toy_env' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert done.stdout.split() == ["False", "False"] and not done.stderr
    with pytest.raises(dataclasses.FrozenInstanceError):
        impl.Config().lr = 1.0


# ------------------------------------------------------------------------------ the documents


def test_readme_names_functions_that_exist_and_lines_that_hold_them(impl):
    text = (HERE / "README.md").read_text()
    source = (HERE / "siren.py").read_text().splitlines()
    links = re.findall(r"\[`(\w+)`\]\(siren\.py#L(\d+)\)", text)
    assert len(links) >= 15
    for name, line in links:
        assert callable(getattr(impl, name))
        assert re.match(rf"(def|class) {name}\b", source[int(line) - 1]), f"{name} is not on {line}"
    flags = {flag.strip("-") for flag in re.findall(r"--[a-z][a-z-]+", text)}
    known = {f.name.replace("_", "-") for f in dataclasses.fields(impl.Config)}
    known |= {f"no-{name}" for name in known} | {"resume", "overwrite", "help"}
    toy = {"rebuild-base", "check-base", "preset", "no-deps", "impl", "rounds"}
    assert flags <= known | toy, f"unknown flags {flags - known - toy}"
