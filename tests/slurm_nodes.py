"""A SLURM cluster of two nodes on the loopback of this machine, for tests; see `launch/slurm`."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

TESTBED = Path(__file__).parents[1] / 'launch' / 'slurm' / 'testbed.sh'


@contextlib.contextmanager
def slurm_testbed(place, **settings):
    """A cluster in a directory, and SLURM_CONF set to it."""
    pytest.importorskip('submitit')
    if os.geteuid() != 0:
        pytest.skip('slurmd has to be started as root')
    done = subprocess.run(
        ['bash', str(TESTBED), 'start', str(place)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*done.stdout.removeprefix('export ').strip().split('=', 1))
        try:
            yield place
        finally:
            subprocess.run(['bash', str(TESTBED), 'stop', str(place)], check=True)


@pytest.fixture(scope='module')
def shared_cluster(tmp_path_factory):
    with slurm_testbed(tmp_path_factory.mktemp('slurm'), MAX_ARRAY_SIZE='5') as place:
        yield place


@pytest.fixture
def cluster(shared_cluster):
    """The cluster, with both nodes idle and nothing in the queue."""
    yield shared_cluster
    subprocess.run(['scancel', '--quiet', '-u', 'root'], check=True)
    wait(lambda: not answer('squeue', '-h', '-o', '%i'), 30)


def answer(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def wait(condition, seconds):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, answer('squeue', '--states=all', '-o', '%i %T %r %N')
        time.sleep(0.3)


def preempt():
    """A job of high priority takes both nodes for a moment."""
    job = ['sbatch', '-p', 'high', '-N2', '--exclusive', '-o', '/dev/null', '--wrap', 'sleep 1']
    subprocess.run(job, check=True, capture_output=True)


def _processes_of_node(node):
    """Processes of jobs on a node, with the slurmstepd above them first."""
    jobs, above = [], set()
    for path in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):
            environment = (path / 'environ').read_bytes().split(b'\0')
            wanted = (f'SLURMD_NODENAME={node}', f'SLURM_CONF={os.environ["SLURM_CONF"]}')
            if all(entry.encode() in environment for entry in wanted):
                jobs.append(int(path.name))
                above.add(int((path / 'stat').read_text().rpartition(')')[2].split()[1]))
    steps = [p for p in above if b'slurmstepd' in Path(f'/proc/{p}/cmdline').read_bytes()]
    return [*steps, *jobs]


@contextlib.contextmanager
def kill_node(place, node):
    """Kills a node with all that runs on it, and starts it again in the end."""
    os.kill(int((place / f'slurmd-{node}.pid').read_text()), signal.SIGKILL)
    processes = _processes_of_node(node)
    assert len(processes) >= 3  # slurmstepd, the job and its command
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    try:
        yield
    finally:
        subprocess.run(['slurmd', '-N', node], check=True, stdout=subprocess.DEVNULL)
        wait(lambda: answer('sinfo', '-h', '-n', node, '-p', 'low', '-o', '%t') == 'idle', 30)
