"""Can a figure be read without colour? Lines and marks are drawn in grey and compared."""

import itertools

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from research.figures import named_lines

WEIGHTS = (0.2126, 0.7152, 0.0722)  # of red, green and blue in the lightness of a colour


def grey_of(figure):
    """The drawn figure as light, 0 (black) to 1 (white): [height, width]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    colours = np.asarray(canvas.buffer_rgba())[..., :3] / 255
    light = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    return light @ WEIGHTS


def alone(line, marker):
    """A line (without marks), or one of its marks, drawn alone in the middle of a figure."""
    figure = Figure(figsize=(3, 0.4) if not marker else (0.4, 0.4), dpi=130)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.axis("off")
    (copy,) = ax.plot([0.5] if marker else [-0.1, 1.1], [0.5] if marker else [0.5, 0.5])
    copy.update_from(line)
    copy.set(transform=ax.transData, clip_on=False)
    copy.set_zorder(1)
    copy.set(linestyle="") if marker else copy.set(marker="")
    return grey_of(figure)


def dashes_of(line):
    """Where a drawn line has ink: a row of truth values."""
    grey = alone(line, marker=False)
    row = grey[grey.mean(1).argmin()]
    return row < (row.min() + 1) / 2


def alike(one, other):
    """The largest share of 70 pixels on which two lines agree, wherever their dashes begin."""
    length = 70  # twice the longest period of dashes
    starts = range(len(other) - length)
    return max((one[:length] == other[i : i + length]).mean() for i in starts)


def contrast(light):
    """Of the darkest ink with white paper, 1 to 21."""
    return 1.05 / (light.min() + 0.05)


def is_drawn(line):
    return line.get_linestyle() not in ("None", "", " ")


def names_in(panel):
    """The texts of a panel."""
    return {text.get_text() for text in panel.texts}


def check_panel(panel, most=5):
    """The lines with a name, of which there are few, all dark enough, none like another."""
    lines = named_lines(panel)
    assert len(lines) <= most, f"{len(lines)} lines in {panel.get_title()}"
    drawn = [line for line in lines if is_drawn(line)]
    marks = [line for line in lines if not is_drawn(line)]
    for line in lines:
        ink = contrast(alone(line, marker=not is_drawn(line)))
        assert ink >= 3, f"{panel.get_title()}: {line.get_label()} is too pale: {ink:.1f}"
    for one, other in itertools.combinations(drawn, 2):
        share = alike(dashes_of(one), dashes_of(other))
        names = f"{one.get_label()} and {other.get_label()}"
        assert share < 0.85, f"{panel.get_title()}: {names} have the same dashes: {share:.2f}"
    for one, other in itertools.combinations(marks, 2):
        gap = np.abs(alone(one, marker=True) - alone(other, marker=True))
        names = f"{one.get_label()} and {other.get_label()}"
        assert (gap > 0.25).sum() > 20, f"{panel.get_title()}: {names} have the same marks"
    return lines


def check_figure(figure, named=True):
    """Every panel; named: each line's name is written in its panel. The number of lines."""
    count = 0
    for panel in figure.axes:
        lines = check_panel(panel)
        if named:
            missing = {line.get_label() for line in lines} - names_in(panel)
            assert not missing, f"{panel.get_title()}: no name at {missing}"
        count += len(lines)
    return count
