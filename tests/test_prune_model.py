"""`jp.prune`: one call for someone's own model, whatever library it comes from."""

import fractions
import itertools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import KINDS, more_unless
from flax import nnx

import jaxprune as jp
from jaxprune.errors import PruneError
from jaxprune.structure import connectivity, connectivity_of, forward_shapes

RNG = np.random.default_rng(0)
X = RNG.normal(size=(20, 6)).astype(np.float32)
Y = np.arange(20, dtype=np.int32) % 3
KEY = jax.random.key(0)
SHAPES = {'first/kernel': (6, 10), 'second/kernel': (10, 3)}


def plain_params(kernel='kernel'):
    rng = np.random.default_rng(1)

    def layer(fan_in, fan_out):
        return {
            kernel: jnp.asarray(rng.normal(size=(fan_in, fan_out)), jnp.float32),
            'bias': jnp.asarray(rng.normal(size=fan_out), jnp.float32),
        }

    return {'first': layer(6, 10), 'second': layer(10, 3)}


def plain_apply(p, x):
    h = jax.nn.relu(x @ p['first']['kernel'] + p['first']['bias'])
    return h @ p['second']['kernel'] + p['second']['bias']


def fresh(key):
    """Parameters of the same network, drawn anew."""
    leaves, tree = jax.tree.flatten(plain_params())
    keys = jax.random.split(key, len(leaves))
    drawn = [jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def linen_case():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.relu(nn.Dense(10)(x)))

    module = Net()
    params = module.init(KEY, X)['params']
    # Python makes the outer layer first, so the classifier is called Dense_0.
    return params, lambda p, x: module.apply({'params': p}, x), ['Dense_1/kernel', 'Dense_0/kernel']


def nnx_case():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(6, 10, rngs=rngs)
            self.second = nnx.Linear(10, 3, rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.relu(self.first(x)))

    graph, params = nnx.split(Net(nnx.Rngs(0)), nnx.Param)
    return params, lambda p, x: nnx.merge(graph, p)(x), ['first/kernel', 'second/kernel']


def equinox_case():
    net = eqx.nn.MLP(6, 3, 10, 1, key=KEY)
    params, static = eqx.partition(net, eqx.is_array)
    return (
        params,
        lambda p, x: jax.vmap(eqx.combine(p, static))(x),
        ['layers/0/weight', 'layers/1/weight'],
    )


def haiku_case():
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([10, 3])(x)))
    return net.init(KEY, X), net.apply, ['mlp/~/linear_0/w', 'mlp/~/linear_1/w']


def dict_case():
    return plain_params(), plain_apply, ['first/kernel', 'second/kernel']


CASES = {
    'linen': linen_case,
    'nnx': nnx_case,
    'equinox': equinox_case,
    'haiku': haiku_case,
    'dict': dict_case,
}


@pytest.mark.parametrize('library', CASES)
def test_models_of_any_library(library):
    """Expectation: 9 of 90 weights, |w g| computed here; the tree keeps its structure."""
    params, apply, names = CASES[library]()
    pruned = jp.prune(params, 'snip', 0.1, model=apply, data=(X, Y))
    report = pruned.report
    found = [leaf.path.removesuffix('/value') for leaf in report.leaves]
    assert found == names  # in forward order
    assert sum(leaf.kept for leaf in report.leaves) == 9
    assert report.compression == 10 and len(report.untouched) == 2
    assert jax.tree.structure(pruned.params) == jax.tree.structure(params)

    gradient = jax.jit(jax.grad(lambda p: jp.cross_entropy(apply(p, X), Y).mean()))(params)
    leaves = [
        np.abs(np.asarray(w) * np.asarray(g)).reshape(-1)
        for w, g in zip(jax.tree.leaves(params), jax.tree.leaves(gradient), strict=True)
        if w.ndim == 2
    ]
    threshold = np.sort(np.concatenate(leaves))[-9]
    kept = [m.reshape(-1) for m in pruned.masks.values()]
    for score, mask in zip(leaves, kept, strict=True):
        np.testing.assert_array_equal(mask, score >= threshold)
    # Pruned weights are zero, the others and the biases are what they were.
    leaves = (jax.device_get(jax.tree.leaves(tree)) for tree in (params, pruned.params))
    for before, after in zip(*leaves, strict=True):
        assert before.shape == after.shape
        assert bool(((after == before) | (after == 0)).all())
        assert before.ndim == 2 or bool((after == before).all())
    connect = jax.jit(connectivity(apply, params, X[:1]))
    active = sum(int(m.sum()) for m in connect(pruned.masks).values())
    assert report.effective_compression == 90 / active


def test_params_alone_are_enough_for_methods_of_the_weights():
    """Expectation: the 27 largest |w| of 90; nothing is said about paths."""
    pruned = jp.prune(plain_params(), 'magnitude', density=0.3)
    weights = np.concatenate(
        [np.asarray(plain_params()[n]['kernel']).reshape(-1) for n in ('first', 'second')]
    )
    kept = np.concatenate(
        [np.asarray(pruned.masks[f'{n}/kernel']).reshape(-1) for n in ('first', 'second')]
    )
    assert set(np.argsort(-abs(weights))[:27]) == set(np.flatnonzero(kept))
    assert pruned.report.effective_compression is None
    assert [leaf.active for leaf in pruned.report.leaves] == [None, None]
    text = str(pruned.report)
    assert 'compression 3.33333' in text and 'untouched: first/bias, second/bias' in text


@pytest.mark.parametrize(
    'name',
    [
        more_unless(n in (*KINDS, 'ntk_sap'), n)
        for n, m in sorted(jp.METHODS.items())
        if not (m.hooked or m.coupled or m.rewind)
    ],
)
def test_every_method(name):
    """Expectation: round(0.2 * 90) weights, also in few rounds; deterministic without a key.

    A second call where random numbers are drawn: what else a method does is in the contract.
    Scores of coupled groups are in `test_coupled_score`.
    """
    asked = {'model': plain_apply, 'data': (X, Y), 'rounds': min(jp.METHODS[name].rounds, 2)}
    if 'fresh_init' in jp.METHODS[name].needs:
        asked['init'] = fresh
    drawn = name in ('fisher', 'ntk_sap', 'prospr', 'random')
    one, *more = (jp.prune(plain_params(), name, 0.2, **asked) for _ in range(1 + drawn))
    assert sum(leaf.kept for leaf in one.report.leaves) == 18
    for two in more:
        for path, mask in one.masks.items():
            np.testing.assert_array_equal(mask, two.masks[path])


#: An allocation by the weights, and one by shapes with several rounds.
HARD = [('random', 'lamp'), ('synflow', 'erk')]


@pytest.mark.parametrize(
    ('name', 'allocation'),
    [
        pytest.param(*case, marks=() if case in HARD else pytest.mark.more)
        for case in itertools.product(
            ('random', 'synflow'), ('global', 'erk', 'igq', 'uniform_plus', 'lamp')
        )
    ],
)
def test_to_an_effective_density(name, allocation):
    """Expectation: at least 18 of 90 weights on a path, and a weight fewer would be too few."""
    pruned = jp.prune(
        plain_params(),
        name,
        0.2,
        model=plain_apply,
        data=X,
        allocation=allocation,
        target='effective',
        rounds=2,
    )
    report = pruned.report
    active = sum(leaf.active for leaf in report.leaves)
    assert active >= 18 and report.effective_compression == 90 / active <= 5
    assert report.compression <= report.effective_compression
    for path, mask in pruned.masks.items():  # weights that came back have their values
        before = plain_params()[path.split('/')[0]]['kernel']
        after = pruned.params[path.split('/')[0]]['kernel']
        np.testing.assert_array_equal(after, np.where(mask, before, 0))


def test_floors_caps_and_masks_in_force():
    """Expectation: by hand; what was pruned before stays pruned, also where weights may return."""
    first = jp.prune(plain_params(), 'magnitude', 0.5)
    for name in ('magnitude', 'force'):
        second = jp.prune(
            plain_params(), name, 0.2, model=plain_apply, data=(X, Y), masks=first.masks, rounds=2
        )
        for path, mask in second.masks.items():
            assert bool((mask <= first.masks[path]).all())
    scaled = plain_params()
    scaled['second'] = jax.tree.map(lambda w: w * 1e-6, scaled['second'])
    pruned = jp.prune(scaled, 'magnitude', 0.2)
    assert pruned.report.collapsed == ('second/kernel',)
    assert 'collapsed' in str(pruned.report)
    floored = jp.prune(scaled, 'magnitude', 0.2, floor={'second/kernel': 4})
    assert {leaf.path: leaf.kept for leaf in floored.report.leaves} == {
        'first/kernel': 14,
        'second/kernel': 4,
    }
    capped = jp.prune(scaled, 'magnitude', 0.2, cap=0.25)
    assert {leaf.path: leaf.kept for leaf in capped.report.leaves} == {
        'first/kernel': 15,
        'second/kernel': 3,
    }


def test_batch_norm_through_a_problem():
    """Expectation: the model state is used, not changed."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool = False):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
            return nn.Dense(3)(nn.relu(x))

    problem = jp.problem_from_flax(Net(), (6,))
    params, state = problem.init(KEY)
    pruned = jp.prune(params, 'grasp', 0.5, model=problem, model_state=state, data=(X, Y))
    assert pruned.report.compression == 2
    assert pruned.report.effective_compression >= 2


NONE = {path: np.zeros(shape, bool) for path, shape in SHAPES.items()}
FEW = jax.tree.map(np.copy, NONE)  # six weights, those of one hidden unit
FEW['first/kernel'][:3, 0] = FEW['second/kernel'][0] = True


def ask(**changed):
    """A call that is right, with some of its arguments changed."""
    right = {'params': plain_params(), 'method_name': 'snip', 'density': 0.1}
    return jp.prune(**{**right, 'model': plain_apply, 'data': (X, Y), **changed})


def test_not_under_jit():
    """Expectation: one line that says so; a gradient through it would be another matter."""
    with pytest.raises(PruneError, match='outside jit'):
        jax.jit(lambda p: jp.prune(p, 'magnitude', 0.5).masks)(plain_params())


def test_what_else_is_right():
    """Expectation: 9 of 90 weights, however the arguments are written."""
    fixed = {'model': lambda p, x: plain_apply(p, x.reshape(20, 6)), 'data': (X, Y)}
    pruned = jp.prune(plain_params(), 'snip', 0.1, **fixed)
    assert 'the model on one input fails' in pruned.report.note
    with pytest.raises(PruneError, match='the model on one input fails'):
        jp.prune(plain_params(), 'snip', 0.1, target='effective', **fixed)
    for more in (
        {'key': jax.random.PRNGKey(0)},
        {'batch_norm': 'eval'},
        {'density': np.float32(0.1)},
        {'density': fractions.Fraction(1, 10)},
        {'data': jp.Batch(X[None], Y[None].astype(np.uint8))},
        {'data': (X.tolist(), Y.astype(np.int64))},
        {'data': (jnp.asarray(X), jnp.asarray(Y))},
        {'params': jax.tree.map(np.asarray, plain_params())},
        {'params': jax.tree.map(lambda w: w.astype(jnp.bfloat16), plain_params())},
    ):
        assert sum(int(m.sum()) for m in ask(**more).masks.values()) == 9
    only_inputs = jp.prune(
        plain_params(), 'synflow', 0.1, model=plain_apply, data=jp.Batch(X[None], None)
    )
    assert only_inputs.report.compression == 10
    without = jp.prune(plain_params(), 'magnitude', 0.1, data=(X, Y))
    assert 'needs model= as well' in without.report.note


def test_tokens_in_and_losses_of_other_targets():
    """Expectation: 12 of 40 weights, of a net that looks up integers; a loss of real targets."""
    params = {
        'embed': {'table': jnp.asarray(RNG.normal(size=(7, 5)), jnp.float32)},
        'head': {'kernel': jnp.asarray(RNG.normal(size=(5, 8)), jnp.float32)},
    }
    tokens = jnp.asarray(RNG.integers(0, 7, size=(20, 4)))

    def apply(p, x):
        return p['embed']['table'][x].mean(1) @ p['head']['kernel']

    for name in ('snip', 'synflow', 'magnitude'):
        pruned = jp.prune(params, name, 0.3, model=apply, data=(tokens, Y), rounds=1)
        assert sum(leaf.kept for leaf in pruned.report.leaves) == 12
        assert pruned.report.effective_compression == 40 / 12
    targets = jnp.asarray(RNG.normal(size=(20, 8)), jnp.float32)
    squares = jp.prune(
        params,
        'taylor',
        0.3,
        model=apply,
        data=(tokens, targets),
        loss=lambda y, t: ((y - t) ** 2).sum(-1),
    )
    gradient = jax.grad(lambda p: ((apply(p, tokens) - targets) ** 2).sum(-1).mean())(params)
    score = np.abs(np.asarray(params['head']['kernel'] * gradient['head']['kernel']))
    np.testing.assert_array_equal(
        squares.masks['head/kernel'], score >= np.sort(score.reshape(-1))[-12]
    )


class Words(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(3)(nn.Embed(7, 5)(tokens).mean(1))


def test_a_linen_problem_of_tokens():
    """Expectation: every weight of the head works; shapes by hand."""
    problem = jp.problem_from_flax(Words(), (4,), input_dtype=jnp.int32)
    params, _ = problem.init(KEY)
    pruned = jp.prune(params, 'synflow', 1.0, model=problem, data=jnp.zeros((2, 4), jnp.int32))
    assert [(leaf.path, leaf.active) for leaf in pruned.report.leaves] == [('Dense_0/kernel', 15)]
    assert forward_shapes(problem, (4,), jnp.int32) == {'Dense_0/kernel': (5, 3)}
    connect = connectivity_of(problem, (4,), jnp.int32)
    assert bool(connect(pruned.masks)['Dense_0/kernel'].all())


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        return nn.Dense(3)(nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x)))


BATCH_NORM = jp.problem_from_flax(Normed(), (6,))


def zero(p, x):
    return 0 * plain_apply(p, x)


def nan(p, x):
    return plain_apply(p, x) / 0 * 0


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'method_name': 'snipp'}, "unknown method 'snipp': did you mean 'snip'"),
        ({'density': 0}, 'density must be in'),
        ({'density': 1.5}, 'density must be in'),
        ({'density': float('nan')}, 'density must be in'),
        ({'density': 1e-4}, 'keeps none of 90'),
        ({'model': None}, "method 'snip' needs model="),
        ({'data': None}, "method 'snip' needs data="),
        ({'data': X}, 'needs labels'),
        ({'data': (X, Y[:3])}, '20 inputs'),
        ({'data': (X[:0], Y[:0])}, 'no example'),
        ({'model': zero}, "all scores of 'snip' are zero"),
        ({'model': nan}, 'were NaN or infinite'),
        ({'allocation': 'erkk'}, "unknown allocation 'erkk': did you mean 'erk'"),
        ({'target': 'efective'}, "unknown target 'efective': did you mean 'effective'"),
        ({'floor': 40}, 'second/kernel'),
        ({'floor': {'third': 4}}, 'third'),
        (
            {'temperature': 2.0},
            "'temperature' is no argument, nor an option of this method: .*floor",
        ),
        ({'allocatoin': 'erk'}, "did you mean 'allocation'"),
        ({'params': {}}, 'no parameter'),
        ({'params': {'first': {'bias': np.ones(3, np.float32)}}}, 'no parameter is prunable'),
        ({'masks': {'first/kernel': np.ones((6, 10), bool)}}, 'masks lack second/kernel'),
        ({'masks': {'first/kernel': np.ones((6, 9), bool)}}, 'has shape'),
        ({'rounds': 0}, 'rounds must be at least 1'),
        # Types.
        ({'method_name': None}, 'method_name must be a name'),
        ({'density': '0.1'}, "density must be a number, not '0.1'"),
        ({'density': None}, 'give either density= or compression='),
        ({'compression': 10}, 'give either density= or compression='),
        ({'density': None, 'compression': 0.5}, 'compression must be at least 1, not 0.5'),
        ({'density': None, 'compression': '9'}, "compression must be a number, not '9'"),
        ({'density': True}, 'density must be a number, not True'),
        ({'rounds': 2.5}, 'rounds must be a whole number, not 2.5'),
        ({'rounds': '3'}, "rounds must be a whole number, not '3'"),
        ({'floor': True}, 'floor must be a whole number, not True'),
        ({'cap': 'x'}, "cap must be a number, not 'x'"),
        ({'density_schedule': 3}, "unknown schedule '3'"),
        ({'allocation': None}, "unknown allocation 'None'"),
        ({'key': 0}, 'key must be a random key such as'),
        ({'batch_norm': 'no'}, "unknown batch_norm 'no'"),
        ({'batch_norm': True}, "unknown batch_norm 'True'"),
        ({'method_name': 'magnitude', 'batch_norm': 'eval'}, 'there is no mode to choose'),
        ({'prunable': ['first']}, 'prunable must be a function'),
        ({'loss': 'mse'}, 'loss must be a function'),
        ({'masks': [1]}, 'masks must be a dict'),
        ({'masks': {'first/kernel': [True]}}, 'must be an array, not a list'),
        ({'model': 3}, 'model must be a function .* not 3'),
        ({'params': eqx.nn.MLP(6, 3, 10, 0, key=KEY)}, 'must hold arrays only, but .*activation'),
        # The model and what it is fed.
        ({'model': lambda p, x: (plain_apply(p, x), 0)}, 'must return one float array'),
        ({'model': lambda p, x: plain_apply(p, x).argmax(-1)}, 'one float array.* not int32'),
        ({'data': (X[:, :5], Y)}, 'the model on inputs .20, 5. fails: TypeError: dot_general'),
        ({'data': (X[:, :5], Y), 'method_name': 'magnitude'}, 'the model on inputs'),
        ({'data': {'x': X, 'y': Y}}, 'must be a pair of arrays .x, y., a Batch or'),
        ({'data': (X, Y, Y)}, 'not 3 values'),
        ({'data': jp.Batch(X[0, 0], Y[0])}, 'a Batch holds several batches'),
        ({'data': (X, Y + 1)}, 'labels go from 1 to 3, but the model has 3 classes'),
        ({'data': (X, Y - 1)}, 'labels go from -1 to 1'),
        ({'data': (X, np.eye(3, dtype=np.float32)[Y])}, 'labels must be whole numbers'),
        ({'data': (X, Y.astype(np.float32))}, 'labels must be whole numbers'),
        ({'loss': lambda logits, y: logits.mean()}, 'one number per example'),
        ({'loss': lambda logits, y: logits @ y}, 'the loss fails: TypeError'),
        ({'data': jp.Batch([[1.0]], [0])}, 'a Batch holds several batches'),
        ({'data': jp.Batch(X[None, :0], Y[None, :0])}, 'no example'),
        ({'data': jp.Batch(X[None], None)}, r'pass Batch\(x, y\)'),
        ({'data': (np.array(['a', 'b']), Y[:2])}, 'x is no array of numbers'),
        ({'data': ([[1.0], [1.0, 2.0]], Y[:2])}, 'x is no array of numbers'),
        ({'model': lambda p, x: plain_apply(p, x).mean(0, keepdims=True)}, r'logits \(20, classes'),
        (
            {'model': BATCH_NORM, 'params': jax.jit(BATCH_NORM.init)(KEY)[0]},
            'does it need model_state=',
        ),
        ({'model_state': {'mean': X}}, 'model_state= is for a model that is a Problem'),
        ({'params': jax.eval_shape(lambda: plain_params())}, 'is a ShapeDtypeStruct'),
        ({'params': {'w': np.ones((6, 3), np.int32)}, 'model': None, 'data': None}, 'needs model'),
        (
            {'params': {'w': np.ones((6, 3), np.int32)}, 'model': lambda p, x: x @ p['w']},
            'holds int32',
        ),
        ({'prunable': lambda path: True}, 'prunable= fails: TypeError'),
        ({'density_schedule': ['linear']}, 'unknown schedule'),
        ({'allocation': ['erk']}, 'unknown allocation'),
        ({'density': np.complex64(0.5)}, 'density must be a number'),
        ({'density': np.array('a')}, 'density must be a number'),
        # Masks in force that leave too little.
        ({'masks': FEW, 'method_name': 'magnitude'}, 'masks leave only 6 weights, 9 are asked for'),
        (
            {'masks': FEW, 'method_name': 'random', 'allocation': 'uniform'},
            "masks leave only 3 weights of 'first/kernel', 6 are",
        ),
        ({'masks': NONE}, 'masks keep no weight'),
        # Options of methods.
        ({'method_name': 'grasp', 'temperature': 0.0}, 'temperature of grasp must be above 0'),
        ({'method_name': 'grasp', 'temperature': '9'}, "option 'temperature' must be a number"),
        ({'method_name': 'ntk_sap'}, r"'ntk_sap' draws fresh weights: it needs init="),
        (
            {'method_name': 'ntk_sap', 'init': fresh, 'epsilon': -1.0},
            'epsilon of ntk_sap must be above 0',
        ),
        ({'method_name': 'prospr', 'first_order': 'no'}, 'must be True or False'),
        ({'method_name': 'prospr', 'steps': 1.5}, "option 'steps' must be a whole number"),
        (
            {'method_name': 'ntk_sap', 'init': fresh, 'data': X.astype(int)},
            'ntk_sap draws Gaussian inputs',
        ),
        # Methods that change training.
        ({'method_name': 'tpp'}, "granularity: 'tpp' prunes coupled groups"),
        ({'method_name': 'tpp', 'granularity': 'unit'}, "'tpp' acts between its first round and"),
    ],
)
def test_mistakes_are_told_in_one_line(kwargs, message):
    """Expectation: a `PruneError`, before any mask is made."""
    with pytest.raises(PruneError, match=message) as caught:
        ask(**kwargs)
    assert '\n' not in str(caught.value)


def test_an_effective_density_that_cannot_be_met():
    """Expectation: an unused layer leaves at most 90 of 190 weights on paths."""
    params = {**plain_params(), 'unused': {'kernel': jnp.ones((10, 10))}}
    with pytest.raises(PruneError, match='cannot be met'):
        jp.prune(params, 'magnitude', 0.6, model=plain_apply, data=X, target='effective')


def test_unknown_operations_only_silence_the_report():
    """Expectation: masks need no paths; the report says why it is silent."""
    pruned = jp.prune(
        plain_params(), 'snip', 0.1, model=lambda p, x: jnp.sort(plain_apply(p, x)), data=(X, Y)
    )
    assert pruned.report.effective_compression is None
    assert "operation 'sort'" in pruned.report.note
    with pytest.raises(PruneError, match='sort'):
        jp.prune(
            plain_params(),
            'snip',
            0.1,
            model=lambda p, x: jnp.sort(plain_apply(p, x)),
            data=(X, Y),
            target='effective',
        )


def test_an_allocation_by_the_weights_and_weights_that_return_do_not_go_together():
    """Expectation: one line that says why."""
    with pytest.raises(PruneError, match="'force' brings weights back"):
        jp.prune(plain_params(), 'force', 0.2, model=plain_apply, data=(X, Y), allocation='lamp')


# --- rounds, batches, and what there is in place of a density -----------------------------------

BATCHES = jp.Batch(
    jnp.asarray(RNG.normal(size=(3, 12, 6)), jnp.float32), jnp.asarray(RNG.integers(0, 3, (3, 12)))
)


def kernels_of(params):
    return {path: np.asarray(params[path.split('/')[0]]['kernel']) for path in SHAPES}


def with_kernels(weights):
    changed = {name: {'kernel': jnp.asarray(weights[f'{name}/kernel'])} for name in plain_params()}
    return {name: {**layer, **changed[name]} for name, layer in plain_params().items()}


def snip_by_hand(counts, batches_of):
    """Masks after rounds of |w g|, g the mean of `jax.grad` over batches `batches_of(round)`."""

    def loss(params, at):
        return jp.cross_entropy(plain_apply(params, BATCHES.x[at]), BATCHES.y[at]).mean()

    weights = kernels_of(plain_params())
    for number, count in enumerate(counts):
        each = [kernels_of(jax.grad(loss)(with_kernels(weights), at)) for at in batches_of(number)]
        scores = {p: np.abs(w * np.mean([g[p] for g in each], 0)) for p, w in weights.items()}
        least = np.sort(np.concatenate([score.ravel() for score in scores.values()]))[-count]
        weights = {p: np.where(scores[p] >= least, w, 0) for p, w in weights.items()}
    return {path: w != 0 for path, w in weights.items()}


@pytest.mark.parametrize('rounds', [2, 5])
def test_several_rounds_take_one_batch_each_in_turn(rounds):
    """Expectation: `jax.grad` by hand: round i scores batch i mod 3 alone."""
    counts = jp.plan_rounds(SHAPES, 0.2, rounds=rounds).counts['*']
    pruned = jp.prune(plain_params(), 'snip', 0.2, model=plain_apply, data=BATCHES, rounds=rounds)
    by_hand = snip_by_hand(counts, lambda number: [number % 3])
    for path, mask in by_hand.items():
        np.testing.assert_array_equal(pruned.masks[path], mask)
    assert pruned.report.note == ''
    # So the first batch alone would give other masks: the test can tell.
    first = snip_by_hand(counts, lambda number: [0])
    assert any((first[path] != mask).any() for path, mask in by_hand.items())


def test_a_single_round_averages_over_all_batches():
    """Expectation: |w| times the mean of the three gradients, by hand."""
    pruned = jp.prune(plain_params(), 'snip', 0.2, model=plain_apply, data=BATCHES, rounds=1)
    by_hand = snip_by_hand([18], lambda number: [0, 1, 2])
    for path, mask in by_hand.items():
        np.testing.assert_array_equal(pruned.masks[path], mask)
    first = snip_by_hand([18], lambda number: [0])
    assert any((first[path] != mask).any() for path, mask in by_hand.items())


def test_the_report_says_when_all_rounds_scored_one_batch():
    """Expectation: the docstring of `data`; nothing where there is nothing to say."""

    def note(name, rounds, data=(X, Y)):
        report = jp.prune(
            plain_params(), name, 0.2, model=plain_apply, data=data, rounds=rounds
        ).report
        assert (report.note or 'untouched') in str(report)
        return report.note

    assert note('snip', 3) == 'all 3 rounds scored the same batch'
    assert note('snip', 1) == ''
    assert note('snip', 3, BATCHES) == ''
    assert note('synflow', 3) == ''  # looks at no data
    silent = jp.prune(
        plain_params(),
        'snip',
        0.2,
        model=lambda p, x: jnp.sort(plain_apply(p, x)),
        data=(X, Y),
        rounds=2,
    )
    assert "operation 'sort'" in silent.report.note
    assert silent.report.note.endswith('; all 2 rounds scored the same batch')


def test_a_compression_in_place_of_a_density():
    """Expectation: the masks of the density 1 / compression, also to active weights."""
    for more in ({}, {'target': 'effective', 'rounds': 2}):
        asked = {'model': plain_apply, 'data': (X, Y), **more}
        one = jp.prune(plain_params(), 'snip', compression=5, **asked)
        other = jp.prune(plain_params(), 'snip', density=0.2, **asked)
        for path in SHAPES:
            np.testing.assert_array_equal(one.masks[path], other.masks[path])
    assert jp.prune(plain_params(), 'magnitude', compression=10).report.compression == 10


def test_ntk_sap_draws_fresh_weights():
    """Expectation: the score draws weights by `init=`, a `Problem`'s own where none is given; so
    masks are not those of scoring the given weights, which a constant `init` comes to."""
    asked = {'model': plain_apply, 'data': X, 'rounds': 2}
    drawn = jp.prune(plain_params(), 'ntk_sap', 0.2, init=fresh, **asked)
    given = jp.prune(plain_params(), 'ntk_sap', 0.2, init=lambda key: plain_params(), **asked)
    problem = jp.problem_from_functions(fresh, plain_apply)
    own = jp.prune(plain_params(), 'ntk_sap', 0.2, **{**asked, 'model': problem})
    assert drawn.report.compression == given.report.compression == 5
    assert any((drawn.masks[path] != given.masks[path]).any() for path in SHAPES)
    for path in SHAPES:
        np.testing.assert_array_equal(drawn.masks[path], own.masks[path])
        # Fresh weights are for the score alone: what is kept is what was given.
        kept = kernels_of(drawn.params)[path]
        np.testing.assert_array_equal(
            kept, np.where(drawn.masks[path], kernels_of(plain_params())[path], 0)
        )


@pytest.mark.parametrize(('gain', 'square'), [('linear', 1.0), ('relu', 2.0)])
def test_units_with_orthogonal_kernels(gain, square):
    """Expectation: the definition: what is left of a kernel has orthonormal rows or columns, times
    the gain; 4 of the 10 hidden units stay, and all 3 outputs."""
    pruned = jp.prune(
        plain_params(),
        'magnitude',
        0.4,
        model=plain_apply,
        data=X,
        granularity='unit',
        repair='orthp',
        repair_gain=gain,
    )
    for path, shape in {'first/kernel': (6, 4), 'second/kernel': (4, 3)}.items():
        mask, kernel = np.asarray(pruned.masks[path]), kernels_of(pruned.params)[path]
        left = kernel[mask.any(1)][:, mask.any(0)]
        assert left.shape == shape and not kernel[~mask].any()
        np.testing.assert_allclose(left.T @ left, square * np.eye(shape[1]), atol=1e-5)
    for name in SHAPES:
        layer = name.split('/')[0]
        np.testing.assert_array_equal(pruned.params[layer]['bias'], plain_params()[layer]['bias'])


def test_a_traced_option_equals_the_constant():
    """Expectation: the masks of the pruner with the number as a constant; two temperatures in one
    program that differ."""
    problem = jp.problem_from_functions(lambda key: plain_params(), plain_apply)
    view = jp.view(problem, plain_params())
    counts = jp.plan_rounds(SHAPES, 0.5, rounds=2).counts

    def masks(temperature):
        pruner = jp.get_pruner(problem, 'grasp', temperature=temperature)
        return jp.prune_rounds(pruner, KEY, view, counts, BATCHES)[0].masks

    traced, found = jax.jit(masks), []
    for temperature in (0.5, 200.0):
        constant = jax.jit(lambda temperature=temperature: masks(temperature))()
        found.append(traced(jnp.float32(temperature)))
        for path, mask in constant.items():
            np.testing.assert_array_equal(found[-1][path], mask)
    assert any((found[0][path] != found[1][path]).any() for path in SHAPES)
