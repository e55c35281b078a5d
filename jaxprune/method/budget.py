"""Selection by what is left of a network's parameters or operations, not by a number of groups."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.errors import PruneError
from jaxprune.plan import Plan
from jaxprune.schedule import schedule
from jaxprune.select import global_top_k, in_multiples
from jaxprune.structure import SHARES
from jaxprune.types import GLOBAL, Counts, Groups, Masks, Scores, SelectFn

#: Shares are sums of products in float32.
_ROUNDING = 1e-6


def within_share(groups: Groups, cost: str, multiple: int = 1) -> SelectFn:
    """Keeps the best groups of one ranking, as many as cost no more than a share of the network.

    The number is found by bisection: more groups never cost less.

    Args:
      groups: coupled groups.
      cost: one of `SHARES`.
      multiple: of so many groups every layer keeps a multiple, rounded up.

    Returns:
      A selection whose counts are `{cost: share}`. If a share is too small even for the few groups
      that every layer keeps, it keeps those.
    """
    select = in_multiples(global_top_k, multiple)
    total = sum(shape[0] for shape in groups.shapes.values())

    def selected(scores: Scores, counts: Counts) -> Masks:
        shares, wanted = groups.shares(), counts[cost] * (1 + _ROUNDING)

        def fits(number: jax.Array) -> jax.Array:
            return shares(select(scores, {GLOBAL: number}))[cost] <= wanted

        def narrower(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = bounds
            middle = (low + high + 1) // 2
            good = fits(middle)
            return jnp.where(good, middle, low), jnp.where(good, high, middle - 1)

        least = jnp.int32(min(len(groups.shapes), total))
        bounds = least, jnp.int32(total)
        number, _ = jax.lax.fori_loop(0, total.bit_length(), narrower, bounds)
        return select(scores, {GLOBAL: number})

    return selected


def plan_shares(
    groups: Groups,
    density: float,
    cost: str,
    *,
    rounds: int,
    density_schedule: str,
    steps: Sequence[int],
    least: int = 1,
) -> Plan:
    """The rounds of a method that counts parameters or operations.

    Args:
      groups: coupled groups.
      density: the share of the network's cost that is left.
      cost: one of `SHARES`.
      rounds, density_schedule, steps: see `plan.plan_rounds`.
      least: groups that every layer keeps.

    Returns:
      `counts` has shares, float32, under the name of the cost.

    Raises:
      PruneError: a share that cannot be, since every layer keeps some groups.
    """
    few = {name: np.arange(shape[0]) < least for name, shape in groups.shapes.items()}
    smallest = float(groups.shares()(few)[cost])
    if smallest > density * (1 + _ROUNDING):
        raise PruneError(
            f'density {density:.3g} of the {cost} cannot be met: with {least} groups left of every '
            f'layer that may lose some, it is {smallest:.3g}'
        )
    shares = np.array(schedule(density_schedule)(density, rounds), np.float32)
    return Plan(np.array(steps, np.int32), {cost: shares})


def check_cost(cost: str) -> None:
    """Raises PruneError unless it is '' or one of `SHARES`."""
    if cost and cost not in SHARES:
        raise PruneError(f'cost: expected one of {", ".join(SHARES)}, not {cost!r}')
