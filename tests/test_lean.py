"""LEAN: operator norms of single kernels, the graph of channels, the order of its paths.

`lean_norms` holds numbers of the authors' code, see `golden/README.md`.
"""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from published import described, golden
from structured_nets import load

import jaxprune as jp
from jaxprune import method, structure
from jaxprune.nn import build
from jaxprune.score.operators import conv_singular_values, slice_norms
from jaxprune.structure.channel_graph import per_kernel, window_sides
from jaxprune.structure.longest_paths import Layer, Link, path_order

KEY = jax.random.key(0)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


# --- norms of single kernels --------------------------------------------------------------------

SINGLE = jax.jit(slice_norms, static_argnames=('side', 'stride', 'norm'))
NAMES = {'spectral': 'max', 'nuclear': 'nuc', 'frobenius': 'fro'}


@pytest.mark.parametrize(
    'number',
    [n if n in (1, 3, 6, 10) else pytest.param(n, marks=pytest.mark.slow) for n in range(11)],
)
def test_norms_of_one_kernel(x64, number):
    """Expectation: the authors' norms and singular values of the explicit maps, from the file."""
    case = described('structured/lean_norms')['single'][number]
    kernel = golden('structured/lean_norms')[f'single/{number}/kernel'][..., None, None]
    side = case['n']
    for norm, name in NAMES.items():
        found = float(SINGLE(kernel, side, norm=norm)[0, 0])
        assert found == pytest.approx(case[f'lean_fourier_{name}'], rel=1e-6)
        assert found == pytest.approx(case['bruteforce_circular'][name], rel=1e-6)
        if name in case.get('lean_compute_norm_stride2', {}):
            found = float(SINGLE(kernel, side, stride=2, norm=norm)[0, 0])
            assert found == pytest.approx(case['lean_compute_norm_stride2'][name], rel=1e-6)
    strides = [s for s in (1, 2, 3) if f'bruteforce_circular_stride{s}_max' in case]
    assert 2 in strides
    for stride in strides:
        found = float(SINGLE(kernel, side, stride=stride)[0, 0])
        assert found == pytest.approx(case[f'bruteforce_circular_stride{stride}_max'], rel=1e-6)
        at = f'lean_operator_norm_fourier_stride{stride}_grid{side // stride}'
        assert found == pytest.approx(case[at], rel=1e-6)
    values = np.asarray(conv_singular_values(kernel, side, padding='full'))
    full = {'max': values.max(), 'nuc': values.sum(), 'fro': np.sqrt((values**2).sum())}
    assert full == pytest.approx(case['bruteforce_zero_full'], rel=1e-6)
    assert full == pytest.approx(case['lean_bigH_zero_full'], rel=1e-6)


@pytest.mark.parametrize('number', range(5))
def test_norms_of_a_layer(x64, number):
    """Expectation: the authors' edge weights (float32) and brute force, from the file."""
    file, case = (
        golden('structured/lean_norms'),
        described('structured/lean_norms')['multi'][number],
    )
    kernel = file[f'{case["key"]}/kernel']
    for stride in (1, 2):
        found = SINGLE(kernel, case['n'], stride=stride)
        for name in (
            f'lean_slice_norms_stride{stride}_max',
            f'bruteforce_slice_norms_stride{stride}',
        ):
            np.testing.assert_allclose(found, file[f'{case["key"]}/{name}'], rtol=1e-6)


@pytest.mark.parametrize(('taps', 'side', 'stride'), [
    ((3, 3), 8, 1), ((3, 3), 8, 2), ((3, 2), (8, 6), (4, 3)), ((5,), 10, 5), ((2, 3, 2), 4, 2),
    ((3, 3), 8, 4), ((1, 3), 4, 2), ((1, 1), 8, 2),
])  # fmt: skip
def test_norms_are_those_of_circulant_matrices(x64, taps, side, stride):
    """Expectation: the largest singular value of the matrix that `numpy.roll` spells out; where no
    windows overlap also the Frobenius norm of the kernel, of one entry its size."""
    kernel = np.random.default_rng(len(taps)).normal(size=(*taps, 2, 3))
    sides = side if isinstance(side, tuple) else (side,) * len(taps)
    strides = stride if isinstance(stride, tuple) else (stride,) * len(taps)
    found = SINGLE(kernel, side, stride=stride)
    for i, o in np.ndindex(2, 3):
        window = np.zeros(sides)
        window[tuple(map(slice, taps))] = kernel[..., i, o]
        starts = itertools.product(*map(range, (0,) * len(sides), sides, strides))
        axes = tuple(range(len(taps)))
        matrix = np.stack([np.roll(window, at, axes).ravel() for at in starts])
        np.testing.assert_allclose(found[i, o], np.linalg.norm(matrix, 2), rtol=1e-10)
        if all(s >= k for s, k in zip(strides, taps, strict=True)):
            np.testing.assert_allclose(found[i, o], np.linalg.norm(kernel[..., i, o]), rtol=1e-10)


def test_norms_of_many_kernels_and_runs(x64):
    """Expectation: NumPy's Fourier transform; more kernels than are transformed at a time."""
    kernels = np.random.default_rng(0).normal(size=(2, 3, 3, 60, 71))
    found = jax.jit(jax.vmap(slice_norms))(kernels)
    expected = np.abs(np.fft.fft2(kernels, (16, 16), (1, 2))).max((1, 2))
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize(('wrong', 'message'), [
    ({'norm': 'l1'}, "unknown norm 'l1'"),
    ({'stride': 3}, 'a stride of 3 does not divide a side of 16'),
    ({'stride': (2, 2, 2)}, r'stride must be one number or 2, not \(2, 2, 2\)'),
    ({'side': 0}, 'side must be at least 1, not 0'),
    ({'side': 8.0}, 'side must be a whole number'),
    ({'kernel': np.ones(3)}, r'a kernel is \(\*sides, in, out\), not \(3,\)'),
])  # fmt: skip
def test_norms_that_cannot_be(wrong, message):
    with pytest.raises(jp.PruneError, match=message):
        slice_norms(**{'kernel': np.ones((3, 3, 1, 1), np.float32), **wrong})


# --- the order of paths -------------------------------------------------------------------------


def chained(sizes):
    """Layers of a chain; the first reads the inputs."""
    layers, first = [], 0
    for number, (a, b) in enumerate(itertools.pairwise(sizes)):
        edges = np.arange(first, first + a * b).reshape(a, b)
        first += a * b
        links = (Link(number - 1, np.arange(a), np.arange(a)),) if number else ()
        layers.append(Layer(edges, 1, links))
    return layers


def test_the_longest_path_first():
    """Expectation: by hand. a -> b (2) -> c (3) has the product 6, a -> c (5) is next."""
    first = Layer(np.array([[0]]), 1, ())
    # Of its inputs b is made by the first layer, a is an input of the network.
    second = Layer(np.array([[1], [2]]), 1, (Link(0, np.array([0]), np.array([0])),))
    weights = [np.array([[2.0]]), np.array([[3.0], [5.0]])]
    assert path_order([first, second], weights).tolist() == [0, 1, 2]


def test_equal_paths_go_by_the_lowest_index():
    """Expectation: by hand, a diamond with two paths of product 6: through the first of its middle
    channels, then through the second. Then equal ends: the lower one first."""
    layers = chained([1, 2, 1])
    assert path_order(layers, [np.array([[2, 3]]), np.array([[3], [2]])]).tolist() == [0, 2, 1, 3]
    layers = chained([1, 1, 2])
    assert path_order(layers, [np.array([[2]]), np.array([[3, 3]])]).tolist() == [0, 1, 2]


def test_small_products_are_dropped():
    """Expectation: by hand. 0.5 before 3 is left out; when only weights below 1 are left, the
    largest comes first. A product of exactly 1 is a path, NaN and infinity are none."""
    layers = chained([1, 1, 1])
    assert path_order(layers, [np.array([[0.5]]), np.array([[3.0]])]).tolist() == [1, 0]
    assert path_order(layers, [np.array([[0.5]]), np.array([[0.7]])]).tolist() == [1, 0]
    assert path_order(layers, [np.array([[4.0]]), np.array([[0.5]])]).tolist() == [0, 1]
    assert path_order(layers, [np.array([[1.0]]), np.array([[2.0]])]).tolist() == [1, 0]
    assert path_order(layers, [np.array([[np.inf]]), np.array([[0.2]])]).tolist() == [1, 0]
    assert path_order(layers, [np.array([[np.nan]]), np.array([[0.2]])]).tolist() == [1, 0]


@pytest.mark.parametrize('number', range(4))
def test_order_of_the_authors_graphs(number):
    """Expectation: their longest path; and at four densities their sets of edges, which end in the
    middle of a path."""
    file, case = golden('structured/lean_norms'), described('structured/lean_norms')['dags'][number]
    adjacency, sizes = file[f'{case["key"]}/adj'], case['layers']
    starts = np.cumsum([0, *sizes])
    layers, blocks, edges = chained(sizes), [], []
    for a, b, c in zip(starts, starts[1:], starts[2:], strict=False):
        blocks.append(adjacency[a:b, b:c])
        edges += [(u, v) for u in range(a, b) for v in range(b, c)]
    assert sum(np.count_nonzero(block) for block in blocks) == np.count_nonzero(adjacency)
    order = [edges[k] for k in path_order(layers, blocks)]
    longest = file[f'{case["key"]}/longest_path'].tolist()
    assert order[: len(longest) - 1] == list(itertools.pairwise(longest))
    for removed in (0.3, 0.5, 0.7, 0.9):
        pruned = file[f'{case["key"]}/pruned_{removed}'].astype(bool)
        kept = set(map(tuple, np.argwhere((adjacency != 0) & ~pruned).tolist()))
        assert set(order[: len(kept)]) == kept and len(kept) < len(order)


def naive_order(layers, weights, gains):
    """The same from its definition: nodes one by one, everything anew after each path."""
    weights = [np.array(w, float) for w in weights]
    order, original = [], [w.copy() for w in weights]
    while True:
        best, via = {}, {}
        for n, layer in enumerate(layers):
            inputs, outputs = layer.edges.shape
            for o in range(outputs):
                group, candidates = o * layer.groups // outputs, []
                for i in range(inputs):
                    arriving = (1.0, None)
                    for link, gain in zip(layer.links, gains[n], strict=True):
                        at = group * inputs + i
                        if link.made is None:
                            sources = [
                                (link.layer, m) for m in range(layers[link.layer].edges.shape[1])
                            ]
                            factors = [gain[at]] * len(sources)
                        else:
                            sources = [(link.layer, int(m)) for m in link.made[link.read == at]]
                            factors = gain[link.read == at]
                        for source, factor in zip(sources, factors, strict=True):
                            if best[source] * factor > arriving[0]:
                                arriving = best[source] * factor, source
                    candidates.append((arriving[0] * weights[n][i, o], i, arriving[1]))
                value, i, source = max(candidates, key=lambda c: c[0])
                best[n, o], via[n, o] = (value, (i, source)) if value >= 1 else (0.0, None)
        ends = [node for node in best if via[node] is not None]
        if not ends:
            break
        node, path = max(ends, key=best.__getitem__), []
        while node is not None and via[node] is not None:
            (n, o), (i, node) = node, via[node]
            path.append(int(layers[n].edges[i, o]))
        for edge in path[::-1]:
            if edge not in order:
                order.append(edge)
            for layer, w in zip(layers, weights, strict=True):
                w[layer.edges == edge] = 0
    count = 1 + max(layer.edges.max() for layer in layers)
    largest = [0.0] * count
    for layer, w in zip(layers, original, strict=True):
        for edge, value in zip(layer.edges.flat, w.flat, strict=True):
            largest[edge] = max(largest[edge], value)
    return order + sorted(set(range(count)) - set(order), key=lambda e: (-largest[e], e))


@pytest.mark.parametrize('seed', range(6))
def test_order_is_that_of_the_definition(seed):
    """Expectation: a search that computes every channel anew after each path, on layers in groups,
    with residual links, links to everything, scales on links, a kernel that is used twice, once
    transposed."""
    draw = np.random.default_rng(seed)
    chain = np.arange(4)
    shifted = Link(0, chain[1:], chain[:3])
    layers = [
        Layer(np.arange(8).reshape(2, 4), 1, ()),
        Layer(np.arange(8, 16).reshape(2, 4), 2, (Link(0, chain, chain),)),
        Layer(np.arange(16, 32).reshape(4, 4), 1, (Link(0, chain, chain), Link(1, chain, chain))),
        Layer(np.arange(16, 32).reshape(4, 4).T, 1, (shifted, Link(2, chain, chain))),
        Layer(np.arange(32, 40).reshape(4, 2), 1, (Link(1, None, None), Link(3, chain, chain))),
        Layer(np.arange(40, 46).reshape(2, 3), 1, (Link(4, np.array([1, 0]), np.array([0, 1])),)),
    ]  # fmt: skip
    weights = [np.exp(draw.normal(size=layer.edges.shape) * 0.6) for layer in layers]
    weights[3] = weights[2].T * (1 + 0.1 * (seed % 2))  # other scales behind it
    gains = [
        [
            np.exp(draw.normal(size=4))
            if link.made is None or len(link.made) == 4
            else np.ones(len(link.made))
            for link in layer.links
        ]
        for layer in layers
    ]
    if seed > 2:  # many products are equal, and some are 1
        weights, gains = jax.tree.map(lambda w: 2.0 ** np.round(np.log2(w)), (weights, gains))
    found = path_order(layers, weights, gains)
    assert found.tolist() == naive_order(layers, weights, gains)
    plain = path_order(layers, weights)
    assert plain.tolist() == naive_order(layers, weights, jax.tree.map(np.ones_like, gains))


# --- the graph of channels ----------------------------------------------------------------------


@functools.cache
def network(name):
    file, _, forward, params, stats = load(name)
    x = jnp.asarray(file['x'][:1])
    return forward, params, stats, x, structure.channel_graph(forward, params, x, stats)


def by_path(graph):
    """Path of a kernel -> the paths that it reads from, and how many channels of each."""
    paths = [kernel.path.removesuffix('/kernel') for kernel in graph.kernels]
    return {
        path: {paths[k.layer]: None if k.made is None else len(k.made) for k in layer.links}
        for path, layer in zip(paths, graph.layers, strict=True)
    }


def test_channels_of_a_residual_network():
    """Expectation: by hand. What reads a sum reads the channels of all that was added before it."""
    *_, graph = network('oto_groups_resnet2')
    read = by_path(graph)
    assert read['s0b0_conv1'] == {'stem_conv': 6}
    assert read['s0b0_conv2'] == {'s0b0_conv1': 6}
    assert read['s0b1_conv1'] == {'stem_conv': 6, 's0b0_conv2': 6}
    for reader in ('s1b0_conv1', 's1b0_proj'):
        assert read[reader] == {'stem_conv': 6, 's0b0_conv2': 6, 's0b1_conv2': 6}
    assert read['s1b1_conv1'] == {'s1b0_proj': 8, 's1b0_conv2': 8}
    assert read['head'] == {'s2b0_proj': 10, 's2b0_conv2': 10, 's2b1_conv2': 10}
    for number, layer in enumerate(graph.layers):  # no cycles
        assert all(link.layer < number for link in layer.links)
    assert sum(layer.edges.size for layer in graph.layers) == 1 + max(
        layer.edges.max() for layer in graph.layers
    )


def test_channels_of_a_joined_map():
    """Expectation: by hand. A layer behind a join reads each part's own channels, in its order."""
    *_, graph = network('oto_groups_densenet')
    read = by_path(graph)
    assert read['d0l1_conv'] == {'stem': 6, 'd0l0_conv': 4}
    assert read['t0_conv'] == {'stem': 6, 'd0l0_conv': 4, 'd0l1_conv': 4}
    assert read['d1l1_conv'] == {'t0_conv': 8, 'd1l0_conv': 4}
    layer = graph.layers[[k.path for k in graph.kernels].index('t0_conv/kernel')]
    np.testing.assert_array_equal(
        np.concatenate([link.read for link in layer.links]), np.arange(14)
    )
    assert [link.made.tolist() for link in layer.links] == [list(range(n)) for n in (6, 4, 4)]


def test_channels_of_depthwise_and_grouped_convolutions():
    """Expectation: by hand. A depthwise kernel leads from each channel to itself; a group of four
    makes four of 16 channels out of three of 12."""
    *_, graph = network('depgraph_grouped')
    layers = {
        k.path.split('/')[0]: layer for k, layer in zip(graph.kernels, graph.layers, strict=True)
    }
    assert by_path(graph)['b0_pw'] == {'b0_dw': 8}
    depthwise, grouped = layers['b0_dw'], layers['gc']
    assert (depthwise.edges.shape, depthwise.groups) == ((1, 8), 8)
    assert (grouped.edges.shape, grouped.groups) == ((3, 16), 4)
    for layer, count in ((depthwise, 8), (grouped, 12)):
        [link] = layer.links
        np.testing.assert_array_equal(link.made[np.argsort(link.read)], np.arange(count))


def test_channels_of_flattened_maps_and_of_attention():
    """Expectation: by hand. Row (h W + w) C + c of a dense kernel reads channel c. Queries and keys
    only make attention weights: their channels lead to all that is read behind them."""
    *_, graph = network('oto_groups_convnet')
    layer = graph.layers[[k.path for k in graph.kernels].index('fc1/kernel')]
    [link] = layer.links
    np.testing.assert_array_equal(link.read, np.arange(90))
    np.testing.assert_array_equal(link.made, np.arange(90) % 10)
    *_, graph = network('oto_groups_encoder')
    read = by_path(graph)
    names = [f'attention0/self/{name}' for name in ('query', 'key', 'value')]
    assert read['attention0/output/dense'] == dict(zip(names, (None, None, 12), strict=True))
    assert read['up0'] == {'embed': 12, 'attention0/output/dense': 12}


def norms_of(params, path, stride=1):
    kernel = np.asarray(params[path]['kernel'], np.float64)
    if kernel.ndim == 2:
        return np.abs(kernel)
    if kernel.shape[:2] == (1, 1):
        return np.abs(kernel[0, 0])
    if stride == 1:
        return np.abs(np.fft.fft2(kernel, (16, 16), (0, 1))).max((0, 1))
    parts = [kernel[a::stride, b::stride] for a in range(stride) for b in range(stride)]
    parts = [np.abs(np.fft.fft2(part, (16 // stride,) * 2, (0, 1))) ** 2 for part in parts]
    return np.sqrt(sum(parts).max((0, 1)))


def scale_of(params, stats, name):
    scale, variance = params[name]['scale'], stats[name]['var']
    return np.abs(np.asarray(scale, np.float64)) / np.sqrt(np.asarray(variance, np.float64) + 1e-5)


def test_weights_with_batch_norm():
    """Expectation: NumPy's Fourier norms, polyphase by stride, times abs(scale) / sqrt(variance +
    1e-5) of the norm behind each convolution, on the channels it makes; none behind the head."""
    _, params, stats, _, graph = network('oto_groups_resnet2')
    found = jax.jit(graph.weights)(params, stats).edges
    plain = jax.jit(functools.partial(graph.weights, scaled=False))(params, stats).edges
    for kernel, weight, norm in zip(graph.kernels, found, plain, strict=True):
        name = kernel.path.split('/')[0]
        stride = 2 if name in ('s1b0_conv1', 's1b0_proj', 's2b0_conv1', 's2b0_proj') else 1
        assert set(kernel.strides.values()) <= {stride}
        expected = norms_of(params, name, stride)
        np.testing.assert_allclose(norm, expected, rtol=1e-5)
        if name != 'head':
            norm_name = name.replace('conv', 'bn') if name != 's1b0_proj' else 's1b0_projbn'
            norm_name = {'s2b0_proj': 's2b0_projbn'}.get(name, norm_name)
            expected = expected * scale_of(params, stats, norm_name)
        np.testing.assert_allclose(weight, expected, rtol=1e-5)


def test_weights_with_batch_norm_before_the_layer():
    """Expectation: NumPy. A norm over joined channels multiplies the rows of the layer that reads
    them; the stem's channels meet another one at every reader."""
    _, params, stats, _, graph = network('oto_groups_densenet')
    weighted = jax.jit(graph.weights)(params, stats)
    assert jax.tree.leaves(weighted.links) == []
    norms = {'t0_conv': 't0_bn', 'head': 'final_bn'}
    norms |= {f'd{d}l{i}_conv': f'd{d}l{i}_bn' for d in range(2) for i in range(2)}
    for kernel, found in zip(graph.kernels, weighted.edges, strict=True):
        name = kernel.path.split('/')[0]
        rows = scale_of(params, stats, norms[name])[:, None] if name != 'stem' else 1
        np.testing.assert_allclose(found, norms_of(params, name) * rows, rtol=1e-5)


def test_a_scale_may_be_given():
    """Expectation: the norms times its absolute value."""
    forward, params, stats, x, _ = network('oto_groups_resnet2')
    given = {'stem_conv/kernel': np.linspace(-2, 3, 6, dtype=np.float32)}
    graph = structure.channel_graph(forward, params, x, stats, scale=given)
    found = jax.jit(graph.weights)(params, stats).edges[0]
    np.testing.assert_allclose(
        found, norms_of(params, 'stem_conv') * np.abs(given['stem_conv/kernel']), rtol=1e-5
    )
    for wrong, message in (
        (
            {'stem/kernel': given['stem_conv/kernel']},
            "a scale is given for 'stem/kernel': did you mean",
        ),
        (
            {'stem_conv/kernel': np.ones(5)},
            r"the scale of 'stem_conv/kernel' must have the shape \(6,\), not \(5,\)",
        ),
    ):
        with pytest.raises(jp.PruneError, match=message):
            structure.channel_graph(forward, params, x, stats, scale=wrong)


class Stack(nn.Module):
    """Convolutions that are written in other ways, and kernels of other layouts."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.ConvTranspose(6, (3, 3), (2, 2), name='up')(x)
        x = nn.Conv(8, (3, 5), (2, 4), padding='SAME', kernel_dilation=(1, 1), name='wide')(
            nn.relu(x)
        )
        return nn.DenseGeneral((2, 3), name='heads')(x.mean((1, 2))).reshape(x.shape[0], -1)


def test_strides_of_any_convolution():
    """Expectation: by hand. A transposed convolution has the norms of the strided one that it is
    the adjoint of; a dense layer makes channels along two axes."""
    net = jp.problem_from_flax(Stack(), (8, 8, 3))
    params, state = jax.jit(net.init)(KEY)
    graph = structure.channel_graph(net, params, jnp.zeros((1, 8, 8, 3)), state)
    assert [dict(k.strides) for k in graph.kernels] == [{0: 2, 1: 2}, {0: 2, 1: 4}, {}]
    assert [(k.inputs, k.outputs) for k in graph.kernels] == [((2,), (3,))] * 2 + [((0,), (1, 2))]
    assert [layer.edges.shape for layer in graph.layers] == [(3, 6), (6, 8), (8, 6)]
    found = jax.jit(graph.weights)(params, state).edges
    up = np.asarray(params['up']['kernel'])
    np.testing.assert_allclose(found[0], SINGLE(up, 16, stride=2), rtol=1e-5)
    np.testing.assert_allclose(
        found[1], SINGLE(params['wide']['kernel'], 16, stride=(2, 4)), rtol=1e-5
    )
    np.testing.assert_allclose(found[2], np.abs(params['heads']['kernel']).reshape(8, 6), rtol=1e-6)


def test_kernels_of_other_layouts_stacks_and_second_uses():
    """Expectation: by hand: kernels stored (outputs, inputs), a stack that a scan takes apart, one
    kernel used twice, the second time transposed; a mask that the network applies itself counts."""
    shapes = {'t': (5, 4), 'rows': (2, 5, 5), 'tied': (5, 3)}
    draw = np.random.default_rng(0)
    params = {name: {'w': draw.normal(size=shape).astype('f')} for name, shape in shapes.items()}

    def model(p, x):
        x = x @ (p['t']['w'] * (p['t']['w'] > 0)).T
        x = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p['rows']['w'])[0]
        return jnp.tanh(x @ p['tied']['w']) @ p['tied']['w'].T

    graph = structure.channel_graph(model, params, jnp.zeros((1, 4)))
    assert [(k.path, k.rows) for k in graph.kernels] == [
        ('t/w', ()), ('rows/w', (0,)), ('rows/w', (1,)), ('tied/w', ()), ('tied/w', ()),
    ]  # fmt: skip
    assert [[link.layer for link in layer.links] for layer in graph.layers] == [
        [],
        [0],
        [1],
        [2],
        [3],
    ]
    tied, again = graph.layers[3:]
    np.testing.assert_array_equal(tied.edges.T, again.edges)
    weights = jax.jit(graph.weights)(params).edges
    spread = per_kernel(graph, {f'{n}/w': shape for n, shape in shapes.items()}, weights)
    for name in shapes:
        used = params[name]['w'] * (params[name]['w'] > 0 if name == 't' else 1)
        np.testing.assert_array_equal(spread[f'{name}/w'], np.abs(used))

    def branching(p, x):
        return (
            jax.lax.cond(x.sum() > 0, lambda: x @ p['a']['w'], lambda: x @ p['b']['w'])
            @ p['c']['w']
        )

    params = {name: {'w': np.ones((3, 3), 'f')} for name in 'abc'}
    graph = structure.channel_graph(branching, params, jnp.zeros((1, 3)))
    assert [k.path for k in graph.kernels] == ['b/w', 'a/w', 'c/w']
    assert [[link.layer for link in layer.links] for layer in graph.layers] == [[], [], [0, 1]]

    def regrouped(p, x):
        return x @ p['w'].reshape(2, 2, 3).sum(1)

    with pytest.raises(jp.PruneError, match="'w' is no layer"):
        graph = structure.channel_graph(regrouped, {'w': jnp.ones((4, 3))}, jnp.zeros((1, 2)))
        per_kernel(graph, {'w': (4, 3)}, graph.weights({'w': jnp.ones((4, 3))}).edges)

    def in_two_ways(p, x):
        return jnp.einsum('bi,jik->bjk', x, p['w']), jnp.einsum('bj,jik->bik', x, p['w'])

    with pytest.raises(jp.PruneError, match="'w' is used in two ways"):
        structure.channel_graph(in_two_ways, {'w': jnp.ones((3, 3, 2))}, jnp.zeros((1, 3)))


def test_convolutions_as_matrix_products():
    """Expectation: VGG's last layers, 3x3 on maps of 2x2, are products of rows of patches; their
    windows are told from their inputs, since all taps read the same channels."""
    net = jp.problem_from_flax(build('vgg11', 10, width=0.05), (32, 32, 3))
    params, state = jax.eval_shape(net.init, KEY)
    like = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    sides = window_sides(structure.channel_graph(net, params, like, state))
    assert sides == {**{f'conv_{i}/kernel': (0, 1) for i in range(8)}, 'dense_0/kernel': ()}


@pytest.mark.parametrize(('seed', 'small', 'through'), [
    (4, '', ['stem', 'a', 'b', 'c', 'd', 'head']),
    (5, 'c', ['stem', 'a', 'b', 'head']),
    (2, 'ac', ['stem', 'head']),
])  # fmt: skip
def test_a_path_is_what_a_network_does(x64, seed, small, through):
    """Expectation: the definition. A linear residual network whose only kernels are those of the
    first path turns a change of the path's first channel into the path's product at its last,
    whichever blocks it skips; scales behind the sums are met once."""
    draw = np.random.default_rng(seed)
    sizes = {'stem': (3, 5), 'a': (5, 4), 'b': (4, 5), 'c': (5, 4), 'd': (4, 5), 'head': (5, 2)}
    params = {
        name: {'kernel': np.exp(draw.normal(size=shape)) * (1e-3 if name in small else 1)}
        for name, shape in sizes.items()
    }
    params['norms'] = {'scale': np.exp(draw.normal(size=(2, 5)))}

    def model(p, x):
        x = x @ p['stem']['kernel']
        x = (x + (x @ p['a']['kernel']) @ p['b']['kernel']) * p['norms']['scale'][0]
        x = (x + (x @ p['c']['kernel']) @ p['d']['kernel']) * p['norms']['scale'][1]
        return x @ p['head']['kernel']

    graph = structure.channel_graph(model, params, jnp.zeros((1, 3)))
    weights, gains = jax.device_get(jax.jit(graph.weights)(params))
    names = [kernel.path.split('/')[0] for kernel in graph.kernels]
    assert names == list(sizes)
    order = path_order(graph.layers, weights, gains)[: len(through)]
    kept, product, before = (
        {name: np.zeros(shape, bool) for name, shape in sizes.items()},
        1.0,
        None,
    )
    for edge, name in zip(order, through, strict=True):
        n = names.index(name)
        [at] = np.argwhere(graph.layers[n].edges == edge)
        kept[name][tuple(at)], product = True, product * weights[n][tuple(at)]
        if before is not None:
            number = [link.layer for link in graph.layers[n].links].index(before[0])
            link, gain = graph.layers[n].links[number], gains[n][number]
            [place] = np.flatnonzero(link.read == at[0])
            assert link.made[place] == before[1]
            product *= 1 if gain is None else gain[place]
        before = n, at[1]
    alone = {
        **params,
        **{n: {'kernel': np.where(k, params[n]['kernel'], 0)} for n, k in kept.items()},
    }
    slope = jax.jit(jax.jacobian(lambda x: model(alone, x[None])[0]))(np.zeros(3))
    np.testing.assert_allclose(slope.max(), product, rtol=1e-10)
    assert np.count_nonzero(slope) == 1


# --- as a method --------------------------------------------------------------------------------


class Residual(nn.Module):
    """A stem, two residual blocks, a strided layer, a classifier on flattened maps."""

    @nn.compact
    def __call__(self, x, train=False):
        def layer(x, maps, name, stride=1):
            x = nn.Conv(maps, (3, 3), (stride, stride), use_bias=False, name=f'{name}_conv')(x)
            return nn.BatchNorm(not train, name=f'{name}_bn')(x)

        x = nn.relu(layer(x, 6, 'stem'))
        for block in 'ab':
            y = nn.relu(layer(x, 4, f'{block}0'))
            x = nn.relu(x + layer(y, 6, f'{block}1'))
        x = nn.relu(layer(x, 5, 'down', 2))
        return nn.Dense(10, name='head')(x.reshape(x.shape[0], -1))


@functools.cache
def residual():
    """A network with statistics and scales unlike one another, and an input."""
    net = jp.problem_from_flax(Residual(), (8, 8, 2))
    params, state = jax.device_get(jax.jit(net.init)(KEY))
    draw = np.random.default_rng(0)
    flat = {p: leaf * draw.uniform(1, 4) for p, leaf in jp.pick(params).items()}
    flat |= {
        f'{n}/scale': draw.uniform(-2, 2, leaf['scale'].shape).astype('f')
        for n, leaf in params.items()
        if 'scale' in leaf
    }
    params = jp.put(params, {p: np.asarray(leaf, 'f') for p, leaf in flat.items()})
    state = jax.tree.map(lambda leaf: draw.uniform(0.5, 2, leaf.shape).astype('f'), state)
    return net, params, state, np.zeros((1, 8, 8, 2), 'f')


@functools.cache
def graph_of_residual():
    net, params, state, x = residual()
    graph = structure.channel_graph(net, params, x, state)
    return graph, jax.device_get(jax.jit(graph.weights)(params, state))


@functools.cache
def competing():
    net, params, state, x = residual()
    coupled = jp.groups(net, params, x, state)
    shapes = jp.shapes(jp.pick(params))
    return {g: method.competing(g, shapes, lambda: coupled) for g in ('unit', 'kernel')}


def seen():
    """What a score is given: key, view and the shape of an input."""
    net, params, state, x = residual()
    return KEY, jp.view(net, params, state), jp.Batch(x[None], np.zeros((1, 1), np.int32))


SIZES = {'stem': 12, 'a0': 24, 'a1': 24, 'b0': 24, 'b1': 24, 'down': 30, 'head': 800}
TOTAL = sum(SIZES.values())


def of_kernels(masks):
    """Layer -> bool `(inputs, outputs)`, of masks that keep whole kernels only."""
    found = {}
    for path, mask in masks.items():
        each = np.asarray(mask).reshape(-1, *mask.shape[-2:])
        assert (each == each[0]).all()
        found[path.split('/')[0].removesuffix('_conv')] = each[0]
    return found


def test_masks_are_beginnings_of_one_order():
    """Expectation: whole kernels, exact counts; at every density the first of `path_order`."""
    graph, weighted = graph_of_residual()
    order = path_order(graph.layers, *weighted)
    assert len(weighted.edges) == len(SIZES)
    pruner = jp.get_pruner(residual()[0], 'lean', groups=competing()['kernel'])
    key, view, batches = seen()
    update = jax.jit(lambda count: pruner.update(key, (), view, {'*': count}, batches)[1])
    names = [k.path.split('/')[0].removesuffix('_conv') for k in graph.kernels]
    for count in (3, 8, 9, 100, 500):
        kept = of_kernels(update(count))
        edges = [layer.edges[kept[n]] for n, layer in zip(names, graph.layers, strict=True)]
        assert sorted(np.concatenate(edges)) == sorted(order[:count])


@pytest.mark.more
def test_what_lean_is_compared_with():
    """Expectation: operator norms, with and without the scale of batch norm, in NumPy; and the
    largest sums of abs(w), with a model and without one."""
    net, params, state, x = residual()
    entry, by = method.METHODS['operator_norm'], competing()['kernel']
    options = {'scaled': {}, 'plain': {'scaled': False}}
    scores = {n: entry.score(net, False, by=by, **own) for n, own in options.items()}
    found = jax.jit(lambda: {n: score(*seen()) for n, score in scores.items()})()
    sums = []
    for name in SIZES:
        path = name if name == 'head' else f'{name}_conv'
        kernel = params[path]['kernel']
        sums.append(np.abs(kernel).reshape(-1, *kernel.shape[-2:]).sum(0))
        expected = norms_of({name: {'kernel': kernel}}, name, 2 if name == 'down' else 1)
        plain = np.asarray(found['plain'][f'{path}/kernel'])
        np.testing.assert_allclose(plain.reshape(expected.shape), expected, rtol=1e-5)
        if name != 'head':
            expected = expected * scale_of(params, state['batch_stats'], f'{name}_bn')
        scaled = np.asarray(found['scaled'][f'{path}/kernel'])
        np.testing.assert_allclose(scaled.reshape(expected.shape), expected, rtol=1e-5)
    least = np.sort(np.concatenate([own.ravel() for own in sums]))[-round(0.2 * TOTAL)]
    for asked in ({}, {'model': net, 'model_state': state, 'data': x}):
        kept = jp.prune(params, 'magnitude', 0.2, granularity='kernel', **asked).masks
        for name, mask in of_kernels(kept).items():
            np.testing.assert_array_equal(mask, sums[list(SIZES).index(name)] >= least)


def test_units_and_weights_by_lean():
    """Expectation: a unit scores the sum of its kernels' places, a weight that of its kernel."""
    net, entry, by = residual()[0], method.METHODS['lean'], competing()
    asked = {'weight': {}, **{name: {'by': groups} for name, groups in by.items()}}
    scores = {name: entry.score(net, False, **own) for name, own in asked.items()}
    found = jax.device_get(jax.jit(lambda: {n: score(*seen()) for n, score in scores.items()})())
    every = np.concatenate([leaf.ravel() for leaf in found['kernel'].values()])
    assert sorted(every.tolist()) == list(range(1, 1 + TOTAL))
    path = 'a0_conv/kernel'
    place = found['kernel'][path]
    assert place.shape == (1, 1, 6, 4)
    np.testing.assert_allclose(found['unit'][path], place.sum((0, 1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(found['weight'][path], np.broadcast_to(place, (3, 3, 6, 4)))


@pytest.mark.programs(150)
def test_no_kept_kernel_is_dead():
    """Expectation: channels reached from the input and from the output, with Boolean matrices: the
    effective masks keep what lies between, whole; the compact network has the masked one's outputs.
    """
    net, params, state, x = residual()
    asked = {'model': net, 'model_state': state, 'data': x, 'granularity': 'kernel', 'rounds': 1}
    masks = jax.device_get(jp.prune(params, 'lean', 0.15, **asked).masks)
    found = jax.device_get(jax.jit(structure.connectivity_of(net, (8, 8, 2)))(masks))
    edges, left = of_kernels(masks), of_kernels(found)
    assert sum(mask.sum() for mask in edges.values()) == round(0.15 * TOTAL)
    head, edges['head'] = edges['head'], edges['head'].reshape(-1, 5, 10).any(0)
    reach, heard = {'stem': np.ones(2, bool)}, {'head': np.ones(10, bool)}
    stream = edges['stem'].any(0)
    for block in 'ab':
        reach[f'{block}0'], reach[f'{block}1'] = stream, edges[f'{block}0'][stream].any(0)
        stream = stream | edges[f'{block}1'][reach[f'{block}1']].any(0)
    reach |= {'down': stream, 'head': edges['down'][stream].any(0)}
    heard['down'] = edges['head'].any(1)
    stream = edges['down'][:, heard['down']].any(1)
    for block in 'ba':
        heard[f'{block}1'], heard[f'{block}0'] = stream, edges[f'{block}1'][:, stream].any(1)
        stream = stream | edges[f'{block}0'][:, heard[f'{block}0']].any(1)
    heard['stem'] = stream
    edges['head'], reach['head'] = head, np.tile(reach['head'], 16)
    lives = {name: reach[name][:, None] & heard[name] & mask for name, mask in edges.items()}
    for name, mask in lives.items():
        np.testing.assert_array_equal(left[name], mask)
    assert 0 < sum(mask.sum() for mask in lives.values()) < round(0.15 * TOTAL)
    x = np.random.default_rng(1).normal(size=(3, 8, 8, 2)).astype('f')
    small = jp.compact(net, params, masks, x, model_state=state, partial='keep')

    def masked(params, masks):
        return net.apply(jp.apply_masks(params, masks), state, x, train=False, key=None)[0]

    expected = jax.jit(masked)(params, masks)
    got = jax.jit(small.apply)(small.params, small.model_state, x)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def of_nan(params):
    return {**params, 'head': {**params['head'], 'kernel': params['head']['kernel'] * np.nan}}


@pytest.mark.parametrize(('wrong', 'message'), [
    ({'side': 0}, 'side must be at least 1, not 0'),
    ({'side': 8.0}, "option 'side' must be a whole number"),
    ({'data': None}, "method 'lean' needs data="),
    ({'params': of_nan}, 'NaN'),
    ({'prunable': lambda path, leaf: path.split('/')[-1] in ('kernel', 'bias')},
     "'a0_bn/bias' is no layer: no matrix product or convolution"),
])  # fmt: skip
def test_what_cannot_be_pruned(wrong, message):
    net, params, state, x = residual()
    asked = {'model': net, 'model_state': state, 'data': x, 'granularity': 'kernel', **wrong}
    params = asked.pop('params', lambda p: p)(params)
    with pytest.raises(jp.PruneError, match=message):
        jp.prune(params, 'lean', 0.2, **asked)
    with pytest.raises(jp.PruneError, match="unknown granularity 'kernels': did you mean 'kernel'"):
        jp.prune(params, 'magnitude', 0.2, granularity='kernels')


@pytest.mark.more
def test_a_sweep_of_single_kernels(tmp_path):
    """Expectation: exact counts of kernels, 1 x 3 + 3 x 3 + 147 x 10; rounds fall geometrically."""
    table = {
        'name': 'lean',
        'model': {'name': 'small_vgg', 'widths': [3]},
        'data': {'name': 'mnist_small', 'train_examples': 128, 'test_examples': 100},
        'train': {'epochs': 1, 'batch_size': 64},
        'grid': {
            'method': [
                {'name': 'lean', 'granularity': 'kernel', 'rounds': 2, 'end': 1},
                {'name': 'operator_norm', 'granularity': 'kernel', 'rounds': 1},
            ],
            'compression': [4],
            'seed': [0, 1],
        },
    }
    frame = jp.run_sweep(table, out=tmp_path / 'runs')
    last = frame.filter(pl.col('epoch') == 1)
    assert last['error'].null_count() == 4
    assert set(last['label']) == {'LEAN (kernel)', 'operator norm (kernel)'}
    assert set(last['target']) == {'kernels'}
    layers = pl.read_parquet(tmp_path / 'runs' / 'layers' / '*.parquet')
    for run in last.rows(named=True):
        own = layers.filter(pl.col('run_id') == run['run_id'])
        weights = dict(own.select('path', 'kept').iter_rows())
        kernels = sum(n // (1 if 'dense' in path else 9) for path, n in weights.items())
        total = 1 * 3 + 3 * 3 + 14 * 14 * 3 * 10
        assert kernels == round(total / 4)
