"""Known mistakes, and right solutions in other styles than siren.py's.

wrong_solutions() has, for each exercise, what people and language models write by mistake:
description -> functions. All but 14 of them were written before their author looked at the
graders or at wrong.py. The graders refuse all of them, and say so where a student's numbers
are those of one. They accept right_solutions().

Most of the wrong ones are a right solution in which one step is replaced: a template takes its
steps as arguments.
"""

import collections
import functools
import itertools
import math
import random
import re
import types
from decimal import Decimal
from fractions import Fraction

import numpy as np
import torch

import siren
from exercises import more_mistakes, reference, solutions, verifiers

INF = math.inf


# ------------------------------------------------------------------------------- 1. advantages
def by_group(rule):
    """group_advantages from a rule for rewards [groups, size]."""
    return lambda rewards, size: rule(rewards.reshape(-1, size)).reshape(-1)


def centred(x):
    return x - x.mean(1, keepdim=True)


def write_in_place(rewards, size):
    rewards.view(-1, size).sub_(rewards.view(-1, size).mean(1, keepdim=True))
    return rewards


def with_memory():
    """A running mean over all calls as the baseline."""
    seen = []

    def advantages(rewards, size):
        seen.append(rewards.mean())
        return rewards - sum(seen) / len(seen)

    return advantages


def wrong_advantages():
    return {
        "rewards clamped to 0..1": by_group(lambda x: centred(x.clamp(0, 1))),
        "rewards clamped to -1000..1000": by_group(lambda x: centred(x.clamp(-1000, 1000))),
        "rewards made binary": by_group(lambda x: centred((x > 0.5).to(x.dtype))),
        "negative rewards are 0": by_group(lambda x: centred(x.relu())),
        "advantages clamped": by_group(lambda x: centred(x).clamp(-1, 1)),
        "rounded": by_group(lambda x: (centred(x) * 100).round() / 100),
        "squashed by tanh": by_group(lambda x: centred(x).tanh()),
        "the median as the baseline": by_group(lambda x: x - x.median(1, keepdim=True).values),
        "the largest reward as the baseline": by_group(
            lambda x: x - x.max(1, keepdim=True).values
        ),
        "the middle between the smallest and the largest reward as the baseline": by_group(
            lambda x: x - (x.max(1, keepdim=True).values + x.min(1, keepdim=True).values) / 2
        ),
        "divided by the standard deviation where it is above 1": by_group(
            lambda x: centred(x) / x.std(1, keepdim=True).clamp(min=1)
        ),
        "divided by the largest magnitude of the group": by_group(
            lambda x: centred(x) / x.abs().amax(1, keepdim=True).clamp(min=1)
        ),
        "divided by the standard deviation": by_group(
            lambda x: centred(x) / (x.std(1, keepdim=True) + 1e-8)
        ),
        "the mean of the other responses as the baseline": by_group(
            lambda x: centred(x) * x.shape[1] / (x.shape[1] - 1)
        ),
        "the absolute value": by_group(lambda x: centred(x).abs()),
        "the mean of the whole batch as the baseline": lambda r, g: r - r.mean(),
        "groups of every n-th row": lambda r, g: (
            r.reshape(g, -1) - r.reshape(g, -1).mean(0, keepdim=True)
        ).reshape(-1),
        "the mean over groups in place of the mean over a group": lambda r, g: (
            r.reshape(-1, g) - r.reshape(-1, g).mean(0, keepdim=True)
        ).reshape(-1),
        "groups of four": lambda r, g: centred(r.reshape(-1, 4)).reshape(-1),
        "half of the rewards": lambda r, g: centred(r.reshape(-1, g)).reshape(-1)[
            : len(r) // 2
        ],
        "the mean of the first group for all": lambda r, g: r - r[:g].mean(),
        "returned as [groups, size]": lambda r, g: centred(r.reshape(-1, g)),
        "single precision": lambda r, g: (
            centred(r.float().reshape(-1, g)).reshape(-1).double()
        ),
        "rewards made whole numbers": by_group(lambda x: centred(x.long().double())),
        "writes to the rewards": write_in_place,
        "a baseline that remembers earlier calls": with_memory(),
        "returned in sorted order": by_group(lambda x: centred(x).sort(1).values),
        "0 where the mean is 1 or more": by_group(
            lambda x: centred(x) * (x.mean(1, keepdim=True) < 1)
        ),
        "a mean without the extremes as the baseline": by_group(
            lambda x: (
                x
                - (x.sum(1, keepdim=True) - x.amax(1, keepdim=True) - x.amin(1, keepdim=True))
                / max(1, x.shape[1] - 2)
            )
        ),
    }


def right_advantages():
    def loop(rewards, size):
        out = torch.empty_like(rewards)
        for i in range(0, len(rewards), size):
            out[i : i + size] = rewards[i : i + size] - rewards[i : i + size].mean()
        return out

    def own_copy(rewards, size):
        adv = rewards.clone().view(-1, size)
        adv -= adv.mean(1, keepdim=True)
        return adv.flatten()

    return {
        "loop": loop,
        "in place on a copy": own_copy,
        "chunks": lambda r, g: torch.cat([x - x.sum() / g for x in r.split(g)]),
        "repeat_interleave": lambda r, g: r - r.view(-1, g).mean(dim=1).repeat_interleave(g),
        "numpy": lambda r, g: torch.from_numpy(
            r.numpy().reshape(-1, g) - r.numpy().reshape(-1, g).mean(1, keepdims=True)
        ).view(-1),
        "float64 inside": lambda r, g: centred(r.double().view(-1, g)).view(-1).to(r.dtype),
    }


# ----------------------------------------------------------------------------- 2. clipped loss
def select(x, mask):
    return torch.where(mask, x, 0.0)


def ppo(ratio, adv, low, high):
    return torch.min(ratio * adv, ratio.clamp(1 - low, 1 + high) * adv)


def policy(
    read=select,
    ratio_of=lambda new, old: (new - old).exp(),
    adv_of=lambda adv, mask: adv[:, None],
    gain_of=ppo,
    keep=select,
    length=lambda mask, longest: longest or mask.shape[1],
    rows=lambda mask, adv: mask.any(1).sum().clamp(min=1),
    fraction=None,
    sign=-1,
):
    """policy_loss of these steps."""

    def loss(logp, old_logp, adv, mask, *, clip_low=0.2, clip_high=0.2, max_tokens=None):
        a = adv_of(adv, mask)
        ratio = ratio_of(read(logp, mask), read(old_logp, mask))
        gain = keep(gain_of(ratio, a, clip_low, clip_high), mask)
        value = sign * (gain.sum(1) / length(mask, max_tokens)).sum() / rows(mask, adv)
        held = ratio.clamp(1 - clip_low, 1 + clip_high)
        share = ((held * a < ratio * a) & mask).sum() / mask.sum().clamp(min=1)
        if fraction:
            share = fraction(ratio, a, held, mask)
        return value, {"clip_fraction": share}

    return loss


def dual_clip(ratio, a, low, high):
    gain = ppo(ratio, a, low, high)
    return torch.where(a < 0, torch.max(gain, 3 * a), gain)


def fill_old_in_place(logp, old_logp, adv, mask, **options):
    old_logp.masked_fill_(~mask, 0.0)
    return policy()(logp, old_logp, adv, mask, **options)


def scale_adv_in_place(logp, old_logp, adv, mask, **options):
    adv.sub_(0.0)
    return policy()(logp, old_logp, adv, mask, **options)


def without_nan(x, mask):
    return torch.nan_to_num(x, 0.0, 0.0, 0.0)


def with_nan_test(x, mask):
    return torch.where(x.isfinite(), x, 0.0)


def one_ratio_a_sequence(new, old):
    return (new - old).mean(1, keepdim=True).exp().expand(new.shape)


def surrogate(ratio, a, low, high):
    """The gradient passes a clipped token."""
    gain = ppo(ratio, a, low, high)
    return gain.detach() + ratio * a - (ratio * a).detach()


def wrong_policies():
    def clamped(most):
        return policy(ratio_of=lambda new, old: (new - old).clamp(-most, most).exp())

    return {
        "ratio at most 10": policy(
            ratio_of=lambda new, old: (new - old).exp().clamp(max=10.0)
        ),
        "ratio at most 100": policy(
            ratio_of=lambda new, old: (new - old).exp().clamp(max=100.0)
        ),
        "ratio at least .01": policy(
            ratio_of=lambda new, old: (new - old).exp().clamp(min=0.01)
        ),
        "log-ratio within 1": clamped(1.0),
        "log-ratio within 5": clamped(5.0),
        "log-ratio within 10": clamped(10.0),
        "logp at least -20": policy(
            ratio_of=lambda new, old: (new.clamp(min=-20) - old.clamp(min=-20)).exp()
        ),
        "logp at least -100": policy(
            ratio_of=lambda new, old: (new.clamp(min=-100) - old.clamp(min=-100)).exp()
        ),
        "quotient of probabilities": policy(ratio_of=lambda new, old: new.exp() / old.exp()),
        "quotient with an epsilon": policy(
            ratio_of=lambda new, old: new.exp() / (old.exp() + 1e-8)
        ),
        "linear ratio": policy(ratio_of=lambda new, old: 1 + new - old),
        "inverse ratio": policy(ratio_of=lambda new, old: (old - new).exp()),
        "sequence ratio": policy(ratio_of=one_ratio_a_sequence),
        "ratio detached": policy(ratio_of=lambda new, old: (new - old).exp().detach() * 1),
        "dual clip": policy(gain_of=dual_clip),
        "not clipped": policy(gain_of=lambda r, a, low, high: r * a),
        "always clipped": policy(
            gain_of=lambda r, a, low, high: r.clamp(1 - low, 1 + high) * a
        ),
        "larger term": policy(
            gain_of=lambda r, a, low, high: torch.max(r * a, r.clamp(1 - low, 1 + high) * a)
        ),
        "clips swapped": policy(gain_of=lambda r, a, low, high: ppo(r, a, high, low)),
        "clip_high unused": policy(gain_of=lambda r, a, low, high: ppo(r, a, low, low)),
        "a clip of 0 is the default": policy(
            gain_of=lambda r, a, low, high: ppo(r, a, low or 0.2, high or 0.2)
        ),
        "clips fixed": policy(gain_of=lambda r, a, low, high: ppo(r, a, 0.2, 0.2)),
        "clip on the log": policy(
            gain_of=lambda r, a, low, high: torch.min(
                r * a, r.log().clamp(-low, high).exp() * a
            )
        ),
        "gradient of clipped tokens": policy(gain_of=surrogate),
        "kl added": policy(
            gain_of=lambda r, a, low, high: ppo(r, a, low, high) - 0.01 * (r - 1 - r.log())
        ),
        "log of the ratio": policy(
            gain_of=lambda r, a, low, high: torch.min(
                r.log() * a, r.clamp(1 - low, 1 + high).log() * a
            )
        ),
        "adv divided by its std": policy(adv_of=lambda a, m: (a / (a.std() + 1e-8))[:, None]),
        "adv centred": policy(adv_of=lambda a, m: (a - a.mean())[:, None]),
        "adv clamped": policy(adv_of=lambda a, m: a.clamp(-5, 5)[:, None]),
        "adv along the wrong side": policy(
            adv_of=lambda a, m: (
                a[None, :].expand(m.shape) if m.shape[0] == m.shape[1] else a[:, None]
            )
        ),
        "padding multiplied by 0": policy(read=lambda x, m: x * m),
        "padding multiplied by 0 at the end": policy(
            read=lambda x, m: x, keep=lambda x, m: x * m
        ),
        "padding selected too late": policy(read=lambda x, m: x),
        "only NaN replaced": policy(read=without_nan, keep=lambda x, m: x),
        "only what is not finite replaced": policy(read=with_nan_test, keep=lambda x, m: x),
        "padding has a ratio of 1 and counts": policy(keep=lambda x, m: x),
        "own length": policy(length=lambda m, longest: m.sum(1).clamp(min=1)),
        "longest of the batch": policy(
            length=lambda m, longest: longest or m.sum(1).max().clamp(min=1)
        ),
        "max_tokens unused": policy(length=lambda m, longest: m.shape[1]),
        "at most T": policy(length=lambda m, longest: min(longest or 10**9, m.shape[1])),
        "all rows": policy(rows=lambda m, a: len(m)),
        "rows with an advantage": policy(
            rows=lambda m, a: (m.any(1) & (a != 0)).sum().clamp(min=1)
        ),
        "not divided by rows": policy(rows=lambda m, a: 1),
        "rows plus an epsilon": policy(rows=lambda m, a: m.any(1).sum() + 1e-6),
        "no row is 0 / 0": policy(rows=lambda m, a: m.any(1).sum()),
        "sign": policy(sign=1),
        "twice": policy(sign=-2),
        "fraction: whatever the sign": policy(
            fraction=lambda r, a, held, m: ((r != held) & m).sum() / m.sum().clamp(min=1)
        ),
        "fraction: of all positions": policy(
            fraction=lambda r, a, held, m: ((held * a < r * a) & m).double().mean()
        ),
        "fraction: not strictly": policy(
            fraction=lambda r, a, held, m: (
                ((held * a <= r * a) & m).sum() / m.sum().clamp(min=1)
            )
        ),
        "fraction: a count": policy(
            fraction=lambda r, a, held, m: ((held * a < r * a) & m).sum()
        ),
        "fraction: mean over rows": policy(
            fraction=lambda r, a, held, m: (
                ((held * a < r * a) & m).sum(1) / m.sum(1).clamp(min=1)
            ).mean()
        ),
        "fraction: 0 / 0": policy(
            fraction=lambda r, a, held, m: ((held * a < r * a) & m).sum() / m.sum()
        ),
        "no fraction": lambda *x, **y: (policy()(*x, **y)[0], {}),
        "writes to old_logp": fill_old_in_place,
        "writes the same numbers to adv": scale_adv_in_place,
        "single precision": lambda logp, old, adv, mask, **options: policy()(
            logp.float(), old.float(), adv.float(), mask, **options
        ),
    }


def right_policies():
    def loop(logp, old_logp, adv, mask, *, clip_low=0.2, clip_high=0.2, max_tokens=None):
        total = logp.new_zeros(())
        clipped = count = 0
        for i in range(len(adv)):
            for s in range(mask.shape[1]):
                if mask[i, s]:
                    r = (logp[i, s] - old_logp[i, s]).exp()
                    free = r * adv[i]
                    held = r.clip(1 - clip_low, 1 + clip_high) * adv[i]
                    total = total + torch.minimum(free, held)
                    clipped += int(held < free)
                    count += 1
        responses = max(1, int(mask.any(1).sum()))
        loss = -total / (mask.shape[1] if max_tokens is None else max_tokens) / responses
        if not loss.requires_grad:
            loss = loss + 0 * logp[mask].sum()
        return loss, {"clip_fraction": torch.tensor(clipped / max(1, count))}

    def two_cases(logp, old_logp, adv, mask, *, clip_low=0.2, clip_high=0.2, max_tokens=None):
        a = adv.unsqueeze(1)
        log_ratio = (logp - old_logp).masked_fill(~mask, 0)
        r = torch.exp(torch.where(mask, logp, 0.0) - torch.where(mask, old_logp, 0.0))
        held = torch.where(a > 0, r.clamp(max=1 + clip_high), r.clamp(min=1 - clip_low))
        gain = held * a * mask
        n = max(mask.any(dim=1).sum().item(), 1)
        hit = ((a > 0) & (r > 1 + clip_high)) | ((a < 0) & (r < 1 - clip_low))
        share = (hit & mask).sum().double() / max(mask.sum().item(), 1)
        assert log_ratio.shape == r.shape
        return -gain.sum() / (max_tokens or logp.size(1)) / n, {"clip_fraction": share}

    def flat(logp, old_logp, adv, mask, *, clip_low=0.2, clip_high=0.2, max_tokens=None):
        a = adv[:, None].expand_as(mask)[mask]
        r = (logp[mask] - old_logp[mask]).exp()
        losses = torch.maximum(-a * r, -a * r.clamp(1 - clip_low, 1 + clip_high))
        share = (-a * r.clamp(1 - clip_low, 1 + clip_high) > -a * r).float()
        loss = losses.sum() / (max_tokens or mask.shape[1])
        loss = loss / mask.any(-1).sum().clamp(min=1)
        return loss, {"clip_fraction": share.mean() if len(share) else torch.zeros(())}

    def detached(logp, old_logp, adv, mask, **options):
        logp = logp.where(mask, torch.zeros_like(logp))
        return policy()(
            logp, old_logp.detach().where(mask, logp.detach()), adv, mask, **options
        )

    return {"template": policy(), "loop": loop, "two cases": two_cases, "flat": flat} | {
        "detached": detached
    }


# --------------------------------------------------------------------------------- 3. nucleus
def nucleus_by(rule, exact=True):
    """nucleus_mask from a rule for (sorted probabilities, p) -> inside, in that order."""

    def mask_of(logits, top_p):
        if top_p == 1 and exact:
            return torch.ones_like(logits, dtype=torch.bool)
        pi, order = logits.softmax(-1).sort(-1, descending=True)
        return torch.zeros_like(pi, dtype=torch.bool).scatter(-1, order, rule(pi, top_p))

    return mask_of


def before(pi):
    return pi.cumsum(-1) - pi


def first(pi, count):
    return torch.arange(pi.shape[-1]).expand(pi.shape) < count


def at_most(count):
    return nucleus_by(lambda pi, p: (before(pi) < p) & first(pi, count))


def write_temperature(logits, top_p):
    logits.div_(1.0)
    return nucleus_by(lambda pi, p: before(pi) < p)(logits, top_p)


def right_nucleus_mask(logits, top_p):
    return nucleus_by(lambda pi, p: before(pi) < p)(logits, top_p)


def wrong_nuclei():
    def whole_batch(logits, top_p):
        return right_nucleus_mask(logits.flatten(), top_p).view(logits.shape)

    def first_row(logits, top_p):
        return right_nucleus_mask(logits.reshape(-1, logits.shape[-1])[0], top_p).expand(
            logits.shape
        )

    def unsorted(logits, top_p):
        pi = logits.softmax(-1)
        return pi.cumsum(-1) - pi < top_p

    def in_sorted_order(logits, top_p):
        return before(logits.softmax(-1).sort(-1, descending=True)[0]) < top_p

    def gathered_back(logits, top_p):
        pi, order = logits.softmax(-1).sort(-1, descending=True)
        return (before(pi) < top_p).gather(-1, order)

    def by_threshold(logits, top_p):
        pi = logits.softmax(-1)
        ranked = pi.sort(-1, descending=True)[0]
        least = ranked.masked_fill(before(ranked) >= top_p, INF).amin(-1, keepdim=True)
        return pi >= least

    def two_dimensions(logits, top_p):
        pi, order = logits.softmax(-1).sort(-1, descending=True)
        out = torch.zeros_like(pi, dtype=torch.bool)
        for i in range(len(logits)):
            out[i].scatter_(-1, order[i], before(pi[i]) < top_p)
        return out

    def of_the_logits(logits, top_p):
        pi, order = logits.sort(-1, descending=True)
        return torch.zeros_like(pi, dtype=torch.bool).scatter(-1, order, before(pi) < top_p)

    return {
        "the token that crosses p is left out": nucleus_by(lambda pi, p: pi.cumsum(-1) <= p),
        "the token that crosses p is left out, unless it is the first": nucleus_by(
            lambda pi, p: (pi.cumsum(-1) <= p) | first(pi, 1)
        ),
        "one token too many": nucleus_by(lambda pi, p: before(pi) - pi < p),
        "at least two": nucleus_by(lambda pi, p: (before(pi) < p) | first(pi, 2)),
        "at most 50": at_most(50),
        "at most 64": at_most(64),
        "at most 100": at_most(100),
        "at most 1000": at_most(1000),
        "p at most .95": nucleus_by(lambda pi, p: before(pi) < min(p, 0.95)),
        "p at least .5": nucleus_by(lambda pi, p: before(pi) < max(p, 0.5)),
        "p is always .8": nucleus_by(lambda pi, p: before(pi) < 0.8),
        "tolerance 1e-3": nucleus_by(lambda pi, p: before(pi) < p - 1e-3),
        "tolerance 1e-5": nucleus_by(lambda pi, p: before(pi) < p - 1e-5),
        "tolerance upwards": nucleus_by(lambda pi, p: before(pi) < p + 1e-4),
        "min-p": nucleus_by(lambda pi, p: pi >= (1 - p) * pi[..., :1]),
        "a small probability is out": nucleus_by(lambda pi, p: (before(pi) < p) & (pi > 1e-4)),
        "1 - p in place of p": nucleus_by(lambda pi, p: before(pi) < 1 - p),
        "the tokens outside": nucleus_by(lambda pi, p: before(pi) >= p),
        "sums are compared at p = 1, too": nucleus_by(
            lambda pi, p: before(pi) < p, exact=False
        ),
        "half precision": nucleus_by(lambda pi, p: before(pi.bfloat16()) < p),
        "logits divided by a temperature": lambda z, p: right_nucleus_mask(z / 0.6, p),
        "logits taken as probabilities": of_the_logits,
        "all tokens as likely as the last one that is needed": by_threshold,
        "tokens not sorted": unsorted,
        "the mask left in sorted order": in_sorted_order,
        "gather in place of scatter": gathered_back,
        "least likely first": lambda z, p: right_nucleus_mask(-z, p),
        "one nucleus for all positions together": whole_batch,
        "the nucleus of the first position for all": first_row,
        "only two dimensions": two_dimensions,
        "softmax over rows": lambda z, p: nucleus_by(lambda pi, p: before(pi) < p)(
            z.softmax(0).log(), p
        ),
        "probabilities in place of a mask": lambda z, p: (
            z.softmax(-1) * right_nucleus_mask(z, p)
        ),
        "whole numbers": lambda z, p: right_nucleus_mask(z, p).long(),
        "writes to the logits": write_temperature,
        "exp of the logits, which overflows": lambda z, p: right_nucleus_mask(
            (z.exp() / z.exp().sum(-1, keepdim=True)).log(), p
        ),
    }


def right_nuclei():
    def loop(logits, top_p):
        flat = logits.detach().reshape(-1, logits.shape[-1]).softmax(-1).tolist()
        out = torch.zeros(len(flat), logits.shape[-1], dtype=torch.bool)
        for i, row in enumerate(flat):
            mass = 0.0
            for j in sorted(range(len(row)), key=lambda j, row=row: -row[j]):
                out[i, j] = True
                mass += row[j]
                if top_p < 1 and mass >= top_p:
                    break
        return out.view(logits.shape)

    def inverse(logits, top_p):
        if top_p >= 1:
            return torch.ones(logits.shape, dtype=torch.bool)
        pi = torch.softmax(logits, dim=-1)
        order = torch.argsort(pi, dim=-1, descending=True)
        ranked = torch.gather(pi, -1, order)
        inside = torch.cat(
            [torch.zeros_like(ranked[..., :1]), ranked.cumsum(-1)[..., :-1]], -1
        )
        return (inside < top_p).gather(-1, order.argsort(-1))

    def count(logits, top_p):
        pi, order = logits.double().softmax(-1).sort(dim=-1, descending=True)
        k = (pi.cumsum(-1) < top_p).sum(-1, keepdim=True) + 1
        if top_p == 1:
            k = torch.full_like(k, logits.shape[-1])
        rank = order.argsort(-1)
        return rank < k

    return {
        "template": nucleus_by(lambda pi, p: before(pi) < p),
        "loop": loop,
        "inverse permutation": inverse,
        "ranks": count,
        "reference": reference.nucleus_mask,
    }


# ------------------------------------------------------------------------- 4. nucleus entropy
def entropy_by(mask_of=None, log_q=None, total=None):
    """nucleus_entropy from the nucleus, log q and the sum."""

    def h(logits, top_p):
        inside = (mask_of or right_nucleus_mask)(logits, top_p)
        inside = inside.bool()
        log = (log_q or renormalised)(logits, inside)
        return (total or plogp)(log, inside)

    return h


def renormalised(logits, inside):
    return logits.masked_fill(~inside, -INF).log_softmax(-1)


def plogp(log, inside):
    return -(log.exp() * log.masked_fill(~inside, 0.0)).sum(-1)


def logits_in_place(logits, top_p):
    inside = right_nucleus_mask(logits, top_p)
    logits.data[~inside] = -1e9
    return plogp(logits.log_softmax(-1), inside)


def wrong_entropies():
    def fixed_mass(logits, inside):
        """The mass of the nucleus has no gradient."""
        log_pi = logits.log_softmax(-1)
        mass = (log_pi.exp() * inside).sum(-1, keepdim=True).detach()
        return torch.where(inside, log_pi - mass.log(), -1e3)

    def late(logits, inside):
        return torch.where(inside, logits.log_softmax(-1), -INF)

    def safe(z, p):
        return entropy_by()(z, p)

    def with_rest(logits, inside):
        """The tokens outside are one more option."""
        pi = logits.softmax(-1)
        rest = (pi * ~inside).sum(-1, keepdim=True)
        return torch.where(
            inside, pi, rest / (~inside).sum(-1, keepdim=True).clamp(min=1)
        ).log()

    caps = {f"at most {k}": entropy_by(at_most(k)) for k in (20, 64, 1000)}
    return caps | {
        "the token that crosses p is left out": entropy_by(
            nucleus_by(lambda pi, p: (pi.cumsum(-1) <= p) | first(pi, 1))
        ),
        "whole vocabulary": entropy_by(lambda z, p: torch.ones_like(z, dtype=torch.bool)),
        "p at most .95": lambda z, p: safe(z, min(p, 0.95)),
        "p is .8": lambda z, p: safe(z, 0.8),
        "not renormalised": entropy_by(log_q=lambda z, m: z.log_softmax(-1)),
        "not renormalised, selected": entropy_by(
            log_q=late, total=lambda log, m: -torch.where(m, log.exp() * log, 0.0).sum(-1)
        ),
        "mass detached": entropy_by(log_q=fixed_mass),
        "pi log q in place of q log q": lambda z, p: (
            -(
                z.softmax(-1)
                * renormalised(z, right_nucleus_mask(z, p)).masked_fill(
                    ~right_nucleus_mask(z, p), 0.0
                )
            ).sum(-1)
        ),
        "logits of 0 outside": entropy_by(log_q=lambda z, m: (z * m).log_softmax(-1)),
        "log2 in place of the natural logarithm": lambda z, p: safe(z, p) / math.log(2),
        "over the logarithm of the size": lambda z, p: (
            safe(z, p) / right_nucleus_mask(z, p).sum(-1).clamp(min=2).log()
        ),
        "perplexity": lambda z, p: safe(z, p).exp(),
        "the sign": lambda z, p: -safe(z, p),
        "sum over the positions": lambda z, p: safe(z, p).sum(),
        "a dimension too many": lambda z, p: safe(z, p)[..., None],
        "mean over the vocabulary": entropy_by(
            total=lambda log, m: -(log.exp() * log.masked_fill(~m, 0.0)).mean(-1)
        ),
        "0 times infinity": entropy_by(total=lambda log, m: -(log.exp() * log).sum(-1)),
        "NaN replaced afterwards": entropy_by(
            total=lambda log, m: -(log.exp() * log).nan_to_num(0.0).sum(-1)
        ),
        "selected afterwards": entropy_by(
            total=lambda log, m: -torch.where(m, log.exp() * log, 0.0).sum(-1)
        ),
        "an epsilon in the log": entropy_by(
            total=lambda log, m: -(log.exp() * (log.exp() + 1e-9).log()).sum(-1)
        ),
        "a larger epsilon": entropy_by(
            total=lambda log, m: -(log.exp() * (log.exp() + 1e-6).log()).sum(-1)
        ),
        "10 taken off outside, in place of -inf": entropy_by(
            log_q=lambda z, m: (z + (~m) * -10.0).log_softmax(-1)
        ),
        "H' detached": lambda z, p: safe(z, p).detach(),
        "q detached": entropy_by(
            total=lambda log, m: -(log.exp().detach() * log.masked_fill(~m, 0.0)).sum(-1)
        ),
        "the tokens outside count as well": entropy_by(log_q=with_rest),
        "at least 1e-6": lambda z, p: safe(z, p).clamp(min=1e-6),
        "small ones are 0": lambda z, p: torch.where(safe(z, p) < 1e-2, 0.0, safe(z, p)),
        "at most ln 50": lambda z, p: safe(z, p).clamp(max=math.log(50)),
        "at most 5": lambda z, p: safe(z, p).clamp(max=5.0),
        "single precision": lambda z, p: safe(z.float(), p).double(),
        "half precision": lambda z, p: safe(z.bfloat16(), p).double(),
        "exp of the logits, which overflows": lambda z, p: safe(
            (z.exp() / z.exp().sum(-1, keepdim=True)).log(), p
        ),
        "logits clamped": lambda z, p: safe(z.clamp(-20, 20), p),
        "writes to the logits": logits_in_place,
        "logits divided by a temperature": lambda z, p: safe(z / 0.7, p),
        "collision entropy": entropy_by(total=lambda log, m: -(2 * log).exp().sum(-1).log()),
        "xlogy of q, which may be rounded to 0": lambda z, p: (
            -torch.special.xlogy(
                renormalised(z, right_nucleus_mask(z, p)).exp(),
                renormalised(z, right_nucleus_mask(z, p))
                .masked_fill(~right_nucleus_mask(z, p), 0.0)
                .exp(),
            ).sum(-1)
        ),
    }


def right_entropies():
    def by_probabilities(logits, top_p):
        inside = right_nucleus_mask(logits.detach(), top_p)
        pi = logits.softmax(-1)
        kept = torch.where(inside, pi, torch.zeros_like(pi))
        q = kept / kept.sum(-1, keepdim=True)
        safe = torch.where(inside & (q > 0), q, torch.ones_like(q))
        return -(q * safe.log()).sum(-1)

    def logsumexp(logits, top_p):
        inside = reference.nucleus_mask(logits, top_p)
        z = logits.masked_fill(~inside, -INF)
        total = z.logsumexp(-1)
        q = (z - total[..., None]).exp()
        return total - (q * torch.where(inside, logits, 0.0)).sum(-1)

    def library(logits, top_p):
        inside = right_nucleus_mask(logits, top_p)
        z = torch.where(inside, logits, torch.finfo(logits.dtype).min)
        log = z.log_softmax(-1)
        return -torch.einsum("...v,...v->...", log.exp(), torch.where(inside, log, 0.0))

    return {
        "template": entropy_by(),
        "log q detached": entropy_by(  # the gradient of log q adds up to 0
            total=lambda log, m: -(log.exp() * log.masked_fill(~m, 0.0).detach()).sum(-1)
        ),
        "probabilities": by_probabilities,
        "logsumexp": logsumexp,
        "einsum": library,
    }


# ------------------------------------------------------------------------------- 5. peak mask
def peaks_by(
    level=lambda x, q: torch.quantile(x, q),
    test=lambda h, theta: (h >= theta) & (h > 0),
    own=lambda h, m: h[m],
    off=lambda h, m: m.clone(),
    least=0,
):
    """peak_mask, row by row."""

    def mask_of(entropy, mask, quantile):
        entropy = entropy.detach()
        if quantile == 0 and off:
            return off(entropy, mask)
        out = torch.zeros_like(mask)
        for i in range(len(mask)):
            x = own(entropy[i], mask[i])
            if len(x) > least:
                out[i] = test(entropy[i], level(x, quantile)) & mask[i]
        return out

    return mask_of


def batch_quantile(entropy, mask, quantile):
    if not mask.any() or quantile == 0:
        return mask
    return (entropy >= entropy[mask].quantile(quantile)) & (entropy > 0) & mask


def padded_to_zero_in_place(entropy, mask, quantile):
    entropy.data.masked_fill_(~mask, math.nan)
    return peaks_by()(entropy, mask, quantile)


def wrong_peaks():
    def highest(share):
        def level(x, q):
            k = max(1, share(len(x) * (1 - q)))
            return x.topk(min(k, len(x))).values[-1]

        return peaks_by(level)

    def one_a_row(entropy, mask, quantile):
        peak = peaks_by()(entropy, mask, quantile)
        best = entropy.masked_fill(~mask, -INF).argmax(1, keepdim=True)
        return peak | (mask & torch.zeros_like(mask).scatter(1, best, True))

    def tied_apart(entropy, mask, quantile):
        """At most as many as a fifth of the tokens."""
        peak = peaks_by()(entropy, mask, quantile)
        for row, m in zip(peak, mask):
            most = math.ceil((1 - quantile) * int(m.sum()))
            row[row.nonzero()[max(1, most) :, 0]] = False
        return peak

    kinds = {
        f"the quantile is the {kind} of its two neighbours": peaks_by(
            lambda x, q, kind=kind: torch.quantile(x, q, interpolation=kind)
        )
        for kind in ("lower", "nearest")
    }
    return kinds | {
        "the quantile of the whole batch": batch_quantile,
        "strictly above": peaks_by(test=lambda h, theta: (h > theta) & (h > 0)),
        "H' = 0 may be a peak": peaks_by(test=lambda h, theta: h >= theta),
        "H' > 1e-6 in place of H' > 0": peaks_by(
            test=lambda h, theta: (h >= theta) & (h > 1e-6)
        ),
        "H' > .01 in place of H' > 0": peaks_by(
            test=lambda h, theta: (h >= theta) & (h > 0.01)
        ),
        "a tolerance of .001 below the quantile": peaks_by(
            test=lambda h, theta: (h >= theta - 1e-3) & (h > 0)
        ),
        "what lies below the quantile": peaks_by(test=lambda h, theta: (h <= theta) & (h > 0)),
        "padding in the quantile": peaks_by(own=lambda h, m: h),
        "padding as 0 in the quantile": peaks_by(own=lambda h, m: h * m),
        "only what is above 0": peaks_by(own=lambda h, m: h[m & (h > 0)]),
        "tokens above 0, also in padding": peaks_by(own=lambda h, m: h[h > 0]),
        "one-token rows have none": peaks_by(least=1),
        "mean in place of a quantile": peaks_by(lambda x, q: x.mean()),
        "share of the largest": peaks_by(lambda x, q: q * x.max()),
        "share of the range": peaks_by(lambda x, q: x.min() + q * (x.max() - x.min())),
        "1 - quantile in place of quantile": peaks_by(lambda x, q: x.quantile(1 - q)),
        "always .8": peaks_by(lambda x, q: x.quantile(0.8)),
        "at most .9": peaks_by(lambda x, q: x.quantile(min(q, 0.9))),
        "normal quantile": peaks_by(lambda x, q: x.mean() + (q - 0.5) * x.std(correction=0)),
        "as many as a share, rounded up": highest(math.ceil),
        "as many as a share, rounded down": highest(math.floor),
        "as many as a share, rounded": highest(round),
        "ties cut off": tied_apart,
        "a peak in every row": one_a_row,
        "quantile 0 needs H' > 0": peaks_by(off=None),
        "quantile 0 takes padding": peaks_by(off=lambda h, m: torch.ones_like(m)),
        "quantile 0 takes nothing": peaks_by(off=lambda h, m: torch.zeros_like(m)),
        "no AND with the mask": lambda h, m, q: (
            (h >= siren_theta(h, m, q)) & (h > 0) if q > 0 else m
        ),
        "float in place of bool": lambda h, m, q: peaks_by()(h, m, q).double(),
        "entropies at the peaks": lambda h, m, q: torch.where(peaks_by()(h, m, q), h, 0.0),
        "writes to the entropy": padded_to_zero_in_place,
        "all-equal rows have none": peaks_by(
            test=lambda h, theta: (h >= theta) & (h > 0) & (h.max() > h.min())
        ),
        "half precision": lambda h, m, q: peaks_by()(h.bfloat16().double(), m, q),
        "at most 1 nat counts": lambda h, m, q: peaks_by()(h.clamp(max=1.0), m, q),
    }


def siren_theta(h, m, q):
    return h.masked_fill(~m, math.nan).nanquantile(q, dim=1, keepdim=True)


def right_peaks():
    def by_hand(entropy, mask, quantile):
        if quantile == 0:
            return mask
        out = torch.zeros(mask.shape, dtype=torch.bool)
        for i, row in enumerate(entropy.tolist()):
            own = sorted(x for x, m in zip(row, mask[i].tolist()) if m)
            if own:
                place = quantile * (len(own) - 1)
                low = min(math.floor(place), len(own) - 1)
                high = min(low + 1, len(own) - 1)
                theta = own[low] + (place - low) * (own[high] - own[low])
                out[i] = torch.tensor([x >= theta and x > 0 for x in row])
        return out & mask

    def by_numpy(entropy, mask, quantile):
        if quantile == 0:
            return mask.clone()
        h = entropy.detach().numpy()
        peak = np.zeros(mask.shape, dtype=bool)
        for i in range(len(h)):
            if mask[i].any():
                theta = np.quantile(h[i][mask[i].numpy()], quantile)
                peak[i] = (h[i] >= theta) & (h[i] > 0)
        return torch.from_numpy(peak) & mask

    return {
        "rows": peaks_by(),
        "nanquantile": lambda h, m, q: (
            m if q == 0 else (h >= siren_theta(h.detach(), m, q)) & (h > 0) & m
        ),
        "by hand": by_hand,
        "numpy": by_numpy,
        # no own value lies between the two neighbours of the quantile
        "higher": peaks_by(lambda x, q: torch.quantile(x, q, interpolation="higher")),
        "midpoint": peaks_by(lambda x, q: torch.quantile(x, q, interpolation="midpoint")),
        "reference": reference.peak_mask,
    }


# ----------------------------------------------------------------------------- 6. aggregation
def aggregate(
    read=lambda h, peak: torch.where(peak, h, 0.0),
    inside=lambda peak, mask: peak & mask,
    count=lambda peak, mask: peak.sum(1).clamp(min=1),
    rows=lambda peak, mask: mask.any(1).sum().clamp(min=1),
    last=lambda h: h.sum(),
):
    """aggregate_entropy of these steps."""

    def h_agg(entropy, peak, mask):
        peak = inside(peak, mask)
        return last(read(entropy, peak).sum(1) / count(peak, mask)) / rows(peak, mask)

    return h_agg


def zero_in_place(entropy, peak, mask):
    peak &= mask
    return aggregate()(entropy, peak, mask)


def wrong_aggregations():
    def one_mean(entropy, peak, mask):
        peak = peak & mask
        return torch.where(peak, entropy, 0.0).sum() / peak.sum().clamp(min=1)

    def middle(entropy, peak, mask):
        peak = peak & mask
        rows = [h[p].median() if p.any() else h.new_zeros(()) for h, p in zip(entropy, peak)]
        return torch.stack(rows).sum() / mask.any(1).sum().clamp(min=1)

    def weighted(entropy, peak, mask):
        h_i = torch.where(peak & mask, entropy, 0.0).sum(1) / (peak & mask).sum(1).clamp(min=1)
        return (h_i * mask.sum(1)).sum() / mask.sum().clamp(min=1)

    return {
        "one mean over all peaks": one_mean,
        "median of the peaks": middle,
        "weighted by length": weighted,
        "largest of a row": aggregate(
            read=lambda h, p: torch.where(p, h, 0.0).amax(1, keepdim=True),
            count=lambda p, m: 1,
        ),
        "divided by the length, not by the peaks": aggregate(
            count=lambda p, m: m.sum(1).clamp(min=1)
        ),
        "divided by T, not by the peaks": aggregate(count=lambda p, m: m.shape[1]),
        "sum of a row": aggregate(count=lambda p, m: 1),
        "0 / 0 in a row": aggregate(count=lambda p, m: p.sum(1)),
        "an epsilon in a row": aggregate(count=lambda p, m: p.sum(1) + 1e-6),
        "rows without a token count": aggregate(rows=lambda p, m: len(m)),
        "rows without a peak don't count": aggregate(
            rows=lambda p, m: p.any(1).sum().clamp(min=1)
        ),
        "0 / 0 over rows": aggregate(rows=lambda p, m: m.any(1).sum()),
        "an epsilon over rows": aggregate(rows=lambda p, m: m.any(1).sum() + 1e-6),
        "a sum over the rows": aggregate(rows=lambda p, m: 1),
        "peaks in padding count": aggregate(inside=lambda p, m: p),
        "the mask, not the peaks": aggregate(inside=lambda p, m: m),
        "padding multiplied by 0": aggregate(read=lambda h, p: h * p),
        "only NaN replaced": aggregate(
            read=lambda h, p: h.nan_to_num(0.0, 0.0, 0.0), inside=lambda p, m: p
        ),
        "detached": aggregate(read=lambda h, p: torch.where(p, h, 0.0).detach()),
        "entropies clamped to 1": aggregate(
            read=lambda h, p: torch.where(p, h, 0.0).clamp(max=1.0)
        ),
        "entropies clamped to 5": aggregate(
            read=lambda h, p: torch.where(p, h, 0.0).clamp(max=5.0)
        ),
        "median over rows": aggregate(last=lambda h: h.median(), rows=lambda p, m: 1),
        "H_i in place of H_agg": aggregate(last=lambda h: h),
        "a number": lambda h, p, m: aggregate()(h, p, m).item(),
        "single precision": lambda h, p, m: aggregate()(h.float(), p, m).double(),
        "writes to peak": zero_in_place,
        "whole vocabulary of peaks": aggregate(
            count=lambda p, m: p.sum().clamp(min=1), rows=lambda p, m: 1
        ),
        "the last row left out": lambda h, p, m: aggregate()(h[:-1], p[:-1], m[:-1]),
        "a root of H_i": aggregate(last=lambda h: (h + 1e-30).sqrt().sum()),
    }


def right_aggregations():
    def loop(entropy, peak, mask):
        means = []
        for i in range(len(entropy)):
            if mask[i].any():
                chosen = entropy[i][peak[i] & mask[i]]
                means.append(chosen.mean() if len(chosen) else entropy.new_zeros(()))
        nothing = torch.where(mask, entropy, 0.0).sum()  # 0, with a graph
        return torch.stack(means).mean() if means else nothing

    def matrix(entropy, peak, mask):
        peak = (peak & mask).to(entropy.dtype)
        clean = torch.where(peak.bool(), entropy, torch.zeros_like(entropy))
        h_i = torch.einsum("bt,bt->b", clean, peak) / peak.sum(1).clamp_min(1)
        here = mask.any(1).to(entropy.dtype)
        return (h_i @ here) / here.sum().clamp_min(1)

    def nanmean(entropy, peak, mask):
        clean = entropy.masked_fill(~(peak & mask), 0)
        counts = (peak & mask).sum(-1)
        h_i = clean.sum(-1) / torch.where(counts > 0, counts, 1)
        kept = h_i[mask.any(-1)]
        return kept.mean() if kept.numel() else clean.sum() * 0

    return {
        "template": aggregate(),
        "loop": loop,
        "einsum": matrix,
        "rows kept": nanmean,
        "NaN replaced, then multiplied": aggregate(read=lambda h, p: h.nan_to_num(0.0) * p),
    }


# --------------------------------------------------------------------------- 7. anchored loss
def anchored(
    logp_of=None,
    h_of=None,
    peak_of=None,
    gather=None,
    penalty=None,
    policy_of=None,
    total=lambda policy, term: policy + term,
    clean=lambda old, mask: torch.where(mask, old, 0.0),
    names=("policy_loss", "regularizer_loss", "h_agg"),
):
    """siren_loss of these steps."""

    def loss(
        logits, tokens, old_logp, adv, mask, anchor, *,
        beta, top_p=0.8, peak_quantile=0.8, max_tokens=None,
    ):  # fmt: skip
        logp = (logp_of or gathered)(logits, tokens)
        value = (policy_of or policy())(
            logp, clean(old_logp, mask), adv, mask, max_tokens=max_tokens
        )[0]
        h = (h_of or entropy_by())(logits, top_p)
        peak = (peak_of or peaks_by())(h, mask, peak_quantile)
        h_agg = (gather or aggregate())(h, peak, mask)
        term = (penalty or square)(h_agg, anchor, beta)
        found = (value, term, h_agg)
        return total(value, term), dict(zip(names, found))

    return loss


def gathered(logits, tokens):
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def square(h, anchor, beta):
    return beta * (h - anchor) ** 2


def penalties():
    huber = torch.nn.functional.smooth_l1_loss
    return {
        "huber": lambda h, a, b: b * 2 * huber(h, torch.as_tensor(a, dtype=h.dtype)),
        "absolute": lambda h, a, b: b * (h - a).abs(),
        "gap at most 1": lambda h, a, b: b * (h - a).clamp(-1, 1) ** 2,
        "gap at most 5": lambda h, a, b: b * (h - a).clamp(-5, 5) ** 2,
        "penalty at most 1": lambda h, a, b: b * ((h - a) ** 2).clamp(max=1),
        "from below only": lambda h, a, b: b * (h - a).clamp(max=0) ** 2,
        "from above only": lambda h, a, b: b * (h - a).clamp(min=0) ** 2,
        "half": lambda h, a, b: b / 2 * (h - a) ** 2,
        "beta squared": lambda h, a, b: (b * (h - a)) ** 2,
        "beta left out": lambda h, a, b: (h - a) ** 2,
        "beta of 0 is the default": lambda h, a, b: (b or 0.005) * (h - a) ** 2,
        "beta at most 1": lambda h, a, b: min(b, 1.0) * (h - a) ** 2,
        "relative gap": lambda h, a, b: b * (h / a - 1) ** 2 if a else b * h**2,
        "power 4": lambda h, a, b: b * (h - a) ** 4,
        "gap in logarithms": lambda h, a, b: (
            b * ((h + 1e-9).log() - math.log(abs(a) + 1e-9)) ** 2
        ),
        "anchor at least 0": lambda h, a, b: b * (h - max(a, 0.0)) ** 2,
        "anchor of 0 is none": lambda h, a, b: b * (h - (a or h.detach())) ** 2,
        "anchor of 0: no penalty": lambda h, a, b: b * (h - a) ** 2 if a else 0 * h,
        "bonus": lambda h, a, b: -b * h,
        "detached": lambda h, a, b: b * (h.detach() - a) ** 2,
        "half detached": lambda h, a, b: b * (h - a) * (h - a).detach(),
        "margin": lambda h, a, b: b * ((h - a).abs() - 0.05).clamp(min=0) ** 2,
        "plus": lambda h, a, b: b * (h + a) ** 2,
    }


def overwrite_tokens(logits, tokens, old_logp, adv, mask, anchor, **options):
    tokens.masked_fill_(~mask, 0)
    return anchored()(logits, tokens, old_logp, adv, mask, anchor, **options)


def overwrite_old(logits, tokens, old_logp, adv, mask, anchor, **options):
    old_logp[~mask] = 0.0
    return anchored()(logits, tokens, old_logp, adv, mask, anchor, **options)


def wrong_losses():
    full = entropy_by(lambda z, p: torch.ones_like(z, dtype=torch.bool))

    def by_row(entropy, peak, mask):
        return torch.where(peak, entropy, 0.0).sum(1) / peak.sum(1).clamp(min=1)

    def row_penalty(h, a, b):
        return (b * (h - a) ** 2).mean()

    def full_peaks(logits, top_p):
        return full(logits, top_p)

    def fixed(**changes):
        right = anchored()

        def loss(*args, **options):
            return right(*args, **{**options, **changes})

        return loss

    def swapped(*args, **options):
        p, q = options.get("top_p", 0.8), options.get("peak_quantile", 0.8)
        return anchored()(*args, **{**options, "top_p": q, "peak_quantile": p})

    found = {f"penalty: {name}": anchored(penalty=f) for name, f in penalties().items()}
    return found | {
        "whole vocabulary": anchored(h_of=full),
        "every token": anchored(peak_of=lambda h, m, q: m),
        "peaks of the batch": anchored(peak_of=batch_quantile),
        "peaks without H' > 0": anchored(peak_of=peaks_by(test=lambda h, theta: h >= theta)),
        "one mean": anchored(gather=wrong_aggregations()["one mean over all peaks"]),
        "a square per row": anchored(gather=by_row, penalty=row_penalty),
        "logits shifted": anchored(logp_of=lambda z, ids: gathered(z.roll(1, 1), ids)),
        "logp shifted": anchored(logp_of=lambda z, ids: gathered(z, ids.roll(-1, 1))),
        "not normalised": anchored(
            logp_of=lambda z, ids: z.gather(-1, ids[..., None])[..., 0]
        ),
        "softmax over positions": anchored(
            logp_of=lambda z, ids: z.log_softmax(1).gather(-1, ids[..., None])[..., 0]
        ),
        "probability in place of logp": anchored(
            logp_of=lambda z, ids: gathered(z, ids).exp()
        ),
        "logp at least -20": anchored(logp_of=lambda z, ids: gathered(z, ids).clamp(min=-20)),
        "logp at least -100": anchored(
            logp_of=lambda z, ids: gathered(z, ids).clamp(min=-100)
        ),
        "log of softmax": anchored(
            logp_of=lambda z, ids: (
                (z.exp() / z.exp().sum(-1, keepdim=True))
                .log()
                .gather(-1, ids[..., None])[..., 0]
            )
        ),
        "softmax plus epsilon": anchored(
            logp_of=lambda z, ids: (
                (z.softmax(-1) + 1e-10).log().gather(-1, ids[..., None])[..., 0]
            )
        ),
        "ids within 32": anchored(logp_of=lambda z, ids: gathered(z, ids % 32)),
        "top_p fixed": fixed(top_p=0.8),
        "peak_quantile fixed": fixed(peak_quantile=0.8),
        "max_tokens unused": fixed(max_tokens=None),
        "beta fixed": fixed(beta=0.005),
        "quantile and p swapped": swapped,
        "finite padding arrives": anchored(
            clean=without_nan, policy_of=policy(read=lambda x, m: x, keep=lambda x, m: x)
        ),
        "NaN in padding arrives": anchored(
            clean=lambda old, m: old, policy_of=policy(read=lambda x, m: x)
        ),
        "ratio clamped": anchored(
            policy_of=policy(ratio_of=lambda new, old: (new - old).clamp(-5, 5).exp())
        ),
        "dual clip": anchored(policy_of=policy(gain_of=dual_clip)),
        "own length": anchored(policy_of=policy(length=lambda m, n: m.sum(1).clamp(min=1))),
        "minus the penalty": anchored(total=lambda p, term: p - term),
        "penalty alone": anchored(total=lambda p, term: term),
        "policy alone": anchored(total=lambda p, term: p),
        "mean of both": anchored(total=lambda p, term: (p + term) / 2),
        "penalty twice": anchored(total=lambda p, term: p + 2 * term),
        "other names": anchored(names=("policy", "regularizer", "entropy")),
        "values by beta": anchored(names=("policy_loss", "h_agg", "regularizer_loss")),
        "writes to tokens": overwrite_tokens,
        "writes to old_logp": overwrite_old,
        "half precision": lambda z, ids, old, adv, m, a, **options: anchored()(
            z.bfloat16(), ids, old.bfloat16(), adv.bfloat16(), m, a, **options
        ),
        "no loss for an empty batch": lambda z, ids, old, adv, m, a, **options: (
            anchored()(z, ids, old, adv, m, a, **options)
            if m.any()
            else (torch.tensor(math.nan), {})
        ),
        "adv per batch": lambda z, ids, old, adv, m, a, **options: anchored()(
            z, ids, old, adv - adv.mean(), m, a, **options
        ),
    }


def right_losses():
    def from_siren(
        logits, tokens, old_logp, adv, mask, anchor, *,
        beta, top_p=0.8, peak_quantile=0.8, max_tokens=None,
    ):  # fmt: skip
        now = siren.token_stats(logits, tokens, top_p)
        policy_value, _ = siren.policy_loss(
            now["logp"], old_logp, adv, mask, max_tokens or mask.shape[1]
        )
        return siren.siren_loss(
            policy_value, now["nucleus_entropy"], mask, anchor, beta, peak_quantile
        )

    def plain(
        logits, tokens, old_logp, adv, mask, anchor, *,
        beta, top_p=0.8, peak_quantile=0.8, max_tokens=None,
    ):  # fmt: skip
        logp = torch.log_softmax(logits, dim=-1)
        logp = torch.gather(logp, 2, tokens.unsqueeze(2)).squeeze(2)
        loss, stats = right_policies()["flat"](
            logp, old_logp, adv, mask, max_tokens=max_tokens
        )
        h = right_entropies()["logsumexp"](logits, top_p)
        h_agg = right_aggregations()["loop"](
            h, right_peaks()["numpy"](h, mask, peak_quantile), mask
        )
        gap = h_agg - float(anchor)
        stats.update(
            policy_loss=loss.detach(),
            regularizer_loss=beta * gap.pow(2).detach(),
            h_agg=h_agg.item(),
        )
        return loss + beta * gap * gap, stats

    return {
        "template": anchored(),
        "detached stats": lambda *x, **y: (
            lambda out: (out[0], {k: v.detach() for k, v in out[1].items()})
        )(anchored()(*x, **y)),
        "siren": from_siren,
        "plain": plain,
    }


# --------------------------------------------------------------------- 8. exact micro-batches
def wrong_anchors():
    return {
        "the anchor itself": lambda h, all_, a: a,
        "h_micro": lambda h, all_, a: h,
        "h_agg": lambda h, all_, a: all_,
        "plus the gap": lambda h, all_, a: h + (all_ - a),
        "the gap": lambda h, all_, a: all_ - a,
        "minus the gap": lambda h, all_, a: a - all_,
        "anchor plus the difference, turned round": lambda h, all_, a: a - (h - all_),
        "absolute gap": lambda h, all_, a: h - abs(all_ - a),
        "squared gap": lambda h, all_, a: h - (all_ - a) ** 2,
        "proportional": lambda h, all_, a: h * a / all_,
        "proportional, the other way": lambda h, all_, a: a * all_ / h,
        "mean": lambda h, all_, a: (h + a) / 2,
        "at least 0": lambda h, all_, a: max(h - (all_ - a), 0.0),
        "absolute": lambda h, all_, a: abs(h - (all_ - a)),
        "gap within 1": lambda h, all_, a: h - max(-1.0, min(1.0, all_ - a)),
        "only below the anchor": lambda h, all_, a: h - min(all_ - a, 0.0),
        "only above the anchor": lambda h, all_, a: h - max(all_ - a, 0.0),
        "an empty one keeps the anchor": lambda h, all_, a: h - (all_ - a) if h > 0 else a,
        "an anchor of 0 stays": lambda h, all_, a: h - (all_ - a) if a else a,
        "rounded": lambda h, all_, a: round(float(h - (all_ - a)), 2),
        "from the micro-batch": lambda h, all_, a: all_ - (h - a),
        "half of the gap": lambda h, all_, a: h - (all_ - a) / 2,
        "at most the anchor": lambda h, all_, a: min(h - (all_ - a), a),
        "with the square root": lambda h, all_, a: h - abs(all_ - a) ** 0.5,
        "single precision": lambda h, all_, a: (
            torch.as_tensor(h).float() - (torch.as_tensor(all_).float() - a)
        ),
        "needs tensors": lambda h, all_, a: h.clone() - (all_ - a),
        "writes to h_micro": lambda h, all_, a: (
            h.sub_(all_ - a) if torch.is_tensor(h) else h - (all_ - a)
        ),
        "writes to h_agg": lambda h, all_, a: (
            h - all_.sub_(a) if torch.is_tensor(all_) else h - (all_ - a)
        ),
    }


def right_anchors():
    return {
        "as it stands": lambda h, all_, a: h - (all_ - a),
        "other order": lambda h, all_, a: a + h - all_,
        "numbers": lambda h, all_, a: float(h) - float(all_) + float(a),
        "tensors": lambda h, all_, a: torch.as_tensor(h) - torch.as_tensor(all_) + a,
    }


# ---------------------------------------------------------------------------------- 9. pass@k
def wrong_passes():
    def simulated(n, c, k):
        hits = sum(min(random.sample(range(n), k)) < c for _ in range(200))
        return hits / 200

    def recursive(n, c, k):
        def miss(n, k):
            return 1.0 if k == 0 else (n - c - 0) / n * miss(n - 1, k - 1) if n > c else 0.0

        return 1 - miss(n, k)

    def products(n, c, k):
        miss = 1.0
        for i in range(k):
            miss *= (n - c - i) / (n - i)
        return 1 - miss

    def big(n, c, k):
        return 1 - float(math.comb(n - c, k)) / float(math.comb(n, k))

    return {
        "with replacement": lambda n, c, k: 1 - (1 - c / n) ** k,
        "avg@k": lambda n, c, k: c / n,
        "any of all": lambda n, c, k: float(c > 0),
        "k c / n": lambda n, c, k: min(1.0, k * c / n),
        "all wrong": lambda n, c, k: math.comb(n - c, k) / math.comb(n, k),
        "exactly one": lambda n, c, k: c * math.comb(n - c, k - 1) / math.comb(n, k),
        "all right": lambda n, c, k: math.comb(c, k) / math.comb(n, k),
        "more than half": lambda n, c, k: (
            sum(math.comb(c, i) * math.comb(n - c, k - i) for i in range(k // 2 + 1, k + 1))
            / math.comb(n, k)
        ),
        "binomials as floats": big,
        "factorials as floats": lambda n, c, k: (
            1.0
            if n - c < k
            else 1
            - float(math.factorial(n - c))
            * float(math.factorial(n - k))
            / (float(math.factorial(n - c - k)) * float(math.factorial(n)))
        ),
        "whole-number division": lambda n, c, k: 1 - math.comb(n - c, k) // math.comb(n, k),
        "rounded": lambda n, c, k: round(1 - math.comb(n - c, k) / math.comb(n, k), 3),
        "percent": lambda n, c, k: 100 * (1 - math.comb(n - c, k) / math.comb(n, k)),
        "simulated": simulated,
        "the first k": lambda n, c, k: float(c >= 1 and k * c >= n),
        "of n + 1": lambda n, c, k: 1 - math.comb(n - c, k) / math.comb(n + 1, k),
        "of k - 1": lambda n, c, k: 1 - math.comb(n - c, k - 1) / math.comb(n, k - 1),
        "geometric": lambda n, c, k: 1 - math.exp(-k * c / n),
        "1 for k = n": lambda n, c, k: (
            1.0 if k == n else 1 - math.comb(n - c, k) / math.comb(n, k)
        ),
        "0 for k = n": lambda n, c, k: (
            float(c == n) if k == n else 1 - math.comb(n - c, k) / math.comb(n, k)
        ),
        "recursion": recursive,
        "half precision": lambda n, c, k: (
            1 - torch.tensor(math.comb(n - c, k) / math.comb(n, k)).bfloat16().item()
        ),
        "n at most 100": lambda n, c, k: (
            1 - math.comb(n - c, k) / math.comb(n, k) if n <= 100 else 1 - (1 - c / n) ** k
        ),
        "no test for few wrong ones": lambda n, c, k: (
            1 - np.prod([1 - k / i for i in range(n - c + 1, n + 1)]) if n - c >= k else 0.0
        ),
        "mean over subsets, cut off": lambda n, c, k: float(
            np.mean(
                [min(s) < c for s in itertools.islice(itertools.combinations(range(n), k), 50)]
            )
        ),
        "product without end": lambda n, c, k: (
            products(n, c, k) if n - c >= k else products(n, c, n - c)
        ),
    }


def right_passes():
    def gamma(x):
        return math.lgamma(x + 1)

    def products(n, c, k):
        miss = 1.0
        for i in range(k):
            miss *= max(0, n - c - i) / (n - i)
        return 1.0 - miss

    return {
        "logarithms": lambda n, c, k: (
            1.0
            if n - c < k
            else 1 - math.exp(gamma(n - c) - gamma(n - c - k) - gamma(n) + gamma(n - k))
        ),
        "comb": lambda n, c, k: 1 - math.comb(n - c, k) / math.comb(n, k),
        "fraction": lambda n, c, k: float(1 - Fraction(math.comb(n - c, k), math.comb(n, k))),
        "product": products,
        "humaneval": lambda n, c, k: (
            1.0 if n - c < k else float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))
        ),
        "math.prod": lambda n, c, k: (
            1 - math.prod(max(0, n - c - i) / (n - i) for i in range(k))
        ),
    }


# ---------------------------------------------------------------------------------- 10. maj@k
def majority(
    blocks_of=None, vote=lambda x: x, valid=lambda x: x is not None, winner=None, equal=None
):
    """maj_at_k of these steps."""

    def maj(votes, answer, k):
        blocks = (blocks_of or whole_blocks)(votes, k)
        won = 0
        for block in blocks:
            kept = [vote(x) for x in block if valid(x)]
            if kept:
                best = (winner or most_common)(kept)
                won += equal(best, answer) if equal else best == vote(answer)
        return won / len(blocks)

    return maj


def whole_blocks(votes, k):
    return [votes[i : i + k] for i in range(0, len(votes) - k + 1, k)]


def most_common(votes):
    return collections.Counter(votes).most_common(1)[0][0]


def wrong_majorities():
    def number(x):
        try:
            return Fraction(x)
        except (ValueError, ZeroDivisionError, TypeError):
            return x

    def over_all_blocks(votes, answer, k):
        counts = collections.Counter()
        won = 0
        blocks = whole_blocks(votes, k)
        for block in blocks:
            counts.update(x for x in block if x is not None)
            won += bool(counts) and counts.most_common(1)[0][0] == answer
        return won / len(blocks)

    def first_seen_over_blocks(votes, answer, k):
        order = list(dict.fromkeys(x for x in votes if x is not None))
        won = 0
        blocks = whole_blocks(votes, k)
        for block in blocks:
            counts = collections.Counter(x for x in block if x is not None)
            if counts:
                won += max(order, key=lambda x, counts=counts: counts[x]) == answer
        return won / len(blocks)

    def emptied(votes, answer, k):
        won = count = 0
        while len(votes) >= k:
            block = [votes.pop(0) for _ in range(k)]
            counts = collections.Counter(x for x in block if x is not None)
            won += bool(counts) and counts.most_common(1)[0][0] == answer
            count += 1
        return won / count

    def none_is_strongest(block):
        counts = collections.Counter(block)
        return counts.most_common(1)[0][0]

    def absolute_majority(votes):
        best, count = collections.Counter(votes).most_common(1)[0]
        return best if 2 * count > len(votes) else None

    def last_of_tied(votes):
        counts = collections.Counter(reversed(votes))
        return counts.most_common(1)[0][0]

    def in_favour(block_votes, answer):
        counts = collections.Counter(block_votes)
        return counts[answer] == max(counts.values())

    def answer_wins_ties(votes, answer, k):
        blocks = whole_blocks(votes, k)
        kept = [[x for x in block if x is not None] for block in blocks]
        return sum(bool(b) and in_favour(b, answer) for b in kept) / len(blocks)

    def tied_share(votes, answer, k):
        blocks = whole_blocks(votes, k)
        total = 0.0
        for block in blocks:
            counts = collections.Counter(x for x in block if x is not None)
            top = [x for x, n in counts.items() if n == max(counts.values())]
            total += (answer in top) / len(top) if top else 0
        return total / len(blocks)

    return {
        "stripped": majority(vote=lambda x: x.strip()),
        "lower case": majority(vote=lambda x: x.lower()),
        "by value": majority(vote=number),
        "without leading zeros": majority(vote=lambda x: x.lstrip("0")),
        "without commas": majority(vote=lambda x: x.replace(",", "")),
        "as numbers where they are": majority(
            vote=lambda x: str(float(x)) if x.replace(".", "").isdigit() else x
        ),
        "answer inside the vote": majority(equal=lambda best, answer: answer in best),
        "answer compared without blanks": majority(
            equal=lambda best, answer: best.strip() == answer.strip()
        ),
        "an empty text is no vote": majority(valid=lambda x: bool(x)),
        "None votes": majority(
            valid=lambda x: True, vote=lambda x: x, winner=none_is_strongest
        ),
        "absolute majority": majority(winner=absolute_majority),
        "ties: the last": majority(winner=last_of_tied),
        "ties: the largest": majority(
            winner=lambda v: max(sorted(set(v), reverse=True), key=v.count)
        ),
        "ties: the smallest": majority(winner=lambda v: max(sorted(set(v)), key=v.count)),
        "ties: the right one": answer_wins_ties,
        "ties: a share": tied_share,
        "ties: nobody": majority(
            winner=lambda v: (
                most_common(v)
                if len(
                    [
                        n
                        for n in collections.Counter(v).values()
                        if n == v.count(most_common(v))
                    ]
                )
                == 1
                else None
            )
        ),
        "the first vote": majority(winner=lambda v: v[0]),
        "the last vote": majority(winner=lambda v: v[-1]),
        "any": lambda votes, answer, k: (
            sum(answer in block for block in whole_blocks(votes, k))
            / len(whole_blocks(votes, k))
        ),
        "share of the votes": lambda votes, answer, k: votes.count(answer) / len(votes),
        "one block": lambda votes, answer, k: majority()(votes, answer, len(votes)),
        "the first block": lambda votes, answer, k: majority()(votes[:k], answer, k),
        "without the last block": majority(
            blocks_of=lambda v, k: whole_blocks(v, k)[:-1] or whole_blocks(v, k)
        ),
        "with a part block": majority(
            blocks_of=lambda v, k: [v[i : i + k] for i in range(0, len(v), k)]
        ),
        "sliding": majority(
            blocks_of=lambda v, k: [v[i : i + k] for i in range(len(v) - k + 1)]
        ),
        "every k-th": majority(
            blocks_of=lambda v, k: [v[i :: len(v) // k] for i in range(len(v) // k)]
        ),
        "without None before cutting": majority(
            blocks_of=lambda v, k: (
                whole_blocks([x for x in v if x is not None], k) or [[None] * k]
            )
        ),
        "counts over blocks": over_all_blocks,
        "first seen over all blocks": first_seen_over_blocks,
        "empties the list": emptied,
        "blocks without votes left out": lambda votes, answer, k: majority()(
            [
                x
                for block in whole_blocks(votes, k)
                for x in block
                if any(y is not None for y in block)
            ]
            or votes,
            answer,
            k,
        ),
        "divided by the votes": lambda votes, answer, k: (
            majority()(votes, answer, k) * (len(votes) // k) * k / len(votes)
        ),
        "a whole number": lambda votes, answer, k: round(majority()(votes, answer, k)),
        "a set": majority(
            winner=lambda v: sorted(set(v), key=lambda x: (-v.count(x), len(x), x))[0]
        ),
    }


def right_majorities():
    def by_hand(votes, answer, k):
        wins = []
        for start in range(0, len(votes) // k * k, k):
            counts, first = {}, {}
            for place, x in enumerate(votes[start : start + k]):
                if x is not None:
                    counts[x] = counts.get(x, 0) + 1
                    first.setdefault(x, place)
            best = min(counts, key=lambda x: (-counts[x], first[x]), default=None)
            wins.append(best is not None and best == answer)
        return sum(wins) / len(wins)

    def by_max(votes, answer, k):
        won = 0
        for i in range(len(votes) // k):
            own = [x for x in votes[i * k : (i + 1) * k] if x is not None]
            won += bool(own) and max(own, key=own.count) == answer
        return won / (len(votes) // k)

    return {"template": majority(), "by hand": by_hand, "max by count": by_max}


# -------------------------------------------------------------------------------- 11. sampler
def sampler(
    start=lambda prompts, pad: prompts,
    order=None,
    prompt_mask=None,
    positions=lambda seen: (seen.cumsum(1) - 1).clamp(min=0),
    attention=lambda seen: seen,
    scaled=lambda logits, temperature, t: logits / temperature,
    choose=None,
    score=None,
    ends=lambda token, eos, pad: torch.isin(token, torch.tensor(eos)),
    ended_at_first=lambda prompts, eos: [False] * len(prompts),
    stop=lambda done: done.all(),
    response_mask=None,
    keep_eos=True,
    pad_logp=True,
    extra=0,
    after=lambda model: None,
    no_grad=True,
):
    """sample of these steps; rows that have ended stay in the batch."""

    def sample(
        model, prompts, *, max_tokens, eos_ids, pad_id,
        samples=1, temperature=1.0, generator=None,
    ):  # fmt: skip
        prompts = start(prompts, pad_id)
        order_of = order or (lambda rows, n: [row for row in rows for _ in range(n)])
        rows = order_of(prompts, samples)
        width = max(map(len, rows))
        ids = torch.tensor([[pad_id] * (width - len(r)) + r for r in rows])
        seen = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
        prompt, shown = ids, prompt_mask(ids, pad_id) if prompt_mask else seen.bool()
        done = torch.tensor(ended_at_first(rows, eos_ids))
        tokens, masks, logps = [], [], []
        cache = None
        fed = ids
        with torch.set_grad_enabled(not no_grad):
            for t in range(max_tokens + extra):
                place = positions(seen)[:, -fed.shape[1] :]
                out = model(
                    input_ids=fed,
                    attention_mask=attention(seen),
                    position_ids=place,
                    past_key_values=cache,
                    use_cache=True,
                )
                cache = out.past_key_values
                log_pi = scaled(out.logits[:, -1], temperature, t).log_softmax(-1)
                pi = log_pi.exp()
                token = (choose or drawn)(pi, generator, t)
                value = (score or chosen)(log_pi, token, out.logits[:, -1])
                now = ends(token, eos_ids, pad_id)
                write = ~done if keep_eos else ~done & ~now
                tokens.append(torch.where(write, token, pad_id))
                masks.append(write)
                logps.append(torch.where(write, value, 0.0) if pad_logp else value)
                done = done | now
                seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
                fed = tokens[-1][:, None]
                if stop(done):
                    break
        after(model)
        tokens = torch.stack(tokens, 1)
        mask = response_mask(tokens, pad_id) if response_mask else torch.stack(masks, 1)
        return siren.Rollout(prompt, shown, tokens, mask, torch.stack(logps, 1))

    return sample


def drawn(pi, generator, t):
    return torch.multinomial(pi, 1, generator=generator)[:, 0]


def chosen(log_pi, token, logits):
    return log_pi.gather(1, token[:, None])[:, 0]


def pad_in_place(prompts, pad):
    width = max(map(len, prompts))
    for prompt in prompts:
        while len(prompt) < width:
            prompt.insert(0, pad)
    return prompts


def pop_in_place(prompts, pad):
    copy = [list(prompt) for prompt in prompts]
    prompts.clear()
    return copy


def from_top(k):
    def choose(pi, generator, t):
        top = pi.topk(min(k, pi.shape[1]), -1)
        return top.indices.gather(1, torch.multinomial(top.values, 1, generator=generator))[
            :, 0
        ]

    return choose


def from_nucleus(p):
    def choose(pi, generator, t):
        inside = right_nucleus_mask(pi.log(), p)
        return torch.multinomial(pi * inside, 1, generator=generator)[:, 0]

    return choose


def shared(pi, generator, t):
    """The samples of a prompt are copies of each other."""
    token = drawn(pi, generator, t)
    return token[:1].expand(len(token)) if t == 0 else token


def wrong_samplers():
    def unscaled(log_pi, token, logits):
        return logits.log_softmax(-1).gather(1, token[:, None])[:, 0]

    def whole_pass(model, prompts, **options):
        return no_cache_sampler(model, prompts, **options)

    def with_eval(model, prompts, **options):
        model.eval()
        return sampler()(model, prompts, **options)

    def right_padded(model, prompts, **options):
        out = sampler()(model, prompts, **options)
        rows = [torch.cat([ids[m], ids[~m]]) for ids, m in zip(out.prompt, out.prompt_mask)]
        return out._replace(prompt=torch.stack(rows))

    def seeded_inside(model, prompts, **options):
        return sampler()(model, prompts, **{**options, "generator": torch.manual_seed(0)})

    def small_eos(model, prompts, **options):
        return sampler()(model, prompts, **{**options, "eos_ids": options["eos_ids"][:1]})

    def pad_ends(token, eos, pad):
        return torch.isin(token, torch.tensor([*eos, pad]))

    def fixed_generator(model, prompts, *, generator=None, **options):
        generator = generator or torch.Generator().manual_seed(0)
        return sampler()(model, prompts, generator=generator, **options)

    def hides_drawn_pads(model, prompts, *, pad_id, **options):
        width = max(map(len, prompts))
        tokens = []

        class Hidden(torch.nn.Module):
            """The model, to which drawn pads are hidden."""

            def forward(self, input_ids, attention_mask, **given):
                if attention_mask.shape[1] == width:
                    tokens.clear()
                else:
                    tokens.append(input_ids[:, 0] != pad_id)
                    shown = torch.stack(tokens, 1).long()
                    attention_mask = torch.cat([attention_mask[:, :width], shown], 1)
                return model(input_ids=input_ids, attention_mask=attention_mask, **given)

        return sampler()(Hidden(), prompts, pad_id=pad_id, **options)

    def forbid_eos(pi, generator, t):
        pi = pi.clone()
        if t == 0:
            pi[:, 1:3] = 0
        return torch.multinomial(pi, 1, generator=generator)[:, 0]

    def eos_by_append(model, prompts, **options):
        options["eos_ids"].append(options["pad_id"])
        return sampler()(model, prompts, **options)

    return {
        "likeliest": sampler(choose=lambda pi, g, t: pi.argmax(-1)),
        "top 50": sampler(choose=from_top(50)),
        "top 32": sampler(choose=from_top(32)),
        "top 10": sampler(choose=from_top(10)),
        "nucleus of .9": sampler(choose=from_nucleus(0.9)),
        "nucleus of .99": sampler(choose=from_nucleus(0.99)),
        "first token shared": sampler(choose=shared),
        "first token the likeliest": sampler(
            choose=lambda pi, g, t: pi.argmax(-1) if t == 0 else drawn(pi, g, t)
        ),
        "no EOS at first": sampler(choose=forbid_eos),
        "generator unused": sampler(choose=lambda pi, g, t: drawn(pi, None, t)),
        "generator for the first token only": sampler(
            choose=lambda pi, g, t: drawn(pi, g if t == 0 else None, t)
        ),
        "seeds the global generator": seeded_inside,
        "temperature unused": sampler(scaled=lambda z, temp, t: z),
        "temperature multiplied": sampler(scaled=lambda z, temp, t: z * temp),
        "temperature at most 1": sampler(scaled=lambda z, temp, t: z / min(temp, 1.0)),
        "temperature at least .7": sampler(scaled=lambda z, temp, t: z / max(temp, 0.7)),
        "temperature from the second token": sampler(
            scaled=lambda z, temp, t: z / temp if t else z
        ),
        "logp without temperature": sampler(score=unscaled),
        "probability in place of logp": sampler(
            score=lambda lp, token, z: chosen(lp, token, z).exp()
        ),
        "logit in place of logp": sampler(
            score=lambda lp, token, z: z.gather(1, token[:, None])[:, 0]
        ),
        "logp at least -5": sampler(
            score=lambda lp, token, z: chosen(lp, token, z).clamp(min=-5)
        ),
        "positions count padding": sampler(
            positions=lambda seen: torch.arange(seen.shape[1]).expand(seen.shape)
        ),
        "positions one too many": sampler(positions=lambda seen: seen.cumsum(1)),
        "attention to padding": sampler(attention=lambda seen: torch.ones_like(seen)),
        "pad ends": sampler(ends=pad_ends),
        "only pad ends": sampler(ends=lambda token, eos, pad: token == pad),
        "nothing ends": sampler(ends=lambda token, eos, pad: torch.zeros_like(token) > 0),
        "only the first EOS": small_eos,
        "EOS left out": sampler(keep_eos=False),
        "stops at the first ended row": sampler(stop=lambda done: done.any()),
        "one token too many": sampler(extra=1),
        "one token too few": sampler(extra=-1),
        "never stops early, and one more": sampler(stop=lambda done: False, extra=1),
        "mask from ids": sampler(response_mask=lambda ids, pad: ids != pad),
        "mask from ids, EOS is pad": sampler(
            response_mask=lambda ids, pad: (ids != pad) | ((ids == pad).cumsum(1) == 1)
        ),
        "drawn pads are hidden": hides_drawn_pads,
        "generator seeded if there is none": fixed_generator,
        "prompt mask from ids": sampler(prompt_mask=lambda ids, pad: ids != pad),
        "prompt mask all True": sampler(
            prompt_mask=lambda ids, pad: torch.ones_like(ids, dtype=torch.bool)
        ),
        "a prompt with EOS has ended": sampler(
            ended_at_first=lambda rows, eos: [row[-1] in eos for row in rows]
        ),
        "logp on padding": sampler(pad_logp=False),
        "interleaved": sampler(order=lambda rows, n: rows * n),
        "one sample": sampler(order=lambda rows, n: rows),
        "padded on the right": right_padded,
        "graph kept": sampler(no_grad=False),
        "pads the caller's prompts": sampler(start=pad_in_place),
        "empties the caller's prompts": sampler(start=pop_in_place),
        "strips pads of a prompt": sampler(
            start=lambda prompts, pad: [[x for x in row if x != pad] or row for row in prompts]
        ),
        "strips EOS of a prompt": sampler(
            start=lambda prompts, pad: [
                row[:-1] if row[-1] == 2 and len(row) > 1 else row for row in prompts
            ]
        ),
        "adds to eos_ids": eos_by_append,
        "leaves the model in training": sampler(after=lambda model: model.train()),
        "leaves the model in evaluation": with_eval,
        "without a cache": whole_pass,
        "whole numbers in the mask": lambda model, prompts, **o: (
            lambda out: out._replace(mask=out.mask.long())
        )(sampler()(model, prompts, **o)),
        "a list of tensors": lambda model, prompts, **o: tuple(sampler()(model, prompts, **o)),
        "logp summed": lambda model, prompts, **o: (
            lambda out: out._replace(logp=out.logp.cumsum(1))
        )(sampler()(model, prompts, **o)),
    }


def no_cache_sampler(
    model, prompts, *, max_tokens, eos_ids, pad_id, samples=1, temperature=1.0, generator=None
):
    rows = [prompt for prompt in prompts for _ in range(samples)]
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(r)) + r for r in rows])
    seen = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    out = {"tokens": [], "mask": [], "logp": []}
    prompt, shown = ids, seen.bool()
    done = torch.zeros(len(rows), dtype=torch.bool)
    with torch.no_grad():
        for _ in range(max_tokens):
            place = (seen.cumsum(1) - 1).clamp(min=0)
            logits = model(input_ids=ids, attention_mask=seen, position_ids=place).logits[
                :, -1
            ]
            log_pi = (logits / temperature).log_softmax(-1)
            token = torch.multinomial(log_pi.exp(), 1, generator=generator)[:, 0]
            out["tokens"].append(torch.where(done, pad_id, token))
            out["mask"].append(~done)
            out["logp"].append(torch.where(done, 0.0, chosen(log_pi, token, logits)))
            ids = torch.cat([ids, out["tokens"][-1][:, None]], 1)
            seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
            done = done | torch.isin(token, torch.tensor(eos_ids))
            if done.all():
                break
    return siren.Rollout(prompt, shown, *(torch.stack(x, 1) for x in out.values()))


def right_samplers():
    def always_long(model, prompts, **options):
        return sampler(stop=lambda done: False)(model, prompts, **options)

    def restored(model, prompts, **options):
        was = model.training
        model.eval()
        try:
            return sampler()(model, prompts, **options)
        finally:
            model.train(was)

    return {
        "template": sampler(),
        "to the budget": always_long,
        "mode put back": restored,
        "log_softmax in float64": sampler(
            scaled=lambda z, temp, t: z.double() / temp,
            score=lambda lp, token, z: chosen(lp, token, z).float(),
        ),
        "reference": reference.sample,
    }


# ------------------------------------------------------------------- 12. a drop-in of your own
def quantile_by(rank=None, baseline=None, result=lambda x, b: x - b):
    """quantile_advantages of these steps."""

    def advantages(rewards, group_size, algorithm="dr_grpo", quantile=0.4):
        groups = rewards.reshape(-1, group_size)
        if baseline:
            b = baseline(groups, quantile)
        else:
            place = (rank or right_rank)(quantile, group_size)
            b = groups.sort(1).values[:, place - 1 : place]
        return result(groups, b).reshape(-1)

    return advantages


def right_rank(quantile, size):
    return math.ceil(quantile * size - 1e-9)


def plug_of(function, convert=float, **more):
    """plug for this function."""

    def plug(quantile="0.4"):
        siren.group_advantages = functools.partial(
            function, quantile=convert(quantile), **more
        )

    return plug


def sort_in_place(rewards, group_size, algorithm="dr_grpo", quantile=0.4):
    groups = rewards.view(-1, group_size)
    groups[:] = groups.sort(1).values
    return quantile_by()(rewards, group_size, algorithm, quantile)


def wrong_drop_ins():
    def kinds(kind):
        return quantile_by(
            baseline=lambda x, q: x.quantile(q, dim=1, keepdim=True, interpolation=kind)
        )

    def within(low, high):
        return lambda q, n: min(max(low, right_rank(q, n)), high or n)

    def ignores(quantile="0.4"):
        siren.group_advantages = quantile_by()

    def positional(quantile="0.4"):
        siren.group_advantages = lambda rewards, size: quantile_by()(
            rewards, size, quantile=float(quantile)
        )

    def nothing(quantile="0.4"):
        pass

    def returned(quantile="0.4"):
        return functools.partial(quantile_by(), quantile=float(quantile))

    def early(quantile="0.4"):
        if siren.group_advantages is siren_original():
            plug_of(quantile_by())(quantile)

    def siren_original():
        return ORIGINAL.group_advantages

    def trains(quantile="0.4"):
        plug_of(quantile_by())(quantile)
        siren.policy_loss = types.MethodType(lambda self, *x: x, object())

    def by_value(x, q):
        """F(x) with a tolerance that is too large."""
        share = (x[:, None, :] <= x[:, :, None]).double().mean(-1)
        return x.masked_fill(share < q - 0.05, INF).amin(1, keepdim=True)

    ranks = {
        "rounded down": lambda q, n: max(1, math.floor(q * n + 1e-9)),
        "rounded": lambda q, n: max(1, round(q * n)),
        "one more": lambda q, n: min(n, int(q * n + 1e-9) + 1),
        "no tolerance": lambda q, n: math.ceil(q * n),
        "tolerance .1": lambda q, n: max(1, math.ceil(q * n - 0.1)),
        "tolerance .01": lambda q, n: max(1, math.ceil(q * n - 0.01)),
        "tolerance .001": lambda q, n: max(1, math.ceil(q * n - 1e-3)),
        "tolerance upwards": lambda q, n: min(n, math.ceil(q * n + 1e-9)),
        "of n - 1": lambda q, n: max(1, math.ceil(q * (n - 1) - 1e-9)),
        "of n + 1": lambda q, n: min(n, math.ceil(q * (n + 1) - 1e-9)),
        "from above": lambda q, n: max(1, n + 1 - right_rank(q, n)),
        "always .4": lambda q, n: right_rank(0.4, n),
        "1 - quantile": lambda q, n: max(1, right_rank(1 - q, n)),
        "groups of 8": lambda q, n: min(n, right_rank(q, 8)),
        "at least the second": within(2, None),
    }
    found = {f"rank: {k}": {"quantile_advantages": quantile_by(f)} for k, f in ranks.items()}
    found |= {
        f"interpolation: {k}": {"quantile_advantages": kinds(k)}
        for k in ("linear", "lower", "higher", "nearest", "midpoint")
    }
    rules = {
        "mean": quantile_by(baseline=lambda x, q: x.mean(1, keepdim=True)),
        "batch": quantile_by(
            baseline=lambda x, q: (
                x.flatten().sort().values[math.ceil(q * x.numel() - 1e-9) - 1][None, None]
            )
        ),
        "rewards in 0..1": lambda r, g, a="", quantile=0.4: quantile_by()(
            r.clamp(0, 1), g, a, quantile
        ),
        "binary": lambda r, g, a="", quantile=0.4: quantile_by()(
            (r > 0.5).to(r.dtype), g, a, quantile
        ),
        "sign": quantile_by(result=lambda x, b: b - x),
        "its sign only": quantile_by(result=lambda x, b: (x - b).sign()),
        "divided by the std": quantile_by(
            result=lambda x, b: (x - b) / (x.std(1, keepdim=True) + 1e-6)
        ),
        "centred": quantile_by(result=lambda x, b: (x - b) - (x - b).mean(1, keepdim=True)),
        "only above": quantile_by(result=lambda x, b: (x - b).clamp(min=0)),
        "the baseline": quantile_by(result=lambda x, b: b.expand(x.shape)),
        "sorted": quantile_by(result=lambda x, b: x.sort(1).values - b),
        "tolerance in F": quantile_by(baseline=by_value),
        "writes to the rewards": sort_in_place,
        "groups": lambda r, g, a="", quantile=0.4: quantile_by()(r, g, a, quantile).view(
            -1, g
        ),
        "interleaved": lambda r, g, a="", quantile=0.4: quantile_by()(
            r.view(g, -1).T.reshape(-1), g, a, quantile
        ),
    }
    found |= {k: {"quantile_advantages": f} for k, f in rules.items()}
    plugs = {"ignores its option": ignores, "without algorithm": positional}
    plugs |= {"does nothing": nothing, "returns it": returned, "only once": early}
    plugs |= {
        "keeps a text": plug_of(quantile_by(), str),
        "percent": plug_of(quantile_by(), lambda x: float(x) / 100),
        "one digit": plug_of(quantile_by(), lambda x: round(float(x), 1)),
        "by another name": lambda quantile="0.4": setattr(siren, "advantages", quantile_by()),
        "replaces more": trains,
    }
    return found | {f"plug: {k}": {"plug": f} for k, f in plugs.items()}


ORIGINAL = types.SimpleNamespace(group_advantages=siren.group_advantages)


def right_drop_ins():
    def by_share(rewards, group_size, algorithm="dr_grpo", quantile=0.4):
        out = []
        for group in rewards.split(group_size):
            own = sorted(group.tolist())
            shares = [(i + 1) / group_size for i in range(group_size)]
            reached = [x for x, share in zip(own, shares) if share >= quantile - 1e-9]
            out.append(group - reached[0])
        return torch.cat(out)

    def kth(rewards, group_size, algorithm="dr_grpo", quantile=0.4):
        groups = rewards.view(-1, group_size)
        k = math.ceil(round(quantile * group_size, 9))
        return (groups - groups.kthvalue(k, dim=1, keepdim=True)[0]).flatten()

    def closure(quantile="0.4"):
        level = float(quantile)

        def advantages(rewards, group_size, algorithm="dr_grpo"):
            return by_share(rewards, group_size, algorithm, level)

        siren.group_advantages = advantages

    return {
        "sorted": {"quantile_advantages": quantile_by(), "plug": plug_of(quantile_by())},
        "shares": {"quantile_advantages": by_share, "plug": closure},
        "kthvalue": {"quantile_advantages": kth, "plug": plug_of(kth)},
    }


# ------------------------------------------------------------------------- 13. reward hacking
def strict(
    ends=lambda words: words[-1:] == ["<eos>"],
    text=lambda prompt, response: response,
    content=None,
    plain=r"[+-]?[0-9]+(\.[0-9]+)?",
    strip=" ",
    longest=1000,
    equal=lambda given, answer: Fraction(given) == Fraction(answer),
):
    """strict_verifier of these steps."""

    def verifier(prompt, response, answer):
        if not ends(response.split()):
            return False
        inside = (content or last_box)(text(prompt, response))
        if inside is None or len(inside) > longest:
            return False
        inside = inside.strip(strip)
        return bool(re.fullmatch(plain, inside)) and equal(inside, answer)

    return verifier


def last_box(text):
    _, start, rest = text.rpartition(r"\boxed{")
    inside, closed, _ = rest.partition("}")
    return inside if start and closed else None


def first_box(text):
    _, start, rest = text.partition(r"\boxed{")
    inside, closed, _ = rest.partition("}")
    return inside if start and closed else None


def open_box(text):
    _, start, rest = text.rpartition(r"\boxed{")
    return rest.partition("}")[0].partition(" <eos>")[0] if start else None


def earlier_box(text):
    """The last box that is closed, though a later one may be open."""
    found = verifiers.boxes(text)
    return found[-1] if found else None


def any_number(text):
    found = re.findall(r"[+-]?[0-9]+(?:\.[0-9]+)?", text)
    return found[-1] if found else None


def wrong_strict_verifiers():
    def any_box(prompt, response, answer):
        right = response.split()[-1:] == ["<eos>"]
        return right and answer in verifiers.boxes(response)

    def computed(prompt, response, answer):
        inside = last_box(response) if response.split()[-1:] == ["<eos>"] else None
        return inside is not None and verifiers.value_of(inside) == Fraction(answer)

    def python_float(prompt, response, answer):
        inside = last_box(response) if response.split()[-1:] == ["<eos>"] else None
        try:
            return inside is not None and float(inside) == float(answer)
        except ValueError:
            return False

    return {
        "need not end": strict(ends=lambda words: True),
        "<eos> anywhere": strict(ends=lambda words: "<eos>" in words),
        "ends with something like <eos>": strict(ends=lambda words: words[-1:] >= ["<e"]),
        "the prompt's box": strict(text=lambda prompt, response: prompt + response),
        "the first box": strict(content=first_box),
        "any box": any_box,
        "an open box": strict(content=open_box),
        "an earlier box, if the last one is open": strict(content=earlier_box),
        "the last number": strict(content=any_number),
        "computed": computed,
        "Python's float": python_float,
        "compared as texts": strict(equal=lambda given, answer: given == answer),
        "compared within .01": strict(
            equal=lambda given, answer: abs(float(given) - float(answer)) < 0.01
        ),
        "compared as floats": strict(
            equal=lambda given, answer: float(given) == float(answer)
        ),
        "rounded": strict(
            equal=lambda given, answer: round(float(given)) == round(float(answer))
        ),
        "without its sign": strict(
            equal=lambda given, answer: abs(Fraction(given)) == abs(Fraction(answer))
        ),
        "signs stripped": strict(
            strip=" +-", equal=lambda x, y: x == y.strip("-") or Fraction(x) == Fraction(y)
        ),
        "whole numbers only": strict(plain=r"[+-]?[0-9]+"),
        "no sign": strict(plain=r"[0-9]+(\.[0-9]+)?"),
        "no blanks": strict(strip="x"),
        "digits of all scripts": strict(plain=r"[+-]?\d+(\.\d+)?"),
        "a point without digits": strict(plain=r"[+-]?[0-9]*\.?[0-9]*[0-9.]"),
        "units": strict(plain=r"[+-]?[0-9]+(\.[0-9]+)?.*", equal=units_equal),
        "raises for a very long number": strict(longest=10**9),
        "everything": lambda prompt, response, answer: True,
        "nothing": lambda prompt, response, answer: False,
    }


def units_equal(given, answer):
    return Fraction(re.match(r"[+-]?[0-9]+(\.[0-9]+)?", given)[0]) == Fraction(answer)


def wrong_exploits():
    def in_place_of(fault, response):
        def exploit(name, prompt):
            return response(prompt) if name == fault else solutions.exploit(name, prompt)

        return exploit

    def total(prompt):
        return sum(map(int, re.search(r"is (.*?)\?", prompt)[1].split(" + ")))

    right = {"the right answer": lambda prompt: rf"\boxed{{{total(prompt)}}} <eos>"}
    found = {}
    for fault in ("anywhere", "cut_off", "evaluates", "prompts_box"):
        found[f"{fault}: the right answer"] = in_place_of(fault, right["the right answer"])
    return found | {
        "anywhere: the answer, computed": in_place_of("anywhere", lambda p: str(total(p))),
        "anywhere: too few numbers": in_place_of("anywhere", lambda p: "1 2 3 4 5"),
        "anywhere: too many numbers": in_place_of(
            "anywhere", lambda p: " ".join(map(str, range(1000)))
        ),
        "cut_off: not cut off": in_place_of("cut_off", lambda p: str(total(p))),
        "cut_off: cut in the wrong place": in_place_of(
            "cut_off", lambda p: str(total(p)).rjust(61) + "0"
        ),
        "evaluates: the answer, computed": in_place_of(
            "evaluates", lambda p: rf"\boxed{{{total(p)} + 0}} <eos>"
        ),
        "evaluates: without a box": in_place_of("evaluates", lambda p: "8 + 3 <eos>"),
        "prompts_box: the prompt's box, copied": in_place_of(
            "prompts_box", lambda p: "".join(re.findall(r"\\boxed\{[0-9]+\}", p)) + " <eos>"
        ),
        "rounds: a wrong number": in_place_of("rounds", lambda p: r"\boxed{0} <eos>"),
        "strips_signs: a wrong number": in_place_of(
            "strips_signs", lambda p: r"\boxed{4} <eos>"
        ),
        "the same for all": lambda name, prompt: r"\boxed{11} <eos>",
        "no text": lambda name, prompt: None,
    }


def wrong_hacks():
    strict_ones = wrong_strict_verifiers().items()
    found = {f"verifier: {name}": {"strict_verifier": f} for name, f in strict_ones}
    exploits = wrong_exploits().items()
    return found | {f"exploit: {name}": {"exploit": f} for name, f in exploits}


def right_hacks():
    def by_position(prompt, response, answer):
        words = response.rstrip().rsplit(None, 1)
        start = response.rfind(r"\boxed{")
        if start < 0 or not words or words[-1] != "<eos>":
            return False
        end = response.find("}", start)
        match = re.fullmatch(r"\s*([-+]?[0-9]+(?:\.[0-9]+)?)\s*", response[start + 7 : end])
        if end < 0 or not match:
            return False
        try:
            return Decimal(match[1]) == Decimal(answer)
        except ArithmeticError:
            return False

    def shorter(fault, prompt):
        if fault == "anywhere":
            return " ".join(str(x) for x in range(5, 46))
        return solutions.exploit(fault, prompt)

    return {
        "template": {"strict_verifier": strict()},
        "by position, decimal": {"strict_verifier": by_position},
        "shorter exploit": {"exploit": shorter},
    }


# ------------------------------------------------------------------------------ 14. statistics
def wrong_statistics():
    def differences(
        keep=lambda row: True, order=int, combine=lambda a, b: a - b, need=set.__and__
    ):
        def function(rows, method, other, score, grade="hard", temperature="0.6"):
            found = {method: {}, other: {}}
            for row in rows:
                if row["method"] in found and keep(row, grade, temperature):
                    found[row["method"]][row["seed"]] = float(row[score])
            both = sorted(need(set(found[method]), set(found[other])), key=order)
            return [combine(found[method].get(s, 0), found[other].get(s, 0)) for s in both]

        return function

    def right_rows(row, grade, heat):
        return row["grade"] == grade and row["temperature"] == heat

    def by_position(rows, method, other, score, grade="hard", temperature="0.6"):
        kept = [row for row in rows if right_rows(row, grade, temperature)]
        left = [float(row[score]) for row in kept if row["method"] == method]
        right = [float(row[score]) for row in kept if row["method"] == other]
        return [a - b for a, b in zip(left, right)]

    def interval(draw=None, level=lambda c: (1 - c) / 2, statistic=np.mean, rng=None):
        def function(values, draws=10_000, seed=0, confidence=0.95):
            g = (rng or np.random.default_rng)(seed)
            x = np.array(values)
            made = (draw or resample)(g, x, draws)
            low = level(confidence)
            ends = np.quantile(statistic(made, axis=1), [low, 1 - low])
            return float(ends[0]), float(ends[1])

        return function

    def resample(g, x, draws):
        return g.choice(x, (draws, len(x)))

    def normal(values, draws=10_000, seed=0, confidence=0.95):
        x = np.array(values)
        error = x.std(ddof=1) / math.sqrt(len(x))
        return x.mean() - 1.96 * error, x.mean() + 1.96 * error

    def std_by(weight=None, estimate=None, last=lambda m, s: math.sqrt(max(0.0, s - m * m))):
        def function(p, n, k):
            mean = square = 0.0
            for c in range(n + 1):
                chance = math.comb(n, c) * p**c * (1 - p) ** (n - c)
                x = (estimate or reference.pass_at_k)(n, c, k)
                mean += chance * x
                square += chance * x * x
            return last(mean, square)

        return function

    def repeats(z=2.801585, whole=math.ceil, power=2, least=2, factor=1.0):
        def function(std, difference):
            need = whole(factor * (z * std / abs(difference)) ** power)
            return max(least, need)

        return function

    def holm(factor=lambda m, place: m - place, monotone=True, most=1.0, back=True):
        def function(p_values):
            m = len(p_values)
            order = sorted(range(m), key=lambda i: p_values[i])
            out, largest = [0.0] * m, 0.0
            for place, i in enumerate(order):
                x = min(most, factor(m, place) * p_values[i])
                largest = max(largest, x) if monotone else x
                out[i] = largest
            return out if back else sorted(out)

        return function

    def holm_in_place(p_values):
        p_values[:] = holm()(p_values)
        return p_values

    tables = {
        "seed_differences": {
            "other minus method": differences(right_rows, combine=lambda a, b: b - a),
            "all temperatures": differences(lambda row, g, heat: row["grade"] == g),
            "all grades": differences(lambda row, g, heat: row["temperature"] == heat),
            "grade fixed": differences(lambda row, g, heat: right_rows(row, "hard", heat)),
            "seeds as texts": differences(right_rows, order=str),
            "seeds of one method": differences(right_rows, need=set.__or__),
            "by position, not by seed": by_position,
            "absolute differences": differences(right_rows, combine=lambda a, b: abs(a - b)),
        },
        "bootstrap_interval": {
            "of single values": lambda values, draws=1, seed=0, confidence=0.95: tuple(
                np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
            ),
            "normal": normal,
            "one-sided level": interval(level=lambda c: 1 - c),
            "confidence fixed": interval(level=lambda c: 0.025),
            "medians": interval(statistic=np.median),
            "without replacement": interval(
                lambda g, x, draws: np.array([g.permutation(x) for _ in range(500)])
            ),
            "resamples of half the size": interval(
                lambda g, x, draws: g.choice(x, (draws, len(x) // 2))
            ),
            "seed unused": interval(rng=lambda seed: np.random.default_rng(0)),
            "another one at each call": interval(rng=lambda seed: np.random.default_rng()),
            "ten draws": interval(lambda g, x, draws: resample(g, x, 10)),
        },
        "pass_at_k_std": {
            "variance": std_by(last=lambda m, s: s - m * m),
            "as if n = k": lambda p, n, k: math.sqrt((1 - (1 - p) ** k) * (1 - p) ** k),
            "blocks": lambda p, n, k: math.sqrt((1 - (1 - p) ** k) * (1 - p) ** k * k / n),
            "share of right ones": lambda p, n, k: math.sqrt(p * (1 - p) / n),
            "biased estimate": std_by(estimate=lambda n, c, k: 1 - (1 - c / n) ** k),
            "the mean": std_by(last=lambda m, s: m),
            "root of the second moment": std_by(last=lambda m, s: math.sqrt(s)),
        },
        "repeats_needed": {
            "no power": repeats(z=1.959964),
            "one-sided": repeats(z=1.644854 + 0.841621),
            "rounded down": repeats(whole=math.floor),
            "not squared": repeats(power=1),
            "two groups": repeats(factor=2.0),
            "one is enough": repeats(least=0),
            "power of 90 %": repeats(z=1.959964 + 1.281552),
            "not whole": repeats(whole=float),
        },
        "holm": {
            "Bonferroni": holm(factor=lambda m, place: m),
            "not monotone": holm(monotone=False),
            "above 1": holm(most=INF),
            "sorted": holm(back=False),
            "Hochberg's factors": holm(factor=lambda m, place: m / (place + 1)),
            "one factor too small": holm(factor=lambda m, place: max(1, m - place - 1)),
            "not corrected": lambda p_values: list(p_values),
            "writes to its input": holm_in_place,
        },
    }
    return {
        f"{name}: {what}": {name: function}
        for name, found in tables.items()
        for what, function in found.items()
    }


def right_statistics():
    def interval(values, draws=10_000, seed=0, confidence=0.95):
        rng = random.Random(seed)
        n = len(values)
        means = sorted(sum(rng.choices(values, k=n)) / n for _ in range(draws))
        low = means[round((1 - confidence) / 2 * (draws - 1))]
        return low, means[round((1 + confidence) / 2 * (draws - 1))]

    def by_torch(values, draws=10_000, seed=0, confidence=0.95):
        x = torch.tensor(values, dtype=torch.float64)
        rows = torch.randint(
            len(x), (draws, len(x)), generator=torch.Generator().manual_seed(seed)
        )
        level = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
        return tuple(x[rows].mean(1).quantile(level).tolist())

    def std(p, n, k):
        c = np.arange(n + 1)
        chance = np.array([math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in c])
        x = np.array([reference.pass_at_k(n, int(i), k) for i in c])
        mean = (chance * x).sum()
        return float(np.sqrt((chance * (x - mean) ** 2).sum()))

    def holm(p_values):
        ranked = sorted(p_values)
        m = len(ranked)
        return [
            min(1.0, max((m - j) * q for j, q in enumerate(ranked) if q <= p))
            for p in p_values
        ]

    def repeats(std, difference):
        n = 2
        while abs(difference) < (1.959964 + 0.841621) * std / math.sqrt(n):
            n += 1
        return n

    return {
        "random": {"bootstrap_interval": interval, "holm": holm},
        "torch": {"bootstrap_interval": by_torch, "pass_at_k_std": std},
        "counting up": {"repeats_needed": repeats},
    }


# --------------------------------------------------------------------------------- all of them
def named(name, found):
    return {key: {name: function} for key, function in found.items()}


def wrong_functions(exercise):
    """Description -> the wrong function, of the exercise's first function."""
    names = {"ex12": "quantile_advantages"}
    found = wrong_solutions()[exercise]
    name = names.get(exercise) or next(iter(next(iter(found.values()))))
    return {what: changes[name] for what, changes in found.items() if name in changes}


def wrong_solutions():
    """Exercise -> description -> the functions that replace right ones."""
    found = {
        "ex1": named("group_advantages", wrong_advantages()),
        "ex2": named("policy_loss", wrong_policies()),
        "ex3": named("nucleus_mask", wrong_nuclei()),
        "ex4": named("nucleus_entropy", wrong_entropies()),
        "ex5": named("peak_mask", wrong_peaks()),
        "ex6": named("aggregate_entropy", wrong_aggregations()),
        "ex7": named("siren_loss", wrong_losses()),
        "ex8": named("micro_batch_anchor", wrong_anchors()),
        "ex9": named("pass_at_k", wrong_passes()),
        "ex10": named("maj_at_k", wrong_majorities()),
        "ex11": named("sample", wrong_samplers()),
        "ex12": wrong_drop_ins(),
        "ex13": wrong_hacks(),
        "ex14": wrong_statistics(),
    }
    for more in (
        more_mistakes.wrong_ones,
        more_mistakes.second_round,
        more_mistakes.open_kinds,
    ):
        found = joined(found, more())
    return found


def right_solutions():
    """Exercise -> description -> the functions, in other styles than siren.py's."""
    found = {
        "ex1": named("group_advantages", right_advantages()),
        "ex2": named("policy_loss", right_policies()),
        "ex3": named("nucleus_mask", right_nuclei()),
        "ex4": named("nucleus_entropy", right_entropies()),
        "ex5": named("peak_mask", right_peaks()),
        "ex6": named("aggregate_entropy", right_aggregations()),
        "ex7": named("siren_loss", right_losses()),
        "ex8": named("micro_batch_anchor", right_anchors()),
        "ex9": named("pass_at_k", right_passes()),
        "ex10": named("maj_at_k", right_majorities()),
        "ex11": named("sample", right_samplers()),
        "ex12": right_drop_ins(),
        "ex13": right_hacks(),
        "ex14": right_statistics(),
    }
    return joined(found, more_mistakes.right_ones())


def joined(found, more):
    """Both lists of each exercise; a description stands in one of them only."""
    for exercise, solutions_of in more.items():
        twice = found[exercise].keys() & solutions_of.keys()
        assert not twice, f"{exercise}: {twice} in both lists"
        found[exercise] |= solutions_of
    return found
