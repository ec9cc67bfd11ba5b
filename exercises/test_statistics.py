"""Grades exercise 14 against slower calculations, and on results/main.csv."""

import csv
import itertools
import math
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from exercises import solutions

MAIN = Path(__file__).resolve().parents[1] / "results" / "main.csv"


@pytest.fixture(scope="session")
def impl(impl, request):
    """The module under test: solutions.py, or that of --impl."""
    return impl if request.config.getoption("--impl") else solutions


def near(actual, expected, idea, tol=1e-9):
    close = math.isclose(actual, expected, rel_tol=tol, abs_tol=tol)
    assert close, f"{idea}: {actual}, not {expected}"


def table():
    """Two methods and a third, seeds out of order, of two grades and two temperatures."""
    rng = random.Random(0)
    rows = []
    for method, seeds in (("a", range(12)), ("b", range(2, 14)), ("c", range(12))):
        for seed, grade, heat in itertools.product(seeds, ("hard", "easy"), ("0.6", "1.0")):
            row = {"method": method, "seed": str(seed), "grade": grade, "temperature": heat}
            rows.append(row | {"maj@16": str(rng.random()), "avg@16": str(rng.random())})
    rng.shuffle(rows)
    return rows


def value(rows, score, **wanted):
    (row,) = (row for row in rows if all(row[key] == x for key, x in wanted.items()))
    return float(row[score])


@pytest.mark.ex14
def test_ex14_seed_differences(impl):
    rows = table()
    for score, grade, heat in (("maj@16", "hard", "0.6"), ("avg@16", "easy", "1.0")):
        given = [dict(row) for row in rows]
        options = {} if grade == "hard" else {"grade": grade, "temperature": heat}
        got = list(impl.seed_differences(given, "a", "b", score, **options))
        assert given == rows, "rows was written to: it is the caller's list"
        assert len(got) == 10, (
            f"one difference for each of the 10 seeds that both methods have, not {len(got)}"
        )
        due = []
        for seed in range(2, 12):
            same = {"seed": str(seed), "grade": grade, "temperature": heat}
            left = value(rows, score, method="a", **same)
            due.append(left - value(rows, score, method="b", **same))
        if np.allclose(got, [-x for x in due]):
            raise AssertionError("method minus other, not the other way round")
        if np.allclose(sorted(got), sorted(due)) and not np.allclose(got, due):
            raise AssertionError("in the order of the seeds as numbers: 2 comes before 10")
        idea = f"{score} of the same seed, grade and temperature, subtracted"
        assert np.allclose(got, due), f"{idea}: {got[:3]}, not {due[:3]}"
    with open(MAIN, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    got = list(impl.seed_differences(rows, "siren", "dr_grpo", "maj@16"))
    assert len(got) == 16, f"results/main.csv has 16 seeds of both methods, not {len(got)}"


@pytest.mark.ex14
def test_ex14_bootstrap_interval(impl):
    rng = np.random.default_rng(5)
    state = random.getstate(), np.random.get_state()[1].tolist()
    for size, spread in ((16, 0.1), (24, 3.0), (5, 1.0)):
        values = (rng.normal(0.3, spread, size) ** 3).tolist()  # skewed
        before = list(values)
        low, high = impl.bootstrap_interval(values)
        assert values == before, "values was written to"
        means = np.random.default_rng(99).choice(values, (40_000, size)).mean(1)
        due = np.quantile(means, [0.025, 0.975])
        width = due[1] - due[0]
        idea = idea_of_interval(np.array(values), low, high, means, width)
        assert abs(low - due[0]) < 0.05 * width and abs(high - due[1]) < 0.05 * width, (
            f"{idea}: ({low:.4f}, {high:.4f}), not ({due[0]:.4f}, {due[1]:.4f})"
        )
        narrow = impl.bootstrap_interval(values, confidence=0.5)
        due = np.quantile(means, [0.25, 0.75])
        right = (
            abs(narrow[0] - due[0]) < 0.06 * width and abs(narrow[1] - due[1]) < 0.06 * width
        )
        assert right, f"confidence is an argument: .5 gives {narrow}, not {due.tolist()}"
    coarse = [tuple(impl.bootstrap_interval(values, draws=50, seed=s)) for s in (1, 1, 2, 3)]
    assert coarse[0] == coarse[1], "the same seed gives the same interval"
    differs = len(set(coarse)) == 3
    assert differs, "another seed gives another interval: make the generator from `seed`"
    assert state == (random.getstate(), np.random.get_state()[1].tolist()), (
        "a generator of your own, not the global one"
    )
    assert tuple(impl.bootstrap_interval([0.5] * 8)) == (0.5, 0.5), "equal values: no width"


def idea_of_interval(values, low, high, means, width):
    """Which mistake has this interval?"""
    mean, error = values.mean(), values.std(ddof=1) / math.sqrt(len(values))
    typical = {
        "the interval of the mean, not of single values": np.quantile(values, [0.025, 0.975]),
        "a confidence of .95 leaves out .025 on each side, not .05": np.quantile(
            means, [0.05, 0.95]
        ),
        "the percentile bootstrap, not mean -+ 1.96 standard errors": (
            mean - 1.96 * error,
            mean + 1.96 * error,
        ),
        "one standard error is 68 %": (mean - error, mean + error),
    }
    for idea, ends in typical.items():
        if abs(low - ends[0]) < 0.02 * width and abs(high - ends[1]) < 0.02 * width:
            return idea
    return "quantiles of the means of resamples, as large as the data, with replacement"


@pytest.mark.ex14
def test_ex14_pass_at_k_std(impl):
    for p, k in itertools.product((0.0, 0.05, 0.3, 0.9, 1.0), (1, 4, 16)):
        exact = 1 - (1 - p) ** k
        due = math.sqrt(exact * (1 - exact))
        got = impl.pass_at_k_std(p, k, k)
        idea = "n = k: one draw of 0 or 1, with the probability 1 - (1 - p)^k"
        near(got, due, f"{idea}, {p = } {k = }", 1e-6)
    for p, n, k in ((0.1, 8, 2), (0.5, 12, 3), (0.02, 30, 16), (0.3, 300, 16), (0.25, 64, 1)):
        due = exact_std(Fraction(p), n, k)
        got = impl.pass_at_k_std(p, n, k)
        idea = "the standard deviation of 1 - C(n - c, k) / C(n, k) over the binomial c"
        mistakes = {
            "that is the variance: take its root": due**2,
            "that is the std for n = k, whatever n": exact_std(Fraction(p), k, k),
            "n / k blocks of k samples are coarser than all subsets": (
                exact_std(Fraction(p), k, k) / math.sqrt(n / k)
            ),
            "that is the std of the share of right samples": math.sqrt(p * (1 - p) / n),
        }
        for mistake, wrong in mistakes.items():
            if math.isclose(got, wrong, rel_tol=1e-6) and not math.isclose(
                got, due, rel_tol=1e-6
            ):
                idea = mistake
        near(got, due, f"{idea}, {p = } {n = } {k = }", 1e-6)


def exact_std(p, n, k):
    """In fractions, from the factorial moments of a hypergeometric miss."""
    chances = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    miss = [Fraction(math.comb(n - c, k), math.comb(n, k)) for c in range(n + 1)]
    mean = sum(x * y for x, y in zip(chances, miss))
    return math.sqrt(sum(x * (y - mean) ** 2 for x, y in zip(chances, miss)))


@pytest.mark.ex14
def test_ex14_repeats_needed(impl):
    z = 1.959964 + 0.841621
    cases = [(0.15, 0.05), (0.1, 0.05), (0.3, 0.05), (0.5, 0.02), (1.0, 0.5), (2.0, 0.1)]
    for std, difference in cases:
        got = impl.repeats_needed(std, difference)
        assert got == int(got), f"a whole number, not {got}"
        need = (z * std / difference) ** 2
        ideas = {
            "without 0.841621 the power is only 50 %": (1.959964 * std / difference) ** 2,
            "the standard error falls with the root of N: square it": z * std / difference,
            "the differences are paired: no factor of 2": 2 * need,
            "the test has two sides: 1.959964": ((1.644854 + 0.841621) * std / difference)
            ** 2,
        }
        idea = "the smallest N with difference >= 2.801585 * std / sqrt(N)"
        for mistake, other in ideas.items():
            if got == math.ceil(other) != math.ceil(need):
                idea = mistake
        if got == math.floor(need):
            idea = "rounded up: with fewer the power is below 80 %"
        assert got == math.ceil(need), f"{idea}: {got}, not {math.ceil(need)}, {std = }"
    assert impl.repeats_needed(0.01, 0.5) == 2, "at least 2: one repeat has no std"
    assert impl.repeats_needed(0.1, -0.05) == 32, "a difference may be below 0"
    assert impl.repeats_needed(0.0, 0.05) == 2, "a std of 0: 2"


def slow_holm(p_values):
    """From the definition by hypotheses: the corrected value is the smallest level at which
    Holm's procedure rejects, so the largest of the products up to its rank."""
    ranked = sorted(p_values)
    m = len(ranked)
    by_rank = [max(min(1.0, (m - j) * ranked[j]) for j in range(i + 1)) for i in range(m)]
    return [by_rank[ranked.index(p)] if ranked.count(p) == 1 else
            by_rank[ranked.index(p) + ranked.count(p) - 1] for p in p_values]  # fmt: skip


@pytest.mark.ex14
def test_ex14_holm(impl):
    rng = random.Random(1)
    cases = [
        [0.01, 0.04, 0.03],
        [0.2],
        [0.9, 0.8, 0.7],
        [0.001, 0.2, 0.04, 0.03, 0.5],
        [0.04, 0.01],
    ]
    cases += [[rng.random() ** 3 for _ in range(n)] for n in (2, 5, 11, 24)]
    for p_values in cases:
        given = list(p_values)
        got = list(impl.holm(given))
        assert given == p_values, "p_values was written to: it is the caller's list"
        assert len(got) == len(p_values), f"{len(p_values)} values, not {len(got)}"
        due = slow_holm(p_values)
        at = f"{[round(x, 4) for x in p_values]}: {[round(x, 4) for x in got]}"
        if np.allclose(got, due):
            continue
        m = len(p_values)
        ranks = [sorted(p_values).index(p) for p in p_values]
        plain = [(m - r) * p for r, p in zip(ranks, p_values)]
        ideas = {
            "every value times m is Bonferroni; Holm multiplies by m, m - 1, ...": [
                min(1.0, m * p) for p in p_values
            ],
            "none becomes smaller than the one before it: take the largest so far": [
                min(1.0, x) for x in plain
            ],
            "in the order in which they were given, not sorted": sorted(due),
            "that is Benjamini and Hochberg's correction": hochberg(p_values),
        }
        idea = next((i for i, x in ideas.items() if np.allclose(got, x)), "Holm's correction")
        if max(got) > 1:
            idea = "no value is larger than 1"
        raise AssertionError(f"{idea}: {at}, not {[round(x, 4) for x in due]}")


def hochberg(p_values):
    ranked = sorted(p_values)
    m = len(ranked)
    found = {}
    least = 1.0
    for place in range(m - 1, -1, -1):
        least = min(least, m / (place + 1) * ranked[place])
        found[ranked[place]] = least
    return [found[p] for p in p_values]
