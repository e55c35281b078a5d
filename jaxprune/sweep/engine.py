"""Many runs of one program on the machine at hand: what the driver calls.

Runs are rows of stacked states, sharded over the mesh axis 'run' by one `shard_map`. A second axis,
'batch', shares the examples of each run's batches where a run needs more than one device. A slot is
what one call of the compiled program trains: all rows of a chunk, or a row per place on the run
axis where runs are unrolled. How a slot's rows and steps are looped over is the strategy's choice,
and changes no number but by rounding.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxprune.rng import run_key
from jaxprune.select import count_kept
from jaxprune.sweep.events import compiled_events
from jaxprune.sweep.grid import Run, event_program
from jaxprune.sweep.layout import bytes_taken, jitted, mesh_of, pieces, training
from jaxprune.sweep.program import EVAL_BATCH, DeviceData, Program, hyper_of
from jaxprune.sweep.strategy import Strategy
from jaxprune.types import Hyper, PruneInfo, PyTree

#: Seconds between two looks at how far the device is; each waits for a call that is over or nearly.
_LOOK = 0.5


class Rows(NamedTuple):
    """What tells the runs of a chunk apart; stacked along the run axis.

    Attributes:
      keys: typed keys `(runs,)`.
      hyper: leaves `(runs,)`.
    """

    keys: jax.Array
    hyper: Hyper


def stacked(runs: Sequence[Run]) -> Rows:
    """The rows of so many runs."""
    keys = jnp.stack([run_key(run.seed) for run in runs])
    return Rows(keys, jax.tree.map(lambda *leaves: np.stack(leaves), *map(hyper_of, runs)))


class Seen(NamedTuple):
    """What was recorded along training.

    Attributes:
      step: steps taken before, of all training.
      test: test losses and accuracies, each `(runs,)`, or None where they are not asked for.
      flow: quantity -> path -> values `(runs,)`.
    """

    step: int
    test: tuple[np.ndarray, np.ndarray] | None
    flow: dict[str, dict[str, np.ndarray]]


class Trained(NamedTuple):
    """An epoch.

    Attributes:
      states: after it.
      losses: training losses `(runs, steps)`.
      seen: what was recorded along it, in order.
    """

    states: Any
    losses: np.ndarray
    seen: list[Seen]


class Engine(NamedTuple):
    """What the driver may ask for; how states are held is the engine's own affair.

    Attributes:
      multiple: the number of rows must be a multiple of this.
      init: `rows -> states`.
      prune: `(method, rows, at, counts, active, states, before=0) -> (states, info)`: rounds of a
        method, after so many others, for the rows numbered `at`, rising; counts
        `(len(at), rounds)`; active `(len(at),)`, how many active weights are wanted, looked at by
        methods that target them; info of the last event, but `nonfinite` of all rounds and
        `nonzero` of the first; host arrays `(len(at), ...)`.
      epoch: `(epoch, rows, states, told) -> Trained`; the states handed in are used up. `told` is
        called now and then with the steps x runs done since.
      evaluate: `states -> (test losses (runs,), test accuracies (runs,))`.
      counts: `states -> (kept, active)`, each path -> weights (runs,): those the mask keeps, and
        those of them on a path from input to output.
      pack: `states -> ` host arrays with a leading run axis, for a checkpoint.
      unpack: the way back.
      bytes_needed: `rows -> ` what a training call takes of one device, data included, as the
        compiler laid it out; 0 where it does not tell.
      traces: how often each compiled function was traced, by name.
    """

    multiple: int
    init: Callable[[Rows], Any]
    prune: Callable[..., tuple[Any, PruneInfo]]
    epoch: Callable[..., Trained]
    evaluate: Callable[[Any], tuple[np.ndarray, np.ndarray]]
    counts: Callable[[Any], tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]
    pack: Callable[[Any], PyTree]
    unpack: Callable[[PyTree], Any]
    bytes_needed: Callable[[Rows], int]
    traces: Callable[[], dict[str, int]]


def eval_indices(examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices `(batches, EVAL_BATCH)` of all test examples, and which of them are no padding."""
    size = min(EVAL_BATCH, examples)
    count = -(-examples // size)
    indices = np.arange(count * size, dtype=np.int32).reshape(count, size)
    return np.minimum(indices, examples - 1), indices < examples


def make_engine(
    strategy: Strategy,
    program: Program,
    data: DeviceData,
    devices: Sequence[jax.Device],
    steps_per_call: int = 0,
) -> Engine:
    """The engine of a strategy.

    Args:
      strategy: takes the first `strategy.devices` of the devices.
      data: the data set; placed on all of them, once.
      steps_per_call: most steps that 'scan' takes in one call; 0 for all of an epoch.
    """
    mesh = mesh_of(strategy, devices)
    places = mesh.shape['run']
    by_run = NamedSharding(mesh, P('run'))
    data = jax.device_put(data, NamedSharding(mesh, P()))
    indices, valid = eval_indices(data.test.labels.shape[0])
    hosted = strategy.stepping == 'host'
    # XLA's convolution is slow inside loops on the CPU, and events always use it.
    apart = program.convolves and mesh.devices.flat[0].platform == 'cpu'
    event_batching = 'unroll' if apart else strategy.batching
    most_at_once = {'unroll': 1, 'map': 2, 'vmap': 16}[event_batching] * places
    length = 1 if hosted else min(steps_per_call or program.steps, program.steps)
    watching = program.record.evaluate or program.flow is not None
    every = program.record.every if watching else 0
    calls = pieces(program.steps, length, every)
    ends = [start + n for start, n in calls]
    marks = [end for end in ends if every and (end % every == 0 or end == program.steps)]

    def program_of(fn, axes, batching=strategy.batching):
        return jitted(fn, axes, batching, mesh)

    init = program_of(program.init, (0, 0))
    order = program_of(program.order, (0, None))
    steps = {n: training(strategy, program, mesh, n) for _, n in calls}
    evaluation = program_of(
        program.evaluate if hosted else _evaluate_all(program, indices, valid),
        (None, 0, None, None) if hosted else (None, 0),
    )
    flow = program.flow and program_of(program.flow, (None, 0, 0))
    counting = program_of(
        lambda masks: (count_kept(masks), count_kept(program.connect(masks))), (0,), event_batching
    )
    take = jax.jit(lambda tree, at: jax.tree.map(lambda leaf: leaf[at], tree), out_shardings=by_run)
    place = jax.jit(
        lambda tree, at, rows: jax.tree.map(lambda leaf, row: leaf.at[at].set(row), tree, rows),
        donate_argnums=0,
        out_shardings=by_run,
    )
    pruners: dict = {}

    def slots(runs: int) -> list[range]:
        size = places if strategy.batching == 'unroll' else runs
        return [range(first, first + size) for first in range(0, runs, size)]

    def by_slot(rows: Rows) -> list[Rows]:
        return [take(rows, np.array(slot)) for slot in slots(len(rows.keys))]

    def few(at: Sequence[int], runs: int) -> list[tuple[np.ndarray, int]]:
        """So many rows as an event program takes, the last repeated, and how many are real."""
        at_once = min(most_at_once, runs)
        parts = [np.asarray(at[first : first + at_once]) for first in range(0, len(at), at_once)]
        return [(_filled(p, at_once), len(p)) for p in parts]

    def prune(method, rows, at, counts, active, states, before=0):
        name = event_program(method)
        if name not in pruners:
            pruners[name] = compiled_events(
                program, method, program_of, event_batching, apart or hosted
            )
        states, infos, at = list(states), [], np.asarray(at)
        for number, slot in enumerate(slots(len(rows.keys))):
            inside = np.flatnonzero((at >= slot.start) & (at < slot.stop))
            for chosen, real in few(inside, len(rows.keys)):
                where = at[chosen]
                new, info = pruners[name].run(
                    np.int32(before),
                    data,
                    *take(rows, where),
                    {path: np.asarray(c)[chosen] for path, c in counts.items()},
                    np.asarray(active)[chosen],
                    take(states[number], where - slot.start),
                )
                states[number] = place(states[number], where - slot.start, new)
                infos.append(jax.tree.map(lambda leaf, real=real: np.asarray(leaf)[:real], info))
        return states, jax.tree.map(lambda *leaves: np.concatenate(leaves), *infos)

    def epoch(number, rows, states, told=lambda steps: None):
        clock, states = np.int32(number * program.steps), list(states)
        losses, watched = [], []
        looked, before = time.perf_counter(), 0
        for slot, (keys, hyper) in enumerate(by_slot(rows)):
            batches = order(keys, np.int32(number))
            losses.append([])
            watched.append([])
            for start, n in calls:
                states[slot], loss = steps[n](
                    clock, np.int32(start), data, keys, hyper, batches, states[slot]
                )
                losses[slot].append(loss)
                if start + n in marks:
                    watched[slot].append(watch(keys, states[slot]))
                if len(losses[slot]) > 1 and time.perf_counter() - looked > _LOOK:
                    # The call before this one: the device has work while we look.
                    jax.block_until_ready(losses[slot][-2])
                    told(start * len(keys) - before)
                    looked, before = time.perf_counter(), start * len(keys)
            told(program.steps * len(keys) - before)
            before = 0
        whole = [np.concatenate(found, axis=1) for found in jax.device_get(losses)]
        seen = [
            Seen(int(clock) + step, tested(tests) if program.record.evaluate else None, flows)
            for step, (tests, flows) in zip(marks, _by_border(watched), strict=True)
        ]
        return Trained(states, np.concatenate(whole), seen)

    def watch(keys, state):
        """What is recorded of a slot, still on the device."""
        tests = testing(state) if program.record.evaluate else None
        return tests, flow(data, keys, state) if flow else {}

    def testing(state):
        """Sums over the test set of a slot, still on the device."""
        if hosted:
            return [evaluation(data, state, *at) for at in zip(indices, valid, strict=True)]
        return [evaluation(data, state)]

    def tested(sums):
        """Test losses and accuracies from the sums of all slots."""
        found = [np.array(of_slot, np.float32).sum(0) for of_slot in jax.device_get(sums)]
        loss, correct = np.concatenate(found, axis=1)
        return loss / valid.sum(), correct / valid.sum()

    def counts(states):
        found = []
        for masks in (state.masks for state in states):
            if event_batching == strategy.batching:
                found.append(jax.device_get(counting(masks)))
                continue
            runs = len(jax.tree.leaves(masks)[0])
            for chosen, real in few(range(runs), runs):
                each = jax.device_get(counting(take(masks, chosen)))
                found.append(jax.tree.map(lambda leaf, real=real: leaf[:real], each))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)

    def unpack(stacked):
        runs = len(jax.tree.leaves(stacked)[0])
        return [
            jax.device_put(jax.tree.map(lambda leaf, s=s: leaf[s.start : s.stop], stacked), by_run)
            for s in slots(runs)
        ]

    def bytes_needed(rows):
        keys, hyper = by_slot(rows)[0]
        start, (_, length) = np.int32(0), calls[0]
        state, batches = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=by_run),
            (jax.eval_shape(init, keys, hyper), jax.eval_shape(order, keys, start)),
        )
        step = steps[length].lower(start, start, data, keys, hyper, batches, state)
        return bytes_taken(step.compile().memory_analysis())

    def traces():
        named = {'init': init, 'order': order, 'evaluate': evaluation, 'counts': counting}
        named |= {f'steps {n}': fn for n, fn in steps.items()}
        named |= {f'prune {name}': events.once for name, events in pruners.items()}
        return {name: fn._cache_size() for name, fn in named.items()}

    return Engine(
        multiple=places,
        init=lambda rows: [init(*part) for part in by_slot(rows)],
        prune=prune,
        epoch=epoch,
        evaluate=lambda states: tested([testing(state) for state in states]),
        counts=counts,
        pack=lambda states: jax.tree.map(
            lambda *leaves: np.concatenate(leaves), *jax.device_get(states)
        ),
        unpack=unpack,
        bytes_needed=bytes_needed,
        traces=traces,
    )


def _filled(rows: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows))])


def _by_border(watched: Sequence[Sequence[tuple]]) -> list[tuple]:
    """What was seen slot by slot, as one entry per border: tests per slot, flow of all runs."""
    return [
        (
            [tests for tests, _ in slots],
            jax.tree.map(
                lambda *leaves: np.concatenate(leaves), *jax.device_get([f for _, f in slots])
            ),
        )
        for slots in zip(*watched, strict=True)
    ]


def _evaluate_all(program: Program, indices: np.ndarray, valid: np.ndarray) -> Callable:
    """`(data, state) -> (sum of losses, number correct)` over all test batches."""

    def evaluate_all(data, state):
        def body(total, at):
            return jax.tree.map(jnp.add, total, program.evaluate(data, state, *at)), None

        zero = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))
        return jax.lax.scan(body, zero, (jnp.asarray(indices), jnp.asarray(valid)))[0]

    return evaluate_all
