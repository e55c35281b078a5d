"""A chunk in pieces: as many of its runs as this machine trains at once.

    DIR/checkpoints/<chunk>/<first>-<count>.zip  the tables of a finished piece

Any attempt may go on with the pieces of another.
"""

import io
import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from jaxprune.sweep import store
from jaxprune.sweep.store import Chunk

_NAME = re.compile(r'(\d+)-(\d+)')
_TABLES = ('results', 'layers', 'curves', 'flow')


def piece_name(first: int, count: int) -> str:
    return f'{first}-{count}'


def piece_of(name: str) -> tuple[int, int] | None:
    """`(first run, number of runs)` of a piece by its name; None if it is no such name."""
    found = _NAME.fullmatch(name)
    return (int(found[1]), int(found[2])) if found else None


def pieces_of(
    count: int,
    at_once: int,
    saved: Sequence[tuple[int, int]] = (),
    finished: Sequence[tuple[int, int]] = (),
) -> list[tuple[int, int]]:
    """The pieces that a chunk is trained in: `(first run, number of runs)` of each.

    Args:
      count: runs of the chunk.
      at_once: most runs of a piece.
      saved: pieces that any attempt saved; those that fit keep their borders.
      finished: pieces whose tables are stored; they keep their borders, whatever their size.
    """
    pieces, first = [], 0
    fitting = {at: size for at, size in sorted(saved) if size <= at_once}
    fitting |= dict(sorted(finished))
    while first < count:
        if first in fitting and first + fitting[first] <= count:
            size = fitting[first]
        else:
            size = min(at_once, count - first)
        pieces.append((first, size))
        first += size
    return pieces


def joined(pieces: Sequence[Chunk]) -> Chunk:
    """The tables of a chunk from those of its pieces, in order."""
    timing = {key: sum(piece.timing[key] for piece in pieces) for key in pieces[0].timing}
    frames = (pl.concat([getattr(piece, name) for piece in pieces]) for name in _TABLES)
    return Chunk(*frames, timing)


def finished_pieces(folder: Path) -> list[tuple[int, int]]:
    """The pieces of a chunk whose tables are stored in its folder."""
    names = [path.name.removesuffix('.zip') for path in store.listed(folder, '.zip')]
    return [piece for piece in map(piece_of, names) if piece]


def write_piece(folder: Path, name: str, made: Chunk) -> None:
    """Stores the tables of a finished piece."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as packed:
        for table in _TABLES:
            packed.writestr(f'{table}.parquet', store.parquet(getattr(made, table)))
        packed.writestr('timing.json', json.dumps(made.timing))
    # One that is there is broken, or holds the same.
    store.write_bytes(folder / f'{name}.zip', buffer.getvalue())


def read_piece(folder: Path, name: str) -> Chunk | None:
    """The tables of a finished piece; None where there are none that can be read."""
    try:
        content = (folder / f'{name}.zip').read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            frames = [pl.read_parquet(io.BytesIO(packed.read(f'{t}.parquet'))) for t in _TABLES]
            timing = json.loads(packed.read('timing.json'))
    except (
        *(OSError, KeyError, ValueError, zipfile.BadZipFile, pl.exceptions.PolarsError),
        *store.refusals(folder),
    ):
        return None
    return Chunk(*frames, timing)
