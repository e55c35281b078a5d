"""SLURM runs the chunks: job arrays, submitted with submitit.

One job runs a few chunks, one after the other. Coordinator and jobs share two sources: `squeue`
says which jobs exist, and each job writes a small file per chunk when its command ends. So any
coordinator can take over from one that was killed. All files are in `DIR/slurm`:

    NAME.json               the chunks of each job of one array; NAME is the name of its jobs
    NAME/exits/CHUNK.json   how the chunk's command ended
    NAME/                   sbatch script, pickled calls and logs, as submitit writes them

The job's Python process replaces the batch shell and no `srun` is used. On SIGTERM, `srun` kills
its tasks at once, and nothing could be saved. The batch step sees all GPUs of the job and only
those, so no device is hidden twice.
"""

import contextlib
import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxprune.errors import JaxpruneError, first_line
from jaxprune.files import write_whole
from jaxprune.fleet.launcher import (
    CPU_DEVICES,
    INTERRUPTED,
    Ended,
    Launcher,
    Resources,
    Task,
)

#: States of jobs that do not run again, unless SLURM is about to requeue them.
_OVER = (
    *('BOOT_FAIL', 'CANCELLED', 'COMPLETED', 'DEADLINE', 'FAILED', 'NODE_FAIL', 'OUT_OF_MEMORY'),
    *('PREEMPTED', 'TIMEOUT'),
)
#: Parameters of sbatch that this module sets.
_OURS = (
    *('array', 'error', 'job_name', 'no_requeue', 'nodes', 'ntasks', 'ntasks_per_node'),
    *('open_mode', 'output', 'requeue', 'signal', 'wrap'),
)
#: A job puts itself back into the queue at most so often; then the coordinator decides.
_MOST_RESTARTS = 20
#: A job asks for its own state at most so often: a signal may end the command that asks.
_MOST_LOOKS = 4
_WAIT = 60.0  # seconds for an answer of SLURM


class _Exit(NamedTuple):
    """How the command of a chunk ended.

    Attributes:
      code: its exit code.
      reason: one line.
      again: whether the job got a signal to stop and may be started again by SLURM.
    """

    code: int
    reason: str
    again: bool


class _Job(NamedTuple):
    """A job as `squeue` shows it."""

    id: str
    state: str


def slurm_launcher(
    directory: Path,
    resources: Resources,
    options: Mapping[str, str],
    per_job: int = 1,
    at_once: int = 0,
    grace: int = 60,
) -> Launcher:
    """Runs chunks as jobs of the SLURM cluster that this machine submits to.

    Args:
      directory: of the sweep; on a file system that all nodes share.
      resources: of each job, and so of each chunk.
      options: parameters of sbatch by their long names: partition, account, time, ...; an empty
        value makes a flag. Without a time the partition's default applies.
      per_job: chunks that a job runs, one after the other.
      at_once: most jobs of one call of `submit` that run at a time; 0 for no limit.
      grace: seconds before its time limit at which a job gets a signal: it saves and goes back into
        the queue. How long a preempted job has is for the cluster to say (GraceTime, KillWait).

    Raises:
      JaxpruneError: submitit or SLURM is missing, or an option cannot be used.
    """
    _check_installed()
    _check(resources, options)
    largest = _largest_array()
    folder = Path(directory).absolute() / 'slurm'
    on_cpu = not resources.gpus and not _asks_gpus(options)
    open_chunks: dict[str, list[list[str]]] = {}  # of this coordinator, by array and job
    seen_over: set[tuple[str, int]] = set()

    def submit(tasks: Sequence[Task]) -> None:
        jobs = [tuple(tasks[at : at + per_job]) for at in range(0, len(tasks), per_job)]
        after = ''
        for at in range(0, len(jobs), largest):
            some = jobs[at : at + largest]
            parameters = _parameters(resources, options, grace, at_once or len(some), after)
            name, number = _submit_array(folder, some, parameters, on_cpu)
            open_chunks[name] = [[task.chunk for task in job] for job in some]
            after = number if at_once else ''

    def ended() -> list[Ended]:
        queue = _queue()  # before the files: whoever is over has written them
        found: list[Ended] = []
        over = set()
        for name, jobs in open_chunks.items():
            exits = _read_exits(folder / name, {chunk for job in jobs for chunk in job})
            for index, chunks in enumerate(jobs):
                is_over = bool(chunks) and queue is not None and not _lives(queue, name, index)
                if is_over:
                    over.add((name, index))
                # Seen twice: SLURM may be about to requeue it, or a shared file may come late.
                twice = (name, index) in over & seen_over
                job = (queue or {}).get((name, index))
                for chunk in list(chunks):
                    end = _ended(chunk, exits.get(chunk), twice, job)
                    if end is not None:
                        found.append(end)
                        chunks.remove(chunk)
        seen_over.clear()
        seen_over.update(over)
        return found

    def held() -> set[str]:
        queue = _queue()
        chunks = set()
        for name, jobs in _records(folder).items():
            if name not in open_chunks:
                alive = [job for i, job in enumerate(jobs) if _lives(queue, name, i)]
                left = {chunk for job in alive for chunk in job}
                exits = _read_exits(folder / name, left)
                chunks |= {c for c in left if c not in exits or exits[c].again}
        return chunks

    def close() -> None:
        queue = _queue() or {}
        names = _records(folder).keys()
        alive = [job.id for key, job in queue.items() if key[0] in names and _lives(queue, *key)]
        for at in range(0, len(alive), 500):
            _answer('scancel', '--quiet', *alive[at : at + 500])

    return Launcher(held, submit, ended, close)


def _check_installed() -> None:
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise JaxpruneError(
            "SLURM needs the package submitit: pip install 'jaxprune[slurm]'"
        ) from None
    missing = [name for name in ('sbatch', 'squeue', 'scontrol') if shutil.which(name) is None]
    if missing:
        raise JaxpruneError(
            f'no {" and no ".join(missing)} on this machine: start the sweep where sbatch works, '
            "such as a login node of the cluster (and pip install 'jaxprune[slurm]' there)"
        )


def _check(resources: Resources, options: Mapping[str, str]) -> None:
    if resources.tpus:
        raise JaxpruneError('SLURM gives no TPUs: ask for GPUs, or for cores only')
    taken = sorted({_named(key) for key in options}.intersection(_OURS))
    if taken:
        raise JaxpruneError(f'jaxprune itself gives sbatch: {", ".join(taken)}')


def _named(option: str) -> str:
    return option.lstrip('-').replace('-', '_')


def _asks_gpus(options: Mapping[str, str]) -> bool:
    """Whether the user asks sbatch for GPUs in some way of their own, such as `gres=gpu:a100:1`."""
    return any(
        _named(key).startswith('gpus') or (_named(key) == 'gres' and 'gpu' in value)
        for key, value in options.items()
    )


def _parameters(
    resources: Resources, options: Mapping[str, str], grace: int, at_once: int, after: str
) -> dict[str, Any]:
    """What submitit writes into the sbatch script."""
    given = {_named(key): value or True for key, value in options.items()}
    if after:
        asked = [str(given['dependency'])] if 'dependency' in given else []
        given['dependency'] = ','.join([*asked, f'afterany:{after}'])
    return {
        'nodes': 1,
        'ntasks_per_node': 1,
        'cpus_per_task': resources.cpus or None,
        'gpus_per_node': None if _asks_gpus(options) else resources.gpus or None,
        'time': None,  # submitit's default is five minutes
        'wckey': None,  # some clusters refuse unknown ones
        'array_parallelism': at_once,
        'stderr_to_stdout': True,
        'use_srun': False,
        # A signal during the imports must not end the job: SLURM would not requeue it.
        'setup': ["trap '' TERM USR2"],
        # `B:` signals the batch step, which is all there is. `requeue` overrules JobRequeue=0.
        'additional_parameters': {**given, 'signal': f'B:USR2@{grace}', 'requeue': True},
    }


def _submit_array(
    folder: Path, jobs: Sequence[Sequence[Task]], parameters: Mapping[str, Any], on_cpu: bool
) -> tuple[str, str]:
    """Submits one array; returns the name of its jobs and its number."""
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    name = f'jaxprune-{time.strftime("%m%d-%H%M%S")}-{uuid.uuid4().hex[:8]}'
    record = folder / f'{name}.json'
    # Before sbatch: a coordinator killed right after it leaves jobs that the next one knows.
    chunks = [[task.chunk for task in job] for job in jobs]
    write_whole(record, json.dumps({'jobs': chunks}).encode())
    # The shell script ends with this command; `exec` lets signals reach Python.
    python = f'exec {shlex.quote(sys.executable)}'
    try:
        executor = submitit.SlurmExecutor(folder / name, python=python)
        executor.update_parameters(job_name=name, **parameters)
        calls = [functools.partial(run_job, folder / name, tuple(job), on_cpu) for job in jobs]
        submitted = executor.submit_array(calls)
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        record.unlink(missing_ok=True)
        lines = [line for line in str(error).splitlines() if 'error:' in line]
        raise JaxpruneError(f'sbatch refused: {lines[0] if lines else first_line(error)}') from None
    first = submitted[0].job_id
    if re.search(r'\bRequeue=0\b', _answer('scontrol', 'show', 'job', '-o', first) or ''):
        print(
            f'jaxprune: SLURM will not requeue job {first}, whatever it was asked: after a '
            'preemption its chunks wait until they are submitted again',
            file=sys.stderr,
        )
    return name, first.split('_')[0]


def _answer(*command: str) -> str | None:
    """What a command of SLURM prints, or None if it fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_WAIT, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _largest_array() -> int:
    config = _answer('scontrol', 'show', 'config')
    if config is None:
        raise JaxpruneError('SLURM does not answer: `scontrol show config` fails')
    size = re.search(r'^MaxArraySize\s*=\s*(\d+)', config, re.MULTILINE)
    return max(1, int(size.group(1))) if size else 1


def _queue() -> dict[tuple[str, int], _Job] | None:
    """This user's jobs by name and index in the array; None if SLURM does not answer."""
    answer = _answer('squeue', '--me', '-h', '-r', '--states=all', '-o', '%K|%i|%T|%j')
    if answer is None:
        return None
    rows = [line.strip().split('|', 3) for line in answer.splitlines()]
    return {
        (name, int(index) if index.isdecimal() else 0): _Job(number, state)
        for index, number, state, name in rows
    }


def _lives(queue: Mapping[tuple[str, int], _Job] | None, name: str, index: int) -> bool:
    """Whether a job waits or runs; while SLURM does not answer, it does."""
    if queue is None:
        return True
    job = queue.get((name, index))
    return job is not None and job.state not in _OVER


def _ended(chunk: str, wrote: _Exit | None, over: bool, job: _Job | None) -> Ended | None:
    """The end of a chunk, or None if its job may still work at it."""
    if wrote is not None and (over or not wrote.again):
        return Ended(chunk, wrote.code, wrote.reason)
    if over:
        what = f'job {job.id} ended as {job.state}' if job else 'its job has left the queue'
        return Ended(chunk, None, f'{what} and wrote nothing')
    return None


def _records(folder: Path) -> dict[str, list[list[str]]]:
    """Chunks of each job, by the name of the array, as all coordinators so far wrote them."""
    found = {}
    for path in folder.glob('*.json'):
        # Another coordinator deletes its own where sbatch refuses.
        with contextlib.suppress(FileNotFoundError):
            found[path.stem] = json.loads(path.read_bytes())['jobs']
    return found


def _read_exits(folder: Path, chunks: Collection[str]) -> dict[str, _Exit]:
    # Listing the directory makes NFS look again; opening a name may answer from its cache.
    paths = [path for path in (folder / 'exits').glob('*.json') if path.stem in chunks]
    return {path.stem: _Exit(**json.loads(path.read_bytes())) for path in paths}


def run_job(folder: Path, tasks: Sequence[Task], on_cpu: bool) -> None:
    """What a job does, on its node: it runs chunks, and passes on signals to stop.

    Ends the process: with 0 if all commands did, with 75 if work is left.
    """
    received: list[int] = []
    running: list[subprocess.Popen] = []

    def stop(number: int, frame: object) -> None:
        del frame
        received.append(number)
        for child in running if len(received) == 1 else ():
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)

    # submitit's own handlers ignore SIGTERM, which is all that most clusters send.
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, stop)
    codes: list[int] = []
    for task in tasks:
        wrote = _read_exits(folder, {task.chunk}).get(task.chunk)
        if wrote is None or wrote.again:
            wrote = _run_task(task, on_cpu, received, running)
            _write_exit(folder, task.chunk, wrote)
        codes.append(wrote.code)
        if wrote.again:
            refused = _requeue()
            if refused:
                _write_exit(folder, task.chunk, wrote._replace(reason=f'{wrote.reason}; {refused}'))
            sys.exit(INTERRUPTED)
    sys.exit(INTERRUPTED if INTERRUPTED in codes else max(codes, default=0))


def _run_task(
    task: Task, on_cpu: bool, received: list[int], running: list[subprocess.Popen]
) -> _Exit:
    """Runs a command unless the job got a signal to stop; `running` is for the signal handler."""
    code = INTERRUPTED
    if not received:
        child = subprocess.Popen(task.command, env=_environment(os.environ, on_cpu))
        running.append(child)
        if received:  # between its start and the line above
            child.send_signal(signal.SIGTERM)
        code = child.wait()
        running.clear()
    killed = f'killed by {signal.Signals(-code).name}' if code < 0 else ''
    if received and (code < 0 or code == INTERRUPTED):
        return _Exit(INTERRUPTED, f'interrupted by {signal.Signals(received[0]).name}', True)
    place = f'job {os.environ.get("SLURM_JOB_ID")} on {os.environ.get("SLURMD_NODENAME")}'
    return _Exit(code if code >= 0 else 128 - code, f'{place}: {killed or f"exit {code}"}', False)


def _environment(environment: Mapping[str, str], on_cpu: bool) -> dict[str, str]:
    """For a command: on CPU, as many devices as SLURM gave cores, unless a number is set."""
    flags, cores = environment.get('XLA_FLAGS', ''), environment.get('SLURM_CPUS_ON_NODE')
    if not on_cpu or not cores or CPU_DEVICES in flags or 'JAX_NUM_CPU_DEVICES' in environment:
        return dict(environment)
    return {**environment, 'XLA_FLAGS': f'{flags} {CPU_DEVICES}={cores}'.strip()}


def _write_exit(folder: Path, chunk: str, wrote: _Exit) -> None:
    write_whole(folder / 'exits' / f'{chunk}.json', json.dumps(wrote._asdict()).encode())


def _requeue() -> str:
    """Puts this job back into the queue, unless SLURM did; returns why not, or nothing."""
    # The last job of an array has the array's own number as its SLURM_JOB_ID.
    array, index = (os.environ.get(f'SLURM_ARRAY_{name}_ID') for name in ('JOB', 'TASK'))
    number = f'{array}_{index}' if array else os.environ['SLURM_JOB_ID']
    if int(os.environ.get('SLURM_RESTART_COUNT') or 0) >= _MOST_RESTARTS:
        return f'not requeued: it was, {_MOST_RESTARTS} times'
    refused = 'SLURM does not answer'
    for look in range(_MOST_LOOKS):
        state = _answer('squeue', '-h', '-j', number, '-o', '%T')
        if state is None:
            continue
        # A job that still runs has come near its time limit, or has a grace time. SLURM has
        # cancelled or requeued any other.
        if state.strip() != 'RUNNING':
            return ''
        if look == _MOST_LOOKS - 1:
            break
        # SLURM sends SIGTERM to every process of a job that it requeues, and so to scontrol. The
        # next look tells whether SLURM took the request.
        done = subprocess.run(['scontrol', 'requeue', number], capture_output=True, text=True)
        if not done.returncode:
            return ''
        refused = ' '.join(done.stderr.split()) or f'scontrol ended with {done.returncode}'
    return f'not requeued: {refused}'
