"""How fast and how small: siren.py against the plain ways of doing the same.

    python examples/bench.py             # all five, 20 minutes; writes results/bench.json
    python examples/bench.py --quick     # the same code on tiny sizes, under a minute (for CI)
    python examples/bench.py --only a e  # some of it; the others' figures stay in the files

 a  log-prob, full and nucleus entropy of N tokens over a vocabulary of V, forward and backward:
    siren.token_stats and examples/fast_stats.py against the floor (log-softmax, gather and full
    entropy, with no nucleus at all) and against a full sort
 b  sampling groups: siren.sample against transformers' model.generate
 c  peak memory of one update: chunk by chunk against all logits at once
 d  one training step against TRL's GRPOTrainer (if installed)
 e  one training step against the model's own forward and backward passes in it

Contenders take turns within a round, each first in every other round, so that a busy machine slows
all alike; a figure is the ratio within a round, its median is over the rounds. Memory is what
PyTorch's allocator hands out, kernels' temporaries included, and repeats to the byte.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import json
import math
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # siren.py is in the folder above
import siren
from examples import fast_stats

RESULT = Path(__file__).resolve().parents[1] / "results" / "bench.json"
TOP_P = 0.8
Spread = dict[str, float]  # min, median and max over the rounds


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured; the defaults are the published figures'."""

    rounds: int = 5
    vocab: int = 152_064  # Qwen2.5-Math-7B's
    tokens: int = 64  # of (a)
    # (b): a model of 4 layers
    hidden: int = 256
    sample_vocab: int = 4096
    prompts: int = 8
    group_size: int = 8
    response: int = 192
    # (c)
    update_tokens: int = 2048
    update_hidden: int = 256
    # (d)
    trl_steps: int = 11  # the first is not counted
    toy_steps: int = 12  # of (e); two more are not counted


QUICK = Sizes(2, 2048, 32, 32, 128, 2, 4, 12, 64, 32, 2, 1)


# ------------------------------------------------------------------------------------------ measure
def allocated_peak(run: Callable[[], object], ready: Callable[[], object] | None = None) -> int:
    """The most bytes that PyTorch's CPU allocator has handed out at one time during run().

    What `ready` allocates and leaves is counted too, its own peak is not. From the profiler's log
    of every allocation: it sees what a kernel allocates inside, as a count of tensors would not.
    run() must not free what an earlier measurement left behind: the log would take it off.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as log:
        kept = ready() if ready else None
        with torch.profiler.record_function("measured"):
            run()
        del kept
    events = log.profiler.kineto_results.events()
    start = next(e.start_ns() for e in events if e.name() == "measured")
    end = next(e.end_ns() for e in events if e.name() == "measured")
    live = peak = 0
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    for when, size in sorted(changes, key=lambda change: change[0]):
        if when > end:
            break
        live += size
        assert live >= 0, "freed what was there before"
        peak = max(peak, live) if when >= start else live
    return peak


def seconds(run: Callable[[], object]) -> float:
    """How long run() takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def race(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after one that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds + 1):
        for name in list(contenders)[:: 1 if i % 2 else -1]:
            took = seconds(contenders[name])
            if i:
                times[name].append(took)
    return times


def spread(values: list[float]) -> Spread:
    """Smallest, median and largest.

    >>> spread([3.0, 1.0, 2.0])
    {'min': 1.0, 'median': 2.0, 'max': 3.0}
    """
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def ratios(above: list[float], below: list[float]) -> Spread:
    """The spread of above / below within each round."""
    return spread([a / b for a, b in zip(above, below)])


# ------------------------------------------------------------------------------------- a: the head
def peaked(n: int, vocab: int, rng: torch.Generator) -> torch.Tensor:
    """Logits [n, vocab] like a language model's: noise of deviation 2, and 64 tokens that stand 25
    above it, the k-th likeliest by 25 - s ln k; s is from 1 (3 nats) to 8 (certain), by row."""
    logits = 2 * torch.randn(n, vocab, generator=rng)
    likely = torch.rand(n, vocab, generator=rng).topk(64, dim=1).indices
    steep = 1 + 7 * torch.rand(n, 1, generator=rng)
    return logits.scatter_add_(1, likely, 25 - steep * torch.arange(1, 65).log())


def zipf(n: int, vocab: int, rng: torch.Generator) -> torch.Tensor:
    """The k-th likeliest token has a probability proportional to k ** -1.5, in random order."""
    ranks = torch.stack([torch.randperm(vocab, generator=rng) for _ in range(n)])
    return -1.5 * (1.0 + ranks).log()


def flat(n: int, vocab: int, rng: torch.Generator) -> torch.Tensor:
    """Nearly uniform, as after an exploded bonus: 11.9 nats at V = 152064."""
    return 0.1 * torch.randn(n, vocab, generator=rng)


KINDS = {"peaked": peaked, "zipf": zipf, "flat": flat}


def floor(logits: torch.Tensor, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What any such method must do: log-prob and full entropy."""
    log_pi = logits.log_softmax(-1)
    return [log_pi.gather(1, tokens[:, None])[:, 0], -(log_pi.exp() * log_pi).sum(-1)]


def by_sort(logits: torch.Tensor, tokens: torch.Tensor) -> list[torch.Tensor]:
    """The definition by a full sort and autograd."""
    log_pi = logits.log_softmax(-1)
    ordered, order = log_pi.detach().sort(-1, descending=True)
    pi = ordered.exp()
    inside = torch.zeros_like(pi, dtype=torch.bool)
    inside.scatter_(-1, order, pi.cumsum(-1) - pi < TOP_P)
    log_q = log_pi.masked_fill(~inside, -math.inf).log_softmax(-1)
    h = -(log_q.exp() * log_q.masked_fill(~inside, 0.0)).sum(-1)
    return [*floor(logits, tokens), h]


def by(token_stats: Callable) -> Callable[..., list[torch.Tensor]]:
    """The same three by siren.token_stats or the drop-in for it."""

    def run(logits: torch.Tensor, tokens: torch.Tensor) -> list[torch.Tensor]:
        stats = token_stats(logits[None], tokens[None], torch.ones(1, len(tokens)), TOP_P)
        return [stats[name][0] for name in ("logp", "entropy", "nucleus_entropy")]

    return run


METHODS = {"floor": floor, "ours": by(siren.token_stats)}
METHODS |= {"drop_in": by(fast_stats.token_stats), "sort": by_sort}


def check_head(vocab: int, rng: torch.Generator) -> int:
    """Assert that all methods agree, values and gradients; return the largest nucleus seen.

    In float64, where they find the same sets, to 1e-9.
    """
    logits = torch.cat([make(2, vocab, rng) for make in KINDS.values()]).double()
    tokens = torch.randint(vocab, (len(logits),), generator=rng)
    weights = torch.randn(2, len(logits), generator=rng)  # so that every row's gradient counts
    found = {}
    for name in ("sort", "ours", "drop_in"):
        z = logits.clone().requires_grad_()
        logp, entropy, h = METHODS[name](z, tokens)
        (weights[0] * logp + weights[1] * h).sum().backward()
        found[name] = torch.stack([logp, entropy, h]).detach(), z.grad
        for mine, theirs in zip(found[name], found["sort"]):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    return int(siren.nucleus_mask(logits, TOP_P).sum(-1).max())


def measure_head(name: str, sizes: Sizes, rng: torch.Generator) -> dict[str, Any]:
    """Times and peaks of all methods on one kind of logits, and their ratios."""
    logits = KINDS[name](sizes.tokens, sizes.vocab, rng).requires_grad_()
    tokens = torch.randint(sizes.vocab, (sizes.tokens,), generator=rng)

    def run(method: Callable) -> None:
        logits.grad = None
        values = method(logits, tokens)
        sum(value.sum() for value in values if value.requires_grad).backward()

    times = race({key: partial(run, m) for key, m in METHODS.items()}, sizes.rounds)
    peaks = {}
    for key, method in METHODS.items():
        logits.grad = None
        # the logits themselves were there before: they count for all alike
        peaks[key] = logits.nbytes + allocated_peak(partial(run, method))
    return {
        "nucleus_vs_floor_time": ratios(times["ours"], times["floor"]),
        "nucleus_vs_sort_time": ratios(times["sort"], times["ours"]),
        "nucleus_vs_floor_memory": spread([peaks["ours"] / peaks["floor"]]),
        "drop_in_vs_floor_time": ratios(times["drop_in"], times["floor"]),
        "drop_in_vs_floor_memory": spread([peaks["drop_in"] / peaks["floor"]]),
        "seconds": {key: statistics.median(values) for key, values in times.items()},
        "gigabytes": {key: peak / 1e9 for key, peak in peaks.items()},
    }


def bench_head(sizes: Sizes) -> dict[str, Any]:
    """(a) The keys nucleus_*: of peaked and Zipf logits, the one whose median is worse."""
    rng = torch.Generator().manual_seed(0)
    largest = check_head(sizes.vocab, rng)
    found = {name: measure_head(name, sizes, rng) for name in KINDS}
    worse = {"nucleus_vs_floor_time": max, "nucleus_vs_floor_memory": max}
    worse["nucleus_vs_sort_time"] = min
    parts = [found["peaked"], found["zipf"]]
    main = {
        key: pick((part[key] for part in parts), key=lambda values: values["median"])
        for key, pick in worse.items()
    }
    return {**main, "a": {**found, "largest_nucleus_checked": largest}}


# ---------------------------------------------------------------------------------- b: the sampler
class Scripted(Qwen2ForCausalLM):
    """A model whose responses end where `lengths` [rows] says: EOS is certain there, and impossible
    before. Rows may leave the batch once they have ended (`sample`) or stay (`generate`)."""

    EOS = 1

    def script(self, lengths: torch.Tensor) -> None:
        """Set the lengths of the next responses, in order, each at least 2."""
        self.lengths, self.step = lengths, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Qwen2's, with the last position's logits of EOS overwritten."""
        out = super().forward(*args, **kwargs)
        self.step += 1
        if len(out.logits) < len(self.lengths) and self.step > 1:
            self.lengths = self.lengths[self.lengths >= self.step]
        last = out.logits[:, -1]
        last[:, self.EOS] = -math.inf
        if self.step > 1:  # the prefill may be shared by several rows, but none ends there
            last[self.lengths == self.step, self.EOS] = 1e4
        return out


def bench_sampler(sizes: Sizes) -> dict[str, Any]:
    """(b) sample against generate: the same model, prompts, lengths and number of samples."""
    torch.manual_seed(0)
    rng = random.Random(0)
    size = {"hidden_size": sizes.hidden, "intermediate_size": 3 * sizes.hidden}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4}
    config = Qwen2Config(vocab_size=sizes.sample_vocab, **size, **heads, pad_token_id=0)
    model = Scripted(config).eval()
    prompts = [
        [rng.randrange(2, sizes.sample_vocab) for _ in range(rng.randrange(24, 65))]
        for _ in range(sizes.prompts)
    ]
    width, rows = max(map(len, prompts)), sizes.prompts * sizes.group_size
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": 1}
    plain |= {"max_new_tokens": sizes.response, "num_return_sequences": sizes.group_size}

    def by_us(lengths: torch.Tensor) -> list[int]:
        model.script(lengths)
        ends = {"eos_ids": [Scripted.EOS], "pad_id": 0, "max_tokens": sizes.response}
        return siren.sample(model, prompts, samples=sizes.group_size, **ends).mask.sum(1).tolist()

    def by_generate(lengths: torch.Tensor) -> list[int]:
        model.script(lengths)
        with torch.no_grad():
            out = model.generate(ids, attention_mask=mask, **plain, pad_token_id=0)[:, width:]
        return [1 + row.index(1) if 1 in row else len(row) for row in out.tolist()]

    # long responses are rare: a quarter of the budget on average, one uses all of it
    drawn = [2 + int(rng.expovariate(4 / sizes.response)) for _ in range(rows)]
    mixed = torch.tensor([sizes.response, *drawn[1:]]).clamp(max=sizes.response)
    found: dict[str, Any] = {}
    for name, lengths in (("equal", torch.full((rows,), sizes.response)), ("mixed", mixed)):
        assert by_us(lengths) == by_generate(lengths) == lengths.tolist()
        contenders = {
            "ours": lambda x=lengths: by_us(x),
            "generate": lambda x=lengths: by_generate(x),
        }
        times = race(contenders, sizes.rounds)
        found[f"sampler_vs_generate_{name}"] = ratios(times["generate"], times["ours"])
        found[name] = {key: statistics.median(values) for key, values in times.items()}
        found[name]["mean_length"] = float(lengths.float().mean())
    detail = {"seconds": {key: found.pop(key) for key in ("equal", "mixed")}}
    return {**found, "b": detail | {"rows": rows, "width": width, "response": sizes.response}}


# ------------------------------------------------------------------------------------ c: an update
def plain_update(
    model: Any,
    optimizer: Any,
    rollout: siren.Rollout,
    old: Any,
    rewards: Any,
    anchor: float,
    cfg: siren.Config,
) -> dict[str, float]:
    """siren.update as it is usually written: all logits at once, a full sort, autograd."""
    ids = torch.cat([rollout.prompt, rollout.tokens], 1)
    mask = torch.cat([rollout.prompt_mask, rollout.mask], 1).long()
    where = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0), "attention_mask": mask}
    optimizer.zero_grad()
    out = model(input_ids=ids, use_cache=False, logits_to_keep=rollout.tokens.shape[1] + 1, **where)
    logits = out.logits[:, :-1]
    log_pi = logits.log_softmax(-1)
    logp = log_pi.gather(-1, rollout.tokens[..., None])[..., 0]
    h = by_sort(logits.flatten(0, 1), rollout.tokens.flatten())[2].view_as(logp)
    peak = siren.peak_mask(h, rollout.mask, cfg.peak_quantile)
    adv = siren.group_advantages(rewards, cfg.group_size)
    loss, _ = siren.policy_loss(logp, old, adv, rollout.mask, max_tokens=cfg.max_tokens)
    h_agg = siren.aggregate_entropy(h, peak, rollout.mask)
    (loss + cfg.beta * (h_agg - anchor) ** 2).backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip))
    optimizer.step()
    return {"h_agg": float(h_agg.detach()), "grad_norm": norm}


def bench_update(sizes: Sizes) -> dict[str, Any]:
    """(c) The peak of the second update, when the optimiser has its state, of a two-layer model."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2}
    size = {"hidden_size": sizes.update_hidden, "intermediate_size": 3 * sizes.update_hidden}
    config = Qwen2Config(vocab_size=sizes.vocab, **heads, **size, tie_word_embeddings=True)
    rng, t = torch.Generator().manual_seed(0), sizes.update_tokens // 2  # a group of two responses
    prompt, tokens = (torch.randint(sizes.vocab, (2, n), generator=rng) for n in (16, t))
    masks = torch.arange(16).expand(2, -1) >= 4, torch.ones(2, t, dtype=torch.bool)
    rollout = siren.Rollout(prompt, masks[0], tokens, masks[1], torch.zeros(2, t))
    batch = rollout, torch.full((2, t), -math.log(sizes.vocab)), torch.tensor([1.0, 0.0]), 1.0
    cfg = siren.Config(max_tokens=t, group_size=2)
    ways = {"ours": (siren.update, cfg), "plain": (plain_update, cfg)}
    ways["one chunk"] = (siren.update, dataclasses.replace(cfg, chunk=2 * t))
    peaks, stats = {}, {}
    for name, (update, how) in ways.items():
        kept: list[Any] = []

        def ready(update: Callable = update, how: siren.Config = how, kept: list = kept) -> None:
            torch.manual_seed(0)
            model = Qwen2ForCausalLM(config).eval()
            kept += [model, torch.optim.AdamW(model.parameters(), lr=1e-4)]
            update(*kept, *batch, how)

        def run(
            name: str = name, update: Callable = update, how: siren.Config = how, kept: list = kept
        ) -> None:
            stats[name] = update(*kept, *batch, how)

        peaks[name] = allocated_peak(run, ready)
        kept.clear()
    for key in ("h_agg", "grad_norm"):  # the same update, so a fair comparison
        assert math.isclose(stats["ours"][key], stats["plain"][key], rel_tol=1e-3), (key, stats)
    detail = {"gigabytes": {name: peak / 1e9 for name, peak in peaks.items()}}
    key = "update_memory_chunked_vs_not"
    return {key: spread([peaks["ours"] / peaks["plain"]]), "c": detail}


# ------------------------------------------------------------------------------ d: a training step
class OurSteps:
    """siren.training_step on the toy task, step after step; seconds and response lengths."""

    def __init__(self) -> None:
        self.cfg = siren.Config(device="cpu", threads=torch.get_num_threads())
        self.task = siren.load_task(self.cfg)
        self.model, self.step, self.record = self.task.build_model().eval(), 0, {}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.cfg.lr, fused=True)
        self.times: list[float] = []
        self.lengths: list[float] = []

    def run(self) -> None:
        """One step."""
        self.step += 1
        made = self.model, self.optimizer, self.task, self.cfg, self.step, self.record
        start = time.perf_counter()
        self.record = siren.training_step(*made)
        self.times.append(time.perf_counter() - start)
        self.lengths.append(self.record["response_tokens"])


def trl_against(ours: OurSteps, steps: int, **options: Any) -> tuple[list[float], float]:
    """Seconds of each of TRL's steps (a rollout and its updates), with one of ours before each;
    and the mean length of its responses. The same task, batch, budget and learning rate."""
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from examples import trl_data

    cfg, times = ours.cfg, []

    class Clock(TrainerCallback):
        """TRL counts optimiser steps; the rollout is part of the first of cfg.mini_batches."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % cfg.mini_batches == 0:
                ours.run()
                self.start = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % cfg.mini_batches == 0:
                times.append(time.perf_counter() - self.start)

    size = cfg.prompts * cfg.group_size // cfg.mini_batches
    options |= {"max_completion_length": cfg.max_tokens, "num_generations": cfg.group_size}
    options |= {"per_device_train_batch_size": size, "steps_per_generation": cfg.mini_batches}
    options |= {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0, "top_k": 0}
    options |= {"learning_rate": cfg.lr, "max_steps": steps * cfg.mini_batches, "use_cpu": True}
    options |= {"output_dir": "runs/bench-trl", "save_strategy": "no", "report_to": "none"}
    options |= {"logging_strategy": "no", "disable_tqdm": True}
    parts = trl_data.toy_parts(cfg)
    trainer = GRPOTrainer(args=GRPOConfig(**options), callbacks=[Clock()], **parts)
    trainer.train()
    return times, trainer.state.log_history[-1]["completions/mean_length"]


def bench_trl(sizes: Sizes) -> dict[str, Any]:
    """(d) One training step on the toy task: 32 prompts x 8 responses, 4 optimiser steps.

    The key is of equal arithmetic: float32 and no activation checkpointing on either side.
    """
    if missing := [name for name in ("trl", "datasets") if find_spec(name) is None]:
        why = f"skipped, as {missing[0]} is not installed"
        print(f"d: {why}; see requirements-examples.txt")
        return {"step_vs_trl": None, "d": {"skipped": why}}
    detail: dict[str, Any] = {}
    plain = {"bf16": False, "gradient_checkpointing": False}
    for name, options in (("equal arithmetic", plain), ("TRL's defaults", {})):
        ours = OurSteps()
        theirs, length = trl_against(ours, sizes.trl_steps, **options)
        seconds = {"ours": statistics.median(ours.times[1:])}
        seconds["trl"] = statistics.median(theirs[1:])
        detail[name] = {"ratio": ratios(theirs[1:], ours.times[1:]), "seconds": seconds}
        detail[name]["response_tokens"] = {"ours": statistics.mean(ours.lengths), "trl": length}
    return {"step_vs_trl": detail["equal arithmetic"]["ratio"], "d": detail}


# ----------------------------------------------------------------- e: a step and its own passes
Call = tuple[str, bool, tuple, dict]  # which module, whether with gradient, its arguments


def record_passes(model: Any, run: Callable[[], object]) -> list[Call]:
    """The calls of the model (in sampling), of its network and of its head during run()."""
    calls: list[Call] = []
    inside: list[str] = []

    def before(name: str, _: Any, args: tuple, kwargs: dict) -> None:
        if not inside:  # the model calls its network and its head itself
            args = tuple(x.detach() for x in args)
            # a copy, since the cache of a decoding step grows
            calls.append((name, torch.is_grad_enabled(), *copy.deepcopy((args, kwargs))))
        inside.append(name)

    modules = {"model": model, "network": model.base_model, "head": model.get_output_embeddings()}
    hooks = []
    for name, module in modules.items():
        hooks.append(module.register_forward_pre_hook(partial(before, name), with_kwargs=True))
        hooks.append(module.register_forward_hook(lambda *_: inside.pop() and None))
    run()
    for hook in hooks:
        hook.remove()
    return calls


def replay_passes(model: Any, calls: list[Call]) -> None:
    """The same passes with nothing around them; backward too where there was a gradient."""
    hidden = None
    for name, with_grad, args, kwargs in calls:
        with torch.set_grad_enabled(with_grad):
            if name == "model":
                model(*args, **kwargs)
            elif name == "network":
                hidden = model.base_model(*args, **kwargs).last_hidden_state.flatten(0, 1)
            else:  # of as many tokens as there were
                logits = model.get_output_embeddings()(hidden[: len(args[0])])
                if with_grad:
                    logits.backward(torch.ones_like(logits))


def bench_passes(sizes: Sizes) -> dict[str, Any]:
    """(e) Each step of a toy run, and a replay of its passes: which comes first alternates.

    A step is made twice, from the same state: once to record its passes, once for the clock.
    """
    steps, times, passes = OurSteps(), {"step": [], "model": []}, 0
    for i in range(sizes.toy_steps + 2):
        parts = steps.model, steps.optimizer
        state = copy.deepcopy([part.state_dict() for part in parts])
        was = steps.step, steps.record
        calls = record_passes(steps.model, steps.run)
        for part, saved in zip(parts, state):
            part.load_state_dict(saved)
        steps.step, steps.record = was
        turns = {"step": steps.run, "model": partial(replay_passes, steps.model, calls)}
        for name in list(turns)[:: 1 if i % 2 else -1]:
            took = seconds(turns[name])
            if i > 1:
                times[name].append(took)
        passes = len(calls)
    detail = {"seconds": {name: statistics.median(values) for name, values in times.items()}}
    detail["calls"] = passes
    return {"step_vs_model": ratios(times["step"], times["model"]), "e": detail}


# ------------------------------------------------------------------------------------- the command
PARTS = {"a": bench_head, "b": bench_sampler, "c": bench_update, "d": bench_trl, "e": bench_passes}
ROWS = {  # key -> its part, what the table says, the bound, and whether less is better
    "nucleus_vs_floor_time": ("a", "log-prob, H, H': time, ours / without a nucleus", 1.0, True),
    "nucleus_vs_floor_memory": ("a", "the same: peak memory", 0.55, True),
    "nucleus_vs_sort_time": ("a", "the same: time, full sort / ours", 4.0, False),
    "sampler_vs_generate_equal": ("b", "sampling, equal lengths: generate / ours", 1.0, False),
    "sampler_vs_generate_mixed": ("b", "sampling, mixed lengths: generate / ours", 1.5, False),
    "update_memory_chunked_vs_not": ("c", "update: peak memory, ours / all logits", 0.125, True),
    "step_vs_trl": ("d", "training step: time, TRL's GRPOTrainer / ours", 1.0, False),
    "step_vs_model": ("e", "training step: time, ours / the model's own passes", 1.3, True),
}


def table(found: dict[str, Any]) -> str:
    """The results in Markdown: every key, the details of (a), and what it was measured on."""
    lines = ["| | measured | median | min - max | bound |", "|---|---|---|---|---|"]
    for key, (part, text, aim, less) in ROWS.items():
        bound = f"{'at most' if less else 'at least'} {aim:g}"
        if value := found.get(key):
            three = [f"{value[name]:.3g}" for name in ("median", "min", "max")]
            lines.append(f"| {part} | {text} | {three[0]} | {three[1]} - {three[2]} | {bound} |")
        else:
            why = found.get(part, {}).get("skipped", "not measured")
            lines.append(f"| {part} | {text} | {why} | | {bound} |")
    lines.append("")
    for name in [name for name in KINDS if name in found.get("a", {})]:
        part = found["a"][name]
        figures = ", ".join(f"{k} {v['median']:.3g}" for k, v in part.items() if "_vs_" in k)
        lines.append(f"- (a), {name} logits: {figures}.")
    if other := found.get("d", {}).get("TRL's defaults"):
        ratio = other["ratio"]["median"]
        lines.append(f"- (d), with TRL's defaults (bf16, activation checkpointing): {ratio:.3g}.")
    places: dict[str, list[str]] = {}  # what was measured on -> parts
    for part in PARTS:
        if how := found.get(part, {}).get("measured_on"):
            versions = ", ".join(f"{name} {number}" for name, number in how["versions"].items())
            load = f"load {how['load_before'][0]}" if how["load_before"] else "load unknown"
            where = f"{how['cpu']}, threads: {how['threads']}, {load} before, {versions}"
            places.setdefault(where, []).append(part)
    lines += [f"- ({', '.join(parts)}) {where}." for where, parts in places.items()]
    if found["sizes"] == dataclasses.asdict(QUICK):
        lines.append("- Tiny sizes, to run the code: these ratios mean nothing.")
    return "\n".join(lines)


def describe(threads: int) -> dict[str, Any]:
    """What the results depend on: versions, processor, threads and how busy the machine is."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "trl"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    try:
        text = Path("/proc/cpuinfo").read_text()
        cpu = next(line.split(":")[1].strip() for line in text.splitlines() if "model name" in line)
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    load = [round(value, 1) for value in os.getloadavg()] if hasattr(os, "getloadavg") else []
    return {"versions": versions, "cpu": cpu, "threads": threads, "load_before": load}


def main(argv: list[str] | None = None) -> int:
    """The command. Exit code 0: measured, 2: bad input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes; the ratios mean nothing")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--rounds", type=int, default=Sizes.rounds, help="repetitions (default 5)")
    parser.add_argument("--out", type=Path, help="the .json to write, with a .md beside it")
    given = parser.parse_args(argv)
    if given.threads < 1 or given.rounds < 1:
        parser.error("--threads and --rounds must be at least 1")
    torch.set_num_threads(given.threads)
    sizes = QUICK if given.quick else dataclasses.replace(Sizes(), rounds=given.rounds)
    out = given.out or (Path("runs/bench-quick.json") if given.quick else RESULT)
    found = json.loads(out.read_text()) if out.exists() and given.only != list(PARTS) else {}
    for part in given.only:
        how = describe(given.threads)
        start = time.perf_counter()
        found |= PARTS[part](sizes)
        how["minutes"] = round((time.perf_counter() - start) / 60, 1)
        found[part] |= {"measured_on": how}
        print(f"{part}: done in {how['minutes']} minutes", file=sys.stderr)
        found["sizes"] = dataclasses.asdict(sizes)
        ordered = {key: found[key] for key in [*ROWS, *PARTS, "sizes"] if key in found}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(ordered, indent=1) + "\n")
        out.with_suffix(".md").write_text(table(ordered) + "\n")
    print(table(ordered), f"\nwrote {out} and {out.with_suffix('.md').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
