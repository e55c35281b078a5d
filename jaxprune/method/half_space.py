"""What HSPG and DHSPG share: the half-space test, and where a second stage begins."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxprune.method.lasting import Asked, Lasting, lowest, may_go, room_left, to_remove
from jaxprune.method.own_slices import PerGroup, Vectors
from jaxprune.types import Masks, PyTree, Scores


def half_space_step(
    own: Vectors,
    before: PyTree,
    after: PyTree,
    bound: Mapping[str, ArrayLike],
    candidates: Masks | None,
    begun: jax.Array,
    stays: ArrayLike,
    allowed: Callable[[Scores, Masks, Masks], Masks],
) -> tuple[PyTree, Masks]:
    """Projects groups to zero that leave their half-space.

    A group x that becomes y in a step is projected if `y.x < epsilon |x|²`. If that were more than
    may go, those with the smallest `y.x / |x|²` are.

    Args:
      own: the groups.
      before: parameters before the step.
      after: and after it.
      bound: layer -> epsilon.
      candidates: groups that may be projected; None for all.
      begun: nothing is projected where this is False.
      stays: does what is zero stay zero?
      allowed: (y.x / |x|², groups that crossed, groups that are zero) -> those to project.

    Returns:
      The parameters with projected groups at zero, and these groups.
    """
    squares, along = own.dot(before, before), own.dot(before, after)
    zero = {name: leaf == 0 for name, leaf in squares.items()}
    crossed = {
        name: (along[name] < bound[name] * leaf) & ~zero[name] & begun
        for name, leaf in squares.items()
    }
    if candidates is not None:
        crossed = {name: mask & candidates[name] for name, mask in crossed.items()}
    share = {n: along[n] / jnp.where(zero[n], 1, leaf) for n, leaf in squares.items()}
    new = allowed(share, crossed, zero)
    kept = {n: (~(new[n] | (zero[n] & stays))).astype(squares[n].dtype) for n in new}
    return own.times(kept, after), new


def within_target(asked: Asked, state: Lasting) -> Callable[[Scores, Masks, Masks], Masks]:
    """Of the groups that crossed in a step, the first that the target has room for."""

    def allowed(share: Scores, crossed: Masks, zero: Masks) -> Masks:
        if not asked.cost:
            return lowest(share, crossed, room_left(may_go(asked, state.counts), zero))
        # Ranked as if all others stayed: as many of them as it takes to reach the share.
        first = {n: jnp.where(crossed[n], leaf, jnp.inf) for n, leaf in share.items()}
        need = to_remove(asked._replace(multiple=1), state, first, zero)
        return {name: mask & need[name] for name, mask in crossed.items()}

    return allowed


def second_stage(asked: Asked, share: ArrayLike) -> jax.Array:
    """Where the clock stands when so much of the way from the first round to the last is over."""
    first, last = asked.events[0], asked.events[-1]
    return first + jnp.round(jnp.asarray(share) * (last - first)).astype(jnp.int32)


def no_projections(asked: Asked) -> PerGroup:
    """Layer -> how many groups were projected, before the first."""
    return {name: jnp.zeros((), jnp.int32) for name in asked.groups.shapes}
