"""The solution of exercise 12: the quantile baseline of QAE as a drop-in for siren.py.

    python research/plugs.py --plug exercises.qae                 # K = 0.4, as in the paper
    python research/plugs.py --plug exercises.qae:quantile=0.6    # a higher one

QAE is "Quantile Advantage Estimation", arXiv 2509.22611.
"""

import functools
import math

import siren


def quantile_advantages(rewards, group_size, algorithm="dr_grpo", quantile=0.4):
    """A_i = r_i - the K-quantile of its group's r: the smallest reward x with F(x) >= K.

    F(x) is the share of the group's rewards that are at most x, and `quantile` is K, above 0
    and at most 1. rewards [B], a prompt's responses side by side -> A [B]. "grpo" divides by
    the group's standard deviation as well, as group_advantages does.

    >>> import torch
    >>> quantile_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4)  # F(0) = 3/4, so x = 0
    tensor([1., 0., 0., 0.])
    >>> quantile_advantages(torch.tensor([1.0, 1.0, 1.0, 0.0]), 4)  # F(0) = 1/4, so x = 1
    tensor([ 0.,  0.,  0., -1.])
    """
    groups = rewards.view(-1, group_size)
    rank = math.ceil(quantile * group_size - 1e-9)  # 0.28 * 25 is 7.000000000000001
    adv = groups - groups.kthvalue(rank, 1, keepdim=True).values
    if algorithm == "grpo":
        adv = adv / (groups.std(1, keepdim=True) + 1e-6)
    return adv.view(-1)


def plug(quantile="0.4"):
    """Put quantile_advantages into siren.py; the text `quantile` is K.

    ValueError unless 0 < K <= 1.
    """
    if not 0 < float(quantile) <= 1:
        raise ValueError(f"quantile={quantile}: must be above 0 and at most 1")
    siren.group_advantages = functools.partial(quantile_advantages, quantile=float(quantile))
