"""SynFlow outside the range of float32, and the scaled numbers that carry it there.

Deep networks run op by op where one compilation would take longer than all calls together.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.score import scaled

KEY = jax.random.key(0)
SINGLE = 2e-5  # relative, of single numbers after hundreds of roundings in float32


def mlp(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer['w'] + layer['b'])
    return x @ params[-1]['w'] + params[-1]['b']


def random_mlp(depth: int, scale: float, bias: float, width: int = 8):
    """Weights of deviation `scale / sqrt(inputs)`, float32 numbers in NumPy."""
    draw = np.random.default_rng(depth)
    sizes = [6, *[width] * (depth - 1), 3]
    return [
        {
            'w': (draw.standard_normal((a, b)) * scale / np.sqrt(a)).astype(np.float32),
            'b': (bias * draw.standard_normal(b)).astype(np.float32),
        }
        for a, b in itertools.pairwise(sizes)
    ]


def setting(params, forward=mlp, shape=(6,), masks=None):
    problem = jp.problem_from_functions(lambda key: params, forward)
    batches = jp.Batch(jnp.zeros((1, 1, *shape)), jnp.zeros((1, 1), int))
    return problem, jp.view(problem, jax.tree.map(jnp.asarray, params), masks=masks), batches


def synflow_by_hand(params):
    """Path sums forward and back in extended precision, whose range is that of 2**16383."""
    wide = jax.tree.map(lambda leaf: np.abs(leaf).astype(np.longdouble), params)
    flows = [np.ones(wide[0]['w'].shape[0], np.longdouble)]
    for layer in wide:
        flows.append(flows[-1] @ layer['w'] + layer['b'])
    back, scores = np.ones(wide[-1]['w'].shape[1], np.longdouble), []
    for layer, flow in zip(wide[::-1], flows[-2::-1], strict=True):
        scores.insert(0, flow[:, None] * layer['w'] * back)
        back = layer['w'] @ back
    return scores


def common_factor(ours, reference, tolerance=SINGLE):
    """The exponent of the power of two between two sets of scores; checks that there is one.

    Every number is compared on its own, so the rankings agree but for ties within `tolerance`.
    """
    a = np.concatenate([np.ravel(leaf) for leaf in ours]).astype(np.longdouble)
    b = np.concatenate([np.ravel(leaf) for leaf in reference])
    assert np.isfinite(a).all()
    power = np.log2(a[b.argmax()] / b.max())
    assert abs(power - np.round(power)) < 1e-4
    # What is smaller than the largest by the range of float32 may be zero.
    seen = b > b.max() * np.longdouble(2.0) ** -80
    error = abs(a[seen] / np.exp2(np.round(power)) / b[seen] - 1).max()
    assert error <= tolerance, f'{float(error):.2g}'
    assert (a[~seen] <= a[seen].min(initial=np.inf)).all()
    return int(np.round(power))


@pytest.mark.slow
@pytest.mark.parametrize('bias', [0.0, 1.0])
@pytest.mark.parametrize('scale', [1e-3, 0.1, 1.0, 1e4])
def test_a_hundred_layers(scale, bias):
    """Expectation: path sums in extended precision, up to one power of two. Plainly computed they
    would reach 1e400 or 1e-300; with biases the first layers' may be too small to be told from 0
    beside the last ones'."""
    params = random_mlp(100, scale, bias)
    problem, view, batches = setting(params)
    ours = jp.synflow(problem)(KEY, view, batches)
    reference = synflow_by_hand(params)
    power = common_factor([ours[f'{i}/w'] for i in range(100)], reference)
    largest = max(float(leaf.max()) for leaf in ours.values())
    assert 2.0**-33 <= largest < 2.0**67
    exact = float(np.log2(max(leaf.max() for leaf in reference)))
    assert (power == 0) == (-32 <= exact <= 64)
    if bias == 0:
        assert abs(exact) > 130 or scale == 1.0
        sums = [np.asarray(leaf, np.float64).sum() for leaf in ours.values()]
        np.testing.assert_allclose(sums, sums[0], rtol=SINGLE)


def plain_synflow(problem, view, x):
    """The published computation, in the precision of what it is given."""
    frozen, state = jax.tree.map(jnp.abs, (view.params, view.model_state))

    def flow(weights):
        return problem.apply(jp.put(frozen, weights), state, x, train=False, key=None)[0].sum()

    positive = {path: jnp.abs(w) for path, w in view.weights.items()}
    gradient = jax.grad(flow)(positive)
    return {path: jnp.abs(w * gradient[path]) for path, w in positive.items()}


def residual(params, x):
    """A residual network: conv - norm - relu - conv - norm, plus the input."""

    def conv(x, w, stride=1):
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )

    def norm(x, p):
        return (x - p['mean']) * (p['scale'] * jax.lax.rsqrt(p['var'] + 1e-5)) + p['bias']

    x = conv(x, params['stem']['w'])
    for block in params['blocks']:
        y = jax.nn.relu(norm(conv(x, block[0]['w']), block[0]))
        y = norm(conv(y, block[1]['w']), block[1])
        x = jax.nn.relu(x + y)
    x = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), 'VALID')
    return x.mean((1, 2)) @ params['last']['w']


def random_residual(blocks: int, scale: float, bias: float, width: int = 3):
    draw = np.random.default_rng(0)

    def layer(inputs, side=3):
        return {
            'w': (scale * draw.standard_normal((side, side, inputs, width))).astype(np.float32),
            'mean': (0.1 * bias * abs(draw.standard_normal(width))).astype(np.float32),
            'var': draw.uniform(0.5, 2, width).astype(np.float32),
            'scale': draw.uniform(0.5, 2, width).astype(np.float32),
            'bias': (bias * draw.standard_normal(width)).astype(np.float32),
        }

    return {
        'stem': layer(2),
        'blocks': [[layer(width), layer(width)] for _ in range(blocks)],
        'last': {'w': draw.standard_normal((width, 2)).astype(np.float32)},
    }


SMALL = {'layers': (mlp, (6,), random_mlp), 'residual': (residual, (4, 4, 2), random_residual)}


@functools.cache
def small(name: str):
    """`(scale, bias) -> parameters` of a network of that kind, and its compiled scores."""
    forward, shape, draw = SMALL[name]
    problem, _, batches = setting(draw(2, 1.0, 0.0), forward, shape)

    def score(params):
        return jp.synflow(problem)(KEY, jp.view(problem, params), batches)

    def plain(params):
        return plain_synflow(problem, jp.view(problem, params), jnp.ones((1, *shape)))

    return functools.partial(draw, 2), jax.jit(score), jax.jit(plain)


def in_double(plain, params) -> list[np.ndarray]:
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        return [np.asarray(leaf, np.longdouble) for leaf in plain(wide).values()]


@pytest.mark.parametrize('name', SMALL)
def test_ordinary_networks_score_as_published(name):
    """Expectation: the plain float32 computation to its last digits: no power of two is left."""
    draw, score, plain = small(name)
    params = draw(0.5, 0.5)
    ours = score(params)
    for path, leaf in plain(params).items():
        np.testing.assert_allclose(ours[path], leaf, rtol=1e-6, err_msg=path)


@pytest.mark.parametrize('bias', [0.0, 1.0])
@pytest.mark.parametrize('scale', [1e-16, 1e16])
@pytest.mark.parametrize('name', SMALL)
def test_other_scales(name, scale, bias):
    """Expectation: the plain computation in float64, up to one power of two."""
    draw, score, plain = small(name)
    params = draw(scale, bias)
    common_factor(score(params).values(), in_double(plain, params))


@pytest.mark.slow
@pytest.mark.parametrize('bias', [0.0, 1.0])
@pytest.mark.parametrize('scale', [1e-3, 1e3])
def test_a_deep_residual_network(scale, bias):
    """Expectation: the plain computation in float64, whose range holds these; without a bias up to
    1e150. Skip connections hold the small scale at an ordinary size."""
    params = random_residual(20, scale, bias)
    problem, view, batches = setting(params, residual, (4, 4, 2))
    ours = jp.synflow(problem)(KEY, view, batches)

    def plain(wide):
        return plain_synflow(problem, jp.view(problem, wide), jnp.ones((1, 4, 4, 2)))

    power = common_factor(ours.values(), in_double(plain, params), 2e-4)
    assert (power < -80) == (scale > 1)


def test_a_hundred_rounds_keep_every_layer():
    """Expectation: with one `scan` over rounds down to 3 weights per layer counts are exact, each
    layer keeps a path, and all layers sum to R (maximal critical compression, theorem 3)."""
    depth = 12
    params = random_mlp(depth, 3e4, 0.0)
    problem, view, batches = setting(params)
    pruner = jp.get_pruner(problem, 'synflow')
    shapes = jp.shapes(view.weights)
    total = sum(np.prod(shape) for shape in shapes.values())
    counts = jp.plan_rounds(shapes, 3 * depth / total, rounds=100).counts

    @jax.jit
    def all_rounds(counts):
        found, infos = jp.prune_rounds(pruner, KEY, view, counts, batches)
        return found.masks, infos, jp.synflow(problem)(KEY, found, batches)

    masks, infos, last = all_rounds(counts)
    kept = sum(infos.kept.values())
    np.testing.assert_array_equal(kept, counts['*'])
    assert not np.any(infos.nonfinite)
    assert kept[-1] == 3 * depth
    sums = np.array([leaf.sum() for leaf in last.values()])
    assert (sums > 0).all()
    np.testing.assert_allclose(sums, sums[0], rtol=SINGLE)
    for path, mask in masks.items():  # no weight is kept off every path
        np.testing.assert_array_equal(np.asarray(last[path]) > 0, mask, err_msg=path)


def test_runs_of_very_different_scale_under_vmap():
    """Expectation: each run has exponents of its own: N vmapped runs are N single runs."""
    draw, score, _ = small('layers')
    nets = [draw(scale, 0.0) for scale in (1e-30, 1.0, 1e25)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *nets)
    together = jax.jit(jax.vmap(score))(stacked)
    for i, net in enumerate(nets):
        for path, leaf in score(net).items():
            np.testing.assert_allclose(together[path][i], leaf, rtol=1e-6, err_msg=f'{i} {path}')
            assert np.isfinite(leaf).all() and leaf.max() > 0


def test_no_path_and_broken_weights():
    """Expectation: a network cut in two scores 0 throughout; NaN is passed on to be reported, and
    does not become a number."""
    draw, score, _ = small('layers')
    params = draw(1.0, 0.0)
    cut = [params[0], {**params[1], 'w': 0 * params[1]['w']}]
    for path, leaf in score(cut).items():
        np.testing.assert_array_equal(leaf, 0, err_msg=path)
    broken = [params[0], {**params[1], 'w': np.where(params[1]['w'] > 0.5, np.nan, params[1]['w'])}]
    assert 0 < np.isnan(broken[1]['w']).sum() < broken[1]['w'].size
    scores = score(broken)
    np.testing.assert_array_equal(np.isnan(scores['1/w']), np.isnan(broken[1]['w']))
    assert np.isnan(scores['0/w']).any()


# --- the arithmetic ---------------------------------------------------------------------------

x = jnp.arange(1.0, 25.0).reshape(2, 4, 3) / 7 - 1.6
window = jax.lax.reduce_window
FAR = 5000
index = jnp.array([2, 0])
rows = jnp.array([[0.5, -2.0, 1.0]])

#: Positively homogeneous of degree one: what they do to a multiple they do to the number.
HOMOGENEOUS = {
    'add': lambda a: a + a[:1] - 2 * a,
    'relu': lambda a: jax.nn.relu(a) + jax.nn.leaky_relu(-a),
    'abs': lambda a: jnp.abs(a) * jnp.sign(a),
    'concatenate': lambda a: jnp.concatenate([a, jnp.zeros_like(a), a[:, ::-1]], 1),
    'pad': lambda a: jnp.pad(a, ((0, 0), (1, 2), (0, 0))),
    'split': lambda a: jnp.split(a, 2, axis=1)[1].transpose(2, 0, 1).reshape(3, -1),
    'index': lambda a: a[:, index] + a[:, :2],
    'set': lambda a: a.at[:, index].add(a[:, :2]).at[0].set(3 * a[1]),
    'where': lambda a: jnp.where(a > a.mean(), a, -a) + jnp.where(a > 0, a, -jnp.inf).max(),
    'mask': lambda a: (jnp.zeros_like(a).at[0].set(-jnp.inf) + a).max() * jnp.ones_like(a),
    'cumsum': lambda a: jnp.cumsum(a, 1) + a.sum(),
    'extrema': lambda a: jnp.clip(a, a.min() / 2, a.max() / 2) + jnp.maximum(a, a[::-1]),
    'quotient': lambda a: a * a / (jnp.abs(a).max() + jnp.abs(a)) * 3,
    'square': lambda a: a**2 / jnp.abs(a).max() + a**3 / jnp.square(a).sum(),
    'product': lambda a: jnp.einsum('ijk,lk->ijl', a, rows) + a @ a[0].T @ a[0] / (a**2).sum(),
    'max pool': lambda a: window(a, -jnp.inf, jax.lax.max, (1, 2, 1), (1, 2, 1), 'SAME'),
    'mean pool': lambda a: window(a, 0.0, jax.lax.add, (1, 2, 1), (1, 1, 1), 'SAME'),
    'calls': lambda a: jax.checkpoint(jax.jit(lambda b: jax.nn.relu(b) * 2))(a),
}
#: Others: numbers of another size would be another function.
GENERAL = {
    'bias': lambda a: jax.nn.relu6(a + rows) - 0.3,
    'exp': lambda a: jnp.exp(a) + jnp.tanh(a) * a,
    'softmax': lambda a: jax.nn.softmax(a) * a,
    'loop': lambda a: jax.lax.fori_loop(0, 3, lambda i, b: b * a + 1, a),
    'compare': lambda a: (a > 0.5).astype(a.dtype) * a + (a == a).astype(a.dtype),
    'weight norm': lambda a: a / jnp.sqrt((a * a).sum() + 1e-6),
}


def value_and_gradient(fn):
    def both(a, weight):
        def total(a):
            out = fn(a)
            return (out * weight[: out.size].reshape(out.shape)).sum(), out

        gradient, out = jax.grad(total, has_aux=True)(a)
        return out, gradient

    return both


#: What dense, convolution and residual networks are made of; the others are tested less often.
COMMON = ('add', 'relu', 'where', 'mask', 'pad', 'set', 'max pool', 'mean pool', 'calls', 'bias')
RARE = tuple(name for name in (*HOMOGENEOUS, *GENERAL) if name not in COMMON)


@functools.cache
def results(names):
    """Name -> plainly computed, in scaled numbers, those of homogeneous functions at 2**5000."""

    def arrays(numbers):
        return [(n.array, jnp.asarray(n.exponent)) for n in numbers]

    # Compiled fast rather than well: it is called once.
    @functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
    def compute(x, weight):
        near = scaled.normalise(x)
        far = near._replace(exponent=near.exponent + FAR)
        found = {}
        for name in names:
            both = value_and_gradient({**HOMOGENEOUS, **GENERAL}[name])
            number = far if name in HOMOGENEOUS else near
            found[name] = both(x, weight), arrays(scaled.evaluate(both, number, weight))
        return found

    return jax.device_get(compute(x, jnp.cos(jnp.arange(80.0))))


def plain(array, exponent, power: int = 0) -> np.ndarray:
    return np.ldexp(np.asarray(array, np.float64), np.asarray(exponent, np.int64) - power)


@pytest.mark.parametrize(
    'name', [*COMMON, *(pytest.param(name, marks=pytest.mark.slow) for name in RARE)]
)
def test_operations_and_their_gradients(name):
    """Expectation: `fn` and its gradient as JAX computes them; homogeneous functions of numbers
    near 2**5000 have a value 2**5000 times as large, and the same gradient."""
    names = COMMON if name in COMMON else RARE
    (value, gradient), (our_value, our_gradient) = results(names)[name]
    power = FAR if name in HOMOGENEOUS else 0
    np.testing.assert_allclose(plain(*our_value, power), value, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(plain(*our_gradient), gradient, rtol=1e-5, atol=1e-5)


def test_a_scan_is_computed_as_written():
    """Expectation: the docstring of `evaluate`: squared in a scan 1e-30 vanishes in float32, as JAX
    computes it; squared outside it is 1e-60."""

    def squared(a):
        return jax.lax.scan(lambda h, _: (h * h, None), a, length=1)[0]

    small = scaled.normalise(jnp.float32(1e-30))
    assert float(scaled.evaluate(squared, small).array) == float(squared(jnp.float32(1e-30))) == 0
    np.testing.assert_allclose(plain(*scaled.evaluate(jnp.square, small)[:2]), 1e-60, rtol=1e-6)


def test_types_stay_when_double_precision_is_enabled():
    """Expectation: constants written into a function do not widen single precision to double."""
    with jax.enable_x64(True):
        number = scaled.evaluate(lambda a: jnp.maximum(a, 0.5), scaled.normalise(x))
        assert number.array.dtype == jnp.float32
        np.testing.assert_allclose(plain(*number[:2]), np.maximum(x, 0.5), rtol=1e-6)


@pytest.mark.parametrize('dtype', ['float64', 'float32', 'bfloat16', 'float16'])
def test_normalise_is_exact(dtype):
    """Expectation: every bit is kept, over the whole range of normal numbers of each type."""
    with jax.enable_x64(dtype == 'float64'):
        info = jnp.finfo(dtype)
        for power in (info.minexp + 2, -3, 0, 5, info.maxexp - 1):
            a = jnp.asarray(np.ldexp(np.arange(-4, 4) / 4, power), dtype)
            number = scaled.normalise(a)
            assert number.array.dtype == dtype
            np.testing.assert_array_equal(plain(*number[:2]), np.asarray(a, np.float64))
            assert 2 <= abs(np.asarray(number.array, np.float64)).max() < 4
        assert scaled.normalise(jnp.zeros(3, dtype)).exponent == scaled.ZERO
