"""The functions that factories of this package return: what is measured, and of what."""

from typing import Protocol, TypeVar

from jaxprune.types import Batches, Key, Masks, View

_Result = TypeVar('_Result', covariant=True)


class MeasureFn(Protocol[_Result]):
    def __call__(self, key: Key, view: View, batches: Batches | None) -> _Result:
        """Measures a network; pure, for `jit` and `vmap`.

        Args:
          key: for random probes and dropout; the same key gives the same result.
          view: the network, with its masks.
          batches: data, leaves `(n, batch, ...)`; None where the measure needs none.
        """


class MaskMeasureFn(Protocol[_Result]):
    def __call__(self, key: Key, view: View, masks: Masks, batches: Batches | None) -> _Result:
        """Measures what new masks would do to a network; pure, for `jit` and `vmap`.

        Args:
          key: for dropout; the same key gives the same result.
          view: the network before.
          masks: what it would be pruned to, path -> bool.
          batches: data, leaves `(n, batch, ...)`.
        """
