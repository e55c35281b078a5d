"""Draws the embedded subset of MNIST: `python -m jaxprune.data.draw_mnist_small --data-dir DIR`.

The same arrays come out wherever it runs: the record order of TFDS `mnist` 3.0.1 is fixed, and so
is the seed.
"""

import argparse
from pathlib import Path

import numpy as np

from jaxprune.data import array_record, mnist_small

SEED = 0
PER_CLASS = {'train': 1_000, 'test': 200}


def draw(splits: dict[str, tuple[np.ndarray, np.ndarray]], seed: int) -> dict[str, np.ndarray]:
    """Draws equally many images of every digit, without replacement.

    Args:
      splits: 'train' and 'test' of the full set: images `(n, 28, 28, 1)` and labels `(n,)`.
      seed: of the NumPy generator that serves 'train', then 'test', digit by digit.

    Returns:
      for each split `{split}_images` uint8 `(m, 28, 28)`, `{split}_labels` uint8 `(m,)` and
      `{split}_indices` uint16 `(m,)`, the positions in the full split, ascending.
    """
    generator = np.random.default_rng(seed)
    arrays = {}
    for split, per_class in PER_CLASS.items():
        images, labels = splits[split]
        drawn = [
            generator.choice(np.flatnonzero(labels == digit), per_class, replace=False)
            for digit in range(10)
        ]
        # Ascending positions keep the classes mixed, as in the full set.
        chosen = np.sort(np.concatenate(drawn))
        arrays[f'{split}_images'] = images[chosen, :, :, 0]
        arrays[f'{split}_labels'] = labels[chosen].astype(np.uint8)
        arrays[f'{split}_indices'] = chosen.astype(np.uint16)
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(description='Draw the embedded subset of MNIST.')
    parser.add_argument('--data-dir', help='where TFDS prepared mnist as array_record')
    parser.add_argument('--out', type=Path, default=mnist_small.FILE, help='the .npz to write')
    options = parser.parse_args()
    full = {split: array_record.read('mnist', split, options.data_dir) for split in PER_CLASS}
    np.savez_compressed(options.out, **draw(full, SEED))
    print(f'{options.out}: {options.out.stat().st_size} bytes')


if __name__ == '__main__':
    main()
