"""Sums over groups of weights: single weights, units, layers, the network.

A unit computes one output: a neuron, a filter of a convolution. Its weights are one slice of the
kernel along the output axis, the last one in flax and haiku, the first in torch and equinox.
"""

import jax
import jax.numpy as jnp

from jaxprune.errors import check_choice
from jaxprune.types import GLOBAL, Groups, Weights

GROUPS = ('weight', 'unit', 'layer', 'network')


def grouped(values: Weights, by: str | Groups, axis: int = -1) -> dict[str, jax.Array]:
    """Sums of one value per weight.

    Args:
      values: path -> array.
      by: 'weight' sums nothing; 'unit' gives path -> `(units,)`; 'layer' path -> scalar; 'network'
        one scalar, at the path '*'; what competes gives layer -> sums of its groups.
      axis: of the outputs, for units; a scalar is one unit.
    """
    check_groups(by)
    if isinstance(by, Groups):
        return by.gather(values)
    if by == 'weight':
        return dict(values)
    if by == 'unit':
        values = {path: jnp.atleast_1d(v) for path, v in values.items()}
        return {
            path: jnp.moveaxis(v, axis, 0).reshape(v.shape[axis], -1).sum(1)
            for path, v in values.items()
        }
    layers = {path: leaf.sum() for path, leaf in values.items()}
    return layers if by == 'layer' else {GLOBAL: sum(layers.values())}


def spread(groups: dict[str, jax.Array], like: Weights, by: str, axis: int = -1) -> Weights:
    """Gives every weight the value of its group: undoes `grouped`, to the shapes of `like`."""
    check_groups(by)
    if by == 'weight':
        return dict(groups)

    def value(path: str, leaf: jax.Array) -> jax.Array:
        group = groups[GLOBAL if by == 'network' else path]
        if by == 'unit':
            group = jnp.moveaxis(group.reshape(-1, *[1] * (leaf.ndim - 1)), 0, axis)
        return jnp.broadcast_to(group, leaf.shape)

    return {path: value(path, leaf) for path, leaf in like.items()}


def check_groups(by: str | Groups) -> None:
    """Raises PruneError unless `by` names a kind of group, or is what competes."""
    if not isinstance(by, Groups):
        check_choice('groups', by, GROUPS)
