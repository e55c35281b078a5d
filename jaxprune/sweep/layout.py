"""A program laid out over many runs and devices: vmap, map or unroll; scan or host; a mesh.

The only place where programs of one run become programs of many.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxprune import train
from jaxprune.sweep.program import Program
from jaxprune.sweep.strategy import Strategy


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


def segment_of(program: Program) -> Callable:
    """The steps of `order` of one run as a scan: what is compiled for stepping 'scan'."""
    return train.train_segment(program.step)


def steps_of(program: Program, length: int, stepping: str) -> Callable:
    """So many steps of one run, from step `start` of its epoch on.

    Returns:
      `(clock, start, data, key, hyper, order, state) -> (state, losses (steps,))`; `clock` is the
      number of steps before the epoch, `order` the indices of the whole epoch.
    """
    segment = segment_of(program)

    def some(clock, start, data, key, hyper, order, state):
        if stepping == 'host':
            indices = jax.lax.dynamic_index_in_dim(order, start, keepdims=False)
            state, loss = program.step(clock + start, data, key, hyper, indices, state)
            return state, loss[None]
        part = jax.lax.dynamic_slice_in_dim(order, start, length)
        return segment(clock + start, data, key, hyper, part, state)

    return some


def pieces(steps: int, length: int, every: int = 0) -> list[tuple[int, int]]:
    """`(start, length)` of the calls that an epoch takes.

    Args:
      steps: of the epoch.
      length: most steps of a call. Where a slightly shorter one divides all evenly it is taken, as
        every length is compiled.
      every: a call ends after every so many steps; 0 for no matter.
    """
    borders = [*range(0, steps, every or steps), steps]
    whole = borders[1] - borders[0]
    calls = range(-(-whole // length), -(-2 * whole // length))
    length = next((whole // n for n in calls if whole % n == 0), length)
    return [
        (start, min(length, end - start))
        for first, end in itertools.pairwise(borders)
        for start in range(first, end, length)
    ]


def mesh_of(strategy: Strategy, devices: Sequence[jax.Device]) -> Mesh:
    """The devices of a strategy, `(places for runs, devices per run)`."""
    grid = np.array(devices[: strategy.devices]).reshape(-1, strategy.batch_devices)
    return Mesh(grid, ('run', 'batch'), axis_types=(AxisType.Auto,) * 2)


def jitted(fn: Callable, axes: Sequence[int | None], batching: str, mesh: Mesh, **kwargs: Any):
    """`over_runs`, compiled.

    The layout is always spelled out: on one device XLA would return another name for the same
    layout, and the next call would compile again.
    """
    layout = NamedSharding(mesh, P('run'))
    return jax.jit(over_runs(fn, axes, batching, mesh), out_shardings=layout, **kwargs)


def training(strategy: Strategy, program: Program, mesh: Mesh, length: int):
    """`steps_of` over stacked runs, compiled; the states are donated."""
    steps = steps_of(program, length, strategy.stepping)
    axes = (None, None, None, 0, 0, 0, 0)
    return jitted(steps, axes, strategy.batching, mesh, donate_argnums=6)


def bytes_taken(memory: Any) -> int:
    """What a compiled program takes of one device at its peak; 0 where the compiler is silent."""
    if memory is None:
        return 0
    whole = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return max(whole + memory.temp_size_in_bytes - memory.alias_size_in_bytes, 0)
