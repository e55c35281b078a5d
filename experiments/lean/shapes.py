"""Images with shapes on them, and the class of every pixel: background, circle or square.

The images are real ones. A circle has one colour, a square has stripes of two: a network has to
know both from skies and fences, and to find out where they end.
"""

from typing import NamedTuple

import numpy as np

from jaxprune.data import Dataset

#: Classes of pixels, by number.
CLASSES = ('background', 'circle', 'square')
#: Shapes on an image, at least and at most.
_SHAPES = (1, 3)
#: Half their width in pixels, at least and at most.
_RADII = (4.0, 8.0)
#: Share of a shape's own colour; the rest shows the image below.
_OPACITY = (0.7, 1.0)
#: Rows of a stripe.
_STRIPE = 2
#: Standard deviation of the noise on each number of a pixel, which are from 0 to 1.
_NOISE = 0.05


class Drawn(NamedTuple):
    """Images and what is on them.

    Attributes:
      images: `(n, height, width, 3)`, float32, about from -2 to 2.
      truth: `(n, height, width)`, int32, a number of `CLASSES` for each pixel.
    """

    images: np.ndarray
    truth: np.ndarray


def drawn_sets(dataset: Dataset, train: int, test: int, seed: int = 0) -> tuple[Drawn, Drawn]:
    """Shapes over the first images of both parts of a data set."""
    first, second = np.random.default_rng(seed).spawn(2)
    return (
        drawn_over(dataset.train.images[:train], first),
        drawn_over(dataset.test.images[:test], second),
    )


def drawn_over(images: np.ndarray, draw: np.random.Generator) -> Drawn:
    """Shapes over images, uint8 `(n, height, width, 3)`; later shapes cover earlier ones."""
    pixels = images.astype(np.float32) / 255
    truth = np.zeros(images.shape[:3], np.int32)
    for picture, classes in zip(pixels, truth, strict=True):
        for _ in range(draw.integers(_SHAPES[0], _SHAPES[1] + 1)):
            kind = draw.integers(1, len(CLASSES))
            inside, stripe = _inside(kind, classes.shape, draw)
            colours, opacity = draw.uniform(size=(2, 3)), draw.uniform(*_OPACITY)
            own = colours[stripe if kind == 2 else np.zeros_like(stripe)][inside]
            picture[inside] += opacity * (own - picture[inside])
            classes[inside] = kind
    pixels += _NOISE * draw.normal(size=pixels.shape)
    return Drawn(((pixels - 0.5) / 0.25).astype(np.float32), truth)


def _inside(
    kind: int, shape: tuple[int, int], draw: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Which pixels a shape covers, anywhere on the image, and in which of its stripes they are."""
    radius, (height, width) = draw.uniform(*_RADII), shape
    y, x = np.indices(shape)
    y, x = y - draw.uniform(0, height), x - draw.uniform(0, width)
    inside = x**2 + y**2 <= radius**2 if kind == 1 else np.maximum(abs(x), abs(y)) <= radius
    return inside, (y // _STRIPE).astype(int) % 2
