"""The products of a network: every kernel with the numbers that it reads, off the traced function.

A score that looks at single activations needs both sides of each product, in one form whatever the
layout: kernels stored (out, in), grouped and depthwise convolutions, dense kernels along sequences.
"""

import math
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn, Literal, Var

from jaxprune.jaxpr import bind, interpret, trace
from jaxprune.tree import put
from jaxprune.types import Problem, View

#: From a kernel's values to those of the leaves that it is made of, by path.
Back = Callable[[jax.Array], dict[str, jax.Array]]

#: Operations after which every entry is still of the same weight, at the same place.
_SAME = frozenset(
    {'convert_element_type', 'copy', 'copy_p', 'reduce_precision', 'sharding_constraint'}
    | {'neg', 'abs', 'select_n', 'mul', 'div', 'add', 'sub', 'max', 'min'}
)
#: Operations that put entries elsewhere, each at most once.
_MOVES = frozenset(
    {'transpose', 'reshape', 'squeeze', 'expand_dims', 'rev', 'pad', 'slice', 'dynamic_slice'}
    | {'split', 'concatenate'}
)


class Product(NamedTuple):
    """A kernel in a matrix product or a convolution, with what it reads.

    At position p, output o of group g is the sum of `kernel[g, c, t, o] * patches[g, p, c, t]` over
    channels c and taps t. A dense kernel has one tap, a depthwise convolution one channel in each
    group.

    Attributes:
      kernel: `(groups, channels, taps, outputs)`, the numbers that the network multiplies with.
      operand: the array that the kernel reads, as the network has it.
      patches: operand -> `(groups, positions, channels, taps)`.
      positions: at how many places the kernel is used: patches of an image, tokens, examples.
      leaves: values shaped like `kernel` -> path -> values shaped like the leaf, zero where the
        product does not use it.
    """

    kernel: jax.Array
    operand: jax.Array
    patches: Callable[[jax.Array], jax.Array]
    positions: int
    leaves: Back


def products(
    problem: Problem, view: View, x: jax.Array, paths: Container[str] | None = None
) -> list[Product]:
    """Runs a network in evaluation mode and returns its products, in forward order.

    A kernel that is used twice has two products. A kernel is followed through what moves its
    entries or changes them in place: transposed, reshaped, cut, masked, standardised. After
    anything else (a product with another kernel, numbers that depend on the input, a branch of a
    condition) it is lost, and has no product.

    Args:
      problem: the network.
      view: what it computes with.
      x: inputs `(batch, ...)`; their positions are counted together.
      paths: of the parameters that are kernels; None for the prunable ones.
    """
    kernels = view.weights if paths is None else paths
    params = put(view.params, view.weights)

    def forward(params, x, model_state):
        return problem.apply(params, model_state, x, train=False, key=None)[0]

    traced = trace(forward, params, x, view.model_state)
    found: list[Product] = []

    def rule(equation: JaxprEqn, values: list[_Value]) -> list[_Value]:
        outputs = bind(equation, *[v.array for v in values])
        product = _met(equation, values)
        if product is not None:
            found.append(product)
        varies = any(v.varies for v in values)
        backs = [None] * len(outputs) if varies else _followed(equation, values, outputs)
        return [_Value(*both, varies) for both in zip(outputs, backs, strict=True)]

    def scan(equation, values, step):
        if any(v.back is not None for v in values):
            return None
        varies = any(v.varies for v in values)
        return [_Value(out, None, varies) for out in bind(equation, *[v.array for v in values])]

    leaves = zip(traced.paths, jax.tree.leaves(params), strict=True)
    args = [_Value(leaf, _start(path) if path in kernels else None) for path, leaf in leaves]
    args += [_Value(leaf, None, True) for leaf in jax.tree.leaves(x)]
    args += [_Value(leaf, None) for leaf in jax.tree.leaves(view.model_state)]
    interpret(traced.jaxpr, args, rule, _constant, scan)
    return found


class _Value(NamedTuple):
    """An array on its way.

    Attributes:
      array: its numbers.
      back: where it is made of kernels, the way back to them.
      varies: does it depend on the input?
    """

    array: Any
    back: Back | None
    varies: bool = False


def _start(path: str) -> Back:
    return lambda values: {path: values}


def _constant(array: Any, atom: Literal | Var) -> _Value:
    # A Python number would take part with a type of its own.
    return _Value(np.asarray(array, atom.aval.dtype) if isinstance(atom, Literal) else array, None)


def largest(parts: Iterable[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """The entrywise largest of values by path."""
    made: dict[str, jax.Array] = {}
    for part in parts:
        for path, leaf in part.items():
            made[path] = jnp.maximum(made[path], leaf) if path in made else leaf
    return made


# --- where the entries of a kernel go -------------------------------------------------------------


def _followed(
    equation: JaxprEqn, values: Sequence[_Value], outputs: Sequence[jax.Array]
) -> list[Back | None]:
    """How to get back from each output to the leaves; None where a kernel is lost."""
    name = equation.primitive.name
    kernels = [(i, v) for i, v in enumerate(values) if v.back is not None]
    if not kernels:
        return [None] * len(outputs)
    if name in _MOVES:
        return [_moved(equation, values, i) for i in range(len(outputs))]
    _, (array, back, _) = kernels[0]
    if name == 'broadcast_in_dim':
        return [_repeated(equation, array.shape, back)]
    one = all(v.back is back for _, v in kernels)
    if name in _SAME and one and outputs[0].shape == array.shape:
        return [back]
    return [None] * len(outputs)


def _moved(equation: JaxprEqn, values: Sequence[_Value], output: int) -> Back:
    """Back through an operation that moves entries: its transpose puts them where they were."""
    kernels = [i for i, v in enumerate(values) if v.back is not None]

    def back(moved: jax.Array) -> dict[str, jax.Array]:
        def move(*arrays):
            given = [_like(v.array, moved) for v in values]
            for i, array in zip(kernels, arrays, strict=True):
                given[i] = array
            return bind(equation, *given)[output]

        shapes = [jax.ShapeDtypeStruct(values[i].array.shape, moved.dtype) for i in kernels]
        before = jax.linear_transpose(move, *shapes)(moved)
        return largest(values[i].back(b) for i, b in zip(kernels, before, strict=True))

    return back


def _like(array: Any, other: jax.Array) -> Any:
    """An array of numbers in the type of another; indices stay as they are."""
    floating = jnp.issubdtype(jnp.result_type(array), jnp.floating)
    return jnp.asarray(array, other.dtype) if floating else array


def _repeated(equation: JaxprEqn, shape: tuple[int, ...], back: Back) -> Back:
    """Back from copies of a kernel: the largest of them."""
    dimensions, after = equation.params['broadcast_dimensions'], equation.params['shape']
    kept = {d for d, n in zip(dimensions, shape, strict=True) if after[d] == n}
    copies = tuple(i for i in range(len(after)) if i not in kept)
    return lambda values: back(values.max(copies).reshape(shape))


# --- products in one form -------------------------------------------------------------------------


def _met(equation: JaxprEqn, values: Sequence[_Value]) -> Product | None:
    """The product that an operation is; None for others, and where no kernel takes part or two."""
    form = _FORMS.get(equation.primitive.name)
    kernels = [i for i, v in enumerate(values) if v.back is not None]
    if form is None or len(kernels) != 1:
        return None
    (place,) = kernels
    read = form(equation, place)
    if read is None:
        return None
    arrange, patches, positions = read
    array, back, _ = values[place]
    shape = array.shape

    def leaves(arranged: jax.Array) -> dict[str, jax.Array]:
        like = jax.ShapeDtypeStruct(shape, arranged.dtype)
        return back(jax.linear_transpose(arrange, like)(arranged)[0])

    return Product(arrange(array), values[1 - place].array, patches, positions, leaves)


_Form = tuple[Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array], int]


def _dense(equation: JaxprEqn, place: int) -> _Form:
    """A matrix product; axes that both factors share are groups."""
    contracting, batch = equation.params['dimension_numbers']
    shapes = [var.aval.shape for var in equation.invars]

    def free(i: int) -> list[int]:
        return [d for d in range(len(shapes[i])) if d not in (*contracting[i], *batch[i])]

    def size(i: int, axes: Iterable[int]) -> int:
        return math.prod(shapes[i][d] for d in axes)

    other = 1 - place
    groups, channels = size(place, batch[place]), size(place, contracting[place])
    outputs, positions = size(place, free(place)), size(other, free(other))

    def arrange(kernel: jax.Array) -> jax.Array:
        turned = kernel.transpose(*batch[place], *contracting[place], *free(place))
        return turned.reshape(groups, channels, 1, outputs)

    def patches(operand: jax.Array) -> jax.Array:
        turned = operand.transpose(*batch[other], *free(other), *contracting[other])
        return turned.reshape(groups, positions, channels, 1)

    return arrange, patches, positions


def _conv(equation: JaxprEqn, place: int) -> _Form | None:
    """A convolution of any layout, stride, padding, dilation and number of groups."""
    params = equation.params
    if place != 1 or params['batch_group_count'] != 1:
        return None
    numbers, groups = params['dimension_numbers'], params['feature_group_count']
    shape = equation.invars[1].aval.shape
    outputs, channels, *sides = (shape[i] for i in numbers.rhs_spec)
    batch, _, *places = (equation.outvars[0].aval.shape[i] for i in numbers.out_spec)
    taps, positions = math.prod(sides), batch * math.prod(places)

    def arrange(kernel: jax.Array) -> jax.Array:
        turned = kernel.transpose(*numbers.rhs_spec)
        turned = turned.reshape(groups, outputs // groups, channels, taps)
        return turned.transpose(0, 2, 3, 1)

    def patches(operand: jax.Array) -> jax.Array:
        image = operand.transpose(*numbers.lhs_spec)
        pads = [
            (low, high, step - 1)
            for (low, high), step in zip(params['padding'], params['lhs_dilation'], strict=True)
        ]
        image = lax.pad(image, jnp.zeros((), image.dtype), [(0, 0, 0), (0, 0, 0), *pads])

        def seen_by(tap: Sequence[int]) -> jax.Array:
            steps = params['window_strides']
            first = [t * d for t, d in zip(tap, params['rhs_dilation'], strict=True)]
            last = [f + (n - 1) * s + 1 for f, n, s in zip(first, places, steps, strict=True)]
            return lax.slice(image, [0, 0, *first], [*image.shape[:2], *last], [1, 1, *steps])

        seen = jnp.stack([seen_by(tap) for tap in np.ndindex(*sides)])
        seen = seen.reshape(taps, batch, groups, channels, positions // batch)
        return seen.transpose(2, 1, 4, 3, 0).reshape(groups, positions, channels, taps)

    return arrange, patches, positions


_FORMS = {'dot_general': _dense, 'conv_general_dilated': _conv}
