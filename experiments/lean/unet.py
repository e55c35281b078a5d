"""A small U-Net (Ronneberger et al., 2015): from an image to scores of classes for each pixel."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxprune import problem_from_flax, rules
from jaxprune.types import Problem


class UNet(nn.Module):
    """Two convolutions of 3x3 at each scale, down and up again; batch norm and ReLU behind each.

    Attributes:
      widths: channels at each scale, the finest first.
      classes: what a pixel may be.
    """

    widths: tuple[int, ...]
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        def twice(x: jax.Array, width: int, name: str) -> jax.Array:
            for part in 'ab':
                x = nn.Conv(width, (3, 3), use_bias=False, name=f'{name}{part}_conv')(x)
                x = nn.relu(nn.BatchNorm(not train, momentum=0.9, name=f'{name}{part}_bn')(x))
            return x

        passed_on = []
        for scale, width in enumerate(self.widths[:-1]):
            x = twice(x, width, f'down{scale}')
            passed_on.append(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = twice(x, self.widths[-1], 'bottom')
        for scale, width in reversed(list(enumerate(self.widths[:-1]))):
            x = jnp.concatenate([passed_on[scale], doubled(x)], -1)
            x = twice(x, width, f'up{scale}')
        return nn.Conv(self.classes, (1, 1), name='head')(x)


def doubled(x: jax.Array) -> jax.Array:
    """Every pixel becomes four."""
    n, height, width, maps = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (n, height, 2, width, 2, maps))
    return x.reshape(n, 2 * height, 2 * width, maps)


def pixel_loss(scores: jax.Array, truth: jax.Array) -> jax.Array:
    """Cross-entropy, the mean over the pixels of each image: `(n,)`."""
    logs = jax.nn.log_softmax(scores)
    return -jnp.take_along_axis(logs, truth[..., None], -1)[..., 0].mean((1, 2))


def unet_problem(widths: tuple[int, ...], classes: int, side: int) -> Problem:
    """The net and its loss. All but the last layer may be pruned, as in the paper."""
    net = UNet(widths, classes)
    unpruned_head = rules(('head/', False))
    return problem_from_flax(net, (side, side, 3), loss=pixel_loss, prunable=unpruned_head)
