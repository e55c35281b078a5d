"""How fast a network trains, from its training losses; and how much two networks disagree."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def training_speed(losses: ArrayLike, *, last: int = 0) -> jax.Array:
    """The sum of training losses over steps, the last axis: small = fast.

    An estimate of how well the network will generalise (Lyle et al., NeurIPS 2020,
    arXiv:2010.14499; Ru et al., NeurIPS 2021, arXiv:2006.04492, where `last` is E).

    Args:
      losses: `(..., steps)`; steps of one stride, or epochs.
      last: only so many steps at the end; 0 for all.
    """
    losses = jnp.asarray(losses)
    return losses[..., -last:].sum(-1) if last else losses.sum(-1)


def steps_to_loss(losses: ArrayLike, target: ArrayLike, *, window: int = 1) -> jax.Array:
    """After how many steps the training loss first is at a target or below; infinite if never.

    Args:
      losses: `(..., steps)`.
      target: a scalar, or one for each leading index.
      window: losses are averaged over so many steps, which must all have been taken.
    """
    losses = jnp.asarray(losses)
    total = jnp.cumsum(losses, -1)
    before = jnp.concatenate([jnp.zeros_like(total[..., :1]), total[..., :-window]], -1)
    means = (total[..., window - 1 :] - before) / window
    there = means <= jnp.asarray(target)[..., None]
    return jnp.where(there.any(-1), jnp.argmax(there, -1) + float(window), jnp.inf)


def churn(logits: jax.Array, other: jax.Array) -> jax.Array:
    """The share of examples that two networks put into different classes; logits `(..., n, c)`.

    Milani Fard et al., NeurIPS 2016.
    """
    return (logits.argmax(-1) != other.argmax(-1)).mean(-1)
