"""The share of every layer that each method keeps."""

import math

import numpy as np
import polars as pl
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from jaxprune.report import style, tables, text

_MISSING = '#e9e9e9'
_SIZE = 7.0  # of text inside cells, in points
_MOST_LAYERS = 80


def short_paths(paths: list[str]) -> list[str]:
    """Paths without the last name where all share it: `dense_0/kernel` -> `dense_0`."""
    tails = {path.rpartition('/')[2] for path in paths}
    if len(tails) == 1 and all('/' in path for path in paths):
        return [path.rpartition('/')[0] for path in paths]
    return paths


def _percent(density: float) -> str:
    """A density in percent with two digits that mean something: `100`, `45`, `8.2`, `0.031`."""
    share = 100 * density
    digits = max(0, 1 - math.floor(math.log10(share)))
    value = f'{share:.{digits}f}'
    return value.rstrip('0').rstrip('.') if '.' in value else value


def _cell(density: float) -> str:
    """The number in a cell; a very long one would leave no room for numbers in its panel."""
    return _percent(density) if 100 * density >= 0.001 else '<.001'


def _tables(rows: pl.DataFrame, paths: list[str], compressions: list[float]):
    """Mean density and share of seeds with an empty layer, `(layers, compressions)`."""
    density = np.full((len(paths), len(compressions)), np.nan)
    empty = np.zeros_like(density)
    for row in rows.iter_rows(named=True):
        place = paths.index(row['path']), compressions.index(row['target_compression'])
        density[place] = row['density']
        empty[place] = row['empty'] / row['seeds']
    return density, empty


def _cells(axes: Axes, density, empty, norm, colours, *, annotate: bool) -> None:
    """Coloured cells, those without a weight in their own colour, a cross where a seed has none."""
    axes.set_facecolor(_MISSING)
    shown = np.ma.masked_where(~(density > 0), density)
    axes.imshow(shown, norm=norm, cmap=colours, aspect='auto', interpolation='nearest')
    void = np.ma.masked_where(density != 0, np.ones_like(density))
    axes.imshow(
        void,
        cmap=LinearSegmentedColormap.from_list('void', [style.EMPTY] * 2),
        aspect='auto',
        interpolation='nearest',
    )
    rows, columns = density.shape
    # White gaps between cells, drawn as lines: they stay put whatever the size.
    for x in range(1, columns):
        axes.axvline(x - 0.5, color='white', linewidth=0.6)
    for y in range(1, rows):
        axes.axhline(y - 0.5, color='white', linewidth=0.6)
    for y, x in zip(*np.nonzero(empty > 0), strict=True):
        colour = 'white' if density[y, x] == 0 else style.EMPTY
        axes.plot(x, y, marker='x', color=colour, markersize=4.5, markeredgewidth=1.2)
    if not annotate:
        return
    for y, x in zip(*np.nonzero((density > 0) & (empty == 0)), strict=True):
        red, green, blue, _ = colours(norm(density[y, x]))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
        axes.text(
            x,
            y,
            _cell(density[y, x]),
            ha='center',
            va='center_baseline',
            fontsize=_SIZE,
            color='white' if dark else style.INK,
        )


def layers(frame: pl.DataFrame) -> tuple[Figure, bool]:
    """One panel per label: rows are layers as stored, columns are compressions.

    Args:
      frame: the rows of `tables.densities` for one setting.

    Returns:
      The figure, and whether every layer is in it: of more than 80 an even choice is drawn.
    """
    frame = frame.filter(pl.col('method') != tables.DENSE)
    labels = frame['label'].unique(maintain_order=True).to_list()
    every = frame['path'].unique(maintain_order=True).to_list()
    paths = tables.evenly(every, _MOST_LAYERS)
    frame = frame.filter(pl.col('path').is_in(paths))
    sizes = dict(frame.select('path', 'size').iter_rows())
    compressions = frame['target_compression'].unique().sort().to_list()
    grids = [
        _tables(frame.filter(pl.col('label') == label), paths, compressions) for label in labels
    ]

    cell = 0.31 if len(compressions) <= 12 else 0.15  # inches
    columns = max(1, min(3, len(labels), int(8.4 / (len(compressions) * cell + 0.1))))
    rows = math.ceil(len(labels) / columns)
    high = 0.30 if len(paths) <= 12 else 0.17
    positive = [value for density, _ in grids for value in density[density > 0]]
    low = min(positive, default=0.1)
    # Whole decades, so that the ends of the colour bar are numbers worth reading.
    norm = LogNorm(min(0.1, 10 ** math.floor(math.log10(low) + 1e-9)), 1.0)
    colours = LinearSegmentedColormap.from_list(
        'ink', colormaps['Blues'](np.linspace(0.06, 1.0, 256))
    )
    with style.context():
        # A few wide cells would suggest many weights: a small table gets a small figure.
        width = min(style.WIDTH, 3.4 + columns * max(1.6, 0.8 * len(compressions)))
        drawing = style.figure(max(width, 6.0), rows * (high * len(paths) + 0.62) + 0.75)
        grid = drawing.add_gridspec(rows, columns)
        panels = []
        for i, label in enumerate(labels):
            axes = drawing.add_subplot(grid[divmod(i, columns)])
            axes.grid(False)
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
            axes.set_title(style.wrapped(label, 38 if columns < 3 else 30), loc='left')
            axes.set_xlim(-0.5, len(compressions) - 0.5)
            axes.set_ylim(len(paths) - 0.5, -0.5)
            names = [
                f'{name} ({sizes[path]:,})'.replace(',', '\N{THIN SPACE}')
                for name, path in zip(short_paths(paths), paths, strict=True)
            ]
            first = i % columns == 0
            axes.set_yticks(range(len(paths)), names if first else [''] * len(paths))
            axes.tick_params(axis='y', labelsize=8 if high > 0.2 else 7)
            axes.xaxis.set_major_locator(NullLocator())
            panels.append(axes)
        _key(drawing, panels, norm, colours, grids)
        # At the left: the middle of a narrow figure is where the legend begins.
        drawing.supxlabel('compression', fontsize=10, x=0.01, ha='left')
        drawing.draw_without_rendering()
        for axes, (density, empty) in zip(panels, grids, strict=True):
            _finish(axes, density, empty, compressions, norm, colours)
    return drawing, len(paths) == len(every)


def _finish(axes, density, empty, compressions, norm, colours) -> None:
    """Cells and column numbers, as many as the finished layout has room for."""
    box = axes.get_window_extent()
    wide, tall = (72 * side / axes.figure.dpi for side in (box.width, box.height))
    wide, tall = wide / len(compressions), tall / len(density)
    texts = [_cell(value) for value in density[(density > 0) & (empty == 0)]]
    widest = max((style.text_width(value, _SIZE) for value in texts), default=0)
    annotate = widest + 3 <= wide and tall >= 1.5 * _SIZE
    _cells(axes, density, empty, norm, colours, annotate=annotate)
    numbers = [text.number(value) for value in compressions]
    size = 8
    widths = [style.text_width(value, size) for value in numbers]
    places = [(i + 0.5) * wide for i in range(len(numbers))]
    shown = style.fitting(compressions, places, widths)
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_major_formatter(FixedFormatter([numbers[i] for i in shown]))
    axes.tick_params(axis='x', labelsize=size)


def _key(drawing: Figure, panels: list[Axes], norm, colours, grids) -> None:
    """Colour bar of densities, and what the special cells mean, as far as they occur."""
    length = min(2.6, 0.75 * drawing.get_figheight())  # inches
    bar = drawing.colorbar(
        ScalarMappable(norm, colours),
        ax=panels,
        location='right',
        shrink=min(1.0, length / drawing.get_figheight()),
        aspect=length / 0.13,
        anchor=(0.0, 1.0),
        pad=0.015,
    )
    decades = range(round(math.log10(norm.vmin)), 1)
    ticks = [10.0**d for d in decades]
    bar.set_ticks(ticks, labels=[_percent(tick) for tick in ticks])
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.outline.set_visible(False)
    bar.set_label('weights kept (%)')
    handles, names = [], []
    if any((density == 0).any() for density, _ in grids):
        handles.append(Patch(facecolor=style.EMPTY))
        names.append('empty in every seed')
    if any(((empty > 0) & (density > 0)).any() for density, empty in grids):
        handles.append(
            Line2D([], [], linestyle='none', marker='x', color=style.EMPTY, markeredgewidth=1.2)
        )
        names.append('empty in some seeds')
    if any(np.isnan(density).any() for density, _ in grids):
        handles.append(Patch(facecolor=_MISSING))
        names.append('no finished run')
    if handles:
        drawing.legend(handles, names, loc='outside lower right', ncols=len(handles))
