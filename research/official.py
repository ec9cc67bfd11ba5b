"""The official code's rules, under siren.py's names: where they differ, and what that does.

    python siren.py --plug examples.official     # trains with all of them
    from examples import official
    official.nucleus_entropy(logits, 0.8)        # one rule on tensors
    with official.rules(exclusive=True):         # some of them, for a while
        siren.train(cfg)

The official code is the repository Linn3a/siren, a fork of verl, as of December 2025. Its rules are
written here again from their meaning; docs/departures.md says why siren.py has others.

    exclusive        the token that crosses p is left out of the nucleus, which may be empty: then
                     H' is 0 and has no gradient. Only the 10000 likeliest tokens are looked at.
    strict           a peak is H' > q, so ties and one-token responses have none
    per_micro_batch  each micro-batch squares its own H_agg - H*, so the loss depends on their size
    dual_clip        for A < 0 a token's loss is at most c |A|, c = 3
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # siren.py is in the folder above

import siren

Tensor = torch.Tensor
MOST = 10_000  # tokens that can be in the nucleus
# siren.py's own, also while the rules are in force
siren_nucleus, siren_policy_loss = siren.nucleus, siren.policy_loss


def nucleus(log_pi: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """siren.nucleus by the rule `exclusive`: the likeliest tokens while their sum is at most p.

    log_pi [..., V] -> log q [..., k], -inf outside (everywhere, if the set is empty), and ids.

    >>> log_q, _ = nucleus(torch.tensor([0.6, 0.3, 0.06, 0.04]).log(), 0.8)  # .6, then .9 > .8
    >>> log_q.exp()
    tensor([1., 0., 0., 0.])
    """
    if top_p >= 1:
        return siren_nucleus(log_pi, top_p)
    top, ids = log_pi.detach().topk(min(MOST, log_pi.shape[-1]))
    inside = (top.exp().cumsum(-1) <= top_p) & (top > float("-inf"))
    empty = ~inside.any(-1, keepdim=True)
    log_q = log_pi.gather(-1, ids).masked_fill(~inside, float("-inf"))
    log_q = log_q.masked_fill(empty, 0.0).log_softmax(-1)  # an empty set would give NaN
    return log_q.masked_fill(~inside, float("-inf")), ids


def nucleus_mask(logits: Tensor, top_p: float) -> Tensor:
    """siren.nucleus_mask by the rule `exclusive`.

    >>> nucleus_mask(torch.tensor([0.5, 0.25, 0.15, 0.1]).log(), 0.8)
    tensor([ True,  True, False, False])
    """
    log_q, ids = nucleus(siren.log_softmax(logits), top_p)
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, ids, log_q > float("-inf"))


def nucleus_entropy(logits: Tensor, top_p: float) -> Tensor:
    """siren.nucleus_entropy by the rule `exclusive`, in nats.

    >>> nucleus_entropy(torch.tensor([0.5, 0.25, 0.15, 0.1]).log(), 0.8)  # q = 2/3, 1/3
    tensor(0.6365)
    """
    return siren.entropy_of(nucleus(siren.log_softmax(logits), top_p)[0])


def peak_mask(entropy: Tensor, mask: Tensor, quantile: float) -> Tensor:
    """siren.peak_mask by the rule `strict`: H' > q_i, in the response; quantile 0 = all of it.

    >>> peak_mask(torch.tensor([[0.5, 0.5, 0.5]]), torch.ones(1, 3), 0.8)  # ties: no peak at all
    tensor([[False, False, False]])
    """
    h, mask = entropy.detach(), mask.bool()
    if quantile == 0 or h.numel() == 0:
        return mask
    own = h.masked_fill(~mask, float("nan"))
    # the value at or below the quantile: the same H' exceed it, and rounding can't change it
    q = torch.nanquantile(own, min(1.0, quantile + 1e-6), 1, keepdim=True, interpolation="lower")
    return (h > q) & mask


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    adv: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    max_tokens: int | None = None,
    algorithm: str = "dr_grpo",
    *,
    dual_clip: float = 3.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """siren.policy_loss by the rule `dual_clip`: where A < 0, gain_t is at least dual_clip * A.

    >>> logp, old_logp = torch.tensor([[0.8]]).log(), torch.tensor([[0.1]]).log()  # ratio 8
    >>> policy_loss(logp, old_logp, torch.tensor([-1.0]), torch.ones(1, 1))[0]  # 3, not 8
    tensor(3.)
    """
    # capping the ratio where A < 0 caps the gain, and leaves the gradient 0 beyond the cap
    most = torch.where(adv < 0, torch.tensor(dual_clip, dtype=logp.dtype).log(), float("inf"))
    capped = torch.minimum(logp, old_logp + most[:, None].to(logp.dtype))
    clip = (clip_low, clip_high)
    loss, _ = siren_policy_loss(capped, old_logp, adv, mask, *clip, max_tokens, algorithm)
    _, stats = siren_policy_loss(logp, old_logp, adv, mask, *clip, max_tokens, algorithm)
    return loss, stats


def micro_batch_anchor(h_micro: Tensor, h_agg: Tensor, anchor: float) -> float:
    """siren.micro_batch_anchor by the rule `per_micro_batch`: the anchor as it is."""
    return anchor


def siren_loss(
    *args: Tensor | float, chunk: int = 0, **kwargs: object
) -> tuple[Tensor, dict[str, Tensor]]:
    """siren.siren_loss with its arguments, by all the rules. It keeps all logits: chunk is unused.

    >>> logits, tokens = torch.tensor([[[0.6, 0.3, 0.06, 0.04]]]).log(), torch.tensor([[0]])
    >>> old_logp, adv, mask = torch.tensor([[0.6]]).log(), torch.zeros(1), torch.ones(1, 1)
    >>> siren_loss(logits, tokens, old_logp, adv, mask, 1.0, beta=0.5)[0]  # H_agg = 0: 0.5 * 1
    tensor(0.5000)
    """
    with rules():  # one chunk, so that nothing is computed again after the rules are gone
        return siren.siren_loss(*args, chunk=sys.maxsize, **kwargs)


def chosen(
    exclusive: bool, strict: bool, per_micro_batch: bool, dual_clip: float | None
) -> dict[str, Callable]:
    """name in siren.py -> the function that stands in for it."""
    functions: dict[str, Callable] = {}
    if exclusive:
        functions["nucleus"] = nucleus
    if strict:
        functions["peak_mask"] = peak_mask
    if per_micro_batch:
        functions["micro_batch_anchor"] = micro_batch_anchor
    if dual_clip is not None:
        functions["policy_loss"] = partial(policy_loss, dual_clip=dual_clip)
    return functions


@contextmanager
def rules(
    exclusive: bool = True,
    strict: bool = True,
    per_micro_batch: bool = True,
    dual_clip: float | None = 3.0,
) -> Iterator[None]:
    """These rules are siren.py's inside the `with` block, and siren.py's own again after it."""
    functions = chosen(exclusive, strict, per_micro_batch, dual_clip)
    before = {name: getattr(siren, name) for name in functions}
    try:
        for name, function in functions.items():
            setattr(siren, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(siren, name, function)


def plug(**options: str) -> None:
    """For `python siren.py --plug examples.official`: all the rules, or only those that are named,
    as in `--plug examples.official:exclusive=1,dual_clip=3`."""
    flags = options or {"exclusive": "1", "strict": "1", "per_micro_batch": "1", "dual_clip": "3"}
    clip = float(flags.get("dual_clip", 0)) or None
    wanted = {name: value == "1" for name, value in flags.items() if name != "dual_clip"}
    none = dict.fromkeys(("exclusive", "strict", "per_micro_batch"), False)
    for name, function in chosen(**{**none, **wanted}, dual_clip=clip).items():
        setattr(siren, name, function)
