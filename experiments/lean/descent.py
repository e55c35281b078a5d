"""From a trained network down to few convolutions, in rounds of pruning and retraining."""

import bisect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from training import Measured, Net, TrainFn

import jaxprune as jp
from jaxprune import structure
from jaxprune.types import Batch, Counts, Key, Masks, Problem


class Method(NamedTuple):
    """A way to prune: a method's name in the library, what competes, and the method's options."""

    name: str
    granularity: str
    options: dict[str, Any]


#: What tables and figures call the methods.
METHODS = {
    'LEAN': Method('lean', 'kernel', {}),
    'operator norm': Method('operator_norm', 'kernel', {}),
    'L1 norm': Method('magnitude', 'kernel', {}),
    'filters by L1 norm': Method(
        'group_score',
        'unit',
        {'measure': 'magnitude', 'members': 'out', 'reduce': 'sum', 'normalise': 'none'},
    ),
    'random': Method('random', 'kernel', {}),
}
#: Trained as long as the others, nothing is pruned.
DENSE = 'not pruned'

#: `(key, net, masks, wanted) -> masks` of at most `wanted` convolutions.
ShrinkFn = Callable[[Key, Net, Masks, int], Masks]


class Schedule(NamedTuple):
    """The rounds.

    Attributes:
      last: share of the convolutions that the last round keeps.
      rounds: how many there are; all of them remove the same share of what is left.
      steps: of training after each.
      rate: of that training at its start.
      shown: test images whose labels are kept for a figure.
    """

    last: float
    rounds: int
    steps: int
    rate: float
    shown: int

    @property
    def targets(self) -> list[float]:
        """The share that each round is to keep."""
        return [self.last ** ((k + 1) / self.rounds) for k in range(self.rounds)]


def convolutions(masks: Masks) -> int:
    """Kept single kernels: those with a weight that is kept."""
    return sum(int(np.asarray(mask).any((0, 1)).sum()) for mask in masks.values())


def make_shrink(problem: Problem, method: str, side: int) -> ShrinkFn:
    """Pruning by a method, then of what is no longer on a path from the image to the output.

    The authors remove such redundant convolutions after each round, whatever the method. Where
    that took more than a round asks for, the round prunes nothing. Single kernels of all layers
    compete. Of filters each layer keeps the same share, and at least one (Li et al., 2017).
    """
    name, granularity, options = METHODS[method]
    input_shape = (side, side, 3)
    connect = jax.jit(structure.connectivity_of(problem, input_shape))
    of_filters = granularity == 'unit'
    if of_filters:  # filters that the last layer reads may go as well
        problem = problem._replace(prunable=jp.kernels)
    shapes = structure.forward_shapes(problem, input_shape)
    read = partial(structure.groups_of, problem, input_shape)
    groups = jp.competing(granularity, shapes, read)
    allocation = 'uniform' if of_filters else 'global'
    pruner = jp.get_pruner(problem, name, groups=groups, allocation=allocation, **options)
    update = jax.jit(pruner.update)
    like = Batch(jnp.zeros((1, 1, *input_shape)), None)
    widths = {layer: math.prod(shape) for layer, shape in groups.shapes.items()}

    def shrink(key: Key, net: Net, masks: Masks, wanted: int) -> Masks:
        ones = {path: jnp.ones(shape, bool) for path, shape in shapes.items()}
        view = jp.view(problem, net.params, net.model_state, {**ones, **masks})

        def left(counts: Counts) -> Masks:
            _, kept, info = update(key, (), view, counts, like)
            if int(info.nonfinite):
                raise SystemExit(f'{method}: scores are not finite')
            return jax.device_get(connect({path: kept[path] for path in masks}))

        def with_filters(share: float) -> Masks:
            return left({n: jnp.int32(max(1, round(share * size))) for n, size in widths.items()})

        if convolutions(masks) <= wanted:
            return masks
        if not of_filters:
            return left({'*': jnp.int32(wanted)})
        # As many filters as fit: with one go the convolutions that make it, and that read it.
        shares = [n / 200 for n in range(201)]
        fit = bisect.bisect_right(shares, wanted, key=lambda s: convolutions(with_filters(s)))
        return with_filters(shares[max(fit - 1, 0)])

    return shrink


def descent(
    dense: Net,
    key: Key,
    draw: np.random.Generator,
    schedule: Schedule,
    shrink: ShrinkFn | None,
    train: TrainFn,
    measure: Callable[[Net], Measured],
    masks: Masks,
) -> pl.DataFrame:
    """Prunes and trains in turn.

    Args:
      dense: the trained network, row 0.
      key: of what methods draw.
      draw: orders the training images.
      shrink: None to prune nothing.
      masks: of the dense network.

    Returns:
      A row per round: `target`, `share` that is really left, `iou`, `accuracy`, all in %; and the
      `labels` of some test images, bytes.
    """
    net, total, rows = dense, convolutions(masks), []

    def row(target: float) -> tuple:
        found = measure(net)
        share, labels = convolutions(masks) / total, found.labels[: schedule.shown]
        return 100 * target, 100 * share, found.iou, found.accuracy, labels.tobytes()

    rows.append(row(1.0))
    for number, target in enumerate(schedule.targets):
        if shrink is not None:
            at = jax.random.fold_in(key, number)
            masks = shrink(at, net, masks, round(target * total))
            net = net._replace(params=jax.jit(jp.apply_masks)(net.params, masks))
        net = train(net, masks, draw, schedule.steps, schedule.rate)
        rows.append(row(target))
    return pl.DataFrame(rows, schema=['target', 'share', 'iou', 'accuracy', 'labels'], orient='row')
