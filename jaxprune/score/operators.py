"""The linear map that a convolution is: its singular values."""

import jax
import jax.numpy as jnp

from jaxprune import linalg
from jaxprune.arguments import least
from jaxprune.errors import PruneError, check_choice

PADDINGS = ('circular', 'zero')


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
        images.

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
    if padding == 'zero':
        return linalg.singular_values(_matrix(kernel, height, width, stride))
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

    def waves(size: int, taps: int) -> jax.Array:
        angles = jnp.arange(size)[:, None] * jnp.arange(taps)[None, :] % size / size
        return jnp.exp(-2j * jnp.pi * angles.astype(kernel.dtype))

    rows, columns = waves(height, kernel.shape[0]), waves(width, kernel.shape[1])
    return jnp.einsum('ya,xb,abio->yxio', rows, columns, kernel, precision='highest')


def _matrix(kernel: jax.Array, height: int, width: int, stride: int) -> jax.Array:
    """The map's full matrix `(inputs, outputs)`, from its values at unit images."""
    inputs = height * width * kernel.shape[2]
    pads = [((k - 1) // 2, k - 1 - (k - 1) // 2) for k in kernel.shape[:2]]
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
