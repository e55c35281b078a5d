"""The methods a specification may name. To add one: a score in `score/`, a line here, a test.

A method that changes training has a file of its own in this room, and a line here.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxprune import score
from jaxprune.errors import lookup
from jaxprune.method.tpp import tpp
from jaxprune.types import Problem, Pruner, ScoreFn


class Method(NamedTuple):
    """A method's registry entry.

    Attributes:
      title: how tables and figures write it.
      score: builds the score from a problem, the batch-norm mode (True = batch statistics) and the
        method's options.
      needs: what an event must be given, see `types.NEEDS`.
      batch_norm: published mode while scoring: 'train' (batch statistics) or 'eval' (running).
      rounds: published number of rounds.
      density_schedule: published schedule of densities over the rounds.
      monotone: pruned weights never return.
      grouped: the score takes `by`: what is removed together.
      options: further options of the method with their published values. Numbers are traced, so
        runs that differ in them share a program; whole numbers and words are not.
      make: builds the whole pruner, for methods that change training: `(problem, ranked units,
        selection of units, **options) -> pruner`. Such a method prunes units, and acts between its
        first round and its last.
    """

    title: str
    score: Callable[..., ScoreFn] | None
    needs: frozenset[str] = frozenset()
    batch_norm: str = 'eval'
    rounds: int = 1
    density_schedule: str = 'exponential'
    monotone: bool = True
    grouped: bool = False
    options: Mapping[str, Any] = {}
    make: Callable[..., Pruner] | None = None

    @property
    def hooked(self) -> bool:
        """Does the method change the training step?"""
        return self.make is not None


_data, _shape = frozenset({'data'}), frozenset({'shape'})
_data_initial = frozenset({'data', 'initial'})
_shape_fresh = frozenset({'shape', 'fresh_init'})


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
    'iter_snip': Method('Iter-SNIP', _of(score.snip), _data, 'train', rounds=60),
    'force': Method('FORCE', _of(score.force), _data, 'train', rounds=60, monotone=False),
    'grasp': Method('GraSP', _of(score.grasp), _data, 'train', options={'temperature': 200.0}),
    'synflow': Method('SynFlow', lambda problem, train: score.synflow(problem), _shape, rounds=100),
    'taylor': Method('Taylor', _of(score.taylor), _data, options={'power': 1}),
    'fisher': Method('Fisher', _of(score.fisher), _data, options={'labels': 'data'}),
    # In 60 rounds this is GraSP-It of the same code.
    'gradient_norm': Method('gradient norm', _of(score.gradient_norm), _data, 'train'),
    # The number of rounds is ours; the paper's is not known to us, its code defaults to one.
    'ntk_sap': Method(
        'NTK-SAP',
        _of(score.ntk_sap),
        _shape_fresh,
        'train',
        rounds=20,
        options={'samples': 100, 'repeats': 1, 'epsilon': 0.01},
    ),
    'prospr': Method(
        'ProsPr',
        _of(score.prospr),
        _data,
        'train',
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
    'tpp': Method(
        'TPP',
        None,
        rounds=2,
        density_schedule='constant',
        options={'weight': 1000.0, 'interval': 10, 'increment': 1e-4, 'ceiling': 1.0},
        make=tpp,
    ),
}


def method(name: str) -> Method:
    """The registry entry of a method.

    Raises:
      PruneError: there is no method of that name.
    """
    return lookup('method', name, METHODS)
