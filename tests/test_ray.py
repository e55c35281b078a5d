"""Chunks through a real Ray cluster on this machine: nodes and processes are killed and frozen.

The command of a chunk is a stub that takes two seconds.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray_nodes import NODE, head, kill, needs_ray, processes, second, signal_node, until

from jaxprune.errors import JaxpruneError
from jaxprune.fleet.launcher import Ended, Resources, Task
from jaxprune.fleet.ray_cluster import ray_launcher

pytestmark = pytest.mark.fleet

#: Does a chunk in the directory: notes that it started, works, and takes the chunk if it is first.
STUB = f"""
import os, pathlib, signal, sys, time
place, chunk, seconds, code = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
me = os.environ.get({NODE!r}, 'none')
def stop(number, frame):
    (place / f'stopped-{{chunk}}').write_text(me)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
(place / f'started-{{chunk}}-{{me}}-{{os.getpid()}}').touch()
time.sleep(float(seconds))
if code < 0:
    os.kill(os.getpid(), -code)
if code:
    print('working')
    sys.exit(f'jaxprune: reason of {{chunk}}' if code == 1 else code)
(place / f'tried-{{chunk}}-{{me}}').touch()
try:
    (place / f'done-{{chunk}}').open('x').write(me)
except FileExistsError:
    pass
"""


def _task(place, chunk, seconds=2.0, code=0):
    return Task(chunk, (sys.executable, '-c', STUB, str(place), chunk, str(seconds), str(code)))


def _collect(launcher, count, seconds):
    """The ends of tasks, by chunk, once there are so many."""
    found = {}

    def all_ended():
        for end in launcher.ended():
            assert end.chunk not in found, 'reported twice'
            found[end.chunk] = end
        return len(found) >= count

    until(all_ended, seconds, f'{count} ends of tasks')
    return found


@pytest.fixture
def launcher(head):
    made = ray_launcher(Resources(cpus=1), head[1])
    yield made
    made.close()


@needs_ray
def test_all_chunks_are_done_on_both_nodes(head, second, launcher, tmp_path):
    start = time.monotonic()
    launcher.submit([_task(tmp_path, str(i)) for i in range(6)])
    assert time.monotonic() - start < 2, 'submit has waited'
    assert launcher.held() == set()
    ends = _collect(launcher, 6, 60)
    assert {end.code for end in ends.values()} == {0}
    assert {path.read_text() for path in tmp_path.glob('done-*')} == {head[0], second}
    assert len(list(tmp_path.glob('done-*'))) == 6
    assert launcher.ended() == []


@needs_ray
def test_killed_node(head, second, launcher, tmp_path, capfd):
    """Its chunk is done by the other one, without a word."""
    launcher.submit([_task(tmp_path, str(i)) for i in range(5)])
    until(lambda: list(tmp_path.glob(f'started-*-{second}-*')), 30, 'a chunk on the second node')
    kill(second)
    ends = _collect(launcher, 5, 60)
    assert {end.code for end in ends.values()} == {0}
    assert len(list(tmp_path.glob('done-*'))) == 5
    assert len(list(tmp_path.glob('started-*'))) > 5, 'nothing was killed at work'
    time.sleep(1)
    assert capfd.readouterr() == ('', '')


@needs_ray
@pytest.mark.slow  # test_ray_sweep freezes a node under a whole sweep
def test_frozen_node_and_its_return(head, second, launcher, tmp_path):
    """Its chunk is done by the other one; when it is back, what it writes is too late."""
    launcher.submit([_task(tmp_path, str(i)) for i in range(4)])
    started = until(lambda: list(tmp_path.glob(f'started-*-{second}-*')), 30, 'a chunk there')
    chunk = started[0].name.split('-')[1]
    start = time.monotonic()
    signal_node(second, signal.SIGSTOP)
    ends = _collect(launcher, 4, 90)
    print(f'a frozen node cost {time.monotonic() - start:.0f} s')
    assert {end.code for end in ends.values()} == {0}
    assert (tmp_path / f'done-{chunk}').read_text() == head[0]
    signal_node(second, signal.SIGCONT)
    late = tmp_path / f'tried-{chunk}-{second}'
    until(lambda: late.exists(), 30, 'the late result')
    assert (tmp_path / f'done-{chunk}').read_text() == head[0]
    assert launcher.ended() == []


@needs_ray
@pytest.mark.parametrize('code', [0, 1, 2, 75])
def test_exit_codes_arrive_and_nothing_is_retried(launcher, tmp_path, code):
    launcher.submit([_task(tmp_path, 'one', 0, code)])
    end = _collect(launcher, 1, 60)['one']
    assert end.code == code
    assert '\n' not in end.reason
    assert code != 1 or end.reason.endswith('jaxprune: reason of one')
    time.sleep(1)
    assert len(list(tmp_path.glob('started-*'))) == 1


@needs_ray
def test_killed_command_and_one_that_is_missing(launcher, tmp_path):
    launcher.submit([_task(tmp_path, 'dies', 0, -9), Task('lacks', ('/no/such/command',))])
    ends = _collect(launcher, 2, 60)
    assert ends['dies'] == Ended('dies', None, f'{socket.gethostname()}: killed by signal 9')
    assert ends['lacks'].code == 127
    assert 'No such file' in ends['lacks'].reason


@needs_ray
def test_killed_worker_stops_its_command(head, launcher, tmp_path, capfd):
    """The worker alone, by SIGKILL: the command saves, another worker goes on."""
    launcher.submit([_task(tmp_path, 'one', 5)])
    until(lambda: list(tmp_path.glob('started-*')), 30, 'the start')
    working = [pid for pid in processes(head[0]) if _named(pid, b'ray::chunk')]
    assert len(working) == 1
    os.kill(working[0], signal.SIGKILL)
    until((tmp_path / 'stopped-one').exists, 10, 'SIGTERM')
    assert _collect(launcher, 1, 60)['one'].code == 0
    assert len(list(tmp_path.glob('started-*'))) == 2
    assert capfd.readouterr() == ('', '')


def _named(pid, part):
    with contextlib.suppress(OSError):
        return part in Path(f'/proc/{pid}/cmdline').read_bytes().split(b'\0')[0]
    return False


@needs_ray
def test_close_stops_what_runs_and_leaves_the_cluster(head, tmp_path):
    first = ray_launcher(Resources(cpus=1), head[1])
    first.submit([_task(tmp_path, str(i), 60) for i in range(3)])
    until(lambda: list(tmp_path.glob('started-*')), 30, 'the start')
    first.close()
    assert len(list(tmp_path.glob('stopped-*'))) == 1, 'the command has not saved'
    again = ray_launcher(Resources(cpus=1), head[1])
    again.submit([_task(tmp_path, 'later', 0)])
    assert _collect(again, 1, 60)['later'].code == 0
    again.close()
    assert len(list(tmp_path.glob('started-*'))) == 2, 'a cancelled task was run'


DRIVER = """
import sys, time
from jaxprune.fleet.launcher import Resources, Task
from jaxprune.fleet.ray_cluster import ray_launcher
launcher = ray_launcher(Resources(cpus=1), sys.argv[1])
launcher.submit([Task(str(at), tuple(sys.argv[3:])) for at in range(int(sys.argv[2]))])
ends = []
while len(ends) < int(sys.argv[2]):
    ends += launcher.ended()
    time.sleep(0.1)
launcher.close()
print(sorted((end.chunk, end.code) for end in ends))
"""


def _driver(name, address, tasks, command):
    return subprocess.Popen(
        [sys.executable, '-c', DRIVER, address, str(tasks), *command],
        env={**os.environ, NODE: name, 'RAY_AUTH_MODE': 'disabled'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@needs_ray
@pytest.mark.parametrize('where', ['joined', pytest.param('local', marks=pytest.mark.slow)])
def test_killed_driver(head, tmp_path, where):
    """What it had running is told to save, and ends; so does a cluster that it had started."""
    name = f'{os.getpid()}-killed-{where}'
    address = head[1] if where == 'joined' else ''
    driver = _driver(name, address, 1, _task(tmp_path, 'one', 60).command)
    try:
        started = until(lambda: list(tmp_path.glob('started-*')), 60, 'the start')
        driver.kill()
        driver.wait()
        until((tmp_path / 'stopped-one').exists, 30, 'SIGTERM')
        pid = int(started[0].name.rsplit('-', 1)[1])
        until(lambda: not Path(f'/proc/{pid}').exists(), 10, 'the end of the command')
        until(lambda: not processes(name), 60, 'the end of its other processes')
    finally:
        kill(name)


@needs_ray
def test_cluster_of_this_machine_prints_nothing_and_leaves_nothing():
    """Its commands see as many devices as they have cores."""
    name = f'{os.getpid()}-local'
    check = 'import os, sys; sys.exit("device_count=1" not in os.environ["XLA_FLAGS"])'
    driver = _driver(name, '', 3, (sys.executable, '-c', check))
    try:
        printed, _ = driver.communicate(timeout=90)
        assert printed == "[('0', 0), ('1', 0), ('2', 0)]\n"
        until(lambda: not processes(name), 10, 'the end of all processes')
    finally:
        kill(name)


@needs_ray
def test_resources_that_no_node_has(head, capsys):
    """A cluster may grow: one line, and the tasks wait."""
    ray_launcher(Resources(gpus=1), head[1]).close()
    printed = capsys.readouterr()
    line = 'jaxprune: no node of the Ray cluster has what a chunk needs, so far: 1 CPU, 1 GPU\n'
    assert (printed.out, printed.err) == ('', line)


@needs_ray
@pytest.mark.parametrize('address', ['127.0.0.2:1', 'nonsense', 'ray://127.0.0.2:10001'])
def test_wrong_address(address):
    start = time.monotonic()
    with pytest.raises(JaxpruneError, match=address) as caught:
        ray_launcher(Resources(), address)
    assert '\n' not in str(caught.value)
    assert time.monotonic() - start < 15


def test_missing_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(
        JaxpruneError, match=r"^Ray is not installed: pip install 'jaxprune\[ray\]'$"
    ):
        ray_launcher(Resources())
