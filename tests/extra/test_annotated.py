"""docs/annotated.html: built from siren.py as it is, and tried in a browser (Chromium)."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

import siren

PAGE = Path(siren.__file__).parent / "docs" / "annotated.html"
SOURCES = PAGE.parent / "annotated"
WIDTHS = (400, 1400)
FEW, MOST = ".row:nth-child(-n + 18)", ".row:nth-child(n + 19)"


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
        ("term = (h_agg", "pull = (h_agg", "'term =' is in no line"),
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


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium (apt-get install chromium), or one that Playwright has installed."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        # our own file in a container, where Chromium's sandbox can't start as root
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


@pytest.fixture(params=[(400, "dark"), (1400, "light"), (400, "light"), (1400, "dark")])
def any_page(browser, request):
    """The page at each width, light and dark."""
    yield from open_page(browser, *request.param)


@pytest.fixture
def page(browser):
    yield from open_page(browser, 1400, "light")


def open_page(browser, width, scheme):
    """The page, whose messages and requests are kept and must be none but itself."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme
    )
    page, messages, requests = context.new_page(), [], []
    context.set_default_timeout(120_000)  # milliseconds; a busy machine takes tens of seconds
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(PAGE.as_uri())
    page.evaluate("document.fonts.ready")
    yield page
    assert messages == []
    assert {url for url in requests if not url.startswith("data:")} <= {PAGE.as_uri()}
    context.close()


def test_layout(any_page):
    width = any_page.viewport_size["width"]
    # nothing sticks out of the page, and no formula out of its place
    assert any_page.evaluate("document.documentElement.scrollWidth") == width
    cut = """[...document.querySelectorAll('.math.block, .line, .bars td, .numbers, .tokens')]
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
        assert {round(lines.nth(i).bounding_box()["height"]) for i in range(60)} == {19}


@pytest.mark.parametrize("width, scheme", [(400, "dark"), (1400, "light")])
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
    begins = [headings[0] + 1, headings[4]]  # after the mark; after "5. training step"
    assert source[begins[0] - 1].startswith("# === begin: copy from here")
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
        numbers = [float(torch.quantile(h, tau)), int(peak.sum()), float(h_i)]
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
    """From the last link before a figure; links and sliders are the only controls."""
    for figure, sliders in {"nucleus": ["top-p", "temperature"], "peaks": ["tau"]}.items():
        page.locator(f"section:has(+ #figure-{figure}) a").last.focus()
        for slider in sliders:
            page.keyboard.press("Tab")
            assert page.evaluate("document.activeElement.id") == slider
    assert page.locator("button, select, textarea, [tabindex], [contenteditable]").count() == 0
