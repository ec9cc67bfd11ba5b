"""CURE (15): a sampler that goes back to undecided tokens and answers again from there.

The group of a prompt has n1 whole responses, and n2 new tails to each of them. For each
response one of its k positions of highest H is drawn, and its tails begin there: that token is
drawn again. What was kept is prompt: it is not trained in a tail's row. The advantage is over
the whole group. Paper: n1 4, n2 3, k 20 (of thousands of tokens), clip 0.2 / 0.28, later a
stage without it. Source: code bytedance/CURE, which also skips one-character tokens. Sure:
high.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

import siren


def cut_position(entropy: Sequence[float], k: int, rng: random.Random) -> int:
    """One of the k positions of highest H, at random, but not the first: all would be new.

    A response of one token is cut there.

    >>> {cut_position([1.9, 0.1, 1.2, 0.4, 0.9], 2, random.Random(seed)) for seed in range(9)}
    {2, 4}
    """
    order = sorted(range(1, len(entropy)), key=lambda t: -entropy[t])
    return rng.choice(order[:k] or [0])


@torch.no_grad()
def branch(
    sample: Callable,
    model: torch.nn.Module,
    task: Any,
    problems: Sequence,
    cfg: siren.Config,
    key: str,
    samples: int,
    temperature: float,
    *,
    tails: int,
    k: int,
) -> siren.Rollout:
    """A Rollout as siren.sample's. A prompt has n1 whole responses, then those of new tails.

    sample is siren.sample. samples = n1 (1 + tails). A row has all of its response, since it
    is verified as a whole. Where a token was kept, not drawn, Rollout.logp is 0: it was
    certain.
    """
    n1, rest = divmod(samples, 1 + tails)
    rule = f"must be a multiple of 1 + tails = {1 + tails}; change one"
    siren.require(n1 > 0 and rest == 0, f"--group-size {samples}: {rule}")
    whole = sample(model, task, problems, cfg, key, n1, temperature)  # [prompts * n1]
    entropy = siren.score(model, whole, cfg)["entropy"].tolist()
    rng = random.Random(f"{key}/cut")
    texts = whole.responses()
    cuts = [cut_position(h[: len(ids)], k, rng) for h, ids in zip(entropy, texts)]
    kept = [ids[:cut] for ids, cut in zip(texts, cuts)]
    prompts = [
        SimpleNamespace(prompt=problems[i // n1].prompt + ids) for i, ids in enumerate(kept)
    ]
    budget = dataclasses.replace(cfg, max_tokens=cfg.max_tokens - min(cuts))
    tail = sample(model, task, prompts, budget, f"{key}/tails", tails, temperature)

    rows = [(ids, logp) for ids, logp in zip(texts, whole.logp.tolist())]
    rows = [rows[i : i + n1] for i in range(0, len(rows), n1)]  # those of each prompt
    for j, (ids, logp) in enumerate(zip(tail.responses(), tail.logp.tolist())):
        i = j // tails
        rows[i // n1].append((kept[i] + ids, [0.0] * cuts[i] + logp))
    rows = [row for group in rows for row in group]
    # what goes beyond the response budget is cut off, as if the sampler had stopped there
    width = min(cfg.max_tokens, max(len(ids) for ids, _ in rows))
    device = whole.mask.device
    index = torch.arange(len(problems)).repeat_interleave(samples) * n1
    padded = [(ids + [task.pad_id] * width)[:width] for ids, _ in rows]
    tokens = torch.tensor(padded, device=device)
    lengths = torch.tensor([len(ids) for ids, _ in rows], device=device)[:, None]
    mask = torch.arange(width, device=device) < lengths
    logp = torch.tensor([(x + [0.0] * width)[:width] for _, x in rows], device=device)
    return siren.Rollout(whole.prompt[index], whole.prompt_mask[index], tokens, mask, logp)
