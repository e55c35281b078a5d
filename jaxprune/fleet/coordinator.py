"""The coordinator: asks an engine for the chunks that are missing, and looks at the directory.

It holds nothing: killed and started again, it goes on; two at once do no harm. A chunk is finished
when its results are in the directory, whatever an engine says.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprune.errors import Interrupted, JaxpruneError, ReadError, SpecError
from jaxprune.fleet.launcher import FAULT, INTERRUPTED, MISTAKE, Ended, Launcher, Task
from jaxprune.stop import Stop, never
from jaxprune.sweep import store
from jaxprune.sweep.attempts import attempts_of, is_live
from jaxprune.sweep.progress import Progress, Shown, silent

#: Seconds between looks at the directory.
_LOOK = 2.0
#: Faults of a chunk after which it is given up; an interruption is none.
RETRIES = 3
#: Seconds in which a directory that cannot be read may come back.
_PATIENCE = 600.0
#: Seconds after a chunk's command ended well in which its results may appear: shared disks remember
#: for up to a minute what was not there.
_SHOWN_AFTER = 90.0
_NO_RESULTS = 'its command ended well, and its results are not in the directory'


def chunk_command(out: Path, chunk: str, options: Sequence[str] = ()) -> tuple[str, ...]:
    """What runs a chunk on any machine that sees the directory and has this Python."""
    return (sys.executable, '-m', 'jaxprune', 'chunk', str(out), chunk, *options)


def run_elsewhere(
    out: Path,
    launcher: Launcher,
    options: Sequence[str] = (),
    *,
    progress: Progress | None = None,
    stop: Stop | None = None,
    retries: int = RETRIES,
) -> None:
    """Has an engine run the chunks of a planned sweep that are not finished.

    Args:
      out: directory of the sweep, which all machines see under this name.
      launcher: the engine.
      options: further arguments of `jaxprune chunk`.
      progress: what to show, see `jaxprune.sweep.progress`; None for nothing.
      stop: whether to leave, see `jaxprune.stop`; None for never.
      retries: faults of a chunk after which it is given up.

    Raises:
      JaxpruneError: a mistake that every machine would meet, or chunks that were given up; all
        others are finished.
      Interrupted: a signal asked to leave; the same call goes on.
    """
    plan, stop = store.read_plan(out), stop or never()
    with (progress or silent)(plan, out) as shown:
        watch = _Watch(out, plan, shown)
        try:
            lost = _until_finished(out, launcher, options, watch, stop, retries)
        except Interrupted:
            raise  # what waits in a queue, or runs, may go on
        except JaxpruneError:
            launcher.close()
            raise
    launcher.close()
    if lost:
        chunk, reason = next(iter(lost.items()))
        raise JaxpruneError(
            f'{len(lost)} of {len(plan["chunks"])} chunks were given up after {retries} faults '
            f'each; {chunk}: {reason}. The same command tries them again'
        )


def _until_finished(
    out: Path,
    launcher: Launcher,
    options: Sequence[str],
    watch: '_Watch',
    stop: Stop,
    retries: int,
) -> dict[str, str]:
    """Waits for all chunks; returns those that were given up, and why."""
    faults: dict[str, int] = {}
    lost: dict[str, str] = {}
    held = launcher.held()
    submitted = set(held)
    ended_well: dict[str, float] = {}
    while missing := [c for c in _patiently(watch, stop) if c not in lost]:
        if new := [chunk for chunk in missing if chunk not in submitted]:
            launcher.submit([Task(chunk, chunk_command(out, chunk, options)) for chunk in new])
            submitted.update(new)
        _wait(stop)
        ago = time.monotonic() - _SHOWN_AFTER
        late = [c for c in missing if ended_well.get(c, ago) < ago]
        for end in [*launcher.ended(), *(Ended(chunk, FAULT, _NO_RESULTS) for chunk in late)]:
            if end.code == 0:
                ended_well[end.chunk] = time.monotonic()
                continue
            ended_well.pop(end.chunk, None)
            submitted.discard(end.chunk)
            if end.code == INTERRUPTED or _is_finished(out, end.chunk):
                continue
            reason = _reason(out, end)
            if end.code == MISTAKE:
                raise SpecError(f'chunk {end.chunk}: {reason}')
            faults[end.chunk] = faults.get(end.chunk, 0) + 1
            watch.shown.note(f'chunk {end.chunk}: {reason}')
            if faults[end.chunk] >= retries:
                lost[end.chunk] = reason
        if held:  # of an earlier coordinator, which does not hear of their end
            still = launcher.held()
            submitted -= held - still
            held &= still
    return lost


def _wait(stop: Stop) -> None:
    if stop.asked():
        raise Interrupted('interrupted; the same command goes on')
    time.sleep(_LOOK)


def _is_finished(out: Path, chunk: str) -> bool:
    """As far as the directory can be read."""
    try:
        return chunk in store.finished_chunks(out)
    except ReadError:
        return False


def _patiently(watch: '_Watch', stop: Stop) -> list[str]:
    """The chunks that are missing; waits while the directory cannot be read."""
    since = time.monotonic()
    while True:
        try:
            return watch.missing()
        except ReadError as error:
            if time.monotonic() - since > _PATIENCE:
                raise
            watch.shown.note(f'{error}; trying again')
            _wait(stop)


def _reason(out: Path, end: Ended) -> str:
    """What is known of a task that did not finish its chunk."""
    said = end.reason or f'exit code {end.code}'
    try:
        last = attempts_of(out, end.chunk)[-1:]
    except ReadError:
        return said
    error = last[0].get('error') if last and end.code is not None else None
    return f'{said} ({error})' if error else said


class _Watch:
    """Shows what is new in the directory. It remembers what it showed."""

    def __init__(self, out: Path, plan: Mapping[str, Any], shown: Shown):
        self.out, self.shown = out, shown
        steps = {program['id']: program['steps'] for program in plan['programs']}
        self._runs = {chunk['id']: len(chunk['runs']) for chunk in plan['chunks']}
        self._steps = {c['id']: len(c['runs']) * steps[c['program']] for c in plan['chunks']}
        self._counted: dict[str, int] = {}
        self._left = dict.fromkeys(self._runs)
        for chunk in store.finished_chunks(out) & self._runs.keys():
            shown.skip(self._runs[chunk])
            del self._left[chunk]

    def missing(self) -> list[str]:
        """Chunks that are not finished, in the order of the plan."""
        there = store.finished_chunks(self.out)
        begun = {path.name for path in store.listed(self.out / 'attempts')}
        for chunk in list(self._left):
            if chunk in there:
                self._count(chunk, self._steps[chunk])
                self.shown.finish(self._runs[chunk])
                del self._left[chunk]
            elif chunk in begun:
                live = [r for r in attempts_of(self.out, chunk) if is_live(r, self.out)]
                self._count(chunk, max((int(r.get('done', 0)) for r in live), default=0))
        return list(self._left)

    def _count(self, chunk: str, done: int) -> None:
        """Shows the steps since the last look; none are taken back."""
        before = self._counted.get(chunk, 0)
        if done > before:
            self._counted[chunk] = done
            self.shown.steps(done - before)
