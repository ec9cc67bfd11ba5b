"""Tests of examples/copy_loss.py, a training loop that needs one block of siren.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.copy_loss import train
from siren import siren_loss

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "copy_loss.py"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_it_keeps_its_entropy():
    (kept, lost), first = (list(train(kind))[-1] for kind in ("anchor", "none")), next(train())
    assert first[1] < 0.1 < 0.9 < min(kept[1], lost[1])  # the reward rises, with and without
    assert first[2] == first[3]  # the anchor is the first H_agg
    assert kept[2] > 0.7 * kept[3] and lost[2] < 0.1  # H_agg stays up, or falls
    assert kept[4] > 20 and lost[4] < 5  # and so do the different right responses


@pytest.mark.parametrize(
    ("wrong", "error"),
    [({"algorithm": "Dr.GRPO"}, KeyError), ({"regularizer": "entropy"}, ValueError)],
)
def test_a_misspelt_name_is_no_silent_default(wrong, error):
    logits, tokens, mask = torch.zeros(1, 2, 4), torch.tensor([[0, 1]]), torch.ones(1, 2)
    old_logp, adv = torch.full((1, 2), 0.25).log(), torch.zeros(1)
    with pytest.raises(error, match=next(iter(wrong.values()))):
        siren_loss(logits, tokens, old_logp, adv, mask, 1.0, beta=0.5, **wrong)


def test_the_block_pasted(tmp_path):
    """The block in the place of the import, far from siren.py: the same figures to the last bit."""
    block = (ROOT / "siren.py").read_text()
    block = block[block.index("# === begin: copy") : block.index("# === end: copy")]
    lines = SCRIPT.read_text().splitlines()
    (place,) = [i for i, line in enumerate(lines) if line.startswith("from siren import")]
    text = "\n".join([*lines[:place], block, *lines[place + 1 :]])
    (tmp_path / "pasted.py").write_text(text)
    code = "import json, sys, torch, pasted; torch.set_num_threads(1)\n"
    code += "assert 'siren' not in sys.modules; print(json.dumps(list(pasted.train(steps=5))))"
    bare = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=bare, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [list(values) for values in train(steps=5)]


def test_the_command():
    def command(*words):
        return subprocess.run(
            [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=300
        )

    done = command("none")
    assert done.returncode == 0, done.stderr
    head, *rows = done.stdout.splitlines()
    assert head.split()[:4] == ["step", "reward", "h_agg", "anchor"] and len(rows) == 6
    assert rows[-1].split()[0] == "60" and float(rows[-1].split()[2]) < 0.1
    wrong = command("bonus")
    assert wrong.returncode == 2 and "invalid choice: 'bonus'" in wrong.stderr.splitlines()[-1]


def test_it_is_one_page():
    assert len(SCRIPT.read_text().splitlines()) < 85
