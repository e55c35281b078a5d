"""Multilayer perceptrons."""

from collections.abc import Sequence

import flax.linen as nn
import jax

he_normal = nn.initializers.variance_scaling(2.0, 'fan_in', 'normal')


class MLP(nn.Module):
    """Flatten, hidden ReLU layers, a linear classifier. Kaiming-normal kernels, zero biases.

    Attributes:
      widths: units of the hidden layers.
      classes: number of logits.
    """

    widths: Sequence[int]
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        del train
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate((*self.widths, self.classes)):
            x = nn.Dense(width, kernel_init=he_normal, name=f'dense_{i}')(x)
            if i < len(self.widths):
                x = nn.relu(x)
        return x
