"""Tests of examples/README.md: the drop-in that it shows works, and those that it names
exist."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import siren
from research.plugs import plugged

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "examples" / "README.md").read_text()
SMALL = {"regularizer": "none", "prompts": 8, "group_size": 8, "mini_batches": 1}
SMALL |= {"grad_clip": 1000.0, "steps": 1, "eval_prompts": 1, "eval_samples": 1}


def run(folder):
    """The records of a short run in `folder`."""
    return siren.train(siren.Run(siren.Config(**SMALL, out=str(folder))))


def test_the_drop_in_of_the_readme(tmp_path, monkeypatch):
    """Leave-one-out advantages are the plain ones times n / (n - 1), and so is the
    gradient."""
    (code,) = (block.split("```")[0] for block in TEXT.split("```python\n")[1:])
    (tmp_path / "rloo.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    module = importlib.import_module("rloo")
    expected = siren.group_advantages(rewards, 3) * 3 / 2
    torch.testing.assert_close(module.leave_one_out(rewards, 3), expected)

    plain = run(tmp_path / "plain")[1]
    with plugged("rloo"):
        changed = run(tmp_path / "plugged")[1]
    assert plain["reward"] == changed["reward"] > 0
    assert plain["grad_norm"] > 0.01
    assert changed["grad_norm"] == pytest.approx(plain["grad_norm"] * 8 / 7, rel=1e-4)


@pytest.mark.slow
def test_the_command_with_a_drop_in(tmp_path):
    flags = "--prompts 4 --mini-batches 1 --steps 1 --eval-prompts 1 --eval-samples 1"
    command = [sys.executable, str(ROOT / "research" / "plugs.py"), "--plug"]
    command += ["research.refill", *flags.split(), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reward" in done.stdout and (tmp_path / "run" / "checkpoint.pt").exists()


def test_it_names_drop_ins():
    assert len(re.findall(r"--plug (research\.\w+)", TEXT)) >= 4


@pytest.mark.parametrize("name", sorted(set(re.findall(r"--plug (research\.\w+)", TEXT))))
def test_the_drop_ins_that_it_names(name):
    before = dict(vars(siren))
    with plugged(name):
        changed = {key for key, value in vars(siren).items() if before.get(key) is not value}
        assert changed <= before.keys()
        # plugged itself replaces these two, so that a checkpoint knows the drop-in
        assert changed - {"Run", "load_checkpoint"}
    assert dict(vars(siren)) == before


def test_the_files_that_it_names():
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", TEXT)
    assert len(links) > 10
    for link in links:
        assert link.startswith("https://") or (ROOT / "examples" / link).exists(), link


def test_it_names_the_files_of_its_folder():
    names = {path.name for path in (ROOT / "examples").iterdir()}
    names -= {"README.md", "__pycache__"}
    assert len(names) > 8
    assert {name for name in names if f"]({name})" not in TEXT} == set()
