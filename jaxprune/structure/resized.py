"""A traced program with smaller arrays: its equations, and the sizes in them, for what is left.

Operations follow the sizes of their operands except where a size is written into them, as in a
reshape. Those sizes are read off the axes of the results; numbers are never matched.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from jaxprune.errors import PruneError
from jaxprune.jaxpr import bind, interpret, scan_counts
from jaxprune.structure.axis_products import picked_by, slice_at
from jaxprune.structure.coupling import OWN_CALLS, Coupling, Visit, called, differentiable, jvp_of
from jaxprune.structure.labelled import Labelled
from jaxprune.structure.operations import MADE
from jaxprune.structure.units import Axis, found


class Left:
    """Which indices of axes are left when some units are removed."""

    def __init__(self, read: Coupling, removed: Collection[int]) -> None:
        self._units, self._removed = read.units, frozenset(removed)
        self._known: dict[int, tuple[Axis, np.ndarray | None]] = {}

    def of(self, axis: Axis) -> np.ndarray | None:
        """The original indices that are left, rising; None for all."""
        axis = found(axis)
        if axis.units is None:
            return None
        if id(axis) not in self._known:
            distinct, inverse = np.unique(self._units.roots(axis.units), return_inverse=True)
            parts = (self._units.parts(int(unit)) for unit in distinct)
            left = np.array([self._removed.isdisjoint(p) for p in parts])
            at = None if left.all() else np.flatnonzero(left[inverse])
            self._known[id(axis)] = (axis, at)  # the axis too, so that its id stays its own
        return self._known[id(axis)][1]

    def size(self, axis: Axis) -> int:
        left = self.of(axis)
        return axis.size if left is None else len(left)

    def shape(self, value: Labelled) -> tuple[int, ...]:
        return tuple(map(self.size, value.axes))

    def untouched(self, values: Sequence[Labelled]) -> bool:
        """Do these arrays keep all their indices, and all that they were just summed over?"""
        return all(self.of(a) is None for value in values for a in (*value.axes, *value.summed))

    def cut(self, array: Any, axes: Sequence[Axis]) -> Any:
        """An array of the original size without what is removed; numbers are cut by NumPy."""
        known = not isinstance(array, jax.core.Tracer) and not jax.dtypes.issubdtype(
            jnp.result_type(array), jax.dtypes.extended
        )
        for i, axis in enumerate(axes):
            left = self.of(axis)
            if left is not None:
                array = np.asarray(array) if known else array
                array = np.take(array, left, i) if known else jnp.take(array, left, i)
        return array


#: Changes what an operation takes (True) or makes (False), at its visit.
Touch = Callable[[Visit, list[Any], bool], Sequence[Any]]


def _untouched(visit: Visit, arrays: list[Any], taken: bool) -> Sequence[Any]:
    return arrays


def resized(read: Coupling, left: Left, touch: Touch = _untouched) -> Callable[..., list[Any]]:
    """The traced program without what is removed: `(*leaves) -> leaves`, a function of arrays.

    Args:
      touch: may change arrays on their way, see `gates`.
    """

    def run(*leaves: Any) -> list[Any]:
        return _Replay(iter(read.visits), left, touch).through(read.traced.jaxpr, list(leaves))

    return run


class _Replay(NamedTuple):
    """A run of the program along the visits of a reading.

    Attributes:
      visits: what was found at each operation, in the order of the function.
      left: which indices are left.
      touch: see `resized`.
    """

    visits: Iterator[Visit]
    left: Left
    touch: Touch = _untouched

    def through(self, jaxpr: ClosedJaxpr | Jaxpr, arrays: Sequence[Any]) -> list[Any]:
        return interpret(jaxpr, arrays, self.rule, self.constant, self.scan, self.call)

    def at(self, visits: list[Visit]) -> '_Replay':
        return self._replace(visits=iter(visits))

    def constant(self, array: Any, atom: Any) -> Any:
        return self.left.cut(array, next(self.visits).results[0].axes)

    def rule(self, equation: JaxprEqn, arrays: list[Any]) -> Sequence[Any]:
        visit, name = next(self.visits), equation.primitive.name
        if name == 'cond':
            branches = [
                lambda *a, j=jaxpr, v=inside: self.at(v).through(j, a)
                for jaxpr, inside in zip(equation.params['branches'], visit.inside, strict=True)
            ]
            return lax.switch(arrays[0], branches, *arrays[1:])
        if name == 'while':
            return self._while(equation, arrays, visit)
        arrays = list(self.touch(visit, arrays, True))
        return self.touch(visit, list(smaller(equation, arrays, visit, self.left)), False)

    def _while(self, equation: JaxprEqn, arrays: list[Any], visit: Visit) -> Sequence[Any]:
        params, (test, body) = equation.params, visit.inside
        n_test, n_body = params['cond_nconsts'], params['body_nconsts']
        of_test, of_body = arrays[:n_test], arrays[n_test : n_test + n_body]

        def goes_on(carry: list[Any]) -> Any:
            return self.at(test).through(params['cond_jaxpr'], [*of_test, *carry])[0]

        def once(carry: list[Any]) -> list[Any]:
            return self.at(body).through(params['body_jaxpr'], [*of_body, *carry])

        return lax.while_loop(goes_on, once, list(arrays[n_test + n_body :]))

    def scan(self, equation: JaxprEqn, arrays: list[Any], step: Callable) -> Sequence[Any] | None:
        params = equation.params
        if not params['length']:
            return None
        [inside] = next(self.visits).inside
        consts, carries = scan_counts(equation)
        first = consts + carries

        def body(carry: list[Any], rows: list[Any]) -> tuple[list[Any], list[Any]]:
            out = self.at(inside).through(params['jaxpr'], [*arrays[:consts], *carry, *rows])
            return out[:carries], out[carries:]

        carry, stacked = lax.scan(
            body,
            list(arrays[consts:first]),
            list(arrays[first:]),
            length=params['length'],
            reverse=params['reverse'],
            unroll=params['unroll'],
        )
        return [*carry, *stacked]

    def call(self, equation: JaxprEqn, arrays: list[Any], inside: Callable) -> Any:
        name = equation.primitive.name
        if name not in OWN_CALLS:
            return None
        visit = next(self.visits)
        return self.touch(visit, list(self._called(equation, arrays, visit)), False)

    def _called(self, equation: JaxprEqn, arrays: list[Any], visit: Visit) -> Sequence[Any]:
        name = equation.primitive.name
        if name.startswith('custom') and self.left.untouched([*visit.operands, *visit.results]):
            params = equation.primitive.get_bind_params(equation.params)
            return equation.primitive.bind(*arrays, **params)

        def primal(*arguments: Any) -> list[Any]:
            return self.at(visit.inside[0]).through(called(equation), arguments)

        if name == 'custom_vjp_call':
            return _not_differentiable(primal, equation)(*arrays)
        if name == 'custom_jvp_call':
            return self._with_derivative(primal, equation, visit)(*arrays)
        policy = {k: equation.params[k] for k in ('policy', 'prevent_cse')}
        return jax.checkpoint(primal, **policy)(*arrays)

    def _with_derivative(self, primal: Callable, equation: JaxprEqn, visit: Visit) -> Callable:
        """A function with the derivative that it brings along, at the smaller size."""
        if len(visit.inside) < 2:  # a derivative of high order
            return primal
        function = jax.custom_jvp(primal)
        moves = [differentiable(var) for var in equation.invars]

        @function.defjvp
        def derivative(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
            jaxpr, consts, still = jvp_of(equation)
            replay = self.at(visit.inside[1])
            made = [replay.constant(c, v) for c, v in zip(consts, jaxpr.constvars, strict=True)]
            plain = jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])
            moving = [t for t, m in zip(tangents, moves, strict=True) if m]
            out = replay.through(plain, [*made, *primals, *moving])
            results, changes = out[: len(still)], iter(out[len(still) :])
            pairs = zip(results, still, strict=True)
            return results, [jnp.zeros_like(r) if s else next(changes) for r, s in pairs]

        return function


def _not_differentiable(primal: Callable, equation: JaxprEqn) -> Callable:
    """A function whose own rule of differentiation fits the original size only."""

    def refused(*_: Any) -> Any:
        jaxpr = called(equation)
        info = getattr(getattr(jaxpr, 'jaxpr', jaxpr), 'debug_info', None)
        name = getattr(info, 'func_name', None) or 'a function'
        raise PruneError(
            f'{name} has a derivative of its own (custom_vjp), which fits the original size only: '
            'the smaller network cannot be differentiated through it'
        )

    function = jax.custom_vjp(primal)
    function.defvjp(refused, refused)
    return function


# --- single operations --------------------------------------------------------------------------


def smaller(equation: JaxprEqn, arrays: list[Any], visit: Visit, left: Left) -> Sequence[Any]:
    """The results of an operation on smaller operands."""
    name, params = equation.primitive.name, dict(equation.params)
    if left.untouched([*visit.operands, *visit.results]):
        return bind(equation, *arrays)
    out = [left.shape(value) for value in visit.results]
    if name in MADE:
        made = bind(equation, *arrays)
        return [left.cut(a, v.axes) for a, v in zip(made, visit.results, strict=True)]
    if name in ('slice', 'dynamic_slice', 'gather'):
        return MOVING[name](equation, arrays, visit, left)
    if name in ('div', 'mul') and (visit.operands[0].summed or visit.operands[-1].summed):
        arrays = _counting_what_is_left(name, arrays, visit, left)
    elif name == 'broadcast_in_dim':
        params['shape'] = out[0]
    elif name == 'reshape':
        params['new_sizes'] = out[0]
    elif name == 'stack':
        at = left.of(visit.results[0].axes[params['axis']])
        arrays = arrays if at is None else [arrays[i] for i in at]
    elif name == 'split':
        params['sizes'] = tuple(shape[params['axis']] for shape in out)
    elif name == 'pad':
        params['padding_config'] = _padding(equation, visit, left)
    elif name == 'conv_general_dilated':
        spec = params['dimension_numbers']
        inside = arrays[1].shape[spec.rhs_spec[1]]
        if params['feature_group_count'] > 1:
            params['feature_group_count'] = arrays[0].shape[spec.lhs_spec[1]] // inside
    return bind(equation.replace(params=params), *arrays)


def _counting_what_is_left(name: str, arrays: list[Any], visit: Visit, left: Left) -> list[Any]:
    """The operands of a mean whose count is that of what is left: a sum divided by a number, or
    multiplied by one over it, where units of the axis were removed."""
    sums = [i for i, value in enumerate(visit.operands) if value.summed]
    if len(sums) != 1 or (name == 'div' and sums != [0]):
        return arrays
    [i] = sums
    summed, factor = visit.operands[i].summed, visit.operands[1 - i].number
    if factor is None or factor.ndim or not factor:
        return arrays
    count = math.prod(axis.size for axis in summed)
    written = float(factor) if name == 'div' else 1 / float(factor)
    if not math.isclose(written, count, rel_tol=1e-6):
        return arrays
    share = math.prod(map(left.size, summed)) / count
    scaled = arrays[1 - i] * np.asarray(share if name == 'div' else 1 / share, factor.dtype)
    return [scaled if k == 1 - i else array for k, array in enumerate(arrays)]


def _padding(equation: JaxprEqn, visit: Visit, left: Left) -> tuple[tuple[int, int, int], ...]:
    config = []
    for i, (low, high, inside) in enumerate(equation.params['padding_config']):
        at = left.of(visit.results[0].axes[i])
        if at is not None and (low or high):
            end = low + visit.operands[0].axes[i].size
            low, high = int((at < low).sum()), int((at >= end).sum())
        config.append((int(low), int(high), inside))
    return tuple(config)


def _sliced(equation: JaxprEqn, arrays: list[Any], visit: Visit, left: Left) -> list[Any]:
    params, axes = equation.params, visit.operands[0].axes
    begin, end = list(params['start_indices']), list(params['limit_indices'])
    steps = list(params['strides'] or (1,) * len(axes))
    for i, axis in enumerate(axes):
        at = left.of(axis)
        if at is None:
            continue
        # The indices that are wanted and left are evenly spaced among those that are left, or
        # they are taken one by one.
        wanted = np.flatnonzero(np.isin(at, np.arange(begin[i], end[i], steps[i])))
        gaps = np.unique(np.diff(wanted))
        if len(gaps) > 1:
            arrays = [jnp.take(arrays[0], wanted, axis=i)]
            begin[i], end[i], steps[i] = 0, len(wanted), 1
        else:
            begin[i] = int(wanted[0]) if len(wanted) else 0
            steps[i] = int(gaps[0]) if len(gaps) else 1
            end[i] = int(wanted[-1]) + 1 if len(wanted) else 0
    strides = None if params['strides'] is None else tuple(steps)
    if strides is None and any(s != 1 for s in steps):
        strides = tuple(steps)
    return [lax.slice(arrays[0], begin, end, strides)]


def _dynamic(equation: JaxprEqn, arrays: list[Any], visit: Visit, left: Left) -> list[Any]:
    array, starts = arrays[0], list(arrays[1:])
    value, sizes = visit.operands[0], list(equation.params['slice_sizes'])
    for i, axis in enumerate(value.axes):
        if left.of(axis) is None:
            continue
        if sizes[i] != axis.size:
            where = slice_at(visit.operands[1 + i].number, sizes[i], axis.size)
            array = taken(array, i, np.arange(axis.size)[where], left.of(axis))
            starts[i] = jnp.zeros_like(starts[i])
        sizes[i] = array.shape[i]
    return [lax.dynamic_slice(array, starts, sizes)]


def _gathered(equation: JaxprEqn, arrays: list[Any], visit: Visit, left: Left) -> list[Any]:
    value, indices = visit.operands
    params = dict(equation.params)
    numbers, sizes = params['dimension_numbers'], list(params['slice_sizes'])
    gone = numbers.collapsed_slice_dims
    if len(gone) == 1 and left.of(value.axes[gone[0]]) is not None:
        axis, shape = value.axes[gone[0]], visit.results[0].axes
        where = np.clip(picked_by(equation, indices), 0, axis.size - 1)
        array = taken(arrays[0], gone[0], where, left.of(axis))
        [other] = [i for i in range(len(shape)) if i not in numbers.offset_dims]
        return [jnp.moveaxis(array, gone[0], other)]
    for i, axis in enumerate(value.axes):
        if sizes[i] == axis.size:
            sizes[i] = arrays[0].shape[i]
    params['slice_sizes'] = tuple(sizes)
    return bind(equation.replace(params=params), *arrays)


def taken(array: Any, axis: int, wanted: np.ndarray, left: np.ndarray) -> Any:
    """Original indices of an axis, as far as they are left."""
    position = np.full(max(wanted.max(initial=0), left.max(initial=0)) + 1, -1)
    position[left] = np.arange(len(left))
    at = position[wanted]
    return jnp.take(array, at[at >= 0], axis=axis)


MOVING = {'slice': _sliced, 'dynamic_slice': _dynamic, 'gather': _gathered}
