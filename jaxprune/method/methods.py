"""The methods a specification may name. To add one: a score in `score/`, a line here, a test."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxprune import arguments, score
from jaxprune.allocation import ALLOCATIONS, SHARED, Shape, bounds
from jaxprune.errors import PruneError, nearest
from jaxprune.method.pruner import pruner
from jaxprune.method.unit_pruning import GRANULARITIES, alike, unit_select, unit_shapes
from jaxprune.select import global_top_k, layerwise_top_k
from jaxprune.structure import Connect, chain, prune_to_active
from jaxprune.types import Problem, Pruner, ScoreFn


class Method(NamedTuple):
    """A method's registry entry.

    Attributes:
      title: how tables and figures write it.
      score: builds the score from a problem, the batch-norm mode and the method's options.
      needs: 'data', 'shape' or nothing, see `pruner`.
      train: batch-norm mode while scoring in the published code; True = batch statistics.
      rounds: published number of rounds.
      density_schedule: published schedule of densities over the rounds.
      monotone: pruned weights never return.
      grouped: the score takes `by`: what is removed together.
      options: further options of the method with their published values.
    """

    title: str
    score: Callable[..., ScoreFn]
    needs: frozenset[str] = frozenset()
    train: bool = False
    rounds: int = 1
    density_schedule: str = 'exponential'
    monotone: bool = True
    grouped: bool = False
    options: Mapping[str, Any] = {}


_data, _shape = frozenset({'data'}), frozenset({'shape'})
_data_initial = frozenset({'data', 'initial'})


def _of(make: Callable[..., ScoreFn]) -> Callable[..., ScoreFn]:
    """A score that knows the problem and the batch-norm mode."""
    return lambda problem, train, **options: make(problem, train=train, **options)


def _measure(title: str, name: str) -> Method:
    """An importance of the gradient-flow study; its temperature is an option."""
    point = {'temperature': 1.0, **score.MEASURES[name]}
    temperature = {'temperature': point.pop('temperature')}

    def make(problem: Problem, train: bool, **options: Any) -> ScoreFn:
        return score.importance(problem, train=train, **point, **options)

    return Method(title, make, _data, grouped=True, options=temperature)


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
    'loss_preservation': _measure('loss preservation', 'loss_preservation'),
    'biased_loss_preservation': _measure('biased loss preservation', 'biased_loss_preservation'),
    'gradient_norm_increase': _measure('gradient-norm increase', 'gradient_norm_increase'),
    'gradient_norm_preservation': _measure(
        'gradient-norm preservation', 'gradient_norm_preservation'
    ),
    'importance': Method(
        'importance',
        _of(score.importance),
        _data_initial,
        grouped=True,
        options={'order': 1, 'mode': 'sum_of_abs', 'bias': 'none', 'temperature': 1.0},
    ),
}


def method(name: str) -> Method:
    """The registry entry of a method."""
    if name not in METHODS:
        raise PruneError(f"unknown method '{name}': {nearest(str(name), METHODS)}")
    return METHODS[name]


def get_pruner(
    problem: Problem,
    name: str,
    *,
    allocation: str = 'global',
    train: bool | None = None,
    shapes: Mapping[str, Shape] | None = None,
    floor: int | Mapping[str, int] = 0,
    cap: float | Mapping[str, float] = 1.0,
    connect: Connect | None = None,
    granularity: str = 'weight',
    keep_all_units: str = '',
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
      floor: fewest weights of a leaf, see `allocation.bounds`. Layerwise counts include their
        bounds; a ranking over all leaves is held to them here.
      cap: largest density of a leaf, likewise.
      connect: see `structure.connectivity`; with it the pruner's `final_masks` prunes to a number
        of active weights, along the chain of the allocation; where units are pruned, it finds what
        reads them.
      granularity: 'weight', or 'unit' for whole neurons and filters, ranked by the sum of their
        weights' scores (those of the gradient-flow study by their own rule); counts and floor are
        units then, and `shapes` and `connect` are needed.
      keep_all_units: regular expression of layers that keep all units, see `unit_shapes`.
      **options: the method's own options.
    """
    entry = method(name)
    for option, value in options.items():
        if option not in entry.options:
            valid = nearest(option, entry.options) if entry.options else 'it has none'
            raise PruneError(f"method '{name}' has no option '{option}': {valid}")
        options[option] = arguments.like(f"option '{option}'", value, entry.options[option])
    if train is not None:
        arguments.flag('train', train)
    if not isinstance(allocation, str) or allocation not in ALLOCATIONS:
        raise PruneError(f"unknown allocation '{allocation}': {nearest(allocation, ALLOCATIONS)}")
    if allocation == 'lamp' and not entry.monotone:
        raise PruneError(
            f"allocation 'lamp' goes by the weights left, and '{name}' brings weights back"
        )
    if granularity not in GRANULARITIES:
        raise PruneError(
            f"unknown granularity '{granularity}': {nearest(str(granularity), GRANULARITIES)}"
        )
    if keep_all_units and granularity == 'weight':
        raise PruneError("keep_all_units names layers that keep all units, with granularity 'unit'")
    mode = entry.train if train is None else train
    if granularity == 'unit':
        return _of_units(
            problem, name, mode, allocation, shapes, connect, floor, cap, keep_all_units, options
        )
    if shapes is None and (floor or cap != 1.0 or connect is not None):
        raise PruneError('floor, cap and connect need shapes: path -> shape of every prunable leaf')
    scorer = entry.score(problem, mode, **{**entry.options, **options})
    if allocation == 'lamp':
        scorer = score.ranked_like(scorer, score.lamp())
    shared = allocation in SHARED
    fewest, most = bounds(shapes, floor, cap) if shapes is not None and shared else (None, None)
    final_masks = None
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


def _of_units(
    problem: Problem,
    name: str,
    train: bool,
    allocation: str,
    shapes: Mapping[str, Shape] | None,
    connect: Connect | None,
    floor: int | Mapping[str, int],
    cap: float | Mapping[str, float],
    keep_all_units: str,
    options: Mapping[str, Any],
) -> Pruner:
    """The pruner of a registered method that removes whole units."""
    entry = method(name)
    if allocation not in ('global', 'uniform'):
        raise PruneError(f"units are shared out 'global' or 'uniform', not '{allocation}'")
    if not entry.monotone:
        raise PruneError(f"'{name}' brings weights back, and readers of units do not return")
    if shapes is None or connect is None:
        raise PruneError('units need shapes, path -> shape in forward order, and connect')
    if cap != 1.0:
        raise PruneError('layers of units have a floor, but no cap')
    units = unit_shapes(shapes, keep_all_units)
    fewest, _ = bounds(units, floor)
    fewest = fewest if any(fewest.values()) and allocation == 'global' else None
    if entry.grouped:
        scorer = entry.score(problem, train, **{**entry.options, **options}, by='unit')
    else:
        scorer = alike(entry.score(problem, train, **{**entry.options, **options}))
    return pruner(scorer, unit_select(connect, list(units), fewest), needs=entry.needs)
