"""Many runs of one program on the machine at hand: what the driver calls.

Runs are rows of stacked states, sharded over the mesh axis 'run' by one `shard_map`. A second axis,
'batch', shares the examples of each run's batches where a run needs more than one device. How rows
and steps are looped over is the strategy's choice, and changes no number but by rounding.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxprune.rng import run_key
from jaxprune.sweep.advance import AdvanceFn, Rows, Trainer, make_trainer
from jaxprune.sweep.compiled_events import PruneFn, make_prune
from jaxprune.sweep.device_data import DeviceData
from jaxprune.sweep.grid import Run
from jaxprune.sweep.layout import bytes_taken, jitted, mesh_of
from jaxprune.sweep.observe import Recorded, make_observers
from jaxprune.sweep.program import Program, hyper_of
from jaxprune.sweep.slots import make_slots
from jaxprune.sweep.strategy import Strategy
from jaxprune.types import Batch, PyTree


def stacked(runs: Sequence[Run]) -> Rows:
    """The rows of some runs of one program."""
    keys = jnp.stack([run_key(run.seed) for run in runs])
    return Rows(keys, jax.tree.map(lambda *leaves: np.stack(leaves), *map(hyper_of, runs)))


class Engine(NamedTuple):
    """What the driver may ask for; how states are held is the engine's own affair.

    Attributes:
      multiple: the number of rows must be a multiple of this.
      init: `rows -> states`.
      advance: trains from one border to the next, see `AdvanceFn`.
      prune: rounds of a method for some rows, see `PruneFn`.
      rewind: `(rows, states, anchor, hooked=False) -> states`: weights and batch
        statistics of a packed anchor, under today's masks, and fresh optimizers.
      evaluate: `(clock, rows, states, hooked=False) -> (test losses (runs,), accuracies (runs,))`.
      record: `(clock, rows, states, hooked=False) -> () -> Recorded`, see `observe`.
      tests: `() -> Batch` of all test examples as the network sees them, host arrays.
      predict: `(clock, rows, states, hooked=False) -> labels (runs, examples)` of test examples.
      counts: `states -> (kept, active, gone, moved)`: path -> weights (runs,) that the mask keeps,
        and those of them on a path from input to output; family of groups -> bool (runs, groups),
        see `CompactCosts`; figure of `MASK_FIGURES` -> (runs,), where masks move.
      pack: `states -> ` host arrays with a leading run axis, for a checkpoint.
      unpack: the way back.
      bytes_needed: `rows -> ` what a training call takes of one device, data included, as the
        compiler laid it out; 0 where it does not tell.
      traces: how often each compiled function was traced, by name.
    """

    multiple: int
    init: Callable[[Rows], Any]
    advance: AdvanceFn
    prune: PruneFn
    rewind: Callable[..., Any]
    evaluate: Callable[..., tuple[np.ndarray, np.ndarray]]
    record: Callable[..., Callable[[], Recorded]]
    tests: Callable[[], Batch]
    predict: Callable[..., np.ndarray]
    counts: Callable[[Any], tuple[dict[str, np.ndarray], ...]]
    pack: Callable[[Any], PyTree]
    unpack: Callable[[PyTree], Any]
    bytes_needed: Callable[[Rows], int]
    traces: Callable[[], dict[str, int]]


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
    data = jax.device_put(data, NamedSharding(mesh, P()))
    slots = make_slots(strategy, mesh)
    # XLA's convolution is slow inside loops on the CPU, and events always use it.
    apart = program.convolves and mesh.devices.flat[0].platform == 'cpu'
    event_batching = 'unroll' if apart else strategy.batching
    at_once = {'unroll': 1, 'map': 2, 'vmap': 16}[event_batching] * slots.places
    trainer = make_trainer(strategy, program, mesh, data, slots, steps_per_call)
    observers = make_observers(
        strategy, program, mesh, data, slots, trainer, event_batching, at_once
    )
    hosted = apart or strategy.stepping == 'host'
    prune, events = make_prune(program, mesh, data, slots, trainer, event_batching, hosted, at_once)
    init = jitted(program.init, (0, 0), strategy.batching, mesh)
    rewinds = {
        hooked: jitted(stage.rewind, (0, 0, 0), strategy.batching, mesh)
        for hooked, stage in program.stages.items()
    }

    def rewind(rows, states, anchor, hooked=False):
        parts = zip(trainer.by_slot(rows), states, slots.split(anchor), strict=True)
        return [rewinds[hooked](part.hyper, state, earlier) for part, state, earlier in parts]

    def traces():
        named = {'init': init, 'order': trainer.order, **observers.compiled}
        named |= {
            f'steps {length}{" hooked" * hooked}': fn
            for (hooked, length), fn in trainer.steps.items()
        }
        named |= {f'prune {name}': event.once for name, event in events.items()}
        return {name: fn._cache_size() for name, fn in named.items()}

    return Engine(
        multiple=slots.places,
        init=lambda rows: [init(*part) for part in trainer.by_slot(rows)],
        advance=trainer.advance,
        prune=prune,
        rewind=rewind,
        evaluate=observers.evaluate,
        record=observers.record,
        predict=observers.predict,
        tests=observers.tests,
        counts=observers.counts,
        pack=slots.join,
        unpack=slots.split,
        bytes_needed=lambda rows: _bytes_needed(rows, trainer, init, mesh, data),
        traces=traces,
    )


def _bytes_needed(
    rows: Rows, trainer: Trainer, init: Callable, mesh: Mesh, data: DeviceData
) -> int:
    """What the longest training call takes of one device."""
    keys, hyper = trainer.by_slot(rows)[0]
    by_run, start = NamedSharding(mesh, P('run')), np.int32(0)
    state, batches = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=by_run),
        (jax.eval_shape(init, keys, hyper), jax.eval_shape(trainer.order, keys, start)),
    )
    longest = max(length for hooked, length in trainer.steps if not hooked)
    step = trainer.steps[False, longest].lower(start, start, data, keys, hyper, batches, state)
    return bytes_taken(step.compile().memory_analysis())
