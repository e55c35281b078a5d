"""NTK-SAP: keep the trace of the neural tangent kernel (Wang et al., ICLR 2023)."""

import jax
import jax.numpy as jnp

from jaxprune.arguments import positive
from jaxprune.errors import PruneError
from jaxprune.rng import stream
from jaxprune.score.loss import one_input
from jaxprune.tree import pick, put
from jaxprune.types import Batches, Key, Problem, PyTree, ScoreFn, Scores, View, Weights


def ntk_sap(
    problem: Problem, *, train: bool, samples: int = 100, repeats: int = 1, epsilon: float = 0.01
) -> ScoreFn:
    """`|∂/∂m E ‖f(x; m θ) - f(x; m (θ + εΔ))‖²|` at the current masks.

    x is Gaussian noise of the shape of an input, `Δ ~ N(0, 1)` on the prunable weights, and θ is
    drawn anew from `problem.init` for every repeat: what is scored is the architecture, not the
    weights at hand. For small ε the expectation is `ε² ‖∂f/∂θ‖²`, that is ε² times the trace of
    the tangent kernel. The gradients of all repeats are averaged before the absolute value is
    taken; pruned weights score 0. Of `batches` only the shape of one input counts (Wang, Li &
    Sun, "NTK-SAP: Improving neural network pruning by aligning training dynamics", 2023,
    arXiv:2304.02840; a finite difference of the tangent kernel's trace).

    Args:
      train: True normalises both networks by the statistics that the noise has in the unperturbed
        one, held fixed (the original); False by the initial statistics.
      samples: inputs per repeat. The original takes ten per class, at most 256 per repeat.
      repeats: fresh weights, perturbations and inputs; unrolled.
      epsilon: ε, the size of the perturbation.

    Raises:
      PruneError: fewer than one sample or repeat, or an epsilon that is not above 0; when scoring,
        no batches, or inputs that are whole numbers, such as tokens.
    """
    if samples < 1 or repeats < 1:
        raise PruneError(f'ntk_sap takes 1 sample and 1 repeat or more, not {samples}, {repeats}')
    positive('epsilon of ntk_sap', epsilon)

    def score(key: Key, view: View, batches: Batches | None) -> Scores:
        like = one_input(batches, 'ntk_sap')
        if not jnp.issubdtype(like.dtype, jnp.floating):
            raise PruneError(f'ntk_sap draws Gaussian inputs, but inputs are {like.dtype}')
        masks = {path: mask.astype(view.weights[path].dtype) for path, mask in view.masks.items()}
        total = {path: jnp.zeros_like(mask) for path, mask in masks.items()}
        for repeat in range(repeats):
            own = jax.random.fold_in(key, repeat)
            x = jax.random.normal(stream(own, 'input'), (samples, *like.shape), like.dtype)
            params, model_state = problem.init(stream(own, 'init'))
            params, model_state = _as(view.params, params), _as(view.model_state, model_state)
            noise = {
                path: epsilon * jax.random.normal(stream(own, path), mask.shape, mask.dtype)
                for path, mask in masks.items()
            }
            if train:
                weights = pick(params, problem.prunable)
                masked = put(params, {path: mask * weights[path] for path, mask in masks.items()})
                model_state = batch_statistics(problem, masked, model_state, x, own)
            change = jax.grad(output_change, argnums=1)
            gradient = change(problem, masks, noise, params, model_state, x)
            total = jax.tree.map(jnp.add, total, gradient)
        return {
            path: jnp.where(view.masks[path], jnp.abs(leaf) / repeats, 0)
            for path, leaf in total.items()
        }

    return score


def output_change(
    problem: Problem, masks: Weights, noise: Weights, params: PyTree, model_state: PyTree, x
) -> jax.Array:
    """The mean over inputs of `‖f(x; m θ) - f(x; m (θ + noise))‖²`, with fixed statistics."""
    weights = pick(params, problem.prunable)

    def outputs(weights: Weights) -> jax.Array:
        masked = {path: mask * weights[path] for path, mask in masks.items()}
        return problem.apply(put(params, masked), model_state, x, train=False, key=None)[0]

    difference = outputs(weights) - outputs({p: w + noise[p] for p, w in weights.items()})
    return (difference**2).reshape(x.shape[0], -1).sum(-1).mean()


def batch_statistics(
    problem: Problem, params: PyTree, model_state: PyTree, x: jax.Array, key: Key
) -> PyTree:
    """A model state with the batch's own statistics in place of running averages.

    A train-mode call moves an average `s` to `a s + (1 - a) b`, with a the layer's momentum and b
    the statistic of the batch; it returns neither. Two calls determine both: one from `s = 0`, one
    from a large s. Other state keeps its value.
    """
    # Large, so that a is read from digits that b does not share.
    far = 2.0**20

    def after(start: float) -> PyTree:
        state = jax.tree.map(lambda s: jnp.full_like(s, start) if _floating(s) else s, model_state)
        return problem.apply(params, state, x, train=True, key=key)[1]

    def statistic(before, low, high):
        if not _floating(before):
            return before
        momentum = (high - low) / far
        known = (momentum >= 0) & (momentum < 1)
        return jnp.where(known, low / jnp.where(known, 1 - momentum, 1), before)

    return jax.tree.map(statistic, model_state, after(0.0), after(far))


def _floating(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _as(like: PyTree, tree: PyTree) -> PyTree:
    """The tree in the precision of another."""
    return jax.tree.map(lambda a, b: b.astype(a.dtype) if _floating(a) else b, like, tree)
