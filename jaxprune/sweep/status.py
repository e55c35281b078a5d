"""How far a sweep directory is, for `jaxprune status`."""

from pathlib import Path
from typing import Any

from jaxprune.sweep import store


def status(out: Path) -> dict[str, Any]:
    """Counts of a sweep directory.

    Returns:
      name, runs and chunks with how many are finished, the number of sessions, where the time of
      finished chunks went, and whether a process is at work there now.

    Raises:
      StoreError: not a sweep directory.
    """
    plan = store.read_plan(out)
    sessions = store.read_json(out / 'provenance.json', {'sessions'})['sessions']
    finished = [chunk for chunk in plan['chunks'] if store.finished(out, chunk['id'])]
    return {
        'name': plan['name'],
        'runs': len(plan['runs']),
        'runs_finished': sum(len(chunk['runs']) for chunk in finished),
        'chunks': len(plan['chunks']),
        'chunks_finished': len(finished),
        'sessions': len(sessions),
        'last_started': sessions[-1]['started'] if sessions else 'never',
        'timing': store.read_timing(out),
        'running': store.is_locked(out),
        'report': (out / 'report.html').exists(),
    }
