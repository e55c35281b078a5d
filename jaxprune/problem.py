"""What is trained: pairs of pure functions made from flax modules, or from anyone's own."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxprune import tree
from jaxprune.types import Key, LossFn, Problem, PyTree, Rule, RunState, View

if TYPE_CHECKING:
    import flax.linen as nn


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Softmax cross-entropy per example: logits `(batch, classes)`, integer labels `(batch,)`."""
    log_probability = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_probability, labels[:, None], axis=-1)[:, 0]


def problem_from_flax(
    module: 'nn.Module',
    input_shape: tuple[int, ...],
    *,
    input_dtype: Any = jnp.float32,
    loss: LossFn = cross_entropy,
    prunable: Rule = tree.kernels,
) -> Problem:
    """A problem from a flax linen module, called as `module(x, train=...)`.

    Args:
      module: the network. Its mode is set by the argument `train`, `training`, `is_training` or
        `deterministic`, whichever it has; a module without any is called the same in both modes.
      input_shape: shape of one example, without the batch axis.
      input_dtype: of its inputs; `jnp.int32` for tokens.
      loss: per-example loss of `(logits, labels)`.
      prunable: which leaves may be pruned, see `jaxprune.tree`.
    """
    import inspect

    flags = {'train': True, 'training': True, 'is_training': True, 'deterministic': False}
    found = [f for f in inspect.signature(type(module).__call__).parameters if f in flags]

    def mode(train: bool) -> dict[str, bool]:
        return {flag: train == flags[flag] for flag in found}

    def call(variables, x, train, **kwargs):
        return module.apply(variables, x, **mode(train), **kwargs)

    def init(key: Key) -> tuple[PyTree, PyTree]:
        example = jnp.zeros((1, *input_shape), input_dtype)
        variables = dict(module.init(key, example, **mode(False)))
        return variables.pop('params'), variables

    def apply(params, model_state, x, *, train: bool, key: Key | None = None):
        variables = {'params': params, **model_state}
        rngs = {} if key is None else {'rngs': {'dropout': key}}
        if train and model_state:
            return call(variables, x, train, mutable=list(model_state), **rngs)
        return call(variables, x, train, **rngs), model_state

    return Problem(init, apply, loss, prunable)


def problem_from_functions(
    init: Callable[[Key], PyTree],
    apply: Callable[[PyTree, jax.Array], jax.Array],
    *,
    loss: LossFn = cross_entropy,
    prunable: Rule = tree.kernels,
) -> Problem:
    """A problem from plain functions on any pytree of parameters, without model state.

    Args:
      init: `key -> params`.
      apply: `(params, x) -> logits`.
    """
    return Problem(
        init=lambda key: (init(key), {}),
        apply=lambda params, model_state, x, *, train, key=None: (apply(params, x), model_state),
        loss=loss,
        prunable=prunable,
    )


def view(problem: Problem, params: PyTree, model_state: PyTree = None, masks=None) -> View:
    """What a score may use, from a user's own parameters.

    Args:
      params: all parameters; pruned weights are taken as zero whatever they hold.
      model_state: batch statistics and the like, {} if there are none.
      masks: masks in force; None keeps everything.
    """
    masks = tree.ones(tree.pick(params, problem.prunable)) if masks is None else masks
    weights = tree.pick(tree.apply_masks(params, masks), problem.prunable)
    tree.check_same_paths('masks', masks, weights)
    return View(weights, params, {} if model_state is None else model_state, masks)


def view_of(problem: Problem, state: RunState) -> View:
    """The view of a run."""
    return view(problem, state.params, state.model_state, state.masks)._replace(
        opt_state=state.opt_state
    )
