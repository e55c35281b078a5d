"""The methods a specification may name. To add one: a score in `score/`, a line here, a test."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxprune import score
from jaxprune.errors import PruneError, nearest
from jaxprune.method.pruner import pruner
from jaxprune.quota import ALLOCATIONS
from jaxprune.select import global_top_k, layerwise_top_k
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
      options: further options of the method with their published values.
    """

    title: str
    score: Callable[..., ScoreFn]
    needs: frozenset[str] = frozenset()
    train: bool = False
    rounds: int = 1
    over: str = 'exponential'
    options: Mapping[str, Any] = {}


_data, _shape = frozenset({'data'}), frozenset({'shape'})

METHODS: dict[str, Method] = {
    'random': Method('random', lambda problem, train: score.random()),
    'magnitude': Method('magnitude', lambda problem, train: score.magnitude()),
    'snip': Method('SNIP', lambda problem, train: score.snip(problem, train=train), _data),
    'grasp': Method(
        'GraSP',
        lambda problem, train, temperature: score.grasp(
            problem, train=train, temperature=temperature
        ),
        _data,
        train=True,
        options={'temperature': 200.0},
    ),
    'synflow': Method('SynFlow', lambda problem, train: score.synflow(problem), _shape, rounds=100),
}


def method(name: str) -> Method:
    """The name card of a method."""
    if name not in METHODS:
        raise PruneError(f"unknown method '{name}': {nearest(name, METHODS)}")
    return METHODS[name]


def build(
    problem: Problem,
    name: str,
    *,
    allocation: str = 'global',
    train: bool | None = None,
    **options: Any,
) -> Pruner:
    """The pruner of a registered method.

    Args:
      problem: the network it will prune.
      name: a key of `METHODS`.
      allocation: 'global' ranks all leaves together, anything else ranks within each leaf.
      train: batch-norm mode while scoring; None for the published one.
      **options: the method's own options.
    """
    card = method(name)
    for option in options:
        if option not in card.options:
            raise PruneError(
                f"method '{name}' has no option '{option}': {nearest(option, card.options)}"
            )
    if allocation not in ALLOCATIONS:
        raise PruneError(f"unknown allocation '{allocation}': {nearest(allocation, ALLOCATIONS)}")
    mode = card.train if train is None else train
    scorer = card.score(problem, mode, **{**card.options, **options})
    select = global_top_k if allocation == 'global' else layerwise_top_k
    return pruner(scorer, select, needs=card.needs)
