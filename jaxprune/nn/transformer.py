"""Small transformers: a vision transformer, and a classifier of sequences."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxprune.errors import JaxpruneError
from jaxprune.nn.widths import LayerWidths, Widths

glorot = nn.initializers.xavier_uniform()
positions = nn.initializers.normal(0.02)


class Encoder(nn.Module):
    """Blocks of attention and a two-layer GELU network, each after a layer norm, with residuals.

    `(batch, tokens, dim)` in and out; every token attends to every token. A call may bring widths
    of layers, see `nn.widths`: the heads of `attention_0`, of the size `dim / heads` that they
    usually have; the units of `up_0`. All else is as long as a token.

    Attributes:
      dim: usual size of a token.
      depth: blocks.
      heads: attention heads; they divide `dim`.
      hidden: units between the two dense layers.
      dtype: of the computation; parameters stay float32.
    """

    dim: int
    depth: int
    heads: int
    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, width: Widths | None = None) -> jax.Array:
        width = Widths(()) if width is None else width
        if self.dim % self.heads:
            raise JaxpruneError(
                f'model.heads: {self.heads} heads do not divide a token of {self.dim} numbers'
            )
        for i in range(self.depth):
            y = nn.LayerNorm(dtype=self.dtype, name=f'norm{i}_attention')(x)
            heads = width(f'{self.name}/attention_{i}', self.heads)
            x = x + nn.MultiHeadDotProductAttention(
                heads,
                qkv_features=heads * (self.dim // self.heads),
                dtype=self.dtype,
                kernel_init=glorot,
                name=f'attention_{i}',
            )(y)
            y = nn.LayerNorm(dtype=self.dtype, name=f'norm{i}_dense')(x)
            hidden = width(f'{self.name}/up_{i}', self.hidden)
            y = nn.Dense(hidden, dtype=self.dtype, kernel_init=glorot, name=f'up_{i}')(y)
            y = nn.gelu(y)
            size = width.following(f'{self.name}/down_{i}', 'embed', x.shape[-1])
            x = x + nn.Dense(size, dtype=self.dtype, kernel_init=glorot, name=f'down_{i}')(y)
        return nn.LayerNorm(dtype=self.dtype, name='norm')(x)


class ViT(nn.Module):
    """A vision transformer that averages its tokens (Dosovitskiy et al., ICLR 2021).

    Attributes:
      classes: number of logits.
      patch: side of the square patches that become tokens.
      dim, depth, heads: see `Encoder`; hidden units are `2 dim`.
      dtype: of the computation; parameters stay float32.
      layer_widths: units of layers and heads of attentions that have not the usual number, see
        `nn.widths`; a token is as long as 'embed' is wide.
    """

    classes: int
    patch: int = 4
    dim: int = 96
    depth: int = 6
    heads: int = 4
    dtype: Any = jnp.float32
    layer_widths: LayerWidths = ()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        del train
        batch, height, width, channels = x.shape
        if height % self.patch or width % self.patch:
            raise JaxpruneError(
                f'model.patch: patches of {self.patch} x {self.patch} do not tile '
                f'{height} x {width} images'
            )
        rows, columns = height // self.patch, width // self.patch
        x = x.reshape(batch, rows, self.patch, columns, self.patch, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)
        return _classified(self, x, rows * columns)


class Transformer(nn.Module):
    """A classifier of sequences, `(batch, length)` of tokens or `(batch, length, ...)` of numbers.

    Of an image the rows are the sequence.

    Attributes:
      classes: number of logits.
      vocabulary: how many different tokens there are; for sequences of integers.
      dim, depth, heads: see `Encoder`; hidden units are `2 dim`.
      dtype: of the computation; parameters stay float32.
      layer_widths: units of layers and heads of attentions that have not the usual number, see
        `nn.widths`; a token is as long as 'embed' is wide.
    """

    classes: int
    vocabulary: int = 256
    dim: int = 64
    depth: int = 2
    heads: int = 4
    dtype: Any = jnp.float32
    layer_widths: LayerWidths = ()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        del train
        length = x.shape[1]
        if jnp.issubdtype(x.dtype, jnp.integer):
            x = nn.Embed(self.vocabulary, self.dim, dtype=self.dtype, name='tokens')(x)
        return _classified(self, x.reshape(x.shape[0], length, -1), length)


def _classified(net: ViT | Transformer, x: jax.Array, length: int) -> jax.Array:
    """Embeds tokens, encodes them, and classifies their mean."""
    width = Widths(net.layer_widths)
    size = width('embed', net.dim)
    x = nn.Dense(size, dtype=net.dtype, kernel_init=glorot, name='embed')(x)
    x = x + net.param('positions', positions, (length, size)).astype(x.dtype)
    encoder = Encoder(net.dim, net.depth, net.heads, 2 * net.dim, net.dtype, name='encoder')
    x = encoder(x, width)
    width.check()
    head = nn.Dense(net.classes, dtype=net.dtype, kernel_init=glorot, name='dense_0')
    return head(x.mean(axis=1)).astype(jnp.float32)
