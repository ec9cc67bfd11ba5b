"""How often are the two verifiers right? The table of docs/verifier.md, from judged pairs.

    python research/verdicts.py          # asks both verifiers, writes the table into the page

tests/data/verdicts*.jsonl hold pairs of a response and an answer, judged by hand before any
code ran. A false accept is a wrong response that gets the reward, a false reject a right one
that does not. The verifiers are those of text_env.py: exact, and math, which needs pip install
math-verify.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # siren.py is in the folder above
import siren
import text_env
from math_answers import Grader, plain_boxes
from research.tools import Parser, run_tool

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "tests" / "data").glob("verdicts*.jsonl"))
PAGE = ROOT / "docs" / "verifier.md"
BEGIN = "<!-- table: python research/verdicts.py -->"
END = "<!-- end of table -->"


def count(pairs: Sequence[dict], equal: Callable[[str, str], bool]) -> Counter:
    """(kind, "accepts" or "rejects") -> how many false ones a verifier gives."""
    errors: Counter = Counter()
    for pair in pairs:
        response = plain_boxes(pair["response"])
        verdict = siren.verify(response, pair["answer"], None, equal)
        if verdict != pair["right"]:
            errors[pair["kind"], "accepts" if verdict else "rejects"] += 1
    return errors


def table(pairs: Sequence[dict]) -> str:
    """The table in Markdown, a row per kind and one for the sum."""
    both = [count(pairs, text_env.equal), count(pairs, Grader().equal)]
    heads = (
        "kind | pairs (right) | exact: false accepts | rejects | math: false accepts | rejects"
    )
    lines = [f"| {heads} |", "|---|---:|---:|---:|---:|---:|"]
    kinds = list(dict.fromkeys(pair["kind"] for pair in pairs))
    for kind in [*kinds, ""]:
        own = [pair for pair in pairs if kind in ("", pair["kind"])]
        right = sum(pair["right"] for pair in own)
        numbers = [
            sum(n for (of, what), n in errors.items() if kind in ("", of) and what == side)
            for errors in both
            for side in ("accepts", "rejects")
        ]
        cells = [kind or "**all**", f"{len(own)} ({right})", *map(str, numbers)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def command(argv: list[str] | None) -> None:
    """Write the table into the page and print it."""
    parser = Parser("verdicts.py", description="The table of docs/verifier.md.")
    parser.add_argument("--page", type=Path, default=PAGE, help="default %(default)s")
    page = parser.parse_args(argv).page
    siren.require(page.is_file(), f"--page {page}: no such file")
    text = page.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    siren.require(begin and end, f"--page {page}: needs the lines {BEGIN} and {END}")
    lines = [line for path in FILES for line in path.read_bytes().splitlines()]
    pairs = [json.loads(line) for line in lines]
    made = table(pairs)
    page.write_text(f"{head}{BEGIN}\n{made}\n{END}{tail}", encoding="utf-8")
    print(made)


def main(argv: list[str] | None = None) -> int:
    """The command. Exit codes as run_tool says."""
    return run_tool("verdicts.py", command, argv)


if __name__ == "__main__":
    sys.exit(main())
