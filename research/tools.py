"""What several files of research share: flags, exit codes, files, locks and tasks.

Bad input is a ValueError, as in siren.py; run_tool makes it one line and exit code 2.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import siren


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are ValueErrors, and so one line each."""

    def error(self, message: str) -> None:
        raise ValueError(f"{message}; see --help")


def run_tool(
    name: str,
    function: Callable[[list[str] | None], int | None],
    argv: list[str] | None = None,
    again: str = "what is done is kept; the same command goes on",
) -> int:
    """Run the command function(argv); return its exit code. Whatever goes wrong is one line.

    name is the file of the command. again says what to do after a stop. Exit code 0, or what
    the function returns: done; 1: stopped; 2: bad input; 130: interrupted.
    """
    try:
        return function(argv) or 0
    except ValueError as error:
        code, text = 2, f"error: {' '.join(str(error).split())}"
    except (RuntimeError, OSError, MemoryError) as error:
        code, text = 1, f"stopped: {one_line(error)}; {again}"
    except KeyboardInterrupt:
        code, text = 130, f"interrupted; {again}"
    print(f"{name}: {text}", file=sys.stderr)
    return code


def one_line(error: BaseException) -> str:
    """The first line of an error, at most 150 characters of it; its type if it has no text.

    >>> one_line(RuntimeError("no memory\\nat line 3")), one_line(KeyError())
    ('no memory', 'KeyError')
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:150]


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


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside the block the folder, which is made if need be, belongs to this process alone.

    It is a ValueError if it belongs to another one. The lock leaves no file behind. It ends
    when the process ends, however that happens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        rule = "another process is writing to it; wait for it, or name another folder"
        raise ValueError(f"--out {folder}: {rule}") from None
    finally:
        os.close(lock)


def load_task(cfg: Any) -> Any:
    """The task of a siren.Config, "module:name=value,name=value", as siren.Run loads it."""
    module, options = siren.module_and_options(cfg.task)
    return importlib.import_module(module).load(cfg, **options)


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside the block PyTorch computes on one thread of the CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
