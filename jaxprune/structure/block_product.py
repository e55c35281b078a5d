"""Products with a block-sparse matrix that multiply only the blocks that are kept."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.errors import PruneError, shown
from jaxprune.pattern import n_blocks


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('values', 'rows', 'columns'),
    meta_fields=('shape',),
)
@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of an `(in, out)` matrix that are not empty, by column, then by row: a pytree.

    Attributes:
      values: `(n, r, c)`; blocks at the far edges are filled up with zeros.
      rows: `(n,)` int32, the row of blocks that each lies in.
      columns: `(n,)` int32, the column of blocks, rising.
      shape: of the matrix, static.
    """

    values: jax.Array
    rows: jax.Array
    columns: jax.Array
    shape: tuple[int, int]


def blocks_of(weights: Any, mask: Any, block: tuple[int, int]) -> Blocks:
    """Takes the blocks of a matrix that hold a weight that is kept.

    The number of blocks depends on the mask, so this runs on the host, outside of `jit`.

    Args:
      weights: `(in, out)`.
      mask: `(in, out)`, bool; single weights that it prunes are zero in their block.
      block: rows and columns of a block.

    Raises:
      PruneError: no matrix, a mask of another shape or type, a side of a block below 1.
    """
    weights, mask = np.asarray(weights), np.asarray(mask)
    if weights.ndim != 2 or mask.shape != weights.shape or mask.dtype != bool:
        raise PruneError(
            f'weights (in, out) and a bool mask like them are needed, not {shown(weights)} and '
            f'{shown(mask)}'
        )
    n_blocks(weights.shape, block)  # raises unless it is a pair of integers of at least 1
    (high, wide), edges = block, [(0, -n % s) for n, s in zip(weights.shape, block, strict=True)]
    tall, broad = (n + more for n, (_, more) in zip(weights.shape, edges, strict=True))
    grid = (tall // high, high, broad // wide, wide)
    alive = np.pad(mask, edges).reshape(grid).any((1, 3))
    columns, rows = np.nonzero(alive.T)
    values = np.pad(np.where(mask, weights, 0), edges).reshape(grid)[rows, :, columns, :]
    rows, columns = (jnp.asarray(at, jnp.int32) for at in (rows, columns))
    return Blocks(jnp.asarray(values), rows, columns, weights.shape)


def block_product(x: jax.Array, blocks: Blocks) -> jax.Array:
    """`x @ weights` with the blocks of `blocks_of`, for `jit`, `vmap` and `grad`.

    Each block multiplies its part of the inputs, in one batched product; then the products of each
    column of blocks are added up. Nothing is computed for blocks that are not there. Whether that
    is faster than the dense product depends on block, density and machine:
    `experiments/bench/blocks.py` measures it.

    Args:
      x: `(..., in)`.
      blocks: see `blocks_of`.

    Returns:
      `(..., out)`.

    Raises:
      PruneError: inputs of another length.
    """
    inputs, outputs = blocks.shape
    if x.shape[-1:] != (inputs,):
        raise PruneError(f'x has shape {x.shape}, but the matrix {blocks.shape}')
    _, high, wide = blocks.values.shape
    rows = x.reshape(-1, x.shape[-1])
    rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % high)))
    parts = rows.reshape(len(rows), -1, high).transpose(1, 0, 2)[blocks.rows]
    products = jax.lax.dot_general(parts, blocks.values, (((2,), (1,)), ((0,), (0,))))
    sums = jax.ops.segment_sum(
        products, blocks.columns, -(-outputs // wide), indices_are_sorted=True
    )
    y = sums.transpose(1, 0, 2).reshape(len(rows), -1)[:, :outputs]
    return y.reshape(*x.shape[:-1], outputs)
