"""Residual networks in their CIFAR forms (He et al., CVPR 2016, arXiv:1512.03385)."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

from jaxprune.errors import JaxpruneError, shown
from jaxprune.nn.blocks import classified, conv_bn, scaled
from jaxprune.nn.conv import ConvFn, native
from jaxprune.nn.initial import kaiming_normal

SHORTCUTS = ('projection', 'pad')


class ResNet(nn.Module):
    """A 3x3 stem, stages of basic blocks (two 3x3 convolutions), global average, a classifier.

    The first block of every stage but the first halves the maps' sides. Convolutions without
    bias.

    Attributes:
      blocks: blocks per stage.
      maps: maps per stage.
      classes: number of logits.
      width: factor on the number of maps.
      shortcut: where a block changes the shape, 'projection' (1x1 convolution and batch norm), or
        'pad' (every second pixel, new maps zero: the paper's option A).
      dtype: of the computation; parameters and statistics stay float32.
      kernel_init: how kernels are drawn, see `nn.initial`.
      conv: how to convolve, see `nn.conv`.
    """

    blocks: Sequence[int]
    maps: Sequence[int]
    classes: int
    width: float = 1.0
    shortcut: str = 'projection'
    dtype: Any = jnp.float32
    kernel_init: Initializer = kaiming_normal
    conv: ConvFn = native

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        if self.shortcut not in SHORTCUTS:
            raise JaxpruneError(
                f'shortcut must be {" or ".join(SHORTCUTS)}, not {shown(self.shortcut)}'
            )

        layer = functools.partial(conv_bn, self, train=train)
        x = nn.relu(layer(x, scaled(self.maps[0], self.width), 'stem'))
        for stage, (count, wide) in enumerate(zip(self.blocks, self.maps, strict=True)):
            maps = scaled(wide, self.width)
            for block in range(count):
                stride = 2 if stage and not block else 1
                name = f'stage{stage}_block{block}'
                y = nn.relu(layer(x, maps, f'{name}_a', stride=stride))
                y = layer(y, maps, f'{name}_b')
                if x.shape != y.shape:
                    if self.shortcut == 'projection':
                        x = layer(x, maps, f'{name}_skip', side=1, stride=stride)
                    else:
                        more = maps - x.shape[-1]
                        x = x[:, ::stride, ::stride]
                        x = jnp.pad(x, ((0, 0),) * 3 + ((more // 2, more - more // 2),))
                x = nn.relu(x + y)
        return classified(x, self.classes, self.dtype, self.kernel_init)


def cifar_blocks(depth: int) -> tuple[int, int, int]:
    """Blocks per stage of the CIFAR ResNet of `6 n + 2` layers."""
    if depth < 8 or (depth - 2) % 6:
        raise JaxpruneError(f'a CIFAR ResNet has 6 n + 2 layers (20, 32, 56, ...), not {depth}')
    return ((depth - 2) // 6,) * 3
