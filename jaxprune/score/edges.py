"""Sensitivities of weights: their share in the sum that they take part in (SiPP, PFP).

Baykal, Liebenwein, Gilitschenski, Feldman & Rus, "SiPPing neural networks: sensitivity-informed
provable pruning of neural networks", arXiv:1910.05422; Liebenwein, Baykal, Lang, Feldman & Rus,
"Provable filter pruning for efficient neural networks", ICLR 2020, arXiv:1911.07412.
"""

import math
from collections.abc import Callable, Collection, Container, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxprune.errors import PruneError, check_choice, quoted
from jaxprune.score.loss import examples
from jaxprune.score.products import Product, products
from jaxprune.types import Batches, Problem, View

REDUCTIONS = ('max', 'mean')
#: A sum that is not larger says nothing of its parts: the rounding of float32, as published.
_SILENT = 2.0**-23
#: Entries of the largest array that one step makes: 16 MiB of float32.
_STEP = 2**22
#: Entries of all that the kernels of a network read, for the examples that are run together.
_TOGETHER = 2**26


class Sensed(NamedTuple):
    """The sensitivities of a product's kernel.

    Attributes:
      product: the kernel and how it is used on one example; its operand is that of the first one.
      values: sensitivities, shaped like `product.kernel`.
    """

    product: Product
    values: jax.Array


class Edges(NamedTuple):
    """The sensitivities of a leaf.

    Attributes:
      values: one for each weight, in float32 or wider.
      positions: at how many places of one example the leaf is used.
      channels: how many channels an output reads.
      taps: by how many weights each: 9 of a convolution of 3 x 3, 1 of a matrix.
    """

    values: jax.Array
    positions: int
    channels: int
    taps: int


def edge_sensitivity(kernel: jax.Array, inputs: jax.Array, reduce: str = 'max') -> jax.Array:
    """The sensitivities of a kernel for one example.

    With a >= 0 the sensitivity of `w[j, o]` at a position is `|w[j, o]| a[j] / z`, z the sum of
    `|w[k, o]| a[k]` over all k whose weight has the sign of `w[j, o]`. It is 0 where z is at most
    2**-23. Where activations may be negative, their positive and their negative parts count as two
    examples. Biases take no part.

        w = jnp.array([[[1.0], [3.0]]])
        edge_sensitivity(w, jnp.ones((1, 1, 2)))  # 0.25, 0.75

    Args:
      kernel: `(groups, inputs, outputs)`.
      inputs: `(groups, positions, inputs)`.
      reduce: over positions, 'max' or 'mean'.

    Returns:
      Shaped like `kernel`, in [0, 1] up to rounding; the larger one of the two parts.

    Raises:
      PruneError: another reduction, shapes that do not fit, no position.
    """
    check_choice('reduction', reduce, REDUCTIONS)
    fits = kernel.ndim == inputs.ndim == 3 and kernel.shape[:2] == (*inputs.shape[::2],)
    if not fits or not inputs.shape[1]:
        raise PruneError(
            'expected a kernel (groups, inputs, outputs) and inputs (groups, positions, inputs), '
            f'not {tuple(kernel.shape)} and {tuple(inputs.shape)}'
        )
    dtype = _dtype(kernel, inputs)
    kernel, inputs = kernel.astype(dtype), inputs.astype(dtype)
    # One position has a mean that is exact only as a quotient.
    shares = _mean_shares if reduce == 'mean' and inputs.shape[1] > 1 else _largest_shares
    found = shares(kernel, jnp.maximum(inputs, 0))
    # Behind a ReLU there is no negative part to look at.
    negative = jax.lax.cond(
        (inputs < 0).any(),
        lambda: shares(kernel, jnp.maximum(-inputs, 0)),
        lambda: jnp.zeros_like(kernel),
    )
    return jnp.maximum(found, negative)


def sensed(
    problem: Problem,
    view: View,
    batches: Batches | None,
    reduce: str,
    paths: Container[str] | None = None,
) -> list[Sensed]:
    """The sensitivities of all kernels that a network multiplies with: the largest over examples.

    Examples are looked at one by one, positions in blocks: beside the activations of a few
    examples, memory holds one example's patches of one layer and a few arrays of its kernel's size.

    Args:
      problem: the network, in evaluation mode.
      view: its weights.
      batches: the examples; labels are not used.
      reduce: over positions, see `edge_sensitivity`.
      paths: of the parameters that are kernels; None for the prunable ones.

    Raises:
      PruneError: no batches.
    """
    x = examples(batches, 'sensitivity')
    seen = products(problem, view, x[:1], paths)

    def operands(one: jax.Array) -> list[jax.Array]:
        return [product.operand for product in products(problem, view, one[None], paths)]

    def some(best: list[jax.Array], x: jax.Array) -> list[jax.Array]:
        each = jax.vmap(operands)(x)
        return [_larger_of(*all_of, reduce) for all_of in zip(best, seen, each, strict=True)]

    start = [jnp.zeros(p.kernel.shape, _dtype(p.kernel, p.operand)) for p in seen]
    found = _over_blocks(some, start, x, sum(product.operand.size for product in seen))
    return [Sensed(*both) for both in zip(seen, found, strict=True)]


def _dtype(*arrays: jax.Array):
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def _larger_of(best: jax.Array, product: Product, each: jax.Array, reduce: str) -> jax.Array:
    """The sensitivities of a few examples, or those found before where they are larger."""
    groups, channels, taps, outputs = product.kernel.shape
    flat = (groups, channels * taps, outputs)
    kernel = product.kernel.reshape(flat)

    def one(best: jax.Array, operand: jax.Array) -> tuple[jax.Array, None]:
        patches = product.patches(operand).reshape(groups, product.positions, channels * taps)
        return jnp.maximum(best, edge_sensitivity(kernel, patches, reduce)), None

    return jax.lax.scan(one, best.reshape(flat), each)[0].reshape(best.shape)


def _over_blocks(
    some: Callable[[list[jax.Array], jax.Array], list[jax.Array]],
    start: list[jax.Array],
    x: jax.Array,
    entries: int,
) -> list[jax.Array]:
    """What is found over all examples, as many together as memory allows."""
    count = x.shape[0]
    block = min(max(_TOGETHER // max(entries, 1), 1), count)
    if block == count:
        return some(start, x)
    # The last block is filled up with examples that were seen before: the largest stays the same.
    steps = math.ceil(count / block)
    blocks = jnp.concatenate([x, x[: steps * block - count]]) if steps * block > count else x
    blocks = blocks.reshape(steps, block, *x.shape[1:])
    return jax.lax.scan(lambda best, x: (some(best, x), None), start, blocks)[0]


def edge_sensitivities(
    problem: Problem,
    view: View,
    batches: Batches | None,
    *,
    reduce: str = 'max',
    paths: Collection[str] | None = None,
) -> dict[str, Edges]:
    """The sensitivities of kernels, with the sizes that error bounds go by.

    A weight that is used several times has the largest of its sensitivities.

    Args:
      problem: the network, in evaluation mode.
      view: its weights.
      batches: the examples; labels are not used.
      reduce: over positions: 'max' (random SiPP, PFP) or 'mean' (deterministic SiPP).
      paths: of the parameters that are kernels; None for the prunable ones.

    Raises:
      PruneError: no batches; a path whose kernel is seen in no product.
    """
    paths = view.weights if paths is None else paths
    made: dict[str, Edges] = {}
    for product, values in sensed(problem, view, batches, reduce, paths):
        for path, leaf in product.leaves(values).items():
            edges = Edges(leaf, product.positions, *product.kernel.shape[1:3])
            made[path] = jax.tree.map(_larger, made[path], edges) if path in made else edges
    check_seen(paths, made)
    return {path: made[path] for path in paths}


def check_seen(paths: Iterable[str], found: Container[str]) -> None:
    """Raises PruneError for the first path whose kernel was seen in no product."""
    for path in paths:
        if path not in found:
            raise PruneError(
                f'{quoted(path)} was seen in no product: sensitivities are those of kernels of '
                'matrix products and convolutions'
            )


def _larger(one, other):
    return jnp.maximum(one, other) if isinstance(one, jax.Array) else max(one, other)


def _sums(kernel: jax.Array, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What positive weights and what negative ones add up to, infinite where that is too small."""

    def of(part: jax.Array) -> jax.Array:
        z = jnp.matmul(inputs, part, precision='highest')
        return jnp.where(z <= _SILENT, jnp.inf, z)  # a NaN stays one

    return of(jnp.maximum(kernel, 0)), of(jnp.maximum(-kernel, 0))


def _mean_shares(kernel: jax.Array, inputs: jax.Array) -> jax.Array:
    """The mean over positions: a matrix product with one over the sums."""
    turned = jnp.swapaxes(inputs, 1, 2)
    up, down = (jnp.matmul(turned, 1 / z, precision='highest') for z in _sums(kernel, inputs))
    return jnp.abs(kernel) * jnp.where(kernel > 0, up, down) / inputs.shape[1]


def _largest_shares(kernel: jax.Array, inputs: jax.Array) -> jax.Array:
    """The largest over positions, block by block."""
    groups, positions, _ = inputs.shape
    block = min(max(_STEP // max(kernel.size, 1), 1), positions)
    steps = math.ceil(positions / block)

    def cut(array: jax.Array, fill: float) -> jax.Array:
        pads = ((0, 0), (0, steps * block - positions), (0, 0))
        filled = jnp.pad(array, pads, constant_values=fill)
        return jnp.moveaxis(filled.reshape(groups, steps, block, -1), 1, 0)

    def one(best: jax.Array, at: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        a, up, down = at
        z = jnp.where(kernel[:, None] > 0, up[:, :, None], down[:, :, None])
        # Not times 1 / z: an input that is alone has a sensitivity of exactly 1.
        share = jnp.abs(kernel)[:, None] * a[..., None] / z
        return jnp.maximum(best, share.max(1)), None

    up, down = _sums(kernel, inputs)
    rows = cut(inputs, 0), cut(up, jnp.inf), cut(down, jnp.inf)
    start = jnp.zeros_like(kernel)
    if steps == 1:
        return one(start, jax.tree.map(lambda leaf: leaf[0], rows))[0]
    return jax.lax.scan(one, start, rows)[0]
