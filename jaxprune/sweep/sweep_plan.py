"""What a sweep will do, before it does it: runs -> programs -> chunks, memory and time."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import data, plan, structure
from jaxprune.allocation import SHARED
from jaxprune.errors import JaxpruneError, SpecError, first_line
from jaxprune.sweep.devices import memory_limit
from jaxprune.sweep.grid import Run, digest, event_program, runs, static_settings
from jaxprune.sweep.load import spec_hash
from jaxprune.sweep.parse import plain
from jaxprune.sweep.probe import Measured, possible, probe, remember, remembered
from jaxprune.sweep.program import (
    DeviceData,
    Program,
    competing,
    hyper_of,
    make_program,
    scores_need_data,
)
from jaxprune.sweep.spec import FORMAT, SweepSpec
from jaxprune.sweep.strategy import Strategy, forced, usual
from jaxprune.types import GLOBAL

#: Most runs of a chunk, by batching: 'map' by memory and patience, 'vmap' the more the better,
#: 'unroll' gains nothing from more than a few per device at a time.
_MOST = {'map': 32, 'vmap': 1024}
_MOST_UNROLLED = 2
#: The part of a device's memory that the runs of a chunk may take by estimate; the compiler's own
#: account is looked at before the first step.
_ESTIMATE_SHARE = 0.5
#: Seconds that a sweep must take, by a low estimate, for the ways to train to be tried first.
_WORTH_PROBING = 60.0


class Group(NamedTuple):
    """Runs that share one training program.

    Attributes:
      id: hash of what makes the program.
      settings: static training settings.
      strategy: how its runs are trained.
      chosen: why so: 'measured', 'usual' or 'forced'.
      measured: what was measured of the strategy on this machine, None if it never was.
      runs: its runs, sorted so that chunks hold few methods.
    """

    id: str
    settings: dict[str, Any]
    strategy: Strategy
    chosen: str
    measured: Measured | None
    runs: list[Run]


def groups(spec: SweepSpec, source: str = 'spec') -> list[Group]:
    """The runs of a specification by training program, in order of first appearance."""
    by_key: dict[str, list[Run]] = {}
    network = [plain(spec.model), plain(spec.data)]
    for run in runs(spec):
        by_key.setdefault(digest([*network, static_settings(run.train)]), []).append(run)
    made = []
    for key, members in by_key.items():
        with _library_errors(source):
            program = make_program(spec, members[0].train)
            choice = _choice(spec, program, members[0])
        made.append(Group(key, static_settings(members[0].train), *choice, members))
    return made


def _choice(spec: SweepSpec, program: Program, run: Run) -> tuple[Strategy, str, Measured | None]:
    """The fastest strategy measured here that [engine] allows, or else the usual one."""
    devices = jax.local_device_count()
    known = remembered(spec, run)
    allowed = [m for m in known if forced(m.strategy, spec.engine, devices) == m.strategy]
    if allowed and not allowed[0].error:
        return allowed[0].strategy, 'measured', allowed[0]
    best = usual(program.convolves, jax.default_backend(), devices)
    taken = forced(best, spec.engine, devices)
    return taken, 'usual' if taken == best else 'forced', None


def counts_of(program: Program, run: Run) -> plan.Plan:
    """A pruned run's table of keep counts."""
    make = structure.rounds_before if run.method.target == 'effective' else plan.plan_rounds
    if run.method.granularity == 'unit':
        make = functools.partial(plan.plan_rounds, what='units')
    shapes, floor = competing(program.shapes, run.method)
    return make(
        shapes,
        1 / run.compression,
        allocation=run.method.allocation,
        rounds=run.method.rounds,
        density_schedule=run.method.density_schedule,
        floor=floor,
        cap=run.method.cap,
    )


def active_of(program: Program, run: Run) -> int:
    """How many active weights a run that targets effective compression must have at least."""
    return structure.active_wanted(program.size, run.compression)


def make_plan(spec: SweepSpec, source: str = 'spec') -> dict[str, Any]:
    """The whole plan as a JSON-ready table; the contents of plan.json.

    Nothing is trained and no training program is compiled.

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
    all_groups = groups(spec, source)
    settings = [group.settings for group in all_groups]
    differing = {k for s in settings for k in s if any(t.get(k) != s[k] for t in settings)}
    for group in all_groups:
        program = _abstractly(spec, group, source)
        _check_runs(spec, program, group, source)
        cost = costs(spec, program, group)
        if group.measured and group.measured.bytes_per_run > 0:
            cost['bytes_per_run'] = round(group.measured.bytes_per_run)
        chunk_runs = _chunk_size(spec, group, cost['bytes_per_run'])
        table['chunks'] += cut(group.id, [run.run_id for run in group.runs], chunk_runs)
        methods = {event_program(r.method): None for r in group.runs if r.method.name != 'dense'}
        table['programs'].append(
            {
                'id': group.id,
                'differs': {k: group.settings.get(k) for k in sorted(differing)},
                'strategy': group.strategy._asdict(),
                'chosen': group.chosen,
                'seconds_per_step': group.measured and group.measured.seconds,
                'runs': len(group.runs),
                'chunk': chunk_runs,
                'steps': program.steps * group.settings['epochs'],
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


def cut(program: str, run_ids: Sequence[str], size: int) -> list[dict[str, Any]]:
    """Chunks of so many runs of one program; a chunk's name is a hash of what it holds."""
    pieces = [list(run_ids[first : first + size]) for first in range(0, len(run_ids), size)]
    # The strategy is no part of the name: it changes results by rounding only.
    return [
        {'id': digest([FORMAT, program, piece]), 'program': program, 'runs': piece}
        for piece in pieces
    ]


def _abstractly(spec: SweepSpec, group: Group, source: str) -> Program:
    """The group's program, having checked on abstract values that its parts fit together."""
    run = group.runs[0]
    key, clock, hyper = jax.random.key(0), np.int32(0), hyper_of(run)
    with _library_errors(source):
        program = make_program(spec, run.train)
        if program.size >= 2**31:
            raise SpecError(f'model: {program.size} prunable weights are more than 2**31')
        state = jax.eval_shape(program.init, key, hyper)
        indices = jax.ShapeDtypeStruct((run.train.batch_size,), jnp.int32)
        on_device = abstract_data(spec)
        jax.eval_shape(program.step, clock, on_device, key, hyper, indices, state)
        if program.flow is not None:
            jax.eval_shape(program.flow, on_device, key, state)
        pruned_runs = [r for r in group.runs if r.method.name != 'dense']
        for pruned in {event_program(r.method): r for r in pruned_runs}.values():
            whole = pruned.method.allocation in SHARED
            counted, _ = competing(program.shapes, pruned.method)
            counts = dict.fromkeys([GLOBAL] if whole else counted, np.int32(1))
            begin, prune, last = program.prune(pruned.method)
            begun = jax.eval_shape(begin, key, state)
            done, _ = jax.eval_shape(prune, clock, on_device, key, hyper, counts, begun)
            if last is not None:
                jax.eval_shape(last, hyper, done, clock)
    return program


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


@contextlib.contextmanager
def _library_errors(source: str) -> Iterator[None]:
    """Whatever a model or an optimizer refuses, as a SpecError."""
    try:
        yield
    except JaxpruneError as error:
        raise SpecError(f'{source}: {error}') from None
    except Exception as error:
        # An argument that optax or flax refuses; its own message says which.
        raise SpecError(
            f'{source}: model or train: refused by the library: {first_line(error)}'
        ) from error


def _check_runs(spec: SweepSpec, program: Program, group: Group, source: str) -> None:
    """Raises SpecError where a run would keep no weight or its scores have too little data."""
    for run in group.runs:
        if run.method.name == 'dense':
            continue
        try:
            counts_of(program, run)
        except JaxpruneError as error:
            raise SpecError(
                f'{source}: grid.compression: {run.compression:g} with {run.method.label}: {error}'
            ) from None
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


def costs(spec: SweepSpec, program: Program, group: Group) -> dict[str, Any]:
    """Parameters, bytes and floating-point operations of one run, from abstract values.

    Bytes: the state, one gradient, and every intermediate of one forward pass held for the
    backward pass; an estimate, as the compiler fuses and reuses.
    """
    run = group.runs[0]
    facts = data.facts(spec.data.name)
    key = jax.random.key(0)
    state = jax.eval_shape(program.init, key, hyper_of(run))
    batch = run.train.batch_size
    x = jax.ShapeDtypeStruct((batch, *facts.shape), jnp.float32)
    y = jax.ShapeDtypeStruct((batch,), jnp.int32)

    def loss(params, model_state, x, y):
        logits, _ = program.problem.apply(params, model_state, x, train=True, key=key)
        return program.problem.loss(logits, y).mean()

    forward = jax.make_jaxpr(loss)(state.params, state.model_state, x, y)
    activations = sum(
        math.prod(var.aval.shape) * var.aval.dtype.itemsize
        for equation in forward.eqns
        for var in equation.outvars
    )
    lowered = jax.jit(jax.grad(loss)).lower(state.params, state.model_state, x, y)
    analysis = lowered.cost_analysis() or {}
    return {
        'parameters': sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)),
        'bytes_per_run': _bytes(state) + _bytes(state.params) + int(activations),
        'flops_per_step': float(analysis.get('flops', math.nan)),
    }


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def data_bytes(spec: SweepSpec) -> int:
    """Bytes of the data set on the device, uint8 pixels and int32 labels."""
    facts = data.facts(spec.data.name)
    examples = (spec.data.train_examples or facts.train_size) + (
        spec.data.test_examples or facts.test_size
    )
    return examples * (math.prod(facts.shape) + 4)


def _chunk_size(spec: SweepSpec, group: Group, bytes_per_run: int) -> int:
    """Runs per chunk: as many as are sensible and fit, shared out evenly."""
    places = group.strategy.devices // group.strategy.batch_devices
    most = spec.engine.chunk
    if not most:
        fits = int(_ESTIMATE_SHARE * memory_limit() / bytes_per_run) * places
        most = min(_MOST.get(group.strategy.batching, _MOST_UNROLLED * places), fits)
        most = max(most // places * places, places)  # more would be padding
    chunks = math.ceil(len(group.runs) / most)
    even = math.ceil(len(group.runs) / chunks)
    return min(math.ceil(even / places) * places, most) if most >= places else most


def estimate(plan_table: dict[str, Any], spec: SweepSpec) -> dict[str, float]:
    """Peak memory of a chunk in bytes and training time in seconds, both rough.

    Time is that of measured steps; where nothing was measured, the arithmetic of all steps at the
    speed of one short matrix product on this machine. Convolutions and small layers reach less.
    """
    speed = matmul_speed()
    seconds, peak = 0.0, 0
    for program in plan_table['programs']:
        step = program['seconds_per_step'] or program['flops_per_step'] / speed
        seconds += program['runs'] * program['steps'] * step
        peak = max(peak, program['chunk'] * program['bytes_per_run'])
    return {'seconds': seconds, 'bytes': peak + data_bytes(spec), 'flops_per_second': speed}


def measure(
    spec: SweepSpec,
    plan_table: Mapping[str, Any],
    told: Callable[[Measured], None],
    always: bool = False,
) -> dict[str, list[Measured]]:
    """Tries the ways to train each program where that is worth it, and remembers what was found.

    What was measured before is not measured again, what was left out then for a shorter sweep is.

    Args:
      plan_table: from `make_plan`.
      told: called after each trial.
      always: all ways, also for short sweeps and if they were measured before.

    Returns:
      Program -> what was found, the fastest first.
    """
    programs = plan_table['programs']
    if not always:
        programs = [] if spec.engine.probe == 'never' else _worth_probing(programs)
    run_steps = {p['id']: p['runs'] * p['steps'] for p in programs}
    found = {}
    for group in groups(spec) if run_steps else ():
        run = group.runs[0]
        if group.id not in run_steps:
            continue
        known = remembered(spec, run)
        open_ones = possible(spec, run)
        if not always:
            done = {m.strategy for m in known}
            open_ones = [s for s in open_ones if s not in done] if len(open_ones) > 1 else []

        def heard(measured: Measured, run=run) -> None:
            remember(spec, run, [measured])  # at once: an interruption loses none
            told(measured)

        limit = math.inf if always else run_steps[group.id]
        trials = probe(spec, run, open_ones, run_steps=limit, known=known, told=heard)
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


def matmul_speed(seconds: float = 0.3) -> float:
    """Floating-point operations per second of float32 matrix products, measured briefly."""
    side = 512
    a = jnp.asarray(np.random.default_rng(0).normal(size=(side, side)), jnp.float32)
    product = jax.jit(lambda a: a @ a / side)
    product(a).block_until_ready()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        product(a).block_until_ready()
        count += 1
    return count * 2 * side**3 / (time.perf_counter() - start)
