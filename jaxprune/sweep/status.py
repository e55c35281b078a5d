"""How far a sweep directory is, for `jaxprune status`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxprune.errors import StoreError
from jaxprune.sweep import store
from jaxprune.sweep.attempts import attempts_of, is_live
from jaxprune.sweep.checkpoint import saved_pieces
from jaxprune.sweep.pieces import finished_pieces, piece_of

#: Chunks finished last whose pace is that of the chunks left.
_PACE = 50


def status(out: Path) -> dict[str, Any]:
    """Counts of a sweep directory.

    Returns:
      name; runs and chunks with how many are finished; `broken`, a line for every finished chunk
      that cannot be read; `unfinished`, a table for every chunk that was begun, see
      `unfinished_chunk`; the number of sessions; where the time of finished chunks went; whether a
      process is at work there now, and seconds until all is finished, None where nobody knows.

    Raises:
      StoreError: not a sweep directory.
    """
    plan = store.read_plan(out)
    try:
        sessions = store.read_provenance(out)['sessions']
    except StoreError:
        sessions = []
    steps = {program['id']: program['steps'] for program in plan['programs']}
    there, finished, broken, unfinished = store.finished_chunks(out), [], [], []
    begun = {path.name for kind in ('attempts', 'checkpoints') for path in store.listed(out / kind)}
    wrongs = store.all_unreadable(out, [c['id'] for c in plan['chunks'] if c['id'] in there])
    for chunk in plan['chunks']:
        if chunk['id'] in there:
            wrong = wrongs[chunk['id']]
            (broken if wrong else finished).append(wrong or len(chunk['runs']))
        elif chunk['id'] in begun:
            unfinished.append(unfinished_chunk(out, chunk, steps[chunk['program']]))
    running = any(chunk['state'] == 'running' for chunk in unfinished)
    left = len(plan['chunks']) - len(there) - sum(chunk['share'] for chunk in unfinished)
    return {
        'name': plan['name'],
        'runs': len(plan['runs']),
        'runs_finished': sum(finished),
        'chunks': len(plan['chunks']),
        'chunks_finished': len(finished),
        'broken': broken,
        'unfinished': unfinished,
        'sessions': len(sessions),
        'last_started': sessions[-1]['started'] if sessions else 'never',
        'timing': store.read_timing(out),
        'eta': _eta(out, there, left) if running else None,
        'running': running,
        'report': (out / 'report.html').exists(),
    }


def _eta(out: Path, there: set[str], left: float) -> float | None:
    """Seconds until so many chunks more are finished, at the pace of the last ones."""
    times = sorted(store.results_path(out, chunk).stat().st_mtime for chunk in there)[-_PACE:]
    if len(times) < 2 or times[-1] <= times[0]:
        return None
    return left * (times[-1] - times[0]) / (len(times) - 1)


def unfinished_chunk(out: Path, chunk: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """What is known of a chunk that was begun.

    Returns:
      chunk; runs; `state`: 'running', 'lost' (it runs, but there is no sign of life), 'interrupted'
      or 'failed', that of the last attempt, or 'saved' if there is none; `host`, `started`,
      `silent` (seconds), `error` and `epoch`, `(done, of)`, of that attempt; attempts, how many
      there were; `share`, the part of the chunk that is saved.
    """
    records = attempts_of(out, chunk['id'])
    folder, runs = out / 'checkpoints' / chunk['id'], len(chunk['runs'])
    taken = dict.fromkeys(finished_pieces(folder), steps)
    for name, step in saved_pieces(folder).items():
        if (piece := piece_of(name)) and piece not in taken:
            taken[piece] = step
    done = sum(count * step for (_, count), step in taken.items())
    found = {
        'chunk': chunk['id'],
        'runs': runs,
        'attempts': len(records),
        'share': min(done / (runs * steps), 1.0),
    }
    if not records:
        records = [{'state': 'saved', 'silent': 0.0}]
    live = [record for record in records if is_live(record, out)]
    last = (live or records)[-1]
    state = last.get('state', 'failed')
    if state == 'running' and not live:
        state = 'lost'
    about = {key: last.get(key, '') for key in ('host', 'started', 'silent', 'error')}
    epoch = last.get('steps_per_epoch') or steps
    done = float(last.get('done', 0)) / runs  # of a chunk in pieces, on average over its runs
    return {**found, 'state': state, **about, 'epoch': (done / epoch, steps / epoch)}
