"""Word problems whose answers a program makes: the questions of research/real_study.py.

    python research/real_task.py   # writes words_train.jsonl and words_eval.jsonl into data/

SmolLM2-135M with 4-bit weights is a weak calculator, so sums stay below ten and each question
comes after a solved one of its own form, as an earlier turn of the chat:

    user        Tom has 3 balls and finds 2 more. How many balls does Tom have now?
    assistant   Tom has 3 balls and finds 2 more, so he has 3 + 2 = 5 balls. The answer is 5.
    user        Emma has 4 books and finds 3 more. How many books does Emma have now?

The same files every time. No two questions of different files have the same numbers, in any
order; but a sum of two may be a step of a question of `twice` in the other file.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # siren.py is in the folder above
from research.tools import Parser, run_tool, write_whole

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix")
THINGS = ("apples", "books", "pens")
TURNS = "{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n<|im_start|>user\n{}"
SOLVED = {"name": "Tom", "things": "balls"}
# form -> question, numbers of the solved one, its solution; the answer is the sum of the
# numbers
FORMS: dict[str, tuple[str, tuple[int, ...], str]] = {
    "find": (
        "{name} has {0} {things} and finds {1} more. How many {things} does {name} have now?",
        (3, 2),
        "Tom has 3 balls and finds 2 more, so he has 3 + 2 = 5 balls.",
    ),
    "colours": (
        "{name} has {0} red {things} and {1} blue {things}. "
        "How many {things} does {name} have?",
        (4, 3),
        "Tom has 4 red balls and 3 blue balls, so he has 4 + 3 = 7 balls.",
    ),
    "room": (
        "There are {0} children in a room. {1} more come in. "
        "How many children are in the room now?",
        (2, 5),
        "There are 2 children and 5 more come in, so there are 2 + 5 = 7 children.",
    ),
    "twice": (
        "{name} has {0} {things}, finds {1} more, and then {2} more. "
        "How many {things} does {name} have now?",
        (3, 2, 4),
        "Tom has 3 balls and finds 2 more, so he has 3 + 2 = 5 balls. "
        "Then he finds 4 more, so he has 5 + 4 = 9 balls.",
    ),
}


def form_of(question: str) -> str:
    """The form of a question; "" if it has none of them.

    >>> form_of("Emma has 4 books and finds 3 more. How many books does Emma have now?")
    'find'
    """
    for form, (text, *_) in FORMS.items():
        if re.fullmatch(re.sub(r"\\{\w+\\}", r"\\w+", re.escape(text)), question):
            return form
    return ""


def problem(form: str, numbers: Sequence[int], name: str, things: str) -> dict[str, str]:
    """A line of a data file.

    >>> problem("find", (4, 3), "Emma", "books")["question"].splitlines()[-1]
    'Emma has 4 books and finds 3 more. How many books does Emma have now?'
    """
    text, shown, solution = FORMS[form]
    solved = text.format(*shown, **SOLVED), f"{solution} The answer is {sum(shown)}."
    question = TURNS.format(*solved, text.format(*numbers, name=name, things=things))
    return {"question": question, "answer": str(sum(numbers))}


def problems() -> dict[str, list[dict[str, str]]]:
    """File name -> problems, in a random order: every sum up to 9 in every form, names
    drawn."""
    rng = random.Random("words")
    files: dict[str, list[dict[str, str]]] = {"words_eval": [], "words_train": []}
    for form, (_, shown, _) in FORMS.items():
        for numbers in product(range(1, 9), repeat=len(shown)):
            # a fifth of the sums, whatever the order of their terms, is held out
            part = random.Random(str(sorted(numbers))).random() < 0.2
            if sum(numbers) <= 9 and sorted(numbers) != sorted(shown):
                row = problem(form, numbers, rng.choice(NAMES), rng.choice(THINGS))
                files["words_eval" if part else "words_train"].append(row)
    for rows in files.values():
        rng.shuffle(rows)
    return files


def write(folder: Path) -> None:
    """Write both files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in problems().items():
        path = folder / f"{name}.jsonl"
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        print(f"{path}: {len(rows)} problems")


def command(argv: list[str] | None) -> None:
    """Read the flag and write the files."""
    parser = Parser("real_task.py", description="Word problems, as JSON Lines.")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder [%(default)s]")
    write(parser.parse_args(argv).out)


def main(argv: list[str] | None = None) -> int:
    """The command. Exit codes as run_tool says."""
    return run_tool("real_task.py", command, argv)


if __name__ == "__main__":
    sys.exit(main())
