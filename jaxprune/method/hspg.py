"""HSPG, the half-space stochastic projected gradient of OTO (Chen et al., 2021, arXiv:2107.07467).

A penalty on the lengths of groups pulls them to zero. In a second stage a group becomes exactly
zero as soon as a step would take it out of the half-space that it points to.
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
from jaxprune.method.lasting import Asked, Lasting, by_length, lasting, may_go, norms
from jaxprune.method.own_slices import PerGroup, vectors
from jaxprune.select import count_kept
from jaxprune.types import GLOBAL, Hyper, Masks, Pruner, PyTree, StepHook

#: Added to lengths that are divided by, as in the code of the authors.
_TINY = 1e-6


class Projected(NamedTuple):
    """What HSPG carries: layer -> how many of its groups were projected to zero, int32."""

    count: dict[str, jax.Array]


def hspg(
    asked: Asked,
    *,
    penalty: ArrayLike = 1e-3,
    half_space: ArrayLike = 0.0,
    half_space_dense: ArrayLike = 0.0,
    second_at: ArrayLike = 0.25,
    cut: str = 'target',
) -> Pruner:
    """Penalises the lengths of groups, then projects to zero what crosses its half-space.

    Both stages add `penalty x / |x|` to the gradient of each group x. In the second stage groups
    are projected, see `half_space_step`; no more of them than the target asks for. If a step would
    exceed it, the authors' code projects random groups, and not the right number of them.

    A target that asks for nothing has no penalty either.

    Args:
      asked: the groups, all zero-invariant, and when its rounds happen.
      penalty: 5e-4 and 1e-3 in the paper's runs on CIFAR-10.
      half_space: epsilon of convolutions and heads, in [0, 1]; 0 projects only what turns away.
      half_space_dense: that of dense layers; 0.9 in the paper's VGG-16.
      second_at: where the second stage begins, as a share of the way from the first round to the
        last: 75 of 300 epochs in the paper.
      cut: what the last round removes, see `lasting`. 'zero' is the published algorithm; with
        'target' groups that are not zero yet may have to go as well.

    Raises:
      PruneError: numbers out of range.
    """
    positive('penalty of hspg', penalty)
    own, kinds = vectors(asked.groups), asked.groups.kinds()
    bound = {n: half_space_dense if kind == 'dense' else half_space for n, kind in kinds.items()}
    second = second_stage(asked, second_at)

    def gradient(
        state: Lasting, grads: PyTree, params: PyTree, masks: Masks, clock: ArrayLike, hyper: Hyper
    ) -> tuple[Lasting, PyTree]:
        del masks, clock, hyper
        strength = jnp.where(may_go(asked, state.counts)[GLOBAL] > 0, penalty, 0.0)
        lengths = norms(own)(params)
        factors = {name: strength / (length + _TINY) for name, length in lengths.items()}
        return state, own.plus(grads, factors, params)

    def project(
        state: Lasting, before: PyTree, after: PyTree, masks: Masks, clock: ArrayLike, hyper: Hyper
    ) -> tuple[Lasting, PyTree]:
        del masks, hyper
        allowed = within_target(asked, state)
        begun = clock >= second
        params, new = half_space_step(own, before, after, bound, None, begun, begun, allowed)
        count = {n: state.own.count[n] + number for n, number in count_kept(new).items()}
        return state._replace(own=Projected(count)), params

    def watch(state: Lasting, params: PyTree) -> dict[str, PerGroup]:
        del params
        return {'projected_groups': state.own.count}

    return lasting(
        asked,
        StepHook(gradient=gradient, project=project),
        by_length(own),
        begin=lambda: Projected(no_projections(asked)),
        cut=cut,
        watch=watch,
    )
