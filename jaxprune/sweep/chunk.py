"""One chunk: some runs of one program, from initialisation to their tables."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import polars as pl

from jaxprune.errors import Interrupted, PruneError, WriteError
from jaxprune.stop import Stop, never
from jaxprune.sweep import store, timeline
from jaxprune.sweep.advance import Rows
from jaxprune.sweep.checkpoint import Checkpoint, Saved, nowhere
from jaxprune.sweep.chunk_tables import (
    Counted,
    Moment,
    curves_rows,
    curves_rows_after_rounds,
    flow_rows,
    grid_columns,
    layers_table,
    results_rows,
)
from jaxprune.sweep.compact_costs import unknown
from jaxprune.sweep.compact_nets import compact_outcome
from jaxprune.sweep.engine import Engine, stacked
from jaxprune.sweep.event_calls import EventCall, event_calls
from jaxprune.sweep.grid import DENSE, Run, has_lasting_state, keeps_exactly
from jaxprune.sweep.processes import agreed, anybody
from jaxprune.sweep.program import Program, hyper_of, method_facts
from jaxprune.sweep.progress import Shown, ignored
from jaxprune.sweep.spec import SweepSpec
from jaxprune.sweep.store import Chunk
from jaxprune.sweep.timeline import Border, Stretch, borders_of, stretches_of
from jaxprune.sweep.timing import Stopwatch, stopwatch
from jaxprune.types import GLOBAL, PruneInfo, PyTree, RunState


def rows_of(members: Sequence[Run], size: int, engine: Engine) -> tuple[Rows, list[Run]]:
    """The rows that a chunk is computed as, and their runs: the last is repeated as padding."""
    wanted = -(-max(size, len(members)) // engine.multiple) * engine.multiple
    padded = [*members, *[members[-1]] * (wanted - len(members))]
    return stacked(padded), padded


class Walk(NamedTuple):
    """Where a chunk stands on its way from border to border.

    Attributes:
      step: steps taken.
      states: of the engine, padding included.
      anchor: host arrays of the state to rewind to, or None.
      errors: what is wrong with each row's scores, None if nothing.
      pruned: events whose scores are not looked at yet, and what fetches their infos.
      counted: what is left of the network of each run; None where it is not counted yet.
      epoch_start: the step at which the epoch began.
      losses: what fetches the training losses since then, arrays `(rows, steps)`.
      moments: what was recorded since then, still on the devices.
      latest: what was recorded last.
      means: of the epochs since the last evaluation, steps and each run's mean training loss.
      records: the result rows so far.
      curves: the curves rows so far.
      flow: the flow rows so far.
    """

    step: int
    states: Any
    anchor: PyTree | None
    errors: list[str | None]
    pruned: list[tuple[EventCall, Callable[[], PruneInfo]]]
    counted: list[Counted] | None
    epoch_start: int
    losses: list[Callable[[], np.ndarray]]
    moments: list[Callable[[], Moment]]
    latest: Moment | None
    means: list[tuple[int, np.ndarray]]
    records: list[dict[str, Any]]
    curves: list[list]
    flow: list[list]


class Context(NamedTuple):
    """What remains the same all along the way."""

    spec: SweepSpec
    program: Program
    engine: Engine
    rows: Rows
    padded: list[Run]
    calls: Callable[[timeline.Event], list[EventCall]]
    members: list[Run]
    shown: Shown
    watch: Stopwatch
    stop: Stop


def run_chunk(
    spec: SweepSpec,
    program: Program,
    engine: Engine,
    members: Sequence[Run],
    size: int,
    *,
    shown: Shown | None = None,
    saved: Checkpoint | None = None,
    stop: Stop | None = None,
) -> Chunk:
    """Trains the runs of one chunk, or of a piece of one.

    Args:
      members: runs of one program.
      size: rows to compile for; short chunks are padded by repeating the last run, and padding
        is dropped again.
      shown: gets the steps taken, now and then; None for nobody.
      saved: where an unfinished chunk is saved, and found again; None for nowhere.
      stop: whether to leave, at the next place to save at; None for never.

    Returns:
      Its tables, the rows of each run together.

    Raises:
      Interrupted: it was asked to leave, and saved the chunk if there was time.
      PruneError: keep counts that cannot be met, or a mask that keeps another number.
    """
    rows, padded = rows_of(members, size, engine)
    with stopwatch() as watch:
        context = Context(
            spec,
            program,
            engine,
            rows,
            padded,
            event_calls(program, padded),
            list(members),
            shown or ignored(),
            watch,
            stop or never(),
        )
        return _walked(context, saved or nowhere())


def _walked(context: Context, saved: Checkpoint) -> Chunk:
    """The chunk, walked from border to border."""
    program, count = context.program, len(context.members)
    borders = borders_of(program.timeline, program.record, program.steps)
    stretches = stretches_of(program.timeline, borders)
    walk = _begun(context, saved)
    begun = walk.step
    for border, stretch in zip(borders, stretches, strict=True):
        if begun and border.step <= begun:  # a checkpoint is saved after all that is due there
            continue
        walk = _reach(context, walk, border, stretch)
        if border.epoch_end and border.step < program.timeline.steps:
            asked = anybody(context.stop.asked())
            if asked or agreed(saved.due()):
                walk = _settled(context, walk)
                _save(context, walk, saved, asked)
            if asked:
                raise Interrupted(f'interrupted and saved after {walk.step:,} steps')
    walk = _counted(context, walk)
    run_steps = (program.timeline.steps - begun) * count
    place = {run.run_id: i for i, run in enumerate(context.members)}
    # The rows of each run together: a chunk looks the same in whatever pieces it was trained.
    records = sorted(walk.records, key=lambda row: place[row['run_id']])
    curves, flow = (
        sorted(rows, key=lambda row: place[row[0]]) for rows in (walk.curves, walk.flow)
    )
    return Chunk(
        results=pl.DataFrame(records, schema={**store.RESULTS_FILE, **grid_columns(context.spec)}),
        layers=layers_table(program, context.members, walk.counted),
        curves=pl.DataFrame(curves, schema=store.CURVES, orient='row'),
        flow=pl.DataFrame(flow, schema=store.FLOW, orient='row'),
        timing={**context.watch.seconds(), 'run_steps': run_steps},
    )


def _begun(context: Context, saved: Checkpoint) -> Walk:
    """Where the chunk begins: before the first step, or at its checkpoint."""
    program, engine, count = context.program, context.engine, len(context.members)
    before = saved.load(lambda step: _abstract_states(program, context.members, step))
    with context.watch.phase('prune'):
        if before is None:
            states = engine.init(context.rows)
            errors: list[str | None] = [None] * len(context.padded)
            return Walk(0, states, None, errors, [], None, 0, [], [], None, [], [], [], [])
        repeat = np.arange(len(context.padded)).clip(max=count - 1)
        states, anchor = jax.tree.map(lambda leaf: leaf[repeat], (before.states, before.anchor))
        states = engine.unpack(states)
        context.shown.resume(before.step * count)
    return Walk(
        step=before.step,
        states=states,
        anchor=anchor,
        errors=[before.errors[i] for i in repeat],
        pruned=[],
        counted=None,
        epoch_start=before.step,
        losses=[],
        moments=[],
        latest=None,
        means=before.losses,
        records=before.records,
        curves=before.curves,
        flow=before.flow,
    )


def _reach(context: Context, walk: Walk, border: Border, stretch: Stretch | None) -> Walk:
    """Trains up to a border and does what is due there.

    Recording and evaluation see the run as training left it, before rounds at the same step; but at
    step 0 what was just pruned is recorded, and the last evaluation comes after all rounds.
    """
    if stretch is not None:
        walk = _trained(context, walk, stretch)
    last = border.step == context.program.timeline.steps
    clock = stretch.stop if stretch else 0
    hooked = stretch is not None and _own_stage(context.program, stretch)
    rounds_too = context.program.record.rounds
    if border.record and (border.step or rounds_too):
        walk = _recorded(context, walk, clock, hooked, after_round=False)
    if border.keep:
        packed = context.engine.pack(walk.states)
        walk = walk._replace(anchor=_anchor(packed))
    if border.epoch_end:
        walk = _summed_up(context, walk)
    if border.evaluate and not (last and border.event is not None):
        walk = _evaluated(context, walk, clock, hooked)
    pruned_first = border.record and not border.step and not rounds_too
    if border.event is None:
        return _recorded(context, walk, 0, False, after_round=True) if pruned_first else walk
    full = context.engine.pack(walk.states) if last and _cut_out(context) else None
    walk = _after_event(context, walk, border.event)
    if rounds_too or pruned_first:
        going_on = True in context.program.stages and not border.event.finish
        walk = _recorded(context, walk, border.event.clock, going_on, after_round=True)
        if border.epoch_end:  # or a checkpoint would lose it
            walk = _settled(context, walk)
            walk = _filed(context, walk, [moment() for moment in walk.moments])
    return _evaluated(context, walk, clock, False, full) if border.evaluate and last else walk


def _trained(context: Context, walk: Walk, stretch: Stretch) -> Walk:
    count, wanted = len(context.members), len(context.padded)

    def on_steps(steps: int) -> None:  # of all rows, padding included
        context.shown.steps(steps * count // wanted)
        if context.stop.overdue():
            raise Interrupted('interrupted before the next place to save at')

    with context.watch.phase('train'):
        states, losses = context.engine.advance(
            stretch.start,
            stretch.stop,
            context.rows,
            walk.states,
            hooked=_own_stage(context.program, stretch),
            on_steps=on_steps,
        )
        if walk.losses:
            # Waits for the stretch before this one: the devices have work while we wait.
            walk.losses[-1]()
    step = walk.step + stretch.stop - stretch.start
    return walk._replace(step=step, states=states, losses=[*walk.losses, losses])


def _own_stage(program: Program, stretch: Stretch) -> bool:
    """Do runs train otherwise here, with a method at work?"""
    return stretch.hooked and True in program.stages


def _recorded(context: Context, walk: Walk, clock: int, hooked: bool, *, after_round: bool) -> Walk:
    """What [record] asks for; it is fetched from the devices when the epoch is summed up."""
    with context.watch.phase('train'):
        fetch = context.engine.record(clock, context.rows, walk.states, hooked)

    def moment() -> Moment:
        return Moment(walk.step, after_round, fetch())

    return walk._replace(moments=[*walk.moments, moment])


def _evaluated(
    context: Context, walk: Walk, clock: int, hooked: bool, full: PyTree | None = None
) -> Walk:
    """Rows of results; test values are those that were recorded at this step if there are any."""
    walk = _counted(context, _settled(context, walk))
    test, latest = None, walk.latest
    if latest is not None and latest.step == walk.step and not latest.after_round:
        test = latest.recorded.test
    if test is None:
        with context.watch.phase('evaluate'):
            test = context.engine.evaluate(clock, context.rows, walk.states, hooked)
    labels = None
    if context.program.record.churn:
        with context.watch.phase('evaluate'):
            labels = context.engine.predict(clock, context.rows, walk.states, hooked)
    records = results_rows(
        context.spec,
        context.program,
        context.members,
        walk.counted,
        walk.errors,
        walk.step,
        _mean_loss(walk.means),
        test,
        labels,
    )
    if walk.step == context.program.timeline.steps:
        records = _with_compact(context, walk, records, full)
    return walk._replace(means=[], records=[*walk.records, *records])


def _cut_out(context: Context) -> list[int]:
    """The runs whose networks are cut out at the end, where [record] asks for it."""
    seeds = context.spec.record.compact_seeds
    return [i for i, r in enumerate(context.members) if r.seed in seeds and r.method != DENSE]


def _with_compact(
    context: Context, walk: Walk, records: list[dict[str, Any]], full: PyTree | None
) -> list[dict[str, Any]]:
    """The last rows of runs with what their compact networks do.

    Args:
      full: the states before the rounds after the last step, packed; None if there are none.
    """
    if not (asked := _cut_out(context)):
        return records
    with context.watch.phase('evaluate'):
        states, tests = context.engine.pack(walk.states), context.engine.tests()
        for i in asked:
            row, before = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), (states, full))
            found = compact_outcome(context.program.problem, tests, row, before)
            records[i] = {**records[i], **found}
    return records


def _mean_loss(means: Sequence[tuple[int, np.ndarray]]) -> np.ndarray:
    """The mean over the steps of several epochs, the last of which may be a part of one."""
    lengths, losses = zip(*means, strict=True)
    if len(set(lengths)) == 1:
        return np.mean(losses, axis=0)
    return np.average(losses, axis=0, weights=lengths)


def _summed_up(context: Context, walk: Walk) -> Walk:
    """The walk at an epoch's end: its losses and what was recorded become rows."""
    with context.watch.phase('train'):
        parts = [losses()[: len(context.members)] for losses in walk.losses]
        moments = [moment() for moment in walk.moments]
    walk = _settled(context, walk)
    losses = np.concatenate(parts, axis=1)
    curves = curves_rows(
        context.program, context.members, walk.errors, walk.epoch_start, losses, moments
    )
    walk = walk._replace(
        epoch_start=walk.step,
        losses=[],
        means=[*walk.means, (losses.shape[1], losses.mean(axis=1))],
    )
    return _filed(context, walk, moments, curves)


def _filed(
    context: Context, walk: Walk, moments: Sequence[Moment], curves: Sequence[list] = ()
) -> Walk:
    """The walk with what was recorded as rows, those of an epoch in the order of their steps."""
    members = context.members
    after = curves_rows_after_rounds(context.program, members, walk.errors, moments)
    made = sorted([*curves, *after], key=lambda row: (row[1], row[2]))
    return walk._replace(
        moments=[],
        latest=moments[-1] if moments else walk.latest,
        curves=[*walk.curves, *made],
        flow=[*walk.flow, *flow_rows(context.program, members, walk.errors, moments)],
    )


def _save(context: Context, walk: Walk, saved: Checkpoint, asked: bool) -> None:
    """Saves the walk. Where that fails, training goes on, unless somebody asked to leave."""
    made = _saved(context, walk)
    try:
        saved.save(made)
    except WriteError as error:
        if asked:
            raise
        context.shown.note(f'not saved: {error}')


def _saved(context: Context, walk: Walk) -> Saved:
    """The walk without padding."""
    count = len(context.members)
    packed = context.engine.pack(walk.states), walk.anchor
    states, anchor = jax.tree.map(lambda leaf: leaf[:count], packed)
    return Saved(
        walk.step,
        states,
        anchor,
        walk.errors[:count],
        walk.means,
        walk.records,
        walk.curves,
        walk.flow,
    )


def _anchor(states: RunState) -> RunState:
    """What rewinding needs."""
    return states._replace(opt_state=(), masks=(), method_state=(), trace=())


def _abstract_states(
    program: Program, members: Sequence[Run], step: int
) -> tuple[RunState, RunState | None]:
    """Shapes of the members' states after a step, and of the anchor, stacked."""
    run, rounds = members[0], program.timeline.events
    one = jax.eval_shape(program.init, jax.random.key(0), hyper_of(run))
    anchor = _anchor(one)
    if has_lasting_state(run.method) and rounds[0].step <= step < rounds[-1].step:
        one = one._replace(method_state=method_facts(program, run.method).state)
    kept = program.timeline.anchor is not None and program.timeline.anchor <= step
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((len(members), *leaf.shape), leaf.dtype),
        (one, anchor if kept else None),
    )


def _counted(context: Context, walk: Walk) -> Walk:
    """The walk with what is left of the network of each run."""
    if walk.counted is not None:
        return walk
    with context.watch.phase('prune'):
        kept, active, gone, moved = context.engine.counts(walk.states)
        columns = context.program.compact().columns if gone else unknown().columns
        counted = [
            Counted(
                *({path: int(k[i]) for path, k in counts.items()} for counts in (kept, active)),
                columns({name: np.asarray(lost)[i] for name, lost in gone.items()}),
                {name: float(values[i]) for name, values in moved.items()},
            )
            for i in range(len(context.members))
        ]
    return walk._replace(counted=counted)


def _after_event(context: Context, walk: Walk, event: timeline.Event) -> Walk:
    """The rounds that happen at a step, then rewinding.

    In the middle of a method's life nothing here waits for the devices: training goes on, and
    `_settled` looks at the scores when the errors are asked for. The first and the last round are
    waited for, so that what pruning once takes does not count as training.
    """
    engine, states, pruned = context.engine, walk.states, list(walk.pruned)
    waits = event.begin or event.finish
    if waits and walk.losses:
        with context.watch.phase('train'):
            walk.losses[-1]()
    with context.watch.phase('prune'):
        for call in context.calls(event):
            states, info = engine.prune(context.rows, call, states)
            pruned.append((call, info))
        if event.rewind == 'weights':
            hooked = True in context.program.stages and not event.finish
            states = engine.rewind(context.rows, states, walk.anchor, hooked)
    walk = walk._replace(states=states, pruned=pruned, counted=None, latest=None)
    return _settled(context, walk) if waits else walk


def _settled(context: Context, walk: Walk) -> Walk:
    """The walk with what is wrong with the scores of its events so far; waits for them."""
    errors = list(walk.errors)
    with context.watch.phase('prune'):
        for call, info in walk.pruned:
            runs, before = ([of[i] for i in call.at] for of in (context.padded, errors))
            found = _score_errors(runs, call.counts, info(), before)
            for i, error in zip(call.at, found, strict=True):
                errors[i] = error
    return walk._replace(errors=errors, pruned=[])


def _score_errors(
    members: Sequence[Run],
    counts: Mapping[str, np.ndarray],
    info: PruneInfo,
    before: Sequence[str | None],
) -> list[str | None]:
    """What is wrong with each run's scores, None if nothing is.

    A run that was broken `before` remains so: its masks mean nothing, and neither does how many
    weights they keep.

    Raises:
      PruneError: a mask keeps another number of weights than planned, from finite scores.
    """
    errors: list[str | None] = []
    for place, run in enumerate(members):
        if before[place]:
            errors.append(before[place])
            continue
        bad = int(info.nonfinite[place])
        got = {path: int(leaf[place]) for path, leaf in info.kept.items()}
        wanted = {path: int(leaf[place][-1]) for path, leaf in counts.items()}
        if GLOBAL in wanted:
            got = {GLOBAL: sum(got.values())}
        if keeps_exactly(run.method) and not bad and got != wanted:
            raise PruneError(
                f'run {run.run_id} ({run.method.label}, compression {run.compression:g}, seed '
                f'{run.seed}) would keep {got} weights, not {wanted}'
            )
        nothing = not bad and not int(info.nonzero[place])
        message = f'{bad:,} scores were NaN or infinite' if bad else None
        errors.append('all scores were zero: there is nothing to rank by' if nothing else message)
    return errors
