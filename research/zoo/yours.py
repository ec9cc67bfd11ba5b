"""Your own idea in ten lines: copy this file to research/zoo/mine.py, change it, train.

    python research/plugs.py --plug research.zoo.yours:c=0.5 --regularizer none --out runs/my

The idea here: a right answer that needed a rare token teaches more. A method is a few
functions of the mini-batch v (see core.MiniBatch): v.adv, v.logp, v.entropy and v.mask are
[B, T], and v.rewards is [B]. None of them has a gradient. v.options and v.state hold numbers.

    advantages(v)        -> A' [B, T], what A becomes
    term(now, v)         -> x [B, T], a loss of each token; only now["logp"] and now["entropy"]
                            have a gradient, so use these here
    term_weights(v)      -> w [B, T] or a number, of all rows
    controller(last, o)  -> {"coefficient": ...}, v.state of this step, from the record of the
                            step before (last["entropy"] is mean H)
    start={"coefficient": 0.0} is the state of step 1

An option is named in four places: the function, plug, Method(options=...) and use. It has the
type of its value there, so write 1.0 and not 1 for a number with a fraction; it is 0 or more.
Everything else stays as it is: groups, clipping, micro-batches, checkpoints, evaluation.
"""

from __future__ import annotations

import torch

from research.zoo import Method, use


def rare_tokens(adv: torch.Tensor, logp: torch.Tensor, c: float) -> torch.Tensor:
    """A'_t = A_t (1 + c (1 - pi_t)) where A_t > 0, else A_t. c = 0 is Dr.GRPO.

    >>> rare_tokens(torch.tensor([0.5, 0.5, -0.5]), torch.tensor([0.9, 0.1, 0.1]).log(), c=1.0)
    tensor([ 0.5500,  0.9500, -0.5000])
    """
    return adv * torch.where(adv > 0, 1 + c * (1 - logp.exp()), 1.0)


def plug(c: str = "0.5") -> None:
    """What --plug research.zoo.yours:c=0.5 does."""
    method = Method(
        "rare tokens", 0, "nobody's yet", options={"c": 0.5},
        advantages=lambda v: rare_tokens(v.adv, v.logp, v.options.c),
    )  # fmt: skip
    use(method, c=c)
