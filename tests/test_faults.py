"""Faults and attacks on a run: whatever happens, it is one clear line, or the run goes on
exactly.

    python -m pytest -q tests/test_faults.py                        # some of the cases
    python -m pytest -q tests/test_faults.py -m "slow or not slow"  # all of them, minutes
    python -m tests.test_faults     # all, and the counts go to docs/reliability.md

Each test tries many cases and counts those that held. Runs are processes forked from a warm
server (torch is imported once); all seeds and moments are fixed as shares of the time that a
run takes. `slow` tests are not run by default (pyproject.toml); CI runs them by a line of its
own.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import siren
import toy_env  # here, so that the warm server has it
from siren import load_checkpoint

ROOT = Path(siren.__file__).resolve().parent
FLAGS = ["--prompts=4", "--group-size=2", "--mini-batches=2", "--save-every=2"]
FLAGS += ["--eval-prompts=4", "--eval-samples=2"]
STEPS = 6
CONTEXT = multiprocessing.get_context("forkserver")
WARM = ["pytest", "siren", "toy_env", "torch._dynamo"]
WARM += ["transformers.models.qwen2.modeling_qwen2", "safetensors.torch"]
CONTEXT.set_forkserver_preload(
    WARM
)  # found if pytest starts in ROOT; otherwise it is only slower


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    lines: list[str]  # of the errors, without the progress bar

    def problem(self, code: int, *texts: str) -> str:
        """What is wrong, if it isn't this exit code and one line, of siren.py, with these
        texts."""
        one_line = len(self.lines) == 1 and self.lines[0].startswith("siren.py: ")
        if self.code != code or not one_line:
            return f"exit code {self.code}, not {code}: {self.lines[-3:]}"
        said = self.lines[0].replace("_", "-")  # a flag may be called as Config's field
        texts = [text for text in texts if text.replace("_", "-") not in said]
        return f"no {texts}: {self.lines}" if texts else ""


def call(argv: list[str]) -> Done:
    """siren.main in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = siren.main(argv) or 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
            code = 99
    lines = [line for line in err.getvalue().splitlines() if line.strip() and "%|" not in line]
    return Done(code, out.getvalue(), lines)


def child(argv: list[str], sender: Any, moment: float, limits: dict[int, int]) -> None:
    """siren.main in a process of its own: the body of start()."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file over its limit is an OSError
    torch.set_num_threads(1)
    time.sleep(max(0.0, moment - time.monotonic()))
    for what, limit in limits.items():
        used = 0
        if what == resource.RLIMIT_AS:
            used = (
                int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            )
        resource.setrlimit(what, (used + limit, used + limit))
    sender.send(call(argv))


def start(
    argv: list[str], moment: float = 0.0, limits: dict[int, int] | None = None
) -> tuple[Any, Callable[[], Done | None]]:
    """A process that runs siren.main (from that time.monotonic() on), and a function that
    waits for its end and its result."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=child, args=(argv, sender, moment, limits or {}))
    process.start()
    sender.close()

    def wait() -> Done | None:
        try:
            done = receiver.recv() if receiver.poll(120) else None
        except EOFError:  # killed
            done = None
        process.join(60)
        return done

    return process, wait


def command(folder: Path, *flags: str) -> list[str]:
    """The command of a small run."""
    return [f"--out={folder}", *FLAGS, f"--steps={STEPS}", *flags]


def again(folder: Path, *flags: str) -> list[str]:
    """The command that goes on with a run that was stopped."""
    if (folder / "checkpoint.pt").exists():
        return [f"--out={folder}", "--resume", *flags]
    return command(folder, *flags)


def on_disk(folder: Path) -> list[dict]:
    """The records of metrics.jsonl without times."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder that have something in them; the file of a lock is empty."""
    files = [path for path in folder.iterdir() if path.is_file() and path.stat().st_size]
    return {path.name: path.read_bytes() for path in files}


def differs(folder: Path, other: Path) -> str:
    """What two finished runs differ in; "" for nothing."""
    if set(contents(folder)) != {"checkpoint.pt", "metrics.jsonl"}:
        return f"the folder holds {sorted(os.listdir(folder))}"
    if on_disk(folder) != on_disk(other):
        return f"metrics.jsonl differs: {[r['step'] for r in on_disk(folder)]}"
    one, two = load_checkpoint(folder), load_checkpoint(other)
    if one["anchor"] != two["anchor"]:
        return "the anchors differ"
    for key, value in two["model"].items():
        if not torch.equal(one["model"][key], value):
            return f"the weights {key} differ"
    for index, state in two["optimizer"]["state"].items():
        for key, value in state.items():
            if not torch.equal(one["optimizer"]["state"][index][key], value):
                return f"the optimiser's {key} differ"
    return ""


class Tally:
    """Counts the cases of a test; `finish` fails it unless all of them held."""

    def __init__(self, record: Callable[[str, object], None]) -> None:
        self.record, self.tried, self.wrong = record, 0, []

    def add(self, case: object, problem: str) -> None:
        """One case; problem is "" if it held."""
        self.tried += 1
        if problem:
            self.wrong.append(f"{case}: {problem}")

    def finish(self, expected: int) -> None:
        """All of them, and as many as were meant."""
        self.record("tried", self.tried)
        self.record("held", self.tried - len(self.wrong))
        assert not self.wrong, "\n".join([f"{len(self.wrong)} of {self.tried}", *self.wrong])
        assert self.tried == expected


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Tally:
    """The counts of one test, which docs/reliability.md shows."""
    return Tally(record_property)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("faults") / "whole"
    assert call(command(folder)).code == 0
    return folder


@pytest.fixture(scope="module")
def half(whole: Path) -> Path:
    """The folder of the same run, stopped with a checkpoint of step 2 and a line of step 3."""
    folder, true_step = whole.parent / "half", siren.training_step

    def stopped(run, step):
        if step == 4:
            raise KeyboardInterrupt
        return true_step(run, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(siren, "training_step", stopped)
        assert call(command(folder)).code == 130
    assert len(load_checkpoint(folder)["records"]) == 3 and len(on_disk(folder)) == 4
    return folder


@pytest.fixture(scope="module")
def duration(whole: Path) -> float:
    """The seconds that a run takes in a warm process, start and end included."""
    times = []
    for i in range(2):
        begin = time.monotonic()
        _, wait = start(command(whole.parent / f"timed{i}"))
        done = wait()
        assert done is not None and done.code == 0
        times.append(time.monotonic() - begin)
    return times[-1]


# ------------------------------------------------------------------------------ stopped runs


def finished(folder: Path, whole: Path) -> str:
    """Finish a run that was stopped, in this process; what is wrong with its end."""
    done = call(again(folder))
    return str(done) if done.code else differs(folder, whole)


@pytest.mark.slow
def test_kill_9_in_a_warm_process(tmp_path, whole, duration, tally):
    """kill -9 at 16 moments spread over the run: it ends as the undisturbed one"""
    rng, had_checkpoint = random.Random(0), []
    for i in range(16):
        folder, share = tmp_path / str(i), (i + rng.random()) / 16
        for attempt in range(5):
            process, wait = start(command(folder))
            time.sleep(share * duration * 0.7**attempt)
            process.kill()
            wait()
            if process.exitcode == -signal.SIGKILL:
                break
            shutil.rmtree(folder)  # it was faster than expected
        had_checkpoint.append((folder / "checkpoint.pt").exists())
        tally.add(f"at {share:.0%}", finished(folder, whole))
    assert 1 <= sum(had_checkpoint) < 16, "before and after the first checkpoint"
    tally.finish(16)


@pytest.mark.slow
def test_kill_9_of_the_command(tmp_path, whole, tally):
    """kill -9 of `python siren.py` at 4 moments, imports included: the same"""
    for i, seconds in enumerate((0.1, 0.8, 2.0, 3.5)):
        argv = [sys.executable, "siren.py", *command(tmp_path / str(i))]
        process = subprocess.Popen(argv, cwd=ROOT, stdout=-3, stderr=-3)
        time.sleep(seconds)
        process.kill()
        process.wait(60)
        tally.add(f"after {seconds} s", finished(tmp_path / str(i), whole))
    tally.finish(4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signals(tmp_path, whole, duration, tally, name):
    """Ctrl-C or SIGTERM at 5 moments each, then --resume: the same"""
    for i in range(5):
        folder = tmp_path / str(i)
        for attempt in range(5):
            process, wait = start(command(folder))
            deadline = time.monotonic() + 60
            while not folder.exists() and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep((i + 0.5) / 6 * duration * 0.7**attempt)
            with suppress(ProcessLookupError):  # it was faster than expected
                os.kill(process.pid, getattr(signal, name))
            done = wait()
            if process.exitcode or (done and done.code):
                break
            shutil.rmtree(folder)
        if name == "SIGTERM":
            problem = "" if process.exitcode == -signal.SIGTERM else f"ended with {done}"
        else:
            problem = done.problem(130, "interrupted; --resume") if done else "no end"
        tally.add(f"{name} {i}", problem or finished(folder, whole))
    tally.finish(5)


# ------------------------------------------------------------------------------ two at once


def pair(argv: list[str], *texts: str) -> str:
    """Two processes that begin the same run at the same moment: what is wrong, if it is not
    that one of them trains and the other one is refused."""
    moment = time.monotonic() + 0.2
    waits = [start(argv, moment)[1] for _ in range(2)]
    first, second = sorted((wait() for wait in waits), key=lambda done: done.code)
    return f"{first.lines}" if first.code else second.problem(2, *texts)


PAIRS = pytest.mark.parametrize("pairs", [2, pytest.param(20, marks=pytest.mark.slow)])


@PAIRS
def test_two_started_together(tmp_path, whole, tally, pairs):
    """pairs of runs started together in one folder: one wins, its files are whole"""
    for i in range(pairs):
        folder = tmp_path / str(i)
        tally.add(i, pair(command(folder), str(folder)) or differs(folder, whole))
    tally.finish(pairs)


@PAIRS
def test_two_resumed_together(tmp_path, half, tally, pairs):
    """pairs of --resume started together: one wins, its files are whole"""
    long = shutil.copytree(half, tmp_path / "long")
    assert call(again(long, "--steps=12")).code == 0
    for i in range(pairs):
        folder = shutil.copytree(half, tmp_path / str(i))
        problem = pair(again(folder, "--steps=12"), "another process")
        tally.add(i, problem or differs(folder, long))
    tally.finish(pairs)


# ----------------------------------------------------------------------------- disk and memory


def test_disk_full(tmp_path, whole, half, tally):
    """files cut off at 10 sizes (no room): one line, exit code 1, the last checkpoint whole"""
    assert call(command(tmp_path / "start", "--steps=0")).code == 0
    first = (tmp_path / "start" / "checkpoint.pt").stat().st_size
    full = (half / "checkpoint.pt").stat().st_size
    lines = (half / "metrics.jsonl").stat().st_size
    cases = [(None, size) for size in (0, 31, first // 2, first + 5000, full - 9)]
    cases += [(half, size) for size in (0, 10, lines // 2, full // 2, full - 9)]
    for i, (source, size) in enumerate(cases):
        folder = tmp_path / str(i)
        if source:
            shutil.copytree(source, folder)
        done = start(again(folder), limits={resource.RLIMIT_FSIZE: size})[1]()
        problem = done.problem(1) if done else "no end"
        kept = 0
        if (folder / "checkpoint.pt").exists():
            kept = len(load_checkpoint(folder)["records"])
        expected = 3 if source else int(size > first)
        if kept != expected:
            problem = problem or f"the checkpoint has {kept} records, not {expected}"
        tally.add(f"{size} bytes", problem or finished(folder, whole))
    tally.finish(10)


@pytest.mark.slow
def test_no_memory(tmp_path, tally):
    """memory that can't be had, 5 cases: one line, exit code 1"""
    cases = [
        (100, "--eval-samples=100000"),
        (400, "--eval-samples=100000 --sample-batch=1000000"),
        (100, "--prompts=100000 --group-size=10000"),
        (1000, "--prompts=100000 --group-size=10000"),
        (100, "--prompts=3000 --group-size=50 --sample-batch=1000000"),
    ]
    for i, (megabytes, flags) in enumerate(cases):
        argv = command(tmp_path / str(i), *flags.split())
        done = start(argv, limits={resource.RLIMIT_AS: megabytes << 20})[1]()
        tally.add(flags, done.problem(1) if done else "no end")
    tally.finish(len(cases))


# ------------------------------------------------------------------------------ checkpoints


def refusal(folder: Path, *texts: str, flags: tuple[str, ...] = ()) -> str:
    """What is wrong if --resume is not refused with these texts, or touches a file."""
    before = contents(folder)
    done = call([f"--out={folder}", "--resume", "--steps=8", *flags])
    touched = "" if contents(folder) == before else "a file was touched"
    return done.problem(2, *texts) or touched


def test_flipped_bits(tmp_path, half, tally):
    """40 checkpoints with one flipped bit: refused, exit code 2, nothing touched"""
    folder, rng = shutil.copytree(half, tmp_path / "run"), random.Random(1)
    path = folder / "checkpoint.pt"
    data = path.read_bytes()
    places = [*range(4), *(rng.randrange(len(data)) for _ in range(36))]
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        tally.add(f"byte {place}", refusal(folder, "is damaged; restore it"))
    path.write_bytes(data)
    assert call(again(folder)).code == 0, "with the right bits it goes on"
    tally.finish(40)


def test_truncated(tmp_path, half, tally):
    """20 truncated checkpoints: the same"""
    folder, rng = shutil.copytree(half, tmp_path / "run"), random.Random(2)
    data = (folder / "checkpoint.pt").read_bytes()
    sizes = [0, 1, 31, 32, 33, 1000, len(data) - 1000, len(data) - 1]
    for size in sizes + [rng.randrange(len(data)) for _ in range(12)]:
        (folder / "checkpoint.pt").write_bytes(data[:size])
        tally.add(f"{size} bytes", refusal(folder, "is damaged; restore it"))
    tally.finish(20)


def forge(folder: Path, data: bytes) -> None:
    """Write a checkpoint of these bytes, with a right checksum."""
    (folder / "checkpoint.pt").write_bytes(data + hashlib.sha256(data).digest())


def test_other_bytes(tmp_path, half, tally):
    """6 files that are not checkpoints, with a right checksum: the same"""
    folder = shutil.copytree(half, tmp_path / "run")
    metrics = (folder / "metrics.jsonl").read_bytes()
    for data in (b"K", b"\x80\x02}q\xff", b"PK\x03\x04", metrics, b"\x80" * 64, b""):
        forge(folder, data)
        tally.add(data[:8], refusal(folder))
    tally.finish(6)


class Attack:
    """Pickled, it is a command: what a hostile checkpoint may hold."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_pickled_code(tmp_path, half, tally):
    """pickled code in each part of a checkpoint: refused, never run"""
    folder = shutil.copytree(half, tmp_path / "run")
    saved = load_checkpoint(half)
    for name in saved:
        buffer = io.BytesIO()
        torch.save({**saved, name: Attack(tmp_path / "hacked")}, buffer)
        forge(folder, buffer.getvalue())
        problem = refusal(folder)
        tally.add(name, "the code was run" if (tmp_path / "hacked").exists() else problem)
    tally.finish(6)


def test_other_settings(tmp_path, whole, half, tally):
    """flags of another run: refused, nothing touched"""
    folder = shutil.copytree(half, tmp_path / "run")
    flags = "seed=1 prompts=8 group-size=4 max-tokens=15 temperature=0.9 beta=0.1 top-p=0.9 "
    flags += "peak-quantile=0.5 anchor=1.0 mini-batches=1 lr=0.01 grad-clip=2 clip-high=0.3 "
    flags += "regularizer=none algorithm=grpo eval-prompts=5 task=toy_env:split=validation "
    flags += "eval-samples=3 eval-temperature=1 weight-decay=0.1 warmup-steps=1 clip-low=0.1"
    for flag in flags.split():
        name = flag.split("=")[0]
        tally.add(flag, refusal(folder, f"--{name} was ", flags=(f"--{flag}",)))
    assert finished(folder, whole) == ""
    tally.finish(22)


def test_damaged_metrics(tmp_path, half, whole, tally):
    """a metrics.jsonl that is damaged or of another run: written again from the checkpoint"""
    lines = (half / "metrics.jsonl").read_bytes()
    cases = [b"", lines[:-20], lines.splitlines()[0] + b"\n", lines + b'{"step": 4, "rewa']
    cases += [b"K" + lines, b"\x80\x02}q\xff" + lines, b"PK\x03\x04" + lines, b"[" * 200_000]
    cases += [b"null\n" * 9, b"[1]\n", b"\n" * 9, b"\xff\xfe" * 9, b'{"step": NaN}\n']
    for i, data in enumerate(cases):
        folder = shutil.copytree(half, tmp_path / str(i))
        (folder / "metrics.jsonl").write_bytes(data)
        tally.add(data[:20], finished(folder, whole))
    (folder / "metrics.jsonl").unlink()
    tally.add("no file", finished(folder, whole))
    tally.finish(len(cases) + 1)


# ------------------------------------------------------------------------------ bad input

BAD_FLAGS = """
--lr=-1 | --lr -1.0: must be
--lr=0 | --lr 0.0: must be
--lr=inf | --lr inf: must be
--lr=fast | 'fast'
--top-p=0 | --top-p 0.0: must be
--top-p=1.5 | --top-p 1.5: must be
--top-p=nan | --top-p nan: must be
--peak-quantile=2 | --peak-quantile 2.0: must be
--group-size=0 | --group-size 0: must be
--group-size=1 | group
--prompts=0 | --prompts 0: must be 1 to
--eval-prompts=1000000 | 1000000
--eval-prompts=0 | --eval-prompts 0: must be 1 to
--eval-samples=0 | --eval-samples 0: must be 1 to
--eval-temperature=0 | --eval-temperature 0.0: must be
--temperature=1e-40 | --temperature 1e-40: must be
--temperature=nan | --temperature nan: must be
--max-tokens=0 | --max-tokens 0: must be 1 to
--max-tokens=400 | --max-tokens 400: the model reads 256 tokens
--max-tokens=1e3 | invalid int value: '1e3'
--chunk=-1 | --chunk -1: must be
--chunk=1000000000000000000000000000000 | must be
--beta=nan | --beta nan: must be
--anchor=nan | --anchor nan: must be
--anchor=-1 | --anchor -1.0: must be
--anchor=None | 'None'
--clip-high=1e300 | --clip-high 1e+300: must be
--clip-low=-1 | --clip-low -1.0: must be
--clip-low=1.5 | --clip-low 1.5: must be
--regularizer=kl | --regularizer
--algorithm=ppo | algorithm
--mini-batches=99 | --mini-batches 99: must be
--mini-batches=0 | --mini-batches 0: must be
--micro-batch-size=0 | --micro-batch-size 0: must be
--steps=1.5 | '1.5'
--steps=-1 | --steps -1: must be
--seed=-1 | --seed -1: must be
--seed=x | 'x'
--save-every=0 | --save-every 0: must be
--warmup-steps=-1 | --warmup-steps -1: must be
--grad-clip=0 | --grad-clip 0.0: must be
--threads=0 | --threads 0: must be
--device=tpu9 | 'tpu9'
--device=hpu | hpu
--device= | evice
--resume=1 | explicit argument '1'
--learning-rate=1 | learning_rate=1
--vocab | --vocab
--vocab=3 | vocab of at least
--gap-share=2 | shares from 0 to 1
--gap-share=nan | shares from 0 to 1
--hidden=7 | hidden a multiple of 8
--split=x | split=test or split=validation
--lora-rank=2 | lora_rank=2
--eval-data=x | eval_data=x
--prompt=x | prompt=x
--recompute=1 | recompute=1
--recompute | --recompute
--task=nowhere | No module named 'nowhere'
--task=toy_env:x=1 | x=1
--task=toy_env:gap | gap=: needs a number
--task=toy_env:seed=x | seed=x
--task=json | json
--task=math | math
--task=.here | .here
--task= | odule
-x | -x
word | word
-- | --
--out=/proc/none | /proc/none
--out=/dev/null | /dev/null
--out=/dev/null/x | /dev/null
"""


def test_bad_flags(tmp_path, tally):
    """bad flags: one line that names the flag or its value, exit code 2"""
    cases = [line.split(" | ") for line in BAD_FLAGS.strip().splitlines()]
    for flags, text in cases:
        done = call([*command(tmp_path / "run"), *flags.split()])
        tally.add(flags, done.problem(2, text) or done.out)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    tally.finish(len(cases))
    assert len(cases) >= 60


def test_bad_files(tmp_path, half, tally):
    """bad files and folders: one line, exit code 2"""
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder" / "checkpoint.pt").mkdir(parents=True)
    long = "x" * 300
    cases = [
        (["--resume", f"--out={tmp_path / 'none'}"], str(tmp_path / "none")),
        (["--resume", f"--out={tmp_path / 'file'}"], str(tmp_path / "file")),
        (["--resume", f"--out={tmp_path / 'folder'}"], str(tmp_path / "folder")),
        (["--resume", f"--out={long}"], long),
        ([f"--out={long}"], long),
        ([f"--out={tmp_path / 'file'}"], str(tmp_path / "file")),
        ([f"--out={tmp_path / 'folder'}"], "holds a run"),
        ([f"--out={half}"], "holds a run"),
        (["--resume", f"--out={half}", "--split=validation"], "--task was toy_env"),
    ]
    for flags, text in cases:
        tally.add(flags, call(flags).problem(2, text))
    assert not (tmp_path / "none").exists()
    tally.finish(9)


def test_a_task_error_of_many_lines_is_one_line(tmp_path, monkeypatch, tally):
    """a task's ValueError of several lines, before training: one line, exit code 2"""

    def fail(*_: object, **__: object) -> None:
        raise ValueError("the first\nand the second line")

    for name in ("heldout", "build_model"):
        with monkeypatch.context() as patch:
            patch.setattr(toy_env.ToyWorld, name, fail)
            tally.add(
                name, call(command(tmp_path)).problem(2, "the first and the second line")
            )
    with monkeypatch.context() as patch:
        patch.setattr(toy_env, "load", fail)
        tally.add("load", call(command(tmp_path)).problem(2, "the first and the second line"))
    tally.finish(3)


# ------------------------------------------------------------------------------ the table

PAGE = """# What a run withstands

Made by `python -m tests.test_faults`, which runs the tests and counts their cases. Runs are
small (4 prompts, 2 responses each, 6 steps, a checkpoint after every second one); "ends as
the undisturbed one" means: the same metrics, weights and optimiser state, to the last bit.

| test | tried | held |
|---|---|---|
"""
AFTER = """
How: the checkpoint holds what changes in a run (the weights that are trained, optimiser,
anchor, records), its config, a fingerprint of the data and of the weights that are not
trained, and a SHA-256 sum of its content. It is written beside its place and moved there when
it is complete. The folder is locked, and the lock ends with the process. `Run` and `train` in
[siren.py](../siren.py) do it.

Not tried: a machine that loses power, network file systems without locks, disks that return
other bytes than were written. A checkpoint is data, not code, but it is believed: whoever
forges one can change the weights, the records and the task that a run goes on with.
"""


class Table:
    """A plugin of pytest that collects the counts."""

    def __init__(self) -> None:
        self.rows: dict[str, list[int]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The counts of a test that has run."""
        if report.when == "call":
            counts = dict(report.user_properties)
            name = report.nodeid.rpartition("::")[2].partition("[")[0]
            row = self.rows.setdefault(globals()[name].__doc__.strip(), [0, 0])
            row[0] += counts.get("tried", 0)
            row[1] += counts.get("held", 0)


def main() -> int:
    """Run the tests and write the table."""
    table = Table()
    everything = ["-q", "-m", "slow or not slow", str(Path(__file__))]
    code = pytest.main(everything, plugins=[table])
    rows = [f"| {name} | {tried} | {held} |" for name, (tried, held) in table.rows.items()]
    page = PAGE + "\n".join(rows) + "\n" + AFTER
    (ROOT / "docs" / "reliability.md").write_text(page)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
