"""The pure functions of one program: everything its runs do, written for one run, not jitted."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import flax.linen
import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxprune import data, flow, method, nn, optim, problem, structure, train, tree
from jaxprune.rng import stream
from jaxprune.structure import Connect
from jaxprune.sweep.compact_costs import CompactCosts, compact_costs
from jaxprune.sweep.device_data import DeviceData, Examples, examples_of
from jaxprune.sweep.grid import (
    DENSE,
    Run,
    has_lasting_state,
    method_options,
    moves_masks,
    split_options,
)
from jaxprune.sweep.initial_params import starting_from
from jaxprune.sweep.spec import FinetuneSpec, MethodSpec, RecordSpec, SweepSpec, TrainSpec
from jaxprune.sweep.timeline import Timeline, clocks_of, timeline_of
from jaxprune.types import (
    Batch,
    Batches,
    Groups,
    Hyper,
    Key,
    Problem,
    Pruner,
    PyTree,
    RunState,
    StepHook,
    Weights,
)

#: Examples per evaluation batch; any number gives the same sums up to rounding.
EVAL_BATCH = 500


class EventsFn(Protocol):
    def __call__(
        self,
        clock: jax.Array,
        data: DeviceData,
        key: Key,
        hyper: Hyper,
        order: jax.Array | None = None,
    ) -> method.Rounds:
        """The rounds of a method on a run at a time, for `method.run_rounds` over a `RunState`.

        Args:
          clock: where the run's clock stands.
          key: of the run.
          order: the indices of the epoch that the clock stands in, `Program.order`; methods that
            look at the next batch need it, see `MethodFacts`.
        """


class Stage(NamedTuple):
    """What a run does while a method is at work, or while none is.

    Attributes:
      step: `(clock, data, key, hyper, indices, state) -> (state, loss)`, see `train.FetchStepFn`.
      evaluate: `(clock, data, hyper, state, indices, valid) -> (sum of losses, number correct)` on
        the test set.
      predict: `(clock, data, hyper, state, indices) -> labels` of test examples.
      flow: `(clock, data, key, hyper, state) -> quantity -> path -> scalar`, or None if none is
        asked for.
      rewind: `(hyper, state, anchor) -> state`, see `train.rewind`.
    """

    step: train.FetchStepFn
    evaluate: Callable
    predict: Callable
    flow: Callable | None
    rewind: Callable[[Hyper, RunState, RunState], RunState]


class Program(NamedTuple):
    """One-run functions of one group of runs.

    Attributes:
      problem: network and loss.
      input_shape: of one example.
      shapes: path -> shape of each prunable leaf, in forward order.
      connect: masks -> effective masks.
      competing: what competes under a method.
      compact: what networks cost without the groups that masks prune.
      steps: training steps per epoch.
      timeline: when things happen.
      init: `(key, hyper) -> state`.
      order: `(key, epoch) -> indices (steps, batch)`.
      tests: `(data, indices) -> Batch`, test examples as the network sees them.
      stages: whether a method's hook is at work -> what a run does then.
      events: method -> its rounds on a run.
      size: number of prunable weights.
      record: what is recorded along training.
      convolves: has the network convolutions?
      hyper: the numbers of one of its runs, for abstract values.
    """

    problem: Problem
    input_shape: tuple[int, ...]
    shapes: dict[str, tuple[int, ...]]
    connect: Connect
    competing: Callable[[MethodSpec], Groups]
    compact: Callable[[], CompactCosts]
    steps: int
    timeline: Timeline
    init: Callable[[Key, Hyper], RunState]
    order: Callable[[Key, jax.Array], jax.Array]
    tests: Callable[[DeviceData, jax.Array], Batch]
    stages: dict[bool, Stage]
    events: Callable[[MethodSpec], EventsFn]
    size: int
    record: RecordSpec
    convolves: bool
    hyper: Hyper


class _Parts(NamedTuple):
    """What the functions of a program are made of.

    Attributes:
      net: the network with XLA's own convolution: masks do not depend on how training convolves.
      trained: the network as it is trained.
      input_shape: of one example.
      augmented: fetches training batches.
      plain: fetches the same without augmentation.
      batch_of: `(data, key, clock, order) -> Batch` of the next training step, `(1, batch, ...)`;
        `order` is that of the clock's epoch.
      initial: `key -> initial weights`, drawn again rather than carried along.
      clocks: where the clock stands in each round of a method that changes training.
    """

    net: Problem
    trained: Problem
    shapes: dict[str, tuple[int, ...]]
    connect: Connect
    competing: Callable[[MethodSpec], Groups]
    optimizer: optim.Optimizer
    examples: Examples
    input_shape: tuple[int, ...]
    augmented: data.FetchFn
    plain: data.FetchFn
    batch_of: Callable[[DeviceData, Key, jax.Array], Batch]
    initial: Callable[[Key], Weights]
    clocks: tuple[int, ...]


def network(spec: SweepSpec) -> flax.linen.Module:
    """The network that a sweep trains."""
    model = spec.model
    classes = data.facts(spec.data.name).classes
    return nn.build(model.name, classes, layer_widths=model.layer_widths, **model.options)


def make_program(
    spec: SweepSpec, run: Run, convolution: str = 'native', batch_devices: int = 1
) -> Program:
    """The functions that all runs of a group share.

    Args:
      run: any one of them; numbers in it that are traced are not used.
      convolution: how training and evaluation convolve. Scores and paths always see XLA's own, so
        that masks do not depend on it.
      batch_devices: if more than 1, batches are split over the mesh axis 'batch' of that length.
    """
    facts = data.facts(spec.data.name)
    examples = spec.data.train_examples or facts.train_size
    epoch = examples // run.train.batch_size
    module = network(spec)
    net = starting_from(problem.problem_from_flax(module, facts.shape), spec.model)
    convolving = nn.convolving(module, nn.convolution(convolution))
    fetch = data.fetcher(facts.mean, facts.std, spec.data.augment)
    plain_fetch = data.fetcher(facts.mean, facts.std, ())
    if batch_devices > 1:
        fetch, plain_fetch = _divided(fetch), _divided(plain_fetch)
    timeline = timeline_of(run.train, None if run.method == DENSE else run.method, epoch)

    def order(key: Key, number: jax.Array) -> jax.Array:
        return data.epoch_order(stream(key, 'data'), number, examples, run.train.batch_size)

    def batch_of(data_: DeviceData, key: Key, clock: jax.Array, batches: jax.Array) -> Batch:
        indices = jax.lax.dynamic_index_in_dim(batches, clock % epoch, keepdims=False)
        augment = jax.random.fold_in(stream(key, 'augment'), clock)
        return jax.tree.map(lambda leaf: leaf[None], fetch(data_.train, augment, indices))

    shapes = structure.forward_shapes(net, facts.shape)
    read = functools.cache(lambda: structure.groups_of(net, facts.shape))
    parts = _Parts(
        net=net,
        trained=problem.problem_from_flax(convolving, facts.shape),
        shapes=shapes,
        connect=structure.connectivity_of(net, facts.shape),
        competing=_competing(read, shapes),
        optimizer=_optimizer(run, epoch, timeline.train_steps),
        examples=examples_of(spec.prune, facts.classes, plain_fetch),
        input_shape=facts.shape,
        augmented=fetch,
        plain=plain_fetch,
        batch_of=batch_of,
        initial=lambda key: tree.pick(net.init(stream(key, 'init'))[0], net.prunable),
        clocks=clocks_of(timeline),
    )
    return Program(
        problem=net,
        input_shape=facts.shape,
        shapes=parts.shapes,
        connect=parts.connect,
        competing=parts.competing,
        compact=functools.cache(lambda: compact_costs(read, shapes)),
        steps=epoch,
        timeline=timeline,
        init=train.init_run(net, parts.optimizer, traced=moves_masks(run.method)),
        order=order,
        tests=lambda data_, indices: plain_fetch(data_.test, None, indices),
        stages=_stages(parts, spec.record, run.method),
        events=lambda method_spec: _events(parts, method_spec),
        size=sum(math.prod(shape) for shape in parts.shapes.values()),
        record=spec.record,
        convolves=nn.convolves(module),
        hyper=hyper_of(run),
    )


def _optimizer(run: Run, epoch: int, train_steps: int) -> optim.Optimizer:
    """The optimizer of a run, with a phase after pruning if there is one."""
    finetune = run.method.finetune
    phase = None
    if finetune.epochs:
        phase = optim.Finetune(train_steps, _schedule(finetune, epoch))
    flags = split_options(run.train)[1]
    return optim.optimizer(run.train.optimizer, flags, _schedule(run.train, epoch), phase)


def _schedule(phase: TrainSpec | FinetuneSpec, epoch: int) -> Callable[[jax.Array], jax.Array]:
    return optim.rate_schedule(
        phase.schedule,
        phase.epochs * epoch,
        warmup=round(phase.warmup_epochs * epoch),
        milestones=[round(m * epoch) for m in phase.milestones],
        factor=phase.factor,
    )


def _divided(fetch: data.FetchFn) -> data.FetchFn:
    """Fetches batches whose examples are split over the mesh axis 'batch'."""

    def divided(*args):
        return jax.lax.with_sharding_constraint(fetch(*args), P('batch'))

    return divided


def _pruner(parts: _Parts, spec: MethodSpec, hyper: Hyper) -> Pruner:
    """The pruner of a method, its numbers those of a run."""
    groups = parts.competing(spec)
    return method.get_pruner(
        parts.net,
        spec.name,
        allocation=spec.allocation,
        batch_norm=spec.batch_norm or None,
        shapes=parts.shapes,
        floor=method.limits(groups, spec.floor, spec.floor_share)[0],
        cap=spec.cap,
        connect=parts.connect if spec.target == 'effective' else None,
        groups=groups,
        repair=spec.repair,
        repair_gain=spec.repair_gain,
        score_on=spec.score_on,
        events=parts.clocks if method.method(spec.name).hooked else (),
        multiple=spec.multiple,
        cost=method.cost_of(spec.target),
        **method_options(spec)[1],
        **hyper.method,
    )


def _events(parts: _Parts, spec: MethodSpec) -> EventsFn:
    """The rounds of a method on a run."""

    def events(clock, data_: DeviceData, key: Key, hyper: Hyper, order=None) -> method.Rounds:
        pruner = _pruner(parts, spec, hyper)

        def batches_of(number: jax.Array) -> Batches | None:
            if 'data' in pruner.needs:
                return parts.examples.drawn(data_, key, number)
            if 'train_batch' in pruner.needs:
                return parts.batch_of(data_, key, clock, order)
            if 'shape' in pruner.needs:
                shape = jax.numpy.zeros((1, 1, *parts.input_shape))
                return Batch(shape, jax.numpy.zeros((1, 1), jax.numpy.int32))
            return None

        return train.run_events(
            parts.net,
            parts.optimizer,
            pruner,
            stream(key, 'prune'),
            hyper,
            batches_of,
            clock=clock,
            initial=parts.initial(key) if 'initial' in pruner.needs else None,
            restart=spec.restart,
        )

    return events


def _stages(parts: _Parts, record: RecordSpec, spec: MethodSpec) -> dict[bool, Stage]:
    """What a run does without a hook, and with that of its method if it has one."""
    if not has_lasting_state(spec):
        return {False: _stage(parts, record, None, lambda hyper: None)}
    groups = None
    if method.method(spec.name).hooked:

        def groups() -> Groups:
            return parts.competing(spec)

    return {
        False: _stage(parts, record, groups, lambda hyper: None),
        True: _stage(parts, record, groups, lambda hyper: _pruner(parts, spec, hyper)),
    }


def _stage(
    parts: _Parts,
    record: RecordSpec,
    groups: Callable[[], Groups] | None,
    pruner_of: Callable[[Hyper], Pruner | None],
) -> Stage:
    """What a run does in a part of its life.

    Args:
      groups: reads those of a method that changes training.
      pruner_of: the numbers of a run -> the method at work; None where none is.
    """

    def hook_of(hyper: Hyper) -> tuple[StepHook | None, bool]:
        pruner = pruner_of(hyper)
        return (None, False) if pruner is None else (pruner.hook, pruner.dense)

    def step(clock, data_: DeviceData, key: Key, hyper: Hyper, indices, state: RunState):
        hook, dense = hook_of(hyper)
        one = train.train_step(parts.trained, parts.optimizer, hook, dense=dense)
        return train.fetch_step(one, parts.augmented)(
            clock, data_.train, key, hyper, indices, state
        )

    def evaluate(clock, data_: DeviceData, hyper: Hyper, state: RunState, indices, valid):
        sums = train.evaluate_batch(parts.trained, parts.plain, hook_of(hyper)[0])
        return sums(clock, data_.test, state, indices, valid)

    def predict(clock, data_: DeviceData, hyper: Hyper, state: RunState, indices):
        labels = train.predict_batch(parts.trained, parts.plain, hook_of(hyper)[0])
        return labels(clock, data_.test, state, indices)

    watched = [name for name in record.flow if name in method.WATCHED and groups is not None]
    entries = {n: flow.quantity(n) for n in record.flow if n not in method.WATCHED}
    quantities = {name: q.make(parts.trained, tuple(parts.shapes)) for name, q in entries.items()}
    needs_data = any(entry.needs_data for entry in entries.values())
    needs_initial = any(entry.needs_initial for entry in entries.values())

    def flows(clock, data_: DeviceData, key: Key, hyper: Hyper, state: RunState):
        rows = parts.examples.first(data_) if needs_data else None
        view = train.hooked_view(parts.trained, state, hook_of(hyper)[0], clock)
        if needs_initial:
            view = view._replace(initial=parts.initial(key))
        noise = stream(key, 'dropout')
        found = {name: measure(noise, view, rows) for name, measure in quantities.items()}
        if watched:
            seen = method.watched(groups(), pruner_of(hyper), state)
            found |= {name: seen[name] for name in watched if name in seen}
        return found

    def rewind(hyper: Hyper, state: RunState, anchor: RunState) -> RunState:
        return train.rewind(parts.optimizer, dense=hook_of(hyper)[1])(hyper, state, anchor)

    return Stage(step, evaluate, predict, flows if quantities or watched else None, rewind)


class MethodFacts(NamedTuple):
    """What is known of a method before it runs.

    Attributes:
      state: the abstract state that it carries from its first round to its last.
      finishes: does something happen after its last round?
      looks_ahead: does a round look at the batch of the next step?
    """

    state: PyTree
    finishes: bool
    looks_ahead: bool


def method_facts(program: Program, spec: MethodSpec) -> MethodFacts:
    """Traces the beginning of a method on a run, without computing anything."""
    numbers = dict.fromkeys(method_options(spec)[0], np.float32(1))
    finishes: list[bool] = []

    def begun(key: Key, hyper: Hyper) -> PyTree:
        rounds = program.events(spec)(np.int32(0), None, key, hyper)
        finishes.append(rounds.finish is not None)
        return rounds.begin(program.init(key, hyper)).method_state

    state = jax.eval_shape(begun, jax.random.key(0), program.hyper._replace(method=numbers))
    needs = method.method(spec.name).needs
    looks_ahead = 'train_batch' in needs or spec.score_on == 'train_batch'
    return MethodFacts(state, finishes[0], looks_ahead)


def _competing(
    read: Callable[[], structure.Coupled], shapes: Mapping[str, tuple[int, ...]]
) -> Callable[[MethodSpec], Groups]:
    """What competes under a method; the network is read if that needs it."""

    @functools.cache
    def made(granularity: str, keep_all_units: str) -> Groups:
        return method.competing(granularity, shapes, read, keep_all_units)

    return lambda spec: made(spec.granularity, spec.keep_all_units)


def hyper_of(run: Run) -> Hyper:
    """A run's traced numbers, as its training program takes them.

    Those of a method are among them only if it changes training: all others share one program.
    """

    def traced(numbers: Mapping[str, float]) -> dict[str, np.float32]:
        return {name: np.float32(value) for name, value in sorted(numbers.items())}

    finetune = run.method.finetune
    return Hyper(
        np.float32(run.train.learning_rate),
        np.float32(run.train.weight_decay),
        traced(split_options(run.train)[0]),
        traced(method_options(run.method)[0] if has_lasting_state(run.method) else {}),
        traced({'learning_rate': finetune.learning_rate} if finetune.epochs else {}),
    )


def method_numbers(run: Run) -> dict[str, np.float32]:
    """The traced numbers of a run's method, `Hyper.method` of its events."""
    return {name: np.float32(v) for name, v in sorted(method_options(run.method)[0].items())}
