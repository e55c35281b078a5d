"""`jp.train_once`: a compact network out of one training, in someone's own loop."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxprune import structure, tree
from jaxprune.arguments import least, whole
from jaxprune.errors import PruneError, check_choice, nearest
from jaxprune.method import (
    METHODS,
    Method,
    competing,
    cost_of,
    get_pruner,
    limits,
    method,
    plan_groups,
    watched,
    zero_groups,
)
from jaxprune.optim import Optimizer
from jaxprune.plan import Plan
from jaxprune.prune_model import check_arguments as check
from jaxprune.rng import run_key
from jaxprune.select import count_kept
from jaxprune.structure import Compact
from jaxprune.structure.function import function_of
from jaxprune.train import fresh_optimizer, gradient_step, run_events
from jaxprune.types import Groups, Hyper, Problem, Pruner, PyTree, Rule, RunState


class OnceState(NamedTuple):
    """What is carried along with the parameters.

    Attributes:
      step: steps taken, int32.
      rounds: rounds of the method so far, int32.
      forced: groups that were removed although they were not zero, int32. Their removal changed
        what the network computes.
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
      finish: `(params, state) -> (params, state)`: the last round, if training ends where the
        method does and `update` did not come to it; else nothing.
      compact: `(params, state, model_state=None) -> Compact`, the smaller network, see
        `jp.compact`; after the last step of the method. It needs the state of a network that has
        one, as it is after training.
      watch: `(state, params) -> quantity -> layer -> number`, what the method does: 'zero_groups',
        and what else `WATCHED` has for it.
      stop: steps after which the network is compact.
    """

    init: Callable[[PyTree], OnceState]
    update: Callable[[PyTree, OnceState, PyTree], tuple[PyTree, OnceState]]
    finish: Callable[[PyTree, OnceState], tuple[PyTree, OnceState]]
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
    """Prunes groups while a network trains.

    If the groups are zero before they are cut, the compact network has the outputs of the full one;
    `OnceState.forced` counts those that were not.

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
      start, stop: the steps before which the method begins and ends.
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
    entry = _entry(method_name, options)
    check_choice('target', target, ('direct', *structure.COSTS))
    network, own_state = function_of(apply, model_state)
    coupled = structure.groups(network, params, x, own_state)
    shapes = {path: tuple(jnp.shape(leaf)) for path, leaf in tree.pick(params, prunable).items()}
    groups = competing(granularity, shapes, lambda: coupled, keep_all_units)
    events = _spread(start, stop, entry.rounds if rounds is None else rounds)
    bounds, cost = limits(groups, floor)[0], cost_of(target)
    plan = plan_groups(
        groups,
        density,
        cost=cost,
        allocation=allocation,
        floor=bounds,
        multiple=whole('multiple', multiple),
        rounds=len(events),
        density_schedule=density_schedule or entry.density_schedule,
        steps=events,
    )
    pruner = get_pruner(
        Problem(_unused, _unused, _unused, prunable),
        method_name,
        allocation=allocation,
        shapes=shapes,
        floor=bounds,
        groups=groups,
        events=events,
        multiple=multiple,
        cost=cost,
        **options,
    )
    schedule = learning_rate if callable(learning_rate) else lambda step: learning_rate
    chain = Optimizer(
        make=lambda hyper, rate: optimizer,
        coupled_decay=False,
        rate=lambda step, hyper: jnp.asarray(schedule(step), jnp.float32),
    )
    return _made(_Job(network, own_state, x, groups, pruner, chain, plan, prunable, weight_decay))


def _entry(name: str, options: Mapping[str, Any]) -> Method:
    """The entry of a method that changes training, which knows these options."""
    entry = method(name)
    if not entry.hooked:
        valid = [other for other, known in METHODS.items() if known.hooked]
        raise PruneError(f"'{name}' does not change training, see jp.prune: {nearest(name, valid)}")
    check.options(options, entry.options, ())
    return entry


class _Job(NamedTuple):
    """What is trained and pruned, checked; see `train_once`."""

    network: Callable[..., PyTree]
    model_state: PyTree
    x: PyTree
    groups: Groups
    pruner: Pruner
    chain: Optimizer
    plan: Plan
    prunable: Rule
    weight_decay: float


def _made(job: _Job) -> Once:
    """The functions of a training."""
    groups, pruner, chain, events = job.groups, job.pruner, job.chain, job.plan.steps
    problem = Problem(_unused, _unused, _unused, job.prunable)
    hyper = Hyper(0.0, job.weight_decay, {})
    at_work, after = (gradient_step(chain, hook) for hook in (pruner.hook, None))
    rounds = run_events(problem, chain, pruner, run_key(0), hyper, lambda number: None)
    counts = {name: jnp.asarray(column) for name, column in job.plan.counts.items()}
    first, last = int(events[0]), int(events[-1])

    def init(params: PyTree) -> OnceState:
        masks = tree.ones(tree.pick(params, job.prunable))
        state = RunState(params, {}, fresh_optimizer(chain, hyper, params), masks, ())
        zero = jnp.zeros((), jnp.int32)
        return OnceState(zero, zero, zero, rounds.begin(state)._replace(params=()))

    def once(params: PyTree, state: OnceState) -> tuple[PyTree, OnceState]:
        run = state.run._replace(params=params)
        before, zero = groups.alive(run.masks), zero_groups(groups, params)
        now = {name: column[state.rounds] for name, column in counts.items()}
        run, _ = rounds.once(state.rounds, now, run)
        left = groups.alive(run.masks)
        forced = count_kept({n: before[n] & ~left[n] & ~mask for n, mask in zero.items()})
        total = state.forced + sum(forced.values())
        return run.params, OnceState(state.step, state.rounds + 1, total, run._replace(params=()))

    def update(grads: PyTree, state: OnceState, params: PyTree) -> tuple[PyTree, OnceState]:
        due = (jnp.asarray(events) == state.step).any()
        params, state = jax.lax.cond(due, lambda: once(params, state), lambda: (params, state))
        run = state.run._replace(params=params)
        run = jax.lax.cond(
            (state.step >= first) & (state.step < last),
            lambda: at_work(state.step, hyper, run, grads),
            lambda: after(state.step, hyper, run, grads),
        )
        state = state._replace(step=state.step + 1, run=run._replace(params=()))
        return run.params, state

    def finish(params: PyTree, state: OnceState) -> tuple[PyTree, OnceState]:
        due = (state.step == last) & (state.rounds < len(events))
        return jax.lax.cond(due, lambda: once(params, state), lambda: (params, state))

    def compact(params: PyTree, state: OnceState, model_state: PyTree = None) -> Compact:
        if jnp.ndim(state.step):
            raise PruneError('compact takes one run at a time: a row of params and of the state')
        if int(state.step) < last:
            raise PruneError(f'the method ends after {last} steps, and {state.step} were taken')
        if model_state is None and jax.tree.leaves(job.model_state):
            raise PruneError('compact needs model_state=, as it is after training')
        params, state = jax.jit(finish)(params, state)
        used = job.model_state if model_state is None else model_state
        run = state.run
        more = {'model_state': used, 'opt_state': run.opt_state, 'partial': 'keep'}
        return structure.compact(job.network, params, run.masks, job.x, **more)

    def watch(state: OnceState, params: PyTree) -> dict[str, dict[str, jax.Array]]:
        return watched(groups, pruner, state.run._replace(params=params))

    return Once(init, update, finish, compact, watch, last)


def _spread(start: int, stop: int, rounds: int) -> tuple[int, ...]:
    """Where the rounds of a method happen."""
    least(2, rounds=whole('rounds', rounds))
    start, stop = whole('start', start), whole('stop', stop)
    if start < 0 or stop - start < rounds - 1:
        raise PruneError(
            f'{rounds} rounds need a stop at least {rounds - 1} steps after start, not '
            f'start={start} and stop={stop}'
        )
    return tuple(round(start + i * (stop - start) / (rounds - 1)) for i in range(rounds))


def _unused(*args: Any, **kwargs: Any) -> Any:
    raise PruneError('methods that change training read no data')
