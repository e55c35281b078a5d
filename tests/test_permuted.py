"""Networks with their units in another order: outputs against those of the network as it was.

What is expected is the network's own output, in float64, and arrays reordered by hand.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import structured_fuzz as fuzz

import jaxprune as jp
from jaxprune import PruneError, structure, tree

#: Blocks of which random networks are made here.
BLOCKS = (
    *('residual', 'concat', 'flatten', 'attention', 'depthwise', 'grouped_conv', 'norm'),
    *('stacked_branches', 'squeeze_excite', 'gated_linear', 'window_attention'),
)


def residual(params, state, x):
    """A stem, two blocks of two layers with batch norm, and a classifier; training mode."""
    after = {}

    def normed(name, y):
        mean, var = y.mean(0), y.var(0)
        after[name] = {
            'mean': 0.9 * state[name]['mean'] + 0.1 * mean,
            'var': 0.9 * state[name]['var'] + 0.1 * var,
        }
        return (y - mean) * jax.lax.rsqrt(var + 1e-5) * params[name]['scale']

    x = normed('stem', x @ params['stem']['kernel'])
    for block in ('one', 'two'):
        y = jax.nn.relu(normed(f'{block}_a', x @ params[f'{block}_a']['kernel']))
        x = jax.nn.relu(x + normed(f'{block}_b', y @ params[f'{block}_b']['kernel']))
    return x @ params['head']['kernel'], after


def residual_case():
    rng = np.random.default_rng(0)
    sizes = {'stem': (3, 6), 'one_a': (6, 5), 'one_b': (5, 6), 'two_a': (6, 4), 'two_b': (4, 6)}
    params = {
        name: {'kernel': rng.normal(size=size), 'scale': rng.normal(size=size[1])}
        for name, size in sizes.items()
    }
    state = {
        name: {'mean': rng.normal(size=size[1]), 'var': rng.uniform(0.5, 1.5, size[1])}
        for name, size in sizes.items()
    }
    params['head'] = {'kernel': rng.normal(size=(6, 2))}
    return fuzz.Case(residual, params, state, rng.normal(size=(7, 3)), 'residual', True)


def concatenated(params, x):
    """Two branches side by side, the second read again in another order, and a flattened map."""
    a, b = jnp.tanh(x @ params['a']), jnp.tanh(x @ params['b'])
    both = jnp.concatenate([a, b, a[..., ::-1]], -1)
    return jnp.tanh(both @ params['c']).reshape(len(x), -1) @ params['d']


def concatenation():
    rng = np.random.default_rng(1)
    shapes = {'a': (3, 6), 'b': (3, 4), 'c': (16, 5), 'd': (20, 2)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return fuzz.Case(concatenated, params, None, rng.normal(size=(2, 4, 3)), 'concatenation')


def unlike(rng, size):
    """A random permutation, but not the one that changes nothing."""
    order = rng.permutation(size)
    return order[::-1] if (order == np.arange(size)).all() else order


def moved(case, normalisation='sliced', seed=1):
    """The groups, an order of every family that may go, and the network in these orders."""
    coupled = jp.groups(case.apply, case.params, case.x, case.state, normalisation=normalisation)
    rng = np.random.default_rng(seed)
    orders = {f.name: unlike(rng, f.size) for f in coupled.families if not f.reason}
    params, state = structure.permuted(coupled, case.params, orders, case.state)
    return coupled, orders, params, state


def assert_same(case, params, state, wanted_state=None):
    """Outputs in float64, up to 1e-12; of a network that trains the next state too."""
    compiled = jax.jit(case.apply)
    wanted = compiled(*fuzz.arguments(case.params, case.state, case.x))
    found = compiled(*fuzz.arguments(params, state, case.x))
    if case.trains:
        wanted = wanted[0], wanted_state(wanted[1])
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    for ours, theirs in leaves:
        assert ours.dtype == np.float64
        error = np.abs(np.asarray(ours) - np.asarray(theirs)).max()
        assert error <= 1e-12 * np.abs(theirs).max(), error


@pytest.mark.parametrize('block', BLOCKS)
def test_outputs_stay(block):
    """Expectation: every family in a random order, all at once: skips, flattened maps, depthwise
    and grouped kernels, heads and their dimensions, gates, norms, statistics."""
    with jax.enable_x64(True):
        case = fuzz.plain(1, np.float64, [block], most=2)
        _, orders, params, state = moved(case)
        assert orders
        assert_same(case, params, state)


def test_branches_side_by_side():
    """Expectation: as above, where one branch is read twice, the second time backwards."""
    with jax.enable_x64(True):
        case = concatenation()
        _, orders, params, state = moved(case)
        assert sorted(orders) == ['a', 'b', 'c']
        assert_same(case, params, state)


def test_the_next_state_moves_too():
    """Expectation: in training mode the new statistics are the old ones in the new order."""
    with jax.enable_x64(True):
        case = residual_case()
        coupled, orders, params, state = moved(case)

        def reordered(state):
            return structure.permuted(coupled, case.params, orders, state)[1]

        assert len(orders) == 3
        assert_same(case, params, state, reordered)


@pytest.mark.slow
@pytest.mark.parametrize('part', range(4))
def test_random_networks(part):
    """Expectation: as above, or the refusal of units that are not interchangeable."""
    refused = 0
    for seed in range(part, 80, 4):
        with jax.enable_x64(True):
            case = fuzz.plain(seed, np.float64, most=3)
            try:
                _, _, params, state = moved(case, 'refuse')
            except PruneError as error:
                assert 'not interchangeable' in str(error), (case.name, error)
                refused += 1
                continue
            assert_same(case, params, state)
        jax.clear_caches()
    assert refused < 10


def test_a_chain_by_hand():
    """Expectation: columns of the first kernel, its bias, rows of the second one, nothing else."""
    rng = np.random.default_rng(2)
    params = {
        'a': {'kernel': rng.normal(size=(3, 4)), 'bias': rng.normal(size=4)},
        'b': {'kernel': rng.normal(size=(4, 2)), 'bias': rng.normal(size=2)},
    }

    def apply(p, x):
        h = jax.nn.relu(x @ p['a']['kernel'] + p['a']['bias'])
        return h @ p['b']['kernel'] + p['b']['bias']

    coupled, order = jp.groups(apply, params, rng.normal(size=(2, 3))), np.array([2, 0, 3, 1])
    orders = {'a/kernel': order}
    ours, state = structure.permuted(coupled, params, orders)
    assert state is None
    np.testing.assert_array_equal(ours['a']['kernel'], params['a']['kernel'][:, order])
    np.testing.assert_array_equal(ours['a']['bias'], params['a']['bias'][order])
    np.testing.assert_array_equal(ours['b']['kernel'], params['b']['kernel'][order])
    np.testing.assert_array_equal(ours['b']['bias'], params['b']['bias'])
    back, _ = structure.permuted(coupled, ours, {'a/kernel': np.argsort(order)})
    for (_, one), (_, other) in zip(tree.paths(back), tree.paths(params), strict=True):
        np.testing.assert_array_equal(one, other)
    mask = {'b/kernel': rng.random((4, 2)) < 0.5}
    theirs = structure.permuted_masks(coupled, mask, orders)
    np.testing.assert_array_equal(theirs['b/kernel'], mask['b/kernel'][order])


def test_all_layers_of_a_skip_share_an_order():
    """Expectation: the stem and the last layer of each block are one family, with its readers."""
    case = residual_case()
    coupled = jp.groups(case.apply, case.params, case.x, case.state)
    order = np.array([3, 5, 0, 1, 4, 2])
    ours, state = structure.permuted(coupled, case.params, {'stem/kernel': order}, case.state)
    for name in ('stem', 'one_b', 'two_b'):
        kernel = case.params[name]['kernel']
        np.testing.assert_array_equal(ours[name]['kernel'], kernel[:, order])
        np.testing.assert_array_equal(state[name]['var'], case.state[name]['var'][order])
    for name in ('one_a', 'two_a', 'head'):
        np.testing.assert_array_equal(ours[name]['kernel'], case.params[name]['kernel'][order])
    np.testing.assert_array_equal(state['one_a']['mean'], case.state['one_a']['mean'])


def test_training_goes_on_in_the_new_order():
    """Expectation: reordered after three steps of Adam, or before them: the same parameters."""
    rng = np.random.default_rng(4)
    params = {'a': rng.normal(size=(3, 6)), 'b': rng.normal(size=(6, 2))}
    x, tx = rng.normal(size=(5, 3)).astype(np.float32), optax.adam(0.1)
    params = jax.tree.map(np.float32, params)

    def apply(p, x):
        return jnp.tanh(x @ p['a']) @ p['b']

    @jax.jit
    def trained(params, state):
        for _ in range(3):
            slope = jax.grad(lambda p: jnp.square(apply(p, x) - 1).sum())(params)
            updates, state = tx.update(slope, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    coupled, orders = jp.groups(apply, params, x), {'a': rng.permutation(6)}
    later = trained(params, tx.init(params))
    moments = structure.permuted_moments(coupled, later[1], params, orders)
    late = trained(structure.permuted(coupled, later[0], orders)[0], moments)
    start = structure.permuted(coupled, params, orders)[0]
    early = trained(*trained(start, tx.init(start)))
    for (path, one), (_, other) in zip(tree.paths(late), tree.paths(early), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5, err_msg=path)


def half_activated(p, x):
    h = x @ p['a']
    return jnp.concatenate([jax.nn.relu(h[:, :3]), jnp.tanh(h[:, 3:])], 1) @ p['b']


def scaled_by_constants(p, x):
    return jnp.tanh(x @ p['a'] * np.linspace(1, 2, 6, dtype=np.float32)) @ p['b']


def barely_scaled(p, x):
    # With the given parameters, which are zero, every order has the same outputs.
    return (x @ p['a'] * np.linspace(1, 2, 6, dtype=np.float32)) @ (0.01 * p['b'])


@pytest.mark.parametrize('apply', [half_activated, scaled_by_constants, barely_scaled])
def test_units_that_are_not_interchangeable(apply):
    """Expectation: units that may go, but not change places, are refused: half of them have another
    activation, or each has a constant of its own."""
    params = {'a': np.zeros((3, 6), np.float32), 'b': np.zeros((6, 2), np.float32)}
    coupled = jp.groups(apply, params, np.ones((4, 3), np.float32))
    assert not next(f for f in coupled.families if f.name == 'a').reason
    order = np.array([5, 4, 3, 2, 1, 0])
    with pytest.raises(PruneError, match=r"units of 'a' are not interchangeable: .* change by"):
        structure.permuted(coupled, params, {'a': order})
    structure.permuted(coupled, params, {'a': np.arange(6)})


WRONG = {
    "unknown family 'c': valid: a, a:read, b": {'c': [0]},
    "groups of 'b' have to stay: the network's output": {'b': [1, 0]},
    r"order of 'a' must be a permutation of 0 to 5, not array\(\[0, 1\]\)": {'a': [0, 1]},
    'must be a permutation': {'a': [0, 1, 2, 3, 4, 4]},
}


@pytest.mark.parametrize('message', WRONG)
def test_wrong_orders(message):
    params = {'a': np.zeros((3, 6), np.float32), 'b': np.zeros((6, 2), np.float32)}
    coupled = jp.groups(lambda p, x: x @ p['a'] @ p['b'], params, np.ones((4, 3), np.float32))
    with pytest.raises(PruneError, match=message):
        structure.permuted(coupled, params, WRONG[message])


def test_masks_take_part_in_the_checks():
    """Expectation: an order that is wrong for parameters is wrong for masks."""
    params = {'a': np.zeros((3, 6), np.float32), 'b': np.zeros((6, 2), np.float32)}
    coupled = jp.groups(lambda p, x: x @ p['a'] @ p['b'], params, np.ones((4, 3), np.float32))
    with pytest.raises(PruneError, match="'b' has shape"):
        structure.permuted_masks(coupled, {'b': np.ones((5, 2), bool)}, {'a': np.arange(6)})


def test_parameters_of_another_network():
    """Expectation: a line with both lengths."""
    params = {'a': np.zeros((3, 6), np.float32), 'b': np.zeros((6, 2), np.float32)}
    coupled = jp.groups(lambda p, x: x @ p['a'] @ p['b'], params, np.ones((4, 3), np.float32))
    smaller = {'a': params['a'][:, :4], 'b': params['b'][:4]}
    with pytest.raises(PruneError, match=r"'a' has shape \(3, 4\), but 6 indices along axis 1"):
        structure.permuted(coupled, smaller, {'a': np.arange(6)})


def test_moments_of_unknown_layout():
    """Expectation: rows and columns of Adafactor belong to no single weight: refused."""
    params = {'a': np.zeros((128, 130), np.float32), 'b': np.zeros((130, 128), np.float32)}
    coupled = jp.groups(lambda p, x: x @ p['a'] @ p['b'], params, np.ones((1, 128), np.float32))
    state = jax.eval_shape(optax.adafactor(0.1).init, params)
    state = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), state)
    with pytest.raises(PruneError, match="optimizer's state of 'a' has shape"):
        structure.permuted_moments(coupled, state, params, {'a': np.arange(130)})
