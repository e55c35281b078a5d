"""`jp.train_once`: a compact network out of one training, in someone's own loop."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxprune import structure, tree
from jaxprune.arguments import whole
from jaxprune.errors import PruneError, nearest
from jaxprune.method import (
    METHODS,
    competing,
    counted_as,
    get_pruner,
    limits,
    method,
    plan_shares,
    watched,
)
from jaxprune.optim import Optimizer
from jaxprune.plan import plan_rounds
from jaxprune.prune_model import check_arguments as check
from jaxprune.rng import run_key
from jaxprune.structure import Compact
from jaxprune.structure.function import function_of
from jaxprune.train import fresh_optimizer, gradient_step, run_events
from jaxprune.types import Hyper, Problem, PyTree, Rule, RunState


class OnceState(NamedTuple):
    """What is carried along with the parameters.

    Attributes:
      step: steps taken, int32.
      rounds: rounds of the method so far, int32.
      forced: groups that the last round removed although they were not zero, int32. Their removal
        changes what the network computes.
      run: masks, and the states of optimizer and method; without parameters.
    """

    step: jax.Array
    rounds: jax.Array
    forced: jax.Array
    run: RunState


class Once(NamedTuple):
    """A training that prunes on the way. All functions but `compact` are pure.

    Attributes:
      init: `params -> state`.
      update: `(gradients, state, params) -> (params, state)`, one step of training, for `jit`; the
        gradients are those of the loss at `params`.
      compact: `(params, state, model_state=None) -> Compact`, the smaller network, see
        `jp.compact`; after the last step of the method.
      watch: `(state, params) -> quantity -> layer -> number`, what the method does: 'zero_groups',
        and what else `WATCHED` has for it.
      stop: steps after which the network is compact.
    """

    init: Callable[[PyTree], OnceState]
    update: Callable[[PyTree, OnceState, PyTree], tuple[PyTree, OnceState]]
    compact: Callable[..., Compact]
    watch: Callable[[OnceState, PyTree], dict[str, dict[str, jax.Array]]]
    stop: int


def train_once(
    apply: Problem | Callable[..., PyTree],
    params: PyTree,
    x: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    density: float,
    start: int,
    stop: int,
    learning_rate: float | Callable[[ArrayLike], jax.Array],
    weight_decay: float = 0.0,
    method_name: str = 'hesso',
    model_state: PyTree = None,
    prunable: Rule = tree.kernels,
    granularity: str = 'unit',
    allocation: str = 'global',
    target: str = 'direct',
    keep_all_units: str = '',
    floor: int | Mapping[str, int] = 0,
    multiple: int = 1,
    rounds: int | None = None,
    density_schedule: str | None = None,
    **options: Any,
) -> Once:
    """Prunes groups while a network trains, so that it is compact at the end with equal outputs.

        once = jp.train_once(apply, params, x, optax.sgd(0.1), learning_rate=0.1,
                             density=0.3, start=100, stop=800)
        state = once.init(params)
        for batch in batches:                       # `update` is for jit, with the gradient
            params, state = once.update(gradient(params, batch), state, params)
        small = once.compact(params, state)
        small.apply(small.params, x)

    Args:
      apply: the network in evaluation mode, `(params, x) -> outputs`, or `(params, model_state, x)`
        if there is a state; or a `Problem`. It is traced to see what goes together.
      params: all parameters, arrays or shapes.
      x: inputs, arrays or shapes.
      optimizer: any optax transformation that has the learning rate in it.
      density: share of the groups to keep, in (0, 1]; of what `target` says.
      start: the step before which the method begins.
      stop: the step before which it ends.
      learning_rate: of the optimizer, a number or an optax schedule: methods look at its steps.
      weight_decay: what the optimizer takes off the weights itself, times the rate, as AdamW does.
      method_name: a method that changes training: 'hesso', 'dhspg', 'hspg', 'proximal', ...
      model_state: batch statistics and the like.
      prunable: which leaves masks may touch; kernels by default.
      granularity, keep_all_units, floor, multiple: what is pruned, see `jp.prune`.
      allocation: 'global' or a share for each layer.
      target: 'direct' for groups; 'params' or 'flops', of the compact network.
      rounds: of the method, spread evenly from start to stop; None for the published number.
      density_schedule: densities over the rounds; None for the published one.
      **options: the method's own options.

    Raises:
      PruneError: an unknown name, a method that does not change training, too few steps for its
        rounds, a density that cannot be, groups that cannot go.
    """
    entry = method(method_name)
    if not entry.hooked:
        valid = [name for name, other in METHODS.items() if other.hooked]
        raise PruneError(
            f"'{method_name}' does not change training, see jp.prune: {nearest(method_name, valid)}"
        )
    check.options(options, entry.options, ())
    network, own_state = function_of(apply, model_state)
    coupled = structure.groups(network, params, x, own_state)
    shapes = {path: tuple(jnp.shape(leaf)) for path, leaf in tree.pick(params, prunable).items()}
    groups = competing(granularity, shapes, lambda: coupled, keep_all_units)
    events = _spread(whole('start', start), whole('stop', stop), rounds or entry.rounds)
    by_round = {
        'rounds': len(events),
        'density_schedule': density_schedule or entry.density_schedule,
        'steps': events,
    }
    if target in structure.SHARES:
        plan = plan_shares(groups, density, target, **by_round)
    else:
        bounds = {'floor': limits(groups, floor)[0], 'what': counted_as(granularity)}
        plan = plan_rounds(groups.shapes, density, allocation=allocation, **by_round, **bounds)
    problem = Problem(_unused, _unused, _unused, prunable)
    pruner = get_pruner(
        problem,
        method_name,
        allocation=allocation,
        shapes=shapes,
        floor=limits(groups, floor)[0],
        groups=groups,
        events=events,
        multiple=multiple,
        cost='' if target == 'direct' else target,
        **options,
    )
    rate = learning_rate if callable(learning_rate) else lambda step: learning_rate
    hyper = Hyper(0.0, weight_decay, {})
    chain = Optimizer(
        make=lambda hyper, rate: optimizer,
        coupled_decay=False,
        rate=lambda step, hyper: jnp.asarray(rate(step), jnp.float32),
    )
    at_work, after = (gradient_step(chain, hook) for hook in (pruner.hook, None))
    key = run_key(0)
    events_of = run_events(problem, chain, pruner, key, hyper, lambda number: None)
    counts = {name: jnp.asarray(column) for name, column in plan.counts.items()}

    def init(params: PyTree) -> OnceState:
        masks = tree.ones(tree.pick(params, prunable))
        state = RunState(params, {}, fresh_optimizer(chain, hyper, params), masks, ())
        run = events_of.begin(state)._replace(params=())
        zero = jnp.zeros((), jnp.int32)
        return OnceState(zero, zero, zero, run)

    def once(state: OnceState, params: PyTree) -> tuple[PyTree, OnceState]:
        run = state.run._replace(params=params)
        zero = watched(groups, None, run)['zero_groups']
        now = {name: column[state.rounds] for name, column in counts.items()}
        run, info = events_of.once(state.rounds, now, run)
        removed = sum(shape[0] for shape in groups.shapes.values()) - sum(info.kept.values())
        forced = jnp.where(state.rounds == len(events) - 1, removed - sum(zero.values()), 0)
        state = OnceState(state.step, state.rounds + 1, forced.clip(0), run._replace(params=()))
        return run.params, state

    def update(grads: PyTree, state: OnceState, params: PyTree) -> tuple[PyTree, OnceState]:
        due = (jnp.asarray(events) == state.step).any()
        params, state = jax.lax.cond(due, lambda: once(state, params), lambda: (params, state))
        run = state.run._replace(params=params)
        working = (state.step >= events[0]) & (state.step < events[-1])
        run = jax.lax.cond(
            working,
            lambda: at_work(state.step, hyper, run, grads),
            lambda: after(state.step, hyper, run, grads),
        )
        state = state._replace(step=state.step + 1, run=run._replace(params=()))
        return run.params, state

    def compact(params: PyTree, state: OnceState, model_state: PyTree = None) -> Compact:
        taken = int(state.step)
        if taken < events[-1]:
            raise PruneError(f'the method ends after {events[-1]} steps, and {taken} were taken')
        if int(state.rounds) < len(events):  # training ended where the method ends
            params, state = jax.jit(once)(state, params)
        used = own_state if model_state is None else model_state
        return structure.compact(
            network,
            params,
            state.run.masks,
            x,
            model_state=used,
            opt_state=state.run.opt_state,
            partial='keep',
        )

    def watch(state: OnceState, params: PyTree) -> dict[str, dict[str, jax.Array]]:
        return watched(groups, pruner, state.run._replace(params=params))

    return Once(init, update, compact, watch, events[-1])


def _spread(start: int, stop: int, rounds: int) -> tuple[int, ...]:
    """Where the rounds of a method happen."""
    if start < 0 or stop - start < rounds - 1:
        raise PruneError(
            f'{rounds} rounds need a stop at least {rounds - 1} steps after start, not '
            f'start={start} and stop={stop}'
        )
    return tuple(round(start + i * (stop - start) / (rounds - 1)) for i in range(rounds))


def _unused(*args: Any, **kwargs: Any) -> Any:
    raise PruneError('methods that change training read no data')
