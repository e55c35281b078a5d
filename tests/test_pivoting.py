"""Matrix pivoting against planted blocks, all orders of tiny matrices, and counts by hand.

The idea is that of (arXiv:1712.01084). Whatever is expected here is computed by loops over blocks
that share no code with the library.
"""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import PruneError, structure
from jaxprune.pattern import block_groups, block_top_k
from jaxprune.structure.balanced import assigned
from jaxprune.structure.block_search import Target, best_blocks


def tiles(shape, block):
    """The slices of all blocks, by row, then by column."""
    return [
        (slice(i, min(i + block[0], shape[0])), slice(j, min(j + block[1], shape[1])))
        for i in range(0, shape[0], block[0])
        for j in range(0, shape[1], block[1])
    ]


def mass_of_best(matrix, block, count):
    """The mass in the `count` blocks of most mass per entry."""
    blocks = [matrix[at] for at in tiles(matrix.shape, block)]
    return sum(b.sum() for b in sorted(blocks, key=lambda b: -b.mean())[:count])


def planted(seed, parts):
    """Blocks on a diagonal, with holes, under random permutations; its sums are exact."""
    rng = np.random.default_rng(seed)
    high, wide = (sum(sides) for sides in zip(*parts, strict=True))
    matrix, i, j = np.zeros((high, wide)), 0, 0
    for rows, columns in parts:
        part = rng.integers(1, 10, (rows, columns)) * (rng.random((rows, columns)) < 0.7)
        matrix[i : i + rows, j : j + columns] = part
        i, j = i + rows, j + columns
    return matrix[rng.permutation(high)][:, rng.permutation(wide)]


PARTS = {
    'two': ((4, 4), ((8, 8), (8, 8))),
    'oblong': ((4, 4), ((8, 12), (12, 8))),
    'three': ((4, 2), ((8, 8), (8, 8), (8, 8))),
    'three large': ((16, 16), ((64, 32), (32, 96), (128, 64))),
    'ragged': ((4, 4), ((6, 6), (4, 4))),
}


@pytest.mark.parametrize('name', PARTS)
@pytest.mark.parametrize('seed', range(4))
def test_planted_blocks_are_found(name, seed):
    """Expectation: W = P blockdiag(A, B, ...) Q holds all its mass in the blocks of A, B, ..., so
    nothing is left outside of them."""
    block, parts = PARTS[name]
    matrix = planted(seed, parts)
    count = sum(-(-rows // block[0]) * -(-columns // block[1]) for rows, columns in parts)
    found = structure.pivot(matrix, block, count=count, seed=0)
    assert not matrix[~found.mask].any() and found.kept_after == 1
    assert found.kept_before < 0.9
    assert found.after.occupied <= count and found.after.kept == (matrix > 0).sum()


def all_orders(size, side):
    """Orders of which no two have the same units in the same blocks."""
    seen = set()
    for order in itertools.permutations(range(size)):
        groups = [tuple(sorted(order[i : i + side])) for i in range(0, size, side)]
        last = groups.pop() if size % side else ()
        if (key := (frozenset(groups), last)) not in seen:
            seen.add(key)
            yield np.array(order)


@pytest.mark.parametrize(
    ('shape', 'block', 'count'), [((4, 4), (2, 2), 2), ((5, 4), (2, 2), 2), ((6, 4), (3, 2), 2)]
)
def test_tiny_matrices_are_solved(shape, block, count):
    """Expectation: the best of all orders of rows and columns, which are tried."""
    columns = list(all_orders(shape[1], block[1]))
    for seed in range(5):
        matrix = np.random.default_rng(seed).random(shape) ** 3
        found = structure.pivot(matrix, block, count=count, seed=0, restarts=16)
        best = max(
            mass_of_best(matrix[r][:, c], block, count)
            for r in all_orders(shape[0], block[0])
            for c in columns
        )
        assert found.kept_after == pytest.approx(best / matrix.sum(), rel=1e-12)


CASES = [
    ((12, 8), (4, 4), 0.5),
    ((13, 10), (4, 3), 0.3),
    ((7, 9), (7, 2), 0.4),
    ((9, 9), (1, 9), 1),
]


@pytest.mark.parametrize(('shape', 'block', 'density'), CASES)
def test_what_is_told_is_what_is_there(shape, block, density):
    """Expectation: the definitions of mask, shares and occupancy, by loops over blocks."""
    rng = np.random.default_rng(1)
    matrix = rng.random(shape) * (rng.random(shape) < 0.3)
    found = structure.pivot(matrix, block, density=density, seed=3)
    gathered, mask = (a[found.rows][:, found.columns] for a in (matrix, found.mask))
    grid = tiles(shape, block)
    count = round(density * len(grid))
    assert [m.all() for at in grid if (m := mask[at]).any()] == [True] * count
    for share, kept in (
        (found.kept_before, mass_of_best(matrix, block, count)),
        (found.kept_after, mass_of_best(gathered, block, count)),
        (found.kept_after, matrix[found.mask].sum()),
    ):
        assert share == pytest.approx(kept / matrix.sum(), rel=1e-12)
    for told, array in ((found.before, matrix), (found.after, gathered)):
        held = [array[at] for at in grid if array[at].any()]
        assert told == (len(grid), len(held), (matrix > 0).sum(), sum(b.size for b in held))
        assert told.block_density == len(held) / len(grid)
        assert told.fill == (matrix > 0).sum() / sum(b.size for b in held)
        assert structure.occupancy(array, block) == told


@pytest.mark.parametrize(('shape', 'block', 'density'), CASES)
def test_orders_are_permutations_and_go_back(shape, block, density):
    """Expectation: by the inverse permutations the matrix comes back, bit for bit."""
    matrix = np.random.default_rng(2).random(shape)
    found = structure.pivot(matrix, block, density=density, seed=0)
    assert sorted(found.rows) == [*range(shape[0])]
    assert sorted(found.columns) == [*range(shape[1])]
    gathered = matrix[found.rows][:, found.columns]
    back = gathered[np.argsort(found.rows)][:, np.argsort(found.columns)]
    np.testing.assert_array_equal(back, matrix)


@pytest.mark.parametrize('seed', range(6))
def test_the_kept_mass_never_falls(seed):
    """Expectation: it rises with every step, and ends above the matrix as given; the trace ends
    with what is kept. Ragged edges, whose blocks are ranked by mass per entry, are among them."""
    rng = np.random.default_rng(seed)
    matrix = rng.random((37, 29)) * (rng.random((37, 29)) < 0.2)
    block = [(4, 4), (8, 3), (5, 16)][seed % 3]
    found = structure.pivot(matrix, block, density=0.25, seed=seed)
    assert len(found.trace) > 1 and (np.diff(found.trace) > 0).all()
    assert found.trace[-1] == found.kept_after > found.kept_before


def test_a_matrix_in_the_best_order_stays():
    """Expectation: nothing can be gained where the best blocks hold all, so rows and columns stay
    where they are."""
    matrix = np.kron(np.eye(3), np.ones((4, 2)))
    found = structure.pivot(matrix, (4, 2), count=3, seed=0)
    assert found.kept_before == found.kept_after == 1 and found.trace == (1,)
    np.testing.assert_array_equal(found.rows, np.arange(12))
    np.testing.assert_array_equal(found.columns, np.arange(6))


def test_small_blocks_at_edges_count_by_mass_per_entry():
    """Expectation, by hand: 5 columns in blocks of 4. The edge block holds 2 of 2 entries, its mean
    is 1 and that of the full block 5/8: one block keeps the edge."""
    matrix = np.array([[1.0, 1, 1, 0, 1], [1, 1, 0, 0, 1]])
    kept = best_blocks(matrix, Target((2, 4), 1))
    np.testing.assert_array_equal(kept, [[False, True]])


@pytest.mark.parametrize(('shape', 'block', 'density'), CASES[1:3])
def test_the_mask_is_that_of_block_pruning(shape, block, density):
    """Expectation: `block_top_k` with means on the gathered scores, ties among them; and `spread`
    of `block_groups`."""
    scores = np.random.default_rng(3).integers(0, 3, shape).astype(np.float32)
    found = structure.pivot(scores, block, density=density, seed=0)
    gathered, mask = (a[found.rows][:, found.columns] for a in (scores, found.mask))
    target = Target(block, round(density * len(tiles(shape, block))))
    counts = {'w': target.count}
    wanted = block_top_k({'w': jnp.asarray(gathered)}, counts, block=block, reduce='mean')
    np.testing.assert_array_equal(mask, wanted['w'])
    chosen = {'w': jnp.asarray(best_blocks(gathered.astype(np.float64), target))}
    np.testing.assert_array_equal(mask, block_groups({'w': shape}, block).spread(chosen)['w'])


def test_masks_are_scores():
    """Expectation: a mask counts the weights kept; the same as its zeros and ones."""
    mask = np.random.default_rng(4).random((16, 12)) < 0.2
    ours = structure.pivot(mask, (4, 4), density=0.25, seed=0)
    theirs = structure.pivot(jnp.asarray(mask, jnp.bfloat16), (4, 4), density=0.25, seed=0)
    np.testing.assert_array_equal(ours.mask, theirs.mask)
    assert ours.kept_after == mask[ours.mask].sum() / mask.sum()


def test_the_seed_decides_and_restarts_help():
    """Expectation: the same seed, the same orders; more starts never keep less."""
    matrix = np.random.default_rng(5).random((24, 24)) ** 4
    one, two = (structure.pivot(matrix, (4, 4), density=0.2, seed=7) for _ in range(2))
    np.testing.assert_array_equal(one.rows, two.rows)
    np.testing.assert_array_equal(one.columns, two.columns)
    kept = [
        structure.pivot(matrix, (4, 4), density=0.2, seed=7, restarts=n).kept_after
        for n in (0, 4, 12)
    ]
    assert kept == sorted(kept) and kept[0] < kept[-1]


def test_assignments_are_balanced_and_cannot_be_improved_by_two():
    """Expectation: groups of the sizes asked for; no exchange of two units has more worth; and by
    hand: greedily unit 0 takes group 0 (10), which leaves 1 + 0 for the others; exchanging 0 and 1
    gives 9 + 8 instead of 10 + 1."""
    gain = np.array([[10.0, 9], [8, 1], [0, 0]])
    assert assigned(gain, np.array([1, 2])).tolist() == [1, 0, 1]
    rng = np.random.default_rng(0)
    gain, sizes = rng.random((30, 4)), np.array([10, 10, 7, 3])
    found = assigned(gain, sizes)
    np.testing.assert_array_equal(np.bincount(found), sizes)
    worth = gain[np.arange(30), found]
    for i, j in itertools.combinations(range(30), 2):
        assert gain[i, found[j]] + gain[j, found[i]] <= worth[i] + worth[j] + 1e-12


def test_ties_go_to_the_lowest():
    """Expectation: equal worth everywhere: the first units fill the first group."""
    assert assigned(np.ones((5, 2)), np.array([2, 3])).tolist() == [0, 0, 1, 1, 1]


def test_channels_of_a_convolution_are_sums_over_taps():
    """Expectation: NumPy's sum over the other axes, in (in, out) order whatever the layout."""
    kernel = np.random.default_rng(6).normal(size=(3, 2, 5, 4)).astype(np.float32)
    np.testing.assert_allclose(structure.channel_scores(kernel), np.abs(kernel).sum((0, 1)))
    squares = structure.channel_scores(kernel, power=2)
    np.testing.assert_allclose(squares, (kernel.astype(np.float64) ** 2).sum((0, 1)))
    out_in = structure.channel_scores(kernel.transpose(3, 2, 0, 1), axes=(1, 0))
    np.testing.assert_allclose(out_in, np.abs(kernel).sum((0, 1)), rtol=1e-6)


NAN = np.array([[1.0, np.nan], [1, 1]])
WRONG = {
    'larger than the matrix': (np.ones((4, 4)), (8, 2), {'count': 1}),
    'at least 1': (np.ones((4, 4)), (0, 2), {'count': 1}),
    'two integers': (np.ones((4, 4)), (2,), {'count': 1}),
    '1 scores are NaN': (NAN, (1, 1), {'count': 1}),
    'not be negative': (-np.ones((4, 4)), (2, 2), {'count': 1}),
    'all scores are 0': (np.zeros((4, 4)), (2, 2), {'count': 1}),
    r'a matrix of numbers .* float64 of shape \(3,\)': (np.ones(3), (1, 1), {'count': 1}),
    r'a matrix of numbers .* shape \(0, 4\)': (np.ones((0, 4)), (1, 1), {'count': 1}),
    'one of density= and count=': (np.ones((4, 4)), (2, 2), {}),
    'pivot needs one of': (np.ones((4, 4)), (2, 2), {'count': 1, 'density': 0.5}),
    r'density must be in \(0, 1\], not 0': (np.ones((4, 4)), (2, 2), {'density': 0}),
    'not 1.5': (np.ones((4, 4)), (2, 2), {'density': 1.5}),
    'not nan': (np.ones((4, 4)), (2, 2), {'density': float('nan')}),
    'keeps none of 4 blocks': (np.ones((4, 4)), (2, 2), {'density': 0.01}),
    'at most the number of blocks, 4, not 5': (np.ones((4, 4)), (2, 2), {'count': 5}),
    'count must be at least 1': (np.ones((4, 4)), (2, 2), {'count': 0}),
    'restarts must be at least 0': (np.ones((4, 4)), (2, 2), {'count': 1, 'restarts': -1}),
}


@pytest.mark.parametrize('message', WRONG)
def test_what_cannot_be_pivoted(message):
    """Expectation: one line that names what is wrong."""
    scores, block, options = WRONG[message]
    with pytest.raises(PruneError, match=message) as error:
        structure.pivot(scores, block, seed=0, **options)
    assert '\n' not in str(error.value)


def test_channel_scores_need_two_axes():
    with pytest.raises(PruneError, match='two different'):
        structure.channel_scores(np.ones((3, 3)), axes=(1, -1))
    with pytest.raises(PruneError, match='no axis 2'):
        structure.channel_scores(np.ones((3, 3)), axes=(0, 2))
    with pytest.raises(PruneError, match='power must be above 0'):
        structure.channel_scores(np.ones((3, 3)), power=0)
    with pytest.raises(PruneError, match='larger than the matrix'):
        structure.occupancy(np.ones((3, 3)), (4, 1))
