"""examples/bench.py: it runs, its measures measure, and results/ holds what it wrote."""

import doctest
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from common import small_model

import siren
from examples import bench

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
    slow, fast = (lambda: (turns.append("slow"), time.sleep(0.02))), (lambda: turns.append("fast"))
    times = bench.race({"slow": slow, "fast": fast}, 4)
    assert turns[2:] == ["slow", "fast", "fast", "slow", "slow", "fast", "fast", "slow"]
    assert min(bench.ratios(times["slow"], times["fast"]).values()) > 1


def test_a_race_opens_each_round():
    rounds = []
    times = bench.race({"one": lambda: None}, 3, lambda: rounds.append(1))
    assert len(rounds) == 4 and len(times["one"]) == 3, "the first round is not counted"


@pytest.mark.parametrize("name", ["ours", "drop_in"])
def test_contenders_compute_the_same(name):
    """Values and gradients of small, peaked and wide nuclei, in float64."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.cat([make(2, 600, rng) for make in bench.KINDS.values()]).double()[None]
    tokens = torch.randint(600, logits.shape[:2], generator=rng)
    assert siren.nucleus_mask(logits, bench.TOP_P).sum(-1).max() > 300
    found = {}
    for method in ("sort", name):
        z = logits.clone().requires_grad_()
        stats = bench.METHODS[method](z, tokens, torch.ones(tokens.shape), bench.TOP_P)
        # squares, so that every token's gradient has a weight of its own
        (stats["logp"] ** 2 + stats["nucleus_entropy"] ** 2).sum().backward()
        found[method] = [stats[key] for key in ("logp", "entropy", "nucleus_entropy")] + [z.grad]
    torch.testing.assert_close(found[name], found["sort"], rtol=1e-9, atol=1e-9)


def test_logits_are_of_their_kinds():
    rng, nats = torch.Generator().manual_seed(0), {}
    for name, make in bench.KINDS.items():
        log_pi = make(16, 20_000, rng).log_softmax(-1)
        nats[name] = -(log_pi.exp() * log_pi).sum(-1)
    assert nats["peaked"].max() < 4 and nats["peaked"].min() < 0.5
    assert 1 < nats["zipf"].mean() < 4 and nats["flat"].min() > 9.8


def test_replayed_passes_are_the_recorded_ones():
    """Sampling with a cache, then a pass with a gradient."""
    model = small_model()
    options = {"max_tokens": 5, "eos_ids": [1], "pad_id": 0, "samples": 2}
    rollout = []

    def run():
        rollout[:] = [siren.sample(model, [[3, 4, 5], [6, 7]], **options)]
        hidden = siren.forward(model, rollout[0]).flatten(0, 1)
        model.get_output_embeddings()(hidden).sum().backward()

    calls = bench.record_passes(model, run)
    modules, steps = [module for module, *_ in calls], rollout[0].tokens.shape[1]
    head = model.get_output_embeddings()
    assert modules == [model.base_model, head] * (steps + 1)
    assert [with_grad for _, with_grad, *_ in calls] == [False] * 2 * steps + [True, True]
    model.zero_grad()
    seen = []
    hook = head.register_forward_hook(lambda _, __, logits: seen.append(len(logits)))
    bench.replay_passes(model, calls)
    hook.remove()
    assert len(seen) == steps + 1 and seen[-1] == rollout[0].mask.numel()
    grads = [p.grad for p in model.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in grads)
    assert sum(float(g.abs().sum()) for g in grads) > 0


def test_doctests():
    result = doctest.testmod(bench)
    assert result.attempted > 0 and result.failed == 0


def test_the_command_on_tiny_sizes(tmp_path):
    out = tmp_path / "quick.json"
    command = [sys.executable, str(ROOT / "examples" / "bench.py"), "--quick", "--out", str(out)]
    done = subprocess.run(
        [*command, "--only", "a", "b", "c", "e"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-800:]
    found = json.loads(out.read_text())
    for key, (part, *_) in bench.ROWS.items():
        if part == "d":
            assert key not in found
            continue
        values = found[key]
        assert 0 < values["min"] <= values["median"] <= values["max"], key
        assert "one thread" in found["measured_on"][part]
    table = out.with_suffix(".md").read_text()
    assert "these ratios mean nothing" in table and "not measured" in table
    assert all(text in table for _, text, *_ in bench.ROWS.values())


@pytest.mark.parametrize("flags", [["--only", "z"], ["--rounds", "3"]])
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(flags)
    assert stop.value.code == 2 and flags[0] in capsys.readouterr().err


def test_the_results_that_are_shown_are_the_ones_that_were_measured():
    found = json.loads((ROOT / "results" / "bench.json").read_text())
    assert set(bench.ROWS) <= set(found)
    assert (ROOT / "results" / "bench.md").read_text() == bench.table(found) + "\n"
