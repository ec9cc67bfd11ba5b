"""Write the sums that text_env.py is shown with: questions in words, answers in digits.

    python examples/make_data.py           # writes data/sums16.jsonl, sums_train and sums_eval

sums16: 16 one- and two-digit sums. sums_train and sums_eval: all sums of two numbers from 1 to
--max-term, split so that a + b and b + a stay together. The same files every time.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable, Sequence
from itertools import combinations_with_replacement
from pathlib import Path


def problem(a: int, b: int) -> dict[str, str]:
    """A line of a data file.

    >>> problem(9, 8)
    {'question': 'What is 9 plus 8?', 'answer': '17'}
    """
    return {"question": f"What is {a} plus {b}?", "answer": str(a + b)}


def sums(max_term: int, eval_share: float, seed: int) -> dict[str, list[dict[str, str]]]:
    """File name -> problems. ValueError for numbers that leave a file empty."""
    if max_term < 9:
        raise ValueError(f"--max-term {max_term}: must be at least 9")
    if not 0 < eval_share < 1:
        raise ValueError(f"--eval-share {eval_share}: must be above 0 and below 1")
    rng = random.Random(f"sums {seed}")
    pairs = list(combinations_with_replacement(range(1, max_term + 1), 2))
    rng.shuffle(pairs)
    held = max(1, round(eval_share * len(pairs)))
    parts = {"sums_eval": pairs[:held], "sums_train": pairs[held:]}
    files = {}
    for name, part in parts.items():
        ordered = sorted({order for a, b in part for order in ((a, b), (b, a))})
        rng.shuffle(ordered)
        files[name] = [problem(a, b) for a, b in ordered]
    small = [p for p in pairs if max(p) <= 9]
    one_digit = [p for p in small if sum(p) <= 9][:8]
    two_digits = [p for p in small if sum(p) >= 10][:8]
    return {"sums16": [problem(a, b) for a, b in one_digit + two_digits], **files}


def write(path: Path, problems: Iterable[dict[str, str]]) -> None:
    """A JSON Lines file."""
    text = "".join(json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        "make_data.py", usage=argparse.SUPPRESS, description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", default="data", help="folder (default %(default)s)")
    parser.add_argument(
        "--max-term", type=int, default=9, help="largest term (default %(default)s)"
    )
    parser.add_argument("--eval-share", type=float, default=0.2, help="default %(default)s")
    parser.add_argument(
        "--seed", type=int, default=0, help="draws the split (default %(default)s)"
    )
    args = parser.parse_args(argv)
    try:
        files = sums(args.max_term, args.eval_share, args.seed)
    except ValueError as error:
        parser.error(str(error))
    for name, problems in files.items():
        path = Path(args.out) / f"{name}.jsonl"
        write(path, problems)
        print(f"{path}: {len(problems)} problems")
    return 0


if __name__ == "__main__":
    sys.exit(main())
