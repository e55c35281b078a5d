"""Unfinished chunks, saved at ends of epochs: an interruption costs minutes and not a chunk.

    DIR/checkpoints/<chunk>/<attempt>/<first>-<count>/<step>      on a disk
    DIR/checkpoints/<chunk>/<attempt>/<first>-<count>/<step>.tar  in an object store

Orbax writes them: a checkpoint appears whole or not at all. Only the runs themselves are saved, no
padding, so another number of devices may go on where these stopped. Every attempt at a chunk saves
in a folder of its own: a process that was frozen and its successor may write at once.
"""

import contextlib
import io
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune import files
from jaxprune.errors import WriteError, first_line
from jaxprune.sweep import store
from jaxprune.sweep.processes import agreed, agreed_arrays, is_lead
from jaxprune.types import PyTree

#: Of several epochs: steps, and each run's mean training loss.
Losses = list[tuple[int, np.ndarray]]


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
    losses: Losses
    records: list[dict[str, Any]]
    curves: list[list]
    flow: list[list]


class Checkpoint(NamedTuple):
    """Where a chunk is saved.

    Attributes:
      load: `(step -> abstract (states, anchor)) -> Saved`, or None where nothing is saved.
      due: is it time to save again?
      save: saves, replacing what this attempt saved before.
    """

    load: Callable[[Callable[[int], PyTree]], Saved | None]
    due: Callable[[], bool]
    save: Callable[[Saved], None]


class Place(NamedTuple):
    """A saved piece of a chunk.

    Attributes:
      step: after how many steps.
      attempt: who saved it.
      path: where: a folder, or one packed file.
    """

    step: int
    attempt: str
    path: Path


def nowhere() -> Checkpoint:
    """Saves nothing."""
    return Checkpoint(lambda abstract_of: None, lambda: False, lambda saved: None)


def every(minutes: float) -> tuple[Callable[[], bool], Callable[[], None]]:
    """`(due, done)`: have so many minutes passed since the last call of `done`? Never for 0."""
    last = [time.monotonic()]

    def done() -> None:
        last[0] = time.monotonic()

    return lambda: minutes > 0 and time.monotonic() - last[0] >= 60 * minutes, done


def checkpoint(
    folder: Path,
    attempt: str,
    piece: str,
    timer: tuple[Callable[[], bool], Callable[[], None]],
    note: Callable[[str], None] = lambda text: None,
) -> Checkpoint:
    """Saves a piece of a chunk, and finds what any attempt saved of it last.

    Orbax loads only when there is something to save or to restore: short chunks never wait for it.

    Args:
      folder: of the chunk.
      attempt: whose folder to save in.
      piece: which of the chunk's runs.
      timer: from `every`, shared by all pieces.
      note: gets a line on a checkpoint that cannot be read; an older one is then taken, or none.
    """
    due, done = timer
    own = folder / attempt / piece

    def load(abstract_of: Callable[[int], PyTree]) -> Saved | None:
        for place in reversed(saved_places(folder, piece)):
            try:
                with _unpacked(place) as directory:
                    return _restored(directory, place.step, abstract_of)
            except Exception as error:  # whatever Orbax, a disk or a network raises
                note(f'{place.path}: cannot be restored ({first_line(error)}); it is left out')
        return None

    def save(saved: Saved) -> None:
        try:
            if files.is_remote(folder):
                with tempfile.TemporaryDirectory() as there:
                    _save(Path(there), saved)
                    store.write_bytes(own / f'{saved.step}.tar', _packed(Path(there)))
                _forget(own, saved.step)
            else:
                _save(own.absolute(), saved)  # orbax insists
            _forget_before(folder, attempt, piece, saved.step)
        except (OSError, ValueError) as error:  # TensorStore's, also of full disks
            raise WriteError(f'{own}: cannot be written ({first_line(error)})') from error
        done()

    return Checkpoint(load, due, save)


def by_lead(saved: Checkpoint) -> Checkpoint:
    """The same for several processes: the lead reads and writes, the others get what it read."""
    if jax.process_count() == 1:
        return saved

    def load(abstract_of: Callable[[int], PyTree]) -> Saved | None:
        found = saved.load(abstract_of) if is_lead() else None
        step = agreed(found.step if found else -1)
        if step < 0:
            return None
        abstract = abstract_of(step)
        arrays = agreed_arrays((found.states, found.anchor) if found else None, abstract)
        errors, losses = agreed(found and (found.errors, _as_lists(found.losses)))
        rows = (found.records, found.curves, found.flow) if found else ([], [], [])
        return Saved(step, *arrays, errors, _as_arrays(losses), *rows)

    def save(made: Saved) -> None:
        if is_lead():
            saved.save(made)

    return Checkpoint(load, saved.due, save)


def remove(path: Path) -> None:
    """Deletes a folder with all in it, or a packed checkpoint, if it is there."""
    if files.is_remote(path):
        with contextlib.suppress(FileNotFoundError):
            path.fs.rm(path.path, recursive=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def saved_places(folder: Path, piece: str) -> list[Place]:
    """What any attempt saved of a piece, the last step last. Reads names only."""
    found = []
    for attempt in store.listed(folder):
        for path in store.listed(attempt / piece):
            number = path.name.removesuffix('.tar')
            if number.isdigit():  # else it is being written
                found.append(Place(int(number), attempt.name, path))
    return sorted(found, key=lambda place: (place.step, place.attempt))


def saved_pieces(folder: Path) -> dict[str, int]:
    """Piece -> after how many steps it was saved last."""
    names = {piece.name for attempt in store.listed(folder) for piece in store.listed(attempt)}
    places = {name: saved_places(folder, name) for name in sorted(names)}
    return {name: found[-1].step for name, found in places.items() if found}


def _save(directory: Path, saved: Saved) -> None:
    numbers = saved._asdict()
    arrays = jax.tree.leaves((numbers.pop('states'), numbers.pop('anchor')))
    numbers['losses'] = _as_lists(saved.losses)
    with _manager(directory) as manager:
        manager.save(saved.step, args=_args('Save', arrays, numbers))


def _restored(directory: Path, step: int, abstract_of: Callable[[int], PyTree]) -> Saved:
    leaves, structure = jax.tree.flatten(abstract_of(step))
    args = _args('Restore', [np.zeros(leaf.shape, leaf.dtype) for leaf in leaves], None)
    with _manager(directory) as manager:
        found = manager.restore(step, args=args)
    numbers = found['progress']
    states = structure.unflatten([found['states'][name] for name in _names(leaves)])
    numbers['losses'] = _as_arrays(numbers['losses'])
    return Saved(states=states[0], anchor=states[1], **numbers)


@contextlib.contextmanager
def _unpacked(place: Place) -> Iterator[Path]:
    """The folder that Orbax saved in."""
    if not place.path.name.endswith('.tar'):
        yield place.path.parent.absolute()
        return
    with tempfile.TemporaryDirectory() as there:
        with tarfile.open(fileobj=io.BytesIO(place.path.read_bytes())) as packed:
            packed.extractall(there, filter='data')
        yield Path(there)


def _packed(directory: Path) -> bytes:
    """All that is in a folder, as one file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as packed:
        packed.add(directory, arcname='.')
    return buffer.getvalue()


def _forget(own: Path, step: int) -> None:
    """Deletes what this attempt packed before."""
    for path in store.listed(own):
        if path.name != f'{step}.tar':
            path.unlink(missing_ok=True)


def _forget_before(folder: Path, attempt: str, piece: str, step: int) -> None:
    """Deletes what other attempts saved of a piece up to a step: a chunk that is interrupted every
    hour would fill the disk. A process that comes back from a freeze saves in its folder anew."""
    for place in saved_places(folder, piece):
        if place.attempt != attempt and place.step <= step:
            remove(place.path)


def _as_lists(losses: Losses) -> list[tuple[int, list[float]]]:
    """Losses as JSON can hold them."""
    return [(steps, np.asarray(each).tolist()) for steps, each in losses]


def _as_arrays(losses: list) -> Losses:
    """The way back."""
    return [(steps, np.array(each, np.float32)) for steps, each in losses]


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
