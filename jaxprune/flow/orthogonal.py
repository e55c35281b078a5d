"""Restoring isometry, or preserving it: orthogonal kernels, penalties, TPP.

Wang et al., "Dynamical Isometry: The Missing Ingredient for Neural Network Pruning",
arXiv:2105.05916, and "Trainability Preserving Neural Pruning", ICLR 2023, arXiv:2207.12534; their
code is MingSun-Tse/TPP. Rows of a kernel are its filters, flattened: the weights of one output,
with the outputs on the kernel's last axis.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import linalg
from jaxprune.errors import check_choice, lookup
from jaxprune.select import as_floats
from jaxprune.tree import check_masks_of, check_same_paths
from jaxprune.types import Masks, Weights

#: Activation after a layer -> gain with which a random kernel preserves lengths.
GAINS = {
    'linear': 1.0,
    'sigmoid': 1.0,
    'tanh': 5 / 3,
    'relu': 2**0.5,
    'leaky_relu': (2 / 1.0001) ** 0.5,
}
METHODS = ('qr', 'polar')


def orthogonalised(
    kernel: jax.Array,
    mask: jax.Array | None = None,
    *,
    activation: str = 'linear',
    method: str = 'qr',
) -> jax.Array:
    """OrthP: the kernel with orthonormal rows (or columns, where there are fewer), times a gain.

    Gram-Schmidt in the order of the filters, as published: the QR decomposition with a positive
    diagonal. It keeps the span of the filters and nothing else of what was learned. For a linear
    network of dense layers every singular value of the Jacobian becomes 1. For convolutions an
    orthogonal kernel is not an isometry of the map, and the paper's followers found no gain.

    The unpruned part of a masked kernel is made orthogonal, as if it had been cut out: the mask
    must prune whole inputs and whole outputs, both where a layer reads what another computes
    (`jaxprune.connectivity` prunes the inputs). Masks may be traced.

    Args:
      kernel: `(inputs, outputs)` or `(height, width, inputs, outputs)`.
      mask: bool, of its shape. If it is not the product of kept inputs and kept outputs, all
        entries of the result are NaN: no exact solution exists, see `approximately_orthogonal`.
      activation: a key of `GAINS`; a linear network has 'linear'.
      method: 'qr', or 'polar' for the nearest orthogonal kernel (not the paper's).

    Raises:
      PruneError: another activation or method.
    """
    gain = lookup('activation', activation, GAINS)
    check_choice('method', method, METHODS)
    rows = _rows(as_floats(kernel))
    keep = jnp.ones(rows.shape, bool) if mask is None else _rows(mask)
    outputs, inputs = keep.any(1), keep.any(0)
    block = outputs[:, None] & inputs[None, :]
    rows = jnp.where(keep, rows, 0)
    with jax.default_matmul_precision('highest'):
        if method == 'polar':
            made = _polar(rows)
        else:
            made = jnp.where(
                outputs.sum() < inputs.sum(),
                _gram_schmidt(rows.T, outputs).T,
                _gram_schmidt(rows, inputs),
            )
    made = jnp.where(block, made * gain, 0)
    made = jnp.where((keep == block).all(), made, jnp.nan)
    return _kernel(made, kernel.shape).astype(kernel.dtype)


def orthp(
    weights: Weights, masks: Masks | None = None, *, activation: str = 'linear', method: str = 'qr'
) -> Weights:
    """`orthogonalised` of every kernel, first and last included.

    Raises:
      PruneError: masks of other paths or shapes than the weights, or not boolean.
    """
    if masks is not None:
        check_masks_of(weights, masks)
    return {
        path: orthogonalised(
            w, None if masks is None else masks[path], activation=activation, method=method
        )
        for path, w in weights.items()
    }


def approximately_orthogonal(
    weights: Weights, masks: Masks, optimizer: Any, *, steps: int = 10_000
) -> Weights:
    """Kernels of any mask, brought near to orthogonal by descent: approximate isometry.

    Minimises `mean((W Wᵀ - I)²)` of every layer over its unpruned weights (Lee et al., ICLR 2020,
    arXiv:1906.06307; for the other side where there are fewer inputs than outputs).

    Args:
      optimizer: from optax; `adam(1e-3)` converges where the paper's 0.1 did not.
      steps: 10,000 as published.

    Raises:
      PruneError: masks of other paths or shapes than the weights, or not boolean.
    """
    check_masks_of(weights, masks)

    def distance(values: Weights) -> jax.Array:
        return sum((_defect(_rows(w), None) ** 2).mean() for w in values.values())

    def step(carry, _):
        values, state = carry
        gradient = jax.grad(distance)(values)
        gradient = {path: jnp.where(masks[path], leaf, 0) for path, leaf in gradient.items()}
        updates, state = optimizer.update(gradient, state, values)
        values = {
            path: jnp.where(masks[path], leaf + updates[path], 0) for path, leaf in values.items()
        }
        return (values, state), None

    start = {path: jnp.where(masks[path], w, 0) for path, w in weights.items()}
    (values, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=steps)
    return values


def kernel_orthogonality(weights: Weights, masks: Masks | None = None) -> jax.Array:
    """`Σ ‖W Wᵀ - I‖_F` over layers: a penalty that keeps flattened kernels orthogonal (KernOrth).

    Of the smaller side of each kernel. Filters that a mask prunes entirely have target length 0.
    """
    return sum(
        _norm(_defect(_rows(w), None if masks is None else _rows(masks[path])))
        for path, w in weights.items()
    )


def conv_orthogonality(kernel: jax.Array, *, stride: int = 1) -> jax.Array:
    """`‖conv(K, K) - I‖_F`: a penalty that keeps the convolution's map orthogonal (OrthConv).

    Wang et al., CVPR 2020, arXiv:1911.12207: the kernel's correlation with itself at every shift
    that the stride makes is the identity at no shift, zero elsewhere.

    Args:
      kernel: `(height, width, inputs, outputs)`.
    """
    pads = [((k - 1) // stride * stride,) * 2 for k in kernel.shape[:2]]
    overlap = jax.lax.conv_general_dilated(
        kernel.transpose(3, 0, 1, 2),
        kernel,
        (stride, stride),
        pads,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        precision='highest',
    )
    middle = tuple(pad[0] // stride for pad in pads)
    return _norm(overlap.at[:, middle[0], middle[1], :].add(-jnp.eye(kernel.shape[3])))


def tpp_penalty(kernel: jax.Array, pruned: jax.Array) -> jax.Array:
    """`mean((W Wᵀ - T)²)`: decorrelates the filters to be pruned from all others, and shrinks them.

    T is the Gram matrix itself, held fixed, with the rows and columns of pruned filters zero: the
    products of kept filters with each other are not penalised.

    Args:
      kernel: outputs on the last axis.
      pruned: bool `(outputs,)`, the filters to be pruned.
    """
    rows = _rows(kernel)
    gram = rows @ rows.T
    keep = ~pruned[:, None] & ~pruned[None, :]
    return ((gram - jnp.where(keep, jax.lax.stop_gradient(gram), 0)) ** 2).mean()


def tpp_gradients(
    params: Weights,
    pruned: dict[str, jax.Array],
    strength: jax.Array,
    *,
    weight: float = 1000.0,
) -> Weights:
    """What TPP adds to the gradients of the loss: decorrelation of kernels, and a pull to zero.

    `weight λ` times the gradient of `tpp_penalty`, for kernels; and `λ` times each pruned filter's
    parameters, for kernels, biases, batch norm's scale and bias alike.

    Args:
      params: path -> leaf with the outputs on the last axis.
      pruned: path -> bool `(outputs,)`, of the same paths.
      strength: λ, see `tpp_strength`.
      weight: 1000 as published.

    Raises:
      PruneError: `pruned` has other paths than `params`.
    """
    check_same_paths('pruned', pruned, params)

    def penalty(values: Weights) -> jax.Array:
        kernels = (path for path, leaf in values.items() if leaf.ndim > 1)
        return sum((tpp_penalty(values[p], pruned[p]) for p in kernels), jnp.zeros(()))

    push = jax.grad(penalty)(params)
    return {
        path: strength * (weight * push[path] + jnp.where(pruned[path], leaf, 0))
        for path, leaf in params.items()
    }


def tpp_strength(
    step: jax.Array, *, every: int = 10, increment: float = 1e-4, ceiling: float = 1.0
) -> jax.Array:
    """λ after so many steps: grows every 10 steps (CIFAR; 5 on ImageNet), up to 1."""
    return jnp.minimum(increment * (step // every), ceiling)


def _rows(kernel: jax.Array) -> jax.Array:
    """`(outputs, everything else)`, in the order inputs, height, width, as in the papers' code."""
    order = (kernel.ndim - 1, kernel.ndim - 2, *range(kernel.ndim - 2))
    return kernel.transpose(order).reshape(kernel.shape[-1], -1)


def _kernel(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_rows`."""
    outputs_first = (shape[-1], shape[-2], *shape[:-2])
    return rows.reshape(outputs_first).transpose((*range(2, len(shape)), 1, 0))


def _gram_schmidt(matrix: jax.Array, keep: jax.Array) -> jax.Array:
    """The columns that are kept made orthonormal in their order; the others zero.

    Householder's Q depends on the columns before only, so those that are kept come first. With more
    of them than rows there is no solution; the caller discards that result.
    """
    height, width = matrix.shape
    order = jnp.argsort(~keep, stable=True)[: min(height, width)]
    q, r = linalg.qr(matrix[:, order])
    diagonal = jnp.diagonal(r)
    q = jnp.where(keep[order], q * jnp.where(diagonal < 0, -1, 1), 0)
    return jnp.zeros_like(matrix).at[:, order].set(q)


def _polar(rows: jax.Array) -> jax.Array:
    u, s, vt = linalg.svd(rows)
    alive = s > s.max() * jnp.finfo(rows.dtype).eps * max(rows.shape)
    return (u * alive) @ vt


def _defect(rows: jax.Array, keep: jax.Array | None) -> jax.Array:
    """`W Wᵀ - I` of the smaller side."""
    if rows.shape[0] > rows.shape[1]:
        rows, keep = rows.T, None if keep is None else keep.T
    unit = jnp.ones(rows.shape[0], rows.dtype) if keep is None else keep.any(1).astype(rows.dtype)
    return jnp.matmul(rows, rows.T, precision='highest') - jnp.diag(unit)


def _norm(matrix: jax.Array) -> jax.Array:
    """The Frobenius norm, with a gradient of zero at zero."""
    square = (matrix**2).sum()
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
