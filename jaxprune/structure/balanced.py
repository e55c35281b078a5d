"""Units into groups of given sizes: by what each is worth in each group, or by likeness."""

from collections.abc import Sequence

import numpy as np

#: An exchange that gains less than this share of all worth is rounding.
_ROUNDING = 1e-12


def assigned(gain: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Each unit into a group, so that the sum of what they are worth there is large.

    First greedily: of all pairs of a free unit and a group with room, the one of most worth, again
    and again. Then by exchanges of two units, until no exchange gains.

    Args:
      gain: `(units, groups)`, the worth of a unit in a group.
      room: how many units each group takes, as many as there are in all.

    Returns:
      The group of each unit. Equal worth: the lowest unit, then the lowest group.
    """
    return _exchanged(gain, _greedy(gain, room.tolist()))


def _greedy(gain: np.ndarray, room: list[int]) -> np.ndarray:
    units, groups = np.divmod(np.argsort(-gain, axis=None, kind='stable'), len(room))
    found = [-1] * len(gain)
    left = len(found)
    for unit, group in zip(units.tolist(), groups.tolist(), strict=True):
        if found[unit] < 0 and room[group]:
            found[unit] = group
            room[group] -= 1
            left -= 1
            if not left:
                break
    return np.array(found)


def _exchanged(gain: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """After all exchanges of two units that gain, the best first.

    The gain of a move does not depend on the other units, so pairs of groups without a group in
    common exchange at the same time.
    """
    units, groups = np.arange(len(gain)), groups.copy()
    least = _ROUNDING * float(gain.sum())
    while True:
        more = gain - gain[units, groups][:, None]
        members = np.split(np.argsort(groups, kind='stable'), np.cumsum(np.bincount(groups))[:-1])
        best = np.array([more[at].max(0) for at in members])  # leaving a group for another
        both = np.triu(best + best.T, 1)
        busy: set[int] = set()
        for pair in np.argsort(-both, axis=None, kind='stable').tolist():
            one, other = divmod(pair, len(both))
            if both[one, other] <= least:
                break
            if busy.isdisjoint((one, other)):
                leaves = members[one][more[members[one], other].argmax()]
                comes = members[other][more[members[other], one].argmax()]
                groups[leaves], groups[comes] = other, one
                busy |= {one, other}
        if not busy:
            return groups


def grown(alike: Sequence[tuple[np.ndarray, np.ndarray]], seeds: np.ndarray) -> np.ndarray:
    """Units in an order in which those of one group are alike.

    Positions are filled one after the other, each by the free unit that is most like the units
    already in its groups. Where none is like them at all, the next free seed is taken.

    Args:
      alike: pairs of the group of each position and the products of all units' profiles,
        `(units, units)`; positions of a group follow each other.
      seeds: all units, in the order in which groups are grown from them.

    Returns:
      The unit of each position.
    """
    # Between plain products, where heavy units are like all others, and cosines.
    length = np.sqrt(sum(np.diag(products) for _, products in alike))
    scale = 1 / np.sqrt(np.where(length > 0, length, 1.0))
    near = np.zeros((len(alike), len(seeds)))
    free, waiting = np.ones(len(seeds), bool), iter(seeds.tolist())
    order = np.empty_like(seeds)
    for position in range(len(seeds)):
        for own, (group, _) in zip(near, alike, strict=True):
            if position and group[position] != group[position - 1]:
                own[:] = 0
        likeness = np.where(free, near.sum(0) * scale, -1.0)
        unit = int(likeness.argmax())
        if likeness[unit] <= 0:
            unit = next(seed for seed in waiting if free[seed])
        order[position], free[unit] = unit, False
        for own, (_, products) in zip(near, alike, strict=True):
            own += products[unit]
    return order
