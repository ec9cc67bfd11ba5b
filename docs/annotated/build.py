"""Build docs/annotated.html: the method's code, line against line with what it means.

    pip install pygments markdown-it-py mdit-py-plugins
    python docs/annotated/build.py               # after every change of siren.py or a note
    python docs/annotated/build.py --formulas    # a new formula: needs node and npm install

The code is siren.py's sections 1 (the method) and 5 (the training step); the notes are in
notes.md. There `# name` is a function of siren.py and `## title` a note, whose next line

    > a piece of a line ... a piece of a later line

says which lines it is about; the second piece may be missing. `> def` is the first line of the
function to the end of its docstring. A piece that is not in exactly one line of the function
stops the build, so that no note can stand beside the wrong code.
"""

import ast
import html
import itertools
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

HERE = Path(__file__).resolve().parent
SOURCE, PAGE = HERE.parent.parent / "siren.py", HERE.parent / "annotated.html"
# the code that is shown: from the line after the first piece to the line before the second
SHOWN = (("# === begin: copy from here", "2. settings"), ("5. training step", "6. evaluation"))


class BuildError(ValueError):
    """Sources that do not fit together, in one line."""


@dataclass(frozen=True)
class Note:
    """A note about the lines first to last (counted from 1) of siren.py."""

    function: str
    title: str
    start: (
        int  # of the code shown with it: of its function, if this is the function's first note
    )
    first: int
    last: int
    text: str  # Markdown

    @property
    def slug(self):
        """A name for links: of words of the title."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def find_line(lines, first, last, piece, where):
    """The number of the only line from first to last that has the piece in it."""
    found = [n for n in range(first, last + 1) if piece in lines[n - 1]]
    if len(found) != 1:
        problem = f"is in {len(found)} lines" if found else "is in no line"
        raise BuildError(
            f"{where}: {piece!r} {problem} of siren.py {first}-{last}; mend the note"
        )
    return found[0]


def find_lines(lines, function, anchor, where):
    """The numbers of the first and last line that an anchor is about. function: of ast."""
    start, _, stop = anchor.removeprefix("> ").partition(" ... ")
    end = function.end_lineno
    if start == "def":
        first, last = function.lineno, function.body[0].end_lineno
    else:
        first = last = find_line(lines, function.lineno, end, start, where)
    return first, find_line(lines, first, end, stop, where) if stop else last


def read_notes(text, source):
    """The introduction (Markdown) and the list of notes."""
    lines = source.split("\n")
    known = {f.name: f for f in ast.parse(source).body if isinstance(f, ast.FunctionDef)}
    intro, *functions = re.split(r"^# (?=\w+$)", text, flags=re.MULTILINE)
    notes = []
    for function in functions:
        name, *parts = re.split(r"^## ", function, flags=re.MULTILINE)
        name = name.strip()
        if name not in known:
            raise BuildError(f"notes.md: siren.py has no function {name}; mend its notes")
        for part in parts:
            title, anchor, body = part.split("\n", 2)
            span = find_lines(lines, known[name], anchor, f"notes.md: {title}")
            begin = known[name].decorator_list or [known[name]]
            start = span[0] if part is not parts[0] else begin[0].lineno
            notes.append(Note(name, title, start, *span, body))
    for note, following in itertools.pairwise(notes):
        if following.first <= note.last:
            raise BuildError(f"notes.md: {following.title}: must come after {note.title!r}")
    return intro, notes


class Formulas:
    """KaTeX's HTML of TeX sources, and the list of those that were asked for."""

    def __init__(self, rendered):
        self.rendered, self.used = rendered, {}

    def __call__(self, tex, options):
        tex, display = tex.strip(), options["display_mode"]
        mark = "$$" if display else "$"
        self.used[mark + tex + mark] = (tex, display)
        return self.rendered.get(mark + tex + mark, "")

    def check(self):
        """BuildError if a formula has no rendering."""
        missing = [key for key in self.used if key not in self.rendered]
        if missing:
            raise BuildError(f"formulas.json lacks {missing[0]}; run build.py --formulas")


def code_html(source):
    """The HTML of each line of siren.py."""
    marked = highlight(source, PythonLexer(stripnl=False), HtmlFormatter(nowrap=True))
    return marked.split("\n")


def line_html(number, code, indent, note):
    """A line of code with its number, which is a link to the line's note."""
    label = f'<span class="no">{number}</span>'
    if note:
        label = (
            f'<a class="no" href="#{note.slug}" title="{html.escape(note.title)}">{number}</a>'
        )
    style = f'style="--indent:{indent}ch"'
    return f'<span class="line" id="L{number}" {style}>{label}<span>{code}\n</span></span>'


def row_html(note, body, lines, source_lines, end, heading):
    """A note and the code that is shown with it, to the line before end."""
    out = []
    for n in range(note.start, end):
        text = source_lines[n - 1]
        inside = note.first <= n <= note.last
        if n == note.first:
            out.append(f'<span class="noted" id="code-{note.slug}">')
        indent = len(text) - len(text.lstrip())
        out.append(line_html(n, lines[n - 1], indent, note if inside else None))
        if n == note.last:
            out.append("</span>")
    place = (
        f"line {note.first}" if note.first == note.last else f"lines {note.first}–{note.last}"
    )
    return (
        f'<section class="row">\n<article class="note" id="{note.slug}"><div class="stay">'
        f'{heading}<div class="title"><h3>{html.escape(note.title)}</h3>'
        f'<a href="#code-{note.slug}">{place}</a></div>\n{body}</div></article>\n'
        f'<pre class="code">{"".join(out)}</pre>\n</section>\n'
    )


def ends_of(notes, source_lines):
    """For each note the line before which the code that is shown with it ends."""
    starts = {note.start for note in notes}
    ends = sorted(starts)[1:]
    for piece, stop in SHOWN:
        first = 1 + find_line(source_lines, 1, len(source_lines), piece, "build.py")
        stop = find_line(source_lines, first, len(source_lines), stop, "build.py")
        if first not in starts:
            raise BuildError(f"notes.md: a note must be about the line after {piece!r}")
        ends.append(stop)
    return [min(end for end in ends if end > note.start) for note in notes]


def build(source, notes_text, formulas_json):
    """The page (text), and the Formulas that it uses."""
    formulas = Formulas(formulas_json["html"])
    markdown = MarkdownIt("commonmark", {"html": True}).enable("table")
    markdown.use(dollarmath_plugin, renderer=formulas)
    intro, notes = read_notes(notes_text, source)
    source_lines, lines = source.split("\n"), code_html(source)
    rows, seen = [], []
    for note, end in zip(notes, ends_of(notes, source_lines)):
        heading = ""
        if note.function not in seen:
            seen.append(note.function)
            heading = f'<h2 id="{note.function}"><code>{note.function}</code></h2>'
        text, *figure = re.split(r"^FIGURE (\w+)$", note.text, flags=re.MULTILINE)
        rows.append(row_html(note, markdown.render(text), lines, source_lines, end, heading))
        if figure:
            frame = (HERE / f"figure_{figure[0]}.html").read_text("utf-8")
            rows.append(frame.replace("{{text}}", markdown.render(figure[1])))
    links = "\n".join(f'<a href="#{name}"><code>{name}</code></a>' for name in seen)
    parts = {
        "css": formulas_json["css"] + (HERE / "style.css").read_text("utf-8"),
        "intro": markdown.render(intro),
        "functions": links,
        "rows": "".join(rows),
        "data": (HERE / "data.json").read_text("utf-8"),
        "script": (HERE / "figures.js").read_text("utf-8"),
    }
    page = (HERE / "page.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], page), formulas


def render_formulas(formulas):
    """Write formulas.json anew with KaTeX."""
    command = ["node", str(HERE / "render_formulas.mjs")]
    wanted = json.dumps(sorted(formulas.used.values()))
    done = subprocess.run(command, input=wanted, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = next(
            (x for x in done.stderr.splitlines() if "Error" in x), done.stderr[-200:]
        )
        raise BuildError(f"node render_formulas.mjs (npm install first): {reason}")
    (HERE / "formulas.json").write_text(done.stdout, "utf-8")


def read_sources():
    """The arguments of build: siren.py, notes.md, formulas.json."""
    texts = (path.read_text("utf-8") for path in (SOURCE, HERE / "notes.md"))
    return *texts, json.loads((HERE / "formulas.json").read_text("utf-8"))


def main(argv):
    """Write the page; return the exit code."""
    try:
        if argv == ["--formulas"]:
            render_formulas(build(*read_sources())[1])
        elif argv:
            raise BuildError(f"{' '.join(argv)}: the only option is --formulas")
        page, formulas = build(*read_sources())
        formulas.check()
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    PAGE.write_text(page, "utf-8")
    print(f"{PAGE.relative_to(HERE.parent.parent)}: {len(page) // 1000} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
