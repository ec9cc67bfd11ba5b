"""APR (17): a reward that takes off a penalty for going on after the answer is final.

It is about length, not about entropy, and the toy's responses end at the total: there is
nothing to take off. So it is not in the zoo's table.
"""

from __future__ import annotations

from collections.abc import Sequence


def settled_at(answers: Sequence[str | None]) -> int:
    """The number of tokens after which the answer is the final one and stays so.

    answers[t]: what one would read off after token t, None if nothing.

    >>> settled_at([None, "7", "8", None, "8", "8", "8"])
    5
    """
    at = len(answers)
    while at > 1 and answers[at - 2] == answers[-1]:
        at -= 1
    return at


def settled_reward(reward: float, answers: Sequence[str | None], lam: float) -> float:
    """R' = R - lam (share of the tokens after settled_at), but R' = R without an answer.

    Source: arXiv 2602.00760, its abstract. Sure: the idea high, the formula low (our reading).

    >>> settled_reward(1.0, [None, "8", "8", "8"], lam=0.5)  # two of four tokens come after it
    0.75
    """
    if not answers or answers[-1] is None:
        return reward
    return reward - lam * (len(answers) - settled_at(answers)) / len(answers)
