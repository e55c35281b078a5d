"""How a sweep of very many runs behaves on hundreds of hosts; nothing is trained.

    python experiments/bench/scale.py --out scale.md

The hosts are threads. Each takes chunks, writes the record of its attempt, sleeps, and writes
made-up tables of the right kind. Everything else is the product's own: planning, the coordinator,
`status`, the readers and the report. When half the chunks are finished, the coordinator is told to
leave, as by a signal; the hosts stop where they are. Everything is looked at, then a second
coordinator goes on. The first number of a cell is the seconds of one call; the second one, where
there is one, those of the processor, which other work on the machine changes little. The exponent
says how these grow with the number of runs: 1 is in proportion.

At the end the tables must hold every run once: otherwise the page says WRONG, and the exit status
is 1. Twenty minutes on two cores; `--quick` takes a hundred runs.
"""

import argparse
import itertools
import math
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
from tables import Table, check_out, measure

from jaxprune import report
from jaxprune.errors import Interrupted, first_line
from jaxprune.fleet.coordinator import run_elsewhere
from jaxprune.fleet.launcher import Ended, Launcher, Task
from jaxprune.stop import Stop
from jaxprune.sweep import make_spec, status, store
from jaxprune.sweep.attempts import attempt
from jaxprune.sweep.groups import group_of
from jaxprune.sweep.open_sweep import open_sweep, stored_spec
from jaxprune.sweep.spec import SweepSpec
from jaxprune.sweep.sweep_plan import checked_groups, make_plan
from jaxprune.sweep.timing import PHASES

METHODS = ('random', 'magnitude', 'snip', 'synflow', 'grasp')
COMPRESSIONS = 20
#: Parts that should not grow beyond these seconds, and at how many runs.
TARGETS = {
    f'{what}, {when} finished': (10_000, 2.0)
    for what in ('status', 'command `jaxprune status`')
    for when in ('half', 'all')
}


class Spent(NamedTuple):
    """Seconds by the clock, and of this process's processors, None where others worked."""

    wall: float
    cpu: float | None = None


class Hosts(NamedTuple):
    """Simulated machines.

    Attributes:
      launcher: gives them chunks; closing it ends them.
      permits: one is needed to finish a chunk; there are some for half of them.
    """

    launcher: Launcher
    permits: threading.Semaphore


def main() -> None:
    measure(parse(), {'scale': scale}, 'the tables do not hold every run once')


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--sizes', nargs='+', type=int, default=[1_000, 10_000, 100_000], metavar='RUNS',
        help='multiples of a hundred (default 1000 10000 100000)')  # fmt: skip
    add('--hosts', type=int, default=200, help='simulated machines (default 200)')
    add('--chunk', type=int, default=8,
        help='runs of a chunk (default 8, the fewest that the plan makes by itself)')  # fmt: skip
    add('--seconds', type=float, default=0.5, help='that a host sleeps for a chunk (default 0.5)')
    add('--no-report', action='store_true', help='leave the report out')
    add('--out', help='a markdown file for the tables')
    add('--quick', action='store_true', help='a minute, to see whether all runs')
    settings = parser.parse_args()
    settings.scale = True
    if settings.quick:
        settings.sizes, settings.hosts, settings.seconds = [100, 200], 4, 0.01
    if any(size < 100 or size % 100 for size in settings.sizes):
        parser.error('--sizes must be multiples of 100')
    if min(settings.hosts, settings.chunk) < 1 or settings.seconds < 0:
        parser.error('--hosts and --chunk must be above 0, --seconds not below')
    check_out(parser, settings.out)
    return settings


def scale(settings, tables: list[Table], notes: list[str], publish: Callable) -> None:
    sizes = sorted(settings.sizes)
    columns = ['part', *(f'{size:,}' for size in sizes)]
    columns += [f'exponent to {size:,}' for size in sizes[1:]]
    table = Table(
        'Seconds by the number of runs',
        f'{settings.hosts} simulated hosts, {settings.chunk} runs in a chunk, '
        f'{settings.seconds:g} s of sleep for each.',
        (*columns, 'target'), [],
    )  # fmt: skip
    tables.append(table)
    found: dict[int, dict[str, Spent]] = {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            found[size], wrong = simulated(settings, size, Path(folder) / 'sweep')
        notes += [f'{size:,} runs: WRONG: {text}' for text in wrong]
        table.rows[:] = [line(part, found, sizes) for part in found[size]]
        publish()


def line(part: str, found: Mapping[int, Mapping[str, Spent]], sizes: Sequence[int]) -> dict:
    """A row of the table: seconds at every size, and how they grow."""
    row = {'part': part}
    done = [size for size in sizes if part in found.get(size, {})]
    for size in done:
        spent = found[size][part]
        row[f'{size:,}'] = ' / '.join(f'{s:.3g}' for s in spent if s is not None)
    for small, large in itertools.pairwise(done):
        ratio = cost(found[large][part]) / cost(found[small][part])
        row[f'exponent to {large:,}'] = f'{math.log(ratio) / math.log(large / small):.2f}'
    if part in TARGETS:
        runs, seconds = TARGETS[part]
        row['target'] = f'under {seconds:g} s for {runs:,} runs'
    return row


def cost(spent: Spent) -> float:
    """What is compared: processor seconds where they are known."""
    return max(spent.wall if spent.cpu is None else spent.cpu, 1e-9)


def specification(size: int, chunk: int) -> SweepSpec:
    """So many runs of a tiny network: seeds x 20 compressions x 5 methods."""
    return make_spec({
        'name': 'scale',
        'model': {'name': 'mlp', 'widths': [8]},
        'data': {'name': 'mnist_small', 'train_examples': 300, 'test_examples': 100},
        'train': {'epochs': 1, 'batch_size': 100},
        'grid': {
            'method': list(METHODS),
            'compression': [2.0 ** (1 + i / 4) for i in range(COMPRESSIONS)],
            'seed': list(range(size // (len(METHODS) * COMPRESSIONS))),
        },
        'engine': {'chunk': chunk},
    })  # fmt: skip


def simulated(settings, size: int, out: Path) -> tuple[dict[str, Spent], list[str]]:
    """Seconds of every part for so many runs, and what is wrong with the tables at the end."""
    found: dict[str, Spent] = {}

    def note(part: str, spent: Spent) -> None:
        found[part] = spent
        print(f'{size:,} runs: {part}: {spent}', flush=True)

    @contextmanager
    def timed(part: str, alone: bool = True) -> Iterator[None]:
        began, used = time.perf_counter(), time.process_time()
        yield
        cpu = time.process_time() - used if alone else None
        note(part, Spent(time.perf_counter() - began, cpu))

    spec = specification(size, settings.chunk)
    with timed('plan: checked_groups'):
        groups = checked_groups(spec)
    with timed('plan: make_plan'):
        plan = make_plan(spec, 'spec', groups)
    with timed('plan: open_sweep'):
        open_sweep(spec, out, plan)
    with timed('read plan.json'):
        plan = store.read_plan(out)
    with timed('a chunk command, until it would train'):
        group_of(stored_spec(out), store.read_plan(out)['chunks'][0]['program'])
    hosts = simulated_hosts(out, plan, settings.hosts, settings.seconds)
    with timed('hosts at work, first half'):
        worked(out, hosts.launcher, half_finished(out, len(plan['chunks'])))
    begin, look = looks(out)
    note('coordinator: until all is submitted', Spent(begin))
    note('coordinator: one look', Spent(look))
    how_far(out, timed, 'half finished')
    hosts.permits.release(len(plan['chunks']))
    with timed('hosts at work, second half'):
        run_elsewhere(out, hosts.launcher)
    how_far(out, timed, 'all finished')
    with timed('read_results'):
        results = store.read_results(out)
    if not settings.no_report:
        with timed('report'):
            report.write(out)
    wrong = []
    if sorted(results['run_id']) != sorted(run['run_id'] for run in plan['runs']):
        wrong.append('results are missing, or there twice')
    if status(out)['runs_finished'] != size:
        wrong.append('status counts other runs')
    return found, wrong


def how_far(out: Path, timed: Callable, when: str) -> None:
    """Times `status`, as a function and as a command."""
    with timed(f'status, {when}'):
        status(out)
    with timed(f'command `jaxprune status`, {when}', alone=False):
        command = [sys.executable, '-m', 'jaxprune', 'status', str(out)]
        subprocess.run(command, check=True, capture_output=True)


def worked(out: Path, launcher: Launcher, stop: Stop) -> None:
    """A coordinator at work until it is told to leave."""
    try:
        run_elsewhere(out, launcher, stop=stop)
    except Interrupted:
        return


def half_finished(out: Path, chunks: int) -> Stop:
    """Leaves when half of so many chunks are finished."""
    return Stop(lambda: 2 * len(store.finished_chunks(out)) >= chunks, lambda: False)


def looks(out: Path) -> tuple[float, float]:
    """Seconds of a coordinator until it has submitted everything, and of its next look."""
    moments = [time.perf_counter()]

    def now() -> bool:
        moments.append(time.perf_counter())
        return len(moments) > 3

    def ended() -> list[Ended]:
        now()
        return []

    launcher = Launcher(set, lambda tasks: None, ended, lambda: None)
    # It asks whether to leave, waits, hears of the ended tasks, looks, and asks again.
    worked(out, launcher, Stop(now, lambda: False))
    began, submitted, heard, looked = moments
    return submitted - began, looked - heard


def simulated_hosts(out: Path, plan: Mapping[str, Any], count: int, seconds: float) -> Hosts:
    """So many threads that take chunks and train nothing."""
    waiting: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    over: queue.SimpleQueue[Ended] = queue.SimpleQueue()
    held: dict[str, None] = {}
    chunks = {chunk['id']: chunk['runs'] for chunk in plan['chunks']}
    permits = threading.Semaphore(-(-len(chunks) // 2))
    runs = {run['run_id']: run for run in plan['runs']}
    sizes = {p: size for program in plan['programs'] for p, size in program['prunable'].items()}

    def host() -> None:
        while (chunk := waiting.get()) is not None:
            try:
                with attempt(out, chunk, {'runs': len(chunks[chunk])}):
                    time.sleep(seconds)
                    permits.acquire()
                    made = made_up([runs[run] for run in chunks[chunk]], sizes)
                    store.write_chunk(out, chunk, made)
                over.put(Ended(chunk, 0))
            except Exception as error:
                over.put(Ended(chunk, 1, f'{type(error).__name__}: {first_line(error)}'))
            held.pop(chunk, None)

    threads = [threading.Thread(target=host, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()

    def submit(tasks: Sequence[Task]) -> None:
        for task in tasks:
            held[task.chunk] = None
            waiting.put(task.chunk)

    def ended() -> list[Ended]:
        return [over.get() for _ in range(over.qsize())]

    def close() -> None:
        for _ in threads:
            waiting.put(None)
        for thread in threads:
            thread.join()

    return Hosts(Launcher(lambda: set(held), submit, ended, close), permits)


def made_up(runs: Sequence[Mapping[str, Any]], sizes: Mapping[str, int]) -> store.Chunk:
    """Tables of a chunk: one row for each run, with numbers that follow from the run alone."""
    results, layers = [], []
    for run in runs:
        density = 1 / run['compression']
        accuracy = 0.9 * density ** (0.1 + 0.01 * (run['seed'] % 7))
        results.append({
            **{key: run[key] for key in ('run_id', 'label', 'method', 'allocation', 'seed',
                                         'target', 'learning_rate', 'weight_decay')},
            'model': 'mlp', 'dataset': 'mnist_small', 'target_compression': run['compression'],
            'density': density, 'compression': run['compression'],
            'effective_compression': run['compression'], 'step': 3, 'epoch': 1,
            'train_loss': 1 - accuracy, 'test_loss': 1 - accuracy, 'test_accuracy': accuracy,
        })  # fmt: skip
        for path, size in sizes.items():
            kept = round(size * density)
            layers.append((run['run_id'], path, size, kept, kept))
    return store.Chunk(
        pl.DataFrame(results, schema=store.RESULTS_FILE),
        pl.DataFrame(layers, schema=store.LAYERS, orient='row'),
        pl.DataFrame(schema=store.CURVES),
        pl.DataFrame(schema=store.FLOW),
        dict.fromkeys((*PHASES, 'run_steps'), 1.0),
    )


if __name__ == '__main__':
    main()
