"""The driver: plan -> chunks -> store, resumable at any moment."""

import dataclasses
import datetime
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import polars as pl

from jaxprune import data
from jaxprune.errors import JaxpruneError, SpecError, StoreError, first_line
from jaxprune.sweep import store
from jaxprune.sweep.checkpoint import checkpoint
from jaxprune.sweep.chunk import rows_of, run_chunk
from jaxprune.sweep.device_data import device_data
from jaxprune.sweep.devices import memory_limit, out_of_memory
from jaxprune.sweep.engine import Engine, make_engine
from jaxprune.sweep.grid import Run, representative, runs
from jaxprune.sweep.groups import Group, chosen_anew
from jaxprune.sweep.load import identity, load_spec, make_spec, spec_hash, to_toml
from jaxprune.sweep.probe import trial_line
from jaxprune.sweep.program import Program, make_program
from jaxprune.sweep.progress import Progress, Shown, silent
from jaxprune.sweep.provenance import provenance
from jaxprune.sweep.spec import FORMAT, EngineSpec, SweepSpec
from jaxprune.sweep.strategy import Strategy
from jaxprune.sweep.sweep_plan import checked_groups, cut, make_plan
from jaxprune.sweep.timing import stopwatch
from jaxprune.sweep.trials import measure

#: Why a directory of an older format does not go on.
_OLDER = {
    2: 'it says when rounds happen with other keys',
    3: 'it records nothing at step 0',
    4: 'its methods have fewer keys, and its tables fewer columns',
}
#: The part of a device's memory that a training program may take, by the compiler's own account.
_COMPILED_SHARE = 0.85
#: Seconds that a call of a compiled training program should last: what progress waits for.
_CALL_SECONDS = 2.0


def default_out(spec: SweepSpec) -> Path:
    """`runs/<name>-<hash of the resolved specification>`."""
    return Path('runs') / f'{spec.name}-{spec_hash(spec)}'


def run_sweep(
    spec: SweepSpec | Mapping[str, Any] | str | Path,
    out: str | Path | None = None,
    *,
    data_dir: str | Path | None = None,
    progress: Progress | None = None,
    source: str = 'spec',
) -> pl.DataFrame:
    """Trains every run of a sweep that is not yet finished, and returns all results.

    Args:
      spec: a TOML file, a table with its keys, or a specification.
      out: directory of the results; by default named after the specification. If it holds an
        unfinished sweep of the same specification, that is continued.
      data_dir: where prepared TFDS data lie, see `jaxprune.data.load`.
      progress: what to show, see `jaxprune.sweep.progress`; None for nothing.
      source: what error messages call a specification that is no file.

    Returns:
      One row per run and evaluation, the columns of `store.RESULTS`.

    Raises:
      SpecError, DataError: before anything is written.
      StoreError: `out` holds another sweep or broken files, cannot be written, or another process
        is at work there.
      JaxpruneError: not even one run at a time fits into memory; finished chunks are kept.
    """
    if isinstance(spec, (str, Path)):
        source = str(spec)
        spec = load_spec(spec)
    elif not isinstance(spec, SweepSpec):
        spec = make_spec(spec, source)
    out = default_out(spec) if out is None else store.directory(out)
    groups = checked_groups(spec, source)
    plan_table = make_plan(spec, source, groups)
    dataset = data.load(spec.data.name, data_dir)
    try:
        on_device = device_data(spec, dataset)
    except SpecError as error:
        raise SpecError(f'{source}: {error}') from None
    store.make_directory(out)
    with store.locked(out):
        _open(spec, out, plan_table)
        with (progress or silent)(plan_table, out) as shown:
            groups = _measure_first(spec, groups, out, shown)
            _run_chunks(spec, groups, out, on_device, shown)
        return store.read_results(out)


def _open(spec: SweepSpec, out: Path, plan_table: dict[str, Any]) -> None:
    """Makes or re-opens the directory.

    The chunks in the directory win over new ones, as another machine might cut others, unless
    [engine] now asks for others. How they are trained is this machine's affair.
    """
    text = to_toml(spec)
    spec_file, plan_file = out / 'spec.toml', out / 'plan.json'
    if plan_file.exists() and (written := store.read_plan(out).get('format')) != FORMAT:
        raise StoreError(
            f'{out} holds a sweep of format {written}, and this version of jaxprune writes format '
            f'{FORMAT}: {_OLDER.get(written, _OLDER[2])}. Choose another --out'
        )
    if spec_file.exists() and identity(load_spec(spec_file)) != identity(spec):
        before, why = load_spec(spec_file).model, 'see its spec.toml'
        if before.params and before.params_sha256 != spec.model.params_sha256:
            why = 'the file of model.params holds other numbers'
        raise StoreError(f'{out} holds another sweep ({why}): choose another --out')
    store.remove_leftovers(out)
    if plan_file.exists():
        stored = store.read_plan(out)
        ids, now = ({p['id'] for p in table['programs']} for table in (stored, plan_table))
        if stored.get('spec') != plan_table['spec'] or ids != now:
            raise StoreError(
                f'{out} was written by another version of jaxprune: choose another --out'
            )
        before = load_spec(spec_file).engine if spec_file.exists() else None
        if before is None or _shape(before) != _shape(spec.engine):
            plan_table = recut(stored, plan_table, out)
        elif stored['machine'] != plan_table['machine']:
            by_id = {program['id']: program for program in plan_table['programs']}
            how = ('strategy', 'chosen', 'seconds_per_step')
            programs = [{**p, **{k: by_id[p['id']][k] for k in how}} for p in stored['programs']]
            plan_table = {**stored, 'programs': programs, 'machine': plan_table['machine']}
        else:
            plan_table = stored
    session = provenance(spec, datetime.datetime.now(datetime.UTC))
    record = out / 'provenance.json'
    sessions = store.read_json(record, {'sessions'})['sessions'] if record.exists() else []
    store.write_json(record, {**session, 'sessions': [*sessions, session['session']]})
    # The plan last: with it, the directory is one that `status` can read.
    store.write_bytes(spec_file, text.encode())
    store.write_json(plan_file, plan_table)


def _shape(engine: EngineSpec) -> EngineSpec:
    """What of [engine] a plan depends on."""
    return dataclasses.replace(engine, checkpoint_minutes=0.0, probe='never')


def recut(stored: dict[str, Any], plan_table: dict[str, Any], out: Path) -> dict[str, Any]:
    """The plan for other chunk sizes: finished chunks stay, the runs left are cut anew.

    What once ran out of memory in this directory is not made larger again.
    """
    tight = {p['id']: p for p in stored['programs'] if p.get('ran_out')}
    programs = [
        _no_larger(p, tight[p['id']]) if p['id'] in tight else p for p in plan_table['programs']
    ]
    plan_table = {**plan_table, 'programs': programs}
    chunks = [chunk for chunk in stored['chunks'] if store.finished(out, chunk['id'])]
    done = {run_id for chunk in chunks for run_id in chunk['runs']}
    for program in plan_table['programs']:
        left = [
            run_id
            for chunk in plan_table['chunks']
            if chunk['program'] == program['id']
            for run_id in chunk['runs']
            if run_id not in done
        ]
        chunks = [*chunks, *cut(program['id'], left, program['chunk'])]
    return {**plan_table, 'chunks': chunks}


def _no_larger(planned: dict[str, Any], tight: dict[str, Any]) -> dict[str, Any]:
    """A planned program within the memory that another plan of it was cut down to."""
    strategy, shared = Strategy(**planned['strategy']), tight['strategy']['batch_devices']
    if strategy.devices % shared == 0:
        strategy = strategy._replace(batch_devices=max(shared, strategy.batch_devices))
    chunk = min(planned['chunk'], tight['chunk'])
    return {**planned, 'chunk': chunk, 'strategy': strategy._asdict(), 'ran_out': True}


def _measure_first(
    spec: SweepSpec, groups: Sequence[Group], out: Path, shown: Shown
) -> Sequence[Group]:
    """Where the ways to train are worth trying, tries them and plans what is left anew."""
    stored = store.read_plan(out)
    begun = any(store.finished(out, chunk['id']) for chunk in stored['chunks'])
    if begun or (out / 'checkpoints').exists():  # whose chunks would be cut anew
        return groups
    if measure(spec, groups, stored, lambda measured: shown.note(trial_line(measured))):
        groups = chosen_anew(spec, groups)
        plan_table = recut(stored, make_plan(spec, groups=groups), out)
        for program in plan_table['programs']:
            shown.note(f'program {program["id"]}: {Strategy(**program["strategy"])}')
        store.write_json(out / 'plan.json', plan_table)
    return groups


def _run_chunks(
    spec: SweepSpec, groups: Sequence[Group], out: Path, on_device, shown: Shown
) -> None:
    by_id = {run.run_id: run for run in runs(spec)}
    by_program = {group.id: group for group in groups}
    plan_table = store.read_plan(out)
    current: tuple[str, Program, Engine] | None = None
    left = list(plan_table['chunks'])
    while left:
        chunk = left[0]
        members = [by_id[run_id] for run_id in chunk['runs']]
        if store.finished(out, chunk['id']):
            shown.skip(len(members))
            left.pop(0)
            continue
        planned = next(p for p in plan_table['programs'] if p['id'] == chunk['program'])
        counting, undo = _undoable(shown)
        compiling = 0.0
        try:
            if current is None or current[0] != chunk['program']:
                # One program at a time: its compiled functions are freed with it.
                current = None
                with stopwatch() as watch:
                    with watch.phase('compile'):
                        group = by_program[chunk['program']]
                        parts = _engine(spec, group, planned, members, on_device)
                    compiling = watch.seconds()['compile']
                current = chunk['program'], *parts
            saved = checkpoint(out / 'checkpoints' / chunk['id'], spec.engine.checkpoint_minutes)
            made = run_chunk(
                spec,
                *current[1:],
                members,
                planned['chunk'],
                shown=counting,
                saved=saved,
            )
            made.timing['compile'] += compiling
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            current = None
            undo()
            plan_table = _with_less_memory(plan_table, planned, first_line(error), out, shown)
            left = [c for c in plan_table['chunks'] if not store.finished(out, c['id'])]
            continue
        store.write_chunk(out, chunk['id'], made)
        saved.remove()
        shown.finish(len(members))
        left.pop(0)
    # Whatever is left belongs to chunks that were cut anew.
    shutil.rmtree(out / 'checkpoints', ignore_errors=True)


def _with_less_memory(
    plan_table: dict[str, Any], planned: dict[str, Any], reason: str, out: Path, shown: Shown
) -> dict[str, Any]:
    """The plan with fewer runs of a program at a time, stored."""
    smaller = _smaller(planned, reason)
    programs = [smaller if p is planned else p for p in plan_table['programs']]
    plan_table = recut(plan_table, {**plan_table, 'programs': programs}, out)
    store.write_json(out / 'plan.json', plan_table)
    shown.note(
        f'out of memory with {planned["chunk"]} runs at a time; going on with '
        f'{smaller["chunk"]} ({Strategy(**smaller["strategy"])})'
    )
    return plan_table


def _undoable(shown: Shown) -> tuple[Shown, Callable[[], None]]:
    """The same listener, and a function that takes back the steps that were counted."""
    counts: dict[str, list[int]] = {'steps': [], 'resume': []}

    def counting(name: str) -> Callable[[int], None]:
        def count(steps: int) -> None:
            counts[name].append(steps)
            getattr(shown, name)(steps)

        return count

    def undo() -> None:
        for name, steps in counts.items():
            getattr(shown, name)(-sum(steps))

    return shown._replace(**{name: counting(name) for name in counts}), undo


def _engine(
    spec: SweepSpec,
    group: Group,
    planned: Mapping[str, Any],
    members: Sequence[Run],
    on_device,
) -> tuple[Program, Engine]:
    """The functions and the engine of a planned program.

    Raises:
      MemoryError: by the compiler's own account, a chunk would not fit.
    """
    strategy = Strategy(**planned['strategy'])
    how = strategy.convolution, strategy.batch_devices
    run = representative(group.runs)
    program = group.program if how == ('native', 1) else make_program(spec, run, *how)
    places = strategy.devices // strategy.batch_devices
    at_once = places if strategy.batching == 'unroll' else planned['chunk']
    seconds = (planned['seconds_per_step'] or 0) * at_once
    steps_per_call = max(int(_CALL_SECONDS / seconds), 1) if seconds else 0
    engine = make_engine(strategy, program, on_device, jax.local_devices(), steps_per_call)
    rows, _ = rows_of(members, planned['chunk'], engine)
    needed, limit = engine.bytes_needed(rows), _COMPILED_SHARE * memory_limit()
    if needed > limit:
        raise MemoryError(f'{needed / 1e9:.3g} GB are needed where {limit / 1e9:.3g} GB are left')
    return program, engine


def _smaller(planned: dict[str, Any], reason: str) -> dict[str, Any]:
    """A program planned with half as many runs at a time, or more devices for each run.

    Raises:
      JaxpruneError: there is nothing left to halve.
    """
    strategy = Strategy(**planned['strategy'])
    places = strategy.devices // strategy.batch_devices
    if planned['chunk'] > places:
        smaller = math.ceil(planned['chunk'] / 2 / places) * places
        return {**planned, 'chunk': smaller, 'ran_out': True}
    more = range(strategy.batch_devices + 1, strategy.devices + 1)
    shared = next((n for n in more if strategy.devices % n == 0), None)
    if shared is None:
        where = f'all {strategy.devices} devices' if strategy.devices > 1 else 'the device'
        raise JaxpruneError(
            f'not even one run on {where} fits into memory ({reason}); a smaller '
            'train.batch_size or model.dtype = "bfloat16" may help'
        )
    return {
        **planned,
        'chunk': strategy.devices // shared,
        'strategy': strategy._replace(batch_devices=shared)._asdict(),
        'ran_out': True,
    }
