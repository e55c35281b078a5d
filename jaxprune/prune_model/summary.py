"""What a call of `jp.prune` says about what it did."""

import math
from typing import NamedTuple

import jax

from jaxprune import tree
from jaxprune.structure import Connect
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
    """

    method: str
    leaves: tuple[Leaf, ...]
    untouched: tuple[str, ...]
    collapsed: tuple[str, ...]
    density: float
    compression: float
    effective_compression: float | None
    note: str

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


def _ratio(before: int, after: int) -> float:
    return before / after if after else math.inf
