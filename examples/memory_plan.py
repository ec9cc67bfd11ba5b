"""Does it fit? The memory of a run of siren.py, before any weight is loaded.

    python siren.py --dry-run --gpu-gb 24 --model Qwen/Qwen2.5-Math-1.5B --lora-rank 64
    python examples/memory_plan.py ...      # the same flags, without --dry-run

How: the model is built on PyTorch's meta device, where tensors have shapes but no storage, and a
sampling step, a scoring pass and an update are *rehearsed* on it: the modules' own code runs, and
a counter adds up the tensors that are alive after each operation. So it holds for whatever
transformers loads, and the norms' float32 copies or an adapter's input are not forgotten. By hand
are only what depends on values (the head's chunk, below) and the attention kernel, which is fused.

Every prompt is taken to have --max-prompt tokens and every response --max-tokens: the worst case.
Sizes are in decimal GB, 10^9 bytes. examples/test_memory_plan.py compares with measured peaks.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # siren.py is in the folder above
import siren
from examples import text_env

CONFIGS = Path(__file__).resolve().parent / "configs"  # of known models, to plan without a network
Tensor = torch.Tensor

# What n tokens' chunk holds in siren._TokenStats, in [n, V] float32 tensors: at two moments of the
# forward pass (while the buckets are numbered; while they are summed up, and then `buckets` tensors
# [n, 2048] too, which matter for small V), while log pi, pi and g are made in the backward pass,
# and while the head's gradient is. From the second chunk on, some of the previous one's are there.
CHUNK = {"forward": 5.0, "sums": 4.0, "buckets": 3.25, "backward": 4.25, "product": 3.0}
PREVIOUS = {"forward": 0.25, "backward": 1.75}
MULTINOMIAL = 1  # tensors [rows, V] that torch.multinomial makes inside
PHASES = ("sampling", "scoring", "update")
RESERVE = (1.0, 0.05)  # GB of CUDA's context and libraries; share lost to fragmentation


# -------------------------------------------------------------------------------------- 1. counting
class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made while it is on and still alive, after each operation.

    peaks: section -> [bytes after each operation], in order; `section` names the current one. The
    tensors in `known` were there before and don't count. Works on any device; on meta, a question
    about values is answered with 0 (so "is all of the mask True?" with no: there is padding).
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live, self.section, self.sections = 0, "forward", defaultdict(list)
        self._kept = [t.untyped_storage() for t in known]
        self._sizes = {storage._cdata: 0 for storage in self._kept}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it made."""
        if op is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 0
        out = op(*args, **(kwargs or {}))
        for made in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(made, Tensor):
                self._add(made.untyped_storage())
        self.sections[self.section].append(self.live)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:  # else a view, or made in place
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Attention that never holds the [T, T] scores of each head, as on GPUs and on the CPU.

    The meta device has no such kernel of its own accord. A boolean mask becomes one of q's type.
    """
    mask, causal = options.get("attn_mask"), options.get("is_causal", False)
    mask = None if mask is None else torch.empty_like(mask, dtype=q.dtype)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(q, k, v, 0.0, causal, attn_mask=mask)[0]


class _Head(torch.autograd.Function):
    """token_stats as far as memory goes, without its chunks, which are added where they are."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, count: LiveBytes
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.count, count.section = count, "head forward"
        return x.new_empty(4, len(x), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ctx.count.section = "head backward"
        grad_x, grad_w = torch.zeros_like(x), None
        if ctx.needs_input_grad[1]:
            grad_w = torch.zeros_like(weight, dtype=torch.float32)
            ctx.count.section = "head product"
            torch.empty_like(grad_w)  # a chunk's share, before it is added
            grad_w = grad_w.to(weight.dtype)
        ctx.count.section = "backward"
        return grad_x, grad_w, None, None


@dataclasses.dataclass(frozen=True)
class Line:
    """Bytes as a function of the number of rows: the largest of some straight lines."""

    lines: tuple[tuple[float, float], ...] = ((0.0, 0.0),)

    def __call__(self, rows: int) -> float:
        """Bytes for this many rows."""
        return max(fixed + slope * rows for fixed, slope in self.lines)


def by_rows(rehearse: Callable[[int], LiveBytes]) -> dict[str, Line]:
    """Section -> its peak for any number of rows, from rehearsals with 2 and 3.

    Both do the same operations, and each tensor's size is linear in the rows. (1 would be special:
    a tensor with a dimension of 1 is contiguous where others are not, and isn't copied.)
    """
    two, three = rehearse(2).sections, rehearse(3).sections
    found = {}
    for section in two:
        pairs = {(3 * a - 2 * b, b - a) for a, b in zip(two[section], three[section], strict=True)}
        found[section] = Line(tuple(pairs))
    return found


# ------------------------------------------------------------------------------------ 2. rehearsals
@contextmanager
def counting(model: torch.nn.Module) -> Iterator[LiveBytes]:
    """A counter that leaves out the model and its gradients, with fused attention."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    swapped = mock.patch("torch.nn.functional.scaled_dot_product_attention", fused_attention)
    with swapped, LiveBytes([*model.parameters(), *model.buffers(), *gradients]) as count:
        yield count


@functools.lru_cache(maxsize=8)
def build(config: str, dtype: str, lora_rank: int, recompute: bool) -> torch.nn.Module:
    """The model of a config (JSON) on the meta device, set up as examples/text_env.py does it."""
    options = json.loads(config)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**options), dtype=getattr(torch, dtype)
        )
        if lora_rank:
            text_env.add_lora(network, lora_rank, seed=0)
    if recompute:
        text_env.recompute_layers(network)
    return network.eval()


def blank(rows: int, prompt: int, response: int) -> siren.Rollout:
    """A rollout of these shapes on the meta device."""
    with torch.device("meta"):
        ids, masks = (
            [torch.zeros(rows, n, dtype=dtype) for n in (prompt, response)]
            for dtype in (torch.long, torch.bool)
        )
        return siren.Rollout(ids[0], masks[0], ids[1], masks[1], torch.zeros(rows, response))


def run_head(model: torch.nn.Module, rollout: siren.Rollout, count: LiveBytes) -> Tensor:
    """siren.forward and the stand-in for token_stats."""
    made = siren.forward(model, rollout)
    x = made["x"].reshape(-1, made["x"].shape[-1])  # a copy, as it leaves the prompt out
    return _Head.apply(x, made["weight"], made["bias"], count)


@functools.lru_cache(maxsize=32)
def rehearse_update(
    model: torch.nn.Module, prompt: int, response: int, accumulate: bool
) -> dict[str, Line]:
    """A micro-batch's forward and backward pass: forward, head forward, kept, head backward,
    backward. Without `accumulate` the gradients are among what it makes."""

    def rehearse(rows: int) -> LiveBytes:
        rollout = blank(rows, prompt, response)
        for p in model.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad and accumulate else None
        with counting(model) as count:
            stats = run_head(model, rollout, count)
            count.section = "kept"
            total = stats.sum()
            count.section = "backward"
            total.backward()
        for p in model.parameters():
            p.grad = None
        return count

    return by_rows(rehearse)


@functools.lru_cache(maxsize=32)
@torch.no_grad()
def rehearse_score(model: torch.nn.Module, prompt: int, response: int) -> dict[str, Line]:
    """A pass without gradient: forward, head forward."""

    def rehearse(rows: int) -> LiveBytes:
        rollout = blank(rows, prompt, response)
        with counting(model) as count:
            run_head(model, rollout, count)
        return count

    return by_rows(rehearse)


@functools.lru_cache(maxsize=32)
@torch.no_grad()
def rehearse_prefill(model: torch.nn.Module, prompt: int) -> dict[str, Line]:
    """siren.sample's first pass, with the prompts as rows: forward."""

    def rehearse(rows: int) -> LiveBytes:
        with counting(model) as count:
            cache = DynamicCache(config=model.config)
            run_model(model, cache, blank(rows, prompt, 1).prompt, prompt)
        return count

    return by_rows(rehearse)


@functools.lru_cache(maxsize=32)
@torch.no_grad()
def rehearse_decode(model: torch.nn.Module, length: int, top_p: float) -> dict[str, Line]:
    """siren.sample's last step, with all rows alive and this many tokens each: cache, forward,
    logits."""

    def rehearse(rows: int) -> LiveBytes:
        with counting(model) as count:
            cache = DynamicCache(config=model.config)
            run_model(model, cache, blank(rows, max(1, length - 2), 1).prompt, length - 2)
            token = blank(rows, 1, 1).prompt
            for step in range(2):  # in the second, the first's logits are still there
                count.sections.clear() if step else None
                count.section = "forward"
                logits = run_model(model, cache, token, length - 1 + step)[:, -1].float() / 1.0
                count.section = "logits"
                if top_p < 1:
                    logits = logits.masked_fill(~siren.nucleus_mask(logits, top_p), -math.inf)
                log_pi = logits.log_softmax(-1)
                log_pi.isnan().any()
                probs = log_pi.exp()
                torch.empty(MULTINOMIAL, *probs.shape, device="meta")
                token = torch.multinomial(probs, 1)
                del probs
            held = [t for layer in cache.layers for t in (layer.keys, layer.values)]
            count.sections["cache"] = [bytes_of(held)]
        return count

    return by_rows(rehearse)


def run_model(model: torch.nn.Module, cache: DynamicCache, ids: Tensor, length: int) -> Tensor:
    """Logits of the last position, as siren.sample asks for them; length: of the attention mask."""
    mask = torch.zeros(len(ids), length, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": torch.zeros_like(ids)}
    return model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits


@functools.lru_cache(maxsize=8)
def rehearse_optimizer(model: torch.nn.Module, name: str, foreach: bool) -> tuple[int, int]:
    """Bytes of the optimiser's state, and what a step needs on top of it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    make = {"adamw": torch.optim.AdamW, "adafactor": torch.optim.Adafactor}[name]
    optimizer = make(trained, lr=1e-3, foreach=foreach)
    for p in trained:
        p.grad = torch.empty_like(p)
    with counting(model) as count:
        optimizer.step()
        state = count.live
        count.sections.clear()
        optimizer.step()
    for p in trained:
        p.grad = None
    return state, max(count.sections["forward"]) - state


# ------------------------------------------------------------------------------------- 3. the plan
@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes. What each phase holds on top of `static`; it is never all there at one time."""

    parameters: int  # not bytes: their number, adapters included
    trained: int  # likewise
    weights: int
    adapters: int
    gradients: int
    optimizer: int
    # sampling
    kv_cache: float
    prefill: float
    decode: float
    logits: float
    # scoring
    score: float
    # an update
    kept: float  # by the forward pass for the backward pass
    head: float  # at its peak, on top of kept
    layers: float  # the backward pass of the layers at its peak, on top of kept
    step: float  # of the optimiser; by then nothing else is kept
    prepass: float  # scoring a mini-batch of several micro-batches before them

    @property
    def static(self) -> int:
        """What is there all the time. Gradients too: siren.update frees them as it begins."""
        return self.weights + self.adapters + self.gradients + self.optimizer

    @property
    def sampling(self) -> float:
        """The peak of siren.sample."""
        return self.static + max(self.prefill, self.kv_cache + max(self.decode, self.logits))

    @property
    def scoring(self) -> float:
        """The peak of siren.score."""
        return self.static + self.score

    @property
    def update(self) -> float:
        """The peak of siren.update."""
        return self.static + max(self.kept + max(self.head, self.layers), self.step, self.prepass)

    @property
    def total(self) -> float:
        """The largest of the three."""
        return max(getattr(self, name) for name in PHASES)

    @property
    def needed_gb(self) -> float:
        """GB of a card on which it fits."""
        return RESERVE[0] + (1 + RESERVE[1]) * self.total / 1e9


def read_config(model: str, task: str = "toy_env") -> str:
    """The config of cfg.model as JSON; of cfg.task's model if it is empty.

    A folder, a known name (with or without its owner; see examples/configs), else a hub id.
    ValueError if there is no such model or its head is more than a matrix.
    """
    if not model:
        return json.dumps(siren.load_task(task).build_model().config.to_dict())
    known = CONFIGS / f"{model.split('/')[-1].lower().removesuffix('-instruct')}.json"
    if known.exists() and not Path(model).expanduser().exists():
        return known.read_text()
    config = text_env.open_model(AutoConfig, model).get_text_config()
    more = [name for name in text_env.HEAD_FIELDS if getattr(config, name, None) not in (None, 1)]
    if more:
        reason = f"has {more[0]}, so its logits are more than hidden states times a matrix"
        raise ValueError(f"{model}: {reason}; take another, such as Llama or Qwen")
    return json.dumps(config.to_dict(), default=str)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each counted once (tied weights are one)."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@dataclasses.dataclass(frozen=True)
class Run:
    """What the arithmetic needs of a run: its flags, its model on meta, and tokens at most."""

    cfg: siren.Config
    device: str  # cpu, or anything else for a GPU
    model: torch.nn.Module
    prompt: int
    response: int

    @property
    def mini(self) -> int:
        """Responses of the largest mini-batch."""
        return math.ceil(self.cfg.prompts / self.cfg.mini_batches) * self.cfg.group_size

    @property
    def micro(self) -> int:
        """Responses of a micro-batch."""
        return min(self.cfg.micro_batch_size, self.mini)

    @property
    def trained(self) -> list[Tensor]:
        """The parameters that have a gradient."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def sampled(self, prompts: int, samples: int) -> tuple[int, int]:
        """Responses and prompts that siren.sample has at once; it never splits a prompt's."""
        at_once = min(prompts, max(1, self.cfg.sample_batch // samples))
        return at_once * samples, at_once

    @property
    def rollouts(self) -> tuple[tuple[int, int], ...]:
        """`sampled` of training and of evaluation."""
        cfg = self.cfg
        return (
            self.sampled(cfg.prompts, cfg.group_size),
            self.sampled(cfg.eval_prompts, cfg.eval_samples),
        )

    def head(self, section: str, lines: dict[str, Line], rows: int) -> float:
        """The peak of a section of the head, with its chunk."""
        if f"head {section}" not in lines:
            return 0.0  # a frozen head has no gradient
        vocab, tokens = len(self.model.get_output_embeddings().weight), rows * self.response
        entries = 1 << (21 if self.device == "cpu" else 26)  # siren.token_stats's rule
        n = min(tokens, self.cfg.chunk or max(1, entries // vocab))
        units = CHUNK[section] + PREVIOUS.get(section, 0.0) * (tokens > n)
        if section == "forward":
            sums = CHUNK["sums"] + CHUNK["buckets"] * min(2048, vocab) / vocab
            units = max(units, sums + PREVIOUS["forward"] * (tokens > n))
        return lines[f"head {section}"](rows) + units * n * vocab * 4


def prepare(cfg: siren.Config, device: str) -> Run:
    """ValueError: unknown model, or a response longer than its context."""
    config = read_config(cfg.model, cfg.task)
    model = build(config, cfg.dtype, cfg.lora_rank, cfg.recompute)
    context = getattr(model.config, "max_position_embeddings", None) or 2**31
    if cfg.max_tokens >= context:
        raise ValueError(f"--max-tokens {cfg.max_tokens}: must be under the context of {context}")
    prompt = min(cfg.max_prompt, context - cfg.max_tokens)
    return Run(cfg, device, model, prompt, cfg.max_tokens)


def measure_sampling(run: Run) -> dict[str, float]:
    """The fields of Plan for siren.sample, the larger of training's and evaluation's."""
    (rows, prompts), (tested, questions) = run.rollouts
    length = run.prompt + run.response
    decode = rehearse_decode(run.model, length, 1.0)
    evaluate = rehearse_decode(run.model, length, run.cfg.eval_top_p)
    cache, most = decode["cache"], max(rows, tested)
    logits = [part["logits"](n) - cache(n) for part, n in ((decode, rows), (evaluate, tested))]
    prefill = rehearse_prefill(run.model, run.prompt)["forward"](max(prompts, questions))
    layers = decode["forward"](most) - cache(most)
    return {"kv_cache": cache(most), "prefill": prefill, "decode": layers, "logits": max(logits)}


def measure_training(run: Run) -> dict[str, float]:
    """The fields of Plan for siren.score and siren.update."""
    cfg, several = run.cfg, run.mini > run.micro
    score = rehearse_score(run.model, run.prompt, run.response)
    update = rehearse_update(run.model, run.prompt, run.response, several)

    def scoring(rows: int) -> float:
        rows = min(rows, cfg.micro_batch_size)
        return max(score["forward"](rows), run.head("forward", score, rows))

    kept = update["kept"](run.micro)
    # the only micro-batch begins without gradients: they are in the rehearsal, not in `static`
    already = 0 if several else bytes_of(run.trained)
    heads = [run.head(name, update, run.micro) for name in ("forward", "backward", "product")]
    return {
        "score": scoring(cfg.prompts * cfg.group_size),
        "prepass": scoring(run.mini) if several and cfg.regularizer == "anchor" else 0.0,
        "kept": kept,
        "head": max(heads) - kept - already,
        "layers": update["backward"](run.micro) - kept - already,
    }


def measure(cfg: siren.Config, device: str = "cuda") -> Plan:
    """The plan of a run on this kind of device, in numbers. ValueError: unknown model, too long."""
    run = prepare(cfg, device)
    adapters = bytes_of(run.trained) if cfg.lora_rank else 0
    foreach = cfg.optimizer == "adamw" and device != "cpu"  # PyTorch's defaults
    state, step = rehearse_optimizer(run.model, cfg.optimizer, foreach)
    return Plan(
        parameters=sum(p.numel() for p in run.model.parameters()),
        trained=sum(p.numel() for p in run.trained),
        weights=bytes_of([*run.model.parameters(), *run.model.buffers()]) - adapters,
        adapters=adapters,
        gradients=bytes_of(run.trained),
        optimizer=state,
        step=step,
        **measure_sampling(run),
        **measure_training(run),
    )


# ------------------------------------------------------------------------------- 4. what to change
def fits(cfg: siren.Config, plan: Plan) -> bool:
    """On a card of cfg.gpu_gb?"""
    return plan.needed_gb <= cfg.gpu_gb


def advise(cfg: siren.Config) -> tuple[dict[str, Any], Plan]:
    """The mildest change of flags that makes it fit, and the plan with it; or the last resort's.

    First smaller batches, which cost speed alone; then recomputation; then an optimiser with less
    state; then adapters on a bfloat16 base; then shorter responses. ValueError as of measure.
    """
    options: dict[str, Any] = {}
    ladder: list[dict[str, Any]] = [{}]
    if not cfg.recompute:
        ladder.append({"recompute": True})
    if not cfg.lora_rank:
        if cfg.optimizer != "adafactor":
            ladder.append({"optimizer": "adafactor"})
        small = {"optimizer": cfg.optimizer, "lora_rank": 64, "dtype": "bfloat16"}
        ladder.append({**small, "lr": max(cfg.lr, 1e-5)})
    elif cfg.dtype != "bfloat16":
        ladder.append({"dtype": "bfloat16"})
    shorter = cfg.max_tokens
    while shorter > 64:
        shorter //= 2
        ladder.append({"max_tokens": shorter})
    for change in ladder:
        options |= change
        trial = dataclasses.replace(cfg, **options)
        batches = smaller_batches(trial)
        plan = measure(dataclasses.replace(trial, **batches))
        if fits(cfg, plan):
            break
    changed = {k: v for k, v in (options | batches).items() if v != getattr(cfg, k)}
    return changed, plan


def smaller_batches(cfg: siren.Config) -> dict[str, int]:
    """sample_batch and micro_batch_size, each halved until its phase fits."""
    batches = cfg.pick("sample_batch micro_batch_size")
    room = (cfg.gpu_gb - RESERVE[0]) / (1 + RESERVE[1]) * 1e9
    for name, over in (
        ("sample_batch", lambda plan: plan.sampling > room),
        ("micro_batch_size", lambda plan: max(plan.scoring, plan.update) > room),
    ):
        while over(measure(dataclasses.replace(cfg, **batches))) and batches[name] > 1:
            batches[name] = 1 << (batches[name] - 1).bit_length() - 1  # the next lower power of 2
    return batches


def flags(changes: dict[str, Any]) -> str:
    """As on the command line.

    >>> flags({"recompute": True, "sample_batch": 8})
    '--recompute --sample-batch 8'
    """
    names = {name: "--" + name.replace("_", "-") for name in changes}
    return " ".join(
        names[k] if v is True else f"--no-{names[k][2:]}" if v is False else f"{names[k]} {v}"
        for k, v in changes.items()
    )


# ------------------------------------------------------------------------------------- 5. the text
def alternatives(run: Run) -> list[dict[str, Any]]:
    """The single changes that a plan shows beside the flags given."""
    cfg, rows = run.cfg, max(run.rollouts)[0]
    found: list[dict[str, Any]] = [{"recompute": not cfg.recompute}]
    found += [{"micro_batch_size": run.micro // 2}] if run.micro > 1 else []
    found += [{"sample_batch": rows // 2}]
    if cfg.lora_rank:
        return [*found, {"lora_rank": max(1, cfg.lora_rank // 4)}]
    other = "adafactor" if cfg.optimizer == "adamw" else "adamw"
    return [*found, {"optimizer": other}, {"dtype": "bfloat16", "lora_rank": 64}]


def phases(plan: Plan) -> str:
    """Columns: the three peaks and the largest."""
    sizes = [getattr(plan, name) for name in PHASES]
    return "".join(f"{size / 1e9:>10.2f}" for size in (*sizes, plan.total))


def parts(run: Run, found: Plan) -> list[tuple[str, float]]:
    """What the plan is made of: text and bytes."""
    cfg, how = run.cfg, ("without", "with")[run.cfg.recompute]
    rows, scored = max(run.rollouts)[0], min(cfg.micro_batch_size, cfg.prompts * cfg.group_size)
    return [
        (f"weights, {cfg.dtype}", found.weights),
        (f"LoRA adapters of rank {cfg.lora_rank}, float32", found.adapters),
        ("gradients", found.gradients),
        (f"optimiser state, {cfg.optimizer}", found.optimizer),
        (f"sampling: KV cache of {rows} responses", found.kv_cache),
        ("*         a layer at work", found.decode),
        ("*         logits of a step, float32", found.logits),
        ("*         the prompts' pass, without the above", found.prefill),
        (f"scoring:  {scored} responses at once", found.score),
        (f"update:   activations of {run.micro} responses, {how} --recompute", found.kept),
        ("*         a chunk of the head, and the head's gradient", found.head),
        ("*         a layer's backward pass", found.layers),
        ("*         the optimiser's step, without activations", found.step),
    ]


def verdict(cfg: siren.Config, found: Plan) -> str:
    """One sentence: it fits, or the flags that make it fit."""
    need = f"{found.needed_gb:.1f} GB ({RESERVE[0]:g} GB and {RESERVE[1]:.0%} of it for CUDA)"
    if fits(cfg, found):
        return f"Fits {cfg.gpu_gb:g} GB: it needs {need}."
    changes, better = advise(cfg)
    what, fault = flags(changes), f"Does not fit {cfg.gpu_gb:g} GB, as it needs {need}"
    if fits(cfg, better):
        return f"{fault}: use {what}, which needs {better.needed_gb:.1f} GB."
    way_out = "take a larger card or a smaller model"
    return f"{fault}; even {what} needs {better.needed_gb:.1f} GB: {way_out}."


def plan(cfg: siren.Config) -> str:
    """The memory plan of a run on a card of cfg.gpu_gb, as text. ValueError: see prepare."""
    if cfg.model:
        text_env.check_precision(cfg.dtype, cfg.lora_rank, cfg.lr)
    run, found = prepare(cfg, "cuda"), measure(cfg)
    base = found.parameters - (found.trained if cfg.lora_rank else 0)
    trained = f"{found.trained:,} of adapters trained" if cfg.lora_rank else "all trained"
    lengths = f"prompts of {run.prompt} and responses of {run.response} tokens"
    lines = [
        f"{cfg.model or cfg.task}: {base:,} parameters, {trained}",
        f"{lengths}, none shorter; GB = 10^9 bytes; * never together",
        "",
        *(f"{text:<62}{size / 1e9:>8.2f}" for text, size in parts(run, found) if size > 0),
        "",
        f"{'peaks':<30}" + "".join(f"{name:>10}" for name in (*PHASES, "largest")),
        f"{'as it is':<30}{phases(found)}",
    ]
    for change in alternatives(run):
        lines.append(f"{flags(change):<30}{phases(measure(dataclasses.replace(cfg, **change)))}")
    on_cpu = measure(cfg, "cpu").total / 1e9
    return "\n".join([*lines, "", verdict(cfg, found), f"On a CPU it peaks at {on_cpu:.2f} GB."])


def main(argv: list[str] | None = None) -> int:
    """The command. Exit code 0: a plan was printed, 2: bad input."""
    try:
        given = vars(siren.make_parser().parse_args(argv))
        print(
            plan(
                siren.Config(**{k: v for k, v in given.items() if k not in ("resume", "overwrite")})
            )
        )
        return 0
    except (ValueError, ImportError) as error:
        print(f"memory_plan.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
