"""How large weights and gradients are, and how norms change along gradient flow.

Lubana & Dick, "A Gradient Flow Framework For Analyzing Network Pruning", ICLR 2021,
arXiv:2009.11839.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxprune.arguments import least
from jaxprune.errors import PruneError
from jaxprune.flow.measure import MeasureFn
from jaxprune.score.derivatives import derivatives, parameters
from jaxprune.score.group_sums import check_groups, grouped
from jaxprune.score.loss import mean_gradient
from jaxprune.types import Batches, Key, Problem, View, Weights

Grouped = dict[str, jax.Array]


def weight_norm(problem: Problem) -> MeasureFn[Grouped]:
    """`(key, view, batches) -> path -> ‖w‖`, scalars: the Euclidean norm of the unpruned weights.

    Uses no data.
    """
    del problem

    def measure(key: Key, view: View, batches: Batches | None) -> Grouped:
        del key, batches
        return {path: jnp.linalg.norm(leaf.ravel()) for path, leaf in view.weights.items()}

    return measure


def gradient_norm(problem: Problem) -> MeasureFn[Grouped]:
    """`(key, view, batches) -> path -> ‖m g‖`, scalars: the norm of the masked gradient.

    g is the gradient of the mean loss over all batches, with batch statistics as in training, and
    m the mask.
    """

    def measure(key: Key, view: View, batches: Batches | None) -> Grouped:
        mean = mean_gradient(problem, view, key, batches, train=True)
        return {
            path: jnp.linalg.norm(jnp.where(mask, mean[path], 0).ravel())
            for path, mask in view.masks.items()
        }

    return measure


def distance_from_initial(problem: Problem) -> MeasureFn[Grouped]:
    """`(key, view, batches) -> path -> ‖w - w(0)‖`, scalars, over the unpruned weights.

    Uses no data; the view must hold the initial weights. Pruned weights do not count, so the
    distance of a network pruned at initialisation starts at zero.
    """
    del problem

    def measure(key: Key, view: View, batches: Batches | None) -> Grouped:
        del key, batches
        return {path: jnp.linalg.norm(leaf.ravel()) for path, leaf in displacement(view).items()}

    return measure


def displacement(view: View) -> Weights:
    """`w - w(0)` of the unpruned weights, zero where pruned.

    Raises:
      PruneError: the view holds no initial weights.
    """
    if view.initial is None:
        raise PruneError('distances from initialisation need a view with initial weights')
    return {
        path: jnp.where(view.masks[path], w - view.initial[path], 0)
        for path, w in view.weights.items()
    }


class NormDynamics(NamedTuple):
    """Squared norms of groups of weights and their derivatives under gradient flow.

    Attributes:
      squared: `‖Θ_p‖²`.
      first: `d‖Θ_p‖²/dt = -2 Θ_pᵀ g_p`.
      second: `d²‖Θ_p‖²/dt² = 2 ‖g_p‖² + 2 Θ_pᵀ (Hg)_p`; empty if it was not requested.
      gradient: `‖g_p‖²`, the group's share of the loss decay `-dL/dt = ‖g‖²`.
    """

    squared: Grouped
    first: Grouped
    second: Grouped
    gradient: Grouped


def norm_dynamics(
    problem: Problem,
    *,
    by: str = 'layer',
    train: bool = True,
    weight_decay: float = 0.0,
    second: bool = True,
    axis: int = -1,
) -> MeasureFn[NormDynamics]:
    """`(key, view, batches) -> NormDynamics`: the norm to second order in time.

    Of all parameters, biases and normalisation included. The flow is that of training: of the
    unpruned weights, on the loss with its weight decay.

    Args:
      by: 'weight', 'unit', 'layer' or 'network', see `score.group_sums`.
      train: batch statistics, or running ones.
      weight_decay: λ of `λ/2 ‖Θ‖²`.
      second: False leaves out the second derivative, and with it the Hessian product.
      axis: of the outputs of a kernel, for units.
    """
    check_groups(by)

    def measure(key: Key, view: View, batches: Batches | None) -> NormDynamics:
        at = derivatives(problem, key, view, batches, train=train, weight_decay=weight_decay)

        def summed(one: Weights, other: Weights) -> Grouped:
            return grouped({path: leaf * other[path] for path, leaf in one.items()}, by, axis)

        gradient = summed(at.gradient, at.gradient)
        acceleration = {}
        if second:
            product = summed(at.params, at.product(at.gradient))
            acceleration = {path: 2 * leaf + 2 * product[path] for path, leaf in gradient.items()}
        return NormDynamics(
            squared=summed(at.params, at.params),
            first={path: -2 * leaf for path, leaf in summed(at.params, at.gradient).items()},
            second=acceleration,
            gradient=gradient,
        )

    return measure


def measured_change(before: View, after: View, *, by: str = 'layer', axis: int = -1) -> Grouped:
    """`‖Θ_p‖²` after minus before, of all parameters: what `predicted_change` predicts."""
    old, new = parameters(before), parameters(after)
    # (a - b)(a + b) keeps digits that a² - b² would cancel.
    return grouped({p: (new[p] - old[p]) * (new[p] + old[p]) for p in old}, by, axis)


def predicted_change(
    dynamics: NormDynamics,
    learning_rate: ArrayLike,
    *,
    steps: int = 1,
    momentum: ArrayLike = 0.0,
    warm: bool = False,
) -> Grouped:
    """The change of `‖Θ_p‖²` over steps of gradient descent, to second order in the learning rate.

    Full-batch steps; minibatches add noise of their own, about `η² tr(cov g)` per step. Compute
    the dynamics with the weight decay of training. One plain step is exact:
    `-2 η Θᵀg + η² ‖g‖²`. More steps need the second derivative.

    Heavy-ball momentum μ makes steps of `η / (1 - μ)` once it is warm; from rest it moves less.
    Both are expansions of the iteration itself, which differs from the flow by O(η²), and fail once
    `η` times the steps, each as long as momentum makes it, passes about 1 over the largest
    curvature.

    Args:
      dynamics: at the first step.
      learning_rate: η.
      steps: how many.
      momentum: μ, as in optax and torch: `v = μ v + g`.
      warm: the momentum has built up (True), or starts at zero as after a pruning event (False).

    Raises:
      PruneError: several steps, or momentum that is warm, without second derivatives; momentum not
        in [0, 1), or no steps.
    """
    least(1, steps=steps)
    if not isinstance(momentum, jax.core.Tracer) and not 0 <= momentum < 1:
        raise PruneError(f'momentum must be in [0, 1), not {momentum}')
    reach = 1 - momentum
    if warm:
        # On the slow manifold v = g / (1-μ) + η μ / (1-μ)³ Hg, and the step is η / (1-μ).
        first, second = (
            steps / reach,
            (steps * (steps - 1) / 2 - steps * momentum / reach) / reach**2,
        )
    else:
        # Θ_k = Θ - η Σ_i c_(k-i) g_i, with c_n = (1 - μⁿ) / (1 - μ), and g_i = g - η a_i Hg.
        speeds = [(1 - momentum**n) / reach for n in range(steps + 1)]
        walked = [sum(speeds[: i + 1]) for i in range(steps + 1)]
        first = walked[steps]
        second = sum(speeds[steps - i] * walked[i] for i in range(1, steps))  # walked[0] is 0
    bends = isinstance(second, jax.core.Tracer) or second
    if bends and not dynamics.second:
        raise PruneError('this prediction needs norm dynamics with second derivatives')

    def change(path: str) -> jax.Array:
        along, square = dynamics.first[path], dynamics.gradient[path]
        quadratic = first**2 * square
        if bends:  # twice Θᵀ(Hg), times its weight
            quadratic += second * (dynamics.second[path] - 2 * square)
        return learning_rate * first * along + learning_rate**2 * quadratic

    return {path: change(path) for path in dynamics.first}


def saliency_drift(dynamics: NormDynamics) -> Grouped:
    """`d(Θ_pᵀ g_p)/dt = -‖g_p‖² - Θ_pᵀ (Hg)_p`: how fast a first-order importance changes.

    Raises:
      PruneError: dynamics without second derivatives.
    """
    if not dynamics.second:
        raise PruneError('a drift needs norm dynamics with second derivatives')
    return {path: -leaf / 2 for path, leaf in dynamics.second.items()}


def distance_rate(
    problem: Problem, *, by: str = 'layer', train: bool = True, axis: int = -1
) -> MeasureFn[Grouped]:
    """`(key, view, batches) -> d‖w - w(0)‖²/dt = -2 (w - w(0))ᵀ g`, over unpruned weights."""
    check_groups(by)

    def measure(key: Key, view: View, batches: Batches | None) -> Grouped:
        at = derivatives(problem, key, view, batches, train=train)
        far = displacement(view)
        return grouped({p: -2 * leaf * at.gradient[p] for p, leaf in far.items()}, by, axis)

    return measure
