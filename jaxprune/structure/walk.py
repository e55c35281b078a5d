"""Walking a traced function equation by equation, with a meaning of one's own for each value.

A forward function is traced once to a jaxpr. `walk` then carries values of any kind through it:
liveness for connectivity, numbers for folding. Calls are entered and scans unrolled, so a rule
only ever sees primitive operations.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from jaxprune.errors import PruneError
from jaxprune.tree import paths
from jaxprune.types import PyTree

#: Where the common call primitives keep what they call.
_CALLED = ('jaxpr', 'call_jaxpr', 'fun_jaxpr')
_CALLS = frozenset(
    {
        'jit',
        'pjit',
        'call',
        'closed_call',
        'core_call',
        'custom_jvp_call',
        'custom_vjp_call',
        'custom_vjp_call_jaxpr',
        'remat',
        'remat2',
        'checkpoint',
    }
)

#: `(equation, input values) -> output values`, one per output of the equation.
Rule = Callable[[JaxprEqn, list[Any]], Sequence[Any]]


class Unknown(Exception):
    """Raised by a rule for an operation it does not know; `walk` says which and where."""


class Traced(NamedTuple):
    """A forward function as a jaxpr, with names for its arguments.

    Attributes:
      jaxpr: the closed jaxpr; its arguments are the leaves of params, then those of the inputs,
        then further constants.
      paths: path of every parameter leaf, in argument order.
      inputs: how many arguments follow them, the leaves of the inputs.
      constants: how many arguments come last.
    """

    jaxpr: ClosedJaxpr
    paths: list[str]
    inputs: int
    constants: int


def trace(forward: Callable[..., PyTree], params: PyTree, x: PyTree, *constants: PyTree) -> Traced:
    """Traces `forward(params, x, *constants)`.

    Args:
      params: parameters; arrays may be abstract, only shapes and dtypes are read.
      x: inputs.
      constants: whatever else the function takes: batch statistics and the like.
    """

    def shape(leaf):
        if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
            leaf = jax.numpy.asarray(leaf)  # its own float64 would be told as a surprise
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    given = jax.tree.map(shape, (params, x, *constants))
    jaxpr = jax.make_jaxpr(forward)(*given)
    names = [path for path, _ in paths(params)]
    return Traced(jaxpr, names, len(jax.tree.leaves(x)), len(jax.tree.leaves(constants)))


def walk(
    jaxpr: ClosedJaxpr, args: Sequence[Any], rule: Rule, known: Callable[[Any], Any]
) -> list[Any]:
    """The outputs of a jaxpr under a rule.

    Args:
      jaxpr: what is walked.
      args: one value per argument.
      rule: see `Rule`.
      known: makes a value of an array that the trace holds itself, a literal or a constant.

    Raises:
      PruneError: the rule raised `Unknown`.
    """
    outer: list[JaxprEqn] = []  # the calls we are in

    def run(inner, consts, inputs):
        values = dict(zip(inner.constvars, consts, strict=True))
        values |= dict(zip(inner.invars, inputs, strict=True))

        def read(atom):
            return known(atom.val) if isinstance(atom, Literal) else values[atom]

        for equation in inner.eqns:
            given = [read(atom) for atom in equation.invars]
            values |= dict(zip(equation.outvars, step(equation, given), strict=True))
        return [read(atom) for atom in inner.outvars]

    def enter(called, inputs):
        if isinstance(called, ClosedJaxpr):
            return run(called.jaxpr, [known(c) for c in called.consts], inputs)
        return run(called, [], inputs)

    def step(equation, given):
        name = equation.primitive.name
        if name in _CALLS:
            called = next(equation.params[key] for key in _CALLED if key in equation.params)
            outer.append(equation)
            outputs = enter(called, given)
            outer.pop()
            return outputs
        if name == 'scan':
            return unroll(equation, given)
        try:
            return rule(equation, given)
        except Unknown as error:
            raise _placed(error, equation, outer) from None

    def unroll(equation, given):
        p = equation.params
        n_consts, n_carry = _scan_counts(equation)
        consts, carry = given[:n_consts], given[n_consts : n_consts + n_carry]
        stacked = given[n_consts + n_carry :]
        avals = [var.aval for var in equation.invars[n_consts + n_carry :]]
        made = [var.aval for var in equation.outvars[n_carry:]]
        order = range(p['length'])
        rows = []
        for i in reversed(order) if p['reverse'] else order:
            slices = [pick_row(value, aval, i) for value, aval in zip(stacked, avals, strict=True)]
            out = enter(p['jaxpr'], [*consts, *carry, *slices])
            carry, row = out[:n_carry], out[n_carry:]
            rows.append(row)
        rows = rows[::-1] if p['reverse'] else rows
        columns = [[row[j] for row in rows] for j in range(len(made))]
        return [*carry, *[stack(c, aval) for c, aval in zip(columns, made, strict=True)]]

    def pick_row(value, aval, i):
        def row(a):  # a slice and a squeeze, which every rule knows
            return jax.lax.squeeze(jax.lax.slice_in_dim(a, i, i + 1, axis=0), (0,))

        return enter(jax.make_jaxpr(row)(_abstract(aval)), [value])[0]

    def stack(column, aval):
        if not column:  # a loop of no steps stacks nothing
            return known(jax.numpy.zeros(aval.shape, aval.dtype))
        row = jax.ShapeDtypeStruct(aval.shape[1:], aval.dtype)
        joined = jax.make_jaxpr(_stacked)(*[row] * len(column))
        return enter(joined, column)[0]

    return enter(jaxpr, list(args))


def _stacked(*rows: jax.Array) -> jax.Array:
    return jax.numpy.concatenate([row[None] for row in rows])


def _scan_counts(equation: JaxprEqn) -> tuple[int, int]:
    """How many constants and how many carried values a scan takes, before what it scans over."""
    p = equation.params
    if 'num_consts' in p:
        return p['num_consts'], p['num_carry']
    consts, carry, _ = (len(list(part)) for part in p['ft_in'].unpack())  # jax 0.12 and later
    return consts, carry


def _abstract(aval):
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _placed(error: Unknown, equation: JaxprEqn, outer: Sequence[JaxprEqn]) -> PruneError:
    """The error in one line, with the place in the user's code where the operation came from."""
    # Inside library functions that are compiled on their own only the call has a place.
    chain = [equation, *reversed(outer)]
    places = (source_info_util.summarize(e.source_info) for e in chain)
    where = next((place for place in places if place), 'an unknown place')
    scope = '/'.join(filter(None, (str(e.source_info.name_stack) for e in reversed(chain))))
    inside = f' in {scope}' if scope else ''
    return PruneError(f"operation '{equation.primitive.name}' at {where}{inside}: {error}")


def forward_order(forward: Callable, params: PyTree, x: PyTree, *constants: PyTree) -> list[str]:
    """The paths of all parameters that a forward function uses, in the order of their first use.

    What allocations that speak of first and last layers need: a parameter tree is sorted by name.
    """
    traced = trace(forward, params, x, *constants)
    order: dict[str, None] = {}

    def rule(equation, given):
        used = frozenset().union(*given)
        if len(given) > 1:  # a reshape or a cast passes the leaf on; whatever mixes it, uses it
            order.update(dict.fromkeys(sorted(used)))
            used = frozenset()
        return [used] * len(equation.outvars)

    args = [frozenset({path}) for path in traced.paths] + [frozenset()] * (
        traced.inputs + traced.constants
    )
    walk(traced.jaxpr, args, rule, lambda _: frozenset())
    return list(order)
