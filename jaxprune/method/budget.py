"""Selection by what is left of a network's parameters or operations, not by a number of groups."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.allocation import bounds, check_density
from jaxprune.errors import PruneError
from jaxprune.method.granularity import counted_as
from jaxprune.plan import Plan, plan_rounds
from jaxprune.schedule import schedule
from jaxprune.select import global_top_k, in_multiples
from jaxprune.structure import COSTS
from jaxprune.types import GLOBAL, Counts, Groups, Masks, Scores, SelectFn

#: Shares are sums of products in float32.
_ROUNDING = 1e-6


def within_share(
    groups: Groups, cost: str, multiple: int = 1, fewest: Mapping[str, int] | None = None
) -> SelectFn:
    """Keeps the best groups of one ranking, as many as cost no more than a share of the network.

    The number is found by bisection: more groups never cost less.

    Args:
      groups: coupled groups.
      cost: one of `COSTS`.
      multiple: of so many groups every layer keeps a multiple, rounded up.
      fewest: layer -> groups that it keeps at least; the scores are those of `within_bounds`.

    Returns:
      A selection whose counts are `{cost: share}`. If a share is too small even for the few groups
      that every layer keeps, it keeps those.
    """
    select = in_multiples(global_top_k, multiple)
    total = sum(shape[0] for shape in groups.shapes.values())
    least = sum(fewest.values()) if fewest else len(groups.shapes)

    def selected(scores: Scores, counts: Counts) -> Masks:
        shares, wanted = groups.shares(), counts[cost] * (1 + _ROUNDING)

        def fits(number: jax.Array) -> jax.Array:
            return shares(select(scores, {GLOBAL: number}))[cost] <= wanted

        def narrower(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = bounds
            middle = (low + high + 1) // 2
            good = fits(middle)
            return jnp.where(good, middle, low), jnp.where(good, high, middle - 1)

        bounds = jnp.int32(least), jnp.int32(total)
        number, _ = jax.lax.fori_loop(0, total.bit_length(), narrower, bounds)
        return select(scores, {GLOBAL: number})

    return selected


def plan_groups(
    groups: Groups,
    density: float,
    *,
    cost: str = '',
    allocation: str = 'global',
    floor: Any = 0,
    cap: Any = 1.0,
    multiple: int = 1,
    **by_round: Any,
) -> Plan:
    """The rounds of a method, for any kind of groups.

    Args:
      groups: what competes.
      density: the share of them that is left, or of the network's cost.
      cost: one of `COSTS`; '' counts groups.
      allocation, floor, cap: see `plan.plan_rounds`.
      multiple: of so many groups every layer keeps a multiple, rounded up.
      **by_round: rounds, density_schedule and steps of `plan.plan_rounds`.

    Returns:
      Where a cost counts, `counts` has shares of it, float32, under its name.

    Raises:
      PruneError: see `plan.plan_rounds`; a share that cannot be, since every layer keeps some
        groups.
    """
    if not cost:
        what = counted_as(groups.kind)
        return plan_rounds(
            groups.shapes, density, allocation=allocation, floor=floor, cap=cap, what=what,
            **by_round,
        )  # fmt: skip
    check_density(density)
    fewest = bounds(groups.shapes, floor, 1.0)[0]
    few = {}
    for name, (size,) in groups.shapes.items():
        least = max(fewest[name], 1, min(multiple, size))
        few[name] = np.arange(size) < -(-least // multiple) * multiple
    smallest = float(groups.shares()(few)[cost])
    if smallest > density * (1 + _ROUNDING):
        raise PruneError(
            f'density {density:.3g} of the {cost} cannot be met: with the fewest groups that '
            f'layers keep, it is {smallest:.3g}'
        )
    rounds, steps = by_round['rounds'], by_round['steps']
    shares = np.array(schedule(by_round['density_schedule'])(density, rounds), np.float32)
    return Plan(np.array(steps, np.int32), {cost: shares})


def cost_of(target: str) -> str:
    """The cost that a target counts; '' if it counts something else."""
    return target if target in COSTS else ''
