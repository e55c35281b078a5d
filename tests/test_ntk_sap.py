"""NTK-SAP: expectations in closed form, the kernel's trace, the statistics of a noise batch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import jaxprune as jp
from jaxprune.errors import PruneError
from jaxprune.score import ntk_sap
from jaxprune.score.ntk_sap import batch_statistics, output_change

KEY = jax.random.key(4)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def scalar_problem(scales=(0.7, 1.3)):
    """`f(x) = a b x` with Gaussian a and b."""

    def init(key):
        keys = jax.random.split(key)
        draw = [s * jax.random.normal(k, (1, 1)) for s, k in zip(scales, keys, strict=True)]
        return {name: {'w': w} for name, w in zip('ab', draw, strict=True)}

    return jp.problem_from_functions(init, lambda p, x: x @ p['a']['w'] @ p['b']['w'])


def shape_of_input(*shape: int) -> jp.Batch:
    return jp.Batch(jnp.full((1, 1, *shape), jnp.nan), jnp.zeros((1, 1), int))


def test_expectation_for_a_product_of_two_weights():
    """Expectation: `E (m n x (e a D' + e b D + e^2 D D'))^2 = (e^2 (s + t) + e^4) m^2 n^2` for
    variances s and t, so both scores are twice that on average, and their variance falls with the
    number of repeats.

    No gradient is negative here, so the absolute value adds no bias. Within five standard errors
    over 30000 keys, which are 5 % of it.
    """
    epsilon, scales = 0.5, (0.7, 1.3)
    problem = scalar_problem(scales)
    view = jp.view(problem, jax.jit(problem.init)(KEY)[0])
    keys = jax.random.split(KEY, 30_000)
    expected = 2 * (epsilon**2 * (scales[0] ** 2 + scales[1] ** 2) + epsilon**4)
    spread = {}
    for repeats in (1, 2):
        score = ntk_sap(problem, train=True, samples=4, repeats=repeats, epsilon=epsilon)
        drawn = jax.jit(jax.vmap(lambda key: score(key, view, shape_of_input(1))))(keys)  # noqa: B023
        for path in ('a/w', 'b/w'):
            sample = np.asarray(drawn[path])
            error = sample.std() / np.sqrt(sample.size)
            assert error <= 0.05 * expected
            assert abs(sample.mean() - expected) <= 5 * error, path
        spread[repeats] = sample.var()
    assert 1.5 <= spread[1] / spread[2] <= 2.6


def test_expectation_is_the_trace_of_the_kernel():
    """Expectation: averaged over Δ the change is `ε² mean_x ‖J m‖²`, J the Jacobian by the masked
    weights, and so are its gradients by the masks, but for terms of order ε^4.

    A quadratic form's mean over standard normals is its sum over the unit vectors, and the sum
    over both signs removes odd orders: no sampling.
    """
    draw = np.random.default_rng(2)
    shapes = [(3, 4), (4, 3), (3, 2)]
    params = [{'w': jnp.asarray(draw.standard_normal(shape))} for shape in shapes]

    def apply(p, x):
        x = jnp.tanh(x @ p[0]['w'])
        return jnp.tanh(x @ p[1]['w']) @ p[2]['w']

    problem = jp.problem_from_functions(lambda key: params, apply)
    x = jnp.asarray(draw.standard_normal((5, 3)))
    masks = {f'{i}/w': jnp.asarray(draw.random(s) < 0.7, float) for i, s in enumerate(shapes)}
    flat, unflatten = ravel_pytree(masks)
    epsilon = 1e-4

    def mean_change(flat_masks):
        def change(noise):
            return output_change(problem, unflatten(flat_masks), unflatten(noise), params, {}, x)

        units = epsilon * jnp.eye(flat.size)
        return jax.vmap(change)(jnp.concatenate([units, -units])).sum() / 2

    def trace(flat_masks):
        def outputs(weights):
            layers = [{'w': w} for w in unflatten(weights).values()]
            return apply(layers, x)

        weights, _ = ravel_pytree({f'{i}/w': p['w'] for i, p in enumerate(params)})
        jacobian = jax.jacfwd(outputs)(flat_masks * weights)  # (x, outputs, weights)
        return ((jacobian * flat_masks) ** 2).sum() / len(x)

    ours, ours_grad = jax.jit(jax.value_and_grad(mean_change))(flat)
    reference, reference_grad = jax.jit(jax.value_and_grad(trace))(flat)
    np.testing.assert_allclose(ours / epsilon**2, reference, rtol=1e-7)
    scale = abs(reference_grad).max()
    np.testing.assert_allclose(ours_grad / epsilon**2, reference_grad, atol=1e-6 * scale, rtol=0)


class Normed(nn.Module):
    """Two batch norms with different momenta, and a counter that is no average."""

    @nn.compact
    def __call__(self, x, train: bool):
        def norm(momentum, name):
            return nn.BatchNorm(
                use_running_average=not train, momentum=momentum, dtype=x.dtype, name=name
            )

        calls = self.variable('counters', 'calls', lambda: jnp.array(3, jnp.int32))
        if train:
            calls.value = calls.value + 1
        x = nn.relu(norm(0.99, 'a')(nn.Dense(6, name='in', param_dtype=x.dtype)(x)))
        x = nn.relu(norm(0.5, 'b')(nn.Dense(5, name='mid', param_dtype=x.dtype)(x)))
        return nn.Dense(3, name='out', param_dtype=x.dtype)(x)


@pytest.mark.parametrize(('dtype', 'tolerance'), [(jnp.float64, 1e-8), (jnp.float32, 3e-5)])
def test_statistics_of_a_batch(dtype, tolerance):
    """Expectation: evaluated with them the network computes what it computes in train mode, to
    rounding over 1 - momentum; a counter keeps its value; the state given does not matter."""
    problem = jp.problem_from_flax(Normed(), (4,))
    params, state = jax.tree.map(
        lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a,
        jax.jit(problem.init)(KEY),
    )
    x = jnp.asarray(3 + 50 * np.random.default_rng(0).standard_normal((40, 4)), dtype)

    @jax.jit
    def outputs(state):
        statistics = batch_statistics(problem, params, state, x, KEY)
        train, _ = problem.apply(params, state, x, train=True, key=None)
        fixed, _ = problem.apply(params, statistics, x, train=False, key=None)
        running, _ = problem.apply(params, state, x, train=False, key=None)
        return statistics, train, fixed, running

    statistics, train, fixed, running = outputs(state)
    np.testing.assert_allclose(fixed, train, atol=tolerance * float(abs(train).max()), rtol=0)
    hidden = x @ params['in']['kernel'] + params['in']['bias']
    found = statistics['batch_stats']['a']
    np.testing.assert_allclose(found['mean'], hidden.mean(0), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(found['var'], hidden.var(0), rtol=tolerance)
    assert statistics['counters']['calls'] == 3
    assert abs(running - train).max() > 0.1 * abs(train).max()  # it matters which are used


def test_weights_and_data_at_hand_are_not_looked_at():
    """Expectation: the docstring: fresh weights per repeat, and of an input the shape only; so a
    view with other weights and NaN inputs scores the same, and another key does not. Pruned
    weights score 0."""
    shapes = {'a': (4, 5), 'b': (5, 3)}

    def init(key):
        return {name: {'w': jax.random.normal(key, shape)} for name, shape in shapes.items()}

    problem = jp.problem_from_functions(init, lambda p, x: jnp.tanh(x @ p['a']['w']) @ p['b']['w'])
    params = {name: {'w': jnp.ones(shape)} for name, shape in shapes.items()}
    masks = {p: jnp.arange(w.size).reshape(w.shape) % 3 > 0 for p, w in jp.pick(params).items()}
    view = jp.view(problem, params, masks=masks)
    other = jp.view(problem, jax.tree.map(lambda p: p + 1, params), masks=masks)
    score = jax.jit(ntk_sap(problem, train=True, samples=8))
    first = score(KEY, view, shape_of_input(4))
    again = score(KEY, other, jp.Batch(jnp.ones((1, 1, 4)), jnp.ones((1, 1), int)))
    moved = score(jax.random.key(9), view, shape_of_input(4))
    for path, leaf in first.items():
        assert (np.asarray(leaf) > 0).tolist() == masks[path].tolist()
        np.testing.assert_array_equal(leaf, again[path])
        assert (np.asarray(leaf) != np.asarray(moved[path])).any()


def test_bad_arguments():
    """Expectation: errors that say what is allowed, or what to pass."""
    problem = scalar_problem()
    with pytest.raises(PruneError, match='1 sample and 1 repeat or more, not 0, 1'):
        ntk_sap(problem, train=True, samples=0)
    view = jp.view(problem, problem.init(KEY)[0])
    with pytest.raises(PruneError, match='needs the shape of an input: pass batches'):
        ntk_sap(problem, train=True)(KEY, view, None)
