"""How fast a network trains, from its training losses; and how much two networks disagree."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxprune.arguments import least, whole
from jaxprune.errors import PruneError


def training_speed(losses: ArrayLike, *, last: int = 0) -> jax.Array:
    """The sum of training losses over steps, the last axis: small = fast.

    An estimate of how well the network will generalise (Lyle et al., NeurIPS 2020,
    arXiv:2010.14499; Ru et al., NeurIPS 2021, arXiv:2006.04492, where `last` is E).

    Args:
      losses: `(..., steps)`; steps of one stride, or epochs.
      last: only so many steps at the end; 0 for all.

    Raises:
      PruneError: a negative `last`.
    """
    least(0, last=last)
    losses = jnp.asarray(losses)
    return losses[..., -last:].sum(-1) if last else losses.sum(-1)


def steps_to_loss(losses: ArrayLike, target: ArrayLike, *, window: int = 1) -> jax.Array:
    """After how many steps the training loss first is at a target or below; infinite if never.

    Args:
      losses: `(..., steps)`.
      target: a scalar, or one for each leading index.
      window: losses are averaged over so many steps, which must all have been taken.

    Raises:
      PruneError: a window of no steps, or of more than there are.
    """
    losses = jnp.asarray(losses)
    steps = losses.shape[-1]
    if not 1 <= whole('window', window) <= steps:
        raise PruneError(f'window must be between 1 and the {steps} steps, not {window}')
    # Summed anew for each window: differences of running sums lose small losses to large ones.
    shifted = [losses[..., i : steps - window + 1 + i] for i in range(window)]
    means = sum(shifted) / window
    there = means <= jnp.asarray(target)[..., None]
    return jnp.where(there.any(-1), jnp.argmax(there, -1) + float(window), jnp.inf)


def churn(logits: jax.Array, other: jax.Array) -> jax.Array:
    """The share of examples that two networks put into different classes; NaN where logits are.

    Milani Fard et al., NeurIPS 2016.

    Args:
      logits: `(..., n, classes)`.
      other: of the same examples and classes; leading axes broadcast.

    Raises:
      PruneError: logits of other examples or classes.
    """
    if logits.ndim < 2 or logits.shape[-2:] != other.shape[-2:]:
        raise PruneError(f'logits have shapes {logits.shape} and {other.shape}, not (..., n, c)')
    broken = jnp.isnan(logits).any((-2, -1)) | jnp.isnan(other).any((-2, -1))
    differ = (logits.argmax(-1) != other.argmax(-1)).mean(-1)
    return jnp.where(broken, jnp.nan, differ)
