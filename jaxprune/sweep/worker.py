"""Chunks on this machine: each in pieces that fit into its memory, one program at a time."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxprune.errors import Interrupted, WriteError, first_line
from jaxprune.stop import Stop
from jaxprune.sweep import checkpoint, store
from jaxprune.sweep.attempts import Attempt, attempt, nobody
from jaxprune.sweep.checkpoint import saved_pieces
from jaxprune.sweep.chunk import rows_of, run_chunk
from jaxprune.sweep.device_data import DeviceData
from jaxprune.sweep.devices import memory_limit, out_of_memory
from jaxprune.sweep.engine import Engine, make_engine
from jaxprune.sweep.grid import Run, representative
from jaxprune.sweep.groups import Group, chosen_anew
from jaxprune.sweep.pieces import (
    finished_pieces,
    joined,
    piece_name,
    piece_of,
    pieces_of,
    read_piece,
    write_piece,
)
from jaxprune.sweep.probe import Measured, trial_line
from jaxprune.sweep.processes import agreed, anybody, is_lead
from jaxprune.sweep.program import Program, make_program
from jaxprune.sweep.progress import Shown
from jaxprune.sweep.provenance import device_facts, versions
from jaxprune.sweep.spec import SweepSpec
from jaxprune.sweep.store import Chunk
from jaxprune.sweep.this_machine import Here, this_machine, with_less_memory
from jaxprune.sweep.timing import stopwatch
from jaxprune.sweep.trials import measure

#: The part of a device's memory that a training program may take, by the compiler's own account.
_COMPILED_SHARE = 0.85
#: Seconds that a call of a compiled training program should last: what progress waits for.
_CALL_SECONDS = 2.0


class Job(NamedTuple):
    """What a worker works at.

    Attributes:
      spec: the sweep.
      plan: its plan.
      out: its directory.
      groups: program -> its runs and functions, of all programs that the worker will meet.
      data: gives the data set, on the devices.
      shown: gets the steps taken.
      stop: whether to leave.
    """

    spec: SweepSpec
    plan: Mapping[str, Any]
    out: Path
    groups: Mapping[str, Group]
    data: Callable[[], DeviceData]
    shown: Shown
    stop: Stop


def make_worker(job: Job) -> Callable[[Mapping[str, Any]], bool]:
    """A function that trains a chunk of the plan and stores its tables.

    It returns whether the chunk is finished: False where another process works at it. It keeps the
    compiled functions of the last program and how much memory its runs may take.
    """
    programs = {program['id']: program for program in job.plan['programs']}
    by_id = {run.run_id: run for group in job.groups.values() for run in group.runs}
    here: dict[str, Here] = {}
    current: list[_Compiled] = []  # one or none: a program's compiled functions are freed with it

    def run(chunk: Mapping[str, Any]) -> bool:
        members = [by_id[run_id] for run_id in chunk['runs']]
        planned = programs[chunk['program']]
        epoch = job.groups[planned['id']].program.steps
        facts = {'runs': len(members), 'steps': planned['steps'], 'steps_per_epoch': epoch}
        facts |= {'device': device_facts(), 'versions': versions()}
        with attempt(job.out, chunk['id'], facts) if is_lead() else nobody() as at:
            if not agreed(at.claim()):
                return False
            # Another process may have finished it since the last look. A listing: shared disks
            # remember for a while that a single file was not there.
            if agreed(chunk['id'] in store.finished_chunks(job.out)):
                job.shown.skip(len(members))
                return True
            if planned['id'] not in here:
                current.clear()
                here[planned['id']] = _measured_first(job, planned)
            while True:
                counting, undo = _undoable(job.shown, at)
                try:
                    made = _in_pieces(
                        job, chunk, members, here[planned['id']], current, counting, at
                    )
                    break
                except WriteError:
                    if jax.process_count() > 1 or not store.finished(job.out, chunk['id']):
                        raise
                    job.shown.finish(len(members))  # whoever finished it cleaned up
                    return True
                except (jax.errors.JaxRuntimeError, MemoryError) as error:
                    if not out_of_memory(error) or jax.process_count() > 1:
                        raise
                    reason, before = first_line(error), here[planned['id']]
                current.clear()
                undo()
                here[planned['id']] = less = with_less_memory(before, reason)
                job.shown.note(
                    f'out of memory with {before.at_once} runs at a time; going on with '
                    f'{less.at_once} ({less.strategy})'
                )
            if is_lead():
                store.write_chunk(job.out, chunk['id'], made)
                checkpoint.remove(_folder(job.out, chunk['id']))
        job.shown.finish(len(members))
        return True

    return run


class _Compiled(NamedTuple):
    """A program that is ready: which, how, and its functions."""

    id: str
    here: Here
    program: Program
    engine: Engine


def _folder(out: Path, chunk: str) -> Path:
    return out / 'checkpoints' / chunk


def _measured_first(job: Job, planned: Mapping[str, Any]) -> Here:
    """How a program is trained here; the ways to do it are tried first where that is worth it.

    Not once runs of it are trained: other ways round differently.
    """
    group = job.groups[planned['id']]
    chunks = {c['id'] for c in job.plan['chunks'] if c['program'] == planned['id']}
    saved = {folder.name for folder in store.listed(job.out / 'checkpoints')}
    begun = chunks & (store.finished_chunks(job.out) | saved)
    if not begun and jax.process_count() == 1:
        left = {**job.plan, 'programs': [dict(planned)]}

        def on_trial(found: Measured) -> None:
            job.shown.note(trial_line(found))
            _leave_if_asked(job)  # what was measured is remembered

        if measure(job.spec, [group], left, on_trial):
            [group] = chosen_anew(job.spec, [group])
            job.shown.note(f'program {group.id}: {group.strategy}')
    return this_machine(group, planned)


def _in_pieces(
    job: Job,
    chunk: Mapping[str, Any],
    runs: Sequence[Run],
    here: Here,
    current: list[_Compiled],
    shown: Shown,
    at: Attempt,
) -> Chunk | None:
    """The tables of a chunk, piece by piece; a finished piece is not trained again.

    Of several processes, the lead has the tables.
    """
    folder = _folder(job.out, chunk['id'])
    done = finished_pieces(folder)
    begun = [piece for piece in map(piece_of, saved_pieces(folder)) if piece]
    done, begun = (list(map(tuple, found)) for found in agreed([done, begun]))
    pieces = pieces_of(len(runs), here.at_once, begun, done)
    timer = checkpoint.every(job.spec.engine.checkpoint_minutes)
    how = {'strategy': here.strategy._asdict(), 'chosen': here.chosen}
    at.note({**how, 'at_once': here.at_once, 'pieces': len(pieces)})
    made = []
    for first, count in pieces:
        name, members = piece_name(first, count), runs[first : first + count]
        stored = read_piece(folder, name) if (first, count) in done else None
        if agreed(stored is not None):
            shown.resume(count * job.groups[chunk['program']].program.timeline.steps)
            made += [stored] if stored else []  # the lead has it
            continue
        _leave_if_asked(job)
        compiling = _make_ready(job, chunk['program'], here, members, current)
        _leave_if_asked(job)  # compiling may have taken minutes
        ready = current[0]
        saved = checkpoint.checkpoint(folder, at.name, name, timer, job.shown.note)
        found = run_chunk(
            job.spec,
            ready.program,
            ready.engine,
            members,
            here.at_once,
            shown=shown,
            saved=checkpoint.by_lead(saved),
            stop=job.stop,
        )
        found.timing['compile'] += compiling
        made.append(found)
        if len(pieces) > 1 and is_lead():
            write_piece(folder, name, found)
    return joined(made) if is_lead() else None


def _leave_if_asked(job: Job) -> None:
    """Leaves before a piece begins, where there is nothing to save."""
    if anybody(job.stop.asked()):
        raise Interrupted('interrupted before its next runs began')


def _make_ready(
    job: Job, program: str, here: Here, members: Sequence[Run], current: list[_Compiled]
) -> float:
    """Leaves the program's functions in `current`; returns the seconds that compiling took."""
    if current and (current[0].id, current[0].here) == (program, here):
        return 0.0
    current.clear()
    with stopwatch() as watch:
        with watch.phase('compile'):
            current.append(
                _Compiled(program, here, *_engine(job, job.groups[program], here, members))
            )
        return watch.seconds()['compile']


def _engine(job: Job, group: Group, here: Here, members: Sequence[Run]) -> tuple[Program, Engine]:
    """The functions and the engine of a program.

    Raises:
      MemoryError: by the compiler's own account, a piece would not fit.
    """
    strategy = here.strategy
    how = strategy.convolution, strategy.batch_devices
    run = representative(group.runs)
    program = group.program if how == ('native', 1) else make_program(job.spec, run, *how)
    places = strategy.devices // strategy.batch_devices
    at_once = places if strategy.batching == 'unroll' else here.at_once
    seconds = (here.seconds or 0) * at_once
    steps_per_call = max(int(_CALL_SECONDS / seconds), 1) if seconds else 0
    engine = make_engine(strategy, program, job.data(), jax.devices(), steps_per_call)
    rows, _ = rows_of(members, here.at_once, engine)
    needed, limit = engine.bytes_needed(rows), _COMPILED_SHARE * memory_limit()
    if needed > limit:
        raise MemoryError(f'{needed / 1e9:.3g} GB are needed where {limit / 1e9:.3g} GB are left')
    return program, engine


def _undoable(shown: Shown, at: Attempt) -> tuple[Shown, Callable[[], None]]:
    """A listener that tells the attempt too, and a function that takes back what was counted."""
    counts = {'steps': 0, 'resume': 0}

    def counting(name: str) -> Callable[[int], None]:
        def count(steps: int) -> None:
            counts[name] += steps
            at.note({'done': sum(counts.values())})
            getattr(shown, name)(steps)

        return count

    def undo() -> None:
        for name, steps in counts.items():
            getattr(shown, name)(-steps)

    return shown._replace(**{name: counting(name) for name in counts}), undo
