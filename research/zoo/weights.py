"""Methods that weigh tokens in the policy loss, or leave them out. No weight has a gradient.

Each returns weights [B, T]; a weight is a factor of the advantage. logp and entropy (H, nats)
are those of the policy as it is now, old_logp of the one that sampled; all [B, T], of a whole
mini-batch, as means, quantiles and the like are taken over it. adv (A) [B, T]; mask [B, T]
bool.
"""

from __future__ import annotations

import math

import torch

Tensor = torch.Tensor


def how_many(share: float, mask: Tensor) -> int:
    """max(1, floor(share N)) of the N tokens; 0 for a share of 0.

    >>> how_many(0.0002, torch.ones(64, 12)), how_many(0.01, torch.ones(64, 12))
    (1, 7)
    """
    return max(1, math.floor(share * float(mask.sum()) + 1e-6)) if share else 0


def covariance(adv: Tensor, logp: Tensor, mask: Tensor) -> Tensor:
    """cov_t = (A_t - mean A) (logp_t - mean logp), means over the tokens; 0 in padding.

    Its mean is, to first order, how fast the update lowers the entropy: likely tokens that
    were right, and rare ones that were wrong, have a large covariance.

    >>> adv, pi = torch.tensor([[0.5, 0.5, -0.5, -0.5]]), torch.tensor([[0.9, 0.1, 0.9, 0.1]])
    >>> covariance(adv, pi.log(), pi > 0)  # log 3 / 2
    tensor([[ 0.5493, -0.5493, -0.5493,  0.5493]])
    """
    centred = [x - torch.where(mask, x, 0.0).sum() / mask.sum() for x in (adv, logp)]
    return torch.where(mask, centred[0] * centred[1], 0.0)


def clip_cov(
    cov: Tensor, mask: Tensor, rho: float, low: float, high: float, generator: torch.Generator
) -> Tensor:
    """Clip-Cov (4): weight 0 for how_many(rho) random tokens with low < cov_t < high, else 1.

    cov is covariance(). The tokens that cost most entropy are left out of a step, at random.
    Paper: rho 0.0002, low 1, high 5, PPO clip opened to 1 / 1. These bounds are for advantages
    that are divided by their standard deviation; Dr.GRPO's are smaller, so the zoo gives
    quantiles of cov. Source: arXiv 2505.22617, code PRIME-RL/Entropy-Mechanism-of-RL, which
    takes the means over a micro-batch and spares tokens that the PPO clip has caught. Sure:
    high.

    >>> cov = torch.tensor([[0.1, 2.0, 9.0]])
    >>> clip_cov(cov, cov > 0, rho=0.5, low=1, high=5, generator=torch.Generator())
    tensor([[1., 0., 1.]])
    """
    found = (mask & (cov > low) & (cov < high)).flatten().nonzero()[:, 0]
    order = torch.randperm(len(found), generator=generator).to(found.device)
    left_out = found[order[: how_many(rho, mask)]]
    return torch.ones_like(cov).flatten().index_fill(0, left_out, 0.0).view_as(cov)


def top_tokens(values: Tensor, mask: Tensor, count: int) -> Tensor:
    """Which are the `count` tokens of largest value? Exactly as many, also of equal ones.

    >>> values = torch.tensor([[3.0, 1], [3, 9]])
    >>> top_tokens(values, values < 9, 1)  # the 9 is padding
    tensor([[ True, False],
            [False, False]])
    """
    order = values.masked_fill(~mask, -torch.inf).flatten().sort(descending=True, stable=True)
    chosen = torch.zeros_like(mask).flatten().index_fill(0, order.indices[:count], True)
    return chosen.view_as(mask) & mask


def forking_tokens(entropy: Tensor, mask: Tensor, share: float) -> Tensor:
    """80/20 (7): only the ceil(share N) tokens of highest H teach; each weighs N / that many.

    The factor makes the policy loss a mean over the chosen tokens, on the scale of Dr.GRPO's.
    Paper: share 0.2, clip 0.2 / 0.28. Source: arXiv 2506.01939, code Shenzhi-Wang/
    Beyond-the-80-20-Rule-RLVR, which takes the share of a micro-batch. Sure: high.

    >>> h = torch.tensor([[0.1, 0.2, 2.0, 0.3, 1.5], [0.05, 0.1, 0.2, 0.1, 9.0]])
    >>> forking_tokens(h, h < 9, share=0.2)  # the 9.0 is padding; ceil(1.8) = 2 of 9 tokens
    tensor([[0.0000, 0.0000, 4.5000, 0.0000, 4.5000],
            [0.0000, 0.0000, 0.0000, 0.0000, 0.0000]])
    """
    total = int(mask.sum())
    count = max(1, math.ceil(share * total - 1e-6))
    return top_tokens(entropy, mask, count) * (total / count)


def forking_tokens_per_response(entropy: Tensor, mask: Tensor, share: float) -> Tensor:
    """80/20 as the SIREN repository runs it: 1 where H exceeds its response's own quantile.

    The quantile is 1 - share, and the sum is not divided by the share: the loss is much
    smaller.

    >>> h = torch.tensor([[0.1, 0.2, 2.0, 0.3, 1.5], [0.05, 0.1, 0.2, 0.1, 9.0]])
    >>> forking_tokens_per_response(h, h < 9, share=0.2)  # above 1.6, above .14
    tensor([[0., 0., 1., 0., 0.],
            [0., 0., 1., 0., 0.]])
    """
    own = entropy.masked_fill(~mask, torch.nan)
    return ((entropy > own.nanquantile(1 - share, 1, keepdim=True)) & mask).to(entropy.dtype)


def positive_weight(adv: Tensor, lam: float) -> Tensor:
    """PAR (9): weight lam where A > 0, else 1. With lam = 0 only wrong responses teach.

    lam follows the entropy, see positive_coefficient: no entropy gradient is needed.
    Source: arXiv 2511.05993. Sure: high.

    >>> positive_weight(torch.tensor([[0.5, 0.0, -0.5]]), lam=0.2)
    tensor([[0.2000, 1.0000, 1.0000]])
    """
    return torch.where(adv > 0, lam, torch.ones_like(adv))


def positive_coefficient(
    lam: float, entropy: float, target: float, step: float = 0.05
) -> float:
    """PAR's controller: lam falls by `step` while mean H is below the target, else it rises.

    It stays within 0 and 1.
    Paper: target (delta) 0.2 nats, step (D) 0.05, lam 0 at first. A target is a matter of
    scale: in the zoo it is a share of the initial entropy.

    >>> from itertools import accumulate  # lam = 0, then H = .10, .15, .25, .30, .19
    >>> steps = [0, 0.10, 0.15, 0.25, 0.30, 0.19]
    >>> steps = accumulate(steps, lambda lam, h: positive_coefficient(lam, h, target=0.2))
    >>> [round(lam, 2) for lam in steps]
    [0, 0.0, 0.0, 0.05, 0.1, 0.05]
    """
    return min(1.0, max(0.0, lam - step if entropy < target else lam + step))


def steer(
    adv: Tensor, logp: Tensor, old_logp: Tensor, entropy: Tensor, mask: Tensor, w_min: float
) -> Tensor:
    """STEER (10): w_t = exp(-k |Om_t|), k = -ln(w_min) / max(0.02, max |Om|).

    Om_t = A_t r_t (1 - pi_t) (ln pi_t + H_t), r_t = pi_t / old_pi_t, estimates how far the
    token's update lowers the entropy (where it is negative, raises it). The largest |Om| gets
    the weight w_min, unless all are below 0.02.
    Paper: w_min 0.7 (its code: 0.8), clip 0.2 / 0.28. Source: code zz-haooo/STEER, which takes
    H from the policy that sampled; here it is the policy as it is now. Sure: high.

    >>> pi, h = torch.tensor([[0.9, 0.5, 0.1]]), torch.tensor([[0.325083, 0.693147, 0.897946]])
    >>> adv = torch.tensor([[1.0, 1, -1]])
    >>> steer(adv, pi.log(), pi.log(), h, pi > 0, w_min=0.7)  # |Om| = .022, 0, 1.264
    tensor([[0.9938, 1.0000, 0.7000]])
    """
    change = adv * (logp - old_logp).exp() * (1 - logp.exp()) * (logp + entropy)
    change = torch.where(mask, change, 0.0).abs()
    k = -math.log(w_min) / change.max().clamp(min=0.02)
    return (-k * change).exp()
