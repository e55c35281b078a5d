"""Scores of coupled groups with every choice explicit, and averages over rounds.

`golden/structured/depgraph_*` has Torch-Pruning's importances, `taylor_fo_gnet` two rounds of the
Taylor authors' code; the rest is by hand or against the scores of single weights.
"""

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from test_gates import KEY, batch, case, close

import jaxprune as jp
from jaxprune import PruneError, score, structure
from jaxprune.errors import SpecError
from jaxprune.score import coupled_score, gate_taylor
from jaxprune.sweep import make_plan, make_spec
from jaxprune.sweep.store import read_layers
from jaxprune.types import Batch, Problem

TORCH_PRUNING = {
    'magnitude/p2_mean_mean': {'parameters': 'kernel$|scale$'},
    'magnitude/p1_sum_none': {
        'measure': 'magnitude', 'parameters': 'kernel$|scale$', 'reduce': 'sum', 'normalise': 'none'
    },
    'magnitude/p2_first_max': {
        'parameters': 'kernel$|scale$', 'reduce': 'first', 'normalise': 'max'
    },
    'bnscale/p1_mean_none': {
        'measure': 'magnitude', 'parameters': 'scale$', 'normalise': 'none'
    },
}  # fmt: skip


@pytest.mark.parametrize('name', ['depgraph_convnet', 'depgraph_vgg'])
def test_scores_are_those_of_torch_pruning(name):
    """Expectation: the file's importances of each root layer whose family competes."""
    file, _, problem, view, units, _ = case(name)
    compared = 0
    for criterion, options in TORCH_PRUNING.items():
        known = {
            k.rsplit('/', 1)[1]: v for k, v in file.items() if k.startswith(f'imp/{criterion}/')
        }
        if criterion.startswith('bnscale'):
            by = _with_norms(units)
        else:
            by = units
        found = jax.jit(coupled_score(problem, by=by, **options))(KEY, view, None)
        for layer, scores in found.items():
            expected = known.get(layer.removesuffix('/kernel').replace('/', '.'))
            if expected is not None:
                close(scores, expected, 1e-5)
                compared += 1
    assert compared >= 8


def _with_norms(units):
    """The layers that a norm follows."""
    scaled = {
        name: family
        for name, family in units.families.items()
        if any(m.path.endswith('scale') for m in family.members)
    }
    return units._replace(families=scaled)


def chain(kernels, **more):
    """A problem of dense layers `0/kernel`, `1/kernel`, ... and what competes in it."""
    params = {str(i): {'kernel': jnp.asarray(k)} for i, k in enumerate(kernels)}
    for path, leaf in more.items():
        layer, name = path.split('_')
        params[layer][name] = jnp.asarray(leaf)

    def apply(params, state, x, *, train, key):
        for i in range(len(kernels)):
            layer = params[str(i)]
            x = x @ layer['kernel']
            x = x * layer['scale'] if 'scale' in layer else x
            x = jax.nn.relu(x) if i + 1 < len(kernels) else x
        return x, state

    problem = Problem(None, apply, jp.cross_entropy, jp.kernels)
    x = jax.ShapeDtypeStruct((1, len(kernels[0])), params['0']['kernel'].dtype)
    read = structure.groups(problem, params, x, {})
    shapes = {f'{i}/kernel': np.shape(k) for i, k in enumerate(kernels)}
    return problem, jp.view(problem, params, {}), jp.competing('unit', shapes, lambda: read)


def scored(problem, view, units, data=None, **options):
    return jax.jit(coupled_score(problem, by=units, **options))(KEY, view, data)


def test_fpgm_by_hand():
    """Expectation: filters 0, 1, 1, 5 have the distances 7, 5, 5, 13: a duplicate goes first."""
    net = chain([np.array([[0.0, 1.0, 1.0, 5.0]]), np.ones((4, 2))])
    found = scored(*net, measure='fpgm', members='out', reduce='sum', normalise='none')
    np.testing.assert_allclose(found['0/kernel'], [7, 5, 5, 13])


def test_lamp_by_hand():
    """Expectation: filters of the norms 1, 2, 3 have 1/14, 4/13 and 1."""
    net = chain([np.array([[1.0, 2.0, 3.0]]), np.ones((3, 2))])
    found = scored(*net, members='out', reduce='sum', normalise='lamp')
    np.testing.assert_allclose(found['0/kernel'], [1 / 14, 4 / 13, 1], rtol=1e-6)


def test_norms_over_outputs_and_over_what_reads_them():
    """Expectation: sums of squares over the slices, with einsum; roots and means of them."""
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(5, 4)), rng.normal(size=(4, 3))
    net = chain([one, two])
    out, read = np.einsum('io,io->o', one, one), np.einsum('io,io->i', two, two)
    for options, expected in (
        ({'members': 'out', 'reduce': 'sum'}, out),
        ({'members': 'all', 'reduce': 'sum'}, out + read),
        ({'members': 'all', 'reduce': 'sum', 'root': True}, np.sqrt(out + read)),
        ({'members': 'all', 'reduce': 'mean'}, (out + read) / 2),
        ({'members': 'all', 'reduce': 'max'}, np.maximum(out, read)),
        ({'members': 'all', 'reduce': 'first'}, out),
        ({'members': 'all', 'reduce': 'per_parameter'}, (out + read) / 8),
        (
            {'members': 'out', 'measure': 'magnitude', 'reduce': 'per_parameter'},
            np.abs(one).mean(0),
        ),
    ):
        found = scored(*net, normalise='none', **options)
        np.testing.assert_allclose(found['0/kernel'], expected, rtol=1e-5)


def test_scales_count_by_their_size():
    """Expectation: abs(scale), also of a negative one; layers without a norm are an error."""
    scale = np.array([-3.0, 1.0, 2.0])
    net = chain([np.ones((2, 3)), np.ones((3, 2))], **{'0_scale': scale})
    options = {'measure': 'magnitude', 'parameters': 'scale$', 'normalise': 'none'}
    np.testing.assert_allclose(scored(*net, **options)['0/kernel'], [3, 1, 2])
    plain = chain([np.ones((2, 3)), np.ones((3, 2))])
    with pytest.raises(PruneError, match=r"parameters: 'scale\$' matches no parameter"):
        scored(*plain, **options)
    deeper = chain([np.ones((2, 3)), np.ones((3, 4)), np.ones((4, 2))], **{'0_scale': scale})
    with pytest.raises(PruneError, match=r"layer '1/kernel' is among 'scale\$'; choose others"):
        scored(*deeper, **options)


OF_WEIGHTS = {
    'taylor': (lambda p: score.snip(p, train=False), {}),
    'fisher': (lambda p: score.fisher(p), {}),
    'grasp': (
        lambda p: score.importance(p, order=2, mode='signed'), {}
    ),
}  # fmt: skip


@pytest.mark.parametrize('measure', OF_WEIGHTS)
def test_data_scores_are_sums_over_weights(measure):
    """Expectation: over the outgoing slices, the sum of the same score of single weights."""
    file, _, problem, view, units, _ = case('taylor_fo_gnet')
    data = batch(file, 0, 1)
    make, _ = OF_WEIGHTS[measure]
    single = jax.jit(lambda: units.gather(make(problem)(KEY, view, data)))()
    options = {'measure': measure, 'members': 'out', 'reduce': 'sum', 'normalise': 'none'}
    for layer, scores in scored(problem, view, units, data, **options).items():
        close(scores, single[layer], 1e-5)


def test_gradient_norm_preservation_takes_the_size_of_the_sum():
    """Expectation: of `grasp` on the same slices the absolute value; it has both signs here."""
    file, _, problem, view, units, _ = case('taylor_fo_gnet')
    options = {'members': 'out', 'reduce': 'sum', 'normalise': 'none'}
    data = batch(file, 0)
    signed = scored(problem, view, units, data, measure='grasp', **options)
    sizes = scored(problem, view, units, data, measure='gradient_norm_preservation', **options)
    assert any((s < 0).any() for s in signed.values())
    for layer, scores in signed.items():
        close(sizes[layer], np.abs(scores), 1e-6)


def test_two_rounds_with_momentum_are_those_of_the_authors():
    """Expectation: the file's averages 0.9 of the first round and 0.1 of the second, and the units
    that each round removes, four at a time."""
    file, meta, problem, view, units, _ = case('taylor_fo_gnet')
    make = gate_taylor(problem, by=units)
    pruner = jp.pruner(make, groups=units, by_group=True, momentum=0.9)
    layers = ['conv1/kernel', 'conv2/kernel', 'fc1/kernel']
    total = sum(units.shapes[layer][0] for layer in layers)
    update = jax.jit(pruner.update)

    state = pruner.init(KEY, view)
    for number, data in ((1, batch(file, 0, 1)), (2, batch(file, 2))):
        left = total - number * meta['prune_per_iteration']
        state, masks, info = update(KEY, state, view, {'*': left}, data)
        weights = jp.apply_masks(view.weights, masks)
        view = view._replace(masks=masks, weights=weights)
        alive = units.alive(masks)
        for i, layer in enumerate(layers):
            gates = file[f'm22/gates_after_prune{number}/layer{i}'] != 0
            np.testing.assert_array_equal(alive[layer], gates)
            if number == 2:
                expected = file[f'm22/iter2_averaged/layer{i}']
                close(np.asarray(state.average[layer])[gates], expected[gates], 1e-4)
    assert int(sum(info.kept.values())) == total - 2 * meta['prune_per_iteration']


METHODS = ('gate_taylor', 'apoz', 'sensitivity', 'taylor_output', 'group_score', 'fpgm')


@pytest.mark.parametrize('name', METHODS)
def test_jp_prune_removes_the_lowest_units(name):
    """Expectation: half of the units of each of two hidden layers stay, those with the highest
    scores; what goes with a unit goes."""
    file, _, problem, view, units, _ = case('torchpruner_mlp')
    data = jnp.asarray(file['x']), jnp.asarray(file['labels'], jnp.int32)
    pruned = jp.prune(
        view.params, name, 0.5, model=problem, model_state={}, data=data,
        granularity='unit', allocation='uniform',
    )  # fmt: skip
    entry = jp.METHODS[name]
    options = {k: v for k, v in entry.options.items() if k != 'momentum'}
    make = entry.score(problem, False, by=units, **options)
    scores = jax.jit(make)(KEY, view, Batch(data[0][None], data[1][None]))
    alive = units.alive(pruned.masks)
    for layer, n in (('fc1/kernel', 8), ('fc2/kernel', 7)):
        kept = int(alive[layer].sum())
        assert kept in (n // 2, n // 2 + n % 2)
        best = np.argsort(-np.asarray(scores[layer]), kind='stable')[:kept]
        np.testing.assert_array_equal(np.flatnonzero(alive[layer]), np.sort(best))
    assert (pruned.masks['fc2/kernel'] == np.outer(alive['fc1/kernel'], alive['fc2/kernel'])).all()


def test_methods_of_groups_refuse_single_weights():
    """Expectation: one line that names the granularities."""
    file, _, problem, view, _, _ = case('torchpruner_mlp')
    data = jnp.asarray(file['x']), jnp.asarray(file['labels'], jnp.int32)
    with pytest.raises(PruneError, match="'apoz' prunes coupled groups: expected unit, head"):
        jp.prune(view.params, 'apoz', 0.5, model=problem, model_state={}, data=data)


SWEEP = {
    'name': 'units',
    'model': {'name': 'mlp', 'widths': [12, 8]},
    'data': {'name': 'mnist_small', 'train_examples': 128, 'test_examples': 100},
    'train': {'epochs': 1, 'batch_size': 64},
    'prune': {'samples_per_class': 1},
}
ENTRIES = [
    {'name': 'gate_taylor', 'momentum': 0.9, 'rounds': 2, 'every': 1, 'per': 'example'},
    {'name': 'shapley', 'permutations': 2, 'aggregate': 'mean_plus_2std'},
    {'name': 'leave_one_out', 'sign': 'square'},
    {'name': 'apoz', 'place': 'norm'},
    'sensitivity',
    'taylor_output',
    {'name': 'group_score', 'measure': 'taylor', 'members': 'out', 'normalise': 'lamp'},
    'fpgm',
]


def entries(names=()):
    table = [e if isinstance(e, dict) else {'name': e} for e in ENTRIES]
    return [{**e, 'granularity': 'unit'} for e in table if not names or e['name'] in names]


@pytest.mark.more
def test_a_sweep_of_scores_of_groups(tmp_path):
    """Expectation: half of 20 units kept by each method, as the compact network's parameters say;
    rounds along training carry the average, and two rounds end at the same count."""
    names = ('gate_taylor', 'shapley', 'group_score')
    table = {**SWEEP, 'grid': {'method': entries(names), 'compression': [2], 'seed': [0, 1]}}
    frame = jp.run_sweep(table, out=tmp_path / 'runs')
    last = frame.filter(pl.col('epoch') == 1)
    assert last['error'].null_count() == last.height == 6
    layers = read_layers(tmp_path / 'runs')
    for run in last.iter_rows(named=True):
        kept = dict(
            layers.filter(pl.col('run_id') == run['run_id']).select('path', 'kept').iter_rows()
        )
        first = kept['dense_0/kernel'] // 784
        second = kept['dense_2/kernel'] // 10
        assert first + second == 10
        assert run['params_compact'] == 785 * first + (first + 1) * second + 10 * (second + 1)


def test_plans_of_every_score_of_groups():
    """Expectation: a plan of each; a wrong option is one line with the nearest word."""
    grid = {'method': entries(), 'compression': [2], 'seed': [0]}
    make_plan(make_spec({**SWEEP, 'grid': grid}))
    for wrong, says in (
        ({'place': 'actvation'}, "'activation'"),
        ({'permutations': 0}, 'at least 1'),
        ({'granularity': 'weight'}, "'shapley' prunes coupled groups"),
        ({'estimator': 'truncated'}, "'truncated' is unknown"),
    ):
        entry = {'name': 'shapley', 'granularity': 'unit', **wrong}
        grid = {'method': [entry], 'compression': [2], 'seed': [0]}
        with pytest.raises(SpecError) as caught:
            make_plan(make_spec({**SWEEP, 'grid': grid}))
        assert says in str(caught.value) and '\n' not in str(caught.value), caught.value
