"""LeNet-5 (LeCun et al., 1998) as the pruning literature has it."""

import flax.linen as nn
import jax
from jax.nn.initializers import Initializer

from jaxprune.errors import JaxpruneError, lookup
from jaxprune.nn.blocks import activation, pooled
from jaxprune.nn.conv import ConvFn, native
from jaxprune.nn.initial import kaiming_normal
from jaxprune.nn.widths import LayerWidths, Widths

POOLS = {'average': lambda x: nn.avg_pool(x, (2, 2), (2, 2)), 'max': pooled}


class LeNet5(nn.Module):
    """LeNet-5: 6 and 16 maps of 5x5 valid convolutions, each pooled to half, 120, 84.

    Zero biases. 28x28 or 32x32 inputs, any number of channels.

    Attributes:
      classes: number of logits.
      activation: 'relu', 'tanh' or 'linear'; the pruning literature has 'relu'.
      pool: 'average', or 'max' as the isometry study has it.
      kernel_init: how kernels are drawn, see `nn.initial`.
      conv: how to convolve, see `nn.conv`.
      layer_widths: units of layers that have not the usual number, see `nn.widths`.
    """

    classes: int
    activation: str = 'relu'
    pool: str = 'average'
    kernel_init: Initializer = kaiming_normal
    conv: ConvFn = native
    layer_widths: LayerWidths = ()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        del train
        pool = lookup('pool', self.pool, POOLS, JaxpruneError)
        act = activation(self.activation)
        width = Widths(self.layer_widths)
        for i, maps in enumerate((6, 16)):
            x = nn.Conv(
                width(f'conv_{i}', maps),
                (5, 5),
                padding='VALID',
                kernel_init=self.kernel_init,
                conv_general_dilated=self.conv,
                name=f'conv_{i}',
            )(x)
            x = pool(act(x))
        x = x.reshape(x.shape[0], -1)
        for i, usual in enumerate((120, 84)):
            units = width(f'dense_{i}', usual)
            x = act(nn.Dense(units, kernel_init=self.kernel_init, name=f'dense_{i}')(x))
        width.check()
        return nn.Dense(self.classes, kernel_init=self.kernel_init, name='dense_2')(x)
