"""The memory plan against measured peaks of small models, published numbers and hand
arithmetic.

What needs peft (LoRA) is in tests/extra/test_memory_plan_lora.py.
"""

from __future__ import annotations

import dataclasses
import doctest
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from memory_common import BODY, MEASURED, WIDE, Trainer, check, make_run
from transformers import AutoConfig, AutoModelForCausalLM

import siren
from examples import memory_plan
from research.bench import allocated_peak

# name -> changes of the model, changes of the flags, of the task's options
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "big vocabulary": ({"vocab_size": 60_000}, {"max_tokens": 16}, {}),
    "untied head": (
        {"vocab_size": 20_000, "tie_word_embeddings": False},
        {"max_tokens": 16},
        {},
    ),
    "long responses": (
        {},
        {"max_tokens": 250, "prompts": 2, "mini_batches": 1, "group_size": 2},
        {},
    ),
    "one micro-batch": (WIDE, {"micro_batch_size": 8}, {}),
    "no regulariser": (WIDE, {"regularizer": "none"}, {}),
    "recompute": (WIDE, {"max_tokens": 48, "sample_batch": 8}, {"recompute": True}),
    "llama": ({**WIDE, "model_type": "llama"}, {"sample_batch": 8}, {}),
    "small chunks": ({"vocab_size": 4096}, {"chunk": 5}, {}),
    "one micro-batch, untied head": (
        {"vocab_size": 20_000, "tie_word_embeddings": False},
        {"max_tokens": 16, "micro_batch_size": 8},
        {},
    ),
    "few tokens": ({"vocab_size": 20_000}, {"max_tokens": 4, "micro_batch_size": 2}, {}),
}


SOON = ("untied head", "recompute", "small chunks")  # the other cases take a minute more
LATER = [pytest.param(case, marks=pytest.mark.slow) for case in CASES if case not in SOON]


@pytest.mark.parametrize("case", [*SOON, *LATER])
def test_phases_against_measured_peaks(case: str) -> None:
    """Sampling, scoring and update, within the error that the plan states."""
    model, flags, options = CASES[case]
    check(make_run(model, flags, **options))


def test_static_part_is_exact() -> None:
    """Weights, gradients and optimiser state, to the byte but for the optimiser's step
    counts."""
    run = make_run(WIDE, {})
    trainer = Trainer(run)
    weights = sum(p.nbytes for p in trainer.model.parameters())
    gradients = sum(p.grad.nbytes for p in trainer.model.parameters())
    states = trainer.optimizer.state.values()
    state = sum(tensor.nbytes for one in states for tensor in one.values())
    counts = 4 * len(states)
    parts = memory_plan.plan(run)["update"]
    assert parts["weights"] == weights and parts["gradients"] == gradients
    assert parts["optimiser state"] == state - counts


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["recompute", "micro_batch_size", "sample_batch"])
def test_flags_save_what_the_plan_says(flag: str) -> None:
    """The difference that a flag makes is right too, not only the sum."""
    phase = {"sample_batch": "sampling"}.get(flag, "update")
    before = make_run(WIDE, {"regularizer": "none"})
    if flag == "recompute":
        after = dataclasses.replace(before, recompute=True)
    else:
        after = make_run(WIDE, {"regularizer": "none", flag: 2})
    runs = (before, after)
    planned = [memory_plan.total(memory_plan.plan(run)[phase]) for run in runs]
    real = [allocated_peak(getattr(Trainer, phase), lambda r=r: (Trainer(r),)) for r in runs]
    assert real[0] > real[1]
    saved = real[0] - real[1]
    assert planned[0] - planned[1] == pytest.approx(saved, rel=MEASURED)


KNOWN = {  # the numbers of parameters that their makers publish
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "Qwen/Qwen2.5-Math-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-Math-7B": 7_615_616_512,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_models(name: str) -> None:
    """Parameters by the formula, as published, and as transformers builds the model."""
    model = memory_plan.read_config(name)
    run = memory_plan.Run(siren.Config(), model, 100)
    assert run.base == run.trained == KNOWN[name]
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model))
    assert sum(p.numel() for p in network.parameters()) == KNOWN[name]


def seven_billion(refill: bool = False, **flags: Any) -> memory_plan.Run:
    """Qwen2.5-Math-7B with LoRA, as in docs/scale.md."""
    given = {"prompts": 128, "mini_batches": 16, "max_tokens": 3072, "micro_batch_size": 1}
    given |= {"sample_batch": 8, "eval_samples": 8, "device": "cuda", **flags}
    cfg = siren.Config(task="text_env:model=Qwen/Qwen2.5-Math-7B", **given)
    model = memory_plan.read_config("Qwen/Qwen2.5-Math-7B")
    return memory_plan.Run(cfg, model, 1024, "bfloat16", 64, True, refill)


def test_seven_billion_by_hand() -> None:
    """Sizes that one can work out on paper."""
    run = seven_billion()
    parts = memory_plan.plan(run)["sampling"]
    widths = [
        (3584, 3584),
        (3584, 512),
        (3584, 512),
        (3584, 3584),
    ]  # query, key, value, output
    widths += [(3584, 18944), (3584, 18944), (18944, 3584)]  # gate, up, down
    adapters = 28 * 64 * sum(a + b for a, b in widths)
    assert run.trained == adapters == 161_480_704
    assert parts["weights"] == 2 * 7_615_616_512 + 4 * adapters
    assert parts["gradients"] == 4 * adapters and parts["optimiser state"] == 8 * adapters
    per_token = 2 * 28 * 4 * 128 * 2  # keys and values, layers, heads, their width, bfloat16
    assert parts["KV cache"] == 8 * 4096 * per_token
    assert parts["logits at once"] == 4 * 8 * 152_064 * 4


def test_time() -> None:
    """Decode steps: 128 batches of one prompt each, or as many as the tokens need, and a
    tail."""
    run = seven_billion()
    without, refill = memory_plan.decode_steps(run)
    assert without == 128 * 3072 == 393_216
    assert refill == 1024 * 1024 / 8 + 2048
    took = memory_plan.seconds(run)
    assert took["decode"] == pytest.approx(28 * memory_plan.SPEED["cuda"][0])
    assert took["sampling"] / 3600 == pytest.approx(3.7, abs=0.1)
    flop = 2 * (7_615_616_512 + 161_480_704) * 1024 * (1024 + 1024)
    assert took["scoring"] == pytest.approx(flop / memory_plan.SPEED["cuda"][3])
    # forward, all of it again by micro-batch, the layers once more, backward through frozen
    # weights
    assert took["update"] == pytest.approx(4 * took["scoring"])
    whole = memory_plan.seconds(seven_billion(micro_batch_size=64))
    assert whole["update"] == pytest.approx(3 * took["scoring"])  # a mini-batch at once
    all_at_once = seven_billion(sample_batch=1024)
    assert memory_plan.decode_steps(all_at_once)[0] == 3072


def test_refill_takes_whole_batches() -> None:
    """With the plug, --sample-batch rows are there; without it, all of a prompt's
    responses."""
    caches = [
        memory_plan.plan(seven_billion(refill, sample_batch=4))["sampling"]["KV cache"]
        for refill in (False, True)
    ]
    assert caches[0] == 2 * caches[1]


def test_verdict() -> None:
    """fits, tight and does not fit are what the printed range says."""
    run = seven_billion()
    low, high = memory_plan.needs(run)
    assert 17 < low < high < 26 and high - low > 0.5
    assert memory_plan.fits(run, high) == "fits"
    assert memory_plan.fits(run, (low + high) / 2) == "tight"
    assert memory_plan.fits(run, low - 0.01) == "does not fit"
    text = memory_plan.verdict(run, (low + high) / 2)
    assert f"needs {low:.1f}-{high:.1f} GB" in text and "tight" in text


class Found(BaseException):
    """Carries the Config of a command line out of siren.main."""


def config_of(argv: list[str]) -> siren.Config:
    """What siren.py makes of these flags."""

    def stop(cfg: siren.Config, resume: bool) -> None:
        raise Found(cfg)

    with mock.patch.object(siren, "Run", stop), pytest.raises(Found) as found:
        siren.main(argv)
    return found.value.args[0]


@pytest.mark.parametrize("gb", [24, 40, 80, 200])
def test_advice_fits(gb: float) -> None:
    """The flags in the sentence are real flags; with them the run is what the sentence
    says."""
    task = "text_env:model=Qwen/Qwen2.5-Math-1.5B,data=x"
    cfg = siren.Config(task=task, max_tokens=3072, device="cuda")
    run = memory_plan.Run(cfg, memory_plan.read_config("Qwen/Qwen2.5-Math-1.5B"), 1024)
    assert memory_plan.fits(run, gb) == "does not fit"
    better, flags = memory_plan.advise(run, gb)
    assert memory_plan.fits(better, gb) == "fits"
    given = flags.split()
    own = "--model Qwen/Qwen2.5-Math-1.5B --data x --max-tokens 3072"
    parsed = config_of([*own.split(), *given])
    assert parsed.sample_batch == better.cfg.sample_batch
    assert parsed.micro_batch_size == better.cfg.micro_batch_size
    assert ("recompute=true" in parsed.task) == better.recompute
    assert ("lora_rank=64" in parsed.task) == (better.lora_rank == 64)
    doubled = {"sample_batch", "micro_batch_size"} & {
        word[2:].replace("-", "_") for word in given
    }
    assert doubled
    for name in doubled:  # and it asks for no more than is needed
        milder = dataclasses.replace(better.cfg, **{name: 2 * getattr(better.cfg, name)})
        milder = dataclasses.replace(better, cfg=milder)
        assert memory_plan.fits(milder, gb) != "fits"


def test_advice_starts_from_what_is_there() -> None:
    """--micro-batch-size 1024 is the mini-batch of 64; to halve 1024 would change nothing."""
    run = seven_billion(micro_batch_size=1024)
    better, flags = memory_plan.advise(run, 80)
    assert memory_plan.fits(run, 80) != "fits" and memory_plan.fits(better, 80) == "fits"
    assert "--micro-batch-size" in flags and better.cfg.micro_batch_size <= 32


def test_nothing_fits() -> None:
    """A card that is too small whatever the flags is called so."""
    text = memory_plan.verdict(seven_billion(), 4)
    assert "does not fit" in text and "take a larger card or a smaller model" in text


def folder(path: Path, config: dict[str, Any]) -> str:
    """A model folder with a config and no weights."""
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def test_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints every part, the verdict and the time, for a GPU that is not there."""
    flags = ["--model", folder(tmp_path, BODY), "--data", "x.jsonl", "--max-tokens", "100"]
    assert memory_plan.main([*flags, "--device", "cuda", "--gpu-gb", "24"]) == 0
    out = capsys.readouterr().out
    for word in (*memory_plan.ROWS, *memory_plan.WORK, *memory_plan.PHASES, "total", "24 GB"):
        assert word in out
    assert ": fits" in out and "decode steps" in out and "research.refill" in out
    assert memory_plan.main(flags) == 0
    assert "add --gpu-gb" in capsys.readouterr().out


def test_toy(capsys: pytest.CaptureFixture[str]) -> None:
    """Without --model it plans the toy."""
    assert memory_plan.main(["--device", "cpu", "--gpu-gb", "1"]) == 0
    out = capsys.readouterr().out
    assert "on a CPU" in out and "fits" in out and "responses of 16" in out


@pytest.mark.parametrize(
    ("config", "flags", "fault"),
    [
        (None, [], "no such folder"),
        ({}, ["--max-tokens", "1024"], "in the model's context of 1024"),
        ({"model_type": "no-such-type"}, [], "no-such-type"),
        ({"num_hidden_layers": 0}, [], "no num_hidden_layers"),
        ({"model_type": "mixtral", "num_local_experts": 8}, [], "a mixture"),
        ({}, ["--gpu-gb", "-1"], "--gpu-gb -1.0: must be above 0"),
        ({}, ["--gpu-gb", "much"], "--gpu-gb"),
        ({}, ["--lora-rnk", "8"], "lora_rnk"),
        ({}, ["--dtype", "bfloat16", "--lr", "1e-6"], "rounded away"),
        ({}, ["--prompts", "0"], "--prompts 0: must be"),
    ],
)
def test_errors(
    config: Any,
    flags: list[str],
    fault: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line that says what is wrong; exit code 2."""
    name = str(tmp_path / "missing") if config is None else folder(tmp_path, BODY | config)
    assert memory_plan.main(["--model", name, "--data", "x.jsonl", *flags]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and fault in lines[0]


def test_doctests() -> None:
    result = doctest.testmod(memory_plan)
    assert result.attempted >= 1
    assert result.failed == 0
