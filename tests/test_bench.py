"""research/bench.py: it runs, its measures measure, and results/ holds what it wrote."""

import doctest
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import small_model

import siren
from research import bench

ROOT = Path(__file__).resolve().parents[1]


def test_peaks_are_those_of_the_allocator():
    megabyte = 1 << 20

    def run(*_):
        a = torch.empty(3 * megabyte, dtype=torch.uint8)
        del a
        torch.empty(2 * megabyte, dtype=torch.uint8)

    def ready():
        torch.empty(9 * megabyte, dtype=torch.uint8)  # its own peak does not count
        return (torch.empty(megabyte, dtype=torch.uint8),)

    assert bench.allocated_peak(run) == 3 * megabyte
    assert bench.allocated_peak(run, ready) == 4 * megabyte, "what was there before counts too"


def test_a_race_takes_turns():
    turns = []

    def slow():
        turns.append("slow")
        time.sleep(0.02)

    def fast():
        turns.append("fast")

    times = bench.race({"slow": slow, "fast": fast}, 4)
    assert turns[2:] == ["slow", "fast", "fast", "slow", "slow", "fast", "fast", "slow"]
    assert min(bench.ratios(times["slow"], times["fast"]).values()) > 1


def test_a_race_opens_each_round():
    rounds = []
    times = bench.race({"one": lambda: None}, 3, lambda: rounds.append(1))
    assert len(rounds) == 4
    assert len(times["one"]) == 3, "the first round is not counted"


@pytest.mark.parametrize("name", ["ours", "drop_in"])
def test_contenders_compute_the_same(name):
    """Values and gradients of small, peaked and wide nuclei, in float64."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.cat([make(2, 600, rng) for make in bench.KINDS.values()]).double()
    tokens = torch.randint(600, (len(logits),), generator=rng)
    assert siren.token_stats(logits, tokens, bench.TOP_P)["nucleus_size"].max() > 300
    found = {}
    for method in ("sort", name):
        z = logits.clone().requires_grad_()
        stats = bench.METHODS[method](z, bench.Logits(600), tokens, bench.TOP_P, 1.0)
        # squares, so that every token's gradient has a weight of its own
        (stats["logp"] ** 2 + stats["nucleus_entropy"] ** 2).sum().backward()
        found[method] = [stats[key] for key in ("logp", "entropy", "nucleus_entropy")] + [
            z.grad
        ]
    torch.testing.assert_close(found[name], found["sort"], rtol=1e-9, atol=1e-9)


def test_logits_are_of_their_kinds():
    rng = torch.Generator().manual_seed(0)
    nats = {}
    for name, make in bench.KINDS.items():
        log_pi = make(16, 20_000, rng).log_softmax(-1)
        nats[name] = -(log_pi.exp() * log_pi).sum(-1)
    assert nats["peaked"].max() < 4
    assert nats["peaked"].min() < 0.5
    assert 1 < nats["zipf"].mean() < 4
    assert nats["flat"].min() > 9.8


def test_replayed_passes_are_the_recorded_ones():
    """Sampling with a cache, then a pass with a gradient."""
    model = small_model()
    task = SimpleNamespace(eos_ids=[1], pad_id=0)
    problems = [SimpleNamespace(prompt=prompt) for prompt in ([3, 4, 5], [6, 7])]
    cfg = siren.Config(max_tokens=5)
    rollout = []

    def run():
        rollout[:] = [siren.sample(model, task, problems, cfg, "0", 2, 1.0)]
        hidden = siren.forward(model, rollout[0]).flatten(0, 1)
        model.get_output_embeddings()(hidden).sum().backward()

    calls = bench.record_passes(model, run)
    modules = [module for module, *_ in calls]
    steps = rollout[0].tokens.shape[1]
    head = model.get_output_embeddings()
    assert modules == [model.base_model, head] * (steps + 1)
    assert [with_grad for _, with_grad, *_ in calls] == [False] * 2 * steps + [True, True]
    model.zero_grad()
    seen = []
    hook = head.register_forward_hook(lambda _, __, logits: seen.append(len(logits)))
    bench.replay_passes(model, calls)
    hook.remove()
    assert len(seen) == steps + 1
    assert seen[-1] == rollout[0].mask.numel()
    grads = [p.grad for p in model.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in grads)
    assert sum(float(g.abs().sum()) for g in grads) > 0


def test_doctests():
    result = doctest.testmod(bench)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.slow
def test_the_command_on_tiny_sizes(tmp_path):
    out = tmp_path / "quick.json"
    command = [sys.executable, str(ROOT / "research" / "bench.py"), "--quick"]
    done = subprocess.run(
        [*command, "--out", str(out), "--only", "a", "b", "c", "e"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-800:]
    found = json.loads(out.read_text())
    for key, (part, *_) in bench.ROWS.items():
        if part in "df":  # they need TRL and SmolLM2
            assert key not in found
            continue
        values = found[key]
        assert 0 < values["min"] <= values["median"] <= values["max"], key
        assert "one thread" in found["measured_on"][part]
    table = out.with_suffix(".md").read_text()
    assert "these ratios mean nothing" in table
    assert "not measured" in table
    assert all(text in table for _, text, *_ in bench.ROWS.values())


@pytest.mark.parametrize("flags", [["--only", "z"], ["--rounds", "3"]])
def test_bad_flags(flags, capsys):
    assert bench.main(flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bench.py: error: ")
    assert flags[0] in line


def test_the_results_that_are_shown_are_the_ones_that_were_measured():
    found = json.loads((ROOT / "results" / "bench.json").read_text())
    assert set(bench.ROWS) <= set(found)
    assert (ROOT / "results" / "bench.md").read_text() == bench.table(found) + "\n"
