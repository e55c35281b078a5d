"""Multilayer perceptrons."""

from collections.abc import Sequence

import flax.linen as nn
import jax
from jax.nn.initializers import Initializer

from jaxprune.nn.blocks import activation
from jaxprune.nn.initial import kaiming_normal
from jaxprune.nn.widths import LayerWidths, Widths


class MLP(nn.Module):
    """Flatten, hidden layers, a linear classifier. Zero biases.

    Attributes:
      widths: units of the hidden layers.
      classes: number of logits.
      activation: of the hidden layers: 'relu', 'tanh' or 'linear'.
      kernel_init: how kernels are drawn, see `nn.initial`.
      layer_widths: units of layers that have not the usual number, see `nn.widths`.
    """

    widths: Sequence[int]
    classes: int
    activation: str = 'relu'
    kernel_init: Initializer = kaiming_normal
    layer_widths: LayerWidths = ()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        del train
        x = x.reshape(x.shape[0], -1)
        width = Widths(self.layer_widths)
        units = [width(f'dense_{i}', usual) for i, usual in enumerate(self.widths)]
        width.check()
        for i, count in enumerate((*units, self.classes)):
            x = nn.Dense(count, kernel_init=self.kernel_init, name=f'dense_{i}')(x)
            if i < len(self.widths):
                x = activation(self.activation)(x)
        return x
