"""Kinds of faults, each a function of the directory under test.

A kind returns False where it finds nothing to hit now; it is tried again later. What ends after a
while (a full disk, a frozen process) leaves a function in `site.later`.
"""

import os
import random
import resource
import signal
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from faults_workers import HEALTHY, Twist, Worker

from jaxprune.files import machine_token, process_alive
from jaxprune.sweep import store
from jaxprune.sweep.attempts import attempts_of

#: Bytes above which a worker's files may not grow: tables and checkpoints are larger, logs smaller.
_FILE_LIMIT = 6000
#: Processes that may live at once.
MOST_ALIVE = 5
_HOUR = 3600.0


@dataclass
class Site:
    """The directory under test, and who is at work there.

    Attributes:
      out: the directory.
      chunks: of its plan.
      draw: gives all random numbers.
      start: `(chunk, twist) -> Worker`; the chunk '' is a `jaxprune sweep`.
      small_disk: is `out` a file system of its own, of few megabytes?
      steps: of a run.
      live: the processes.
      later: `(moment, what to do)`.
      troubles: ways in which the disk is broken now; no write has to succeed.
      counts: faults by kind.
      twists: what is wrong with the next workers that are started.
      armed: workers to kill at a write, with what was there before, and a delay in seconds.
    """

    out: Path
    chunks: list[str]
    draw: random.Random
    start: Callable[[str, Twist], Worker]
    small_disk: bool
    steps: int
    live: list[Worker] = field(default_factory=list)
    later: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    troubles: set[str] = field(default_factory=set)
    counts: Counter = field(default_factory=Counter)
    twists: list[Twist] = field(default_factory=list)
    armed: list[tuple[Worker, set[Path], float]] = field(default_factory=list)

    def unfinished(self) -> list[str]:
        there = store.finished_chunks(self.out)
        return [chunk for chunk in self.chunks if chunk not in there]

    def in_seconds(self, low: float, high: float, act: Callable[[], None]) -> None:
        self.later.append((time.monotonic() + self.draw.uniform(low, high), act))

    def targets(self, *, training: bool = False) -> list[Worker]:
        """Workers that a fault may hit: at work at an unfinished chunk, not stopped, not leaving.

        Args:
          training: only those that have written who they are, and so listen to signals.
        """
        left = set(self.unfinished())
        found = []
        for worker in self.live:
            if (
                worker.chunk not in left
                or worker.frozen
                or worker.asked
                or worker.code() is not None
            ):
                continue
            if worker.process.pid in (waiting.process.pid for waiting, *_ in self.armed):
                continue
            if not training or self.has_begun(worker):
                found.append(worker)
        return found

    def has_begun(self, worker: Worker) -> bool:
        records = attempts_of(self.out, worker.chunk)
        mine = [r for r in records if r.get('process') == worker.process.pid]
        return bool(mine) and mine[-1].get('state') == 'running'


def walked(folder: Path) -> list[Path]:
    """All files and folders below, whatever appears and vanishes meanwhile."""
    return [
        Path(root) / name for root, folders, files in os.walk(folder) for name in (*folders, *files)
    ]


def leftovers(out: Path) -> list[Path]:
    """Temporary files, of living processes and of dead ones."""
    return [path for path in walked(out) if path.name[0] == '.' and path.suffix == '.tmp']


def being_written(out: Path) -> set[Path]:
    """Names of files and checkpoints that are being written now, or were just finished."""
    found = set()
    for path in walked(out):
        first, *more = path.relative_to(out).parts
        step = first == 'checkpoints' and len(more) == 4
        table = (path.suffix, len(more)) in (('.parquet', 1), ('.zip', 2))
        if step or table or (path.suffix == '.tmp' and path.name[0] == '.'):
            found.add(path)
    return found


def kill(site: Site) -> bool:
    """SIGKILL of a worker, anywhere."""
    if not (found := site.targets()):
        return False
    _kill(site.draw.choice(found))
    return True


def kill_at_write(site: Site) -> bool:
    """SIGKILL of a worker a moment after something new is written; see `fire`."""
    if not (found := site.targets(training=True)):
        return False
    delay = site.draw.choice([0, site.draw.uniform(0, 0.01), site.draw.uniform(0, 0.1)])
    site.armed.append((site.draw.choice(found), being_written(site.out), delay))
    return True


def fire(site: Site) -> None:
    """Kills the armed workers whose moment has come."""
    for armed in list(site.armed):
        worker, before, delay = armed
        if worker.code() is not None:
            site.armed.remove(armed)
        elif being_written(site.out) - before:
            time.sleep(delay)
            _kill(worker)
            site.armed.remove(armed)
            site.counts['SIGKILL at a write'] += 1


def _kill(worker: Worker) -> None:
    worker.may.add(-signal.SIGKILL)
    worker.send(signal.SIGKILL)


def terminate(site: Site) -> bool:
    """SIGTERM: the worker saves and ends with 75, or is just finished."""
    return _ask(site, signal.SIGTERM)


def user_signal(site: Site) -> bool:
    """SIGUSR2, which SLURM sends: the worker does the same."""
    return _ask(site, signal.SIGUSR2)


def _ask(site: Site, number: int) -> bool:
    if not (found := site.targets(training=True)):
        return False
    worker = site.draw.choice(found)
    # A worker whose chunk was finished in between no longer listens: `code_is_right`.
    worker.may |= {75}
    worker.asked = time.monotonic()
    worker.send(number)
    return True


def freeze(site: Site) -> bool:
    """SIGSTOP; a successor starts, and after SIGCONT both write."""
    found = site.targets()
    if not found or len(site.live) >= MOST_ALIVE:
        return False
    worker = site.draw.choice(found)
    worker.racing = True
    worker.send(signal.SIGSTOP)
    site.in_seconds(3, 12, lambda: worker.send(signal.SIGCONT))
    return True


def race(site: Site) -> bool:
    """One or two more workers of a chunk that somebody is at."""
    found, room = site.targets(), MOST_ALIVE - len(site.live)
    if not found or room < 1:
        return False
    first = site.draw.choice(found)
    first.racing = True
    for _ in range(min(site.draw.choice([1, 2]), room)):
        site.start(first.chunk, HEALTHY).racing = True
    return True


def cut_checkpoint(site: Site) -> bool:
    """A file of a checkpoint gets shorter; mostly its writer dies too, as when power fails."""
    steps = [
        path
        for chunk in site.unfinished()
        for path in walked(site.out / 'checkpoints' / chunk)
        if path.name.isdigit() and len(path.relative_to(site.out).parts) == 5
    ]
    if not steps:
        return False
    step = site.draw.choice(sorted(steps))
    _power_fails(site, step.parents[2].name)
    return _cut(site, [path for path in walked(step) if path.is_file()])


def cut_piece(site: Site) -> bool:
    """The tables of a finished piece get shorter; mostly its writer dies too."""
    left = site.unfinished()
    pieces = [p for c in left for p in (site.out / 'checkpoints' / c).glob('*.zip')]
    if not pieces:
        # There are pieces where memory is small: the next worker makes some.
        twists = site.twists + [worker.twist for worker in site.live]
        if not any(twist.most for twist in twists):
            out_of_memory(site)
        return False
    piece = site.draw.choice(sorted(pieces))
    _power_fails(site, piece.parent.name)
    return _cut(site, [piece])


def _power_fails(site: Site, chunk: str) -> None:
    """Mostly, kills who works at a chunk: the successor meets what is cut short."""
    if site.draw.random() < 0.7:
        for worker in site.targets():
            if worker.chunk == chunk:
                _kill(worker)


def cut_attempt(site: Site) -> bool:
    """The record of an attempt gets shorter."""
    left = site.unfinished()
    return _cut(site, [p for c in left for p in (site.out / 'attempts' / c).glob('*.json')])


def cut_temporary(site: Site) -> bool:
    """A temporary file of a dead process gets shorter; if there is none, half of one is left."""
    dead = []
    for path in leftovers(site.out):
        process = path.name.split('.')[-2].split('-')[1]
        if process.isdigit() and not process_alive(int(process)):
            dead.append(path)
    if dead and _cut(site, dead):
        return True
    if not (left := site.unfinished()) or site.troubles:
        return False
    chunk = site.draw.choice(left)
    folder = site.draw.choice(['results', 'layers', f'attempts/{chunk}', f'checkpoints/{chunk}'])
    name = f'.{chunk}.parquet.{machine_token()}-{_dead_process()}-{uuid.uuid4().hex[:8]}.tmp'
    (site.out / folder).mkdir(parents=True, exist_ok=True)
    (site.out / folder / name).write_bytes(b'PAR1' + bytes(site.draw.randrange(500)))
    return True


def _dead_process() -> int:
    process = subprocess.Popen(['true'])
    process.wait()
    return process.pid


def _cut(site: Site, paths: list[Path]) -> bool:
    """Cuts one of these files at a random length."""
    for path in site.draw.sample(sorted(paths), len(paths)):
        try:
            size = path.stat().st_size
            if size:
                os.truncate(path, site.draw.randrange(size))
                return True
        except OSError:  # it has just gone, or must not be changed
            continue
    return False


def full_disk(site: Site) -> bool:
    """The file system of the directory is full for some seconds."""
    if not site.small_disk or site.troubles or not site.targets(training=True):
        return False
    ballast = site.out / '.ballast'
    with open(ballast, 'wb', buffering=0) as file:
        for size in (2**20, 2**12):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue
    _break(site, 'full disk', lambda: ballast.unlink(missing_ok=True))
    return True


def short_files(site: Site) -> bool:
    """One worker's files must stay small from now on: its writes fail in the middle."""
    if not (found := site.targets(training=True)) or not hasattr(resource, 'prlimit'):
        return False
    worker = site.draw.choice(found)
    limits = (_FILE_LIMIT, resource.RLIM_INFINITY)
    try:
        resource.prlimit(worker.process.pid, resource.RLIMIT_FSIZE, limits)
    except OSError:
        return False
    worker.may.add(1)
    return True


def read_only(site: Site) -> bool:
    """Nothing new can be written to a folder for some seconds."""
    left = site.unfinished()
    names = ['results', 'layers', 'curves', 'flow', 'timing']
    names += [f'{kind}/{chunk}' for kind in ('attempts', 'checkpoints') for chunk in left]
    folders = [site.out / name for name in names if (site.out / name).is_dir()]
    if not folders or site.troubles or not site.targets(training=True):
        return False
    folder = site.draw.choice(folders)
    if not (undo := locked(folder)):
        return False
    _break(site, 'read-only folder', undo)
    return True


def locked(folder: Path) -> Callable[[], None] | None:
    """Makes a folder read-only; returns what undoes it, None if that is not possible here."""
    if os.geteuid():
        folder.chmod(0o555)
        return lambda: folder.chmod(0o755)
    done = subprocess.run(['chattr', '+i', folder], capture_output=True)  # root writes anywhere
    if done.returncode:
        return None
    return lambda: subprocess.run(['chattr', '-i', folder], capture_output=True) and None


def _break(site: Site, trouble: str, undo: Callable[[], None]) -> None:
    """Until it is undone, any write may fail."""
    site.troubles.add(trouble)
    for worker in site.live:
        worker.may |= {1} if worker.chunk else {1, 2}

    def repair() -> None:
        undo()
        site.troubles.discard(trouble)

    site.in_seconds(1.5, 4, repair)


def other_clock(site: Site) -> bool:
    """The next worker sees another time, hours or days off."""
    shift = site.draw.choice([-48, -2, 2, 48]) * _HOUR
    site.twists.append(Twist(clock=shift))
    return True


def other_times(site: Site) -> bool:
    """Records of attempts are from long ago, or from the future."""
    left = site.unfinished()
    paths = [p for c in left for p in (site.out / 'attempts' / c).glob('*.json')]
    moved = 0
    for path in paths:
        moment = time.time() + site.draw.choice([-2, 2]) * _HOUR
        try:
            os.utime(path, (moment, moment))
            moved += 1
        except OSError:
            continue
    return moved > 0


def out_of_memory(site: Site) -> bool:
    """The next worker has no memory for more than so many rows at once, from some step on."""
    most, step = site.draw.choice([2, 4]), site.draw.randrange(site.steps // 2)
    site.twists.append(Twist(most=most, step=step))
    return True


def coordinator(site: Site) -> bool:
    """A `jaxprune sweep` of the directory is started and killed."""
    if len(site.live) >= MOST_ALIVE or any(not worker.chunk for worker in site.live):
        return False
    worker = site.start('', HEALTHY)
    site.in_seconds(4, 20, lambda: _kill(worker))
    return True


def two_coordinators(site: Site) -> bool:
    """Two at once, with all chunks at hand; one of them is killed."""
    if len(site.live) >= MOST_ALIVE - 1 or any(not worker.chunk for worker in site.live):
        return False
    first, _ = site.start('', HEALTHY), site.start('', HEALTHY)
    site.in_seconds(6, 20, lambda: _kill(first))
    return True


#: Name -> what it does, and how often it is drawn.
KINDS: dict[str, tuple[Callable[[Site], bool], int]] = {
    'SIGKILL anywhere': (kill, 3),
    'SIGKILL at a write': (kill_at_write, 3),
    'SIGTERM': (terminate, 2),
    'SIGUSR2': (user_signal, 2),
    'SIGSTOP, a successor, SIGCONT': (freeze, 2),
    'racing writers': (race, 1),
    'checkpoint cut short': (cut_checkpoint, 3),
    'piece cut short': (cut_piece, 1),
    'attempt record cut short': (cut_attempt, 1),
    'temporary file cut short': (cut_temporary, 1),
    'full disk': (full_disk, 1),
    'file too large': (short_files, 1),
    'read-only folder': (read_only, 2),
    'clock of a worker': (other_clock, 1),
    'times of attempt records': (other_times, 1),
    'out of memory': (out_of_memory, 2),
    'coordinator killed': (coordinator, 1),
    'two coordinators': (two_coordinators, 1),
}
#: Kinds that only wait for their moment: they are counted when it comes.
DEFERRED = ('SIGKILL at a write', 'clock of a worker', 'out of memory')
