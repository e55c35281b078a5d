"""What Shapley values of units cost, and how fast their error falls.

    pip install -e '.[bench]' && python experiments/bench/shapley.py --out shapley.md

Four parts; without an option all of them. The digits of `mnist_small` are the data.

  --speed   evaluations (losses of all examples without some units) per second for one layer:
            `jaxprune.score.shapley` with both loops and several `batch_size`, a Python loop that
            runs the compiled network, or what follows the layer, for each removal, and PyTorch
            loops with 1 and 2 threads. In turns, along the same orders; medians, and medians of the
            ratios within a round. The values of all ways must agree
  --scores  seconds and memory of `unit_shapley` for all layers of a network, compiled as one
            program as `jp.prune` does it
  --cost    seconds of CPU against the number of orders, of units and of examples
  --error   the error of each estimator against the number of evaluations, for two trained layers
            whose exact values are known; table and figure

Values that do not agree are marked WRONG, and the exit status is 1. A quarter of an hour on two
cores; `--quick` takes the smallest of everything.
"""

import argparse
import functools
import importlib.util
import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from shapley_error import errors
from shapley_ways import NETS, Case, case_from, case_of, game_of, images, problem_of, ways
from tables import Table, check_out, measure

from jaxprune import data, nn
from jaxprune.score.coalitions import LOOPS
from jaxprune.score.shapley import shapley
from jaxprune.score.unit_loss import unit_shapley

MIB = 2**20
AT_ONCE = (1, 4, 16, 64)
THREADS = (1, 2)
#: Of the largest loss; credits are differences of losses, float32 rounds at 1e-7 of them.
LARGEST_ERROR = 1e-5
#: A program with more blocks takes minutes to compile.
MOST_BLOCKS = 100


def main() -> None:
    settings = parse()
    # Else a second call would report the time to read a file as the time to compile.
    jax.config.update('jax_enable_compilation_cache', False)
    parts = {'speed': speeds, 'scores': whole_scores, 'cost': costs, 'error': errors}
    measure(settings, parts, 'values do not agree, see the tables')


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--speed', action='store_true', help='evaluations per second')
    add('--scores', action='store_true', help='all layers as one program')
    add('--cost', action='store_true', help='seconds against orders, units, examples')
    add('--error', action='store_true', help='error of the estimators')
    add('--nets', nargs='+', choices=tuple(NETS), default=list(NETS), metavar='NET',
        help='of speed and scores: ' + ', '.join(NETS))  # fmt: skip
    add('--rounds', type=int, default=3, help='timed turns (default 3)')
    add('--keys', type=int, default=200, help='seeds of an estimate (default 200)')
    add('--out', help='a markdown file for the tables; the figure lies beside it')
    add('--quick', action='store_true', help='a minute, to see whether all runs')
    settings = parser.parse_args()
    if settings.quick:
        settings.rounds, settings.keys = 1, 16
        settings.nets = settings.nets[:3]
    if min(settings.rounds, settings.keys) < 1:
        parser.error('--rounds and --keys must be above 0')
    check_out(parser, settings.out)
    return settings


# --- speed ----------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """One call: its values, seconds without those of compiling, these, and seconds of CPU."""

    values: np.ndarray
    seconds: float
    compiling: float
    cpu: float


class Compiling:
    """Seconds that JAX has spent on tracing and compiling, by its own account."""

    def __init__(self) -> None:
        self.spans: list[tuple[float, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self.note)

    def note(self, event: str, seconds: float, **_: Any) -> None:
        if event.startswith('/jax/core/compile/'):
            now = time.perf_counter()
            self.spans.append((now - seconds, now))

    def since(self, start: float) -> float:
        """Spans lie within each other where a traced function calls another."""
        total, end = 0.0, start
        for first, last in sorted(span for span in self.spans if span[1] > start):
            total += max(0.0, last - max(first, end))
            end = max(end, last)
        return total


def speeds(settings, tables: list[Table], notes: list[str], publish: Callable) -> None:
    table = Table(
        'Evaluations per second',
        'Units of one layer, removed after its activation. Evaluations: losses of all examples'
        ' without some units. x loop: times the JAX loop that runs the network. x PyTorch: times'
        ' the best PyTorch way. Compile s: of one call, not in the rates. map: compiled as one'
        ' program; unrolled: called as it is, which compiles one block in each call. CPU ms: of all'
        ' threads, for an evaluation; unknown where calls compile.',
        ('net', 'units', 'orders', 'examples', 'way', 'at once', 'threads', 'evaluations/s',
         'x loop', 'x PyTorch', 'CPU ms', 'compile s', 'values'), [],
    )  # fmt: skip
    tables.append(table)
    compiling = Compiling()
    missing = importlib.util.find_spec('torch') is None
    if missing:
        notes.append('PyTorch: left out, not installed')
    for name in settings.nets:
        case = case_of(name, *((2, 20) if settings.quick else ()))
        every = ways(case, (4,) if settings.quick else AT_ONCE)
        if not missing:
            import shapley_torch

            every |= shapley_torch.ways(case, THREADS)
        rounds = in_turns(every, settings.rounds, compiling)
        table.rows.extend(rows_of(case, rounds))
        print(*table.rows[-len(every) :], sep='\n', flush=True)
        publish()


def in_turns(
    every: dict[str, Callable[[], Any]], rounds: int, compiling: Compiling
) -> list[dict[str, Turn]]:
    """Each way once per round; a round before them, of what compiles once, is not counted."""
    found = []
    for number in range(rounds + 1):
        turns = {}
        for name, values in every.items():
            if not number and name.startswith('jaxprune unrolled'):
                continue
            began, cpu = time.perf_counter(), time.process_time()
            made = np.asarray(values())
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
            spent = compiling.since(began)
            turns[name] = Turn(made, seconds - spent, spent, cpu)
        found.append(turns)
    first, *others = found
    return [
        {
            name: turn._replace(
                compiling=first[name].compiling if name in first else turn.compiling
            )
            for name, turn in turns.items()
        }
        for turns in others
    ]


def rows_of(case: Case, rounds: list[dict[str, Turn]]) -> list[dict[str, Any]]:
    """A row for each way; of PyTorch's thread counts only the better one."""
    evaluations = len(case.orders) * (case.n + 1)
    scale = largest_loss(case)
    expected = rounds[0]['JAX loop, network'].values
    rows, names = [], best_threads(rounds)
    peers = [name for name in names if name.startswith('PyTorch')]
    for name in names:
        turns = [turns[name] for turns in rounds]
        way, size, threads = described(name)
        each = 1e3 * statistics.median(turn.cpu for turn in turns) / evaluations
        over = {'x loop': ['JAX loop, network'], 'x PyTorch': peers}
        rows.append({
            'net': case.name, 'units': case.n, 'orders': len(case.orders),
            'examples': len(case.batch.y), 'way': way, 'at once': size, 'threads': threads,
            'evaluations/s': f'{evaluations / statistics.median(t.seconds for t in turns):,.0f}',
            'CPU ms': '' if 'unrolled' in name else f'{each:.3f}',
            'compile s': f'{statistics.median(t.compiling for t in turns):.1f}'
            if not name.startswith('PyTorch') else '',
            'values': agreement([t.values for t in turns], expected, scale),
            **{column: ratio(rounds, name, others) for column, others in over.items()},
        })  # fmt: skip
    return rows


def best_threads(rounds: list[dict[str, Turn]]) -> list[str]:
    """All ways; of those that differ in threads alone, the one with the least median time."""

    def seconds(name: str) -> float:
        return statistics.median(turns[name].seconds for turns in rounds)

    best: dict[str, str] = {}
    for name in rounds[0]:
        way = name.rpartition(', ')[0] if name.startswith('PyTorch') else name
        best[way] = min(best.get(way, name), name, key=seconds)
    return list(best.values())


def described(name: str) -> tuple[str, str, str]:
    """The way, how many masks it takes at once, and its threads."""
    way, *numbers = name.split(', ')
    words = [part for part in numbers if not part.isdigit()]
    counts = [part for part in numbers if part.isdigit()]
    threads = counts.pop() if way.startswith('PyTorch') else ''
    return ', '.join([way, *words]), counts[0] if counts else '1', threads


def ratio(rounds: list[dict[str, Turn]], name: str, others: list[str]) -> str:
    """Times as fast as the best of the others: the median over rounds."""
    if not others:
        return ''
    each = [min(turns[o].seconds for o in others) / turns[name].seconds for turns in rounds]
    return f'{statistics.median(each):.2f}'


def largest_loss(case: Case) -> float:
    """Of an example, with all units of the layer or with none."""
    losses = game_of(case)
    return max(float(losses(jnp.full(case.n, there)).max()) for there in (False, True))


def agreement(found: list[np.ndarray], expected: np.ndarray, scale: float) -> str:
    """Do these values `(n, examples)` differ by rounding alone?"""
    shapes = {values.shape for values in found} | {expected.shape}
    if len(shapes) > 1:
        return f'WRONG: shapes {shapes}'
    error = float(np.abs(np.stack(found) - expected).max()) / scale  # NaN if one is
    return 'equal' if error <= LARGEST_ERROR else f'WRONG: {error:.0e} of the loss'


# --- all layers -----------------------------------------------------------------------------------


def whole_scores(settings, tables: list[Table], notes: list[str], publish: Callable) -> None:
    table = Table(
        'All layers in one program',
        '`jax.jit(unit_shapley(...))` with 5 orders of each layer: seconds to compile it and to run'
        ' it, medians; seconds of CPU to run it. Units of all layers. Blocks: how often the network'
        ' stands in the program. MiB: temporary arrays, as the compiler plans them.',
        ('net', 'units', 'examples', 'loop', 'at once', 'blocks', 'compile s', 'run s', 'CPU s',
         'MiB', 'values'), [],
    )  # fmt: skip
    tables.append(table)
    permutations = 1 if settings.quick else 5
    for name in settings.nets[:1] if settings.quick else settings.nets:
        case = case_of(name, 1, 20 if settings.quick else 100)
        expected, scale = None, largest_loss(case)
        for loop, size in itertools.product(LOOPS, AT_ONCE[3:] if settings.quick else AT_ONCE):
            counts = [permutations * (n + 1) for n in case.gated.sizes.values()]
            blocks = sum(math.ceil(count / size) for count in counts)
            row = {'net': name, 'units': sum(case.gated.sizes.values()), 'loop': loop,
                   'examples': len(case.batch.y), 'at once': size}  # fmt: skip
            table.rows.append(row | {'blocks': len(counts) if loop == 'map' else blocks})
            if loop == 'unrolled' and blocks > MOST_BLOCKS:
                table.rows[-1]['run s'] = 'left out'
                continue
            found, times = compiled_score(case, loop, size, permutations)
            expected = found if expected is None else expected
            verdicts = [agreement([found[k]], expected[k], scale) for k in expected]
            values = next((each for each in verdicts if each != 'equal'), 'equal')
            table.rows[-1] |= times | {'values': values}
            print(table.rows[-1], flush=True)
            publish()


def compiled_score(
    case: Case, loop: str, size: int, permutations: int
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    score = unit_shapley(
        case.problem, by=case.by, permutations=permutations, at_once=size, loop=loop
    )
    arguments = jax.random.key(0), case.view, jax.tree.map(lambda leaf: leaf[None], case.batch)
    began = time.perf_counter()
    program = jax.jit(score).lower(*arguments).compile()
    compiling = time.perf_counter() - began
    seconds, cpu = [], []
    for _ in range(3):
        began, used = time.perf_counter(), time.process_time()
        found = jax.block_until_ready(program(*arguments))
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - used)
    memory = program.memory_analysis().temp_size_in_bytes / MIB
    return jax.tree.map(np.asarray, found), {
        'compile s': f'{compiling:.1f}', 'run s': f'{statistics.median(seconds):.2f}',
        'CPU s': f'{statistics.median(cpu):.2f}', 'MiB': f'{memory:,.0f}',
    }  # fmt: skip


# --- cost -----------------------------------------------------------------------------------------


class Setting(NamedTuple):
    orders: int
    units: int
    examples: int


#: Net -> width -> module; the number of the layer; the setting that is varied; factors.
GROWING: dict[str, tuple[Callable[[int], Any], int, Setting]] = {
    'MLP (units, 100)': (lambda n: nn.MLP((n, 100), 10), 0, Setting(8, 64, 200)),
    'small VGG, units in stage 1': (
        lambda n: nn.build('small_vgg', 10, widths=(n, 32)), 1, Setting(4, 8, 20),
    ),
}  # fmt: skip
FACTORS = (1, 2, 4, 8)


def costs(settings, tables: list[Table], notes: list[str], publish: Callable) -> None:
    table = Table(
        'Cost against orders, units and examples',
        "`shapley(..., loop='map', batch_size=4)` of one layer, compiled: seconds of CPU, medians"
        ' in turns. Orders have units + 1 evaluations each.',
        ('net', 'orders', 'units', 'examples', 'evaluations', 's', 'ms per evaluation'), [],
    )  # fmt: skip
    tables.append(table)
    factors = FACTORS[:2] if settings.quick else FACTORS
    for name, (make, layer, base) in list(GROWING.items())[: 1 if settings.quick else None]:
        if settings.quick:
            base = Setting(4, 32, 100)
        axes = {field: [base._replace(**{field: factor * getattr(base, field)})
                        for factor in factors] for field in base._fields}  # fmt: skip
        settled = list(dict.fromkeys(itertools.chain(*axes.values())))
        calls = {each: compiled_values(make, layer, each) for each in settled}
        seconds: dict[Setting, list[float]] = {each: [] for each in settled}
        for _, each in itertools.product(range(max(3, settings.rounds)), settled):
            began = time.process_time()
            jax.block_until_ready(calls[each]())
            seconds[each].append(time.process_time() - began)
        middle = {each: statistics.median(own) for each, own in seconds.items()}
        for each in settled:
            count = each.orders * (each.units + 1)
            table.rows.append({
                'net': name, **each._asdict(), 'evaluations': count, 's': f'{middle[each]:.4f}',
                'ms per evaluation': f'{1e3 * middle[each] / count:.3f}',
            })  # fmt: skip
            print(table.rows[-1], flush=True)
        powers = {}
        for field, own in axes.items():
            points = [(getattr(each, field), middle[each]) for each in own]
            powers[field] = np.polyfit(*np.log(np.array(points)).T, 1)[0]
        found = ', '.join(f'{field} to the power {power:.2f}' for field, power in powers.items())
        notes.append(f'{name}: seconds go with {found}')
        publish()


def compiled_values(make: Callable, layer: int, setting: Setting) -> Callable[[], jax.Array]:
    problem = problem_of(functools.partial(make, setting.units))
    params, state = jax.jit(problem.init)(jax.random.key(0))
    batch = images(data.load('mnist_small').train, setting.examples)
    case = case_from('', problem, params, state, batch, layer, setting.orders)
    game = game_of(case)
    how = {'batch_size': 4, 'loop': 'map', 'per_example': False}
    values = jax.jit(lambda orders: shapley(game, case.n, orders=orders, **how).mean)
    values(case.orders).block_until_ready()
    return lambda: values(case.orders)


if __name__ == '__main__':
    main()
