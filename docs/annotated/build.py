"""Build docs/annotated.html: the method's code, line against line with what it means.

    pip install pygments markdown-it-py mdit-py-plugins
    python docs/annotated/build.py               # after every change of siren.py or a note
    python docs/annotated/build.py --formulas    # a new formula: needs node and npm install

The code is siren.py's sections 1 (the method) and 5 (the training step); the notes are in
notes.md. There `# name` is a function of siren.py and `## title` a note, whose next line

    > a piece of a line ... a piece of a later line

says which lines it is about; the second piece may be missing. `> def` is the first line of the
function to the end of its docstring. After a formula, `@ a piece ... a piece` says which lines
of the note compute it. `FIGURE name` puts figure_name.html here, with the text that follows;
what follows `ENDING` is the end of the page.

A piece that is not in exactly one line of the function stops the build, so that no note can
stand beside the wrong code. All such pieces are listed, each with the most similar line.
"""

import ast
import difflib
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
OTHERS = ("style.css", "data.json", "page.js", "figures.js", "dynamics.js")
SOURCE, PAGE = HERE.parent.parent / "siren.py", HERE.parent / "annotated.html"
# the code that is shown: from the line after the first piece to the line before the second
# a formula, and the pieces of the lines that compute it
COMPUTED = re.compile(r"^(\$\$.+\$\$)\n(@ .+)$", re.MULTILINE)
SHOWN = (("# === begin: copy from here", "2. settings"), ("5. training step", "6. evaluation"))


class BuildError(ValueError):
    """Sources that do not fit together: a line for each problem."""


@dataclass(frozen=True)
class Note:
    """A note about the lines first to last (counted from 1) of siren.py. The code beside it
    begins at start: of its function, if this is the function's first note."""

    function: str
    title: str
    start: int
    first: int
    last: int
    text: str  # Markdown
    computed: tuple[tuple[int, int], ...]  # the lines of each formula that has some

    @property
    def slug(self):
        """A name for links: of words of the title."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def find_line(lines, first, last, piece, where):
    """The number of the only line from first to last that has the piece in it."""
    found = [n for n in range(first, last + 1) if piece in lines[n - 1]]
    if len(found) == 1:
        return found[0]
    problem = f"is in {len(found)} lines" if found else "is in no line"
    texts = {lines[n - 1].strip(): n for n in range(last, first - 1, -1)}
    begins = {text[: len(piece)]: n for text, n in texts.items()}
    near = difflib.get_close_matches(piece, begins, 1, 0.5)
    hint = f"; the most similar is line {begins[near[0]]}: {near[0]!r}" if near else ""
    raise BuildError(f"{where}: {piece!r} {problem} of siren.py {first}-{last}; mend it{hint}")


def find_lines(lines, function, anchor, where):
    """The numbers of the first and last line that an anchor is about. function: of ast."""
    start, _, stop = anchor[2:].partition(" ... ")
    end = function.end_lineno
    if start == "def":
        first, last = function.lineno, function.body[0].end_lineno
    else:
        first = last = find_line(lines, function.lineno, end, start, where)
    return first, find_line(lines, first, end, stop, where) if stop else last


def read_note(part, function, lines, start):
    """The Note of `title, anchor, text`; its code begins at `start`, or where it begins."""
    title, anchor, text = part.split("\n", 2)
    where = f"notes.md: {title}"
    first, last = find_lines(lines, function, anchor, where)
    pieces = COMPUTED.findall(text)
    computed = tuple(find_lines(lines, function, piece, where) for _, piece in pieces)
    for (_, piece), (begin, end) in zip(pieces, computed):
        if begin < first or end > last:
            raise BuildError(f"{where}: {piece!r} is not in its lines {first}-{last}; mend it")
    return Note(function.name, title, start or first, first, last, text, computed)


def check_order(notes):
    """BuildError if a note begins before the one above it ends."""
    for note, following in itertools.pairwise(notes):
        if following.first <= note.last:
            raise BuildError(f"notes.md: {following.title}: must come after {note.title!r}")


def read_notes(text, source):
    """The introduction (Markdown), the list of notes, and the ending (Markdown)."""
    lines = source.split("\n")
    known = {f.name: f for f in ast.parse(source).body if isinstance(f, ast.FunctionDef)}
    text, _, ending = text.partition("\nENDING\n")
    intro, *functions = re.split(r"^# (?=\w+$)", text, flags=re.MULTILINE)
    notes, problems = [], []
    for function in functions:
        name, *parts = re.split(r"^## ", function, flags=re.MULTILINE)
        name = name.strip()
        if name not in known:
            problems.append(f"notes.md: siren.py has no function {name}; mend its notes")
            continue
        start = (known[name].decorator_list or [known[name]])[0].lineno
        for i, part in enumerate(parts):
            try:
                notes.append(read_note(part, known[name], lines, start if i == 0 else None))
            except BuildError as error:
                problems.append(str(error))
    if problems:
        raise BuildError("\n".join(problems))
    check_order(notes)
    return intro, notes, ending


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


def place_of(first, last):
    """In words."""
    return f"line {first}" if first == last else f"lines {first}–{last}"


def line_html(number, code, indent, note):
    """A line of code with its number, which is a link to the line's note."""
    label = f'<span class="no">{number}</span>'
    if note:
        title = html.escape(note.title)
        label = f'<a class="no" href="#{note.slug}" title="{title}">{number}</a>'
    style = f'style="--indent:{indent}ch"'
    computes = note and any(first <= number <= last for first, last in note.computed)
    kind = "line computes" if computes else "line"
    return f'<div class="{kind}" id="L{number}" {style}>{label}<span>{code}\n</span></div>'


def code_of(note, lines, source_lines, end, docstring):
    """The HTML of the code that is shown with a note, to the line before end. All lines of the
    docstring but the first can be folded."""
    out = []
    folded = range(docstring[0] + 1, docstring[1] + 1) if docstring else range(0)
    for n in range(note.start, end):
        text = source_lines[n - 1]
        inside = note.first <= n <= note.last
        if n == note.first:
            out.append(f'<div class="noted" id="code-{note.slug}">')
        if len(folded) > 1 and n == folded[0]:
            more = f"the docstring goes on: {len(folded)} lines"
            out.append(f'<details class="doc" open><summary>{more}</summary>')
        indent = len(text) - len(text.lstrip())
        out.append(line_html(n, lines[n - 1], indent, note if inside else None))
        if len(folded) > 1 and n == folded[-1]:
            out.append("</details>")
        if n == note.last:
            out.append("</div>")
    return "".join(out)


def linked_formulas(note):
    """The note's text, its computed formulas in links to their first line."""
    computed = iter(note.computed)

    def link(found):
        first, last = next(computed)
        numbers = " ".join(map(str, range(first, last + 1)))
        begin = f'<a class="formula" href="#L{first}" data-lines="{numbers}">'
        same = " same" if (first, last) == (note.first, note.last) else ""  # said above
        place = f'<span class="at{same}">{place_of(first, last)}</span>'
        return f"{begin}\n{place}\n\n{found[1]}\n\n</a>\n"

    return COMPUTED.sub(link, note.text)


def row_html(note, body, code, heading):
    """A note and the code that is shown with it."""
    return (
        f'<section class="row">\n<article class="note" id="{note.slug}"><div class="stay">'
        f'{heading}<div class="title"><h3>{html.escape(note.title)}</h3>'
        f'<a href="#code-{note.slug}">{place_of(note.first, note.last)}</a></div>\n'
        f'{body}</div></article>\n<div class="code">{code}</div>\n</section>\n'
    )


def docstrings(source):
    """Function -> the numbers of the first and last line of its docstring."""
    functions = [f for f in ast.parse(source).body if isinstance(f, ast.FunctionDef)]
    found = {f.name: f.body[0] for f in functions if ast.get_docstring(f) is not None}
    return {name: (node.lineno, node.end_lineno) for name, node in found.items()}


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


def rows_html(notes, source, markdown):
    """All rows, and the figures between them; and the functions in their order."""
    source_lines, lines = source.split("\n"), code_html(source)
    folds, rows, seen = docstrings(source), [], []
    for note, end in zip(notes, ends_of(notes, source_lines)):
        heading, fold = "", None
        if note.function not in seen:
            seen.append(note.function)
            heading = f'<h2 id="{note.function}"><code>{note.function}</code></h2>'
            fold = folds.get(note.function)
        text = linked_formulas(note)
        text, *figures = re.split(r"^FIGURE (\w+)$", text, flags=re.MULTILINE)
        code = code_of(note, lines, source_lines, end, fold)
        rows.append(row_html(note, markdown.render(text), code, heading))
        for name, caption in zip(figures[::2], figures[1::2]):
            frame = (HERE / f"figure_{name}.html").read_text("utf-8")
            rows.append(frame.replace("{{text}}", markdown.render(caption)))
    return "".join(rows), seen


def build(source, notes_text, formulas_json):
    """The page (text), and the Formulas that it uses."""
    formulas = Formulas(formulas_json["html"])
    markdown = MarkdownIt("commonmark", {"html": True}).enable("table")
    markdown.use(dollarmath_plugin, renderer=formulas)
    intro, notes, ending = read_notes(notes_text, source)
    rows, functions = rows_html(notes, source, markdown)
    links = "\n".join(f'<a href="#{name}"><code>{name}</code></a>' for name in functions)
    texts = {name: (HERE / name).read_text("utf-8") for name in OTHERS}
    parts = {
        "css": formulas_json["css"] + texts["style.css"],
        "intro": markdown.render(intro),
        "functions": links,
        "rows": rows,
        "ending": markdown.render(ending),
        "data": texts["data.json"],
        "script": "".join(texts[name] for name in OTHERS if name.endswith(".js")),
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
        print("\n".join(f"error: {line}" for line in str(error).split("\n")), file=sys.stderr)
        return 2
    PAGE.write_text(page, "utf-8")
    print(f"{PAGE.relative_to(HERE.parent.parent)}: {len(page) // 1000} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
