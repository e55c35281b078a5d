"""Importance by gradient flow: one family with magnitude, SNIP's and GraSP's measure as points.

Lubana & Dick, "A Gradient Flow Framework For Analyzing Network Pruning", ICLR 2021,
arXiv:2009.11839.
"""

from typing import Any

import jax.numpy as jnp

from jaxprune.arguments import positive
from jaxprune.errors import PruneError, check_choice, shown
from jaxprune.score.derivatives import derivatives
from jaxprune.score.group_sums import check_groups, grouped, spread
from jaxprune.types import Batches, Groups, Key, Problem, ScoreFn, Scores, View, Weights

MODES = ('signed', 'abs_of_sum', 'sum_of_abs')
BIASES = ('none', 'magnitude', 'distance_from_initial')

#: The measures of the paper as points of the family.
MEASURES: dict[str, dict[str, Any]] = {
    'magnitude': {'order': 0},
    'loss_preservation': {'order': 1},
    'biased_loss_preservation': {'order': 1, 'bias': 'magnitude'},
    'gradient_norm_increase': {'order': 2, 'mode': 'signed', 'temperature': 200.0},
    'gradient_norm_preservation': {'order': 2, 'mode': 'abs_of_sum'},
}


def importance(
    problem: Problem,
    *,
    order: int = 1,
    mode: str = 'sum_of_abs',
    bias: str = 'none',
    temperature: float = 1.0,
    train: bool = False,
    by: str | Groups = 'weight',
    axis: int = -1,
) -> ScoreFn:
    """The contribution of weights to a time derivative of their norm under gradient flow.

    The order is that of the derivative of `‖Θ_p‖²`; it determines the product of every weight:

    - order 0: `θ θ`, the norm itself: magnitude (squared, which gives the same ranking);
    - order 1: `θ g`, with `d‖Θ_p‖²/dt = -2 Σ θ g`: the effect of removal on the loss;
    - order 2: `θ (Hg)`, with `d²‖Θ_p‖²/dt² = 2‖g_p‖² + 2 Σ θ (Hg)`: the effect of removal on
      the gradient's norm. H acts on the gradient of all parameters.

    A group's score is the sum of its products ('signed'), the absolute value of that sum
    ('abs_of_sum'), or the sum of absolute values ('sum_of_abs'). The last two differ, since the
    products of a filter may cancel. A bias multiplies every product before that. High = keep, so
    'signed' of order 2 prunes the most negative, which increases the gradient's norm: GraSP.

    Where a filter is followed by batch norm with batch statistics, its products of order 1 add up
    to zero, and of order 2 to `-‖g_p‖²`: hence running statistics by default, as in the paper.

    Args:
      problem: the network.
      order: 0, 1 or 2.
      mode: see above; 'sum_of_abs' is loss preservation of order 1.
      bias: 'none', 'magnitude' (times |θ|, the paper's extension), 'distance_from_initial' (times
        |θ - θ(0)|; the view must hold the initial weights).
      temperature: the logits are divided by it; 200 is GraSP's.
      train: batch statistics, or running ones.
      by: the groups that are removed: 'weight', 'unit' (filter), 'layer' or 'network', and every
        weight gets the score of its group; or what competes, and the scores are those of groups.
      axis: of the outputs of a kernel, for units.

    Raises:
      PruneError: an unknown order, mode, bias or kind of group; a temperature not above 0; when
        called, initial weights that the view lacks.
    """
    if order not in (0, 1, 2):
        raise PruneError(f'importance has the order 0, 1 or 2, not {shown(order)}')
    check_choice('mode', mode, MODES)
    check_choice('bias', bias, BIASES)
    check_groups(by)
    positive('temperature of importance', temperature)

    def factor(key: Key, view: View, batches: Batches | None) -> Weights:
        """The factor of every weight."""
        if order == 0:
            return view.weights
        at = derivatives(problem, key, view, batches, train=train, temperature=temperature)
        return at.gradient if order == 1 else at.product(at.gradient)

    def score(key: Key, view: View, batches: Batches | None) -> Scores:
        other = factor(key, view, batches)
        products = {path: w * other[path] for path, w in view.weights.items()}
        if mode == 'sum_of_abs':
            products = {path: jnp.abs(leaf) for path, leaf in products.items()}
        if bias != 'none':
            far = _biases(view, bias)
            products = {path: far[path] * leaf for path, leaf in products.items()}
        sums = grouped(products, by, axis)
        if mode == 'abs_of_sum':
            sums = {path: jnp.abs(leaf) for path, leaf in sums.items()}
        return sums if isinstance(by, Groups) else spread(sums, view.weights, by, axis)

    return score


def _biases(view: View, bias: str) -> Weights:
    if bias == 'magnitude':
        return {path: jnp.abs(w) for path, w in view.weights.items()}
    if view.initial is None:
        raise PruneError("the bias 'distance_from_initial' needs a view with initial weights")
    return {path: jnp.abs(w - view.initial[path]) for path, w in view.weights.items()}
