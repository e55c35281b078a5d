"""Paths through loops: as through the same steps written out, at a cost free of their number."""

import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxprune as jp
from jaxprune.errors import PruneError
from jaxprune.structure import connectivity, shapes_in_order

LENGTH = 4


def written_out(body, carry, rows, length=None, reverse=False):
    """`lax.scan` as a Python loop."""
    n = length if rows is None else len(jax.tree.leaves(rows)[0])
    made = [None] * n
    for i in reversed(range(n)) if reverse else range(n):
        carry, made[i] = body(carry, jax.tree.map(lambda a, i=i: a[i], rows))
    return carry, jax.tree.map(lambda *ys: jnp.stack(ys), *made)


def memory(scan, p, x):
    """A recurrent net whose state starts at zero, with a gate."""

    def step(h, row):
        z = nn.sigmoid(row @ p['gate']['w'])
        return (1 - z) * jnp.tanh(row @ p['in']['w'] + h @ p['back']['w']) + z * h, h

    h, before = scan(step, jnp.zeros((1, 4)), x)
    return jnp.concatenate([h, before[1]], -1) @ p['head']['w']


def backwards(scan, p, x):
    def step(h, row):
        return jnp.tanh(row @ p['in']['w'] + h @ p['back']['w']), row * h

    h, made = scan(step, jnp.zeros((1, 4)), x, reverse=True)
    return (h + made[0]) @ p['head']['w'][:4]


def shift_register(scan, p, x):
    """Only the second row from the end gets through."""

    def step(carry, row):
        return (row, carry[0]), None

    (_, b), _ = scan(step, (jnp.zeros((1, 4)), jnp.zeros((1, 4))), x)
    return jax.nn.relu(b @ p['in']['w']) @ p['head']['w'][:4]


def counted(scan, p, x):
    """Reads its row by a counter, and lets through what a table of numbers says."""
    gate = jnp.asarray(np.eye(4)[[0, 1, 1, 3]])

    def step(carry, _):
        i, h = carry
        row = lax.dynamic_index_in_dim(x, i, 0, keepdims=False)
        return (i + 1, h + (row * gate[i]) @ p['in']['w']), None

    (_, h), _ = scan(step, (0, jnp.zeros((1, 4))), None, length=LENGTH)
    return h @ p['head']['w'][:4]


def attending(scan, p, x):
    """A causal mask that comes row by row."""
    causal = jnp.where(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), 0.0, -1e9)
    keys = x[:, 0] @ p['in']['w']

    def step(h, given):
        row, mask = given
        weights = jax.nn.softmax(row[0] @ p['gate']['w'] @ keys.T + mask)
        return h, weights @ keys

    _, seen = scan(step, 0.0, (x, causal))
    return seen[0] @ p['head']['w'][:4]


def layers(scan, p, x):
    h, _ = scan(lambda h, w: (jax.nn.relu(h @ w), None), x[0], p['stack']['w'])
    return h @ p['head']['w'][:4]


def nested(scan, p, x):
    def outer(h, row):
        def inner(g, w):
            return jnp.tanh(g @ w + row @ p['in']['w']), g

        h, _ = scan(inner, h, p['stack']['w'])
        return h, None

    h, _ = scan(outer, jnp.zeros((1, 4)), x)
    return h @ p['head']['w'][:4]


def swapping(scan, p, x):
    """Its carry changes kind at every step: a number and the input in turn."""

    def step(carry, _):
        a, b = carry
        return (b, a), a

    (a, b), made = scan(step, (x[0] @ p['in']['w'], jnp.ones((1, 4))), None, length=3)
    return (a * b) @ p['head']['w'][:4] + made[1] @ p['head']['w'][4:]


NETS = [memory, backwards, shift_register, counted, attending, layers, nested, swapping]


def drawn(*shape):
    return {'w': np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)}


PARAMS = {
    **{name: drawn(4, 4) for name in ('gate', 'in', 'back')},
    'head': drawn(8, 3),
    'stack': drawn(3, 4, 4),
}
X = jnp.ones((LENGTH, 1, 4))


#: Gates, a counter, loops within loops, a carry that changes kind; the others have less of that.
HARD = (memory, counted, nested, swapping)


@pytest.mark.parametrize(
    'net',
    [pytest.param(f, marks=() if f in HARD else pytest.mark.more, id=f.__name__) for f in NETS],
)
def test_paths_are_those_of_the_steps_written_out(net):
    """Expectation: the same network with a Python loop in place of `lax.scan`, 24 random masks."""
    shapes = jp.shapes(jp.tree.pick(PARAMS))
    draw = np.random.default_rng(0)
    masks = {path: draw.random((24, *shape)) < 0.4 for path, shape in shapes.items()}
    found, wanted = jax.device_get(
        [
            jax.jit(jax.vmap(connectivity(lambda p, x, s=scan: net(s, p, x), PARAMS, X)))(masks)
            for scan in (lax.scan, written_out)
        ]
    )
    for path in shapes:
        np.testing.assert_array_equal(found[path], wanted[path], err_msg=path)
    assert any(bool((found[path] != masks[path]).any()) for path in shapes)
    orders = [
        list(shapes_in_order(lambda p, x, s=scan: net(s, p, x), PARAMS, X))
        for scan in (lax.scan, written_out)
    ]
    assert orders[0] == orders[1]


def test_a_long_recurrent_net_costs_what_a_short_one_does():
    """Expectation: an LSTM over 784 steps, a row of pixels each, is traced as one over four."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(10)(nn.RNN(nn.LSTMCell(8))(x)[:, -1])

    net = Net()

    def forward(p, x):
        return net.apply({'params': p}, x)

    params = jax.jit(net.init)(jax.random.key(0), jnp.ones((1, 4, 1)))['params']

    def equations(length):
        connect = connectivity(forward, params, jnp.ones((1, length, 1)))
        masks = jp.tree.ones(jp.tree.pick(params))
        return str(jax.make_jaxpr(connect)(masks)).count('\n')

    assert equations(784) == equations(4)


def test_pruning_a_recurrent_net_takes_seconds():
    """Expectation: a GRU over 64 steps, `jp.prune` by SNIP; the paths of its report took minutes
    when the loop was unrolled, the gradient takes about a second."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(10)(nn.RNN(nn.GRUCell(8))(x)[:, -1])

    net = Net()
    x, y = jax.random.normal(jax.random.key(1), (4, 64, 1)), jnp.arange(4)
    params = jax.jit(net.init)(jax.random.key(0), x)['params']
    start = time.monotonic()
    pruned = jp.prune(
        params, 'snip', density=0.3, model=lambda p, x: net.apply({'params': p}, x), data=(x, y)
    )
    assert time.monotonic() - start < 60
    assert pruned.report.effective_compression is not None and not pruned.report.note


def test_a_loop_of_unknown_length_is_named():
    """Expectation: its length depends on the input, so no path through it is known; JAX itself has
    no gradient of it. Magnitudes need neither."""

    def forward(p, x):
        return lax.while_loop(lambda h: h.sum() < 3, lambda h: h @ p['in']['w'], x)

    params, x = {'in': PARAMS['in']}, jnp.ones((2, 4))
    with pytest.raises(PruneError, match=r"operation 'while' at .*known only when it runs"):
        connectivity(forward, params, x)
    found = jp.prune(params, 'magnitude', 0.5, model=forward, data=x)
    assert "paths not followed: operation 'while'" in found.report.note
    with pytest.raises(PruneError, match=r"^scoring by 'snip' fails: ValueError: Reverse-mode"):
        jp.prune(params, 'snip', 0.5, model=forward, data=(x, jnp.zeros(2, int)))
