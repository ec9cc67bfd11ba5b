"""Does it fit, and how long does it take? A run of siren.py as a table of formulas.

    python examples/memory_plan.py --gpu-gb 24 --model Qwen/Qwen2.5-Math-7B --data x.jsonl \\
        --dtype bfloat16 --lora-rank 64 --recompute true ...        # siren.py's flags

No language model is loaded, and no GPU is needed: the model's config.json is enough, and for
the models of examples/configs not even a network. The formulas are for models of Llama's shape
(Llama, Qwen2, Mistral, ...), with every prompt --max-prompt and every response --max-tokens
long: the worst case for memory. For the time a response has a third of that.

Memory: weights, gradients and optimiser state are exact; the rest is printed as a range of
ERROR on both sides. Measured peaks of small models on a CPU are within 15 %, with LoRA in
bfloat16 within 25 % (tests/test_memory_plan.py, tests/extra/test_memory_plan_lora.py); no GPU
was measured. Time: SPEED is assumed, not measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # siren.py is in the folder above
import siren
import text_env
from siren import require

CONFIGS = Path(__file__).resolve().parent / "configs"  # of known models: no network is needed
ERROR = 0.25  # of all that is neither weights, gradients nor optimiser state
RESERVE = (1.0, 0.05)  # GB of CUDA's own; share of memory that is lost between tensors
F32 = 4  # bytes

# Per device: seconds per layer of a decode step (Python and kernel launches), bytes/s of
# memory, FLOP/s with float32 and with bfloat16 weights. Assumed: a GPU like the A100; a core
# of a CPU.
SPEED = {"cuda": (1.2e-3, 1e12, 1.5e13, 1e14), "cpu": (5e-4, 1e10, 5e10, 2e10)}
MEAN_LENGTH = 1 / 3  # of --max-tokens: how long the average response is taken to be


# ----------------------------------------------------------------------------- what is planned
@dataclasses.dataclass(frozen=True)
class Run:
    """A run: siren.py's flags, what config.json says of the model, and the task's options."""

    cfg: siren.Config
    model: dict[str, Any]
    prompt: int  # tokens
    dtype: str = "float32"
    lora_rank: int = 0
    recompute: bool = False
    refill: bool = False  # sampled by research/refill.py

    def __post_init__(self) -> None:
        names = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
        )
        missing = [name for name in names.split() if not self.model.get(name)]
        experts = [name for name in self.model if "experts" in name and self.model[name]]
        what = f"no {missing[0]}" if missing else f"{', '.join(experts)}: a mixture"
        known = not missing and not experts
        require(known, f"--model: its config has {what}; the plan knows Llama's shape")
        context = self.model.get("max_position_embeddings") or math.inf
        rule = f"must leave room for a prompt in the model's context of {context}; lower it"
        room = 1 <= self.prompt <= context - self.cfg.max_tokens
        require(room, f"--max-tokens {self.cfg.max_tokens}: {rule}")

    @property
    def e(self) -> int:
        """Bytes of a weight and of an activation."""
        return 2 if self.dtype == "bfloat16" else F32

    @property
    def sizes(self) -> tuple[int, ...]:
        """V, D, F (width of the MLP), L (layers), Q and K (widths of all queries and all
        keys)."""
        get = self.model.get
        heads = self.model["num_attention_heads"]
        d = get("head_dim") or get("hidden_size") // heads
        keys = d * (get("num_key_value_heads") or heads)
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        return (*(get(name) for name in names), d * heads, keys)

    @property
    def base(self) -> int:
        """Parameters of the model, without adapters."""
        V, D, F, L, Q, K = self.sizes
        bias = Q + 2 * K if self.model.get("model_type") == "qwen2" else 0
        layer = 2 * D * Q + 2 * D * K + bias + 3 * D * F + 2 * D  # attention, MLP, norms
        return V * D * (1 if self.model.get("tie_word_embeddings") else 2) + L * layer + D

    @property
    def trained(self) -> int:
        """Parameters that have a gradient: all, or those of the adapters: r (in + out)
        each."""
        _, D, F, L, Q, K = self.sizes
        adapters = 2 * (D + Q) + 2 * (D + K) + 3 * (D + F)
        return self.lora_rank * L * adapters if self.lora_rank else self.base

    @property
    def mini(self) -> int:
        """Responses of the largest mini-batch."""
        return math.ceil(self.cfg.prompts / self.cfg.mini_batches) * self.cfg.group_size

    def at_once(self, refill: bool) -> list[tuple[int, int]]:
        """(prompts, responses) that are sampled at once, in training and in evaluation."""
        cfg = self.cfg
        pairs = (cfg.prompts, cfg.group_size), (cfg.eval_prompts, cfg.eval_samples)
        if refill:
            return [(1, min(cfg.sample_batch, n * samples)) for n, samples in pairs]
        whole = [
            (min(n, max(1, cfg.sample_batch // samples)), samples) for n, samples in pairs
        ]
        return [(n, n * samples) for n, samples in whole]  # those to a prompt stay together


# ----------------------------------------------------------------------------------- 1. memory
ROWS = ("weights", "gradients", "optimiser state", "KV cache", "activations kept")
WORK = ("a layer at work", "logits at once")  # never at the same time: the larger one counts
PHASES = ("prompts", "sampling", "scoring", "update")


def layer_at_work(run: Run, rows: int, length: int) -> float:
    """Bytes that a layer's MLP and its mask need in a pass without gradient."""
    _, D, F, *_ = run.sizes
    # act(gate), up, their product; embeddings, residuals, norm
    width = (3 * F + 4 * D) * run.e
    if run.lora_rank:  # an adapter's share is added in float32: it, its multiple, the sum
        width = (2 * F + 2 * D) * run.e + (2 * F + D) * F32
    return rows * length * (width + length * (1 + run.e))


def layer_kept(run: Run, length: int) -> float:
    """Bytes per token that a layer keeps for the backward pass."""
    _, D, F, _, Q, _ = run.sizes
    attention = (4 * Q + length) * run.e  # queries, keys, values, result; a row of the mask
    mlp = 3 * F * run.e  # gate, act(gate), up
    if not run.lora_rank:
        # and two residuals (float32), two norms and their results, the product
        return attention + mlp + 2 * D * F32 + (4 * D + F) * run.e
    copies = 0 if run.e == F32 else 3 * D + Q  # of the adapters' inputs in float32
    return attention + mlp + (2 * D + 2 * D + copies + F + 7 * run.lora_rank) * F32


def layer_backward(run: Run) -> float:
    """Bytes per token at the peak of a layer's backward pass: gradients in its MLP."""
    _, D, F, *_ = run.sizes
    return (3 * F + 2 * D) * (F32 if run.lora_rank else run.e)


def logits_at_once(run: Run, rows: int, update: bool = False) -> float:
    """Bytes of a chunk of siren.stats_in_chunks, for these responses: five tensors [chunk, V]
    in float32 (up to nine where the policy is so flat that all of the vocabulary is
    sorted)."""
    V, D, *_ = run.sizes
    chunk = run.cfg.chunk or max(1, 2 ** (21 if device_of(run.cfg) == "cpu" else 26) // V)
    tokens = rows * run.cfg.max_tokens
    tensor = F32 * V * min(chunk, tokens)
    if not update or run.lora_rank:
        return 5 * tensor
    # A head that is trained has a gradient from each chunk and each micro-batch. The first two
    # and their sum are there at once, when no other weight has its gradient yet; later each
    # is added in place.
    head = V * D * run.e
    several = run.mini > rows
    if tokens > chunk:
        first = tensor + 3 * head - run.base * run.e
        return max(5 * tensor, first, tensor + head if several else 0)
    return max(5 * tensor, 2 * head if several else 0)


def plan(run: Run) -> dict[str, dict[str, float]]:
    """Phase -> part -> bytes at the phase's peak."""
    V, D, _, L, _, K = run.sizes
    cfg = run.cfg
    length = run.prompt + cfg.max_tokens
    e = run.e
    adapters = run.trained * F32 if run.lora_rank else 0
    size = adapters or run.base * e  # of what is trained
    static = {
        "weights": run.base * e + adapters,
        "gradients": size,
        "optimiser state": 2 * size,
    }
    at_once = run.at_once(run.refill)
    prompts, rows = (max(both) for both in zip(*at_once))
    token = 2 * L * K * e  # keys and values
    logits = rows * V * F32
    cache = rows * length * token

    micro = min(cfg.micro_batch_size, run.mini)
    scored = min(cfg.micro_batch_size, cfg.prompts * cfg.group_size)
    hidden = 2 * cfg.max_tokens * D * e  # the last hidden states, and the response's alone
    one = layer_kept(run, length)
    kept, again = (L * D * e, one) if run.recompute else (L * one, 0)
    # the gradients of an update stay until the next one begins its backward pass
    phases = {
        "prompts": {
            "KV cache": prompts * run.prompt * token,
            "a layer at work": layer_at_work(run, prompts, run.prompt),
        },
        # a layer's keys are copied when a token is added; logits of the model, log pi, pi,
        # sums
        "sampling": {
            "KV cache": cache,
            "a layer at work": cache / (2 * L) + 2 * logits,
            "logits at once": 4 * logits,
        },
        "scoring": {
            "activations kept": scored * hidden,
            "a layer at work": layer_at_work(run, scored, length),
            "logits at once": logits_at_once(run, scored),
        },
        "update": {
            "activations kept": micro * (length * kept + hidden),
            "a layer at work": micro * length * (again + layer_backward(run)),
            "logits at once": logits_at_once(run, micro, update=True),
        },
    }
    return {name: {**static, **parts} for name, parts in phases.items()}


def total(parts: dict[str, float]) -> float:
    """Bytes of a phase."""
    return sum(parts.get(name, 0) for name in ROWS) + max(parts.get(name, 0) for name in WORK)


def needs(run: Run) -> tuple[float, float]:
    """GB that the run needs, at least and at most, by ERROR."""
    reserve, lost = (0.0, 0.0) if device_of(run.cfg) == "cpu" else RESERVE
    both = [(sum(p[name] for name in ROWS[:3]), total(p)) for p in plan(run).values()]
    low, high = (
        max(exact + (1 + error) * (whole - exact) for exact, whole in both)
        for error in (-ERROR, ERROR)
    )
    return reserve + (1 + lost) * low / 1e9, reserve + (1 + lost) * high / 1e9


def fits(run: Run, gb: float) -> str:
    """fits, tight (within the error) or does not fit."""
    low, high = needs(run)
    return "fits" if high <= gb else "tight" if low <= gb else "does not fit"


# ------------------------------------------------------------------------------------- 2. time
def decode_steps(run: Run) -> tuple[float, float]:
    """Passes over one token per response, in a training step: without refill, and with it."""
    cfg = run.cfg
    (prompts, _), _ = run.at_once(False)
    (_, rows), _ = run.at_once(True)
    mean = MEAN_LENGTH * cfg.max_tokens
    without = math.ceil(cfg.prompts / prompts) * cfg.max_tokens  # the longest response decides
    return without, cfg.prompts * cfg.group_size * mean / rows + cfg.max_tokens - mean


def seconds(run: Run) -> dict[str, float]:
    """The parts of a training step, and "decode": seconds of a decode step."""
    _, _, _, L, _, K = run.sizes
    cfg = run.cfg
    kind = device_of(cfg)
    layer, bandwidth, *flops = SPEED[kind]
    flop = 2 * (run.base + run.trained * bool(run.lora_rank))  # per token, forward
    speed = flops[run.dtype == "bfloat16"]
    mean = run.prompt + MEAN_LENGTH * cfg.max_tokens
    responses = cfg.prompts * cfg.group_size
    _, rows = run.at_once(run.refill)[0]
    read = plan(run)["sampling"]["weights"] + 3 * rows * mean * 2 * L * K * run.e
    decode = max(L * layer, read / bandwidth, rows * flop / speed)
    passes = math.ceil(responses / cfg.micro_batch_size)
    score = max(passes * L * layer, responses * mean * flop / speed)
    times = (2 if run.lora_rank else 3) + run.recompute  # a backward pass costs one or two
    times += run.mini > cfg.micro_batch_size  # each micro-batch is computed again
    without, refill = decode_steps(run)
    return {
        "decode": decode, "sampling": without * decode, "refill": refill * decode,
        "scoring": score, "update": times * score,
    }  # fmt: skip


# ----------------------------------------------------------------------------------- 3. advice
def advise(run: Run, gb: float) -> tuple[Run, str]:
    """The run with the mildest changes that make it fit, or with all of them; their flags.

    Smaller batches first, as they cost time alone; then recomputed layers; then adapters.
    """
    changes: list[dict[str, Any]] = [{}]
    if "model=" in run.cfg.task:  # these are options of text_env.py
        changes += [
            {"recompute": True},
            {"lora_rank": run.lora_rank or 64, "dtype": "bfloat16"},
        ]
    cfg = run.cfg
    options: dict[str, Any] = {}
    for change in changes:
        change = {name: value for name, value in change.items() if getattr(run, name) != value}
        run = dataclasses.replace(run, cfg=cfg, **change)  # with the batches of before
        options |= change
        batches: dict[str, int] = {}
        while fits(run, gb) != "fits":
            phases = plan(run)
            largest = max(PHASES, key=lambda name: total(phases[name]))
            sampled = largest in ("prompts", "sampling")
            name = "sample_batch" if sampled else "micro_batch_size"
            most = run.mini if largest == "update" else cfg.prompts * cfg.group_size
            rows = min(run.cfg.micro_batch_size, most)
            rows = max(n for _, n in run.at_once(True)) if sampled else rows
            n = max(1, rows // 2)
            smaller = dataclasses.replace(run, cfg=dataclasses.replace(run.cfg, **{name: n}))
            if total(plan(smaller)[largest]) >= total(phases[largest]):
                break
            run = smaller
            batches[name] = n
        if fits(run, gb) == "fits":
            break
    flags = {name.replace("_", "-"): x for name, x in {**batches, **options}.items()}
    return run, " ".join(f"--{name} {str(x).lower()}" for name, x in flags.items())


# ------------------------------------------------------------------------------ 4. the command
def device_of(cfg: siren.Config) -> str:
    """cpu, or cuda for whatever else was asked for."""
    return "cpu" if cfg.device == "cpu" else "cuda"


def read_config(model: str) -> dict[str, Any]:
    """config.json of a folder, of a known name (see examples/configs), or of a hub id."""
    known = CONFIGS / f"{model.split('/')[-1].lower().removesuffix('-instruct')}.json"
    if known.exists() and not Path(model).expanduser().exists():
        return json.loads(known.read_text())
    return text_env.open_model(AutoConfig, model).get_text_config().to_dict()


def make_run(cfg: siren.Config, refill: bool = False) -> Run:
    """The run that these flags ask for. ValueError: no such model, or one of another shape."""
    module, given = siren.module_and_options(cfg.task)
    if "model" not in given:  # a task that makes its own model, such as the toy
        task = importlib.import_module(module).load(cfg, **given)
        prompt = max(len(problem.prompt) for problem in task.train_problems(64, "plan"))
        return Run(cfg, task.build_model().config.to_dict(), prompt, refill=refill)
    options = text_env.read_options({"data": "not read", **given}, cfg.lr)
    model = read_config(options.model)
    context = model.get("max_position_embeddings") or math.inf
    prompt = min(options.max_prompt, context - cfg.max_tokens)  # longer ones are dropped
    how = (options.dtype, options.lora_rank, options.recompute, refill)
    return Run(cfg, model, prompt, *how)


def memory_table(run: Run) -> str:
    """The parts of each phase, in GB."""
    phases = plan(run)
    lines = [f"{'GB':<28}" + "".join(f"{name:>10}" for name in PHASES)]
    for part in (*ROWS, *WORK):
        sizes = [phases[name].get(part, 0) / 1e9 for name in PHASES]
        cells = "".join(f"{size:>10.2f}" if size else f"{'-':>10}" for size in sizes)
        lines.append(f"{'* ' * (part in WORK) + part:<28}{cells}")
    sums = "".join(f"{total(phases[name]) / 1e9:>10.2f}" for name in PHASES)
    return "\n".join(
        [*lines, f"{'total':<28}{sums}", "* never together: the larger one counts"]
    )


def verdict(run: Run, gb: float | None) -> str:
    """What is needed, from least to most; does it fit; what to change if not."""
    low, high = needs(run)
    extra = "" if device_of(run.cfg) == "cpu" else ", CUDA's own memory included"
    text = f"needs {low:.1f}-{high:.1f} GB{extra}"
    if gb is None:
        return f"{text}; add --gpu-gb X for a verdict"
    found = fits(run, gb)
    if found == "fits":
        return f"{gb:g} GB: {text}: fits"
    better, flags = advise(run, gb)
    low, high = needs(better)
    now = f"with {flags} it needs {low:.1f}-{high:.1f} GB: {fits(better, gb)}" if flags else ""
    if fits(better, gb) != "fits":
        now += f"{'; or' if now else ''} take a larger card or a smaller model"
    return f"{gb:g} GB: {text}: {found};{' ' if flags else ''}{now}"


def time_table(run: Run) -> str:
    """Seconds of a training step, and what they are made of."""
    took = seconds(run)
    without, refill = decode_steps(run)
    kind = device_of(run.cfg)
    mean = MEAN_LENGTH * run.cfg.max_tokens
    layer, bandwidth, *flops = SPEED[kind]
    tokens = run.cfg.prompts * run.cfg.group_size * (run.prompt + mean)
    lines = [
        "time of a training step, assumed and not measured: "
        f"{layer * 1e3:g} ms per layer of a",
        f"decode step, memory at {bandwidth / 1e9:g} GB/s, {flops[0] / 1e12:g} TFLOP/s "
        f"(bfloat16: {flops[1] / 1e12:g}), responses of {mean:.0f} tokens",
    ]
    for name, n, key in (
        ("sampling", without, "sampling"),
        ("with --plug research.refill", refill, "refill"),
    ):
        work = f"{n:>12,.0f} decode steps x {took['decode'] * 1e3:.1f} ms"
        lines.append(f"{name:<28}{work} = {readable(took[key])}")
    for name in ("scoring", "update"):
        work = f"{tokens:>12,.0f} tokens / {tokens / took[name]:,.0f} per second"
        lines.append(f"{name:<28}{work} = {readable(took[name])}")
    return "\n".join(lines)


def readable(seconds: float) -> str:
    """A duration in its unit.

    >>> readable(0.25), readable(90), readable(7200)
    ('0.25 s', '1.5 min', '2.0 h')
    """
    if seconds < 60:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def describe(run: Run, gb: float | None) -> str:
    """The whole plan, as text."""
    cfg = run.cfg
    how = f"adapters of rank {run.lora_rank}" if run.lora_rank else "all of them"
    head = f"{run.base:,} parameters in {run.dtype}, {run.trained:,} trained ({how})"
    lengths = f"prompts of {run.prompt} tokens and responses of {cfg.max_tokens}, none shorter"
    _, rows = (max(both) for both in zip(*run.at_once(run.refill)))
    batches = (
        f"{rows} responses sampled, {min(cfg.micro_batch_size, run.mini)} updated at once"
    )
    where = "a CPU" if device_of(cfg) == "cpu" else "a GPU"
    first = f"{head}\n{lengths}\n{batches}, on {where}"
    return "\n\n".join([first, memory_table(run), verdict(run, gb), time_table(run)])


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ValueErrors, and so one line each."""

    def error(self, message: str) -> None:
        raise ValueError(f"{message}; see --help")


def read_flags(argv: list[str] | None) -> tuple[Run, float | None]:
    """The run and --gpu-gb, from siren.py's flags: the fields of Config, and the task's
    own."""
    parser = Parser("memory_plan.py", usage=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--gpu-gb", type=float, help="memory of the card, for a verdict")
    parser.add_argument("--plug", default="", help="research.refill: plan for that sampler")
    for field in dataclasses.fields(siren.Config):
        flag = f"--{field.name.replace('_', '-')}"
        default = "cuda" if field.name == "device" else field.default  # plan for a GPU
        parser.add_argument(flag, type=field.type, default=default, help="as in siren.py")
    given, rest = parser.parse_known_args(argv)
    flags = vars(given)
    gb = flags.pop("gpu_gb")
    require(gb is None or 0 < gb < 1e6, f"--gpu-gb {gb}: must be above 0; write such as 24")
    refill = "refill" in flags.pop("plug")
    if rest:
        flags["task"] = siren.with_flags(flags["task"], rest)
    return make_run(siren.Config(**flags), refill), gb


def main(argv: list[str] | None = None) -> int:
    """The command. Exit code 0: a plan was printed, 2: bad input."""
    try:
        run, gb = read_flags(argv)
        print(describe(run, gb))
    except (ImportError, OSError, ValueError) as error:
        print(f"memory_plan.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
