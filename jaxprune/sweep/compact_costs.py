"""What a run's network would cost without the groups that its masks prune.

Which groups are gone is found with the masks, on the device; the rest is arithmetic of sizes.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import structure
from jaxprune.errors import PruneError
from jaxprune.structure import Cost, Family
from jaxprune.types import Masks

#: Columns of results rows.
COST_COLUMNS = ('params_compact', 'flops_compact', 'padded_flops_compact', 'speedup_theoretical')


class CompactCosts(NamedTuple):
    """How a program counts compact networks.

    Attributes:
      gone: masks -> family of groups -> bool `(groups,)`: it can be cut out, since nothing of what
        reads it is kept; for `jit` and `vmap`.
      columns: what `gone` gave for a run -> its columns of a results row.
    """

    gone: Callable[[Masks], dict[str, jax.Array]]
    columns: Callable[[Mapping[str, np.ndarray]], dict[str, Any]]


def unknown() -> CompactCosts:
    """For a network that cannot be read: no groups, and columns without numbers."""
    nothing = dict.fromkeys(COST_COLUMNS)
    return CompactCosts(lambda masks: {}, lambda gone: nothing)


def compact_costs(
    read: Callable[[], structure.Coupled], shapes: Mapping[str, tuple[int, ...]]
) -> CompactCosts:
    """Prepares the costs of compact networks, for one example.

    Args:
      read: reads the coupled groups of the network.
      shapes: path -> shape of every prunable leaf.
    """
    try:
        coupled = read()
        cost = structure.cost_of_kept(coupled)
    except PruneError:
        return unknown()
    silent = structure.silent_when_unread(coupled, shapes)
    families = [family for family in coupled.families if family.name in silent]
    dense = cost({})

    def gone(masks: Masks) -> dict[str, jax.Array]:
        return {family.name: _unread(family, masks) for family in families}

    def columns(found: Mapping[str, np.ndarray]) -> dict[str, Any]:
        if not found:
            return unknown().columns(found)
        small: Cost = cost({name: np.flatnonzero(lost) for name, lost in found.items()})
        return {
            'params_compact': small.params,
            'flops_compact': small.flops,
            'padded_flops_compact': small.padded_flops,
            'speedup_theoretical': dense.flops / small.flops if small.flops else float('inf'),
        }

    return CompactCosts(gone, columns)


def _unread(family: Family, masks: Masks) -> jax.Array:
    """Of each group, is nothing kept of the slices that read it?"""
    lost = jnp.ones(family.size, bool)
    for member in family.members:
        if member.role != 'in':
            continue
        mask = masks[member.path]
        lines = mask.any(tuple(i for i in range(mask.ndim) if i != member.axis))
        lost &= ~lines[np.stack(member.indices)].any(1)
    return lost
