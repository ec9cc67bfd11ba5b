"""Make the web site of the project: the annotated page, the tutorial and the pages of docs/.

    pip install -r docs/requirements.txt
    python docs/make_site.py _site --repository owner/name

_site/ mirrors the repository: docs/zoo.md becomes docs/zoo.html, tutorial.ipynb tutorial.html.
Links between these pages lead to the pages, other links to the file in the repository on
GitHub. A link to a file that is not there stops everything. .github/workflows/pages.yml calls
this after every push to main; where it publishes, and how to switch that on, is said there.
"""

import argparse
import html
import os
import posixpath
import re
import shutil
import sys
from pathlib import Path

from markdown_it import MarkdownIt
from mdit_py_plugins.anchors import anchors_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin

ROOT = Path(__file__).resolve().parent.parent
MORE = (
    "results/README.md",
    "results/tables.md",
    "results/bench.md",
    "results/real/responses.md",
)
MORE += ("exercises/README.md", "examples/README.md")
LINK = re.compile(r'\b(href|src)="([^"]*)"')
# what may be wider than the screen scrolls by itself, also by keyboard
WIDE = {
    "<table>": '<div class="wide" role="group" aria-label="table" tabindex="0"><table>',
    "</table>": "</table></div>",
    "<pre>": '<pre tabindex="0">',
    '<div class="math block">': '<div class="math block" tabindex="0">',
    "<th></th>": "<td></td>",  # an empty heading
}
CSS = """:root { color-scheme: light dark; }
body { margin: 0 auto; max-width: 52rem; padding: 1rem 1rem 4rem; overflow-wrap: break-word;
  font: 1rem/1.55 system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
img { max-width: 100%; height: auto; background: #fff; }
pre, .wide, .math.block { overflow-x: auto; }
pre { padding: .6rem; border: 1px solid #8888; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .9rem; }
th, td { border: 1px solid #8888; padding: .2rem .5rem; text-align: left; }
"""
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{css}</style>
</head>
<body>
{home}<main>
{body}</main>
</body>
</html>
"""
INDEX = """# siren

A minimal, single-file PyTorch reference of SIREN, selective entropy regularisation for
reinforcement learning with verifiable rewards ([the code](README.md)).

- [SIREN, line by line](docs/annotated.html): formulas and figures beside the code
- [The tutorial](tutorial.ipynb): why each part is there
- [The zoo](docs/zoo.md): 25 methods, SIREN and its parts among them
- [The study](results/README.md), [its tables](results/tables.md), and
  [a real model](docs/real_model.md)
- [The exercises](exercises/README.md), and [a course for teachers](docs/course.md)
"""


class SiteError(ValueError):
    """What can't be published, in one line."""


def sources():
    """The paths in the repository of what becomes a page."""
    pages = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
    return ("docs/annotated.html", "tutorial.ipynb", *pages, *MORE)


def address(source):
    """Where a page lies in the site.

    >>> address("docs/zoo.md"), address("tutorial.ipynb")
    ('docs/zoo.html', 'tutorial.html')
    """
    return str(Path(source).with_suffix(".html"))


def math_html(tex, options):
    """MathML, which browsers draw without a library."""
    from latex2mathml.converter import convert

    return convert(tex, display="block" if options["display_mode"] else "inline")


def slug(title):
    """The name that GitHub gives to a heading.

    >>> slug("What came out, in `siren.py`?")
    'what-came-out-in-sirenpy'
    """
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


def render(text):
    """Markdown to a whole page."""
    markdown = MarkdownIt("commonmark", {"html": True}).enable("table")
    markdown.use(dollarmath_plugin, renderer=math_html, allow_space=False)
    markdown.use(anchors_plugin, max_level=4, slug_func=slug)
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    name = html.escape(title[1] if title else "siren")
    home = '<nav><a href="{home}">siren</a></nav>\n'
    body = markdown.render(text)
    for old, new in WIDE.items():
        body = body.replace(old, new)
    return PAGE.format(title=name, css=CSS, home=home, body=body)


def render_notebook(path):
    """A notebook, with its stored outputs, as a page. (Its formulas need MathJax's server.)"""
    from nbconvert import HTMLExporter

    body, _ = HTMLExporter(embed_images=True).from_filename(str(path))
    return re.sub(r"<title>.*?</title>", "<title>SIREN, a tutorial</title>", body, count=1)


def rewrite(page, source, published, repository):
    """The page with its links changed, and the images that it shows.

    source: its path in the repository; published: the paths of all pages.
    """
    images = set()

    def change(found):
        kind, link = found[1], html.unescape(found[2])
        if re.match(r"[a-z][a-z+.-]*:|#|//|\{", link) or not link:
            return found[0]
        target, mark, anchor = link.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        place = ROOT / path
        if path.startswith("..") or not place.exists():
            raise SiteError(f"{source}: links to {link}, which is not there")
        if path in published:
            new = posixpath.relpath(address(path), posixpath.dirname(address(source)) or ".")
        elif place.suffix in (".png", ".jpg", ".svg"):
            images.add(path)
            new = target
        else:
            what = "tree" if place.is_dir() else "blob"
            new = f"https://github.com/{repository}/{what}/HEAD/{path}"
        return f'{kind}="{html.escape(new + mark + anchor)}"'

    return LINK.sub(change, page), images


def make(out, repository):
    """Write the site to the new folder `out`."""
    published = sources()
    pages = {"index.md": render(INDEX)}
    for source in published:
        path = ROOT / source
        if path.suffix == ".ipynb":
            pages[source] = render_notebook(path)
        else:
            text = path.read_text("utf-8")
            pages[source] = render(text) if path.suffix == ".md" else text
    for source, page in pages.items():
        home = posixpath.relpath("index.html", posixpath.dirname(source) or ".")
        page, images = rewrite(page, source, published, repository)
        page = page.replace('<a href="{home}">', f'<a href="{home}">')
        place = out / address(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(page, "utf-8")
        for image in images:
            (out / image).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / image, out / image)
    return sorted(address(source) for source in pages)


def main(argv=None):
    """The command; returns the exit code: 2 for what can't be published."""
    parser = argparse.ArgumentParser("make_site.py", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    name = os.environ.get("GITHUB_REPOSITORY", "")  # in a workflow
    parser.add_argument("--repository", default=name, help="owner/name on GitHub")
    args = parser.parse_args(argv)
    try:
        if args.out.exists():
            raise SiteError(f"{args.out}: exists; name a new folder")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repository):
            raise SiteError(f"--repository {args.repository!r}: must be owner/name")
        pages = make(args.out, args.repository)
    except SiteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {len(pages)} pages, {', '.join(pages[:3])} ...")
    return 0


if __name__ == "__main__":
    sys.exit(main())
