"""`jaxprune chunk`, `merge` and sweeps that several processes share: exit codes, signals, values.

Expectation: the tables of a sweep that one process trained, value for value.
"""

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import tomli_w
from fake_engine import nothing_trained
from polars.testing import assert_frame_equal

import jaxprune as jp
from jaxprune import files
from jaxprune.errors import StoreError
from jaxprune.sweep import plan_sweep, run_chunks, store
from jaxprune.sweep.attempts import attempt, attempts_of, taken
from jaxprune.sweep.load import make_spec
from jaxprune.sweep.merge import merge

TABLE = {
    'name': 'chunks',
    'model': {'name': 'mlp', 'widths': [16]},
    'data': {'name': 'mnist_small', 'train_examples': 400, 'test_examples': 100},
    'train': {'epochs': 3, 'batch_size': 40, 'momentum': 0.9},
    'prune': {'samples_per_class': 1},
    'grid': {'method': ['magnitude', 'snip'], 'compression': [1, 10], 'seed': [0, 1, 2]},
    'record': {'every': 5, 'flow': ['weight_norm']},
    'engine': {'chunk': 4, 'batching': 'map'},
}
READ = (store.read_results, store.read_layers, store.read_curves, store.read_flow)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """A directory that one process trained, on an engine that trains nothing."""
    out = tmp_path_factory.mktemp('whole') / 'out'
    with nothing_trained():
        jp.run_sweep(TABLE, out)
    return out


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A directory that one process trained."""
    out = tmp_path_factory.mktemp('trained') / 'out'
    jp.run_sweep(TABLE, out)
    return out


def same(out, other):
    for read in READ:
        assert_frame_equal(read(out), read(other), check_exact=True)


@nothing_trained()
def test_chunks_in_any_order_are_the_sweep(whole, tmp_path, command):
    """By index, by id, again, and all that are left; the plan is that of the sweep."""
    out = tmp_path / 'out'
    plan = plan_sweep(make_spec(TABLE), out)
    assert (out / 'plan.json').read_bytes() == (whole / 'plan.json').read_bytes()
    assert command('chunk', out, '--index', '2')[:2] == (0, 'finished\n')
    assert command('chunk', out, plan['chunks'][0]['id'])[:2] == (0, 'finished\n')
    assert command('chunk', out, '--index', '0')[:2] == (0, 'finished before\n')
    assert store.finished_chunks(out) == {plan['chunks'][i]['id'] for i in (0, 2)}
    assert command('chunk', out, '--all')[:2] == (0, 'finished\n')
    same(out, whole)
    assert [r['state'] for r in attempts_of(out, plan['chunks'][0]['id'])] == ['finished']


@pytest.mark.parametrize(
    ('arguments', 'says'),
    [
        (['--index', '9'], 'has chunks 0 to 2, not 9'),
        (['--index', '-1'], 'has chunks 0 to 2, not -1'),
        (['nonsense'], "has no chunk 'nonsense': the first one is '"),
        ([], 'give an id, --index N or --all'),
        (['--index', '0', '--all'], 'give an id, --index N or --all'),
        (['--all', '--processes', '2'], 'need --process or JAX_PROCESS_ID, not nothing'),
        (['--all', '--grace', '-1'], '--grace: must be at least 0, not -1'),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(whole, command, arguments, says):
    code, out, err = command('chunk', whole, *arguments)
    assert (code, out) == (2, '') and says in err and err.count('\n') == 1


@pytest.mark.parametrize(
    ('arguments', 'says'),
    [
        (['--per-job', '0'], '--per-job: must be at least 1, not 0'),
        (['--on', 'slurm', '--at-once', '-1'], '--at-once: must be at least 0, not -1'),
        (['--on', 'ray', '--cpus', '-1'], '--cpus: must be at least 0, not -1'),
        (['--gpus', '1'], '--gpus: needs --on ray or --on slurm'),
        (['--on', 'slurm', '--tpus', '4'], '--tpus: needs --on ray'),
        (['--on', 'ray', '--slurm', 'time=1'], '--slurm: needs --on slurm'),
        (['--on', 'slurm', '--slurm', '=low'], "--slurm: write '=low' like partition=low"),
    ],
)
def test_options_of_engines_are_checked(tmp_path, command, arguments, says):
    (tmp_path / 'spec.toml').write_text(tomli_w.dumps(TABLE))
    code, _, err = command('sweep', tmp_path / 'spec.toml', '--out', tmp_path / 'out', *arguments)
    assert code == 2 and says in err and err.count('\n') == 1
    assert not (tmp_path / 'out').exists()


@nothing_trained()
def test_faults_and_mistakes_have_their_exit_codes(tmp_path, command):
    """No sweep there: a mistake. A file that cannot be written, where another try may work: 1, and
    the attempt says why."""
    out = tmp_path / 'out'
    assert command('chunk', out, '--index', '0')[0] == 2
    plan = plan_sweep(make_spec(TABLE), out)
    (out / 'layers').write_text('in the way')
    code, _, err = command('chunk', out, '--index', '0')
    assert code == 1 and 'cannot be written' in err
    [record] = attempts_of(out, plan['chunks'][0]['id'])
    assert record['state'] == 'failed' and 'cannot be written' in record['error']
    line = command('status', out)[1]
    assert re.search(r'chunk \w+, 4 runs: failed on .*cannot be written', line)
    (out / 'layers').unlink()
    assert command('chunk', out, '--index', '0')[0] == 0


@nothing_trained()
def test_two_sweeps_of_one_plan_are_united(whole, tmp_path, command):
    """Each has a part, one chunk is in both; another sweep, and other chunks, are refused."""
    places = [tmp_path / name for name in ('one', 'two')]
    for place, chunks in zip(places, ((0, 1), (1, 2)), strict=True):
        plan_sweep(make_spec(TABLE), place)
        for index in chunks:
            run_chunks(place, index)
    code, out, _ = command('merge', *places, '--out', tmp_path / 'all')
    assert code == 0 and '3 of 3 chunks finished' in out
    same(tmp_path / 'all', whole)
    assert store.read_provenance(tmp_path / 'all')['seeds'] == [0, 1, 2]
    for changes, says in (
        ({'train': {'epochs': 1}}, 'holds another sweep than'),
        ({'engine': {'chunk': 3}}, 'has other chunks than'),
    ):
        other = tmp_path / says
        plan_sweep(make_spec({**TABLE, **changes}), other)
        with pytest.raises(StoreError, match=says):
            merge([places[0], other], tmp_path / 'never')
        assert not (tmp_path / 'never').exists()
    with pytest.raises(StoreError, match='two directories or more'):
        merge(places[:1], tmp_path / 'never')


@nothing_trained()
def test_merge_goes_on_and_passes_broken_copies(whole, tmp_path, command):
    """Expectation: a chunk that one directory has broken comes from the other; one that all have
    broken is named and left out; called again, what is missing is added."""
    places = [tmp_path / name for name in ('one', 'two')]
    for place in places:
        shutil.copytree(whole, place)
    first, second, _ = store.chunk_ids(whole)
    for place, chunk in ((places[0], first), (places[0], second), (places[1], second)):
        store.results_path(place, chunk).write_bytes(b'PAR1')
    code, out, _ = command('merge', *places, '--out', tmp_path / 'all')
    assert code == 0 and '2 of 3 chunks finished' in out
    assert re.search(rf'broken: .*{second}.parquet: cannot be read', out)
    shutil.copy(store.results_path(whole, second), store.results_path(places[1], second))
    assert merge(places, tmp_path / 'all') == (3, 3, ())
    same(tmp_path / 'all', whole)
    with pytest.raises(StoreError, match='is one of the directories to unite'):
        merge(places, places[0])


def test_one_of_two_that_start_at_once_goes_on(tmp_path):
    """Expectation: both see each other and the first name goes on; whoever comes later leaves
    too; the chunk is free once the one at work has ended."""
    with attempt(tmp_path, 'chunk', {}) as first, attempt(tmp_path, 'chunk', {}) as second:
        assert not second.claim() and first.claim()
        with attempt(tmp_path, 'chunk', {}) as third:
            assert not third.claim()
        assert taken(tmp_path, 'chunk')
    assert not taken(tmp_path, 'chunk')
    states = [record['state'] for record in attempts_of(tmp_path, 'chunk')]
    assert states == ['finished', 'left to another', 'left to another']
    with attempt(tmp_path, 'chunk', {}) as again:
        assert again.claim()


def test_clocks_that_differ_do_not_hide_a_sign_of_life(tmp_path, monkeypatch):
    """The clock of this machine is an hour ahead of the disk's; without a look at the disk's clock,
    the other attempt would count as lost. Another machine's process id says nothing here."""
    record = {'state': 'running', 'machine': 'ffffffff', 'process': 1}
    store.write_json(tmp_path / 'attempts' / 'chunk' / '2026-other.json', record)
    now = time.time
    monkeypatch.setattr(time, 'time', lambda: now() + 3600)
    assert abs(files.clock_ahead(tmp_path) + 3600) < 2
    assert not taken(tmp_path, 'chunk') and taken(tmp_path, 'chunk', files.clock_ahead(tmp_path))
    with attempt(tmp_path, 'chunk', {}) as mine:
        assert not mine.claim()
    assert not list(tmp_path.glob('.clock*'))


def test_a_disk_without_second_names_takes_results(tmp_path, monkeypatch):
    """Expectation: as on a mounted bucket, which refuses hard links: the first file stays."""

    def refused(*_):
        raise PermissionError(errno.EPERM, 'Operation not permitted')

    monkeypatch.setattr(os, 'link', refused)
    path = tmp_path / 'file'
    assert files.create_whole(path, b'one') and not files.create_whole(path, b'two')
    assert path.read_bytes() == b'one' and [p.name for p in tmp_path.iterdir()] == ['file']


def started(*arguments, log, **environment):
    return subprocess.Popen(
        [sys.executable, '-m', 'jaxprune', *map(str, arguments)],
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
    )


@pytest.mark.script
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_saves_the_chunk_and_another_process_goes_on(tmp_path, number):
    """Exit code 75 within the grace time, at the end of an epoch; nothing is trained twice."""
    table = {**TABLE, 'train': {**TABLE['train'], 'epochs': 400}, 'record': {}}
    table['grid'] = {'method': ['snip'], 'compression': [10], 'seed': [0, 1, 2]}
    out = tmp_path / 'out'
    plan = plan_sweep(make_spec(table), out)
    chunk = plan['chunks'][0]['id']
    with open(tmp_path / 'log', 'w+') as log:
        process = started('chunk', out, chunk, log=log, JAXPRUNE_CACHE_DIR=str(tmp_path))
        until = time.monotonic() + 120
        while time.monotonic() < until and not any(
            record.get('done') for record in attempts_of(out, chunk)
        ):
            time.sleep(0.05)
        process.send_signal(number)
        sent = time.monotonic()
        assert process.wait(60) == 75, (log.seek(0), log.read())
        assert time.monotonic() - sent < 25
        log.seek(0)
        assert re.search(r'interrupted and saved after [\d,]+ steps', log.read())
    [record] = attempts_of(out, chunk)
    assert record['state'] == 'interrupted' and not store.finished(out, chunk)
    run_chunks(out, 0)
    second = attempts_of(out, chunk)[-1]
    assert second['state'] == 'finished' and not (out / 'checkpoints' / chunk).exists()
    jp.run_sweep(table, tmp_path / 'whole')
    same(out, tmp_path / 'whole')
    assert 0 < store.read_timing(out)['run_steps'] < 3 * 400 * 10


@pytest.mark.script
def test_two_coordinators_share_the_work(trained, tmp_path):
    """Two `jaxprune sweep` of one directory at once: each chunk is finished, both succeed."""
    (tmp_path / 'spec.toml').write_text(tomli_w.dumps(TABLE))
    out = tmp_path / 'out'
    with open(tmp_path / 'log', 'w+') as log:
        both = [started('sweep', tmp_path / 'spec.toml', '--out', out, log=log) for _ in range(2)]
        codes = [process.wait(300) for process in both]
        log.seek(0)
        assert codes == [0, 0], log.read()
    same(out, trained)
    assert len(store.read_provenance(out)['sessions']) == 2
    assert not list(out.rglob('*.tmp'))


@pytest.mark.script
def test_several_processes_train_one_chunk(trained, tmp_path):
    """Two processes of two devices each, joined by `jax.distributed`; a variable of a former
    allocation does no harm. When one is killed the other ends too, and the chunk starts again."""
    out = tmp_path / 'out'
    plan = plan_sweep(make_spec(TABLE), out)
    chunk = plan['chunks'][0]

    def both(*, killed=False, asked=False):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        environment = {
            'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
            'MEGASCALE_COORDINATOR_ADDRESS': 'gone:1',
            'JAX_NUM_PROCESSES': '2',
            'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}',
        }
        before = len(attempts_of(out, chunk['id']))
        logs = [open(tmp_path / f'log{n}', 'w+') for n in range(2)]  # noqa: SIM115
        pair = [
            started('chunk', out, chunk['id'], log=log, JAX_PROCESS_ID=str(n), **environment)
            for n, log in enumerate(logs)
        ]
        if killed or asked:
            while len(attempts_of(out, chunk['id'])) == before and pair[0].poll() is None:
                time.sleep(0.05)
            # One of them is asked, and both leave.
            pair[1].send_signal(signal.SIGKILL if killed else signal.SIGTERM)
        codes = [process.wait(300) for process in pair]
        for log in logs:
            log.seek(0)
        return codes, [log.read() for log in logs]

    codes, _ = both(killed=True)
    assert all(codes) and not store.finished(out, chunk['id'])
    codes, logs = both(asked=True)
    assert codes == [75, 75], logs
    codes, logs = both()
    assert codes == [0, 0], logs
    assert 'MEGASCALE_COORDINATOR_ADDRESS of another allocation left out' in logs[0]
    ours, theirs = store.read_results(out), store.read_results(trained)
    assert len(ours) == len(chunk['runs']) * 3
    assert_frame_equal(ours, theirs.filter(theirs['run_id'].is_in(chunk['runs'])), check_exact=True)


@pytest.mark.script
def test_processes_that_do_not_meet_end_with_a_line():
    code = (
        'from jaxprune.sweep.processes import Processes, meet\n'
        "meet(Processes(2, 1, '127.0.0.1:9'), 3)"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    assert done.returncode and time.monotonic() - began < 60
    assert 'did not meet at 127.0.0.1:9 in 3 s' in done.stderr


def test_a_plan_on_disk_is_a_plan(whole):
    """Expectation: what `open_sweep` returns is what another session reads."""
    stored = json.loads((whole / 'plan.json').read_text())
    with nothing_trained():
        assert plan_sweep(make_spec(TABLE), whole) == stored
