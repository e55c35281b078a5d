"""Errors a user can mend, and the one way to suggest a name."""

import difflib
from collections.abc import Iterable


class JaxpruneError(Exception):
    """A mistake in what was asked; its message is one line that says how to mend it."""


class SpecError(JaxpruneError):
    """A sweep specification that cannot be run."""


class DataError(JaxpruneError):
    """A data set that is missing or cannot be read."""


class StoreError(JaxpruneError):
    """A result directory that does not hold what was asked for."""


class PruneError(JaxpruneError):
    """A mask that would not be what was asked for."""


def nearest(name: object, valid: Iterable[str]) -> str:
    """The tail of an error message about an unknown name.

    Returns:
      `did you mean 'x'? (valid: ...)`, or only the valid names if none is close.
    """
    valid = sorted(valid)
    close = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    listing = f'valid: {", ".join(valid)}'
    return f"did you mean '{close[0]}'? ({listing})" if close else listing


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
