"""The official code's rules, under siren.py's names: where they differ, and what that does.

    python research/plugs.py --plug research.official                 # trains with all of them
    python research/plugs.py --plug research.official:exclusive=1     # trains with one of them
    from research import official
    official.nucleus_entropy(logits, 0.8)        # one rule on tensors
    with official.rules(exclusive=True):         # some of them, for a while
        siren.train(siren.Run(cfg))

The official code is the repository Linn3a/siren, a fork of verl, as of December 2025. Its
rules are written here again from their meaning. docs/departures.md says why siren.py departs.

    exclusive        the token with which the sum reaches p is left out of the nucleus, which
                     may be empty: then H' is 0 and has no gradient. Only the 10000 likeliest
                     tokens are looked at.
    strict           a peak is H' > theta, so ties and one-token responses have none
    per_micro_batch  each micro-batch squares its own H_agg - H*, so its size changes the loss
    dual_clip        for A < 0 a token's loss is at most c |A|, c = 3
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # siren.py is in the folder above

import siren

Tensor = torch.Tensor
MOST = 10_000  # tokens that can be in the nucleus
OVER_TOKENS = ("clip_fraction", "approx_kl", "peak_fraction")  # what is a mean over tokens
# siren.py's own, also while the rules are in force
siren_nucleus = siren.nucleus
siren_policy_loss = siren.policy_loss


def nucleus(log_pi: Tensor, top_p: float) -> Tensor:
    """siren.nucleus by the rule `exclusive`: the likeliest tokens, p at most in sum.

    log_pi [..., V] -> log q [..., K], the likeliest first, and -inf outside (everywhere, if
    the nucleus is empty).

    >>> nucleus(torch.tensor([0.6, 0.3, 0.06, 0.04]).log(), 0.8).exp()  # 0.6, then 0.9 > 0.8
    tensor([1., 0., 0., 0.])
    """
    if top_p == 1:
        return siren_nucleus(log_pi, top_p)
    top, ids = log_pi.detach().topk(min(MOST, log_pi.shape[-1]))
    inside = (top.exp().cumsum(-1) <= top_p) & (top > -torch.inf)
    empty = ~inside.any(-1, keepdim=True)
    log_q = log_pi.gather(-1, ids).masked_fill(~inside, -torch.inf)
    log_q = log_q.masked_fill(empty, 0.0).log_softmax(-1)  # an empty set would give NaN
    return log_q.masked_fill(~inside, -torch.inf)


def nucleus_entropy(logits: Tensor, top_p: float) -> Tensor:
    """H' by the rule `exclusive`, in nats: logits [..., V] -> [...].

    >>> nucleus_entropy(torch.tensor([0.5, 0.25, 0.15, 0.1]).log(), 0.8)  # q is 2/3 and 1/3
    tensor(0.6365)
    """
    return siren.entropy_of(nucleus(logits.log_softmax(-1), top_p))


def peak_mask(entropy: Tensor, mask: Tensor, quantile: float) -> Tensor:
    """siren.peak_mask by the rule `strict`: H' > theta, in the response; 0 switches it off.

    >>> h = torch.tensor([[0.5, 0.5, 0.5]])
    >>> peak_mask(h, torch.ones(1, 3).bool(), 0.8)  # of tied values none is a peak
    tensor([[False, False, False]])
    """
    if quantile == 0 or mask.numel() == 0:
        return mask
    h = entropy.detach()
    own = h.masked_fill(~mask, torch.nan)
    # the value at or below theta: the same H' exceed it, and rounding can't change it
    level = min(1.0, quantile + 1e-6)
    theta = torch.nanquantile(own, level, 1, keepdim=True, interpolation="lower")
    return (h > theta) & mask


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    adv: Tensor,
    *rest: object,
    dual_clip: float = 3.0,
    **how: object,
) -> tuple[Tensor, dict[str, Tensor]]:
    """siren.policy_loss by the rule `dual_clip`: where A < 0, the gain is no less than c A.

    dual_clip is c; all other arguments are siren.policy_loss's.

    >>> logp, old_logp = torch.tensor([[0.8]]).log(), torch.tensor([[0.1]]).log()  # ratio 8
    >>> mask = torch.ones(1, 1).bool()
    >>> policy_loss(logp, old_logp, torch.tensor([-1.0]), mask, max_tokens=1)[0]  # 3, not 8
    tensor(3.)
    """
    # capping the ratio where A < 0 caps the gain, and leaves the gradient 0 beyond the cap
    most = torch.where(adv < 0, torch.tensor(dual_clip, dtype=logp.dtype).log(), torch.inf)
    most = most.view(len(logp), -1).to(logp.dtype)  # [B, 1] or [B, T]
    capped = torch.minimum(logp, old_logp + most)
    loss, _ = siren_policy_loss(capped, old_logp, adv, *rest, **how)
    _, stats = siren_policy_loss(logp, old_logp, adv, *rest, **how)
    return loss, stats


def update(
    run: siren.Run, rollout: siren.Rollout, old_logp: Tensor, adv: Tensor
) -> dict[str, float]:
    """siren.update by the rule `per_micro_batch`: a mean over the micro-batches."""
    cfg = run.cfg
    clip = (cfg.max_tokens, cfg.clip_low, cfg.clip_high, cfg.algorithm)
    pull = (run.anchor, cfg.beta, cfg.peak_quantile, cfg.regularizer)
    metrics: dict[str, float] = defaultdict(float)
    run.optimizer.zero_grad()
    for rows in torch.arange(len(adv)).split(cfg.micro_batch_size):
        part = rollout.rows(rows)
        mask = part.mask
        now = siren.score(run.model, part, cfg)  # [b, T] each, with gradient
        policy, info = siren.policy_loss(now["logp"], old_logp[rows], adv[rows], mask, *clip)
        loss, more_info = siren.siren_loss(policy, now["nucleus_entropy"], mask, *pull)
        share = len(rows) / len(adv)  # each sampled response has a token
        (share * loss).backward()
        token_share = (mask.sum() / rollout.mask.sum()).item()
        for name, value in (info | more_info).items():
            metrics[name] += (token_share if name in OVER_TOKENS else share) * value.item()
    norm = torch.nn.utils.clip_grad_norm_(run.weights, cfg.grad_clip, error_if_nonfinite=True)
    run.optimizer.step()
    return {**metrics, "grad_norm": norm.item()}


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
        functions["update"] = update
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
    """Inside the block these rules are siren.py's; after it siren.py's own are back."""
    functions = chosen(exclusive, strict, per_micro_batch, dual_clip)
    before = {name: getattr(siren, name) for name in functions}
    try:
        vars(siren).update(functions)
        yield
    finally:
        vars(siren).update(before)


def plug(**options: str) -> None:
    """For --plug research.official: all the rules, or only those that are named, as in
    --plug research.official:exclusive=1,dual_clip=3."""
    every = {"exclusive": "1", "strict": "1", "per_micro_batch": "1", "dual_clip": "3"}
    flags = options or every
    clip = float(flags.get("dual_clip", 0)) or None
    wanted = dict.fromkeys(("exclusive", "strict", "per_micro_batch"), False)
    wanted |= {name: value == "1" for name, value in flags.items() if name != "dual_clip"}
    vars(siren).update(chosen(**wanted, dual_clip=clip))
