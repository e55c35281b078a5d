"""`jp.train_once`: a compact network out of one training, in someone's own loop."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxprune import structure, tree
from jaxprune.arguments import whole
from jaxprune.errors import PruneError, check_choice
from jaxprune.method import competing, cost_of, get_pruner, limits, plan_groups
from jaxprune.prune_model.in_loop import (
    Job,
    LoopState,
    SeenFn,
    chain_of,
    entry_of,
    in_loop,
    schedule_of,
    spread,
    unused,
)
from jaxprune.structure import Compact
from jaxprune.structure.function import function_of
from jaxprune.types import Problem, PyTree, Rule


class Once(NamedTuple):
    """A training that prunes on the way. All functions but `compact` are pure.

    Attributes:
      init, seen, update, watch: see `InLoop`. Only a method that keeps dense weights needs `seen`.
      compact: `(params, state, model_state=None) -> Compact`, the smaller network, see
        `jp.compact`; after the last step of the method. It needs the state of a network that has
        one, as it is after training.
      stop: steps after which the network is compact.
    """

    init: Callable[..., LoopState]
    seen: SeenFn
    update: Callable[[PyTree, LoopState, PyTree], tuple[PyTree, LoopState]]
    watch: Callable[[LoopState, PyTree], dict[str, dict[str, jax.Array]]]
    compact: Callable[..., Compact]
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
    `LoopState.forced` counts those that were not.

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
    entry = entry_of(method_name, options, coupled=True)
    check_choice('target', target, ('direct', *structure.COSTS))
    network, own_state = function_of(apply, model_state)
    coupled = structure.groups(network, params, x, own_state)
    shapes = {path: tuple(jnp.shape(leaf)) for path, leaf in tree.pick(params, prunable).items()}
    groups = competing(granularity, shapes, lambda: coupled, keep_all_units)
    events = spread(start, stop, entry.rounds if rounds is None else rounds)
    bounds, cost = limits(groups, floor)[0], cost_of(target)
    plan = plan_groups(
        groups,
        density,
        cost=cost,
        allocation=allocation,
        floor=bounds,
        multiple=whole('multiple', multiple),
        rounds=len(events),
        density_schedule=schedule_of(method_name, entry, density_schedule),
        steps=events,
    )
    pruner = get_pruner(
        Problem(unused, unused, unused, prunable),
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
    chain = chain_of(optimizer, learning_rate)
    made = in_loop(Job(groups, pruner, chain, plan, prunable, weight_decay))
    compact = _compact(network, own_state, x, made.stop)
    return Once(made.init, made.seen, made.update, made.watch, compact, made.stop)


def _compact(
    network: Callable[..., PyTree], own_state: PyTree, x: PyTree, stop: int
) -> Callable[..., Compact]:
    """`Once.compact` of a network that was traced with this state, on inputs like these."""

    def compact(params: PyTree, state: LoopState, model_state: PyTree = None) -> Compact:
        if jnp.ndim(state.step):
            raise PruneError('compact takes one run at a time: a row of params and of the state')
        if int(state.step) < stop:
            raise PruneError(f'the method ends after {stop} steps, and {state.step} were taken')
        if model_state is None and jax.tree.leaves(own_state):
            raise PruneError('compact needs model_state=, as it is after training')
        used, run = own_state if model_state is None else model_state, state.run
        more = {'model_state': used, 'opt_state': run.opt_state, 'partial': 'keep'}
        return structure.compact(network, params, run.masks, x, **more)

    return compact
