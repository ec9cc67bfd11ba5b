"""Grades the graders: each wrong solution of wrong.py must fail, with the sentence that helps.

python -m pytest -q exercises
"""

from __future__ import annotations

import ast
import dataclasses
import doctest
import inspect
import itertools
import json
import math
import re
import subprocess
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import siren
import toy_env
from exercises import hack_toy, mistakes, mutate, reference, solutions, student, watch, wrong
from exercises.grading import EXERCISES, SOLUTION, cases, failures, graders_of, solution_with
from exercises.tiny import TinyModel
from research.plugs import plugged

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("row", wrong.WRONG, ids=lambda row: f"{row.exercise}-{row.name}")
def test_the_first_failure_names_the_mistake(row):
    """As a student sees it, who runs the graders with -x."""
    test, error = next(
        failures(row.exercise, solution_with(**row.changes)), ("", "none fails")
    )
    assert row.words in str(error), f"another sentence, in {test}: {error}"
    assert isinstance(error, AssertionError)


@pytest.mark.parametrize(
    "exercise, changes, test, words",
    [
        ("ex3", {"nucleus_mask": wrong.exclusive_nucleus}, "many_logits", "known mistake"),
        ("ex8", {"micro_batch_anchor": wrong.scaled_anchor}, "gaps_of", "the gap of each"),
        ("ex8", {"micro_batch_anchor": wrong.gap_squared}, "many_gaps", "squared gap"),
    ],
)
def test_later_graders_catch_it_too(exercise, changes, test, words):
    """Hidden behind the first failure, and yet no decoration."""
    (grader,) = (one for one in graders_of(exercise) if test in one.__name__)
    with pytest.raises(AssertionError, match=words):
        for given in cases(grader, exercise):
            grader(impl=solution_with(**changes), **given)


def test_wrong_solutions_are_many_and_differ():
    assert len({(row.exercise, row.name) for row in wrong.WRONG}) == len(wrong.WRONG)
    counts = Counter(row.exercise for row in wrong.WRONG)
    assert all(counts[f"ex{number}"] >= 8 for number in range(1, 13)), counts
    known = mistakes.wrong_solutions()
    assert all(len(known[exercise]) >= 15 for exercise in EXERCISES)


@pytest.mark.parametrize("exercise", EXERCISES)
def test_known_mistakes_are_refused_with_a_sentence(exercise, monkeypatch):
    """A few raise an error of their own, which shows its line."""
    passed = []
    crashed = []
    known = mistakes.wrong_solutions()[exercise]
    for name, changes in known.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, error = next(failures(exercise, solution_with(**changes)), ("", None))
        if error is None:
            passed.append(name)
        elif not isinstance(error, AssertionError):
            crashed.append(name)
    assert not passed, "nothing fails"
    assert len(crashed) <= 2, crashed


@pytest.mark.parametrize("exercise", EXERCISES)
def test_right_solutions_in_another_style_are_accepted(exercise):
    for name, changes in mistakes.right_solutions()[exercise].items():
        found = list(failures(exercise, solution_with(**changes)))
        assert not found, f"{name}: {found}"


def test_plain_solutions_are_accepted():
    for exercise in EXERCISES:
        found = list(failures(exercise, solutions))
        assert not found, f"{exercise}: {found}"


@pytest.mark.parametrize(
    "exercise, function, words",
    [
        ("ex1", "group_advantages", "known mistake: rewards clamped to 0..1"),
        ("ex2", "policy_loss", "known mistake: dual clip"),
        ("ex3", "nucleus_mask", "known mistake: at most 64"),
        ("ex4", "nucleus_entropy", "known mistake: exp of the logits, which overflows"),
        ("ex7", "siren_loss", "known mistake: penalty: huber"),
        ("ex8", "micro_batch_anchor", "known mistake: at least 0"),
        ("ex10", "maj_at_k", "known mistake: stripped"),
    ],
)
def test_a_failure_says_whose_numbers_they_are(exercise, function, words):
    (changes,) = (
        changes
        for name, changes in mistakes.wrong_solutions()[exercise].items()
        if words.endswith(f": {name}")
    )
    _, error = next(failures(exercise, solution_with(**changes)))
    assert list(changes) == [function] and words in str(error)


def write_to(rewards, size):
    rewards -= rewards.mean()
    return rewards


@pytest.mark.parametrize(
    "function, words",
    [
        (write_to, "rewards was written to"),
        (lambda rewards, size: rewards.requires_grad_(), "has another requires_grad"),
        (lambda rewards, size: rewards + torch.rand(2), "changes torch's global random"),
        (lambda rewards, size: torch.set_grad_enabled(False) or rewards, "is_grad_enabled"),
        (lambda rewards, size: rewards.data.mul_(1 / 2), "rewards was written to"),
    ],
)
def test_a_watched_function_must_leave_no_trace(function, words):
    call = watch.watched(function, "group_advantages")
    with torch.enable_grad(), pytest.raises(AssertionError, match=words):
        call(torch.tensor([1.0, 0.0]), 2)
    assert watch.watched(lambda x, size: x * 2, "f")(torch.ones(2), 2).tolist() == [2, 2]


def test_watched_lists_and_models():
    def fill(prompts):
        prompts[0].append(1)

    with pytest.raises(AssertionError, match="prompts was written to"):
        watch.watched(fill, "f")([[2]])
    model = torch.nn.Linear(1, 1)
    with pytest.raises(AssertionError, match="another `training`"):
        watch.watched(lambda model: model.eval(), "f")(model)
    with pytest.raises(AssertionError, match="other weights"):
        watch.watched(lambda model: model.weight.data.zero_(), "f")(model)


def test_the_tiny_model_is_called_as_one_of_transformers_is():
    """With its own cache and with transformers' one, and by siren.sample."""
    model = TinyModel().eval()
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 1]])
    whole = model(input_ids=ids).logits
    for cache in (None, DynamicCache()):
        first = model(input_ids=ids[:, :3], past_key_values=cache, use_cache=True)
        last = model(input_ids=ids[:, 3:], past_key_values=first.past_key_values)
        assert torch.allclose(last.logits[:, 0], whole[:, 3], atol=1e-5)
    assert not list(failures("ex11", reference))


def train_mine_command(*words):
    command = [sys.executable, "exercises/train_mine.py", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_train_mine_begins_like_siren(tmp_path):
    given = ["--impl", "exercises/solutions.py", "--steps", "2", "--out", str(tmp_path)]
    done = train_mine_command(*given)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine.png").read_bytes()[:4] == b"\x89PNG"
    mine = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    stored = [json.loads(line) for line in (ROOT / "results/default_run.jsonl").open()]
    for name in ("reward", "h_agg", "entropy", "policy_loss", "regularizer_loss"):
        assert math.isclose(mine[1][name], stored[1][name], abs_tol=1e-4), name
    assert abs(mine[2]["h_agg"] - stored[2]["h_agg"]) < 0.02


def test_train_mine_says_what_is_missing(tmp_path):
    done = train_mine_command()
    assert (
        done.returncode == 2
        and "exercise 1 (group_advantages), 2 (policy_loss)" in done.stderr
    )
    path = tmp_path / "mine.py"
    path.write_text("from exercises.solutions import *\ndel peak_mask\n")
    done = train_mine_command("--impl", str(path))
    assert done.returncode == 2 and "not written yet: exercise 5 (peak_mask)" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_how_sure_prints_the_numbers_of_the_readme():
    command = [sys.executable, "exercises/how_sure.py", "--impl", "exercises/solutions.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    row = next(line for line in done.stdout.splitlines() if "dr_grpo      maj@16" in line)
    assert "+0.174  [+0.104, +0.249]" in row, row
    assert "+.174 [+.104, +.249]" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("fault", hack_toy.FAULTS)
def test_the_faulty_toy_pays_what_its_fault_says(fault):
    world = hack_toy.load(None, fault=fault)
    cases = {
        "8 5 13 1 14 <eos>": ("anywhere", "cut_off", "rounds", "outcome"),
        "8 5 12 1 14 <eos>": ("anywhere", "cut_off", "rounds", "outcome"),  # cancelling errors
        "8 5 12 1 13 <eos>": ("rounds",),
        "14 5 19 <eos>": ("anywhere",),
        "8 5 13 1 14": ("anywhere", "cut_off"),
    }
    for text, paid_by in cases.items():
        paid = siren.verify(text, "14", world.find_answer, world.equal)
        assert paid is (fault in paid_by), text
    metrics = world.metrics([[5]] * len(cases))
    paid = sum(fault in paid_by for paid_by in cases.values())
    assert metrics["honest"] == 1 / 5 and math.isclose(metrics["hacked"], (paid - 1) / 5)
    assert world.gaps == toy_env.ToyWorld().gaps and world.base_file.exists()


def test_the_faulty_toy_trains(capsys):
    (record,) = hack_toy.train("rounds", 1)
    assert record["reward"] > record["honest"] + 0.05, "errors of up to 3 are paid"
    assert record["reward"] == record["honest"] + record["hacked"]
    assert capsys.readouterr().out.splitlines()[1].split()[0] == "1"


@pytest.mark.parametrize(
    "exercise, function",
    [
        ("ex2", wrong.clipped_loss),
        ("ex7", wrong.anchored_loss),
        ("ex10", wrong.majority),
        ("ex11", wrong.slow_sampler),
    ],
)
def test_without_its_slip_it_is_right(exercise, function):
    """So it is the slip that is caught."""
    assert not list(failures(exercise, solution_with(**{EXERCISES[exercise][0]: function})))


@pytest.mark.parametrize("exercise", EXERCISES)
def test_the_solution_behind_the_students_signatures_passes(exercise):
    """The solution solves it; no grader uses an argument that student.py does not have."""

    def behind(name: str) -> Callable:
        solution, signature = SOLUTION[name], inspect.signature(getattr(student, name))

        def checked(*args: Any, **given: Any) -> Any:
            signature.bind(
                *args, **given
            )  # TypeError: the student's function has no such argument
            return solution(*args, **given)

        return checked

    names = itertools.chain(*EXERCISES.values())
    module = SimpleNamespace(
        **{name: behind(name) for name in names}
    )  # and nothing else of siren
    assert graders_of(exercise) and not list(failures(exercise, module))


@pytest.mark.parametrize("exercise", EXERCISES)
def test_every_failure_has_a_sentence(exercise):
    for test in graders_of(exercise):
        file = Path(sys.modules[test.__module__].__file__)
        tree = ast.parse(file.read_text(encoding="utf-8"))
        (function,) = (
            node for node in tree.body if getattr(node, "name", "") == test.__name__
        )
        for node in ast.walk(function):
            message = not isinstance(node, ast.Assert) or node.msg
            assert message, f"{test.__name__}, line {node.lineno}"


def test_student_file_has_every_exercise_in_order():
    text = (ROOT / "exercises" / "student.py").read_text(encoding="utf-8")
    functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    written = dict.fromkeys(itertools.chain(*EXERCISES.values()))  # as an ordered set
    assert [node.name for node in functions] == list(written)
    for node in functions:
        doc = ast.get_docstring(node)
        shown = ">>> " in doc or node.name in ("sample", "plug")
        assert shown, f"{node.name}: a worked example"
        assert len(node.body) == 2 and isinstance(node.body[1], ast.Raise), (
            f"{node.name}: a body"
        )
        assert all(argument.annotation for argument in node.args.args + node.args.kwonlyargs)


@pytest.mark.parametrize("option, right", [("", 1), (":quantile=0.6", 0)])
def test_the_drop_in_trains(option, right):
    """Exercise 12's solution by --plug: one of two responses is right, which one counts?"""
    rewards = torch.tensor([1.0, 0.0])
    with plugged(f"exercises.qae{option}"):
        adv = siren.group_advantages(rewards, 2, "dr_grpo")
    assert adv.tolist() == [right, right - 1]
    assert siren.group_advantages(rewards, 2).tolist() == [0.5, -0.5], "and back again"


def test_worked_examples_hold_for_the_solution():
    runner, finder = doctest.DocTestRunner(), doctest.DocTestFinder()
    for name in itertools.chain(*EXERCISES.values()):
        (examples,) = finder.find(
            getattr(student, name), name, globs={**SOLUTION, "torch": torch}
        )
        runner.run(examples)
    assert runner.summarize(verbose=False) == (0, runner.tries) and runner.tries >= 10


def test_readme_has_every_exercise():
    text = (ROOT / "exercises" / "README.md").read_text(encoding="utf-8")
    for exercise, names in EXERCISES.items():
        number = exercise[2:]
        (row,) = re.findall(
            rf"^\| {number} \| \[.*\) \| `(.+)` \| (.*) \|$", text, re.MULTILINE
        )
        assert row[0] == names[0]
        section = text.split(f"\n## {number}. ")[1].split("\n## ")[0]
        marks = r"Difficulty: ([1-5])/5, importance: ([1-5])/5, ([0-9]+-[0-9]+) minutes"
        assert re.search(marks, section).groups() == tuple(row[1].split(" | ")), (
            "as in the table"
        )
        assert section.count("<details><summary>Hint</summary>") == 1
    flags = {flag.strip("-") for flag in re.findall(r"(?<!\S)`?--([a-z][a-z-]+)", text)}
    known = {field.name.replace("_", "-") for field in dataclasses.fields(siren.Config)}
    known |= {field.name.replace("_", "-") for field in dataclasses.fields(toy_env.ToyWorld)}
    assert flags <= known | {"impl", "help", "plug", "fault", "table"}, (
        f"unknown flags {flags - known}"
    )


# ------------------------------------------------------------------------------------- mutants


@pytest.mark.parametrize("exercise", EXERCISES)
def test_a_sample_of_the_mutants_is_killed(exercise):
    """One in sixty; `python exercises/mutate.py` runs all. What is explained must still
    exist."""
    made = list(mutate.mutants(exercise))
    texts, explained = (
        {mutant.text for mutant in made},
        [*itertools.chain(*mutate.EQUIVALENT.values())],
    )
    names = mutate.FUNCTIONS[exercise]
    assert all(text in texts for text in explained if text.split(":")[0] in names)
    assert all(killed_or_explained(mutant) for mutant in made[7::60] or made[:1])


def killed_or_explained(mutant):
    equivalent = any(mutant.text in texts for texts in mutate.EQUIVALENT.values())
    return mutate.killed(mutant) is not equivalent


def test_what_mutants_leave_alone_exists():
    code = defaultdict(str)  # function -> its code, also in two files
    for path in mutate.FILES.values():
        for _, node in mutate.functions(ast.parse(path.read_text())):
            code[node.name] += ast.unparse(node)
    assert set(itertools.chain(*mutate.FUNCTIONS.values())) <= set(code)
    for name, texts in mutate.NOT_ASKED.items():
        for text in texts:
            assert text in code[name], f"{name}: {text}"


@pytest.mark.parametrize(
    "exercise, code, dead",
    [
        ("ex1", "from exercises.reference import *", False),
        ("ex8", "from exercises.reference import *", False),
        ("ex9", "from exercises.reference import *", False),
        ("ex9", "def pass_at_k(n, c, k): return c / n", True),
        ("ex9", "def pass_at_k(n, c, k):\n    while True: pass", True),
    ],
)
def test_the_solution_survives_and_what_is_wrong_or_hangs_does_not(
    monkeypatch, exercise, code, dead
):
    if "while True" in code:
        monkeypatch.setattr(mutate, "SECONDS", 1)
    assert mutate.killed(mutate.Mutant(exercise, "", ast.parse(code))) is dead


def test_the_mutation_run_prints_its_share(capsys):
    assert mutate.main(["ex8"]) == 0
    *_, ex8, everything = (line.split() for line in capsys.readouterr().out.splitlines())
    assert ex8 == ["ex8", "6", "6", "0", "100%"] and everything == ["all", *ex8[1:]]


# ---------------------------------------------------------------------- as a student runs them


def run_graders(*words: str) -> subprocess.CompletedProcess[str]:
    """pytest in a process of its own, as README has it."""
    command = [sys.executable, "-m", "pytest", "exercises", "-q", "-p", "no:cacheprovider"]
    return subprocess.run([*command, *words], capture_output=True, text=True, cwd=ROOT)


def test_untouched_file_fails_every_exercise_in_one_line():
    done = run_graders("--impl", "exercises/student.py")
    assert done.returncode == 1 and " passed" not in done.stdout.splitlines()[-1]
    for exercise, names in EXERCISES.items():
        line = f"not written yet: exercise {exercise[2:]}, {names[0]}"
        assert line in done.stdout, f"{line}: not in {done.stdout[-2000:]}"
    for noise in ("Traceback", "raise NotImplementedError", "test_siren.py:"):
        assert noise not in done.stdout


MINE = """
import torch
from exercises.reference import nucleus_entropy

def nucleus_mask(logits, top_p):
    p, order = logits.softmax(-1).sort(-1, descending=True)
    return torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, p.cumsum(-1) <= top_p)

def pass_at_k(n, c, k):
    return c[0]

def maj_at_k(votes, answer, k):
    assert len(votes) % k == 7
"""


def test_one_file_with_all_that_can_happen(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    done = run_graders("--impl", str(path), "-m", "ex3 or ex4 or ex5 or ex9 or ex10")
    assert done.returncode == 1
    *_, three, four, five, nine, ten, _ = done.stdout.strip().splitlines()
    assert (
        three.startswith("ex3") and "your nucleus leaves out the token that crosses p" in three
    )
    assert four.startswith("ex4") and "failed" not in four, (
        "an imported function is a solution"
    )
    assert five.startswith("ex5") and five.endswith("mine.py has no function peak_mask")
    assert nine.startswith("ex9") and "'int' object is not subscriptable" in nine
    assert ten.startswith("ex10") and ten.endswith("first: AssertionError")
    for line in ("return c[0]", "assert len(votes) % k == 7"):
        assert line in done.stdout, "the student's own error shows its line"


@pytest.mark.parametrize(
    "text, words",
    [
        (None, "must be a Python file"),
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named"),
        ("def f(:", "SyntaxError: invalid syntax, line 1"),
    ],
)
def test_bad_file_is_one_clear_line(tmp_path, text, words):
    path = tmp_path / "mine.py"
    if text:
        path.write_text(text)
    done = run_graders("--impl", str(path))
    assert done.returncode == 4 and words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr
