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
from jaxprune import method, nn, structure, tree
from jaxprune.errors import SpecError
from jaxprune.schedule import schedule
from jaxprune.sweep import make_spec
from jaxprune.sweep.store import read_flow, read_layers
from jaxprune.types import View

# --- selection --------------------------------------------------------------------------------


def units_of(name='mlp', shape=(28, 28, 1), kind='unit', keep='', **options):
    net = jp.problem_from_flax(nn.build(name, 10, **options), shape)
    shapes = structure.forward_shapes(net, shape)
    read = functools.cache(lambda: structure.groups_of(net, shape))
    return method.competing(kind, shapes, read, keep)


def test_units_by_hand():
    """Expectation: by hand; entries that are pruned neither count nor return, a NaN never stays."""
    sizes = {'a': (2, 3), 'b': (3, 2), 'c': (2, 1)}
    params = {path: np.ones(shape, np.float32) for path, shape in sizes.items()}

    def chained(p, x):
        return jax.nn.relu(jax.nn.relu(x @ p['a']) @ p['b']) @ p['c']

    groups = method.competing('unit', sizes, lambda: jp.groups(chained, params, np.ones((1, 2))))
    assert groups.shapes == {'a': (3,), 'b': (2,)}
    scores = {
        'a': np.array([[1.0, 5, 3], [1, 5, 9]], np.float32),
        'b': np.array([[2.0, 1], [0, 2], [2, 2]], np.float32),
        'c': np.array([[np.nan], [7]], np.float32),  # no unit is made here
    }
    masks = {path: np.ones(shape, bool) for path, shape in sizes.items()}
    masks['a'][1, 2] = False

    @functools.partial(jax.jit, static_argnames=('by_layer', 'floor'))
    def top(scores, counts, by_layer=False, floor=()):
        select = jp.layerwise_top_k if by_layer else jp.global_top_k
        fewest = dict(floor) or None
        made = jp.pruner(lambda *_: scores, select, groups=groups, fewest=fewest)
        view = View({p: jnp.ones(s) for p, s in sizes.items()}, {}, {}, masks)
        _, found, info = made.update(jax.random.key(0), (), view, counts, None)
        return found, info.kept

    found, kept = jax.device_get(top(scores, {'*': 3}))  # sums: a 2, 10, 3; b 4, 5
    assert kept == {'a': 1, 'b': 2}
    np.testing.assert_array_equal(found['a'], [[False, True, False]] * 2)
    np.testing.assert_array_equal(found['b'], [[False] * 2, [True] * 2, [False] * 2])
    assert found['c'].all()
    found, kept = jax.device_get(top(scores, {'a': 2, 'b': 1}, by_layer=True))
    np.testing.assert_array_equal(found['a'], [[False, True, True], [False, True, False]])
    np.testing.assert_array_equal(found['b'], [[False, False], [False, True], [False, True]])
    np.testing.assert_array_equal(found['c'], [[False], [True]])
    found, kept = jax.device_get(top(scores, {'*': 3}, floor=(('a', 2), ('b', 0))))
    assert kept == {'a': 2, 'b': 1}
    broken = {**scores, 'a': np.array([[np.nan, 5, 3], [1, 5, 9]], np.float32)}
    found, kept = jax.device_get(top(broken, {'*': 5}))
    assert kept == {'a': 2, 'b': 2} and not found['a'][:, 0].any()


@pytest.mark.more
def test_layers_whose_units_compete():
    """Expectation: all that may go, once for each set that goes together; what is named stays."""
    assert units_of('lenet5').shapes == {
        'conv_0/kernel': (6,),
        'conv_1/kernel': (16,),
        'dense_0/kernel': (120,),
        'dense_1/kernel': (84,),
    }
    mobile = units_of('mobilenet', (32, 32, 3), width=0.25).shapes
    assert len(mobile) == 14 and not any('depth' in path for path in mobile)
    residual = functools.partial(units_of, 'resnet20', (32, 32, 3))
    # Nine blocks, and three stages whose sums go together.
    assert len(residual().shapes) == 12
    inner = residual(keep='stem|_b_|_skip').shapes
    assert len(inner) == 9 and all('_a_conv' in path for path in inner)
    with pytest.raises(jp.PruneError, match="'stm' matches no layer; there are: stem_conv"):
        residual(keep='stm')
    with pytest.raises(jp.PruneError, match='is no regular expression'):
        residual(keep='(')
    with pytest.raises(jp.PruneError, match=r"no unit that could be pruned .*the network's output"):
        units_of(widths=[])
    heads = units_of('vit', kind='group', patch=14, dim=8, depth=1, heads=2)
    assert list(heads.shapes.values()) == [(2,), (16,)]


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
    groups = units_of()._replace(shapes={'a': (64,), 'b': (10,), 'c': (1,)})
    assert method.limits(groups, 0, 0.05)[0] == {'a': 4, 'b': 1, 'c': 1}
    assert method.limits(groups, 2, 0.05)[0] == {'a': 4, 'b': 2, 'c': 1}
    assert method.limits(groups) == (0, 1.0)


@pytest.mark.parametrize('family', [FIRST, pytest.param(SECOND, marks=pytest.mark.slow)])
def test_filters_kept_are_those_of_the_authors(family):
    """Expectation: their kept filters of a global ranking, measure by measure, and the logits of
    their network cut smaller, from masks of the whole one."""
    with jax.enable_x64(True):
        file, problem, view, batches, classes = study()
        groups = method.competing(
            'unit', tree.shapes(view.weights), lambda: structure.groups_of(problem, (32, 32, 3))
        )
        assert set(groups.shapes) == {f'{conv}/kernel' for conv in CONVS}
        total = sum(n for (n,) in groups.shapes.values())

        @jax.jit
        def select(scores, n):  # all weights of a filter have its score
            filters = {path: scores[path][0, 0, 0] for path in groups.shapes}
            kept = jp.global_top_k(filters, {'*': n})
            return kept, groups.spread(kept)

        @jax.jit
        def logits_of(masks, x):
            cut = jp.view(problem, view.params, view.model_state, masks)
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
            kept, masks = select(made[measure], total - gone)
            for conv in CONVS:
                left = np.flatnonzero(kept[f'{conv}/kernel'])
                np.testing.assert_array_equal(left, file[f'out/kept/{case}/{conv}'], case)
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


@pytest.mark.more
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


@pytest.mark.more
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
        ({'granularity': 'unit', 'floor_share': 1.0}, 'floor_share: expected a share below 1'),
        ({'granularity': 'filter'}, "granularity: unknown granularity 'filter': valid: group"),
        ({'granularity': '4:2'}, "granularity: granularity '4:2': expected n:m with 1 <= n <= m"),
        ({'granularity': '2:4', 'repair': 'orthp'}, "repair: 'orthp' goes with granularity unit"),
        (
            {'keep_all_units': 'dense'},
            'keep_all_units: names layers that keep all units, with granularity unit',
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


def test_a_pruner_of_units_refuses_what_does_not_fit():
    problem = jp.problem_from_flax(nn.build('mlp', 10), (28, 28, 1))
    with pytest.raises(jp.PruneError, match="'lamp' does not go with granularity 'unit'"):
        jp.get_pruner(problem, 'magnitude', groups=units_of(), allocation='lamp')
    with pytest.raises(jp.PruneError, match="granularity 'unit' needs the network"):
        method.competing('unit', {'a': (3, 4)})
    with pytest.raises(jp.PruneError, match="unknown granularity 'units': did you mean 'unit'"):
        method.competing('units', {'a': (3, 4)})


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
        ({'keep_all_units': 'w'}, 'with granularity unit'),
    ):
        with pytest.raises(jp.PruneError, match=said):
            jp.prune(params, 'magnitude', 0.5, **options)
