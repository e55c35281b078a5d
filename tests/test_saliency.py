"""Scores made of the loss's gradient, against gradients written out in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import gradients, kernels, mean_gradient, setting
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune.errors import PruneError
from jaxprune.score import fisher, force, gradient_norm, snip, taylor

KEY = jax.random.key(5)
TOLERANCE = 1e-12  # of the largest of a leaf, float64


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def assert_close(ours, expected, tolerance: float = TOLERANCE) -> None:
    assert list(ours) == list(expected)
    for path, reference in expected.items():
        error = np.abs(np.asarray(ours[path]) - reference).max() / np.abs(reference).max()
        assert error <= tolerance, f'{path}: {error:.2g}'


def per_batch(params, batches):
    """The kernels' gradients of each batch, stacked."""
    each = [kernels(mean_gradient(params, x, y)) for x, y in zip(batches.x, batches.y, strict=True)]
    return {path: np.stack([g[path] for g in each]) for path in each[0]}


@pytest.mark.parametrize('power', [1, 2])
def test_taylor_averages_the_change_of_each_batch(power):
    """Expectation: `mean_b |w g_b|**power`, with gradients by hand."""
    problem, view, batches, params = setting(batches=3)
    ours = jax.jit(taylor(problem, train=False, power=power))(KEY, view, batches)
    g, w = per_batch(params, batches), kernels(params)
    assert_close(ours, {path: (abs(w[path] * g[path]) ** power).mean(0) for path in w})


def test_taylor_and_snip():
    """Expectation: the triangle inequality, strict where batches disagree; of one batch the same.
    And Jensen's: the mean of squares is at least the square of the mean."""
    problem, view, batches, _ = setting(batches=3)
    first = jax.jit(taylor(problem, train=False))
    sensitivity = jax.jit(snip(problem, train=False))
    one = jax.tree.map(lambda leaf: leaf[:1], batches)
    assert_close(first(KEY, view, one), sensitivity(KEY, view, one))
    squares = jax.jit(taylor(problem, train=False, power=2))(KEY, view, batches)
    for path, leaf in first(KEY, view, batches).items():
        cancelled = np.asarray(sensitivity(KEY, view, batches)[path])
        assert (leaf >= cancelled * (1 - 1e-12)).all()
        assert (leaf > 1.5 * cancelled).any()
        assert (squares[path] >= leaf**2 * (1 - 1e-12)).all()


def test_fisher_squares_each_example():
    """Expectation: `w² mean_n(g_n²) / 2` by hand; cutting the data into batches changes nothing,
    though it would change the square of the batch's mean."""
    problem, view, batches, params = setting(batches=2)
    whole = jax.tree.map(lambda a: a.reshape(1, -1, *a.shape[2:]), batches)
    g = kernels(gradients(params, whole.x[0], whole.y[0]))
    w = kernels(params)
    expected = {path: w[path] ** 2 * (g[path] ** 2).mean(0) / 2 for path in w}
    score = jax.jit(fisher(problem))
    assert_close(score(KEY, view, batches), expected)
    assert_close(score(KEY, view, whole), expected)
    of_means = {path: w[path] ** 2 * g[path].mean(0) ** 2 / 2 for path in w}
    assert all(of_means[path].sum() < 0.9 * expected[path].sum() for path in w)


def test_fisher_of_the_models_own_labels():
    """Expectation: over keys, the mean over classes weighted by the softmax, by hand; 4000 keys
    come within five standard errors of it at every weight."""
    problem, view, batches, params = setting(batches=2, examples=2)
    score = fisher(problem, labels='model')
    keys = jax.random.split(KEY, 4000)
    drawn = jax.jit(jax.vmap(lambda key: score(key, view, batches)))(keys)
    x, w = np.asarray(batches.x).reshape(-1, 5), kernels(params)
    logits = np.asarray(problem.apply(view.params, {}, x, train=False, key=None)[0])
    share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for path in w:
        expected = 0.0
        for label in range(3):
            g = kernels(gradients(params, x, np.full(len(x), label)))[path]
            expected += (share[:, label, None, None] * g**2).mean(0)
        expected = expected * w[path] ** 2 / 2
        sample = np.asarray(drawn[path])
        error = sample.std(0) / np.sqrt(len(keys))
        assert (abs(sample.mean(0) - expected) <= 5 * error + 1e-12).all(), path


def test_gradient_norm():
    """Expectation: the square of the mean gradient by hand, also where a weight is pruned."""
    problem, view, batches, params = setting(batches=2)
    masks = {path: np.arange(w.size).reshape(w.shape) % 3 > 0 for path, w in view.weights.items()}
    pruned = [{**p, 'w': p['w'] * masks[f'{i}/w']} for i, p in enumerate(params)]
    view = jp.view(problem, view.params, masks=jax.tree.map(jnp.asarray, masks))
    ours = jax.jit(gradient_norm(problem, train=False))(KEY, view, batches)
    g = per_batch(pruned, batches)
    assert_close(ours, {path: g[path].mean(0) ** 2 for path in g})
    assert all((np.asarray(ours[path])[~masks[path]] > 0).any() for path in g)


def test_force_scores_what_is_pruned():
    """Expectation: `|θ0 g(m θ0)|` with the gradient by hand; at the dense network it is SNIP."""
    problem, view, batches, params = setting(batches=2)
    score = jax.jit(force(problem, train=False))
    dense = score(KEY, view._replace(initial=view.weights), batches)
    assert_close(dense, jax.device_get(jax.jit(snip(problem, train=False))(KEY, view, batches)))
    masks = {path: np.arange(w.size).reshape(w.shape) % 3 > 0 for path, w in view.weights.items()}
    pruned = [{**p, 'w': p['w'] * masks[f'{i}/w']} for i, p in enumerate(params)]
    at_mask = jp.view(problem, view.params, masks=jax.tree.map(jnp.asarray, masks))
    ours = score(KEY, at_mask._replace(initial=view.weights), batches)
    g, w = per_batch(pruned, batches), kernels(params)
    assert_close(ours, {path: abs(w[path] * g[path].mean(0)) for path in w})
    assert all((np.asarray(ours[path])[~masks[path]] > 0).any() for path in w)


def test_force_needs_the_initial_weights():
    """Expectation: one line that says who must keep them."""
    problem, view, batches, _ = setting()
    with pytest.raises(PruneError, match=r'the pruner must keep them \(view\.initial\)'):
        force(problem, train=False)(KEY, view, batches)


@functools.cache
def rescaled():
    """`a -> scores` of a bias-free network whose first layer is multiplied by a, the next divided.

    It computes the same function, since a ReLU passes positive factors on.
    """
    problem, view, batches, _ = setting(batches=2, bias=0.0)
    scores = {
        'snip': snip(problem, train=False),
        'taylor': taylor(problem, train=False),
        'fisher': fisher(problem),
        'gradient_norm': gradient_norm(problem, train=False),
    }

    def at(a):
        weights = {**view.weights, '0/w': view.weights['0/w'] * a, '1/w': view.weights['1/w'] / a}
        moved = view._replace(weights=weights)
        return {name: score(KEY, moved, batches) for name, score in scores.items()}

    return jax.jit(at)


@given(a=st.floats(0.03, 30.0))
@settings(max_examples=20, deadline=None, database=None)
def test_what_a_rescaling_of_layers_does(a):
    """Expectation: `w g` has no unit, so SNIP, Taylor and Fisher stay as they are, and the squared
    gradient changes by the inverse square of its layer's factor."""
    with jax.enable_x64(True):
        before, after = rescaled()(1.0), rescaled()(a)
    for name in ('snip', 'taylor', 'fisher'):
        assert_close(after[name], jax.device_get(before[name]), 1e-9)
    factors = {'0/w': a**-2, '1/w': a**2, '2/w': 1.0}
    expected = {p: np.asarray(before['gradient_norm'][p]) * f for p, f in factors.items()}
    assert_close(after['gradient_norm'], expected, 1e-9)


def test_bad_arguments():
    """Expectation: errors when a score is built, or where it lacks data, each with a way out."""
    problem, view, _, _ = setting()
    with pytest.raises(PruneError, match='power 1 or 2, not 3'):
        taylor(problem, train=False, power=3)
    with pytest.raises(PruneError, match='score with train=False'):
        fisher(problem, train=True)
    with pytest.raises(PruneError, match="unknown labels 'dat': did you mean 'data'"):
        fisher(problem, labels='dat')
    view = view._replace(initial=view.weights)
    for score in (
        taylor(problem, train=False),
        fisher(problem),
        fisher(problem, labels='model'),
        gradient_norm(problem, train=False),
        force(problem, train=False),
    ):
        with pytest.raises(PruneError, match='needs data: pass batches'):
            score(KEY, view, None)
