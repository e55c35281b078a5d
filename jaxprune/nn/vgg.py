"""VGG with batch norm, as the pruning literature has it for CIFAR: one linear layer at the end."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

from jaxprune.errors import JaxpruneError, shown
from jaxprune.nn.blocks import classified, convolved, normed, pooled, scaled
from jaxprune.nn.conv import ConvFn, native
from jaxprune.nn.initial import kaiming_normal
from jaxprune.nn.widths import LayerWidths, Widths

#: Maps of the 3x3 convolutions of each stage; a max pool follows every stage.
STAGES: dict[int, tuple[tuple[int, ...], ...]] = {
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    13: ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
}
ORDERS = ('conv_bn_relu', 'conv_relu_bn')


class VGG(nn.Module):
    """3x3 convolutions without bias, each with batch norm and ReLU; max pools; a linear classifier.

    Images of 32x32 or more; maps left after the last pool are
    averaged.

    Attributes:
      depth: 11, 13, 16 or 19.
      classes: number of logits.
      width: factor on the number of maps.
      order: 'conv_bn_relu', or 'conv_relu_bn' as the gradient-flow study has it.
      dtype: of the computation; parameters and statistics stay float32.
      kernel_init: how kernels are drawn, see `nn.initial`.
      conv: how to convolve, see `nn.conv`.
      layer_widths: units of layers that have not the usual number, see `nn.widths`.
    """

    depth: int
    classes: int
    width: float = 1.0
    order: str = 'conv_bn_relu'
    dtype: Any = jnp.float32
    kernel_init: Initializer = kaiming_normal
    conv: ConvFn = native
    layer_widths: LayerWidths = ()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        if self.depth not in STAGES:
            raise JaxpruneError(f'VGG has {", ".join(map(str, STAGES))} layers, not {self.depth}')
        if self.order not in ORDERS:
            raise JaxpruneError(f'order must be {" or ".join(ORDERS)}, not {shown(self.order)}')
        width = Widths(self.layer_widths)
        layer = 0
        for stage in STAGES[self.depth]:
            for maps in stage:
                x = convolved(
                    x,
                    width(f'conv_{layer}', scaled(maps, self.width)),
                    f'conv_{layer}',
                    self.conv,
                    dtype=self.dtype,
                    kernel_init=self.kernel_init,
                )

                def norm(x, name=f'bn_{layer}'):
                    return normed(x, name, train=train, dtype=self.dtype)

                x = nn.relu(norm(x)) if self.order == 'conv_bn_relu' else norm(nn.relu(x))
                layer += 1
            x = pooled(x)
        width.check()
        return classified(x, self.classes, self.dtype, self.kernel_init)


class SmallVGG(nn.Module):
    """VGG in small: per stage two 3x3 convolutions, each with batch norm and ReLU, then max pool.

    A linear classifier on the flattened maps. Convolutions have no bias (batch norm follows).

    Attributes:
      widths: maps of the stages; each stage halves height and width.
      classes: number of logits.
      kernel_init: how kernels are drawn, see `nn.initial`.
      conv: how to convolve, see `nn.conv`.
      layer_widths: units of layers that have not the usual number, see `nn.widths`.

    Raises:
      JaxpruneError: when called on images too small for so many halvings.
    """

    widths: Sequence[int]
    classes: int
    kernel_init: Initializer = kaiming_normal
    conv: ConvFn = native
    layer_widths: LayerWidths = ()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        side, least = min(x.shape[1:3]), 2 ** len(self.widths)
        if side < least:  # max pool would make empty maps, and a classifier without weights
            raise JaxpruneError(
                f'model: {len(self.widths)} stages need images of {least} x {least}, not {side}'
            )
        width = Widths(self.layer_widths)
        layer = 0
        for usual in self.widths:
            for _ in range(2):
                name = f'conv_{layer}'
                maps = width(name, usual)
                x = convolved(x, maps, name, self.conv, kernel_init=self.kernel_init)
                x = nn.relu(normed(x, f'bn_{layer}', train=train))
                layer += 1
            x = pooled(x)
        width.check()
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(self.classes, kernel_init=self.kernel_init, name='dense_0')(x)
