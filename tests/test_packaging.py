"""The files of the project agree: pins, modules, links, flags, names, numbers."""

import ast
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

import siren
import toy_env

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/*.md")])
README = (ROOT / "README.md").read_text()


def pins(path):
    """name -> version of a requirements file, those of the files that it includes left out."""
    lines = (ROOT / path).read_text().splitlines()
    return dict(line.split("==") for line in lines if re.match(r"[a-z]", line))


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_pyproject_has_the_pins_of_the_requirements_files():
    extras = project()["project"]["optional-dependencies"]
    base = [*project()["project"]["dependencies"], *extras["dev"]]
    assert dict(pin.split("==") for pin in base) == pins("requirements.txt")
    examples = dict(pin.split("==") for pin in extras["examples"])
    assert examples == pins("requirements-examples.txt")
    notebook = dict(pin.split("==") for pin in extras["notebook"])
    assert notebook == pins("requirements-notebook.txt")
    for pin in extras["models"]:
        name, version = pin.split("==")
        assert pins("requirements-examples.txt")[name] == version


def test_what_siren_and_the_toy_import_is_required():
    known = set(sys.stdlib_module_names) | {name.replace("-", "_") for name in base_names()}
    for name in ("siren.py", "toy_env.py"):
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                modules = [node.module]
            for module in modules:
                assert module.partition(".")[0] in known, f"{name} imports {module}"


def base_names():
    return [pin.partition("==")[0] for pin in project()["project"]["dependencies"]]


def test_the_modules_of_the_package_are_those_at_the_top():
    """Installed, the command `siren` needs siren.py and the modules of its tasks."""
    modules = set(project()["tool"]["setuptools"]["py-modules"])
    at_the_top = {path.stem for path in ROOT.glob("*.py")} - {"conftest", "test_siren"}
    assert modules == at_the_top and callable(siren.main)


@pytest.mark.slow
def test_installed_it_has_its_base_model_and_runs_from_any_folder(tmp_path):
    """pip install . into an empty folder, as site-packages is; nothing is written there."""
    site, home = tmp_path / "site", tmp_path / "home"
    home.mkdir()
    source = tmp_path / "source"  # setuptools writes beside the code
    source.mkdir()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.toml"), *ROOT.glob("README.md")]:
        shutil.copy(path, source)
    shutil.copy(ROOT / "LICENSE", source)
    shutil.copytree(ROOT / "assets", source / "assets")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site]
    isolated = [] if find_spec("setuptools") is None else ["--no-build-isolation"]
    subprocess.run([*command, *isolated, source], check=True)
    names = {path.name for path in site.iterdir() if "-" not in path.name}
    names -= {"bin", "__pycache__"}
    modules = ("siren.py", "toy_env.py", "text_env.py", "math_answers.py")
    assert names == {*modules, "siren_assets"}
    before = {path for path in site.rglob("*") if "__pycache__" not in path.parts}
    small = "--prompts 4 --mini-batches 1 --steps 1 --eval-prompts 2 --eval-samples 2"
    where = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, site / "bin" / "siren", *small.split()],
        cwd=home,
        env=where,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "teaching" not in done.stderr and (home / "runs" / "anchor-seed0").is_dir()
    after = {path for path in site.rglob("*") if "__pycache__" not in path.parts}
    assert after == before


def test_the_folders_of_the_tests_exist():
    options = project()["tool"]["pytest"]["ini_options"]
    for path in (*options["testpaths"], *options["pythonpath"]):
        assert (ROOT / path).exists(), path
    for path in options["norecursedirs"]:
        assert path in (".*", "runs") or (ROOT / path).is_dir(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing, f"{page.name} links to {missing}"


def test_readme_names_functions_that_exist():
    table = README[README.index("| in the paper") :].partition("\n\n")[0]
    names = re.findall(r"`(\w+)`", table)
    assert len(names) >= 12
    assert all(callable(getattr(siren, name)) for name in names)


def test_readme_prints_what_the_default_run_printed(capsys):
    """results/default_run.jsonl is the metrics.jsonl of `python siren.py --device cpu`."""
    lines = (ROOT / "results" / "default_run.jsonl").read_text().splitlines()
    siren.report([json.loads(line) for line in lines])
    assert f"```\n{capsys.readouterr().out}```" in README


def test_readme_names_flags_that_exist():
    known = {field.name for field in dataclasses.fields(siren.Config)} | {"resume", "help"}
    known |= {field.name for field in dataclasses.fields(toy_env.ToyWorld)}
    flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z-]*)", README)}
    assert len(flags) > 5 and flags <= known, f"unknown flags {flags - known}"


def test_the_settings_of_a_run_fit_on_a_page():
    assert len(dataclasses.fields(siren.Config)) <= 35
