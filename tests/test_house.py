"""The house: what may import what, and how long siren.py and toy_env.py may be."""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE = ["siren.py", "toy_env.py", "text_env.py"]
FOLDERS = {"examples", "research", "exercises", "tests"}
PROJECT = FOLDERS | {path.stem for path in ROOT.glob("*.py")}
BESIDES_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def source_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def imports(nodes):
    """The first names of the modules that are imported in these nodes, at any depth."""
    found = set()
    for node in nodes:
        for part in ast.walk(node):
            if isinstance(part, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in part.names}
            if isinstance(part, ast.ImportFrom):
                found.add((part.module or "").partition(".")[0])
    return found


def when_imported(tree):
    """The statements of a module that run when it is imported: none of a function's body."""
    whole = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in tree.body if not isinstance(node, whole) and not is_main(node)]


def is_main(node):
    return isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)


def code_lines(source):
    """How many lines hold code: neither empty nor only a comment or a docstring."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in BESIDES_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


EXAMPLE = '''"""A docstring
of two lines."""

import math  # 1


def f(x):  # 2
    """One."""
    # a comment
    y = """a text
    of two lines"""  # 3 and 4

    return math.sqrt(  # 5
        x  # 6
    )  # 7
'''


def test_lines_of_code_are_counted_without_comments_and_docstrings():
    assert code_lines(EXAMPLE) == 7


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_nothing_that_stands_above_it(name):
    source = source_of(name)
    assert not imports(ast.parse(source).body) & FOLDERS
    for folder in FOLDERS:
        assert f'import_module("{folder}' not in source


@pytest.mark.parametrize("name", ["siren.py", "toy_env.py"])
def test_siren_and_the_toy_import_nothing_of_the_project(name):
    """siren.py finds the module of its task by its name, in a run; there is no circle."""
    assert not imports(ast.parse(source_of(name)).body) & PROJECT


def test_text_env_may_import_siren_and_what_it_needs():
    found = imports(ast.parse(source_of("text_env.py")).body) & PROJECT
    assert found <= {"siren", "math_answers"}


@pytest.mark.parametrize("folder", ["examples", "research"])
def test_no_folder_needs_another_one(folder):
    """examples/ and research/ import the core and themselves."""
    names = {Path(name).stem for name in (*CORE, "math_answers.py")} | {folder}
    for path in (ROOT / folder).rglob("*.py"):
        found = imports(ast.parse(path.read_text(encoding="utf-8")).body) & PROJECT
        if path.name in ("bench.py", "compare_trl.py"):
            found -= {"examples"}  # they measure the example for TRL
        assert found <= names, f"{path.relative_to(ROOT)} imports {found - names}"


@pytest.mark.parametrize("name", ["siren", "toy_env"])
def test_an_import_runs_nothing_and_brings_no_module_of_the_project(name):
    code = f"import sys, {name}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and not done.stderr
    loaded = {module.partition(".")[0] for module in done.stdout.split()}
    assert loaded & (PROJECT - {"conftest"}) == {name} and "transformers" not in loaded
    for node in when_imported(ast.parse(source_of(f"{name}.py"))):
        called = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        assert not called, f"{name}.py runs {ast.unparse(node)} when it is imported"


@pytest.mark.parametrize("name", CORE)
def test_the_core_is_ordinary_text(name):
    source = source_of(name)
    assert "fmt: skip" not in source and "fmt: off" not in source
    assert max(map(len, source.splitlines())) <= 95
    for node in ast.walk(ast.parse(source)):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), "a bare except"
        called = node.func.id if is_call_by_name(node) else ""
        assert called not in ("eval", "exec"), f"line {node.lineno}: {called}"


def is_call_by_name(node):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


def block():
    source = source_of("siren.py")
    return source[source.index("# === begin: copy") : source.index("# === end: copy")]


@pytest.mark.parametrize(
    "what, count, most",
    [
        ("lines of siren.py", len(source_of("siren.py").splitlines()), 782),
        ("lines of code in siren.py", code_lines(source_of("siren.py")), 487),
        ("lines between the copy marks", block().count("\n"), 182),
        ("lines of toy_env.py", len(source_of("toy_env.py").splitlines()), 330),
        ("lines of test_siren.py", len(source_of("test_siren.py").splitlines()), 1200),
    ],
)
def test_it_can_be_read_in_one_sitting(what, count, most):
    assert count <= most, f"{what}: {count}, at most {most}"


@pytest.mark.parametrize("name", ["siren.py", "toy_env.py"])
def test_no_function_is_longer_than_a_screen(name):
    for node in ast.walk(ast.parse(source_of(name))):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 45, f"{name}: {node.name} has {lines} lines"
