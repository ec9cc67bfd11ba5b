r"""Answers in mathematics: where is one in a text, and is it equal to another by algebra?

    math_answers.equal(r"2\sqrt{2}", r"\sqrt{8}")    # True; pip install math-verify

`--verifier math` of text_env.py uses it. The exact rule of text_env.py is asked first; what
it does not accept goes to the library math-verify, in a process of its own: a question that
takes too long, such as 9^{9^{9}}, ends that process and not the run. The answer then counts as
wrong, and is counted. Text is parsed as LaTeX and never run as code.
"""

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
import time
from itertools import accumulate
from pathlib import Path
from subprocess import DEVNULL, PIPE

SECONDS = 3.0  # for one question, by the clock; math-verify needs about 0.01
BUDGET, SLOW = 10.0, 1.0  # for all questions of a step that take more than SLOW each
START_SECONDS = 120  # to import math-verify, on a busy machine
AMOUNTS = "hundred thousand million billion trillion dozen half halv quarter third fifth tenth"
AMOUNTS = {
    *f"{AMOUNTS} hundredth thousandth squared cubed mor l not".split()
}  # as words() has
DEGREES = re.compile(r"\^?\s*\{?\s*\\(?:circ|degree)\b\s*\}?|\^?\s*°")
TEXT = re.compile(r"\\(?:text[a-z]*|math[a-z]+|mbox)\s*\{([^{}]*)\}(\s*\^\s*\{?\s*[0-9])?")
BARE = re.compile(r"[A-Za-z.]{3,}|(?:(?<=[0-9])|(?<=[0-9] ))[A-Za-z]+(?=\s*\Z)")
BRACKETS = re.compile(r"\s*\$?\s*(?:\\left\s*)?(\\\{|[(\[]|)")
BASE = re.compile(r"[0-9A-F]\s*_\s*\{?\s*(?:\\text\s*\{)?\s*([0-9A-Za-z]+)")
# digits that only look joined: 5\text{ }6, $5$6, \frac123
JOINED = re.compile(r"[0-9]\s*(?:\\text\s*\{\s*\}|\\?\$)\s*[0-9]|frac\s*[0-9]{3}")
COMMAND = re.compile(r"\\(?:begin|end)\s*\{[a-z*]*\}|\\[A-Za-z]+")
PLAIN = r"""° ^\circ|\degree ^\circ|√ \sqrt|π \pi|∞ \infty|− -|– -|× \times|€ \text{euro}|{:} :
|\lbrace \{|\rbrace \}|\emptyset \varnothing|\big( (|\big) )|\colon :"""
MAX_CHARACTERS, MAX_DEPTH = 300, 15  # of an answer, and of its brackets; more is wrong at once
MAX_BYTES = 4 << 30  # of memory, for the process
# wrong at once: exponents of six digits or as in 9^{9^{9}}; factorials of five digits or twice
TOO_BIG = re.compile(r"\^\s*\{?\s*-?\s*\d{6}|\d\s*\^\s*\{?\s*\d+\s*\^|\d{5}\s*!|!\s*\)*\s*!")
AFTER = r"(?=\s*(?:\Z|\n|\$|\\[)\]]|[.,;:!?](?:\s|\$|\Z)))"  # what may follow \boxed 5
BARE_BOX = re.compile(r"\\boxed(?:\s*([0-9]|\\[A-Za-z]+)|\s+([A-Za-z]))" + AFTER)
SIGN = r"(?:(?<![0-9)])(?<![0-9)] )[-\u2212\u2013] ?(?:\\?\$)?)?"  # not that of a subtraction
WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+|(?=\.[0-9]))"  # the digits before a point
LAST_NUMBER = re.compile(rf"{SIGN}{WHOLE}(?:\.[0-9]+)?(?:/[0-9]+)?")


def plain_boxes(text):
    r"""The text with every box written as siren.py reads it. Without braces LaTeX boxes one
    digit, letter or command, so `\boxed 42` stays as it is.

    >>> plain_boxes(r"\fbox{42}"), plain_boxes(r"so \boxed 5."), plain_boxes(r"\boxed 42")
    ('\\boxed{42}', 'so \\boxed{5}.', '\\boxed 42')
    """
    return BARE_BOX.sub(r"\\boxed{\1\2}", re.sub(r"\\fbox(?![A-Za-z])", r"\\boxed", text))


def last_number(text):
    """The last number of a text, for models that don't box their answer, or None.

    >>> last_number("9 + 8 = 1,017."), last_number("10 - 12 is - 2"), last_number("none")
    ('1,017', '- 2', None)
    """
    return (LAST_NUMBER.findall(text) or [None])[-1]


def is_loose(given, answer):
    r"""Could math-verify call these equal although they are not? It reads words as products of
    letters, and drops units, bases, and whether an order counts.

    >>> is_loose("ACT", "CAT"), is_loose("5 m", "5 cm"), is_loose("5 cm", "5")
    (True, True, False)
    """
    known = words(answer)
    own = words(given)
    dropped = own != known if own and known else AMOUNTS & (own | known)
    kinds = [BRACKETS.match(text)[1] or "," in text for text in (given, answer)]
    ordered = kinds[0] != kinds[1] and {*"(["} & {*kinds} and False not in kinds
    based = BASE.findall(given) != BASE.findall(answer)
    capitals = re.fullmatch(r"\s*(?:[A-Z]{2,}|[a-z])\s*", answer) and given.strip().isupper()
    return bool(dropped or ordered or based or capitals or JOINED.search(given))


def words(text):
    """The words and units of an answer, alike in singular and plural."""
    text = DEGREES.sub(" degrees ", text.replace("\\$", " dollars "))
    found = [word for part in TEXT.findall(text) for word in (*part[0].split(), part[1])]
    found += BARE.findall(COMMAND.sub(" ", TEXT.sub(" ", text)))
    singular = {re.sub("[.,]", "", word).lower().rstrip("es") for word in found}
    return singular - {"", "and", "or"}


def same_value(a, b, *_):
    """For math-verify, in the place of its own rule, which rounds to six decimals: are these
    two the same to 40 digits, with decimals as exact fractions?"""
    from sympy import Float, MatrixBase, Rational

    if isinstance(a, MatrixBase) and isinstance(b, MatrixBase):
        return a.shape == b.shape and all(map(same_value, a, b))
    a, b = a.doit(), b.doit()
    exact = {x: Rational(str(x)) for x in a.atoms(Float) | b.atoms(Float)}
    a, b = a.xreplace(exact), b.xreplace(exact)
    rest = a - b
    return rest == 0 or (rest.is_number and abs(rest.evalf(60)) < 1e-40 * abs(b.evalf(60)))


class Grader:
    """math-verify in a process of its own, started when first needed. Safe from threads."""

    def __init__(self, seconds=SECONDS):
        self.seconds = seconds
        self.spent = 0.0  # seconds on slow questions, in this step
        self.timeouts = 0  # questions whose answer came too late, and so is "wrong"
        self._process = None
        self._lock = threading.Lock()
        self._remembered = functools.lru_cache(maxsize=10_000)(self._ask)

    def equal(self, given, answer):
        """Is the given answer right? Takes a few seconds at most; never raises on any text."""
        import text_env  # here, since the process for math-verify needs no PyTorch

        if text_env.equal(given, answer):
            return True
        boxes = re.search(r"\\boxed|\\fbox", given)  # it would take the 7 out of -\boxed{7}
        if boxes or not given.strip() or is_too_big(given) or is_too_big(answer):
            return False
        for line in PLAIN.split("|"):
            written, plain = line.split()
            given, answer = (text.replace(written, f"{plain} ") for text in (given, answer))
        if is_loose(given, answer):
            return False
        for part in given.split("=")[:-1]:  # it would see the 5 alone in 2 + 2 = 5
            number = part.strip() and not re.search("[A-Za-z]", COMMAND.sub("", part))
            if number and "=" not in answer and not self.equal(part, answer):
                return False
        with self._lock:
            verdict = self._remembered(given, answer) if self.spent < BUDGET else None
            self.timeouts += verdict is None
        return bool(verdict)

    def metrics(self):
        """The number of late answers since the last call; a new budget begins."""
        late, self.timeouts, self.spent = self.timeouts, 0, 0.0
        return {"verify_timeouts": late}

    def close(self):
        """End the process; the next question starts another."""
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _ask(self, given, answer):
        """math-verify's verdict; None if the process had to end."""
        if self._process is None:
            self._start()
        start = time.monotonic()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([given, answer]) + "\n")
            self._process.stdin.flush()
        reply = self._process.stdout.readline()  # or the process ends by its own alarm
        seconds = time.monotonic() - start
        self.spent += seconds if seconds > SLOW or not reply else 0
        if not reply:
            self.close()
        return json.loads(reply) if reply else None

    def _start(self):
        """Start the process and wait until it has imported math-verify."""
        how = {"stdin": PIPE, "stdout": PIPE, "stderr": DEVNULL, "text": True}
        how["start_new_session"] = True  # Ctrl-C is for the run, which then closes the pipe
        command = [sys.executable, str(Path(__file__).resolve()), str(self.seconds)]
        self._process = subprocess.Popen(command, **how)
        if not self._process.stdout.readline():
            self.close()
            raise ImportError("math-verify does not work; pip install math-verify")


def is_too_big(text):
    """Would this answer cost math-verify more time than any real answer does?

    >>> is_too_big("2^{10}"), is_too_big("9^{9^{9}}"), is_too_big("{" * 20 + "1" + "}" * 20)
    (False, True, True)
    """
    if len(text) > MAX_CHARACTERS or TOO_BIG.search(text):
        return True
    depths = accumulate((letter in "{[(") - (letter in "}])") for letter in text)
    return max(depths, default=0) > MAX_DEPTH


equal = Grader().equal  # for everybody; its process starts with the first question


def serve(seconds):
    """The process: a line of JSON [given, answer] in, a line true or false out, until the end.
    SIGALRM is not handled, so the system ends the process when the time is over, also in the
    middle of a multiplication, and also when the run itself is long gone."""
    signal.alarm(START_SECONDS)
    from math_verify import LatexExtractionConfig, grader, parse, verify

    grader.sympy_numeric_eq = same_value
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
            known, found = parse(answer, **how), parse(given, **how)
            verdict = bool(verify(known, found, timeout_seconds=None))
        except Exception:  # a parser on hostile text may raise whatever it likes
            verdict = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    serve(float(sys.argv[1]))
