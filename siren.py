"""SIREN in one file: selective entropy regularisation for RL with verifiable rewards.

Jiang et al., "Rethinking Entropy Regularization in Large Reasoning Models", arXiv 2509.25133

    L = L_DrGRPO + beta * (H_agg - H*)^2     the self-anchored regulariser
    H'_t    entropy of pi renormalised on the policy nucleus V_p (top-p mask, over actions)
    H_i     mean of H'_t over a response's peaks, H'_t >= the response's tau-quantile (peak-entropy
            mask, over states)
    H_agg   mean of H_i over the responses; H* is H_agg of the first batch, before any update

    python siren.py                      # SIREN on the toy task, about two minutes on a CPU
    python siren.py --regularizer none   # Dr.GRPO alone: the entropy collapses
    python siren.py --regularizer bonus --top-p 1 --peak-quantile 0    # naive bonus: it explodes
    python siren.py --resume --out DIR   # go on after Ctrl-C, kill -9 or a power cut
    python siren.py --help               # every number, its meaning and its range

Departures from the paper (P) and from the official code (C) that change numbers; README.md has all
of them, and the reasons:
  - C leaves the token that crosses p out of the nucleus, which may be empty; here, as in P, it
    is inside.
  - A peak is H' >= q (C: H' > q), and here also H' > 0: once q = 0, ">= q" selects every token.
  - C squares H_agg - H* per micro-batch; here it is squared once per optimiser mini-batch.
  - C counts responses without tokens and anchors on one micro-batch; here they are left out, and H*
    comes from the whole first rollout.
  - C cuts the support of H' at the 10000 likeliest tokens; here it is the whole nucleus.
No KL term, no reference model, no critic: the paper's Dr.GRPO has none of them.

B responses, T response positions, V vocabulary, N tokens, D hidden size. Entropies are in nats.
Reading order = data order; the paper is in sections 4-8, so a first reading may skip 1-3.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from tqdm import tqdm


# ---------------------------------------------------------------------------------------- 1. config
class ConfigError(ValueError):
    """Bad input: the message has the value, the constraint and the fix; exit code 2."""


def knob(default: Any, valid: str, doc: str) -> Any:
    """A field of Config: default, valid values (an interval "(0, 1]" or "a|b|c"), documentation."""
    return dataclasses.field(default=default, metadata={"valid": valid, "doc": doc})


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of a run. The fields make `--help`, and their ranges are checked here."""

    # rollout
    task: str = knob("toy_env", "", "module:key=value,...; its load(key=value) gives the task")
    seed: int = knob(0, "[0, inf)", "every random draw is a function of (seed, step)")
    steps: int = knob(200, "[0, inf)", "rollouts in the run, each sampled, scored and trained on")
    prompts: int = knob(32, "[1, inf)", "prompts per rollout (paper: 128)")
    group_size: int = knob(8, "[2, inf)", "responses per prompt, compared with each other")
    max_tokens: int = knob(16, "[1, inf)", "response budget; a larger one needs a smaller beta")
    temperature: float = knob(1.0, "(0, inf)", "training samples and scores the same distribution")
    sample_batch: int = knob(1024, "[1, inf)", "responses sampled at once")
    # SIREN
    regularizer: str = knob("anchor", "anchor|bonus|none", "beta (H_agg - H*)^2, -beta H_agg, or 0")
    beta: float = knob(0.2, "[0, inf)", "weight of the regulariser (paper: 0.005)")
    top_p: float = knob(0.8, "(0, 1]", "p of the policy nucleus; 1 = no top-p mask")
    peak_quantile: float = knob(0.8, "[0, 1]", "tau of the peak-entropy mask; 0 = no peak mask")
    anchor: float | None = knob(None, "[0, inf)", "H* in nats; None = that of the first rollout")
    inclusive: bool = knob(True, "", "the token that crosses p is in the nucleus (official: no)")
    strict: bool = knob(False, "", "a peak is H' > q, not H' >= q (official: yes)")
    penalty_per_micro_batch: bool = knob(False, "", "square per micro-batch (official: yes)")
    # policy gradient
    mini_batches: int = knob(4, "[1, inf)", "optimiser steps per pass over a rollout (paper: 16)")
    micro_batch_size: int = knob(64, "[1, inf)", "responses scored or trained on at once")
    epochs: int = knob(1, "[1, inf)", "passes over each rollout")
    lr: float = knob(3e-4, "(0, inf)", "AdamW's learning rate (paper: 1e-6, for a 7B model)")
    warmup_steps: int = knob(5, "[0, inf)", "rollouts over which lr rises; Adam starts wild")
    weight_decay: float = knob(0.0, "[0, inf)", "AdamW's (paper: 0.1)")
    grad_clip: float = knob(1.0, "(0, inf)", "largest global gradient norm")
    clip_low: float = knob(0.2, "[0, 1]", "PPO clip: the ratio is at least 1 - this")
    clip_high: float = knob(0.2, "[0, inf)", "PPO clip: the ratio is at most 1 + this")
    dual_clip: float | None = knob(None, "(1, inf)", "c: loss <= c|A| if A < 0 (official: 3)")
    aggregation: str = knob("constant", "constant|sequence|token", "Dr.GRPO, GRPO, DAPO")
    scale_by_std: bool = knob(False, "", "divide advantages by the group's std (GRPO's way)")
    # language model
    model: str = knob("", "", "folder or hub id of a causal language model, instead of --task")
    data: str = knob("", "", "questions to train on: FILE.jsonl with question and answer fields")
    eval_data: str = knob("", "", "held-out questions, likewise")
    prompt: str = knob("", "", "what to ask, with {question} in it; empty = the paper's prompt")
    max_prompt: int = knob(1024, "[1, inf)", "tokens; longer prompts are dropped and counted aloud")
    answer_form: str = knob("boxed", "boxed|last-number", "last-number: counts if nothing is boxed")
    verifier: str = knob("exact", "exact|math", "math = the library math-verify")
    dtype: str = knob("float32", "float32|bfloat16", "of the weights; LoRA adapters are float32")
    lora_rank: int = knob(0, "[0, inf)", "rank of LoRA adapters (pip install peft); 0 = train all")
    optimizer: str = knob("adamw", "adamw|adafactor", "adafactor keeps no second moment per weight")
    recompute: bool = knob(False, "", "activation checkpointing: memory for time")
    dry_run: bool = knob(False, "", "print a plan of the memory and stop")
    gpu_gb: float = knob(80.0, "(0, inf)", "the card that the plan is for, GB (10^9 bytes)")
    # evaluation
    eval_every: int = knob(0, "[0, inf)", "steps; 0 = before and after training only")
    eval_prompts: int = knob(128, "[1, inf)", "held-out prompts per set")
    eval_samples: int = knob(16, "[1, inf)", "k of avg@k, maj@k, pass@k and distinct@k")
    eval_temperature: float = knob(0.6, "(0, inf)", "the paper's")
    eval_top_p: float = knob(1.0, "(0, 1]", "truncates evaluation samples only (official: 0.7)")
    eval_split: str = knob("test", "test|validation", "tune on validation, report on test")
    # run
    out: str = knob("", "", "run folder; empty = runs/<regularizer>-seed<seed>")
    save_every: int = knob(10, "[1, inf)", "steps between checkpoints")
    device: str = knob("cpu", "", "cpu, cuda, ...")
    threads: int = knob(1, "[0, 1024]", "CPU threads; one is fastest for small models; 0 = all")
    chunk: int = knob(0, "[0, inf)", "tokens per slice of the [N, V] logits; 0 = by memory")

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in dataclasses.fields(self):
            value, valid = getattr(self, f.name), f.metadata["valid"]
            if value is None and f.default is None:
                continue
            kind = (get_args(hints[f.name]) or (hints[f.name],))[0]
            right_type = isinstance(value, (int, float) if kind is float else kind)
            if not right_type or (valid and not _within(value, valid)):
                rule = f"{kind.__name__} in {valid}" if valid else kind.__name__
                flag = "--" + f.name.replace("_", "-")
                raise ConfigError(f"{flag} {value}: must be {rule}; the default is {f.default}")
        if self.mini_batches > self.prompts:
            rule = f"at most --prompts {self.prompts}, as a prompt's responses stay together"
            raise ConfigError(f"--mini-batches {self.mini_batches}: must be {rule}; lower it")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"--device {self.device}: {reason}; use --device cpu") from error

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        return Path(self.out or f"runs/{self.regularizer}-seed{self.seed}")

    def pick(self, names: str) -> dict[str, Any]:
        """Some fields, as keyword arguments."""
        return {name: getattr(self, name) for name in names.split()}


def _within(value: Any, valid: str) -> bool:
    """Is value in an interval such as "(0, 1]", or one of "a|b|c"? NaN is in no interval."""
    if valid[0] not in "([":
        return value in valid.split("|")
    low, high = (float(end) for end in valid[1:-1].split(","))
    above = value > low if valid[0] == "(" else value >= low
    return above and (value < high if valid[-1] == ")" else value <= high)


# --------------------------------------------------------------------------------------- 2. sampler
@dataclasses.dataclass(frozen=True)
class Rollout:
    """B sampled responses. Masks come from positions, never from token ids (pad may equal EOS).
    Tensor is short for torch.Tensor, see section 4.

    prompt [B, P] ids, padded on the left, and prompt_mask; tokens [B, T] ids, padded on the right,
    and mask, True up to and including EOS (which is trained); logp [B, T] as sampled.
    """

    prompt: Tensor
    prompt_mask: Tensor
    tokens: Tensor
    mask: Tensor
    logp: Tensor

    def rows(self, index: Tensor) -> Rollout:
        """The responses at index [b]."""
        return Rollout(*(getattr(self, f.name)[index] for f in dataclasses.fields(self)))

    def responses(self) -> list[list[int]]:
        """Token ids of each response, without padding."""
        return [ids[mask].tolist() for ids, mask in zip(self.tokens.cpu(), self.mask.cpu())]


@torch.no_grad()
def sample(
    model: torch.nn.Module,
    prompts: list[list[int]],
    *,
    max_tokens: int,
    eos_ids: list[int],
    pad_id: int,
    samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch: int = 1024,
    generator: torch.Generator | None = None,
) -> Rollout:
    """Sample responses; row i * samples + j is sample j of prompt i (a list of token ids).

    About `batch` rows at a time. A prompt's samples share one prefill of the KV cache; a row that
    has ended leaves the batch. top_p < 1 truncates: for evaluation only, as training must score
    what it sampled. FloatingPointError: logits are not finite; ConfigError: the context is short.
    """
    from transformers import DynamicCache  # here, since the rest of the file needs only torch

    device = next(model.parameters()).device
    width, size = max(map(len, prompts)), len(prompts) * samples
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    if width + max_tokens > context:
        longest = f"the longest prompt ({width} tokens) and the response must fit {context} tokens"
        raise ConfigError(f"--max-tokens {max_tokens}: {longest}; lower it or drop long prompts")
    prompt = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    prompt_mask = torch.arange(width, device=device) >= width - lengths[:, None]
    tokens = torch.full((size, max_tokens), pad_id, device=device)
    mask = torch.zeros(size, max_tokens, dtype=torch.bool, device=device)
    logp = torch.zeros(size, max_tokens, device=device)
    eos = torch.tensor(eos_ids, device=device)
    for some in torch.arange(len(prompts), device=device).split(max(1, batch // samples)):
        cache, attention = DynamicCache(config=model.config), prompt_mask[some].long()
        # position ids count real tokens only, or left padding would shift them
        inputs = {"input_ids": prompt[some], "position_ids": (attention.cumsum(1) - 1).clamp(min=0)}
        for t in range(max_tokens):
            inputs |= {"attention_mask": attention, "past_key_values": cache, "use_cache": True}
            logits = model(**inputs, logits_to_keep=1).logits[:, -1].float() / temperature
            if t == 0:  # after the prefill, a row a response; `alive` have not ended
                cache.batch_repeat_interleave(samples)
                logits, attention = (x.repeat_interleave(samples, 0) for x in (logits, attention))
                alive = (some[:, None] * samples + torch.arange(samples, device=device)).view(-1)
            if top_p < 1:
                logits = logits.masked_fill(~nucleus_mask(logits, top_p), float("-inf"))
            log_pi = logits.log_softmax(-1)  # [alive, V]
            if log_pi.isnan().any():
                raise FloatingPointError("the model's logits are not finite")
            token = torch.multinomial(log_pi.exp(), 1, generator=generator)  # [alive, 1]
            tokens[alive, t], mask[alive, t] = token[:, 0], True
            logp[alive, t] = log_pi.gather(1, token)[:, 0]
            going = (~torch.isin(token[:, 0], eos)).nonzero()[:, 0]
            if len(going) == 0:
                break
            if len(going) < len(alive):
                cache.batch_select_indices(going)
                alive, attention, token = alive[going], attention[going], token[going]
            attention = torch.cat([attention, attention.new_ones(len(alive), 1)], 1)
            inputs = {"input_ids": token, "position_ids": attention.sum(1, keepdim=True) - 1}
    used = int(mask.any(0).sum())
    prompt, prompt_mask = (x.repeat_interleave(samples, 0) for x in (prompt, prompt_mask))
    return Rollout(prompt, prompt_mask, tokens[:, :used], mask[:, :used], logp[:, :used])


# -------------------------------------------------------------------------------------- 3. verifier

MAX_RESPONSE, MAX_ANSWER = 1_000_000, 200  # characters; a longer answer is compared as it stands
_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_FRACTION = re.compile(
    r"\\frac\s*(?:\{\s*(-?[0-9]+)\s*\}|([0-9]))\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))"
)
_NUMBER = re.compile(r"([+-]?)((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.[0-9]*)?)(?:/([0-9]+))?(%?)")
# a unit: a known short one or any longer word that is no part of a formula or of a number
_WORD = r"(?:[cmk]?m|k?g|mg|s|h|hr|ft|in|yd|mi|oz|lb|[mc]?[lL]|[JKNWV]|Hz|[a-zA-Zµ]{3,})"
_NO_UNIT = r"(?!(?:log|sin|cos|tan|exp|sqrt|mod|and|hundred|thousand|million|billion|dozen)\b)"
_UNIT = re.compile(rf"(?<=[0-9.%])\s+{_NO_UNIT}{_WORD}(?:[ /]{_WORD})*(?:\s*\^\{{?[0-9]\}}?)?$")
_SPACE = re.compile(r"(?<![0-9])\s+|\s+(?![0-9])")  # not between digits: "5 6" is not 56
AnswerForm = Callable[[str], "str | None"] | None  # how a task finds an answer without a box


def extract_answer(response: str, answer_form: AnswerForm = None) -> str | None:
    r"""The last \boxed{...} with balanced braces; without one, what answer_form finds; or None.

    >>> extract_answer(r"so \boxed{3}, no: \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    text = response[-MAX_RESPONSE:]
    opened: list[int] = []  # where the content of each open brace starts; -1 if it is no box
    start, end = -1, -1
    for found in _BRACES.finditer(text):  # one pass: linear time whatever the text
        if found[0] == "{" or len(found[0]) > 2:
            opened.append(-1 if found[0] == "{" else found.end())
        elif found[0] == "}" and opened and (begin := opened.pop()) > start:
            start, end = begin, found.start()
    if start >= 0:
        return text[start:end]
    return answer_form(text) if answer_form else None


def normalize(answer: str) -> Fraction | str:
    r"""An exact number where the text is one, else the text without what does not count.

    >>> normalize(r"$-1{,}234.50\text{ cm}$"), normalize(r"\dfrac{1}{2}"), normalize("50%")
    (Fraction(-2469, 2), Fraction(1, 2), Fraction(1, 2))
    >>> normalize(r"\text{East} ")
    'East'
    """
    if len(answer) > MAX_ANSWER:
        return answer.strip()
    text = answer.strip().strip("$").replace("\u2212", "-").replace("\\%", "%").replace("{,}", ",")
    text = re.sub(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\\[!,;: ]|\\left|\\right|\\[()\[\]$]|\^?\\circ", "", text).strip().rstrip(".")
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = _FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]} ", text).strip()
    text, bare = _SPACE.sub("", text), _SPACE.sub("", _UNIT.sub("", text))
    number = _NUMBER.fullmatch(bare)
    if number and number[2].strip(".") and not ("." in number[2] and number[3]):
        value = Fraction(number[1] + "0" + number[2].replace(",", "").rstrip("."))
        below = int(number[3] or 1) * (100 if number[4] else 1)
        return value / below if below else text
    return text


def verify(response: str, answer: str, *, answer_form: AnswerForm = None, library=False) -> bool:
    r"""Is the response's answer right? The binary reward. Text is compared, never evaluated.

    Numbers are compared exactly. A percent sign on one side only is read both ways (50% = 50, 1/2),
    as data sets drop it. Never raises, and takes time linear in the text. library=True: math-verify
    decides (pip install math-verify), which also knows that \sqrt{8} = 2\sqrt{2}.

    >>> verify(r"... so the answer is \boxed{0.5}", r"\frac{1}{2}"), verify("0.5", "0.5")
    (True, False)
    """
    given = extract_answer(response, answer_form)
    if given is None or not given.strip():
        return False
    if library:
        import math_verify

        gold, guess = (f"\\boxed{{{text[:MAX_ANSWER]}}}" for text in (answer, given))
        try:
            return bool(math_verify.verify(math_verify.parse(gold), math_verify.parse(guess)))
        except Exception:  # a parser on hostile text: whatever it raises means "wrong"
            return False
    if ("%" in given) != ("%" in answer):
        bare = [re.sub(r"\\?%", "", text) for text in (given, answer)]
        if normalize(bare[0]) == normalize(bare[1]):
            return True
    return normalize(given) == normalize(answer)


# === begin: copy from here (needs nothing but `import torch`) ===

Tensor = torch.Tensor


# ------------------------------------------------------------------------------------ 4. advantages
def group_advantages(rewards: Tensor, group_size: int, *, scale_by_std: bool = False) -> Tensor:
    """A_i = r_i - mean of its group's r (Dr.GRPO). rewards [B], groups consecutive -> adv [B].

    scale_by_std divides by the group's standard deviation (GRPO): easy and hard prompts weigh more.
    ValueError if groups of at least 2 do not fill B.

    >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4)
    tensor([ 0.7500, -0.2500, -0.2500, -0.2500])
    """
    if group_size < 2 or len(rewards) % group_size:
        constraint = f"must be at least 2 and divide the {len(rewards)} rewards"
        raise ValueError(f"group_size {group_size}: {constraint}")
    groups = rewards.to(_wide(rewards)).view(-1, group_size)
    adv = groups - groups.mean(1, keepdim=True)
    if scale_by_std:
        adv = adv / (groups.std(1, keepdim=True) + 1e-6)
    return adv.view(-1)


# --------------------------------------------------------------------------------------- 5. entropy
def nucleus_mask(logits: Tensor, top_p: float, *, inclusive: bool = True) -> Tensor:
    """The policy nucleus V_p (top-p mask): the fewest tokens whose probabilities sum to >= p.

    logits [..., V] -> bool [..., V]. The token that crosses p is inside, so the set is never empty.
    inclusive=False, the official code's rule: cumulative probability <= p; the set may be empty.

    >>> nucleus_mask(torch.tensor([0.5, 0.25, 0.15, 0.1]).log(), 0.8)
    tensor([ True,  True,  True, False])
    """
    possible = logits > float("-inf")
    if top_p >= 1:
        return possible
    probs = logits.detach().to(_wide(logits)).softmax(-1)
    probs, order = probs.sort(dim=-1, descending=True, stable=True)
    mass = probs.cumsum(-1)
    inside = mass - probs < top_p if inclusive else mass <= top_p
    return torch.zeros_like(inside).scatter(-1, order, inside) & possible


def nucleus_entropy(logits: Tensor, top_p: float, *, inclusive: bool = True) -> Tensor:
    """H' = -sum over V_p of q log q, q = pi / pi(V_p): how open the choice among real options is.

    logits [..., V] -> nats [...]. Differentiable, though not through the choice of the set; logits
    outside it get no gradient. An empty set has H' = 0. This is the definition; token_stats does
    the same with its gradient written out (where a mass is p exactly, rounding decides in both).

    >>> nucleus_entropy(torch.tensor([0.6, 0.3, 0.06, 0.04]).log(), 0.8)
    tensor(0.6365)
    """
    inside = nucleus_mask(logits, top_p, inclusive=inclusive)
    some = inside.any(-1, keepdim=True)  # an empty set is computed as if full, then zeroed: no NaN
    log_q = logits.to(_wide(logits)).masked_fill(~inside & some, float("-inf")).log_softmax(-1)
    return -(log_q.exp() * log_q.masked_fill(~inside, 0.0)).sum(-1) * some[..., 0]


def _wide(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64: entropies in half precision are off in the first decimal."""
    return torch.promote_types(x.dtype, torch.float32)


def _nucleus_floor(log_pi: Tensor, pi: Tensor, top_p: float, inclusive: bool) -> tuple[Tensor, ...]:
    """The nucleus without sorting a vocabulary: V_p = {log pi >= floor [n, 1]} without the tokens
    at these rows and columns, which equal the floor but come later in the order.

    A histogram of log pi [n, V] finds the bucket in which the mass crosses p; only that is sorted.
    """
    n, buckets = len(pi), min(2048, pi.shape[1])
    # 32 nats in all, for beyond there is nothing; fmin sends NaN to the last bucket
    bucket = torch.fmin(log_pi * (-buckets / 32), log_pi.new_tensor(buckets - 1)).long()
    mass = pi.new_zeros(n, buckets).scatter_add_(1, bucket, pi).cumsum(1)
    edge = (mass < top_p).sum(1, keepdim=True).clamp(max=buckets - 1)
    before = mass.gather(1, (edge - 1).clamp(min=0)) * (edge > 0)
    # the tokens in the bucket at the edge, left-aligned in a table and sorted
    rows, cols = (bucket == edge).nonzero(as_tuple=True)
    count = torch.bincount(rows, minlength=n)
    place = torch.arange(len(rows), device=pi.device) - (count.cumsum(0) - count)[rows]
    table = log_pi.new_full((n, max([1, *count.tolist()])), float("-inf"))
    table[rows, place] = log_pi[rows, cols]
    table, order = table.sort(dim=-1, descending=True, stable=True)
    p = table.exp()
    inside = before + p.cumsum(-1) - p < top_p if inclusive else before + p.cumsum(-1) <= top_p
    inside &= table > -9e8  # neither the table's empty places nor forbidden tokens
    size = inside.sum(1, keepdim=True)
    # where nothing of this bucket is inside, the floor is just above it
    above = table[:, :1].nextafter(table.new_tensor(float("inf")))
    floor = torch.where(size > 0, table.gather(1, (size - 1).clamp(min=0)), above)
    tied, at = ((table == floor) & ~inside).nonzero(as_tuple=True)
    columns = torch.zeros_like(order)
    columns[rows, place] = cols
    return floor, tied, columns[tied, order[tied, at]]


class _TokenStats(torch.autograd.Function):
    """logp, H, H' and |V_p| of N tokens, chunk by chunk; nothing of size [N, V] is kept.

    The backward pass makes each chunk's z = logits / temperature again and applies
        d logp_y / dz_j = [j = y] - pi_j
        d H      / dz_j = -pi_j (log pi_j + H)
        d H'     / dz_j = -q_j (log q_j + H')   inside the nucleus, 0 outside
    All but [j = y] is -pi_j times something; g gathers that.
    """

    @staticmethod
    def policy(ctx, x, weight, bias):
        """log pi and pi of a chunk, [n, V]."""
        if weight is not None:
            x = torch.nn.functional.linear(x.to(weight.dtype), weight, bias)
        log_pi = (x.to(_wide(x)) / ctx.temperature).log_softmax(-1)
        log_pi = log_pi.clamp_(min=-1e9)  # a forbidden token has logit -inf: 0 * log 0 = 0
        return log_pi, log_pi.exp()

    @staticmethod
    def forward(ctx, x, weight, bias, tokens, where, top_p, temperature, inclusive, chunk):
        ctx.temperature, ctx.chunk, ctx.ties = temperature, chunk, []
        ctx.set_materialize_grads(False)
        wide = _wide(x if weight is None else weight)
        logp, entropy, nucleus, floor, scale, shift = x.new_zeros(6, len(x), dtype=wide)
        size = torch.zeros_like(tokens)
        with torch.autocast(x.device.type, enabled=False):  # it would round the entropies to bf16
            for rows in where.split(chunk):
                log_pi, pi = _TokenStats.policy(ctx, x[rows], weight, bias)
                logp[rows] = log_pi.gather(-1, tokens[rows, None])[:, 0]
                entropy[rows] = -torch.linalg.vecdot(pi, log_pi)
                least, ties = torch.full_like(pi[:, :1], -9e8), [[], []]  # all but forbidden tokens
                if top_p < 1:
                    least, *ties = _nucleus_floor(log_pi, pi, top_p, inclusive)
                inside = log_pi >= least
                inside[ties[0], ties[1]] = False
                pi *= inside
                mass, size[rows] = pi.sum(-1), inside.sum(-1)  # mass = pi(V_p)
                # -sum of q log q, where log q = log pi - log mass
                h = mass.log() - torch.linalg.vecdot(pi, log_pi) / mass
                choice = size[rows] > 1  # with a single option H' is 0: not nearly, exactly
                nucleus[rows] = torch.where(choice, h, 0.0)
                # for the backward pass: q = scale * pi, and log q + H' = log pi + shift
                scale[rows] = torch.where(choice, 1 / mass, 0.0)
                shift[rows] = torch.where(choice, h - mass.log(), 0.0)
                floor[rows] = least[:, 0]
                ctx.ties.append(ties)
        ctx.save_for_backward(x, weight, bias, tokens, where, entropy, floor, scale, shift)
        ctx.mark_non_differentiable(size)
        return logp, entropy, nucleus, size

    @staticmethod
    def backward(ctx, of_logp, of_entropy, of_nucleus, _):
        x, weight, bias, tokens, where, entropy, floor, scale, shift = ctx.saved_tensors
        grad_x = torch.zeros_like(x)
        grad_w = torch.zeros_like(weight, dtype=_wide(weight)) if ctx.needs_input_grad[1] else None
        grad_b = torch.zeros_like(bias, dtype=_wide(bias)) if ctx.needs_input_grad[2] else None
        with torch.autocast(x.device.type, enabled=False):
            for rows, ties in zip(where.split(ctx.chunk), ctx.ties):
                log_pi, pi = _TokenStats.policy(ctx, x[rows], weight, bias)
                g = torch.zeros_like(pi)
                if of_nucleus is not None:
                    g = (log_pi + shift[rows, None]).mul_((of_nucleus * scale)[rows, None])
                    g *= log_pi >= floor[rows, None]
                    g[ties[0], ties[1]] = 0.0
                if of_entropy is not None:
                    g += log_pi.add_(entropy[rows, None]).mul_(of_entropy[rows, None])
                if of_logp is not None:
                    g += of_logp[rows, None]
                g = g.mul_(pi).neg_()
                if of_logp is not None:
                    g.scatter_add_(1, tokens[rows, None], of_logp[rows, None])
                g /= ctx.temperature
                grad_x[rows] = (g if weight is None else g.to(weight.dtype) @ weight).to(x.dtype)
                if grad_w is not None:
                    grad_w += g.T @ x[rows].to(g.dtype)  # summed over the chunks in float32
                if grad_b is not None:
                    grad_b += g.sum(0)
        cast = (None if g is None else g.to(p.dtype) for g, p in ((grad_w, weight), (grad_b, bias)))
        return grad_x, *cast, None, None, None, None, None, None


def token_stats(
    x: Tensor,
    tokens: Tensor,
    top_p: float,
    *,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    inclusive: bool = True,
    chunk: int = 0,
) -> dict[str, Tensor]:
    """All that the loss needs of pi = softmax(logits / temperature), in one pass and in float32.

    x: logits [..., V]; or hidden states [..., D] with the head's weight [V, D] and bias [V], and
    then no [..., V] tensor outlives its chunk. tokens [...] ids; mask [...]: where it is False,
    nothing is computed and all is 0; chunk: tokens at a time, 0 = as many as fit. Returns, each
    [...]: logp of `tokens`, the full entropy H, nucleus_entropy H' (nats), nucleus_size |V_p|.

    >>> stats = token_stats(torch.zeros(1, 4), torch.tensor([2]), 0.5)
    >>> stats["logp"], stats["nucleus_entropy"], stats["nucleus_size"]
    (tensor([-1.3863]), tensor([0.6931]), tensor([2]))
    """
    where = torch.arange(tokens.numel(), device=tokens.device)
    if mask is not None:
        where = where[mask.bool().flatten()]
    if not chunk:  # slices of 2 million logits fit a processor's cache, 64 million fill a GPU
        entries = x.shape[-1] if weight is None else len(weight)
        chunk = max(1, (1 << (21 if x.device.type == "cpu" else 26)) // entries)
    options = (top_p, temperature, inclusive, chunk)
    flat = x.reshape(-1, x.shape[-1]), weight, bias, tokens.flatten(), where
    names = ("logp", "entropy", "nucleus_entropy", "nucleus_size")
    values = _TokenStats.apply(*flat, *options)
    return {name: value.view(tokens.shape) for name, value in zip(names, values)}


# ----------------------------------------------------------------------------------------- 6. masks
def peak_mask(entropy: Tensor, mask: Tensor, quantile: float, *, strict: bool = False) -> Tensor:
    """The peak-entropy mask (Eq. 9): where H' reaches the tau-quantile q of its own response.

    entropy [B, T] in nats, mask [B, T] -> bool [B, T]: H' >= q, H' > 0 and in the response. Without
    the second test every token is a peak once q = 0. strict=True, the official code's rule: H' > q.

    >>> peak_mask(torch.tensor([[0.1, 0.9, 0.5, 0.0]]), torch.ones(1, 4), 0.8)
    tensor([[False,  True, False, False]])
    """
    h, mask = entropy.detach(), mask.bool()
    own = h.double().masked_fill(~mask, float("nan"))
    # found in float64, then rounded: q must not land a hair above the value it equals
    q = torch.nanquantile(own, quantile, dim=1, keepdim=True).to(h.dtype)
    return (h > q if strict else (h >= q) & (h > 0)) & mask


def _peaks(h: Tensor, mask: Tensor, quantile: float, strict: bool) -> Tensor:
    """peak_mask, or all of the response where quantile 0 turns it off."""
    return peak_mask(h, mask, quantile, strict=strict) if quantile else mask.bool()


# -------------------------------------------------------------------------------- 7. aggregation
def aggregate_entropy(entropy: Tensor, peak: Tensor, mask: Tensor) -> Tensor:
    """H_agg: the mean over responses of H_i, the mean of H' over the response's peaks.

    entropy, peak, mask [B, T] -> scalar. No peak counts 0; a response without a token is left out.

    >>> h, mask = torch.tensor([[1.0, 3.0], [2.0, 0.0]]), torch.tensor([[1, 1], [1, 0]])
    >>> aggregate_entropy(h, h >= 2, mask)  # (3 + 2) / 2
    tensor(2.5000)
    """
    peak = peak.bool() & mask.bool()
    h_i = torch.where(peak, entropy, 0.0).sum(1) / peak.sum(1).clamp(min=1)
    return h_i.sum() / mask.bool().any(1).sum().clamp(min=1)


@torch.no_grad()
def minibatch_totals(
    nucleus_entropy: Tensor, mask: Tensor, peak_quantile: float, *, strict: bool = False
) -> dict[str, Tensor]:
    """What a micro-batch must know of its optimiser mini-batch [B, T]: the argument `whole` below.

    (H_agg - H*)^2 is no mean over micro-batches, but its gradient, 2 (H_agg - H*) grad H_agg, is
    linear in theirs once H_agg is known: one pass without gradient, then micro-batches are exact.

    >>> minibatch_totals(torch.tensor([[1.0, 2.0]]), torch.ones(1, 2), 0.8)["h_agg"]
    tensor(2.)
    """
    peak = _peaks(nucleus_entropy, mask, peak_quantile, strict)
    h_agg = aggregate_entropy(nucleus_entropy, peak, mask)
    return {"responses": mask.bool().any(1).sum(), "tokens": mask.bool().sum(), "h_agg": h_agg}


# ------------------------------------------------------------------------------------------ 8. loss
def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    aggregation: str = "constant",
    max_tokens: int | None = None,
    whole: dict[str, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_DrGRPO: -mean over responses of sum_t min(r_t A, clip(r_t, 1 - lo, 1 + hi) A) / max_tokens.

    logp, old_logp, mask [B, T], adv [B] -> (loss, stats); r_t = exp(logp - old_logp). aggregation:
    "constant" divides by the budget max_tokens (default T), so a long wrong answer costs more;
    "sequence" by the response's length (GRPO); "token" averages over all tokens (DAPO). dual_clip:
    for A < 0 a token's loss is at most dual_clip * |A|. whole: of minibatch_totals; loss and stats
    are then these rows' share. stats: clip_fraction, approx_kl (nats, mean of r - 1 - log r).

    >>> logp, old_logp = torch.tensor([[0.5]]).log(), torch.tensor([[0.4]]).log()  # ratio 1.25
    >>> policy_loss(logp, old_logp, torch.tensor([1.0]), torch.ones(1, 1))[0]
    tensor(-1.2000)
    """
    mask = mask.bool()
    whole = whole or {"responses": mask.any(1).sum(), "tokens": mask.sum()}
    responses, tokens = whole["responses"].clamp(min=1), whole["tokens"].clamp(min=1)
    # padding may hold anything, so it goes before the arithmetic instead of times 0 after it
    log_ratio = torch.where(mask, logp, 0.0) - torch.where(mask, old_logp, 0.0)
    log_ratio = log_ratio.clamp(-20, 20)  # exp stays finite
    ratio, a = log_ratio.exp(), adv[:, None]
    free, clipped = ratio * a, ratio.clamp(1 - clip_low, 1 + clip_high) * a
    gain = torch.min(free, clipped)  # the clip takes gain away, never adds any
    if dual_clip is not None:
        gain = torch.where(a < 0, torch.max(gain, dual_clip * a), gain)
    gain = torch.where(mask, gain, 0.0)
    if aggregation == "constant":
        loss = -gain.sum() / (max_tokens or mask.shape[1]) / responses
    elif aggregation == "sequence":
        loss = -(gain.sum(1) / mask.sum(1).clamp(min=1)).sum() / responses
    elif aggregation == "token":
        loss = -gain.sum() / tokens
    else:
        raise ValueError(f"aggregation {aggregation!r}: must be constant, sequence or token")
    with torch.no_grad():
        clip_fraction = ((clipped < free) & mask).sum() / tokens
        approx_kl = ((ratio - 1 - log_ratio) * mask).sum() / tokens
    return loss, {"clip_fraction": clip_fraction, "approx_kl": approx_kl}


def siren_loss(
    x: Tensor,
    tokens: Tensor,
    old_logp: Tensor,
    adv: Tensor,
    mask: Tensor,
    anchor: Tensor | float,
    *,
    beta: float,
    top_p: float = 0.8,
    peak_quantile: float = 0.8,
    regularizer: str = "anchor",
    strict: bool = False,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    inclusive: bool = True,
    chunk: int = 0,
    whole: dict[str, Tensor] | None = None,
    **policy_options: object,
) -> tuple[Tensor, dict[str, Tensor]]:
    """SIREN in one call: L = L_DrGRPO + beta * (H_agg - H*)^2.

    x: logits [B, T, V], where x[:, t] predicts tokens[:, t], not yet divided by the temperature (or
    hidden states [B, T, D] with weight and bias, see token_stats). tokens, old_logp, mask [B, T];
    adv [B]; anchor H* in nats. regularizer: "anchor" as above, "bonus" -beta * H_agg, "none" 0; the
    textbook's entropy bonus is bonus, top_p 1, peak_quantile 0. whole: of minibatch_totals; without
    its "h_agg" these rows' own H_agg is squared (official code). Further options: policy_loss's.
    Returns (loss, stats): policy_loss's, the two terms, and entropy, nucleus_entropy (H_agg),
    peak_fraction, nucleus_size. ValueError for an unknown regularizer or aggregation.

    >>> logits, tokens, mask = torch.zeros(1, 2, 4), torch.tensor([[0, 1]]), torch.ones(1, 2)
    >>> old_logp, adv = torch.full((1, 2), 0.25).log(), torch.zeros(1)
    >>> loss, stats = siren_loss(logits, tokens, old_logp, adv, mask, 0.0, beta=1.0)
    >>> loss, stats["nucleus_entropy"]  # (ln 4)^2 and ln 4: the nucleus holds all four tokens
    (tensor(1.9218), tensor(1.3863))
    """
    mask, head = mask.bool(), {"weight": weight, "bias": bias, "temperature": temperature}
    whole = whole or {"responses": mask.any(1).sum(), "tokens": mask.sum()}
    now = token_stats(x, tokens, top_p, mask=mask, inclusive=inclusive, chunk=chunk, **head)
    loss, stats = policy_loss(now["logp"], old_logp, adv, mask, whole=whole, **policy_options)

    peak = _peaks(now["nucleus_entropy"], mask, peak_quantile, strict)
    h_here = aggregate_entropy(now["nucleus_entropy"], peak, mask)  # H_agg of these rows
    n_here, n_all = mask.any(1).sum(), whole["responses"].clamp(min=1)  # responses
    if regularizer == "anchor":
        # its value is gap^2 and its gradient 2 gap grad h_here, as the last bracket is 0 with that
        # gradient; weighted by n_here / n_all, micro-batches add up to (H_agg - H*)^2 exactly
        gap = whole.get("h_agg", h_here.detach()) - anchor
        penalty = beta * (gap**2 + 2 * gap * (h_here - h_here.detach())) * n_here / n_all
    elif regularizer == "bonus":
        penalty = -beta * h_here * n_here / n_all
    elif regularizer == "none":
        penalty = torch.zeros_like(loss)
    else:
        raise ValueError(f"regularizer {regularizer!r}: must be anchor, bonus or none")
    stats |= {"policy_loss": loss.detach(), "regularizer_loss": penalty.detach()}
    stats["nucleus_entropy"] = h_here.detach() * n_here / n_all
    sums = {"entropy": now["entropy"], "peak_fraction": peak, "nucleus_size": now["nucleus_size"]}
    stats |= {k: v.detach().sum() / whole["tokens"].clamp(min=1) for k, v in sums.items()}
    return loss + penalty, stats


# === end: copy to here ===


# ------------------------------------------------------------------------------------ 9. evaluation
def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased pass@k (k <= n): the chance that k of n samples, c of them right, hold a right one.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def maj_at_k(votes: list[Any], answer: Any, k: int) -> float:
    """maj@k: the share of consecutive blocks of k <= len(votes) votes that `answer` wins.

    A tie goes to the answer given first; None (no answer) never wins.

    >>> maj_at_k([None, None, "7", "8", "8", "7"], "7", 3)
    0.5
    """
    blocks = [votes[i : i + k] for i in range(0, len(votes) - k + 1, k)]
    counts = [Counter(vote for vote in block if vote is not None) for block in blocks]
    return sum(bool(c) and c.most_common(1)[0][0] == answer for c in counts) / len(blocks)


def evaluate(
    model: torch.nn.Module, task: Any, problems: list[Any], cfg: Config, ks: tuple[int, ...] = ()
) -> dict[str, float]:
    """avg@n of n = cfg.eval_samples responses; maj@k, pass@k, distinct@k for each k (default n).

    Means over the problems; distinct@k is the share of different responses among k.
    """
    n, total = cfg.eval_samples, Counter()
    how = {"answer_form": task.answer_form, "library": cfg.verifier == "math"}
    options = {"temperature": cfg.eval_temperature, "top_p": cfg.eval_top_p, "samples": n}
    responses = rollout_of(model, task, problems, cfg, f"{cfg.seed}/eval", **options).responses()
    for i, problem in enumerate(problems):
        own = responses[i * n : (i + 1) * n]
        texts = [task.decode(ids) for ids in own]
        given = [extract_answer(text, task.answer_form) for text in texts]
        right = [verify(text, problem.answer, **how) for text in texts]
        answer = normalize(problem.answer)  # right answers vote alike, however they are written
        votes = [answer if ok else g and normalize(g) for ok, g in zip(right, given)]
        total[f"avg@{n}"] += sum(right) / n
        for k in ks or (n,):
            blocks = [set(map(tuple, own[b : b + k])) for b in range(0, n - k + 1, k)]
            total[f"maj@{k}"] += maj_at_k(votes, answer, k)
            total[f"pass@{k}"] += pass_at_k(n, sum(right), k)
            total[f"distinct@{k}"] += sum(map(len, blocks)) / k / len(blocks)
    return {key: value / len(problems) for key, value in total.items()}


# -------------------------------------------------------------------------------------- 10. trainer

CHECKPOINT, METRICS = "checkpoint.pt", "metrics.jsonl"
MAX_SKIPPED = 5  # non-finite gradients in a row before the run stops
# by --resume; every other field must be as it was
MAY_CHANGE = {"steps", "out", "save_every", "threads", "device", "micro_batch_size", "chunk"}


class DivergedError(RuntimeError):
    """The run can't go on; its last checkpoint is whole."""


def load_task(spec: str, **given: Any) -> Any:
    """The task of a spec such as "toy_env:min_terms=5,max_terms=7": the module's load(**options).

    A task has build_model(), train_problems(n, seed), heldout(n, split), decode(ids), eos_ids,
    pad_id, answer_form(text), metrics(responses), as in toy_env.py; a problem: .prompt, .answer.
    """
    module, _, rest = spec.partition(":")
    options = [option.partition("=") for option in rest.split(",") if option]
    if bad := [name for name, sign, _ in options if not sign]:
        raise ConfigError(f"--task {spec}: {bad[0]} has no value; write module:key=value,key=value")
    with blame(f"--task {spec}", AttributeError, TypeError):
        given |= {name: value for name, _, value in options}
        return importlib.import_module(module).load(**given)


@contextmanager
def blame(flag: str, *more: type[Exception]) -> Iterator[None]:
    """Errors that the user can mend, and these more, as ConfigErrors that name the flag."""
    try:
        yield
    except (ImportError, OSError, ValueError, *more) as error:
        raise ConfigError(f"{flag}: {error}") from error


def rollout_of(
    model: torch.nn.Module, task: Any, problems: list[Any], cfg: Config, draw: str, **options: Any
) -> Rollout:
    """Responses to the problems, a function of the model and of the text `draw` that seeds them."""
    generator = torch.Generator(cfg.device).manual_seed(random.Random(draw).getrandbits(63))
    options |= {"eos_ids": task.eos_ids, "pad_id": task.pad_id, "max_tokens": cfg.max_tokens}
    prompts = [problem.prompt for problem in problems]
    return sample(model, prompts, batch=cfg.sample_batch, generator=generator, **options)


def forward(model: torch.nn.Module, rollout: Rollout) -> dict[str, Tensor]:
    """One pass without cache, as keywords of token_stats and siren_loss: x [B, T, D], the hidden
    states that predict the response; the head's weight [V, D] and bias; tokens and mask [B, T]."""
    ids = torch.cat([rollout.prompt, rollout.tokens], 1)
    mask = torch.cat([rollout.prompt_mask, rollout.mask], 1).long()
    inputs = {"input_ids": ids, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    out = model.base_model(**inputs, attention_mask=mask, use_cache=False)
    x = out.last_hidden_state[:, rollout.prompt.shape[1] - 1 : -1]
    head, where = model.get_output_embeddings(), {"tokens": rollout.tokens, "mask": rollout.mask}
    return {"x": x, "weight": head.weight, "bias": head.bias, **where}


@torch.no_grad()
def score(model: torch.nn.Module, rollout: Rollout, cfg: Config) -> dict[str, Tensor]:
    """token_stats [B, T] of the rollout under the model as it is now."""
    options = cfg.pick("top_p temperature inclusive chunk")
    slices = torch.arange(len(rollout.mask)).split(cfg.micro_batch_size)
    parts = [token_stats(**forward(model, rollout.rows(rows)), **options) for rows in slices]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def update(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    old_logp: Tensor,
    adv: Tensor,
    anchor: float,
    cfg: Config,
) -> dict[str, float]:
    """One optimiser step on a mini-batch; unless penalty_per_micro_batch, micro-batches leave its
    gradient as it is.

    Returns siren_loss's stats and grad_norm. A step whose gradient is not finite is not taken.
    """
    options = cfg.pick("beta top_p peak_quantile regularizer strict temperature inclusive chunk")
    options |= cfg.pick("clip_low clip_high dual_clip aggregation max_tokens")
    micro_batches, whole = torch.arange(len(adv)).split(cfg.micro_batch_size), None
    if len(micro_batches) > 1:
        exact = cfg.regularizer == "anchor" and not cfg.penalty_per_micro_batch
        # scored again, since the model has moved after the rollout
        h = score(model, rollout, cfg)["nucleus_entropy"] if exact else torch.zeros_like(old_logp)
        whole = minibatch_totals(h, rollout.mask, cfg.peak_quantile, strict=cfg.strict)
        if not exact:  # the counts alone: each micro-batch squares its own H_agg, or has no square
            del whole["h_agg"]
    total: Counter[str] = Counter()
    optimizer.zero_grad()
    for rows in micro_batches:
        data = {"old_logp": old_logp[rows], "adv": adv[rows], "anchor": anchor, "whole": whole}
        loss, stats = siren_loss(**forward(model, rollout.rows(rows)), **data, **options)
        loss.backward()
        total.update({key: float(value) for key, value in stats.items()})  # adds: shares
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip))
    if math.isfinite(norm):
        optimizer.step()
    return {**total, "grad_norm": norm}


def training_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, task: Any, cfg: Config, state: dict
) -> dict[str, Any]:
    """Step state["step"]: rollout, verify, score, update. Returns the step's metrics; sets state's
    "anchor" on the first batch and counts non-finite gradients in a row in its "skipped"."""
    start, draw = time.perf_counter(), f"{cfg.seed}/{state['step']}"
    # rollout
    problems = task.train_problems(cfg.prompts, draw)
    options = {"samples": cfg.group_size, "temperature": cfg.temperature}
    rollout = rollout_of(model, task, problems, cfg, draw, **options)
    # verify
    responses = rollout.responses()
    answers = [problem.answer for problem in problems for _ in range(cfg.group_size)]
    how = {"answer_form": task.answer_form, "library": cfg.verifier == "math"}
    rewards = [verify(task.decode(r), a, **how) for r, a in zip(responses, answers)]
    rewards = torch.tensor(rewards, dtype=torch.float32, device=cfg.device)
    adv = group_advantages(rewards, cfg.group_size, scale_by_std=cfg.scale_by_std)
    # score before any update: old log-probabilities, and on the first batch the anchor
    old = score(model, rollout, cfg)
    peak = _peaks(old["nucleus_entropy"], rollout.mask, cfg.peak_quantile, cfg.strict)
    h_agg = float(aggregate_entropy(old["nucleus_entropy"], peak, rollout.mask))
    if state["anchor"] is None:
        state["anchor"] = h_agg
    # update on mini-batches of whole groups
    for group in optimizer.param_groups:
        group["lr"] = cfg.lr * min(1.0, state["step"] / max(1, cfg.warmup_steps))
    updates = []
    for epoch in range(cfg.epochs):
        order = list(range(cfg.prompts))
        random.Random(f"{draw}/{epoch}").shuffle(order)
        for groups in torch.tensor(order).tensor_split(cfg.mini_batches):
            rows = (groups[:, None] * cfg.group_size + torch.arange(cfg.group_size)).view(-1)
            batch = (rollout.rows(rows), old["logp"][rows], adv[rows])
            updates.append(update(model, optimizer, *batch, state["anchor"], cfg))
            finite = math.isfinite(updates[-1]["grad_norm"])
            if state["skipped"] < MAX_SKIPPED:  # so many in a row end the run, whatever follows
                state["skipped"] = 0 if finite else state["skipped"] + 1
    taken = [u for u in updates if math.isfinite(u["grad_norm"])]
    keys = ("policy_loss", "regularizer_loss", "clip_fraction", "approx_kl", "grad_norm")
    tokens, seconds = int(rollout.mask.sum()), time.perf_counter() - start
    return {
        "reward": float(rewards.mean()),
        "entropy": float(old["entropy"].sum()) / tokens,
        "nucleus_entropy": h_agg,
        "anchor": state["anchor"],
        "peak_fraction": float(peak.sum()) / tokens,
        "nucleus_size": float(old["nucleus_size"].sum()) / tokens,
        **{key: sum(u[key] for u in taken) / len(taken) if taken else None for key in keys},
        "skipped_updates": len(updates) - len(taken),
        "response_tokens": tokens / len(responses),
        **task.metrics(responses),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }


def train(
    cfg: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop: threading.Event | None = None,
) -> list[dict[str, Any]]:
    """Train in cfg.folder (metrics.jsonl, checkpoint.pt); return one record a step, of which the
    first, step 0, is the evaluation before training. Once `stop` is set, the step is the last.

    Only model, optimiser and `state` carry over from step to step, and every draw is a function of
    (seed, step): with the same flags, a resumed run repeats an uninterrupted one to the last bit.
    """
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    folder, records = claim_folder(cfg, resume, overwrite), []
    if cfg.model or cfg.data:
        options = cfg.pick("model data eval_data max_prompt max_tokens answer_form verifier dtype")
        options |= cfg.pick("lora_rank lr seed") | {"checkpointing": cfg.recompute}
        options |= {"prompt": cfg.prompt} if cfg.prompt else {}
        task = load_task("examples.text_env", **options)
    else:
        for name in ("dtype", "lora_rank", "recompute"):
            if (value := getattr(cfg, name)) != getattr(Config, name):
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} {value}: needs --model; leave it out for a task")
        task = load_task(cfg.task)
    with blame(f"--model {cfg.model}" if cfg.model else f"--task {cfg.task}"):
        # eval mode: without dropout, the policy that is scored is the one that sampled
        model = task.build_model().to(cfg.device).eval()
    if cfg.verifier == "math":
        with blame("--verifier math"):
            importlib.import_module("math_verify")
    with blame(f"--eval-prompts {cfg.eval_prompts}"):
        heldout = task.heldout(cfg.eval_prompts, cfg.eval_split)
    make = {"adamw": torch.optim.AdamW, "adafactor": torch.optim.Adafactor}[cfg.optimizer]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make(trained.values(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    state = {"step": 0, "anchor": cfg.anchor, "skipped": 0}
    if resume:
        saved = load_checkpoint(folder)
        state = saved["state"]
        for key in dataclasses.asdict(cfg).keys() - MAY_CHANGE:
            if (old := saved["config"].get(key)) != (new := getattr(cfg, key)):
                raise ConfigError(f"--resume: {key} is {old} in {folder}, not {new}; leave it out")
        state["skipped"] %= MAX_SKIPPED  # a run that has diverged gets another try
        model.load_state_dict(saved["model"], strict=not cfg.lora_rank)
        optimizer.load_state_dict(saved["optimizer"])
        # lines after the checkpoint will be made again; the very last may be half a line
        with blame(f"--resume: {folder / METRICS} is damaged; restore it"):
            lines = (folder / METRICS).read_text().splitlines()
            if 0 < state["step"] >= len(lines):
                raise ValueError(f"{len(lines)} lines, the checkpoint is of step {state['step']}")
            kept = state["step"] + 1 if state["step"] else 0
            records = [json.loads(line) for line in lines[:kept]]
    write_whole(folder / METRICS, lambda file: file.writelines(map(to_line, records)))

    def save() -> None:
        weights = trained if cfg.lora_rank else model.state_dict()  # the base stays as it was
        parts = {"model": weights, "optimizer": optimizer.state_dict(), "state": state}
        parts["config"] = dataclasses.asdict(cfg)
        write_whole(folder / CHECKPOINT, lambda file: torch.save(parts, file))

    def log(record: dict[str, Any]) -> None:
        step = record["step"]
        if step in (0, cfg.steps) or (cfg.eval_every and step % cfg.eval_every == 0):
            for name, problems in heldout.items():
                values = evaluate(model, task, problems, cfg)
                record |= {f"{name}/{key}": value for key, value in values.items()}
        records.append(record)
        with open(folder / METRICS, "ab") as file:
            file.write(to_line(record))
            file.flush()
            os.fsync(file.fileno())  # before the checkpoint of this step

    save()
    stop = stop or threading.Event()
    pace = 0.5 if sys.stderr.isatty() else 60  # seconds between bars; few in a log file
    try:
        if not records:
            log({"step": 0})
        with tqdm(total=cfg.steps, initial=state["step"], unit="step", mininterval=pace) as bar:
            while state["step"] < cfg.steps and not stop.is_set():
                state["step"] += 1
                log({"step": state["step"], **training_step(model, optimizer, task, cfg, state)})
                shown = ("reward", "entropy", "nucleus_entropy", "anchor")
                bar.set_postfix({key: f"{records[-1][key]:.3f}" for key in shown}, refresh=False)
                bar.update()
                diverged = state["skipped"] >= MAX_SKIPPED
                if diverged or state["step"] % cfg.save_every == 0:
                    save()
                if diverged:
                    raise FloatingPointError(f"{MAX_SKIPPED} gradients in a row were not finite")
        save()
    except FloatingPointError as error:
        where = f"the last checkpoint is in {folder}; start again with a lower --lr or --beta"
        raise DivergedError(f"step {state['step']}: {error}; {where}") from error
    return records


def claim_folder(cfg: Config, resume: bool, overwrite: bool) -> Path:
    """The run folder, made if need be. ConfigError if it can't be written or holds another run."""
    try:
        cfg.folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cfg.folder).close()
    except OSError as error:
        reason = f"can't be written ({error.strerror}); name another folder"
        raise ConfigError(f"--out {cfg.folder}: {reason}") from error
    metrics = cfg.folder / METRICS  # empty: the run stopped before it had anything to lose
    if metrics.exists() and metrics.stat().st_size and not resume and not overwrite:
        hint = "add --resume, --overwrite or another --out"
        raise ConfigError(f"--out {cfg.folder}: already holds a run; {hint}")
    return cfg.folder


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """The folder's last checkpoint: model, optimizer, state (step, anchor, skipped) and config."""
    path = folder / CHECKPOINT
    if not path.exists():
        raise ConfigError(f"--resume: {path} does not exist; start the run without --resume")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return {key: saved[key] for key in ("model", "optimizer", "state", "config")}
    except Exception as error:  # unpickling torn bytes may raise whatever it likes
        reason = f"is no whole checkpoint ({type(error).__name__})"
        raise ConfigError(f"--resume: {path} {reason}; restore it or use --overwrite") from error


def to_line(record: dict[str, Any]) -> bytes:
    """A line of metrics.jsonl."""
    return (json.dumps(record) + "\n").encode()


def write_whole(path: Path, write: Callable[[Any], Any]) -> None:
    """Write a file whole or not at all, whenever the process is killed."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# --------------------------------------------------------------------------------- 11. command line

# the first field of each group in --help
GROUPS = {"task": "rollout", "regularizer": "SIREN", "mini_batches": "policy gradient"}
GROUPS |= {"model": "language model", "eval_every": "evaluation", "out": "run"}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> None:
        """Raise instead of printing the usage of every flag."""
        raise ConfigError(f"{message}; see --help")


def make_parser() -> Parser:
    """The flags and --help, from Config's fields."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    either.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    group, hints = parser, get_type_hints(Config)
    for f in dataclasses.fields(Config):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        valid = f"; {f.metadata['valid'].replace('|', ' | ')}" if f.metadata["valid"] else ""
        doc = f"{f.metadata['doc']} (default {f.default}{valid})".replace("%", "%%")
        how: dict[str, Any] = {"help": doc, "default": argparse.SUPPRESS}
        if hints[f.name] is bool:
            how["action"] = argparse.BooleanOptionalAction
        else:
            how |= {"type": (get_args(hints[f.name]) or (hints[f.name],))[0], "metavar": "X"}
        group.add_argument("--" + f.name.replace("_", "-"), **how)
    return parser


def report(records: list[dict[str, Any]], folder: Path) -> str:
    """Draw curves.png into the folder; return a table of the run before and after."""
    from matplotlib.figure import Figure

    steps, rows = [r for r in records if "reward" in r], []
    for key in ("reward", "entropy", "nucleus_entropy") if steps else ():
        last = [r[key] for r in steps[-10:]]
        rows.append((key, steps[0][key], sum(last) / len(last)))
        if key == "nucleus_entropy" and (anchor := steps[0]["anchor"]):
            rows.append(("H_agg / anchor", rows[-1][1] / anchor, rows[-1][2] / anchor))
    tested = [r for r in records if any("/" in key for key in r)]
    first, final = (tested[0], tested[-1]) if tested else ({}, {})
    rows += [(key, value, final[key]) for key, value in first.items() if "/" in key]
    panels = {"reward": ["reward"], "entropy (nats)": ["entropy", "nucleus_entropy", "anchor"]}
    panels["held-out prompts"] = [key for key, *_ in rows if "pass@" in key or "distinct@" in key]
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    for axes, (title, keys) in zip(figure.subplots(1, 3), panels.items()):
        for key, style in zip(keys, ("k-", "k--", "k:", "k-.")):
            some = [r for r in records if key in r]
            axes.plot([r["step"] for r in some], [r[key] for r in some], style, label=key)
        axes.set(title=title, xlabel="step")
        axes.legend()
    figure.savefig(folder / "curves.png", dpi=120)
    lines = [f"{key:<20}{before:>8.3f}{after:>8.3f}" for key, before, after in rows]
    head = f"{'':20}{'before':>8}{'after':>8}   (training: first batch, mean of the last 10)"
    return "\n".join([head, *lines, f"curves: {folder / 'curves.png'}"])


def main(argv: list[str] | None = None) -> int:
    """The command. Exit code 0: done, 1: diverged or no room, 2: bad input, 130: interrupted."""
    stop, cfg = threading.Event(), None

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the second Ctrl-C stops at once
        print("\nfinishing this step; Ctrl-C again stops at once", file=sys.stderr)
        stop.set()

    try:
        given = vars(make_parser().parse_args(argv))
        how = {name: given.pop(name) for name in ("resume", "overwrite")}
        cfg = Config(**given)
        if how["resume"]:  # what is not given is the saved run's
            saved = load_checkpoint(cfg.folder)["config"].items()
            saved = {name: value for name, value in saved if name in vars(cfg)}
            cfg = Config(**{**saved, **given, "out": str(cfg.folder)})
        if cfg.dry_run:
            with blame(f"--model {cfg.model}"):
                print(importlib.import_module("examples.memory_plan").plan(cfg))
            return 0
        signal.signal(signal.SIGINT, interrupt)
        records = train(cfg, **how, stop=stop)
        if records[-1]["step"] < cfg.steps:
            raise KeyboardInterrupt
        print(report(records, cfg.folder))
        return 0
    except ConfigError as error:
        print(f"siren.py: error: {error}", file=sys.stderr)
        return 2
    except (DivergedError, OSError, torch.OutOfMemoryError) as error:
        print(f"siren.py: stopped: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = f"--resume --out {cfg.folder}" if cfg else "the same command"
        print(f"siren.py: interrupted; go on with {again}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
