"""The pure functions of one program: everything its runs do, written for one run, not jitted."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxprune import data, flow, method, nn, optim, problem, structure, train, tree
from jaxprune.data import Dataset, DeviceSplit
from jaxprune.errors import SpecError
from jaxprune.rng import stream
from jaxprune.structure import Connect
from jaxprune.sweep.grid import Run, split_options
from jaxprune.sweep.spec import MethodSpec, RecordSpec, SweepSpec, TrainSpec
from jaxprune.types import Batch, Counts, Hyper, Key, Problem, PruneInfo, RunState, Weights

#: Examples per evaluation batch; any number gives the same sums up to rounding.
EVAL_BATCH = 500


class DeviceData(NamedTuple):
    """What lives on the device once, shared by all runs.

    Attributes:
      train: the training split.
      test: the test split.
      by_class: int32 `(classes, n)`, indices of training examples of each class.
    """

    train: DeviceSplit
    test: DeviceSplit
    by_class: jax.Array


class Events(NamedTuple):
    """The pruning events of a method.

    Attributes:
      begin: `(key, state) -> state`, before the first round.
      once: `(round, data, key, hyper, counts, state) -> (state, info)`.
      last: `(hyper, state, active) -> state` after the last round, for runs that target effective
        compression; else None.
    """

    begin: Callable[[Key, RunState], RunState]
    once: Callable[..., tuple[RunState, PruneInfo]]
    last: Callable[..., RunState] | None


class Program(NamedTuple):
    """One-run functions of one group of runs.

    Attributes:
      problem: network and loss.
      shapes: path -> shape of each prunable leaf, in forward order.
      connect: masks -> effective masks.
      steps: training steps per epoch.
      init: `(key, hyper) -> state`.
      order: `(key, epoch) -> indices (steps, batch)`.
      step: `(clock, data, key, hyper, indices, state) -> (state, loss)`.
      evaluate: `(data, state, indices, valid) -> (sum of losses, number correct)` on the test set.
      prune: method -> `Events`.
      size: number of prunable weights.
      record: what is recorded along training.
      flow: `(data, key, state) -> quantity -> path -> scalar`, or None if none is asked for.
      convolves: has the network convolutions?
    """

    problem: Problem
    shapes: dict[str, tuple[int, ...]]
    connect: Connect
    steps: int
    init: Callable[[Key, Hyper], RunState]
    order: Callable[[Key, jax.Array], jax.Array]
    step: Callable
    evaluate: Callable
    prune: Callable[[MethodSpec], Events]
    size: int
    record: RecordSpec
    flow: Callable | None
    convolves: bool


def make_program(
    spec: SweepSpec, settings: TrainSpec, convolution: str = 'native', batch_devices: int = 1
) -> Program:
    """The functions that all runs with these static settings share.

    Args:
      settings: any one run's training settings; numbers in it that are traced are not used.
      convolution: how training and evaluation convolve. Scores and paths always see XLA's own, so
        that masks do not depend on it.
      batch_devices: if more than 1, batches are split over the mesh axis 'batch' of that length.
    """
    facts = data.facts(spec.data.name)
    examples = spec.data.train_examples or facts.train_size
    steps = examples // settings.batch_size
    module = nn.build(spec.model.name, facts.classes, **spec.model.options)
    net = problem.problem_from_flax(module, facts.shape)
    trained = problem.problem_from_flax(
        nn.convolving(module, nn.convolution(convolution)), facts.shape
    )
    shapes = structure.forward_shapes(net, facts.shape)
    connect = structure.connectivity_of(net, facts.shape)
    optimizer = optim.optimizer(
        settings.optimizer,
        split_options(settings)[1],
        optim.rate_schedule(
            settings.schedule,
            steps * settings.epochs,
            warmup=round(settings.warmup_epochs * steps),
            milestones=[round(m * steps) for m in settings.milestones],
            factor=settings.factor,
        ),
    )
    fetch = data.fetcher(facts.mean, facts.std, spec.data.augment)
    plain_fetch = data.fetcher(facts.mean, facts.std, ())
    if batch_devices > 1:
        fetch, plain_fetch = _divided(fetch), _divided(plain_fetch)
    step = train.fetch_step(train.train_step(trained, optimizer), fetch)
    evaluate = train.evaluate_batch(trained, plain_fetch)

    def order(key: Key, epoch: jax.Array) -> jax.Array:
        return data.epoch_order(stream(key, 'data'), epoch, examples, settings.batch_size)

    def initial_weights(key: Key) -> Weights:  # drawn again rather than carried along
        return tree.pick(net.init(stream(key, 'init'))[0], net.prunable)

    per_class, several = spec.prune.samples_per_class, spec.prune.batches

    def fetched(data_: DeviceData, indices: jax.Array) -> Batch:
        rows = [plain_fetch(data_.train, None, at) for at in indices]
        return jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *rows)

    def score_batches(data_: DeviceData, key: Key, at: jax.Array) -> Batch:
        # Fresh data in every round, the same for all methods of a seed.
        draw = jax.random.fold_in(stream(key, 'score'), at)
        return fetched(data_, data.balanced_indices(draw, data_.by_class, per_class, several))

    def prune(spec_: MethodSpec):
        pruner = method.get_pruner(
            net,
            spec_.name,
            allocation=spec_.allocation,
            train=spec_.batch_norm == 'train',
            shapes=shapes,
            floor=competing(shapes, spec_)[1],
            cap=spec_.cap,
            connect=connect if spec_.target == 'effective' or spec_.granularity == 'unit' else None,
            granularity=spec_.granularity,
            keep_all_units=spec_.keep_all_units,
            **spec_.options,
        )
        event = train.event(net, optimizer, pruner, restart=spec_.restart)
        begin = train.first_event(net, pruner)

        def once(
            at, data_: DeviceData, key: Key, hyper: Hyper, counts: Counts, state: RunState
        ) -> tuple[RunState, PruneInfo]:
            draw = jax.random.fold_in(stream(key, 'prune'), at)
            if 'data' in pruner.needs:
                batches = score_batches(data_, key, at)
            elif 'shape' in pruner.needs:
                shape = jax.numpy.zeros((1, 1, *facts.shape))
                batches = Batch(shape, jax.numpy.zeros((1, 1), jax.numpy.int32))
            else:
                batches = None
            initial = initial_weights(key) if 'initial' in pruner.needs else None
            return event(draw, hyper, state, counts, batches, initial)

        last = pruner.final_masks and train.last_event(net, optimizer, pruner)
        return Events(begin, once, last)

    entries = {name: flow.quantity(name) for name in spec.record.flow}
    quantities = {name: entry.make(trained, tuple(shapes)) for name, entry in entries.items()}
    look = any(entry.needs_data for entry in entries.values())
    compare = any(entry.needs_initial for entry in entries.values())

    def flows(data_: DeviceData, key: Key, state: RunState):
        rows = None
        if look:  # at the first examples of each class: the same at every step and for every run
            first = data_.by_class[:, : per_class * several]
            first = first.reshape(facts.classes, several, per_class).swapaxes(0, 1)
            rows = fetched(data_, first.reshape(several, -1))
        view, noise = problem.view_of(trained, state), stream(key, 'dropout')
        if compare:
            view = view._replace(initial=initial_weights(key))
        return {name: measure(noise, view, rows) for name, measure in quantities.items()}

    return Program(
        problem=net,
        shapes=shapes,
        connect=connect,
        steps=steps,
        init=train.init_run(net, optimizer),
        order=order,
        step=lambda clock, data_, *rest: step(clock, data_.train, *rest),
        evaluate=lambda data_, *rest: evaluate(data_.test, *rest),
        prune=prune,
        size=sum(math.prod(shape) for shape in shapes.values()),
        record=spec.record,
        flow=flows if quantities else None,
        convolves=nn.convolves(module),
    )


def _divided(fetch: data.FetchFn) -> data.FetchFn:
    """Fetches batches whose examples are split over the mesh axis 'batch'."""

    def divided(*args):
        return jax.lax.with_sharding_constraint(fetch(*args), P('batch'))

    return divided


def competing(
    shapes: Mapping[str, tuple[int, ...]], spec: MethodSpec
) -> tuple[Mapping[str, tuple[int, ...]], int | dict[str, int]]:
    """What a method counts, and the fewest that a layer keeps: weights, or units of some layers."""
    if spec.granularity == 'weight':
        return shapes, spec.floor
    units = method.unit_shapes(shapes, spec.keep_all_units)
    return units, method.unit_floor(units, spec.floor, spec.floor_share)


def hyper_of(run: Run) -> Hyper:
    """A run's traced numbers."""
    numbers, _ = split_options(run.train)
    return Hyper(
        np.float32(run.train.learning_rate),
        np.float32(run.train.weight_decay),
        {name: np.float32(value) for name, value in sorted(numbers.items())},
    )


def device_data(spec: SweepSpec, dataset: Dataset) -> DeviceData:
    """The data set as device arrays, cut to the sizes the specification asks for.

    Raises:
      SpecError: a class has too few examples to score on.
    """

    def first(split, count):
        return split._replace(
            images=split.images[: count or None], labels=split.labels[: count or None]
        )

    training = first(dataset.train, spec.data.train_examples)
    by_class = np.zeros((dataset.classes, 0), np.int32)
    if scores_need_data(spec):
        smallest = np.bincount(training.labels, minlength=dataset.classes).min()
        wanted = spec.prune.samples_per_class * spec.prune.batches
        if wanted > smallest:
            raise SpecError(
                f'prune.samples_per_class: {wanted} of each class are more than the {smallest} '
                f'that the smallest class has among {len(training.labels)} training examples'
            )
        by_class = data.class_balanced(training.labels, dataset.classes)
    return DeviceData(
        train=data.to_device(training),
        test=data.to_device(first(dataset.test, spec.data.test_examples)),
        by_class=jax.numpy.asarray(by_class),
    )


def scores_need_data(spec: SweepSpec) -> bool:
    """Does a method or a recorded quantity of the sweep look at class-balanced examples?"""
    scores = any('data' in method.method(m.name).needs for m in spec.grid.method)
    return scores or any(flow.quantity(name).needs_data for name in spec.record.flow)
