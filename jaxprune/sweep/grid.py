"""From a specification to its runs: one row per method x compression x seed x setting."""

import dataclasses
import hashlib
import json
from typing import Any, NamedTuple

from jaxprune.allocation import SHARED
from jaxprune.sweep.check_spec import variants
from jaxprune.sweep.parse import plain
from jaxprune.sweep.spec import FORMAT, MethodSpec, SweepSpec, TrainSpec

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
    for train in variants(spec.train, spec.grid.train):
        dense = [(DENSE, 1.0)] if 1 in spec.grid.compression else []
        pruned = [(m, c) for m in spec.grid.method for c in spec.grid.compression if c > 1]
        for method, compression in dense + pruned:
            rows += [_run(spec, train, method, compression, seed) for seed in spec.grid.seed]
    return rows


def _run(
    spec: SweepSpec, train: TrainSpec, method: MethodSpec, compression: float, seed: int
) -> Run:
    identity = {
        'format': FORMAT,
        'model': plain(spec.model),
        'data': plain(spec.data),
        'prune': plain(spec.prune),
        'train': plain(train),
        'method': plain(dataclasses.replace(method, label='')),  # a name changes no number
        'compression': compression,
        'seed': seed,
    }
    return Run(digest(identity), method, compression, seed, train)


def digest(value: Any) -> str:
    """Twelve hexadecimal digits of a value that JSON can write."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def static_settings(train: TrainSpec) -> dict[str, Any]:
    """What makes a program of its own: shapes, loop lengths and structure, not numbers.

    Learning rate, weight decay and numeric optimizer arguments are traced, one value per run.
    """
    settings = plain(dataclasses.replace(train, options={}))
    for traced in ('learning_rate', 'weight_decay'):
        del settings[traced]
    numbers, flags = split_options(train)
    return {**settings, **flags, 'traced': sorted(numbers)}


def split_options(train: TrainSpec) -> tuple[dict[str, float], dict[str, bool]]:
    """The optimizer's arguments: numbers, which are traced, and flags, which are static."""
    flags = {k: v for k, v in train.options.items() if isinstance(v, bool)}
    numbers = {k: v for k, v in train.options.items() if k not in flags}
    return numbers, flags


def event_program(method: MethodSpec) -> str:
    """What tells compiled event programs apart; counts and labels do not."""
    kind = method.allocation if method.allocation in SHARED else 'layerwise'
    parts = [method.name, kind]
    if method.target == 'effective':  # the allocation's table is part of the program
        parts = [method.name, method.allocation, 'to effective']
    if method.granularity == 'unit':
        parts.append(f'units but {method.keep_all_units}' if method.keep_all_units else 'units')
    if method.floor:
        parts.append(f'floor {method.floor}')
    if method.cap < 1:
        parts.append(f'cap {method.cap:g}')
    if method.floor_share:
        parts.append(f'floor share {method.floor_share:g}')
    if method.after_epochs:  # a round at a time
        parts.append('restarted' if method.restart else 'along training')
    elif method.rounds > 1:
        parts.append(f'{method.rounds} rounds')
    if method.batch_norm:
        parts.append(f'batch norm {method.batch_norm}')
    return ', '.join(parts + [f'{k} {v}' for k, v in sorted(method.options.items())])
