"""How many weights a run keeps after each of its rounds."""

import functools

from jaxprune import plan, structure
from jaxprune.method import counted_as, limits, plan_shares
from jaxprune.sweep.grid import Run
from jaxprune.sweep.program import Program
from jaxprune.sweep.timeline import round_steps


def counts_of(program: Program, run: Run) -> plan.Plan:
    """A pruned run's events: the step before which each happens, and what it keeps.

    Raises:
      PruneError: the run would keep nothing, or cannot keep to its bounds.
    """
    spec = run.method
    groups = program.competing(spec)
    make = functools.partial(plan.plan_rounds, what=counted_as(spec.granularity))
    if spec.target == 'effective':
        make = structure.rounds_before
    floor, cap = limits(groups, spec.floor, spec.floor_share, spec.cap)
    if spec.target in structure.SHARES:
        return plan_shares(
            groups,
            1 / run.compression,
            spec.target,
            rounds=spec.rounds,
            density_schedule=spec.density_schedule,
            steps=round_steps(spec, program.steps),
        )
    return make(
        groups.shapes,
        1 / run.compression,
        allocation=spec.allocation,
        rounds=spec.rounds,
        density_schedule=spec.density_schedule,
        steps=round_steps(spec, program.steps),
        floor=floor,
        cap=cap,
    )


def active_of(program: Program, run: Run) -> int:
    """How many active weights a run that targets effective compression must have at least."""
    return structure.active_wanted(program.size, run.compression)
