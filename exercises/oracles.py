"""What the exercises' functions must return, from their definitions: numpy in float64.

Nothing here is taken from siren.py. Gradients are written out by hand.
"""

import math
from fractions import Fraction

import numpy as np


def numbers(x):
    return np.asarray(x.detach() if hasattr(x, "detach") else x, dtype=np.float64)


def advantages(rewards, size):
    groups = numbers(rewards).reshape(-1, size)
    return (groups - groups.sum(1, keepdims=True) / size).reshape(-1)


def policy(logp, old_logp, adv, mask, low=0.2, high=0.2, budget=None):
    """(loss, clip fraction, gradient with respect to logp)."""
    mask = np.asarray(mask)
    a = numbers(adv)[:, None] * np.ones(mask.shape)
    new = np.where(mask, numbers(logp), 0.0)
    old = np.where(mask, numbers(old_logp), 0.0)
    ratio = np.exp(new - old)
    free = ratio * a
    held = np.clip(ratio, 1 - low, 1 + high) * a
    gain = np.where(mask, np.minimum(free, held), 0.0)
    scale = (budget or mask.shape[1]) * max(1, mask.any(1).sum())
    clipped = mask & (held < free)
    grad = np.where(mask & ~clipped, -free / scale, 0.0)
    return -gain.sum() / scale, clipped.sum() / max(1, mask.sum()), grad


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def nucleus(z, p):
    """bool [..., V]: the fewest tokens that reach p."""
    pi = softmax(numbers(z))
    if p >= 1:
        return np.ones(pi.shape, dtype=bool)
    order = np.argsort(-pi, -1, kind="stable")
    ranked = np.take_along_axis(pi, order, -1)
    inside = np.cumsum(ranked, -1) - ranked < p
    mask = np.zeros(pi.shape, dtype=bool)
    np.put_along_axis(mask, order, inside, -1)
    return mask


def margin(z, p):
    """How far p is from the nearest sum of likeliest tokens."""
    ranked = -np.sort(-softmax(numbers(z)), -1)
    return np.abs(np.cumsum(ranked, -1) - p).min() if p < 1 else 1.0


def nucleus_entropy(z, p):
    """(H', its gradient [..., V] with the nucleus held fixed)."""
    z = numbers(z)
    inside = nucleus(z, p)
    q = np.where(inside, softmax(z), 0.0)
    q = q / q.sum(-1, keepdims=True)
    log_q = np.log(np.where(q > 0, q, 1.0))
    h = -(q * log_q).sum(-1)
    return h, -q * (log_q + h[..., None])


def peaks(h, mask, tau):
    """(bool [B, T], bool [B, T]: where rounding can't decide)."""
    h = numbers(h)
    mask = np.asarray(mask)
    peak = np.zeros(mask.shape, dtype=bool)
    sure = np.ones(mask.shape, dtype=bool)
    for i in range(len(h)):
        own = np.sort(h[i][mask[i]])
        if len(own) == 0:
            continue
        place = tau * (len(own) - 1)
        low = math.floor(place)
        high = min(low + 1, len(own) - 1)
        theta = own[low] + (place - low) * (own[high] - own[low])
        peak[i] = mask[i] & ((tau == 0) | ((h[i] >= theta) & (h[i] > 0)))
        near = np.abs(h[i] - theta) < 1e-12 + 1e-9 * abs(theta)
        tied = (own[low] == own[high]) & (own[low] * 64 == np.round(own[low] * 64))
        # the place is a whole number without rounding: theta is one of the H', exactly
        exact = len(own) == 1 or (tau in (0.25, 0.5, 0.75, 1.0) and place == low)
        sure[i] = (tau == 0) | ~near | tied | exact | (h[i] <= 0) | ~mask[i]
    return peak, sure


def aggregate(h, peak, mask):
    """(H_agg, its gradient with respect to H')."""
    mask = np.asarray(mask)
    peak = np.asarray(peak) & mask
    responses = max(1, mask.any(1).sum())
    grad = peak / np.maximum(1, peak.sum(1, keepdims=True)) / responses
    return (np.where(peak, numbers(h), 0.0) * grad).sum(), grad


def siren(logits, tokens, old_logp, adv, mask, anchor, beta, p, tau, budget=None):
    """The parts of the loss, and its gradient with respect to the logits."""
    z = numbers(logits)
    ids = np.asarray(tokens)[..., None]
    shifted = z - z.max(-1, keepdims=True)
    log_pi = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    logp = np.take_along_axis(log_pi, ids, -1)[..., 0]
    value, _, along_logp = policy(logp, old_logp, adv, mask, budget=budget)
    one = np.zeros(z.shape)
    np.put_along_axis(one, ids, 1.0, -1)
    grad = along_logp[..., None] * (one - np.exp(log_pi))
    h, along_z = nucleus_entropy(z, p)
    peak, _ = peaks(h, mask, tau)
    h_agg, along_h = aggregate(h, peak, mask)
    gap = h_agg - float(anchor)
    grad = grad + 2 * beta * gap * along_h[..., None] * along_z
    term = beta * gap**2
    return {
        "h_agg": h_agg,
        "regularizer_loss": term,
        "policy_loss": value,
        "loss": value + term,
        "gradient": grad,
    }


def pass_at_k(n, c, k):
    """1 - (n-c)! (n-k)! / ((n-c-k)! n!), as an exact fraction, then rounded once."""
    if n - c < k:
        return 1.0
    return float(1 - Fraction(math.comb(n - c, k), math.comb(n, k)))


def maj_at_k(votes, answer, k):
    won = []
    for start in range(0, len(votes) - len(votes) % k, k):
        best = None
        for vote in reversed(votes[start : start + k]):  # so that the first one wins a tie
            count = sum(vote == other for other in votes[start : start + k])
            if vote is not None and (best is None or count >= best[0]):
                best = (count, vote)
        won.append(best is not None and best[1] == answer)
    return sum(won) / len(won)


def quantile_advantages(rewards, size, quantile):
    """The rank from K * size in whole millionths, so that rounding plays no part."""
    groups = numbers(rewards).reshape(-1, size)
    millionths = round(quantile * 10**6) * size
    rank = -(-millionths // 10**6)
    return (groups - np.sort(groups, 1)[:, rank - 1 : rank]).reshape(-1)
