"""What a run needs around the method: its flags, its folder, its checkpoints, its exit code.

siren.py imports this file when it trains, and nothing in it changes a number. A run folder holds

    checkpoint.pt   a SHA-256 sum (32 bytes), then what torch.save wrote of the trained weights, the
                    optimiser, the records and the config
    metrics.jsonl   the records, a line per step, for people and for plots

The checkpoint is the run: on --resume, metrics.jsonl is written again from it, and the steps after
it are made again. A checkpoint is written beside its place and then moved there, so it is whole or
not there at all, whenever the process is killed or the disk is full. The folder is locked by the
process that writes to it; the system takes the lock back when that process ends, however it ends.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import hashlib
import importlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from siren import Config, ConfigError

CHECKPOINT, METRICS = "checkpoint.pt", "metrics.jsonl"
# what may differ from the checkpoint when a run is resumed: none of it changes what is computed
# (up to rounding, for the last three)
MAY_CHANGE = {"steps", "out", "save_every", "eval_every", "threads", "device"}
MAY_CHANGE |= {"micro_batch_size", "chunk"}
SHOWN = ("reward", "entropy", "h_agg", "anchor")  # of training, in the final table
HOPELESS = {  # what it means if a metric is 0 for five steps
    "reward": "every response of the last five steps was wrong, so there is nothing to learn from",
    "ended_share": "no response of the last five steps ended within --max-tokens; raise it",
}
NO_MEMORY = "lower --prompts, --micro-batch-size, --sample-batch, --chunk or --eval-samples"


def flag_of(name: str) -> str:
    """The flag of a field of Config.

    >>> flag_of("top_p")
    '--top-p'
    """
    return "--" + name.replace("_", "-")


# ------------------------------------------------------------------------------------------- flags


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ConfigErrors, and so one line."""

    def error(self, message: str) -> None:
        raise ConfigError(f"{message}; see --help")


def make_parser() -> Parser:
    """Config's fields as flags. A flag that is not given is not in the result."""
    parser = Parser("python siren.py", allow_abbrev=False, add_help=False)
    parser.add_argument("--help", action="store_true", help="print this and the task's own flags")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    for field in dataclasses.fields(Config):
        kind = float if field.default is None else type(field.default)
        allowed = field.metadata["allowed"]
        is_choice = bool(allowed) and isinstance(allowed[0], str)
        rule = f"; {' or '.join(allowed)}" if is_choice else ""
        text = f"{field.metadata['doc']} (default: {field.default}{rule})".replace("%", "%%")
        how = {"type": kind, "default": argparse.SUPPRESS, "metavar": "X", "help": text}
        parser.add_argument(flag_of(field.name), **how)
    return parser


def task_options(words: list[str]) -> dict[str, str]:
    """The task's flags, --name value or --name=value, as options of its load.

    >>> task_options(["--vocab", "1024", "--gap-share=0.3"])
    {'vocab': '1024', 'gap_share': '0.3'}
    """
    options, rest = {}, iter(words)
    for word in rest:
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"{word}: is neither a flag nor the value of one; see --help")
        name, sign, value = word.removeprefix("--").partition("=")
        value = value if sign else next(rest, None)
        if value is None:
            raise ConfigError(f"--{name}: has no value; write --{name}=VALUE")
        if part := re.search(r",\w+=", value):
            fix = "such a part starts the next option; write it in another way"
            raise ConfigError(f"--{name} {value}: holds {part[0]!r}; {fix}")
        options[name.replace("-", "_")] = value
    return options


def add_options(task: str, options: dict[str, str]) -> str:
    """The task with more options.

    >>> add_options("toy_env:seed=3", {"vocab": "1024"})
    'toy_env:seed=3,vocab=1024'
    """
    for name, value in options.items():
        task += f"{',' if ':' in task else ':'}{name}={value}"
    return task


def read_flags(argv: list[str] | None = None) -> tuple[Config, bool]:
    """The Config that a command line asks for, and whether to resume.

    Flags that Config does not have belong to the task: `--vocab 1024` is the same as
    `--task toy_env:vocab=1024`, and `--model NAME` alone selects the task examples.text_env.
    """
    parser = make_parser()
    given, rest = parser.parse_known_args(argv)
    flags, options = vars(given), {}
    show_help, resume = flags.pop("help"), flags.pop("resume")
    if not show_help:
        options = task_options(rest)
    is_text = any(word.split("=")[0] == "--model" for word in rest)
    task = flags.get("task", "examples.text_env" if is_text else Config.task)
    if show_help:
        print(parser.format_help() + help_of(task.partition(":")[0]))
        sys.exit(0)
    flags["task"] = add_options(task, options)
    if resume:
        flags = saved_flags(flags)
    cfg = Config(**flags)
    without = {"none": ("beta", "anchor"), "bonus": ("anchor",)}.get(cfg.regularizer, ())
    for name in without:
        if name in vars(given):
            fix = f"has no effect with --regularizer {cfg.regularizer}; leave it out"
            raise ConfigError(f"{flag_of(name)} {vars(given)[name]}: {fix}")
    return cfg, resume


def help_of(module: str) -> str:
    """What the task says of its options: its dictionary OPTIONS, name -> text."""
    try:
        options = importlib.import_module(module).OPTIONS
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"--task {module}: {error}") from error
    own = {name: text for name, text in options.items() if name not in vars(Config())}
    both = ", ".join(name for name in options if name in vars(Config()))
    lines = [f"  {flag_of(name):<19} X  {text}" for name, text in own.items()]
    if both:
        lines.append(f"  also in the form --task {module}:key=value,...: {both}")
    return "\n".join([f"\nflags of the task {module}:", *lines])


def saved_flags(flags: dict) -> dict:
    """The flags of the run to be resumed, and over them those that are given now.

    The task in a checkpoint is data: its module is named by the command line or it is the default.
    """
    saved = load_checkpoint(folder_of(Config(**flags)))["config"]
    for name, value in dataclasses.asdict(Config()).items():
        kinds = {float, type(None)} if name == "anchor" else {type(value)}
        if type(saved.get(name)) not in kinds:
            raise ConfigError(f"--resume: the checkpoint's config has no valid {name}; restore it")
    for name in ("task", "plug"):
        was, now = (str(values.get(name, "")) for values in (saved, flags))
        parts = [split_plugs(text) if name == "plug" else [text] for text in (was, now)]
        modules = [",".join(part.partition(":")[0] for part in some) for some in parts]
        if modules[0] != modules[1]:
            value = modules[0]
            fix = f"add {flag_of(name)} {value} if you trust it"
            raise ConfigError(f"--resume: the run was made with {flag_of(name)} {value}; {fix}")
        if ":" not in now:
            flags = {**flags, name: was}
    kept = {name: saved[name] for name in dataclasses.asdict(Config())}
    return {**kept, "out": "", **flags}  # where it is written is never up to a file


# ------------------------------------------------------------------------------------------ folder


def folder_of(cfg: Config) -> Path:
    """Where a run is written."""
    return Path(cfg.out or f"runs/{cfg.regularizer}-seed{cfg.seed}")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, whenever the process is killed or the disk is full."""
    part = path.with_suffix(".part")
    try:
        part.unlink(missing_ok=True)
        with open(part, "xb") as file:  # x: a new file, so never through a symbolic link
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> dict:
    """The checkpoint: model, optimizer, records, config. ConfigError if it is not whole."""
    path = Path(folder) / CHECKPOINT
    if not os.path.isfile(path):
        raise ConfigError(f"--resume: {path} does not exist; run the same command without --resume")
    try:
        data = path.read_bytes()
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            raise ValueError("its content does not match its checksum")
        saved = torch.load(io.BytesIO(data[32:]), map_location="cpu", weights_only=True)
        check_records(saved["records"])
        if not isinstance(saved["config"], dict):
            raise ValueError("it has no config")
        return {name: saved[name] for name in ("model", "optimizer", "records", "config")}
    except Exception as error:  # a damaged or hostile file may raise whatever it likes
        fix = "restore it, or start in another --out"
        raise ConfigError(
            f"--resume: {path} is not a whole checkpoint: {one_line(error)}; {fix}"
        ) from error


def check_records(records: list[dict]) -> None:
    """ValueError unless these are the records of the steps 0, 1, 2, ... of a run."""
    if not records or [record["step"] for record in records] != list(range(len(records))):
        raise ValueError("its records are not those of steps 0, 1, 2, ...")
    for record in records:
        numbers = all(type(name) is str and type(x) in (int, float) for name, x in record.items())
        missing = set(SHOWN) - set(record) if record["step"] > 0 else set()
        if not numbers or missing or type(record["step"]) is not int:
            raise ValueError(f"its record of step {record['step']} is not one of siren.py")


class RunFolder:
    """The folder of one run, in a `with` block: locked, and ready to be written."""

    def __init__(self, cfg: Config, resume: bool) -> None:
        self.cfg, self.path, self.resume = cfg, folder_of(cfg), resume
        self.saved: dict = {}
        self.changed: list[str] = []  # what differs from the checkpoint and may

    def __enter__(self) -> RunFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            fix = f"can't be written ({error.strerror}); name another folder"
            raise ConfigError(f"--out {self.path}: {fix}") from error
        try:
            self._claim()
        except BaseException:
            os.close(self.lock)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.lock)  # this releases the lock

    def _claim(self) -> None:
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            fix = "another process is writing this run; wait for it, or name another --out"
            raise ConfigError(f"--out {self.path}: {fix}") from error
        if not os.access(self.path, os.W_OK):
            raise ConfigError(f"--out {self.path}: can't be written; name another folder")
        metrics = self.path / METRICS
        has_run = (self.path / CHECKPOINT).exists() or (
            metrics.is_file() and metrics.stat().st_size
        )
        if self.resume:
            self.saved = load_checkpoint(self.path)
            self._compare()
        elif has_run:
            fix = "add --resume to go on with it, or name another --out"
            raise ConfigError(f"--out {self.path}: already holds a run; {fix}")

    def _compare(self) -> None:
        """Is the checkpoint of this run? ConfigError if not; what may change is noted."""
        config = dataclasses.asdict(self.cfg)
        for name, value in config.items():
            was = self.saved["config"].get(name)
            if was == value or name == "out":
                continue
            if name not in MAY_CHANGE:
                fix = "leave the flag out, or start in another --out"
                raise ConfigError(f"--resume: {flag_of(name)} was {was}, not {value}; {fix}")
            self.changed.append(f"resuming with {flag_of(name)} {value}; it was {was}")
        if (self.path / METRICS).is_file():
            lines = (self.path / METRICS).read_bytes().splitlines()
            for record, line in zip(self.saved["records"], lines):
                if is_record(line) and line != to_line(record).strip():
                    fix = f"{CHECKPOINT} and {METRICS} are of two runs; restore the right one"
                    raise ConfigError(f"--resume: {self.path}: {fix}")

    def restore(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[dict]:
        """Fill model and optimizer from the checkpoint, if any; return the records so far."""
        records = []
        if self.resume:
            fill(model, optimizer, self.saved, self.path / CHECKPOINT)
            for text in self.changed:
                say(text)
            records = self.saved["records"]
            self.saved = {}
            write_whole(self.path / METRICS, b"".join(map(to_line, records)))
        return records

    def save(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, records: list) -> None:
        """Write the checkpoint."""
        weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        state = {"model": weights, "optimizer": optimizer.state_dict(), "records": records}
        state["config"] = dataclasses.asdict(self.cfg)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
        write_whole(self.path / CHECKPOINT, hashlib.sha256(data).digest() + data)

    def log(self, records: list[dict]) -> None:
        """Append the last record to metrics.jsonl, and say so if nothing can be learned."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        with open(os.open(self.path / METRICS, flags, 0o666), "ab") as file:
            file.write(to_line(records[-1]))
        for name, what in HOPELESS.items():
            steps = [record[name] for record in records[1:]]
            if len(steps) >= 5 and not any(steps[-5:]) and (len(steps) == 5 or steps[-6]):
                say(f"step {records[-1]['step']}: {what}")


def to_line(record: dict) -> bytes:
    """A line of metrics.jsonl."""
    return (json.dumps(record) + "\n").encode()


def is_record(line: bytes) -> bool:
    """Is this a whole line of a metrics.jsonl? The last one of a run that was killed may not be."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def fill(model: torch.nn.Module, optimizer: torch.optim.Optimizer, saved: dict, path: Path) -> None:
    """Put saved weights and optimiser state into place; ConfigError unless all of it fits."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    like = {name: (p.shape, p.dtype) for name, p in trained.items()}
    try:
        if like != {name: (p.shape, p.dtype) for name, p in saved["model"].items()}:
            raise ValueError("its weights are those of another model")
        state = saved["optimizer"]["state"]
        if set(state) != (set(range(len(trained))) if len(saved["records"]) > 1 else set()):
            raise ValueError("its optimiser state is that of another model")
        for index, p in zip(sorted(state), trained.values()):
            shapes = {name: tensor.shape for name, tensor in state[index].items()}
            if shapes != {"step": torch.Size(), "exp_avg": p.shape, "exp_avg_sq": p.shape}:
                raise ValueError("its optimiser state is that of another model")
        # learning rate, betas and weight decay are the config's, whatever the file says
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        model.load_state_dict(saved["model"], strict=False)  # what is not trained is as it was
    except Exception as error:  # a hostile file may hold anything
        raise ConfigError(f"--resume: {path}: {one_line(error)}; restore it") from error


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first that there is of cuda, mps and cpu."""
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    try:
        probe = torch.ones(1, device=name)
        float(probe.sum())  # so that there is something to compute with
    except (RuntimeError, AssertionError, ImportError, AttributeError) as error:
        raise ConfigError(f"--device {name}: {one_line(error)}; use --device cpu") from error
    return probe.device


@contextmanager
def bad_input(flag: str) -> Iterator[None]:
    """What is refused inside the block is one line that names the flag."""
    try:
        yield
    except ConfigError:
        raise
    except (ImportError, OSError, ValueError) as error:
        raise ConfigError(f"{flag}: {error}") from error


# ----------------------------------------------------------------------------------------- command


def say(text: str) -> None:
    """A line for people, apart from the output."""
    print(f"siren.py: {' '.join(text.split())}", file=sys.stderr)


def report(records: list[dict]) -> str:
    """A table of the run: its first step or evaluation beside the last ones.

    >>> print(report([{"step": 0, "hard/avg@4": 0.25}, {"step": 1, "hard/avg@4": 0.5}]))
                          before   after
    hard/avg@4             0.250   0.500
    """
    steps, rows = [record for record in records if "reward" in record], []
    for name in SHOWN if steps else ():
        last = [record[name] for record in steps[-10:]]
        rows.append((name, steps[0][name], sum(last) / len(last)))
    if steps and steps[0]["anchor"]:
        ends = [record["h_agg"] / record["anchor"] for record in steps]
        rows.append(("h_agg / anchor", ends[0], sum(ends[-10:]) / len(ends[-10:])))
    tested = [record for record in records if any("/" in name for name in record)]
    if tested:
        first, final = tested[0], tested[-1]
        rows += [(name, value, final[name]) for name, value in first.items() if "/" in name]
    note = "   (training: first step, mean of the last ten)" if steps else ""
    lines = [f"{name:<20}{before:>8.3f}{after:>8.3f}" for name, before, after in rows]
    return "\n".join([f"{'':20}{'before':>8}{'after':>8}{note}", *lines])


def run_command(train: Callable, argv: list[str] | None = None) -> int:
    """The command: flags, then train, then the table. Whatever goes wrong is one line.

    Exit code 0: done; 1: stopped (diverged, no memory, disk full); 2: bad input; 130: interrupted.
    """
    again = "the same command"
    try:
        cfg, resume = read_flags(argv)
        again = f"--resume --out {folder_of(cfg)}"
        with plugged(cfg.plug):
            print(report(train(cfg, resume=resume)))
        print(f"every step: {folder_of(cfg) / METRICS}")
        return 0
    except ConfigError as error:
        code, text = 2, f"error: {error}"
    except FloatingPointError as error:
        code, text = 1, f"stopped: {error}; lower --lr or --beta"
    except (MemoryError, torch.OutOfMemoryError) as error:
        code, text = 1, f"stopped: no memory ({one_line(error)}); {NO_MEMORY}"
    except OSError as error:
        code, text = 1, f"stopped: {one_line(error)}; if there is a checkpoint, {again} goes on"
    except RuntimeError as error:  # how the CPU's allocator says it
        if "allocat" not in str(error) and "too large" not in str(error):
            raise
        code, text = 1, f"stopped: no memory ({one_line(error)}); {NO_MEMORY}"
    except KeyboardInterrupt:
        code, text = 130, f"interrupted; if there is a checkpoint, {again} goes on"
    say(text)
    return code


def run_tool(
    name: str,
    function: Callable,
    argv: list[str] | None = None,
    again: str = "what is done is kept; the same command goes on",
) -> int:
    """A command beside siren.py: function(argv). Whatever goes wrong is one line.

    again: what to do after a stop. Exit code 0 or what function returns: done; 1: stopped; 2: bad
    input; 130: interrupted.
    """
    try:
        return function(argv) or 0
    except ConfigError as error:
        code, text = 2, f"error: {error}"
    except (RuntimeError, OSError) as error:
        code, text = 1, f"stopped: {one_line(error)}; {again}"
    except KeyboardInterrupt:
        code, text = 130, f"interrupted; {again}"
    print(f"{name}: {text}", file=sys.stderr)
    return code


def split_plugs(plugs: str) -> list[str]:
    """The parts of --plug.

    >>> split_plugs("one:key=1,other=2,two")
    ['one:key=1,other=2', 'two']
    """
    return [plug for plug in re.split(r",(?!\w+=)", plugs) if plug]


@contextmanager
def plugged(plugs: str) -> Iterator[None]:
    """Inside, drop-ins stand in for functions of siren: "module:key=value,key=value,module".

    Each module's plug(key=value, ...), whose values are text, replaces what it likes, such as
    siren.update. Afterwards siren.py's own functions are back.
    """
    import siren

    before = dict(vars(siren))
    try:
        for plug in split_plugs(plugs):
            module, _, options = plug.partition(":")
            pairs = [option.partition("=") for option in options.split(",") if option]
            try:
                importlib.import_module(module).plug(**{key: value for key, _, value in pairs})
            except (ImportError, AttributeError, TypeError, ValueError) as error:
                fix = "name a module with a plug() and its options"
                raise ConfigError(f"--plug {plug}: {error}; {fix}") from error
        yield
    finally:
        vars(siren).update(before)


def one_line(error: BaseException) -> str:
    """An error's first line, shortened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
