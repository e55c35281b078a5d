"""ProsPr against central differences of its own definition, computed in NumPy."""

import jax
import numpy as np
import pytest
from by_hand import kernels, loss, mean_gradient, setting

from jaxprune.errors import PruneError
from jaxprune.score import prospr, snip

KEY = jax.random.key(2)
RATE = 0.3


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def after_steps(params, batches, steps: int):
    """All parameters after some steps of gradient descent; step i takes batch i, then anew."""
    for step in range(steps):
        i = step % len(batches.x)
        g = mean_gradient(params, np.asarray(batches.x[i]), np.asarray(batches.y[i]))
        params = jax.tree.map(lambda p, g: p - RATE * g, params, g)
    return params


def final_loss(params, batches, steps: int) -> float:
    i = steps % len(batches.x)
    end = after_steps(params, batches, steps)
    return loss(end, np.asarray(batches.x[i]), np.asarray(batches.y[i]))


@pytest.mark.parametrize(('steps', 'count'), [(3, 2), pytest.param(3, 1, marks=pytest.mark.more)])
def test_finite_differences(steps, count):
    """Expectation: `|L(c + h) - L(c - h)| / 2h` for every entry of the mask at 1; a single batch
    serves all steps and the loss."""
    problem, view, batches, params = setting(batches=count)
    score = prospr(problem, train=False, steps=steps, learning_rate=RATE)
    ours = jax.device_get(jax.jit(score)(KEY, view, batches))
    h = 1e-5
    for layer, (path, leaf) in enumerate(ours.items()):
        expected = np.zeros(leaf.shape)
        for place in np.ndindex(leaf.shape):
            ends = []
            for sign in (1, -1):
                moved = jax.tree.map(np.array, params)
                moved[layer]['w'][place] *= 1 + sign * h
                ends.append(final_loss(moved, batches, steps))
            expected[place] = abs(ends[0] - ends[1]) / (2 * h)
        assert abs(leaf - expected).max() <= 1e-7 * expected.max(), path
    # The steps matter: it is not SNIP in disguise.
    plain = jax.jit(snip(problem, train=False))(KEY, view, batches)
    assert any(abs(ours[p] - plain[p]).max() > 0.1 * plain[p].max() for p in ours)


def test_first_order():
    """Expectation: `|θ0 * dL/dθ|` at the end of the steps, with the gradient by hand."""
    problem, view, batches, params = setting(batches=2)
    score = prospr(problem, train=False, steps=3, learning_rate=RATE, first_order=True)
    ours = jax.jit(score)(KEY, view, batches)
    end = after_steps(params, batches, 3)
    g = kernels(mean_gradient(end, np.asarray(batches.x[1]), np.asarray(batches.y[1])))
    for path, w in kernels(params).items():
        expected = abs(w * g[path])
        assert abs(ours[path] - expected).max() <= 1e-12 * expected.max(), path


def test_without_steps_it_is_snip():
    """Expectation: the derivative with respect to the mask at 1."""
    problem, view, batches, _ = setting()
    ours = jax.jit(prospr(problem, train=False, steps=0))(KEY, view, batches)
    for path, leaf in jax.jit(snip(problem, train=False))(KEY, view, batches).items():
        np.testing.assert_allclose(ours[path], leaf, rtol=1e-12)


def test_bad_arguments():
    """Expectation: errors that say what is allowed, or what to pass."""
    problem, view, _, _ = setting()
    with pytest.raises(PruneError, match='0 steps or more, not -1'):
        prospr(problem, train=True, steps=-1)
    with pytest.raises(PruneError, match='needs data: pass batches'):
        prospr(problem, train=True)(KEY, view, None)
