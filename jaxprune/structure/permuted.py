"""A network with its units in another order: the same function, other arrays."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from jaxprune import tree
from jaxprune.errors import PruneError, lookup, quoted, shown
from jaxprune.structure.coupling import returned_states
from jaxprune.structure.groups import Coupled
from jaxprune.types import PyTree

#: Family -> permutation: position i gets what is at position `order[i]`.
Orders = Mapping[str, Any]
#: Path -> pairs of an axis and the indices that are taken along it, in this order.
Maps = dict[str, list[tuple[int, np.ndarray]]]
#: Random networks and inputs that are tried in both orders.
_TRIALS = 8


def permuted(
    coupled: Coupled, params: PyTree, orders: Orders, model_state: PyTree = None
) -> tuple[PyTree, PyTree]:
    """Puts the units of families in another order, with all that belongs to them.

    A channel moves with the filter that makes it, biases, scales, statistics and the rows of every
    kernel that reads it, so the network computes what it did. At a residual sum all layers that add
    up move together: they are one family.

        params, model_state = permuted(coupled, params, {'conv/kernel': order}, model_state)

    Units may go together without being interchangeable: a function may treat half of its channels
    in another way, or multiply them by numbers that are no parameters, as rotary embeddings do. So
    the traced program runs with random parameters and inputs, eight times in both orders, and what
    differs is an error.

    Args:
      coupled: the groups of the network, see `groups`. Units that a norm runs over may change their
        order where they were read with `normalisation='sliced'`.
      params: parameters, arrays of NumPy or JAX.
      orders: family -> permutation of its groups: position i gets group `order[i]`.
      model_state: batch statistics and the like.

    Returns:
      `(params, model_state)` in the new order.

    Raises:
      PruneError: an unknown family, one whose groups have to stay, units that are not
        interchangeable, an order that is no permutation.
    """
    maps = index_maps(coupled, orders)
    if maps and (error := probe(coupled)(orders)):
        names = ', '.join(map(quoted, orders))
        raise PruneError(f'the units of {names} are not interchangeable: {error}')
    return moved_tree(params, maps), moved_tree(model_state, maps)


def permuted_masks(
    coupled: Coupled, masks: Mapping[str, Any], orders: Orders
) -> dict[str, np.ndarray | jax.Array]:
    """Masks, or scores, of a network whose units `permuted` puts in another order.

    Args:
      coupled, orders: as of `permuted`.
      masks: path -> array of the shape of that parameter.
    """
    maps = index_maps(coupled, orders)
    return {path: _moved(path, leaf, maps.get(path, ())) for path, leaf in masks.items()}


def permuted_moments(coupled: Coupled, opt_state: PyTree, params: PyTree, orders: Orders) -> PyTree:
    """The state of an optax optimizer of a network whose units `permuted` puts in another order.

    Args:
      coupled, orders: as of `permuted`.
      opt_state: the optimizer's state.
      params: the parameters that it belongs to, in either order.

    Raises:
      PruneError: a moment of which it is not known what belongs to which weight.
    """
    maps = index_maps(coupled, orders)

    def move(path: str, leaf: Any, shape: tuple[int, ...]) -> Any:
        first = jnp.ndim(leaf) - len(shape)
        if path in maps and (first < 0 or jnp.shape(leaf)[first:] != shape):
            if jnp.size(leaf) == 1:
                return leaf
            raise PruneError(
                f"the optimizer's state of '{path}' has shape {jnp.shape(leaf)}: which part of it "
                'belongs to which weight is not known'
            )
        return _moved(path, leaf, maps.get(path, ()), first)

    return tree.map_moments(move, opt_state, params)


# --- what moves where ---------------------------------------------------------------------------


def index_maps(coupled: Coupled, orders: Orders) -> Maps:
    """For each parameter and state what is taken along its axes.

    Raises:
      PruneError: see `permuted`.
    """
    families = {family.name: family for family in coupled.families}
    axes = {**coupled.coupling.parameter_axes, **coupled.coupling.state_axes}
    maps: Maps = {}
    for name, order in orders.items():
        family = lookup('family', name, families)
        if family.reason:
            raise PruneError(f'the groups of {quoted(name)} have to stay: {family.reason}')
        order = np.asarray(order)
        if not np.array_equal(np.sort(order, axis=None), np.arange(family.size)):
            raise PruneError(
                f'the order of {quoted(name)} must be a permutation of 0 to {family.size - 1}, '
                f'not {shown(order)}'
            )
        for member in family.members:
            at = np.stack(member.indices)
            take = np.arange(axes[member.path][member.axis].size)
            take[at] = at[order]
            maps.setdefault(member.path, []).append((member.axis, take))
    return maps


def moved_tree(leaves: PyTree, maps: Maps) -> PyTree:
    """A tree of arrays in another order."""
    moved = [_moved(path, leaf, maps.get(path, ())) for path, leaf in tree.paths(leaves)]
    return jax.tree.unflatten(jax.tree.structure(leaves), moved)


def _moved(path: str, leaf: Any, moves: Iterable[tuple[int, np.ndarray]], first: int = 0) -> Any:
    """An array in another order; its axes are counted from `first`."""
    for axis, take in moves:
        if np.ndim(leaf) <= first + axis or np.shape(leaf)[first + axis] != len(take):
            raise PruneError(
                f"'{path}' has shape {np.shape(leaf)}, but {len(take)} indices along axis {axis}"
            )
        numpy = np if isinstance(leaf, np.ndarray) else jnp
        leaf = numpy.take(leaf, take, first + axis)
    return leaf


# --- may units change places? -------------------------------------------------------------------


def probe(coupled: Coupled) -> Callable[[Orders], str]:
    """A test whether a network computes the same in another order: `orders -> what differs`, or ''.

    The traced program is compiled once and runs on the CPU, where products are not rounded to fewer
    digits. Parameters are drawn too, so that zeros in the given ones hide nothing; some trials
    differ, since an input may not reach everything, such as all experts.
    """
    read = coupled.coupling
    inputs = range(len(read.traced.paths), len(read.traced.paths) + read.traced.inputs)
    names = [*read.traced.paths, *([''] * len(inputs)), *read.state_paths]
    returned = [''] * len(read.traced.jaxpr.out_avals)
    if returned_states(read):
        returned[len(returned) - len(read.state_paths) :] = read.state_paths
    program = jax.jit(jaxpr_as_fun(read.traced.jaxpr))

    def run(trial: int, maps: Maps) -> list[np.ndarray]:
        rng = np.random.default_rng(trial)
        leaves = []
        for i, (name, aval) in enumerate(zip(names, read.traced.jaxpr.in_avals, strict=True)):
            scale = 1.0 if i in inputs else _scale(aval) if i < inputs.start else None
            leaves.append(_moved(name, _drawn(rng, aval, scale), maps.get(name, ())))
        with jax.default_device(_processor()):
            return [np.asarray(out) for out in program(*leaves)]

    given = [run(trial, {}) for trial in range(_TRIALS)]

    def differs(orders: Orders) -> str:
        maps = index_maps(coupled, orders)
        for trial, before in enumerate(given):
            wanted = [_moved(n, a, maps.get(n, ())) for n, a in zip(returned, before, strict=True)]
            for one, other in zip(wanted, run(trial, maps), strict=True):
                if why := _difference(one, other):
                    return why
        return ''

    return differs


def _difference(wanted: np.ndarray, found: np.ndarray) -> str:
    """What differs by more than rounding."""
    dtype = wanted.dtype
    exact = not jnp.issubdtype(dtype, jnp.inexact)
    # Far above rounding, and far below what units in wrong places change.
    tolerance = 0.0 if exact else float(jnp.finfo(dtype).eps) ** 0.5
    wanted, found = (a.astype(np.complex128).ravel() for a in (wanted, found))
    if not np.isfinite(wanted).all():
        return 'with random parameters the outputs are not finite'
    error, size = np.linalg.norm(found - wanted), np.linalg.norm(wanted)
    if error <= tolerance * size:
        return ''
    return f'in another order the outputs change by {error / max(size, 1e-30):.1%}'


def _drawn(rng: np.random.Generator, aval: Any, scale: float | None) -> Any:
    """An array of normal numbers of some scale; without scale between 0.5 and 1.5."""
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
        return jax.random.split(jax.random.key(0), aval.shape)
    if not jnp.issubdtype(aval.dtype, jnp.inexact):
        return rng.integers(0, 2, aval.shape).astype(aval.dtype)
    if scale is None:  # variances and the like
        return rng.uniform(0.5, 1.5, aval.shape).astype(aval.dtype)
    return (scale * rng.standard_normal(aval.shape)).astype(aval.dtype)


def _scale(aval: Any) -> float | None:
    """Of a kernel's numbers, so that activations stay of moderate size; None for vectors."""
    return max(math.prod(aval.shape[:-1]), 1) ** -0.5 if len(aval.shape) > 1 else None


def _processor() -> jax.Device | None:
    try:
        return jax.local_devices(backend='cpu')[0]
    except RuntimeError:  # the process was told to have none
        return None
