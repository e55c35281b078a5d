"""Compact networks as specifications: their shapes as widths of layers, their parameters as a file.

What is expected is the compact network itself, cut out of the traced function by `jp.compact`.
"""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from changed_table import changed

import jaxprune as jp
from jaxprune import PruneError, data, nn, tree
from jaxprune.errors import JaxpruneError, SpecError, StoreError
from jaxprune.sweep import make_plan, make_spec, store
from jaxprune.sweep.grid import runs
from jaxprune.sweep.load import resolved
from jaxprune.sweep.program import hyper_of, make_program, network

BASE = {
    'name': 'tiny',
    'model': {'name': 'mlp', 'widths': [32, 16]},
    'data': {'name': 'mnist_small', 'train_examples': 300, 'test_examples': 100},
    'train': {'optimizer': 'sgd', 'momentum': 0.9, 'epochs': 1, 'batch_size': 100},
    'grid': {'method': ['magnitude'], 'compression': [1], 'seed': [0, 1]},
    'record': {'every': 2, 'evaluate': True},
}
#: Options of small networks; the others are an eighth as wide.
SMALL = {
    'mlp': {'widths': [8, 6]},
    'small_vgg': {'widths': [4]},
    'vit': {'patch': 14, 'dim': 8, 'depth': 1, 'heads': 2},
    'transformer': {'dim': 8, 'depth': 2, 'heads': 4},
    'lenet300100': {},
    'lenet5': {},
}
QUICK = ('mlp', 'small_vgg')


def table_of(name, **options):
    """A specification of a model; of images of 32x32 where 28x28 are too small."""
    usual = SMALL.get(name, {'width': 0.125})
    large = nn.model(name).min_side > 28
    names = {'data': {'name': 'cifar10'}} if large else {}
    return {**BASE, **names, 'model': {'name': name, **usual, **options}}


@functools.cache
def before(name, dtype=np.float32):
    """A table, its network in evaluation mode, drawn parameters and state, and inputs."""
    table = table_of(name)
    spec = make_spec(table)
    shape = data.facts(spec.data.name).shape
    problem = jp.problem_from_flax(computing_in(dtype, network(spec)), shape)
    rng = np.random.default_rng(0)
    params, state = jax.eval_shape(problem.init, jax.random.key(0))
    params = jax.tree.map(lambda a: rng.normal(size=a.shape) * 0.3, params)
    state = jax.tree.map(lambda a: rng.uniform(0.5, 1.5, size=a.shape), state)
    x = rng.normal(size=(3, *shape))

    def apply(params, state, x):
        return problem.apply(params, state, x, train=False, key=None)[0]

    return table, apply, *as_floats((params, state, x), dtype)


@functools.cache
def families(name, normalisation):
    _, apply, params, state, x = before(name)
    return jp.groups(apply, params, x, state, normalisation=normalisation).families


def computing_in(dtype, module):
    return module.clone(dtype=dtype) if hasattr(module, 'dtype') else module


def as_floats(arrays, dtype):
    return jax.tree.map(lambda a: np.asarray(a, dtype), arrays)


def cut(name, dtype, kinds=('unit', 'head'), normalisation='refuse'):
    """The table, the compact network and inputs; half of the groups of each family are removed."""
    table, apply, params, state, x = before(name, dtype)
    rng = np.random.default_rng(1)
    masks = {path: np.ones(leaf.shape, bool) for path, leaf in tree.paths(params)}
    for family in families(name, normalisation):
        count = 0 if family.reason or family.kind not in kinds else family.size // 2
        for n in rng.choice(family.size, count, replace=False):
            for m in family.members:
                if m.path in masks and m.role != 'in':
                    np.moveaxis(masks[m.path], m.axis, 0)[m.indices[n]] = False
    options = {'model_state': state, 'normalisation': normalisation}
    return table, jp.compact(apply, params, masks, x, **options), x


def agrees(name, dtype, tolerance, normalisation='refuse'):
    """Builds the model of a compact network and compares its outputs with the same parameters."""
    with jax.enable_x64(dtype == np.float64):
        table, small, x = cut(name, dtype, normalisation=normalisation)
        assert small.removed
        spec = make_spec(jp.compact_spec(table, small))
        module = computing_in(dtype, network(spec))
        shapes = jax.eval_shape(module.init, jax.random.key(0), x[:1])['params']
        assert jp.shapes(dict(tree.paths(shapes))) == jp.shapes(dict(tree.paths(small.params)))

        @jax.jit
        def both(params, state, x):
            ours = module.apply({'params': params, **state}, x, train=False)
            return ours, small.apply(params, state, x)

        ours, theirs = jax.device_get(both(small.params, small.model_state, x))
        # Some models give float32 logits whatever they compute with: equal up to the last bit.
        tolerance = max(tolerance, 1.2e-7) if ours.dtype == np.float32 else tolerance
        assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def slow(names):
    marks = dict.fromkeys(QUICK, ()) | {'vit': pytest.mark.more}
    return [pytest.param(n, marks=marks.get(n, pytest.mark.slow)) for n in names]


@pytest.mark.parametrize('name', slow(nn.MODELS))
def test_models(name):
    """Random groups of every model: heads, and numbers of the tokens of transformers."""
    agrees(name, np.float64, 1e-10)
    has_heads = 'heads' in nn.model(name).options
    agrees(name, np.float32, 1e-5, 'sliced' if has_heads else 'refuse')


def test_widths_of_residual_and_depthwise_layers():
    """Expectation: by hand; default widths stay where no layer is named."""
    stream = ('stem_conv', 'stage0_block0_b_conv', 'stage0_block1_b_conv', 'stage0_block2_b_conv')
    widths = {**dict.fromkeys(stream, 3), 'stage1_block0_a_conv': 5}
    made = shapes_of('resnet20', widths, width=0.125)
    assert made['stage1_block0_a_conv/kernel'] == (3, 3, 3, 5)
    assert made['stage1_block0_skip_conv/kernel'] == (1, 1, 3, 4)
    assert made['stage1_block0_b_conv/kernel'] == (3, 3, 5, 4)
    # As many maps before a block as in it: it still has its projection.
    stream = [f'stage1_block{i}_b_conv' for i in range(3)] + ['stage1_block0_skip_conv']
    made = shapes_of('resnet20', dict.fromkeys(stream, 2), width=0.125)
    assert made['stage1_block0_skip_conv/kernel'] == (1, 1, 2, 2)
    made = shapes_of('mobilenet', {'block0_point_conv': 5}, width=0.125)
    assert made['block1_depth_conv/kernel'] == (3, 3, 1, 5)
    made = shapes_of('vit', {'encoder/attention_0': 3, 'embed': 10}, **SMALL['vit'])
    assert made['encoder/attention_0/query/kernel'] == (10, 3, 4)
    assert made['encoder/attention_0/out/kernel'] == (3, 4, 10)
    assert made['encoder/down_0/kernel'] == (16, 10)


def shapes_of(name, widths, **options):
    module = nn.build(name, 10, layer_widths=widths, **options)
    made = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    return {path: leaf.shape for path, leaf in tree.paths(made['params'])}


BAD = [
    ('mlp', {}, {'dens_0': 3}, "no layer 'dens_0' with a width of its own, did you mean 'dense_0'"),
    ('mlp', {}, {'dense_2': 3}, "no layer 'dense_2'"),  # classes are not for choice
    ('mlp', {}, {'dense_0': 0}, 'model.layer_widths.dense_0 must be at least 1, not 0'),
    ('mlp', {}, {'dense_0': 1.5}, 'must be a whole number'),
    ('mlp', {}, [3], 'expected a table of layers'),
    ('resnet20', {}, {'stem_conv': 5}, "'stem_conv' has 5 units and 'stage0_block0_b_conv' 16"),
    (
        'resnet20',
        {},
        {'stage1_block0_b_conv': 5},
        "'stage1_block0_skip_conv' has 32 units and 'stage1_block0_b_conv' 5",
    ),
    ('resnet20', {'shortcut': 'pad'}, {'stage1_block0_b_conv': 5}, 'fewer than the 16'),
    ('mobilenet', {}, {'block0_depth_conv': 5}, "'block0_depth_conv' has 5 units and 'stem_conv'"),
    ('vit', {}, {'encoder/down_1': 5}, "'encoder/down_1' has 5 units and 'embed' 96"),
    ('vit', {}, {'encoder/atention_1': 5}, "did you mean 'encoder/attention_1'"),
]


@pytest.mark.parametrize(('name', 'options', 'widths', 'says'), BAD, ids=[b[3] for b in BAD])
def test_widths_that_cannot_be(name, options, widths, says):
    """Expectation: one line with both layers, or the nearest name."""
    with pytest.raises(JaxpruneError) as caught:
        shapes_of(name, widths, **options)
    assert says in str(caught.value) and '\n' not in str(caught.value)
    assert str(caught.value).startswith('model.layer_widths')


# --- specifications -----------------------------------------------------------------------------


def test_what_widths_cannot_express():
    """Expectation: by hand: heads of unequal size, another network, zeros between maps."""
    table, small, _ = cut('vit', np.float32, ('head_dim',))
    with pytest.raises(PruneError, match='heads keep all dimensions'):
        jp.compact_spec(table, small)
    with pytest.raises(PruneError, match='parameters of the compact network lack'):
        jp.compact_spec(BASE, small)
    with pytest.raises(PruneError, match='takes what'):
        jp.compact_spec(BASE, small.params)
    table = table_of('resnet20', shortcut='pad')
    shapes = shapes_of('resnet20', {}, width=0.125, shortcut='pad')
    whole = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    kept = {'stage1_block0_b_conv/kernel': {3: np.arange(3)}}
    padded = small._replace(params=whole, kept=kept)
    with pytest.raises(PruneError, match='do not say which of them are padded'):
        jp.compact_spec(table, padded)
    other = small._replace(params=jax.eval_shape(lambda: {'dense_0': {'kernel': jnp.ones(3)}}))
    with pytest.raises(PruneError, match='lack'):
        jp.compact_spec(BASE, other)


def test_a_compact_specification_leaves_the_rest_as_it_was(mlp):
    """Expectation: another [model], whatever the specification came as."""
    small, file = mlp
    table = jp.compact_spec({**BASE, 'model': {**BASE['model'], 'params': str(file)}}, small)
    assert table == changed(BASE, model__layer_widths={'dense_0': 16, 'dense_1': 8})
    assert make_spec(jp.compact_spec(make_spec(BASE), small)) == make_spec(table)
    # A network made compact twice has all its widths, not those of the second time only.
    assert jp.compact_spec(table, small) == table


def test_specifications_without_the_keys_are_what_they_were():
    """Expectation: the keys that [model] had before, so that run ids stay."""
    assert set(resolved(make_spec(BASE))['model']) == {'name', 'widths', 'activation', 'init'}
    empty = make_spec(changed(BASE, model__layer_widths={}, model__params=''))
    assert empty == make_spec(BASE)
    assert ids(changed(BASE, model__layer_widths={'dense_0': 16})).isdisjoint(ids(BASE))


def ids(table):
    return {run.run_id for run in runs(make_spec(table))}


# --- parameters from a file ---------------------------------------------------------------------


def logits(params, x):
    module = nn.build('mlp', 10, widths=[32, 16])
    return module.apply({'params': params}, x)


@pytest.fixture(scope='module')
def mlp(tmp_path_factory):
    """A trained mlp without half of its units, and its file."""
    spec = make_spec(BASE)
    facts, digits = data.facts('mnist_small'), data.load('mnist_small')
    x = (digits.train.images[:5000] / np.float32(255) - facts.mean) / facts.std
    y = digits.train.labels[:5000].astype(np.int32)
    net = jp.problem_from_flax(network(spec), facts.shape)
    optimizer = optax.adam(0.01)

    def trained(key):
        def step(carry, at):
            params, state = carry
            grads = jax.grad(lambda p: jp.cross_entropy(logits(p, x[at]), y[at]).mean())(params)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        params = net.init(key)[0]
        batches = jnp.arange(5000).reshape(50, 100)
        return jax.lax.scan(step, (params, optimizer.init(params)), batches)[0][0]

    x, y = jnp.asarray(x), jnp.asarray(y)
    params = jax.jit(trained)(jax.random.key(0))
    pruned = jp.prune(
        params, 'magnitude', density=0.5, model=logits, data=x[:1], granularity='unit',
        allocation='uniform',
    )  # fmt: skip
    small = jp.compact(logits, pruned.params, pruned.masks, x[:1])
    file = tmp_path_factory.mktemp('compact') / 'small.safetensors'
    jp.save_compact(file, small, x[:1])
    return small, file


def test_from_the_compact_network_and_from_scratch(mlp, tmp_path):
    """Expectation: at step 0 the accuracy of the compact network itself, whatever the seed."""
    small, file = mlp
    shutil.copy(file, tmp_path)
    scratch = jp.compact_spec(BASE, small)
    tuned = changed(scratch, model__params=str(tmp_path / file.name))
    jp.run_sweep(tuned, tmp_path / 'tuned')
    jp.run_sweep(scratch, tmp_path / 'scratch')
    facts, digits = data.facts('mnist_small'), data.load('mnist_small')
    x = (digits.test.images[:100] / np.float32(255) - facts.mean) / facts.std
    right = np.asarray(small.apply(small.params, x)).argmax(1) == digits.test.labels[:100]
    at = {name: store.read_curves(tmp_path / name) for name in ('tuned', 'scratch')}
    first = {name: frame.filter(step=0)['test_accuracy'].to_list() for name, frame in at.items()}
    np.testing.assert_allclose(first['tuned'], [right.mean()] * 2, rtol=1e-6)
    assert len(set(first['scratch'])) == 2 and max(first['scratch']) < right.mean()
    # From there on runs differ by the order of the data.
    assert at['tuned'].filter(step=3)['train_loss'].n_unique() == 2
    assert set(store.read_layers(tmp_path / 'tuned')['size']) == {784 * 16, 16 * 8, 8 * 10}

    # The same command goes on, wherever the file lies now; with another content it is refused.
    moved = shutil.move(tmp_path / file.name, tmp_path / 'moved.safetensors')
    jp.run_sweep(changed(tuned, model__params=str(moved)), tmp_path / 'tuned')
    changed_file(moved, moved)
    with pytest.raises(StoreError, match='holds another sweep'):
        jp.run_sweep(changed(tuned, model__params=str(moved)), tmp_path / 'tuned')


def changed_file(file, to, change=lambda params: jax.tree.map(lambda a: a + 1, params)):
    """A file with other parameters."""
    small = jp.load_compact(file)
    params = change(small.params)
    apply = lambda params, x: x  # noqa: E731
    jp.save_compact(to, small._replace(params=params, apply=apply), jnp.zeros((1, 784)))


def test_runs_start_from_the_file(mlp):
    """Expectation: the arrays in the file, for any key; also where a method asks for the first
    weights."""
    small, file = mlp
    spec = make_spec(changed(jp.compact_spec(BASE, small), model__params=str(file)))
    run = runs(spec)[0]
    program = make_program(spec, run)
    wanted = safetensors.numpy.load_file(file)
    for seed in range(2):
        state = program.init(jax.random.key(seed), hyper_of(run))
        for params in (state.params, program.problem.init(jax.random.key(seed))[0]):
            for path, leaf in tree.paths(params):
                np.testing.assert_array_equal(leaf, wanted[f'params/{path}'])
    assert program.shapes['dense_0/kernel'] == (784, 16)


def test_the_content_of_the_file_identifies_runs(mlp, tmp_path):
    """Expectation: a copy makes the same runs, other parameters make others."""
    small, file = mlp
    table = jp.compact_spec(BASE, small)
    copy, other = tmp_path / 'copy.safetensors', tmp_path / 'other.safetensors'
    shutil.copy(file, copy)
    changed_file(file, other)
    first, same, third = (changed(table, model__params=str(f)) for f in (file, copy, other))
    assert ids(first) == ids(same)
    assert ids(first).isdisjoint(ids(third) | ids(table))
    plans = [make_plan(make_spec(t)) for t in (first, same, third)]
    assert plans[0] == plans[1]
    assert plans[0]['spec'] != plans[2]['spec']
    spec = make_spec(same)
    assert make_spec(resolved(spec)) == spec
    changed_file(file, copy)
    with pytest.raises(SpecError, match=r'^spec: model\.params: .* it was changed'):
        make_plan(spec)


def test_paths_begin_at_the_specification(mlp, tmp_path):
    """Expectation: a file beside the TOML file."""
    small, file = mlp
    spec = make_spec(jp.compact_spec(BASE, small))
    (tmp_path / 'inner').mkdir()
    shutil.copy(file, tmp_path / 'inner' / 'small.safetensors')
    toml = jp.sweep.to_toml(spec).replace('[model]', '[model]\nparams = "small.safetensors"')
    (tmp_path / 'inner' / 'my.toml').write_text(toml)
    found = jp.load_spec(tmp_path / 'inner' / 'my.toml')
    assert found.model.params == str(tmp_path / 'inner' / 'small.safetensors')
    with pytest.raises(SpecError, match=r'^spec: model\.params: .*/small.safetensors: no such'):
        make_spec(changed(BASE, model__params='small.safetensors'))


def test_files_that_do_not_fit(mlp, tmp_path):
    """Expectation: one line with the key, the first path and both shapes."""
    small, file = mlp
    table = changed(jp.compact_spec(BASE, small), model__params=str(file))
    broken, more = tmp_path / 'broken', tmp_path / 'more.safetensors'
    broken.write_bytes(b'nothing')
    changed_file(file, more, lambda params: {**params, 'more': jnp.zeros(2)})
    lost = tmp_path / 'lost.safetensors'
    changed_file(file, lost, lambda params: jax.tree.map(lambda leaf: leaf * jnp.nan, params))
    for changes, says in (
        (
            {'model__layer_widths': {}},
            "'params/dense_0/bias' has shape (16,) in the file and (32,) in the model",
        ),
        ({'model__widths': [32, 16, 5]}, "'params/dense_2/bias' has shape (10,)"),
        ({'model': {'name': 'small_vgg'}}, "'params/bn_0/bias' is not in"),
        ({'model__params': str(more)}, "the model has no 'params/more'"),
        ({'model__params': str(lost)}, "'params/dense_0/bias' holds numbers that are not finite"),
        ({'model__params': str(broken)}, 'broken, or no safetensors file'),
        ({'model__params': str(tmp_path)}, 'cannot be read'),
        ({'model__params': 'no\nwhere'}, 'no such file'),
    ):
        other = changed(table, **changes)
        other['model'].setdefault('params', str(file))
        with pytest.raises(SpecError) as caught:
            make_plan(make_spec(other, 'my.toml'), 'my.toml')
        assert str(caught.value).startswith('my.toml: model.params: '), str(caught.value)
        assert says in str(caught.value) and '\n' not in str(caught.value)
    with pytest.raises(SpecError, match='goes with'):
        make_spec(changed(BASE, model__params_sha256='0'))


def test_statistics_are_in_the_file_too(tmp_path):
    """Expectation: the state of the compact network."""
    table, small, x = cut('small_vgg', np.float32)
    jp.save_compact(tmp_path / 'small.safetensors', small, x[:1])
    table = jp.compact_spec(table, small)
    table['model']['params'] = str(tmp_path / 'small.safetensors')
    spec = make_spec(table)
    program = make_program(spec, runs(spec)[0])
    state = program.init(jax.random.key(0), program.hyper).model_state
    assert jax.tree.structure(state) == jax.tree.structure(small.model_state)
    jax.tree.map(np.testing.assert_array_equal, state, small.model_state)
