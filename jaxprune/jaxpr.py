"""One interpreter of traced functions: the caller says what each operation does to its values.

A function is traced once to a jaxpr. `interpret` then carries values of any kind through it, one
equation after the other: liveness for connectivity, numbers for folding, numbers with a wider
exponent for SynFlow. It enters calls. A scan goes by the caller's rule for scans, and is unrolled
where there is none, so a rule only ever meets primitive operations.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from jaxprune.errors import PruneError
from jaxprune.tree import paths
from jaxprune.types import PyTree

#: Primitives that only call another jaxpr; custom derivatives play no part in the values.
_CALLS = frozenset(
    {'jit', 'pjit', 'call', 'closed_call', 'core_call', 'remat', 'remat2', 'checkpoint'}
    | {'custom_jvp_call', 'custom_vjp_call', 'custom_vjp_call_jaxpr'}
)
#: The parameter of such a primitive that holds what it calls.
_CALLED = ('jaxpr', 'call_jaxpr', 'fun_jaxpr')


class EquationRule(Protocol):
    def __call__(self, equation: JaxprEqn, values: list[Any], /) -> Sequence[Any]:
        """Computes one value per output of an equation from one value per input.

        Raises:
          Unknown: the rule does not know the operation.
        """


class ScanRule(Protocol):
    def __call__(
        self, equation: JaxprEqn, values: list[Any], step: Callable[[list[Any]], list[Any]], /
    ) -> Sequence[Any] | None:
        """Computes one value per output of a `lax.scan`; None has it unrolled.

        Args:
          equation: the scan; `scan_counts` says which inputs are constants and which the carry.
          values: one value per input.
          step: the outputs of one step under the caller's rules: from the constants, the carry and
            a row of everything else to the next carry and a row of what is stacked.

        Raises:
          Unknown: the rule does not know this loop.
        """


class CallRule(Protocol):
    def __call__(
        self, equation: JaxprEqn, values: list[Any], inside: Callable[[list[Any]], list[Any]], /
    ) -> Sequence[Any] | None:
        """Computes one value per output of a call; None has it entered.

        Args:
          equation: the call: of a compiled function, one with derivatives of its own, and so on.
          values: one value per input.
          inside: the outputs of what is called under the caller's rules.
        """


class ConstantRule(Protocol):
    def __call__(self, array: Any, atom: Literal | Var, /) -> Any:
        """Makes a value of an array that the jaxpr holds itself.

        Args:
          array: a literal's number, a constant that the function closes over, or the empty stack
            of a scan without steps.
          atom: the literal or the variable in the jaxpr; `atom.aval` has its shape and dtype.
        """


class Unknown(Exception):
    """Raised by a rule for an operation it does not know; `interpret` adds which and where."""


class _Nowhere(PruneError):
    """An error inside of a loop in library functions: its place is that of what calls the loop."""


class Traced(NamedTuple):
    """A forward function as a jaxpr, with names for its arguments.

    Attributes:
      jaxpr: the closed jaxpr; its arguments are the leaves of params, then those of the inputs,
        then further constants.
      paths: path of every parameter leaf, in argument order.
      inputs: how many arguments follow them, the leaves of the inputs.
      constants: how many arguments come last.
      outputs: the shapes of what the function returns.
    """

    jaxpr: ClosedJaxpr
    paths: list[str]
    inputs: int
    constants: int
    outputs: PyTree


def trace(forward: Callable[..., PyTree], params: PyTree, x: PyTree, *constants: PyTree) -> Traced:
    """Traces `forward(params, x, *constants)`.

    Args:
      forward: a function of arrays.
      params: parameters; arrays may be abstract, only shapes and dtypes are read.
      x: inputs.
      constants: whatever else the function takes: batch statistics and the like.

    Returns:
      The jaxpr and the names of its arguments.
    """

    def shape(leaf):
        if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
            leaf = jnp.asarray(leaf)  # the dtype that JAX computes in: NumPy's is often float64
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    shapes = jax.tree.map(shape, (params, x, *constants))
    jaxpr, outputs = jax.make_jaxpr(forward, return_shape=True)(*shapes)
    names = [path for path, _ in paths(params)]
    counts = (len(jax.tree.leaves(tree)) for tree in (x, constants))
    return Traced(jaxpr, names, *counts, outputs)


def interpret(
    jaxpr: ClosedJaxpr | Jaxpr,
    args: Sequence[Any],
    rule: EquationRule,
    constant: ConstantRule,
    scan: ScanRule | None = None,
    call: CallRule | None = None,
) -> list[Any]:
    """The outputs of a jaxpr under a caller's rules.

    Args:
      jaxpr: what is interpreted.
      args: one value per argument.
      rule: what an operation does to values; it meets `cond` and `while` as whole operations.
      constant: makes a value of a literal or a constant.
      scan: what a `lax.scan` does to values. Without it, and where it returns None, the scan is
        unrolled: `rule` meets the operations of every step, a slice and a squeeze that take out
        its row, and a broadcast and a concatenate that stack the rows of the result.
      call: what a call does to values. Without it, and where it returns None, calls are entered.

    Returns:
      One value per output.

    Raises:
      PruneError: a rule raised `Unknown`; the message has the operation and its place.
    """
    return _enter(_Rules(rule, constant, scan, call), (), jaxpr, list(args))


def bind(equation: JaxprEqn, *arrays: Any) -> list[Any]:
    """The outputs of an equation as JAX computes them.

    Args:
      equation: of a primitive operation or a loop, not of a call.
      arrays: one per input.

    Returns:
      One array per output.
    """
    out = equation.primitive.bind(*arrays, **equation.params)
    return list(out) if equation.primitive.multiple_results else [out]


class _Rules(NamedTuple):
    """The caller's rules, see `interpret`."""

    rule: EquationRule
    constant: ConstantRule
    scan: ScanRule | None
    call: CallRule | None


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """All equations of a program, those of calls, loops and branches too; nothing is computed."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, 'jaxpr', inner)
                if isinstance(inner, Jaxpr):
                    yield from equations(inner)


#: The equations of the calls that lead to a place, outermost first.
_Outer = tuple[JaxprEqn, ...]


def _enter(
    rules: _Rules, outer: _Outer, called: ClosedJaxpr | Jaxpr, args: Sequence[Any]
) -> list[Any]:
    """The outputs of a jaxpr, equation by equation."""
    closed = isinstance(called, ClosedJaxpr)
    jaxpr, consts = (called.jaxpr, called.consts) if closed else (called, [])
    made = [rules.constant(c, var) for c, var in zip(consts, jaxpr.constvars, strict=True)]
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*made, *args], strict=True))

    def read(atom):
        return rules.constant(atom.val, atom) if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        outputs = _step(rules, outer, equation, [read(atom) for atom in equation.invars])
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _step(rules: _Rules, outer: _Outer, equation: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    """The outputs of one equation."""
    try:
        return _outputs(rules, outer, equation, values)
    except _Nowhere as error:
        where = _place([equation, *reversed(outer)])
        if not where:
            raise
        raise PruneError(str(error).replace(_UNKNOWN_PLACE, where, 1)) from None


def _outputs(rules: _Rules, outer: _Outer, equation: JaxprEqn, values: list[Any]) -> Sequence[Any]:
    name = equation.primitive.name
    if name in _CALLS:
        called = next(equation.params[key] for key in _CALLED if key in equation.params)
        inside = functools.partial(_enter, rules, (*outer, equation), called)
        found = None if rules.call is None else rules.call(equation, values, inside)
        return inside(values) if found is None else found
    try:
        if name != 'scan':
            return rules.rule(equation, values)
        found = None
        if rules.scan is not None:
            inside = functools.partial(_enter, rules, (*outer, equation), equation.params['jaxpr'])
            found = rules.scan(equation, values, inside)
    except Unknown as error:
        raise _placed(error, equation, outer) from None
    return _unroll(rules, outer, equation, values) if found is None else found


# --- scans, step by step ------------------------------------------------------------------------


def _unroll(rules: _Rules, outer: _Outer, scan: JaxprEqn, values: list[Any]) -> list[Any]:
    """The outputs of a scan: the last carry, then what its steps stack."""
    params = scan.params
    n_consts, n_carry = scan_counts(scan)
    first = n_consts + n_carry
    consts, carry = values[:n_consts], values[n_consts:first]
    stacked = list(zip(values[first:], scan.invars[first:], strict=True))

    def row(value, var, i):  # operations that every rule knows, rather than indexing
        def pick(a):
            return lax.squeeze(lax.slice_in_dim(a, i, i + 1, axis=0), (0,))

        return _at_scan(rules, outer, scan, pick, [value], var.aval.shape, var.aval.dtype)

    rows = []
    steps = range(params['length'])
    for i in reversed(steps) if params['reverse'] else steps:
        slices = [row(value, var, i) for value, var in stacked]
        out = _enter(rules, (*outer, scan), params['jaxpr'], [*consts, *carry, *slices])
        carry = out[:n_carry]
        rows.append(out[n_carry:])
    rows = rows[::-1] if params['reverse'] else rows

    def stack(column, var):
        shape, dtype = var.aval.shape, var.aval.dtype
        if not column:  # no steps, so no rows
            return rules.constant(jnp.zeros(shape, dtype), var)
        return _at_scan(rules, outer, scan, _stacked, column, shape[1:], dtype)

    made = enumerate(scan.outvars[n_carry:])
    return [*carry, *[stack([row[j] for row in rows], var) for j, var in made]]


def _stacked(*rows: jax.Array) -> jax.Array:
    return lax.concatenate([lax.expand_dims(row, (0,)) for row in rows], 0)


def _at_scan(
    rules: _Rules,
    outer: _Outer,
    scan: JaxprEqn,
    fn: Callable[..., jax.Array],
    values: Sequence[Any],
    shape: tuple[int, ...],
    dtype: Any,
) -> Any:
    """`fn` of values that stand for arrays of one shape, under the rules."""
    jaxpr = jax.make_jaxpr(fn)(*[jax.ShapeDtypeStruct(shape, dtype)] * len(values)).jaxpr
    # An error names the user's scan, not this file.
    equations = [e.replace(source_info=scan.source_info) for e in jaxpr.eqns]
    return _enter(rules, outer, jaxpr.replace(eqns=equations), values)[0]


def scan_counts(scan: JaxprEqn) -> tuple[int, int]:
    """How many constants and how many carried values a scan takes, before what it scans over."""
    params = scan.params
    if 'num_consts' in params:
        return params['num_consts'], params['num_carry']
    consts, carry, _ = (len(list(part)) for part in params['ft_in'].unpack())  # since jax 0.12
    return consts, carry


# --- errors -------------------------------------------------------------------------------------


def _placed(error: Unknown, equation: JaxprEqn, outer: _Outer) -> PruneError:
    """The error in one line, with the place in the user's code where the operation came from."""
    chain = [equation, *reversed(outer)]
    where = _place(chain)
    scope = '/'.join(filter(None, (str(e.source_info.name_stack) for e in reversed(chain))))
    inside = f' in {scope}' if scope else ''
    kind = PruneError if where else _Nowhere
    where = where or _UNKNOWN_PLACE
    return kind(f"operation '{equation.primitive.name}' at {where}{inside}: {error}")


_UNKNOWN_PLACE = 'an unknown place'


def _place(chain: Sequence[JaxprEqn]) -> str:
    """Where the innermost of these equations stands in the user's code, of those that do."""
    # Inside library functions that are compiled on their own only the call has a place.
    places = (source_info_util.summarize(e.source_info) for e in chain)
    return next((place for place in places if place), '')
