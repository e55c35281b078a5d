"""The data sets, their known properties, and how to load them."""

from typing import NamedTuple

import numpy as np

from jaxprune.data import array_record, mnist_small
from jaxprune.errors import DataError, lookup


class Split(NamedTuple):
    """Examples on the host.

    Attributes:
      images: uint8 pixels `(n, height, width, channels)`.
      labels: int32 classes `(n,)`.
    """

    images: np.ndarray
    labels: np.ndarray


class Dataset(NamedTuple):
    """A data set on the host.

    Attributes:
      name: a key of `FACTS`.
      train: the training examples.
      test: the test examples.
      mean: per channel, of pixels scaled to [0, 1].
      std: per channel, of pixels scaled to [0, 1].
      classes: labels are 0 .. classes - 1.
    """

    name: str
    train: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: int


class Facts(NamedTuple):
    """What is known of a data set without reading it.

    Attributes:
      train_size: training examples.
      test_size: test examples.
      shape: of one image, `(height, width, channels)`.
      classes: labels are 0 .. classes - 1.
      mean: per channel, over the training pixels scaled to [0, 1].
      std: per channel, over the training pixels scaled to [0, 1].
    """

    train_size: int
    test_size: int
    shape: tuple[int, int, int]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


# The published four-digit constants, which are the moments of all training pixels. For CIFAR-10
# some code divides by (0.2023, 0.1994, 0.2010) instead: a mean of per-image deviations.
_MNIST_MOMENTS = {'mean': (0.1307,), 'std': (0.3081,)}
FACTS: dict[str, Facts] = {
    # The subset keeps the constants of the set it is drawn from, so results stay comparable.
    'mnist_small': Facts(10_000, 2_000, (28, 28, 1), 10, **_MNIST_MOMENTS),
    'mnist': Facts(60_000, 10_000, (28, 28, 1), 10, **_MNIST_MOMENTS),
    'fashion_mnist': Facts(60_000, 10_000, (28, 28, 1), 10, (0.2860,), (0.3530,)),
    'cifar10': Facts(
        50_000, 10_000, (32, 32, 3), 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    ),
    'cifar100': Facts(
        50_000, 10_000, (32, 32, 3), 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    ),
}


def facts(name: str) -> Facts:
    """What is known of the data set `name` without reading it.

    Raises:
      DataError: the name is unknown; the message offers the nearest one.
    """
    return lookup('data set', name, FACTS, DataError)


def load(name: str, data_dir: str | None = None) -> Dataset:
    """Reads a whole data set into host memory.

    `mnist_small` comes with the package; the others are read from ArrayRecord files prepared by
    TFDS, see `array_record`.

    Args:
      name: a key of `FACTS`.
      data_dir: where prepared data lies; by default `$TFDS_DATA_DIR`, then `~/tensorflow_datasets`.

    Raises:
      DataError: the name is unknown, or the data is missing, unreadable, or does not match `FACTS`.
    """
    known = facts(name)
    parts = {}
    for part, size in (('train', known.train_size), ('test', known.test_size)):
        if name == 'mnist_small':
            images, labels = mnist_small.read(part)
        else:
            images, labels = array_record.read(name, part, data_dir)
        parts[part] = _checked(f'{name} ({part})', Split(images, labels), size, known)
    return Dataset(name, parts['train'], parts['test'], known.mean, known.std, known.classes)


def _checked(what: str, split: Split, size: int, known: Facts) -> Split:
    """Returns the split unchanged, or raises if it does not match what is known of the set."""
    images, labels = split
    if images.shape != (size, *known.shape) or labels.shape != (size,):
        raise DataError(
            f'{what}: expected {size} images {known.shape} and as many labels,'
            f' found images {images.shape} and labels {labels.shape}'
        )
    if images.dtype != np.uint8 or labels.dtype != np.int32:
        raise DataError(
            f'{what}: expected uint8 images and int32 labels,'
            f' found {images.dtype} and {labels.dtype}'
        )
    if labels.min() < 0 or labels.max() >= known.classes:
        raise DataError(
            f'{what}: expected labels 0 to {known.classes - 1},'
            f' found {labels.min()} to {labels.max()}'
        )
    return split
