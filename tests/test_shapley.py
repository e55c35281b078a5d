"""Shapley values of units: by formulas, by all coalitions, and against TorchPruner's numbers.

`golden/structured/torchpruner_*` holds the networks, the orders and the values of
marcoancona/TorchPruner (65f6e3a), and brute force over all coalitions in float64.
"""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import more_but
from published import described, golden
from structured_nets import batch_norm, conv, dense, flatten, tree_of

from jaxprune import PruneError
from jaxprune.score.coalitions import exact_shapley, joined, leave_one_out
from jaxprune.score.removal_orders import ESTIMATORS, removal_orders
from jaxprune.score.settled import merged, settled, shapley_until_settled
from jaxprune.score.shapley import ShapleyValues, aggregated, shapley

KEY = jax.random.key(0)
#: Options of each estimator for 6 units; 'truncated' never ends before its time here.
OPTIONS = {
    'permutation': {},
    'antithetic': {},
    'stratified': {'strata': 6},
    'truncated': {'tolerance': 0.0},
}
UNBIASED = ('permutation', 'antithetic', 'stratified')


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def exact(loss, n, **options):
    return np.asarray(jax.jit(lambda: exact_shapley(loss, n, **options))())


def sampled(loss, n, key=KEY, **options):
    return jax.jit(lambda key: shapley(loss, n, key, **options))(key)


def along(loss, orders, **options):
    """The values from given orders."""
    n = np.shape(orders)[1]
    return jax.jit(lambda: shapley(loss, n, orders=np.asarray(orders), **options))()


def table_game(losses):
    """The game of a table `(2**n, examples)`; bit i of the row is unit i."""
    losses = np.asarray(losses)
    bits = 2 ** np.arange(int(math.log2(len(losses))))
    return lambda mask: jnp.asarray(losses)[mask @ bits]


@functools.cache
def random_game(n, examples=3):
    """A loss for each coalition, drawn independently: nothing about it is regular."""
    return table_game(np.random.default_rng(0).standard_normal((2**n, examples)))


@functools.cache
def saturating_game(n):
    """`exp(-Σ a)` over the units there, for two examples: every removal raises the loss."""
    weights = np.random.default_rng(1).uniform(0.2, 1, (n, 2))
    return lambda mask: jnp.exp(-(mask @ weights))


@functools.cache
def additive_game(n):
    weights = np.random.default_rng(2).standard_normal((n, 3))
    return weights, lambda mask: 7 - mask @ weights


def whole_and_empty(loss, n):
    """`loss(none) - loss(all)` of each example."""
    return jax.jit(lambda: loss(jnp.zeros(n, bool)) - loss(jnp.ones(n, bool)))()


# The definition.


@pytest.mark.parametrize(
    ('last', 'values', 'alone'),
    [
        ((1, 0.5, 0.5, 0), (0.375, 0.375, 1.75, 0), (0.125, 0.125, 1.25, 0)),
        ((1, 0.5, 0.5, -0.1), (0.425, 0.425, 2, -0.4), (0.225, 0.225, 1.75, -0.05)),
    ],
)
def test_max_network(last, values, alone):
    """Expectation: the authors' numbers (arXiv:2006.01795 and their tests); the mean over all 24
    orders is the definition. The second network's units alone by hand: it is off by 0.1 (x + y),
    so without unit 0 by 0.6 instead of 0.1 and 0.8 instead of 0.3, for half of the examples, which
    makes (0.35 + 0.55) / 4."""
    x = np.array([[0.0, 1], [1, 0], [1, 2], [2, 1]])
    hidden = np.maximum(x @ np.array([[-0.5, 1, 1, 1], [0.5, -1, 1, 1]]), 0)

    def loss(mask):
        return ((hidden * mask) @ np.array(last) - x.max(1)) ** 2

    found = exact(loss, 4)
    np.testing.assert_allclose(found.mean(1), values, atol=1e-15)
    every = along(loss, list(itertools.permutations(range(4))))
    np.testing.assert_allclose(every.mean, values, atol=1e-15)
    np.testing.assert_allclose(every.per_example, found, atol=1e-15)
    removed = jax.jit(lambda: leave_one_out(loss, 4, batch_size=3))()
    np.testing.assert_allclose(removed.mean(1), alone, atol=1e-15)
    if not last[3]:
        assert not found[3].any()
        assert not every.per_example[3].any()


def test_exact_values_are_the_sum_over_coalitions():
    """Expectation: the formula, term by term, with factorials; blocks of coalitions do not
    matter. The values of every example add up to the loss of the empty set less the full."""
    n, losses = 5, np.random.default_rng(3).standard_normal((32, 2))
    expected = np.zeros((n, 2))
    for unit, row in itertools.product(range(n), range(32)):
        if not row >> unit & 1:
            size = row.bit_count()
            weight = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
            expected[unit] += weight * (losses[row] - losses[row | 1 << unit])
    for batch_size in (1, 7, 100):
        found = exact(table_game(losses), n, batch_size=batch_size)
        np.testing.assert_allclose(found, expected, atol=1e-14)
    np.testing.assert_allclose(expected.sum(0), losses[0] - losses[31], atol=1e-14)


def test_sixteen_units_in_float32():
    """Expectation: equal credit for units that count the same, though the terms are 32,768 and
    their weights span four orders of magnitude; to 1e-6 of the loss, which is 5 or more."""

    def loss(mask):
        left = mask.sum().astype(jnp.float32)
        return 5 + jnp.exp(-jnp.array([0.1, 1], jnp.float32) * left)

    found = exact(loss, 16, batch_size=1024)
    assert found.dtype == np.float32
    expected = -np.expm1(-np.array([1.6, 16])) / 16
    np.testing.assert_allclose(found, np.tile(expected, (16, 1)), atol=1e-6)


def test_dummies_duplicates_and_additive_games():
    """Expectation: a unit that changes nothing gets 0, to the bit, from every method; two units
    that do the same are worth the same; in an additive game a unit is worth what it adds, which
    one order tells. Also for a game of one unit."""
    game = saturating_game(6)

    def loss(mask):  # unit 1 does nothing, units 2 and 4 are the same
        return game(mask.at[1].set(False).at[2].set(mask[2] | mask[4]).at[4].set(False))

    found = exact(loss, 6)
    assert not found[1].any()
    assert (found[[0, 2, 3, 4, 5]] > 0).all()
    np.testing.assert_allclose(found[2], found[4], atol=1e-16)
    for estimator, options in OPTIONS.items():
        values = sampled(loss, 6, permutations=12, estimator=estimator, **options)
        assert not values.per_example[1].any()
        assert values.std_error[1] == values.std[1] == 0
    weights, loss = additive_game(6)
    np.testing.assert_allclose(sampled(loss, 6, permutations=1).per_example, weights, atol=1e-14)
    np.testing.assert_allclose(exact(loss, 6), weights, atol=1e-14)
    np.testing.assert_allclose(jax.jit(lambda: leave_one_out(loss, 6))(), weights, atol=1e-14)
    assert exact(table_game([[3.0], [1.0]]), 1) == sampled(table_game([[3.0], [1.0]]), 1).mean == 2


# TorchPruner.


def tmlp(p, s, x, at):
    for i in (1, 2):
        x = at(f'fc{i}', dense(p[f'fc{i}'], x))
        x = at(f'relu{i}', jax.nn.relu(x))
    return dense(p['fc3'], x)


def tconv(p, s, x, at):
    for i in (1, 2):
        x = at(f'conv{i}', conv(p[f'conv{i}'], x, stride=i, pad=0))
        x = at(f'relu{i}', jax.nn.relu(batch_norm(p[f'bn{i}'], s[f'bn{i}'], x)))
    x = at('fc1', dense(p['fc1'], flatten(x)))
    return dense(p['fc2'], at('relu3', jax.nn.relu(x)))


@functools.cache
def torchpruner(name):
    """File; `(point, first, last) -> game` of the units of a module, for some of the examples."""
    file, meta = (
        golden(f'structured/torchpruner_{name}'),
        described(f'structured/torchpruner_{name}'),
    )
    network = {'mlp': tmlp, 'conv': tconv}[name]
    params, stats = tree_of(file, 'params/'), tree_of(file, 'batch_stats/')

    def batch_game(point, x, labels):
        def loss(mask):
            logits = network(params, stats, x, lambda at, z: z * mask if at == point else z)
            return -jax.nn.log_softmax(logits)[np.arange(len(labels)), labels]

        return loss

    def game(point):
        size = meta['batch_size']
        starts = range(0, len(file['x']), size)
        cut = [(file['x'][i : i + size], file['labels'][i : i + size]) for i in starts]
        return joined(batch_game(point, *batch) for batch in cut)

    return file, meta['evaluation_module'], game


MODULES = [
    ('mlp', 'fc1/self'),
    ('mlp', 'fc1/best'),
    ('mlp', 'fc2/self'),
    ('mlp', 'fc2/best'),
    ('conv', 'conv1/self'),
    ('conv', 'conv1/best'),
    ('conv', 'conv2/self'),
    ('conv', 'conv2/best'),
    ('conv', 'fc1/self'),
    ('conv', 'fc1/best'),
]
#: Both networks, both places, a convolution and what follows a flattened map.
FEW_MODULES = [
    ('mlp', 'fc1/self'),
    ('mlp', 'fc2/best'),
    ('conv', 'conv2/self'),
    ('conv', 'fc1/best'),
]


@pytest.mark.parametrize(('name', 'module'), more_but(FEW_MODULES, MODULES))
def test_torchpruner(name, module):
    """Expectation: the authors' values of every example along their orders, with and without
    their shortcut, to 1e-5 (float32, as the file says); brute force over all coalitions, from
    the file's table to rounding and from the network to 1e-5."""
    file, points, games = torchpruner(name)
    game = games(points[module])
    for way in ('full', 'partial'):
        orders = file[f'shapley_sampled/{module}/{way}/permutations']
        expected = file[f'shapley_sampled/{module}/{way}/none'].T
        values = along(game, orders, batch_size=4)
        np.testing.assert_allclose(values.per_example, expected, atol=1e-5)
        np.testing.assert_allclose(values.mean, expected.mean(1), atol=1e-5)
        both = aggregated(values, 'mean_plus_2std')
        np.testing.assert_allclose(both, expected.mean(1) + 2 * expected.std(1), atol=2e-5)
    expected, table = (file[f'shapley_exact/{module}/{key}'] for key in ('none', 'coalition_loss'))
    n = expected.shape[1]
    np.testing.assert_allclose(exact(table_game(table), n), expected.T, atol=1e-14)
    np.testing.assert_allclose(exact(game, n), expected.T, atol=1e-5)


# Estimators.


@pytest.mark.parametrize('estimator', ESTIMATORS)
def test_every_order_is_efficient(estimator):
    """Expectation: the credits of one order, and so of any number, add up to the loss of the empty
    set less that of the full one, for each example."""
    game = random_game(6)
    expected = whole_and_empty(game, 6)
    options = {'estimator': estimator, **OPTIONS[estimator]}
    values = sampled(game, 6, permutations=12, batch_size=5, **options)
    np.testing.assert_allclose(values.per_example.sum(0), expected, atol=1e-13)
    np.testing.assert_allclose(values.mean, values.per_example.mean(1), atol=1e-13)
    np.testing.assert_allclose(values.std, values.per_example.std(1), atol=1e-13)
    orders = removal_orders(KEY, 6, 12, estimator=estimator, strata=options.get('strata'))
    alone = jax.jit(jax.vmap(lambda order: shapley(game, 6, orders=order[None]).per_example))
    single = alone(orders)
    np.testing.assert_allclose(single.sum(1), np.tile(expected, (12, 1)), atol=1e-13)
    np.testing.assert_allclose(single.mean(0), values.per_example, atol=1e-13)


@functools.cache
def many(estimator, game, n=6, permutations=24, keys=200, **options):
    """Means and standard errors of many seeds, `(keys, n)`."""

    def one(key):
        found = shapley(game, n, key, permutations=permutations, estimator=estimator, **options)
        return found.mean, found.std_error

    return jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(jax.random.split(KEY, keys)))


@pytest.mark.parametrize(
    ('estimator', 'strata'),
    [('permutation', None), ('antithetic', None), ('stratified', 6), ('stratified', 4)]
    + [pytest.param('stratified', s, marks=pytest.mark.slow) for s in (3, 1)],
)
@pytest.mark.parametrize('game', [random_game(6), saturating_game(6)], ids=['random', 'monotone'])
def test_unbiased_with_calibrated_errors(estimator, strata, game):
    """Expectation: over 200 seeds, means within four standard errors of the exact values (chance
    of a miss 4e-4), and a spread within 20 % of the root mean square of the errors."""
    mean, error = many(estimator, game, strata=strata)
    spread = mean.std(0, ddof=1)
    z = (mean.mean(0) - exact(game, 6).mean(1)) / spread * np.sqrt(len(mean))
    assert np.abs(z).max() < 4
    np.testing.assert_allclose(np.sqrt((error**2).mean(0)), spread, rtol=0.2)


def test_which_estimator_varies_less():
    """Expectation: less variance than of as many independent orders, from pairs in a monotone
    game (each unit and all together), and from sweeps, where credit falls with those left."""
    game = saturating_game(6)
    plain, pairs, sweeps, short = (
        many(estimator, game, strata=strata)[0].var(0)
        for estimator, strata in zip((*UNBIASED, 'stratified'), (None, None, 6, 3), strict=True)
    )
    assert (pairs < plain).all()
    assert (sweeps < short).all()
    assert (short < plain).all()


def test_one_pair_is_exact_for_quadratic_games():
    """Expectation: the exact values. A unit's credit is linear in who is gone, and over an order
    and its reverse every other unit is gone once."""
    matrix = np.random.default_rng(4).standard_normal((7, 7))

    def loss(mask):
        left = mask.astype(float)
        return jnp.stack([left @ matrix @ left, left @ (matrix**2) @ left])

    values = sampled(loss, 7, permutations=2, estimator='antithetic')
    np.testing.assert_allclose(values.per_example, exact(loss, 7), atol=1e-13)


def test_one_sweep_is_exact_where_only_the_number_of_units_counts():
    """Expectation: the same for each unit, loss(none) - loss(all) over n, since each unit stands
    once at each position; one order of it is far off."""

    def loss(mask):
        return jnp.exp(-mask.sum()[None] / jnp.array([1.0, 3.0]))

    expected = np.tile(whole_and_empty(loss, 7) / 7, (7, 1))
    found = sampled(loss, 7, permutations=7, estimator='stratified')
    np.testing.assert_allclose(found.per_example, expected, atol=1e-14)
    assert np.abs(sampled(loss, 7, permutations=1).per_example - expected).max() > 0.1


def test_orders():
    """Expectation: rows are permutations. Of a sweep, each unit stands in each block of positions
    once; where blocks do not fill up, some are one place shorter. Of a pair, the second row is the
    first one reversed. More orders of a key go on where fewer end, and `skip` starts there."""

    @functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=('estimator', 'strata'))
    def orders(n, count, skip, **how):
        return removal_orders(KEY, n, count, skip=skip, **how)

    for estimator, n, strata in (
        ('permutation', 6, None),
        ('antithetic', 6, None),
        *(('stratified', n, strata) for n, strata in ((6, 6), (6, 3), (6, 1), (7, 3), (1, 1))),
    ):
        how = {'estimator': estimator, 'strata': strata}
        found = np.asarray(orders(n, 24, 0, **how))
        assert (np.sort(found, 1) == np.arange(n)).all()
        assert n == 1 or len(np.unique(found, axis=0)) > 12
        for skip in (0, 12):
            np.testing.assert_array_equal(orders(n, 12, skip, **how), found[skip : skip + 12])
        if estimator == 'antithetic':
            np.testing.assert_array_equal(found[::2, ::-1], found[1::2])
        if strata:
            positions = np.sort(np.argsort(found, 1).reshape(-1, strata, n), axis=1)
            width, block = -(-n // strata), np.arange(strata)
            shorter = width - (n % strata > 0)
            first = np.maximum(block * shorter, n - (strata - block) * width)
            end = np.minimum((block + 1) * width, n - (strata - 1 - block) * shorter)
            assert (positions >= first[:, None]).all()
            assert (positions < end[:, None]).all()


# Orders that end early.


def counting(loss):
    """The game, and a list that grows by one at each evaluation."""
    seen = []

    def counted(mask):
        jax.debug.callback(lambda _: seen.append(1), mask)  # once for each mask, also under vmap
        return loss(mask)

    return counted, seen


def cut_game(mask):
    """All that units do is done by the first three of the eight that go, whichever they are."""
    gone = 8 - mask.sum()
    return jnp.minimum(gone, 3) * jnp.array([1.0, 3.0])


def test_truncated_orders_stop():
    """Expectation: by hand. The loss reaches that of the empty set after three removals: four
    coalitions an order, as many as are counted by the game itself, and one for the empty set. With
    a tolerance of 2.5 for a mean loss of 2, 4, 6 it is one less, and the last third is nobody's;
    with one of 100 only the full set is looked at."""
    orders = np.stack([np.random.default_rng(i).permutation(8) for i in range(4)])
    for tolerance, steps in ((0.0, 3), (2.5, 2), (100.0, 0)):
        game, seen = counting(cut_game)
        options = {'estimator': 'truncated', 'tolerance': tolerance}
        values = along(game, orders, batch_size=1, **options)
        jax.block_until_ready(values)
        jax.effects_barrier()
        assert values.evaluations == len(seen) == 4 * (steps + 1) + 1
        early = np.argsort(orders, 1) < steps
        np.testing.assert_allclose(values.mean, 2 * early.mean(0))
        np.testing.assert_allclose(values.per_example.sum(0), np.array([1, 3]) * steps)
        together = along(cut_game, orders, batch_size=3, **options)
        np.testing.assert_allclose(together.per_example, values.per_example)
        assert together.evaluations == values.evaluations


def test_truncated_is_the_full_walk_where_nothing_is_within_tolerance():
    """Expectation: the values of 'permutation'; with a tolerance, means that add up to the loss
    of the empty set less the full one, up to that tolerance."""
    game = saturating_game(8)
    plain = sampled(game, 8, permutations=6)
    full = sampled(game, 8, permutations=6, estimator='truncated', tolerance=0.0)
    np.testing.assert_allclose(full.per_example, plain.per_example, atol=1e-15)
    np.testing.assert_allclose(full.std_error, plain.std_error, atol=1e-15)
    assert full.evaluations == 6 * 9 + 1
    short = sampled(game, 8, permutations=6, estimator='truncated', tolerance=0.6)
    assert short.evaluations < full.evaluations
    missing = plain.mean.sum() - short.mean.sum()
    assert 0 < missing <= 0.6


# Transformations, memory, several batches.


def test_evaluations():
    """Expectation: n + 1 coalitions for each order, counted by the game itself."""
    game, seen = counting(random_game(6))
    values = sampled(game, 6, permutations=5, batch_size=2)
    jax.block_until_ready(values)
    jax.effects_barrier()
    assert values.evaluations == len(seen) == 5 * 7
    assert (values.permutations, values.draws) == (5, 5)


@pytest.mark.parametrize('estimator', more_but(['stratified'], ESTIMATORS))
def test_batch_size_jit_and_vmap(estimator):
    """Expectation: the same numbers, up to rounding: for every batch size, without jit, with
    orders as an argument, and for several keys at once."""
    game = saturating_game(6)
    options = {'permutations': 12, 'estimator': estimator, **OPTIONS[estimator]}
    keys = jax.random.split(KEY, 3)
    together = jax.jit(jax.vmap(lambda key: shapley(game, 6, key, **options)))(keys)
    singles = [
        sampled(game, 6, key, batch_size=b, **options)
        for key, b in zip(keys, (1, 5, 99), strict=True)
    ]
    close(together, jax.tree.map(lambda *rows: np.stack(rows), *singles))
    close(shapley(game, 6, keys[0], **options), singles[0])
    orders = removal_orders(keys[0], 6, 12, estimator=estimator, strata=options.get('strata'))
    options.pop('permutations')
    close(jax.jit(lambda orders: shapley(game, 6, orders=orders, **options))(orders), singles[0])
    dropped = jax.eval_shape(
        lambda key: shapley(game, 6, key, permutations=12, per_example=False, **options), KEY
    )
    assert dropped.per_example is None


@pytest.mark.parametrize(
    'estimator', more_but(['stratified'], [e for e in ESTIMATORS if e != 'truncated'])
)
def test_unrolled_loops_give_the_same(estimator):
    """Expectation: the numbers of a loop inside of the program, for coalitions of any chunk."""
    game = saturating_game(6)
    options = {'permutations': 12, 'estimator': estimator, **OPTIONS[estimator]}
    loop = sampled(game, 6, **options)
    close(sampled(game, 6, loop='unrolled', batch_size=7, **options), loop)
    ways = {'loop': 'unrolled', 'batch_size': 5}
    for fn in (exact_shapley, leave_one_out):
        close(jax.jit(lambda f=fn: f(game, 6, **ways))(), jax.jit(lambda f=fn: f(game, 6))())
    with pytest.raises(PruneError, match="'truncated' decides as it goes"):
        shapley(game, 6, KEY, estimator='truncated', tolerance=0.1, loop='unrolled')


def close(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-14)


def test_memory_does_not_grow_with_orders():
    """Expectation: no array of the traced program is larger than the orders themselves or the
    credits of those walked at once, and none is n x n masks."""
    n, count, examples, at_once = 24, 96, 10, 3

    def loss(mask):
        return mask.sum() * jnp.ones(examples)

    for estimator in ('permutation', 'antithetic', 'truncated'):
        options = {'estimator': estimator, **OPTIONS[estimator]}
        traced = jax.make_jaxpr(
            lambda key, options=options: shapley(
                loss, n, key, permutations=count, batch_size=at_once, **options
            )
        )(KEY)
        shapes = re.findall(r'\b[a-z]+\d*\[([\d,]+)\]', str(traced))
        largest = max(math.prod(map(int, shape.split(','))) for shape in shapes)
        assert largest == max(count * n, at_once * n * examples) == count * n


def test_losses_of_other_types():
    """Expectation: a mask of truth values leaves the activations' type alone; half precision and
    whole numbers are counted in float32."""
    seen = []

    def loss(mask):
        seen.append(str((jnp.ones(3, jnp.bfloat16) * mask).dtype))
        return mask.sum()[None].astype(jnp.bfloat16)

    games = loss, lambda mask: mask.sum()[None].astype(int), lambda mask: mask[:1]
    for game, value in zip(games, (-3, -3, -1), strict=True):
        values = sampled(game, 3, permutations=2)
        assert values.mean.dtype == exact(game, 3).dtype == np.float32
        np.testing.assert_allclose(values.mean.sum(), value)
    assert set(seen) == {'bfloat16'}


def test_joined_batches():
    """Expectation: one game after the other, the same coalitions for all: per example the values
    of each game alone; means weigh every example once."""
    games = random_game(6), saturating_game(6)
    orders = np.stack([np.random.default_rng(i).permutation(6) for i in range(3)])
    values = along(joined(games), orders)
    alone = [along(game, orders).per_example for game in games]
    np.testing.assert_allclose(values.per_example, np.concatenate(alone, 1), atol=1e-15)
    np.testing.assert_allclose(values.mean, np.concatenate(alone, 1).mean(1), atol=1e-15)


@pytest.mark.optimised
def test_no_effect_is_no_credit_in_a_network():
    """Expectation: exactly 0 for the units that no weight reads, in float32 and as users compile,
    where two programs for one coalition differ by rounding; with blocks that do not divide."""
    draw = np.random.default_rng(0).standard_normal
    hidden = np.maximum(draw((50, 9)), 0).astype('float32')
    weights, last = draw((9, 40)).astype('float32'), draw((40, 10)).astype('float32')
    weights[:5] = 0
    labels = np.random.default_rng(1).integers(0, 10, 50)

    def loss(mask):
        logits = jax.nn.relu((hidden * mask) @ weights) @ last
        return -jax.nn.log_softmax(logits)[np.arange(50), labels]

    @jax.jit
    def values(key):
        how = {'permutations': 16, 'batch_size': 7}
        short = shapley(loss, 9, key, estimator='truncated', tolerance=0.1, **how)
        alone = leave_one_out(loss, 9, batch_size=7)
        every = exact_shapley(loss, 9, batch_size=7)
        return shapley(loss, 9, key, **how).per_example, short.per_example, alone, every

    for found in values(KEY):
        assert found.dtype == np.float32
        assert not found[:5].any()
        assert found[5:].any(1).all()


# Scores and cuts.


def values_of(mean, error, draws=10):
    mean, error = jnp.asarray(mean), jnp.asarray(error)
    return ShapleyValues(mean, error, error, None, draws, draws, draws)


def test_aggregated():
    """Expectation: by hand; 1, 5 and 3, 3 have the mean 3, and deviations of 2 and 0."""
    values = along(table_game([[8.0, 8], [7, 3], [5, 5], [4, 0]]), [[0, 1]])
    np.testing.assert_allclose(values.per_example, [[1, 5], [3, 3]])
    np.testing.assert_allclose(aggregated(values), [3, 3])
    np.testing.assert_allclose(aggregated(values, 'mean_plus_2std'), [7, 3])


def test_settled():
    """Expectation: by hand. The gap of 1 between 2 and 3 is settled at 95 % if it is more than
    1.96 times the root of 0.3² + 0.4² = 0.5, that is 0.98; not with 0.42 for 0.4. A unit far from
    the cut with a large error counts as well. NaN, ties and a single draw are not settled."""
    is_settled = jax.jit(settled, static_argnums=1, static_argnames='confidence')
    means = [3.0, 0.0, 2.0, 9.0]
    assert is_settled(values_of(means, [0.3, 0.1, 0.4, 0.1]), 2)
    assert not is_settled(values_of(means, [0.3, 0.1, 0.42, 0.1]), 2)
    assert not is_settled(values_of(means, [0.3, 0.1, 0.4, 0.1]), 2, confidence=0.99)
    assert not is_settled(values_of(means, [0.3, 5.0, 0.4, 0.1]), 2)
    assert is_settled(values_of(means, [9.0, 9.0, 9.0, 9.0]), 0)
    assert is_settled(values_of(means, [9.0, 9.0, 9.0, 9.0]), 4)
    assert not is_settled(values_of(means, [np.nan] * 4), 2)
    assert not is_settled(values_of([1.0, 1.0], [0.0, 0.0]), 1)
    assert is_settled(values_of([1.0, 2.0], [0.0, 0.0]), 1)


@pytest.mark.parametrize('estimator', more_but(['permutation', 'antithetic'], ESTIMATORS))
def test_merged_values_are_those_of_one_call(estimator):
    """Expectation: one call with all the orders; parts may be of any size, also a single draw,
    whose error is not known."""
    game = random_game(6)
    how = {'estimator': estimator, **OPTIONS[estimator]}
    orders = np.asarray(removal_orders(KEY, 6, 24, estimator=estimator, strata=how.get('strata')))
    together = {'permutation': 1, 'truncated': 1, 'antithetic': 2, 'stratified': 6}[estimator]
    first, middle = along(game, orders[:together], **how), along(game, orders[together:12], **how)
    assert np.isnan(first.std_error).all()
    last, expected = along(game, orders[12:], **how), along(game, orders, **how)
    merge = jax.jit(merged)
    for found in (merge(merge(first, middle), last), merge(first, merge(last, middle))):
        again = 2 if estimator == 'truncated' else 0  # the empty set, once for each part
        close(found, expected._replace(evaluations=expected.evaluations + again))


def test_until_settled():
    """Expectation: the mean and the error of the first orders of the key, in NumPy, and the first
    multiple of ten of them at which the cut is settled. It ends at `most` where two units are
    the same."""
    game = saturating_game(6)
    values = shapley_until_settled(game, 6, KEY, count=5, step=10, most=400)
    orders = jax.jit(lambda: removal_orders(KEY, 6, 400))()
    each = jax.jit(jax.vmap(lambda order: shapley(game, 6, orders=order[None]).mean))(orders)
    for used in range(10, 410, 10):
        mean = np.mean(each[:used], 0)
        error = np.std(each[:used], 0, ddof=1) / np.sqrt(used)
        low, high = np.split(np.argsort(mean), [5])
        pairs = itertools.product(low, high)
        if all(mean[k] - mean[r] > 1.95996 * np.hypot(error[k], error[r]) for r, k in pairs):
            break
    assert 10 < used < 400
    assert values.permutations == values.draws == used
    assert values.evaluations == used * 7
    np.testing.assert_allclose(values.mean, mean, atol=1e-14)
    np.testing.assert_allclose(values.std_error, error, atol=1e-14)
    np.testing.assert_allclose(values.per_example.mean(1), mean, atol=1e-14)
    assert set(low) == set(np.argsort(exact(game, 6).mean(1))[:5])

    def same(mask):
        return game(mask.at[0].set(mask[0] | mask[1]).at[1].set(False))

    how = {'estimator': 'antithetic', 'step': 4, 'most': 10, 'per_example': False}
    values = shapley_until_settled(same, 6, KEY, count=1, **how)
    assert (values.permutations, values.draws, values.per_example) == (10, 5, None)


# Errors.


def test_errors():
    """Expectation: one line that names the argument and says what is valid."""
    game = random_game(4)

    def refused(text, call, *args, **options):
        with pytest.raises(PruneError, match=text) as caught:
            call(*args, **options)
        assert '\n' not in str(caught.value)

    def refuses(text, **options):
        refused(text, shapley, game, 4, KEY, **options)

    refuses('permutations must be at least 1, not 0', permutations=0)
    refuses('permutations must be a whole number, not 2.5', permutations=2.5)
    refuses('batch_size must be at least 1, not 0', batch_size=0)
    refuses("unknown estimator 'antitetic': did you mean 'antithetic'?", estimator='antitetic')
    refuses('multiple of 2, not 5', estimator='antithetic')
    refuses('multiple of 4, not 5', estimator='stratified')
    refuses(
        'strata must be at most the number of units, 4, not 5', estimator='stratified', strata=5
    )
    refuses('strata must be at least 1', estimator='stratified', strata=0)
    refuses("strata belong to 'stratified', not to 'permutation'", strata=2)
    refuses("'truncated' needs a tolerance", estimator='truncated')
    refuses('tolerance must be at least 0, not -1', estimator='truncated', tolerance=-1)
    refuses('tolerance must be at least 0, not nan', estimator='truncated', tolerance=np.nan)
    refuses('tolerance must be a number', estimator='truncated', tolerance='1')
    refuses("tolerance belongs to 'truncated'", tolerance=0.1)
    refuses(
        r'orders\[1\] is no permutation of the units 0 to 3', orders=[[3, 1, 0, 2], [0, 1, 1, 3]]
    )
    refuses(r'whole numbers of shape \(m, 4\)', orders=[[0, 1, 2]])
    refuses(r'whole numbers of shape \(m, 4\)', orders=np.eye(4))
    refuses(r'whole numbers of shape \(m, 4\)', orders=np.zeros((0, 4), int))
    refuses('multiple of 2, not 1', orders=[[0, 1, 2, 3]], estimator='antithetic')
    refused('needs a key, or orders', shapley, game, 4)
    for call in (exact_shapley, leave_one_out):
        refused('n must be at least 1, not 0', call, game, 0)
        refused('batch_size must be at least 1', call, game, 4, batch_size=0)
    refused('n must be at least 1', shapley, game, 0, KEY)
    refused('at most 16 units, not 17', exact_shapley, lambda mask: mask[:1], 17)
    wrong = {
        'shape \\(\\), float64': lambda mask: mask.sum() * 1.0,
        'shape \\(2, 2\\)': lambda mask: jnp.ones((2, 2)),
        'shape \\(0,\\)': lambda mask: jnp.ones(0),
        'complex128': lambda mask: jnp.ones(2) * 1j,
        'not None': lambda mask: None,
    }
    for text, loss in wrong.items():
        for call in (exact_shapley, leave_one_out, lambda loss, n: shapley(loss, n, KEY)):
            refused(f'one real loss for each example.*{text}', call, loss, 4)
    refused('one real loss for each example', joined([wrong['not None']]), jnp.ones(4, bool))
    refused('no games', joined, [])
    values = values_of([1.0, 2.0], [0.1, 0.1])
    refused("unknown aggregation 'median'", aggregated, values, 'median')
    refused('count must lie between 0 and the 2 units, not 3', settled, values, 3)
    refused('count must be a whole number', settled, values, 0.5)
    refused('confidence must lie between 0 and 1, not 1', settled, values, 1, confidence=1)
    refused('needs per_example', merged, values, values)
    one = values._replace(per_example=np.ones((2, 3)))
    refused('are not of one game', merged, one, values._replace(per_example=np.ones((2, 4))))
    refused('one estimator', merged, one, one._replace(permutations=20))
    until = functools.partial(shapley_until_settled, game, 4, KEY)
    refused('count must lie between 0 and the 4 units, not 5', until, count=5)
    refused('step must be at least 1', until, count=1, step=0)
    refused('multiple of 2, not 5', until, count=1, step=5, estimator='antithetic')
    traced = jax.jit(lambda key: shapley_until_settled(game, 4, key, count=1))
    refused('outside of jit', traced, KEY)
    refused('losses that are NaN', shapley_until_settled, lambda m: m[:1] * np.nan, 4, KEY, count=1)
