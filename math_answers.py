"""Which answers are right: the exact rule, and equality by algebra (docs/verifier.md).
No text is ever run as code."""

import functools
import re
import signal
import sys
import threading
import time
from contextlib import suppress
from fractions import Fraction
from subprocess import DEVNULL, PIPE, Popen

# ------------------------------------------------------------------- 1. where is the answer?
CUT_OFF = "[cut off]"  # stands behind a response that never ended
AFTER = r"(?=\s*(?:\Z|\n|\$|\\[)\]]|[.,;:!?](?:\s|\$|\Z)))"  # what may follow \boxed 5
BARE_BOX = re.compile(r"\\boxed(?:\s*([0-9]|\\[A-Za-z]+)|\s+([A-Za-z]))" + AFTER)
SIGN = r"(?:(?<![0-9)])(?<![0-9)] )[-\u2212\u2013] ?(?:\\?\$)?)?"  # not that of a subtraction
LAST_NUMBER = "(?a)" + SIGN + r"(?:\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?:\.\d+)?(?:/\d+)?"


def plain_boxes(text):
    r"""The text with every box as siren.py reads it: \fbox{42}, and \boxed 5 with braces."""
    return BARE_BOX.sub(r"\\boxed{\1\2}", re.sub(r"\\fbox(?![A-Za-z])", r"\\boxed", text))


def last_number(text):
    """The last number of a text, for models that don't box their answer. None: it has none."""
    numbers = [] if text.endswith(CUT_OFF) else re.findall(LAST_NUMBER, text)
    return numbers[-1] if numbers else None


# ------------------------------------------------------------------------- 2. the exact rule
MAX_CHARS = 200  # a longer answer is compared as it stands
SAME = r"""\le ≤ \leq \leqslant | \ge ≥ \geq \geqslant | \ne ≠ \neq | \cdot · \times × |
\emptyset ∅ \varnothing | \infty ∞ | \pi π | \{ \lbrace | \} \rbrace | \sqrt √ | \cup ∪ |
\frac \dfrac \tfrac \cfrac | / \div ÷ | pmatrix bmatrix | : \colon | \% % percent | - − – |
\$ dollar dollars USD | ^\circ ^{\circ} ° \degree degree degrees"""  # we write the first
LAYOUT = r"\left \right \displaystyle \big \Big \bigl \bigr \quad \( \) \[ \] \, \; \: \! $ ~"
SIGNS = {way: sign for sign, *ways in map(str.split, SAME.split("|")) for way in ways}
SIGNS |= dict.fromkeys([*LAYOUT.split(), "\\ "], "")
TOKEN = re.compile(r"\^(?:\\circ\b|\{\\circ\})|\\[A-Za-z]+|\\.|[A-Za-z]+|\d*\.\d+|\d+|\S")
THOUSANDS = re.compile(r"(?<![0-9,.])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])")
STYLE = r"\\(?:text[a-z]*|math(?:rm|bf|it|sf)|boldsymbol|mbox|underline) \{ ?([^{}]*)\}"
START = r"(?<![^-+,(\[{=<>] )(?<!\S)"  # here a term begins
N = r"[0-9]+(?:/[0-9]+)?"
ARGUMENT = rf"(?:([0-9])|\{{ (-? ?{N}) \}})"  # of \frac


def exact(found):
    r"""The number that was found, such as 1/2 for 0.50, 2/4 and \frac{2}{4}."""
    numbers = [Fraction(n.replace(" ", "")) for n in (*found.groups(), "1") if n]
    return str(numbers[0] / numbers[1]) if numbers[1] else found[0]


RULES = [  # how tokens are rewritten, in this order, three times for what is nested
    (STYLE, r" \1 "),  # \text{ cm}
    (r"\A(?:\\f?boxed )?\{ ?(.*)\}\Z|\A\* \* ([^*]+)\* \*\Z|\A\( ([^(),]*)\)\Z", r"\1\2\3"),
    (rf"(?<![.,] )[.,]\Z|\\\$|{START}\+ (?=[\w\\])", ""),  # 540, and \$5 and +5
    (r"\A(?:x \\in|\( (?:x , y(?: , z)?|a , b(?: , c)?) \) =) ", ""),  # (x, y) = (1, 2)
    (r"(?<!\S)(?:[A-Z][a-z]{2,}|No(?!\S))", lambda found: found[0].lower()),  # East
    (rf"\A(?:option )?(?:\( )?([A-E])(?: \)(?: {N})?)?\Z", r"\1"),  # (B) 30
    (r"(?:, )?\band\b", ","),
    (r"(?<!\S)([a-z]) (?=[a-z](?!\S))", r"\1"),  # x y, but not \sin h
    (r"(?<!\S)10 \^ (?:([0-9])|\{ ?(-?) ?([0-9]{1,2}) ?\})(?!\S| [0-9^!])", r"1e\1\2\3"),
    (rf"{START}([0-9.]+) \\cdot 1e", r"\1e"),  # 2.5 \times 10^3
    (r"(?<![0-9] )(?<!\S)(?!0[0-9])([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)(?!\S)", exact),  # 0.50
    (rf"(?:(?<=[0-9] )|{START})({N}) / ({N})(?! [^-+,)\]}}=<>\\]| \\[a-z])", exact),
    (rf"\\frac {ARGUMENT} ?{ARGUMENT}(?![0-9])", exact),  # \frac{2}{4} and \frac12
    (r"(\\[a-z]+) \( (\w+|\\[a-z]+) \)(?! [\w\\({^!'/])", r"\1 \2"),
    (r"\{ (\\[A-Za-z]+|\S|) ?\}", r"\1"),  # x^{2}
]


def latex(text):
    """An answer in one way of LaTeX, as tokens with spaces between them."""
    text = re.sub(r"([\^_])\{(\w)\}", r"\1\2 ", re.sub(r"\{,\}|,\\!", ",", text))
    # in brackets a comma separates, so (10,100) is a pair; elsewhere 1,234 is one number
    if ", " in text or not re.search(r"(?<!\\)[(\[]|\\\{|\\lbrace", text):
        text = THOUSANDS.sub(lambda found: found[0].replace(",", ""), text)
    return " ".join(filter(None, (SIGNS.get(token, token) for token in TOKEN.findall(text))))


def normalize(answer):
    """What equal answers have in common: an exact number (Fraction), or else a text."""
    if len(answer) > MAX_CHARS:
        return answer.strip()
    text = latex(answer)
    for pattern, to in RULES * 3:
        text = " ".join(re.sub(pattern, to, text).split())
    number = re.fullmatch(rf"(-? ?{N})( \\%)?", text)
    if number:
        return Fraction(number[1].replace(" ", "")) / (100 if number[2] else 1)
    return text


def equal(given, answer):
    """Is the given answer right? It is the same number or the same text, and not nothing."""
    return normalize(given) == normalize(answer) != ""


# -------------------------------------------------------------------- 3. equality by algebra
BUDGET = 10.0  # for all questions of a step that take more than a second each
# never asked: nothing, much, a box inside, gigantic powers and factorials
REFUSED = r"\A\s*\Z|[\s\S]{201}|\\f?box|\^[{\s-]*(\d{6}|\d+\s*\^)|\d{5}\s*!|!\s*\)*\s*!"
WORD = rf"{STYLE}(?: \^ (\S+))?|(?<!\S)(or(?!\S)|[A-Za-z]{{3,}})"
WORD += r"|(\\[$%]|\\circ)|(?<=\d )([A-Za-z]+)\Z"
AMOUNT = r"hundred|thousand|.*llion|dozen|hal[fv]|quarter|third|(?!mon).*th\Z|squared|cubed"
AMOUNT = re.compile(AMOUNT + r"|(?:coupl|mor|l|not|pair|ten|st|[nr]d)\Z")  # less, without es
MARK = re.compile(r"'|(?<!\S)0\d|\\[lc]?dots|[0-9A-F] _ (?:\{ )?\S+|\d \d|\\frac \d{3}|\{ \}")
NAME = r"(?<![^,}r] )(?<!\S)(?:[A-Za-z]+(?: \( [a-z] \))?|\( [a-z](?: , [a-z])+ \)) = "
# all other spaces go: behind one, a letter is a unit for the library, which reads no further
SPACE = r"([0-9,] (?=[0-9])|[A-Za-z]{2} (?=[A-Za-z])|[A-Za-z] (?=[A-Za-z]{2}))| "


def is_loose(given, answer):
    """Would math-verify be too generous here? The table of docs/verifier.md says how."""
    found = [" ".join(map(" ".join, re.findall(WORD, text))) for text in (given, answer)]
    words = [{w.rstrip("es") for w in text.lower().split()} for text in found]  # plural or not
    units = words[0] != words[1] if all(words) else any(map(AMOUNT.match, words[0] | words[1]))
    numbers = {type(normalize(given)), type(normalize(answer))} == {Fraction}
    marks = MARK.findall(given) != MARK.findall(answer) or not (given + answer).isascii()
    lists = {("(" in text, "[" in text) for text in (given, answer) if "," in text}
    false = "=" in re.sub(NAME, "", given) and "=" not in answer
    return numbers or units or marks or len(lists) > 1 or false or answer.isalpha()


class Grader:
    """math-verify (pip install math-verify) in its own process. It is safe from threads."""

    def __init__(self, seconds=3.0):  # for one question; most need about 0.01
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
        refused = re.search(REFUSED, given) or re.search(REFUSED, answer)
        if refused or is_loose(latex(given), latex(answer)):
            return False
        with self._lock:
            late = self.spent >= BUDGET
            verdict = None if late else self._remembered(latex(given), latex(answer))
            self.timeouts += verdict is None
        return bool(verdict)

    def metrics(self):
        """The number of late answers since the last call; a new budget begins."""
        late = self.timeouts
        self.timeouts = 0
        self.spent = 0.0
        return {"verify_timeouts": late}

    def _ask(self, given, answer):
        """math-verify's verdict; None if the process had to end."""
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, __file__, str(self.seconds)]
            how = {"stdin": PIPE, "stdout": PIPE, "stderr": DEVNULL, "text": True}
            self._process = Popen(command, start_new_session=True, **how)  # without Ctrl-C
            if not self._process.stdout.readline():
                raise ImportError("math-verify does not work; pip install math-verify")
        start = time.monotonic()
        with suppress(BrokenPipeError):
            print(given, answer, sep="\t", file=self._process.stdin, flush=True)
        reply = self._process.stdout.readline()  # or the process ends by its own alarm
        seconds = time.monotonic() - start
        self.spent += 0 if reply and seconds < 1 else max(seconds, 1)
        if not reply:
            self._process.communicate()  # it has ended
        return reply == "True\n" if reply else None


def serve(seconds):
    """The process: two answers in, True or False out. The system ends it after its alarm."""
    from math_verify import LatexExtractionConfig, grader, parse, verify

    def read(text):  # as LaTeX only: the library's other way goes through Python's eval
        text = re.sub(rf"\\\$ ?|[a-z] \\in |{STYLE}(?: \^ \S+)?\Z", "", text.strip("\n"))
        text = re.sub(SPACE, r"\1", text)
        return parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], parsing_timeout=None)

    grader.sympy_numeric_eq = lambda *_: False  # it rounds to six decimals; algebra decides
    print(verify(read("x + 1"), read("1 + x"), timeout_seconds=None), flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        given, answer = map(read, line.split("\t"))
        print(verify(answer, given, timeout_seconds=None), flush=True)
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    serve(float(sys.argv[1]))
