"""How sure are the results? Exercise 14's functions on results/main.csv.

    python exercises/how_sure.py                                  # your functions
    python exercises/how_sure.py --impl exercises/solutions.py

The first table: SIREN minus each other method on hard prompts, over 16 paired seeds: mean,
95 % interval, standard deviation over seeds, p-value by exact sign flips, the same after
Holm's correction, and how many seeds show a difference of .05. The second one: how coarse is
the pass@k of one prompt, and how many prompts bring the standard error of their mean to .01?
"""

import argparse
import csv
import statistics
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # siren.py
from exercises import train_mine

METHODS = ("dr_grpo", "naive_bonus", "wo_top_p", "wo_peak", "wo_anchor", "anchor_only")
SCORES = ("avg@16", "maj@16", "pass@16")


def sign_flip(differences):
    """The share of all 2^n ways to flip signs whose mean is as far from 0: a p-value.

    >>> sign_flip([0.1, 0.2, 0.3])  # only + + + and - - -, of 8
    0.25
    """
    x = np.array(differences)
    bits = np.arange(2 ** len(x))[:, None] >> np.arange(len(x)) & 1
    means = np.abs(((1 - 2 * bits) * x).mean(1))
    return float((means >= abs(x.mean()) - 1e-12).mean())


def compare(mine, rows):
    """Print the first table."""
    found = {}
    for score in SCORES:
        for other in METHODS:
            found[score, other] = mine.seed_differences(rows, "siren", other, score)
    raw = [sign_flip(values) for values in found.values()]
    corrected = mine.holm(raw)
    head = (
        "SIREN minus",
        "score",
        "mean",
        "95 % interval",
        "std",
        "p",
        "Holm",
        "seeds for .05",
    )
    print("{:<13}{:<9}{:>6}  {:<16}{:>6}{:>7}{:>7}{:>15}".format(*head))
    for (key, values), p, holm in zip(found.items(), raw, corrected):
        low, high = mine.bootstrap_interval(values)
        std = statistics.stdev(values)
        mean = statistics.mean(values)
        seeds = mine.repeats_needed(std, 0.05)
        bounds = f"[{low:+.3f}, {high:+.3f}]"
        row = f"{key[1]:<13}{key[0]:<9}{mean:>+6.3f}  {bounds:<16}{std:>6.3f}"
        print(f"{row}{p:>7.4f}{holm:>7.3f}{seeds:>15}")


def coarseness(mine):
    """Print the second table."""
    print(f"\n{'pass@16 of one prompt':<24}{'p':>6}{'n':>6}{'std':>8}{'prompts for .01':>18}")
    for p in (0.02, 0.05, 0.1, 0.2):
        for n in (16, 64, 256):
            std = mine.pass_at_k_std(p, n, 16)
            prompts = (std / 0.01) ** 2
            print(f"{'':<24}{p:>6}{n:>6}{std:>8.3f}{prompts:>18.0f}")


def main(argv=None):
    """The command. 2: an exercise is missing."""
    parser = argparse.ArgumentParser("how_sure.py", allow_abbrev=False)
    default = train_mine.ROOT / "exercises" / "student.py"
    parser.add_argument("--impl", type=Path, default=default)
    given = parser.parse_args(argv)
    with open(train_mine.ROOT / "results" / "main.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        mine = train_mine.load(given.impl)
        compare(mine, rows)
        coarseness(mine)
    except (ValueError, NotImplementedError) as error:
        print(f"how_sure.py: not written yet: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
