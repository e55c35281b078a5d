"""Checks on abstract values that the parts of a sweep fit together; nothing is computed."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import data, method
from jaxprune.allocation import SHARED
from jaxprune.errors import JaxpruneError, PruneError, SpecError
from jaxprune.sweep.counts import active_of, counts_of, kind_of_counts
from jaxprune.sweep.device_data import DeviceData, scores_need_data
from jaxprune.sweep.grid import DENSE, event_program, one_of_each_method
from jaxprune.sweep.groups import Group, library_errors
from jaxprune.sweep.program import Program, method_numbers
from jaxprune.sweep.spec import MethodSpec, SweepSpec
from jaxprune.sweep.timeline import clocks_of
from jaxprune.types import RunState


def check_group(spec: SweepSpec, group: Group, source: str) -> None:
    """Raises SpecError where a step, an event, a measure or a run of a group cannot be."""
    program, run = group.program, group.runs[0]
    key, clock, hyper = jax.random.key(0), np.int32(0), program.hyper
    with library_errors(source):
        if program.size >= 2**31:
            raise SpecError(f'model: {program.size} prunable weights are more than 2**31')
        state = jax.eval_shape(program.init, key, hyper)
        indices = jax.ShapeDtypeStruct((run.train.batch_size,), jnp.int32)
        on_device = abstract_data(spec)
        plain = program.stages[False]
        jax.eval_shape(plain.step, clock, on_device, key, hyper, indices, state)
        if plain.flow is not None:
            jax.eval_shape(plain.flow, clock, on_device, key, hyper, state)
        pruned = [r for r in one_of_each_method(group.runs) if r.method != DENSE]
        for each in {repr(r.method): r.method for r in pruned}.values():
            _check_competing(program, each, source)
    _check_counts(group, source)
    with library_errors(source):
        for each in {event_program(r.method): r for r in pruned}.values():
            _check_event(program, each, on_device, state)
        for each in {repr(r.method): r.method for r in pruned}.values():
            _check_numbers(program, each)
    _check_runs(spec, group, source)


def _check_competing(program: Program, spec: MethodSpec, source: str) -> None:
    """Raises SpecError where nothing could be pruned."""
    try:
        program.competing(spec)
    except JaxpruneError as error:
        key, colon, _ = str(error).partition(': ')
        own = bool(colon) and key in ('granularity', 'keep_all_units')
        where = '' if own else 'granularity: '
        raise SpecError(f'{source}: grid.method ({spec.label}): {where}{error}') from None


def _check_event(program: Program, run, on_device: DeviceData, state: RunState) -> None:
    """The rounds of a method, and the steps between them if it changes those."""
    counts = {name: column[0] for name, column in counts_of(program, run).counts.items()}
    hyper = program.hyper._replace(method=method_numbers(run))
    indices = jax.ShapeDtypeStruct((run.train.batch_size,), jnp.int32)

    def once(clock, data, key, hyper, counts, state):
        rounds = program.events(run.method)(
            clock, data, key, hyper, program.order(key, clock // program.steps)
        )
        state, info = rounds.once(clock, counts, rounds.begin(state))
        if True in program.stages:
            own = program.stages[True]
            state, _ = own.step(clock, data, key, hyper, indices_, state)
            if own.flow is not None:
                own.flow(clock, data, key, hyper, state)
        return rounds.finish(state, clock) if rounds.finish else (state, info)

    indices_ = jnp.zeros(indices.shape, indices.dtype)
    try:
        jax.eval_shape(once, np.int32(0), on_device, jax.random.key(0), hyper, counts, state)
    except PruneError as error:
        raise SpecError(f'grid.method ({run.method.label}): {error}') from None


def _check_numbers(program: Program, spec) -> None:
    """Checks the values of options that programs trace."""
    entry = method.method(spec.name)
    if entry.make is not None:
        clocks = clocks_of(program.timeline)
        cost, shared = method.cost_of(spec.target), spec.allocation in SHARED
        groups = program.competing(spec)
        asked = method.Asked(groups, None, clocks, spec.multiple, cost, shared)
        entry.make(asked, **spec.options)
    else:
        own = {k: v for k, v in spec.options.items() if not (entry.averages and k == 'momentum')}
        by = {'by': program.competing(spec)} if entry.coupled else {}
        entry.score(program.problem, spec.batch_norm == 'train', **own, **by)


def abstract_data(spec: SweepSpec) -> DeviceData:
    """Shapes of the data on the device."""
    facts = data.facts(spec.data.name)

    def split(examples):
        return data.DeviceSplit(
            jax.ShapeDtypeStruct((examples, *facts.shape), jnp.uint8),
            jax.ShapeDtypeStruct((examples,), jnp.int32),
        )

    looked_at = spec.prune.samples_per_class * spec.prune.batches
    wanted = looked_at if scores_need_data(spec) else 0
    return DeviceData(
        split(spec.data.train_examples or facts.train_size),
        split(spec.data.test_examples or facts.test_size),
        jax.ShapeDtypeStruct((facts.classes, wanted), jnp.int32),
    )


def _check_counts(group: Group, source: str) -> None:
    """Raises SpecError where a run would keep nothing, or more or less than there can be."""
    different = {kind_of_counts(run): run for run in group.runs}
    for run in different.values():
        if run.method == DENSE:
            continue
        try:
            counts_of(group.program, run)
        except JaxpruneError as error:
            raise SpecError(
                f'{source}: grid.compression: {run.compression:g} with {run.method.label}: {error}'
            ) from None


def _check_runs(spec: SweepSpec, group: Group, source: str) -> None:
    """Raises SpecError where a run has too few active weights, or its scores too little data."""
    program = group.program
    most = _most_active(program, group)
    for run in group.runs:
        if run.method.target == 'effective' and active_of(program, run) > most:
            raise SpecError(
                f'{source}: grid.compression: {run.compression:g} with {run.method.label}: even '
                f'with all weights kept the effective compression is '
                f'{program.size / max(most, 1):.4g}'
            )
    if not scores_need_data(spec):
        return
    facts = data.facts(spec.data.name)
    examples = spec.data.train_examples or facts.train_size
    wanted = spec.prune.samples_per_class * spec.prune.batches
    if wanted * facts.classes > examples:
        raise SpecError(
            f'{source}: prune.samples_per_class: {wanted} of each of {facts.classes} classes are'
            f' more than the {examples} training examples'
        )


def _most_active(program: Program, group: Group) -> int:
    """How many weights are active when all are kept, if a run of the group asks for active ones."""
    if all(run.method.target == 'direct' for run in group.runs):
        return 0
    masks = {path: jnp.ones(shape, bool) for path, shape in program.shapes.items()}
    return sum(int(mask.sum()) for mask in jax.jit(program.connect)(masks).values())
