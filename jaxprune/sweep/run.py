"""The driver: plan -> chunks -> store, resumable at any moment."""

import datetime
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import polars as pl

from jaxprune import data
from jaxprune.errors import JaxpruneError, SpecError, StoreError, first_line
from jaxprune.sweep import store
from jaxprune.sweep.checkpoint import checkpoint
from jaxprune.sweep.chunk import rows_of, run_chunk
from jaxprune.sweep.devices import memory_limit
from jaxprune.sweep.engine import Engine, make_engine
from jaxprune.sweep.grid import Run, runs
from jaxprune.sweep.load import identity, load_spec, make_spec, spec_hash, to_toml
from jaxprune.sweep.plan import cut, make_plan, measure
from jaxprune.sweep.probe import tried
from jaxprune.sweep.program import Program, device_data, make_program
from jaxprune.sweep.progress import Progress, Shown, silent
from jaxprune.sweep.provenance import provenance
from jaxprune.sweep.spec import SweepSpec
from jaxprune.sweep.strategy import Strategy

#: The part of a device's memory that a compiled training program may take.
_MEMORY_SHARE = 0.85
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
    """
    if isinstance(spec, (str, Path)):
        source = str(spec)
        spec = load_spec(spec)
    elif not isinstance(spec, SweepSpec):
        spec = make_spec(spec, source)
    out = default_out(spec) if out is None else Path(out)
    plan_table = make_plan(spec, source)
    dataset = data.load(spec.data.name, data_dir)
    try:
        on_device = device_data(spec, dataset)
    except SpecError as error:
        raise SpecError(f'{source}: {error}') from None
    store.make_directory(out)
    with store.locked(out):
        _open(spec, out, plan_table)
        with (progress or silent)(plan_table, out) as shown:
            _measure_first(spec, out, shown)
            _run_chunks(spec, out, on_device, shown)
        return store.read_results(out)


def _open(spec: SweepSpec, out: Path, plan_table: dict[str, Any]) -> None:
    """Makes or re-opens the directory.

    The plan in the directory wins over a new one, as another machine might cut other chunks,
    unless [engine] now asks for others.
    """
    text = to_toml(spec)
    spec_file, plan_file = out / 'spec.toml', out / 'plan.json'
    if spec_file.exists() and identity(load_spec(spec_file)) != identity(spec):
        raise StoreError(f'{out} holds another sweep (see its spec.toml): choose another --out')
    store.remove_leftovers(out)
    if plan_file.exists():
        stored = store.read_plan(out)
        if any(stored.get(key) != plan_table[key] for key in ('format', 'spec')):
            raise StoreError(
                f'{out} was written by another version of jaxprune: choose another --out'
            )
        same_engine = spec_file.exists() and spec_file.read_bytes() == text.encode()
        plan_table = stored if same_engine else recut(stored, plan_table, out)
    session = provenance(spec, datetime.datetime.now(datetime.UTC))
    record = out / 'provenance.json'
    sessions = store.read_json(record, {'sessions'})['sessions'] if record.exists() else []
    store.write_json(record, {**session, 'sessions': [*sessions, session['session']]})
    # The plan last: with it, the directory is one that `status` can read.
    store.write_bytes(spec_file, text.encode())
    store.write_json(plan_file, plan_table)


def recut(stored: dict[str, Any], plan_table: dict[str, Any], out: Path) -> dict[str, Any]:
    """The plan for other chunk sizes: finished chunks stay, the runs left are cut anew."""
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


def _measure_first(spec: SweepSpec, out: Path, shown: Shown) -> None:
    """Where the ways to train are worth trying, tries them and plans what is left anew."""
    stored = store.read_plan(out)
    if all(store.finished(out, chunk['id']) for chunk in stored['chunks']):
        return
    if measure(spec, stored, lambda measured: shown.note(tried(measured))):
        plan_table = recut(stored, make_plan(spec), out)
        for program in plan_table['programs']:
            shown.note(f'program {program["id"]}: {Strategy(**program["strategy"])}')
        store.write_json(out / 'plan.json', plan_table)


def _run_chunks(spec: SweepSpec, out: Path, on_device, shown: Shown) -> None:
    by_id = {run.run_id: run for run in runs(spec)}
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
        told = []

        def steps(count: int, told=told) -> None:
            told.append(count)
            shown.steps(count)

        try:
            if current is None or current[0] != chunk['program']:
                # One program at a time: its compiled functions are freed with it.
                current = chunk['program'], *_engine(spec, planned, members, on_device)
            saved = checkpoint(out / 'checkpoints' / chunk['id'], spec.engine.checkpoint_minutes)
            made = run_chunk(
                spec,
                *current[1:],
                members,
                planned['chunk'],
                shown=shown._replace(steps=steps),
                saved=saved,
            )
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            current = None
            shown.steps(-sum(told))
            smaller = _smaller(planned, first_line(error))
            programs = [smaller if p is planned else p for p in plan_table['programs']]
            plan_table = recut(plan_table, {**plan_table, 'programs': programs}, out)
            store.write_json(out / 'plan.json', plan_table)
            left = [c for c in plan_table['chunks'] if not store.finished(out, c['id'])]
            shown.note(
                f'out of memory with {planned["chunk"]} runs at a time; going on with '
                f'{smaller["chunk"]} ({Strategy(**smaller["strategy"])})'
            )
            continue
        store.write_chunk(out, chunk['id'], made)
        saved.remove()
        shown.finish(len(members))
        left.pop(0)
    # Whatever is left belongs to chunks that were cut anew.
    shutil.rmtree(out / 'checkpoints', ignore_errors=True)


def _engine(
    spec: SweepSpec, planned: Mapping[str, Any], members: Sequence[Run], on_device
) -> tuple[Program, Engine]:
    """The functions and the engine of a planned program.

    Raises:
      MemoryError: by the compiler's own account, a chunk would not fit.
    """
    strategy = Strategy(**planned['strategy'])
    program = make_program(spec, members[0].train, strategy.convolution, strategy.batch_devices)
    at_once = strategy.devices if strategy.batching == 'unroll' else planned['chunk']
    seconds = (planned['seconds_per_step'] or 0) * at_once
    steps_per_call = max(int(_CALL_SECONDS / seconds), 1) if seconds else 0
    engine = make_engine(strategy, program, on_device, jax.local_devices(), steps_per_call)
    rows, _ = rows_of(members, planned['chunk'], engine)
    needed, limit = engine.bytes_needed(rows), _MEMORY_SHARE * memory_limit()
    if needed > limit:
        raise MemoryError(f'{needed / 1e9:.3g} GB are needed where {limit / 1e9:.3g} GB are left')
    return program, engine


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error)


def _smaller(planned: dict[str, Any], reason: str) -> dict[str, Any]:
    """A program planned with half as many runs at a time, or more devices for each run.

    Raises:
      JaxpruneError: there is nothing left to halve.
    """
    strategy = Strategy(**planned['strategy'])
    places = strategy.devices // strategy.batch_devices
    if planned['chunk'] > places:
        return {**planned, 'chunk': math.ceil(planned['chunk'] / 2 / places) * places}
    if places % 2:
        raise JaxpruneError(
            f'not even {places} run{"s" * (places > 1)} at a time fit into memory ({reason}); a '
            'smaller train.batch_size or model.dtype = "bfloat16" may help'
        )
    shared = strategy._replace(batch_devices=2 * strategy.batch_devices)
    return {**planned, 'chunk': places // 2, 'strategy': shared._asdict()}
