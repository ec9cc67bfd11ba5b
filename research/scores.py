"""pass@k and maj@k of more samples than k. siren.evaluate needs neither: it draws k samples.

pass@k    the chance that k of the n samples hold a right one
maj@k     the share of the blocks of k votes in which the right answer is the most frequent one
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence


def pass_at_k(n: int, c: int, k: int) -> float:
    """pass@k: the chance that k of n samples, of which c are right, hold a right one.

    It is 1 - (n - c choose k) / (n choose k): all ways to choose, without those that miss.

    >>> pass_at_k(4, 1, 2)  # 1 - 3 / 6
    0.5
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {n} samples, {c} right: k must be 1 to n, c 0 to n")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def maj_at_k(votes: Sequence[Hashable | None], answer: Hashable, k: int) -> float:
    """maj@k: the share of the whole blocks of k votes that `answer` wins.

    There must be k votes at least. In a tie the vote that came first wins. None stands for a
    response without an answer, and it is not a vote.

    >>> maj_at_k([None, None, "7", "8", "8", "7"], "7", 3)  # won, lost
    0.5
    """
    if not 1 <= k <= len(votes):
        raise ValueError(f"maj@{k} of {len(votes)} votes: k must be 1 to {len(votes)}")
    won = []
    for start in range(0, len(votes) - k + 1, k):
        counts = Counter(vote for vote in votes[start : start + k] if vote is not None)
        won.append(bool(counts) and counts.most_common(1)[0][0] == answer)
    return sum(won) / len(won)
