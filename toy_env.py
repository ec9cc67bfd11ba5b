"""A toy world where keeping several ways open pays: sums, by a model with gaps in its knowledge.

One token is one number. The prompt lists terms; the response starts with any of them, then writes
"next term, running sum" until all are used. It is right if its last number is the right total:

    prompt      8 3 1 5 2 =                     token ids  11 6 4 8 5 2
    response    8 2 10 5 15 1 16 3 19 <eos>     token ids  11 5 13 8 18 4 19 6 22 1

The response reads: 8, + 2 = 10, + 5 = 15, and so on. (0 is <pad>, 1 is <eos>, 2 is `=`, and the
number n is n + 3.) Which term comes next is a fork, a real choice with many right ways; the sums
are facts. 4 of the 10 tokens are forks: tau = 0.6. p = 0.85 is above the 4/5 that hold four of five
equal terms, and below the 0.9 with which a sum does not slip, so that a sum's nucleus is one token
and H' is 0. (The paper's p = tau = 0.8 suits text, where about a fifth of the tokens fork.) Most of
the 1024 tokens are numbers that no terms add up to, and a naive entropy bonus leads to these.

The base model learns from a teacher who makes two kinds of mistakes. A *slip* is a wrong sum that
happens by chance, now and then. A *gap* is a fixed pair (running sum, next term) for which the
teacher always writes the same wrong sum, such as 23 for 8 + 5. The model hardly ever samples the
right sum there, so reinforcement learning can't teach it. The policy can only go round the gap, by
adding in another order. That is why diversity is worth something. A policy that has collapsed onto
one order per prompt meets the gap of that order in every sample. One that has kept several orders
meets different gaps, and in a vote their wrong totals differ while right totals agree.

    python toy_env.py                    a problem, a demonstration and the world's sizes
    python toy_env.py --rebuild-base     teach the base model again (1-2 minutes), store it
    python toy_env.py --check-base       is a newly taught one as good as the stored one?
"""

import math
import random
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, combinations_with_replacement, cycle, product
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from examples.toy_tools import Stored, one_thread
from siren import Config, ConfigError, knob

PAD, EOS, EQUALS, ZERO = 0, 1, 2, 3  # token ids; the number n is token n + ZERO
NAMES = {PAD: "<pad>", EOS: "<eos>", EQUALS: "="}
GAP_ERRORS = (-2, -1, 1, 2, 10)  # how far a gap's sum is off
SLIP_ERRORS = (-10, -2, -1, 1, 2, 10)
SPLITS = ("train",) * 5 + ("validation",) * 2 + ("test",) * 3  # tenths of the multisets of terms
POSITIONS = 256  # of the model: a prompt and its response must fit


class Problem(NamedTuple):
    """A prompt (token ids) and its right answer (text)."""

    prompt: list[int]
    answer: str


def split_of(terms: Iterable[int]) -> str:
    """The part of the world that a prompt belongs to, whatever the order of its terms.

    >>> split_of([8, 3, 1, 5, 2]), split_of([1, 2, 3, 5, 8])
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


@dataclass(frozen=True)
class ToyWorld(Stored):
    """The world, its teacher and its base model; all of it follows from these fields.

    Stored (examples/toy_tools.py) checks them, and it has build_model(): the base model is read
    from a file, or it is taught and stored there.
    """

    # prompts
    min_terms: int = knob(5, (2, 16), "fewest terms in a prompt")
    max_terms: int = knob(5, (2, 16), "most terms in a prompt")
    max_term: int = knob(9, (1, 1000), "the terms are numbers from 1 to this")
    min_total: int = knob(15, (0, 10**5), "smallest total of a prompt")
    max_total: int = knob(33, (1, 10**5), "largest total; policies fail at rare, larger ones")
    vocab: int = knob(1024, (1, 10**6), "number of tokens; most of them are useless numbers")
    # the teacher
    gap_share: float = knob(0.3, (0, 1), "share of the pairs (running sum, term) that are gaps")
    slip: float = knob(0.1, (0, 1), "probability that another sum is off by 1, 2 or 10")
    noise: float = knob(0.005, (0, 1), "probability that a number is replaced by any number")
    # the base model
    hidden: int = knob(64, (8, 4096), "width, a multiple of 8")
    layers: int = knob(2, (1, 100), "depth")
    base_steps: int = knob(1800, (1, 10**6), "steps of teaching: until only gaps and slips remain")
    base_batch: int = knob(64, (1, 10**5), "demonstrations per step of teaching")
    seed: int = knob(0, (0, 2**32), "draws the gaps, the demonstrations and the first weights")
    # not a part of the world
    split: str = knob("test", ("test", "validation"), "of held-out problems: test or validation")

    pad_id: ClassVar[int] = PAD
    eos_ids: ClassVar[list[int]] = [EOS]
    equal: ClassVar[None] = None  # siren.normalize decides whether answers are equal

    # ------------------------------------------------------------------------- tokens and text

    def problem(self, terms: Sequence[int]) -> Problem:
        """The problem of adding up these terms.

        >>> ToyWorld().problem([8, 3, 1, 5, 2])
        Problem(prompt=[11, 6, 4, 8, 5, 2], answer='19')
        """
        return Problem([term + ZERO for term in terms] + [EQUALS], str(sum(terms)))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids.

        >>> ToyWorld().decode([11, 8, 16, 1, 0])
        '8 5 13 <eos> <pad>'
        """
        return " ".join(NAMES.get(int(token), str(int(token) - ZERO)) for token in ids)

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, the inverse of `decode`.

        >>> ToyWorld().encode("8 3 1 5 2 =")
        [11, 6, 4, 8, 5, 2]
        """
        ids = {self.decode([token]): token for token in range(self.vocab)}
        return [ids[word] for word in text.split()]

    def answer_form(self, text: str) -> str | None:
        """The number right before the end; a response that never ended has no answer.

        >>> ToyWorld().answer_form("8 5 13 <eos>"), ToyWorld().answer_form("8 5 13")
        ('13', None)
        """
        *_, number, end = ["", "", *text.split()]
        return number if end == NAMES[EOS] and number.isascii() and number.isdigit() else None

    @property
    def max_sum(self) -> int:
        """The largest number that terms can add up to; larger ones are useless."""
        return self.max_terms * self.max_term

    def metrics(self, responses: Sequence[Sequence[int]]) -> dict[str, float]:
        """The share of useless numbers among all tokens of these responses (token ids).

        >>> ToyWorld().metrics([[11, 8, 16, 1], [200]])
        {'useless_share': 0.2}
        """
        tokens = [token for response in responses for token in response]
        useless = sum(token > self.max_sum + ZERO for token in tokens)
        return {"useless_share": useless / max(1, len(tokens))}

    # ------------------------------------------------------------------------------ the teacher

    @cached_property
    def gaps(self) -> dict[tuple[int, int], int]:
        """(running sum, next term) -> the wrong sum that the teacher always writes.

        >>> ToyWorld().gaps[8, 5]
        23
        """
        rng = random.Random(f"gaps {self.seed}")
        pairs = list(product(range(1, self.max_sum + 1), range(1, self.max_term + 1)))
        rng.shuffle(pairs)
        chosen = pairs[: round(self.gap_share * len(pairs))]
        return {(total, term): total + term + rng.choice(GAP_ERRORS) for total, term in chosen}

    def demonstration(self, terms: Sequence[int], rng: random.Random) -> list[int]:
        """A response (token ids) of the teacher: in random order, with gaps, slips and noise.

        >>> world = ToyWorld(slip=0, noise=0)  # the gaps are this teacher's only mistakes
        >>> world.decode(world.demonstration([8, 5, 1], random.Random(4)))
        '8 5 23 1 26 <eos>'
        """
        total, *rest = rng.sample(list(terms), len(terms))
        numbers = [total]
        for term in rest:
            written = total + term
            if rng.random() < self.slip:
                written = max(0, written + rng.choice(SLIP_ERRORS))
            total = self.gaps.get((total, term), written)
            numbers += [term, total]
        tokens = [number + ZERO for number in numbers]
        for i in range(len(tokens)):
            if rng.random() < self.noise:
                tokens[i] = rng.randrange(ZERO, self.vocab)
        return [*tokens, EOS]

    def gap_free_share(self, terms: Iterable[int]) -> Fraction:
        """The exact share of the orders of these terms that meet no gap.

        Any of them may come last. Such an order meets no gap if the order of the others meets none
        and the pair (sum of the others, last term) is not a gap.

        >>> ToyWorld().gap_free_share([8, 5, 1])  # 2 of 6 meet one: 8 + 5 in 8 5 1, 1 + 8 in 1 8 5
        Fraction(2, 3)
        """
        key = tuple(sorted(terms))
        if key not in self._shares:
            share = Fraction(0)
            for i, last in enumerate(key):
                if (sum(key) - last, last) not in self.gaps:
                    share += self.gap_free_share(key[:i] + key[i + 1 :])
            self._shares[key] = share / len(key)
        return self._shares[key]

    @cached_property
    def _shares(self) -> dict[tuple[int, ...], Fraction]:
        return {(): Fraction(1)}  # what gap_free_share has found out

    # ------------------------------------------------------------------------- problems, splits

    @cached_property
    def multisets(self) -> dict[str, list[tuple[int, ...]]]:
        """Split -> every multiset of terms (sorted) whose total is in range."""
        found: dict[str, list[tuple[int, ...]]] = {split: [] for split in SPLITS}
        for length in range(self.min_terms, self.max_terms + 1):
            for terms in combinations_with_replacement(range(1, self.max_term + 1), length):
                if self.min_total <= sum(terms) <= self.max_total:
                    found[split_of(terms)].append(terms)
        return found

    @cached_property
    def _train_weights(self) -> list[float]:
        """Cumulative: chances of the training multisets if terms are drawn until they fit."""
        pool = self.multisets["train"]
        return list(accumulate(count_orders(t) / self.max_term ** len(t) for t in pool))

    def _draw(self, n: int, rng: random.Random) -> list[list[int]]:
        drawn = rng.choices(self.multisets["train"], cum_weights=self._train_weights, k=n)
        return [rng.sample(terms, len(terms)) for terms in drawn]

    def train_problems(self, n: int, seed: str) -> list[Problem]:
        """n problems of the training split, drawn with replacement; depends on n and seed alone."""
        return [self.problem(terms) for terms in self._draw(n, random.Random(f"train {seed}"))]

    def grade(self, terms: Iterable[int]) -> str:
        """How many orders meet no gap: "easy" >= 30 %, "medium", "hard" <= 12 %, "closed" none."""
        percent = 100 * self.gap_free_share(terms)
        if percent >= 30:
            return "easy"
        return "closed" if percent == 0 else "hard" if percent <= 12 else "medium"

    def heldout(self, n: int, split: str | None = None) -> dict[str, list[Problem]]:
        """n different problems each of grade "easy" and "hard", by default of the world's `split`.

        They are spread evenly over the multisets of the split, of which training sees no order.
        """
        split, found = split or self.split, {}
        if split not in SPLITS:
            raise ConfigError(f"split={split!r}: needs one of {', '.join(self.multisets)}")
        for grade in ("easy", "hard"):
            pool = [terms for terms in self.multisets[split] if self.grade(terms) == grade]
            available = sum(map(count_orders, pool))
            if not 1 <= n <= available:
                rule = f"1 to {available}, the number of {grade} {split} prompts"
                fix = "lower --eval-prompts, or change gap_share or the terms"
                raise ConfigError(f"{n} held-out problems: must be {rule}; {fix}")
            rng = random.Random(f"heldout {split} {grade}")
            rng.shuffle(pool)
            rounds, orders = cycle(pool), {}  # a dict, since a set has no order
            while len(orders) < n:
                terms = next(rounds)
                orders[tuple(rng.sample(terms, len(terms)))] = None
            found[grade] = [self.problem(terms) for terms in orders]
        return found

    # --------------------------------------------------------------------------- the base model

    def new_model(self) -> torch.nn.Module:
        """A tiny Qwen2 with random weights: 173 thousand parameters by default."""
        from transformers import Qwen2Config, Qwen2ForCausalLM  # here: it takes three seconds

        config = Qwen2Config(
            vocab_size=self.vocab, hidden_size=self.hidden, intermediate_size=3 * self.hidden,
            num_hidden_layers=self.layers, num_attention_heads=4, num_key_value_heads=4,
            max_position_embeddings=POSITIONS, tie_word_embeddings=True,
            pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
            torch.default_generator.manual_seed(self.seed)  # of the CPU alone
            model = Qwen2ForCausalLM(config)
        return model.eval()  # for teaching as well: it has no dropout

    def teach(self) -> tuple[torch.nn.Module, float]:
        """A base model taught by demonstrations, and its loss (nats per token, last 50 steps)."""
        model, rng, losses = self.new_model(), random.Random(f"teach {self.seed}"), []
        opt = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
        bar = tqdm(range(self.base_steps), "teaching the base model")
        with one_thread():  # so that the order of additions doesn't depend on the cores
            for step in bar:
                lr = 2e-3 * min(1, (step + 1) / 50) * (1 - 0.9 * step / self.base_steps)
                opt.param_groups[0]["lr"] = lr  # warm up, then down to a tenth
                loss = self._teaching_loss(model, rng)
                opt.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                opt.step()
                losses = [*losses[-49:], loss.item()]
                bar.set_postfix(loss=f"{sum(losses) / len(losses):.3f}", refresh=False)
        return model, sum(losses) / len(losses)

    def _teaching_loss(self, model: torch.nn.Module, rng: random.Random) -> torch.Tensor:
        """The mean cross-entropy of one batch's response tokens; prompts are not learned."""
        batch = [
            torch.tensor(self.problem(terms).prompt + self.demonstration(terms, rng))
            for terms in self._draw(self.base_batch, rng)
        ]
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=PAD)  # [B, T]
        # no attention mask: the pads are on the right, where no token looks
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # [B, T - 1, V]
        in_response = (ids == EQUALS).cumsum(1)[:, :-1] > 0  # the next token is of the response
        labels = ids[:, 1:].where(in_response & (ids[:, 1:] != PAD), -100)  # -100: left out
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


# a task's options, for --help; see siren.load_task
OPTIONS = {f.name: f"{f.metadata['doc']} (default: {f.default})" for f in fields(ToyWorld)}


def load(cfg: Config | None = None, **options: str) -> ToyWorld:
    """The world with these options, given as text. ConfigError if they, or cfg, do not fit.

    >>> load(min_terms="5", max_terms="7", seed="3").max_terms
    7
    """
    world = ToyWorld.from_text(options)
    if cfg and cfg.max_tokens + world.max_terms + 1 > POSITIONS:
        rule = f"with a prompt of {world.max_terms + 1} tokens it must fit the model's {POSITIONS}"
        raise ConfigError(f"--max-tokens {cfg.max_tokens}: {rule} tokens; lower it")
    return world


if __name__ == "__main__":
    from examples.toy_tools import main

    sys.exit(main())
