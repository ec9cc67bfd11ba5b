"""docs/annotated.html: built from siren.py as it is, and tried in a browser (Chromium)."""

import functools
import importlib.util
import itertools
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import sync_playwright

import siren

PAGE = Path(siren.__file__).parent / "docs" / "annotated.html"
SOURCES = PAGE.parent / "annotated"
WIDTHS = (400, 1280)
FEW, MOST = ".row:nth-child(-n + 18)", ".row:nth-child(n + 19)"
DYNAMICS = ("climb", "spring", "orders")


def load_build():
    """docs/annotated/build.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("annotated_build", SOURCES / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build = load_build()


# --- the build ---


def test_page_is_what_the_sources_give():
    page, formulas = build.build(*build.read_sources())
    formulas.check()
    assert PAGE.read_text("utf-8") == page, "stale: run python docs/annotated/build.py"


def test_formulas_are_those_of_the_notes():
    rendered = build.read_sources()[2]
    used = build.build(*build.read_sources())[1].used
    assert len(used) > 30
    assert set(used) == set(rendered["html"])
    for html in rendered["html"].values():
        assert "<math" in html and 'class="katex-html"' in html and "katex-error" not in html


@pytest.mark.parametrize(
    "old, new, message",
    [
        (
            "adv = groups - groups.mean",
            "adv = groups - torch.mean",
            "'adv = groups - groups.mean'",
        ),
        ("def peak_mask(", "def peaks(", "no function peak_mask"),
        ("unclipped = ratio", "free = ratio", "'unclipped = ratio' is in no line"),
        ("log_pi = (logits", "log_p = (logits", "the most similar is line"),
        ("# 2. verify", "# 1. sample", "'# 1. sample' is in 2 lines"),
        ("6. evaluation", "6. tests", "'6. evaluation' is in no line"),
        ("copy from here", "copy", "'# === begin: copy from here' is in no line"),
        ("def forward(", "x = 1\n\n\ndef forward(", "the line after '5. training step'"),
    ],
)
def test_build_stops_when_a_note_lost_its_line(old, new, message):
    source, *rest = build.read_sources()
    assert old in source
    with pytest.raises(build.BuildError, match=re.escape(message)):
        build.build(source.replace(old, new), *rest)


def test_build_lists_all_that_is_gone(monkeypatch, capsys):
    source, *rest = build.read_sources()
    changed = source.replace("pi = log_pi.detach()", "share = log_pi.detach()")
    changed = changed.replace("h_i = torch.where", "mean = torch.where")
    changed = changed.replace("def likeliest(", "def topmost(")
    monkeypatch.setattr(build, "read_sources", lambda: (changed, *rest))
    before = PAGE.read_bytes()
    assert build.main([]) == 2 and PAGE.read_bytes() == before
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: notes.md: ") for line in lines)
    assert "The token that crosses p is inside: 'pi = log_pi.detach()' is in" in lines[0]
    number = 1 + changed[: changed.index("share = log_pi.detach()")].count("\n")
    assert f"the most similar is line {number}: " in lines[0]
    assert "'h_i = torch.where'" in lines[1] and "no function likeliest" in lines[2]


def test_build_stops_when_a_formula_is_outside_its_note():
    source, notes, formulas = build.read_sources()
    changed = notes.replace("@ mass_before = pi", "@ inside = log_pi", 1)
    with pytest.raises(build.BuildError, match="is not in its lines"):
        build.build(source, changed, formulas)


def test_build_stops_when_notes_are_out_of_order():
    source, notes, formulas = build.read_sources()
    parts = notes.split("\n## ")
    i = next(i for i, part in enumerate(parts) if part.startswith("Sorted, the likeliest"))
    parts[i], parts[i + 1] = parts[i + 1], parts[i]  # two notes of nucleus
    with pytest.raises(build.BuildError, match="must come after"):
        build.build(source, "\n## ".join(parts), formulas)


def test_build_names_the_formula_that_has_no_rendering():
    source, notes, formulas = build.read_sources()
    _, used = build.build(source, notes.replace("$$H' = ", r"$$H' \equiv "), formulas)
    with pytest.raises(build.BuildError, match=r"lacks \$\$H' .equiv"):
        used.check()


def test_bad_option_is_one_line(capsys):
    assert build.main(["--formula"]) == 2
    assert capsys.readouterr().err == "error: --formula: the only option is --formulas\n"


def test_data_is_one_position_and_one_response():
    data = json.loads((SOURCES / "data.json").read_text("utf-8"))
    assert len(data["first"]) == len(data["logits"]) == 12
    assert data["logits"] == sorted(
        set(data["logits"]), reverse=True
    )  # no ties: the set is unique
    assert len(data["tokens"]) == len(data["nucleus_entropy"]) == len(data["options"]) >= 40
    for h, options in zip(data["nucleus_entropy"], data["options"]):
        share = torch.tensor([q for _, q in options], dtype=torch.float64)
        assert (len(options) == 1) == (h == 0)
        if share.sum() > 0.985:  # all of the nucleus is here, to two digits
            assert h == pytest.approx(float(siren.entropy_of(share.log())), abs=0.02)
    assert data["question"] in (SOURCES / "notes.md").read_text("utf-8")


# --- the browser ---


class Browser:
    """Debian's Chromium (apt-get install chromium), or one that Playwright has installed. If
    it crashes, as it may on a busy machine, it is started again."""

    def __init__(self, playwright):
        self.playwright = playwright
        self.browser = None

    def new_context(self, **options):
        if self.browser is None or not self.browser.is_connected():
            path = shutil.which("chromium") or shutil.which("chromium-browser")
            # our own file in a container, where Chromium's sandbox can't start as root
            flags = ["--no-sandbox", "--disable-gpu"]
            self.browser = self.playwright.chromium.launch(executable_path=path, args=flags)
        return self.browser.new_context(**options)

    def open(self, url, prepare, attempts=3, **options):
        """A page at url in a context of its own; prepare(page) is called before it is read."""
        for attempt in range(attempts):
            try:
                page = self.new_context(**options).new_page()
                prepare(page)
                page.goto(url)
                return page
            except PlaywrightError:  # the browser has died; the page's own errors are messages
                if attempt == attempts - 1:
                    raise


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        yield Browser(playwright)


@pytest.fixture(params=[(400, "dark"), (1280, "light"), (400, "light"), (1280, "dark")])
def any_page(browser, request):
    """The page at each width, light and dark."""
    yield from open_page(browser, *request.param)


@pytest.fixture
def page(browser):
    yield from open_page(browser, 1280, "light")


def open_page(browser, width, scheme, **options):
    """The page, whose messages and requests are kept and must be none but itself."""
    messages, requests = [], []

    def listen(page):
        messages.clear()
        requests.clear()
        page.context.set_default_timeout(120_000)  # milliseconds; a busy machine takes tens
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))

    size = {"width": width, "height": 900}
    page = browser.open(PAGE.as_uri(), listen, viewport=size, color_scheme=scheme, **options)
    page.evaluate("document.fonts.ready")
    yield page
    assert messages == []
    assert {url for url in requests if not url.startswith("data:")} <= {PAGE.as_uri()}
    page.context.close()


def test_a_browser_that_has_died_is_started_again(browser):
    for page in open_page(browser, 400, "light"):
        assert page.viewport_size["width"] == 400
    browser.browser.close()
    for page in open_page(browser, 1280, "light"):
        assert page.viewport_size["width"] == 1280


def test_layout(any_page):
    width = any_page.viewport_size["width"]
    # nothing sticks out of the page, and no formula out of its place
    assert any_page.evaluate("document.documentElement.scrollWidth") == width
    cut = """[...document.querySelectorAll(`.math.block, .line, .bars td, .numbers, .tokens,
                 .chart, .slider, .options, .formula`)]
             .filter(x => x.scrollWidth > x.clientWidth + 1).map(x => x.outerHTML)"""
    assert any_page.evaluate(cut) == []
    # an explanation is above its code, or on the left of it
    note = any_page.locator(".note").nth(7).bounding_box()
    code = any_page.locator(".code").nth(7).bounding_box()
    if width == 400:
        assert note["y"] + note["height"] <= code["y"] and note["width"] > 350
    else:
        assert note["x"] + note["width"] <= code["x"] and note["y"] == code["y"]
        lines = any_page.locator(".line")
        heights = [round(lines.nth(i).bounding_box()["height"]) for i in range(60)]
        assert all(height in (19, 20, 38, 39) for height in heights) and heights.count(19) > 30


@pytest.mark.parametrize("width, scheme", [(400, "dark"), (1280, "light")])
def test_contrast_labels_and_structure(browser, width, scheme):
    for page in open_page(browser, width, scheme):
        # for speed without formulas, which have the colour of their text, and most of the
        # code, which has no other colours than its beginning
        colours = """x => [...new Set([...document.querySelectorAll(x + ' .line span')]
                     .map(x => getComputedStyle(x).color))].sort()"""
        assert page.evaluate(colours, FEW) == page.evaluate(colours, "main")
        result = Axe().run(page, context={"exclude": [[".katex"], [MOST]]})
        assert result.violations_count == 0, result.generate_report()
        assert len(result.response["passes"]) > 20


def test_formulas_are_drawn_in_their_fonts(any_page):
    drawn = any_page.evaluate("""[...document.querySelectorAll('.math')].map(x => {
        const box = x.querySelector('.katex-html').getBoundingClientRect();
        return Math.min(box.width, box.height);
    })""")
    assert len(drawn) > 80 and min(drawn) > 4
    fonts = any_page.evaluate("""(() => {
        const name = (family, weight, style) =>
            [family.split(',')[0].replaceAll('"', ''), weight, style].join(' ');
        const loaded = [...document.fonts].filter(x => x.status === 'loaded')
            .map(x => name(x.family, x.weight.replace('normal', '400'), x.style));
        const used = [...document.querySelectorAll('.katex-html *')]
            .map(x => getComputedStyle(x))
            .map(x => name(x.fontFamily, x.fontWeight, x.fontStyle));
        return [loaded.sort(), [...new Set(used)].sort()];
    })()""")
    assert fonts[0] == fonts[1]


def test_code_is_siren_py(page):
    source = Path(siren.__file__).read_text("utf-8").split("\n")
    shown = page.evaluate("""[...document.querySelectorAll('.line')].map(x =>
        [Number(x.querySelector('.no').textContent), x.lastChild.textContent])""")
    assert [line[1] for line in shown] == [source[line[0] - 1] + "\n" for line in shown]
    # two sections of the file, each without a gap
    headings = [i for i, line in enumerate(source, 1) if re.match(r"# -+ \d\. ", line)]
    mark = [line.startswith("# === begin: copy from here") for line in source].index(True)
    begins = [mark + 1, headings[4]]  # after the mark; after "5. training step"
    assert source[begins[1] - 1].endswith(" 5. training step")
    assert "2. settings" in source[headings[1] - 1] and "6. ev" in source[headings[5] - 1]
    method = range(begins[0] + 1, headings[1])
    step = range(begins[1] + 1, headings[5])
    assert [line[0] for line in shown] == [*method, *step]


def test_links_lead_both_ways(page):
    places = page.evaluate("""[...document.querySelectorAll('.note')].map(note => {
        const link = note.querySelector('.title a');
        const lines = document.querySelector(link.hash).querySelectorAll('.line');
        return {
            id: '#' + note.id, text: link.textContent, numbers: [...lines].map(x => x.id),
            back: [...lines].map(x => x.querySelector('a.no').hash),
        };
    })""")
    assert len(places) >= 30
    for place in places:
        first, last = place["numbers"][0][1:], place["numbers"][-1][1:]
        expected = f"line {first}" if first == last else f"lines {first}–{last}"
        assert place["text"] == expected
        assert set(place["back"]) == {place["id"]}
    links = page.evaluate(
        "[...document.querySelectorAll('a')].map(x => x.getAttribute('href'))"
    )
    inside = {link[1:] for link in links if link.startswith("#")}
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(x => x.id)")
    assert len(ids) == len(set(ids)) and inside <= set(ids)
    for link in links:  # files of the project, and web addresses
        assert (
            link[0] == "#" or link.startswith("https://") or (PAGE.parent / link).exists()
        ), link


@pytest.mark.parametrize("width", WIDTHS)
def test_a_followed_link_shows_its_place(browser, width):
    for page in open_page(browser, width, "light"):
        bar = page.locator("nav").bounding_box()["height"]
        page.locator(".note .title a").nth(20).click()
        noted = page.locator(".noted:target")
        assert bar <= noted.bounding_box()["y"] < 900
        plain = page.locator(".code").first.evaluate(
            "x => getComputedStyle(x).backgroundColor"
        )
        assert noted.evaluate("x => getComputedStyle(x).backgroundColor") != plain
        noted.locator("a.no").first.press("Enter")  # and back, by the keyboard
        note = page.locator(".note:target")
        assert note.count() == 1 and bar <= note.bounding_box()["y"] < 900


def readings(page, sliders, ids):
    """For each setting of the sliders (id -> position) the figure's numbers, all digits."""
    return page.evaluate(
        """([settings, ids]) => settings.map(setting => {
            for (const [id, value] of Object.entries(setting)) {
                const input = document.getElementById(id);
                input.value = value;
                input.dispatchEvent(new Event('input'));
                if (Number(input.value) !== value) throw Error(`${id}: no ${value}`);
            }
            const value = (x) => Number(x.value);
            return {
                numbers: ids.map(id => value(document.getElementById(id))),
                columns: ['pi', 'q', 'push'].map(name =>
                    [...document.querySelectorAll(`.bars .${name} data`)].map(value)),
                inside: [...document.querySelectorAll('.bars tbody tr')].map(x => x.className),
                peaks: [...document.querySelectorAll('.token')].map(x => x.className),
                columnPeaks: [...document.querySelectorAll('.column')].map(x => x.className),
            };
        })""",
        [sliders, ids],
    )


def test_nucleus_figure_is_siren(page):
    data = json.loads((SOURCES / "data.json").read_text("utf-8"))
    settings = [
        {"top-p": round(0.05 + 0.01 * i, 2), "temperature": round(0.2 + 0.05 * j, 2)}
        for i in range(0, 96, 5)
        for j in range(0, 97, 8)
    ]
    ids = ["nucleus-entropy", "entropy", "nucleus-size", "nucleus-mass"]
    sizes = set()
    for setting, shown in zip(settings, readings(page, settings, ids)):
        p, temperature = setting["top-p"], setting["temperature"]
        logits = torch.tensor(data["logits"], dtype=torch.float64, requires_grad=True)
        stats = siren.token_stats(logits, torch.tensor(0), p, temperature)
        h = stats["nucleus_entropy"]
        (gradient,) = torch.autograd.grad(h, logits)
        pi = (logits.detach() / temperature).softmax(-1)
        mask = torch.arange(12) < stats["nucleus_size"]  # the likeliest come first
        q = torch.zeros(12, dtype=torch.float64)
        found = siren.nucleus(pi.log(), p).exp()  # [K]
        q[: len(found)] = found
        assert torch.equal(q > 0, mask)
        numbers = [h.item(), stats["entropy"].item(), int(mask.sum()), pi[mask].sum().item()]
        assert shown["numbers"] == pytest.approx(numbers, abs=1e-6), setting
        for column, values in zip(shown["columns"], (pi, q, gradient)):
            assert column == pytest.approx(values.tolist(), abs=1e-6), setting
        assert [name == "inside" for name in shown["inside"]] == mask.tolist()
        assert gradient.abs().max() <= 1  # the scale of the bars
        sizes.add(int(mask.sum()))
    assert sizes >= {1, 2, 5, 10, 12}


def test_peaks_figure_is_siren(page):
    data = json.loads((SOURCES / "data.json").read_text("utf-8"))
    h = torch.tensor([data["nucleus_entropy"]], dtype=torch.float64)
    mask = torch.ones_like(h).bool()
    settings = [{"tau": i / 100} for i in range(101)]
    ids = ["quantile", "peak-count", "response-entropy"]
    for setting, shown in zip(settings, readings(page, settings, ids)):
        tau = setting["tau"]
        peak = siren.peak_mask(h, mask, tau)
        h_i = siren.aggregate_entropy(h, peak, mask)
        place = math.ceil(round(tau * (h.numel() - 1), 6))
        numbers = [sorted(h[0].tolist())[place], int(peak.sum()), float(h_i)]
        assert shown["numbers"] == pytest.approx(numbers, abs=1e-6), setting
        assert [name == "token peak" for name in shown["peaks"]] == peak[0].tolist()
        assert [name == "column peak" for name in shown["columnPeaks"]] == peak[0].tolist()


def test_what_the_captions_say_is_so(page):
    """The positions that the text sends the reader to."""
    ids = ["nucleus-entropy", "nucleus-size", "quantile", "peak-count"]
    start, small, all_tokens, hot = readings(
        page, [{}, {"top-p": 0.55}, {"top-p": 1}, {"top-p": 0.8, "temperature": 5}], ids
    )
    assert small["numbers"][:2] == [0, 1] and not any(small["columns"][2])
    assert start["columns"][2][-1] == 0 < all_tokens["columns"][2][-1]  # "D"
    assert hot["numbers"][1] > start["numbers"][1]
    assert max(map(abs, hot["columns"][2])) < 0.1 * max(map(abs, start["columns"][2]))
    below, at = readings(page, [{"tau": 0.66}, {"tau": 0.67}], ids)
    assert below["numbers"][2] == 0 < at["numbers"][2] and below["numbers"][3] < 54
    words = page.evaluate("[...document.querySelectorAll('.token')].map(x => x.textContent)")
    readings(page, [{"tau": 0.8}], ids)
    peaks = page.evaluate(
        "[...document.querySelectorAll('.token.peak')].map(x => x.textContent)"
    )
    assert {" solved", "This", "end", "1", "6"} <= set(peaks) and peaks.count("6") == 1
    assert words.count("6") == 3


def test_keyboard_moves_the_sliders(page):
    for slider, output in (
        ("top-p", "nucleus-mass"),
        ("temperature", "entropy"),
        ("tau", "quantile"),
    ):
        before = page.locator(f"#{output}").text_content()
        place = page.locator(f"#{slider}")
        place.focus()
        value = float(place.input_value())
        for _ in range(8):
            page.keyboard.press("ArrowRight")
        step = float(place.get_attribute("step"))
        assert float(place.input_value()) == pytest.approx(value + 8 * step)
        assert float(page.locator(f"output[for={slider}]").text_content()) == pytest.approx(
            value + 8 * step
        )
        assert page.locator(f"#{output}").text_content() != before
        assert place.evaluate("x => getComputedStyle(x).outlineStyle") == "solid"


def test_the_tab_key_reaches_the_sliders(page):
    """From the last link before a figure; the tokens are one stop."""
    figures = {
        "nucleus": ["top-p", "temperature"],
        "peaks": ["tau"],
        "climb": ["climb-tokens", "climb-p", "climb-coefficient"],
        "spring": ["spring-beta", "spring-gain"],
        "orders": ["orders-seed", "orders-samples", "orders-lead", "orders-beta"],
    }
    for name, sliders in figures.items():
        page.locator(f"#{sliders[0]}").focus()
        page.keyboard.press("Shift+Tab")  # to what is before the figure, and back
        for slider in sliders:
            page.keyboard.press("Tab")
            assert page.evaluate("document.activeElement.id") == slider, name
    page.locator("#tau").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className").startswith("token")
    page.keyboard.press("Tab")
    assert not page.evaluate("document.activeElement.className").startswith("token")


@pytest.mark.parametrize("width", WIDTHS)
def test_options_of_a_token_by_touch_and_keyboard(browser, width):
    data = json.loads((SOURCES / "data.json").read_text("utf-8"))

    def expected(t):
        words = ", ".join(f"{json.dumps(word)} {q:.2f}" for word, q in data["options"][t])
        token = json.dumps(data["tokens"][t], ensure_ascii=False)
        return (
            f"Token {t + 1}, {token}: H′ = {data['nucleus_entropy'][t]:.4f} nats; q: {words}"
        )

    for page in open_page(browser, width, "light", has_touch=True):
        options = page.locator("#token-options")
        tokens = page.locator(".token")
        assert tokens.count() == len(data["tokens"])
        assert options.get_attribute("role") == "status"
        tokens.nth(12).tap()
        assert options.text_content() == expected(12)
        tokens.nth(12).focus()
        for key, t in (("ArrowRight", 13), ("ArrowRight", 14), ("ArrowLeft", 13), ("Home", 0)):
            page.keyboard.press(key)
            assert options.text_content() == expected(t), key
        page.keyboard.press("ArrowLeft")  # there is none
        assert options.text_content() == expected(0)
        page.keyboard.press("End")
        assert options.text_content() == expected(len(data["tokens"]) - 1)
        assert page.locator(".token[aria-current]").count() == 1
        assert page.locator(".token[tabindex='0']").count() == 1
        box = tokens.nth(3).bounding_box()  # the axe rule for targets: 24 pixels
        assert box["width"] >= 24 and box["height"] >= 24


def test_the_bar_shows_that_it_scrolls(browser):
    mark = """side => {
        const style = getComputedStyle(document.querySelector('nav'), side);
        return style.content === 'none' ? 'none' : style.display;
    }"""
    for page in open_page(browser, 400, "light"):
        bar = page.locator("nav .bar-of-links")
        assert bar.evaluate("x => x.scrollWidth > 2 * x.clientWidth")
        assert page.evaluate(mark, "::after") == "flex"
        assert page.evaluate(mark, "::before") == "none"
        bar.evaluate("x => { x.scrollLeft = 200; }")
        page.wait_for_function("document.querySelector('nav').dataset.more === 'left right'")
        assert page.evaluate(mark, "::before") == page.evaluate(mark, "::after") == "flex"
        bar.evaluate("x => { x.scrollLeft = x.scrollWidth; }")
        page.wait_for_function("document.querySelector('nav').dataset.more === 'left'")
        assert page.evaluate(mark, "::after") == "none"
        # what is read is named in the bar, and in sight
        page.locator("#policy_loss").evaluate("x => x.scrollIntoView()")
        page.wait_for_function(
            "document.querySelector('nav a[aria-current]')?.hash === '#policy_loss'"
        )
        box = page.locator("nav a[aria-current]").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 400
    for page in open_page(browser, 1280, "light"):
        assert page.evaluate(mark, "::after") == page.evaluate(mark, "::before") == "none"
        bar = page.locator("nav .bar-of-links")
        assert bar.evaluate("x => x.scrollWidth === x.clientWidth"), "all of it is seen"


def test_docstrings_are_folded_on_a_narrow_screen(browser):
    source = Path(siren.__file__).read_text("utf-8").split("\n")
    for page in open_page(browser, 400, "light"):
        folds = page.locator("details.doc")
        assert folds.count() >= 5 and page.locator("details.doc[open]").count() == 0
        first = folds.first
        assert not first.locator(".line").first.is_visible()
        count = first.locator(".line").count()
        assert first.locator("summary").text_content() == (
            f"the docstring goes on: {count} lines"
        )
        first.locator("summary").press("Enter")
        assert first.locator(".line").first.is_visible()
        text = first.evaluate("x => x.previousElementSibling.lastChild.textContent")
        assert '"""' in text, "its first line is never folded"
        for fold in folds.all():
            number = int(fold.locator(".line").last.get_attribute("id")[1:])
            assert source[number - 1].endswith('"""'), "to its end"
        page.set_viewport_size({"width": 1280, "height": 900})
        page.wait_for_function("document.querySelector('details.doc:not([open])') === null")
        assert not first.locator("summary").is_visible()


def test_a_formula_stands_beside_the_line_that_computes_it(page):
    places = page.evaluate("""[...document.querySelectorAll('.formula')].map(x => {
        const lines = x.dataset.lines.split(' ').map(n => document.getElementById('L' + n));
        const y = (e) => e.getBoundingClientRect().top;
        return {
            tex: x.querySelector('annotation').textContent, hash: x.hash, x: x.dataset.lines,
            code: lines.map(l => l.lastChild.textContent).join(''), gap: y(x) - y(lines[0]),
            marked: lines.every(l => l.classList.contains('computes')),
            right: lines[0].getBoundingClientRect().left > x.getBoundingClientRect().right,
        };
    })""")
    assert len(places) >= 12
    for place in places:
        assert place["hash"] == "#L" + place["x"].split()[0]
        assert place["marked"] and place["right"]
        assert -140 < place["gap"] < 140, place  # pixels; its title is above it
    pairs = {place["tex"]: place["code"] for place in places}
    for tex, code in (
        ("A_i = r_i -", "adv = groups - groups.mean"),
        ("H' = -", "vecdot(log_q.exp()"),
        ("\\theta_i =", "theta = ordered.gather"),
        ("m_{i,t} = 1", "low = (entropy < theta)"),
        ("H_i =", "h_i = torch.where"),
        ("\\text{gain}_t", "torch.min(unclipped, clipped)"),
        ("L = L_", "beta * (h_agg - anchor) ** 2"),
        ("H^* =", "run.anchor = h_agg"),
    ):
        (found,) = [pairs[key] for key in pairs if key.startswith(tex)]
        assert code in found


@pytest.mark.parametrize("width", WIDTHS)
def test_formula_and_line_are_marked_together(browser, width):
    for page in open_page(browser, width, "light"):
        formula = page.locator(".formula").nth(4)
        number = formula.get_attribute("data-lines").split()[0]
        line = page.locator(f"#L{number}")
        colour = "x => getComputedStyle(x).backgroundColor"
        plain = line.evaluate(colour)
        formula.hover()
        marked = line.evaluate(colour)
        assert marked != plain and formula.evaluate(colour) == marked
        page.mouse.move(0, 0)
        assert line.evaluate(colour) == plain
        line.hover()
        assert formula.evaluate(colour) == marked
        page.mouse.move(0, 0)
        formula.focus()
        assert line.evaluate(colour) == marked
        line.locator("a.no").focus()
        assert formula.evaluate(colour) == marked == line.evaluate(colour)
        page.locator("#end a").first.focus()
        assert line.evaluate(colour) == plain
        assert page.locator(".lit").count() == 0


@pytest.mark.parametrize("width", WIDTHS)
def test_without_javascript_a_sentence_stands_for_each_figure(browser, width):
    for page in open_page(browser, width, "light", java_script_enabled=False):
        figures = page.locator("figure.figure")
        assert figures.count() == 5
        for figure in figures.all():
            assert figure.locator("p.needs-script").is_visible()
            assert not figure.locator(".panel").is_visible()
            assert figure.locator("figcaption").is_visible()
        assert page.locator("details.doc[open]").count() >= 5
    for page in open_page(browser, width, "light"):
        assert page.locator(".needs-script").count() == 0
        assert all(panel.is_visible() for panel in page.locator(".panel").all())


def test_the_end(page):
    assert page.locator("nav a").last.get_attribute("href") == "#end"
    assert page.locator("main > :last-child").get_attribute("id") == "end"
    assert page.locator("#end a").count() >= 4


# --- the three figures of the dynamics ---


def climb_in_torch(vocab, p, coefficient, steps):
    """The tail's probability at each step, by autograd over all tokens, with siren.nucleus."""
    theta = torch.tensor([2.0, 1.0, 0.0, -0.5, -1.0, 0.0], dtype=torch.float64)
    weight = theta[:5].exp().sum()
    theta[5] = (0.005 / 0.995 * weight / (vocab - 5)).log()
    spread = torch.cat([torch.arange(5), torch.full((vocab - 5,), 5)])
    reward = (spread < 5).double()
    masses = []
    for _ in range(steps + 1):
        theta.requires_grad_()
        log_pi = theta[spread].log_softmax(-1)
        h = siren.entropy_of(siren.nucleus(log_pi, p))
        masses.append(log_pi[5:].exp().sum().item())
        goal = log_pi.exp() @ reward + coefficient * h
        (gradient,) = torch.autograd.grad(goal, theta)
        theta = theta.detach() + 0.5 * gradient
    return masses, h.item(), siren.entropy_of(log_pi).item()


@pytest.mark.parametrize(
    "vocab, p, coefficient",
    [
        (10, 1, 0.3),
        (30, 0.9, 0.2),
        (300, 1, 0.2),
        (300, 0.99, 1),
        (3000, 1, 0.5),
        (30, 0.5, 1),
    ],
)
def test_climb_is_the_gradient_over_all_tokens(page, vocab, p, coefficient):
    steps = 150
    shown = page.evaluate("x => climb(...x)", [vocab, p, coefficient, steps])
    masses, h, entropy = climb_in_torch(vocab, p, coefficient, steps)
    assert shown["masses"] == pytest.approx(masses, abs=1e-9)
    assert shown["h"] == pytest.approx(h, abs=1e-9)
    assert shown["entropy"] == pytest.approx(entropy, abs=1e-9)


@pytest.mark.parametrize("p", [0.2, 0.55, 0.9, 0.97, 0.999, 1])
def test_a_nucleus_may_end_within_the_tail(page, p):
    """Sizes of groups of tied tokens, against siren.nucleus on every token."""
    counts = [1, 3, 20]
    pi = torch.tensor([0.4, 0.15, 0.0075], dtype=torch.float64)
    inside = page.evaluate("x => countInside(...x)", [pi.tolist(), counts, p])
    every = pi.repeat_interleave(torch.tensor(counts))
    log_q = siren.nucleus(every.log(), p - 1e-12 if p < 1 else p)
    assert sum(inside) == int((log_q > -torch.inf).sum())
    found = page.evaluate("x => nucleusOf(...x)", [pi.tolist(), inside])
    assert found["h"] == pytest.approx(float(siren.entropy_of(log_q)), abs=1e-9)


@pytest.mark.parametrize("beta, gain", [(0.05, 0.3), (0.2, 0), (2, 1), (5, 0.5)])
@pytest.mark.parametrize("is_bonus", [False, True])
def test_spring_is_the_gradient_of_the_loss(page, beta, gain, is_bonus):
    steps = 60 if beta < 5 else 25  # at 5 it overshoots, and rounding errors grow
    for start in (0.5, 1.5, 2.6):
        shown = page.evaluate("x => spring(...x)", [beta, gain, start, is_bonus, 1.5, steps])
        lead = page.evaluate("x => leadFor(x)", start)
        theta = torch.zeros(20, dtype=torch.float64)
        theta[0] = lead
        reward = torch.zeros(20, dtype=torch.float64)
        reward[0] = gain
        kind = "bonus" if is_bonus else "anchor"
        mask = torch.ones(1, 1).bool()
        for step in range(steps + 1):
            theta.requires_grad_()
            log_pi = theta.log_softmax(-1)
            h = siren.entropy_of(log_pi)
            assert shown[step] == pytest.approx(h.item(), abs=1e-6), step
            policy = -log_pi.exp() @ reward
            loss, _ = siren.siren_loss(policy, h.view(1, 1), mask, 1.5, beta, 0, kind)
            (gradient,) = torch.autograd.grad(loss, theta)
            theta = theta.detach() - 0.5 * gradient
        assert shown[0] == pytest.approx(start, abs=1e-6)


def random_numbers(seed):
    """mulberry32, in Python's integers."""
    whole = 2**32
    state = seed
    while True:
        state = (state + 0x6D2B79F5) % whole
        t = state
        t = (t ^ (t >> 15)) * (t | 1) % whole
        t ^= (t + (t ^ (t >> 7)) * (t | 61) % whole) % whole
        yield (t ^ (t >> 14)) / whole


def orders_in_numpy(samples, beta, lead, seed, steps):
    """Probabilities at each step; the samples' advantages are siren.group_advantages's."""
    random = random_numbers(seed)
    chances = np.array([0.7, 0.7, 0.7, 0.1])
    theta = np.array([lead, 0.0, 0.0, 0.0])
    start = np.exp(theta) / np.exp(theta).sum()
    anchor = -(start * np.log(start)).sum()
    found = []
    for _ in range(steps + 1):
        pi = np.exp(theta - theta.max())
        pi /= pi.sum()
        found.append(pi)
        h = -(pi * np.log(pi)).sum()
        if samples:
            rows = []
            for _ in range(samples):
                order = int(np.searchsorted(pi.cumsum()[:3], next(random), side="right"))
                rows.append((order, float(next(random) < chances[order])))
            drawn, rewards = zip(*rows)
            adv = siren.group_advantages(torch.tensor(rewards, dtype=torch.float64), samples)
            gradient = (adv.numpy()[:, None] * (np.eye(4)[list(drawn)] - pi)).mean(0)
        else:
            gradient = (np.diag(pi) - np.outer(pi, pi)) @ chances
        slope = (np.diag(pi) - np.outer(pi, pi)) @ (-np.log(pi) - 1)  # dH / d theta
        theta = theta + 0.5 * (gradient - 2 * beta * (h - anchor) * slope)
    return np.array(found)


@pytest.mark.parametrize(
    "samples, beta, lead, seed",
    [(8, 0, 0, 0), (8, 0.2, 0, 5), (2, 1, 0.5, 20), (0, 0, 0.5, 0), (0, 0.5, 0.3, 0)],
)
def test_orders_in_numpy(page, samples, beta, lead, seed):
    shown = page.evaluate("x => orders(...x)", [samples, beta, lead, seed, 300])
    expected = orders_in_numpy(samples, beta, lead, seed, 300)
    np.testing.assert_allclose(shown, expected, atol=1e-9)


def test_the_random_numbers_are_even(page):
    drawn = page.evaluate(
        "(() => { const r = randomNumbers(3); return Array.from({length: 20000}, r); })()"
    )
    expected = list(itertools.islice(random_numbers(3), 20000))
    assert drawn == expected
    counts = np.histogram(drawn, 20, (0, 1))[0]
    assert abs(counts - 1000).max() < 5 * math.sqrt(1000)


def move(page, **sliders):
    """Set sliders; a value is one of data-values, or the slider's own."""
    for name, value in sliders.items():
        page.evaluate(
            """([id, value]) => {
                const input = document.getElementById(id);
                const values = input.dataset.values?.split(' ');
                input.value = values ? values.indexOf(String(value)) : value;
                input.dispatchEvent(new Event('input'));
                const text = values ? input.getAttribute('aria-valuetext') : input.value;
                if (text !== String(value)) throw Error(`${id}: no ${value}`);
            }""",
            [name.replace("_", "-"), value],
        )


def numbers(page, *ids):
    """The numbers that a figure shows, with all digits."""
    return [float(page.locator(f"#{name}").evaluate("x => x.value")) for name in ids]


def test_what_the_captions_of_the_dynamics_say_is_so(page):
    mass = functools.partial(numbers, page, "climb-mass", "climb-entropy")
    assert mass()[0] > 0.97 and mass()[1] == pytest.approx(math.log(150000), abs=0.1)
    for vocab in (10, 300, 30000, 150000):
        move(page, climb_tokens=vocab, climb_coefficient=0.05)
        assert mass()[0] < 0.01
    move(page, climb_tokens=300, climb_coefficient=0.15)
    assert mass()[0] < 0.05
    move(page, climb_tokens=30000)
    assert mass()[0] > 0.8
    for p, coefficient in itertools.product((0.99, 0.8, 0.5), (0.2, 1)):
        move(page, climb_tokens=150000, climb_p=p, climb_coefficient=coefficient)
        assert mass()[0] < 0.01
    ends = functools.partial(
        numbers,
        page,
        *(f"{k}-{w}" for k in ("spring", "bonus") for w in ("low", "middle", "high")),
    )
    assert all(1 < x < 1.5 for x in ends()[:3])
    found = {}
    for beta in (0.05, 0.2, 2):
        move(page, spring_beta=beta)
        found[beta] = ends()
    assert found[0.05][:3] == pytest.approx([0.9] * 3, abs=0.05) and max(found[0.05][3:]) < 0.6
    assert found[0.2][:3] == pytest.approx([1.3] * 3, abs=0.05)
    assert found[0.2][3:] == pytest.approx([2.9] * 3, abs=0.05)
    assert min(found[2][:3]) > max(found[0.2][:3]) and max(found[2][:3]) < 1.5
    rest = page.evaluate("spring(0.2, 0.3, 1.5, true, 1.5, 4000).at(-1)")
    assert page.evaluate("x => leadFor(x)", rest) == pytest.approx(0.3 / 0.2, abs=1e-3)
    move(page, spring_gain=0, spring_beta=0.2)
    assert ends() == pytest.approx([1.5] * 3 + [math.log(20)] * 3, abs=0.02)
    move(page, spring_gain=0.3, spring_beta=5)
    values = page.evaluate("spring(5, 0.3, 2.6, false)")
    assert sum((a - 1.5) * (b - 1.5) < 0 for a, b in itertools.pairwise(values)) > 50
    most = "([k, b, lead, seeds]) => seeds.map(s => Math.max(...orders(k, b, lead, s).at(-1)))"
    seeds = list(range(21))
    few, many = (page.evaluate(most, [k, 0, 0, seeds]) for k in (8, 64))
    assert sum(x > 0.5 for x in few) >= 15 and sum(x > 0.85 for x in few) >= 9
    assert np.mean(many) < np.mean(few) - 0.1
    held = [page.evaluate("s => orders(8, 0.2, 0, s).at(-1).slice(0, 3)", s) for s in seeds]
    assert np.min(held) > 0.19 and np.max(held) < 0.5
    winners = {np.argmax(page.evaluate("s => orders(8, 0, 0, s).at(-1)", s)) for s in range(9)}
    assert winners == {0, 1, 2}
    first, *_, bad = page.evaluate("orders(0, 0, 0.5, 0).at(-1)")
    assert first == pytest.approx(0.78, abs=0.01) and bad < 0.002
    alike = page.evaluate("orders(0, 0, 0, 0).at(-1)")
    assert alike[:3] == pytest.approx([alike[0]] * 3, abs=1e-12)
    assert page.evaluate("orders(0, 0.2, 0.5, 0).at(-1)[0]") == pytest.approx(1 / 3, abs=0.01)
    price = [page.evaluate("b => orders(8, b, 0, 0).at(-1)[3]", b) for b in (0.05, 0.5, 5)]
    assert price == sorted(price) and price[-1] > 10 * price[0]


@pytest.mark.parametrize("width", WIDTHS)
def test_charts_show_what_is_computed(browser, width):
    """Each line ends where its number says; names and dashes tell the lines apart."""
    read = """id => {
        const chart = document.getElementById(id).querySelector('svg');
        const box = chart.getBoundingClientRect();
        const heights = (x) => Number(x.getAttribute('y1'));
        const grid = [...chart.querySelectorAll('.grid')].map(heights);
        return {
            label: chart.getAttribute('aria-label'), width: box.width, grid,
            ends: [...chart.querySelectorAll('polyline')].map(x =>
                Number(x.getAttribute('points').split(' ').at(-1).split(',')[1])),
            dashes: [...chart.querySelectorAll('polyline')].map(x =>
                getComputedStyle(x).strokeDasharray),
            names: [...chart.querySelectorAll('.name')].map(x => {
                const b = x.getBoundingClientRect();
                return [x.textContent, b.top, b.bottom, b.right];
            }),
            right: box.right,
        };
    }"""
    charts = {
        "climb-chart": (1, ["climb-mass"]),
        "spring-chart": (3, ["spring-low", "spring-middle", "spring-high"]),
        "bonus-chart": (3, ["bonus-low", "bonus-middle", "bonus-high"]),
        "alone-chart": (1, [f"alone-{i}" for i in range(1, 5)]),
        "anchored-chart": (1, [f"anchored-{i}" for i in range(1, 5)]),
    }
    for page in open_page(browser, width, "light"):
        for name, (top, ids) in charts.items():
            chart = page.evaluate(read, name)
            low, _, high = chart["grid"]
            values = [(low - y) / (low - high) * top for y in chart["ends"]]
            assert values[: len(ids)] == pytest.approx(numbers(page, *ids), abs=0.01 * top)
            assert len(set(chart["dashes"])) == len(chart["dashes"]) == len(chart["names"])
            for words, _, _, right in chart["names"]:
                assert f"{words} ends at" in chart["label"] and right <= chart["right"] + 1
            said = [float(x) for x in re.findall(r"ends at (\d\.\d+)", chart["label"])]
            assert said[: len(ids)] == pytest.approx(numbers(page, *ids), abs=6e-4)
            boxes = sorted(chart["names"], key=lambda x: x[1])
            assert all(b[1] >= a[2] - 3 for a, b in itertools.pairwise(boxes))
            assert 220 <= chart["width"] <= width


def test_names_are_pulled_apart(page):
    for places in ([5, 5, 5, 5], [160, 168, 168, 167], [20, 90, 91, 160], [5, 168, 80, 6]):
        found = page.evaluate("x => pullApart(x, 14, 168)", places)
        assert min(found) >= 5 and max(found) <= 168, "inside the chart"
        rows = sorted(zip(places, found))
        assert all(b[1] - a[1] >= 14 for a, b in itertools.pairwise(rows)), "in their order"
    assert page.evaluate("pullApart([20, 90, 160], 14, 168)") == [20, 90, 160]
