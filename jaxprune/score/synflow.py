"""SynFlow: synaptic flow without data (Tanaka et al., NeurIPS 2020, arXiv:2006.05467)."""

import jax
import jax.numpy as jnp

from jaxprune.score import scaled
from jaxprune.score.loss import one_input
from jaxprune.tree import put
from jaxprune.types import Batches, Key, Problem, ScoreFn, Scores, View


def synflow(problem: Problem) -> ScoreFn:
    """`|w| * dR/d|w|` with `R` the summed logits of an all-ones input through the net of `|θ|`.

    As the authors' code: every parameter and every running statistic is replaced by its absolute
    value, batch normalisation runs on those statistics (at initialisation a constant scale), all
    else stays. So non-zero biases take part; and after training `|mean|` is subtracted, which
    may break the positivity the theory rests on. Published with 100 rounds; one round collapses
    layers. Data are not used: of `batches` only the shape of one input matters.

    The flow is computed with a wider exponent, see `score.scaled`, so that deep networks neither
    overflow nor vanish in float32. The scores are the published ones; only where the largest of
    them would leave the range from 2**-32 to 2**64 (float32) all are multiplied by one power of
    two, which changes no ranking. Scores smaller than the largest by more than that range, as
    biases can make those of early layers, are zero. A network that loops over its layers
    (`lax.scan`) is computed as written. Call it under `jax.jit`: equation by equation a deep net
    takes seconds.
    """

    def score(key: Key, view: View, batches: Batches | None) -> Scores:
        del key
        x = one_input(batches, 'synflow')
        ones = jnp.ones((1, *x.shape), x.dtype)
        positive, frozen, model_state = jax.tree.map(
            _positive, (view.weights, view.params, view.model_state)
        )

        def flow(weights, frozen, model_state, ones):
            logits, _ = problem.apply(
                put(frozen, weights), model_state, ones, train=False, key=None
            )
            return logits.sum()

        weights = {path: scaled.normalise(w) for path, w in positive.items()}
        gradient = scaled.evaluate(jax.grad(flow), weights, frozen, model_state, ones)
        products = {path: scaled.product(w, gradient[path]) for path, w in weights.items()}
        # The gradient itself may be negative where `- |mean|` enters: the authors take |.| last.
        return {path: jnp.abs(leaf) for path, leaf in scaled.common(products).items()}

    return score


def _positive(leaf: jax.Array) -> jax.Array:
    """The absolute value of numbers; keys and counters of a model's state are left alone."""
    return jnp.abs(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
