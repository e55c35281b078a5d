"""Importances along dense training: how measures agree, and what pruning by each does.

    cd experiments/gradient_flow && python measures.py ../../runs/lenet5

Trains the dense runs of a sweep again, by its program, and measures them before training, after
one epoch, half-way and at the end. Each time: the correlations that the study is about, over single
weights and over filters; and for every measure, one-shot pruning at the sweep's ratio, without
retraining: test loss and accuracy, and what share of each layer goes. Writes into the directory of
the same name with `_measures` behind it: `agreement.parquet`, `pruned.parquet`, `removed.parquet`
and, for scatter plots, `filters.parquet` (the first seed).
"""

import argparse
import sys
from math import gcd
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import polars as pl

from jaxprune import data, flow, problem, tree
from jaxprune.errors import JaxpruneError
from jaxprune.method import limits
from jaxprune.score.importance import MEASURES, importance
from jaxprune.select import global_top_k, within_bounds
from jaxprune.sweep import SweepSpec, load_spec, store, use_all_cores
from jaxprune.sweep.advance import Rows
from jaxprune.sweep.attempts import attempts_of
from jaxprune.sweep.chunk import rows_of
from jaxprune.sweep.device_data import device_data
from jaxprune.sweep.devices import keep_compiled
from jaxprune.sweep.engine import Engine, make_engine
from jaxprune.sweep.grid import Run, runs
from jaxprune.sweep.program import Program, make_program
from jaxprune.sweep.strategy import Strategy
from jaxprune.types import GLOBAL, Batch, Groups, Masks, RunState, Scores

#: Name in the tables -> point of the family; those of the sweeps.
POINTS = {
    'magnitude': MEASURES['magnitude'],
    'loss': MEASURES['loss_preservation'],
    'biased loss': MEASURES['biased_loss_preservation'],
    'increase, T = 200': MEASURES['gradient_norm_increase'],
    'increase, T = 1': {**MEASURES['gradient_norm_increase'], 'temperature': 1.0},
    'preservation': MEASURES['gradient_norm_preservation'],
}
#: What is compared: signed sums over a filter, or sizes.
QUANTITIES = {
    '‖θ‖²': {'order': 0},
    'Σ|θ g|': {'order': 1},
    'θᵀg': {'order': 1, 'mode': 'signed'},
    'θᵀHg': {'order': 2, 'mode': 'signed'},
    'θᵀg, T = 200': {'order': 1, 'mode': 'signed', 'temperature': 200.0},
    'θᵀHg, T = 200': {'order': 2, 'mode': 'signed', 'temperature': 200.0},
}
#: Pair of them -> its name in the tables.
PAIRS = {
    ('‖θ‖²', 'Σ|θ g|'): 'magnitude, loss',
    ('θᵀg', 'θᵀHg'): 'θᵀg, θᵀHg',
    ('θᵀg, T = 200', 'θᵀHg, T = 200'): 'θᵀg, θᵀHg, both T = 200',
    ('θᵀg', 'θᵀHg, T = 200'): 'θᵀg, θᵀHg, T = 1 and 200',
}


class Setting(NamedTuple):
    """A network and its data, ready to be asked.

    Attributes:
      spec: the sweep.
      members: its dense runs, one per seed.
      program: their functions.
      engine: trains and evaluates them.
      rows: their keys and hyperparameters.
      batches: data of the importances: the first examples of each class.
      groups: the units that compete.
      keep: how many of them the sweep's ratio keeps.
    """

    spec: SweepSpec
    members: list[Run]
    program: Program
    engine: Engine
    rows: Rows
    batches: Batch
    groups: Groups
    keep: int


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('directory', type=Path, help='a finished sweep of this folder')
    parser.add_argument('--data-dir', help='where prepared TFDS data lie')
    arguments = parser.parse_args()
    use_all_cores()
    keep_compiled()
    try:
        setting = prepare(arguments.directory, arguments.data_dir)
    except JaxpruneError as error:
        raise SystemExit(str(error)) from None
    epochs = setting.members[0].train.epochs
    if epochs < 4:
        raise SystemExit(
            f'{arguments.directory}: {epochs} epochs have no half between 1 and the end'
        )
    stages = {0, 1, epochs // 2, epochs}
    out = beside(arguments.directory)
    out.mkdir(exist_ok=True)
    measure_epoch = make_measure(setting)
    tables: dict[str, list[dict[str, Any]]] = {}
    states = setting.engine.init(setting.rows)
    initial, steps = setting.engine.pack(states), setting.program.steps
    for epoch in range(epochs + 1):
        if epoch:
            states, _ = setting.engine.advance(
                (epoch - 1) * steps, epoch * steps, setting.rows, states
            )
        if epoch in stages:
            for name, rows in measure_epoch(epoch, setting.engine.pack(states), initial).items():
                tables.setdefault(name, []).extend(rows)
            print(f'{setting.spec.name}: after {epoch} of {epochs} epochs', flush=True)
    for name, rows in tables.items():
        frame = pl.DataFrame(rows, infer_schema_length=None)
        store.write_frame(
            out / f'{name}.parquet', frame.with_columns(net=pl.lit(setting.spec.model.name))
        )
    return 0


def beside(directory: Path) -> Path:
    """Where the tables of a sweep lie."""
    sweep = directory.resolve()
    return sweep.with_name(f'{sweep.name}_measures')


def prepare(directory: Path, data_dir: str | None) -> Setting:
    """The dense runs of the sweep, and what they need."""
    plan = store.read_plan(directory)
    spec = load_spec(directory / 'spec.toml')
    members = [run for run in runs(spec) if run.method.name == 'dense']
    ratios = [c for c in spec.grid.compression if c > 1]
    if not members or not ratios:
        raise SystemExit(f'{directory}: grid.compression needs 1 and a ratio to prune to')
    dataset = data.load(spec.data.name, data_dir)
    on_device = device_data(spec, dataset)
    facts = data.facts(spec.data.name)
    indices = on_device.by_class[:, : spec.prune.samples_per_class].reshape(-1)
    batch = data.fetcher(facts.mean, facts.std, ())(on_device.train, None, indices)
    strategy = trained_with(directory, plan, members[0].run_id)
    program = make_program(spec, members[0], strategy.convolution, strategy.batch_devices)
    engine = make_engine(strategy, program, on_device, jax.local_devices())
    rows, _ = rows_of(members, len(members), engine)
    groups = program.competing(spec.grid.method[0])
    keep = round(sum(n for (n,) in groups.shapes.values()) / ratios[0])
    one = jax.tree.map(lambda leaf: leaf[None], batch)
    return Setting(spec, members, program, engine, rows, one, groups, keep)


def trained_with(directory: Path, plan: dict[str, Any], run_id: str) -> Strategy:
    """How the sweep trained a run: another way rounds differently, and training amplifies that."""
    chunk = next(chunk['id'] for chunk in plan['chunks'] if run_id in chunk['runs'])
    strategy = Strategy(**attempts_of(directory, chunk)[-1]['strategy'])
    devices = min(strategy.devices, jax.local_device_count())
    return strategy._replace(devices=devices, batch_devices=gcd(strategy.batch_devices, devices))


def make_measure(setting: Setting):
    """`(epoch, states, initial states) -> table -> rows`, the functions of a network compiled."""
    net, groups = setting.program.problem, setting.groups
    floor, _ = limits(groups, 1, setting.spec.grid.method[0].floor_share)

    def select(scores: Scores) -> Masks:
        chosen = global_top_k(within_bounds(scores, floor, None), {GLOBAL: setting.keep})
        return groups.spread(chosen)

    @jax.jit
    def ask(state: RunState, initial: RunState, batches: Batch):
        view = problem.view(net, state.params, state.model_state)._replace(
            initial=tree.pick(initial.params, net.prunable)
        )

        def scored(**options):
            return importance(net, **options)(jax.random.key(0), view, batches)

        weights = {name: scored(**options) for name, options in QUANTITIES.items()}
        filters = {name: groups.gather(values) for name, values in weights.items()}
        agreements = {}
        for both, pair in PAIRS.items():
            agreements[pair, 'weight'] = flow.agreement(*(weights[name] for name in both))
            agreements[pair, 'filter'] = flow.agreement(*(filters[name] for name in both))
        masks = {name: select(scored(**options, by=groups)) for name, options in POINTS.items()}
        return agreements, filters, masks

    def measure_epoch(
        epoch: int, states: RunState, initial: RunState
    ) -> dict[str, list[dict[str, Any]]]:
        count = len(setting.members)
        states = jax.tree.map(lambda leaf: leaf[:count], states)
        found = [
            jax.device_get(ask(at(states, i), at(initial, i), setting.batches))
            for i in range(count)
        ]
        tables = {'agreement': [], 'pruned': [], 'removed': [], 'filters': []}
        for run, (agreements, filters, masks) in zip(setting.members, found, strict=True):
            here = {'seed': run.seed, 'epoch': epoch}
            for (pair, level), agreement in agreements.items():
                for kind, by_path in agreement._asdict().items():
                    tables['agreement'] += [
                        {**here, 'pair': pair, 'level': level, 'kind': kind, 'path': path,
                         'value': float(value)}
                        for path, value in by_path.items()
                    ]  # fmt: skip
            for name, by_path in masks.items():
                kept_units = setting.groups.alive(by_path)
                for depth, (path, kept) in enumerate(kept_units.items()):
                    tables['removed'].append(
                        {**here, 'measure': name, 'path': path, 'depth': depth,
                         'units': kept.size, 'removed': int((~kept).sum())}
                    )  # fmt: skip
            if run.seed == setting.members[0].seed:
                tables['filters'] += [
                    {**here, 'path': path, **{name: float(filters[name][path][i])
                                              for name in QUANTITIES}}
                    for path, (size,) in setting.groups.shapes.items()
                    for i in range(size)
                ]  # fmt: skip
        dense = tested(epoch, states)
        for name in POINTS:
            masks = jax.tree.map(lambda *leaves: np.stack(leaves), *(m[name] for _, _, m in found))
            under = states._replace(params=masked(states.params, masks), masks=masks)
            pruned = tested(epoch, under)
            for i, run in enumerate(setting.members):
                tables['pruned'].append(
                    {'seed': run.seed, 'epoch': epoch, 'measure': name,
                     'dense_loss': float(dense[0][i]), 'dense_accuracy': float(dense[1][i]),
                     'loss': float(pruned[0][i]), 'accuracy': float(pruned[1][i])}
                )  # fmt: skip
        return tables

    def tested(epoch: int, states: RunState) -> tuple[np.ndarray, np.ndarray]:
        """Test losses and accuracies; rows are repeated to what the devices take."""
        repeat = np.arange(len(setting.rows.keys)).clip(max=len(setting.members) - 1)
        padded = jax.tree.map(lambda leaf: leaf[repeat], states)
        clock = epoch * setting.program.steps
        return setting.engine.evaluate(clock, setting.rows, setting.engine.unpack(padded))

    return measure_epoch


def at(states: Any, i: int) -> Any:
    """One run of stacked states."""
    return jax.tree.map(lambda leaf: leaf[i], states)


def masked(params: Any, masks: dict[str, np.ndarray]) -> Any:
    """Stacked parameters under stacked masks."""
    return jax.tree.map(np.asarray, jax.vmap(tree.apply_masks)(params, masks))


if __name__ == '__main__':
    sys.exit(main())
