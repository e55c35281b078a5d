"""One chunk: some runs of one program, from initialisation to their tables."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import polars as pl

from jaxprune.errors import PruneError
from jaxprune.sweep import store
from jaxprune.sweep.checkpoint import Checkpoint, Saved, nowhere
from jaxprune.sweep.engine import Engine, Rows, Trained, stacked
from jaxprune.sweep.grid import Run, event_program, split_options
from jaxprune.sweep.parse import plain
from jaxprune.sweep.program import Program, hyper_of
from jaxprune.sweep.progress import Shown, ignored
from jaxprune.sweep.spec import SweepSpec
from jaxprune.sweep.store import Chunk
from jaxprune.sweep.sweep_plan import active_of, counts_of
from jaxprune.sweep.timing import Stopwatch, stopwatch
from jaxprune.types import GLOBAL, PruneInfo, RunState


def rows_of(members: Sequence[Run], size: int, engine: Engine) -> tuple[Rows, list[Run]]:
    """The rows that a chunk is computed as, and their runs: the last is repeated as padding."""
    wanted = -(-max(size, len(members)) // engine.multiple) * engine.multiple
    padded = [*members, *[members[-1]] * (wanted - len(members))]
    return stacked(padded), padded


def run_chunk(
    spec: SweepSpec,
    program: Program,
    engine: Engine,
    members: Sequence[Run],
    size: int,
    *,
    shown: Shown | None = None,
    saved: Checkpoint | None = None,
) -> Chunk:
    """Trains the runs of one chunk.

    Args:
      members: runs of one program.
      size: rows to compile for; short chunks are padded by repeating the last run, and padding
        is dropped again.
      shown: told of the steps after every epoch; None for nobody.
      saved: where an unfinished chunk is saved, and found again; None for nowhere.
    """
    with stopwatch() as watch:
        return _run_chunk(
            spec, program, engine, members, size, shown or ignored(), saved or nowhere(), watch
        )


def _run_chunk(
    spec: SweepSpec,
    program: Program,
    engine: Engine,
    members: Sequence[Run],
    size: int,
    shown: Shown,
    saved: Checkpoint,
    watch: Stopwatch,
) -> Chunk:
    rows, padded = rows_of(members, size, engine)
    count, wanted = len(members), len(padded)
    before = saved.load(_abstract_states(program, members))
    with watch.phase('prune'):
        if before is None:
            states, errors = _prune(
                program, engine, rows, padded, engine.init(rows), [None] * wanted, 0
            )
            done, losses, records, curves, flow = 0, [], [], [], []
        else:
            done, stacked, errors, losses, records, curves, flow = before
            repeat = np.arange(wanted).clip(max=count - 1)
            states = engine.unpack(jax.tree.map(lambda leaf: leaf[repeat], stacked))
            shown.resume(done * program.steps * count)
            errors = [errors[i] for i in repeat]
        counted = _counted(engine, states, count)
    epochs = members[0].train.epochs

    def told(steps: int) -> None:  # of all rows, padding included
        shown.steps(steps * count // wanted)

    for epoch in range(done + 1, epochs + 1):
        if epoch > 1 and any(_round_after(run, epoch - 1) is not None for run in members):
            with watch.phase('prune'):
                states, errors = _prune(program, engine, rows, padded, states, errors, epoch - 1)
                counted = _counted(engine, states, count)
        with watch.phase('train'):
            trained = engine.epoch(epoch - 1, rows, states, told)
        states = trained.states
        losses.append(trained.losses[:count].mean(axis=1))
        curves += _curves(program, members, errors, trained, (epoch - 1) * program.steps)
        flow += _flow(members, errors, trained)
        if epoch % spec.record.every_epochs == 0 or epoch == epochs:
            if program.record.evaluate:  # the epoch's end was among what was recorded
                test_loss, accuracy = trained.seen[-1].test
            else:
                with watch.phase('evaluate'):
                    test_loss, accuracy = engine.evaluate(states)
            train_loss = np.mean(losses, axis=0)
            losses = []
            for i, run in enumerate(members):
                records.append(
                    {
                        **_identity(spec, program, run, *counted[i]),
                        'step': epoch * program.steps,
                        'epoch': epoch,
                        # A mask from broken scores means nothing, and neither does its accuracy.
                        'train_loss': math.nan if errors[i] else float(train_loss[i]),
                        'test_loss': math.nan if errors[i] else float(test_loss[i]),
                        'test_accuracy': math.nan if errors[i] else float(accuracy[i]),
                        'error': errors[i],
                    }
                )
        if epoch < epochs and saved.due():
            stacked = jax.tree.map(lambda leaf: leaf[:count], engine.pack(states))
            saved.save(Saved(epoch, stacked, errors[:count], losses, records, curves, flow))
    run_steps = (epochs - done) * program.steps * count
    return Chunk(
        results=pl.DataFrame(records, schema={**store.RESULTS, **_grid_columns(spec)}),
        layers=_layers(program, members, counted),
        curves=pl.DataFrame(curves, schema=store.CURVES, orient='row'),
        flow=pl.DataFrame(flow, schema=store.FLOW, orient='row'),
        timing={**watch.seconds(), 'run_steps': run_steps},
    )


def _curves(
    program: Program,
    members: Sequence[Run],
    errors: Sequence[str | None],
    trained: Trained,
    before: int,
) -> list[list]:
    """Rows of `store.CURVES` of an epoch that `before` steps came before."""
    every, rows = program.record.every, []
    if not every:
        return rows
    tests = {seen.step - before: seen.test for seen in trained.seen}
    for first in range(0, program.steps, every):
        end = min(first + every, program.steps)
        loss, test = trained.losses[:, first:end].mean(axis=1), tests.get(end)
        for i, run in enumerate(members):
            values = [float(loss[i]), *([float(t[i]) for t in test] if test else [None, None])]
            kept = [math.nan if errors[i] and value is not None else value for value in values]
            rows.append([run.run_id, before + end, *kept])
    return rows


def _flow(members: Sequence[Run], errors: Sequence[str | None], trained: Trained) -> list[list]:
    """Rows of `store.FLOW` of an epoch."""
    return [
        [run.run_id, seen.step, path, quantity, math.nan if errors[i] else float(values[i])]
        for seen in trained.seen
        for quantity, by_path in seen.flow.items()
        for path, values in by_path.items()
        for i, run in enumerate(members)
    ]


def _abstract_states(program: Program, members: Sequence[Run]) -> RunState:
    """Shapes of the members' states, stacked."""
    one = jax.eval_shape(program.init, jax.random.key(0), hyper_of(members[0]))
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((len(members), *leaf.shape), leaf.dtype), one
    )


def _counted(engine: Engine, states: Any, count: int) -> list[list[dict[str, int]]]:
    """Weights kept and active of each run, path -> number."""
    both = engine.counts(states)
    return [
        [{path: int(k[i]) for path, k in counts.items()} for counts in both] for i in range(count)
    ]


def _round_after(run: Run, epochs: int) -> int | None:
    """The number of the pruning round that is due after so many epochs of training, if one is.

    All rounds before training are one, number 0.
    """
    if run.method.name == 'dense':
        return None
    every = run.method.after_epochs
    if not every or not epochs:
        return None if every or epochs else 0
    at, rest = divmod(epochs, every)
    return at - 1 if not rest and at <= run.method.rounds else None


def _prune(
    program: Program,
    engine: Engine,
    rows: Rows,
    padded: Sequence[Run],
    states: Any,
    errors: Sequence[str | None],
    epochs: int,
) -> tuple[Any, list[str | None]]:
    """Prunes what is due after so many epochs; the states, and what went wrong with each row."""
    errors = list(errors)
    by_event: dict[tuple, list[int]] = {}
    for i, run in enumerate(padded):
        due = _round_after(run, epochs)
        if due is not None:
            # One call per event program; the numbers of rounds and of layers are its shapes.
            together = 1 if run.method.after_epochs else run.method.rounds
            by_event.setdefault((event_program(run.method), together, due), []).append(i)
    for (_, together, due), at in by_event.items():
        plans = [counts_of(program, padded[i]).counts for i in at]
        # Of rounds along training this one alone; methods of fewer rounds are over by then.
        counts = {p: np.stack([plan[p][due : due + together] for plan in plans]) for p in plans[0]}
        active = np.array([active_of(program, padded[i]) for i in at], np.int32)
        method = padded[at[0]].method
        states, info = engine.prune(method, rows, at, counts, active, states, due)
        told = [errors[i] for i in at]
        found = _score_errors([padded[i] for i in at], counts, info, told)
        for i, error in zip(at, found, strict=True):
            errors[i] = error
    return states, errors


def _score_errors(
    members: Sequence[Run],
    counts: Mapping[str, np.ndarray],
    info: PruneInfo,
    told: Sequence[str | None],
) -> list[str | None]:
    """What is wrong with each run's scores, None if nothing is.

    A run that is `told` to be broken by an earlier round stays so: its masks mean nothing, and
    neither does how many weights they keep.

    Raises:
      PruneError: a mask keeps another number of weights than planned, from finite scores.
    """
    errors: list[str | None] = []
    for place, run in enumerate(members):
        if told[place]:
            errors.append(told[place])
            continue
        bad = int(info.nonfinite[place])
        got = {path: int(leaf[place]) for path, leaf in info.kept.items()}
        wanted = {path: int(leaf[place][-1]) for path, leaf in counts.items()}
        if GLOBAL in wanted:
            got = {GLOBAL: sum(got.values())}
        # What reads units that go is not counted beforehand.
        direct = run.method.target == 'direct' and run.method.granularity == 'weight'
        if direct and not bad and got != wanted:
            raise PruneError(
                f'run {run.run_id} ({run.method.label}, compression {run.compression:g}, seed '
                f'{run.seed}) would keep {got} weights, not {wanted}'
            )
        nothing = not bad and not int(info.nonzero[place])
        said = f'{bad:,} scores were NaN or infinite' if bad else None
        errors.append('all scores were zero: there is nothing to rank by' if nothing else said)
    return errors


def _identity(
    spec: SweepSpec,
    program: Program,
    run: Run,
    kept: Mapping[str, int],
    active: Mapping[str, int],
) -> dict[str, Any]:
    """The columns of a results row that say which run it is."""
    size = program.size
    left, working = sum(kept.values()), sum(active.values())
    numbers, flags = split_options(run.train)
    settings = {**plain(run.train), **numbers, **flags}
    return {
        'run_id': run.run_id,
        'model': spec.model.name,
        'dataset': spec.data.name,
        'label': run.method.label,
        'method': run.method.name,
        'allocation': run.method.allocation,
        'seed': run.seed,
        'target': 'units' if run.method.granularity == 'unit' else run.method.target,
        'target_compression': run.compression,
        'density': left / size,
        'compression': size / left if left else math.inf,
        'effective_compression': size / working if working else math.inf,
        'learning_rate': run.train.learning_rate,
        'weight_decay': run.train.weight_decay,
        **{key: _cell(settings[key]) for key in _grid_columns(spec)},
    }


def _grid_columns(spec: SweepSpec) -> dict[str, Any]:
    """Column -> type of the swept training settings that have no column of their own."""
    types = {bool: pl.Boolean, int: pl.Int64, float: pl.Float64}
    return {
        key: types.get(type(values[0]), pl.String)
        for key, values in spec.grid.train.items()
        if key not in store.RESULTS
    }


def _cell(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def _layers(
    program: Program, members: Sequence[Run], counted: Sequence[Sequence[Mapping[str, int]]]
) -> pl.DataFrame:
    rows = [
        (run.run_id, path, math.prod(shape), kept[path], active[path])
        for run, (kept, active) in zip(members, counted, strict=True)
        for path, shape in program.shapes.items()
    ]
    return pl.DataFrame(rows, schema=store.LAYERS, orient='row')
