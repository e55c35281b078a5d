"""What networks cost: by hand, as published, as XLA counts it, and with groups cut out.

Published counts are of one image of 32 x 32. He et al. (arXiv:1512.03385) have option A, shortcuts
without parameters, on CIFAR. Counts of the other networks are those that pruning papers state.
"""

import functools
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from structured_nets import load

import jaxprune as jp
from jaxprune import nn, structure, tree
from jaxprune.structure.latency import in_turns


def array(*shape, dtype='float32'):
    return jax.ShapeDtypeStruct(shape, dtype)


# --- by hand ------------------------------------------------------------------------------------


def test_a_dense_layer_by_hand():
    """Expectation: 5 x 7 x 11 multiply-accumulates, two operations each, 55 biases, 55 maxima."""
    params = {'w': array(7, 11), 'b': array(11), 'unused': array(3, dtype='int8')}
    found = jp.cost(lambda p, x: jax.nn.relu(x @ p['w'] + p['b']), params, array(5, 7))
    assert found.macs == 385 and found.by_path == {'w': 385}
    assert found.flops == 2 * 385 + 55 + 55
    assert found.padded_flops == 2 * 8 * 128 * 128
    assert found.params == 77 + 11 + 3 and found.bytes == 4 * (77 + 11) + 3
    assert str(found).splitlines() == [
        'parameters         91',
        'bytes             355',
        'MACs              385',
        'FLOPs             880',
        'padded FLOPs  262,144',
    ]


def test_tiles():
    """Expectation: rows to multiples of 8, what is summed over and columns to those of 128."""

    def padded(rows, inner, columns, **options):
        left, right = array(rows, inner), array(inner, columns)
        one = jp.cost(lambda p, x: x @ p, right, left, **options).padded_flops
        swapped = jp.cost(lambda p, x: p.T @ x.T, right, left, **options).padded_flops
        assert one == swapped  # columns are those of the kernel, on whichever side it stands
        return one // 2

    assert padded(8, 128, 128) == 8 * 128 * 128
    assert padded(1, 128, 130) == 8 * 128 * 256
    assert padded(9, 130, 128) == 16 * 256 * 128
    assert padded(9, 130, 3, tile=(1, 1)) == 9 * 130 * 3
    assert padded(9, 130, 3, tile=(16, 16)) == 16 * 144 * 16
    for tile in ((8,), (0, 128), (8, 1.5)):
        with pytest.raises(jp.PruneError, match='two whole numbers'):
            padded(1, 1, 1, tile=tile)


def test_products_in_batches():
    """Expectation: each product of a batch is padded by itself."""
    found = jp.cost(lambda p, x: jnp.einsum('bij,bjk->bik', x, p), array(3, 5, 6), array(3, 4, 5))
    assert found.macs == 3 * 4 * 5 * 6
    assert found.padded_flops == 2 * 3 * 8 * 128 * 128


def conv(p, x, strides=(1, 1), padding='SAME', **options):
    numbers = ('NHWC', 'HWIO', 'NHWC')
    return lax.conv_general_dilated(x, p, strides, padding, dimension_numbers=numbers, **options)


@pytest.mark.parametrize(
    ('kernel', 'options', 'macs', 'padded'),
    [
        ((3, 3, 8, 16), {}, 2 * 81 * 9 * 8 * 16, 168 * 128 * 128),
        ((3, 3, 8, 16), {'padding': 'VALID'}, 2 * 49 * 9 * 8 * 16, 104 * 128 * 128),
        ((3, 3, 8, 16), {'strides': (2, 2)}, 2 * 25 * 9 * 8 * 16, 56 * 128 * 128),
        (
            (3, 3, 8, 16),
            {'rhs_dilation': (2, 2), 'padding': 'VALID'},
            2 * 25 * 9 * 8 * 16,
            56 * 128 * 128,
        ),
        ((3, 3, 2, 16), {'feature_group_count': 4}, 2 * 81 * 9 * 2 * 16, 4 * 168 * 128 * 128),
        ((3, 3, 1, 8), {'feature_group_count': 8}, 2 * 81 * 9 * 8, 8 * 168 * 128 * 128),
        ((1, 1, 8, 130), {}, 2 * 81 * 8 * 130, 168 * 128 * 256),
    ],
    ids=['same', 'valid', 'strided', 'dilated', 'grouped', 'depthwise', 'pointwise'],
)
def test_convolutions_by_hand(kernel, options, macs, padded):
    """Expectation: output positions x kernel sides x inputs of a group x outputs."""
    apply = functools.partial(conv, **options)
    found = jp.cost(apply, array(*kernel), array(2, 9, 9, 8))
    assert (found.macs, found.padded_flops) == (macs, 2 * padded)
    assert found.flops == 2 * macs


def test_a_transposed_convolution_by_hand():
    """Expectation: zeros between the inputs count as computed: 18 x 18 output positions."""

    def apply(p, x):
        return lax.conv_transpose(x, p, (2, 2), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))

    found = jp.cost(apply, array(4, 4, 8, 16), array(1, 9, 9, 8))
    assert found.macs == 18 * 18 * 16 * 8 * 16


def test_gradients_of_convolutions():
    """Expectation: the kernel's gradient costs as much as the convolution, for depthwise ones too.

    Without padding and strides every product of the forward pass is met once.
    """
    for kernel, groups in (((3, 3, 8, 16), 1), ((3, 3, 1, 8), 8), ((3, 3, 2, 16), 4)):
        apply = functools.partial(conv, feature_group_count=groups, padding='VALID')
        forward = jp.cost(apply, array(*kernel), array(2, 9, 9, 8))
        both = jp.cost(jax.grad(lambda p, x, f=apply: f(p, x).sum()), *both_of(kernel))
        assert both.macs == 2 * forward.macs, groups


def both_of(kernel):
    return array(*kernel), array(2, 9, 9, 8)


def test_attention_by_hand():
    """Expectation: scores and sums of values belong to no parameter; softmax counts entry by entry.

    Of 3 x 4 x 4 scores for each of two examples: a division by the root of the size, a maximum, a
    difference, an exponential, a sum, a quotient.
    """
    heads, size, width, n = 3, 5, 15, 4

    def apply(p, x):
        q, k, v = ((x @ p[name]).reshape(2, n, heads, size) for name in 'qkv')
        scores = jnp.einsum('bqhd,bkhd->bhqk', q, k) / 2.0
        return jnp.einsum('bhqk,bkhd->bqhd', jax.nn.softmax(scores), v).reshape(2, n, width)

    params = {name: array(width, width) for name in 'qkv'}
    found = jp.cost(apply, params, array(2, n, width))
    each = 2 * n * width * width
    assert found.by_path == {'q': each, 'k': each, 'v': each, '': 2 * (2 * heads * n * n * size)}
    assert found.macs == sum(found.by_path.values())
    scores = 2 * heads * n * n
    least = 2 * heads * n  # a maximum of each row with minus infinity, as JAX has it
    assert found.flops - 2 * found.macs - 6 * scores in (0, least)


def test_normalisation_pooling_and_reductions():
    """Expectation: as the program has them, one per entry; nothing else counts."""
    x = array(2, 4, 4, 3)
    window = (1, 2, 2, 1)
    cases = [
        (3 * 96, lambda p, x: (x - p['mean']) * p['scale'] + p['bias']),
        (96 + 6, lambda p, x: x.mean((1, 2))),
        (24 * 4, lambda p, x: lax.reduce_window(x, -jnp.inf, lax.max, window, window, 'VALID')),
        (96, lambda p, x: jnp.cumsum(x, 1)),
        (0, lambda p, x: jnp.where(x > 0, x, 0.0)[:, ::2].transpose(0, 3, 1, 2).reshape(2, -1)),
        (0, lambda p, x: jnp.argsort(jnp.arange(5) * 2 + 1)),
    ]
    params = {name: array(3) for name in ('mean', 'scale', 'bias')}
    for wanted, apply in cases:
        found = jp.cost(apply, params, x)
        assert (found.macs, found.flops) == (0, wanted)


# --- whole functions ----------------------------------------------------------------------------


def test_calls_loops_and_branches():
    """Expectation: every step of a loop, the branch with most operations, calls entered."""
    params, x = {'big': array(6, 6), 'stack': array(3, 6, 6)}, array(2, 6)
    layer = jax.jit(jax.checkpoint(lambda w, x: jnp.tanh(x @ w)))

    def scanned(p, x):
        return lax.scan(lambda x, w: (layer(w, x), None), x, p['stack'])[0]

    def looped(p, x):
        return lax.fori_loop(0, 5, lambda i, x: layer(p['big'], x), x)

    def branched(p, x):
        return lax.cond(x[0, 0] > 0, lambda x: x, lambda x: layer(p['big'], x), x)

    one, both = 72, 2 * 72 + 12
    for apply, path, times in ((scanned, 'stack', 3), (looped, 'big', 5), (branched, 'big', 1)):
        found = jp.cost(apply, params, x)
        assert found.by_path == {path: times * one} and found.flops == times * both, apply

    def endless(p, x):
        return lax.while_loop(lambda x: x.sum() > 0, lambda x: x - 1, x)

    with pytest.raises(jp.PruneError, match=r"'while' at .*how often it runs is not known"):
        jp.cost(endless, params, x)
    with pytest.raises(jp.PruneError, match=r"'fft' at .*how much it costs is not known"):
        jp.cost(lambda p, x: jnp.fft.fft(x), params, x)


def test_a_carry_that_begins_as_a_parameter():
    """Expectation: after one step it depends on the inputs; its products are no parameter's."""

    def apply(p, x):
        def step(carry, _):
            return carry @ x, None

        return lax.scan(step, p, length=3)[0]

    assert jp.cost(apply, array(6, 6), array(6, 6)).by_path == {'': 3 * 216}


def test_factors_made_of_several_parameters():
    """Expectation: the one with most axes, whatever is done to it before."""
    params = {'a_scale': array(4), 'kernel': array(3, 4), 'mask': array(3, 4, dtype='bool')}

    def apply(p, x):
        w = p['kernel'].astype(jnp.bfloat16) * p['mask'] * p['a_scale']
        return x @ w.astype(jnp.float32)

    assert jp.cost(apply, params, array(2, 3)).by_path == {'kernel': 24}


# --- published networks -------------------------------------------------------------------------


@functools.cache
def zoo(name, side=32, channels=3, **options):
    """`apply`, parameters and state of a network as shapes."""
    module = nn.build(name, 10, **options)
    if hasattr(module, 'kernel_init'):
        module = module.clone(kernel_init=jax.nn.initializers.zeros)  # traced quickly
    shapes = jax.eval_shape(module.init, jax.random.key(0), array(1, side, side, channels))
    params = shapes['params']
    state = {k: v for k, v in shapes.items() if k != 'params'}

    def apply(params, state, x):
        return module.apply({'params': params, **state}, x)

    return apply, params, state


def counted(name, batch=1, side=32, channels=3, **options):
    apply, params, state = zoo(name, side, channels, **options)
    return jp.cost(apply, params, array(batch, side, side, channels), state)


@pytest.mark.parametrize(
    ('name', 'published', 'macs'),
    [
        ('resnet20', 40.55e6, 40_551_040),  # often given as 40.8 M: with projections
        ('resnet56', 125.49e6, 125_485_696),
        ('vgg16', 313.2e6, 313_201_664),
        ('resnet18', 0.56e9, 555_422_720),
    ],
)
def test_published_networks(name, published, macs):
    """Expectation: as papers state them."""
    options = {'shortcut': 'pad'} if name in ('resnet20', 'resnet56') else {}
    found = counted(name, **options)
    assert found.macs == macs == pytest.approx(published, rel=0.01)
    assert '' not in found.by_path and sum(found.by_path.values()) == found.macs


def test_projections_by_hand():
    """Expectation: a 1x1 convolution with stride 2 at the start of the second and third stage."""
    projections = 16 * 16 * 16 * 32 + 8 * 8 * 32 * 64
    assert counted('resnet20').macs == 40_551_040 + projections == 40_813_184


def test_mobilenet_by_hand():
    """Expectation: the stem, 13 depthwise and 13 pointwise convolutions, the classifier."""
    side, maps = 32, 32
    macs, kernels = side * side * 27 * maps, 27 * maps
    for wide, stride in nn.mobilenet.BLOCKS:
        side //= stride
        macs += side * side * maps * (9 + wide)
        kernels += maps * (9 + wide)
        maps = wide
    found = counted('mobilenet')
    assert found.macs == macs + 10 * maps
    norms = sum(leaf.size for path, leaf in tree.paths(zoo('mobilenet')[1]) if '_bn/' in path)
    assert found.params == kernels + norms + 10 * maps + 10


def test_cost_grows_with_the_batch():
    """Expectation: macs in proportion; flops too, but for what is done to parameters alone."""
    one, two, three = (counted('lenet5', batch, 28, 1) for batch in (1, 2, 3))
    assert [c.macs for c in (two, three)] == [2 * one.macs, 3 * one.macs]
    assert two.flops - one.flops == three.flops - two.flops
    assert one.params == two.params and one.bytes == two.bytes


def test_as_xla_counts():
    """Expectation: products alone exactly, with biases and ReLU within 1%.

    XLA folds and fuses, so elementwise operations may differ.
    """

    def products(p, x):
        return (x @ p['a']) @ p['b']

    def layers(p, x):
        return jax.nn.relu(x @ p['a'] + p['bias']) @ p['b']

    params = {'a': array(30, 40), 'b': array(40, 50), 'bias': array(40)}
    for apply, tolerance in ((products, 0), (layers, 0.01)):
        compiled = jax.jit(apply).lower(params, array(20, 30)).compile()
        flops = compiled.cost_analysis()['flops']
        assert jp.cost(apply, params, array(20, 30)).flops == pytest.approx(flops, rel=tolerance)


# --- without some groups ------------------------------------------------------------------------


def some_groups(read):
    """Every third group of all families that may go."""
    return {f.name: list(range(0, f.size, 3)) for f in read.families if not f.reason}


def masks_of(read, params, gone):
    masks = {path: np.ones(leaf.shape, bool) for path, leaf in tree.paths(params)}
    for family in read.families:
        for number, member in itertools.product(gone.get(family.name, ()), family.members):
            if member.path in masks:
                at = [slice(None)] * masks[member.path].ndim
                at[member.axis] = member.indices[number]
                masks[member.path][tuple(at)] = False
    return masks


def compared(apply, params, x, state, **options):
    """The cost of a network that `compact` made, counted both ways."""
    read = jp.groups(apply, params, x, state, **options)
    without = structure.cost_of_kept(read)
    assert without({}) == jp.cost(apply, params, x, state)
    gone = some_groups(read)
    masks = masks_of(read, params, gone)
    small = jp.compact(apply, params, masks, x, model_state=state, **options)
    assert small.removed == {name: len(numbers) for name, numbers in gone.items()}
    found = without(gone)
    assert found == jp.cost(small.apply, small.params, x, small.model_state)
    assert found.macs < without({}).macs
    return small


@pytest.mark.parametrize(
    ('name', 'own'),
    [
        ('depgraph_mlp', True),
        pytest.param('oto_groups_mobilenet', True, marks=pytest.mark.slow),
        pytest.param('oto_groups_densenet', True, marks=pytest.mark.slow),
        ('depgraph_grouped', False),
        ('oto_groups_encoder', False),
    ],
)
def test_without_groups_as_compact_has_it(name, own):
    """Expectation: what the smaller network costs when it is traced, to the last operation.

    Whether its function is the network's own or the traced program at smaller sizes.
    """
    file, _, forward, params, stats = load(name)
    options = {'normalisation': 'sliced'} if 'encoder' in name else {}
    small = compared(forward, params, jax.eval_shape(lambda: file['x']), stats, **options)
    assert (small.apply is forward) == own


_SLOW = ('small_vgg', 'vgg11', 'resnet20', 'mobilenet', 'vit', 'transformer', 'lenet300100')


@pytest.mark.parametrize(
    'name', ['lenet5', *(pytest.param(name, marks=pytest.mark.slow) for name in _SLOW)]
)
def test_without_groups_in_the_zoo(name):
    """Expectation: as above; flax layers know their sizes, so all are traced programs."""
    options = {'width': 0.25} if name in ('vgg11', 'resnet20', 'mobilenet') else {}
    image = (28, 1) if name in ('lenet5', 'lenet300100', 'transformer') else (32, 3)
    apply, params, state = zoo(name, *image, **options)
    params, state = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), (params, state))
    norm = 'sliced' if name in ('vit', 'transformer') else 'refuse'
    x = array(2, image[0], *image)
    assert compared(apply, params, x, state, normalisation=norm).apply is not apply


def test_many_selections_of_one_network():
    """Expectation: each layer of LeNet-300-100 shrinks by hand; what there is not is an error."""
    apply, params, state = zoo('lenet300100', 28, 1)
    read = jp.groups(apply, params, array(1, 28, 28, 1), state)
    without = structure.cost_of_kept(read)
    layers = [family.name for family in read.families if not family.reason]
    assert len(layers) == 2
    for first, second in itertools.product((0, 1, 299), (0, 7, 99)):
        gone = dict(zip(layers, (range(first), range(second)), strict=True))
        a, b = 300 - first, 100 - second
        found = without(gone)
        assert found.macs == 784 * a + a * b + b * 10
        assert found.params == found.macs + a + b + 10
        rows = (up(784) * up(a), up(a) * up(b), up(b) * up(10))
        assert found.padded_flops == 2 * 8 * sum(rows)
    with pytest.raises(jp.PruneError, match="no family of groups 'dense_9'"):
        without({'dense_9': [0]})
    with pytest.raises(jp.PruneError, match='has 100 groups'):
        without({layers[1]: [100]})
    with pytest.raises(jp.PruneError, match="'dense_2/kernel' has to stay: the network's output"):
        without({'dense_2/kernel': [0]})


def up(number):
    return -(-number // 128) * 128


# --- in the report of jp.prune ------------------------------------------------------------------


def test_the_report_of_prune_has_the_cost():
    """Expectation: by hand, for one example; hidden units without weights go, if they are silent.

    Weights of the last three of five units are smallest. A bias that is not zero still acts.
    """
    first, last = np.ones((6, 5), np.float32), np.ones((5, 4), np.float32)
    first[:, 2:], last[2:] = 0.01, 0.02
    params = {'first': {'kernel': first, 'bias': np.zeros(5, np.float32)}, 'last': {'kernel': last}}

    def apply(p, x):
        return jax.nn.relu(x @ p['first']['kernel'] + p['first']['bias']) @ p['last']['kernel']

    def report(params, model=apply, density=20 / 50):
        x = np.ones((3, 6), np.float32)
        return jp.prune(params, 'magnitude', density, model=model, data=x).report

    found = report(params)
    assert found.dense_cost == jp.cost(apply, params, array(1, 6))
    assert (found.dense_cost.macs, found.dense_cost.params) == (50, 55)
    assert (found.compact_cost.macs, found.compact_cost.params) == (20, 22)
    assert pickle.loads(pickle.dumps(found)) == found
    line = 'one example: 50 MACs, 55 parameters; with pruned groups cut out 20 and 22'
    assert line in str(found).splitlines()
    whole = report(params, density=1.0)
    assert whole.compact_cost == whole.dense_cost == found.dense_cost
    params['first']['bias'] = np.ones(5, np.float32)
    params['last']['kernel'] = np.ones((5, 4), np.float32)
    acting = report(params, density=32 / 50)  # what reads the units is kept
    assert acting.compact_cost == acting.dense_cost == found.dense_cost and not acting.note
    unread = report(params, lambda p, x: jnp.fft.fft(apply(p, x)).real)
    assert unread.dense_cost is None and "operation 'fft'" in unread.note
    assert report(params, None).dense_cost is None


# --- seconds ------------------------------------------------------------------------------------


def test_latency_is_measured_in_turns():
    """Expectation: A B A B after warming up; the longer one takes longer."""
    called = []
    calls = [lambda name=name: called.append(name) for name in 'AB']
    times = in_turns(calls, 4)
    assert ''.join(called) == 'AB' * (3 + 4) and list(map(len, times)) == [4, 4]
    x = np.ones((400, 400), np.float32)
    big, small = (lambda p, x: x @ p @ p @ p), (lambda p, x: x[:1, :1] * p[:1, :1])
    assert 0 < structure.latency(small, x, x, repeats=3) < 1
    assert structure.latency_ratio((big, x), (small, x), x, repeats=9) > 2
    with pytest.raises(jp.PruneError, match='repeats must be at least 1, not 0'):
        structure.latency(small, x, x, repeats=0)
    with pytest.raises(jp.PruneError, match='a network is'):
        structure.latency_ratio((big,), (small, x), x)
