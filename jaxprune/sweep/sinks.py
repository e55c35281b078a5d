"""The tables of a sweep for TensorBoard and Weights & Biases: one of their runs for each of ours.

A chunk's tables are stored whole, and never again, so a run is written once: at the next call the
runs that are there already are left alone, and those that were finished since are added.
"""

import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from jaxprune import files
from jaxprune.errors import StoreError, check_choice, first_line
from jaxprune.sweep import store

#: Columns of the results that change along a run; all others say which run it is, or how it ended.
_ALONG = ('epoch', 'train_loss', 'test_loss', 'test_accuracy')
_CURVES = ('rounds', 'train_loss', 'test_loss', 'test_accuracy')


class Logged(NamedTuple):
    """What a log directory holds of a sweep.

    Attributes:
      where: the directory.
      runs: how many finished runs it holds.
      added: how many of them were written by this call.
    """

    where: Path
    runs: int
    added: int


class RunLog(NamedTuple):
    """A run as it is logged.

    Attributes:
      id: of the run.
      sweep: the name of the sweep.
      name: for people, and for a folder: label, compression, seed and id.
      config: what the run is, and how it ended.
      points: `(step, tag -> value)`, in order.
    """

    id: str
    sweep: str
    name: str
    config: dict[str, Any]
    points: list[tuple[int, dict[str, float]]]


class Sink(NamedTuple):
    """Where runs are written to.

    Attributes:
      has: is a run of this id there, whole?
      write: writes a run.
    """

    has: Callable[[str], bool]
    write: Callable[[RunLog], None]


def log_sweep(out: str | Path, to: str, where: str | Path | None = None) -> Logged:
    """Writes the finished runs of a sweep that are not yet in a log directory.

    Scalars of the results have the names of their columns. Those along training begin with
    'curves/'; where a step has a second row, from right after pruning, with 'curves_after_rounds/'.

    Args:
      out: the directory of a sweep, finished or not.
      to: 'tensorboard' or 'wandb', whose runs are offline: `wandb sync` sends them.
      where: the log directory; by default `logs/<to>` in the sweep's own.

    Raises:
      StoreError: not a sweep, a package that is not installed, or a directory that cannot be
        written.
    """
    check_choice('sink', to, SINKS, StoreError)
    out = store.place(out)
    plan = store.read_plan(out)
    if where is None and files.is_remote(out):
        raise StoreError(f'{out} lies in an object store: give a log directory on a disk')
    folder = Path(where) if where is not None else out / 'logs' / to
    try:
        sink = SINKS[to](folder)
    except ImportError as error:
        raise StoreError(
            f"logs for {to} need more packages: pip install 'jaxprune[{to}]' ({error})"
        ) from None
    results = store.read_results(out)
    ids = results['run_id'].unique(maintain_order=True).to_list()
    new = [run for run in ids if not sink.has(run)]
    try:
        for run in run_logs(plan['name'], results, store.read_curves(out), new):
            sink.write(run)
    except OSError as error:
        raise StoreError(f'{folder}: cannot be written ({error})') from error
    return Logged(folder, len(ids), len(new))


def run_logs(
    sweep: str, results: pl.DataFrame, curves: pl.DataFrame, ids: Sequence[str]
) -> list[RunLog]:
    """The runs of these ids; values that are null are left out."""
    rows, along = _by_run(results, ids), _by_run(curves, ids)
    made = []
    for run in ids:
        last = rows[run][-1]
        config = {k: v for k, v in last.items() if k not in (*_ALONG, 'step') and v is not None}
        name = f'{last["label"]}-x{last["target_compression"]:g}-seed{last["seed"]}-{run}'
        points: dict[int, dict[str, float]] = {}
        for row in rows[run]:
            _add(points, row, '', _ALONG)
        for row in along.get(run, []):
            twice = f'curves/{_CURVES[0]}' in points.get(row['step'], {})
            _add(points, row, 'curves_after_rounds/' if twice else 'curves/', _CURVES)
        made.append(RunLog(run, sweep, _plain(name), config, sorted(points.items())))
    return made


def _by_run(table: pl.DataFrame, ids: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Run -> its rows, by step; of two of a step the one with fewer rounds is first."""
    wanted = table.filter(pl.col('run_id').is_in(ids))
    order = [name for name in ('step', 'rounds') if name in table.columns]
    found: dict[str, list[dict[str, Any]]] = {}
    for row in wanted.sort(order, maintain_order=True).iter_rows(named=True):
        found.setdefault(row['run_id'], []).append(row)
    return found


def _add(
    points: dict[int, dict[str, float]],
    row: Mapping[str, Any],
    prefix: str,
    columns: Sequence[str],
) -> None:
    values = {f'{prefix}{name}': row[name] for name in columns if row[name] is not None}
    points.setdefault(row['step'], {}).update(values)


def _plain(name: str) -> str:
    """A name as both programs, and all file systems, take it."""
    return re.sub(r'[^A-Za-z0-9.+=-]+', '_', name)[-120:]


def tensorboard(where: Path) -> Sink:
    """A folder for each run with one file of events, written whole."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.record_writer import RecordWriter
    from tensorboardX.summary import hparams

    there = {path.parent.name.rpartition('-')[2] for path in where.glob('*/events.out.tfevents.*')}

    def write(run: RunLog) -> None:
        now, folder = time.time(), where / run.name
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files with 'tfevents' in their names.
        unfinished = folder / '.unfinished'
        writer = RecordWriter(str(unfinished))
        writer.write(Event(wall_time=now, file_version='brain.Event:2').SerializeToString())
        # What the page HParams shows; its metrics are scalars of the same names.
        for summary in hparams(run.config, dict.fromkeys(_ALONG[1:])):
            writer.write(Event(wall_time=now, summary=summary).SerializeToString())
        for step, values in run.points:
            scalars = [Summary.Value(tag=tag, simple_value=v) for tag, v in values.items()]
            event = Event(wall_time=now, step=step, summary=Summary(value=scalars))
            writer.write(event.SerializeToString())
        writer.close()
        unfinished.rename(folder / f'events.out.tfevents.{int(now)}.jaxprune')

    return Sink(there.__contains__, write)


def wandb(where: Path) -> Sink:
    """Offline runs; a file in `.jaxprune` says which of them are whole."""
    import wandb

    settings = wandb.Settings(
        silent=True, console='off', disable_git=True, save_code=False, x_disable_stats=True
    )

    def write(run: RunLog) -> None:
        for broken in where.glob(f'wandb/offline-run-*-{run.id}'):
            shutil.rmtree(broken)
        where.mkdir(parents=True, exist_ok=True)
        try:
            begun = wandb.init(
                project=_plain(run.sweep),
                id=run.id,
                name=run.name,
                group=_plain(str(run.config['label'])),
                config=run.config,
                dir=str(where),
                mode='offline',
                reinit='finish_previous',
                settings=settings,
            )
            for step, values in run.points:
                begun.log(values, step=step)
            begun.finish()
        except wandb.Error as error:
            raise StoreError(f'{where}: refused by wandb ({first_line(error)})') from error
        files.write_whole(where / '.jaxprune' / run.id, b'')

    return Sink(lambda run: (where / '.jaxprune' / run).exists(), write)


#: Name -> a function that opens a log directory; it raises ImportError without its package.
SINKS: dict[str, Callable[[Path], Sink]] = {'tensorboard': tensorboard, 'wandb': wandb}
