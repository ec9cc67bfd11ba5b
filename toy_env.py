"""A toy world where keeping several ways open pays: adding up numbers with gaps in one's knowledge.

One token is one number. The prompt lists terms; the response starts with any of them, then writes
"next term, running sum" until all are used. It is right if its last number is the right total:

    prompt      8 3 1 5 2 6 =                        token ids  11 6 4 8 5 9 2
    response    8 5 13 1 14 3 17 6 23 2 25 <eos>     token ids  11 8 16 4 17 6 20 9 26 5 28 1

(0 is <pad>, 1 is <eos>, 2 is `=`, the number n is n + 3.) It reads: 8, + 5 = 13, + 1 = 14, ...
Which term comes next is a real choice with many right ways; the sums are facts. Numbers that no
terms add up to are the useless part of a large vocabulary, where an unguided entropy bonus leads.

The base model learns from a sloppy teacher. He slips now and then, and he has *gaps*: for some
fixed pairs (running sum, next term) he always writes the same wrong sum, such as 14 for 8 + 5. The
model hardly ever samples the right sum there, so reinforcement learning can't teach it; the policy
can only go round the gap by adding in another order. That is why diversity is worth something: a
policy that has collapsed onto one order per prompt meets that order's gap in every sample, while
one that kept its forks open meets different gaps, whose wrong totals disagree where the right ones
agree.

    python toy_env.py                            a problem, a demonstration and the world's sizes
    python toy_env.py --gap-share 0.3 --seed 3   the same for another world
    python toy_env.py --rebuild-base             teach the base model again (1-2 minutes), store it
    python toy_env.py --check-base               teach a fresh one: as good as the stored one?
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import sys
import uuid
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, combinations_with_replacement, cycle, product
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM

PAD, EOS, EQUALS, ZERO = 0, 1, 2, 3  # token ids; the number n is token n + ZERO
NAMES = {PAD: "<pad>", EOS: "<eos>", EQUALS: "="}
GAP_ERRORS = (-2, -1, 1, 2, 10)  # how far a gap's sum is off
SLIP_ERRORS = (-10, -2, -1, 1, 2, 10)
SPLITS = ("train",) * 5 + ("validation",) * 2 + ("test",) * 3  # tenths of the multisets of terms
FORMAT = 1  # raise it when the world or the teaching changes: stored base models are then refused
HERE = Path(__file__).resolve().parent


class Problem(NamedTuple):
    """A prompt (token ids) and its right answer (text)."""

    prompt: list[int]
    answer: str


def split_of(terms: Iterable[int]) -> str:
    """The part of the world a prompt belongs to, whatever its order: the terms may be added in any.

    >>> split_of([8, 3, 1, 5, 2, 6]), split_of([1, 2, 3, 5, 6, 8])
    ('test', 'test')
    """
    text = " ".join(map(str, sorted(terms)))
    return SPLITS[zlib.crc32(text.encode()) % len(SPLITS)]


def count_orders(terms: Sequence[int]) -> int:
    """The number of different orders of these terms.

    >>> count_orders([1, 1, 2])
    3
    """
    repeats = map(math.factorial, Counter(terms).values())
    return math.factorial(len(terms)) // math.prod(repeats)


def knob(default: float, doc: str) -> Any:
    """A dataclass field whose documentation also feeds `--help`."""
    return field(default=default, metadata={"help": doc})


@dataclass(frozen=True)
class ToyWorld:
    """The world and its base model; its fields are all that the base model depends on."""

    # prompts
    min_terms: int = knob(6, "fewest terms in a prompt")
    max_terms: int = knob(6, "most terms in a prompt")
    max_term: int = knob(9, "the terms are numbers from 1 to this")
    min_total: int = knob(20, "smallest total of a prompt")
    max_total: int = knob(38, "largest total: larger ones are rare, and policies degenerate there")
    vocab: int = knob(256, "number of tokens; most are numbers that no terms add up to")
    # the teacher
    gap_share: float = knob(0.25, "share of the pairs (running sum, next term) that are gaps")
    slip: float = knob(0.1, "probability that another sum is off by 1, 2 or 10")
    noise: float = knob(0.005, "probability that a number is replaced by any number")
    # the base model
    hidden: int = knob(64, "width, a multiple of 8")
    layers: int = knob(2, "depth")
    base_steps: int = knob(1800, "steps of teaching: until only gaps and slips are left")
    base_batch: int = knob(64, "demonstrations per step")
    seed: int = knob(0, "draws the gaps, the demonstrations and the initial weights")

    pad_id: ClassVar[int] = PAD
    eos_ids: ClassVar[list[int]] = [EOS]
    equal: ClassVar[None] = None

    def __post_init__(self) -> None:
        def require(ok: bool, names: str, rule: str) -> None:
            if not ok:
                given = ", ".join(f"{name}={getattr(self, name)}" for name in names.split())
                raise ValueError(f"{given}: needs {rule}")

        for name in ("max_term", "layers", "base_steps", "base_batch"):
            require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("gap_share", "slip", "noise"):
            require(0 <= getattr(self, name) <= 1, name, "a probability from 0 to 1")
        require(self.hidden >= 8 and self.hidden % 8 == 0, "hidden", "a multiple of 8, such as 64")
        lengths = range(self.min_terms, self.max_terms + 1)
        few = 2 <= self.min_terms <= self.max_terms <= 16
        require(few, "min_terms max_terms", "2 <= min_terms <= max_terms <= 16")
        size = sum(math.comb(self.max_term + k - 1, k) for k in lengths)  # all are enumerated
        rule = f"at most 200000 multisets of terms, not {size}; lower one of them"
        require(size <= 200_000, "max_terms max_term", rule)
        largest = max(self.max_sum, self.max_total + max(SLIP_ERRORS) * (self.max_terms - 1))
        rule = f"at least {largest + ZERO + 2}, for all that the teacher writes"
        require(self.vocab >= largest + ZERO + 2, "vocab", rule)
        for k in lengths:
            found = any(len(terms) == k for terms in self.multisets["train"])
            rule = f"a training prompt of {k} terms with such a total; widen the totals"
            require(found, "min_total max_total max_term", rule)

    # --- tokens and text ---

    @property
    def max_sum(self) -> int:
        """The largest number that terms can add up to; larger ones are useless."""
        return self.max_terms * self.max_term

    @property
    def max_tokens(self) -> int:
        """A response budget: a full response has 2 * max_terms tokens, 4 are to spare."""
        return 2 * self.max_terms + 4

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, the inverse of `decode`.

        >>> ToyWorld().encode("8 3 1 5 2 6 =")
        [11, 6, 4, 8, 5, 9, 2]
        """
        ids = {self.decode([token]): token for token in range(self.vocab)}
        unknown = [word for word in text.split() if word not in ids]
        if unknown:
            known = f"{', '.join(NAMES.values())} or a number up to {self.vocab - ZERO - 1}"
            raise ValueError(f"{unknown[0]!r} is no token of this world; write {known}")
        return [ids[word] for word in text.split()]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids.

        >>> ToyWorld().decode([11, 8, 16, 1, 0])
        '8 5 13 <eos> <pad>'
        """
        return " ".join(NAMES.get(int(token), str(int(token) - ZERO)) for token in ids)

    def answer_form(self, text: str) -> str | None:
        """The number right before the end; a response that never ended has no answer.

        >>> ToyWorld().answer_form("8 5 13 <eos>"), ToyWorld().answer_form("8 5 13")
        ('13', None)
        """
        *_, number, end = ["", "", *text.split()]
        return number if end == NAMES[EOS] and number.isascii() and number.isdigit() else None

    def metrics(self, responses: Sequence[Sequence[int]]) -> dict[str, float]:
        """The share of all tokens of these responses (token ids) that are useless numbers.

        >>> ToyWorld().metrics([[11, 8, 16, 1], [200]])
        {'useless_share': 0.2}
        """
        tokens = [token for response in responses for token in response]
        useless = sum(token > self.max_sum + ZERO for token in tokens)
        return {"useless_share": useless / max(1, len(tokens))}

    # --- the world: its gaps and its prompts ---

    @cached_property
    def gaps(self) -> dict[tuple[int, int], int]:
        """(running sum, next term) -> the wrong sum that the teacher always writes.

        >>> ToyWorld().gaps[8, 5]
        14
        """
        rng = random.Random(f"gaps {self.seed}")
        pairs = list(product(range(1, self.max_sum + 1), range(1, self.max_term + 1)))
        rng.shuffle(pairs)
        chosen = pairs[: round(self.gap_share * len(pairs))]
        return {(total, term): total + term + rng.choice(GAP_ERRORS) for total, term in chosen}

    def gap_free_share(self, terms: Iterable[int]) -> Fraction:
        """The exact share of the orders of these terms that meet no gap.

        By induction over the last term: an order meets none if the others' order meets none and
        (sum of the others, last term) is none.

        >>> ToyWorld().gap_free_share([8, 5, 1])  # 2 of 6 meet one: 8 + 5 in 8 5 1, 5 + 1 in 5 1 8
        Fraction(2, 3)
        """
        key = tuple(sorted(terms))
        if len(key) < 2:
            return Fraction(1)
        if key not in self._shares:
            share = Fraction(0)
            for i, last in enumerate(key):
                if (sum(key) - last, last) not in self.gaps:
                    share += self.gap_free_share(key[:i] + key[i + 1 :])
            self._shares[key] = share / len(key)
        return self._shares[key]

    @cached_property
    def _shares(self) -> dict[tuple[int, ...], Fraction]:
        return {}  # what gap_free_share has found out

    def grade(self, terms: Iterable[int]) -> str:
        """How many orders meet no gap: "easy" >= 30 %, "medium", "hard" <= 12 %, "closed" none."""
        percent = 100 * self.gap_free_share(terms)
        if percent >= 30:
            return "easy"
        return "closed" if percent == 0 else "hard" if percent <= 12 else "medium"

    @cached_property
    def multisets(self) -> dict[str, list[tuple[int, ...]]]:
        """Split -> every multiset of terms (sorted) whose total is in range."""
        found: dict[str, list[tuple[int, ...]]] = {split: [] for split in SPLITS}
        for length in range(self.min_terms, self.max_terms + 1):
            for terms in combinations_with_replacement(range(1, self.max_term + 1), length):
                if self.min_total <= sum(terms) <= self.max_total:
                    found[split_of(terms)].append(terms)
        return found

    # --- problems and demonstrations ---

    @cached_property
    def _train_weights(self) -> list[float]:
        """Cumulative: chances of the training multisets if terms are drawn until they fit."""
        pool = self.multisets["train"]
        return list(accumulate(count_orders(t) / self.max_term ** len(t) for t in pool))

    def _draw(self, n: int, rng: random.Random) -> list[list[int]]:
        drawn = rng.choices(self.multisets["train"], cum_weights=self._train_weights, k=n)
        return [rng.sample(terms, len(terms)) for terms in drawn]

    def problem(self, terms: Sequence[int]) -> Problem:
        """The problem of adding up these terms.

        >>> ToyWorld().problem([8, 3, 1, 5, 2, 6])
        Problem(prompt=[11, 6, 4, 8, 5, 9, 2], answer='25')
        """
        return Problem([term + ZERO for term in terms] + [EQUALS], str(sum(terms)))

    def train_problems(self, n: int, seed: str) -> list[Problem]:
        """n problems of the training split, drawn with replacement; depends on n and seed alone."""
        return [self.problem(terms) for terms in self._draw(n, random.Random(f"train {seed}"))]

    def heldout(self, n: int, split: str = "test") -> dict[str, list[Problem]]:
        """n different problems each of grade "easy" and "hard", in no order seen by training.

        They are spread evenly over the split's multisets; depends on n and split alone.
        """
        if split not in self.multisets:
            raise ValueError(f"split={split!r}: needs one of {', '.join(self.multisets)}")
        return {grade: self._heldout(n, split, grade) for grade in ("easy", "hard")}

    def _heldout(self, n: int, split: str, grade: str) -> list[Problem]:
        pool = [terms for terms in self.multisets[split] if self.grade(terms) == grade]
        available = sum(map(count_orders, pool))
        if not 1 <= n <= available:
            rule = f"1 <= n <= {available}, the number of {grade} {split} prompts"
            raise ValueError(f"n={n}: needs {rule}; lower n, or change gap_share or the terms")
        rng = random.Random(f"heldout {split} {grade}")
        rng.shuffle(pool)
        found: dict[tuple[int, ...], None] = {}  # as an ordered set
        rounds = cycle(pool)
        while len(found) < n:
            terms = next(rounds)
            found[tuple(rng.sample(terms, len(terms)))] = None
        return [self.problem(terms) for terms in found]

    def demonstration(self, terms: Sequence[int], rng: random.Random) -> list[int]:
        """A response (token ids) of the teacher: random order, gaps, slips and noise."""
        total, *rest = rng.sample(list(terms), len(terms))
        numbers = [total]
        for term in rest:
            right = total + term
            slipped = max(0, right + rng.choice(SLIP_ERRORS)) if rng.random() < self.slip else right
            total = self.gaps.get((total, term), slipped)
            numbers += [term, total]
        tokens = [number + ZERO for number in numbers]
        noisy = [
            rng.randrange(ZERO, self.vocab) if rng.random() < self.noise else t for t in tokens
        ]
        return [*noisy, EOS]

    # --- the base model ---

    def model_config(self) -> Qwen2Config:
        """A tiny Qwen2: 124 thousand parameters by default."""
        return Qwen2Config(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=3 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            eos_token_id=EOS,
            bos_token_id=None,
        )

    def _new_model(self) -> Qwen2ForCausalLM:
        with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
            torch.default_generator.manual_seed(self.seed)  # of the CPU alone
            model = Qwen2ForCausalLM(self.model_config())
        return model.eval()  # for teaching as well: it has no dropout

    def teach(self) -> tuple[Qwen2ForCausalLM, float]:
        """A base model taught by demonstrations, and its loss (nats per token, last 50 steps)."""
        model, rng, losses = self._new_model(), random.Random(f"teach {self.seed}"), []
        opt = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # so that the order of additions doesn't depend on the cores
        try:
            for step in (bar := tqdm(range(self.base_steps), "teaching the base model")):
                lr = 2e-3 * min(1, (step + 1) / 50) * (1 - 0.9 * step / self.base_steps)
                opt.param_groups[0]["lr"] = lr  # warm up, then down to a tenth
                loss = self._teaching_loss(model, rng)
                opt.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                opt.step()
                losses = [*losses[-49:], loss.item()]
                bar.set_postfix(loss=f"{sum(losses) / len(losses):.3f}", refresh=False)
        finally:
            torch.set_num_threads(threads)
        return model, sum(losses) / len(losses)

    def _teaching_loss(self, model: Qwen2ForCausalLM, rng: random.Random) -> torch.Tensor:
        """The mean cross-entropy of one batch's response tokens; prompts are not learned."""
        batch = [
            (self.problem(terms).prompt, self.demonstration(terms, rng))
            for terms in self._draw(self.base_batch, rng)
        ]
        width = max(len(prompt) + len(response) for prompt, response in batch)
        ids = torch.full((len(batch), width), PAD)  # [B, T]
        labels = torch.full_like(ids, -100)  # what cross_entropy leaves out
        for i, (prompt, response) in enumerate(batch):
            end = len(prompt) + len(response)
            ids[i, :end] = torch.tensor(prompt + response)
            labels[i, len(prompt) : end] = ids[i, len(prompt) : end]
        # no attention mask: the pads are on the right, where no token looks
        logits = model(input_ids=ids, use_cache=False).logits  # [B, T, V]
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    @property
    def base_file(self) -> Path:
        """Where the base model is: the default world's ships with the code, others are cached."""
        if self == ToyWorld():
            return HERE / "assets" / "toy_base_seed0.safetensors"
        return HERE / ".cache" / f"toy_base_{self.fingerprint}.safetensors"

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with every field of the world."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def build_model(self) -> Qwen2ForCausalLM:
        """The base model: read from its file, else taught (1-2 minutes) and stored there."""
        if not self.base_file.exists():
            self.store(self.teach()[0])
        with safe_open(self.base_file, "pt") as file:
            world = (file.metadata() or {}).get("world")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if world != self.fingerprint:
            fix = "run `python toy_env.py --rebuild-base` with this world's options"
            raise ValueError(
                f"{self.base_file.name} is of world {world}, not {self.fingerprint}; {fix}"
            )
        model = self._new_model()
        state["lm_head.weight"] = state["model.embed_tokens.weight"]  # tied
        model.load_state_dict(state)
        return model

    def store(self, model: Qwen2ForCausalLM) -> None:
        """Write the base model's file: whole or not at all, even if two processes do so at once."""
        state = model.state_dict()
        del state["lm_head.weight"]  # tied to the embedding, so it is stored once
        self.base_file.parent.mkdir(parents=True, exist_ok=True)
        part = self.base_file.with_suffix(f".{uuid.uuid4().hex}.part")
        try:
            part.write_bytes(save(state, metadata={"world": self.fingerprint}))
            os.replace(part, self.base_file)
        finally:
            part.unlink(missing_ok=True)


def load(cfg=None, **options: str) -> ToyWorld:
    """The world with these options, given as text.

    >>> load(min_terms="5", max_terms="7", seed="3").max_terms
    7
    """
    types = {option.name: type(option.default) for option in fields(ToyWorld)}
    values = {}
    for name, text in options.items():
        if name not in types:
            raise ValueError(f"{name}={text!r}: no such option; choose from {', '.join(types)}")
        try:
            values[name] = types[name](text)
        except ValueError:
            raise ValueError(f"{name}={text!r}: needs {types[name].__name__}, such as 1") from None
    return ToyWorld(**values)


# --- command line ---


def accuracy(world: ToyWorld, model: Qwen2ForCausalLM, problems: Sequence[Problem]) -> float:
    """The share of problems that one sample at temperature 1 gets right."""
    width = max(len(problem.prompt) for problem in problems)
    rows = [[PAD] * (width - len(problem.prompt)) + problem.prompt for problem in problems]
    ids, correct = torch.tensor(rows), 0  # [N, P], padded on the left
    plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        out = model.generate(
            ids, attention_mask=(ids != PAD).long(), max_new_tokens=world.max_tokens, **plain
        )
    for problem, response in zip(problems, out[:, width:].tolist(), strict=True):
        end = response.index(EOS) + 1 if EOS in response else None  # pads follow
        correct += world.answer_form(world.decode(response[:end])) == problem.answer
    return correct / len(problems)


def check_base(world: ToyWorld, n: int = 1000) -> bool:
    """Is a freshly taught base model as good as the stored one on n easy and n hard problems?"""
    problems = [problem for group in world.heldout(n).values() for problem in group]
    stored = accuracy(world, world.build_model(), problems)
    fresh = accuracy(world, world.teach()[0], problems)
    error = math.sqrt((stored * (1 - stored) + fresh * (1 - fresh)) / len(problems))
    allowed = 4 * error + 0.03  # chance, and what other hardware may change
    print(f"stored {stored:.3f}, fresh {fresh:.3f}: differ by at most {allowed:.3f} is fine")
    return abs(stored - fresh) <= allowed


def show(world: ToyWorld) -> None:
    """Print a problem, a demonstration with the gaps that it met, and the world's sizes."""
    problem = world.train_problems(1, "show")[0]
    terms = [token - ZERO for token in problem.prompt[:-1]]
    response = world.demonstration(terms, random.Random("show"))
    first, *steps = (token - ZERO for token in response[:-1])
    print(f"prompt         {world.decode(problem.prompt)}")
    print(f"demonstration  {world.decode(response)}   (right: {problem.answer})")
    for total, term, written in zip([first, *steps[1::2]], steps[::2], steps[1::2], strict=False):
        if world.gaps.get((total, term)) == written:
            print(f"gap            {total} + {term} is {total + term}, he writes {written}")
    print(f"gap-free       {float(world.gap_free_share(terms)):.1%} of this prompt's orders")
    print(f"gaps           {len(world.gaps)} of {world.max_sum * world.max_term} pairs")
    for split, multisets in world.multisets.items():
        grades = sorted(Counter(map(world.grade, multisets)).items())
        sizes = ", ".join(f"{count} {grade}" for grade, count in grades)
        print(f"{split:<14} {len(multisets)} multisets of terms: {sizes}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="A toy world: sums with gaps.")
    parser.add_argument(
        "--rebuild-base", action="store_true", help="teach the base model, store it"
    )
    parser.add_argument("--check-base", action="store_true", help="compare it with a fresh one")
    for option in fields(ToyWorld):
        doc, flag = option.metadata["help"], "--" + option.name.replace("_", "-")
        parser.add_argument(
            flag, metavar="N", default=str(option.default), help=f"{doc} [%(default)s]"
        )
    given = vars(parser.parse_args(argv))
    rebuild, check = given.pop("rebuild_base"), given.pop("check_base")
    try:
        world = load(**given)
    except ValueError as error:
        parser.error(str(error))
    if rebuild:
        model, loss = world.teach()
        world.store(model)
        print(f"loss {loss:.4f} nats per token; wrote {world.base_file.relative_to(HERE)}")
    if check and not check_base(world):
        return 1
    if not (rebuild or check):
        show(world)
    return 0


if __name__ == "__main__":
    sys.exit(main())
