"""The operations of a traced function as products of the sizes of axes."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from jaxprune.jaxpr import Unknown, interpret, scan_counts
from jaxprune.structure.coupling import OWN_CALLS, Visit, called
from jaxprune.structure.operations import (
    CUMULATIVE,
    JOINS,
    MADE,
    MOVES,
    NARY,
    PASSED_ON,
    REDUCTIONS,
    SAME,
    UNARY,
    WINDOWS,
)
from jaxprune.structure.units import Axis

#: A number, or an axis some of whose indices may go.
Size = int | Axis
#: The parameters that an array is made of; None if it depends on the inputs.
Fixed = frozenset[str] | None


class Product(NamedTuple):
    """A matrix product, or a convolution as one. Each attribute but the first is multiplied up.

    Attributes:
      path: the parameter that one factor is made of, or ''.
      rows, inner, columns: sides of the product; `columns` has those of all groups.
      batch, per: `batch / per` is how many groups, products of their own, there are.
    """

    path: str
    rows: tuple[Size, ...]
    inner: tuple[Size, ...]
    columns: tuple[Size, ...]
    batch: tuple[Size, ...] = ()
    per: tuple[Size, ...] = ()


@dataclasses.dataclass
class Tally:
    """What a function does.

    Attributes:
      products: how many of each.
      entries: how many arrays of these axes other operations work on; numbers are in the count.
      choices: branches one of which is taken, and how often.
    """

    products: Counter[Product] = dataclasses.field(default_factory=Counter)
    entries: Counter[tuple[Axis, ...]] = dataclasses.field(default_factory=Counter)
    choices: list[tuple[list['Tally'], int]] = dataclasses.field(default_factory=list)

    def operate(self, sizes: Sequence[Size], each: int = 1) -> None:
        """Counts operations on every entry of an array."""
        numbers = [n for n in sizes if not isinstance(n, Axis)]
        axes = sorted((n for n in sizes if isinstance(n, Axis)), key=id)
        self.entries[tuple(axes)] += each * math.prod(numbers)

    def repeat(self, other: 'Tally', times: int) -> None:
        for mine, theirs in ((self.products, other.products), (self.entries, other.entries)):
            for term, count in theirs.items():
                mine[term] += times * count
        self.choices += [(branches, times * count) for branches, count in other.choices]


def counted(
    jaxpr: ClosedJaxpr,
    sources: Sequence[Fixed],
    ranks: Mapping[str, int],
    visits: Sequence[Visit] | None = None,
    size: Callable[[Axis], Size] = lambda axis: axis.size,
) -> Tally:
    """What a function does.

    Args:
      sources: what each argument is made of.
      ranks: path of a parameter -> how many axes it has.
      visits: what was found at each operation. Without them sizes are those of the jaxpr.
      size: the size of an axis of a visit.

    Raises:
      PruneError: see `cost`.
    """
    tally = Tally()
    _Walker(ranks, tally, None if visits is None else iter(visits), size).through(
        jaxpr, list(sources)
    )
    return tally


class _Walker(NamedTuple):
    """One walk through a function; its values are what arrays are made of."""

    ranks: Mapping[str, int]
    tally: Tally
    visits: Iterator[Visit] | None
    size: Callable[[Axis], Size]

    def through(self, jaxpr: ClosedJaxpr | Jaxpr, values: list[Fixed]) -> list[Fixed]:
        return interpret(jaxpr, values, self.rule, self.constant, self.scan, self.call)

    def next_visit(self) -> Visit | None:
        return None if self.visits is None else next(self.visits)

    def at(self, visit: Visit | None, number: int, tally: Tally) -> '_Walker':
        """The walker for a function that an operation calls."""
        visits = None if visit is None else iter(visit.inside[number])
        return self._replace(visits=visits, tally=tally)

    def constant(self, array: Any, atom: Any) -> Fixed:
        self.next_visit()
        return frozenset()

    def rule(self, equation: JaxprEqn, values: list[Fixed]) -> Sequence[Fixed]:
        visit, name = self.next_visit(), equation.primitive.name
        if name == 'cond':
            return self._cond(equation, values, visit)
        if name == 'while':
            raise Unknown('how often it runs is not known; a loop of fixed length is counted')
        if name in PASSED_ON:
            return values
        if visit is None:
            operands, results = (
                [tuple(atom.aval.shape) for atom in atoms]
                for atoms in (equation.invars, equation.outvars)
            )
        else:
            operands, results = (
                [tuple(map(self.size, value.axes)) for value in side] for side in visit[:2]
            )
        if name == 'dot_general':
            self.tally.products[_dot(equation, operands, values, self._path(values))] += 1
        elif name == 'conv_general_dilated':
            self.tally.products[_conv(equation, operands, results, self._path(values))] += 1
        elif name not in _FREE:
            _operations(equation, operands, results, self.tally)
        return [_joined(values)] * len(equation.outvars)

    def _path(self, values: list[Fixed]) -> str:
        """The parameter that a product counts for."""
        made = frozenset().union(*(value for value in values if value is not None))
        return max(sorted(made), key=self.ranks.__getitem__, default='')

    def _cond(self, equation: JaxprEqn, values: list[Fixed], visit: Visit | None) -> list[Fixed]:
        tallies, results = [], []
        for i, branch in enumerate(equation.params['branches']):
            tallies.append(Tally())
            results.append(self.at(visit, i, tallies[-1]).through(branch, values[1:]))
        self.tally.choices.append((tallies, 1))
        return [_joined([values[0], *column]) for column in zip(*results, strict=True)]

    def call(self, equation: JaxprEqn, values: list[Fixed], inside: Callable) -> Any:
        if self.visits is None or equation.primitive.name not in OWN_CALLS:
            return None
        return self.at(next(self.visits), 0, self.tally).through(called(equation), values)

    def scan(
        self, equation: JaxprEqn, values: list[Fixed], step: Callable
    ) -> Sequence[Fixed] | None:
        length, body = equation.params['length'], equation.params['jaxpr']
        if not length:
            return None
        visit = self.next_visit()
        n_consts, n_carry = scan_counts(equation)
        first = n_consts + n_carry
        carry = values[n_consts:first]
        while True:
            tally = Tally()
            inner = self.at(visit, 0, tally)
            out = inner.through(body, [*values[:n_consts], *carry, *values[first:]])
            after = [_joined(pair) for pair in zip(carry, out, strict=False)]
            if after == carry:
                self.tally.repeat(tally, length)
                return out
            carry = after


def _joined(values: Sequence[Fixed]) -> Fixed:
    return None if None in values else frozenset().union(*values)


# --- products -----------------------------------------------------------------------------------


def _dot(
    equation: JaxprEqn,
    operands: Sequence[tuple[Size, ...]],
    values: Sequence[Fixed],
    path: str,
) -> Product:
    contracted, batch = equation.params['dimension_numbers']
    free = [
        tuple(n for i, n in enumerate(sizes) if i not in (*contracted[k], *batch[k]))
        for k, sizes in enumerate(operands)
    ]
    rows, columns = reversed(free) if values[1] is None and values[0] else free
    inner = tuple(operands[0][i] for i in contracted[0])
    groups = tuple(operands[0][i] for i in batch[0])
    return Product(path, rows, inner, (*groups, *columns), groups)


def _conv(
    equation: JaxprEqn,
    operands: Sequence[tuple[Size, ...]],
    results: Sequence[tuple[Size, ...]],
    path: str,
) -> Product:
    numbers = equation.params['dimension_numbers']
    of_x, of_kernel, of_y = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    (x, kernel), [y] = operands, results
    rows = tuple(n for i, n in enumerate(y) if i != of_y[1])
    inner = tuple(n for i, n in enumerate(kernel) if i != of_kernel[0])
    by_batch = equation.params['batch_group_count']
    inputs, own = x[of_x[1]], kernel[of_kernel[1]]
    groups = ((), ()) if inputs is own or inputs == own else ((inputs,), (own,))
    return Product(path, rows, inner, (y[of_y[1]],), (*groups[0], by_batch), groups[1])


# --- other operations -----------------------------------------------------------------------------

_SPECIAL = frozenset(
    {'bessel_i0e', 'bessel_i1e', 'igamma', 'igammac', 'igamma_grad_a', 'random_gamma_grad'}
    | {'polygamma', 'zeta', 'regularized_incomplete_beta', 'complex', 'conj'}
)
_UPDATES = frozenset({'scatter-add', 'scatter-sub', 'scatter-mul', 'scatter-min', 'scatter-max'})
_FREE = (
    (SAME | MOVES | JOINS | MADE | {'select_n', 'sort', 'top_k', 'approx_top_k'})
    | {'gather', 'dynamic_slice', 'dynamic_update_slice', 'scatter', 'empty', 'iota_2x32_shape'}
    | {'real', 'imag', 'bitcast_convert_type', 'is_finite', 'broadcast_to', 'axis_index'}
)
_ENTRYWISE = (UNARY | NARY | _SPECIAL) - _FREE


def _operations(
    equation: JaxprEqn,
    operands: Sequence[tuple[Size, ...]],
    results: Sequence[tuple[Size, ...]],
    tally: Tally,
) -> None:
    """Counts the operations on floating-point numbers."""
    name = equation.primitive.name
    if name in _ENTRYWISE:
        sizes, of, each = results[0], equation.outvars[0], 1
    elif name in REDUCTIONS | CUMULATIVE | {'reduce'}:
        sizes, of, each = operands[0], equation.invars[0], 1
    elif name in WINDOWS | {'select_and_gather_add'}:
        sizes, of = results[0], equation.invars[0]
        each = math.prod(equation.params['window_dimensions'])
    elif name == 'select_and_scatter_add':
        sizes, of = operands[0], equation.invars[0]
        each = math.prod(equation.params['window_dimensions'])
    elif name in _UPDATES:
        sizes, of, each = operands[2], equation.invars[2], 1
    else:
        raise Unknown('how much it costs is not known')
    if jnp.issubdtype(of.aval.dtype, jnp.inexact):
        tally.operate(sizes, each)
