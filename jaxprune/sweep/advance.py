"""Training from one border to the next: many steps of many runs in few compiled calls."""

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from jaxprune.sweep.device_data import DeviceData
from jaxprune.sweep.layout import call_lengths, calls_of, jitted, on_host, training
from jaxprune.sweep.program import Program
from jaxprune.sweep.slots import Slots
from jaxprune.sweep.strategy import Strategy
from jaxprune.sweep.timeline import Stretch, borders_of, stretches_of
from jaxprune.types import Hyper

#: Seconds between two reports of progress; each waits for a call that is over or nearly.
_REPORT = 0.5


class Rows(NamedTuple):
    """What differs between the runs of a chunk, stacked along the run axis.

    Attributes:
      keys: typed keys `(runs,)`.
      hyper: leaves `(runs,)`.
    """

    keys: jax.Array
    hyper: Hyper


class AdvanceFn(Protocol):
    def __call__(
        self,
        start: int,
        stop: int,
        rows: Rows,
        states: Any,
        *,
        hooked: bool = False,
        on_steps: Callable[[int], None] = ...,
    ) -> tuple[Any, Callable[[], np.ndarray]]:
        """Trains from `start` to `stop` on the clock.

        Args:
          states: of the engine; they are used up.
          hooked: a method's step hook is at work.
          on_steps: called now and then with the steps x runs taken since.

        Returns:
          The states, and a function that fetches the losses `(runs, steps)` and remembers them.
          The function waits for the devices. Until it is called, nothing does, and more work may be
          queued for them.
        """


class Trainer(NamedTuple):
    """What trains.

    Attributes:
      advance: see `AdvanceFn`.
      order: the compiled function that draws the batches of an epoch.
      orders: `(rows, number of an epoch) -> ` its batches, an array per slot. The last ones are
        remembered.
      steps: (hooked, length) -> the compiled function that takes so many steps.
      by_slot: `rows -> rows per slot`.
    """

    advance: AdvanceFn
    order: Callable
    orders: Callable[[Rows, int], list[jax.Array]]
    steps: dict[tuple[bool, int], Callable]
    by_slot: Callable[[Rows], list[Rows]]


def make_trainer(
    strategy: Strategy,
    program: Program,
    mesh: Mesh,
    data: DeviceData,
    slots: Slots,
    steps_per_call: int,
) -> Trainer:
    """Trains runs of a program.

    Args:
      data: on all devices of the mesh.
      steps_per_call: most steps that 'scan' takes in one call; 0 for all of an epoch.
    """
    epoch = program.steps
    order = jitted(program.order, (0, None), strategy.batching, mesh)
    most = 1 if strategy.stepping == 'host' else min(steps_per_call or epoch, epoch)
    intervals = {
        stop - start
        for stretch in _stretches(program)
        for start, stop in within_epochs(stretch.start, stretch.stop, epoch)
    }
    lengths = call_lengths(intervals, most)
    steps = {
        (hooked, length): training(strategy, stage.step, mesh, length)
        for hooked, stage in program.stages.items()
        for length in lengths
    }

    by_slot = _last_call(
        lambda rows: [slots.take(rows, np.array(slot)) for slot in slots.of(len(rows.keys))]
    )

    orders = _last_call(
        lambda rows, number: [order(part.keys, np.int32(number)) for part in by_slot(rows)]
    )

    def advance(start, stop, rows, states, *, hooked=False, on_steps=lambda steps: None):
        states, losses = list(states), [[] for _ in states]
        reported = time.perf_counter()
        for first, last in within_epochs(start, stop, epoch):
            number = first // epoch
            clock = np.int32(number * epoch)
            parts = zip(by_slot(rows), orders(rows, number), strict=True)
            for slot, ((keys, hyper), batches) in enumerate(parts):
                at, before = first, first
                for length in calls_of(last - first, lengths):
                    states[slot], loss = steps[hooked, length](
                        clock, np.int32(at - clock), data, keys, hyper, batches, states[slot]
                    )
                    losses[slot].append(loss)
                    if len(losses[slot]) > 1 and time.perf_counter() - reported > _REPORT:
                        # The call before this one: the device has work while we wait.
                        jax.block_until_ready(losses[slot][-2])
                        on_steps((at - before) * len(keys))
                        reported, before = time.perf_counter(), at
                    at += length
                on_steps((last - before) * len(keys))

        @functools.cache
        def fetched() -> np.ndarray:
            return np.concatenate([np.concatenate(parts, axis=1) for parts in on_host(losses)])

        return states, fetched

    return Trainer(advance, order, orders, steps, by_slot)


def within_epochs(start: int, stop: int, epoch: int) -> list[tuple[int, int]]:
    """A stretch of the clock cut where epochs end: the batches are drawn epoch by epoch."""
    cuts = [start, *range((start // epoch + 1) * epoch, stop, epoch), stop]
    return list(itertools.pairwise(cuts))


def _stretches(program: Program) -> Sequence[Stretch]:
    borders = borders_of(program.timeline, program.record, program.steps)
    return [s for s in stretches_of(program.timeline, borders) if s is not None]


def _last_call(fn: Callable) -> Callable:
    """The same function, which remembers its last result: several stretches share an epoch."""
    latest: list[tuple] = []

    def same(old: Any, new: Any) -> bool:
        return old is new or (isinstance(new, int) and old == new)

    def remembered(*args):
        if not latest or not all(map(same, latest[0][0], args)):
            latest[:] = [(args, fn(*args))]
        return latest[0][1]

    return remembered
