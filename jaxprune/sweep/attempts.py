"""Who works at a chunk, where, and when there was a sign of life: a file for each attempt.

    DIR/attempts/<chunk>/<attempt>.json

Results depend on none of it. It tells people what happens, and processes that share a directory
at which chunks others work.
"""

import contextlib
import datetime
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxprune.errors import Interrupted, StoreError, first_line
from jaxprune.files import is_remote, machine_token, process_alive
from jaxprune.sweep import store

#: Seconds between signs of life, on disks and in object stores.
_BEAT, _REMOTE_BEAT = 5.0, 20.0
#: Signs of life that must be missing before an attempt counts as lost.
_MISSED = 8


class Attempt(NamedTuple):
    """A process at work at a chunk.

    Attributes:
      name: of the attempt; nobody else has it.
      note: adds facts to its file, at the next sign of life.
      claim: takes the chunk, unless another process is seen to work at it; returns whether it is
        ours. Two processes whose clocks differ may both get it: the results are the same.
    """

    name: str
    note: Callable[[Mapping[str, Any]], None]
    claim: Callable[[], bool]


@contextlib.contextmanager
def attempt(out: Path, chunk: str, facts: Mapping[str, Any]) -> Iterator[Attempt]:
    """Writes the file of an attempt, signs of life while it is open, and how it ended.

    Args:
      facts: what is known of the machine and the chunk.
    """
    now = datetime.datetime.now(datetime.UTC)
    # In the order of their starts, also of those within a second.
    name = f'{now:%Y%m%dT%H%M%S.%f}-{uuid.uuid4().hex[:8]}'
    path = out / 'attempts' / chunk / f'{name}.json'
    record: dict[str, Any] = {
        'chunk': chunk,
        'host': platform.node(),
        'machine': machine_token(),
        'process': os.getpid(),
        'started': now.isoformat(timespec='seconds'),
        'state': 'starting',
        **facts,
    }
    store.write_json(path, record)
    ahead = path.stat().st_mtime - time.time()
    over, lock = threading.Event(), threading.Lock()

    def note(more: Mapping[str, Any]) -> None:
        with lock:
            record.update(more)

    def write() -> None:
        with lock:
            record['seen'] = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
            content = dict(record)
        try:
            store.write_json(path, content)
        except StoreError as error:  # that no file can be written now must not end the training
            note({'trouble': first_line(error)})

    def claim() -> bool:
        # Of two that start at once, both see each other: the first name goes on.
        others = [r for r in attempts_of(out, chunk, ahead) if r['name'] != name]
        if any(_goes_before(r, name) for r in others if is_live(r, out)):
            note({'state': 'left to another'})
            return False
        note({'state': 'running'})
        write()
        return True

    def beat() -> None:
        while not over.wait(_REMOTE_BEAT if is_remote(out) else _BEAT):
            write()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield Attempt(name, note, claim)
        if record['state'] == 'running':
            note({'state': 'finished'})
    except (Interrupted, KeyboardInterrupt) as error:
        note({'state': 'interrupted', 'error': first_line(error)})
        raise
    except BaseException as error:
        note({'state': 'failed', 'error': f'{type(error).__name__}: {first_line(error)}'})
        raise
    finally:
        over.set()
        thread.join()
        write()


@contextlib.contextmanager
def nobody() -> Iterator[Attempt]:
    """An attempt of which another process keeps the file."""
    yield Attempt('nobody', lambda facts: None, lambda: True)


def _goes_before(record: Mapping[str, Any], name: str) -> bool:
    return record['state'] == 'running' or record['name'] < name


def attempts_of(out: Path, chunk: str, ahead: float = 0.0) -> list[dict[str, Any]]:
    """The attempts at a chunk, the oldest first, each with 'name' and 'silent', seconds since its
    last sign of life. A file that cannot be read is left out.

    Args:
      ahead: seconds that the clock of the disk is ahead of ours, see `files.clock_ahead`.
    """
    found = []
    for path in sorted(store.listed(out / 'attempts' / chunk, '.json'), key=lambda path: path.name):
        try:
            record = json.loads(path.read_bytes())
            silent = max(time.time() + ahead - path.stat().st_mtime, 0.0)
        except (OSError, ValueError, *store.refusals(path)):  # just replaced, or broken
            continue
        if isinstance(record, dict):
            found.append({**record, 'name': path.name.removesuffix('.json'), 'silent': silent})
    return found


def is_live(record: Mapping[str, Any], out: Path) -> bool:
    """Is this attempt at work, as far as one can see?"""
    if record.get('state') not in ('starting', 'running'):
        return False
    ours = record.get('machine') == machine_token()
    if ours and not process_alive(int(record.get('process', 0))):
        return False
    beat = _REMOTE_BEAT if is_remote(out) else _BEAT
    return record['silent'] < _MISSED * beat


def taken(out: Path, chunk: str, ahead: float = 0.0) -> bool:
    """Does somebody work at a chunk?"""
    return any(is_live(record, out) for record in attempts_of(out, chunk, ahead))
