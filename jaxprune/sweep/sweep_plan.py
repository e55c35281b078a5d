"""What a sweep will do, before it does it: runs -> programs -> chunks, memory and time."""

import math
from collections.abc import Sequence
from typing import Any

import jax

from jaxprune.sweep.abstract import check_group
from jaxprune.sweep.costs import costs
from jaxprune.sweep.devices import memory_limit
from jaxprune.sweep.grid import DENSE, digest, event_program
from jaxprune.sweep.groups import Group, groups_of
from jaxprune.sweep.load import spec_hash
from jaxprune.sweep.spec import FORMAT, SweepSpec
from jaxprune.sweep.strategy import most_runs

#: The part of a device's memory that the runs of a chunk may take by estimate; the compiler's own
#: account is looked at before the first step.
_ESTIMATE_SHARE = 0.5


def make_plan(
    spec: SweepSpec, source: str = 'spec', groups: Sequence[Group] | None = None
) -> dict[str, Any]:
    """The whole plan as a JSON-ready table; the contents of plan.json.

    Nothing is trained and no training program is compiled.

    Args:
      source: what error messages call the specification.
      groups: from `checked_groups`, if they were made before.

    Raises:
      SpecError: a run that cannot be, such as one that keeps no weight.
    """
    table: dict[str, Any] = {
        'format': FORMAT,
        'name': spec.name,
        'spec': spec_hash(spec),
        'machine': {'platform': jax.default_backend(), 'devices': jax.local_device_count()},
        'programs': [],
        'chunks': [],
        'runs': [],
    }
    groups = checked_groups(spec, source) if groups is None else groups
    settings = [group.settings for group in groups]
    differing = {k for s in settings for k in s if any(t.get(k) != s[k] for t in settings)}
    for group in groups:
        program = group.program
        cost = costs(spec, program, group.runs[-1])
        if group.measured and group.measured.bytes_per_run > 0:
            cost['bytes_per_run'] = round(group.measured.bytes_per_run)
        chunk_runs = _chunk_size(spec, group, cost['bytes_per_run'])
        table['chunks'] += cut(group.id, [run.run_id for run in group.runs], chunk_runs)
        methods = {event_program(r.method): None for r in group.runs if r.method != DENSE}
        table['programs'].append(
            {
                'id': group.id,
                'differs': {k: group.settings.get(k) for k in sorted(differing)},
                'strategy': group.strategy._asdict(),
                'chosen': group.chosen,
                'seconds_per_step': group.measured and group.measured.seconds,
                'runs': len(group.runs),
                'chunk': chunk_runs,
                'steps': program.timeline.steps,
                'events': list(methods),
                'parameters': cost['parameters'],
                'prunable': {path: math.prod(shape) for path, shape in program.shapes.items()},
                'bytes_per_run': cost['bytes_per_run'],
                'flops_per_step': cost['flops_per_step'],
            }
        )
        for run in group.runs:
            table['runs'].append(
                {
                    'run_id': run.run_id,
                    'label': run.method.label,
                    'method': run.method.name,
                    'allocation': run.method.allocation,
                    'target': run.method.target,
                    'compression': run.compression,
                    'seed': run.seed,
                    'learning_rate': run.train.learning_rate,
                    'weight_decay': run.train.weight_decay,
                }
            )
    return table


def checked_groups(spec: SweepSpec, source: str = 'spec') -> list[Group]:
    """The groups of a specification, checked on abstract values; each program is made once.

    Raises:
      SpecError: a run that cannot be, such as one that keeps no weight.
    """
    groups = groups_of(spec, source)
    for group in groups:
        check_group(spec, group, source)
    return groups


def cut(program: str, run_ids: Sequence[str], size: int) -> list[dict[str, Any]]:
    """Chunks of so many runs of one program; a chunk's name is a hash of what it holds."""
    pieces = [list(run_ids[first : first + size]) for first in range(0, len(run_ids), size)]
    # The strategy is no part of the name: it changes results by rounding only.
    return [
        {'id': digest([FORMAT, program, piece]), 'program': program, 'runs': piece}
        for piece in pieces
    ]


def _chunk_size(spec: SweepSpec, group: Group, bytes_per_run: int) -> int:
    """Runs per chunk: as many as are sensible and fit, shared out evenly."""
    places = group.strategy.devices // group.strategy.batch_devices
    most = spec.engine.chunk
    if not most:
        fits = int(_ESTIMATE_SHARE * memory_limit() / bytes_per_run) * places
        most = min(most_runs(group.strategy.batching, jax.default_backend()) * places, fits)
        most = max(most // places * places, places)  # more would be padding
    chunks = math.ceil(len(group.runs) / most)
    even = math.ceil(len(group.runs) / chunks)
    return min(math.ceil(even / places) * places, most) if most >= places else most
