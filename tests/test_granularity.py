"""What competes besides weights and units: n of every m, blocks, heads; and what is left to pay."""

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest

import jaxprune as jp
from jaxprune import method, nn, pattern
from jaxprune.report import tables
from jaxprune.sweep.store import read_layers

DRAW = np.random.default_rng(0)
SHAPES = {'a': (8, 12), 'b': (12, 6), 'c': (6, 4)}
PARAMS = {path: DRAW.normal(size=shape).astype('float32') for path, shape in SHAPES.items()}
X = DRAW.normal(size=(5, 8)).astype('float32')


def pruned(granularity, density, params=PARAMS, **options):
    rule = {'prunable': lambda path, leaf: True}
    found = jp.prune(params, 'magnitude', density, granularity=granularity, **rule, **options)
    return jax.device_get(found.masks)


def test_n_of_every_m():
    """Expectation: at density n/m the masks of `n_of_m`; below it, the largest of those."""
    scores = {path: np.abs(leaf) for path, leaf in PARAMS.items()}
    best = jax.device_get(pattern.n_of_m(scores, n=2, m=4))
    masks = pruned('2:4', 0.5, allocation='uniform')
    # Along six inputs the last group is short and keeps two of two: half of all is less.
    for path in 'ab':
        np.testing.assert_array_equal(masks[path], best[path])
    assert masks['c'].sum() == 12 and not (masks['c'] & ~best['c']).any()
    fewer = pruned('2:4', 0.25)
    ranked = np.sort(np.concatenate([scores[p][best[p]] for p in SHAPES]))[::-1]
    count = round(0.25 * sum(leaf.size for leaf in PARAMS.values()))
    for path in SHAPES:
        wanted = best[path] & (scores[path] >= ranked[count - 1])
        np.testing.assert_array_equal(fewer[path], wanted)
    said = r'keeps 115 of 192 weights \(granularity 2:4\), but the caps together allow 100'
    with pytest.raises(jp.PruneError, match=said):
        pruned('2:4', 0.6)


def test_inputs_lie_where_the_products_say():
    """Expectation: kernels that are stored (outputs, inputs) have the same masks, turned."""
    turned = {path: leaf.T for path, leaf in PARAMS.items()}

    def apply(params, x):
        return jnp.tanh(jnp.tanh(x @ params['a'].T) @ params['b'].T) @ params['c'].T

    for granularity in ('1:2', '4x2'):
        straight = pruned(granularity, 0.5)
        found = pruned(granularity, 0.5, turned, model=apply, data=X)
        for path in SHAPES:
            np.testing.assert_array_equal(found[path].T, straight[path])


@pytest.mark.parametrize('allocation', ['global', pytest.param('uniform', marks=pytest.mark.more)])
def test_blocks(allocation):
    """Expectation: the masks of `block_top_k`, whose blocks are ranked by the same sums."""
    scores = {path: np.abs(leaf) for path, leaf in PARAMS.items()}
    counts = pattern.block_counts(SHAPES, 0.5, block=(4, 2))
    if allocation == 'global':
        total = sum(pattern.n_blocks(shape, (4, 2)) for shape in SHAPES.values())
        counts = {'*': round(total / 2)}
    wanted = pattern.block_top_k(scores, counts, block=(4, 2))
    found = pruned('4x2', 0.5, allocation=allocation)
    for path in SHAPES:
        np.testing.assert_array_equal(found[path], wanted[path])


def test_heads_go_whole():
    """Expectation: read off the masks: a head's queries, keys, values, and what reads it."""
    net = jp.problem_from_flax(nn.build('vit', 10, patch=14, dim=8, depth=1, heads=4), (28, 28, 1))
    params, _ = jax.jit(net.init)(jax.random.key(0))
    x = np.zeros((2, 28, 28, 1), 'float32')
    found = jp.prune(params, 'magnitude', 0.5, granularity='head', model=net, data=x).masks
    at = 'encoder/attention_0'
    kept = [np.asarray(found[f'{at}/{name}/kernel']).any((0, 2)) for name in ('query', 'key')]
    assert kept[0].sum() == 2
    for name in ('query', 'key', 'value'):
        mask = np.asarray(found[f'{at}/{name}/kernel'])
        np.testing.assert_array_equal(mask, np.broadcast_to(kept[0][:, None], mask.shape))
    mask = np.asarray(found[f'{at}/out/kernel'])
    np.testing.assert_array_equal(mask, np.broadcast_to(kept[0][:, None, None], mask.shape))
    assert all(bool(m.all()) for path, m in found.items() if at not in path)


def test_dimensions_of_heads_that_a_bias_would_keep_alive_stay():
    """Expectation: queries meet keys in a sum with their biases, so only values may go where
    kernels alone have masks; with biases prunable both may."""
    net = jp.problem_from_flax(nn.build('vit', 10, patch=14, dim=8, depth=1, heads=4), (28, 28, 1))
    params = jax.eval_shape(net.init, jax.random.key(0))[0]

    def apply(params, x):
        return net.apply(params, {}, x, train=False, key=None)[0]

    read = jp.groups(apply, params, jnp.zeros((1, 28, 28, 1)))
    for rule, layers in ((jp.kernels, ['value']), (lambda path, leaf: True, ['query', 'value'])):
        shapes = jp.shapes(jp.pick(params, rule))
        found = method.competing('head_dim', shapes, lambda: read).shapes
        assert [name.split('/')[2] for name in found] == layers


TABLE = {
    'name': 'granularities',
    'model': {'name': 'mlp', 'widths': [12, 8]},
    'data': {'name': 'mnist_small', 'train_examples': 200, 'test_examples': 100},
    'train': {'epochs': 1, 'batch_size': 50},
    'record': {'compact_seeds': [1]},
    'grid': {
        'method': [
            {'name': 'magnitude', 'granularity': 'unit', 'allocation': 'uniform'},
            {'name': 'magnitude', 'granularity': '2:4', 'start': 1},
            {'name': 'force', 'granularity': '7x3', 'rounds': 3},
        ],
        'compression': [2],
        'seed': [0, 1],
    },
}


def test_a_sweep_of_granularities(tmp_path):
    """Expectation: exact counts of what competes; costs of the compact network by hand."""
    frame = jp.run_sweep(TABLE, out=tmp_path / 'runs')
    last = frame.filter(pl.col('epoch') == 1)
    assert last['error'].null_count() == 6
    units, n_of_m, blocks = (
        last.filter(pl.col('label').str.contains(f'[(]{what}[)]'))
        for what in ('units', '2:4', '7x3')
    )
    assert [f['target'][0] for f in (units, n_of_m, blocks)] == ['units', 'direct', 'blocks']
    assert [f['label'][0] for f in (n_of_m, blocks)] == ['magnitude (2:4)', 'FORCE (7x3)']
    assert (n_of_m['compression'] == 2).all()
    layers = read_layers(tmp_path / 'runs').filter(pl.col('run_id') == units['run_id'][0])
    kept = dict(layers.select('path', 'kept').iter_rows())
    assert kept == {'dense_0/kernel': 784 * 6, 'dense_1/kernel': 6 * 4, 'dense_2/kernel': 4 * 10}

    def params(a, b):
        return 784 * a + a + a * b + b + b * 10 + 10

    assert units['params_compact'].to_list() == [params(6, 4)] * 2
    dense = jp.structure.cost(lambda p, x: x @ p, np.zeros((3, 2)), np.zeros((1, 3)))
    assert dense.params == 6
    flops = [2 * (784 * a + a * b + b * 10) + 2 * (a + b) + 10 for a, b in ((12, 8), (6, 4))]
    np.testing.assert_allclose(units['speedup_theoretical'], flops[0] / flops[1], rtol=1e-12)
    assert units['flops_compact'].to_list() == [flops[1]] * 2
    assert (last['latency_ratio'].is_null() == (last['seed'] == 0)).all()
    assert (last['latency_ratio'].drop_nulls() > 0).all()
    cut = last.drop_nulls('compact_accuracy')
    assert len(cut) == (last['seed'] == 1).sum()
    assert cut['compact_accuracy'].to_list() == cut['test_accuracy'].to_list()
    # Two were pruned before training. One after it: the full network is that before its round.
    before, after = (
        cut.filter((pl.col('label') == 'magnitude (2:4)') == late) for late in (False, True)
    )
    assert before['full_accuracy'].to_list() == before['test_accuracy'].to_list()
    assert before['compact_difference'].max() < 1e-5 < after['compact_difference'].item()
    summary = tables.summary(frame, read_layers(tmp_path / 'runs')).filter(
        pl.col('target') == 'units'
    )
    np.testing.assert_allclose(summary['speedup'], flops[0] / flops[1], rtol=1e-12)
