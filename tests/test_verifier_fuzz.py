"""siren.verify on 100,000 random inputs and on inputs of a megabyte: it never raises, and it is
quick. The bounds on time leave a busy machine ten times what a quiet one needs; they hold for the
process's own time, so that what else the machine does is not counted."""

from __future__ import annotations

import random
import time

import pytest

import siren

ATOMS = [
    *("0123456789+-*/^_=<>(){}[]|,.;:!?$%&~#'\"\\ \n\tabcxyzABCeiN"),
    *("\u2212", "\u00b0", "\u00bd", "\u0663", "\ud800", "\x00", "\U0001d7d8", "inf", "nan", "1e9"),
    *("\\boxed{", "\\boxed", "\\frac", "\\frac{", "\\dfrac{1}{2}", "}{", "\\text{", "\\mathrm{"),
    *("\\left", "\\right", "\\sqrt{", "{,}", ",\\!", "\\\\", "\\{", "\\}", "\\%", "\\$", "\\pi"),
    *("\\displaystyle", "1,234", "0.5", "1/2", "1/0", "50\\%", "__"),
]
ANSWERS = ["5", "1/2", "0", "", " ", "\\boxed{5}", "}", "{", "x+1", "1{,}234", "\\frac{1}{0}", "."]


def seconds_of(response: str, answer: str) -> float:
    """The time of one verdict, which must be a bool."""
    start = time.process_time()
    assert type(siren.verify(response, answer)) is bool
    return time.process_time() - start


def test_random_inputs():
    rng, worst = random.Random(0), 0.0
    for i in range(100_000):
        text = "".join(rng.choices(ATOMS, k=rng.randrange(40)))
        response = text if i % 2 else f"\\boxed{{{text}}}"
        answer = rng.choice(ANSWERS) if i % 4 else "".join(rng.choices(ATOMS, k=rng.randrange(12)))
        worst = max(worst, seconds_of(response, answer))
    assert worst < 0.05


def test_a_random_answer_is_right_for_itself_or_nothing_is():
    """Equal texts are equal answers, unless nothing is left of them or their braces are torn."""
    rng = random.Random(1)
    for _ in range(20_000):
        text = "".join(rng.choices(ATOMS, k=rng.randrange(20)))
        whole = siren.extract_answer(f"\\boxed{{{text}}}") == text
        own = siren.extract_answer(text) is None
        if whole and own:
            right = siren.verify(f"\\boxed{{{text}}}", text)
            assert right is (siren.normalize(text) != ""), text


MEGABYTE = 1_000_000
LONG = {
    "digits": "9" * MEGABYTE,
    "spaces": " " * MEGABYTE,
    "thousands": "1" + ",000" * (MEGABYTE // 4),
    "open braces": "{" * MEGABYTE,
    "close braces": "}" * MEGABYTE,
    "nested braces": "{" * (MEGABYTE // 2) + "}" * (MEGABYTE // 2),
    "nested boxes": "\\boxed{" * (MEGABYTE // 8) + "}" * (MEGABYTE // 8),
    "open boxes": "\\boxed{" * (MEGABYTE // 7),
    "boxes": "\\boxed{5}" * (MEGABYTE // 9),
    "boxes without braces": "\\boxed" * (MEGABYTE // 6),
    "box and spaces": "\\boxed" + " " * (MEGABYTE - 10) + "{5}",
    "backslashes": "\\" * MEGABYTE,
    "fractions": "\\frac{1}{2}" * (MEGABYTE // 11),
    "torn fractions": "\\frac{1}{" * (MEGABYTE // 9),
    "texts": "\\text{" * (MEGABYTE // 6),
    "dots": "." * MEGABYTE,
    "minus signs": "\u2212" * MEGABYTE,
    "percent signs": "%" * MEGABYTE,
    "commas": "{,}" * (MEGABYTE // 3),
    "random": "".join(random.Random(2).choices("\\{}boxed 5,.$%", k=MEGABYTE)),
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_a_megabyte(text):
    for response in (text, f"\\boxed{{{text}}}", f"\\boxed{{5}}{text}"):
        assert seconds_of(response, "5") < 1
    assert seconds_of("\\boxed{5}", text) < 1
    assert seconds_of(f"\\boxed{{{text}}}", text) < 2  # two megabytes


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_the_longest_answers_that_are_read(text):
    """Up to MAX_ANSWER characters an answer is parsed; the slowest patterns have this length."""
    for end in ("", "5", "}", "%", "!", "a"):
        short = text[: siren.MAX_ANSWER - len(end)] + end
        start = time.process_time()
        siren.normalize(short)
        assert time.process_time() - start < 0.05
