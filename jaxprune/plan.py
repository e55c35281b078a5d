"""The host table of keep counts: quota x schedule x density -> exact integers per event."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxprune.errors import PruneError
from jaxprune.quota import Shape, check_density, quota, round_counts
from jaxprune.schedule import schedule
from jaxprune.types import GLOBAL


class Plan(NamedTuple):
    """When a run is pruned, and to how many weights.

    Attributes:
      steps: int32 `(events,)`, the training step before which each event happens.
      counts: path (or '*') -> int32 `(events,)`, weights to keep after each event.
    """

    steps: np.ndarray
    counts: dict[str, np.ndarray]


def keep_counts(
    shapes: Mapping[str, Shape], density: float, allocation: str = 'global'
) -> dict[str, int]:
    """How many weights a density keeps.

    Args:
      shapes: path -> shape of every prunable leaf.
      density: fraction kept, in (0, 1].
      allocation: 'global' for one ranking over all leaves, or the name of a layerwise quota.

    Returns:
      `{'*': round(density * total)}`, or path -> round(layer density * size).

    Raises:
      PruneError: the density is out of range, or keeps no weight at all.
    """
    check_density(density)
    if allocation == 'global':
        counts = {GLOBAL: round(density * sum(math.prod(s) for s in shapes.values()))}
    else:
        counts = round_counts(shapes, quota(allocation)(shapes, density))
    if not sum(counts.values()):
        total = sum(math.prod(s) for s in shapes.values())
        raise PruneError(f'density {density:.3g} keeps none of {total} prunable weights')
    return counts


def at_init(
    shapes: Mapping[str, Shape],
    density: float,
    *,
    allocation: str = 'global',
    rounds: int = 1,
    over: str = 'exponential',
) -> Plan:
    """Pruning at initialisation: all events before the first step.

    Args:
      shapes: path -> shape of every prunable leaf.
      density: final density.
      allocation: see `keep_counts`.
      rounds: number of events; 1 is one-shot.
      over: name of the schedule of densities over the rounds.
    """
    if rounds < 1:
        raise PruneError(f'rounds must be at least 1, not {rounds}')
    check_density(density)
    per_round = [keep_counts(shapes, d, allocation) for d in schedule(over)(density, rounds)]
    counts = {path: np.array([c[path] for c in per_round], np.int32) for path in per_round[0]}
    return Plan(np.zeros(rounds, np.int32), counts)
