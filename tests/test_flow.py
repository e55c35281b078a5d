"""Gradient flow: identities in float64, and references written out.

Expectations are formulas of `methods` papers (Lubana & Dick 2021, arXiv:2009.11839) checked against
a flow that is integrated here with small Runge-Kutta steps, or dense linear algebra on matrices
that `jax.hessian` and `jax.jacobian` write out.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
import pytest
from jax.flatten_util import ravel_pytree
from test_scores import Normed, setting

import jaxprune as jp
from jaxprune import flow, tree
from jaxprune.flow.krylov import ritz
from jaxprune.score.derivatives import derivatives, parameters
from jaxprune.score.importance import importance
from jaxprune.sweep.store import read_flow

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


SIZES = (5, 7, 6, 3)


@functools.cache
def network(activation, *, bias: float = 0.5, density: float = 0.6, batches: int = 2):
    """Problem, masked view, data: a dense network, some weights of it pruned."""
    draw = np.random.default_rng(4)

    def init(key):
        return [
            {'w': jax.random.normal(k, (a, b)) / np.sqrt(a), 'b': bias * jnp.ones(b)}
            for k, a, b in zip(jax.random.split(key, 3), SIZES, SIZES[1:], strict=False)
        ]

    def apply(params, x):
        for layer in params[:-1]:
            x = activation(x @ layer['w'] + layer['b'])
        return x @ params[-1]['w'] + params[-1]['b']

    problem = jp.problem_from_functions(init, apply)
    params = jax.jit(problem.init)(jax.random.key(3))[0]
    masks = {
        path: jnp.asarray(draw.random(leaf.shape) < density)
        for path, leaf in tree.pick(params).items()
    }
    x = jnp.asarray(draw.standard_normal((batches, 6, SIZES[0])))
    y = jnp.asarray(draw.integers(0, SIZES[-1], (batches, 6)))
    view = jax.jit(functools.partial(jp.view, problem))(params, None, masks)
    return problem, view, jp.Batch(x, y)


def loss_of(problem, view, batches, temperature: float = 1.0):
    """The mean loss as a function of all parameters by path, written out anew."""
    x, y = (leaf.reshape(-1, *leaf.shape[2:]) for leaf in batches)

    def loss(params):
        logits = problem.apply(
            tree.put(view.params, params), view.model_state, x, train=False, key=None
        )[0]
        log_p = logits / temperature - jax.nn.logsumexp(
            logits / temperature, axis=-1, keepdims=True
        )
        return -log_p[jnp.arange(len(y)), y].mean()

    return loss


def at(view, params):
    """The view with other values of all parameters."""
    params = tree.apply_masks(tree.put(view.params, params), view.masks)
    return view._replace(params=params, weights=tree.pick(params))


def velocity(problem, view, batches, decay: float = 0.0):
    """`params -> dΘ/dt = -m (g + λ Θ)` by path."""
    gradient = jax.grad(loss_of(problem, view, batches))

    def flow_of(params):
        g = gradient(params)
        return {
            p: -jnp.where(view.masks.get(p, True), g[p] + decay * leaf, 0)
            for p, leaf in params.items()
        }

    return flow_of


def integrate(velocity, start, time: float, steps: int):
    """Runge-Kutta of order 4, `steps` of `time / steps`."""
    h = time / steps

    def step(_, y):
        def moved(by, k):
            return jax.tree.map(lambda a, b: a + by * b, y, k)

        a = velocity(y)
        b = velocity(moved(h / 2, a))
        c = velocity(moved(h / 2, b))
        d = velocity(moved(h, c))
        return jax.tree.map(
            lambda y, a, b, c, d: y + h / 6 * (a + 2 * b + 2 * c + d), y, a, b, c, d
        )

    return jax.lax.fori_loop(0, steps, step, start)


def along_the_flow(problem, view, batches, function, decay: float = 0.0):
    """First and second time derivatives of a function of the parameters, by differences.

    Seven points 0.01 apart, of order h⁶: rounding is what limits both, at about 1e-12.
    """
    h, drive = 1e-2, velocity(problem, view, batches, decay)
    run = jax.jit(lambda time: function(integrate(drive, parameters(view), time, 20)))
    values = [np.asarray(run(i * h)) for i in range(-3, 4)]
    first = np.tensordot([-1, 9, -45, 0, 45, -9, 1], values, 1) / (60 * h)
    second = np.tensordot([2, -27, 270, -490, 270, -27, 2], values, 1) / (180 * h**2)
    return first, second


def assert_near(value, expected, tolerance: float = 1e-9) -> None:
    value, expected = np.asarray(value), np.asarray(expected)
    assert np.abs(value - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-3)


# --- norms ------------------------------------------------------------------------------------


@pytest.mark.parametrize('decay', [0.0, 0.1])
def test_norm_derivatives_are_those_of_a_flow(decay):
    """Expectation: `d‖Θ_p‖²/dt`, `d²‖Θ_p‖²/dt²` and `d(Θ_pᵀ g_p)/dt` are finite differences of a
    flow under the mask, for units, layers and the network."""
    problem, view, batches = network(jnp.tanh)
    groups = ('unit', 'layer', 'network')

    def dynamics(view, **options):
        return [flow.norm_dynamics(problem, by=by, **options)(KEY, view, batches) for by in groups]

    def norms(params):
        found = dynamics(at(view, params), second=False)
        return ravel_pytree([each.squared for each in found])[0]

    measured = jax.jit(functools.partial(dynamics, weight_decay=decay))(view)
    first, second = along_the_flow(problem, view, batches, norms, decay)
    stop = 0
    for found in jax.device_get(measured):
        flat = ravel_pytree(found.first)[0]
        start, stop = stop, stop + flat.size
        assert_near(flat, first[start:stop])
        assert_near(ravel_pytree(found.second)[0], second[start:stop])
        # Θᵀg is -1/2 of the first derivative, so its drift is -1/2 of the second.
        assert_near(ravel_pytree(flow.saliency_drift(found))[0], -second[start:stop] / 2)
    assert stop == first.size


def test_loss_gradient_and_distance_along_a_flow():
    """Expectation: `dL/dt = -‖g‖²`, `d²L/dt² = 2 gᵀHg`, `d‖g‖²/dt = -2 gᵀHg`, and
    `d‖w - w(0)‖²/dt = -2 (w - w(0))ᵀg`, by finite differences of a flow."""
    problem, view, batches = network(jnp.tanh)
    start = {path: 0.9 * np.asarray(w) + 0.01 for path, w in view.weights.items()}
    view = view._replace(initial=start)
    curvature = jax.jit(flow.gradient_curvature(problem))(KEY, view, batches)['*']
    square = jax.jit(flow.norm_dynamics(problem, by='network', second=False))

    loss = loss_of(problem, view, batches)

    def along(params):
        here = at(view, params)
        gradient = square(KEY, here, batches).gradient['*']
        far = flow.distance_from_initial(problem)(KEY, here, None)
        return ravel_pytree([loss(params), gradient, ravel_pytree(far)[0] ** 2])[0]

    first, second = along_the_flow(problem, view, batches, along)
    decay = square(KEY, view, batches).gradient['*']
    assert_near(-decay, first[0])
    assert_near(2 * curvature, second[0])
    assert_near(-2 * curvature, first[1])
    rates = jax.jit(flow.distance_rate(problem))(KEY, view, batches)
    assert_near(ravel_pytree(rates)[0], first[2:])


def test_movement_is_half_the_change_of_the_square():
    """Expectation: `∫ -θ g dt = (θ_T² - θ_0²) / 2` for every weight along a flow."""
    problem, view, batches = network(jnp.tanh)
    drive = velocity(problem, view, batches)
    signed = importance(problem, order=1, mode='signed')

    def both(state):
        params, _ = state
        products = signed(KEY, at(view, params), batches)
        return drive(params), {path: -leaf for path, leaf in products.items()}

    start = (parameters(view), jax.tree.map(jnp.zeros_like, view.weights))
    end, movement = jax.jit(lambda: integrate(both, start, 1.0, 200))()
    for path, moved in movement.items():
        assert np.abs(moved).max() > 1e-3
        assert_near(moved, (end[path] ** 2 - view.weights[path] ** 2) / 2)


@pytest.mark.parametrize(('steps', 'momentum'), [(1, 0.0), (5, 0.0), (5, 0.9), (1, 0.9)])
def test_predicted_change_of_norms(steps, momentum):
    """Expectation: steps of gradient descent with decay, taken here one by one from rest; the
    prediction is exact for one step, else of second order: its error falls with the cube."""
    problem, view, batches = network(jnp.tanh)
    decay = 0.05
    drive = jax.jit(velocity(problem, view, batches, decay))
    dynamics = jax.jit(flow.norm_dynamics(problem, by='unit', weight_decay=decay))
    dynamics = dynamics(KEY, view, batches)

    @jax.jit
    def errors(rate):
        params, speed = parameters(view), jax.tree.map(jnp.zeros_like, parameters(view))
        for _ in range(steps):
            speed = jax.tree.map(lambda v, g: momentum * v + g, speed, drive(params))
            params = jax.tree.map(lambda p, v: p + rate * v, params, speed)
        measured = flow.measured_change(view, at(view, params), by='unit')
        predicted = flow.predicted_change(dynamics, rate, steps=steps, momentum=momentum)
        return ravel_pytree(jax.tree.map(jnp.subtract, predicted, measured))[0], measured

    coarse, measured = errors(1e-2)
    if steps == 1:
        assert np.abs(coarse).max() <= 1e-15
        return
    fine, _ = errors(5e-3)
    assert 7 < np.linalg.norm(coarse) / np.linalg.norm(fine) < 9
    assert np.linalg.norm(coarse) < 0.05 * np.linalg.norm(ravel_pytree(measured)[0])


def test_predicted_change_with_warm_momentum():
    """Expectation: steps of heavy ball after its transient; the error falls with the cube."""
    problem, view, batches = network(jnp.tanh)
    drive, momentum, steps = velocity(problem, view, batches), 0.5, 4

    @jax.jit
    def error(rate):
        def step(_, state):
            params, speed = state
            speed = jax.tree.map(lambda v, g: momentum * v + g, speed, drive(params))
            return jax.tree.map(lambda p, v: p + rate * v, params, speed), speed

        rest = parameters(view), jax.tree.map(jnp.zeros_like, parameters(view))
        warm = jax.lax.fori_loop(0, 60 - steps, step, rest)  # 0.5**60 is below rounding
        before, after = at(view, warm[0]), jax.lax.fori_loop(0, steps, step, warm)[0]
        dynamics = flow.norm_dynamics(problem)(KEY, before, batches)
        predicted = flow.predicted_change(dynamics, rate, steps=steps, momentum=momentum, warm=True)
        measured = flow.measured_change(before, at(view, after))
        return jnp.linalg.norm(ravel_pytree(jax.tree.map(jnp.subtract, predicted, measured))[0])

    assert 7 < error(5e-4) / error(2.5e-4) < 9


def test_predictions_that_need_second_derivatives_say_so():
    problem, view, batches = network(jnp.tanh)
    first = jax.jit(flow.norm_dynamics(problem, second=False))(KEY, view, batches)
    flow.predicted_change(first, 0.1)
    with pytest.raises(jp.PruneError, match='needs norm dynamics with second derivatives'):
        flow.predicted_change(first, 0.1, steps=2)
    with pytest.raises(jp.PruneError, match='need a view with initial weights'):
        flow.distance_from_initial(problem)(KEY, view, None)


# --- conservation -------------------------------------------------------------------------------


def test_homogeneous_layers_keep_their_imbalance():
    """Expectation: `‖W_l‖² - ‖W_(l+1)‖²` and, per hidden unit, `‖w_in‖² - ‖w_out‖²` are constant
    along the flow of a linear network, under a mask; `Θ_lᵀ g_l` is one number for all layers."""
    problem, view, batches = network(lambda x: x, bias=0.0)
    frozen = {p: leaf for p, leaf in parameters(view).items() if p.endswith('b')}
    drive = velocity(problem, view, batches)

    def without_bias(params):
        return {**drive(params), **jax.tree.map(jnp.zeros_like, frozen)}

    end = at(view, jax.jit(lambda: integrate(without_bias, parameters(view), 1.0, 200))())
    view, end = jax.device_get((view, end))
    order = ['0/w', '1/w', '2/w']
    before, after = flow.imbalance(view, order), flow.imbalance(end, order)
    assert list(before) == order[:2]
    assert (
        abs(
            flow.weight_norm(problem)(KEY, end, None)['0/w']
            - flow.weight_norm(problem)(KEY, view, None)['0/w']
        )
        > 1e-3
    )
    for path in before:
        assert_near(after[path], before[path])
    for a, b in (('0/w', '1/w'), ('1/w', '2/w')):
        units = [flow.unit_imbalance(v.weights[a], v.weights[b]) for v in (view, end)]
        assert_near(units[1], units[0])
        assert_near(units[0].sum(), before[a])
    rates = jax.jit(flow.norm_dynamics(problem, second=False))(KEY, view, batches).first
    assert_near([rates[path] for path in order], rates['0/w'])


def test_relu_layers_with_biases_keep_their_imbalance():
    """Expectation: with the bias on the input side, the rate of the imbalance is zero."""
    problem, view, batches = network(jax.nn.relu)
    rates = jax.jit(flow.norm_dynamics(problem, second=False))(KEY, view, batches).first
    for i in (0, 1):
        assert abs(rates[f'{i}/w']) > 1e-3
        assert_near(rates[f'{i}/w'] + rates[f'{i}/b'], rates[f'{i + 1}/w'])
    found = flow.imbalance(view, ['0/w', '1/w'], biases=['0/b', None])['0/w']
    by_hand_ = sum(np.asarray(view.params[0]['b']) ** 2) + (view.weights['0/w'] ** 2).sum()
    assert_near(found, by_hand_ - (view.weights['1/w'] ** 2).sum())
    # Class biases: softmax gradients add up to zero.
    gradient = jax.jit(lambda v: derivatives(problem, KEY, v, batches, train=False).gradient)
    assert_near(np.sum(gradient(view)['2/b']), 0.0)


def test_unit_imbalance_of_flattened_maps():
    """Expectation: a dense kernel behind maps has a row per place and map, maps last."""
    draw = np.random.default_rng(0)
    first, second = draw.standard_normal((3, 3, 2, 4)), draw.standard_normal((9, 4, 5))
    expected = (first**2).sum((0, 1, 2)) - (second**2).sum((0, 2))
    found = flow.unit_imbalance(jnp.asarray(first), jnp.asarray(second.reshape(36, 5)))
    assert_near(found, expected)
    with pytest.raises(jp.PruneError, match='does not read 4 units'):
        flow.unit_imbalance(jnp.asarray(first), jnp.ones((37, 5)))


def test_filters_before_batch_norm_feel_no_radial_gradient():
    """Expectation: cos(w, g) is 0 with batch statistics, not with running ones; ‖w‖² of a filter
    grows by `η² ‖g‖²` per step of gradient descent."""
    problem, view, batches = setting(Normed())
    cosines = jax.jit(flow.radial_gradient(problem))(KEY, view, batches)
    still = jax.jit(flow.radial_gradient(problem, train=False))(KEY, view, batches)
    for path in ('conv/kernel', 'hidden/kernel'):
        assert cosines[path] < 1e-9 and still[path] > 1e-3
    assert cosines['last/kernel'] > 1e-3
    near = jax.jit(flow.norm_dynamics(problem, by='unit', second=False))
    near = jax.device_get(near(KEY, view, batches))
    # So two such layers keep their imbalance, and one of them and the classifier do not.
    rates = jax.jit(flow.norm_dynamics(problem, second=False))
    rates = jax.device_get(rates(KEY, view, batches)).first
    assert abs(rates['conv/kernel'] - rates['hidden/kernel']) < 1e-9
    assert abs(rates['hidden/kernel'] - rates['last/kernel']) > 1e-3
    change = flow.predicted_change(near, 0.1)['conv/kernel']
    np.testing.assert_allclose(change, 0.01 * near.gradient['conv/kernel'], rtol=1e-6)


# --- masks --------------------------------------------------------------------------------------


def fewer(view, share: float, seed: int = 0):
    """Masks within those of the view that remove this share of the weights in force."""
    draw = np.random.default_rng(seed)
    return {
        p: jnp.asarray(np.asarray(m) & (draw.random(m.shape) >= share))
        for p, m in view.masks.items()
    }


def test_loss_change_by_a_mask():
    """Expectation: the loss written out, its gradient, and the matrix of `jax.hessian`."""
    problem, view, batches = network(jnp.tanh)
    masks = fewer(view, 0.2)
    change = jax.jit(flow.loss_change(problem, temperature=2.0))
    found = jax.device_get(change(KEY, view, masks, batches))
    loss = loss_of(problem, view, batches, 2.0)

    @jax.jit
    def written_out(params):
        flat, shaped = ravel_pytree(params)
        step = ravel_pytree(
            {p: jnp.where(masks[p], 0, -w) if p in masks else 0 * w for p, w in params.items()}
        )[0]

        def at_flat(v):
            return loss(shaped(v))

        derivatives = jax.grad(at_flat)(flat), jax.hessian(at_flat)(flat)
        return loss(params), at_flat(flat + step), step, *derivatives

    before, after, step, gradient, hessian = jax.device_get(written_out(parameters(view)))
    assert_near(found.before, before)
    assert_near(found.exact, after - before)
    assert_near(found.first, gradient @ step)
    assert_near(found.second, gradient @ step + step @ hessian @ step / 2)
    assert abs(found.second - found.exact) < abs(found.first - found.exact)


def test_gradient_norm_change_by_a_mask():
    """Expectation: gradients written out, first and second derivatives along the removal from
    `jax.grad` of a scalar; the first is GraSP's measure, -2 Σ θ Hg over the weights removed."""
    problem, view, batches = network(jnp.tanh)
    masks = fewer(view, 0.2)
    found = jax.jit(flow.gradient_norm_change(problem))(KEY, view, masks, batches)
    loss, params = loss_of(problem, view, batches), parameters(view)

    @jax.jit
    def square(s, within):
        moved = {
            p: w - s * jnp.where(masks[p], 0, w) if p in masks else w for p, w in params.items()
        }
        g = jax.grad(loss)(moved)
        return sum((jnp.where(within.get(p, True), leaf, 0) ** 2).sum() for p, leaf in g.items())

    before, slope, bend = (
        float(jax.jit(f)(0.0, view.masks))
        for f in (square, jax.grad(square), jax.grad(jax.grad(square)))
    )
    assert_near(found.full.before, before)
    assert_near(found.full.exact, float(square(1.0, view.masks)) - before)
    assert_near(found.full.first, slope)
    assert_near(found.full.second, slope + bend / 2)
    assert_near(found.survivors, square(1.0, masks))
    signed = jax.jit(importance(problem, order=2, mode='signed'))(KEY, view, batches)
    removed = sum(np.where(masks[p], 0, leaf).sum() for p, leaf in signed.items())
    assert_near(found.full.first, -2 * removed)


def test_evolution_error_of_a_mask():
    """Expectation: |Σ θ g over what is removed|, and over ‖θ‖ ‖g‖; a mask that removes nothing
    has none; dead layers are no NaN."""
    problem, view, batches = network(jnp.tanh)
    masks = fewer(view, 0.3)
    measure = jax.jit(flow.evolution_error(problem))
    found = measure(KEY, view, masks, batches)
    g = jax.jit(jax.grad(loss_of(problem, view, batches)))(parameters(view))
    for path, w in view.weights.items():
        gradient = np.where(view.masks[path], g[path], 0)
        lost = abs((np.asarray(w) * gradient)[~np.asarray(masks[path])].sum())
        assert_near(found.absolute[path], lost)
        assert_near(found.relative[path], lost / np.linalg.norm(w) / np.linalg.norm(gradient))
    none = measure(KEY, view, view.masks, batches)
    assert not any(leaf for leaf in jax.tree.leaves(none))
    dead = jp.view(problem, view.params, None, jax.tree.map(jnp.zeros_like, view.masks))
    assert not any(jax.tree.leaves(measure(KEY, dead, dead.masks, batches)))
    with pytest.raises(jp.PruneError, match='masks lack'):
        measure(KEY, view, {'0/w': masks['0/w']}, batches)


# --- curvature ----------------------------------------------------------------------------------


@functools.cache
def with_hessian():
    """Problem, view, data, and the Hessian of what moves."""
    problem, view, batches = network(jnp.tanh)
    flat, shaped = ravel_pytree(parameters(view))
    loss = loss_of(problem, view, batches)
    hessian = np.asarray(jax.jit(jax.hessian(lambda v: loss(shaped(v))))(flat))
    moves = {
        p: view.masks[p] if p in view.masks else jnp.ones(w.shape, bool)
        for p, w in parameters(view).items()
    }
    alive = np.asarray(ravel_pytree(moves)[0])
    gradient = jax.jit(jax.grad(lambda v: loss(shaped(v))))(flat)
    gradient = np.asarray(gradient)[alive]
    return problem, view, batches, hessian[np.ix_(alive, alive)], gradient


def test_curvature_of_what_moves():
    """Expectation: gᵀHg and eigenvalues of the Hessian's rows and columns that are not pruned."""
    problem, view, batches, hessian, gradient = with_hessian()
    bent = jax.jit(flow.gradient_curvature(problem, by='layer'))(KEY, view, batches)
    assert_near(sum(bent.values()), gradient @ hessian @ gradient)
    values = np.linalg.eigvalsh(hessian)[::-1]
    found = jax.jit(flow.hessian_eigenvalues(problem, count=5, steps=len(hessian)))(
        KEY, view, batches
    )
    assert_near(found, values[:5])
    few = jax.jit(flow.hessian_eigenvalues(problem, count=2, steps=12))(KEY, view, batches)
    assert (few <= values[:2] + 1e-12).all() and few[0] > 0.999 * values[0]


def test_trace_and_density_of_the_hessian():
    """Expectation: Hutchinson's estimate within five of its own standard deviations; the
    density's weights are one, its extremes the eigenvalues, its moments those of the Hessian."""
    problem, view, batches, hessian, _ = with_hessian()
    probes = 4000
    spread = np.sqrt(2 * ((hessian - np.diag(np.diag(hessian))) ** 2).sum() / probes)
    found = jax.jit(flow.hessian_trace(problem, probes=probes))(KEY, view, batches)
    assert abs(found - np.trace(hessian)) < 5 * spread < 0.2 * np.trace(hessian)
    density = jax.jit(flow.spectral_density(problem, steps=30, probes=60))(KEY, view, batches)
    assert_near(density.weights.sum(), 1.0)
    assert (np.isnan(density.values) == (density.weights == 0))[np.isnan(density.values)].all()
    values = np.linalg.eigvalsh(hessian)
    assert np.nanmax(density.values) <= values[-1] + 1e-12
    for power in (1, 2):
        moment = np.nansum(density.weights * density.values**power)
        expected = (values**power).mean()
        # Of one probe vᵀHᵏv / vᵀv, the standard deviation is about sqrt(2 var(λᵏ) / n).
        deviation = np.sqrt(2 * (values**power).var() / len(values) / 60)
        assert abs(moment - expected) < 5 * deviation
    grid = jnp.linspace(-5, 10, 4001)
    curve = flow.smoothed(density, grid, 0.05)
    assert_near(np.trapezoid(curve, grid), 1.0, 1e-6)


def test_krylov_spaces_that_run_out():
    """Expectation: a matrix of three different eigenvalues has three Ritz values, then NaN;
    the zero matrix has one; entries that are zero in the start are never seen."""
    values = np.array([3.0, 3.0, -2.0, -2.0, 1.0])

    @functools.partial(jax.jit, static_argnums=2)
    def spectrum(values, start, steps):
        return ritz(lambda v: values * v, start, steps)

    found = jax.device_get(spectrum(values, np.arange(1.0, 6.0), 5))
    assert_near(found.values[:3], [3.0, 1.0, -2.0])
    assert np.isnan(found.values[3:]).all() and not found.weights[3:].any()
    assert_near(found.weights[:3], np.array([5, 25, 25]) / 55)
    nothing = jax.device_get(spectrum(np.zeros(4), np.ones(4), 3))
    assert_near(nothing.values[0], 0.0)
    part = jax.device_get(spectrum(values, np.array([0.0, 0, 1, 0, 1]), 9))
    assert_near(part.values[:2], [1.0, -2.0])


# --- tangent kernel -----------------------------------------------------------------------------


@pytest.mark.parametrize('outputs', ['logits', 'sum'])
def test_tangent_kernel(outputs):
    """Expectation: `J Jᵀ` of a Jacobian by forward mode, columns of pruned weights left out."""
    problem, view, batches = network(jax.nn.relu)
    flat, shaped = ravel_pytree(parameters(view))
    x = batches.x.reshape(-1, SIZES[0])

    def f(v):
        logits = problem.apply(tree.put(view.params, shaped(v)), {}, x, train=False, key=None)[0]
        return (logits.sum(1) if outputs == 'sum' else logits).ravel()

    moves = np.concatenate(
        [np.ravel(view.masks.get(p, np.ones(w.shape))) for p, w in sorted(parameters(view).items())]
    )
    jacobian = np.asarray(jax.jit(jax.jacfwd(f))(flat)) * moves
    expected = jacobian @ jacobian.T
    kernel = jax.jit(flow.tangent_kernel(problem, outputs=outputs))(KEY, view, batches)
    assert_near(kernel, expected)
    values = np.linalg.eigvalsh(expected)
    largest = flow.ntk_largest(problem, steps=40, outputs=outputs)
    assert_near(jax.jit(largest)(KEY, view, batches), values[-1])
    assert_near(jax.jit(flow.ntk_trace(problem, outputs=outputs))(KEY, view, batches), values.sum())
    probes = 300
    spread = np.sqrt(2 * (expected**2).sum() / probes)
    estimate = jax.jit(flow.ntk_trace(problem, probes=probes, outputs=outputs))(KEY, view, batches)
    assert abs(estimate - values.sum()) < 5 * spread
    spectrum = flow.kernel_spectrum(kernel)
    assert_near([spectrum.trace, spectrum.largest], [values.sum(), values[-1]])
    assert_near(spectrum.effective_rank, values.sum() ** 2 / (values**2).sum())


def test_kernels_compared():
    """Expectation: by hand; a factor does not count, and a singular kernel has no condition."""
    a = jnp.diag(jnp.array([4.0, 1.0]))
    b = jnp.diag(jnp.array([1.0, 4.0]))
    assert_near(flow.kernel_spectrum(a), [5.0, 4.0, 4.0, 25 / 17])
    assert_near(flow.kernel_distance(a, b), 1 - 8 / 17)
    assert flow.kernel_distance(a, 3 * a) < 1e-30
    assert np.isinf(flow.kernel_spectrum(jnp.ones((2, 2))).condition)
    with pytest.raises(jp.PruneError, match="unknown outputs 'logit': did you mean 'logits'"):
        flow.tangent_kernel(network(jnp.tanh)[0], outputs='logit')


# --- agreement, speed ---------------------------------------------------------------------------


def test_agreement_is_that_of_scipy():
    """Expectation: scipy's coefficients of the entries in force, ties included; overlap by sets."""
    import scipy.stats

    draw = np.random.default_rng(0)
    one = {'a': draw.integers(0, 9, (6, 5)) * 1.0, 'b': draw.standard_normal(40)}
    other = {p: v + draw.integers(-2, 3, v.shape) for p, v in one.items()}
    masks = {p: draw.random(v.shape) < 0.7 for p, v in one.items()}
    found = jax.jit(functools.partial(flow.agreement, density=0.25))(
        *(jax.tree.map(jnp.asarray, t) for t in (one, other, masks))
    )
    groups = {p: (one[p][masks[p]], other[p][masks[p]]) for p in one}
    groups['*'] = tuple(np.concatenate(v) for v in zip(*groups.values(), strict=True))
    for path, (a, b) in groups.items():
        assert_near(found.pearson[path], scipy.stats.pearsonr(a, b)[0])
        assert_near(found.spearman[path], scipy.stats.spearmanr(a, b)[0])
        k = round(0.25 * len(a))
        tops = [set(np.argsort(-v, kind='stable')[:k].tolist()) for v in (a, b)]
        assert_near(found.overlap[path], len(tops[0] & tops[1]) / k)
    pearson = jax.jit(flow.pearson)
    constant = pearson(np.ones(4), np.arange(4.0), np.ones(4, bool))
    assert np.isnan(constant)
    # The mean of many equal numbers is off by a rounding error, alike for all of them.
    many = [np.full(1000, value, np.float32) for value in (0.1, 0.2, 0.3)]
    for one, other in itertools.product([*many, np.arange(1000.0)], many):
        assert np.isnan(pearson(one, other, np.ones(1000, bool)))
    tiny = np.arange(4, dtype=np.float32) * np.float32(1e-30)  # squares would leave float32
    assert_near(pearson(tiny, tiny, np.ones(4, bool)), 1.0, 1e-6)


def test_agreement_of_broken_measures():
    """Expectation: NaN where a value that counts is NaN, or none counts, no plausible number."""
    agreement = jax.jit(flow.agreement)
    ramp, none = np.arange(5.0), np.zeros(5, bool)
    broken = np.where(ramp == 2, np.nan, ramp)
    for one, keep in ((broken, ~none), (ramp, none), (np.full(5, np.nan), ~none)):
        for found in agreement({'w': one}, {'w': ramp}, {'w': keep}):
            assert np.isnan(found['w'])
    elsewhere = jax.device_get(agreement({'w': broken}, {'w': ramp}, {'w': ramp != 2}))
    assert elsewhere.spearman['w'] == 1 and elsewhere.pearson['w'] > 1 - 1e-12
    half = np.random.default_rng(0).standard_normal(2000).astype(jnp.bfloat16)
    wide = half.astype(np.float32)
    assert_near(jax.jit(flow.spearman)(half, wide, wide == wide), 1.0, 1e-6)
    for options, message in (
        ({'density': 2}, 'density must be in'),
        ({'masks': {}}, 'masks lack w'),
    ):
        with pytest.raises(jp.PruneError, match=message):
            flow.agreement({'w': ramp}, {'w': ramp}, **options)


def test_training_speed():
    """Expectation: by hand."""
    losses = np.array([[4.0, 3.0, 1.0, 2.0, 0.5], [4.0, 4.0, 4.0, 4.0, 4.0]])
    speed = jax.jit(flow.training_speed, static_argnames='last')
    steps = jax.jit(flow.steps_to_loss, static_argnames='window')
    np.testing.assert_array_equal(speed(losses), [10.5, 20.0])
    np.testing.assert_array_equal(speed(losses, last=2), [2.5, 8.0])
    np.testing.assert_array_equal(steps(losses, 2.0), [3, np.inf])
    np.testing.assert_array_equal(steps(losses, 1.5, window=2), [4, np.inf])
    np.testing.assert_array_equal(steps(losses, np.array([0.5, 4.0])), [5, 1])
    # Small losses behind large ones, in float32: a running sum would lose them.
    long = np.repeat(np.array([2.3, 1e-4], np.float32), 1000)
    assert steps(long, 1e-5) == np.inf and steps(long, 1.5e-4) == 1001
    assert steps(np.array([np.nan, 1.0]), 1.0) == 2
    for call in (
        lambda: flow.steps_to_loss(losses, 1.0, window=0),
        lambda: flow.steps_to_loss(losses, 1.0, window=6),
        lambda: flow.training_speed(losses, last=-1),
    ):
        with pytest.raises(jp.PruneError, match=r'window must be|last must be'):
            call()
    a = jnp.array([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    b = jnp.array([[1.0, 2.0], [0.0, 3.0], [2.0, 1.0]])
    assert_near(flow.churn(a, b), 2 / 3, 1e-6)


# --- laws ---------------------------------------------------------------------------------------


FEW = ['norm_rate', 'radial_gradient', 'ntk_effective_rank', 'jsv_mean', 'spearman_magnitude_loss']


@pytest.mark.parametrize(
    'names', [FEW, pytest.param(list(flow.QUANTITIES), marks=pytest.mark.slow)]
)
def test_measures_are_pure_functions_for_vmap(names):
    """Expectation: over seeds and masks at once, each entry is that of its own call."""
    problem, view, batches = network(jnp.tanh)

    def everything(key, masks):
        params, _ = problem.init(key)
        here = jp.view(problem, params, None, masks)._replace(initial=view.weights)
        return {
            name: flow.quantity(name).make(problem, ('0/w', '1/w', '2/w'))(KEY, here, batches)
            for name in names
        }

    keys = jax.random.split(jax.random.key(5), 2)
    masks = [fewer(view, share) for share in (0.1, 0.4)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *masks)
    over = jax.jit(jax.vmap(jax.vmap(everything, (None, 0)), (0, None)))(keys, stacked)
    single = jax.jit(everything)
    for i, j in ((0, 1), (1, 0)):
        for name, by_path in single(keys[i], masks[j]).items():
            for path, value in by_path.items():
                assert value.shape == ()
                # Nearly singular kernels have a condition of rounding errors.
                if name != 'ntk_condition':
                    assert_near(over[name][path][i, j], value)


CONV = {
    'name': 'recorded',
    'model': {'name': 'small_vgg', 'widths': [4, 8]},
    'data': {'name': 'mnist_small', 'train_examples': 64, 'test_examples': 50},
    'train': {'epochs': 1, 'batch_size': 32, 'learning_rate': 0.01},
    'prune': {'samples_per_class': 2},
    'grid': {'method': ['magnitude'], 'compression': [1, 2], 'seed': [0, 1]},
}


@pytest.mark.parametrize('batching', ['vmap', 'map', 'unroll'])
@pytest.mark.slow
def test_recorded_of_convolutions(tmp_path, batching):
    """Expectation: every quantity of every run, however runs are laid out; numbers, but for
    conditions of singular matrices."""
    names = list(flow.QUANTITIES)
    table = {**CONV, 'record': {'every': 2, 'flow': names}, 'engine': {'batching': batching}}
    with jax.enable_x64(False):
        jp.run_sweep(table, out=tmp_path / 'runs')
    found = read_flow(tmp_path / 'runs')
    assert set(found['quantity']) == set(names) and found['run_id'].n_unique() == 4
    rest = found.filter(~pl.col('quantity').str.contains('condition|imbalance'))
    assert rest['value'].is_finite().all()


def test_kernels_of_a_sweep_see_all_classes():
    """Expectation: the examples of the recorded kernel are spread over the classes, whatever the
    number of examples of each; a kernel of them, by `tangent_kernel` of those examples."""
    problem, view, _ = network(jnp.tanh)
    for per_class, several in ((10, 1), (10, 8), (10, 32), (5, 16), (1, 1)):
        indices = []

        def apply(params, state, x, *, train, key, indices=indices):
            jax.debug.callback(lambda c: indices.append(int(c)), x[0, 0])
            return problem.apply(params, state, x, train=train, key=key)

        classes = np.tile(np.repeat(np.arange(10), per_class), (several, 1))
        x = np.zeros((several, 10 * per_class, SIZES[0]))
        x[..., 0] = classes
        measure = flow.quantity('ntk_trace').make(problem._replace(apply=apply), ())
        jax.jit(measure)(KEY, view, jp.Batch(x, classes))
        jax.effects_barrier()
        assert set(indices) == set(range(10))
    with pytest.raises(jp.PruneError, match='needs data'):
        measure(KEY, view, None)


def test_numbers_that_cannot_be():
    problem, view, batches = network(jnp.tanh)
    for make, message in (
        (lambda: flow.hessian_eigenvalues(problem, steps=2.5), 'steps must be a whole number'),
        (lambda: flow.hessian_eigenvalues(problem, count=0), 'count must be at least 1'),
        (lambda: flow.hessian_trace(problem, probes=0), 'probes must be at least 1'),
        (lambda: flow.spectral_density(problem, steps=0), 'steps must be at least 1'),
        (lambda: flow.ntk_largest(problem, steps=0), 'steps must be at least 1'),
        (lambda: flow.ntk_trace(problem, probes=-1), 'probes must be at least 0'),
        (lambda: flow.norm_dynamics(problem, by='filter'), "unknown groups 'filter'"),
        (lambda: flow.gradient_curvature(problem, by='filter'), "unknown groups 'filter'"),
        (lambda: flow.evolution_error(problem, by='filter'), "unknown groups 'filter'"),
        (lambda: flow.distance_rate(problem, by='filter'), "unknown groups 'filter'"),
        (lambda: flow.agreement({}, {}), 'nothing to compare'),
        (lambda: flow.churn(jnp.ones((20, 4)), jnp.ones((1, 4))), 'logits have shapes'),
        (
            lambda: flow.loss_change(problem, temperature=0.0)(KEY, view, view.masks, batches),
            'above 0',
        ),
        (lambda: flow.imbalance(view, ['0/w', '1/w'], biases=[None]), '2 layers have 2 biases'),
        (lambda: flow.gradient_norm(problem)(KEY, view, None), 'this needs data'),
    ):
        with pytest.raises(jp.PruneError, match=message):
            make()
    dynamics = jax.jit(flow.norm_dynamics(problem, second=False))(KEY, view, batches)
    for call, message in (
        (lambda: flow.predicted_change(dynamics, 0.1, momentum=1.0), 'momentum must be in'),
        (lambda: flow.predicted_change(dynamics, 0.1, steps=0), 'steps must be at least 1'),
        (lambda: flow.saliency_drift(dynamics), 'needs norm dynamics with second'),
    ):
        with pytest.raises(jp.PruneError, match=message):
            call()


def test_masks_that_cannot_be():
    """Expectation: soft masks and masks of other shapes are refused, not broadcast or rounded."""
    problem, view, batches = network(jnp.tanh)
    soft = {path: jnp.full(w.shape, 0.3) for path, w in view.weights.items()}
    small = {path: jnp.ones((1, 1), bool) for path in view.weights}
    optimizer = optax.sgd(0.1)
    for masks, message in ((soft, 'must be boolean'), (small, 'has shape')):
        for call in (
            lambda m: flow.loss_change(problem)(KEY, view, m, batches),
            lambda m: flow.gradient_norm_change(problem)(KEY, view, m, batches),
            lambda m: flow.evolution_error(problem)(KEY, view, m, batches),
            lambda m: flow.agreement(view.weights, view.weights, m),
            lambda m: flow.approximately_orthogonal(view.weights, m, optimizer, steps=1),
            lambda m: flow.orthp(view.weights, m),
        ):
            with pytest.raises(jp.PruneError, match=message):
                call(masks)


def test_momentum_may_be_traced():
    """Expectation: a vmapped prediction equals that of each momentum."""
    problem, view, batches = network(jnp.tanh)
    dynamics = jax.jit(flow.norm_dynamics(problem))(KEY, view, batches)
    for steps, warm in ((1, False), (5, False), (3, True)):
        predict = functools.partial(flow.predicted_change, dynamics, 0.1, steps=steps, warm=warm)
        over = jax.vmap(lambda m, predict=predict: predict(momentum=m))(jnp.array([0.0, 0.9]))
        for i, momentum in enumerate((0.0, 0.9)):
            for path, value in predict(momentum=momentum).items():
                assert_near(over[path][i], value)
    first = jax.jit(flow.norm_dynamics(problem, second=False))(KEY, view, batches)
    one = jax.jit(lambda m: flow.predicted_change(first, 0.1, momentum=m))(0.9)
    assert_near(one['0/w'], flow.predicted_change(dynamics, 0.1, momentum=0.9)['0/w'])


def test_diverged_networks_have_no_churn():
    logits = jnp.array([[[0.0, 1.0], [1.0, 0.0]], [[jnp.nan, 1.0], [1.0, 0.0]]])
    found = flow.churn(logits, logits[0][:, ::-1])
    assert found[0] == 1 and jnp.isnan(found[1])


def test_names_of_quantities():
    with pytest.raises(
        jp.PruneError, match="unknown quantity 'weight_nrm': did you mean 'weight_norm"
    ):
        flow.quantity('weight_nrm')
