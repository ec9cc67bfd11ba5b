"""The project's own files agree with each other: pins, links, flags and names in the documents."""

import json
import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

import siren
from examples import engine

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/*.md")])


def pins(path):
    """name -> version of a requirements file, those of the files that it includes left out."""
    lines = (ROOT / path).read_text().splitlines()
    return dict(line.split("==") for line in lines if re.match(r"[a-z]", line))


def test_pyproject_has_the_pins_of_the_requirements_files():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    base = dict(pin.split("==") for pin in [*project["dependencies"], *extras["dev"]])
    assert base == pins("requirements.txt")
    assert dict(pin.split("==") for pin in extras["examples"]) == pins("requirements-examples.txt")
    assert dict(pin.split("==") for pin in extras["notebook"]) == pins("requirements-notebook.txt")
    every = pins("requirements-examples.txt")
    assert all(
        every[name] == version for name, version in (p.split("==") for p in extras["models"])
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing, f"{page.name} links to {missing}"


def test_readme_names_functions_that_exist_and_fits_a_reader():
    text = (ROOT / "README.md").read_text()
    table = text[text.index("| in the paper") :].partition("\n\n")[0]
    names = re.findall(r"`(\w+)`", table)
    assert len(names) >= 12
    assert all(callable(getattr(siren, name)) for name in names)
    assert len(text.split()) <= 1200, "README, tables included, is to be read in five minutes"


def test_readme_prints_what_the_default_run_printed():
    """results/default_run.jsonl is the metrics.jsonl of `python siren.py --device cpu`."""
    lines = (ROOT / "results" / "default_run.jsonl").read_text().splitlines()
    shown = engine.report([json.loads(line) for line in lines])
    assert f"```\n{shown}\n```" in (ROOT / "README.md").read_text()


def test_readme_commands_use_flags_that_exist():
    known = {field.name.replace("_", "-") for field in fields(siren.Config)} | {"resume", "help"}
    for command in re.findall(r"python siren\.py[^`\n]*", (ROOT / "README.md").read_text()):
        flags = set(re.findall(r"--([a-z][a-z-]*)", command))
        assert flags <= known, f"{command}: {flags - known}"


def test_siren_py_stays_small():
    """What a student reads in one sitting: lines, fields, and no function longer than a screen."""
    import ast

    source = (ROOT / "siren.py").read_text()
    assert len(source.splitlines()) <= 700
    assert len(fields(siren.Config)) <= 35
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
    assert max(n.end_lineno - n.lineno + 1 for n in functions) <= 60
    block = source[source.index("# === begin: copy") : source.index("# === end: copy")]
    assert block.count("\n") <= 220
