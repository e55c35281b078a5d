"""How large weights and gradients are, leaf by leaf."""

import jax
import jax.numpy as jnp

from jaxprune.score.loss import mean_gradient
from jaxprune.types import Batch, Key, Problem, View


def weight_norm(problem: Problem):
    """`(key, view, batches) -> path -> ‖w‖`, scalars: the Euclidean norm of the weights in force.

    Looks at no data.
    """
    del problem

    def measure(key: Key, view: View, batches: Batch | None) -> dict[str, jax.Array]:
        del key, batches
        return {path: jnp.linalg.norm(leaf.ravel()) for path, leaf in view.weights.items()}

    return measure


def gradient_norm(problem: Problem):
    """`(key, view, batches) -> path -> ‖m g‖`, scalars: of the gradient that the weights follow.

    g is the gradient of the mean loss over all batches, with batch statistics as in training, and
    m the mask.
    """

    def measure(key: Key, view: View, batches: Batch | None) -> dict[str, jax.Array]:
        mean = mean_gradient(problem, view, key, batches, train=True)
        return {
            path: jnp.linalg.norm(jnp.where(mask, mean[path], 0).ravel())
            for path, mask in view.masks.items()
        }

    return measure
