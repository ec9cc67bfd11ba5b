r"""Tests of siren.py: expected values are worked out a second time, slowly, from the definitions.

    pytest test_siren.py

Letters: B responses, T positions, V vocabulary, z logits, H nucleus entropy H', tau quantile.
The code under test is reached through the fixture `impl` alone: another module can take its place.
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
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("fixed")

HERE = Path(__file__).resolve().parent
F64 = torch.float64
ANCHOR = 0.9
KNOBS = {"beta": 0.7, "top_p": 0.8, "peak_quantile": 0.8}
LENGTHS = (6, 1, 4, 5, 2, 6, 3, 5)  # 6 tokens: the 0.8-quantile is exactly the fifth value (a tie)
WITH_EMPTY = (6, 1, 4, 0, 2, 6, 3, 5)
AGGREGATIONS = ("constant", "sequence", "token")
REGULARIZERS = ("anchor", "bonus", "none")


@pytest.fixture(scope="session")
def impl():
    import siren

    return siren


def t(x):
    return torch.tensor(x, dtype=F64)


def same(actual, expected, idea, tol=1e-9):
    """Equal in shape and value; `idea` says what a wrong answer has probably missed."""
    actual, expected = (torch.as_tensor(x, dtype=F64).detach() for x in (actual, expected))
    assert actual.shape == expected.shape, f"{idea}: shape {actual.shape}, not {expected.shape}"
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
@pytest.mark.parametrize("inclusive", [True, False])
def test_nucleus_against_oracle(impl, top_p, inclusive):
    if top_p == 1.0 and not inclusive:
        top_p = 0.999  # cumulative mass against exactly 1 is rounding, not a rule
    b = make(seed=1)
    mask = impl.nucleus_mask(b.logits, top_p, inclusive=inclusive)
    H = impl.nucleus_entropy(b.logits, top_p, inclusive=inclusive)
    assert mask.dtype == torch.bool and mask.shape == b.logits.shape
    for i in np.ndindex(*b.tokens.shape):
        z = b.logits[i].numpy()
        expected = sorted(oracle_nucleus(z, top_p, inclusive))
        got = mask[i].nonzero()[:, 0].tolist()
        assert got == expected, f"nucleus at {i}, top_p {top_p}, {inclusive=}"
        same(H[i], oracle_entropy(oracle_q(z, top_p, inclusive)), "entropy, renormalised, in nats")


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


@pytest.mark.parametrize("tau", [0.0, 0.25, 0.5, 0.8, 0.93, 1.0])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_peaks_and_aggregate_against_oracle(impl, tau, strict, dtype):
    g = torch.Generator().manual_seed(3)
    H = torch.rand(40, 11, generator=g, dtype=F64)
    H[::3] *= torch.rand(14, 11, generator=g) < 0.4  # many zeros
    H[1::3] = (H[1::3] * 4).ceil() / 4  # many ties
    mask = torch.arange(11) < torch.arange(40)[:, None] % 12
    H = torch.where(mask, H, 5.0).to(dtype)  # padding must not matter, however large
    tol = 1e-12 if dtype is F64 else 1e-6
    peak = impl.peak_mask(H, mask, tau, strict=strict)
    expected = oracle_peaks(H, mask, tau, strict)
    for i in range(40):
        idea = f"peaks of a {int(mask[i].sum())}-token response: its own quantile, inside the mask"
        assert peak[i].tolist() == expected[i].tolist(), idea
    h_agg = oracle_aggregate(H, expected, mask)
    same(impl.aggregate_entropy(H, peak, mask), h_agg, "mean of the per-response means", tol)
    totals = impl.minibatch_totals(H, mask, tau, strict=strict)
    if tau == 0:  # the mask is off: every token counts, also where H' is 0
        h_agg = oracle_aggregate(H, mask, mask)
    same(totals["h_agg"], h_agg, "H_agg of the mini-batch", tol)
    assert totals["responses"] == mask.any(1).sum() and totals["tokens"] == mask.sum()


@pytest.mark.parametrize("scale", [False, True])
def test_advantages_against_oracle(impl, scale):
    rewards = np.array([1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0.25])
    expected = np.zeros(12)
    for a in range(0, 12, 4):
        group = rewards[a : a + 4]
        expected[a : a + 4] = group - group.mean()
        if scale:
            expected[a : a + 4] /= group.std(ddof=1) + 1e-6
    got = impl.group_advantages(t(rewards), 4, scale_by_std=scale)
    same(got, expected, "advantage = reward - mean of the group of consecutive rows")
    for bad in (5, 1):
        with pytest.raises(ValueError):
            impl.group_advantages(t(rewards), bad)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("clip_high", [0.2, 0.5])
def test_policy_loss_against_oracle(impl, aggregation, dual_clip, clip_high):
    b = make(WITH_EMPTY, seed=4)
    knobs = {"clip_high": clip_high, "dual_clip": dual_clip, "aggregation": aggregation}
    for max_tokens in (None, 20):
        knobs["max_tokens"] = max_tokens
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


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("probabilities, definition, official", VECTORS)
def test_vectors(impl, probabilities, definition, official, dtype):
    z = t(probabilities).log().to(dtype)
    idea = "your nucleus leaves out the token that crosses p"
    same(impl.nucleus_entropy(z, 0.8), definition, idea, tol=1e-6)
    idea = "the official rule keeps only tokens whose cumulative mass is <= p"
    same(impl.nucleus_entropy(z, 0.8, inclusive=False), official, idea, tol=1e-6)
    if definition == 0:
        H = impl.nucleus_entropy(z, 0.8).item()
        assert H == 0, "a one-token nucleus has H' of exactly 0, for `H' > 0` rests on it"


def test_aggregations_by_hand(impl):
    # ratio 1, so the token losses are -1 (one token) and +2 (three tokens); T = 4; third row empty
    zero, adv = torch.zeros(3, 4, dtype=F64), t([1.0, -2.0, 7.0])
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)

    def loss(**knobs):
        return impl.policy_loss(zero, zero, adv, mask, **knobs)[0]

    same(loss(), 5 / 8, "constant: (-1/4 + 6/4) / 2; the empty row is left out")
    same(loss(max_tokens=10), 0.25, "constant: divide by max_tokens where it is given")
    same(loss(aggregation="sequence"), 0.5, "sequence: (-1 + 2) / 2")
    same(loss(aggregation="token"), 5 / 4, "token: (-1 + 6) / 4")


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


@pytest.mark.parametrize("adv, ratio, knobs, expected, gradient", CLIPS)
def test_clipping_by_hand(impl, adv, ratio, knobs, expected, gradient):
    logp = t([[math.log(ratio)]]).requires_grad_()
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, stats = impl.policy_loss(logp, t([[0.0]]), t([adv]), mask, **knobs)
    loss.backward()
    same(
        loss, expected, "PPO: the larger of the clipped and unclipped loss; dual clip caps at c|A|"
    )
    side = "clipping stops the move that the advantage asks for, never the way back"
    same(logp.grad, [[gradient]], side)
    assert gradient != 0 or logp.grad.item() == 0, f"{side}: gradient must be exactly 0"
    same(stats["approx_kl"], ratio - 1 - math.log(ratio), "k3 estimator")
    clipped = {(1, 1.5): 1, (-1, 0.5): 1, (1, 1.1): 0, (-1, 0.9): 0}.get((adv, ratio))
    if clipped is not None:
        same(stats["clip_fraction"], clipped, "clip fraction")


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


@given(z=vectors, p=levels)
def test_nucleus_is_minimal_and_reaches_p(impl, z, p):
    kept = oracle_probs(np.array(z))[impl.nucleus_mask(t(z), p).numpy()]
    assert kept.size > 0, "the nucleus is never empty"
    assert kept.sum() >= p - 1e-9, "your nucleus leaves out the token that crosses p"
    assert kept.sum() - kept.min() < p + 1e-9, "your nucleus is not the smallest that reaches p"


@given(z=vectors, p=levels)
def test_entropy_is_between_0_and_log_of_nucleus_size(impl, z, p):
    H, size = impl.nucleus_entropy(t(z), p).item(), impl.nucleus_mask(t(z), p).sum().item()
    assert 0 <= H <= math.log(size) + 1e-9, "renormalise on the nucleus before taking the entropy"


@given(z=vectors, p=levels, shift=st.floats(-50, 50))
def test_shifting_the_logits_changes_nothing(impl, z, p, shift):
    away_from_ties(z, p)
    same(impl.nucleus_mask(t(z) + shift, p), impl.nucleus_mask(t(z), p), "softmax ignores a shift")
    same(impl.nucleus_entropy(t(z) + shift, p), impl.nucleus_entropy(t(z), p), "shift of logits")


@given(z=vectors, p=levels, inclusive=st.booleans(), data=st.data())
def test_permuting_the_vocabulary_changes_nothing(impl, z, p, inclusive, data):
    away_from_ties(z, p)
    order = data.draw(st.permutations(range(len(z))))
    one, two = (impl.nucleus_entropy(x, p, inclusive=inclusive) for x in (t(z), t(z)[order]))
    same(one, two, "H' must not depend on token ids")
    if len(set(z)) == len(z):
        one, two = (impl.nucleus_mask(x, p, inclusive=inclusive) for x in (t(z)[order], t(z)))
        same(one, two[order], "map the nucleus from the sorted order back to token ids")


@given(z=vectors)
def test_p_of_1_is_the_full_entropy(impl, z):
    full = oracle_entropy(oracle_probs(np.array(z)))
    same(impl.nucleus_entropy(t(z), 1.0), full, "top_p = 1 keeps every token")
    stats = impl.token_stats(t(z), torch.tensor(0), 1.0)
    same(stats["entropy"], full, "full entropy")
    assert stats["nucleus_size"] == len(z), "top_p = 1 keeps every token"


@given(z=vectors, p=st.tuples(levels, levels), inclusive=st.booleans())
def test_nucleus_grows_with_p(impl, z, p, inclusive):
    small, large = (impl.nucleus_mask(t(z), x, inclusive=inclusive) for x in sorted(p))
    assert not (small & ~large).any(), "a larger p may only add tokens"


@given(
    size=st.integers(2, 6), groups=st.integers(1, 4), shift=st.integers(-9, 9), scale=st.booleans()
)
def test_advantages_are_centred_and_blind_to_a_shift(impl, size, groups, shift, scale):
    rewards = t([(i * i + size) % 5 / 4 for i in range(size * groups)])
    adv = impl.group_advantages(rewards, size, scale_by_std=scale)
    same(adv.view(groups, size).sum(1), [0.0] * groups, "advantages of a group sum to 0")
    shifted = impl.group_advantages(rewards + shift, size, scale_by_std=scale)
    same(shifted, adv, "only differences of rewards within a group count")
    assert adv.abs().sum() > 0 or len(set(rewards.tolist())) < len(rewards)


# === 4. gradients ===


@pytest.mark.parametrize("inclusive", [True, False])
def test_gradcheck_nucleus_entropy(impl, inclusive):
    z = make((3, 3), V=7, seed=7).logits[:, :4].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: impl.nucleus_entropy(x, 0.8, inclusive=inclusive), z)


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


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradcheck_policy_loss(impl, aggregation):
    b = make(WITH_EMPTY, seed=9)
    knobs = {"aggregation": aggregation, "dual_clip": 3.0, "clip_high": 0.28}

    def run(logp):
        return impl.policy_loss(logp, b.old_logp, b.adv, b.mask, **knobs)[0]

    assert torch.autograd.gradcheck(run, b.logp.clone().requires_grad_())


@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_gradcheck_siren_loss(impl, regularizer):
    b = make((6, 1, 0, 4), V=5, seed=10)

    def run(z):
        b.logits = z
        return loss_of(impl, b, regularizer=regularizer, temperature=1.2)[0]

    assert torch.autograd.gradcheck(run, b.logits.clone().requires_grad_())


@pytest.mark.parametrize("inclusive", [True, False])
def test_closed_form_gradient(impl, inclusive):
    z = make(seed=11).logits.requires_grad_()
    (grad,) = torch.autograd.grad(impl.nucleus_entropy(z, 0.8, inclusive=inclusive).sum(), z)
    for i in np.ndindex(*z.shape[:-1]):
        q = oracle_q(z[i].detach().numpy(), 0.8, inclusive)
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


def test_one_step_moves_entropy_the_right_way(impl):
    b = make(seed=12)
    b.old_logp, b.adv = b.logp, b.adv * 0  # nothing but the regulariser acts

    def step(**knobs):
        z = b.logits.clone().requires_grad_()
        args = b.tokens, b.old_logp, b.adv, b.mask
        loss, before = impl.siren_loss(z, *args, **KNOBS, **knobs)
        loss.backward()
        _, after = impl.siren_loss((z - 0.1 * z.grad).detach(), *args, **KNOBS, **knobs)
        return (after["nucleus_entropy"] - before["nucleus_entropy"]).item()

    assert step(anchor=2.2) > 1e-4, "below the anchor the penalty must raise entropy"
    assert step(anchor=0.2) < -1e-4, "above the anchor the penalty must lower entropy"
    assert step(anchor=0.2, regularizer="bonus") > 1e-4, "the bonus is -beta * H_agg: it raises it"
    assert step(anchor=0.2, regularizer="none") == 0


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
    strict = knobs.get("strict", False)
    H = impl.token_stats(b.logits, b.tokens, KNOBS["top_p"])["nucleus_entropy"]
    whole = impl.minibatch_totals(H, b.mask, KNOBS["peak_quantile"], strict=strict)
    if not with_h_agg:
        del whole["h_agg"]
    parts = []
    for start in range(0, len(b.adv), size):
        micro = rows(b, slice(start, start + size))
        parts.append(value_and_grad(impl, micro, whole=whole, **knobs))
    loss = sum(part[0] for part in parts)
    stats = {name: sum(part[2][name] for part in parts) for name in parts[0][2]}
    return loss, torch.cat([part[1] for part in parts]), stats


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_add_up(impl, size, regularizer, aggregation):
    for dtype, tol in ((F64, 1e-12), (torch.float32, 1e-6)):
        b = make(WITH_EMPTY, seed=14, dtype=dtype)  # size 1: one micro-batch has no token at all
        knobs = {"regularizer": regularizer, "aggregation": aggregation}
        loss, grad, stats = value_and_grad(impl, b, **knobs)
        loss_sum, grad_sum, stats_sum = accumulate(impl, b, size, **knobs)
        same(loss_sum, loss, "shares of the loss add up to the mini-batch's", tol=tol)
        same(grad_sum, grad, "the penalty's gradient depends on the micro-batch size", tol=tol)
        same_stats(stats_sum, stats, "shares add up")
        if dtype is F64:
            expected, _ = oracle_siren(b, ANCHOR, **KNOBS, **knobs)
            same(loss_sum, expected, "shares add up to the definition")


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


def test_totals_carry_no_gradient(impl):
    z = make(WITH_EMPTY).logits.requires_grad_()
    H = impl.nucleus_entropy(z, 0.8)
    mask = make(WITH_EMPTY).mask
    assert H.requires_grad
    for name, x in impl.minibatch_totals(H, mask, 0.8).items():
        assert not torch.as_tensor(x).requires_grad, f"{name} must be computed without gradient"
    assert not impl.peak_mask(H, mask, 0.8).requires_grad


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("dim", [0, 1])
def test_padding_changes_nothing(impl, aggregation, dim):
    b = make(WITH_EMPTY, seed=16)
    knobs = {"aggregation": aggregation, "max_tokens": 6}
    loss, grad, stats = value_and_grad(impl, b, **knobs)
    loss2, grad2, stats2 = value_and_grad(impl, padded(b, 3, dim), **knobs)
    same(loss2, loss, "padding changes the loss")
    same(grad2.narrow(dim, 0, b.logits.shape[dim]), grad, "padding changes the gradient")
    assert (grad2.narrow(dim, b.logits.shape[dim], 3) == 0).all(), "padding gets a gradient"
    assert (grad[~b.mask] == 0).all(), "padding gets a gradient"
    same_stats(stats2, stats, "padding changes it")


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_order_of_the_batch_changes_nothing(impl, aggregation):
    b, order = make(seed=17), torch.tensor([3, 0, 7, 6, 1, 5, 2, 4])
    loss, grad, _ = value_and_grad(impl, b, aggregation=aggregation)
    loss2, grad2, _ = value_and_grad(impl, rows(b, order), aggregation=aggregation)
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


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_garbage_in_padding_never_arrives(impl, garbage, aggregation):
    b = make(WITH_EMPTY, seed=20)
    knobs = {"aggregation": aggregation, "dual_clip": 3.0}
    loss, grad, stats = value_and_grad(impl, b, **knobs)
    b.old_logp = b.old_logp.masked_fill(~b.mask, garbage)
    loss2, grad2, stats2 = value_and_grad(impl, b, **knobs)
    idea = "padded old_logp reaches it: NaN * 0 is NaN, so select before computing"
    same(loss2, loss, f"loss: {idea}")
    same(grad2, grad, f"gradient: {idea}")
    same_stats(stats2, stats, idea)


@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_batch_without_tokens_is_finite(impl, regularizer, aggregation):
    b = make((0, 0), seed=21)
    loss, grad, stats = value_and_grad(impl, b, regularizer=regularizer, aggregation=aggregation)
    assert torch.isfinite(loss) and (grad == 0).all(), "no token at all: 0 / 0"
    assert all(torch.isfinite(torch.as_tensor(x)) for x in stats.values()), "no token at all: 0 / 0"
    assert stats["nucleus_entropy"] == 0 and stats["policy_loss"] == 0


@pytest.mark.parametrize("chunk", [0, 4])
def test_inputs_are_never_written_to(impl, chunk):
    b = make(WITH_EMPTY, seed=22)
    before = {name: (x.clone(), x._version) for name, x in vars(b).items()}
    accumulate(impl, b, 2, chunk=chunk, temperature=0.5, dual_clip=3.0)
    loss_of(impl, b, chunk=chunk, temperature=0.5, inclusive=False)
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


@pytest.mark.parametrize("strict", [False, True])
def test_quantile_of_0_selects_only_positions_with_entropy(impl, strict):
    H = torch.zeros(3, 12, dtype=F64)
    H[0, [2, 7]] = t([0.4, 1.0])  # 2 of 12 tokens: q = 0
    H[2, 3] = 0.6  # the row below it is all 0
    mask = torch.arange(12) < torch.tensor([12, 12, 6])[:, None]
    peak = impl.peak_mask(H, mask, 0.8, strict=strict)
    assert torch.equal(peak, H > 0), "q = 0: `H' >= 0` holds everywhere; peaks also need H' > 0"
    same(impl.aggregate_entropy(H, peak, mask), (0.7 + 0 + 0.6) / 3, "a response of all 0 counts 0")


def test_empty_response_is_left_out_but_silent_one_counts(impl):
    H, mask = t([[1.0, 0.0], [0.0, 0.0], [9.0, 9.0]]), torch.tensor([[1, 0], [1, 1], [0, 0]]).bool()
    peak = impl.peak_mask(H, mask, 0.8)
    assert peak.tolist() == [[True, False], [False, False], [False, False]]
    same(impl.aggregate_entropy(H, peak, mask), 0.5, "mean over the responses that have a token")
    totals = impl.minibatch_totals(H, mask, 0.8)
    assert totals["responses"] == 2 and totals["tokens"] == 3
    same(totals["h_agg"], 0.5, "mean over the responses that have a token")
    same(impl.minibatch_totals(H, mask & False, 0.8)["h_agg"], 0.0, "no response at all: 0")


def test_ties_one_token_responses_and_own_quantile(impl):
    H = t([[1, 1, 1, 1, 1], [0.2, 0.7, 0.7, 0.7, 0.1], [0.3, 9, 9, 9, 9], [0.1, 0.5, 0.9, 9, 9]])
    mask = torch.arange(5) < torch.tensor([5, 5, 1, 3])[:, None]
    expected = [[1, 1, 1, 1, 1], [0, 1, 1, 1, 0], [1, 0, 0, 0, 0], [0, 0, 1, 0, 0]]
    got = impl.peak_mask(H, mask, 0.8).int().tolist()
    assert got == expected, "H' >= q: every token tied with the quantile is a peak"
    strict = impl.peak_mask(H, mask, 0.8, strict=True).int().tolist()
    assert strict == [[0] * 5, [0] * 5, [0] * 5, [0, 0, 1, 0, 0]], "strict: no tied token is a peak"
    peak = impl.peak_mask(t([[1, 2, 3], [10, 20, 30]]), torch.ones(2, 3).bool(), 0.8)
    idea = "your quantile is over the batch; every response has its own"
    assert peak.int().tolist() == [[0, 0, 1]] * 2, idea


def test_mostly_sharp_response_end_to_end(impl):
    sharp, flat = [0.97, 0.01, 0.01, 0.01], [0.25] * 4
    z = t([[sharp, sharp, flat, sharp, sharp, sharp], [sharp] * 6]).log()
    zero, mask = torch.zeros(2, 6, dtype=F64), torch.ones(2, 6, dtype=torch.bool)
    _, stats = impl.siren_loss(z, zero.long(), zero, t([0, 0]), mask, 1.0, beta=1.0)
    same(stats["nucleus_entropy"], math.log(4) / 2, "H_agg jumps down if q = 0 selects every token")
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


def test_pass_at_k_against_all_subsets(impl):
    for n in range(1, 9):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            hits = [min(subset) < c for subset in itertools.combinations(range(n), k)]
            same(impl.pass_at_k(n, c, k), np.mean(hits), f"unbiased pass@k, {n=} {c=} {k=}")


def test_pass_at_k_is_stable_for_many_samples(impl):
    same(impl.pass_at_k(10_000, 1, 100), 0.01, "binomials overflow: use products or integers")
    same(impl.pass_at_k(1000, 0, 1000), 0.0, "nothing correct")


MAJORITIES = [  # answers, correct, k, maj@k, why
    (["1", "2", "2"], "2", 3, 1, "the most frequent answer wins"),
    (["2", "1", "1"], "2", 3, 0, "one correct answer is not a majority"),
    (["2", "1", "1", "2"], "2", 4, 1, "tie: the answer given first"),
    (["1", "2", "2", "1"], "2", 4, 0, "tie: the answer given first, not the last or the correct"),
    (["3", "1", "2", "2", "1"], "1", 5, 1, "tie of the leaders: the one of them given first"),
    (["3", "1", "2", "2", "1"], "3", 5, 0, "first given, but not among the leaders"),
    ([None, None, None, "2"], "2", 4, 1, "None is no vote"),
    ([None, "1", None, "2"], "1", 4, 1, "None is no vote, not even in a tie"),
    ([None, None], "2", 2, 0, "nobody voted"),
    (["2", "1", None, None], "2", 2, 0.5, "blocks of k: [2, 1] is right, [None, None] is not"),
    (["2", "2", "1", "1", "1", "1"], "2", 2, 1 / 3, "mean over the blocks"),
    (["2", "1", "2"], "2", 1, 2 / 3, "k = 1 is the mean accuracy"),
]


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


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logp_is_that_of_a_full_pass(impl, temperature):
    model = small_model()
    out = impl.sample(
        model, PROMPTS, samples=16, temperature=temperature, generator=drawn(), **SAMPLING
    )
    ends = out.mask.sum(1)
    assert ends.min() < ends.max() <= 12, "some rows must end early for this test to mean anything"
    stats = impl.token_stats(**impl.forward(model, out), top_p=0.8, temperature=temperature)
    same(out.logp, stats["logp"], "log-probabilities with and without cache", tol=1e-5)
    for row in range(0, len(out.mask), 7):  # and without padding or neighbours
        prompt, tokens = PROMPTS[row // 16], out.tokens[row, : ends[row]]
        ids = torch.cat([torch.tensor(prompt), tokens])[None]
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() / temperature
        alone = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        same(out.logp[row, : ends[row]], alone, "left padding must not change a row", tol=1e-5)


def test_rollout_layout(impl):
    out = impl.sample(small_model(), PROMPTS, samples=16, generator=drawn(), **SAMPLING)
    assert out.prompt.shape == (48, 7) and out.tokens.shape == out.mask.shape == out.logp.shape
    for row, response in enumerate(out.responses()):
        own = out.prompt[row][out.prompt_mask[row]].tolist()
        assert own == PROMPTS[row // 16], "row i * samples + j is sample j of prompt i"
        assert out.mask[row, : len(response)].all() and not out.mask[row, len(response) :].any()
        assert not set(response[:-1]) & {1, 2}, "a response goes on after EOS"
        assert len(response) == 12 or response[-1] in (1, 2), "EOS belongs to the response"
        assert (out.tokens[row, len(response) :] == 1).all()
        assert not out.logp[row, len(response) :].any()


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


@torch.no_grad()
def test_sampled_frequencies_follow_the_model(impl):
    """Chi-square of the first two tokens, of a left-padded prompt, against exact probabilities."""
    model, count = small_model(vocab=6), 20_000
    prompts = [[3, 4], [5, 3, 4, 3, 5]]
    options = {"max_tokens": 2, "eos_ids": [0], "pad_id": 0, "batch": 10**6}
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
    assert set(observed) <= set(expected) and math.isclose(sum(expected.values()), 1, rel_tol=1e-5)
    likely = {key: p * count for key, p in expected.items() if p * count >= 5}
    chi2 = sum((observed.get(key, 0) - due) ** 2 / due for key, due in likely.items())
    freedom = len(likely) - 1
    assert chi2 < freedom + 4.5 * math.sqrt(2 * freedom), f"chi-square {chi2:.1f} on {freedom}"


def test_sampling_repeats_and_batches(impl):
    model, again = small_model(), {"samples": 8, **SAMPLING}
    first, second = (impl.sample(model, PROMPTS, generator=drawn(3), **again) for _ in range(2))
    other = impl.sample(model, PROMPTS, generator=drawn(4), **again)
    assert torch.equal(first.tokens, second.tokens) and torch.equal(first.logp, second.logp)
    assert first.tokens.shape != other.tokens.shape or not torch.equal(first.tokens, other.tokens)
    split = impl.sample(model, PROMPTS, generator=drawn(3), batch=8, **again)
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
    toy = {"rebuild-base", "check-base", "preset", "no-deps"}
    assert flags <= known | toy, f"unknown flags {flags - known - toy}"
