"""Which instances of a law the default run takes, and which `pytest -m more`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest

MORE = pytest.mark.more

#: The same code as `importance` with other options: most laws take `importance` alone.
POINTS = (
    'loss_preservation',
    'biased_loss_preservation',
    'gradient_norm_increase',
    'gradient_norm_preservation',
)
#: One method of each kind that the engine tells apart: what its events are given, how many there
#: are, whether weights return. Where a law is about the engine, the others are slow tests.
KINDS = ('random', 'snip', 'grasp', 'synflow', 'force', 'gate_taylor')


#: Methods that most laws test in slow cases, or with `-m more`. A method that is not in this list,
#: such as a new one, gets every law by default.
SETTLED = frozenset(
    {
        *POINTS,
        'random',
        'magnitude',
        'lamp',
        'snip',
        'iter_snip',
        'force',
        'grasp',
        'synflow',
        'taylor',
        'fisher',
        'gradient_norm',
        'ntk_sap',
        'prospr',
        'importance',
        'lookahead',
        'gate_taylor',
        'shapley',
        'leave_one_out',
        'apoz',
        'sensitivity',
        'taylor_output',
        'group_score',
        'fpgm',
        'bn_scale',
        'lean',
        'operator_norm',
        'sipp',
        'pfp',
        'tpp',
        'hspg',
        'dhspg',
        'hesso',
        'proximal',
        'group_norm',
        'slimming',
    }
)


def more_but(few: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """All cases; those that are not among `few` are further instances of their law.

    Raises:
      ValueError: one of `few` is no case: the default run would lose it.

    Example:
      >>> [bool(getattr(case, 'marks', ())) for case in more_but(['a'], ['a', 'b'])]
      [False, True]
    """
    cases = list(cases)
    plain = [case for case in cases if not hasattr(case, 'marks')]
    if lost := [case for case in few if case not in plain]:
        raise ValueError(f'no such case: {lost}')
    return [case if hasattr(case, 'marks') or case in few else _further(case) for case in cases]


def _further(case: Any) -> Any:
    return more(*(case if isinstance(case, tuple) else (case,)))


def more(*values: Any) -> Any:
    """A further instance of a law that the default run tests once."""
    return pytest.param(*values, marks=MORE)


def more_unless(fast: bool, *values: Any) -> Any:
    """A case whose last value is a method: by default if it is fast, or the method is new."""
    return pytest.param(*values, marks=[] if fast or values[-1] not in SETTLED else [MORE])
