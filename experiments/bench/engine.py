"""Many runs in one program: how much faster than one after another, and how near to the peak.

    pip install -e '.[bench]' && python experiments/bench/engine.py --out engine.md

LeNet-300-100, VGG-11 (quarter width), ResNet-20 (quarter and full width) and a small vision
transformer, batch 128, SGD with momentum, masks of 10 % density, on noise (times do not depend on
the images). No data are needed. N = 1, 4, 16, 64 runs (LeNet-300-100 on accelerators also
256 and 1024), each as

  sweep     the sweep's own engine with the strategy that a probe found fastest for the net
  JAX       the same runs one after another: one compiled program of one run, called in turn
  PyTorch   a plain loop over runs with the same initial weights, masks and batches; on the CPU in
            the fastest of these arrangements: one process with 1, 2, 4, ... threads, or a process
            with one thread for each core. Their times, with and without masks, are printed
  graphs    the same as a CUDA graph per run (on a GPU)
  stacked   all runs in one PyTorch step, `torch.func.vmap` over their stacked weights; a CUDA
            graph on a GPU

in turns. The cost of a run trained alone does not depend on how many follow it, so JAX, PyTorch
and graphs train no more than a few of the runs. Printed per N: milliseconds per run and step, the
speed-up of the sweep, floating-point operations per second against the fastest matrix product of
this machine, seconds to compile, memory per run as the compiler laid it out. Then, what recording
along training costs. All ways must reach the same mean training loss in their first
steps: a row that does not is marked WRONG, and the exit status is 1.

Written anew after every row to `--out`, and drawn beside it. What fails, or has no time left, is
left out with the reason.
"""

import argparse
import importlib.util
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from torch_loop import Job, Way, pool, trainer, ways

from jaxprune import data, tree
from jaxprune.errors import first_line
from jaxprune.sweep import make_spec
from jaxprune.sweep.advance import Rows
from jaxprune.sweep.chunk import rows_of
from jaxprune.sweep.chunk_tables import Moment, curves_rows, flow_rows
from jaxprune.sweep.costs import costs as costs_of
from jaxprune.sweep.device_data import DeviceData
from jaxprune.sweep.devices import cores, use_all_cores
from jaxprune.sweep.engine import Engine, make_engine
from jaxprune.sweep.event_calls import event_calls
from jaxprune.sweep.grid import runs as all_runs
from jaxprune.sweep.probe import possible, probe, trial_line
from jaxprune.sweep.program import Program, make_program
from jaxprune.sweep.strategy import Strategy, usual
from jaxprune.sweep.timeline import borders_of, stretches_of
from jaxprune.sweep.timing import stopwatch
from jaxprune.train import train_segment

NETS: dict[str, tuple[dict[str, Any], str]] = {
    'LeNet-300-100': ({'name': 'lenet300100'}, 'mnist'),
    'VGG-11 (1/4)': ({'name': 'vgg11', 'width': 0.25}, 'cifar10'),
    'ResNet-20 (1/4)': ({'name': 'resnet20', 'width': 0.25}, 'cifar10'),
    'ResNet-20': ({'name': 'resnet20'}, 'cifar10'),
    'ViT-tiny': ({'name': 'vit'}, 'cifar10'),
}
COLUMNS = (
    'net', 'N', 'strategy', 'PyTorch way', 'sweep ms', 'JAX ms', 'PyTorch ms', 'graphs ms',
    'stacked ms', 'x JAX', 'x PyTorch', 'x graphs', 'x stacked', 'GFLOP/s', '% of peak',
    'compile s', 'MiB per run', 'left out',
)  # fmt: skip
#: Runs that JAX and PyTorch train one after another.
FEW = 4
#: How far the mean losses of the first steps may differ, relatively: sums in another order.
AGREE = 5e-3


class Contender(NamedTuple):
    """Something that trains; `epoch` returns the mean losses of the first few runs."""

    epoch: Callable[[int], np.ndarray]
    close: Callable[[], None] = lambda: None


class Case(NamedTuple):
    """A net, and what all contenders start from; `torch` is the way for one run and for several."""

    name: str
    spec: Any
    program: Program
    data: DeviceData
    flops: float
    strategy: Strategy
    torch: dict[bool, Way]


def main() -> None:
    settings = parse()
    use_all_cores()
    # Else a second call would report the time to read a file as the time to compile.
    jax.config.update('jax_enable_compilation_cache', False)
    end = time.monotonic() + 60 * settings.minutes
    peak = matmul_peak()
    head = machine_line(peak)
    print(head, flush=True)
    rows, notes, costs, cases = [], [], [], {}

    def publish() -> None:
        text = markdown(head, rows, notes, costs)
        if settings.out:
            Path(settings.out).write_text(text)
            draw(rows, Path(settings.out).with_suffix('.png'))

    publish()
    for place, name in enumerate(settings.nets):
        # What a net leaves of its share goes to those after it; recording is the last of them.
        left = len(settings.nets) - place + (0 if settings.quick else 1)
        stop = time.monotonic() + (end - time.monotonic()) / left
        try:
            case = cases[name] = prepare(settings, name, stop, notes)
        except Exception as error:
            rows.append({'net': name, 'left out': first_line(error)})
            continue
        publish()
        for runs in () if settings.recording else settings.runs or sizes(name):
            row = {'net': name, 'N': runs, **measured(settings, case, runs, peak, stop, rows)}
            rows.append(row)
            print({k: v for k, v in row.items() if v != ''}, flush=True)
            publish()
    if settings.recording or not settings.quick:
        for name, runs, every in (('LeNet-300-100', 16, 50), ('VGG-11 (1/4)', 2, 50)):
            if name in cases:
                costs += recording(settings, cases[name], runs, every, end)
                publish()
    print('\n' + markdown(head, rows, notes, costs))
    if any('WRONG' in str(row.get('left out', '')) for row in rows):
        raise SystemExit('not the same training, see the table')


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--nets', nargs='+', choices=NETS, default=list(NETS), metavar='NET',
        help=f'some of {", ".join(NETS)} (default all)')  # fmt: skip
    add('--runs', nargs='+', type=int, metavar='N', help='numbers of runs (default 1 4 16 64)')
    add('--rounds', type=int, default=3, help='timed turns of each contender (default 3)')
    add('--steps', type=int, default=0,
        help='of a turn (default 32 for LeNet-300-100, 4 for others, or 16 on a GPU)')  # fmt: skip
    add('--batch', type=int, default=128, help='examples per step (default 128)')
    add('--minutes', type=float, default=8.5, help='nothing new is begun after these (default 8.5)')
    add('--no-probe', action='store_true', help='take the usual strategy, measure none')
    add('--recording', action='store_true', help='only what recording along training costs')
    add('--out', help='a markdown file for the tables; the figure lies beside it')
    add('--quick', action='store_true', help='seconds, to see whether all runs')
    settings = parser.parse_args()
    if settings.quick:
        settings.rounds, settings.steps, settings.batch = 1, 2, 8
        settings.runs, settings.no_probe = settings.runs or [2], True
    if min(settings.rounds, settings.batch, *(settings.runs or [1])) < 1:
        parser.error('--rounds, --batch and --runs must be above 0')
    if settings.out and not Path(settings.out).parent.is_dir():
        parser.error(f'--out: there is no folder {Path(settings.out).parent}')
    return settings


def sizes(name: str) -> list[int]:
    more = [256, 1024] if name == 'LeNet-300-100' and accelerated() else []
    return [1, 4, 16, 64, *more]


def accelerated() -> bool:
    return jax.default_backend() != 'cpu'


# --- what is trained --------------------------------------------------------------------------


def specification(settings, name: str, runs: int, **more: Any):
    model, data_name = NETS[name]
    steps = settings.steps or (32 if name == 'LeNet-300-100' else 16 if accelerated() else 4)
    return make_spec(
        {
            'name': 'engine',
            'model': model,
            'data': {'name': data_name, 'train_examples': steps * settings.batch},
            'train': {
                'batch_size': settings.batch,
                'momentum': 0.9,
                'learning_rate': 0.01,
                'schedule': 'constant',
                'epochs': 1000,
            },
            'grid': {'method': ['magnitude'], 'compression': [10], 'seed': list(range(runs))},
            **more,
        }
    )


def noise(spec) -> DeviceData:
    """Pictures of noise, as many as the specification asks for; 500 to evaluate on."""
    facts = data.facts(spec.data.name)
    rng = np.random.default_rng(0)

    def split(examples):
        images = rng.integers(0, 256, (examples, *facts.shape), np.uint8)
        labels = np.arange(examples, dtype=np.int32) % facts.classes
        return data.DeviceSplit(images, labels)

    training = split(spec.data.train_examples)
    by_class = data.class_balanced(training.labels, facts.classes)
    return DeviceData(training, split(500), jnp.asarray(by_class))


def prepare(settings, name: str, stop: float, notes: list[str]) -> Case:
    """A net with its fastest strategy; every trial is noted."""
    spec = specification(settings, name, 1)
    run = all_runs(spec)[0]
    program = make_program(spec, run)
    flops = costs_of(spec, program, run)['flops_per_step']
    strategy = usual(program.convolves, jax.default_backend(), jax.local_device_count())
    if not settings.no_probe:
        began = time.monotonic()

        def in_time():
            for number, tried in enumerate(possible(spec, program.convolves)):
                if number and time.monotonic() - began > 0.25 * (stop - began):
                    notes.append(f'{name}: {tried} and those after it were not tried, no time')
                    return
                yield tried

        def note(measured):
            notes.append(f'{name}: {trial_line(measured)}')

        strategy = probe(spec, run, in_time(), on_trial=note)[0].strategy
    case = Case(name, spec, program, noise(spec), flops, strategy, {})
    if settings.recording or importlib.util.find_spec('torch') is None:
        return case
    if accelerated():
        return case._replace(torch=dict.fromkeys((False, True), Way(1, cores())))
    return case._replace(torch=torch_trials(settings, case, notes))


# --- contenders -------------------------------------------------------------------------------


class Start(NamedTuple):
    """N runs before their first step; `each` are the first few of them on the host."""

    engine: Engine
    rows: Rows
    states: Any
    each: list[Any]


def started(settings, case: Case, runs: int) -> tuple[Start, dict[str, Any]]:
    """The sweep's own functions up to the first step; what compiling took, and the memory."""
    spec = specification(settings, case.name, runs)
    members = all_runs(spec)
    devices = jax.local_devices()
    strategy = case.strategy._replace(devices=math.gcd(runs, case.strategy.devices))
    if runs == 1:
        strategy = usual(case.program.convolves, jax.default_backend(), 1)
    program = make_program(spec, members[0], strategy.convolution)
    engine = make_engine(strategy, program, case.data, devices)
    rows, _ = rows_of(members, runs, engine)
    (call,) = event_calls(program, members)(program.timeline.events[0])
    states, _ = engine.prune(rows, call, engine.init(rows))
    host = engine.pack(states)
    each = [jax.tree.map(lambda a, i=i: a[i], host) for i in range(min(runs, FEW))]
    with stopwatch() as watch:
        with watch.phase('train'):
            needed = engine.bytes_needed(rows)
        seconds = watch.seconds()['compile']
    in_flight = 1 if strategy.batching == 'unroll' else runs // strategy.devices
    shared = sum(leaf.nbytes for leaf in jax.tree.leaves(case.data))
    facts = {
        'strategy': str(strategy),
        'compile s': f'{seconds:.1f}',
        'MiB per run': f'{max(needed - shared, 0) / in_flight / 2**20:.3g}',
    }
    return Start(engine, rows, states, each), facts


def sweep(case: Case, start: Start) -> Callable[[int], np.ndarray]:
    """An epoch by the engine; returns the mean losses of the first few runs."""
    states, steps = start.states, case.program.steps

    def epoch(number: int) -> np.ndarray:
        nonlocal states
        states, losses = start.engine.advance(
            number * steps, (number + 1) * steps, start.rows, states
        )
        return losses()[: len(start.each)].mean(axis=1)

    return epoch


def one_by_one(case: Case, start: Start) -> Callable[[int], np.ndarray]:
    """One compiled program of one run, called for each in turn.

    On the CPU a convolution inside a loop is many times slower, so there the steps are calls too.
    """
    program, device = case.program, jax.local_devices()[0]
    stepped = program.convolves and not accelerated()
    step = program.stages[False].step
    fn = jax.jit(step if stepped else train_segment(step), donate_argnums=5)
    order = jax.jit(program.order)
    data_ = jax.device_put(case.data, device)
    states = jax.device_put(start.each, device)
    rows = [
        jax.device_put(jax.tree.map(lambda leaf, i=i: leaf[i], start.rows), device)
        for i in range(len(states))
    ]

    def epoch(number: int) -> np.ndarray:
        losses = []
        for i, (key, hyper) in enumerate(rows):
            clock = np.int32(number * program.steps)
            batches = order(key, np.int32(number))
            if stepped:
                found = []
                for step in range(program.steps):
                    states[i], loss = fn(
                        clock + np.int32(step), data_, key, hyper, batches[step], states[i]
                    )
                    found.append(loss)
            else:
                states[i], found = fn(clock, data_, key, hyper, batches, states[i])
            losses.append(found)
        return np.array(jax.device_get(losses), np.float32).mean(axis=1)

    return epoch


def torch_job(case: Case, start: Start, **settings: bool) -> Job:
    """The first few runs for PyTorch: initial weights, masks, images."""
    facts = data.facts(case.spec.data.name)
    split = jax.device_get(case.data.train)
    images = split.images.astype(np.float32) / 255 - np.float32(facts.mean)
    images = (images / np.float32(facts.std)).transpose(0, 3, 1, 2)
    states = [
        (
            {path: np.asarray(leaf) for path, leaf in tree.paths(state.params)},
            {path: np.asarray(mask) for path, mask in state.masks.items()},
        )
        for state in start.each
    ]
    return Job(
        net=case.spec.model.name,
        images=np.ascontiguousarray(images),
        labels=np.array(split.labels),
        states=states,
        learning_rate=0.01,
        momentum=0.9,
        threads=cores(),
        device='cuda' if accelerated() else 'cpu',
        **{'masked': True, **settings},
    )


def pytorch(case: Case, start: Start, way: Way, *, masked: bool = True) -> Contender:
    """A plain loop over the runs: on a GPU in this process, else in processes of its own."""
    job = torch_job(case, start, masked=masked)
    if accelerated():
        return Contender(_torch_epoch(case, start, trainer(_on_gpu(job))))
    made = pool(job, way)
    return Contender(_torch_epoch(case, start, made.epoch), made.close)


def graphs(case: Case, start: Start) -> Contender:
    """The same on a GPU, with the step as a CUDA graph."""
    if not accelerated():
        raise LookupError('no CUDA')
    return Contender(
        _torch_epoch(case, start, trainer(_on_gpu(torch_job(case, start, graphs=True))))
    )


def stacked(case: Case, start: Start, runs: int) -> Contender:
    """All runs in one step of PyTorch; after the first few, runs repeat those."""
    job = torch_job(case, start, stacked=True, graphs=accelerated())
    job = job._replace(states=[job.states[i % len(job.states)] for i in range(runs)])
    if accelerated():
        return Contender(_torch_epoch(case, start, trainer(_on_gpu(job)), runs))
    made = pool(job, Way(1, cores()))
    return Contender(_torch_epoch(case, start, made.epoch, runs), made.close)


def _on_gpu(job: Job) -> Job:
    import torch

    if not torch.cuda.is_available():
        raise LookupError('PyTorch sees no GPU')
    return job


def _torch_epoch(
    case: Case, start: Start, train: Callable, runs: int = 0
) -> Callable[[int], np.ndarray]:
    """An epoch of the first few runs, or of `runs` that repeat those."""
    order, few = jax.jit(case.program.order), len(start.each)
    keys = [start.rows.keys[i] for i in range(few)]

    def epoch(number: int) -> np.ndarray:
        batches = [np.array(order(key, np.int32(number))) for key in keys]
        return np.array(train([batches[i % few] for i in range(runs or few)]))[:few]

    return epoch


def way_of(case: Case, runs: int) -> Way:
    """The fastest arrangement of PyTorch for so many runs."""
    if not case.torch:
        raise LookupError('not installed')
    return case.torch[runs > 1]


def torch_trials(settings, case: Case, notes: list[str]) -> dict[bool, Way]:
    """The fastest arrangement of PyTorch, for one run (False) and for several (True).

    Every arrangement trains a few runs for two epochs, with masks and without; the second counts.
    """
    start, _ = started(settings, case, FEW)
    found: dict[Way, float] = {}
    for way in ways(cores(), FEW):
        said = []
        for masked in (True, False):
            contender = pytorch(case, start, way, masked=masked)
            try:
                contender.epoch(0)
                began = time.perf_counter()
                for number in range(1, 1 + settings.rounds):
                    contender.epoch(number)
                taken = (time.perf_counter() - began) / settings.rounds
            finally:
                contender.close()
            each = taken / FEW / case.program.steps
            said.append(f'{1e3 * each:.3g} ms {"with" if masked else "without"} masks')
            if masked:
                found[way] = each
        notes.append(f'{case.name}: PyTorch, {way}: {", ".join(said)}, per run and step')
        print(notes[-1], flush=True)
    alone = [way for way in found if way.processes == 1]
    return {False: min(alone, key=found.get), True: min(found, key=found.get)}


# --- measuring --------------------------------------------------------------------------------


def measured(settings, case: Case, runs: int, peak: float, stop: float, rows: list) -> dict:
    """A row of the table."""
    known = [r for r in rows if r['net'] == case.name and 'sweep ms' in r]
    if known:
        last = known[-1]
        each = float(last['sweep ms']) / 1e3 * runs * case.program.steps
        foreseen = (settings.rounds + 1) * each + float(last['compile s'])
        if time.monotonic() + foreseen > stop:
            return {'left out': f'would take {foreseen:.0f} s more'}
    elif time.monotonic() > stop:
        return {'left out': 'no time left (--minutes)'}
    try:
        start, row = started(settings, case, runs)
    except Exception as error:
        return {'left out': first_line(error)}
    makers = {
        'sweep': lambda: Contender(sweep(case, start)),
        'JAX': lambda: Contender(one_by_one(case, start)),
        'PyTorch': lambda: pytorch(case, start, way_of(case, runs)),
        'graphs': lambda: graphs(case, start),
        'stacked': lambda: stacked(case, start, runs),
    }
    contenders, left = {}, []
    for name, make in makers.items():
        try:
            contenders[name] = make()
        except Exception as error:
            if name != 'graphs' or accelerated():
                left.append(f'{name}: {first_line(error)}')
    if 'PyTorch' in contenders:
        row['PyTorch way'] = str(case.torch[runs > 1])
    try:
        seconds, losses = in_turns(settings, case, contenders, runs, len(start.each), stop, left)
    finally:
        for contender in contenders.values():
            contender.close()
    for name, loss in losses.items():
        if not np.allclose(loss, losses['JAX'], rtol=AGREE):
            left.append(f'WRONG: {name} has losses {loss}, JAX {losses["JAX"]}')
    row['left out'] = '; '.join(left)
    if 'sweep' not in seconds:
        return row
    return row | costs(case, seconds, peak)


def in_turns(
    settings,
    case: Case,
    contenders: dict[str, Contender],
    runs: int,
    few: int,
    stop: float,
    left: list[str],
) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    """Seconds per run and step of all rounds, and the losses of the first.

    Who fails is left out.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    losses = {}
    for number in range(settings.rounds + 1):
        for name in list(seconds):
            try:
                began = time.perf_counter()
                loss = contenders[name].epoch(number)
                elapsed = time.perf_counter() - began
            except Exception as error:
                left.append(f'{name}: {first_line(error)}')
                del seconds[name]
                continue
            if number == 0:
                losses[name] = loss  # from equal weights; this round also compiles
            else:
                count = runs if name in ('sweep', 'stacked') else few
                seconds[name].append(elapsed / count / case.program.steps)
        if number and time.monotonic() > stop:
            break
    return seconds, losses


def costs(case: Case, seconds: dict[str, list[float]], peak: float) -> dict[str, str]:
    """The columns of a row that are made of seconds."""
    row = {}
    own = seconds['sweep']
    rate = case.flops / statistics.median(own)
    row |= {'GFLOP/s': f'{rate / 1e9:.4g}', '% of peak': f'{100 * rate / peak:.3g}'}
    for name, times in seconds.items():
        row[f'{name} ms'] = f'{1e3 * statistics.median(times):.4g}'
        if name != 'sweep':
            ratios = [a / b for a, b in zip(times, own, strict=True)]
            row[f'x {name}'] = f'{statistics.median(ratios):.3g}'
    return row


def recording(settings, case: Case, runs: int, every: int, end: float) -> list[dict[str, str]]:
    """What records along training cost: epochs with and without, in turns."""
    if time.monotonic() > end:
        return [{'net': case.name, 'recorded': 'left out: no time left (--minutes)'}]
    longer = argparse.Namespace(**{**vars(settings), 'steps': 2 * every if runs > 2 else every})
    kinds = recorded_kinds(every)
    epochs = {
        kind: recorded_epoch(case, specification(longer, case.name, runs, record=record))
        for kind, record in kinds.items()
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(settings.rounds + 2):
        for kind, epoch in epochs.items():
            began = time.perf_counter()
            epoch(number)
            if number:
                seconds[kind].append(time.perf_counter() - began)
    found = []
    for kind in list(kinds)[1:]:
        more = [a / b - 1 for a, b in zip(seconds[kind], seconds['nothing'], strict=True)]
        spread = f'{100 * min(more):+.1f} to {100 * max(more):+.1f}'
        found.append(
            {
                'net': case.name,
                'N': str(runs),
                'recorded': kind,
                'cost %': f'{100 * statistics.median(more):+.1f}',
                'range': spread,
            }
        )
        print(found[-1], flush=True)
    return found


def recorded_kinds(every: int) -> dict[str, dict[str, Any]]:
    """What is recorded -> [record] of a specification; the first of them records nothing."""
    stride = {'every': every}
    return {
        'nothing': {},
        'training loss, every step': {'every': 1},
        f'weight norms, every {every} steps': {**stride, 'flow': ['weight_norm']},
        f'gradient norms on 100 examples, every {every}': {**stride, 'flow': ['gradient_norm']},
        f'gᵀHg on 100 examples, every {every}': {**stride, 'flow': ['gradient_curvature']},
        f'mean singular value of 100 Jacobians, every {every}': {**stride, 'flow': ['jsv_mean']},
        f'evaluation on 500 examples, every {every}': {**stride, 'evaluate': True},
    }


def recorded_epoch(case: Case, spec: Any) -> Callable[[int], list]:
    """An epoch by the engine, stopped where something is recorded, and the rows of its tables."""
    members = all_runs(spec)
    strategy = case.strategy._replace(devices=math.gcd(len(members), case.strategy.devices))
    program = make_program(spec, members[0], strategy.convolution)
    engine = make_engine(strategy, program, noise(spec), jax.local_devices())
    rows, _ = rows_of(members, len(members), engine)
    borders = borders_of(program.timeline, program.record, program.steps)
    walked = list(zip(borders, stretches_of(program.timeline, borders), strict=True))
    states, errors = engine.init(rows), [None] * len(members)

    def epoch(number: int) -> list:
        nonlocal states
        before, losses, waiting = number * program.steps, [], []
        for border, stretch in walked:
            if not before < border.step <= before + program.steps:
                continue
            states, loss = engine.advance(stretch.start, stretch.stop, rows, states)
            if losses:
                losses[-1]()  # as a sweep waits: for the stretch before this one
            losses.append(loss)
            if border.record:
                waiting.append((border.step, engine.record(stretch.stop, rows, states)))
        moments = [Moment(step, False, fetch()) for step, fetch in waiting]
        losses = np.concatenate([fetch() for fetch in losses], axis=1)
        curves = curves_rows(program, members, errors, before, losses, moments)
        return curves + flow_rows(program, members, errors, moments)

    return epoch


def matmul_peak() -> float:
    """Floating-point operations per second of the fastest float32 matrix product tried here."""
    best = 0.0
    for batch, side in ((1, 1024), (1, 2048), *(((16, 2048), (1, 8192)) if accelerated() else ())):
        a = jnp.asarray(np.random.default_rng(0).normal(size=(batch, side, side)), jnp.float32)
        product = jax.jit(lambda a, side=side: a @ a / side)
        product(a).block_until_ready()
        times = []
        while sum(times) < 0.5:
            began = time.perf_counter()
            product(a).block_until_ready()
            times.append(time.perf_counter() - began)
        best = max(best, 2 * batch * side**3 / min(times))
    return best


# --- telling ----------------------------------------------------------------------------------


def machine_line(peak: float) -> str:
    device = jax.local_devices()[0]
    try:
        import torch

        torch_version = torch.__version__
    except ImportError:
        torch_version = 'absent'
    return (
        f'{jax.local_device_count()} x {device.device_kind}, {cores()} cores, '
        f'{platform.machine()}; jax {jax.__version__}, torch {torch_version}, Python '
        f'{platform.python_version()}; matrix products reach {peak / 1e9:,.0f} GFLOP/s.'
    )


def markdown(head: str, rows: list[dict], notes: list[str], costs: list[dict]) -> str:
    parts = [head]
    if rows:
        parts += ['', '### N runs', '', *table(COLUMNS, rows)]
    if costs:
        parts += ['', '### What recording along training costs', '']
        parts += table(('net', 'N', 'recorded', 'cost %', 'range'), costs)
    if notes:
        parts += ['', '### Strategies tried', '', *(f'- {note}' for note in notes)]
    return '\n'.join(parts) + '\n'


def table(columns, rows: list[dict]) -> list[str]:
    # A column that no row has anything to say in is left out.
    shown = [c for c in columns if any(str(row.get(c, '')) for row in rows)]
    lines = ['| ' + ' | '.join(shown) + ' |', '|' + '---|' * len(shown)]
    return [*lines, *('| ' + ' | '.join(str(row.get(c, '')) for c in shown) + ' |' for row in rows)]


def draw(rows: list[dict], path: Path) -> None:
    """Cost per run and step as N grows, a panel per net."""
    from matplotlib.figure import Figure

    nets = list(dict.fromkeys(r['net'] for r in rows if 'sweep ms' in r))
    if not nets:
        return
    figure = Figure(figsize=(3 * len(nets), 3.2), layout='constrained')
    axes = figure.subplots(1, len(nets), squeeze=False)[0]
    styles = {
        'sweep': ('#0072B2', 'o', '-'),
        'JAX': ('#E69F00', 's', '--'),
        'PyTorch': ('#009E73', '^', '--'),
        'graphs': ('#CC79A7', 'v', '--'),
        'stacked': ('#56B4E9', 'D', '--'),
    }
    words = {
        'sweep': 'the sweep',
        'JAX': 'JAX, one by one',
        'graphs': 'PyTorch, CUDA graphs',
        'stacked': 'PyTorch, vmap',
    }
    for ax, name in zip(axes, nets, strict=True):
        mine = [r for r in rows if r['net'] == name and 'sweep ms' in r]
        for way, (colour, marker, line) in styles.items():
            points = [(r['N'], float(r[f'{way} ms'])) for r in mine if f'{way} ms' in r]
            if points:
                label = words.get(way, way)
                ax.plot(*zip(*points, strict=True), line, color=colour, marker=marker, label=label)
        ax.set_xscale('log', base=2)
        ax.set_xticks([r['N'] for r in mine], [str(r['N']) for r in mine])
        ax.set_ylim(bottom=0)
        ax.set_title(name, fontsize=10)
        ax.set_xlabel('runs')
        ax.spines[['top', 'right']].set_visible(False)
    axes[0].set_ylabel('ms per run and step')
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == '__main__':
    main()
