"""Forward order and contracted axes for scores, and the score that was made with them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from jaxprune import score
from jaxprune.score import Layer, forward_layers

KEY = jax.random.key(0)


class Net(nn.Module):
    """Named against the order of use; a depthwise layer, and maps that are flattened."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.relu(nn.Conv(3, (2, 2), use_bias=False, name='z')(x))
        x = nn.Conv(3, (2, 2), feature_group_count=3, use_bias=False, name='y')(x)
        return nn.Dense(4, name='b')(nn.relu(nn.Dense(5, name='a')(x.reshape(x.shape[0], -1))))


def seen_by(net, shape):
    problem = jp.problem_from_flax(net, shape)
    params, state = problem.init(KEY)
    x = jnp.ones((1, 2, *shape))
    return problem, jp.view(problem, params, state), jp.Batch(x, jnp.zeros((1, 2), jnp.int32))


def test_layers_of_a_network():
    """Expectation: by hand, from the definition of the network."""
    problem, view, batches = seen_by(Net(), (4, 4, 1))
    assert forward_layers(problem, view, batches) == [
        Layer('z/kernel', (0, 1, 2), (2,), (3,), 1),
        Layer('y/kernel', (0, 1, 2), (2,), (3,), 3),
        Layer('a/kernel', (0,), (0,), (1,), 1),
        Layer('b/kernel', (0,), (0,), (1,), 1),
    ]


def test_layers_of_other_layouts():
    """Expectation: by hand: kernels stored (out, in), by heads, stacked in a scan, and masked."""
    shapes = {'t': (5, 4), 'heads': (5, 2, 3), 'merge': (2, 3, 6), 'rows': (2, 6, 6)}
    params = {name: {'w': jnp.ones(shape)} for name, shape in shapes.items()}

    def model(p, x):
        x = x @ p['t']['w'].T
        x = jnp.einsum('bi,ihd->bhd', x, p['heads']['w'])
        x = jnp.einsum('bhd,hdo->bo', x, p['merge']['w'] * 2)
        return jax.lax.scan(lambda h, w: (h @ w, None), x, p['rows']['w'])[0]

    problem = jp.problem_from_functions(lambda key: params, model)
    batches = jp.Batch(jnp.ones((1, 2, 4)), jnp.zeros((1, 2), jnp.int32))
    found = forward_layers(problem, jp.view(problem, params), batches)
    assert [(layer.path, layer.inputs, layer.outputs) for layer in found] == [
        ('t/w', (1,), (0,)),
        ('heads/w', (0,), (1, 2)),
        ('merge/w', (0, 1), (2,)),
        ('rows/w', (1,), (2,)),
    ]


def test_lookahead_by_hand():
    """Expectation: |w| times the norm of the column before and of the row after, in NumPy; the
    first and the last layer have one neighbour."""
    problem, view, batches = seen_by(
        nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(4), nn.relu, nn.Dense(3)]), (6,)
    )
    found = jax.jit(score.lookahead(problem))(KEY, view, batches)
    a, b, c = (np.asarray(view.weights[f'layers_{i}/kernel'], np.float64) for i in (0, 2, 4))
    norm = np.linalg.norm
    for path, expected in {
        'layers_0/kernel': np.abs(a) * norm(b, axis=1),
        'layers_2/kernel': np.abs(b) * norm(a, axis=0)[:, None] * norm(c, axis=1),
        'layers_4/kernel': np.abs(c) * norm(b, axis=0)[:, None],
    }.items():
        np.testing.assert_allclose(found[path], expected, rtol=1e-5)


def test_lookahead_is_the_distortion_of_a_linear_network():
    """Expectation: the definition: removing w changes the product of three kernels by a matrix
    whose Frobenius norm is the score."""
    problem, view, batches = seen_by(nn.Sequential([nn.Dense(5), nn.Dense(4), nn.Dense(3)]), (6,))
    found = score.lookahead(problem)(KEY, view, batches)['layers_1/kernel']
    a, b, c = (np.asarray(view.weights[f'layers_{i}/kernel'], np.float64) for i in range(3))
    for i, j in np.ndindex(b.shape):
        without = b.copy()
        without[i, j] = 0
        np.testing.assert_allclose(found[i, j], np.linalg.norm(a @ (b - without) @ c), rtol=1e-5)


def test_lookahead_of_convolutions_and_flattened_maps():
    """Expectation: written out: a map of 3 channels at 16 places feeds 48 rows of the dense layer,
    channels last; the depthwise layer reads one map per filter, so nothing stands before it."""
    problem, view, batches = seen_by(Net(), (4, 4, 1))
    found = score.lookahead(problem)(KEY, view, batches)
    kernels = {path[0]: np.asarray(w, np.float64) for path, w in view.weights.items()}
    y, a, b = kernels['y'], kernels['a'], kernels['b']
    filters = np.sqrt((y**2).sum((0, 1, 2)))
    rows = np.sqrt((a.reshape(16, 3, 5) ** 2).sum((0, 2)))
    np.testing.assert_allclose(found['y/kernel'], np.abs(y) * rows, rtol=1e-5)
    before = np.tile(filters, 16)[:, None]
    np.testing.assert_allclose(
        found['a/kernel'], np.abs(a) * before * np.linalg.norm(b, axis=1), rtol=1e-5
    )
