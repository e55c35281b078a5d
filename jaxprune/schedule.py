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


def ramp(density: float, rounds: int) -> list[float]:
    """`linear` whose first round keeps everything: `1 - (1 - density) * (i - 1) / (rounds - 1)`."""
    return [1 - (1 - density) * (i - 1) / (rounds - 1) for i in range(1, rounds)] + [density]


def cubic(density: float, rounds: int) -> list[float]:
    """`1 - (1 - density) * (1 - (1 - p)³)` at `p = (i - 1) / (rounds - 1)`: fast at first.

    The first round keeps everything, as in gradual magnitude pruning (Zhu & Gupta 2017,
    arXiv:1710.01878): its rounds are at t0, t0 + Δ, ..., t0 + nΔ, and the sparsity is 0 at t0.
    """
    left = [(1 - (i - 1) / (rounds - 1)) ** 3 for i in range(1, rounds)]
    return [1 - (1 - density) * (1 - part) for part in left] + [density]


def alternate(density: float, rounds: int) -> list[float]:
    """The final density and everything by turns, the final density last.

    AC/DC (Peste et al., NeurIPS 2021, arXiv:2106.12379). With methods that bring weights back.
    """
    return [density if (rounds - i) % 2 == 0 else 1.0 for i in range(1, rounds + 1)]


def constant(density: float, rounds: int) -> list[float]:
    """The final density in every round: for methods whose rounds do not prune step by step."""
    return [density] * rounds


#: Schedules whose densities do not only fall: for methods that bring weights back.
RISING = ('alternate',)

SCHEDULES: dict[str, Schedule] = {
    'exponential': exponential,
    'linear': linear,
    'linear_early': linear_early,
    'harmonic': harmonic,
    'ramp': ramp,
    'cubic': cubic,
    'alternate': alternate,
    'constant': constant,
}


def schedule(name: str) -> Schedule:
    """The schedule of that name."""
    return lookup('schedule', name, SCHEDULES)
