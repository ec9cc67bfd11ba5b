"""examples/refill.py: what it samples, and how many passes of the model it needs for that."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import siren
from examples import refill

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [5, 4, 3, 8, 7], [9]]
SAMPLING: dict[str, Any] = {"max_tokens": 12, "eos_ids": [1, 2], "pad_id": 1}  # pad is an EOS too


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are faster so."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(kind: str = "qwen2", vocab: int = 32) -> torch.nn.Module:
    """A random model, sharp enough that its tokens differ in probability."""
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": vocab}
    size |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "gpt2":  # learned absolute positions; rotary ones only see differences
            size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": vocab}
            return GPT2LMHeadModel(GPT2Config(**size, initializer_range=0.4)).eval()
        if kind == "mistral":
            return MistralForCausalLM(MistralConfig(**size, sliding_window=4)).eval()
        return Qwen2ForCausalLM(Qwen2Config(**size)).eval()


def sampled(model: torch.nn.Module, seed: int = 0, **options: Any) -> siren.Rollout:
    """6 samples of each prompt, seeded."""
    given = {"samples": 6, "generator": torch.Generator().manual_seed(seed), **SAMPLING, **options}
    return refill.sample(model, PROMPTS, **given)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
@pytest.mark.parametrize(("batch", "temperature"), [(1, 1.0), (4, 1.0), (5, 0.7), (1024, 1.0)])
def test_logp_is_that_of_the_row_alone(kind: str, batch: int, temperature: float) -> None:
    """Without padding, neighbours or cache: so rows are in order and no column is mixed up."""
    model = make(kind)
    out = sampled(model, batch=batch, temperature=temperature)
    ends = out.mask.sum(1)
    assert ends.min() < ends.max() <= 12
    for row in range(len(out.mask)):
        prompt, tokens = PROMPTS[row // 6], out.tokens[row, : ends[row]]
        ids = torch.cat([torch.tensor(prompt), tokens])[None]
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double() / temperature
        alone = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        assert torch.allclose(out.logp[row, : ends[row]].double(), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [5, 1024])
def test_layout_is_that_of_siren_sample(batch: int) -> None:
    """Prompts on the left; responses on the right, up to and including EOS; zeros elsewhere."""
    out = sampled(make(), batch=batch)
    other = siren.sample(make(), PROMPTS, samples=6, **SAMPLING)
    assert torch.equal(out.prompt, other.prompt) and torch.equal(out.prompt_mask, other.prompt_mask)
    for mine, theirs in zip(out, other):
        assert mine.dtype == theirs.dtype and len(mine) == len(theirs) == 24
    assert out.mask[:, 0].all() and out.mask.any(0).all()
    for tokens, mask, logp in zip(out.tokens, out.mask, out.logp):
        n = int(mask.sum())
        assert mask[:n].all() and (tokens[n:] == 1).all() and (logp[n:] == 0).all()
        assert not torch.isin(tokens[: n - 1], torch.tensor([1, 2])).any()
        assert tokens[n - 1] in (1, 2) or n == 12


@pytest.mark.parametrize("batch", [700, 20_001])
def test_frequencies_follow_the_model(batch: int) -> None:
    """Chi-square of the first two tokens against exact probabilities."""
    model, count, prompts = make(vocab=6), 20_000, [[3, 4], [5, 3, 4, 3, 5]]
    out = refill.sample(
        model, prompts, samples=count, batch=batch, max_tokens=2, eos_ids=[0], pad_id=0,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    for number, prompt in enumerate(prompts):
        found = Counter(map(tuple, out.responses()[number * count : (number + 1) * count]))
        due = {}
        for a in range(6):
            logits = model(input_ids=torch.tensor([[*prompt, a]])).logits[0].double()
            first, second = logits[-2].softmax(-1)[a].item(), logits[-1].softmax(-1)
            due |= {(a, b): first * second[b].item() for b in range(6)} if a else {(0,): first}
        assert math.isclose(sum(due.values()), 1) and set(found) <= set(due)
        likely = {key: p * count for key, p in due.items() if p * count >= 5}
        chi2 = sum((found[key] - n) ** 2 / n for key, n in likely.items())
        freedom = len(likely) - 1
        assert chi2 < freedom + 4.5 * math.sqrt(2 * freedom)


def steps_with_refill(lengths: list[int], batch: int) -> int:
    """Decode steps of a machine with `batch` places, by a queue: whoever is free takes the next.

    The first token of a response comes from its prompt's pass, so one of n tokens takes n - 1
    steps, and the next response in its place draws its first token when the others draw theirs.
    """
    places, busy = [0] * batch, set()
    for n in lengths:
        start = heapq.heappop(places)
        busy |= set(range(start + 1, start + n))
        heapq.heappush(places, start + n)
    return len(busy)


@pytest.mark.parametrize(("samples", "batch"), [(8, 8), (8, 3), (5, 12), (1, 4), (3, 1)])
def test_passes(samples: int, batch: int) -> None:
    """The counts of both samplers are those that the lengths of the responses ask for."""
    prompts = [[3, 4]] * 12
    ends = {"eos_ids": [refill.Geometric.EOS], "pad_id": 0, "max_tokens": 60}
    counts, due = {}, {}
    for sampler in (siren.sample, refill.sample):
        model = refill.Geometric(20).eval()
        rng = torch.Generator().manual_seed(0)
        out = sampler(model, prompts, samples=samples, batch=batch, generator=rng, **ends)
        lengths = out.mask.sum(1).tolist()
        counts[sampler] = model.passes
        if sampler is siren.sample:
            rows = max(1, batch // samples) * samples  # a prompt's samples stay together
            parts = [lengths[i : i + rows] for i in range(0, len(lengths), rows)]
            due[sampler] = {"prompts": len(parts), "decode steps": sum(max(p) - 1 for p in parts)}
        else:
            steps = steps_with_refill(lengths, batch)
            due[sampler] = {"prompts": len(prompts), "decode steps": steps}
            assert steps <= sum(lengths) / batch + max(lengths)  # no schedule does much better
    assert counts == due
    if batch == samples == 8:
        before, after = (counts[f]["decode steps"] for f in (siren.sample, refill.sample))
        assert before > 1.7 * after


def test_memory() -> None:
    """Never more than `batch` rows, nor more columns than the longest of them has tokens."""
    model, shapes = make(), []

    def look(_: object, args: tuple[torch.Tensor], options: dict[str, Any]) -> None:
        keys, seen = options["past_key_values"].layers[0].keys, options.get("attention_mask")
        if seen is not None:
            assert seen.shape == (len(args[0]), keys.shape[2] + 1) and bool(seen[:, 0].any())
            shapes.append(keys.shape[::2])

    model.register_forward_pre_hook(look, with_kwargs=True)
    sampled(model, batch=5)
    assert max(rows for rows, _ in shapes) == 5
    widths = [width for _, width in shapes]
    assert any(b < a for a, b in pairwise(widths)), "columns are dropped again"


def test_repeats() -> None:
    """The generator decides."""
    first, again, other = (sampled(make(), seed, batch=5) for seed in (3, 3, 4))
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.logp, again.logp)
    assert first.tokens.shape != other.tokens.shape or not torch.equal(first.tokens, other.tokens)


def test_refuses() -> None:
    """Models whose cache forgets, and models that are broken."""
    with pytest.raises(siren.ConfigError, match="sliding windows"):
        sampled(make("mistral"))
    broken = make()
    broken.lm_head.weight.data[3] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        sampled(broken)


def test_a_run_with_the_plug(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--plug examples.refill trains."""
    own, calls = refill.sample, []

    def counted(*args: Any, **kwargs: Any) -> siren.Rollout:
        calls.append(args)
        return own(*args, **kwargs)

    monkeypatch.setattr(refill, "sample", counted)
    before = siren.sample
    flags = "--plug examples.refill --steps 1 --prompts 4 --eval-prompts 2 --eval-samples 2"
    code = siren.main([*flags.split(), "--sample-batch", "6", "--out", str(tmp_path / "run")])
    assert code == 0 and len(calls) >= 5 and siren.sample is before  # a step, four evaluations
    assert "reward" in capsys.readouterr().out


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    """It prints a row for each sampler, and one line for bad input."""
    refill.main(["--prompts", "6", "--mean", "10", "--max-tokens", "40"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("|") for line in lines if line.startswith("| ")][1:]
    assert [row[1].strip() for row in rows] == ["siren.sample", "examples.refill"]
    assert int(rows[0][3]) > int(rows[1][3]) > 6 * 8
    with pytest.raises(SystemExit) as stopped:
        refill.main(["--mean", "1"])
    assert stopped.value.code == 2 and "--mean 2 or more" in capsys.readouterr().err
