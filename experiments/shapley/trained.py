"""The trained networks of the studies in `shapley` and `taylor`, kept on disk."""

import dataclasses
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import data, problem, tree
from jaxprune.data import Dataset
from jaxprune.files import write_whole
from jaxprune.method import competing
from jaxprune.structure import groups_of
from jaxprune.sweep import SweepSpec, load_spec
from jaxprune.sweep.chunk import rows_of
from jaxprune.sweep.device_data import device_data
from jaxprune.sweep.engine import Engine, make_engine
from jaxprune.sweep.grid import Run, runs
from jaxprune.sweep.load import spec_hash
from jaxprune.sweep.program import Program, make_program
from jaxprune.sweep.strategy import usual
from jaxprune.types import Batch, Groups, Masks, Problem, PyTree, RunState, View

HERE = Path(__file__).parent
#: Name of a specification -> what tables and figures call the network.
TITLES = {'small_vgg': 'small VGG, CIFAR-10', 'lenet5': 'LeNet-5, MNIST'}
#: Examples of a batch of those that scores use.
SCORED_AT_ONCE = 100


class Settings(NamedTuple):
    """Sizes of both studies.

    Attributes:
      sets: replaced values of the specifications, by network.
      examples: how many training examples scores see; multiples of the number of classes.
      tested: how many test images removal curves are measured on.
      permutations: orders of the Shapley values.
      draws: random rankings of a seed, whose losses are averaged.
      step: share of all units between two points of a curve of the whole network.
      shares: of all units, removed before fine-tuning.
      finetune_epochs: length of that.
      finetune_rate: its peak learning rate.
      untrained_width: units of both hidden layers of the untrained network.
      untrained_seeds: how many of them.
    """

    sets: dict[str, tuple[str, ...]]
    examples: tuple[int, ...]
    tested: int
    permutations: int
    draws: int
    step: float
    shares: tuple[float, ...]
    finetune_epochs: int
    finetune_rate: float
    untrained_width: int
    untrained_seeds: int


FULL = Settings(
    sets={'small_vgg': (), 'lenet5': ()},
    examples=(100, 300, 1000),
    tested=1000,
    permutations=5,
    draws=3,
    step=0.05,
    shares=(0.3, 0.5, 0.7),
    finetune_epochs=1,
    finetune_rate=0.01,
    untrained_width=512,
    untrained_seeds=5,
)

_SHORT = (
    'data.train_examples=400',
    'data.test_examples=100',
    'train.epochs=2',
    'train.batch_size=50',
    'grid.seed=[0, 1]',
)
#: Everything once, for a test; its numbers mean nothing.
QUICK = FULL._replace(
    sets={'small_vgg': (*_SHORT, 'model.widths=[3]'), 'lenet5': _SHORT},
    examples=(100, 200),
    tested=50,
    permutations=2,
    draws=2,
    step=0.25,
    shares=(0.5,),
    untrained_width=24,
    untrained_seeds=2,
)


class Net(NamedTuple):
    """A network trained with several seeds.

    Attributes:
      name: of its specification.
      spec: how it was trained.
      seeds: of `params` and `model_state`, in this order.
      problem: network and loss.
      units: what competes.
      params: trained parameters, stacked over seeds.
      model_state: batch statistics, stacked as well.
      dataset: what it was trained on.
    """

    name: str
    spec: SweepSpec
    seeds: tuple[int, ...]
    problem: Problem
    units: Groups
    params: PyTree
    model_state: PyTree
    dataset: Dataset


def spec_of(name: str, settings: Settings) -> SweepSpec:
    """How a network of this folder is trained."""
    return load_spec(HERE / f'{name}.toml', settings.sets[name])


def spec_hashes(settings: Settings) -> tuple[str, ...]:
    """Of both networks: what is measured on them depends on these."""
    return tuple(spec_hash(spec_of(name, settings)) for name in TITLES)


def trained_net(name: str, settings: Settings, nets: Path, data_dir: str | None = None) -> Net:
    """The network of a specification of this folder, trained unless it was before.

    Args:
      nets: folder of the trained parameters.
      data_dir: where prepared TFDS data lie.
    """
    spec = spec_of(name, settings)
    dataset = data.load(spec.data.name, data_dir)
    program, engine, rows = engine_of(spec, runs(spec), dataset)
    like = jax.eval_shape(program.init, jax.random.key(0), program.hyper)
    structure = jax.tree.structure((like.params, like.model_state))
    path = nets / f'{name}_{spec_hash(spec)}.npz'
    if not path.exists():
        states = engine.init(rows)
        states, _ = engine.advance(0, program.timeline.steps, rows, states)
        packed = engine.pack(states)
        count = len(spec.grid.seed)
        leaves = [leaf[:count] for leaf in jax.tree.leaves((packed.params, packed.model_state))]
        _save(path, leaves)
    with np.load(path) as file:
        leaves = [file[f'leaf_{i}'] for i in range(structure.num_leaves)]
    params, model_state = jax.tree.unflatten(structure, leaves)
    units = competing(
        'unit', program.shapes, partial(groups_of, program.problem, program.input_shape)
    )
    seeds = tuple(spec.grid.seed)
    return Net(name, spec, seeds, program.problem, units, params, model_state, dataset)


def engine_of(
    spec: SweepSpec, members: Sequence[Run], dataset: Dataset
) -> tuple[Program, Engine, PyTree]:
    """What trains some runs of a specification: the program, its engine and the rows."""
    devices = jax.local_devices()
    program = make_program(spec, members[0])
    strategy = usual(program.convolves, devices[0].platform, len(devices))
    engine = make_engine(strategy, program, device_data(spec, dataset), devices)
    return program, engine, rows_of(members, len(members), engine)[0]


def _save(path: Path, leaves: Sequence[np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **{f'leaf_{i}': leaf for i, leaf in enumerate(leaves)})
    write_whole(path, buffer.getvalue())


def view_of(net: Net, number: int) -> View:
    """What scores see of the network of a seed."""
    params, model_state = jax.tree.map(lambda leaf: leaf[number], (net.params, net.model_state))
    return problem.view(net.problem, params, model_state)


def scored_on(net: Net, count: int) -> list[Batch]:
    """The first training examples of each class, `count` in all, in batches of 100.

    Every batch has equally many of each class, and fewer examples are the first of more.
    """
    labels = net.dataset.train.labels[: net.spec.data.train_examples or None]
    table = data.class_balanced(labels, net.dataset.classes)
    indices = table[:, : count // net.dataset.classes].T.reshape(-1, min(count, SCORED_AT_ONCE))
    return [_fetched(net, net.dataset.train, at) for at in indices]


def tested_on(net: Net, count: int) -> Batch:
    """The first test images."""
    return _fetched(net, net.dataset.test, np.arange(count))


def _fetched(net: Net, split: data.Split, indices: np.ndarray) -> Batch:
    facts = data.facts(net.spec.data.name)
    chosen = split._replace(images=split.images[indices], labels=split.labels[indices])
    fetch = data.fetcher(facts.mean, facts.std, ())
    return fetch(data.to_device(chosen), None, jnp.arange(len(indices)))


def finetuned(
    net: Net, kept: Sequence[tuple[int, Masks]], settings: Settings
) -> tuple[np.ndarray, np.ndarray]:
    """Test losses and accuracies in % without some units, before and after fine-tuning.

    All networks are trained by one program; those of a seed see the same batches.

    Args:
      kept: number of a trained network, and which of its units are kept, layer -> bool.

    Returns:
      `(networks, 2)` each, loss and accuracy.
    """
    spec = dataclasses.replace(
        net.spec,
        train=dataclasses.replace(
            net.spec.train,
            epochs=settings.finetune_epochs,
            learning_rate=settings.finetune_rate,
        ),
    )
    numbers = np.array([number for number, _ in kept])
    by_seed = {run.seed: run for run in runs(spec)}
    members = [by_seed[net.seeds[number]] for number in numbers]
    program, engine, rows = engine_of(spec, members, net.dataset)
    packed = engine.pack(engine.init(rows))
    repeat = np.arange(len(rows.keys)).clip(max=len(kept) - 1)  # padding repeats the last
    spread = jax.jit(net.units.spread)
    masks = jax.tree.map(
        lambda *leaves: np.stack(leaves), *(jax.device_get(spread(units)) for _, units in kept)
    )
    states = _started(net, packed, numbers[repeat], jax.tree.map(lambda m: m[repeat], masks))
    states = engine.unpack(states)
    before = _evaluated(engine, rows, states, len(kept), 0)
    states, _ = engine.advance(0, program.timeline.steps, rows, states)
    return before, _evaluated(engine, rows, states, len(kept), program.timeline.steps)


def _started(net: Net, packed: RunState, numbers: np.ndarray, masks: Masks) -> RunState:
    """States that begin at trained networks under masks, with a fresh optimizer."""
    params, model_state = jax.tree.map(lambda leaf: leaf[numbers], (net.params, net.model_state))
    params = jax.device_get(jax.vmap(tree.apply_masks)(params, masks))
    return packed._replace(params=params, model_state=model_state, masks=masks)


def _evaluated(engine: Engine, rows: PyTree, states: PyTree, count: int, clock: int) -> np.ndarray:
    losses, accuracies = engine.evaluate(clock, rows, states)
    return np.stack([losses, 100 * accuracies], axis=-1)[:count]
