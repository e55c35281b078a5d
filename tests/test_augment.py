"""Augmentations against plain loops over the same draws; their laws follow from the definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune.data import AUGMENTATIONS, augmentation, flip, pad_crop
from jaxprune.data.augment import crop_offsets, flip_coins
from jaxprune.errors import DataError

FEW = settings(max_examples=10, deadline=None)  # every new shape is compiled anew


def some_images(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, np.float32)


offsets = jax.jit(crop_offsets, static_argnums=(1, 2))
shapes = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 3]))


@FEW
@given(seed=st.integers(0, 2**31 - 1), shape=shapes, padding=st.integers(0, 4))
def test_pad_crop_is_a_window_of_the_padded_image(seed, shape, padding):
    """Expectation: a loop that pads one image and slices it at the corner drawn for it."""
    images, key = some_images(seed, shape), jax.random.key(seed)
    corners = np.asarray(offsets(key, shape[0], padding))
    expected = []
    for image, (row, column) in zip(images, corners, strict=True):
        padded = np.zeros((shape[1] + 2 * padding, shape[2] + 2 * padding, shape[3]), np.float32)
        padded[padding : padding + shape[1], padding : padding + shape[2]] = image
        expected.append(padded[row : row + shape[1], column : column + shape[2]])
    np.testing.assert_array_equal(jax.jit(pad_crop(padding))(key, images), expected)


@FEW
@given(seed=st.integers(0, 2**31 - 1), shape=shapes)
def test_flip_mirrors_where_the_coin_says(seed, shape):
    """Expectation: a loop that reverses the columns of every image whose coin is True."""
    images, key = some_images(seed, shape), jax.random.key(seed)
    coins = np.asarray(jax.jit(flip_coins, static_argnums=1)(key, shape[0]))
    expected = [
        np.fliplr(image) if coin else image for image, coin in zip(images, coins, strict=True)
    ]
    np.testing.assert_array_equal(jax.jit(flip())(key, images), expected)


def test_draws_are_uniform():
    """Expectation: 81 equally likely corners and a fair coin, within five standard deviations."""
    draws = 81_000
    rows, columns = np.asarray(crop_offsets(jax.random.key(0), draws, 4)).T
    counts = np.bincount(9 * rows + columns, minlength=81)
    assert counts.size == 81
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000)
    heads = np.asarray(flip_coins(jax.random.key(1), draws)).sum()
    assert abs(heads - draws / 2) < 5 * np.sqrt(draws / 4)


@pytest.mark.parametrize('name', sorted(AUGMENTATIONS))
def test_runs_do_not_touch_each_other(name):
    """Expectation: a row of the vmapped (and jitted) result is the plain result of that run."""
    augment = augmentation(name)
    images = jnp.asarray(some_images(0, (3, 8, 9, 7, 3)))
    keys = jax.random.split(jax.random.key(3), 3)
    together = jax.jit(jax.vmap(augment))(keys, images)
    for key, own, result in zip(keys, images, together, strict=True):
        np.testing.assert_array_equal(result, augment(key, own))
        np.testing.assert_array_equal(augment(key, own), augment(key, own))
    assert not np.array_equal(augment(keys[0], images[0]), augment(keys[1], images[0]))


@pytest.mark.parametrize('name', sorted(AUGMENTATIONS))
def test_dtype_and_shape_are_kept(name):
    """Expectation: the signature; whole pixels (uint8) pass through as well as floats."""
    images = jnp.ones((2, 4, 5, 1), jnp.uint8)
    result = augmentation(name)(jax.random.key(0), images)
    assert (result.shape, result.dtype) == (images.shape, images.dtype)


def test_mistakes_are_named():
    with pytest.raises(DataError, match=r"'flop'.*did you mean 'flip'.*crop"):
        augmentation('flop')
    with pytest.raises(DataError, match='-1'):
        pad_crop(-1)
