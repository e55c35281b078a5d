"""`jp.train_sparse`: methods that change masks during training, in someone's own loop."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxprune import tree
from jaxprune.errors import PruneError
from jaxprune.method import COUPLED, competing, get_pruner, limits, plan_groups, usual_allocation
from jaxprune.prune_model.in_loop import (
    InLoop,
    Job,
    chain_of,
    entry_of,
    in_loop,
    schedule_of,
    spread,
    unused,
)
from jaxprune.types import Problem, PyTree, Rule


def train_sparse(
    params: PyTree,
    optimizer: optax.GradientTransformation,
    method_name: str = 'rigl',
    *,
    density: float,
    start: int,
    stop: int,
    learning_rate: float | Callable[[ArrayLike], jax.Array],
    rounds: int | None = None,
    weight_decay: float = 0.0,
    prunable: Rule = tree.kernels,
    granularity: str = 'weight',
    allocation: str | None = None,
    floor: int | Mapping[str, int] = 0,
    density_schedule: str | None = None,
    **options: Any,
) -> InLoop:
    """Wraps an optimizer so that a network is pruned while it trains.

        sparse = jp.train_sparse(params, optax.sgd(0.1), 'rigl', density=0.1, learning_rate=0.1,
                                 start=0, stop=7500, rounds=76)
        state = sparse.init(params)
        for batch in batches:                                          # for jit
            grads = jax.grad(lambda p: loss(sparse.seen(p, state), batch))(params)
            params, state = sparse.update(grads, state, params)
        sparse.seen(params, state, train=False)                        # what was trained
        state.run.masks

    Rounds happen where a sweep has them, between two steps. Only RigL grows by the gradient that it
    is given, in a step in which the optimizer rests.

    Args:
      params: all parameters, arrays or shapes.
      optimizer: any optax transformation that has the learning rate in it.
      method_name: a method that changes training: 'rigl', 'set', 'gmp', 'dpf', 'movement', ...
      density: share of the weights to keep, in (0, 1]; of groups, with another granularity.
      start, stop: the steps before which the first round and the last one happen.
      learning_rate: of the optimizer, a number or an optax schedule: methods look at its steps.
      rounds: of the method, spread evenly from start to stop; None for the published number.
      weight_decay: what the optimizer takes off the weights itself, times the rate, as AdamW does.
      prunable: which leaves masks may touch; kernels by default.
      granularity: 'weight', 'kernel', '2:4' or blocks such as '8x128'; for whole units see
        `train_once`.
      allocation: of weights to layers; None for the published one.
      floor: fewest of a layer, see `jp.prune`.
      density_schedule: densities over the rounds; None for the published one.
      **options: the method's own options.

    Raises:
      PruneError: an unknown name, a method that does not change training, too few steps for its
        rounds, a density that cannot be.
    """
    entry = entry_of(method_name, options, coupled=False)
    if entry.coupled or granularity in COUPLED:
        what = f"'{method_name}'" if entry.coupled else f"granularity '{granularity}'"
        raise PruneError(f'{what} removes coupled groups: see jp.train_once')
    shapes = {path: tuple(jnp.shape(leaf)) for path, leaf in tree.pick(params, prunable).items()}
    groups = competing(granularity, shapes)
    if allocation is None:
        allocation = usual_allocation(entry, granularity)
    events = spread(start, stop, entry.rounds if rounds is None else rounds)
    bounds, cap = limits(groups, floor)
    pruner = get_pruner(
        Problem(unused, unused, unused, prunable),
        method_name,
        allocation=allocation,
        shapes=shapes,
        floor=bounds,
        cap=cap,
        groups=groups,
        events=events,
        gradient=lambda key, view, grads: grads,
        **options,
    )
    plan = plan_groups(
        groups,
        density,
        allocation=allocation,
        floor=bounds,
        cap=cap,
        rounds=len(events),
        density_schedule=schedule_of(method_name, entry, density_schedule),
        steps=events,
    )
    chain = chain_of(optimizer, learning_rate)
    return in_loop(Job(groups, pruner, chain, plan, prunable, weight_decay))
