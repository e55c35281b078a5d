"""How many weights a run keeps after each of its rounds."""

import functools

from jaxprune import plan, structure
from jaxprune.sweep.grid import Run
from jaxprune.sweep.program import Program, competing
from jaxprune.sweep.timeline import round_steps


def counts_of(program: Program, run: Run) -> plan.Plan:
    """A pruned run's events: the step before which each happens, and what it keeps.

    Raises:
      PruneError: the run would keep nothing, or cannot keep to its bounds.
    """
    spec = run.method
    make = structure.rounds_before if spec.target == 'effective' else plan.plan_rounds
    if spec.granularity == 'unit':
        make = functools.partial(plan.plan_rounds, what='units')
    shapes, floor = competing(program.shapes, spec)
    return make(
        shapes,
        1 / run.compression,
        allocation=spec.allocation,
        rounds=spec.rounds,
        density_schedule=spec.density_schedule,
        steps=round_steps(spec, program.steps),
        floor=floor,
        cap=spec.cap,
    )


def active_of(program: Program, run: Run) -> int:
    """How many active weights a run that targets effective compression must have at least."""
    return structure.active_wanted(program.size, run.compression)
