"""What may happen to the weights a method keeps, right after its last round."""

from collections.abc import Callable
from functools import partial

from jaxprune.errors import check_choice
from jaxprune.flow.orthogonal import orthp
from jaxprune.types import Masks, Weights

#: 'orthp' makes every kernel in force orthogonal (Wang et al., arXiv:2105.05916).
REPAIRS = ('orthp',)


def repair_of(name: str, gain: str) -> Callable[[Weights, Masks], Weights] | None:
    """`(weights, masks) -> weights` of a repair; None for ''.

    Args:
      name: '' or one of `REPAIRS`.
      gain: the activation behind the layers, a key of `flow.orthogonal.GAINS`.
    """
    if not name:
        return None
    check_choice('repair', name, REPAIRS)
    return partial(orthp, activation=gain)
