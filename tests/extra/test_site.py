"""docs/make_site.py: the web site that .github/workflows/pages.yml publishes."""

import doctest
import html
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = (ROOT / ".github" / "workflows" / "pages.yml").read_text("utf-8")


def load_make_site():
    """docs/make_site.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("make_site", ROOT / "docs" / "make_site.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


make_site = load_make_site()


def pins(name):
    """Package -> version."""
    return dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / name).read_text("utf-8"), re.M))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The whole site, the tutorial included. It needs docs/requirements.txt."""
    pytest.importorskip("nbconvert")
    pytest.importorskip("latex2mathml")
    out = tmp_path_factory.mktemp("site") / "_site"
    assert make_site.main([str(out), "--repository", "owner/name"]) == 0
    return out


def test_worked_examples():
    found = doctest.testmod(make_site)
    assert found.attempted >= 2 and found.failed == 0


def test_every_link_leads_somewhere(site):
    pages = {path: path.read_text("utf-8") for path in site.rglob("*.html")}
    ids = {path: set(re.findall(r'\bid="([^"]+)"', page)) for path, page in pages.items()}
    followed = 0
    for path, page in pages.items():
        if path.name == "tutorial.html":  # without the script of its theme
            page = page[page.index("<main") :]
        for _, link in re.findall(r'\b(href|src)="([^"]*)"', page):
            target, _, anchor = html.unescape(link).partition("#")
            if re.match(r"https?:|data:|mailto:", target):
                continue
            place = (path.parent / target).resolve() if target else path
            assert place.exists(), f"{path.relative_to(site)}: {link}"
            if anchor and place.suffix == ".html":
                assert anchor in ids[place], f"{path.relative_to(site)}: {link}"
            followed += 1
    assert followed > 400


def test_the_site_has_what_it_is_for(site):
    index = (site / "index.html").read_text("utf-8")
    for page in (
        "docs/annotated.html",
        "tutorial.html",
        "docs/zoo.html",
        "results/README.html",
    ):
        assert f'href="{page}"' in index and (site / page).exists()
    zoo = (site / "docs" / "zoo.html").read_text("utf-8")
    assert "<td>" in zoo and 'src="../results/zoo.png"' in zoo
    assert (site / "results" / "zoo.png").read_bytes() == (
        ROOT / "results" / "zoo.png"
    ).read_bytes()
    assert '<a href="../index.html">' in zoo
    annotated = (site / "docs" / "annotated.html").read_text("utf-8")
    assert 'href="https://github.com/owner/name/blob/HEAD/siren.py"' in annotated
    assert 'href="../tutorial.html"' in annotated and 'href="zoo.html"' in annotated
    assert "<math" in (site / "docs" / "beta.html").read_text("utf-8")
    book = json.loads((ROOT / "tutorial.ipynb").read_text("utf-8"))
    heading = re.search(r"^# (.+)$", "".join(book["cells"][0]["source"]), re.M)
    tutorial = (site / "tutorial.html").read_text("utf-8")
    assert (
        html.escape(heading[1], quote=False)[:20] in tutorial and "data:image/png" in tutorial
    )


def test_a_link_to_nothing_stops_it():
    for link in ("gone.md", "../gone.png", "../../outside.md"):
        page = f'<a href="{link}">x</a>'
        with pytest.raises(
            make_site.SiteError, match=re.escape(f"docs/zoo.md: links to {link}")
        ):
            make_site.rewrite(page, "docs/zoo.md", (), "owner/name")


@pytest.mark.parametrize(
    "link, expected",
    [
        ("zoo.md#what-came-out", "zoo.html#what-came-out"),
        ("../results/README.md", "../results/README.html"),
        ("../siren.py", "https://github.com/owner/name/blob/HEAD/siren.py"),
        ("../examples", "https://github.com/owner/name/tree/HEAD/examples"),
        ("../results/zoo.png", "../results/zoo.png"),
        ("#here", "#here"),
        ("https://arxiv.org/abs/2509.25133", "https://arxiv.org/abs/2509.25133"),
    ],
)
def test_links(link, expected):
    page, images = make_site.rewrite(
        f'<a href="{link}">x</a>', "docs/beta.md", make_site.sources(), "owner/name"
    )
    assert page == f'<a href="{expected}">x</a>'
    assert images == ({"results/zoo.png"} if link.endswith(".png") else set())


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["tests", "--repository", "owner/name"], "tests: exists; name a new folder"),
        (["_no", "--repository", "siren"], "--repository 'siren': must be owner/name"),
        (["_no"], "--repository '': must be owner/name"),
    ],
)
def test_bad_input_is_one_line(arguments, said, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    assert make_site.main(arguments) == 2
    assert capsys.readouterr().err == f"error: {said}\n"
    assert not (ROOT / "_no").exists()


def test_the_workflow_makes_the_site_and_publishes_it():
    steps = re.findall(r"^      - (?:run|uses|id): (.+)$", WORKFLOW, re.M)
    assert steps.index("pip install -r docs/requirements.txt") < steps.index(
        "python docs/make_site.py _site"
    )
    assert "path: _site" in WORKFLOW and "actions/deploy-pages" in WORKFLOW
    for right in ("contents: read", "pages: write", "id-token: write"):
        assert right in WORKFLOW
    others = pins("requirements-examples.txt") | pins("requirements-notebook.txt")
    own = pins("docs/requirements.txt")
    assert all(others.get(name, version) == version for name, version in own.items())
    assert {"nbconvert", "markdown-it-py"} <= own.keys()
    readme = (ROOT / "README.md").read_text("utf-8")
    assert "`https://<owner>.github.io/<repository>/docs/annotated.html`" in readme
    assert "download and open it" in readme


@pytest.mark.parametrize("width", [400, 1280])
def test_pages_fit_the_screen_and_have_no_violations(site, width):
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": width, "height": 900})
        for name in ("index", "docs/zoo", "docs/beta", "results/README"):
            page.goto((site / f"{name}.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") == width, name
            result = Axe().run(page)
            assert result.violations_count == 0, f"{name}: {result.generate_report()}"
