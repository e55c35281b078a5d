"""Errors that a user can fix, and how their messages show values and suggest names."""

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

_Entry = TypeVar('_Entry')
#: Most characters of a value, and of a name, in a message; paths of parameters are names.
_VALUE, _NAME = 40, 100


class JaxpruneError(Exception):
    """An error that the caller can fix; its message is one line and says how."""


class SpecError(JaxpruneError):
    """A sweep specification that cannot be run."""


class DataError(JaxpruneError):
    """Data that are missing, cannot be read, or do not fit the request."""


class StoreError(JaxpruneError):
    """A result directory or a file that lacks what is read, is broken, or cannot be written."""


class ReadError(StoreError):
    """A file that is there and cannot be read now: a lost network. The same call may work."""


class WriteError(StoreError):
    """A file that cannot be written now: a full disk, a lost network. The same call may work."""


class Interrupted(JaxpruneError):
    """Work that was left because a signal asked for it; the same command continues."""


class PruneError(JaxpruneError):
    """Arguments for which there is no valid mask, score or measurement."""


def lookup(
    kind: str,
    name: object,
    registry: Mapping[str, _Entry],
    error: type[JaxpruneError] = PruneError,
) -> _Entry:
    """The entry of a registry.

    Args:
      kind: what the registry holds, for the message.
      name: the key; anything that is not one is an error, whatever its type.
      registry: name -> entry.
      error: what to raise.

    Raises:
      JaxpruneError: of the type `error`, if the registry lacks the name; the message offers the
        nearest one.
    """
    check_choice(kind, name, registry, error)
    return registry[name]


def check_choice(
    kind: str, name: object, valid: Collection[str], error: type[JaxpruneError] = PruneError
) -> None:
    """Raises an error unless a name is one of the valid ones.

    Args:
      kind: what is chosen, for the message.
      name: the choice; anything that is not a valid name is an error, whatever its type.
      valid: the names.
      error: what to raise.

    Raises:
      JaxpruneError: of the type `error`; the message offers the nearest name.
    """
    if not isinstance(name, str) or name not in valid:
        raise error(f'unknown {kind} {quoted(name)}: {nearest(name, valid)}')


def nearest(name: object, valid: Iterable[str]) -> str:
    """The tail of an error message about an unknown name.

    Returns:
      `did you mean 'x'? (valid: ...)`, or only the valid names if none is close.
    """
    valid = sorted(valid)
    if not valid:
        return 'there are none'
    close = difflib.get_close_matches(_short(name), valid, n=1, cutoff=0.5)
    listing = f'valid: {", ".join(valid)}'
    return f"did you mean '{close[0]}'? ({listing})" if close else listing


def quoted(name: object) -> str:
    """A name for a message: in quotation marks, on one line, shortened where it is long."""
    return f"'{_short(name)}'"


def shown(value: Any) -> str:
    """A value for a message: on one line, as written if that is short, else by its type."""
    if isinstance(value, str):
        return repr(_cut(value, _VALUE))
    try:
        written = repr(value)
    except Exception:  # such as an integer of more digits than Python prints
        written = ''
    if len(written.splitlines()) == 1 and len(written) <= _VALUE:
        return written
    shape = getattr(value, 'shape', None)
    of_shape = f' of shape {tuple(shape)}' if isinstance(shape, tuple) else ''
    return type(value).__name__ + of_shape


def _short(name: object) -> str:
    return _cut(' '.join(name.split()), _NAME) if isinstance(name, str) else shown(name)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f'{text[: length - 3]}...'


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
