"""What checkpoints cost: every save of a real chunk is timed."""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxprune.sweep import checkpoint, make_spec, run_sweep

#: Minutes between checkpoints by default, and between those that are timed.
DEFAULT, TIMED = 10.0, 0.1
TABLE: dict[str, Any] = {
    'name': 'cost',
    'model': {'name': 'lenet300100'},
    'data': {'name': 'mnist_small'},
    'train': {'epochs': 100, 'batch_size': 50, 'momentum': 0.9},
    'grid': {'method': ['magnitude'], 'compression': [2], 'seed': [0, 1, 2, 3]},
    'engine': {'chunk': 4},
}


class Cost(NamedTuple):
    """Seconds of a chunk.

    Attributes:
      seconds: from its first step to its tables, compilation included.
      saves: of each save, in order.
      megabytes: of the last checkpoint.
    """

    seconds: float
    saves: list[float]
    megabytes: float


def checkpoint_cost(epochs: int, minutes: float = TIMED) -> Cost:
    """Trains a chunk of four LeNet-300-100 and times its checkpoints."""
    table = {**TABLE, 'train': {**TABLE['train'], 'epochs': epochs}}
    table['engine'] = {**TABLE['engine'], 'checkpoint_minutes': minutes}
    with tempfile.TemporaryDirectory() as folder, _timed() as (saves, sizes):
        began = time.perf_counter()
        run_sweep(make_spec(table), Path(folder) / 'out')
        seconds = time.perf_counter() - began
    return Cost(seconds, saves, sizes[-1] if sizes else 0.0)


def share_by_default(cost: Cost) -> float:
    """The part of the time that saving takes with a checkpoint every ten minutes."""
    save = statistics.mean(cost.saves)
    return save / (60 * DEFAULT + save)


@contextlib.contextmanager
def _timed() -> Iterator[tuple[list[float], list[float]]]:
    """Lists of the seconds and the megabytes of each save, while it is open."""
    real, saves, sizes = checkpoint.checkpoint, [], []

    def timed(folder, attempt, piece, *rest):
        made = real(folder, attempt, piece, *rest)

        def save(saved) -> None:
            began = time.perf_counter()
            made.save(saved)
            saves.append(time.perf_counter() - began)
            files = (folder / attempt / piece).rglob('*')
            sizes.append(sum(p.stat().st_size for p in files if p.is_file()) / 1e6)

        return made._replace(save=save)

    checkpoint.checkpoint = timed
    try:
        yield saves, sizes
    finally:
        checkpoint.checkpoint = real
