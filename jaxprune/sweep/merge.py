"""Several directories with runs of one sweep, united in a new one."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxprune.errors import StoreError
from jaxprune.sweep import store
from jaxprune.sweep.load import identity, to_toml
from jaxprune.sweep.open_sweep import stored_plan, stored_spec


class Merged(NamedTuple):
    """What a new directory holds: chunks of the plan, and how many are finished."""

    chunks: int
    finished: int


def merge(directories: Sequence[str | Path], out: str | Path) -> Merged:
    """Unites sweeps of one specification.

    The directories must have the same plan, so be copies of one that was planned, or planned by one
    version with one [engine].chunk. Of a chunk that several have finished, the first one's tables
    are taken, and all of them must agree on which runs these are.

    Raises:
      StoreError: fewer than two directories, sweeps that differ, or a new directory that is not
        empty.
    """
    if len(directories) < 2:
        raise StoreError('merge: give two directories or more')
    places = [store.place(name) for name in directories]
    out = store.directory(out)
    if (out / 'plan.json').exists():
        raise StoreError(f'{out} holds a sweep already: give a new --out')
    first = places[0]
    plan, spec = stored_plan(first), stored_spec(first)
    for place in places[1:]:
        other = stored_plan(place)
        if identity(stored_spec(place)) != identity(spec):
            raise StoreError(f'{place} holds another sweep than {first}')
        if other['chunks'] != plan['chunks']:
            raise StoreError(f'{place} has other chunks than {first}: one was planned otherwise')
    store.make_directory(out)
    done = _copied_chunks(places, out, [chunk['id'] for chunk in plan['chunks']])
    for place in places:
        for path in store.listed(place / 'sessions', '.json'):
            store.create_bytes(out / 'sessions' / path.name, path.read_bytes())
    store.write_bytes(out / 'spec.toml', to_toml(spec).encode())
    store.write_json(out / 'plan.json', plan)
    return Merged(len(plan['chunks']), done)


def _copied_chunks(places: Sequence[Path], out: Path, chunks: Sequence[str]) -> int:
    """Copies the tables of finished chunks; returns how many there are."""
    finished = [store.finished_chunks(place) for place in places]
    done = 0
    for chunk in chunks:
        source = next(
            (p for p, there in zip(places, finished, strict=True) if chunk in there), None
        )
        if source is None:
            continue
        if wrong := store.unreadable(source, chunk):
            raise StoreError(wrong)
        for where in store.TABLES:  # results last
            path = where(source, chunk)
            if path.exists():
                store.create_bytes(where(out, chunk), path.read_bytes())
        done += 1
    return done
