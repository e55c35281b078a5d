"""What HSPG and DHSPG share: the half-space test, and where a second stage begins."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxprune.method.lasting import Asked, Lasting, lowest, reached, room_left
from jaxprune.method.own_slices import PerGroup, Vectors
from jaxprune.types import GLOBAL, Counts, Masks, PyTree


class Tested(NamedTuple):
    """The end of a step.

    Attributes:
      params: with projected groups at zero.
      new: groups that this step projected.
      zero: groups that were zero before it.
    """

    params: PyTree
    new: Masks
    zero: Masks


def half_space_step(
    own: Vectors,
    before: PyTree,
    after: PyTree,
    bound: Mapping[str, ArrayLike],
    candidates: Masks | None,
    begun: jax.Array,
    room: Callable[[Masks], Counts],
) -> Tested:
    """Projects groups to zero that leave their half-space.

    A group x that becomes y in a step is projected if `y.x < epsilon |x|²`. If that were more than
    may go, those with the smallest `y.x / |x|²` are. What is zero stays zero.

    Args:
      own: the groups.
      before: parameters before the step.
      after: and after it.
      bound: layer -> epsilon.
      candidates: groups that may be projected; None for all.
      begun: nothing happens where this is False.
      room: groups that are zero -> how many more may become so, see `lowest`.
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
    new = lowest(share, crossed, room(zero))
    kept = {n: (~(new[n] | (zero[n] & begun))).astype(squares[n].dtype) for n in new}
    return Tested(own.times(kept, after), new, zero)


def room_to_project(asked: Asked, state: Lasting) -> Callable[[Masks], Counts]:
    """Groups that are zero -> how many more may become so in one step.

    Where a cost is counted any number may, until the share is reached: one step may go too far.
    """

    def room(zero: Masks) -> Counts:
        left = room_left(state.most, zero)
        if asked.cost:
            left[GLOBAL] = jnp.where(reached(asked, state, zero), 0, left[GLOBAL])
        return left

    return room


def second_stage(asked: Asked, share: ArrayLike) -> jax.Array:
    """Where the clock stands when so much of the way from the first round to the last is over."""
    first, last = asked.events[0], asked.events[-1]
    return first + jnp.round(jnp.asarray(share) * (last - first)).astype(jnp.int32)


def no_projections(asked: Asked) -> PerGroup:
    """Layer -> how many groups were projected, before the first."""
    return {name: jnp.zeros((), jnp.int32) for name in asked.groups.shapes}
