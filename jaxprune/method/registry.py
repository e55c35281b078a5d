"""The methods a specification may name. To add one: a score in `score/`, a line here, a test."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxprune import arguments, score
from jaxprune.errors import PruneError, nearest
from jaxprune.method.pruner import pruner
from jaxprune.quota import ALLOCATIONS, SHARED, Shape, bounds
from jaxprune.select import global_top_k, layerwise_top_k
from jaxprune.structure import Connect, chain, prune_to_active
from jaxprune.types import Problem, Pruner, ScoreFn


class Method(NamedTuple):
    """A method's name card.

    Attributes:
      title: how tables and figures write it.
      score: builds the score from a problem, the batch-norm mode and the method's options.
      needs: 'data', 'shape' or nothing, see `pruner`.
      train: batch-norm mode while scoring in the published code; True = batch statistics.
      rounds: published number of rounds.
      over: published schedule of densities over the rounds.
      monotone: pruned weights never return.
      options: further options of the method with their published values.
    """

    title: str
    score: Callable[..., ScoreFn]
    needs: frozenset[str] = frozenset()
    train: bool = False
    rounds: int = 1
    over: str = 'exponential'
    monotone: bool = True
    options: Mapping[str, Any] = {}


_data, _shape = frozenset({'data'}), frozenset({'shape'})


def _of(make: Callable[..., ScoreFn]) -> Callable[..., ScoreFn]:
    """A score that knows the problem and the batch-norm mode."""
    return lambda problem, train, **options: make(problem, train=train, **options)


METHODS: dict[str, Method] = {
    'random': Method('random', lambda problem, train: score.random()),
    'magnitude': Method('magnitude', lambda problem, train: score.magnitude()),
    'lamp': Method('LAMP', lambda problem, train: score.lamp()),
    'snip': Method('SNIP', _of(score.snip), _data),
    # The paper's 60 rounds; the code of the effective-sparsity study takes 300.
    'iter_snip': Method('Iter-SNIP', _of(score.snip), _data, train=True, rounds=60),
    'force': Method('FORCE', _of(score.force), _data, train=True, rounds=60, monotone=False),
    'grasp': Method('GraSP', _of(score.grasp), _data, train=True, options={'temperature': 200.0}),
    'synflow': Method('SynFlow', lambda problem, train: score.synflow(problem), _shape, rounds=100),
    'taylor': Method('Taylor', _of(score.taylor), _data, options={'power': 1}),
    'fisher': Method('Fisher', _of(score.fisher), _data, options={'labels': 'data'}),
    # In 60 rounds this is GraSP-It of the same code.
    'gradient_norm': Method('gradient norm', _of(score.gradient_norm), _data, train=True),
    # The number of rounds is ours; the paper's is not known to us, its code defaults to one.
    'ntk_sap': Method(
        'NTK-SAP',
        _of(score.ntk_sap),
        _shape,
        train=True,
        rounds=20,
        options={'samples': 100, 'repeats': 1, 'epsilon': 0.01},
    ),
    'prospr': Method(
        'ProsPr',
        _of(score.prospr),
        _data,
        train=True,
        options={'steps': 3, 'learning_rate': 0.1, 'first_order': False},
    ),
}


def method(name: str) -> Method:
    """The name card of a method."""
    if name not in METHODS:
        raise PruneError(f"unknown method '{name}': {nearest(str(name), METHODS)}")
    return METHODS[name]


def build(
    problem: Problem,
    name: str,
    *,
    allocation: str = 'global',
    train: bool | None = None,
    shapes: Mapping[str, Shape] | None = None,
    floor: int | Mapping[str, int] = 0,
    cap: float | Mapping[str, float] = 1.0,
    connect: Connect | None = None,
    **options: Any,
) -> Pruner:
    """The pruner of a registered method.

    Args:
      problem: the network it will prune.
      name: a key of `METHODS`.
      allocation: 'global' ranks all leaves together, 'lamp' gives each leaf as many weights as
        LAMP would, anything else ranks within each leaf by the counts it is given.
      train: batch-norm mode while scoring; None for the published one.
      shapes: path -> shape of the prunable leaves in forward order; for the next three.
      floor: fewest weights of a leaf, see `quota.bounds`. Layerwise counts have their bounds in
        them; a ranking over all leaves is held to them here.
      cap: largest density of a leaf, likewise.
      connect: see `structure.connectivity`; with it the pruner's `finish` prunes to a number of
        active weights, along the chain of the allocation.
      **options: the method's own options.
    """
    card = method(name)
    for option, value in options.items():
        if option not in card.options:
            valid = nearest(option, card.options) if card.options else 'it has none'
            raise PruneError(f"method '{name}' has no option '{option}': {valid}")
        options[option] = arguments.like(f"option '{option}'", value, card.options[option])
    if train is not None:
        arguments.flag('train', train)
    if not isinstance(allocation, str) or allocation not in ALLOCATIONS:
        raise PruneError(f"unknown allocation '{allocation}': {nearest(allocation, ALLOCATIONS)}")
    if allocation == 'lamp' and not card.monotone:
        raise PruneError(
            f"allocation 'lamp' goes by the weights left, and '{name}' brings weights back"
        )
    if shapes is None and (floor or cap != 1.0 or connect is not None):
        raise PruneError('floor, cap and connect need shapes: path -> shape of every prunable leaf')
    mode = card.train if train is None else train
    scorer = card.score(problem, mode, **{**card.options, **options})
    if allocation == 'lamp':
        scorer = score.ranked_like(scorer, score.lamp())
    shared = allocation in SHARED
    fewest, most = bounds(shapes, floor, cap) if shapes is not None and shared else (None, None)
    finish = None
    if connect is not None:
        masks = chain(shapes, allocation, floor=floor, cap=cap)

        def finish(ranking, active):
            return prune_to_active(connect, ranking, masks, active)

    return pruner(
        scorer,
        global_top_k if shared else layerwise_top_k,
        monotone=card.monotone,
        needs=card.needs,
        fewest=fewest if floor else None,
        most=most if cap != 1.0 else None,
        finish=finish,
    )
