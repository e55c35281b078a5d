"""What pruning while training costs: a step with a method at work against a plain one.

    python experiments/bench/once.py --out once.md

Two parts; without an option both. No data are needed beyond the digits of `mnist_small`.

  --steps     the sweep's own step, for each method that changes training, against the same step
              without one; in turns, medians, and the median of the ratios within a round
  --together  HESSO at four densities and several seeds: all as rows of one program, against the
              same runs one after another, each in a compiled program of one row. The weights at
              the end must agree up to rounding

Rows that do not agree are marked WRONG, and the exit status is 1. Ten minutes on two cores;
`--quick` takes the smallest of everything.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from hooked_steps import Case, begun, case_of, timed
from tables import Table, check_out, measure

from jaxprune import method
from jaxprune.sweep.advance import Rows
from jaxprune.sweep.chunk import rows_of
from jaxprune.sweep.devices import use_all_cores
from jaxprune.sweep.grid import Run

NETS: dict[str, dict[str, Any]] = {
    'LeNet-300-100': {'name': 'lenet300100'},
    'small VGG': {'name': 'small_vgg'},
}
DENSITIES = (0.7, 0.5, 0.3, 0.1)
#: Weights after many steps in another order of sums.
LARGEST = 1e-3


def main() -> None:
    settings = parse()
    use_all_cores()
    measure(settings, {'steps': steps, 'together': together}, 'runs do not agree, see the tables')


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--steps', action='store_true', help='the step of every method')
    add('--together', action='store_true', help='many runs in one program')
    add('--nets', nargs='+', choices=tuple(NETS), default=list(NETS), metavar='NET',
        help=', '.join(NETS))  # fmt: skip
    add('--runs', type=int, default=4, help='of a step (default 4)')
    add('--seeds', type=int, default=4, help='for each of four densities (default 4)')
    add('--rounds', type=int, default=7, help='timed turns (default 7)')
    add('--out', help='a markdown file for the tables')
    add('--quick', action='store_true', help='a minute, to see whether all runs')
    settings = parser.parse_args()
    if settings.quick:
        settings.runs, settings.seeds, settings.rounds = 2, 1, 2
        settings.nets = settings.nets[:1]
    if min(settings.runs, settings.seeds, settings.rounds) < 1:
        parser.error('--runs, --seeds and --rounds must be above 0')
    check_out(parser, settings.out)
    return settings


def entry_of(name: str) -> dict[str, Any]:
    """What a specification says of a method."""
    norms = {'keep_all_units': 'dense'} if name == 'slimming' else {}
    return {'name': name, 'granularity': 'unit', 'rounds': 3 if name == 'hesso' else 2, **norms}


def steps(settings, tables: list[Table], notes: list[str], publish: Callable) -> None:
    table = Table(
        'A step with a method at work',
        'Milliseconds of a run and step; x plain: over the step without a method, the median of '
        'ratios within a round. HESSO chooses in one step of a period, and DHSPG in its first; '
        'both are among the timed ones.',
        ('net', 'runs', 'method', 'plain ms', 'ms', 'x plain', 'from', 'to'), [],
    )  # fmt: skip
    tables.append(table)
    for net in settings.nets:
        for name, entry in method.METHODS.items():
            if not (entry.hooked and entry.coupled) or (
                name == 'slimming' and net == 'LeNet-300-100'
            ):
                continue
            case = case_of(NETS[net], entry_of(name), (0.5,), settings.runs)
            plain, own = timed(case, settings.rounds)
            ratios = [b / a for a, b in zip(plain, own, strict=True)]
            table.rows.append({
                'net': net, 'runs': settings.runs, 'method': entry.title,
                'plain ms': f'{statistics.median(plain):.3f}',
                'ms': f'{statistics.median(own):.3f}',
                'x plain': f'{statistics.median(ratios):.2f}',
                'from': f'{min(ratios):.2f}', 'to': f'{max(ratios):.2f}',
            })  # fmt: skip
            print(table.rows[-1], flush=True)
            publish()


def together(settings, tables: list[Table], notes: list[str], publish: Callable) -> None:
    table = Table(
        'Seeds and densities as rows of one program',
        'HESSO: milliseconds of a run and step. One by one: each run in a compiled program of one '
        'row, on one device. x: how many times as fast all of them together are.',
        ('net', 'runs', 'together ms', 'one by one ms', 'x', 'weights'), [],
    )  # fmt: skip
    tables.append(table)
    for net in settings.nets:
        whole = case_of(NETS[net], entry_of('hesso'), DENSITIES, settings.seeds)
        alone = case_of(NETS[net], entry_of('hesso'), DENSITIES, settings.seeds, rows=1)
        many, single = [], []
        for turn in range(max(settings.rounds // 2, 1) + 1):
            ms, states = trained(whole, whole.runs, whole.rows)
            each = [trained(alone, [run], rows_of([run], 1, alone.engine)[0]) for run in whole.runs]
            if turn:
                many.append(ms / len(whole.runs))
                single.append(sum(t for t, _ in each) / len(whole.runs))
        error = max(
            float(np.abs(a[i] - b[0]).max() / (np.abs(b).max() + 1e-9))
            for i, (_, one) in enumerate(each)
            for a, b in zip(
                jax.tree.leaves(states.params), jax.tree.leaves(one.params), strict=True
            )
        )
        table.rows.append({
            'net': net, 'runs': len(whole.runs),
            'together ms': f'{statistics.median(many):.3f}',
            'one by one ms': f'{statistics.median(single):.3f}',
            'x': f'{statistics.median(b / a for a, b in zip(many, single, strict=True)):.2f}',
            'weights': 'equal' if error <= LARGEST else f'WRONG: {error:.0e}',
        })  # fmt: skip
        print(table.rows[-1], flush=True)
        publish()


def trained(case: Case, runs: list[Run], rows: Rows) -> tuple[float, Any]:
    """Milliseconds of a step of all runs until the next round, and the packed states."""
    stop = case.program.timeline.events[1].clock
    states = begun(case, runs, rows)
    jax.block_until_ready(jax.tree.leaves(states))
    began = time.perf_counter()
    states, losses = case.engine.advance(0, stop, rows, states, hooked=True)
    losses()
    return 1e3 * (time.perf_counter() - began) / stop, case.engine.pack(states)


if __name__ == '__main__':
    main()
