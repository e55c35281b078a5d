"""Masking an optimizer's state, whatever it is made of."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune import optim
from jaxprune.errors import PruneError

PARAMS = {
    'a': {'kernel': jnp.ones((4, 4)), 'bias': jnp.zeros(4)},
    'b': [{'w': jnp.ones((3, 2))}],
}
MASKS = {'a/kernel': jnp.eye(4, dtype=bool), 'b/0/w': jnp.eye(3, 2, dtype=bool)}
LABELS = {'a': {'kernel': 'train', 'bias': 'freeze'}, 'b': [{'w': 'slow'}]}
SOME = {'a': {'kernel': True, 'bias': False}, 'b': [{'w': False}]}

#: Optimizer -> how many moments of the shape of `a/kernel` its state holds.
MADE = {
    'chain': (optax.chain(optax.clip(1.0), optax.adam(0.1)), 2),
    'named chain': (optax.named_chain(('x', optax.adam(0.1)), ('y', optax.trace(0.9))), 3),
    'masked': (optax.masked(optax.adam(0.1), SOME), 2),
    'partition': (
        optax.partition(
            {'train': optax.adam(0.1), 'slow': optax.sgd(0.1), 'freeze': optax.set_to_zero()},
            LABELS,
        ),
        2,
    ),
    'accumulated': (optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(), 3),
    'if finite': (optax.apply_if_finite(optax.adam(0.1), 3), 2),
    'injected': (optax.inject_hyperparams(optax.adam)(learning_rate=0.1), 2),
    'lbfgs': (optax.lbfgs(0.1, linesearch=None), 4),
    'novograd': (optax.novograd(0.1), 1),
    'adafactor': (optax.adafactor(0.1, min_dim_size_to_factor=4), 0),
    'schedule free': (optax.contrib.schedule_free_adamw(0.1), 2),
    'muon': (optax.contrib.muon(0.1), 1),
}


def filled(tx):
    """A state without zeros."""
    return jax.tree.map(
        lambda leaf: leaf + 1 if jnp.issubdtype(jnp.result_type(leaf), jnp.number) else leaf,
        tx.init(PARAMS),
    )


@pytest.mark.parametrize('wrapped', [False, True])
@pytest.mark.parametrize('name', MADE)
def test_moments_of_pruned_weights_become_zero(name, wrapped):
    """Expectation: by hand: moments that are shaped like the kernel, also under leading axes (two
    of L-BFGS's four remember ten steps); the rest of the state, and its structure, stay."""
    tx, moments = MADE[name]
    tx = jp.sparse(tx) if wrapped else tx
    old = filled(tx)
    new = jp.mask_opt_state(tx, old, PARAMS, MASKS)
    assert jax.tree.structure(new) == jax.tree.structure(old)
    found = 0
    for before, after in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        assert jnp.shape(before) == jnp.shape(after)
        if jnp.shape(before)[-2:] == (4, 4):
            found += 1
            np.testing.assert_array_equal(after, np.where(MASKS['a/kernel'], before, 0))
        elif jnp.shape(before)[-2:] != (3, 2):
            np.testing.assert_array_equal(after, before)
    assert found == moments


def test_moments_in_one_vector():
    """Expectation: `optax.flatten` lays leaves one after another: 4 biases, 16 and 6 weights."""
    tx = optax.flatten(optax.adam(0.1))
    _, state = tx.update(jax.tree.map(jnp.ones_like, PARAMS), tx.init(PARAMS), PARAMS)
    new = jp.mask_opt_state(tx, state, PARAMS, MASKS)
    kept = np.concatenate([np.ones(4), np.eye(4).ravel(), np.eye(3, 2).ravel()])
    np.testing.assert_array_equal(np.asarray(new[0].mu) != 0, kept != 0)


def test_another_optimizers_state_is_refused():
    """Expectation: one line; masked in silence it would be another network's."""
    with pytest.raises(PruneError, match='opt_state is not a state of this optimizer'):
        jp.mask_opt_state(optax.adam(0.1), optax.sgd(0.1).init(PARAMS), PARAMS, MASKS)


@pytest.mark.parametrize('name', optim.names())
def test_every_optimizer_of_a_specification_can_be_masked(name):
    """Expectation: the docstring: pruned weights stay zero over two steps and a masking between,
    and the state keeps its structure, shapes and types."""
    tx = jp.sparse(getattr(optax, name)(0.1))
    params = jp.apply_masks(PARAMS, MASKS)
    state = tx.init(params)
    types = jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), state)
    for _ in range(2):
        updates, state = tx.update(params, state, params, masks=MASKS)
        params = optax.apply_updates(params, updates)
        state = jp.mask_opt_state(tx, state, params, MASKS)
        assert jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), state) == types
        for path, weights in jp.pick(params).items():
            assert not np.asarray(weights)[~np.asarray(MASKS[path])].any()
