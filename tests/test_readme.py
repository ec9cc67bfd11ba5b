"""README.md: its call example runs, its commands are the study's, and what is bold stands."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

import siren
from research import study, study_report

GRADE = ("hard", "0.6")  # prompts and temperature of the main table
ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()
# a row of README's table of commands -> the method of the study
METHODS = {
    "Dr.GRPO": "dr_grpo",
    "naive bonus, best": "naive_bonus",
    "exploding bonus": "naive_exploding",
    "without top-p mask": "wo_top_p",
    "without peak mask": "wo_peak",
    "without anchor": "wo_anchor",
    "anchor only": "anchor_only",
}

BEFORE = """
import torch

logits = torch.randn(16, 6, 9, requires_grad=True)
tokens = torch.randint(9, (16, 6))
rewards = torch.randint(2, (16,)).float()
mask = torch.arange(6) < torch.randint(1, 7, (16, 1))
old_logp = logits.detach().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
anchor = 2.0
"""
AFTER = """
assert mask.dtype == torch.bool and loss.ndim == 0 and torch.isfinite(logits.grad).all()
assert logits.grad[mask].abs().sum() > 0 and not logits.grad[~mask].any()
assert abs(loss - 0.005 * (info["h_agg"] - anchor) ** 2 - info["policy_loss"]) < 1e-6
"""


def test_it_is_short():
    assert len(TEXT.split()) <= 1000


def test_the_call_example_needs_the_block_and_torch_alone(tmp_path):
    (example,) = (part.split("```")[0] for part in TEXT.split("```python\n")[1:])
    assert len(example.splitlines()) == 5
    (first_anchor,) = re.findall(r"`anchor` is `(.*?)`", TEXT)
    check = (
        f'h = stats["nucleus_entropy"]\nassert abs({first_anchor} - info["h_agg"]) < 1e-6\n'
    )
    source = (ROOT / "siren.py").read_text()
    start, end = source.index("# === begin: copy from here"), source.index("# === end: copy")
    (tmp_path / "pasted.py").write_text(
        "import torch\n\n" + source[start:end] + BEFORE + example + AFTER + check
    )
    done = subprocess.run(
        [sys.executable, "-I", "pasted.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def chosen():
    store = study.Store(ROOT / "results")
    found = study.choose(study.Size(), store.rows)
    defaults = dataclasses.asdict(siren.Config())
    return {name: defaults | changes for name, changes in found.items()}


@pytest.fixture
def config_of(monkeypatch):
    """Flags of siren.py -> the Config with which a run would begin."""

    class BeginsError(BaseException):
        """In the place of a run."""

    def begin(cfg, resume):
        raise BeginsError(cfg)

    def config(flags):
        with pytest.raises(BeginsError) as error:
            siren.main(flags.split())
        return error.value.args[0]

    monkeypatch.setattr(siren, "Run", begin)
    return config


def test_its_commands_have_the_settings_of_the_results(chosen, config_of):
    table = TEXT[TEXT.index("| method |") :].partition("\n\n")[0]
    rows = [re.split(r" *\| *", line)[1:3] for line in table.splitlines()[2:]]
    commands = {}
    for name, cell in rows:
        flags = " ".join(re.findall(r"`([^`]*)`", cell))
        if cell.startswith("the same with"):
            flags = f"{list(commands.values())[-1]} {flags}"
        commands[name] = flags
    assert commands.keys() == METHODS.keys()
    for name, flags in (commands | {"SIREN": ""}).items():
        cfg = config_of(flags)
        due = chosen[METHODS.get(name, "siren")]
        for field in (
            "regularizer",
            "beta",
            "lr",
            "top_p",
            "peak_quantile",
            "steps",
            "prompts",
        ):
            is_used = field != "beta" or due["regularizer"] != "none"
            if is_used and not (field != "lr" and due["regularizer"] == "none"):
                assert getattr(cfg, field) == due[field], f"{name}: {field}"
    folders = [siren.folder_of(config_of(flags)) for flags in commands.values()]
    assert len({*folders, siren.folder_of(siren.Config())}) == 8, "two methods, one folder"


def test_the_differences_that_are_bold_stand_and_no_others():
    lines = study_report.read_csv(ROOT / "results" / "main.csv")
    p_of = {}
    for row in study_report.claims(lines)[2:-1]:
        name, score, temperature, difference, p = re.split(r" *\| *", row)[1:6]
        if temperature == "0.6":
            p_of[name.removeprefix("SIREN - "), score, difference] = float(p)
    names = {"naive bonus": "naive bonus, best"}
    found = re.findall(r"^\| SIREN - (.*?) \| (.*) \|$", TEXT, re.M)
    assert len(found) == 3
    for name, cells in found:
        for score, cell in zip(study_report.SCORES, cells.split(" | ")):
            key = (names.get(name, name), score, cell.strip("*"))
            assert cell.startswith("**") == (p_of[key] < 0.05), key
