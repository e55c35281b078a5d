"""The blocks of random architectures: from a signal to a signal, by `net`'s parameters."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from structured_fuzz import WIDTHS, Signal, drawn

BLOCKS = {}


def block(fn):
    """A block is known by the name of its function."""
    BLOCKS[fn.__name__] = fn
    return fn


# --- layers that others are made of -------------------------------------------------------------


def dense(net, last, width, bias=True, name='dense'):
    """A dense layer over the last axis, its product written in one of several ways."""
    rng, n = net.inside(name).rng(), last.shape[-1]
    form = rng.integers(5)
    out_in = form in (1, 3)
    kernel = net.param(f'{name}.kernel', *((width, n) if out_in else (n, width)))
    if form == 0:
        y = last @ kernel
    elif form == 1:
        y = last @ kernel.T
    elif form == 2:
        y = jnp.einsum('...i,io->...o', last, kernel)
    elif form == 3:
        y = lax.dot_general(last, kernel, (((last.ndim - 1,), (1,)), ((), ())))
    else:
        y = jnp.tensordot(last, kernel, 1)
    if bias and rng.integers(2):
        y = y + net.param(f'{name}.bias', width)
    return y


def activation(rng, x):
    functions = (jax.nn.relu, jax.nn.gelu, jnp.tanh, jax.nn.silu, jax.nn.sigmoid, jax.nn.softplus)
    functions += (jax.nn.elu, jax.nn.leaky_relu, jax.nn.relu6, jax.nn.mish, jnp.square, jnp.abs)
    functions += (jnp.cos, jax.nn.selu, jax.nn.hard_swish, lambda x: jnp.where(x > 0, x, 0.1 * x))
    functions += (lambda x: jnp.clip(x, -1, 1), lambda x: jnp.minimum(x, 0) ** 2)
    return drawn(rng, functions)(x)


def sequence(signal):
    """(batch, time, channels)."""
    last = signal.last()
    return last.reshape(last.shape[0], -1, last.shape[-1])


def unsequence(signal, rows):
    """Back in the layout of a signal, with other channels."""
    shape = signal.last().shape
    return signal.like(rows.reshape(*shape[:-1], rows.shape[-1]))


def conv_numbers(signal, kernel_last):
    """Dimension numbers for the layout of the signal and a kernel with channels last or first."""
    n = signal.x.ndim
    space = ''.join('HWD'[i] for i in range(n - 2))
    data = ['N', *space]
    data.insert(signal.c, 'C')
    kernel = f'{space}IO' if kernel_last else f'OI{space}'
    return ''.join(data), kernel, ''.join(data)


def convolved(net, rng, signal, width, groups=1, name='conv', same=False):
    dims = signal.x.ndim - 2
    sizes = [signal.x.shape[i] for i in signal.space]
    window = [int(rng.integers(1, min(3, n) + 1)) for n in sizes]
    last = bool(rng.integers(2))
    shape = (signal.width // groups, width)
    shape = (*window, *shape) if last else (*shape[::-1], *window)
    kernel = net.param(f'{name}.kernel', *shape)
    strides, dilation, padding = [1] * dims, [1] * dims, 'SAME'
    if not same:
        strides = [int(rng.integers(1, 3)) for _ in sizes]
        dilation = [int(rng.integers(1, 3)) if n > 4 else 1 for n in sizes]
        explicit = [tuple(map(int, rng.integers(0, 2, 2))) for _ in sizes]
        fits = all(n > d * (w - 1) for n, d, w in zip(sizes, dilation, window, strict=True))
        padding = drawn(rng, ('SAME', 'VALID' if fits else 'SAME', explicit if fits else 'SAME'))
    numbers = lax.conv_dimension_numbers(signal.x.shape, kernel.shape, conv_numbers(signal, last))
    y = lax.conv_general_dilated(
        signal.x, kernel, strides, padding,
        rhs_dilation=dilation, dimension_numbers=numbers, feature_group_count=groups,
    )  # fmt: skip
    out = Signal(y, signal.c)
    if rng.integers(2):
        out = Signal(y + out.along(net.param(f'{name}.bias', width)), signal.c)
    return out


def linear(net, rng, signal, width, same=False, name='linear'):
    """A convolution where there is space, or a dense layer."""
    if signal.space and signal.x.ndim <= 5 and rng.integers(2):
        return convolved(net, rng, signal, width, name=name, same=same)
    return signal.like(dense(net, signal.last(), width, name=name))


def like_shape(signal, other):
    return signal.x.shape == other.x.shape


# --- one signal ---------------------------------------------------------------------------------


@block
def layer(net, rng, s):
    s = linear(net, rng, s, drawn(rng, WIDTHS))
    return Signal(activation(rng, s.x), s.c)


@block
def conv(net, rng, s):
    if not s.space:
        return layer(net, rng, s)
    s = convolved(net, rng, s, drawn(rng, WIDTHS))
    return Signal(activation(rng, s.x), s.c)


@block
def depthwise(net, rng, s):
    if not s.space:
        return layer(net, rng, s)
    multiplier = int(rng.integers(1, 4))
    s = convolved(net, rng, s, s.width * multiplier, groups=s.width)
    return Signal(activation(rng, s.x), s.c)


@block
def grouped_conv(net, rng, s):
    if not s.space:
        return layer(net, rng, s)
    groups = drawn(rng, [g for g in range(1, s.width + 1) if s.width % g == 0])
    return convolved(net, rng, s, groups * int(rng.integers(1, 4)), groups=groups)


@block
def transposed_conv(net, rng, s):
    if not s.space or s.c != s.x.ndim - 1:
        return layer(net, rng, s)
    dims, width = s.x.ndim - 2, drawn(rng, WIDTHS)
    swapped = bool(rng.integers(2))
    shape = (width, s.width) if swapped else (s.width, width)
    kernel = net.param('kernel', *(2,) * dims, *shape)
    numbers = lax.conv_dimension_numbers(s.x.shape, kernel.shape, conv_numbers(s, True))
    y = lax.conv_transpose(
        s.x, kernel, (2,) * dims, drawn(rng, ('SAME', 'VALID')),
        dimension_numbers=numbers, transpose_kernel=swapped,
    )  # fmt: skip
    return smaller_space(Signal(jnp.tanh(y), s.c))


def smaller_space(s):
    """At most six places along each axis: networks stay small."""
    index = [slice(None) if i in (0, s.c) else slice(0, 6) for i in range(s.x.ndim)]
    return Signal(s.x[tuple(index)], s.c)


@block
def norm(net, rng, s):
    kind = drawn(rng, ('batch', 'batch', 'train', 'instance', 'layer', 'rms', 'group'))
    x, others = s.x, tuple(i for i in range(s.x.ndim) if i != s.c)
    if kind == 'batch':
        mean, var = s.along(net.state('mean', s.width)), s.along(net.state('var', s.width))
        x = (x - mean) * lax.rsqrt(var + 1e-3)
    elif kind == 'train':
        x = (x - x.mean(others, keepdims=True)) / jnp.sqrt(x.var(others, keepdims=True) + 0.1)
    elif kind == 'instance' and s.space:
        axes = tuple(s.space)
        x = (x - x.mean(axes, keepdims=True)) / jnp.sqrt(x.var(axes, keepdims=True) + 0.1)
    elif kind == 'layer':
        x = (x - x.mean(s.c, keepdims=True)) / jnp.sqrt(x.var(s.c, keepdims=True) + 0.1)
    elif kind == 'rms':
        x = x * lax.rsqrt(jnp.square(x).mean(s.c, keepdims=True) + 0.1)
    elif kind == 'group' and s.width % 2 == 0:
        last = s.last()
        y = last.reshape(*last.shape[:-1], 2, -1)
        y = (y - y.mean(-1, keepdims=True)) / jnp.sqrt(y.var(-1, keepdims=True) + 0.1)
        x = s.like(y.reshape(last.shape)).x
    if rng.integers(4):
        x = x * s.along(net.param('scale', s.width)) + s.along(net.param('shift', s.width))
    return Signal(activation(rng, x), s.c)


@block
def pool(net, rng, s):
    if not s.space:
        return layer(net, rng, s)
    at = drawn(rng, s.space)
    n = s.x.shape[at]
    window, strides = [1] * s.x.ndim, [1] * s.x.ndim
    window[at], strides[at] = int(rng.integers(1, min(n, 3) + 1)), int(rng.integers(1, 3))
    kind = drawn(rng, ('max', 'mean', 'mean of blocks', 'global', 'global max'))
    if kind == 'max':
        return Signal(lax.reduce_window(s.x, -jnp.inf, lax.max, window, strides, 'SAME'), s.c)
    if kind == 'mean':
        y = lax.reduce_window(s.x, 0.0, lax.add, window, strides, 'VALID')
        return Signal(y / window[at], s.c)
    if kind == 'mean of blocks' and n % 2 == 0:
        shape = (*s.x.shape[:at], n // 2, 2, *s.x.shape[at + 1 :])
        return Signal(s.x.reshape(shape).mean(at + 1), s.c)
    if kind.startswith('global'):
        y = s.x.mean(at) if kind == 'global' else s.x.max(at)
        return Signal(y, s.c - (at < s.c))
    return s


@block
def bias_and_scale(net, rng, s):
    """Parameters that follow channels, with a zero-preserving reparametrisation or without."""
    gain = s.along(net.param('gain', s.width))
    form = rng.integers(5)
    if form == 0:
        return Signal(s.x * jnp.exp(gain), s.c)
    if form == 1:
        return Signal(jnp.where(s.x > 0, s.x, gain * s.x), s.c)
    if form == 2:
        return Signal(s.x * (1 + gain), s.c)
    if form == 3:
        return Signal(jnp.maximum(s.x, gain), s.c)
    return Signal(s.x / (1 + jnp.abs(gain)), s.c)


@block
def position_table(net, rng, s):
    """A constant or a parameter of the whole shape is added."""
    shape = (1, *s.x.shape[1:])
    if rng.integers(2):
        return Signal(s.x + net.param('table', *shape), s.c)
    table = np.cos(np.arange(math.prod(shape))).reshape(shape)
    return Signal(s.x + jnp.asarray(table, s.x.dtype), s.c)


# --- several branches ---------------------------------------------------------------------------


def body(net, rng, s):
    """One or two layers that keep the space."""
    for i in range(int(rng.integers(1, 3))):
        s = linear(net, rng, s, drawn(rng, WIDTHS), same=True, name=f'body{i}')
        s = Signal(activation(rng, s.x), s.c)
    return s


@block
def residual(net, rng, s):
    y = body(net.inside('branch'), rng, s)
    form = drawn(rng, ('identity', 'projected', 'padded', 'gated', 'maximum'))
    if form == 'padded' and y.width > s.width:
        low = int(rng.integers(0, y.width - s.width + 1))
        widths = [(0, 0)] * s.x.ndim
        widths[s.c] = (low, y.width - s.width - low)
        return Signal(jnp.pad(s.x, widths) + y.x, s.c)
    if form == 'projected':
        return Signal(linear(net, rng, s, y.width, same=True, name='skip').x + y.x, s.c)
    y = linear(net, rng, y, s.width, same=True, name='back')
    if form == 'gated':
        gate = jax.nn.sigmoid(net.param('gate', 1) if rng.integers(2) else net.param('gate'))
        return Signal(gate * s.x + (1 - gate) * y.x, s.c)
    if form == 'maximum':
        return Signal(jnp.maximum(s.x, y.x), s.c)
    return Signal(s.x + y.x, s.c)


@block
def concat(net, rng, s):
    y = body(net.inside('branch'), rng, s)
    parts = drawn(rng, ((s, y), (s, s), (y, s, y), (y, y), (s, y, s)))
    return Signal(jnp.concatenate([p.x for p in parts], s.c), s.c)


@block
def stacked_branches(net, rng, s):
    width = drawn(rng, WIDTHS)
    arms = [linear(net, rng, s, width, same=True, name=f'arm{i}') for i in range(2)]
    if not like_shape(*arms):
        return arms[0]
    both = jnp.stack([a.x for a in arms], axis=int(rng.integers(0, s.x.ndim + 1)) * 0)
    form = rng.integers(4)
    if form == 0:
        return Signal(both.mean(0), s.c)
    if form == 1:
        return Signal(both.max(0), s.c)
    if form == 2:
        return Signal(both.prod(0), s.c)
    weights = jax.nn.softmax(net.param('mix', 2))
    return Signal(jnp.tensordot(weights, both, 1), s.c)


@block
def squeeze_excite(net, rng, s):
    last = s.last()
    pooled = last.mean(tuple(range(1, last.ndim - 1)), keepdims=True) if s.space else last
    y = jax.nn.relu(dense(net, pooled, drawn(rng, WIDTHS), name='down'))
    gate = drawn(rng, (jax.nn.sigmoid, jnp.tanh, jax.nn.hard_sigmoid))
    return s.like(last * gate(dense(net, y, s.width, name='up')))


@block
def gated_linear(net, rng, s):
    """Gated linear units: one product cut in two, or two products."""
    width, last = drawn(rng, WIDTHS), s.last()
    form = rng.integers(4)
    if form == 0:
        a, b = jnp.split(dense(net, last, 2 * width), 2, -1)
    elif form == 1:
        both = dense(net, last, 2 * width)
        a, b = both[..., ::2], both[..., 1::2]
    elif form == 2:
        both = dense(net, last, 2 * width).reshape(*last.shape[:-1], 2, width)
        a, b = both[..., 0, :], both[..., 1, :]
    else:
        a, b = dense(net, last, width, name='a'), dense(net, last, width, name='b')
    return s.like(a * activation(rng, b))


@block
def bilinear(net, rng, s):
    last, width = s.last(), drawn(rng, WIDTHS)
    if rng.integers(2):
        kernel = net.param('kernel', last.shape[-1], last.shape[-1], width)
        return s.like(jnp.einsum('...i,...j,ijo->...o', last, last, kernel))
    a, b = dense(net, last, 2, name='a'), dense(net, last, 3, name='b')
    return s.like(jnp.einsum('...i,...j->...ij', a, b).reshape(*last.shape[:-1], 6))


@block
def experts(net, rng, s):
    """A soft mixture of experts."""
    rows, width, count = s.last(), drawn(rng, WIDTHS), drawn(rng, (2, 3, 4))
    gate = jax.nn.softmax(dense(net, rows, count, name='gate'))
    up = net.param('up', count, rows.shape[-1], width)
    hidden = jax.nn.relu(jnp.einsum('...c,ecf->...ef', rows, up))
    if rng.integers(2):
        return s.like(jnp.einsum('...ef,...e->...f', hidden, gate))
    down = net.param('down', count, width, rows.shape[-1])
    return s.like(jnp.einsum('...ef,efc,...e->...c', hidden, down, gate))


# --- moving -------------------------------------------------------------------------------------


@block
def flip(net, rng, s):
    return Signal(jnp.flip(s.x, int(rng.integers(1, s.x.ndim))), s.c)


@block
def channel_slice(net, rng, s):
    n, form = s.width, rng.integers(6)

    def at(index):
        return s.x[tuple(index if i == s.c else slice(None) for i in range(s.x.ndim))]

    if form == 0:
        return Signal(at(slice(0, None, 2)), s.c)
    if form == 1:
        return Signal(jnp.concatenate([at(slice(1, None)), at(slice(0, 1))], s.c), s.c)
    if form == 2:
        return Signal(jnp.roll(s.x, int(rng.integers(1, n + 1)), s.c), s.c)
    if form == 3:
        return Signal(at(slice(0, 1)) * at(slice(1, None)), s.c)
    if form == 4:
        return Signal(s.x + jnp.expand_dims(at(int(rng.integers(n))), s.c), s.c)
    return Signal(lax.dynamic_slice_in_dim(s.x, n // 3, n - n // 3, s.c), s.c)


@block
def space_slice(net, rng, s):
    if not s.space:
        return layer(net, rng, s)
    at = drawn(rng, s.space)
    if rng.integers(2):
        return Signal(jnp.flip(lax.slice_in_dim(s.x, 0, s.x.shape[at], 2, at), at), s.c)
    return Signal(jnp.take(s.x, int(rng.integers(s.x.shape[at])), at), s.c - (at < s.c))


@block
def channel_pad(net, rng, s):
    widths = [(0, 0)] * s.x.ndim
    widths[s.c] = tuple(map(int, rng.integers(0, 3, 2)))
    return Signal(jnp.pad(s.x, widths, constant_values=drawn(rng, (0, 1))), s.c)


@block
def space_pad(net, rng, s):
    if not s.space:
        return layer(net, rng, s)
    widths = [(0, 0)] * s.x.ndim
    widths[drawn(rng, s.space)] = (1, 0)
    return smaller_space(Signal(jnp.pad(s.x, widths, mode=drawn(rng, ('constant', 'edge'))), s.c))


@block
def shuffle(net, rng, s):
    """Channels in another order: by a reshape and a transpose, or by known indices."""
    last, n = s.last(), s.width
    if n % 2 == 0 and rng.integers(2):
        y = last.reshape(*last.shape[:-1], 2, n // 2)
        return s.like(jnp.swapaxes(y, -1, -2).reshape(last.shape))
    order = rng.permutation(n)
    if rng.integers(2):
        return s.like(last[..., order])
    return s.like(jnp.take(last, jnp.asarray(order), axis=-1))


@block
def pixel_shuffle(net, rng, s):
    last = s.last()
    if not s.space or s.width % 2:
        return layer(net, rng, s)
    *rest, t, n = last.shape
    if rng.integers(2) and t <= 3:
        return s.like(last.reshape(*rest, t * 2, n // 2))
    if t % 2 == 0:
        return s.like(last.reshape(*rest, t // 2, n * 2))
    return s


@block
def repeat(net, rng, s):
    """Every channel twice, in one of several ways."""
    form = rng.integers(4)
    if s.width > 6:
        return s
    if form == 0:
        return Signal(jnp.repeat(s.x, 2, s.c), s.c)
    if form == 1:
        times = [2 if i == s.c else 1 for i in range(s.x.ndim)]
        return Signal(jnp.tile(s.x, times), s.c)
    last = s.last()
    y = jnp.broadcast_to(last[..., None], (*last.shape, 2))
    y = y if form == 2 else jnp.swapaxes(y, -1, -2)
    return s.like(y.reshape(*last.shape[:-1], -1))


@block
def other_layout(net, rng, s):
    """Channels first or last; space in another order or in one axis."""
    form = rng.integers(3)
    if form == 0:
        return Signal(s.last(), s.x.ndim - 1)
    if form == 1:
        return Signal(jnp.moveaxis(s.x, s.c, 1), 1)
    return Signal(sequence(s), 2)


@block
def mix_space(net, rng, s):
    """A dense layer over an axis of space, as in MLP-mixers."""
    if not s.space:
        return layer(net, rng, s)
    at = drawn(rng, s.space)
    y = dense(net, jnp.moveaxis(s.x, at, -1), drawn(rng, (2, 3, 4)))
    return Signal(jnp.moveaxis(y, -1, at), s.c)


@block
def flatten(net, rng, s):
    """All channels and places become channels."""
    if s.x[0].size > 64:
        return pool(net, rng, s)
    s = Signal(s.x.reshape(s.x.shape[0], -1), 1)
    return s if rng.integers(2) else layer(net, rng, s)


@block
def ranked(net, rng, s):
    """Sorted, or the best few, along space; or something running along it."""
    if not s.space:
        return layer(net, rng, s)
    at = drawn(rng, s.space)
    form = rng.integers(6)
    if form == 0:
        return Signal(jnp.sort(s.x, axis=at), s.c)
    if form == 1:
        best = lax.top_k(jnp.moveaxis(s.x, at, -1), 2 if s.x.shape[at] > 1 else 1)[0]
        return Signal(jnp.moveaxis(best, -1, at), s.c)
    if form == 2:
        order = jnp.argsort(s.x, axis=at)
        return Signal(jnp.take_along_axis(s.x * 2, order, axis=at), s.c)
    if form == 3:
        return Signal(jnp.cumsum(s.x, axis=at), s.c)
    if form == 4:
        return Signal(lax.cumlogsumexp(s.x, axis=at), s.c)
    return Signal(jax.nn.softmax(s.x, axis=at) * s.x, s.c)


@block
def dropout(net, rng, s):
    keep = jax.random.bernoulli(jax.random.key(int(rng.integers(9))), 0.7, s.x.shape)
    return Signal(jnp.where(keep, s.x / 0.7, 0), s.c)
