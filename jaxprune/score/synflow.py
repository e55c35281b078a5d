"""SynFlow: synaptic flow without data (Tanaka et al., NeurIPS 2020, arXiv:2006.05467)."""

import jax
import jax.numpy as jnp

from jaxprune.errors import PruneError
from jaxprune.tree import put
from jaxprune.types import Batch, Key, Problem, ScoreFn, Scores, View


def synflow(problem: Problem) -> ScoreFn:
    """`|w| * dR/d|w|` with `R` the summed logits of an all-ones input through the net of `|θ|`.

    As the authors' code: every parameter and every running statistic is replaced by its absolute
    value, batch normalisation runs on those statistics (at initialisation a constant scale), all
    else stays. So non-zero biases take part; and after training `|mean|` is subtracted, which
    may break the positivity the theory rests on. Published with 100 rounds; one round collapses
    layers. Data are not looked at: of `batches` only the shape of one input counts.
    """

    def score(key: Key, view: View, batches: Batch | None) -> Scores:
        del key
        if batches is None:
            raise PruneError('synflow needs the shape of an input: pass batches (values unused)')
        ones = jnp.ones((1, *batches.x.shape[2:]), batches.x.dtype)
        frozen, model_state = jax.tree.map(_positive, (view.frozen, view.model_state))

        def flow(weights):
            logits, _ = problem.apply(
                put(frozen, weights), model_state, ones, train=False, key=None
            )
            return logits.sum()

        positive = {path: jnp.abs(w) for path, w in view.weights.items()}
        gradient = jax.grad(flow)(positive)
        # The gradient itself may be negative where `- |mean|` enters: the authors take |.| last.
        return {path: jnp.abs(w * gradient[path]) for path, w in positive.items()}

    return score


def _positive(leaf: jax.Array) -> jax.Array:
    """The absolute value of numbers; keys and counters of a model's state are left alone."""
    return jnp.abs(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
