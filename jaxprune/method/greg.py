"""Growing regularisation (Wang, Qin, Zhang & Fu, ICLR 2021, arXiv:2012.09243): GReg-1, GReg-2.

A penalty that grows while a network trains pulls what is to be pruned to zero. Numbers are those of
the authors' code (MingSun-Tse/Regularization-Pruning).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxprune import tree
from jaxprune.arguments import least, positive
from jaxprune.errors import PruneError
from jaxprune.method.any_groups import mean_sizes, pulled
from jaxprune.method.chosen_anew import as_they_are, leave_out, selected
from jaxprune.method.lasting import Asked
from jaxprune.method.own_slices import PerGroup
from jaxprune.method.pruner import tallied
from jaxprune.select import count_kept
from jaxprune.types import (
    Batches,
    Counts,
    Groups,
    Hyper,
    Key,
    Masks,
    PruneInfo,
    Pruner,
    PyTree,
    StepHook,
    View,
)

#: How much the latest quotient of mean sizes counts in their average.
_LATEST = 0.1


class Growing(NamedTuple):
    """What the method carries from its first round to its last.

    Attributes:
      kept: layer -> bool, what the last round keeps.
      strength: λ of what is pulled, scalar.
      ratio: layer -> average of the mean size of kept weights over that of the others, scalar.
      round: rounds so far, int32.
      prunes: is anything to go? bool.
    """

    kept: Masks
    strength: jax.Array
    ratio: dict[str, jax.Array]
    round: jax.Array
    prunes: jax.Array


class _Recipe(NamedTuple):
    """Numbers of a variant; see `greg1` and `greg2`."""

    interval: int
    increment: ArrayLike
    ceiling: ArrayLike
    enough: ArrayLike
    chooses_in: int
    pick_increment: ArrayLike = 0.0
    pick_ceiling: ArrayLike = 0.0
    recover: ArrayLike = 0.0


def greg1(
    asked: Asked,
    *,
    interval: int = 10,
    increment: ArrayLike = 1e-4,
    ceiling: ArrayLike = 1.0,
    enough: ArrayLike = 1000.0,
) -> Pruner:
    """Chooses in its first round by the mean of |w|, and removes in its last; in between it pulls.

    The gradient of what goes gets `λ w`. λ grows by `increment` every `interval` steps, until it
    reaches `ceiling`, or until in every layer kept weights are `enough` times as large as the
    others, on average; it then stays, and training goes on. Single weights grow to the ceiling.

    Args:
      asked: what is pruned, of any kind; of coupled groups what makes and follows them is pulled.
      interval: 10 for CIFAR-10, 5 for ImageNet.
      increment, ceiling, enough: see above.

    Raises:
      PruneError: an interval below 1, another number that is not above 0.
    """
    _check('greg1', interval=interval, increment=increment, ceiling=ceiling, enough=enough)
    return _growing(asked, _Recipe(interval, increment, ceiling, enough, 0))


def greg2(
    asked: Asked,
    *,
    interval: int = 10,
    increment: ArrayLike = 1e-4,
    ceiling: ArrayLike = 1.0,
    enough: ArrayLike = 1000.0,
    pick_increment: ArrayLike = 1e-5,
    pick_ceiling: ArrayLike = 0.01,
    recover: ArrayLike = -1e-4,
) -> Pruner:
    """Pulls all alike at first, and chooses in its second round by what has shrunk.

    Under the same λ a weight at a minimum of curvature h shrinks to `h / (h + λ)` of its size: the
    flat directions go first. From the second round on this is `greg1`, from the λ reached.

    Args:
      asked, interval, increment, ceiling, enough: see `greg1`; three rounds or more.
      pick_increment, pick_ceiling: how λ of all grows before the second round.
      recover: λ of what is kept after it; the authors' code lets kept weights grow a little.

    Raises:
      PruneError: see `greg1`.
    """
    _check('greg2', interval=interval, increment=increment, ceiling=ceiling, enough=enough)
    _check('greg2', pick_increment=pick_increment, pick_ceiling=pick_ceiling)
    if len(asked.events) < 3:
        raise PruneError(f"rounds: 'greg2' needs three or more, not {len(asked.events)}")
    picking = (pick_increment, pick_ceiling, recover)
    return _growing(asked, _Recipe(interval, increment, ceiling, enough, 1, *picking))


def _check(name: str, *, interval: int = 1, **numbers: ArrayLike) -> None:
    least(1, interval=interval)
    for key, value in numbers.items():
        positive(f'{key} of {name}', value)


def _growing(asked: Asked, recipe: _Recipe) -> Pruner:
    groups, pull = asked.groups, pulled(asked.groups)

    def init(key: Key, view: View) -> Growing:
        del key
        zero = jnp.zeros((), next(iter(view.weights.values())).dtype)
        kept = groups.alive(view.masks)
        ratio = dict.fromkeys(kept, zero)
        return Growing(kept, zero, ratio, jnp.zeros((), jnp.int32), jnp.zeros((), bool))

    def update(
        key: Key, state: Growing, view: View, counts: Counts, batches: Batches | None
    ) -> tuple[Growing, Masks, PruneInfo]:
        del key, batches
        scores, alive = mean_sizes(groups, view.weights), groups.alive(view.masks)
        last = state.round == len(asked.events) - 1
        chooses = state.round <= recipe.chooses_in
        found = selected(asked, scores, alive, counts)
        kept = {name: jnp.where(chooses, found[name], m) for name, m in state.kept.items()}
        whole = groups.spread(kept)
        masks = {path: m & (whole[path] | ~last) for path, m in view.masks.items()}
        info = PruneInfo(count_kept(kept), *tallied(scores, alive))
        state = state._replace(kept=kept, round=state.round + 1, prunes=leave_out(asked, counts))
        return state, masks, info

    def gradient(
        state: Growing, grads: PyTree, params: PyTree, masks: Masks, clock: ArrayLike, hyper: Hyper
    ) -> tuple[Growing, PyTree]:
        del masks, hyper
        since = clock - asked.events[0]
        due = (since > 0) & (since % recipe.interval == 0)
        state = jax.lax.cond(due, lambda s: _grown(groups, recipe, s, params), lambda s: s, state)
        return state, pull(grads, _strengths(state, recipe), params)

    return Pruner(init, update, frozenset(), as_they_are, hook=StepHook(gradient=gradient))


def _grown(groups: Groups, recipe: _Recipe, state: Growing, params: PyTree) -> Growing:
    """The state after an interval: λ has grown, unless enough has been reached."""
    picking = state.round <= recipe.chooses_in
    step = jnp.where(picking, recipe.pick_increment, recipe.increment)
    limit = jnp.where(picking, recipe.pick_ceiling, recipe.ceiling)
    ratio, done = state.ratio, jnp.zeros((), bool)
    if groups.kind != 'weight':
        leaves = dict(tree.paths(params))
        weights = {path: leaves[path] for path in groups.spread(state.kept)}
        sizes = mean_sizes(groups, weights)
        now = {name: _quotient(leaf, state.kept[name]) for name, leaf in sizes.items()}
        ratio = {
            name: jnp.where(old == 0, now[name], (1 - _LATEST) * old + _LATEST * now[name])
            for name, old in ratio.items()
        }
        ratio = {name: jnp.where(picking, 0, leaf) for name, leaf in ratio.items()}
        done = jnp.stack([leaf > recipe.enough for leaf in ratio.values()]).all()
    grown = jnp.minimum(state.strength + step, jnp.maximum(limit, state.strength))
    strength = jnp.where(done, state.strength, grown).astype(state.strength.dtype)
    return state._replace(strength=strength, ratio=ratio)


def _quotient(sizes: jax.Array, kept: jax.Array) -> jax.Array:
    """The mean size of kept groups over that of the others; infinite where all go, or none."""
    left, gone = (jnp.mean(sizes, where=which) for which in (kept, ~kept))
    return jnp.where(kept.all() | ~kept.any(), jnp.inf, left / gone).astype(sizes.dtype)


def _strengths(state: Growing, recipe: _Recipe) -> PerGroup:
    """λ of each group."""
    picking = state.round <= recipe.chooses_in
    of_kept = jnp.where(picking, state.strength, recipe.recover)
    if recipe.chooses_in == 0:
        of_kept = jnp.zeros_like(state.strength)
    return {
        name: jnp.where(state.prunes, jnp.where(kept, of_kept, state.strength), 0).astype(
            state.strength.dtype
        )
        for name, kept in state.kept.items()
    }
