"""How many orders are enough: Shapley values whose ranking at the cut is certain.

Only the cut counts for pruning. Units far below it may have values that are known badly, units far
above it as well.
"""

import functools

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri
from jax.typing import ArrayLike

from jaxprune.arguments import least, real, whole
from jaxprune.errors import PruneError, shown
from jaxprune.score.coalitions import Game
from jaxprune.score.removal_orders import number_of_draws, orders_per_draw, removal_orders
from jaxprune.score.shapley import ShapleyValues, shapley
from jaxprune.types import Key


def settled(values: ShapleyValues, count: int, *, confidence: float = 0.95) -> jax.Array:
    """Are the units with the lowest `count` means separated from the rest?

    They are if each kept unit lies above each removed one by more than `z` times the root of the
    summed squares of their standard errors: the interval of every such difference excludes 0.
    Equal values at the cut, such as those of two identical units, are never separated.

    `z` is that of a normal distribution, 1.96 for 95 %. From less than ten draws the errors are
    themselves uncertain, and whoever looks after every few draws is wrong more often than
    `1 - confidence` says: choose a higher one.

    Args:
      values: with errors; a single draw has none and is not settled.
      count: how many units are to be pruned, from 0 to n.
      confidence: of each comparison, in (0, 1).

    Returns:
      bool scalar.

    Raises:
      PruneError: a count or confidence outside its range.
    """
    mean, error = values.mean, values.std_error
    _check_cut(count, len(mean), confidence)
    order = jnp.argsort(mean)
    removed, kept = order[:count], order[count:]
    gap = mean[kept][:, None] - mean[removed]
    noise = jnp.hypot(error[kept][:, None], error[removed])
    return (gap > ndtri((1 + confidence) / 2).astype(mean.dtype) * noise).all()


def merged(one: ShapleyValues, other: ShapleyValues) -> ShapleyValues:
    """The values from all orders of two independent estimates, of the same game.

    Means and variances are joined as by Chan, Golub & LeVeque, 1983: up to rounding, the result is
    that of one call with all the orders.

    Raises:
      PruneError: other shapes, no `per_example`, draws of other numbers of orders.
    """
    if one.per_example is None or other.per_example is None:
        raise PruneError('merged needs per_example in both values, for their deviation')
    if one.per_example.shape != other.per_example.shape:
        shapes = one.per_example.shape, other.per_example.shape
        raise PruneError(f'values of shapes {shapes[0]} and {shapes[1]} are not of one game')
    sizes = one.permutations * other.draws, other.permutations * one.draws
    if all(not isinstance(s, jax.core.Tracer) for s in sizes) and sizes[0] != sizes[1]:
        raise PruneError('merged takes values of one estimator, with as many orders in each draw')
    draws = one.draws + other.draws
    share = jnp.asarray(other.draws / draws, one.mean.dtype)
    step = other.mean - one.mean
    squares = _squares(one) + _squares(other) + step**2 * share * one.draws
    per_example = one.per_example + (other.per_example - one.per_example) * share
    return ShapleyValues(
        mean=one.mean + step * share,
        std_error=jnp.sqrt(squares / draws / (draws - 1)),
        std=per_example.std(1),
        per_example=per_example,
        permutations=one.permutations + other.permutations,
        draws=draws,
        evaluations=one.evaluations + other.evaluations,
    )


def shapley_until_settled(
    loss: Game,
    n: int,
    key: Key,
    *,
    count: int,
    most: int = 100,
    step: int = 10,
    confidence: float = 0.95,
    estimator: str = 'permutation',
    strata: int | None = None,
    tolerance: ArrayLike | None = None,
    batch_size: int = 8,
    per_example: bool = True,
) -> ShapleyValues:
    """Shapley values from as many orders as it takes until the cut is `settled`.

    A loop on the host, not for `jit`: `step` orders are added at a time, up to `most`. The result
    is that of `shapley` with the same key and as many permutations, up to rounding. Ask `settled`
    whether it ended before `most` was reached.

        values = shapley_until_settled(loss, 64, key, count=16)
        if not settled(values, 16): ...

    Args:
      loss: the game.
      n: number of units.
      key: of the orders.
      count: how many units are to be pruned, from 0 to n.
      most: orders at most.
      step: orders added at a time; both multiples of the orders that the estimator draws together.
      confidence: see `settled`.
      estimator: see `shapley`, also for all below.
      strata: of 'stratified'.
      tolerance: of 'truncated'.
      batch_size: orders walked at once.
      per_example: False leaves `per_example` out of the result.

    Raises:
      PruneError: as for `shapley` and `settled`; losses that are NaN; a traced key.
    """
    if isinstance(key, jax.core.Tracer):
        raise PruneError('shapley_until_settled loops on the host: call it outside of jit and vmap')
    least(1, n=n, most=most, step=step)
    _check_cut(count, n, confidence)
    together = orders_per_draw(estimator, n, strata)
    number_of_draws(most, together, estimator)
    number_of_draws(step, together, estimator)
    how = {'estimator': estimator, 'strata': strata}

    def estimate(skip: jax.Array, more: int) -> ShapleyValues:
        orders = removal_orders(key, n, more, skip=skip, **how)
        return shapley(loss, n, orders=orders, tolerance=tolerance, batch_size=batch_size, **how)

    estimate, merge = jax.jit(estimate, static_argnums=1), jax.jit(merged)
    enough = jax.jit(functools.partial(settled, count=count, confidence=confidence))
    used = min(step, most)
    values = estimate(0, used)
    if bool(jnp.isnan(values.mean).any()):
        raise PruneError('the game returns losses that are NaN')
    while used < most and not enough(values):
        more = min(step, most - used)
        values, used = merge(values, estimate(used, more)), used + more
    return values._replace(
        per_example=values.per_example if per_example else None,
        permutations=int(values.permutations),
        draws=int(values.draws),
        evaluations=int(values.evaluations),
    )


def _squares(values: ShapleyValues) -> jax.Array:
    """The sum over draws of squared distances from the mean, from the standard error."""
    squares = values.std_error**2 * values.draws * (values.draws - 1)
    return jnp.where(values.draws > 1, squares, 0)  # the error of a single draw is NaN


def _check_cut(count: int, n: int, confidence: float) -> None:
    if not 0 <= whole('count', count) <= n:
        raise PruneError(f'count must lie between 0 and the {n} units, not {shown(count)}')
    if not 0 < real('confidence', confidence) < 1:
        raise PruneError(f'confidence must lie between 0 and 1, not {shown(confidence)}')
