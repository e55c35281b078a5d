"""What a call of `jp.prune` says about what it did."""

import math
from typing import NamedTuple

import jax

from jaxprune import tree
from jaxprune.structure import Connect, Cost
from jaxprune.types import Masks, PyTree


class Leaf(NamedTuple):
    """What became of one prunable leaf.

    Attributes:
      path: its path.
      size: how many weights it has.
      kept: how many the mask keeps.
      active: how many of these lie on a path from input to output; None if unknown.
    """

    path: str
    size: int
    kept: int
    active: int | None


class Report(NamedTuple):
    """What a call of `prune` did; print it.

    Attributes:
      method: name of the method.
      leaves: one entry per prunable leaf, in forward order where that is known.
      untouched: paths of the parameters that no mask can touch.
      collapsed: paths of the leaves without any weight left.
      density: weights kept / weights before.
      compression: its inverse.
      effective_compression: weights before / weights on a path from input to output; None if
        unknown, infinite if the network is cut in two.
      note: what else there is to know, such as why paths were not followed; or ''.
      dense_cost: what the model costs for one example, pruned or not; None if unknown.
      compact_cost: what it costs when the groups that are pruned as a whole are cut out, see
        `jp.compact`; None if they cannot be: one still acts, say by its bias, no path is left, or
        the model cannot be read, see `note`.
    """

    method: str
    leaves: tuple[Leaf, ...]
    untouched: tuple[str, ...]
    collapsed: tuple[str, ...]
    density: float
    compression: float
    effective_compression: float | None
    note: str
    dense_cost: Cost | None = None
    compact_cost: Cost | None = None

    def __str__(self) -> str:
        width = max(len(leaf.path) for leaf in self.leaves)
        lines = [f'{"leaf":{width}}  {"weights":>12} {"kept":>12} {"density":>8} {"active":>12}']
        for leaf in self.leaves:
            active = '-' if leaf.active is None else f'{leaf.active:,}'
            share = f'{leaf.kept / leaf.size:.4f}' if leaf.size else '-'
            lines.append(
                f'{leaf.path:{width}}  {leaf.size:>12,} {leaf.kept:>12,} {share:>8} {active:>12}'
            )
        effective = self.effective_compression
        lines.append(
            f'{self.method}: density {self.density:.6g}, compression {self.compression:.6g}'
            + ('' if effective is None else f', effective {effective:.6g}')
        )
        if self.dense_cost is not None:
            lines.append(_cost_line(self.dense_cost, self.compact_cost))
        if self.collapsed:
            lines.append(f'collapsed, no weight left: {", ".join(self.collapsed)}')
        if self.untouched:
            lines.append(f'untouched: {", ".join(self.untouched)}')
        return '\n'.join([*lines, self.note] if self.note else lines)


def report_of(
    name: str, params: PyTree, masks: Masks, shapes, connect: Connect | None, note: str
) -> Report:
    """The report of finished masks; `shapes` in the order in which to list them."""
    active = None if connect is None else jax.device_get(jax.jit(connect)(masks))
    leaves = tuple(
        Leaf(
            path,
            math.prod(shape),
            int(masks[path].sum()),
            None if active is None else int(active[path].sum()),
        )
        for path, shape in shapes.items()
    )
    size, kept = sum(leaf.size for leaf in leaves), sum(leaf.kept for leaf in leaves)
    working = None if active is None else sum(leaf.active for leaf in leaves)
    return Report(
        method=name,
        leaves=leaves,
        untouched=tuple(path for path, _ in tree.paths(params) if path not in shapes),
        collapsed=tuple(leaf.path for leaf in leaves if leaf.size and not leaf.kept),
        density=kept / size,
        compression=_ratio(size, kept),
        effective_compression=None if working is None else _ratio(size, working),
        note=note,
    )


def _cost_line(dense: Cost, smaller: Cost | None) -> str:
    line = f'one example: {dense.macs:,} MACs, {dense.params:,} parameters'
    if smaller is None:
        return f'{line}; pruned groups cannot be cut out as they are'
    return f'{line}; with pruned groups cut out {smaller.macs:,} and {smaller.params:,}'


def _ratio(before: int, after: int) -> float:
    return before / after if after else math.inf
