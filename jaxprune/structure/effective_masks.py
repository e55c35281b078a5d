"""Effective sparsity: what is left when weights that do no work are not counted.

Vysogorets & Kempe, "Connectivity Matters" (arXiv:2107.02306). All numbers are relative to the
original number of prunable weights, as direct sparsity is.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import tree
from jaxprune.select import count_kept
from jaxprune.structure.connectivity import Connect, connectivity
from jaxprune.structure.forward_order import forward_order
from jaxprune.structure.groups import Coupled, groups
from jaxprune.types import Masks, Problem, PyTree, Rule


def forward_of(problem: Problem) -> Callable[[PyTree, PyTree, PyTree], PyTree]:
    """A problem's network in evaluation mode, `(params, x, model_state) -> outputs`."""

    def forward(params, x, model_state):
        return problem.apply(params, model_state, x, train=False, key=None)[0]

    return forward


def _forward(problem: Problem, input_shape: tuple[int, ...], input_dtype: Any):
    """A problem's network, and abstract arguments to trace it: params, one example, model state."""
    params, model_state = jax.eval_shape(problem.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((1, *input_shape), input_dtype)
    return forward_of(problem), params, x, model_state


def groups_of(
    problem: Problem, input_shape: tuple[int, ...], input_dtype: Any = jnp.float32
) -> Coupled:
    """The coupled groups of a problem in evaluation mode; arguments as in `connectivity_of`."""
    _, params, x, model_state = _forward(problem, input_shape, input_dtype)
    return groups(problem, params, x, model_state)


def connectivity_of(
    problem: Problem, input_shape: tuple[int, ...], input_dtype: Any = jnp.float32
) -> Connect:
    """`masks -> effective masks` of a problem in evaluation mode.

    Args:
      input_shape: shape of one example, without the batch axis.
      input_dtype: of the inputs; `jnp.int32` for tokens.
    """
    return connectivity(*_forward(problem, input_shape, input_dtype), prunable=problem.prunable)


def forward_shapes(
    problem: Problem, input_shape: tuple[int, ...], input_dtype: Any = jnp.float32
) -> dict[str, tuple[int, ...]]:
    """`shapes_in_order` of a problem; other arguments as in `connectivity_of`."""
    return shapes_in_order(*_forward(problem, input_shape, input_dtype), prunable=problem.prunable)


def shapes_in_order(
    forward: Callable[..., PyTree],
    params: PyTree,
    x: PyTree,
    *constants: PyTree,
    prunable: Rule = tree.kernels,
) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the prunable leaves, in the order in which the network uses them.

    Arguments: see `connectivity`.
    """
    shapes = tree.shapes(tree.pick(params, prunable))
    used = [path for path in forward_order(forward, params, x, *constants) if path in shapes]
    # A leaf that nothing uses comes last; leaving it out would lose its mask.
    return {path: shapes[path] for path in [*used, *sorted(set(shapes) - set(used))]}


def effective_mask(
    forward: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    masks: Masks,
    x: PyTree,
    *,
    prunable: Rule = tree.kernels,
) -> Masks:
    """The masks without the weights that lie on no path from input to output.

    For many masks of one network make `connectivity(forward, params, x)` once and call that.

    Args:
      forward: `(params, x) -> outputs`, in evaluation mode.
      masks: path -> bool array, True = keep.
      x: one example with a batch axis of 1; its values do not matter.
    """
    return connectivity(forward, params, x, prunable=prunable)(masks)


def compression(masks: Masks) -> jax.Array:
    """Weights before / weights kept, a float scalar; infinite where none is kept."""
    left = sum(count_kept(masks).values())
    size = sum(mask.size for mask in masks.values())
    return jnp.where(left > 0, size / jnp.maximum(left, 1), jnp.inf)


def effective_compression(connect: Connect, masks: Masks) -> jax.Array:
    """Weights before / weights that lie on a path; infinite where the network is cut in two.

    Args:
      connect: what `connectivity` returned.
    """
    return compression(connect(masks))


def dead_units(masks: Masks, *, axis: int = -1) -> dict[str, jax.Array]:
    """Path -> bool `(units,)`: output units of a layer into which no weight of the mask leads.

    Given effective masks these are the units that no input reaches, or that reach no output,
    through that layer; a skip connection may still feed the sum they are added to.

    Args:
      masks: usually effective masks.
      axis: the axis of output units: the last for dense `(in, out)` and convolution HWIO kernels.
    """
    return {
        path: ~mask.any(axis=tuple(i for i in range(mask.ndim) if i != axis % mask.ndim))
        for path, mask in masks.items()
    }
