"""The data of a sweep on the device, and the examples of scores and recorded quantities."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from jaxprune import data, flow, method
from jaxprune.data import Dataset, DeviceSplit, FetchFn
from jaxprune.errors import SpecError
from jaxprune.rng import stream
from jaxprune.sweep.spec import PruneSpec, SweepSpec
from jaxprune.types import Batch, Key


class DeviceData(NamedTuple):
    """What lives on the device once, shared by all runs.

    Attributes:
      train: the training split.
      test: the test split.
      by_class: int32 `(classes, n)`, indices of training examples of each class.
    """

    train: DeviceSplit
    test: DeviceSplit
    by_class: jax.Array


def device_data(spec: SweepSpec, dataset: Dataset) -> DeviceData:
    """The data set as device arrays, cut to the sizes the specification asks for.

    Raises:
      SpecError: a class has too few examples to score on.
    """

    def first(split, count):
        return split._replace(
            images=split.images[: count or None], labels=split.labels[: count or None]
        )

    training = first(dataset.train, spec.data.train_examples)
    by_class = np.zeros((dataset.classes, 0), np.int32)
    if scores_need_data(spec):
        smallest = np.bincount(training.labels, minlength=dataset.classes).min()
        wanted = spec.prune.samples_per_class * spec.prune.batches
        if wanted > smallest:
            raise SpecError(
                f'prune.samples_per_class: {wanted} of each class are more than the {smallest} '
                f'that the smallest class has among {len(training.labels)} training examples'
            )
        by_class = data.class_balanced(training.labels, dataset.classes)
    return DeviceData(
        train=data.to_device(training),
        test=data.to_device(first(dataset.test, spec.data.test_examples)),
        by_class=jax.numpy.asarray(by_class),
    )


def scores_need_data(spec: SweepSpec) -> bool:
    """Does a method or a recorded quantity of the sweep use class-balanced examples?"""
    scores = any(
        'data' in method.method(m.name).needs and m.score_on == 'balanced' for m in spec.grid.method
    )
    return scores or any(
        name not in method.WATCHED and flow.quantity(name).needs_data for name in spec.record.flow
    )


class Examples(NamedTuple):
    """Where events and recorded quantities get their examples, as batches `(batches, batch, ...)`.

    Attributes:
      drawn: `(data, key, number) -> Batch`, class-balanced and fresh in every round, the same for
        all methods of a seed.
      first: `data -> Batch`, the first examples of each class: the same at every step and for
        every run.
    """

    drawn: Callable[[DeviceData, Key, jax.Array], Batch]
    first: Callable[[DeviceData], Batch]


def examples_of(prune: PruneSpec, classes: int, fetch: FetchFn) -> Examples:
    """The examples that a [prune] section asks for.

    Args:
      fetch: without augmentation.
    """
    per_class, several = prune.samples_per_class, prune.batches

    def fetched(data_: DeviceData, indices: jax.Array) -> Batch:
        rows = [fetch(data_.train, None, at) for at in indices]
        return jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *rows)

    def drawn(data_: DeviceData, key: Key, number: jax.Array) -> Batch:
        draw = jax.random.fold_in(stream(key, 'score'), number)
        return fetched(data_, data.balanced_indices(draw, data_.by_class, per_class, several))

    def first(data_: DeviceData) -> Batch:
        rows = data_.by_class[:, : per_class * several]
        rows = rows.reshape(classes, several, per_class).swapaxes(0, 1)
        return fetched(data_, rows.reshape(several, -1))

    return Examples(drawn, first)
