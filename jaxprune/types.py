"""The dozen types that every room speaks.

A mask is data, a method is a pure function, a run is a row of an array.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
from jax.typing import ArrayLike

Key = jax.Array
PyTree = Any

#: Prunable leaves only, path -> array, in sorted path order; the same keys everywhere.
Weights = dict[str, jax.Array]
#: True = keep; keys and shapes of the weights they belong to.
Masks = dict[str, jax.Array]
#: Higher = keep; keys and shapes of the weights they belong to.
Scores = dict[str, jax.Array]
#: How many weights to keep: path -> int32 scalar, or {'*': k} for one global ranking.
Counts = dict[str, ArrayLike]

#: (path, leaf) -> is this leaf prunable? The leaf may be abstract (`jax.ShapeDtypeStruct`).
Rule = Callable[[str, Any], bool]

#: The key of `Counts` that stands for all prunable leaves together.
GLOBAL = '*'


class Batch(NamedTuple):
    """Examples and labels.

    Attributes:
      x: inputs `(batch, ...)`; what a score is given has one more leading axis, the batches.
      y: integer labels `(batch,)`.
    """

    x: jax.Array
    y: jax.Array


class InitFn(Protocol):
    def __call__(self, key: Key) -> tuple[PyTree, PyTree]:
        """Makes `(params, model_state)`; the model state holds batch statistics or is empty."""


class ApplyFn(Protocol):
    def __call__(
        self, params: PyTree, model_state: PyTree, x: jax.Array, *, train: bool, key: Key | None
    ) -> tuple[jax.Array, PyTree]:
        """Computes `(logits, new model_state)`; the state is unchanged unless `train`."""


class LossFn(Protocol):
    def __call__(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """Returns one loss per example, shape `(batch,)`."""


class Problem(NamedTuple):
    """What is trained: static, closed over, never an argument of a compiled function.

    Attributes:
      init: makes parameters and model state from a key.
      apply: the network, see `ApplyFn`.
      loss: per-example loss, see `LossFn`.
      prunable: which leaves a mask may touch.
    """

    init: InitFn
    apply: ApplyFn
    loss: LossFn
    prunable: Rule


class View(NamedTuple):
    """All that a score may look at.

    Attributes:
      weights: prunable leaves, already zero where `masks` is False.
      params: the whole parameter tree. Prunable leaves here are placeholders: read them from
        `weights`.
      model_state: batch statistics and the like.
      masks: the masks in force.
      initial: prunable leaves at initialisation, where the caller keeps them.
      opt_state: the optimizer's state, where there is one.
    """

    weights: Weights
    params: PyTree
    model_state: PyTree
    masks: Masks
    initial: Weights | None = None
    opt_state: PyTree | None = None


class RunState(NamedTuple):
    """Everything one run carries; every leaf is an array.

    Attributes:
      params: all parameters; pruned weights are exactly zero.
      model_state: batch statistics and the like.
      opt_state: the optimizer's state; moments of pruned weights are exactly zero.
      masks: the masks in force.
      method_state: what the pruner carries from event to event.
    """

    params: PyTree
    model_state: PyTree
    opt_state: PyTree
    masks: Masks
    method_state: PyTree


class Hyper(NamedTuple):
    """Hyperparameters that may differ between runs of one program: scalars, traced.

    Attributes:
      learning_rate: peak learning rate; the schedule multiplies it.
      weight_decay: L2 coefficient.
      optimizer: further numeric arguments of the optimizer, by name (momentum, b1, ...).
    """

    learning_rate: ArrayLike
    weight_decay: ArrayLike
    optimizer: dict[str, ArrayLike]


class PruneInfo(NamedTuple):
    """What happened in one pruning event.

    Attributes:
      kept: path -> how many weights the new mask keeps, int32.
      nonfinite: how many scores of weights still in play were NaN or infinite, int32.
      nonzero: how many of them were not zero, int32; without any there is nothing to rank by.
    """

    kept: dict[str, jax.Array]
    nonfinite: jax.Array
    nonzero: jax.Array


class ScoreFn(Protocol):
    def __call__(self, key: Key, view: View, batches: Batch | None) -> Scores:
        """Scores every prunable weight, high = keep. `batches` leaves: `(n, batch, ...)`."""


SelectFn = Callable[[Scores, Counts], Masks]


class Pruner(NamedTuple):
    """A pruning method: a few pure functions, called at pruning events.

    Attributes:
      init: `(key, view) -> method_state`.
      update: `(key, method_state, view, counts, batches) -> (method_state, masks, info)`.
      needs: what an event must be given: 'data', 'shape' (an input's shape only), 'initial'
        (the initial weights) or nothing.
      regrown_values: `(method_state, view) -> weights`: the values that weights take after an
        event, before those the new masks prune are zeroed; None where no pruned weight returns.
      final_masks: `(method_state, active) -> masks`: after the last round, masks with at least that
        many weights on a path from input to output; None if the keep counts alone determine the
        masks.
    """

    init: Callable[[Key, View], PyTree]
    update: Callable[[Key, PyTree, View, Counts, Batch | None], tuple[PyTree, Masks, PruneInfo]]
    needs: frozenset[str]
    regrown_values: Callable[[PyTree, View], Weights] | None = None
    final_masks: Callable[[PyTree, ArrayLike], Masks] | None = None
