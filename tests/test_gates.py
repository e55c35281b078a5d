"""Gates on units of any traced network, and the scores that are made of them.

`golden/structured/taylor_fo_*` has the criteria of the Taylor authors' code, `torchpruner_*` those
that the authors of the Shapley ranking compare with; `golden/structured/README.md` describes both.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import more, more_but
from structured_nets import load

import jaxprune as jp
from jaxprune import PruneError, nn, structure, tree
from jaxprune.score import (
    activation_score,
    gate_taylor,
    shapley,
    unit_leave_one_out,
    unit_shapley,
)
from jaxprune.score.coalitions import evaluated
from jaxprune.score.unit_loss import unit_game
from jaxprune.types import Batch, Problem


@functools.cache
def case(name):
    """File, metadata, problem, view, what competes."""
    file, meta, forward, params, stats = load(name)

    def apply(params, stats, x, *, train, key):
        return forward(params, stats, x), stats

    problem = Problem(None, apply, jp.cross_entropy, jp.kernels)
    shape = file['x'].shape[-3:] if 'mlp' not in name else file['x'].shape[-1:]
    x = jax.ShapeDtypeStruct((1, *shape), 'float32')
    read = structure.groups(problem, params, x, stats)
    shapes = {path: leaf.shape for path, leaf in tree.pick(params, jp.kernels).items()}
    units = jp.competing('unit', shapes, lambda: read)
    return file, meta, problem, jp.view(problem, params, stats), units, read


def batch(file, *numbers):
    """Some of the three batches, leaves `(batches, batch, ...)`."""
    x, y = file['x'][list(numbers)], file['labels'][list(numbers)]
    return Batch(jnp.asarray(x), jnp.asarray(y, jnp.int32))


KEY = jax.random.key(0)
#: Layers with gates, in the order of the files; of a residual sum the gate of each layer.
GATED = {
    'taylor_fo_gnet': ['conv1/kernel', 'conv2/kernel', 'fc1/kernel'],
    'taylor_fo_gres': [('stem/kernel', 0), 'conv1/kernel', ('stem/kernel', 1)],
}


def gate_slopes(name):
    """`(batch number, per example) -> slopes` of the gates in the order of the files."""
    file, _, problem, view, units, _ = case(name)
    gated = units.gates('norm')
    ones = {n: [jnp.ones(k)] * gated.counts[n] for n, k in gated.sizes.items()}

    def losses(gates, x, y):
        return problem.loss(gated.apply(gates, view.params, x, view.model_state), y)

    @jax.jit
    def slopes(x, y):
        mean = jax.grad(lambda g: losses(g, x, y).mean())(ones)
        single = jax.vmap(jax.grad(lambda g, x, y: losses(g, x[None], y[None])[0]), (None, 0, 0))
        return mean, single(ones, x, y)

    def ordered(found):
        at = (n if isinstance(n, tuple) else (n, 0) for n in GATED[name])
        return [found[layer][i] for layer, i in at]

    def call(number):
        mean, single = slopes(file['x'][number], file['labels'][number].astype(np.int32))
        return ordered(mean), ordered(single)

    return call


@pytest.mark.parametrize('name', GATED)
def test_slopes_of_gates_are_those_of_the_authors(name):
    """Expectation: the file's slopes of each example, and method 22, the squared slope of the
    batch's mean loss; method 23, the sum over examples of squared slopes over the batch's size."""
    file = case(name)[0]
    slopes = gate_slopes(name)
    for number in (0, 1):
        mean, single = slopes(number)
        for i, (g, each) in enumerate(zip(mean, single, strict=True)):
            expected = file[f'per_example_gate_grad/batch{number}/layer{i}']
            close(each, expected, 1e-5)
            close(g**2, file[f'm22/batch{number}/layer{i}'], 1e-4)
            close(((each / len(each)) ** 2).sum(0), file[f'm23/batch{number}/layer{i}'], 1e-4)


def close(found, expected, tolerance):
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize(('options', 'method', 'factor', 'tolerance'), [
    ({}, 22, 1, 1e-4),
    ({'per': 'example'}, 23, 8, 1e-4),
    ({'order': 2}, 11, 1, 1e-3),
    ({'order': 2, 'at_once': 4}, 11, 1, 1e-3),
])  # fmt: skip
def test_taylor_on_gates_is_that_of_the_authors(options, method, factor, tolerance):
    """Expectation: the file's mean over two batches; method 23 has a sum over 8 examples / 64."""
    file, _, problem, view, units, _ = case('taylor_fo_gnet')
    score = gate_taylor(problem, by=units, **options)
    found = jax.jit(score)(KEY, view, batch(file, 0, 1))
    for i, layer in enumerate(GATED['taylor_fo_gnet']):
        close(found[layer] / factor, file[f'm{method}/averaged/layer{i}'], tolerance)


def test_a_shared_gate():
    """Expectation: its slope is the sum of the slopes of separate gates; 'mean' halves the score of
    a residual sum of two layers and leaves the others."""
    file, _, problem, view, units, _ = case('taylor_fo_gres')
    mean, _ = gate_slopes('taylor_fo_gres')(0)
    data = batch(file, 0)
    found = jax.jit(gate_taylor(problem, by=units))(KEY, view, data)
    close(found['stem/kernel'], (mean[0] + mean[2]) ** 2, 1e-4)
    halved = jax.jit(gate_taylor(problem, by=units, shared='mean'))(KEY, view, data)
    close(halved['stem/kernel'], found['stem/kernel'] / 2, 1e-6)
    close(halved['conv1/kernel'], found['conv1/kernel'], 1e-6)


def test_output_taylor_is_that_of_the_authors():
    """Expectation: method 6 of the file, `|z dL/dz|` at the gate of the batch's mean loss, averaged
    and normalised per layer: of one batch, whose size drops out."""
    file, _, problem, view, units, _ = case('taylor_fo_gnet')
    score = activation_score(problem, by=units, measure='taylor_output', place='norm')
    found = jax.jit(score)(KEY, view, batch(file, 0))
    for i, layer in enumerate(GATED['taylor_fo_gnet'][:2]):
        close(found[layer], file[f'm6/batch0/layer{i}'], 1e-4)


COMPARED = {
    'taylor_abs': lambda p, u, at: gate_taylor(
        p, by=u, sign='absolute', per='example', place=at
    ),
    'taylor_signed': lambda p, u, at: gate_taylor(p, by=u, sign='signed', per='example', place=at),
    'sensitivity': lambda p, u, at: activation_score(p, by=u, measure='sensitivity', place=at),
    'apoz': lambda p, u, at: activation_score(p, by=u, measure='apoz', place=at),
}  # fmt: skip


@pytest.mark.parametrize('name', ['torchpruner_mlp', 'torchpruner_conv'])
@pytest.mark.parametrize(('where', 'place'), [('self', 'output'), ('best', 'activation')])
def test_scores_of_activations_are_those_of_the_authors(name, where, place):
    """Expectation: the file's values of each example; theirs are of a batch's mean loss, so they
    carry one over its size, and APoZ counts positions where we give their share."""
    file, meta, problem, view, units, _ = case(name)
    if f'apoz/{meta["layers"][0]}/self/none' not in file:
        pytest.skip('the slim copy beside the tests holds Shapley values only')
    x, y = jnp.asarray(file['x']), jnp.asarray(file['labels'], jnp.int32)
    size = meta['batch_size']
    batches = [size] * (len(y) // size) + [len(y) % size] * (len(y) % size > 0)
    share = np.repeat(batches, batches)
    positions = {'conv1/kernel': 144, 'conv2/kernel': 25}
    for measure, make in COMPARED.items():
        score = make(problem, units, place)
        single = jax.jit(jax.vmap(lambda x, y, s=score: s(KEY, view, Batch(x, y))))
        found = single(x[:, None, None], y[:, None, None])
        for layer in meta['layers']:
            ours = found[f'{layer}/kernel']
            if measure == 'apoz':
                ours = ours * positions.get(f'{layer}/kernel', 1)
            else:
                ours = ours / share[:, None]
            close(ours, file[f'{measure}/{layer}/{where}/none'], 1e-4)


def test_an_average_counts_every_example_once():
    """Expectation: of batches of 8 and 4 the mean over 12 examples."""
    file, _, problem, view, units, _ = case('taylor_fo_gnet')
    x, y = jnp.asarray(file['x'][0]), jnp.asarray(file['labels'][0], jnp.int32)
    score = activation_score(problem, by=units)
    parts = [Batch(x, y), Batch(x[:4], y[:4])]
    found = jax.jit(score)(KEY, view, parts)
    whole = Batch(jnp.concatenate([x, x[:4]])[None], jnp.concatenate([y, y[:4]])[None])
    for layer, expected in jax.jit(score)(KEY, view, whole).items():
        close(found[layer], expected, 1e-6)


# --- gates of any network -----------------------------------------------------------------------


def quadratic(dtype='float64'):
    """A linear network of two layers with a squared loss, whose loss is quadratic in every gate."""
    rng = np.random.default_rng(0)
    params = {'a': {'kernel': rng.normal(size=(4, 5))}, 'b': {'kernel': rng.normal(size=(5, 3))}}

    def apply(params, state, x, *, train, key):
        return x @ params['a']['kernel'] @ params['b']['kernel'], state

    def loss(logits, labels):
        return ((logits - jax.nn.one_hot(labels, 3)) ** 2).sum(-1)

    problem = Problem(None, apply, loss, jp.kernels)
    params = jax.tree.map(lambda a: jnp.asarray(a, dtype), params)
    x = jnp.asarray(rng.normal(size=(1, 6, 4)), dtype)
    data = Batch(x, jnp.asarray(rng.integers(0, 3, (1, 6)), jnp.int32))
    read = structure.groups(problem, params, x[0, :1], {})
    shapes = {'a/kernel': (4, 5), 'b/kernel': (5, 3)}
    return problem, jp.view(problem, params, {}), data, jp.competing('unit', shapes, lambda: read)


def test_second_order_is_exact_for_a_quadratic_loss():
    """Expectation: the change of the loss without each unit, computed without it, in float64; the
    first order differs."""
    with jax.enable_x64(True):
        problem, view, data, units = quadratic()
        second = gate_taylor(problem, by=units, order=2, sign='signed', place='output')
        found = jax.jit(second)(KEY, view, data)['a/kernel']
        first = gate_taylor(problem, by=units, sign='signed', place='output')

        def loss(kernel):
            params = {'a': {'kernel': kernel}, 'b': view.params['b']}
            params = tree.put(params, {'b/kernel': view.weights['b/kernel']})
            logits, _ = problem.apply(params, {}, data.x[0], train=False, key=None)
            return problem.loss(logits, data.y[0]).mean()

        kernel = view.weights['a/kernel']
        change = [loss(kernel.at[:, i].set(0)) - loss(kernel) for i in range(5)]
        np.testing.assert_allclose(found, change, rtol=1e-10)
        assert np.abs(jax.jit(first)(KEY, view, data)['a/kernel'] - np.array(change)).max() > 0.1


def test_the_slope_of_a_gate_is_the_sum_of_w_g():
    """Expectation: the identity of the paper, for each filter with its bias, in float64."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        params = {
            'c': {'kernel': rng.normal(size=(3, 3, 2, 4)), 'bias': rng.normal(size=4)},
            'd': {'kernel': rng.normal(size=(4, 3))},
        }

        def apply(params, state, x, *, train, key):
            y = jax.lax.conv_general_dilated(
                x, params['c']['kernel'], (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
            )
            y = jax.nn.relu(y + params['c']['bias'])
            return y.mean((1, 2)) @ params['d']['kernel'], state

        problem = Problem(None, apply, jp.cross_entropy, jp.kernels)
        x, y = rng.normal(size=(1, 5, 6, 6, 2)), rng.integers(0, 3, (1, 5))
        params = jax.tree.map(jnp.asarray, params)
        read = structure.groups(problem, params, x[0, :1], {})
        shapes = {'c/kernel': (3, 3, 2, 4), 'd/kernel': (4, 3)}
        units = jp.competing('unit', shapes, lambda: read)
        data = Batch(jnp.asarray(x), jnp.asarray(y, jnp.int32))
        score = gate_taylor(problem, by=units, sign='signed', place='output')
        found = jax.jit(score)(KEY, jp.view(problem, params, {}), data)['c/kernel']

        def loss(params):
            logits, _ = problem.apply(params, {}, data.x[0], train=False, key=None)
            return problem.loss(logits, data.y[0]).mean()

        g = jax.jit(jax.grad(loss))(params)['c']
        kernel = np.einsum('abio,abio->o', params['c']['kernel'], g['kernel'])
        expected = -(kernel + params['c']['bias'] * g['bias'])
    np.testing.assert_allclose(found, expected, rtol=1e-10)


NETS = {
    'resnet20': ({'name': 'resnet20', 'width': 0.25}, 'unit'),
    'lenet5': ({'name': 'lenet5'}, 'unit'),
}


@pytest.mark.parametrize(
    ('name', 'place'),
    more_but(
        [*itertools.product(['lenet5'], structure.PLACES), ('resnet20', 'output')],
        itertools.product(NETS, structure.PLACES),
    ),
)
def test_gates_of_zero_remove_units(name, place):
    """Expectation: gates of one leave the outputs, gates of zero give those of the compact network
    without the units, and the tail of the network gives the same."""
    problem, params, state, x, units = zoo(name)
    gated = units.gates(place)
    rng = np.random.default_rng(0)
    kept = {n: rng.random(k) > 0.3 for n, k in gated.sizes.items()}
    gates = {n: jnp.asarray(k, jnp.float32) for n, k in kept.items()}
    small = jp.compact(problem, params, jax.jit(units.spread)(kept), x, model_state=state)

    @jax.jit
    def outputs(gates):
        ones = jax.tree.map(jnp.ones_like, gates)
        whole = gated.apply(ones, params, x, state), gated.apply(gates, params, x, state)
        return *whole, gated.tail(list(gates), params, x, state)(gates)

    whole, found, tail = outputs(gates)
    dense, _ = jax.jit(functools.partial(problem.apply, train=False, key=None))(params, state, x)
    close(whole, dense, 1e-5)
    close(found, jax.jit(small.apply)(small.params, small.model_state, x), 1e-5)
    close(tail, found, 1e-6)


@functools.cache
def zoo(name):
    options, kind = NETS[name]
    shape = (28, 28, 1) if name == 'lenet5' else (16, 16, 3)
    problem = jp.problem_from_flax(nn.build(classes=10, **options), shape)
    params, state = jax.jit(problem.init)(jax.random.key(1))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, *shape)), jnp.float32)
    shapes = {path: leaf.shape for path, leaf in tree.pick(params, problem.prunable).items()}
    read = structure.groups_of(problem, shape)
    return problem, params, state, x, jp.competing(kind, shapes, lambda: read)


def test_the_tail_computes_what_comes_after_the_gates_only():
    """Expectation: of the last layer's gates the program holds one product, of the first layer's
    all three."""
    file, _, _, view, units, _ = case('torchpruner_mlp')
    gated = units.gates('activation')
    x = jnp.asarray(file['x'])
    for layer, products in (('fc1/kernel', 2), ('fc2/kernel', 1)):
        tail = gated.tail([layer], view.params, x, view.model_state)
        text = str(jax.make_jaxpr(tail)({layer: jnp.ones(gated.sizes[layer])}))
        assert text.count('dot_general') == products


def test_places_after_a_written_out_activation():
    """Expectation: `h * sigmoid(h)` is one activation; the place before it is that of the norm, and
    the gate sits behind it, where a gate g gives g times the unit."""
    params = {'a': jnp.ones((2, 3)), 'b': jnp.ones((3, 1)), 's': jnp.full(3, 2.0)}

    def apply(params, x):
        h = (x @ params['a']) * params['s'] + 1.0
        return (h * jax.nn.sigmoid(h)) @ params['b']

    x = jnp.ones((4, 2))
    read = jp.groups(apply, params, x)
    half = {'a': jnp.asarray([0.5, 1.0, 1.0])}
    h = 5.0
    silu = h / (1 + np.exp(-h))
    expected = {
        'output': 2 * silu + 3 / (1 + np.exp(-3)), 'norm': 2 * silu + 2.5 / (1 + np.exp(-2.5)),
        'activation': 2.5 * silu, 'read': 2.5 * silu,
    }  # fmt: skip
    for place, value in expected.items():
        found = jax.jit(structure.gates(read, place).apply)(half, params, x)
        np.testing.assert_allclose(found, value, rtol=1e-6)


def test_a_unit_inside_of_a_loop():
    """Expectation: stacked layers share a gate in every step; their activations are refused."""
    params = {'in': jnp.ones((2, 3)), 'w': jnp.ones((4, 3, 5)), 'v': jnp.ones((4, 5, 3)) / 9}

    def apply(params, x):
        def layer(h, p):
            return h + jax.nn.relu(h @ p[0]) @ p[1], None

        return jax.lax.scan(layer, x @ params['in'], (params['w'], params['v']))[0].sum(1)

    x = jnp.ones((2, 2))
    read = jp.groups(apply, params, x)
    gated = structure.gates(read, 'activation', ['w'])
    cut = {**params, 'w': params['w'].at[:, :, 0].set(0)}
    found = jax.jit(gated.apply)({'w': jnp.asarray([0.0, 1, 1, 1, 1])}, params, x)
    np.testing.assert_allclose(found, jax.jit(apply)(cut, x), rtol=1e-6)
    with pytest.raises(PruneError, match=r"'w' is made inside a loop"):
        gated.activations(params, x)


def drawn(**shapes):
    rng = np.random.default_rng(3)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


LATER = {
    'a bias behind a sum': lambda p, x: jax.nn.relu(x @ p['a'] + x @ p['b'] + p['c']) @ p['w'],
    'a bias behind a transpose': lambda p, x: jax.nn.relu((p['a'].T @ x.T).T + p['c']) @ p['w'],
    'a sigmoid': lambda p, x: jax.nn.sigmoid(x @ p['a'] + x @ p['b']) @ p['w'],
    'a recurrent bias': lambda p, x: jax.lax.scan(
        lambda h, t: (jnp.tanh(t + h @ p['v'] + p['c']), None), 0 * (x @ p['a']), (x @ p['b'])[None]
    )[0] @ p['w'],
}  # fmt: skip


@pytest.mark.parametrize('what', LATER)
def test_units_that_act_behind_their_gates(what):
    """Expectation: an error that names 'read', where the gate of zero equals the compact network;
    without the bias gates are taken everywhere."""
    apply, x = LATER[what], drawn(x=(5, 4))['x']
    params = drawn(a=(4, 3), b=(4, 3), v=(3, 3), c=(3,), w=(3, 2))
    params['c'] = np.abs(params['c']) + 1
    read = jp.groups(apply, params, x)
    name = next(f.name for f in read.families if not f.reason)
    gates = {name: np.array([1, 0, 1], np.float32)}
    with pytest.raises(PruneError, match=r"still acts behind a gate at place 'norm'.*'read'"):
        structure.gates(read, 'norm').apply(gates, params, x)
    masks = {p: np.ones(v.shape, bool) for p, v in params.items() if v.ndim == 2}
    for p in set(masks) - {'w'}:
        masks[p][:, 1] = False
    masks['w'][1] = masks['v'][1] = False
    small = jp.compact(apply, params, masks, x)
    found = jax.jit(structure.gates(read, 'read').apply)(gates, params, x)
    close(found, jax.jit(small.apply)(small.params, x), 1e-6)


def test_checkpoints_and_tied_weights_have_a_gate_once():
    """Expectation: slopes as without the checkpoint; of a tied embedding both readers are gated."""
    params, x = drawn(a=(4, 3), w=(3, 2)), drawn(x=(5, 4))['x']

    def slopes(product):
        def apply(params, x):
            return jax.nn.relu(product(x, params['a'])) @ params['w']

        gated = structure.gates(jp.groups(apply, params, x), 'norm')
        assert gated.counts == {'a': 1}
        return jax.grad(lambda g: gated.apply(g, params, x).sum())({'a': jnp.ones(3)})['a']

    close(slopes(jax.checkpoint(jnp.dot)), slopes(jnp.dot), 1e-6)

    def tied(params, tokens):
        return (params['e'][tokens] * 2) @ params['e'].T

    tokens, params = np.arange(5), drawn(e=(7, 4))
    gated = structure.gates(jp.groups(tied, params, tokens), 'read')
    cut = {'e': params['e'] * np.array([1, 0, 1, 1], np.float32)}
    found = gated.apply({'e': jnp.asarray([1.0, 0, 1, 1])}, params, tokens)
    close(found, tied(cut, tokens), 1e-6)


def test_gates_that_do_not_fit():
    """Expectation: one line with the layer, and the nearest name of one that there is not."""
    params, x = drawn(a=(4, 3), w=(3, 2)), drawn(x=(5, 4))['x']
    gated = structure.gates(jp.groups(lambda p, x: x @ p['a'] @ p['w'], params, x), 'norm')
    for gates, says in (
        ({'a': np.ones(2)}, r"gates of 'a' have the shape \(3,\), not \(2,\)"),
        ({'b': np.ones(3)}, "no layer 'b' with gates: .*a"),
        ({'a': [np.ones(3)] * 2}, "'a' has 1 places, not 2"),
    ):
        with pytest.raises(PruneError, match=says):
            gated.apply(gates, params, x)


def test_losses_without_units_in_half_precision():
    """Expectation: leave-one-out runs on bfloat16 parameters, near its values in float32."""
    file, _, problem, view, units, _ = case('torchpruner_mlp')
    data = [Batch(jnp.asarray(file['x']), jnp.asarray(file['labels'], jnp.int32))]
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), view._replace(masks={}))
    half = half._replace(masks=view.masks)
    score = jax.jit(unit_leave_one_out(problem, by=units))
    for layer, values in score(KEY, half, data).items():
        close(values, score(KEY, view, data)[layer], 0.1)


def test_dimensions_of_queries_are_read_by_no_parameter():
    """Expectation: left out where all families are asked for, an error where they are named."""
    problem = jp.problem_from_flax(nn.build('transformer', 10, depth=1), (8, 8, 3))
    read = structure.groups_of(problem, (8, 8, 3))
    name = 'encoder/attention_0/query/kernel:head_dim'
    assert name in structure.gates(read, 'norm').sizes
    assert name not in structure.gates(read, 'read').sizes
    with pytest.raises(PruneError, match="query/kernel:head_dim' has no place 'read'"):
        structure.gates(read, 'read', [name])


def test_what_is_wrong_is_said():
    """Expectation: one line each, with the nearest valid word."""
    _, _, problem, view, units, read = case('torchpruner_mlp')
    with pytest.raises(PruneError, match=r"unknown place 'nrm'.*'norm'"):
        structure.gates(read, 'nrm')
    with pytest.raises(PruneError, match=r"no family of groups 'fc7/kernel'"):
        structure.gates(read, 'norm', ['fc7/kernel'])
    with pytest.raises(PruneError, match='order 1 or 2, not 3'):
        gate_taylor(problem, by=units, order=3)
    with pytest.raises(PruneError, match='evaluation mode'):
        gate_taylor(problem, by=units, train=True)
    with pytest.raises(PruneError, match='coupled groups'):
        gate_taylor(problem, by=jp.competing('weight', {'a': (2, 2)}))
    with pytest.raises(PruneError, match='needs data'):
        gate_taylor(problem, by=units)(KEY, view, None)
    with pytest.raises(PruneError, match=r"unknown measure 'apos'"):
        activation_score(problem, by=units, measure='apos')


# --- losses without units -----------------------------------------------------------------------

SAMPLED = [
    (name, layer, where)
    for name, layers in (('mlp', ('fc1', 'fc2')), ('conv', ('conv1', 'conv2', 'fc1')))
    for layer in layers
    for where in ('self', 'best')
]


@pytest.mark.parametrize(
    ('name', 'layer', 'where'),
    [c if c in SAMPLED[:2] or c[1] == 'conv2' else pytest.param(*c, marks=pytest.mark.more)
     for c in SAMPLED],
)  # fmt: skip
def test_games_of_units_are_those_of_the_authors(name, layer, where):
    """Expectation: the file's losses of all coalitions, and the Shapley values that they sampled
    with their orders, of each example."""
    file, _, problem, view, units, _ = case(f'torchpruner_{name}')
    gated = units.gates('output' if where == 'self' else 'activation')
    data = [Batch(jnp.asarray(file['x']), jnp.asarray(file['labels'], jnp.int32))]
    at, n = f'{layer}/{where}', gated.sizes[f'{layer}/kernel']

    @jax.jit
    def played(orders):
        game = unit_game(problem, gated, f'{layer}/kernel', view, data)
        masks = (jnp.arange(2**n)[:, None] >> jnp.arange(n)) & 1 == 1
        losses = evaluated(game, masks, 64, 'unrolled')
        return losses, shapley(game, n, orders=orders, loop='unrolled').per_example

    losses, values = played(file[f'shapley_sampled/{at}/full/permutations'])
    close(losses, file[f'shapley_exact/{at}/coalition_loss'], 1e-5)
    close(values.T, file[f'shapley_sampled/{at}/full/none'], 1e-5)


def test_scores_by_the_loss_without_units():
    """Expectation: Shapley values add up to the loss without a layer minus that with it; leave-one-
    out is the loss of the network without each unit; batches see the same orders."""
    file, _, problem, view, units, _ = case('torchpruner_mlp')
    x, y = jnp.asarray(file['x']), jnp.asarray(file['labels'], jnp.int32)
    whole, parts = [Batch(x, y)], [Batch(x[:10], y[:10]), Batch(x[10:], y[10:])]
    score = jax.jit(unit_shapley(problem, by=units, permutations=2))
    found = score(KEY, view, whole)
    for layer, values in score(KEY, view, parts).items():
        close(values, found[layer], 1e-5)
    alone = jax.jit(unit_leave_one_out(problem, by=units))(KEY, view, whole)
    squared = jax.jit(unit_leave_one_out(problem, by=units, sign='square'))(KEY, view, whole)
    gated = units.gates('activation')

    @jax.jit
    def loss(gates):
        return problem.loss(gated.apply(gates, view.params, x, {}), y).mean()

    dense = loss({})
    for layer, n in gated.sizes.items():
        close(found[layer].sum(), loss({layer: jnp.zeros(n)}) - dense, 1e-4)
        expected = [loss({layer: jnp.ones(n).at[i].set(0)}) - dense for i in range(n)]
        np.testing.assert_allclose(alone[layer], expected, atol=1e-6)
        close(squared[layer], alone[layer] ** 2, 1e-6)
    spread = jax.jit(unit_shapley(problem, by=units, permutations=2, aggregate='mean_plus_2std'))
    assert all((s >= found[n]).all() for n, s in spread(KEY, view, whole).items())


#: Layouts of inputs, kernel and outputs of a convolution, and the axes of the kernel HWIO in them.
LAYOUTS = {
    'last': (('NHWC', 'HWIO', 'NHWC'), (0, 1, 2, 3)),
    'first': (('NCHW', 'OIHW', 'NCHW'), (3, 2, 0, 1)),
    'kernel': (('NHWC', 'OIHW', 'NHWC'), (3, 2, 0, 1)),
    'outputs': (('NHWC', 'HWIO', 'NCHW'), (0, 1, 2, 3)),
}


def convolutional(name, checkpoint=False):
    """Two convolutions, the second one in this layout, and a dense layer; and what competes."""
    layout, axes = LAYOUTS[name]
    sizes = {'conv1': (3, 3, 2, 4), 'conv2': (3, 3, 4, 3), 'dense': (48, 5)}
    draw = np.random.default_rng(0)
    params = {
        layer: {'kernel': draw.standard_normal(size).astype('float32')}
        for layer, size in sizes.items()
    }
    params['conv2']['kernel'] = params['conv2']['kernel'].transpose(axes)

    def conv(x, kernel, layout):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=layout)

    def apply(params, stats, x, *, train, key):
        x = jax.nn.relu(conv(x, params['conv1']['kernel'], LAYOUTS['last'][0]))
        x = x.transpose(0, 3, 1, 2) if layout[0] == 'NCHW' else x
        inner = functools.partial(conv, layout=layout)
        inner = jax.checkpoint(inner) if checkpoint else inner
        x = jax.nn.relu(inner(x, params['conv2']['kernel']))
        x = x.transpose(0, 2, 3, 1) if layout[2] == 'NCHW' else x
        return x.reshape(len(x), -1) @ params['dense']['kernel'], stats

    x = jnp.asarray(draw.standard_normal((6, 4, 4, 2)).astype('float32'))
    problem = Problem(None, apply, jp.cross_entropy, jp.kernels)
    shapes = {path: leaf.shape for path, leaf in tree.paths(params)}
    units = jp.competing('unit', shapes, lambda: structure.groups(problem, params, x, {}))
    return problem, units, jp.view(problem, params), [Batch(x, jnp.arange(6) % 5)]


def scans(traced):
    """Loops of a program, those within them left out."""
    return sum(equation.primitive.name == 'scan' for equation in traced.jaxpr.eqns)


@pytest.mark.parametrize(
    ('layout', 'checkpoint', 'loops'),
    [
        ('last', False, 4),
        ('first', False, 2),
        more('outputs', False, 2),
        more('kernel', True, 0),
    ],
)
def test_convolutions_in_another_layout_are_not_put_into_loops(layout, checkpoint, loops):
    """Expectation: XLA's CPU is slow at these, and only at these (see `experiments/bench`). So the
    units of the second convolution are scored in loops by both scores, and those of the first one
    if the second has its channels last. A checkpoint is computed again for its own units as well.
    Values do not depend on the loop, nor on the layout.
    """
    problem, units, view, data = convolutional(layout, checkpoint)
    counts, found = {}, {}
    for loop in ('auto', 'map', 'unrolled'):
        scores = [
            unit_shapley(problem, by=units, permutations=2, loop=loop),
            unit_leave_one_out(problem, by=units, loop=loop),
        ]

        def both(key, view, data, scores=scores):
            return [score(key, view, data) for score in scores]

        counts[loop] = scans(jax.make_jaxpr(both)(KEY, view, data))
        found[loop] = jax.jit(both)(KEY, view, data)
    assert counts == {'auto': loops, 'map': 4, 'unrolled': 0}
    problem, units, view, data = convolutional('last')
    score = unit_shapley(problem, by=units, permutations=2, loop='unrolled')
    expected = jax.jit(score)(KEY, view, data)
    for shapley_values, alone in found.values():
        jax.tree.map(lambda a, b: close(a, b, 1e-5), shapley_values, expected)
        jax.tree.map(lambda a, b: close(a, b, 1e-5), alone, found['unrolled'][1])
