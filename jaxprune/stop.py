"""Signals that ask a process to leave, and what is left of the time that they give."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

#: What schedulers send before they take a machine away: Kubernetes and clouds, SLURM.
SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
#: Seconds after a signal in which the next place to save at is waited for.
GRACE = 25.0


class Stop(NamedTuple):
    """Whether a process should leave.

    Attributes:
      asked: did a signal come?
      overdue: did it come so long ago that nothing can be waited for?
    """

    asked: Callable[[], bool]
    overdue: Callable[[], bool]


def never() -> Stop:
    """Nobody asks."""
    return Stop(lambda: False, lambda: False)


@contextlib.contextmanager
def on_signals(grace: float = GRACE) -> Iterator[Stop]:
    """Notes SIGTERM and SIGUSR2 while it is open. Elsewhere than in the main thread, nothing.

    Handlers run between compiled calls, so nobody is interrupted in the middle of a step.
    """
    came: list[float] = []

    def handle(number: int, frame: object) -> None:
        del number, frame
        came.append(time.monotonic())

    if threading.current_thread() is not threading.main_thread():
        yield never()
        return
    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield Stop(lambda: bool(came), lambda: bool(came) and time.monotonic() - came[0] > grace)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
