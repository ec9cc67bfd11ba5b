"""Training with functions of siren.py replaced: what a comparison with other rules needs.

    python research/plugs.py --plug research.official:exclusive=1 [siren.py's flags]
    python research/plugs.py --plug research.refill,research.zoo:method=par --regularizer none

A plug is a module with a function plug(name=value, ...), whose values are text. It replaces
what it likes, such as siren.update. Several plugs are separated by commas.
"""

import dataclasses
import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # siren.py is in the folder above

import siren
from research.tools import Parser, run_tool


@dataclasses.dataclass(frozen=True)
class Config(siren.Config):
    """The settings of a run, and what is plugged into siren.py while it trains."""

    plug: str = ""


def split_plugs(plugs: str) -> list[str]:
    """The parts of --plug.

    >>> split_plugs("one:key=1,other=2,two")
    ['one:key=1,other=2', 'two']
    """
    return [plug for plug in re.split(r",(?!\w+=)", plugs) if plug]


@contextmanager
def plugged(plugs: str) -> Iterator[None]:
    """Inside the block the plugs, "module:name=value,name=value,module", are in siren.py.

    Afterwards siren.py's own functions are back. A checkpoint names the plugs that it was made
    with, and a run goes on with the same ones only.
    """
    before = dict(vars(siren))
    try:
        for plug in split_plugs(plugs):
            module, _, rest = plug.partition(":")
            pairs = [option.partition("=") for option in rest.split(",") if option]
            options = {name: value for name, _, value in pairs}
            try:
                importlib.import_module(module).plug(**options)
            except (ImportError, AttributeError, TypeError, ValueError) as error:
                fix = "name a module with a plug() and its options"
                raise ValueError(f"--plug {plug}: {error}; {fix}") from error
        if plugs:
            remember(plugs)
        yield
    finally:
        vars(siren).update(before)


def remember(plugs: str) -> None:
    """Let siren.py store the plugs in each checkpoint, and refuse those of other plugs."""
    new_run = siren.Run
    load_checkpoint = siren.load_checkpoint

    def new_plugged_run(cfg: siren.Config, resume: bool = False) -> siren.Run:
        run = new_run(cfg, resume)
        run.cfg = Config(
            **(vars(cfg) | {"plug": plugs})
        )  # which is stored with each checkpoint
        return run

    def load_plugged_checkpoint(folder: Path) -> dict:
        saved = load_checkpoint(folder)
        before = saved["config"].pop("plug", "")
        siren.require(before == plugs, f"--resume: --plug was {before!r}, not {plugs!r}")
        return saved

    siren.Run = new_plugged_run
    siren.load_checkpoint = load_plugged_checkpoint


def command(argv: list[str] | None) -> int:
    """siren.py's command with --plug."""
    parser = Parser("python research/plugs.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--plug", default="")
    given, flags = parser.parse_known_args(argv)
    with plugged(given.plug):
        return siren.main(flags) or 0


def main(argv: list[str] | None = None) -> int:
    """The command. Its exit codes are siren.py's."""
    return run_tool("plugs.py", command, argv, "--resume goes on from the last checkpoint")


if __name__ == "__main__":
    sys.exit(main())
