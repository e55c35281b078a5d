"""Scores of units by the loss without them: one alone, or on average over the orders of removal.

Ancona, Öztireli & Gross, "Shapley Value as Principled Metric for Structured Network Pruning", 2020,
arXiv:2006.01795. The loss itself is measured, no gradient is taken, so nothing is needed but that
the network was trained. Only the part of the network behind a layer is computed again.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxprune.arguments import least
from jaxprune.errors import check_choice
from jaxprune.jaxpr import equations
from jaxprune.score.coalitions import LOOPS, Game, joined, leave_one_out
from jaxprune.score.gate_taylor import SIGNS, gates_of, signed
from jaxprune.score.loss import split
from jaxprune.score.shapley import AGGREGATIONS, ShapleyValues, aggregated, shapley
from jaxprune.tree import put
from jaxprune.types import Batch, Batches, Gates, Groups, Key, Problem, ScoreFn, Scores, View

#: `(key, view, batches) -> layer -> values of its units`.
ValuesFn = Callable[[Key, View, Batches | None], dict[str, ShapleyValues]]


def unit_shapley(
    problem: Problem,
    *,
    by: Groups,
    permutations: int = 5,
    estimator: str = 'permutation',
    aggregate: str = 'mean',
    place: str = 'activation',
    at_once: int = 64,
    loop: str = 'auto',
    train: bool = False,
) -> ScoreFn:
    """Shapley values of the units of each layer: what the loss gains when one goes, high = keep.

    Layer by layer the units are removed in random orders until none is left; a unit's value is the
    mean increase of the loss at its removal. All batches see the same orders. A negative value says
    that the network is better off without the unit.

    Args:
      by: the groups that compete; they must be coupled groups.
      permutations: orders of each layer.
      estimator: 'permutation', 'antithetic' or 'stratified', see `shapley`.
      aggregate: of examples: 'mean', or 'mean_plus_2std', the authors' better one.
      place: where units are removed, see `structure.gates`; the authors' choice is 'activation'.
      at_once: forward passes that are computed together; each holds all examples of all batches.
      loop: how the rest follow one another, see `LOOPS`. 'auto' is 'map', but 'unrolled' on the CPU
        where the rest of the network has convolutions whose channels are not last.
      train: must be False.

    Raises:
      PruneError: another choice, numbers below 1, groups without gates.
    """
    check_choice('aggregate', aggregate, AGGREGATIONS)
    values = unit_shapley_values(
        problem,
        by=by,
        permutations=permutations,
        estimator=estimator,
        place=place,
        at_once=at_once,
        loop=loop,
        per_example=False,
        train=train,
    )

    def score(key: Key, view: View, batches: Batches | None) -> Scores:
        made = values(key, view, batches)
        return {layer: aggregated(own, aggregate) for layer, own in made.items()}

    return score


def unit_shapley_values(
    problem: Problem,
    *,
    by: Groups,
    permutations: int = 5,
    estimator: str = 'permutation',
    place: str = 'activation',
    at_once: int = 64,
    loop: str = 'auto',
    per_example: bool = True,
    train: bool = False,
) -> ValuesFn:
    """As `unit_shapley`, with standard errors and the values of each example."""
    check_choice('loop', loop, ('auto', *LOOPS))
    least(1, permutations=permutations, at_once=at_once)
    gated = gates_of(by, place, train)

    def values(key: Key, view: View, batches: Batches | None) -> dict[str, ShapleyValues]:
        made = {}
        for number, (layer, units) in enumerate(gated.sizes.items()):
            game = unit_game(problem, gated, layer, view, batches)
            made[layer] = shapley(
                game,
                units,
                jax.random.fold_in(key, number),
                permutations=permutations,
                estimator=estimator,
                batch_size=at_once,
                loop=_loop(loop, game, units),
                per_example=per_example,
            )
        return made

    return values


def unit_leave_one_out(
    problem: Problem,
    *,
    by: Groups,
    sign: str = 'signed',
    place: str = 'activation',
    at_once: int = 64,
    loop: str = 'auto',
    train: bool = False,
) -> ScoreFn:
    """The exact change of the mean loss when one unit alone is removed: the oracle, high = keep.

    Args:
      sign: 'signed'; 'square' is the oracle of Molchanov et al. (2019, arXiv:1906.10771).
      by, place, at_once, loop, train: see `unit_shapley`.

    Raises:
      PruneError: see `unit_shapley`.
    """
    check_choice('sign', sign, SIGNS)
    check_choice('loop', loop, ('auto', *LOOPS))
    least(1, at_once=at_once)
    gated = gates_of(by, place, train)

    def score(key: Key, view: View, batches: Batches | None) -> Scores:
        changes = {}
        for layer, units in gated.sizes.items():
            game = unit_game(problem, gated, layer, view, batches)
            chosen = _loop(loop, game, units)
            each = leave_one_out(game, units, batch_size=at_once, loop=chosen)
            changes[layer] = each.mean(1)
        return signed(changes, sign)

    return score


def unit_game(
    problem: Problem, gated: Gates, layer: str, view: View, batches: Batches | None
) -> Game:
    """`units that are there -> losses of all examples`, for the units of one layer.

    What comes before the layer is computed once, here.
    """
    params = put(view.params, view.weights)
    dtype = jnp.result_type(*view.weights.values())

    def of_batch(batch: Batch) -> Game:
        tail = gated.tail([layer], params, batch.x, view.model_state)

        def game(mask: jax.Array) -> jax.Array:
            return problem.loss(tail({layer: mask.astype(dtype)}), batch.y)

        return game

    return joined([of_batch(batch) for batch in split(batches)])


def _loop(loop: str, game: Game, units: int) -> str:
    """What 'auto' stands for.

    XLA's CPU puts convolutions into its own layout, channels last, but not inside of loops. There
    a forward pass in another layout takes 5 to 45 times as long. One with channels last takes as
    long as outside, and a loop compiles sooner and needs a fraction of the memory.
    """
    if loop != 'auto':
        return loop
    if jax.default_backend() != 'cpu':
        return 'map'
    traced = jax.make_jaxpr(game)(jax.ShapeDtypeStruct((units,), bool))
    found = (equation.params.get('dimension_numbers') for equation in equations(traced.jaxpr))
    layouts = (each for each in found if isinstance(each, jax.lax.ConvDimensionNumbers))
    return 'map' if all(map(_channels_last, layouts)) else 'unrolled'


def _channels_last(layout: jax.lax.ConvDimensionNumbers) -> bool:
    rank = len(layout.lhs_spec) - 2
    arrays, kernel = (0, rank + 1, *range(1, rank + 1)), (rank + 1, rank, *range(rank))
    return tuple(layout) == (arrays, kernel, arrays)
