"""The dozen types that every room speaks.

A mask is data, a method is a pure function, a run is a row of an array.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
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


#: The data of a score: a `Batch` of equal batches, leaves `(batches, batch, ...)`; or a `Batch` for
#: each, leaves `(batch, ...)`, where their sizes differ. A mean counts every example once.
Batches = Batch | Sequence[Batch]


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
    """All that a score may use.

    Attributes:
      weights: prunable leaves, already zero where `masks` is False.
      params: the whole parameter tree. Prunable leaves here are placeholders: read them from
        `weights`.
      model_state: batch statistics and the like.
      masks: the masks in force.
      initial: prunable leaves at initialisation, where the caller keeps them.
      opt_state: the optimizer's state, where there is one.
      stored: prunable leaves as they are stored, pruned ones included, where a method keeps dense
        weights and `weights` is what its hook makes of them; else None.
    """

    weights: Weights
    params: PyTree
    model_state: PyTree
    masks: Masks
    initial: Weights | None = None
    opt_state: PyTree | None = None
    stored: Weights | None = None


class RunState(NamedTuple):
    """Everything one run carries; every leaf is an array.

    Attributes:
      params: all parameters; pruned weights are exactly zero, unless the method keeps dense ones.
      model_state: batch statistics and the like.
      opt_state: the optimizer's state; moments of pruned weights are exactly zero, with the same
        exception.
      masks: the masks in force.
      method_state: what the method carries from its first event to its last; () before and after.
      trace: what masks have been, see `method.mask_trace`; () where nobody asks.
    """

    params: PyTree
    model_state: PyTree
    opt_state: PyTree
    masks: Masks
    method_state: PyTree
    trace: PyTree = ()


class Hyper(NamedTuple):
    """Hyperparameters that may differ between runs of one program: scalars, traced.

    Attributes:
      learning_rate: peak learning rate; the schedule multiplies it.
      weight_decay: L2 coefficient.
      optimizer: further numeric arguments of the optimizer, by name (momentum, b1, ...).
      method: numeric options of the pruning method, by name (temperature, epsilon, ...).
      finetune: the peak 'learning_rate' of the phase after pruning; {} if there is no such phase.
    """

    learning_rate: ArrayLike
    weight_decay: ArrayLike
    optimizer: dict[str, ArrayLike]
    method: dict[str, ArrayLike] = {}  # noqa: RUF012 (nobody changes it)
    finetune: dict[str, ArrayLike] = {}  # noqa: RUF012


class PruneInfo(NamedTuple):
    """What happened in one pruning event.

    Attributes:
      kept: layer -> how many weights, or groups of another kind, are kept, int32.
      nonfinite: how many scores of what is still in play were NaN or infinite, int32.
      nonzero: how many of them were not zero, int32; without any there is nothing to rank by.
    """

    kept: dict[str, jax.Array]
    nonfinite: jax.Array
    nonzero: jax.Array


class Own(NamedTuple):
    """What belongs to a layer's groups along one axis of a parameter.

    Attributes:
      axis: of the parameter.
      name: the layer, a key of `Groups.shapes`.
      group: for each index of the axis the number of its group, or the number of groups where the
        index belongs to none.
      makes: it makes the groups; else it follows them, as a bias does.
    """

    axis: int
    name: str
    group: np.ndarray
    makes: bool


class Gates(NamedTuple):
    """A network with a number for each unit that multiplies it, see `structure.gates`.

    Attributes:
      sizes: layer -> how many units it has.
      counts: layer -> in how many places its units are gated; above 1 where layers share them.
      apply: `(gates, params, x, *states) -> outputs`; layer -> `(units,)`, or a list of one such
        array for each place. Layers without gates are as they were.
      activations: `(params, x, *states) -> {layer: the array at each place}`.
      shifted: `(shifts, params, x, *states) -> outputs`, with an array added at each place.
      by_unit: arrays such as those of `activations` -> layer -> their sums over all but the units.
      tail: `(layers, params, x, *states) -> (gates -> outputs)`: all that does not depend on the
        gates of these layers is computed once.
    """

    sizes: dict[str, int]
    counts: dict[str, int]
    apply: Callable[..., PyTree]
    activations: Callable[..., dict[str, list[jax.Array]]]
    shifted: Callable[..., PyTree]
    by_unit: Callable[..., dict[str, jax.Array]]
    tail: Callable[..., Callable[[dict[str, jax.Array]], PyTree]]


class Groups(NamedTuple):
    """What competes: single weights, n of every m, blocks, units, heads.

    Methods, selections, allocations and floors see names, shapes and one score per group. None of
    them learns which kind it is.

    Attributes:
      kind: what it is, as a specification names it: 'weight', '2:4', '8x128', 'unit', ...
      shapes: layer -> shape of its groups; `(n,)` for n units. In forward order, if it is known.
      gather: values of all prunable weights -> their sums over each group.
      alive: masks -> is anything of a group kept?
      spread: groups kept, bool -> masks of all prunable leaves, with everything that goes along.
        Where no groups are coupled also: numbers of groups -> for each weight that of its group.
      eligible: scores of groups -> the same, -inf where a rule keeps the group out; None if no
        such rule is there.
      most: layer -> how many groups the rule lets in at most; None if there is no rule.
      own: path -> what makes or follows units, biases and norms as well; {} for other kinds.
      families: layer -> what belongs to its groups, for coupled groups; see `structure.Family`.
      gates: place -> the network with gates on these groups; None for other kinds.
      shares: `() -> (groups kept -> cost -> share of the network's)`, see `structure.cost_shares`;
        None for other kinds.
      kinds: `() -> layer -> 'conv', 'dense', 'head' or 'head_dim'`; None for other kinds.
    """

    kind: str
    shapes: dict[str, tuple[int, ...]]
    gather: Callable[[Weights], Scores]
    alive: Callable[[Masks], Masks]
    spread: Callable[[Masks], Masks]
    eligible: Callable[[Scores], Scores] | None = None
    most: dict[str, int] | None = None
    own: dict[str, Own] = {}  # noqa: RUF012 (nobody changes it)
    families: dict[str, Any] = {}  # noqa: RUF012
    gates: Callable[[str], Gates] | None = None
    shares: Callable[[], Callable[[Masks], dict[str, jax.Array]]] | None = None
    kinds: Callable[[], dict[str, str]] | None = None


class ScoreFn(Protocol):
    def __call__(self, key: Key, view: View, batches: Batches | None) -> Scores:
        """Scores every prunable weight, or every group that competes, high = keep."""


SelectFn = Callable[[Scores, Counts], Masks]


class WeightsHook(Protocol):
    def __call__(self, state: PyTree, params: PyTree, masks: Masks, clock: jax.Array) -> PyTree:
        """Returns the parameters that forward passes, scores and evaluation see.

        The loss is differentiated through it: a straight-through estimator goes here.
        """


class GradientHook(Protocol):
    def __call__(
        self,
        state: PyTree,
        grads: PyTree,
        params: PyTree,
        masks: Masks,
        clock: jax.Array,
        hyper: Hyper,
    ) -> tuple[PyTree, PyTree]:
        """Returns `(state, grads)`: penalties are added here, and accumulators updated.

        Args:
          grads: of the mean loss with respect to the stored parameters, dense, before weight decay.
          hyper: the run's numbers; its learning rate is that of this step.
        """


class ProjectHook(Protocol):
    def __call__(
        self,
        state: PyTree,
        before: PyTree,
        after: PyTree,
        masks: Masks,
        clock: jax.Array,
        hyper: Hyper,
    ) -> tuple[PyTree, PyTree]:
        """Returns `(state, params)`, from the parameters before and after the optimizer's step.

        Args:
          hyper: the run's numbers; its learning rate is that of this step, its weight decay what
            the optimizer itself takes off (decoupled, as AdamW), times that rate.
        """


class StepHook(NamedTuple):
    """How a method changes the training step between its first event and its last.

    All functions are pure, for one run, and optional. `state` is the method's state.

    Attributes:
      weights: what the network computes with, see `WeightsHook`.
      evaluated: what it computes with in evaluation, scores and recorded quantities, if that is
        something else.
      gradient: what the optimizer is given, see `GradientHook`.
      moves: of a method that keeps dense weights, `(state, masks) -> masks`: the weights that the
        optimizer may move, and whose gradient it sees; None for all.
      project: where a step ends, see `ProjectHook`.
      still: readings of the clock at which the optimizer takes no step.
    """

    weights: WeightsHook | None = None
    evaluated: WeightsHook | None = None
    gradient: GradientHook | None = None
    moves: Callable[[PyTree, Masks], Masks] | None = None
    project: ProjectHook | None = None
    still: tuple[int, ...] = ()


#: What an event may be given: class-balanced examples with labels ('data'), an input's shape
#: ('shape'), the initial weights ('initial'), the batch that the next training step will see
#: ('train_batch'), and whether the score draws fresh initial weights of its own ('fresh_init').
NEEDS = frozenset({'data', 'shape', 'initial', 'train_batch', 'fresh_init'})


class Pruner(NamedTuple):
    """A pruning method: a few pure functions, called at pruning events.

    Attributes:
      init: `(key, view) -> method_state`, before the first event.
      update: `(key, method_state, view, counts, batches) -> (method_state, masks, info)`, at every
        event.
      needs: what an event must be given, some of `NEEDS`.
      regrown_values: `(method_state, view) -> weights`: the values that weights take after an
        event, before those the new masks prune are zeroed; None where no pruned weight returns.
      final_masks: `(method_state, active) -> masks`: after the last event, masks with at least that
        many weights on a path from input to output; None if the keep counts alone determine the
        masks.
      repaired_values: `(weights, masks) -> weights` after the last event: the values that kept
        weights go on with; None if they keep their own.
      hook: how the method changes the training step between its first event and its last.
      dense: stored weights stay dense in that time: no gradient is masked, nothing is zeroed, and
        `regrown_values` are not used. What `hook.weights` returns must be zero where the mask
        prunes; a hook with `weights` must be dense.
      watch: `(method_state, params) -> quantity -> layer -> scalar`, what can be recorded while the
        hook is at work; None for nothing.
    """

    init: Callable[[Key, View], PyTree]
    update: Callable[[Key, PyTree, View, Counts, Batches | None], tuple[PyTree, Masks, PruneInfo]]
    needs: frozenset[str]
    regrown_values: Callable[[PyTree, View], Weights] | None = None
    final_masks: Callable[[PyTree, ArrayLike], Masks] | None = None
    repaired_values: Callable[[Weights, Masks], Weights] | None = None
    hook: StepHook | None = None
    dense: bool = False
    watch: Callable[[PyTree, PyTree], dict[str, dict[str, jax.Array]]] | None = None
