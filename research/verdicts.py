"""How often are the two verifiers right? The table of docs/verifier.md, from judged pairs.

    python examples/verdicts.py          # asks both verifiers, writes the table into the page

tests/data/verdicts.jsonl holds pairs of a response and an answer, judged by hand before any code
ran. A false accept is a wrong response that gets the reward, a false reject a right one that does
not. Needs math-verify: pip install math-verify.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for siren, from wherever this starts

import siren  # noqa: E402
from examples.math_answers import Grader  # noqa: E402

PAIRS, PAGE = ROOT / "tests" / "data" / "verdicts.jsonl", ROOT / "docs" / "verifier.md"
BEGIN, END = "<!-- table: python examples/verdicts.py -->", "<!-- end of table -->"


def count(pairs: Sequence[dict], equal: Callable[[str, str], bool] | None) -> Counter:
    """(kind, "accepts" or "rejects") -> how many false ones a verifier gives."""
    errors: Counter = Counter()
    for pair in pairs:
        verdict = siren.verify(pair["response"], pair["answer"], equal=equal)
        if verdict != pair["right"]:
            errors[pair["kind"], "accepts" if verdict else "rejects"] += 1
    return errors


def table(pairs: Sequence[dict]) -> str:
    """The table in Markdown, a row per kind and one for the sum."""
    grader = Grader()
    both = [count(pairs, None), count(pairs, grader.equal)]
    grader.close()
    lines = [
        "| kind | pairs (right) | exact: false accepts | rejects | math: false accepts | rejects |",
        "|---|---:|---:|---:|---:|---:|",
    ]
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


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="The table of docs/verifier.md.")
    parser.add_argument("--page", type=Path, default=PAGE, help="default %(default)s")
    page = parser.parse_args(argv).page
    try:
        text = page.read_text(encoding="utf-8")
        head, rest = text.split(BEGIN)
        tail = rest.split(END)[1]
    except (OSError, ValueError, IndexError) as error:
        parser.error(f"--page {page}: needs the lines {BEGIN} and {END} ({error})")
    pairs = [json.loads(line) for line in PAIRS.read_bytes().splitlines()]
    made = table(pairs)
    page.write_text(f"{head}{BEGIN}\n{made}\n{END}{tail}", encoding="utf-8")
    print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
