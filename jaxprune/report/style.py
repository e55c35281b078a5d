"""How figures look: colours, ticks that never collide, PNG bytes.

Figures are built with matplotlib's object interface and drawn by Agg: no pyplot, no window, and no
setting of the surrounding program is touched or obeyed.
"""

import io
import math
import textwrap
from collections.abc import Sequence

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
# paper swallows.
_COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
_LINES = ('-', (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)))
_MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X', '<', '>', 'p', 'h', 'd')

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


def context():
    """A `with` block of the house style; what was set before is set again after it."""
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
    """Line colour, dash and marker of each label: six colours, then other dashes of the same."""
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

    Both ends go first, then the rounder the value the sooner.

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


def compression_axis(axes: Axes, values: Sequence[float], *, top=None) -> None:
    """A logarithmic axis with a tick at every compression and plain numbers where they fit.

    Call it last: which numbers fit is measured on the finished layout.

    Args:
      axes: where the curves are.
      values: compressions, rising.
      top: formats a compression for the second axis above; none if left out.
    """
    low, high = math.log10(values[0]), math.log10(values[-1])
    margin = max(0.035 * (high - low), 0.04)
    axes.set_xscale('log')
    axes.set_xlim(10 ** (low - margin), 10 ** (high + margin))
    axes.xaxis.set_minor_locator(FixedLocator(values))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(FixedLocator(values[:1]))
    above = axes.secondary_xaxis('top') if top else None
    axes.figure.draw_without_rendering()

    inch = axes.get_window_extent().width / axes.figure.dpi
    span = high - low + 2 * margin
    places = [(math.log10(value) - low + margin) / span * inch * 72 for value in values]
    for axis, words in ((axes.xaxis, number), (above and above.xaxis, top)):
        if axis is None:
            continue
        texts = [words(value) for value in values]
        widths = [text_width(word, SETTINGS['xtick.labelsize']) for word in texts]
        shown = fitting(values, places, widths)
        axis.set_major_locator(FixedLocator([values[i] for i in shown]))
        axis.set_major_formatter(FixedFormatter([texts[i] for i in shown]))
        axis.set_minor_locator(FixedLocator(values))
        axis.set_minor_formatter(NullFormatter())
    if above is not None:
        above.spines['top'].set_visible(False)
        above.tick_params(labelcolor=QUIET, color='#b5b5b5')
