"""ProsPr: pruning that looks ahead (Alizadeh et al., ICLR 2022, arXiv:2202.08132)."""

import jax
import jax.numpy as jnp

from jaxprune.errors import PruneError
from jaxprune.score.loss import mean_loss, split
from jaxprune.tree import apply_masks, put
from jaxprune.types import Batches, Key, Problem, PyTree, ScoreFn, Scores, View, Weights


def prospr(
    problem: Problem,
    *,
    train: bool,
    steps: int = 3,
    learning_rate: float = 0.1,
    first_order: bool = False,
) -> ScoreFn:
    """`|dL(θ_M)/dc|` for masks c at the start of M steps of gradient descent from `c θ0`.

    All parameters take the steps but those that are pruned already; the masks c themselves act at
    the start only, nothing is masked by them again on the way. Step i takes batch i,
    the final loss batch M, modulo the number of batches; with a single batch all take that one,
    the default of the original. Without steps the score is SNIP.

    Costs two gradients per step and more (`experiments/bench/RESULTS.md`). The steps are unrolled,
    and recomputed in the backward pass, which holds M copies of the parameters and the activations
    of one step.

    Args:
      train: batch normalisation by the batch (True: the original) or by running statistics.
      steps: M, 3 as published.
      learning_rate: of the steps; no momentum, no decay.
      first_order: ignore how the gradients of the steps depend on the mask (the original's
        `first_order`): `|θ0 * dL/dθ_M|`.

    Raises:
      PruneError: a number of steps below 0.
    """
    if steps < 0:
        raise PruneError(f'prospr takes 0 steps or more, not {steps}')

    def score(key: Key, view: View, batches: Batches | None) -> Scores:
        separate = split(batches)

        def loss(step: int, params: PyTree) -> jax.Array:
            own = jax.random.fold_in(key, step)
            batch = separate[step % len(separate)]
            return mean_loss(problem, view, own, train=train)(params, batch)

        def descend(step: int, params: PyTree) -> PyTree:
            gradient = apply_masks(jax.grad(loss, argnums=1)(step, params), view.masks)
            if first_order:
                gradient = jax.lax.stop_gradient(gradient)
            return jax.tree.map(lambda p, g: p - learning_rate * g, params, gradient)

        def outcome(weights: Weights) -> jax.Array:
            params = put(view.params, weights)
            for step in range(steps):
                params = jax.checkpoint(descend, static_argnums=0)(step, params)
            return loss(steps, params)

        gradient = jax.grad(outcome)(view.weights)
        return {path: jnp.abs(w * gradient[path]) for path, w in view.weights.items()}

    return score
