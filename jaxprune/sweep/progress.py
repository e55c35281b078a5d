"""What a person sees while a sweep runs: a bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple


class Shown(NamedTuple):
    """What the driver tells.

    Attributes:
      skip: so many runs were finished before.
      steps: so many run-steps were just taken.
      finish: so many runs are now stored.
    """

    skip: Callable[[int], None]
    steps: Callable[[int], None]
    finish: Callable[[int], None]


#: `(plan, out) -> context manager of Shown`.
Progress = Callable[[dict[str, Any], Path], AbstractContextManager[Shown]]

#: Seconds between plain lines.
_INTERVAL = 5.0


@contextlib.contextmanager
def silent(plan: dict[str, Any], out: Path) -> Iterator[Shown]:
    """Shows nothing."""
    del plan, out

    def ignore(count: int) -> None:
        del count

    yield Shown(ignore, ignore, ignore)


def shown_on(stream=None) -> Progress:
    """A bar if the stream (default: standard error) is a terminal, else plain lines."""
    stream = sys.stderr if stream is None else stream

    @contextlib.contextmanager
    def show(plan: dict[str, Any], out: Path) -> Iterator[Shown]:
        meter = _Meter(plan)
        print(f'jaxprune: {meter.runs} runs -> {out}', file=stream, flush=True)
        with (_bar if stream.isatty() else _lines)(meter, stream) as refresh:

            def skip(runs: int) -> None:
                meter.done += runs
                meter.skipped += runs
                refresh()

            def steps(count: int) -> None:
                meter.steps += count
                refresh()

            def finish(runs: int) -> None:
                meter.done += runs
                refresh()

            yield Shown(skip, steps, finish)

    return show


class _Meter:
    """Counts, and the speed and remaining time they imply. The one mutable thing in the room."""

    def __init__(self, plan: dict[str, Any]):
        self.runs = sum(p['runs'] for p in plan['programs'])
        self.total = sum(p['runs'] * p['steps'] for p in plan['programs'])
        self.done = self.skipped = self.steps = 0
        self.start = time.monotonic()

    @property
    def speed(self) -> float:
        """Run-steps per second since the start, compilation included."""
        return self.steps / max(time.monotonic() - self.start, 1e-9)

    @property
    def eta(self) -> float | None:
        """Seconds left, None while unknown."""
        if not self.steps:
            return None
        left = self.total * (1 - self.skipped / self.runs) - self.steps
        return max(left, 0) / self.speed

    def text(self) -> str:
        left = '-:--' if self.eta is None else clock(self.eta)
        return f'{self.done}/{self.runs} runs  {self.speed:,.0f} steps/s x runs  ETA {left}'


def clock(seconds: float) -> str:
    """`m:ss`, or `h:mm:ss` from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


@contextlib.contextmanager
def _lines(meter: _Meter, stream) -> Iterator[Callable[[], None]]:
    last = -_INTERVAL

    def refresh() -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _INTERVAL or meter.done == meter.runs:
            last = now
            print(meter.text(), file=stream, flush=True)

    yield refresh


@contextlib.contextmanager
def _bar(meter: _Meter, stream) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (BarColumn(bar_width=30), TextColumn('{task.description}'))
    with Progress(*columns, console=Console(file=stream)) as bar:
        task = bar.add_task('compiling', total=max(meter.total, 1))

        def refresh() -> None:
            before = meter.total * meter.skipped / meter.runs
            bar.update(task, completed=before + meter.steps, description=meter.text())

        yield refresh
