"""Scores and masks against numbers from the published code of the papers.

The expectations are outputs of ganguli-lab/Synaptic-Flow (9dfa57a), alecwangcq/GraSP (f17d87a) and
avysogorets/Effective-Sparsity (7924cfe) on small fixed networks, see `golden/README.md` for how to
read the files. Scores agree in float64 to 1e-9 of the largest of a layer, masks exactly; float32
may swap 0.2 % of the kept weights.

Those codes sum over minibatches where we average, and they round counts differently: they remove
`int((1 - density) * N)` weights, we keep `round(density * N)`. Where masks are compared the counts
are theirs; the difference has a test of its own.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import more, more_but
from published import golden

import jaxprune as jp
from jaxprune.method import host_loop
from jaxprune.nn import build as build_model
from jaxprune.schedule import exponential, linear
from jaxprune.types import Scores

TOLERANCE = 1e-9  # of the largest reference value of a layer, float64
SWAPPED = 0.002  # of the kept weights, float32


KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def layers(file: dict, prefix: str) -> dict[str, np.ndarray]:
    """What the file holds under `out/<prefix>/<layer>`, by our paths."""
    prefix = f'out/{prefix}/'
    found = {f'{k[len(prefix) :]}/kernel': v for k, v in file.items() if k.startswith(prefix)}
    assert found, f'nothing under {prefix}'
    return dict(sorted(found.items()))


def nested(file: dict, prefix: str, dtype) -> dict:
    result = {}
    for name, value in file.items():
        first, *inner = name.split('/')
        if first == prefix:
            *inner, last = inner
            place = result
            for part in inner:
                place = place.setdefault(part, {})
            place[last] = jnp.asarray(np.asarray(value, dtype))  # no program for each shape
    return result


class ConvBN(nn.Module):
    """conv 3x3x8 - bn - relu - conv 3x3x16 stride 2 - bn - relu - max pool 2 - dense."""

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        for i, (maps, stride) in enumerate(((8, 1), (16, 2))):
            x = torch_conv(maps, stride, f'conv_{i}')(x)
            x = nn.relu(torch_norm(train, f'bn_{i}')(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10, name='dense_0')(x.reshape(x.shape[0], -1))


class Block(nn.Module):
    """The basic block of Synaptic-Flow's `lottery_resnet`."""

    maps: int
    stride: int

    @nn.compact
    def __call__(self, x, *, train: bool):
        y = torch_conv(self.maps, self.stride, 'conv1')(x)
        y = nn.relu(torch_norm(train, 'bn1')(y))
        y = torch_norm(train, 'bn2')(torch_conv(self.maps, 1, 'conv2')(y))
        if self.stride > 1:
            strides = (self.stride, self.stride)
            x = nn.Conv(
                self.maps, (1, 1), strides, padding=0, use_bias=False, name='shortcut_conv'
            )(x)
            x = torch_norm(train, 'shortcut_bn')(x)
        return nn.relu(y + x)


class ResNet20(nn.Module):
    """Widths 4, 8, 16."""

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        x = nn.relu(torch_norm(train, 'bn')(torch_conv(4, 1, 'conv')(x)))
        for i, maps in enumerate((4, 4, 4, 8, 8, 8, 16, 16, 16)):
            x = Block(maps, 2 if i in (3, 6) else 1, name=f'block_{i}')(x, train=train)
        return nn.Dense(10, name='fc')(x.mean((1, 2)))


def torch_conv(maps: int, stride: int, name: str) -> nn.Conv:
    # Padding of torch: one row on each side, also where a stride would have 'SAME' use one only.
    return nn.Conv(
        maps, (3, 3), (stride, stride), padding=((1, 1), (1, 1)), use_bias=False, name=name
    )


def torch_norm(train: bool, name: str) -> nn.BatchNorm:
    return nn.BatchNorm(
        use_running_average=not train, epsilon=1e-5, use_fast_variance=False, name=name
    )


MODULES = {
    'lenet300100': build_model('lenet300100', 10),
    'convbn': ConvBN(),
    'convbn_initstats': ConvBN(),
    'resnet20_w4': ResNet20(),
}
SMALL = ['lenet300100', 'convbn', 'convbn_initstats']


def slow(*values):
    """Most of ResNet-20: half a minute of compilation; its SynFlow rounds run by default."""
    return pytest.param(*values, marks=pytest.mark.slow)


class Case:
    """A reference network as our problem and view."""

    def __init__(self, name: str, dtype=jnp.float64):
        self.file = golden(f'synflow_{name}')
        self.name = name.removesuffix('_initstats')  # of the network
        self.params = nested(self.file, 'params', dtype)
        stats = nested(self.file, 'batch_stats', dtype)
        self.model_state = {'batch_stats': stats} if stats else {}
        self.x = jnp.asarray(np.asarray(self.file['inputs/x'], dtype))
        self.y = jnp.asarray(self.file['inputs/y'])
        self.problem = jp.problem_from_flax(MODULES[name], self.x.shape[1:])
        self.made = jax.jit(functools.partial(jp.view, self.problem))
        self.view = self.made(self.params, self.model_state)
        self.shapes = jp.shapes(self.view.weights)
        self.total = sum(math.prod(shape) for shape in self.shapes.values())

    def batches(self, count: int = 1) -> jp.Batch:
        """The inputs in order, as `count` batches of equal size."""
        return jp.Batch(*(a.reshape(count, -1, *a.shape[1:]) for a in (self.x, self.y)))

    def masked(self, masks) -> jp.View:
        return self.made(self.params, self.model_state, masks)


@functools.cache
def case(name: str) -> Case:
    return Case(name)


@functools.cache
def single(name: str) -> Case:
    return Case(name, jnp.float32)


#: Names of scores in the files -> (our score, number of batches the inputs are cut into).
SCORES = {
    'mag': (lambda problem: jp.magnitude(), 1),
    'snip': (lambda problem: jp.snip(problem, train=False), 1),
    'snip_2batches': (lambda problem: jp.snip(problem, train=False), 2),
    'snip_trainmode': (lambda problem: jp.snip(problem, train=True), 1),
    'grasp': (lambda problem: jp.grasp(problem, train=False), 1),
    'grasp_2batches': (lambda problem: jp.grasp(problem, train=False), 2),
    'grasp_temp1': (lambda problem: jp.grasp(problem, train=False, temperature=1.0), 1),
    'grasp_trainmode': (lambda problem: jp.grasp(problem, train=True), 1),
    'synflow': (jp.synflow, 1),
}


@functools.cache
def scores(name: str, score: str, precision: str = 'f64') -> Scores:
    c = case(name) if precision == 'f64' else single(name)
    return jax.device_get(scorer(c.name, score)(KEY, c.view, c.batches(SCORES[score][1])))


@functools.cache
def scorer(name: str, score: str):
    # Compiled once for all files of one network.
    return jax.jit(SCORES[score][0](case(name).problem))


@functools.cache
def updater(name: str, method: str):
    """A method by name, one round; the original's modes are asked for by name. Compiled once."""
    batch_norm = 'eval' if method in ('snip', 'grasp') else None
    return jax.jit(jp.get_pruner(case(name).problem, method, batch_norm=batch_norm).update)


global_top_k, layerwise_top_k = jax.jit(jp.global_top_k), jax.jit(jp.layerwise_top_k)


def their_count(density: float, size: int) -> int:
    """How many weights Synaptic-Flow keeps: it removes `int((1 - density) * size)`."""
    return size - int((1.0 - density) * size)


def their_global_counts(c: Case, density: float) -> dict[str, int]:
    return {'*': their_count(density, c.total)}


def assert_close(ours, reference, tolerance: float = TOLERANCE) -> None:
    """`tolerance` is relative to the largest reference value of each layer.

    The slim files hold only every n-th entry of large layers, flat.
    """
    assert set(ours) == set(reference)
    for path, expected in reference.items():
        value = np.asarray(ours[path])
        if value.shape != expected.shape:
            value = value.reshape(-1)[:: math.ceil(value.size / expected.size)]
        assert value.shape == expected.shape, path
        error = np.abs(value - expected).max() / np.abs(expected).max()
        assert error <= tolerance, f'{path}: off by {error:.2g} of the largest value'


def assert_same_masks(ours, reference) -> None:
    assert set(ours) == set(reference)
    for path, mask in reference.items():
        np.testing.assert_array_equal(np.asarray(ours[path]), mask.astype(bool), err_msg=path)


def swapped(ours, reference) -> int:
    """How many weights the reference keeps and we do not."""
    return sum(
        int((mask.astype(bool) & ~np.asarray(ours[p])).sum()) for p, mask in reference.items()
    )


def count_kept(masks) -> int:
    return sum(int(np.asarray(mask).sum()) for mask in masks.values())


# --- forward pass -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('name', 'mode'),
    [
        *((name, 'eval') for name in SMALL),
        *((name, 'train') for name in SMALL[1:]),
        slow('resnet20_w4', 'eval'),
        slow('resnet20_w4', 'train'),
    ],
)
def test_logits_and_loss(name, mode):
    """Expectation: the file's logits and mean cross-entropy; everything below rests on it."""
    c = case(name)
    apply = jax.jit(functools.partial(c.problem.apply, train=mode == 'train', key=None))
    logits, _ = apply(c.params, c.model_state, c.x)
    assert_close({'logits': logits}, {'logits': c.file[f'out/logits_{mode}_f64']})
    loss = c.problem.loss(logits, c.y).mean()
    np.testing.assert_allclose(loss, c.file[f'out/loss_{mode}_f64'], rtol=TOLERANCE)


@pytest.mark.parametrize('name', MODULES)
def test_the_same_leaves_are_prunable(name):
    """Expectation: the original's layer list, all kernels with classifier and shortcuts."""
    order = case(name).file['meta/layer_order']
    assert list(case(name).view.weights) == sorted(f'{layer}/kernel' for layer in order)


# --- scores -----------------------------------------------------------------------------------

LENET_SCORES = ['snip', 'grasp', 'synflow']
CONV_SCORES = [score for score in SCORES if score != 'mag']
RESNET_SCORES = ['snip', 'synflow', 'snip_trainmode', 'grasp_trainmode']


def normalised(ours, score: str, batches: int):
    """As Synaptic-Flow normalises; its minibatch gradients are summed, ours are means."""
    total = sum(leaf.sum() for leaf in ours.values())
    if score.startswith('snip'):
        return {path: leaf / total for path, leaf in ours.items()}  # a factor `batches` cancels
    if score.startswith('grasp'):
        # (sum of H)(sum of g) is batches**2 times (mean H)(mean g); it matters beside the 1e-10.
        factor = batches**2
        norm = abs(factor * total) + 1e-10
        return {path: factor * leaf / norm for path, leaf in ours.items()}
    return ours


@pytest.mark.parametrize(
    ('name', 'score'),
    [
        *(('lenet300100', score) for score in LENET_SCORES),
        *(('convbn', score) for score in CONV_SCORES),
        *more_but([], (('convbn_initstats', score) for score in CONV_SCORES)),
        *(slow('resnet20_w4', score) for score in RESNET_SCORES),
    ],
)
def test_scores(name, score):
    """Expectation: the scores of Synaptic-Flow's pruners, eval mode unless the name says train."""
    ours = normalised(scores(name, score), score, SCORES[score][1])
    assert_close(ours, layers(case(name).file, f'{score}_f64'))


@pytest.mark.parametrize('name', ['convbn', 'convbn_initstats'])
def test_magnitude_scores(name):
    """Expectation: the file's |w|, exact (it is stored in the precision of the weights)."""
    ours, reference = scores(name, 'mag'), layers(case(name).file, 'mag_f32')
    for path, expected in reference.items():
        np.testing.assert_array_equal(ours[path], expected)


def test_two_equal_batches_are_one_when_nothing_couples_examples():
    """Expectation: the files; in eval mode the means over halves are the means over the whole."""
    for score in ('snip', 'grasp'):
        whole = scores('convbn', score)
        assert_close(scores('convbn', f'{score}_2batches'), jax.tree.map(np.asarray, whole))


# --- masks of one round -----------------------------------------------------------------------

ROUND_MASKS = [
    *(('lenet300100', score, k) for score in ('mag', 'snip', 'grasp', 'synflow') for k in (1, 2)),
    *(('convbn', score, k) for score in ('mag', 'snip', 'grasp', 'synflow') for k in (1, 2)),
    *(('convbn_initstats', s, k) for s in ('mag', 'snip', 'grasp', 'synflow') for k in (1, 2)),
    slow('resnet20_w4', 'snip', 1),
    slow('resnet20_w4', 'synflow', 1),
    slow('resnet20_w4', 'synflow', 2),
]


@pytest.mark.parametrize(('name', 'score', 'k'), ROUND_MASKS)
def test_global_masks(name, score, k):
    """Expectation: `mask_<score>_global_c1e<k>`, one round at density 10**-k, all bits."""
    c = case(name)
    pruner = jp.pruner(lambda key, view, batches: scores(name, score), global_top_k)
    counts = their_global_counts(c, 10.0**-k)
    _, masks, info = pruner.update(KEY, (), c.view, counts, None)
    assert_same_masks(masks, layers(c.file, f'mask_{score}_global_c1e{k}'))
    remaining = c.file[f'out/remaining_{score}_global_c1e{k}']
    order = [f'{layer}/kernel' for layer in c.file['meta/layer_order']]
    assert [int(info.kept[path]) for path in order] == remaining.tolist()
    assert sum(remaining) == counts['*']


@pytest.mark.parametrize('score', ['mag', 'synflow'])
@pytest.mark.parametrize('name', ['lenet300100', 'convbn', 'convbn_initstats'])
def test_layerwise_masks(name, score):
    """Expectation: `mask_<score>_local_c1e1`, density 0.1 within each layer, all bits."""
    c = case(name)
    counts = {path: their_count(0.1, math.prod(shape)) for path, shape in c.shapes.items()}
    masks = layerwise_top_k(scores(name, score), counts)
    assert_same_masks(masks, layers(c.file, f'mask_{score}_local_c1e1'))


@pytest.mark.optimised  # programs that iterated SNIP and GraSP use again
@pytest.mark.parametrize('method', ['magnitude', 'snip', 'grasp', 'synflow'])
def test_methods_by_name(method):
    """Expectation: as above, through the registry."""
    c = case('convbn')
    short = {'magnitude': 'mag'}.get(method, method)
    update = updater('convbn', method)
    _, masks, _ = update(KEY, (), c.view, their_global_counts(c, 0.1), c.batches())
    assert_same_masks(masks, layers(c.file, f'mask_{short}_global_c1e1'))


@pytest.mark.parametrize('name', ['lenet300100', 'convbn', slow('resnet20_w4')])
def test_float32_masks(name):
    """Expectation: the float64 masks at 10 %, equal counts, at most 0.2 % of the kept swapped."""
    c = case(name)
    compared = 0
    for score in ('mag', 'snip', 'grasp', 'synflow'):
        if f'out/remaining_{score}_global_c1e1' not in c.file:
            continue
        reference = layers(c.file, f'mask_{score}_global_c1e1')
        counts = their_global_counts(c, 0.1)
        masks = global_top_k(scores(name, score, 'f32'), counts)
        assert count_kept(masks) == count_kept(reference)
        assert swapped(masks, reference) <= SWAPPED * count_kept(reference), score
        compared += 1
    assert compared >= 2


# --- the rounds of SynFlow --------------------------------------------------------------------


@functools.cache
def rounds_of(name: str):
    """`(pruner, scan)`: with a compiled `update`; all rounds in one program. Once per network."""
    pruner = jp.get_pruner(case(name).problem, 'synflow')

    def scan(view, counts, batches):
        return jp.prune_rounds(pruner, KEY, view, counts, batches)[0].masks

    return pruner._replace(update=jax.jit(pruner.update)), jax.jit(scan)


def by_rounds(c: Case, counts):
    """`pruner.update` called once per round from the host."""
    view, infos = jp.prune_rounds(
        rounds_of(c.name)[0], KEY, c.view, counts, c.batches(), loop=host_loop
    )
    np.testing.assert_array_equal(sum(infos.kept.values()), counts['*'])
    assert not infos.nonfinite.any()
    return view.masks


def by_scan(c: Case, counts):
    return rounds_of(c.name)[1](c.view, counts, c.batches())


ROUNDS = {'loop': by_rounds, 'scan': by_scan}


def their_rounds(
    c: Case, density: float, rounds: int, density_schedule: str
) -> dict[str, np.ndarray]:
    densities = (exponential if density_schedule == 'exponential' else linear)(density, rounds)
    return {'*': np.array([their_count(d, c.total) for d in densities], np.int32)}


@pytest.mark.optimised
@pytest.mark.parametrize(
    ('name', 'k', 'rounds', 'over', 'key', 'how'),
    [
        slow('lenet300100', 2, 100, 'exponential', 'synflow_iter100_c1e2_f64', 'loop'),
        more('lenet300100', 2, 100, 'exponential', 'synflow_iter100_c1e2_f64', 'scan'),
        ('lenet300100', 3, 100, 'exponential', 'synflow_iter100_c1e3_f64', 'scan'),
        ('lenet300100', 2, 10, 'linear', 'synflow_linear10_c1e2_f64', 'loop'),
        slow('convbn', 1, 100, 'exponential', 'synflow_iter100_c1e1_f64', 'loop'),
        ('convbn', 1, 100, 'exponential', 'synflow_iter100_c1e1_f64', 'scan'),
        ('convbn', 2, 100, 'exponential', 'synflow_iter100_c1e2_f64', 'scan'),
        ('convbn', 2, 10, 'linear', 'synflow_linear10_c1e2_f64', 'loop'),
        ('convbn_initstats', 2, 100, 'exponential', 'synflow_iter100_c1e2_f64', 'scan'),
        slow('resnet20_w4', 2, 100, 'exponential', 'synflow_iter100_c1e2_f64', 'scan'),
        slow('resnet20_w4', 2, 100, 'exponential', 'synflow_iter100_c1e2_f64', 'loop'),
    ],
)
def test_synflow_rounds(name, k, rounds, over, key, how):
    """Expectation: the masks after all rounds of the original `prune_loop`, all bits."""
    c = case(name)
    counts = their_rounds(c, 10.0**-k, rounds, over)
    masks = ROUNDS[how](c, counts)
    assert_same_masks(masks, layers(c.file, f'mask_{key}'))


@pytest.mark.optimised
@pytest.mark.parametrize('k', [2, 3])
def test_synflow_rounds_without_biases(k):
    """Expectation: the file of the same network with all biases zero; its layer sums are equal."""
    c = Case('lenet300100')
    c.params = {n: {**p, 'bias': jnp.zeros_like(p['bias'])} for n, p in c.params.items()}
    c.view = c.masked(None)
    reference = golden('synflow_lenet300100_zerobias')
    masks = by_scan(c, their_rounds(c, 10.0**-k, 100, 'exponential'))
    assert_same_masks(masks, layers(reference, f'mask_synflow_iter100_c1e{k}_f64'))
    dense = scorer(c.name, 'synflow')(KEY, c.view, c.batches())
    sums = [float(leaf.sum()) for leaf in dense.values()]
    np.testing.assert_allclose(sums, reference['out/synflow_layer_sums_f64'], rtol=TOLERANCE)


@pytest.mark.optimised
@pytest.mark.parametrize(('name', 'k'), [('lenet300100', 2), ('convbn', 1), slow('resnet20_w4', 2)])
def test_synflow_rounds_in_float32(name, k):
    """Expectation: the float64 masks, equal counts, at most 0.2 % of the kept weights swapped."""
    c = single(name)
    masks = by_scan(c, their_rounds(c, 10.0**-k, 100, 'exponential'))
    reference = layers(c.file, f'mask_synflow_iter100_c1e{k}_f64')
    assert count_kept(masks) == count_kept(reference)
    assert swapped(masks, reference) <= SWAPPED * count_kept(reference)


@pytest.mark.parametrize(('rounds', 'over'), [(100, 'exponential'), (10, 'linear')])
@pytest.mark.parametrize('k', [1, 2, 3])
def test_our_plan_differs_from_their_counts_by_rounding_only(k, rounds, over):
    """Expectation: `round(d N)` is `N - int((1 - d) N)` or one less, in every round."""
    c = case('lenet300100')
    ours = jp.plan_rounds(c.shapes, 10.0**-k, rounds=rounds, density_schedule=over).counts['*']
    difference = their_rounds(c, 10.0**-k, rounds, over)['*'] - ours
    assert set(difference.tolist()) <= {0, 1}
    assert c.total == 266_200
    # 266.2 weights: they remove 265933 and keep 267, we keep 266.
    assert ours[-1] == {1: 26_620, 2: 2_662, 3: 266}[k]
    assert difference[-1] == {1: 0, 2: 0, 3: 1}[k]


def synflow_by_hand(c: Case, counts: np.ndarray) -> dict[str, np.ndarray]:
    """SynFlow of a ReLU network of dense layers in NumPy: path sums forward, path sums back."""
    names = sorted(c.params)
    weights = [np.abs(np.asarray(c.params[n]['kernel'])) for n in names]
    biases = [np.abs(np.asarray(c.params[n]['bias'])) for n in names]
    for count in counts:
        flows = [np.ones(weights[0].shape[0])]
        for w, b in zip(weights, biases, strict=True):
            flows.append(flows[-1] @ w + b)
        back, scores = np.ones(weights[-1].shape[1]), []
        for w, flow in zip(weights[::-1], flows[-2::-1], strict=True):
            scores.insert(0, flow[:, None] * w * back)
            back = w @ back
        flat = np.concatenate([s.reshape(-1) for s in scores])
        least = np.partition(flat, flat.size - count)[flat.size - count]
        keep = flat > least
        keep[np.flatnonzero(flat == least)[: count - keep.sum()]] = True  # of ties the first
        pieces = np.split(keep, np.cumsum([w.size for w in weights])[:-1])
        masks = [p.reshape(w.shape) for p, w in zip(pieces, weights, strict=True)]
        weights = [w * m for w, m in zip(weights, masks, strict=True)]
    return {f'{name}/kernel': mask for name, mask in zip(names, masks, strict=True)}


@pytest.mark.optimised
@pytest.mark.parametrize(
    ('rounds', 'over', 'key', 'swaps'),
    [
        (10, 'linear', 'linear10_c1e2_f64', 0),
        more(100, 'exponential', 'iter100_c1e2_f64', 40),
    ],
)
def test_synflow_rounds_of_our_plan(rounds, over, key, swaps):
    """Expectation: a NumPy loop with the counts of `plan_rounds`, all bits; the file to rounding.

    One weight fewer in half of the hundred rounds ends in 40 others of 2662, and the NumPy loop
    agrees with both: with the file when it is given their counts.
    """
    c = case('lenet300100')
    reference = layers(c.file, f'mask_synflow_{key}')
    theirs = their_rounds(c, 0.01, rounds, over)['*']
    assert_same_masks(synflow_by_hand(c, theirs), reference)
    plan = jp.plan_rounds(c.shapes, 0.01, rounds=rounds, density_schedule=over)
    masks = by_rounds(c, plan.counts)
    assert_same_masks(masks, synflow_by_hand(c, plan.counts['*']))
    assert count_kept(masks) == count_kept(reference) == 2662
    assert swapped(masks, reference) == swaps


# --- GraSP of the authors ---------------------------------------------------------------------


@functools.cache
def authors_grasp(name: str, temperature: float):
    """Batch statistics of each half of a batch sorted by class: 0-4 first, then 5-9."""
    c, file = case(name), golden(f'grasp_{name}')
    half = int(file['meta/half'])
    x, y = jnp.asarray(file['inputs/x'], jnp.float64), jnp.asarray(file['inputs/y'])
    batches = jp.Batch(*(jnp.stack([a[:half], a[half:]]) for a in (x, y)))
    return jax.device_get(authors_scorer(name)(temperature, c.view, batches))


@functools.cache
def authors_scorer(name: str):
    def score(temperature, view, batches):
        return jp.grasp(case(name).problem, train=True, temperature=temperature)(KEY, view, batches)

    return jax.jit(score)


@pytest.mark.optimised
@pytest.mark.parametrize('temperature', [200, 1])
@pytest.mark.parametrize('name', ['lenet300100', 'convbn'])
def test_grasp_of_its_authors(name, temperature):
    """Expectation: `-w * Hg` (high = remove) with g and H summed over halves; ours are means."""
    file = golden(f'grasp_{name}')
    ours = {p: -(2**2) * leaf for p, leaf in authors_grasp(name, float(temperature)).items()}
    assert_close(ours, layers(file, f'score_unnorm_T{temperature}_f64'))
    norm = abs(sum(float(leaf.sum()) for leaf in ours.values())) + 1e-10
    # Of a sum of many signed terms, hence a tolerance relative to the terms.
    scale = sum(float(abs(leaf).sum()) for leaf in ours.values())
    reference = float(file[f'out/norm_factor_T{temperature}_f64'])
    assert abs(norm - reference) <= TOLERANCE * scale


@pytest.mark.parametrize('ratio', [0.9, 0.99])
@pytest.mark.parametrize('temperature', [200, 1])
@pytest.mark.parametrize('name', ['lenet300100', 'convbn'])
def test_grasp_masks_of_its_authors(name, temperature, ratio):
    """Expectation: the file's masks, all bits; the code keeps one weight more than asked."""
    file, c = golden(f'grasp_{name}'), case(name)
    remaining = file[f'out/remaining_T{temperature}_ratio{ratio}_f64']
    assert remaining.sum() == c.total - int(c.total * (1 - (1 - ratio))) + 1
    masks = global_top_k(authors_grasp(name, float(temperature)), {'*': int(remaining.sum())})
    assert_same_masks(masks, layers(file, f'keepmask_T{temperature}_ratio{ratio}_f64'))


# --- iterated SNIP ----------------------------------------------------------------------------


@pytest.mark.optimised
def test_iterated_snip_of_synaptic_flow_is_force():
    """Expectation: `mask_snip_iter10_c1e1` all bits, and how many weights each round revived.

    Their SNIP is a derivative with respect to the mask, which is not zero where the mask is.
    """
    c, file = case('convbn'), golden('synflow_convbn_iter_snip_grasp')
    force = jax.jit(jp.score.force(c.problem, train=False))
    dense = c.view.weights
    counts = their_rounds(c, 0.1, 10, 'exponential')['*']
    masks, revived = c.view.masks, []
    for count, remaining in zip(counts, file['out/remaining_snip_after_round'], strict=True):
        scores = force(KEY, c.masked(masks)._replace(initial=dense), c.batches())
        new = global_top_k(scores, {'*': count})
        assert count_kept(new) == count == remaining
        revived.append(count_kept({path: new[path] & ~masks[path] for path in new}))
        masks = new
    assert revived == file['out/revived_snip_per_round'].tolist()
    assert_same_masks(masks, layers(file, 'mask_snip_iter10_c1e1_f64'))
    order = [f'{layer}/kernel' for layer in c.file['meta/layer_order']]
    remaining = file['out/remaining_snip_iter10_c1e1_f64'].tolist()
    assert [int(masks[path].sum()) for path in order] == remaining


@pytest.mark.optimised
def test_iterated_snip_differs_because_ours_never_revives():
    """Expectation: the original loop revives pruned weights; a monotone pruner cannot.

    Its first round revives none, and there the counts agree.
    """
    c, file = case('convbn'), golden('synflow_convbn_iter_snip_grasp')
    assert file['out/revived_snip_per_round'].sum() > 0
    counts = their_rounds(c, 0.1, 10, 'exponential')['*']
    assert counts.tolist() == file['out/remaining_snip_after_round'].tolist()
    masks = jax.device_get(c.view.masks)
    for count in counts.tolist():
        before, view = masks, c.masked(masks)
        masks = jax.device_get(
            updater('convbn', 'snip')(KEY, (), view, {'*': count}, c.batches())[1]
        )
        assert count_kept(masks) == count
        assert all((before[path] | ~masks[path]).all() for path in masks)


@pytest.mark.optimised
def test_iterated_grasp():
    """Expectation: `mask_grasp_iter10_c1e1`, all bits. Their derivative goes through the mask, so
    pruned weights have no part in the gradient that Hg is taken along. A threshold of zero prunes
    more than asked for in rounds 2 and 3, so the counts are the file's."""
    c, file = case('convbn'), golden('synflow_convbn_iter_snip_grasp')
    masks, update = c.view.masks, updater('convbn', 'grasp')
    for count in file['out/remaining_grasp_after_round']:
        _, masks, _ = update(KEY, (), c.masked(masks), {'*': int(count)}, c.batches())
    assert_same_masks(masks, layers(file, 'mask_grasp_iter10_c1e1_f64'))


# --- LAMP -------------------------------------------------------------------------------------


@functools.cache
def lamp_scores():
    file = golden('effsp_magnitude_masks')
    weights = {
        f'{name.split("/")[-1]}/kernel': jnp.asarray(w)
        for name, w in file.items()
        if name.startswith('in/weight/')
    }
    view = jp.View(dict(sorted(weights.items())), None, None, None)
    return file, view.weights, jax.device_get(jax.jit(jp.score.lamp())(KEY, view, None))


def test_lamp_scores():
    """Expectation: `lamp_score`, which has 1e-8 added to the sum `w^2 / score` it divides by."""
    file, weights, ours = lamp_scores()
    squares = {path: np.asarray(w) ** 2 for path, w in weights.items()}
    theirs = {path: squares[path] / (squares[path] / ours[path] + 1e-8) for path in ours}
    reference = layers(file, 'lamp_score')
    assert_close(theirs, reference)
    # And without it: to 1e-8 over the smallest sum of squares of a layer.
    assert_close(ours, reference, 1e-6)


@pytest.mark.parametrize('sparsity', [0.5, 0.7, 0.8, 0.9, 0.95, 0.98])
def test_lamp_masks(sparsity):
    """Expectation: `lamp_mask`, all bits: `int(s N)` weights removed, the 1e-8 changes no rank."""
    file, weights, ours = lamp_scores()
    total = sum(w.size for w in weights.values())
    masks = global_top_k(ours, {'*': total - int(sparsity * total)})
    assert_same_masks(masks, layers(file, f'lamp_mask/s{sparsity}'))
