"""Pruning to an effective compression: against the published code, and in sweeps."""

import functools
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from published import golden
from test_connectivity import masks_of

import jaxprune as jp
from jaxprune import structure, tree
from jaxprune.errors import PruneError, SpecError
from jaxprune.method import get_pruner
from jaxprune.nn import MLP
from jaxprune.sweep import make_spec, run_sweep, store
from jaxprune.sweep.sweep_plan import make_plan
from jaxprune.types import Batch

# --- SynFlow of the effective-sparsity study ----------------------------------------------------


def mlp(p, x):
    x = x.reshape(x.shape[0], -1)
    for i in (1, 2, 3):
        x = x @ p[f'tensor_dense_{i}']['kernel']
    return x


def vgg16(p, x):
    layer = 1
    for convs in (2, 2, 3, 3, 3):
        for _ in range(convs):
            kernel = p[f'tensor_conv{layer}']['kernel']
            x = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
            )
            layer += 1
        x = nn.avg_pool(x, (2, 2), (2, 2), padding='SAME')
    return x.reshape(x.shape[0], -1) @ p['tensor_dense2']['kernel']


@functools.cache
def synflow_of(name, forward):
    """File, shapes, and 100 rounds as programs of counts: `direct`, and `effective` of counts and
    the fewest active weights."""
    file = golden(name)
    params = {
        layer: {'kernel': jnp.asarray(np.asarray(file[f'params/{layer}/kernel'], np.float64))}
        for layer in map(str, file['meta/layer_order'])
    }
    problem = jp.problem_from_functions(lambda key: params, forward)
    shapes = tree.shapes(tree.pick(params))
    x = jnp.zeros((1, 1, *map(int, file['meta/input_shape'])), jnp.float64)
    connect = structure.connectivity(forward, params, x[0])
    pruner = get_pruner(problem, 'synflow', shapes=shapes, connect=connect)
    view, batches = jp.view(problem, params), Batch(x, jnp.zeros((1, 1), jnp.int32))

    def masks_after(rounds_of, counts, active):
        key = jax.random.key(0)
        return jp.prune_rounds(rounds_of, key, view, counts, batches, active=active)[0].masks

    direct = pruner._replace(final_masks=None)
    return (
        file,
        shapes,
        jax.jit(lambda counts: masks_after(direct, counts, 0)),
        jax.jit(lambda counts, active: masks_after(pruner, counts, active)),
    )


@pytest.mark.optimised
@pytest.mark.parametrize(
    ('name', 'forward', 'sparsity'),
    [
        ('effsp_synflow_mlp', mlp, '0.9'),
        ('effsp_synflow_mlp', mlp, '0.99'),
        ('effsp_synflow_mlp', mlp, '0.998'),
        pytest.param('effsp_synflow_vgg16narrow', vgg16, '0.9', marks=pytest.mark.slow),
        pytest.param('effsp_synflow_vgg16narrow', vgg16, '0.97', marks=pytest.mark.slow),
    ],
)
def test_published_synflow_direct_and_effective(name, forward, sparsity):
    """Expectation: `Pruner('synflow')` of the study, 100 rounds: all bits of both masks."""
    s = float(sparsity)
    with jax.enable_x64(True):
        file, shapes, direct, effective = synflow_of(name, forward)
        size = sum(math.prod(shape) for shape in shapes.values())
        removed = [int(size - size * (1 - s) ** (t / 100)) for t in range(1, 101)]
        counts = {'*': np.array([size - r for r in removed], np.int32)}
        masks = direct(counts)
        wanted = masks_of(file, f'out/synflow_direct/s{sparsity}', shapes)
        for path in shapes:
            np.testing.assert_array_equal(masks[path], wanted[path])
        if f'out/synflow_effective/s{sparsity}/{next(iter(shapes)).split("/")[0]}' not in file:
            return
        found = effective(counts, np.int32(structure.active_wanted(size, 1 / (1 - s))))
        wanted = masks_of(file, f'out/synflow_effective/s{sparsity}', shapes)
        for path in shapes:
            np.testing.assert_array_equal(found[path], wanted[path])


# --- sweeps -------------------------------------------------------------------------------------

TABLE = {
    'name': 'effective',
    'model': {'name': 'mlp', 'widths': [20, 12]},
    'data': {'name': 'mnist_small', 'train_examples': 128, 'test_examples': 50},
    'train': {'epochs': 1, 'batch_size': 64},
    'prune': {'samples_per_class': 2},
    'grid': {
        'method': [
            {'name': 'random', 'allocation': 'uniform', 'target': 'effective'},
            {'name': 'force', 'rounds': 3, 'target': 'effective', 'floor': 2},
            {'name': 'random', 'allocation': 'lamp', 'cap': 0.5},
            {'name': 'random', 'allocation': 'uniform'},
        ],
        'compression': [1, 20, 300],
        'seed': [0, 1],
    },
}


@pytest.fixture(scope='module')
def swept(tmp_path_factory):
    out = tmp_path_factory.mktemp('effective') / 'out'
    return run_sweep(TABLE, out), store.read_layers(out), out


def test_columns_and_targets(swept):
    """Expectation: the definitions; a target is met from below, sizes 15680 + 240 + 120."""
    results, layers, _ = swept
    size = 15680 + 240 + 120
    assert layers['path'].unique(maintain_order=True).to_list() == [
        'dense_0/kernel',
        'dense_1/kernel',
        'dense_2/kernel',
    ]
    assert layers.filter(pl.col('active') > pl.col('kept')).is_empty()
    active = dict(layers.group_by('run_id').agg(pl.col('active').sum()).iter_rows())
    for row in results.iter_rows(named=True):
        n = active[row['run_id']]
        assert row['effective_compression'] == (size / n if n else math.inf)
        assert row['effective_compression'] >= row['compression']
        assert row['target'] == ('effective' if 'to effective' in row['label'] else 'direct')
        if row['target'] == 'effective':
            assert row['effective_compression'] <= row['target_compression'] * (1 + 1e-9)
        elif row['method'] != 'dense':
            assert abs(row['compression'] / row['target_compression'] - 1) < 0.02
    # What the study is about: random loses far more paths than its direct compression says.
    random = results.filter(
        pl.col('label') == 'random (uniform)', pl.col('target_compression') == 300
    )
    assert (random['effective_compression'] > 900).all()
    assert results['error'].is_null().all()


def test_floors_and_caps_hold(swept):
    """Expectation: at least two weights per layer, at most half of a layer."""
    results, layers, _ = swept
    labels = results.select('run_id', 'label', 'target_compression').unique()
    joined = layers.join(labels, on='run_id')
    force = joined.filter(pl.col('label') == 'FORCE to effective')
    assert force['kept'].min() >= 2
    capped = joined.filter(pl.col('label') == 'random (LAMP allocation)')
    assert (capped['kept'] <= capped['size'] // 2).all()


def test_lamp_allocation_is_that_of_lamp():
    """Expectation: random with the allocation of LAMP keeps as many of each layer as LAMP does."""
    rng = np.random.default_rng(0)
    weights = {
        f'l{i}': {'kernel': jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)}
        for i, (shape, scale) in enumerate([((30, 20), 1.0), ((20, 10), 9.0), ((10, 4), 0.1)])
    }
    for density in (0.5, 0.02):
        lamp = jp.prune(weights, 'lamp', density)
        random = jp.prune(weights, 'random', density, allocation='lamp')
        magnitude = jp.prune(weights, 'magnitude', density, allocation='lamp')
        assert [leaf.kept for leaf in random.report.leaves] == [
            leaf.kept for leaf in lamp.report.leaves
        ]
        for path, mask in lamp.masks.items():  # inside a layer LAMP ranks by magnitude
            np.testing.assert_array_equal(mask, magnitude.masks[path])
        assert any((random.masks[p] != m).any() for p, m in lamp.masks.items())


@pytest.mark.slow
def test_strategies_give_the_same_masks(swept, tmp_path):
    """Expectation: as many weights of each layer as `map` keeps, under the other strategies."""
    grid = {**TABLE['grid'], 'method': TABLE['grid']['method'][1:2], 'compression': [20]}
    runs = make_plan(make_spec({**TABLE, 'grid': grid}))['runs']
    wanted = pl.DataFrame({'run_id': [run['run_id'] for run in runs]})
    layers = swept[1].join(wanted, on='run_id').sort('run_id', 'path')
    assert layers.height == 6
    for strategy in ('vmap', 'unroll'):
        spec = {**TABLE, 'grid': grid, 'engine': {'batching': strategy}}
        run_sweep(spec, tmp_path / strategy)
        other = store.read_layers(tmp_path / strategy).sort('run_id', 'path')
        # Scores from data are sums in another order: a weight at the threshold may differ.
        difference = (other['kept'] - layers['kept']).abs()
        assert other.select('run_id', 'path', 'size').equals(
            layers.select('run_id', 'path', 'size')
        )
        assert difference.max() <= 2
        assert difference.sum() <= 0.002 * layers['kept'].sum()


def test_one_program_for_all_targets_of_a_method(swept):
    """Expectation: compressions and seeds share an event program; allocations and bounds do not."""
    plan = json.loads((swept[2] / 'plan.json').read_text())
    assert len(plan['programs']) == 1
    events = plan['programs'][0]['events']
    assert len(events) == len(set(events)) == 4
    assert 'random, allocation uniform, target effective' in events
    assert 'force, floor 2, target effective' in events


def test_a_target_that_cannot_be_met_is_refused(monkeypatch):
    """Expectation: one line with the compression there is, for a network with dead taps."""
    monkeypatch.setattr('jaxprune.sweep.abstract._most_active', lambda program, group: 4010)
    with pytest.raises(SpecError, match=r'even with all weights kept .* compression is 4$'):
        make_plan(make_spec({**TABLE, 'grid': {**TABLE['grid'], 'compression': [3]}}))


def test_forward_shapes_are_in_forward_order():
    """Expectation: by name the twelfth layer would come third."""
    problem = jp.problem_from_flax(MLP((4,) * 11, 2), (3,))
    assert list(structure.forward_shapes(problem, (3,))) == [f'dense_{i}/kernel' for i in range(12)]


def test_an_allocation_that_cannot_be_sparse_enough_still_reaches_the_target():
    """Expectation: uniform+ keeps 40 weights of the last layer, yet few of them are active."""
    problem = jp.problem_from_flax(MLP((30, 20), 10), (28, 28, 1))
    params, _ = jax.jit(problem.init)(jax.random.key(0))
    x = jnp.zeros((1, 28, 28, 1))
    with pytest.raises(PruneError, match='density must be at least'):
        jp.prune(params, 'random', 1 / 2000, model=problem, data=x, allocation='uniform_plus')
    pruned = jp.prune(
        params,
        'random',
        1 / 2000,
        model=problem,
        data=x,
        allocation='uniform_plus',
        target='effective',
    )
    assert pruned.report.effective_compression <= 2000
    assert pruned.report.compression < 1000
