"""Sparse training in which weights go and come back at zero: SET, RigL, AC/DC.

The first round of SET and RigL prunes at random. Each later one drops the smallest of the weights
that a layer keeps, and grows as many. What comes back is zero, and so are its moments.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxprune import score
from jaxprune.method.any_groups import check_free
from jaxprune.method.chosen_anew import (
    Anew,
    as_they_are,
    begun,
    by_size,
    check_rounds,
    chosen_anew,
    selected,
    sizes_of,
)
from jaxprune.method.lasting import Asked
from jaxprune.method.pruner import tallied
from jaxprune.select import count_kept
from jaxprune.types import (
    GLOBAL,
    Counts,
    Key,
    Masks,
    PruneInfo,
    Pruner,
    Scores,
    StepHook,
    View,
    Weights,
)


def rigl(asked: Asked, *, drop: ArrayLike = 0.3, skip: bool = True) -> Pruner:
    """RigL (Evci et al., ICML 2020, arXiv:1911.11134): grows where the gradient is largest.

    The gradient is that of the batch of the next step, by all weights, at the masked network.

    Args:
      asked: what is pruned; weights, kernels or blocks.
      drop: share of the kept weights that go in a round, at step 0; it falls like a cosine over
        the clock to 0 in the last round.
      skip: after a round, but for the first and the last, the optimizer takes no step, as in the
        authors' code.

    Raises:
      PruneError: fewer than two rounds, coupled groups, n:m.
    """

    def by_gradient(key: Key, view: View, batches: Any) -> Weights:
        return {p: jnp.abs(g) for p, g in asked.gradient(key, view, batches).items()}

    still = tuple(asked.events[1:]) if skip else ()
    return _regrowing(asked, 'rigl', drop, by_gradient, frozenset({'train_batch'}), still)


def set_(asked: Asked, *, drop: ArrayLike = 0.3, skip: bool = True) -> Pruner:
    """SET (Mocanu et al. 2018, arXiv:1707.04780): grows at random.

    The paper drops the same share after every epoch. Here the share falls, and a round takes the
    place of a step of the optimizer, as in the code of RigL's authors and in JaxPruner.

    Args:
      asked, drop, skip: see `rigl`.

    Raises:
      PruneError: see `rigl`.
    """

    still = tuple(asked.events[1:]) if skip else ()
    return _regrowing(asked, 'set', drop, score.random(), frozenset(), still)


def acdc(asked: Asked) -> Pruner:
    """AC/DC (Peste et al., NeurIPS 2021, arXiv:2106.12379): sparse and dense training by turns.

    Each round keeps the largest weights, as many as its count says; the schedule 'alternate' says
    few and all by turns. The paper ends with a longer sparse phase.

    Args:
      asked: what is pruned.
    """
    return chosen_anew(asked, StepHook(), by_size, dense=False)


def drop_share(drop: ArrayLike, clock: ArrayLike, end: int) -> jax.Array:
    """`drop / 2 (1 + cos(π clock / end))`."""
    # As a sine, which is exact in the middle: there the cosine of float32 is -4e-8.
    middle = jnp.asarray(clock, jnp.float32) / max(end, 1) - 0.5
    return drop * (0.5 - 0.5 * jnp.sin(math.pi * middle))


def _regrowing(
    asked: Asked,
    name: str,
    drop: ArrayLike,
    grow: Callable[[Key, View, Any], Weights],
    needs: frozenset[str],
    still: tuple[int, ...],
) -> Pruner:
    """A pruner that drops and grows."""
    groups = asked.groups
    check_rounds(asked, name)
    check_free(groups, name)

    def init(key: Key, view: View) -> Anew:
        del key
        return begun(view)

    def update(
        key: Key, state: Anew, view: View, counts: Counts, batches: Any
    ) -> tuple[Anew, Masks, PruneInfo]:
        may = groups.alive(state.masks)
        clock = jnp.asarray(asked.events, jnp.int32)[state.round]
        share = drop_share(drop, clock, asked.events[-1])

        # In the first round nothing stays, and everything grows, at random. Under `vmap` a branch
        # with a selection of its own would be computed in all rounds. Without the barrier XLA
        # would spend seconds of compiling on a selection from nothing.
        first = jax.lax.optimization_barrier(state.round == 0)
        scores = jax.lax.cond(
            first,
            lambda: groups.gather(score.random()(key, view, None)),
            lambda: groups.gather(grow(key, view, batches)),
        )
        before = {name: m & ~first for name, m in groups.alive(view.masks).items()}
        sizes = groups.gather(sizes_of(view))
        stay, grown = regrown(asked, sizes, scores, before, may, counts, share)
        kept = {name: stay[name] | grown[name] for name in stay}
        masks = {path: m & state.masks[path] for path, m in groups.spread(kept).items()}
        nonfinite, nonzero = tallied(scores, may)
        info = PruneInfo(count_kept(kept), nonfinite + tallied(sizes, before)[0], nonzero)
        return state._replace(round=state.round + 1), masks, info

    return Pruner(init, update, needs, as_they_are, hook=StepHook(still=still))


def regrown(
    asked: Asked,
    sizes: Scores,
    grow: Scores,
    kept: Masks,
    may: Masks,
    counts: Counts,
    share: ArrayLike,
) -> tuple[Masks, Masks]:
    """One round: what stays, and what grows.

    Of `k` to keep, the `k - floor(share k)` largest of those that are kept now stay, and the others
    grow where the growth scores are best, among all that do not stay: just dropped ones too.

    Args:
      sizes: of the weights.
      grow: growth scores, high = grow.
      kept: what is kept now.
      may: what may be kept.
      counts: layer -> k, or '*' -> k of all layers together.
      share: in [0, 1].
    """
    leaving = {n: jnp.floor(jnp.float32(k) * jnp.float32(share)) for n, k in counts.items()}
    leaving = {name: n.astype(jnp.int32) for name, n in leaving.items()}
    fewest = asked.fewest
    if fewest is not None:  # what leaves of a floor grows again
        part = leaving[GLOBAL] / jnp.maximum(counts[GLOBAL], 1)
        fewest = {n: k - jnp.floor(k * part).astype(jnp.int32) for n, k in fewest.items()}
    stays = {name: k - leaving[name] for name, k in counts.items()}
    stay = selected(asked._replace(fewest=fewest), sizes, kept, stays)
    free = {name: may[name] & ~stay[name] for name in stay}
    staying = count_kept(stay)

    def room(bounds: Counts | None) -> Counts | None:
        return bounds and {n: jnp.maximum(k - staying[n], 0) for n, k in bounds.items()}

    left = asked._replace(fewest=room(asked.fewest), most=room(asked.most))
    gone = {**staying, GLOBAL: sum(staying.values())}
    return stay, selected(left, grow, free, {n: k - gone[n] for n, k in counts.items()})
