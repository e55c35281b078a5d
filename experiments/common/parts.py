"""Tables of studies that are measured once and kept."""

import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl

from jaxprune.sweep.store import write_frame


def folder_of(out: Path, *facts: object) -> Path:
    """Where the tables of a study lie whose settings are these; others lie elsewhere."""
    return out / f'parts_{hashlib.sha256(repr(facts).encode()).hexdigest()[:8]}'


def part(path: Path, make: Callable[[], pl.DataFrame]) -> pl.DataFrame:
    """The table of a file, made and written unless it is there; says how long that took."""
    if not path.exists():
        began, busy = time.perf_counter(), time.process_time()
        write_frame(path, make())
        took, used = time.perf_counter() - began, time.process_time() - busy
        print(f'{path.stem}: {took:.0f} s, {used:.0f} s of CPU time', file=sys.stderr, flush=True)
    return pl.read_parquet(path)
