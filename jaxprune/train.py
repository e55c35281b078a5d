"""One run: initialise, step, segment, pruning event, evaluate. Pure functions, not jitted.

Written for a single run; the run axis, `jit`, sharding and donation belong to the sweep's engine.
The clock, a step count, is an argument of its own and never batched.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxprune import tree
from jaxprune.data import FetchFn
from jaxprune.optim import Optimizer, mask_opt_state, sparse
from jaxprune.problem import view_of
from jaxprune.rng import stream
from jaxprune.types import (
    Batch,
    Counts,
    Hyper,
    Key,
    Masks,
    Problem,
    Pruner,
    RunState,
    View,
    Weights,
)


def init_run(problem: Problem, optimizer: Optimizer) -> Callable[[Key, Hyper], RunState]:
    """`(key, hyper) -> state`: a dense run before its first step."""

    def init(key: Key, hyper: Hyper) -> RunState:
        params, model_state = problem.init(stream(key, 'init'))
        masks = tree.ones(tree.pick(params, problem.prunable))
        tx = optimizer.make(hyper, jnp.asarray(hyper.learning_rate))
        return RunState(params, model_state, tx.init(params), masks, ())

    return init


def train_step(problem: Problem, optimizer: Optimizer):
    """`(clock, key, hyper, state, batch) -> (state, loss)`: one masked optimizer step.

    `state` keeps its invariant: pruned weights and their moments are exactly zero.
    """

    def step(clock, key: Key, hyper: Hyper, state: RunState, batch: Batch):
        def loss(params):
            logits, model_state = problem.apply(
                params,
                state.model_state,
                batch.x,
                train=True,
                key=jax.random.fold_in(stream(key, 'dropout'), clock),
            )
            return problem.loss(logits, batch.y).mean(), model_state

        (value, model_state), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        if optimizer.coupled_decay:
            grads = jax.tree.map(lambda g, p: g + hyper.weight_decay * p, grads, state.params)
        rate = optimizer.rate(clock) * hyper.learning_rate
        tx = sparse(optimizer.make(hyper, rate))
        updates, opt_state = tx.update(grads, state.opt_state, state.params, masks=state.masks)
        params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), state.params, updates)
        new = state._replace(params=params, model_state=model_state, opt_state=opt_state)
        return new, value

    return step


def fetch_step(step, fetch: FetchFn):
    """`(clock, data, key, hyper, indices, state) -> (state, loss)`: gathers its own batch."""

    def fetched(clock, data, key: Key, hyper: Hyper, indices: jax.Array, state: RunState):
        batch = fetch(data, jax.random.fold_in(stream(key, 'augment'), clock), indices)
        return step(clock, key, hyper, state, batch)

    return fetched


def train_segment(fetched):
    """Scans `fetch_step` over the leading axis of `order`, `(steps, batch)` indices.

    Returns:
      `(clock, data, key, hyper, order, state) -> (state, losses (steps,))`; `clock` is the number
      of steps taken before.
    """

    def segment(clock, data, key: Key, hyper: Hyper, order: jax.Array, state: RunState):
        def body(state, at):
            step, indices = at
            return fetched(step, data, key, hyper, indices, state)

        steps = clock + jnp.arange(order.shape[0], dtype=jnp.int32)
        return jax.lax.scan(body, state, (steps, order))

    return segment


def event(problem: Problem, optimizer: Optimizer, pruner: Pruner, *, restart: bool = False):
    """One pruning event, the same order for every method.

    View -> score and select -> returning weights take their values -> pruned weights to zero ->
    their optimizer moments to zero.

    Args:
      restart: the optimizer begins anew: moments of the weights kept are zero as well.

    Returns:
      `(key, hyper, state, counts, batches, initial) -> (state, info)`; the initial weights are for
      pruners that need them, else None.
    """

    def prune(
        key: Key,
        hyper: Hyper,
        state: RunState,
        counts: Counts,
        batches: Batch | None,
        initial: Weights | None = None,
    ):
        view = view_of(problem, state)._replace(initial=initial)
        method_state, masks, info = pruner.update(key, state.method_state, view, counts, batches)
        state = _masked(
            optimizer, pruner, hyper, state._replace(method_state=method_state), view, masks
        )
        if restart:
            tx = optimizer.make(hyper, jnp.asarray(hyper.learning_rate))
            state = state._replace(opt_state=tx.init(state.params))
        return state, info

    return prune


def last_event(problem: Problem, optimizer: Optimizer, pruner: Pruner):
    """`(hyper, state, active) -> state` under the masks of `pruner.final_masks`."""

    def finish(hyper: Hyper, state: RunState, active: jax.Array):
        masks = pruner.final_masks(state.method_state, active)
        return _masked(optimizer, pruner, hyper, state, view_of(problem, state), masks)

    return finish


def _masked(
    optimizer: Optimizer, pruner: Pruner, hyper: Hyper, state: RunState, view: View, masks: Masks
) -> RunState:
    """The state under new masks."""
    params = state.params
    if pruner.regrown_values is not None:
        params = tree.put(params, pruner.regrown_values(state.method_state, view))
    tx = optimizer.make(hyper, jnp.asarray(hyper.learning_rate))
    return state._replace(
        params=tree.apply_masks(params, masks),
        opt_state=mask_opt_state(tx, state.opt_state, params, masks),
        masks=masks,
    )


def first_event(problem: Problem, pruner: Pruner):
    """`(key, state) -> state` with the pruner's own state made, before its first event."""

    def begin(key: Key, state: RunState) -> RunState:
        return state._replace(method_state=pruner.init(key, view_of(problem, state)))

    return begin


def evaluate_batch(problem: Problem, fetch: FetchFn):
    """Sums over one batch of an evaluation, with running statistics.

    Returns:
      `(data, state, indices, valid) -> (sum of losses, number correct)` over the examples where
      `valid` is True; the others are padding.
    """

    def evaluate(data, state: RunState, indices: jax.Array, valid: jax.Array):
        batch = fetch(data, None, indices)
        logits, _ = problem.apply(state.params, state.model_state, batch.x, train=False, key=None)
        loss = jnp.where(valid, problem.loss(logits, batch.y), 0)
        correct = valid & (logits.argmax(-1) == batch.y)
        return loss.sum(), correct.sum(dtype=jnp.int32)

    return evaluate
