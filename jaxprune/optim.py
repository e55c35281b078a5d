"""Optimizers: any optax transformation made to respect masks, and optax by name."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from jaxprune.errors import JaxpruneError, PruneError, check_choice
from jaxprune.tree import check_masks, map_moments, mask_tree
from jaxprune.types import Hyper, Masks, PyTree


class MakeFn(Protocol):
    def __call__(self, hyper: Hyper, learning_rate: jax.Array) -> optax.GradientTransformation:
        """Makes the transformation of one run from its numbers, inside the compiled step."""


class Optimizer(NamedTuple):
    """An optimizer whose numbers are traced, one set per run.

    Attributes:
      make: makes the transformation, see `MakeFn`.
      coupled_decay: weight decay is added to the gradient (L2, as torch's SGD and Adam do);
        False if the optimizer takes weight decay itself (decoupled, as AdamW).
      rate: `(clock, hyper) -> learning rate` of a step; the clock is a step count.
    """

    make: MakeFn
    coupled_decay: bool
    rate: Callable[[jax.Array, Hyper], jax.Array]


class Finetune(NamedTuple):
    """A phase of training that begins where the clock says so; its peak is `hyper.finetune`'s.

    Attributes:
      start: the clock of its first step.
      schedule: `steps of the phase taken before -> factor` of its learning rate.
    """

    start: int
    schedule: Callable[[jax.Array], jax.Array]


def sparse(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that pruned weights get neither gradients nor updates.

    Pass the masks at each update: `tx.update(grads, opt_state, params, masks=masks)`. With
    pruned weights and moments at zero before (see `mask_opt_state`), both stay exactly zero, and
    the forward pass needs no multiplication by the mask: set the weights to zero once, with
    `apply_masks`.

    Args:
      tx: any optax transformation.

    Returns:
      A transformation whose update takes `masks`: path -> bool; leaves without one stay dense.
    """
    inner = optax.with_extra_args_support(tx)

    def update(updates, state, params=None, *, masks: Masks, **extra):
        keep = mask_tree(updates, masks)
        updates, state = inner.update(_where(keep, updates), state, params, **extra)
        return _where(keep, updates), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def mask_opt_state(
    tx: optax.GradientTransformation, opt_state: PyTree, params: PyTree, masks: Masks
) -> PyTree:
    """The optimizer state with all moments of pruned weights set to zero.

    `tree.map_moments` says where moments are found. Leaves of another shape belong to no single
    weight (novograd's scalars, adafactor's rows and columns) and stay as they are.

    Args:
      tx: the optimizer, as it is or wrapped by `sparse`.
      opt_state: its state; it is not changed.
      params: all parameters.
      masks: path -> bool array, True = keep; leaves without one stay dense.

    Raises:
      PruneError: masks that fit no parameter, or a state that is not one of this optimizer.
    """
    if jax.tree.structure(jax.eval_shape(tx.init, params)) != jax.tree.structure(opt_state):
        raise PruneError('opt_state is not a state of this optimizer for these params')
    check_masks(params, masks)

    def masked(path: str, leaf: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        if path not in masks or jnp.shape(leaf)[jnp.ndim(leaf) - len(shape) :] != shape:
            return leaf
        return jnp.where(masks[path], leaf, jnp.zeros_like(leaf))

    return map_moments(masked, opt_state, params)


def _where(keep: PyTree, values: PyTree) -> PyTree:
    # A selection, not a product: 0 * nan would let a broken gradient through.
    return jax.tree.map(lambda k, v: jnp.where(k, v, jnp.zeros_like(v)), keep, values)


def optimizer(
    name: str,
    static: Mapping[str, Any],
    schedule: Callable[[jax.Array], jax.Array],
    finetune: Finetune | None = None,
) -> Optimizer:
    """An optax optimizer by name, as a function of traced hyperparameters.

    Args:
      name: a function of `optax` that takes `learning_rate`: 'sgd', 'adam', 'adamw', ...
      static: its arguments that are not numbers (`nesterov`, ...); numbers come with `Hyper`.
      schedule: the factor of the learning rate, see `rate_schedule`.
      finetune: a phase after training with a learning rate and a schedule of its own.
    """
    build = _function(name)
    decoupled = decays(name)

    def make(hyper: Hyper, learning_rate: jax.Array) -> optax.GradientTransformation:
        numbers = dict(hyper.optimizer)
        if decoupled:
            numbers['weight_decay'] = hyper.weight_decay
        return build(learning_rate=learning_rate, **static, **numbers)

    def rate(clock: jax.Array, hyper: Hyper) -> jax.Array:
        training = schedule(clock) * hyper.learning_rate
        if finetune is None:
            return training
        after = finetune.schedule(clock - finetune.start) * hyper.finetune['learning_rate']
        return jnp.where(clock < finetune.start, training, after)

    return Optimizer(make, not decoupled, rate)


#: Learning-rate schedules, with what they do.
RATE_SCHEDULES = {
    'constant': 'the peak learning rate throughout',
    'cosine': 'from the peak to zero along half a cosine',
    'step': 'the peak, times factor at each of milestones',
}


def rate_schedule(
    name: str, steps: int, *, warmup: int = 0, milestones: Sequence[int] = (), factor: float = 0.1
) -> Callable[[jax.Array], jax.Array]:
    """The factor of the learning rate as a function of the step.

    Args:
      name: 'constant', 'cosine' (to zero at `steps`) or 'step' (times `factor` at each milestone).
      steps: length of training.
      warmup: steps of linear increase from zero before the schedule begins.
      milestones: steps counted from the start of training, for 'step'.
    """
    check_choice('schedule', name, RATE_SCHEDULES, JaxpruneError)
    if name == 'constant':
        main = optax.constant_schedule(1.0)
    elif name == 'cosine':
        main = optax.cosine_decay_schedule(1.0, max(steps - warmup, 1))
    else:
        scales: dict[int, float] = {}
        for milestone in milestones:  # two that fall on one step both count
            at = milestone - warmup
            scales[at] = scales.get(at, 1.0) * factor
        main = optax.piecewise_constant_schedule(1.0, scales)
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, 1.0, warmup), main], [warmup])


def decays(name: str) -> bool:
    """Does this optimizer take a weight decay of its own (decoupled, as AdamW)?"""
    return 'weight_decay' in inspect.signature(_function(name)).parameters


def arguments(name: str) -> dict[str, Any]:
    """The numbers and flags of an optimizer that a specification may set, with their defaults."""
    parameters = inspect.signature(_function(name)).parameters.values()
    other = {'learning_rate', 'weight_decay'}
    return {
        p.name: p.default
        for p in parameters
        # None stands for "off" in `momentum`; types and masks are no hyperparameters.
        if isinstance(p.default, (bool, int, float, type(None)))
        and p.name not in other
        and not p.name.endswith(('dtype', 'mask'))
    }


#: rprop reads its rate once, so schedules would do nothing; noisy_sgd draws from a seed of its own;
#: sm3 keeps its moments by rows and columns, where pruned weights leave traces.
_UNFIT = frozenset({'rprop', 'scale_by_rprop', 'noisy_sgd', 'sm3'})


def names() -> list[str]:
    """The optimizers of optax that a specification may name."""
    return [n for n in dir(optax) if _is_optimizer(getattr(optax, n)) and n not in _UNFIT]


def _function(name: str) -> Callable:
    check_choice('optimizer', name, names(), JaxpruneError)
    return getattr(optax, name)


def _is_optimizer(value: object) -> bool:
    """An alias such as `optax.sgd`: a function whose one required argument is the rate."""
    if not inspect.isfunction(value) or not value.__module__.startswith('optax.'):
        return False
    parameters = inspect.signature(value).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty]
    return required == ['learning_rate']
