"""Compares a student's function with its definition, and says which mistake it looks like."""

import warnings
from typing import Any, NamedTuple

import numpy as np


class Differs(AssertionError):
    """The numbers are not those of the definition; `known`: those of which mistake, or ""."""

    known = ""


class Case(NamedTuple):
    """One call: in words, the inputs, and how exact the result must be."""

    what: str
    given: dict[str, Any]
    tol: float = 1e-9


def judge(function, run, right, cases, idea, mistakes):
    """AssertionError at the first case in which function is not what the definition says.

    run(function, given) -> name -> numbers; right(given) the same by the definition; idea:
    what it is about; mistakes: description -> a wrong function. If one of these has the
    student's numbers in nearly all cases, the message says so.
    """
    found = []
    first = ""
    for case in cases:
        got = {name: as_numbers(x) for name, x in run(function, case.given).items()}
        found.append(got)
        first = first or difference(got, right(case.given), case)
    if first:
        known = diagnosis(run, cases, found, mistakes)
        error = Differs(f"{idea}.{sentence(known)} {first}")
        error.known = known
        raise error


def sentence(known):
    return f" Your numbers are those of a known mistake: {known}." if known else ""


def as_numbers(x):
    return np.asarray(x.detach() if hasattr(x, "detach") else x, dtype=np.float64)


def difference(got, due, case):
    """What differs in a case, as a sentence, or nothing."""
    for name, expected in due.items():
        actual, expected = got[name], np.asarray(expected, dtype=np.float64)
        if actual.shape != expected.shape:
            return f"{name}: shape {actual.shape}, not {expected.shape} ({case.what})"
        wrong = ~np.isclose(actual, expected, rtol=case.tol, atol=case.tol)
        if wrong.any():
            shown = [float(f"{x:.7g}") for x in actual[wrong][:3]]
            shown_due = [float(f"{x:.7g}") for x in expected[wrong][:3]]
            count = f"{wrong.sum()} of {wrong.size} differ, {shown} instead of {shown_due}"
            return f"{name}, {case.what}: {count}"
    return ""


def diagnosis(run, cases, found, mistakes):
    """The mistake that has the student's numbers in most cases, in nine of ten at least."""
    best = ""
    allowed = len(cases) // 10  # cases that may differ; fewer, once a mistake has been found
    for description, function in mistakes.items():
        others = 0
        for case, got in zip(cases, found):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                others += not looks_alike(run, function, case, got)
            if others > allowed:
                break
        else:
            best = description
            allowed = others - 1
        if allowed < 0:
            break
    return best


def looks_alike(run, function, case, got):
    try:
        made = {name: as_numbers(x) for name, x in run(function, case.given).items()}
    except Exception:  # a wrong function may raise whatever it likes
        return False
    return all(
        made[name].shape == got[name].shape
        and np.allclose(made[name], got[name], rtol=1e-6, atol=1e-9, equal_nan=True)
        for name in got
    )
