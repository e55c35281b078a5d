"""How many weights a run keeps after each of its rounds."""

from jaxprune import plan, structure
from jaxprune.method import cost_of, limits, plan_groups
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
    floor, cap = limits(groups, spec.floor, spec.floor_share, spec.cap)
    shared = {
        'allocation': spec.allocation,
        'rounds': spec.rounds,
        'density_schedule': spec.density_schedule,
        'steps': round_steps(spec, program.steps),
        'floor': floor,
        'cap': cap,
    }
    density = 1 / run.compression
    if spec.target == 'effective':
        return structure.rounds_before(groups.shapes, density, **shared)
    cost = cost_of(spec.target)
    return plan_groups(groups, density, cost=cost, multiple=spec.multiple, **shared)


def kind_of_counts(run: Run) -> tuple[int, float]:
    """Runs of one kind keep the same counts: they differ in their seed at most."""
    return id(run.method), run.compression


def active_of(program: Program, run: Run) -> int:
    """How many active weights a run that targets effective compression must have at least."""
    return structure.active_wanted(program.size, run.compression)
