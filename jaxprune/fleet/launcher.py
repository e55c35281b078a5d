"""What an engine that runs chunks on other machines does for the coordinator.

The directory of the sweep is the truth: an engine may run a chunk twice, lose it, or lie about it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

#: Exit codes of `jaxprune chunk`, and what engines do with them: start it again, count it as a
#: failure, or give up. 0: the chunk is finished.
INTERRUPTED, FAULT, MISTAKE = 75, 1, 2
#: Seconds that a machine must leave a chunk after its grace, to save and to end.
SAVING = 35
#: What makes JAX see so many CPU devices, in XLA_FLAGS.
CPU_DEVICES = '--xla_force_host_platform_device_count'


class Task(NamedTuple):
    """A chunk to be run elsewhere.

    Attributes:
      chunk: its id.
      command: what runs it on any machine that sees the directory, and ends with 0 or one of the
        exit codes above.
    """

    chunk: str
    command: tuple[str, ...]


class Ended(NamedTuple):
    """A task that runs no more.

    Attributes:
      chunk: its id.
      code: the exit code of its command; None where the machine, or the engine, was lost.
      reason: one line on what happened.
    """

    chunk: str
    code: int | None
    reason: str = ''


class Resources(NamedTuple):
    """What each chunk gets.

    Attributes:
      cpus: cores; 0 for what the engine gives by itself.
      gpus: GPUs.
      tpus: TPU chips: all those of a host.
    """

    cpus: int = 0
    gpus: int = 0
    tpus: int = 0


class Launcher(NamedTuple):
    """An engine at work.

    Attributes:
      held: chunks that tasks of an earlier coordinator still wait for or work at.
      submit: asks for tasks to be run, and returns at once.
      ended: the tasks of this coordinator that ended since it was last called.
      close: cancels what still waits and runs, and leaves.
    """

    held: Callable[[], set[str]]
    submit: Callable[[Sequence[Task]], None]
    ended: Callable[[], list[Ended]]
    close: Callable[[], None]
