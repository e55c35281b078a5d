"""One directory of a soak: workers are started and disturbed until all chunks are finished."""

import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import polars as pl
from faults_kinds import DEFERRED, KINDS, Site, fire, leftovers
from faults_workers import HEALTHY, Twist, Worker, end, start_forked, start_plain
from polars.testing import assert_frame_equal

from jaxprune.errors import JaxpruneError
from jaxprune.files import process_alive
from jaxprune.sweep import status, store
from jaxprune.sweep.attempts import attempts_of

READ = (store.read_results, store.read_layers, store.read_curves, store.read_flow)
#: Seconds that a worker gets after a signal.
GRACE = 20.0
#: Workers that the coordinator keeps at work; racing and frozen ones come on top.
_AT_ONCE = 2
#: Part of the workers that are started as `python -m jaxprune`.
_PLAIN = 0.15
_LOOK = 0.02
#: Seconds after which a directory counts as stuck.
_STUCK = 900.0


class Round(NamedTuple):
    """What happened in one directory.

    Attributes:
      counts: faults by kind.
      codes: exit codes, as words.
      chunks: of the plan.
      attempts: at all of them.
      lost: rows that are missing at the end.
      doubled: rows that are there twice.
      graces: seconds from a signal to the exit with 75.
      looks: how often a reader read everything meanwhile.
      seconds: from the first worker to the last.
      wrong: what must not happen, a line each.
    """

    counts: Counter
    codes: Counter
    chunks: int
    attempts: int
    lost: int
    doubled: int
    graces: list[float]
    looks: int
    seconds: float
    wrong: list[str]


def command(*arguments: object, log: Path) -> int:
    """Runs `jaxprune` undisturbed; returns its exit code."""
    with open(log, 'ab') as stream:
        called = [sys.executable, '-m', 'jaxprune', *map(str, arguments)]
        return subprocess.run(called, stdout=stream, stderr=subprocess.STDOUT).returncode


def soak_directory(
    out: Path,
    spec: Path,
    expected: Mapping[str, pl.DataFrame],
    draw: random.Random,
    bag: list[str],
    faults: int,
    pause: float,
    steps: int,
) -> Round:
    """Finishes a sweep in spite of faults, and compares its tables.

    Args:
      out: the directory; on Linux, as root, a small file system of its own is put there.
      spec: the sweep.
      expected: the tables of an undisturbed sweep, by the name of the function that reads them.
      draw: gives all random numbers.
      bag: kinds still to come, shared by all directories; filled again when none finds something
        to hit.
      faults: most faults here.
      pause: seconds between faults, on average.
      steps: of a run.
    """
    out.mkdir(parents=True)
    logs = out.with_name(out.name + '-logs')
    logs.mkdir()
    disk = subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', 'size=24m', 'faults', out], capture_output=True
    )
    wrong: list[str] = []
    try:
        if command('sweep', spec, '--out', out, '--plan-only', log=logs / 'plan.log'):
            raise SystemExit((logs / 'plan.log').read_text())
        chunks = store.chunk_ids(out)
        site = Site(out, chunks, draw, None, disk.returncode == 0, steps)
        site.start = lambda chunk, twist: _start(site, spec, logs, chunk, twist)
        over, looks = threading.Event(), []
        reader = threading.Thread(target=_read, args=(out, over, looks, wrong))
        reader.start()
        began = time.monotonic()
        codes, graces = Counter(), []
        try:
            _until_finished(site, bag, faults, pause, codes, graces, wrong)
        finally:
            for _, act in site.later:  # nothing may stay locked or frozen
                act()
            end(site.live)
            over.set()
            reader.join()
        seconds = time.monotonic() - began
        lost, doubled = _compare(out, spec, logs, expected, wrong)
        attempts = sum(len(attempts_of(out, chunk)) for chunk in chunks)
        found = Round(
            *(site.counts, codes, len(chunks), attempts, lost, doubled, graces),
            *(len(looks), seconds, wrong),
        )
        if wrong and disk.returncode == 0:
            shutil.copytree(out, out.with_name(out.name + '-wrong'), dirs_exist_ok=True)
        return found
    finally:
        if disk.returncode == 0:
            subprocess.run(['umount', '-l', out], capture_output=True)


def _start(site: Site, spec: Path, logs: Path, chunk: str, twist: Twist) -> Worker:
    log = logs / f'{sum(1 for _ in logs.iterdir()):04}-{chunk or "sweep"}.log'
    if not chunk:
        arguments = ['sweep', str(spec), '--out', str(site.out), '--grace', str(GRACE)]
        worker = start_plain(arguments, '', log)
    else:
        arguments = ['chunk', str(site.out), chunk, '--grace', str(GRACE)]
        if twist == HEALTHY and site.draw.random() < _PLAIN:
            worker = start_plain(arguments, chunk, log)
        else:
            worker = start_forked(arguments, chunk, log, twist)
    if twist.clock:
        site.counts['clock of a worker'] += 1
    if site.troubles:
        worker.may |= {1} if chunk else {1, 2}
    site.live.append(worker)
    return worker


def _until_finished(
    site: Site,
    bag: list[str],
    faults: int,
    pause: float,
    codes: Counter,
    graces: list[float],
    wrong: list[str],
) -> None:
    """The coordinator, and the hand that disturbs it."""
    until = time.monotonic() + _STUCK
    due = time.monotonic() + pause
    while site.live or site.unfinished():
        now = time.monotonic()
        _reap(site, codes, graces, wrong)
        for moment, act in list(site.later):
            if moment <= now or not site.unfinished():
                site.later.remove((moment, act))
                act()
        fire(site)
        _start_missing(site)
        if now >= due and site.counts.total() < faults and site.unfinished():
            _inject(site, bag)
            due = now + site.draw.uniform(0.2, 2 * pause - 0.2)
        if now > until:
            wrong.append(f'{site.out.name}: not finished after {_STUCK:.0f} s')
            return
        time.sleep(0.001 if site.armed else _LOOK)


def _start_missing(site: Site) -> None:
    at_work = {w.chunk for w in site.live if not w.frozen and w.chunk}
    for chunk in site.unfinished():
        if len(at_work) >= _AT_ONCE:
            return
        if chunk not in at_work:
            frozen = [worker for worker in site.live if worker.chunk == chunk]
            worker = site.start(chunk, site.twists.pop(0) if site.twists else HEALTHY)
            worker.racing = bool(frozen)
            at_work.add(chunk)


def _inject(site: Site, bag: list[str]) -> None:
    """Does the first kind in the bag that finds something to hit."""
    for name in list(bag):
        if KINDS[name][0](site):
            bag.remove(name)
            site.counts[name] += name not in DEFERRED
            return
    if set(bag) != set(KINDS):
        more = [name for name, (_, often) in KINDS.items() for _ in range(often)]
        bag[:] = [*dict.fromkeys(bag), *site.draw.sample(more, len(more))]


def _reap(site: Site, codes: Counter, graces: list[float], wrong: list[str]) -> None:
    """Looks at processes that ended, and whether they may end so."""
    for worker in list(site.live):
        if (code := worker.code()) is None:
            continue
        site.live.remove(worker)
        text = worker.log.read_text(errors='replace') if worker.log.exists() else ''
        if worker.twist.most and 'out of memory with' in text:
            site.counts['out of memory'] += 1
        finished = bool(worker.chunk) and store.finished(site.out, worker.chunk)
        if code == 75 and worker.asked:
            graces.append(time.monotonic() - worker.asked)
        word = str(code) if code >= 0 else f'signal {-code}'
        word = word if worker.chunk else f'sweep: {word}'
        if code == 1 and finished and worker.racing and 1 not in worker.may:
            word += ', the chunk finished by another'
        elif code == 1 and 'Traceback' in text:
            word += ', with a traceback'
        codes[word] += 1
        if not (code in worker.may or _late(worker, code, finished, text)):
            lines = [line for line in text.splitlines() if line.strip()]
            last = lines[-1][:300] if lines else ''
            wrong.append(f'{site.out.name}: {worker.log.name} ended with {code}: {last}')


def _late(worker: Worker, code: int, finished: bool, text: str) -> bool:
    """May a process end so, because its work was over before?

    A signal ends a process that no longer listens: its chunk is finished, or it has failed, as a
    broken disk allows, and printed why. A process that lost a race may say so.
    """
    failed = 1 in worker.may and ': cannot be written (' in text
    signalled = worker.asked is not None and code in (-signal.SIGTERM, -signal.SIGUSR2)
    return (signalled and (finished or failed)) or (finished and worker.racing and code == 1)


def _read(out: Path, over: threading.Event, looks: list[int], wrong: list[str]) -> None:
    """A reader that must never meet half a file, nor a row twice."""
    while not over.is_set():
        try:
            status(out)
            for read in READ:
                frame = read(out)
                if frame.is_duplicated().any():
                    wrong.append(f'{out.name}: {read.__name__} gave a row twice')
            looks.append(len(frame))
        except Exception as error:  # whatever it is, a reader saw it
            wrong.append(f'{out.name}: a reader met {type(error).__name__}: {error}')
            return
        over.wait(0.2)


def _compare(
    out: Path, spec: Path, logs: Path, expected: Mapping[str, pl.DataFrame], wrong: list[str]
) -> tuple[int, int]:
    """Gives the command once more; returns rows that are lost, and rows that are there twice."""
    if command('sweep', spec, '--out', out, log=logs / 'last.log'):
        wrong.append(f'{out.name}: the last `jaxprune sweep` failed, see last.log')
    lost = doubled = 0
    for read in READ:
        whole = expected[read.__name__]
        try:
            frame = read(out)
            different = len(frame.unique())
            lost += max(len(whole) - different, 0)
            doubled += len(frame) - different
            assert_frame_equal(frame, whole, check_exact=True)
        except (AssertionError, JaxpruneError) as error:
            wrong.append(f'{out.name}: {read.__name__}: {" ".join(str(error).split())}')
    for path in leftovers(out):
        process = path.name.split('.')[-2].split('-')[1]
        if not (process.isdigit() and process_alive(int(process))):
            wrong.append(f'{out.name}: left behind: {path.relative_to(out)}')
    if (out / 'checkpoints').exists():
        wrong.append(f'{out.name}: checkpoints are left behind')
    return lost, doubled
