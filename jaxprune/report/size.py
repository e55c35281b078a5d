"""Accuracy against the size of compact networks, and against their theoretical speed-up.

A compact network is without the groups that a run's masks remove. Masks on single weights remove
next to none, so their points would all lie at 1 and hide each other: they have a strip of their own
at the left. Disconnected networks, of which nothing is left, have another one at the right.
"""

from typing import NamedTuple

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxprune.report import curves, margin, style, tables, text

LARGE = 1.01
"""Less than a percent smaller and faster than the dense network counts as not smaller."""

_RATIOS = {
    'params_ratio': 'compression by parameters\n(dense / compact)',
    'speedup': 'theoretical speed-up\n(FLOPs, dense / compact)',
}
_DENSE = pl.col('method') == tables.DENSE
_AS_LARGE = ~_DENSE & ~pl.col('disconnected') & (pl.max_horizontal(*_RATIOS) < LARGE)
_SMALLER = ~_DENSE & ~pl.col('disconnected') & ~_AS_LARGE


class _Row(NamedTuple):
    """The axes of one setting."""

    panels: dict[str, Axes]
    large: Axes | None
    cut: Axes | None


def as_large(frame: pl.DataFrame) -> pl.DataFrame:
    """Rows of `tables.sizes` whose networks are no smaller without the groups that are gone."""
    return frame.filter(_AS_LARGE)


def smaller(frame: pl.DataFrame) -> pl.DataFrame:
    """Rows of `tables.sizes` whose networks are, and of which an accuracy is known."""
    return frame.filter(_SMALLER, pl.col('accuracy').is_not_null())


def accuracy(frame: pl.DataFrame, settings: list[dict], styles: dict) -> Figure:
    """Test accuracy against what the compact network saves: two panels per setting.

    Args:
      frame: a frame made by `tables.sizes`; one row of `smaller` at least.
      settings: those to draw, one line of panels each.
      styles: `style.lines` of the labels of the sweep.
    """
    frame = pl.concat(tables.at(frame, setting) for setting in settings)
    frame = frame.filter(pl.col('accuracy').is_not_null())
    present = tables.labels(frame)
    styles = {label: props for label, props in styles.items() if label in present}
    large, cut = margin.slots(as_large(frame)), margin.slots(frame.filter('disconnected'))
    many = len(settings) > 1
    with style.context():
        drawing, rows = _axes(len(settings), 3.0 if many else 4.8, large, cut)
        for row, setting in zip(rows, settings, strict=True):
            _setting(row, tables.at(frame, setting), styles, large, cut)
            if many:
                name = style.wrapped(text.setting_name(setting), 40)
                row.panels['params_ratio'].set_title(name, loc='left')
        curves.two_points_high(rows[0].panels['params_ratio'])
        flags = margin.half_filled(frame)
        if frame['diverged'].sum():
            flags.append((curves.CROSS, 'cross: a seed diverged'))
        curves.legend(drawing, styles, dense=not frame.filter(_DENSE).is_empty(), flags=flags)
        drawing.supylabel('test accuracy (%)', fontsize=10)
        for row in rows:
            if row.large is not None:
                margin.name_below(row.large, large, f'{text.times(1)}\nas dense')
            if row.cut is not None:
                margin.name_below(row.cut, cut, f'{text.INFINITE}\ndisconnected')
        for ratio, name in _RATIOS.items():
            rows[-1].panels[ratio].set_xlabel(name)
        for ratio in _RATIOS:
            end, ticks = _ticks(frame[ratio].max())
            style.compression_axis([row.panels[ratio] for row in rows], ticks, limits=(1, end))
    return drawing


def _axes(count: int, height: float, large: dict, cut: dict) -> tuple[Figure, list[_Row]]:
    """Lines of panels that share their axes, with the strips that are needed at both sides."""
    left, right = margin.breadth(large, 0.6), margin.breadth(cut)
    drawing = style.figure(style.WIDTH, count * height + 0.55)
    # What labels and legend leave; only the proportions matter.
    wide = (style.WIDTH - 2.9 - left - right) / len(_RATIOS)
    widths = {'large': left, **dict.fromkeys(_RATIOS, wide), 'cut': right}
    widths = {name: width for name, width in widths.items() if width}
    grid = drawing.add_gridspec(count, len(widths), width_ratios=list(widths.values()))
    rows = []
    for i in range(count):
        made = {}
        for column, name in enumerate(widths):
            above = rows[0].panels.get(name) if rows else None
            beside = rows[0].panels['speedup'] if rows else next(iter(made.values()), None)
            made[name] = axes = drawing.add_subplot(grid[i, column], sharex=above, sharey=beside)
            if name not in _RATIOS:
                margin.clear(axes)
            axes.tick_params(
                'y', labelleft=column == 0, labelsize=style.SETTINGS['ytick.labelsize']
            )
        panels = {name: made[name] for name in _RATIOS}
        rows.append(_Row(panels, made.get('large'), made.get('cut')))
    return drawing, rows


def _setting(row: _Row, frame: pl.DataFrame, styles: dict, large: dict, cut: dict) -> None:
    """Draws one setting into its axes."""
    control = frame.filter(_DENSE)
    for ratio, axes in row.panels.items():
        start = curves.draw_control(axes, control)
        for label, props in styles.items():
            rows = frame.filter(pl.col('label') == label)
            # A line from the dense point on would pass over what lies in the strip.
            first = start if as_large(rows).is_empty() else None
            _line(axes, rows.filter(_SMALLER), ratio, props, first)
    strips = ((row.large, large, as_large(frame)), (row.cut, cut, frame.filter('disconnected')))
    for strip, slots, rows in strips:
        if strip is None:
            continue
        curves.draw_control(strip, control, None)
        for each in rows.iter_rows(named=True):
            place, props = slots[each['label']], styles[each['label']]
            margin.accuracy_interval(strip, place, each, props)
            _mark(strip, place, each, props)


def _line(axes: Axes, rows: pl.DataFrame, ratio: str, props: dict, start: tuple | None) -> None:
    """One label: its band, its line from the dense point on, and its markers."""
    if rows.is_empty():
        return
    x, y, low, high = curves.trace(rows, ratio, start)
    axes.fill_between(x, low, high, color=props['color'], alpha=0.16, linewidth=0)
    axes.plot(x, y, color=props['color'], linestyle=props['linestyle'])
    for row in rows.iter_rows(named=True):
        _mark(axes, row[ratio], row, props)


def _mark(axes: Axes, x: float, row: dict, props: dict) -> None:
    """The marker of a row, with a cross if it is of runs that diverged in part."""
    margin.point(axes, x, 100 * row['accuracy'], row, props)
    if row['diverged']:
        axes.plot(x, 100 * row['accuracy'], **curves.CROSS, zorder=4)


def _ticks(high: float) -> tuple[float, list[float]]:
    """The end of an axis that starts at 1, and its ticks; a speed-up is often a small number."""
    if high < 1.5:
        values = [1 + i / 10 for i in range(6)]
    elif high < 3:
        values = [1, 1.2, 1.5, 2, 2.5, 3]
    elif high < 10:
        values = [1, 1.5, 2, 3, 4, 6, 8, 10]
    else:
        values = style.round_values(1, 2 * high)
    # A round value just beyond is worth the room.
    ticks = [value for value in values if value <= max(1.05 * high, values[1])]
    return max(high, ticks[-1]), ticks
