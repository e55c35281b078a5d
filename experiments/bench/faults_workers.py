"""Processes that a soak starts and disturbs: workers of one chunk, and whole sweeps.

Most workers are forked from a process that has imported everything: they run the same command, and
begin a few seconds earlier. The others are started as `python -m jaxprune`.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

#: Imported once, before workers are forked. None of them starts a thread or asks for devices.
_IMPORTED = [
    *('jaxprune.cli', 'jaxprune.sweep', 'jaxprune.sweep.run', 'jaxprune.sweep.worker'),
    *('jaxprune.sweep.processes', 'jaxprune.report', 'orbax.checkpoint', 'polars', 'tables'),
]


class Twist(NamedTuple):
    """What is wrong with a worker from its start; nothing by default.

    Attributes:
      clock: seconds by which it sees another time.
      most: rows at once above which it runs out of memory; 0 for never.
      step: from which step on.
    """

    clock: float = 0.0
    most: int = 0
    step: int = 0


HEALTHY = Twist()


@dataclass
class Worker:
    """A process at work.

    Attributes:
      chunk: its chunk; '' for a `jaxprune sweep`.
      process: as `multiprocessing` or `subprocess` know it.
      log: what it printed.
      twist: what is wrong with it.
      may: exit codes that its faults allow; 0 always is.
      frozen: is it stopped?
      racing: does another process work at its chunk, or did one?
      asked: when it was asked to leave; None if it was not.
    """

    chunk: str
    process: Any
    log: Path
    twist: Twist = HEALTHY
    may: set[int] = field(default_factory=lambda: {0})
    frozen: bool = False
    racing: bool = False
    asked: float | None = None

    def code(self) -> int | None:
        """The exit code, below 0 for a signal; None while it lives."""
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll()
        return self.process.exitcode

    def send(self, number: int) -> None:
        try:
            os.kill(self.process.pid, number)
        except ProcessLookupError:
            return  # it has just ended
        if number in (signal.SIGSTOP, signal.SIGCONT):
            self.frozen = number == signal.SIGSTOP


def start_forked(arguments: Sequence[str], chunk: str, log: Path, twist: Twist) -> Worker:
    """A worker from the process that has imported everything."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(_IMPORTED)
    process = context.Process(target=run_command, args=(list(arguments), str(log), twist))
    process.start()
    return Worker(chunk, process, log, twist)


def start_plain(arguments: Sequence[str], chunk: str, log: Path) -> Worker:
    """A worker as a scheduler starts it."""
    command = [sys.executable, '-m', 'jaxprune', *arguments]
    with open(log, 'ab') as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
    return Worker(chunk, process, log)


def run_command(arguments: list[str], log: str, twist: Twist) -> None:
    """The body of a forked worker: `jaxprune` with these arguments."""
    with open(log, 'ab') as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    if twist.clock:
        _other_time(twist.clock)
    if twist.most:
        _out_of_memory(twist.most, twist.step)
    from jaxprune.cli import main

    sys.exit(main(arguments))


def _other_time(shift: float) -> None:
    """Moves the clock of this process."""
    import datetime

    from jaxprune.sweep import attempts

    real = time.time

    def now() -> str:
        moment = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=shift)
        return moment.isoformat(timespec='seconds')

    time.time = lambda: real() + shift
    attempts._now = now


def _out_of_memory(most: int, step: int) -> None:
    """Asks for four petabytes wherever more rows are trained at once, from a step on."""
    import jax

    from jaxprune.sweep import worker

    real = worker.make_engine

    def make_engine(*args, **kwargs):
        built = real(*args, **kwargs)

        def advance(start, stop, rows, states, **rest):
            if start >= step and len(rows.keys) > most:
                jax.numpy.zeros(2**50).block_until_ready()
            return built.advance(start, stop, rows, states, **rest)

        return built._replace(advance=advance)

    worker.make_engine = make_engine


def end(workers: Sequence[Worker]) -> None:
    """Kills what still lives."""
    for worker in workers:
        if worker.code() is None:
            worker.send(signal.SIGKILL)
            if isinstance(worker.process, subprocess.Popen):
                worker.process.wait()
            else:
                worker.process.join()
