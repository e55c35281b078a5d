"""An interrupted chunk goes on from its checkpoint and ends with the numbers of an undisturbed one.

Every expectation is the same chunk run without interruption, compared value for value.
"""

import os
import signal
import subprocess
import sys
import time

import jax
import pytest
import tomli_w
from polars.testing import assert_frame_equal

from jaxprune import data
from jaxprune.errors import StoreError
from jaxprune.sweep import make_spec, store
from jaxprune.sweep.checkpoint import checkpoint
from jaxprune.sweep.chunk import run_chunk
from jaxprune.sweep.engine import make_engine
from jaxprune.sweep.grid import runs
from jaxprune.sweep.program import device_data, make_program
from jaxprune.sweep.progress import ignored
from jaxprune.sweep.strategy import Strategy

#: Numbers are compared bit for bit, also with those of other processes.
pytestmark = pytest.mark.optimised


TABLE = {
    'name': 'saved',
    'model': {'name': 'mlp', 'widths': [16]},
    'data': {'name': 'mnist_small', 'train_examples': 500, 'test_examples': 200},
    'train': {'epochs': 5, 'batch_size': 50, 'optimizer': 'adam', 'learning_rate': 0.01},
    'prune': {'samples_per_class': 2},
    'grid': {
        'method': [
            'snip',
            # Pruned after epochs 1 and 2: before a checkpoint, and between it and what follows.
            {'name': 'gradient_norm', 'rounds': 3, 'after_epochs': 1, 'restart': True},
        ],
        'compression': [1, 5],
        'seed': [0],
    },
    # Evaluated after epochs 2, 4 and 5: a checkpoint after epoch 3 holds a loss yet to be averaged.
    'record': {'every_epochs': 2, 'every': 3, 'evaluate': True, 'flow': ['gradient_norm']},
}
ALWAYS = 1e-9  # minutes


class Interrupt(Exception):
    pass


@pytest.fixture(scope='module')
def parts():
    spec = make_spec(TABLE)
    members = runs(spec)
    program = make_program(spec, members[0].train)
    return spec, members, program, device_data(spec, data.load('mnist_small'))


def interrupted(after):
    """A listener that stops the chunk when so many run-steps have been told."""
    told = []

    def steps(count):
        told.append(count)
        if sum(told) >= after:
            raise Interrupt

    return ignored()._replace(steps=steps)


ONE = Strategy('map', 'scan', 'native', 1)


@pytest.mark.parametrize(
    ('strategy', 'first', 'second'),
    [
        (ONE, 2, 1),
        pytest.param(Strategy('unroll', 'host', 'native', 1), 1, 1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize('after', [2, 3, 5])
def test_a_chunk_goes_on_where_it_stopped(parts, tmp_path, strategy, first, second, after):
    """Three runs on two devices, then on one: padding is no part of a checkpoint."""
    spec, members, program, on_device = parts
    engines = {
        n: make_engine(strategy._replace(devices=n), program, on_device, jax.local_devices())
        for n in {first, second}
    }
    expected = run_chunk(spec, program, engines[second], members, 3)
    place = tmp_path / 'checkpoints' / 'chunk'
    with pytest.raises(Interrupt):
        run_chunk(
            spec,
            program,
            engines[first],
            members,
            3,
            shown=interrupted(after * program.steps * 3),
            saved=checkpoint(place, ALWAYS),
        )
    heard = {'resume': [], 'steps': []}
    shown = ignored()._replace(resume=heard['resume'].append, steps=heard['steps'].append)
    saved = checkpoint(place, ALWAYS)
    got = run_chunk(spec, program, engines[second], members, 3, shown=shown, saved=saved)
    for a, b in zip(got[:4], expected[:4], strict=True):
        assert len(a) and a.columns == b.columns
        assert_frame_equal(a, b, check_exact=True)
    assert got.timing['run_steps'] == 5 * program.steps * 3 - (after - 1) * program.steps * 3
    # The epoch that was told last is not yet saved.
    before = (after - 1) * program.steps * 3
    assert heard['resume'] == [before]
    assert sum(heard['steps']) == 5 * program.steps * 3 - before
    saved.remove()
    assert not place.exists()


def test_nothing_is_saved_before_its_time_or_at_zero_minutes(parts, tmp_path):
    spec, members, program, on_device = parts
    engine = make_engine(ONE, program, on_device, jax.local_devices())
    for minutes in (0, 10):
        run_chunk(spec, program, engine, members, 3, saved=checkpoint(tmp_path / 'c', minutes))
        assert not (tmp_path / 'c').exists()


def test_a_broken_checkpoint_is_told_in_one_line(parts, tmp_path):
    spec, members, program, on_device = parts
    engine = make_engine(ONE, program, on_device, jax.local_devices())
    place = tmp_path / 'c'
    with pytest.raises(Interrupt):
        run_chunk(
            spec,
            program,
            engine,
            members,
            3,
            shown=interrupted(2 * program.steps * 3),
            saved=checkpoint(place, ALWAYS),
        )
    for file in place.rglob('*'):
        if file.is_file():
            file.write_bytes(b'broken')
    with pytest.raises(StoreError, match='delete it') as error:
        run_chunk(spec, program, engine, members, 3, saved=checkpoint(place, ALWAYS))
    assert '\n' not in str(error.value)


@pytest.mark.script
def test_a_killed_process_goes_on_within_its_chunk(tmp_path):
    """SIGKILL while epochs are being saved; the only chunk is never finished before."""
    table = {**TABLE, 'engine': {'checkpoint_minutes': ALWAYS}}
    table['train'] = {**TABLE['train'], 'epochs': 40}
    (tmp_path / 'spec.toml').write_text(tomli_w.dumps(table))
    environment = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'compiled')}

    def start(out, **kwargs):
        command = 'import sys; from jaxprune.cli import main; sys.exit(main())'
        arguments = ['sweep', str(tmp_path / 'spec.toml'), '--out', str(out)]
        return subprocess.Popen(
            [sys.executable, '-c', command, *arguments],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    out = tmp_path / 'killed'
    kills = 0
    for wanted in (3, 9):
        process = start(out)
        until = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < until:
            saved = [int(p.name) for p in out.glob('checkpoints/*/*') if p.name.isdigit()]
            if max(saved, default=0) >= wanted:
                break
            time.sleep(0.002)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not list(out.glob('results/*.parquet'))
    assert kills == 2
    assert start(out).wait(timeout=300) == 0
    assert start(tmp_path / 'whole').wait(timeout=300) == 0
    for read in (store.read_results, store.read_layers):
        assert_frame_equal(read(out), read(tmp_path / 'whole'), check_exact=True)
    assert not (out / 'checkpoints').exists()
