"""Does repairing isometry close the gap that a larger fine-tuning rate closes?

    python experiments/isometry/study.py --out runs/isometry

Wang et al., "Dynamical Isometry: The Missing Ingredient for Neural Network Pruning"
(arXiv:2105.05916), on digits. Networks are trained, their filters pruned by L1 norm at one ratio in
all layers but the last, and fine-tuned from 1e-2 and from 1e-3 (each divided by ten at a third and
two thirds of the way), as they are (L1) or with every kernel made orthogonal first (L1 + OrthP).
Linear networks, where OrthP makes isometry exact; then the same with ReLU, where it does not.

All runs of a network that share a length are trained by one program. Writes `runs.parquet` into
`--out`: test accuracy, training loss, mean singular value and condition of the Jacobian, a row per
run and epoch of fine-tuning: right after pruning (0), the first ten, every fifth and the last; and,
with nothing removed, a row per trained network.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl

from jaxprune import data, flow, problem, tree
from jaxprune.method import alike, unit_select, unit_shapes
from jaxprune.score.magnitude import magnitude
from jaxprune.sweep import make_spec, use_all_cores
from jaxprune.sweep.devices import keep_compiled
from jaxprune.sweep.engine import Engine, Rows, make_engine, stacked
from jaxprune.sweep.grid import runs as all_runs
from jaxprune.sweep.program import Program, device_data, make_program
from jaxprune.sweep.strategy import usual
from jaxprune.types import Batch, RunState

_MLP = {'name': 'mlp', 'widths': [100] * 6, 'init': 'pytorch'}
_LENET = {'name': 'lenet5', 'pool': 'max', 'init': 'pytorch'}
#: Name -> (model, activation of OrthP's gain). MLP-7: six dense layers of 100 and the classifier.
NETS: dict[str, tuple[dict[str, Any], str]] = {
    'MLP-7-Linear': ({**_MLP, 'activation': 'linear'}, 'linear'),
    'LeNet-5-Linear': ({**_LENET, 'activation': 'linear'}, 'linear'),
    'MLP-7-ReLU': (_MLP, 'relu'),
    'LeNet-5-ReLU': (_LENET, 'relu'),
}
RATES = (1e-2, 1e-3)
REPAIRS = ('L1', 'L1 + OrthP')


class Kind(NamedTuple):
    """A fine-tuned run.

    Attributes:
      seed: of the network and of the order of its data.
      ratio: share of the units removed.
      repair: one of `REPAIRS`; 'dense' where nothing is removed.
      rate: first learning rate of fine-tuning; of training where nothing is removed.
    """

    seed: int
    ratio: float
    repair: str
    rate: float


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--nets', nargs='+', choices=NETS, default=list(NETS), metavar='NET',
        help=f'some of {", ".join(NETS)} (default all)')  # fmt: skip
    add('--ratios', nargs='+', type=float, default=[0.1, 0.3, 0.5, 0.7, 0.8, 0.9])
    add('--seeds', type=int, default=5)
    add('--epochs', type=int, default=30, help='of each phase (default 30)')
    add('--longer', type=int, default=3, help='also fine-tune 1e-3 so many times as long; 1: not')
    add('--data', default='mnist_small', help='mnist_small (default), mnist or fashion_mnist')
    add('--data-dir', help='where prepared TFDS data lie')
    add('--out', type=Path, required=True, help='directory of the table')
    settings = parser.parse_args()
    if not all(0 < ratio < 1 for ratio in settings.ratios):
        parser.error('--ratios are shares of filters to remove, in (0, 1)')
    if min(settings.epochs, settings.longer) < 1 or settings.seeds < 2:
        parser.error('--epochs and --longer are at least 1, --seeds 2, for intervals')
    use_all_cores()
    keep_compiled()
    settings.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for net in settings.nets:
        began = time.monotonic()
        rows += studied(settings, net)
        frame = pl.DataFrame(rows, infer_schema_length=None)
        frame.write_parquet(settings.out / 'runs.parquet')
        print(f'{net}: {time.monotonic() - began:.0f} s', flush=True)
    return 0


def studied(settings: argparse.Namespace, net: str) -> list[dict[str, Any]]:
    """Rows of a network: trained, pruned, repaired, fine-tuned."""
    print(f'{net}: training {settings.seeds} networks', flush=True)
    seeds = range(settings.seeds)
    program, engine, base = prepared(settings, net, settings.epochs, 'train')
    rows = rows_of(base, list(seeds), [RATES[0]] * settings.seeds, engine)
    states = engine.init(rows)
    for epoch in range(settings.epochs):
        states = engine.epoch(epoch, rows, states).states
    trained = engine.pack(states)
    batches = examples(settings)
    spectrum = measured(program, batches)
    found = []
    for seed, accuracy in zip(seeds, engine.evaluate(states)[1], strict=False):
        state = jax.tree.map(lambda leaf, s=seed: leaf[s], trained)
        kind = Kind(seed, 0.0, 'dense', RATES[0])
        found.append(row(net, kind, settings.epochs, 0, accuracy, None, spectrum(state)))
    lengths = [(settings.epochs, RATES)]
    if settings.longer > 1:
        lengths.append((settings.epochs * settings.longer, RATES[1:]))
    for epochs, rates in lengths:
        kinds = [
            Kind(seed, ratio, repair, rate)
            for ratio in settings.ratios
            for repair in REPAIRS
            for rate in rates
            for seed in seeds
        ]
        print(f'{net}: fine-tuning {len(kinds)} runs for {epochs} epochs', flush=True)
        found += fine_tuned(settings, net, program, trained, kinds, epochs, batches)
    return found


def fine_tuned(
    settings: argparse.Namespace,
    net: str,
    trained_by: Program,
    trained: RunState,
    kinds: Sequence[Kind],
    epochs: int,
    batches: Batch,
) -> list[dict[str, Any]]:
    """Rows of all these runs, epoch by epoch."""
    program, engine, base = prepared(settings, net, epochs, 'fine-tune')
    rows = rows_of(base, [k.seed for k in kinds], [k.rate for k in kinds], engine)
    made = pruner(trained_by, NETS[net][1])
    starts = [
        made(jax.tree.map(lambda leaf, s=kind.seed: leaf[s], trained), kind) for kind in kinds
    ]
    starts += starts[-1:] * (len(rows.keys) - len(kinds))  # padding
    masked = jax.tree.map(lambda *leaves: np.stack(leaves), *starts)
    # A fresh optimizer, as the study has it: that of new runs.
    fresh = engine.pack(engine.init(rows))
    states = engine.unpack(fresh._replace(params=masked[0], masks=masked[1]))
    spectrum = measured(program, batches)
    table: list[dict[str, Any]] = []

    def note(epoch: int, losses) -> None:
        packed = engine.pack(states)
        _, accuracy = engine.evaluate(states)
        for i, kind in enumerate(kinds):
            values = spectrum(jax.tree.map(lambda leaf, i=i: leaf[i], packed))
            loss = None if losses is None else float(losses[i])
            table.append(row(net, kind, epochs, epoch, accuracy[i], loss, values))

    note(0, None)
    for epoch in range(epochs):
        done = engine.epoch(epoch, rows, states)
        states = done.states
        if epoch < 10 or (epoch + 1) % 5 == 0 or epoch + 1 == epochs:
            note(epoch + 1, done.losses.mean(axis=1))
    return table


def row(
    net: str,
    kind: Kind,
    epochs: int,
    epoch: int,
    accuracy: float,
    train_loss: float | None,
    spectrum: flow.Isometry,
) -> dict[str, Any]:
    """A row of the table."""
    return {
        'net': net,
        **kind._asdict(),
        'epochs': epochs,
        'epoch': epoch,
        'accuracy': 100 * float(accuracy),
        'train_loss': train_loss,
        'jsv_mean': float(spectrum.mean),
        'jsv_condition': float(spectrum.condition),
        'jsv_smallest': float(spectrum.smallest),
    }


def prepared(settings: argparse.Namespace, net: str, epochs: int, phase: str):
    """Program, engine and the specification of a phase: SGD as the study has it."""
    milestones = [epochs / 3, 2 * epochs / 3]
    spec = make_spec(
        {
            'name': f'{phase} {net}',
            'model': NETS[net][0],
            'data': {'name': settings.data},
            'train': {
                'optimizer': 'sgd',
                'momentum': 0.9,
                'weight_decay': 1e-4,
                'learning_rate': RATES[0],
                'batch_size': 100,
                'epochs': epochs,
                'schedule': 'step',
                'milestones': milestones,
            },
            'grid': {'method': ['magnitude'], 'compression': [1], 'seed': [0]},
        }
    )
    one = all_runs(spec)[0]
    convolves = make_program(spec, one.train).convolves
    strategy = usual(convolves, jax.default_backend(), jax.local_device_count())
    program = make_program(spec, one.train, strategy.convolution)
    on_device = device_data(spec, data.load(settings.data, settings.data_dir))
    return program, make_engine(strategy, program, on_device, jax.local_devices()), one


def rows_of(base, seeds: Sequence[int], rates: Sequence[float], engine: Engine) -> Rows:
    """Rows of so many runs, padded to what the devices take."""
    runs = [
        base._replace(seed=seed, train=dataclasses.replace(base.train, learning_rate=rate))
        for seed, rate in zip(seeds, rates, strict=True)
    ]
    return stacked(runs + runs[-1:] * (-len(runs) % engine.multiple))


def pruner(program: Program, activation: str):
    """`(state, kind) -> (params, masks)`: filters of the smallest mean |w| removed; repaired."""
    net, units = program.problem, unit_shapes(program.shapes)
    select = unit_select(program.connect, list(units))

    @jax.jit
    def prune(params, model_state, counts):
        view = problem.view(net, params, model_state)
        masks = select(alike(magnitude())(jax.random.key(0), view, None), counts)
        kept = tree.apply_masks(params, masks)
        made = flow.orthp(tree.pick(kept, net.prunable), masks, activation=activation)
        return masks, kept, tree.put(kept, made)

    def start(state: RunState, kind: Kind):
        # As many as the study's code removes: rounded up, never all.
        gone = {
            path: min(int(np.ceil(kind.ratio * n - 1e-9)), n - 1) for path, (n,) in units.items()
        }
        counts = {path: np.int32(n - gone[path]) for path, (n,) in units.items()}
        masks, kept, repaired = jax.device_get(prune(state.params, state.model_state, counts))
        return (kept if kind.repair == 'L1' else repaired), masks

    return start


def measured(program: Program, batches: Batch):
    """`state -> Isometry` of the network at a few examples."""
    values = flow.jacobian_singular_values(program.problem)

    @jax.jit
    def spectrum(state: RunState):
        return flow.isometry_of(
            values(jax.random.key(0), problem.view_of(program.problem, state), batches)
        )

    return spectrum


def examples(settings: argparse.Namespace, count: int = 20) -> Batch:
    """The first training examples, normalised."""
    facts = data.facts(settings.data)
    split = data.load(settings.data, settings.data_dir).train
    images = split.images[:count].astype(np.float32) / 255
    x = (images.reshape(1, count, *facts.shape) - np.array(facts.mean)) / np.array(facts.std)
    return Batch(jnp.asarray(x, jnp.float32), jnp.asarray(split.labels[None, :count]))


if __name__ == '__main__':
    sys.exit(main())
