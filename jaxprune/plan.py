"""The host table of keep counts: allocation x schedule x density -> exact integers per event."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxprune import arguments
from jaxprune.allocation import (
    ALLOCATIONS,
    SHARED,
    Shape,
    bounded_counts,
    bounds,
    check_density,
    layerwise,
    round_counts,
    sizes,
)
from jaxprune.errors import PruneError, check_choice, shown
from jaxprune.schedule import RISING, schedule
from jaxprune.types import GLOBAL

#: Rounds are rows of a table on the host, and events on a run's timeline.
MOST_ROUNDS = 10_000


class Plan(NamedTuple):
    """When a run is pruned, and to how many weights.

    Attributes:
      steps: int32 `(events,)`, the training step before which each event happens.
      counts: path (or '*') -> int32 `(events,)`, weights to keep after each event.
    """

    steps: np.ndarray
    counts: dict[str, np.ndarray]


def keep_counts(
    shapes: Mapping[str, Shape],
    density: float | None = None,
    allocation: str = 'global',
    *,
    compression: float | None = None,
    floor: int | Mapping[str, int] = 0,
    cap: float | Mapping[str, float] = 1.0,
    what: str = 'prunable weights',
) -> dict[str, int]:
    """How many weights a density keeps.

    Args:
      shapes: path -> shape of every prunable leaf, in forward order if the allocation needs it.
      density: fraction kept, in (0, 1].
      compression: 1 / density, in place of it.
      allocation: 'global' for one ranking over all leaves, 'lamp' for one number that the pruning
        event shares out by the weights, or the name of a layerwise allocation.
      floor: fewest weights that a layer keeps, for all layers or by path.
      cap: largest density of a layer, for all layers or by path.
      what: is counted, for messages.

    Returns:
      `{'*': round(density * total)}` for 'global' and 'lamp', which only checks that the bounds
      can be met; whoever selects has to keep them (`allocation.bounds`). Otherwise path ->
      round(layer density * size), and where that crosses a bound, the same total within bounds.

    Raises:
      PruneError: an argument is out of range, the density keeps no weight at all, or it keeps
        fewer weights than the floors or more than the caps together.
    """
    density = density_of(density, compression)
    fewest, most = bounds(shapes, floor, cap)
    counts, asked = _counts(shapes, density, allocation, fewest, most)
    total, least, largest = (sum(c.values()) for c in (sizes(shapes), fewest, most))
    keeps = f'density {density:.3g} keeps {asked or "none"} of {total} {what}'
    if asked < least:
        raise PruneError(f'{keeps}, but the floors together are {least}')
    if asked > largest:
        raise PruneError(f'{keeps}, but the caps together allow {largest}')
    if not asked:
        raise PruneError(keeps)
    return counts


def _counts(
    shapes: Mapping[str, Shape],
    density: float,
    allocation: str,
    fewest: Mapping[str, int],
    most: Mapping[str, int],
) -> tuple[dict[str, int], int]:
    """The counts of one event within bounds, and their sum had there been no bounds."""
    check_choice('allocation', allocation, ALLOCATIONS)
    if allocation in SHARED:
        asked = round(density * sum(sizes(shapes).values()))
        return {GLOBAL: min(max(asked, sum(fewest.values())), sum(most.values()))}, asked
    densities = layerwise(allocation)(shapes, density)
    asked = sum(round_counts(shapes, densities).values())
    return bounded_counts(shapes, densities, fewest, most), asked


def plan_rounds(
    shapes: Mapping[str, Shape],
    density: float | None = None,
    *,
    compression: float | None = None,
    allocation: str = 'global',
    rounds: int = 1,
    density_schedule: str = 'exponential',
    steps: Sequence[int] | None = None,
    floor: int | Mapping[str, int] = 0,
    cap: float | Mapping[str, float] = 1.0,
    what: str = 'prunable weights',
) -> Plan:
    """The events of a method: when each round happens and what it keeps.

    Args:
      shapes: see `keep_counts`.
      density: final density.
      compression: 1 / density, in place of it.
      allocation: see `keep_counts`.
      rounds: number of events; 1 is one-shot.
      density_schedule: name of the schedule of densities over the rounds.
      steps: the training step before which each round happens, never falling; None for all of them
        before training.
      floor: see `keep_counts`; it holds in every round.
      cap: see `keep_counts`; it holds in every round, and a round whose density is more than the
        caps allow keeps what they allow.
      what: is counted, for messages.

    Returns:
      The plan. No count rises from one event to the next, but where the schedule rises
      (`schedule.RISING`).

    Raises:
      PruneError: an argument is out of range, a density that keeps nothing, steps that fall or are
        not one for each round.
    """
    density = density_of(density, compression)
    arguments.least(1, rounds=rounds)
    if rounds > MOST_ROUNDS:
        raise PruneError(f'rounds must be at most {MOST_ROUNDS}, not {rounds}')
    steps = _checked_steps(steps, rounds)
    last = keep_counts(shapes, density, allocation, floor=floor, cap=cap, what=what)
    fewest, most = bounds(shapes, floor, cap)
    per_round = [last]
    for earlier in reversed(schedule(density_schedule)(density, rounds)[:-1]):
        if allocation not in SHARED and density_schedule not in RISING:
            # What a bound takes from one layer others get, and they could end up with more
            # than in the round before; no event brings weights back.
            fewest = per_round[-1]
        per_round.append(_counts(shapes, earlier, allocation, fewest, most)[0])
    per_round.reverse()
    counts = {path: np.array([c[path] for c in per_round], np.int32) for path in last}
    return Plan(steps, counts)


def _checked_steps(steps: Sequence[int] | None, rounds: int) -> np.ndarray:
    """The steps of so many rounds as int32."""
    if steps is None:
        return np.zeros(rounds, np.int32)
    if not hasattr(steps, '__len__') or not hasattr(steps, '__iter__'):
        raise PruneError(f'steps must be a list of steps, not {shown(steps)}')
    steps = [arguments.whole('steps', step) for step in steps]
    if len(steps) != rounds:
        raise PruneError(f'steps must hold one step for each of {rounds} rounds, not {len(steps)}')
    for before, step in zip((0, *steps), steps, strict=False):
        if step < before or step >= 2**31:
            raise PruneError(f'steps must not fall and lie below 2**31, not {shown(steps)}')
    return np.array(steps, np.int32)


def density_of(density: float | None, compression: float | None) -> float:
    """The density that one of two arguments gives.

    Raises:
      PruneError: neither or both are given, a density outside (0, 1], a compression below 1.
    """
    if (density is None) == (compression is None):
        raise PruneError('give either density= or compression= (1 / density)')
    if density is not None:
        check_density(density)
        return float(density)
    if not arguments.real('compression', compression) >= 1:
        raise PruneError(f'compression must be at least 1, not {compression}')
    return 1 / compression
