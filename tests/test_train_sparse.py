"""`jp.train_sparse`: methods in someone's own loop do what they do in a sweep."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_hooked_methods import granularity

import jaxprune as jp
from jaxprune import PruneError, method, nn, optim, tree
from jaxprune.method import get_pruner
from jaxprune.optim import optimizer
from jaxprune.prune_model.in_loop import spread
from jaxprune.rng import stream
from jaxprune.train import init_run, run_events, train_step
from jaxprune.types import Batch, Hyper

KEY, STEPS, STOP, RATE = jax.random.key(0), 14, 12, 0.1
NAMES = sorted(n for n, entry in method.METHODS.items() if entry.hooked and not entry.coupled)
PROBLEM = jp.problem_from_flax(nn.MLP((16,), classes=4), (8,))
X = jax.random.normal(jax.random.key(1), (STEPS, 20, 8))
Y = jax.random.randint(jax.random.key(2), (STEPS, 20), 0, 4)
PARAMS, STATE = jax.jit(PROBLEM.init)(stream(KEY, 'init'))


def loss(params, x, y):
    return PROBLEM.loss(PROBLEM.apply(params, STATE, x, train=True, key=None)[0], y).mean()


def pair(name, tx=None, **more):
    given = {'density': 0.3, 'start': 2, 'stop': STOP, 'rounds': 4, 'learning_rate': RATE}
    given['granularity'] = granularity(name) if name in NAMES else 'weight'
    tx = optax.sgd(RATE, 0.9) if tx is None else tx
    return jp.train_sparse(PARAMS, tx, name, **{**given, **more})


def trained(sparse, params=PARAMS, key=KEY, steps=STEPS):
    """The parameters and the state after some steps of a loop."""

    def step(carried, batch):
        params, state = carried
        grads = jax.grad(lambda p: loss(sparse.seen(p, state), *batch))(params)
        return sparse.update(grads, state, params), None

    run = jax.jit(lambda carried, batches: jax.lax.scan(step, carried, batches)[0])
    return run((params, sparse.init(params, key)), (X[:steps], Y[:steps]))


@pytest.mark.parametrize('start', [0, 2])
@pytest.mark.parametrize('name', NAMES)
def test_a_loop_does_what_a_sweep_does(name, start):
    """Expectation: the same steps and rounds, put together from `train_step` and `run_events`."""
    sparse = pair(name, start=start)
    params, state = trained(sparse)
    events = spread(start, STOP, 4)
    shapes = {path: leaf.shape for path, leaf in tree.pick(PARAMS, tree.kernels).items()}
    groups = method.competing(granularity(name), shapes)
    entry = method.METHODS[name]
    fits = groups.kind == 'weight' or entry.allocation in method.GROUP_ALLOCATIONS
    allocation = entry.allocation if fits else 'uniform'
    chosen = {'allocation': allocation, 'shapes': shapes, 'groups': groups, 'events': events}
    pruner = get_pruner(PROBLEM, name, **chosen)
    plan = method.plan_groups(
        groups, 0.3, allocation=allocation, rounds=4, density_schedule=entry.density_schedule
    )
    chain = optimizer('sgd', {}, lambda step: 1.0)
    hyper = Hyper(jnp.float32(RATE), jnp.float32(0), {'momentum': 0.9})
    steps = [train_step(PROBLEM, chain, hook, dense=dense) for hook, dense in
             ((None, False), (pruner.hook, pruner.dense))]  # fmt: skip

    @functools.partial(jax.jit, static_argnames=('number',))
    def round_(run, number, clock, batch):
        rounds = run_events(PROBLEM, chain, pruner, KEY, hyper, lambda i: batch, clock=clock)
        run = rounds.begin(run) if number == 0 else run
        now = {path: jnp.asarray(column)[number] for path, column in plan.counts.items()}
        run, _ = rounds.once(jnp.int32(number), now, run)
        if number == len(events) - 1 and rounds.finish is not None:
            run, _ = rounds.finish(run, 0)
        return run

    step = jax.jit(lambda clock, run, batch, hooked: jax.lax.cond(
        hooked, lambda: steps[1](clock, KEY, hyper, run, batch)[0],
        lambda: steps[0](clock, KEY, hyper, run, batch)[0]))  # fmt: skip
    run, number = jax.jit(init_run(PROBLEM, chain))(KEY, hyper), 0
    for clock in range(STEPS):
        batch = Batch(X[clock], Y[clock])
        if clock in events:
            single = jax.tree.map(lambda leaf: leaf[None], batch)
            run, number = round_(run, number, jnp.int32(clock), single), number + 1
        if number == 0:
            run = jax.jit(steps[0])(jnp.int32(clock), KEY, hyper, run, batch)[0]
        else:
            run = step(jnp.int32(clock), run, batch, number < len(events))
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)
    jax.tree.map(close, params, run.params)
    for path, mask in run.masks.items():
        np.testing.assert_array_equal(state.run.masks[path], mask)
    kept = sum(int(m.sum()) for m in groups.alive(run.masks).values())
    assert kept == sum(int(column[-1]) for column in plan.counts.values())
    seen = sparse.seen(params, state, train=False)
    jax.tree.map(np.testing.assert_array_equal, seen, params)
    assert all(not np.any(tree.pick(params, tree.kernels)[p][~m]) for p, m in run.masks.items())


@pytest.mark.parametrize('name', ['rigl', 'dpf'])
def test_many_loops_at_once(name):
    """Law: rows of a vmapped loop are single loops."""
    sparse = pair(name)
    keys = jax.random.split(KEY, 2)
    rows = jax.vmap(lambda key: trained(sparse, key=key))(keys)
    for i in range(2):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], rows)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
        jax.tree.map(close, one, trained(sparse, key=keys[i]))


def test_evaluation_sees_what_it_should():
    """SPP draws masks for training, and none for evaluation; DPF shows the masked network."""
    for name in ('spp', 'dpf'):
        params, state = trained(sparse := pair(name), steps=7)
        pruned = tree.apply_masks(params, state.run.masks)
        jax.tree.map(np.testing.assert_array_equal, sparse.seen(params, state, train=False), pruned)
        assert any(np.any(leaf) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ('name', 'more', 'message'),
    [
        ('snip', {}, "'snip' does not change training, see jp.prune: "),
        ('rigle', {}, "did you mean 'rigl'"),
        ('hesso', {}, 'removes coupled groups: see jp.train_once'),
        ('rigl', {'rounds': 30}, '30 rounds need a stop at least 29 steps after start'),
        ('rigl', {'dropp': 0.3}, 'drop'),
        ('rigl', {'density': 0.0}, 'density'),
        ('unify', {'rounds': 2}, "rounds: 'unify' needs three or more, not 2"),
        ('greg2', {'rounds': 2}, "rounds: 'greg2' needs three or more, not 2"),
        ('str', {'density_schedule': 'cubic'}, 'prunes in one round only'),
        ('rigl', {'learning_rate': 'fast'}, "learning_rate must be a number, not 'fast'"),
        ('rigl', {'learning_rate': -1.0}, 'learning_rate must be 0 or more, not -1'),
        ('rigl', {'weight_decay': float('nan')}, 'weight_decay must be 0 or more, not nan'),
        ('rigl', {'start': -1}, 'start must be at least 0, not -1'),
        ('rigl', {'prunable': 'kernel'}, 'prunable must be a function'),
        ('rigl', {'granularity': 'unit'}, "'unit' removes coupled groups: see jp.train_once"),
        ('lottery', {}, 'it is for sweeps'),
        ('gmp', {'drop': 0.3}, "'drop' is no argument, nor an option .*: there are none"),
    ],
)
def test_refusals(name, more, message):
    with pytest.raises(PruneError, match=message):
        pair(name, **more)


def test_misuse_of_the_functions():
    """One line each, not an error from deep inside."""
    sparse = pair('rigl')
    state = sparse.init(PARAMS)
    some = dict(list(PARAMS.items())[:-1])
    with pytest.raises(PruneError, match='optimizer must be made by optax'):
        pair('rigl', optax.adamw)
    with pytest.raises(
        PruneError, match=r'key must be a random key such as jax.random.key\(0\), not 0'
    ):
        sparse.init(PARAMS, 0)
    with pytest.raises(PruneError, match=r'takes \(gradients, state, params\)'):
        sparse.update(PARAMS, PARAMS, state)
    with pytest.raises(PruneError, match='gradients must be a tree like params: they differ in'):
        sparse.update(some, state, PARAMS)
    with pytest.raises(PruneError, match='only floating-point weights are pruned'):
        sparse.init(jax.tree.map(lambda leaf: leaf.astype(jnp.int32), PARAMS))


@pytest.mark.parametrize('name', ['dpf', 'movement', 'rigl'])
def test_scores_that_are_no_numbers_are_counted(name):
    """A gradient of NaN: a count says that masks mean nothing; without it the count is 0."""
    sparse = pair(name)
    update = jax.jit(sparse.update)
    for bad in (0.01, math.nan):
        params, state = PARAMS, sparse.init(PARAMS)
        for step in range(STOP + 1):
            grads = jax.tree.map(lambda w, g=bad if step == 3 else 0.01: w * g, PARAMS)
            params, state = update(grads, state, params)
        assert (int(state.nonfinite) > 0) == math.isnan(bad)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('name', ['movement', 'soft_movement', 'str'])
def test_half_precision(name, dtype):
    """What is learned beside the weights is in single precision; counts are exact."""
    sparse = pair(name)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    state, update = sparse.init(params), jax.jit(sparse.update)
    for _ in range(STOP + 1):
        params, state = update(params, state, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    shapes = jp.shapes(tree.pick(PARAMS, tree.kernels))
    counts = jp.keep_counts(shapes, 0.3, method.usual_allocation(method.METHODS[name], 'weight'))
    assert sum(int(m.sum()) for m in state.run.masks.values()) == sum(counts.values())


@pytest.mark.parametrize('name', ['movement', 'str', 'rigl', 'spp'])
def test_single_precision_beside_double(name):
    """Where double precision is allowed, states of float32 weights keep their types."""
    sparse = pair(name)
    with jax.enable_x64(True):
        state = jax.eval_shape(sparse.init, PARAMS)
        params, after = jax.eval_shape(sparse.update, PARAMS, state, PARAMS)
    types = jax.tree.map(lambda leaf: leaf.dtype, (PARAMS, state))
    assert jax.tree.map(lambda leaf: leaf.dtype, (params, after)) == types


@pytest.mark.parametrize(
    'tx', [n if n == 'adamw' else pytest.param(n, marks=pytest.mark.slow) for n in optim.names()]
)
@pytest.mark.parametrize('name', ['gmp', 'rigl', 'sr_ste'])
def test_masks_hold_through_every_optimizer(name, tx):
    """Laws, of every optimizer of a specification: exact counts, and what a method prunes is zero
    in the network that it shows."""
    sparse = pair(name, getattr(optax, tx)(1e-2))
    params, state = trained(sparse)
    allocation = method.usual_allocation(method.METHODS[name], granularity(name))
    shapes = jp.shapes(tree.pick(PARAMS, tree.kernels))
    counts = jp.keep_counts(shapes, 0.3, allocation=allocation)
    assert sum(int(m.sum()) for m in state.run.masks.values()) == sum(counts.values())
    seen = tree.pick(sparse.seen(params, state, train=False), tree.kernels)
    for path, leaf in seen.items():
        assert not np.any(np.asarray(leaf)[~np.asarray(state.run.masks[path])])
        assert np.all(np.isfinite(leaf))


def test_the_pair_wraps_any_optimizer():
    """Laws: exact counts of each layer, and pruned weights at zero in the stored weights too."""
    shapes = jp.shapes(tree.pick(PARAMS, tree.kernels))
    counts = jp.keep_counts(shapes, 0.3, allocation='erk')
    for tx in (optax.adamw(1e-2, weight_decay=0.1), optax.lion(1e-3), optax.rmsprop(1e-3)):
        params, state = trained(pair('rigl', tx))
        assert {path: int(mask.sum()) for path, mask in state.run.masks.items()} == counts
        for path, leaf in tree.pick(params, tree.kernels).items():
            assert not np.any(np.asarray(leaf)[~np.asarray(state.run.masks[path])])
