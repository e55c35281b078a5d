"""Layer densities, schedules and integer counts, all on the host."""

import functools
import itertools
import math
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from published import golden, numbered_shapes

import jaxprune as jp
from jaxprune.allocation import (
    ALLOCATIONS,
    LAYERWISE,
    SHARED,
    bounded_counts,
    bounds,
    erdos_renyi,
    igq,
    layerwise,
    round_counts,
    smart_ratio,
    uniform,
    uniform_down,
    uniform_plus,
)
from jaxprune.errors import PruneError
from jaxprune.schedule import RISING, SCHEDULES, exponential, linear, schedule

LENET = {'dense_0/kernel': (784, 300), 'dense_1/kernel': (300, 100), 'dense_2/kernel': (100, 10)}
#: 10, 40 and 50 weights.
CONVNET = {'a': (1, 1, 2, 5), 'b': (2, 2, 2, 5), 'c': (5, 10)}
ARCHITECTURES = ['lenet300100', 'lenet5', 'vgg16', 'vgg19', 'resnet20', 'resnet50']


def of_jaxpruner() -> dict[str, np.ndarray]:
    return golden('jaxpruner_schedules_erk')


def golden_shapes(architecture: str) -> dict[str, tuple[int, ...]]:
    return numbered_shapes(of_jaxpruner()[f'erk/{architecture}/shapes'])


def total(shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


# --- allocations -----------------------------------------------------------------------------


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
    densities = erdos_renyi(LENET, density)
    np.testing.assert_allclose(list(densities.values()), expected, atol=6e-7)
    assert densities == erdos_renyi(LENET, density, kernel=False)


def vgg19() -> dict[str, tuple[int, ...]]:
    """16 convolutions and 512 -> 100."""
    widths = [64, 64, 128, 128, *[256] * 4, *[512] * 8]
    sides = zip([3, *widths], widths, strict=False)
    shapes = {f'conv_{i:02}': (3, 3, a, b) for i, (a, b) in enumerate(sides)}
    return shapes | {'dense': (512, 100)}


@pytest.mark.parametrize(
    ('rule', 'expected'),
    [('erk', (0.7566, 0.0651, 0.0078, 0.2141)), ('igq', (0.8839, 0.2630, 0.0055, 0.2044))],
)
def test_allocations_of_vgg19(rule, expected):
    """Expectation: reference values, four digits: the first two, the widest, the last layer."""
    assert total(vgg19()) == 20_070_080
    densities = list(layerwise(rule)(vgg19(), 0.01).values())
    assert tuple(round(densities[i], 4) for i in (0, 1, 15, 16)) == expected


@pytest.mark.parametrize(
    ('density', 'force', 'expected'),
    [
        (0.1, '6.17209e-05', (0.064447, 0.350677, 0.941867)),
        (0.01, '9.15981e-04', (0.004620, 0.035113, 0.521926)),
        (0.001, '1.09423e-02', (0.000388, 0.003037, 0.083736)),
    ],
)
def test_igq_of_lenet(density, force, expected):
    """Expectation: a table of reference values, six digits; F from any layer is the same."""
    densities = igq(LENET, density)
    assert tuple(round(d, 6) for d in densities.values()) == expected
    for path, shape in LENET.items():
        assert f'{(1 / densities[path] - 1) / math.prod(shape):.5e}' == force


def test_igq_at_its_ends():
    """Expectation: the formula: far down all layers keep equally many, 1/F; at 1 all."""
    kept = [d * n for d, n in zip(igq(LENET, 3e-6).values(), (235_200, 30_000, 1000), strict=True)]
    np.testing.assert_allclose(kept, 266_200 * 1e-6, rtol=1e-3)
    assert igq(LENET, 5e-324) == dict.fromkeys(LENET, 0.0)
    assert igq(LENET, 1 - 2**-53) != dict.fromkeys(LENET, 0.0)
    np.testing.assert_allclose(list(igq(LENET, 1 - 2**-53).values()), 1, rtol=1e-15)


@pytest.mark.parametrize(
    ('density', 'expected'),
    [
        (0.8, [1, 70 / 90, 70 / 90]),
        (0.5, [1, 40 / 90, 40 / 90]),
        (0.29, [1, 19 / 90, 19 / 90]),
        (0.25, [1, (15 - 10) / 40, 0.2]),
        (0.2, [1, 0, 0.2]),
    ],
)
def test_uniform_plus(density, expected):
    """Expectation: by hand: 10 stay of the first layer, at least 10 of the last 50."""
    np.testing.assert_allclose(list(uniform_plus(CONVNET, density).values()), expected, atol=1e-15)


def test_uniform_plus_depends_on_the_order_of_layers():
    """Expectation: by hand: a dense first layer is none of the exceptions, `a` is now the last."""
    densities = uniform_plus(dict(reversed(CONVNET.items())), 0.1)
    assert list(densities) == ['a', 'b', 'c']
    np.testing.assert_allclose(list(densities.values()), [0.2, 8 / 90, 8 / 90])


@pytest.mark.parametrize(
    ('shapes', 'least', 'first_too'),
    [
        (CONVNET, '0.2', True),
        ({'a': (3, 3, 1, 7), 'b': (7, 100)}, '0.267', True),  # 203 of 763: 0.26606
        ({'a': (3, 3, 1, 7)}, '1', True),
        ({'a': (9, 7)}, '0.2', False),
        ({'a': (9, 7), 'b': (3, 7)}, '0.05', False),
        ({'a': (3, 3, 7), 'b': (3, 7)}, '0.05', False),  # an attention head, no convolution
    ],
)
def test_least_density_of_uniform_plus(shapes, least, first_too):
    """Expectation: by hand: the first convolution and a fifth of the last layer over all."""
    with pytest.raises(PruneError, match=f'must be at least {least}, not 0.01') as refusal:
        uniform_plus(shapes, 0.01)
    assert ('all of the first convolution' in str(refusal.value)) == first_too
    spent = sum(d * math.prod(shapes[p]) for p, d in uniform_plus(shapes, float(least)).items())
    assert spent == pytest.approx(float(least) * total(shapes))
    with pytest.raises(PruneError, match='must be at least'):
        uniform_plus(shapes, float(least) - 0.001)


def test_the_least_density_leaves_no_less_than_nothing():
    """Expectation: by hand: 17 + 6.4 of 57 weights; in doubles the 8 in the middle get -2e-15."""
    shapes = {'a': (1, 1, 1, 17), 'b': (8,), 'c': (32,)}
    assert uniform_plus(shapes, (17 + 0.2 * 32) / 57) == {'a': 1.0, 'b': 0.0, 'c': 0.2}
    assert uniform_plus({'a': (1, 1, 1, 1), 'b': (2,)}, (1 + 0.2 * 2) / 3) == {'a': 1.0, 'b': 0.2}


def test_erk_with_the_excess_pushed_back():
    """Expectation: by hand: 102 of 204 by 20 : 20 : 4 is 46.4, 46.4 and 9.3, of which 4 fit."""
    shapes = {'a': (10, 10), 'b': (10, 10), 'c': (2, 2)}
    fitting = 102 * 20 / 44
    found = list(erdos_renyi(shapes, 0.5, excess='previous').values())
    np.testing.assert_allclose(found, [fitting / 100, (98 - fitting) / 100, 1])
    np.testing.assert_allclose(list(erdos_renyi(shapes, 0.5).values()), [0.49, 0.49, 1])
    with pytest.raises(PruneError, match="the first layer 'c' would have to keep 9 of 4 weights"):
        erdos_renyi(dict(reversed(shapes.items())), 0.5, excess='previous')
    with pytest.raises(PruneError, match="unknown excess 'previos': did you mean 'previous'"):
        erdos_renyi(shapes, 0.5, excess='previos')


@pytest.mark.parametrize(
    ('shapes', 'density', 'vgg', 'expected'),
    [
        # 12 and 6 per weight of 10 and 40, 15 of 30 for them: 12 * 15 / 360.
        (CONVNET, 0.3, False, [0.5, 0.25, 0.3]),
        # 12 / 1 and 6 / 4 per weight: 12 * 15 / 180.
        (CONVNET, 0.3, True, [1.0, 0.125, 0.3]),
        # 36 for them: 12 of 10 and 24 of 40; two are poured on.
        (CONVNET, 0.51, False, [1.0, 0.65, 0.3]),
        # The dense layer in the middle counts as a layer: 12 and 2 per weight, scale 15 / 200.
        ({'a': (1, 1, 2, 5), 'c': (5, 10), 'b': (2, 2, 2, 5)}, 0.3, False, [0.9, 0.15, 0.3]),
        # 20, 12, 6 per weight, scale 1 / 10: 20 of 10, 24 + 10 of 20, 60 + 14 of 100.
        (
            {'a': (1, 1, 2, 5), 'b': (2, 2, 1, 5), 'c': (5, 5, 2, 2), 'd': (2, 5)},
            107 / 140,
            False,
            [1.0, 1.0, 0.74, 0.3],
        ),
        # More than 50 + 15: the dense layer takes what is left.
        (CONVNET, 0.8, False, [1.0, 1.0, 0.6]),
        (CONVNET, 0.65, True, [1.0, 1.0, 0.3]),
        (CONVNET, 1.0, True, [1.0, 1.0, 1.0]),
        ({'a': (1, 1, 2, 5)}, 0.3, False, [0.3]),
        ({'a': (1, 1, 2, 5)}, 1.0, False, [1.0]),
    ],
)
def test_smart_ratio(shapes, density, vgg, expected):
    """Expectation: by hand, in the comments; dense layers 0.3."""
    found = layerwise('smart_ratio_vgg' if vgg else 'smart_ratio')(shapes, density)
    assert found == smart_ratio(shapes, density, vgg=vgg)
    assert list(found) == sorted(shapes)
    np.testing.assert_allclose(list(found.values()), expected, rtol=1e-12)


def test_networks_that_have_no_smart_ratio():
    """Expectation: 30 % of 50 of 100 weights is the whole budget at 0.15; LeNet is all dense."""
    with pytest.raises(PruneError, match=r'30 % of every dense .* above 0.15, not 0.15$'):
        smart_ratio(CONVNET, 0.15)
    assert smart_ratio(CONVNET, 0.1501)['a'] > 0
    for shapes, density in ((LENET, 0.1), (LENET, 1.0), ({'a': (3, 3, 7), 'b': (7, 3)}, 0.5)):
        with pytest.raises(PruneError, match='is for networks with convolutions'):
            smart_ratio(shapes, density)


@pytest.mark.parametrize('kind', ['erk', 'er'])
@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_erk_against_jaxpruner(architecture, kind):
    """Expectation: google-research/jaxpruner (f133ee5), with its saturation of small layers.

    It counts `floor(sparsity * n)` zeros per layer for its budget, where ours is `density * N`
    exactly; so ours is asked for the density of its budget, and then agrees to 1e-12.
    """
    file, shapes, compared = of_jaxpruner(), golden_shapes(architecture), 0
    for name, sparsities in file.items():
        start, end = f'erk/{architecture}/s', f'_{kind}_p1.0'
        if not (name.startswith(start) and name.endswith(end)):
            continue
        sparsity = float(name.removeprefix(start).removesuffix(end))
        zeros = sum(math.floor(sparsity * math.prod(shape)) for shape in shapes.values())
        budget = 1 - zeros / total(shapes)
        assert abs(budget - (1 - sparsity)) < len(shapes) / total(shapes)
        densities = erdos_renyi(shapes, budget, kernel=kind == 'erk')
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
    densities = erdos_renyi(shapes, density, kernel=kernel)
    assert all(0 < d <= 1 for d in densities.values())
    spent = sum(d * math.prod(shapes[path]) for path, d in densities.items())
    assert spent == pytest.approx(density * total(shapes), rel=1e-9)
    sides = {path: shape if kernel else shape[-2:] for path, shape in shapes.items()}
    scales = [d * math.prod(sides[p]) / sum(sides[p]) for p, d in densities.items() if d < 1]
    np.testing.assert_allclose(scales, scales[:1] * len(scales), rtol=1e-9)


def test_layers_of_equal_raw_density_saturate_together():
    """Expectation: by hand: raw 1/2 for both; 501.7 of 10034 stay, 467.7 for the large layer."""
    shapes = {'a': (3, 6), 'b': (4, 4), 'c': (100, 100)}
    densities = erdos_renyi(shapes, 0.05)
    assert densities['a'] == densities['b'] == 1.0
    assert densities['c'] == pytest.approx(467.7 / 10_000)


def test_uniform():
    """Expectation: the definition."""
    assert uniform(LENET, 0.3) == dict.fromkeys(LENET, 0.3)


@pytest.mark.parametrize('name', LAYERWISE)
def test_density_one_keeps_all(name):
    """Expectation: every layer dense, under every allocation."""
    for shapes in (vgg19(), CONVNET, *([] if name.startswith('smart') else [LENET])):
        assert layerwise(name)(shapes, 1.0) == dict.fromkeys(shapes, 1.0)
        counts = jp.keep_counts(shapes, 1.0, name)
        assert counts == {path: math.prod(shape) for path, shape in shapes.items()}


RULES = LAYERWISE | {
    'er': functools.partial(erdos_renyi, kernel=False),
    'erk_previous': functools.partial(erdos_renyi, excess='previous'),
}
#: Of no axis to five, some without a weight.
odd_shapes = st.lists(
    st.one_of(
        st.lists(st.integers(1, 9), max_size=5),
        st.lists(st.integers(1, 9), min_size=4, max_size=4),
        st.lists(st.integers(0, 2), min_size=1, max_size=4),
    ).map(tuple),
    min_size=1,
    max_size=6,
).map(lambda shapes: {f'{(7 * i) % 10}': shape for i, shape in enumerate(shapes)})


@pytest.mark.parametrize('name', RULES)
@settings(max_examples=150, deadline=None, database=None)
@given(shapes=odd_shapes, density=st.floats(1e-3, 1), more=st.floats(0, 1))
def test_every_allocation(name, shapes, density, more):
    """Expectation: the definition: densities in [0, 1] that meet the budget, none falls as the
    budget grows; what is refused is refused for a reason that can be checked."""
    rule, count = RULES[name], total(shapes)
    assume(count)
    larger = min(1.0, density + more * (1 - density))
    try:
        found = rule(shapes, density)
    except PruneError as refusal:
        event('refused')
        if 'is for networks' in str(refusal):
            assert not any(len(shape) >= 4 and math.prod(shape) for shape in shapes.values())
        elif name == 'erk_previous':
            first = next(path for path, shape in shapes.items() if math.prod(shape))
            assert f"the first layer '{first}'" in str(refusal)
        else:
            least = float(re.search(r'(?:least|above) ([\de.-]+), not', str(refusal))[1])
            assert density <= least <= 1
            rule(shapes, min(1.0, least * (1 + 1e-9)))
        return
    assert list(found) == sorted(shapes)
    assert all(0 <= d <= 1 for d in found.values())
    spent = {path: d * math.prod(shapes[path]) for path, d in found.items()}
    if name == 'uniform_down':  # the budget layer by layer, in whole weights
        for path, kept in spent.items():
            size = math.prod(shapes[path])
            short = density * size - round(kept)
            assert kept == pytest.approx(round(kept), abs=1e-9)
            assert not size or -1e-9 <= short < 1 or (round(kept) == 1 and short < 0)
    else:
        assert sum(spent.values()) == pytest.approx(density * count, rel=1e-9)
    kept = round_counts(shapes, found)
    assert all(0 <= kept[path] <= math.prod(shape) for path, shape in shapes.items())
    try:
        above = rule(shapes, larger)
    except PruneError:
        assert name == 'erk_previous'
    else:
        assert all(above[path] >= d - 1e-12 for path, d in found.items())


@pytest.mark.parametrize('name', [*RULES, *SHARED])
@pytest.mark.parametrize('shapes', [{}, {'w': (0, 3)}, {'v': (0,), 'w': (3, 3, 0, 1)}])
def test_nothing_to_prune(name, shapes):
    """Expectation: an error, whatever the rule."""
    if name in RULES:
        with pytest.raises(PruneError, match='no prunable weights'):
            RULES[name](shapes, 0.5)
    if name in ALLOCATIONS:
        for make in (jp.keep_counts, jp.plan_rounds):
            with pytest.raises(PruneError, match='no prunable weights'):
                make(shapes, 0.5, allocation=name)
    with pytest.raises(PruneError, match='no prunable weights'):
        bounds(shapes)


def test_layers_without_weights_are_dense_and_change_nothing():
    """Expectation: the same densities of the others, wherever the empty layers stand."""
    shapes = {'z': (0, 3), 'a': (3, 3, 2, 4), 'y': (3, 3, 0, 2), 'b': (3, 3, 4, 4), 'c': (4, 9)}
    shapes |= {'x': (0,)}
    full = {path: shapes[path] for path in 'abc'}
    for name in RULES.keys() - {'uniform'}:
        assert RULES[name](shapes, 0.5) == RULES[name](full, 0.5) | dict.fromkeys('xyz', 1.0)
    assert jp.keep_counts(shapes, 0.5, 'erk')['y'] == 0


def test_registry():
    """Expectation: the names a specification may hold."""
    assert set(ALLOCATIONS) == {'global', 'lamp', *LAYERWISE}
    smart = {'smart_ratio', 'smart_ratio_vgg'}
    assert set(LAYERWISE) == {'uniform', 'uniform_down', 'uniform_plus', 'erk', 'igq'} | smart
    assert set(SHARED) == set(ALLOCATIONS) - set(LAYERWISE)
    assert layerwise('erk') is erdos_renyi


@pytest.mark.parametrize('percent', [1, 7, 10, 29, 30, 50, 55, 70, 99, 100])
def test_uniform_rounded_down(percent):
    """Expectation: exact fractions: of n, `ceil((1 - d) n)` are removed, but never all."""
    shapes = {f'{n}': (n,) for n in range(1, 200)}
    kept = {
        path: max(n - math.ceil((1 - Fraction(percent, 100)) * n), 1)
        for path, (n,) in shapes.items()
    }
    assert round_counts(shapes, uniform_down(shapes, percent / 100)) == kept
    assert jp.keep_counts(shapes, percent / 100, 'uniform_down') == kept
    rounds = jp.plan_rounds(shapes, percent / 100, allocation='uniform_down', rounds=3).counts
    assert {path: int(column[-1]) for path, column in rounds.items()} == kept
    assert all((np.diff(column) <= 0).all() for column in rounds.values())


def test_uniform_rounded_down_leaves_empty_layers_alone():
    """Expectation: by hand: 3 of 10, none of none."""
    counts = jp.keep_counts({'a': (10,), 'b': (0, 4)}, 0.39, 'uniform_down')
    assert counts == {'a': 3, 'b': 0}


# --- counts -----------------------------------------------------------------------------------


def test_a_compression_in_place_of_a_density():
    """Expectation: that of the density 1 / compression; exactly one of them."""
    for allocation in ('global', 'uniform', 'erk', 'igq'):
        by_density = jp.keep_counts(LENET, 1 / 20, allocation)
        assert jp.keep_counts(LENET, allocation=allocation, compression=20) == by_density
        plan = jp.plan_rounds(LENET, compression=20, allocation=allocation, rounds=3)
        wanted = jp.plan_rounds(LENET, 1 / 20, allocation=allocation, rounds=3)
        np.testing.assert_equal(plan.counts, wanted.counts)
    assert jp.keep_counts(LENET, compression=1) == {'*': total(LENET)}
    for make in (jp.keep_counts, jp.plan_rounds):
        for both in ({}, {'density': 0.1, 'compression': 10}):
            with pytest.raises(PruneError, match='give either density= or compression='):
                make(LENET, **both)
        for wrong in (0.5, 0, -3, math.nan):
            with pytest.raises(PruneError, match='compression must be at least 1, not'):
                make(LENET, compression=wrong)
        with pytest.raises(PruneError, match="compression must be a number, not '10'"):
            make(LENET, compression='10')


def test_steps_of_rounds():
    """Expectation: as given, or all before training."""
    assert jp.plan_rounds(LENET, 0.1, rounds=3).steps.tolist() == [0, 0, 0]
    plan = jp.plan_rounds(LENET, 0.1, rounds=3, steps=[0, 5, np.int64(5)])
    assert plan.steps.tolist() == [0, 5, 5] and plan.steps.dtype == np.int32


@pytest.mark.parametrize(
    ('steps', 'message'),
    [
        ([0, 5], 'steps must hold one step for each of 3 rounds, not 2'),
        ([0, 5, 6, 7], 'steps must hold one step for each of 3 rounds, not 4'),
        ([0, 5, 4], r'steps must not fall and lie below 2\*\*31, not \[0, 5, 4\]'),
        ([-1, 5, 6], 'steps must not fall'),
        ([0, 5, 2**31], r'below 2\*\*31'),
        ([0, 5, 6.5], 'steps must be a whole number, not 6.5'),
        ([0, True, 6], 'steps must be a whole number, not True'),
    ],
    ids=str,
)
def test_steps_that_cannot_be(steps, message):
    """Expectation: one line."""
    with pytest.raises(PruneError, match=message) as refusal:
        jp.plan_rounds(LENET, 0.1, rounds=3, steps=steps)
    assert '\n' not in str(refusal.value)


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
    plan = jp.plan_rounds({'w': (size,)}, density)
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


def test_lamp_is_counted_as_one_number():
    """Expectation: the count of 'global', bounds and all; the event shares it out."""
    assert jp.keep_counts(LENET, 0.1, 'lamp') == jp.keep_counts(LENET, 0.1) == {'*': 26_620}
    for bound in ({'floor': 100}, {'cap': 0.2}):
        assert jp.keep_counts(LENET, 0.1, 'lamp', **bound) == {'*': 26_620}
    plan = jp.plan_rounds(LENET, 0.1, allocation='lamp', rounds=3)
    assert {path: c.tolist() for path, c in plan.counts.items()} == {
        path: c.tolist() for path, c in jp.plan_rounds(LENET, 0.1, rounds=3).counts.items()
    }


# --- floors and caps --------------------------------------------------------------------------


def test_bounds():
    """Expectation: by hand; 0.29 of 100 is 29 though the doubles' product is less."""
    shapes = {'b': (10, 10), 'a': (3,), 'c': (2, 0)}
    assert bounds(shapes) == ({'a': 0, 'b': 0, 'c': 0}, {'a': 3, 'b': 100, 'c': 0})
    assert list(bounds(shapes)[0]) == list(bounds(shapes)[1]) == ['a', 'b', 'c']
    assert 0.29 * 100 < 29
    assert bounds(shapes, {'b': 2}, 0.29) == ({'a': 0, 'b': 2, 'c': 0}, {'a': 0, 'b': 29, 'c': 0})
    assert bounds(shapes, {'a': np.int64(2)}, {'a': 0.9, 'b': 1})[1] == {'a': 2, 'b': 100, 'c': 0}
    assert bounds({'a': (2**31 - 1,)}, 5, 1.0) == ({'a': 5}, {'a': 2**31 - 1})


@given(size=st.integers(1, 2**31 - 1), count=st.integers(1, 2**31 - 1))
def test_a_cap_written_as_a_quotient_is_exact(size, count):
    """Expectation: a cap of count / size allows `count` weights, a little less one fewer."""
    count = min(count, size)
    assert bounds({'w': (size,)}, 0, count / size)[1] == {'w': count}
    assert bounds({'w': (size,)}, 0, count / size * (1 - 2**-48))[1] == {'w': count - 1}


@pytest.mark.parametrize(
    ('bound', 'message'),
    [
        ({'floor': -1}, 'floor must be a whole number of weights, not -1'),
        ({'floor': {'dense_0/kernel': 1.5}}, 'floor must be a whole number, not 1.5'),
        ({'floor': math.nan}, 'floor must be a whole number, not nan'),
        ({'cap': 0.0}, r'cap must be a density in \(0, 1\], not 0.0'),
        ({'cap': 1.1}, r'cap must be a density in \(0, 1\], not 1.1'),
        ({'cap': {'dense_0/kernel': math.nan}}, r'cap must be a density in \(0, 1\], not nan'),
        ({'floor': {'dense_3/kernel': 1}}, "floor of an unknown layer 'dense_3/kernel': did you"),
        ({'cap': {'dense_3/kernel': 0.5}}, "cap of an unknown layer 'dense_3/kernel': did you"),
        ({'floor': 1001}, "layer 'dense_2/kernel' has 1000 weights, its floor is 1001"),
        (
            {'floor': 60, 'cap': {'dense_2/kernel': 0.05}},
            "'dense_2/kernel' has a floor of 60 weights, but its cap of 0.05 allows 50",
        ),
        (
            {'floor': {'dense_0/kernel': 26_000, 'dense_1/kernel': 621}},
            'density 0.1 keeps 26620 of 266200 .* the floors together are 26621',
        ),
        ({'cap': 0.0999}, 'density 0.1 keeps 26620 of 266200 .* the caps together allow 26592'),
    ],
    ids=str,
)
@pytest.mark.parametrize('allocation', ['global', 'uniform', 'igq', 'lamp'])
def test_bounds_that_cannot_be(bound, message, allocation):
    """Expectation: one line with the numbers; caps by hand: 23496 + 2997 + 99 = 26592."""
    for make in (jp.keep_counts, functools.partial(jp.plan_rounds, rounds=4)):
        with pytest.raises(PruneError, match=message) as refusal:
            make(LENET, 0.1, allocation=allocation, **bound)
        assert '\n' not in str(refusal.value)


def test_floors_where_nothing_would_stay():
    """Expectation: 0.02 of a weight rounds to none; the message is about the floors, if any."""
    with pytest.raises(PruneError, match=r'keeps none of 266200 prunable weights$'):
        jp.keep_counts(LENET, 1e-7)
    with pytest.raises(PruneError, match=r'keeps none of 266200 .* the floors together are 3$'):
        jp.keep_counts(LENET, 1e-7, floor=1)


def test_floors_and_caps_of_lenet():
    """Expectation: by hand: 266 weights, 50 of them in the last layer, the others 235200 : 30000;
    half of the last layer of ERK, the other half to the other two, 1084 : 400."""
    assert list(jp.keep_counts(LENET, 0.001, 'uniform').values()) == [235, 30, 1]
    floored = jp.keep_counts(LENET, 0.001, 'uniform', floor={'dense_2/kernel': 50})
    assert list(floored.values()) == [192, 24, 50]  # 191.57, 24.43
    capped = jp.keep_counts(LENET, 0.1, 'erk', cap={'dense_2/kernel': 0.5})
    assert list(capped.values()) == [19_080, 7_040, 500]  # 19079.57, 7040.43 of 26120
    same = {'floor': {'dense_2/kernel': 500}, 'cap': {'dense_0/kernel': 0.08}}
    assert jp.keep_counts(LENET, 0.1, 'erk', **same) == jp.keep_counts(LENET, 0.1, 'erk')
    assert jp.keep_counts(LENET, 0.1, floor=900, cap=0.9) == {'*': 26_620}


def filled(ask, fewest, most, amount):
    """The levels `clip(factor * ask)` of sum `amount`, exactly, by trying who stands at a bound."""
    for stand in itertools.product(('fewest', 'most', 'free'), repeat=len(ask)):
        rows = list(zip(stand, ask, fewest, most, strict=True))
        free = sum(q for s, q, _, _ in rows if s == 'free')
        rest = amount - sum({'fewest': f, 'most': m, 'free': 0}[s] for s, _, f, m in rows)
        if free:
            factor = rest / free
            fits = {
                'fewest': lambda q, f, m, factor=factor: factor * q <= f,
                'most': lambda q, f, m, factor=factor: factor * q >= m,
                'free': lambda q, f, m, factor=factor: f <= factor * q <= m,
            }
            if all(fits[s](q, f, m) for s, q, f, m in rows):
                return [{'fewest': f, 'most': m, 'free': factor * q}[s] for s, q, f, m in rows]
        elif rest == 0:
            low = max([Fraction(m) / q for s, q, _, m in rows if s == 'most'], default=0)
            if all(low * q <= f for s, q, f, _ in rows if s == 'fewest'):
                return [{'fewest': f, 'most': m}[s] for s, _, f, m in rows]
    raise AssertionError('no level')


@st.composite
def bounded_layers(draw):
    size = draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    most = [draw(st.integers(0, n)) for n in size]
    fewest = [draw(st.integers(0, m)) for m in most]
    return size, [draw(st.floats(1e-3, 1)) for _ in size], fewest, most


@settings(max_examples=300, deadline=None, database=None)
@given(bounded_layers())
def test_counts_within_bounds(layers):
    """Expectation: exact arithmetic over all ways to stand at the bounds, by definition."""
    size, densities, fewest, most = layers
    named = [dict(enumerate(values)) for values in (densities, fewest, most)]
    shapes = {i: (n,) for i, n in enumerate(size)}
    counts = list(bounded_counts(shapes, *named).values())
    plain = list(round_counts(shapes, named[0]).values())
    if all(f <= c <= m for f, c, m in zip(fewest, plain, most, strict=True)):
        event('no bound binds')
        assert counts == plain
        return
    amount = min(max(sum(plain), sum(fewest)), sum(most))
    assert sum(counts) == amount
    assert all(f <= c <= m for f, c, m in zip(fewest, counts, most, strict=True))
    ask = [Fraction(d) * n for d, n in zip(densities, size, strict=True)]
    levels = filled(ask, fewest, most, amount)
    assert sum(levels) == amount
    # Largest remainders: up by 1 - r and down by r' differ by no more than 1 where r >= r'.
    rounded = [count - level for count, level in zip(counts, levels, strict=True)]
    assert all(abs(r) < 1 for r in rounded)
    assert max(rounded) - min(rounded) <= 1 + Fraction(1, 10**9)


def test_a_layer_without_a_share_fills_up_last():
    """Expectation: by hand: `b` asks for nothing, and takes what `a` and `c` may not hold."""
    shapes, ask = dict.fromkeys('abc', (10,)), {'a': 0.8, 'b': 0.0, 'c': 0.4}
    fewest, most = dict.fromkeys('abc', 0), {'a': 5, 'b': 10, 'c': 10}
    assert bounded_counts(shapes, ask, fewest, most) == {'a': 5, 'b': 0, 'c': 7}
    assert bounded_counts(shapes, ask, fewest, most | {'c': 3}) == {'a': 5, 'b': 4, 'c': 3}


FALLING = [name for name in SCHEDULES if name not in RISING]


# --- schedules and plans ----------------------------------------------------------------------


@pytest.mark.parametrize('name', FALLING)
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
    plan = jp.plan_rounds(LENET, 0.01, rounds=100)
    expected = [round(0.01 ** (i / 100) * 266_200) for i in range(1, 101)]
    assert plan.counts['*'].tolist() == expected
    assert plan.counts['*'][-1] == 2662
    assert plan.steps.tolist() == [0] * 100
    layerwise = jp.plan_rounds(LENET, 0.1, allocation='erk', rounds=5, density_schedule='linear')
    assert list(layerwise.counts) == list(LENET)
    last = {path: int(counts[-1]) for path, counts in layerwise.counts.items()}
    assert last == jp.keep_counts(LENET, 0.1, 'erk')
    assert all((np.diff(counts) <= 0).all() for counts in layerwise.counts.values())


def test_bounds_hold_in_every_round():
    """Expectation: by hand: of 100 weights 71, 50, 35, 25; a cap of 0.4 allows 40 in all."""
    shapes = {'a': (5, 10), 'b': (5, 10)}
    for allocation, expected in (
        ('global', {'*': [40, 40, 35, 25]}),
        ('uniform', {'a': [20, 20, 18, 12], 'b': [20, 20, 18, 12]}),
    ):
        plan = jp.plan_rounds(shapes, 0.25, allocation=allocation, rounds=4, cap=0.4)
        assert {path: c.tolist() for path, c in plan.counts.items()} == expected
    plan = jp.plan_rounds(shapes, 0.25, allocation='uniform', rounds=4, floor={'b': 20})
    assert plan.counts['b'].tolist() == [35, 25, 20, 20]
    assert plan.counts['a'].tolist() == [35, 25, 16, 4]


def test_no_count_rises_where_a_bound_binds():
    """Expectation: by hand: 100, 300 and 100 weights, the first convolution capped at 50.

    The allocations are (100, 112.5, 37.5) at 0.5 and (100, 5, 20) at 0.25; what the cap takes away
    goes to the others by their allocations, so that `c` alone would be (50, 60).
    """
    shapes = {'a': (1, 1, 10, 10), 'b': (10, 30), 'c': (10, 10)}
    bound = {'allocation': 'uniform_plus', 'cap': {'a': 0.5}}
    assert jp.keep_counts(shapes, 0.5, **bound) == {'a': 50, 'b': 150, 'c': 50}
    assert jp.keep_counts(shapes, 0.25, **bound) == {'a': 50, 'b': 15, 'c': 60}
    plan = jp.plan_rounds(shapes, 0.25, rounds=2, **bound)
    expected = {'a': [50, 50], 'b': [140, 15], 'c': [60, 60]}
    assert {path: c.tolist() for path, c in plan.counts.items()} == expected


@pytest.mark.parametrize('allocation', ALLOCATIONS)
@settings(max_examples=40, deadline=None, database=None)
@given(data=st.data())
def test_every_plan(allocation, data):
    """Expectation: the definition: bounds hold, counts never rise, the last is `keep_counts`."""
    size = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    shapes = {f'{i}': (1, 1, n, 2) if i % 2 == 0 else (n, 2) for i, n in enumerate(size)}
    cap = {path: data.draw(st.floats(0.3, 1)) for path in shapes if data.draw(st.booleans())}
    floor = {path: data.draw(st.integers(0, 3)) for path in shapes}
    make = functools.partial(jp.plan_rounds, shapes, allocation=allocation, floor=floor, cap=cap)
    rounds, density = data.draw(st.integers(1, 6)), data.draw(st.floats(0.05, 1))
    density_schedule = data.draw(st.sampled_from(sorted(FALLING)))
    try:
        last = jp.keep_counts(shapes, density, allocation, floor=floor, cap=cap)
    except PruneError as refusal:
        event('refused')
        with pytest.raises(PruneError, match=re.escape(str(refusal))):
            make(density, rounds=rounds, density_schedule=density_schedule)
        return
    plan = make(density, rounds=rounds, density_schedule=density_schedule)
    assert {path: int(counts[-1]) for path, counts in plan.counts.items()} == last
    assert all((np.diff(counts) <= 0).all() for counts in plan.counts.values())
    fewest, most = bounds(shapes, floor, cap)
    if allocation in SHARED:
        fewest, most = ({'*': sum(bound.values())} for bound in (fewest, most))
    for path, counts in plan.counts.items():
        assert ((counts >= fewest[path]) & (counts <= most[path])).all()


@pytest.mark.parametrize('allocation', ALLOCATIONS)
@pytest.mark.parametrize('density', [0, 0.0, -0.1, 1.0000001, 90, math.nan, math.inf])
def test_density_out_of_range(density, allocation):
    """Expectation: an error that names the value; 90 (per cent) is a mistake, not a density."""
    for make in (jp.keep_counts, functools.partial(jp.plan_rounds, rounds=3)):
        with pytest.raises(PruneError, match=r'density must be in \(0, 1\]'):
            make(LENET, density, allocation=allocation)
    if allocation in LAYERWISE:
        with pytest.raises(PruneError, match=r'density must be in \(0, 1\]'):
            layerwise(allocation)(CONVNET, density)


def test_errors_say_how_to_mend():
    """Expectation: messages with the nearest valid name, and what was asked."""
    with pytest.raises(PruneError, match=r'1e-07 keeps none of 266200'):
        jp.keep_counts(LENET, 1e-7)
    with pytest.raises(PruneError, match='keeps none of 266200'):
        jp.plan_rounds(LENET, 1e-7, allocation='uniform', rounds=10)
    with pytest.raises(PruneError, match='rounds must be at least 1, not 0'):
        jp.plan_rounds(LENET, 0.5, rounds=0)
    with pytest.raises(PruneError, match="unknown allocation 'unifrom': did you mean 'uniform'"):
        jp.keep_counts(LENET, 0.5, 'unifrom')
    with pytest.raises(PruneError, match="unknown allocation 'gobal': did you mean 'global'"):
        jp.plan_rounds(LENET, 0.5, allocation='gobal')
    with pytest.raises(PruneError, match="unknown allocation 'unifrom': did you mean 'uniform'"):
        layerwise('unifrom')
    with pytest.raises(PruneError, match="unknown schedule 'expo': did you mean 'exponential'"):
        jp.plan_rounds(LENET, 0.5, density_schedule='expo')
    with pytest.raises(
        PruneError, match=r"unknown schedule 'stairs': .*exponential, harmonic, linear"
    ):
        jp.plan_rounds(LENET, 0.5, density_schedule='stairs')


@pytest.mark.parametrize('allocation', ['global', 'uniform', 'erk'])
def test_counts_go_up_and_down_by_turns(allocation):
    """By hand: 'alternate' keeps the target and everything by turns, in each layer."""
    shapes = {'a/kernel': (10, 10), 'b/kernel': (20, 5)}
    plan = jp.plan_rounds(
        shapes, 0.2, allocation=allocation, rounds=5, density_schedule='alternate'
    )
    few = jp.keep_counts(shapes, 0.2, allocation)
    every = jp.keep_counts(shapes, 1.0, allocation)
    assert sum(few.values()) == 40 and sum(every.values()) == 200
    for name, column in plan.counts.items():
        assert column.tolist() == [few[name], every[name], few[name], every[name], few[name]]
