"""The files of one sweep directory: written whole or not at all, read back as frames.

    DIR/spec.toml               the resolved specification
    DIR/plan.json               runs, programs and chunks
    DIR/provenance.json         versions, git state, device, seeds, one entry per session
    DIR/results/<chunk>.parquet one row per run and evaluation
    DIR/layers/<chunk>.parquet  one row per run and prunable leaf
    DIR/curves/<chunk>.parquet  one row per run and step recorded, if [record] asks for any
    DIR/flow/<chunk>.parquet    one row per run, step, leaf and quantity, likewise
    DIR/timing/<chunk>.json     where its time went

A chunk is finished when its results and layers exist; results are written last.
"""

import contextlib
import fcntl
import io
import json
import os
from collections.abc import Iterator, Set
from pathlib import Path
from typing import NamedTuple

import polars as pl

from jaxprune.errors import StoreError, quoted
from jaxprune.files import write_whole
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
    'learning_rate': pl.Float64,
    'weight_decay': pl.Float64,
    'step': pl.Int64,
    'epoch': pl.Int64,
    'train_loss': pl.Float64,
    'test_loss': pl.Float64,
    'test_accuracy': pl.Float64,
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
`compact_difference`, the largest difference of their logits. All these are null where they are not
known. `error` is null, or says what went wrong: scores that cannot be ranked (losses and accuracy
are then NaN), or losses that diverged (the numbers are those of the broken network).
"""

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
      results: columns `RESULTS`.
      layers: columns `LAYERS`.
      curves: columns `CURVES`; no row if nothing was recorded along training.
      flow: columns `FLOW`, likewise.
      timing: seconds of `timing.PHASES`, and 'run_steps', the runs times steps they paid for.
    """

    results: pl.DataFrame
    layers: pl.DataFrame
    curves: pl.DataFrame
    flow: pl.DataFrame
    timing: dict[str, float]


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file so that a reader, or a crash at any moment, sees all of it or nothing."""
    try:
        write_whole(path, content)
    except OSError as error:
        raise StoreError(f'{path}: cannot be written ({error})') from error


def remove_leftovers(out: Path) -> None:
    """Deletes temporary files of a killed writer; call it with the directory locked."""
    for leftover in [*out.glob('.*.tmp'), *out.glob('*/.*.tmp')]:
        # The directory may hold files of other makers; ours end in a process id.
        if leftover.suffixes[-2:-1] and leftover.suffixes[-2][1:].isdigit():
            leftover.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + '\n').encode())


#: What a sweep may leave in its directory before the plan is written.
_FIRST_FILES = {'.lock', 'spec.toml', 'provenance.json'}


def directory(out: str | Path) -> Path:
    """A directory for results: a new or an empty one, or one that a sweep was begun in.

    Raises:
      StoreError: no name, or a directory with files of somebody else.
    """
    if not str(out).strip():
        raise StoreError('the directory of the results needs a name: give another --out')
    out = Path(out)
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
    except OSError as error:
        raise StoreError(f'{path}: cannot be read ({error})') from None
    except ValueError as error:
        raise StoreError(f'{path}: not valid JSON ({error})') from None
    if not isinstance(value, dict) or not keys <= value.keys():
        raise StoreError(f'{path}: not what jaxprune wrote, a table with {", ".join(sorted(keys))}')
    return value


def read_plan(out: Path) -> dict:
    return read_json(out / 'plan.json', {'name', 'programs', 'chunks', 'runs'})


def write_frame(path: Path, frame: pl.DataFrame) -> None:
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    write_bytes(path, buffer.getvalue())


def results_path(out: Path, chunk: str) -> Path:
    return out / 'results' / f'{chunk}.parquet'


def layers_path(out: Path, chunk: str) -> Path:
    return out / 'layers' / f'{chunk}.parquet'


def finished(out: Path, chunk: str) -> bool:
    return results_path(out, chunk).exists() and layers_path(out, chunk).exists()


def unreadable(out: Path, chunk: str) -> str:
    """What is wrong with the files of a finished chunk, and what to do; '' if nothing is."""
    wanted = (
        (results_path, RESULTS),
        (layers_path, LAYERS),
        (curves_path, CURVES),
        (flow_path, FLOW),
    )
    try:
        for where, schema in wanted:
            if (path := where(out, chunk)).exists():
                _read_frame(path, schema)
    except StoreError as error:
        return str(error)
    return ''


def curves_path(out: Path, chunk: str) -> Path:
    return out / 'curves' / f'{chunk}.parquet'


def flow_path(out: Path, chunk: str) -> Path:
    return out / 'flow' / f'{chunk}.parquet'


def timing_path(out: Path, chunk: str) -> Path:
    return out / 'timing' / f'{chunk}.json'


def write_chunk(out: Path, chunk: str, made: Chunk) -> None:
    """Commits a finished chunk. Results last: their file is what says 'finished'."""
    for path, frame in ((curves_path, made.curves), (flow_path, made.flow)):
        if len(frame):
            write_frame(path(out, chunk), frame)
    write_json(timing_path(out, chunk), made.timing)
    write_frame(layers_path(out, chunk), made.layers)
    write_frame(results_path(out, chunk), made.results)


def chunk_ids(out: Path) -> list[str]:
    """Chunks of the plan, in plan order."""
    return [chunk['id'] for chunk in read_plan(out)['chunks']]


def _read(out: Path | str, where, schema: dict, *, everywhere: bool = True) -> pl.DataFrame:
    out = Path(out)
    frames = [
        _read_frame(where(out, chunk), schema)
        for chunk in chunk_ids(out)
        if finished(out, chunk) and (everywhere or where(out, chunk).exists())
    ]
    return pl.concat(frames) if frames else pl.DataFrame(schema=schema)


#: Columns that earlier versions did not write.
_LATER = (
    *('params_compact', 'flops_compact', 'padded_flops_compact', 'speedup_theoretical'),
    'latency_ratio',
    *('full_accuracy', 'compact_accuracy', 'compact_difference'),
)


def _read_frame(path: Path, schema: dict) -> pl.DataFrame:
    again = 'and give the same `jaxprune sweep` command again'
    # What says that a chunk is finished must go too, or nothing would be made anew.
    results = path.parent.parent / 'results' / path.name
    broken = f'delete it {again}' if path == results else f'delete it and {results}, {again}'
    try:
        frame = pl.read_parquet(path, glob=False)  # a directory may be called 'lr[0.1]'
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = ' '.join(str(error).split())[:200]
        raise StoreError(f'{path}: cannot be read ({reason}); {broken}') from None
    later = {name: pl.lit(None, schema[name]) for name in _LATER if name in schema}
    frame = frame.with_columns(**{n: v for n, v in later.items() if n not in frame.columns})
    if not schema.keys() <= set(frame.columns):
        raise StoreError(f'{path}: not what jaxprune wrote; {broken}')
    return frame.select(*schema, pl.exclude(*schema))


def read_results(out: Path) -> pl.DataFrame:
    """All finished rows, in plan order; an empty frame if no chunk is finished."""
    return _read(out, results_path, RESULTS)


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
    total = dict.fromkeys(keys, 0.0)
    for chunk in chunk_ids(out):
        if not finished(out, chunk):
            continue
        try:
            spent = read_json(timing_path(out, chunk), set(keys))
            total = {key: total[key] + float(spent[key]) for key in keys}
        except (StoreError, TypeError, ValueError):
            continue
    return total


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Holds the directory for one process; the lock dies with it, however it dies."""
    try:
        file = open(out / '.lock', 'w')  # noqa: SIM115 (closed below)
    except OSError as error:
        raise StoreError(f'{out}: cannot be written ({error})') from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(f'{out} is in use by another jaxprune process') from None
        yield


def is_locked(out: Path) -> bool:
    """Is a process at work in the directory? Looks without writing, also where it may not write."""
    try:
        file = os.open(out / '.lock', os.O_RDONLY)
    except OSError:  # none was ever at work, or none that we may see
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False
