"""Where the time of a chunk goes. Compiling counts apart from running."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple

from jaxprune.sweep.progress import clock

#: What a chunk's time is spent on, in the order of reports; 'train' includes what [record]
#: asks for along the way, and rounds between a method's first and its last.
PHASES = ('compile', 'prune', 'train', 'evaluate')
#: JAX reports tracing, lowering and compiling under names that begin so.
_COMPILING = '/jax/core/compile/'


class Stopwatch(NamedTuple):
    """Adds up seconds by phase.

    Attributes:
      phase: a context manager: what happens inside belongs to this phase, but for compiling.
      seconds: phase -> seconds so far.
    """

    phase: Callable[[str], AbstractContextManager[None]]
    seconds: Callable[[], dict[str, float]]


@contextlib.contextmanager
def compiling() -> Iterator[Callable[[], float]]:
    """Gives a function that returns the seconds that JAX has spent compiling so far."""
    import jax.monitoring

    spans: list[tuple[float, float]] = []

    def on_event(event: str, start: float, end: float, **_: object) -> None:
        if event.startswith(_COMPILING):
            spans.append((start, end))

    jax.monitoring.register_event_time_span_listener(on_event)
    try:
        yield lambda: covered(spans)
    finally:
        jax.monitoring.unregister_event_time_span_listener(on_event)


def covered(spans: list[tuple[float, float]]) -> float:
    """How much of the time is covered by intervals that may lie within one another."""
    total, reached = 0.0, float('-inf')
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


@contextlib.contextmanager
def stopwatch() -> Iterator[Stopwatch]:
    """A stopwatch at zero."""
    seconds = dict.fromkeys(PHASES, 0.0)
    with compiling() as compiled:

        @contextlib.contextmanager
        def phase(name: str) -> Iterator[None]:
            began, before = time.perf_counter(), compiled()
            yield
            compiles = compiled() - before
            seconds['compile'] += compiles
            seconds[name] += max(time.perf_counter() - began - compiles, 0.0)

        yield Stopwatch(phase, lambda: dict(seconds))


def time_line(timing: Mapping[str, float]) -> str:
    """One line on where the time of finished chunks went."""
    words = {'compile': 'compiling', 'prune': 'pruning', 'train': 'training'}
    spent = [f'{words.get(name, "evaluating")} {clock(timing[name])}' for name in PHASES]
    speed = timing['run_steps'] / timing['train'] if timing['train'] else 0
    return f'time: {", ".join(spent)}; {speed:,.0f} runs x steps/s while training'
