"""The exact verifier of text_env.py on the hand-judged pairs of tests/data/verdicts*.jsonl.

A pair that is judged "not right" and accepted is a wrong reward: there must be none. One that
is judged right and rejected costs a reward; docs/verifier.md counts them by kind.
"""

import json
from collections import Counter

import pytest

import siren
import text_env
from math_answers import plain_boxes
from research import verdicts

FILES = {  # name: the pairs that were judged at one time
    path.name: [json.loads(line) for line in path.read_bytes().splitlines()]
    for path in verdicts.FILES
}
PAIRS = [pair for pairs in FILES.values() for pair in pairs]
# the most right pairs of a file that are rejected, of 312 and of 216
REJECTED = {"verdicts.jsonl": 90, "verdicts2.jsonl": 107}
# pairs that were accepted once, and must not be again
WRONG = [
    *[("5.5", "1 \\frac{1}{2}"), ("5  6", "56"), ("1, 234", "1234"), ("5\\ 6", "56")],
    *[("5\\;6", "56"), ("5\\text{ }6", "56"), ("3 quarters", "3"), ("5 hundredths", "5")],
    *[("5 trillion", "5"), ("5 millions", "5")],
]
# kinds of answers that need no algebra, in which nothing that is right is rejected
PLAIN = {"spaces"}


def verify(response, answer):
    """The reward of a language model's response."""
    return siren.verify(plain_boxes(response), answer, None, text_env.equal)


def test_the_file_is_what_it_says():
    assert FILES.keys() == REJECTED.keys() and len(PAIRS) >= 1000
    assert all(pair.keys() == {"response", "answer", "right", "kind"} for pair in PAIRS)
    assert len({(pair["response"], pair["answer"]) for pair in PAIRS}) == len(PAIRS)
    share = sum(pair["right"] for pair in PAIRS) / len(PAIRS)
    assert 0.45 < share < 0.55
    kinds = Counter((pair["kind"], pair["right"]) for pair in PAIRS)
    assert all(
        kinds[kind, right] >= 2
        for kind, _ in kinds
        for right in (True, False)
        if kind != "hostile"
    )
    wrong = {(pair["response"], pair["answer"]) for pair in PAIRS if not pair["right"]}
    for given, answer in WRONG:
        boxed = [response for response, gold in wrong if gold == answer]
        assert any(f"\\boxed{{{given}}}" in response for response in boxed), (given, answer)


def test_nothing_wrong_is_accepted():
    accepted = [
        (pair["response"], pair["answer"])
        for pair in PAIRS
        if not pair["right"] and verify(pair["response"], pair["answer"])
    ]
    assert accepted == []


def test_the_order_of_the_two_does_not_matter():
    for pair in PAIRS:
        given = siren.extract_answer(plain_boxes(pair["response"]))
        answer = pair["answer"]
        if (
            given is None
            or "\\boxed" in answer + given
            or siren.extract_answer(f"\\boxed{{{answer}}}") != answer
        ):
            continue
        turned = verify(f"\\boxed{{{answer}}}", given)
        assert turned == verify(pair["response"], answer), pair


def test_what_needs_no_algebra_is_accepted():
    for name, pairs in FILES.items():
        errors = verdicts.count(pairs, text_env.equal)
        assert errors.total() <= REJECTED[name], name
        assert not PLAIN & {kind for kind, _ in errors}


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair["kind"] == "boxes"], ids=str)
def test_boxes_are_decided_without_algebra(pair):
    if pair["response"] != "\\boxed{x = \\boxed{9}}":  # of nested boxes the outer one counts
        assert verify(pair["response"], pair["answer"]) is pair["right"]


def test_siren_py_alone_accepts_nothing_wrong():
    """Its own rule knows numbers and texts, and no LaTeX: it rejects more."""
    accepted = [pair for pair in PAIRS if siren.verify(pair["response"], pair["answer"])]
    assert [pair for pair in accepted if not pair["right"]] == []
    assert len(accepted) > 45  # of the 528 right ones


def test_a_page_without_marks_is_one_line(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("nothing")
    assert verdicts.main(["--page", str(page)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("verdicts.py: error: --page") and verdicts.END in line
