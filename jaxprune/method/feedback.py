"""Methods that keep dense weights and mask the forward pass: GMP, DPF, straight-through, SR-STE.

They differ in which weights the gradient at the masked network moves, and in what pulls at those
that are pruned. All can bring pruned weights back with the values that they have by then.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxprune import score, tree
from jaxprune.errors import check_choice
from jaxprune.method.chosen_anew import by_size, chosen_anew, masked_weights, straight_weights
from jaxprune.method.lasting import Asked
from jaxprune.types import Hyper, Key, Masks, Pruner, PyTree, StepHook, View, Weights

#: What straight-through masks go by.
STRAIGHT = ('magnitude', 'random')


def gmp(asked: Asked) -> Pruner:
    """Gradual magnitude pruning (Zhu & Gupta 2017, arXiv:1710.01878).

    Pruned weights are not updated, and keep the values that they had: one that is larger than what
    has shrunk since comes back.

    Args:
      asked: what is pruned.
    """

    hook = StepHook(weights=masked_weights, moves=lambda state, masks: masks)
    return chosen_anew(asked, hook, by_size)


def dpf(asked: Asked) -> Pruner:
    """Dynamic pruning with feedback (Lin et al., ICLR 2020, arXiv:2006.07253).

    `w ← w - γ ∇L(m w)` for all weights: the gradient is that of the masked network. Momentum and
    weight decay are those of dense weights. The paper chooses masks every 16 steps.

    Args:
      asked: what is pruned.
    """
    return chosen_anew(asked, _straight(), by_size)


def straight(asked: Asked, *, by: str = 'magnitude') -> Pruner:
    """Straight-through masks, by size or at random.

    By size this is DPF with another schedule: jaxpruner chooses masks in every step. At random each
    round draws its mask anew.

    Args:
      asked: what is pruned.
      by: 'magnitude' or 'random'.
    """
    check_choice('by', by, STRAIGHT)
    return chosen_anew(asked, _straight(), by_size if by == 'magnitude' else _at_random)


def sr_ste(asked: Asked, *, pull: ArrayLike = 2e-4) -> Pruner:
    """Sparse-refined straight-through (Zhou et al., ICLR 2021, arXiv:2102.04010), for N:M.

    `w ← w - γ (∇L(m w) + pull (1 - m) w)`: weights that are pruned now are pulled to zero, so fewer
    of them return. The paper chooses masks in every step.

    Args:
      asked: what is pruned; with granularity '2:4' the method of the paper.
      pull: λ of the paper.
    """
    return chosen_anew(asked, _straight(pull), by_size)


def _straight(pull: ArrayLike | None = None) -> StepHook:
    """The hook of straight-through masks."""

    def gradient(
        state: PyTree, grads: PyTree, params: PyTree, masks: Masks, clock: ArrayLike, hyper: Hyper
    ) -> tuple[PyTree, PyTree]:
        del clock, hyper
        loss, stored = (dict(tree.paths(leaves)) for leaves in (grads, params))
        pulled = {
            path: loss[path] + pull * jnp.where(mask, 0, stored[path])
            for path, mask in masks.items()
        }
        return state, tree.put(grads, pulled)

    return StepHook(weights=straight_weights, gradient=None if pull is None else gradient)


def _at_random(key: Key, view: View, state: PyTree) -> Weights:
    del state
    return score.random()(key, view, None)
