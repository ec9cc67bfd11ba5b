r"""Real questions for a real pretrained language model, behind the interface of toy_env.py.

A line of a data file is a question and its answer; the model reads the question in its own chat
template and is rewarded if its answer is right:

    {"question": "What is 9 plus 8?", "answer": "17"}

    prompt      <|im_start|>user
                What is 9 plus 8?
                Please reason step by step, and put your final answer within \boxed{}.<|im_end|>
                <|im_start|>assistant
    response    9 + 8 = 17, so the answer is \boxed{17}.<|im_end|>

    python examples/make_data.py         # sums, asked in words
    python examples/get_smollm2.py       # a model with 135 million parameters
    python siren.py --model models/smollm2-135m --data data/sums_train.jsonl

Options, the fields of `Options` below, are given as text or as typed values. Data files:
 - JSON Lines, UTF-8 (with or without BOM, LF or CRLF), a problem a line, no empty lines.
 - FILE#start:stop takes rows start to stop - 1, counted from 0, as Python slices do:
   train.jsonl#:1000, train.jsonl#-100: and so on.
 - Without eval_data, data's last tenth is held out. Training and evaluation share no question.
"""

from __future__ import annotations

import json
import math
import random
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from decimal import Decimal
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer

PROMPT = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."
MIN_BF16_LR = 1e-4  # Adam moves a weight by about lr; see check_precision
# what makes a head more than hidden states times a matrix, which is all that siren.py computes
HEAD_FIELDS = (
    *("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "logit_scale"),
    *("logits_scaling", "lm_head_multiplier", "output_multiplier", "logits_mup_width_multiplier"),
)
MODEL_FORMS = "a folder that transformers loads, a folder with a .gguf file, or a hub id"
DATA_FORMS = "FILE.jsonl or FILE.jsonl#start:stop"
CHOICES = {
    "answer_form": ("boxed", "last-number"),
    "verifier": ("exact", "math"),
    "dtype": ("float32", "bfloat16"),
}
CUT_OFF = " [cut off]"  # what decode shows of a response that never ended
BOOLS = {"true": True, "false": False}
_ROWS = re.compile(r"(.+)#(-?\d*):(-?\d*)", re.DOTALL)
_NUMBER = re.compile(
    r"(?:(?<![0-9)])[-\u2212])?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+|(?=\.[0-9]))(?:\.[0-9]+)?(?:/[0-9]+)?"
)


@dataclass(frozen=True)
class Options:
    """What a text task depends on. ValueError for a bad value."""

    model: str = ""  # a folder that transformers loads, one with a .gguf file, or a hub id
    data: str = ""  # FILE.jsonl or FILE.jsonl#start:stop, to train on
    eval_data: str = ""  # the same, to evaluate on; empty = the last tenth of data
    prompt: str = PROMPT  # the user's message
    max_prompt: int = 1024  # tokens; longer prompts are dropped, and counted aloud
    max_tokens: int = 1  # of a response; what a prompt must leave free in the model's context
    answer_form: str = "boxed"  # or "last-number", for models that don't box their answer
    verifier: str = "exact"  # or "math", siren.py's flag: here only, is math-verify installed?
    dtype: str = "float32"  # of the model's weights
    lr: float = math.inf  # the learning rate to come; too small a one is refused for bfloat16
    lora_rank: int = 0  # train adapters of this rank instead of the weights; 0 = off
    checkpointing: bool = False  # recompute layers in the backward pass: less memory, more time
    seed: int = 0  # draws the adapters' initial weights

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)!r}: needs {rule}")

        for name, allowed in CHOICES.items():
            require(getattr(self, name) in allowed, name, " or ".join(allowed))
        for name, least in {"max_prompt": 1, "max_tokens": 1, "lora_rank": 0, "seed": 0}.items():
            require(getattr(self, name) >= least, name, f"at least {least}")
        require(self.model != "", "model", MODEL_FORMS)
        require(self.data != "", "data", DATA_FORMS)
        check_precision(self.dtype, self.lora_rank, self.lr)
        require("{question}" in self.prompt, "prompt", "{question} where the question goes")
        for name, package in {"verifier": "math_verify", "lora_rank": "peft"}.items():
            unused = getattr(self, name) in ("exact", 0) or find_spec(package)
            require(bool(unused), name, f"another package: pip install {package.replace('_', '-')}")


class Problem(NamedTuple):
    """A prompt (token ids) and its right answer (text)."""

    prompt: list[int]
    answer: str


class Row(NamedTuple):
    """A line of a data file; where is FILE:LINE, for errors."""

    question: str
    answer: str
    where: str


# --- data ---


def read_rows(spec: str) -> list[Row]:
    """The problems of FILE.jsonl or FILE.jsonl#start:stop. ValueError with file and line."""
    rows = _ROWS.fullmatch(spec)
    path, *ends = rows.groups() if rows else (spec, "", "")
    try:
        lines = Path(path).expanduser().read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; give {DATA_FORMS}") from error
    if not lines[-1]:
        lines.pop()  # the file ended with a line break, as it should
    # every line is checked, also those outside start:stop
    found = [_read_row(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
    chosen = found[slice(*(int(end) if end else None for end in ends))]
    if not chosen:
        raise ValueError(f"{spec}: selects none of the {len(found)} problems in {path}")
    return chosen


def _read_row(line: bytes, where: str) -> Row:
    expected = '{"question": "...", "answer": "..."}'
    try:
        row = json.loads(line.decode())
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode()  # no lone surrogates, no NaN
    except (ValueError, RecursionError) as error:
        what = "the line is empty" if not line.strip() else f"not JSON in UTF-8 ({error})"
        raise ValueError(f"{where}: expected {expected}; {what}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected {expected}; found a {type(row).__name__}")
    answer = row.get("answer")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = f"{Decimal(repr(answer)):f}"  # 0.00001, not 1e-05
    for name, value in (("question", row.get("question")), ("answer", answer)):
        if not isinstance(value, str) or not value.strip():
            what = f"{name} is {json.dumps(value)[:40]}" if name in row else f"no {name}"
            raise ValueError(f"{where}: expected {expected}, not empty; found {what}")
    return Row(row["question"], answer, where)


def check_disjoint(train: Sequence[Row], heldout: Sequence[Row]) -> None:
    """ValueError if a question, whatever its white space, is trained on and evaluated on."""
    seen = {" ".join(row.question.split()): row.where for row in train}
    for row in heldout:
        if twin := seen.get(" ".join(row.question.split())):
            raise ValueError(f"{row.where}: is also trained on ({twin}); remove one of them")


def last_number(text: str) -> str | None:
    """The last number of a text, for models that don't box their answer.

    >>> last_number("9 + 8 = 1,017."), last_number("10-12 is \u22122"), last_number("none")
    ('1,017', '\u22122', None)
    """
    found = _NUMBER.findall(text)
    return found[-1] if found else None


# --- model ---


def check_precision(dtype: str, lora_rank: int, lr: float) -> None:
    """ValueError if training weights stored in bfloat16 with this learning rate does nothing.

    bfloat16 has 8 significant bits: a weight of 0.02 has neighbours 1.2e-4 away, and a step under
    half of that is rounded away, again and again. With lr 1e-6, 98 % of the weights never move.
    """
    if dtype == "bfloat16" and not lora_rank and lr < MIN_BF16_LR:
        reason = f"a step under {MIN_BF16_LR:g} is rounded away in most bfloat16 weights"
        ways = "lora_rank=64 (float32 adapters), dtype=float32, or an optimiser with stochastic"
        raise ValueError(f"lr {lr:g}: {reason}; use {ways} rounding (torchao has one)")


def find_model(model: str) -> tuple[str, dict[str, str]]:
    """Where transformers finds a model: from_pretrained's name and, for a GGUF file, gguf_file."""
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    if not path.exists():
        near = path.parent != Path() and path.parent.exists()  # or the hub's patience is waited for
        if near or model[0] in "./~" or model.count("/") > 1 or "\\" in model:
            raise ValueError(f"model={model}: no such folder; give {MODEL_FORMS}")
        return model, {}  # a hub id
    if (path / "config.json").exists():
        return str(path), {}
    files = sorted(file.name for file in path.glob("*.gguf"))
    if len(files) != 1:
        found = f"{len(files)} .gguf files" if files else "neither config.json nor a .gguf file"
        raise ValueError(f"model={model}: holds {found}; give {MODEL_FORMS}")
    return str(path), {"gguf_file": files[0]}


def open_model(what: Any, model: str, **options: Any) -> Any:
    """what.from_pretrained for a model; ValueError, in one line, if that fails."""
    folder, gguf = find_model(model)
    try:
        return what.from_pretrained(folder, trust_remote_code=False, **gguf, **options)
    except Exception as error:  # a loader on torn files: it may raise whatever it likes
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        hint = "; pip install gguf accelerate" if isinstance(error, ImportError) and gguf else ""
        reason = (lines or [type(error).__name__])[0].rstrip(".")
        here = "" if Path(folder).exists() else "no such folder, and as a hub id: "
        raise ValueError(f"model={model}: {here}{reason}{hint}; give {MODEL_FORMS}") from error


def read_model(model: str, dtype: str = "float32") -> torch.nn.Module:
    """A causal language model with the weights of its files, ready to be trained or saved."""
    options = {"dtype": getattr(torch, dtype), "output_loading_info": True}
    network, info = open_model(AutoModelForCausalLM, model, **options)
    if missing := sorted(info["missing_keys"]):  # transformers would draw them at random
        raise ValueError(f"model={model}: has no weights for {missing[0]}; get the whole model")
    if getattr(network.config, "quantization_config", None) and find_model(model)[1]:
        # a GGUF file has been turned into plain weights; without this it can't be saved
        network.hf_quantizer, network.is_quantized = None, False
        del network.config.quantization_config
    return network


@torch.no_grad()
def check_head(network: torch.nn.Module, model: str) -> None:
    """ValueError unless the logits are the last hidden states times the head's matrix: siren.py
    computes them so, in slices. Gemma 2, Cohere, Granite and a few others do more."""
    config, head = network.config.get_text_config(), network.get_output_embeddings()
    more = {name: getattr(config, name, None) for name in HEAD_FIELDS}
    more = [f"{name}={value}" for name, value in more.items() if value not in (None, 1)]
    ids = torch.arange(4)[None]
    if not more and head is not None:
        hidden = network.base_model(input_ids=ids, use_cache=False).last_hidden_state
        plain = torch.nn.functional.linear(hidden, head.weight, head.bias).float()
        logits = network(input_ids=ids, use_cache=False).logits.float()
        tolerance = {"rtol": 0, "atol": 1e-3 * float(logits.abs().max())}
        if plain.shape == logits.shape and torch.allclose(plain, logits, **tolerance):
            return
    what = f"has {', '.join(more)}" if more else f"is a {type(network).__name__}"
    reason = "so its logits are more than hidden states times a matrix"
    raise ValueError(f"model={model}: {what}, {reason}; take another, such as Llama or Qwen")


def add_lora(network: torch.nn.Module, rank: int, seed: int) -> None:
    """Freeze the weights; add trainable float32 adapters to every linear layer but the head."""
    from peft import LoraConfig

    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.default_generator.manual_seed(seed)
        # into the network itself: a PeftModel around it would hide base_model from siren.forward
        network.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def recompute_layers(network: torch.nn.Module) -> None:
    """Keep only each layer's input for the backward pass (activation checkpointing).

    transformers' own switch works in training mode alone, and siren.py never enters that: with
    dropout, the policy that is scored would not be the one that sampled.
    """

    layers = [m for m in network.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"checkpointing: {type(network).__name__} has no layers for it; leave it")
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


# --- task ---


class TextTask:
    """Questions, answers and the model that learns to answer; see toy_env.py for the interface.

    eos_ids end a response (chat models have several); pad_id may be one of them, since siren.py
    masks by position.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        train = read_rows(options.data)
        if options.eval_data:
            heldout = read_rows(options.eval_data)
        else:
            if len(train) < 2:
                raise ValueError(f"{options.data}: one problem can't be split; give eval_data")
            last = max(1, len(train) // 10)
            train, heldout = train[:-last], train[-last:]
            _say(f"no eval_data: {last} of {last + len(train)} problems are held out")
        check_disjoint(train, heldout)
        self.config = open_model(AutoConfig, options.model).get_text_config()
        self.tokenizer = open_model(AutoTokenizer, options.model)
        if not self.tokenizer.chat_template:
            _say(f"{options.model} has no chat template: it reads the prompt alone")
        self.eos_ids, self.pad_id = self._find_ends()
        self._train = self._encode(train, "data")
        self._heldout = self._encode(heldout, "eval_data")

    def _find_ends(self) -> tuple[list[int], int]:
        """Every id that may end a response, and the padding's."""
        try:
            generation = GenerationConfig.from_pretrained(find_model(self.options.model)[0])
        except OSError:
            generation = None  # it is optional
        eos: set[int] = set()
        for source in (generation, self.config, self.tokenizer):
            ids = getattr(source, "eos_token_id", None)
            eos |= set(ids if isinstance(ids, list) else [ids]) - {None}
        if not eos:
            raise ValueError(f"model={self.options.model}: its config needs an eos_token_id")
        pad = self.tokenizer.pad_token_id
        known = pad is not None and pad < self.config.vocab_size  # else it has no embedding
        return sorted(eos), pad if known else min(eos)

    def encode(self, question: str) -> list[int]:
        """The prompt for a question, as token ids."""
        text = self.options.prompt.replace("{question}", question)  # \boxed{} rules out str.format
        if not self.tokenizer.chat_template:
            return self.tokenizer(text).input_ids
        chat, how = [{"role": "user", "content": text}], {"add_generation_prompt": True}
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, **how)
        return self.tokenizer(text, add_special_tokens=False).input_ids  # the template has its own

    def _encode(self, rows: Sequence[Row], name: str) -> list[Problem]:
        """The problems whose prompt leaves room in the budget and in the model's context."""
        context = getattr(self.config, "max_position_embeddings", None) or sys.maxsize
        most = min(self.options.max_prompt, context - self.options.max_tokens)
        problems = [Problem(self.encode(row.question), row.answer) for row in rows]
        kept = [problem for problem in problems if 0 < len(problem.prompt) <= most]
        if not kept:
            shortest = min(len(problem.prompt) for problem in problems)
            room = f"max_prompt {self.options.max_prompt} and context {context} leave {most} tokens"
            raise ValueError(f"{name}: {room}, the shortest prompt has {shortest}; change them")
        if dropped := len(problems) - len(kept):
            _say(f"{name}: dropped {dropped} of {len(problems)} prompts, over {most} tokens")
        return kept

    def train_problems(self, n: int, seed: str) -> list[Problem]:
        """n training problems, a function of n and seed: no problem twice before all have come."""
        rng, drawn = random.Random(f"train {seed}"), []
        while len(drawn) < n:
            drawn += rng.sample(self._train, min(n - len(drawn), len(self._train)))
        return drawn

    def heldout(self, n: int, split: str = "test") -> dict[str, list[Problem]]:
        """n problems that are never trained on, or all of them if they are fewer.

        One set of problems whatever the split: give your validation file as eval_data to tune.
        """
        if n < 1 or split not in ("test", "validation"):
            raise ValueError(f"n={n}, split={split!r}: needs n >= 1, and test or validation")
        if n > len(self._heldout):
            _say(f"eval_data: holds {len(self._heldout)} problems, not {n}; all are used")
            n = len(self._heldout)
        return {"heldout": random.Random("heldout").sample(self._heldout, n)}

    def build_model(self) -> torch.nn.Module:
        """The model on the CPU, with adapters and checkpointing if wanted."""
        options = self.options
        network = read_model(options.model, options.dtype).eval()
        check_head(network, options.model)
        if options.lora_rank:
            add_lora(network, options.lora_rank, options.seed)
        if options.checkpointing:
            recompute_layers(network)
        return network

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a response (token ids) without special tokens; CUT_OFF follows if it never
        ended."""
        how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        ended = not ids or ids[-1] in self.eos_ids
        return self.tokenizer.decode(ids, **how) + ("" if ended else CUT_OFF)

    def answer_form(self, text: str) -> str | None:
        """The answer of a text without a box: its last number, if the model answers so.

        A response that never ended has none: its last number may be half of one.
        """
        if self.options.answer_form == "boxed" or text.endswith(CUT_OFF):
            return None
        return last_number(text)

    def metrics(self, responses: Sequence[Sequence[int]]) -> dict[str, float]:
        """The share of the responses (token ids) that ended by themselves, within the budget."""
        ended = sum(ids[-1] in self.eos_ids for ids in responses if ids)
        return {"ended_share": ended / max(1, len(responses))}


def _say(text: str) -> None:
    print(f"text_env: {text}", file=sys.stderr)


def load(**options: Any) -> TextTask:
    """The task with these options, each given as text or as a value of its type.

    ValueError, in one line: an unknown option, a bad value, bad data, a model that can't be read.
    """
    types, values = {f.name: type(f.default) for f in fields(Options)}, {}
    for name, value in options.items():
        if name not in types:
            raise ValueError(f"{name}={value!r}: no such option; choose from {', '.join(types)}")
        kind = types[name]
        if isinstance(value, str):
            with suppress(KeyError, ValueError):
                value = BOOLS[value.lower()] if kind is bool else kind(value)
        if type(value) is not kind:
            raise ValueError(f"{name}={value!r}: needs {kind.__name__}")
        values[name] = value
    return TextTask(Options(**values))
