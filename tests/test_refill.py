"""research/refill.py: what it samples, and how many passes of the model it needs for that."""

import heapq
import math
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

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
from research import plugs, refill
from research.plugs import plugged

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [5, 4, 3, 8, 7], [9]]
TASK = SimpleNamespace(eos_ids=[1, 2], pad_id=1)  # the padding is an EOS, too


def problems_of(prompts):
    return [SimpleNamespace(prompt=prompt) for prompt in prompts]


def make(kind="qwen2", vocab=32):
    """A random model, sharp enough that its tokens differ in probability."""
    size = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "vocab_size": vocab,
    }
    size |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "gpt2":  # learned absolute positions; rotary ones only see differences
            size = {
                "n_embd": 16,
                "n_layer": 2,
                "n_head": 2,
                "n_positions": 64,
                "vocab_size": vocab,
            }
            return GPT2LMHeadModel(GPT2Config(**size, initializer_range=0.4)).eval()
        if kind == "mistral":
            return MistralForCausalLM(MistralConfig(**size, sliding_window=4)).eval()
        return Qwen2ForCausalLM(Qwen2Config(**size)).eval()


def sampled(model, key="0", batch=1024, temperature=1.0, sampler=refill.sample):
    """6 samples of each prompt, of at most 12 tokens."""
    cfg = siren.Config(max_tokens=12, sample_batch=batch)
    return sampler(model, TASK, problems_of(PROMPTS), cfg, key, 6, temperature)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
@pytest.mark.parametrize(("batch", "temperature"), [(1, 1.0), (4, 1.0), (5, 0.7), (1024, 1.0)])
def test_logp_is_that_of_the_row_alone(kind, batch, temperature):
    """Without padding, neighbours or cache: so rows are in order and no column is mixed up."""
    model = make(kind)
    out = sampled(model, batch=batch, temperature=temperature)
    ends = out.mask.sum(1)
    assert ends.min() < ends.max() <= 12
    for row in range(len(out.mask)):
        prompt = PROMPTS[row // 6]
        tokens = out.tokens[row, : ends[row]]
        ids = torch.cat([torch.tensor(prompt), tokens])[None]
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double() / temperature
        alone = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        assert torch.allclose(out.logp[row, : ends[row]].double(), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [5, 1024])
def test_layout_is_that_of_siren_sample(batch):
    """Prompts on the left; responses on the right, up to and including EOS; zeros
    elsewhere."""
    out = sampled(make(), batch=batch)
    other = sampled(make(), sampler=siren.sample)
    assert torch.equal(out.prompt, other.prompt)
    assert torch.equal(out.prompt_mask, other.prompt_mask)
    for mine, theirs in zip(out, other):
        assert mine.dtype == theirs.dtype
        assert len(mine) == len(theirs) == 24
    assert out.mask[:, 0].all()
    assert out.mask.any(0).all()
    for tokens, mask, logp in zip(out.tokens, out.mask, out.logp):
        n = int(mask.sum())
        assert mask[:n].all()
        assert (tokens[n:] == 1).all()
        assert (logp[n:] == 0).all()
        assert not torch.isin(tokens[: n - 1], torch.tensor([1, 2])).any()
        assert tokens[n - 1] in (1, 2) or n == 12


@pytest.mark.parametrize("batch", [700, pytest.param(20_001, marks=pytest.mark.slow)])
def test_frequencies_follow_the_model(batch):
    """Chi-square of the first two tokens against exact probabilities."""
    model = make(vocab=6)
    count = 20_000
    prompts = [[3, 4], [5, 3, 4, 3, 5]]
    task = SimpleNamespace(eos_ids=[0], pad_id=0)
    cfg = siren.Config(max_tokens=2, sample_batch=batch)
    out = refill.sample(model, task, problems_of(prompts), cfg, "0", count, 1.0)
    responses = out.responses()
    for number, prompt in enumerate(prompts):
        found = Counter(map(tuple, responses[number * count : (number + 1) * count]))
        due = {}
        for a in range(6):
            logits = model(input_ids=torch.tensor([[*prompt, a]])).logits[0].double()
            first = logits[-2].softmax(-1)[a].item()
            second = logits[-1].softmax(-1)
            due |= {(a, b): first * second[b].item() for b in range(6)} if a else {(0,): first}
        assert math.isclose(sum(due.values()), 1)
        assert set(found) <= set(due)
        likely = {key: p * count for key, p in due.items() if p * count >= 5}
        chi2 = sum((found[key] - n) ** 2 / n for key, n in likely.items())
        freedom = len(likely) - 1
        assert chi2 < freedom + 4.5 * math.sqrt(2 * freedom)


def steps_with_refill(lengths, batch):
    """Decode steps of a machine with `batch` places, by a queue: whoever is free takes the
    next.

    The first token of a response comes from its prompt's pass, so one of n tokens takes n - 1
    steps, and the next response in its place draws its first token when the others draw
    theirs.
    """
    places = [0] * batch
    busy = set()
    for n in lengths:
        start = heapq.heappop(places)
        busy |= set(range(start + 1, start + n))
        heapq.heappush(places, start + n)
    return len(busy)


@pytest.mark.parametrize(("samples", "batch"), [(8, 8), (8, 3), (5, 12), (1, 4), (3, 1)])
def test_passes(samples, batch):
    """The counts of both samplers are those that the lengths of the responses ask for."""
    problems = problems_of([[3, 4]] * 12)
    task = SimpleNamespace(eos_ids=[refill.Geometric.EOS], pad_id=0)
    cfg = siren.Config(max_tokens=60, sample_batch=batch)
    counts = {}
    due = {}
    for sampler in (siren.sample, refill.sample):
        model = refill.Geometric(20).eval()
        out = sampler(model, task, problems, cfg, "0", samples, 1.0)
        lengths = out.mask.sum(1).tolist()
        counts[sampler] = model.passes
        if sampler is siren.sample:
            rows = max(1, batch // samples) * samples  # a prompt's samples stay together
            parts = [lengths[i : i + rows] for i in range(0, len(lengths), rows)]
            steps = sum(max(part) - 1 for part in parts)
            due[sampler] = {"prompts": len(parts), "decode steps": steps}
        else:
            steps = steps_with_refill(lengths, batch)
            due[sampler] = {"prompts": len(problems), "decode steps": steps}
            assert steps <= sum(lengths) / batch + max(lengths)  # no schedule does much better
    assert counts == due
    if batch == samples == 8:
        before, after = (counts[f]["decode steps"] for f in (siren.sample, refill.sample))
        assert before > 1.7 * after


def test_memory():
    """Never more than `batch` rows, nor more columns than the longest of them has tokens."""
    model = make()
    shapes = []

    def look(_, args, options):
        keys = options["past_key_values"].layers[0].keys
        seen = options.get("attention_mask")
        if seen is not None:
            assert seen.shape == (len(args[0]), keys.shape[2] + 1)
            assert seen[:, 0].any()
            shapes.append(keys.shape[::2])

    model.register_forward_pre_hook(look, with_kwargs=True)
    sampled(model, batch=5)
    assert max(rows for rows, _ in shapes) == 5
    widths = [width for _, width in shapes]
    assert any(b < a for a, b in pairwise(widths)), "columns are dropped again"


def test_repeats():
    """The key decides."""
    first, again, other = (sampled(make(), key, batch=5) for key in ("3", "3", "4"))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.logp, again.logp)
    assert first.tokens.shape != other.tokens.shape or not torch.equal(
        first.tokens, other.tokens
    )


def test_refuses():
    """Models whose cache forgets, and models that are broken."""
    with pytest.raises(RuntimeError, match="sliding windows"):
        sampled(make("mistral"))
    broken = make()
    broken.lm_head.weight.data[3] = float("nan")
    with pytest.raises(RuntimeError, match="not finite"):
        sampled(broken)


def test_plug(monkeypatch):
    """It replaces siren.sample, and afterwards that one is back."""
    before = siren.sample
    with plugged("research.refill"):
        assert siren.sample is refill.sample
    assert siren.sample is before


def test_a_run_with_the_plug(tmp_path, capsys):
    """The command trains, and its samples are those of refill.py."""
    flags = "--steps 1 --prompts 4 --eval-prompts 2 --eval-samples 2 --sample-batch 6"
    argv = ["--plug", "research.refill", *flags.split(), "--out", str(tmp_path / "run")]
    assert plugs.main(argv) == 0
    assert "reward" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_training_step_with_the_plug(tmp_path, monkeypatch):
    """Every rollout of a run, those of its evaluations as well, comes from refill.sample."""
    own = refill.sample
    calls = []

    def counted(*args):
        calls.append(args)
        return own(*args)

    monkeypatch.setattr(refill, "sample", counted)
    how = {"steps": 1, "prompts": 4, "eval_prompts": 2, "eval_samples": 2, "sample_batch": 6}
    with plugged("research.refill"):
        records = siren.train(siren.Run(siren.Config(out=str(tmp_path / "run"), **how)))
    assert len(calls) == 5  # a step and four evaluations: easy and hard, before and after
    assert records[1]["reward"] >= 0


def test_command(capsys):
    """It prints a row for each sampler, and one line for bad input."""
    assert refill.main(["--prompts", "6", "--mean", "10", "--max-tokens", "40"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("|") for line in lines if line.startswith("| ")][1:]
    assert [row[1].strip() for row in rows] == ["siren.sample", "research.refill"]
    assert int(rows[0][3]) > int(rows[1][3]) > 6 * 8
    assert refill.main(["--mean", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "refill.py: error: --mean 1: must be 2 or more"
