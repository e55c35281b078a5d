"""The quantities a specification may record along training. To add one: a file, a line, a test."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxprune.errors import PruneError, nearest
from jaxprune.flow.norms import gradient_norm, weight_norm
from jaxprune.types import Batch, Key, Problem, View

Measure = Callable[[Key, View, Batch | None], dict[str, jax.Array]]


class Quantity(NamedTuple):
    """A quantity's name card.

    Attributes:
      make: `problem -> measure`.
      needs_data: does it look at batches?
    """

    make: Callable[[Problem], Measure]
    needs_data: bool = False


QUANTITIES: dict[str, Quantity] = {
    'weight_norm': Quantity(weight_norm),
    'gradient_norm': Quantity(gradient_norm, needs_data=True),
}


def quantity(name: str) -> Quantity:
    """The name card of a quantity."""
    if name not in QUANTITIES:
        raise PruneError(f"unknown quantity '{name}': {nearest(name, QUANTITIES)}")
    return QUANTITIES[name]
