"""How far a sweep directory is, for `jaxprune status`."""

from pathlib import Path
from typing import Any

from jaxprune.sweep import store
from jaxprune.sweep.checkpoint import saved_step


def status(out: Path) -> dict[str, Any]:
    """Counts of a sweep directory.

    Returns:
      name; runs and chunks with how many are finished; `broken`, a line for every finished chunk
      that cannot be read; `saved`, `(chunk, runs, step, steps)` of every unfinished chunk that has
      a checkpoint; the number of sessions; where the time of finished chunks went; and whether a
      process is at work there now.

    Raises:
      StoreError: not a sweep directory.
    """
    plan = store.read_plan(out)
    sessions = store.read_json(out / 'provenance.json', {'sessions'})['sessions']
    steps = {program['id']: program['steps'] for program in plan['programs']}
    finished, broken, saved = [], [], []
    for chunk in plan['chunks']:
        runs = len(chunk['runs'])
        if store.finished(out, chunk['id']):
            wrong = store.unreadable(out, chunk['id'])
            (broken if wrong else finished).append(wrong or runs)
        elif step := saved_step(out / 'checkpoints' / chunk['id']):
            saved.append((chunk['id'], runs, step, steps[chunk['program']]))
    return {
        'name': plan['name'],
        'runs': len(plan['runs']),
        'runs_finished': sum(finished),
        'chunks': len(plan['chunks']),
        'chunks_finished': len(finished),
        'broken': broken,
        'saved': saved,
        'sessions': len(sessions),
        'last_started': sessions[-1]['started'] if sessions else 'never',
        'timing': store.read_timing(out),
        'running': store.is_locked(out),
        'report': (out / 'report.html').exists(),
    }
