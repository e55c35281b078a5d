"""Layer densities, schedules and integer counts, all on the host."""

import functools
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune.errors import PruneError
from jaxprune.quota import QUOTAS, quota, round_counts
from jaxprune.schedule import SCHEDULES, exponential, linear, schedule

HERE = Path(__file__).parent
FOLDERS = (HERE.parents[1] / 'shared' / 'golden', HERE / 'golden')

LENET = {'dense_0/kernel': (784, 300), 'dense_1/kernel': (300, 100), 'dense_2/kernel': (100, 10)}
ARCHITECTURES = ['lenet300100', 'lenet5', 'vgg16', 'vgg19', 'resnet20', 'resnet50']


@functools.cache
def golden() -> dict[str, np.ndarray]:
    for folder in FOLDERS:
        path = folder / 'jaxpruner_schedules_erk.npz'
        if path.exists():
            return dict(np.load(path))
    return pytest.skip('jaxpruner_schedules_erk.npz is absent')


def golden_shapes(architecture: str) -> dict[str, tuple[int, ...]]:
    """Rows of the file are kh, kw, in, out; zeros stand for no spatial sides."""
    file = golden()
    rows = file[f'erk/{architecture}/shapes'].tolist()
    # A number in front keeps the file's order when sorted.
    return {f'{i:02}': tuple(side for side in row if side) for i, row in enumerate(rows)}


def total(shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


# --- quotas -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('density', 'expected'),
    [
        (0.1, (0.079568, 0.230189, 1.0)),
        (0.01, (0.007697, 0.022267, 0.183701)),
        (0.001, (0.00077, 0.002227, 0.01837)),
    ],
)
def test_erk_of_lenet(density, expected):
    """Expectation: a table of reference values, six digits; conv-free, so ER is the same."""
    densities = jp.erdos_renyi(LENET, density)
    np.testing.assert_allclose(list(densities.values()), expected, atol=6e-7)
    assert densities == jp.erdos_renyi(LENET, density, kernel=False)


def test_erk_of_vgg19():
    """Expectation: reference values, four digits, 16 convolutions and 512 -> 100."""
    widths = [64, 64, 128, 128, *[256] * 4, *[512] * 8]
    sides = zip([3, *widths], widths, strict=False)
    shapes = {f'conv_{i:02}': (3, 3, a, b) for i, (a, b) in enumerate(sides)}
    shapes['dense'] = (512, 100)
    assert total(shapes) == 20_070_080
    densities = list(jp.erdos_renyi(shapes, 0.01).values())
    found = [densities[i] for i in (0, 1, 15, 16)]
    np.testing.assert_allclose(found, (0.7566, 0.0651, 0.0078, 0.2141), atol=6e-5)


@pytest.mark.parametrize('kind', ['erk', 'er'])
@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_erk_against_jaxpruner(architecture, kind):
    """Expectation: google-research/jaxpruner (f133ee5), with its saturation of small layers.

    It counts `floor(sparsity * n)` zeros per layer for its budget, where ours is `density * N`
    exactly; so ours is asked for the density of its budget, and then agrees to 1e-12.
    """
    file, shapes, compared = golden(), golden_shapes(architecture), 0
    for name, sparsities in file.items():
        start, end = f'erk/{architecture}/s', f'_{kind}_p1.0'
        if not (name.startswith(start) and name.endswith(end)):
            continue
        sparsity = float(name.removeprefix(start).removesuffix(end))
        zeros = sum(math.floor(sparsity * math.prod(shape)) for shape in shapes.values())
        budget = 1 - zeros / total(shapes)
        assert abs(budget - (1 - sparsity)) < len(shapes) / total(shapes)
        densities = jp.erdos_renyi(shapes, budget, kernel=kind == 'erk')
        np.testing.assert_allclose(1 - np.array(list(densities.values())), sparsities, atol=1e-12)
        compared += 1
    assert compared >= 5


shape_lists = st.lists(
    st.lists(st.integers(1, 40), min_size=2, max_size=4).map(tuple), min_size=1, max_size=8
)


@settings(deadline=None)
@given(shapes=shape_lists, density=st.floats(1e-4, 1), kernel=st.booleans())
def test_erk_spends_its_budget(shapes, density, kernel):
    """Expectation: the definition: densities in (0, 1], total `density * N`, ratio by raw value."""
    shapes = {str(i): shape for i, shape in enumerate(shapes)}
    densities = jp.erdos_renyi(shapes, density, kernel=kernel)
    assert all(0 < d <= 1 for d in densities.values())
    spent = sum(d * math.prod(shapes[path]) for path, d in densities.items())
    assert spent == pytest.approx(density * total(shapes), rel=1e-9)
    sides = {path: shape if kernel else shape[-2:] for path, shape in shapes.items()}
    scales = [d * math.prod(sides[p]) / sum(sides[p]) for p, d in densities.items() if d < 1]
    np.testing.assert_allclose(scales, scales[:1] * len(scales), rtol=1e-9)


def test_layers_of_equal_raw_density_saturate_together():
    """Expectation: by hand: raw 1/2 for both; 501.7 of 10034 stay, 467.7 for the large layer."""
    shapes = {'a': (3, 6), 'b': (4, 4), 'c': (100, 100)}
    densities = jp.erdos_renyi(shapes, 0.05)
    assert densities['a'] == densities['b'] == 1.0
    assert densities['c'] == pytest.approx(467.7 / 10_000)


def test_uniform():
    """Expectation: the definition."""
    assert jp.uniform(LENET, 0.3) == dict.fromkeys(LENET, 0.3)


@pytest.mark.parametrize('name', QUOTAS)
def test_density_one_keeps_all(name):
    """Expectation: every layer dense, under every quota."""
    assert quota(name)(LENET, 1.0) == dict.fromkeys(LENET, 1.0)
    counts = jp.keep_counts(LENET, 1.0, name)
    assert counts == {path: math.prod(shape) for path, shape in LENET.items()}


# --- counts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('size', 'density', 'expected'),
    [
        (25_557_032, 0.02, 511_141),  # float32 gives 511,140
        (134_000_000, 0.1, 13_400_000),  # float32 gives 13,400,003 or so
        (266_200, 0.001, 266),
        (2**31 - 1, 1.0, 2**31 - 1),
        (3, 0.5, 2),  # 1.5 to even
        (5, 0.5, 2),  # 2.5 to even
    ],
)
def test_counts_are_exact(size, density, expected):
    """Expectation: `round(density * size)` with exact integers; two published float32 slips."""
    assert jp.keep_counts({'w': (size,)}, density) == {'*': expected}
    assert jp.keep_counts({'w': (size,)}, density, 'uniform') == {'w': expected}
    plan = jp.at_init({'w': (size,)}, density)
    assert plan.counts['*'].dtype == np.int32
    assert plan.counts['*'].tolist() == [expected]
    assert plan.steps.tolist() == [0]


@given(size=st.integers(1, 2**31 - 1), density=st.floats(1e-6, 1))
def test_counts_are_rounded_products(size, density):
    """Expectation: exact rational arithmetic, off by no more than the double's own rounding."""
    exact = Fraction(density) * size
    if round(density * size) == 0:
        with pytest.raises(PruneError, match='keeps none'):
            jp.keep_counts({'w': (size,)}, density)
        return
    assert abs(jp.keep_counts({'w': (size,)}, density)['*'] - exact) <= Fraction(1, 2) + Fraction(
        size, 2**53
    )


def test_global_counts_are_rounded_once():
    """Expectation: three layers of 5 at 0.5 keep round(7.5) = 8 together, 2 each by themselves."""
    shapes = dict.fromkeys('abc', (5,))
    assert jp.keep_counts(shapes, 0.5) == {'*': 8}
    assert jp.keep_counts(shapes, 0.5, 'uniform') == dict.fromkeys('abc', 2)
    assert round_counts(shapes, dict.fromkeys('abc', 0.3)) == dict.fromkeys('abc', 2)


def test_layer_counts_of_erk():
    """Expectation: the table above times the sizes; a layer may lose everything, not the net."""
    counts = jp.keep_counts(LENET, 0.1, 'erk')
    assert list(counts.values()) == [18_714, 6_906, 1_000]
    sparse = jp.keep_counts({'a': (2, 2), 'b': (1000, 10)}, 0.001, 'uniform')
    assert sparse == {'a': 0, 'b': 10}


# --- schedules and plans ----------------------------------------------------------------------


@pytest.mark.parametrize('name', SCHEDULES)
@given(density=st.floats(1e-5, 1), rounds=st.integers(1, 200))
def test_schedules_fall_to_the_final_density(name, density, rounds):
    """Expectation: never rising, within (0, 1], and the last exactly the density asked for."""
    densities = schedule(name)(density, rounds)
    assert len(densities) == rounds
    assert densities[-1] == density
    assert all(0 < d <= 1 for d in densities)
    steps = np.diff([1.0, *densities])
    assert (steps <= 1e-15).all()


def test_schedules_by_formula():
    """Expectation: `d^(i/n)` (SynFlow, FORCE, iterative SNIP) and `1 - (1-d) i/n`."""
    np.testing.assert_allclose(exponential(0.01, 4), [10**-0.5, 0.1, 10**-1.5, 0.01], rtol=1e-15)
    np.testing.assert_allclose(linear(0.2, 4), [0.8, 0.6, 0.4, 0.2], rtol=1e-15)
    # FORCE writes log k_i = (1 - i/n) log N + (i/n) log k: the same.
    size, n = 1e6, 7
    force = [math.exp((1 - i / n) * math.log(size) + i / n * math.log(0.03 * size)) for i in (1, 4)]
    np.testing.assert_allclose([size * exponential(0.03, n)[i - 1] for i in (1, 4)], force)


def test_plan_of_rounds():
    """Expectation: counts of each round's density, all before the first step."""
    plan = jp.at_init(LENET, 0.01, rounds=100)
    expected = [round(0.01 ** (i / 100) * 266_200) for i in range(1, 101)]
    assert plan.counts['*'].tolist() == expected
    assert plan.counts['*'][-1] == 2662
    assert plan.steps.tolist() == [0] * 100
    layerwise = jp.at_init(LENET, 0.1, allocation='erk', rounds=5, over='linear')
    assert list(layerwise.counts) == list(LENET)
    last = {path: int(counts[-1]) for path, counts in layerwise.counts.items()}
    assert last == jp.keep_counts(LENET, 0.1, 'erk')
    assert all((np.diff(counts) <= 0).all() for counts in layerwise.counts.values())


@pytest.mark.parametrize('allocation', ['global', 'uniform', 'erk'])
@pytest.mark.parametrize('density', [0, 0.0, -0.1, 1.0000001, 90, math.nan, math.inf])
def test_density_out_of_range(density, allocation):
    """Expectation: an error that names the value; 90 (per cent) is a mistake, not a density."""
    for make in (jp.keep_counts, functools.partial(jp.at_init, rounds=3)):
        with pytest.raises(PruneError, match=r'density must be in \(0, 1\]'):
            make(LENET, density, allocation=allocation)


def test_errors_say_how_to_mend():
    """Expectation: messages with the nearest valid name, and what was asked."""
    with pytest.raises(PruneError, match=r'1e-07 keeps none of 266200'):
        jp.keep_counts(LENET, 1e-7)
    with pytest.raises(PruneError, match='keeps none of 266200'):
        jp.at_init(LENET, 1e-7, allocation='uniform', rounds=10)
    with pytest.raises(PruneError, match='rounds must be at least 1, not 0'):
        jp.at_init(LENET, 0.5, rounds=0)
    with pytest.raises(PruneError, match="unknown quota 'unifrom': did you mean 'uniform'"):
        jp.keep_counts(LENET, 0.5, 'unifrom')
    with pytest.raises(PruneError, match="unknown schedule 'expo': did you mean 'exponential'"):
        jp.at_init(LENET, 0.5, over='expo')
    with pytest.raises(PruneError, match=r"unknown schedule 'cubic': .*exponential, linear"):
        jp.at_init(LENET, 0.5, over='cubic')
