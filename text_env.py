r"""Questions for a pretrained language model, as a task of siren.py.

    python examples/make_data.py         # sums, asked in words
    python examples/get_smollm2.py       # a model with 135 million parameters
    python siren.py --model models/smollm2-135m --data data/sums_train.jsonl
    python text_env.py                   # prints all options of this task

A line of a data file is {"question": "What is 9 plus 8?", "answer": "17"}. The model reads the
question in its own chat template, with PROMPT around it, and is rewarded for a response such
as "9 + 8 = 17, so the answer is \boxed{17}." (docs/verifier.md says what is right).

Data is FILE.jsonl (UTF-8), FILE.parquet, or hub:NAME:CONFIG:SPLIT, a data set (or a folder) of
the library datasets: hub:openai/gsm8k:main:train. FILE#start:stop takes the rows that Python's
slice takes. A question is a text, or the messages of a chat. An answer is a text or a number;
its one \boxed{} counts, or what follows its ####, if it has one.
"""

import functools
import hashlib
import inspect
import json
import math
import operator
import os
import random
import re
import sys
from contextlib import suppress
from dataclasses import replace
from decimal import Decimal
from importlib.util import find_spec
from itertools import chain, cycle, groupby, islice
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

import siren
from math_answers import MAX_ANSWER, Grader, equal, last_number, normalize, plain_boxes
from siren import require

# -------------------------------------------------------------------------------- 1. options
PROMPT = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."
MODEL_FORMS = "a folder that transformers loads, a folder with a .gguf file, or a hub id"
DATA_FORMS = "FILE.jsonl, FILE.parquet or hub:NAME:CONFIG:SPLIT, with #start:stop or without"
OPTIONS = {  # name: default, the pattern of what is allowed, and the same in words
    "model": ("", ".+", MODEL_FORMS),
    "data": ("", ".+", f"{DATA_FORMS}, to train on"),
    "eval_data": ("", ".*", "the same, to evaluate on; by default the last tenth of data"),
    "question_key": ("question", ".+", "a column, or a dotted path into one: the questions"),
    "answer_key": ("answer", ".+", "the same for answers, such as reward_model.ground_truth"),
    "prompt": (PROMPT, r".*\{question\}.*", "the user's message, with {question} in it"),
    "max_prompt": (1024, "0*[1-9][0-9]*", "a whole number of tokens: longer ones are dropped"),
    "answer_form": ("boxed", "boxed|last-number", "boxed, or last-number if there is no box"),
    "verifier": ("exact", "exact|math", "exact, or math for math-verify (docs/verifier.md)"),
    "dtype": ("float32", "float32|bfloat16", "float32 or bfloat16, of the weights"),
    "lora_rank": (0, "[0-9]+", "a whole number: train adapters of this rank; 0: the weights"),
    "recompute": ("false", "true|false", "true or false: true takes less memory, more time"),
}


def read_options(given):
    """The options as attributes, from a dictionary of texts."""
    values = {name: str(default) for name, (default, _, _) in OPTIONS.items()} | given
    for name, text in values.items():
        require(name in OPTIONS, f"{name}={text!r}: no such option; {', '.join(OPTIONS)} are")
        default, pattern, words = OPTIONS[name]
        require(re.fullmatch(pattern, text, re.DOTALL), f"{name}={text!r}: needs {words}")
        values[name] = text == "true" if name == "recompute" else type(default)(text)
    for name, off, package in (("verifier", "exact", "math-verify"), ("lora_rank", 0, "peft")):
        there = values[name] == off or find_spec(package.replace("-", "_"))
        require(there, f"{name}={values[name]}: pip install {package}")
    return SimpleNamespace(**values)


# ----------------------------------------------------------------------------------- 2. data
MAX_LINE = 1_000_000  # bytes of a line
BAD_GOLDS = 0.01  # the largest share of answers that no response can match


class Row(NamedTuple):
    question: str | list[dict]  # a text, or the messages of a chat
    answer: str
    where: str  # FILE:LINE, for errors
    prompt: list[int] = ()  # the question in the chat template, as token ids


def read_rows(spec, question_key="question", answer_key="answer"):
    """The problems of a file or a data set, or a slice of them; errors name the row."""
    path, *ends = re.fullmatch(r"(.*?)(?:#(-?\d*):(-?\d*))?", spec, re.DOTALL).groups()
    rows = []  # of all, also outside start:stop
    for raw in read_raw(path):
        rows.append(read_row(raw, f"{path}:{len(rows) + 1}", question_key, answer_key))
    chosen = rows[slice(*(int(end) if end else None for end in ends))]
    require(chosen, f"{spec}: selects none of the {len(rows)} problems in {path}")
    return chosen


def read_raw(path):
    """The lines of a file, as bytes, or the rows of a data set, as dictionaries."""
    try:
        if path.startswith("hub:"):
            from datasets import load_dataset

            _, name, config, split = (*path.split(":", 3), "", "", "")[:4]
            yield from load_dataset(os.path.expanduser(name), config or None, split=split)
        elif path.endswith(".parquet"):
            from pyarrow import parquet

            with open(os.path.expanduser(path), "rb") as file:
                yield from parquet.read_table(file).to_pylist()
        else:
            with open(os.path.expanduser(path), "rb") as file:
                file.seek(3 if file.read(3) == b"\xef\xbb\xbf" else 0)  # byte order mark
                yield from iter(lambda: file.readline(MAX_LINE + 1), b"")
    except Exception as error:  # a loader may raise whatever it likes
        missing = isinstance(error, ImportError)
        fix = f"pip install {error.name}" if missing else f"give {DATA_FORMS}"
        raise ValueError(f"{path}: {reason_of(error)}; {fix}") from error


def read_row(raw, where, *keys):
    """The Row of a line of JSON or of a dictionary. An answer is never changed silently."""
    expected = f'{where}: expected {{"{keys[0]}": "...", "{keys[1]}": "..."}}'
    if isinstance(raw, bytes):
        require(len(raw) <= MAX_LINE, f"{where}: longer than {MAX_LINE:,} bytes; split it")
        require(raw.strip(), f"{expected}; the line is empty")
        how = {"object_pairs_hook": no_twins, "parse_float": Decimal, "parse_constant": int}
        try:
            raw = json.loads(raw.decode(), **how)  # int("NaN") is an error
            json.dumps(raw, ensure_ascii=False, default=str).encode()  # no lone surrogate
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{expected}; not JSON in UTF-8 ({error})") from error
    require(isinstance(raw, dict), f"{expected}; found a {type(raw).__name__}")
    values = []
    for key in keys:
        try:
            path = [key] if key in raw else key.split(".")
            value = functools.reduce(operator.getitem, path, raw)
            what = f"{key} is {json.dumps(value, default=str)[:40]}"
        except (LookupError, TypeError):
            value = None
            what = f"no {key}, but {', '.join(raw)}"[:200]
        if key == keys[1] and type(value) in (int, float, Decimal):
            number = Decimal(str(value))
            exact = len(number.as_tuple().digits) <= 17 and abs(number.adjusted()) < 100
            require(exact, f"{where}: {what}, more than 17 digits; write it as a text")
            value = f"{number:f}"  # 0.00001, not 1e-05
        fine = is_text(value) or (key == keys[0] and is_chat(value))
        require(fine, f"{expected}, not blank; {what}")
        values.append(value)
    question = values[0]
    answer = plain_boxes(values[1])
    for mark, name in (("\\boxed", "boxes"), ("####", "####")):
        n = answer.count(mark)
        require(n <= 1, f"{where}: the answer has {n} {name}; leave the one that counts")
    answer = answer.partition("####")[2].strip() if "####" in answer else answer
    return Row(question, siren.extract_answer(answer) or answer, where)


def no_twins(pairs):  # of keys; Python's json would take the last of two
    require(len(dict(pairs)) == len(pairs), "a key is given twice")
    return dict(pairs)


def is_text(value):
    return isinstance(value, str) and bool(value.strip())


def is_chat(value):  # a list of messages, {"role": "user", "content": "..."}
    parts = value if isinstance(value, list) else [None]
    dicts = bool(parts) and all(isinstance(part, dict) for part in parts)
    return dicts and all(is_text(part.get(x)) for part in parts for x in ("role", "content"))


def matchable(rows, name, equal=equal):
    """The rows whose answer, in a box, is right by the verifier: no response to the others
    earns a reward. These are counted and shown; too many of them are an error."""
    good = []
    bad = []
    for row in rows:
        right = siren.verify(f"\\boxed{{{row.answer}}}", row.answer, None, equal)
        words = re.findall(r"(?<![\\{A-Za-z])[A-Za-z]{2,}", row.answer)
        prose = len(words) > (2 if "\n" in row.answer.strip() else 12)
        fine = right and not prose and len(row.answer) <= MAX_ANSWER
        (good if fine else bad).append(row)
    shown = "; ".join(f"{row.where} {row.answer[:40]!r}" for row in bad[:3])
    text = f"{len(bad)} of {len(rows)} answers can't be matched by any response: {shown}; an "
    text += f"answer has at most {MAX_ANSWER} characters, is no prose, its braces are balanced"
    require(len(bad) <= BAD_GOLDS * len(rows), f"{name}: {text}")
    if bad:
        say(f"{name}: dropped {text}")
    return good


def hash_of(things):
    return hashlib.sha256(ascii(things).encode()).hexdigest()


def reason_of(error):
    return str(error).strip().partition("\n")[0].strip(" .") or type(error).__name__


def say(text):
    print(f"text_env: {text}", file=sys.stderr)


# ---------------------------------------------------------------------------------- 4. model
MIN_BF16_LR = 1e-4
# what makes logits more than the output of the head, which is all that siren.py computes
HEAD_FIELDS = ["final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"]
HEAD_FIELDS += ["logit_scale", "logits_scaling", "logits_mup_width_multiplier"]
HEAD_FIELDS += ["lm_head_multiplier", "output_multiplier"]


def check_precision(dtype, lora_rank, lr):
    """bfloat16 has 8 significant bits, so in a weight of 0.02 a change below 6e-5 is rounded
    away. Adam's changes are about lr: with lr 1e-6, 98 % of the weights would never move."""
    moves = dtype != "bfloat16" or lora_rank or lr >= MIN_BF16_LR
    ways = "lora_rank=64, dtype=float32, or an optimiser with stochastic rounding (torchao's)"
    require(moves, f"lr {lr:g}: is rounded away in most bfloat16 weights; use {ways}")


def find_model(model):
    """Where transformers finds a model: its name for it, and {"gguf_file": ...} or {}."""
    path = Path(os.path.expanduser(model))  # ~nobody stays as it is
    if (path / "config.json").exists():
        return str(path), {}
    files = [path] if path.is_file() and path.suffix == ".gguf" else [*path.glob("*.gguf")]
    if len(files) == 1:
        return str(files[0].parent), {"gguf_file": files[0].name}
    near = path.parent != Path() and path.parent.exists()  # else the hub is asked, slowly
    is_path = near or model[0] in "./~" or model.count("/") > 1 or "\\" in model
    if not path.exists() and not is_path:
        return model, {}  # a hub id
    there = f"{len(files)} .gguf files, no config.json"
    what = there if path.exists() else "no such folder"
    raise ValueError(f"model={model}: {what}; give {MODEL_FORMS}")


def open_model(what, model, **options):
    """what.from_pretrained of a model."""
    folder, gguf = find_model(model)
    try:
        return what.from_pretrained(folder, trust_remote_code=False, **gguf, **options)
    except Exception as error:  # a loader on torn files may raise whatever it likes
        reason = reason_of(error)
        if gguf and isinstance(error, ImportError):
            reason = f"{reason}; pip install gguf accelerate"
        here = "" if Path(folder).exists() else "no such folder, and as a hub id: "
        raise ValueError(f"model={model}: {here}{reason}; give {MODEL_FORMS}") from error


def read_model(model, dtype="float32"):
    """A causal language model with the weights of its files, ready to be trained or saved."""
    folder = Path(os.path.expanduser(model))
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        say(f"{model} has pickled weights; they are read as weights only, no code in it runs")
    how = {"dtype": getattr(torch, dtype), "output_loading_info": True, "weights_only": True}
    network, info = open_model(AutoModelForCausalLM, model, **how)
    for name in sorted(info["missing_keys"]):  # transformers would draw them at random
        raise ValueError(f"model={model}: has no weights for {name}; get the whole model")
    for name, weight in network.named_parameters():
        rule = f"model={model}: {name} has weights that are not finite; get the model again"
        require(weight.isfinite().all(), rule)
    if getattr(network.config, "quantization_config", None) and find_model(model)[1]:
        # a GGUF file has been turned into plain weights; without this it can't be saved
        network.hf_quantizer = None
        network.is_quantized = False
        del network.config.quantization_config
    return network


def check_config(config, longest, model):
    """Refuse what siren.py can't train: a head that does more than multiply (Gemma 2, Cohere),
    and positions that change all at once when a text grows beyond a limit (longrope), since
    the sampler's cache would keep the old ones."""
    values = [(name, getattr(config, name, None)) for name in HEAD_FIELDS]
    more = ", ".join(f"{name}={value}" for name, value in values if value not in (None, 1))
    rule = "so its logits are more than what its head makes of the hidden states"
    require(not more, f"model={model}: has {more}, {rule}; take another, such as Qwen")
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *(part for part in ropes.values() if isinstance(part, dict))):
        if rope.get("rope_type") in ("dynamic", "longrope"):
            limit = rope.get("original_max_position_embeddings", 0)
            limit = limit or config.max_position_embeddings
            rule = f"positions change beyond {limit} tokens, a prompt with its response has up"
            rule = f"model={model}: {rule} to {longest}; lower --max-prompt or --max-tokens"
            require(longest <= limit, rule)


def add_lora(network, rank, seed):
    """Freeze the weights; add trainable float32 adapters to all linear layers but the head."""
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.default_generator.manual_seed(seed)
        network.add_adapter(config)  # no PeftModel around it: that would hide base_model
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    # the sampler needs the last position alone. Matmul would multiply such a slice by a frozen
    # head row by row, and some processors copy the head once per row for it (bfloat16)
    head = network.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))


def recompute_layers(network):
    """Keep only the input of each layer for the backward pass (activation checkpointing). The
    switch in transformers needs training mode, and its dropout would change the policy."""
    layers = [m for m in network.modules() if isinstance(m, GradientCheckpointingLayer)]
    require(layers, f"recompute=true: {type(network).__name__} has no layers for it")
    again = torch.utils.checkpoint.checkpoint
    for layer in layers:
        layer.forward = functools.partial(again, layer.forward, use_reentrant=False)


# ------------------------------------------------------- 5. the model, tried before training
# nats by which log-probabilities may differ, in the mean over tokens, and if prompts are read
# once; bfloat16 keeps 8 bits of a number
MOST = {torch.float32: (1e-3, 1e-5), torch.bfloat16: (0.15, 0.15)}
ROW = 1024  # tokens of responses in a row


def in_one_row(network, group):
    """The hidden states [n, D] that predict the n tokens of a prompt's responses a, b, ...:
    all stand in one row, and the mask lets a response see the prompt and itself.

        tokens      p0 p1 p2 | a0 a1 a2 | b0 b1
        positions    0  1  2 |  3  4  5 |  3  4
        b1 sees     p0 p1 p2 |          | b0 b1
    """
    prompt = group.prompt[0][group.prompt_mask[0]]
    p = len(prompt)
    row, t = group.mask.nonzero(as_tuple=True)  # [n] each: whose token it is, and which
    ids = torch.cat([prompt, group.tokens[group.mask]])  # [p + n]
    owner = torch.cat([torch.zeros_like(prompt), row + 1])  # 0: the prompt
    seen = ((owner == 0) | (owner == owner[:, None])).tril()  # a row of it sees a column
    mask = torch.where(seen, 0.0, torch.finfo(network.dtype).min).to(network.dtype)
    mask = mask[None, None] if len(group.mask) > 1 else None  # one alone needs none
    index = torch.arange(len(ids), device=ids.device)
    inputs = {"attention_mask": mask, "position_ids": torch.cat([index[:p], p + t])[None]}
    hidden = network(ids[None], **inputs, use_cache=False).last_hidden_state[0]
    return hidden[torch.where(t == 0, p, index[p:]) - 1]


def read_prompts_once(network, rollout):
    """siren.forward's hidden states [B, T, D]; padding is not read and is 0. Long responses
    get several rows, since attention takes the square of a row's length."""
    both = torch.cat([rollout.prompt, rollout.prompt_mask], 1)
    sizes = torch.unique_consecutive(both, dim=0, return_counts=True)[1].tolist()
    most = max(1, ROW // rollout.tokens.shape[1])  # responses of a prompt in one row
    indices = [part for i in torch.arange(len(both)).split(sizes) for part in i.split(most)]
    groups = [rollout.rows(index) for index in indices]
    hidden = torch.cat([in_one_row(network.base_model, group) for group in groups])  # [N, D]
    out = hidden.new_zeros(*rollout.mask.shape, hidden.shape[-1])
    return out.masked_scatter(rollout.mask[..., None], hidden)


def rename_cache(network, args, inputs):
    """A forward hook for Mamba, whose cache has another name; its mask is of new tokens."""
    if "past_key_values" in inputs:
        inputs["cache_params"] = inputs.pop("past_key_values")
        inputs["attention_mask"] = inputs["attention_mask"][:, -args[0].shape[1] :]
    return args, inputs


def lend_layers(network, args, inputs):
    """A forward hook for MiniMax: a cache of its own class, with the sampler's layers."""
    if "past_key_values" in inputs:
        own = sys.modules[type(network).__module__].MiniMaxCache()
        own.layers = inputs["past_key_values"].layers
        own.linear_cache = [getattr(x, "recurrent_states", [None])[0] for x in own.layers]
        own.set_linear_cache = lambda i, states: own.update_recurrent_state(states, i)
        return args, inputs | {"past_key_values": own}


@torch.no_grad()
def gaps_of(network, prompts, pad_id, cfg, copies):
    """Differences, in nats, of log-probabilities that must be equal: what is sampled and what
    is scored; the first row, which has padding, and the same alone; and, unless `copies` is 0,
    so many of the last prompt's two responses in one row and each with its prompt."""
    vocab = len(network.get_output_embeddings().weight)
    ends = [*range(0, vocab, 16)] if len(prompts) > 1 else [-1]  # some responses end early
    problems = [SimpleNamespace(prompt=prompt) for prompt in prompts]
    task = SimpleNamespace(pad_id=pad_id, eos_ids=ends)
    rollout = siren.sample(network, task, problems, cfg, "try", 2, cfg.temperature)
    logp = siren.score(network, rollout, cfg)["logp"]
    gaps = {"sampling and scoring": (rollout.logp - logp)[rollout.mask]}
    n = -len(prompts[0])
    row = siren.Rollout(*(x[:1] for x in rollout))
    row = row._replace(prompt=row.prompt[:, n:], prompt_mask=row.prompt_mask[:, n:])
    alone = siren.score(network, row, cfg)["logp"]
    gaps["a row with padding and without"] = (alone - logp[:1])[row.mask]
    if copies:
        last = torch.arange(-2, 0).repeat(copies)
        cfg = replace(cfg, micro_batch_size=len(last))
        network.read_rollout = functools.partial(read_prompts_once, network)
        with suppress(Exception):  # a model may raise whatever it likes
            once = siren.score(network, rollout.rows(last), cfg)["logp"]
            gaps["once"] = (once - logp[last])[rollout.mask[last]]
        del network.read_rollout
    return {what: gap.abs().mean().item() for what, gap in gaps.items()}


def try_model(network, model, prompts, longest, pad_id, cfg):
    """Before any training: refuse a model that can't be trained right, and let it read each
    prompt once for all of its responses if that gives the same numbers."""
    check_config(network.config.get_text_config(), longest, model)
    if network.base_model is network:  # Llama 4 names a part that it does not have
        network.base_model_prefix = "model"
    if "cache_params" in inspect.signature(network.forward).parameters:
        network.register_forward_pre_hook(rename_cache, with_kwargs=True)
    if network.config.model_type == "minimax":
        network.register_forward_pre_hook(lend_layers, with_kwargs=True)
    prompts = sorted(prompts, key=len)
    half = prompts[0][len(prompts[0]) // 2 :]  # so that one is padded in any case
    few = min(6, cfg.max_tokens)
    full = [*islice(cycle(chain(*reversed(prompts))), longest - few)]  # the run's longest
    tries = [[half, prompts[len(prompts) // 2], prompts[-1]], [full]]
    row = min(ROW, min(cfg.group_size, cfg.micro_batch_size) * cfg.max_tokens)  # the run's
    how = {"sample_batch": 6, "micro_batch_size": min(2, cfg.micro_batch_size)}
    how |= {"max_tokens": few, "temperature": 2.0}  # at 1 many tokens are certain: no gaps
    name = f"model={model}: a {type(network).__name__}"
    most, most_once = MOST[network.dtype]
    try:
        layers = DynamicCache(config=network.config).layers
        plain = all(type(layer) is DynamicLayer for layer in layers)  # no windows, no states
        how = (pad_id, replace(cfg, **how), plain * (1 + row // (2 * few)))
        found = [gaps_of(network, some, *how) for some in tries]
    except Exception as error:  # a model may raise whatever it likes
        raise ValueError(f"{name} can't be sampled and scored: {reason_of(error)}") from error
    once = [gaps.pop("once", math.inf) <= most_once for gaps in found]
    for what, gap in (pair for gaps in found for pair in gaps.items()):
        require(gap <= most, f"{name} can't be trained: {what} differ by {gap:.3g} nats")
    if all(once):
        network.read_rollout = functools.partial(read_prompts_once, network)
    else:
        why = "its layers have windows, states or biases of their own"
        say(f"{name} reads a prompt again for each response: {why}")


# ----------------------------------------------------------------------------------- 6. task
CUT_OFF = "[cut off]"  # what decode writes after a response that never ended
NO_TEXT = "\ufffd"  # what decode writes for a token that has no text, such as <pad>


class TextTask:
    """The questions, the answers and the model that learns to answer: a task of siren.Run."""

    def __init__(self, cfg, **options):
        self.cfg = cfg
        self.options = options = read_options(options)
        check_precision(options.dtype, options.lora_rank, cfg.lr)
        self.normalize = normalize
        self.grader = Grader() if options.verifier == "math" else None
        self.equal = self.grader.equal if self.grader else equal
        self.config = open_model(AutoConfig, options.model).get_text_config()
        self.tokenizer = open_model(AutoTokenizer, options.model)
        if not self.tokenizer.chat_template:
            say(f"{options.model} has no chat template: it reads the prompt alone")
        self._check_tokens()
        self._train = self._read(options.data, "data")
        if options.eval_data:
            self._heldout = self._read(options.eval_data, "eval_data")
        else:
            last = max(1, len(self._train) // 10)
            say(f"no eval_data: {last} of {len(self._train)} problems are held out")
            self._train, self._heldout = self._train[:-last], self._train[-last:]
        require(self._train, f"{options.data}: one problem can't be split; give eval_data")
        seen = {" ".join(str(row.question).split()): row.where for row in self._train}
        for row in self._heldout:
            twin = seen.get(" ".join(str(row.question).split()))
            require(not twin, f"{row.where}: is also trained on ({twin}); remove one of them")
        for row in self._train[:3]:  # as the model and the verifier read them
            text = self.tokenizer.decode(row.prompt)
            text = text if len(text) < 200 else f"{text[:100]} ... {text[-90:]}"
            say(f"{row.where}: {text!r}; right is {str(normalize(row.answer))[:60]!r}")
        rows = [row._replace(where="") for row in [*self._train, *self._heldout]]
        self.fingerprint = self._rows = hash_of(rows)  # compared on --resume

    def _check_tokens(self):
        """Find the tokens that end a response, and the padding; refuse what does not fit."""
        where = f"model={self.options.model}"
        folder = Path(find_model(self.options.model)[0])
        generation = None
        try:
            generation = GenerationConfig.from_pretrained(str(folder))
        except Exception as error:  # the file is optional, but must not be torn
            torn = not isinstance(error, OSError) or "valid JSON" in str(error)
            torn = torn or (folder / "generation_config.json").exists()
            require(not torn, f"{where}: generation_config.json: {reason_of(error)}")
        vocab = self.config.vocab_size
        ends = set()
        for source in (self.config, self.tokenizer, generation):
            ids = getattr(source, "eos_token_id", None)
            ends |= set(ids if isinstance(ids, list) else [ids])
        ends -= {None}  # chat models have several
        require(ends, f"{where}: its config needs an eos_token_id")
        inside = all(type(i) is int and 0 <= i < vocab for i in ends)
        require(inside, f"{where}: eos_token_id {ends} is outside its vocabulary of {vocab}")
        self.eos_ids = sorted(ends)
        pad = self.tokenizer.pad_token_id
        known = pad is not None and pad < vocab  # else it has no embedding
        self.pad_id = pad if known else self.eos_ids[0]  # siren.py masks by position
        added = self.tokenizer.added_tokens_decoder
        ids = {*self.tokenizer.get_vocab().values()}
        self._with_text = ids - {i for i, token in added.items() if token.special}
        few = min(vocab, len(ids))
        require(few >= 4, f"{where}: has {few} tokens; take one with at least four")
        most = max(ids - added.keys(), default=0)  # added ones may lack an embedding
        rule = f"{where}: its tokenizer has ids up to {most}, its vocabulary is {vocab}"
        require(most < vocab, f"{rule}; take the tokenizer of this model")

    def _read(self, spec, name):
        """The problems with their prompts, without those that leave no room for a response."""
        keys = (self.options.question_key, self.options.answer_key)
        rows = matchable(read_rows(spec, *keys), name, self.equal)
        rows = [row._replace(prompt=self.encode(row.question)) for row in rows]
        for row in rows:
            known = max(row.prompt, default=0) < self.config.vocab_size
            require(known, f"{row.where}: has tokens outside the vocabulary of the model")
        context = getattr(self.config, "max_position_embeddings", None) or sys.maxsize
        most = min(self.options.max_prompt, context - self.cfg.max_tokens)
        kept = [row for row in rows if 0 < len(row.prompt) <= most]
        shortest = min(len(row.prompt) for row in rows)
        limits = f"context {context} and max_tokens {self.cfg.max_tokens} leave {most} tokens"
        require(kept, f"{name}: max_prompt, {limits}, the shortest prompt has {shortest}")
        dropped = len(rows) - len(kept)
        if dropped:
            say(f"{name}: dropped {dropped} of {len(rows)} prompts, over {most} tokens")
        return kept

    def encode(self, question):
        """The prompt for a question, a text or the messages of a chat, as token ids."""
        if isinstance(question, str):
            text = self.options.prompt.replace("{question}", question)
            if not self.tokenizer.chat_template:
                return self.tokenizer(text).input_ids
            question = [{"role": "user", "content": text}]
        how = {"add_generation_prompt": True, "tokenize": False}
        try:
            text = self.tokenizer.apply_chat_template(question, **how)
        except Exception as error:  # a template is a program, which may raise anything
            rule = f"its chat template fails: {reason_of(error)}"
            raise ValueError(f"model={self.options.model}: {rule}") from error
        return self.tokenizer(text, add_special_tokens=False).input_ids  # they are in the text

    epoch = None  # how many times training has gone through the problems

    def train_problems(self, n, key):
        """n training problems, decided by n and key. Steps 1, 2, ... (the keys seed/1, seed/2,
        ...) walk through all problems in a random order, a new one for each epoch."""
        found = re.fullmatch(r"(.*)/([1-9][0-9]*)", key)
        seed, step = found.groups() if found else (key, 1)
        size = len(self._train)
        end = int(step) * n  # problems that have come when the step is over
        drawn = []
        for epoch in range((end - n) // size, -(-end // size)):
            drawn += random.Random(f"train {seed} {epoch}").sample(self._train, size)
        self.epoch = end / size
        if self.grader:
            self.grader.spent = 0.0
        return drawn[(end - n) % size :][:n]

    def heldout(self, n):
        """n problems that are never trained on, or all of them if they are fewer."""
        there = len(self._heldout)
        if n > there:
            say(f"eval_data: holds {there} problems, not {n}; all are used")
        return {"heldout": random.Random("heldout").sample(self._heldout, min(n, there))}

    def build_model(self):
        """The model on its device, tried, with adapters and recomputed layers if wanted."""
        network = read_model(self.options.model, self.options.dtype).eval().to(self.cfg.device)
        if self.options.lora_rank:
            add_lora(network, self.options.lora_rank, self.cfg.seed)
        if self.options.recompute:
            recompute_layers(network)
        prompts = [row.prompt for row in [*self._train, *self._heldout]]
        longest = max(map(len, prompts)) + self.cfg.max_tokens
        try_model(network, self.options.model, prompts, longest, self.pad_id, self.cfg)
        frozen = [p.flatten() for p in network.parameters() if not p.requires_grad]
        sums = [p.view(torch.int16).sum().item() for p in frozen]  # of bits, so it is exact
        self.fingerprint = self._rows + hash_of(sums)
        return network

    def decode(self, ids):
        """The text of a response (token ids), without the token that ends it. Special tokens
        elsewhere leave a sign: without it, 4 and 2 around one of them would become 42."""
        ended = not ids or ids[-1] in self.eos_ids
        parts = groupby(ids[:-1] if ended else ids, self._with_text.__contains__)
        how = {"clean_up_tokenization_spaces": False}
        texts = (self.tokenizer.decode([*ids], **how) if ok else NO_TEXT for ok, ids in parts)
        return plain_boxes("".join(texts) + ("" if ended else CUT_OFF))

    def find_answer(self, text):
        """The last number of a text, if that may be the answer and was not cut off."""
        boxed = self.options.answer_form == "boxed"
        return None if boxed or text.endswith(CUT_OFF) else last_number(text)

    def metrics(self, responses):
        """The epoch; with math-verify, the answers that were too slow, and so are wrong."""
        found = {} if self.epoch is None else {"epoch": self.epoch}
        return found | (self.grader.metrics() if self.grader else {})


load = TextTask  # siren.Run calls load(cfg, **options)
if __name__ == "__main__":
    for name, (default, _, words) in OPTIONS.items():
        print(f"--{name.replace('_', '-'):<12} {words} [{str(default)!r}]")
