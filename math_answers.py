r"""Is an answer the same as another? By algebra, with the library math-verify.

    siren.verify(r"\boxed{2\sqrt{2}}", r"\sqrt{8}", equal=math_answers.equal)    # True

`--verifier math` of examples/text_env.py uses it. siren.py's own rule is asked first; what it does
not accept goes to math-verify, in a process of its own: a question that takes too long, such as
9^{9^{9}}, ends that process and not the run. The answer then counts as wrong, and is counted. Text
is parsed as LaTeX and never run as code.

    pip install math-verify
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

SECONDS = 3.0  # for one question, by the clock; math-verify needs about 0.01
START_SECONDS = 120  # to import math-verify, on a busy machine
MAX_CHARACTERS, MAX_DEPTH = 300, 15  # of an answer, and of its brackets; more is wrong at once
MAX_BYTES = 4 << 30  # of memory, for the process
# wrong at once: exponents of six digits, or numbers as 9^{9^{9}}; factorials of five digits or more
TOO_BIG = re.compile(r"\^\s*\{?\s*-?\s*\d{6}|\d\s*\^\s*\{?\s*\d+\s*\^|\d{5}\s*!|!\s*\)*\s*!")


class Grader:
    """math-verify in a process of its own, started when it is first needed. Safe from threads."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self.timeouts = 0  # questions whose answer came too late, and so is "wrong"
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()
        self._remembered = functools.lru_cache(maxsize=10_000)(self._ask)

    def equal(self, given: str, answer: str) -> bool:
        """Is the given answer right? Takes a few seconds at most and never raises on any text."""
        from siren import normalize  # here, since the process for math-verify needs no PyTorch

        if normalize(given) == normalize(answer) != "":
            return True
        if not given.strip() or is_too_big(given) or is_too_big(answer):
            return False
        with self._lock:
            verdict = self._remembered(given, answer)
        self.timeouts += verdict is None
        return bool(verdict)

    def close(self) -> None:
        """End the process; the next question starts another."""
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _ask(self, given: str, answer: str) -> bool | None:
        """math-verify's verdict; None if the process had to end."""
        if self._process is None:
            self._start()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([given, answer]) + "\n")
            self._process.stdin.flush()
        reply = self._process.stdout.readline()  # it comes, or the process ends by its own alarm
        if not reply:
            self.close()
            return None
        return json.loads(reply)

    def _start(self) -> None:
        """Start the process and wait until it has imported math-verify."""
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        command = [sys.executable, str(Path(__file__).resolve()), str(self.seconds)]
        # a session of its own: Ctrl-C is for the run, which then closes the pipe
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=nothing, text=True, start_new_session=True
        )
        if not self._process.stdout.readline():
            self.close()
            raise ImportError("math-verify does not work; pip install math-verify")


def is_too_big(text: str) -> bool:
    """Would this answer cost math-verify more time than any real answer does?

    >>> is_too_big("2^{10}"), is_too_big("9^{9^{9}}"), is_too_big("{" * 20 + "1" + "}" * 20)
    (False, True, True)
    """
    if len(text) > MAX_CHARACTERS or TOO_BIG.search(text):
        return True
    depth = deepest = 0
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        deepest = max(deepest, depth)
    return deepest > MAX_DEPTH


@functools.cache
def shared() -> Grader:
    """The grader behind `equal`."""
    return Grader()


def equal(given: str, answer: str) -> bool:
    """Grader.equal of one shared grader."""
    return shared().equal(given, answer)


def serve(seconds: float) -> None:
    """The process: a line of JSON [given, answer] in, a line true or false out, until the end.

    SIGALRM is not handled, so that the system ends the process when the time is over, also in the
    middle of a multiplication, and also when the run itself is long gone.
    """
    signal.alarm(START_SECONDS)
    from math_verify import LatexExtractionConfig, parse, verify

    with contextlib.suppress(ValueError, OSError):  # a system that has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no reply
    # LaTeX only: the library's other form of reading goes through Python's eval
    how = {"extraction_config": [LatexExtractionConfig()], "parsing_timeout": None}
    # the first question takes a second, and tells whether the library works
    example = (parse(f"\\boxed{{{text}}}", **how) for text in ("\\sqrt{8}", "2\\sqrt{2}"))
    if not verify(*example, timeout_seconds=None):
        return
    signal.alarm(0)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        given, answer = (f"\\boxed{{{text}}}" for text in json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            verdict = bool(verify(parse(answer, **how), parse(given, **how), timeout_seconds=None))
        except (Exception, RecursionError):  # a parser on hostile text may raise whatever it likes
            verdict = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    serve(float(sys.argv[1]))
