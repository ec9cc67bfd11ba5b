"""A toy world where keeping several ways open pays: sums, by a model with gaps.

One token is one number. The prompt lists terms; the response starts with any of them, then
writes "next term, running sum" until all are used. It is right if it ends with the total:

    prompt      8 3 1 5 2 =                     token ids  11 6 4 8 5 2
    response    8 2 10 5 15 1 16 3 19 <eos>     token ids  11 5 13 8 18 4 19 6 22 1

The response reads: 8, + 2 = 10, + 5 = 15, and so on. (0 is <pad>, 1 is <eos>, 2 is `=`, and
the number n is n + 3.) Which term comes next is a fork, a choice with many right ways; the sums
are facts. 4 of the 10 tokens are forks: tau = 0.6. p = 0.85 is above the 4/5 that hold
four of five equal terms, and below the 0.9 with which a sum does not slip, so that the nucleus
of a sum is one token and H' is 0. Most of the 1024 tokens are numbers that no terms add up to,
and a naive entropy bonus leads to these.

The base model learns from a teacher who makes two kinds of mistakes. A *slip* is a wrong sum
that happens by chance, now and then. A *gap* is an ordered pair (running sum, next term) for
which the teacher always writes the same wrong sum: 23 for 8 + 5; but 5 + 8 may be no gap. The
model hardly ever samples the right sum there, so the reward can hardly teach it, unless
something keeps it open. But the policy can go round the gap, by adding in another order. That
is why diversity is worth something. A policy that has collapsed onto one order of a prompt has
the gap of that order in every sample. One that has kept several orders meets different gaps,
and in a vote their wrong totals differ while right totals agree.

    python toy_env.py            a problem, a demonstration and the world's sizes
    python toy_env.py seed=3     the same for another world; see the fields of ToyWorld
"""

import dataclasses
import hashlib
import json
import math
import random
import sys
import zlib
from collections import Counter
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, combinations_with_replacement, cycle, product
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from safetensors.torch import load as read_weights
from safetensors.torch import save
from tqdm import tqdm

PAD, EOS, EQUALS, ZERO = 0, 1, 2, 3  # token ids; the number n is token n + ZERO
NAMES = {PAD: "<pad>", EOS: "<eos>", EQUALS: "="}
GAP_ERRORS = (-2, -1, 1, 2, 10)  # how far the sum of a gap is off
SLIP_ERRORS = (-10, -2, -1, 1, 2, 10)
POSITIONS = 256  # tokens that the model can read
SPLITS = ("train",) * 5 + ("validation",) * 2 + ("test",) * 3  # tenths of the sets of terms


class Problem(NamedTuple):
    prompt: list[int]  # token ids
    answer: str  # the right one


def split_of(terms):
    """The part of the world that a prompt belongs to, whatever the order of its terms."""
    text = " ".join(map(str, sorted(terms)))
    return SPLITS[zlib.crc32(text.encode()) % len(SPLITS)]


def count_orders(terms):
    """The number of different orders of these terms: 3 for 1, 1, 2."""
    repeats = map(math.factorial, Counter(terms).values())
    return math.factorial(len(terms)) // math.prod(repeats)


@dataclasses.dataclass(frozen=True)
class ToyWorld:
    """The world, its teacher and its base model; all of it follows from these fields."""

    # prompts
    min_terms: int = 5  # fewest terms in a prompt
    max_terms: int = 5  # most terms in a prompt
    max_term: int = 9  # the terms are numbers from 1 to this
    min_total: int = 15  # smallest total of a prompt
    max_total: int = 33  # largest total; policies fail at rare, larger ones
    vocab: int = 1024  # number of tokens; most of them are useless numbers
    # the teacher
    gap_share: float = 0.3  # share of the pairs (running sum, term) that are gaps
    slip: float = 0.1  # probability that another sum is off by 1, 2 or 10
    noise: float = 0.005  # probability that a number is replaced by any number
    # the base model
    hidden: int = 64  # width, a multiple of 8
    layers: int = 2  # depth
    base_steps: int = 1800  # steps of teaching: until only gaps and slips remain
    base_batch: int = 64  # demonstrations per step of teaching
    seed: int = 0  # draws the gaps, the demonstrations and the first weights
    # not a part of the world
    split: str = "test"  # of held-out problems: test or validation

    pad_id: ClassVar[int] = PAD
    eos_ids: ClassVar[list[int]] = [EOS]
    equal: ClassVar[None] = None  # answers are compared as numbers, by siren.py
    normalize: ClassVar[None] = None

    def __post_init__(self):
        sizes = (self.vocab, self.layers, self.base_steps, self.base_batch, self.hidden)
        shares = (self.gap_share, self.slip, self.noise)
        largest = max(self.max_sum, self.max_total + max(SLIP_ERRORS) * (self.max_terms - 1))
        least = largest + ZERO + 2
        rules = {
            "2 <= min_terms <= max_terms <= 9": 2 <= self.min_terms <= self.max_terms <= 9
        }
        rules["max_term from 1 to 12"] = (
            1 <= self.max_term <= 12
        )  # all sets of terms are listed
        rules["sizes above 0 and hidden a multiple of 8"] = min(sizes) > 0 == self.hidden % 8
        rules["shares from 0 to 1"] = all(0 <= share <= 1 for share in shares)
        rules[f"vocab of at least {least}"] = self.vocab >= least
        rules["split=test or split=validation"] = self.split in ("test", "validation")
        broken = [rule for rule, holds in rules.items() if not holds]
        if not broken and {len(terms) for terms in self.multisets["train"]} != self.lengths:
            broken = ["totals that terms have"]
        if broken:
            raise ValueError(f"the toy needs {', '.join(broken)}, unlike {self}")

    # ----------------------------------------------------------------------- tokens and text

    def problem(self, terms):
        """The problem of adding up these terms: 11 6 4 8 5 2 with answer 19 for 8 3 1 5 2."""
        return Problem([term + ZERO for term in terms] + [EQUALS], str(sum(terms)))

    def decode(self, ids):
        """The text of token ids.

        >>> ToyWorld().decode([11, 8, 16, 1, 0])
        '8 5 13 <eos> <pad>'
        """
        return " ".join(NAMES.get(token, str(token - ZERO)) for token in ids)

    def find_answer(self, text):
        """The number right before the end; a response that never ended has no answer.

        >>> ToyWorld().find_answer("8 5 13 <eos>"), ToyWorld().find_answer("8 5 13")
        ('13', None)
        """
        words = text.split()
        ended = len(words) >= 2 and words[-1] == NAMES[EOS] and words[-2].isdigit()
        return words[-2] if ended else None

    @property
    def max_sum(self):
        """The largest number that terms can add up to; larger ones are useless."""
        return self.max_terms * self.max_term

    @property
    def lengths(self):
        return set(range(self.min_terms, self.max_terms + 1))

    def metrics(self, responses):
        """The share of useless numbers among all tokens of these responses (token ids)."""
        tokens = [token for response in responses for token in response]
        useless = sum(token > self.max_sum + ZERO for token in tokens)
        return {"useless_share": useless / len(tokens)}

    # --------------------------------------------------------------------------- the teacher

    @cached_property
    def gaps(self):
        """(running sum, next term) -> the wrong sum that the teacher always writes.

        >>> ToyWorld().gaps[8, 5]
        23
        """
        rng = random.Random(f"gaps {self.seed}")
        pairs = list(product(range(1, self.max_sum + 1), range(1, self.max_term + 1)))
        rng.shuffle(pairs)
        chosen = pairs[: round(self.gap_share * len(pairs))]
        return {(total, term): total + term + rng.choice(GAP_ERRORS) for total, term in chosen}

    def demonstration(self, terms, rng):
        """A response (token ids) of the teacher: in random order, with gaps, slips and noise.

        >>> world = ToyWorld(slip=0, noise=0)  # the gaps are this teacher's only mistakes
        >>> world.decode(world.demonstration([8, 5, 1], random.Random(4)))
        '8 5 23 1 26 <eos>'
        """
        order = rng.sample(list(terms), len(terms))
        total = order[0]
        numbers = [total]
        for term in order[1:]:
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

    def gap_free_share(self, terms):
        """The exact share of the orders of these terms that meet no gap.

        Any of them may come last. Such an order meets no gap if the order of the others meets
        none and the pair (sum of the others, last term) is not a gap.

        >>> ToyWorld().gap_free_share([8, 5, 1])  # 2 of 6 meet one: 8 + 5 and 1 + 8
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
    def _shares(self):
        return {(): Fraction(1)}  # what gap_free_share has found out

    # ---------------------------------------------------------------------- problems, splits

    @cached_property
    def multisets(self):
        """Split -> every multiset of terms (sorted) whose total is in range."""
        found = {split: [] for split in SPLITS}
        for length in sorted(self.lengths):
            for terms in combinations_with_replacement(range(1, self.max_term + 1), length):
                if self.min_total <= sum(terms) <= self.max_total:
                    found[split_of(terms)].append(terms)
        return found

    @cached_property
    def _train_weights(self):
        """Cumulative: chances of the training multisets if terms are drawn until they fit."""
        pool = self.multisets["train"]
        return list(accumulate(count_orders(t) / self.max_term ** len(t) for t in pool))

    def _draw(self, n, rng):
        drawn = rng.choices(self.multisets["train"], cum_weights=self._train_weights, k=n)
        return [rng.sample(terms, len(terms)) for terms in drawn]

    def train_problems(self, n, seed):
        """n training problems, drawn with replacement; they depend on n and seed alone."""
        return [self.problem(terms) for terms in self._draw(n, random.Random(f"train {seed}"))]

    def grade(self, terms):
        """How many orders meet no gap: easy >= 30 %, medium, hard <= 12 %, or closed 0."""
        percent = 100 * self.gap_free_share(terms)
        if percent >= 30:
            return "easy"
        return "closed" if percent == 0 else "hard" if percent <= 12 else "medium"

    def heldout(self, n):
        """n different problems each of grade "easy" and "hard", spread evenly over the
        multisets of the world's `split`, of which training sees no order."""
        found = {}
        for grade in ("easy", "hard"):
            pool = [key for key in self.multisets[self.split] if self.grade(key) == grade]
            available = sum(map(count_orders, pool))
            if not 1 <= n <= available:
                raise ValueError(f"there are {available} {grade} held-out prompts, not {n}")
            rng = random.Random(f"heldout {self.split} {grade}")
            rng.shuffle(pool)
            rounds = cycle(pool)
            orders = {}  # a dictionary, since a set has no order
            while len(orders) < n:
                terms = next(rounds)
                orders[tuple(rng.sample(terms, len(terms)))] = None
            found[grade] = [self.problem(terms) for terms in orders]
        return found

    # ------------------------------------------------------------------------ the base model

    def new_model(self):
        """A tiny Qwen2 with random weights: 173 thousand parameters by default."""
        from transformers import Qwen2Config, Qwen2ForCausalLM  # here: it takes three seconds

        options = {"vocab_size": self.vocab, "num_hidden_layers": self.layers}
        options |= {"hidden_size": self.hidden, "intermediate_size": 3 * self.hidden}
        options |= {"num_attention_heads": 4, "num_key_value_heads": 4}
        options |= {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
        options |= {"max_position_embeddings": POSITIONS, "tie_word_embeddings": True}
        config = Qwen2Config(**options)
        with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
            torch.default_generator.manual_seed(self.seed)
            return Qwen2ForCausalLM(config).eval()  # for teaching as well: it has no dropout

    @cached_property
    def base_file(self):
        """The base model of this world: the default one's comes with the code."""
        world = dataclasses.asdict(self) | {"format": 1}
        del world["split"]  # it changes no model
        world = hashlib.sha256(json.dumps(world, sort_keys=True).encode()).hexdigest()[:16]
        shipped = Path(__file__).parent / "assets" / f"toy_base_{world}.bin"
        return shipped if shipped.exists() else Path("runs") / shipped.name

    def build_model(self):
        """The base model: from its file, or else taught (1-2 minutes) and kept in runs/."""
        model = self.new_model()
        if not self.base_file.exists():
            self.teach(model)
            self.store(model)
        data = self.base_file.read_bytes()  # a check sum, then the weights
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            raise ValueError(f"{self.base_file} is damaged: restore it, or delete it")
        model.load_state_dict(read_weights(data[32:]), strict=False)  # the head is tied
        return model

    def store(self, model):
        """Write the file of the base model, whole or not at all."""
        data = save(dict(model.named_parameters()))
        self.base_file.parent.mkdir(parents=True, exist_ok=True)
        part = self.base_file.with_suffix(f".{random.SystemRandom().getrandbits(32)}")
        part.write_bytes(hashlib.sha256(data).digest() + data)
        part.replace(self.base_file)

    def teach(self, model):
        """Teach a new model by demonstrations."""
        rng = random.Random(f"teach {self.seed}")
        weights = model.parameters()
        optimizer = torch.optim.AdamW(weights, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
        torch.set_num_threads(1)  # so that the order of additions doesn't depend on the cores
        for step in tqdm(range(self.base_steps), "teaching the base model"):
            lr = 2e-3 * min(1, (step + 1) / 50) * (1 - 0.9 * step / self.base_steps)
            optimizer.param_groups[0]["lr"] = lr  # warm up, then down to a tenth
            optimizer.zero_grad()
            self._teaching_loss(model, rng).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    def _teaching_loss(self, model, rng):
        """The mean cross-entropy of the response tokens of a batch, without the prompts."""
        batch = [
            torch.tensor(self.problem(terms).prompt + self.demonstration(terms, rng))
            for terms in self._draw(self.base_batch, rng)
        ]
        ids = torch.nn.utils.rnn.pad_sequence(batch, True, PAD)  # [B, T], padded on the right,
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # where no token looks
        in_response = (ids == EQUALS).cumsum(1)[:, :-1] > 0  # is the next token?
        labels = ids[:, 1:].where(in_response & (ids[:, 1:] != PAD), -100)  # -100: left out
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def load(cfg=None, **options):
    """The world with these options, given as text, for the siren.Config `cfg`.

    >>> load(max_terms="7", seed="3").max_terms
    7
    """
    kinds = {field.name: field.type for field in dataclasses.fields(ToyWorld)}
    for name, text in options.items():
        try:
            options[name] = kinds[name](text)
        except (KeyError, ValueError):
            raise ValueError(f"{name}={text}: needs a number for one of {[*kinds]}") from None
    world = ToyWorld(**options)
    if cfg and cfg.max_tokens + world.max_terms + 1 > POSITIONS:
        raise ValueError(f"--max-tokens {cfg.max_tokens}: the model reads {POSITIONS} tokens")
    return world


def show(world):
    """Print a problem, a demonstration and the world's sizes."""
    problem = world.train_problems(1, "show")[0]
    terms = [token - ZERO for token in problem.prompt[:-1]]
    response = world.decode(world.demonstration(terms, random.Random("show")))
    print(f"prompt         {world.decode(problem.prompt)}")
    print(f"demonstration  {response}   (right: {problem.answer})")
    print(f"gap-free       {float(world.gap_free_share(terms)):.1%} of this prompt's orders")
    print(f"gaps           {len(world.gaps)} of {world.max_sum * world.max_term} pairs")
    for split, multisets in world.multisets.items():
        print(f"{split:<14} {sorted(Counter(map(world.grade, multisets)).items())}")


if __name__ == "__main__":
    show(load(**dict(option.split("=") for option in sys.argv[1:])))
