"""Several directories with runs of one sweep, united in a new one."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxprune.errors import StoreError
from jaxprune.sweep import store
from jaxprune.sweep.load import identity, to_toml
from jaxprune.sweep.open_sweep import stored_plan, stored_spec


class Merged(NamedTuple):
    """What a new directory holds.

    Attributes:
      chunks: of the plan.
      finished: how many of them are.
      broken: a line for every chunk of which no directory has tables that can be read.
    """

    chunks: int
    finished: int
    broken: tuple[str, ...]


def merge(directories: Sequence[str | Path], out: str | Path) -> Merged:
    """Unites sweeps of one specification. Called again, it goes on, or adds what is new.

    The directories must have the same plan, so be copies of one that was planned, or planned by one
    version with one [engine].chunk. Of a chunk that several have finished, the first tables that
    can be read are taken.

    Raises:
      StoreError: fewer than two directories, sweeps that differ, or a new directory that holds
        something else.
    """
    if len(directories) < 2:
        raise StoreError('merge: give two directories or more')
    places = [store.place(name) for name in directories]
    out = store.directory(out)
    if str(out) in map(str, places):
        raise StoreError(f'{out} is one of the directories to unite: give another --out')
    first = places[0]
    plan, spec = stored_plan(first), stored_spec(first)
    known = [*places[1:], out] if (out / 'plan.json').exists() else places[1:]
    for place in known:
        other = stored_plan(place)
        if identity(stored_spec(place)) != identity(spec):
            raise StoreError(f'{place} holds another sweep than {first}')
        if other['chunks'] != plan['chunks']:
            raise StoreError(f'{place} has other chunks than {first}: one was planned otherwise')
    store.make_directory(out)
    store.create_bytes(out / 'spec.toml', to_toml(spec).encode())
    store.create_json(out / 'plan.json', plan)
    for place in places:
        for path in store.listed(place / 'sessions', '.json'):
            store.create_bytes(out / 'sessions' / path.name, path.read_bytes())
    broken = _copied_chunks(places, out, [chunk['id'] for chunk in plan['chunks']])
    return Merged(len(plan['chunks']), len(store.finished_chunks(out)), tuple(broken))


def _copied_chunks(places: Sequence[Path], out: Path, chunks: Sequence[str]) -> list[str]:
    """Copies the tables of finished chunks; returns a line for every one that nobody can read."""
    finished = [(place, store.finished_chunks(place)) for place in places]
    there, broken = store.finished_chunks(out), []
    for chunk in chunks:
        sources = [place for place, done in finished if chunk in done]
        if not sources or (chunk in there and not store.unreadable(out, chunk)):
            continue
        wrong = [store.unreadable(source, chunk) for source in sources]
        if '' not in wrong:
            broken.append(wrong[0])
            continue
        source = sources[wrong.index('')]
        for where in store.TABLES:  # results last
            path = where(source, chunk)
            if path.exists():
                store.write_bytes(where(out, chunk), path.read_bytes())
    return broken
