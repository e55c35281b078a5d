"""Which strategy is fastest here: a short timed trial of each on the real shapes.

A trial trains synthetic pictures with a program's own network, optimizer and batch size, a few
runs per device, for about half a second. It takes turns with the fastest trial before it, because a
machine may run at half its speed a minute later. What was measured is kept on disk, by program,
machine and versions, so the next sweep of the same kind need not measure again.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jaxlib
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxprune import data, nn
from jaxprune.errors import StoreError, first_line
from jaxprune.sweep.device_data import DeviceData
from jaxprune.sweep.devices import cache_directory, out_of_memory
from jaxprune.sweep.engine import stacked
from jaxprune.sweep.grid import Run, digest, train_settings
from jaxprune.sweep.layout import bytes_taken, jitted, mesh_of, training
from jaxprune.sweep.parse import plain
from jaxprune.sweep.program import make_program
from jaxprune.sweep.spec import SweepSpec
from jaxprune.sweep.store import write_json
from jaxprune.sweep.strategy import (
    BATCHINGS,
    STEPPINGS,
    TRIAL_RUNS,
    Strategy,
    candidates,
    forced,
)

#: Seconds of a trial after compiling, and fewest calls.
_SECONDS, _CALLS = 0.5, 3
#: The part of a sweep's time that trying may take.
_SHARE = 0.05
#: Steps per call of a trial of 'scan'.
_STEPS = 4


class Measured(NamedTuple):
    """What a trial found.

    Attributes:
      strategy: what was tried.
      seconds: per step of one run, infinite if it failed; at the speed that the machine had
        during the first trial of its session.
      compile_seconds: for tracing and compiling.
      bytes_per_run: memory that a run more takes, data aside.
      error: why it failed, or ''.
    """

    strategy: Strategy
    seconds: float
    compile_seconds: float
    bytes_per_run: float
    error: str


def probe(
    spec: SweepSpec,
    run: Run,
    strategies: Iterable[Strategy],
    *,
    run_steps: float = math.inf,
    known: Sequence[Measured] = (),
    on_trial: Callable[[Measured], None] = lambda found: None,
) -> list[Measured]:
    """Tries strategies; the fastest first.

    Args:
      run: any run of the program.
      strategies: to be tried, see `possible`.
      run_steps: runs times steps to be trained. Another strategy is only tried while all trials
        will foreseeably take less than a twentieth of what they take by what is known so far.
      known: of earlier trials.
      on_trial: called after each trial.
    """
    found, began = [], time.perf_counter()
    fastest: tuple[_Trial, float] | None = None
    for strategy in strategies:
        worked = [m for m in (*known, *found) if not m.error]
        if worked:
            next_one = statistics.mean(m.compile_seconds for m in worked) + 2 * _SECONDS
            spent = time.perf_counter() - began + next_one
            if spent > _SHARE * run_steps * min(m.seconds for m in worked):
                break
        tried = _tried(spec, run, strategy, fastest)
        if tried is None:
            fastest = None
            tried = _tried(spec, run, strategy, None)
        trial, measured = tried
        if trial and (fastest is None or measured.seconds < fastest[1]):
            fastest = trial, measured.seconds
        found.append(measured)
        on_trial(measured)
    return sorted(found, key=lambda measured: measured.seconds)


def possible(spec: SweepSpec, convolves: bool) -> list[Strategy]:
    """The strategies worth timing that [engine] allows, the usual one first."""
    devices = jax.local_device_count()
    found = candidates(convolves, jax.default_backend(), devices)
    return list(dict.fromkeys(forced(strategy, spec.engine, devices) for strategy in found))


def trial_line(measured: Measured) -> str:
    """One line on a trial."""
    if measured.error:
        return f'tried {measured.strategy}: {measured.error}'
    return f'tried {measured.strategy}: {1e3 * measured.seconds:.3g} ms per run and step'


class _Trial(NamedTuple):
    """A strategy that is compiled and ready.

    Attributes:
      call: takes some steps; returns the seconds per step of one run.
      compile_seconds: see `Measured`.
      bytes_per_run: see `Measured`.
    """

    call: Callable[[], float]
    compile_seconds: float
    bytes_per_run: float


def _tried(
    spec: SweepSpec, run: Run, strategy: Strategy, fastest: tuple[_Trial, float] | None
) -> tuple[_Trial | None, Measured] | None:
    """A trial of a strategy, in turns with the fastest one so far and its seconds.

    None where memory has no room for both; no trial where the strategy failed.
    """
    try:
        trial = _begun(spec, run, strategy)
        if fastest is None:
            [times] = _in_turns([trial.call])
            seconds = statistics.median(times)
        else:
            before, times = _in_turns([fastest[0].call, trial.call])
            ratios = [time / other for time, other in zip(times, before, strict=True)]
            seconds = fastest[1] * statistics.median(ratios)
        return trial, Measured(strategy, seconds, trial.compile_seconds, trial.bytes_per_run, '')
    except Exception as error:  # out of memory, or a shape that the way cannot do
        if fastest is not None and out_of_memory(error):
            return None
        return None, Measured(strategy, math.inf, math.nan, math.nan, first_line(error))


def _in_turns(calls: Sequence[Callable[[], float]]) -> list[list[float]]:
    """Calls each in turn until every one had its time: what each call returned, call by call."""
    began = time.perf_counter()
    warm = [call() for call in calls]
    if time.perf_counter() - began > _SECONDS * len(calls):
        return [[first] for first in warm]  # so slow that warming up makes no difference
    times: list[list[float]] = [[] for _ in calls]
    began = time.perf_counter()
    while len(times[0]) < _CALLS or time.perf_counter() - began < _SECONDS * len(calls):
        for call, mine in zip(calls, times, strict=True):
            mine.append(call())
    return times


def _begun(spec: SweepSpec, run: Run, strategy: Strategy) -> _Trial:
    program = make_program(spec, run, strategy.convolution, strategy.batch_devices)
    mesh = mesh_of(strategy, jax.local_devices())
    places = mesh.shape['run']
    runs = places * (1 if strategy.batching == 'unroll' else TRIAL_RUNS)
    length = 1 if strategy.stepping == 'host' else min(_STEPS, program.steps)
    on_device = jax.device_put(_pictures(spec, run), NamedSharding(mesh, P()))
    rows = stacked([run._replace(seed=seed) for seed in range(runs)])
    states = jitted(program.init, (0, 0), strategy.batching, mesh)(*rows)
    order = np.zeros((runs, length, run.train.batch_size), np.int32)
    order += np.arange(run.train.batch_size, dtype=np.int32)
    clock = start = np.int32(0)
    before = time.perf_counter()
    placed = jax.device_put((*rows, order), NamedSharding(mesh, P('run')))
    step = training(strategy, program.stages[False].step, mesh, length)
    step = step.lower(clock, start, on_device, *placed, states).compile()
    compiled = time.perf_counter() - before

    def call() -> float:
        nonlocal states
        before = time.perf_counter()
        states, loss = step(clock, start, on_device, *placed, states)
        jax.block_until_ready(loss)
        return (time.perf_counter() - before) / length / runs

    whole = bytes_taken(step.memory_analysis())
    shared = sum(leaf.nbytes for leaf in jax.tree.leaves(on_device))
    per_run = max(whole - shared, 0) / (runs // places) if whole else math.nan
    return _Trial(call, compiled, per_run)


def _pictures(spec: SweepSpec, run: Run) -> DeviceData:
    """A batch of noise as a data set: what is computed does not depend on what it shows."""
    facts = data.facts(spec.data.name)
    batch = run.train.batch_size
    images = np.random.default_rng(0).integers(0, 256, (batch, *facts.shape), np.uint8)
    labels = np.arange(batch, dtype=np.int32) % facts.classes
    split = data.DeviceSplit(images, labels)
    return DeviceData(split, split, np.zeros((facts.classes, 1), np.int32))


# --- what was measured before -------------------------------------------------------------------


def cache_file() -> Path:
    """Where measurements are kept."""
    return cache_directory() / 'probes.json'


def key_of(spec: SweepSpec, run: Run) -> str:
    """A hash of the program, the machine and the versions."""
    device = jax.local_devices()[0]
    machine = [device.platform, device.device_kind, jax.local_device_count(), os.cpu_count()]
    versions = [jax.__version__, jaxlib.__version__, importlib.metadata.version('jaxprune')]
    model = dataclasses.replace(spec.model, params='', params_sha256='')  # numbers take no time
    program = [plain(model), spec.data.name, train_settings(run.train)]
    return digest([program, machine, versions])


def remembered(spec: SweepSpec, run: Run) -> list[Measured]:
    """What was measured before for such a program on such a machine, the fastest first.

    What failed is among it, last. Empty if nothing was measured.
    """
    try:
        rows = json.loads(cache_file().read_text())[key_of(spec, run)]
        found = [Measured(Strategy(*row[0]), *row[1:]) for row in rows]
        return sorted(filter(_sound, found), key=lambda measured: measured.seconds)
    except (OSError, ValueError, LookupError, TypeError):
        return []  # no cache is no mistake; a broken one is written anew


def _sound(measured: Measured) -> bool:
    """Is a row of the cache one that this version wrote?"""
    way, numbers = measured.strategy, measured[1:4]
    return (
        way.batching in BATCHINGS
        and way.stepping in STEPPINGS
        and way.convolution in nn.CONVOLUTIONS
        and all(type(n) is int and n > 0 for n in (way.devices, way.batch_devices))
        and all(isinstance(n, (int, float)) for n in numbers)
        and isinstance(measured.error, str)
    )


def remember(spec: SweepSpec, run: Run, found: Sequence[Measured]) -> None:
    """Adds to what was measured before; write errors are ignored."""
    place = cache_file()
    try:
        known = dict(json.loads(place.read_text()))
    except (OSError, ValueError, TypeError):
        known = {}
    by_strategy = {m.strategy: m for m in (*remembered(spec, run), *found)}
    try:
        write_json(place, {**known, key_of(spec, run): list(by_strategy.values())})
    except StoreError:
        return
