"""What must hold of scores, problems and masked optimizers, whatever the numbers are.

The identities are exact in exact arithmetic, so they are tested in float64 to 1e-9 of the largest
term; each is derived in its docstring.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import KINDS, more_unless

import jaxprune as jp
from jaxprune.errors import JaxpruneError, PruneError
from jaxprune.optim import (
    RATE_SCHEDULES,
    arguments,
    decays,
    mask_opt_state,
    optimizer,
    rate_schedule,
    sparse,
)
from jaxprune.train import train_step
from jaxprune.types import Hyper, RunState

TOLERANCE = 1e-9
KEY = jax.random.key(7)


@pytest.fixture
def double_precision():
    with jax.enable_x64(True):
        yield


double = pytest.mark.usefixtures('double_precision')


class Bare(nn.Module):
    """A bias-free ReLU network without normalisation."""

    conv: bool = False

    @nn.compact
    def __call__(self, x):
        if self.conv:
            x = nn.relu(nn.Conv(4, (3, 3), use_bias=False, name='a_conv')(x))
            x = nn.avg_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate((9, 8)):
            x = nn.relu(nn.Dense(width, use_bias=False, name=f'b_dense_{i}')(x))
        return nn.Dense(3, use_bias=False, name='c_last')(x)


class Normed(nn.Module):
    """Filters before a batch norm without epsilon: in train mode their scale has no effect."""

    @nn.compact
    def __call__(self, x, train: bool):
        def norm(name):
            return nn.BatchNorm(
                use_running_average=not train, epsilon=0.0, use_fast_variance=False, name=name
            )

        x = nn.relu(norm('bn_0')(nn.Conv(4, (3, 3), use_bias=False, name='conv')(x)))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(norm('bn_1')(nn.Dense(9, use_bias=False, name='hidden')(x)))
        return nn.Dense(3, name='last')(x)


def setting(module: nn.Module, batches: int = 1):
    """Problem, view and data; weights and inputs in the precision in force."""
    return _setting(module, batches, jnp.zeros(()).dtype)


@functools.cache
def _setting(module, batches, dtype, size=8, shape=(6, 6, 2)):
    problem = jp.problem_from_flax(module, shape)

    @jax.jit
    def view():
        initial = jax.tree.map(lambda a: a.astype(dtype), problem.init(KEY))
        return jp.view(problem, *initial)

    draw = np.random.default_rng(1)
    x = jnp.asarray(draw.standard_normal((batches, size, *shape)), dtype)
    y = jnp.asarray(draw.integers(0, 3, (batches, size)))
    return problem, view(), jp.Batch(x, y)


@functools.cache
def _loss_gradient(problem, train):
    """`(weights, temperature, view, batches) -> gradients`; one program for all of them."""

    def loss(weights, temperature, view, batches):
        logits, _ = problem.apply(
            jp.put(view.params, weights), view.model_state, batches.x[0], train=train, key=None
        )
        labels = jax.nn.one_hot(batches.y[0], 3)
        return -(jax.nn.log_softmax(logits / temperature) * labels).sum(-1).mean()

    return jax.jit(jax.grad(loss))


def loss_gradient(problem, view, batches, *, train: bool, temperature: float = 1.0):
    """The gradient of the loss over one batch, written out anew."""
    gradient = _loss_gradient(problem, train)
    return jax.device_get(gradient(view.weights, temperature, view, batches))


@functools.cache
def grasp_at(problem, train: bool):
    """`(temperature, view, batches) -> scores`; traced, so one program serves both."""
    return jax.jit(
        lambda temperature, view, batches: jp.grasp(problem, train=train, temperature=temperature)(
            KEY, view, batches
        )
    )


def per_filter(leaf):
    return leaf.reshape(-1, leaf.shape[-1]).sum(0)


def assert_equal_to(value, expected, scale) -> None:
    assert np.abs(np.asarray(value) - np.asarray(expected)).max() <= TOLERANCE * float(scale)


# --- identities -------------------------------------------------------------------------------


@double
@pytest.mark.parametrize('temperature', [1.0, 200.0])
@pytest.mark.parametrize('conv', [False, True])
def test_grasp_layer_sums_without_norm(conv, temperature):
    """Expectation: sum of `w * Hg` over layer l is `|g|^2 - |g_l|^2 + c`, c the same for all l.

    Such a net is homogeneous of degree 1 in each layer, so `w_l . dL/dw_l` is one number for all
    layers; its derivative along g is `|g_l|^2 + w_l . (Hg)_l`, the same for all.
    """
    problem, view, batches = setting(Bare(conv))
    scores = jax.device_get(grasp_at(problem, False)(temperature, view, batches))
    g = loss_gradient(problem, view, batches, train=False, temperature=temperature)
    sums = np.array([scores[path].sum() + (g[path] ** 2).sum() for path in scores])
    assert len(sums) == 3 + conv
    assert_equal_to(sums, sums[0], max(abs(leaf).sum() for leaf in scores.values()))
    assert len({f'{float((g[path] ** 2).sum()):.3g}' for path in g}) == len(sums)  # not trivial


@double
@pytest.mark.parametrize('temperature', [1.0, 200.0])
def test_grasp_sums_of_scale_invariant_filters(temperature):
    """Expectation: for a filter p before batch norm in train mode, sum of `w * Hg` is `-|g_p|^2`.

    `w_p . dL/dw_p = 0` at every point; its derivative along g is `|g_p|^2 + w_p . (Hg)_p`.
    """
    problem, view, batches = setting(Normed())
    scores = jax.device_get(grasp_at(problem, True)(temperature, view, batches))
    g = loss_gradient(problem, view, batches, train=True, temperature=temperature)
    for path in ('conv/kernel', 'hidden/kernel'):
        expected = -per_filter(g[path] ** 2)
        assert (expected < 0).all()
        assert_equal_to(per_filter(scores[path]), expected, abs(scores[path]).sum())


@double
def test_snip_of_scale_invariant_filters():
    """Expectation: `w * g` sums to zero per filter, its entries do not vanish, and SNIP is its
    absolute value: a score that took the absolute value of sums would see nothing."""
    problem, view, batches = setting(Normed())
    scores = jax.device_get(jax.jit(jp.snip(problem, train=True))(KEY, view, batches))
    g = loss_gradient(problem, view, batches, train=True)
    for path in view.weights:
        signed = view.weights[path] * g[path]
        assert_equal_to(scores[path], abs(signed), abs(signed).max())
        if path != 'last/kernel':
            assert_equal_to(per_filter(signed), 0, abs(signed).max())
            assert (per_filter(scores[path]) > 0).all()


@double
@pytest.mark.parametrize('conv', [False, True])
def test_synflow_is_conserved(conv):
    """Expectation: in a bias-free net the scores of each layer sum to R, and for a hidden unit
    those going in to those going out (Tanaka et al., theorems 1 and 2)."""
    problem, view, batches = setting(Bare(conv))
    scores = jax.device_get(jax.jit(jp.synflow(problem))(KEY, view, batches))
    positive = jax.tree.map(jnp.abs, view.params)
    logits, _ = problem.apply(positive, {}, jnp.ones((1, 6, 6, 2)), train=False, key=None)
    for path, leaf in scores.items():
        assert (leaf >= 0).all()
        np.testing.assert_allclose(leaf.sum(), logits.sum(), rtol=TOLERANCE, err_msg=path)
    into, out = scores['b_dense_0/kernel'].sum(0), scores['b_dense_1/kernel'].sum(1)
    np.testing.assert_allclose(into, out, rtol=TOLERANCE)
    into, out = scores['b_dense_1/kernel'].sum(0), scores['c_last/kernel'].sum(1)
    np.testing.assert_allclose(into, out, rtol=TOLERANCE)


@double
def test_synflow_ranks_alike_when_a_layer_is_scaled():
    """Expectation: R is linear in each layer, so all scores scale alike, to whatever layer."""
    problem, view, batches = setting(Bare())
    score = jax.jit(jp.synflow(problem))
    before = jax.device_get(score(KEY, view, batches))
    frozen = {**view.params, 'b_dense_1': {'kernel': -3 * view.params['b_dense_1']['kernel']}}
    after = score(KEY, jp.view(problem, frozen), batches)
    for path in before:
        np.testing.assert_allclose(after[path], 3 * before[path], rtol=TOLERANCE)


@double
def test_synflow_looks_at_no_data():
    """Expectation: other values and labels, the same scores; only the shape of an input counts."""
    problem, view, batches = setting(Normed())
    score = jax.jit(jp.synflow(problem))
    other = jp.Batch(batches.x * jnp.nan, batches.y + 1)
    for path, leaf in score(KEY, view, batches).items():
        np.testing.assert_array_equal(leaf, score(KEY, view, other)[path])


SCORES = {
    'snip': jp.snip,
    'grasp': functools.partial(jp.grasp, temperature=1.0),
    'grasp at 200': jp.grasp,
}


@double
@pytest.mark.parametrize('name', SCORES)
def test_batches_are_averaged(name):
    """Expectation: without batch norm the loss of one large batch is the mean over its parts, so
    are its gradient and Hessian; the score of both is one."""
    problem, view, batches = setting(Bare(), batches=4)
    whole = jax.tree.map(lambda a: a.reshape(1, -1, *a.shape[2:]), batches)
    score = jax.jit(SCORES[name](problem, train=True))
    parts, once = score(KEY, view, batches), score(KEY, view, whole)
    for path in once:
        assert_equal_to(parts[path], once[path], abs(once[path]).max())


@double
def test_grasp_is_a_derivative_of_the_gradient_norm():
    """Expectation: `w * Hg` is w times the gradient of `|g|^2 / 2` by central differences."""
    problem, view, batches = setting(Bare())
    scores = jax.device_get(grasp_at(problem, False)(1.0, view, batches))
    draw = np.random.default_rng(4)
    direction = {p: draw.standard_normal(w.shape) for p, w in view.weights.items()}

    def half_norm(step):
        moved = {p: np.asarray(w) * (1 + step * direction[p]) for p, w in view.weights.items()}
        g = loss_gradient(problem, view._replace(weights=moved), batches, train=False)
        return sum((leaf**2).sum() for leaf in g.values()) / 2

    h = 1e-5
    difference = (half_norm(h) - half_norm(-h)) / (2 * h)
    expected = sum((scores[p] * direction[p]).sum() for p in scores)
    np.testing.assert_allclose(difference, expected, rtol=1e-6)  # of the difference: h^2


def test_random_scores_depend_on_key_and_path_only():
    """Expectation: the docstring: other leaves do not matter, equal keys draw equal numbers."""
    _, view, _ = setting(Bare())
    score = jax.jit(jp.random())
    scores = score(KEY, view, None)
    path = 'b_dense_1/kernel'
    alone = view._replace(weights={path: view.weights[path]}, masks={path: view.masks[path]})
    np.testing.assert_array_equal(score(KEY, alone, None)[path], scores[path])
    np.testing.assert_array_equal(score(KEY, view, None)[path], scores[path])
    other = score(jax.random.key(8), view, None)
    assert not (np.asarray(other[path]) == np.asarray(scores[path])).any()
    flat = np.concatenate([np.ravel(leaf) for leaf in scores.values()])
    assert len(np.unique(flat)) > 0.99 * flat.size  # leaves differ from each other
    assert ((flat >= 0) & (flat < 1)).all()


def test_scores_without_data_say_so():
    """Expectation: an error that says what to pass."""
    problem, view, _ = setting(Bare())
    with pytest.raises(JaxpruneError, match='needs data: pass batches'):
        jp.snip(problem, train=False)(KEY, view, None)
    with pytest.raises(JaxpruneError, match='needs data: pass batches'):
        jp.grasp(problem, train=False)(KEY, view, None)
    with pytest.raises(JaxpruneError, match='needs the shape of an input: pass batches'):
        jp.synflow(problem)(KEY, view, None)


@pytest.mark.parametrize(
    'method',
    [
        more_unless(name in KINDS, name)
        for name, entry in jp.METHODS.items()
        if not (entry.hooked or entry.coupled)  # gates are in the network in evaluation mode
    ],
)
def test_scoring_leaves_running_statistics_alone(method):
    """Expectation: an event returns masks only, and the view's statistics are what they were;
    so a second event with the same view is the same. In train mode they are not even read."""
    problem, view, batches = setting(Normed())
    before = jax.tree.map(np.array, view.model_state)
    # Some look at single examples, which have no batch statistics; others look at no data.
    single = ('fisher', 'sipp', 'pfp')
    reads = 'data' in jp.METHODS[method].needs and method not in single
    pruner = jp.get_pruner(problem, method, batch_norm='train' if reads else None)
    update = jax.jit(pruner.update)
    _, masks, info = update(KEY, pruner.init(KEY, view), view, {'*': 100}, batches)
    jax.tree.map(np.testing.assert_array_equal, view.model_state, before)
    assert sum(int(n) for n in info.kept.values()) == 100
    state = {'batch_stats': jax.tree.map(lambda a: a + 1, view.model_state['batch_stats'])}
    moved = view._replace(model_state=state)
    _, again, _ = update(KEY, pruner.init(KEY, view), moved, {'*': 100}, batches)
    if method not in ('synflow', 'lean', 'operator_norm', *single):  # they read them by definition
        jax.tree.map(np.testing.assert_array_equal, again, masks)


# --- problems ---------------------------------------------------------------------------------


def test_linen_with_and_without_a_train_argument():
    """Expectation: statistics move in training by the momentum rule, and only there; a module
    that takes no `train` is called without."""
    problem, view, batches = setting(Normed())
    x, params, state = batches.x[0], view.params, view.model_state
    logits, same = problem.apply(params, state, x, train=False, key=None)
    assert logits.shape == (8, 3)
    assert same is state
    _, new = problem.apply(params, state, x, train=True, key=None)
    kernel = params['conv']['kernel']
    maps = nn.Conv(4, (3, 3), use_bias=False).apply({'params': {'kernel': kernel}}, x)
    expected = 0.99 * state['batch_stats']['bn_0']['mean'] + 0.01 * maps.mean((0, 1, 2))
    np.testing.assert_allclose(new['batch_stats']['bn_0']['mean'], expected, atol=1e-7)

    problem, view, batches = setting(Bare())
    assert view.model_state == {}
    eval_logits, _ = problem.apply(view.params, {}, x, train=False, key=None)
    train_logits, empty = problem.apply(view.params, {}, x, train=True, key=None)
    assert empty == {}
    np.testing.assert_array_equal(train_logits, eval_logits)
    np.testing.assert_array_equal(eval_logits, Bare().apply({'params': view.params}, x))


def test_cross_entropy():
    """Expectation: optax's, one value per example."""
    logits = jax.random.normal(KEY, (5, 3)) * 4
    labels = jnp.array([0, 2, 1, 1, 0])
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    np.testing.assert_allclose(jp.cross_entropy(logits, labels), expected, rtol=1e-6)


@double
@pytest.mark.parametrize('method', ['magnitude', 'snip', 'grasp', 'synflow'])
def test_a_plain_pytree_gives_the_masks_of_flax(method):
    """Expectation: the same network and weights, so the same masks; a list in place of a module."""
    problem, view, batches = setting(Bare())
    weights = list(view.weights.values())

    def apply(params, x):
        x = x.reshape(x.shape[0], -1)
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer['w'])
        return x @ params[-1]['w']

    mine = jp.problem_from_functions(lambda key: [{'w': w} for w in weights], apply)
    counts = jp.keep_counts(jp.shapes(view.weights), 0.2)

    def masks(problem, view):
        return jp.get_pruner(problem, method).update(KEY, (), view, counts, batches)[1]

    ours = jax.jit(lambda: masks(mine, jp.view(mine, *mine.init(KEY))))()
    flax = jax.jit(functools.partial(masks, problem))(view)
    assert list(ours) == ['0/w', '1/w', '2/w']
    for a, b in zip(ours.values(), flax.values(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_view_takes_pruned_weights_as_zero():
    """Expectation: the docstring, whatever they hold; so scores see the pruned network."""
    problem, view, batches = setting(Bare())
    draw = np.random.default_rng(6)
    masks = {path: draw.random(w.shape) < 0.5 for path, w in view.weights.items()}
    dirty = jp.put(view.params, {p: np.where(masks[p], w, np.nan) for p, w in view.weights.items()})
    clean = jp.apply_masks(view.params, masks)
    score = jax.jit(jp.snip(problem, train=False))
    a = score(KEY, jp.view(problem, dirty, masks=masks), batches)
    b = score(KEY, jp.view(problem, clean, masks=masks), batches)
    for path in a:
        np.testing.assert_array_equal(a[path], b[path])
        assert not np.asarray(a[path])[~masks[path]].any()


# --- optimizers under masks -------------------------------------------------------------------

apply_updates = jax.jit(optax.apply_updates)

OPTIMIZERS = {
    'sgd': optax.sgd(0.1),
    'momentum': optax.sgd(0.1, momentum=0.9),
    'nesterov': optax.sgd(0.1, momentum=0.9, nesterov=True),
    'adam': optax.adam(0.1),
    'adamw': optax.adamw(0.1, weight_decay=0.1),
    'rmsprop': optax.rmsprop(0.1, momentum=0.9),
    'lion': optax.lion(0.1, weight_decay=0.1),
    'chain': optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
}


def small_tree():
    draw = np.random.default_rng(3)
    params = {
        'a': {
            'kernel': jnp.asarray(draw.standard_normal((4, 3)), jnp.float32),
            'bias': jnp.ones(3),
        },
        'b': [{'w': jnp.asarray(draw.standard_normal((3, 2)), jnp.float32)}],
    }
    masks = {p: jnp.asarray(draw.random(w.shape) < 0.5) for p, w in jp.pick(params).items()}
    assert all(0 < int(m.sum()) < m.size for m in masks.values())
    return jp.apply_masks(params, masks), masks


def leaves_like(state, shape):
    return [leaf for leaf in jax.tree.leaves(state) if getattr(leaf, 'shape', None) == shape]


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_pruned_stays_pruned_in_a_loop_of_ones_own(name):
    """Expectation: pruned weights and their moments are exactly zero after each step, though their
    gradients are NaN; the kept ones move as the bare optimizer moves them on masked gradients."""
    params, masks = small_tree()
    tx, bare = sparse(OPTIMIZERS[name]), OPTIMIZERS[name]
    state, bare_state, bare_params = tx.init(params), bare.init(params), params
    update, bare_update = jax.jit(tx.update), jax.jit(bare.update)
    for step in range(4):
        grads = jax.tree.map(lambda p: jnp.cos(3 * p + step), params)  # noqa: B023
        clean = jp.apply_masks(grads, masks)
        grads = jp.put(
            grads, {p: jnp.where(masks[p], g, jnp.nan) for p, g in jp.pick(grads).items()}
        )
        updates, state = update(grads, state, params, masks=masks)
        params = apply_updates(params, updates)
        updates, bare_state = bare_update(clean, bare_state, bare_params)
        bare_params = apply_updates(bare_params, updates)
        for path, weights in jp.pick(params).items():
            for leaf in (weights, *leaves_like(state, weights.shape)):
                assert not np.asarray(leaf)[~np.asarray(masks[path])].any()
        for ours, expected in zip(*map(jax.tree.leaves, (params, bare_params)), strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-7)
            assert np.isfinite(ours).all()
    assert not bool((params['a']['bias'] == 1).any())  # what has no mask is trained


def test_pruned_weights_get_no_updates_even_where_they_are_not_zero():
    """Expectation: the docstring; AdamW's decay and the noise of noisy SGD would move them."""
    params, masks = small_tree()
    params = jax.tree.map(lambda p: p + 1.0, params)
    for inner in (optax.adamw(0.1, weight_decay=0.5), optax.noisy_sgd(0.1, key=0)):
        tx = sparse(inner)
        updates = jax.jit(lambda p: tx.update(p, tx.init(p), p, masks=masks)[0])(params)  # noqa: B023
        for path, update in jp.pick(updates).items():
            np.testing.assert_array_equal(np.asarray(update) != 0, masks[path])


@pytest.mark.parametrize('wrapped', [False, True])
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_mask_opt_state(name, wrapped):
    """Expectation: moments of pruned weights become zero; kept ones, biases and counters stay."""
    params, masks = small_tree()
    tx = OPTIMIZERS[name]
    _, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    used = sparse(tx) if wrapped else tx
    masked = jax.jit(lambda s: mask_opt_state(used, s, params, masks))(state)
    assert jax.tree.structure(masked) == jax.tree.structure(state)
    by_shape = {w.shape: masks[path] for path, w in jp.pick(params).items()}
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(masked), strict=True):
        mask = by_shape.get(before.shape, True)
        np.testing.assert_array_equal(after, np.where(mask, before, 0))
        assert after.dtype == before.dtype
    moments = [leaf for shape in by_shape for leaf in leaves_like(state, shape)]
    assert bool(moments) == (name != 'sgd')


def test_sparse_says_which_mask_does_not_fit():
    """Expectation: the path and the nearest one there is."""
    params, masks = small_tree()
    tx = sparse(optax.sgd(0.1))
    with pytest.raises(JaxpruneError, match="no parameter 'a/kernle': did you mean 'a/kernel'"):
        tx.update(params, tx.init(params), params, masks={'a/kernle': masks['a/kernel']})


NUMBERS = {
    'sgd': ({'momentum': 0.8}, {'nesterov': True}),
    'adam': ({'b1': 0.8, 'b2': 0.99}, {}),
    'adamw': ({'b1': 0.8}, {'nesterov': True}),
    'rmsprop': ({'decay': 0.8}, {'centered': True}),
    'lion': ({'b2': 0.95}, {}),
}


@pytest.mark.parametrize('name', NUMBERS)
def test_optimizers_by_name_are_optax(name):
    """Expectation: the same updates as optax's own with the numbers written in, though ours are
    traced; weight decay goes in where optax's function takes it."""
    numbers, static = NUMBERS[name]
    made = optimizer(name, static, rate_schedule('constant', 10))
    decay = {'weight_decay': 0.3} if decays(name) else {}
    direct = getattr(optax, name)(0.05, **numbers, **static, **decay)
    assert made.coupled_decay == (name in ('sgd', 'adam', 'rmsprop')) == (not decay)
    params, _ = small_tree()

    @jax.jit
    def step(hyper, grads, state, params):
        tx = made.make(hyper, hyper.learning_rate)
        updates, state = tx.update(grads, state, params)
        return apply_updates(params, updates), state

    hyper = Hyper(jnp.float32(0.05), jnp.float32(0.3), jax.tree.map(jnp.float32, numbers))
    ours, theirs, direct_update = params, params, jax.jit(direct.update)
    ours_state, theirs_state = (
        made.make(hyper, hyper.learning_rate).init(params),
        direct.init(params),
    )
    for i in range(3):
        grads = jax.tree.map(lambda p: jnp.sin(p + i), params)  # noqa: B023
        ours, ours_state = step(hyper, grads, ours_state, ours)
        updates, theirs_state = direct_update(grads, theirs_state, theirs)
        theirs = apply_updates(theirs, updates)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6)


def test_unknown_optimizers():
    """Expectation: the nearest name; what is not an optimizer is not offered."""
    with pytest.raises(JaxpruneError, match="unknown optimizer 'admw': did you mean 'adamw'"):
        optimizer('admw', {}, rate_schedule('constant', 1))
    for name in ('scale_by_adam', 'cosine_decay_schedule', 'chain', 'adam_', '__doc__'):
        with pytest.raises(JaxpruneError, match='unknown optimizer'):
            decays(name)
    assert arguments('sgd') == {'momentum': None, 'nesterov': False}


@double
@pytest.mark.parametrize('nesterov', [False, True])
def test_coupled_weight_decay_is_that_of_torch(nesterov):
    """Expectation: `torch.optim.SGD` by hand: d = g + wd w; b = m b + d; w -= lr (d + m b or b).

    On a linear model with squared error, whose gradient is written out; weight decay acts on the
    bias too, as there, and not on pruned weights.
    """
    lr, decay, momentum = 0.05, 0.01, 0.9
    draw = np.random.default_rng(5)
    x, y = draw.standard_normal((6, 4)), draw.standard_normal(6)
    w, b = draw.standard_normal((4, 1)), np.array([0.5])
    mask = np.array([[True], [False], [True], [True]])
    w = w * mask
    problem = jp.problem_from_functions(
        lambda key: {'w': jnp.asarray(w), 'b': jnp.asarray(b)},
        lambda params, x: x @ params['w'] + params['b'],
        loss=lambda out, labels: (out[:, 0] - labels) ** 2 / 2,
    )
    made = optimizer('sgd', {'nesterov': nesterov}, rate_schedule('constant', 5))
    hyper = Hyper(jnp.float64(lr), jnp.float64(decay), {'momentum': jnp.float64(momentum)})
    params, model_state = problem.init(KEY)
    state = RunState(
        params,
        model_state,
        made.make(hyper, hyper.learning_rate).init(params),
        {'w': jnp.asarray(mask)},
        (),
    )
    step = jax.jit(train_step(problem, made))
    buffers = [np.zeros_like(w), np.zeros_like(b)]
    for clock in range(5):
        residual = (x @ w + b)[:, 0] - y
        state, loss = step(clock, KEY, hyper, state, jp.Batch(jnp.asarray(x), jnp.asarray(y)))
        np.testing.assert_allclose(loss, (residual**2).mean() / 2, rtol=1e-12)
        gradients = [x.T @ residual[:, None] / 6, residual.mean(keepdims=True)]
        for i, value in enumerate((w, b)):
            d = gradients[i] + decay * value
            buffers[i] = momentum * buffers[i] + d
            value -= lr * (d + momentum * buffers[i] if nesterov else buffers[i])
        w *= mask
        buffers[0] *= mask
        np.testing.assert_allclose(state.params['w'], w, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(state.params['b'], b, rtol=1e-12)


# --- learning rates ---------------------------------------------------------------------------


def rates(*args, until: int = 11, **kwargs) -> np.ndarray:
    rate = jax.jit(rate_schedule(*args, **kwargs))
    return np.array([rate(jnp.int32(step)) for step in range(until)])


def test_rate_schedules():
    """Expectation: the formulas: 1; (1 + cos(pi t / T)) / 2; factor to the milestones passed."""
    t = np.arange(11)
    np.testing.assert_array_equal(rates('constant', 10), 1)
    np.testing.assert_allclose(rates('cosine', 10), (1 + np.cos(np.pi * t / 10)) / 2, atol=1e-7)
    expected = 0.1 ** ((t >= 5).astype(float) + (t >= 7))
    np.testing.assert_allclose(rates('step', 10, milestones=(5, 7)), expected, rtol=1e-6)
    halves = rates('step', 10, milestones=(5, 7), factor=0.5)
    np.testing.assert_allclose(halves, 0.5 ** ((t >= 5).astype(float) + (t >= 7)), rtol=1e-6)


@pytest.mark.parametrize('name', RATE_SCHEDULES)
def test_warmup(name):
    """Expectation: t / warmup before `warmup`; cosine then falls over the rest; milestones are
    counted from the start of training, also with a warm-up."""
    t = np.arange(11)
    milestones = (5, 7) if name == 'step' else ()
    values = rates(name, 10, warmup=4, milestones=milestones)
    np.testing.assert_allclose(values[:4], t[:4] / 4, rtol=1e-6)
    after = {
        'constant': np.ones(11),
        'cosine': (1 + np.cos(np.pi * (t - 4) / 6)) / 2,
        'step': 0.1 ** ((t >= 5).astype(float) + (t >= 7)),
    }[name]
    np.testing.assert_allclose(values[4:], after[4:], rtol=1e-6, atol=1e-7)


def test_unknown_rate_schedule():
    """Expectation: the nearest name."""
    with pytest.raises(JaxpruneError, match="unknown schedule 'cosin': did you mean 'cosine'"):
        rate_schedule('cosin', 10)


@pytest.mark.parametrize('name', ['snip', 'grasp'])
def test_dropout_draws_from_the_scores_key(name):
    """A train-mode score of a net with dropout needs a key, and equal keys give equal scores."""

    class Dropping(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            x = nn.relu(nn.Dense(8, name='dense_0')(x))
            x = nn.Dropout(0.5, deterministic=not train)(x)
            return nn.Dense(3, name='dense_1')(x)

    net = jp.problem_from_flax(Dropping(), (4,))
    view = jax.jit(lambda: jp.view(net, *net.init(jax.random.key(0))))()
    batch = jp.Batch(np.ones((1, 6, 4), np.float32), np.arange(6)[None] % 3)
    score = jax.jit({'snip': jp.snip, 'grasp': jp.grasp}[name](net, train=True))
    path = 'dense_1/kernel'
    first, again, other = (
        np.asarray(score(jax.random.key(k), view, batch)[path]) for k in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


@pytest.mark.parametrize(
    ('flag', 'in_training'),
    [('train', True), ('training', True), ('is_training', True), ('deterministic', False)],
)
def test_linen_sets_whichever_mode_argument_a_module_has(flag, in_training):
    """A module with `training=` silently run in eval mode would never update its statistics."""
    namespace = {'nn': nn}
    exec(
        'class Net(nn.Module):\n'
        '    @nn.compact\n'
        f'    def __call__(self, x, {flag}={not in_training}):\n'
        f'        x = nn.BatchNorm(use_running_average={flag} != {in_training})(x)\n'
        '        return nn.Dense(3)(x)\n',
        namespace,
    )
    net = jp.problem_from_flax(namespace['Net'](), (4,))
    params, state = net.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (8, 4)) + 2
    _, trained = net.apply(params, state, x, train=True, key=None)
    _, evaluated = net.apply(params, state, x, train=False, key=None)
    mean = state['batch_stats']['BatchNorm_0']['mean']
    assert np.any(trained['batch_stats']['BatchNorm_0']['mean'] != mean)
    np.testing.assert_array_equal(evaluated['batch_stats']['BatchNorm_0']['mean'], mean)


def test_milestones_on_one_step_both_count():
    """torch's MultiStepLR multiplies once per milestone, also where two coincide."""
    rate = rate_schedule('step', 10, milestones=[2, 2, 5], factor=0.1)
    np.testing.assert_allclose([rate(1), rate(2), rate(5)], [1, 0.01, 0.001], rtol=1e-6)


@pytest.mark.parametrize('name', ['rprop', 'noisy_sgd', 'sm3'])
def test_optimizers_that_break_a_promise_are_not_offered(name):
    with pytest.raises(JaxpruneError, match='unknown optimizer'):
        optimizer(name, {}, lambda clock: 1.0)


def test_soft_masks_are_refused():
    """0.5 would count as True: a silently dense leaf."""
    params = {'kernel': jnp.ones((2, 2))}
    with pytest.raises(PruneError, match='boolean'):
        jp.apply_masks(params, {'kernel': jnp.full((2, 2), 0.5)})
