"""The cost of one pruning round: the score, the selection, and the effective compression.

    pip install -e . && python experiments/bench/scoring.py --out scoring.md

Three nets: LeNet-300-100 on 28x28x1, VGG-16 and ResNet-18 on 32x32x3, both with batch norm, all
with random inputs (times do not depend on their values). No data are needed. Four tables:

  scores     every registered method, one round: seconds, also in gradients of the training loss on
             the same batch, the time to compile, the peak memory
  selection  counting above a guess (what jaxprune does), argsort and lax.top_k, for one row of SNIP
             scores and vmapped over four; the masks must be identical, with ties too
  share      how much of a SNIP round the selection takes
  paths      effective compression of 100 random masks: one vmapped call, lax.map, one by one;
             all must agree. And the time to prune to an effective compression.

Items that are compared are timed in one process, in turns, so that other load affects all alike.
Medians are printed, without a first turn to warm up unless there is no other (0 turns). An item
that fails, needs too much memory or too much time is left out with the reason, and the rest goes
on; a result that is wrong makes the exit status 1. A few minutes on two cores; `--minutes` bounds
the whole, compilation included.
"""

import argparse
import functools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from jaxprune import nn, structure
from jaxprune.errors import first_line
from jaxprune.method import METHODS, method
from jaxprune.score.loss import mean_loss
from jaxprune.select import flatten, top_k_mask
from jaxprune.sweep.devices import cores, memory_limit
from jaxprune.types import Batch, Problem, View

MIB = 2**20
#: Scores kept in selections, and examples of SNIP for them: ten per class, as published.
KEPT, EXAMPLES = 0.1, 100
#: Rows of scores selected from at once.
ROWS = 4
#: Fraction of weights in the random masks, few enough that some of them lie on no path.
DENSITY = {'LeNet-300-100': 0.01, 'VGG-16': 0.1}


def main() -> None:
    settings = parse()
    # Else a second call would report the time to read a file as the time to compile.
    jax.config.update('jax_enable_compilation_cache', False)
    end = time.monotonic() + 60 * settings.minutes
    machine, tables = machine_line(settings), empty_tables(settings)

    def publish() -> None:
        if settings.out:
            with open(settings.out, 'w') as file:
                file.write(markdown(machine, tables))

    publish()
    jobs = jobs_of(settings, tables, publish)
    for place, job in enumerate(jobs):
        # What a job leaves of its share goes to those after it.
        now, shares = time.monotonic(), sum(other.share for other in jobs[place:])
        done = guarded(lambda job=job, stop=now + (end - now) * job.share / shares: job.run(stop))
        if isinstance(done, Left):
            print(f'{job.title}: left out, {done.reason}', flush=True)

    print('\n' + markdown(machine, tables))
    cells = [cell for table in tables.values() for row in table.rows.values() for cell in row]
    wrong = sum(cell.startswith('WRONG') for cell in cells)
    if wrong:
        raise SystemExit(f'{wrong} results are wrong, see the tables')


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--nets', nargs='+', choices=NETS, default=list(NETS), metavar='NET',
        help=f'some of {", ".join(NETS)} (default all)')  # fmt: skip
    add('--tables', nargs='+', choices=TABLES, default=list(TABLES), metavar='TABLE',
        help=f'some of {", ".join(TABLES)} (default all)')  # fmt: skip
    add('--methods', nargs='+', choices=METHODS, default=list(METHODS), metavar='METHOD',
        help=f'of the table of scores: some of {", ".join(METHODS)} (default all)')  # fmt: skip
    add('--width', type=float, default=1.0,
        help='multiplies the maps of VGG-16 and ResNet-18 (default 1: 14.7 M and 11.2 M weights;'
        ' weights go with its square)')  # fmt: skip
    add('--batch', type=int, default=None,
        help='examples per round in the table of scores (default 100; on the CPU 8 for VGG-16 and'
        ' ResNet-18, with which gradients are seconds long)')  # fmt: skip
    add('--masks', type=int, default=100, help='random masks (default 100)')
    add('--rounds', type=int, default=5, help='timed turns of each item (default 5)')
    add('--limit', type=float, default=8.0,
        help='seconds that all turns of one item may take; the first turn is always taken, unless'
        ' it would foreseeably pass the limit by itself (default 8)')  # fmt: skip
    add('--minutes', type=float, default=5.85,
        help='after these nothing new is begun (default 5.85)')  # fmt: skip
    add('--out', help='a markdown file for the tables, written anew after every item')
    add('--quick', action='store_true',
        help='seconds, to check that everything runs: LeNet-300-100 with 4 examples, 5 masks, one'
        ' turn; the other nets, very narrow, only if named by --nets')  # fmt: skip
    settings = parser.parse_args()
    if settings.quick:
        every = settings.nets == list(NETS)
        settings.nets = ['LeNet-300-100'] if every else settings.nets
        settings.width, settings.batch, settings.masks, settings.rounds = 1 / 32, 4, 5, 1
    if settings.width <= 0 or min(settings.masks, settings.rounds, settings.batch or 1) < 1:
        parser.error('--width, --batch, --masks and --rounds must be above 0')
    folder = os.path.dirname(settings.out or '') or '.'
    if not os.path.isdir(folder):
        parser.error(f'--out: there is no folder {folder}')
    return settings


class Job(NamedTuple):
    """Part of a table.

    Attributes:
      title: of what.
      share: of the time, relative to the other jobs.
      run: does it; gets the time after which it must begin nothing new.
    """

    title: str
    share: float
    run: Callable[[float], None]


def jobs_of(settings, tables: dict[str, 'Table'], publish: Callable[[], None]) -> list[Job]:
    net = functools.cache(lambda name: prepare(settings, name))
    paths, selections, scores = [], [], []

    def job(title: str, share: float, run: Callable[..., None], *args: Any) -> Job:
        return Job(title, share, lambda stop: run(settings, *args, publish, stop))

    if 'paths' in tables:
        for name, width in (('LeNet-300-100', 1.0), ('VGG-16', settings.width / 4)):
            if name in settings.nets:
                paths.append(job(f'paths of {name}', 1, paths_table, name, width, tables['paths']))
    picks = tables.get('selection'), tables.get('share')
    for name in settings.nets if any(picks) else ():
        share = 1 if name == 'LeNet-300-100' else 4
        selections.append(job(f'selection for {name}', share, selection_table, net, name, *picks))
    for name in settings.nets if 'scores' in tables else ():
        share = 2 if name == 'LeNet-300-100' else 8
        scores.append(job(f'scores of {name}', share, scores_table, net, name, tables['scores']))
    if in_device_memory() is not None:
        # The device's peak never falls again: the scores before the sorts, which take more.
        return scores + selections + paths
    return paths + selections + scores  # those that take the longest last


# --- nets -------------------------------------------------------------------------------------

NETS = {
    'LeNet-300-100': (lambda width: nn.build('lenet300100', 10), (28, 28, 1)),
    'VGG-16': (lambda width: nn.build('vgg16', 10, width=width), (32, 32, 3)),
    'ResNet-18': (lambda width: nn.build('resnet18', 10, width=width), (32, 32, 3)),
}


def problem_of(name: str, width: float) -> tuple[Problem, tuple[int, ...]]:
    make, shape = NETS[name]
    return jp.problem_from_flax(make(width), shape), shape


class Net(NamedTuple):
    name: str
    problem: Problem
    view: View
    weights: int
    batch: int


def prepare(settings, name: str) -> Net:
    problem, _ = problem_of(name, settings.width)
    params, model_state = jax.jit(problem.init)(jax.random.key(0))
    view = jp.view(problem, params, model_state)
    view = view._replace(initial=view.weights)  # FORCE scores these
    small = jax.default_backend() == 'cpu' and name != 'LeNet-300-100'
    batch = settings.batch or (8 if small else 100)
    return Net(name, problem, view, sum(w.size for w in view.weights.values()), batch)


def batches(name: str, examples: int) -> Batch:
    """One batch of noise and random labels."""
    random = np.random.default_rng(0)
    x = random.standard_normal((1, examples, *NETS[name][1]), np.float32)
    return jax.device_put(Batch(x, random.integers(0, 10, (1, examples))))


# --- measuring --------------------------------------------------------------------------------


class Program(NamedTuple):
    """A compiled program.

    Attributes:
      call: runs it.
      seconds: to trace and compile it.
      peak: bytes of arguments, results and temporaries, as the compiler planned them.
      lines: of the program's text, to which the time to compile is roughly proportional.
    """

    call: Callable[..., Any]
    seconds: float
    peak: int
    lines: int


class Left(NamedTuple):
    """Why something was left out."""

    reason: str


class Item(NamedTuple):
    """One thing to be timed.

    Attributes:
      program: what runs.
      call: runs it on its arguments; this is timed.
      check: checks the result of the first call.
    """

    program: Program
    call: Callable[[], Any]
    check: Callable[[Any], None] = lambda value: None


class Result(NamedTuple):
    """The measurements of an item.

    Attributes:
      program: what ran.
      seconds: of every turn; the first, which also warms up, counts only if it is the only one.
      device: the device's own memory counter, '' where it has none.
    """

    program: Program
    seconds: list[float]
    device: str

    @property
    def turns(self) -> int:
        return len(self.seconds) - 1

    @property
    def median(self) -> float:
        return statistics.median(self.seconds[1:] or self.seconds)


class Skip(Exception):
    """Raised where an item is left out on purpose; its message is the reason."""


class Wrong(Exception):
    """Raised where ways that must agree do not."""


def build(
    fn: Callable,
    *args: Any,
    name: str = '',
    known: dict[str, str] | None = None,
    most: float | None = None,
) -> Program:
    """Compiles `fn` for arguments.

    Args:
      name: what the item is called in `known`.
      known: text of a program -> name of what had it first; such a program is left out.
      most: lines of text above which a program is left out, None for any number.
    """
    began = time.perf_counter()
    lowered = jax.jit(fn).lower(*args)
    text = lowered.as_text()
    if known is not None:
        first = known.setdefault(text, name)
        if first != name:
            raise Skip(f'the same program as {first}')
    lines = text.count('\n')
    if most is not None and lines > most:
        raise Skip('too long to compile (--minutes)')
    program = lowered.compile()
    seconds = time.perf_counter() - began
    memory = program.memory_analysis()
    peak = 0 if memory is None else (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )  # fmt: skip
    if peak > 0.9 * memory_limit():
        raise Skip(f'would take {peak / MIB:,.0f} MiB')
    return Program(program, seconds, peak, lines)


def guarded(fn: Callable[[], Any]) -> Any:
    """What `fn` returns, or why it returned nothing."""
    try:
        return fn()
    except Skip as skip:
        return Left(str(skip))
    except Wrong as wrong:
        return Left(f'WRONG: {wrong}')
    except Exception as error:  # one failure, of whatever kind, must not stop the others
        return Left(f'{type(error).__name__}: {first_line(error)[:100]}')


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    value = jax.block_until_ready(call())
    return time.perf_counter() - began, value


def in_device_memory() -> int | None:
    """The most bytes ever in use on the device, where it counts them."""
    return (jax.local_devices()[0].memory_stats() or {}).get('peak_bytes_in_use')


def first_turn(make: Callable[[], Item], stop: float) -> tuple[Item, Result] | Left:
    """Compiles an item and runs it once."""

    def run() -> tuple[Item, Result]:
        if time.monotonic() > stop:
            raise Skip('no time left (--minutes)')
        item, before = make(), in_device_memory()
        seconds, value = timed(item.call)
        device = ''
        if before is not None:
            # The counter never falls, so it shows an item's own peak only where it rises.
            after = in_device_memory()
            device = f'{"" if after > before else "<= "}{after / MIB:,.0f}'
        item.check(value)
        return item, Result(item.program, [seconds], device)

    return guarded(run)


def described(found: Result | Left) -> str:
    if isinstance(found, Left):
        return f'left out, {found.reason}'
    first = number(found.seconds[0])
    return f'compiled in {found.program.seconds:.1f} s, first turn {first} s'


def in_turns(
    settings,
    title: str,
    makers: dict[str, Callable[[dict[str, Result | Left]], Item]],
    stop: float,
    show: Callable[[dict[str, Result | Left]], None],
) -> dict[str, Result | Left]:
    """Compiles all items, then times them in turns.

    Args:
      title: what the progress lines begin with.
      makers: name -> `results so far -> item`.
      stop: when to begin nothing new.
      show: called with the results so far whenever there are new ones.
    """
    calls, results = {}, {}
    # A little is kept for the turns, which the quick items need and the slow ones can do without.
    compile_until = time.monotonic() + 0.92 * (stop - time.monotonic())
    for name, make in makers.items():
        found = first_turn(functools.partial(make, results), compile_until)
        if isinstance(found, Left):
            results[name] = found
        else:
            item, results[name] = found
            calls[name] = item.call
        print(f'{title}, {name}: {described(results[name])}', flush=True)
        show(results)
    for _ in range(settings.rounds):
        for name, call in list(calls.items()):
            seconds = results[name].seconds
            spent = sum(seconds[1:])
            if spent + seconds[-1] > settings.limit or time.monotonic() + seconds[-1] > stop:
                calls.pop(name)
                continue
            found = guarded(lambda call=call: timed(call)[0])
            if isinstance(found, Left):
                results[name] = found
                calls.pop(name)
            else:
                seconds.append(found)
        show(results)
    return results


def ratio(result: Result, unit: Result | Left | None) -> str:
    """How many times the unit: the median over the turns both took, or of the medians if few."""
    if not isinstance(unit, Result):
        return '-'
    each = [a / b for a, b in zip(result.seconds[1:], unit.seconds[1:], strict=False)]
    median = statistics.median(each) if len(each) > 2 else result.median / unit.median
    return f'{median:.2f}'


# --- tables -----------------------------------------------------------------------------------


class Table(NamedTuple):
    title: str
    note: str
    head: tuple[str, ...]
    rows: dict[Any, tuple[str, ...]]


def machine_line(settings) -> str:
    device = jax.local_devices()[0]
    load = f', load {os.getloadavg()[0]:.1f} at the start' if hasattr(os, 'getloadavg') else ''
    width = '' if settings.width == 1 else f'; VGG-16 and ResNet-18 at width {settings.width:g}'
    return (
        f'{device.device_kind}, {cores()} cores{load}, {platform.machine()}; jax '
        f'{jax.__version__}, Python {platform.python_version()}{width}.'
    )


def empty_tables(settings) -> dict[str, Table]:
    memory = 'MiB planned: arguments, results and temporaries as the compiler laid them out.'
    on_device = ()
    if in_device_memory() is not None:
        on_device = ('MiB on device',)
        memory += (
            ' MiB on device: the most its allocator has counted so far, everything included; "<="'
            ' where the item did not raise it.'
        )
    tables = {
        'scores': Table(
            'One round of every method',
            'Gradients: times `value_and_grad` of the loss (batch statistics, all parameters) on'
            ' the same batch. One round: methods of many rounds cost so much in each. NTK-SAP'
            f' with as many samples as the batch has. {memory}',
            ('net', 'weights', 'batch', 'method', 's', 'turns', 'gradients', 'compile s',
             'MiB planned', *on_device, 'left out'),
            {},
        ),
        'selection': Table(
            'Selection of 10 % of the weights by their scores',
            f'SNIP scores of all leaves in one row; and {ROWS} such rows vmapped. lax.top_k needs k'
            ' when it is compiled, the others take it as an argument. The masks are identical, for'
            ' these scores and for random ones with ties.',
            ('net', 'scores', 'rows', 'way', 's', 'turns', 'times counting', 'compile s',
             'MiB planned', 'left out'),
            {},
        ),
        'share': Table(
            "Selection's share of a SNIP round",
            f'Score with {EXAMPLES} examples, then one selection.',
            ('net', 'score s', *(head for way in WAYS for head in (f'{way} s', 'share'))),
            {},
        ),
        'paths': Table(
            'Effective compression of random masks',
            f'{settings.masks} masks, each with its seed; all ways agree.',
            ('net', 'weights', 'density', 'way', 's', 'turns', 'ms per mask', 'times one by one',
             'compile s', 'MiB planned', 'left out'),
            {},
        ),
    }  # fmt: skip
    return {name: table for name, table in tables.items() if name in settings.tables}


TABLES = ('scores', 'selection', 'share', 'paths')


def markdown(machine: str, tables: dict[str, Table]) -> str:
    parts = [machine + '\n']
    for table in tables.values():
        rows = [table.head, *table.rows.values()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(table.head))]
        lines = ['| ' + ' | '.join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + ' |'
                 for r in rows]  # fmt: skip
        lines.insert(1, '|' + '|'.join('-' * (w + 2) for w in widths) + '|')
        parts.append(f'### {table.title}\n\n{table.note}\n\n' + '\n'.join(lines) + '\n')
    return '\n'.join(parts)


def facts(result: Result) -> tuple[str, str]:
    return f'{result.program.seconds:.1f}', f'{result.program.peak / MIB:,.0f}'


def number(seconds: float) -> str:
    """Three digits, without an exponent."""
    digits = 2 - math.floor(math.log10(seconds)) if seconds > 0 else 0
    return f'{seconds:.{min(max(digits, 0), 6)}f}'


# --- one round of every method ----------------------------------------------------------------


def scores_table(settings, nets, name: str, table: Table, publish, stop: float) -> None:
    net = nets(name)
    batch, key = batches(net.name, net.batch), jax.random.key(2)
    known: dict[str, str] = {}

    def gradient(key, view, batch):
        loss = mean_loss(net.problem, view, key, train=True)
        return jax.value_and_grad(loss)(view.params, jax.tree.map(lambda leaf: leaf[0], batch))

    def make(name: str, results) -> Item:
        entry = METHODS.get(name)
        if entry is None:
            fn = gradient
        else:
            if entry.score is None:
                raise Skip('no score: it changes training')
            options = dict(entry.options)
            if 'samples' in options:
                options['samples'] = net.batch
            fn = entry.score(net.problem, entry.batch_norm == 'train', **options)
        args = key, net.view, batch
        unit, most = results.get('gradient'), None
        if isinstance(unit, Result):
            most = (stop - time.monotonic()) / unit.program.seconds * unit.program.lines
        program = build(fn, *args, name=name, known=known, most=most)
        return Item(program, lambda: program.call(*args))

    def show(results) -> None:
        for name, result in results.items():
            own = net.name, f'{net.weights:,}', str(net.batch), name
            device = 1 if in_device_memory() is not None else 0
            if isinstance(result, Left):
                row = (*own, '', '', '', '', '', *[''] * device, result.reason)
            else:
                compiled, planned = facts(result)
                row = (*own, number(result.median), str(result.turns),
                       ratio(result, results.get('gradient')), compiled, planned,
                       *[result.device] * device, '')  # fmt: skip
            table.rows[own] = row
        publish()

    names = ['gradient', *settings.methods]
    makers = {name: functools.partial(make, name) for name in names}
    in_turns(settings, net.name, makers, stop, show)


# --- selection --------------------------------------------------------------------------------


def by_argsort(scores: jax.Array, k: jax.Array) -> jax.Array:
    order = jnp.argsort(scores, descending=True, stable=True)
    best = jnp.arange(scores.size) < k
    return jnp.zeros(scores.size, bool).at[order].set(best, unique_indices=True)


def by_lax_top_k(scores: jax.Array, k: int) -> jax.Array:
    best = jax.lax.top_k(scores, k)[1]
    return jnp.zeros(scores.size, bool).at[best].set(True, unique_indices=True)


WAYS = {'counting': top_k_mask, 'lax.top_k': by_lax_top_k, 'argsort': by_argsort}


def selection_table(
    settings, nets, name: str, table: Table | None, shares: Table | None, publish, stop: float
) -> None:
    net = nets(name)
    k = round(KEPT * net.weights)
    batch, key = batches(net.name, EXAMPLES), jax.random.key(2)
    score = method('snip').score(net.problem, method('snip').batch_norm == 'train')
    scores: dict[int, jax.Array] = {}
    masks: dict[tuple[str, int], np.ndarray] = {}
    noise = np.random.default_rng(0).random((ROWS, net.weights), np.float32)

    def make_score(results) -> Item:
        program = build(lambda view, data: flatten(score(key, view, data)), net.view, batch)

        def check(found) -> None:
            scores[1], host = found, jax.device_get(found)
            scores[ROWS] = jax.device_put(np.concatenate([host[None], host * noise[1:]]))

        return Item(program, lambda: program.call(net.view, batch), check)

    def check(kind: str, rows: int, found: jax.Array) -> None:
        found = jax.device_get(found)
        if not np.array_equal(found, masks.setdefault((kind, rows), found)):
            raise Wrong(f'masks differ from those of counting, {kind}')
        if rows > 1 and not np.array_equal(found[0], masks[kind, 1]):
            raise Wrong(f'the first of {rows} masks differs from the single one, {kind}')
        if not (found.sum(-1) == k).all():
            raise Wrong(f'not {k} weights kept, {kind}')

    def make(way: str, rows: int, results) -> Item:
        if rows not in scores:
            raise Skip('no SNIP scores')
        if rows > 1:
            single = results[way]
            if isinstance(single, Left):
                raise Skip('as one row')
            if rows * single.median > settings.limit:
                raise Skip(f'about {rows * single.median:.0f} s, see --limit')
        fn, counts = WAYS[way], [jnp.int32(k)]
        if way == 'lax.top_k':
            fn, counts = functools.partial(fn, k=k), []
        if rows > 1:
            fn, counts = jax.vmap(fn), [jnp.full(rows, c) for c in counts]
        program = build(fn, scores[rows], *counts)
        ties = np.round(8 * noise)
        check('ties', rows, program.call(ties if rows > 1 else ties[0], *counts))
        return Item(
            program,
            lambda: program.call(scores[rows], *counts),
            functools.partial(check, 'SNIP scores', rows),
        )

    def show(results) -> None:
        for name, (way, rows) in names.items():
            result = results.get(name)
            if table is None or result is None:
                continue
            own = net.name, f'{net.weights:,}', str(rows), way
            if isinstance(result, Left):
                row = (*own, '', '', '', '', '', result.reason)
            else:
                unit = results.get(name.replace(way, 'counting'))
                row = (*own, number(result.median), str(result.turns), ratio(result, unit),
                       *facts(result), '')  # fmt: skip
            table.rows[own] = row
        publish()

    makers = {'SNIP score': make_score}
    counts = (1, ROWS) if table is not None else (1,)
    names = {way if n == 1 else f'{way}, {n} rows': (way, n) for way in WAYS for n in counts}
    makers |= {name: functools.partial(make, *of) for name, of in names.items()}
    results = in_turns(settings, net.name, makers, stop, show)
    scored = results['SNIP score']
    if shares is not None and isinstance(scored, Result):
        cells = []
        for way in WAYS:
            result = results[way]
            if isinstance(result, Left):
                cells += ['', '']
            else:
                part = result.median / (result.median + scored.median)
                cells += [number(result.median), f'{100 * part:.1f} %']
        shares.rows[net.name] = (net.name, number(scored.median), *cells)
        publish()


# --- paths ------------------------------------------------------------------------------------


def paths_table(settings, name: str, width: float, table: Table, publish, stop: float) -> None:
    problem, shape = problem_of(name, width)
    shapes = structure.forward_shapes(problem, shape)
    size = sum(map(math.prod, shapes.values()))
    density, target = DENSITY[name], 100.0
    connect = structure.connectivity_of(problem, shape)

    def draw(seed: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng(seed)
        return {p: random.random(s, np.float32) < density for p, s in shapes.items()}

    each = jax.device_put([draw(seed) for seed in range(settings.masks)])
    masks = jax.device_put(jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(each)))
    expected: list[np.ndarray] = []

    def effective(masks):
        return structure.effective_compression(connect, masks)

    def check(found) -> None:
        expected.append(np.array(jax.device_get(found)))
        if not np.array_equal(expected[-1], expected[0]):
            raise Wrong('differs from one by one')

    def one_by_one(results) -> Item:
        program = build(effective, each[0])
        return Item(program, lambda: [program.call(one) for one in each], check)

    def vmapped(results) -> Item:
        program = build(jax.vmap(effective), masks)
        return Item(program, lambda: program.call(masks), check)

    def mapped(results) -> Item:
        program = build(lambda masks: jax.lax.map(effective, masks), masks)
        return Item(program, lambda: program.call(masks), check)

    def targeted(results) -> Item:
        random = np.random.default_rng(0)
        scores = jax.device_put({p: random.random(s, np.float32) for p, s in shapes.items()})
        program = build(lambda s: structure.effective_top_k(connect, s, target), scores)
        one = results['one by one']
        count = one.program.call if isinstance(one, Result) else effective

        def near(found) -> None:
            reached = float(count(found))
            if not 0.95 * target < reached <= target:
                raise Wrong(f'effective compression {reached:.2f}')

        return Item(program, lambda: program.call(scores), near)

    label = 'prune one to effective compression 100'
    makers = {'one by one': one_by_one, 'vmap': vmapped, 'lax.map': mapped}
    if name == 'LeNet-300-100':
        makers[label] = targeted

    def show(results) -> None:
        for way, result in results.items():
            own = name, f'{size:,}', '' if way == label else f'{density:g}', way
            if isinstance(result, Left):
                row = (*own, '', '', '', '', '', '', result.reason)
            else:
                unit = '' if way == label else ratio(result, results.get('one by one'))
                each_ms = 1e3 * result.median / (1 if way == label else settings.masks)
                row = (*own, number(result.median), str(result.turns), number(each_ms), unit,
                       *facts(result), '')  # fmt: skip
            table.rows[own] = row
        publish()

    in_turns(settings, name, makers, stop, show)


if __name__ == '__main__':
    main()
