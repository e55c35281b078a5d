"""Data on the device: orders, class-balanced draws and batches, as pure functions of keys.

Written for one run; the driver vmaps over keys while the data stays unbatched and shared.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxprune.data.augment import augmentation
from jaxprune.data.sets import Split
from jaxprune.errors import DataError
from jaxprune.types import Batch, Key


class DeviceSplit(NamedTuple):
    """Examples on the device, a fourth of the memory of float pixels.

    Attributes:
      images: uint8 pixels `(n, height, width, channels)`.
      labels: int32 classes `(n,)`.
    """

    images: jax.Array
    labels: jax.Array


class FetchFn(Protocol):
    def __call__(self, split: DeviceSplit, key: Key | None, indices: jax.Array) -> Batch:
        """Makes a batch.

        Args:
          split: where the examples are.
          key: for augmentation; None without any.
          indices: integers `(batch,)`.
        """


def to_device(split: Split) -> DeviceSplit:
    """Copies a split to the default device, pixels still uint8."""
    return DeviceSplit(jnp.asarray(split.images), jnp.asarray(split.labels))


def epoch_order(key: Key, epoch: ArrayLike, examples: int, batch: int) -> jax.Array:
    """The batches of one epoch: a fresh permutation, its remainder dropped.

    It sorts, so it belongs at the start of an epoch and not into every step.

    Args:
      key: of the data order of this run.
      epoch: its number; may be traced.
      examples: how many there are to order.
      batch: examples per batch.

    Returns:
      int32 indices `(examples // batch, batch)`, none twice.

    Raises:
      DataError: not even one batch can be filled.
    """
    if not 1 <= batch <= examples:
        raise DataError(f'a batch of {batch} cannot be filled from {examples} examples')
    order = jax.random.permutation(
        jax.random.fold_in(key, epoch), jnp.arange(examples, dtype=jnp.int32)
    )
    batches = examples // batch
    return order[: batches * batch].reshape(batches, batch)


def fetcher(mean: Sequence[float], std: Sequence[float], augment: Sequence[str] = ()) -> FetchFn:
    """Makes the function that turns indices into a batch for a network.

    It gathers pixels, scales them to [0, 1], augments, then normalises: `(x - mean) / std`.

    Args:
      mean: per channel, of pixels scaled to [0, 1].
      std: per channel, of pixels scaled to [0, 1].
      augment: names from `AUGMENTATIONS`, applied in this order; none for evaluation.

    Returns:
      `fetch(split, key, indices) -> Batch`: `x` float32 `(batch, height, width, channels)`, `y`
      int32 `(batch,)`. Indices must lie in the split; others are clipped to it, as a compiled
      program cannot raise. The key is unused without augmentation.

    Raises:
      DataError: an augmentation is unknown; from `fetch`, the images have other channels than
        `mean` and `std`.
    """
    steps = [augmentation(name) for name in augment]
    center, scale = np.asarray(mean, np.float32), np.asarray(std, np.float32)

    def fetch(split: DeviceSplit, key: Key, indices: jax.Array) -> Batch:
        channels = split.images.shape[-1:]
        # Broadcasting would quietly turn one channel into three.
        if not center.shape == scale.shape == channels:
            raise DataError(
                f'images have {channels[0]} channels, mean has shape {center.shape}'
                f' and std {scale.shape}'
            )
        x = jnp.take(split.images, indices, axis=0, mode='clip').astype(jnp.float32) / 255
        for place, step in enumerate(steps):
            x = step(jax.random.fold_in(key, place), x)
        return Batch((x - center) / scale, jnp.take(split.labels, indices, mode='clip'))

    return fetch


def class_balanced(labels: np.ndarray, classes: int) -> np.ndarray:
    """A host table of examples by class, cut to the size of the smallest class.

    Args:
      labels: integers `(n,)`.
      classes: how many classes there are.

    Returns:
      int32 `(classes, smallest)`: row c holds the first indices whose label is c, ascending.

    Raises:
      DataError: a label is out of range, or a class has no example.
    """
    labels = np.asarray(labels)
    if labels.size and not 0 <= labels.min() <= labels.max() < classes:
        raise DataError(
            f'labels run from {labels.min()} to {labels.max()}, not within 0 to {classes - 1}'
        )
    counts = np.bincount(labels, minlength=classes)
    if counts.min() == 0:
        raise DataError(f'class {counts.argmin()} has no example')
    rows = [np.flatnonzero(labels == c)[: counts.min()] for c in range(classes)]
    return np.stack(rows).astype(np.int32)


def balanced_indices(key: Key, table: ArrayLike, per_class: int, batches: int) -> jax.Array:
    """Draws class-balanced batches that share no example, as GraSP and SNIP score on.

    Args:
      key: of this draw.
      table: int32 `(classes, smallest)` from `class_balanced`.
      per_class: examples of each class in every batch.
      batches: how many to draw.

    Returns:
      int32 indices `(batches, classes * per_class)`, none twice, shuffled within each batch.

    Raises:
      DataError: `per_class * batches` exceeds the smallest class.
    """
    table = jnp.asarray(table, jnp.int32)
    classes, smallest = table.shape
    if per_class * batches > smallest:
        raise DataError(
            f'{batches} batches of {per_class} per class need {per_class * batches} examples'
            f' of each class; the smallest has {smallest}'
        )
    draw_key, mix_key = jax.random.split(key)
    shuffled = jax.vmap(jax.random.permutation)(jax.random.split(draw_key, classes), table)
    drawn = shuffled[:, : per_class * batches].reshape(classes, batches, per_class)
    by_batch = drawn.swapaxes(0, 1).reshape(batches, classes * per_class)
    return jax.vmap(jax.random.permutation)(jax.random.split(mix_key, batches), by_batch)
