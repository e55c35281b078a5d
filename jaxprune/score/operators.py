"""The linear map that a convolution is: its singular values, and norms of its single kernels."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxprune import linalg
from jaxprune.arguments import least
from jaxprune.errors import PruneError, check_choice, shown

PADDINGS = ('circular', 'zero', 'full')
#: Norms of a map: its largest singular value, the sum of them all, the root of their squares' sum.
NORMS = ('spectral', 'nuclear', 'frobenius')


def conv_singular_values(
    kernel: jax.Array, side: int | tuple[int, int], *, stride: int = 1, padding: str = 'circular'
) -> jax.Array:
    """All singular values of a convolution as a linear map of images, falling.

    They are not those of the flattened kernel: a kernel with orthonormal filters need not preserve
    lengths, one whose only tap is orthogonal does.

    Args:
      kernel: `(height, width, in, out)`.
      side: height and width of the input.
      stride: of both axes; must divide them for circular padding.
      padding: 'circular': by the Fourier transform, exactly and cheaply (Sedghi, Gupta & Long, ICLR
        2019, arXiv:1805.10408; with a stride, `stride²` frequencies share a block); 'zero': 'same'
        padding of `(k - 1) // 2` before and the rest behind, by the map's full matrix, for small
        images; 'full': the same with `k - 1` zeros on every side.

    Returns:
      `(n,)`; n is the smaller of the map's two dimensions.

    Raises:
      PruneError: another padding, a kernel of other axes, a side or stride that is no whole number
        above 0, a stride that does not divide the side.
    """
    height, width = side if isinstance(side, tuple) else (side, side)
    least(1, height=height, width=width, stride=stride)
    if kernel.ndim != 4:
        raise PruneError(f'a kernel is (height, width, in, out), not {tuple(kernel.shape)}')
    check_choice('padding', padding, PADDINGS)
    if padding != 'circular':
        return linalg.singular_values(_matrix(kernel, height, width, stride, padding))
    if height % stride or width % stride:
        raise PruneError(f'a stride of {stride} does not divide images of {height} x {width}')
    blocks = _blocks(kernel, height, width, stride)
    return jnp.sort(linalg.singular_values(blocks).ravel())[::-1]


def _blocks(kernel: jax.Array, height: int, width: int, stride: int) -> jax.Array:
    """The map in the Fourier basis: blocks `(frequencies, out, in * stride²)`.

    Frequencies that a stride makes alike (aliases) feed the same output frequency.
    """
    frequencies = _transfer(kernel, height, width)
    inputs, outputs = kernel.shape[2:]
    rows, columns = height // stride, width // stride
    cut = frequencies.reshape(stride, rows, stride, columns, inputs, outputs)
    cut = cut.transpose(1, 3, 5, 0, 2, 4).reshape(rows * columns, outputs, -1)
    return cut / stride


def _transfer(kernel: jax.Array, height: int, width: int) -> jax.Array:
    """The kernel's Fourier transform at the frequencies of the grid, tap by tap.

    A few taps need no fast transform, and XLA's own waits for its threads on the CPU.
    """
    rows = _waves(height, kernel.shape[0], kernel.dtype)
    columns = _waves(width, kernel.shape[1], kernel.dtype)
    return jnp.einsum('ya,xb,abio->yxio', rows, columns, kernel, precision='highest')


def _waves(size: int, taps: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """`(frequencies, taps)`: the waves of a ring of that size, at the first places."""
    angles = jnp.arange(size)[:, None] * jnp.arange(taps)[None, :] % size / size
    return jnp.exp(-2j * jnp.pi * angles.astype(dtype))


def slice_norms(
    kernel: jax.Array,
    side: int | tuple[int, ...] = 16,
    *,
    stride: int | tuple[int, ...] = 1,
    norm: str = 'spectral',
) -> jax.Array:
    """The norm of each single kernel, from one input to one output, as a map of periodic images.

    Edge weights of LEAN (Schoonhoven et al., 2020, arXiv:2011.06923). With stride 1 the spectral
    norm is the largest `|Fourier transform|` of the kernel. A stride s adds frequencies up in sets
    of s along each axis, so the norm is the largest root mean square of a set: that of the
    polyphase parts. A stride as long as the kernel leaves the Frobenius norm of the kernel, and a
    kernel of one entry has the norm |k|. Any side that holds the kernel gives a lower bound of the
    norm on large images.

        slice_norms(jnp.ones((3, 3, 1, 1)))  # [[9.]]: a constant image is multiplied by 9
        slice_norms(jnp.ones((3, 3, 1, 1)), stride=4)  # [[3.]]: no two windows overlap

    Args:
      kernel: `(*sides, in, out)`: (height, width, in, out), or with any other number of sides, also
        none.
      side: of the image, one for all of its axes or one for each.
      stride: one for all axes or one for each; must divide the side.
      norm: 'spectral', 'nuclear' or 'frobenius'.

    Returns:
      `(in, out)`. A float16 kernel gives float32.

    Raises:
      PruneError: another norm, a kernel without inputs and outputs, a side or stride that is no
        whole number above 0 or not one for each axis, a stride that does not divide the side.
    """
    check_choice('norm', norm, NORMS)
    if kernel.ndim < 2:
        raise PruneError(f'a kernel is (*sides, in, out), not {tuple(kernel.shape)}')
    taps = kernel.shape[:-2]
    sizes, strides = _for_each(side, 'side', taps), _for_each(stride, 'stride', taps)
    for n, s in zip(sizes, strides, strict=True):
        if n % s:
            raise PruneError(f'a stride of {s} does not divide a side of {n}')
    kernel = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    if math.prod(taps) == 1:
        outputs = math.prod(n // s for n, s in zip(sizes, strides, strict=True))
        factor = {'spectral': 1, 'nuclear': outputs, 'frobenius': math.sqrt(outputs)}[norm]
        return jnp.abs(kernel.reshape(kernel.shape[-2:])) * factor
    waves = _window_waves(taps, sizes, strides, kernel.dtype)
    if norm == 'spectral':  # the other half is conjugate to this one
        waves = waves[: waves.shape[0] // 2 + 1]
    alike = waves.shape[-2]
    waves = waves.reshape(-1, waves.shape[-1])

    def of_some(slices: jax.Array) -> jax.Array:
        """Of `(taps, n)`: `(n,)`."""
        real, imaginary = (
            jnp.matmul(wave, slices, precision='highest') for wave in (waves.real, waves.imag)
        )
        power = (real**2 + imaginary**2).reshape(-1, alike, slices.shape[1]).mean(1)
        if norm == 'nuclear':
            return jnp.sqrt(power).sum(0)
        return jnp.sqrt(power.max(0) if norm == 'spectral' else power.sum(0))

    return _some_at_a_time(of_some, kernel.reshape(math.prod(taps), -1)).reshape(kernel.shape[-2:])


def _window_waves(
    taps: tuple[int, ...],
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """`(frequencies along the first side, along the others, alike, taps)`.

    Frequencies of the outputs, and for each those of the inputs that a stride makes alike.
    """
    found = jnp.ones((1, 1, 1))
    for n, k, s in zip(sizes, taps, strides, strict=True):
        own = _waves(n, k, dtype).reshape(s, n // s, k).swapaxes(0, 1)
        found = jnp.einsum('fat,gbu->fgabtu', found, own)
        found = found.reshape(math.prod(found.shape[:2]), math.prod(found.shape[2:4]), -1)
    first = sizes[0] // strides[0]
    return found.reshape(first, -1, *found.shape[1:])


#: Single kernels that are transformed at a time: more would fill memory under `vmap`.
_AT_A_TIME = 4096


def _some_at_a_time(fn: Callable[[jax.Array], jax.Array], slices: jax.Array) -> jax.Array:
    """`fn` of `(taps, n)`, of some columns after others."""
    count = slices.shape[1]
    if count <= _AT_A_TIME:
        return fn(slices)
    padded = jnp.pad(slices, ((0, 0), (0, -count % _AT_A_TIME)))
    parts = padded.reshape(slices.shape[0], -1, _AT_A_TIME).swapaxes(0, 1)
    return jax.lax.map(fn, parts).reshape(-1)[:count]


def _for_each(value: int | tuple[int, ...], name: str, taps: tuple[int, ...]) -> tuple[int, ...]:
    """One number for each side."""
    each = value if isinstance(value, tuple) else (value,) * max(len(taps), 1)
    for number in each:
        least(1, **{name: number})
    if isinstance(value, tuple) and len(each) != len(taps):
        raise PruneError(f'{name} must be one number or {len(taps)}, not {shown(value)}')
    return each[: len(taps)]


def _matrix(kernel: jax.Array, height: int, width: int, stride: int, padding: str) -> jax.Array:
    """The map's full matrix `(inputs, outputs)`, from its values at unit images."""
    inputs = height * width * kernel.shape[2]
    pads = [((k - 1) // 2, k - 1 - (k - 1) // 2) for k in kernel.shape[:2]]
    if padding == 'full':
        pads = [(k - 1, k - 1) for k in kernel.shape[:2]]
    images = jnp.eye(inputs, dtype=kernel.dtype).reshape(inputs, height, width, -1)
    maps = jax.lax.conv_general_dilated(
        images,
        kernel,
        (stride, stride),
        pads,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        precision='highest',
    )
    return maps.reshape(inputs, -1)
