"""Multilayer perceptrons."""

from collections.abc import Sequence

import flax.linen as nn
import jax
from jax.nn.initializers import Initializer

from jaxprune.nn.blocks import activation
from jaxprune.nn.initial import kaiming_normal


class MLP(nn.Module):
    """Flatten, hidden layers, a linear classifier. Zero biases.

    Attributes:
      widths: units of the hidden layers.
      classes: number of logits.
      activation: of the hidden layers: 'relu', 'tanh' or 'linear'.
      kernel_init: how kernels are drawn, see `nn.initial`.
    """

    widths: Sequence[int]
    classes: int
    activation: str = 'relu'
    kernel_init: Initializer = kaiming_normal

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        del train
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate((*self.widths, self.classes)):
            x = nn.Dense(width, kernel_init=self.kernel_init, name=f'dense_{i}')(x)
            if i < len(self.widths):
                x = activation(self.activation)(x)
        return x
