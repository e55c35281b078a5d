"""Masks with a structure inside a kernel: n of every m weights, whole blocks.

Patterns that hardware can use: 2:4 on sparse tensor cores, tiles such as 8x128 or 128x128 on matrix
units. A mask alone speeds nothing up. All selections use `top_k_mask` and follow its rules: ties go
to the lowest index, NaN and -inf are never kept, so pruned entries stay pruned when their score is
-inf.

Kernels are `(in, out)` or HWIO, `(height, width, in, out)`. Shapes, block sizes and axes are
static; numbers of blocks to keep may be traced.
"""

import math
import operator
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxprune.allocation import Shape, check_density
from jaxprune.errors import PruneError, check_choice, nearest, quoted, shown
from jaxprune.select import as_floats, global_top_k, layerwise_top_k, top_k_mask
from jaxprune.threshold import ordered
from jaxprune.types import GLOBAL, Counts, Groups, Masks, Scores, Weights

TIES = ('lowest', 'highest')
REDUCTIONS = ('sum', 'mean', 'max')


def n_of_m(
    scores: Scores,
    *,
    n: int,
    m: int,
    axis: int | Mapping[str, int] | None = None,
    ties: str = 'lowest',
) -> Masks:
    """The n best of every m consecutive entries along the contraction axis: N:M sparsity.

    2:4 is the pattern of NVIDIA's sparse tensor cores (Mishra et al., 2021, arXiv:2104.08378),
    general n and m as in Zhou et al. (2021, arXiv:2102.04010). The groups start at index 0 of the
    axis; all other axes are indexed independently. It takes no counts; as the selection of a
    pruner: `lambda scores, counts: n_of_m(scores, n=2, m=4)`.

    Padding: where the axis is no multiple of m, the last group is short and keeps the best
    `min(n, its length)`, as if filled up with entries that are never kept. A group also keeps
    fewer than n if it has fewer entries above -inf.

    jaxpruner keeps the highest index of equal scores, exactly n of m even if that takes a -inf,
    and NaN first of all; on axes that are no multiple of m its groups run on into the next row.

    Args:
      scores: path -> float scores.
      n: how many to keep of each group, in [1, m].
      m: length of a group.
      axis: the axis along which a dot product sums, the input axis: one for all leaves (-2 suits
        `(in, out)` and HWIO alike) or path -> axis. A leaf of two axes uses the first by default;
        for other leaves the axis must be given, since a convolution sums over three.
      ties: 'lowest' keeps the lowest index of equal scores; 'highest' as jaxpruner does.

    Returns:
      path -> bool array of the shape of its scores.

    Raises:
      PruneError: n or m out of range, an axis that a leaf lacks or that must be given, a path
        without scores, an unknown name in `ties`, scores that are not floating point.
    """
    n, m = _integer('n', n), _integer('m', m)
    if not 1 <= n <= m:
        raise PruneError(f'n of m needs 1 <= n <= m, not n = {n} and m = {m}')
    check_choice('ties', ties, TIES)
    axes = axis if isinstance(axis, Mapping) else dict.fromkeys(scores, axis)
    for path in axes:
        if path not in scores:
            raise PruneError(f'an axis is given for {quoted(path)}: {nearest(path, scores)}')
    along = {p: _contraction_axis(f"'{p}'", x.shape, axes.get(p)) for p, x in scores.items()}
    groups = {p: _groups(as_floats(leaf), m, along[p]) for p, leaf in sorted(scores.items())}
    # All leaves at once, as columns: the selection is compiled once and not once per leaf.
    columns = jnp.concatenate([group.reshape(m, -1) for group in groups.values()], axis=1)
    chosen = _best_of_columns(columns, n, ties)
    masks, start = {}, 0
    for path, group in groups.items():
        size = group.size // m
        mask = chosen[:, start : start + size].reshape(group.shape)
        masks[path] = _ungrouped(mask, scores[path].shape, along[path])
        start += size
    return masks


def _contraction_axis(name: str, shape: Shape, axis: int | None) -> int:
    if axis is not None:
        return _axis(name, shape, axis)
    if len(shape) != 2:
        raise PruneError(f'{name} has shape {shape}: say along which axis its groups run')
    return 0


def _groups(leaf: jax.Array, m: int, axis: int) -> jax.Array:
    """The leaf with `axis` cut into groups, and the place within a group as a new first axis."""
    leaf = _padded(leaf, [m if i == axis else 1 for i in range(leaf.ndim)])
    shape = leaf.shape
    cut = leaf.reshape(*shape[:axis], shape[axis] // m, m, *shape[axis + 1 :])
    return jnp.moveaxis(cut, axis + 1, 0)


def _ungrouped(groups: jax.Array, shape: Shape, axis: int) -> jax.Array:
    """Undoes `_groups`, padding included."""
    cut = jnp.moveaxis(groups, 0, axis + 1)
    length = cut.shape[axis] * cut.shape[axis + 1]
    whole = cut.reshape(*shape[:axis], length, *shape[axis + 1 :])
    return jax.lax.slice_in_dim(whole, 0, shape[axis], axis=axis)


#: Longest groups whose entries are compared with each other.
_COMPARED = 8


def _best_of_columns(columns: jax.Array, n: int, ties: str) -> jax.Array:
    order = slice(None, None, -1 if ties == 'highest' else 1)
    columns = columns[order]
    if len(columns) > _COMPARED:
        return jax.vmap(top_k_mask, in_axes=(1, None), out_axes=1)(columns, n)[order]
    # Of few entries each is compared with each: no loop, one pass over all columns.
    keepable = columns > -jnp.inf
    places = ordered(columns)
    above = [
        sum(
            (
                ((other > own if j > i else other >= own) & kept).astype(jnp.int8)
                for j, (other, kept) in enumerate(zip(places, keepable, strict=True))
                if j != i
            ),
            jnp.zeros(own.shape, jnp.int8),
        )
        for i, own in enumerate(places)
    ]
    return (keepable & (jnp.stack(above) < n))[order]


def block_top_k(
    scores: Scores,
    counts: Counts,
    *,
    block: tuple[int, int],
    axes: tuple[int, int] = (-2, -1),
    reduce: str = 'sum',
    pooled: bool = False,
) -> Masks:
    """Keeps or removes whole blocks, ranked by the sum, mean or maximum of their scores.

    Block sparsity as in Narang, Undersander & Diamos (2017, arXiv:1711.02782), whose blocks are
    ranked by their maximum; for the L2 norm, score by squared weights. With the keywords bound
    (`functools.partial`) it is a selection as `global_top_k` and `layerwise_top_k` are, but
    counts are numbers of blocks.

    Padding: where a side is no multiple of the block, the blocks at its far edge are smaller.
    Missing entries do not count: they are 0 in a sum and absent from mean and maximum. So a sum of
    positive scores ranks edge blocks low, and in one ranking over all leaves also the leaves
    whose blocks hold fewer entries; a mean does neither.

    Entries at -inf, weights pruned before, do not count either, and are not kept with their block:
    a mask is whole blocks except for them. A block whose score is -inf or NaN is never kept: one
    without an entry above -inf, or with a NaN.

    To reproduce jaxpruner: `axes=(0, 1), pooled=True`, the mean for its 'avg', and vectors reshaped
    to one row. It pools the first two axes whatever a kernel's layout, over all further ones
    together; it keeps one block at least; and where a side is no multiple of the block it pads by
    the remainder, which gives a mask of the right shape only by luck.

    Args:
      scores: path -> float scores.
      counts: how many blocks to keep, path -> k, or `{'*': k}` for one ranking over all leaves,
        equal scores in sorted path order; see `block_counts`. May be traced.
      block: sides of a block along `axes`, such as `(128, 128)`.
      axes: two different axes; by default (in, out), the matrix that the hardware multiplies.
      reduce: 'sum', 'mean' or 'max' of the entries.
      pooled: False: every index of the other axes, such as each spatial position of a HWIO
        kernel, has blocks of its own. True: a block takes in all of the other axes.

    Returns:
      path -> bool array of the shape of its scores, constant within blocks (see above).

    Raises:
      PruneError: counts with other paths, a block side below 1, axes that a leaf lacks, an unknown
        reduction, scores that are not floating point.
    """
    check_choice('reduction', reduce, REDUCTIONS)
    scores = {path: as_floats(leaf) for path, leaf in sorted(scores.items())}
    tiles = {p: _tiling(f"'{p}'", leaf.shape, block, axes, pooled) for p, leaf in scores.items()}
    values = {path: _reduced(leaf, tiles[path], reduce) for path, leaf in scores.items()}
    select = global_top_k if set(counts) == {GLOBAL} else layerwise_top_k
    chosen = select(values, counts)
    return {
        path: _spread(chosen[path], tiles[path], leaf.shape) & (leaf > -jnp.inf)
        for path, leaf in scores.items()
    }


def n_blocks(
    shape: Shape,
    block: tuple[int, int],
    *,
    axes: tuple[int, int] = (-2, -1),
    pooled: bool = False,
) -> int:
    """How many blocks a leaf of that shape has, edge blocks included; see `block_top_k`."""
    return math.prod(_tiling('a leaf', shape, block, axes, pooled).grid)


def block_counts(
    shapes: Mapping[str, Shape],
    density: float,
    *,
    block: tuple[int, int],
    axes: tuple[int, int] = (-2, -1),
    pooled: bool = False,
) -> dict[str, int]:
    """How many blocks a density keeps in each leaf: round(density * blocks), host integers.

    Ties of the rounding go to even; a leaf may come out empty. For one ranking over all leaves
    add up `n_blocks` and round once: `{'*': round(density * total)}`. The density is that of
    blocks: where edge blocks are smaller, the fraction of weights kept differs a little.

    Args:
      shapes: path -> shape of every leaf, see `tree.shapes`.
      density: fraction of blocks kept, in (0, 1].
      block: as in `block_top_k`, like `axes` and `pooled`.

    Raises:
      PruneError: the density is out of range or keeps no block at all; a leaf lacks an axis.
    """
    check_density(density)
    grids = {p: _tiling(f"'{p}'", s, block, axes, pooled).grid for p, s in sorted(shapes.items())}
    blocks = {path: math.prod(grid) for path, grid in grids.items()}
    counts = {path: round(density * number) for path, number in blocks.items()}
    if not sum(counts.values()):
        raise PruneError(f'density {density:.3g} keeps none of {sum(blocks.values())} blocks')
    return counts


# --- as what competes ---------------------------------------------------------------------------


def single_weights(shapes: Mapping[str, Shape]) -> Groups:
    """Every weight competes for itself."""

    def same(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return leaves

    return Groups('weight', dict(shapes), same, same, same)


def n_of_m_groups(
    shapes: Mapping[str, Shape], n: int, m: int, axis: Mapping[str, int] | None = None
) -> Groups:
    """Weights compete, but of every m along the input axis only the n best: N:M at any density.

    Args:
      shapes: path -> shape of every prunable leaf.
      n, m: see `n_of_m`.
      axis: path -> axis along which a dot product sums; by default the last but one, the inputs in
        flax and haiku.
    """
    axes = dict.fromkeys(shapes, -2) if axis is None else dict(axis)
    most = {}
    for path, shape in shapes.items():
        length = shape[_contraction_axis(f"'{path}'", shape, axes[path])]
        full, rest = divmod(length, m)
        most[path] = math.prod(shape) // max(length, 1) * (full * n + min(n, rest))

    def eligible(scores: Scores) -> Scores:
        best = n_of_m(scores, n=n, m=m, axis=axes)
        return {path: jnp.where(best[path], leaf, -jnp.inf) for path, leaf in scores.items()}

    return single_weights(shapes)._replace(kind=f'{n}:{m}', eligible=eligible, most=most)


def block_groups(
    shapes: Mapping[str, Shape],
    block: tuple[int, int],
    axes: Mapping[str, tuple[int, int]] | None = None,
) -> Groups:
    """Whole blocks of each kernel compete, by the sums of their scores; see `block_top_k`.

    Args:
      shapes: path -> shape of every prunable leaf.
      block: sides of a block along the inputs and the outputs of a kernel.
      axes: path -> these two axes; by default the last two, as in flax and haiku.
    """
    axes = dict.fromkeys(shapes, (-2, -1)) if axes is None else axes
    tiles = {
        path: _tiling(f"'{path}'", shape, block, axes[path], False)
        for path, shape in shapes.items()
    }
    return _tiled_groups(f'{block[0]}x{block[1]}', shapes, tiles)


def kernel_groups(
    shapes: Mapping[str, Shape], sides: Mapping[str, Collection[int]] | None = None
) -> Groups:
    """Single kernels compete, by the sums of their scores: all taps from one input to one output.

    Of a dense layer that is every weight for itself.

    Args:
      shapes: path -> shape of every prunable leaf.
      sides: path -> axes that are sides of a window; by default all but the last two, as in flax
        and haiku.
    """
    if sides is None:
        sides = {path: range(len(shape) - 2) for path, shape in shapes.items()}
    tiles = {
        path: _Tiling(
            tuple(1 if i in sides[path] else n for i, n in enumerate(shape)),
            tuple(n if i in sides[path] else 1 for i, n in enumerate(shape)),
        )
        for path, shape in shapes.items()
    }
    return _tiled_groups('kernel', shapes, tiles)


def _tiled_groups(kind: str, shapes: Mapping[str, Shape], tiles: Mapping[str, '_Tiling']) -> Groups:
    """The tiles of each leaf as what competes."""

    def gather(values: Weights) -> Scores:
        return {
            path: _padded(leaf, tiles[path].tile, 0)
            .reshape([side for pair in zip(*tiles[path], strict=True) for side in pair])
            .sum(tuple(range(1, 2 * leaf.ndim, 2)))
            for path, leaf in values.items()
        }

    def alive(masks: Masks) -> Masks:
        counted = gather({path: mask.astype(jnp.int32) for path, mask in masks.items()})
        return {path: count > 0 for path, count in counted.items()}

    def spread(chosen: Masks) -> Masks:
        return {path: _spread(leaf, tiles[path], shapes[path]) for path, leaf in chosen.items()}

    grids = {path: tiling.grid for path, tiling in tiles.items()}
    return Groups(kind, grids, gather, alive, spread)


class _Tiling(NamedTuple):
    """A leaf cut into tiles: along each axis `grid` tiles of `tile` entries, the last cut off."""

    grid: tuple[int, ...]
    tile: tuple[int, ...]


def _tiling(
    name: str, shape: Shape, block: tuple[int, int], axes: tuple[int, int], pooled: bool
) -> _Tiling:
    block, axes = _pair('block', block), _pair('axes', axes)
    if min(block) < 1:
        raise PruneError(f'the sides of a block must be at least 1, not {shown(block)}')
    sides = {_axis(name, shape, axis): side for axis, side in zip(axes, block, strict=True)}
    if len(sides) < 2:
        raise PruneError(f'axes must be two different ones of {name}, not {shown(axes)}')
    tile = tuple(
        # No larger than the leaf: padding one to 128 x 128 would cost memory for nothing.
        max(1, min(sides.get(axis, size if pooled else 1), size))
        for axis, size in enumerate(shape)
    )
    return _Tiling(tuple(-(-size // side) for size, side in zip(shape, tile, strict=True)), tile)


def _reduced(leaf: jax.Array, tiling: _Tiling, reduce: str) -> jax.Array:
    """The score of each tile, shape `tiling.grid`; -inf for tiles without a live entry."""
    interleaved = [side for pair in zip(*tiling, strict=True) for side in pair]
    within = tuple(range(1, len(interleaved), 2))
    tiles = _padded(leaf, tiling.tile).reshape(interleaved)
    if reduce == 'max':
        return tiles.max(within)
    live = tiles != -jnp.inf
    count = live.sum(within, dtype=jnp.int32)
    total = jnp.where(live, tiles, 0).sum(within)
    score = total / count if reduce == 'mean' else total
    return jnp.where(count > 0, score, -jnp.inf)


def _spread(chosen: jax.Array, tiling: _Tiling, shape: Shape) -> jax.Array:
    """One entry per tile -> the same value for all entries of the tile."""
    for axis, side in enumerate(tiling.tile):
        chosen = jnp.repeat(chosen, side, axis=axis)
    return chosen[tuple(slice(size) for size in shape)]


def _padded(leaf: jax.Array, multiples: Iterable[int], filler: float = -jnp.inf) -> jax.Array:
    """Filled up to multiples of the given sides, with -inf, which is never kept, or a number."""
    widths = [(0, -size % side) for size, side in zip(leaf.shape, multiples, strict=True)]
    return jnp.pad(leaf, widths, constant_values=filler)


def _axis(name: str, shape: Shape, axis: int) -> int:
    axis = _integer('axis', axis)
    if not -len(shape) <= axis < len(shape):
        raise PruneError(f'{name} has shape {tuple(shape)}, and no axis {axis}')
    return axis % len(shape)


def _pair(what: str, values: Iterable[int]) -> tuple[int, int]:
    values = tuple(values) if isinstance(values, Iterable) else (values,)
    if len(values) != 2:
        raise PruneError(f'{what} must be two integers, not {shown(values)}')
    return tuple(_integer(what, value) for value in values)


def _integer(what: str, value: int) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise PruneError(f'{what} must be a plain integer, not {shown(value)}') from None
