"""The study of effective sparsity: its training-free table, its specifications and its claims.

Functions and expected numbers are those of `experiments/effective_sparsity/table.py`, which prints
the whole table; here are the parts that are quick.
"""

import dataclasses
import functools
import importlib.util
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from jaxprune.sweep import load_spec, make_plan

FOLDER = Path(__file__).parents[1] / 'experiments' / 'effective_sparsity'


def script(name: str):
    """A script of the study as a module."""
    where = FOLDER / f'{name}.py'
    spec = importlib.util.spec_from_file_location(f'effective_sparsity_{name}', where)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


table, figure = script('table'), script('figure')


@functools.cache
def random_networks(*compressions: int) -> dict[int, dict[str, np.ndarray]]:
    """Compression -> allocation -> active weights of 20 networks."""
    active = table.prune_at_random(compressions)
    assert active.shape == (len(compressions), 3, 20)
    cells = (dict(zip(table.LAYERWISE, row, strict=True)) for row in active)
    return dict(zip(compressions, cells, strict=True))


QUICK = (100, 1000)


def known(compressed: int, allocation: str):
    return table.RANDOM[compressed][table.LAYERWISE.index(allocation)]


@pytest.mark.optimised
@pytest.mark.parametrize(
    'compressions', [QUICK, pytest.param((10, 30, 300, 3000), marks=pytest.mark.slow)]
)
def test_random_networks_are_as_connected_as_known(compressions):
    """Expectation: medians over 20 networks of an independent implementation.

    Source: LeNet-300-100 pruned at random as Vysogorets & Kempe do (arXiv:2107.02306); medians
    must agree to a third of the known range, numbers of disconnected networks by Fisher's exact
    test at 0.01 (why so: see the script).
    """
    for compressed, cells in random_networks(*compressions).items():
        for allocation, active in cells.items():
            assert not table.off(known(compressed, allocation), active), (compressed, allocation)


def test_another_allocation_would_be_noticed():
    """Expectation: the known numbers of one allocation refuse the networks of the others, those of
    direct compression, and a sample in which 8 of 20 networks are disconnected."""
    cells = random_networks(*QUICK)[100]
    for allocation in table.LAYERWISE:
        for other in set(table.LAYERWISE) - {allocation}:
            assert table.off(known(100, allocation), cells[other])
        assert table.off(known(100, allocation), np.full(20, table.SIZE // 100))
    cut = np.where(np.arange(20) < 8, 0, cells['igq'])
    assert table.off(known(100, 'igq'), cut)


def flow_is_as_known(compressed: int):
    masks, found = table.prune_by_synflow([compressed], seeds=1)
    assert not table.flow_off(table.SYNFLOW[compressed], found['kept'][0], found['active'][0])
    flows = table.layer_flows(0, {path: mask[0, 0] for path, mask in masks.items()})
    np.testing.assert_allclose(flows, flows[0], rtol=1e-12)
    assert flows[0] > 0


@pytest.mark.slow
def test_synflow_leaves_no_dead_weights():
    """Expectation: 2662 weights kept and as good as all active, (1275, 784, 603) per layer.

    Source: an independent implementation, one network; and conservation (Tanaka et al.,
    arXiv:2006.05467, theorem 1): without biases every layer's scores have the same sum, here in
    float64 to 1e-12 of it.
    """
    flow_is_as_known(100)


@pytest.mark.slow
@pytest.mark.parametrize('compressed', [1000, 10000])
def test_synflow_leaves_no_dead_weights_at_extreme_compression(compressed):
    """Expectation: as above; 265 of 266, and 27 of 27 weights active."""
    flow_is_as_known(compressed)


def test_fishers_exact_test():
    """Expectation: the tea-tasting table, 34/70, and scipy."""
    assert math.isclose(table.same_rate(3, 4, 1, 4), 34 / 70)
    from scipy.stats import fisher_exact

    for a, n, b, m in ((6, 20, 12, 20), (20, 20, 14, 20), (0, 5, 7, 20), (0, 20, 0, 20)):
        expected = fisher_exact([[a, n - a], [b, m - b]]).pvalue
        assert math.isclose(table.same_rate(a, n, b, m), expected, rel_tol=1e-9)


@pytest.mark.parametrize(
    'name',
    ['effective', *(pytest.param(n, marks=pytest.mark.more) for n in ('direct', 'uniform_plus'))],
)
def test_the_specifications_plan_without_data(name):
    """Expectation: methods x compressions x seeds and a dense control per seed, by hand."""
    spec = load_spec(FOLDER / f'{name}.toml')
    runs = {'direct': 6 * 7 * 5 + 5, 'effective': 6 * 7 * 5 + 5, 'uniform_plus': 2 * 5 * 5}
    assert len(make_plan(spec)['runs']) == runs[name]


def test_the_specifications_differ_in_their_grids_only():
    """Expectation: what one figure draws together is trained alike."""
    specs = [load_spec(FOLDER / f'{name}.toml') for name in ('direct', 'effective', 'uniform_plus')]
    direct, effective, plus = specs
    for other in (effective, plus):
        for part in ('model', 'data', 'train', 'prune', 'record'):
            assert getattr(other, part) == getattr(direct, part)
        assert other.grid.seed == direct.grid.seed
    for ours, theirs in zip(direct.grid.method, effective.grid.method, strict=True):
        assert dataclasses.replace(ours, target='effective') == theirs
    assert [m.target for m in plus.grid.method] == ['direct', 'effective']
    assert set(plus.grid.compression) < set(direct.grid.compression)
    assert direct.grid.compression == effective.grid.compression


def invented_runs(effective, accuracy):
    """Runs of every method as `figure.load` gives them.

    Args:
      effective: `(name, direct compression) -> effective compression`.
      accuracy: `(name, effective compression) -> percent`.
    """
    dense = ('dense', 'direct', 1.0, 1.0, 1.0, 98.0)
    rows = [(*dense, seed) for seed in (0, 1)]
    for name in figure.NAMES.values():
        for at in (10.0, 30.0, 100.0, 300.0):
            reached = effective(name, at)
            rows += [
                (name, 'direct', at, at, reached, accuracy(name, reached) + 0.1 * seed, seed)
                for seed in (0, 1)
            ]
            rows += [
                (name, 'effective', at, at, at, accuracy(name, at) + 0.1 * seed, seed)
                for seed in (0, 1)
            ]
    columns = ['name', 'target', 'at', 'compression', 'effective_compression', 'accuracy', 'seed']
    return pl.DataFrame(rows, schema=columns, orient='row')


def verdicts(frame) -> dict[str, set[str]]:
    return {check.__name__: {c.verdict for c in check(frame)} - {'note'} for check in figure.CLAIMS}


def test_the_claims_tell_two_worlds_apart():
    """Expectation: claims pass where pruning cuts networks as the paper says. They fail where every
    kept weight is active and all methods are alike, but for two that hold there as well: SynFlow's
    weights are active, and IGQ is no worse than magnitude."""

    def cut(name, at):
        excess = {'random, uniform': 20, 'SynFlow': 1, figure.IGQ: 1.1}.get(name, 3)
        return at * (excess if at >= 100 else 1)

    def reached(name, at):
        return max(98 - at / 50, 10) + (name == 'SNIP')

    frame = invented_runs(cut, reached)
    assert set().union(*verdicts(frame).values()) == {'PASS'}
    assert figure.draw(frame).startswith(b'\x89PNG')
    alike = verdicts(invented_runs(lambda name, at: at, lambda name, at: 90.0))
    assert alike.pop('synflow_weights_work') == {'PASS'}
    assert alike.pop('igq_against_scores') == {'PASS'}
    assert set().union(*alike.values()) == {'FAIL'}
