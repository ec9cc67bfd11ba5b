r"""Real questions for a real pretrained language model, as a task of siren.py.

A line of a data file is a question and its answer. The model reads the question in its own chat
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

Data files are JSON Lines in UTF-8 (with or without BOM, LF or CRLF), a problem per line, no empty
lines; an answer is a text or a number, and may be in a \boxed{}. FILE#start:stop takes the rows
that Python's slice takes: train.jsonl#:1000, train.jsonl#-100:. Training and evaluation share no
question.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from decimal import Decimal
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer

import siren
from examples.math_answers import Grader

PROMPT = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."
MODEL_FORMS = "a folder that transformers loads, a folder with a .gguf file, or a hub id"
DATA_FORMS = "FILE.jsonl or FILE.jsonl#start:stop"
LINE_FORM = '{"question": "...", "answer": "..."}'
MAX_LINE = 1_000_000  # bytes of a data file's line
BAD_GOLDS = 0.01  # the largest share of answers that no response can match
MIN_BF16_LR = 1e-4  # Adam moves a weight by about lr; see check_precision
# what makes logits more than the head's output for a hidden state, which is all that siren.py takes
HEAD_FIELDS = (
    *("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "logit_scale"),
    *("logits_scaling", "lm_head_multiplier", "output_multiplier", "logits_mup_width_multiplier"),
)
CUT_OFF = " [cut off]"  # what decode shows of a response that never ended
ROWS = re.compile(r"(.+)#(-?\d*):(-?\d*)", re.DOTALL)
NUMBER = re.compile(
    r"(?:(?<![0-9)])[-\u2212])?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+|(?=\.[0-9]))(?:\.[0-9]+)?(?:/[0-9]+)?"
)


def option(default: Any, doc: str, *choices: str, least: int | None = None) -> Any:
    """A field of Options."""
    metadata = {"doc": doc, "choices": choices, "least": least}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Options:
    """The task's own flags. ValueError for a bad value."""

    model: str = option("", MODEL_FORMS)
    data: str = option("", f"to train on: {DATA_FORMS}")
    eval_data: str = option("", "to evaluate on; empty = the last tenth of data")
    prompt: str = option(PROMPT, "the user's message; {question} is replaced")
    max_prompt: int = option(1024, "tokens; longer prompts are dropped and counted aloud", least=1)
    answer_form: str = option("boxed", "the answer without a box", "boxed", "last-number")
    verifier: str = option("exact", "docs/verifier.md", "exact", "math")
    dtype: str = option("float32", "of the model's weights", "float32", "bfloat16")
    lora_rank: int = option(0, "train adapters of this rank, not the weights; 0 = off", least=0)
    recompute: bool = option(False, "layers in the backward pass: less memory, more time")

    def __post_init__(self) -> None:
        for name, forms in {"model": MODEL_FORMS, "data": DATA_FORMS}.items():
            if not getattr(self, name):
                raise ValueError(f"{name} is missing; give {forms}")
        if "{question}" not in self.prompt:
            raise ValueError(f"prompt={self.prompt!r}: needs {{question}} where the question goes")
        for used, package in ((self.verifier == "math", "math_verify"), (self.lora_rank, "peft")):
            if used and not find_spec(package):
                name = "verifier=math" if package == "math_verify" else f"lora_rank={used}"
                raise ValueError(f"{name}: pip install {package.replace('_', '-')}")


def read_options(given: dict[str, str]) -> Options:
    """Options from text."""
    known, values = {f.name: f for f in fields(Options)}, {}
    for name, text in given.items():
        if name not in known:
            raise ValueError(f"{name}={text!r}: no such option; choose from {', '.join(known)}")
        default, meta = known[name].default, known[name].metadata
        if isinstance(default, bool):
            meta = {**meta, "choices": ("true", "false")}
        if meta["choices"] and text not in meta["choices"]:
            raise ValueError(f"{name}={text!r}: needs {' or '.join(meta['choices'])}")
        if meta["least"] is not None and not (text.isdecimal() and int(text) >= meta["least"]):
            raise ValueError(f"{name}={text!r}: needs a whole number, at least {meta['least']}")
        values[name] = text == "true" if isinstance(default, bool) else type(default)(text)
    return Options(**values)


def _help(f: Any) -> str:
    """An option's line in --help."""
    default = str(f.default).lower() if isinstance(f.default, bool) else repr(f.default)
    rule = f"; {' or '.join(f.metadata['choices'])}" if f.metadata["choices"] else ""
    return f"{f.metadata['doc']} (default: {default}{rule})"


OPTIONS = {f.name: _help(f) for f in fields(Options)}


# --- data ---


class Problem(NamedTuple):
    """A prompt (token ids) and its right answer (text)."""

    prompt: list[int]
    answer: str


class Row(NamedTuple):
    """A line of a data file; where is FILE:LINE, for errors."""

    question: str
    answer: str
    where: str


def read_rows(spec: str) -> list[Row]:
    """The problems of FILE.jsonl or FILE.jsonl#start:stop. ValueError with file and line."""
    rows, found = ROWS.fullmatch(spec), []
    path, *ends = rows.groups() if rows else (spec, "", "")
    try:
        with open(Path(path).expanduser(), "rb") as file:
            while line := file.readline(MAX_LINE + 1):
                where = f"{path}:{len(found) + 1}"
                if len(line) > MAX_LINE:
                    raise ValueError(f"{where}: longer than {MAX_LINE:,} bytes; split the file")
                # every line is checked, also those outside start:stop
                line = line if found else line.removeprefix(b"\xef\xbb\xbf")
                found += [_read_row(line, where)] if line else []
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; give {DATA_FORMS}") from error
    chosen = found[slice(*(int(end) if end else None for end in ends))]
    if not chosen:
        raise ValueError(f"{spec}: selects none of the {len(found)} problems in {path}")
    return chosen


def _read_row(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line.decode())
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode()  # no lone surrogates, no NaN
    except (ValueError, RecursionError) as error:
        what = "the line is empty" if not line.strip() else f"not JSON in UTF-8 ({error})"
        raise ValueError(f"{where}: expected {LINE_FORM}; {what}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected {LINE_FORM}; found a {type(row).__name__}")
    answer = row.get("answer")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = f"{Decimal(repr(answer)):f}"  # 0.00001, not 1e-05
    for name, value in (("question", row.get("question")), ("answer", answer)):
        if not isinstance(value, str) or not value.strip():
            what = f"{name} is {json.dumps(value)[:40]}" if name in row else f"no {name}"
            raise ValueError(f"{where}: expected {LINE_FORM}, not empty; found {what}")
    return Row(row["question"], siren.extract_answer(answer) or answer, where)  # without its box


def check_disjoint(train: Sequence[Row], heldout: Sequence[Row]) -> None:
    """ValueError if a question, whatever its white space, is trained on and evaluated on."""
    seen = {" ".join(row.question.split()): row.where for row in train}
    for row in heldout:
        if twin := seen.get(" ".join(row.question.split())):
            raise ValueError(f"{row.where}: is also trained on ({twin}); remove one of them")


def matchable(rows: Sequence[Row], name: str, equal: Any = None) -> list[Row]:
    """The rows whose answer, in a box, is right by the verifier; the others earn no reward ever.

    They are counted and the first are shown. ValueError if they are more than one in a hundred.
    """
    bad = []
    for row in rows:
        boxed = f"\\boxed{{{row.answer}}}"
        if len(row.answer) > siren.MAX_ANSWER or not siren.verify(boxed, row.answer, equal=equal):
            bad.append(row)
    if bad:
        shown = "; ".join(f"{row.where} {row.answer[:40]!r}" for row in bad[:3])
        count = f"{len(bad)} of {len(rows)} answers can't be matched by any response: {shown}"
        rule = f"an answer has at most {siren.MAX_ANSWER} characters, and its braces are balanced"
        if len(bad) > BAD_GOLDS * len(rows):
            raise ValueError(f"{name}: {count}; {rule}")
        _say(f"{name}: dropped {count}; {rule}")
    return [row for row in rows if row not in bad]


def last_number(text: str) -> str | None:
    """The last number of a text, for models that don't box their answer.

    >>> last_number("9 + 8 = 1,017."), last_number("10-12 is \u22122"), last_number("none")
    ('1,017', '\u22122', None)
    """
    found = NUMBER.findall(text)
    return found[-1] if found else None


# --- model ---


def check_precision(dtype: str, lora_rank: int, lr: float) -> None:
    """ValueError if training weights stored in bfloat16 with this learning rate does nothing.

    bfloat16 has 8 significant bits: the neighbours of a weight of 0.02 are 1.2e-4 away, and a
    change of less than half of that is rounded away. With lr 1e-6, 98 % of the weights never move.
    """
    if dtype == "bfloat16" and not lora_rank and lr < MIN_BF16_LR:
        reason = f"a change below {MIN_BF16_LR:g} is rounded away in most bfloat16 weights"
        ways = "lora_rank=64 (float32 adapters), dtype=float32, or an optimiser with stochastic"
        raise ValueError(f"lr {lr:g}: {reason}; use {ways} rounding (torchao has one)")


def find_model(model: str) -> tuple[str, dict[str, str]]:
    """Where transformers finds a model: from_pretrained's name and, for a GGUF file, gguf_file."""
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    if not path.exists():
        near = path.parent != Path() and path.parent.exists()  # else the hub is asked, for minutes
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
    folder = Path(model).expanduser()
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        _say(
            f"{model} has pickled weights; they are read as weights only, and no code in them runs"
        )
    how = {"dtype": getattr(torch, dtype), "output_loading_info": True, "weights_only": True}
    network, info = open_model(AutoModelForCausalLM, model, **how)
    if missing := sorted(info["missing_keys"]):  # transformers would draw them at random
        raise ValueError(f"model={model}: has no weights for {missing[0]}; get the whole model")
    if getattr(network.config, "quantization_config", None) and find_model(model)[1]:
        # a GGUF file has been turned into plain weights; without this it can't be saved
        network.hf_quantizer, network.is_quantized = None, False
        del network.config.quantization_config
    return network


@torch.no_grad()
def check_head(network: torch.nn.Module, model: str) -> None:
    """ValueError unless the logits are the head's output for the last hidden states: siren.py
    computes them so, in slices. Gemma 2, Cohere, Granite and a few others do more."""
    config, head = network.config.get_text_config(), network.get_output_embeddings()
    more = {name: getattr(config, name, None) for name in HEAD_FIELDS}
    more = [f"{name}={value}" for name, value in more.items() if value not in (None, 1)]
    ids = torch.arange(4)[None]
    if not more and head is not None:
        hidden = network.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits = network(input_ids=ids, use_cache=False).logits.float()
        tolerance = {"rtol": 0, "atol": 1e-3 * float(logits.abs().max())}
        if hidden.shape[-1] == head.weight.shape[-1]:
            plain = head(hidden).float()
            if plain.shape == logits.shape and torch.allclose(plain, logits, **tolerance):
                return
    what = f"has {', '.join(more)}" if more else f"is a {type(network).__name__}"
    reason = "so its logits are more than what its head makes of the hidden states"
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
    # the sampler needs the last position alone. Matmul would multiply such a slice by a frozen
    # head row by row, and some processors copy the head once per row for it (bfloat16)
    head = network.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))


def recompute_layers(network: torch.nn.Module) -> None:
    """Keep only each layer's input for the backward pass (activation checkpointing).

    The switch in transformers works in training mode alone, and siren.py never enters that: with
    dropout, the policy that is scored would not be the one that sampled.
    """
    layers = [m for m in network.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"recompute=true: {type(network).__name__} has no layers for it")
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


# --- task ---


class TextTask:
    """Questions, answers and the model that learns to answer: the interface of siren.load_task.

    eos_ids end a response (chat models have several); pad_id may be one of them, since siren.py
    masks by position.
    """

    def __init__(self, options: Options, cfg: siren.Config) -> None:
        self.options, self.max_tokens, self.seed = options, cfg.max_tokens, cfg.seed
        check_precision(options.dtype, options.lora_rank, cfg.lr)
        self.grader = Grader() if options.verifier == "math" else None
        self.equal = self.grader and self.grader.equal
        self._timeouts = 0
        train, heldout = self._read()
        self.config = open_model(AutoConfig, options.model).get_text_config()
        self.tokenizer = open_model(AutoTokenizer, options.model)
        if not self.tokenizer.chat_template:
            _say(f"{options.model} has no chat template: it reads the prompt alone")
        self.eos_ids, self.pad_id = self._find_ends()
        self._train = self._encode(train, "data")
        self._heldout = self._encode(heldout, "eval_data")

    def _read(self) -> tuple[list[Row], list[Row]]:
        """The rows to train on and those to evaluate on."""
        options = self.options
        train = matchable(read_rows(options.data), "data", self.equal)
        if options.eval_data:
            heldout = matchable(read_rows(options.eval_data), "eval_data", self.equal)
        else:
            if len(train) < 2:
                raise ValueError(f"{options.data}: one problem can't be split; give eval_data")
            last = max(1, len(train) // 10)
            train, heldout = train[:-last], train[-last:]
            _say(f"no eval_data: {last} of {last + len(train)} problems are held out")
        check_disjoint(train, heldout)
        return train, heldout

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
        most = min(self.options.max_prompt, context - self.max_tokens)
        problems = [Problem(self.encode(row.question), row.answer) for row in rows]
        kept = [problem for problem in problems if 0 < len(problem.prompt) <= most]
        if not kept:
            shortest = min(len(problem.prompt) for problem in problems)
            room = f"max_prompt {self.options.max_prompt}, context {context} and max_tokens"
            room += f" {self.max_tokens} leave {most} tokens"
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

    def heldout(self, n: int) -> dict[str, list[Problem]]:
        """n problems that are never trained on, or all of them if they are fewer."""
        if n > len(self._heldout):
            _say(f"eval_data: holds {len(self._heldout)} problems, not {n}; all are used")
            n = len(self._heldout)
        return {"heldout": random.Random("heldout").sample(self._heldout, n)}

    def build_model(self) -> torch.nn.Module:
        """The model on the CPU, with adapters and recomputed layers if wanted."""
        options = self.options
        try:
            network = read_model(options.model, options.dtype).eval()
            check_head(network, options.model)
            if options.lora_rank:
                add_lora(network, options.lora_rank, self.seed)
            if options.recompute:
                recompute_layers(network)
        except ValueError as error:
            raise siren.ConfigError(str(error)) from error
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
        """With math-verify: the answers it had no time for since the last call; they are wrong."""
        if not self.grader:
            return {}
        before, self._timeouts = self._timeouts, self.grader.timeouts
        return {"verify_timeouts": self._timeouts - before}


def _say(text: str) -> None:
    print(f"text_env: {text}", file=sys.stderr)


def load(cfg: siren.Config, **options: str) -> TextTask:
    """The task with these options, given as text.

    ValueError, in one line: an unknown option, a bad value, bad data, a model that can't be read.
    """
    return TextTask(read_options(options), cfg)
