"""Where in the U-Net the convolutions are that a method keeps."""

from collections.abc import Mapping, Sequence

import jax
import polars as pl
from descent import ShrinkFn, convolutions
from training import Net

from jaxprune.types import Masks

#: Share that is kept in one round, right after training.
KEPT = 0.05


def where_kept(
    net: Net, dense: Masks, key: jax.Array, shrinks: Mapping[str, ShrinkFn], widths: Sequence[int]
) -> pl.DataFrame:
    """A row per method and scale: `kept` convolutions there, and `skips` of these, which read what
    the way down passed on. 'dense' has all of them.

    Args:
      net: the trained network.
      dense: its masks.
      key: of what methods draw.
      shrinks: the methods.
      widths: channels of the U-Net at each scale, the finest first.
    """
    wanted = round(KEPT * convolutions(dense))
    found = {name: shrink(key, net, dense, wanted) for name, shrink in shrinks.items()}
    rows = [
        (method, scale, *counts)
        for method, masks in {'dense': dense, **found}.items()
        for scale, counts in enumerate(_counted(masks, widths))
    ]
    return pl.DataFrame(rows, schema=['method', 'scale', 'kept', 'skips'], orient='row')


def _counted(masks: Masks, widths: Sequence[int]) -> list[tuple[int, int]]:
    """Convolutions of each scale, and those of them that read a skip connection."""
    counts = [[0, 0] for _ in widths]
    for path, mask in masks.items():
        layer = path.removesuffix('_conv/kernel')
        scale = len(widths) - 1 if layer.startswith('bottom') else int(layer[-2])
        kept = mask.any((0, 1))
        counts[scale][0] += int(kept.sum())
        if layer.startswith('up') and layer.endswith('a'):  # joined: passed on, then from below
            counts[scale][1] += int(kept[: widths[scale]].sum())
    return [(kept, skips) for kept, skips in counts]
