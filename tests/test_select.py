"""Exact selection against a sort on the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.extend.core import jaxprs_in_params

import jaxprune as jp
from jaxprune import threshold_on_gpu
from jaxprune.errors import PruneError

SIZE = 33
DTYPES = {
    'float16': jnp.float16,
    'bfloat16': jnp.bfloat16,
    'float32': jnp.float32,
    'float64': jnp.float64,
}


batched = jax.jit(jax.vmap(jp.top_k_mask))


def of_three(scores, k):
    """The run in the middle of three; the others have other scores and counts."""
    return jnp.stack([scores[::-1], scores, scores * 0]), jnp.stack([k + 1, k, k * 0])


def by_vmap(scores, k):
    return batched(*of_three(scores, k))[1]


def as_on_a_gpu(fn, elsewhere, searches):
    del elsewhere
    return fn(dict(searches)) if searches else {}


@jax.jit
def batched_as_on_a_gpu(scores, k):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threshold_on_gpu, '_on_gpu', as_on_a_gpu)
        return jax.vmap(jp.top_k_mask)(scores, k)


def by_digits(scores, k):
    """As a GPU does it, see `by_vmap`."""
    return batched_as_on_a_gpu(*of_three(scores, k))[1]


jitted = jax.jit(jp.top_k_mask)
HOW = {'plain': jp.top_k_mask, 'jit': jitted, 'vmap': by_vmap, 'digits': by_digits}


def by_sorting(scores: np.ndarray, k: int) -> np.ndarray:
    """The definition: sort by falling score, then by rising index; NaN and -inf are left out."""
    flat = np.asarray(scores).reshape(-1).astype(np.float64)
    order = np.lexsort((np.arange(flat.size), -flat))
    order = [i for i in order if flat[i] > -np.inf]
    mask = np.zeros(flat.size, bool)
    mask[order[:k]] = True
    return mask.reshape(scores.shape)


#: Many ties, both zeros, what is not finite, subnormal numbers; and any other number.
special = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 0.5, 2.0**-20, np.inf, -np.inf, np.nan, -np.nan, 1e-40, 2e-40, -1e-40]
)
numbers = st.one_of(special, st.floats(width=32))
lists = st.one_of(
    arrays(np.float32, SIZE, elements=special), arrays(np.float32, SIZE, elements=numbers)
)


@pytest.mark.parametrize(
    ('how', 'dtype'),
    [
        pytest.param(how, dtype, marks=() if how in ('vmap', 'digits') else pytest.mark.more)
        for how in HOW
        for dtype in DTYPES
    ],
)
def test_top_k_is_exact_and_ties_prefer_the_low_index(how, dtype):
    """Expectation: `by_sorting` above; -0.0 ties with +0.0; k from 0 to the size."""

    @settings(max_examples=8 if how == 'plain' else 60, deadline=None)
    @given(values=lists, k=st.integers(0, SIZE))
    def check(values, k):
        with np.errstate(over='ignore'), jax.enable_x64(dtype == 'float64'):
            scores = values.astype(DTYPES[dtype])
            mask = HOW[how](jnp.asarray(scores), jnp.int32(k))
        np.testing.assert_array_equal(mask, by_sorting(scores, k))

    check()


def test_float64_is_ranked_in_float64():
    """Expectation: the sort; the values differ from the 40th bit on, subnormals included."""
    draw = np.random.default_rng(0)
    values = np.concatenate([1 + draw.permutation(100) * 2.0**-40, [5e-324, 1e-323, 0.0, -5e-324]])
    with jax.enable_x64(True):
        for k in (0, 1, 50, 101, 102, 103, 104):
            np.testing.assert_array_equal(
                jitted(jnp.asarray(values), k), by_sorting(values, k), err_msg=str(k)
            )


@pytest.mark.parametrize('how', ['jit', 'vmap'])
@pytest.mark.parametrize('size', [1, 3, 4, 7])
def test_all_ties(how, size):
    """Expectation: the first k; sizes on both sides of powers of two, where bit counts change."""
    for k in range(size + 1):
        mask = HOW[how](jnp.full(size, 0.25), jnp.int32(k))
        np.testing.assert_array_equal(mask, np.arange(size) < k)


def test_neither_nan_nor_minus_infinity_is_ever_kept():
    """Expectation: the docstring; with fewer keepable entries than k, all of them and no more."""
    scores = jnp.array([jnp.nan, 1.0, -jnp.inf, jnp.inf, -3.0, -jnp.nan])
    for k in (3, 4, 6):
        assert jitted(scores, k).tolist() == [False, True, False, True, True, False]
    nothing = jnp.array([jnp.nan, -jnp.inf])
    assert not jitted(nothing, 2).any()
    assert not jitted(nothing, 0).any()


def test_counts_outside_the_range_are_clipped():
    """Expectation: the docstring."""
    assert not jitted(jnp.arange(7.0), -3).any()
    assert jitted(jnp.arange(7.0), 99).all()
    assert jitted(jnp.zeros((0,)), 0).shape == (0,)


def test_any_shape():
    """Expectation: the flat mask in the shape of the scores; flat = C order."""
    values = np.random.default_rng(1).integers(0, 4, (3, 3, 2, 5)).astype(np.float32)
    np.testing.assert_array_equal(jitted(values, 37), by_sorting(values, 37))
    assert bool(jp.top_k_mask(jnp.array(3.0), 1)) is True


def test_small_floats_without_infinity():
    """Expectation: the sort; float8_e4m3fn has no infinity to compare with."""
    for dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2):
        mask = jp.top_k_mask(jnp.array([1, 3, -2, 3, 0.5], dtype), 2)
        assert mask.tolist() == [False, True, False, True, False]


def test_integers_are_refused():
    """Expectation: an error; scores of a fixed width would need another order of bits."""
    with pytest.raises(PruneError, match='floating point, not int32'):
        jp.top_k_mask(jnp.arange(3), 1)


@pytest.mark.parametrize('ties', [False, True])
def test_large(ties):
    """Expectation: a host sort of 2 M scores, where float32 counts by rounding would still pass."""
    draw = np.random.default_rng(2)
    size = 2_000_003
    scores = draw.integers(0, 9, size) if ties else draw.standard_normal(size)
    scores = scores.astype(np.float32)
    k = 20_001
    order = np.argsort(-scores, kind='stable')[:k]
    mask = np.asarray(jitted(scores, k))
    assert mask.sum() == k
    assert mask[order].all()


#: Scores whose counts are far from a straight line between the ends.
DRAWN = {
    'wide': lambda draw, n: np.exp(20 * draw.standard_normal(n)),
    'negative': lambda draw, n: -(draw.standard_normal(n) ** 2),
    'mostly zero': lambda draw, n: (draw.random(n) < 0.01) * draw.standard_cauchy(n),
    'two scales': lambda draw, n: np.where(draw.random(n) < 0.5, 1e30, 1e-40) * draw.random(n),
    'one apart': lambda draw, n: np.where(np.arange(n) == n // 2, 3e38, 1e-38 * draw.random(n)),
}


@pytest.mark.parametrize('kind', DRAWN)
def test_scores_of_all_sizes(kind, monkeypatch):
    """Expectation: a host sort; all counts in one program, so that each waits for the slowest."""
    n = 4_001
    scores = DRAWN[kind](np.random.default_rng(3), n).astype(np.float32)
    counts = [0, 1, 2, 40, 400, 2000, 2001, 3600, 4000, n]
    for gpu in (False, True):
        if gpu:
            monkeypatch.setattr(threshold_on_gpu, '_on_gpu', as_on_a_gpu)
        masks = jax.jit(jax.vmap(lambda k: jp.top_k_mask(scores, k)))(jnp.array(counts))
        for k, mask in zip(counts, masks, strict=True):
            np.testing.assert_array_equal(mask, by_sorting(scores, k), err_msg=f'{k} {gpu}')


def test_leaves_of_two_widths_as_on_a_gpu(monkeypatch):
    """Expectation: a host sort of each; the thresholds of doubles take twice the passes."""
    monkeypatch.setattr(threshold_on_gpu, '_on_gpu', as_on_a_gpu)
    draw = np.random.default_rng(6)
    leaves = {'a': draw.standard_normal(50), 'b': draw.integers(-2, 3, 60).astype(np.float32)}
    with jax.enable_x64(True):
        scores = {path: jnp.asarray(leaf) for path, leaf in leaves.items()}
        masks = jp.layerwise_top_k(scores, {'a': 7, 'b': 23})
    for (path, leaf), k in zip(leaves.items(), (7, 23), strict=True):
        np.testing.assert_array_equal(masks[path], by_sorting(leaf, k))


def test_a_gpu_searches_by_digits_and_a_cpu_does_not():
    """Expectation: lowered for a GPU, the program shifts bits; for this machine it does not."""
    traced = jax.jit(jp.top_k_mask).trace(jnp.zeros(9), jnp.int32(2))
    for platform, shifts in (('cuda', True), ('rocm', True), ('cpu', False)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ('shift_left' in text) == shifts, platform


def test_leaves_that_differ_from_device_to_device():
    """Expectation: a host sort; inside `shard_map` one leaf is sharded and one is replicated."""
    mesh = jax.make_mesh((2,), ('d',), axis_types=(jax.sharding.AxisType.Auto,))
    along, same = jax.sharding.PartitionSpec('d'), jax.sharding.PartitionSpec()
    draw = np.random.default_rng(5)
    a, b = (jnp.asarray(draw.standard_normal(shape)) for shape in ((2, 50), (33,)))

    def masks(a, b):
        found = jp.layerwise_top_k({'a': a[0], 'b': b}, {'a': 7, 'b': 9})
        return found['a'][None], found['b']

    both = jax.jit(
        jax.shard_map(masks, mesh=mesh, in_specs=(along, same), out_specs=(along, same))
    )(a, b)
    for row, mask in zip(a, both[0], strict=True):
        np.testing.assert_array_equal(mask, by_sorting(row, 7))
    np.testing.assert_array_equal(both[1], by_sorting(b, 9))


def test_counts_of_few_bits():
    """Expectation: 100 of 1000, a size that int8 does not hold."""
    assert jitted(jnp.arange(1000.0), jnp.int8(100)).sum() == 100


@pytest.mark.optimised
def test_many_more_entries_than_float32_counts():
    """Expectation: the first k of 2**24 + 3 equal scores; a float32 sum of ones stops at 2**24.

    Scores of 16 bits take half of the steps.
    """
    size = 2**24 + 3
    for k in (2**24 + 1, size):
        mask = np.asarray(jitted(np.ones(size, np.float16), k))
        assert mask.sum() == k
        assert mask[:k].all()


def primitives(jaxpr) -> set[str]:
    found = set()
    for eqn in jaxpr.eqns:
        found.add(eqn.primitive.name)
        for inner in jaxprs_in_params(eqn.params):
            found |= primitives(inner)
    return found


@pytest.mark.parametrize('runs', [None, 2])
def test_no_sort(runs):
    """Expectation: the module's promise; it searches, without a sort or a cumulative sum."""
    fn, scores, k = jp.top_k_mask, jnp.zeros(9), jnp.int32(2)
    if runs:
        fn, scores, k = jax.vmap(fn), jnp.zeros((2, 9)), jnp.zeros(2, jnp.int32)
    names = primitives(jax.make_jaxpr(fn)(scores, k).jaxpr)
    assert 'reduce_sum' in names  # the walk does see inside
    assert not {n for n in names if 'sort' in n or 'top_k' in n or 'cumsum' in n}


def test_one_trace_for_all_counts():
    """Expectation: k is traced, so no count compiles anew."""
    traces = 0

    def counted(scores, k):
        nonlocal traces
        traces += 1
        return jp.top_k_mask(scores, k)

    fn = jax.jit(counted)
    for k in range(9):
        assert fn(jnp.arange(9.0), jnp.int32(k)).sum() == k
    assert traces == 1


# --- over leaves ------------------------------------------------------------------------------

LEAVES = {'b/kernel': (4, 5), 'a/kernel': (7,), 'c/0/w': (2, 3, 1, 2)}  # not in sorted order


def leaves(seed: int = 0) -> dict[str, jax.Array]:
    draw = np.random.default_rng(seed)
    return {p: jnp.asarray(draw.integers(0, 5, s), jnp.float32) for p, s in LEAVES.items()}


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), k=st.integers(0, 39))
def test_global_is_one_ranking_in_path_order(seed, k):
    """Expectation: `by_sorting` of the concatenation in sorted path order, cut again."""
    scores = leaves(seed)
    flat = by_sorting(np.concatenate([np.ravel(scores[p]) for p in sorted(scores)]), k)
    masks = jax.device_get(jax.jit(jp.global_top_k)(scores, {'*': k}))
    assert sorted(masks) == sorted(LEAVES)
    joined = np.concatenate([np.ravel(masks[p]) for p in sorted(masks)])
    np.testing.assert_array_equal(joined, flat)
    assert all(masks[p].shape == shape for p, shape in LEAVES.items())
    assert sum(int(v) for v in jp.count_kept(masks).values()) == k


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), counts=st.tuples(*(st.integers(0, n) for n in (20, 7, 12))))
def test_layerwise_is_one_ranking_per_leaf(seed, counts):
    """Expectation: `by_sorting` of each leaf."""
    scores, counts = leaves(seed), dict(zip(LEAVES, counts, strict=True))
    masks = jax.jit(jp.layerwise_top_k)(scores, counts)
    for path, mask in masks.items():
        np.testing.assert_array_equal(mask, by_sorting(np.asarray(scores[path]), counts[path]))
    assert {path: int(n) for path, n in jp.count_kept(masks).items()} == counts


def test_counts_batched_over_runs():
    """Expectation: N vmapped runs are N single runs, global and layerwise."""
    scores = jax.tree.map(lambda *a: np.stack(a), *(leaves(seed) for seed in range(3)))
    per_leaf = {path: np.array([0, 3, 7], np.int32) for path in LEAVES}
    for select, counts in (
        (jp.global_top_k, {'*': np.array([0, 13, 39], np.int32)}),
        (jp.layerwise_top_k, per_leaf),
    ):
        together = jax.device_get(jax.jit(jax.vmap(select))(scores, counts))
        for run in range(3):
            own = {path: count[run] for path, count in counts.items()}
            alone = jax.jit(select)(leaves(run), own)
            for path, mask in alone.items():
                np.testing.assert_array_equal(together[path][run], mask)


def test_a_global_selection_needs_a_leaf():
    with pytest.raises(PruneError, match='a global selection needs the scores of at least one'):
        jp.global_top_k({}, {'*': 0})


def test_counts_with_the_wrong_paths():
    """Expectation: errors that name the paths."""
    scores = leaves()
    with pytest.raises(PruneError, match=r'global.*lack \*.*unknown a/kernel'):
        jp.global_top_k(scores, {'a/kernel': 1})
    with pytest.raises(PruneError, match=r'layerwise.*lack a/kernel, b/kernel, c/0/w.*unknown \*'):
        jp.layerwise_top_k(scores, {'*': 1})
    with pytest.raises(PruneError, match='lack c/0/w'):
        jp.layerwise_top_k(scores, {'a/kernel': 1, 'b/kernel': 1})
    with pytest.raises(PruneError, match='unknown d'):
        jp.layerwise_top_k(scores, {**dict.fromkeys(LEAVES, 1), 'd': 1})


def test_a_pruner_never_revives_and_counts_what_is_not_finite():
    """Expectation: scores of pruned weights are -inf whatever they were; `monotone=False` revives.

    `nonfinite` counts weights still in play only.
    """
    problem = jp.problem_from_functions(lambda key: None, lambda params, x: x)
    params = {'kernel': np.ones((1, 6), np.float32)}
    masks = {'kernel': np.array([[True, False, True, True, True, False]])}
    scores = {'kernel': np.array([[1.0, 9.0, np.nan, np.inf, 2.0, np.nan]], np.float32)}
    view = jp.view(problem, params, masks=masks)
    key = jax.random.key(0)
    for monotone, expected in ((True, [1, 0, 0, 1, 1, 0]), (False, [0, 1, 0, 1, 1, 0])):
        pruner = jp.pruner(lambda key, view, batches: scores, monotone=monotone)
        init, update = jax.jit(pruner.init), jax.jit(pruner.update)
        dense = view._replace(masks={'kernel': np.ones((1, 6), bool)})
        _, new, info = update(key, init(key, dense), view, {'*': 3}, None)
        assert new['kernel'].tolist() == [[bool(e) for e in expected]]
        assert info.nonfinite == (2 if monotone else 3)
        assert info.nonzero == (4 if monotone else 6)
        assert info.kept == {'kernel': 3}
        # What was pruned before the first round returns under neither.
        _, new, _ = update(key, init(key, view), view, {'*': 3}, None)
        assert new['kernel'].tolist() == [[True, False, False, True, True, False]]
    wrong = jp.pruner(lambda key, view, batches: {'k': scores['kernel']})
    with pytest.raises(PruneError, match='scores lack kernel and have unknown k'):
        wrong.update(key, (), view, {'*': 3}, None)


@pytest.mark.parametrize('k', [2.7, np.float32(3), jnp.float32(3.0), True])
def test_a_count_that_is_no_integer_is_refused(k):
    """Truncating 2.7 to 2 would be a silently wrong mask."""
    with pytest.raises(PruneError, match='integer'):
        jp.top_k_mask(jnp.arange(4.0), k)


@pytest.mark.parametrize('k', [2**40, np.int64(2**40), -(2**40)])
def test_a_count_beyond_int32_is_clipped_not_wrapped(k):
    assert jp.top_k_mask(jnp.arange(4.0), k).sum() == (4 if k > 0 else 0)
