"""Paths of largest product through a layered graph, one after the other: an order of its edges.

Host code in NumPy. An edge leads from what a layer reads to what it makes, so a layer is a matrix,
and a path takes at most one edge of it. The order is that of LEAN (Schoonhoven, Hendriksen, Pelt &
Batenburg, 2020, arXiv:2011.06923): the edges of the best path first, then those of the best path
of what is left, and so on.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Link(NamedTuple):
    """Channels of an earlier layer that a layer reads.

    Attributes:
      layer: the number of the earlier layer.
      made: `(n,)`, channels that it makes; None for all of them, into everything that is read.
      read: `(n,)`, the place at which each is read, in the flat `(groups, inputs)`; each at most
        once.
    """

    layer: int
    made: np.ndarray | None
    read: np.ndarray | None


class Layer(NamedTuple):
    """A matrix of edges.

    Attributes:
      edges: `(inputs, outputs)`, the number of each edge. An edge may be in several layers: those
        that use one kernel have the same numbers, possibly transposed.
      groups: outputs come in that many parts, one after the other; each reads inputs of its own.
      links: where its inputs come from, earlier layers first. An input without a link begins paths.
    """

    edges: np.ndarray
    groups: int
    links: tuple[Link, ...]


def path_order(
    layers: Sequence[Layer],
    weights: Sequence[np.ndarray],
    gains: Sequence[Sequence[np.ndarray | None]] | None = None,
) -> np.ndarray:
    """The order in which edges are kept.

    A path's value is the product of its weights. It may begin and end anywhere, and what comes
    before an edge is dropped where the product would fall below 1. Of equal paths the first wins:
    that with the lowest last layer, its lowest output, and so on back to the beginning. When no
    path has a product of 1 or more the edges that are left follow, the largest weights first.

    The search is a dynamic programme over layers. After a path is taken out, only outputs whose
    best way led through it are computed again; the others cannot have changed.

    Args:
      layers: in forward order.
      weights: of each layer `(inputs, outputs)`, 0 or more; NaN and infinity count as 0.
      gains: of each link `(n,)`, or one for all that is read where it leads to all: what a product
        is multiplied by on its way there; None for 1.

    Returns:
      `(edges,)`, the numbers of all edges, first kept first.
    """
    search = _Search(layers, weights, gains or [[None] * len(layer.links) for layer in layers])
    order: list[int] = []
    taken = np.zeros(1 + max(int(layer.edges.max(initial=-1)) for layer in layers), bool)
    for path in search.paths():
        new = [edge for edge in dict.fromkeys(path) if not taken[edge]]
        taken[new] = True
        order += new
    largest = np.zeros(len(taken))
    for layer, own in zip(layers, weights, strict=True):
        np.maximum.at(largest, layer.edges, _finite(own))
    rest = np.flatnonzero(~taken)
    rest = rest[np.argsort(-largest[rest], kind='stable')]
    return np.concatenate([np.array(order, np.int64), rest])


class _Search:
    """The state of a search: binary logarithms of the best products that end at each channel.

    Attributes (lists over layers):
      weights: `(outputs, inputs)`, logarithms; -inf for edges that are gone.
      gains: of each link, logarithms.
      value: `(outputs,)`, the best product of 1 or more that ends there; -inf where none does.
      via: `(outputs,)`, the input that it comes from; -1 where no path ends.
      into: `(groups, inputs)`, the best product that arrives, 0 for a path that begins.
      link: `(groups, inputs)`, the link that it comes by; -1 where a path begins.
      top: the best of `value` and where it is: `(value, output)`; -inf without a path.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        weights: Sequence[np.ndarray],
        gains: Sequence[Sequence[np.ndarray | None]],
    ) -> None:
        self.layers = layers
        with np.errstate(divide='ignore'):
            self.weights = [np.log2(_finite(w)).T.copy() for w in weights]
            self.gains = [[0 if g is None else np.log2(_finite(g)) for g in own] for own in gains]
        self.uses = _uses(layers)
        self.value = [np.full(w.shape[0], -np.inf) for w in self.weights]
        self.via = [np.full(w.shape[0], -1) for w in self.weights]
        pairs = zip(layers, self.weights, strict=True)
        self.into = [np.zeros((layer.groups, w.shape[1])) for layer, w in pairs]
        self.link = [np.full(into.shape, -1) for into in self.into]
        self.top = [(-np.inf, 0)] * len(layers)
        for i in range(len(layers)):
            self._arrive(i)
            self._renew(i, np.arange(len(self.value[i])))

    def paths(self) -> Iterator[list[int]]:
        """The edges of each path, from its beginning, until there is none."""
        while True:
            best = max(range(len(self.top)), key=lambda i: self.top[i][0], default=-1)
            if best < 0 or self.top[best][0] == -np.inf:
                return
            steps = self._back(best, self.top[best][1])
            yield [int(self.layers[i].edges[k, o]) for i, k, o in steps]
            self._remove(steps)

    def _back(self, layer: int, output: int) -> list[tuple[int, int, int]]:
        """The path that ends at an output: `(layer, input, output)` of each edge."""
        steps = []
        while (k := int(self.via[layer][output])) >= 0:
            steps.append((layer, k, output))
            group = self._group(layer, output)
            number = int(self.link[layer][group, k])
            if number < 0:
                break
            link = self.layers[layer].links[number]
            flat = group * self.into[layer].shape[1] + k
            layer, made = link.layer, link.made
            if made is None:
                output = int(np.argmax(self.value[layer]))
            else:
                output = int(made[np.flatnonzero(link.read == flat)[0]])
        return steps[::-1]

    def _group(self, layer: int, output: int) -> int:
        return output * self.layers[layer].groups // len(self.value[layer])

    def _remove(self, steps: Sequence[tuple[int, int, int]]) -> None:
        """Takes edges out, and brings up to date what depends on them."""
        stale: dict[int, set[int]] = {}
        for layer, k, output in steps:
            for other, turned in self.uses[layer]:
                row, column = (k, output) if turned else (output, k)
                self.weights[other][row, column] = -np.inf
                stale.setdefault(other, set()).add(row)
        moved: set[int] = set()
        first = min(stale)
        for i in range(first, len(self.layers)):
            rows = np.array(sorted(stale.get(i, ())), np.int64)
            if any(link.layer in moved for link in self.layers[i].links):
                before = self.into[i].copy()
                self._arrive(i)
                changed = self.into[i] != before
                rows = np.union1d(rows, self._leading(i, changed))
            if len(rows) and self._renew(i, rows):
                moved.add(i)

    def _leading(self, i: int, changed: np.ndarray) -> np.ndarray:
        """The outputs whose best way comes from inputs that changed."""
        via, groups = self.via[i], self.layers[i].groups
        group = np.arange(len(via)) * groups // len(via)
        return np.flatnonzero((via >= 0) & changed[group, via])

    def _arrive(self, i: int) -> None:
        """What comes to a layer's inputs."""
        into, source = self.into[i].reshape(-1), self.link[i].reshape(-1)
        into[:], source[:] = 0.0, -1
        for number, (link, gain) in enumerate(
            zip(self.layers[i].links, self.gains[i], strict=True)
        ):
            value = self.value[link.layer]
            if link.made is None:
                value, at = value.max(initial=-np.inf), slice(None)
            else:
                value, at = value[link.made], link.read
            value = value + gain
            better = into[at] < value
            into[at] = np.where(better, value, into[at])
            source[at] = np.where(better, number, source[at])

    def _renew(self, i: int, rows: np.ndarray) -> bool:
        """Computes some outputs; did the product of any of them change?"""
        groups, outputs = self.layers[i].groups, len(self.value[i])
        into = self.into[i] if groups == 1 else self.into[i][rows * groups // outputs]
        ways = self.weights[i][rows] + into
        if not ways.size:
            return False
        via = ways.argmax(1)
        value = ways[np.arange(len(rows)), via]
        path = value >= 0
        before = self.value[i][rows]
        self.value[i][rows] = np.where(path, value, -np.inf)
        self.via[i][rows] = np.where(path, via, -1)
        best = int(self.value[i].argmax())
        self.top[i] = (float(self.value[i][best]), best)
        return bool((self.value[i][rows] != before).any())


def _finite(weights: np.ndarray) -> np.ndarray:
    return np.nan_to_num(np.asarray(weights, np.float64), nan=0.0, posinf=0.0)


def _uses(layers: Sequence[Layer]) -> list[list[tuple[int, bool]]]:
    """For each layer those with the same edges, and whether they are transposed there."""
    made: list[list[tuple[int, bool]]] = []
    for layer in layers:
        own = layer.edges
        alike = []
        for k, other in enumerate(layers):
            if own.size and other.edges.size and own.flat[0] == other.edges.flat[0]:
                alike.append((k, not np.array_equal(own, other.edges)))
        made.append(alike or [(len(made), False)])
    return made
