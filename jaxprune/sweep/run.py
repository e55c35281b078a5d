"""The driver on this machine: plan -> chunks -> store, resumable at any moment."""

import difflib
import functools
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from jaxprune import data
from jaxprune.errors import Interrupted, SpecError, StoreError, quoted
from jaxprune.files import clock_ahead, is_remote, remove_abandoned
from jaxprune.stop import Stop, never
from jaxprune.sweep import checkpoint, store
from jaxprune.sweep.attempts import taken
from jaxprune.sweep.device_data import DeviceData, device_data
from jaxprune.sweep.groups import group_of
from jaxprune.sweep.load import load_spec, make_spec, spec_hash
from jaxprune.sweep.open_sweep import open_sweep, stored_plan, stored_spec
from jaxprune.sweep.processes import agreed, anybody
from jaxprune.sweep.progress import Progress, silent
from jaxprune.sweep.spec import SweepSpec
from jaxprune.sweep.sweep_plan import checked_groups, make_plan
from jaxprune.sweep.worker import Job, make_worker

#: Seconds between looks at chunks at which other processes work.
_LOOK = 1.0


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
    stop: Stop | None = None,
) -> pl.DataFrame:
    """Trains every run of a sweep that is not yet finished, and returns all results.

    Several processes may work in one directory: each takes chunks that no other works at.

    Args:
      spec: a TOML file, a table with its keys, or a specification.
      out: directory of the results, `s3://` and `gs://` too; by default named after the
        specification. If it holds an unfinished sweep of the same specification, that is continued.
      data_dir: where prepared TFDS data lie, see `jaxprune.data.load`.
      progress: what to show, see `jaxprune.sweep.progress`; None for nothing.
      source: what error messages call a specification that is no file.
      stop: whether to leave, see `jaxprune.stop`; None for never.

    Returns:
      One row per run and evaluation, the columns of `store.RESULTS`.

    Raises:
      SpecError, DataError: before anything is written.
      StoreError: `out` holds another sweep or broken files, or cannot be written.
      Interrupted: a signal asked to leave; the same call goes on.
      JaxpruneError: not even one run at a time fits into memory; finished chunks are kept.
    """
    if isinstance(spec, (str, Path)):
        source = str(spec)
        spec = load_spec(spec)
    elif not isinstance(spec, SweepSpec):
        spec = make_spec(spec, source)
    out = default_out(spec) if out is None else store.directory(out)
    groups = checked_groups(spec, source)
    plan = make_plan(spec, source, groups)
    on_device = loaded(spec, data_dir, source)
    plan = open_sweep(spec, out, plan)
    with (progress or silent)(plan, out) as shown:
        job = Job(
            spec=spec,
            plan=plan,
            out=out,
            groups={group.id: group for group in groups},
            data=lambda: on_device,
            shown=shown,
            stop=stop or never(),
        )
        work_through(job, plan['chunks'])
    return store.read_results(out)


def plan_sweep(spec: SweepSpec, out: str | Path, source: str = 'spec') -> dict[str, Any]:
    """Begins a sweep's directory, or opens it again, without training; returns the plan.

    Raises:
      SpecError, StoreError: see `run_sweep`.
    """
    out = store.directory(out)
    plan = make_plan(spec, source, checked_groups(spec, source))
    return open_sweep(spec, out, plan)


def run_chunks(
    out: str | Path,
    wanted: str | int | None,
    *,
    data_dir: str | Path | None = None,
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> int:
    """Trains one chunk of a planned sweep, or all that nobody has finished.

    A chunk at which another process works is waited for, and taken over if that one is lost.

    Args:
      out: directory of the sweep.
      wanted: the chunk, by its id or its place in the plan; None for all.
      data_dir, progress, stop: see `run_sweep`.

    Returns:
      How many chunks were not finished before.

    Raises:
      StoreError: no sweep, no such chunk, or a directory that cannot be written.
      Interrupted: a signal asked to leave; the same call goes on.
    """
    out = store.place(out)
    plan, spec = stored_plan(out), stored_spec(out)
    chunks = plan['chunks'] if wanted is None else [chunk_of(plan, wanted, out)]
    there = agreed(sorted(store.finished_chunks(out)))
    chunks = [chunk for chunk in chunks if chunk['id'] not in there]
    if not chunks:
        return 0
    programs = dict.fromkeys(chunk['program'] for chunk in chunks)
    groups = {program: group_of(spec, program) for program in programs}
    data_of = functools.cache(lambda: loaded(spec, data_dir, f'{out}/spec.toml'))
    shown_plan = {**plan, 'programs': [p for p in plan['programs'] if p['id'] in programs]}
    with (progress or silent)(shown_plan, out) as shown:
        job = Job(spec, plan, out, groups, data_of, shown, stop or never())
        # Machines that start at once begin at different chunks.
        first = agreed(random.SystemRandom().randrange(len(chunks)))
        work_through(job, [*chunks[first:], *chunks[:first]])
    return len(chunks)


def chunk_of(plan: Mapping[str, Any], wanted: str | int, out: Path) -> dict[str, Any]:
    """A chunk by its id or its place in the plan."""
    chunks = plan['chunks']
    if isinstance(wanted, int):
        if not 0 <= wanted < len(chunks):
            raise StoreError(f'{out} has chunks 0 to {len(chunks) - 1}, not {wanted}')
        return chunks[wanted]
    found = next((chunk for chunk in chunks if chunk['id'] == wanted), None)
    if found is None:
        close = difflib.get_close_matches(wanted, [chunk['id'] for chunk in chunks], n=1)
        tail = f"did you mean '{close[0]}'?" if close else f'the first one is {chunks[0]["id"]!r}'
        raise StoreError(f'{out} has no chunk {quoted(wanted)}: {tail}')
    return found


def loaded(spec: SweepSpec, data_dir: str | Path | None, source: str) -> DeviceData:
    """The data set of a specification, for the devices."""
    dataset = data.load(spec.data.name, data_dir)
    try:
        return device_data(spec, dataset)
    except SpecError as error:
        raise SpecError(f'{source}: {error}') from None


def work_through(job: Job, chunks: Sequence[Mapping[str, Any]]) -> None:
    """Trains chunks until all are finished, by this process or by others.

    Chunks that others work at come last, and are taken over where these give no sign of life.
    """
    work, left = make_worker(job), list(chunks)
    ahead = clock_ahead(job.out)
    there = store.finished_chunks(job.out)
    while left:
        waiting = []
        for chunk in left:
            if agreed(chunk['id'] in there or store.finished(job.out, chunk['id'])):
                job.shown.skip(len(chunk['runs']))
                continue
            if anybody(job.stop.asked()):
                raise Interrupted('interrupted between chunks')
            if agreed(taken(job.out, chunk['id'], ahead)) or not work(chunk):
                waiting.append(chunk)
        left = waiting
        if left:
            time.sleep(_LOOK)
    if store.finished_chunks(job.out) >= {chunk['id'] for chunk in job.plan['chunks']}:
        # Left by processes that were frozen, or killed in between.
        checkpoint.remove(job.out / 'checkpoints')
        if not is_remote(job.out):
            remove_abandoned(job.out)
