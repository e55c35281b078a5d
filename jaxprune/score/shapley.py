"""Shapley values of units, estimated from orders in which the units are removed one by one.

The score of Ancona, Öztireli & Gross, "Shapley Value as Principled Metric for Structured Network
Pruning", 2020, arXiv:2006.01795: what the loss gains on average when the unit goes, over all
orders of removal. `coalitions` says what a game is; `settled` adds orders until a cut is certain.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxprune.arguments import least, real
from jaxprune.errors import PruneError, check_choice, shown
from jaxprune.score.coalitions import LOOPS, Game, checked_game, evaluated
from jaxprune.score.removal_orders import (
    check_orders,
    number_of_draws,
    orders_per_draw,
    removal_orders,
)
from jaxprune.types import Key

AGGREGATIONS = ('mean', 'mean_plus_2std')


class ShapleyValues(NamedTuple):
    """Estimated Shapley values of n units, in units of the loss; high = important.

    Attributes:
      mean: `(n,)`, over examples and orders.
      std_error: `(n,)`, the standard error of `mean` over the draws of orders, for these examples;
        NaN if there is only one draw.
      std: `(n,)`, the standard deviation over examples of `per_example` (divided by their number).
      per_example: `(n, examples)`, averaged over orders; None if it is not kept.
      permutations: how many orders were used.
      draws: how many independent draws they are: orders, antithetic pairs or sweeps.
      evaluations: of how many coalitions the losses were used.
    """

    mean: jax.Array
    std_error: jax.Array
    std: jax.Array
    per_example: jax.Array | None
    permutations: ArrayLike
    draws: ArrayLike
    evaluations: ArrayLike


def shapley(
    loss: Game,
    n: int,
    key: Key | None = None,
    *,
    permutations: int = 5,
    estimator: str = 'permutation',
    orders: ArrayLike | None = None,
    strata: int | None = None,
    tolerance: ArrayLike | None = None,
    batch_size: int = 8,
    loop: str = 'map',
    per_example: bool = True,
) -> ShapleyValues:
    """Estimates the Shapley values of n units.

    Start from the full set, remove the units one by one in a random order, credit each increase of
    the loss to the unit just removed, and average over orders. Every order takes n + 1 evaluations,
    and its credits add up to `loss(none) - loss(all)`. A unit that changes nothing gets exactly 0.

        values = shapley(loss, 64, key)
        scores = aggregated(values, 'mean_plus_2std')

    The estimators, see `removal_orders` for the first three:

    - 'permutation': independent orders; the variance falls as 1 / permutations.
    - 'antithetic': each order and its reverse. Best where units interact in pairs, as where one
      stands in for another: if they interact in no other way, one pair of orders is exact.
    - 'stratified': sweeps in which every unit goes early, late and in between. Best where credit
      depends on how many units are left more than on which. The error comes from the spread of
      whole sweeps, which is what varies within strata: take two sweeps or more for an error.
    - 'truncated': an order ends once the mean loss is within `tolerance` of the loss of the empty
      set (Ghorbani & Zou, "Data Shapley", ICML 2019, arXiv:1904.02868). Units not yet removed get
      0 from this order, the remaining difference is credited to nobody. It saves evaluations
      and is biased: the sum of the means is off by up to `tolerance`. A loss that passes that of
      the empty set on its way up may end an order too early.

    Memory: `batch_size` orders are walked at once. They hold that many evaluations of the game
    and that many `(n, examples)`; the number of orders does not matter. It works under `jit`, and
    under `vmap` over keys.

    Args:
      loss: the game, `mask (n,) -> losses (examples,)`; see `coalitions`, and `joined` for several
        batches of examples.
      n: number of units.
      key: of the orders; not needed if these are given.
      permutations: number of orders; even for 'antithetic', a multiple of `strata` for
        'stratified'. Ignored where orders are given.
      estimator: one of `ESTIMATORS`.
      orders: int `(m, n)`, each row a permutation, in place of drawn ones. Rows are taken as they
        are: for 'antithetic' rows 0 and 1 are the first draw, for 'stratified' the first `strata`.
      strata: of 'stratified': orders per sweep, from 1 to n; None for n. A sweep takes
        `strata (n + 1)` evaluations.
      tolerance: of 'truncated', at least 0, in units of the loss; may be traced.
      batch_size: orders walked at once. For 'truncated', 1 saves most: orders that are walked
        together go on until the last one ends.
      loop: 'map' walks along orders in a loop of the compiled program. 'unrolled' evaluates
        `batch_size` coalitions at a time in one call after the other, for convolutions on the
        CPU; it holds the losses of all coalitions, and knows no 'truncated'.
      per_example: False leaves `per_example` out of the result.

    Raises:
      PruneError: an unknown estimator, numbers below 1 or that do not fit, neither key nor orders,
        orders that are no permutations, a tolerance that is missing or negative, a game that does
        not return one loss for each example.
    """
    game, like = checked_game(loss, n)
    least(1, permutations=permutations, batch_size=batch_size)
    together = orders_per_draw(estimator, n, strata)
    _check_tolerance(estimator, tolerance)
    check_choice('loop', loop, LOOPS)
    if loop == 'unrolled' and estimator == 'truncated':
        raise PruneError("'truncated' decides as it goes: loop='map'")
    if orders is not None:
        orders = check_orders(orders, n)
    else:
        orders = _drawn(key, n, permutations, estimator, strata)
    count = len(orders)
    draws = number_of_draws(count, together, estimator)
    evaluations = count * (n + 1)
    if loop == 'unrolled':
        total, each = _from_table(game, orders, batch_size)
    else:
        nothing = jnp.zeros((n, *like.shape), like.dtype)
        walk = functools.partial(_walk, game)
        if estimator == 'truncated':
            goal = game(jnp.zeros(n, bool)).mean()
            walk = functools.partial(_truncated_walk, game, nothing, goal, tolerance)
        total, each, steps = _over_orders(walk, orders, min(batch_size, count), nothing)
        evaluations = steps.sum() + 1 if estimator == 'truncated' else evaluations
    found = total / count
    return ShapleyValues(
        mean=each.mean(0),
        std_error=_standard_error(each.reshape(draws, together, n).mean(1)),
        std=found.std(1),
        per_example=found if per_example else None,
        permutations=count,
        draws=draws,
        evaluations=evaluations,
    )


def aggregated(values: ShapleyValues, how: str = 'mean') -> jax.Array:
    """One score for each unit, `(n,)`, from the values of all examples; high = keep.

    Args:
      values: of the units.
      how: 'mean' over examples, or 'mean_plus_2std', which spares units that matter much to few
        examples; the authors found it the better one. With few orders the deviation between
        examples has a part that comes from the orders.

    Raises:
      PruneError: another aggregation.
    """
    check_choice('aggregation', how, AGGREGATIONS)
    return values.mean if how == 'mean' else values.mean + 2 * values.std


#: An order -> credits `(n, examples)`, and how many evaluations they took.
_Walk = Callable[[jax.Array], tuple[jax.Array, ArrayLike]]


def _walk(game: Game, order: jax.Array) -> tuple[jax.Array, int]:
    """Removes all units in this order.

    The full set is evaluated in the same loop, not once for all orders: another program would round
    differently, and a unit without effect that goes first would get a little credit.
    """
    rank = jnp.argsort(order)
    losses = jax.lax.map(lambda gone: game(rank >= gone), jnp.arange(len(order) + 1))
    return jnp.diff(losses, axis=0)[rank], len(order) + 1


def _drawn(
    key: Key | None, n: int, permutations: int, estimator: str, strata: int | None
) -> jax.Array:
    if key is None:
        raise PruneError('shapley needs a key, or orders')
    return removal_orders(key, n, permutations, estimator=estimator, strata=strata)


def _from_table(game: Game, orders: jax.Array, at_once: int) -> tuple[jax.Array, jax.Array]:
    """Credits `(n, examples)` summed over orders, and their means over examples `(m, n)`."""
    count, n = orders.shape
    rank = jnp.argsort(orders, axis=1)
    masks = rank[:, None, :] >= jnp.arange(n + 1)[:, None]  # before and after each removal
    losses = evaluated(game, masks.reshape(-1, n), at_once, 'unrolled').reshape(count, n + 1, -1)
    credits = jnp.take_along_axis(jnp.diff(losses, axis=1), rank[:, :, None], axis=1)
    return credits.sum(0), credits.mean(2)


def _truncated_walk(
    game: Game, nothing: jax.Array, goal: jax.Array, tolerance: ArrayLike, order: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Removes units in this order until the mean loss is `goal`, that of the empty set."""
    n, rank = len(order), jnp.argsort(order)

    def goes_on(state) -> jax.Array:
        gone, before, _ = state
        far = jnp.abs(before.mean() - goal) > tolerance
        return (gone == 0) | (far & (gone <= n))

    def remove(state):
        gone, before, credit = state
        after = game(rank >= gone)
        increase = jnp.where(gone > 0, after - before, 0)  # of the full set there is none
        return gone + 1, after, credit.at[order[gone - 1]].set(increase)

    steps, _, credit = jax.lax.while_loop(goes_on, remove, (jnp.int32(0), nothing[0], nothing))
    return credit, steps


def _over_orders(
    walk: _Walk, orders: jax.Array, at_once: int, nothing: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Credits `(n, examples)` summed over orders; their means over examples `(m, n)`; steps `(m,)`.

    Only `at_once` orders have their credits in memory at a time.
    """
    count, n = orders.shape
    whole = count - count % at_once

    def some(total, part):
        values, steps = jax.vmap(walk)(part)
        return total + values.sum(0), (values.mean(2), jnp.broadcast_to(steps, len(part)))

    total, (each, steps) = jax.lax.scan(some, nothing, orders[:whole].reshape(-1, at_once, n))
    each, steps = each.reshape(whole, n), steps.reshape(whole)
    if whole < count:
        total, (last, further) = some(total, orders[whole:])
        each, steps = jnp.concatenate([each, last]), jnp.concatenate([steps, further])
    return total, each, steps


def _standard_error(draws: jax.Array) -> jax.Array:
    """Of the mean over the first axis; NaN for a single draw."""
    if len(draws) == 1:
        return jnp.full(draws.shape[1:], jnp.nan, draws.dtype)
    return draws.std(0, ddof=1) / jnp.sqrt(jnp.asarray(len(draws), draws.dtype))


def _check_tolerance(estimator: str, tolerance: ArrayLike | None) -> None:
    if estimator != 'truncated':
        if tolerance is not None:
            raise PruneError(f"tolerance belongs to 'truncated', not to '{estimator}'")
        return
    if tolerance is None:
        raise PruneError("'truncated' needs a tolerance, in units of the loss")
    if not isinstance(real('tolerance', tolerance), jax.core.Tracer) and not tolerance >= 0:
        raise PruneError(f'tolerance must be at least 0, not {shown(tolerance)}')
