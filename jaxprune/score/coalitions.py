"""Games whose players are units: what a network loses without some of them, counted exactly.

A game is a function `loss(mask) -> losses`: `mask` is bool `(n,)`, True where the unit is there,
and `losses` is `(examples,)`. The value of a coalition is minus its loss. To make a game of a
layer, compute its activations once and let the mask multiply them, one factor for each channel:

    def loss(mask):
        return cross_entropy(rest_of_the_network(activations * mask), labels)

Units are best masked where the next layer reads them, after batch norm and activation (Ancona,
Öztireli & Gross, "Shapley Value as Principled Metric for Structured Network Pruning", 2020,
arXiv:2006.01795).
"""

import functools
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.arguments import least
from jaxprune.errors import PruneError, check_choice, shown

#: `mask -> losses`; see above.
Game = Callable[[jax.Array], jax.Array]
#: How many coalitions are evaluated one after the other: in a loop of the compiled program; or one
#: compiled call after the other, since XLA's CPU runs convolutions in loops 25 to 40 times slower.
#: Inside of `jit` the calls become one long program.
LOOPS = ('map', 'unrolled')
#: 2**16 = 65,536 coalitions; each further unit doubles time and memory.
MOST_UNITS = 16


def exact_shapley(loss: Game, n: int, *, batch_size: int = 64, loop: str = 'map') -> jax.Array:
    """Shapley values of n units by all `2**n` coalitions, high = important.

    Unit i gets, with `loss(S)` the loss when only the units S are there,

        φ_i = Σ over S without i of (loss(S) - loss(S and i)) / (n binom(n - 1, |S|))

    It is the increase of the loss when unit i is removed, averaged over all orders of removal. The
    values of all units add up to `loss(none) - loss(all)`. A unit that changes nothing gets
    exactly 0.

        loss = lambda mask: jnp.exp(-(mask * jnp.array([1.0, 2.0, 0.0])).sum())[None]
        exact_shapley(loss, 3)  # [[0.359], [0.591], [0.]]

    Args:
      loss: the game.
      n: number of units, at most 16.
      batch_size: coalitions evaluated at once. All `2**n` rows of losses are kept.
      loop: see `evaluated`.

    Returns:
      `(n, examples)`.

    Raises:
      PruneError: n or batch size below 1, more than 16 units, a game that does not return one loss
        for each example.
    """
    game, _ = checked_game(loss, n)
    least(1, batch_size=batch_size)
    if n > MOST_UNITS:
        raise PruneError(
            f'exact Shapley values take at most {MOST_UNITS} units, not {n}: sample with shapley'
        )
    units = jnp.arange(n)
    losses = evaluated(game, (jnp.arange(2**n)[:, None] >> units) & 1 == 1, batch_size, loop)
    # Factorials of 16 units leave float32, their quotients do not.
    weights = np.array([1 / (n * math.comb(n - 1, size)) for size in range(n)])
    others = jnp.arange(2 ** (n - 1))  # coalitions of the other n - 1 units
    weight = jnp.asarray(weights, losses.dtype)[jax.lax.population_count(others)]

    def of_unit(unit: jax.Array) -> jax.Array:
        low = others & ((1 << unit) - 1)
        without = ((others - low) << 1) | low
        # Losses are subtracted before they are weighed: what is common to both cancels exactly.
        increase = losses[without] - losses[without | (1 << unit)]
        return (weight[:, None] * increase).sum(0)

    return jax.lax.map(of_unit, units)


def leave_one_out(loss: Game, n: int, *, batch_size: int = 64, loop: str = 'map') -> jax.Array:
    """The increase of the loss when one unit alone is removed from the full set.

    It takes `n + 1` evaluations. Units that can stand in for each other all get 0, however
    important they are together: Shapley values share the credit between them.

    Args:
      loss: the game.
      n: number of units.
      batch_size: units removed at once, each from a full set of its own.
      loop: see `evaluated`.

    Returns:
      `(n, examples)`.

    Raises:
      PruneError: n or batch size below 1, a game that does not return one loss for each example.
    """
    game, _ = checked_game(loss, n)
    least(1, batch_size=batch_size)
    losses = evaluated(game, jnp.arange(n) != jnp.arange(n + 1)[:, None], batch_size, loop)
    return losses[:n] - losses[n]


def evaluated(game: Game, masks: jax.Array, at_once: int, loop: str = 'map') -> jax.Array:
    """The losses of many coalitions, `(coalitions, examples)`.

    Args:
      masks: bool `(coalitions, n)`.
      at_once: coalitions evaluated together; bounds the memory.
      loop: one of `LOOPS`.

    Raises:
      PruneError: another loop.
    """
    check_choice('loop', loop, LOOPS)
    # A smaller last block would be a program of its own, and round differently: what changes
    # nothing would seem to change a little. So blocks are shrunk, and a few more are computed.
    count = len(masks)
    blocks = -(-count // at_once)
    size = -(-count // blocks)
    masks = jnp.concatenate([masks, jnp.repeat(masks[-1:], blocks * size - count, axis=0)])
    if loop == 'map':
        return jax.lax.map(game, masks, batch_size=size)[:count]
    together = jax.jit(jax.vmap(game))
    parts = [together(masks[i * size : (i + 1) * size]) for i in range(blocks)]
    return jnp.concatenate(parts)[:count]


def joined(games: Iterable[Game]) -> Game:
    """One game over several batches of examples: the losses of all, one batch after the other.

    The same coalitions are evaluated for every batch, so an estimate from the joined game has the
    same orders for all of them, and each example counts once. Batches of equal size can be looped
    over instead, which is compiled once and holds the activations of one batch:

        loss = lambda mask: jax.lax.map(lambda batch: losses(mask, batch), batches).ravel()

    Raises:
      PruneError: there are no games; one does not return one loss for each example.
    """
    games = tuple(games)
    if not games:
        raise PruneError('there are no games to join')

    def loss(mask: jax.Array) -> jax.Array:
        return jnp.concatenate([_losses(game(mask)) for game in games])

    return loss


def checked_game(loss: Game, n: int) -> tuple[Game, jax.ShapeDtypeStruct]:
    """The game with losses in float32 or wider, and their shape.

    Raises:
      PruneError: n below 1, a game that does not return one loss for each example.
    """
    least(1, n=n)

    @functools.wraps(loss)
    def game(mask: jax.Array) -> jax.Array:
        return _losses(loss(mask))

    return game, jax.eval_shape(game, jax.ShapeDtypeStruct((n,), bool))


def _losses(found: jax.Array) -> jax.Array:
    shape, dtype = getattr(found, 'shape', None), getattr(found, 'dtype', None)
    if shape is None or len(shape) != 1 or not shape[0] or jnp.iscomplexobj(found):
        what = shown(found) if shape is None else f'an array of shape {tuple(shape)}, {dtype}'
        raise PruneError(
            f'a game returns one real loss for each example, shape (examples,), not {what}'
        )
    return jnp.asarray(found, jnp.promote_types(dtype, jnp.float32))
