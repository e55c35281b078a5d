"""Residual networks in their CIFAR forms (He et al., CVPR 2016, arXiv:1512.03385)."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

from jaxprune.errors import JaxpruneError, quoted, shown
from jaxprune.nn.blocks import classified, conv_bn, scaled
from jaxprune.nn.conv import ConvFn, native
from jaxprune.nn.initial import kaiming_normal
from jaxprune.nn.widths import LayerWidths, Widths, agree

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
      layer_widths: units of layers that have not the usual number, see `nn.widths`; what is added
        up has as many.
    """

    blocks: Sequence[int]
    maps: Sequence[int]
    classes: int
    width: float = 1.0
    shortcut: str = 'projection'
    dtype: Any = jnp.float32
    kernel_init: Initializer = kaiming_normal
    conv: ConvFn = native
    layer_widths: LayerWidths = ()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        if self.shortcut not in SHORTCUTS:
            raise JaxpruneError(
                f'shortcut must be {" or ".join(SHORTCUTS)}, not {shown(self.shortcut)}'
            )

        layer = functools.partial(conv_bn, self, train=train)
        width = Widths(self.layer_widths)
        last, before = 'stem_conv', scaled(self.maps[0], self.width)
        x = nn.relu(layer(x, width(last, before), 'stem'))
        for stage, (count, wide) in enumerate(zip(self.blocks, self.maps, strict=True)):
            maps = scaled(wide, self.width)
            for block in range(count):
                stride = 2 if stage and not block else 1
                name = f'stage{stage}_block{block}'
                y = nn.relu(layer(x, width(f'{name}_a_conv', maps), f'{name}_a', stride=stride))
                y = layer(y, width(f'{name}_b_conv', maps), f'{name}_b')
                # Other widths change no shortcut: a block has one where it usually has.
                if (*x.shape[:3], before) != (*y.shape[:3], maps):
                    if self.shortcut == 'projection':
                        last = f'{name}_skip_conv'
                        x = layer(x, width(last, maps), f'{name}_skip', side=1, stride=stride)
                    else:
                        x = _padded(x[:, ::stride, ::stride], y, f'{name}_b_conv')
                        last = f'{name}_b_conv'
                agree(last, x.shape[-1], f'{name}_b_conv', y.shape[-1])
                x = nn.relu(x + y)
                last, before = f'{name}_b_conv', maps
        width.check()
        return classified(x, self.classes, self.dtype, self.kernel_init)


def _padded(x: jax.Array, y: jax.Array, name: str) -> jax.Array:
    """As many maps as `y` has: zeros before and after those that there are."""
    more = y.shape[-1] - x.shape[-1]
    if more < 0:
        raise JaxpruneError(
            f'model.layer_widths: {quoted(name)} has {y.shape[-1]} units, fewer than the '
            f'{x.shape[-1]} that its shortcut pads'
        )
    return jnp.pad(x, ((0, 0),) * 3 + ((more // 2, more - more // 2),))


def cifar_blocks(depth: int) -> tuple[int, int, int]:
    """Blocks per stage of the CIFAR ResNet of `6 n + 2` layers."""
    if depth < 8 or (depth - 2) % 6:
        raise JaxpruneError(f'a CIFAR ResNet has 6 n + 2 layers (20, 32, 56, ...), not {depth}')
    return ((depth - 2) // 6,) * 3
