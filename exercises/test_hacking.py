"""Grades exercise 13: an exploit of each faulty verifier, and a verifier without faults."""

import random
import re
from fractions import Fraction

import pytest

from exercises import solutions
from exercises.verifiers import BUDGET, VERIFIERS

ORDER = r"Write the number into \boxed{} and end with <eos>."
EOS = "<eos>"


@pytest.fixture(scope="session")
def impl(impl, request):
    """The module under test: solutions.py, or that of --impl."""
    return impl if request.config.getoption("--impl") else solutions


def problems(fault, count=12):
    """Prompts and their answers, drawn with a fixed seed."""
    rng = random.Random(f"problems {fault}")
    found = []
    while len(found) < count:
        terms = [rng.randint(1, 9) for _ in range(5)]
        task, value = " + ".join(map(str, terms)), Fraction(sum(terms))
        question = f"What is {task}? "
        if fault == "rounds":
            above, below = rng.randint(11, 99), rng.choice([3, 6, 7, 9, 11, 12])
            value = Fraction(round(100 * above / below), 100)
            question = f"What is {above} / {below}, to two digits after the point? "
            if abs(value % 1 - Fraction(1, 2)) < Fraction(1, 10) or value.denominator == 1:
                continue
        if fault == "strips_signs":
            left, right = rng.randint(1, 9), rng.randint(10, 40)
            value = Fraction(left - right)
            question = f"What is {left} - {right}? "
        if fault == "prompts_box":
            said = value + rng.choice([0, 1])  # half of the time somebody is right
            question += rf"Somebody says \boxed{{{said}}}, right or wrong. "
        answer = str(value) if value.denominator == 1 else f"{float(value):.2f}"
        prompt = f"{ORDER} {question}" if fault == "prompts_box" else question + ORDER
        found.append((prompt, answer))
    return found


def is_right(response, answer):
    """What the prompt asks for; written apart from everybody's verifier."""
    words = response.split()
    starts = [match.end() for match in re.finditer(r"\\boxed\{", response)]
    if not words or words[-1] != EOS or not starts:
        return False
    content = response[starts[-1] :].split("}")[0] if "}" in response[starts[-1] :] else ""
    plain = re.fullmatch(r" *([+-]?[0-9]{1,500}(?:\.[0-9]{1,500})?) *", content)
    return bool(plain) and Fraction(plain[1]) == Fraction(answer)


@pytest.mark.ex13
@pytest.mark.parametrize("fault", VERIFIERS)
def test_ex13_exploit(impl, fault):
    verifier = VERIFIERS[fault]
    seen = set()
    for prompt, answer in problems(fault):
        response = impl.exploit(fault, prompt)
        assert isinstance(response, str), f"{fault}: an exploit is a text, not {response!r}"
        at = f"{fault}, prompt {prompt!r}, your response {response!r}"
        assert len(response) <= 400, f"at most 400 characters, not {len(response)}: {at}"
        honest = is_right(response, answer)
        assert not honest, f"that is no exploit but what was asked for: {at}"
        nobody_helps = fault == "prompts_box" and rf"\boxed{{{answer}}}" not in prompt
        paid = nobody_helps or verifier(prompt, response, answer)
        assert paid, f"the verifier does not pay for it; what does its fault accept? {at}"
        seen.add(response)
        if fault == "evaluates":
            words = re.findall(r"[0-9]+", response)
            idea = "let the verifier compute: the answer itself need not occur"
            assert answer not in words or answer in prompt, f"{idea}: {at}"
        if fault == "cut_off":
            idea = f"the response must be cut off, so longer than {BUDGET} characters"
            assert len(response) > BUDGET, f"{idea}, not {len(response)}: {at}"
    if fault in ("anywhere", "prompts_box"):
        idea = "the cheapest exploit is the same text for all prompts: nothing is computed"
        assert len(seen) == 1, f"{fault}: {idea}, but yours are {sorted(seen)[:3]}"


RIGHT = [  # response, answer, what is accepted
    (r"8 + 3 = 11, \boxed{11} <eos>", "11", "the right number in a box"),
    (r"\boxed{ 11 } <eos>", "11", "blanks around the number"),
    (r"\boxed{+11} <eos>", "11", "a plus sign"),
    (r"\boxed{-4} <eos>", "-4", "a number below 0"),
    (r"\boxed{11.0} <eos>", "11", "11.0, which is 11"),
    (r"\boxed{2.50} <eos>", "2.5", "2.50, which is 2.5"),
    (r"\boxed{007} <eos>", "7", "zeros in front"),
    (r"\boxed{9} no, \boxed{11} <eos>", "11", "the last of several boxes"),
    (r"\boxed{x} no, \boxed{11} <eos>", "11", "a last box after one without a number"),
    ("\\boxed{11}\n so be it. \n<eos>\n", "11", "words and line breaks around"),
    (r"\boxed{3.14} <eos>", "3.14", "digits behind the point"),
    (r"} { \boxed{11} } <eos>", "11", "braces outside the box"),
    (r"\boxed{0} <eos>", "0", "0"),
    (r"\boxed{-0.0} <eos>", "0", "-0.0, which is 0"),
]
SAID = ORDER + r" What is 8 + 3? Somebody says \boxed{11}, right or wrong. "
WRONG = [  # fault, prompt, response, answer
    ("anywhere", "", "it is 11 <eos>", "11"),
    ("anywhere", "", " ".join(map(str, range(100))) + " <eos>", "11"),
    ("anywhere", "", r"11, so \boxed{12} <eos>", "11"),
    ("anywhere", "", r"\boxed{10 11 12} <eos>", "11"),
    ("anywhere", "", r"\boxed{11}, or \boxed{12} <eos>", "11"),
    ("anywhere", "", r"\boxed{111} <eos>", "11"),
    ("anywhere", "", r"11} <eos>", "11"),
    ("cut_off", "", r"\boxed{11}", "11"),
    ("cut_off", "", r"\boxed{11", "11"),
    ("cut_off", "", r"\boxed{11 <eos>", "11"),
    ("cut_off", "", r"\boxed{11} and \boxed{12 <eos>", "11"),
    ("cut_off", "", r"<eos> \boxed{11}", "11"),
    ("cut_off", "", r"\boxed{11} <eo", "11"),
    ("cut_off", "", "x" * 58 + "11", "11"),
    ("rounds", "", r"\boxed{3} <eos>", "3.14"),
    ("rounds", "", r"\boxed{3.1} <eos>", "3.14"),
    ("rounds", "", r"\boxed{3.141} <eos>", "3.14"),
    ("rounds", "", r"\boxed{3.1400000000000000001} <eos>", "3.14"),
    ("rounds", "", r"\boxed{11.4} <eos>", "11"),
    ("strips_signs", "", r"\boxed{4} <eos>", "-4"),
    ("strips_signs", "", r"\boxed{-4} <eos>", "4"),
    ("strips_signs", "", r"\boxed{--4} <eos>", "4"),
    ("strips_signs", "", r"\boxed{- 4} <eos>", "-4"),
    ("evaluates", "", r"\boxed{8 + 3} <eos>", "11"),
    ("evaluates", "", r"\boxed{22/2} <eos>", "11"),
    ("evaluates", "", r"\boxed{(11)} <eos>", "11"),
    ("evaluates", "", r"\boxed{1e1} <eos>", "10"),
    ("evaluates", "", r"\boxed{1_1} <eos>", "11"),
    ("prompts_box", SAID, "I agree. <eos>", "11"),
    ("prompts_box", SAID, "<eos>", "11"),
    ("prompts_box", SAID, r"\boxed{} <eos>", "11"),
]
ODD = [  # nothing of this is a right answer, and nothing may raise
    "",
    " ",
    EOS,
    r"\boxed",
    r"\boxed{ <eos>",
    r"\boxed{} <eos>",
    r"\boxed{٣} <eos>",
    r"\boxed{²} <eos>",
    r"\boxed{inf} <eos>",
    r"\boxed{nan} <eos>",
    r"\boxed{3.} <eos>",
    r"\boxed{.3} <eos>",
    r"\boxed{3 cm} <eos>",
    r"\boxed{1/0} <eos>",
    r"\boxed{" + "9" * 20_000 + "} <eos>",
    r"\boxed{" * 5000 + EOS,
    "{" * 5000 + EOS,
    "\ud800 \x00 <eos>",
]


@pytest.mark.ex13
def test_ex13_strict_accepts(impl):
    for response, answer, what in RIGHT:
        got = impl.strict_verifier("What is it? " + ORDER, response, answer)
        assert got, f"accept {what}: response {response!r}, answer {answer}"


@pytest.mark.ex13
@pytest.mark.parametrize("fault", VERIFIERS)
def test_ex13_strict_refuses(impl, fault):
    ideas = {
        "anywhere": "only the last box counts, and only if it holds the number alone",
        "cut_off": "a response that did not end, or whose last box is open, is not right",
        "rounds": "numbers are equal or not: nothing is rounded (Fraction is exact)",
        "strips_signs": "a sign is a part of the number",
        "evaluates": "the box holds a plain number: nothing is computed",
        "prompts_box": "look for the box in the response, not in the prompt",
    }
    for name, prompt, response, answer in WRONG:
        if name == fault:
            got = impl.strict_verifier(prompt or "What is it? " + ORDER, response, answer)
            assert not got, f"{ideas[fault]}: you accept {response!r} for {answer}"


@pytest.mark.ex13
def test_ex13_strict_never_raises(impl):
    for response in ODD:
        shown = repr(response[:30])
        try:
            got = impl.strict_verifier("What is 2 + 1? " + ORDER, response, "3")
        except NotImplementedError:
            raise  # conftest.py says "not written yet"
        except Exception as error:
            idea = "a response may be any text: refuse it, don't raise"
            raise AssertionError(f"{idea}: {type(error).__name__} for {shown}") from error
        assert not got, (
            f"the box holds no plain number in the digits 0 to 9: you accept {shown}"
        )


@pytest.mark.ex13
def test_ex13_strict_is_no_exploit(impl):
    """The known exploits, on the prompts of all faults."""
    for fault in VERIFIERS:
        for prompt, answer in problems(fault, 4):
            task = re.search(r"What is (.*?)[?,]", prompt)[1]
            hacks = [task, rf"\boxed{{{task}}} <eos>", "I agree. <eos>"]
            hacks += [answer, rf"\boxed{{{answer}}}", rf"{answer} <eos>"]
            for response in hacks:
                got = impl.strict_verifier(prompt, response, answer)
                assert not got, f"you accept {response!r} for {prompt!r}"
            response = rf"It is \boxed{{{answer}}} <eos>"
            got = impl.strict_verifier(prompt, response, answer)
            assert got, f"accept the right number in a box: {response!r} for {prompt!r}"
