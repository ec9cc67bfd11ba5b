"""The memory plan against measured peaks, with LoRA (see tests/test_memory_plan.py)."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from memory_common import WIDE, Trainer, check, make_run

from examples import memory_plan

HALF = {"lora_rank": 16, "dtype": "bfloat16"}
# name -> changes of the model, changes of the flags, of the task's options
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "float32": (WIDE, {}, {"lora_rank": 16}),
    "bfloat16": (WIDE, {}, HALF),
    "bfloat16, recompute": (WIDE, {}, {**HALF, "recompute": True}),
    "big vocabulary": ({**WIDE, "vocab_size": 20_000}, {"max_tokens": 8}, HALF),
}


@pytest.mark.parametrize("case", CASES)
def test_phases_against_measured_peaks(case: str) -> None:
    """Sampling, scoring and update, within the error that the plan states."""
    model, flags, options = CASES[case]
    check(make_run(model, flags, **options))


def test_adapters_are_counted_exactly() -> None:
    """As many as peft makes, beside weights of two bytes."""
    run = make_run(WIDE, {}, **HALF)
    parameters = list(Trainer(run).model.parameters())
    assert sum(p.numel() for p in parameters if p.requires_grad) == run.trained
    parts = memory_plan.plan(run)["update"]
    assert sum(p.nbytes for p in parameters) == parts["weights"]
    assert 4 * run.trained == parts["gradients"]


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    """README's 7B by flags, without a network and without a GPU."""
    flags = "--gpu-gb 24 --model Qwen/Qwen2.5-Math-7B --data x.jsonl --prompts 128"
    flags += " --max-tokens 3072"
    flags += " --mini-batches 16 --lora-rank 64 --lr 1e-5 --dtype bfloat16 --recompute true"
    flags += " --micro-batch-size 1 --sample-batch 8 --eval-samples 8 --device cuda"
    assert memory_plan.main(flags.split()) == 0
    out = capsys.readouterr().out
    assert "7,615,616,512 parameters in bfloat16, 161,480,704 trained" in out
    assert "tight" in out and "393,216 decode steps" in out


def test_docs_show_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/scale.md: the whole plan of its first command, and the verdicts of the others."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "scale.md").read_text()
    first, others = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    command, output = first.removeprefix("$ ").replace("\\\n", "").split("\n", 1)
    words = shlex.split(command)[2:]  # after python examples/memory_plan.py
    assert memory_plan.main(words) == 0
    assert capsys.readouterr().out == output
    lines = others.strip().splitlines()
    for line, verdict in zip(lines[::2], lines[1::2], strict=True):
        changed = shlex.split(line.removeprefix("$ ").split(" ... ")[0])[2:]
        assert memory_plan.main([*words, *changed]) == 0  # the last of two equal flags counts
        assert verdict in capsys.readouterr().out.splitlines()


def test_the_first_real_run_has_the_plans_of_its_commands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """docs/first_real_run.md: each plan is that of the command above it."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "first_real_run.md").read_text()
    commands = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    shown = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    plans = [output for output in shown if "parameters in" in output]
    cards = (["--gpu-gb", "24"], ["--gpu-gb", "80"])
    for command, plan, card in zip(commands, plans, cards, strict=True):
        words = shlex.split(command.replace("\\\n", ""))[2:]  # after python and the script
        assert memory_plan.main([*words, *card]) == 0
        assert capsys.readouterr().out == plan
