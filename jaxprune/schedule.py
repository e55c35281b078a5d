"""Densities over the rounds of an iterative pruner, as plain host floats."""

from collections.abc import Callable

from jaxprune.errors import lookup

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


def harmonic(density: float, rounds: int) -> list[float]:
    """`1 / (1 + (1 / density - 1) * i / rounds)`: compression grows by the same amount each round.

    With p = 1 - density a round removes `p / (i p + rounds (1 - p))` of what is left (Lubana &
    Dick, ICLR 2021, arXiv:2009.11839, in their code).
    """
    return [1 / (1 + (1 / density - 1) * i / rounds) for i in range(1, rounds)] + [density]


def linear_early(density: float, rounds: int) -> list[float]:
    """`linear` that gets there a round early: for methods that remove in a round what they chose
    in the one before.
    """
    return [*linear(density, rounds - 1), density] if rounds > 1 else [density]


def constant(density: float, rounds: int) -> list[float]:
    """The final density in every round: for methods whose rounds do not prune step by step."""
    return [density] * rounds


SCHEDULES: dict[str, Schedule] = {
    'exponential': exponential,
    'linear': linear,
    'linear_early': linear_early,
    'harmonic': harmonic,
    'constant': constant,
}


def schedule(name: str) -> Schedule:
    """The schedule of that name."""
    return lookup('schedule', name, SCHEDULES)
