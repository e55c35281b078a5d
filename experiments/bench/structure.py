"""What it costs to find coupled groups, what compact networks gain, and what others do.

    pip install -e '.[bench]' && python experiments/bench/structure.py --out structure.md

Three parts; without an option all of them. No data are needed.

  --tracing  seconds and peak memory of `jp.groups` for ResNet-56 on CIFAR images, ResNet-50,
             MobileNet-V1 and ViT-B, at two batch sizes and two image sizes, each in a process of
             its own, on shapes alone: no parameter is allocated. Then seconds against the number
             of equations, for residual networks of growing depth. Targets: below 5 s each, no
             growth with batch or image, time proportional to equations
  --latency  a network without 30, 50 and 80 % of its groups, drawn at random, against the dense and
             the masked one: ratios of times measured in turns, beside those of `jp.cost`
  --peers    Torch-Pruning and torch-kirigami on the same networks with the same arrays and the same
             removal: groups, time to find them, parameters and multiply-accumulates that are left,
             and whether the smaller network runs and equals the masked one

A smaller network of jaxprune that does not equal the masked one is marked WRONG, and the exit
status is 1. What the others cannot do is a result, told below the tables. A few minutes on two
cores; `--quick` takes the smallest of everything.
"""

import argparse
import functools
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
from structure_nets import PAIRS, chosen, masks_of
from tables import Table, check_out, measure

import jaxprune as jp
from jaxprune import nn, structure, tree
from jaxprune.errors import first_line
from jaxprune.nn.blocks import conv_bn
from jaxprune.nn.conv import native
from jaxprune.nn.initial import kaiming_normal
from jaxprune.nn.resnet import ResNet, cifar_blocks
from jaxprune.nn.transformer import Encoder

MIB = 2**20
#: The issue's target for one network.
TARGET_SECONDS = 5
DEPTHS = (8, 20, 32, 56, 110)
FRACTIONS = (0.3, 0.5, 0.8)
#: Rounding stays below it: 1e-6 on CPUs, above 1e-4 on a GPU, whose convolutions are transformed.
LARGEST_ERROR = 1e-3


def main() -> None:
    settings = parse()
    if settings.one:
        print(json.dumps(one(*settings.one)))
        return
    # Else a second call would report the time to read a file as the time to compile.
    jax.config.update('jax_enable_compilation_cache', False)
    parts = {'tracing': tracing, 'latency': latencies, 'peers': peers}
    measure(settings, parts, 'a smaller network is wrong, see the tables')


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--tracing', action='store_true', help='what `jp.groups` costs')
    add('--latency', action='store_true', help='what compact networks gain')
    add('--peers', action='store_true', help='Torch-Pruning and torch-kirigami')
    add('--nets', nargs='+', choices=(*LARGE, *TIMED, *PAIRS), default=[], metavar='NET',
        help='only these, of tracing: ' + ', '.join(LARGE) + '; of latency: ' + ', '.join(TIMED)
        + '; of peers: ' + ', '.join(PAIRS))  # fmt: skip
    add('--rounds', type=int, default=5, help='timed turns of tracing and graphs (default 5)')
    add('--repeats', type=int, default=30, help='timed calls of a network (default 30)')
    add('--out', help='a markdown file for the tables, written anew after every row')
    add('--quick', action='store_true', help='a minute, to see whether all runs')
    add('--one', nargs=4, metavar=('NET', 'BATCH', 'SIDE', 'ROUNDS'), help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.quick:
        settings.rounds, settings.repeats = 1, 2
    if min(settings.rounds, settings.repeats) < 1:
        parser.error('--rounds and --repeats must be above 0')
    check_out(parser, settings.out)
    return settings


def wanted(settings, names, quick: int) -> list[str]:
    """The networks of a part: those named, else all, of which `--quick` takes the first few."""
    if settings.nets:
        return [name for name in names if name in settings.nets]
    return list(names)[:quick] if settings.quick else list(names)


# --- tracing --------------------------------------------------------------------------------------


class ResNet50(linen.Module):
    """Bottleneck blocks, 3-4-6-3, of 64 to 2048 maps, for images of 224x224 (He et al., 2016)."""

    classes: int = 1000

    @linen.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        net = argparse.Namespace(conv=native, dtype=None, kernel_init=kaiming_normal)
        layer = functools.partial(conv_bn, net, train=train)
        x = linen.relu(layer(x, 64, 'stem', side=7, stride=2))
        x = linen.max_pool(x, (3, 3), (2, 2), 'SAME')
        for stage, count in enumerate((3, 4, 6, 3)):
            maps = 64 * 2**stage
            for block in range(count):
                name, stride = f'stage{stage}_block{block}', 2 if stage and not block else 1
                y = linen.relu(layer(x, maps, f'{name}_a', side=1))
                y = linen.relu(layer(y, maps, f'{name}_b', stride=stride))
                y = layer(y, 4 * maps, f'{name}_c', side=1)
                if not block:
                    x = layer(x, 4 * maps, f'{name}_skip', side=1, stride=stride)
                x = linen.relu(x + y)
        return linen.Dense(self.classes)(x.mean((1, 2)))


class ViTB(linen.Module):
    """ViT-B/16: 12 layers of 768, 12 heads, 3072 hidden units (Dosovitskiy et al., 2021)."""

    classes: int = 1000

    @linen.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        x = linen.Conv(768, (16, 16), (16, 16), name='embed')(x)
        x = x.reshape(x.shape[0], -1, 768)
        x = x + self.param('positions', linen.initializers.zeros, (1, x.shape[1], 768))
        return linen.Dense(self.classes)(Encoder(768, 12, 12, 3072)(x).mean(1))


def residual(depth: int) -> linen.Module:
    return ResNet(cifar_blocks(depth), (16, 32, 64), 10)


#: Module, two image sizes.
LARGE: dict[str, tuple[Callable[[], linen.Module], tuple[int, int]]] = {
    'ResNet-56': (lambda: nn.build('resnet56', 10), (32, 64)),
    'ResNet-50': (ResNet50, (224, 320)),
    'MobileNet-V1': (lambda: nn.build('mobilenet', 1000), (224, 320)),
    'ViT-B': (ViTB, (224, 384)),
}


def tracing(settings, tables: list[Table], notes: list[str], publish: Callable) -> None:
    table = Table(
        'What finding groups costs',
        '`jp.groups` on shapes, evaluation mode. Seconds of CPU, of one thread: the first call of'
        ' a process, then medians of the whole and of `jax.make_jaxpr` alone. MiB: the peak above'
        ' a process that only imports.',
        ('net', 'image', 'batch', 'equations', 'groups', 'first s', 's', 'JAX s', 'MiB'), [],
    )  # fmt: skip
    tables.append(table)
    imports = measured_apart('imports', 0, 0, 1)['peak']
    notes.append(f'a process that only imports takes {imports / MIB:.0f} MiB')
    for name in wanted(settings, LARGE, 1):
        for side in LARGE[name][1]:
            for batch in (1, 32):
                found = measured_apart(name, batch, side, settings.rounds)
                table.rows.append({
                    'net': name, 'image': side, 'batch': batch, **counts_of(found),
                    'MiB': f'{(found["peak"] - imports) / MIB:.0f}',
                })  # fmt: skip
                print(table.rows[-1], flush=True)
                publish()
    slow = [row['net'] for row in table.rows if float(row['first s']) > TARGET_SECONDS]
    notes.append(f'above the target of {TARGET_SECONDS} s: {", ".join(slow) or "none"}')
    by_depth(settings, tables, notes, publish)


def by_depth(settings, tables: list[Table], notes: list[str], publish: Callable) -> None:
    """Seconds against equations."""
    if settings.nets:
        return
    table = Table(
        'Seconds against equations',
        'Residual networks of CIFAR, batch 1, 32x32 images.',
        ('depth', 'equations', 'groups', 'first s', 's', 'JAX s', 'ms per equation'), [],
    )  # fmt: skip
    tables.append(table)
    points = []
    for depth in DEPTHS[:2] if settings.quick else DEPTHS:
        found = measured_apart(f'depth {depth}', 1, 32, settings.rounds)
        points.append((found['equations'], statistics.median(found['seconds'])))
        each = 1e3 * points[-1][1] / found['equations']
        row = {'depth': depth, **counts_of(found), 'ms per equation': f'{each:.3f}'}
        table.rows.append(row)
        print(table.rows[-1], flush=True)
        publish()
    slope = np.polyfit(*np.log(np.array(points)).T, 1)[0]
    notes.append(f'seconds go with equations to the power {slope:.2f}')


def counts_of(found: dict[str, Any]) -> dict[str, str]:
    return {
        'equations': f'{found["equations"]:,}',
        'groups': f'{found["groups"]:,}',
        'first s': f'{found["first"]:.2f}',
        's': f'{statistics.median(found["seconds"]):.2f}',
        'JAX s': f'{statistics.median(found["tracing"]):.2f}',
    }


def measured_apart(name: str, batch: int, side: int, rounds: int) -> dict[str, Any]:
    """`one` in a process of its own."""
    command = [sys.executable, __file__, '--one', name, str(batch), str(side), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f'{name}: {done.stderr.strip().splitlines()[-1]}')
    return json.loads(done.stdout.strip().splitlines()[-1])


def one(name: str, batch: str, side: str, rounds: str) -> dict[str, Any]:
    """What `jp.groups` costs for one network."""
    if name == 'imports':
        return {'peak': peak_memory()}
    make = LARGE[name][0] if name in LARGE else lambda: residual(int(name.split()[1]))
    shape = (int(side), int(side), 3)
    problem = jp.problem_from_flax(make(), shape)
    params, state = jax.eval_shape(problem.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((int(batch), *shape), jnp.float32)

    def fresh() -> Callable:
        # A new function each time: JAX keeps what it traced.
        return lambda params, state, x: problem.apply(params, state, x, train=False)[0]

    def busy(call: Callable[[], Any]) -> float:
        # One thread works: seconds of CPU are those of the clock where nothing runs beside.
        began = time.process_time()
        call()
        return time.process_time() - began

    reads = []
    first = busy(lambda: reads.append(jp.groups(fresh(), params, x, state)))
    [read] = reads
    peak = peak_memory()
    seconds, tracings = [], []
    for _ in range(int(rounds)):
        seconds.append(busy(lambda: jp.groups(fresh(), params, x, state)))
        tracings.append(busy(lambda: jax.make_jaxpr(fresh())(params, state, x)))
    jaxpr = jax.make_jaxpr(fresh())(params, state, x)
    free = sum(family.size for family in read.families if not family.reason)
    return {
        'first': first, 'seconds': seconds, 'tracing': tracings, 'peak': peak,
        'groups': free, 'equations': equations(jaxpr.jaxpr),
    }  # fmt: skip


def equations(jaxpr: Any) -> int:
    """Equations of a jaxpr and of all functions that it calls."""
    count = 0
    for equation in jaxpr.eqns:
        count += 1
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, 'jaxpr', inner)
                count += equations(inner) if hasattr(inner, 'eqns') else 0
    return count


def peak_memory() -> int:
    """The most bytes of this process. Linux hands `ru_maxrss` down from who started it."""
    try:
        lines = Path('/proc/self/status').read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith('VmHWM'))
    except (OSError, StopIteration):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == 'darwin' else 1024 * most


# --- latency --------------------------------------------------------------------------------------

TIMED = {
    'ResNet-20': lambda: nn.build('resnet20', 10),
    'VGG-11': lambda: nn.build('vgg11', 10),
}


def latencies(settings, tables: list[Table], notes: list[str], publish: Callable) -> None:
    columns = ('net', 'batch', 'removed', 'params', 'MACs', 'FLOPs', 'time', 'time, masked',
               'dense ms', 'error')  # fmt: skip
    table = Table(
        'What compact networks gain',
        'Dense over compact: parameters, costs, and time in turns; time of the masked network over'
        ' that of the compact one. Groups at random in every family; 32x32 images, evaluation.'
        ' Error: the largest difference from the masked network, over the largest output.',
        columns, [],
    )  # fmt: skip
    tables.append(table)
    for name in wanted(settings, TIMED, 1):
        problem = jp.problem_from_flax(TIMED[name](), (32, 32, 3))
        params, state = jax.jit(problem.init)(jax.random.key(0))

        def apply(params, state, x, problem=problem):
            return problem.apply(params, state, x, train=False)[0]

        for batch in (1,) if settings.quick else (1, 64):
            x = np.random.default_rng(0).standard_normal((batch, 32, 32, 3), np.float32)
            read = jp.groups(apply, params, x, state)
            for fraction in FRACTIONS[1:2] if settings.quick else FRACTIONS:
                row = {'net': name, 'batch': batch, 'removed': f'{fraction:.0%}'}
                table.rows.append(row | gain(settings, apply, params, state, x, read, fraction))
                print(table.rows[-1], flush=True)
                publish()


def gain(settings, apply, params, state, x, read, fraction: float) -> dict[str, str]:
    """One removal: ratios of dense to compact."""
    shapes = {path: leaf.shape for path, leaf in tree.paths(params)}
    masks = masks_of(read, chosen(read, fraction), shapes)
    small = jp.compact(apply, params, masks, x, model_state=state)
    masked = tree.apply_masks(params, masks)
    before = jp.cost(apply, params, x, state)
    after = jp.cost(small.apply, small.params, x, small.model_state)
    compact = small.apply, small.params, small.model_state
    # At full precision: products on tensor cores round to three digits.
    with jax.default_matmul_precision('highest'):
        expected = np.asarray(jax.jit(apply)(masked, state, x))
        found = np.asarray(jax.jit(small.apply)(small.params, small.model_state, x))
    error = float(np.abs(found - expected).max() / np.abs(expected).max())

    def ratio(other: tuple[Any, ...]) -> str:
        return f'{structure.latency_ratio(other, compact, x, repeats=settings.repeats):.2f}'

    dense = structure.latency(apply, params, x, model_state=state, repeats=settings.repeats)
    return {
        'params': f'{before.params / after.params:.2f}',
        'MACs': f'{before.macs / after.macs:.2f}',
        'FLOPs': f'{before.flops / after.flops:.2f}',
        'time': ratio((apply, params, state)),
        'time, masked': ratio((apply, masked, state)),
        'dense ms': f'{1e3 * dense:.3g}',
        'error': f'{error:.0e}{" WRONG" if error > LARGEST_ERROR else ""}',
    }


# --- peers ----------------------------------------------------------------------------------------


def peers(settings, tables: list[Table], notes: list[str], publish: Callable) -> None:
    missing = [n for n in ('torch', 'torch_pruning', 'torch_kirigami')
               if importlib.util.find_spec(n) is None]  # fmt: skip
    if missing:
        notes.append(f'peers: left out, not installed: {", ".join(missing)}')
        return
    from structure_peers import LIBRARIES, side_by_side

    others = [name for name in LIBRARIES if name != 'jaxprune']
    times = [f'{name} {what}' for name in others for what in ('ms', 'groups ms')]
    finding = Table(
        'Groups, side by side',
        'Groups that may go, and in how many families (for kirigami: axes). ms: of CPU to build'
        ' the graph, medians in turns (jaxprune finds all groups meanwhile), and with all groups.',
        ('net', *LIBRARIES, 'jaxprune ms', *times), [],
    )  # fmt: skip
    removing = Table(
        'The same removal, side by side',
        '30 % of the groups of each family. Outputs of the smaller network against the masked one.'
        ' One index: where a group is several of a layer, only the first of them is asked for.',
        ('net', 'removed', *LIBRARIES, *(f'{n}, one index' for n in others),
         *(f'{n} params' for n in LIBRARIES),
         *(f'{n} MMACs' for n in LIBRARIES)), [],
    )  # fmt: skip
    tables += [finding, removing]
    for name in wanted(settings, PAIRS, 2):
        try:
            rows = side_by_side(name, settings.rounds)
        except Exception as error:
            notes.append(f'{name}: WRONG: {type(error).__name__}: {first_line(error)}')
            continue
        if not rows.agrees:
            rows.removing['jaxprune'] = f'WRONG: {rows.removing["jaxprune"]}'
        finding.rows.append(rows.finding)
        removing.rows.append(rows.removing)
        notes += rows.notes
        print(rows.finding, rows.removing, *rows.notes, sep='\n', flush=True)
        publish()


# --- telling --------------------------------------------------------------------------------------


if __name__ == '__main__':
    main()
