"""The zoo's command: SIREN's neighbours on the same toy.

    python research/zoo.py --list               # the methods
    python research/zoo.py --method par         # trains one, with siren.py's flags
    python research/zoo.py --method par:tau=0.6 --seed 3 --steps 100
    python research/zoo.py --table --plan       # all of them, over seeds: what it costs

The methods are in the folder research/zoo; docs/zoo.md says what each of them does.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # siren.py is in the folder above

from research import plugs
from research.tools import Parser, run_tool
from research.zoo import METHODS, VARIANTS, settings


def listing() -> str:
    """A line for each method: its name, what it is, and the number that is tuned."""
    lines = [f"{'method':<24}{'certainty':<12}{'tuned':<34}what it is"]
    for name, method in {**METHODS, **VARIANTS}.items():
        tuned = f"{method.coefficient} {' '.join(map(str, method.candidates))}".strip() or "-"
        what = f"{method.title}; {method.source}"
        lines.append(f"{name:<24}{method.certainty:<12}{tuned:<34}{what}")
    return "\n".join(lines)


def command_of(text: str, flags: list[str]) -> list[str]:
    """The flags of plugs.py for the method NAME or NAME:key=value,... and the flags after it.

    >>> command_of("qae:quantile=0.6", ["--seed", "3"])[2:]
    ['--plug', 'research.zoo:method=qae,quantile=0.6', '--out', 'runs/qae-seed3', '--seed',
    '3']
    """
    name, _, rest = text.partition(":")
    options = dict(option.partition("=")[::2] for option in rest.split(",") if option)
    chosen = settings(name, **options)
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--seed", default=plugs.Config.seed)
    given, _ = parser.parse_known_args(flags)
    chosen["out"] = f"runs/{name}-seed{given.seed}"
    words = []
    for field, value in chosen.items():
        words += ["--" + field.replace("_", "-"), str(value)]
    return words + flags


def command(words: list[str]) -> int:
    """--list, --table or --method, without their error messages."""
    if words == ["--list"]:
        print(listing())
        return 0
    if words[:1] == ["--table"]:
        from research.zoo import table  # here, since it imports the whole study

        return table.command(words[1:])
    if len(words) < 2 or words[0] != "--method":
        raise ValueError("write --list, --table, or --method NAME and siren.py's flags")
    return plugs.command(command_of(words[1], words[2:]))


def main(argv: list[str] | None = None) -> int:
    """The command. Its exit codes are siren.py's."""
    again = "what is done is kept; the same command, with --resume if it trains, goes on"
    return run_tool("zoo.py", command, sys.argv[1:] if argv is None else argv, again)


if __name__ == "__main__":
    sys.exit(main())
