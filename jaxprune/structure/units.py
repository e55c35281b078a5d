"""Units, and which indices of an axis belong to which: a union-find over what can be removed.

A unit is what can be removed: a channel, a head, a dimension of all heads. An index of an axis
belongs to one unit and goes when the unit goes. Uniting two axes unites their units, index by
index. Sizes are never compared, so axes that happen to be equally long stay apart.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

#: The unit of an index that never goes.
FIXED = 0


class Units:
    """A union-find over units, which grows while a function is read.

    A unit may have parts: it goes when one of them goes, and never by itself. An axis that is
    split into heads and dimensions has such units: index (h, d) goes with head h and with
    dimension d.
    """

    def __init__(self) -> None:
        self._parent = np.zeros(64, np.int64)
        self._count = 1
        self._parts: dict[int, tuple[int, ...]] = {}
        self._known: dict[tuple[int, ...], int] = {}
        self._reasons: dict[int, str] = {}
        #: Units whose zeros do not make them vanish: a sum meets other numbers there.
        self.loud: set[int] = set()

    def new(self, count: int) -> np.ndarray:
        """That many new units."""
        missing = self._count + count - len(self._parent)
        if missing > 0:
            room = max(missing, len(self._parent))
            self._parent = np.concatenate([self._parent, np.zeros(room, np.int64)])
        made = np.arange(self._count, self._count + count)
        self._parent[made] = made
        self._count += count
        return made

    def roots(self, units: np.ndarray) -> np.ndarray:
        """The unit that stands for each unit and all that are united with it."""
        found = self._parent[units]
        while True:
            above = self._parent[found]
            if np.array_equal(above, found):
                break
            found = above
        self._parent[units] = found
        return found

    def root(self, unit: int) -> int:
        while self._parent[unit] != unit:
            unit = self._parent[unit] = self._parent[self._parent[unit]]
        return int(unit)

    def parts(self, unit: int) -> tuple[int, ...]:
        """The units without parts that a unit goes with, sorted; none for `FIXED`."""
        unit = self.root(unit)
        if unit == FIXED:
            return ()
        if unit not in self._parts:
            return (unit,)
        return tuple(sorted({p for part in self._parts[unit] for p in self.parts(part)}))

    def parts_of(self, units: np.ndarray) -> set[int]:
        """The units without parts that any of these go with."""
        return {p for unit in np.unique(self.roots(units)) for p in self.parts(int(unit))}

    def reason(self, unit: int) -> str:
        """Why a unit without parts may not go; '' if it may."""
        return self._reasons.get(self.root(unit), '')

    def freeze(self, units: Iterable[int] | np.ndarray, reason: str) -> None:
        """Keeps units, and all that would take them along."""
        for part in self.parts_of(np.asarray(units, np.int64)):
            self._reasons.setdefault(part, reason)

    def whole(self, parts: Iterable[int]) -> int:
        """The unit that goes with any of these."""
        found = tuple(sorted({p for part in parts for p in self.parts(part)}))
        if not found:
            return FIXED
        if len(found) == 1:
            return found[0]
        if found not in self._known:
            [made] = self.new(1)
            self._known[found], self._parts[int(made)] = int(made), found
        return self._known[found]

    def unite(self, ones: np.ndarray, others: np.ndarray, reason: str) -> None:
        """Lets units go together, pair by pair; `reason` says why, where one of them stays."""
        a, b = self.roots(ones), self.roots(others)
        differ = a != b
        pairs = dict.fromkeys(zip(a[differ].tolist(), b[differ].tolist(), strict=True))
        if any(one in self._parts and other in self._parts for one, other in pairs):
            self._unite_alike(a, b, reason)
        for one, other in pairs:
            self._pair(one, other, reason)

    def _unite_alike(self, ones: np.ndarray, others: np.ndarray, reason: str) -> None:
        """Unites the parts that stand at the same indices, if that leaves nothing to unite.

        Two keys that are repeated for two heads each have parts at the indices 01 and 23 (the keys)
        and 02 and 13 (the copies). So have two values. Index 0 alone would leave open which of its
        two parts is which.
        """
        mine, theirs = self._places(ones), self._places(others)
        shared = mine.keys() & theirs.keys()
        left = {at: part for part, at in mine.items() if part not in shared}
        right = {at: part for part, at in theirs.items() if part not in shared}
        distinct = len(left) + len(shared) == len(mine)
        still = all(mine[part] == theirs[part] for part in shared)
        if distinct and still and left.keys() == right.keys():
            for at, part in left.items():
                self._pair(part, right[at], reason)

    def _places(self, units: np.ndarray) -> dict[int, tuple[int, ...]]:
        """The indices at which each unit without parts stands."""
        places: dict[int, list[int]] = {}
        for i, unit in enumerate(units.tolist()):
            for part in self.parts(unit):
                places.setdefault(part, []).append(i)
        return {part: tuple(at) for part, at in places.items()}

    def _pair(self, one: int, other: int, reason: str) -> None:
        one, other = self.root(one), self.root(other)
        mine, theirs = self.parts(one), self.parts(other)
        if mine == theirs:
            return
        if FIXED in (one, other):
            self.freeze([one, other], reason)
        elif one not in self._parts and other not in self._parts:
            self._merge(one, other)
        elif one not in self._parts and one not in theirs:
            self._define(one, theirs)
        elif other not in self._parts and other not in mine:
            self._define(other, mine)
        else:
            self._match(one, other, reason)

    def _merge(self, one: int, other: int) -> None:
        low, high = min(one, other), max(one, other)
        self._parent[high] = low
        if high in self._reasons:
            self._reasons.setdefault(low, self._reasons[high])
        if high in self.loud:
            self.loud.add(low)

    def _define(self, unit: int, parts: tuple[int, ...]) -> None:
        """A unit without parts goes with others from now on."""
        self._parts[unit] = parts
        if unit in self._reasons:
            self.freeze(parts, self._reasons[unit])

    def _match(self, one: int, other: int, reason: str) -> None:
        """Units with parts: the parts in which they differ are united if there is one each."""
        mine, theirs = set(self.parts(one)), set(self.parts(other))
        left, right = sorted(mine - theirs), sorted(theirs - mine)
        if len(left) == len(right) == 1:
            self._pair(left[0], right[0], reason)
        else:
            self.freeze([one, other], f'axes are mixed: {reason}')

    def split(self, grid: np.ndarray, reason: str) -> list[np.ndarray]:
        """The units of the axes that an axis is split into.

        Args:
          grid: the units of its indices, in the shape of the new axes.
          reason: the operation, for what cannot be split.
        """
        roots = self.roots(grid)
        parts = {int(u): frozenset(self.parts(int(u))) for u in np.unique(roots)}
        if all(len(p) == 0 for p in parts.values()):
            return [np.zeros(n, np.int64) for n in grid.shape]
        found = _brought(roots, parts)
        if found is not None:
            return [np.array([self.whole(p) for p in axis]) for axis in found]
        if any(len(p) != 1 for p in parts.values()):
            self.freeze(grid.ravel(), f'axes are mixed: {reason}')
            return [np.zeros(n, np.int64) for n in grid.shape]
        axes = [self.new(n) for n in grid.shape]
        for at in np.ndindex(grid.shape):
            made = self.whole(axis[i] for axis, i in zip(axes, at, strict=True))
            self._pair(int(grid[at]), made, reason)
        return [self.roots(axis) for axis in axes]


def _brought(
    roots: np.ndarray, parts: dict[int, frozenset[int]]
) -> list[list[frozenset[int]]] | None:
    """The parts that each index of each axis brings to its cells; None if these are not all."""
    distinct, inverse = np.unique(roots, return_inverse=True)
    inverse = inverse.reshape(roots.shape)
    sets = [parts[int(u)] for u in distinct]

    def common(cells: np.ndarray) -> frozenset[int]:
        return frozenset.intersection(*(sets[i] for i in np.unique(cells)))

    if common(inverse):
        return None
    axes = [
        [common(np.take(inverse, i, axis)) for i in range(roots.shape[axis])]
        for axis in range(roots.ndim)
    ]
    whole = all(
        sets[inverse[at]] == frozenset().union(*(axes[k][i] for k, i in enumerate(at)))
        for at in np.ndindex(roots.shape)
    )
    return axes if whole else None


@dataclasses.dataclass(eq=False)
class Axis:
    """An axis of an array; united axes share one.

    Attributes:
      size: its length.
      units: the unit of each index; None as long as it may become anything.
      fixed: why no index may go; '' if there is no reason.
      same: the axis that it was united with.
    """

    size: int
    units: np.ndarray | None = None
    fixed: str = ''
    same: 'Axis | None' = None


def fixed(size: int, reason: str) -> Axis:
    """An axis none of whose indices may go."""
    return Axis(size, None, reason)


def found(axis: Axis) -> Axis:
    """The axis that stands for all that it was united with."""
    while axis.same is not None:
        axis = axis.same
    return axis


def units_of(table: Units, axis: Axis) -> np.ndarray:
    """The units of an axis; an open axis gets new ones."""
    axis = found(axis)
    if axis.fixed:
        return np.zeros(axis.size, np.int64)
    if axis.units is None:
        axis.units = table.new(axis.size)
    return axis.units


def fix(table: Units, axis: Axis, reason: str) -> None:
    """Keeps all indices of an axis."""
    axis = found(axis)
    if axis.units is not None:
        table.freeze(axis.units, reason)
    elif not axis.fixed:
        axis.fixed = reason


def unite(table: Units, one: Axis, other: Axis, reason: str) -> Axis:
    """Lets two axes of one size go together."""
    one, other = found(one), found(other)
    if one is other:
        return one
    if one.units is not None and other.units is not None:
        table.unite(one.units, other.units, reason)
        other.same = one
        return one
    if why := one.fixed or other.fixed:
        fix(table, one, why)
        fix(table, other, why)
    first, second = (other, one) if one.units is None else (one, other)
    second.same = first
    return first


def picked(table: Units, axis: Axis, where: np.ndarray | slice) -> Axis:
    """Some indices of an axis, in an order."""
    axis = found(axis)
    if axis.fixed:
        return fixed(len(np.arange(axis.size)[where]), axis.fixed)
    units = units_of(table, axis)[where]
    return Axis(len(units), units)


def merged(table: Units, axes: Sequence[Axis]) -> Axis:
    """One axis in place of several, the last index running fastest."""
    axes = [found(a) for a in axes]
    if len(axes) == 1:
        return axes[0]
    shape = [a.size for a in axes]
    size = math.prod(shape)  # of no number while `jax.export` leaves one open
    if all(a.fixed for a in axes):
        return fixed(size, axes[0].fixed)
    moving = [i for i, a in enumerate(axes) if not a.fixed]
    if len(moving) == 1:
        at = [1] * len(axes)
        at[moving[0]] = -1
        units = units_of(table, axes[moving[0]]).reshape(at)
        return Axis(size, np.broadcast_to(units, shape).ravel().copy())
    roots = [table.roots(units_of(table, a)) for a in axes]
    grids = np.stack([g.ravel() for g in np.meshgrid(*roots, indexing='ij')], axis=1)
    rows, places = np.unique(grids, axis=0, return_inverse=True)
    units = np.array([table.whole(row) for row in rows.tolist()])
    return Axis(size, units[places.ravel()])


def divided(table: Units, axis: Axis, shape: Sequence[int], reason: str) -> list[Axis]:
    """Several axes in place of one."""
    axis = found(axis)
    if len(shape) == 1:
        return [axis]
    if axis.fixed:
        return [fixed(n, axis.fixed) for n in shape]
    parts = table.split(units_of(table, axis).reshape(tuple(shape)), reason)
    return [Axis(len(units), units) for units in parts]
