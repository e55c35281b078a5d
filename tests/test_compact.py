"""Networks without their pruned groups against the masked networks that they come from.

What is expected is the masked network's own numbers, arrays cut by `numpy.delete` with the members
of `jp.groups`, and modules built with smaller widths.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune import PruneError, tree
from jaxprune.nn import MODELS, build, model

#: Options and inputs of small networks; the others are an eighth as wide, on 32x32 images.
SMALL = {
    'mlp': ({'widths': [8, 6]}, (28, 28, 1)),
    'small_vgg': ({'widths': [4, 6]}, (28, 28, 1)),
    'vit': ({'patch': 14, 'dim': 8, 'depth': 2, 'heads': 2}, (28, 28, 1)),
    'transformer': ({'dim': 8, 'depth': 2, 'heads': 2}, (7, 8)),
    'lenet300100': ({}, (28, 28, 1)),
    'lenet5': ({}, (28, 28, 1)),
}
#: Deep and wide ones, of the same blocks as the others.
LARGE = ('lenet300100', 'vgg11', 'vgg13', 'vgg16', 'vgg19')
LARGE += ('resnet18', 'resnet32', 'resnet56', 'mobilenet')


@functools.cache
def setting(name, train, dtype=np.float32):
    """apply, parameters, state, inputs and groups of a model; parameters are drawn anew."""
    width = {'width': 0.125} if 'width' in model(name).options else {}
    options, shape = SMALL.get(name, (width, (32, 32, 3)))
    module = build(name, 10, **options)
    module = module.clone(dtype=dtype) if hasattr(module, 'dtype') else module
    problem = jp.problem_from_flax(module, shape)
    rng = np.random.default_rng(0)
    params, state = jax.eval_shape(problem.init, jax.random.key(0))
    params = jax.tree.map(lambda a: rng.normal(size=a.shape) * 0.3, params)
    state = jax.tree.map(lambda a: rng.uniform(0.5, 1.5, size=a.shape), state)

    def apply(params, state, x):
        return problem.apply(params, state, x, train=train, key=None)

    x = rng.normal(size=(3, *shape))
    params, state, x = as_floats((params, state, x), dtype)
    return apply, params, state, x, jp.groups(apply, params, x, state).families


def as_floats(arrays, dtype):
    return jax.tree.map(lambda a: np.asarray(a, dtype), arrays)


def drawn(families, share=0.5, seed=0):
    """Groups to remove, path -> axis -> indices, and how many of each family; one always stays."""
    rng = np.random.default_rng(seed)
    lost, counts = {}, {}
    for family in families:
        if not family.reason:
            count = min(rng.binomial(family.size, share), family.size - 1)
            for n in rng.choice(family.size, count, replace=False):
                for m in family.members:
                    lost.setdefault(m.path, {}).setdefault((m.axis, m.role), []).extend(
                        m.indices[n]
                    )
            counts |= {family.name: count} if count else {}
    return lost, counts


def masks_of(params, lost, roles=('out', 'along', 'in')):
    """Masks without what is lost, as far as it has one of these roles."""
    masks = {path: np.ones(np.shape(leaf), bool) for path, leaf in tree.paths(params)}
    for path, mask in masks.items():
        for (axis, role), at in lost.get(path, {}).items():
            if role in roles:
                np.moveaxis(mask, axis, 0)[at] = False
    return masks


def cut(arrays, lost):
    """Arrays without what is lost, by NumPy."""

    def smaller(keys, leaf):
        path = jax.tree_util.keystr(keys, simple=True, separator='/')
        for (axis, _), at in lost.get(path, {}).items():
            leaf = np.delete(np.asarray(leaf), sorted(set(at)), axis)
        return leaf

    return jax.tree_util.tree_map_with_path(smaller, arrays)


def masked_by(params, masks):
    return jax.tree.map(lambda a, mask: np.where(mask, a, 0), params, tree.mask_tree(params, masks))


def assert_close(ours, theirs, tolerance):
    """Equal up to a share of the largest number of each array."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), (_, b) in zip(tree.paths(ours), tree.paths(theirs), strict=True):
        assert a.shape == b.shape, path
        error = np.abs(np.asarray(a) - np.asarray(b)).max() / max(np.abs(b).max(), 1e-30)
        assert error <= tolerance, (path, error)


def compared(name, train, dtype, tolerance):
    """Cuts a model and compares all that it holds and returns with the masked one."""
    with jax.enable_x64(dtype == np.float64):
        apply, params, state, x, families = setting(name, train, dtype)
        lost, counts = drawn(families)
        masks = masks_of(params, lost)
        small = jp.compact(apply, params, masks, x, model_state=state)
        assert counts and small.removed == counts
        masked = as_floats(masked_by(params, masks), dtype)
        assert_close(small.params, cut(masked, lost), 0)
        assert_close(small.model_state, cut(state, lost), 0)

        @jax.jit
        def both(masked, state, x):
            theirs = apply(masked, state, x)
            return small.apply(small.params, small.model_state, x), theirs

        (ours, our_state), (theirs, their_state) = jax.device_get(both(masked, state, x))
        # Some models give float32 logits whatever they compute with: equal up to the last bit.
        assert_close(ours, theirs, max(tolerance, 1.2e-7) if ours.dtype == 'float32' else tolerance)
        assert_close(our_state, cut(their_state, lost), tolerance)


#: A convolutional net with batch norm, and attention; the others are further instances.
QUICK = ('small_vgg', 'transformer')


def marks(name):
    return () if name in QUICK else pytest.mark.slow if name in LARGE else pytest.mark.more


CASES = [pytest.param(n, marks=marks(n)) for n in MODELS]


@pytest.mark.parametrize('name', CASES)
def test_models(name):
    """Random groups of every model: in training mode, float64; in evaluation mode, float32."""
    compared(name, True, np.float64, 1e-10)
    compared(name, False, np.float32, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_models_the_other_way_round(name):
    """Normalising by three examples makes much of rounding: see float64 above."""
    compared(name, False, np.float64, 1e-10)
    compared(name, True, np.float32, 1e-3 if name == 'mobilenet' else 1e-5)


# --- training goes on ---------------------------------------------------------------------------

OPTIMIZERS = {
    'momentum': optax.sgd(0.05, momentum=0.9),
    'adam': optax.adam(0.01),
    'adamw': optax.adamw(0.01, weight_decay=0.1),
}


@pytest.mark.parametrize(
    ('name', 'optimizer'),
    [
        ('small_vgg', 'adam'),
        pytest.param('small_vgg', 'momentum', marks=pytest.mark.more),
        pytest.param('transformer', 'adamw', marks=pytest.mark.more),
        pytest.param('resnet20', 'adam', marks=pytest.mark.slow),
    ],
)
def test_training_goes_on(name, optimizer):
    """Five steps from moments of two earlier ones: step by step those of the masked network.

    Masked weights get no gradients, by `jp.sparse`; the biases and scales of a removed group are
    masked too. ReLU's derivative at zero is zero, or readers of a removed unit would learn.
    """
    with jax.enable_x64(True):
        apply, params, state, x, families = setting(name, True, np.float64)
        lost, _ = drawn(families)
        masks = masks_of(params, lost, ('out', 'along'))
        masked, plain = masked_by(params, masks), OPTIMIZERS[optimizer]
        sparse, y = jp.sparse(plain), np.arange(3)

        def steps(apply, update, start, count):
            def step(carry, _):
                params, state, moments = carry

                def loss(params):
                    logits, new = apply(params, state, x)
                    return jp.cross_entropy(logits, y).mean(), new

                (value, new), gradients = jax.value_and_grad(loss, has_aux=True)(params)
                updates, moments = update(gradients, moments, params)
                params = optax.apply_updates(params, updates)
                return (params, new, moments), (value, params, new)

            return jax.lax.scan(step, start, length=count)

        def update(*arguments):
            return sparse.update(*arguments, masks=masks)

        warm = jax.jit(lambda p, s: steps(apply, update, (p, s, sparse.init(p)), 2)[0])
        start = jax.device_get(warm(masked, state))
        params, state, moments = start
        small = jp.compact(apply, params, masks, x, model_state=state, opt_state=moments)
        ours = (small.params, small.model_state, small.opt_state)
        theirs = jax.jit(lambda start: steps(apply, update, start, 5)[1])(start)
        ours = jax.jit(lambda start: steps(small.apply, plain.update, start, 5)[1])(ours)
        ours, theirs = jax.device_get((ours, theirs))
    # Adam divides by what may be tiny; a transformer's logits are float32, see above.
    tolerance = {'momentum': 1e-9, 'adam': 1e-7, 'adamw': 1e-5}[optimizer]
    assert_close(ours[0], theirs[0], 1e-6 if name == 'transformer' else 1e-9)
    for step in range(5):
        for i in (1, 2):
            mine, other = (jax.tree.map(lambda a, n=step: a[n], t[i]) for t in (ours, theirs))
            assert_close(mine, cut(other, lost), tolerance)


# --- by hand ------------------------------------------------------------------------------------


def mlp(params, x):
    """Reads its sizes from its parameters."""
    for name in ('a', 'b'):
        x = jax.nn.relu(x @ params[name]['kernel'] + params[name]['bias'])
    return x @ params['c']['kernel']


@functools.cache
def weights():
    rng = np.random.default_rng(3)
    shapes = {'a': (4, 8), 'b': (8, 6), 'c': (6, 3)}
    made = {k: {'kernel': np.float32(rng.normal(size=s))} for k, s in shapes.items()}
    for name in ('a', 'b'):
        made[name]['bias'] = np.float32(rng.normal(size=shapes[name][1]))
    return made


X = np.float32(np.random.default_rng(4).normal(size=(5, 4)))


def without(*units, bias=True):
    """Masks without some units of the first layer."""
    masks = {'a/kernel': np.ones((4, 8), bool)}
    masks['a/kernel'][:, units] = False
    if bias:
        masks['a/bias'] = np.ones(8, bool)
        masks['a/bias'][list(units)] = False
    return masks


def test_ones_own_function_is_returned():
    """Where it takes smaller parameters as it is; else the traced program at smaller sizes."""
    small = jp.compact(mlp, weights(), without(1, 5), X)
    assert small.apply is mlp
    np.testing.assert_array_equal(small.kept['a/kernel'][1], [0, 2, 3, 4, 6, 7])
    assert small.kept.keys() == {'a/kernel', 'a/bias', 'b/kernel'}


@pytest.mark.parametrize('batch', [1, 2, 7])
def test_other_batches(batch):
    """A traced program is traced again for another number of examples; under jit as well."""
    apply, params, state, x, families = setting('small_vgg', False)
    lost, _ = drawn(families)
    masks = masks_of(params, lost)
    small = jp.compact(apply, params, masks, x, model_state=state)
    assert small.apply is not apply
    others = np.float32(np.random.default_rng(5).normal(size=(batch, *x.shape[1:])))
    ours, _ = jax.jit(small.apply)(small.params, small.model_state, others)
    theirs, _ = jax.jit(apply)(masked_by(params, masks), state, others)
    assert_close(ours, theirs, 1e-5)


def test_derivatives_at_zero():
    """The gradients of the masked network, where kept units are exactly zero too."""
    apply, params, state, x, families = setting('small_vgg', False)

    def quiet(arrays, name):
        return jax.tree_util.tree_map_with_path(lambda k, a: a * (name not in str(k[-1])), arrays)

    params, state = quiet(params, 'bias'), quiet(state, 'mean')
    x = x * np.arange(3)[:, None, None, None].astype(x.dtype)  # the first example is zero
    lost, _ = drawn(families)
    masks = masks_of(params, lost, ('out', 'along'))
    small = jp.compact(apply, params, masks, x, model_state=state)

    def gradients(apply):
        def loss(params, state):
            logits, _ = apply(params, state, x)
            return (logits[:, 3] ** 2 + logits[:, 0]).sum()

        return jax.jit(jax.grad(loss))

    theirs = gradients(apply)(masked_by(params, masks), state)
    ours = gradients(small.apply)(small.params, small.model_state)
    assert_close(ours, cut(theirs, lost), 1e-5)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=12)(x)


def test_heads_and_their_dimensions():
    """One head, one dimension of queries and keys, one of values: the softmax keeps its scale."""
    rng = np.random.default_rng(6)
    net, x = Attention(), np.float32(rng.normal(size=(2, 5, 6)))
    params = jax.eval_shape(net.init, jax.random.key(0), x)
    params = jax.tree.map(lambda a: np.float32(rng.normal(size=a.shape)), params)
    found = [f for f in jp.groups(net.apply, params, x).families if not f.reason]
    assert sorted((f.kind, f.size) for f in found) == [
        ('head', 4),
        ('head_dim', 3),
        ('head_dim', 3),
    ]
    lost = {}
    for family in found:
        for m in family.members:
            lost.setdefault(m.path, {}).setdefault((m.axis, m.role), []).extend(m.indices[1])
    masks = masks_of(params, lost)
    small = jp.compact(net.apply, params, masks, x)
    shapes = {
        p.split('MultiHeadDotProductAttention_0/')[1]: a.shape for p, a in tree.paths(small.params)
    }
    assert shapes['query/kernel'] == shapes['value/kernel'] == (6, 3, 2)
    assert shapes['out/kernel'] == (3, 2, 6)
    assert_close(
        jax.jit(small.apply)(small.params, x), jax.jit(net.apply)(masked_by(params, masks), x), 1e-5
    )


def grouped_attention(params, x, own, copies, repeat):
    """`own` keys and values, each for `copies` heads: repeated, or read by a grouped product."""
    n, t, _ = x.shape
    q, k, v = (x @ params[name] for name in 'qkv')
    k, v = (a.reshape(n, t, own, -1) for a in (k, v))
    if repeat:
        q = q.reshape(n, t, own * copies, -1)
        k, v = (jnp.repeat(a, copies, axis=2) for a in (k, v))
        weights = jax.nn.softmax(jnp.einsum('bthd,bshd->bhts', q, k))
        heads = jnp.einsum('bhts,bshd->bthd', weights, v)
    else:
        q = q.reshape(n, t, own, copies, -1)
        weights = jax.nn.softmax(jnp.einsum('btkrd,bskd->bkrts', q, k))
        heads = jnp.einsum('bkrts,bskd->btkrd', weights, v)
    return heads.reshape(n, t, -1) @ params['o']


@pytest.mark.parametrize(
    ('own', 'copies'), [pytest.param(1, 4, marks=pytest.mark.more), (2, 2), (2, 3)]
)
def test_repeated_keys_are_grouped_ones(own, copies):
    """Expectation: by hand. Queries go with their key, or as the same head of every key; both
    programs compute one function, so both have the same groups and the same compact network."""
    rng, dim = np.random.default_rng(own), 3
    shapes = {'q': own * copies * dim, 'k': own * dim, 'v': own * dim}
    params = {name: rng.normal(size=(5, width)) for name, width in shapes.items()}
    params['o'] = rng.normal(size=(own * copies * dim, 4))
    params, x = as_floats((params, rng.normal(size=(2, 6, 5))), np.float32)
    heads = np.arange(own * copies * dim).reshape(own, copies, dim)
    of_copies = {tuple(heads[:, i].ravel()) for i in range(copies)}
    of_keys = {tuple(heads[i].ravel()) for i in range(own)}
    lost, outputs = None, []
    for repeat in (True, False):
        apply = functools.partial(grouped_attention, own=own, copies=copies, repeat=repeat)
        families = [f for f in jp.groups(apply, params, x).families if not f.reason]
        slices = [
            {tuple(sorted(at)) for at in m.indices}
            for f in families
            for m in f.members
            if m.path == 'q'
        ]
        assert of_copies in slices
        assert of_keys in slices or own == 1  # the last key stays
        if lost is None:
            lost, _ = drawn(families)
        masks = masks_of(params, lost)
        small = jp.compact(apply, params, masks, x)
        outputs.append(jax.jit(small.apply)(small.params, x))
        assert_close(outputs[-1], jax.jit(apply)(masked_by(params, masks), x), 1e-5)
    assert_close(*outputs, 1e-5)


class Normed(nn.Module):
    norm: str
    width: int = 8

    @nn.compact
    def __call__(self, x):
        x = getattr(nn, self.norm)(name='norm')(nn.Dense(self.width, name='wide')(x))
        return nn.Dense(3)(nn.relu(x))


@pytest.mark.parametrize('norm', ['LayerNorm', 'RMSNorm'])
def test_a_norm_over_what_is_pruned(norm):
    """Refused, naming the norm; 'sliced' is the module built with the smaller width."""
    rng = np.random.default_rng(7)
    params = jax.eval_shape(Normed(norm).init, jax.random.key(0), X)
    params = jax.tree.map(lambda a: np.float32(rng.normal(size=a.shape)), params)
    apply = Normed(norm).apply
    found = jp.groups(apply, params, X).families
    [family] = [f for f in found if any('norm' in m.path for m in f.members)]
    lost = {m.path: {(m.axis, m.role): [2, 3, 6]} for m in family.members}
    masks = masks_of(params, lost)
    with pytest.raises(PruneError, match=r'which has to stay: normalised or reduced over by.*norm'):
        jp.compact(apply, params, masks, X)
    small = jp.compact(apply, params, masks, X, normalisation='sliced')
    assert_close(small.params, cut(params, lost), 0)
    ours = jax.jit(small.apply)(small.params, X)
    assert_close(ours, jax.jit(Normed(norm, 5).apply)(small.params, X), 1e-5)


def crossed():
    """Masks that prune a unit of one of two layers whose outputs are added."""
    masks = {'a/kernel': np.ones((4, 8), bool)}
    masks['a/kernel'][:, 2] = False
    return masks


def added(params, x):
    return jax.nn.relu(x @ params['a']['kernel'] + x @ params['d']) @ params['b']['kernel']


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            {'masks': without(1, bias=False)},
            "group 1 of 'a/kernel' still acts in the masked network",
        ),
        ({'masks': without(*range(8))}, "masks prune all groups of 'a/kernel': no path is left"),
        (
            {'masks': {'a/kernel': np.ones((4, 7), bool)}},
            r"'a/kernel' has shape \(4, 8\), not \(4, 7\)",
        ),
        ({'masks': {'a/kernels': np.ones((4, 8), bool)}}, "no parameter 'a/kernels': did you mean"),
        ({'masks': {'a/kernel': np.ones((4, 8))}}, "the mask of 'a/kernel' must be boolean"),
        (
            {'masks': {'c/kernel': np.ones((6, 3), bool) & (np.arange(3) > 0)}},
            "the network's output",
        ),
        ({'x': np.ones((0, 4))}, 'an input with at least one example'),
        ({'partial': 'drop'}, "unknown partial 'drop'"),
        ({'normalisation': 'slice'}, "unknown normalisation 'slice': did you mean 'sliced'"),
        ({'unknown': 'ignore'}, "unknown value of unknown= 'ignore'"),
        (
            {'apply': added, 'masks': crossed(), 'params': {**weights(), 'd': np.ones((4, 8))}},
            "masks cut group 2 of 'a/kernel' in part: 'a/kernel' loses it, 'd' keeps it",
        ),
    ],
)
def test_wrong_arguments(change, message):
    """One line that names what is wrong."""
    arguments = {'apply': mlp, 'params': weights(), 'masks': without(1), 'x': X, **change}
    with pytest.raises(PruneError, match=message) as error:
        jp.compact(**arguments)
    assert len(str(error.value).splitlines()) == 1


def test_what_is_cut_in_part_may_stay():
    """With `partial='keep'`: nothing goes, and the zeros stay."""
    params = {**weights(), 'd': np.ones((4, 8), np.float32)}
    small = jp.compact(added, params, crossed(), X, partial='keep')
    assert not small.removed
    assert_close(small.params, masked_by(params, crossed()), 0)


def test_multiples_of_units_stay():
    """Expectation: 12 units, 7 pruned: 8 stay for multiples of 8, the first pruned ones among them;
    all stay where no multiple is left; outputs do not change."""
    draw = np.random.default_rng(1)
    sizes = {'a': (5, 12), 'b': (12, 3)}
    params = {path: draw.normal(size=shape).astype('float32') for path, shape in sizes.items()}
    masks = {path: np.ones(shape, bool) for path, shape in sizes.items()}
    gone = [1, 2, 4, 5, 7, 9, 10]
    masks['a'][:, gone] = masks['b'][gone] = False

    def apply(p, x):
        return jnp.tanh(x @ p['a']) @ p['b']

    x = draw.normal(size=(2, 5)).astype('float32')
    for multiple, stay in ((1, 5), (2, 6), (8, 8), ({'unit': 6}, 6), (16, 12), ({'head': 4}, 5)):
        small = jp.compact(apply, params, masks, x, multiple=multiple)
        assert small.params['a'].shape == (5, stay)
        if multiple == 8:
            assert small.kept['a'][1].tolist() == [0, 1, 2, 3, 4, 6, 8, 11]
        np.testing.assert_allclose(
            small.apply(small.params, x), apply(jp.apply_masks(params, masks), x), rtol=1e-5
        )
    for wrong, said in ((0, 'multiple must be at least 1'), ({'units': 8}, "did you mean 'unit'")):
        with pytest.raises(jp.PruneError, match=said):
            jp.compact(apply, params, masks, x, multiple=wrong)


def test_a_problem_is_its_network_in_evaluation_mode():
    """Expectation: the same groups, costs and smaller arrays as of its function; a layer that is
    pruned whole is named, and not what is left of the layers behind it."""
    net = jp.problem_from_flax(build('small_vgg', 10, widths=[4, 6]), (8, 8, 1))
    params, state = jax.jit(net.init)(jax.random.key(0))

    def network(params, state, x):
        return net.apply(params, state, x, train=False, key=None)[0]

    x = np.ones((2, 8, 8, 1), 'float32')
    assert str(jp.groups(net, params, x, state)) == str(jp.groups(network, params, x, state))
    assert jp.cost(net, params, x, state) == jp.cost(network, params, x, state)
    masks = jp.prune(params, 'magnitude', 0.5, granularity='unit', allocation='uniform',
                     model=net, data=x, model_state=state).masks  # fmt: skip
    found = [jp.compact(f, params, masks, x, model_state=state) for f in (net, network)]
    for a, b in zip(*(jax.tree.leaves(small.params) for small in found), strict=True):
        np.testing.assert_array_equal(a, b)
    outputs = [jax.jit(small.apply)(small.params, small.model_state, x) for small in found]
    np.testing.assert_array_equal(*outputs)
    dead = {**masks, 'conv_1/kernel': np.zeros(masks['conv_1/kernel'].shape, bool)}
    with pytest.raises(jp.PruneError, match="groups of 'conv_0/kernel', 'conv_1/kernel': no path"):
        jp.compact(net, params, dead, x, model_state=state)


def chained(p, x):
    return jnp.tanh(x @ p['a'].reshape(-1, 8)) @ p['b']  # 8 is written down: apply cannot be reused


def halved():
    draw = np.random.default_rng(2)
    params = {
        'a': draw.normal(size=(5, 8)).astype('float32'),
        'b': draw.normal(size=(8, 3)).astype('float32'),
    }
    masks = {path: np.ones(leaf.shape, bool) for path, leaf in params.items()}
    masks['a'][:, :4] = masks['b'][:4] = False
    return params, masks, draw.normal(size=(4, 5)).astype('float32')


def test_a_compact_network_needs_nothing_of_the_dense_one():
    """Expectation: it works after the dense parameters are deleted and the masks are changed, on
    other batches and in half precision; what is not its own is refused in one line."""
    params, masks, x = halved()
    dense = jax.tree.map(jnp.asarray, params)
    small = jp.compact(chained, dense, masks, x)
    assert small.apply is not chained and small.params['a'].shape == (5, 4)
    wanted = chained(jp.apply_masks(params, masks), x)
    jax.tree.map(lambda leaf: leaf.delete(), dense)
    masks['a'][:], masks['b'][:] = True, True
    run = jax.jit(small.apply)
    for rows in (2, 4):
        np.testing.assert_allclose(run(small.params, x[:rows]), wanted[:rows], rtol=1e-5)
    halves = jax.tree.map(lambda leaf: leaf.astype('bfloat16'), small.params)
    assert run(halves, x.astype('bfloat16')).dtype == 'bfloat16'
    for wrong, said in ((params, r"'a' of the smaller network has shape \(5, 4\), not \(5, 8\)"),
                        ({'a': params['a']}, 'takes params')):  # fmt: skip
        with pytest.raises(jp.PruneError, match=said):
            small.apply(wrong, x)


def test_places_outside_are_not_clipped():
    """Expectation: `take` with mode 'fill' puts a number of its own where an index lies outside, so
    its axis stays; with all indices inside it is followed."""
    params, masks, x = halved()

    def taking(at):
        return lambda p, x: (
            jnp.take(jnp.tanh(x @ p['a']), np.array(at), axis=1, mode='fill', fill_value=2.0)
            @ p['b']
        )

    with pytest.raises(jp.PruneError, match="has to stay: indexed by 'gather'"):
        jp.compact(taking([9, 1, 2, 3, 4, 5, 6, 7]), params, masks, x)
    inside = taking([2, 1, 0, 3, 7, 6, 5, 4])
    small = jp.compact(inside, params, masks, x)
    np.testing.assert_allclose(
        jax.jit(small.apply)(small.params, x), inside(jp.apply_masks(params, masks), x), rtol=1e-5
    )


def test_states_without_a_place_for_each_weight_are_refused():
    """Expectation: sm3 keeps one vector per axis, adafactor rows and columns."""
    params, masks, x = halved()
    state = optax.sm3(0.1).init(params)
    with pytest.raises(jp.PruneError, match="the optimizer's state of 'a' has shape"):
        jp.compact(chained, params, masks, x, opt_state=state)


@pytest.mark.parametrize('mean', ['divided', 'times', 'times from the left'])
def test_a_mean_over_what_is_left(mean):
    """Expectation: with `normalisation='sliced'` the count is that of the narrower module."""
    params, masks, x = halved()

    def centred(p, x):
        y = x @ p['a']
        total, n = y.sum(-1, keepdims=True), y.shape[-1]
        means = {
            'divided': total / n,
            'times': total * (1 / n),
            'times from the left': (1 / n) * total,
        }
        return (y - means[mean]) @ p['b']

    small = jp.compact(centred, params, masks, x, normalisation='sliced')
    narrow = {'a': params['a'][:, 4:], 'b': params['b'][4:]}
    np.testing.assert_allclose(
        jax.jit(small.apply)(small.params, x), centred(narrow, x), rtol=1e-4, atol=1e-5
    )


def test_dropout_with_a_key_of_its_own():
    """Expectation: random bits of the original shape, so those of the masked network."""
    params, masks, x = halved()

    def dropped(p, x):
        y = jnp.tanh(x @ p['a'])
        return jnp.where(jax.random.bernoulli(jax.random.key(3), 0.5, y.shape), 2 * y, 0) @ p['b']

    small = jp.compact(dropped, params, masks, x)
    wanted = jax.jit(dropped)(jp.apply_masks(params, masks), x)
    np.testing.assert_allclose(jax.jit(small.apply)(small.params, x), wanted, rtol=1e-5, atol=1e-6)
