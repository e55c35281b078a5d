"""Lookahead: magnitude that looks one layer ahead and one back (Park et al., ICLR 2020)."""

import itertools

import jax
import jax.numpy as jnp

from jaxprune.score.layers import Layer, forward_layers
from jaxprune.types import Batches, Key, Problem, ScoreFn, Scores, View, Weights


def lookahead(problem: Problem) -> ScoreFn:
    """`|w| ‖a‖ ‖b‖`: a, the weights that make the unit w reads; b, those that read w's own unit.

    To first order the distortion, in the Frobenius norm, of the product of the three layers around
    w. A missing neighbour counts as 1, at both ends and where the units of two layers do not fit,
    as around a residual's sum. Maps that are flattened before a dense layer count as one unit each
    (Park, Lee, Mo & Shin, "Lookahead: a far-sighted alternative of magnitude-based pruning",
    arXiv:2002.04809, without batch norm's factors). Uses the shape of an input, no data.
    """

    def score(key: Key, view: View, batches: Batches | None) -> Scores:
        del key
        layers = forward_layers(problem, view, batches)
        scores = {path: jnp.abs(w) for path, w in view.weights.items()}
        for first, second in itertools.pairwise(layers):
            made = _norms(view.weights, first, 'outputs')
            read = _norms(view.weights, second, 'inputs')
            if read.size % made.size:
                continue
            places = read.size // made.size  # of a flattened map, channels last
            joint = jnp.sqrt((read.reshape(places, -1) ** 2).sum(0))
            scores[first.path] *= _along(joint, view.weights, first, 'outputs')
            scores[second.path] *= _along(jnp.tile(made, places), view.weights, second, 'inputs')
        return scores

    return score


def _norms(weights: Weights, layer: Layer, side: str) -> jax.Array:
    """The norm of all weights of each unit on one side of a layer, flat."""
    kernel, units = weights[layer.path], getattr(layer, side)
    rest = tuple(i for i in range(kernel.ndim) if i not in units)
    return jnp.sqrt((kernel**2).sum(rest)).reshape(-1)


def _along(values: jax.Array, weights: Weights, layer: Layer, side: str) -> jax.Array:
    """One value per unit, spread to the shape of the kernel."""
    shape, units = weights[layer.path].shape, getattr(layer, side)
    return values.reshape([n if i in units else 1 for i, n in enumerate(shape)])
