"""An engine that trains nothing, for tests of store, resuming and refusals.

Its numbers depend on a run's key, its learning rate, the weights kept and the clock alone, as those
of a real engine do; its masks keep as many weights as planned. Checkpoints are for real engines.
"""

import contextlib
import math
from typing import NamedTuple

import jax
import numpy as np
import pytest

from jaxprune.sweep.engine import Engine
from jaxprune.sweep.observe import Recorded
from jaxprune.types import GLOBAL, PruneInfo


class Fake(NamedTuple):
    """The states of all rows: path -> weights kept `(runs,)`."""

    kept: dict[str, np.ndarray]


def drawn(rows, clock, states):
    """A number in (0, 1) for each run."""
    seeds = np.asarray(jax.random.key_data(rows.keys), np.float64).sum(axis=1)
    kept = sum(place * leaf for place, leaf in enumerate(states.kept.values(), 1))
    mixed = np.sin(seeds + 1e3 * rows.hyper.learning_rate + np.sqrt(2) * kept + clock)
    return np.modf(mixed * 1e4)[0] ** 2


def shared(total, sizes):
    """A number of weights given to the first leaves that have room for them."""
    given = {}
    for path, size in sizes.items():
        given[path] = min(total, size)
        total -= given[path]
    return given


def make_fake_engine(strategy, program, data, devices, steps_per_call=0):
    sizes = {path: math.prod(shape) for path, shape in program.shapes.items()}

    def init(rows):
        return Fake({path: np.full(len(rows.keys), size) for path, size in sizes.items()})

    def advance(start, stop, rows, states, *, hooked=False, on_steps=lambda steps: None):
        on_steps((stop - start) * len(rows.keys))
        losses = [drawn(rows, clock, states) for clock in range(start, stop)]
        return states, lambda: np.stack(losses, axis=1).astype(np.float32)

    def prune(rows, call, states):
        kept = {path: leaf.copy() for path, leaf in states.kept.items()}
        for place, row in enumerate(call.at):
            counts = {path: int(leaf[place][-1]) for path, leaf in call.counts.items()}
            if GLOBAL in counts:
                counts = shared(counts[GLOBAL], sizes)
            for path, count in counts.items():
                kept[path][row] = count
        rows_pruned = len(call.at)
        info = {path: leaf[np.asarray(call.at)] for path, leaf in kept.items()}
        nothing, something = np.zeros(rows_pruned, int), np.ones(rows_pruned, int)
        return Fake(kept), lambda: PruneInfo(info, nothing, something)

    def evaluate(clock, rows, states, hooked=False):
        return drawn(rows, clock + 0.5, states), drawn(rows, clock + 0.25, states)

    def record(clock, rows, states, hooked=False):
        return lambda: Recorded(evaluate(clock, rows, states), {})

    return Engine(
        multiple=strategy.devices // strategy.batch_devices,
        init=init,
        advance=advance,
        prune=prune,
        rewind=None,
        evaluate=evaluate,
        record=record,
        tests=None,
        predict=None,
        counts=lambda states: (states.kept, states.kept, {}, {}),
        pack=lambda states: states,
        unpack=lambda states: states,
        bytes_needed=lambda rows: 0,
        traces=dict,
    )


@contextlib.contextmanager
def nothing_trained():
    """Sweeps within it run on the fake engine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('jaxprune.sweep.worker.make_engine', make_fake_engine)
        yield
