"""Matrix pivoting: orders of rows and columns that gather what is worth keeping in dense blocks.

The idea of (arXiv:1712.01084): pruned weights lie anywhere, hardware wants blocks. Rows and columns
of a matrix may change places, since the layers beside it can change theirs. So first reorder, then
keep whole blocks. `pivot` reorders one matrix, `pivot_network` a whole network.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune import arguments
from jaxprune.errors import PruneError
from jaxprune.pattern import block_counts, n_blocks
from jaxprune.structure.block_search import (
    Place,
    Problem,
    Target,
    best_blocks,
    block_sizes,
    block_sums,
    kept_mass,
    search,
)


class Occupancy(NamedTuple):
    """How the entries of a matrix that are not zero lie in its blocks.

    Attributes:
      blocks: how many blocks there are, edge blocks included.
      occupied: how many of them hold an entry that is not zero.
      kept: how many entries are not zero.
      room: how many entries the occupied blocks have.
    """

    blocks: int
    occupied: int
    kept: int
    room: int

    @property
    def block_density(self) -> float:
        """The fraction of blocks that are occupied."""
        return self.occupied / self.blocks

    @property
    def fill(self) -> float:
        """The fraction of entries of occupied blocks that are not zero; 0 if none is occupied."""
        return self.kept / max(self.room, 1)


class Pivot(NamedTuple):
    """A matrix in another order.

    Attributes:
      rows: permutation of the rows: `scores[rows][:, columns]` is the gathered matrix.
      columns: permutation of the columns.
      mask: the best blocks of the gathered matrix, in the order of the original: `(in, out)`, bool.
      kept_before: the share of the mass that the best blocks of the original hold.
      kept_after: the share that those of the gathered matrix hold, which is the share under `mask`.
      before: how the original fills its blocks.
      after: how the gathered matrix fills its blocks.
      trace: the share at the start of the search that won, and after each of its steps.
    """

    rows: np.ndarray
    columns: np.ndarray
    mask: np.ndarray
    kept_before: float
    kept_after: float
    before: Occupancy
    after: Occupancy
    trace: tuple[float, ...]


def pivot(
    scores: Any,
    block: tuple[int, int],
    *,
    density: float | None = None,
    count: int | None = None,
    seed: int,
    restarts: int = 4,
) -> Pivot:
    """Orders of rows and columns under which few blocks hold much of a matrix's mass.

    Columns fixed, each row has a mass in each of the blocks that it crosses; rows go where the kept
    blocks have most of it, with full blocks everywhere. Then rows are fixed and columns go. This
    is repeated until there is no gain, from several starts: as given, sorted by mass, alike rows
    and columns side by side, and random ones. No step loses kept mass, and the result never keeps
    less than the matrix as given. It is a local search and may miss the best order.

        >>> scores = np.kron([[0, 1], [1, 0]], np.ones((2, 2)))[[0, 2, 1, 3]]
        >>> found = pivot(scores, (2, 2), count=2, seed=0)
        >>> found.kept_before, found.kept_after
        (0.5, 1.0)

    Blocks are ranked by their mass per entry, so a smaller block at an edge can compete. Of equal
    blocks the first is kept; exactly `count` blocks are. This runs on the host: seconds for a
    thousand rows and columns.

    Args:
      scores: `(in, out)`, not negative: |W| or W² (see `channel_scores`), or a bool mask, whose
        mass is the number of weights kept.
      block: rows and columns of a block.
      density: the fraction of blocks kept, in (0, 1].
      count: how many blocks are kept; either this or `density`.
      seed: of the random starts.
      restarts: how many random starts.

    Raises:
      PruneError: scores that are not a matrix, are negative, not finite or all zero; a block that
        is larger than the matrix; a density or count out of range, both or none of them.
    """
    matrix = _checked(scores)
    _check_block(matrix.shape, block)
    arguments.least(0, seed=seed, restarts=restarts)
    if not matrix.sum() > 0:
        raise PruneError('all scores are 0: there is nothing to gather')
    target = Target(tuple(block), _count(matrix.shape, block, density, count))
    sides = tuple((Place(0, i, np.arange(n)[:, None]),) for i, n in enumerate(matrix.shape))
    found = search(Problem((target,), sides), [matrix], np.random.default_rng(seed), restarts)
    (rows, columns), (gathered,) = found.orders, found.matrices
    mask = np.empty(matrix.shape, bool)
    mask[np.ix_(rows, columns)] = _spread(best_blocks(gathered, target), target, matrix.shape)
    total = float(matrix.sum())
    return Pivot(
        rows,
        columns,
        mask,
        share(kept_mass(matrix, target), total),
        share(kept_mass(gathered, target), total),
        occupancy(matrix, block),
        occupancy(gathered, block),
        tuple(share(mass, total) for mass in found.trace),
    )


def occupancy(mask: Any, block: tuple[int, int]) -> Occupancy:
    """How many blocks of a matrix hold anything, and how full these are.

    After pivoting: `occupancy(mask[found.rows][:, found.columns], block)`.

    Args:
      mask: `(in, out)`, a mask, weights or scores; what is not zero counts.
      block: rows and columns of a block.

    Raises:
      PruneError: no matrix, a block that is larger than it.
    """
    alive = _matrix(mask) != 0
    _check_block(alive.shape, block)
    counts = block_sums(alive.astype(np.int64), block)
    sizes = block_sizes(alive.shape, block)
    return Occupancy(
        counts.size, int((counts > 0).sum()), int(counts.sum()), int(sizes[counts > 0].sum())
    )


def channel_scores(
    kernel: Any, axes: tuple[int, int] = (-2, -1), *, power: float = 1.0
) -> np.ndarray:
    """The sums of |w|^power over all axes but two: the scores of a kernel for `pivot`.

    Args:
      kernel: a weight array, such as HWIO, `(height, width, in, out)`.
      axes: the axes of its inputs and outputs.
      power: 1 for |W|, 2 for W².

    Returns:
      `(in, out)`, float64.

    Raises:
      PruneError: axes that are not two different ones of the kernel, a power that is not above 0.
    """
    arguments.positive('power', power)
    array = np.abs(np.asarray(kernel, np.float64)) ** power
    n_blocks(array.shape, (1, 1), axes=axes)  # raises where an axis is wrong
    inputs, outputs = (axis % array.ndim for axis in axes)
    summed = array.sum(tuple(set(range(array.ndim)) - {inputs, outputs}))
    return summed if inputs < outputs else summed.T


def share(kept: float, total: float) -> float:
    """A part of a mass; 1 where there is no mass, and never above it by rounding."""
    return min(kept / total, 1.0) if total else 1.0


def _spread(chosen: np.ndarray, target: Target, shape: tuple[int, int]) -> np.ndarray:
    """One entry per block -> the same value for all entries of the block."""
    for axis, side in enumerate(target.block):
        chosen = np.repeat(chosen, side, axis)
    return chosen[: shape[0], : shape[1]]


def _count(
    shape: tuple[int, int], block: tuple[int, int], density: float | None, count: int | None
) -> int:
    """How many blocks are kept."""
    if (density is None) == (count is None):
        raise PruneError('pivot needs one of density= and count=')
    if count is None:
        return block_counts({'scores': shape}, density, block=block)['scores']
    arguments.least(1, count=count)
    if count > (most := n_blocks(shape, block)):
        raise PruneError(f'count must be at most the number of blocks, {most}, not {count}')
    return arguments.whole('count', count)


def _matrix(values: Any) -> np.ndarray:
    """A matrix on the host."""
    matrix = np.asarray(values)
    real = matrix.dtype == bool or jax.dtypes.issubdtype(matrix.dtype, np.number)
    if matrix.ndim != 2 or not matrix.size or not real or np.iscomplexobj(matrix):
        raise PruneError(
            f'a matrix of numbers is needed, (in, out), not {matrix.dtype} of shape {matrix.shape}'
        )
    return matrix


def _checked(scores: Any) -> np.ndarray:
    """Scores as float64."""
    matrix = _matrix(scores).astype(np.float64)
    if not np.isfinite(matrix).all():
        raise PruneError(f'{(~np.isfinite(matrix)).sum()} scores are NaN or infinite')
    if matrix.min() < 0:
        raise PruneError('scores must not be negative: take |W| or W², see channel_scores')
    return matrix


def _check_block(shape: tuple[int, int], block: tuple[int, int]) -> None:
    n_blocks(shape, block)  # raises unless it is a pair of integers of at least 1
    if any(side > length for side, length in zip(block, shape, strict=True)):
        raise PruneError(f'block {tuple(block)} is larger than the matrix {tuple(shape)}')
