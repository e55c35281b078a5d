"""Rarer blocks of random architectures: products, tokens, channels by number, odd ways of space."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from structured_fuzz import WIDTHS, Signal, drawn
from structured_fuzz_blocks import activation, block, body, dense, linear, sequence, unsequence

# --- products -----------------------------------------------------------------------------------


@block
def gram(net, rng, s):
    """Products of channels with channels, over space or place by place."""
    if s.width > 4:
        s = s.like(dense(net, s.last(), 3, name='narrow'))
    rows = sequence(s)
    if rng.integers(2):
        y = jnp.einsum('btc,btd->bcd', rows, rows)
        return Signal(y.reshape(y.shape[0], -1), 1)
    y = (rows[..., :, None] * rows[..., None, :]).reshape(*rows.shape[:2], -1)
    return unsequence(s, y)


@block
def blocks_of_kernels(net, rng, s):
    """Linear layers in groups: block diagonal, or two with a shuffle between."""
    last, n = s.last(), s.width
    if n % 2:
        return s
    groups = drawn(rng, [g for g in (2, 3, 4) if n % g == 0])
    out = drawn(rng, (2, 3, n // groups))
    y = last.reshape(*last.shape[:-1], groups, n // groups)
    y = jnp.einsum('...gi,gio->...go', y, net.param('first', groups, n // groups, out))
    if rng.integers(2):
        y = jnp.swapaxes(y, -1, -2)
        y = jnp.einsum('...gi,gio->...go', y, net.param('second', out, groups, 2))
    return s.like(jnp.tanh(y).reshape(*last.shape[:-1], -1))


@block
def kronecker(net, rng, s):
    if s.width % 2:
        return s
    a, b = net.param('a', 2, 3), net.param('b', s.width // 2, 2)
    if rng.integers(2):
        return s.like(s.last() @ jnp.kron(a, b))
    y = s.last().reshape(*s.last().shape[:-1], 2, -1)
    return s.like(jnp.einsum('...ij,io,jp->...op', y, a, b).reshape(*y.shape[:-2], -1))


@block
def autoencoder(net, rng, s):
    """A kernel and its transpose; or a symmetric kernel."""
    last, n = s.last(), s.width
    if rng.integers(2):
        kernel = net.param('kernel', n, drawn(rng, WIDTHS))
        return s.like(last + jnp.tanh(last @ kernel) @ kernel.T)
    kernel = net.param('square', n, n)
    return s.like(jnp.tanh(last @ (kernel + kernel.T)))


@block
def dynamic_kernel(net, rng, s):
    """A kernel that the activations make: a mixture of kernels, or all its entries."""
    rows, width = sequence(s), drawn(rng, (2, 3, 4))
    pooled = rows.mean(1)
    if rng.integers(2):
        mix = jax.nn.softmax(dense(net, pooled, 3, name='mix'))
        kernel = jnp.einsum('bk,kio->bio', mix, net.param('kernels', 3, s.width, width))
    else:
        kernel = dense(net, pooled, s.width * width, name='made')
        kernel = kernel.reshape(pooled.shape[0], s.width, width)
    return unsequence(s, jnp.einsum('bti,bio->bto', rows, kernel))


@block
def scaled_kernel(net, rng, s):
    """A kernel normalised over one of its axes, or with other numbers in each row."""
    kernel = net.param('kernel', s.width, drawn(rng, WIDTHS))
    form = rng.integers(4)
    if form == 0:
        kernel = kernel - kernel.mean(0)
    elif form == 1:
        kernel = kernel / jnp.sqrt((kernel**2).sum(1, keepdims=True) + 0.1)
    elif form == 2:
        kernel = jax.nn.softmax(kernel, axis=int(rng.integers(2)))
    else:
        kernel = kernel * net.param('rows', s.width, 1) * net.param('columns', kernel.shape[1])
    return s.like(s.last() @ kernel)


@block
def many_axes(net, rng, s):
    """A product over several axes at once, channels among them."""
    rows = sequence(s)
    if rows.shape[1] > 9:
        return Signal(rows.mean(1), 1)
    kernel = net.param('kernel', rows.shape[1], s.width, 2, 3)
    y = jnp.einsum('btc,tcij->bij', rows, kernel)
    if rng.integers(2):
        return Signal(jax.nn.relu(y), int(rng.integers(1, 3)))
    return Signal(y.reshape(y.shape[0], -1), 1)


# --- attention and tokens -----------------------------------------------------------------------


@block
def learned_tokens(net, rng, s):
    """Tokens that are parameters: put before the others, or asking them."""
    rows, n = sequence(s), s.width
    count = int(rng.integers(1, 4))
    token = jnp.broadcast_to(net.param('token', count, n), (rows.shape[0], count, n))
    if rng.integers(2):
        rows = jnp.concatenate([token, rows], 1)
        return Signal(rows, 2) if rng.integers(2) else Signal(rows[:, 0], 1)
    logits = jnp.einsum('blc,btc->blt', token, rows)
    y = jnp.einsum('blt,btc->blc', jax.nn.softmax(logits), rows)
    return Signal(y, 2)


@block
def cross_attention(net, rng, s):
    """One head; keys and queries normalised, scaled or biased by a table of distances."""
    rows = sequence(s)
    t = rows.shape[1]
    q, k, v = (dense(net, rows, 4, name=name) for name in 'qkv')
    form = rng.integers(4)
    if form == 0:
        q, k = (a / jnp.sqrt((a * a).sum(-1, keepdims=True) + 0.1) for a in (q, k))
    if form == 1:
        q, k = (a.reshape(*rows.shape[:2], 2, 2) for a in (q, k))
        scale = net.param('scale', 2)
        q = q * scale
        logits = jnp.einsum('bthd,bshd->bhts', q, k)
        table = net.param('table', 2 * t - 1, 2)
        distance = np.arange(t)[:, None] - np.arange(t)[None] + t - 1
        weights = jax.nn.softmax(logits + table[distance].transpose(2, 0, 1))
        y = jnp.einsum('bhts,bshd->bthd', weights, v.reshape(*rows.shape[:2], 2, 2))
        return unsequence(s, dense(net, y.reshape(v.shape), 3, name='out'))
    logits = q @ jnp.swapaxes(k, -1, -2)
    if form == 2:
        logits = logits * net.param('temperature')
    return unsequence(s, jax.nn.softmax(logits) @ v)


@block
def talking_heads(net, rng, s):
    """Heads are mixed before or after the softmax; two maps are subtracted."""
    rows = sequence(s)
    q, k, v = (dense(net, rows, 6, name=name).reshape(*rows.shape[:2], 2, 3) for name in 'qkv')
    logits = jnp.einsum('bthd,bshd->bhts', q, k)
    if rng.integers(2):
        logits = jnp.einsum('bhts,hg->bgts', logits, net.param('before', 2, 2))
    weights = jax.nn.softmax(logits)
    if rng.integers(2):
        weights = jnp.einsum('bhts,hg->bgts', weights, net.param('after', 2, 2))
    y = jnp.einsum('bhts,bshd->bthd', weights, v)
    return unsequence(s, dense(net, y.reshape(*rows.shape[:2], 6), s.width, name='out'))


@block
def window_attention(net, rng, s):
    """Attention inside of windows of space, shifted."""
    rows = sequence(s)
    b, t, n = rows.shape
    if t % 2:
        return s
    rows = jnp.roll(rows, 1, 1).reshape(b * t // 2, 2, n)
    q, k, v = jnp.split(dense(net, rows, 12), 3, -1)
    q, k, v = (a.reshape(*a.shape[:2], 2, 2).swapaxes(1, 2) for a in (q, k, v))
    y = jax.nn.softmax(q @ k.swapaxes(-1, -2)) @ v
    y = y.swapaxes(1, 2).reshape(b, t, 4)
    return unsequence(s, dense(net, y, n, name='out'))


@block
def top_experts(net, rng, s):
    """The best of several experts, by their rank."""
    rows = s.last()
    logits = dense(net, rows, 3, name='gate')
    best, places = lax.top_k(logits, 2)
    weights = (jax.nn.one_hot(places, 3, dtype=rows.dtype) * jax.nn.softmax(best)[..., None]).sum(
        -2
    )
    up, down = net.param('up', 3, s.width, 4), net.param('down', 3, 4, s.width)
    hidden = jax.nn.silu(jnp.einsum('...c,ecf->...ef', rows, up))
    return s.like(jnp.einsum('...ef,efc,...e->...c', hidden, down, weights))


# --- channels as numbers ------------------------------------------------------------------------


@block
def by_position(net, rng, s):
    """Channels that are treated by their number."""
    n, number = s.width, s.along(jnp.arange(s.width))
    form = rng.integers(5)
    if form == 0:
        return Signal(jnp.where(number < n // 2, s.x, -s.x), s.c)
    if form == 1:
        return Signal(s.x * number.astype(s.x.dtype), s.c)
    if form == 2:
        return Signal(jnp.where(number % 2 == 0, s.x, 0), s.c)
    if form == 3:
        return Signal(s.x[tuple(slice(None, None, -2) if i == s.c else slice(None)
                                for i in range(s.x.ndim))], s.c)  # fmt: skip
    mask = np.arange(n) % 3 == 0
    return Signal(s.x * s.along(jnp.asarray(mask, s.x.dtype)), s.c)


@block
def neighbours(net, rng, s):
    """Channels that meet their neighbours."""
    last, form = s.last(), rng.integers(5)
    if form == 0 and s.width > 2:
        return s.like(last[..., 1:] - last[..., :-1])
    if form == 1:
        return s.like(last + jnp.roll(last, 1, -1))
    if form == 2 and s.width % 2 == 0:
        return s.like(last.reshape(*last.shape[:-1], s.width // 2, 2).max(-1))
    if form == 3:
        return s.like(jnp.cumsum(last, -1))
    if form == 4:
        window = (1,) * (last.ndim - 1) + (3,)
        total = lax.reduce_window(last * last, 0.0, lax.add, window, (1,) * last.ndim, 'SAME')
        return s.like(last / (1 + total))
    return s


@block
def pairs(net, rng, s):
    """Neighbouring channels as a pair, or halves as one: complex numbers, rotations, exchange."""
    last, n = s.last(), s.width
    if n % 2:
        return s
    form = rng.integers(4)
    if form == 0:
        y = last.reshape(*last.shape[:-1], n // 2, 2)
        z = lax.complex(y[..., 0], y[..., 1]) * jnp.exp(1j * jnp.arange(n // 2)).astype(
            jnp.result_type(last.dtype, jnp.complex64)
        )
        y = jnp.stack([z.real, z.imag], -1).astype(last.dtype)
        return s.like(y.reshape(last.shape))
    a, b = jnp.split(last, 2, -1) if form == 1 else (last[..., ::2], last[..., 1::2])
    if form == 1:
        return s.like(jnp.concatenate([b, a * 2], -1))
    if form == 2:
        return s.like(jnp.stack([b, a], -1).reshape(last.shape))
    return s.like(jnp.stack([b, a], -2).reshape(last.shape))


@block
def mixed_axes(net, rng, s):
    """A reshape that does not keep channels apart, or only in part."""
    last = s.last()
    flat = last.reshape(last.shape[0], -1)
    if flat.shape[1] > 64:
        return pooled(net, rng, s)
    form = rng.integers(3)
    if form == 0 and flat.shape[1] % 6 == 0:
        return Signal(flat.reshape(last.shape[0], -1, 6), 2)
    if form == 1:
        return Signal(flat[:, ::3], 1)
    return Signal(flat[:, 1:-1], 1) if flat.shape[1] > 4 else s


@block
def pieces(net, rng, s):
    """Pieces of the channels go different ways and come back together."""
    if s.width < 3:
        return s
    sizes = [1, s.width - 2]
    a, b, c = jnp.split(s.last(), np.cumsum(sizes), -1)
    b = jnp.tanh(b) if rng.integers(2) else dense(net, b, drawn(rng, WIDTHS), name='b')
    order = drawn(rng, ((a, b, c), (c, b, a), (b, a), (a, a, b), (a * c, b)))
    return s.like(jnp.concatenate(order, -1))


# --- space --------------------------------------------------------------------------------------


@block
def pooled(net, rng, s):
    """One number for each channel."""
    rows, form = sequence(s), rng.integers(6)
    if form == 0:
        y = jnp.concatenate([rows.mean(1), rows.std(1) if rng.integers(2) else rows.max(1)], -1)
    elif form == 1:
        p = jnp.abs(net.param('power', s.width)) + 1
        y = ((jnp.abs(rows) + 0.1) ** p).mean(1) ** (1 / p)
    elif form == 2:
        y = jax.nn.logsumexp(rows, axis=1)
    elif form == 3:
        weights = jax.nn.softmax(dense(net, rows, 1, name='weights'), axis=1)
        y = (rows * weights).sum(1)
    elif form == 4:
        where = jnp.argmax(rows.sum(-1) if rng.integers(2) else rows[..., 0], 1)
        y = jnp.take_along_axis(rows, where[:, None, None], 1)[:, 0]
    else:
        y = jnp.take_along_axis(rows, jnp.argmax(rows, 1, keepdims=True), 1)[:, 0]
    return Signal(y, 1)


@block
def resized(net, rng, s):
    last = s.last()
    if last.ndim != 4:
        return s
    method = drawn(rng, ('nearest', 'linear'))
    shape = (last.shape[0], 3, 5, s.width)
    return s.like(jax.image.resize(last, shape, method))


@block
def associative(net, rng, s):
    """A running product along space in logarithmic depth."""
    rows = sequence(s)
    decay = jax.nn.sigmoid(net.param('decay', s.width) + jnp.zeros_like(rows))

    def join(one, other):
        return one[0] * other[0], other[0] * one[1] + other[1]

    return unsequence(s, lax.associative_scan(join, (decay, rows), axis=1)[1])


@block
def nested_loops(net, rng, s):
    """A scan in a scan, a branch in a scan, a checkpoint in a scan."""
    rows, n = sequence(s), s.width
    kernels, bias = net.param('kernels', 2, n, n), net.param('bias', n)
    form = rng.integers(3)

    def inner(h, x):
        h = jnp.tanh(h + x) + bias
        if form == 1:
            h = lax.cond(h.sum() > 0, lambda h: h * 2, lambda h: h + bias, h)
        return h, h

    def outer(rows, kernel):
        def run(rows, kernel):
            start = jnp.zeros((rows.shape[0], n), rows.dtype)
            return lax.scan(inner, start, rows.swapaxes(0, 1) @ kernel)[1].swapaxes(0, 1)

        run = jax.checkpoint(run) if form == 2 else run
        return run(rows, kernel), None

    return unsequence(s, lax.scan(outer, rows, kernels)[0])


@block
def updated(net, rng, s):
    """A buffer that is written into."""
    rows = sequence(s)
    buffer = jnp.zeros((rows.shape[0], rows.shape[1] + 2, s.width), rows.dtype)
    y = lax.dynamic_update_slice(buffer, rows, (0, 1, 0))
    return Signal(jnp.tanh(y), 2)


@block
def vmapped_conv(net, rng, s):
    """The same images under several kernels, by `vmap`."""
    rows = sequence(s)
    kernels = net.param('kernels', 2, 2, s.width, 3)

    def one(kernel):
        numbers = ('NWC', 'WIO', 'NWC')
        return lax.conv_general_dilated(rows, kernel, (1,), 'SAME', dimension_numbers=numbers)

    y = jax.vmap(one)(kernels)
    if rng.integers(2):
        return unsequence(s, y.mean(0))
    return unsequence(s, jnp.moveaxis(y, 0, -1).reshape(*rows.shape[:2], -1))


@block
def rounded(net, rng, s):
    """A straight-through rounding, and a distance to the nearest of a few codes."""
    s = linear(net, rng, s, drawn(rng, WIDTHS))
    if rng.integers(2):
        return Signal(s.x + lax.stop_gradient(jnp.round(s.x) - s.x), s.c)
    last = s.last()
    codes = net.param('codes', 3, s.width)
    distance = ((last[..., None, :] - codes) ** 2).sum(-1)
    return s.like(activation(rng, jax.nn.softmax(-distance) @ codes))


# --- ways to write a layer -----------------------------------------------------------------------


@block
def kernels_made(net, rng, s):
    """Kernels that are computed: low rank, standardised, scaled, masked."""
    last, width, form = s.last(), drawn(rng, WIDTHS), rng.integers(5)
    n = last.shape[-1]
    if form == 0:
        kernel = net.param('a', n, 3) @ net.param('b', 3, width)
    else:
        kernel = net.param('kernel', n, width)
    if form == 1:
        kernel = kernel / jnp.sqrt((kernel**2).sum(0) + 0.1) * net.param('g', width)
    if form == 2:
        kernel = kernel - 0.5 * jnp.roll(kernel, 1, 1)
    if form == 3:
        kernel = kernel * jnp.asarray(np.tri(n, width), kernel.dtype)
    if form == 4:
        kernel = jnp.concatenate([kernel, net.param('more', n, 2)], 1)
    return s.like(last @ kernel)


@block
def checkpointed(net, rng, s):
    inner = net.inside('inner')
    return Signal(jax.checkpoint(lambda x: body(inner, inner.rng(), Signal(x, s.c)).x)(s.x), s.c)


@block
def compiled(net, rng, s):
    inner = net.inside('inner')
    return Signal(jax.jit(lambda x: body(inner, inner.rng(), Signal(x, s.c)).x)(s.x), s.c)


@block
def twice(net, rng, s):
    """One layer used twice."""
    f = functools.partial(dense, net, width=s.width)
    return s.like(f(jnp.tanh(f(s.last()))))
