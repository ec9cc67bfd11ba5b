"""How fast and how small: siren.py against the plain ways of doing the same.

    python research/bench.py             # all six, 25 minutes; writes results/bench.json
    python research/bench.py --quick     # the same code on tiny sizes, under a minute (for CI)
    python research/bench.py --only a e  # some of it; the others' figures stay in the files

 a  log-prob, full and nucleus entropy of N tokens over a vocabulary of V, forward and back:
    siren.stats_in_chunks and research/fast_stats.py against the floor (log-softmax, gather and
    full entropy, with no nucleus at all) and against a full sort
 b  sampling groups: siren.sample against transformers' model.generate
 c  peak memory of one update: chunk by chunk against all logits at once
 d  one training step against TRL's GRPOTrainer (if installed)
 e  one training step against the model's own forward and backward passes in it
 f  one training step of SmolLM2-135M, with the command of docs/scale.md: each prompt read once
    for all of its responses against a pass over each response with its prompt, in CPU seconds
    (if examples/get_smollm2.py has put the model into models/)

Contenders take turns within a round, each first in every other round, so that a busy machine
slows all alike. A figure is the ratio within a round; its median is over the rounds. Memory is
what PyTorch's allocator hands out, kernels' temporaries included, and repeats to the byte. One
thread.
"""

import copy
import dataclasses
import gc
import json
import math
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # siren.py is in the folder above
import siren
from research import fast_stats
from research.tools import Parser, run_tool

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "results" / "bench.json"
TOP_P = 0.8
PROMPTS = 8
GROUP = 8
HIDDEN = 256  # width of the models in (b) and (c)
SAMPLE_VOCAB = 4096  # of the model in (b)
# rounds of each race, vocabulary of (a) and (c), longest response of (b), tokens of (c)
SIZES = {"rounds": 5, "vocab": 152_064, "response": 192, "update_tokens": 2048}
QUICK = {"rounds": 2, "vocab": 2048, "response": 12, "update_tokens": 64}


# ------------------------------------------------------------------------------------- measure
def allocated_peak(run, ready=tuple):
    """The most bytes that PyTorch's CPU allocator has handed out at one time during
    run(*ready()).

    What `ready` allocates and returns is counted too, its own peak is not. From the profiler's
    log of every allocation: it sees what a kernel allocates inside, as a count of tensors
    would not. run() must not free what an earlier measurement left behind: the log would take
    it off.
    """
    gc.collect()
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False
    ) as log:
        made = ready()
        with torch.profiler.record_function("measured"):
            run(*made)
    events = log.profiler.kineto_results.events()
    span = next(e for e in events if e.name() == "measured")
    changes = [e for e in events if e.name() == "[memory]" and e.start_ns() <= span.end_ns()]
    changes.sort(key=lambda e: e.start_ns())
    live = [0, *accumulate(e.nbytes() for e in changes)]
    assert min(live) >= 0, "freed what was there before"
    before = sum(e.start_ns() < span.start_ns() for e in changes)
    return max(live[before:])


def race(ways, rounds, before=lambda: None, clock=time.perf_counter):
    """Name -> seconds of each round, for these functions. before() opens a round; the first
    round is not counted."""
    times = {name: [] for name in ways}
    for i in range(rounds + 1):
        before()
        for name in list(ways)[:: 1 if i % 2 else -1]:
            start = clock()
            ways[name]()
            times[name].append(clock() - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def ratios(above, below):
    """Smallest, median and largest of above / below within each round.

    >>> ratios([3.0, 1.0, 2.0], [1.0, 1.0, 1.0])
    {'min': 1.0, 'median': 2.0, 'max': 3.0}
    """
    values = [a / b for a, b in zip(above, below, strict=True)]
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


# --------------------------------------------------------------------------------- a: the head
def peaked(n, vocab, rng):
    """Logits [n, vocab] like a language model's: noise of deviation 2, and 64 tokens that
    stand 25 above it, the k-th likeliest by 25 - s ln k; s is from 1 (3 nats) to 8 (certain),
    by row."""
    logits = 2 * torch.randn(n, vocab, generator=rng)
    likely = torch.rand(n, vocab, generator=rng).topk(64, dim=1).indices
    steep = 1 + 7 * torch.rand(n, 1, generator=rng)
    return logits.scatter_add_(1, likely, 25 - steep * torch.arange(1, 65).log())


def zipf(n, vocab, rng):
    """The k-th likeliest token has a probability proportional to k ** -1.5, in random
    order."""
    ranks = torch.stack([torch.randperm(vocab, generator=rng) for _ in range(n)])
    return -1.5 * (1.0 + ranks).log()


def flat(n, vocab, rng):
    """Nearly uniform, as after an exploded bonus: 11.9 nats at V = 152064."""
    return 0.1 * torch.randn(n, vocab, generator=rng)


class Logits(torch.nn.Module):
    """A head whose hidden states are the logits themselves, of a vocabulary of this size."""

    def __init__(self, vocab):
        super().__init__()
        self.weight = torch.empty(vocab, 0)  # it is asked for its length

    def forward(self, logits):
        return logits


def needed(logits, tokens):
    """What any such method must do: log-prob and full entropy. logits [N, V], tokens [N]."""
    log_pi = logits.log_softmax(-1)
    logp = log_pi.gather(-1, tokens[..., None])[..., 0]
    return {"logp": logp, "entropy": -(log_pi.exp() * log_pi).sum(-1)}


def floor(hidden, head, tokens, *_):
    """That alone."""
    return needed(head(hidden), tokens)


def by_sort(hidden, head, tokens, top_p, temperature=1.0, chunk=0):
    """siren.stats_in_chunks as it is usually written: all logits at once, a full sort."""
    logits = head(hidden)
    log_pi = logits.log_softmax(-1)
    ordered, order = log_pi.detach().sort(-1, descending=True)
    pi = ordered.exp()
    inside = torch.zeros_like(pi, dtype=torch.bool)
    inside.scatter_(-1, order, pi.cumsum(-1) - pi < top_p)
    log_q = log_pi.masked_fill(~inside, -math.inf).log_softmax(-1)
    h = -(log_q.exp() * log_q.masked_fill(~inside, 0.0)).sum(-1)
    return {**needed(logits, tokens), "nucleus_entropy": h}


def drop_in(logits, _, *rest):
    """fast_stats, which takes logits without a head."""
    return fast_stats.stats_in_chunks(logits, None, *rest)


KINDS = {"peaked": peaked, "zipf": zipf, "flat": flat}
METHODS = {"floor": floor, "ours": siren.stats_in_chunks, "drop_in": drop_in, "sort": by_sort}
PAIRS = {"nucleus_vs_floor": ("ours", "floor"), "nucleus_vs_sort": ("sort", "ours")}
PAIRS |= {"drop_in_vs_floor": ("drop_in", "floor")}


def forward_backward(method, logits, tokens):
    """Once forward and once backward."""
    stats = method(logits, Logits(logits.shape[-1]), tokens, TOP_P, 1.0)
    sum(values.sum() for values in stats.values() if values.requires_grad).backward()
    logits.grad = None


def bench_head(sizes):
    """(a) The keys nucleus_*: of peaked and Zipf logits, the one whose median is worse."""
    rng = torch.Generator().manual_seed(0)
    found = {}
    for kind, make in KINDS.items():
        logits = make(64, sizes["vocab"], rng).requires_grad_()
        tokens = torch.randint(sizes["vocab"], (64,), generator=rng)
        ways = {
            name: partial(forward_backward, m, logits, tokens) for name, m in METHODS.items()
        }
        times = race(ways, sizes["rounds"])
        # the logits themselves were there before: they count for all alike
        peaks = {name: [logits.nbytes + allocated_peak(way)] for name, way in ways.items()}
        found[kind] = {"seconds": times, "bytes": peaks}
        for pair, (a, b) in PAIRS.items():
            found[kind][f"{pair}_time"] = ratios(times[a], times[b])
            found[kind][f"{pair}_memory"] = ratios(peaks[a], peaks[b])
    keys = {"nucleus_vs_floor_time": max, "nucleus_vs_floor_memory": max}
    keys |= {"nucleus_vs_sort_time": min}
    return {"a": found} | {
        key: worse(
            (found[kind][key] for kind in ("peaked", "zipf")), key=lambda x: x["median"]
        )
        for key, worse in keys.items()
    }


# ------------------------------------------------------------------------------ b: the sampler
class Scripted(Qwen2ForCausalLM):
    """A model whose responses end where `lengths` [rows] says: EOS is certain there, and
    impossible before. Rows may leave the batch once they have ended (`sample`) or stay
    (`generate`)."""

    EOS = 1
    lengths = torch.tensor([])  # each at least 2
    step = 0  # the passes so far

    def forward(self, *args, **kwargs):
        """Qwen2's, with the last position's logits of EOS overwritten."""
        out = super().forward(*args, **kwargs)
        self.step += 1
        last = out.logits[:, -1]
        last[:, self.EOS] = -math.inf
        if self.step > 1:  # the prefill may be shared by several rows, but none ends there
            if len(last) < len(self.lengths):
                self.lengths = self.lengths[self.lengths >= self.step]
            last[self.lengths == self.step, self.EOS] = 1e4
        return out


def make_model(kind, vocab, layers):
    """A random model of that class."""
    torch.manual_seed(0)
    size = {
        "hidden_size": HIDDEN,
        "intermediate_size": 3 * HIDDEN,
        "num_hidden_layers": layers,
    }
    size |= {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}
    return kind(Qwen2Config(vocab_size=vocab, pad_token_id=0, **size)).eval()


def bench_sampler(sizes):
    """(b) sample against generate: the same model, prompts, lengths and number of samples."""
    model = make_model(Scripted, SAMPLE_VOCAB, layers=4)
    budget = sizes["response"]
    prompts = [torch.randint(2, SAMPLE_VOCAB, (n,)) for n in torch.randint(24, 65, (PROMPTS,))]
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left")
    problems = [SimpleNamespace(prompt=prompt.tolist()) for prompt in prompts]
    task = SimpleNamespace(eos_ids=[Scripted.EOS], pad_id=0)
    cfg = siren.Config(max_tokens=budget)
    plain = {"max_new_tokens": budget, "num_return_sequences": GROUP}
    plain |= {
        "eos_token_id": Scripted.EOS,
        "do_sample": True,
        "top_k": 0,
        "attention_mask": (ids > 0).long(),
    }

    def by_us(lengths):
        model.lengths = lengths
        model.step = 0
        return siren.sample(model, task, problems, cfg, "0", GROUP, 1.0).mask.sum(1).tolist()

    def by_generate(lengths):
        model.lengths = lengths
        model.step = 0
        out = model.generate(ids, **plain)[:, ids.shape[1] :]
        return [1 + row.index(Scripted.EOS) for row in out.tolist()]

    # long responses are rare: a quarter of the budget on average, one uses all of it
    mixed = 2 + torch.empty(PROMPTS * GROUP).exponential_(4 / budget).long().clamp(
        max=budget - 2
    )
    mixed[0] = budget
    found = {"b": {}}
    for name, lengths in {"equal": torch.full_like(mixed, budget), "mixed": mixed}.items():
        assert by_us(lengths) == by_generate(lengths) == lengths.tolist()
        ways = {"ours": partial(by_us, lengths), "generate": partial(by_generate, lengths)}
        times = race(ways, sizes["rounds"])
        found[f"sampler_vs_generate_{name}"] = ratios(times["generate"], times["ours"])
        found["b"][name] = {"seconds": times}
    return found


# -------------------------------------------------------------------------------- c: an update
def bench_update(sizes):
    """(c) The peak of the second update, when the optimiser has its state, of a two-layer
    model."""
    torch.manual_seed(0)
    t = sizes["update_tokens"] // 2  # a group of two responses
    ids = torch.randint(sizes["vocab"], (2, 16 + t))
    mask = torch.ones(2, 16 + t, dtype=torch.bool)
    logp = torch.full((2, t), -math.log(sizes["vocab"]))
    rollout = siren.Rollout(ids[:, :16], mask[:, :16], ids[:, 16:], mask[:, 16:], logp)
    batch = (rollout, logp, torch.tensor([0.5, -0.5]))
    cfg = siren.Config(max_tokens=t, group_size=2)
    peaks = {}
    stats = []

    def ready():
        model = make_model(Qwen2ForCausalLM, sizes["vocab"], layers=2)
        made = SimpleNamespace(cfg=cfg, model=model, anchor=1.0)
        made.weights = list(model.parameters())
        made.optimizer = torch.optim.AdamW(made.weights, lr=1e-4)
        siren.update(made, *batch)
        return (made,)

    def run(made):
        stats.append(siren.update(made, *batch))

    for name, method in {"ours": siren.stats_in_chunks, "plain": by_sort}.items():
        with mock.patch.object(siren, "stats_in_chunks", method):
            peaks[name] = [allocated_peak(run, ready)]
    for key in ("h_agg", "grad_norm"):  # the same update, so a fair comparison
        assert math.isclose(stats[0][key], stats[1][key], rel_tol=1e-3), (key, stats)
    key = "update_memory_chunked_vs_not"
    return {key: ratios(peaks["ours"], peaks["plain"]), "c": {"bytes": peaks}}


# -------------------------------------------------------------------------- d: a training step
class Toy(TrainerCallback):
    """siren.training_step on the toy task, step after step. As a callback of a trainer of
    TRL's: a step before each of TRL's, which are a rollout and cfg.mini_batches updates."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory()
        self.run = siren.Run(siren.Config(device="cpu", out=self.folder.name))
        self.seconds = []  # of each step
        self.trl_seconds = []

    def step(self):
        """The next step."""
        start = time.perf_counter()
        siren.training_step(self.run, len(self.seconds) + 1)
        self.seconds.append(time.perf_counter() - start)

    def on_step_begin(self, args, state, control, **_):
        """Before an update of TRL's: our step, if it is the first of a rollout."""
        if state.global_step % self.run.cfg.mini_batches == 0:
            self.step()
            self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        """After an update of TRL's."""
        if state.global_step % self.run.cfg.mini_batches == 0:
            self.trl_seconds.append(time.perf_counter() - self.start)


def bench_trl(sizes):
    """(d) One training step on the toy task: 32 prompts x 8 responses, 4 optimiser steps.

    The key is of equal arithmetic: float32 and no activation checkpointing on either side.
    """
    if not find_spec("trl"):
        print("d: skipped, as trl is not installed; see requirements-examples.txt")
        return {"d": {}}
    from trl import GRPOConfig, GRPOTrainer

    from examples import trl_data  # the same toy, in the form that TRL wants

    found = {}
    steps = 2 * sizes["rounds"] + 1  # the first is not counted
    for name, usual in {"equal arithmetic": False, "TRL's defaults": True}.items():
        toy = Toy()
        cfg = dataclasses.replace(toy.run.cfg, steps=steps)
        options = trl_data.options(cfg) | {"bf16": usual, "gradient_checkpointing": usual}
        args = GRPOConfig(toy.folder.name, **options)
        GRPOTrainer(args=args, callbacks=[toy], **trl_data.toy_parts(cfg)).train()
        ours = toy.seconds[1:]
        theirs = toy.trl_seconds[1:]
        found[name] = {"ratio": ratios(theirs, ours), "seconds": {"ours": ours, "trl": theirs}}
    return {"step_vs_trl": found["equal arithmetic"]["ratio"], "d": found}


# ---------------------------------------------------------------- e: a step and its own passes
def record_passes(model, run):
    """The calls of the model's network and of its head during run(): which, with gradient or
    not, arguments."""
    calls = []

    def keep(module, args, kwargs):
        args = tuple(x.detach() for x in args)
        # a copy, since the cache of a decoding step grows
        calls.append((module, torch.is_grad_enabled(), *copy.deepcopy((args, kwargs))))

    parts = (model.base_model, model.get_output_embeddings())
    hooks = [part.register_forward_pre_hook(keep, with_kwargs=True) for part in parts]
    run()
    for hook in hooks:
        hook.remove()
    return calls


def replay_passes(model, calls):
    """The same passes with nothing around them; backward too where there was a gradient."""
    for module, with_grad, args, kwargs in calls:
        with torch.set_grad_enabled(with_grad):
            if module is model.base_model:
                hidden = module(*args, **kwargs).last_hidden_state.flatten(0, 1)
                continue
            logits = module(hidden[: len(args[0])])  # of as many tokens as there were
            if with_grad:
                logits.backward(torch.ones_like(logits))


def bench_passes(sizes):
    """(e) A step of a toy run, and a replay of the passes of the step before it."""
    toy = Toy()
    model = toy.run.model
    calls = []

    def record():
        calls[:] = record_passes(model, toy.step)

    ways = {"step": toy.step, "model": lambda: replay_passes(model, calls)}
    times = race(ways, 2 * sizes["rounds"], record)
    return {"step_vs_model": ratios(times["step"], times["model"]), "e": {"seconds": times}}


# ---------------------------------------------------------------------- f: a real model's step
SMOLLM2 = {
    "model": ROOT / "models" / "smollm2-135m",
    "data": ROOT / "data" / "sums_train.jsonl",
    "eval_data": ROOT / "data" / "sums_eval.jsonl",
    "answer_form": "last-number",
    "prompt": "{question} Put the answer within \\boxed{}.",
    "lora_rank": 16,
}
STEP = {"prompts": 4, "mini_batches": 2, "max_tokens": 16, "temperature": 0.7}
STEP |= {"top_p": 0.8, "peak_quantile": 0.8, "eval_prompts": 16, "device": "cpu"}
STEP |= {"lr": 1e-12}  # so that each step is that of the same weights
FEW = {"prompts": 2, "group_size": 2, "mini_batches": 1, "max_tokens": 2}  # for --quick


def bench_prompts(sizes):
    """(f) The same steps with read_rollout, which text_env gives to a model whose attention
    takes any mask, and without it, in CPU seconds."""
    if not all(SMOLLM2[name].exists() for name in ("model", "data", "eval_data")):
        print("f: skipped; run examples/get_smollm2.py and examples/make_data.py before")
        return {"f": {}}
    options = ",".join(f"{name}={value}" for name, value in SMOLLM2.items())
    settings = {**STEP, **(FEW if sizes == QUICK else {})}
    with tempfile.TemporaryDirectory() as folder:
        run = siren.Run(siren.Config(task=f"text_env:{options}", out=folder, **settings))
    once = run.model.read_rollout
    metrics = {}

    def step(name, hook):
        run.model.read_rollout = hook
        if hook is None:
            del run.model.read_rollout
        metrics[name] = siren.training_step(run, 1)

    ways = {"once": partial(step, "once", once), "each": partial(step, "each", None)}
    times = race(ways, max(2, sizes["rounds"] // 2), clock=time.process_time)
    for key in ("reward", "h_agg", "grad_norm"):  # the same step, so a fair comparison
        same = math.isclose(metrics["once"][key], metrics["each"][key], rel_tol=1e-3)
        assert same, (key, metrics)
    return {
        "prompts_once_vs_each": ratios(times["once"], times["each"]),
        "f": {"seconds": times},
    }


# --------------------------------------------------------------------------------- the command
PARTS = {
    "a": bench_head,
    "b": bench_sampler,
    "c": bench_update,
    "d": bench_trl,
    "e": bench_passes,
    "f": bench_prompts,
}
ROWS = {  # key -> its part, what the table says, the bound, and whether less is better
    "nucleus_vs_floor_time": (
        "a",
        "log-prob, H, H': time, ours / without a nucleus",
        1.0,
        True,
    ),
    "nucleus_vs_floor_memory": ("a", "the same: peak memory", 0.55, True),
    "nucleus_vs_sort_time": ("a", "the same: time, full sort / ours", 4.0, False),
    "sampler_vs_generate_equal": ("b", "sampling, equal lengths: generate / ours", 1.0, False),
    "sampler_vs_generate_mixed": ("b", "sampling, mixed lengths: generate / ours", 1.5, False),
    "update_memory_chunked_vs_not": (
        "c",
        "update: peak memory, ours / all logits",
        0.125,
        True,
    ),
    "step_vs_trl": ("d", "training step: time, TRL's GRPOTrainer / ours", 1.0, False),
    "step_vs_model": ("e", "training step: time, ours / the model's own passes", 1.3, True),
    "prompts_once_vs_each": ("f", "SmolLM2's step: time, prompts once / each", 0.6, True),
}


def table(found):
    """The results in Markdown: every key, the details, and what it was measured on."""
    lines = ["| | measured | median | min - max | bound |", "|---|---|---|---|---|"]
    for key, (part, text, aim, less) in ROWS.items():
        form = "{median:.3g} | {min:.3g} - {max:.3g}" if key in found else "not measured |"
        figures = form.format(**found.get(key, {}))
        lines.append(
            f"| {part} | {text} | {figures} | at {'most' if less else 'least'} {aim:g} |"
        )
    lines.append("")
    for part in PARTS:
        for name, values in found.get(part, {}).items():
            if figures := [
                f"{k} {v['median']:.3g}" for k, v in values.items() if "median" in v
            ]:
                lines.append(f"- ({part}), {name}: {', '.join(figures)}.")
    lines += [
        f"- ({part}) measured on {where}." for part, where in found["measured_on"].items()
    ]
    if found["sizes"] == QUICK:
        lines.append("- Tiny sizes, to run the code: these ratios mean nothing.")
    return "\n".join(lines)


def describe():
    """What the results depend on: processor, how busy the machine is, versions."""
    names = filter(find_spec, ("torch", "transformers", "trl"))
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    cpu = torch.backends.cpu.get_cpu_capability()
    load = os.getloadavg()[0]
    return f"{cpu}, one thread, load {load:.1f} before, {versions}"


def command(argv):
    """Measure the parts that are asked for; write the results and print them."""
    parser = Parser("bench.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: meaningless ratios")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts")
    parser.add_argument("--out", type=Path, help="the .json to write, with a .md beside it")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    sizes = QUICK if given.quick else SIZES
    out = given.out or (Path("runs/bench-quick.json") if given.quick else RESULT)
    out.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(out.read_text()) if out.exists() else {"measured_on": {}}
    for part in given.only:
        found["measured_on"][part] = describe()
        found |= PARTS[part](sizes) | {"sizes": sizes}
        out.write_text(json.dumps(found, indent=1) + "\n")
        out.with_suffix(".md").write_text(table(found) + "\n")
    print(table(found), f"\nwrote {out} and {out.with_suffix('.md').name}")


def main(argv=None):
    """The command. Exit codes as run_tool says."""
    return run_tool("bench.py", command, argv)


if __name__ == "__main__":
    sys.exit(main())
