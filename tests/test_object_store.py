"""Sweeps whose directory is in an object store: a server of S3 on this machine.

Expectation: the tables of a sweep on a disk, value for value, and one winner of every race.
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_engine import nothing_trained
from fleet_sweeps import CHUNKS, TABLE
from polars.testing import assert_frame_equal

import jaxprune as jp
from jaxprune import files, report
from jaxprune.errors import WriteError
from jaxprune.sweep import plan_sweep, run_chunks, status, store
from jaxprune.sweep.load import make_spec

pytestmark = pytest.mark.fleet


@pytest.fixture(scope='module')
def bucket():
    """The address of an empty bucket."""
    server = pytest.importorskip('moto.server').ThreadedMotoServer(port=0, verbose=False)
    pytest.importorskip('s3fs')
    import boto3

    server.start()
    with pytest.MonkeyPatch.context() as patch:
        _, port = server.get_host_and_port()
        patch.setenv('AWS_ENDPOINT_URL', f'http://127.0.0.1:{port}')
        patch.setenv('AWS_ACCESS_KEY_ID', 'somebody')
        patch.setenv('AWS_SECRET_ACCESS_KEY', 'secret')
        patch.setenv('AWS_DEFAULT_REGION', 'us-east-1')
        boto3.client('s3').create_bucket(Bucket='sweeps')
        yield 's3://sweeps'
    server.stop()


@pytest.mark.parametrize('number', range(3))
def test_one_of_eight_writers_wins(bucket, tmp_path, number):
    """In a store and on a disk; the others are told so, and what stands is the winner's."""
    for place in (f'{bucket}/race{number}', tmp_path):
        path = files.place(place) / 'results' / 'chunk.parquet'
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda i, p=path: files.create_whole(p, bytes([i])), range(8)))
        assert sum(won) == 1
        assert path.read_bytes() == bytes([won.index(True)])
        assert [p.name for p in path.parent.iterdir()] == ['chunk.parquet']


@nothing_trained()
def test_a_whole_sweep_is_the_one_on_a_disk(bucket, tmp_path):
    """Results, report, status, chunk by chunk, and a second call that trains nothing."""
    out = f'{bucket}/whole/deeper'
    expected = jp.run_sweep(TABLE, tmp_path / 'out')
    plan_sweep(make_spec(TABLE), out)
    assert run_chunks(out, 1) == 1
    place = store.place(out)
    assert len(store.finished_chunks(place)) == 1
    assert_frame_equal(jp.run_sweep(TABLE, out), expected, check_exact=True)
    for read in (store.read_layers, store.read_plan):
        ours, theirs = read(place), read(tmp_path / 'out')
        assert ours.equals(theirs) if hasattr(ours, 'equals') else ours == theirs
    assert status(place)['chunks_finished'] == CHUNKS
    assert report.write(out).exists()
    before = {p.name for p in (place / 'sessions').iterdir()}
    assert_frame_equal(jp.run_sweep(TABLE, out), expected, check_exact=True)
    assert len(before) == 2 and {p.name for p in (place / 'sessions').iterdir()} > before


@nothing_trained()
def test_mistakes_are_one_line(bucket):
    with pytest.raises(WriteError, match='bucket does not exist') as error:
        jp.run_sweep(TABLE, 's3://nobody/out')
    assert '\n' not in str(error.value)


def test_a_chunk_goes_on_from_a_checkpoint_in_the_store(bucket, tmp_path):
    """A worker is killed while it trains; another one goes on from what it packed."""
    out = f'{bucket}/killed'
    [chunk, *_] = plan_sweep(make_spec(TABLE), out)['chunks']
    folder = store.place(out) / 'checkpoints' / chunk['id']
    command = [sys.executable, '-m', 'jaxprune', 'chunk', out, chunk['id']]
    with open(tmp_path / 'log', 'w+') as log:
        first = subprocess.Popen(command, stdout=log, stderr=log, env=dict(os.environ))
        end = time.monotonic() + 120
        while not list(folder.glob('*/*/*.tar')) and first.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.2)
        first.kill()
        assert first.wait(), 'it had finished'
        assert run_chunks(out, chunk['id']) == 1
    assert not folder.exists()
    spent = store.read_json(store.timing_path(store.place(out), chunk['id']))
    assert 0 < spent['run_steps'] < 300 * 20 * len(chunk['runs'])
    expected = jp.run_sweep(TABLE, tmp_path / 'out')
    ours = store.read_results(store.place(out))
    theirs = expected.filter(expected['run_id'].is_in(chunk['runs']))
    assert_frame_equal(ours, theirs, check_exact=True)
