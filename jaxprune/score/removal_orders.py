"""Random orders in which units are removed, drawn so that few of them tell much.

Every order is uniformly random by itself, so an average over any of them is unbiased. Estimators
differ in how orders drawn together depend on each other. A draw is the least set of orders that
is independent of the others: one order, a pair or a sweep.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxprune.arguments import least
from jaxprune.errors import PruneError, check_choice, shown
from jaxprune.types import Key

ESTIMATORS = ('permutation', 'antithetic', 'stratified', 'truncated')


def orders_per_draw(estimator: str, n: int, strata: int | None = None) -> int:
    """How many orders an estimator draws together.

    Raises:
      PruneError: an unknown estimator, strata that are not between 1 and n or belong to none.
    """
    check_choice('estimator', estimator, ESTIMATORS)
    if estimator == 'stratified':
        strata = n if strata is None else strata
        least(1, strata=strata)
        if strata > n:
            raise PruneError(f'strata must be at most the number of units, {n}, not {strata}')
        return strata
    if strata is not None:
        raise PruneError(f"strata belong to 'stratified', not to '{estimator}'")
    return 2 if estimator == 'antithetic' else 1


def removal_orders(
    key: Key,
    n: int,
    permutations: int,
    *,
    estimator: str = 'permutation',
    strata: int | None = None,
    skip: ArrayLike = 0,
) -> jax.Array:
    """Random orders of n units.

    - 'permutation' and 'truncated': independent orders.
    - 'antithetic': an order and its reverse, then the next pair. A unit that is removed early in
      the one is removed late in the other (Mitchell, Cooper, Frank & Holmes, "Sampling
      Permutations for Shapley Value Estimation", JMLR 2022, arXiv:2104.12199).
    - 'stratified': sweeps of `strata` orders. Positions are cut into `strata` equal blocks, and a
      unit stands once in each block per sweep, so that coalitions of all sizes weigh the same for
      every unit. With `strata = n`, each unit stands once at each position: a random Latin square,
      made of a circle of units that is turned by one place from order to order and always read
      in the same second random order. (Without the second one, neighbours would stay neighbours
      in the whole sweep.) With fewer strata, positions within a block are random. Where `strata`
      does not divide n, some blocks, other ones in each order, are one place shorter. Strata by
      coalition size go back to Castro, Gómez, Molina & Tejada, "Improving polynomial estimation
      of the Shapley value by stratified random sampling", Computers & Operations Research 82,
      2017. They draw coalitions for each unit and each size, with two evaluations each. Orders
      need one for each unit and size, and keep the sum of the values exact.

    Args:
      key: of the draws; the order number k depends on it and on k, not on `permutations`.
      n: number of units.
      permutations: number of orders, a multiple of `orders_per_draw`.
      estimator: one of `ESTIMATORS`.
      strata: of 'stratified', from 1 to n; None for n.
      skip: how many orders of this key were used before, a multiple of `orders_per_draw`; may be
        traced.

    Returns:
      int `(permutations, n)`.

    Raises:
      PruneError: an unknown estimator, numbers below 1, strata above n, permutations that are not
        a multiple of the orders of a draw.
    """
    least(1, n=n, permutations=permutations)
    together = orders_per_draw(estimator, n, strata)
    draws = number_of_draws(permutations, together, estimator)

    def draw(number: jax.Array) -> jax.Array:
        own = jax.random.fold_in(key, number)
        if estimator == 'stratified':
            return _sweep(own, n, together)
        order = jax.random.permutation(own, n)
        return jnp.stack([order, order[::-1]][:together])

    return jax.vmap(draw)(skip // together + jnp.arange(draws)).reshape(permutations, n)


def number_of_draws(permutations: int, together: int, estimator: str) -> int:
    """How many draws so many orders are.

    Raises:
      PruneError: not a whole number of draws.
    """
    if permutations % together:
        raise PruneError(
            f"'{estimator}' draws {together} orders together: permutations must be a multiple "
            f'of {together}, not {permutations}'
        )
    return permutations // together


def check_orders(orders: ArrayLike, n: int) -> jax.Array:
    """Orders that someone gives, as an integer array `(m, n)`.

    Raises:
      PruneError: no such array; a row that is no permutation of n units (not seen where traced).
    """
    traced = isinstance(orders, jax.core.Tracer)
    orders = orders if traced else np.asarray(orders)
    fits = orders.ndim == 2 and orders.shape[0] and orders.shape[1] == n
    if not fits or not jnp.issubdtype(orders.dtype, jnp.integer):
        raise PruneError(f'orders must be whole numbers of shape (m, {n}), not {shown(orders)}')
    if not traced:
        wrong = (np.sort(orders, axis=1) != np.arange(n)).any(1)
        if wrong.any():
            row = int(wrong.argmax())
            raise PruneError(f'orders[{row}] is no permutation of the units 0 to {n - 1}')
    return jnp.asarray(orders)


def _sweep(key: Key, n: int, strata: int) -> jax.Array:
    """Orders `(strata, n)` in which each unit stands once in each block of positions."""
    width = -(-n // strata)
    of_units, of_blocks, of_places = jax.random.split(key, 3)
    # Units on `width` circles of `strata` cells. Numbers from n on are empty places; all are on the
    # last circle, which goes through each block once: no block has more than one.
    empty = jnp.arange(n, strata * width)
    units = jnp.concatenate([jax.random.permutation(of_units, n), empty]).reshape(width, strata).T
    # Which block a cell of each circle is, and the place of each circle within a block.
    block = jnp.argsort(jax.random.uniform(of_blocks, (strata, width)), axis=0)
    place = jnp.argsort(jax.random.uniform(of_places, (strata, width)), axis=1)

    def turned(by: jax.Array) -> jax.Array:
        blocks = jnp.roll(block, -by, axis=0)
        positions = blocks * width + jnp.take_along_axis(place, blocks, axis=0)
        at = jnp.zeros(strata * width, positions.dtype).at[units].set(positions)
        return jnp.argsort(at[:n])

    return jax.vmap(turned)(jnp.arange(strata))
