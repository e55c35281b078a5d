"""Shipped models and the ways to convolve."""

import functools
import itertools

import flax.linen as flax_nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxprune as jp
from jaxprune import nn, structure, tree
from jaxprune.errors import JaxpruneError
from jaxprune.nn.blocks import pooled
from jaxprune.nn.conv import native, patches, taps

CASES = [
    # sides, strides, padding, dilation, groups, maps in, maps out
    ((3, 3), (1, 1), 'SAME', (1, 1), 1, 4, 6),
    ((3, 2), (2, 1), ((1, 0), (2, 1)), (2, 3), 1, 4, 6),
    ((3, 3), (2, 2), 'SAME', (2, 2), 4, 4, 8),
    ((3, 3), (1, 1), 'SAME', (1, 1), 2, 4, 6),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (
            ((3, 3), (2, 2), 'SAME', (1, 1), 1, 4, 6),
            ((5, 5), (1, 1), 'VALID', (1, 1), 1, 3, 2),
            ((1, 1), (2, 2), ((0, 0), (0, 0)), (1, 1), 1, 4, 6),
            ((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 4, 4, 4),
        )
    ),
]


@pytest.mark.parametrize('case', CASES, ids=str)
@pytest.mark.parametrize('conv', [patches, taps])
def test_ways_to_convolve_agree(conv, case):
    """Expectation: XLA's convolution in float64, its gradients, and three runs under `vmap`."""
    sides, strides, padding, dilation, groups, maps_in, maps_out = case
    with jax.enable_x64(True):
        draw = np.random.default_rng(0)
        x = draw.standard_normal((3, 2, 9, 8, maps_in))
        kernel = draw.standard_normal((3, *sides, maps_in // groups, maps_out))

        @functools.partial(jax.jit, static_argnums=0)
        def run(conv, x, kernel):
            return conv(
                x,
                kernel,
                strides,
                padding,
                lhs_dilation=(1, 1),
                rhs_dilation=dilation,
                dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
                feature_group_count=groups,
                precision=None,
            )

        wanted = [run(native, x[i], kernel[i]) for i in range(3)]
        found = jax.jit(jax.vmap(functools.partial(run, conv)))(x, kernel)
        np.testing.assert_allclose(found, np.stack(wanted), rtol=0, atol=1e-12)
        weights = draw.standard_normal(wanted[0].shape)

        def loss(x, kernel, conv):
            return (run(conv, x, kernel) * weights).sum()

        gradients = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
        for a, b in zip(
            gradients(x[0], kernel[0], conv), gradients(x[0], kernel[0], native), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_what_matrix_products_cannot_do_is_told():
    """Expectation: one line, never another convolution."""
    x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 2))
    numbers = ('NHWC', 'HWIO', 'NHWC')
    for conv in (patches, taps):
        with pytest.raises(JaxpruneError, match='transposed'):
            conv(x, kernel, (1, 1), 'SAME', lhs_dilation=(2, 2), dimension_numbers=numbers)
        with pytest.raises(JaxpruneError, match='channels last'):
            conv(x, kernel, (1, 1), 'SAME', dimension_numbers=('NCHW', 'HWIO', 'NCHW'))
    with pytest.raises(JaxpruneError, match="unknown convolution 'tap': did you mean 'taps'"):
        nn.convolution('tap')


#: Prunable weights for ten classes of 32x32x3 images. VGG-16 and 19: published code
#: (`effective_sparsity`). Others: by hand, the sum of (taps x maps in x maps out) over the
#: layers of the papers.
WEIGHTS = {
    'vgg11': 9 * (3 * 64 + 64 * 128 + 128 * 256 + 256**2 + 256 * 512 + 3 * 512**2) + 5120,
    'vgg16': 14_715_584,
    'vgg19': 20_070_080 - 90 * 512,  # published for 100 classes
    'resnet20': 9 * (3 * 16 + 6 * 16**2 + 16 * 32 + 5 * 32**2 + 32 * 64 + 5 * 64**2)
    + 16 * 32
    + 32 * 64
    + 640,
    'resnet18': 9
    * (3 * 64 + sum(n * w * w for n, w in ((4, 64), (3.5, 128), (3.5, 256), (3.5, 512))))
    + (64 * 128 + 128 * 256 + 256 * 512)
    + 5120,
}


@pytest.mark.parametrize('name', sorted(WEIGHTS))
def test_sizes_of_published_nets(name):
    """Expectation: see `WEIGHTS`."""
    module = nn.build(name, 10)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert sum(leaf.size for leaf in tree.pick(shapes['params']).values()) == WEIGHTS[name]


SLOW = pytest.mark.slow
SMALL = [
    ('small_vgg', {'widths': [4]}),
    pytest.param('lenet5', {}, marks=pytest.mark.more),
    pytest.param('vgg11', {'width': 0.0625}, marks=SLOW),
    pytest.param('resnet20', {'width': 0.25}, marks=SLOW),
    pytest.param('resnet18', {'width': 0.0625, 'shortcut': 'pad'}, marks=SLOW),
    pytest.param('mobilenet', {'width': 0.0625}, marks=SLOW),
]


@pytest.mark.parametrize(('name', 'options'), SMALL)
def test_nets_are_the_same_whichever_way_they_convolve(name, options):
    """Expectation: the gradient of the loss with XLA's convolution, float64, batch statistics."""
    with jax.enable_x64(True):
        module = nn.build(name, 3, **options)
        if hasattr(module, 'dtype'):
            module = module.clone(dtype=jnp.float64)
        x = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))

        @jax.jit
        def init():
            variables = module.init(jax.random.key(0), x)
            return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables)

        variables = init()
        params, state = variables.pop('params'), variables

        def loss(params, conv):
            net = nn.convolving(module, conv)
            logits, _ = net.apply(
                {'params': params, **state}, x, train=True, mutable=['batch_stats']
            )
            return (logits**2).sum()

        wanted = jax.jit(jax.grad(loss), static_argnums=1)(params, lax.conv_general_dilated)
        for conv in (patches, taps):
            found = jax.jit(jax.grad(loss), static_argnums=1)(params, conv)
            for path, leaf in tree.paths(jax.device_get(wanted)):
                scale = float(abs(leaf).max()) + 1e-12
                np.testing.assert_allclose(
                    dict(tree.paths(found))[path], leaf, rtol=0, atol=1e-8 * scale, err_msg=path
                )


def test_networks_without_convolutions_stay_as_they_are():
    """Expectation: the very same module."""
    module = nn.build('vit', 10)
    assert nn.convolving(module, taps) is module


@pytest.mark.parametrize(
    ('name', 'shape', 'message'),
    [
        ('vit', (1, 30, 32, 3), 'patches of 4 x 4 do not tile 30 x 32'),
        ('mobilnet', None, "unknown model 'mobilnet': did you mean 'mobilenet'"),
    ],
)
def test_shapes_that_do_not_fit(name, shape, message):
    """Expectation: one line."""
    with pytest.raises(JaxpruneError, match=message):
        nn.build(name, 10).init(jax.random.key(0), jnp.zeros(shape))


def test_options_that_are_not_there():
    """Expectation: one line with the nearest name or the valid values."""
    for name, options, message in [
        ('vgg16', {'widht': 0.5}, "no option 'widht': did you mean 'width'"),
        ('vgg16', {'dtype': 'float8'}, "unknown dtype 'float8'"),
        ('vgg16', {'order': 'bn'}, 'order must be'),
        ('resnet20', {'shortcut': 'none'}, 'shortcut must be'),
        ('vit', {'heads': 5}, '5 heads do not divide'),
    ]:
        with pytest.raises(JaxpruneError, match=message):
            nn.build(name, 10, **options).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


@pytest.mark.more
@pytest.mark.parametrize(
    'name', ['vit', *(pytest.param(n, marks=SLOW) for n in ('resnet20', 'mobilenet', 'vgg11'))]
)
def test_bfloat16_keeps_float32_parameters(name):
    """Expectation: parameters, statistics, logits float32; the numbers near those of float32."""
    options = {'width': 0.25} if 'width' in nn.model(name).options else {}
    x = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    outputs = []
    for dtype in ('float32', 'bfloat16'):
        module = nn.build(name, 10, dtype=dtype, **options)
        variables = jax.jit(module.init)(jax.random.key(0), x)
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
        outputs.append(np.asarray(jax.jit(module.apply)(variables, x)))
    assert outputs[1].dtype == np.float32
    different = abs(outputs[1] - outputs[0]).max() / abs(outputs[0]).max()
    assert 0 < different < 0.1


def test_a_sequence_of_tokens():
    """Expectation: logits of the classes, and another token changes them."""
    module = nn.Transformer(classes=3, vocabulary=11, dim=8, depth=1, heads=2)
    x = np.arange(10).reshape(2, 5)
    variables, apply = jax.jit(module.init)(jax.random.key(0), x), jax.jit(module.apply)
    logits = np.asarray(apply(variables, x))
    assert logits.shape == (2, 3)
    x[:, 2] = 0
    assert (logits != np.asarray(apply(variables, x))).all()


def test_published_ways_of_residual_blocks():
    """Expectation: option A has no weights where the shape changes; the projection has three."""
    shapes = {}
    for way in ('projection', 'pad'):
        module = nn.build('resnet20', 10, shortcut=way)
        variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
        shapes[way] = set(dict(tree.paths(variables['params'])))
    more = {path.split('/')[0] for path in shapes['projection'] - shapes['pad']}
    assert more == {
        f'stage{i}_block0_skip_{what}' for i, what in itertools.product((1, 2), ('conv', 'bn'))
    }
    assert not shapes['pad'] - shapes['projection']


DEVIATIONS = {
    'kaiming_normal': lambda fan_in, fan_out: (2 / fan_in) ** 0.5,
    'kaiming_normal_out': lambda fan_in, fan_out: (2 / fan_out) ** 0.5,
    'kaiming_normal_average': lambda fan_in, fan_out: (4 / (fan_in + fan_out)) ** 0.5,
    'xavier_normal': lambda fan_in, fan_out: (2 / (fan_in + fan_out)) ** 0.5,
    'xavier_uniform': lambda fan_in, fan_out: (2 / (fan_in + fan_out)) ** 0.5,
    'lecun_normal': lambda fan_in, fan_out: (1 / fan_in) ** 0.5,
    # uniform within 1 / sqrt(fan in)
    'pytorch': lambda fan_in, fan_out: (1 / (3 * fan_in)) ** 0.5,
    # columns of length 1 where there are no more of them than rows
    'orthogonal': lambda fan_in, fan_out: (1 / fan_in) ** 0.5,
}


@pytest.mark.parametrize('name', nn.INITIALISATIONS)
def test_kernels_are_drawn_as_asked(name):
    """Expectation: the standard deviations of the papers, within five standard errors."""
    for module, shape, path, fans in (
        (nn.build('mlp', 10, widths=[120], init=name), (10, 10, 3), 'dense_0/kernel', (300, 120)),
        (nn.build('small_vgg', 10, widths=[40], init=name), (8, 8, 3), 'conv_1/kernel', (360, 360)),
    ):
        x = np.zeros((1, *shape), np.float32)
        params = jax.jit(module.init)(jax.random.key(0), x)['params']
        kernel = np.asarray(tree.pick(params)[path])
        wanted = DEVIATIONS[name](*fans)
        assert abs(kernel.std() / wanted - 1) < 5 / (2 * kernel.size) ** 0.5
        if name == 'orthogonal':
            flat = kernel.reshape(-1, kernel.shape[-1])
            np.testing.assert_allclose(flat.T @ flat, np.eye(flat.shape[1]), atol=1e-5)
    with pytest.raises(JaxpruneError, match="did you mean 'kaiming_normal'"):
        nn.build('mlp', 10, init='kaiming_norm')


@pytest.mark.parametrize('sides', [(4, 6), (5, 7), (2, 3)])
def test_pooling_is_max_pooling(sides):
    """Expectation: flax's max pool and its gradient bit for bit, with many ties, and where values
    are not numbers.
    """
    draw = np.random.default_rng(0)
    x = draw.integers(0, 3, (3, *sides, 2)).astype(np.float32)
    weights = draw.standard_normal((3, sides[0] // 2, sides[1] // 2, 2)).astype(np.float32)

    def flax_pooled(x):
        return flax_nn.max_pool(x, (2, 2), (2, 2))

    @functools.partial(jax.jit, static_argnums=0)
    def both(pool, x):
        found, pull = jax.vjp(pool, x)
        return found, pull(weights)[0]

    for found, wanted in zip(both(pooled, x), both(flax_pooled, x), strict=True):
        np.testing.assert_array_equal(found, wanted)
    x[0, 0, 0, 0] = x[1, 1, 1, 1] = np.nan
    np.testing.assert_array_equal(both(pooled, x)[0], both(flax_pooled, x)[0])


@pytest.mark.slow
def test_paths_go_through_pooling(monkeypatch):
    """Expectation: the effective masks of the same net with flax's max pool."""
    module = nn.build('small_vgg', 10, widths=[3, 4])

    def effective():
        params = module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))['params']
        masks = {
            path: jax.random.bernoulli(jax.random.fold_in(jax.random.key(1), i), 0.1, leaf.shape)
            for i, (path, leaf) in enumerate(sorted(tree.pick(params).items()))
        }
        problem = jp.problem_from_flax(module, (8, 8, 1))
        return masks, structure.connectivity_of(problem, (8, 8, 1))(masks)

    masks, found = effective()
    monkeypatch.setattr('jaxprune.nn.vgg.pooled', lambda x: flax_nn.max_pool(x, (2, 2), (2, 2)))
    _, wanted = effective()
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert 0 < sum(int(m.sum()) for m in found.values()) < sum(int(m.sum()) for m in masks.values())
