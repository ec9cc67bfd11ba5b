"""The figures of results/ from their stored rows: readable in grey, names at the lines."""

import doctest
from pathlib import Path

import numpy as np
import pytest
from figure_checks import alike, check_figure, check_panel, dashes_of
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from research import figures, study, study_report
from research.zoo import table

RESULTS = Path(study.__file__).resolve().parents[1] / "results"


@pytest.fixture(scope="module")
def store():
    return study.Store(RESULTS)


@pytest.fixture(scope="module")
def drawn(store):
    """Name -> each figure of research/study.py --report."""
    return study_report.draw(
        {p: study_report.labelled(p, study.Size(), store) for p in study.PARTS}
    )


def zoo_figure(store):
    """The figure of research/zoo.py --table --report."""
    rows = {name: [] for name in ("base", *table.EVERY)}
    for job in table.final(table.SIZE, table.choose(table.SIZE, store)):
        rows[job.label].append(store.rows[job.key])
    return table.figure(rows)


def test_worked_examples():
    assert doctest.testmod(figures).attempted >= 1
    assert doctest.testmod(figures).failed == 0


def test_pull_apart_against_a_search():
    places = [0.3, 0.1, 0.12, 0.9]
    grid = np.arange(-0.4, 1.3, 0.02)
    found = figures.pull_apart(places, 0.2)
    order = np.argsort(places)
    assert (np.diff(found[order]) >= 0.2 - 1e-9).all()
    best = ((found - places) ** 2).sum()
    for a in grid:  # of the three lower ones; the fourth is far away
        for b in grid[grid >= a + 0.2 - 1e-9]:
            c = max(b + 0.2, 0.3)
            assert (a - 0.1) ** 2 + (b - 0.12) ** 2 + (c - 0.3) ** 2 >= best - 1e-9


def test_figures_of_the_study_can_be_read_in_grey(drawn):
    names = {"steps", "kinds", "k", "k_easy", "constrained", "vocabularies", "sensitivity"}
    assert set(drawn) == names <= {path.stem for path in RESULTS.glob("*.png")}
    least = {
        "steps": 14,
        "kinds": 6,
        "k": 20,
        "k_easy": 20,
        "vocabularies": 9,
        "sensitivity": 9,
    }
    for name, figure in drawn.items():
        assert check_figure(figure, named=name != "kinds") >= least.get(name, 0), name
    first, second = drawn["kinds"].axes  # its marks are named in the first panel
    assert {"forks", "sums", "forced"} <= {text.get_text() for text in first.texts}
    assert len(drawn["kinds"].axes) == 2 and second.get_ylim() == first.get_ylim()


def test_the_figure_of_the_zoo_names_every_method_and_hides_none(store):
    figure = zoo_figure(store)
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert sorted(names) == sorted(table.EVERY)
    for panel in figure.axes:
        check_panel(panel)
        marks = [line for line in panel.get_lines() if line.get_marker() != "None"]
        heights = [float(np.ravel(line.get_ydata())[0]) for line in marks]
        assert sorted(heights) == list(range(len(names))), "a row for each method"


def test_names_do_not_cover_each_other(drawn):
    for figure in ("steps", "k", "k_easy", "vocabularies", "sensitivity"):
        renderer = FigureCanvasAgg(drawn[figure]).get_renderer()
        for panel in drawn[figure].axes:
            boxes = []
            for name in panel.texts:
                name.update_positions(renderer)
                boxes.append(Text.get_window_extent(name))  # without its arrow
            pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
            for a, b in pairs:
                assert a.y0 >= b.y1 - 1 or b.y0 >= a.y1 - 1, f"{figure}: {panel.get_title()}"


@pytest.mark.parametrize(
    "one, other, said",
    [
        ({"linestyle": "--"}, {"linestyle": "--", "color": "#b35900"}, "same dashes"),
        ({"linestyle": (0, (4, 2))}, {"linestyle": (0, (4.2, 2.1))}, "same dashes"),
        ({"linestyle": "-"}, {"linestyle": "--", "color": "#cccccc"}, "too pale"),
        ({"linestyle": "", "marker": "o"}, {"linestyle": "", "marker": "o"}, "same marks"),
    ],
)
def test_the_check_finds_what_can_not_be_read(one, other, said):
    ax = Figure().subplots()
    for i, style in enumerate((one, other)):
        ax.plot([0, 1], [0, i], **{"color": "#000000", "label": str(i), **style})
    with pytest.raises(AssertionError, match=said):
        check_panel(ax)


def test_the_check_knows_a_dash_wherever_it_begins():
    ax = Figure().subplots()
    (one,) = ax.plot([0, 1], [0, 1], color="0", linestyle=(0, (6, 2)))
    (other,) = ax.plot([0, 1], [0, 1], color="0", linestyle=(3, (6, 2)))
    assert alike(dashes_of(one), dashes_of(other)) > 0.95
