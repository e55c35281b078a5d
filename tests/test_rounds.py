"""`prune_rounds` and `run_rounds`: what happens in rounds, under `vmap`, and in which loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.method import Rounds, host_loop, run_rounds
from jaxprune.structure import connectivity
from jaxprune.types import Batch, PruneInfo, Pruner

KEY = jax.random.key(5)
SHAPES = {'a/kernel': (6, 12), 'b/kernel': (12, 9), 'c/kernel': (9, 3)}
RNG = np.random.default_rng(0)
BATCHES = Batch(
    jnp.asarray(RNG.normal(size=(3, 8, 6)), jnp.float32), jnp.asarray(RNG.integers(0, 3, (3, 8)))
)


def init(key):
    keys = jax.random.split(key, len(SHAPES))
    return {
        path.split('/')[0]: {'kernel': jax.random.normal(k, shape) / shape[0] ** 0.5}
        for k, (path, shape) in zip(keys, SHAPES.items(), strict=True)
    }


def apply(params, x):
    return (
        jnp.tanh(jnp.tanh(x @ params['a']['kernel']) @ params['b']['kernel'])
        @ (params['c']['kernel'])
    )


PROBLEM = jp.problem_from_functions(init, apply)
EXAMPLE = jax.eval_shape(init, KEY), np.ones((1, 6), np.float32)
CONNECT = connectivity(apply, *EXAMPLE)
UNITS = jp.competing('unit', SHAPES, lambda: jp.groups(apply, *EXAMPLE))


@jax.jit
def view_of(seed):
    return jp.view(PROBLEM, init(jax.random.key(seed)))


#: Kind of pruner -> the pruner, the rounds, the fewest active weights.
CASES = {
    'one round': (jp.get_pruner(PROBLEM, 'snip'), 1, 0),
    'some rounds': (jp.get_pruner(PROBLEM, 'iter_snip'), 4, 0),
    'with random numbers': (jp.get_pruner(PROBLEM, 'random'), 3, 0),
    'weights return': (jp.get_pruner(PROBLEM, 'force'), 4, 0),
    'to active weights': (
        jp.get_pruner(PROBLEM, 'iter_snip', shapes=SHAPES, connect=CONNECT),
        4,
        30,
    ),
    'units, repaired': (
        jp.get_pruner(PROBLEM, 'taylor', groups=UNITS, repair='orthp'),
        2,
        0,
    ),
}


def plan_of(kind, density):
    shapes = UNITS.shapes if kind.startswith('units') else SHAPES
    return jp.plan_rounds(shapes, density, rounds=CASES[kind][1]).counts


def pruned(kind, key, view, counts, loop=jax.lax.scan):
    pruner, _, active = CASES[kind]
    if loop is host_loop:
        calls = {name: jax.jit(f) for name, f in pruner._asdict().items() if callable(f)}
        pruner = pruner._replace(**calls)
    return jp.prune_rounds(pruner, key, view, counts, BATCHES, active=active, loop=loop)


@functools.cache
def single(kind):
    """All rounds in one program, of key, view and counts."""
    return jax.jit(functools.partial(pruned, kind))


def assert_same(one, other, **tolerance):
    """Masks and counts bit for bit; weights too, unless a tolerance is given."""
    for path in SHAPES:
        np.testing.assert_array_equal(one[0].masks[path], other[0].masks[path])
        np.testing.assert_allclose(
            one[0].weights[path], other[0].weights[path], **(tolerance or {'rtol': 0})
        )
    jax.tree.map(np.testing.assert_array_equal, one[1], other[1])


#: Weights that return, and as many rounds as it takes; the others are simpler.
HARD = ('weights return', 'to active weights')


@pytest.mark.parametrize(
    'kind', [k if k in HARD else pytest.param(k, marks=pytest.mark.more) for k in CASES]
)
def test_vmap_over_seeds_and_counts_equals_single_calls(kind):
    """Expectation: single calls, row by row; values that are computed anew (OrthP) to rounding."""
    seeds, densities = (0, 1), (0.5, 0.25)
    plans = [plan_of(kind, density) for density in densities]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *plans)

    def one(seed, counts):
        return pruned(kind, jax.random.fold_in(KEY, seed), view_of(seed), counts)

    many = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(jnp.asarray(seeds), stacked)
    for i, seed in enumerate(seeds):
        for j, plan in enumerate(plans):
            row = jax.tree.map(lambda leaf, i=i, j=j: leaf[i, j], many)
            repaired = {'atol': 1e-5} if 'repaired' in kind else {}
            alone = single(kind)(jax.random.fold_in(KEY, seed), view_of(seed), plan)
            assert_same(row, alone, **repaired)


@pytest.mark.parametrize('kind', CASES)
def test_scan_equals_host_loop(kind):
    """Expectation: the same rounds, called from the host one by one."""
    counts = plan_of(kind, 0.3)
    scanned = single(kind)(KEY, view_of(0), counts)
    called = pruned(kind, KEY, view_of(0), counts, host_loop)
    assert_same(scanned, called, **({'atol': 1e-5} if 'repaired' in kind else {}))
    view, infos = jax.device_get(scanned)
    for path, mask in view.masks.items():
        assert not view.weights[path][~mask].any()
    what = UNITS.alive(view.masks) if kind.startswith('units') else view.masks
    for path, kept in what.items():
        assert infos.kept[path].shape == (len(next(iter(counts.values()))),)
        # The info of the last round is that of the final masks.
        assert infos.kept[path][-1] == kept.sum()


def test_round_i_draws_from_its_own_key():
    """Expectation: by hand, the best of `random()` with `fold_in(key, i)` among what is left."""
    counts = plan_of('with random numbers', 0.3)['*']
    view, infos = jax.device_get(single('with random numbers')(KEY, view_of(0), {'*': counts}))
    masks, score = view_of(0).masks, jax.jit(jp.random())
    for i, count in enumerate(counts):
        scores = jax.device_get(score(jax.random.fold_in(KEY, i), view_of(0), None))
        flat = np.concatenate([np.where(masks[p], scores[p], -np.inf).ravel() for p in SHAPES])
        least = np.sort(flat)[-count]
        masks = {path: np.asarray(masks[path] & (scores[path] >= least)) for path in SHAPES}
        assert sum(int(infos.kept[path][i]) for path in SHAPES) == count
    for path in SHAPES:
        np.testing.assert_array_equal(view.masks[path], masks[path])


def onlooker():
    """Prunes nothing; its info is the sum over the inputs it was given, and how many batches."""

    def update(key, state, view, counts, batches):
        x = batches.x
        return state, view.masks, PruneInfo({}, x.sum().astype(jnp.int32), jnp.int32(x.shape[0]))

    return Pruner(lambda key, view: (), update, frozenset({'data'}))


@pytest.mark.parametrize('loop', [jax.lax.scan, host_loop])
@pytest.mark.parametrize(
    ('rounds', 'sums', 'several'), [(1, [111], 3), (2, [1, 10], 1), (5, [1, 10, 100, 1, 10], 1)]
)
def test_which_batches_a_round_is_given(loop, rounds, sums, several):
    """Expectation: a single round all three; of several rounds each one, in turn."""
    x = jnp.array([1.0, 10.0, 100.0]).reshape(3, 1, 1)
    batches = Batch(x, jnp.zeros((3, 1), jnp.int32))
    counts = {'*': np.full(rounds, 100, np.int32)}
    _, infos = jp.prune_rounds(onlooker(), KEY, view_of(0), counts, batches, loop=loop)
    assert infos.nonfinite.tolist() == sums
    assert infos.nonzero.tolist() == [several] * rounds


@pytest.mark.parametrize('loop', [jax.lax.scan, host_loop])
def test_rounds_in_parts_are_the_rounds_at_once(loop):
    """Expectation: by hand, digits: 9 to begin with, the number and count of each round, 8 to end
    with; a part neither begins nor ends again."""

    def once(number, counts, carried):
        carried = 100 * carried + 10 * number + counts['*']
        return carried, PruneInfo({'*': carried}, jnp.int32(0), jnp.int32(1))

    rounds = Rounds(
        lambda carried: jnp.int32(9),
        once,
        lambda carried, active: (10 * carried + active, {'*': jnp.int32(7)}),
    )
    counts = np.array([3, 2, 1], np.int32)
    whole, infos = run_rounds(rounds, jnp.int32(0), {'*': counts}, active=8, loop=loop)
    assert whole == 9_03_12_21_8
    assert infos.kept['*'].tolist() == [9_03, 9_03_12, 7]
    part, _ = run_rounds(rounds, jnp.int32(0), {'*': counts[:1]}, finish=False, loop=loop)
    assert part == 9_03
    rest, _ = run_rounds(
        rounds, part, {'*': counts[1:]}, before=1, begin=False, active=8, loop=loop
    )
    assert rest == whole
