"""LeNet-5 (LeCun et al., 1998) as the pruning literature has it."""

import flax.linen as nn
import jax
from jax.nn.initializers import Initializer

from jaxprune.nn.conv import ConvFn, native
from jaxprune.nn.initial import kaiming_normal


class LeNet5(nn.Module):
    """LeNet-5 with ReLU and average pooling: 6 and 16 maps of 5x5 valid convolutions, 120, 84.

    Zero biases. 28x28 or 32x32 inputs, any number of channels.

    Attributes:
      classes: number of logits.
      kernel_init: how kernels are drawn, see `nn.initial`.
      conv: how to convolve, see `nn.conv`.
    """

    classes: int
    kernel_init: Initializer = kaiming_normal
    conv: ConvFn = native

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        del train
        for i, maps in enumerate((6, 16)):
            x = nn.Conv(
                maps,
                (5, 5),
                padding='VALID',
                kernel_init=self.kernel_init,
                conv_general_dilated=self.conv,
                name=f'conv_{i}',
            )(x)
            x = nn.avg_pool(nn.relu(x), (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate((120, 84)):
            x = nn.relu(nn.Dense(width, kernel_init=self.kernel_init, name=f'dense_{i}')(x))
        return nn.Dense(self.classes, kernel_init=self.kernel_init, name='dense_2')(x)
