"""The style of figures: colours, ticks that never collide, PNG bytes.

Figures are built with matplotlib's object interface and drawn by Agg: no pyplot, no window, and no
setting of the surrounding program is changed or used.
"""

import io
import math
import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FixedFormatter, FixedLocator, NullFormatter

from jaxprune.report.text import number

INK = '#222222'
QUIET = '#6b6b6b'
EMPTY = '#D55E00'
"""Vermilion: a layer with no weight left, in every figure that shows one."""

DPI = 160
WIDTH = 10.0
"""Inches; the page shows a figure about 1000 pixels wide, so a point is about 1.4 pixels."""

# Okabe and Ito (2008), without black, which is the dense control's, and yellow, which white
# paper swallows; then four dark ones of Paul Tol's. No two of the ten get closer under a colour
# deficiency than the closest of the six do.
_COLOURS = (
    *('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9'),
    *('#882255', '#666633', '#332288', '#661100'),
)
_LINES = ('-', (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)))
_MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X', '<', '>', 'p', 'd', 'h')

SOME = {'fillstyle': 'left', 'markerfacecoloralt': 'white'}
"""A half-filled marker: true of some of the seeds only."""

SETTINGS = {
    'font.family': 'DejaVu Sans',  # shipped with matplotlib, so a figure is the same everywhere
    'font.size': 9.5,
    'axes.titlesize': 10,
    'axes.labelsize': 10,
    'xtick.labelsize': 9,
    'ytick.labelsize': 9,
    'legend.fontsize': 9.5,
    'text.color': INK,
    'axes.labelcolor': INK,
    'axes.edgecolor': '#8a8a8a',
    'axes.linewidth': 0.8,
    'xtick.color': '#8a8a8a',
    'ytick.color': '#8a8a8a',
    'xtick.labelcolor': INK,
    'ytick.labelcolor': INK,
    'axes.grid': True,
    'axes.grid.axis': 'y',
    'grid.color': '#e4e4e4',
    'grid.linewidth': 0.8,
    'axes.axisbelow': True,
    'axes.spines.right': False,
    'axes.spines.top': False,
    'legend.frameon': False,
    'lines.linewidth': 1.6,
    'lines.markersize': 5.5,
    'figure.dpi': DPI,
}


def context() -> AbstractContextManager[None]:
    """A context with the settings of these figures; it restores earlier settings at its end."""
    return matplotlib.style.context(['default', SETTINGS])


def figure(width: float, height: float) -> Figure:
    """An empty figure of the given inches whose parts are laid out without overlap."""
    new = Figure(figsize=(width, height), layout='constrained')
    new.get_layout_engine().set(h_pad=0.07)
    FigureCanvasAgg(new)
    return new


def png(drawing: Figure) -> bytes:
    """The figure as PNG; equal figures give equal bytes."""
    buffer = io.BytesIO()
    with context():
        drawing.savefig(buffer, format='png', dpi=DPI, metadata={'Software': None})
    return buffer.getvalue()


def lines(labels: Sequence[str]) -> dict[str, dict]:
    """Line colour, dash and marker of each label: ten colours, then other dashes of the same."""
    return {
        label: {
            'color': _COLOURS[i % len(_COLOURS)],
            'linestyle': _LINES[i // len(_COLOURS) % len(_LINES)],
            'marker': _MARKERS[i % len(_MARKERS)],
        }
        for i, label in enumerate(labels)
    }


def wrapped(label: str, width: int = 24) -> str:
    """A label for a legend, on several lines if it is long."""
    return '\n'.join(textwrap.wrap(label, width)) or label


def text_width(text: str, size: float) -> float:
    """Width in points."""
    font = FontProperties(family=SETTINGS['font.family'], size=size)
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]


def _roundness(value: float) -> int:
    """0 for powers of ten, 1 for twos and fives, 2 for other whole numbers, 3 for the rest."""
    digits = number(value)
    if digits.rstrip('0') in ('1', '2', '5'):
        return 0 if digits[0] == '1' else 1
    return 3 if '.' in digits else 2


def fitting(values: Sequence[float], places: Sequence[float], widths: Sequence[float]) -> list[int]:
    """Which labels to show so that none touches another.

    Both ends have priority, then rounder values.

    Args:
      values: what is labelled.
      places: centre of each label, in points.
      widths: width of each label, in points.

    Returns:
      Indices of the labels shown, rising.
    """
    last = len(values) - 1
    order = sorted(range(len(values)), key=lambda i: (i not in (0, last), _roundness(values[i]), i))
    shown = []
    for i in order:
        # A quarter of an em of air would do; ticks are easier to read with half a word between.
        if all(abs(places[i] - places[j]) >= (widths[i] + widths[j]) / 2 + 5 for j in shown):
            shown.append(i)
    return sorted(shown)


def regular(values: Sequence[float], places: Sequence[float], widths: Sequence[float]) -> list[int]:
    """As `fitting`, for `round_values`: all of them, or else the powers of ten if these fit."""
    for roundest in (3, 0):
        chosen = [i for i, value in enumerate(values) if _roundness(value) <= roundest]
        some = [[column[i] for i in chosen] for column in (values, places, widths)]
        if len(chosen) > 1 and len(fitting(*some)) == len(chosen):
            return chosen
    return fitting(values, places, widths)


def round_values(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, 20, ... from `low` to `high`; both themselves if these are fewer than two."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    series = [digit * 10.0**power for power in range(first, last + 1) for digit in (1, 2, 5)]
    inside = [value for value in series if low * 0.999 <= value <= high * 1.001]
    return inside if len(inside) > 1 else sorted({low, high})


def compression_axis(
    panels: Sequence[Axes],
    values: Sequence[float],
    *,
    limits: tuple[float, float] | None = None,
    vertical: bool = False,
    top=None,
) -> None:
    """A logarithmic axis with a tick at every value and plain numbers where they fit.

    Call it last: which numbers fit is measured on the finished layout.

    Args:
      panels: where the curves are; all of the same figure and size.
      values: compressions, rising.
      limits: smallest and largest compression drawn, where `values` are not those drawn.
      vertical: the y axis instead of the x axis.
      top: formats a compression for the second axis above, of sparsity; none if left out.
    """
    low, high = (math.log10(end) for end in limits or (values[0], values[-1]))
    margin = max(0.035 * (high - low), 0.04)
    name = 'y' if vertical else 'x'
    pairs = []
    for axes in panels:
        axes.set(**{f'{name}lim': (10 ** (low - margin), 10 ** (high + margin))})
        axes.set(**{f'{name}scale': 'log'})
        axis = axes.yaxis if vertical else axes.xaxis
        axis.set_minor_locator(FixedLocator(values))
        axis.set_minor_formatter(NullFormatter())
        axis.set_major_locator(FixedLocator(values[:1]))
        pairs.append((axis, number))
        if top:
            above = axes.secondary_xaxis('top')
            above.set_xlabel('sparsity (%)', color=QUIET, fontsize=9)
            above.spines['top'].set_visible(False)
            above.tick_params(labelcolor=QUIET, color='#b5b5b5')
            pairs.append((above.xaxis, top))
    panels[0].figure.get_layout_engine().execute(panels[0].figure)

    box = panels[0].get_window_extent()
    points = 72 * (box.height if vertical else box.width) / panels[0].figure.dpi
    span = high - low + 2 * margin
    places = [(math.log10(value) - low + margin) / span * points for value in values]
    size = SETTINGS['xtick.labelsize']
    for axis, words in pairs:
        texts = [words(value) for value in values]
        widths = [size if vertical else text_width(word, size) for word in texts]
        shown = (regular if limits else fitting)(values, places, widths)
        axis.set_major_locator(FixedLocator([values[i] for i in shown]))
        axis.set_major_formatter(FixedFormatter([texts[i] for i in shown]))
        axis.set_minor_locator(FixedLocator(values))
        axis.set_minor_formatter(NullFormatter())
