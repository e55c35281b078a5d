"""MobileNet-V1 for 32x32 images (Howard et al., 2017, arXiv:1704.04861)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

from jaxprune.nn.blocks import classified, conv_bn, scaled
from jaxprune.nn.conv import ConvFn, native
from jaxprune.nn.initial import kaiming_normal
from jaxprune.nn.widths import LayerWidths, Widths

#: (maps, stride) of the separable blocks after a stem of 32 maps and stride 1.
BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *((512, 1),) * 5,
    (1024, 2),
    (1024, 1),
)


class MobileNet(nn.Module):
    """Depthwise 3x3 and pointwise convolutions, each with batch norm and ReLU; global average.

    Convolutions without bias. Strides as the gradient-flow study
    has them for CIFAR: 32x32 images end as 2x2 maps.

    Attributes:
      classes: number of logits.
      width: factor on the number of maps.
      dtype: of the computation; parameters and statistics stay float32.
      kernel_init: how kernels are drawn, see `nn.initial`.
      conv: how to convolve, see `nn.conv`.
      layer_widths: units of layers that have not the usual number, see `nn.widths`; depthwise
        convolutions follow their input.
    """

    classes: int
    width: float = 1.0
    dtype: Any = jnp.float32
    kernel_init: Initializer = kaiming_normal
    conv: ConvFn = native
    layer_widths: LayerWidths = ()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        def layer(x, maps, name, **shape):
            return nn.relu(conv_bn(self, x, maps, name, train=train, **shape))

        width = Widths(self.layer_widths)
        last = 'stem_conv'
        x = layer(x, width(last, scaled(32, self.width)), 'stem', side=3)
        for i, (wide, stride) in enumerate(BLOCKS):
            maps = width.following(f'block{i}_depth_conv', last, x.shape[-1])
            x = layer(x, maps, f'block{i}_depth', side=3, stride=stride, groups=maps)
            last = f'block{i}_point_conv'
            x = layer(x, width(last, scaled(wide, self.width)), f'block{i}_point', side=1)
        width.check()
        return classified(x, self.classes, self.dtype, self.kernel_init)
