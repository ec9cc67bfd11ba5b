"""Methods that change the advantage. Tensors in, tensors out, nothing has a gradient.

adv (A) is Dr.GRPO's, reward - group mean, one for each token [B, T]; rewards [B], the
responses of a prompt side by side; entropy is H in nats; mask [B, T] bool.
"""

from __future__ import annotations

import math

import torch

Tensor = torch.Tensor


def entropy_advantage(adv: Tensor, entropy: Tensor, alpha: float, kappa: float) -> Tensor:
    """Entropy Advantage (6): A'_t = A_t + min(alpha H_t, |A_t| / kappa).

    Right tokens count more, wrong ones less, where the policy was undecided. H has no
    gradient, so this is no entropy bonus. kappa > 1 keeps the sign of A; where A = 0 nothing
    changes.
    Paper: alpha 0.4, kappa 2 (the SIREN repository: kappa 1). Source: arXiv 2506.14758. Sure:
    high.

    >>> adv, h = torch.tensor([[1, -0.5, 0.2, -0.5]]), torch.tensor([[0.5, 2, 1, 0.3]])
    >>> entropy_advantage(adv, h, alpha=0.4, kappa=2)
    tensor([[ 1.2000, -0.2500,  0.3000, -0.3800]])
    >>> entropy_advantage(adv, h, alpha=0.4, kappa=1)  # the second token is excused
    tensor([[ 1.2000,  0.0000,  0.4000, -0.3800]])
    """
    return adv + torch.minimum(alpha * entropy, adv.abs() / kappa)


def quantile_advantage(rewards: Tensor, group_size: int, quantile: float) -> Tensor:
    """QAE (8): A_i = R_i - b, where b is the K-quantile of the group, not its mean -> [B].

    b is the smallest reward x of the group for which a share of at least K is <= x. With
    rewards 0 and 1: if at most (1 - K) of the group is right, b = 0 and only right responses
    teach; else b = 1 and only wrong ones do. The paper also divides by the standard deviation,
    Dr.GRPO doesn't.
    Paper: K 0.4, or 0.6 if entropy collapses. Source: arXiv 2509.22611. Sure: high.

    >>> quantile_advantage(torch.tensor([1.0, 0, 0, 0]), 4, 0.4), 1 / 4  # a rare success
    (tensor([1., 0., 0., 0.]), 0.25)
    >>> quantile_advantage(torch.tensor([1.0, 1, 1, 0]), 4, 0.4)  # a rare failure
    tensor([ 0.,  0.,  0., -1.])
    """
    groups = rewards.view(-1, group_size)
    rank = max(1, math.ceil(quantile * group_size - 1e-9))  # .28 * 25 is above 7 in floats
    return (groups - groups.kthvalue(rank, 1, keepdim=True).values).view(-1)


def low_confidence(logp: Tensor, mask: Tensor, share: float = 0.2) -> Tensor:
    """c(o) of ARM: exp of the mean logp of the response's least likely `share` of tokens.

    logp, mask [B, T] -> [B].

    >>> logp = torch.tensor([[0.9, 0.95, 0.99, 0.5, 0.4, 0.97, 0.99, 0.98, 0.9, 0.99]]).log()
    >>> low_confidence(logp, logp < 0)  # sqrt(.5 * .4)
    tensor([0.4472])
    """
    count = (share * mask.sum(1, keepdim=True) - 1e-6).ceil().clamp(min=1)  # [B, 1]
    lowest = logp.masked_fill(~mask, torch.inf).sort(1).values
    chosen = torch.arange(mask.shape[1], device=mask.device) < count
    return (torch.where(chosen, lowest, 0.0).sum(1) / count[:, 0]).exp()


def arm(adv: Tensor, old_logp: Tensor, rewards: Tensor, mask: Tensor, group_size: int,
        alpha: float, share: float = 0.2) -> Tensor:  # fmt: skip
    """ARM, of ProGRPO (11): A'_t = A_t + alpha (c(q) - c(o)), but A'_t = A_t if all are wrong.

    c(o), low_confidence, is how sure the response was where it was least sure. So an unsure
    right answer is rewarded more, and an unsure wrong one punished less; a large alpha can
    turn the sign.
    Our reading: c(q), the same measure of the prompt's tokens, is the group's mean of c(o)
    here, because the toy's prompts are random digits; the shifts of a group add up to 0.
    Paper: share 0.2, clip 0.2 / 0.28; alpha not found. Sources disagree about groups that are
    all right; here they have the shift. Source: arXiv 2602.05281. Sure: medium, the last two
    low.

    >>> old = torch.tensor([[0.2], [0.6]]).log()  # two responses of one token: c(o) = .2, .6
    >>> arm(torch.tensor([[0.5], [-0.5]]), old, torch.tensor([1.0, 0]), old < 0, 2, alpha=0.3)
    tensor([[ 0.5600],
            [-0.5600]])
    """
    c = low_confidence(old_logp, mask, share).view(-1, group_size)
    shift = alpha * (c.mean(1, keepdim=True) - c)  # [groups, G]
    any_right = rewards.view(-1, group_size).sum(1, keepdim=True) > 0
    return adv + torch.where(any_right, shift, 0.0).view(-1, 1)
