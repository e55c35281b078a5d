"""The values that connectivity carries through a network in place of numbers."""

from typing import Any, NamedTuple

import jax

#: bool array, True where something is known at the trace; None for nowhere. Almost always None.
Pattern = jax.Array | None


class Const(NamedTuple):
    """A value that no input reaches.

    Attributes:
      value: the array, where the trace holds it, or a traced one where a loop makes it of such;
        None for parameters and what is made of them.
      source: identifies the parameter that it is a rearrangement of, if any.
      mixed: paths of prunable leaves that it is computed from.
      shut: where it is zero, as far as is known without `value`.
      low: where it is so negative that `exp` of it is zero, as far as is known without `value`.
    """

    value: Any = None
    source: Any = None
    mixed: tuple[str, ...] = ()
    shut: Pattern = None
    low: Pattern = None


class Weight(NamedTuple):
    """A prunable leaf, or a rearrangement of one or several.

    Attributes:
      kept: float array, 1 where the mask keeps, else 0.
      leaves: their paths.
    """

    kept: jax.Array
    leaves: tuple[str, ...]


class Signal(NamedTuple):
    """A value that depends on the input.

    Attributes:
      live: float array, 1 where some input reaches, else 0.
      root: number of the tensor of which this is an elementwise function.
      of: numbers of the tensors of which this is a statistic.
      inverse: a statistic by whose inverse a tensor is scaled: one over it, or over its root.
      open: never negative, and zero only where `shut` is True.
      shut: where a constant makes it zero.
      low: where a constant makes it so negative that `exp` of it is zero.
    """

    live: jax.Array
    root: int
    of: frozenset[int] = frozenset()
    inverse: bool = False
    open: bool = False
    shut: Pattern = None
    low: Pattern = None


def named(leaves: tuple[str, ...]) -> str:
    """Paths for a message."""
    return ' and '.join(f"'{leaf}'" for leaf in leaves)


def array_of(value: Any) -> Any:
    """The array of a constant, traced where a loop makes it; None for all else."""
    return value.value if isinstance(value, Const) else None


def numbers(value: Any) -> Any:
    """The array of a constant that is known now; None for all else, traced constants included."""
    array = array_of(value)
    return None if isinstance(array, jax.core.Tracer) else array
