"""How kernels are drawn, by the names that a specification gives. Biases start at zero."""

from typing import Any

import jax
import jax.numpy as jnp
from flax.linen import initializers
from jax.nn.initializers import Initializer

from jaxprune.errors import JaxpruneError, lookup
from jaxprune.linalg import one_by_one
from jaxprune.types import Key

#: What every network takes by default; the variance is 2 / fan in.
kaiming_normal = initializers.variance_scaling(2.0, 'fan_in', 'normal')


def orthogonal(key: Key, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Rows or columns orthonormal; many runs draw one after another, see `linalg`."""
    return one_by_one(lambda own: initializers.orthogonal()(own, shape, dtype))(key)


INITIALISATIONS: dict[str, Initializer] = {
    'kaiming_normal': kaiming_normal,
    # variance 2 / fan out: the residual networks of torchvision and of the FORCE authors
    'kaiming_normal_out': initializers.variance_scaling(2.0, 'fan_out', 'normal'),
    # variance 4 / (fan in + fan out): the effective-sparsity study
    'kaiming_normal_average': initializers.variance_scaling(2.0, 'fan_avg', 'normal'),
    'xavier_normal': initializers.xavier_normal(),
    'xavier_uniform': initializers.xavier_uniform(),
    'lecun_normal': initializers.variance_scaling(1.0, 'fan_in', 'normal'),
    # uniform within 1 / sqrt(fan in): what PyTorch's layers start from
    'pytorch': initializers.variance_scaling(1 / 3, 'fan_in', 'uniform'),
    # the dynamical-isometry study
    'orthogonal': orthogonal,
}


def initialisation(name: str) -> Initializer:
    """How to draw kernels, by name."""
    return lookup('initialisation', name, INITIALISATIONS, JaxpruneError)
