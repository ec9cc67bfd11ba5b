"""The zoo's command: SIREN's neighbours on the same toy.

    python examples/zoo.py --list                       # the methods
    python examples/zoo.py --method par                 # trains one, with siren.py's flags
    python examples/zoo.py --method par:tau=0.6 --seed 3 --steps 100
    python examples/zoo.py --table --plan               # all of them, over seeds: what it costs

The methods are in the folder examples/zoo; docs/zoo.md says what each of them does.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # siren.py is in the folder above

import siren
from examples import engine
from examples.zoo import METHODS, VARIANTS, settings


def listing() -> str:
    """A line for each method: its name, what it is, and the number that is tuned."""
    lines = [f"{'method':<24}{'certainty':<12}{'tuned':<34}what it is"]
    for name, method in {**METHODS, **VARIANTS}.items():
        tuned = f"{method.coefficient} {' '.join(map(str, method.candidates))}".strip() or "-"
        what = f"{method.title}; {method.source}"
        lines.append(f"{name:<24}{method.certainty:<12}{tuned:<34}{what}")
    return "\n".join(lines)


def command_of(text: str, flags: list[str]) -> list[str]:
    """siren.py's flags for the method NAME or NAME:key=value,... and the flags given with it.

    >>> command_of("qae:quantile=0.6", ["--seed", "3"])[2:]
    ['--plug', 'examples.zoo:method=qae,quantile=0.6', '--out', 'runs/qae-seed3', '--seed', '3']
    """
    name, _, rest = text.partition(":")
    options = dict(option.partition("=")[::2] for option in rest.split(",") if option)
    chosen = settings(name, **options)
    given, _ = engine.make_parser().parse_known_args(flags)
    chosen["out"] = f"runs/{name}-seed{getattr(given, 'seed', siren.Config.seed)}"
    pairs = [(engine.flag_of(key), str(value)) for key, value in chosen.items()]
    return [word for pair in pairs for word in pair] + flags


def main(argv: list[str] | None = None) -> int:
    """The command. Exit codes as siren.py's."""
    words = sys.argv[1:] if argv is None else argv
    try:
        if words == ["--list"]:
            print(listing())
            return 0
        if words[:1] == ["--table"]:
            from examples.zoo import table  # here, since it imports the whole study

            return engine.run_tool("zoo.py", table.command, words[1:])
        if len(words) < 2 or words[0] != "--method":
            raise siren.ConfigError("write --list, --table, or --method NAME and siren.py's flags")
        return siren.main(command_of(words[1], words[2:]))
    except siren.ConfigError as error:
        engine.say(f"error: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
