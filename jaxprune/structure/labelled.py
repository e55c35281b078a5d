"""What is known of an array while coupled groups are read: the units of its axes, and its zeros."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jax.extend import source_info_util
from jax.extend.core import JaxprEqn

from jaxprune.structure.units import Axis, Units, fixed, found, units_of

#: An axis of a parameter: its path and the number of the axis.
Source = tuple[str, int]
NONE: frozenset[Source] = frozenset()


class Labelled(NamedTuple):
    """What is known of an array in place of its numbers.

    Attributes:
      axes: its axes.
      zero: for each axis, is the array zero at every index that goes?
      sources: for each axis, the axes of parameters that it is, as long as nothing but parameters
        made the array.
      given: it does not depend on the inputs.
      number: the array itself, if it is small and known.
      summed: the axes that it was just summed over, while it may still be divided by their length.
    """

    axes: tuple[Axis, ...]
    zero: tuple[bool, ...]
    sources: tuple[frozenset[Source], ...]
    given: bool = False
    number: np.ndarray | None = None
    summed: tuple[Axis, ...] = ()


#: One axis of a result: the axis, whether it is zero there, its sources.
Part = tuple[Axis, bool, frozenset[Source]]


class Reading(NamedTuple):
    """What is found while a function is read.

    Attributes:
      units: which indices go together.
      roles: axis of a parameter -> some of 'in' (summed over with an activation), 'out' (it makes
        an axis of a product) and 'along' (it follows an activation entry by entry).
      products: of two activations: the axes along which they go in parallel, as heads do, and the
        other axes of a factor.
      goes: may an index of this axis go? Asked where it matters whether a number is zero there.
      heard: called with an axis that a sum runs over where neither factor is zero, and the place.
      sliced: a normalisation over an axis goes on over what is left of it; else no index of such
        an axis may go.
    """

    units: Units
    roles: dict[Source, set[str]]
    products: list[tuple[tuple[Axis, ...], tuple[Axis, ...]]]
    goes: Callable[[Axis], bool]
    heard: Callable[[Axis, str], None]
    sliced: bool = False


def place(equation: JaxprEqn) -> str:
    """Where an operation stands in the user's code, for reasons."""
    where = source_info_util.summarize(equation.source_info)
    scope = str(equation.source_info.name_stack)
    # Inside of library functions that are compiled on their own there is no place.
    at = f' at {where}' if where.strip(' ;') else ''
    return f"'{equation.primitive.name}'{at}" + (f' in {scope}' if scope else '')


def opened(shape: Sequence[int], given: bool = False, zero: bool = False) -> Labelled:
    """An array whose axes may become anything."""
    count = len(shape)
    return Labelled(tuple(Axis(n) for n in shape), (zero,) * count, (NONE,) * count, given)


def kept(shape: Sequence[int], reason: str, given: bool = False) -> Labelled:
    """An array none of whose indices may go."""
    return opened(shape, given)._replace(axes=tuple(fixed(n, reason) for n in shape))


def made_of(parts: Sequence[Part], given: bool) -> Labelled:
    """An array from its axes."""
    if not parts:
        return Labelled((), (), (), given)
    return Labelled(*map(tuple, zip(*parts, strict=True)), given)


def part(value: Labelled, i: int) -> Part:
    """An axis of an array."""
    return value.axes[i], value.zero[i], value.sources[i]


def parts(value: Labelled) -> list[Part]:
    """The axes of an array."""
    return [part(value, i) for i in range(len(value.axes))]


def movable(reading: Reading, axis: Axis) -> np.ndarray:
    """The units of an axis that becomes part of another one."""
    axis = found(axis)
    if not axis.fixed:
        return units_of(reading.units, axis)
    units = reading.units.new(axis.size)
    reading.units.freeze(units, axis.fixed)
    return units


def note_role(reading: Reading, sources: frozenset[Source], role: str) -> None:
    """Remembers what an activation does with axes of parameters."""
    for source in sources:
        reading.roles.setdefault(source, set()).add(role)
