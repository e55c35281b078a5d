"""One run: initialise, step, segment, pruning event, evaluate. Pure functions, not jitted.

Written for a single run; the run axis, `jit`, sharding and donation belong to the sweep's engine.
The clock, a step count, is an argument of its own and never batched.
"""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxprune import tree
from jaxprune.data import FetchFn
from jaxprune.errors import PruneError
from jaxprune.method import mask_trace
from jaxprune.method.rounds import Rounds, finished, has_finish, prune_once
from jaxprune.optim import Optimizer, mask_opt_state, sparse
from jaxprune.problem import view_of
from jaxprune.rng import stream
from jaxprune.select import count_kept
from jaxprune.types import (
    Batch,
    Counts,
    Hyper,
    Key,
    Problem,
    PruneInfo,
    Pruner,
    PyTree,
    RunState,
    StepHook,
    View,
    Weights,
)


class StepFn(Protocol):
    def __call__(
        self, clock: ArrayLike, key: Key, hyper: Hyper, state: RunState, batch: Batch
    ) -> tuple[RunState, jax.Array]:
        """Takes one optimizer step: `(new state, mean loss of the batch before it)`.

        Args:
          clock: steps of the schedule taken before.
          key: of the run.
        """


class FetchStepFn(Protocol):
    def __call__(
        self,
        clock: ArrayLike,
        data: PyTree,
        key: Key,
        hyper: Hyper,
        indices: jax.Array,
        state: RunState,
    ) -> tuple[RunState, jax.Array]:
        """A `StepFn` that gathers its own batch: examples number `indices (batch,)` of `data`."""


class SegmentFn(Protocol):
    def __call__(
        self,
        clock: ArrayLike,
        data: PyTree,
        key: Key,
        hyper: Hyper,
        order: jax.Array,
        state: RunState,
    ) -> tuple[RunState, jax.Array]:
        """Takes a step for each row of `order (steps, batch)`: `(state, losses (steps,))`."""


class EvaluateFn(Protocol):
    def __call__(
        self, clock: ArrayLike, data: PyTree, state: RunState, indices: jax.Array, valid: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Sums over one batch: `(sum of losses, number correct)`, with running statistics.

        Args:
          indices: examples `(batch,)`.
          valid: bool `(batch,)`; the others are padding and count for nothing.
        """


def init_run(
    problem: Problem, optimizer: Optimizer, *, traced: bool = False
) -> Callable[[Key, Hyper], RunState]:
    """`(key, hyper) -> state`: a dense run before its first step.

    Args:
      traced: the state keeps what masks have been.
    """

    def init(key: Key, hyper: Hyper) -> RunState:
        params, model_state = problem.init(stream(key, 'init'))
        masks = tree.ones(tree.pick(params, problem.prunable))
        opt_state = fresh_optimizer(optimizer, hyper, params)
        trace = mask_trace.begun(masks) if traced else ()
        return RunState(params, model_state, opt_state, masks, (), trace)

    return init


def fresh_optimizer(optimizer: Optimizer, hyper: Hyper, params: PyTree) -> PyTree:
    """The optimizer's state before its first step."""
    return optimizer.make(hyper, jnp.asarray(hyper.learning_rate)).init(params)


def train_step(
    problem: Problem, optimizer: Optimizer, hook: StepHook | None = None, *, dense: bool = False
) -> StepFn:
    """One masked optimizer step.

    `state` keeps its invariant: pruned weights and their moments are exactly zero.

    Args:
      hook: what a method changes in the step; None for nothing.
      dense: gradients and updates are not masked: the method keeps dense weights, and what its
        `hook.weights` makes of them is zero where pruned.
    """
    hook = StepHook() if hook is None else hook
    update = gradient_step(optimizer, hook, dense=dense)

    def step(clock, key: Key, hyper: Hyper, state: RunState, batch: Batch):
        def loss(params):
            logits, model_state = problem.apply(
                computed_with(hook, state, clock, params),
                state.model_state,
                batch.x,
                train=True,
                key=jax.random.fold_in(stream(key, 'dropout'), clock),
            )
            return problem.loss(logits, batch.y).mean(), model_state

        (value, model_state), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        state = state._replace(model_state=model_state)
        return update(clock, hyper, state, grads), value

    return step


def gradient_step(
    optimizer: Optimizer, hook: StepHook | None = None, *, dense: bool = False
) -> Callable[[ArrayLike, Hyper, RunState, PyTree], RunState]:
    """`(clock, hyper, state, gradients) -> state` after one masked optimizer step.

    Args:
      hook: see `train_step`.
      dense: see `train_step`.
    """
    hook = StepHook() if hook is None else hook

    def update(clock: ArrayLike, hyper: Hyper, state: RunState, grads: PyTree) -> RunState:
        method_state, masks = state.method_state, state.masks
        if hook.gradient is not None:
            now = hyper._replace(learning_rate=optimizer.rate(clock, hyper))
            method_state, grads = hook.gradient(
                method_state, grads, state.params, masks, clock, now
            )
        if optimizer.coupled_decay:
            grads = jax.tree.map(lambda g, p: g + hyper.weight_decay * p, grads, state.params)
        rate = optimizer.rate(clock, hyper)
        tx = optimizer.make(hyper, rate)
        if dense and hook.moves is None:
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
        else:
            moving = hook.moves(method_state, masks) if dense else masks
            updates, opt_state = sparse(tx).update(
                grads, state.opt_state, state.params, masks=moving
            )
        params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), state.params, updates)
        if hook.project is not None:
            apart = jnp.zeros(()) if optimizer.coupled_decay else hyper.weight_decay
            now = hyper._replace(learning_rate=rate, weight_decay=apart)
            method_state, params = hook.project(
                method_state, state.params, params, masks, clock, now
            )
            params = params if dense else tree.apply_masks(params, masks)
        return state._replace(params=params, opt_state=opt_state, method_state=method_state)

    def unless_still(clock: ArrayLike, hyper: Hyper, state: RunState, grads: PyTree) -> RunState:
        still = jnp.isin(clock, jnp.asarray(hook.still, jnp.int32))
        return jax.lax.cond(still, lambda: state, lambda: update(clock, hyper, state, grads))

    return unless_still if hook.still else update


def computed_with(hook: StepHook, state: RunState, clock: ArrayLike, params: PyTree) -> PyTree:
    """The parameters that a training step computes with while a method is at work."""
    if hook.weights is None:
        return params
    return hook.weights(state.method_state, params, state.masks, clock)


def through_hook(hook: StepHook | None, clock: ArrayLike, state: RunState) -> RunState:
    """The state as evaluation, scores and recorded quantities see it."""
    if hook is None:
        return state
    seen = hook if hook.evaluated is None else hook._replace(weights=hook.evaluated)
    return state._replace(params=computed_with(seen, state, clock, state.params))


def hooked_view(problem: Problem, state: RunState, hook: StepHook | None, clock: ArrayLike) -> View:
    """The view of a run while a method is at work; `stored` holds weights that its hook changes."""
    view = view_of(problem, through_hook(hook, clock, state))
    if hook is None or hook.weights is None:
        return view
    return view._replace(stored=tree.pick(state.params, problem.prunable))


def fetch_step(step: StepFn, fetch: FetchFn) -> FetchStepFn:
    """A step that gathers its own batch."""

    def fetched(clock, data, key: Key, hyper: Hyper, indices: jax.Array, state: RunState):
        batch = fetch(data, jax.random.fold_in(stream(key, 'augment'), clock), indices)
        return step(clock, key, hyper, state, batch)

    return fetched


def train_segment(fetched: FetchStepFn) -> SegmentFn:
    """Scans a `FetchStepFn` over rows of indices; the clock is that before the first of them."""

    def segment(clock, data, key: Key, hyper: Hyper, order: jax.Array, state: RunState):
        def body(state, at):
            step, indices = at
            return fetched(step, data, key, hyper, indices, state)

        steps = clock + jnp.arange(order.shape[0], dtype=jnp.int32)
        return jax.lax.scan(body, state, (steps, order))

    return segment


def run_events(
    problem: Problem,
    optimizer: Optimizer,
    pruner: Pruner,
    key: Key,
    hyper: Hyper,
    batches_of: Callable[[jax.Array], Batch | None],
    *,
    clock: ArrayLike = 0,
    initial: Weights | None = None,
    restart: bool = False,
) -> Rounds:
    """The rounds of a method on a training run, for `method.rounds.run_rounds`.

    A round, the same order for every method: view, score and select, returning weights take their
    values, pruned weights to zero, their optimizer moments to zero.

    Args:
      key: round i draws from `fold_in(key, i)`.
      batches_of: `number of the round -> the examples of its score`.
      clock: steps of the schedule taken before.
      initial: the initial weights, for pruners that need them.
      restart: the optimizer begins anew after each round.

    Raises:
      PruneError: the hook changes the weights, but the method does not keep dense ones.
    """

    if pruner.hook is not None and pruner.hook.weights is not None and not pruner.dense:
        raise PruneError('a method whose hook changes the weights keeps dense ones: dense=True')

    def begin(state: RunState) -> RunState:
        return state._replace(method_state=pruner.init(key, view_of(problem, state)))

    def once(number: jax.Array, counts: Counts, state: RunState) -> tuple[RunState, PruneInfo]:
        view = hooked_view(problem, state, pruner.hook, clock)._replace(initial=initial)
        draw = jax.random.fold_in(key, number)
        method_state, view, info = prune_once(
            pruner, draw, state.method_state, view, counts, batches_of(number)
        )
        state = state._replace(method_state=method_state)
        if state.trace:
            trace = mask_trace.followed(state.trace, state.masks, view.masks, number)
            state = state._replace(trace=trace)
        if pruner.dense:
            return restarted(state._replace(masks=view.masks)), info
        return restarted(_stored(optimizer, hyper, state, view)), info

    def finish(state: RunState, active: ArrayLike) -> tuple[RunState, dict[str, jax.Array]]:
        view = hooked_view(problem, state, pruner.hook, clock)
        view = finished(pruner, state.method_state, view, active)
        kept = {} if pruner.final_masks is None else count_kept(view.masks)
        return restarted(_stored(optimizer, hyper, state, view)), kept

    def restarted(state: RunState) -> RunState:
        if not restart:
            return state
        return state._replace(opt_state=fresh_optimizer(optimizer, hyper, state.params))

    return Rounds(begin, once, finish if has_finish(pruner) or pruner.dense else None)


def _stored(optimizer: Optimizer, hyper: Hyper, state: RunState, view: View) -> RunState:
    """The state with a view's weights and masks; pruned moments are zero."""
    params = tree.apply_masks(tree.put(state.params, view.weights), view.masks)
    tx = optimizer.make(hyper, jnp.asarray(hyper.learning_rate))
    return state._replace(
        params=params,
        opt_state=mask_opt_state(tx, state.opt_state, params, view.masks),
        masks=view.masks,
    )


def rewind(
    optimizer: Optimizer, *, dense: bool = False
) -> Callable[[Hyper, RunState, RunState], RunState]:
    """`(hyper, state, anchor) -> state`: back to an earlier state, under today's masks.

    Weights and batch statistics are those of the anchor, weights exactly zero where the masks
    prune. The optimizer begins anew (Frankle et al., ICML 2020, arXiv:1912.05671, and their code).

    Args:
      dense: a method that keeps dense weights is at work: nothing is zeroed.
    """

    def rewound(hyper: Hyper, state: RunState, anchor: RunState) -> RunState:
        params = anchor.params if dense else tree.apply_masks(anchor.params, state.masks)
        return state._replace(
            params=params,
            model_state=anchor.model_state,
            opt_state=fresh_optimizer(optimizer, hyper, params),
        )

    return rewound


def evaluate_batch(problem: Problem, fetch: FetchFn, hook: StepHook | None = None) -> EvaluateFn:
    """Sums over one batch of an evaluation, with running statistics and the hook's weights."""
    logits_of = _logits(problem, fetch, hook)

    def evaluate(clock, data, state: RunState, indices: jax.Array, valid: jax.Array):
        logits, y = logits_of(clock, data, state, indices)
        loss = jnp.where(valid, problem.loss(logits, y), 0)
        correct = valid & (logits.argmax(-1) == y)
        return loss.sum(), correct.sum(dtype=jnp.int32)

    return evaluate


def predict_batch(
    problem: Problem, fetch: FetchFn, hook: StepHook | None = None
) -> Callable[[ArrayLike, PyTree, RunState, jax.Array], jax.Array]:
    """`(clock, data, state, indices) -> labels` that a run gives to examples in evaluation."""
    logits_of = _logits(problem, fetch, hook)
    return lambda *seen: logits_of(*seen)[0].argmax(-1).astype(jnp.uint16)


def _logits(problem: Problem, fetch: FetchFn, hook: StepHook | None) -> Callable:
    """`(clock, data, state, indices) -> (logits, labels)` of an evaluation."""

    def logits_of(clock, data, state: RunState, indices: jax.Array):
        batch = fetch(data, None, indices)
        state = through_hook(hook, clock, state)
        logits, _ = problem.apply(state.params, state.model_state, batch.x, train=False, key=None)
        return logits, batch.y

    return logits_of
