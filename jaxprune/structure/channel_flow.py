"""Which channels a network makes, where they are read, and by which numbers they are multiplied.

A kernel makes a channel at the place where it is used in a matrix product or a convolution. The
channel flows through activations, norms, sums, pools and joins until other kernels read it. Which
index of an array belongs to which channel is what the coupled groups say (`coupling`). They unite
the channels that a residual sum adds, so a channel here is a pair: the use of a kernel, and the
unit that the groups have for the index.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from jaxprune.jaxpr import Unknown, bind, interpret, scan_counts
from jaxprune.score.layers import moved
from jaxprune.structure.coupling import OWN_CALLS, Coupling, Visit, called
from jaxprune.structure.operations import PASSED_ON
from jaxprune.structure.units import Axis, Units, found

#: In a `Reach` the inputs of the network.
INPUT = -1
#: Use of a kernel -> the ways on which its channels come, each the numbers of the scales on it.
Reach = Mapping[int, frozenset[tuple[int, ...]]]


class Use(NamedTuple):
    """A kernel at a place where the network uses it; axes are those of the parameter.

    Attributes:
      path: of the parameter.
      rows: the indices along its first axes, of a stack that a loop takes apart; else ().
      inputs: axes that are summed over and count channels, in the order of `reads`.
      outputs: axes that count the channels it makes, in the order of `makes`.
      strides: stride of the axes that are sides of a window.
      groups: parts that read and make channels apart: 1, or those of a grouped convolution.
      reads: `(groups, inputs)`, the name of each channel that it reads.
      makes: `(outputs,)`, the name of each channel that it makes, group by group.
      reach: whose channels come here.
    """

    path: str
    rows: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    strides: Mapping[int, int]
    groups: int
    reads: np.ndarray
    makes: np.ndarray
    reach: Reach


class Scale(NamedTuple):
    """A place where channels are multiplied by parameters or statistics.

    Attributes:
      names: of the channels.
      makers: the uses of kernels whose channels they are.
    """

    names: np.ndarray
    makers: frozenset[int]


class Numbers(NamedTuple):
    """The arrays that a network computes with.

    Attributes:
      kernels: of each use the kernel as it meets the activation, masked or scaled, with the axes of
        its parameter but for those of `rows`.
      factors: of each scale the size of the factor of each channel.
    """

    kernels: list[jax.Array]
    factors: list[jax.Array]


class Flow(NamedTuple):
    """What was found.

    Attributes:
      uses: of kernels, in the order of the function.
      ends: what comes to the network's outputs.
      scales: on the ways of channels.
      numbers: `(*leaves) -> Numbers`; leaves are the parameters and the states, in the order of the
        trace.
    """

    uses: tuple[Use, ...]
    ends: Reach
    scales: tuple[Scale, ...]
    numbers: Callable[..., Numbers]


class _Leaf(NamedTuple):
    """A parameter, or one of the rows that a loop takes it apart into; see `Use`."""

    path: str
    rows: tuple[int, ...]
    shape: tuple[int, ...]


class _Given(NamedTuple):
    """An array that does not depend on the inputs.

    Attributes:
      array: the array; None while numbers play no part.
      learned: parameters or states are in it.
      leaf: the parameter that it is, rearranged or scaled entry by entry.
      axes: for each of its axes those of this parameter, see `layers.Kernel`.
    """

    array: Any
    learned: bool
    leaf: _Leaf | None = None
    axes: tuple[tuple[int, ...], ...] = ()


class _Signal(NamedTuple):
    """An array that depends on the inputs; `reach`: whose channels are in it."""

    reach: Reach


def channel_flow(read: Coupling) -> Flow:
    """Follows the channels of a function that was read.

    Raises:
      PruneError: channels go through a loop of unknown length, or a convolution with a stride of
        its inputs and another one of its outputs.
    """

    def walked(leaves: Sequence[Any] | None) -> tuple[_Found, list[Any]]:
        seen = _Found([], [], Numbers([], []), _Names(read.units))
        inputs = [_Signal({INPUT: frozenset({()})})] * read.traced.inputs
        names, first = read.traced.paths, len(read.traced.paths)
        arrays = [None] * (first + len(read.state_paths)) if leaves is None else list(leaves)
        arguments = [
            _Given(array, True, _leaf(path, axes), tuple((i,) for i in range(len(axes))))
            for array, path, axes in zip(arrays[:first], names, read.axes, strict=False)
        ]
        arguments += [*inputs, *(_Given(array, True) for array in arrays[first:])]
        walker = _Walker(iter(read.visits), seen, leaves is not None)
        return seen, walker.through(read.traced.jaxpr, arguments)

    seen, outputs = walked(None)

    def numbers(*leaves: Any) -> Numbers:
        return walked(leaves)[0].numbers

    return Flow(tuple(seen.uses), _merged(outputs), tuple(seen.scales), numbers)


def _leaf(path: str, axes: Sequence[Axis]) -> _Leaf:
    return _Leaf(path, (), tuple(axis.size for axis in axes))


class _Found(NamedTuple):
    """What a walk has found so far; `numbers` stays empty while they play no part."""

    uses: list[Use]
    scales: list[Scale]
    numbers: Numbers
    names: '_Names'


class _Names:
    """Names of channels, whole numbers: the same for indices that go together."""

    def __init__(self, units: Units) -> None:
        self._units = units
        self._numbers: dict[frozenset, int] = {}

    def of(self, axes: Sequence[Axis]) -> np.ndarray:
        """The names of all combinations of indices, the last axis fastest, flat."""
        joint = [frozenset()]
        for axis in axes:
            tokens = self._tokens(found(axis))
            joint = [one | other for one in joint for other in tokens]
        return np.array([self._numbers.setdefault(t, len(self._numbers)) for t in joint], np.int64)

    def _tokens(self, axis: Axis) -> list[frozenset]:
        own = [frozenset({(id(axis), i)}) for i in range(axis.size)]
        if axis.units is None:  # united with no other index
            return own
        distinct, inverse = np.unique(self._units.roots(axis.units), return_inverse=True)
        parts = [frozenset(self._units.parts(int(unit))) for unit in distinct]
        return [parts[k] or own[i] for i, k in enumerate(inverse)]


def _merged(values: Sequence[Any]) -> Reach:
    """Whose channels are in any of these arrays."""
    reach: dict[int, frozenset[tuple[int, ...]]] = {}
    for value in values:
        if isinstance(value, _Signal):
            for use, ways in value.reach.items():
                reach[use] = reach.get(use, frozenset()) | ways
    return reach


class _Walker(NamedTuple):
    """A walk along the visits of a reading.

    Attributes:
      visits: what was found at each operation, in the order of the function.
      seen: what is found.
      numeric: arrays that do not depend on the inputs are computed.
    """

    visits: Iterator[Visit]
    seen: _Found
    numeric: bool

    def through(self, jaxpr: ClosedJaxpr | Jaxpr, values: Sequence[Any]) -> list[Any]:
        return interpret(jaxpr, values, self.rule, self.constant, self.scan, self.call)

    def at(self, visits: list[Visit]) -> '_Walker':
        return self._replace(visits=iter(visits))

    def constant(self, array: Any, atom: Any) -> _Given:
        next(self.visits)
        return _Given(array, False)

    def rule(self, equation: JaxprEqn, values: list[Any]) -> Sequence[Any]:
        visit, name = next(self.visits), equation.primitive.name
        if all(isinstance(value, _Given) for value in values):
            return self._made(equation, values)
        if name == 'cond':
            branches = zip(equation.params['branches'], visit.inside, strict=True)
            out = [self.at(inside).through(jaxpr, values[1:]) for jaxpr, inside in branches]
            return [_Signal(_merged([*values[:1], *each])) for each in zip(*out, strict=True)]
        if name == 'while':
            raise Unknown('channels are not followed through loops of unknown length')
        if name in PASSED_ON:
            return values
        if name in ('dot_general', 'conv_general_dilated'):
            use = _use(self.seen.names, equation, values, visit)
            if use is not None:
                self.seen.uses.append(use)
                if self.numeric:
                    [kernel] = (v for v in values if isinstance(v, _Given))
                    self.seen.numbers.kernels.append(_in_place(kernel))
                return [_Signal({len(self.seen.uses) - 1: frozenset({()})})]
        if name in ('mul', 'div') and len(values) == 2:
            return [_Signal(self._scaled(equation, values, visit))]
        return [_Signal(_merged(values))] * len(equation.outvars)

    def _made(self, equation: JaxprEqn, values: list[_Given]) -> list[_Given]:
        """The results of an operation on arrays that do not depend on the inputs."""
        arrays = [None] * len(equation.outvars)
        if self.numeric:
            arrays = bind(equation, *(value.array for value in values))
        made = [_Given(array, any(v.learned for v in values)) for array in arrays]
        kernels = [i for i, value in enumerate(values) if value.leaf is not None]
        if len(kernels) == 1 and len(made) == 1:
            [place] = kernels
            axes = moved(equation, place, values[place].axes)
            if axes is not None:
                made = [made[0]._replace(leaf=values[place].leaf, axes=axes)]
        return made

    def _scaled(self, equation: JaxprEqn, values: list[Any], visit: Visit) -> Reach:
        """Whose channels are in a product, which may be a scale of theirs."""
        reach = _merged(values)
        givens = [i for i, v in enumerate(values) if isinstance(v, _Given) and v.learned]
        divides = equation.primitive.name == 'div'
        if not givens or not reach or (divides and givens != [1]):
            return reach
        [place] = givens
        sources, result = visit.operands[place].sources, visit.results[0]
        # Axes of channels; where none of them may go, those that are axes of a parameter.
        axes = [i for i, axis in enumerate(result.axes) if not found(axis).fixed]
        axes = axes or [i for i, own in enumerate(sources) if own]
        number = len(self.seen.scales)
        names = self.seen.names.of([result.axes[i] for i in axes])
        self.seen.scales.append(Scale(names, frozenset(reach)))
        if self.numeric:
            size = jnp.abs(jnp.asarray(values[place].array))
            size = jnp.broadcast_to(size, equation.outvars[0].aval.shape)
            # The largest over places: the norm of the product as a map of this channel.
            size = (1 / size if divides else size).max(
                tuple(i for i in range(size.ndim) if i not in axes)
            )
            self.seen.numbers.factors.append(size.reshape(-1))
        return {use: frozenset((*way, number) for way in ways) for use, ways in reach.items()}

    # --- calls and loops ------------------------------------------------------------------------

    def call(self, equation: JaxprEqn, values: list[Any], inside: Callable) -> list[Any] | None:
        if equation.primitive.name not in OWN_CALLS:
            return None
        visit = next(self.visits)
        return self.at(visit.inside[0]).through(called(equation), values)

    def scan(self, equation: JaxprEqn, values: list[Any], step: Callable) -> list[Any] | None:
        """A loop over rows, step by step: each step's kernels are kernels of their own."""
        params = equation.params
        if not params['length']:
            return None
        [inside] = next(self.visits).inside
        n_consts, n_carry = scan_counts(equation)
        first = n_consts + n_carry
        carry, stacked = values[n_consts:first], []
        order = range(params['length'])
        for i in reversed(order) if params['reverse'] else order:
            rows = [_row(value, i) for value in values[first:]]
            out = self.at(inside).through(params['jaxpr'], [*values[:n_consts], *carry, *rows])
            carry = out[:n_carry]
            stacked.append(out[n_carry:])
        if params['reverse']:
            stacked = stacked[::-1]
        return [*carry, *(self._stacked(column) for column in zip(*stacked, strict=True))]

    def _stacked(self, rows: Sequence[Any]) -> Any:
        if any(isinstance(row, _Signal) for row in rows):
            return _Signal(_merged(rows))
        array = jnp.stack([row.array for row in rows]) if self.numeric else None
        return _Given(array, any(row.learned for row in rows))


def _row(value: Any, i: int) -> Any:
    """A row of what a loop takes apart."""
    if isinstance(value, _Signal):
        return value
    row = _Given(None if value.array is None else value.array[i], value.learned)
    leaf = value.leaf
    if leaf is None or value.axes[0] != (len(leaf.rows),):
        return row
    return row._replace(leaf=leaf._replace(rows=(*leaf.rows, i)), axes=value.axes[1:])


def _in_place(kernel: _Given) -> jax.Array:
    """A rearranged kernel with its axes where its parameter has them."""
    shape, first = kernel.leaf.shape, len(kernel.leaf.rows)
    axes = [k for each in kernel.axes for k in each]
    array = jnp.asarray(kernel.array).reshape([shape[k] for k in axes])
    array = array.transpose(sorted(range(len(axes)), key=axes.__getitem__))
    return array.reshape(shape[first:])


# --- uses of kernels ----------------------------------------------------------------------------


class _Meeting(NamedTuple):
    """How a kernel meets an activation in a product; fields as in `Use`."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    strides: Mapping[int, int]
    groups: int
    reads: np.ndarray
    makes: np.ndarray


def _use(names: _Names, equation: JaxprEqn, values: list[Any], visit: Visit) -> Use | None:
    """A kernel that meets what depends on the inputs; None where none does entry by entry."""
    kernels = [i for i, v in enumerate(values) if isinstance(v, _Given) and v.leaf is not None]
    if not kernels:
        return None
    [place] = kernels
    leaf, axes = values[place].leaf, values[place].axes
    sizes = equation.invars[place].aval.shape
    own = [math.prod(leaf.shape[k] for k in each) for each in axes]
    if own != list(sizes):  # repeated along an axis
        return None
    meet = _convolved if equation.primitive.name == 'conv_general_dilated' else _multiplied
    met = meet(names, equation, place, axes, visit)
    if met is None:
        return None
    reads, inputs, taps = _without_taps(met, leaf)
    strides = {**dict.fromkeys(taps, 1), **met.strides}
    return Use(
        leaf.path,
        leaf.rows,
        inputs,
        met.outputs,
        strides,
        met.groups,
        reads,
        met.makes,
        _merged(values),
    )


def _multiplied(
    names: _Names,
    equation: JaxprEqn,
    place: int,
    axes: tuple[tuple[int, ...], ...],
    visit: Visit,
) -> _Meeting:
    """A kernel in a matrix product; parts that are multiplied apart are groups."""
    (contracted, batch), (theirs, along) = (
        [both[k] for both in equation.params['dimension_numbers']] for k in (place, 1 - place)
    )
    free = [i for i in range(len(axes)) if i not in (*contracted, *batch)]
    other, result = visit.operands[1 - place].axes, visit.results[0].axes
    # Of the result: what goes in parallel, then what is left of the first operand, of the second.
    first = len(batch) if place == 0 else len(result) - len(free)
    made = [*result[: len(batch)], *result[first : first + len(free)]]
    groups = math.prod(other[i].size for i in along)
    reads = names.of([other[i] for i in (*along, *theirs)]).reshape(groups, -1)
    return _Meeting(
        tuple(k for i in contracted for k in axes[i]),
        tuple(k for i in (*batch, *free) for k in axes[i]),
        {},
        groups,
        reads,
        names.of(made),
    )


def _convolved(
    names: _Names,
    equation: JaxprEqn,
    place: int,
    axes: tuple[tuple[int, ...], ...],
    visit: Visit,
) -> _Meeting | None:
    """A kernel in a convolution. A transposed one has the stride of its inputs: it is the adjoint
    of a convolution with that stride, and has its norms."""
    params = equation.params
    if place == 0 or params['batch_group_count'] != 1:
        return None
    numbers, groups = params['dimension_numbers'], params['feature_group_count']
    out, into, *sides = numbers.rhs_spec
    strides: dict[int, int] = {}
    for side, *steps in zip(sides, params['window_strides'], params['lhs_dilation'], strict=True):
        if min(steps) > 1:
            raise Unknown('a convolution with a stride of its inputs and one of its outputs')
        strides |= dict.fromkeys(axes[side], max(steps))
    reads = names.of([visit.operands[0].axes[numbers.lhs_spec[1]]]).reshape(groups, -1)
    makes = names.of([visit.results[0].axes[numbers.out_spec[1]]])
    return _Meeting(axes[into], axes[out], strides, groups, reads, makes)


def _without_taps(
    met: _Meeting, leaf: _Leaf
) -> tuple[np.ndarray, tuple[int, ...], tuple[int, ...]]:
    """What a kernel reads, without axes along which it reads one channel: `(reads, inputs, taps)`.

    A convolution that is written as a matrix product sums over its window as over its inputs.
    """
    reads = met.reads.reshape(met.groups, *(leaf.shape[k] for k in met.inputs))
    inputs, taps = [], []
    for at, k in reversed(list(enumerate(met.inputs, 1))):
        first = reads.take([0], at)
        if inputs and (reads == first).all():
            taps.append(k)
            reads = first
        else:
            inputs.append(k)
    return reads.reshape(met.groups, -1), tuple(inputs[::-1]), tuple(taps[::-1])
