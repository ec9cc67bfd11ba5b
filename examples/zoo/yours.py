"""Your own idea in ten lines: copy this file, change the function, train.

    python siren.py --regularizer none --plug examples.zoo.yours:c=0.5

The idea here: a right answer that needed a rare token teaches more. A method is a few functions of
the mini-batch v (see core.MiniBatch): v.adv, v.logp, v.entropy, v.mask, v.rewards, ... [B, T].

    advantages    what A becomes, for each token
    term          a loss for each token, with a gradient; term_weights: its weight
    controller    the numbers of this step from the record of the step before; v.state has them

Everything else stays as it is: groups, clipping, micro-batches, checkpoints, evaluation.
"""

from __future__ import annotations

import torch

from examples.zoo import Method, use


def rare_tokens(adv: torch.Tensor, logp: torch.Tensor, c: float) -> torch.Tensor:
    """A'_t = A_t (1 + c (1 - pi_t)) where A_t > 0, else A_t. c = 0 is Dr.GRPO.

    >>> rare_tokens(torch.tensor([0.5, 0.5, -0.5]), torch.tensor([0.9, 0.1, 0.1]).log(), c=1.0)
    tensor([ 0.5500,  0.9500, -0.5000])
    """
    return adv * torch.where(adv > 0, 1 + c * (1 - logp.exp()), 1.0)


def plug(c: str = "0.5") -> None:
    """What --plug examples.zoo.yours:c=0.5 does."""
    method = Method(
        "rare tokens", 0, "nobody's yet", options={"c": 0.5},
        advantages=lambda v: rare_tokens(v.adv, v.logp, v.options.c),
    )  # fmt: skip
    use(method, c=c)
