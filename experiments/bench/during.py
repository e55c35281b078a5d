"""What pruning while training costs: methods that move masks, or pull at weights.

    python experiments/bench/during.py --out during.md

For every such method of single weights (n:m and blocks where a method asks for them), 16 runs at
density 0.1 in one program: the sweep's own step with the method at work, against the step of SGD
under masks that stand still; and one refresh of the masks, with its score, alone and in the middle
of training. In turns, medians. With a refresh every k = 100 steps the refresh is to cost less than
10 %.

No data are needed beyond the digits of `mnist_small`. LeNet-300-100 takes a quarter of an hour on
two cores, the small VGG more; `--quick` takes the smallest of everything.
"""

import argparse
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
from hooked_steps import Case, begun, case_of, timed
from tables import Table, check_out, measure

from jaxprune import method
from jaxprune.sweep.devices import use_all_cores
from jaxprune.sweep.event_calls import event_calls

NETS: dict[str, dict[str, Any]] = {
    'LeNet-300-100': {'name': 'lenet300100'},
    'small VGG': {'name': 'small_vgg'},
}
METHODS = [n for n, entry in method.METHODS.items() if entry.hooked and not entry.coupled]
#: Steps from one refresh to the next, and the largest share of their time that a refresh may take.
EVERY, SHARE = 100, 0.1
#: Steps of an epoch where a refresh is timed. It comes inside of one: EVERY is no multiple.
EPOCH = 75
#: A refresh is timed in the middle of training where `EVERY` steps of all runs take fewer seconds.
LONGEST = 3.0


def main() -> None:
    settings = parse()
    use_all_cores()
    measure(settings, {'steps': steps}, 'a refresh costs more than it should, see the tables')


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--nets', nargs='+', choices=tuple(NETS), default=list(NETS), metavar='NET',
        help=', '.join(NETS))  # fmt: skip
    add('--methods', nargs='+', choices=METHODS, default=METHODS, metavar='NAME',
        help='some of ' + ', '.join(METHODS))  # fmt: skip
    add('--runs', type=int, default=16, help='in one program (default 16)')
    add('--steps', type=int, default=20, help='timed in a turn (default 20)')
    add('--rounds', type=int, default=5, help='timed turns (default 5)')
    add('--out', help='a markdown file for the table')
    add('--quick', action='store_true', help='a minute, to see whether all runs')
    settings = parser.parse_args()
    if settings.quick:
        settings.runs, settings.rounds, settings.steps = 2, 1, 2
        settings.nets, settings.methods = settings.nets[:1], settings.methods[:3]
    # One turn of few steps says nothing of a few percent.
    settings.share = float('inf') if settings.quick else SHARE
    if min(settings.runs, settings.steps, settings.rounds) < 1:
        parser.error('--runs, --steps and --rounds must be above 0')
    check_out(parser, settings.out)
    return settings


def steps(settings, tables: list[Table], notes: list[str], publish: Callable) -> None:
    table = Table(
        'A step with a method at work, and a refresh of its masks',
        f'Milliseconds of a run. x: over a step of masked SGD, the median of ratios within a turn. '
        f'refresh: alone, from the call until its masks are there; refresh %: of {EVERY} steps of '
        f'masked SGD. in training %: what {2 * EVERY} steps with a refresh in the middle take '
        f'longer than the same steps alone, of {EVERY} steps, median and range, marked above '
        f'{SHARE:.0%}; where {EVERY} steps of all runs take more than {LONGEST:g} s it is left '
        'out, and the refresh alone is marked. '
        'Methods that refresh nothing between their first round and their last have none.',
        ('net', 'runs', 'method', 'masked ms', 'ms', 'x', 'from', 'to', 'refresh ms', 'refresh %',
         'in training %'),
        [],
    )  # fmt: skip
    tables.append(table)
    for net in settings.nets:
        for name in settings.methods:
            table.rows.append({'net': net, 'runs': settings.runs, **row(settings, net, name)})
            print(table.rows[-1], flush=True)
            publish()


def row(settings, net: str, name: str) -> dict[str, Any]:
    """The figures of a method on a network."""
    method_entry = method.METHODS[name]
    found = re.search('granularity = "(.*?)"', method_entry.example)
    pattern = {'granularity': found[1]} if found else {}
    rounds = 3 if method_entry.scheduled or method_entry.rounds > 2 else 2
    entry = {'name': name, 'rounds': rounds, **pattern}
    case = case_of(NETS[net], entry, (0.1,), settings.runs, examples=128 * settings.steps)
    plain, own = timed(case, settings.rounds)
    ratios = [b / a for a, b in zip(plain, own, strict=True)]
    masked = statistics.median(plain)
    figures = {
        'method': method_entry.title,
        'masked ms': f'{masked:.4g}',
        'ms': f'{statistics.median(own):.4g}',
        'x': f'{statistics.median(ratios):.2f}',
        'from': f'{min(ratios):.2f}',
        'to': f'{max(ratios):.2f}',
    }
    if rounds == 2:
        return figures
    entry |= {'end': 2 * EVERY, 'time_unit': 'steps'}
    case = case_of(NETS[net], entry, (0.1,), settings.runs, examples=128 * EPOCH, epochs=3)
    ms = refresh(case, settings.rounds)
    alone = ms / (EVERY * masked)
    figures['refresh ms'] = f'{ms:.4g}'
    figures['refresh %'] = f'{100 * alone:.2g}'
    if EVERY * masked * settings.runs > 1e3 * LONGEST:
        figures['refresh %'] += ' WRONG' * (alone > settings.share)
        return figures
    shares = in_training(case, settings.rounds)
    middle, least, most = statistics.median(shares), min(shares), max(shares)
    figures['in training %'] = f'{100 * middle:.2g} ({100 * least:.2g} to {100 * most:.2g})'
    figures['in training %'] += ' WRONG' * (middle > settings.share)
    return figures


def refresh(case: Case, rounds: int) -> float:
    """Milliseconds of a run for the second round, score and selection: the median."""
    event, found = case.program.timeline.events[1], []
    for turn in range(rounds + 1):  # the first one compiles
        states = begun(case, case.runs, case.rows)
        # Training draws the batches of the epoch; the refresh looks at one of them.
        states = case.engine.advance(EPOCH, EVERY, case.rows, states, hooked=True)[0]
        (call,) = event_calls(case.program, case.runs)(event)
        jax.block_until_ready(jax.tree.leaves(states))
        began = time.perf_counter()
        states, info = case.engine.prune(case.rows, call, states)
        info()
        jax.block_until_ready(jax.tree.leaves(states))
        if turn:
            found.append(1e3 * (time.perf_counter() - began) / len(case.runs))
    return statistics.median(found)


def in_training(case: Case, rounds: int) -> list[float]:
    """What a refresh in the middle of `2 * EVERY` steps adds, as shares of `EVERY` steps.

    As in a sweep: nothing waits for the refresh, the next steps are queued behind it. Against this
    stand the same steps, timed apart from the refresh: on a CPU, the weights after it may be slower
    to train.
    """
    engine, found = case.engine, []
    (call,) = event_calls(case.program, case.runs)(case.program.timeline.events[1])

    def queued(wait: bool) -> float:
        """Seconds; with `wait` those of the refresh are left out."""
        states = begun(case, case.runs, case.rows)
        jax.block_until_ready(jax.tree.leaves(states))
        began = time.perf_counter()
        states, first = engine.advance(0, EVERY, case.rows, states, hooked=True)
        if wait:
            first()
        before = time.perf_counter()
        states, info = engine.prune(case.rows, call, states)
        if wait:
            info()
            jax.block_until_ready(jax.tree.leaves(states))
        after = time.perf_counter()
        states, second = engine.advance(EVERY, 2 * EVERY, case.rows, states, hooked=True)
        for fetch in (first, second, info):
            fetch()
        return time.perf_counter() - began - (after - before if wait else 0)

    for turn in range(rounds + 1):  # the first one compiles
        apart, together = queued(True), queued(False)
        if turn:
            found.append(2 * (together / apart - 1))
    return found


if __name__ == '__main__':
    main()
