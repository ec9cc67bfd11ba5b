r"""Tests of siren.py, in its order: what is expected is worked out a second time, slowly, by
the definitions.

    python -m pytest test_siren.py

Letters: B responses, T positions, V vocabulary, z logits, H nucleus entropy H', tau quantile.
The fixture `impl` (conftest.py) is siren.py under the names of the exercises. These have
graders of their own, in exercises/.
"""

import itertools
import json
import math
import re
import time
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import (
    ANCHOR,
    F64,
    GRPO,
    KNOBS,
    LOSSES,
    PROMPTS,
    REGULARIZERS,
    SAMPLING,
    WITH_EMPTY,
    chi_square,
    logp_alone,
    loss_of,
    make,
    model_with_absolute_positions,
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
)
from hypothesis import assume, given
from hypothesis import strategies as st

import siren
import toy_env
from exercises import reference

# ------------------------------------------------------------------- 1. the method: advantages


@pytest.mark.parametrize("rule", [{}, GRPO])
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


@pytest.mark.parametrize("rule", [{}, GRPO])
@given(size=st.integers(2, 6), groups=st.integers(1, 4), shift=st.integers(-9, 9))
def test_advantages_are_centred_and_blind_to_a_shift(impl, rule, size, groups, shift):
    rewards = t([(i * i + size) % 5 / 4 for i in range(size * groups)])
    adv = impl.group_advantages(rewards, size, **rule)
    same(adv.view(groups, size).sum(1), [0.0] * groups, "advantages of a group sum to 0")
    shifted = impl.group_advantages(rewards + shift, size, **rule)
    same(shifted, adv, "only differences of rewards within a group count")
    silent = adv.abs().sum() == 0 and len(set(rewards.tolist())) == len(rewards)
    assert not silent, "different rewards must get different advantages"


# ----------------------------------------------------------------- the nucleus and its entropy


@pytest.mark.parametrize("top_p", [0.3, 0.8, 0.95, 1.0])
def test_nucleus_against_oracle(impl, top_p):
    b = make(seed=1)
    mask = impl.nucleus_mask(b.logits, top_p)
    right = mask.dtype == torch.bool and mask.shape == b.logits.shape
    assert right, "the mask is bool [..., V]"
    for i in np.ndindex(*b.tokens.shape):
        expected = sorted(map(int, oracle_nucleus(b.logits[i].numpy(), top_p)))
        got = mask[i].nonzero()[:, 0].tolist()
        idea = "the fewest tokens that reach top_p"
        if top_p == 1:
            idea = "top_p = 1 keeps every token, however unlikely"
        assert got == expected, f"{idea}: {got}, not {expected}, at {i} for top_p {top_p}"


@pytest.mark.parametrize("top_p", [0.3, 0.8, 0.95, 1.0])
def test_q_is_the_policy_on_the_nucleus(top_p):
    b = make(seed=1)
    q = siren.nucleus(b.logits.log_softmax(-1), top_p).exp()
    for i in np.ndindex(*b.tokens.shape):
        expected = np.sort(oracle_q(b.logits[i].numpy(), top_p))[::-1][: q.shape[-1]]
        got = q[i]
        if top_p == 1:  # then the tokens are in the order of their ids
            got = got.sort(descending=True)[0]
        same(got, expected.copy(), "pi on the nucleus, renormalised, the likeliest first")
        same(got.sum(), 1.0, "a probability is missing")


def by_a_full_sort(log_pi, top_p):
    """What siren.nucleus computes, without its helper `likeliest`."""
    log_pi = log_pi.sort(-1, descending=True)[0]
    pi = log_pi.detach().exp()
    return log_pi.masked_fill(pi.cumsum(-1) - pi >= top_p, -math.inf).log_softmax(-1)


@pytest.mark.parametrize("V", [2, 11, 100, 5000])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.85, 0.999])
def test_nucleus_is_that_of_a_full_sort(V, top_p):
    """In value and gradient, for rows from flat to peaked."""
    scale = t([[0.0], [0.1], [1.0], [3.0], [9.0], [30.0]])
    z = (torch.randn(3, 6, V, generator=seeded(V), dtype=F64) * scale).requires_grad_()
    fast, slow = (f(z.log_softmax(-1), top_p) for f in (siren.nucleus, by_a_full_sort))
    K = fast.shape[-1]
    same(fast.exp(), slow[..., :K].exp(), "q")
    assert (slow[..., K:] == -math.inf).all(), "a token of the nucleus is missing"
    weight = torch.randn(K, generator=seeded(), dtype=F64)
    grads = []
    for log_q in (fast, slow[..., :K]):
        value = siren.entropy_of(log_q).sum() + (log_q.exp() * weight)[:, 1:].sum()
        grads += torch.autograd.grad(value, z, retain_graph=True)
    same(grads[0], grads[1], "its gradient")


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


@given(z=vectors, p=levels)
def test_nucleus_is_minimal_and_reaches_p(impl, z, p):
    kept, at = (
        oracle_probs(np.array(z))[impl.nucleus_mask(t(z), p).numpy()],
        f"logits {z}, p {p}",
    )
    assert kept.sum() >= p - 1e-9, f"your nucleus leaves out the token that crosses p: {at}"
    assert kept.size > 0, f"the nucleus is never empty: {at}"
    smallest = kept.sum() - kept.min() < p + 1e-9
    assert smallest, f"your nucleus is not the smallest that reaches p: {at}"


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
    """Is autograd's gradient that of finite differences? False also where there is none."""
    if not function(x).requires_grad:
        return False
    return torch.autograd.gradcheck(function, x, raise_exception=False)


def test_closed_form_gradient(impl):
    z = make(seed=11).logits.requires_grad_()
    H = impl.nucleus_entropy(z, 0.8)
    assert H.requires_grad, (
        "H' has no gradient: only the choice of the set is not differentiated"
    )
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


def test_gradcheck_nucleus_entropy(impl):
    z = make((3, 3), V=7, seed=7).logits[:, :4].requires_grad_()
    right = gradcheck(lambda x: impl.nucleus_entropy(x, 0.8), z)
    assert right, "autograd's gradient of H' is not that of its value: was a part detached?"


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
@pytest.mark.parametrize("top_p", [0.3, 0.8, 1.0])
def test_token_stats_against_oracle(top_p, temperature):
    b = make(seed=2)
    z = b.logits.requires_grad_()
    stats = siren.token_stats(z, b.tokens, top_p, temperature)
    same_stats(stats, oracle_stats(z.detach(), b.tokens, top_p, temperature), "token_stats")
    trained = {name for name, x in stats.items() if x.requires_grad}
    assert trained == {"logp", "nucleus_entropy"}, "the others are for the log"
    one = siren.token_stats(z[0, 0], b.tokens[0, 0], top_p, temperature)
    same_stats(one, {name: x[0, 0] for name, x in stats.items()}, "any [..., V]")
    for name in trained:
        right = gradcheck(
            lambda x, name=name: siren.token_stats(x, b.tokens[:1], top_p, temperature)[name],
            z[:1].detach().requires_grad_(),
        )
        assert right, f"the gradient of {name}"


# ----------------------------------------------------------------------- peaks and aggregation


def ragged_entropies(dtype):
    """H' [40, 11] with zeros, ties, empty rows and padding that must not matter; its mask."""
    g = seeded(3)
    H = torch.rand(40, 11, generator=g, dtype=F64)
    H[::3] *= torch.rand(14, 11, generator=g) < 0.4  # many zeros
    H[1::3] = (H[1::3] * 4).ceil() / 4  # many ties
    mask = torch.arange(11) < torch.arange(40)[:, None] % 12
    return torch.where(mask, H, 5.0).to(dtype), mask


TAUS = pytest.mark.parametrize("tau", [0.0, 0.25, 0.5, 0.8, 0.93, 1.0])


@TAUS
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_peaks_against_oracle(impl, tau, dtype):
    H, mask = ragged_entropies(dtype)
    peak = impl.peak_mask(H, mask, tau)
    assert peak.dtype == torch.bool and peak.shape == mask.shape, "the mask is bool [B, T]"
    expected = oracle_peaks(H, mask, tau)
    for i in range(40):
        idea = f"peaks of a response of {int(mask[i].sum())} tokens: its own quantile"
        if tau == 0:
            idea = "quantile 0 switches the mask off: every token of the response"
        assert peak[i].tolist() == expected[i].tolist(), idea


@TAUS
@pytest.mark.parametrize("dtype", [F64, torch.float32])
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


def test_quantile_of_0_selects_only_positions_with_entropy(impl):
    H, mask = mostly_sharp()
    peak = impl.peak_mask(H, mask, 0.8)
    assert torch.equal(peak, H > 0), (
        "q = 0: `H' >= 0` holds everywhere; peaks also need H' > 0"
    )


@pytest.mark.parametrize(
    "H, lengths, expected, idea",
    [
        (
            [
                [1, 1, 1, 1, 1],
                [0.2, 0.7, 0.7, 0.7, 0.1],
                [0.3, 9, 9, 9, 9],
                [0.1, 0.5, 0.9, 9, 9],
            ],
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


# ----------------------------------------------------------------------------- the policy loss


@pytest.mark.parametrize("knobs", [{}, GRPO])
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
        ({}, 5 / 8, "(-1/4 + 6/4) / 2; the empty row is left out"),
        ({"max_tokens": 10}, 0.25, "divide by max_tokens where it is given"),
        (GRPO, 0.5, "(-1 + 2) / 2: each response's own length"),
        (GRPO | {"max_tokens": 10}, 0.5, "(-1 + 2) / 2: whatever the budget"),
    ],
)
def test_lengths_by_hand(impl, knobs, expected, why):
    # ratio 1, so the token losses are -1 (one token) and +2 (three tokens); T = 4
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


@pytest.mark.parametrize("adv, ratio, knobs, expected, gradient, clipped", CLIPS)
def test_clipping_by_hand(impl, adv, ratio, knobs, expected, gradient, clipped):
    loss, slope, stats = one_token_loss(impl, adv, ratio, **knobs)
    same(loss, expected, "PPO: the larger of the clipped and the unclipped loss")
    side = "clipping stops the move that the advantage asks for, never the way back"
    same(slope, [[gradient]], side)
    assert gradient != 0 or slope.item() == 0, f"{side}: gradient must be exactly 0"
    same(
        stats["clip_fraction"], clipped, "clip_fraction: where the clipped term is the smaller"
    )
    kl = stats.get("approx_kl", torch.tensor(ratio - 1 - math.log(ratio)))  # no student has it
    same(kl, ratio - 1 - math.log(ratio), "k3 estimator", tol=1e-6)


@pytest.mark.parametrize("knobs", [{}, GRPO])
def test_gradcheck_policy_loss(impl, knobs):
    b = make(WITH_EMPTY, seed=9)

    def run(logp):
        return impl.policy_loss(logp, b.old_logp, b.adv, b.mask, clip_high=0.28, **knobs)[0]

    right = gradcheck(run, b.logp.clone().requires_grad_())
    assert right, "autograd's gradient is not that of the loss: was a part detached?"


@pytest.mark.parametrize("algorithm", ["dr_grpo", "grpo"])
def test_an_advantage_for_each_token(algorithm):
    """adv [B, T]: the loss of each token with its own, here one at a time."""
    b = make(seed=6)
    adv = torch.randn(b.mask.shape, generator=seeded(), dtype=F64)

    def loss(adv):
        return siren.policy_loss(b.logp, b.old_logp, adv, b.mask, 9, algorithm=algorithm)[0]

    same(loss(b.adv[:, None].expand(b.mask.shape)), loss(b.adv), "[B, T] with equal columns")
    alone = [loss(adv * one) for one in torch.eye(adv.numel(), dtype=F64).view(-1, *adv.shape)]
    same(loss(adv), sum(alone), "a sum over the tokens")


def test_what_was_given_gets_no_gradient():
    b = make(seed=6)
    for x in (b.logp, b.old_logp, b.adv):
        x.requires_grad_()
    siren.policy_loss(b.logp, b.old_logp * 1, b.adv * 1, b.mask, 9)[0].backward()
    assert b.logp.grad.any() and b.old_logp.grad is None and b.adv.grad is None


# ------------------------------------------------------------------------------ the whole loss


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


@pytest.mark.parametrize("knobs", [{}, *({"temperature": 1.2, **k} for k in REGULARIZERS)])
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


def test_one_step_moves_entropy_to_the_anchor(impl):
    up, down = (entropy_moved_by_a_step(impl, anchor) for anchor in (2.2, 0.2))
    assert up != 0 and down != 0, "the regulariser has no gradient: was H_agg detached?"
    assert up > 1e-4, "below the anchor the penalty must raise entropy"
    assert down < -1e-4, "above the anchor the penalty must lower entropy: it is not a bonus"


def test_one_step_without_an_anchor(impl):
    up = entropy_moved_by_a_step(impl, 0.2, regularizer="bonus")
    assert up > 1e-4, "the bonus is -beta * H_agg: it raises it"
    assert entropy_moved_by_a_step(impl, 0.2, regularizer="none") == 0


def test_only_peaks_are_regularised(impl):
    b = make(seed=13)
    b.old_logp, b.adv = b.logp, b.adv * 0
    _, grad, _ = value_and_grad(impl, b)
    H = oracle_stats(b.logits, b.tokens, 0.8)["nucleus_entropy"]
    peak = oracle_peaks(H, b.mask, 0.8)
    none = (grad.numpy()[~peak] == 0).all()
    assert none, "a position that is not a peak gets an entropy gradient"
    assert (np.abs(grad.numpy()[peak]).sum(-1) > 0).all(), "a peak gets no entropy gradient"


def test_mostly_sharp_response_end_to_end(impl):
    sharp, flat = [0.97, 0.01, 0.01, 0.01], [0.25] * 4
    z = t([[sharp, sharp, flat, sharp, sharp, sharp], [sharp] * 6]).log()
    zero, mask = torch.zeros(2, 6, dtype=F64), torch.ones(2, 6, dtype=torch.bool)
    stats = impl.siren_loss(z, zero.long(), zero, t([0, 0]), mask, 1.0, beta=1.0)[1]
    same(stats["h_agg"], math.log(4) / 2, "H_agg jumps down if q = 0 selects every token")
    peaks = stats.get("peak_fraction", torch.tensor(1 / 12))  # no student has it
    same(peaks, 1 / 12, "one peak in twelve tokens", tol=1e-6)


@pytest.mark.parametrize("knobs", [{}, GRPO])
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


@pytest.mark.parametrize("knobs", [{}, GRPO])
def test_order_of_the_batch_changes_nothing(impl, knobs):
    b, order = make(seed=17), torch.tensor([3, 0, 7, 6, 1, 5, 2, 4])
    loss, grad, _ = value_and_grad(impl, b, **knobs)
    loss2, grad2, _ = value_and_grad(impl, rows(b, order), **knobs)
    same(loss2, loss, "the loss depends on the order of the rows")
    same(grad2, grad[order], "the gradient depends on the order of the rows")


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("knobs", [{}, GRPO])
def test_garbage_in_padding_never_arrives(impl, garbage, knobs):
    b = make(WITH_EMPTY, seed=20)
    loss, grad, stats = value_and_grad(impl, b, **knobs)
    b.old_logp[~b.mask] = garbage
    loss2, grad2, stats2 = value_and_grad(impl, b, **knobs)
    idea = "padded old_logp reaches it: NaN * 0 is NaN, so select before computing"
    same(loss2, loss, f"loss: {idea}")
    same(grad2, grad, f"gradient: {idea}")
    same_stats(stats2, stats, idea)


@pytest.mark.parametrize("knobs", [{}, *LOSSES])
def test_batch_without_tokens(impl, knobs):
    b = make((0, 0), seed=21)
    loss, grad, stats = value_and_grad(impl, b, **knobs)
    assert torch.isfinite(loss) and (grad == 0).all(), "no token at all: 0 / 0"
    finite = all(torch.isfinite(torch.as_tensor(x)) for x in stats.values())
    assert finite, "no token at all: 0 / 0"
    assert stats["h_agg"] == 0 and stats["policy_loss"] == 0, "no token at all: 0"


def test_inputs_are_never_written_to(impl):
    b = make(WITH_EMPTY, seed=22)
    before = {name: (x.clone(), x._version) for name, x in vars(b).items()}
    loss_of(impl, b, algorithm="grpo", temperature=0.5)
    siren.peak_mask(b.logp.exp(), b.mask, 0.8)
    siren.aggregate_entropy(b.logp, b.mask, b.mask)
    siren.in_parts(lambda z, ids: siren.token_stats(z, ids), 3, b.logits, b.tokens)
    siren.group_advantages(b.adv, 2, algorithm="grpo")
    for name, x in vars(b).items():
        unchanged = torch.equal(x, before[name][0]) and x._version == before[name][1]
        assert unchanged, f"{name} was written to in place"


# ---------------------------------------------- parts of a batch that does not fit into memory


def loss_in_parts(b, head, size, chunk, algorithm, regularizer):
    """The loss from hidden states, b.hidden, that go through in_parts and stats_in_chunks."""

    def stats_of(hidden, tokens):
        rows = siren.stats_in_chunks(
            hidden.flatten(0, 1), head, tokens.flatten(), 0.8, 1.3, chunk
        )
        return {name: x.view(tokens.shape) for name, x in rows.items()}

    now = siren.in_parts(stats_of, size, b.hidden, b.tokens)
    policy, info = siren.policy_loss(
        now["logp"], b.old_logp, b.adv, b.mask, 9, algorithm=algorithm
    )
    entropy = now["nucleus_entropy"]
    loss, more = siren.siren_loss(policy, entropy, b.mask, ANCHOR, 0.7, 0.8, regularizer)
    return loss, info | more


@pytest.mark.parametrize("size", [1, 3, 5, 8, 99])
@pytest.mark.parametrize("knobs", LOSSES)
def test_parts_have_the_loss_and_the_gradient_of_the_whole(size, knobs):
    """(H_agg - H*)^2 as well: its square is taken once, over all rows."""
    b = make(WITH_EMPTY, seed=14)
    b.hidden = torch.randn(8, 6, 5, generator=seeded(), dtype=F64).requires_grad_()
    head = torch.nn.Linear(5, 11).double()
    torch.nn.init.normal_(head.weight, generator=seeded(1))
    found = []
    for rows_at_once, chunk in ((99, 99), (size, 0), (size, 4), (99, 7)):
        loss, stats = loss_in_parts(b, head, rows_at_once, chunk, **knobs)
        grads = torch.autograd.grad(loss, [b.hidden, *head.parameters()])
        found.append((loss, stats, grads))
    b.logits = head(b.hidden).detach()
    options = KNOBS | {"temperature": 1.3, "max_tokens": 9} | knobs
    expected, expected_stats = oracle_siren(b, ANCHOR, **options)
    for loss, stats, grads in found:
        same(loss, expected, "the loss of the whole")
        same_stats(stats, expected_stats, "of the whole")
        for grad, whole in zip(grads, found[0][2]):
            same(grad, whole, "the gradient of the whole", tol=1e-8)


def test_parts_are_rows_in_order_and_computed_again():
    x, y = torch.arange(7.0).requires_grad_(), torch.arange(7)
    seen = []

    def function(x, y):
        seen.append(y.tolist())
        return {"square": x * x, "copy": y}

    out = siren.in_parts(function, 3, x, y)
    assert seen == [[0, 1, 2], [3, 4, 5], [6]]
    assert torch.equal(out["square"], x * x) and torch.equal(out["copy"], y)
    out["square"].sum().backward()
    assert sorted(seen[3:]) == seen[:3], "each part once more, in the backward pass"
    assert torch.equal(x.grad, 2 * x.detach())
    seen.clear()
    siren.in_parts(function, 7, x, y)
    assert seen == [list(range(7))], "what fits is one part, and is not computed again"


# ---------------------------------------------------------------------------------- 3. sampler


def test_sampling_repeats(impl):
    model, seeds = small_model(), (3, 3, 4)
    first, second, other = (
        sampled(impl, model, samples=8, generator=seeded(s)) for s in seeds
    )
    idea = "draw with the generator: the same seed gives the same tokens"
    assert torch.equal(first.tokens, second.tokens), idea
    assert torch.equal(first.logp, second.logp), idea
    differ = first.tokens.shape != other.tokens.shape or not torch.equal(
        first.tokens, other.tokens
    )
    assert differ, "another seed gives other tokens: draw, don't take the likeliest"


@pytest.mark.parametrize("temperature, batch", [(1.0, 1024), (0.7, 1024), (1.0, 8), (0.7, 40)])
def test_sampled_logp_is_that_of_a_full_pass(temperature, batch):
    model = small_model()
    out = sampled(reference, model, temperature=temperature, batch=batch)
    assert len(out.mask) == 48, "a row per sample"
    stats = siren.score(model, out, siren.Config(temperature=temperature))
    same(out.logp, stats["logp"], "log-probabilities with and without cache", tol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logp_is_that_of_the_row_alone(impl, temperature):
    model = small_model()
    out = sampled(impl, model, temperature=temperature)
    ends = out.mask.sum(1)
    assert ends.min() < ends.max() <= 12, (
        "rows must end at EOS, each on its own, or at max_tokens"
    )
    for row in range(0, len(out.mask), 7):  # without padding or neighbours
        prompt, tokens = PROMPTS[row // 16], out.tokens[row, : ends[row]]
        alone = logp_alone(model, prompt, tokens, temperature)
        unscaled = logp_alone(model, prompt, tokens)
        mistakes = {"logp is of the distribution drawn from: logits / temperature": unscaled}
        idea = "left padding must not change a row: hide it (attention_mask, position_ids)"
        same(
            out.logp[row, : ends[row]], alone, idea, 1e-5, mistakes if temperature != 1 else {}
        )


@torch.no_grad()
def test_position_ids_count_a_rows_own_tokens(impl):
    """With learned absolute positions; rotary ones, as in small_model, see differences."""
    model = model_with_absolute_positions()
    out = sampled(impl, model)
    for row in range(0, len(out.mask), 7):
        alone = logp_alone(model, PROMPTS[row // 16], out.tokens[row][out.mask[row]])
        idea = "positions count a row's own tokens, not the padding on its left"
        same(out.logp[row][out.mask[row]], alone, idea, tol=1e-5)


@pytest.mark.parametrize("options", [{"samples": 16}, {"max_tokens": 40}])
def test_rollout_layout(impl, options):
    out = impl.sample(small_model(), PROMPTS, generator=seeded(), **SAMPLING | options)
    assert len(out.mask) == 3 * options.get("samples", 1), "a row per sample, by default one"
    shapes = {out.tokens.shape, out.mask.shape, out.logp.shape}
    assert len(shapes) == 1, f"tokens, mask and logp are [B, T], not {shapes}"
    for row, response in enumerate(out.responses()):
        left = (
            out.mask[row, : len(response)].all() and not out.mask[row, len(response) :].any()
        )
        assert left, "the mask is True from the first token on, then False"
        assert not set(response[:-1]) & {1, 2}, "a response goes on after EOS: it ends there"
        whole = len(response) == options.get("max_tokens", 12) or set(response[-1:]) & {1, 2}
        assert whole, (
            "EOS belongs to the response, or is never trained; without, on to max_tokens"
        )
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


@pytest.mark.parametrize("batch", [{}, {"batch": 10**6}])
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


def test_the_key_decides_every_draw():
    model = small_model()
    task = SimpleNamespace(pad_id=1, eos_ids=[2])
    problems = [SimpleNamespace(prompt=prompt) for prompt in PROMPTS]

    def tokens(key):
        torch.rand(3)  # the global generator is not asked
        return siren.sample(model, task, problems, siren.Config(), key, 8, 1.0).tokens.tolist()

    assert tokens("0/1") == tokens("0/1") != tokens("0/2")


# --------------------------------------------------------------------------------- 4. verifier


RIGHT = r"""
5 | 5    +5 | 5    -3 | -3    007 | 7    -0 | 0    5.0 | 5    0.50 | 1/2    2/4 | 1/2
4/2 | 2    2.50 | 2.5    2.50 | 5/2    -2.50 | -5/2    -1/2 | -0.5    12/016 | 3/4
1,234 | 1234    -1,234 | -1234    1,234,567.50 | 1234567.5    1,234.5 | 2469/2
x + 1 | x + 1    east | east    1/0 | 1/0    \frac{1}{2} | \frac{1}{2}
"""
WRONG = r"""
5 | 6    5 | -5    5 | 50    0.5 | 5    1/2 | 2    1/3 | 0.333    1,23 | 123    12,34 | 1234
1,2,3 | 123    1,2345 | 12345    1,234/2 | 617    1.2.3 | 1.23    1 234 | 1234    5 6 | 56
5 or 6 | 5    1/0 | 0    1/0 | 5    0/0 | 0    1/00 | 1/0    1/-2 | -1/2    1/2/3 | 1/6
1.5/2 | 3/4    --5 | 5    +-5 | -5    5- | 5    5/ | 5    5x | 5    x5 | 5    5 cm | 5
0x10 | 16    1_000 | 1000    1e3 | 1000    inf | 5    nan | 5    ² | 2    ٣ | 3    (1,2) | 12
east | west    x + 1 | x + 2
"""
EXTRACT = r"""
the answer is 5 | None
\boxed | None
\boxed{ | None
\boxed{5 | None
so \boxed{5}. | 5
\boxed{1}, no: \boxed{2} | 2
\boxed{\frac{1}{2}} | \frac{1}{2}
\boxed{\text{a {b} c}} }{ | \text{a {b} c}
\boxed{\boxed{5}} | \boxed{5}
\boxed{1 + \boxed{2} + 3} | 1 + \boxed{2} + 3
\boxed{1} \boxed{\boxed{5}} | \boxed{5}
\boxed{1} and \boxed{2 | None
\boxed{1} and \boxed{\boxed{2} | None
}}\boxed{5}}} | 5
\boxed{\frac{1}{2} | None
a line break \\\boxed{5} | 5
\boxed {7} | 7
\boxed{\{1\}} | \{1\}
\boxed{1\} | None
\{\boxed{5}\} | 5
\boxed{\{} | \{
"""


def pairs(table):
    return [tuple(pair.split(" | ")) for pair in re.split(r"\n|    ", table.strip())]


@pytest.mark.parametrize("box, answer", pairs(RIGHT))
def test_right_answers(box, answer):
    for text, known in ((box, answer), (answer, box), (f" {box} ", answer)):
        response = rf"First \boxed{{41}}, in the end \boxed{{{text}}}. Done."
        assert siren.verify(response, known) is True, f"{text!r} is {known!r}"


@pytest.mark.parametrize("box, answer", pairs(WRONG))
def test_wrong_answers(box, answer):
    assert siren.verify(rf"So it is \boxed{{{box}}}.", answer) is False
    assert siren.verify(rf"So it is \boxed{{{answer}}}.", box) is False


@pytest.mark.parametrize("text, expected", pairs(EXTRACT))
def test_extraction(text, expected):
    got = siren.extract_answer(text)
    assert str(got) == expected, "the content of the last outermost box, if its brace closes"
    if got is None:
        assert siren.verify(text, "5") is siren.verify(text, "None") is False, "no reward"
    assert siren.extract_answer(r"\boxed{}") == "" and siren.extract_answer("") is None


def test_the_last_box_decides():
    assert siren.verify(r"\boxed{5} wait \boxed{6}", "5") is False, "guessing must not pay"
    assert siren.verify(r"\boxed{6} wait \boxed{5}", "5") is True
    assert siren.verify(r"\boxed{5} or rather \boxed{6", "5") is False, "it took 5 back"


def test_a_tasks_own_rule_finds_the_answer_without_a_box():
    def last_word(text):
        return text.split()[-1] if text.split() else None

    assert siren.extract_answer("it is 7", last_word) == "7"
    assert siren.verify("it is 7", "7", last_word) is True
    assert siren.verify("it is 7", "8", last_word) is False
    assert siren.verify("", "7", last_word) is False
    assert siren.extract_answer(r"\boxed{6} or 7", last_word) == "6", "a box comes first"
    assert siren.extract_answer(r"\boxed{6 or 7", last_word) is None, "also if it is cut off"


def test_a_tasks_own_equality_decides():
    asked = []

    def equal(given, answer):
        asked.append((given, answer))
        return given == "a right one"

    assert siren.verify(r"\boxed{a right one}", r"\boxed{5}", equal=equal) is True
    assert siren.verify(r"\boxed{5}", "5", equal=equal) is False
    assert siren.verify("without a box", "5", equal=equal) is False
    assert asked == [("a right one", r"\boxed{5}"), ("5", "5")], "no answer, no question"


def test_numbers_are_exact_and_huge_ones_are_text():
    assert siren.normalize("0.125") == Fraction(1, 8), "no floats"
    assert siren.normalize(" x + 1\n") == "x + 1" and siren.normalize("") == ""
    big = "1" + "0" * 98
    assert siren.verify(rf"\boxed{{{big}.0}}", big) is False, "101 characters are text"
    assert siren.verify(rf"\boxed{{{big}}}", f"+{big}") is True
    assert siren.verify(rf"\boxed{{{big[:-1]}1}}", big) is False
    for digits in ("9" * 5000, "9" * 10**6, "1/" + "9" * 10**6):
        assert siren.verify(rf"\boxed{{{digits}}}", digits) is True
        assert siren.verify(rf"\boxed{{{digits}}}", digits[:-1] + "8") is False


@given(n=st.integers(-(10**9), 10**9), d=st.integers(1, 10**6), k=st.integers(2, 99))
def test_numbers_compare_by_value(n, d, k):
    assert siren.verify(rf"\boxed{{{n * k}/{d * k}}}", f"{n}/{d}") is True
    assert siren.verify(rf"\boxed{{{n:,}}}", str(n)) is True, "thousands separators"
    assert siren.verify(rf"\boxed{{{n:,}.00}}", f"{n * d}/{d}") is True
    assert siren.verify(rf"\boxed{{{n + 1}/{d}}}", f"{n}/{d}") is False


@pytest.mark.parametrize(
    "part", ["{", "}", "{}", r"\boxed{", r"\boxed{}", r"\boxed", r"\{", "{{}"]
)
def test_a_megabyte_of_braces_takes_linear_time(part):
    for size in (30_000, 1_000_000):  # quadratic code fails at the small size
        for head in ("", r"\boxed{"):
            start = time.process_time()
            siren.verify(head + part * (size // len(part)), "5")
            assert time.process_time() - start < 2


# ---------------------------------------------------------------------------- 5. training step


def rollout_and_run(**options):
    """A rollout of a small model in float64, and what siren.update needs of a run."""
    model = small_model().double()
    options = {"group_size": 4, "max_tokens": 12, "beta": 0.7, "grad_clip": 1e6} | options
    run = SimpleNamespace(cfg=siren.Config(**options), model=model, anchor=ANCHOR)
    run.weights = list(model.parameters())
    run.optimizer = torch.optim.SGD(run.weights, lr=1e-12)
    return sampled(reference, model, samples=4), run


def test_score_is_that_of_a_pass_over_each_row_alone():
    rollout, run = rollout_and_run(temperature=0.7, micro_batch_size=5, top_p=0.8)
    stats = siren.score(run.model, rollout, run.cfg)
    assert all(x.shape == rollout.mask.shape for x in stats.values())
    for row, tokens in enumerate(rollout.responses()):
        prompt = PROMPTS[row // 4]
        logits = run.model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = oracle_stats(logits.detach(), tokens, 0.8, 0.7)
        for name, values in expected.items():
            got = stats[name][row]
            same(got[: len(tokens)], values, name, tol=1e-6)
            assert not got[len(tokens) :].any(), "0 in padding"


@pytest.mark.parametrize("knobs", LOSSES)
def test_update_is_the_same_for_every_micro_batch_and_chunk(knobs):
    """Gradients of all weights, from hidden states and the head, on a model in float64."""
    found = []
    for size, chunk in ((12, 0), (1, 0), (5, 0), (5, 3), (12, 7)):
        rollout, run = rollout_and_run(micro_batch_size=size, chunk=chunk, **knobs)
        b = make((6,) * 12, seed=3)
        old_logp = rollout.logp.double() + b.old_logp[:, :1] / 9
        adv = siren.group_advantages(b.adv, 4)
        stats = siren.update(run, rollout, old_logp, adv)
        found.append((stats, torch.cat([p.grad.flatten() for p in run.weights])))
    for stats, grad in found[1:]:
        same(grad, found[0][1], "gradient", tol=1e-8)
        same_stats(stats, found[0][0], "stats")
    assert found[0][1].abs().max() > 1e-3


def test_update_clips_the_gradient_and_stops_if_it_is_not_finite(monkeypatch):
    rollout, run = rollout_and_run(grad_clip=0.01)
    adv = torch.linspace(-1, 1, 12, dtype=F64)
    stats = siren.update(run, rollout, rollout.logp, adv)
    norm = torch.cat([p.grad.flatten() for p in run.weights]).norm().item()
    assert stats["grad_norm"] > 0.02 and norm == pytest.approx(0.01, rel=1e-3)
    before = [p.clone() for p in run.weights]
    with pytest.raises(RuntimeError, match="non-finite"):
        siren.update(run, rollout, rollout.logp, adv * math.nan)
    assert all(map(torch.equal, before, run.weights)), "a weight was changed"


def a_run(folder, **options):
    small = {"prompts": 4, "group_size": 4, "mini_batches": 2, "eval_prompts": 2}
    return siren.Run(siren.Config(out=str(folder), **small | {"eval_samples": 2} | options))


def test_a_step_measures_the_rollout_of_its_key_and_trains(tmp_path):
    run = a_run(tmp_path, seed=3, lr=0.01, top_p=0.8, warmup_steps=10)
    model, task, before = run.model, run.task, [p.clone() for p in run.weights]
    problems = task.train_problems(4, "3/1")
    rollout = siren.sample(model, task, problems, run.cfg, "3/1", 4, 1.0)
    responses = rollout.responses()
    answers = [p.answer for p in problems for _ in range(4)]
    found = map(task.find_answer, map(task.decode, responses))
    right = [given == answer for given, answer in zip(found, answers)]
    with torch.no_grad():
        logits = model.lm_head(siren.forward(model, rollout))
    expected = oracle_stats(logits.double(), rollout.tokens, 0.8)
    mask = rollout.mask.numpy()
    peaks = oracle_peaks(expected["nucleus_entropy"], mask, run.cfg.peak_quantile)
    h_agg = oracle_aggregate(expected["nucleus_entropy"], peaks, mask)
    metrics = siren.training_step(run, 1)
    assert metrics["reward"] == pytest.approx(np.mean(right))
    assert metrics["h_agg"] == pytest.approx(h_agg, rel=1e-4)
    assert metrics["anchor"] == run.anchor == metrics["h_agg"], "the first batch sets H*"
    for name in ("entropy", "nucleus_size"):
        assert metrics[name] == pytest.approx(expected[name][mask].mean(), rel=1e-4)
    assert metrics["response_tokens"] == mask.sum() / 16
    assert metrics["ended_share"] == np.mean([ids[-1] == 1 for ids in responses])
    assert metrics["useless_share"] == task.metrics(responses)["useless_share"]
    assert metrics["approx_kl"] >= 0 and 0 <= metrics["clip_fraction"] <= 1
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.001), (
        "a tenth of the warm-up"
    )
    assert all((one != two).any() for one, two in zip(before, run.weights)), "trained"
    second = siren.training_step(run, 2)
    assert second["anchor"] == run.anchor == metrics["anchor"] != second["h_agg"]


def test_an_update_takes_whole_groups_and_each_response_once(tmp_path, monkeypatch):
    run = a_run(tmp_path, prompts=5)
    taken = []

    def spied(run, rollout, old_logp, adv):
        taken.append(rollout.prompt.tolist())
        assert len(adv) == len(old_logp) == len(rollout.mask)
        same(adv.view(-1, 4).sum(1), [0.0] * (len(adv) // 4), "whole groups", tol=1e-6)
        return {"policy_loss": 0.0}

    monkeypatch.setattr(siren, "update", spied)
    siren.training_step(run, 1)
    assert sorted(map(len, taken)) == [8, 12]
    given = sorted(p.prompt for p in run.task.train_problems(5, "0/1") for _ in range(4))
    assert sorted(itertools.chain(*taken)) == given


# ------------------------------------------------------------------------------- 6. evaluation


def test_evaluate_counts_what_the_model_answers():
    """Each token is an answer: the mean is the policy's own probability of it."""
    model, k = small_model(vocab=6), 2000
    task = SimpleNamespace(decode=lambda ids: str(ids[0]), eos_ids=[0], pad_id=0)
    task.find_answer, task.equal, task.normalize = str, None, None
    problems = [
        SimpleNamespace(prompt=[3, 4], answer="4.0"),
        SimpleNamespace(prompt=[5], answer="x"),
    ]
    cfg = siren.Config(max_tokens=1, eval_samples=k, eval_temperature=0.7)
    values = siren.evaluate(model, task, problems, cfg)
    out = siren.sample(model, task, problems, cfg, "0/eval", k, 0.7)
    first = out.tokens[:k, 0].tolist()
    assert values[f"avg@{k}"] == first.count(4) / k / 2 and 0 < first.count(4) < k
    logits = model(torch.tensor([problems[0].prompt])).logits[0, -1] / 0.7
    right = logits.softmax(-1)[4].item() / 2
    assert abs(values[f"avg@{k}"] - right) < 2.3 * math.sqrt(right / k), "half of the problems"
    assert values[f"maj@{k}"] == float(logits.argmax() == 4) / 2
    assert values[f"pass@{k}"] == 0.5
    assert values[f"distinct@{k}"] <= 6 / k and len(values) == 4


EVALUATED = [  # texts, answer, avg@k, maj@k, pass@k, distinct@k
    (["7", "8", "8"], "8", 2 / 3, 1, 1, 2 / 3),
    (["7", "8", "8"], "7", 1 / 3, 0, 1, 2 / 3),
    (["7", "8", "8", "7"], "7", 1 / 2, 1, 1, 2 / 4),  # a tie: the first one given
    (["7", "8", "8", "7"], "8", 1 / 2, 0, 1, 2 / 4),
    (["-", "-", "-", "7"], "7", 1 / 4, 1, 1, 2 / 4),  # no answer is no vote
    (["-", "-"], "7", 0, 0, 0, 1 / 2),
    (["0.5", "8", "8", "1/2", "2/4"], "1/2", 3 / 5, 1, 1, 4 / 5),  # by value
    (["8", "0.5", "1/2", "8", "2/4"], "8", 2 / 5, 0, 1, 4 / 5),  # wrong ones, too
    (["", "", "7"], "7", 1 / 3, 0, 1, 2 / 3),  # an empty box is an answer
    (["9"], "7", 0, 0, 0, 1),
]


@pytest.mark.parametrize("texts, answer, avg, maj, some, distinct", EVALUATED)
def test_evaluate_by_hand(monkeypatch, texts, answer, avg, maj, some, distinct):
    k = len(texts)
    names = sorted(set(texts))
    ids = [[names.index(text)] for text in texts] * 2  # two equal problems
    monkeypatch.setattr(siren, "sample", lambda *_: SimpleNamespace(responses=lambda: ids))
    boxes = [rf"\boxed{{{text}}}" if text != "-" else "no box" for text in names]
    task = SimpleNamespace(decode=lambda ids: boxes[ids[0]])
    task.find_answer = task.equal = task.normalize = None
    problems = [SimpleNamespace(prompt=[3], answer=answer)] * 2
    values = siren.evaluate(None, task, problems, siren.Config(eval_samples=k))
    expected = {"avg": avg, "maj": maj, "pass": some, "distinct": distinct}
    assert values == pytest.approx({f"{name}@{k}": x for name, x in expected.items()})


def test_a_tasks_own_normalize_says_which_votes_are_equal(monkeypatch):
    ids = [[0], [1], [2]]
    monkeypatch.setattr(siren, "sample", lambda *_: SimpleNamespace(responses=lambda: ids))
    task = SimpleNamespace(find_answer=str, normalize=str.lower, decode=lambda i: "aAb"[i[0]])
    task.equal = lambda given, answer: given.lower() == answer
    cfg = siren.Config(eval_samples=3)
    for answer, maj in (("a", 1), ("b", 0)):
        problems = [SimpleNamespace(prompt=[3], answer=answer)]
        assert siren.evaluate(None, task, problems, cfg)["maj@3"] == maj


# ---------------------------------------------------------------------------------- 7. the run


def test_a_run_repeats_and_goes_on_where_it_stopped(tmp_path):
    """More of this is in tests/test_run.py and tests/test_faults.py."""

    def records(folder, resume=False, **options):
        small = {"prompts": 4, "group_size": 4, "eval_prompts": 2, "eval_samples": 2}
        cfg = siren.Config(out=str(tmp_path / folder), **small | options)
        made = siren.train(siren.Run(cfg, resume))
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == made
        return [{k: v for k, v in r.items() if k != "seconds"} for r in made]

    whole = records("a", steps=3)
    assert [record["step"] for record in whole] == [0, 1, 2, 3]
    assert whole == records("b", steps=3) != records("c", steps=3, seed=1)
    records("d", steps=2)
    resumed = records("d", steps=3, resume=True)
    assert resumed[3] == whole[3] and resumed[1] == whole[1]


def test_flags_become_a_config_and_options_of_the_task(monkeypatch):
    asked = []
    monkeypatch.setattr(siren, "Run", lambda *given: asked.append(given))
    monkeypatch.setattr(siren, "train", lambda run: [{}])
    siren.main(["--lr=0.5", "--steps", "7", "--vocab", "96", "--gap-share=0"])
    ((cfg, resume),) = asked
    assert (cfg.lr, cfg.steps, cfg.prompts, resume) == (0.5, 7, 32, False)
    assert cfg.task == "toy_env:vocab=96,gap_share=0"
    assert toy_env.load(cfg, vocab="96", gap_share="0") == toy_env.ToyWorld(
        vocab=96, gap_share=0
    )
    with pytest.raises(SystemExit) as stop:
        siren.main(["--lr=-1"])
    assert stop.value.code == 2
