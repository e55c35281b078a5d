"""Numbers of units by layer, where they are not the usual ones: networks that were made smaller."""

from collections.abc import Mapping
from typing import Any

from jaxprune.arguments import least
from jaxprune.errors import JaxpruneError, nearest, quoted, shown

#: Layer -> units as pairs, sorted by layer: modules have to be hashed.
LayerWidths = tuple[tuple[str, int], ...]

_KEY = 'model.layer_widths'


def pairs(table: Mapping[str, Any]) -> LayerWidths:
    """A table of widths as the networks take it.

    Raises:
      JaxpruneError: a width that is no whole number of at least 1.
    """
    if not isinstance(table, Mapping):
        raise JaxpruneError(f'{_KEY}: expected a table of layers, not {shown(table)}')
    least(1, **{f'{_KEY}.{layer}': units for layer, units in table.items()})
    return tuple(sorted(table.items()))


class Widths:
    """How many units each layer has, asked for while a network is set up.

        width = Widths(self.layer_widths)
        x = nn.Dense(width('dense_0', 300), name='dense_0')(x)
        width.check()

    A layer is named by its path in the parameters. The units of attention are its heads.
    """

    def __init__(self, given: LayerWidths):
        self._given = dict(given)
        self._layers: set[str] = set()

    def __call__(self, layer: str, usual: int) -> int:
        """The width of a layer that is free to choose."""
        self._layers.add(layer)
        return self._given.get(layer, usual)

    def following(self, layer: str, other: str, units: int) -> int:
        """The width of a layer that has as many units as another; to name it is to check it."""
        agree(layer, self(layer, units), other, units)
        return units

    def check(self) -> None:
        """Raises JaxpruneError if a width was given for a layer that there is not."""
        for layer in self._given:
            if layer not in self._layers:
                raise JaxpruneError(
                    f'{_KEY}: no layer {quoted(layer)} with a width of its own, '
                    f'{nearest(layer, self._layers)}'
                )


def agree(layer: str, units: int, other: str, others: int) -> None:
    """Raises JaxpruneError unless two layers have as many units."""
    if units != others:
        raise JaxpruneError(
            f'{_KEY}: {quoted(layer)} has {units} units and {quoted(other)} {others}: '
            'they have to agree'
        )
