"""What stands between a step of LeNet-300-100 and the fastest matrix product of this machine.

    python experiments/bench/dense_step.py --out dense_step.md

Sixteen runs, batch 128, as a sweep trains them on the CPU: a run per device at a time, 32 steps per
call. The step grows from its matrix products to the whole; all stages are timed in turns, in one
process. Then memory: a loop that moves as many bytes as the update does, and computes nothing.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from engine import machine_line, matmul_peak, table

from jaxprune.sweep.devices import use_all_cores

SIZES = (784, 300, 100, 10)
RUNS, BATCH, STEPS = 16, 128, 32
Params = list[tuple[jax.Array, jax.Array]]


def products(weights, x, y):
    """The matrix products of a step alone: forward, and backward as if all units were active."""
    acts = [x]
    for kernel, _ in weights:
        acts.append(acts[-1] @ kernel)
    back, made = acts[-1], []
    for (kernel, bias), act in zip(weights[::-1], acts[-2::-1], strict=True):
        made.append((act.T @ back, bias))
        back = back @ kernel.T if act is not x else back
    return made[::-1]


def gradient(weights, x, y):
    """The gradient of the loss: biases, ReLU, softmax as well."""

    def loss(weights):
        h = x
        for kernel, bias in weights[:-1]:
            h = jax.nn.relu(h @ kernel + bias)
        kernel, bias = weights[-1]
        logits = h @ kernel + bias
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return jax.grad(loss)(weights)


def stages() -> dict[str, Callable[[Any, Any, Any], Any]]:
    """Name -> `(state, x, y) -> state`; the state is weights, momentum and masks."""

    def only(part):
        return lambda state, x, y: (part(state[0], x, y), *state[1:])

    def updated(state, x, y, mask):
        weights, momentum, masks = state
        grads = gradient(weights, x, y)
        if mask:
            grads = jax.tree.map(lambda g, m: jnp.where(m, g, 0), grads, masks)
        momentum = jax.tree.map(lambda v, g: 0.9 * v + g, momentum, grads)
        weights = jax.tree.map(lambda w, v: w - 0.01 * v, weights, momentum)
        return weights, momentum, masks

    return {
        'matrix products': only(products),
        '+ biases, ReLU, loss': only(gradient),
        '+ SGD with momentum': lambda state, x, y: updated(state, x, y, False),
        '+ masks': lambda state, x, y: updated(state, x, y, True),
    }


def moved(state, x, y):
    """Reads gradient-like, momentum and weights, writes two of them: the update's traffic."""
    weights, momentum, masks = state
    both = jax.tree.map(lambda w, v: w + v, weights, momentum)
    return both, jax.tree.map(lambda w, b: w - b, weights, both), masks


def drawn(seed: int):
    """Weights, momentum and masks of a run."""
    draw = np.random.default_rng(seed)
    weights = [
        (draw.normal(size=(a, b)).astype(np.float32) / a**0.5, np.zeros(b, np.float32))
        for a, b in itertools.pairwise(SIZES)
    ]
    momentum = jax.tree.map(np.zeros_like, weights)
    masks = [(draw.random(k.shape) < 0.1, np.ones(b.shape, bool)) for k, b in weights]
    return weights, momentum, masks


def looped(stage: Callable) -> Callable:
    """So many steps of one run, compiled; the state is donated."""

    def steps(state, xs, ys):
        return jax.lax.scan(lambda s, batch: (stage(s, *batch), None), state, (xs, ys))[0]

    return jax.jit(steps, donate_argnums=0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--rounds', type=int, default=15, help='timed turns (default 15)')
    parser.add_argument('--out', help='a markdown file for the table')
    settings = parser.parse_args()
    use_all_cores()
    peak = matmul_peak()
    draw = np.random.default_rng(0)
    xs = draw.normal(size=(STEPS, BATCH, SIZES[0])).astype(np.float32)
    ys = draw.integers(0, SIZES[-1], (STEPS, BATCH)).astype(np.int32)
    devices = jax.local_devices()
    data = [jax.device_put((xs, ys), device) for device in devices]
    compiled = {name: looped(stage) for name, stage in {**stages(), 'memory': moved}.items()}
    states = {
        name: [jax.device_put(drawn(i), devices[i % len(devices)]) for i in range(RUNS)]
        for name in compiled
    }
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for number in range(settings.rounds + 1):
        for name, steps in compiled.items():
            began = time.perf_counter()
            states[name] = [
                steps(state, *data[i % len(devices)]) for i, state in enumerate(states[name])
            ]
            jax.block_until_ready(states[name])
            if number:
                seconds[name].append((time.perf_counter() - began) / RUNS / STEPS)
    flops = (
        2
        * BATCH
        * sum((3 if i else 2) * a * b for i, (a, b) in enumerate(itertools.pairwise(SIZES)))
    )
    text = rows_of(seconds, flops, peak)
    print(text)
    if settings.out:
        Path(settings.out).write_text(text)


def rows_of(seconds: dict[str, list[float]], flops: float, peak: float) -> str:
    """The table: what each part adds, and how near to the peak the step still is."""
    rows, before = [], 0.0
    for name, times in seconds.items():
        each = statistics.median(times)
        row = {'step': name, 'ms per run and step': f'{1e3 * each:.3f}'}
        if name != 'memory':
            row |= {'adds': f'{1e3 * (each - before):+.3f}'}
            row |= {'% of peak': f'{100 * flops / each / peak:.0f}'}
            before = each
        rows.append(row)
    columns = ('step', 'ms per run and step', 'adds', '% of peak')
    return '\n'.join([machine_line(peak), '', *table(columns, rows)]) + '\n'


if __name__ == '__main__':
    main()
