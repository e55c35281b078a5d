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
from jaxprune.sweep.plan import active_of, counts_of
from jaxprune.sweep.program import Program, hyper_of
from jaxprune.sweep.progress import Shown, ignored
from jaxprune.sweep.spec import SweepSpec
from jaxprune.sweep.store import Chunk
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
            states, errors = _prune(program, engine, rows, padded, engine.init(rows))
            done, losses, records, curves, flow = 0, [], [], [], []
        else:
            done, stacked, errors, losses, records, curves, flow = before
            repeat = np.arange(wanted).clip(max=count - 1)
            states = engine.unpack(jax.tree.map(lambda leaf: leaf[repeat], stacked))
            shown.resume(done * program.steps * count)
        counted = [
            [{path: int(k[i]) for path, k in counts.items()} for counts in engine.counts(states)]
            for i in range(count)
        ]
    epochs = members[0].train.epochs

    def told(steps: int) -> None:  # of all rows, padding included
        shown.steps(steps * count // wanted)

    for epoch in range(done + 1, epochs + 1):
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


def _prune(
    program: Program, engine: Engine, rows: Rows, padded: Sequence[Run], states: Any
) -> tuple[Any, list[str | None]]:
    """Prunes the rows of a chunk, method by method; the states, and what went wrong with each."""
    errors: dict[int, str | None] = {}
    by_event: dict[tuple, list[int]] = {}
    for i, run in enumerate(padded):
        if run.method.name != 'dense':
            # One call per event program; the numbers of rounds and of layers are its shapes.
            by_event.setdefault((event_program(run.method), run.method.rounds), []).append(i)
    for at in by_event.values():
        plans = [counts_of(program, padded[i]).counts for i in at]
        counts = {path: np.stack([p[path] for p in plans]) for path in plans[0]}
        active = np.array([active_of(program, padded[i]) for i in at], np.int32)
        states, info = engine.prune(padded[at[0]].method, rows, at, counts, active, states)
        found = _score_errors([padded[i] for i in at], counts, info)
        errors.update(zip(at, found, strict=True))
    return states, [errors.get(i) for i in range(len(padded))]


def _score_errors(
    members: Sequence[Run], counts: Mapping[str, np.ndarray], info: PruneInfo
) -> list[str | None]:
    """What is wrong with each run's scores, None if nothing is.

    Raises:
      PruneError: a mask keeps another number of weights than planned, from finite scores.
    """
    errors: list[str | None] = []
    for place, run in enumerate(members):
        bad = int(info.nonfinite[place])
        got = {path: int(leaf[place]) for path, leaf in info.kept.items()}
        wanted = {path: int(leaf[place][-1]) for path, leaf in counts.items()}
        if GLOBAL in wanted:
            got = {GLOBAL: sum(got.values())}
        direct = run.method.target == 'direct'
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
        'target': run.method.target,
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
