"""The embedded subset of MNIST: 1,000 training and 200 test images per class, no download needed.

How it was drawn: `draw_mnist_small`. Its licence: `mnist_small.LICENSE.md`.
"""

from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name('mnist_small.npz')


def read(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads one split.

    Args:
      split: 'train' or 'test'.

    Returns:
      uint8 images `(10000 or 2000, 28, 28, 1)` and int32 labels, in the order of the full set.
    """
    with np.load(FILE) as arrays:
        images, labels = arrays[f'{split}_images'], arrays[f'{split}_labels']
    return images[..., None], labels.astype(np.int32)


def indices(split: str) -> np.ndarray:
    """Where each image stands in the split of the same name of the full set, int32 `(n,)`.

    Positions count the records of TFDS `mnist` 3.0.1, whose order is fixed but is not that of
    the original IDX files.
    """
    with np.load(FILE) as arrays:
        return arrays[f'{split}_indices'].astype(np.int32)
