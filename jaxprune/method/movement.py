"""Movement pruning (Sanh, Wolf & Rush, NeurIPS 2020, arXiv:2005.07683): learned scores.

Each weight, block or unit has a score S, 0 at first, with an optimizer of its own. It gets the
straight-through gradient `∂L/∂S = (∂L/∂W') W`, W' the masked weight: so S grows where a weight
moves away from 0. The gradient of a group is the sum over its weights (Lagunas et al., EMNLP 2021,
arXiv:2109.04838).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxprune import tree
from jaxprune.errors import check_choice
from jaxprune.method.chosen_anew import (
    Anew,
    check_rounds,
    chosen_anew,
    straight_through,
    straight_weights,
)
from jaxprune.method.lasting import CUTS, Asked
from jaxprune.method.pruner import among
from jaxprune.select import layerwise_top_k
from jaxprune.types import Hyper, Key, Masks, Pruner, PyTree, Scores, StepHook, View

#: How scores are trained.
SCORE_OPTIMIZERS = ('sgd', 'adam')
_B1, _B2, _EPSILON = 0.9, 0.999, 1e-8
#: Soft movement computes with `int(_FEWEST n) + 1` of a layer of n at least.
_FEWEST = 0.005


class Learned(NamedTuple):
    """Scores, and the state of their optimizer.

    Attributes:
      scores: of each group: a weight, a block, a unit.
      first, second: Adam's moments; {} for SGD.
      steps: so far, int32.
    """

    scores: Scores
    first: Scores
    second: Scores
    steps: jax.Array


def movement(
    asked: Asked, *, score_rate: ArrayLike = 0.01, score_optimizer: str = 'adam'
) -> Pruner:
    """Keeps the groups with the largest scores. A pruned weight gets no gradient, its score does.

    The published mask follows the scores in every step; here it changes in rounds, and the first
    one keeps all. Momentum and weight decay still move pruned weights, as in the authors' code.

    Args:
      asked: what is pruned.
      score_rate: learning rate of the scores.
      score_optimizer: 'adam', as in the authors' recipe, or 'sgd', as in the paper's formula.

    Raises:
      PruneError: an unknown optimizer.
    """
    check_rounds(asked, 'movement')

    def gradient(
        state: Anew, grads: PyTree, params: PyTree, masks: Masks, clock: ArrayLike, hyper: Hyper
    ) -> tuple[Anew, PyTree]:
        del clock, hyper
        own = _stepped(state.own, _slopes(asked, grads, params, masks), score_rate)
        return state._replace(own=own), tree.apply_masks(grads, masks)

    return _by_scores(asked, StepHook(weights=straight_weights, gradient=gradient), score_optimizer)


def soft_movement(
    asked: Asked,
    *,
    score_rate: ArrayLike = 0.01,
    score_optimizer: str = 'adam',
    threshold: ArrayLike = 0.1,
    penalty: ArrayLike = 1.0,
    cut: str = 'target',
) -> Pruner:
    """Computes with the groups whose `sigmoid(S)` is above a threshold, in every step.

    Of a layer of n at least the best `int(0.005 n) + 1` stay, as in the authors' code.

    The threshold rises from 0 at the first round to `threshold` at the last, as the cubic schedule
    does. The loss gets `penalty` times the mean of sigmoid(S), averaged over the layers: how many
    weights are left is an outcome of these two.

    Args:
      asked: what is pruned.
      score_rate, score_optimizer: see `movement`.
      threshold: τ, in [0, 1).
      penalty: λ.
      cut: the last round keeps as many as the target says ('target'), or all that are above the
        threshold ('zero'), as published, and the best of each layer.

    Raises:
      PruneError: an unknown optimizer or cut, fewer than two rounds.
    """
    check_choice('cut', cut, CUTS)
    check_rounds(asked, 'soft_movement')
    start, end = asked.events[0], asked.events[-1]

    def above(state: Anew, clock: ArrayLike) -> Masks:
        done = jnp.clip((clock - start) / max(end - start, 1), 0, 1)
        now = jnp.where(state.prunes, threshold * (1 - (1 - done) ** 3), 0)
        alive, scores = asked.groups.alive(state.masks), state.own.scores
        soft = {name: alive[name] & (jax.nn.sigmoid(s) > now) for name, s in scores.items()}
        return asked.groups.spread(_at_least(_FEWEST, soft, among(scores, alive)))

    def weights(state: Anew, params: PyTree, masks: Masks, clock: ArrayLike) -> PyTree:
        soft = above(state, clock)
        return straight_through(params, {path: m & soft[path] for path, m in masks.items()})

    def gradient(
        state: Anew, grads: PyTree, params: PyTree, masks: Masks, clock: ArrayLike, hyper: Hyper
    ) -> tuple[Anew, PyTree]:
        del hyper
        slopes, soft = _slopes(asked, grads, params, masks), above(state, clock)
        for name, score in state.own.scores.items():
            share = jax.nn.sigmoid(score)
            slopes[name] += penalty / len(slopes) / score.size * share * (1 - share)
        own = _stepped(state.own, slopes, score_rate)
        return state._replace(own=own), tree.apply_masks(grads, soft)

    hook = StepHook(weights=weights, gradient=gradient)
    return _by_scores(asked, hook, score_optimizer, only_last=True, remaining=cut == 'zero')


def _by_scores(asked: Asked, hook: StepHook, optimizer: str, **rest: bool) -> Pruner:
    """A pruner that goes by learned scores; further arguments as of `chosen_anew`."""
    check_choice('score_optimizer', optimizer, SCORE_OPTIMIZERS)
    begin = functools.partial(_begun, asked=asked, optimizer=optimizer)
    return chosen_anew(asked, hook, _by_score, begin=begin, learned=True, **rest)


def _by_score(key: Key, view: View, own: Learned) -> Scores:
    del key, view
    return own.scores


def _at_least(share: float, chosen: Masks, scores: Scores) -> Masks:
    """What is chosen; in a layer with less than a share of it the best `int(share n) + 1`."""
    fewest = {name: int(share * leaf.size) + 1 for name, leaf in scores.items()}

    def few(masks: Masks) -> dict[str, jax.Array]:
        return {name: jnp.sum(mask) < fewest[name] for name, mask in masks.items()}

    def filled(carry: tuple[Masks, jax.Array]) -> tuple[Masks, jax.Array]:
        masks, _ = carry
        best, missing = layerwise_top_k(scores, fewest), few(masks)
        masks = {name: jnp.where(missing[name], best[name], m) for name, m in masks.items()}
        return masks, jnp.zeros((), bool)

    # A loop of one turn or none: under `vmap` a branch would be computed in every step.
    missing = jnp.stack(list(few(chosen).values())).any()
    return jax.lax.while_loop(lambda carry: carry[1], filled, (chosen, missing))[0]


def _begun(view: View, asked: Asked, optimizer: str) -> Learned:
    groups = asked.groups.gather(view.weights)
    # Not in half precision, where small steps would be lost.
    zeros = {
        name: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))
        for name, leaf in groups.items()
    }
    moments = zeros if optimizer == 'adam' else {}
    return Learned(zeros, moments, moments, jnp.zeros((), jnp.int32))


def _slopes(asked: Asked, grads: PyTree, params: PyTree, masks: Masks) -> Scores:
    """`(∂L/∂W') W`, summed over each group, of pruned ones too."""
    loss, stored = (dict(tree.paths(leaves)) for leaves in (grads, params))
    wide = {path: jnp.promote_types(stored[path].dtype, jnp.float32) for path in masks}
    products = {path: loss[path].astype(t) * stored[path].astype(t) for path, t in wide.items()}
    return asked.groups.gather(products)


def _stepped(own: Learned, slopes: Scores, rate: ArrayLike) -> Learned:
    """The scores after a step of their optimizer."""
    steps = own.steps + 1
    if not own.first:
        scores = {path: s - rate * slopes[path] for path, s in own.scores.items()}
        return own._replace(scores=scores, steps=steps)
    first = {path: _B1 * m + (1 - _B1) * slopes[path] for path, m in own.first.items()}
    second = {path: _B2 * v + (1 - _B2) * slopes[path] ** 2 for path, v in own.second.items()}
    scores = {}
    for path, s in own.scores.items():
        taken = steps.astype(s.dtype)
        mean, square = first[path] / (1 - _B1**taken), second[path] / (1 - _B2**taken)
        scores[path] = s - rate * mean / (jnp.sqrt(square) + _EPSILON)
    return Learned(scores, first, second, steps)
