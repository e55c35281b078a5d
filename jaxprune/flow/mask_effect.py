"""The effect of a mask on loss, gradient and first-order evolution: exact and predicted.

A view is the network before pruning; the masks are those it is pruned to. The displacement of the
weights is `δ = -θ` where they are pruned, and a prediction expands along it (Lubana & Dick, ICLR
2021, arXiv:2009.11839; LeCun, Denker & Solla, 1990).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxprune.flow.measure import MaskMeasureFn
from jaxprune.score.derivatives import derivatives, dot, moving, parameters
from jaxprune.score.group_sums import check_groups, grouped
from jaxprune.score.loss import mean_loss, mean_over_batches
from jaxprune.tree import check_masks_of, put
from jaxprune.types import Batch, Batches, Key, Masks, Problem, View, Weights


class Change(NamedTuple):
    """A number before pruning, and its change by a mask.

    Attributes:
      before: the number itself.
      exact: its change.
      first: predicted to first order in the weights removed.
      second: to second order.
    """

    before: jax.Array
    exact: jax.Array
    first: jax.Array
    second: jax.Array


class GradientChange(NamedTuple):
    """The change of `‖g‖²`.

    Attributes:
      full: of the gradient with respect to all parameters of the network before, pruned ones
        included: what GraSP's measure, `first`, predicts.
      survivors: `‖m g(m Θ)‖²`, the gradient that the pruned network follows.
    """

    full: Change
    survivors: jax.Array


def loss_change(
    problem: Problem, *, train: bool = False, temperature: float = 1.0
) -> MaskMeasureFn[Change]:
    """`(key, view, masks, batches) -> Change` of the mean loss.

    `L(m Θ) - L(Θ)` against `-Σ θ g` over the weights removed, and that `+ ½ δᵀHδ`: one Hessian
    product for the whole set.
    """

    def measure(key: Key, view: View, masks: Masks, batches: Batches | None) -> Change:
        step = removal(view, masks)
        loss = mean_loss(problem, view, key, train=train, temperature=temperature)
        params = parameters(view)
        pruned = {path: leaf + step[path] for path, leaf in params.items()}

        def at(values: Weights) -> jax.Array:
            return mean_over_batches(lambda batch: loss(put(view.params, values), batch), batches)

        near = derivatives(problem, key, view, batches, train=train, temperature=temperature)
        before, first = at(params), dot(near.gradient, step)
        second = first + dot(step, near.product(step)) / 2
        return Change(before, at(pruned) - before, first, second)

    return measure


def gradient_norm_change(
    problem: Problem, *, train: bool = False, temperature: float = 1.0
) -> MaskMeasureFn[GradientChange]:
    """`(key, view, masks, batches) -> GradientChange` of `‖g‖²`, over all parameters.

    To first order `2 gᵀHδ = -2 Σ θ (Hg)` over the weights removed; to second order
    `+ ‖Hδ‖² + gᵀ ∇³L[δ, δ]`.
    """

    def measure(key: Key, view: View, masks: Masks, batches: Batches | None) -> GradientChange:
        step = removal(view, masks)
        params = parameters(view)
        loss = mean_loss(problem, view, key, train=train, temperature=temperature)

        def gradient(along) -> Weights:
            """Of the loss at `Θ + along δ`."""

            def one(batch: Batch) -> Weights:
                here = {path: leaf + along * step[path] for path, leaf in params.items()}
                return jax.grad(lambda v: loss(put(view.params, v), batch))(here)

            # Weights pruned before do not count after, either.
            return moving(view.masks, mean_over_batches(one, batches))

        def slope(along):
            return jax.jvp(gradient, (along,), (jnp.ones_like(along),))

        dtype = jnp.result_type(*params.values())
        start, unit = jnp.zeros((), dtype), jnp.ones((), dtype)
        (g, dg), (_, ddg) = jax.jvp(slope, (start,), (unit,))
        after = gradient(unit)
        before, first = dot(g, g), 2 * dot(g, dg)
        second = first + dot(dg, dg) + dot(g, ddg)
        left = moving(masks, after)
        full = Change(before, dot(after, after) - before, first, second)
        return GradientChange(full, dot(left, left))

    return measure


class EvolutionError(NamedTuple):
    """How far a mask moves `Θᵀg`, half the rate of decay of ‖Θ‖².

    Attributes:
      absolute: `|Σ over the kept θ g - Σ over all θ g|`.
      relative: the same over `‖Θ‖ ‖g‖`, its largest possible value; unlike Θᵀg itself that is not
        zero for weights before batch norm. Zero where both are.
    """

    absolute: dict[str, jax.Array]
    relative: dict[str, jax.Array]


def evolution_error(
    problem: Problem,
    *,
    by: str = 'layer',
    train: bool = False,
    temperature: float = 1.0,
    axis: int = -1,
) -> MaskMeasureFn[EvolutionError]:
    """`(key, view, masks, batches) -> EvolutionError` of the prunable weights, group by group.

    The first-order evolution that loss preservation keeps: with g as it is before pruning.
    """
    check_groups(by)

    def measure(key: Key, view: View, masks: Masks, batches: Batches | None) -> EvolutionError:
        step = removal(view, masks)
        near = derivatives(problem, key, view, batches, train=train, temperature=temperature)

        def summed(values: Weights) -> dict[str, jax.Array]:
            return grouped({path: values[path] for path in view.weights}, by, axis)

        def squares(values: Weights) -> dict[str, jax.Array]:
            return summed({path: leaf**2 for path, leaf in values.items()})

        lost = summed({path: leaf * near.gradient[path] for path, leaf in step.items()})
        absolute = {path: jnp.abs(leaf) for path, leaf in lost.items()}
        weights, gradients = squares(near.params), squares(near.gradient)
        largest = {path: jnp.sqrt(leaf * gradients[path]) for path, leaf in weights.items()}
        relative = {
            path: jnp.where(
                largest[path] > 0, leaf / jnp.where(largest[path] > 0, largest[path], 1), 0
            )
            for path, leaf in absolute.items()
        }
        return EvolutionError(absolute, relative)

    return measure


def removal(view: View, masks: Masks) -> Weights:
    """`δ`: the change of every parameter by pruning to these masks, zero where nothing is removed.

    Raises:
      PruneError: masks of other paths or shapes than the weights, or not boolean.
    """
    check_masks_of(view.weights, masks)
    return {
        path: jnp.where(masks[path], 0, -leaf) if path in masks else jnp.zeros_like(leaf)
        for path, leaf in parameters(view).items()
    }
