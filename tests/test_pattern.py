"""Masks with a structure inside a kernel, against loops on the host and jaxpruner's masks.

Golden numbers are those of google-research/jaxpruner (f133ee5), which computes in float32; so
are compared here in float32, masks bit for bit.
"""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from published import golden

import jaxprune as jp
from jaxprune.errors import PruneError
from jaxprune.pattern import block_counts, block_top_k, n_blocks, n_of_m
from jaxprune.select import unit_norm

SHAPES = {'conv/kernel': (2, 3, 5, 4), 'dense/kernel': (10, 3)}
SETS = ('plain', 'ties')
few = settings(max_examples=25, deadline=None, database=None)


def leaves(file: dict, prefix: str) -> dict[str, np.ndarray]:
    """What the file holds under a prefix, by path."""
    found = {k[len(prefix) + 1 :]: v for k, v in file.items() if k.startswith(f'{prefix}/')}
    assert found, f'nothing under {prefix}'
    return found


def kept_by_jaxpruner(size: int, sparsity: float) -> int:
    """Its count, in single precision and to even; it never empties a leaf."""
    return max(1, int(np.round(np.float32(size) * (1 - np.float32(sparsity)))))


def assert_same(masks, expected) -> int:
    """Equal paths and masks; returns how many masks were compared."""
    assert set(masks) == set(expected)
    for path, mask in masks.items():
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, np.asarray(expected[path]).astype(bool), err_msg=path)
    return len(masks)


def normal(seed: int) -> dict[str, jax.Array]:
    draw = np.random.default_rng(seed)
    return {p: jnp.asarray(draw.standard_normal(s), jnp.float32) for p, s in SHAPES.items()}


def by_sorting(flat, k: int, ties: str = 'lowest') -> np.ndarray:
    """The definition: by falling score, then by index; NaN and -inf are left out."""
    flat = np.asarray(flat, np.float64)
    index = np.arange(flat.size)
    order = np.lexsort((index if ties == 'lowest' else -index, -flat))
    order = [i for i in order if flat[i] > -np.inf]
    mask = np.zeros(flat.size, bool)
    mask[order[:k]] = True
    return mask


#: Many ties, both zeros, what is not finite; sums of them are exact.
special = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 3.5, np.inf, -np.inf, np.nan])
numbers = st.one_of(special, st.floats(-100, 100, width=16))


def draws(shapes, elements=numbers):
    return st.fixed_dictionaries(
        {path: arrays(np.float32, shape, elements=elements) for path, shape in shapes.items()}
    )


# --- n of m -----------------------------------------------------------------------------------


def n_of_m_by_loops(scores, n, m, axis, ties):
    """Every line along the axis, every group of it, one by one."""
    mask = np.zeros(scores.shape, bool)
    lines, marks = np.moveaxis(scores, axis, -1), np.moveaxis(mask, axis, -1)  # views
    for place in np.ndindex(lines.shape[:-1]):
        for start in range(0, lines.shape[-1], m):
            group = lines[place][start : start + m]
            marks[place][start : start + m] = by_sorting(group, n, ties)
    return mask


AXES = {'conv/kernel': 2}


@functools.cache
def compiled_n_of_m(n, m, ties, runs=False):
    def fn(scores):
        return n_of_m(scores, n=n, m=m, axis=AXES, ties=ties)

    return jax.jit(jax.vmap(fn) if runs else fn)


@pytest.mark.parametrize(
    ('n', 'm', 'ties', 'runs'),
    [
        (2, 4, 'lowest', True),
        (2, 4, 'lowest', False),
        (1, 3, 'highest', True),
        (5, 8, 'lowest', False),
        (2, 40, 'highest', False),  # too long to compare each entry with each
    ],
)
def test_n_of_m_against_loops(n, m, ties, runs):
    """Expectation: `n_of_m_by_loops`; lengths 5 and 10 leave short groups of 1, 2, 2, 1, 5 and 2.

    With `runs`, one of three vmapped runs, in the middle.
    """

    @few
    @given(scores=draws(SHAPES))
    def check(scores):
        stacked = {p: np.stack([a[::-1], a, a * 0]) if runs else a for p, a in scores.items()}
        masks = compiled_n_of_m(n, m, ties, runs)(stacked)
        masks = {path: mask[1] if runs else mask for path, mask in masks.items()}
        axes = {'conv/kernel': 2, 'dense/kernel': 0}
        expected = {p: n_of_m_by_loops(a, n, m, axes[p], ties) for p, a in scores.items()}
        assert_same(masks, expected)

    with np.errstate(invalid='ignore'):
        check()


@pytest.mark.parametrize(('n', 'm', 'length'), [(2, 4, 12), (3, 4, 10), (2, 4, 1)])
def test_n_of_m_counts(n, m, length):
    """Expectation: n in every full group, min(n, length) in the short one, for finite scores."""
    select = jax.jit(functools.partial(n_of_m, n=n, m=m))
    draw = np.random.default_rng(length).standard_normal((length, 5))
    for scores in (draw, np.ones((length, 5))):
        mask = np.asarray(select({'w': jnp.asarray(scores, jnp.float32)})['w'])
        for start in range(0, length, m):
            group = mask[start : start + m]
            assert (group.sum(0) == min(n, len(group))).all()


def test_n_of_m_by_hand():
    """Expectation: (3, -1, 0.5, 2 | 0, 0, 1, 1) by magnitude, two of four, ties to the left."""
    weights = jnp.array([3, -1, 0.5, 2, 0, 0, 1, 1.0])[:, None]
    for n, ties, expected in (
        (2, 'lowest', [1, 0, 0, 1, 0, 0, 1, 1]),
        (3, 'highest', [1, 1, 0, 1, 0, 1, 1, 1]),
    ):
        mask = jax.jit(functools.partial(n_of_m, n=n, m=4, ties=ties))({'w': jnp.abs(weights)})
        assert mask['w'][:, 0].astype(int).tolist() == expected


def test_n_of_m_never_keeps_what_is_pruned():
    """Expectation: the module's law; jaxpruner's formula keeps two of each group, NaN first."""
    scores = jnp.array([[-jnp.inf, 1, -jnp.inf, jnp.nan], [jnp.nan, -jnp.inf, 5, jnp.inf]])
    mask = jax.jit(functools.partial(n_of_m, n=2, m=4, axis=1))({'w': scores})['w']
    assert mask.tolist() == [[False, True, False, False], [False, False, True, True]]
    theirs = scores.argsort().argsort() >= 2
    assert theirs.tolist() == [[False, True, False, True], [True, False, False, True]]


def test_n_of_m_axes():
    """Expectation: an int serves all leaves, a mapping its own; a dense default is axis 0."""
    scores = normal(1)
    each = jax.jit(functools.partial(n_of_m, n=1, m=5, axis={'conv/kernel': 2}))(scores)
    both = jax.jit(functools.partial(n_of_m, n=1, m=5, axis=-2))(scores)  # the input axis of both
    assert_same(both, each)
    assert (each['conv/kernel'].sum(2) == 1).all()
    assert (each['dense/kernel'][:5].sum(0) == 1).all()


def test_blocks_of_small_floats():
    """Expectation: sums are single precision at least; in bfloat16 257 ones add up to 256."""
    ones = jnp.ones((2, 257), jnp.bfloat16).at[0, 0].set(0)
    select = jax.jit(functools.partial(block_top_k, block=(1, 257)))
    assert select({'w': ones}, {'w': 1})['w'].all(1).tolist() == [False, True]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'n': 0, 'm': 4}, 'n = 0 and m = 4'),
        ({'n': 5, 'm': 4}, 'n = 5 and m = 4'),
        ({'n': 1, 'm': 0}, 'n = 1 and m = 0'),
        ({'n': 2.0, 'm': 4}, 'n must be a plain integer, not 2.0'),
        ({'n': 2, 'm': 4}, "'conv/kernel' has shape (2, 3, 5, 4): say along which axis"),
        ({'n': 2, 'm': 4, 'axis': {'dense/kernel': 1}}, "'conv/kernel' has shape (2, 3, 5, 4):"),
        ({'n': 2, 'm': 4, 'axis': 2}, "'dense/kernel' has shape (10, 3), and no axis 2"),
        ({'n': 2, 'm': 4, 'axis': -3}, "'dense/kernel' has shape (10, 3), and no axis -3"),
        ({'n': 2, 'm': 4, 'axis': {'conv': 2}}, "given for 'conv': did you mean 'conv/kernel'?"),
        ({'n': 2, 'm': 4, 'axis': 1, 'ties': 'lower'}, "ties 'lower': did you mean 'lowest'?"),
    ],
)
def test_n_of_m_errors(arguments, message):
    """Expectation: one line that names the path and what was asked."""
    scores = {path: jnp.zeros(shape) for path, shape in SHAPES.items()}
    with pytest.raises(PruneError, match=re.escape(message)):
        n_of_m(scores, **arguments)
    with pytest.raises(PruneError, match='floating point, not int32'):
        n_of_m({'w': jnp.zeros((4, 4), jnp.int32)}, n=1, m=2)


#: How many leaves the file has of each kind.
NM = {
    'nm1_4_axis-1': 5,
    'nm2_4_axis-1': 5,
    'nm2_4_axis0': 3,
    'nm1_2_axis1': 3,
    'nm4_8_axis-1': 4,
}


@pytest.mark.parametrize('kind', NM)
def test_n_of_m_against_jaxpruner(kind):
    """Expectation: its masks, exactly; where scores tie, with ties='highest' only."""
    n, m, axis = map(int, re.fullmatch(r'nm(\d+)_(\d+)_axis(-?\d+)', kind).groups())
    file = golden('jaxpruner_masks')
    expected = {name: leaves(file, f'out/{name}/{kind}') for name in SETS}
    select = functools.partial(n_of_m, n=n, m=m, axis=axis)
    highest, lowest = (jax.jit(functools.partial(select, ties=t)) for t in ('highest', 'lowest'))
    compared = 0
    for name in SETS:
        scores = {path: file[f'in/{name}/{path}'] for path in expected[name]}
        compared += assert_same(highest(scores), expected[name])
        if kind == 'nm2_4_axis0':  # one kind will do: each is a program to compile
            ours = lowest(scores)
            same = [np.array_equal(ours[path], expected[name][path]) for path in ours]
            assert all(same) if name == 'plain' else not any(same)
    assert compared == 2 * NM[kind]


# --- blocks -----------------------------------------------------------------------------------


def blocks_of(shape, block, axes, pooled) -> list[tuple[slice, ...]]:
    """The blocks of a leaf in their order, as slices."""
    steps = [size if pooled else 1 for size in shape]
    for axis, side in zip(axes, block, strict=True):
        steps[axis] = side
    ranges = [range(0, size, step) for size, step in zip(shape, steps, strict=True)]
    return [
        tuple(slice(a, a + step) for a, step in zip(corner, steps, strict=True))
        for corner in itertools.product(*ranges)
    ]


def block_score(entries, reduce):
    entries = entries[entries != -np.inf].astype(np.float64)
    if not entries.size:
        return -np.inf
    return {'sum': np.sum, 'mean': np.mean, 'max': np.max}[reduce](entries)


def block_top_k_by_loops(scores, counts, block, axes, reduce, pooled):
    """The definition, block by block; one ranking over all leaves in sorted path order for '*'."""
    cut = {path: blocks_of(leaf.shape, block, axes, pooled) for path, leaf in scores.items()}
    values = {p: [block_score(scores[p][at], reduce) for at in cut[p]] for p in sorted(scores)}
    if '*' in counts:
        flat = iter(by_sorting([v for p in values for v in values[p]], counts['*']))
        chosen = {path: [next(flat) for _ in values[path]] for path in values}
    else:
        chosen = {path: by_sorting(values[path], counts[path]) for path in values}
    masks = {}
    for path, leaf in scores.items():
        masks[path] = np.zeros(leaf.shape, bool)
        for at, keep in zip(cut[path], chosen[path], strict=True):
            masks[path][at] = keep & (leaf[at] > -np.inf)
    return masks


#: block, axes, reduce, pooled: edges on both sides; blocks larger than a leaf; axes in any order.
LAYOUTS = [
    ((2, 2), (-2, -1), 'sum', False),
    ((2, 4), (-2, -1), 'mean', False),
    ((4, 3), (-1, 0), 'max', True),
    ((3, 2), (0, 1), 'mean', True),
    ((8, 128), (-2, -1), 'sum', True),
]


@functools.cache
def compiled_blocks(layout, runs=False):
    block, axes, reduce, pooled = layout

    def select(scores, counts):
        return block_top_k(scores, counts, block=block, axes=axes, reduce=reduce, pooled=pooled)

    return jax.jit(jax.vmap(select) if runs else select)


def counts_of(layout) -> dict[str, int]:
    """All blocks; every other layout is ranked over all leaves together."""
    block, axes, _, pooled = layout
    total = {p: n_blocks(s, block, axes=axes, pooled=pooled) for p, s in SHAPES.items()}
    return {'*': sum(total.values())} if LAYOUTS.index(layout) % 2 else total


@pytest.mark.parametrize('layout', LAYOUTS, ids=str)
def test_blocks_against_loops(layout):
    """Expectation: `block_top_k_by_loops`, with the scores' -inf, NaN and ties.

    Scores are multiples of 1/2, so that sums are exact and blocks do tie.
    """
    counts = {path: st.integers(0, size) for path, size in counts_of(layout).items()}
    halves = st.sampled_from([0.0, 0.5, 1.0, 1.5, -2.0])
    rare = st.sampled_from([0.0, 0.5, 1.0, -np.inf, -np.inf, -np.inf, -np.inf, np.nan, np.inf])

    @few
    @given(
        scores=st.one_of(draws(SHAPES, halves), draws(SHAPES, rare)),
        counts=st.fixed_dictionaries(counts),
    )
    def check(scores, counts):
        masks = compiled_blocks(layout)(scores, counts)
        assert_same(masks, block_top_k_by_loops(scores, counts, *layout))

    check()


@pytest.mark.parametrize('layout', LAYOUTS, ids=str)
def test_blocks_are_whole_and_counted(layout):
    """Expectation: with finite scores, blocks all True or all False, as many as asked."""
    block, axes, _, pooled = layout
    cut = {path: blocks_of(shape, block, axes, pooled) for path, shape in SHAPES.items()}
    assert all(n_blocks(SHAPES[p], block, axes=axes, pooled=pooled) == len(cut[p]) for p in cut)
    for seed in range(4):
        draw = np.random.default_rng(seed)
        scores = {p: draw.integers(0, 3, s).astype(np.float32) for p, s in SHAPES.items()}
        counts = {p: int(draw.integers(0, size + 1)) for p, size in counts_of(layout).items()}
        masks = jax.device_get(compiled_blocks(layout)(scores, counts))
        means = {path: [float(mask[at].mean()) for at in cut[path]] for path, mask in masks.items()}
        assert set().union(*means.values()) <= {0.0, 1.0}
        kept = {path: sum(values) for path, values in means.items()}
        assert (kept if '*' not in counts else {'*': sum(kept.values())}) == counts


def test_blocks_of_many_runs():
    """Expectation: N vmapped runs with their own counts are N single runs."""
    layout = LAYOUTS[3]
    draw = np.random.default_rng(5)
    scores = {p: draw.integers(-1, 4, (3, *s)).astype(np.float32) for p, s in SHAPES.items()}
    counts = {'*': np.array([0, 5, 8])}
    together = compiled_blocks(layout, runs=True)(scores, counts)
    for run in range(3):
        alone = compiled_blocks(layout)(*jax.tree.map(lambda a, i=run: a[i], (scores, counts)))
        assert_same({path: mask[run] for path, mask in together.items()}, alone)


@pytest.mark.slow
def test_plain_calls_agree_with_jit():
    """Expectation: the same masks without `jit`; both are made for either use."""
    scores = {'w': jnp.asarray(np.random.default_rng(3).standard_normal((6, 5)), jnp.float32)}
    for select in (
        functools.partial(n_of_m, n=2, m=4),
        functools.partial(block_top_k, counts={'*': 3}, block=(2, 2), reduce='max'),
    ):
        masks = select(scores)
        assert_same(masks, jax.jit(select)(scores))
        assert 0 < masks['w'].sum() < 30


def test_block_of_one_is_unstructured():
    """Expectation: `global_top_k`, as every entry is a block, whatever the reduction."""
    scores = normal(4)
    expected = jax.jit(jp.global_top_k)(scores, {'*': 31})
    for reduce in ('sum', 'max'):
        select = jax.jit(functools.partial(block_top_k, block=(1, 1), reduce=reduce))
        assert_same(select(scores, {'*': 31}), expected)


def tiles(block) -> np.ndarray:
    """2 x 3 tiles, tile i worth i throughout; 300 columns leave 44 of 128 for the last ones."""
    return np.kron(np.arange(6).reshape(2, 3), np.ones(block, np.float32))[:, :300]


@pytest.mark.parametrize(
    ('block', 'reduce', 'kept'),
    [
        ((8, 128), 'mean', [3, 4, 5]),
        ((128, 128), 'mean', [3, 4, 5]),
        ((8, 128), 'sum', [3, 4]),  # the two best by mean are 4 and 5
    ],
)
def test_hardware_tiles(block, reduce, kept):
    """Expectation: by hand; in a sum tiles 0 to 5 are worth 0, 1, 0.7, 3, 4 and 5 x 44 / 128."""
    leaf = tiles(block)
    assert n_blocks(leaf.shape, block) == 6
    select = jax.jit(functools.partial(block_top_k, block=block, reduce=reduce))
    masks = select({'w': jnp.asarray(leaf)}, {'w': len(kept)})
    np.testing.assert_array_equal(masks['w'], np.isin(leaf, kept))


def test_spatial_positions_have_their_own_blocks():
    """Expectation: by hand: the worth of a block differs by its kernel position alone."""
    leaf = jnp.broadcast_to(jnp.arange(9.0).reshape(3, 3, 1, 1), (3, 3, 4, 8))
    own = jax.jit(functools.partial(block_top_k, block=(4, 4)))({'w': leaf}, {'w': 4})['w']
    np.testing.assert_array_equal(own, (leaf >= 7))  # two blocks at each of positions 7 and 8
    pooled = jax.jit(functools.partial(block_top_k, block=(4, 4), pooled=True))
    shared = pooled({'w': leaf}, {'w': 1})['w']
    np.testing.assert_array_equal(shared, np.broadcast_to(np.arange(8) < 4, leaf.shape))
    assert n_blocks(leaf.shape, (4, 4)) == 18
    assert n_blocks(leaf.shape, (4, 4), pooled=True) == 2


@pytest.mark.parametrize('reduce', ['sum', 'mean', 'max'])
def test_pruned_entries_of_a_block(reduce):
    """Expectation: the docstring: -inf counts as nothing and stays out; a NaN spoils its block."""
    inf, nan = float('inf'), float('nan')
    leaf = jnp.array([[1, -inf, 2, 1, -inf, -inf, nan, 9], [1, 3, 0, 0, -inf, -inf, 9, 9.0]])
    select = jax.jit(functools.partial(block_top_k, block=(2, 2), reduce=reduce))
    one = select({'w': leaf}, {'w': 1})['w'].astype(int)
    assert one.tolist() == [[1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    every = select({'w': leaf}, {'w': 4})['w'].astype(int)
    assert every.tolist() == [[1, 0, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]
    # Against a block of four times 1.5: sum 5 < 6, maximum 3; the mean of three live ones is
    # 5 / 3, where one over all four would be 1.25.
    one = select({'w': leaf.at[:, 2:4].set(1.5)}, {'w': 1})['w']
    assert int(one.sum()) == (4 if reduce == 'sum' else 3)


def test_a_pruner_of_blocks_never_revives():
    """Expectation: as a selection of the pruner, round after round within the masks before."""
    problem = jp.problem_from_functions(lambda key: None, lambda params, x: x)
    params = {'kernel': jnp.asarray(np.random.default_rng(6).standard_normal((6, 10)))}
    pruner = jp.pruner(jp.magnitude(), jax.jit(functools.partial(block_top_k, block=(2, 4))))
    masks, key = None, jax.random.key(0)
    for count in (7, 4, 2):
        view = jp.view(problem, params, masks=masks)
        _, new, info = pruner.update(key, pruner.init(key, view), view, {'kernel': count}, None)
        assert masks is None or not (new['kernel'] & ~masks['kernel']).any()
        masks = new
        cut = blocks_of((6, 10), (2, 4), (0, 1), False)
        assert sum(bool(masks['kernel'][at].all()) for at in cut) == count
        assert info.nonfinite == 0


def test_block_counts():
    """Expectation: round(density * blocks), to even; 5 x 3 of 4 x 4, 3 x 3 spatial positions."""
    shapes = {'a': (20, 10), 'b': (3, 3, 8, 8), 'c': (2, 2)}
    counts = functools.partial(block_counts, shapes, block=(4, 4))
    assert counts(1.0) == {'a': 15, 'b': 36, 'c': 1}
    assert counts(0.5) == {'a': 8, 'b': 18, 'c': 0}
    assert counts(0.5, pooled=True) == {'a': 8, 'b': 2, 'c': 0}
    assert counts(0.1, axes=(0, 1)) == {'a': 2, 'b': 6, 'c': 0}
    assert all(type(count) is int for count in counts(0.5).values())
    with pytest.raises(PruneError, match=r'density 0.01 keeps none of 52 blocks'):
        counts(0.01)
    with pytest.raises(PruneError, match=r'density must be in \(0, 1\], not 90'):
        counts(90)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'block': (0, 4)}, 'sides of a block must be at least 1, not (0, 4)'),
        ({'block': 4}, 'block must be two integers, not (4,)'),
        ({'block': (4, 4, 4)}, 'block must be two integers, not (4, 4, 4)'),
        ({'block': (4, 2.5)}, 'block must be a plain integer, not 2.5'),
        ({'block': (2, 2), 'axes': (2, 3)}, "'dense/kernel' has shape (10, 3), and no axis 2"),
        ({'block': (2, 2), 'axes': (-1, -1)}, "two different ones of 'conv/kernel', not (-1, -1)"),
        ({'block': (2, 2), 'axes': (3, -1)}, "two different ones of 'conv/kernel', not (3, -1)"),
        ({'block': (2, 2), 'reduce': 'avg'}, "unknown reduction 'avg': valid: max, mean, sum"),
    ],
)
def test_block_errors(arguments, message):
    """Expectation: one line that names the path and what was asked."""
    scores = {path: jnp.zeros(shape) for path, shape in SHAPES.items()}
    with pytest.raises(PruneError, match=re.escape(message)):
        block_top_k(scores, {'*': 1}, **arguments)
    if 'reduce' not in arguments:
        with pytest.raises(PruneError, match=re.escape(message)):
            block_counts(SHAPES, 0.5, **arguments)


def test_wrong_counts_and_scores():
    """Expectation: errors of the selections they are handed to; a vector has no two axes."""
    with pytest.raises(PruneError, match='layerwise selection lack w and have unknown v'):
        block_top_k({'w': jnp.zeros((4, 4))}, {'v': 1}, block=(2, 2))
    with pytest.raises(PruneError, match='integer, not float'):
        block_top_k({'w': jnp.zeros((4, 4))}, {'*': 0.5}, block=(2, 2))
    with pytest.raises(PruneError, match='floating point, not int32'):
        block_top_k({'w': jnp.zeros((4, 4), jnp.int32)}, {'*': 1}, block=(2, 2))
    with pytest.raises(PruneError, match=re.escape("'w' has shape (9,), and no axis -2")):
        block_top_k({'w': jnp.zeros(9)}, {'*': 1}, block=(2, 2))
    with pytest.raises(PruneError, match=re.escape('a leaf has shape (9,), and no axis -2')):
        n_blocks((9,), (2, 2))


# --- against jaxpruner ------------------------------------------------------------------------

LEVELS = ('s0.0', 's0.25', 's0.5', 's0.8', 's0.95')


def as_matrix(leaf):
    return leaf[None] if leaf.ndim == 1 else leaf


@pytest.mark.parametrize(
    ('block', 'pooling', 'reductions'),
    [
        *((block, 'avg', ['mean']) for block in ((1, 4), (2, 8), (4, 4))),
        ((3, 4), 'avg', ['mean', 'sum']),
        *((block, 'max', ['max']) for block in ((1, 4), (2, 8), (3, 4), (4, 4))),
    ],
)
def test_blocks_against_jaxpruner(block, pooling, reductions):
    """Expectation: its masks, exactly, ties included; 'avg' is our mean, see the docstring.

    Its 'avg' is a plain sum where no side leaves a remainder; so is ours then.
    """
    file = golden('jaxpruner_masks')
    height, width = block
    kind = f'block{height}x{width}_{pooling}'
    axes = {'block': block, 'axes': (0, 1), 'pooled': True}
    compared = 0
    for reduce in reductions:
        select = jax.jit(functools.partial(block_top_k, reduce=reduce, **axes))
        for name, level in itertools.product(SETS, LEVELS):
            expected = leaves(file, f'out/{name}/{kind}/{level}')
            if reduce == 'sum':
                expected = {p: mask for p, mask in expected.items() if divides(block, mask.shape)}
            scores = {path: as_matrix(file[f'in/{name}/{path}']) for path in expected}
            counts = {
                path: kept_by_jaxpruner(n_blocks(leaf.shape, **axes), float(level[1:]))
                for path, leaf in scores.items()
            }
            masks = select(scores, counts)
            masks = {path: mask.reshape(expected[path].shape) for path, mask in masks.items()}
            compared += assert_same(masks, expected)
    assert compared >= 20


def divides(block, shape) -> bool:
    return len(shape) > 1 and shape[0] % block[0] == 0 and shape[1] % block[1] == 0


def test_sum_and_mean_differ_at_the_edge():
    """Expectation: jaxpruner's mean over real entries; a sum ranks the shorter edge blocks lower.

    Rows 8 and 9 of 10 make blocks of 2 x 4.
    """
    file = golden('jaxpruner_masks')
    scores = {'w': jnp.abs(file['in/plain/dense2/kernel'])}
    theirs = file['out/plain/block4x4_avg/s0.5/dense2/kernel'].astype(bool)
    counts = {'w': kept_by_jaxpruner(9, 0.5)}
    select = functools.partial(block_top_k, block=(4, 4))
    mean = jax.jit(functools.partial(select, reduce='mean'))(scores, counts)['w']
    total = jax.jit(select)(scores, counts)['w']
    np.testing.assert_array_equal(mean, theirs)
    assert total[8:].sum() < mean[8:].sum()


def test_unstructured_against_jaxpruner():
    """Expectation: its masks, exactly, ties included."""
    file = golden('jaxpruner_masks')
    select = jax.jit(jp.layerwise_top_k)
    compared = 0
    for name, level in itertools.product(SETS, LEVELS):
        expected = leaves(file, f'out/{name}/unstructured/{level}')
        scores = {path: file[f'in/{name}/{path}'] for path in expected}
        counts = {p: kept_by_jaxpruner(a.size, float(level[1:])) for p, a in scores.items()}
        compared += assert_same(select(scores, counts), expected)
    assert compared == 50


def jaxpruner_scores(file, kind: str) -> dict[str, np.ndarray]:
    """|w| or |w g| of the kernels; it leaves vectors dense."""
    weights = {p: w for p, w in leaves(file, 'params').items() if w.ndim > 1}
    gradients = leaves(file, 'grads')
    return {p: np.abs(w * gradients[p] if kind == 'saliency' else w) for p, w in weights.items()}


@pytest.mark.parametrize('norm', ['norm', 'nonorm'])
def test_global_rankings_against_jaxpruner(norm):
    """Expectation: its masks, exactly; `unit_norm` is what makes the difference."""
    file = golden('jaxpruner_global')
    normed = jax.jit(lambda scores, counts: jp.global_top_k(unit_norm(scores), counts))
    raw = jax.jit(jp.global_top_k)
    ours, other = (normed, raw) if norm == 'norm' else (raw, normed)
    compared = 0
    for kind, level in itertools.product(('magnitude', 'saliency'), (0.3, 0.5, 0.8, 0.9, 0.98)):
        scores = jaxpruner_scores(file, kind)
        counts = {'*': kept_by_jaxpruner(sum(a.size for a in scores.values()), level)}
        expected = leaves(file, f'out/global_{kind}_{norm}/s{level}')
        compared += assert_same(ours(scores, counts), expected)
        wrong = other(scores, counts)
        assert any(not np.array_equal(wrong[path], expected[path]) for path in wrong)
    assert compared == 40


@pytest.mark.parametrize('distribution', ['uniform', 'erk'])
def test_layer_rankings_against_jaxpruner(distribution):
    """Expectation: its masks, exactly, from the sparsities it gave each layer."""
    file = golden('jaxpruner_global')
    select = jax.jit(jp.layerwise_top_k)
    compared = 0
    for kind, level in itertools.product(('magnitude', 'saliency'), (0.3, 0.5, 0.8, 0.9, 0.98)):
        scores = jaxpruner_scores(file, kind)
        sparsity = leaves(file, f'out/dist_{distribution}/s{level}')
        counts = {p: kept_by_jaxpruner(a.size, sparsity[p]) for p, a in scores.items()}
        expected = leaves(file, f'out/layer_{kind}_{distribution}/s{level}')
        compared += assert_same(select(scores, counts), expected)
    assert compared == 40


# --- unit norm --------------------------------------------------------------------------------


@few
@given(scores=draws({'w': (3, 4)}, st.floats(-100, 100, width=16)))
def test_unit_norm(scores):
    """Expectation: the definition in float64; only a leaf near zero has less than norm 1."""
    leaf = scores['w'].astype(np.float64)
    with jax.enable_x64(True):
        result = compiled_unit_norm({'w': leaf})['w']
    expected = leaf / (np.linalg.norm(leaf) + 1e-8)
    np.testing.assert_allclose(result, expected, rtol=1e-12, atol=0)


compiled_unit_norm = jax.jit(unit_norm)


def test_unit_norm_ignores_what_is_not_finite():
    """Expectation: the norm of the finite entries (3-4-5); -inf, NaN and inf stay as they are."""
    nan, inf = float('nan'), float('inf')
    leaves = {'a': jnp.array([[3.0, -inf], [nan, -4.0]]), 'b': jnp.array([inf, 3.0, 4.0])}
    result = compiled_unit_norm(leaves)
    np.testing.assert_allclose(result['a'], [[0.6, -inf], [nan, -0.8]], rtol=1e-6)
    np.testing.assert_allclose(result['b'], [inf, 0.6, 0.8], rtol=1e-6)
    nothing = compiled_unit_norm({'a': jnp.array([-inf, nan, 0.0]), 'b': jnp.zeros((2, 0))})
    np.testing.assert_array_equal(nothing['a'], [-inf, nan, 0.0])
    assert nothing['b'].shape == (2, 0)


def test_unit_norm_of_extreme_scores():
    """Expectation: (3, 4) / 5 at any scale float32 holds; below 1e-8 the constant rules."""
    for scale in (1e37, 2e25, 1.0, 1e-3):
        result = compiled_unit_norm({'w': jnp.array([3 * scale, 4 * scale])})['w']
        np.testing.assert_allclose(result, [0.6, 0.8], rtol=1e-4 if scale < 1 else 1e-6)
    tiny = compiled_unit_norm({'w': jnp.array([3e-20, 4e-20])})['w']
    np.testing.assert_allclose(tiny, [3e-12, 4e-12], rtol=1e-6)
    half = compiled_unit_norm({'w': jnp.array([300.0, 400.0], jnp.float16)})['w']
    np.testing.assert_allclose(half, [0.6, 0.8], rtol=1e-6)  # squares overflow in half precision
    assert half.dtype == jnp.float32


def test_unit_norm_of_many_runs():
    """Expectation: N vmapped runs are N single runs, up to the order of a sum."""
    scales = np.array([1, 1e-3, 1e3])[:, None, None]
    scores = jnp.asarray(np.random.default_rng(7).standard_normal((3, 4, 5)) * scales, jnp.float32)
    together = jax.jit(jax.vmap(unit_norm))({'w': scores})['w']
    for run in range(3):
        alone = compiled_unit_norm({'w': scores[run]})['w']
        np.testing.assert_allclose(together[run], alone, rtol=1e-6)
        assert math.isclose(float(jnp.linalg.norm(alone)), 1, rel_tol=1e-4)
