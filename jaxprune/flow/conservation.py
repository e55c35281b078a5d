"""Quantities that gradient flow conserves: zero, or constant, where a conservation law holds.

Lubana & Dick, ICLR 2021, arXiv:2009.11839; Du, Hu & Lee, NeurIPS 2018, arXiv:1806.00900; Kunin et
al., ICLR 2021, arXiv:2012.04728. A mask leaves the laws as they are: pruned weights drop out of
the sums.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxprune.errors import PruneError, nearest, quoted
from jaxprune.flow.measure import MeasureFn
from jaxprune.score.derivatives import derivatives, parameters
from jaxprune.score.group_sums import grouped
from jaxprune.types import Batches, Key, Problem, View, Weights

#: Below this a cosine is one of rounding errors.
_TINY = 1e-30


def imbalance(
    view: View, order: Sequence[str], *, biases: Sequence[str | None] = ()
) -> dict[str, jax.Array]:
    """`‖W_l‖² - ‖W_(l+1)‖²` of layers that feed each other, path of the first -> scalar.

    Constant under gradient flow where the map between the two is homogeneous: linear, ReLU, max or
    average pooling, without bias or with the bias counted on the input side; with dropout between
    them there is no such law. The norm of a kernel before batch norm, with batch statistics, is
    constant by itself: so is the imbalance of two such layers, but not that of one such layer and a
    layer without batch norm. Discrete steps change it by η² (‖g_l‖² - ‖g_(l+1)‖²).

    Args:
      order: paths of the layers, input first.
      biases: path of each layer's bias, None where it has none; without any, none are counted.

    Raises:
      PruneError: an unknown path, or another number of biases.
    """
    params = parameters(view)
    extra = list(biases) or [None] * len(order)
    if len(extra) != len(order):
        raise PruneError(f'{len(order)} layers have {len(order)} biases or None, not {len(extra)}')
    for path in (*order, *(p for p in extra if p is not None)):
        if path not in params:
            raise PruneError(f'no parameter {quoted(path)}: {nearest(path, params)}')

    def square(path: str | None) -> jax.Array:
        return jnp.zeros(()) if path is None else (params[path] ** 2).sum()

    pairs = itertools.pairwise(range(len(order)))
    return {order[i]: square(order[i]) + square(extra[i]) - square(order[j]) for i, j in pairs}


def unit_imbalance(first: jax.Array, second: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """`‖w_in,u‖² + b_u² - ‖w_out,u‖²` of every hidden unit u, `(units,)`.

    The law of `imbalance` for every unit; the sum over units is that of the layers.

    Args:
      first: kernel that computes the units, `(..., units)`.
      second: kernel that reads them, `(..., units, outputs)`; a dense kernel that reads flattened
        maps, `(positions * units, outputs)`, works too, channels last.
      bias: `(units,)`.

    Raises:
      PruneError: kernels that do not fit.
    """
    units = first.shape[-1]
    if second.shape[-2] % units:
        raise PruneError(f'a kernel of {second.shape} does not read {units} units')
    incoming = (first**2).reshape(-1, units).sum(0)
    outgoing = (second**2).reshape(-1, units, second.shape[-1]).sum((0, 2))
    return incoming - outgoing + (0 if bias is None else bias**2)


def radial_gradient(
    problem: Problem, *, train: bool = True, axis: int = -1
) -> MeasureFn[dict[str, jax.Array]]:
    """`(key, view, batches) -> path -> root mean square over units of cos(w_u, g_u)`, scalars.

    Zero for filters followed by batch norm with batch statistics, where the loss does not depend on
    their length: `w_uᵀ g_u = 0`, ‖w_u‖ is constant under the flow and grows by `η² ‖g_u‖²` per step
    (up to the norm's ε). One where the gradient is parallel to the weights.
    """

    def measure(key: Key, view: View, batches: Batches | None) -> dict[str, jax.Array]:
        at = derivatives(problem, key, view, batches, train=train)

        def by_unit(one: Weights, other: Weights) -> Weights:
            return grouped({p: one[p] * other[p] for p in view.weights}, 'unit', axis)

        weights, gradients = by_unit(at.params, at.params), by_unit(at.gradient, at.gradient)

        def cosine(path: str, products: jax.Array) -> jax.Array:
            lengths = weights[path] * gradients[path]
            alive = lengths > _TINY
            squares = jnp.where(alive, products**2 / jnp.where(alive, lengths, 1), 0)
            return jnp.sqrt(squares.sum() / jnp.maximum(alive.sum(), 1))

        products = by_unit(at.params, at.gradient)
        return {path: cosine(path, leaf) for path, leaf in products.items()}

    return measure
