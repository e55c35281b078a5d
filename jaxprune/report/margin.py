"""Strips beside an axis, for points that have no place on it: every label has a column there."""

import polars as pl
from matplotlib.axes import Axes

from jaxprune.report import style

_WASH = '#f4f4f4'
_SLOT = 0.13
"""Inches that a label takes across a strip."""


def slots(rows: pl.DataFrame) -> dict[str, int]:
    """Place across a strip of every label that has one of these rows."""
    return {label: place for place, label in enumerate(rows['label'].unique(maintain_order=True))}


def breadth(slots: dict[str, int], title: float = 0.78) -> float:
    """Inches of a strip: room for its title and for every label; 0 if there is none."""
    return max(title, 0.2 + _SLOT * len(slots)) if slots else 0.0


def clear(strip: Axes) -> None:
    """Makes axes a strip: grey, without a frame and without ticks."""
    strip.set_facecolor(_WASH)
    strip.spines[:].set_visible(False)
    strip.tick_params(which='both', length=0, labelleft=False, labelbottom=False, labelsize=8.5)


def name_below(strip: Axes, slots: dict[str, int], words: str) -> None:
    """Limits of an upright strip and its title below; call it last."""
    strip.set_xlim(-0.8, len(slots) - 0.2)
    strip.set_xticks([(len(slots) - 1) / 2], [words])
    strip.tick_params(labelbottom=True)


def point(axes: Axes, x: float, y: float, row: dict, props: dict) -> None:
    """A marker, half-filled if it stands for some of the seeds only."""
    part = style.SOME if row['runs'] < row['seeds'] else {}
    marker = {'marker': props['marker'], 'color': props['color'], 'zorder': 3}
    axes.plot(x, y, linestyle='none', **marker, **part)


def accuracy_interval(strip: Axes, x: float, row: dict, props: dict) -> None:
    """The 95 % interval of an accuracy as a line in a strip, cut off at 0 and 100 %."""
    if row['accuracy_low'] is not None:
        ends = max(100 * row['accuracy_low'], 0), min(100 * row['accuracy_high'], 100)
        strip.vlines(x, *ends, color=props['color'], alpha=0.4, linewidth=1.2)


def half_filled(frame: pl.DataFrame) -> list[tuple[dict, str]]:
    """What half-filled markers mean, where there are any: a flag for `curves.legend`."""
    if frame.filter(pl.col('runs') < pl.col('seeds')).is_empty():
        return []
    half = {'linestyle': 'none', 'marker': 'o', **style.SOME}
    return [(half, 'half-filled: only some of the seeds')]
