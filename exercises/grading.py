"""Which tests grade which exercise, and how to run them on a module without pytest.

test_exercises.py runs them on wrong solutions, mutate.py on mutants of the right one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from exercises import (
    qae,
    reference,
    solutions,
    test_compare,
    test_exercise_12,
    test_graders,
    test_hacking,
    test_sampler,
    test_statistics,
)
from exercises.watch import Watched

EXERCISES = {
    "ex1": ["group_advantages"],
    "ex2": ["policy_loss"],
    "ex3": ["nucleus_mask"],
    "ex4": ["nucleus_entropy"],
    "ex5": ["peak_mask"],
    "ex6": ["aggregate_entropy"],
    "ex7": ["siren_loss"],
    "ex8": ["micro_batch_anchor"],
    "ex9": ["pass_at_k"],
    "ex10": ["maj_at_k"],
    "ex11": ["sample"],
    "ex12": ["quantile_advantages", "plug"],
    "ex13": ["exploit", "strict_verifier"],
    "ex14": [
        "seed_differences",
        "bootstrap_interval",
        "pass_at_k_std",
        "repeats_needed",
        "holm",
    ],
}
# in the order of `pytest --impl`: on small numbers first
GRADERS = (
    test_graders,
    test_exercise_12,
    test_sampler,
    test_compare,
    test_hacking,
    test_statistics,
)
# the right solution of every exercise
SOLUTION = {
    **vars(reference),
    "quantile_advantages": qae.quantile_advantages,
    "plug": qae.plug,
    **{name: getattr(solutions, name) for name in (*EXERCISES["ex13"], *EXERCISES["ex14"])},
}


def solution_with(**changes: Callable) -> SimpleNamespace:
    """The right solution with some functions replaced."""
    return SimpleNamespace(**{**SOLUTION, **changes})


def graders_of(exercise: str) -> list[Callable]:
    """The tests of an exercise in the order of `pytest --impl`: on small numbers first."""
    named = {}
    for module in GRADERS:
        named |= vars(module)
    found = [test for name, test in named.items() if name.startswith("test_ex")]
    return [test for test in found if cases(test, exercise)]


def cases(test: Callable, exercise: str) -> list[dict[str, Any]]:
    """The arguments beside `impl` that pytest calls a grader with, where it grades the
    exercise."""
    marks = getattr(test, "pytestmark", [])
    whole = any(mark.name == exercise for mark in marks)
    axes = []
    for mark in marks:
        if mark.name == "parametrize":
            names = [name.strip() for name in mark.args[0].split(",")]
            axes.append([(names, *unpacked(value, len(names))) for value in mark.args[1]])
    found = []
    for choice in itertools.product(*axes):
        if whole or any(mark.name == exercise for _, _, marks in choice for mark in marks):
            pairs = (zip(names, values) for names, values, _ in choice)
            found.append(dict(itertools.chain(*pairs)))
    return found


def unpacked(value: Any, count: int) -> tuple[Any, Any]:
    """(values, marks) of one entry of a parametrize."""
    if hasattr(value, "marks"):
        return value.values, value.marks
    return (value if count > 1 else [value]), ()


def failures(
    exercise: str, module: ModuleType | SimpleNamespace
) -> Iterator[tuple[str, Exception]]:
    """(test, error) for each grader that fails on the module, in order."""
    for test in graders_of(exercise):
        torch.manual_seed(0)
        try:
            for given in cases(test, exercise):
                test(impl=Watched(module), **given)
        except test_compare.Differs as error:
            yield test.__name__, error
        except AssertionError as error:
            known = test_compare.known_mistake(exercise, Watched(module))
            yield test.__name__, AssertionError(str(error).partition("\nassert ")[0] + known)
        except Exception as error:  # a solution may raise whatever it likes
            yield test.__name__, error
