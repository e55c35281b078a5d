"""LAMP against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import jaxprune as jp
from jaxprune.score import lamp

SIZE = 12  # one shape, one compilation
score = jax.jit(lambda w: lamp()(None, jp.View({'w': w}, None, None, None), None)['w'])
top_k = jax.jit(jp.top_k_mask)


def definition(weights: np.ndarray) -> np.ndarray:
    """`w² / sum of w_v² over v that rank as high`, from the largest; low index first of ties."""
    flat = np.abs(weights.reshape(-1)).astype(np.longdouble)
    order = np.argsort(-flat, kind='stable')
    sums = np.cumsum(flat[order] ** 2)
    result = np.zeros_like(flat)
    result[order] = np.divide(flat[order] ** 2, sums, where=sums > 0, out=np.zeros_like(sums))
    return result.reshape(weights.shape)


def test_example():
    """Expectation: 1/14, 4/13, 9/9."""
    np.testing.assert_allclose(score(jnp.array([-1.0, 2.0, 3.0])), [1 / 14, 4 / 13, 1], rtol=1e-7)


numbers = st.floats(-4, 4, width=32).filter(lambda v: v == 0 or abs(v) > 1e-3)


@given(arrays(np.float32, SIZE, elements=numbers | st.sampled_from([0.0, 1.0, -1.0, 2.0])))
@settings(max_examples=200, deadline=None, database=None)
def test_definition_order_and_ties(weights):
    """Expectation: the definition; and within a leaf every selection by LAMP is the selection by
    magnitude, ties by the lowest index included."""
    ours = np.asarray(score(weights))
    np.testing.assert_allclose(ours, definition(weights).astype(np.float64), rtol=1e-6)
    alive = np.abs(weights) > 0
    squares = weights[alive].astype(np.float64) ** 2
    if squares.min(initial=1) > 1e-5 * squares.sum():  # else float32 sums do not rise from one on
        assert len(set(ours[alive].tolist())) == alive.sum()  # equal weights score differently
    for k in range(int(alive.sum()) + 1):
        np.testing.assert_array_equal(top_k(ours, k), top_k(jnp.abs(weights), k))


@given(
    arrays(np.float32, SIZE, elements=st.floats(0.125, 4, width=32)),
    st.integers(-110, 110),
    st.floats(0.01, 100),
)
@settings(max_examples=100, deadline=None, database=None)
def test_scale_of_a_layer(weights, power, factor):
    """Expectation: the quotient has no unit. In float32 exactly so for powers of two, though the
    squares of such weights overflow or vanish; to rounding for other factors."""
    once = np.asarray(score(weights))
    np.testing.assert_array_equal(score(weights * np.float32(2.0**power)), once)
    np.testing.assert_allclose(score(weights * np.float32(factor)), once, rtol=3e-6)


@pytest.mark.more
@pytest.mark.parametrize('values', ['normal', 'equal'])
def test_millions_of_weights_in_single_precision(values):
    """Expectation: the definition in extended precision, to 1e-6; the order of the magnitudes."""
    draw = np.random.default_rng(0)
    size = 1_500_000
    weights = np.ones(size) if values == 'equal' else draw.standard_normal(size)
    weights = weights.astype(np.float32)
    ours, expected = np.asarray(score(weights)), definition(weights).astype(np.float64)
    assert abs(ours / expected - 1).max() <= 1e-6
    order = np.argsort(-abs(weights), kind='stable')
    assert (np.diff(ours[order]) <= 0).all()


def test_nothing_left_of_a_layer():
    """Expectation: zeros, never NaN; a pruned weight scores 0 beside a living one too."""
    np.testing.assert_array_equal(score(jnp.zeros((3, 2))), 0)
    np.testing.assert_array_equal(score(jnp.array([0.0, 5.0])), [0, 1])


def test_every_layer_keeps_its_best():
    """Expectation: the largest weight of a leaf scores 1, so a global choice of one weight per leaf
    empties none, whatever the scales."""
    draw = np.random.default_rng(1)
    weights = {f'l{i}': jnp.asarray(draw.normal(size=(4, 4)) * 10.0**-i) for i in range(3)}
    scores = {path: score(w) for path, w in weights.items()}
    masks = jp.global_top_k(scores, {'*': 3})
    assert [int(m.sum()) for m in masks.values()] == [1, 1, 1]
    for path, mask in masks.items():
        assert bool(mask.reshape(-1)[jnp.abs(weights[path]).argmax()])
