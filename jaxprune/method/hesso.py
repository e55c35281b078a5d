"""HESSO, the hybrid efficient structured sparse optimizer of OTOv3 (Chen et al., 2024,
arXiv:2409.09085).

In each of several periods some groups are found redundant, by five criteria together. Then they
shrink to exactly zero while training goes on. There is no penalty, and the target is met exactly.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxprune.errors import PruneError, check_choice
from jaxprune.method.lasting import Asked, Lasting, by_length, lasting, may_go, norms, to_remove
from jaxprune.method.own_slices import (
    PerGroup,
    Vectors,
    cosines,
    direction,
    of_unit_length,
    vectors,
)
from jaxprune.select import count_kept, divisible, top_k_mask
from jaxprune.types import GLOBAL, Hyper, Masks, Pruner, PyTree, Scores, StepHook

#: How the ramp and the choice go: as the paper has them, or as the authors' code does.
VARIANTS = ('paper', 'code')


class Redundant(NamedTuple):
    """What HESSO carries; masks are layer -> bool `(groups,)`.

    Attributes:
      found: groups that were ever found redundant.
      shrinking: those of them that this period removes.
      gone: those that stay at zero.
      before: how many might be gone in the period before, in all.
    """

    found: Masks
    shrinking: Masks
    gone: Masks
    before: jax.Array


def hesso(asked: Asked, *, variant: str = 'paper') -> Pruner:
    """Chooses redundant groups in every round but the last, and shrinks them until the next one.

    In the first step after a round the groups with the lowest `saliency` are chosen, as many as the
    counts of the round let go. With D steps until the next round, step j of them multiplies these
    groups by `(D - j - 1) / (D - j)` after the optimizer's step: they fall along a line and are
    exactly zero in the last one. From then on they stay there.

    Args:
      asked: the groups, all zero-invariant, and when its rounds happen.
      variant: 'code' does as the authors' code does, in one ranking of groups:
        - its ramp has one step less;
        - it ranks groups that are gone along with the others; if too many of the lowest are left,
          it takes those that come first in the network;
        - a group that it found redundant, and kept for the sake of a multiple, stays for good.

    Raises:
      PruneError: an unknown variant, or one that does not go with what is asked; rounds that lie
        too close for a ramp.
    """
    check_choice('variant', variant, VARIANTS)
    if variant == 'code' and (asked.cost or asked.fewest or not asked.shared):
        raise PruneError("variant: 'code' goes by one ranking of groups, without a floor or a cost")
    groups, events = asked.groups, np.array(asked.events)
    early = int(variant == 'code')
    if np.diff(events).min() < 1 + early:
        raise PruneError(f'hesso needs {1 + early} steps or more from round to round')
    own = vectors(groups)
    lengths = np.append(np.diff(events), 1)

    def project(
        state: Lasting, before: PyTree, after: PyTree, masks: Masks, clock: ArrayLike, hyper: Hyper
    ) -> tuple[Lasting, PyTree]:
        del masks
        # The clock is the same for all runs: the choice is made in one step of a period alone.
        period = (jnp.asarray(clock) >= events).sum() - 1
        step = clock - jnp.asarray(events)[period]
        ramp = jnp.asarray(lengths)[period] - early
        kept = jax.lax.cond(
            step == 0,
            lambda: _chosen(asked, variant, own, before, direction(before, after, hyper), state),
            lambda: state.own,
        )
        factor = (ramp - step - 1) / jnp.maximum(ramp - step, 1)
        factors = {
            n: jnp.where(kept.gone[n], 0.0, jnp.where(shrinking, factor, 1.0))
            for n, shrinking in kept.shrinking.items()
        }
        ends = step == ramp - 1
        gone = {n: mask | (kept.shrinking[n] & ends) for n, mask in kept.gone.items()}
        shrinking = {n: mask & ~ends for n, mask in kept.shrinking.items()}
        kept = kept._replace(gone=gone, shrinking=shrinking)
        return state._replace(own=kept), own.times(factors, after)

    def begin() -> Redundant:
        none = {name: jnp.zeros(shape, bool) for name, shape in groups.shapes.items()}
        return Redundant(none, none, none, jnp.zeros((), jnp.int32))

    def chosen(state: Redundant) -> Masks:
        return {name: ~mask for name, mask in state.gone.items()}

    def watch(state: Lasting, params: PyTree) -> dict[str, PerGroup]:
        del params
        return {'penalised_groups': count_kept(state.own.shrinking)}

    return lasting(
        asked, StepHook(project=project), by_length(own), begin=begin, chosen=chosen, watch=watch
    )


def saliency(own: Vectors, params: PyTree, v: PyTree) -> Scores:
    """Five criteria of each group x, each divided by its length over all groups, and their mean.

    Size, mean size of an entry, `cos(x, v) + 1`, first and second order of the change of the loss:
    `|x.v|` and `(x.v)² / 2`. High = keep.

    Args:
      params: before the step.
      v: the direction of the optimizer's step.
    """
    length, sizes, along = norms(own)(params), own.sizes(params), own.dot(params, v)
    cosine = cosines(own, params, v, length)
    criteria = (
        length,
        {name: leaf / (sizes[name] + 1e-6) for name, leaf in length.items()},
        {name: leaf + 1 for name, leaf in cosine.items()},
        {name: jnp.abs(leaf) for name, leaf in along.items()},
        {name: leaf**2 / 2 for name, leaf in along.items()},
    )
    parts = [of_unit_length(values) for values in criteria]
    return {name: sum(part[name] for part in parts) / len(parts) for name in length}


def _chosen(
    asked: Asked, variant: str, own: Vectors, params: PyTree, v: PyTree, state: Lasting
) -> Redundant:
    """The state with the groups of a new period."""
    score, kept = saliency(own, params, v), state.own
    most = may_go(asked, state.counts)[GLOBAL]
    if variant == 'code':
        new = _first_of_the_lowest(list(asked.groups.shapes), score, kept, most)
    else:
        new = to_remove(asked, state, score, kept.found)
    found = {name: mask | new[name] for name, mask in kept.found.items()}
    if variant == 'code':
        new = {name: _refined(asked.multiple, kept.gone[name], m) for name, m in new.items()}
    return Redundant(found, new, kept.gone, most)


def _first_of_the_lowest(
    layers: list[str], score: Scores, kept: Redundant, most: jax.Array
) -> Masks:
    """As the authors' code: of the lowest, gone ones included, the first that are not gone yet.

    Args:
      layers: in the order of the network.
    """
    every = jnp.concatenate([score[name] for name in layers])
    found = jnp.concatenate([kept.found[name] for name in layers])
    new = most - kept.before
    low = top_k_mask(-every, found.sum(dtype=jnp.int32) + new)
    candidates = low & ~found
    first = candidates & (jnp.cumsum(candidates) <= new)
    ends = np.cumsum([score[name].size for name in layers])
    return dict(zip(layers, jnp.split(first, ends[:-1]), strict=True))


def _refined(multiple: int, gone: jax.Array, new: jax.Array) -> jax.Array:
    """As the authors' code: the first of a layer's new groups, as many as leave it a multiple."""
    size = new.size
    left = divisible(size - (gone | new).sum(dtype=jnp.int32), multiple, size)
    return new & (jnp.cumsum(new) <= size - gone.sum(dtype=jnp.int32) - left)
