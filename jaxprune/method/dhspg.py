"""DHSPG, the dual half-space projected gradient of OTOv2 (Chen et al., 2023, arXiv:2303.06862).

Redundant groups are chosen once. Only they are penalised, each as strongly as it needs to shrink
and no more than the loss allows, and only they are projected to zero.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxprune.arguments import positive
from jaxprune.method.half_space import (
    half_space_step,
    no_projections,
    second_stage,
    within_target,
)
from jaxprune.method.lasting import (
    Asked,
    Lasting,
    lasting,
    lowest,
    may_go,
    norms,
    reached,
    to_remove,
)
from jaxprune.method.own_slices import (
    PerGroup,
    Vectors,
    cosines,
    direction,
    of_unit_length,
    vectors,
)
from jaxprune.select import count_kept, divisible, layerwise_top_k
from jaxprune.types import GLOBAL, Hyper, Masks, Pruner, PyTree, Scores, StepHook


class Chosen(NamedTuple):
    """What DHSPG carries.

    Attributes:
      penalised: layer -> bool `(groups,)`.
      count: layer -> how many of its groups were projected to zero, int32.
    """

    penalised: Masks
    count: dict[str, jax.Array]


def dhspg(
    asked: Asked,
    *,
    penalty: ArrayLike = 1e-3,
    half_space: ArrayLike = 0.0,
    half_space_dense: ArrayLike = 0.0,
    second_at: ArrayLike = 0.0,
    tolerance: ArrayLike = 0.05,
    amplify: ArrayLike = 2.0,
    most_times: ArrayLike = 10.0,
    exact: bool = True,
) -> Pruner:
    """Penalises the redundant groups alone, until as many are zero as the target asks for.

    With x a group and v the direction of the optimizer's step, the step without penalty being
    `x - rate v`:

    - In the first step the groups with the largest `cos(x, v)` and the smallest mean size are
      chosen, each of the two terms divided by its length over all groups: as many as the target
      asks for, and `tolerance` of all groups more.
    - In each step `rate l x / |x|` is taken off them. l is `penalty` where v shrinks the group
      anyway; else `amplify` times what makes it shrink, at most `most_times penalty`, and below
      what would raise the loss, see `strength`.
    - In the second stage those that leave their half-space become zero.
    - Penalties and projections end when the target is reached.

    Args:
      asked: the groups, all zero-invariant, and when its rounds happen.
      penalty: 1e-3 for SGD and 1e-2 for Adam in the authors' code.
      half_space: epsilon of convolutions and heads, in [0, 1].
      half_space_dense: that of dense layers.
      second_at: where the second stage begins, as a share of the way from the first round to the
        last.
      tolerance: share of all groups that are penalised beyond the target.
      amplify: 2 for SGD and 20 for Adam in the authors' code.
      most_times: 10 for SGD and 1000 for Adam in the authors' code.
      exact: no more groups are projected than the target asks for. Without it, as in the authors'
        code, the last projection may take several, and a target met exactly is not yet reached.

    Raises:
      PruneError: numbers out of range.
    """
    for name, value in (('penalty', penalty), ('amplify', amplify), ('most_times', most_times)):
        positive(f'{name} of dhspg', value)
    groups = asked.groups
    own, kinds = vectors(groups), groups.kinds()
    bound = {n: half_space_dense if kind == 'dense' else half_space for n, kind in kinds.items()}
    second, first = second_stage(asked, second_at), asked.events[0]

    def project(
        state: Lasting, before: PyTree, after: PyTree, masks: Masks, clock: ArrayLike, hyper: Hyper
    ) -> tuple[Lasting, PyTree]:
        del masks
        v = direction(before, after, hyper)
        penalised = jax.lax.cond(
            jnp.asarray(clock) == first,
            lambda: _redundant(asked, own, before, v, state, tolerance),
            lambda: state.own.penalised,
        )
        squares, along = own.dot(before, before), own.dot(before, v)
        zero = {name: leaf == 0 for name, leaf in squares.items()}
        over = reached(asked, state, zero, 0 if exact else 1)
        against = own.dot(v, v)
        factors = {}
        for name, square in squares.items():
            length = jnp.sqrt(square)
            value = strength(along[name], length, against[name], penalty, amplify, most_times)
            on = penalised[name] & ~over
            factors[name] = jnp.where(on, -hyper.learning_rate * value / (length + 1e-8), 0)
        trial = own.plus(after, factors, before)
        allowed = within_target(asked, state) if exact else lambda share, crossed, zero: crossed
        begun = (clock >= second) & ~over
        params, new = half_space_step(own, before, trial, bound, penalised, begun, True, allowed)
        count = {n: state.own.count[n] + number for n, number in count_kept(new).items()}
        return state._replace(own=Chosen(penalised, count)), params

    def watch(state: Lasting, params: PyTree) -> dict[str, PerGroup]:
        del params
        chosen = count_kept(state.own.penalised)
        return {'penalised_groups': chosen, 'projected_groups': state.own.count}

    def begin() -> Chosen:
        none = {name: jnp.zeros(shape, bool) for name, shape in groups.shapes.items()}
        return Chosen(none, no_projections(asked))

    def score(state: Chosen, params: PyTree) -> Scores:
        """Those that were not penalised rank above all others."""
        lengths = norms(own)(params)
        longest = jnp.stack([leaf.max() for leaf in lengths.values()]).max()
        return {n: leaf + jnp.where(state.penalised[n], 0, longest) for n, leaf in lengths.items()}

    return lasting(asked, StepHook(project=project), score, begin=begin, watch=watch)


def strength(
    along: jax.Array,
    length: jax.Array,
    against: jax.Array,
    penalty: ArrayLike,
    amplify: ArrayLike,
    most_times: ArrayLike,
) -> jax.Array:
    """The penalty of each group.

    Where `x.v < 0` the step without penalty lets x grow. A penalty above `-x.v / |x|` makes it
    shrink; one below `-|v|² |x| / x.v` leaves the step one that lowers the loss. In between lies
    the middle of the two, if `amplify` times the former is too much.

    Args:
      along: x.v.
      length: |x|.
      against: |v|².
    """
    grows = along < 0
    safe_length, safe_along = jnp.where(grows, length, 1), jnp.where(grows, along, -1)
    lower = -safe_along / safe_length
    upper = -against * safe_length / safe_along
    value = jnp.clip(amplify * lower, penalty, penalty * most_times)
    value = jnp.where(value >= upper, (lower + upper) / 2, value)
    return jnp.where(grows, value, penalty)


def _redundant(
    asked: Asked, own: Vectors, params: PyTree, v: PyTree, state: Lasting, tolerance: ArrayLike
) -> Masks:
    """The groups to penalise."""
    lengths, sizes = norms(own)(params), own.sizes(params)
    turned = of_unit_length(cosines(own, params, v, lengths))
    small = of_unit_length({n: 1 / (leaf / sizes[n] + 1e-6) for n, leaf in lengths.items()})
    score: Scores = {name: -(turned[name] + small[name]) / 2 for name in lengths}
    every = sum(leaf.size for leaf in score.values())
    none = {name: jnp.zeros(leaf.shape, bool) for name, leaf in score.items()}
    need = count_kept(to_remove(asked._replace(multiple=1), state, score, none))
    most = {**may_go(asked, state.counts), GLOBAL: sum(need.values())}

    def more(wanted: jax.Array, size: int) -> jax.Array:
        allowed = jnp.minimum(wanted + jnp.floor(tolerance * size).astype(jnp.int32), size)
        return jnp.where(wanted > 0, allowed, 0)

    room = {
        name: jnp.minimum(more(most[name], leaf.size), leaf.size - 1)
        for name, leaf in score.items()
    }
    room[GLOBAL] = jnp.minimum(more(most[GLOBAL], every), int(0.999 * every))
    found = lowest(score, {name: ~mask for name, mask in none.items()}, room)
    if asked.multiple == 1:
        return found
    kept = {
        n: divisible(leaf.size - found[n].sum(dtype=jnp.int32), asked.multiple, leaf.size)
        for n, leaf in score.items()
    }
    best = layerwise_top_k(score, kept)
    return {name: ~mask for name, mask in best.items()}
