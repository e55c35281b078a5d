"""Which options of a method go together. Callers put the path of the key in front."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxprune.allocation import ALLOCATIONS
from jaxprune.errors import PruneError, nearest, quoted
from jaxprune.flow.orthogonal import GAINS
from jaxprune.method.granularity import COUPLED, GROUP_ALLOCATIONS, check_granularity, plural
from jaxprune.method.methods import Method
from jaxprune.method.repair import REPAIRS
from jaxprune.schedule import RISING
from jaxprune.structure import COSTS, TARGETS

#: What scores that need data may use.
SCORED_ON = ('balanced', 'train_batch')
BATCH_NORMS = ('train', 'eval')


class Choices(NamedTuple):
    """What a caller asks of a method; see `MethodSpec` for the keys.

    Attributes:
      apart: its rounds happen at different times of training; None where there is no training.
    """

    name: str
    allocation: str = 'global'
    target: str = 'direct'
    granularity: str = 'weight'
    keep_all_units: str = ''
    floor_share: float = 0.0
    cap: Any = 1.0
    batch_norm: str | None = None
    score_on: str = 'balanced'
    repair: str = ''
    repair_gain: str = 'linear'
    multiple: int = 1
    apart: bool | None = None
    density_schedule: str = ''


def usual_allocation(entry: Method, granularity: str, target: str = 'direct') -> str:
    """The published allocation, or the nearest one for what is pruned."""
    if target != 'direct' and entry.allocation != 'global':
        return 'global'
    if granularity != 'weight' and entry.allocation not in GROUP_ALLOCATIONS:
        return 'uniform'
    return entry.allocation


def check_choices(entry: Method, choices: Choices) -> None:
    """Raises PruneError, beginning with the key, for the first rule that a caller breaks."""
    for key, message in broken_rules(entry, choices):
        raise PruneError(f'{key}: {message}')


def broken_rules(entry: Method, choices: Choices) -> Iterator[tuple[str, str]]:
    """The rules that a caller breaks: key and message."""
    for key, valid in (
        ('allocation', ALLOCATIONS),
        ('target', TARGETS),
        ('score_on', SCORED_ON),
        ('repair', ('', *REPAIRS)),
        ('repair_gain', GAINS),
        ('batch_norm', (None, '', *BATCH_NORMS)),
    ):
        value = getattr(choices, key)
        if not isinstance(value, str | None) or value not in valid:
            yield key, f'unknown {key} {quoted(value)}: {nearest(value, filter(None, valid))}'
    try:
        check_granularity(choices.granularity)
    except PruneError as error:
        yield 'granularity', str(error)
    yield from _group_rules(entry, choices)
    reads_data = 'data' in entry.needs
    if choices.batch_norm and not reads_data and not (entry.needs and entry.batch_norm == 'train'):
        yield 'batch_norm', f"'{choices.name}' uses no data: there is no mode to choose"
    if choices.score_on == 'train_batch':
        if 'train_batch' in entry.needs:
            yield 'score_on', f"'{choices.name}' always uses the training batch: leave score_on out"
        elif not reads_data:
            yield 'score_on', f"'{choices.name}' uses no data"
        elif choices.apart is None:
            yield 'score_on', 'there is no training batch here: pass the examples to score on'
    if entry.hooked and choices.target == 'effective':
        yield 'target', f"'effective' does not go with '{choices.name}', which changes training"
    if choices.density_schedule in RISING and entry.monotone:
        never = f"'{choices.name}' never brings a weight back"
        yield 'density_schedule', f"'{choices.density_schedule}' goes up and down, and {never}"
    if not entry.scheduled and choices.density_schedule not in ('', 'constant'):
        yield 'density_schedule', f"'{choices.name}' prunes in one round only: leave it out"
    if entry.rewind and not choices.apart:
        trains = f"'{choices.name}' trains before each of its rounds"
        sweeps = 'it is for sweeps, see `jaxprune sweep`'
        yield 'name', f'{trains}: {sweeps if choices.apart is None else "start is missing"}'
    if entry.hooked and not choices.apart:
        acts = f"'{choices.name}' acts between its first round and its last, during training"
        if choices.apart is None:
            yield 'name', f'{acts}: see jp.{"train_once" if entry.coupled else "train_sparse"}'
        else:
            yield 'end', f'{acts}: say when the last one happens'


def _group_rules(entry: Method, choices: Choices) -> Iterator[tuple[str, str]]:
    """What goes with the granularity, and what does not."""
    granularity = choices.granularity
    without = f"does not go with granularity '{granularity}'"
    coupled = ', '.join(COUPLED)
    if granularity != 'weight':
        if choices.allocation not in GROUP_ALLOCATIONS:
            shared = f'{plural(granularity)} are shared out by {", ".join(GROUP_ALLOCATIONS)}'
            yield 'allocation', f"'{choices.allocation}' {without}: {shared}"
        if choices.target == 'effective':
            counted = f'a density of {plural(granularity)} is meant'
            yield 'target', f"'{choices.target}' {without}: {counted}"
    if not 0 <= choices.floor_share < 1:
        yield 'floor_share', f'expected a share below 1, not {choices.floor_share}'
    if choices.target in COSTS and choices.allocation != 'global':
        yield 'allocation', f"target '{choices.target}' goes by one ranking: expected global"
    if granularity not in COUPLED:
        if choices.target in COSTS:
            yield 'target', f"'{choices.target}' goes with granularity {coupled}"
        if choices.keep_all_units:
            yield 'keep_all_units', f'names layers that keep all units, with granularity {coupled}'
        if choices.multiple > 1:
            yield 'multiple', f'goes with granularity {coupled}: it counts the units of a layer'
        if choices.repair:
            needs = f'with granularity {coupled}: it needs whole rows and columns of kernels'
            yield 'repair', f"'{choices.repair}' goes {needs}"
        if entry.coupled:
            yield 'granularity', f"'{choices.name}' prunes coupled groups: expected {coupled}"
    try:
        re.compile(choices.keep_all_units)
    except re.error as error:
        pattern = choices.keep_all_units
        yield 'keep_all_units', f"'{pattern}' is no regular expression: {error}"
    if choices.allocation == 'lamp' and not entry.monotone:
        brings = f"'{choices.name}' brings weights back"
        yield 'allocation', f"'lamp' goes by the weights left, and {brings}"
