"""Sensitivities of weights and SiPP: the numbers of its authors' code, brute force, identities.

`golden/structured/torchprune_*` holds numbers of lucaslie/torchprune, see `golden/README.md`. They
are float32, so equal to 1e-6.
"""

import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from structured_nets import load

import jaxprune as jp
from jaxprune import score, tree
from jaxprune.errors import PruneError
from jaxprune.jaxpr import equations

KEY = jax.random.key(0)
NETS = ('mlp', 'conv')
DRAW = np.random.default_rng(0)


@functools.cache
def published(name):
    """File, metadata, problem, view and data of a network of the files."""
    file, meta, forward, params, stats = load(f'torchprune_{name}')
    problem = jp.problem_from_functions(lambda key: params, lambda p, x: forward(p, stats, x))
    view = jax.jit(lambda params: jp.view(problem, params))(params)
    return file, meta, problem, view, batch_of(file['x'])


def batch_of(x):
    return jp.Batch(np.asarray(x)[None], np.zeros((1, len(x)), np.int32))


def of_functions(apply, params, prunable=tree.kernels):
    """Problem and view of a plain function."""
    problem = jp.problem_from_functions(lambda key: params, apply, prunable=prunable)
    return problem, jp.view(problem, params)


def found(problem, view, x, reduce='max'):
    """path -> sensitivities, compiled."""

    @jax.jit
    def run(view, x):
        edges = score.edge_sensitivities(problem, view, jp.Batch(x[None], None), reduce=reduce)
        return {path: leaf.values for path, leaf in edges.items()}

    return jax.device_get(run(view, x))


# --- the formula ----------------------------------------------------------------------------------


def test_by_hand():
    """Expectation: the definition. A neuron of weights 1 and 3 at equal inputs: a quarter and three
    quarters; a negative weight beside them has a sum of its own; where nothing arrives, nothing
    is shared out; a negative input counts by its size, in an example of its own."""
    sense = jax.jit(score.edge_sensitivity)

    def of(weights, inputs):
        kernel = np.array(weights, np.float32)[None, :, None]
        return np.ravel(sense(kernel, np.array(inputs, np.float32)[None, None])).tolist()

    assert of([1, 3], [1, 1]) == [0.25, 0.75]
    assert of([1, 3, -2], [1, 1, 1]) == [0.25, 0.75, 1]
    assert of([1, 3], [0, 0]) == of([0, 0], [1, 1]) == [0, 0]
    assert of([1, 3, 4], [1, 1, -7]) == [0.25, 0.75, 1]
    assert of([1, 1], [2.0**-24, 2.0**-24]) == [0, 0]  # a sum of 2**-23 says nothing
    assert of([1, 1], [2.0**-23, 2.0**-23]) == [0.5, 0.5]


def test_shares_of_one_example_add_up_to_one():
    """Expectation: shares of a sum. Over examples the largest counts, so more than one is left."""
    kernel = DRAW.normal(size=(1, 9, 4)).astype('float32')
    x = np.abs(DRAW.normal(size=(5, 9))).astype('float32')
    problem, view = of_functions(lambda p, x: x @ p['kernel'], {'kernel': kernel[0]})
    one, five = (found(problem, view, rows)['kernel'] for rows in (x[:1], x))
    for sign in (kernel[0] > 0, kernel[0] < 0):
        np.testing.assert_allclose((one * sign).sum(0), 1, rtol=1e-6)
        assert ((five * sign).sum(0) > 1).all()
    assert five.max() <= 1


@pytest.mark.parametrize('tracker', ['sipp_det', 'sipp_rand', 'pfp'])
@pytest.mark.parametrize('name', NETS)
def test_sensitivities_of_the_authors(name, tracker):
    """Expectation: theirs: means over positions for deterministic SiPP, else the largest."""
    file, meta, problem, view, batch = published(name)
    values = found(problem, view, batch.x[0], 'mean' if tracker == 'sipp_det' else 'max')
    for layer in meta['layers']:
        expected = file[f'sens/{tracker}/{layer}']
        np.testing.assert_allclose(values[f'{layer}/kernel'], expected, atol=1e-6)


@pytest.mark.parametrize('name', NETS)
def test_means_of_input_channels(name):
    """Expectation: theirs: means over positions and taps, then the largest over outputs and over
    examples, which are seen one by one, the two signs of a raw input too."""
    file, meta, problem, view, batch = published(name)
    run = jax.jit(jax.vmap(edges_by(problem, 'mean'), in_axes=(None, 0)))
    x = batch.x[0][:, None]
    whole, *signs = (jax.device_get(run(view, a)) for a in (x, np.maximum(x, 0), np.maximum(-x, 0)))
    first = f'{meta["layers"][0]}/kernel'
    whole[first] = np.concatenate([of[first] for of in signs])
    for path, values in whole.items():
        found = values.mean(tuple(range(1, values.ndim - 2))).max((0, 2))
        expected = file[f'sens_in/sipp_det/{path.split("/")[0]}']
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert len(meta['layers']) == len(whole)


@pytest.mark.parametrize('name', NETS)
def test_weights_that_the_authors_keep(name):
    """Expectation: theirs for 25, 50 and 75 %: how many of each filter and sign."""
    file, meta, problem, view, batch = published(name)
    pruner = jp.get_pruner(problem, 'sipp')

    @jax.jit
    def kept(k):
        return pruner.update(KEY, (), view, {'*': k}, batch)[1]

    checked = 0
    for fraction, unambiguous in meta['sipp_det_unambiguous'].items():
        if not unambiguous:
            continue
        masks = jax.device_get(kept(int(float(fraction) * meta['total_weights'])))
        for layer in meta['layers']:
            w, mask = np.asarray(view.weights[f'{layer}/kernel']), masks[f'{layer}/kernel']
            counts = [(mask & s).reshape(-1, w.shape[-1]).sum(0) for s in (w > 0, w < 0)]
            np.testing.assert_array_equal(counts, file[f'sipp_det/alloc_{fraction}/{layer}'])
            checked += 1
    assert checked == 3 * len(meta['layers'])


# --- products of every layout, against brute force ------------------------------------------------


def brute(kernel, patches, reduce):
    """The definition in loops: kernel (inputs, outputs), patches (examples, positions, inputs)."""
    best = np.zeros(kernel.shape)
    for example in patches:
        for a in (np.maximum(example, 0), np.maximum(-example, 0)):
            shares = np.zeros((len(a), *kernel.shape))
            for p, o in np.ndindex(len(a), kernel.shape[1]):
                for same in (kernel[:, o] > 0, kernel[:, o] < 0):
                    z = (np.abs(kernel[same, o]) * a[p, same]).sum()
                    if z > 2.0**-23:
                        shares[p, same, o] = np.abs(kernel[same, o]) * a[p, same] / z
            best = np.maximum(best, shares.max(0) if reduce == 'max' else shares.mean(0))
    return best


def brute_conv(kernel, x, reduce, stride, pads, dilation, hole, groups):
    """The same of a convolution of maps (examples, height, width, channels), kernel HWIO."""
    height, width, inside, outputs = kernel.shape
    spread = np.zeros((len(x), *[(n - 1) * hole + 1 for n in x.shape[1:3]], x.shape[3]))
    spread[:, ::hole, ::hole] = x
    image = np.pad(spread, ((0, 0), *pads, (0, 0)))
    reach = [(n - 1) * dilation + 1 for n in (height, width)]
    places = [(n - r) // stride + 1 for n, r in zip(image.shape[1:3], reach, strict=True)]
    values = np.zeros(kernel.shape)
    for g in range(groups):
        rows = image[..., g * inside : (g + 1) * inside]
        patches = np.array(
            [
                [
                    example[
                        i * stride : i * stride + reach[0] : dilation,
                        j * stride : j * stride + reach[1] : dilation,
                    ].ravel()
                    for i, j in np.ndindex(*places)
                ]
                for example in rows
            ]
        )
        own = slice(g * outputs // groups, (g + 1) * outputs // groups)
        flat = kernel[..., own].reshape(-1, outputs // groups)
        values[..., own] = brute(flat, patches, reduce).reshape(height, width, inside, -1)
    return values


CONVOLUTIONS = {
    'plain': {},
    'strided': {'stride': 2, 'pads': ((1, 0), (2, 1))},
    'dilated': {'dilation': 2, 'pads': ((2, 2), (1, 1))},
    'transposed': {'hole': 2, 'pads': ((2, 1), (2, 2))},
    'grouped': {'groups': 2},
    'depthwise': {'groups': 4, 'pads': ((1, 1), (1, 1))},
}


@pytest.mark.parametrize('reduce', ['max', 'mean'])
@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_convolutions(name, reduce):
    """Expectation: the definition in loops, in float64, for activations of both signs."""
    given = {'stride': 1, 'pads': ((0, 0), (0, 0)), 'dilation': 1, 'hole': 1, 'groups': 1}
    given |= CONVOLUTIONS[name]
    kernel = DRAW.normal(size=(3, 2, 4 // given['groups'], 8))
    kernel[0, 1] = 0
    x = DRAW.normal(size=(3, 5, 6, 4))

    def apply(p, x):
        return lax.conv_general_dilated(
            x,
            p['kernel'],
            (given['stride'],) * 2,
            given['pads'],
            (given['hole'],) * 2,
            (given['dilation'],) * 2,
            ('NHWC', 'HWIO', 'NHWC'),
            given['groups'],
        )

    with jax.enable_x64(True):
        values = found(*of_functions(apply, {'kernel': kernel}), x, reduce)['kernel']
    expected = brute_conv(kernel, x, reduce, **given)
    np.testing.assert_allclose(values, expected, rtol=1e-9, atol=1e-12)


def layouts():
    """Name -> function, shapes of its kernels, shape of an input, and by hand what each reads.

    What is read is written as `(kernel -> (inputs, outputs), x -> (examples, positions, inputs),
    values -> the kernel's shape)`.
    """

    def same(k):
        return k

    return {
        'stored (outputs, inputs)': (
            lambda p, x: x @ p['a'].T,
            {'a': (5, 4)},
            (4,),
            {'a': (np.transpose, lambda x: x[:, None], np.transpose)},
        ),
        'along a sequence': (
            lambda p, x: x @ p['a'],
            {'a': (4, 5)},
            (3, 4),
            {'a': (same, same, same)},
        ),
        'split into heads': (
            lambda p, x: jnp.einsum('btd,dhe->bhte', x, p['a']),
            {'a': (4, 2, 3)},
            (3, 4),
            {'a': (lambda k: k.reshape(4, 6), same, lambda v: v.reshape(4, 2, 3))},
        ),
        'three kernels in one product': (
            lambda p, x: x @ jnp.concatenate([p['a'], 2 * p['b'], p['c'][1:]], 1),
            {'a': (4, 2), 'b': (4, 3), 'c': (5, 1)},
            (4,),
            {
                'a': (same, lambda x: x[:, None], same),
                'b': (same, lambda x: x[:, None], same),
                'c': (
                    lambda k: k[1:],
                    lambda x: x[:, None],
                    lambda v: np.concatenate([np.zeros((1, 1)), v]),
                ),
            },
        ),
        'one kernel for each part': (
            lambda p, x: jnp.einsum('bgi,gio->bgo', x, p['a']),
            {'a': (2, 4, 3)},
            (2, 4),
            {'a': (same, lambda x: x[:, None], same)},
        ),
        'maps of channels first': (
            lambda p, x: lax.conv_general_dilated(
                x, p['a'], (1,), 'VALID', dimension_numbers=('NCW', 'OIW', 'NCW')
            ),
            {'a': (3, 2, 2)},
            (2, 5),
            {
                'a': (
                    lambda k: k.reshape(3, 4).T,
                    lambda x: np.stack([x[..., i : i + 2].reshape(-1, 4) for i in range(4)], 1),
                    lambda v: v.T.reshape(3, 2, 2),
                )
            },
        ),
    }


@pytest.mark.parametrize('name', layouts())
def test_layouts(name):
    """Expectation: the definition in loops for what each kernel reads, written out by hand."""
    apply, shapes, shape, reads = layouts()[name]
    params = {path: DRAW.normal(size=s) for path, s in shapes.items()}
    x = DRAW.normal(size=(3, *shape))
    rule = {'prunable': lambda path, leaf: True}
    with jax.enable_x64(True):
        for reduce in ('max', 'mean'):
            values = found(*of_functions(apply, params, **rule), x, reduce)
            for path, (flat, patches, back) in reads.items():
                if name == 'one kernel for each part':
                    parts = zip(params[path], np.moveaxis(x, 1, 0), strict=True)
                    expected = np.stack([brute(k, patches(a), reduce) for k, a in parts])
                else:
                    expected = back(brute(flat(params[path]), patches(x), reduce))
                np.testing.assert_allclose(values[path], expected, rtol=1e-9, atol=1e-12)


def test_kernels_that_change_on_their_way():
    """Expectation: the definition, for the numbers that the network multiplies with: masked,
    standardised, rounded with a straight-through gradient, stacked in a scan, read as 16 bits."""
    params = {name: {'w': DRAW.normal(size=(4, 4))} for name in ('mask', 'norm', 'round')}
    params |= {'rows': {'w': DRAW.normal(size=(2, 4, 4))}, 'half': {'w': DRAW.normal(size=(4, 3))}}
    mask = DRAW.random((4, 4)) < 0.7
    x = DRAW.normal(size=(5, 4))

    def changed(p):
        rounded = p['round']['w'] + lax.stop_gradient(jnp.round(p['round']['w']) - p['round']['w'])
        standard = (p['norm']['w'] - p['norm']['w'].mean(0)) / p['norm']['w'].std(0)
        half = p['half']['w'].astype(jnp.bfloat16)
        return jnp.where(mask, p['mask']['w'], 0), standard, rounded, p['rows']['w'], half

    def apply(p, x):
        masked, standard, rounded, rows, half = changed(p)
        x = jnp.tanh(jnp.tanh(jnp.tanh(x @ masked) @ standard) @ rounded)
        x = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, rows)[0]
        return x.astype(jnp.bfloat16) @ half

    def read(p, x):
        """What each kernel reads, by hand."""
        masked, standard, rounded, rows, _ = changed(p)
        first = jnp.tanh(x @ masked)
        second = jnp.tanh(first @ standard)
        third = jnp.tanh(second @ rounded)
        fourth = jnp.tanh(third @ rows[0])
        last = jnp.tanh(fourth @ rows[1]).astype(jnp.bfloat16)
        return x, first, second, jnp.stack([third, fourth]), last

    with jax.enable_x64(True):
        values = found(*of_functions(apply, params), x)
        kernels, reads = jax.device_get(jax.jit(lambda p, x: (changed(p), read(p, x)))(params, x))
    for name, kernel, a in zip(('mask', 'norm', 'round'), kernels, reads, strict=False):
        expected = brute(kernel, a[:, None], 'max')
        np.testing.assert_allclose(values[f'{name}/w'], expected, rtol=1e-9, atol=1e-12)
    rows = [brute(k, a[:, None], 'max') for k, a in zip(kernels[3], reads[3], strict=True)]
    np.testing.assert_allclose(values['rows/w'], rows, rtol=1e-9, atol=1e-12)
    half = brute(*(v.astype(np.float64) for v in (kernels[4], reads[4][:, None])), 'max')
    np.testing.assert_allclose(values['half/w'], half, rtol=1e-6)  # in float32


def test_a_kernel_that_is_used_twice():
    """Expectation: the larger of the two, turned back where it is used turned."""
    params = {'kernel': DRAW.normal(size=(4, 4))}
    x = DRAW.normal(size=(5, 4))
    with jax.enable_x64(True):
        values = found(
            *of_functions(lambda p, x: jnp.sin(x @ p['kernel']) @ p['kernel'].T, params), x
        )
    kernel = params['kernel']
    first = brute(kernel, x[:, None], 'max')
    second = brute(kernel.T, np.sin(x @ kernel)[:, None], 'max').T
    np.testing.assert_allclose(values['kernel'], np.maximum(first, second), rtol=1e-9)


class CNN(nn.Module):
    """Filters with norms, a depthwise layer, pooling, a flattened map."""

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        def norm(x):
            return nn.BatchNorm(use_running_average=not train)(x)

        x = nn.relu(norm(nn.Conv(6, (3, 3), strides=2, name='first')(x)))
        x = norm(nn.Conv(6, (3, 3), feature_group_count=6, use_bias=False, name='depth')(x))
        x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        return nn.Dense(3, name='last')(
            nn.Dropout(0.5, deterministic=not train)(x.reshape(len(x), -1))
        )


@functools.cache
def cnn():
    problem = jp.problem_from_flax(CNN(), (8, 8, 2))
    params, state = jax.jit(problem.init)(KEY)
    moved = jax.tree.map(lambda s: s + 0.3, state)  # statistics of their own
    return problem, jp.view(problem, params, moved), np.float32(DRAW.normal(size=(6, 8, 8, 2)))


def test_a_linen_cnn():
    """Expectation: the definition in loops, at the outputs that flax itself captures."""
    problem, view, x = cnn()
    variables = {'params': view.params, **view.model_state}
    _, caught = jax.jit(lambda x: CNN().apply(variables, x, capture_intermediates=True))(x)
    outputs = jax.device_get(caught['intermediates'])
    first = np.maximum(outputs['BatchNorm_0']['__call__'][0], 0)
    depth = np.maximum(outputs['BatchNorm_1']['__call__'][0], 0)
    flat = depth.reshape(6, 2, 2, 2, 2, 6).max((2, 4)).reshape(6, 1, 24)
    w = {path.split('/')[0]: np.asarray(leaf, np.float64) for path, leaf in view.weights.items()}
    plain = {'dilation': 1, 'hole': 1, 'stride': 1, 'groups': 1}
    strided = plain | {'stride': 2, 'pads': ((0, 1),) * 2}  # 'SAME'
    depthwise = plain | {'groups': 6, 'pads': ((1, 1),) * 2}
    values = found(problem, view, x, 'mean')
    expected = {
        'first': brute_conv(w['first'], x, 'mean', **strided),
        'depth': brute_conv(w['depth'], first, 'mean', **depthwise),
        'last': brute(w['last'], flat.astype(np.float64), 'mean'),
    }
    for name, leaf in expected.items():
        np.testing.assert_allclose(values[f'{name}/kernel'], leaf, rtol=1e-4, atol=1e-6)
    # And the method keeps the largest of all.
    data = (x, np.zeros(6, np.int32))
    given = {'model': problem, 'data': data, 'model_state': view.model_state}
    pruned = jp.prune(view.params, 'sipp', 0.3, **given)
    every = np.concatenate([values[path].ravel() for path in sorted(values)])
    masks = np.concatenate([np.ravel(pruned.masks[path]) for path in sorted(values)])
    assert masks.sum() == round(0.3 * masks.size)
    assert every[masks].min() >= every[~masks].max()


# --- as a pure function ---------------------------------------------------------------------------


def test_many_seeds_at_once():
    """Expectation: vmap over networks gives what each gives alone."""
    problem, _, x = cnn()
    scorer, batch = score.sipp(problem), batch_of(x)

    def of(key):
        params, state = problem.init(key)
        return scorer(key, jp.view(problem, params, state), batch)

    keys = jax.random.split(KEY, 3)
    together = jax.jit(jax.vmap(of))(keys)
    alone = jax.jit(of)
    for i, key in enumerate(keys):
        for path, leaf in alone(key).items():
            np.testing.assert_allclose(together[path][i], leaf, rtol=1e-5, atol=1e-6)


def sizes_in(jaxpr):
    """The sizes of all arrays that a program makes, through calls, loops and branches."""
    return [var.aval.size for equation in equations(jaxpr) for var in equation.outvars]


def edges_by(problem, reduce):
    """A new function each time, or it would not be traced again."""

    def run(view, x):
        edges = score.edge_sensitivities(problem, view, jp.Batch(x[None], None), reduce=reduce)
        return {path: leaf.values for path, leaf in edges.items()}

    return run


@pytest.mark.parametrize('reduce', ['max', 'mean'])
def test_blocks_change_no_number(reduce, monkeypatch):
    """Expectation: seven examples in blocks of three, positions in blocks: as all at once."""
    problem, view, x = cnn()
    x = np.concatenate([x, x[:1] * 2])
    whole = jax.jit(edges_by(problem, reduce))(view, x)
    monkeypatch.setattr('jaxprune.score.edges._STEP', 256)
    monkeypatch.setattr('jaxprune.score.edges._TOGETHER', 3 * (128 + 96 + 24))
    cut = jax.jit(edges_by(problem, reduce))(view, x)
    for path, leaf in whole.items():
        np.testing.assert_allclose(cut[path], leaf, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('reduce', ['max', 'mean'])
def test_memory_is_bounded(reduce, monkeypatch):
    """Expectation: the docstring. Beside the inputs no array is larger than a step, the activations
    of a few examples, or the patches of one; examples x patches are 2.4 million entries, patches x
    weights of one example 1.2 million."""
    step, together = 2**16, 2**15
    monkeypatch.setattr('jaxprune.score.edges._STEP', step)
    monkeypatch.setattr('jaxprune.score.edges._TOGETHER', together)
    params = {'kernel': np.ones((3, 3, 16, 32), np.float32)}

    def apply(p, x):
        numbers = ('NHWC', 'HWIO', 'NHWC')
        return lax.conv_general_dilated(x, p['kernel'], (1, 1), 'SAME', dimension_numbers=numbers)

    problem, view = of_functions(apply, params)
    x = jax.ShapeDtypeStruct((64, 16, 16, 16), np.float32)
    jaxpr = jax.make_jaxpr(edges_by(problem, reduce))(view, x).jaxpr
    patches = 16 * 16 * 3 * 3 * 16
    largest = max(size for size in sizes_in(jaxpr) if size != math.prod(x.shape))
    assert patches <= largest <= max(step, together, 2 * patches)


def test_what_is_refused():
    """Expectation: one line each; NaN is never ranked."""
    problem, view, _ = cnn()
    with pytest.raises(PruneError, match='sensitivity needs data: pass batches'):
        score.sipp(problem)(KEY, view, None)
    with pytest.raises(PruneError, match="method 'sipp' needs data="):
        jp.prune(view.params, 'sipp', 0.5, model=problem, model_state=view.model_state)
    with pytest.raises(PruneError, match='sipp looks at single examples'):
        jp.get_pruner(problem, 'sipp', batch_norm='train')
    with pytest.raises(PruneError, match="unknown reduction 'min': did you mean 'mean'"):
        score.edge_sensitivity(np.ones((1, 2, 1)), np.ones((1, 1, 2)), 'min')
    with pytest.raises(PruneError, match=r'not \(1, 2, 1\) and \(1, 1, 3\)'):
        score.edge_sensitivity(np.ones((1, 2, 1)), np.ones((1, 1, 3)))
    with pytest.raises(PruneError, match=r'not \(1, 2, 1\) and \(1, 0, 2\)'):
        score.edge_sensitivity(np.ones((1, 2, 1)), np.ones((1, 0, 2)))
    with pytest.raises(PruneError, match=r'has shape \(3, 2\), its sensitivities \(2, 3\)'):
        score.sipp_sample(KEY, np.ones((3, 2)), np.ones((2, 3)), 4)
    params = {name: {'kernel': np.ones((3, 3), np.float32)} for name in 'ab'}

    def apply(p, x):
        return x @ p['a']['kernel'] @ p['b']['kernel']

    def pruned(x, model=apply):
        data = (np.array(x, np.float32), np.zeros(len(x), np.int32))
        return jp.prune(params, 'sipp', 0.5, model=model, data=data)

    # Shares of an infinite sum are 0, but for what is infinite itself.
    for broken, count in ((np.nan, 18), (np.inf, 3 + 9)):
        with pytest.raises(PruneError, match=f"{count} scores of 'sipp' were NaN or infinite"):
            pruned([[1, 2, 3], [1, broken, 1]])
    with pytest.raises(PruneError, match="all scores of 'sipp' are zero"):
        pruned([[0, 0, 0]])
    with pytest.raises(PruneError, match="'b/kernel' was seen in no product"):
        pruned([[1, 2, 3]], lambda p, x: x @ p['a']['kernel'] + p['b']['kernel'][0])


# --- the random version ---------------------------------------------------------------------------


@pytest.mark.parametrize('name', NETS)
def test_rows_and_allocation_of_the_authors(name):
    """Expectation: their coefficients, their counts of weights, and their allocation for half of
    the weights. Theirs comes from a general solver and is rounded up: where it differs, by 1, it
    asks for more weights than the row has, by a rounding error of the solver."""
    file, meta, problem, view, batch = published(name)
    rows = jax.device_get(jax.jit(lambda v: score.sipp_rows(problem, v, batch))(view))
    counts = score.sipp_allocation(rows, int(0.5 * meta['total_weights']))
    for layer in meta['layers']:
        own, kept = rows[f'{layer}/kernel'], counts[f'{layer}/kernel']
        np.testing.assert_allclose(own.coefficients, file[f'sipp_rand/coeffs/{layer}'], rtol=1e-6)
        np.testing.assert_array_equal(own.nonzero, file[f'sipp_rand/nnz/{layer}'])
        theirs = file[f'sipp_rand/alloc_0.5/{layer}']
        np.testing.assert_array_equal(kept, np.minimum(theirs, own.nonzero))
        assert np.abs(kept - theirs).max() <= 1


def test_the_allocation_is_optimal():
    """Expectation: the conditions of the convex program. A count is the optimum rounded up, so the
    common slope lies between that at the count and that at one weight less; a row that keeps all
    may be steeper than that."""
    draw = np.random.default_rng(1)
    rows = {
        name: score.Rows(None, draw.uniform(1, 900, (2, n)), draw.integers(3, 30, (2, n)))
        for name, n in (('a', 4), ('b', 7))
    }
    counts = score.sipp_allocation(rows, 120)

    def slope(x, coefficient, share):  # by differences of the error, the root of a square equation
        def error(x):
            a = coefficient / (3 * x)
            return share * (a + math.sqrt(a * a + 6 * a)) / 2

        return (error(x - 1e-5) - error(x + 1e-5)) / 2e-5 if x else math.inf

    least, most = [], []
    for name, row in rows.items():
        for at in np.ndindex(row.coefficients.shape):
            kept, share = counts[name][at], 1 / row.coefficients.shape[1]
            assert 1 <= kept <= row.nonzero[at]
            most.append(slope(kept - 1, row.coefficients[at], share))
            if kept < row.nonzero[at]:
                least.append(slope(kept, row.coefficients[at], share))
    assert len(least) > 10 and max(least) <= min(most)
    total = sum(int(c.sum()) for c in counts.values())
    assert 120 <= total < 120 + len(most)
    everything = score.sipp_allocation(rows, 10_000)
    for name, row in rows.items():
        np.testing.assert_array_equal(everything[name], row.nonzero)
    with pytest.raises(PruneError, match='budget must be at least 1'):
        score.sipp_allocation(rows, 0)


@pytest.mark.parametrize('name', NETS)
def test_sample_sizes_of_the_authors(name):
    """Expectation: their tables of expected finds and of draws; and by hand, four equal things
    found by four draws: 4 (1 - (3/4)**4) = 2.734375."""
    file, meta, *_ = published(name)
    for row in meta['util']:
        p = file[f'util/probs_{row["n"]}']
        if 'expected_unique_of' in row:
            assert score.expected_unique(p, row['expected_unique_of']) == row['value']
        else:
            wanted = row['adapt_sample_size_of']
            assert score.draws_for(p, wanted) == row['value']
            assert score.draws_for(p, wanted, uniform=True) == row['uniform']
    assert score.expected_unique(np.full(4, 0.25), 4) == 3
    assert score.expected_unique(np.full((2, 4), 0.25), [4, 1]).tolist() == [3, 1]
    assert [score.draws_for([0, 0.5, 0.5], k) for k in (0, 1, 2)] == [0, 1, 1]
    assert [score.draws_for([0, 1.0], k) for k in (0, 1, 5)] == [0, 1, 1]
    with pytest.raises(PruneError, match='wanted must be at least 0'):
        score.draws_for([1.0], -1)


def test_random_kernels_are_right_in_the_mean():
    """Expectation: a weight drawn c times of m, c binomial: the mean is w, the variance
    w² (1 - p) / (m p); 3000 draws are within 5 standard errors. Weights without sensitivity are
    never drawn. One program for many keys and any number of draws."""
    kernel = np.float32([[1.0, -2.0], [0.5, -1.0], [-3.0, 2.0], [0.25, 4.0], [2.0, 0.0]])
    sensitivity = np.float32([[0.5, 0.9], [0.3, 0.2], [1.0, 0.6], [0.0, 0.4], [0.7, 0.0]])
    draws = np.array([[6, 3], [2, 5]], np.int32)
    keys = jax.random.split(KEY, 3000)
    sample = jax.jit(jax.vmap(score.sipp_sample, in_axes=(0, None, None, None)))
    weights, masks = jax.device_get(sample(keys, kernel, sensitivity, draws))
    for o, (sign, own) in itertools.product(range(2), enumerate((kernel > 0, kernel < 0))):
        here = own[:, o] & (sensitivity[:, o] > 0)
        p = sensitivity[here, o] / sensitivity[here, o].sum()
        w, m = kernel[here, o], draws[sign, o]
        error = np.sqrt(w**2 * (1 - p) / (m * p) / len(keys))
        assert (np.abs(weights[:, here, o].mean(0) - w) <= 5 * error + 1e-6).all()
        chance = 1 - (1 - p) ** m
        spread = np.sqrt(chance * (1 - chance) / len(keys))
        assert (np.abs(masks[:, here, o].mean(0) - chance) <= 5 * spread + 1e-6).all()
    assert not masks[:, sensitivity == 0].any()
    np.testing.assert_array_equal(weights != 0, masks)
    none, _ = score.sipp_sample(KEY, kernel, sensitivity, 0)
    assert not none.any()
    turned = score.sipp_sample(KEY, kernel.T, sensitivity.T, draws, axis=0)
    straight = score.sipp_sample(KEY, kernel, sensitivity, draws)
    for one, other in zip(turned, straight, strict=True):
        np.testing.assert_array_equal(one.T, other)
