"""Whether a sweep is worth trying the ways to train it first, and the trials."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxprune.sweep.costs import matmul_speed
from jaxprune.sweep.groups import Group
from jaxprune.sweep.probe import Measured, possible, probe, remember, remembered
from jaxprune.sweep.spec import SweepSpec

#: Seconds that a sweep must take, by a low estimate, for the ways to train to be tried first.
_WORTH_PROBING = 60.0


def measure(
    spec: SweepSpec,
    groups: Sequence[Group],
    plan_table: Mapping[str, Any],
    on_trial: Callable[[Measured], None],
    always: bool = False,
) -> dict[str, list[Measured]]:
    """Tries the ways to train each program where that is worth it, and remembers what was found.

    What was measured before is not measured again, what was left out then for a shorter sweep is.

    Args:
      groups: of the sweep.
      plan_table: from `make_plan`.
      on_trial: called after each trial.
      always: all ways, also for short sweeps and if they were measured before.

    Returns:
      Program -> what was found, the fastest first.
    """
    programs = plan_table['programs']
    if not always:
        programs = [] if spec.engine.probe == 'never' else _worth_probing(programs)
    run_steps = {p['id']: p['runs'] * p['steps'] for p in programs}
    found = {}
    for group in groups:
        run = group.runs[0]
        if group.id not in run_steps:
            continue
        known = remembered(spec, run)
        open_ones = possible(spec, group.program.convolves)
        if not always:
            done = {m.strategy for m in known}
            open_ones = [s for s in open_ones if s not in done] if len(open_ones) > 1 else []

        def after(measured: Measured, run=run) -> None:
            remember(spec, run, [measured])  # at once: an interruption loses none
            on_trial(measured)

        limit = math.inf if always else run_steps[group.id]
        trials = probe(spec, run, open_ones, run_steps=limit, known=known, on_trial=after)
        if trials:
            found[group.id] = trials
    return found


def _worth_probing(programs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Programs that would train long, were all as fast as a matrix product."""
    flops = {p['id']: p['runs'] * p['steps'] * p['flops_per_step'] for p in programs}
    # Any machine is faster than a gigaflop per second.
    if not any(flops[p['id']] > _WORTH_PROBING * 1e9 for p in programs):
        return []
    speed = matmul_speed()
    return [p for p in programs if flops[p['id']] / speed > _WORTH_PROBING]
