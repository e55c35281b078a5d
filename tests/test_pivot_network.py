"""Pivoting whole networks: planted blocks, outputs that stay, one order for each family."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import PruneError, structure, tree


def chain(params, x):
    """Dense layers `0`, `1`, ... with ReLU between them."""
    for name in sorted(params)[:-1]:
        x = jax.nn.relu(x @ params[name]['kernel'] + params[name]['bias'])
    return x @ params[max(params)]['kernel']


def planted(seed, sizes=(6, 16, 24, 8, 4)):
    """A chain that is two networks side by side, but for its first and last layer; units mixed."""
    rng = np.random.default_rng(seed)
    parts = [rng.permutation(np.repeat([0, 1], n // 2)) for n in sizes]
    params = {}
    for i, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        kernel = rng.integers(1, 9, (rows, columns)) * rng.choice([-1.0, 1.0], (rows, columns))
        if 0 < i < len(sizes) - 2:
            kernel *= parts[i][:, None] == parts[i + 1]
        params[str(i)] = {'kernel': kernel, 'bias': rng.normal(size=columns)}
    params[str(i)].pop('bias')
    return params, rng.normal(size=(3, sizes[0]))


def full(params, *paths):
    """Masks that prune nothing."""
    return {
        p: np.ones(a.shape, bool) for p, a in jp.pick(params).items() if not paths or p in paths
    }


@pytest.mark.parametrize('seed', range(3))
def test_planted_networks_are_found(seed):
    """Expectation: two kernels between three families of units; half of their blocks hold all of
    their mass, and the outputs stay."""
    with jax.enable_x64(True):
        params, x = planted(seed)
        masks = full(params, '1/kernel', '2/kernel')
        coupled = jp.groups(chain, params, x)
        found = structure.pivot_network(coupled, params, masks, (4, 4), density=0.5, seed=0)
        assert found.kept_after == {'1/kernel': 1, '2/kernel': 1}
        assert max(found.kept_before.values()) < 0.9
        assert {path: o.block_density for path, o in found.after.items()} == {
            '1/kernel': 0.5,
            '2/kernel': 0.5,
        }
        run = jax.jit(chain)
        np.testing.assert_allclose(run(found.params, x), run(params, x), rtol=1e-12)


def test_orders_masks_and_tables_are_those_of_the_network():
    """Expectation: parameters and masks are those that `permuted` makes of `orders`; shares and
    occupancies are counted anew; the sum of kept mass does not fall, and single kernels may."""
    params, x = planted(3)
    rng = np.random.default_rng(0)
    masks = {path: rng.random(a.shape) < 0.4 for path, a in jp.pick(params).items()}
    coupled = jp.groups(chain, params, x)
    found = structure.pivot_network(coupled, params, masks, (4, 3), density=0.3, seed=0)
    again, _ = structure.permuted(coupled, params, found.orders)
    for (path, ours), (_, theirs) in zip(tree.paths(found.params), tree.paths(again), strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=path)
    wanted = structure.permuted_masks(coupled, masks, found.orders)
    total = {'before': 0.0, 'after': 0.0}
    for path, mask in found.masks.items():
        np.testing.assert_array_equal(mask, wanted[path])
        for when, leaf, kept, shares, told in (
            ('before', jp.pick(params)[path], masks[path], found.kept_before, found.before),
            ('after', jp.pick(found.params)[path], mask, found.kept_after, found.after),
        ):
            scores = np.abs(np.where(kept, leaf, 0))
            assert told[path] == structure.occupancy(scores, (4, 3))
            total[when] += shares[path] * scores.sum()
    assert total['after'] > total['before']


def test_a_convolution_counts_by_its_channels():
    """Expectation: taps are added up: of two convolutions, with planted channels, the second has
    all its mass in half of its blocks of channels. A flattened map follows its channels."""
    rng = np.random.default_rng(1)
    parts = [rng.permutation(np.repeat([0, 1], 4)) for _ in range(2)]
    params = {
        'a': {'kernel': rng.normal(size=(3, 3, 2, 8))},
        'b': {'kernel': rng.normal(size=(3, 3, 8, 8)) * (parts[0][:, None] == parts[1])},
        'c': {'kernel': rng.normal(size=(4 * 4 * 8, 3))},
    }

    def apply(params, x):
        for name in ('a', 'b'):
            x = jnp.tanh(
                jax.lax.conv_general_dilated(
                    x, params[name]['kernel'], (1, 1), 'SAME', dimension_numbers=LAYOUT
                )
            )
        return x.reshape(len(x), -1) @ params['c']['kernel']

    with jax.enable_x64(True):
        x = rng.normal(size=(2, 4, 4, 2))
        coupled, masks = jp.groups(apply, params, x), full(params, 'b/kernel')
        found = structure.pivot_network(coupled, params, masks, (4, 4), density=0.5, seed=0)
        assert found.kept_after['b/kernel'] == pytest.approx(1, rel=1e-12)
        blocks = np.abs(found.params['b']['kernel']).sum((0, 1)).reshape(2, 4, 2, 4).any((1, 3))
        assert blocks.sum() == 2
        run = jax.jit(apply)
        np.testing.assert_allclose(run(found.params, x), run(params, x), rtol=1e-11, atol=1e-12)


LAYOUT = ('NHWC', 'HWIO', 'NHWC')


def test_what_stays_and_why():
    """Expectation: inputs, outputs, and units that the function treats differently, with reasons;
    all others move."""
    rng = np.random.default_rng(2)
    params = {k: {'kernel': rng.normal(size=(8, 8)).astype(np.float32)} for k in 'abc'}

    def apply(params, x):
        h = x @ params['a']['kernel']
        h = jnp.concatenate([jnp.tanh(h[:, :4]), jax.nn.relu(h[:, 4:])], 1) @ params['b']['kernel']
        return jnp.tanh(h) @ params['c']['kernel']

    x = rng.normal(size=(4, 8)).astype(np.float32)
    coupled = jp.groups(apply, params, x)
    found = structure.pivot_network(coupled, params, full(params), (2, 2), density=0.2, seed=0)
    assert list(found.orders) == ['b/kernel']
    assert found.stays['a/kernel:read'] == 'the raw input'
    assert found.stays['c/kernel'] == "the network's output"
    assert found.stays['a/kernel'].startswith('its units are not interchangeable: in another order')
    run = jax.jit(apply)
    np.testing.assert_allclose(run(found.params, x), run(params, x), rtol=1e-4, atol=1e-5)


def test_a_tied_kernel_moves_along():
    """Expectation: a kernel that is read both ways does not count, but follows; outputs stay."""
    rng = np.random.default_rng(5)
    params = {k: {'kernel': rng.normal(size=(8, 8)).astype(np.float32)} for k in 'abc'}

    def apply(params, x):
        h = jnp.tanh(jnp.tanh(x @ params['a']['kernel']) @ params['b']['kernel'])
        return jnp.tanh(h @ params['b']['kernel'].T) @ params['c']['kernel']

    x = rng.normal(size=(4, 8)).astype(np.float32)
    coupled = jp.groups(apply, params, x)
    found = structure.pivot_network(coupled, params, full(params), (2, 2), density=0.25, seed=0)
    assert sorted(found.kept_after) == ['a/kernel', 'c/kernel'] and found.orders
    assert (found.params['b']['kernel'] != params['b']['kernel']).any()
    run = jax.jit(apply)
    np.testing.assert_allclose(run(found.params, x), run(params, x), rtol=1e-4, atol=1e-5)


def test_blocks_of_a_pivoted_network_keep_more():
    """Expectation: `jp.prune` by blocks keeps more of |W| in the pivoted network than before."""
    params, x = planted(4)
    coupled = jp.groups(chain, params, x)
    found = structure.pivot_network(coupled, params, full(params), (4, 4), density=0.25, seed=0)

    def kept(params):
        pruned = jp.prune(params, 'magnitude', 0.25, granularity='4x4')
        return sum(float(np.abs(a).sum()) for a in jp.pick(pruned.params).values())

    assert kept(found.params) > 1.2 * kept(params)


def test_what_cannot_be_pivoted():
    """Expectation: one line that names what is wrong."""
    params, x = planted(0)
    coupled, masks = jp.groups(chain, params, x), full(params)

    def pivot(params=params, masks=masks, block=(4, 4), **options):
        options = {'density': 0.5, 'seed': 0} | options
        structure.pivot_network(coupled, params, masks, block, **options)

    with pytest.raises(PruneError, match=r'density must be in \(0, 1\]'):
        pivot(density=0)
    with pytest.raises(PruneError, match='at least 1'):
        pivot(block=(0, 4))
    with pytest.raises(PruneError, match="no parameter '9/kernel'"):
        pivot(masks={'9/kernel': np.ones((2, 2), bool)})
    with pytest.raises(PruneError, match='no kernel with inputs and outputs'):
        pivot(masks={'1/bias': np.ones(24, bool)})
    broken = {**params, '1': {**params['1'], 'kernel': params['1']['kernel'] * np.nan}}
    with pytest.raises(PruneError, match="weights of '1/kernel' are NaN or infinite"):
        pivot(params=broken)
    alone = {'0': {'kernel': np.ones((4, 4), np.float32)}}
    only = jp.groups(lambda p, x: x @ p['0']['kernel'], alone, np.ones((2, 4), np.float32))
    with pytest.raises(PruneError, match=r"could change places \('0/kernel:read': the raw"):
        structure.pivot_network(only, alone, full(alone), (2, 2), density=0.5, seed=0)
