"""Top-KAST, GReg, SPP, IncReg, ADMM, unification, orthogonal penalty: by hand and brute force.

Expectations are the definitions of the papers and what follows from them on quadratic losses.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune import flow, method
from jaxprune.errors import PruneError
from jaxprune.method import greg
from jaxprune.method.admm import nearest_sparse
from jaxprune.method.by_rank import lost, to_keep
from jaxprune.method.chosen_anew import selected
from jaxprune.method.lasting import Asked
from jaxprune.method.unify import chosen, nearest_unified, shared_sizes, unification_loss
from jaxprune.select import count_kept
from jaxprune.types import Problem, View


def everything(path, leaf):
    return True


def loop(weights, name, curvature=1.0, centre=None, tx=None, key=0, steps=None, **more):
    """Trains `½ h ‖w - centre‖²` with a method, and returns the weights and the state."""
    centre = weights if centre is None else centre
    given = {'density': 0.5, 'start': 0, 'stop': 200, 'learning_rate': 0.1, **more}
    steps = given['stop'] if steps is None else steps
    tx = optax.sgd(0.1) if tx is None else tx
    params = {'w': weights}
    sparse = jp.train_sparse(params, tx, name, prunable=everything, **given)

    def loss(params, state):
        return (0.5 * curvature * (sparse.seen(params, state)['w'] - centre) ** 2).sum()

    def step(carried, _):
        params, state = carried
        return sparse.update(jax.grad(loss)(params, state), state, params), carried[0]['w']

    run = jax.jit(lambda carried: jax.lax.scan(step, carried, length=steps))
    (params, state), path = run((params, sparse.init(params, jax.random.key(key))))
    return params['w'], state, path


def on_its_own(weights, name, events=(0, 4, 8), granularity='weight', **options):
    """A method, its view of one layer, by layer."""
    shapes = {'w': weights.shape}
    groups = method.competing(granularity, shapes)
    pruner = method.get_pruner(
        Problem(None, None, None, everything), name, allocation='uniform', shapes=shapes,
        groups=groups, events=events, **options,
    )  # fmt: skip
    masks = {'w': jnp.ones(weights.shape, bool)}
    stored = {'w': weights} if pruner.dense else None
    return pruner, View({'w': weights}, {'w': weights}, {}, masks, stored=stored)


# --- Top-KAST ---------------------------------------------------------------------------------


def test_top_kast_trains_the_next_largest_as_well():
    """Of 10 weights 3 compute and 2 more learn; the other 5 stand still, bit for bit."""
    weights = jnp.arange(1.0, 11.0)
    given = {'density': 0.3, 'rounds': 2, 'explore': 0.2, 'penalty': 1e-6}
    after, state, _ = loop(weights, 'top_kast', centre=jnp.full(10, 20.0), steps=2, **given)
    np.testing.assert_array_equal(state.run.masks['w'], [False] * 7 + [True] * 3)
    moved = np.asarray(after != weights)
    np.testing.assert_array_equal(moved, [False] * 5 + [True] * 5)
    # Those that only learn get the gradient at 0, so they grow by 0.1 x 20 in each step.
    np.testing.assert_allclose(after[5:7], [10.0, 11.0], rtol=1e-5)


def test_top_kast_pulls_harder_at_what_does_not_compute():
    """`penalty w` where weights compute, `penalty w / D` where they only learn; D = 0.3."""
    weights = jnp.arange(1.0, 11.0)
    pruner, view = on_its_own(weights, 'top_kast', explore=0.2, penalty=0.01)
    state = pruner.init(jax.random.key(0), view)
    state, masks, _ = pruner.update(jax.random.key(0), state, view, {'w': jnp.int32(3)}, None)
    zero = {'w': jnp.zeros(10)}
    _, grads = pruner.hook.gradient(state, zero, {'w': weights}, masks, 0, None)
    np.testing.assert_allclose(
        grads['w'], 0.01 * weights * jnp.where(masks['w'], 1, 1 / 0.3), rtol=1e-6
    )
    moves = pruner.hook.moves(state, masks)['w']
    np.testing.assert_array_equal(moves, [False] * 5 + [True] * 5)


# --- GReg -------------------------------------------------------------------------------------


@pytest.mark.parametrize('strength', [0.5, 1.0])
def test_greg_comes_to_rest_where_the_penalty_says(strength):
    """The fixed point of `½ h (w - w0)² + ½ λ w²` is `w0 h / (h + λ)`; kept weights stay at w0."""
    weights = jnp.array([1.0, -2.0, 3.0, -4.0])
    given = {'interval': 1, 'increment': strength, 'ceiling': strength, 'rounds': 2}
    after, _, _ = loop(weights, 'greg1', curvature=2.0, stop=400, steps=399, **given)
    np.testing.assert_allclose(after[:2], weights[:2] * 2 / (2 + strength), rtol=1e-4)
    np.testing.assert_allclose(after[2:], weights[2:])
    pruned, _, _ = loop(weights, 'greg1', curvature=2.0, stop=400, **given)
    np.testing.assert_array_equal(pruned[:2], [0, 0])


def test_greg2_finds_the_flat_direction():
    """Curvatures 1 and 10 at equal weights: under λ = 1 they go to 0.5 and 0.909 of their size."""
    weights, curvature = jnp.array([1.0, 1.0]), jnp.array([10.0, 1.0])
    given = {
        'interval': 1, 'pick_increment': 1.0, 'pick_ceiling': 1.0, 'rounds': 3, 'stop': 300,
        'increment': 1.0, 'ceiling': 5.0, 'recover': -0.5,
    }  # fmt: skip
    tx = {'tx': optax.sgd(0.05), 'learning_rate': 0.05}
    before, _, _ = loop(weights, 'greg2', curvature, steps=149, **given, **tx)
    np.testing.assert_allclose(before, [10 / 11, 1 / 2], rtol=1e-3)
    after, state, _ = loop(weights, 'greg2', curvature, steps=299, **given, **tx)
    np.testing.assert_allclose(after, [10 / 9.5, 1 / 6], rtol=1e-3)  # λ of -0.5 and 5
    _, state, _ = loop(weights, 'greg2', curvature, **given, **tx)
    np.testing.assert_array_equal(state.run.masks['w'], [True, False])


def test_the_penalty_grows_in_steps():
    """λ after n intervals of 1e-4 is n 1e-4; it stops at the ceiling: 1 after 10,000."""
    pruner, view = on_its_own(jnp.array([1.0, 2.0]), 'greg1', (0, 10**6), interval=10)
    state = pruner.init(jax.random.key(0), view)
    state, _, _ = pruner.update(jax.random.key(0), state, view, {'w': jnp.int32(1)}, None)
    zero, ones = {'w': jnp.zeros(2)}, {'w': jnp.ones(2)}

    def step(state, clock):
        state, grads = pruner.hook.gradient(state, zero, ones, view.masks, clock, None)
        return state, grads['w'][0]

    _, pulls = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(100_051)))(state)
    np.testing.assert_allclose(pulls[:10], 0)
    np.testing.assert_allclose(pulls[10:20], 1e-4, rtol=1e-5)
    np.testing.assert_allclose(pulls[5000], 500e-4, rtol=1e-3)
    np.testing.assert_allclose(pulls[-50:], 1.0, rtol=1e-3)


def test_the_penalty_stops_where_enough_is_reached():
    """Blocks: as soon as kept ones are 5 times as large as the others, λ stands still."""
    weights = jnp.concatenate([jnp.full((4, 2), 1.0), jnp.full((4, 2), 2.0)], axis=1)
    given = {'granularity': '4x2', 'interval': 1, 'increment': 0.05, 'enough': 5.0, 'rounds': 2}
    after, state, _ = loop(weights, 'greg1', stop=400, steps=399, **given)
    strength = float(state.run.method_state.strength)
    # 2 (1 + λ) / 1 > 5 needs λ above 1.5, which the ceiling of 1 does not allow ...
    np.testing.assert_allclose(strength, 1.0, rtol=1e-5)
    after, state, _ = loop(weights, 'greg1', stop=400, steps=399, **given, ceiling=10.0)
    strength = float(state.run.method_state.strength)
    # ... and the average of the quotients is late, so it goes a little further.
    assert 1.5 < strength < 2.6
    np.testing.assert_allclose(after[0, 0], 1 / (1 + strength), rtol=1e-3)


# --- SPP and IncReg ---------------------------------------------------------------------------


def test_the_curve_of_spp():
    """Figures of the methods reference: n = 12, A = 0.05, u = 0.25, so N = 8."""
    curve = lost(jnp.arange(17.0), 12, 0.05, 0.25)
    expected = [0.05, 0.04204, 0.03536, 0.02973, 0.025, 0.02102, 0.01768, 0.01487, 0.0125,
                0.01013, 0.00732, 0.00398, 0.0, -0.00473]  # fmt: skip
    np.testing.assert_allclose(curve[:14], expected, atol=6e-6)
    assert float(curve[16]) == pytest.approx(2 * 0.25 * 0.05 - 0.05, abs=1e-7)
    np.testing.assert_allclose(lost(jnp.arange(4.0), 0, 0.05, 0.25), 0)
    far = lost(jnp.float32(1e6), 1, 0.05, 0.25)
    assert np.isfinite(far) and far < -1


def test_high_ranks_win_however_the_curve_bends():
    """The definition in NumPy, to ranks far beyond its zero at n; with u = 0.8 these are beyond
    three times the centre."""
    rank, n, amount, bend = np.arange(20.0), 3, 0.05, 0.8
    slope = np.log(2 / bend) / n
    centre = -np.log(bend) / slope
    far = 2 * bend * amount - amount * np.exp(-slope * (2 * centre - rank))
    expected = np.where(rank < centre, amount * np.exp(-slope * rank), far)
    np.testing.assert_allclose(lost(rank, n, amount, bend), expected, rtol=1e-5, atol=1e-8)
    assert abs(expected[n]) < 1e-12 and (expected[n + 1 :] < 0).all()


@pytest.mark.parametrize('most', [None, {'a': 3, 'b': 9, 'c': 2}])
def test_what_spp_is_to_keep_is_what_a_selection_keeps(most):
    """Expectation: the selection, counted; with groups that are gone, and layers with a cap."""
    shapes = {'a': (12,), 'b': (9,), 'c': (4,)}
    groups, draw = method.competing('weight', shapes), np.random.default_rng(4)
    scores = {path: jnp.asarray(draw.random(shape)) for path, shape in shapes.items()}
    shared, apart = Asked(groups, None, (), most=most), Asked(groups, None, (), shared=False)

    @jax.jit
    def both(alive, k):
        own, found = {'a': k // 2, 'b': 0, 'c': k}, []
        for asked, counts in ((shared, {'*': k}), (apart, own)):
            kept = count_kept(selected(asked, scores, alive, counts))
            if asked.shared:
                kept = dict.fromkeys(kept, sum(kept.values()))
            found.append((kept, to_keep(asked, scores, alive, counts)))
        return found

    everything = {path: jnp.ones(shape, bool) for path, shape in shapes.items()}
    all_of_it = to_keep(shared, scores, everything, {'*': 2**40})
    assert set(map(int, all_of_it.values())) == {sum(most.values()) if most else 25}
    with pytest.raises(PruneError, match='lack'):
        to_keep(shared, scores, everything, {'a': 3})
    for share in (0.2, 0.6, 1.0):
        alive = {path: jnp.asarray(draw.random(shape) < share) for path, shape in shapes.items()}
        for k in range(0, 15 if most else 26, 2):
            for kept, found in both(alive, k):
                assert found == kept


def test_spp_computes_with_its_probability():
    """The mean of many drawn masks is p; evaluation sees all; drawn anew in each step."""
    weights = jnp.ones(5)
    pruner, view = on_its_own(weights, 'spp')
    state = pruner.init(jax.random.key(0), view)
    life = jnp.array([0.0, 0.1, 0.5, 0.9, 1.0])
    state = state._replace(life={'w': life})
    seen = jax.jit(
        jax.vmap(lambda clock: pruner.hook.weights(state, {'w': weights}, view.masks, clock)['w'])
    )(jnp.arange(20_000))
    # Three standard deviations of a mean of 20,000 draws: 0.011 at p = 0.5.
    np.testing.assert_allclose(seen.mean(0), life, atol=0.011)
    assert (seen[0] != seen[1]).any() or (seen[1] != seen[2]).any()
    evaluated = pruner.hook.evaluated(state, {'w': weights}, view.masks, 0)
    np.testing.assert_array_equal(evaluated['w'], weights)


@pytest.mark.parametrize('name', ['spp', 'increg'])
def test_ranks_decide_who_goes(name):
    """Sizes stand still, so the smallest lose in every round: by hand, from the curve. No more
    than the target go, what is gone stays so, and in the end all others are whole again."""
    weights = jnp.array([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    events = tuple(range(101))
    pruner, view = on_its_own(weights, name, events, amount=0.25)
    state, counts = pruner.init(jax.random.key(0), view), {'w': jnp.int32(4)}
    rank, life = np.array([4, 0, 3, 1, 2, 5.0]), np.ones(6, np.float32)
    update, gone = jax.jit(pruner.update), np.zeros(6, bool)
    for number in range(100):
        state, masks, _ = update(jax.random.key(number), state, view, counts, None)
        going = 2 - gone.sum()
        places = np.argsort(np.argsort(np.where(gone, np.inf, rank)))
        life = np.clip(life - np.asarray(lost(jnp.float32(places), going, 0.25, 0.25)), 0, 1)
        life[gone] = 0
        now = life <= 0
        if now.sum() == 2:
            life = np.where(now, 0, 1)
        gone = now
        np.testing.assert_allclose(state.life['w'], life, atol=1e-5)
        np.testing.assert_array_equal(masks['w'], ~gone)
        view = view._replace(masks=masks, weights={'w': weights * masks['w']})
        if number < 3:
            assert not gone.any()
    np.testing.assert_array_equal(gone, [False, True, False, True, False, False])


def test_increg_pulls_by_what_is_lost():
    """λ of a group is the ceiling times the share of life that it has lost."""
    weights = jnp.array([1.0, 2.0])
    pruner, view = on_its_own(weights, 'increg', ceiling=3.0)
    state = pruner.init(jax.random.key(0), view)._replace(life={'w': jnp.array([0.25, 1.0])})
    zero = {'w': jnp.zeros(2)}
    _, grads = pruner.hook.gradient(state, zero, {'w': weights}, view.masks, 0, None)
    np.testing.assert_allclose(grads['w'], [3 * 0.75 * 1.0, 0])


# --- ADMM -------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['weight', '2:4', '2x2'])
def test_admm_ends_at_the_nearest_sparse_point(kind):
    """`f = ½ ‖W - A‖²`: the best sparse point is Π(A). ADMM gets there, its residual W - Z shrinks,
    and pruning changes nothing. In float64."""
    with jax.enable_x64(True):
        target = jax.random.normal(jax.random.key(3), (8, 4), jnp.float64)
        given = {
            'granularity': kind, 'rounds': 40, 'stop': 4000, 'strength': 0.1, 'strength_end': 2.0,
            'tx': optax.sgd(0.1), 'learning_rate': 0.1,
        }  # fmt: skip
        before, state, _ = loop(target, 'admm', steps=3999, **given)
        after, done, _ = loop(target, 'admm', **given)
        groups = method.competing(kind, {'w': (8, 4)})
        asked = Asked(groups, None, (), shared=False)
        alive = groups.alive({'w': jnp.ones((8, 4), bool)})
        total = math.prod(groups.shapes['w'])
        best = nearest_sparse(asked, {'w': target}, alive, {'w': jnp.int32(total // 2)})[0]['w']
        np.testing.assert_allclose(after, best, atol=2e-2)
        residual = before - state.run.method_state.target['w']
        assert float(jnp.abs(residual).max()) < 1e-3
        assert int(done.run.masks['w'].sum()) == 16
        np.testing.assert_array_equal(np.asarray(after) != 0, np.asarray(best) != 0)


def test_a_round_of_admm():
    """Z = Π(W + U), then U = U + W - Z, and U shrinks as ρ grows; by hand."""
    weights = jnp.array([1.0, -3.0, 2.0])
    pruner, view = on_its_own(weights, 'admm', (0, 1, 2, 3), strength=0.1, strength_end=0.4)
    counts = {'w': jnp.int32(1)}
    state = pruner.init(jax.random.key(0), view)
    state, _, _ = pruner.update(jax.random.key(0), state, view, counts, None)
    np.testing.assert_allclose(state.target['w'], [0, -3, 0])
    np.testing.assert_allclose(state.dual['w'], 0)
    zero = {'w': jnp.zeros(3)}
    _, grads = pruner.hook.gradient(state, zero, {'w': weights}, view.masks, 0, None)
    np.testing.assert_allclose(grads['w'], [0.1, 0, 0.2], rtol=1e-6)
    state, _, _ = pruner.update(jax.random.key(0), state, view, counts, None)
    np.testing.assert_allclose(state.dual['w'], [1, 0, 2])
    np.testing.assert_allclose(state.strength, 0.2, rtol=1e-6)
    state, masks, _ = pruner.update(jax.random.key(0), state, view, counts, None)
    # U was halved with ρ doubled: W + U = [1.5, -3, 3]; of equal sizes the first stays.
    np.testing.assert_allclose(state.target['w'], [0, -3, 0])
    np.testing.assert_allclose(state.dual['w'], [1.5, 0, 3])
    assert masks['w'].all()
    _, masks, _ = pruner.update(jax.random.key(0), state, view, counts, None)
    np.testing.assert_array_equal(masks['w'], [False, True, False])


# --- unification ------------------------------------------------------------------------------


def test_a_block_of_one_magnitude():
    """(1, -2, 3) becomes (2, -2, 2) and loses 2; zeros stay; no other q is better."""
    groups = method.competing('1x3', {'w': (3, 3)})
    weights = {'w': jnp.array([[1.0, -2.0, 3.0], [0.0, 0.0, 0.0], [0.0, -1.0, 5.0]])}
    np.testing.assert_allclose(shared_sizes(groups, weights)['w'], [[2], [0], [3]])
    np.testing.assert_allclose(unification_loss(groups, weights)['w'], [[2], [0], [8]])
    every = {'w': jnp.ones((3, 1), bool)}
    made = nearest_unified(groups, weights, every, every)['w']
    np.testing.assert_allclose(made, [[2, -2, 2], [0, 0, 0], [0, -3, 3]])
    again = nearest_unified(groups, {'w': made}, every, every)['w']
    np.testing.assert_array_equal(again, made)
    for row, best in zip(weights['w'], made, strict=True):
        for q in np.linspace(0, 6, 601):
            assert ((row - np.sign(row) * q) ** 2).sum() >= ((row - best) ** 2).sum() - 1e-5


def test_the_nearest_network_of_pruned_and_unified_blocks():
    """Brute force: with the blocks to prune settled by norm, no other choice of blocks to unify
    changes less."""
    groups = method.competing('1x4', {'w': (6, 4)})
    weights = {'w': jax.random.normal(jax.random.key(0), (6, 4))}
    asked = Asked(groups, None, (), shared=False)
    alive = {'w': jnp.ones((6, 1), bool)}
    kept, tied = chosen(asked, weights, alive, {'w': jnp.int32(4)}, 0.5)
    assert int(kept['w'].sum()) == 4 and int(tied['w'].sum()) == 2
    norms = np.asarray((weights['w'] ** 2).sum(1))
    assert norms[np.asarray(kept['w'][:, 0])].min() > norms[~np.asarray(kept['w'][:, 0])].max()

    def distance(tied):
        made = nearest_unified(groups, weights, kept, {'w': jnp.asarray(tied)})['w']
        return float(((made - weights['w']) ** 2).sum())

    others = [
        distance(np.isin(np.arange(6), pair)[:, None])
        for pair in itertools.combinations(np.flatnonzero(kept['w']), 2)
    ]
    assert distance(tied['w']) == pytest.approx(min(others))


@pytest.mark.parametrize('tx', [optax.sgd(0.05, 0.9), optax.adam(0.02)], ids=['sgd', 'adam'])
def test_unified_blocks_train_as_one_number(tx):
    """Sizes are equal bit for bit after every step, signs stay, and the block comes to rest where
    the loss of one number does: the mean of `sign centre`."""
    key = jax.random.key(5)
    weights = jnp.abs(jax.random.normal(key, (4, 6))) + 0.5
    weights *= jnp.where(jax.random.bernoulli(key, 0.5, (4, 6)), 1, -1)
    centre = weights + 0.2 * jax.random.normal(jax.random.key(6), (4, 6))
    given = {
        'granularity': '2x3', 'rounds': 4, 'stop': 600, 'density': 0.5, 'strength_end': 0.5,
        'learning_rate': 0.05, 'tx': tx,
    }  # fmt: skip
    after, state, path = loop(weights, 'unify', centre=centre, **given)
    assert int(state.run.masks['w'].sum()) == 12
    signs = np.sign(path[401])
    for w in (*path[401:], after):
        blocks = np.abs(np.asarray(w)).reshape(2, 2, 2, 3).transpose(0, 2, 1, 3).reshape(4, 6)
        assert all(len(np.unique(row)) == 1 for row in blocks)
        np.testing.assert_array_equal(np.sign(w), signs)
    rest = (signs * np.asarray(centre)).reshape(2, 2, 2, 3).mean((1, 3))
    found = np.abs(np.asarray(after)).reshape(2, 2, 2, 3).mean((1, 3))
    np.testing.assert_allclose(found[found > 0], rest[found > 0], rtol=2e-2)


# --- orthogonal -------------------------------------------------------------------------------


@pytest.mark.parametrize('when', ['after', 'before'])
def test_the_penalty_is_that_of_flow(when):
    """The gradient gets `penalty` times that of `flow.kernel_orthogonality` of what is left."""
    weights = jax.random.normal(jax.random.key(0), (5, 4))
    pruner, view = on_its_own(weights, 'orthogonal', (0, 8), penalty=0.3, when=when)
    state = pruner.init(jax.random.key(0), view)
    counts = {'w': jnp.int32(12)}
    state, masks, _ = pruner.update(jax.random.key(0), state, view, counts, None)
    assert int(masks['w'].sum()) == (12 if when == 'after' else 20)
    left = {'w': jnp.where(masks['w'], weights, 0)}
    zero = {'w': jnp.zeros((5, 4))}
    _, grads = pruner.hook.gradient(state, zero, left, masks, 0, None)
    push = jax.grad(flow.kernel_orthogonality)(left, masks)['w']
    np.testing.assert_allclose(grads['w'], 0.3 * push, rtol=1e-6)
    state, masks, _ = pruner.update(
        jax.random.key(0), state, view._replace(masks=masks, weights=left), counts, None
    )
    assert int(masks['w'].sum()) == 12


# --- what a reader found ------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['spp', 'increg'])
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_ranks_do_not_round(name, dtype):
    """Expectation: of 1200 weights that stand still the largest half stays, though bfloat16 counts
    to 256 only. Equal sizes may go either way."""
    weights = jax.random.normal(jax.random.key(0), (30, 40)).astype(dtype)
    pruner, view = on_its_own(weights, name, tuple(range(6)))
    state, update = pruner.init(jax.random.key(0), view), jax.jit(pruner.update)
    for number in range(6):
        state, masks, _ = update(jax.random.key(number), state, view, {'w': jnp.int32(600)}, None)
        view = view._replace(masks=masks)
    sizes = np.abs(np.asarray(weights, np.float32))
    kept = np.asarray(masks['w'])
    assert kept.sum() == 600 and sizes[kept].min() >= sizes[~kept].max()


def test_a_layer_that_goes_whole_does_not_hold_the_penalty_up():
    """Expectation: no kept block is too small, so λ stops where the other layer is settled."""
    groups = method.competing('2x2', {'a': (4, 4), 'b': (4, 4)})
    kept = {'a': jnp.ones((2, 2), bool), 'b': jnp.zeros((2, 2), bool)}
    state = greg.Growing(kept, jnp.float32(0.5), dict.fromkeys(kept, jnp.float32(0)),
                         jnp.int32(1), jnp.array(True))  # fmt: skip
    recipe = greg._Recipe(1, 0.1, 10.0, 5.0, 0)
    params = {'a': jnp.ones((4, 4)), 'b': jnp.ones((4, 4))}
    assert float(greg._grown(groups, recipe, state, params).strength) == 0.5


@pytest.mark.parametrize('impl', ['threefry2x32', 'rbg'])
def test_keys_of_any_generator(impl):
    """Expectation: masks are drawn with them, and depend on the seed."""
    sparse = jp.train_sparse(
        {'w': jnp.ones((8, 8))}, optax.sgd(0.1), 'set', prunable=everything, density=0.5,
        start=0, stop=4, rounds=3, learning_rate=0.1,
    )  # fmt: skip
    masks = [
        sparse.init({'w': jnp.ones((8, 8))}, jax.random.key(seed, impl=impl)).run.masks['w']
        for seed in range(2)
    ]
    assert all(int(m.sum()) == 32 for m in masks) and (masks[0] != masks[1]).any()


def test_a_lottery_ticket_needs_training():
    with pytest.raises(jp.PruneError, match="name: 'lottery' trains before each of its rounds"):
        jp.prune({'w': jnp.ones((8, 8))}, 'lottery', 0.5, prunable=everything)
