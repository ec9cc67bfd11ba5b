"""Methods that add a loss term, and the controllers of their coefficients.

A term is a loss for each token [B, T], which has a gradient; research/zoo/core.py adds it up
as L_DrGRPO adds up the policy loss. A controller makes this step's coefficient, a number, from
that of the step before and from what was measured there. entropy is H of the whole vocabulary,
in nats.
"""

from __future__ import annotations

import math

import torch

Tensor = torch.Tensor


def adaptive_coefficient(c: float, entropy: float, target: float, eta: float) -> float:
    """Adaptive bonus (2), controller: c <- max(0, c + eta (target - mean H)).

    The loss is -c H_t.
    The constraint "mean H is at least its initial value H0", by a Lagrange multiplier, as SAC
    has it. c is never negative, so the term can only raise H. AER (12) has the target tau H0.
    Values: eta and the first c are not in the released script. Source: the SIREN repository,
    type naive_entropy_reg_adaptive, which takes agg(H) of a micro-batch and moves c after
    each; here it is the mean of H, once per step. Sure: high.

    >>> from itertools import accumulate  # c = 0, then H = .8, .6, 1.3, 1.3
    >>> steps = [0, 0.8, 0.6, 1.3, 1.3]
    >>> steps = accumulate(steps, lambda c, h: adaptive_coefficient(c, h, target=1.0, eta=0.1))
    >>> [round(c, 2) for c in steps]
    [0, 0.02, 0.06, 0.03, 0.0]
    """
    return max(0.0, c + eta * (target - entropy))


def stepped_coefficient(
    c: float, entropy: float, target: float, delta: float, most: float = 1.0
) -> tuple[float, float]:
    """TRL's adaptive entropy (19), after Skywork-OR1: (c, what is applied of it).

    The loss is - what is applied * the mean of H over all tokens of the mini-batch.

    c rises by delta while mean H <= target, else it falls, within 0..most; it is applied only
    in the first case. TRL: delta 0.005, target 0.2 nats (a default), most 1, once per
    optimiser step; here once per step, and the target is a share of the initial entropy.
    Source: trl 1.16, GRPOConfig.use_adaptive_entropy; arXiv 2505.22312. Sure: high
    for TRL, medium for Skywork-OR1.

    >>> stepped_coefficient(0.01, 0.1, target=0.2, delta=0.005)
    (0.015, 0.015)
    >>> stepped_coefficient(0.01, 0.3, target=0.2, delta=0.005)
    (0.005, 0.0)
    """
    is_low = entropy <= target
    c = min(most, c + delta) if is_low else max(0.0, c - delta)
    return c, c if is_low else 0.0


def difficulty_weight(rewards: Tensor, group_size: int, rho: float) -> Tensor:
    """AER (12): w(g) = max(0, 1 - g / rho), g the share of right ones in the group -> [B, 1].

    The loss is -c w(g_i) H_t: prompts that are rarely solved explore more. c is
    adaptive_coefficient with the target tau H0. The parts are the paper's; the formula of w
    and its rho are our reading. Paper: tau about 0.4. Source: arXiv 2510.10959. Sure: parts
    high, formulas low.

    >>> difficulty_weight(torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 0]), 4, rho=0.5)[[0, 4]]
    tensor([[0.5000],
            [0.0000]])
    """
    share = rewards.view(-1, group_size).mean(1)
    return (1 - share / rho).clamp(min=0).repeat_interleave(group_size)[:, None]


def corridor_penalty(entropy: Tensor, history: float, k_low: float, k_high: float) -> Tensor:
    """EPO (13): P = relu(k_low Hist - H_t) + relu(H_t - k_high Hist).

    The loss is -lam (H_t - s P).
    Hist is the mean of mean H over all earlier steps; with 0 there is none yet, and P is 0.
    The weight s = alpha * corridor_weight falls from step to step.
    Paper: lam 0.001, k_low 0, k_high 2: nothing below the history is penalised. The released
    code has a constant for P, which has no gradient; this P is that of the text.
    Source: arXiv 2509.22576v2. Sure: high.

    >>> h = torch.tensor([0.0, 0.8, 2.0])
    >>> corridor_penalty(h, 0.8, 0, 2), corridor_penalty(h, 0.8, 0.8, 1.2)
    (tensor([0.0000, 0.0000, 0.4000]), tensor([0.6400, 0.0000, 1.0400]))
    """
    if history == 0:
        return torch.zeros_like(entropy)
    return (k_low * history - entropy).relu() + (entropy - k_high * history).relu()


def corridor_weight(step: float, steps: float, gamma: float) -> float:
    """EPO's beta_k = 1 + exp(-gamma k / (steps / 2)) in step k of a run. Paper: gamma 3.

    >>> [round(corridor_weight(k, 100, 3), 6) for k in (0, 25, 50, 100)]
    [2.0, 1.22313, 1.049787, 1.002479]
    """
    return 1 + math.exp(-gamma * step / (steps / 2))


def divergence(log_u: Tensor, kind: str) -> Tensor:
    """DPH-RL (14): f(u) of u = pi / pi_base, the loss of tokens that the base sampled.

        kl  u - ln u - 1                      its mean over the base's samples: KL(base || pi)
        js  u ln u - (u + 1) ln((u + 1) / 2)  ... twice the Jensen-Shannon divergence

    The samples are right responses of the base to prompts that it has mastered, so what it
    could do is rehearsed. The paper takes these prompts out of the RL batch; here they are
    drawn on their own. The paper has an alpha-divergence, too.
    Paper: eta 0.01, clip_high 0.28, 16 samples, mastered = 6/8 or 7/8 right. Source: arXiv
    2509.07430, code seamoke/DPH-RL. Sure: high.

    >>> u = torch.tensor([0.5, 1.0, 2.0])
    >>> divergence(u.log(), "kl"), divergence(u.log(), "js")
    (tensor([0.1931, 0.0000, 0.3069]), tensor([0.0849, 0.0000, 0.1699]))
    """
    log_u = log_u.clamp(-20, 20)  # so that u is finite
    u = log_u.exp()
    if kind == "kl":
        return u - log_u - 1
    if kind == "js":
        return u * log_u - (u + 1) * ((u + 1) / 2).log()
    raise ValueError(f"divergence {kind!r}: must be kl or js")


def calibration(log_gap: Tensor, adv: Tensor, slope: float) -> Tensor:
    """CalibRL (16): |A| leaky_relu(-sign(A) D, slope).

    D = logp - logp of an expert. A right token that is less likely than the expert has it is
    pulled up, a wrong one that is more likely is pushed down; beyond that, weakly away.
    Here the expert is replaced by the base policy's log-probs of the same tokens ("CalibRL
    with a reference baseline"): an expert would know the toy's gaps. The paper finds that form
    weaker.
    Paper: slope (a) 0.5, lam 0.1. Source: code zhh6425/CalibRL. Sure: high.

    >>> adv = torch.tensor([0.25, 0.75, -0.25, -0.25])
    >>> calibration(torch.tensor([0.5, -0.5, 0.5, -0.5]), adv, slope=0.5)
    tensor([-0.0625,  0.3750,  0.1250, -0.0625])
    """
    return adv.abs() * torch.nn.functional.leaky_relu(-adv.sign() * log_gap, slope)
