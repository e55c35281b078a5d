"""What the masks of a run have been, for methods that choose them anew while a network trains."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxprune.types import Masks

#: What is told of masks, with what it is; all in [0, 1].
MASK_FIGURES = {
    'mask_change': 'distance of the mask to that before the last round',
    'mask_distance': 'distance of the mask to that of the first round',
    'weights_used': 'share of weights that some mask since the first round kept',
}


class Trace(NamedTuple):
    """Masks of a run.

    Attributes:
      first: after the first round.
      previous: before the last round so far.
      used: kept by any mask since the first round.
    """

    first: Masks
    previous: Masks
    used: Masks


def begun(masks: Masks) -> Trace:
    """Before the first round."""
    return Trace(masks, masks, masks)


def followed(trace: Trace, before: Masks, after: Masks, number: jax.Array) -> Trace:
    """The trace after round `number`, counted from 0."""
    first = number == 0
    return Trace(
        {path: jnp.where(first, m, trace.first[path]) for path, m in after.items()},
        before,
        {path: m | (trace.used[path] & ~first) for path, m in after.items()},
    )


def mask_figures(trace: Trace, masks: Masks) -> dict[str, jax.Array]:
    """`MASK_FIGURES` of a run, scalars."""
    size = sum(mask.size for mask in masks.values())
    return {
        'mask_change': distance(masks, trace.previous),
        'mask_distance': distance(masks, trace.first),
        'weights_used': _count(trace.used) / size,
    }


def distance(one: Masks, other: Masks) -> jax.Array:
    """How many weights only one of two masks keeps, over how many they keep together.

    0 for the same mask, 1 where they share no weight; `(A + B - 2 shared) / (A + B)`.
    """
    differing = _count({path: mask ^ other[path] for path, mask in one.items()})
    return differing / jnp.maximum(_count(one) + _count(other), 1)


def _count(masks: Masks) -> jax.Array:
    # Sums of float32 would lose single weights above 2**24.
    return sum(mask.sum(dtype=jnp.int32) for mask in masks.values()).astype(jnp.float32)
