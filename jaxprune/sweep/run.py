"""The driver: plan -> chunks -> store, resumable at any moment."""

import datetime
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl

from jaxprune import data
from jaxprune.errors import PruneError, SpecError, StoreError
from jaxprune.rng import run_key
from jaxprune.sweep import store
from jaxprune.sweep.checkpoint import Checkpoint, Saved, checkpoint, nowhere
from jaxprune.sweep.engine import Engine, Rows, make_engine
from jaxprune.sweep.grid import Run, event_program, runs, split_options
from jaxprune.sweep.load import identity, load_spec, make_spec, spec_hash, to_toml
from jaxprune.sweep.parse import plain
from jaxprune.sweep.plan import active_of, counts_of, cut, make_plan
from jaxprune.sweep.program import Program, device_data, hyper_of, make_program
from jaxprune.sweep.progress import Progress, Shown, ignored, silent
from jaxprune.sweep.provenance import provenance
from jaxprune.sweep.spec import SweepSpec
from jaxprune.sweep.strategy import Strategy
from jaxprune.types import GLOBAL, PruneInfo, RunState


def default_out(spec: SweepSpec) -> Path:
    """`runs/<name>-<hash of the resolved specification>`."""
    return Path('runs') / f'{spec.name}-{spec_hash(spec)}'


def run_sweep(
    spec: SweepSpec | Mapping[str, Any] | str | Path,
    out: str | Path | None = None,
    *,
    data_dir: str | Path | None = None,
    progress: Progress | None = None,
    source: str = 'spec',
) -> pl.DataFrame:
    """Trains every run of a sweep that is not yet finished, and returns all results.

    Args:
      spec: a TOML file, a table with its keys, or a specification.
      out: directory of the results; by default named after the specification. If it holds an
        unfinished sweep of the same specification, that is continued.
      data_dir: where prepared TFDS data lie, see `jaxprune.data.load`.
      progress: what to show, see `jaxprune.sweep.progress`; None for nothing.
      source: what error messages call a specification that is no file.

    Returns:
      One row per run and evaluation, the columns of `store.RESULTS`.

    Raises:
      SpecError, DataError: before anything is written.
      StoreError: `out` holds another sweep or broken files, cannot be written, or another process
        is at work there.
    """
    if isinstance(spec, (str, Path)):
        source = str(spec)
        spec = load_spec(spec)
    elif not isinstance(spec, SweepSpec):
        spec = make_spec(spec, source)
    out = default_out(spec) if out is None else Path(out)
    plan_table = make_plan(spec, source)
    dataset = data.load(spec.data.name, data_dir)
    try:
        on_device = device_data(spec, dataset)
    except SpecError as error:
        raise SpecError(f'{source}: {error}') from None
    store.make_directory(out)
    with store.locked(out):
        chunks = _open(spec, out, plan_table)
        with (progress or silent)(plan_table, out) as shown:
            _run_chunks(spec, out, chunks, on_device, shown)
        return store.read_results(out)


def _open(spec: SweepSpec, out: Path, plan_table: dict[str, Any]) -> list[dict[str, Any]]:
    """Makes or re-opens the directory; the chunks to run, in order.

    The plan in the directory wins over a new one, as another machine might cut other chunks,
    unless [engine] now asks for others.
    """
    text = to_toml(spec)
    spec_file, plan_file = out / 'spec.toml', out / 'plan.json'
    if spec_file.exists() and identity(load_spec(spec_file)) != identity(spec):
        raise StoreError(f'{out} holds another sweep (see its spec.toml): choose another --out')
    store.remove_leftovers(out)
    if plan_file.exists():
        stored = store.read_plan(out)
        if any(stored.get(key) != plan_table[key] for key in ('format', 'spec')):
            raise StoreError(
                f'{out} was written by another version of jaxprune: choose another --out'
            )
        same_engine = spec_file.exists() and spec_file.read_bytes() == text.encode()
        plan_table = stored if same_engine else recut(stored, plan_table, out)
    session = provenance(spec, datetime.datetime.now(datetime.UTC))
    record = out / 'provenance.json'
    sessions = store.read_json(record, {'sessions'})['sessions'] if record.exists() else []
    store.write_json(record, {**session, 'sessions': [*sessions, session['session']]})
    # The plan last: with it, the directory is one that `status` can read.
    store.write_bytes(spec_file, text.encode())
    store.write_json(plan_file, plan_table)
    return store.read_plan(out)['chunks']


def recut(stored: dict[str, Any], plan_table: dict[str, Any], out: Path) -> dict[str, Any]:
    """The plan for other [engine] settings: finished chunks stay, the runs left are cut anew."""
    chunks = [chunk for chunk in stored['chunks'] if store.finished(out, chunk['id'])]
    done = {run_id for chunk in chunks for run_id in chunk['runs']}
    for program in plan_table['programs']:
        left = [
            run_id
            for chunk in plan_table['chunks']
            if chunk['program'] == program['id']
            for run_id in chunk['runs']
            if run_id not in done
        ]
        chunks = [*chunks, *cut(program['id'], left, program['chunk'])]
    return {**plan_table, 'chunks': chunks}


def _run_chunks(spec, out: Path, chunks: Sequence[dict], on_device, shown) -> None:
    by_id = {run.run_id: run for run in runs(spec)}
    programs = {p['id']: p for p in store.read_plan(out)['programs']}
    current: tuple[str, Program, Engine] | None = None
    for chunk in chunks:
        members = [by_id[run_id] for run_id in chunk['runs']]
        if store.finished(out, chunk['id']):
            shown.skip(len(members))
            continue
        if current is None or current[0] != chunk['program']:
            # One program at a time: its compiled functions are freed with it.
            strategy = Strategy(**programs[chunk['program']]['strategy'])
            program = make_program(spec, members[0].train, strategy.convolution)
            engine = make_engine(strategy, program, on_device, jax.local_devices())
            current = chunk['program'], program, engine
        size = programs[chunk['program']]['chunk']
        saved = checkpoint(out / 'checkpoints' / chunk['id'], spec.engine.checkpoint_minutes)
        results, layers = run_chunk(
            spec, current[1], current[2], members, size, shown=shown, saved=saved
        )
        store.write_chunk(out, chunk['id'], results, layers)
        saved.remove()
        shown.finish(len(members))
    # Whatever is left belongs to chunks that were cut anew.
    shutil.rmtree(out / 'checkpoints', ignore_errors=True)


def run_chunk(
    spec: SweepSpec,
    program: Program,
    engine: Engine,
    members: Sequence[Run],
    size: int,
    *,
    shown: Shown | None = None,
    saved: Checkpoint | None = None,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Trains the runs of one chunk.

    Args:
      members: runs of one program.
      size: rows to compile for; short chunks are padded by repeating the last run, and padding
        is dropped again.
      shown: told of the steps after every epoch; None for nobody.
      saved: where an unfinished chunk is saved, and found again; None for nowhere.

    Returns:
      The chunk's results and layers.
    """
    saved, shown = saved or nowhere(), shown or ignored()
    wanted = -(-max(size, len(members)) // engine.multiple) * engine.multiple
    padded = [*members, *[members[-1]] * (wanted - len(members))]
    rows = Rows(
        jax.numpy.stack([run_key(run.seed) for run in padded]),
        jax.tree.map(lambda *leaves: np.stack(leaves), *map(hyper_of, padded)),
    )
    before = saved.load(_abstract_states(program, members))
    if before is None:
        states, errors = _prune(program, engine, rows, padded, engine.init(rows))
        done, records, losses = 0, [], []
    else:
        done, stacked, errors, losses, records = before
        repeat = np.arange(wanted).clip(max=len(members) - 1)
        states = engine.unpack(jax.tree.map(lambda leaf: leaf[repeat], stacked))
        shown.resume(done * program.steps * len(members))
    counted = [
        [{path: int(k[i]) for path, k in counts.items()} for counts in engine.counts(states)]
        for i in range(len(members))
    ]
    epochs = members[0].train.epochs

    def told(steps: int) -> None:  # of all rows, padding included
        shown.steps(steps * len(members) // wanted)

    for epoch in range(done + 1, epochs + 1):
        states, loss = engine.epoch(epoch - 1, rows, states, told)
        losses.append(loss[: len(members)])
        if epoch % spec.record.every_epochs == 0 or epoch == epochs:
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
            stacked = jax.tree.map(lambda leaf: leaf[: len(members)], engine.pack(states))
            saved.save(Saved(epoch, stacked, errors[: len(members)], losses, records))
    results = pl.DataFrame(records, schema={**store.RESULTS, **_grid_columns(spec)})
    return results, _layers(program, members, counted)


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
    size = sum(math.prod(shape) for shape in program.shapes.values())
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
