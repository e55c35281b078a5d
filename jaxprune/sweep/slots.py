"""How the rows of a chunk are held on the devices: in slots, each what one compiled call takes.

A slot is all rows of a chunk, or a row per place on the run axis where runs are unrolled.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxprune.sweep.layout import on_host
from jaxprune.sweep.strategy import Strategy
from jaxprune.types import PyTree


class Slots(NamedTuple):
    """Moves rows between slots and host.

    Attributes:
      places: rows that are computed side by side, one per place on the run axis.
      of: `runs -> ranges of rows`, one per slot.
      take: `(tree, rows) -> tree` with these rows, on the devices.
      place: `(tree, at, rows) -> tree` with rows replaced; the tree handed in is used up.
      split: `stacked tree -> ` a tree per slot, on the devices.
      join: a tree per slot `-> ` host arrays with a leading run axis.
    """

    places: int
    of: Callable[[int], list[range]]
    take: Callable[[PyTree, Any], PyTree]
    place: Callable[[PyTree, Any, PyTree], PyTree]
    split: Callable[[PyTree], list[PyTree]]
    join: Callable[[Sequence[PyTree]], PyTree]


def make_slots(strategy: Strategy, mesh: Mesh) -> Slots:
    """The slots of a strategy on a mesh."""
    places = mesh.shape['run']
    by_run = NamedSharding(mesh, P('run'))
    take = jax.jit(lambda tree, at: jax.tree.map(lambda leaf: leaf[at], tree), out_shardings=by_run)
    place = jax.jit(
        lambda tree, at, rows: jax.tree.map(lambda leaf, row: leaf.at[at].set(row), tree, rows),
        donate_argnums=0,
        out_shardings=by_run,
    )

    def of(runs: int) -> list[range]:
        size = places if strategy.batching == 'unroll' else runs
        return [range(first, first + size) for first in range(0, runs, size)]

    def split(stacked: PyTree) -> list[PyTree]:
        runs = len(jax.tree.leaves(stacked)[0])
        return [
            jax.device_put(jax.tree.map(lambda leaf, s=s: leaf[s.start : s.stop], stacked), by_run)
            for s in of(runs)
        ]

    def join(slots: Sequence[PyTree]) -> PyTree:
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *on_host(list(slots)))

    return Slots(places, of, take, place, split, join)


def in_parts(at: Sequence[int], at_once: int) -> list[tuple[np.ndarray, int]]:
    """Rows by so many at once, the last repeated to fill up; and how many of each part are real."""
    parts = [np.asarray(at[first : first + at_once]) for first in range(0, len(at), at_once)]
    return [
        (np.concatenate([part, np.repeat(part[-1:], at_once - len(part))]), len(part))
        for part in parts
    ]
