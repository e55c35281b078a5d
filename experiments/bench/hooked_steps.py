"""Runs of one method at work on one network, for benchmarks: what a step and a round cost."""

import time
from typing import Any, NamedTuple

import jax

from jaxprune import data
from jaxprune.sweep import make_spec
from jaxprune.sweep.advance import Rows
from jaxprune.sweep.chunk import rows_of
from jaxprune.sweep.device_data import device_data
from jaxprune.sweep.engine import Engine, make_engine
from jaxprune.sweep.event_calls import event_calls
from jaxprune.sweep.grid import DENSE, Run
from jaxprune.sweep.program import Program
from jaxprune.sweep.strategy import Strategy, usual
from jaxprune.sweep.sweep_plan import checked_groups


class Case(NamedTuple):
    """Runs of one method on one network, at work from step 0 to the last.

    Attributes:
      engine: compiled for the rows.
      program: its functions.
      runs: the runs.
      rows: the same as rows.
    """

    engine: Engine
    program: Program
    runs: list[Run]
    rows: Rows


def case_of(
    model: dict[str, Any],
    entry: dict[str, Any],
    densities: tuple[float, ...],
    seeds: int,
    rows: int = 0,
    examples: int = 1280,
    epochs: int = 1,
) -> Case:
    """A case in batches of 128 digits.

    Args:
      entry: of `grid.method`.
      rows: to compile for, all runs by default.
      examples: of an epoch.
    """
    spec = make_spec({
        'name': 'steps',
        'model': model,
        'data': {'name': 'mnist_small', 'train_examples': examples, 'test_examples': 100},
        'train': {'epochs': epochs, 'batch_size': 128, 'momentum': 0.9},
        'grid': {
            'method': [{'end': epochs, **entry}],
            'density': list(densities),
            'seed': list(range(seeds)),
        },
    })  # fmt: skip
    group = next(g for g in checked_groups(spec) if g.runs[0].method != DENSE)
    count = jax.local_device_count()
    strategy = usual(group.program.convolves, jax.default_backend(), count)
    if rows == 1:
        strategy = Strategy(strategy.batching, strategy.stepping, strategy.convolution, 1)
    on_device = device_data(spec, data.load('mnist_small'))
    engine = make_engine(strategy, group.program, on_device, jax.local_devices())
    runs = group.runs[: rows or None]
    return Case(engine, group.program, runs, rows_of(runs, len(runs), engine)[0])


def begun(case: Case, runs: list[Run], rows: Rows) -> Any:
    """The states after the first round."""
    event = case.program.timeline.events[0]
    states = case.engine.init(rows)
    (call,) = event_calls(case.program, runs)(event)
    return case.engine.prune(rows, call, states)[0]


def timed(case: Case, rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds of a run and step, without the method and with it, in turns."""
    length, count = case.program.timeline.steps, len(case.runs)
    found: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):  # the first one compiles
        for hooked, times in zip((False, True), found, strict=True):
            states = begun(case, case.runs, case.rows)
            jax.block_until_ready(jax.tree.leaves(states))
            began = time.perf_counter()
            case.engine.advance(0, length, case.rows, states, hooked=hooked)[1]()
            if turn:
                times.append(1e3 * (time.perf_counter() - began) / (length * count))
    return found
