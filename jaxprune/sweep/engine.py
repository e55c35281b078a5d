"""Many runs of one program on the machine at hand: the only place that knows jit and meshes.

Two engines with one face. `array_engine` stacks runs along a leading axis, sharded over the
devices by one `shard_map`: each device runs its rows one after another in a loop ('map', fastest
on CPU caches) or batched ('vmap', for accelerators), and scans the steps of an epoch inside the
program. `host_engine` ('host') keeps runs apart and steps them from the host: inside a loop
XLA's CPU convolution is 27 to 40 times slower (jax issue 12868).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxprune import train
from jaxprune.select import kept
from jaxprune.sweep.grid import event_program
from jaxprune.sweep.program import EVAL_BATCH, DeviceData, Program
from jaxprune.types import Hyper, PruneInfo, PyTree


class Rows(NamedTuple):
    """What tells the runs of a chunk apart; stacked along the run axis.

    Attributes:
      keys: typed keys `(runs,)`.
      hyper: leaves `(runs,)`.
    """

    keys: jax.Array
    hyper: Hyper


class Engine(NamedTuple):
    """What the driver may ask for; how states are held is the engine's own affair.

    Attributes:
      multiple: the number of rows must be a multiple of this.
      init: `rows -> states`.
      prune: `(method, rows, at, counts, active, states) -> (states, info)`: all rounds of a method
        for the rows numbered `at`; counts `(len(at), rounds)`; active `(len(at),)`, how many
        active weights are wanted, looked at by methods that target them; info of the last event,
        but `nonfinite` of all rounds and `nonzero` of the first; host arrays `(len(at), ...)`.
      epoch: `(epoch, rows, states) -> (states, mean training losses (runs,))`.
      evaluate: `states -> (test losses (runs,), test accuracies (runs,))`.
      counts: `states -> (kept, active)`, each path -> weights (runs,): those the mask keeps, and
        those of them on a path from input to output.
      pack: `states -> ` host arrays with a leading run axis, for a checkpoint.
      unpack: the way back.
      traces: how often each compiled function was traced, by name.
    """

    multiple: int
    init: Callable[[Rows], Any]
    prune: Callable[..., tuple[Any, PruneInfo]]
    epoch: Callable[[int, Rows, Any], tuple[Any, np.ndarray]]
    evaluate: Callable[[Any], tuple[np.ndarray, np.ndarray]]
    counts: Callable[[Any], tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]
    pack: Callable[[Any], PyTree]
    unpack: Callable[[PyTree], Any]
    traces: Callable[[], dict[str, int]]


def choose_strategy(program: Program, input_shape: tuple[int, ...], platform: str) -> str:
    """'vmap' on accelerators; on CPU 'host' for networks with convolutions, else 'map'."""
    if platform != 'cpu':
        return 'vmap'
    params, model_state = jax.eval_shape(program.problem.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    forward = jax.make_jaxpr(lambda p, s, x: program.problem.apply(p, s, x, train=False, key=None))
    return 'host' if 'conv_general_dilated' in str(forward(params, model_state, x)) else 'map'


def make_engine(
    strategy: str, program: Program, data: DeviceData, devices: Sequence[jax.Device]
) -> Engine:
    """The engine of a strategy; 'host' uses the first device only."""
    if strategy == 'host':
        return host_engine(program, data, devices[0])
    mesh = Mesh(np.array(devices), ('run',), axis_types=(AxisType.Auto,))
    return array_engine(strategy, program, jax.device_put(data, NamedSharding(mesh, P())), mesh)


def over_runs(fn: Callable, axes: Sequence[int | None], strategy: str, mesh: Mesh) -> Callable:
    """A one-run function as a function of stacked runs, sharded over the mesh; not yet jitted.

    Args:
      fn: for one run.
      axes: per argument 0 (has a run axis) or None (shared by all runs).
      strategy: 'vmap' or 'map'.
    """
    if strategy == 'vmap':
        stacked = jax.vmap(fn, in_axes=tuple(axes))
    else:

        def stacked(*args):
            moving = [a for a, axis in zip(args, axes, strict=True) if axis is not None]

            def one(rows):
                rows = iter(rows)
                return fn(
                    *[a if x is None else next(rows) for a, x in zip(args, axes, strict=True)]
                )

            return jax.lax.map(one, moving)

    specs = tuple(P() if axis is None else P('run') for axis in axes)
    return jax.shard_map(stacked, mesh=mesh, in_specs=specs, out_specs=P('run'), check_vma=False)


def eval_indices(examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices `(batches, EVAL_BATCH)` of all test examples, and which of them are no padding."""
    size = min(EVAL_BATCH, examples)
    count = -(-examples // size)
    indices = np.arange(count * size, dtype=np.int32).reshape(count, size)
    return np.minimum(indices, examples - 1), indices < examples


def count_of(program: Program) -> Callable:
    """`state -> (kept, active)` of one run, path -> int32."""
    return lambda state: (kept(state.masks), kept(program.connect(state.masks)))


def segment_of(program: Program) -> Callable:
    """One epoch of one run as a scan: what the array engine compiles."""
    return train.train_segment(program.step)


def array_engine(strategy: str, program: Program, data: DeviceData, mesh: Mesh) -> Engine:
    """Runs stacked along a leading axis; see the module's head."""
    devices = mesh.size
    indices, valid = eval_indices(data.test.labels.shape[0])
    by_run = NamedSharding(mesh, P('run'))

    def program_of(fn, axes, **kwargs):
        # The layout is always spelled out: on one device XLA would return another name for the
        # same layout, and the next call would compile again.
        return jax.jit(over_runs(fn, axes, strategy, mesh), out_shardings=by_run, **kwargs)

    def evaluate_all(data, state):
        def body(total, at):
            sums = program.evaluate(data, state, *at)
            return jax.tree.map(jnp.add, total, sums), None

        zero = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))
        return jax.lax.scan(body, zero, (jnp.asarray(indices), jnp.asarray(valid)))[0]

    def prune_all(method):
        begin, once, last_event = program.prune(method)

        def rounds(data, key, hyper, counts, active, state):
            def body(state, at):
                return once(at[0], data, key, hyper, at[1], state)

            number = jnp.arange(len(next(iter(counts.values()))), dtype=jnp.int32)
            state, infos = jax.lax.scan(body, begin(key, state), (number, counts))
            last = jax.tree.map(lambda leaf: leaf[-1], infos)
            if last_event is not None:
                state = last_event(hyper, state, active)
                last = last._replace(kept=kept(state.masks))
            # What later events carry is not part of a state that all methods share.
            info = last._replace(nonfinite=infos.nonfinite.sum(), nonzero=infos.nonzero[0])
            return state._replace(method_state=()), info

        return program_of(rounds, (None, 0, 0, 0, 0, 0))

    init = program_of(program.init, (0, 0))
    order = program_of(program.order, (0, None))
    segment = program_of(segment_of(program), (None, None, 0, 0, 0, 0), donate_argnums=5)
    evaluation = program_of(evaluate_all, (None, 0))
    counting = program_of(count_of(program), (0,))
    take = jax.jit(lambda tree, at: jax.tree.map(lambda leaf: leaf[at], tree), out_shardings=by_run)
    place = jax.jit(
        lambda tree, at, rows: jax.tree.map(lambda leaf, row: leaf.at[at].set(row), tree, rows),
        donate_argnums=0,
        out_shardings=by_run,
    )
    pruners: dict = {}

    def prune(method, rows, at, counts, active, states):
        name = event_program(method)
        if name not in pruners:
            pruners[name] = prune_all(method)
        # A fixed number of rows at a time: one trace per method whatever the chunk holds.
        size = devices * (2 if strategy == 'map' else 16)
        infos = []
        for first in range(0, len(at), size):
            some = np.arange(first, first + size).clip(max=len(at) - 1)
            chosen = np.asarray(at)[some]
            few = {path: np.asarray(c)[some] for path, c in counts.items()}
            keys, hyper = take(rows, chosen)
            new, info = pruners[name](
                data, keys, hyper, few, np.asarray(active)[some], take(states, chosen)
            )
            states = place(states, chosen, new)
            real = len(at) - first  # the rest repeats the last
            infos.append(jax.tree.map(lambda leaf, real=real: np.asarray(leaf)[:real], info))
        return states, jax.tree.map(lambda *leaves: np.concatenate(leaves), *infos)

    def epoch(number, rows, states):
        batches = order(rows.keys, np.int32(number))
        clock = np.int32(number * program.steps)
        states, losses = segment(clock, data, rows.keys, rows.hyper, batches, states)
        return states, np.asarray(losses)

    def evaluate(states):
        loss, correct = jax.device_get(evaluation(data, states))
        examples = int(valid.sum())
        return loss / examples, correct / examples

    def traces():
        named = {'init': init, 'order': order, 'segment': segment, 'evaluate': evaluation}
        named |= {f'prune {name}': fn for name, fn in pruners.items()}
        return {name: fn._cache_size() for name, fn in named.items()}

    return Engine(
        multiple=devices,
        init=lambda rows: init(*rows),
        prune=prune,
        epoch=epoch,
        evaluate=evaluate,
        counts=lambda states: jax.device_get(counting(states)),
        pack=jax.device_get,
        unpack=lambda stacked: jax.device_put(stacked, by_run),
        traces=traces,
    )


def host_engine(program: Program, data: DeviceData, device: jax.Device) -> Engine:
    """Runs one after another, each step its own call; see the module's head."""
    data = jax.device_put(data, device)
    indices, valid = eval_indices(data.test.labels.shape[0])
    init, order = jax.jit(program.init), jax.jit(program.order)
    step = jax.jit(program.step, donate_argnums=5)
    evaluation = jax.jit(program.evaluate)
    counting = jax.jit(count_of(program))
    pruners: dict = {}

    def stack(each):
        return jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(each))

    def row(rows, i: int):
        # On the data's device from the start: a later move would compile the step again.
        return jax.device_put(jax.tree.map(lambda leaf: leaf[i], rows), device)

    def prune(method, rows, at, counts, active, states):
        name = event_program(method)
        if name not in pruners:
            pruners[name] = tuple(fn and jax.jit(fn) for fn in program.prune(method))
        begin, once, last_event = pruners[name]
        states, infos = list(states), []
        for place, i in enumerate(at):
            key, hyper = row(rows, i)
            state, seen = begin(key, states[i]), []
            for number in range(len(next(iter(counts.values()))[place])):
                now = {path: np.int32(c[place][number]) for path, c in counts.items()}
                state, info = once(np.int32(number), data, key, hyper, now, state)
                seen.append(info)
            if last_event is not None:
                state = last_event(hyper, state, np.int32(active[place]))
                info = info._replace(kept=kept(state.masks))
            states[i] = state._replace(method_state=())
            infos.append(
                info._replace(nonfinite=sum(s.nonfinite for s in seen), nonzero=seen[0].nonzero)
            )
        return states, stack(infos)

    def epoch(number, rows, states):
        states, means = list(states), []
        for i, state in enumerate(states):
            key, hyper = row(rows, i)
            batches, losses = order(key, np.int32(number)), []
            for at in range(program.steps):
                clock = np.int32(number * program.steps + at)
                state, loss = step(clock, data, key, hyper, batches[at], state)
                losses.append(loss)
            states[i] = state
            means.append(np.mean(jax.device_get(losses), dtype=np.float32))
        return states, np.array(means)

    def evaluate(states):
        sums = [
            [evaluation(data, state, *at) for at in zip(indices, valid, strict=True)]
            for state in states
        ]
        totals = np.array(jax.device_get(sums), np.float32).sum(axis=1)  # (runs, 2)
        return totals[:, 0] / valid.sum(), totals[:, 1] / valid.sum()

    def traces():
        named = {'init': init, 'order': order, 'step': step, 'evaluate': evaluation}
        named |= {f'prune {name}': fns[1] for name, fns in pruners.items()}
        return {name: fn._cache_size() for name, fn in named.items()}

    return Engine(
        multiple=1,
        init=lambda rows: [init(*row(rows, i)) for i in range(len(rows.keys))],
        prune=prune,
        epoch=epoch,
        evaluate=evaluate,
        counts=lambda states: stack([counting(state) for state in states]),
        pack=stack,
        unpack=lambda stacked: [row(stacked, i) for i in range(len(jax.tree.leaves(stacked)[0]))],
        traces=traces,
    )
