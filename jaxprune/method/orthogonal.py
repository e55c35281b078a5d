"""Orthogonal regularisation beside magnitude pruning: KernOrth (Xie et al. 2017, arXiv:1703.01827).

Trainability of a pruned network is what it is to keep; see TPP (Wang & Fu 2023, arXiv:2207.12534),
whose tables call these 'L1 + KernOrth' and 'KernOrth + L1'.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxprune import tree
from jaxprune.arguments import positive
from jaxprune.errors import check_choice
from jaxprune.flow.orthogonal import kernel_orthogonality
from jaxprune.method.any_groups import mean_sizes
from jaxprune.method.chosen_anew import as_they_are, leave_out, selected
from jaxprune.method.lasting import Asked
from jaxprune.method.pruner import tallied
from jaxprune.select import count_kept
from jaxprune.types import (
    Batches,
    Counts,
    Hyper,
    Key,
    Masks,
    PruneInfo,
    Pruner,
    PyTree,
    StepHook,
    View,
)

#: When the penalty acts.
WHEN = ('after', 'before')


class Regularised(NamedTuple):
    """What the method carries from its first round to its last.

    Attributes:
      round: rounds so far, int32.
      prunes: is anything pruned? bool.
    """

    round: jax.Array
    prunes: jax.Array


def orthogonal(asked: Asked, *, penalty: ArrayLike = 1e-3, when: str = 'after') -> Pruner:
    """Prunes by the mean of |w|, with `penalty Σ ‖W Wᵀ - I‖` over kernels in the loss.

    See `flow.kernel_orthogonality`. After pruning: the first round prunes, and the penalty acts on
    what is left until the last. Before it: the penalty acts until the last round, which prunes.

    Args:
      asked: what is pruned, of any kind.
      penalty: above 0.
      when: 'after' or 'before'.

    Raises:
      PruneError: another word, a penalty that is not above 0.
    """
    check_choice('when', when, WHEN)
    positive('penalty of orthogonal', penalty)
    decisive = 0 if when == 'after' else len(asked.events) - 1

    def init(key: Key, view: View) -> Regularised:
        del key, view
        return Regularised(jnp.zeros((), jnp.int32), jnp.zeros((), bool))

    def update(
        key: Key, state: Regularised, view: View, counts: Counts, batches: Batches | None
    ) -> tuple[Regularised, Masks, PruneInfo]:
        del key, batches
        scores, alive = mean_sizes(asked.groups, view.weights), asked.groups.alive(view.masks)
        kept = selected(asked, scores, alive, counts)
        whole, now = asked.groups.spread(kept), state.round >= decisive
        masks = {path: m & (whole[path] | ~now) for path, m in view.masks.items()}
        info = PruneInfo(count_kept(kept), *tallied(scores, alive))
        return Regularised(state.round + 1, leave_out(asked, counts)), masks, info

    def gradient(
        state: Regularised,
        grads: PyTree,
        params: PyTree,
        masks: Masks,
        clock: ArrayLike,
        hyper: Hyper,
    ) -> tuple[Regularised, PyTree]:
        del clock, hyper
        loss, stored = (dict(tree.paths(leaves)) for leaves in (grads, params))
        kernels = {path: mask for path, mask in masks.items() if mask.ndim > 1}
        push = jax.grad(kernel_orthogonality)({path: stored[path] for path in kernels}, kernels)
        strength = jnp.where(state.prunes, penalty, 0)
        return state, tree.put(
            grads, {p: loss[p] + strength.astype(g.dtype) * g for p, g in push.items()}
        )

    return Pruner(init, update, frozenset(), as_they_are, hook=StepHook(gradient=gradient))
