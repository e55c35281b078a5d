"""Methods that change the training step: hooks in `train_step`, dense weights, TPP."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweeps import engine_of, group_of

import jaxprune as jp
from jaxprune import data, flow, nn, optim, tree
from jaxprune.method import competing, get_pruner, run_rounds
from jaxprune.optim import sparse
from jaxprune.rng import stream
from jaxprune.select import layerwise_top_k
from jaxprune.structure import forward_shapes, groups_of
from jaxprune.sweep.chunk import run_chunk
from jaxprune.sweep.device_data import device_data
from jaxprune.sweep.program import hyper_of
from jaxprune.sweep.strategy import Strategy
from jaxprune.train import (
    evaluate_batch,
    hooked_view,
    init_run,
    run_events,
    train_step,
)
from jaxprune.types import Batch, Hyper, Pruner, StepHook

PROBLEM = jp.problem_from_flax(nn.MLP((6, 5), classes=3), (4,))
KEY = jax.random.key(0)
HYPER = Hyper(np.float32(0.1), np.float32(1e-3), {'momentum': np.float32(0.9)})


def optimizer(name='sgd'):
    return optim.optimizer(name, {}, optim.rate_schedule('cosine', 20))


def batch(seed=0, size=8):
    x = jax.random.normal(jax.random.key(seed), (size, 4))
    return Batch(x, np.arange(size, dtype=np.int32) % 3)


def masked_state(density=0.5, opt=None):
    """A run with random masks in force."""

    @jax.jit
    def made():
        state = init_run(PROBLEM, opt or optimizer())(KEY, HYPER)
        masks = {
            path: jax.random.bernoulli(jax.random.fold_in(KEY, i), density, leaf.shape)
            for i, (path, leaf) in enumerate(tree.pick(state.params).items())
        }
        return state._replace(params=tree.apply_masks(state.params, masks), masks=masks)

    return jax.device_get(made())


# --- no hook ------------------------------------------------------------------------------------


def written_out(problem, opt):
    """The step as it was before there were hooks: forward, decay, masked optimizer."""

    def step(clock, key, hyper, state, batch):
        def loss(params):
            logits, model_state = problem.apply(
                params,
                state.model_state,
                batch.x,
                train=True,
                key=jax.random.fold_in(stream(key, 'dropout'), clock),
            )
            return problem.loss(logits, batch.y).mean(), model_state

        (value, model_state), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        if opt.coupled_decay:
            grads = jax.tree.map(lambda g, p: g + hyper.weight_decay * p, grads, state.params)
        rate = opt.rate(clock, hyper)
        tx = sparse(opt.make(hyper, rate))
        updates, opt_state = tx.update(grads, state.opt_state, state.params, masks=state.masks)
        params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), state.params, updates)
        return state._replace(params=params, model_state=model_state, opt_state=opt_state), value

    return step


@pytest.mark.parametrize('name', ['sgd', 'adamw'])
@pytest.mark.parametrize('hook', [None, StepHook()])
def test_without_a_hook_the_step_is_that_of_before(name, hook):
    """Expectation: the jaxpr of the step written out above, to the letter."""
    opt = optimizer(name)
    hyper = HYPER if name == 'sgd' else HYPER._replace(optimizer={})
    state = jax.eval_shape(init_run(PROBLEM, opt), KEY, hyper)
    args = (jnp.int32(3), KEY, hyper, state, batch())
    ours = jax.make_jaxpr(train_step(PROBLEM, opt, hook))(*args)
    assert str(ours) == str(jax.make_jaxpr(written_out(PROBLEM, opt))(*args))


# --- each hook, against the same thing by hand --------------------------------------------------


def ste(state, params, masks, clock):
    """Straight through: the network sees masked weights, gradients reach all of them."""
    del state, clock
    masked = tree.apply_masks(params, masks)
    return jax.tree.map(lambda p, m: p + jax.lax.stop_gradient(m - p), params, masked)


@jax.jit
def gradients(params, shown):
    def loss(p):
        logits = PROBLEM.apply(p, {}, shown.x, train=True, key=None)[0]
        return PROBLEM.loss(logits, shown.y).mean()

    return jax.grad(loss)(params)


def test_dense_weights_follow_the_gradient_at_the_masked_point():
    """Expectation: DPF's update, w - lr (g(m w) + decay w), plain SGD, for every weight
    (Lin et al., 2020, arXiv:2006.07253, eq. 1), pruned ones included."""
    opt = optimizer()
    hyper = HYPER._replace(optimizer={'momentum': np.float32(0)})
    state = masked_state()
    dense = jax.device_get(jax.jit(init_run(PROBLEM, opt))(KEY, hyper)).params
    state = state._replace(params=dense)
    step = jax.jit(train_step(PROBLEM, opt, StepHook(weights=ste), dense=True))
    after, _ = step(np.int32(0), KEY, hyper, state, batch())
    apply_masks = jax.jit(tree.apply_masks)
    at_mask = jax.device_get(gradients(apply_masks(dense, state.masks), batch()))
    expected = jax.tree.map(lambda w, g: w - 0.1 * (g + 1e-3 * w), dense, at_mask)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), after.params, expected)
    # The law of pruned zeros holds for what the network computes with.
    view = jax.jit(lambda state: hooked_view(PROBLEM, state, StepHook(weights=ste), 1))(after)
    view = jax.device_get(view)
    for path, mask in state.masks.items():
        assert not np.any(view.weights[path][~mask])
        assert np.any(view.stored[path][~mask])
    # And evaluation sees it.
    test = batch(1)
    sums = evaluate_batch(PROBLEM, lambda split, key, at: test, StepHook(weights=ste))
    loss, _ = jax.jit(lambda run: sums(1, None, run, np.arange(8), np.ones(8, bool)))(after)

    @jax.jit
    def losses(params):
        logits = PROBLEM.apply(params, {}, test.x, train=False, key=None)[0]
        return PROBLEM.loss(logits, test.y)

    masked = apply_masks(after.params, state.masks)
    np.testing.assert_allclose(loss, np.asarray(losses(masked)).sum(), rtol=1e-6)


def test_a_gradient_hook_sees_the_loss_alone_and_the_rate_of_the_step():
    """Expectation: gradients of the mean loss before weight decay; the learning rate of step 7 of
    a cosine over 20; what the hook returns is what the optimizer gets, masked."""

    def gradient(state, grads, params, masks, clock, hyper):
        caught = {'grads': grads, 'rate': hyper.learning_rate, 'clock': clock}
        return (state + 1, caught), jax.tree.map(lambda g, p: g + 2 * p, grads, params)

    opt = optimizer()
    state = masked_state()._replace(method_state=np.int32(4))
    step = jax.jit(train_step(PROBLEM, opt, StepHook(gradient=gradient)))
    after, _ = jax.device_get(step(np.int32(7), KEY, HYPER, state, batch()))
    method_state, caught = after.method_state
    plain = jax.device_get(gradients(state.params, batch()))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), caught['grads'], plain)
    np.testing.assert_allclose(caught['rate'], 0.05 * (1 + np.cos(np.pi * 7 / 20)), rtol=1e-5)
    assert int(method_state) == 5 and int(caught['clock']) == 7
    moved = jax.tree.map(lambda g, p: p - caught['rate'] * (g + 2.001 * p), plain, state.params)
    expected = tree.apply_masks(moved, state.masks)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7), after.params, expected
    )


def test_a_projection_ends_the_step_within_the_mask():
    """Expectation: soft thresholding of the plain step by rate times penalty (proximal L1), and
    zero where pruned, even if the projection would fill that in."""

    def project(state, before, after, masks, clock, hyper):
        del before, masks, clock
        limit = hyper.learning_rate * 0.5
        shrunk = jax.tree.map(lambda p: jnp.sign(p) * jnp.maximum(jnp.abs(p) - limit, 0), after)
        return state, jax.tree.map(lambda p: p + 1.0, shrunk)

    state = masked_state()
    args = np.int32(0), KEY, HYPER, state, batch()
    plain, _ = jax.device_get(jax.jit(train_step(PROBLEM, optimizer()))(*args))
    after, _ = jax.jit(train_step(PROBLEM, optimizer(), StepHook(project=project)))(*args)
    shrunk = jax.tree.map(
        lambda p: np.sign(p) * np.maximum(np.abs(p) - 0.05, 0) + 1.0, plain.params
    )
    expected = tree.apply_masks(shrunk, state.masks)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), after.params, expected)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, plain.opt_state)


def test_a_method_with_dense_weights_lives_and_ends():
    """Expectation: between its rounds nothing is zeroed and no moment is masked; masks follow the
    dense weights, so a weight can come back; after the last round weights and moments are zero
    where pruned, as for any method."""

    def update(key, state, view, counts, batches):
        del key, batches
        scores = {path: jnp.abs(w) for path, w in (view.stored or view.weights).items()}
        masks = layerwise_top_k(scores, counts)
        return state, masks, jp.types.PruneInfo(jp.count_kept(masks), jnp.int32(0), jnp.int32(1))

    hook = StepHook(weights=ste)
    feedback = Pruner(lambda key, view: (), update, frozenset(), hook=hook, dense=True)
    opt = optimizer()
    state = jax.jit(init_run(PROBLEM, opt))(KEY, HYPER)
    size = {path: leaf.size for path, leaf in tree.pick(state.params).items()}
    rounds = run_events(PROBLEM, opt, feedback, KEY, HYPER, lambda number: None)
    counts = {path: np.array([n // 2], np.int32) for path, n in size.items()}
    step = jax.jit(train_step(PROBLEM, opt, hook, dense=True))
    prune = jax.jit(
        functools.partial(run_rounds, rounds), static_argnames=('before', 'begin', 'finish')
    )
    first = None
    for number in range(4):
        last = number == 3
        state, infos = prune(state, counts, before=number, begin=number == 0, finish=last)
        masks = jax.device_get(state.masks)
        first = masks if first is None else first
        assert {p: int(k[-1]) for p, k in infos.kept.items()} == {
            p: n // 2 for p, n in size.items()
        }
        if not last:
            for at in range(10):
                state, _ = step(np.int32(at), KEY, HYPER, state, batch(number * 10 + at))
            weights = jax.device_get(tree.pick(state.params))
            for path, mask in masks.items():
                assert np.all(weights[path][~mask] != 0)
    state = jax.device_get(state)
    back = [np.any(state.masks[p] & ~first[p]) for p in first]
    assert any(back), 'no weight came back'
    trace = dict(tree.paths(state.opt_state))
    for path, mask in state.masks.items():
        assert not np.any(tree.pick(state.params)[path][~mask])
        (moment,) = [leaf for name, leaf in trace.items() if name.endswith(path)]
        assert not np.any(moment[~mask]) and np.any(moment[mask])


# --- TPP ----------------------------------------------------------------------------------------

NET = jp.problem_from_flax(nn.build('mlp', 10, widths=[12, 8]), (28, 28, 1))
TPP = {
    'name': 'tpp',
    'granularity': 'unit',
    'allocation': 'uniform',
    'start': 1,
    'end': 3,
    'weight': 100.0,
    'interval': 4,
    'increment': 0.05,
    'ceiling': 0.5,
}
TABLE = {
    'name': 'tpp',
    'model': {'name': 'mlp', 'widths': [12, 8]},
    'data': {'name': 'mnist_small', 'train_examples': 400, 'test_examples': 100},
    'train': {'epochs': 4, 'batch_size': 40, 'momentum': 0.9, 'weight_decay': 1e-3},
    'grid': {
        'method': [TPP, {**TPP, 'label': 'weaker', 'increment': 0.01}],
        'compression': [2],
        'seed': [0],
    },
}


@jax.jit
def loss_gradient(params, images, y):
    x = (images / 255.0 - 0.1307) / 0.3081

    def loss(p):
        return NET.loss(NET.apply(p, {}, x, train=True, key=None)[0], y).mean()

    return jax.grad(loss)(params)


@jax.jit
def penalty_gradient(params, gone, strength):
    """Of the penalty's own formula: 100 mean((W W^T - T)^2), and the pull |.|^2 / 2."""

    def penalty(params):
        total = 0.0
        for name, pruned in gone.items():
            rows = params[name]['kernel'].T
            gram = rows @ rows.T
            touched = pruned[:, None] | pruned[None, :]
            target = jax.lax.stop_gradient(jnp.where(touched, 0, gram))
            total += strength * 100.0 * jnp.mean((gram - target) ** 2)
            pull = jnp.where(pruned, params[name]['kernel'], 0)
            bias = jnp.where(pruned, params[name]['bias'], 0)
            total += strength * 0.5 * ((pull**2).sum() + (bias**2).sum())
        return total

    return jax.grad(penalty)(params)


def cut_out(gone):
    """The masks of a network of 784-12-8-10 without these units."""
    first, second = (~np.asarray(gone[name]) for name in ('dense_0', 'dense_1'))
    return {
        'dense_0/kernel': np.broadcast_to(first, (784, 12)),
        'dense_1/kernel': first[:, None] & second[None, :],
        'dense_2/kernel': np.broadcast_to(second[:, None], (8, 10)),
    }


def by_hand(program, key, hyper, data, share):
    """The published algorithm, written out: choose by mean |w| after 10 steps, train for 20 with a
    growing penalty, remove, train for 10 (arXiv:2207.12534 and its code). Returns params, masks."""

    @jax.jit
    def moved(params, speed, grads, masks, rate):
        grads = jax.tree.map(lambda g, p: g + 1e-3 * p, grads, params)
        grads = tree.apply_masks(grads, masks)
        speed = jax.tree.map(lambda m, g: 0.9 * m + g, speed, grads)
        return jax.tree.map(lambda p, m: p - rate * m, params, speed), speed

    state, order = jax.jit(program.init)(key, hyper), jax.jit(program.order)
    params, masks = state.params, state.masks
    speed = jax.tree.map(np.zeros_like, params)
    gone, apply_masks = {}, jax.jit(tree.apply_masks)
    images, labels = jax.device_get((data.train.images, data.train.labels))
    for clock in range(40):
        if clock == 10:
            for name in ('dense_0', 'dense_1'):
                mean = np.abs(np.asarray(params[name]['kernel'])).mean(0)
                smallest = np.argsort(mean, kind='stable')[: int(mean.size * share)]
                gone[name] = np.isin(np.arange(mean.size), smallest)
        if clock == 30:
            masks = cut_out(gone)
            params, speed = (apply_masks(leaf, masks) for leaf in (params, speed))
        indices = np.asarray(order(key, clock // 10))[clock % 10]
        grads = loss_gradient(params, images[indices], labels[indices])
        if 10 <= clock < 30:
            strength = min(0.05 * ((clock - 10) // 4), 0.5)
            push = penalty_gradient(params, gone, strength)
            grads = jax.tree.map(np.add, *jax.device_get((grads, push)))
        rate = 0.1 * 0.5 * (1 + np.cos(np.pi * clock / 40))
        params, speed = moved(params, speed, grads, masks, rate)
    return params, masks


@functools.cache
def made():
    return group_of(TABLE)


def test_tpp_in_a_sweep_is_the_published_algorithm():
    """Expectation: the algorithm written out above, weights after all four epochs; and that two
    strengths share one program."""
    spec, group = made()
    engine, program = engine_of(spec, group, Strategy('map', 'scan', 'native', 1))
    assert len(group.runs) == 2
    states = []

    def keep(*args, **kwargs):
        found = engine.evaluate(*args, **kwargs)
        states.append(engine.pack(args[2]))
        return found

    chunk = run_chunk(spec, program, engine._replace(evaluate=keep), group.runs, 2)
    assert chunk.results['error'].null_count() == 8
    facts = data.facts('mnist_small')
    np.testing.assert_allclose([facts.mean[0], facts.std[0]], [0.1307, 0.3081], atol=1e-4)
    on_device = device_data(spec, data.load('mnist_small'))
    params, masks = by_hand(program, jax.random.key(0), hyper_of(group.runs[0]), on_device, 0.5)
    found = jax.tree.map(lambda leaf: leaf[0], states[-1])
    for path, mask in masks.items():
        np.testing.assert_array_equal(found.masks[path], mask, err_msg=path)
    for (path, a), (_, b) in zip(tree.paths(found.params), tree.paths(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-4, err_msg=path)
    other = jax.tree.map(lambda leaf: leaf[1], states[-1])
    assert (
        np.abs(found.params['dense_0']['kernel'] - other.params['dense_0']['kernel']).max() > 1e-3
    )
    steps = {name: n for name, n in engine.traces().items() if name.startswith('steps')}
    assert steps == {'steps 10': 1, 'steps 10 hooked': 1}


def units_of(net):
    shapes = forward_shapes(net, (28, 28, 1))
    return competing('unit', shapes, lambda: groups_of(net, (28, 28, 1)))


def test_tpp_on_its_own_adds_the_gradients_of_its_reference():
    """Expectation: `flow.tpp_gradients` at the strength of `flow.tpp_strength`, for kernels and
    their biases, and nothing for other parameters."""
    groups = units_of(NET)
    options = {'weight': 10.0, 'interval': 2, 'increment': 0.1, 'ceiling': 1.0}
    pruner = get_pruner(NET, 'tpp', groups=groups, allocation='uniform', **options)
    params = jax.device_get(jax.jit(NET.init)(KEY)[0])
    view = jp.view(NET, params)
    counts = {'dense_0/kernel': np.int32(9), 'dense_1/kernel': np.int32(4)}
    state, update = jax.jit(pruner.init)(KEY, view), jax.jit(pruner.update)
    state, masks, _ = update(KEY, state, view, counts, None)
    assert all(bool(mask.all()) for mask in masks.values()), 'nothing is pruned yet'
    pruned = {
        path: ~np.append(state.kept[own.name], True)[own.group] for path, own in groups.own.items()
    }
    assert set(pruned) == {f'dense_{i}/{leaf}' for i in (0, 1) for leaf in ('kernel', 'bias')}
    for i, gone in ((0, 3), (1, 4)):
        size = np.abs(params[f'dense_{i}']['kernel']).mean(0)
        smallest = np.sort(np.argsort(size, kind='stable')[:gone])
        np.testing.assert_array_equal(np.flatnonzero(pruned[f'dense_{i}/kernel']), smallest)
        np.testing.assert_array_equal(pruned[f'dense_{i}/bias'], pruned[f'dense_{i}/kernel'])
    grads = jax.tree.map(lambda p: 0 * p + 0.5, params)
    leaves = dict(tree.paths(params))
    gradient = jax.jit(pruner.hook.gradient)
    reference = jax.jit(functools.partial(flow.tpp_gradients, weight=10.0))
    for step in range(5):
        state, made = gradient(state, grads, params, masks, np.int32(90), HYPER)
        strength = min(0.1 * (step // 2), 1.0)
        added = jax.device_get(reference({path: leaves[path] for path in pruned}, pruned, strength))
        for path, leaf in tree.paths(made):
            expected = 0.5 + added.get(path, np.zeros(leaf.shape))
            np.testing.assert_allclose(leaf, expected, rtol=1e-5, err_msg=path)
    state, masks, _ = update(KEY, state, view, counts, None)
    for path, (count,) in groups.shapes.items():
        kept = np.asarray(masks[path]).any(0)
        np.testing.assert_array_equal(kept, ~pruned[path])
        assert kept.size == count


def test_batch_norms_of_pruned_filters_are_pulled_too():
    """Expectation: scale and bias of `bn_i` go with the filters of `conv_i`."""
    net = jp.problem_from_flax(nn.build('small_vgg', 10, widths=[4, 6]), (28, 28, 1))
    norms = {path for path in units_of(net).own if path.startswith('bn')}
    assert norms == {f'bn_{i}/{leaf}' for i in range(4) for leaf in ('scale', 'bias')}
