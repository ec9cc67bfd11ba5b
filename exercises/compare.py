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
    student's numbers, the message says so.
    """
    found = []
    failing = {}
    first = ""
    for number, case in enumerate(cases):
        got = {name: as_numbers(x) for name, x in run(function, case.given).items()}
        found.append(got)
        due = right(case.given)
        differs = difference(got, due, case)
        if differs:
            failing[number] = due
        first = first or differs
    if first:
        known = diagnosis(run, cases, found, failing, mistakes)
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
            shown = in_few_digits(actual[wrong][:3], expected[wrong][:3])
            count = f"{wrong.sum()} of {wrong.size} differ, {shown}"
            why = ""
            if np.isnan(actual[wrong]).all():
                why = "; NaN comes from 0 * inf or inf - inf, in the backward pass, too"
            elif np.allclose(actual, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max()):
                why = "; nearly right: is a number added, bounded or rounded somewhere?"
            return f"{name}, {case.what}: {count}{why}"
    return ""


def in_few_digits(actual, expected):
    """Both lists with 7 digits, or with more where 7 do not show the difference."""
    for digits in (7, 10, 13):
        shown = [float(f"{x:.{digits}g}") for x in actual]
        due = [float(f"{x:.{digits}g}") for x in expected]
        if all(a != b for a, b in zip(shown, due)):
            break
    return f"{shown} instead of {due}"


def diagnosis(run, cases, found, failing, mistakes):
    """The mistake that has the student's numbers; "" if none has.

    failing: number of a case -> what is right there. A mistake must say why these cases fail,
    and must be right where the student is; at most one case for ten failing ones may differ.
    """
    best = ""
    allowed = len(failing) // 10
    order = [*failing, *(n for n in range(len(cases)) if n not in failing)]
    for description, function in mistakes.items():
        missed = 0
        for number in order:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = numbers_of(run, function, cases[number])
            missed += not explains(made, found[number], failing.get(number))
            if missed > allowed:
                break
        else:
            best = description
            allowed = missed - 1
        if allowed < 0:
            break
    return best


def numbers_of(run, function, case):
    """What a wrong function returns; {} if it raises, as it may."""
    try:
        return {name: as_numbers(x) for name, x in run(function, case.given).items()}
    except Exception:  # whatever a wrong function may raise
        return {}


def explains(made, got, due):
    """Are these the student's numbers? Where they are not right: much nearer to these?"""
    for name, actual in got.items():
        if name not in made or made[name].shape != actual.shape:
            return False
        if not np.allclose(made[name], actual, rtol=1e-6, atol=1e-9, equal_nan=True):
            return False
        if due is not None and not nearer(made[name], actual, np.asarray(due[name])):
            return False
    return True


def nearer(made, actual, due):
    """Is `made` within a hundredth of the way from the student's number to the right one?"""
    finite = np.isfinite(made) & np.isfinite(actual)
    if due.shape != actual.shape or not finite.any():
        return True
    way = np.abs(actual - due)[finite].max()
    left = np.abs(actual - made)[finite].max()
    return bool(left <= max(0.01 * way, 1e-13 * np.abs(actual[finite]).max()))
