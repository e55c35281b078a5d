"""Pruning whole units, neurons and filters, with all weights that read them.

A masked filter is removed as if it were cut out: its own weights, those of the kernels that read
it, and the depthwise filter that only it feeds (`structure.connectivity` finds both). What a
residual adds to a map keeps the map alive, so there only the filter's own weights go.
"""

import re
from collections.abc import Collection, Mapping

import jax.numpy as jnp

from jaxprune.allocation import Shape
from jaxprune.errors import PruneError
from jaxprune.pattern import unit_top_k
from jaxprune.score.group_sums import grouped, spread
from jaxprune.structure import Connect
from jaxprune.types import Counts, Masks, ScoreFn, Scores, SelectFn

#: Allocations of units: one ranking, or a share of each layer.
UNIT_ALLOCATIONS = ('global', 'uniform', 'uniform_down')
#: What a method removes at a time.
GRANULARITIES = ('weight', 'unit')


def unit_shapes(shapes: Mapping[str, Shape], keep_all_units: str = '') -> dict[str, Shape]:
    """The layers whose units compete: path -> `(units,)`, in the order given.

    All but the last layer, whose units are the classes; depthwise convolutions, whose maps follow
    those that they read; and what `keep_all_units` names.

    Args:
      shapes: path -> shape of every prunable leaf in forward order, outputs on the last axis.
      keep_all_units: a regular expression; layers whose path it matches anywhere keep all units.

    Raises:
      PruneError: no layer is left, or the expression is none or matches nothing.
    """
    try:
        pattern = re.compile(keep_all_units) if keep_all_units else None
    except re.error as error:
        raise PruneError(
            f"keep_all_units: '{keep_all_units}' is no regular expression: {error}"
        ) from None
    if pattern and not any(map(pattern.search, shapes)):
        raise PruneError(
            f"keep_all_units: '{keep_all_units}' matches no layer; there are: {', '.join(shapes)}"
        )
    first, last = next(iter(shapes)), list(shapes)[-1]
    found = {
        path: (shape[-1],)
        for path, shape in shapes.items()
        if path != last
        # One input per output, and not because the images have one channel.
        and not (len(shape) == 4 and shape[2] == 1 and path != first)
        and not (pattern and pattern.search(path))
    }
    if not found:
        raise PruneError('there is no layer whose units could be pruned')
    return found


def unit_floor(units: Mapping[str, Shape], floor: int, share: float) -> dict[str, int]:
    """The fewest units that each layer keeps: a number, or more than a share of its units.

    Args:
      units: path -> `(units,)`.
      floor: for all layers.
      share: in [0, 1); a layer of n units keeps `int(share n) + 1` at least, if it is above 0. The
        gradient-flow study has 0.05.
    """
    return {
        path: min(max(floor, int(share * n) + 1 if share else 0), n) for path, (n,) in units.items()
    }


def unit_select(
    connect: Connect, ranked: Collection[str], fewest: Counts | None = None
) -> SelectFn:
    """`(scores, counts) -> masks`: whole units, then what reads them; counts are units.

    Args:
      connect: masks -> effective masks of the network.
      ranked: paths of the layers whose units compete.
      fewest: path -> units that a layer keeps at least.
    """

    def select(scores: Scores, counts: Counts) -> Masks:
        return connect(unit_top_k(scores, counts, ranked=ranked, fewest=fewest))

    return select


def alike(score: ScoreFn) -> ScoreFn:
    """Gives all weights of a unit the sum of their scores, over the weights in force."""

    def summed(key, view, batches):
        scores = score(key, view, batches)
        alive = {path: jnp.where(view.masks[path], leaf, 0) for path, leaf in scores.items()}
        return spread(grouped(alive, 'unit'), scores, 'unit')

    return summed
