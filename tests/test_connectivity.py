"""Effective masks: against the published code, against path enumeration, and by their laws."""

import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import more_but
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from published import golden

import jaxprune as jp
from jaxprune import tree
from jaxprune.errors import PruneError
from jaxprune.structure import (
    Ranking,
    chain,
    connectivity,
    dead_units,
    effective_compression,
    effective_top_k,
    fold_constants,
    forward_order,
    prune_to_active,
)

# --- the networks of the published code, as real networks: ReLU, max pooling, batch norm --------


def conv(x, kernel, stride=1, padding='SAME', groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=groups,
    )


def normed(x):
    """Batch norm in training mode, without parameters."""
    axes = tuple(range(x.ndim - 1))
    return (x - x.mean(axes)) / jnp.sqrt(x.var(axes) + 1e-5)


def lenet300100(p, x):
    x = x.reshape(x.shape[0], -1)
    for i in (1, 2):
        x = jax.nn.relu(normed(x @ p[f'tensor_dense_{i}']['kernel'] + 0.1))
    return x @ p['tensor_dense_3']['kernel']


def lenet5(p, x):
    for i in (1, 2):
        x = jax.nn.relu(conv(x, p[f'tensor_conv{i}']['kernel'], padding='VALID'))
        x = nn.max_pool(x, (2, 2), (2, 2))
    x = x.reshape(x.shape[0], -1)
    for i in (1, 2):
        x = jax.nn.tanh(x @ p[f'tensor_dense{i}']['kernel'])
    return jax.nn.softmax(x @ p['tensor_dense3']['kernel'])


def vgg16(p, x):
    layer = itertools.count(1)
    for convs in (2, 2, 3, 3, 3):
        for _ in range(convs):
            x = jax.nn.relu(normed(conv(x, p[f'tensor_conv{next(layer)}']['kernel'])))
        x = nn.avg_pool(x, (2, 2), (2, 2), padding='SAME')
    return x.reshape(x.shape[0], -1) @ p['tensor_dense2']['kernel']


def resnet18(p, x):
    def kernel(name):
        return p[f'tensor_{name}']['kernel']

    x = jax.nn.relu(normed(conv(x, kernel('conv1'))))
    layer = 2
    for stage in range(4):
        for block in range(2):
            stride = 2 if stage and not block else 1
            y = jax.nn.relu(normed(conv(x, kernel(f'conv{layer}'), stride)))
            y = normed(conv(y, kernel(f'conv{layer + 1}')))
            if stride == 2:
                x = conv(x, kernel(f'shortcut_conv{2 * stage + 1}'), 2)
            x = jax.nn.relu(x + y)
            layer += 2
    x = nn.avg_pool(x, (8, 8), (8, 8))
    return x.reshape(x.shape[0], -1) @ kernel('dense1')


NETWORKS = {
    'effsp_lenet300100': lenet300100,
    'effsp_lenet5': lenet5,
    'effsp_vgg16narrow': vgg16,
    'effsp_vgg16narrow_in16': vgg16,
    'effsp_resnet18narrow': resnet18,
}
FEW_NETWORKS = [name for name in NETWORKS if name != 'effsp_vgg16narrow']


@functools.cache
def network(name: str):
    """`(connect over stacked masks, shapes)` of a network of the published code."""
    file = golden(name)
    shapes = {
        f'{layer}/kernel': tuple(int(n) for n in shape if n)
        for layer, shape in zip(file['meta/layer_order'], file['meta/layer_shapes'], strict=True)
    }
    params = {
        path.split('/')[0]: {'kernel': jax.ShapeDtypeStruct(shape, jnp.float32)}
        for path, shape in shapes.items()
    }
    x = jax.ShapeDtypeStruct((1, *(int(n) for n in file['meta/input_shape'])), jnp.float32)
    connect = connectivity(NETWORKS[name], params, x)
    return jax.jit(lambda stacked: lax.map(connect, stacked)), connect, shapes


def masks_of(file: dict, prefix: str, shapes) -> dict[str, np.ndarray]:
    return {path: file[f'{prefix}/{path.split("/")[0]}'] != 0 for path in shapes}


@pytest.mark.optimised
@pytest.mark.parametrize('name', more_but(FEW_NETWORKS, NETWORKS))
def test_published_effective_masks(name):
    """Expectation: `effective_masks_synflow` of the authors' code, every bit of every mask.

    Theirs is the network made linear, with average pooling; ours is the real one.
    """
    file = golden(name)
    connect, _, shapes = network(name)
    cases = sorted({'/'.join(k.split('/')[2:4]) for k in file if k.startswith('in/mask/')})
    given_ = [masks_of(file, f'in/mask/{case}', shapes) for case in cases]
    wanted = [masks_of(file, f'out/effective_synflow/{case}', shapes) for case in cases]
    stacked = {path: np.stack([m[path] for m in given_]) for path in shapes}
    found = jax.device_get(connect(stacked))
    removed = 0
    for i, case in enumerate(cases):
        for path in shapes:
            np.testing.assert_array_equal(found[path][i], wanted[i][path], err_msg=case)
            removed += int((given_[i][path] & ~wanted[i][path]).sum())
            # The graph-only rule ignores geometry and keeps at least as much.
            layer = path.split('/')[0]
            graph = file[f'out/effective_custom/{case}/{layer}'] != 0
            assert not (found[path][i] & ~graph).any()
    assert removed > 100


# --- by hand, and by enumeration of paths -------------------------------------------------------


def random_masks(key, shapes, density):
    return _random_masks(key, density, tuple(shapes.items()))


@functools.partial(jax.jit, static_argnums=2)
def _random_masks(key, density, shapes):
    return {
        path: jax.random.bernoulli(jax.random.fold_in(key, i), density, shape)
        for i, (path, shape) in enumerate(shapes)
    }


def compiled(forward, params, x, *constants):
    """`connectivity` as one program, whose masks are NumPy's."""
    connect = jax.jit(connectivity(forward, params, x, *constants))
    return lambda masks: jax.device_get(connect(masks))


def shapes_of(params):
    return tree.shapes(tree.pick(params))


def paths_through(edges, sources, sinks):
    """The edges that lie on a path from a source to a sink, by walking every path."""
    out = {}
    for edge in edges:
        out.setdefault(edge[0], []).append(edge)
    used = set()

    def follow(node, taken):
        if node in sinks:
            used.update(taken)
        for edge in out.get(node, []):
            follow(edge[1], [*taken, edge])

    for source in sources:
        follow(source, [])
    return used


def dense_net(p, x):
    h = jax.nn.relu(x @ p['a']['w'] + p['a']['b'])
    y = jax.nn.relu(h @ p['b']['w']) + h  # a residual branch
    z = jnp.concatenate([y, x @ p['skip']['w']], axis=1)
    return z @ p['c']['w']


DENSE_PARAMS = {
    'a': {'w': np.ones((3, 4), np.float32), 'b': np.ones(4, np.float32)},
    'b': {'w': np.ones((4, 4), np.float32)},
    'skip': {'w': np.ones((3, 2), np.float32)},
    'c': {'w': np.ones((6, 2), np.float32)},
}


def dense_edges(masks):
    """Every kept weight, and every skip, as an edge `(from, to, name)` of a graph of units."""
    edges = []
    for name, source, sink in (('a', 'x', 'h'), ('b', 'h', 'y'), ('skip', 'x', 's')):
        kept = np.argwhere(masks[f'{name}/w'])
        edges += [((source, i), (sink, j), (name, i, j)) for i, j in kept.tolist()]
    edges += [(('h', i), ('y', i), ('identity', i)) for i in range(4)]
    for i, j in np.argwhere(masks['c/w']).tolist():
        edges.append((('y', i) if i < 4 else ('s', i - 4), ('out', j), ('c', i, j)))
    return edges


def conv_net(p, x):
    h = jax.nn.relu(conv(x, p['a']['kernel'], stride=2, padding=[(1, 0), (1, 0)]))
    h = nn.max_pool(h, (2, 1), (1, 1))
    y = lax.conv_general_dilated(
        h,
        p['b']['kernel'],
        (1, 1),
        [(1, 1), (0, 0)],
        rhs_dilation=(2, 1),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=2,
    )
    return y.transpose(0, 3, 1, 2).reshape(1, -1) @ p['c']['kernel']


CONV_PARAMS = {
    'a': {'kernel': np.ones((2, 2, 1, 2), np.float32)},
    'b': {'kernel': np.ones((2, 1, 1, 2), np.float32)},
    'c': {'kernel': np.ones((12, 2), np.float32)},
}


def conv_edges(masks):
    """The same for `conv_net` on a 6x6 image: an edge per kept tap and place of use.

    a: stride 2, padded by one before: 3x3 with 2 maps; the pool over two rows leaves 2x3. b: each
    map on its own, taps two rows apart, padded by one row on each side: 2x3 again.
    """
    edges = []
    for i, j, o, u, v in itertools.product(range(3), range(3), range(2), range(2), range(2)):
        row, column = 2 * i + u - 1, 2 * j + v - 1
        if masks['a/kernel'][u, v, 0, o] and 0 <= row < 6 and 0 <= column < 6:
            edges.append((('x', row, column), ('h', i, j, o), ('a', u, v, 0, o)))
    for i, j, o, u in itertools.product(range(2), range(3), range(2), range(2)):
        edges.append((('h', i + u, j, o), ('p', i, j, o), ('pool', i + u, i)))
    for i, j, o, u in itertools.product(range(2), range(3), range(2), range(2)):
        row = i + 2 * u - 1
        if masks['b/kernel'][u, 0, 0, o] and 0 <= row < 2:
            edges.append((('p', row, j, o), ('y', i, j, o), ('b', u, 0, 0, o)))
    for o, i, j, k in itertools.product(range(2), range(2), range(3), range(2)):
        flat = (o * 2 + i) * 3 + j
        if masks['c/kernel'][flat, k]:
            edges.append((('y', i, j, o), ('out', k), ('c', flat, k)))
    return edges


NETS = {
    'dense': (dense_net, DENSE_PARAMS, (1, 3), dense_edges, [('x', i) for i in range(3)]),
    'conv': (
        conv_net,
        CONV_PARAMS,
        (1, 6, 6, 1),
        conv_edges,
        [('x', i, j) for i in range(6) for j in range(6)],
    ),
}


@functools.cache
def small(name: str):
    forward, params, shape, *_ = NETS[name]
    return compiled(forward, params, jnp.ones(shape)), shapes_of(params)


@pytest.mark.parametrize('name', NETS)
def test_brute_force_paths(name):
    """Expectation: every path from an input to an output walked one by one, on random masks."""
    connect, shapes = small(name)
    edges_of, sources = NETS[name][3:]
    sinks = {('out', 0), ('out', 1)}
    any_used = set()

    @settings(max_examples=60, deadline=None, database=None)
    @given(st.integers(0, 10**6), st.sampled_from([0.2, 0.4, 0.6, 0.9]))
    def check(seed, density):
        masks = jax.device_get(random_masks(jax.random.key(seed), shapes, density))
        found = connect(masks)
        used = {edge[2] for edge in paths_through(edges_of(masks), sources, sinks)}
        for path, mask in found.items():
            layer = path.split('/')[0]
            wanted = {at for at in used if at[0] == layer}
            assert {(layer, *at) for at in np.argwhere(mask).tolist()} == wanted
        any_used.add(len(used) > 0)

    check()
    assert True in any_used


def test_examples_of_the_definition():
    """Expectation: by hand (`effective_sparsity`, sanity tests): 2-2-1, empty layer, skip."""
    two = {'a': {'w': np.ones((2, 2))}, 'b': {'w': np.ones((2, 1))}}
    connect = compiled(
        lambda p, x: jax.nn.relu(x @ p['a']['w']) @ p['b']['w'], two, jnp.ones((1, 2))
    )
    masks = {'a/w': np.array([[True, False], [True, False]]), 'b/w': np.ones((2, 1), bool)}
    assert connect(masks)['b/w'].tolist() == [[True], [False]]
    assert connect(masks)['a/w'].tolist() == masks['a/w'].tolist()
    none = {**masks, 'b/w': np.zeros((2, 1), bool)}
    assert not any(mask.any() for mask in connect(none).values())
    assert float(effective_compression(connect, none)) == np.inf
    assert float(effective_compression(connect, masks)) == 2.0  # 6 weights, 3 of them active
    assert dead_units(connect(masks))['a/w'].tolist() == [False, True]

    connect, shapes = small('dense')
    masks = {path: np.ones(shape, bool) for path, shape in shapes.items()}
    cut = connect({**masks, 'b/w': np.zeros(shapes['b/w'], bool)})
    for path in ('a/w', 'c/w', 'skip/w'):  # a branch fully pruned: the skip still connects
        assert bool(cut[path].all())


@pytest.mark.parametrize('name', NETS)
def test_laws_of_effective_masks(name):
    """Expectation: the definition: idempotent, monotone, never more than the mask; under vmap."""
    connect, shapes = small(name)
    forward, params, shape, *_ = NETS[name]
    many = jax.jit(jax.vmap(connectivity(forward, params, jnp.ones(shape))))

    @jax.jit
    def drawn(key, density):
        keys = jax.random.split(key, 8)
        return (
            jax.vmap(lambda key: random_masks(key, shapes, density))(keys),
            jax.vmap(lambda key: random_masks(jax.random.fold_in(key, 9), shapes, 0.2))(keys),
        )

    @settings(max_examples=15, deadline=None, database=None)
    @given(st.integers(0, 10**6), st.sampled_from([0.3, 0.5, 0.8]))
    def check(seed, density):
        smaller, extra = jax.device_get(drawn(jax.random.key(seed), density))
        larger = jax.tree.map(np.logical_or, smaller, extra)
        once, more = (jax.device_get(many(masks)) for masks in (smaller, larger))
        again = jax.device_get(many(once))
        for path in shapes:
            assert bool((once[path] <= smaller[path]).all())
            assert bool((once[path] == again[path]).all())
            assert bool((once[path] <= more[path]).all())
        one = connect({path: mask[3] for path, mask in smaller.items()})
        assert all(bool((one[path] == once[path][3]).all()) for path in shapes)

    check()


def test_permuted_units_permute_the_effective_mask_and_values_do_not_matter():
    """Expectation: names of hidden units and values of weights are no part of the definition."""
    connect, shapes = small('dense')
    forward, params = NETS['dense'][:2]
    rng = np.random.default_rng(0)
    other = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape) * 1e3), params)
    connect_other = compiled(forward, other, jnp.zeros((1, 3)))
    for seed in range(10):
        masks = jax.device_get(random_masks(jax.random.key(seed), shapes, 0.4))
        found = connect(masks)
        for path in shapes:
            assert bool((connect_other(masks)[path] == found[path]).all())
        # The residual unit i is unit i of both layers, so both sides of b move.
        order = rng.permutation(4)
        rows = np.concatenate([order, [4, 5]])
        moved = {
            'a/w': masks['a/w'][:, order],
            'b/w': masks['b/w'][order][:, order],
            'skip/w': masks['skip/w'],
            'c/w': masks['c/w'][rows],
        }
        expected = {
            'a/w': found['a/w'][:, order],
            'b/w': found['b/w'][order][:, order],
            'skip/w': found['skip/w'],
            'c/w': found['c/w'][rows],
        }
        again = connect(moved)
        for path in shapes:
            assert bool((again[path] == expected[path]).all())


# --- layers of flax, and what is not known ------------------------------------------------------


class Encoder(nn.Module):
    """One transformer block with two heads, group norm and a dense gate."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name='embed')(x)
        y = nn.LayerNorm()(x)
        y = nn.MultiHeadDotProductAttention(num_heads=2, name='attention')(y)
        x = nn.GroupNorm(num_groups=2)(x + y)
        x = x * nn.sigmoid(nn.Dense(8, name='gate')(nn.RMSNorm()(x)))
        return nn.log_softmax(nn.Dense(3, name='head')(nn.gelu(x).mean(1)))


@functools.cache
def encoder():
    module, x = Encoder(), jnp.ones((1, 5, 6))
    params = jax.jit(module.init)(jax.random.key(0), x)['params']
    connect = compiled(lambda p, x: module.apply({'params': p}, x), params, x)
    return connect, shapes_of(params), module, params


def test_attention_is_open_mixing_and_norms_are_elementwise():
    """Expectation: by hand from the stated rules."""
    connect, shapes, *_ = encoder()
    ones = {path: np.ones(shape, bool) for path, shape in shapes.items()}
    assert all(bool(m.all()) for m in connect(ones).values())
    zero = {path: np.zeros(shape, bool) for path, shape in shapes.items()}
    attention = 'attention/{}/kernel'.format

    # Without values there is nothing to mix: queries, keys and the output do no work.
    found = connect({**ones, attention('value'): zero[attention('value')]})
    for name in ('query', 'key', 'out', 'value'):
        assert not found[attention(name)].any(), name
    assert bool(found['embed/kernel'].all()) and bool(found['head/kernel'].all())

    # Without queries the keys still meet a constant (its bias), and the values go through.
    found = connect({**ones, attention('query'): zero[attention('query')]})
    assert bool(found[attention('key')].all()) and bool(found[attention('value')].all())

    # A dead channel stays dead through layer norm, group norm and gelu; the gate on it carries
    # input all the same, until its own column is cut.
    cut = {**ones, **{path: ones[path].copy() for path in ('embed/kernel', 'gate/kernel')}}
    cut[attention('out')] = ones[attention('out')].copy()
    cut['embed/kernel'][:, 3] = cut[attention('out')][:, :, 3] = False
    found = connect(cut)
    assert bool(found['head/kernel'].all()) and bool(found['gate/kernel'][:3].all())
    assert not found['gate/kernel'][3].any()
    cut['gate/kernel'][:, 3] = False
    found = connect(cut)
    assert not found['head/kernel'][3].any()
    assert bool(found['head/kernel'][:3].all())
    for name in ('query', 'key', 'value'):
        assert not found[attention(name)][3].any()


def test_a_gate_that_may_be_zero_counts_with_what_it_gates():
    """Expectation: the stated rule: a product of two signals may depend on either."""
    params = {'a': {'w': np.ones((2, 2))}, 'b': {'w': np.ones((2, 2))}}
    connect = connectivity(
        lambda p, x: jnp.tanh(x @ p['a']['w']) * (x @ p['b']['w']), params, jnp.ones((1, 2))
    )
    found = connect({'a/w': jnp.ones((2, 2), bool), 'b/w': jnp.zeros((2, 2), bool)})
    assert bool(found['a/w'].all())


def test_causal_attention_sees_no_future():
    """Expectation: by hand. The first token sees itself alone, so what only later tokens carry
    cannot reach it: here each token enters through its own kernel, and only the first is read.
    """
    params = {'embed': {'kernel': np.ones((3, 2, 2))}, 'query': {'kernel': np.ones((2, 2))}}
    see = np.tril(np.ones((3, 3), bool))

    def attention(scores, values):
        def forward(p, x):
            h = jnp.einsum('bti,tij->btj', x, p['embed']['kernel'])
            return scores(h @ p['query']['kernel'], h) @ values(h)

        return forward

    def product(q, h):
        return q @ jnp.swapaxes(h, 1, 2)

    ways = {
        'minus infinity': lambda q, h: jax.nn.softmax(jnp.where(see, product(q, h), -jnp.inf)),
        'smallest number': lambda q, h: nn.softmax(
            jnp.where(see, product(q, h), jnp.finfo(jnp.float32).min)
        ),
        'added': lambda q, h: jax.nn.softmax(product(q, h) - 1e9 * (1 - see)),
        'made inside': lambda q, h: jax.nn.softmax(
            jnp.where(jnp.arange(3)[:, None] >= jnp.arange(3), product(q, h), -1e30)
        ),
        'exp of the triangle': lambda q, h: jnp.tril(jnp.exp(product(q, h))),
        'linear': lambda q, h: jnp.tril(product(q, h)),
        'gated': lambda q, h: jax.nn.sigmoid(product(q, h)) * see,
    }
    ones = {'embed/kernel': np.ones((3, 2, 2), bool), 'query/kernel': np.ones((2, 2), bool)}
    for name, scores in ways.items():
        forward = attention(scores, lambda h: h)
        of_token = [
            connectivity(lambda p, x, f=forward, t=t: f(p, x)[:, t], params, jnp.ones((1, 3, 2)))
            for t in range(3)
        ]
        each = jax.device_get(jax.jit(lambda m, of=of_token: [f(m) for f in of])(ones))
        for token, found in enumerate(each):
            live = found['embed/kernel'].all((1, 2)).tolist()
            assert live == [i <= token for i in range(3)], (name, token)
            assert not found['embed/kernel'][token + 1 :].any(), (name, token)
            assert bool(found['query/kernel'].all())  # a score may reach the output


def test_flax_causal_attention():
    """Expectation: as above, with the layer and the mask as users write them."""
    layer = nn.MultiHeadDotProductAttention(num_heads=2, use_bias=False)
    x = jnp.ones((1, 4, 6))
    params = jax.jit(layer.init)(jax.random.key(0), x, x)['params']

    def forward(p, x, read):
        x = jnp.einsum('bti,tij->btj', x, p['own']['kernel'])
        y = layer.apply({'params': p['attention']}, x, x, mask=nn.make_causal_mask(x[..., 0]))
        return y[:, read]

    params = {'attention': params, 'own': {'kernel': jnp.ones((4, 6, 6))}}
    of_token = [connectivity(lambda p, x, r=r: forward(p, x, r), params, x) for r in range(4)]
    each = jax.device_get(jax.jit(lambda m: [f(m) for f in of_token])(dense_masks(params)))
    for read, found in enumerate(each):
        assert found['own/kernel'].all((1, 2)).tolist() == [i <= read for i in range(4)]


HALF = np.array([1.0, 1.0, 0.0, 0.0], np.float32)
PRODUCTS = {
    # name: (forward of (x @ a, x @ b), the units of a and of b that work), four units each
    'masked gate': (lambda a, b: jax.nn.sigmoid(a * HALF) * HALF * b, HALF, HALF),
    'masked values': (lambda a, b: jax.nn.sigmoid(a) * (b * HALF), HALF, HALF),
    'gate on a constant': (lambda a, b: jax.nn.sigmoid(a) * (b * HALF + 1), np.ones(4), HALF),
    'sum of the other half': (
        lambda a, b: (a * HALF) * (a * (1 - HALF)).sum(-1, keepdims=True),
        np.ones(4),
        np.zeros(4),
    ),
    'minus the mean of the rest': (
        lambda a, b: a * HALF - (a * (1 - HALF)).mean(-1, keepdims=True),
        np.ones(4),
        np.zeros(4),
    ),
    'times its sum': (lambda a, b: (a * a.sum(-1, keepdims=True))[:, :2], np.ones(4), np.zeros(4)),
    'squeeze and excite': (
        lambda a, b: (a * jax.nn.sigmoid(a.sum(-1, keepdims=True)))[:, :2],
        np.ones(4),
        np.zeros(4),
    ),
    'divided by the other': (lambda a, b: (a / (1 + b * b))[:, :2], HALF, HALF),
    'a choice': (lambda a, b: jnp.where(HALF > 0, a, b), HALF, 1 - HALF),
    # Normalisation by its own statistic counts as elementwise.
    'softmax': (lambda a, b: jax.nn.softmax(a)[:, :2], HALF, np.zeros(4)),
    'log softmax': (lambda a, b: jax.nn.log_softmax(a)[:, :2], HALF, np.zeros(4)),
    'unit length': (
        lambda a, b: (a / jnp.linalg.norm(a, axis=-1, keepdims=True))[:, :2],
        HALF,
        np.zeros(4),
    ),
    'by the inverse root': (
        lambda a, b: (a * jax.lax.rsqrt((a * a).mean(-1, keepdims=True) + 1e-6) * 3.0)[:, :2],
        HALF,
        np.zeros(4),
    ),
    'by a power': (
        lambda a, b: (a * ((a**2).mean(-1, keepdims=True) + 1e-6) ** -0.5)[:, :2],
        HALF,
        np.zeros(4),
    ),
    'standardised': (lambda a, b: jax.nn.standardize(a)[:, :2], HALF, np.zeros(4)),
}


@pytest.mark.parametrize('name', PRODUCTS)
def test_products_and_normalisations(name):
    """Expectation: by hand from the stated rules."""
    combine, of_a, of_b = PRODUCTS[name]
    params = {'a': {'w': np.ones((3, 4), np.float32)}, 'b': {'w': np.ones((3, 4), np.float32)}}
    connect = compiled(
        lambda p, x: combine(x @ p['a']['w'], x @ p['b']['w']), params, jnp.ones((1, 3))
    )
    ones = {path: np.ones((3, 4), bool) for path in ('a/w', 'b/w')}
    found = connect(ones)
    np.testing.assert_array_equal(found['a/w'], np.broadcast_to(of_a > 0, (3, 4)))
    np.testing.assert_array_equal(found['b/w'], np.broadcast_to(of_b > 0, (3, 4)))
    again = connect(found)
    for path in found:
        np.testing.assert_array_equal(again[path], found[path])


def test_a_triangle_of_weights_and_a_choice_among_them():
    """Expectation: by hand; what the constant closes is on no path, what it opens for good is."""
    params = {'a': {'w': np.ones((3, 3), np.float32)}, 'b': {'w': np.ones((3, 3), np.float32)}}
    ones = {path: jnp.ones((3, 3), bool) for path in ('a/w', 'b/w')}
    lower = np.tril(np.ones((3, 3), bool))
    found = connectivity(
        lambda p, x: x @ jnp.tril(p['a']['w']) @ jnp.where(lower, p['b']['w'], 1.0),
        params,
        jnp.ones((1, 3)),
    )
    np.testing.assert_array_equal(found(ones)['a/w'], lower)
    np.testing.assert_array_equal(found(ones)['b/w'], lower)
    # Without b's own weights its constants still carry rows 0 and 1 of it to the output.
    left = found({**ones, 'b/w': jnp.zeros((3, 3), bool)})['a/w']
    np.testing.assert_array_equal(left, lower & np.array([True, True, False]))


def test_a_loop_of_no_steps():
    """Expectation: it is not there."""
    params = {'none': {'w': np.ones((0, 3, 3))}, 'head': {'w': np.ones((3, 2))}}

    def forward(p, x):
        x, sums = lax.scan(lambda h, w: (h @ w, h.sum()), x, p['none']['w'])
        return x @ p['head']['w'] + sums.sum()

    ones = {'none/w': jnp.ones((0, 3, 3), bool), 'head/w': jnp.ones((3, 2), bool)}
    found = connectivity(forward, params, jnp.ones((1, 3)))(ones)
    assert bool(found['head/w'].all()) and found['none/w'].shape == (0, 3, 3)


def layers(**shapes):
    return {name: {'w': np.ones(shape, np.float32)} for name, shape in shapes.items()}


def dense_masks(params):
    return {path: np.ones(shape, bool) for path, shape in shapes_of(params).items()}


def active(forward, params, x, *constants, **masks):
    """Path -> effective mask, of the dense masks or those given."""
    masks = {**dense_masks(params), **{f'{name}/w': m for name, m in masks.items()}}
    found = compiled(forward, params, x, *constants)(masks)
    return {path.split('/')[0]: mask for path, mask in found.items()}


def first_token(scores_of):
    """Which of three tokens reach the first, each through a kernel of its own."""
    params = {**layers(embed=(3, 2, 2), query=(2, 2)), 'bias': {'b': np.ones((3, 3), np.float32)}}

    def forward(p, x):
        h = jnp.einsum('bti,tij->btj', x, p['embed']['w'])
        scores = h @ p['query']['w'] @ jnp.swapaxes(h, 1, 2)
        return (scores_of(scores, p['bias']['b'], x[..., 0] > 0) @ h)[:, 0]

    return active(forward, params, jnp.ones((1, 3, 2)))['embed'].all((1, 2)).tolist()


SEE = np.tril(np.ones((3, 3), bool))
LATER = np.where(SEE, 0, -1e9).astype(np.float32)
MASKED = {
    'scaled after': lambda s, b, pad: jax.nn.softmax(jnp.where(SEE, s, -jnp.inf) / 8**0.5),
    'and padding': lambda s, b, pad: jax.nn.softmax(
        jnp.where(SEE & pad[:, None, :], s, jnp.finfo(s.dtype).min)
    ),
    'padding and': lambda s, b, pad: jax.nn.softmax(
        jnp.where(pad[:, :, None] & pad[:, None, :] & SEE, s, -1e9)
    ),
    'combined by flax': lambda s, b, pad: jax.nn.softmax(
        jnp.where(
            nn.combine_masks(nn.make_causal_mask(pad), nn.make_attention_mask(pad, pad))[:, 0] > 0,
            s,
            -1e9,
        )
    ),
    'nested': lambda s, b, pad: jax.nn.softmax(
        jnp.where(pad[:, None, :], jnp.where(SEE, s, -1e9), -1e9)
    ),
    'with a learnt bias': lambda s, b, pad: jax.nn.softmax(s + (b + LATER)),
    'with a masked bias': lambda s, b, pad: jax.nn.softmax(s + jnp.where(SEE, b, -jnp.inf)),
    'relu': lambda s, b, pad: jax.nn.relu(jnp.where(SEE, s, -1e9)),
    'a sink': lambda s, b, pad: jax.nn.softmax(
        jnp.concatenate([jnp.where(SEE, s, -1e9), jnp.zeros((1, 3, 1))], -1)
    )[..., :3],
    'at least': lambda s, b, pad: jax.nn.softmax(jnp.maximum(jnp.where(SEE, s, -jnp.inf), -1e9)),
}


@pytest.mark.parametrize('name', MASKED)
def test_causal_masks_as_people_write_them(name):
    """Expectation: by hand; the first token sees itself alone."""
    assert first_token(MASKED[name]) == [True, False, False]


def test_masks_that_close_nothing():
    """Expectation: by hand. Shifting all scores is no mask, a row that is masked as a whole is an
    average of all, and what is lifted again was not masked.
    """
    every = [True] * 3
    assert first_token(lambda s, b, pad: jax.nn.softmax(s - 1e9)) == every
    assert first_token(lambda s, b, pad: jax.nn.sigmoid(1e5 * s - 5e4)) == every
    nothing = np.zeros((3, 3), bool)
    assert first_token(lambda s, b, pad: jax.nn.softmax(jnp.where(nothing, s, -1e9))) == every
    lifted = 2e4 * ~SEE
    assert first_token(lambda s, b, pad: jax.nn.sigmoid(jnp.where(SEE, s, -2e4) + lifted)) == every
    assert first_token(lambda s, b, pad: jax.nn.softmax(jnp.where(SEE, s, b))) == every


def test_a_weight_mixed_before_the_input_meets_it_is_refused():
    """Expectation: no guess; alone, without input, such weights do no work."""
    params = layers(a=(3, 3), b=(3, 3))
    basis = np.eye(3, dtype=np.float32)
    for forward in (
        lambda p, x: x @ (basis @ p['a']['w']) @ p['b']['w'],
        lambda p, x: x @ p['b']['w'] * (p['a']['w'] @ basis)[0],
        lambda p, x: (x @ p['b']['w']) / (1 + jnp.tanh(basis @ p['a']['w'])[0]),
    ):
        with pytest.raises(PruneError, match="'a/w' is mixed with other numbers"):
            connectivity(forward, params, jnp.ones((1, 3)))
    found = active(lambda p, x: x @ p['b']['w'] + basis @ p['a']['w'], params, jnp.ones((1, 3)))
    assert not found['a'].any() and found['b'].all()


def test_stacking_and_loops_that_stack():
    """Expectation: the same networks written out."""
    params, x = layers(a=(3, 3), b=(6, 2)), jnp.ones((1, 4, 3))
    cut = np.ones((3, 3), bool)
    cut[:, 1] = False

    for forward in (
        lambda p, x: jnp.stack([x[:, 0] @ p['a']['w'], x[:, 1]], -1).reshape(1, 6) @ p['b']['w'],
        lambda p, x: (
            jnp.concatenate([x[:, 0] @ p['a']['w'], x[:, 1]], -1)[:, np.array([0, 3, 1, 4, 2, 5])]
            @ p['b']['w']
        ),
    ):
        found = active(forward, params, x, a=cut)
        assert found['b'].all(1).tolist() == [True, True, False, True, True, True]

    def scanned(p, x):
        rows = jax.lax.map(lambda t: t @ p['a']['w'], x[0])
        first, *_ = jnp.unstack(rows)
        return jnp.tile(first, 2) @ p['b']['w']

    found = active(scanned, params, x, a=cut)
    assert found['b'].all(1).tolist() == [True, False, True] * 2
    assert found['a'][:, [0, 2]].all()

    class Recurrent(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.RNN(nn.GRUCell(4))(x))

    net = Recurrent()
    weights = jax.jit(net.init)(jax.random.key(0), x)['params']
    connect = compiled(lambda p, x: net.apply({'params': p}, x), weights, x)
    masks = {path: m for path, m in dense_masks(weights).items() if path.endswith('kernel')}
    assert all(bool(m.all()) for m in connect(masks).values())


ODD_PRODUCTS = {
    # (forward of (a, b) with four units each, the units of a and of b that work); all by hand.
    'a mean is no zero': (
        lambda a, b: jax.nn.standardize(jnp.pad(a[:, :2], ((0, 0), (0, 2)))) * b,
        HALF,
        np.ones(4),
    ),
    'signs of a gate': (lambda a, b: jnp.where(a > 0, 1.0, -1.0) @ (b + 1).T, np.ones(4), None),
    'elu': (lambda a, b: jax.nn.elu(a * HALF) * b, HALF, HALF),
    'log softmax of some': (
        lambda a, b: jax.nn.log_softmax(jnp.where(HALF > 0, a, -1e9))[:, :1],
        np.array([1.0, 0, 0, 0]),
        np.zeros(4),
    ),
    'twice inverse': (
        lambda a, b: (a * jax.lax.rsqrt(1 / (a * a).mean(-1, keepdims=True)))[:, :2],
        np.ones(4),
        np.zeros(4),
    ),
    'over an inverse': (
        lambda a, b: (a / (1 / a.sum(-1, keepdims=True)))[:, :2],
        np.ones(4),
        np.zeros(4),
    ),
    'plus the mean': (
        lambda a, b: (a - (-a.mean(-1, keepdims=True)))[:, :2],
        np.ones(4),
        np.zeros(4),
    ),
    'gated by a comparison': (
        lambda a, b: (a * (1 / a.sum(-1, keepdims=True) > 0.5))[:, :2],
        np.ones(4),
        np.zeros(4),
    ),
    'a pair of both, closed': (
        lambda a, b: ((a > 0) & (HALF > 0)) * b,
        HALF,
        HALF,
    ),
    'named, placed, passed on': (
        lambda a, b: checkpoint_name(jax.lax.optimization_barrier(jax.device_put(a)), 'a') + b,
        np.ones(4),
        np.ones(4),
    ),
}


@pytest.mark.parametrize('name', ODD_PRODUCTS)
def test_odd_products(name):
    """Expectation: by hand from the stated rules."""
    combine, of_a, of_b = ODD_PRODUCTS[name]
    found = active(
        lambda p, x: combine(x @ p['a']['w'], x @ p['b']['w']),
        layers(a=(3, 4), b=(3, 4)),
        jnp.ones((1, 3)),
    )
    for name, units in (('a', of_a), ('b', of_b)):
        if units is not None:
            np.testing.assert_array_equal(found[name], np.broadcast_to(units > 0, (3, 4)))


def test_constants_that_are_traced():
    """Expectation: the mask of a net inside someone's `jit` closes what it closes outside."""
    params = layers(a=(2, 2))

    def count(see):
        connect = connectivity(
            lambda p, x: (jax.nn.softmax(jnp.where(see, x @ p['a']['w'], -1e9) * see) @ x)[:, 0],
            params,
            jnp.ones((1, 2, 2)),
        )
        return connect(dense_masks(params))['a/w'].sum()

    assert int(jax.jit(count)(jnp.eye(2, dtype=bool))) == 2
    assert int(count(jnp.eye(2, dtype=bool))) == 2


def test_a_choice_at_run_time_is_told_as_such():
    """Expectation: the advice names the choice, not the weights in it."""
    params = layers(a=(3, 3))
    with pytest.raises(PruneError, match='known only when it runs; choose in Python'):
        connectivity(
            lambda p, x: lax.cond(x.sum() > 0, lambda: x @ p['a']['w'], lambda: -x @ p['a']['w']),
            params,
            jnp.ones((1, 3)),
        )


def test_scanned_layers_embeddings_and_transposed_weights():
    """Expectation: by hand; the same network written with a loop and with `lax.scan`."""
    params = {'layers': {'w': np.ones((3, 4, 4), np.float32)}, 'head': {'w': np.ones((2, 4))}}

    def scanned(p, x):
        x, _ = lax.scan(lambda h, w: (jax.nn.relu(h @ w), None), x, p['layers']['w'])
        return x @ p['head']['w'].T

    def looped(p, x):
        for i in range(3):
            x = jax.nn.relu(x @ p['layers']['w'][i])
        return x @ p['head']['w'].T

    a, b = (compiled(f, params, jnp.ones((1, 4))) for f in (scanned, looped))
    removed = 0
    for seed in range(6):
        masks = jax.device_get(random_masks(jax.random.key(seed), shapes_of(params), 0.45))
        first, second = a(masks), b(masks)
        for path in first:
            assert bool((first[path] == second[path]).all())
            removed += int((masks[path] & ~first[path]).sum())
    assert removed > 10

    words = {'table': {'kernel': np.ones((7, 4))}, 'head': {'kernel': np.ones((4, 2))}}
    connect = compiled(
        lambda p, tokens: p['table']['kernel'][tokens].mean(1) @ p['head']['kernel'],
        words,
        jnp.zeros((1, 5), jnp.int32),
    )
    masks = dense_masks(words)
    masks['table/kernel'][:, 1] = masks['table/kernel'][2, 0] = masks['head/kernel'][3] = False
    found = connect(masks)
    assert not found['head/kernel'][1].any() and bool(found['head/kernel'][0].all())
    assert not found['table/kernel'][:, 3].any()
    assert found['table/kernel'][:, 0].tolist() == [True, True, False, True, True, True, True]


@pytest.mark.parametrize(
    ('forward', 'operation'),
    [
        (lambda p, x: jnp.sort(x @ p['w']['kernel']), 'sort'),
        (
            lambda p, x: lax.while_loop(
                lambda h: h.sum() < 9, lambda h: h + h, x @ p['w']['kernel']
            ),
            'while',
        ),
        (lambda p, x: x @ jnp.linalg.qr(p['w']['kernel'])[0], 'qr'),
        (lambda p, x: x @ (p['w']['kernel'] - p['w']['kernel'].mean()), 'reduce_sum'),
        (lambda p, x: x + p['w']['kernel'], 'add'),
    ],
)
def test_an_unknown_operation_is_named_and_never_guessed(forward, operation):
    """Expectation: one line with the operation and the file it came from."""
    params = {'w': {'kernel': np.ones((3, 3), np.float32)}}
    with pytest.raises(PruneError, match=operation) as caught:
        connectivity(forward, params, jnp.ones((3, 3)))
    assert 'test_connectivity.py' in str(caught.value) and '\n' not in str(caught.value)


def test_masks_that_do_not_fit():
    """Expectation: an error that names the leaf."""
    connect, shapes = small('dense')
    masks = {path: np.ones(shape, bool) for path, shape in shapes.items()}
    with pytest.raises(PruneError, match='lack a/w'):
        connect({path: m for path, m in masks.items() if path != 'a/w'})
    with pytest.raises(PruneError, match="'a/w' must be boolean"):
        connect({**masks, 'a/w': np.ones(shapes['a/w'])})
    with pytest.raises(PruneError, match='of shape'):
        connect({**masks, 'a/w': np.ones((4, 3), bool)})


def test_no_overflow_at_any_depth():
    """Expectation: 100 dense layers of width 12 keep all; one link cut out cuts all.

    With positive weights of 1 the flow would be 12**100, past float32 (and 12**300 past float64).
    """
    depth = 100
    params = {f'l{i:03}': {'w': np.ones((12, 12), np.float32)} for i in range(depth)}

    def forward(p, x):
        for i in range(depth):
            x = jax.nn.relu(x @ p[f'l{i:03}']['w'])
        return x

    connect = jax.jit(connectivity(forward, params, jnp.ones((1, 12))))
    masks = {path: jnp.ones((12, 12), bool) for path in shapes_of(params)}
    assert all(bool(m.all()) for m in connect(masks).values())
    one = jnp.zeros((12, 12), bool).at[3, 4].set(True)
    thin = {path: one if path == 'l050/w' else m for path, m in masks.items()}
    found = connect(thin)
    assert bool(found['l051/w'][4].all()) and int(found['l051/w'].sum()) == 12
    assert int(found['l000/w'].sum()) == 144
    none = connect({**masks, 'l050/w': jnp.zeros((12, 12), bool)})
    assert not any(m.any() for m in none.values())


def test_forward_order_is_the_order_of_use():
    """Expectation: the order in the code of the networks, not that of names."""
    params = {'z': {'w': np.ones((3, 4))}, 'a': {'w': np.ones((4, 4))}, 'm': {'w': np.ones((2, 4))}}

    def forward(p, x):
        return (jax.nn.relu(x @ p['z']['w']) @ p['a']['w']) @ p['m']['w'].T

    assert forward_order(forward, params, jnp.ones((1, 3))) == ['z/w', 'a/w', 'm/w']


# --- the target ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('name', 'sparsity', 'off'),
    [
        ('effsp_lenet300100', '0.9', 0),
        pytest.param('effsp_lenet300100', '0.99', 0, marks=pytest.mark.more),
        ('effsp_lenet300100', '0.999', 0),
        pytest.param('effsp_lenet5', '0.9', 1, marks=pytest.mark.slow),
        ('effsp_lenet5', '0.99', 0),
    ],
)
def test_published_correction_to_effective_sparsity(name, sparsity, off):
    """Expectation: `effective_correction_from_global_scores`; one weight where rounding decides."""
    file = golden(name)
    _, connect, shapes = network(name)
    with jax.enable_x64(True):
        scores = {p: jnp.asarray(file[f'in/score/{p.split("/")[0]}']) for p in shapes}
        compression = 1 / (1 - float(sparsity))
        found = jax.jit(lambda scores: effective_top_k(connect, scores, compression))(scores)
    wanted = masks_of(file, f'out/corrected_mask/s{sparsity}', shapes)
    assert sum(int((np.asarray(found[p]) != wanted[p]).sum()) for p in shapes) == off


@pytest.mark.parametrize('allocation', ['global', 'uniform', 'erk', 'igq'])
def test_the_sparsest_mask_of_the_chain(allocation):
    """Expectation: every mask of the chain in turn; and a chain is nested and exact."""
    forward, params, shape, *_ = NETS['dense']
    connect, shapes = jax.jit(connectivity(forward, params, jnp.ones(shape))), shapes_of(params)
    steps = chain(shapes, allocation)
    rng = np.random.default_rng(5)
    scores = {path: rng.random(shape, np.float32) for path, shape in shapes.items()}
    size = sum(math.prod(s) for s in shapes.values())
    places = np.unique(np.linspace(0, steps.length - 1, 4000).astype(int))
    table = jax.device_get(jax.jit(jax.vmap(steps.counts))(places))
    for column in table.values():
        assert (np.diff(column) >= 0).all()
    last = {path: int(c[-1]) for path, c in table.items()}
    assert sum(last.values()) == size
    select = jp.global_top_k if allocation == 'global' else jp.layerwise_top_k

    def active_at(counts):
        return sum(m.sum() for m in connect(select(scores, counts)).values())

    by_place = np.asarray(jax.lax.map(active_at, table))
    assert (np.diff(by_place) >= 0).all()
    ranking = Ranking(jax.tree.map(lambda s: np.zeros(s.shape, np.int32), scores), scores)
    # Many targets in one program.
    wanted = np.arange(1, size + 1, 3)
    many = jax.jit(jax.vmap(lambda a: prune_to_active(connect, ranking, steps, a)))
    masks, active = jax.device_get(many(wanted))
    for i, a in enumerate(wanted.tolist()):
        enough = by_place >= a
        assert int(active[i]) == by_place[enough][0] >= a
        assert sum(int(m[i].sum()) for m in masks.values()) >= int(active[i])


def test_later_rounds_rank_before_earlier_ones():
    """Expectation: three weights by hand: pruned first = back last, whatever the scores."""
    params = {'a': {'w': np.ones((1, 3))}}
    connect = connectivity(lambda p, x: x @ p['a']['w'], params, jnp.ones((1, 1)))
    ranking = Ranking({'a/w': jnp.array([[1, 2, 2]])}, {'a/w': jnp.array([[9.0, 0.5, 0.7]])})
    find = jax.jit(lambda active: prune_to_active(connect, ranking, chain({'a/w': (1, 3)}), active))
    for active, kept in ((1, [0, 0, 1]), (2, [0, 1, 1]), (3, [1, 1, 1])):
        masks, _ = find(active)
        assert masks['a/w'].astype(int).tolist() == [kept]


# --- folding ------------------------------------------------------------------------------------


def biased(p, x, state):
    """Convolution (valid, with bias), batch norm in evaluation mode, dense layers with biases."""
    h = conv(x, p['a']['kernel'], padding='VALID') + p['a']['bias']
    h = (h - state['mean']) * lax.rsqrt(state['var'] + 1e-5)
    h = jax.nn.relu(conv(jnp.tanh(h + 0.3), p['b']['kernel'], padding='VALID') - state['second'])
    h = h.reshape(h.shape[0], -1)
    h = jax.nn.gelu(h @ p['c']['kernel'] + p['c']['bias'])
    return h @ p['d']['kernel'] + p['d']['bias']


def folding_case(seed):
    shapes = {
        'a': {'kernel': (2, 2, 1, 3), 'bias': (3,)},
        'b': {'kernel': (2, 2, 3, 4)},
        'c': {'kernel': (16, 5), 'bias': (5,)},
        'd': {'kernel': (5, 2), 'bias': (2,)},
    }
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda shape: rng.normal(size=shape), shapes, is_leaf=lambda s: type(s) is tuple
    )
    state = {
        'mean': rng.normal(size=3),
        'var': rng.uniform(0.5, 2, size=3),
        'second': rng.normal(size=4),
    }
    x = rng.normal(size=(6, 4, 4, 1))
    return jax.tree.map(jnp.asarray, (params, state, x))


@pytest.mark.programs(160)  # folding looks at numbers, operation by operation
def test_folding_leaves_the_function_as_it_was():
    """Expectation: outputs of the masked network, float64; zeroing without folding differs."""
    forward, apply_masks = jax.jit(biased), jax.jit(tree.apply_masks)
    with jax.enable_x64(True):
        removed = changed = 0
        params, state, x = folding_case(0)
        connect = compiled(biased, params, x[:1], state)  # values do not matter
        for seed in range(3):
            params, state, x = folding_case(seed)
            masks = random_masks(jax.random.key(seed), shapes_of(params), 0.3)
            masks = jax.tree.map(np.array, masks)
            # A unit without incoming weights, of each kind of layer.
            masks['a/kernel'][..., 0] = masks['c/kernel'][:, 2] = False
            folded = fold_constants(forward, params, masks, x, state)
            before = np.asarray(forward(apply_masks(params, masks), x, state))
            after = forward(folded.params, x, *folded.constants)
            np.testing.assert_allclose(after, before, rtol=0, atol=1e-10 * abs(before).max())
            assert folded.unfolded == ()
            plain = forward(apply_masks(params, folded.masks), x, state)
            changed += float(abs(plain - before).max()) > 1e-3
            for path, mask in connect(masks).items():
                np.testing.assert_array_equal(folded.masks[path], mask)
                removed += int((masks[path] & ~mask).sum())
        assert removed > 15 and changed >= 2


@pytest.mark.programs(160)
def test_folding_kernels_that_are_joined_or_cut_to_a_triangle():
    """Expectation: outputs of the masked network, float64; two kernels side by side, of which one
    is used again where no bias is, so that both keep what is inactive.
    """
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        params = {
            'a': {'kernel': rng.normal(size=(3, 4)), 'bias': rng.normal(size=4)},
            'q': {'kernel': rng.normal(size=(4, 2))},
            'k': {'kernel': rng.normal(size=(4, 2))},
            'qk': {'bias': rng.normal(size=4)},
            'tri': {'kernel': rng.normal(size=(4, 4)), 'bias': rng.normal(size=4)},
        }
        params = jax.tree.map(jnp.asarray, params)

        def forward(p, x, again=False):
            h = jnp.tanh(x @ p['a']['kernel'] + p['a']['bias'])
            both = jnp.concatenate([p['q']['kernel'], p['k']['kernel']], axis=1)
            y = jnp.tanh(h @ both + p['qk']['bias'])
            y = y @ jnp.tril(p['tri']['kernel']) + p['tri']['bias']
            return (y, h @ p['k']['kernel']) if again else y

        masks = {p: mask for p, mask in dense_masks(params).items() if p.endswith('kernel')}
        masks['a/kernel'][:, 1] = masks['q/kernel'][:, 0] = False
        x = jnp.asarray(rng.normal(size=(5, 3)))
        for again, unfolded in ((False, ()), (True, ('k/kernel', 'q/kernel'))):

            @jax.jit
            def run(p, x, again=again):
                return forward(p, x, again)

            folded = fold_constants(run, params, masks, x)
            assert folded.unfolded == unfolded
            before = jax.tree.leaves(run(tree.apply_masks(params, masks), x))
            after = jax.tree.leaves(run(folded.params, x))
            for one, other in zip(before, after, strict=True):
                np.testing.assert_allclose(other, one, rtol=0, atol=1e-12)
            assert bool(folded.masks['q/kernel'][1].any()) == again


def test_a_constant_next_to_padding_stays():
    """Expectation: zero padding makes it differ from place to place, so its weights are kept."""
    params = {
        'a': {'kernel': np.ones((3, 3, 1, 2)), 'bias': np.array([0.5, 1.0])},
        'b': {'kernel': np.ones((3, 3, 2, 1)), 'bias': np.zeros(1)},
    }
    params = jax.tree.map(jnp.asarray, params)

    @jax.jit
    def forward(p, x):
        h = jax.nn.relu(conv(x, p['a']['kernel']) + p['a']['bias'])
        return conv(h, p['b']['kernel']) + p['b']['bias']

    masks = {'a/kernel': np.ones((3, 3, 1, 2), bool), 'b/kernel': np.ones((3, 3, 2, 1), bool)}
    masks['a/kernel'][..., 1] = False
    x = jax.random.normal(jax.random.key(0), (3, 5, 5, 1))
    folded = fold_constants(forward, params, masks, x)
    assert folded.unfolded == ('b/kernel',)
    assert bool(folded.masks['b/kernel'].all())
    np.testing.assert_array_equal(
        forward(folded.params, x), forward(tree.apply_masks(params, masks), x)
    )


def test_normalisation_over_features_is_refused():
    """Expectation: a unit on no path still moves the mean of the others, so folding must refuse."""
    params = jax.tree.map(jnp.asarray, layers(a=(2, 4), b=(4, 1)))

    @jax.jit
    def forward(p, x):
        h = x @ p['a']['w']
        h = h - h.mean(-1, keepdims=True)
        return h @ p['b']['w']

    masks = dense_masks(params)
    masks['a/w'][0, 1] = masks['b/w'][1:] = False
    x = jax.random.normal(jax.random.key(0), (4, 2))
    with pytest.raises(PruneError, match='normalisation over features'):
        fold_constants(forward, params, masks, x)
