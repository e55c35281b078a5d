"""Chunks as jobs of a real SLURM of two nodes: preempted, killed, split into arrays, taken over.

Most tests need root and Debian's packages slurm-wlm and munge, and the extra `slurm`. Run them with
`pytest -m fleet -n0 tests/test_slurm.py`. A stub with the exit codes of `jaxprune chunk` does the
work: each of its steps takes a fifth of a second. A stub that starts from a saved state takes five
more steps.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from slurm_nodes import answer, cluster, kill_node, preempt, shared_cluster, slurm_testbed, wait

from jaxprune.errors import JaxpruneError
from jaxprune.fleet import slurm
from jaxprune.fleet.launcher import Resources, Task

CORES = Resources()
STUB = """
import glob, json, os, signal, sys, time
place, chunk, steps, code = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
stop = []
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda *_: stop.append(1))
state = f'{place}/{chunk}.state'
step = 0
if os.path.exists(state):
    step = int(open(state).read())
    steps = step + 5

def say(what):
    names = ['SLURM_JOB_ID', 'SLURMD_NODENAME', 'XLA_FLAGS', 'CUDA_VISIBLE_DEVICES']
    line = {'what': what, 'step': step, 'at': time.time(), **{n: os.environ.get(n) for n in names}}
    ends = glob.glob(f'{place}/slurm/*/exits/{chunk}.json')
    line['before'] = [json.load(open(end))['reason'] for end in ends]
    with open(f'{place}/{chunk}.log', 'a') as log:
        log.write(json.dumps(line) + '\\n')

say('start')
while step < steps:
    time.sleep(0.2)
    step += 1
    if stop:
        with open(state, 'w') as file:
            file.write(str(step))
        say('saved')
        sys.exit(75)
say('end')
sys.exit(code)
"""

#: Steps of a chunk that only a signal ends: 200 seconds, longer than a test waits.
ENDLESS = 1000


@pytest.fixture
def sweep(tmp_path):
    """Makes launchers and tasks of the stub, and reads what the stub wrote."""
    (tmp_path / 'stub.py').write_text(STUB)

    def launcher(resources=CORES, options=(), **settings):
        return slurm.slurm_launcher(
            tmp_path, resources, {'partition': 'low', **dict(options)}, **settings
        )

    def task(chunk, steps=2, code=0):
        command = sys.executable, str(tmp_path / 'stub.py'), str(tmp_path), chunk, steps, code
        return Task(chunk, tuple(map(str, command)))

    def log(chunk):
        path = tmp_path / f'{chunk}.log'
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return types.SimpleNamespace(place=tmp_path, launcher=launcher, task=task, log=log)


def _whats(log):
    return [line['what'] for line in log]


def _until_ended(launcher, count, seconds):
    """Collects what ends until so many chunks have; fails if a chunk is told twice."""
    found = {}
    until = time.monotonic() + seconds
    while len(found) < count:
        assert time.monotonic() < until, answer('squeue', '--states=all', '-o', '%i %T %r %N')
        for end in launcher.ended():
            assert end.chunk not in found
            found[end.chunk] = end
        time.sleep(0.5)
    return found


def _codes(found):
    return {chunk: end.code for chunk, end in found.items()}


@pytest.mark.fleet
def test_chunks_run_on_both_nodes(cluster, sweep):
    launcher = sweep.launcher()
    launcher.submit([sweep.task(f'c{i}', steps=15) for i in range(4)])
    found = _until_ended(launcher, 4, 60)
    assert _codes(found) == {f'c{i}': 0 for i in range(4)}
    assert {sweep.log(chunk)[0]['SLURMD_NODENAME'] for chunk in found} == {'n1', 'n2'}
    assert launcher.held() == set()
    assert launcher.ended() == []


def _check_preempted(sweep, number, least=0):
    """Chunks of an array save when they are told to, are requeued, and go on where they were.

    Args:
      sweep: fixture.
      number: the signal that comes first.
      least: how many seconds after the other job it comes at the earliest.
    """
    launcher = sweep.launcher()
    launcher.submit([sweep.task('a', ENDLESS), sweep.task('b', ENDLESS)])
    wait(lambda: sweep.log('a') and sweep.log('b'), 30)
    time.sleep(1)
    preempt()
    asked = time.time()
    assert _codes(_until_ended(launcher, 2, 100)) == {'a': 0, 'b': 0}
    for log in (sweep.log('a'), sweep.log('b')):
        assert _whats(log) == ['start', 'saved', 'start', 'end']
        assert 0 < log[1]['step'] < ENDLESS
        assert log[2]['step'] == log[1]['step']
        assert log[2]['before'] == [f'interrupted by {number.name}']
        assert log[1]['at'] - asked >= least
        assert log[2]['SLURM_JOB_ID'] == log[0]['SLURM_JOB_ID']  # requeued, not submitted again


@pytest.mark.fleet
def test_preempted_chunk_saves_and_goes_on(cluster, sweep):
    _check_preempted(sweep, signal.SIGUSR2)


@pytest.mark.fleet
@pytest.mark.parametrize('grace', [pytest.param(8, marks=pytest.mark.slow), 0])
def test_preempted_where_only_sigterm_is_sent(sweep, tmp_path_factory, grace):
    """As most clusters are set up: a job without steps is told when its grace time is over.

    SLURM looks every half a minute whether it is. The job then has KillWait, ten seconds here.
    """
    place = tmp_path_factory.mktemp('plain')
    with slurm_testbed(place, USER_SIGNAL='0', GRACE=str(grace)):
        _check_preempted(sweep, signal.SIGTERM, least=grace)


@pytest.mark.fleet
@pytest.mark.slow  # test_slurm_sweep kills a node under a whole sweep
def test_chunk_of_a_killed_node_runs_on_the_other(cluster, sweep):
    launcher = sweep.launcher()
    launcher.submit([sweep.task('long', steps=30)])
    wait(lambda: sweep.log('long'), 30)
    node = sweep.log('long')[0]['SLURMD_NODENAME']
    with kill_node(cluster, node):
        assert _codes(_until_ended(launcher, 1, 120)) == {'long': 0}
        log = sweep.log('long')
        assert _whats(log) == ['start', 'start', 'end']
        assert log[1]['SLURMD_NODENAME'] != node


@pytest.mark.fleet
def test_long_arrays_are_split_and_few_jobs_run_at_once(cluster, sweep):
    launcher = sweep.launcher(at_once=2)
    launcher.submit([sweep.task(f'c{i}', steps=1) for i in range(12)])
    records = [json.loads(p.read_text())['jobs'] for p in (sweep.place / 'slurm').glob('*.json')]
    assert sorted(len(jobs) for jobs in records) == [2, 5, 5]
    found = _until_ended(launcher, 12, 120)
    assert set(_codes(found).values()) == {0}
    changes = []
    for chunk in found:
        start, end = sweep.log(chunk)
        changes += [(start['at'], 1), (end['at'], -1)]
    running = [sum(change for _, change in sorted(changes)[: i + 1]) for i in range(len(changes))]
    assert max(running) <= 2


@pytest.mark.fleet
def test_several_chunks_in_one_job(cluster, sweep):
    """A chunk that failed does not stop the others; none runs twice."""
    launcher = sweep.launcher(per_job=4)
    codes = {'a': 0, 'b': 2, 'c': 1, 'd': 75, 'e': 0}
    launcher.submit([sweep.task(chunk, code=code) for chunk, code in codes.items()])
    found = _until_ended(launcher, 5, 60)
    assert _codes(found) == codes
    assert 'exit 2' in found['b'].reason
    time.sleep(3)
    assert launcher.ended() == []
    assert all(_whats(sweep.log(chunk)) == ['start', 'end'] for chunk in codes)
    jobs = [sweep.log(chunk)[0]['SLURM_JOB_ID'] for chunk in 'abcd']
    assert len(set(jobs)) == 1
    assert sweep.log('e')[0]['SLURM_JOB_ID'] != jobs[0]
    assert answer('squeue', '-h') == ''
    states = answer('squeue', '-h', '--states=all', '-j', jobs[0], '-o', '%T')
    assert 'COMPLETED' not in states.splitlines()[0]  # work is left


@pytest.mark.fleet
def test_interrupted_job_skips_finished_chunks(cluster, sweep):
    launcher = sweep.launcher(per_job=2)
    launcher.submit([sweep.task('first', steps=1), sweep.task('second', ENDLESS)])
    wait(lambda: sweep.log('second'), 30)
    preempt()
    assert _codes(_until_ended(launcher, 2, 90)) == {'first': 0, 'second': 0}
    assert _whats(sweep.log('first')) == ['start', 'end']
    assert _whats(sweep.log('second')) == ['start', 'saved', 'start', 'end']


@pytest.mark.fleet
def test_second_coordinator_sees_what_the_first_left(cluster, sweep):
    program = f"""
import os, signal
from pathlib import Path
from jaxprune.fleet.launcher import Resources, Task
from jaxprune.fleet.slurm import slurm_launcher
launcher = slurm_launcher(Path({str(sweep.place)!r}), Resources(), dict(partition='low'))
launcher.submit([Task(*task) for task in {[tuple(sweep.task(c, 60)) for c in 'ab']!r}])
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, '-c', program]).returncode == -signal.SIGKILL
    second = sweep.launcher()
    assert second.held() == {'a', 'b'}
    second.submit([sweep.task('c')])
    assert _codes(_until_ended(second, 1, 30)) == {'c': 0}
    assert second.held() == {'a', 'b'}
    wait(lambda: not second.held(), 60)
    assert _whats(sweep.log('a')) == _whats(sweep.log('b')) == ['start', 'end']
    assert second.ended() == []  # they were another's


@pytest.mark.fleet
def test_close_cancels_and_lets_chunks_save(cluster, sweep):
    launcher = sweep.launcher(at_once=1)
    launcher.submit([sweep.task('runs', ENDLESS), sweep.task('waits', ENDLESS)])
    wait(lambda: sweep.log('runs'), 30)
    launcher.close()
    wait(lambda: not answer('squeue', '-h'), 15)
    assert _whats(sweep.log('runs')) == ['start', 'saved']
    assert sweep.log('waits') == []
    assert _codes(_until_ended(launcher, 2, 10)) == {'runs': 75, 'waits': None}


@pytest.mark.fleet
def test_cluster_that_does_not_requeue_is_reported(cluster, sweep, monkeypatch, capsys):
    """When jobs are submitted, and by the chunk that was interrupted."""
    answer = slurm._answer
    submitted = []

    def administrator(*command):
        if command[:3] == ('scontrol', 'show', 'job'):
            submitted.append(command[-1])
            subprocess.run(['scontrol', 'update', f'JobId={command[-1]}', 'Requeue=0'], check=True)
        return answer(*command)

    monkeypatch.setattr(slurm, '_answer', administrator)
    launcher = sweep.launcher()
    launcher.submit([sweep.task('long', ENDLESS)])
    assert f'SLURM will not requeue job {submitted[0]}' in capsys.readouterr().err
    wait(lambda: sweep.log('long'), 30)
    subprocess.run(['scancel', '--signal=USR2', '--batch', submitted[0]], check=True)
    end = _until_ended(launcher, 1, 30)['long']
    assert end.code == 75
    assert 'interrupted by SIGUSR2; not requeued: ' in end.reason


KILLED = 'kill -TERM $$'


@pytest.mark.parametrize(
    ('states', 'ends', 'said'),
    [
        # The signal ends scontrol after SLURM took the request.
        (['RUNNING', 'COMPLETING'], [KILLED], ''),
        # The signal ends scontrol before SLURM took it.
        (['RUNNING', 'RUNNING'], [KILLED, 'exit 0'], ''),
        # The signal ends squeue; then scontrol.
        ([KILLED, 'RUNNING'], ['exit 0'], ''),
        ([KILLED, KILLED, 'RUNNING', 'COMPLETING'], [KILLED], ''),
        # SLURM requeues the job by itself between the two commands.
        (['RUNNING', 'COMPLETING'], ['echo pending >&2; exit 1'], ''),
        # The user has cancelled the job, or it has left the queue.
        (['CANCELLED'], [], ''),
        ([''], [], ''),
        # Nothing helps.
        (['RUNNING'] * 4, ['echo denied >&2; exit 1'] * 3, 'not requeued: denied'),
        (['RUNNING'] * 4, ['exit 143'] * 3, 'not requeued: scontrol ended with 143'),
        ([KILLED] * 4, [], 'not requeued: SLURM does not answer'),
    ],
)
def test_signals_may_end_the_commands_of_slurm(tmp_path, monkeypatch, states, ends, said):
    """Scripts stand in for squeue and scontrol: each call does the next line of a list."""
    answers = [state if state == KILLED else f'echo {state}' for state in states]
    for name, lines in (('squeue', answers), ('scontrol', ends)):
        (tmp_path / f'{name}.list').write_text(''.join(f'{line}\n' for line in lines))
        command = tmp_path / name
        command.write_text(
            f'#!/bin/bash\ncd "$(dirname "$0")"\nline=$(head -n 1 {name}.list)\n'
            f'sed -i 1d {name}.list\necho "$@" >> {name}.calls\neval "${{line:?none is left}}"\n'
        )
        command.chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    for name, value in {'ARRAY_JOB_ID': '7', 'ARRAY_TASK_ID': '2', 'RESTART_COUNT': '1'}.items():
        monkeypatch.setenv(f'SLURM_{name}', value)
    assert slurm._requeue() == said
    assert (tmp_path / 'squeue.list').read_text() == (tmp_path / 'scontrol.list').read_text() == ''
    for name, call, count in (
        ('squeue', '-h -j 7_2 -o %T', len(states)),
        ('scontrol', 'requeue 7_2', len(ends)),
    ):
        calls = tmp_path / f'{name}.calls'
        assert (calls.read_text().splitlines() if calls.exists() else []) == [call] * count


@pytest.mark.fleet
def test_devices_are_those_that_slurm_gave(cluster, sweep, monkeypatch):
    monkeypatch.delenv('XLA_FLAGS', raising=False)
    on_cpu, on_gpu = sweep.launcher(Resources(cpus=2)), sweep.launcher(Resources(cpus=1, gpus=1))
    on_cpu.submit([sweep.task('cpu')])
    on_gpu.submit([sweep.task('gpu')])
    _until_ended(on_cpu, 1, 30)
    _until_ended(on_gpu, 1, 30)
    cpu, gpu = sweep.log('cpu')[0], sweep.log('gpu')[0]
    assert cpu['XLA_FLAGS'] == '--xla_force_host_platform_device_count=2'
    assert gpu['XLA_FLAGS'] is None
    assert gpu['CUDA_VISIBLE_DEVICES'] in ('0', '1')


@pytest.mark.fleet
def test_refused_submission_leaves_no_record(cluster, sweep):
    launcher = sweep.launcher(options={'partition': 'none'})
    with pytest.raises(JaxpruneError, match=r'^sbatch refused: .*invalid partition'):
        launcher.submit([sweep.task('a')])
    assert launcher.held() == set()
    assert list((sweep.place / 'slurm').glob('*.json')) == []


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'submitit', None)
    with pytest.raises(JaxpruneError, match=r"pip install 'jaxprune\[slurm\]'$"):
        slurm.slurm_launcher(tmp_path, Resources(), {})
    monkeypatch.setitem(sys.modules, 'submitit', types.ModuleType('submitit'))
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(JaxpruneError, match=r'^no sbatch .*login node'):
        slurm.slurm_launcher(tmp_path, Resources(), {})


@pytest.mark.parametrize(
    ('resources', 'options', 'message'),
    [
        (Resources(tpus=4), {}, 'SLURM gives no TPUs'),
        (Resources(), {'array': '0-3'}, 'jaxprune itself gives sbatch: array'),
        (Resources(), {'job-name': 'x'}, 'jaxprune itself gives sbatch: job_name'),
    ],
)
def test_options_that_cannot_be(resources, options, message):
    with pytest.raises(JaxpruneError, match=message):
        slurm._check(resources, options)


def test_number_of_devices_is_left_alone_where_set():
    cores = {'SLURM_CPUS_ON_NODE': '3'}
    count = '--xla_force_host_platform_device_count'
    assert slurm._environment({**cores}, True)['XLA_FLAGS'] == f'{count}=3'
    assert slurm._environment({**cores, 'XLA_FLAGS': '-a'}, True)['XLA_FLAGS'] == f'-a {count}=3'
    for environment in ({'XLA_FLAGS': f'{count}=7'}, {'JAX_NUM_CPU_DEVICES': '1'}):
        assert slurm._environment({**cores, **environment}, True) == {**cores, **environment}
    assert slurm._environment(cores, False) == cores


def test_users_own_way_of_asking_for_gpus():
    ask = Resources(gpus=1)
    assert slurm._parameters(ask, {}, 60, 1, '')['gpus_per_node'] == 1
    for options in ({'gres': 'gpu:a100:1'}, {'gpus-per-task': '1'}):
        assert slurm._parameters(ask, options, 60, 1, '')['gpus_per_node'] is None
