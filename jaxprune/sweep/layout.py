"""A program laid out over many runs and devices: vmap, map or unroll; scan or host; a mesh.

The only place where programs of one run become programs of many.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxprune.sweep.device_data import DeviceData
from jaxprune.sweep.strategy import Strategy
from jaxprune.train import FetchStepFn, train_segment
from jaxprune.types import Hyper, Key, RunState


def over_runs(fn: Callable, axes: Sequence[int | None], batching: str, mesh: Mesh) -> Callable:
    """A one-run function as a function of stacked runs, sharded over the mesh; not yet jitted.

    Args:
      fn: for one run.
      axes: per argument 0 (has a run axis) or None (shared by all runs).
      batching: see `Strategy`; with 'unroll' the run axis is as long as the mesh's.
    """

    def rows_apart(args):
        moving = [a for a, axis in zip(args, axes, strict=True) if axis is not None]

        def one(rows):
            rows = iter(rows)
            return fn(*[a if x is None else next(rows) for a, x in zip(args, axes, strict=True)])

        return one, moving

    def stacked(*args):
        if batching == 'vmap':
            return jax.vmap(fn, in_axes=tuple(axes))(*args)
        one, moving = rows_apart(args)
        if batching == 'map':
            return jax.lax.map(one, moving)
        out = one(jax.tree.map(lambda leaf: leaf[0], moving))
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], out)

    specs = tuple(P() if axis is None else P('run') for axis in axes)
    # Along 'batch' the compiler divides the work; along 'run' there is nothing to divide.
    manual = set(mesh.axis_names) if mesh.shape['batch'] == 1 else {'run'}
    return jax.shard_map(
        stacked,
        mesh=mesh,
        in_specs=specs,
        out_specs=P('run'),
        axis_names=manual,
        check_vma=False,
    )


class StepsFn(Protocol):
    def __call__(
        self,
        clock: jax.Array,
        start: jax.Array,
        data: DeviceData,
        key: Key,
        hyper: Hyper,
        order: jax.Array,
        state: RunState,
    ) -> tuple[RunState, jax.Array]:
        """Some steps of one run, from step `start` of its epoch on: `(state, losses (steps,))`.

        Args:
          clock: where the clock stands before the epoch.
          order: the indices of the whole epoch.
        """


def steps_of(step: FetchStepFn, length: int, stepping: str) -> StepsFn:
    """So many steps of one run: for stepping 'scan' as a scan, for 'host' a single one."""
    segment = train_segment(step)

    def some(clock, start, data, key, hyper, order, state):
        if stepping == 'host':
            indices = jax.lax.dynamic_index_in_dim(order, start, keepdims=False)
            state, loss = step(clock + start, data, key, hyper, indices, state)
            return state, loss[None]
        part = jax.lax.dynamic_slice_in_dim(order, start, length)
        return segment(clock + start, data, key, hyper, part, state)

    return some


#: Most lengths of calls that are compiled for a program.
MOST_LENGTHS = 3


def call_lengths(intervals: Collection[int], most: int) -> tuple[int, ...]:
    """Lengths of calls that make up intervals of steps: few lengths, as each is compiled.

    Args:
      intervals: the numbers of steps that are to be taken between two stops.
      most: most steps of a call.

    Returns:
      At most `MOST_LENGTHS` lengths, the longest first; the last is 1 where rests need it.
    """
    wanted = {_even(n, most) for n in intervals}
    rests = {n % _even(n, most) for n in intervals} - {0}
    exact = sorted(wanted | rests, reverse=True)
    if len(exact) <= MOST_LENGTHS:
        return tuple(exact)
    # The longest, 1, and what between them makes the fewest calls.
    longest = exact[0]

    def count(middle: int) -> int:
        return sum(len(calls_of(n, (longest, middle, 1))) for n in intervals)

    return longest, min(range(2, max(longest, 3)), key=count), 1


def _even(steps: int, most: int) -> int:
    """The length of the calls for so many steps: one that divides them evenly, if it is near."""
    calls = range(-(-steps // most), -(-2 * steps // most))
    return next((steps // n for n in calls if steps % n == 0), min(most, steps))


def calls_of(steps: int, lengths: Sequence[int]) -> list[int]:
    """The lengths of the calls that take so many steps.

    Raises:
      ValueError: the lengths cannot make up the steps.
    """
    made, left = [], steps
    for length in sorted(lengths, reverse=True):
        made += [length] * (left // length)
        left %= length
    evenly = [[n] * (steps // n) for n in lengths if steps % n == 0]
    possible = [*evenly, *([] if left else [made])]
    if not possible:
        raise ValueError(f'{steps} steps cannot be made of calls of {list(lengths)}')
    return min(possible, key=len)


def mesh_of(strategy: Strategy, devices: Sequence[jax.Device]) -> Mesh:
    """The devices of a strategy, `(places for runs, devices per run)`."""
    grid = np.array(devices[: strategy.devices]).reshape(-1, strategy.batch_devices)
    return Mesh(grid, ('run', 'batch'), axis_types=(AxisType.Auto,) * 2)


def jitted(
    fn: Callable, axes: Sequence[int | None], batching: str, mesh: Mesh, **kwargs: Any
) -> Callable:
    """`over_runs`, compiled.

    The layout is always spelled out: on one device XLA would return another name for the same
    layout, and the next call would compile again.
    """
    layout = NamedSharding(mesh, P('run'))
    return jax.jit(over_runs(fn, axes, batching, mesh), out_shardings=layout, **kwargs)


def training(strategy: Strategy, step: FetchStepFn, mesh: Mesh, length: int) -> Callable:
    """`steps_of` over stacked runs, compiled; the states are donated."""
    axes = (None, None, None, 0, 0, 0, 0)
    steps = steps_of(step, length, strategy.stepping)
    return jitted(steps, axes, strategy.batching, mesh, donate_argnums=6)


def on_host(tree: Any) -> Any:
    """Host arrays of what lies on the devices; every process of several gets all of it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    def whole(leaf: Any) -> Any:
        spread = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        return multihost_utils.process_allgather(leaf, tiled=True) if spread else leaf

    return jax.device_get(jax.tree.map(whole, tree))


def bytes_taken(memory: Any) -> int:
    """What a compiled program takes of one device at its peak; 0 where the compiler is silent."""
    if memory is None:
        return 0
    whole = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return max(whole + memory.temp_size_in_bytes - memory.alias_size_in_bytes, 0)
