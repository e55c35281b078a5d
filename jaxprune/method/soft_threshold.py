"""STR: soft-threshold reparameterisation (Kusupati et al., ICML 2020, arXiv:2002.03231)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxprune import tree
from jaxprune.errors import check_choice
from jaxprune.method.chosen_anew import Anew, check_rounds, chosen_anew
from jaxprune.method.lasting import CUTS, Asked
from jaxprune.types import Hyper, Key, Masks, Pruner, PyTree, StepHook, View, Weights


class Thresholds(NamedTuple):
    """A learned number for each layer; the sigmoid of it is the layer's threshold.

    Attributes:
      numbers: path -> s, scalar.
      speeds: path -> its momentum, scalar.
    """

    numbers: Weights
    speeds: Weights


def soft_threshold(asked: Asked, *, initial: ArrayLike = -10.0, cut: str = 'target') -> Pruner:
    """Computes with `sign(w) max(|w| - sigmoid(s), 0)`, s learned for each layer.

    `w` and `s` are trained together: `∂L/∂s = -sigmoid'(s) Σ sign(w) ∂L/∂w` over the weights that
    are not zero, and weight decay pulls both to zero, which raises the threshold. `s` takes steps
    of SGD with the rate, the momentum and the weight decay of the run. The last round prunes.

    Args:
      asked: what is pruned.
      initial: s at first. The paper has -3200 for 500,000 steps on ImageNet, where weight decay
        alone moves it for long; in a short run nothing would happen.
      cut: the last round keeps as many as the target says ('target'), or all that are not zero
        ('zero'), as published, and the best of each layer.

    Raises:
      PruneError: an unknown cut.
    """
    check_choice('cut', cut, CUTS)
    check_rounds(asked, 'str')

    def weights(state: Anew, params: PyTree, masks: Masks, clock: ArrayLike) -> PyTree:
        del clock
        leaves, shrunk = dict(tree.paths(params)), {}
        for path, mask in masks.items():
            stored = leaves[path]
            less = shrink(stored, jax.nn.sigmoid(state.own.numbers[path]).astype(stored.dtype))
            # Before it prunes, weights that are zero have a gradient too.
            shrunk[path] = jnp.where(mask, jnp.where(state.prunes, less, stored), 0)
        return tree.put(params, shrunk)

    def gradient(
        state: Anew, grads: PyTree, params: PyTree, masks: Masks, clock: ArrayLike, hyper: Hyper
    ) -> tuple[Anew, PyTree]:
        del clock
        loss, stored = (dict(tree.paths(leaves)) for leaves in (grads, params))
        momentum = hyper.optimizer.get('momentum', 0.0)
        numbers, speeds = {}, {}
        for path, s in state.own.numbers.items():
            share = jax.nn.sigmoid(s)
            # The gradient by w is zero where the threshold made zeros.
            towards = jnp.sum(jnp.sign(stored[path]) * loss[path], dtype=s.dtype)
            slope = -share * (1 - share) * towards
            speeds[path] = momentum * state.own.speeds[path] + slope + hyper.weight_decay * s
            numbers[path] = s - hyper.learning_rate * speeds[path]
        return state._replace(own=Thresholds(numbers, speeds)), grads

    return chosen_anew(
        asked,
        StepHook(weights=weights, gradient=gradient),
        _by_what_is_left,
        begin=lambda view: _begun(view, initial),
        only_last=True,
        remaining=cut == 'zero',
    )


def shrink(w: jax.Array, limit: ArrayLike) -> jax.Array:
    """`sign(w) max(|w| - limit, 0)`."""
    return jnp.sign(w) * jnp.maximum(jnp.abs(w) - limit, 0)


def _begun(view: View, initial: ArrayLike) -> Thresholds:
    # Not in half precision, where small steps would be lost.
    numbers = {
        path: jnp.asarray(initial, jnp.promote_types(w.dtype, jnp.float32))
        for path, w in view.weights.items()
    }
    return Thresholds(numbers, {path: jnp.zeros_like(s) for path, s in numbers.items()})


def _by_what_is_left(key: Key, view: View, own: Thresholds) -> Weights:
    del key, own
    return {path: jnp.abs(w) for path, w in view.weights.items()}
