"""Runs x steps per second of a sweep, against the same runs one after another.

    pip install -e '.[bench]' && python experiments/bench/throughput.py

LeNet-300-100 on mnist_small, SGD with momentum, masks of real pruners. Three ways to do the same
training, in one process, in turns, so that the machine's mood hits all of them alike:

  sweep     the sweep's own engine, all runs in one program
  one by one  JAX, one compiled epoch (a scan over its steps) called for each run in turn
  PyTorch   a plain loop per run, same initial weights, masks and batches (skipped without torch)

Printed: the median over the rounds of each, its range, and the ratios. All three must reach the
same mean training loss, or the comparison would be void; the script checks that.
"""

import argparse
import platform
import statistics
import time

import jax

from jaxprune.sweep.devices import cores, use_all_cores


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--runs', type=int, default=16, help='runs in the chunk (default 16)')
    parser.add_argument('--rounds', type=int, default=5, help='timed epochs of each (default 5)')
    parser.add_argument('--batching', default='map', help='map, vmap or unroll (default map)')
    arguments = parser.parse_args()
    use_all_cores()

    contenders = {}
    start = prepare(arguments.runs, arguments.batching)
    contenders['sweep'] = sweep(start)
    contenders['one by one'] = one_by_one(start)
    try:
        import torch

        contenders['PyTorch'] = pytorch(start)
        torch_version = torch.__version__
    except ImportError:
        torch_version = 'absent'
        print("PyTorch is not installed (pip install -e '.[bench]'): left out")

    losses, seconds = {}, {name: [] for name in contenders}
    for number in range(arguments.rounds + 1):
        for name, epoch in contenders.items():
            began = time.perf_counter()
            loss = epoch(number)
            elapsed = time.perf_counter() - began
            if number == 0:
                losses[name] = loss  # from equal weights; this round also compiles
            else:
                seconds[name].append(elapsed)
    for loss in losses.values():
        if abs(loss - losses['sweep']) > 1e-3 * abs(losses['sweep']):
            raise SystemExit(f'not the same training: mean losses of the first epoch {losses}')

    work = arguments.runs * start['program'].steps
    device = jax.local_devices()[0]
    print(
        f'{arguments.runs} runs of LeNet-300-100, batch 128, {start["program"].steps} steps each; '
        f'{start["strategy"]} on {jax.local_device_count()} x {device.device_kind}, '
        f'{cores()} cores, {platform.machine()}; jax {jax.__version__}, torch {torch_version}'
    )
    speed = {name: [work / s for s in times] for name, times in seconds.items()}
    for name, values in speed.items():
        median, low, high = statistics.median(values), min(values), max(values)
        ratio = statistics.median(a / b for a, b in zip(speed['sweep'], values, strict=True))
        print(
            f'{name:<11} {median:8.0f} runs x steps/s  ({low:.0f} to {high:.0f})'
            f'   sweep is {ratio:.2f} x'
        )


def prepare(runs: int, batching: str) -> dict:
    """A chunk of pruned runs: the specification's own functions up to the first step."""
    import numpy as np

    from jaxprune import data
    from jaxprune.rng import run_key
    from jaxprune.sweep import make_spec
    from jaxprune.sweep.engine import Rows, make_engine
    from jaxprune.sweep.grid import runs as all_runs
    from jaxprune.sweep.plan import counts_of
    from jaxprune.sweep.program import device_data, hyper_of, make_program
    from jaxprune.sweep.strategy import Strategy

    spec = make_spec(
        {
            'name': 'throughput',
            'model': {'name': 'lenet300100'},
            'data': {'name': 'mnist_small'},
            'train': {'epochs': 1000, 'schedule': 'constant', 'momentum': 0.9},
            'grid': {
                'method': ['snip'],
                'compression': [2, 10, 100],
                'seed': list(range(-(-runs // 3))),
            },
        }
    )
    members = all_runs(spec)[:runs]
    program = make_program(spec, members[0].train)
    on_device = device_data(spec, data.load(spec.data.name))
    devices = jax.local_devices()
    if runs % len(devices):
        raise SystemExit(f'--runs must be a multiple of the {len(devices)} devices')
    strategy = Strategy(batching, 'scan', 'native', len(devices))
    engine = make_engine(strategy, program, on_device, devices)
    rows = Rows(
        jax.numpy.stack([run_key(run.seed) for run in members]),
        jax.tree.map(lambda *leaves: np.stack(leaves), *map(hyper_of, members)),
    )
    tables = [counts_of(program, run).counts for run in members]
    counts = {path: np.stack([t[path] for t in tables]) for path in tables[0]}
    active = np.zeros(runs, np.int32)  # wanted by runs that target effective compression
    states, _ = engine.prune(
        members[0].method, rows, range(runs), counts, active, engine.init(rows)
    )
    host = engine.pack(states)
    each = [jax.tree.map(lambda a, i=i: a[i], host) for i in range(runs)]
    return {
        'program': program,
        'strategy': strategy,
        'engine': engine,
        'rows': rows,
        'states': states,
        'each': each,
        'data': on_device,
    }


def sweep(start: dict):
    """The engine's epoch."""
    engine, rows = start['engine'], start['rows']
    states = start.pop('states')  # the engine donates them

    def epoch(number: int) -> float:
        nonlocal states
        states, losses, _ = engine.epoch(number, rows, states)
        return float(losses.mean())

    return epoch


def one_by_one(start: dict):
    """One compiled epoch of one run, called for each run in turn."""
    from jaxprune.sweep.engine import segment_of

    program, device = start['program'], jax.local_devices()[0]
    segment = jax.jit(segment_of(program), donate_argnums=5)
    order = jax.jit(program.order)
    data = jax.device_put(start['data'], device)
    states = jax.device_put(start['each'], device)
    rows = [
        jax.device_put(jax.tree.map(lambda leaf, i=i: leaf[i], start['rows']), device)
        for i in range(len(states))
    ]

    def epoch(number: int) -> float:
        losses = []
        for i, (key, hyper) in enumerate(rows):
            clock = jax.numpy.int32(number * program.steps)
            states[i], loss = segment(clock, data, key, hyper, order(key, number), states[i])
            losses.append(loss.mean())
        return float(jax.numpy.stack(losses).mean())

    return epoch


def pytorch(start: dict):
    """A plain PyTorch loop over the runs, one after another, on all cores."""
    import numpy as np
    import torch
    from torch.nn import functional

    torch.set_num_threads(cores())
    program = start['program']
    split = jax.device_get(start['data'].train)
    images = (torch.tensor(np.array(split.images)).float() / 255 - 0.1307) / 0.3081
    images, labels = images.flatten(1), torch.tensor(np.array(split.labels)).long()
    order = jax.jit(program.order)
    runs = []
    for i, state in enumerate(start['each']):
        layers, masks = [], []
        for name in sorted(state.params):
            kernel = np.array(state.params[name]['kernel']).T
            layer = torch.nn.Linear(*kernel.shape[::-1])
            with torch.no_grad():
                layer.weight.copy_(torch.tensor(kernel))
                layer.bias.copy_(torch.tensor(np.array(state.params[name]['bias'])))
            layers += [layer, torch.nn.ReLU()]
            masks.append((layer.weight, torch.tensor(np.array(state.masks[f'{name}/kernel']).T)))
        net = torch.nn.Sequential(*layers[:-1])
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        runs.append((start['rows'].keys[i], net, optimizer, masks))

    def epoch(number: int) -> float:
        means = []
        for key, net, optimizer, masks in runs:
            batches = torch.tensor(np.array(order(key, number))).long()
            total = 0.0
            for indices in batches:
                optimizer.zero_grad()
                loss = functional.cross_entropy(net(images[indices]), labels[indices])
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    for weight, mask in masks:
                        weight *= mask
                total += loss.detach()
            means.append(float(total) / len(batches))
        return sum(means) / len(means)

    return epoch


if __name__ == '__main__':
    main()
