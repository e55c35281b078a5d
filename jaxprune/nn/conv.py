"""Small convolutional networks."""

from collections.abc import Sequence

import flax.linen as nn
import jax

from jaxprune.errors import JaxpruneError
from jaxprune.nn.dense import he_normal


class LeNet5(nn.Module):
    """LeNet-5 with ReLU and average pooling: 6 and 16 maps of 5x5 valid convolutions, 120, 84.

    Kaiming-normal kernels, zero biases. 28x28 or 32x32 inputs, any number of channels.
    """

    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        del train
        for i, maps in enumerate((6, 16)):
            x = nn.Conv(maps, (5, 5), padding='VALID', kernel_init=he_normal, name=f'conv_{i}')(x)
            x = nn.avg_pool(nn.relu(x), (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate((120, 84)):
            x = nn.relu(nn.Dense(width, kernel_init=he_normal, name=f'dense_{i}')(x))
        return nn.Dense(self.classes, kernel_init=he_normal, name='dense_2')(x)


class SmallVGG(nn.Module):
    """VGG in small: per stage two 3x3 convolutions, each with batch norm and ReLU, then max pool.

    A linear classifier on the flattened maps. Convolutions have no bias (batch norm follows).

    Attributes:
      widths: maps of the stages; each stage halves height and width.
      classes: number of logits.

    Raises:
      JaxpruneError: when called on images too small for so many halvings.
    """

    widths: Sequence[int]
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        side, least = min(x.shape[1:3]), 2 ** len(self.widths)
        if side < least:  # max pool would make empty maps, and a classifier without weights
            raise JaxpruneError(
                f'model: {len(self.widths)} stages need images of {least} x {least}, not {side}'
            )
        layer = 0
        for width in self.widths:
            for _ in range(2):
                x = nn.Conv(
                    width, (3, 3), use_bias=False, kernel_init=he_normal, name=f'conv_{layer}'
                )(x)
                x = nn.BatchNorm(
                    use_running_average=not train, momentum=0.9, epsilon=1e-5, name=f'bn_{layer}'
                )(x)
                x = nn.relu(x)
                layer += 1
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(self.classes, kernel_init=he_normal, name='dense_0')(x)
