"""Accuracy against compression, and learning curves."""

import math

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from jaxprune.report import style, tables, text

_AXIS = {
    'direct': 'compression (weights before / weights after)',
    'effective': 'effective compression (weights before / active weights after)',
    'params': 'compression of parameters (before / after, in the compact network)',
    'flops': 'compression of FLOPs (before / after, in the compact network)',
    'units': 'compression of units (neurons and filters before / after)',
    'heads': 'compression of heads (before / after)',
    'head dimensions': 'compression of head dimensions (before / after)',
    'groups': 'compression of groups (units and heads before / after)',
    'blocks': 'compression of blocks (before / after)',
    'mixed': 'target compression (direct, effective, or of units and other groups)',
}

MOST_PANELS = 12
"""Compressions a figure of learning curves shows."""

CONTROL = {'color': style.INK, 'linestyle': (0, (6, 2)), 'linewidth': 1.1}
"""Line of the dense control."""

CROSS = {'linestyle': 'none', 'marker': 'x', 'color': style.INK, 'markersize': 8}
"""On a point whose runs diverged in part."""


def _panels(count: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels that share both axes; none is left empty."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    drawing = style.figure(style.WIDTH, rows * height + 0.35)
    grid = drawing.add_gridspec(rows, columns)
    panels = []
    for i in range(count):
        share = panels[0] if panels else None
        panels.append(drawing.add_subplot(grid[divmod(i, columns)], sharex=share, sharey=share))
    for i, axes in enumerate(panels):
        axes.tick_params(labelleft=i % columns == 0)
    return drawing, panels


def trace(rows: pl.DataFrame, column: str, start: tuple | None, first: float = 1.0) -> tuple:
    """Points of a line from the dense one on: `(x, mean, low, high)`, the last three in percent.

    Bounds are cut off at 0 and 100 %, which Student's intervals may pass.

    Args:
      rows: accuracies, none null; x is their `column`.
      start: `(mean, low, high)` of the dense control in percent, if there is one.
      first: x of the control.
    """
    x = rows[column].to_list()
    lines = [
        (100 * rows[name].fill_null(rows['accuracy']).clip(0, 1)).to_list()
        for name in ('accuracy', 'accuracy_low', 'accuracy_high')
    ]
    if start is not None and x and x[0] > first:
        x = [first, *x]
        lines = [[value, *line] for value, line in zip(start, lines, strict=True)]
    return x, *lines


def _line(axes: Axes, rows: pl.DataFrame, props: dict, start: tuple | None) -> None:
    """One method: its band, its line from the dense point on, and a marker per compression."""
    rows = rows.filter(pl.col('accuracy').is_not_null())
    if rows.is_empty():
        return
    x, y, low, high = trace(rows, 'target_compression', start)
    axes.fill_between(x, low, high, color=props['color'], alpha=0.16, linewidth=0)
    axes.plot(x, y, color=props['color'], linestyle=props['linestyle'])
    for row in rows.iter_rows(named=True):
        point = (row['target_compression'], 100 * row['accuracy'])
        axes.plot(
            *point,
            linestyle='none',
            marker=props['marker'],
            color=props['color'],
            markerfacecolor='white' if row['collapsed'] else props['color'],
            markeredgewidth=1.3,
            zorder=3,
        )
        if row['diverged']:
            axes.plot(*point, **CROSS, zorder=4)


def draw_control(axes: Axes, rows: pl.DataFrame, x: float | None = 1.0) -> tuple | None:
    """The control: a band, a line across and a point at `x`; returns `(mean, low, high)`."""
    rows = rows.filter(pl.col('accuracy').is_not_null())
    if rows.is_empty():
        return None
    row = rows.row(0, named=True)
    mean = 100 * row['accuracy']
    low, high = (
        mean if row[end] is None else 100 * min(max(row[end], 0), 1)
        for end in ('accuracy_low', 'accuracy_high')
    )
    axes.axhspan(low, high, color=style.INK, alpha=0.10, linewidth=0)
    # On top: where methods are as good as dense their lines would hide it.
    axes.axhline(mean, **CONTROL, zorder=2.5)
    if x is not None:
        axes.plot(x, mean, linestyle='none', marker='o', color=style.INK, zorder=5)
    return mean, low, high


def two_points_high(axes: Axes) -> None:
    """Widens an accuracy axis to two points, so that differences of a fraction do not fill it.

    Call it after drawing.
    """
    low, high = axes.get_ylim()
    if high - low < 2:
        axes.set_ylim((low + high) / 2 - 1, (low + high) / 2 + 1)


def legend(drawing: Figure, styles: dict, *, dense: bool, flags: tuple = (), markers=True) -> None:
    """The key at the right: dense, one line per label, then `flags`.

    Args:
      styles: label -> line properties.
      dense: whether the dense control is drawn.
      flags: pairs of line properties and a text.
      markers: whether the lines have markers.
    """
    handles, names = [], []
    if dense:
        handles.append(Line2D([], [], **CONTROL, marker='o' if markers else None))
        names.append('dense')
    for label, props in styles.items():
        handles.append(Line2D([], [], **(props if markers else props | {'marker': None})))
        names.append(style.wrapped(label))
    for props, name in flags:
        handles.append(Line2D([], [], **{'color': style.INK, **props}))
        names.append(style.wrapped(name))
    drawing.legend(handles, names, loc='outside right upper', handlelength=2.8, labelspacing=0.55)


def aim(summary: pl.DataFrame) -> str:
    """What the target compressions of a sweep are: a key of `_AXIS`."""
    aims = summary.filter(pl.col('method') != tables.DENSE)['target'].unique().to_list()
    return aims[0] if len(aims) == 1 else 'mixed' if aims else 'direct'


def accuracy(summary: pl.DataFrame, settings: list[dict]) -> Figure:
    """Test accuracy after training against compression, one panel per setting.

    Args:
      summary: a frame made by `tables.summary`.
      settings: those to draw.
    """
    labels = tables.labels(summary)
    styles = style.lines(labels)
    parts = [tables.at(summary, setting) for setting in settings]
    shown = pl.concat(parts)
    dense = not shown.filter(pl.col('method') == tables.DENSE).is_empty()
    flags = []
    if shown['collapsed'].sum():
        hollow = {'linestyle': 'none', 'marker': 'o', 'markerfacecolor': 'white'}
        flags.append((hollow, 'hollow: a seed lost a whole layer'))
    if shown['diverged'].sum():
        flags.append((CROSS, 'cross: a seed diverged'))
    with style.context():
        many = len(settings) > 1
        drawing, panels = _panels(len(settings), 2, 3.6 if many else 5.0)
        for axes, setting, part in zip(panels, settings, parts, strict=True):
            start = draw_control(axes, part.filter(pl.col('method') == tables.DENSE))
            for label in labels:
                rows = part.filter(pl.col('label') == label, pl.col('method') != tables.DENSE)
                _line(axes, rows, styles[label], start)
            if many:
                axes.set_title(style.wrapped(text.setting_name(setting), 44))
        two_points_high(panels[0])
        drawing.supxlabel(_AXIS[aim(summary)], fontsize=10)
        drawing.supylabel('test accuracy (%)', fontsize=10)
        # Far above the ticks of every panel, and once: it is the same axis read differently.
        legend(drawing, styles, dense=dense, flags=tuple(flags))
        values = shown['target_compression'].unique().sort().to_list()
        style.compression_axis(panels, values, top=text.sparsity)
    return drawing


def panel_compressions(learning: pl.DataFrame) -> tuple[list[float], int]:
    """The compressions that get a panel of learning curves, and how many there are in all."""
    rows = learning.filter(pl.col('method') != tables.DENSE)
    values = (learning if rows.is_empty() else rows)['target_compression'].unique().sort()
    return tables.evenly(values.to_list(), MOST_PANELS), len(values)


def learning(frame: pl.DataFrame, column: str, unit: str, styles: dict) -> Figure:
    """Small multiples over training time, one panel per compression.

    Args:
      frame: the rows of `tables.learning` for one setting.
      column: `'train_loss'` or `'test_accuracy'`.
      unit: what the column `time` counts.
      styles: `style.lines` of the labels of the sweep.
    """
    chosen, _ = panel_compressions(frame)
    scale = 100 if column == 'test_accuracy' else 1
    control = frame.filter(pl.col('method') == tables.DENSE).drop_nulls(column)
    present = set(frame['label'])
    with style.context():
        columns = 2 if len(chosen) == 4 else 3 if len(chosen) < 10 else 4
        drawing, panels = _panels(len(chosen), columns, 2.1 if len(chosen) > columns else 3.0)
        for axes, compression in zip(panels, chosen, strict=True):
            axes.set_title(text.times(compression))
            if not control.is_empty():
                axes.plot(control['time'], scale * control[column], **CONTROL, zorder=2.5)
            for label, props in styles.items():
                rows = frame.filter(
                    pl.col('label') == label,
                    pl.col('method') != tables.DENSE,
                    pl.col('target_compression') == compression,
                ).drop_nulls(column)
                axes.plot(
                    rows['time'],
                    scale * rows[column],
                    color=props['color'],
                    linestyle=props['linestyle'],
                    linewidth=1.4,
                )
        values = frame[column].drop_nulls()
        # Training losses fall by orders of magnitude; a loss of exactly zero has no logarithm.
        wide = len(values) > 0 and 0 < 10 * values.min() < values.max()
        if column == 'train_loss' and wide:
            panels[0].set_yscale('log')
            panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
        panels[0].xaxis.get_major_locator().set_params(integer=True, nbins=5)
        names = {'train_loss': 'training loss', 'test_accuracy': 'test accuracy (%)'}
        drawing.supylabel(names[column], fontsize=10)
        drawing.supxlabel(unit, fontsize=10)
        shown = {label: props for label, props in styles.items() if label in present}
        legend(drawing, shown, dense=not control.is_empty(), markers=False)
    return drawing
