"""A pruner from the name of a method and what the caller chooses."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxprune import arguments, score
from jaxprune.allocation import SHARED, Shape, bounds
from jaxprune.errors import PruneError, nearest
from jaxprune.method.budget import cost_of, within_share
from jaxprune.method.choices import Choices, check_choices
from jaxprune.method.granularity import competing, limits
from jaxprune.method.lasting import Asked
from jaxprune.method.methods import Method, method
from jaxprune.method.options import OPTIONS
from jaxprune.method.pruner import FinalMasksFn, pruner
from jaxprune.method.repair import repair_of
from jaxprune.score.loss import mean_gradient
from jaxprune.select import global_top_k, in_multiples, layerwise_top_k
from jaxprune.structure import Connect, chain, prune_to_active
from jaxprune.types import (
    Batches,
    Groups,
    Key,
    Problem,
    Pruner,
    SelectFn,
    View,
    Weights,
)


def get_pruner(
    problem: Problem,
    name: str,
    *,
    allocation: str = 'global',
    batch_norm: str | None = None,
    shapes: Mapping[str, Shape] | None = None,
    floor: int | Mapping[str, int] = 0,
    cap: float | Mapping[str, float] = 1.0,
    connect: Connect | None = None,
    groups: Groups | None = None,
    repair: str = '',
    repair_gain: str = 'linear',
    score_on: str = 'balanced',
    events: Sequence[int] = (),
    multiple: int = 1,
    cost: str = '',
    gradient: Callable[[Key, View, Any], Weights] | None = None,
    **options: Any,
) -> Pruner:
    """The pruner of a registered method.

    Args:
      problem: the network it will prune.
      name: a key of `METHODS`.
      allocation: 'global' ranks all leaves together, 'lamp' gives each leaf as many weights as
        LAMP would, anything else ranks within each leaf by the counts it is given.
      batch_norm: while scoring, 'train' (batch statistics) or 'eval' (running); None for the
        published mode.
      shapes: path -> shape of the prunable leaves in forward order; for the next three.
      floor: fewest weights of a leaf, see `allocation.bounds`. Layerwise counts include their
        bounds; a ranking over all leaves is held to them here.
      cap: largest density of a leaf, in the same way.
      connect: see `structure.connectivity`; with it the pruner's `final_masks` prunes to a number
        of active weights, along the chain of the allocation.
      groups: what competes, see `competing`; None for single weights. Other groups are ranked by
        the sum of their weights' scores, those of the gradient-flow study by their own rule;
        counts, floor and cap are then those of groups.
      repair: what happens to kept weights after the last round, one of `REPAIRS`; '' for nothing.
      repair_gain: the activation whose gain repaired kernels have.
      score_on: 'balanced' or 'train_batch', what an event hands to scores that need data.
      events: where the clock stands in each round, for methods that change training.
      multiple: of so many units every layer keeps a multiple, rounded up.
      cost: 'params' or 'flops' where counts are shares of these, see `plan_shares`; '' for numbers
        of what competes.
      gradient: for methods that change training, see `lasting.Asked`; None for that of the problem
        on the batches that an event is given.
      **options: the method's own options; numbers may be traced.

    Raises:
      PruneError: an unknown name or option, or options that do not go together; the message begins
        with the key.
    """
    arguments.least(1, multiple=multiple)
    entry = method(name)
    own = _own_options(entry, name, options)
    choices = Choices(
        name,
        allocation,
        granularity='weight' if groups is None else groups.kind,
        cap=cap,
        batch_norm=batch_norm,
        score_on=score_on,
        repair=repair,
        repair_gain=repair_gain,
        multiple=multiple,
        target=cost or 'direct',
        apart=True,  # when its events happen is the caller's affair
    )
    check_choices(entry, choices)
    train = (batch_norm or entry.batch_norm) == 'train'
    request = _Request(
        problem,
        entry,
        choices,
        shapes,
        connect,
        groups,
        floor,
        train,
        tuple(events),
        own,
        gradient,
    )
    if entry.make is not None:
        made = _training(request)
    elif groups is None or groups.kind == 'weight':
        made = _of_weights(request)
    else:
        made = _of_groups(request)
    for option, value in own.items():  # what the score itself has not refused
        if wrong := arguments.outside(value, OPTIONS[option]):
            raise PruneError(f"option '{option}' of '{name}': {wrong}")
    needs = made.needs
    if score_on == 'train_batch':
        needs = needs - {'data'} | {'train_batch'}
    return made._replace(needs=needs, repaired_values=repair_of(repair, repair_gain))


class _Request(NamedTuple):
    """What is asked for, checked; see `get_pruner`."""

    problem: Problem
    entry: Method
    choices: Choices
    shapes: Mapping[str, Shape] | None
    connect: Connect | None
    groups: Groups | None
    floor: int | Mapping[str, int]
    train: bool
    events: tuple[int, ...]
    options: Mapping[str, Any]
    gradient: Callable[[Key, View, Any], Weights] | None


def _own_options(entry: Method, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The method's options, published values filled in."""
    for option in given:
        if option not in entry.options:
            valid = nearest(option, entry.options) if entry.options else 'it has none'
            raise PruneError(f"method '{name}' has no option '{option}': {valid}")
    checked = {
        option: arguments.like(f"option '{option}'", value, entry.options[option])
        for option, value in given.items()
    }
    return {**entry.options, **checked}


def _of_weights(request: _Request) -> Pruner:
    """A pruner of single weights."""
    problem, entry, choices, shapes, connect, _, floor, train, _, options, _ = request
    cap, allocation = choices.cap, choices.allocation
    if shapes is None and (floor or cap != 1.0 or connect is not None):
        raise PruneError('floor, cap and connect need shapes: path -> shape of every prunable leaf')
    scorer = entry.score(problem, train, **options)
    if allocation == 'lamp':
        scorer = score.ranked_like(scorer, score.lamp())
    shared = allocation in SHARED
    fewest, most = bounds(shapes, floor, cap) if shapes is not None and shared else (None, None)
    final_masks: FinalMasksFn | None = None
    if connect is not None:
        masks = chain(shapes, allocation, floor=floor, cap=cap)

        def final_masks(ranking, active):
            return prune_to_active(connect, ranking, masks, active)

    return pruner(
        scorer,
        global_top_k if shared else layerwise_top_k,
        monotone=entry.monotone,
        needs=entry.needs,
        fewest=fewest if floor else None,
        most=most if cap != 1.0 else None,
        final_masks=final_masks,
    )


def _selection(groups: Groups, choices: Choices, fewest: Mapping[str, int] | None) -> SelectFn:
    """How groups are selected; by layer where there are no bounds for one ranking."""
    if choices.target != 'direct':
        return within_share(groups, choices.target, choices.multiple, fewest)
    select = layerwise_top_k if fewest is None else global_top_k
    return in_multiples(select, choices.multiple)


def _training(request: _Request) -> Pruner:
    """A method that changes training."""

    def of_problem(key: Key, view: View, batches: Batches | None) -> Weights:
        return mean_gradient(request.problem, view, key, batches, train=request.train)

    choices, groups = request.choices, request.groups
    if groups is None:
        if request.shapes is None:
            raise PruneError(f"'{choices.name}' needs shapes: path -> shape of every prunable leaf")
        groups = competing('weight', request.shapes)
    floor, cap = limits(groups, request.floor, cap=choices.cap)
    shared = choices.allocation in SHARED
    fewest, most = bounds(groups.shapes, floor, cap) if shared else ({}, {})
    asked = Asked(
        groups,
        fewest if any(fewest.values()) else None,
        request.events,
        choices.multiple,
        cost_of(choices.target),
        shared,
        most if shared and cap != 1.0 else None,
        request.gradient or of_problem,
    )
    return request.entry.make(asked, **request.options)


def _of_groups(request: _Request) -> Pruner:
    """A pruner of anything else than single weights."""
    problem, entry, choices, _, _, groups, floor, train, _, options, _ = request
    floor, cap = limits(groups, floor, cap=choices.cap)
    shared = choices.allocation in SHARED
    fewest, most = bounds(groups.shapes, floor, cap) if shared else ({}, {})
    by_group = {'by': groups} if entry.grouped else {}
    own = {name: value for name, value in options.items() if name != 'momentum'}
    return pruner(
        entry.score(problem, train, **own, **by_group),
        _selection(groups, choices, fewest if shared else None),
        monotone=entry.monotone,
        needs=entry.needs,
        fewest=fewest if any(fewest.values()) else None,
        most=most if shared and choices.cap != 1.0 else None,
        groups=groups,
        by_group=entry.grouped,
        momentum=options['momentum'] if entry.averages else None,
    )
