"""Isometry: singular values of Jacobians and convolutions, and how they are restored to 1.

`isometry_*` hold what MingSun-Tse/TPP (a46ae3c) measures on three networks, dense, L1-pruned and
orthogonalised; `lean_norms` brute-force spectra of convolutions: see `golden/README.md`.
"""

import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import more_but
from published import described, golden
from test_golden import nested

import jaxprune as jp
from jaxprune import flow, tree

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


class Net(nn.Module):
    """The studied networks: fully connected, or LeNet-5 in its linear form."""

    widths: tuple[int, ...]
    activation: str
    conv: bool = False

    @nn.compact
    def __call__(self, x):
        for i, maps in enumerate((6, 16, 120) if self.conv else ()):
            x = nn.Conv(maps, (5, 5), padding='VALID', name=f'conv{i + 1}')(x)
            x = nn.max_pool(x, (2, 2), (2, 2)) if i < 2 else x
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.widths):
            x = nn.Dense(width, name=f'fc{i + 1}')(x)
            if self.activation == 'relu' and i < len(self.widths) - 1:
                x = nn.relu(x)
        return x


NETS = {
    'isometry_mlp7_linear': Net((100,) * 6 + (10,), 'linear'),
    'isometry_mlp4_relu': Net((40,) * 3 + (10,), 'relu'),
    'isometry_lenet5_linear': Net((84, 10), 'linear', conv=True),
}


@functools.cache
def case(name: str):
    """File, description, problem, dense view, examples; layers in forward order."""
    file, facts = golden(f'structured/{name}'), described(f'structured/{name}')
    x = jnp.asarray(file['x'], jnp.float64)
    problem = jp.problem_from_flax(NETS[name], x.shape[1:])
    view = jax.jit(functools.partial(jp.view, problem))(nested(file, 'params', jnp.float64))
    layers = sorted((p.split('/')[0] for p in view.weights), key=lambda p: (p[0] != 'c', p))
    return file, facts, problem, view, jp.Batch(x[None], jnp.zeros((1, len(x)), jnp.int32)), layers


@functools.cache
def values_of(name: str):
    """The measured spectrum as a compiled function of parameters and masks."""
    _, _, problem, _, batches, _ = case(name)

    def values(params, masks):
        here = jp.view(problem, params, None, masks)
        return flow.jacobian_singular_values(problem)(KEY, here, batches)

    return jax.jit(values)


def pruned(view, layers, gone: dict[str, list[int]]):
    """Masks without these units and without the weights that read them, whole blocks left; and
    parameters without their biases."""
    masks = {path: np.ones(w.shape, bool) for path, w in view.weights.items()}
    params = jax.tree.map(np.array, view.params)
    for layer, after in itertools.pairwise(layers):
        units = gone[layer]
        masks[f'{layer}/kernel'][..., units] = False
        params[layer]['bias'][units] = 0
        reader = masks[f'{after}/kernel']
        size = masks[f'{layer}/kernel'].shape[-1]
        # A dense layer behind maps has a row per place and map; here there is one place.
        reader.reshape(*reader.shape[:-2], -1, size, reader.shape[-1])[..., units, :] = False
    return jax.tree.map(jnp.asarray, (params, masks))


def close(found, expected, tolerance=1e-4) -> None:
    """The files are float32: relative to the largest value."""
    assert np.abs(np.asarray(found) - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.optimised
@pytest.mark.parametrize('name', more_but(['isometry_mlp4_relu', 'isometry_lenet5_linear'], NETS))
def test_spectra_before_and_after_pruning_and_orthogonalising(name):
    """Expectation: the authors' singular values at every ratio; ours on masks, theirs on networks
    cut smaller, so the two are the same."""
    file, facts, _, view, _, layers = case(name)
    gain = facts['act_gain']
    close(values_of(name)(view.params, tree.ones(view.weights)), file['jsv/dense'])
    stages = {'dense': {layer: [] for layer in layers}}
    for ratio, of_layer in facts['pruned'].items():
        stages[f'l1_{ratio}'] = {
            layer: of_layer.get(layer, {'pruned_ascending_score': []})['pruned_ascending_score']
            for layer in layers
        }
    orthogonalise = jax.jit(functools.partial(flow.orthp, activation=gain))
    for stage, gone in stages.items():
        params, masks = pruned(view, layers, gone)
        close(values_of(name)(params, masks), file[f'jsv/{stage}'])
        made = orthogonalise(tree.pick(params), masks)
        close(values_of(name)(tree.put(params, made), masks), file[f'jsv/{stage}_orthp'])
        cut = f'orth_{stage.replace("l1", "pruned")}/params'
        for layer in layers:
            key, kernel = f'{cut}/{layer}/kernel', np.asarray(made[f'{layer}/kernel'])
            if key in file:
                keep = np.asarray(masks[f'{layer}/kernel'])
                close(kernel[keep], file[key].ravel())
                assert not kernel[~keep].any()


def test_numbers_of_a_spectrum():
    """Expectation: the authors' statistics of their own values; by hand where a slope is lost."""
    _, facts, *_ = case('isometry_mlp7_linear')
    file = golden('structured/isometry_mlp7_linear')
    assert facts['stats']
    for stage, expected in facts['stats'].items():
        found = flow.isometry_of(jnp.asarray(file[f'jsv/{stage}'], jnp.float64))
        ours = {'mean': found.mean, 'max': found.largest, 'min': found.smallest, 'std': found.std}
        for key, value in ours.items():
            assert abs(value - expected[key]) <= 1e-5 * expected['max'], (stage, key)
        np.testing.assert_allclose(found.condition, expected['cond_mean'], rtol=1e-3)
    found = flow.isometry_of(jnp.array([[2.0, 1.0], [0.0, 0.0]]))
    assert found.condition == 2 and found.mean == 0.75 and found.deviation == 0.75
    assert np.isinf(flow.isometry_of(jnp.array([[2.0, 0.0]])).condition)


def chain(widths, kernels=None, activation='linear'):
    """A bias-free chain of dense layers and its view."""

    def init(key):
        keys = jax.random.split(key, len(widths) - 1)
        return [
            {'w': jax.random.normal(k, (a, b)) / math.sqrt(a)}
            for k, (a, b) in zip(keys, itertools.pairwise(widths), strict=True)
        ]

    def apply(params, x):
        for i, layer in enumerate(params):
            x = x @ layer['w']
            x = jax.nn.relu(x) if activation == 'relu' and i < len(params) - 1 else x
        return x

    problem = jp.problem_from_functions(init, apply)
    params = [{'w': jnp.asarray(k)} for k in kernels or ()] or jax.jit(problem.init)(KEY)[0]
    return problem, jax.jit(functools.partial(jp.view, problem))(params)


def spectrum(problem, view, examples: int = 2):
    width = next(iter(view.weights.values())).shape[0]
    x = jax.random.normal(KEY, (1, examples, width))
    values = jax.jit(flow.jacobian_singular_values(problem))
    return np.asarray(values(KEY, view, jp.Batch(x, np.zeros((1, examples)))))


@pytest.mark.parametrize('depth', [3, pytest.param(6, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ('kept', 'mean'), [(5, 0.5), pytest.param(20, 1.0, marks=pytest.mark.more)]
)
def test_orthogonal_chains(kept, mean, depth):
    """Expectation: widths of 20 give isometry; 5 hidden units for 10 logits, five values of 1 and
    five of 0. By slicing, and by masks of a wider network."""
    problem, view = chain([64, *[kept] * depth, 10])
    orthp = jax.jit(flow.orthp)
    values = spectrum(problem, view._replace(weights=orthp(view.weights)))
    assert abs(values.mean() - mean) < 1e-9
    assert np.abs(np.sort(values) - ([1] * 10 if kept == 20 else [0] * 5 + [1] * 5)).max() < 1e-9
    problem, wide = chain([64, *[40] * depth, 10])
    last = len(wide.weights) - 1
    masks = {p: np.zeros(w.shape, bool) for p, w in wide.weights.items()}
    for i, mask in enumerate(masks.values()):
        rows = slice(None) if i == 0 else slice(0, 2 * kept, 2)
        mask[rows, slice(None) if i == last else slice(0, 2 * kept, 2)] = True
    made = orthp(wide.weights, masks)
    assert abs(spectrum(problem, wide._replace(weights=made, masks=masks)).mean() - mean) < 1e-9
    again = orthp(made, masks)
    for path, leaf in made.items():
        np.testing.assert_allclose(again[path], leaf, atol=1e-12)


def test_diagonal_chains():
    """Expectation: a diagonal of a in L layers gives a**L; 2 and 1/2 make isometry in two steps
    neither of which is one."""
    problem, view = chain([4] * 4, [0.7 * np.eye(4)] * 3)
    np.testing.assert_allclose(spectrum(problem, view), 0.7**3, rtol=1e-12)
    problem, view = chain([4] * 3, [2 * np.eye(4), np.eye(4) / 2])
    np.testing.assert_allclose(spectrum(problem, view), 1, rtol=1e-12)
    layers = flow.kernel_singular_values(view)
    np.testing.assert_allclose(layers['0/w'], 2)
    np.testing.assert_allclose(layers['1/w'], 0.5)


def test_pruning_shrinks_the_spectrum():
    """Expectation: on a random chain of seven layers, filters pruned by their mean |w|, the mean
    falls strictly with the ratio, more than fifty times by 0.8."""
    problem, view = chain([1024, *[100] * 6, 10])
    means = []
    for ratio in (0, 0.3, 0.5, 0.7, 0.8, 0.9):
        masks, keep_in = {}, np.ones(1024, bool)
        for path, w in view.weights.items():
            size, last = w.shape[1], path == '6/w'
            gone = [] if last else np.argsort(np.abs(w).mean(0))[: math.ceil(ratio * size)]
            keep_out = ~np.isin(np.arange(size), gone)
            masks[path] = jnp.asarray(np.outer(keep_in, keep_out))
            keep_in = keep_out
        means.append(float(spectrum(problem, jp.view(problem, view.params, None, masks)).mean()))
    assert all(a > b for a, b in itertools.pairwise(means))
    assert means[4] < means[0] / 50


#: Of one kernel, as one program for each shape and choice.
orthogonalised = jax.jit(flow.orthogonalised, static_argnames=('activation', 'method'))
conv_singular_values = jax.jit(
    flow.conv_singular_values, static_argnames=('side', 'stride', 'padding')
)


def test_gain_of_relu():
    """Expectation: every kernel of a ReLU network times √2; wrong on a linear one: (√2)^7."""
    problem, view = chain([64, *[20] * 6, 10])
    made = jax.jit(functools.partial(flow.orthp, activation='relu'))(view.weights)
    np.testing.assert_allclose(spectrum(problem, view._replace(weights=made)), 2**3.5, rtol=1e-9)


@pytest.mark.parametrize('shape', [(3, 3, 4, 6), (3, 3, 2, 30), (12, 5), (5, 12)])
@pytest.mark.parametrize('method', ['qr', 'polar'])
def test_orthogonalised_kernels(shape, method):
    """Expectation: orthonormal rows, or columns where there are fewer; QR keeps the first filter's
    direction, the polar factor is the nearest orthogonal matrix (U Vᵀ)."""
    kernel = jax.random.normal(KEY, shape)
    made = np.asarray(orthogonalised(kernel, method=method)).reshape(-1, shape[-1])
    flat = np.asarray(kernel).reshape(-1, shape[-1])
    gram = made.T @ made if made.shape[0] >= made.shape[1] else made @ made.T
    np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-12)
    if method == 'polar':
        u, _, vt = np.linalg.svd(flat, full_matrices=False)
        np.testing.assert_allclose(made, u @ vt, atol=1e-12)
    elif made.shape[0] > made.shape[1]:
        np.testing.assert_allclose(made[:, 0], flat[:, 0] / np.linalg.norm(flat[:, 0]), atol=1e-12)


def test_masks_without_an_exact_solution_are_told():
    """Expectation: NaN for a mask that is no block; nothing for a layer that is pruned whole; a
    block smaller on its narrow side than on its wide one, whichever way round the kernel lies."""
    kernel = jax.random.normal(KEY, (6, 4))
    spotted = np.arange(24).reshape(6, 4) > 0
    assert np.isnan(orthogonalised(kernel, spotted)).all()
    for method in ('qr', 'polar'):
        none = orthogonalised(kernel, np.zeros((6, 4), bool), method=method)
        assert not np.any(none)
    few = np.arange(24).reshape(6, 4) < 8  # 2 inputs for 4 outputs
    made = np.asarray(orthogonalised(kernel, few))
    np.testing.assert_allclose(made[:2] @ made[:2].T, np.eye(2), atol=1e-12)
    np.testing.assert_allclose(made[:2], orthogonalised(np.asarray(kernel)[:2]), atol=1e-12)
    assert not made[2:].any()
    with pytest.raises(jp.PruneError, match="unknown activation 'rellu': did you mean 'relu'"):
        flow.orthogonalised(kernel, activation='rellu')
    with pytest.raises(jp.PruneError, match="unknown method 'svd'"):
        flow.orthogonalised(kernel, method='svd')


def test_approximate_isometry_of_any_mask():
    """Expectation: the distance falls by far, nothing pruned returns."""
    weights = {'a': jax.random.normal(KEY, (20, 12)), 'b': jax.random.normal(KEY, (12, 12))}
    masks = {p: jax.random.uniform(KEY, w.shape) < 0.5 for p, w in weights.items()}
    start = {p: jnp.where(masks[p], w, 0) for p, w in weights.items()}
    made = flow.approximately_orthogonal(weights, masks, optax.adam(1e-2), steps=500)
    for path, leaf in made.items():
        assert not np.asarray(leaf)[~np.asarray(masks[path])].any()
    assert flow.kernel_orthogonality(made, masks) < 0.2 * flow.kernel_orthogonality(start, masks)


def test_penalties_are_zero_at_orthogonal_kernels():
    """Expectation: KernOrth at an orthonormal kernel, OrthConv at one whose only tap is
    orthogonal; the first is not the second. By hand: ‖(2I)ᵀ(2I) - I‖ = 3 √n. Gradients exist."""
    kern_orth = jax.jit(flow.kernel_orthogonality)
    orth_conv = jax.jit(flow.conv_orthogonality, static_argnames='stride')
    kernel, delta = orthogonalised(jax.random.normal(KEY, (3, 3, 4, 4))), one_tap()
    assert kern_orth({'k': kernel}) < 1e-12
    assert orth_conv(delta) < 1e-12 and orth_conv(kernel) > 0.5
    assert orth_conv(delta, stride=2) < 1e-12
    np.testing.assert_allclose(kern_orth({'w': 2 * np.eye(4)}), 6)
    half = np.diag([2.0, 2, 0, 0])
    np.testing.assert_allclose(kern_orth({'w': half}, {'w': half > 0}), 3 * 2**0.5)
    for penalty in (flow.conv_orthogonality, lambda k: flow.kernel_orthogonality({'k': k})):
        assert np.isfinite(jax.jit(jax.grad(penalty))(delta)).all()
    # The map itself, unit by unit: ‖A Aᵀ - I‖ of the full circular matrix is the same number for
    # every position of the output.
    draw = jax.random.normal(KEY, (3, 3, 2, 3))
    side = 6
    columns = jax.jit(jax.vmap(lambda image: circular(image, draw).ravel()))(
        np.eye(side * side * 2).reshape(-1, side, side, 2)
    )
    columns = np.asarray(columns)
    gram = columns.T @ columns - np.eye(side * side * 3)
    np.testing.assert_allclose(orth_conv(draw), np.linalg.norm(gram) / side, rtol=1e-9)


def one_tap():
    """A kernel whose only tap is an orthogonal matrix."""
    delta = np.zeros((3, 3, 4, 4))
    delta[1, 1] = orthogonalised(jax.random.normal(KEY, (4, 4)))
    return delta


def circular(image, kernel):
    """A circular convolution, tap by tap."""
    middle = kernel.shape[0] // 2
    taps = itertools.product(range(kernel.shape[0]), range(kernel.shape[1]))
    return sum(jnp.roll(image, (middle - i, middle - j), (0, 1)) @ kernel[i, j] for i, j in taps)


def test_tpp():
    """Expectation: by hand, W = [[1,0],[1,1],[0,2]], filter 1 pruned: 14/9; kept filters feel one
    another not at all. Gradients: weight λ times the penalty's, and λ times what is pruned."""
    rows = np.array([[1.0, 0], [1, 1], [0, 2]])
    gone = np.array([False, True, False])
    penalty = jax.jit(jax.value_and_grad(flow.tpp_penalty))
    value, push = penalty(rows.T, gone)
    np.testing.assert_allclose(value, 14 / 9)
    apart = np.array([[1.0, 0], [0, 0], [1, 2]])  # the kept ones overlap, the pruned one is zero
    assert not any(np.any(leaf) for leaf in penalty(apart.T, gone))
    push = np.asarray(push).T
    # d/dW of (WWᵀ)_01² + (WWᵀ)_10² + ... / 9, T fixed: 4/9 of the masked Gram times W.
    masked = np.array([[0.0, 1, 0], [1, 2, 2], [0, 2, 0]])
    np.testing.assert_allclose(push, 4 / 9 * masked @ rows, rtol=1e-12)
    params = {'kernel': rows.T, 'bias': np.array([1.0, 2, 3]), 'scale': np.ones(3)}
    gradients = jax.jit(functools.partial(flow.tpp_gradients, weight=10.0))
    added = jax.device_get(gradients(params, dict.fromkeys(params, gone), 0.5))
    np.testing.assert_allclose(added['bias'], [0, 1, 0])
    np.testing.assert_allclose(added['scale'], [0, 0.5, 0])
    np.testing.assert_allclose(added['kernel'].T, 5 * push + 0.5 * rows * gone[:, None])
    steps = np.array([0, 9, 10, 99_999, 100_000, 200_000])
    np.testing.assert_allclose(flow.tpp_strength(steps), [0, 0, 1e-4, 0.9999, 1, 1], rtol=1e-9)


# --- convolutions -------------------------------------------------------------------------------


def test_spectra_of_convolutions():
    """Expectation: brute-force singular values of the operators, circular at strides 1 and 2 and
    zero padded, from the file."""
    file, facts = golden('structured/lean_norms'), described('structured/lean_norms')
    cases = {key.split('/')[1] for key in file if key.startswith('multi/')}
    assert len(cases) > 1 and facts
    for number in sorted(cases):
        kernel = jnp.asarray(file[f'multi/{number}/kernel'], jnp.float64)
        channels = min(kernel.shape[2:])
        side = math.isqrt(len(file[f'multi/{number}/circular_sv_stride1']) // channels)
        for stride in (1, 2):
            expected = np.sort(file[f'multi/{number}/circular_sv_stride{stride}'])[::-1]
            found = np.asarray(conv_singular_values(kernel, side, stride=stride))
            close(found[: len(expected)], expected, 1e-6)
            assert np.abs(found[len(expected) :]).max(initial=0) < 1e-9
        expected = np.sort(file[f'multi/{number}/zero_same_sv'])[::-1]
        close(conv_singular_values(kernel, side, padding='zero'), expected, 1e-6)


@pytest.mark.parametrize(
    'number',
    [n if n in (1, 3, 6, 9) else pytest.param(n, marks=pytest.mark.slow) for n in range(11)],
)
def test_spectra_of_single_channels(number):
    """Expectation: the same, of kernels with one input and one output."""
    file = golden('structured/lean_norms')
    kernel = np.asarray(file[f'single/{number}/kernel'], np.float64)[..., None, None]
    expected = file[f'single/{number}/circular_sv']
    found = conv_singular_values(kernel, math.isqrt(len(expected)))
    close(found, np.sort(expected)[::-1], 1e-6)


def test_orthogonal_kernels_are_no_isometry_of_the_map():
    """Expectation: one orthogonal tap gives only ones; orthonormal rows of 36 a root mean square of
    1 with a wide spread."""
    np.testing.assert_allclose(conv_singular_values(one_tap(), 6), 1, atol=1e-12)
    rows = orthogonalised(jax.random.normal(KEY, (3, 3, 4, 4)))
    values = np.asarray(conv_singular_values(rows, 6))
    np.testing.assert_allclose((values**2).mean(), 1, rtol=1e-12)
    assert np.ptp(values) > 0.5


def test_strides_and_paddings_that_cannot_be():
    kernel = jnp.ones((3, 3, 1, 1))
    with pytest.raises(jp.PruneError, match='a stride of 2 does not divide images of 5 x 5'):
        flow.conv_singular_values(kernel, 5, stride=2)
    with pytest.raises(jp.PruneError, match="unknown padding 'same'"):
        flow.conv_singular_values(kernel, 4, padding='same')
    with pytest.raises(jp.PruneError, match='stride must be at least 1, not 0'):
        flow.conv_singular_values(kernel, 4, stride=0)
    with pytest.raises(jp.PruneError, match='height must be a whole number'):
        flow.conv_singular_values(kernel, 8.0)


def test_largest_values_by_products_alone():
    """Expectation: the largest of the full decomposition, for a ReLU network; NaN past the rank."""
    problem, view = chain([12, 9, 4, 8], activation='relu')
    x = jax.random.normal(KEY, (1, 3, 12))
    batches = jp.Batch(x, np.zeros((1, 3)))

    def of(measure):
        return np.asarray(jax.jit(measure)(KEY, view, batches))

    full = of(flow.jacobian_singular_values(problem))
    found = of(flow.largest_jacobian_singular_values(problem, count=3, steps=5))
    close(found, full[:, :3], 1e-6)
    few = of(flow.largest_jacobian_singular_values(problem, count=7, steps=7))
    assert np.isnan(few[:, -1]).all()
    exact = of(flow.largest_jacobian_singular_values(problem, count=8))
    close(exact, full, 1e-12)
    matrix = of(flow.jacobian(problem))
    assert matrix.shape == (3, 8, 12)
    by_differences = []
    logits = jax.jit(lambda x: problem.apply(view.params, {}, x, train=False, key=None)[0])
    place = np.asarray(x[0])
    for step in 1e-6 * np.eye(12):
        apart = np.asarray(logits(place + step)) - np.asarray(logits(place - step))
        by_differences.append(apart / 2e-6)
    close(matrix, np.stack(by_differences, -1), 1e-8)
    with pytest.raises(jp.PruneError, match='a Jacobian needs data'):
        flow.jacobian(problem)(KEY, view, None)
