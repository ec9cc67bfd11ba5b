"""A toy world where keeping several ways open pays: sums, by a model with gaps.

One token is one number. The prompt lists terms; the response starts with any of them, then
writes "next term, running sum" until all are used. It is right if it ends with the total:

    prompt      8 3 1 5 2 =                     token ids  11 6 4 8 5 2
    response    8 2 10 5 15 1 16 3 19 <eos>     token ids  11 5 13 8 18 4 19 6 22 1

The response reads: 8, + 2 = 10, + 5 = 15, and so on. Which term comes next is a fork, a choice
with many right ways; a sum is none. 4 of the 10 tokens are forks: tau = 0.6. p = 0.85 is
above the 4/5 that hold four of five equal terms, and below the 0.9 with which a sum does not
slip, so that the nucleus of a sum is one token and H' is 0. Most of the 1024 tokens are
numbers that no terms add up to, and a naive entropy bonus leads to these.

The base model learns from a teacher who makes two kinds of mistakes. A *slip* is a wrong sum
that happens by chance, now and then. A *gap* is an ordered pair (running sum, next term) for
which the teacher always writes the same wrong sum: 23 for 8 + 5; but 5 + 8 may be no gap. The
base model hardly ever samples the right sum there, so a reward teaches little of it, and
more if something keeps the gap open. But it can be avoided, by adding in another order. So
diversity is worth something: a policy with one order for a prompt meets its gap in every
sample, one with several orders meets different gaps, whose wrong totals differ in a vote. The
reward sees the total alone: wrong sums that cancel are paid, too (see docs/questions.md).

    python toy_env.py [seed=3 ...]     a problem, a demonstration and the sizes of a world
"""

import dataclasses
import hashlib
import json
import math
import random
import sys
import zlib
from collections import Counter, namedtuple
from fractions import Fraction
from functools import cached_property
from itertools import combinations, combinations_with_replacement, cycle, product
from pathlib import Path

import safetensors.torch
import torch
from tqdm import tqdm

PAD, EOS, EQUALS, ZERO = 0, 1, 2, 3  # token ids; the number n is the token n + ZERO
NAMES = {PAD: "<pad>", EOS: "<eos>", EQUALS: "="}
GAP_ERRORS = (-2, -1, 1, 2, 10)  # how far the sum of a gap is off
SLIP_ERRORS = (-10, -2, -1, 1, 2, 10)
POSITIONS = 256  # tokens that the model can read
SPLITS = ("train",) * 5 + ("validation",) * 2 + ("test",) * 3  # tenths of the sets of terms

Problem = namedtuple("Problem", ["prompt", "answer"])  # token ids; the right answer, a text


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
    """The world, its teacher and its base model; all of it follows from these fields.

    >>> world = ToyWorld(slip=0, noise=0)  # the gaps are this teacher's only mistakes
    >>> world.decode(world.demonstration([8, 5, 1], random.Random(4)))
    '8 5 23 1 26 <eos>'
    >>> world.gaps[8, 5], world.gap_free_share([8, 5, 1])  # 2 of 6 orders meet one
    (23, Fraction(2, 3))
    >>> world.find_answer("8 5 13 <eos>"), world.find_answer("8 5 13")  # one never ended
    ('13', None)
    """

    min_terms: int = 5  # fewest terms in a prompt
    max_terms: int = 5  # most terms in a prompt
    max_term: int = 9  # the terms are numbers from 1 to this
    min_total: int = 15  # smallest total of a prompt
    max_total: int = 33  # largest total; policies fail at rare, larger ones
    vocab: int = 1024  # number of tokens; most of them are useless numbers
    gap_share: float = 0.3  # share of the pairs (running sum, term) that are gaps
    slip: float = 0.1  # probability that another sum of the teacher is off by 1, 2 or 10
    noise: float = 0.005  # probability that the teacher replaces a number by any number
    hidden: int = 64  # width of the base model, a multiple of 8
    layers: int = 2  # depth of the base model
    base_steps: int = 1800  # steps of teaching: until only gaps and slips remain
    base_batch: int = 64  # demonstrations per step of teaching
    seed: int = 0  # draws the gaps, the demonstrations and the first weights
    split: str = "test"  # of the held-out problems: test or validation; no part of the world

    pad_id = PAD  # these four are no fields: they are the same in every world
    eos_ids = (EOS,)
    equal = None  # answers are compared as numbers, by siren.py
    normalize = None

    def __post_init__(self):
        lengths = range(self.min_terms, self.max_terms + 1)
        shares = (self.gap_share, self.slip, self.noise)
        written = self.max_total + max(SLIP_ERRORS) * (self.max_terms - 1)  # at most
        least = max(written, self.max_terms * self.max_term) + ZERO + 2
        rules = {
            "2 <= min_terms <= max_terms <= 9": 2 <= self.min_terms <= self.max_terms <= 9,
            "max_term from 1 to 12": 1 <= self.max_term <= 12,  # all sets of terms are listed
            "sizes > 0": min(self.layers, self.hidden, self.base_steps, self.base_batch) > 0,
            "hidden a multiple of 8": self.hidden % 8 == 0,
            "shares from 0 to 1": all(0 <= share <= 1 for share in shares),
            f"vocab of at least {least}": self.vocab >= least,
            "split=test or split=validation": self.split in ("test", "validation"),
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if not broken and {len(terms) for terms in self.multisets["train"]} != set(lengths):
            broken = ["totals that terms have"]
        if broken:
            raise ValueError(f"the toy needs {', '.join(broken)}, unlike {self}")

    def problem(self, terms):
        """The problem of adding up these terms: 11 6 4 8 5 2 with answer 19 for 8 3 1 5 2."""
        return Problem([term + ZERO for term in terms] + [EQUALS], str(sum(terms)))

    def decode(self, ids):
        """The text of token ids: 8 5 13 <eos> <pad> for 11 8 16 1 0."""
        return " ".join(NAMES.get(token, str(token - ZERO)) for token in ids)

    def find_answer(self, text):
        """The number right before the end; a response that never ended has no answer."""
        number, end = ["", "", *text.split()][-2:]  # the last two words, if there are two
        return number if end == NAMES[EOS] and number.isdigit() else None

    def metrics(self, responses):
        """The share of useless tokens: numbers too large for any sum of terms."""
        largest = self.max_terms * self.max_term + ZERO
        useless = [token > largest for response in responses for token in response]
        return {"useless_share": sum(useless) / len(useless)}

    # ----------------------------------------------------------------------------- the teacher
    @cached_property
    def gaps(self):
        """(running sum, next term) -> the wrong sum that the teacher always writes."""
        rng = random.Random(f"gaps {self.seed}")
        sums = range(1, self.max_terms * self.max_term + 1)
        pairs = list(product(sums, range(1, self.max_term + 1)))
        rng.shuffle(pairs)
        chosen = pairs[: round(self.gap_share * len(pairs))]
        return {(total, term): total + term + rng.choice(GAP_ERRORS) for total, term in chosen}

    def demonstration(self, terms, rng):
        """A response of the teacher (token ids): in random order, with gaps, slips, noise."""
        total, *others = rng.sample(list(terms), len(terms))
        numbers = [total]
        for term in others:
            written = total + term
            if rng.random() < self.slip:
                written = max(0, written + rng.choice(SLIP_ERRORS))
            total = self.gaps.get((total, term), written)
            numbers += [term, total]
        for i in range(len(numbers)):
            if rng.random() < self.noise:
                numbers[i] = rng.randrange(self.vocab - ZERO)
        return [number + ZERO for number in numbers] + [EOS]

    def gap_free_share(self, terms):
        """The exact share of the orders of these terms that meet no gap. Any of them may come
        last, if the order of the others meets no gap and (their sum, the last) is not one."""
        whole = tuple(sorted(terms))
        free = {(): 1}  # some of the terms -> how many of their orders meet no gap
        for length in range(1, len(whole) + 1):
            for part in set(combinations(whole, length)):
                free[part] = 0
                for i, last in enumerate(part):
                    if (sum(part) - last, last) not in self.gaps:
                        free[part] += free[part[:i] + part[i + 1 :]]
        return Fraction(free[whole], math.factorial(len(whole)))

    # ------------------------------------------------------------------------ problems, splits
    @cached_property
    def multisets(self):
        """Split -> every multiset of terms (sorted) whose total is in range."""
        found = {split: [] for split in SPLITS}
        for length in range(self.min_terms, self.max_terms + 1):
            for terms in combinations_with_replacement(range(1, self.max_term + 1), length):
                if self.min_total <= sum(terms) <= self.max_total:
                    found[split_of(terms)].append(terms)
        return found

    @cached_property
    def _train_weights(self):
        """The chance of each training multiset if terms are drawn until they fit."""
        return [count_orders(t) / self.max_term ** len(t) for t in self.multisets["train"]]

    def _draw(self, n, rng):
        drawn = rng.choices(self.multisets["train"], self._train_weights, k=n)
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

    # -------------------------------------------------------------------------- the base model
    def new_model(self):
        """A tiny Qwen2 with random weights: 173 thousand parameters by default."""
        from transformers import Qwen2Config, Qwen2ForCausalLM  # here: it takes three seconds

        options = {"vocab_size": self.vocab, "max_position_embeddings": POSITIONS}
        options |= {"hidden_size": self.hidden, "intermediate_size": 3 * self.hidden}
        options |= {"num_hidden_layers": self.layers, "tie_word_embeddings": True}
        options |= {"num_attention_heads": 4, "num_key_value_heads": 4}
        config = Qwen2Config(**options, pad_token_id=PAD, eos_token_id=EOS)
        with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
            torch.default_generator.manual_seed(self.seed)
            return Qwen2ForCausalLM(config).eval()  # for teaching as well: it has no dropout

    @cached_property
    def base_file(self):
        """The base model of this world: the default one's comes with the code."""
        fields = dataclasses.asdict(self) | {"format": 1}
        del fields["split"]  # it changes no model
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
        name = f"toy_base_{digest[:16]}.bin"  # in assets/ or, installed, in siren_assets/
        return next(Path(__file__).parent.glob(f"*assets/{name}"), Path("runs") / name)

    def build_model(self):
        """The base model: from its file, or else taught (1-2 minutes) and kept in runs/."""
        model = self.new_model()
        if not self.base_file.exists():
            self.teach(model)
            self.store(model)
        data = self.base_file.read_bytes()  # a check sum, then the weights
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            raise ValueError(f"{self.base_file} is damaged: restore it, or delete it")
        model.load_state_dict(safetensors.torch.load(data[32:]), strict=False)  # a tied head
        return model

    def store(self, model):
        """Write the file of the base model, whole or not at all."""
        data = safetensors.torch.save(dict(model.named_parameters()))
        self.base_file.parent.mkdir(parents=True, exist_ok=True)
        part = self.base_file.with_suffix(f".{random.SystemRandom().getrandbits(32)}")
        part.write_bytes(hashlib.sha256(data).digest() + data)
        part.replace(self.base_file)

    def teach(self, model):
        """Teach a new model by demonstrations."""
        rng = random.Random(f"teach {self.seed}")
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98))
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
        batch = self._draw(self.base_batch, rng)
        rows = [self.problem(terms).prompt + self.demonstration(terms, rng) for terms in batch]
        # [B, T]; the padding is on the right, where no token looks
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, PAD)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # [B, T - 1, V]
        in_response = (ids == EQUALS).cumsum(1)[:, :-1] > 0  # is the next token?
        labels = ids[:, 1:].where(in_response & (ids[:, 1:] != PAD), -100)  # -100: left out
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def load(cfg=None, /, **options):
    """The world with these options, given as text: max_terms="7". `cfg` is siren's Config."""
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
    print(f"gaps           {len(world.gaps)} of {world.max_terms * world.max_term**2} pairs")
    for split, multisets in world.multisets.items():
        print(f"{split:<14} {sorted(Counter(map(world.grade, multisets)).items())}")


if __name__ == "__main__":
    try:
        show(load(**dict(option.partition("=")[::2] for option in sys.argv[1:])))
    except ValueError as error:
        print(f"toy_env.py: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        pass  # the reader, such as `head`, has read enough
