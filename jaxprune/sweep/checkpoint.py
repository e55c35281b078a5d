"""Unfinished chunks, saved at ends of epochs: an interruption costs minutes and not a chunk.

Orbax writes them: a checkpoint appears whole or not at all. Only the runs themselves are saved, no
padding, so another number of devices may go on where these stopped.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune.errors import StoreError, first_line
from jaxprune.types import PyTree


class Saved(NamedTuple):
    """A chunk after some of its steps, all that is due there done.

    Attributes:
      step: how many steps are taken.
      states: the runs' states, host arrays with a leading run axis, what methods carry included.
      anchor: the states to rewind to, or None.
      errors: what was wrong with each run's scores, None if nothing.
      losses: per epoch since the last evaluation, its steps and each run's mean training loss.
      records: the result rows so far.
      curves: the curves rows so far.
      flow: the flow rows so far.
    """

    step: int
    states: PyTree
    anchor: PyTree | None
    errors: list[str | None]
    losses: list[tuple[int, np.ndarray]]
    records: list[dict[str, Any]]
    curves: list[list]
    flow: list[list]


class Checkpoint(NamedTuple):
    """Where a chunk is saved.

    Attributes:
      load: `(step -> abstract (states, anchor)) -> Saved`, or None where nothing is saved.
      due: is it time to save again?
      save: saves, replacing what was saved before.
      remove: deletes what is saved, once the chunk's results are stored.
    """

    load: Callable[[Callable[[int], PyTree]], Saved | None]
    due: Callable[[], bool]
    save: Callable[[Saved], None]
    remove: Callable[[], None]


def nowhere() -> Checkpoint:
    """Saves nothing."""
    return Checkpoint(lambda abstract_of: None, lambda: False, lambda saved: None, lambda: None)


def checkpoint(directory: Path, minutes: float) -> Checkpoint:
    """Saves in a directory every so many minutes; 0 saves nothing new.

    Orbax loads only when there is something to save or to restore: short chunks never wait for it.
    """
    directory = directory.absolute()  # orbax insists
    last = time.monotonic()

    def load(abstract_of: Callable[[int], PyTree]) -> Saved | None:
        if not directory.exists():
            return None
        try:
            with _manager(directory) as manager:
                step = manager.latest_step()
                if step is None:
                    return None
                leaves, structure = jax.tree.flatten(abstract_of(step))
                args = _args('Restore', [np.zeros(leaf.shape, leaf.dtype) for leaf in leaves], None)
                found = manager.restore(step, args=args)
        except Exception as error:
            raise StoreError(
                f'{directory}: cannot be restored ({first_line(error)}); delete it to '
                'start its chunk again'
            ) from error
        numbers = found['progress']
        states = structure.unflatten([found['states'][name] for name in _names(leaves)])
        numbers['losses'] = [(n, np.array(loss, np.float32)) for n, loss in numbers['losses']]
        return Saved(states=states[0], anchor=states[1], **numbers)

    def due() -> bool:
        return minutes > 0 and time.monotonic() - last >= 60 * minutes

    def save(saved: Saved) -> None:
        nonlocal last
        numbers = saved._asdict()
        arrays = jax.tree.leaves((numbers.pop('states'), numbers.pop('anchor')))
        numbers['losses'] = [(n, np.asarray(loss).tolist()) for n, loss in saved.losses]
        with _manager(directory) as manager:
            manager.save(saved.step, args=_args('Save', arrays, numbers))
        last = time.monotonic()

    return Checkpoint(load, due, save, lambda: shutil.rmtree(directory, ignore_errors=True))


def saved_step(directory: Path) -> int:
    """After how many steps a chunk was saved last; 0 if it is not saved. Reads names only."""
    steps = directory.iterdir() if directory.is_dir() else ()
    return max((int(step.name) for step in steps if step.name.isdigit()), default=0)


def _names(leaves: list) -> list[str]:
    return [f'{i:05}' for i in range(len(leaves))]


def _args(kind: str, leaves: list, numbers: dict | None):
    """Orbax's arguments to save or restore: arrays by number, all else as JSON."""
    import orbax.checkpoint as ocp

    arrays = dict(zip(_names(leaves), map(np.asarray, leaves), strict=True))
    return ocp.args.Composite(
        states=getattr(ocp.args, f'Standard{kind}')(arrays),
        progress=getattr(ocp.args, f'Json{kind}')(*([] if numbers is None else [numbers])),
    )


def _manager(directory: Path):
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return ocp.CheckpointManager(directory, options=options)
