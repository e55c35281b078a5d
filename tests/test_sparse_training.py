"""Methods that choose masks anew during training, against their authors' code and by hand.

Reference numbers: `rigl_tf_update` (google-research/rigl) and `jaxpruner_*`; see the README there.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from published import golden

from jaxprune import method, tree
from jaxprune.errors import JaxpruneError
from jaxprune.method.lasting import Asked, kept_groups
from jaxprune.method.regrow import drop_share, regrown
from jaxprune.optim import mask_opt_state
from jaxprune.schedule import alternate, cubic, ramp
from jaxprune.sweep import make_spec, plan_sweep
from jaxprune.types import Hyper, Problem, View

LAYERS = ('conv_0/kernel', 'conv_1/kernel', 'dense/kernel', 'head/kernel')


def leaves(case, kind):
    return {path: jnp.asarray(case[f'{kind}/{path}']) for path in LAYERS}


def masks_of(case, kind):
    return {path: leaf > 0 for path, leaf in leaves(case, kind).items()}


def asked_of(shapes, events=(0, 1), shared=False, gradient=None):
    return Asked(
        method.competing('weight', shapes), None, tuple(events), shared=shared, gradient=gradient
    )


def of_layers(shapes, name, events=(0, 1), gradient=None, **options):
    """A method on its own, by layer."""
    return method.get_pruner(
        Problem(None, None, None, None),
        name,
        allocation='uniform',
        shapes=shapes,
        events=events,
        gradient=gradient,
        **options,
    )


@pytest.mark.parametrize('drop', [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize('kind', ['rigl', 'set'])
def test_drop_and_grow_are_those_of_the_authors(kind, drop):
    """google-research/rigl: masks of an update; ties and counts included."""
    case = golden('rigl_tf_update')
    weights, old = leaves(case, 'params'), masks_of(case, 'in/mask')
    if f'out/{kind}/mask/drop{drop}/{LAYERS[0]}' not in case:
        pytest.skip('the reference has no such share')
    grow = leaves(case, 'grads') if kind == 'rigl' else leaves(case, 'in/random_grow_score')
    expected = masks_of(case, f'out/{kind}/mask/drop{drop}')
    for path in LAYERS:
        mask = np.asarray(old[path])
        ours = update_of(mask.shape)(
            np.abs(weights[path] * mask),
            np.abs(grow[path]) if kind == 'rigl' else np.asarray(grow[path]),
            mask,
            np.ones(mask.shape, bool),
            np.int32(mask.sum()),
            np.float32(drop),
        )
        np.testing.assert_array_equal(ours, expected[path], path)


def as_jaxpruner(sizes, grow, old, density, share, expected):
    """One layer of an update: its mask, if the number that stays is that of jaxpruner within one.

    jaxpruner rounds it in float32, `round(size density (1 - share))`, and keeps one at least; ours
    is `k - floor(share k)`. So the share is set to make as many leave.
    """
    kept = round(old.size * density)
    stays = max(round(old.size * density * (1 - share)), 1)
    every = np.ones(old.shape, bool)
    for number in (stays, stays - 1, stays + 1):
        if number > kept:
            continue
        leaving = np.float32((kept - number + 0.5 * (number < kept)) / kept)
        masks = update_of(old.shape)(sizes, grow, old, every, np.int32(kept), leaving)
        if (np.asarray(masks) == expected).all():
            return np.asarray(masks)
    raise AssertionError(f'not the mask of jaxpruner, whatever number stays: {stays}')


@functools.cache
def update_of(shape):
    @jax.jit
    def update(sizes, grow, old, may, kept, share):
        layer = [{'w': leaf} for leaf in (sizes, grow, old, may, kept)]
        stay, grown = regrown(asked_of({'w': shape}), *layer, share)
        return stay['w'] | grown['w']

    return update


def density_of(case, path):
    return 1 - float(case[f'meta/target_sparsity/{path}'])


@pytest.mark.parametrize(('kind', 'grow'), [('rigl', 'grads'), ('set', 'in/random_grow_score')])
def test_drop_and_grow_are_those_of_jaxpruner(kind, grow):
    case = golden('jaxpruner_rigl_set')
    for drop, path in itertools.product((0.0, 0.1, 0.3, 0.5), LAYERS):
        scores = case[f'{grow}/{path}']
        expected = case[f'out/{kind}_update/drop{drop}/{path}'] > 0
        as_jaxpruner(
            np.abs(case[f'params/{path}']),
            np.abs(scores) if kind == 'rigl' else scores,
            case[f'in/mask/{path}'] > 0,
            density_of(case, path),
            drop,
            expected,
        )


def test_the_share_falls_like_a_cosine():
    """jaxpruner: optax's cosine decay to the end of the updates."""
    case = golden('jaxpruner_rigl_set')
    expected = case['out/cosine_drop_fraction']
    ours = [float(drop_share(0.3, min(t, 6), 6)) for t in range(len(expected))]
    np.testing.assert_allclose(ours, expected, atol=1e-7)


def test_the_share_is_exact_in_the_middle():
    """By hand: half of 0.3; of 100 weights 15 go."""
    share = drop_share(0.3, 50, 100)
    assert share == jnp.float32(0.3) / 2 and jnp.floor(jnp.float32(100) * share) == 15
    assert drop_share(0.3, 0, 100) == jnp.float32(0.3) and drop_share(0.3, 100, 100) == 0


def test_cubic_and_linear_schedules():
    """Zhu & Gupta's formula at five equal times; jaxpruner's polynomial of power 3."""
    np.testing.assert_allclose(
        [1 - d for d in cubic(0.1, 5)], [0, 0.5203125, 0.7875, 0.8859375, 0.9], atol=1e-12
    )
    np.testing.assert_allclose(ramp(0.2, 5), [1, 0.8, 0.6, 0.4, 0.2], atol=1e-12)
    assert alternate(0.2, 4) == [1.0, 0.2, 1.0, 0.2] and alternate(0.2, 1) == [0.2]
    case = golden('jaxpruner_schedules_erk')
    for number in range(4):
        _, start, end, power, target = case[f'poly{number}/config_freq_start_end_power_target']
        if power != 3 or end <= start:
            continue
        # Its progress at step t is (t + 1 - start) / (end - start), so rounds begin at start - 1.
        by_step = dict(
            zip(case[f'poly{number}/steps'], case[f'poly{number}/sparsity'], strict=True)
        )
        ours = cubic(1 - target, int(end - start) + 1)
        for i, density in enumerate(ours):
            if (step := start - 1 + i) in by_step:
                assert by_step[step] == pytest.approx(1 - density, abs=1e-6)


def test_the_loop_of_rigl_is_that_of_jaxpruner():
    """Seven steps of SGD with momentum on stored gradients: masks, weights, momentum of kept ones.

    Masks change in steps 2, 4 and 6, and in these the optimizer takes no step.
    """
    case = golden('jaxpruner_rigl_set')
    rate, momentum, every, start, end, drop, steps = case['meta/loop']
    masks = masks_of(case, 'in/mask')
    params = tree.apply_masks(leaves(case, 'params'), masks)
    tx = optax.sgd(float(rate), momentum=float(momentum))
    opt = tx.init(params)

    @jax.jit
    def stepped(grads, opt, params, masks):
        updates, opt = tx.update(tree.apply_masks(grads, masks), opt, params)
        return optax.apply_updates(params, updates), opt

    for step in range(int(steps)):
        grads = {path: case[f'in/gseq/{step}/{path}'] for path in LAYERS}
        expected = {path: case[f'out/loop/mask/{step}/{path}'] > 0 for path in LAYERS}
        if step % every == 0 and start <= step <= end:
            share = drop  # constant here
            masks = {
                path: as_jaxpruner(
                    np.abs(params[path]),
                    np.abs(grads[path]),
                    np.asarray(masks[path]),
                    density_of(case, path),
                    share,
                    expected[path],
                )
                for path in LAYERS
            }
            opt = mask_opt_state(tx, opt, params, masks)
        else:
            params, opt = stepped(grads, opt, params, masks)
        params = tree.apply_masks(params, masks)
        for path in LAYERS:
            np.testing.assert_array_equal(masks[path], expected[path])
            np.testing.assert_allclose(
                params[path], case[f'out/loop/params/{step}/{path}'], atol=1e-6
            )
            trace = dict(tree.paths(opt[0].trace))[path]
            kept = np.where(masks[path], case[f'out/loop/trace/{step}/{path}'], 0)
            np.testing.assert_allclose(np.where(masks[path], trace, 0), kept, atol=1e-6)


def one_layer(weights, masks, name, events=(0, 4, 8), **options):
    """A pruner for one layer, and its view."""
    shapes = {'w': weights.shape}

    def gradient(key, view, batches):
        return {'w': jax.random.normal(key, weights.shape)}

    groups = method.competing(options.pop('granularity', 'weight'), shapes)
    pruner = of_layers(shapes, name, events, gradient, groups=groups, **options)
    seen = jnp.where(masks, weights, 0)
    stored = {'w': weights} if pruner.dense else None
    view = View({'w': seen}, {'w': weights}, {}, {'w': masks}, stored=stored)
    return pruner, view


def test_hundred_updates_keep_exact_counts():
    """RigL and SET, with weights that change at random in between: the count is exact each time,
    new weights are zero, and weights that stay keep their values."""
    for name in ('rigl', 'set'):
        key = jax.random.key(0)
        weights = jax.random.normal(key, (40, 25))
        events = tuple(range(0, 1010, 10))
        pruner, view = one_layer(weights, jnp.ones(weights.shape, bool), name, events)
        counts = {'w': jnp.int32(137)}
        update = jax.jit(lambda *args, p=pruner: p.update(*args, None))
        state = pruner.init(key, view)
        moved = 0
        for number in range(len(events)):
            draw = jax.random.fold_in(key, number)
            before = view.masks['w']
            state, masks, info = update(draw, state, view, counts)
            assert int(masks['w'].sum()) == 137 == int(info.kept['w'])
            kept = jnp.where(masks['w'], view.weights['w'], 0)
            assert not np.any(kept[~before])  # what is new is zero
            moved += int((masks['w'] & ~before).sum()) if number else 0
            noise = jnp.where(masks['w'], 0.1 * jax.random.normal(draw, weights.shape), 0)
            view = view._replace(weights={'w': kept + noise}, masks=masks)
        assert moved > 500


@pytest.mark.parametrize(('fewest', 'most'), [(None, 60), (40, None), (10, None), (30, 70)])
def test_one_ranking_keeps_floors_and_caps(fewest, most):
    """RigL over two layers of 100 weights that want all of them: 100 in all, bounds in each, and
    without bounds in the way the gradients decide."""
    keys = jax.random.split(jax.random.key(3), 4)
    paths = ('a', 'b')
    sizes = {p: jax.random.uniform(keys[i], (100,)) + (p == 'a') for i, p in enumerate(paths)}
    grow = {p: jax.random.uniform(keys[2 + i], (100,)) + (p == 'b') for i, p in enumerate(paths)}
    shapes = dict.fromkeys(paths, (100,))
    asked = asked_of(shapes, shared=True)._replace(
        fewest=fewest and dict.fromkeys(paths, fewest), most=most and dict.fromkeys(paths, most)
    )
    every = {p: jnp.ones(100, bool) for p in paths}
    kept = {'a': jnp.arange(100) < 60, 'b': jnp.arange(100) < 40}
    update = jax.jit(lambda kept: regrown(asked, sizes, grow, kept, every, {'*': 100}, 0.5))
    for _ in range(3):
        stay, grown = update(kept)
        kept = {p: stay[p] | grown[p] for p in paths}
        counts = {p: int(mask.sum()) for p, mask in kept.items()}
        assert sum(counts.values()) == 100
        assert all((fewest or 0) <= k <= (most or 100) for k in counts.values()), counts
        if most is None:  # all 50 that leave are the smallest, and b has the larger gradients
            assert counts['b'] >= 50


def test_caps_hold_for_units():
    """GMP over two layers of units, of which the first has all large weights: the cap bounds it."""
    groups = method.competing('weight', {'a': (50,), 'b': (50,)})._replace(own={'a': None})
    asked = Asked(groups, None, (0, 1), most={'a': 15, 'b': 50})
    scores = {'a': jnp.arange(100.0, 150.0), 'b': jnp.arange(50.0)}
    kept = kept_groups(asked, scores, {'*': 40})
    assert {p: int(m.sum()) for p, m in kept.items()} == {'a': 15, 'b': 25}


def test_the_first_round_of_movement_keeps_all():
    """There is nothing to go by yet, whatever the count says."""
    weights = jnp.ones((4, 5))
    pruner, view = one_layer(weights, jnp.ones((4, 5), bool), 'movement')
    state = pruner.init(jax.random.key(0), view)
    _, masks, info = pruner.update(jax.random.key(0), state, view, {'w': jnp.int32(10)}, None)
    assert masks['w'].all() and int(info.nonzero) == 1
    assert int(info.kept['w']) == 10  # as planned


def test_dpf_follows_the_gradient_of_the_masked_network():
    """`f(w) = ½‖w - a‖²`: the gradient at m w is m w - a, for all weights; GMP moves only kept
    ones, SR-STE pulls pruned ones; a pruned weight that has grown comes back with its value."""
    weights, a = jnp.array([3.0, -2.0, 1.0, 0.5]), jnp.array([3.0, -2.0, 1.0, -7.0])
    masks = jnp.array([True, True, False, False])

    def gradient_of(name, **options):
        pruner, view = one_layer(weights, masks, name, **options)

        def loss(params):
            seen = pruner.hook.weights((), params, {'w': masks}, 0)['w']
            return 0.5 * ((seen - a) ** 2).sum(), seen

        grads, seen = jax.grad(loss, has_aux=True)({'w': weights})
        np.testing.assert_array_equal(seen, jnp.where(masks, weights, 0))
        if pruner.hook.gradient is not None:
            _, grads = pruner.hook.gradient((), grads, {'w': weights}, {'w': masks}, 0, None)
        return pruner, view, grads['w']

    seen = jnp.where(masks, weights, 0)
    pruner, view, grads = gradient_of('dpf')
    np.testing.assert_allclose(grads, seen - a)
    np.testing.assert_allclose(gradient_of('straight')[2], seen - a)
    np.testing.assert_allclose(
        gradient_of('sr_ste', pull=0.5)[2], seen - a + 0.5 * jnp.where(masks, 0, weights)
    )
    gmp, _, grads = gradient_of('gmp')
    np.testing.assert_allclose(grads, jnp.where(masks, seen - a, 0))
    assert gmp.hook.moves((), {'w': masks})['w'] is masks
    # Three steps of 0.5 bring the last weight to 0.5 - 3 * 3.5 = -10: it returns.
    moved = weights
    for _ in range(3):
        moved = moved - 0.5 * (jnp.where(masks, moved, 0) - a)
    state = pruner.init(jax.random.key(0), view._replace(masks={'w': jnp.ones(4, bool)}))
    grown = view._replace(
        weights={'w': jnp.where(masks, moved, 0)}, stored={'w': moved}, params={'w': moved}
    )
    _, new, _ = pruner.update(jax.random.key(0), state, grown, {'w': jnp.int32(2)}, None)
    np.testing.assert_array_equal(new['w'], [True, False, False, True])
    assert moved[3] == -10.0


def test_random_masks_are_drawn_anew():
    weights = jnp.arange(1.0, 101.0)
    pruner, view = one_layer(weights, jnp.ones(100, bool), 'straight', by='random')
    state, drawn = pruner.init(jax.random.key(0), view), []
    for number in range(3):
        draw = jax.random.fold_in(jax.random.key(0), number)
        state, masks, _ = pruner.update(draw, state, view, {'w': jnp.int32(30)}, None)
        drawn.append(np.asarray(masks['w']))
    assert all(m.sum() == 30 for m in drawn)
    assert all((a != b).any() for a, b in itertools.pairwise(drawn))


def test_acdc_opens_and_closes():
    """All weights, then the largest again; those that came back are zero until they train."""
    weights = jnp.array([0.1, 4.0, -3.0, 0.2])
    pruner, view = one_layer(weights, jnp.array([False, True, True, False]), 'acdc')
    view = view._replace(masks={'w': jnp.ones(4, bool)})
    state = pruner.init(jax.random.key(0), view)
    view = view._replace(masks={'w': jnp.array([False, True, True, False])})
    state, masks, _ = pruner.update(jax.random.key(0), state, view, {'w': jnp.int32(4)}, None)
    assert masks['w'].all()
    np.testing.assert_allclose(pruner.regrown_values(state, view)['w'], [0, 4, -3, 0])
    _, masks, _ = pruner.update(jax.random.key(0), state, view, {'w': jnp.int32(1)}, None)
    np.testing.assert_array_equal(masks['w'], [False, True, False, False])


def test_the_usual_allocation_fits_what_is_pruned():
    """RigL is published with ERK, which shares out weights; blocks get the same share by layer."""
    for granularity, allocation in (('weight', 'erk'), ('8x8', 'uniform'), ('kernel', 'uniform')):
        entry = {'name': 'rigl', 'every': 1, 'end': 2, 'granularity': granularity}
        table = {
            'name': 'usual',
            'model': {'name': 'mlp', 'widths': [8]},
            'data': {'name': 'mnist_small', 'train_examples': 100},
            'train': {'epochs': 3, 'batch_size': 50},
            'grid': {'method': [entry], 'density': [0.5], 'seed': [0]},
        }
        [made] = make_spec(table).grid.method
        assert made.allocation == allocation and allocation not in made.label.lower()


def test_what_these_methods_do_not_go_with(tmp_path):
    """Each mistake is one line that begins with the key."""
    for keys, says in (
        ({'granularity': '2:4'}, "'rigl' prunes weights, kernels or blocks, not 2:4"),
        ({'target': 'effective'}, "target: 'effective' does not go with 'rigl'"),
        ({'allocation': 'lamp'}, "allocation: 'lamp' goes by the weights left, and 'rigl' brings"),
        ({'name': 'snip', 'density_schedule': 'alternate'}, 'density_schedule: .* never brings'),
        (
            {'name': 'str', 'density_schedule': 'cubic'},
            "density_schedule: 'str' prunes in one round only",
        ),
        ({'every': 0, 'end': 0}, 'acts between its first round and its last'),
    ):
        entry = {'name': 'rigl', 'every': 1, 'end': 2, **keys}
        table = {
            'name': 'wrong',
            'model': {'name': 'mlp', 'widths': [8]},
            'data': {'name': 'mnist_small', 'train_examples': 100},
            'train': {'epochs': 3, 'batch_size': 50},
            'grid': {'method': [entry], 'density': [0.5], 'seed': [0]},
        }
        with pytest.raises(JaxpruneError, match=says):
            plan_sweep(make_spec(table), tmp_path / 'out')


def moved_by(name, steps, rate, weights, target, masks, **options):
    """Gradient descent on `½‖w - target‖²` with a movement hook: `(weights, state)`."""
    pruner, view = one_layer(weights, jnp.ones(weights.shape, bool), name, **options)
    state = pruner.init(jax.random.key(0), view)

    @jax.jit
    def step(clock, state, w):
        def loss(params):
            seen = pruner.hook.weights(state, params, {'w': masks}, clock)['w']
            return 0.5 * ((seen - target) ** 2).sum()

        grads = jax.grad(loss)({'w': w})
        state, grads = pruner.hook.gradient(state, grads, {'w': w}, {'w': masks}, clock, None)
        return state, w - rate * grads['w']

    for clock in range(steps):
        state, weights = step(clock, state, weights)
    return weights, state, pruner, view


def test_movement_is_the_growth_of_squares():
    """Derived: with equal small rates and nothing pruned, S = ½ (w² - w0²). With a mask, pruned
    weights stand still and their scores still move."""
    with jax.enable_x64(True):
        start = jnp.array([1.0, -2.0, 0.5, 3.0])
        target = jnp.array([2.0, -0.5, -1.0, 3.0])
        sgd = {'score_optimizer': 'sgd', 'score_rate': 1e-4}
        every = jnp.ones(4, bool)
        w, state, _, _ = moved_by('movement', 5000, 1e-4, start, target, every, **sgd)
        np.testing.assert_allclose(state.own.scores['w'], 0.5 * (w**2 - start**2), atol=2e-4)
        some = jnp.array([True, False, True, True])
        w, state, pruner, view = moved_by('movement', 10, 1e-4, start, target, some, **sgd)
        assert w[1] == start[1]
        # The slope at w' = 0 is -target = 0.5 at a weight of -2: S = -10 α 0.5 (-2).
        np.testing.assert_allclose(state.own.scores['w'][1], 10 * 1e-4, rtol=1e-12)
        later = state._replace(round=state.round + 1)
        _, masks, _ = pruner.update(jax.random.key(0), later, view, {'w': jnp.int32(2)}, None)
        assert int(masks['w'].sum()) == 2


def test_soft_movement_cuts_at_its_threshold():
    """By hand: Adam's first steps have the size of the rate, so scores whose slope keeps its sign
    are ±0.1 after 10 steps; sigmoid(-0.1) = 0.475 lies below a threshold of 0.49."""
    start, target = jnp.array([1.0, 1.0, -1.0]), jnp.array([2.0, 0.0, -3.0])
    options = {'threshold': 0.49, 'penalty': 1e-6}
    every = jnp.ones(3, bool)
    _, state, pruner, view = moved_by(
        'soft_movement',
        10,
        1e-3,
        start,
        target,
        every,
        events=(0, 100),
        cut='zero',
        **options,
    )
    # Before its first round the threshold is 0, and all weights have gradients.
    np.testing.assert_allclose(state.own.scores['w'], [0.1, -0.1, 0.1], rtol=1e-2)
    state, masks, _ = pruner.update(jax.random.key(0), state, view, {'w': jnp.int32(1)}, None)
    assert masks['w'].all() and state.prunes
    seen = pruner.hook.weights(state, {'w': start}, {'w': every}, 100)
    np.testing.assert_array_equal(seen['w'], [1, 0, -1])
    view = view._replace(weights=seen)
    _, masks, info = pruner.update(jax.random.key(0), state, view, {'w': jnp.int32(1)}, None)
    np.testing.assert_array_equal(masks['w'], [True, False, True])
    assert int(info.kept['w']) == 2


@pytest.mark.parametrize('optimizer', ['sgd', 'adam'])
@pytest.mark.parametrize('name', ['movement', 'soft_movement'])
def test_a_block_has_one_score(name, optimizer):
    """Lagunas et al.: the slope of S_b is the sum of g w over the block; NumPy, float64. Soft
    movement leaves out whole blocks, and its penalty is a mean over blocks."""
    with jax.enable_x64(True):
        start = jax.random.normal(jax.random.key(1), (4, 6), jnp.float64)
        target = start * jnp.where(jnp.arange(6) < 3, 3.0, 0.0)  # on the left weights grow
        every, events = jnp.ones((4, 6), bool), (0, 40)
        options = {'score_optimizer': optimizer, 'score_rate': 0.05, 'granularity': '2x3'}
        soft = name == 'soft_movement'
        options |= {'penalty': 2.0, 'threshold': 0.5} if soft else {}
        _, state, pruner, _ = moved_by(
            name, 30, 0.01, start, target, every, events=events, **options
        )

        w, scores, first, second = np.array(start), np.zeros((2, 2)), 0.0, 0.0
        blocks = lambda leaf: leaf.reshape(2, 2, 2, 3)  # noqa: E731
        for t in range(1, 31):
            slope = blocks((w - target) * w).sum(axis=(1, 3))
            share = 1 / (1 + np.exp(-scores))
            slope = slope + (2.0 / 4 * share * (1 - share) if soft else 0)
            first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
            step = (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
            scores = scores - 0.05 * (slope if optimizer == 'sgd' else step)
            w = w - 0.01 * (w - target)
        np.testing.assert_allclose(state.own.scores['w'], scores, rtol=1e-9)
        if soft:
            state = state._replace(prunes=jnp.ones((), bool))
            seen = pruner.hook.weights(state, {'w': every.astype(float)}, {'w': every}, 40)['w']
            expected = np.kron(scores > 0, np.ones((2, 3)))
            np.testing.assert_array_equal(seen, expected)
            assert expected.sum() == 12


def test_soft_movement_never_empties_a_layer():
    """The authors' code keeps int(0.005 n) + 1 of a layer at least, its best: 2 of 300."""
    weights, every = jnp.ones(300), jnp.ones(300, bool)
    pruner, view = one_layer(weights, every, 'soft_movement', (0, 10), threshold=0.9)
    state = pruner.init(jax.random.key(0), view)
    scores = jax.random.normal(jax.random.key(0), (300,))  # sigmoid below 0.9 but for a few
    state = state._replace(prunes=jnp.ones((), bool))

    def seen(scores):
        now = state._replace(own=state.own._replace(scores={'w': scores}))
        return pruner.hook.weights(now, {'w': weights}, {'w': every}, 10)['w']

    shifts = jnp.array([0.0, -5.0, 5.0])
    one, none, many = jax.vmap(lambda shift: seen(scores + shift))(shifts)
    soft = jax.nn.sigmoid(scores) > 0.9
    assert soft.sum() >= 2 and many.sum() > 250
    np.testing.assert_array_equal(one, soft)
    np.testing.assert_array_equal(np.flatnonzero(none), np.sort(np.argsort(scores)[-2:]))


def test_what_was_pruned_before_is_not_the_best_of_a_layer():
    """Half of a layer is pruned before soft movement begins, with the best scores: the floor of the
    step, and the one weight that the published cut keeps at least, are of the other half."""
    scores, alive = jnp.arange(10.0) - 20, jnp.arange(10) < 5
    given = {'threshold': 0.9, 'cut': 'zero'}
    pruner, view = one_layer(jnp.ones(10), alive, 'soft_movement', (0, 10), **given)
    state = pruner.init(jax.random.key(0), view)
    own = state.own._replace(scores={'w': scores})
    state = state._replace(own=own, prunes=jnp.ones((), bool), round=jnp.int32(1))
    seen = pruner.hook.weights(state, {'w': jnp.ones(10)}, view.masks, 10)
    np.testing.assert_array_equal(np.flatnonzero(seen['w']), [4])
    none = view._replace(weights={'w': jnp.zeros(10)})
    _, masks, _ = pruner.update(jax.random.key(0), state, none, {'w': jnp.int32(2)}, None)
    np.testing.assert_array_equal(np.flatnonzero(masks['w']), [4])


def test_thresholds_are_trained_with_the_weights():
    """By hand: w' = sign(w) max(|w| - t, 0), t = sigmoid(s); the slope by s is that of the loss
    through w', by differences; weight decay acts on s, momentum too; the published cut."""
    weights, target = jnp.array([1.0, -2.0, 0.1, 0.9]), jnp.array([2.0, -1.0, 3.0, 0.0])
    every = jnp.ones(4, bool)
    pruner, view = one_layer(weights, every, 'str', (0, 10), initial=-1.0, cut='zero')
    state = pruner.init(jax.random.key(0), view)
    state, masks, _ = pruner.update(jax.random.key(0), state, view, {'w': jnp.int32(2)}, None)
    assert masks['w'].all()
    t = 1 / (1 + np.e)

    def loss(w, s):
        own = state.own._replace(numbers={'w': s})
        seen = pruner.hook.weights(state._replace(own=own), {'w': w}, {'w': every}, 0)['w']
        return 0.5 * ((seen - target) ** 2).sum(), seen

    (_, seen), grads = jax.value_and_grad(loss, has_aux=True)(weights, jnp.float32(-1))
    np.testing.assert_allclose(seen, [1 - t, -2 + t, 0, 0.9 - t], rtol=1e-6)
    np.testing.assert_allclose(grads, [1 - t - 2, -2 + t + 1, 0, 0.9 - t], rtol=1e-5)
    by_s = jax.grad(lambda s: loss(weights, s)[0])(jnp.float32(-1))
    hyper = Hyper(0.1, 0.5, {'momentum': 0.9})
    speed, s = 0.0, -1.0
    for _ in range(2):
        state, same = pruner.hook.gradient(
            state, {'w': grads}, {'w': weights}, {'w': every}, 0, hyper
        )
        np.testing.assert_array_equal(same['w'], grads)
        slope = float(by_s) * (1 / (1 + np.exp(-s))) * (1 - 1 / (1 + np.exp(-s))) / (t * (1 - t))
        speed = 0.9 * speed + slope + 0.5 * s
        s -= 0.1 * speed
        np.testing.assert_allclose(float(state.own.numbers['w']), s, rtol=1e-5)
    view = view._replace(weights={'w': seen})
    _, masks, info = pruner.update(jax.random.key(0), state, view, {'w': jnp.int32(2)}, None)
    np.testing.assert_array_equal(masks['w'], [True, True, False, True])
    assert int(info.kept['w']) == 3
