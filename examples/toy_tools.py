"""What toy_env.py needs around its world: checks of its fields, the base model's file, a command.

Nothing in here changes a problem, a demonstration or the teaching.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from siren import Config, ConfigError, evaluate

if TYPE_CHECKING:
    from toy_env import ToyWorld

FORMAT = 1  # raise it when the world or the teaching changes: stored base models are then refused
ROOT = Path(__file__).resolve().parents[1]
REBUILD = "run `python toy_env.py --rebuild-base` with this world's options"


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch compute on one CPU thread inside the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Stored:
    """The part of ToyWorld that is not about its world: rules for its fields, and files."""

    def __post_init__(self) -> None:
        for option in fields(self):
            value, (low, high) = getattr(self, option.name), option.metadata["allowed"]
            if isinstance(low, str):
                self._require(value in (low, high), option.name, f"{low} or {high}")
            else:
                kind = "a probability" if isinstance(option.default, float) else "a number"
                rule = f"{kind} from {low} to {high}"
                self._require(low <= value <= high, option.name, rule)
        self._require(self.hidden % 8 == 0, "hidden", "a multiple of 8, such as 64")
        ordered = self.min_terms <= self.max_terms
        self._require(ordered, "min_terms max_terms", "min_terms <= max_terms")
        self._check_sizes()

    def _check_sizes(self) -> None:
        from toy_env import SLIP_ERRORS, ZERO

        lengths = range(self.min_terms, self.max_terms + 1)
        size = sum(math.comb(self.max_term + k - 1, k) for k in lengths)  # all are enumerated
        rule = f"at most 200000 multisets of terms, not {size}; lower one of them"
        self._require(size <= 200_000, "max_terms max_term", rule)
        largest = max(self.max_sum, self.max_total + max(SLIP_ERRORS) * (self.max_terms - 1))
        rule = f"at least {largest + ZERO + 2}, for all that the teacher writes"
        self._require(self.vocab >= largest + ZERO + 2, "vocab", rule)
        for k in lengths:
            found = any(len(terms) == k for terms in self.multisets["train"])
            rule = f"a training prompt of {k} terms with such a total; widen the totals"
            self._require(found, "min_total max_total max_term", rule)

    def _require(self, ok: bool, names: str, rule: str) -> None:
        if not ok:
            given = ", ".join(f"{name}={getattr(self, name)}" for name in names.split())
            raise ConfigError(f"{given}: needs {rule}")

    @classmethod
    def from_text(cls, options: dict[str, str]) -> Stored:
        """The world with these options, given as text."""
        types, values = {option.name: type(option.default) for option in fields(cls)}, {}
        for name, text in options.items():
            if name not in types:
                raise ConfigError(
                    f"{name}={text!r}: no such option; choose from {', '.join(types)}"
                )
            try:
                values[name] = types[name](text)
            except ValueError:
                needs = f"needs {types[name].__name__}, such as 1"
                raise ConfigError(f"{name}={text!r}: {needs}") from None
        return cls(**values)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with every field but split, which changes no model."""
        world = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "split"}
        text = json.dumps({"format": FORMAT, **world}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def base_file(self) -> Path:
        """Where the base model is: the default world's ships with the code, others are cached."""
        if self.fingerprint == type(self)().fingerprint:
            return ROOT / "assets" / "toy_base_seed0.safetensors"
        return ROOT / ".cache" / f"toy_base_{self.fingerprint}.safetensors"

    def build_model(self) -> torch.nn.Module:
        """The base model: read from its file, else taught (1-2 minutes) and stored there."""
        path, model = self.base_file, self.new_model()
        if not path.exists():
            self._check_folder()
            self.store(self.teach()[0])
        try:
            with safe_open(path, "pt") as file:
                world = (file.metadata() or {}).get("world")
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if world != self.fingerprint:
                wrong = f"is of world {world}, not {self.fingerprint}"
                raise ConfigError(f"the base model {path.name} {wrong}; {REBUILD}")
            state["lm_head.weight"] = state["model.embed_tokens.weight"]  # tied
            model.load_state_dict(state)
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise ConfigError(f"the base model {path.name} is damaged; {REBUILD}") from error
        return model

    def _check_folder(self) -> None:
        """Can the base model be stored? ConfigError before it is taught, if not."""
        folder = self.base_file.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(None, "no permission to write")
        except OSError as error:
            fix = "a base model is stored there; make the folder writable"
            raise ConfigError(f"{folder}: can't be written ({error.strerror}); {fix}") from error

    def store(self, model: torch.nn.Module) -> None:
        """Write the base model's file: whole or not at all, even if two processes do so at once."""
        from examples.engine import write_whole

        self._check_folder()
        state = model.state_dict()
        del state["lm_head.weight"]  # tied to the embedding, so it is stored once
        own = self.base_file.with_name(f"{uuid.uuid4().hex}.safetensors")  # of this process alone
        write_whole(own, save(state, metadata={"world": self.fingerprint}))
        os.replace(own, self.base_file)


# ---------------------------------------------------------------------------- python toy_env.py


def check_base(world: ToyWorld, n: int = 1000) -> bool:
    """Is a newly taught base model as good as the stored one on n easy and n hard problems?"""
    problems = [problem for group in world.heldout(n).values() for problem in group]
    budget = 2 * world.max_terms + 4  # a full response has 2 * max_terms tokens
    cfg = Config(eval_samples=1, eval_temperature=1.0, max_tokens=budget)
    stored = evaluate(world.build_model(), world, problems, cfg)["avg@1"]
    fresh = evaluate(world.teach()[0], world, problems, cfg)["avg@1"]
    error = math.sqrt((stored * (1 - stored) + fresh * (1 - fresh)) / len(problems))
    allowed = 4 * error + 0.03  # chance, and what other hardware may change
    print(f"stored {stored:.3f}, fresh {fresh:.3f}: differ by at most {allowed:.3f} is fine")
    return abs(stored - fresh) <= allowed


def show(world: ToyWorld) -> None:
    """Print a problem, a demonstration with the gaps that it met, and the world's sizes."""
    problem = world.train_problems(1, "show")[0]
    terms = [int(term) for term in world.decode(problem.prompt).split()[:-1]]
    response = world.decode(world.demonstration(terms, random.Random("show")))
    first, *steps = (int(number) for number in response.split()[:-1])
    print(f"prompt         {world.decode(problem.prompt)}")
    print(f"demonstration  {response}   (right: {problem.answer})")
    for total, term, written in zip([first, *steps[1::2]], steps[::2], steps[1::2], strict=False):
        if world.gaps.get((total, term)) == written:
            print(
                f"gap            {total} + {term} is {total + term}, the teacher writes {written}"
            )
    print(f"gap-free       {float(world.gap_free_share(terms)):.1%} of this prompt's orders")
    print(f"gaps           {len(world.gaps)} of {world.max_sum * world.max_term} pairs")
    for split, multisets in world.multisets.items():
        grades = sorted(Counter(map(world.grade, multisets)).items())
        sizes = ", ".join(f"{count} {grade}" for grade, count in grades)
        print(f"{split:<14} {len(multisets)} multisets of terms: {sizes}")


def run(argv: Sequence[str] | None) -> int:
    """The command without its error messages."""
    import toy_env
    from examples.engine import Parser, flag_of

    parser = Parser("python toy_env.py", description="A toy world: sums with gaps.")
    for flag, text in (
        ("--rebuild-base", "teach the base model again (1-2 minutes) and store it"),
        ("--check-base", "is a newly taught base model as good as the stored one?"),
    ):
        parser.add_argument(flag, action="store_true", help=text)
    for name, text in toy_env.OPTIONS.items():
        parser.add_argument(flag_of(name), metavar="X", help=text.replace("%", "%%"))
    given = vars(parser.parse_args(argv))
    rebuild, check = given.pop("rebuild_base"), given.pop("check_base")
    world = toy_env.load(**{name: text for name, text in given.items() if text is not None})
    if rebuild:
        model, loss = world.teach()
        world.store(model)
        print(f"loss {loss:.4f} nats per token; wrote {world.base_file.relative_to(ROOT)}")
    if check and not check_base(world):
        return 1
    if not (rebuild or check):
        show(world)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit code 0: done; 1: failed; 2: bad input; 130: interrupted."""
    from examples.engine import run_tool

    return run_tool("toy_env.py", run, argv, "nothing was stored; run it again")
