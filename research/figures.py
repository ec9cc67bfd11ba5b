"""What the figures of results/ share: panels, a style for each method, names at the lines.

Figures are readable in grey: a method has dashes of its own, no line is pale, and its name
stands at its end. At most five lines share a panel. tests/test_figures.py compares the dashes
and the greys as they are drawn.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# dashes: lengths of ink and of gaps, in units of the line's width
STYLES: dict[str, dict[str, Any]] = {
    "base": {"color": "#666666", "linestyle": (0, (1, 3)), "marker": "x"},
    "dr_grpo": {"color": "#000000", "linestyle": (0, (4, 2)), "marker": "s"},
    "siren": {"color": "#0059b3", "linestyle": "-", "marker": "o", "linewidth": 2.0},
    "naive_bonus": {"color": "#b03a7f", "linestyle": (0, (6, 2, 1, 2)), "marker": "v"},
    "naive_exploding": {"color": "#b35900", "linestyle": (0, (1, 1)), "marker": "^"},
    "anchor_only": {"color": "#007a5a", "linestyle": (0, (9, 3)), "marker": "P"},
    "wo_top_p": {"color": "#7a5c00", "linestyle": (0, (2, 2)), "marker": "D"},
    "wo_peak": {"color": "#8a3a00", "linestyle": (0, (6, 1.5, 1, 1.5, 1, 1.5)), "marker": "*"},
}


def panels(columns: int, rows: int = 1, height: float = 2.9) -> tuple[Figure, np.ndarray]:
    """A figure for a page 7 inches wide, and its panels."""
    figure = Figure(figsize=(3.6 * columns, height * rows), dpi=130, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def ticks(axis: Any, values: Iterable[float]) -> None:
    """A logarithmic axis with these numbers written at it."""
    values = list(values)
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_ticks(values, [f"{value:g}" for value in values])
    axis.set_ticks([], minor=True)


def pull_apart(places: Iterable[float], gap: float) -> np.ndarray:
    """The numbers that are nearest to `places` (by the sum of squares), keep their order and
    are at least `gap` apart.

    >>> pull_apart([0.0, 1.0, 1.0], 0.5).tolist()
    [0.0, 0.75, 1.25]
    """
    places = np.array(list(places), dtype=float)
    order = places.argsort(kind="stable")
    steps = gap * np.arange(len(places))
    blocks: list[list[float]] = []  # neighbours that touch: their number and their mean
    for value in places[order] - steps:
        blocks.append([1, value])
        while len(blocks) > 1 and blocks[-2][1] > blocks[-1][1]:
            count, mean = blocks.pop()
            total = blocks[-1][0] + count
            blocks[-1][1] += (mean - blocks[-1][1]) * count / total
            blocks[-1][0] = total
    found = np.empty(len(places))
    found[order] = np.repeat([b[1] for b in blocks], [int(b[0]) for b in blocks]) + steps
    return found


def named_lines(ax: Axes) -> list:
    """The lines of a panel that have a name."""
    return [line for line in ax.get_lines() if not str(line.get_label()).startswith("_")]


def name_lines(figure: Figure, size: float = 7.5) -> None:
    """Write each line's name at its right end, in its colour; names that would cover each
    other are pulled apart. For a figure that is otherwise done."""
    figure.draw_without_rendering()  # now the panels have their sizes
    for ax in figure.axes:
        lines = named_lines(ax)
        if not lines:
            continue
        ends = [(line.get_xdata()[-1], line.get_ydata()[-1]) for line in lines]
        height = ax.get_window_extent().height  # pixels
        gap = 1.25 * size * figure.dpi / 72 / height
        shares = ax.transAxes.inverted().transform(ax.transData.transform(ends))[:, 1]
        heights = pull_apart(shares, gap)
        heights += max(0.0, gap / 3 - heights.min()) - max(0.0, heights.max() - 1)
        for line, end, height in zip(lines, ends, heights, strict=True):
            color = line.get_color()
            leader = {"arrowstyle": "-", "color": color, "linewidth": 0.6}
            leader |= {"shrinkA": 1, "shrinkB": 1, "relpos": (0, 0.5)}
            ax.annotate(
                line.get_label(),
                xy=end,
                xytext=(1.06, height),
                textcoords="axes fraction",
                arrowprops=leader,
                color=color,
                fontsize=size,
                va="center",
                annotation_clip=False,
            )
