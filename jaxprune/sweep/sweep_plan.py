"""What a sweep will do, before it does it: runs -> programs -> chunks. Nothing of a machine."""

import math
from collections.abc import Sequence
from typing import Any

from jaxprune.sweep.abstract import check_group
from jaxprune.sweep.costs import costs
from jaxprune.sweep.grid import DENSE, digest, event_program, one_of_each_method
from jaxprune.sweep.groups import Group, groups_of
from jaxprune.sweep.load import spec_hash
from jaxprune.sweep.spec import FORMAT, SweepSpec

#: Operations of training in a chunk, and the fewest and most runs. Two CPU cores take a minute; a
#: chunk is what other machines are given and what is stored together, not what is trained at once.
_WORK, _FEWEST, _MOST = 1e13, 8, 512


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
        flops = cost['flops_per_step'] * program.timeline.steps
        chunk_runs = _chunk_size(spec.engine.chunk, len(group.runs), flops)
        table['chunks'] += cut(group.id, [run.run_id for run in group.runs], chunk_runs)
        firsts = one_of_each_method(group.runs)
        methods = {event_program(r.method): None for r in firsts if r.method != DENSE}
        table['programs'].append(
            {
                'id': group.id,
                'differs': {k: group.settings.get(k) for k in sorted(differing)},
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
    return [
        {'id': digest([FORMAT, program, piece]), 'program': program, 'runs': piece}
        for piece in pieces
    ]


def _chunk_size(asked: int, runs: int, flops_per_run: float) -> int:
    """Runs per chunk: as many as asked for, or a minute's work, shared out evenly."""
    if asked:
        return asked
    most = _MOST if not flops_per_run > 0 else _WORK / flops_per_run  # nobody knows what it costs
    most = int(min(max(most, _FEWEST), _MOST))
    return math.ceil(runs / math.ceil(runs / most))
