"""`jp.train_once`: what it removes, what it counts, what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import jaxprune as jp
from jaxprune import PruneError, nn

KEY = jax.random.key(0)
X = jnp.ones((2, 10))
MODULE = nn.MLP((32, 32), classes=5)
STOP = 30


def apply(params, x):
    return MODULE.apply({'params': params}, x)


PARAMS = jax.jit(lambda key: MODULE.init(key, X)['params'])(KEY)


def made(name='hesso', **more):
    given = {'density': 0.5, 'start': 0, 'stop': STOP, 'learning_rate': 0.1, **more}
    return jp.train_once(apply, PARAMS, X, optax.sgd(0.1), method_name=name, **given)


def trained(once, steps, seed=0):
    """Random gradients in place of data."""

    @jax.jit
    def run(params, state, keys):
        def step(carried, key):
            params, state = carried
            flat, whole = ravel_pytree(params)
            return once.update(whole(0.3 * jax.random.normal(key, flat.shape)), state, params), None

        return jax.lax.scan(step, (params, state), keys)[0]

    return run(PARAMS, once.init(PARAMS), jax.random.split(jax.random.key(seed), steps))


def zeros(params):
    """Layer -> which of its neurons are zero."""
    return {
        f'dense_{i}/kernel': ~np.asarray(params[f'dense_{i}']['kernel']).any(0)
        & ~np.asarray(params[f'dense_{i}']['bias']).astype(bool)
        for i in (0, 1)
    }


@pytest.mark.parametrize(
    'more',
    [
        {'multiple': 8, 'density': 0.55},
        {'target': 'flops', 'multiple': 8, 'density': 0.4},
        {'target': 'params', 'floor': 20, 'density': 0.5},
        {'allocation': 'uniform'},
        {'variant': 'code'},
    ],
)
def test_hesso_cuts_what_is_zero_and_all_of_it(more):
    """Expectation: its groups are zero at the last round, and those are the ones that go, whatever
    the number of a layer has to be."""
    once = made('hesso', rounds=4, **more)
    params, state = trained(once, STOP)
    gone = {layer: int(mask.sum()) for layer, mask in zeros(params).items()}
    assert int(state.forced) == 0
    small = once.compact(params, state)
    assert small.removed == {layer: n for layer, n in gone.items() if n}
    left = [32 - n for n in gone.values()]
    assert all(n % more.get('multiple', 1) == 0 and n >= more.get('floor', 1) for n in left)
    np.testing.assert_allclose(small.apply(small.params, X), apply(params, X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', ['hspg', 'dhspg'])
def test_no_more_is_projected_than_a_share_needs(name):
    """Expectation: without the last group to become zero more than the share would be left."""
    strong = {'penalty': 1.0, 'half_space': 0.97, 'half_space_dense': 0.97}
    once = made(name, target='flops', density=0.7, **strong)
    params, state = trained(once, STOP)
    removed = sum(once.compact(params, state).removed.values())
    assert 0 <= int(state.forced) < removed
    assert removed == sum(int(mask.sum()) for mask in zeros(params).values())


def test_what_was_not_zero_is_counted():
    """Expectation: nothing is zero, so all 16 groups of each layer are cut alive, and the network
    computes something else."""
    once = made('proximal', allocation='uniform', penalty=1e-6)
    params, state = trained(once, STOP - 1)
    assert int(state.forced) == 0 and not any(mask.any() for mask in zeros(params).values())
    after, state = trained(once, STOP)
    assert int(state.forced) == 32
    small = once.compact(after, state)
    assert small.removed == dict.fromkeys(zeros(params), 16)
    assert float(jnp.abs(small.apply(small.params, X) - apply(params, X)).max()) > 0.1


def test_many_trainings_at_once():
    """Law: rows of a vmapped training are single trainings; they are cut one by one."""
    once = made('hesso', rounds=4)
    rows = jax.vmap(lambda seed: trained(once, STOP + 2, 0))(jnp.arange(2))
    single = trained(once, STOP + 2, 0)
    row = jax.tree.map(lambda leaf: leaf[1], rows)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), row, single)
    with pytest.raises(PruneError, match='one run at a time'):
        once.compact(*rows)
    assert sum(once.compact(*row).removed.values()) == 32


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        ({'name': 'snip'}, "'snip' does not change training, see jp.prune: "),
        ({'name': 'hess'}, "did you mean 'hesso'"),
        ({'rounds': 1}, 'rounds must be at least 2, not 1'),
        ({'rounds': 50}, '50 rounds need a stop at least 49 steps after start'),
        ({'density': 1.5, 'target': 'params'}, 'density'),
        ({'density': 0.01, 'target': 'params', 'multiple': 16}, 'cannot be met'),
        ({'density': 0.2, 'target': 'flops', 'floor': 30}, 'cannot be met'),
        ({'multiple': 0}, 'multiple must be at least 1, not 0'),
        ({'name': 'tpp', 'multiple': 0}, 'multiple must be at least 1, not 0'),
        ({'variant': 'code', 'target': 'flops'}, "'code' goes by one ranking"),
        ({'variant': 'code', 'allocation': 'uniform'}, "'code' goes by one ranking"),
        ({'name': 'proximal', 'cut': 'zero', 'multiple': 8}, 'whatever number is left'),
        ({'name': 'slimming'}, 'slimming needs a norm'),
        ({'target': 'flop'}, 'flop'),
        ({'penalty': 1.0}, "penalty"),
    ],
)  # fmt: skip
def test_refusals(more, message):
    with pytest.raises(PruneError, match=message):
        made(**more)


def test_a_network_that_is_not_done_or_has_no_state():
    once = made('hesso', rounds=4)
    with pytest.raises(PruneError, match='ends after 30 steps, and 5 were taken'):
        once.compact(*trained(once, 5))
    net = jp.problem_from_flax(nn.build('small_vgg', 10, widths=[4]), (8, 8, 1))
    params, model_state = jax.jit(net.init)(KEY)
    given = {'learning_rate': 0.1, 'density': 0.5, 'start': 0, 'stop': 1, 'rounds': 2}
    x = jnp.zeros((1, 8, 8, 1))
    once = jp.train_once(net, params, x, optax.sgd(0.1), model_state=model_state, **given)
    state = once.init(params)._replace(step=jnp.int32(1), rounds=jnp.int32(2))
    with pytest.raises(PruneError, match='needs model_state='):
        once.compact(params, state)
