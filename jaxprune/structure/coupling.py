"""Reading a traced function: which indices of which arrays go together, through calls and loops.

Several walks read one function. The first unites axes. The others look where masked arrays are
zero, each under another assumption. All carry a `Labelled` for every array.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from jaxprune.jaxpr import Traced, Unknown, interpret, scan_counts, trace
from jaxprune.structure.axis_rules import LARGEST, axis_rule
from jaxprune.structure.labelled import (
    NONE,
    Labelled,
    Reading,
    Source,
    kept,
    opened,
    place,
)
from jaxprune.structure.units import Axis, Units, fix, fixed, found, unite
from jaxprune.tree import paths
from jaxprune.types import PyTree

#: What an operation that is not known may do.
UNKNOWN = ('refuse', 'freeze')
#: Derivatives of derivatives that are read of a function with derivatives of its own.
_ORDERS = 2


class Visit(NamedTuple):
    """What was found at an operation.

    Attributes:
      operands: what it takes.
      results: what it makes.
      inside: the visits of each function that it calls or repeats.
      name: of the operation; '' for a constant.
    """

    operands: list[Labelled]
    results: list[Labelled]
    inside: tuple[list['Visit'], ...] = ()
    name: str = ''


class Coupling(NamedTuple):
    """A function that was read.

    Attributes:
      forward: the function, `(params, x, *states) -> outputs`.
      traced: the same, traced.
      state_paths: the paths of its states.
      units: which indices go together.
      axes: those of each argument: parameters, inputs, states.
      roles, products: see `Reading`.
      sliced: see `Reading`.
      visits: what was found at each operation and constant, in the order of the function.
      unknown: see `coupling`.
    """

    forward: Callable[..., PyTree]
    traced: Traced
    state_paths: list[str]
    units: Units
    axes: list[list[Axis]]
    roles: dict[Source, set[str]]
    products: list[tuple[tuple[Axis, ...], tuple[Axis, ...]]]
    sliced: bool
    visits: list[Visit]
    unknown: str

    @property
    def parameter_axes(self) -> dict[str, list[Axis]]:
        return dict(zip(self.traced.paths, self.axes, strict=False))

    @property
    def state_axes(self) -> dict[str, list[Axis]]:
        first = len(self.axes) - len(self.state_paths)
        return dict(zip(self.state_paths, self.axes[first:], strict=True))


def coupling(
    forward: Callable[..., PyTree],
    params: PyTree,
    x: PyTree,
    *states: PyTree,
    sliced: bool = False,
    unknown: str = 'refuse',
) -> Coupling:
    """Reads which indices of which arrays go together.

    Args:
      forward: `(params, x, *states) -> outputs`.
      params: parameters, arrays or shapes.
      x: inputs, arrays or shapes.
      states: batch statistics and the like.
      sliced: see `Reading`.
      unknown: 'refuse' an operation that is not known, or 'freeze' the axes that it touches.

    Raises:
      PruneError: an operation that is not known; the message has its place.
    """
    traced = trace(forward, params, x, *states)
    state_paths = [path for state in states for path, _ in paths(state)]
    shapes = [var.aval.shape for var in traced.jaxpr.jaxpr.invars]
    count = len(traced.paths)
    axes = [[Axis(n) for n in shape] for shape in shapes]
    for i in range(count, count + traced.inputs):
        axes[i] = list(kept(shapes[i], 'the raw input').axes)
    made = Coupling(forward, traced, state_paths, Units(), axes, {}, [], sliced, [], unknown)
    visits = walk(made, lambda source: True, lambda axis: True, lambda axis, where: None)
    return made._replace(visits=visits)


def walk(
    read: Coupling,
    silent: Callable[[Source], bool],
    goes: Callable[[Axis], bool],
    heard: Callable[[Axis, str], None],
    silenced: Mapping[int, Sequence[tuple[int, int]]] | None = None,
) -> list[Visit]:
    """Carries what is known of arrays through the function.

    Args:
      silent: is a parameter zero at every index of an axis that goes?
      goes, heard: see `Reading`.
      silenced: `id` of an earlier visit -> results and their axes along which they are zero.

    Returns:
      What was found at each operation.
    """
    products = [] if read.visits else read.products  # the first walk finds them all
    reading = Reading(read.units, read.roles, products, goes, heard, read.sliced)
    arguments = []
    first, last = len(read.traced.paths), len(read.axes) - len(read.state_paths)
    for i, own in enumerate(read.axes):
        value = opened([a.size for a in own], not first <= i < last)._replace(axes=tuple(own))
        if i < first:
            sources = [(read.traced.paths[i], k) for k in range(len(own))]
            zero = tuple(silent(source) for source in sources)
            value = value._replace(zero=zero, sources=tuple(frozenset({s}) for s in sources))
        arguments.append(value)
    walker = _Walker(reading, [], read.unknown == 'freeze')
    if read.visits:
        walker = walker._replace(before=read.visits, silenced=silenced or {})
    results = walker.through(read.traced.jaxpr, arguments)
    states = returned_states(read)
    for value in results[: len(results) - len(states)]:
        for axis in value.axes:
            fix(reading.units, axis, "the network's output")
    for value, own in zip(results[len(results) - len(states) :], states, strict=True):
        for one, other in zip(value.axes, own, strict=True):
            unite(reading.units, one, other, 'the next state')
    return walker.visits


def returned_states(read: Coupling) -> list[list[Axis]]:
    """The axes of the state, if the function returns `(outputs, next state)`."""
    outputs, own = read.traced.outputs, list(read.state_axes.values())
    if not own or not isinstance(outputs, tuple) or len(outputs) != 2:
        return []
    shapes = [tuple(a.size for a in axes) for axes in own]
    names = [path for path, _ in paths(outputs[1])]
    same = names == read.state_paths and shapes == [s.shape for s in jax.tree.leaves(outputs[1])]
    return own if same else []


def may_go(read: Coupling) -> Callable[[Axis], bool]:
    """Whether some index of an axis may go, by what has been found so far."""

    def goes(axis: Axis) -> bool:
        axis, units = found(axis), read.units
        if axis.units is None:
            return False
        return any(not units.reason(part) for part in units.parts_of(axis.units))

    return goes


class _Walker(NamedTuple):
    """One walk through a function.

    Attributes:
      reading: what is found.
      visits: what was found at each operation so far.
      freezes: axes that an unknown operation touches stay; else it is an error.
      orders: how many derivatives are left to read of functions that bring their own.
      before: the visits of an earlier walk through the same operations.
      silenced: see `walk`.
    """

    reading: Reading
    visits: list[Visit]
    freezes: bool
    orders: int = _ORDERS
    before: list[Visit] | None = None
    silenced: Mapping[int, Sequence[tuple[int, int]]] = {}

    def through(self, jaxpr: ClosedJaxpr | Jaxpr, arguments: list[Labelled]) -> list[Labelled]:
        return interpret(jaxpr, arguments, self.rule, self.constant, self.scan, self.call)

    def inside(self, number: int) -> '_Walker':
        """A walker for one of the functions that the next operation calls or repeats."""
        before = None if self.before is None else self.before[len(self.visits)].inside[number]
        return self._replace(visits=[], before=before)

    def apart(
        self, run: Callable[['_Walker'], Any], number: int, orders: int | None = None
    ) -> list[Visit]:
        """The visits of a part of the function, beside those of the rest."""
        orders = self.orders if orders is None else orders
        inner = self.inside(number)._replace(orders=orders)
        run(inner)
        return inner.visits

    def known(self, results: list[Labelled]) -> list[Labelled]:
        """The results of the next operation; axes that it makes are those of an earlier walk.

        What an axis is united with decides whether its indices go. Of an axis made anew, as the
        axis along which an array is repeated, nothing would be known yet.
        """
        if self.before is None:
            return results
        for i, (value, earlier) in enumerate(
            zip(results, self.before[len(self.visits)].results, strict=True)
        ):
            axes = tuple(
                old if found(axis).units is None and not found(axis).fixed else axis
                for axis, old in zip(value.axes, earlier.axes, strict=True)
            )
            results[i] = value._replace(axes=axes)
        return results

    def quiet(self, results: list[Labelled]) -> list[Labelled]:
        """The results of the next operation, zero where they are silenced."""
        if self.before is not None:
            for i, axis in self.silenced.get(id(self.before[len(self.visits)]), ()):
                zero = tuple(z or k == axis for k, z in enumerate(results[i].zero))
                results[i] = results[i]._replace(zero=zero)
        return results

    def rule(self, equation: JaxprEqn, values: list[Labelled]) -> Sequence[Labelled]:
        name = equation.primitive.name
        inside: tuple[list[Visit], ...] = ()
        try:
            if name == 'cond':
                out, inside = self._cond(equation, values)
            elif name == 'while':
                out, inside = self._while(equation, values)
            else:
                out = list(axis_rule(self.reading)(equation, values))
        except Unknown:
            if not self.freezes:
                raise
            out = self._frozen(equation, values)
        out = self.quiet(self.known(list(out)))
        self.visits.append(Visit(list(values), out, inside, name))
        return out

    def _frozen(self, equation: JaxprEqn, values: list[Labelled]) -> list[Labelled]:
        reason = f'not known: {place(equation)}'
        for axis in (axis for value in values for axis in value.axes):
            fix(self.reading.units, axis, reason)
        given = all(v.given for v in values)
        return [kept(var.aval.shape, reason, given) for var in equation.outvars]

    def constant(self, array: Any, atom: Any) -> Labelled:
        value = opened(np.shape(array), True)
        numeric = not jax.dtypes.issubdtype(atom.aval.dtype, jax.dtypes.extended)
        numeric &= not isinstance(array, jax.core.Tracer)  # of a function around this one
        if numeric and np.size(array) <= LARGEST:
            number = np.asarray(array)
            zero = not number.any()
            value = value._replace(number=number, zero=(zero,) * number.ndim)
        self.visits.append(Visit([], [value]))
        return value

    # --- calls and loops ------------------------------------------------------------------------

    def call(
        self, equation: JaxprEqn, values: list[Labelled], inside: Callable
    ) -> Sequence[Labelled] | None:
        name = equation.primitive.name
        if not OWN_CALLS & {name}:
            return None
        results: list[Labelled] = []

        def primal(walker: _Walker) -> None:
            results.extend(walker.through(called(equation), values))

        logs = [self.apart(primal, 0)]
        if name == 'custom_jvp_call' and self.orders:
            jaxpr, consts, _ = jvp_of(equation)
            pairs = zip(values, equation.invars, strict=True)
            moving = [value for value, var in pairs if differentiable(var)]

            def derivative(walker: _Walker) -> None:
                made = [walker.constant(c, v) for c, v in zip(consts, jaxpr.constvars, strict=True)]
                plain = jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])
                both = [*values, *(v._replace(number=None) for v in moving)]
                walker.through(plain, [*made, *both])

            logs.append(self.apart(derivative, 1, self.orders - 1))
        results = self.quiet(results)
        self.visits.append(Visit(list(values), results, tuple(logs), name))
        return results

    def scan(
        self, equation: JaxprEqn, values: list[Labelled], step: Callable
    ) -> Sequence[Labelled] | None:
        if not equation.params['length']:
            return None
        n_consts, n_carry = scan_counts(equation)
        first, body = n_consts + n_carry, equation.params['jaxpr']
        for value in values[first:]:
            fix(self.reading.units, value.axes[0], 'looped over by a scan')
        rows = [_inner(value) for value in values[first:]]
        carry = [v._replace(number=None) for v in values[n_consts:first]]

        def once(walker: _Walker, carry: list[Labelled]) -> list[Labelled]:
            return walker.through(body, [*values[:n_consts], *carry, *rows])

        after, out, log = self._settled(once, carry)
        stacked = [
            made_of_rows(value, var.aval.shape[0])
            for value, var in zip(out[n_carry:], equation.outvars[n_carry:], strict=True)
        ]
        results = [*after, *stacked]
        self.visits.append(Visit(list(values), results, (log,), 'scan'))
        return results

    def _settled(
        self, once: Callable, carry: list[Labelled], number: int = 0
    ) -> tuple[list[Labelled], list[Labelled], list[Visit]]:
        """The carry that a loop's body keeps, the results of the body, and its visits."""
        while True:
            inner = self.inside(number)
            out = once(inner, carry)
            after = [_either(self.reading, a, b) for a, b in zip(carry, out, strict=False)]
            settled = all(
                (a.zero, a.sources, a.given) == (b.zero, b.sources, b.given)
                for a, b in zip(after, carry, strict=True)
            )
            if settled:
                return after, out, inner.visits
            carry = after

    def _while(
        self, equation: JaxprEqn, values: list[Labelled]
    ) -> tuple[list[Labelled], tuple[list[Visit], ...]]:
        params = equation.params
        n_test, n_body = params['cond_nconsts'], params['body_nconsts']
        of_test, of_body = values[:n_test], values[n_test : n_test + n_body]
        carry = [v._replace(number=None) for v in values[n_test + n_body :]]

        def once(walker: _Walker, carry: list[Labelled]) -> list[Labelled]:
            return walker.through(params['body_jaxpr'], [*of_body, *carry])

        after, _, body = self._settled(once, carry, 1)
        test = self.apart(
            lambda walker: walker.through(params['cond_jaxpr'], [*of_test, *after]), 0
        )
        return after, (test, body)

    def _cond(
        self, equation: JaxprEqn, values: list[Labelled]
    ) -> tuple[list[Labelled], tuple[list[Visit], ...]]:
        logs, results = [], []
        for i, branch in enumerate(equation.params['branches']):

            def run(walker: _Walker, branch: Any = branch) -> None:
                results.append(walker.through(branch, values[1:]))

            logs.append(self.apart(run, i))
        joined = results[0]
        for other in results[1:]:
            joined = [_either(self.reading, a, b) for a, b in zip(joined, other, strict=True)]
        given = values[0].given
        joined = [v._replace(number=None, given=v.given and given) for v in joined]
        return joined, tuple(logs)


#: Calls that the smaller network makes as well: they say how to differentiate, or what to keep.
OWN_CALLS = frozenset({'custom_jvp_call', 'custom_vjp_call', 'remat', 'remat2', 'checkpoint'})


def called(equation: JaxprEqn) -> ClosedJaxpr | Jaxpr:
    """What a call calls."""
    return equation.params.get('call_jaxpr', equation.params.get('jaxpr'))


def differentiable(atom: Any) -> bool:
    return jnp.issubdtype(atom.aval.dtype, jnp.inexact)


def jvp_of(equation: JaxprEqn) -> tuple[Jaxpr, Sequence[Any], Sequence[bool]]:
    """The derivative that a function brings along: jaxpr, constants, which tangents are zero.

    It takes the arguments, then the tangents of those that are numbers with a fraction.
    """
    still = [not differentiable(var) for var in equation.invars]
    return equation.params['jvp_jaxpr_fun'].call_wrapped(*still)


def _inner(value: Labelled) -> Labelled:
    """A row of a stack."""
    return Labelled(value.axes[1:], value.zero[1:], value.sources[1:], value.given)


def made_of_rows(row: Labelled, length: int) -> Labelled:
    """The rows of all steps of a scan as one array."""
    axis = fixed(length, 'stacked by a scan')
    sources = (NONE,) * (1 + len(row.axes))
    return Labelled((axis, *row.axes), (False, *row.zero), sources, row.given)


def _either(reading: Reading, one: Labelled, other: Labelled) -> Labelled:
    """What is known of an array that is one or the other."""
    axes = [
        unite(reading.units, a, b, 'carried by a loop')
        for a, b in zip(one.axes, other.axes, strict=True)
    ]
    zero = tuple(a and b for a, b in zip(one.zero, other.zero, strict=True))
    sources = tuple(a if a == b else NONE for a, b in zip(one.sources, other.sources, strict=True))
    return Labelled(tuple(axes), zero, sources, one.given and other.given)
