"""Checks of arguments; a wrong type or value raises a one-line error that names the argument.

Checks that return a value return it as a plain Python type.
"""

import numbers
import operator
import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune.errors import PruneError, nearest, quoted, shown


class Option(NamedTuple):
    """What a key or an option means, and the values it takes.

    Attributes:
      doc: in a few words.
      choices: the words it may be; None for any.
      low: the least value.
      above: a bound that values lie above.
      high: the largest value.
    """

    doc: str
    choices: Collection[str] | None = None
    low: float | None = None
    above: float | None = None
    high: float | None = None


def outside(value: Any, option: Option) -> str:
    """What is wrong with a value of the right type, for the end of a message; '' for nothing.

    Traced numbers are not checked.
    """
    if isinstance(value, jax.core.Tracer):
        return ''
    if option.choices is not None and value not in option.choices:
        return f'{quoted(value)} is unknown, {nearest(value, filter(None, option.choices))}'
    if option.low is not None and not value >= option.low:
        return f'expected at least {option.low}, not {shown(value)}'
    if option.above is not None and not value > option.above:
        return f'expected more than {option.above}, not {shown(value)}'
    if option.high is not None and not value <= option.high:
        return f'expected at most {option.high}, not {shown(value)}'
    return ''


def expression(name: str, text: str) -> Callable[[str], Any]:
    """The search of a regular expression.

    Raises:
      PruneError: the text is none.
    """
    try:
        return re.compile(text).search
    except re.error as error:
        raise PruneError(f'{name}: {quoted(text)} is no regular expression: {error}') from None


def real(name: str, value: Any) -> float:
    """A number, not a truth value, not a string; arrays without axes count, traced ones too."""
    scalar = isinstance(value, numbers.Real) or (
        getattr(value, 'shape', None) == () and np.issubdtype(value.dtype, np.number)
    )
    if _is_truth(value) or not scalar or np.iscomplexobj(value):
        raise PruneError(f'{name} must be a number, not {shown(value)}')
    try:
        return value if isinstance(value, jax.core.Tracer) else float(value)
    except OverflowError:  # an integer beyond the largest float
        raise PruneError(f'{name} is too large: {shown(value)}') from None


def whole(name: str, value: Any) -> int:
    """A whole number, not a truth value."""
    try:
        if _is_truth(value):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise PruneError(f'{name} must be a whole number, not {shown(value)}') from None


def flag(name: str, value: Any) -> bool:
    """True or False; numbers such as 0 and 1 are refused."""
    if not isinstance(value, (bool, np.bool_)):
        raise PruneError(f'{name} must be True or False, not {shown(value)}')
    return bool(value)


def like(name: str, value: Any, default: Any) -> Any:
    """A value of the type of a default."""
    for kind, check in ((bool, flag), (int, whole), (float, real)):
        if isinstance(default, kind):
            return check(name, value)
    if not isinstance(value, type(default)):
        raise PruneError(f'{name} must be a {type(default).__name__}, not {shown(value)}')
    return value


def least(low: int, **numbers: Any) -> None:
    """Raises PruneError unless these are whole numbers of at least `low`."""
    for name, value in numbers.items():
        if whole(name, value) < low:
            raise PruneError(f'{name} must be at least {low}, not {shown(value)}')


def positive(name: str, value: float) -> None:
    """Raises PruneError unless a number is above zero; traced numbers are not checked."""
    if not isinstance(real(name, value), jax.core.Tracer) and not value > 0:
        raise PruneError(f'{name} must be above 0, not {shown(value)}')


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool) or getattr(value, 'dtype', None) == np.bool_
