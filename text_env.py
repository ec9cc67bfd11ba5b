r"""Questions for a pretrained language model, as a task of siren.py.

    python examples/make_data.py && python examples/get_smollm2.py  # sums, a small model
    python siren.py --model models/smollm2-135m --data data/sums_train.jsonl
    python text_env.py  # prints all options of this task

A line of a data file is {"question": "What is 9 plus 8?", "answer": "17"}. The model reads the
question in its chat template, with PROMPT around it, and is rewarded for a response such as
"9 + 8 = 17, so the answer is \boxed{17}." (docs/verifier.md says what is right). A question
may be the messages of a chat, and an answer a number. Of an answer, its one \boxed{} counts,
or what follows its ####, if it has one.
"""

import hashlib
import json
import random
import re
import sys
from collections import namedtuple
from contextlib import contextmanager, suppress
from dataclasses import replace
from decimal import Decimal
from functools import partial
from importlib import import_module
from itertools import chain, count, cycle, groupby, islice
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers

import siren
from math_answers import CUT_OFF, MAX_CHARS, Grader, equal, last_number, normalize, plain_boxes
from siren import require

# -------------------------------------------------------------------------------- 1. options
PROMPT = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."
MODEL_FORMS = "a folder that transformers loads, or a hub id such as Qwen/Qwen3-0.6B"
DATA_FORMS = "FILE.jsonl, or, with pip install datasets, FILE.parquet or hub:NAME:CONFIG:SPLIT"
OPTIONS = {  # name: default, the pattern of what is allowed, and the same in words
    "model": ("", ".+", MODEL_FORMS),
    "data": ("", ".+", f"{DATA_FORMS}; #start:stop behind it takes these rows, to train on"),
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


def read_options(given, lr):
    """The options as attributes, from a dictionary of texts; lr is the learning rate."""
    values = {name: str(default) for name, (default, _, _) in OPTIONS.items()} | given
    for name, text in values.items():
        require(name in OPTIONS, f"{name}={text!r}: no such option; {', '.join(OPTIONS)} are")
        default, pattern, words = OPTIONS[name]
        require(re.fullmatch(pattern, text, re.DOTALL), f"{name}={text!r}: needs {words}")
        values[name] = text == "true" if name == "recompute" else type(default)(text)
    options = SimpleNamespace(**values)
    # Adam's changes are about lr; bfloat16 rounds those below 6e-5 away in a weight of 0.02
    moves = options.dtype != "bfloat16" or options.lora_rank or lr >= 1e-4
    require(moves, f"lr {lr:g}: is rounded away in bfloat16; use lora_rank=64 or float32")
    return options


def say(text):
    print(f"text_env: {text}", file=sys.stderr)


@contextmanager
def one_line(where, fix):
    """Whatever is raised, by a library, a file or a model, becomes an error of one line."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0].strip(" .") or type(error).__name__
        raise ValueError(f"{where}: {reason}; {fix}") from error


# ----------------------------------------------------------------------------------- 2. data
# A question is a text or the messages of a chat, `words` its text without layout, `where` is
# FILE:LINE, for errors, and `prompt` the question as the model reads it: token ids
Row = namedtuple("Row", "question answer words where prompt", defaults=[()])


def read_rows(spec, *keys):
    """The problems of a file or a data set, or a slice of them; keys are its two columns."""
    name, *ends = re.fullmatch(r"(.*?)(?:#(-?[0-9]+)?:(-?[0-9]+)?)?", spec, re.DOTALL).groups()
    with one_line(name, f"give {DATA_FORMS}"):
        path = Path(name.removeprefix("hub:")).expanduser()
        if name.startswith("hub:"):
            path, config, split = str(path).split(":", 2)
            raws = import_module("datasets").load_dataset(path, config or None, split=split)
        elif name.endswith(".parquet"):
            raws = import_module("pyarrow.parquet").read_table(path).to_pylist()
        else:
            raws = path.read_bytes().splitlines()
    rows = [read_row(raw, f"{name}:{i}", *keys) for i, raw in enumerate(raws, 1)]
    chosen = rows[slice(*(int(end) if end else None for end in ends))]
    require(chosen, f"{spec}: selects none of the {len(rows)} problems in {name}")
    return chosen


def read_row(raw, where, question_key="question", answer_key="answer"):
    """The Row of a line of JSON or of a dictionary. An answer is never changed silently."""
    with one_line(where, f'expected {{"{question_key}": "...", "{answer_key}": "..."}}'):
        if isinstance(raw, bytes):
            raw = json.loads(raw, parse_float=Decimal, object_pairs_hook=no_twins)
        question = column(raw, question_key)
        answer = column(raw, answer_key)
        if type(answer) in (int, float, Decimal):
            most = 15 if type(answer) is float else 17  # of 0.1 + 0.2, a float has 17
            number = Decimal(str(answer))
            plain = number.is_finite() and abs(number.adjusted()) < 100
            exact = plain and len(number.as_tuple().digits) <= most
            require(exact, f"{str(answer)[:40]} has more than {most} digits; write a text")
            answer = f"{number:f}"  # 0.00001, not 1e-05
        chat = question if isinstance(question, list) else []
        require(not chat or chat[-1].get("role") != "assistant", "the chat has its response")
        texts = [message.get(part) for message in chat for part in ("role", "content")]
        for text in [answer, *(texts or [question])]:
            require(isinstance(text, str) and text.strip(), f"{str(text)[:40]!r} is no text")
            text.encode()  # refuses half a character
        answer = plain_boxes(answer)
        marks = len(re.findall(r"(?:####[\s$]*)?\\boxed|####", answer))
        require(marks <= 1, f"the answer has {marks} boxes or ####; leave the one that counts")
    answer = answer.rpartition("####")[2].strip()
    words = " ".join(" ".join(texts[1::2] or [question]).split())
    return Row(question, siren.extract_answer(answer) or answer, words, where)


def no_twins(pairs):  # of keys; Python's json would take the last of two
    require(len(dict(pairs)) == len(pairs), "a key is given twice")
    return dict(pairs)


def column(row, key):
    """What a row has under a name, or under the names of a dotted path."""
    for name in [key] if key in row else key.split("."):
        require(name in row, f"no {name} in {', '.join(map(str, row))}"[:200])
        row = row[name]
    return row


def keep(rows, fits, most, what):
    """The rows that fit. A larger share of others than `most` is an error."""
    bad = [row for row in rows if not fits(row)]
    shown = "; ".join(f"{row.where} {row.answer[:40]!r}" for row in bad[:3])
    text = f"{len(bad)} of {len(rows)} {what}: {shown}"
    require(len(bad) <= most * len(rows), text)
    if bad:
        say(f"left out: {text}")
    return [row for row in rows if fits(row)]


def matchable(rows, name, equal=equal):
    """The rows whose answer, in a box, is right by the verifier: 99 in 100 must be."""

    def fits(row):
        right = siren.verify(f"\\boxed{{{row.answer}}}", row.answer, None, equal)
        words = re.findall(r"(?<![\\{A-Za-z])[A-Za-z]{2,}", row.answer)
        prose = len(words) > (2 if "\n" in row.answer else 12) or "\\boxed" in row.answer
        return right and not prose and len(row.answer) <= MAX_CHARS

    what = f"answers of {name} can't be matched: prose, or boxes or braces that don't match"
    return keep(rows, fits, 0.01, what)


# ---------------------------------------------------------- 3. the task: prompts and verifier
class TextTask:
    """The questions, the answers and the model that learns to answer: a task of siren.Run."""

    def __init__(self, cfg, **options):
        self.cfg = cfg
        self.options = options = read_options(options, cfg.lr)
        self.normalize = normalize
        self.find_answer = last_number if options.answer_form == "last-number" else None
        exact = SimpleNamespace(equal=equal, metrics=dict)
        self.grader = Grader() if options.verifier == "math" else exact
        self.equal = self.grader.equal
        self.equal("2(a+b)", "2a+2b")  # an error if math-verify is not installed
        self.config = open_model(transformers.AutoConfig, options.model).get_text_config()
        how = {"clean_up_tokenization_spaces": False}
        self.tokenizer = open_model(transformers.AutoTokenizer, options.model, **how)
        self._check_tokens()
        rows = self._read("data")
        tenth = rows[-max(1, len(rows) // 10) :]
        self._heldout = self._read("eval_data") if options.eval_data else tenth
        held = {row.words for row in self._heldout}
        most = 0 if options.eval_data else 0.99
        what = "problems of data are evaluated on, so they can't be trained on"
        self._train = keep(rows, lambda row: row.words not in held, most, what)
        for row in self._train[:3]:  # as the model and the verifier read them
            text = self.tokenizer.decode(row.prompt)[-200:]
            say(f"{row.where}: ...{text!r}; right is {str(normalize(row.answer))[:60]!r}")

    def _check_tokens(self):
        """Find the tokens that end a response; refuse ids that the model does not have."""
        model = self.options.model
        sources = [self.config, self.tokenizer]
        if transformers.utils.has_file(self.tokenizer.name_or_path, "generation_config.json"):
            sources.append(open_model(transformers.GenerationConfig, model))
        ends = [getattr(source, "eos_token_id", None) for source in sources]
        ends = {i for ids in ends for i in (ids if isinstance(ids, list) else [ids])} - {None}
        vocab = self.config.vocab_size
        ids = {*self.tokenizer.get_vocab().values()}
        added = self.tokenizer.added_tokens_decoder  # some of these have no embedding: padding
        inside = all(type(i) is int and 0 <= i < vocab for i in ends | (ids - added.keys()))
        found = f"eos_token_id {ends}, {len(ids)} tokens up to {max(ids, default=0)}"
        rule = f"{found}; needs an EOS, four tokens, and all in the vocabulary of {vocab}"
        require(inside and ends and min(vocab, len(ids)) >= 4, f"model={model}: {rule}")
        self.eos_ids = sorted(ends)
        self.pad_id = self.eos_ids[0]  # siren.py masks by position, so any token will do
        self._with_text = ids - {i for i, token in added.items() if token.special}

    def _read(self, name):
        """The problems with their prompts, without those that leave no room for a response."""
        options = self.options
        rows = read_rows(getattr(options, name), options.question_key, options.answer_key)
        own = options.prompt != PROMPT and any(isinstance(row.question, list) for row in rows)
        require(not own, "prompt: the messages of a chat stay as they are; leave --prompt out")
        rows = matchable(rows, name, self.equal)
        with one_line(f"model={options.model}", "mend its tokenizer or chat template"):
            rows = [row._replace(prompt=self.encode(row.question)) for row in rows]
            largest, where = max((max(row.prompt), row.where) for row in rows)
            inside = largest < self.config.vocab_size  # added tokens may have no embedding
            require(inside, f"{where} has token {largest}, outside of the vocabulary")
        context = getattr(self.config, "max_position_embeddings", None) or sys.maxsize
        most = min(options.max_prompt, context - self.cfg.max_tokens)
        what = f"prompts of {name} have over {most} tokens (max_prompt, context - max_tokens)"
        return keep(rows, lambda row: len(row.prompt) <= most, 0.99, what)

    def encode(self, question):
        """The prompt for a question, a text or the messages of a chat, as token ids."""
        text = self.options.prompt.replace("{question}", str(question))
        chat = question if isinstance(question, list) else [{"role": "user", "content": text}]
        if chat is not question and not self.tokenizer.chat_template:
            return self.tokenizer(text).input_ids
        day = "{% macro strftime_now(form) %}26 Jul 2024{% endmacro %}"  # also tomorrow
        how = {"chat_template": day + self.tokenizer.get_chat_template(), "return_dict": False}
        return self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, **how)

    def train_problems(self, n, key):
        """n training problems: keys seed/1, seed/2, ... walk through all, in random orders."""
        seed, _, step = key.rpartition("/")
        start = n * (int(step) - 1 if step.isdecimal() else 0)  # problems before this step
        size = len(self._train)
        self.epoch = (start + n) / size  # how often training has gone through the problems
        self.grader.spent = 0.0  # seconds on slow answers, of a budget for each step
        epochs = (random.Random(f"train {seed} {i}") for i in count(start // size))
        walk = chain.from_iterable(epoch.sample(self._train, size) for epoch in epochs)
        return [*islice(walk, start % size, start % size + n)]

    def heldout(self, n):
        """n problems that are never trained on, or all of them if they are fewer."""
        there = len(self._heldout)
        if n > there:
            say(f"--eval-prompts {n}: only {there} are there to evaluate on; all are taken")
        return {"heldout": random.Random("heldout").sample(self._heldout, min(n, there))}

    def build_model(self):
        """The model on its device, tried, with adapters and recomputed layers if wanted."""
        network = read_model(self.options.model, self.options.dtype).eval().to(self.cfg.device)
        if self.options.lora_rank:
            add_lora(network, self.options.lora_rank, self.cfg.seed)
        if self.options.recompute:
            recompute_layers(network)
        rows = [row._replace(where="") for row in [*self._train, *self._heldout]]
        try_model(network, self.options.model, [row.prompt for row in rows], self.cfg)
        config = network.config.to_diff_dict() | {"transformers_version": ""}
        world = hashlib.sha256(ascii([rows, self.eos_ids, config]).encode())
        for weight in [p for p in network.parameters() if not p.requires_grad]:
            world.update(weight.cpu().flatten().view(torch.uint8).numpy())
        self.fingerprint = world.hexdigest()
        return network

    def decode(self, ids):
        """A response's text. A special token leaves a sign: 4 and 2 around it aren't 42."""
        ended = ids[-1] in self.eos_ids
        parts = groupby(ids[:-1] if ended else ids, self._with_text.__contains__)
        texts = [self.tokenizer.decode([*part]) if ok else "\ufffd" for ok, part in parts]
        return plain_boxes("".join(texts) + ("" if ended else CUT_OFF))

    def metrics(self, responses):
        """The epoch; with math-verify, the answers that were too slow, and so are wrong."""
        return {"epoch": self.epoch} | self.grader.metrics()


# ---------------------------------------------------------------------------------- 4. model
def open_model(what, model, **options):
    """what.from_pretrained of a model."""
    with one_line(f"model={model}: {what.__name__}", f"give {MODEL_FORMS}"):
        path = Path(model).expanduser()
        near = path.parent.name and path.parent.exists()  # a/b in a folder a is no hub id
        hub = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", model) and not near
        require(hub or path.is_dir(), "no such folder, and no name of the hub")
        return what.from_pretrained(str(path), trust_remote_code=False, **options)


def read_model(model, dtype="float32"):
    """A causal language model with the weights of its files; no code in them is run."""
    how = {"dtype": getattr(torch, dtype), "output_loading_info": True, "weights_only": True}
    network, info = open_model(transformers.AutoModelForCausalLM, model, **how)
    bad = [f"no weights for {name}" for name in sorted(info["missing_keys"])]
    for name, weight in network.named_parameters():
        bad += [] if weight.isfinite().all() else [f"weights that are not finite, in {name}"]
    require(not bad, f"model={model}: has {', '.join(bad[:1])}; get the whole model again")
    if info["unexpected_keys"]:
        say(f"model={model}: leaves out weights such as {min(info['unexpected_keys'])}")
    return network


def add_lora(network, rank, seed):
    """Freeze the weights; add trainable float32 adapters to all linear layers but the head."""
    with one_line(f"lora_rank={rank}", "pip install peft"):
        peft = import_module("peft")
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.default_generator.manual_seed(seed)
        network.add_adapter(config)  # no PeftModel around it: that would hide base_model
    peft.tuners.tuners_utils.cast_adapter_dtype(network, "default")
    # of a slice, such as the sampler's last position, some processors copy a bfloat16 head
    network.get_output_embeddings().register_forward_pre_hook(lambda _, x: x[0].contiguous())


def recompute_layers(network):
    """Keep only each layer's input. (transformers' switch needs training mode, so dropout.)"""
    kind = transformers.modeling_layers.GradientCheckpointingLayer
    layers = [m for m in network.modules() if isinstance(m, kind)]
    require(layers, f"recompute=true: {type(network).__name__} has no layers for it")
    for m in layers:
        m.forward = partial(torch.utils.checkpoint.checkpoint, m.forward, use_reentrant=False)


# ------------------------------------------------ 5. the cache, and a prompt that is read once
def adapt_cache(network, args, inputs):
    """A forward hook for models that take another cache than the sampler's."""
    cache = inputs.pop("past_key_values", None)
    if cache and network.config.model_type == "minimax":  # in a class of its own
        own = sys.modules[type(network).__module__].MiniMaxCache()
        own.layers = cache.layers
        own.linear_cache = [getattr(x, "recurrent_states", [None])[0] for x in own.layers]
        own.set_linear_cache = lambda i, states: own.update_recurrent_state(states, i)
        inputs["past_key_values"] = own
    elif cache:  # Mamba: by another name, with a mask of the new tokens
        inputs["cache_params"] = cache
        inputs["attention_mask"] = inputs["attention_mask"][:, -args[0].shape[1] :]
    return args, inputs


ROW = 1024  # tokens of responses in a row; attention takes the square of its length


def read_prompts_once(network, rollout):
    """siren.forward's hidden states [B, T, D], 0 in padding. The responses a, b, ... to a
    prompt stand in one row, and the mask lets each see the prompt and itself:

        tokens      p0 p1 p2 | a0 a1 a2 | b0 b1
        positions    0  1  2 |  3  4  5 |  3  4
        b1 sees     p0 p1 p2 |          | b0 b1
    """
    both = torch.cat([rollout.prompt, rollout.prompt_mask], 1)
    sizes = torch.unique_consecutive(both, dim=0, return_counts=True)[1].tolist()
    most = max(1, ROW // rollout.tokens.shape[1])  # responses of a prompt in one row
    parts = [part for i in torch.arange(len(both)).split(sizes) for part in i.split(most)]
    if len(parts) > 1:
        return torch.cat([read_prompts_once(network, rollout.rows(part)) for part in parts])
    prompt = rollout.prompt[0][rollout.prompt_mask[0]]
    p = len(prompt)
    row, t = rollout.mask.nonzero(as_tuple=True)  # [n] each: whose token it is, and which
    ids = torch.cat([prompt, rollout.tokens[rollout.mask]])  # [p + n]
    owner = torch.cat([torch.zeros_like(prompt), row + 1])  # 0: the prompt
    seen = ((owner == 0) | (owner == owner[:, None])).tril()  # a row of it sees a column
    mask = torch.where(seen, 0.0, torch.finfo(network.dtype).min).to(network.dtype)
    mask = mask[None, None] if len(rollout.mask) > 1 else None  # one alone needs none
    index = torch.arange(len(ids), device=ids.device)
    inputs = {"attention_mask": mask, "position_ids": torch.cat([index[:p], p + t])[None]}
    hidden = network.base_model(ids[None], **inputs, use_cache=False).last_hidden_state[0]
    hidden = hidden[torch.where(t == 0, p, index[p:]) - 1]  # [n, D]: they predict the tokens
    out = hidden.new_zeros(*rollout.mask.shape, hidden.shape[-1])
    return out.masked_scatter(rollout.mask[..., None], hidden)


# ------------------------------------------------------------------ 6. tried before training
def try_model(network, model, prompts, cfg):
    """Refuse a model that can't be trained right; let it read prompts once where it can."""
    if network.base_model is network:  # Llama 4 names a part that it does not have
        network.base_model_prefix = "model"
    if network.config.model_type in ("minimax", "mamba", "mamba2", "falcon_mamba"):
        network.register_forward_pre_hook(adapt_cache, with_kwargs=True)
    longest = max(map(len, prompts)) + cfg.max_tokens
    # beyond a limit, longrope changes all positions; the sampler's cache keeps the old ones
    config = network.config.get_text_config()
    rope = str(getattr(config, "rope_parameters", ""))
    limit = re.search(r"original_max_position_embeddings\W+(\d+)", rope)
    limit = int(limit[1]) if limit else getattr(config, "max_position_embeddings", 0)
    rule = f"positions change beyond {limit} tokens, prompt and response have up to {longest}"
    fits = not re.search("dynamic|longrope", rope) or longest <= limit
    require(fits, f"model={model}: {rule}; lower --max-prompt or --max-tokens")
    few = min(6, cfg.max_tokens)
    text = [*islice(cycle(chain.from_iterable(prompts)), longest - few)]
    name = f"model={model}: a {type(network).__name__}"
    # nats by which log-probabilities may differ in the mean, and if prompts are read once
    most, most_once = (0.08, 0.08) if network.dtype == torch.bfloat16 else (1e-3, 1e-5)
    with one_line(f"{name} can't be trained", "take another, such as Qwen"):
        gaps = gaps_of(network, text, few, cfg)
        once = gaps.pop("once")
        limits = {"its logits and its head's": 1e-3}  # the same head on the same states
        for what, gap in gaps.items():
            require(gap <= limits.get(what, most), f"{what} differ by {gap:.3g} nats")
    layers = {type(x) for x in transformers.DynamicCache(config=network.config).layers}
    if once <= most_once and layers <= {transformers.cache_utils.DynamicLayer}:
        network.read_rollout = partial(read_prompts_once, network)
    else:
        say(f"{name} reads a prompt again for each response: it has windows, states or biases")


@torch.no_grad()
def gaps_of(network, text, few, cfg):
    """Differences, in nats, that must be 0, in `few` tokens drawn after parts of a text (token
    ids), at the temperature 2: at 1 many tokens are certain, and show no gaps."""
    cfg = replace(cfg, micro_batch_size=ROW, max_tokens=few, temperature=2.0)
    problems = [SimpleNamespace(prompt=text[: len(text) * i // 3 or 1]) for i in (1, 2, 3)]
    task = SimpleNamespace(pad_id=text[0], eos_ids=[-1])
    rollout = siren.sample(network, task, problems, cfg, "try", 2, cfg.temperature)
    logp = siren.score(network, rollout, cfg)["logp"]
    prompt = rollout.prompt[:1, -len(problems[0].prompt) :]  # without padding
    alone = rollout.rows(slice(1))._replace(prompt=prompt, prompt_mask=prompt >= 0)
    ids = prompt[:, -few:]  # siren.py calls the head alone, without a soft cap behind it
    logits = network.get_output_embeddings()(network.base_model(ids).last_hidden_state)
    gaps = {
        "its logits and its head's": (network(ids).logits - logits).abs().max(),
        "sampling and scoring": rollout.logp - logp,
        "a row with padding and without": siren.score(network, alone, cfg)["logp"] - logp[:1],
        "once": torch.tensor(torch.inf),
    }
    last = torch.arange(-2, 0).repeat(1 + ROW // (2 * few))  # a full row
    network.read_rollout = partial(read_prompts_once, network)
    with suppress(Exception):  # then each response is read with its prompt
        gaps["once"] = siren.score(network, rollout.rows(last), cfg)["logp"] - logp[last]
    del network.read_rollout
    return {what: gap.abs().mean().item() for what, gap in gaps.items()}


load = TextTask  # siren.Run calls load(cfg, **options)
if __name__ == "__main__":
    for name, (default, _, words) in OPTIONS.items():
        print(f"--{name.replace('_', '-'):<12} {words} [{str(default)!r}]")
