"""Decompositions, also many of them on several devices at once."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import linalg

NAMES = ('singular_values', 'svd', 'qr', 'eigh', 'eigenvalues')


def numpy_of(name, a):
    return {
        'singular_values': lambda: np.linalg.svd(a, compute_uv=False),
        'svd': lambda: np.linalg.svd(a, full_matrices=False),
        'qr': lambda: np.linalg.qr(a),
        'eigh': lambda: np.linalg.eigh(a),
        'eigenvalues': lambda: np.linalg.eigvalsh(a),
    }[name]()


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('batch', [(), (3,), (2, 2)])
def test_decompositions_are_those_of_numpy(name, batch):
    """Expectation: NumPy's, up to the signs of vectors; vmapped too; half precision is widened."""
    draw = np.random.default_rng(0).standard_normal((*batch, 5, 5)).astype('float32')
    a = draw + np.swapaxes(draw, -1, -2) if name.startswith('eig') else draw
    fn = getattr(linalg, name)
    found, expected = jax.tree.leaves(fn(jnp.asarray(a))), jax.tree.leaves(tuple(numpy_of(name, a)))
    if name in ('singular_values', 'eigenvalues'):
        expected = [numpy_of(name, a)]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.abs(one), np.abs(other), atol=2e-5)
    if batch:
        for one, other in zip(jax.tree.leaves(jax.vmap(fn)(jnp.asarray(a))), found, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)
    assert jax.tree.leaves(fn(jnp.asarray(a, jnp.bfloat16)))[0].dtype == jnp.float32


@pytest.mark.parametrize('shape', [(4, 30), (30, 4), (5, 6), (3, 3)])
def test_singular_values_by_way_of_a_factor(shape):
    """Expectation: NumPy's, to the last digits of the largest, of a matrix of lower rank too; GPUs
    and TPUs take this way."""
    for rank in (min(shape), min(shape) - 1):
        draw = np.random.default_rng(rank).standard_normal
        a = (draw((shape[0], rank)) @ draw((rank, shape[1]))).astype('float32')
        found = linalg._values_of_factor(jnp.asarray(a))
        expected = np.linalg.svd(a.astype('float64'), compute_uv=False)
        np.testing.assert_allclose(found, expected, atol=1e-6 * expected[0])


def test_decompositions_have_gradients():
    """Expectation: those of jnp.linalg, of a single matrix and of a batch."""
    for shape in ((4, 3), (2, 4, 3)):
        a = jax.random.normal(jax.random.key(0), shape)
        found = jax.grad(lambda a: linalg.singular_values(a)[..., 0].sum())(a)
        expected = jax.grad(lambda a: jnp.linalg.svd(a, compute_uv=False)[..., 0].sum())(a)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        found = jax.grad(lambda a: (linalg.qr(a)[0] ** 3).sum())(a)
        expected = jax.grad(lambda a: (jnp.linalg.qr(a)[0] ** 3).sum())(a)
        np.testing.assert_allclose(found, expected, atol=1e-4)


MANY = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update('jax_num_cpu_devices', 2)
from jax.sharding import Mesh, PartitionSpec as P
from jaxprune import linalg, nn
draw = nn.INITIALISATIONS['orthogonal']
def one(key):
    kernel = draw(key, (100, 100), jnp.float32)
    rows = kernel.reshape(100, 10, 10)
    return (linalg.qr(kernel + 1)[0].sum() + linalg.singular_values(rows).sum()
            + linalg.eigenvalues(rows @ rows.swapaxes(-1, -2)).sum())
mesh = Mesh(np.array(jax.devices()), ('run',))
many = jax.jit(jax.shard_map(jax.vmap(one), mesh=mesh, in_specs=P('run'), out_specs=P('run')))
keys = jax.random.split(jax.random.key(0), 16)
for _ in range(5):
    found = many(keys)
assert np.isfinite(found).all()
"""


@pytest.mark.more
def test_many_decompositions_on_several_devices_end():
    """Expectation: the program ends. A batch of eight 100 x 100 QRs per device, or of a hundred
    decompositions of 10 x 100, hung with jnp.linalg (jaxlib 0.10.2, two devices on two cores)."""
    subprocess.run([sys.executable, '-c', MANY], check=True, timeout=120)
