"""Layerwise allocations against published code: github.com/avysogorets/Effective-Sparsity.

See `golden/README.md` for how the files were made and are read. They hold sparsities; where that
code leaves [0, 1] and refuses, ours refuses as well.
"""

import functools
import itertools
import math
import re

import numpy as np
import pytest
from published import golden, numbered_shapes

from jaxprune.allocation import (
    LAYERWISE,
    Shape,
    erdos_renyi,
    igq,
    round_counts,
    uniform,
    uniform_plus,
)
from jaxprune.errors import PruneError

RULES = {
    'uniform': uniform,
    'uniform_plus': uniform_plus,
    'erk': functools.partial(erdos_renyi, excess='previous'),
    'igq': igq,
}
ARCHITECTURES = [
    *('lenet300100', 'lenet5_mnist', 'lenet5_cifar', 'vgg16_cifar10', 'vgg19_cifar100'),
    *('resnet18_tiny', 'resnet20_cifar10', 'resnet50_imagenet'),
]


def golden_shapes(architecture: str) -> dict[str, Shape]:
    return numbered_shapes(golden('effsp_quotas')[f'shapes/{architecture}'])


def sizes(shapes) -> np.ndarray:
    return np.array([math.prod(shape) for shape in shapes.values()])


def densities(rule, shapes, density) -> np.ndarray:
    return np.array(list(rule(shapes, density).values()))


def cases(rule: str, architecture: str):
    """(compression, densities, does that code accept them) of one rule and network."""
    file = golden('effsp_quotas')
    rows = file[f'out/{rule}/{architecture}'], file[f'out/{rule}_valid/{architecture}']
    return list(zip(file['meta/compressions'].tolist(), 1 - rows[0], rows[1], strict=True))


@pytest.mark.parametrize(
    ('rule', 'architecture'),
    # That code refuses LeNet-300-100 for want of a convolution; see the test of our rule below.
    [
        case
        for case in itertools.product(['uniform', 'uniform_plus', 'erk'], ARCHITECTURES)
        if case != ('uniform_plus', 'lenet300100')
    ],
)
def test_closed_forms(rule, architecture):
    """Expectation: the file to 1e-12, and a refusal where its densities are not in [0, 1]."""
    shapes, compared = golden_shapes(architecture), 0
    for compression, expected, valid in cases(rule, architecture):
        if valid:
            found = densities(RULES[rule], shapes, 1 / compression)
            np.testing.assert_allclose(found, expected, atol=1e-12, rtol=0)
            compared += 1
        else:
            with pytest.raises(PruneError, match=r'must be at least|would have to keep'):
                RULES[rule](shapes, 1 / compression)
    assert compared >= 5


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_igq(architecture):
    """Expectation: the file up to one weight in all, where its bisection stops; ours is exact."""
    shapes = golden_shapes(architecture)
    for compression, expected, valid in cases('igq', architecture):
        assert valid
        found = densities(igq, shapes, 1 / compression)
        assert (sizes(shapes) * abs(found - expected)).sum() <= 1
        kept, total = (sizes(shapes) * found).sum(), sizes(shapes).sum()
        assert kept == pytest.approx(total / compression, rel=1e-12)


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_both_kinds_of_erk_agree_where_no_layer_is_full(architecture):
    """Expectation: the file, for the rule of Evci et al. too, as there is no excess to place."""
    shapes, compared = golden_shapes(architecture), 0
    for compression, expected, _ in cases('erk', architecture):
        if expected.max() < 1:
            found = densities(LAYERWISE['erk'], shapes, 1 / compression)
            np.testing.assert_allclose(found, expected, atol=1e-12, rtol=0)
            compared += 1
    assert compared >= 5


@pytest.mark.parametrize('architecture', ARCHITECTURES[1:])
def test_least_density_of_uniform_plus(architecture):
    """Expectation: the file accepts a compression if and only if our message would allow it."""
    shapes = golden_shapes(architecture)
    with pytest.raises(PruneError) as refusal:
        uniform_plus(shapes, 1e-9)
    least = float(re.search(r'at least ([\de.-]+)', str(refusal.value))[1])
    accepted = [valid for _, _, valid in cases('uniform_plus', architecture)]
    assert accepted == [1 / c >= least for c, _, _ in cases('uniform_plus', architecture)]
    assert not all(accepted)
    assert densities(uniform_plus, shapes, least).min() >= 0
    with pytest.raises(PruneError, match='must be at least'):
        uniform_plus(shapes, least * 0.99)


def test_uniform_plus_without_convolutions():
    """Expectation: by hand: uniform until the last layer would pass 80 %, then 20 % of it stay."""
    shapes = golden_shapes('lenet300100')
    np.testing.assert_array_equal(densities(uniform_plus, shapes, 0.5), 0.5)
    middle = (0.01 * 266_200 - 200) / 265_200
    np.testing.assert_allclose(
        densities(uniform_plus, shapes, 0.01), [middle, middle, 0.2], rtol=1e-12
    )
    with pytest.raises(PruneError, match=r'the last layer: density must be at least 0\.000752,'):
        uniform_plus(shapes, 0.0005)


@pytest.mark.parametrize('rule', RULES)
def test_quotas_and_counts_of_the_magnitude_masks(rule):
    """Expectation: a file of five layers: densities as above, and how many weights its masks keep.

    Its IGQ may be one weight off in all; so may then be the counts.
    """
    file = golden('effsp_magnitude_masks')

    def masks(rule, s):
        return [file[f'out/magnitude_{rule}_mask/s{s}/layer_{i}'] for i in range(5)]

    shapes = {f'layer_{i}': mask.shape for i, mask in enumerate(masks('uniform', 0.5))}
    compared = 0
    for s in file['meta/sparsities'].tolist():
        if f'out/quota_{rule}/s{s}' not in file:
            with pytest.raises(PruneError, match='must be at least'):
                RULES[rule](shapes, 1 - s)
            continue
        theirs = 1 - file[f'out/quota_{rule}/s{s}']
        found = RULES[rule](shapes, 1 - s)
        ours = np.array(list(found.values()))
        counts = np.array(list(round_counts(shapes, found).values()))
        off = abs(counts - [mask.sum() for mask in masks(rule, s)]).sum()
        if rule == 'igq':
            assert (sizes(shapes) * abs(ours - theirs)).sum() <= 1
            assert off <= 1
        else:
            np.testing.assert_allclose(ours, theirs, atol=1e-12, rtol=0)
            assert off == 0
        compared += 1
    assert compared == (5 if rule == 'uniform_plus' else 6)
