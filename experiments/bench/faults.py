"""A soak: hundreds of injected faults over one sweep, with real processes.

    python experiments/bench/faults.py --faults 300 --seed 0 --out faults.md

Workers (`jaxprune chunk`) and coordinators (`jaxprune sweep`) are killed, asked to leave, frozen
and thawed; files are cut short; the disk is full, a folder read-only, a clock wrong, the memory too
small; several processes write one chunk at once. Kinds and moments are drawn from the seed. When
all chunks of a directory are finished, its tables must equal those of an undisturbed sweep value
for value. Then the same sweep begins in another directory, until there were enough faults.

Two parts; without an option both.

  --soak  the faults
  --cost  what checkpoints cost: every save of a real chunk is timed

Whatever must not happen is marked WRONG, and the exit status is 1. As root on Linux, directories
are small file systems, in a mount namespace of their own, so that disks can be full. `--quick`
takes a few faults and a smaller sweep.
"""

import argparse
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w
from faults_cost import DEFAULT, TIMED, checkpoint_cost, share_by_default
from faults_kinds import KINDS
from faults_round import READ, Round, command, soak_directory
from tables import Table, check_out, measure

#: Says that this process has mounts of its own.
_OWN_MOUNTS = 'JAXPRUNE_FAULTS_OWN_MOUNTS'
#: Faults after which a directory may be finished.
MOST_EACH = 60
#: Faults in the time of an undisturbed sweep.
_PAUSES = 15
#: Steps of an epoch.
BATCHES = 10
TABLE: dict[str, Any] = {
    'name': 'faults',
    'model': {'name': 'mlp', 'widths': [4]},
    'data': {'name': 'mnist_small', 'train_examples': 400, 'test_examples': 100},
    'train': {'batch_size': 400 // BATCHES, 'momentum': 0.9},
    'prune': {'samples_per_class': 1},
    'grid': {
        'method': ['magnitude', 'snip', {'name': 'synflow', 'rounds': 3}],
        'compression': [2, 10],
        'seed': [0, 1, 2, 3, 4, 5],
    },
    'record': {'every': 100, 'flow': ['weight_norm']},
    'engine': {'chunk': 6, 'batching': 'map', 'checkpoint_minutes': 0.005},
}


def main() -> None:
    settings = parse()
    parts = {'soak': soak, 'cost': cost}
    if (settings.soak or not settings.cost) and os.environ.get(_OWN_MOUNTS) is None:
        _with_own_mounts()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # and clean up
    measure(settings, parts, 'something must not happen and did, see the tables')


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--soak', action='store_true', help='the faults')
    add('--cost', action='store_true', help='what checkpoints cost')
    add('--faults', type=int, default=300, help='how many at least (default 300)')
    add('--seed', type=int, default=0, help='of kinds and moments (default 0)')
    add(
        '--pause',
        type=float,
        help='seconds between faults, on average; by default a part of what '
        'the undisturbed sweep takes',
    )
    add('--epochs', type=int, default=200, help='of the sweep (default 200)')
    add('--directory', help='where the sweeps lie, and stay; by default a temporary folder')
    add('--out', help='a markdown file for the tables')
    add('--quick', action='store_true', help='two minutes, to see whether all runs')
    settings = parser.parse_args()
    settings.methods, settings.cost_epochs = 3, 60
    if settings.quick:
        settings.faults, settings.epochs = 14, 100
        settings.methods, settings.cost_epochs = 2, 4
    if min(settings.faults, settings.epochs) < 1 or not (settings.pause or 1) >= 0.2:
        parser.error('--faults and --epochs must be above 0, --pause at least 0.2')
    check_out(parser, settings.out)
    return settings


def _with_own_mounts() -> None:
    """Starts this program again where its mounts are seen by nobody else and end with it."""
    os.environ[_OWN_MOUNTS] = ''
    if os.geteuid() == 0 and shutil.which('unshare'):
        again = [sys.executable, *sys.argv]
        os.execvp('unshare', ['unshare', '--mount', '--propagation', 'private', *again])


def soak(
    settings: argparse.Namespace,
    tables: list[Table],
    notes: list[str],
    publish: Callable[[], None],
) -> None:
    """Directory after directory until there were enough faults."""
    print(f'seed {settings.seed}', flush=True)
    place = Path(settings.directory or tempfile.mkdtemp(prefix='faults-')).absolute()
    place.mkdir(parents=True, exist_ok=True)
    if any(place.iterdir()):
        raise SystemExit(f'--directory: {place} is not empty')
    # Read by workers when they are started.
    os.environ.update(
        JAX_COMPILATION_CACHE_DIR=str(place / 'compiled'),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0',
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES='0',
        JAXPRUNE_CACHE_DIR=str(place / 'kept'),
        PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), os.environ.get('PYTHONPATH', '')]),
    )
    spec = place / 'spec.toml'
    grid = {**TABLE['grid'], 'method': TABLE['grid']['method'][: settings.methods]}
    train = {**TABLE['train'], 'epochs': settings.epochs}
    spec.write_text(tomli_w.dumps({**TABLE, 'train': train, 'grid': grid}))
    began = time.monotonic()
    if command('sweep', spec, '--out', place / 'whole', log=place / 'whole.log'):
        raise SystemExit((place / 'whole.log').read_text())
    # On a machine that is slow now, workers need longer to get anywhere.
    pause = settings.pause or min(max((time.monotonic() - began) / _PAUSES, 0.8), 4.0)
    expected = {read.__name__: read(place / 'whole') for read in READ}
    draw, rounds = random.Random(settings.seed), []
    bag = draw.sample(list(KINDS), len(KINDS))  # each kind once, before any comes again
    tables += [Table('', '', (), []), Table('', '', (), [])]
    while (done := sum(r.counts.total() for r in rounds)) < settings.faults:
        out = place / f'round-{len(rounds)}'
        found = soak_directory(
            *(out, spec, expected, draw, bag, min(settings.faults - done, MOST_EACH)),
            *(pause, settings.epochs * BATCHES),
        )
        rounds.append(found)
        print(f'{out.name}: {found.counts.total()} faults, {dict(found.counts)}', flush=True)
        print(f'  {found.seconds:.0f} s, exit codes {dict(found.codes)}', flush=True)
        for line in found.wrong:
            print(f'  WRONG: {line}', flush=True)
        tables[-2:] = [_by_kind(settings, rounds), _by_directory(rounds)]
        publish()
    notes += [f'WRONG: {line}' for found in rounds for line in found.wrong]
    notes += _sentences(rounds)
    if not settings.directory and not any(found.wrong for found in rounds):
        shutil.rmtree(place, ignore_errors=True)


def _by_kind(settings: argparse.Namespace, rounds: list[Round]) -> Table:
    counts = sum((found.counts for found in rounds), Counter())
    rows = [{'kind': kind, 'faults': counts[kind]} for kind in KINDS]
    rows.append({'kind': 'all', 'faults': counts.total()})
    note = f'Seed {settings.seed}. Injected into one sweep, by kind.'
    return Table('Faults', note, ('kind', 'faults'), rows)


def _by_directory(rounds: list[Round]) -> Table:
    rows = []
    for number, found in enumerate(rounds):
        rows.append({
            'directory': number, 'faults': found.counts.total(), 'chunks': found.chunks,
            'attempts': found.attempts, 'rows lost': found.lost, 'rows doubled': found.doubled,
            'looks of a reader': found.looks, 's': f'{found.seconds:.0f}',
            'tables': f'WRONG ({len(found.wrong)})' if found.wrong else 'equal',
        })  # fmt: skip
    total = {
        name: sum(row[name] for row in rows)
        for name in ('faults', 'chunks', 'attempts', 'rows lost', 'rows doubled')
    }
    total['looks of a reader'] = sum(found.looks for found in rounds)
    total['s'] = f'{sum(found.seconds for found in rounds):.0f}'
    rows.append({'directory': 'all', **total})
    note = 'Each directory is the same sweep. Its tables are compared value for value.'
    return Table('Directories', note, tuple(rows[0]), rows)


def _sentences(rounds: list[Round]) -> list[str]:
    codes = sum((found.codes for found in rounds), Counter())
    seen = ', '.join(f'{count} x {code}' for code, count in sorted(codes.items()))
    graces = [seconds for found in rounds for seconds in found.graces]
    grace = (
        f'Seconds from SIGTERM or SIGUSR2 to exit code 75: median {statistics.median(graces):.2f}, '
        f'largest {max(graces):.2f}, of {len(graces)}.'
        if graces
        else 'No worker ended with exit code 75.'
    )
    return [f'Exit codes: {seen}.', grace]


def cost(
    settings: argparse.Namespace,
    tables: list[Table],
    notes: list[str],
    publish: Callable[[], None],
) -> None:
    """One chunk, each of whose saves is timed."""
    minutes = 0.01 if settings.quick else TIMED
    found = checkpoint_cost(settings.cost_epochs, minutes)
    if not found.saves:
        notes.append('The chunk was finished before a checkpoint was due.')
        return
    share = share_by_default(found)
    row = {
        'chunk': '4 x LeNet-300-100', 's': f'{found.seconds:.0f}', 'saves': len(found.saves),
        'MB': f'{found.megabytes:.1f}', 'ms a save': f'{1e3 * statistics.median(found.saves):.0f}',
        'largest ms': f'{1e3 * max(found.saves):.0f}',
        'share here': f'{100 * sum(found.saves) / found.seconds:.2f} %',
        f'share every {DEFAULT:g} min': f'{100 * share:.3f} %',
    }  # fmt: skip
    note = (
        f'A chunk is trained with a checkpoint every {60 * minutes:g} s, and every save is timed. '
        'The first save includes the import of Orbax. The last column is the mean of a save over '
        f'{DEFAULT:g} minutes, the default.'
    )
    tables.append(Table('Checkpoints', note, tuple(row), [row]))


if __name__ == '__main__':
    main()
