"""`jp.prune`: one call for someone's own model, whatever library it comes from."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxprune as jp
from jaxprune.errors import PruneError
from jaxprune.structure import connectivity

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(20, 6)), jnp.float32)
Y = jnp.asarray(np.arange(20) % 3)
KEY = jax.random.key(0)


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

    gradient = jax.grad(lambda p: jp.cross_entropy(apply(p, X), Y).mean())(params)
    leaves = [
        np.abs(np.asarray(w * g)).reshape(-1)
        for w, g in zip(jax.tree.leaves(params), jax.tree.leaves(gradient), strict=True)
        if w.ndim == 2
    ]
    threshold = np.sort(np.concatenate(leaves))[-9]
    kept = [m.reshape(-1) for m in pruned.masks.values()]
    for score, mask in zip(leaves, kept, strict=True):
        np.testing.assert_array_equal(mask, score >= threshold)
    # Pruned weights are zero, the others and the biases are what they were.
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(pruned.params), strict=True):
        assert before.shape == after.shape
        assert bool(((after == before) | (after == 0)).all())
        assert before.ndim == 2 or bool((after == before).all())
    connect = connectivity(apply, params, X[:1])
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


@pytest.mark.parametrize('name', sorted(jp.METHODS))
def test_every_method(name):
    """Expectation: round(0.2 * 90) weights, also in few rounds; deterministic without a key."""
    rounds = min(jp.METHODS[name].rounds, 2)
    one, two = (
        jp.prune(plain_params(), name, 0.2, model=plain_apply, data=(X, Y), rounds=rounds)
        for _ in range(2)
    )
    assert sum(leaf.kept for leaf in one.report.leaves) == 18
    for path, mask in one.masks.items():
        np.testing.assert_array_equal(mask, two.masks[path])


@pytest.mark.parametrize('allocation', ['global', 'erk', 'igq', 'uniform_plus', 'lamp'])
@pytest.mark.parametrize('name', ['random', 'synflow'])
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

    problem = jp.linen(Net(), (6,))
    params, state = problem.init(KEY)
    pruned = jp.prune(params, 'grasp', 0.5, model=problem, model_state=state, data=(X, Y))
    assert pruned.report.compression == 2
    assert pruned.report.effective_compression >= 2


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
        ({'temperature': 2.0}, "has no option 'temperature'"),
        ({'params': {}}, 'no parameter'),
        ({'params': {'first': {'bias': jnp.ones(3)}}}, 'no parameter is prunable'),
        ({'masks': {'first/kernel': jnp.ones((6, 10), bool)}}, 'masks lack second/kernel'),
        ({'masks': {'first/kernel': jnp.ones((6, 9), bool)}}, 'has shape'),
        ({'rounds': 0}, 'rounds must be at least 1'),
    ],
)
def test_mistakes_are_told_in_one_line(kwargs, message):
    """Expectation: a `PruneError`, before any mask is made."""
    given = {
        'params': plain_params(),
        'method_name': 'snip',
        'density': 0.1,
        'model': plain_apply,
        'data': (X, Y),
        **kwargs,
    }
    with pytest.raises(PruneError, match=message) as caught:
        jp.prune(**given)
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


def test_a_quota_of_the_weights_and_weights_that_return_do_not_go_together():
    """Expectation: one line that says why."""
    with pytest.raises(PruneError, match="'force' brings weights back"):
        jp.prune(plain_params(), 'force', 0.2, model=plain_apply, data=(X, Y), allocation='lamp')
