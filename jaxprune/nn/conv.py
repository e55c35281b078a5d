"""Three implementations of convolution, for flax layers.

Under `vmap` over kernels XLA turns a convolution into one with a group per run, which is slow on
most machines; inside loops its CPU convolution is slower still (jax issue 12868). Written as
matrix products a convolution stays fast in both places, at the price of memory. Which way wins
depends on the machine and on the shapes, so it is measured (`sweep/probe.py`).

All take the arguments of `jax.lax.conv_general_dilated` as `flax.linen.Conv` passes them, channels
last, and return the same numbers up to rounding.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune.errors import JaxpruneError, lookup

#: `(x, kernel, strides, padding, **as in lax.conv_general_dilated) -> y`.
ConvFn = Callable[..., jax.Array]


def native(x: jax.Array, kernel: jax.Array, strides, padding, **kwargs: Any) -> jax.Array:
    """XLA's own convolution; under `vmap` over kernels a grouped one.

    A kernel larger than the image, 3x3 on the 2x2 maps at the end of a VGG, is a matrix product
    instead: XLA's CPU computes such a convolution number by number, 20 to 130 times slower.
    """
    beyond = any(k > n for k, n in zip(kernel.shape, x.shape[1:-1], strict=False))
    plain = kwargs.get('feature_group_count', 1) == 1 and not kwargs.get('preferred_element_type')
    if beyond and plain and math.prod(kwargs.get('lhs_dilation') or (1,)) == 1:
        return patches(x, kernel, strides, padding, **kwargs)
    return lax.conv_general_dilated(x, kernel, strides, padding, **kwargs)


def patches(x: jax.Array, kernel: jax.Array, strides, padding, **kwargs: Any) -> jax.Array:
    """All taps side by side, then one matrix product: fast, but the taps fill memory."""
    windows, grouped = _taps(x, kernel, strides, padding, **kwargs)
    if grouped == 1 and len(windows) == 1:
        return _matmul(windows[0], kernel.reshape(kernel.shape[-2:]), x.dtype)
    if grouped == 1:
        rows = jnp.concatenate(windows, axis=-1)
        return _matmul(rows, kernel.reshape(-1, kernel.shape[-1]), x.dtype)
    rows = jnp.stack(windows, axis=-2)  # (..., taps, channels)
    rows = rows.reshape(*rows.shape[:-1], grouped, -1)
    weights = kernel.reshape(len(windows), kernel.shape[-2], grouped, -1)
    out = jnp.einsum('...tgi,tigo->...go', rows, weights)
    return out.reshape(*out.shape[:-2], -1).astype(x.dtype)


def taps(x: jax.Array, kernel: jax.Array, strides, padding, **kwargs: Any) -> jax.Array:
    """One matrix product per tap, added up: little memory, many small products."""
    windows, grouped = _taps(x, kernel, strides, padding, **kwargs)
    total = None
    for window, weights in zip(windows, kernel.reshape(-1, *kernel.shape[-2:]), strict=True):
        part = _grouped_matmul(window, weights, grouped)
        total = part if total is None else total + part
    return total.astype(x.dtype)


CONVOLUTIONS: dict[str, ConvFn] = {'native': native, 'patches': patches, 'taps': taps}


def convolution(name: str) -> ConvFn:
    """A way to convolve by its name."""
    return lookup('convolution', name, CONVOLUTIONS, JaxpruneError)


def _matmul(rows: jax.Array, weights: jax.Array, dtype) -> jax.Array:
    return lax.dot_general(
        rows, weights, (((rows.ndim - 1,), (0,)), ((), ())), preferred_element_type=dtype
    )


def _grouped_matmul(window: jax.Array, weights: jax.Array, groups: int) -> jax.Array:
    """`(..., in) x (in / groups, out)`; with a group per channel an elementwise product."""
    if groups == 1:
        return _matmul(window, weights, window.dtype)
    if weights.shape[0] == 1 and weights.shape[1] == groups:  # depthwise
        return window * weights[0]
    split = window.reshape(*window.shape[:-1], groups, -1)
    out = jnp.einsum('...gi,igo->...go', split, weights.reshape(weights.shape[0], groups, -1))
    return out.reshape(*out.shape[:-2], -1)


def _taps(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding,
    *,
    lhs_dilation=None,
    rhs_dilation=None,
    dimension_numbers=None,
    feature_group_count: int = 1,
    **_: Any,
) -> tuple[list[jax.Array], int]:
    """For every kernel tap the inputs it meets, `(batch, ..., channels)`; and the groups."""
    rank = x.ndim - 2
    if lhs_dilation is not None and math.prod(lhs_dilation) != 1:
        raise JaxpruneError('a transposed convolution is only available as native')
    last = lax.conv_dimension_numbers(x.shape, kernel.shape, dimension_numbers)
    channels_last = (0, rank + 1, *range(1, rank + 1))
    if last.lhs_spec != channels_last or last.rhs_spec != (rank + 1, rank, *range(rank)):
        raise JaxpruneError('this convolution takes channels last and kernels (..., in, out)')
    dilation = tuple(rhs_dilation or (1,) * rank)
    sides = tuple((n - 1) * d + 1 for n, d in zip(kernel.shape, dilation, strict=False))
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:-1], sides, strides, padding)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    ends = [(n - side) // s + 1 for n, side, s in zip(x.shape[1:-1], sides, strides, strict=True)]
    windows = []
    for flat in range(math.prod(kernel.shape[:rank])):
        at = [i * d for i, d in zip(_unravel(flat, kernel.shape[:rank]), dilation, strict=True)]
        stop = [a + (n - 1) * s + 1 for a, n, s in zip(at, ends, strides, strict=True)]
        windows.append(
            lax.slice(x, (0, *at, 0), (x.shape[0], *stop, x.shape[-1]), (1, *strides, 1))
        )
    return windows, feature_group_count


def _unravel(flat: int, shape: Sequence[int]) -> list[int]:
    places = []
    for n in reversed(shape):
        flat, place = divmod(flat, n)
        places.append(place)
    return places[::-1]
