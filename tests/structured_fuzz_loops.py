"""More blocks of random architectures: attention, loops; and how networks begin and end."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from structured_fuzz import WIDTHS, Signal, drawn
from structured_fuzz_blocks import activation, block, dense, linear, sequence, unsequence

# --- attention ----------------------------------------------------------------------------------


def heads_of(net, rng, rows, heads, width, name):
    """(batch, time, heads, width), by a reshape or a kernel with three axes."""
    n = rows.shape[-1]
    if rng.integers(2):
        kernel = net.param(f'{name}.kernel', n, heads, width)
        y = jnp.einsum('btc,chd->bthd', rows, kernel)
        return y + net.param(f'{name}.bias', heads, width) if rng.integers(2) else y
    y = dense(net, rows, heads * width, name=name)
    return y.reshape(*rows.shape[:2], heads, width)


def queries_keys_values(net, rng, rows, heads, width):
    form = drawn(rng, ('separate', 'fused', 'fused by heads', 'fused axes', 'grouped', 'single'))
    b, t, _n = rows.shape
    if form == 'fused':
        q, k, v = jnp.split(dense(net, rows, 3 * heads * width), 3, -1)
        return [a.reshape(b, t, heads, width) for a in (q, k, v)]
    if form == 'fused by heads':
        return jnp.split(dense(net, rows, 3 * heads * width).reshape(b, t, heads, -1), 3, -1)
    if form == 'fused axes':
        both = dense(net, rows, 3 * heads * width).reshape(b, t, 3, heads, width)
        return [both[:, :, i] for i in range(3)]
    q = heads_of(net, rng, rows, heads, width, 'q')
    own = {'separate': heads, 'grouped': heads // 2 or 1, 'single': 1}[form]
    k, v = (heads_of(net, rng, rows, own, width, name) for name in 'kv')
    if own != heads:
        times = heads // own
        k, v = jnp.repeat(k, times, 2), jnp.repeat(v, times, 2)
    return q, k, v


@block
def attention(net, rng, s):
    rows = sequence(s)
    heads, width = drawn(rng, (1, 2, 2, 4)), drawn(rng, (2, 3, 4))
    q, k, v = queries_keys_values(net, rng, rows, heads, width)
    form = rng.integers(4)
    if form == 0:
        y = jax.nn.dot_product_attention(q, k, v)
    else:
        logits = jnp.einsum('bthd,bshd->bhts', q, k) / np.sqrt(width)
        if form == 1:
            logits = jnp.where(np.tri(rows.shape[1], dtype=bool), logits, -1e9)
        if form == 2:
            logits = logits + net.param('relative', heads, rows.shape[1], rows.shape[1])
        y = jnp.einsum('bhts,bshd->bthd', jax.nn.softmax(logits), v)
    n = s.width if rng.integers(2) else drawn(rng, WIDTHS)
    if rng.integers(2):
        y = jnp.einsum('bthd,hdc->btc', y, net.param('out', heads, width, n))
    else:
        y = dense(net, y.reshape(*rows.shape[:2], -1), n, name='out')
    return unsequence(s, rows + y if n == s.width else y)


@block
def linear_attention(net, rng, s):
    rows = sequence(s)
    heads, width = drawn(rng, (1, 2)), drawn(rng, (2, 3))
    q, k, v = queries_keys_values(net, rng, rows, heads, width)
    state = jnp.einsum('bthd,bthe->bhde', jax.nn.gelu(k), v)
    y = jnp.einsum('bthd,bhde->bthe', jax.nn.gelu(q), state)
    return unsequence(s, dense(net, y.reshape(*rows.shape[:2], -1), s.width, name='out'))


@block
def rotary(net, rng, s):
    """Attention whose queries and keys are turned by their positions."""
    rows, heads, width = sequence(s), 2, 4
    q, k, v = (heads_of(net, rng, rows, heads, width, name) for name in 'qkv')
    angle = jnp.arange(rows.shape[1])[:, None, None] * jnp.asarray([1.0, 0.1], rows.dtype)

    def turned(a):
        one, two = jnp.split(a, 2, -1)
        cos, sin = jnp.cos(angle).astype(a.dtype), jnp.sin(angle).astype(a.dtype)
        return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], -1)

    logits = jnp.einsum('bthd,bshd->bhts', turned(q), turned(k))
    y = jnp.einsum('bhts,bshd->bthd', jax.nn.softmax(logits), v)
    return unsequence(s, dense(net, y.reshape(*rows.shape[:2], -1), s.width, name='out'))


# --- loops --------------------------------------------------------------------------------------


@block
def scan_of_layers(net, rng, s):
    """Layers of one shape, their kernels stacked."""
    n, hidden, depth = s.width, drawn(rng, WIDTHS), drawn(rng, (2, 3))
    first, second = net.param('first', depth, n, hidden), net.param('second', depth, hidden, n)
    bias = net.param('bias', depth, n)

    def step(x, layer):
        a, b, c = layer
        y = jax.nn.relu(x @ a) @ b
        return x + y + c if rng_form else jnp.tanh(y + c), y.mean()

    rng_form = bool(rng.integers(2))
    y, means = lax.scan(step, s.last(), (first, second, bias), reverse=bool(rng.integers(2)))
    return s.like(y + 0.1 * means.sum() if rng.integers(2) else y)


@block
def recurrent(net, rng, s):
    """A recurrent network over time."""
    rows, hidden = sequence(s), drawn(rng, WIDTHS)
    form = rng.integers(3)
    gates = {0: 1, 1: 3, 2: 4}[int(form)]
    wx = net.param('wx', rows.shape[-1], gates * hidden)
    wh = net.param('wh', hidden, gates * hidden)
    bias = net.param('bias', gates * hidden)
    start = jnp.zeros((rows.shape[0], hidden), rows.dtype)

    def simple(h, x):
        h = jnp.tanh(x @ wx + h @ wh + bias)
        return h, h

    def gru(h, x):
        a, b, c = jnp.split(x @ wx + bias, 3, -1)
        d, e, f = jnp.split(h @ wh, 3, -1)
        z, r = jax.nn.sigmoid(a + d), jax.nn.sigmoid(b + e)
        h = z * h + (1 - z) * jnp.tanh(c + r * f)
        return h, h

    def lstm(carry, x):
        c, h = carry
        i, f, g, o = jnp.split(x @ wx + h @ wh + bias, 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (c, h), h

    step = (simple, gru, lstm)[form]
    carry = (start, start) if form == 2 else start
    last, ys = lax.scan(step, carry, jnp.swapaxes(rows, 0, 1))
    if rng.integers(2):
        return Signal(jax.tree.leaves(last)[-1], 1)
    return unsequence(s, jnp.swapaxes(ys, 0, 1))


@block
def loop(net, rng, s):
    """A layer that is repeated by a `fori_loop` or while a condition holds."""
    kernel, bias = net.param('kernel', s.width, s.width), net.param('bias', s.width)

    def once(x):
        return x + jnp.tanh(x @ kernel + bias)

    if rng.integers(2):
        return s.like(lax.fori_loop(0, 2, lambda i, x: once(x), s.last()))

    def goes_on(carry):
        return carry[0] < 3

    return s.like(lax.while_loop(goes_on, lambda c: (c[0] + 1, once(c[1])), (0, s.last()))[1])


@block
def swapped_loop(net, rng, s):
    """Two carries that change places."""
    a, b = dense(net, s.last(), 4, name='a'), dense(net, s.last(), 4, name='b')

    def step(i, carry):
        a, b = carry
        return jnp.tanh(b), a * 0.5

    a, b = lax.fori_loop(0, 3, step, (a, b))
    return s.like(jnp.concatenate([a, b], -1))


@block
def branches(net, rng, s):
    width = drawn(rng, WIDTHS)
    last = s.last()
    test = last.sum() > 0 if rng.integers(2) else net.param('which') > 0

    def one(x):
        return jax.nn.relu(dense(net, x, width, name='one'))

    def two(x):
        return dense(net, x, width, name='two') if same else one(x) * 2

    same = bool(rng.integers(2))
    if rng.integers(2):
        return s.like(lax.cond(test, one, two, last))
    return s.like(lax.switch(test.astype(int) + 1, [two, one, two], last))


@jax.custom_jvp
def own_derivative(x, y):
    return jnp.tanh(x) * y


@own_derivative.defjvp
def _(primals, tangents):
    x, y = primals
    dx, dy = tangents
    t = jnp.tanh(x)
    return t * y, (1 - t * t) * dx * y + t * dy


@jax.custom_vjp
def straight_through(x):
    return jnp.sign(x)


straight_through.defvjp(lambda x: (jnp.sign(x), x), lambda x, g: (g * (jnp.abs(x) < 1),))


@block
def own_derivatives(net, rng, s):
    s = linear(net, rng, s, drawn(rng, WIDTHS))
    if rng.integers(2):
        return Signal(own_derivative(s.x, s.x + 1), s.c)
    return Signal(straight_through(s.x) * s.x, s.c)


@block
def masked_mean(net, rng, s):
    """The mean of what is positive, over space; an argmax that picks a row of a table."""
    last = s.last()
    axes = tuple(range(1, last.ndim - 1))
    if not axes:
        best = jnp.argmax(dense(net, last, 3, name='vote'), -1)
        return s.like(last * net.param('table', 3, s.width)[best])
    positive = (last > 0).astype(last.dtype)
    return Signal((last * positive).sum(axes) / (positive.sum(axes) + 1), 1)


@block
def mapped(net, rng, s):
    """Rows by `lax.map`, or a function that `vmap` made."""
    kernel = net.param('kernel', s.width, drawn(rng, WIDTHS))
    rows = sequence(s)
    if rng.integers(2):
        return unsequence(
            s, lax.map(lambda row: activation(np.random.default_rng(1), row @ kernel), rows)
        )
    return unsequence(s, jax.vmap(jax.vmap(lambda v: kernel.T @ v))(rows))


# --- ends ---------------------------------------------------------------------------------------


def vectors(net, x):
    return Signal(dense(net, x, drawn(net.rng(), WIDTHS), name='first'), 1)


def sequences(net, x):
    return Signal(dense(net, x, drawn(net.rng(), WIDTHS), name='first'), 2)


def images(net, x):
    """One to three dimensions, channels first or last."""
    rng = net.rng()
    s = Signal(x, x.ndim - 1)
    if rng.integers(2):
        s = Signal(jnp.moveaxis(x, -1, 1), 1)
    return linear(net, rng, s, drawn(rng, WIDTHS), same=True, name='first')


def tokens(net, x):
    rng = net.rng()
    table = net.param('table', 5, drawn(rng, WIDTHS))
    rows = table[x] if rng.integers(2) else jax.nn.one_hot(x, 5, dtype=table.dtype) @ table
    if rng.integers(2):
        rows = rows + net.param('positions', 6, table.shape[1])[: x.shape[1]]
    return Signal(rows, 2)


def _normal(*sizes):
    def draw(rng):
        shape = drawn(rng, sizes)
        return rng.normal(size=shape)

    return draw


vectors.input = _normal((2, 4), (3, 3))
sequences.input = _normal((2, 4, 4), (2, 3, 2))
images.input = _normal((2, 4, 3), (2, 4, 4, 2), (2, 6, 3, 3), (1, 2, 3, 2, 2))
tokens.input = lambda rng: rng.integers(0, 5, (2, 4)).astype(np.int32)


def classifier(net, s):
    """The mean or all places, then a dense layer."""
    last = s.last()
    if net.rng().integers(2):
        pooled = last.mean(tuple(range(1, last.ndim - 1)))
    else:
        pooled = (s.x if net.rng().integers(9) > 4 else last).reshape(last.shape[0], -1)
    return {'logits': dense(net, pooled, 3, name='head')}


def everywhere(net, s):
    """A dense layer at every place, and the mean of something."""
    y = dense(net, s.last(), 2, name='head')
    return y, jnp.tanh(y).mean()


def tied(net, s):
    """The output's weights are those of an embedding."""
    rows = sequence(s)
    table = net.param('table', 4, rows.shape[-1])
    memory = table[jnp.asarray([0, 2])].mean(0)
    return (rows + memory) @ table.T


starts = (vectors, sequences, images, images, tokens)
ends = (classifier, classifier, everywhere, tied)
