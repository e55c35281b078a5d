"""Effective compression: accuracy against it, and itself against direct compression.

Disconnected networks, whose effective compression is infinite, have a strip of their own beyond
the end of the axis.
"""

import math

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxprune.report import curves, margin, style, tables, text

_DASHED = {'linestyle': (0, (3.5, 1.8)), 'linewidth': 1.0, 'markersize': 3}
_DIAGONAL = {'color': '#9a9a9a', 'linestyle': (0, (1, 1.5)), 'linewidth': 1.3}
_SOLID = {'color': style.INK, 'linestyle': '-'}


def _panels(count: int, height: float, *, right: float = 0, above: float = 0):
    """Panels that share both axes, each with a strip of so many inches at its side, if any.

    Returns:
      The figure, the panels, and their strips, an empty list if there are none.
    """
    columns = min(2, count)
    rows = math.ceil(count / columns)
    drawing = style.figure(style.WIDTH, rows * height + 0.35)
    # What labels and legend leave; only the proportions matter.
    wide, tall = (style.WIDTH - 2.9) / columns - right, height - 0.6 - above
    grid = drawing.add_gridspec(
        rows * (2 if above else 1),
        columns * (2 if right else 1),
        width_ratios=([wide, right] if right else [wide]) * columns,
        height_ratios=([above, tall] if above else [tall]) * rows,
    )
    panels, strips = [], []
    for i in range(count):
        row, column = divmod(i, columns)
        share = panels[0] if panels else None
        if right:
            axes = drawing.add_subplot(grid[row, 2 * column], sharex=share, sharey=share)
            strips.append(drawing.add_subplot(grid[row, 2 * column + 1], sharey=axes))
        elif above:
            axes = drawing.add_subplot(grid[2 * row + 1, column], sharex=share, sharey=share)
            strips.append(drawing.add_subplot(grid[2 * row, column], sharex=axes))
        else:
            axes = drawing.add_subplot(grid[row, column], sharex=share, sharey=share)
        axes.tick_params(labelleft=column == 0)
        panels.append(axes)
    for strip in strips:
        margin.clear(strip)
    return drawing, panels, strips


def _ends(values: list[float]) -> tuple[tuple[float, float], list[float]]:
    """Limits of an axis and the ticks within; a round value just beyond is worth the room."""
    low, high = min(values), max(values)
    wide = low / 1.05, high * 1.05
    ticks = style.round_values(*wide)
    if ticks == sorted(wide):  # no two round values there
        return (low, high), style.round_values(low, high)
    return (min(low, ticks[0]), max(high, ticks[-1])), ticks


def alike(frame: pl.DataFrame, settings: list[dict]) -> bool:
    """Are the compressions of `tables.connectivity` the same in all of these settings?"""
    columns = frame.columns[frame.columns.index('label') : frame.columns.index('accuracy')]
    parts = [tables.at(frame, setting).select(columns) for setting in settings]
    return all(part.equals(parts[0]) for part in parts)


def accuracy(
    frame: pl.DataFrame, summary: pl.DataFrame, settings: list[dict], styles: dict
) -> Figure:
    """Test accuracy against effective compression, and thinly against direct compression.

    Args:
      frame: a frame made by `tables.connectivity`.
      summary: a frame made by `tables.summary`, of the same runs.
      settings: those to draw, one panel each.
      styles: `style.lines` of the labels of the sweep; dashes mean something else here.
    """
    styles = {label: props | {'linestyle': '-'} for label, props in styles.items()}
    frame = pl.concat(tables.at(frame, setting) for setting in settings)
    summary = pl.concat(tables.at(summary, setting) for setting in settings)
    frame = frame.filter(pl.col('accuracy').is_not_null())
    direct = pl.col('compression')
    summary = summary.filter(pl.col('accuracy').is_not_null()).with_columns(
        compression=pl.when(direct.is_finite()).then(direct).otherwise('target_compression')
    )
    slots = margin.slots(frame.filter('disconnected'))
    many = len(settings) > 1
    with style.context():
        drawing, panels, strips = _panels(
            len(settings), 3.6 if many else 5.0, right=margin.breadth(slots)
        )
        for i, setting in enumerate(settings):
            axes, strip = panels[i], strips[i] if strips else None
            _accuracy_panel(
                axes, strip, tables.at(frame, setting), tables.at(summary, setting), styles, slots
            )
            if many:
                axes.set_title(style.wrapped(text.setting_name(setting), 40))
        curves.two_points_high(panels[0])
        flags = [
            (_SOLID, 'solid: against effective compression'),
            (_DASHED | {'marker': 'o'}, 'dashed: against direct compression'),
            *margin.half_filled(frame),
        ]
        if frame['diverged'].sum():
            flags.append((curves.CROSS, 'cross: a seed diverged'))
        dense = tables.DENSE in summary['method']
        curves.legend(drawing, styles, dense=dense, flags=tuple(flags))
        drawing.supxlabel('compression: effective (solid) or direct (dashed)', fontsize=10)
        drawing.supylabel('test accuracy (%)', fontsize=10)
        for strip in strips:
            margin.name_below(strip, slots, f'{text.INFINITE}\ndisconnected')
        finite = frame.filter(~pl.col('disconnected'))['effective_compression']
        limits, ticks = _ends([*finite, *summary['compression']])
        style.compression_axis(panels, ticks, limits=limits, top=text.sparsity)
    return drawing


def _accuracy_panel(
    axes: Axes,
    strip: Axes | None,
    frame: pl.DataFrame,
    summary: pl.DataFrame,
    styles: dict,
    slots: dict,
) -> None:
    is_dense = pl.col('method') == tables.DENSE
    connected = ~pl.col('disconnected')
    # Above 1 where small maps leave entries of a kernel idle even in the dense network.
    whole = frame.filter(is_dense, connected)['effective_compression'].to_list()
    first = whole[0] if whole else 1.0
    start = curves.draw_control(axes, summary.filter(is_dense), first)
    if strip is not None:
        curves.draw_control(strip, summary.filter(is_dense), None)
    for label, props in styles.items():
        mine = pl.col('label') == label, ~is_dense
        x, y, _, _ = curves.trace(summary.filter(*mine), 'compression', start)
        axes.plot(x, y, color=props['color'], marker=props['marker'], **_DASHED)
        rows = frame.filter(*mine, connected)
        x, y, low, high = curves.trace(rows, 'effective_compression', start, first)
        axes.fill_between(x, low, high, color=props['color'], alpha=0.14, linewidth=0)
        axes.plot(x, y, color=props['color'])
        for row in frame.filter(*mine).iter_rows(named=True):
            where = strip if row['disconnected'] else axes
            x = slots[label] if row['disconnected'] else row['effective_compression']
            y = 100 * row['accuracy']
            margin.point(where, x, y, row, props)
            if row['disconnected']:
                margin.accuracy_interval(where, x, row, props)
            if row['diverged']:
                where.plot(x, y, **curves.CROSS, zorder=4)


def compressions(frame: pl.DataFrame, settings: list[dict], styles: dict) -> Figure:
    """Effective against direct compression, both logarithmic.

    Args:
      frame: a frame made by `tables.connectivity`.
      settings: those to draw, one panel each.
      styles: `style.lines` of the labels of the sweep.
    """
    present = tables.labels(frame)
    styles = {label: props for label, props in styles.items() if label in present}
    frame = pl.concat(tables.at(frame, setting) for setting in settings)
    frame = frame.filter(pl.col('method') != tables.DENSE)
    finite = frame.filter(~pl.col('disconnected'))
    slots = margin.slots(frame.filter('disconnected'))
    many = len(settings) > 1
    across, wide = _ends([*frame['compression']])
    upwards, tall = _ends([*across, *finite['effective_low'], *finite['effective_high']])
    with style.context():
        drawing, panels, strips = _panels(
            len(settings), 3.6 if many else 5.0, above=margin.breadth(slots) - 0.25 if slots else 0
        )
        for i, setting in enumerate(settings):
            axes, strip = panels[i], strips[i] if strips else None
            axes.grid(True, axis='both')
            axes.axline((1, 1), (10, 10), **_DIAGONAL, zorder=1.5)
            part = tables.at(frame, setting)
            for label, props in styles.items():
                _line(axes, strip, part.filter(pl.col('label') == label), props, slots)
            if many:
                (strip or axes).set_title(style.wrapped(text.setting_name(setting), 40))
        for i, strip in enumerate(strips):
            strip.grid(True, axis='x')
            strip.grid(False, axis='y')
            strip.set_ylim(len(slots) - 0.2, -0.8)
            strip.set_yticks([(len(slots) - 1) / 2], [f'disconnected\n{text.INFINITE}'])
            strip.tick_params(labelleft=i % 2 == 0)
        flags = [(_DIAGONAL, 'effective = direct'), *margin.half_filled(frame)]
        curves.legend(drawing, styles, dense=False, flags=tuple(flags))
        drawing.supxlabel('direct compression (weights before / weights after)', fontsize=10)
        drawing.supylabel(
            'effective compression (weights before / active weights after)', fontsize=10
        )
        style.compression_axis(panels, tall, limits=upwards, vertical=True)
        style.compression_axis(panels, wide, limits=across)
    return drawing


def _line(axes: Axes, strip: Axes | None, rows: pl.DataFrame, props: dict, slots: dict) -> None:
    """One label: its line with the range over seeds, and its markers, in the strip at infinity."""
    finite = rows.filter(~pl.col('disconnected'))
    x = finite['compression'].to_list()
    low, high = (finite[f'effective_{end}'].to_list() for end in ('low', 'high'))
    axes.fill_between(x, low, high, color=props['color'], alpha=0.14, linewidth=0)
    axes.vlines(x, low, high, color=props['color'], alpha=0.4, linewidth=1.2)
    axes.plot(
        x, finite['effective_compression'], color=props['color'], linestyle=props['linestyle']
    )
    for row in rows.iter_rows(named=True):
        if row['disconnected']:
            margin.point(strip, row['compression'], slots[row['label']], row, props)
        else:
            margin.point(axes, row['compression'], row['effective_compression'], row, props)
