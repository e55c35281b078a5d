"""Layers that the convolutional networks share, to be called while a module is being set up."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

from jaxprune.errors import JaxpruneError, lookup
from jaxprune.nn.conv import ConvFn
from jaxprune.nn.initial import kaiming_normal


def convolved(
    x: jax.Array,
    maps: int,
    name: str,
    conv: ConvFn,
    *,
    side: int = 3,
    stride: int = 1,
    groups: int = 1,
    dtype: Any = None,
    kernel_init: Initializer = kaiming_normal,
) -> jax.Array:
    """A convolution without bias; it keeps height and width, divided by its stride."""
    return nn.Conv(
        maps,
        (side, side),
        strides=(stride, stride),
        padding=side // 2,
        feature_group_count=groups,
        use_bias=False,
        dtype=dtype,
        kernel_init=kernel_init,
        conv_general_dilated=conv,
        name=name,
    )(x)


def normed(x: jax.Array, name: str, *, train: bool, dtype: Any = None) -> jax.Array:
    """Batch norm by the batch's statistics while training, else by running averages."""
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, name=name
    )(x)


def conv_bn(
    net: Any, x: jax.Array, maps: int, name: str, *, train: bool, **shape: int
) -> jax.Array:
    """A convolution and its batch norm, `<name>_conv` and `<name>_bn`.

    Args:
      net: the module being set up; its fields `conv`, `dtype` and `kernel_init` apply.
      shape: `side`, `stride`, `groups` of `convolved`.
    """
    x = convolved(
        x, maps, f'{name}_conv', net.conv, dtype=net.dtype, kernel_init=net.kernel_init, **shape
    )
    return normed(x, f'{name}_bn', train=train, dtype=net.dtype)


def pooled(x: jax.Array) -> jax.Array:
    """The maxima of 2x2 windows, an odd last row or column left out: `nn.max_pool`, but faster.

    XLA scatters the gradient of its own pooling, which takes a quarter of a VGG's step on CPU. As
    with `nn.max_pool`, the first of equal values, row by row, gets the gradient.
    """
    batch, height, width, maps = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    x = x.reshape(batch, -1, width // 2, 2, maps)
    x = _larger(x[:, :, :, 0], x[:, :, :, 1])
    x = x.reshape(batch, -1, 2, width // 2, maps)
    return _larger(x[:, :, 0], x[:, :, 1])


def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where((a >= b) | jnp.isnan(a), a, b)


def classified(
    x: jax.Array, classes: int, dtype: Any, kernel_init: Initializer = kaiming_normal
) -> jax.Array:
    """Logits, float32, of maps averaged over height and width."""
    head = nn.Dense(classes, dtype=dtype, kernel_init=kernel_init, name='dense_0')
    return head(x.mean(axis=(1, 2))).astype(jnp.float32)


#: Functions between the layers of a network; 'linear' is the identity.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    'relu': nn.relu,
    'tanh': jnp.tanh,
    'linear': lambda x: x,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """An activation by name."""
    return lookup('activation', name, ACTIVATIONS, JaxpruneError)


def scaled(maps: int, width: float) -> int:
    """A number of maps times a width multiplier, at least 1."""
    return max(1, round(maps * width))
