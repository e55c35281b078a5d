"""From a specification to its runs: one row per method x compression x seed x setting."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxprune import method
from jaxprune.allocation import SHARED
from jaxprune.sweep.check_spec import variants
from jaxprune.sweep.initial_params import same_content
from jaxprune.sweep.parse import plain
from jaxprune.sweep.spec import FORMAT, WHEN, MethodSpec, SweepSpec, TrainSpec

#: The control that every method shares at compression 1.
DENSE = MethodSpec(name='dense', allocation='none', label='dense')


class Run(NamedTuple):
    """One run: its identity, from which all its random numbers follow.

    Attributes:
      run_id: hash of all that its result depends on; equal in every sweep that contains it.
      method: how it is pruned; `DENSE` for not at all.
      compression: target, 1 / density; or effective, see `MethodSpec.target`.
      seed: root of its keys.
      train: its own training settings.
    """

    run_id: str
    method: MethodSpec
    compression: float
    seed: int
    train: TrainSpec


def runs(spec: SweepSpec) -> list[Run]:
    """All runs, in the order method, compression, seed within each training setting.

    Compression 1 gives one dense run per seed and setting, whatever the methods.
    """
    rows = []
    network = {
        'format': FORMAT,
        'model': plain(same_content(spec.model)),
        'data': plain(spec.data),
        'prune': plain(spec.prune),
    }
    for train in variants(spec.train, spec.grid.train):
        dense = [(DENSE, 1.0)] if 1 in spec.grid.compression else []
        pruned = [(m, c) for m in spec.grid.method for c in spec.grid.compression if c > 1]
        for entry, compression in dense + pruned:
            shared = {
                **network,
                'train': plain(train),
                'method': plain(dataclasses.replace(entry, label='')),  # a name changes no number
                'compression': compression,
            }
            ids = _digests_by_seed(shared, spec.grid.seed)
            rows += [
                Run(run_id, entry, compression, seed, train)
                for run_id, seed in zip(ids, spec.grid.seed, strict=True)
            ]
    return rows


def one_of_each_method(members: Sequence[Run]) -> list[Run]:
    """The first run of every entry of the grid's methods and training settings, in order.

    What follows from these alone is the same for all other runs, of which there may be many.
    """
    firsts: dict[tuple[int, int], Run] = {}
    for run in members:
        firsts.setdefault((id(run.method), id(run.train)), run)
    return list(firsts.values())


def _digests_by_seed(shared: Mapping[str, Any], seeds: Sequence[int]) -> list[str]:
    """`digest({**shared, 'seed': seed})` for every seed; the rest is written down once."""
    mark = '\0'
    text = json.dumps({**shared, 'seed': mark}, sort_keys=True)
    before, after = text.split(f'"seed": {json.dumps(mark)}')
    begun = hashlib.sha256(before.encode())
    found = []
    for seed in seeds:
        whole = begun.copy()
        whole.update(f'"seed": {seed}{after}'.encode())
        found.append(whole.hexdigest()[:12])
    return found


def digest(value: Any) -> str:
    """Twelve hexadecimal digits of a value that JSON can write."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def program_settings(run: Run) -> dict[str, Any]:
    """What makes a training program of its own: how it steps, and what its method changes in that.

    Methods that prune before training only share a program with the dense control.
    """
    return {**train_settings(run.train), **_own_training(run.method)}


def representative(members: Sequence[Run]) -> Run:
    """The run of a group from whose settings its program is made: one that is pruned, if any is."""
    return next((run for run in members if run.method != DENSE), members[0])


def train_settings(train: TrainSpec) -> dict[str, Any]:
    """What of the training settings makes a program: shapes, loop lengths, structure; not numbers.

    Learning rates, weight decay and numeric arguments of the optimizer are traced, one value per
    run.
    """
    settings = plain(dataclasses.replace(train, options={}))
    for traced in ('learning_rate', 'weight_decay'):
        del settings[traced]
    numbers, flags = split_options(train)
    return {**settings, **flags, 'traced': sorted(numbers)}


def _own_training(spec: MethodSpec) -> dict[str, Any]:
    """What a method changes in training: when its rounds happen, phases, what it keeps or does."""
    if spec == DENSE or not (spec.start or spec.every or spec.end or spec.finetune.epochs):
        return {}
    usual = MethodSpec(name=spec.name)
    times = {key: getattr(spec, key) for key in WHEN if key not in ('restart', 'density_schedule')}
    phase = {key: v for key, v in plain(spec.finetune).items() if key != 'learning_rate'}
    return {
        **{key: v for key, v in times.items() if v != getattr(usual, key)},
        **{f'finetune.{k}': v for k, v in phase.items() if v != plain(usual.finetune)[k]},
        **({'method': event_program(spec)} if has_lasting_state(spec) else {}),
    }


def moves_masks(spec: MethodSpec) -> bool:
    """Does a method choose masks of weights anew, or pull at weights, while a network trains?"""
    if spec == DENSE:
        return False
    entry = method.method(spec.name)
    return entry.hooked and not entry.coupled


def has_lasting_state(spec: MethodSpec) -> bool:
    """Does a method carry a state of its own through training? Then its runs train apart.

    A step hook does, and so does what several rounds at different times remember.
    """
    if spec == DENSE:
        return False
    entry = method.method(spec.name)
    remembers = not entry.monotone or spec.target == 'effective' or entry.averages
    apart = spec.rounds > 1 and bool(spec.every or spec.end or spec.rewind)
    return apart and (remembers or entry.hooked)


def keeps_exactly(spec: MethodSpec) -> bool:
    """Does a method keep just as many weights, or groups, as its counts say?"""
    to_target = spec.options.get('cut', 'target') == 'target'
    return spec.target == 'direct' and spec.multiple == 1 and to_target


def split_options(train: TrainSpec) -> tuple[dict[str, float], dict[str, bool]]:
    """The optimizer's arguments: numbers, which are traced, and flags, which are static."""
    flags = {k: v for k, v in train.options.items() if isinstance(v, bool)}
    numbers = {k: v for k, v in train.options.items() if k not in flags}
    return numbers, flags


def method_options(spec: MethodSpec) -> tuple[dict[str, float], dict[str, Any]]:
    """A method's own options: numbers, which are traced, and all others, which are static."""
    numbers = {k: v for k, v in spec.options.items() if isinstance(v, float)}
    return numbers, {k: v for k, v in spec.options.items() if k not in numbers}


#: Keys of a method that shape no event: names, and when events happen.
_NO_PART_OF_EVENTS = frozenset({'label', *WHEN, 'finetune'} - {'restart'})


def event_program(spec: MethodSpec) -> str:
    """A name for a method's compiled events: everything about it that does not come with the run.

    Left out are names, times, counts (layerwise allocations are nothing else) and traced numbers.
    """
    settings = plain(dataclasses.replace(spec, options=method_options(spec)[1]))
    entry = method.method(spec.name)
    batch_norm = entry.batch_norm if 'data' in entry.needs else ''
    published = {**entry.options, 'batch_norm': batch_norm, 'allocation': entry.allocation}
    defaults = {**plain(MethodSpec(name=spec.name)), **published}
    if spec.target == 'direct' and spec.allocation not in SHARED:
        settings['allocation'] = 'layerwise'
    return ', '.join(
        [spec.name]
        + [
            f'{key} {value}'
            for key, value in sorted(settings.items())
            if key not in _NO_PART_OF_EVENTS and value != defaults.get(key)
        ]
    )
