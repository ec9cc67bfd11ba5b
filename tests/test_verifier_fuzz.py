"""Both exact verifiers, siren.py's small one and that of text_env.py, on 100,000 random inputs
and on inputs of a megabyte: they never raise, and they are quick. The bounds are twice
what a quiet machine needs or more, and hold for the process's own time, so that what else the
machine does is not counted."""

import random
import time

import pytest

import siren
import text_env
from math_answers import plain_boxes

ATOMS = [
    *("0123456789+-*/^_=<>(){}[]|,.;:!?$%&~#'\"\\ \n\tabcxyzABCeiN"),
    *(
        "\u2212",
        "\u00b0",
        "\u00bd",
        "\u0663",
        "\ud800",
        "\x00",
        "\U0001d7d8",
        "inf",
        "nan",
        "1e9",
    ),
    *(
        "\\boxed{",
        "\\boxed",
        "\\frac",
        "\\frac{",
        "\\dfrac{1}{2}",
        "}{",
        "\\text{",
        "\\mathrm{",
    ),
    *(
        "\\left",
        "\\right",
        "\\sqrt{",
        "{,}",
        ",\\!",
        "\\\\",
        "\\{",
        "\\}",
        "\\%",
        "\\$",
        "\\pi",
    ),
    *("\\displaystyle", "1,234", "0.5", "1/2", "1/0", "50\\%", "__"),
    *("\\fbox{", "\\boxed 5", "\\mathbf{", "**", "percent", "\\ne ", "\u2013", "(0,100)"),
]
ANSWERS = [
    "5",
    "1/2",
    "0",
    "",
    " ",
    "\\boxed{5}",
    "}",
    "{",
    "x+1",
    "1{,}234",
    "\\frac{1}{0}",
    ".",
]


def verify_latex(response, answer):
    return siren.verify(plain_boxes(response), answer, None, text_env.equal)


def seconds_of(response, answer):
    """The time of a verdict, the slower one of the two; each must be a bool."""
    seconds = []
    for verify in (siren.verify, verify_latex):
        start = time.process_time()
        assert type(verify(response, answer)) is bool
        seconds.append(time.process_time() - start)
    return max(seconds)


@pytest.mark.parametrize("count", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_random_inputs(count):
    rng = random.Random(0)
    worst = 0.0
    for i in range(count):
        text = "".join(rng.choices(ATOMS, k=rng.randrange(40)))
        response = text if i % 2 else f"\\boxed{{{text}}}"
        answer = rng.choice(ANSWERS)
        if i % 4 == 0:
            answer = "".join(rng.choices(ATOMS, k=rng.randrange(12)))
        worst = max(worst, seconds_of(response, answer))
    assert worst < 0.05


def test_a_random_answer_is_right_for_itself_or_nothing_is():
    """Equal texts are equal answers, unless nothing is left of them or braces are torn."""
    rng = random.Random(1)
    for _ in range(20_000):
        text = "".join(rng.choices(ATOMS, k=rng.randrange(20)))
        whole = siren.extract_answer(f"\\boxed{{{text}}}") == text
        own = siren.extract_answer(plain_boxes(text)) is None
        if whole and own:
            assert siren.verify(f"\\boxed{{{text}}}", text), text
            right = siren.verify(f"\\boxed{{{text}}}", text, None, text_env.equal)
            assert right is (text_env.normalize(text) != ""), text


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
    "styles": "\\mathbf{" * (MEGABYTE // 8) + "}" * (MEGABYTE // 8),
    "groups": "{a{b{c}" * (MEGABYTE // 7),
    "box in groups": "\\boxed{{" + "{{}}" * (MEGABYTE // 4),
    "stars": "*" * MEGABYTE,
    "spaced minus signs": "- " * (MEGABYTE // 2),
    "random": "".join(random.Random(2).choices("\\{}boxed 5,.$%", k=MEGABYTE)),
}


@pytest.mark.parametrize("size", [150_000, pytest.param(MEGABYTE, marks=pytest.mark.slow)])
@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_a_megabyte(text, size):
    """A quarter of a second is enough for the smaller size; quadratic time fails at both."""
    text = text[: size // 2] + text[-size // 2 :]
    most = max(0.25, size / MEGABYTE)
    for response in (text, f"\\boxed{{{text}}}", f"\\boxed{{5}}{text}"):
        assert seconds_of(response, "5") < most
    assert seconds_of("\\boxed{5}", text) < most
    assert seconds_of(f"\\boxed{{{text}}}", text) < 2 * most  # twice the size


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_the_longest_answers_that_are_read(text):
    """Up to MAX_CHARS characters an answer is parsed; the slowest patterns are as long."""
    for end in ("", "5", "}", "%", "!", "a"):
        short = text[: text_env.MAX_CHARS - len(end)] + end
        start = time.process_time()
        siren.normalize(short)
        text_env.normalize(short)
        assert time.process_time() - start < 0.05
