"""Taylor on gates: what a whole unit contributes to the loss, by the slope along its gate.

Molchanov, Mallya, Tyree, Frosio & Kautz, "Importance Estimation for Neural Network Pruning", CVPR
2019, arXiv:1906.10771. The slope along a gate of one is the sum of `w g` over the unit's weights,
so a unit's whole contribution costs no more than a gradient.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.arguments import least
from jaxprune.errors import PruneError, check_choice, shown
from jaxprune.score.loss import mean_over_batches
from jaxprune.tree import put
from jaxprune.types import Batch, Batches, Gates, Groups, Key, Problem, ScoreFn, Scores, View

#: What a change of the loss counts as: its square, its size, or itself.
SIGNS = ('square', 'absolute', 'signed')
#: Whose changes are added up: those of a batch's mean loss, or of each example's own.
PER = ('batch', 'example')
SHARED = ('sum', 'mean')


def gate_taylor(
    problem: Problem,
    *,
    by: Groups,
    order: int = 1,
    sign: str = 'square',
    per: str = 'batch',
    place: str = 'norm',
    shared: str = 'sum',
    at_once: int = 64,
    train: bool = False,
) -> ScoreFn:
    """The change of the loss when a unit is removed, to first or second order in its gate.

    With `g` and `h` the first and second derivative of the loss along the gate, the change is `-g`,
    or `-g + h / 2`. Second order is exact where the loss is quadratic in the gate. It is computed
    for a batch's mean loss or for each example, made positive by `sign`, and then averaged:
    examples cancel within a batch, not across batches.

    Published points of it: the defaults are Taylor-FO-BN; `per='example'` is its fine-grained
    variant; `sign='absolute', per='example', place='activation'` is the Taylor score that Ancona et
    al. (2020, arXiv:2006.01795) compare with, and `sign='signed'` their signed one.

    Args:
      by: the groups that compete; they must be coupled groups.
      order: 1 or 2. Order 2 takes one Hessian-vector product for each unit.
      sign: 'square', 'absolute' or 'signed'; high = keep, so a unit whose removal lowers the loss
        goes first under 'signed'.
      per: 'batch' or 'example'.
      place: of the gates, see `structure.gates`.
      shared: a gate that several layers share has the sum of their slopes. 'mean' divides the
        score by the number of these layers, as the authors do for the stages of a ResNet.
      at_once: units whose second derivatives are computed together; bounds the memory.
      train: must be False: gates are put into the network in evaluation mode.

    Raises:
      PruneError: another choice; batch statistics; groups without gates.
    """
    if order not in (1, 2):
        raise PruneError(f'gate_taylor has the order 1 or 2, not {shown(order)}')
    check_choice('sign', sign, SIGNS)
    check_choice('per', per, PER)
    check_choice('shared', shared, SHARED)
    least(1, at_once=at_once)
    gated = gates_of(by, place, train)

    def score(key: Key, view: View, batches: Batches | None) -> Scores:
        changes = _changes(problem, gated, view, order, at_once)

        def of_batch(batch: Batch) -> Scores:
            if per == 'batch':
                return signed(changes(batch), sign)
            singles = jax.tree.map(lambda leaf: leaf[:, None], batch)
            each = signed(jax.vmap(changes)(singles), sign)
            return {layer: leaf.mean(0) for layer, leaf in each.items()}

        made = mean_over_batches(of_batch, batches)
        if shared == 'mean':
            made = {layer: leaf / gated.counts[layer] for layer, leaf in made.items()}
        return made

    return score


def gates_of(by: Groups, place: str, train: bool = False) -> Gates:
    """The gates of what competes.

    Raises:
      PruneError: it is not coupled groups, or batch statistics are asked for.
    """
    if not isinstance(by, Groups) or by.gates is None:
        raise PruneError("this scores coupled groups: by=jp.competing('unit', shapes, read)")
    if train:
        raise PruneError(
            'gates are put into the network in evaluation mode, without batch statistics'
        )
    return by.gates(place)


def gated_loss(
    problem: Problem, gated: Gates, view: View
) -> Callable[[dict[str, Any], Batch], jax.Array]:
    """`(gates, batch) -> one loss per example` of the masked network."""
    params = put(view.params, view.weights)

    def loss(gates: dict[str, Any], batch: Batch) -> jax.Array:
        return problem.loss(gated.apply(gates, params, batch.x, view.model_state), batch.y)

    return loss


def ones(gated: Gates, view: View) -> dict[str, jax.Array]:
    """Gates that change nothing, in the precision of the weights."""
    dtype = jnp.result_type(*view.weights.values())
    return {layer: jnp.ones(n, dtype) for layer, n in gated.sizes.items()}


def _changes(
    problem: Problem, gated: Gates, view: View, order: int, at_once: int
) -> Callable[[Batch], Scores]:
    """`batch -> change of its mean loss` when each unit alone is removed."""
    losses, here = gated_loss(problem, gated, view), ones(gated, view)

    def changes(batch: Batch) -> Scores:
        slope = jax.grad(lambda gates: losses(gates, batch).mean())
        first = slope(here)
        if order == 1:
            return {layer: -leaf for layer, leaf in first.items()}
        return {
            layer: -leaf + _curvature(slope, here, layer, at_once) / 2
            for layer, leaf in first.items()
        }

    return changes


def _curvature(
    slope: Callable[[dict[str, jax.Array]], dict[str, jax.Array]],
    here: dict[str, jax.Array],
    layer: str,
    at_once: int,
) -> jax.Array:
    """The Hessian's diagonal for the gates of a layer: one product for each unit."""

    def along(own: jax.Array) -> jax.Array:
        return slope({**here, layer: own})[layer]

    def of(unit: jax.Array) -> jax.Array:
        _, bent = jax.jvp(along, (here[layer],), (unit,))
        return bent @ unit

    units = jnp.eye(len(here[layer]), dtype=here[layer].dtype)
    return jax.lax.map(of, units, batch_size=min(at_once, len(units)))


def signed(changes: Scores, sign: str) -> Scores:
    """What changes of the loss count as, see `SIGNS`."""
    how = {'square': jnp.square, 'absolute': jnp.abs, 'signed': lambda change: change}[sign]
    return {layer: how(change) for layer, change in changes.items()}
