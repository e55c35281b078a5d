"""Parts of a sweep for tests that drive the engine themselves."""

import jax

from jaxprune import data
from jaxprune.sweep import make_plan, make_spec, store, timeline
from jaxprune.sweep.attempts import attempts_of
from jaxprune.sweep.chunk import rows_of
from jaxprune.sweep.device_data import device_data
from jaxprune.sweep.engine import make_engine
from jaxprune.sweep.event_calls import event_calls
from jaxprune.sweep.grid import DENSE
from jaxprune.sweep.program import make_program
from jaxprune.sweep.sweep_plan import checked_groups
from jaxprune.sweep.this_machine import machine_of


def group_of(table, label=None):
    """`(spec, group)`: the only group of a specification, or that of a method by its label."""
    spec = make_spec(table)
    groups = checked_groups(spec)
    if label is None:
        (group,) = groups
        return spec, group
    return spec, next(g for g in groups if any(r.method.label == label for r in g.runs))


def planned_here(spec):
    """How this machine would train each program of a specification."""
    groups = checked_groups(spec)
    return list(machine_of(groups, make_plan(spec, groups=groups)).values())


def trained_here(out):
    """What the last attempt at each chunk says of how it was trained."""
    return [attempts_of(out, chunk)[-1] for chunk in store.chunk_ids(out)]


def engine_of(spec, group, strategy, steps_per_call=0):
    """The engine of a group under a strategy, and its program."""
    run = next((r for r in group.runs if r.method != DENSE), group.runs[0])
    program = make_program(spec, run, strategy.convolution, strategy.batch_devices)
    on_device = device_data(spec, data.load(spec.data.name))
    return make_engine(strategy, program, on_device, jax.local_devices(), steps_per_call), program


def parts(table, strategy, steps_per_call=0):
    """Engine, program and rows of all runs of a specification with one group."""
    spec, group = group_of(table)
    engine, program = engine_of(spec, group, strategy, steps_per_call)
    return engine, program, rows_of(group.runs, len(group.runs), engine)[0]


def pruned(engine, program, rows, members):
    """States of runs of one method after all its rounds, before training: with info and counts."""
    states = engine.init(rows)
    if members[0].method == DENSE:
        return states, None, None
    event = timeline.Event(0, 0, 0, members[0].method.rounds, True, True, '')
    (call,) = event_calls(program, members)(event)
    states, info = engine.prune(rows, call, states)
    return states, info(), call.counts
