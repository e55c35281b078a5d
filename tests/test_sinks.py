"""Logs for TensorBoard and Weights & Biases: what is read back is what the tables hold."""

import importlib.util
import json
import math
import struct
import sys

import numpy as np
import polars as pl
import pytest
from fake_engine import nothing_trained

import jaxprune as jp
from jaxprune.errors import StoreError
from jaxprune.sweep import store
from jaxprune.sweep.sinks import SINKS, Logged, log_sweep, run_logs

PACKAGES = {'tensorboard': 'tensorboardX', 'wandb': 'wandb'}
TABLE = {
    'name': 'logged sweep',
    'model': {'name': 'mlp', 'widths': [8]},
    'data': {'name': 'mnist_small', 'train_examples': 60, 'test_examples': 50},
    'train': {'epochs': 2, 'batch_size': 10},
    'grid': {
        'method': ['random', {'name': 'magnitude', 'label': 'by size / "β"', 'start': 1}],
        'compression': [1, 5],
        'seed': [0, 1],
    },
    'record': {'every': 2, 'evaluate': True, 'rounds': True},
    'engine': {'chunk': 3},
}


def needs(to):
    """Skips where the package is not installed."""
    if importlib.util.find_spec(PACKAGES[to]) is None:
        pytest.skip(f"needs pip install 'jaxprune[{to}]'")


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A finished sweep, never changed by a test, and its results."""
    out = tmp_path_factory.mktemp('sweep') / 'out'
    with nothing_trained():
        return out, jp.run_sweep(TABLE, out)


def records(content):
    """The records of a file of TensorBoard: length, checksum, data, checksum."""
    at = 0
    while at < len(content):
        (length,) = struct.unpack_from('<Q', content, at)
        yield content[at + 12 : at + 12 + length]
        at += length + 16


def read_tensorboard(where):
    """Run -> scalars [(tag, step, value)], and its settings."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    found = {}
    for folder in where.iterdir():
        (path,) = folder.iterdir()
        scalars, config = [], {}
        for record in records(path.read_bytes()):
            event = Event.FromString(record)
            for value in event.summary.value:
                if value.tag == '_hparams_/session_start_info':
                    content = value.metadata.plugin_data.content
                    told = HParamsPluginData.FromString(content).session_start_info.hparams
                    config = {k: getattr(v, v.WhichOneof('kind')) for k, v in told.items()}
                elif not value.tag.startswith('_hparams_'):
                    scalars.append((value.tag, event.step, value.simple_value))
        found[folder.name.rpartition('-')[2]] = scalars, config
    return found


def pieces(content):
    """The records of a file of W&B: LevelDB's log, with a header of seven bytes."""
    at, block, whole = 7, 32768, b''
    while at + 7 <= len(content):
        if (left := block - at % block) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from('<IHB', content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b''


def read_wandb(where):
    """Run -> scalars [(tag, step, value)], and its settings."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = {}
    for path in where.glob('wandb/offline-run-*/run-*.wandb'):
        scalars, config = [], {}
        for piece in pieces(path.read_bytes()):
            record = Record.FromString(piece)
            if record.WhichOneof('record_type') == 'run':
                config |= {
                    item.key: json.loads(item.value_json) for item in record.run.config.update
                }
            for item in record.history.item:
                name = item.key or '/'.join(item.nested_key)
                if not name.startswith('_'):
                    value = json.loads(item.value_json)
                    scalars.append((name, record.history.step.num, float(value)))
        run = path.name.removeprefix('run-').removesuffix('.wandb')
        assert run not in found, 'a run is there twice'
        found[run] = scalars, config
    return found


READ = {'tensorboard': read_tensorboard, 'wandb': read_wandb}


def expected(out):
    """Run -> scalars, from the tables by hand."""
    found = {}
    for row in store.read_results(out).iter_rows(named=True):
        for name in ('epoch', 'train_loss', 'test_loss', 'test_accuracy'):
            found.setdefault(row['run_id'], []).append((name, row['step'], row[name]))
    seen = set()
    for row in store.read_curves(out).sort('rounds', maintain_order=True).iter_rows(named=True):
        place = row['run_id'], row['step']
        kind = 'curves_after_rounds' if place in seen else 'curves'
        seen.add(place)
        for name in ('rounds', 'train_loss', 'test_loss', 'test_accuracy'):
            found[row['run_id']].append((f'{kind}/{name}', row['step'], row[name]))
    return {run: [p for p in points if p[2] is not None] for run, points in found.items()}


def check_equal(read, out):
    """Every scalar of every run: once, at its step, as exact as float32 is."""
    wanted = expected(out)
    assert read.keys() == wanted.keys()
    for run, points in wanted.items():
        scalars = sorted(read[run][0])
        assert [p[:2] for p in scalars] == [p[:2] for p in sorted(points)]
        np.testing.assert_array_equal(
            np.float32([p[2] for p in scalars]), np.float32([p[2] for p in sorted(points)])
        )


@pytest.mark.parametrize('to', SINKS)
def test_every_scalar_is_read_back_once(finished, tmp_path, to):
    """Expectation: the numbers of the tables, also after a second call, which adds nothing."""
    needs(to)
    out, results = finished
    assert log_sweep(out, to, tmp_path / 'logs') == Logged(tmp_path / 'logs', 6, 6)
    read = READ[to](tmp_path / 'logs')
    check_equal(read, out)
    last = results.filter(pl.col('step') == pl.col('step').max())
    for row in last.iter_rows(named=True):
        config = read[row['run_id']][1]
        for name in ('label', 'seed', 'target_compression', 'density', 'learning_rate', 'dataset'):
            assert config[name] == row[name], name
        assert 'latency_ratio' not in config  # nobody knows it
    assert log_sweep(out, to, tmp_path / 'logs').added == 0
    check_equal(READ[to](tmp_path / 'logs'), out)


@pytest.mark.parametrize('to', SINKS)
def test_an_unfinished_sweep_is_added_to(finished, copied, to):
    """Expectation: the runs of finished chunks, then the others; half a log is written anew."""
    needs(to)
    out, _ = finished
    where = copied / 'logs' / to
    chunk = store.chunk_ids(copied)[0]
    results = store.results_path(copied, chunk).read_bytes()
    store.results_path(copied, chunk).unlink()
    assert log_sweep(copied, to) == Logged(where, 3, 3)
    check_equal(READ[to](where), copied)
    store.results_path(copied, chunk).write_bytes(results)
    run = store.read_plan(copied)['chunks'][0]['runs'][0]
    if to == 'wandb':  # as a process that was killed leaves it
        half = where / 'wandb' / f'offline-run-20260101_000000-{run}'
        half.mkdir()
        (half / f'run-{run}.wandb').write_bytes(b'half a log')
    assert log_sweep(copied, to) == Logged(where, 6, 3)
    check_equal(READ[to](where), out)


def test_tensorboard_itself_reads_the_logs(finished, tmp_path):
    """Expectation: the numbers of the tables by TensorBoard's own reader."""
    needs('tensorboard')
    accumulator = pytest.importorskip(
        'tensorboard.backend.event_processing.event_accumulator', reason='needs tensorboard'
    )
    log_sweep(finished[0], 'tensorboard', tmp_path)
    read = {}
    for folder in tmp_path.iterdir():
        events = accumulator.EventAccumulator(str(folder)).Reload()
        scalars = [
            (tag, event.step, event.value)
            for tag in events.Tags()['scalars']
            for event in events.Scalars(tag)
        ]
        read[folder.name.rpartition('-')[2]] = scalars, {}
    check_equal(read, finished[0])


def test_values_that_are_no_numbers(finished):
    """Expectation: by hand: null is left out, NaN and what is infinite are not."""
    _, results = finished
    run = results['run_id'][0]
    rows = results.filter(pl.col('run_id') == run).with_columns(
        train_loss=pl.lit(None, pl.Float64), test_loss=math.nan, effective_compression=math.inf
    )
    (log,) = run_logs('x', rows, pl.DataFrame(schema=store.CURVES), [run])
    assert all(math.isnan(values['test_loss']) for _, values in log.points)
    assert not any('train_loss' in values for _, values in log.points)
    assert log.config['effective_compression'] == math.inf


def test_what_cannot_be_is_told(finished, tmp_path, monkeypatch):
    """Expectation: one line for a name, a directory and a package; nothing is written."""
    with pytest.raises(StoreError, match="unknown sink 'tensorbord': did you mean 'tensorboard'"):
        log_sweep(finished[0], 'tensorbord')
    with pytest.raises(StoreError, match='is not a sweep directory'):
        log_sweep(tmp_path, 'wandb')
    for to, package in PACKAGES.items():
        for name in [package, *(name for name in sys.modules if name.startswith(f'{package}.'))]:
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(StoreError, match=rf"pip install 'jaxprune\[{to}\]'") as caught:
            log_sweep(finished[0], to, tmp_path / 'logs')
        assert '\n' not in str(caught.value)
    assert not list(tmp_path.iterdir())
