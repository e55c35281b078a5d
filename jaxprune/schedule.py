"""Densities over the rounds of an iterative pruner, as plain host floats."""

from collections.abc import Callable

from jaxprune.errors import PruneError, nearest

#: (final density, rounds) -> density after each round; the last is the final density exactly.
Schedule = Callable[[float, int], list[float]]


def exponential(density: float, rounds: int) -> list[float]:
    """`density ** (i / rounds)`: each round removes the same fraction of what is left.

    The schedule of SynFlow, FORCE and iterative SNIP.
    """
    return [density ** (i / rounds) for i in range(1, rounds)] + [density]


def linear(density: float, rounds: int) -> list[float]:
    """`1 - (1 - density) * i / rounds`: each round removes the same number of weights."""
    return [1 - (1 - density) * i / rounds for i in range(1, rounds)] + [density]


SCHEDULES: dict[str, Schedule] = {'exponential': exponential, 'linear': linear}


def schedule(name: str) -> Schedule:
    """The schedule of that name."""
    if not isinstance(name, str) or name not in SCHEDULES:
        raise PruneError(f"unknown schedule '{name}': {nearest(name, SCHEDULES)}")
    return SCHEDULES[name]
