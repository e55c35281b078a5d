"""Which layers a network has, in forward order, and which axes of their kernels are contracted.

A parameter tree is sorted by name and says neither. Both are read off the traced network.
"""

import math
from typing import NamedTuple

from jax.extend.core import JaxprEqn

from jaxprune.jaxpr import interpret, scan_counts, trace
from jaxprune.score.loss import one_input
from jaxprune.types import Batches, Problem, View

#: Operations after which every entry is still the same weight, at the same place.
_SAME = frozenset(
    {'convert_element_type', 'copy', 'stop_gradient', 'abs', 'neg', 'select_n', 'mul'}
)


class Layer(NamedTuple):
    """A prunable kernel at its first use in a matrix product or a convolution.

    Attributes:
      path: of the kernel.
      contracted: axes that are summed over: the inputs, and the sides of a convolution.
      inputs: those of them that count units of the layer before.
      outputs: axes that count units of this layer.
      groups: feature groups of a convolution; a depthwise one has as many as inputs.
    """

    path: str
    contracted: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    groups: int


class Kernel(NamedTuple):
    """A kernel on its way: for each axis of the array, the axes of the leaf that it is made of."""

    path: str
    axes: tuple[tuple[int, ...], ...]


def forward_layers(problem: Problem, view: View, batches: Batches | None) -> list[Layer]:
    """The layers of a network in the order in which its inputs meet them.

    Reads shapes only, so a score may call it inside `jit` and `vmap`. Kernels that meet the input
    in no product, or after they were mixed with others, are left out.

    Raises:
      PruneError: no batches, which the shape of an input is read from.
    """
    like = one_input(batches, 'the order of layers')

    def forward(params, x, model_state):
        return problem.apply(params, model_state, x[None], train=False, key=None)[0]

    traced = trace(forward, view.params, like, view.model_state)
    found: dict[str, Layer] = {}

    def rule(equation: JaxprEqn, values: list[Kernel | None]) -> list[Kernel | None]:
        kernels = [(i, v) for i, v in enumerate(values) if v is not None]
        lost = [None] * len(equation.outvars)
        if len(kernels) != 1:
            return lost
        place, kernel = kernels[0]
        if equation.primitive.name in ('dot_general', 'conv_general_dilated'):
            layer = _met(equation, place, kernel)
            found.setdefault(layer.path, layer)
            return lost
        axes = moved(equation, place, kernel.axes)
        return lost if axes is None else [Kernel(kernel.path, axes)]

    def scan(equation, values, step):  # one step shows all layers; rows of stacked kernels too
        if not equation.params['length']:
            return None
        rows = sum(scan_counts(equation))
        slices = [v and (Kernel(v.path, v.axes[1:]) if v.axes else None) for v in values[rows:]]
        step([*values[:rows], *slices])
        return [None] * len(equation.outvars)

    shapes = {path: leaf.ndim for path, leaf in view.weights.items()}
    args = [
        Kernel(path, tuple((i,) for i in range(shapes[path]))) if path in shapes else None
        for path in traced.paths
    ]
    args += [None] * (traced.inputs + traced.constants)
    interpret(traced.jaxpr, args, rule, lambda array, atom: None, scan)
    return list(found.values())


def _met(equation: JaxprEqn, place: int, kernel: Kernel) -> Layer:
    """The layer that a product makes of a kernel."""
    params = equation.params
    if equation.primitive.name == 'dot_general':
        contracting, batch = (both[place] for both in params['dimension_numbers'])
        inputs, groups = contracting, 1
        outputs = [i for i in range(len(kernel.axes)) if i not in (*contracting, *batch)]
    else:
        first, second, *sides = params['dimension_numbers'].rhs_spec
        outputs, inputs, groups = [first], [second], params['feature_group_count']
        contracting = [second, *sides]

    def of_leaf(places) -> tuple[int, ...]:
        return tuple(sorted(axis for i in places for axis in kernel.axes[i]))

    return Layer(kernel.path, of_leaf(contracting), of_leaf(inputs), of_leaf(outputs), groups)


def moved(
    equation: JaxprEqn, place: int, axes: tuple[tuple[int, ...], ...]
) -> tuple[tuple[int, ...], ...] | None:
    """Where the axes of a kernel lie after an operation; None where that is not followed.

    Args:
      equation: an operation.
      place: which of its operands the kernel is.
      axes: see `Kernel`.
    """
    name, params = equation.primitive.name, equation.params
    before, after = equation.invars[place].aval.shape, equation.outvars[0].aval.shape
    if name in _SAME and before == after:
        return axes
    if name == 'transpose':
        return tuple(axes[i] for i in params['permutation'])
    if name == 'squeeze':
        return tuple(a for i, a in enumerate(axes) if i not in params['dimensions'])
    if name == 'broadcast_in_dim':
        found = dict(zip(params['broadcast_dimensions'], axes, strict=True))
        return tuple(found.get(i, ()) for i in range(len(after)))
    if name == 'reshape':
        return _merged(before, after, axes)
    return None


def _merged(before, after, axes) -> tuple[tuple[int, ...], ...] | None:
    """Axes after a reshape that joins neighbours; None if it cuts an axis in parts."""
    found, left = [], list(zip(before, axes, strict=True))
    for size in after:
        taken: list[int] = []
        product = 1
        while left and (product < size or (left[0][0] == 1 and product == size)):
            length, own = left.pop(0)
            product, taken = product * length, [*taken, *own]
        if product != size:
            return None
        found.append(tuple(taken))
    return tuple(found) if math.prod(length for length, _ in left) == 1 else None
