"""Tests of the memory planner: its phases against peaks measured while siren.py trains.

    python -m pytest examples/test_memory_plan.py

The oracle is PyTorch's allocator, through the profiler: every block that real kernels were given
on the CPU. The plan never sees it; it counts tensors on the meta device.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import siren
from examples import bench, memory_plan, text_env

torch.set_num_threads(1)
TOLERANCE = 0.1  # the aim is 0.25
BODY = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
BODY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
BODY |= {"model_type": "qwen2", "vocab_size": 512, "tie_word_embeddings": True}
WIDE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6}
FLAGS = {"prompts": 4, "group_size": 4, "mini_batches": 2, "micro_batch_size": 4, "max_prompt": 24}
FLAGS |= {"max_tokens": 40, "sample_batch": 16, "eval_prompts": 1, "eval_samples": 1}
FLAGS |= {"top_p": 0.8, "lr": 1e-3}
# name -> changes of the model, changes of the flags
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "big vocabulary": ({"vocab_size": 60_000}, {"max_tokens": 16}),
    "untied head": ({"vocab_size": 20_000, "tie_word_embeddings": False}, {"max_tokens": 16}),
    "long responses": ({}, {"max_tokens": 400, "prompts": 2, "group_size": 2, "mini_batches": 1}),
    "deep": (WIDE, {}),
    "one micro-batch": (WIDE, {"micro_batch_size": 8}),
    "no regulariser": (WIDE, {"regularizer": "none"}),
    "recompute": (WIDE, {"recompute": True, "max_tokens": 64, "sample_batch": 8}),
    "adafactor": ({**WIDE, "hidden_size": 256}, {"optimizer": "adafactor", "max_tokens": 8}),
    "llama": ({**WIDE, "model_type": "llama"}, {"sample_batch": 8}),
    "small slices": ({"vocab_size": 4096}, {"chunk": 5}),
    "lora": (WIDE, {"lora_rank": 16}),
    "lora bfloat16 recompute": (WIDE, {"lora_rank": 16, "dtype": "bfloat16", "recompute": True}),
}


def folder(path: Path, config: dict[str, Any]) -> str:
    """A model folder with a config and no weights."""
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


class Trainer:
    """A run's model, optimiser and rollout, as siren.train sets them up."""

    def __init__(self, cfg: siren.Config) -> None:
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(cfg.model)
        dtype = getattr(torch, cfg.dtype)
        self.cfg, self.vocab = cfg, config.vocab_size
        self.model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        if cfg.lora_rank:
            text_env.add_lora(self.model, cfg.lora_rank, seed=0)
        if cfg.recompute:
            text_env.recompute_layers(self.model)
        make = {"adamw": torch.optim.AdamW, "adafactor": torch.optim.Adafactor}[cfg.optimizer]
        self.optimizer = make([p for p in self.model.parameters() if p.requires_grad], lr=cfg.lr)
        n, masks = cfg.prompts * cfg.group_size, []
        for length in (cfg.max_prompt, cfg.max_tokens):
            masks.append(torch.ones(n, length, dtype=torch.bool))
        masks[0][1::2, : cfg.max_prompt // 2] = False  # half of the prompts are shorter
        ids = [torch.randint(2, self.vocab, m.shape) for m in masks]
        zeros = torch.zeros(n, cfg.max_tokens)
        self.rollout = siren.Rollout(ids[0], masks[0], ids[1], masks[1], zeros)
        self.update()  # from the second on, the optimiser has its state

    def sampling(self) -> None:
        """A rollout in which no response ends early."""
        cfg, pairs = self.cfg, zip(self.rollout.prompt, self.rollout.prompt_mask)
        prompts = [ids[mask].tolist() for ids, mask in list(pairs)[:: cfg.group_size]]
        prompts[0] = [2] * cfg.max_prompt
        ends = {"eos_ids": [self.vocab], "pad_id": 0, "max_tokens": cfg.max_tokens}
        how = {"samples": cfg.group_size, "batch": cfg.sample_batch}
        assert siren.sample(self.model, prompts, **ends, **how).mask.all()

    def scoring(self) -> None:
        """The log-probabilities before the updates."""
        siren.score(self.model, self.rollout, self.cfg)

    def update(self) -> None:
        """One optimiser step."""
        rows = torch.arange(self.cfg.prompts // self.cfg.mini_batches * self.cfg.group_size)
        data = self.rollout.rows(rows), self.rollout.logp[rows], torch.linspace(-1, 1, len(rows))
        stats = siren.update(self.model, self.optimizer, *data, 1.0, self.cfg)
        assert math.isfinite(stats["grad_norm"])


def peak_of(cfg: siren.Config, phase: str) -> int:
    """The measured peak of a phase, weights and all, in bytes."""
    made: list[Trainer] = []
    return bench.allocated_peak(
        lambda: getattr(made[0], phase)(), lambda: made.append(Trainer(cfg))
    )


@pytest.mark.parametrize("case", CASES)
def test_phases_against_measured_peaks(case: str, tmp_path: Path) -> None:
    """Each phase of the plan, and what it has on top of weights and optimiser, is what is used."""
    model, flags = CASES[case]
    cfg = siren.Config(model=folder(tmp_path, BODY | model), **(FLAGS | flags))
    plan = memory_plan.measure(cfg, "cpu")
    for phase in memory_plan.PHASES:
        planned, real = getattr(plan, phase), peak_of(cfg, phase)
        assert planned == pytest.approx(real, rel=TOLERANCE), phase
        on_top = real - plan.static
        assert planned - plan.static == pytest.approx(on_top, rel=2 * TOLERANCE), phase


def test_a_whole_training_step(tmp_path: Path) -> None:
    """The largest phase is the peak of siren.training_step."""
    cfg = siren.Config(model=folder(tmp_path, BODY | {"vocab_size": 5000}), **FLAGS)
    problems = [SimpleNamespace(prompt=[2] * (24 - i), answer="1") for i in range(4)]
    task = SimpleNamespace(
        train_problems=lambda n, seed: problems[:n],
        decode=lambda ids: "1",
        answer_form=lambda text: text,
        metrics=lambda responses: {},
        eos_ids=[5000],
        pad_id=0,
    )
    state, made = {"step": 0, "anchor": None, "skipped": 0}, []

    def step() -> None:
        siren.training_step(made[0].model, made[0].optimizer, task, cfg, state)

    peak = bench.allocated_peak(step, lambda: made.append(Trainer(cfg)))
    assert memory_plan.measure(cfg, "cpu").total == pytest.approx(peak, rel=TOLERANCE)


@pytest.mark.parametrize("flag", ["recompute", "optimizer", "micro_batch_size", "sample_batch"])
def test_flags_save_what_the_plan_says(flag: str, tmp_path: Path) -> None:
    """The difference that a flag makes is right too, not only the sum."""
    value = {"recompute": True, "optimizer": "adafactor"}.get(flag, 2)
    phase = {"sample_batch": "sampling"}.get(flag, "update")
    flags = FLAGS | {"regularizer": "none"}
    before = siren.Config(model=folder(tmp_path, BODY | WIDE), **flags)
    after = dataclasses.replace(before, **{flag: value})
    planned, real = (
        size(before) - size(after)
        for size in (
            lambda cfg: getattr(memory_plan.measure(cfg, "cpu"), phase),
            lambda cfg: peak_of(cfg, phase),
        )
    )
    assert real > 0
    assert planned == pytest.approx(real, rel=2 * TOLERANCE)


@pytest.mark.parametrize("chunk", [2, 8])
def test_a_chunk_of_the_head(chunk: int) -> None:
    """CHUNK and PREVIOUS are what siren._TokenStats holds, at the vocabulary they are meant for."""
    vocab, n = 152_064, 8
    rng = torch.Generator().manual_seed(0)
    logits = bench.peaked(n, vocab, rng)
    tokens, unit = torch.zeros(n, dtype=torch.long), chunk * vocab * 4
    several = chunk < n
    forward, backward = (
        memory_plan.CHUNK[name] + memory_plan.PREVIOUS[name] * several
        for name in ("forward", "backward")
    )

    def run() -> dict[str, torch.Tensor]:
        return siren.token_stats(logits, tokens, 0.8, chunk=chunk)

    assert bench.allocated_peak(run) / unit == pytest.approx(forward, rel=0.03)
    logits.requires_grad_()
    stats: list[Any] = []

    def back() -> None:
        sum(stats[0][name].sum() for name in ("logp", "entropy", "nucleus_entropy")).backward()

    peak = bench.allocated_peak(back, lambda: stats.append(run()))
    assert (peak - logits.nbytes) / unit == pytest.approx(backward, rel=0.03)  # less its gradient


def test_counter() -> None:
    """Views, work in place and tensors of before cost nothing; what is freed is taken off."""
    old = torch.zeros(1000)
    with memory_plan.LiveBytes([old]) as count:
        a = torch.ones(100)
        b = a.view(10, 10).t()
        a.add_(1)
        old.view(2, 500).mul_(2)
        assert count.live == 400
        c = b @ b
        del a
        assert count.live == 800  # b still holds a's storage
        del b
        assert count.live == 400
        count.section = "next"
        c.sum()
    assert max(count.sections["forward"]) == 800
    assert count.sections["next"] == [404]


@pytest.mark.parametrize("rows", [1, 4, 9])
def test_linear_in_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rehearsal with these rows has the peaks that those with 2 and 3 foretell."""
    model = memory_plan.build(json.dumps(BODY), "float32", 0, False)
    rehearsed: list[Callable[[int], Any]] = []
    original = memory_plan.by_rows
    monkeypatch.setattr(memory_plan, "by_rows", lambda r: rehearsed.append(r) or original(r))
    lines = memory_plan.rehearse_update.__wrapped__(model, 16, 48, True)
    for section, values in rehearsed[0](rows).sections.items():
        assert lines[section](rows) == pytest.approx(max(values), rel=0.001 if rows > 1 else 0.05)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
        ("Qwen/Qwen2.5-Math-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-Math-7B", 7_615_616_512),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
    ],
)
def test_known_models(name: str, parameters: int) -> None:
    """The numbers of parameters that their makers publish, without loading any."""
    model = memory_plan.build(memory_plan.read_config(name), "bfloat16", 0, False)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert all(p.is_meta for p in [*model.parameters(), *model.buffers()])
    buffers = memory_plan.bytes_of(model.buffers())  # the rotary frequencies
    everything = memory_plan.bytes_of([*model.parameters(), *model.buffers()])
    assert everything - buffers == 2 * parameters  # a tied head is there once


def test_recipe_of_notes() -> None:
    """Qwen2.5-Math-7B: optimisers' sizes and the KV cache, worked out by hand."""
    flags = {"model": "Qwen/Qwen2.5-Math-7B", "max_tokens": 3072, "max_prompt": 1024}
    flags |= {"prompts": 8, "sample_batch": 64, "eval_samples": 8, "eval_prompts": 8}
    run = memory_plan.prepare(siren.Config(**flags), "cuda")
    n = 7_615_616_512
    state, _ = memory_plan.rehearse_optimizer(run.model, "adamw", False)
    assert state == pytest.approx(2 * 4 * n, rel=1e-4)
    state, _ = memory_plan.rehearse_optimizer(run.model, "adafactor", False)
    assert state < 0.001 * 4 * n
    per_token = 2 * 28 * 4 * 128 * 4  # keys and values, layers, heads, their width, float32
    assert memory_plan.measure_sampling(run)["kv_cache"] == 64 * 4096 * per_token


def small(tmp_path: Path, **flags: Any) -> siren.Config:
    """A run of a small model, with more than one rung of the ladder to go down."""
    flags = FLAGS | {"max_tokens": 200, "prompts": 16, "sample_batch": 64} | flags
    return siren.Config(model=folder(tmp_path, BODY | WIDE | {"vocab_size": 30_000}), **flags)


def without_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sizes decide, not CUDA's gigabyte."""
    monkeypatch.setattr(memory_plan, "RESERVE", (0.0, 0.0))


@pytest.mark.parametrize("share", [0.9, 0.6, 0.45, 0.3])
def test_advice_fits(share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags in the sentence are real flags, and with them the run fits."""
    without_reserve(monkeypatch)
    cfg = small(tmp_path)
    cfg = dataclasses.replace(cfg, gpu_gb=share * memory_plan.measure(cfg).total / 1e9)
    found = memory_plan.measure(cfg)
    assert not memory_plan.fits(cfg, found)
    changes, promised = memory_plan.advise(cfg)
    text = memory_plan.verdict(cfg, found)
    assert text.startswith("Does not fit") and memory_plan.flags(changes) in text
    parsed = vars(siren.make_parser().parse_args(memory_plan.flags(changes).split()))
    assert {k: v for k, v in parsed.items() if k in changes} == changes
    after = memory_plan.measure(dataclasses.replace(cfg, **changes))
    assert after == promised and after.needed_gb <= cfg.gpu_gb
    for name in ("sample_batch", "micro_batch_size"):  # and it asks for no more than is needed
        if name in changes:
            milder = dataclasses.replace(cfg, **changes | {name: 2 * changes[name]})
            assert not memory_plan.fits(cfg, memory_plan.measure(milder))


def test_nothing_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that is too small whatever the flags is called so."""
    without_reserve(monkeypatch)
    cfg = small(tmp_path, gpu_gb=0.001)
    text = memory_plan.verdict(cfg, memory_plan.measure(cfg))
    assert "even" in text and "larger card or a smaller model" in text


def test_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints every part of the plan and the verdict."""
    name = folder(tmp_path, BODY)
    assert memory_plan.main(["--model", name, "--max-tokens", "100", "--gpu-gb", "24"]) == 0
    out = capsys.readouterr().out
    for word in ("weights", "gradients", "optimiser", "KV cache", "activations", "head", "logits"):
        assert word in out
    assert "Fits 24 GB" in out and "--recompute" in out


@pytest.mark.parametrize(
    ("config", "flags", "fault"),
    [
        (None, [], "no such folder"),
        ({}, ["--max-tokens", "1024"], "must be under the context of 1024"),
        ({"model_type": "gemma2", "head_dim": 16}, [], "final_logit_softcapping"),
        ({"model_type": "no-such-type"}, [], "no-such-type"),
        ({}, ["--gpu-gb", "-1"], "must be float in (0, inf)"),
    ],
)
def test_errors(
    config: Any, flags: list[str], fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that says what is wrong; exit code 2."""
    name = str(tmp_path / "missing") if config is None else folder(tmp_path, BODY | config)
    assert memory_plan.main(["--model", name, *flags]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and fault in lines[0]
