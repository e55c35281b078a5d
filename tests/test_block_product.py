"""Products of the blocks that are kept, against NumPy's product with the masked matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import PruneError, structure

#: Shape, block, fraction of blocks kept; the second and third have ragged edges.
CASES = [
    ((8, 12), (4, 4), 0.5),
    ((10, 7), (4, 3), 0.4),
    ((5, 3), (8, 8), 1.0),
    ((9, 6), (1, 2), 0.3),
]


def drawn(shape, block, density, seed=0):
    """Weights and a mask of whole blocks, some of them with holes."""
    rng = np.random.default_rng(seed)
    grid = [-(-n // side) for n, side in zip(shape, block, strict=True)]
    chosen = rng.permutation(grid[0] * grid[1]).reshape(grid) < round(density * grid[0] * grid[1])
    mask = np.kron(chosen, np.ones(block, bool))[: shape[0], : shape[1]]
    return rng.normal(size=shape), mask & (rng.random(shape) < 0.8)


@pytest.mark.parametrize(('shape', 'block', 'density'), CASES)
def test_it_is_the_masked_product(shape, block, density):
    """Expectation: NumPy's, in float64, with and without axes before the inputs; as many blocks as
    hold a kept weight."""
    with jax.enable_x64(True):
        weights, mask = drawn(shape, block, density)
        blocks = structure.blocks_of(weights, mask, block)
        x = np.random.default_rng(1).normal(size=(2, 3, shape[0]))
        product = jax.jit(structure.block_product)
        wanted = x @ np.where(mask, weights, 0)
        for inputs, expected in ((x, wanted), (x[0, 0], wanted[0, 0])):
            found = product(inputs, blocks)
            assert found.dtype == np.float64 and found.shape == expected.shape
            np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-13)
        assert len(blocks.values) == structure.occupancy(mask, np.minimum(block, shape)).occupied


def test_derivatives_are_those_of_the_masked_product():
    """Expectation: the gradient of the dense product, gathered in the same blocks; for several
    inputs at a time under `vmap`."""
    with jax.enable_x64(True):
        shape, block, density = CASES[1]
        weights, mask = drawn(shape, block, density)
        mask = np.kron(mask[::4, ::3], np.ones(block, bool))[: shape[0], : shape[1]]
        blocks = structure.blocks_of(weights, mask, block)
        x = np.random.default_rng(2).normal(size=(5, shape[0]))

        @jax.jit
        def slopes(x, blocks):
            def total(x, blocks):
                return jnp.sin(jax.vmap(structure.block_product, (0, None))(x, blocks)).sum()

            return jax.grad(total, argnums=(0, 1), allow_int=True)(x, blocks)

        by_x, by_blocks = slopes(x, blocks)
        dense = np.where(mask, weights, 0)
        above = np.cos(x @ dense)
        np.testing.assert_allclose(by_x, above @ dense.T, rtol=1e-12)
        wanted = structure.blocks_of(x.T @ above, mask, block)
        np.testing.assert_allclose(by_blocks.values, wanted.values, rtol=1e-12)


def test_no_block_is_left():
    """Expectation: zeros."""
    blocks = structure.blocks_of(np.ones((4, 6)), np.zeros((4, 6), bool), (2, 2))
    assert blocks.values.shape == (0, 2, 2)
    found = jax.jit(structure.block_product)(np.ones((3, 4), np.float32), blocks)
    np.testing.assert_array_equal(found, np.zeros((3, 6)))


def test_a_pivoted_matrix():
    """Expectation: with inputs and outputs in the orders of the pivot, the masked product."""
    weights, _ = drawn((12, 10), (4, 4), 1)
    found = structure.pivot(np.abs(weights), (4, 4), density=0.4, seed=0)
    order = np.ix_(found.rows, found.columns)
    blocks = structure.blocks_of(weights[order], found.mask[order], (4, 4))
    assert len(blocks.values) == round(0.4 * 9)
    x = np.random.default_rng(3).normal(size=(2, 12)).astype(np.float32)
    ours = jax.jit(structure.block_product)(x[:, found.rows], blocks)
    theirs = (x @ np.where(found.mask, weights, 0))[:, found.columns]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit():
    """Expectation: one line with the shapes."""
    with pytest.raises(PruneError, match='a bool mask like them'):
        structure.blocks_of(np.ones((4, 4)), np.ones((4, 4)), (2, 2))
    with pytest.raises(PruneError, match='a bool mask like them'):
        structure.blocks_of(np.ones((4, 4)), np.ones((4, 5), bool), (2, 2))
    with pytest.raises(PruneError, match='at least 1'):
        structure.blocks_of(np.ones((4, 4)), np.ones((4, 4), bool), (0, 2))
    blocks = structure.blocks_of(np.ones((4, 4)), np.ones((4, 4), bool), (2, 2))
    with pytest.raises(PruneError, match=r'x has shape \(3, 5\), but the matrix \(4, 4\)'):
        structure.block_product(np.ones((3, 5)), blocks)
