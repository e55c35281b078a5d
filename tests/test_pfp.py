"""PFP: the numbers of its authors' code, the search for epsilon as a ranking, whole units.

`golden/structured/torchprune_*` holds numbers of lucaslie/torchprune, see `golden/README.md`.
Beside it WT and FT, what the same authors compare with.
"""

import functools
import math
import re
import tomllib
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import more_but
from structured_nets import load
from test_sipp import CNN, NETS, batch_of, of_functions, published

import jaxprune as jp
from jaxprune import score, tree
from jaxprune.errors import PruneError
from jaxprune.score.pfp import channel_scores
from jaxprune.score.sample_sizes import log_term
from jaxprune.sweep import make_spec

KEY = jax.random.key(0)
DRAW = np.random.default_rng(0)
ranked = jax.jit(channel_scores)
EPSILONS = (0.5, 2.0, 10.0, 50.0, 200.0, 1000.0)


@functools.cache
def channels(name):
    """What PFP knows of the layers of a network of the files."""
    _, _, problem, view, batch = published(name)
    return jax.device_get(jax.jit(lambda view: score.pfp_channels(problem, view, batch))(view))


def probabilities(layer):
    return np.asarray(layer.sensitivity, np.float64) / np.float64(layer.sensitivity).sum()


def units_of(problem, view, x):
    """What competes as units."""

    def read():
        return jp.groups(problem, view.params, x[:1], view.model_state)

    return jp.competing('unit', tree.shapes(view.weights), functools.cache(read))


# --- the numbers of the authors -------------------------------------------------------------------


@pytest.mark.parametrize('name', NETS)
def test_channels_of_the_authors(name):
    """Expectation: theirs: sensitivities of input channels, coefficients, probabilities."""
    file, meta, *_ = published(name)
    assert [path.split('/')[0] for path in channels(name)] == meta['layers']
    for layer in meta['layers']:
        own = channels(name)[f'{layer}/kernel']
        np.testing.assert_allclose(own.sensitivity, file[f'sens_in/pfp/{layer}'], atol=1e-6)
        np.testing.assert_allclose(own.coefficient, file[f'pfp/coeffs/{layer}'][0], rtol=1e-6)
        np.testing.assert_allclose(probabilities(own), file[f'pfp/probs/{layer}'], atol=1e-6)
        assert meta['num_patches'][layer] == {'conv1': 25, 'conv2': 9}.get(layer, 1)


@pytest.mark.parametrize('name', NETS)
def test_numbers_for_an_epsilon(name):
    """Expectation: theirs: draws, what they are expected to find, the channels and units left."""
    file, meta, *_ = published(name)
    for epsilon in EPSILONS:
        draws = [score.sample_complexity(c.coefficient, epsilon) for c in channels(name).values()]
        np.testing.assert_array_equal(draws, file[f'pfp/sample_complexity/eps{epsilon}'])
        found = [
            score.expected_unique(probabilities(c), m)
            for c, m in zip(channels(name).values(), draws, strict=True)
        ]
        np.testing.assert_array_equal(found, file[f'pfp/expected_unique/eps{epsilon}'])
        inputs, outputs = score.pfp_proposal(channels(name), epsilon)
        np.testing.assert_array_equal([*inputs.values()], file[f'pfp/proposed_in/eps{epsilon}'])
        np.testing.assert_array_equal([*outputs.values()], file[f'pfp/proposed_out/eps{epsilon}'])
    assert len(meta['layers']) == len(channels(name))


@pytest.mark.parametrize('name', NETS)
def test_budgets_of_weights(name):
    """Expectation: theirs: input channels of each layer for 30, 50 and 70 % of the weights, and the
    epsilon at which their search ends, in float32; the weights left are counted by hand."""
    file, meta, _, view, _ = published(name)
    taps = [math.prod(view.weights[path].shape[:-2]) for path in channels(name)]
    for fraction in ('0.3', '0.5', '0.7'):
        found = score.pfp_allocation(channels(name), meta['pfp'][f'budget_{fraction}'])
        np.testing.assert_array_equal([*found.inputs.values()], file[f'pfp/alloc_{fraction}'])
        assert found.epsilon == pytest.approx(meta['pfp'][f'eps_opt_{fraction}'], rel=1e-6)
        rows = zip(found.inputs.values(), found.outputs.values(), taps, strict=True)
        assert found.weights == sum(math.prod(row) for row in rows)
    least = sum(taps)  # one channel of each layer, read by one unit; the last keeps its four
    assert score.pfp_allocation(channels(name), least + 3).weights == least + 3
    everything = score.pfp_allocation(channels(name), 10**6)
    dense = {path: int((c.sensitivity > 0).sum()) for path, c in channels(name).items()}
    assert everything.inputs == dense
    with pytest.raises(PruneError, match=f'at least, {least + 3} weights: budget must not be 5'):
        score.pfp_allocation(channels(name), 5)


# --- the search for epsilon as a ranking ----------------------------------------------------------


def brute_scores(sensitivity, scale):
    """`S / (m - 1)`, the fewest draws m found by trying them all."""
    s = np.asarray(sensitivity, np.float64)
    p = s / s.sum()
    scores, draws = np.zeros(len(s)), 1
    for rank, channel in enumerate(np.argsort(-s, kind='stable'), 1):
        if not s[channel]:
            break
        while draws < rank or score.expected_unique(p, draws) < rank:
            draws += 1
        scores[channel] = scale * s.sum() / max(draws - 1, 1e-20)
    return scores


@pytest.mark.parametrize(
    'sensitivity',
    [
        DRAW.random(40),
        np.ones(7),
        np.array([1.0, 0.3, 1.0, 0.0, 0.02, 0.0, 0.3]),
        np.exp(-np.arange(12.0)),
        np.array([0.0, 1.0]),
        np.array([0.5]),
    ],
    ids=['drawn', 'equal', 'ties and zeros', 'uneven', 'one of two', 'one'],
)
def test_scores_of_channels(sensitivity):
    """Expectation: the definition, by trying numbers of draws; ties go to the first channel."""
    with jax.enable_x64(True):
        found = jax.jit(channel_scores)(sensitivity, 50.0)
    np.testing.assert_allclose(found, brute_scores(sensitivity, 50.0), rtol=1e-9)


def test_dead_layers_and_broken_ones():
    """Expectation: without any sensitivity all scores are 0, which is an error for all layers
    together; a NaN reaches every score that is not 0."""
    assert not ranked(np.zeros(4, np.float32), 50.0).any()
    broken = np.asarray(ranked(np.float32([1, np.nan, 2]), 50.0))
    assert np.isnan(broken).all()


@pytest.mark.parametrize('name', NETS)
def test_the_ranking_follows_epsilon(name):
    """Expectation: what has a score above `epsilon**2 / (3 (6 + 2 epsilon))` is what PFP keeps at
    epsilon: of each layer the best, as many as its draws are expected to find. So the n best of all
    are a point of the search."""
    layers = list(channels(name).values())
    scores = [
        np.asarray(ranked(c.sensitivity, c.coefficient / c.sensitivity.sum())) for c in layers
    ]
    sizes = set()
    for epsilon in np.geomspace(0.5, 1e6, 200):
        limit = epsilon**2 / (3 * (6 + 2 * epsilon))
        for layer, values in zip(layers, scores, strict=True):
            draws = score.sample_complexity(layer.coefficient, epsilon)
            count = int(min(score.expected_unique(probabilities(layer), draws), len(values)))
            best = np.argsort(-layer.sensitivity, kind='stable')[:count]
            # In float32 a limit may coincide with a score up to rounding: none does here.
            assert set(np.flatnonzero(values > limit)) == set(best.tolist())
        sizes.add(sum(int((values > limit).sum()) for values in scores))
    assert len(sizes) > 12


@pytest.mark.parametrize('name', NETS)
def test_units_are_kept_as_for_the_published_budgets(name):
    """Expectation: with as many units as the authors' allocation leaves, the units that stay are
    those which deterministic PFP keeps of each layer: the largest `sens_in` of the layer behind."""
    file, meta, problem, view, batch = published(name)
    x = batch.x[0]
    total = sum(view.weights[f'{layer}/kernel'].shape[-1] for layer in meta['layers'][:-1])
    given = {'model': problem, 'data': (x, batch.y[0]), 'granularity': 'unit'}
    for fraction in ('0.3', '0.5', '0.7'):
        inputs = file[f'pfp/alloc_{fraction}'][1:].tolist()
        pruned = jp.prune(view.params, 'pfp', sum(inputs) / total, **given)
        layers = zip(meta['layers'], meta['layers'][1:], inputs, strict=False)
        for layer, behind, count in layers:
            best = np.argsort(-file[f'sens_in/pfp/{behind}'], kind='stable')[:count]
            mask = np.asarray(pruned.masks[f'{layer}/kernel'])
            kept = mask.any(tuple(range(mask.ndim - 1)))
            assert set(np.flatnonzero(kept)) == set(best.tolist())
            read = np.asarray(pruned.masks[f'{behind}/kernel'])
            assert not read[..., ~kept, :].any()
        assert pruned.report.compact_cost is not None


@pytest.mark.parametrize('name', NETS)
def test_single_weights(name):
    """Expectation: every weight has the score of its input channel, raw inputs included. Pruned to
    an effective density, a layer loses the filters that nothing reads: with as many weights as the
    authors' allocation for 50 % leaves, that allocation."""
    file, meta, problem, view, batch = published(name)
    scores = jax.device_get(score.pfp(problem)(KEY, view, batch))
    for path, layer in channels(name).items():
        values = ranked(layer.sensitivity, layer.coefficient / layer.sensitivity.sum())
        expected = np.broadcast_to(np.asarray(values)[:, None], scores[path].shape)
        np.testing.assert_allclose(scores[path], expected, rtol=1e-5)
    theirs = score.pfp_allocation(channels(name), meta['pfp']['budget_0.5'])
    given = {'model': problem, 'data': (batch.x[0], batch.y[0]), 'target': 'effective'}
    pruned = jp.prune(view.params, 'pfp', theirs.weights / meta['total_weights'], **given)
    for leaf, count in zip(pruned.report.leaves, file['pfp/alloc_0.5'], strict=True):
        taps = math.prod(view.weights[leaf.path].shape[:-2])
        assert leaf.active == count * theirs.outputs[leaf.path] * taps
        mask = np.asarray(pruned.masks[leaf.path])
        read = np.flatnonzero(np.moveaxis(mask, -2, 0).reshape(mask.shape[-2], -1).any(1))
        best = np.argsort(-channels(name)[leaf.path].sensitivity, kind='stable')[:count]
        assert set(read) == set(best.tolist())


# --- units of other networks ----------------------------------------------------------------------


def expected_units(groups, edges):
    """The definition in loops: rows that belong to the same units are one channel, a row of none is
    one alone; a unit has the best score that a reader gives to one of its channels."""
    scores = {name: np.zeros(n) for name, (n,) in groups.shapes.items()}
    belongs = {}
    for name, family in groups.families.items():
        for member in family.members:
            if member.role == 'in':
                for unit, at in enumerate(member.indices):
                    for row in at:
                        rows = belongs.setdefault((member.path, member.axis), {})
                        rows.setdefault(int(row), []).append((name, unit))
    for (path, axis), rows in belongs.items():
        leaf = edges[path]
        along = np.moveaxis(np.asarray(leaf.values, np.float64), axis, 0)
        channels = {}
        for row, values in enumerate(along):
            channel = channels.setdefault(tuple(rows.get(row, [row])), [])
            channel.append(values.max())
        taps = int(leaf.channels * leaf.taps) // len(along) * max(map(len, channels.values()))
        scale = 6 * math.log(8 * (int(leaf.positions) + 1) * taps / 1e-16)
        found = brute_scores([max(values) for values in channels.values()], scale)
        for channel, value in zip(channels, found, strict=True):
            for name, unit in channel if isinstance(channel[0], tuple) else ():
                scores[name][unit] = max(scores[name][unit], value)
    return scores


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ('resnet20', 'vgg', 'mobilenet')]
SOME = [*more_but(['grouped', 'encoder'], ['convnet', 'densenet', 'grouped', 'encoder']), *SLOW]


@pytest.mark.parametrize('name', SOME)
def test_units_of_other_networks(name):
    """Expectation: the definition in loops: flattened maps, sums, concatenations, grouped and
    depthwise convolutions, attention."""
    file, _, forward, params, stats = load(f'depgraph_{name}')
    x = np.asarray(file['x'])
    problem, view = of_functions(lambda p, x: forward(p, stats, x), params)
    groups, batch = units_of(problem, view, x), batch_of(x)

    @jax.jit
    def run(view):
        edges = score.edge_sensitivities(problem, view, batch)
        return score.pfp(problem, by=groups)(KEY, view, batch), edges

    found, edges = jax.device_get(run(view))
    expected = expected_units(groups, edges)
    assert set(found) == set(groups.shapes)
    for layer, leaf in expected.items():
        np.testing.assert_allclose(found[layer], leaf, rtol=1e-4, err_msg=layer)


def test_a_flattened_map_is_a_convolution_over_all_of_it():
    """Expectation: a dense layer behind a flattened map computes what a convolution with a kernel
    of the size of the map does, so units score the same."""

    class Flat(nn.Module):
        whole: bool

        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(5, (3, 3), name='first')(x))
            if self.whole:
                return nn.Conv(3, (4, 4), padding='VALID', name='last')(x).reshape(len(x), -1)
            return nn.Dense(3, name='last')(x.reshape(len(x), -1))

    x = np.float32(DRAW.normal(size=(6, 4, 4, 2)))
    nets = [jp.problem_from_flax(Flat(whole), (4, 4, 2)) for whole in (False, True)]
    params = jax.device_get(jax.jit(nets[1].init)(KEY)[0])
    flat = {**params, 'last': {**params['last'], 'kernel': params['last']['kernel'].reshape(80, 3)}}
    found = []
    for problem, own in zip(nets, (flat, params), strict=True):
        view = jp.view(problem, own)
        groups = units_of(problem, view, x)
        found.append(jax.jit(score.pfp(problem, by=groups))(KEY, view, batch_of(x)))
    np.testing.assert_allclose(found[0]['first/kernel'], found[1]['first/kernel'], rtol=1e-5)


def test_a_linen_cnn_with_a_depthwise_layer():
    """Expectation: whole units go, and without them the network computes the same; the depthwise
    layer follows and is no reader."""
    problem = jp.problem_from_flax(CNN(), (8, 8, 2))
    params, state = jax.jit(problem.init)(KEY)
    x = np.float32(DRAW.normal(size=(6, 8, 8, 2)))
    given = {'model': problem, 'model_state': state, 'granularity': 'unit'}
    pruned = jp.prune(params, 'pfp', 0.5, data=(x, np.zeros(6, np.int32)), **given)
    kept = np.asarray(pruned.masks['depth/kernel']).any((0, 1, 2))
    assert kept.sum() == 3
    np.testing.assert_array_equal(kept, np.asarray(pruned.masks['first/kernel']).any((0, 1, 2)))
    last = np.asarray(pruned.masks['last/kernel']).reshape(4, 6, 3)
    np.testing.assert_array_equal(last.any((0, 2)), kept)


# --- as a pure function ---------------------------------------------------------------------------


def test_many_seeds_and_densities_at_once():
    """Expectation: vmap over networks and counts keeps what each keeps alone; an option too."""
    net = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(6), nn.relu, nn.Dense(3)])
    problem = jp.problem_from_flax(net, (5,))
    x = np.float32(DRAW.normal(size=(6, 5)))
    params, _ = jax.jit(problem.init)(KEY)
    groups, batch = units_of(problem, jp.view(problem, params), x), batch_of(x)

    def masks(key, count, failure):
        pruner = jp.get_pruner(problem, 'pfp', groups=groups, failure=failure)
        view = jp.view(problem, *problem.init(key))
        _, masks, info = pruner.update(key, pruner.init(key, view), view, {'*': count}, batch)
        return masks, info

    keys, counts = jax.random.split(KEY, 3), np.array([4, 7, 11], np.int32)
    failures = np.float32([1e-16, 0.1, 1e-16])
    together, info = jax.device_get(jax.jit(jax.vmap(masks))(keys, counts, failures))
    alone = jax.jit(masks)
    for i in range(3):
        for path, mask in alone(keys[i], counts[i], failures[i])[0].items():
            np.testing.assert_array_equal(together[path][i], mask)
    np.testing.assert_array_equal(sum(info.kept.values()), counts)


def test_random_channels_are_right_in_the_mean():
    """Expectation: the slice of a channel drawn c times of m is multiplied by c / (m p), c
    binomial: the mean is 1, the variance (1 - p) / (m p); 3000 draws are within 5 standard errors.
    """
    kernel = np.float32(DRAW.normal(size=(2, 2, 4, 3)))
    sensitivity = np.float32([0.9, 0.0, 0.4, 0.1])
    keys = jax.random.split(KEY, 3000)
    sample = jax.jit(jax.vmap(score.pfp_sample, in_axes=(0, None, None, None)))
    kernels, kept = jax.device_get(sample(keys, kernel, sensitivity, jnp.int32(5)))
    p = sensitivity / sensitivity.sum()
    factors = kernels / kernel
    one = np.broadcast_to(factors[:, :1, :1, :, :1], factors.shape)
    np.testing.assert_allclose(factors, one, rtol=1e-4)
    some = p > 0
    error = np.sqrt((1 - p[some]) / (5 * p[some]) / len(keys))
    assert (np.abs(factors.mean(0)[0, 0, some, 0] - 1) <= 5 * error).all()
    np.testing.assert_array_equal(kept, (kernels != 0).all((1, 2, 4)))
    assert not kept[:, 1].any()
    unique = kept.sum(1).mean()
    assert math.ceil(unique) == score.expected_unique(p, 5)
    turned, _ = score.pfp_sample(KEY, kernel.swapaxes(0, 2), sensitivity, 5, axis=0)
    straight, _ = score.pfp_sample(KEY, kernel, sensitivity, 5)
    np.testing.assert_array_equal(turned.swapaxes(0, 2), straight)


def test_what_is_refused():
    """Expectation: one line each."""
    params = {name: {'kernel': np.ones((4, 4), np.float32)} for name in 'abc'}

    def apply(p, x):
        return jax.nn.relu(x @ p['a']['kernel']) @ p['b']['kernel'] @ p['c']['kernel']

    def pruned(x, **given):
        data = (np.array(x, np.float32), np.zeros(len(x), np.int32))
        return jp.prune(params, 'pfp', 0.5, model=apply, data=data, **given)

    problem, view = of_functions(apply, params)
    x = np.ones((2, 4), np.float32)
    with pytest.raises(PruneError, match='sensitivity needs data: pass batches'):
        score.pfp(problem)(KEY, view, None)
    with pytest.raises(PruneError, match='pfp looks at single examples'):
        jp.get_pruner(problem, 'pfp', batch_norm='train')
    with pytest.raises(PruneError, match=r"no kernel reads those of 'a/kernel' .*'2:4'"):
        pruned(x, granularity='2:4')
    with pytest.raises(PruneError, match="option 'failure' of 'pfp': expected more than 0, not 0"):
        pruned(x, failure=0.0)
    with pytest.raises(PruneError, match="scores of 'pfp' were NaN or infinite"):
        pruned(x * np.nan, granularity='unit')
    for granularity in ('unit', 'weight'):
        with pytest.raises(PruneError, match="all scores of 'pfp' are zero"):
            pruned(0 * x, granularity=granularity)
    with pytest.raises(PruneError, match=r'reads 4 channels, their sensitivities .* \(3,\)'):
        score.pfp_sample(KEY, np.ones((4, 2)), np.ones(3), 4)
    with pytest.raises(PruneError, match='epsilon must be above 0'):
        score.sample_complexity(1.0, 0)
    with pytest.raises(PruneError, match='failure must be above 0'):
        log_term(1, 1, -1.0)


def test_budgets_that_are_refused():
    """Expectation: one line each: the published budget is that of a chain of single kernels."""

    def of(apply, **shapes):
        params = {name: {'kernel': np.ones(shape, np.float32)} for name, shape in shapes.items()}
        problem, view = of_functions(apply, params)
        return score.pfp_channels(problem, view, batch_of(np.ones((2, 4), np.float32)))

    def sums(p, x):
        return x @ p['a']['kernel'] + x @ p['b']['kernel']

    with pytest.raises(PruneError, match=r"'b/kernel' reads 4 channels, but 'a/kernel' .* makes 3"):
        score.pfp_allocation(of(sums, a=(4, 3), b=(4, 3)), 10)
    with pytest.raises(PruneError, match="'a/kernel' is used twice"):
        of(lambda p, x: x @ p['a']['kernel'] @ p['a']['kernel'], a=(4, 4))
    with pytest.raises(PruneError, match='budget must be at least 1'):
        score.pfp_allocation(of(lambda p, x: x @ p['a']['kernel'], a=(4, 4)), 0)


# --- WT and FT ------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', NETS)
def test_wt_and_ft(name):
    """Expectation: WT: the largest |w| of all weights. FT: of each layer the same share of filters,
    those of the largest sum of |w|. Two lines of a specification each, see `docs/sweeps.md`."""
    file, meta, forward, params, _ = load(f'torchprune_{name}')
    x = file['x']
    weights = {path: np.abs(np.asarray(w)) for path, w in jp.pick(params).items()}
    wt = jp.prune(params, 'magnitude', 0.4)
    every = np.sort(np.concatenate([w.ravel() for w in weights.values()]))
    threshold = every[-round(0.4 * every.size)]
    for path, mask in wt.masks.items():
        np.testing.assert_array_equal(mask, weights[path] >= threshold)
    given = {'model': lambda p, x: forward(p, {}, x), 'data': x}
    ft = jp.prune(params, 'magnitude', 0.4, granularity='unit', allocation='uniform', **given)
    for layer in meta['layers'][:-1]:
        norms = weights[f'{layer}/kernel'].reshape(-1, weights[f'{layer}/kernel'].shape[-1]).sum(0)
        best = np.argsort(-norms)[: round(0.4 * norms.size)]
        mask = np.asarray(ft.masks[f'{layer}/kernel'])
        assert set(np.flatnonzero(mask.any(tuple(range(mask.ndim - 1))))) == set(best.tolist())


def test_the_specification_of_all_four():
    """Expectation: the page's own TOML, whose labels and choices the program takes."""
    page = (Path(__file__).parents[1] / 'docs' / 'sweeps.md').read_text()
    (block,) = [b for b in re.findall(r'```toml\n(.*?)```', page, re.DOTALL) if 'FT' in b]
    base = {'name': 'four', 'model': {'name': 'mlp'}, 'data': {'name': 'mnist_small'}}
    grid = {**tomllib.loads(block)['grid'], 'compression': [2], 'seed': [0]}
    methods = make_spec({**base, 'grid': grid}).grid.method
    assert [(m.name, m.label, m.granularity, m.allocation) for m in methods] == [
        ('magnitude', 'WT', 'weight', 'global'),
        ('magnitude', 'FT', 'unit', 'uniform'),
        ('sipp', 'SiPP', 'weight', 'global'),
        ('pfp', 'PFP (units)', 'unit', 'global'),
    ]
