r"""Which answers are right: the exact rule, and equality by algebra (docs/verifier.md).

    equal("0.50", r"\frac{1}{2}")                # True: they are the same number
    Grader().equal(r"2\sqrt{2}", r"\sqrt{8}")    # True by algebra; pip install math-verify

Both are verifiers of text_env.py. What the exact rule does not accept, a Grader asks the
library math-verify, in a process of its own: a question that takes too long, such as
9^{9^{9}}, ends that process and not the run. No text is ever run as code.
"""

import contextlib
import functools
import json
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

# ------------------------------------------------------------------- 1. where is the answer?
AFTER = r"(?=\s*(?:\Z|\n|\$|\\[)\]]|[.,;:!?](?:\s|\$|\Z)))"  # what may follow \boxed 5
BARE_BOX = re.compile(r"\\boxed(?:\s*([0-9]|\\[A-Za-z]+)|\s+([A-Za-z]))" + AFTER)
SIGN = r"(?:(?<![0-9)])(?<![0-9)] )[-\u2212\u2013] ?(?:\\?\$)?)?"  # not that of a subtraction
WHOLE_PART = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+|(?=\.[0-9]))"
LAST_NUMBER = re.compile(rf"{SIGN}{WHOLE_PART}(?:\.[0-9]+)?(?:/[0-9]+)?")


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


# ------------------------------------------------------------------------- 2. the exact rule
MAX_ANSWER = 200  # characters; a longer answer is compared as it stands
SIGNS = r"""  a sign and what is written for it, LaTeX's first way first
≤ \le \leq \leqslant | ≥ \ge \geq \geqslant | ≠ \ne \neq | · \cdot \times × | ∪ \cup | π \pi |
∅ \varnothing \emptyset | ∞ \infty +\infty | ° ^\circ ^{\circ} \degree | ⦃ \{ \lbrace | % \% |
⦄ \} \rbrace | √ \sqrt | \frac \frac \dfrac \tfrac \cfrac | - - − – | , , {,} ,\! | \\ \\ |
: : {:} \colon"""
SIGNS = {sign: ways for sign, *ways in map(str.split, SIGNS.partition("\n")[2].split("|"))}
LAYOUT = r"\left \right \displaystyle \big \Big \bigl \bigr \( \) \[ \] \, \; \: \! \$ $ ~"
SIGN_OF = {way: sign for sign, ways in SIGNS.items() for way in ways}
SIGN_OF |= dict.fromkeys([*LAYOUT.split(), "\\ "], " ") | {"bmatrix": "pmatrix"}
WAYS = [re.escape(way) + "(?![A-Za-z])" * way[-1].isalpha() for way in SIGN_OF]
WAYS = re.compile("|".join(sorted(WAYS, key=len, reverse=True)))
AFTER_NUMBERS = {"percent": "%", "degrees?": "°", "(?:dollars?|USD)": ""}
GROUP = r"\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
STYLE = r"\\(?:text[a-z]*|math(?:rm|bf|it|sf)|boldsymbol|mbox|underline)\s*"
WHOLE = rf"\s*(?:(?:\\(?:boxed|fbox)\s*)?{GROUP}|\*\*([^*]+)\*\*|\(([^(),]+)\))\s*"
THOUSANDS = re.compile(r"(?<![0-9,.])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])")
SPACE = re.compile(r"(\\\\|\\[a-zA-Z]+ (?=[a-zA-Z]))|(?<![0-9.]) | (?![0-9.])")
PRODUCT = r"(?:(?:[a-zπ]|√(?:\d|\{\d+\}))(?:\^\d)?)*"  # what is behind the 2 in 2\pi r
SLASH = rf"(?a)(?<![\w\\)}}/^.√ ])(?=[\da-zπ√])(\d*{PRODUCT})/(\d+)(?![\w({{ \\/.^!π√])"
FRACTION = rf"\\frac\{{(-?(?:\d+|(?=[a-zπ√])))({PRODUCT})\}}\{{(-?0*[1-9]\d*)\}}"
FRACTION = rf"(?a)(?<![\d^_√]){FRACTION}(?![\^_!])"
DECIMAL = r"(?a)(?<![\d.])(?:\d+|(?<!\}))\.\d+(?![\d.])"
RELATIONS = "<=>≤≠≥"
POWER = r"(?:·10\^(?:(\d)|\{(-?\d{1,3})\}))?"
NUMBER = re.compile(rf"(?a)([+-]?)(\d+|\{{-?\d+(?:/\d+)?\}}){POWER}(%?)")


def normalize(answer):
    r"""What equal answers have in common: an exact number (Fraction), or else a text.

    A number is a sign, digits (also 1,234), decimals or a fraction (1/2, \frac{1}{2}), a power
    of ten as in 2\cdot 10^3, and %. A text has one way of writing for every sign, its numbers
    exact, its terms in order. Spaces count between digits and where a command ends: \sin h.

    >>> normalize(r"$-1{,}234.50$"), normalize(r"\dfrac{1}{2}"), normalize(r"50\%")
    (Fraction(-2469, 2), Fraction(1, 2), Fraction(1, 2))
    >>> normalize(r"\text{East}"), normalize(r"x^{2} \geq 0.5"), normalize("5 6")
    ('east', '{1/2}≤x^2', '5 6')
    """
    return answer.strip() if len(answer) > MAX_ANSWER else normalize_short(answer)


@functools.lru_cache(maxsize=10_000)  # of short answers: long ones would fill the memory
def normalize_short(answer):
    text = re.sub(DECIMAL, exact, re.sub(FRACTION, exact, with_fractions(plain(answer))))
    number = NUMBER.fullmatch(text)
    if number:
        value = Fraction(number[1] + "1") * Fraction(number[2].strip("{}"))
        value *= Fraction(10) ** int(number[3] or number[4] or 0)
        return value / 100 if number[5] else value
    text = re.sub(r"(\\[a-z]+)\((\w+|\\[a-z]+)\)(?![\w\\({^!'])", r"\1 \2", text)  # \sin(x)
    return in_order(without_spaces(re.sub(r"\{(\w?|\\[a-zA-Z]+)\}", r" \1 ", text)))


def plain(answer):
    """The answer without styles and layout, with one way of writing for every sign."""
    text = WAYS.sub(lambda found: SIGN_OF[found[0]], answer)
    text = re.sub(r"[.,]\s*\Z", "", re.sub(STYLE + GROUP, r" \1 ", text))
    while whole := re.fullmatch(WHOLE, text):  # {12}, \boxed{12}, **12**, (12)
        text = whole[1] or whole[2] or whole[3] or ""
    text = re.sub(",? and ", ", ", " ".join(text.split()))
    if re.fullmatch("[A-Za-z,.' -]*[a-z]{2}[A-Za-z,.' -]*", text):  # words; not X, nor AB
        text = re.sub(r"\A(?:the|an?) ", "", text.lower())
    for word, sign in AFTER_NUMBERS.items():
        text = re.sub(rf"(?<=[0-9]) ?{word}\b", sign, text)
    return without_spaces(without_commas(text))


def without_commas(text):
    """1234 for 1,234. But (10,100) is the pair (10, 100), as x=1, 234 is."""
    if ", " not in text and re.fullmatch(r"[(\[{⦃].*[)\]}⦄]", text):
        return text
    return THOUSANDS.sub(lambda found: found[0].replace(",", ""), text)


def without_spaces(text):
    return SPACE.sub(lambda found: found[1] or "", " ".join(text.split()))


def with_fractions(text):
    r"""The text with \frac{1}{2} for 1/2 and \frac12."""
    text = re.sub(r"\\frac ?([^{ ])", r"\\frac{\1}", re.sub(SLASH, r"\\frac{\1}{\2}", text))
    return re.sub(r"(\\frac\{[^{}]*\}) ?([^{ ])", r"\1{\2}", text)


def exact(found):
    r"""0.50 and \frac{2}{4} as {1/2}, whose braces keep it apart; \frac{2x}{4} as {1/2}x."""
    if not found.re.groups:
        value = Fraction(found[0])
        return f"{{{value}}}" if value.denominator > 1 else str(value)
    over, product, under = found.groups()
    over += "" if over[-1:].isdigit() else "1"
    return f"{{{Fraction(int(over), int(under))}}}{product}"


def in_order(text):
    """The text with what may be swapped in order: in a set, a list without brackets, a union
    and a sum, and the sides of a relation, where x > 2 is 2 < x."""
    if text[:1] == "⦃" and text.find("⦄") == len(text) - 1:
        return f"⦃{','.join(sorted({in_order(part[1:]) for part in cut(text[1:-1], ',')}))}⦄"
    found = (sign for sign in (",", "∪", RELATIONS, "+-") if len(cut(text, sign)) > 1)
    signs = None if "\\begin" in text else next(found, None)
    if signs == RELATIONS:
        sides = [in_order(side) for side in re.split(f"([{signs}])", text)]
        turned = "".join(sides[::-1]).translate(str.maketrans("<>≤≥", "><≥≤"))
        return max("".join(sides), turned)
    if signs:
        return "".join(sorted(part[0] + in_order(part[1:]) for part in cut(text, signs)))
    return text


def cut(text, signs):
    """The parts of a text, each with the sign before it, cut outside of all brackets."""
    text = text if text[:1] in signs else signs[0] + text
    depth = [*accumulate((letter in "([{⦃") - (letter in ")]}⦄") for letter in text)]
    starts = [i for i, letter in enumerate(text) if letter in signs and depth[i] == 0]
    return [text[i:j] for i, j in zip(starts, [*starts[1:], len(text)])]


def equal(given, answer):
    """Is the given answer right? It is the same number or the same text, and not nothing."""
    from siren import extract_answer  # here, since the process below needs no PyTorch

    answer = extract_answer(plain_boxes(answer)) or answer  # without its box
    return normalize(given) == normalize(answer) != ""


# -------------------------------------------------------------------- 3. equality by algebra
SECONDS = 3.0  # for one question, by the clock; math-verify needs about 0.01
BUDGET, SLOW = 10.0, 1.0  # for all questions of a step that take more than SLOW each
START_SECONDS = 120  # to import math-verify, on a busy machine
MAX_BYTES = 4 << 30  # of memory, for the process
MAX_CHARACTERS, MAX_DEPTH = 300, 15  # of an answer, and of its brackets; more is wrong at once
# wrong at once: exponents of six digits or as in 9^{9^{9}}; factorials of five digits or twice
TOO_BIG = re.compile(r"\^\s*\{?\s*-?\s*\d{6}|\d\s*\^\s*\{?\s*\d+\s*\^|\d{5}\s*!|!\s*\)*\s*!")
WORDS = re.compile(STYLE + r"\{([^{}]*)\}(\s*\^\s*\{?\s*[0-9])?")  # with \text{cm}^2
BARE = re.compile(r"[A-Za-z.]{3,}|(?:(?<=[0-9])|(?<=[0-9] ))[A-Za-z]+(?=\s*\Z)")
COMMAND = re.compile(r"\\(?:begin|end)\s*\{[a-z*]*\}|\\[A-Za-z]+")
AMOUNTS = "hundred thousand million billion trillion dozen half halv quarter third fifth tenth"
AMOUNTS += " hundredth thousandth squared cubed mor l not"  # as words() has them
AMOUNTS = {*AMOUNTS.split()}
MARKS = re.compile(r"'|\\[lc]?dots|[0-9A-F]_[0-9A-Za-z]+")


def in_latex(text):
    """An answer as math-verify and the second look read it: every sign in one LaTeX way."""
    text = WAYS.sub(lambda found: SIGN_OF[found[0]], text.replace("\\$", " dollars "))
    text = without_commas(text.strip())
    for sign, ways in SIGNS.items():
        text = text.replace(sign, ways[0] + " " * ways[0][-1].isalpha())
    return re.sub(r"\A\s*[a-z]\s*\\in(?![a-z])|\\text\s*\{\s*\}", " ", text)


def words(text):
    """The words and units of an answer, alike in singular and plural."""
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?", " degrees ", text)
    found = [word for part in WORDS.findall(text) for word in (*part[0].split(), part[1])]
    found += BARE.findall(COMMAND.sub(" ", WORDS.sub(" ", text)))
    singular = {re.sub("[.,]", "", word).lower().rstrip("es") for word in found}
    return singular - {"", "and", "or"}


def is_loose(given, answer):
    r"""Could math-verify call these equal although they are not? It reads words as products of
    letters, and drops units, bases, and whether an order counts.

    >>> is_loose("ACT", "CAT"), is_loose("5 m", "5 cm"), is_loose("5 cm", "5")
    (True, True, False)
    """
    own, known = words(given), words(answer)
    units = own != known if own and known else AMOUNTS & (own | known)
    both = (given, answer)
    kinds = [re.match(r"\s*(\\\{|[(\[]|)", text)[1] or "," in text for text in both]
    ordered = {"(", "["} & {*kinds} and False not in kinds and "\\cup" not in answer
    order = ordered and kinds[0] != kinds[1]
    marks = [MARKS.findall(re.sub(r"\\text|[{}\s]", "", text)) for text in both]
    capitals = re.fullmatch(r"\s*(?:[A-Z]{2,}|[a-z])\s*", answer) and given.strip().isupper()
    joined = re.search(r"frac\s*[0-9]{3}", given)
    return bool(units or order or marks[0] != marks[1] or capitals or joined)


def is_too_big(text):
    """Would this answer cost math-verify more time than any real answer does?"""
    depths = accumulate(
        (letter in "{[(") - (letter in "}])") for letter in text[:MAX_CHARACTERS]
    )
    deep = max(depths, default=0) > MAX_DEPTH
    return len(text) > MAX_CHARACTERS or deep or bool(TOO_BIG.search(text))


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
        if equal(given, answer):
            return True
        boxes = re.search(r"\\boxed|\\fbox", given)  # it would take the 7 out of -\boxed{7}
        if boxes or not given.strip() or is_too_big(given) or is_too_big(answer):
            return False
        if {type(normalize(given)), type(normalize(answer))} == {Fraction}:
            return False  # two numbers, and not the same
        given, answer = in_latex(given), in_latex(answer)
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
            print(json.dumps([given, answer]), file=self._process.stdin, flush=True)
        reply = self._process.stdout.readline()  # or the process ends by its own alarm
        seconds = time.monotonic() - start
        self.spent += seconds if seconds > SLOW or not reply else 0
        if not reply:
            self.close()
        return json.loads(reply) if reply else None

    def _start(self):
        """Start the process and wait until it has imported math-verify."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        pipes["stderr"] = subprocess.DEVNULL
        command = [sys.executable, str(Path(__file__).resolve()), str(self.seconds)]
        # in a session of its own: Ctrl-C is for the run, which then closes the pipe
        self._process = subprocess.Popen(command, start_new_session=True, **pipes)
        if not self._process.stdout.readline():
            self.close()
            raise ImportError("math-verify does not work; pip install math-verify")


def serve(seconds):
    """The process: a line of JSON [given, answer] in, a line true or false out, until the end.
    SIGALRM is not handled, so the system ends the process when the time is over, also in the
    middle of a multiplication, and also when the run itself is long gone."""
    signal.alarm(START_SECONDS)
    from math_verify import LatexExtractionConfig, grader, parse, verify

    grader.sympy_numeric_eq = same_value
    with contextlib.suppress(ValueError, OSError):  # a system that has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    replies, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no reply
    # LaTeX only: the library's other form of reading goes through Python's eval
    how = {"extraction_config": [LatexExtractionConfig()], "parsing_timeout": None}

    def is_equal(given, answer):
        known, found = (parse(f"\\boxed{{{text}}}", **how) for text in (answer, given))
        return bool(verify(known, found, timeout_seconds=None))

    # the first question takes a second, and tells whether the library works
    if not is_equal("2\\sqrt{2}", "\\sqrt{8}"):
        return
    signal.alarm(0)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            verdict = is_equal(*json.loads(line))
        except Exception:  # a parser on hostile text may raise whatever it likes
            verdict = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), file=replies, flush=True)


def same_value(a, b, *_):
    """For math-verify, in the place of its own rule, which rounds to six decimals: are these
    two the same to 40 digits, with decimals as exact fractions?"""
    from sympy import Float, MatrixBase, Rational

    if isinstance(a, MatrixBase) and isinstance(b, MatrixBase):
        return a.shape == b.shape and all(map(same_value, a, b))
    a, b = a.doit(), b.doit()
    exactly = {x: Rational(str(x)) for x in a.atoms(Float) | b.atoms(Float)}
    a, b = a.xreplace(exactly), b.xreplace(exactly)
    rest = a - b
    return rest == 0 or (rest.is_number and abs(rest.evalf(60)) < 1e-40 * abs(b.evalf(60)))


if __name__ == "__main__":
    serve(float(sys.argv[1]))
