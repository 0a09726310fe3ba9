"""Line charts as SVG elements for a web page: colours are CSS variables and text is text, so that the page's theme,
dark or light, and its fonts apply. Matplotlib draws; nothing is read from outside the machine.
"""

import io
import math
import re
from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 600  # of a line: more than the pixels it gets

# Matplotlib knows no CSS variables. It draws in these, some of them set in charts.mplstyle, which then are replaced.
_STAND_INS = {
    "series-1": "#010a01", "series-2": "#010a02", "series-3": "#010a03", "series-4": "#010a04",
    "ink": "#010a05", "muted": "#010a06", "grid": "#010a07",
}  # fmt: skip
_LOOKS = {
    "line": {"linewidth": 1.8, "solid_joinstyle": "round"},
    "raw": {"linewidth": 0.7, "alpha": 0.3},
    "points": {"linewidth": 1, "linestyle": (0, (2, 2)), "marker": "o", "markersize": 3.6},
}
SERIES = tuple(name for name in _STAND_INS if name.startswith("series"))


class Line(NamedTuple):
    """One line, or set of points, of a chart.

    Attributes:
      x, y: of the same length; a y that is not finite leaves a gap.
      colour: name of a CSS variable, one of `SERIES` or "ink".
      look: "raw" is thin and faint, "points" are connected dots.
    """

    x: Sequence[float]
    y: Sequence[float]
    colour: str
    look: Literal["line", "raw", "points"] = "line"


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    """Return centred means over `window` (odd) values, fewer at both ends; values that are not finite do not count.

    Example, window = 3: 1 2 6 nan 4 -> 1.5 3 4 5 4
    """
    values = np.asarray(values, np.float64)
    known = np.isfinite(values)
    add = lambda x: np.convolve(np.pad(x, window // 2), np.ones(window), mode="valid")
    total, count = add(np.where(known, values, 0.0)), add(known * 1.0)
    return np.where(count > 0.5, total / np.maximum(count, 1.0), np.nan)


def line_chart(lines: Sequence[Line], label: str, *, log: bool = False, marks: Sequence[float] = ()) -> str:
    """Draw `lines` over the steps of training and return an <svg> element.

    Args:
      label: what is drawn, for those who cannot see it; without characters that mean something in HTML.
      log: logarithmic y axis.
      marks: x of vertical lines, such as the end of a stage.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # The salt makes the ids of clip paths repeatable (the same run gives the same page) and different between charts.
    style = resources.files(__package__).joinpath("charts.mplstyle")
    with matplotlib.rc_context({"svg.hashsalt": repr(lines)}, style):
        figure = Figure()
        axes = figure.add_subplot(xlabel="step")
        for each in (figure, axes):
            each.patch.set_visible(False)
        _set_ticks(axes)
        for x in marks:
            axes.axvline(x, color=_STAND_INS["grid"], linewidth=1, linestyle=(0, (4, 3)))
        for line in lines:
            every = math.ceil(len(line.x) / MAX_POINTS) or 1
            x, y = np.asarray(line.x, np.float64)[::every], np.asarray(line.y, np.float64)[::every]
            axes.plot(x, y, color=_STAND_INS[line.colour], **_LOOKS[line.look])
        if log:
            _scale_log(axes)
        else:
            axes.set_ylim(bottom=0)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _inline(buffer.getvalue(), f"{label}, by step")


def _set_ticks(axes: "Axes") -> None:
    """Put few ticks at round numbers; from a thousand on they are written as 1k."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10), integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
    thousands = EngFormatter(sep="")  # 40k
    axes.yaxis.set_major_formatter(lambda value, _: thousands(value) if value >= 1000 else f"{value:g}")


def _scale_log(axes: "Axes") -> None:
    """Make the y axis logarithmic, with between three and eight ticks at round numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.autoscale(axis="y")
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    subs = (1, 1.5, 2, 3, 4, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2.5 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _inline(svg: str, label: str) -> str:
    """Cut Matplotlib's file down to its <svg> element, in the page's colours and fonts."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style).*?</\1>\s*", "", svg, flags=re.DOTALL)  # the style would apply to the whole page
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # ids that nothing refers to, and that would repeat from chart to chart
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)
    for name, colour in _STAND_INS.items():
        svg = svg.replace(colour, f"var(--{name})")
    box = re.search(r'viewBox="[^"]*"', svg)[0]
    head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {box} role="img" aria-label="{label}">'
    return re.sub(r"<svg[^>]*>", head, svg, count=1).strip()
