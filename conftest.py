"""pytest's option --impl: the graders of the exercises, run on a solution of a student.

python -m pytest exercises --impl exercises/student.py -m ex3
"""

from __future__ import annotations

import importlib.util
import re
import sys
import traceback
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

collect_ignore = ["exercises/student.py"]  # its worked examples hold only once it is solved
ROOT = Path(__file__).parent
# those on small numbers come first; all of one exercise: its failures name the missing idea
GRADERS = (
    "test_graders.py",
    "test_exercise_12.py",
    "test_sampler.py",
    "test_compare.py",
    "test_hacking.py",
    "test_statistics.py",
)
NO_STUDENT = [f"exercises/{name}" for name in (*GRADERS, "compare.py", "watch.py")]
GRADING = {str(ROOT / name) for name in (*NO_STUDENT, "tests/common.py")}
STUDENT = pytest.StashKey[ModuleType]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """--impl PATH."""
    text = "a solution of exercises/student.py: run the graders of the exercises on it alone"
    parser.addoption("--impl", metavar="PATH", help=text)


def fix_examples() -> None:
    """Hypothesis draws the same examples every time. The graders do without it: it is slow."""
    from hypothesis import Phase, settings

    phases = (Phase.generate, Phase.shrink)  # without `explain`, which is slow
    settings.register_profile(
        "fixed",
        derandomize=True,
        phases=phases,
        deadline=None,
        database=None,
        max_examples=60,
        report_multiple_bugs=False,  # one failure, no group of them
    )
    settings.load_profile("fixed")


def pytest_configure(config: pytest.Config) -> None:
    """Load the module of --impl; one line if it can't be."""
    if not (path := config.getoption("--impl")):
        fix_examples()
        return
    # the graders do without hypothesis, whose plugin imports it to sum up: a second or two
    if plugin := config.pluginmanager.get_plugin("hypothesispytest"):
        config.pluginmanager.unregister(plugin)
    if not Path(path).is_file() or not path.endswith(".py"):
        raise pytest.UsageError(
            f"--impl {path}: must be a Python file, like exercises/student.py"
        )
    spec = importlib.util.spec_from_file_location("student", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["student"] = module  # where dataclasses look up their annotations
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file may do
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        reason = f"{type(error).__name__}: {error.msg if where else error}{where}"
        raise pytest.UsageError(f"--impl {path}: can't be imported: {reason}") from error
    config.stash[STUDENT] = module
    config.args[:] = graders_for(
        config.option.markexpr
    )  # whatever was asked for: it is faster
    if config.option.tbstyle == "auto":
        config.option.tbstyle = "short"  # the student's own errors, in few lines
    if config.option.reportchars == "fE":  # pytest's default
        config.option.reportchars = ""  # the summary by exercises says it shorter


@pytest.hookimpl(optionalhook=True)  # there is no such hook without pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With -n alone, the tests of a file stay together: they share what they train."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log) if config.option.dist == "load" else None


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small models are faster so, and numbers repeat."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def impl(request: pytest.FixtureRequest) -> ModuleType:
    """exercises/reference.py, which is siren.py as a solution; or the module of --impl."""
    if STUDENT in request.config.stash:
        from exercises.watch import Watched

        return Watched(request.config.stash[STUDENT])
    from exercises import reference

    return reference


def graders_for(expression: str) -> list[str]:
    """The files of GRADERS that -m needs: only the sampler's for exercise 11."""
    asked = set(re.findall(r"\bex(\d+)\b", expression))
    plain = asked and not re.search(r"\bnot\b", expression)
    needed = {
        "test_graders.py": {str(i) for i in range(1, 11)},
        "test_exercise_12.py": {"12"},
        "test_sampler.py": {"11"},
        "test_compare.py": {str(i) for i in (*range(1, 11), 12)},
        "test_hacking.py": {"13"},
        "test_statistics.py": {"14"},
    }
    names = [name for name in GRADERS if not plain or asked & needed[name]]
    return [str(ROOT / "exercises" / name) for name in names or GRADERS]


def exercise_of(item: pytest.Item) -> int:
    """The number of the exercise that a test grades; 0 for none."""
    names = [re.fullmatch(r"ex(\d+)", mark.name) for mark in item.iter_markers()]
    return max((int(name[1]) for name in names if name), default=0)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --impl only the graders, by exercise, those on small numbers first."""
    if STUDENT not in config.stash:
        return
    config.hook.pytest_deselected(items=[item for item in items if not exercise_of(item)])
    items[:] = sorted((item for item in items if exercise_of(item)), key=exercise_of)


def raised_in(error: BaseException) -> str:
    """The file whose code raised it."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_code.co_filename


def known_mistake(item: pytest.Item, error: AssertionError) -> str:
    """More words, where the student's numbers are those of a known wrong solution."""
    from exercises import test_compare, watch

    if isinstance(error, test_compare.Differs):  # it has them
        return ""
    impl = watch.Watched(item.config.stash[STUDENT])
    return test_compare.known_mistake(f"ex{exercise_of(item)}", impl)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """With --impl a failure is the sentence that names the missing idea, and no traceback."""
    student, text = pyfuncitem.config.stash.get(STUDENT, None), ""
    try:
        return (yield)
    except NotImplementedError as error:
        if student is None or not str(error).startswith("exercise "):  # PyTorch raises it, too
            raise
        text = f"not written yet: {error}"
    except AssertionError as error:
        if student is None or raised_in(error) not in GRADING:
            raise
        text = str(error).partition("\nassert ")[0] + known_mistake(pyfuncitem, error)
    except AttributeError as error:
        if student is None or error.obj is not student:
            raise
        text = f"{Path(student.__file__).name} has no function {error.name}"
    pytest.fail(text, pytrace=False)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """With --impl, a line an exercise: how many of its tests pass, and the first failure."""
    if STUDENT not in config.stash:
        return
    titles = dict(line.split(": ", 1) for line in config.getini("markers") if line[:2] == "ex")
    passed, failures = Counter(), {}
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            exercise = next(name for name in titles if name in report.keywords)
            passed[exercise] += outcome == "passed"
            if outcome != "passed":
                crash = getattr(report.longrepr, "reprcrash", None)
                text = crash.message if crash else str(report.longrepr)
                line = text.strip().splitlines()[0].removeprefix("Failed: ")
                failures.setdefault(exercise, []).append(line)
    terminalreporter.section("exercises")
    for exercise, title in titles.items():
        failed = failures.get(exercise, [])
        if passed[exercise] or failed:
            line = f"{exercise:<5}{title:<28}{passed[exercise]} passed"
            if failed:
                line += f", {len(failed)} failed, first: {failed[0]}"
            terminalreporter.write_line(line)
