"""The family of importances: the numbers of its authors' code, its points, its identities.

`flowandprune_vgg13narrow` holds outputs of EkdeepSLubana/flowandprune (890a712) on a VGG-13 of 6 to
12 maps, one number per filter, in evaluation mode; see `golden/README.md`. Float64, 1e-9 of the
largest of a layer.
"""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published import golden
from test_golden import nested
from test_scores import Bare, Normed, loss_gradient, setting

import jaxprune as jp
from jaxprune import score, tree
from jaxprune.score.derivatives import derivatives
from jaxprune.score.group_sums import grouped, spread
from jaxprune.score.importance import MEASURES, importance

KEY = jax.random.key(0)
TOLERANCE = 1e-9
CONVS = [f'conv_{i}' for i in range(10)]


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


class VGG13(nn.Module):
    """`VGG_p` of the study: convolution, ReLU, batch norm; max pools after every second one."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        for i, maps in enumerate(self.widths):
            x = nn.relu(nn.Conv(maps, (3, 3), padding=1, use_bias=False, name=f'conv_{i}')(x))
            x = nn.BatchNorm(use_running_average=not train, epsilon=1e-5, name=f'bn_{i}')(x)
            if i % 2:
                x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10, name='classifier')(x.reshape(x.shape[0], -1))


@functools.cache
def study(prunable=tree.kernels):
    """File, problem, view with initial weights, batches of gradients, batches of classes."""
    file = golden('flowandprune_vgg13narrow')
    problem = jp.problem_from_flax(
        VGG13(tuple(file['meta/widths'].tolist())), (32, 32, 3), prunable=prunable
    )
    params = nested(file, 'params', jnp.float64)
    state = {'batch_stats': nested(file, 'batch_stats', jnp.float64)}
    view = jax.jit(functools.partial(jp.view, problem))(params, state)
    initial = {**view.weights}
    for name in CONVS:
        if f'{name}/kernel' in initial:
            initial[f'{name}/kernel'] = jnp.asarray(file[f'inputs/init_conv_kernel/{name}'])
    size, stop = int(file['meta/batch_size']), int(file['meta/num_stop'])
    used = -(-stop // size) * size  # whole batches, until there are enough examples

    def cut(x, y, batch):
        x = np.asarray(x, np.float64)
        return jp.Batch(
            jnp.asarray(x.reshape(-1, batch, *x.shape[1:])), jnp.asarray(y).reshape(-1, batch)
        )

    batches = cut(file['inputs/x'][:used], file['inputs/y'][:used], size)
    classes = cut(
        file['inputs/grasp_x'], file['inputs/grasp_y'], int(file['meta/n_samples_per_class'])
    )
    return file, problem, view._replace(initial=initial), batches, classes


def filters(scores) -> dict[str, np.ndarray]:
    """The common score of each filter's weights, by convolution."""
    found = {}
    for name in CONVS:
        leaf = np.asarray(scores[f'{name}/kernel'])
        flat = leaf.reshape(-1, leaf.shape[-1])
        assert (flat == flat[0]).all()
        found[name] = flat[0]
    return found


def assert_is(found: dict[str, np.ndarray], file, name: str) -> None:
    for conv in CONVS:
        expected = file[f'out/{name}/{conv}']
        assert np.abs(found[conv] - expected).max() <= TOLERANCE * np.abs(expected).max(), conv


FIRST = {
    'mag_based': MEASURES['magnitude'],
    'loss_based': MEASURES['loss_preservation'],
    'biased_loss': MEASURES['biased_loss_preservation'],
    'biased_loss_init': {'order': 1, 'bias': 'distance_from_initial'},
    'tfo': {'order': 1, 'mode': 'abs_of_sum'},
}
SECOND = {
    'grasp': MEASURES['gradient_norm_increase'],
    'grad_preserve': MEASURES['gradient_norm_preservation'],
}


SINGLE = {'biased_loss_tracked': {'by': 'weight'}}


@contextlib.contextmanager
def derivatives_once(problem, view, batches, temperature):
    """All measures use the same derivatives: each is traced and computed once."""
    options = {'train': False, 'temperature': temperature}

    @functools.cache
    def gradient():
        at = derivatives(problem, KEY, view, batches, **options)
        return at._replace(product=functools.cache(lambda: at.product(at.gradient)))

    def once(*args, **asked):
        assert args == (problem, KEY, view, batches) and asked == options
        return gradient()._replace(product=lambda vector: gradient().product())

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(importance.__globals__, 'derivatives', once)
        yield


@functools.cache
def compiled(names: tuple[str, ...]):
    """Measures of the study in one program; the temperature is traced, so it serves them all."""
    problem, points = study()[1], {**FIRST, **SECOND, **SINGLE}

    def measure(temperature, view, batches):
        options = {n: {'by': 'unit', **points[n], 'temperature': temperature} for n in names}
        with derivatives_once(problem, view, batches, temperature):
            return {
                n: importance(problem, **asked)(KEY, view, batches) for n, asked in options.items()
            }

    return jax.jit(measure)


@functools.cache
def first(temperature):
    """Measures of order zero and one at a temperature."""
    _, _, view, batches, _ = study()
    return jax.device_get(compiled((*FIRST, *SINGLE))(temperature, view, batches))


@functools.cache
def of_the_weights():
    """Taylor's squares and magnitudes, of kernels and of what belongs to batch norm."""
    _, problem, view, batches, _ = study(jp.rules((r'bn_\d+/', True)))

    def both(view, batches):
        squares = score.taylor(problem, train=False, power=2)(KEY, view, batches)
        return squares, score.magnitude()(KEY, view, None)

    return jax.device_get(jax.jit(both)(view, batches))


@pytest.mark.optimised
@pytest.mark.parametrize('temperature', [1, 5])
def test_orders_zero_and_one_are_those_of_the_authors(temperature):
    """Expectation: their code's numbers; their magnitude is the norm, ours its square."""
    file = study()[0]
    for name in FIRST:
        found = filters(first(temperature)[name])
        if name == 'mag_based':
            assert_is({conv: np.sqrt(v) for conv, v in found.items()}, file, f'{name}_f64')
        elif f'out/{name}_T{temperature}_f64/conv_0' in file:
            assert_is(found, file, f'{name}_T{temperature}_f64')
        else:
            assert (name, temperature) == ('biased_loss_init', 5)


@pytest.mark.more
@pytest.mark.optimised
def test_order_two_is_that_of_the_authors():
    """Expectation: their code's numbers; gradient and Hessian of all parameters, class batches."""
    file, _, view, _, classes = study()
    for temperature in (1, 200):  # one case: a process of its own would compile it once more
        for name, scores in compiled(tuple(SECOND))(temperature, view, classes).items():
            assert_is(filters(scores), file, f'{name}_T{temperature}_f64')


def test_further_measures_of_the_authors():
    """Expectation: their code's numbers, from scores that jaxprune has anyway.

    `fisher` sums squared batch gradients, Taylor's power 2; `l1` sums magnitudes;
    `biased_loss_tracked`, for a first batch, is |w g| weight by weight.
    """
    file = study()[0]
    for name, scores in zip(('fisher_T1', 'l1'), of_the_weights(), strict=True):
        units = grouped({c: scores[f'{c}/kernel'] for c in CONVS}, 'unit')
        assert_is(units, file, f'{name}_f64')
    single = first(1)['biased_loss_tracked']
    assert_is({c: single[f'{c}/kernel'] for c in CONVS}, file, 'biased_loss_tracked_T1_f64')


def test_measures_of_batch_norm_of_the_authors():
    """Expectation: `bn` is |γ|, `nvidia` is γ² E[g_γ²] + β² E[g_β²] over batches."""
    file = study()[0]
    squares, sizes = of_the_weights()
    norms = {c: c.replace('conv', 'bn') for c in CONVS}
    both = {c: squares[f'{bn}/scale'] + squares[f'{bn}/bias'] for c, bn in norms.items()}
    assert_is(both, file, 'nvidia_T1_f64')
    assert_is({c: sizes[f'{bn}/scale'] for c, bn in norms.items()}, file, 'bn_f64')


def test_points_of_the_family_are_scores_of_their_own():
    """Expectation: weight by weight, order 0 ranks as magnitude, order 1 is SNIP; order 2, where
    all parameters are prunable, is GraSP."""
    problem, view, batches = setting(Normed())
    magnitude = jax.jit(importance(problem, order=0))(KEY, view, None)
    snip = jax.jit(importance(problem))(KEY, view, batches)
    expected = jax.jit(jp.snip(problem, train=False))(KEY, view, batches)
    for path, w in view.weights.items():
        np.testing.assert_allclose(magnitude[path], np.asarray(w) ** 2, rtol=1e-12)
        np.testing.assert_allclose(snip[path], expected[path], rtol=1e-9, atol=1e-15)
    problem, view, batches = setting(Bare(False))  # no biases, no norm
    found = importance(problem, **MEASURES['gradient_norm_increase'])
    found = jax.jit(found)(KEY, view, batches)
    expected = jax.jit(jp.grasp(problem, train=False))(KEY, view, batches)
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-9, atol=1e-20)


@pytest.mark.parametrize('temperature', [1.0, 200.0])
def test_layer_sums_without_norm(temperature):
    """Expectation: `Σ_l θ Hg = ‖g‖² - ‖g_l‖² + c`, c the same for all layers (homogeneity)."""
    problem, view, batches = setting(Bare(True))
    measure = importance(problem, order=2, mode='signed', by='layer', temperature=temperature)
    sums = {p: float(v.ravel()[0]) for p, v in jax.jit(measure)(KEY, view, batches).items()}
    g = loss_gradient(problem, view, batches, train=False, temperature=temperature)
    constants = np.array([sums[path] + (g[path] ** 2).sum() for path in sums])
    assert np.ptp(constants) <= 1e-9 * np.abs(constants).max()


def test_filters_before_batch_norm():
    """Expectation: with batch statistics Σ θ g = 0 and Σ θ Hg = -‖g_p‖² for every filter, so
    loss preservation with the absolute value after the sum sees nothing there, before it does."""
    problem, view, batches = setting(Normed())
    g = loss_gradient(problem, view, batches, train=True)

    def of(**options):
        measure = importance(problem, train=True, by='unit', **options)
        return jax.jit(measure)(KEY, view, batches)

    first, sizes = of(order=1, mode='signed'), of(order=1)
    second, preserved = of(order=2, mode='signed'), of(order=2, mode='abs_of_sum')
    for path in ('conv/kernel', 'hidden/kernel'):
        square = (np.asarray(g[path]) ** 2).reshape(-1, g[path].shape[-1]).sum(0)
        assert np.abs(first[path]).max() <= 1e-9 * np.asarray(sizes[path]).max()
        assert np.asarray(sizes[path]).min() > 0
        for leaf, sign in ((second, -1), (preserved, 1)):
            flat = np.asarray(leaf[path]).reshape(-1, len(square))
            np.testing.assert_allclose(flat, np.broadcast_to(sign * square, flat.shape), rtol=1e-9)


def test_groups_by_hand():
    """Expectation: sums written out; `spread` gives every weight its group's sum."""
    values = {'a': np.arange(6.0).reshape(2, 3), 'b': np.ones((2, 2, 2, 2))}
    units = grouped(values, 'unit')
    np.testing.assert_array_equal(units['a'], [3, 5, 7])
    np.testing.assert_array_equal(units['b'], [8, 8])
    np.testing.assert_array_equal(grouped(values, 'unit', axis=0)['a'], [3, 12])
    np.testing.assert_array_equal(grouped(values, 'layer')['a'], 15)
    np.testing.assert_array_equal(grouped(values, 'network')['*'], 31)
    np.testing.assert_array_equal(
        spread(grouped(values, 'unit', axis=0), values, 'unit', axis=0)['a'], [[3] * 3, [12] * 3]
    )
    np.testing.assert_array_equal(spread(units, values, 'unit')['a'], [[3, 5, 7]] * 2)
    np.testing.assert_array_equal(spread(grouped(values, 'network'), values, 'network')['b'], 31.0)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'order': 3}, 'importance has the order 0, 1 or 2, not 3'),
        ({'mode': 'sign'}, "unknown mode 'sign': did you mean 'signed'"),
        ({'bias': 'size'}, "unknown bias 'size'"),
        ({'by': 'units'}, "unknown groups 'units': did you mean 'unit'"),
        ({'temperature': 0.0}, 'temperature of importance must be above 0'),
    ],
)
def test_what_the_family_does_not_have(options, message):
    problem, *_ = setting(Bare(False))
    with pytest.raises(jp.PruneError, match=message):
        importance(problem, **options)


def test_a_bias_by_distance_needs_initial_weights():
    problem, view, batches = setting(Bare(False))
    with pytest.raises(jp.PruneError, match='needs a view with initial weights'):
        jax.jit(importance(problem, bias='distance_from_initial'))(KEY, view, batches)
