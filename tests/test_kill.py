"""SIGKILL at random moments, in a real process: nothing finished is lost, the result is the same.

The moments come from a seed that is printed; JAXPRUNE_KILL_SEED repeats a failure.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import polars as pl
import pytest
import tomli_w
from polars.testing import assert_frame_equal

from jaxprune.sweep import status, store

COMMAND = [sys.executable, '-c', 'import sys; from jaxprune.cli import main; sys.exit(main())']
TABLE = {
    'name': 'killed',
    'model': {'name': 'mlp', 'widths': [32]},
    'data': {'name': 'mnist_small', 'train_examples': 2000, 'test_examples': 200},
    'train': {'epochs': 4, 'batch_size': 50, 'momentum': 0.9},
    'prune': {'samples_per_class': 2},
    'grid': {
        'method': ['magnitude', {'name': 'synflow', 'rounds': 3}],
        'compression': [1, 5, 50],
        'seed': [0, 1, 2, 3],
    },
    'engine': {'chunk': 2},
}
CHUNKS = 10


@pytest.fixture(scope='module')
def sweep(tmp_path_factory):
    """Starts the sweep in a directory; compiled programs are kept, as only the writing matters."""
    place = tmp_path_factory.mktemp('kill')
    (place / 'spec.toml').write_text(tomli_w.dumps(TABLE))
    environment = {
        **os.environ,
        'JAX_COMPILATION_CACHE_DIR': str(place / 'compiled'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '0',
    }

    def start(out, log):
        return subprocess.Popen(
            [*COMMAND, 'sweep', str(place / 'spec.toml'), '--out', str(out)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )

    return start


@pytest.fixture(scope='module')
def uninterrupted(sweep, tmp_path_factory):
    """Directory of a sweep that nothing disturbed."""
    out = tmp_path_factory.mktemp('uninterrupted') / 'out'
    _complete(sweep, out)
    return out


def _complete(sweep, out):
    with open(out.with_suffix('.log'), 'w+') as log:
        code = sweep(out, log).wait(timeout=300)
        log.seek(0)
        assert code == 0, log.read()


def _kill_once(sweep, out, draw):
    """Starts, waits for a random moment, kills; returns whether there was something to kill."""
    before = _files(out)
    with open(out.with_suffix('.log'), 'w+') as log:
        process = sweep(out, log)
        # Some moments anywhere, most close to a write: where the damage could be.
        wait_for = draw.choice([None, 0, 1, 1, 2, 3])
        if wait_for is None:
            until = time.monotonic() + draw.uniform(0, 5)
            while process.poll() is None and time.monotonic() < until:
                time.sleep(0.005)
        else:
            new = 0
            while process.poll() is None and new < wait_for * 2 + 1:
                new = len(set(out.rglob('*.tmp')) | set(out.rglob('*.parquet')) - before.keys())
                time.sleep(0.0005)
            time.sleep(draw.choice([0, draw.uniform(0, 0.01), draw.uniform(0, 0.2)]))
        alive = process.poll() is None
        process.send_signal(signal.SIGKILL)
        code = process.wait()
        log.seek(0)
        assert code == -signal.SIGKILL or not alive, log.read()
        if not alive:
            assert code == 0, log.read()
    return alive


def _files(out):
    """Every finished table, and when it was written."""
    return {path: path.stat().st_mtime_ns for path in out.rglob('*.parquet')}


def _check_whole(out):
    """Whatever a reader can see is whole."""
    for path in out.rglob('*.parquet'):
        assert pl.read_parquet(path, glob=False).height > 0
    for path in out.glob('*.json'):
        json.loads(path.read_text())
    if (out / 'plan.json').exists():
        results, layers = store.read_results(out), store.read_layers(out)
        assert set(results['run_id']) == set(layers['run_id'])
        assert not results.select('run_id', 'epoch').is_duplicated().any()
        assert not status(out)['running'], 'an attempt outlived its process'


def _compare(out, other):
    for read in (store.read_results, store.read_layers):
        assert_frame_equal(read(out), read(other), check_exact=True)
    for name in ('spec.toml', 'plan.json'):
        assert (out / name).read_bytes() == (other / name).read_bytes()
    assert not list(out.rglob('*.tmp'))
    assert (out / 'report.html').exists()


def _kill_and_resume(sweep, uninterrupted, out, kills):
    seed = int(os.environ.get('JAXPRUNE_KILL_SEED') or random.SystemRandom().randrange(2**32))
    print(f'JAXPRUNE_KILL_SEED={seed}')
    draw = random.Random(seed)
    for _ in range(kills):
        before = _files(out)
        alive = _kill_once(sweep, out, draw)
        _check_whole(out)
        after = _files(out)
        print(f'killed with {len(after)} of {2 * CHUNKS} tables written, {len(before)} before')
        finished = {p for p in before if p.parent.name == 'results'}
        assert finished <= after.keys(), 'something finished was lost'
        assert all(after[p] == before[p] for p in finished), 'something finished was run again'
        if not alive:
            break
    _complete(sweep, out)
    assert len(_files(out)) == 2 * CHUNKS
    _compare(out, uninterrupted)


@pytest.mark.script
def test_killed_sweep_ends_as_if_it_was_not(sweep, uninterrupted, tmp_path):
    _kill_and_resume(sweep, uninterrupted, tmp_path / 'out', kills=3)


@pytest.mark.slow
@pytest.mark.parametrize('attempt', range(5))
def test_killed_many_times(sweep, uninterrupted, tmp_path, attempt):
    _kill_and_resume(sweep, uninterrupted, tmp_path / 'out', kills=12)


@pytest.mark.script
def test_a_frozen_process_is_waited_for_until_it_is_killed(sweep, uninterrupted, tmp_path):
    """A second process leaves the chunk of a frozen one to it, as it gave a sign of life just now;
    when that is killed, the chunk is taken over."""
    out = tmp_path / 'out'
    with open(tmp_path / 'first.log', 'w') as log, open(tmp_path / 'second.log', 'w+') as second:
        first = sweep(out, log)
        while first.poll() is None and not list(out.glob('attempts/*/*.json')):
            time.sleep(0.01)
        os.kill(first.pid, signal.SIGSTOP)
        taken = next(out.glob('attempts/*/*.json')).parent.name
        other = sweep(out, second)
        try:
            until = time.monotonic() + 200
            while len(store.finished_chunks(out)) < CHUNKS - 1 and time.monotonic() < until:
                assert other.poll() is None
                os.utime(next(out.glob(f'attempts/{taken}/*.json')))  # a sign of life
                time.sleep(0.1)
            assert store.finished_chunks(out) == set(store.chunk_ids(out)) - {taken}
        finally:
            first.kill()
            first.wait()
        assert other.wait(timeout=120) == 0
    _compare(out, uninterrupted)
