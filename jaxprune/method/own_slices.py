"""The slices that a coupled group owns: what makes it and what follows it, as one vector.

A zero-invariant group in the sense of OTO (Chen et al., 2021, arXiv:2107.07467) is a filter or a
neuron with its bias and the scale and bias of its norm, not the slices that read it: if all of it
is zero, the network computes what it computes without the group.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import tree
from jaxprune.errors import PruneError
from jaxprune.types import Groups, Hyper, PyTree

#: Layer -> one number for each of its groups.
PerGroup = dict[str, jax.Array]


class Slice(NamedTuple):
    """What the groups of a layer own of a parameter.

    Attributes:
      layer: a key of `Groups.shapes`.
      path: of the parameter.
      axis: along which its groups lie.
      table: `(groups, indices of each)`, the indices along the axis.
    """

    layer: str
    path: str
    axis: int
    table: np.ndarray


class Vectors(NamedTuple):
    """Groups as vectors. The functions take trees of parameters.

    Attributes:
      slices: what each group owns.
      sizes: `tree -> layer -> (groups,)`, how many entries each has.
      dot: `(a, b) -> layer -> (groups,)`, the scalar products of the groups of two trees.
      times: `(factors, tree) -> tree` with every group multiplied by its factor. The factor 0 makes
        exact zeros, whatever was there.
      plus: `(tree, factors, other) -> tree` with the groups of `other`, times their factors, added.
    """

    slices: list[Slice]
    sizes: Callable[[PyTree], dict[str, np.ndarray]]
    dot: Callable[[PyTree, PyTree], PerGroup]
    times: Callable[[PerGroup, PyTree], PyTree]
    plus: Callable[[PyTree, PerGroup, PyTree], PyTree]


def vectors(groups: Groups, *, silent: bool = True) -> Vectors:
    """The groups as vectors.

    Args:
      groups: coupled groups.
      silent: all of them must be zero-invariant.

    Raises:
      PruneError: a group that is not.
    """
    slices = _owned(groups, silent)

    def sizes(leaves: PyTree) -> dict[str, np.ndarray]:
        shapes = {path: jnp.shape(leaf) for path, leaf in tree.paths(leaves)}
        found = {layer: np.zeros(shape, np.int64) for layer, shape in groups.shapes.items()}
        for own in slices:
            shape = shapes[own.path]
            found[own.layer] += own.table.shape[1] * (math.prod(shape) // shape[own.axis])
        return found

    def dot(a: PyTree, b: PyTree) -> PerGroup:
        first, second = dict(tree.paths(a)), dict(tree.paths(b))
        sums: PerGroup = {}
        for own in slices:
            product = first[own.path] * second[own.path]
            along = product.sum([i for i in range(product.ndim) if i != own.axis])
            each = along[own.table].sum(1)
            sums[own.layer] = sums[own.layer] + each if own.layer in sums else each
        return sums

    def times(factors: PerGroup, leaves: PyTree) -> PyTree:
        known = dict(tree.paths(leaves))
        made = {own.path: known[own.path] for own in slices}
        for own in slices:
            leaf = made[own.path]
            factor = _along(own, factors[own.layer], 1, leaf)
            made[own.path] = jnp.where(factor == 0, jnp.zeros_like(leaf), leaf * factor)
        return tree.put(leaves, made)

    def plus(leaves: PyTree, factors: PerGroup, others: PyTree) -> PyTree:
        known, added = dict(tree.paths(leaves)), dict(tree.paths(others))
        made = {own.path: known[own.path] for own in slices}
        for own in slices:
            factor = _along(own, factors[own.layer], 0, made[own.path])
            made[own.path] += factor * added[own.path]
        return tree.put(leaves, made)

    return Vectors(slices, sizes, dot, times, plus)


def _owned(groups: Groups, silent: bool) -> list[Slice]:
    found = []
    for layer, family in groups.families.items():
        if silent and not family.zero_invariant:
            raise PruneError(
                f"'{layer}' is not zero-invariant, its groups still act when they are zero: name "
                'it in keep_all_units'
            )
        found += [
            Slice(layer, member.path, member.axis, np.stack(member.indices).astype(np.int32))
            for member in family.members
            if member.role in ('out', 'along')
        ]
    return found


def _along(own: Slice, factors: jax.Array, elsewhere: int, leaf: jax.Array) -> jax.Array:
    """Factors of groups along the axis of a parameter, and what stands where no group lies."""
    numbers = np.full(leaf.shape[own.axis], len(own.table), np.int32)
    numbers[own.table] = np.arange(len(own.table))[:, None]
    longer = jnp.append(factors, jnp.full((), elsewhere, factors.dtype)).astype(leaf.dtype)
    return longer[numbers].reshape([-1 if i == own.axis else 1 for i in range(leaf.ndim)])


def in_all(values: PerGroup) -> jax.Array:
    """The sum over all groups of all layers."""
    return sum(value.sum() for value in values.values())


def direction(before: PyTree, after: PyTree, hyper: Hyper) -> PyTree:
    """v of an optimizer's step `before - rate (v + decay before)`; zero where the rate is.

    Args:
      hyper: of a project hook: the step's learning rate, and the decay after the gradient.
    """
    rate = jnp.asarray(hyper.learning_rate)
    inverse = 1 / jnp.where(rate == 0, 1, rate)

    def one(b: jax.Array, a: jax.Array) -> jax.Array:
        v = (b - a) * inverse.astype(b.dtype) - jnp.asarray(hyper.weight_decay, b.dtype) * b
        return jnp.where(rate == 0, jnp.zeros_like(v), v)

    return jax.tree.map(one, before, after)


def cosines(own: Vectors, a: PyTree, b: PyTree, lengths: PerGroup) -> PerGroup:
    """The cosines between the groups of two trees; 0 where one is zero.

    Args:
      lengths: of the groups of `a`.
    """
    along, squares = own.dot(a, b), own.dot(b, b)
    return {
        name: leaf / (lengths[name] + 1e-8) / (jnp.sqrt(squares[name]) + 1e-8)
        for name, leaf in along.items()
    }


def of_unit_length(values: PerGroup) -> PerGroup:
    """The values of all layers as one vector of length one."""
    length = jnp.sqrt(in_all({name: leaf**2 for name, leaf in values.items()}) + 1e-8) + 1e-8
    return {name: leaf / length for name, leaf in values.items()}
