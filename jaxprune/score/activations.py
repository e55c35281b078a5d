"""Scores of units from their activations: how often they are positive, and what the loss feels.

'apoz': Hu, Peng, Tai & Tang, "Network Trimming", 2016, arXiv:1607.03250. 'sensitivity': Mozer &
Smolensky, 1989. 'taylor_output': Molchanov et al., ICLR 2017, arXiv:1611.06440. As compared by
Ancona, Oztireli & Gross, "Shapley Value as Principled Metric for Structured Network Pruning", 2020,
arXiv:2006.01795.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.errors import check_choice
from jaxprune.score.gate_taylor import gates_of
from jaxprune.score.loss import mean_over_batches
from jaxprune.tree import put
from jaxprune.types import Batch, Batches, Gates, Groups, Key, Problem, ScoreFn, Scores, View

ACTIVATION_MEASURES = ('apoz', 'sensitivity', 'taylor_output')
#: Keeps a quotient finite, as in the authors' code.
_TINY = 1e-8


def activation_score(
    problem: Problem,
    *,
    by: Groups,
    measure: str = 'apoz',
    place: str = 'activation',
    train: bool = False,
) -> ScoreFn:
    """The mean over examples of something of a unit's activations `z`.

    - 'apoz': the share of positions at which `z > 0`: one minus the average percentage of zeros;
    - 'sensitivity': the sum over positions of `|∂L/∂z|`, L the example's own loss;
    - 'taylor_output': the mean over positions of `|z ∂L/∂z|`, over the root of the sum of its
      squares in the layer.

    Where several layers make a unit, as in a residual sum, their activations count as positions.

    Args:
      by: the groups that compete; they must be coupled groups.
      measure: one of `ACTIVATION_MEASURES`.
      place: where the activations are taken, see `structure.gates`.
      train: must be False.

    Raises:
      PruneError: another measure or place, groups without gates, units made inside a loop.
    """
    check_choice('measure', measure, ACTIVATION_MEASURES)
    gated = gates_of(by, place, train)

    def score(key: Key, view: View, batches: Batches | None) -> Scores:
        params = put(view.params, view.weights)
        of_example = _of_example(problem, gated, measure, params, view.model_state)

        def of_batch(batch: Batch) -> Scores:
            each = jax.vmap(of_example)(jax.tree.map(lambda leaf: leaf[:, None], batch))
            return {layer: leaf.mean(0) for layer, leaf in each.items()}

        made = mean_over_batches(of_batch, batches)
        if measure != 'taylor_output':
            return made
        return {n: s / (jnp.sqrt(jnp.square(s).sum()) + _TINY) for n, s in made.items()}

    return score


def _of_example(
    problem: Problem, gated: Gates, measure: str, params: Any, model_state: Any
) -> Callable[[Batch], Scores]:
    """`batch of one example -> the measure`, layer -> `(units,)`."""

    def measured(batch: Batch) -> Scores:
        made = gated.activations(params, batch.x, model_state)
        if measure == 'apoz':  # NaN stays NaN
            return _shares(gated, jax.tree.map(lambda z: (z > 0) + 0 * z, made))

        def loss(shifts: Any) -> jax.Array:
            logits = gated.shifted(shifts, params, batch.x, model_state)
            return problem.loss(logits, batch.y).sum()

        slopes = jax.grad(loss)(jax.tree.map(jnp.zeros_like, made))
        if measure == 'sensitivity':
            return gated.by_unit(jax.tree.map(jnp.abs, slopes))
        return _shares(gated, jax.tree.map(lambda z, g: jnp.abs(z * g), made, slopes))

    return measured


def _shares(gated: Gates, arrays: dict[str, list[jax.Array]]) -> Scores:
    """The mean over positions."""
    sums = gated.by_unit(arrays)
    counts = gated.by_unit(jax.tree.map(jnp.ones_like, arrays))
    return {layer: total / counts[layer] for layer, total in sums.items()}
