"""The files of one sweep directory: written whole or not at all, read back as frames.

    DIR/spec.toml               the resolved specification
    DIR/plan.json               runs, programs and chunks; never changed
    DIR/sessions/<start>.json   versions, git state, device, seeds: one for each `jaxprune sweep`
    DIR/attempts/<chunk>/*.json who worked at an unfinished or finished chunk, see `attempts`
    DIR/checkpoints/<chunk>/    where an unfinished chunk stands, see `checkpoint`
    DIR/results/<chunk>.parquet one row per run and evaluation
    DIR/layers/<chunk>.parquet  one row per run and prunable leaf
    DIR/curves/<chunk>.parquet  one row per run and step recorded, if [record] asks for any
    DIR/flow/<chunk>.parquet    one row per run, step, leaf and quantity that [record] asks for
    DIR/timing/<chunk>.json     where its time went

A chunk is finished when its results and layers exist; results are written last, and never again.
DIR may lie in an object store (`s3://`, `gs://`). Any number of processes may work in it.
"""

import io
import json
import uuid
from collections.abc import Callable, Iterable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from jaxprune import files
from jaxprune.errors import ReadError, StoreError, WriteError, first_line, quoted
from jaxprune.sweep.churn import CHURN, PREDICTIONS, with_churn
from jaxprune.sweep.timing import PHASES

RESULTS = {
    'run_id': pl.String,
    'model': pl.String,
    'dataset': pl.String,
    'label': pl.String,
    'method': pl.String,
    'allocation': pl.String,
    'seed': pl.Int64,
    'target': pl.String,
    'target_compression': pl.Float64,
    'density': pl.Float64,
    'compression': pl.Float64,
    'effective_compression': pl.Float64,
    'params_compact': pl.Int64,
    'flops_compact': pl.Int64,
    'padded_flops_compact': pl.Int64,
    'speedup_theoretical': pl.Float64,
    'latency_ratio': pl.Float64,
    'full_accuracy': pl.Float64,
    'compact_accuracy': pl.Float64,
    'compact_difference': pl.Float64,
    'mask_change': pl.Float64,
    'mask_distance': pl.Float64,
    'weights_used': pl.Float64,
    'learning_rate': pl.Float64,
    'weight_decay': pl.Float64,
    'step': pl.Int64,
    'epoch': pl.Int64,
    'train_loss': pl.Float64,
    'test_loss': pl.Float64,
    'test_accuracy': pl.Float64,
    'churn': pl.Float64,
    'error': pl.String,
}
"""Columns of a results row. A grid over further train keys adds one column each.

`target` says what `target_compression` is: 'direct' (weights before / weights after), 'effective'
(weights before / weights that lie on a path from input to output), or what else is counted before
and after: 'units', 'heads', 'head dimensions', 'groups', 'blocks'. `effective_compression` is
infinite where the network is cut in two. `params_compact` and `flops_compact` (of one example) are
those of the network without the groups that no kept weight reads, `padded_flops_compact` those of
its products with sides rounded up to a TPU's tiles of 8 x 128, `speedup_theoretical` is the
operations of the dense network over `flops_compact`. For the seeds of `record.compact_seeds` there
are, at a run's end, `latency_ratio`, the measured time of the dense network over that of the
compact one, `full_accuracy` of the network as training left it, `compact_accuracy`, and
`compact_difference`, the largest difference of their logits. Of methods that move masks there are
`method.MASK_FIGURES`. With `record.churn` there is `churn`, the share of the test set that the run
labels otherwise than the dense run of the same seed and settings. All these are null where they
are not known. `error` is null, or says what went wrong: scores that cannot be ranked (losses and
accuracy are then NaN), or losses that diverged (the numbers are those of the broken network).
"""

RESULTS_FILE = {PREDICTIONS if k == CHURN else k: v for k, v in RESULTS.items()}
RESULTS_FILE[PREDICTIONS] = pl.String
"""Columns in the file of a chunk, which knows no dense runs of other chunks; see `churn`."""

LAYERS = {
    'run_id': pl.String,
    'path': pl.String,
    'size': pl.Int64,
    'kept': pl.Int64,
    'active': pl.Int64,
}
"""Columns of a layers row: how many of a leaf's `size` weights the run keeps, and how many of these
lie on a path from input to output."""


CURVES = {
    'run_id': pl.String,
    'step': pl.Int64,
    'rounds': pl.Int64,
    'train_loss': pl.Float64,
    'test_loss': pl.Float64,
    'test_accuracy': pl.Float64,
}
"""Columns of a curves row: the mean training loss since the row before; test loss and accuracy at
this step, null where they were not asked for. `rounds` counts the pruning rounds before: a step at
which rounds happen may have two rows, one from before them and one, without a training loss, from
right after them."""

FLOW = {
    'run_id': pl.String,
    'step': pl.Int64,
    'rounds': pl.Int64,
    'path': pl.String,
    'quantity': pl.String,
    'value': pl.Float64,
}
"""Columns of a flow row: a quantity of `jaxprune.flow` at one leaf and step."""


class Chunk(NamedTuple):
    """What a finished chunk leaves behind.

    Attributes:
      results: columns `RESULTS_FILE`.
      layers: columns `LAYERS`.
      curves: columns `CURVES`; no row if nothing was recorded along training.
      flow: columns `FLOW`; no row if no quantity was recorded.
      timing: seconds of `timing.PHASES`, and 'run_steps', the runs times steps they paid for.
    """

    results: pl.DataFrame
    layers: pl.DataFrame
    curves: pl.DataFrame
    flow: pl.DataFrame
    timing: dict[str, float]


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file so that a reader, or a crash at any moment, sees all of it or nothing."""
    _written(files.write_whole, path, content)


def create_bytes(path: Path, content: bytes) -> bool:
    """Writes a file unless there is one. Returns whether this call wrote it."""
    return _written(files.create_whole, path, content)


def _written(write: Callable[[Path, bytes], Any], path: Path, content: bytes) -> Any:
    try:
        return write(path, content)
    except (OSError, *refusals(path)) as error:
        raise WriteError(f'{path}: cannot be written ({first_line(error)})') from error


def refusals(path: Path) -> tuple[type[Exception], ...]:
    """What an object store raises besides `OSError`: no bucket, no credentials, no network."""
    return (Exception,) if files.is_remote(path) else ()


def write_json(path: Path, value: object) -> None:
    write_bytes(path, _json(value))


def create_json(path: Path, value: object) -> bool:
    return create_bytes(path, _json(value))


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + '\n').encode()


#: What a sweep may leave in its directory before the plan is written.
_FIRST_FILES = {'spec.toml', 'sessions'}


def place(out: str | Path) -> Path:
    """The directory of this name, on a disk or in an object store.

    Raises:
      StoreError: the packages for object stores are not installed.
    """
    try:
        return files.place(out)
    except ImportError as error:
        raise StoreError(
            f"{out}: object stores need more packages: pip install 'jaxprune[cloud]' ({error})"
        ) from None


def directory(out: str | Path) -> Path:
    """A directory for results: a new or an empty one, or one that a sweep was begun in.

    Raises:
      StoreError: no name, or a directory with files of somebody else.
    """
    if not str(out).strip():
        raise StoreError('the directory of the results needs a name: give another --out')
    out = place(out)
    if not out.is_dir() or (out / 'plan.json').exists():
        return out
    names = {path.name for path in out.iterdir() if not path.name.endswith('.tmp')}
    if foreign := sorted(names - _FIRST_FILES):
        raise StoreError(
            f'{out} is not empty and holds no sweep (there is {quoted(foreign[0])}): choose '
            'another --out'
        )
    return out


def make_directory(out: Path) -> None:
    if files.is_remote(out):  # which have none
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f'{out}: cannot be made a directory ({error})') from None


def read_json(path: Path, keys: Set[str] = frozenset()) -> dict:
    """The table in a JSON file; without these keys it is no file of ours."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f'{path.parent} is not a sweep directory: it has no {path.name}') from None
    except ValueError as error:
        raise StoreError(f'{path}: not valid JSON ({error})') from None
    except (OSError, *refusals(path)) as error:
        raise ReadError(f'{path}: cannot be read ({first_line(error)})') from error
    if not isinstance(value, dict) or not keys <= value.keys():
        keys_of = f' with {", ".join(sorted(keys))}' if keys else ''
        raise StoreError(f'{path}: not what jaxprune wrote, a table{keys_of}')
    return value


def read_plan(out: Path) -> dict:
    return read_json(out / 'plan.json', {'name', 'programs', 'chunks', 'runs'})


def parquet(frame: pl.DataFrame) -> bytes:
    """A table as the content of a parquet file."""
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    return buffer.getvalue()


def write_frame(path: Path, frame: pl.DataFrame) -> None:
    write_bytes(path, parquet(frame))


def write_session(out: Path, record: dict[str, Any]) -> None:
    """Adds what is known of a session, a `jaxprune sweep`, beside those before."""
    started = ''.join(c for c in record['session']['started'] if c.isalnum())
    write_json(out / 'sessions' / f'{started}-{uuid.uuid4().hex[:8]}.json', record)


def read_provenance(out: Path) -> dict[str, Any]:
    """The record of the last session, with 'sessions', what differs between all of them."""
    paths = sorted(listed(out / 'sessions', '.json'), key=lambda path: path.name)
    try:
        records = [read_json(path, {'session'}) for path in paths]
    except ReadError:
        raise
    except StoreError as error:
        raise StoreError(f'{error}; it holds no results: remove it to go on') from None
    if not records:
        raise StoreError(f'{out} is not a sweep directory: it has no sessions')
    return {**records[-1], 'sessions': [record['session'] for record in records]}


def listed(folder: Path, suffix: str = '') -> list[Path]:
    """What lies in a folder and ends so, hidden files aside; nothing if there is no folder."""
    try:
        found = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, *refusals(folder)) as error:
        raise ReadError(f'{folder}: cannot be listed ({first_line(error)})') from error
    return [path for path in found if path.name.endswith(suffix) and path.name[0] != '.']


def results_path(out: Path, chunk: str) -> Path:
    return out / 'results' / f'{chunk}.parquet'


def layers_path(out: Path, chunk: str) -> Path:
    return out / 'layers' / f'{chunk}.parquet'


def finished(out: Path, chunk: str) -> bool:
    return results_path(out, chunk).exists() and layers_path(out, chunk).exists()


def finished_chunks(out: Path) -> set[str]:
    """All finished chunks, found by two listings."""
    results, layers = (
        {path.name.removesuffix('.parquet') for path in listed(out / folder, '.parquet')}
        for folder in ('results', 'layers')
    )
    return results & layers


def unreadable(out: Path, chunk: str) -> str:
    """What is wrong with the files of a finished chunk, and what to do; '' if nothing is."""
    try:
        for where, schema in zip(TABLES, _SCHEMAS, strict=True):
            if (path := where(out, chunk)).exists():
                _read_frame(path, schema)
    except StoreError as error:
        return str(error)
    return ''


def all_unreadable(out: Path, chunks: Sequence[str]) -> dict[str, str]:
    """The same for each of these chunks, as far as the ends of the files show, in less time.

    A file that was cut off, or holds something else, has no list of columns at its end. The rows
    are not read.
    """
    folders = [where(out, 'any').parent for where in TABLES]
    names_in = [{path.name for path in listed(folder)} for folder in folders]
    there = list(zip(folders, names_in, _SCHEMAS, strict=True))

    def wrong(chunk: str) -> str:
        name = f'{chunk}.parquet'
        try:
            for folder, names, schema in there:
                if name in names and not _ends_well(folder / name, schema):
                    _read_frame(folder / name, schema)
        except StoreError as error:
            return str(error)
        return ''

    return dict(zip(chunks, _each(wrong, chunks, files.is_remote(out)), strict=True))


def _ends_well(path: Path, schema: dict) -> bool:
    """Does a file begin and end like a table with these columns?"""
    try:
        with path.open('rb') as file:
            begins = file.read(4) == b'PAR1'
            file.seek(0)
            return begins and schema.keys() <= pl.read_parquet_schema(file).keys()
    except (OSError, pl.exceptions.PolarsError, *refusals(path)):
        return False


def curves_path(out: Path, chunk: str) -> Path:
    return out / 'curves' / f'{chunk}.parquet'


def flow_path(out: Path, chunk: str) -> Path:
    return out / 'flow' / f'{chunk}.parquet'


def timing_path(out: Path, chunk: str) -> Path:
    return out / 'timing' / f'{chunk}.json'


#: Where the tables of a chunk lie, the results last.
TABLES = (curves_path, flow_path, layers_path, results_path)
_SCHEMAS = (CURVES, FLOW, LAYERS, RESULTS_FILE)


def write_chunk(out: Path, chunk: str, made: Chunk) -> bool:
    """Commits a finished chunk. Results last: their file is what says 'finished'.

    Returns:
      False if another worker was faster; its numbers stand, and are the same.
    """
    if finished(out, chunk):
        return False
    write_json(timing_path(out, chunk), made.timing)
    tables = (made.curves, made.flow, made.layers)
    for where, schema, frame in zip(TABLES, _SCHEMAS, tables, strict=False):
        if len(frame) or where is layers_path:
            _create_frame(where(out, chunk), frame, schema)
    return create_bytes(results_path(out, chunk), parquet(made.results))


def _create_frame(path: Path, frame: pl.DataFrame, schema: dict) -> None:
    """Writes a table, unless another worker left the same one here, whole."""
    if create_bytes(path, parquet(frame)):
        return
    try:
        _read_frame(path, schema)
    except ReadError:
        raise
    except StoreError:
        write_frame(path, frame)


def chunk_ids(out: Path) -> list[str]:
    """Chunks of the plan, in plan order."""
    return [chunk['id'] for chunk in read_plan(out)['chunks']]


def _read(out: Path | str, where, schema: dict, *, everywhere: bool = True) -> pl.DataFrame:
    out = place(out)
    there = finished_chunks(out)
    if not everywhere:
        folder = where(out, 'any').parent
        there &= {path.name.removesuffix('.parquet') for path in listed(folder, '.parquet')}
    wanted = [where(out, chunk) for chunk in chunk_ids(out) if chunk in there]
    remote = files.is_remote(out)
    if not remote and len(wanted) > 1:
        try:
            return _in_order(pl.read_parquet(wanted, glob=False), schema)
        except (OSError, pl.exceptions.PolarsError):
            pass  # a file is broken, or older than others: each by itself
    frames = list(_each(lambda path: _read_frame(path, schema), wanted, remote))
    return pl.concat(frames) if frames else pl.DataFrame(schema=schema)


def _each(read: Callable[[Any], Any], items: Sequence[Any], remote: bool) -> Iterable[Any]:
    """What is read of each item, several at a time where each takes a round trip."""
    if not remote:
        return map(read, items)
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(read, items))


#: Columns that earlier versions did not write.
_LATER = (
    *('params_compact', 'flops_compact', 'padded_flops_compact', 'speedup_theoretical'),
    'latency_ratio',
    *('full_accuracy', 'compact_accuracy', 'compact_difference'),
    *('mask_change', 'mask_distance', 'weights_used', PREDICTIONS),
)


def _read_frame(path: Path, schema: dict) -> pl.DataFrame:
    again = 'and give the same `jaxprune sweep` command again'
    # What says that a chunk is finished must go too, or nothing would be made anew.
    results = path.parent.parent / 'results' / path.name
    broken = f'delete it {again}' if path == results else f'delete it and {results}, {again}'
    try:
        remote = files.is_remote(path)
        source = io.BytesIO(path.read_bytes()) if remote else path
        frame = pl.read_parquet(source, glob=False)  # a directory may be called 'lr[0.1]'
    except (OSError, pl.exceptions.PolarsError, *refusals(path)) as error:
        reason = ' '.join(str(error).split())[:200]
        raise StoreError(f'{path}: cannot be read ({reason}); {broken}') from None
    try:
        return _in_order(frame, schema)
    except pl.exceptions.PolarsError:
        raise StoreError(f'{path}: not what jaxprune wrote; {broken}') from None


def _in_order(frame: pl.DataFrame, schema: dict) -> pl.DataFrame:
    """The table with the columns of the schema first, and those that came later with it as nulls.

    Raises:
      PolarsError: it lacks a column.
    """
    if frame.columns[: len(schema)] == list(schema):
        return frame
    later = [name for name in _LATER if name in schema and name not in frame.columns]
    frame = frame.with_columns(pl.lit(None, schema[name]).alias(name) for name in later)
    return frame.select(*schema, pl.exclude(*schema))


def read_results(out: Path) -> pl.DataFrame:
    """All finished rows, in plan order; an empty frame if no chunk is finished."""
    found = _read(out, results_path, RESULTS_FILE)
    others = [name for name in found.columns if name not in RESULTS_FILE]
    return with_churn(found, ['learning_rate', 'weight_decay', *others])


def read_layers(out: Path) -> pl.DataFrame:
    """Kept weights per run and leaf of all finished chunks."""
    return _read(out, layers_path, LAYERS)


def read_curves(out: Path) -> pl.DataFrame:
    """What was recorded along training; an empty frame if nothing was."""
    return _read(out, curves_path, CURVES, everywhere=False)


def read_flow(out: Path) -> pl.DataFrame:
    """Quantities of gradient flow along training; an empty frame if none were recorded."""
    return _read(out, flow_path, FLOW, everywhere=False)


def read_timing(out: Path) -> dict[str, float]:
    """Seconds by phase, and the runs times steps they paid for, of all finished chunks.

    A chunk whose timing is lost or broken is left out: nothing else depends on it.
    """
    keys = (*PHASES, 'run_steps')
    total, there = dict.fromkeys(keys, 0.0), finished_chunks(out)

    def spent(path: Path) -> dict[str, float]:
        try:
            found = read_json(path, set(keys))
            return {key: float(found[key]) for key in keys}
        except (StoreError, TypeError, ValueError):
            return dict.fromkeys(keys, 0.0)

    paths = [timing_path(out, chunk) for chunk in chunk_ids(out) if chunk in there]
    for found in _each(spent, paths, files.is_remote(out)):
        total = {key: total[key] + found[key] for key in keys}
    return total
