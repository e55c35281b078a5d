"""Whole units, neurons and filters: selected, removed with what reads them, along training too.

`flowandprune_vgg13narrow` holds which filters EkdeepSLubana/flowandprune keeps of a global ranking
and the logits of the network cut smaller, see `golden/README.md`.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from published import golden
from test_importance import CONVS, FIRST, SECOND, compiled, study

import jaxprune as jp
from jaxprune import method, nn, pattern, structure
from jaxprune.errors import SpecError
from jaxprune.schedule import schedule
from jaxprune.sweep import make_spec
from jaxprune.sweep.store import read_flow, read_layers

# --- selection --------------------------------------------------------------------------------


def test_units_by_hand():
    """Expectation: by hand; entries that are pruned neither count nor return."""

    def top(scores, counts, **options):
        choose = jax.jit(functools.partial(pattern.unit_top_k, **options))
        return jax.device_get(choose(scores, counts))

    scores = {
        'a': np.array([[1.0, 5.0, 3.0], [1.0, 5.0, -np.inf]], np.float32),
        'b': np.broadcast_to(np.array([4.0, 2.0], np.float32), (2, 2, 1, 2)),
        'c': np.array([[0.5, -np.inf]], np.float32),
    }
    found = top(scores, {'*': 3}, ranked=['a', 'b'])
    np.testing.assert_array_equal(found['a'], [[False, True, True], [False, True, False]])
    assert found['b'][..., 0].all() and not found['b'][..., 1].any()
    np.testing.assert_array_equal(found['c'], [[True, False]])  # not ranked: as it was
    layers = top(scores, {'a': 1, 'b': 1}, ranked=['a', 'b'])
    np.testing.assert_array_equal(layers['a'], [[False, True, False], [False, True, False]])
    floor = top(scores, {'*': 2}, ranked=['a', 'b'], fewest={'a': 0, 'b': 2})
    assert floor['b'].all() and not floor['a'].any()
    rows = top({'w': np.array([[1.0, 1], [2, 2]])}, {'w': 1}, ranked=['w'], axis=0)
    np.testing.assert_array_equal(rows['w'], [[False, False], [True, True]])
    broken = top({'w': np.array([[np.nan, 1.0]])}, {'w': 2}, ranked=['w'])
    np.testing.assert_array_equal(broken['w'], [[False, True]])
    one = top(scores, {'*': 1}, ranked=['a', 'b'])
    assert one['a'].sum() == 2 and not one['b'].any()
    with pytest.raises(jp.PruneError, match="no scores of 'd'"):
        pattern.unit_top_k(scores, {'*': 1}, ranked=['d'])
    with pytest.raises(jp.PruneError, match='counts of units lack b'):
        pattern.unit_top_k(scores, {'a': 1}, ranked=['a', 'b'])


def shapes_of(name: str, shape=(32, 32, 3), **options):
    net = jp.problem_from_flax(nn.build(name, 10, **options), shape)
    return structure.forward_shapes(net, shape)


def test_layers_whose_units_compete():
    """Expectation: all but the classifier and depthwise convolutions; what is named stays."""
    assert method.unit_shapes(shapes_of('lenet5', (28, 28, 1))) == {
        'conv_0/kernel': (6,),
        'conv_1/kernel': (16,),
        'dense_0/kernel': (120,),
        'dense_1/kernel': (84,),
    }
    mobile = method.unit_shapes(shapes_of('mobilenet', width=0.25))
    assert len(mobile) == 14 and not any('depth' in path for path in mobile)
    residual = shapes_of('resnet20')
    assert len(method.unit_shapes(residual)) == 21
    inner = method.unit_shapes(residual, keep_all_units='stem|_b_|_skip')
    assert len(inner) == 9 and all('_a_conv' in path for path in inner)
    with pytest.raises(jp.PruneError, match="'stm' matches no layer; there are: stem_conv"):
        method.unit_shapes(residual, keep_all_units='stm')
    with pytest.raises(jp.PruneError, match='is no regular expression'):
        method.unit_shapes(residual, keep_all_units='(')
    with pytest.raises(jp.PruneError, match='there is no layer whose units could be pruned'):
        method.unit_shapes({'a': (3, 4)})


def test_rounds_of_the_study():
    """Expectation: the fractions their code removes of what is left, in each round."""
    file = golden('flowandprune_vgg13narrow')
    names = [key for key in file if key.startswith('out/round_ratios/')]
    assert len(names) == 3
    for key in names:
        share, rounds = key.split('/p')[-1].split('_n')
        left = np.array([1.0, *schedule('harmonic')(1 - float(share), int(rounds))])
        np.testing.assert_allclose(1 - left[1:] / left[:-1], file[key], rtol=1e-9)


def test_floors_of_units():
    """Expectation: the study keeps int(0.05 n) + 1 filters of a layer at least."""
    units = {'a': (64,), 'b': (10,), 'c': (1,)}
    assert method.unit_floor(units, 0, 0.05) == {'a': 4, 'b': 1, 'c': 1}
    assert method.unit_floor(units, 2, 0.05) == {'a': 4, 'b': 2, 'c': 1}
    assert method.unit_floor(units, 0, 0.0) == {'a': 0, 'b': 0, 'c': 0}


@functools.cache
def connected():
    _, problem, view, *_ = study()
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float64)
    forward = structure.forward_of(problem)
    connect = structure.connectivity(forward, view.params, x, view.model_state)
    ranking = {name: (view.weights[f'{name}/kernel'].shape[-1],) for name in CONVS}
    return jax.jit(connect), {f'{name}/kernel': shape for name, shape in ranking.items()}


@pytest.mark.parametrize('family', [FIRST, pytest.param(SECOND, marks=pytest.mark.slow)])
def test_filters_kept_are_those_of_the_authors(family):
    """Expectation: their kept filters of a global ranking, measure by measure, and the logits of
    their network cut smaller, from masks of the whole one."""
    with jax.enable_x64(True):
        file, problem, view, batches, classes = study()
        connect, units = connected()
        total = sum(n for (n,) in units.values())
        select = jax.jit(lambda scores, n: pattern.unit_top_k(scores, {'*': n}, ranked=units))

        @jax.jit
        def logits_of(masks, x):
            cut = jp.view(problem, view.params, view.model_state, connect(masks))
            params = jp.put(cut.params, cut.weights)
            return problem.apply(params, cut.model_state, x, train=False, key=None)[0]

        cases = sorted(
            {key.split('/')[2] for key in file if key.startswith('out/kept/') and 'uncon' in key}
        )
        assert len(cases) == 4
        compared = {'masks': 0, 'logits': 0}
        made = {}
        for case in cases:
            measure, fraction, _ = case.rsplit('_', 2)
            name, _, temperature = measure.rpartition('_T')
            name, temperature = (name, float(temperature)) if name else (measure, 1.0)
            if name not in family:
                continue
            if measure not in made:
                second = name in SECOND
                measures = compiled(tuple(SECOND if second else FIRST))
                made[measure] = measures(temperature, view, classes if second else batches)[name]
            gone = int(float(fraction) * total)
            masks = select(made[measure], total - gone)
            for conv in CONVS:
                kept = np.flatnonzero(np.asarray(masks[f'{conv}/kernel']).any((0, 1, 2)))
                np.testing.assert_array_equal(kept, file[f'out/kept/{case}/{conv}'], case)
            compared['masks'] += 1
            expected = file.get(f'out/logits_sliced_f64/{case}')
            if expected is not None:
                logits = np.asarray(logits_of(masks, np.asarray(file['inputs/x'], np.float64)))
                assert np.abs(logits - expected).max() <= 1e-9 * np.abs(expected).max()
                compared['logits'] += 1
        assert compared == (
            {'masks': 3, 'logits': 2} if family is FIRST else {'masks': 1, 'logits': 1}
        )


def test_a_depthwise_filter_goes_with_the_one_that_feeds_it():
    """Expectation: read off the masks: a pointwise filter, the depthwise filter it feeds, and the
    rows of the next pointwise kernel go together, and nothing else."""
    net = jp.problem_from_flax(nn.build('mobilenet', 10, width=0.125), (32, 32, 3))
    shapes = structure.forward_shapes(net, (32, 32, 3))
    connect = jax.jit(structure.connectivity_of(net, (32, 32, 3)))
    masks = {path: np.ones(shape, bool) for path, shape in shapes.items()}
    whole = jax.device_get(connect(masks))
    masks['block2_point_conv/kernel'][..., 3] = False
    gone = {path: whole[path] & ~m for path, m in jax.device_get(connect(masks)).items()}
    assert {path for path, leaf in gone.items() if leaf.any()} == {
        'block2_point_conv/kernel', 'block3_depth_conv/kernel', 'block3_point_conv/kernel'
    }  # fmt: skip
    assert gone['block3_depth_conv/kernel'].any((0, 1, 2)).tolist().index(True) == 3
    assert gone['block3_point_conv/kernel'][:, :, 3].all()


# --- sweeps -------------------------------------------------------------------------------------

TABLE = {
    'name': 'units',
    'model': {'name': 'mlp', 'widths': [12, 8]},
    'data': {'name': 'mnist_small', 'train_examples': 400, 'test_examples': 200},
    'train': {'epochs': 4, 'batch_size': 50, 'momentum': 0.9, 'learning_rate': 0.1},
    'prune': {'samples_per_class': 2},
    'grid': {
        'method': [
            {'name': 'magnitude', 'granularity': 'unit', 'floor_share': 0.2},
            {'name': 'loss_preservation', 'granularity': 'unit', 'rounds': 2,
             'density_schedule': 'harmonic',
             'start': 1, 'every': 1},
            {'name': 'snip', 'start': 2, 'every': 2, 'restart': True},
            {'name': 'importance', 'bias': 'distance_from_initial', 'start': 3},
        ],
        'compression': [1, 2],
        'seed': [0, 1],
    },
    'record': {'every': 8, 'flow': ['distance_from_initial', 'weight_norm']},
}  # fmt: skip


@pytest.fixture(scope='module')
def swept(tmp_path_factory):
    out = tmp_path_factory.mktemp('units')
    return jp.run_sweep(TABLE, out=out / 'runs'), out / 'runs'


def test_pruning_along_training(swept):
    """Expectation: up to its first round a run is the dense control, bit for bit; densities fall
    as planned, and nothing else is pruned later; the round at the end of an epoch follows what is
    evaluated there."""
    frame, out = swept
    dense = frame.filter(pl.col('method') == 'dense')
    size = 784 * 12 + 12 * 8 + 8 * 10
    for name, first, last in (('loss_preservation', 1, 2), ('snip', 2, 2), ('importance', 3, 3)):
        for seed in (0, 1):
            rows = frame.filter((pl.col('method') == name) & (pl.col('seed') == seed)).sort('epoch')
            control = dense.filter(pl.col('seed') == seed).sort('epoch')
            assert rows['error'].null_count() == 4
            assert rows['test_loss'][:first].to_list() == control['test_loss'][:first].to_list()
            assert rows['test_loss'][first] != control['test_loss'][first]
            assert (rows['density'][:first] == 1).all()
            assert (rows['density'][first:] < 1).all()
            assert rows['density'][last:].n_unique() == 1
    weights = frame.filter(pl.col('method').is_in(['snip', 'importance']) & (pl.col('epoch') == 4))
    assert (weights['density'] == round(size / 2) / size).all()
    flow = read_flow(out).filter(pl.col('quantity') == 'distance_from_initial')
    assert len(flow) == 10 * 5 * 3
    # At step 0 the initial weights are drawn a second time, in another program.
    assert ((flow['value'] > 1e-5) == (flow['step'] > 0)).all()


def test_units_in_a_sweep(swept):
    """Expectation: 10 of the 20 hidden units are left whole, with the weights that read them: no
    weight without a path; the classifier keeps all its outputs."""
    frame, out = swept
    assert set(frame.filter(pl.col('label').str.contains('units'))['target']) == {'units'}
    rows = frame.filter(
        (pl.col('epoch') == 4) & pl.col('method').is_in(['magnitude', 'loss_preservation'])
    )
    assert (rows['effective_compression'] == rows['compression']).all()
    layers = read_layers(out)
    for run in rows['run_id']:
        kept = dict(layers.filter(pl.col('run_id') == run).select('path', 'kept').iter_rows())
        first, last = kept['dense_0/kernel'] // 784, kept['dense_2/kernel'] // 10
        assert (kept['dense_0/kernel'], kept['dense_2/kernel']) == (784 * first, 10 * last)
        assert first + last == 10 and kept['dense_1/kernel'] == first * last
    assert rows['label'].unique().sort().to_list() == [
        'loss preservation (units)',
        'magnitude (units)',
    ]


def test_uniform_units_and_a_broken_run(tmp_path):
    """Expectation: with 'uniform' every layer but the last loses half of its units; a run that
    diverges before its rounds has an error, and the others of its chunk their results."""
    entries = [
        {'name': 'magnitude', 'granularity': 'unit', 'allocation': 'uniform', 'start': 1},
        {'name': 'snip', 'rounds': 2, 'start': 1, 'every': 1},
    ]
    grid = {
        'method': entries,
        'compression': [2],
        'seed': [0],
        'train': {'learning_rate': [0.1, 1e30]},
    }
    frame = jp.run_sweep({**TABLE, 'record': {}, 'grid': grid}, out=tmp_path / 'runs')
    last = frame.filter(pl.col('epoch') == 4)
    fine = last.filter(pl.col('learning_rate') < 1)
    assert fine['error'].null_count() == 2 and fine['test_loss'].is_finite().all()
    assert last.filter((pl.col('method') == 'snip') & pl.col('error').is_not_null()).height == 1
    layers = read_layers(tmp_path / 'runs').join(fine, on='run_id')
    kept = dict(layers.filter(pl.col('method') == 'magnitude').select('path', 'kept').iter_rows())
    assert kept == {'dense_0/kernel': 784 * 6, 'dense_1/kernel': 6 * 4, 'dense_2/kernel': 4 * 10}


@pytest.mark.parametrize(
    ('entry', 'said'),
    [
        (
            {'granularity': 'unit', 'keep_all_units': '('},
            r"keep_all_units: '\(' is no regular expression",
        ),
        ({'granularity': 'unit', 'allocation': 'erk'}, "allocation: 'erk' does not go with"),
        ({'granularity': 'unit', 'target': 'effective'}, "target: 'effective' does not go with"),
        ({'granularity': 'unit', 'cap': 0.5}, 'cap: 0.5 does not go with'),
        ({'floor_share': 0.1}, "floor_share: is a share of units, with granularity 'unit'"),
        ({'granularity': 'unit', 'floor_share': 1.0}, 'floor_share: expected a share below 1'),
        ({'granularity': 'filter'}, "granularity: 'filter' is unknown, valid: unit, weight"),
        (
            {'keep_all_units': 'dense'},
            "keep_all_units: names layers that keep all units, with granularity 'unit'",
        ),
        ({'start': 5}, 'start: round 1 happens after epoch 5, but training is over after 4'),
        ({'start': 2, 'every': 3, 'rounds': 2}, 'every: round 2 happens after epoch 5'),
        ({'after_epochs': 1}, 'after_epochs: is no key any more: write start = k, every = k'),
        ({'restart': True}, 'restart: is for rounds during training'),
    ],
)
def test_units_that_cannot_be(entry, said):
    grid = {'method': [{'name': 'magnitude', **entry}], 'compression': [2], 'seed': [0]}
    with pytest.raises(SpecError, match=rf'grid\.method\[0\]\.{said}|grid\.method\[0\].*{said}'):
        make_spec({**TABLE, 'grid': grid})


def test_methods_that_bring_weights_back_have_no_units():
    grid = {'method': [{'name': 'force', 'granularity': 'unit'}], 'compression': [2], 'seed': [0]}
    with pytest.raises(SpecError, match=r"name: 'force' does not go with granularity 'unit'"):
        make_spec({**TABLE, 'grid': grid})
    problem = jp.problem_from_flax(nn.build('mlp', 10), (28, 28, 1))
    for options, said in (
        ({'granularity': 'units'}, "unknown granularity 'units': did you mean 'unit'"),
        ({'keep_all_units': 'a'}, "with granularity 'unit'"),
        ({'granularity': 'unit'}, 'units need shapes'),
        (
            {'granularity': 'unit', 'allocation': 'lamp'},
            "'lamp' does not go with",
        ),
    ):
        with pytest.raises(jp.PruneError, match=said):
            jp.get_pruner(problem, 'magnitude', **options)


def test_units_of_someones_own_model():
    """Expectation: half of the 20 hidden units with what reads them; one clear line else."""
    draw = np.random.default_rng(0)
    sizes = (6, 12, 8, 3)
    params = [
        {'w': jnp.asarray(draw.normal(size=s), jnp.float32)} for s in itertools.pairwise(sizes)
    ]

    def model(params, x):
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer['w'])
        return x @ params[-1]['w']

    data = (draw.normal(size=(5, 6)).astype('float32'), draw.integers(0, 3, 5))
    pruned = jp.prune(params, 'snip', 0.5, model=model, data=data, granularity='unit', floor=3)
    masks = [np.asarray(pruned.masks[f'{i}/w']) for i in range(3)]
    units = [mask.any(0) for mask in masks]
    assert units[0].sum() + units[1].sum() == 10 and min(u.sum() for u in units[:2]) >= 3
    assert units[2].all()
    for before, mask, after in zip([np.ones(6, bool), *units], masks, units, strict=False):
        np.testing.assert_array_equal(mask, np.outer(before, after))
    whole = jp.prune(
        params, 'magnitude', 0.5, model=model, data=data, granularity='unit', keep_all_units='^0/'
    )
    assert np.asarray(whole.masks['0/w']).any(0).sum() == 12
    for options, said in (
        ({'granularity': 'filter'}, "unknown granularity 'filter'"),
        ({'granularity': 'unit'}, "granularity 'unit' needs model= and data="),
        ({'granularity': 'unit', 'target': 'effective'}, 'a density of units is meant'),
        ({'keep_all_units': 'w'}, "with granularity 'unit'"),
    ):
        with pytest.raises(jp.PruneError, match=said):
            jp.prune(params, 'magnitude', 0.5, **options)
