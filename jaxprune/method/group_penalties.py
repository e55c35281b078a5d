"""Penalties on all groups alike, which other methods are compared with."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxprune import tree
from jaxprune.arguments import expression, positive
from jaxprune.errors import PruneError
from jaxprune.method.lasting import Asked, Lasting, by_length, lasting, may_go, norms
from jaxprune.method.own_slices import vectors
from jaxprune.score.group_importance import group_decay, group_importance, group_values
from jaxprune.types import GLOBAL, Hyper, Masks, Pruner, PyTree, Scores, StepHook


def _in_force(asked: Asked, state: Lasting, penalty: ArrayLike) -> jax.Array:
    """The penalty; 0 where the target asks for nothing."""
    return jnp.where(may_go(asked, state.counts)[GLOBAL] > 0, penalty, 0.0)


def proximal(asked: Asked, *, penalty: ArrayLike = 1e-3, cut: str = 'target') -> Pruner:
    """Group lasso by proximal steps: `max(0, 1 - rate penalty / |y|) y` after each step to y.

    Groups become exactly zero, and may come back. It is what HSPG is compared with.

    Args:
      asked: the groups, all zero-invariant, and when its rounds happen.
      penalty: of the sum of the groups' lengths.
      cut: what the last round removes, see `lasting`.

    Raises:
      PruneError: a penalty that is not above 0.
    """
    positive('penalty of proximal', penalty)
    own = vectors(asked.groups)

    def project(
        state: Lasting, before: PyTree, after: PyTree, masks: Masks, clock: ArrayLike, hyper: Hyper
    ) -> tuple[Lasting, PyTree]:
        del before, masks, clock
        pull = _in_force(asked, state, penalty) * hyper.learning_rate
        factors = {
            name: jnp.where(length > pull, 1 - pull / jnp.where(length > pull, length, 1), 0)
            for name, length in norms(own)(after).items()
        }
        return state, own.times(factors, after)

    return lasting(asked, StepHook(project=project), by_length(own), cut=cut)


def group_norm(
    asked: Asked, *, penalty: ArrayLike = 5e-4, strongest: ArrayLike = 16.0, scales: str = 'scale$'
) -> Pruner:
    """The sparse learning of DepGraph (Fang et al., 2023, arXiv:2301.12900).

    Adds `score.group_decay` to the gradient: all kernels and scales of a group decay, what reads it
    included, and the weakest group of a layer `strongest` times as fast as the strongest one. The
    last round removes the weakest by the same score, which is divided by its mean in the layer.

    Args:
      asked: the groups and when its rounds happen.
      penalty: the decay of the strongest group of a layer.
      strongest: the factor of the weakest group.
      scales: a regular expression of the paths of scales.

    Raises:
      PruneError: a number that is not above 0.
    """
    positive('penalty of group_norm', penalty)
    positive('strongest of group_norm', strongest)
    families = asked.groups.families
    members = [m for family in families.values() for m in family.members]
    counted = {m.path for m in members if m.role in ('out', 'in')}
    search = expression('scales', scales)
    counted |= {m.path for m in members if m.role == 'along' and search(m.path)}

    def weights(params: PyTree) -> dict[str, jax.Array]:
        return {path: leaf for path, leaf in tree.paths(params) if path in counted}

    def gradient(
        state: Lasting, grads: PyTree, params: PyTree, masks: Masks, clock: ArrayLike, hyper: Hyper
    ) -> tuple[Lasting, PyTree]:
        del masks, clock, hyper
        rate = _in_force(asked, state, penalty)
        decay = group_decay(weights(params), families.values(), rate=rate, strongest=strongest)
        loss = dict(tree.paths(grads))
        return state, tree.put(grads, {path: loss[path] + push for path, push in decay.items()})

    def score(state: tuple, params: PyTree) -> Scores:
        del state
        squares = group_values('square', weights(params))
        return {name: group_importance(squares, family) for name, family in families.items()}

    return lasting(asked, StepHook(gradient=gradient), score)


def slimming(asked: Asked, *, penalty: ArrayLike = 1e-4, scales: str = 'scale$') -> Pruner:
    """Network slimming (Liu et al., 2017, arXiv:1708.06519): a penalty on the scales of norms.

    Adds `penalty sign(scale)` to the gradient of the scales that belong to groups. The last round
    removes the groups with the smallest mean of abs(scale).

    Args:
      asked: the groups and when its rounds happen.
      penalty: 1e-4 to 1e-5 in the paper.
      scales: a regular expression of the paths of scales.

    Raises:
      PruneError: a penalty that is not above 0; a layer whose groups have no such parameter.
    """
    positive('penalty of slimming', penalty)
    groups = asked.groups
    search = expression('scales', scales)
    scale = {
        name: tuple(m for m in f.members if m.role == 'along' and search(m.path))
        for name, f in groups.families.items()
    }
    if without := [name for name, members in scale.items() if not members]:
        raise PruneError(
            f"no parameter of the groups of '{without[0]}' matches {scales!r}: slimming needs a "
            'norm behind every layer; name the others in keep_all_units'
        )
    families = {n: f._replace(members=scale[n]) for n, f in groups.families.items()}
    own = vectors(groups._replace(families=families), silent=False)

    paths = {one.path for one in own.slices}

    def size(state: tuple, params: PyTree) -> Scores:
        del state
        found = {path: leaf for path, leaf in tree.paths(params) if path in paths}
        values = group_values('magnitude', found)
        return {n: group_importance(values, f, normalise='none') for n, f in families.items()}

    def gradient(
        state: Lasting, grads: PyTree, params: PyTree, masks: Masks, clock: ArrayLike, hyper: Hyper
    ) -> tuple[Lasting, PyTree]:
        del masks, clock, hyper
        strength = _in_force(asked, state, penalty)
        signs = jax.tree.map(jnp.sign, params)
        factors = {n: jnp.full(shape, strength) for n, shape in groups.shapes.items()}
        return state, own.plus(grads, factors, signs)

    return lasting(asked, StepHook(gradient=gradient), size)
