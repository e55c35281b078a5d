"""The graph of a network's channels, whose edges are single kernels: from one channel to another.

A node is a channel as one layer makes it: the pair (use of a kernel, channel). In a residual
network the last layers of all blocks of a stage add to the same channels, so a channel of the sum
cannot be one node: the blocks between would lead from it back to itself. Instead whatever reads
the sum reads the channel from each layer that added to it before. This is the graph with nodes for
the sums in which each skip connection is an edge of weight 1 that costs nothing, without these
edges. It has no cycles, since a layer only reads what was made before it.

An edge's weight is the operator norm of its kernel times the scale of the norm on its way. What
multiplies the channels of one layer before anything else uses them, such as the scale over the
standard deviation of a batch norm, belongs to the edges into these channels. What multiplies
channels of several layers together, as a norm behind a sum or a join does, belongs to the edges of
the layer that reads them, if all it reads goes through it last. What is left belongs to the links.
So the product along a path has each scale once. Activations, pools and means count as 1.

LEAN prunes along the paths of this graph (Schoonhoven, Hendriksen, Pelt & Batenburg, 2020,
arXiv:2011.06923).
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.errors import PruneError, nearest, quoted
from jaxprune.score.operators import slice_norms
from jaxprune.structure.channel_flow import Flow, Use, channel_flow
from jaxprune.structure.coupling import Coupling, coupling
from jaxprune.structure.function import function_of
from jaxprune.structure.longest_paths import Layer, Link
from jaxprune.types import Problem, PyTree, Weights


class SingleKernels(NamedTuple):
    """The single kernels that a parameter is made of; axes are those of the parameter.

    Attributes:
      path: of the parameter.
      rows: indices along its first axes, where a loop takes a stack of kernels apart; else ().
      inputs: axes that count channels that it reads.
      outputs: axes that count channels that it makes.
      strides: of its other axes, the sides of its window: axis -> stride.
    """

    path: str
    rows: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    strides: Mapping[int, int]


class Weighted(NamedTuple):
    """The numbers of a graph of channels, see `path_order`.

    Attributes:
      edges: of each layer `(inputs, outputs)`, the weights of its edges.
      links: of each layer and each of its links the factors of channels, for scales that belong to
        neither end; None where there are none.
    """

    edges: list[jax.Array]
    links: list[list[jax.Array | None]]


class ChannelGraph(NamedTuple):
    """The channels of a network and the kernels between them.

    Attributes:
      kernels: the single kernels of each layer, in forward order; a layer per use.
      layers: their edges, for `path_order`. Edges are numbered from 0 on in the order of kernels.
      weights: `(params, model_state, *, side=16, scaled=True) -> Weighted`: operator norms on
        periodic images of that side, with the scales on the way or without. For `jit` and `vmap`.
    """

    kernels: tuple[SingleKernels, ...]
    layers: tuple[Layer, ...]
    weights: Callable[..., Weighted]


def channel_graph(
    apply: Problem | Callable[..., PyTree],
    params: PyTree,
    x: PyTree,
    model_state: PyTree = None,
    *,
    scale: Mapping[str, jax.Array] | None = None,
) -> ChannelGraph:
    """Reads the graph of channels off a function; shapes suffice, so it may be called under `jit`.

        graph = channel_graph(apply, params, x)
        weights = graph.weights(params)
        order = path_order(graph.layers, *weights)

    Every kernel that meets an activation in a matrix product or a convolution is a layer. Each of
    its entries along inputs and outputs is an edge; the sides of a window are within an edge. An
    operation that is not known passes channels on from all that it takes.

    Args:
      apply: `(params, x) -> outputs`, or `(params, model_state, x)`, or a `Problem`: its network in
        evaluation mode, where batch norm multiplies by numbers that do not depend on the data.
      params: parameters, arrays or shapes.
      x: inputs, arrays or shapes, with a batch axis.
      model_state: batch statistics and the like.
      scale: path of a kernel -> `(outputs,)`, in place of the scale that is found behind it.

    Raises:
      PruneError: a kernel that is used in two ways, channels in a loop of unknown length, a scale
        of a kernel that is not there.
    """
    apply, model_state = function_of(apply, model_state)
    states = () if model_state is None else (model_state,)

    def forward(params: PyTree, x: PyTree, *states: PyTree) -> PyTree:
        return apply(params, *states, x)

    return graph_of(coupling(forward, params, x, *states, unknown='freeze'), scale=scale)


def graph_of(read: Coupling, *, scale: Mapping[str, jax.Array] | None = None) -> ChannelGraph:
    """The graph of channels of a function that was read, see `channel_graph`."""
    flow = channel_flow(read)
    shapes = {path: tuple(a.size for a in axes) for path, axes in read.parameter_axes.items()}
    given = _given_scales(scale or {}, flow.uses)
    kernels = tuple(
        SingleKernels(use.path, use.rows, use.inputs, use.outputs, _strides(use, shapes[use.path]))
        for use in flow.uses
    )
    layers = tuple(
        Layer(numbers, use.groups, _links(flow.uses, use))
        for use, numbers in zip(flow.uses, _edges(kernels, shapes), strict=True)
    )
    own = _own_scales(flow)
    reading = [_reading(use, layer, own) for use, layer in zip(flow.uses, layers, strict=True)]

    def weights(
        params: PyTree, model_state: PyTree = None, *, side: int = 16, scaled: bool = True
    ) -> Weighted:
        numbers = flow.numbers(*jax.tree.leaves(params), *jax.tree.leaves(model_state))
        norms = _norms(kernels, numbers.kernels, side)
        if not scaled:
            return Weighted(norms, [[None] * len(layer.links) for layer in layers])
        scales = [(s.names, f) for s, f in zip(flow.scales, numbers.factors, strict=True)]
        edges, gains = [], []
        for number, (use, layer) in enumerate(zip(flow.uses, layers, strict=True)):
            names, (shared, ways) = use.reads.reshape(-1), reading[number]
            made = given.get(use.path)
            if made is None:
                made = _largest(scales, [own[number]], use.makes)
            read_ = _largest(scales, [shared], names).reshape(use.groups, -1)
            edges.append(norms[number] * made * jnp.repeat(read_.T, len(made) // use.groups, 1))
            at = [slice(None) if link.read is None else link.read for link in layer.links]
            pairs = zip(ways, at, strict=True)
            gains.append([None if w == [()] else _largest(scales, w, names[k]) for w, k in pairs])
        return Weighted(edges, gains)

    return ChannelGraph(kernels, layers, weights)


def per_kernel(
    graph: ChannelGraph, shapes: Mapping[str, tuple[int, ...]], values: Sequence[jax.Array]
) -> Weights:
    """One value for each single kernel, as arrays that broadcast to the parameters.

    Args:
      shapes: path -> shape of some parameters.
      values: of each layer `(inputs, outputs)`.

    Returns:
      path -> an array of as many axes as the parameter, of length 1 along the sides of a window.

    Raises:
      PruneError: a parameter that is no layer of the graph.
    """
    made: dict[str, dict[tuple[int, ...], jax.Array]] = {path: {} for path in shapes}
    for kernel, value in zip(graph.kernels, values, strict=True):
        if kernel.path in made and kernel.rows not in made[kernel.path]:
            shape = shapes[kernel.path]
            made[kernel.path][kernel.rows] = _spread(kernel, shape, value)
    for path, rows in made.items():
        if not rows:
            raise PruneError(
                f"'{path}' is no layer: no matrix product or convolution takes it entry by entry "
                'with an activation; leave it out, see prunable='
            )
    return {path: _stacked(rows) for path, rows in made.items()}


def window_sides(graph: ChannelGraph) -> dict[str, tuple[int, ...]]:
    """Path -> the axes of a parameter that are sides of a window, and not channels."""
    return {kernel.path: tuple(kernel.strides) for kernel in reversed(graph.kernels)}


def _spread(kernel: SingleKernels, shape: tuple[int, ...], value: jax.Array) -> jax.Array:
    """`(inputs, outputs)` as an array with the axes of the parameter, without its rows."""
    first, axes = len(kernel.rows), (*kernel.inputs, *kernel.outputs)
    value = value.reshape([shape[k] for k in axes])
    value = value.transpose(sorted(range(len(axes)), key=axes.__getitem__))
    return value.reshape([shape[k] if k in axes else 1 for k in range(first, len(shape))])


def _stacked(rows: Mapping[tuple[int, ...], jax.Array]) -> jax.Array:
    """The rows of a parameter that loops take apart, as one array."""
    if list(rows) == [()]:
        return rows[()]
    firsts = sorted({row[0] for row in rows})
    inside = [{row[1:]: value for row, value in rows.items() if row[0] == i} for i in firsts]
    return jnp.stack([_stacked(part) for part in inside])


# --- edges and links ----------------------------------------------------------------------------


def _strides(use: Use, shape: tuple[int, ...]) -> dict[int, int]:
    """The stride of each side of a kernel's window."""
    channels = {*use.inputs, *use.outputs}
    sides = [k for k in range(len(use.rows), len(shape)) if k not in channels]
    return {k: use.strides.get(k, 1) for k in sides}


def _edges(
    kernels: Sequence[SingleKernels], shapes: Mapping[str, tuple[int, ...]]
) -> list[np.ndarray]:
    """The numbers of the edges of each layer; a kernel that is used again has the same."""
    known: dict[tuple[str, tuple[int, ...]], tuple[SingleKernels, np.ndarray]] = {}
    found, first = [], 0
    for kernel in kernels:
        sizes = [
            math.prod(shapes[kernel.path][k] for k in axes)
            for axes in (kernel.inputs, kernel.outputs)
        ]
        if (kernel.path, kernel.rows) not in known:
            numbers = np.arange(first, first + math.prod(sizes), dtype=np.int32).reshape(sizes)
            known[kernel.path, kernel.rows] = kernel, numbers
            first += numbers.size
        before, numbers = known[kernel.path, kernel.rows]
        if (kernel.inputs, kernel.outputs) == (before.outputs, before.inputs):
            numbers = numbers.T
        elif (kernel.inputs, kernel.outputs) != (before.inputs, before.outputs):
            raise PruneError(
                f"'{kernel.path}' is used in two ways: its inputs and outputs are axes "
                f'{before.inputs} and {before.outputs}, and {kernel.inputs} and {kernel.outputs}'
            )
        found.append(numbers)
    return found


def _links(uses: Sequence[Use], use: Use) -> tuple[Link, ...]:
    """Where the inputs of a layer come from.

    Where a layer reads none of an earlier layer's own channels but what was made of them, as
    attention weights, or a mixture of places, each of these channels leads to all that is read.
    """
    links: list[Link] = []
    read = use.reads.reshape(-1)
    for number in sorted(use.reach):
        if number < 0:
            continue
        made, at = _matches(uses[number].makes, read)
        if not len(at):
            links.append(Link(number, None, None))
        while len(at):  # each place at most once in a link
            _, once = np.unique(at, return_index=True)
            links.append(Link(number, made[once], at[once]))
            made, at = np.delete(made, once), np.delete(at, once)
    return tuple(links)


def _matches(made: np.ndarray, read: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of places with the same name, sorted by the place in `read`."""
    order = np.argsort(made, kind='stable')
    low, high = (np.searchsorted(made[order], read, side) for side in ('left', 'right'))
    count = high - low
    at = np.repeat(np.arange(len(read)), count)
    within = np.arange(len(at)) - np.repeat(np.cumsum(count) - count, count)
    return order[np.repeat(low, count) + within], at


# --- weights ------------------------------------------------------------------------------------


def _given_scales(scale: Mapping[str, jax.Array], uses: Sequence[Use]) -> dict[str, jax.Array]:
    """The sizes of the scales that a caller gives, `(outputs,)` each."""
    outputs = {use.path: len(use.makes) for use in uses}
    for path, factors in scale.items():
        if path not in outputs:
            raise PruneError(f'a scale is given for {quoted(path)}: {nearest(path, outputs)}')
        if np.shape(factors) != (outputs[path],):
            raise PruneError(
                f"the scale of '{path}' must have the shape ({outputs[path]},), not "
                f'{np.shape(factors)}'
            )
    return {path: jnp.abs(jnp.asarray(factors)) for path, factors in scale.items()}


def _own_scales(flow: Flow) -> list[tuple[int, ...]]:
    """For each layer the scales that all of its outputs go through first, and nothing else does."""
    ways: list[list[tuple[int, ...]]] = [[] for _ in flow.uses]
    for reach in (*(use.reach for use in flow.uses), flow.ends):
        for number, each in reach.items():
            if number >= 0:
                ways[number] += each
    found = []
    for number, each in enumerate(ways):
        alone = (flow.scales[k].makers == {number} for k in _common(each))
        found.append(_common(each)[: sum(itertools.takewhile(bool, alone))])
    return found


def _common(ways: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The longest beginning that ways share."""
    if not ways:
        return ()
    low, high = min(ways), max(ways)
    same = [a == b for a, b in zip(low, high, strict=False)]
    return low[: same.index(False)] if False in same else low[: len(same)]


#: The names of channels, and the size of the factor of each.
_Factors = Sequence[tuple[np.ndarray, jax.Array]]
#: Ways of channels, each the numbers of the scales on it.
_Ways = Sequence[tuple[int, ...]]


class _Reading(NamedTuple):
    """The scales on what a layer reads, beyond those that its makers account for.

    Attributes:
      shared: those that all of it goes through last.
      links: for each link the ways of its channels before these.
    """

    shared: tuple[int, ...]
    links: tuple[_Ways, ...]


def _reading(use: Use, layer: Layer, own: Sequence[tuple[int, ...]]) -> _Reading:
    """Which scales are where on the ways to a layer."""
    left = {
        number: [way[len(own[number]) if number >= 0 else 0 :] for way in ways]
        for number, ways in use.reach.items()
    }
    turned = [way[::-1] for ways in left.values() for way in ways]
    shared = _common(turned)[::-1]
    links = []
    for link in layer.links:
        ways = {way[: len(way) - len(shared)] for way in left[link.layer]}
        links.append(sorted(ways))
    return _Reading(shared, tuple(links))


def _largest(scales: _Factors, ways: _Ways, names: np.ndarray) -> jax.Array:
    """The largest product of scales over some ways, for channels by their names."""

    def along(way: tuple[int, ...]) -> jax.Array:
        factors = (_looked_up(*scales[number], names) for number in way)
        return functools.reduce(jnp.multiply, factors, jnp.ones(len(names)))

    return functools.reduce(jnp.maximum, map(along, ways))


def _looked_up(known: np.ndarray, factors: jax.Array, names: np.ndarray) -> jax.Array:
    """The factors of channels; of a channel that is not among those scaled, the largest of all."""
    distinct, first, inverse = np.unique(known, return_index=True, return_inverse=True)
    if len(distinct) < len(known):  # at several places of a flattened map
        factors = jnp.zeros(len(distinct), factors.dtype).at[inverse].max(factors)
        first = np.arange(len(distinct))
    at = np.minimum(np.searchsorted(distinct, names), len(distinct) - 1)
    there = distinct[at] == names
    each = factors[first[at]]
    return each if there.all() else jnp.where(there, each, factors.max())


def _norms(
    kernels: Sequence[SingleKernels], arrays: Sequence[jax.Array], side: int
) -> list[jax.Array]:
    """The operator norms of the single kernels of each layer, `(inputs, outputs)`.

    Layers with the same window are computed together: compiling them one by one takes long.
    """
    shapes: list[tuple[int, int]] = []
    alike: dict[tuple, list[tuple[int, jax.Array]]] = {}
    for number, (kernel, leaf) in enumerate(zip(kernels, arrays, strict=True)):
        first = len(kernel.rows)
        sizes = [leaf.shape[k - first] for k in kernel.strides]
        order = (*kernel.strides, *kernel.inputs, *kernel.outputs)
        leaf = leaf.transpose([k - first for k in order])
        inputs = math.prod(leaf.shape[len(sizes) : len(sizes) + len(kernel.inputs)])
        pairs = zip(sizes, kernel.strides.values(), strict=True)
        window = tuple((n, s) for n, s in pairs if n > 1)
        leaf = leaf.reshape(*(n for n, _ in window), 1, -1)
        shapes.append((inputs, leaf.shape[-1] // inputs))
        alike.setdefault((window, leaf.dtype), []).append((number, leaf))
    found: dict[int, jax.Array] = {}
    for (window, _), group in alike.items():
        # The smallest image that holds the kernel and that the stride divides.
        sides = tuple(-(-max(side, n) // s) * s for n, s in window)
        together = jnp.concatenate([leaf for _, leaf in group], axis=-1)
        norms = slice_norms(together, sides, stride=tuple(s for _, s in window))[0]
        ends = np.cumsum([leaf.shape[-1] for _, leaf in group])[:-1]
        parts = jnp.split(norms, ends)
        found |= {n: part.reshape(shapes[n]) for (n, _), part in zip(group, parts, strict=True)}
    return [found[number] for number in range(len(kernels))]
