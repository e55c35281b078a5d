"""What a person sees while a sweep runs: a bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple


class Shown(NamedTuple):
    """What the driver reports.

    Attributes:
      skip: so many runs were finished before.
      resume: so many run-steps were taken before, in an earlier session.
      steps: so many run-steps were just taken.
      finish: so many runs are now stored.
      note: something worth a line of its own.
    """

    skip: Callable[[int], None]
    resume: Callable[[int], None]
    steps: Callable[[int], None]
    finish: Callable[[int], None]
    note: Callable[[str], None]


#: `(plan, out) -> context manager of Shown`.
Progress = Callable[[dict[str, Any], Path], AbstractContextManager[Shown]]

#: Seconds between plain lines.
_INTERVAL = 5.0


def ignored() -> Shown:
    """Tells nobody."""

    def ignore(what: object) -> None:
        del what

    return Shown(ignore, ignore, ignore, ignore, ignore)


@contextlib.contextmanager
def silent(plan: dict[str, Any], out: Path) -> Iterator[Shown]:
    """Shows nothing."""
    del plan, out
    yield ignored()


def shown_on(stream=None) -> Progress:
    """A bar if the stream (default: standard error) is a terminal, else plain lines."""
    stream = sys.stderr if stream is None else stream

    @contextlib.contextmanager
    def show(plan: dict[str, Any], out: Path) -> Iterator[Shown]:
        meter = _Meter(plan)
        print(f'jaxprune: {meter.runs} runs -> {out}', file=stream, flush=True)
        with (_bar if stream.isatty() else _lines)(meter, stream) as (refresh, note):

            def skip(runs: int) -> None:
                meter.done += runs
                meter.before += meter.total * runs / meter.runs
                refresh()

            def resume(count: int) -> None:
                meter.before += count
                refresh()

            def steps(count: int) -> None:
                meter.advance(count)
                refresh()

            def finish(runs: int) -> None:
                meter.done += runs
                refresh()

            yield Shown(skip, resume, steps, finish, note)

    return show


class _Meter:
    """Counts, and the speed and remaining time they imply. The one mutable thing in the room."""

    def __init__(self, plan: dict[str, Any]):
        self.runs = sum(p['runs'] for p in plan['programs'])
        self.total = sum(p['runs'] * p['steps'] for p in plan['programs'])
        self.done = self.before = self.steps = 0  # runs; steps of earlier sessions, of this one
        self.first = 0
        self.start = time.monotonic()

    def advance(self, steps: int) -> None:
        if not self.steps:  # the first steps waited for the compiler: count from their end
            self.first, self.start = steps, time.monotonic()
        self.steps += steps

    @property
    def speed(self) -> float | None:
        """Run-steps per second since the first ones were taken, None while unknown."""
        counted = self.steps - self.first
        return counted / max(time.monotonic() - self.start, 1e-9) if counted else None

    @property
    def eta(self) -> float | None:
        """Seconds left, None while unknown."""
        left = max(self.total - self.before - self.steps, 0)
        return left / self.speed if self.speed else None

    def text(self) -> str:
        left = '-:--' if self.eta is None else clock(self.eta)
        speed = '-' if self.speed is None else f'{self.speed:,.0f}'
        return f'{self.done}/{self.runs} runs  {speed} steps/s x runs  ETA {left}'


def clock(seconds: float) -> str:
    """`m:ss`, or `h:mm:ss` from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


@contextlib.contextmanager
def _lines(meter: _Meter, stream) -> Iterator[tuple[Callable[[], None], Callable[[str], None]]]:
    last = -_INTERVAL

    def refresh() -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _INTERVAL or meter.done == meter.runs:
            last = now
            print(meter.text(), file=stream, flush=True)

    yield refresh, lambda text: print(f'jaxprune: {text}', file=stream, flush=True)


@contextlib.contextmanager
def _bar(meter: _Meter, stream) -> Iterator[tuple[Callable[[], None], Callable[[str], None]]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (BarColumn(bar_width=30), TextColumn('{task.description}'))
    with Progress(*columns, console=Console(file=stream)) as bar:
        task = bar.add_task('compiling', total=max(meter.total, 1))

        def refresh() -> None:
            bar.update(task, completed=meter.before + meter.steps, description=meter.text())

        yield refresh, lambda text: bar.console.print(f'jaxprune: {text}', markup=False)
