"""A method that changes training as pure functions for someone's own loop."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxprune import tree
from jaxprune.arguments import least, whole
from jaxprune.errors import PruneError, nearest
from jaxprune.method import METHODS, Method, method, watched, zero_groups
from jaxprune.method.chosen_anew import straight_through
from jaxprune.optim import Optimizer
from jaxprune.plan import Plan
from jaxprune.prune_model import check_arguments as check
from jaxprune.rng import words
from jaxprune.select import count_kept
from jaxprune.train import fresh_optimizer, gradient_step, run_events, through_hook
from jaxprune.types import Groups, Hyper, Key, Problem, Pruner, PyTree, Rule, RunState


class LoopState(NamedTuple):
    """What is carried along with the parameters.

    Attributes:
      step: steps taken, int32.
      rounds: rounds of the method so far, int32.
      forced: groups that were removed although they were not zero, int32. Their removal changed
        what the network computes.
      nonfinite: scores that were NaN or infinite, int32. If there are any, masks mean nothing.
      key: data of the key of the method's draws; round i has `fold_in(key, i)`.
      run: masks, and the states of optimizer and method; without parameters.
    """

    step: jax.Array
    rounds: jax.Array
    forced: jax.Array
    nonfinite: jax.Array
    key: jax.Array
    run: RunState


class SeenFn(Protocol):
    def __call__(self, params: PyTree, state: LoopState, *, train: bool = True) -> PyTree:
        """The parameters that the network computes with; the loss is differentiated through it.

        Args:
          train: for a training step; False for evaluation.
        """


class InLoop(NamedTuple):
    """A training that prunes on the way. All functions are pure.

    Attributes:
      init: `(params, key=jax.random.key(0)) -> state`, with the first round, if it is due.
      seen: see `SeenFn`.
      update: `(gradients, state, params) -> (params, state)`, one step of training, for `jit`; the
        gradients are those of the loss at `seen(params, state)`, by `params`. The rounds due
        before the next step are part of it.
      watch: `(state, params) -> quantity -> layer -> number`, what the method does: 'zero_groups',
        and what else `WATCHED` has for it.
      stop: steps after which the method is done, but for the last round of RigL: it is part of the
        step after, and changes nothing.
    """

    init: Callable[..., LoopState]
    seen: SeenFn
    update: Callable[[PyTree, LoopState, PyTree], tuple[PyTree, LoopState]]
    watch: Callable[[LoopState, PyTree], dict[str, dict[str, jax.Array]]]
    stop: int


class Job(NamedTuple):
    """What is trained and pruned, checked."""

    groups: Groups
    pruner: Pruner
    chain: Optimizer
    plan: Plan
    prunable: Rule
    weight_decay: float


def in_loop(job: Job) -> InLoop:
    """The functions of a training."""
    check.rate('weight_decay', job.weight_decay)
    groups, pruner, chain = job.groups, job.pruner, job.chain
    events = tuple(int(step) for step in job.plan.steps)
    problem = Problem(unused, unused, unused, job.prunable)
    hyper = Hyper(0.0, job.weight_decay, {})
    at_work = gradient_step(chain, pruner.hook, dense=pruner.dense)
    after = gradient_step(chain)
    counts = {name: jnp.asarray(column) for name, column in job.plan.counts.items()}
    first, last = events[0], events[-1]
    # RigL and its like grow by the gradient of the step; the first round prunes without one.
    by_gradient = 'train_batch' in pruner.needs
    late, early = (events[:1], events[1:]) if by_gradient else (events, ())

    def rounds_of(state: LoopState, grads: PyTree) -> Any:
        key = jax.random.wrap_key_data(state.key)
        return run_events(
            problem, chain, pruner, key, hyper, lambda number: grads, clock=state.step
        )

    def init(params: PyTree, key: Key | None = None) -> LoopState:
        key = words(jax.random.key(0) if key is None else key)
        masks = tree.ones(tree.pick(params, job.prunable))
        run = RunState(params, {}, fresh_optimizer(chain, hyper, params), masks, ())
        zero = jnp.zeros((), jnp.int32)
        state = LoopState(zero, zero, zero, zero, key, run)
        state = state._replace(run=rounds_of(state, None).begin(run))
        return once(params, state, None)[1] if first == 0 else _bare(state)

    def once(params: PyTree, state: LoopState, grads: PyTree) -> tuple[PyTree, LoopState]:
        run = state.run._replace(params=params)
        grads = jax.tree.map(jnp.zeros_like, params) if grads is None else grads
        rounds = rounds_of(state, tree.pick(grads, job.prunable))
        before, zero = groups.alive(run.masks), zero_groups(groups, params)
        now = {name: column[state.rounds] for name, column in counts.items()}
        run, info = rounds.once(state.rounds, now, run)
        left = groups.alive(run.masks)
        forced = count_kept({n: before[n] & ~left[n] & ~mask for n, mask in zero.items()})
        if rounds.finish is not None:
            done = state.rounds == len(events) - 1
            run = jax.lax.cond(done, lambda: rounds.finish(run, 0)[0], lambda: run)
        total = state.forced + sum(forced.values())
        odd = state.nonfinite + info.nonfinite
        state = state._replace(rounds=state.rounds + 1, forced=total, nonfinite=odd, run=run)
        return run.params, _bare(state)

    def if_due(params: PyTree, state: LoopState, grads: PyTree, clocks: tuple[int, ...]) -> Any:
        if not clocks:
            return params, state
        due = (jnp.asarray(clocks) == state.step).any()
        same = (params, state)
        return jax.lax.cond(due, lambda: once(params, state, grads), lambda: same)

    def works(state: LoopState) -> jax.Array:
        return (state.step >= first) & (state.step < last)

    def seen(params: PyTree, state: LoopState, *, train: bool = True) -> PyTree:
        masked = straight_through(params, state.run.masks)
        if not pruner.dense:
            return masked
        used = pruner.hook._replace(evaluated=None) if train else pruner.hook
        run = state.run._replace(params=params)
        hooked = through_hook(used, state.step, run).params
        return jax.tree.map(lambda a, b: jnp.where(works(state), a, b), hooked, masked)

    def update(grads: PyTree, state: LoopState, params: PyTree) -> tuple[PyTree, LoopState]:
        check.step(grads, state, params, LoopState)
        params, state = if_due(params, state, grads, early)
        masked = params if pruner.dense else tree.apply_masks(params, state.run.masks)
        run = state.run._replace(params=masked)
        run = jax.lax.cond(
            works(state),
            lambda: at_work(state.step, hyper, run, grads),
            lambda: after(state.step, hyper, run, grads),
        )
        state = _bare(state._replace(step=state.step + 1, run=run))
        return if_due(run.params, state, None, late)

    def watch(state: LoopState, params: PyTree) -> dict[str, dict[str, jax.Array]]:
        return watched(groups, pruner, state.run._replace(params=params))

    compiled = jax.jit(init)

    def checked_init(params: PyTree, key: Key | None = None) -> LoopState:
        check.weights(tree.pick(params, job.prunable))
        check.key(key)
        return compiled(params, key)

    return InLoop(checked_init, seen, update, watch, last)


def entry_of(name: str, options: dict[str, Any], *, coupled: bool) -> Method:
    """The entry of a method that changes training, which knows these options.

    Args:
      coupled: may it be one of coupled groups only?
    """
    entry = method(name)
    if not entry.hooked:
        if entry.rewind:
            raise PruneError(f"'{name}' trains again and again: it is for sweeps, `jaxprune sweep`")
        valid = [o for o, known in METHODS.items() if known.hooked and coupled >= known.coupled]
        raise PruneError(f"'{name}' does not change training, see jp.prune: {nearest(name, valid)}")
    check.options(options, entry.options, ())
    return entry


def schedule_of(name: str, entry: Method, density_schedule: str | None) -> str:
    """The schedule of densities that is asked for, or the published one."""
    if density_schedule not in (None, entry.density_schedule) and not entry.scheduled:
        raise PruneError(f"density_schedule: '{name}' prunes in one round only: leave it out")
    return density_schedule or entry.density_schedule


def chain_of(
    optimizer: optax.GradientTransformation,
    learning_rate: float | Callable[[ArrayLike], jax.Array],
) -> Optimizer:
    """Someone's optimizer, and the rate that is in it."""
    if not (hasattr(optimizer, 'init') and hasattr(optimizer, 'update')):
        kind = type(optimizer).__name__
        raise PruneError(f'optimizer must be made by optax, such as optax.sgd(0.1), not a {kind}')
    if not callable(learning_rate):
        check.rate('learning_rate', learning_rate)
    schedule = learning_rate if callable(learning_rate) else lambda step: learning_rate
    return Optimizer(
        make=lambda hyper, rate: optimizer,
        coupled_decay=False,
        rate=lambda step, hyper: jnp.asarray(schedule(step), jnp.float32),
    )


def spread(start: int, stop: int, rounds: int) -> tuple[int, ...]:
    """Where the rounds of a method happen."""
    least(2, rounds=whole('rounds', rounds))
    start, stop = whole('start', start), whole('stop', stop)
    least(0, start=start)
    if stop - start < rounds - 1:
        raise PruneError(
            f'{rounds} rounds need a stop at least {rounds - 1} steps after start, not '
            f'start={start} and stop={stop}'
        )
    return tuple(round(start + i * (stop - start) / (rounds - 1)) for i in range(rounds))


def unused(*args: Any, **kwargs: Any) -> Any:
    """A part of a problem that a loop has itself."""
    raise PruneError('methods that change training read no data')


def _bare(state: LoopState) -> LoopState:
    return state._replace(run=state.run._replace(params=()))
