"""Orders of units that gather the mass of matrices in blocks: the search behind matrix pivoting.

Units are rows, columns, or both: a channel is a column of the kernel that makes it and a row of
every kernel that reads it. An order of units moves all of these together. This is host code in
NumPy and float64. Equal candidates are told apart by the lowest index.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxprune.structure.balanced import assigned, grown

#: A gain below this share of all mass is rounding.
_ROUNDING = 1e-12


class Target(NamedTuple):
    """What is wanted of a matrix: that `count` blocks hold as much of it as possible.

    Attributes:
      block: rows and columns of a block.
      count: how many blocks are kept.
    """

    block: tuple[int, int]
    count: int


class Place(NamedTuple):
    """Where the units of an order lie in a matrix.

    Attributes:
      matrix: its number.
      side: 0 if units are rows, 1 if they are columns.
      indices: `(units, k)`, the k rows or columns of each unit.
    """

    matrix: int
    side: int
    indices: np.ndarray


class State(NamedTuple):
    """Where a search stands.

    Attributes:
      orders: for each order a permutation; position i has unit `orders[..][i]`.
      matrices: the matrices in these orders.
      kept: of each matrix the mass in its best blocks.
      trace: the sum of `kept`, at the start and after every step taken.
    """

    orders: tuple[np.ndarray, ...]
    matrices: tuple[np.ndarray, ...]
    kept: tuple[float, ...]
    trace: tuple[float, ...]


class Problem(NamedTuple):
    """What is searched for.

    Attributes:
      targets: what is wanted of each matrix.
      orders: for each order the places of its units, equally many units in each place.
    """

    targets: tuple[Target, ...]
    orders: tuple[tuple[Place, ...], ...]


# --- blocks -------------------------------------------------------------------------------------


def block_sums(matrix: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """The sum of every block; blocks at the far edges are smaller where a side does not divide."""
    return _summed(_summed(matrix, 0, block[0]), 1, block[1])


def block_sizes(shape: tuple[int, ...], block: tuple[int, int]) -> np.ndarray:
    """The number of entries of every block."""
    sides = (
        np.diff([*range(0, length, side), length])
        for length, side in zip(shape, block, strict=True)
    )
    return np.multiply.outer(*sides)


def best_blocks(matrix: np.ndarray, target: Target) -> np.ndarray:
    """The `count` blocks with the largest means, one bool per block.

    The rule of `pattern.block_top_k` with `reduce='mean'`: a small block at an edge counts by its
    mass per entry, and of equal blocks the first is kept.
    """
    means = block_sums(matrix, target.block) / block_sizes(matrix.shape, target.block)
    chosen = np.zeros(means.size, bool)
    chosen[np.argsort(-means, axis=None, kind='stable')[: target.count]] = True
    return chosen.reshape(means.shape)


def kept_mass(matrix: np.ndarray, target: Target) -> float:
    """The mass in the best blocks."""
    return float(block_sums(matrix, target.block)[best_blocks(matrix, target)].sum())


def _summed(matrix: np.ndarray, axis: int, side: int) -> np.ndarray:
    """Sums over each `side` consecutive indices of an axis."""
    return np.add.reduceat(matrix, np.arange(0, matrix.shape[axis], side), axis)


# --- search -------------------------------------------------------------------------------------


def search(
    problem: Problem, matrices: Sequence[np.ndarray], rng: np.random.Generator, restarts: int
) -> State:
    """Orders of units under which the best blocks hold much mass, never less than as given.

    Each start is improved one order at a time, until no step gains; steps that would lose mass are
    not taken. The best end wins, of equal ones the first.

    Args:
      problem: what is wanted.
      matrices: not negative, float64.
      rng: draws the restarts.
      restarts: how many random starts follow the three others, see `_starts`.
    """
    fresh = tuple(np.arange(len(places[0].indices)) for places in problem.orders)
    kept = tuple(kept_mass(m, t) for m, t in zip(matrices, problem.targets, strict=True))
    given = State(fresh, tuple(matrices), kept, (sum(kept),))
    least = _ROUNDING * sum(float(matrix.sum()) for matrix in matrices)
    best = _climbed(problem, given, least)
    for start in _starts(problem, given, rng, restarts):
        end = _climbed(problem, start, least)
        if end.trace[-1] > best.trace[-1] + least:
            best = end
    return best


def _starts(
    problem: Problem, given: State, rng: np.random.Generator, restarts: int
) -> Iterator[State]:
    """Units sorted by their mass; alike ones side by side; and those grown from random units.

    The first order is grown from whole rows or columns: nothing tells yet which blocks these cross.
    """
    numbers = np.arange(len(problem.orders))
    state = given
    for number in numbers:
        state = _moved(problem, state, number, _heaviest_first(problem, state, number))
    yield state._replace(trace=state.trace[-1:])
    for turn in range(1 + restarts):
        state = given
        for i, number in enumerate(rng.permutation(numbers) if turn else numbers):
            first = _heaviest_first(problem, state, number)
            seeds = rng.permutation(first) if turn else first
            where = _side_by_side(problem, state, number, seeds, whole=not i)
            state = _moved(problem, state, number, where)
        yield state._replace(trace=state.trace[-1:])


def _climbed(problem: Problem, state: State, least: float) -> State:
    """The state after all steps that gain."""
    gained = True
    while gained:
        gained = False
        for number in range(len(problem.orders)):
            after = _moved(problem, state, number, _assigned(problem, state, number))
            if after.trace[-1] > state.trace[-1] + least:
                state, gained = after, True
    return state


def _moved(problem: Problem, state: State, number: int, where: np.ndarray) -> State:
    """The state with one order changed: position i gets what is at `where[i]`."""
    orders, matrices, kept = list(state.orders), list(state.matrices), list(state.kept)
    for place in problem.orders[number]:
        take = np.arange(matrices[place.matrix].shape[place.side])
        take[place.indices] = place.indices[where]
        matrices[place.matrix] = np.take(matrices[place.matrix], take, place.side)
    for at in {place.matrix for place in problem.orders[number]}:
        kept[at] = kept_mass(matrices[at], problem.targets[at])
    orders[number] = orders[number][where]
    return State(tuple(orders), tuple(matrices), tuple(kept), (*state.trace, sum(kept)))


# --- one order ----------------------------------------------------------------------------------


def _assigned(problem: Problem, state: State, number: int) -> np.ndarray:
    """Units to positions for much mass in the blocks that are kept now.

    The mass of a unit at a position is a sum over its rows and columns, so it is a matter of units
    and classes of positions: those that lie in the same blocks everywhere.
    """
    groups = _groups(problem, number)
    _, first, classes = np.unique(
        np.concatenate(groups, 1), axis=0, return_index=True, return_inverse=True
    )
    gain = np.zeros((len(groups[0]), len(first)))
    for place, group in zip(problem.orders[number], groups, strict=True):
        target, matrix = problem.targets[place.matrix], state.matrices[place.matrix]
        rows, chosen = _profiles(matrix, place, target), best_blocks(matrix, target)
        chosen = chosen if place.side == 0 else chosen.T
        for k, at in enumerate(place.indices.T):
            gain += rows[at] @ chosen[group[first, k]].T
    where, wanted = np.empty_like(classes.ravel()), assigned(gain, np.bincount(classes.ravel()))
    where[np.argsort(classes.ravel(), kind='stable')] = np.argsort(wanted, kind='stable')
    return where


def _side_by_side(
    problem: Problem, state: State, number: int, seeds: np.ndarray, whole: bool
) -> np.ndarray:
    """Alike units side by side.

    Args:
      seeds: units in the order in which groups are grown from them.
      whole: units are compared entry by entry, else by their mass in each block.
    """
    groups = _groups(problem, number)
    alike: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}
    for place, group in zip(problem.orders[number], groups, strict=True):
        target = None if whole else problem.targets[place.matrix]
        rows = _profiles(state.matrices[place.matrix], place, target)
        products = sum(rows[at] @ rows[at].T for at in place.indices.T)
        own, before = alike.get(group[:, 0].tobytes(), (group[:, 0], 0.0))
        alike[own.tobytes()] = (own, before + products)
    classes = np.unique(np.concatenate(groups, 1), axis=0, return_inverse=True)[1].ravel()
    where = np.empty_like(seeds)
    positions = np.argsort(classes, kind='stable')
    where[positions] = grown([(own[positions], gram) for own, gram in alike.values()], seeds)
    return where


def _heaviest_first(problem: Problem, state: State, number: int) -> np.ndarray:
    """Units by falling mass."""
    masses = sum(
        state.matrices[place.matrix].sum(1 - place.side)[place.indices].sum(1)
        for place in problem.orders[number]
    )
    return np.argsort(-masses, kind='stable')


def _groups(problem: Problem, number: int) -> list[np.ndarray]:
    """For each place the rows, or columns, of blocks that a position lies in: `(units, k)`."""
    return [
        place.indices // problem.targets[place.matrix].block[place.side]
        for place in problem.orders[number]
    ]


def _profiles(matrix: np.ndarray, place: Place, target: Target | None) -> np.ndarray:
    """Of each row, or column, its mass in each block that it crosses, or without target itself."""
    rows = matrix if place.side == 0 else matrix.T
    return rows if target is None else _summed(rows, 1, target.block[1 - place.side])
