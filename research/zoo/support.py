"""Invisible Leash (18): which prompts can a policy solve at all, compared with its base model?

Source: arXiv 2507.14843. Sure: high. The paper has k of 1024 and more; with k = 64, "not
solved" means no more than "not in 64 samples".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import siren


def rewards_of(task: Any, problems: Sequence, rollout: siren.Rollout) -> torch.Tensor:
    """The reward of each response; rollout has as many responses to each problem -> [B]."""
    responses = rollout.responses()
    samples = len(responses) // len(problems)
    answers = [problem.answer for problem in problems for _ in range(samples)]
    texts = [task.decode(ids) for ids in responses]
    right = [siren.verify(x, y, task.find_answer, task.equal) for x, y in zip(texts, answers)]
    return torch.tensor(right, dtype=torch.float32, device=rollout.mask.device)


def solved(
    model: torch.nn.Module,
    task: Any,
    problems: Sequence,
    cfg: siren.Config,
    k: int,
    temperature: float,
) -> list[bool]:
    """Is one of k samples right? For each problem; every draw is a function of cfg.seed."""
    key = f"{cfg.seed}/support/eval"
    rollout = siren.sample(model, task, problems, cfg, key, k, temperature)
    return rewards_of(task, problems, rollout).view(-1, k).any(1).tolist()


def support(base: Sequence[bool], policy: Sequence[bool]) -> dict[str, float]:
    """Support retention SRR, net discovery NDR, their harmonic mean SDS, net change NSCR.

    Of the prompts that are solved at least once, P are solved by both, E by the policy alone
    (expansion), S by the base alone (shrinkage):
    SRR = P / (P + S), NDR = E / (P + E), NSCR = (E - S) / (P + E + S). NaN for 0 / 0.

    >>> base = [True] * 2388 + [False] * 48 + [True] * 175
    >>> policy = [True] * 2388 + [True] * 48 + [False] * 175
    >>> {name: round(value, 6) for name, value in support(base, policy).items()}
    {'SRR': 0.931721, 'NDR': 0.019704, 'SDS': 0.038593, 'NSCR': -0.04864}
    """
    both = sum(b and p for b, p in zip(base, policy))
    gained = sum(p and not b for b, p in zip(base, policy))
    lost = sum(b and not p for b, p in zip(base, policy))

    def ratio(part: float, whole: float) -> float:
        return part / whole if whole else float("nan")

    kept = ratio(both, both + lost)
    new = ratio(gained, both + gained)
    mean = ratio(2 * kept * new, kept + new)
    return {
        "SRR": kept,
        "NDR": new,
        "SDS": mean,
        "NSCR": ratio(gained - lost, both + gained + lost),
    }
