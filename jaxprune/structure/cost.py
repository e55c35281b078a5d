"""What a network costs: parameters, multiply-accumulates, operations; counted on its jaxpr.

Every operation becomes a product of the sizes of axes. So the cost of a network without some of
its groups is the same sum with smaller sizes, and nothing is traced again.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxprune.errors import PruneError
from jaxprune.jaxpr import trace
from jaxprune.structure.cost_terms import Fixed, Product, Size, Tally, counted
from jaxprune.structure.coupling import Coupling
from jaxprune.structure.function import function_of
from jaxprune.structure.groups import Coupled, Family, by_unit
from jaxprune.structure.units import Axis, found
from jaxprune.types import Problem, PyTree


class Cost(NamedTuple):
    """What one call of a network costs; `print` shows it as a table.

    Attributes:
      params: number of parameters.
      bytes: of parameters and states.
      macs: multiply-accumulates of matrix products and convolutions, nothing else.
      flops: floating-point operations: two per multiply-accumulate, and all others.
      padded_flops: two per multiply-accumulate of matrix products padded to the device's tile.
      by_path: parameter -> its multiply-accumulates; '' has those of products without a
        parameter, as of queries and keys. They sum to `macs`.
    """

    params: int
    bytes: int
    macs: int
    flops: int
    padded_flops: int
    by_path: dict[str, int]

    def __str__(self) -> str:
        rows = [
            ('parameters', self.params),
            ('bytes', self.bytes),
            ('MACs', self.macs),
            ('FLOPs', self.flops),
            ('padded FLOPs', self.padded_flops),
        ]
        wide = max(len(f'{number:,}') for _, number in rows)
        return '\n'.join(f'{name:12}  {number:>{wide},}' for name, number in rows)


def cost(
    apply: Problem | Callable[..., PyTree],
    params: PyTree,
    x: PyTree,
    model_state: PyTree = None,
    *,
    tile: tuple[int, int] = (8, 128),
) -> Cost:
    """Counts what one call of a network costs, for all examples of `x` together.

        print(jp.cost(apply, params, jax.ShapeDtypeStruct((1, 32, 32, 3), 'float32')))

    Papers give the cost of one example: count with a batch of one. Nothing is computed.

    There are two conventions. `macs` is that of most pruning papers, which often call it FLOPs:
    multiply-accumulates of matrix products and convolutions. Biases, batch norm, activations and
    pooling are not in it. `flops` has two for each of these, and one for each entry of

    - the result of an operation on floating-point numbers, whichever it is: a sum, a division, an
      exponential. So biases, batch norm, softmax and activations count, as the program has them;
    - what is reduced, as in a mean, or summed along; for pooling, of each window.

    Comparisons, selections, casts, copies, indexing, sorting, random numbers and operations on
    integers are free.

    A convolution counts kernel sides x inputs / groups x outputs x output positions. What is
    padded counts as computed, and so do the zeros that a transposed convolution puts between the
    inputs, and those that a mask leaves in a dense array. Loops with a fixed number of steps count
    every step, of several branches the one with most `flops`.

    `padded_flops` is two per multiply-accumulate of products (M, K) x (K, N) with M rounded up to
    a multiple of `tile[0]`, K and N to multiples of `tile[1]`. N counts the outputs of the factor
    that is made of parameters; without one, of the right factor. A convolution is the product of
    its patches: M has examples and positions, K kernel sides and inputs. Batches of products and
    groups of a convolution are products of their own.

    Args:
      apply: `(params, x) -> outputs`, or `(params, model_state, x)` if there is a state. Any
        function of arrays; one with gradients is counted with them. Or a `Problem`: its network in
        evaluation mode.
      params: parameters, arrays or shapes. In `by_path`, a factor made of several counts for the
        one with most axes.
      x: inputs, arrays or shapes.
      model_state: batch statistics and the like.
      tile: rows and columns of the device's smallest array: 8 x 128 on a TPU, in float32.

    Raises:
      PruneError: a `while` loop, which may run any number of times; an operation whose cost is
        not known, with its place.
    """
    _check_tile(tile)
    apply, model_state = function_of(apply, model_state)
    states = () if model_state is None else (model_state,)

    def forward(params: PyTree, x: PyTree, *states: PyTree) -> PyTree:
        return apply(params, *states, x)

    traced = trace(forward, params, x, *states)
    shapes = [var.aval.shape for var in traced.jaxpr.jaxpr.invars]
    ranks = dict(zip(traced.paths, map(len, shapes), strict=False))
    tally = counted(traced.jaxpr, _sources(traced.paths, len(shapes), traced.constants), ranks)
    types = [var.aval.dtype.itemsize for var in traced.jaxpr.jaxpr.invars]
    leaves = _Leaves(list(zip(shapes, types, strict=True)), len(traced.paths), traced.constants)
    return _summed(leaves, tally, int, tile)


def cost_of_kept(
    read: Coupled, *, tile: tuple[int, int] = (8, 128)
) -> Callable[[Mapping[str, Sequence[int]]], Cost]:
    """Prepares the cost of a network without some of its groups: for many selections of them.

        without = cost_of_kept(jp.groups(apply, params, x))
        without({}), without({'conv/kernel': [0, 3]})

    Each call takes well under a millisecond for a small network. It equals
    `cost(small.apply, small.params, x)` of the network that `compact` makes.

    Args:
      read: the groups, for the `x` that is counted.
      tile: see `cost`.

    Returns:
      `removed -> Cost`, where `removed` has family -> numbers of the groups that are gone, as
      `removed_groups` finds them in masks.

    Raises:
      PruneError: see `cost`; when called, groups that there are not, or that have to stay.
    """
    _check_tile(tile)
    axes, leaves, tally = _read(read)
    families = {family.name: family for family in read.families}

    def without(removed: Mapping[str, Sequence[int]]) -> Cost:
        units: set[int] = set()
        for name, numbers in removed.items():
            if name not in families:
                raise PruneError(f"there is no family of groups '{name}'")
            own, reason = families[name].units, families[name].reason
            if reason and len(numbers):
                raise PruneError(f"'{name}' has to stay: {reason}")
            if any(not 0 <= n < len(own) for n in numbers):
                raise PruneError(f"'{name}' has {len(own)} groups, not all of {list(numbers)}")
            units.update(own[n] for n in numbers)
        left = axes.left(units)
        return _summed(leaves, tally, lambda size: left.get(size, size), tile)

    return without


#: What `cost_shares` measures.
COSTS = ('params', 'flops')


def cost_shares(
    read: Coupled, names: Sequence[str]
) -> Callable[[Mapping[str, jax.Array]], dict[str, jax.Array]]:
    """Prepares the cost of what is left of a network, as a share, for `jit` and `vmap`.

    Args:
      read: the groups.
      names: the families of which groups may go.

    Returns:
      `kept -> {'params': share, 'flops': share}`, float32, where `kept` has family -> bool
      `(groups,)`. Up to rounding they are those of `cost_of_kept`.
    """
    axes, leaves, tally = _read(read)
    families = [family for family in read.families if family.name in names]
    numbers = {axis: axes.numbers(axis, families) for axis in axes.known()}
    whole = axes.left(set())
    dense = _summed(leaves, tally, lambda size: whole.get(size, size), (1, 1))

    def shares(kept: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        longer = {name: jnp.append(kept[name], True) for name in names}

        def length(axis: Axis) -> jax.Array:
            there = jnp.ones(axis.size, bool)
            for name, groups in numbers[axis].items():
                there &= longer[name][groups]
            return there.sum(dtype=jnp.float32)

        lengths = {axis: length(axis) for axis in numbers}

        def size(one: Size) -> ArrayLike:
            return lengths[one] if isinstance(one, Axis) else float(one)

        params = sum(math.prod(map(size, sizes)) for sizes, _ in leaves.arrays[: leaves.params])
        return {'params': params / dense.params, 'flops': _flops(tally, size) / dense.flops}

    return shares


def _flops(tally: Tally, size: Callable[[Size], ArrayLike]) -> ArrayLike:
    """The operations at sizes that may be traced."""
    total = 0.0
    for product, times in tally.products.items():
        sides = (*product.rows, *product.inner, *product.columns)
        total += 2.0 * times * math.prod(map(size, sides))
    for sizes, times in tally.entries.items():
        total += float(times) * math.prod(map(size, sizes))
    for branches, times in tally.choices:
        each = [_flops(branch, size) for branch in branches]
        total += float(times) * functools.reduce(jnp.maximum, each)
    return total


def _read(read: Coupled) -> tuple['_Axes', '_Leaves', Tally]:
    """The axes, the arguments and the operations of a network."""
    coupling, traced = read.coupling, read.coupling.traced
    axes = _Axes(coupling)
    arguments = [tuple(map(axes.size, own)) for own in coupling.axes]
    ranks = dict(zip(traced.paths, map(len, arguments), strict=False))
    sources = _sources(traced.paths, len(arguments), traced.constants)
    tally = counted(traced.jaxpr, sources, ranks, coupling.visits, axes.size)
    types = [var.aval.dtype.itemsize for var in traced.jaxpr.jaxpr.invars]
    arrays = list(zip(arguments, types, strict=True))
    return axes, _Leaves(arrays, len(traced.paths), traced.constants), tally


def _check_tile(tile: tuple[int, int]) -> None:
    if len(tile) != 2 or any(not isinstance(n, int) or n < 1 for n in tile):
        raise PruneError(f'tile must be two whole numbers from 1 on, not {tile}')


def _sources(paths: Sequence[str], count: int, constants: int) -> list[Fixed]:
    """What each argument is made of: a parameter, the inputs, nothing but states."""
    made: list[Fixed] = [frozenset({path}) for path in paths]
    made += [None] * (count - len(paths) - constants)
    return made + [frozenset()] * constants


# --- sizes ------------------------------------------------------------------------------------


class _Axes:
    """The axes of a reading whose indices may go; axes with the same units are one."""

    def __init__(self, coupling: Coupling) -> None:
        self._units = coupling.units
        self._known: dict[bytes, Axis] = {}
        #: Unit -> the axes that it shortens.
        self._of: dict[int, list[Axis]] = {}
        self._indices: dict[Axis, dict[int, frozenset[int]]] = {}

    def size(self, axis: Axis) -> Size:
        """A number if no index can go, else the axis that stands for all that are alike."""
        axis = found(axis)
        if axis.units is None:
            return axis.size
        roots = self._units.roots(axis.units)
        if not roots.any():
            return axis.size
        key = roots.tobytes()
        if key not in self._known:
            self._known[key] = axis
            at = by_unit(self._units, axis.units)
            self._indices[axis] = {unit: frozenset(k.tolist()) for unit, k in at.items()}
            for unit in at:
                self._of.setdefault(unit, []).append(axis)
        return self._known[key]

    def known(self) -> list[Axis]:
        """The axes whose indices may go, one of all that are alike."""
        return list(self._indices)

    def numbers(self, axis: Axis, families: Sequence[Family]) -> dict[str, np.ndarray]:
        """Family -> the group of each index; the number of groups where it belongs to none."""
        made = {}
        for family in families:
            own = [self._indices[axis].get(unit, ()) for unit in family.units]
            if any(own):
                made[family.name] = np.full(axis.size, len(own), np.int32)
                for group, indices in enumerate(own):
                    made[family.name][list(indices)] = group
        return made

    def left(self, removed: set[int]) -> dict[Size, int]:
        """The sizes of all axes without some units."""
        lost: dict[Axis, set[int]] = {axis: set() for axis in self._indices}
        for unit in removed:
            for axis in self._of.get(unit, ()):
                lost[axis] |= self._indices[axis][unit]
        return {axis: axis.size - len(gone) for axis, gone in lost.items()}


# --- sums ---------------------------------------------------------------------------------------


class _Leaves(NamedTuple):
    """The arguments of a function.

    Attributes:
      arrays: sizes and bytes per entry of each: parameters, inputs, states.
      params: how many are parameters.
      states: how many are states.
    """

    arrays: list[tuple[tuple[Size, ...], int]]
    params: int
    states: int


def _summed(
    leaves: _Leaves, tally: Tally, size: Callable[[Size], int], tile: tuple[int, int]
) -> Cost:
    """The cost at some sizes."""

    def entries(arrays: Sequence[tuple[tuple[Size, ...], int]], by_bytes: bool) -> int:
        return sum(math.prod(map(size, sizes)) * (n if by_bytes else 1) for sizes, n in arrays)

    params = leaves.arrays[: leaves.params]
    states = leaves.arrays[len(leaves.arrays) - leaves.states :]
    total = _total(tally, size, tile)
    return Cost(
        params=entries(params, False),
        bytes=entries([*params, *states], True),
        macs=sum(total.by_path.values()),
        flops=total.flops,
        padded_flops=total.padded,
        by_path=total.by_path,
    )


class _Total(NamedTuple):
    flops: int
    padded: int
    by_path: dict[str, int]


def _total(tally: Tally, size: Callable[[Size], int], tile: tuple[int, int]) -> _Total:
    flops = padded = 0
    by_path: dict[str, int] = {}

    def add(path: str, macs: int) -> None:
        by_path[path] = by_path.get(path, 0) + macs

    for product, times in tally.products.items():
        macs, whole = _macs(product, size, tile)
        flops += 2 * macs * times
        padded += 2 * whole * times
        add(product.path, macs * times)
    for sizes, times in tally.entries.items():
        flops += times * math.prod(map(size, sizes))
    for branches, times in tally.choices:
        most = max((_total(b, size, tile) for b in branches), key=lambda total: total.flops)
        flops += times * most.flops
        padded += times * most.padded
        for path, macs in most.by_path.items():
            add(path, times * macs)
    return _Total(flops, padded, by_path)


def _macs(product: Product, size: Callable[[Size], int], tile: tuple[int, int]) -> tuple[int, int]:
    """The multiply-accumulates of a product, and with its sides rounded up."""
    rows, inner, columns, batch, per = (math.prod(map(size, sizes)) for sizes in product[1:])
    groups = batch // per if batch else 0
    if not groups:
        return 0, 0

    def up(number: int, multiple: int) -> int:
        return -(-number // multiple) * multiple

    whole = groups * up(rows, tile[0]) * up(inner, tile[1]) * up(columns // groups, tile[1])
    return rows * inner * columns, whole
