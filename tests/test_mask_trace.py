"""What masks have been, and how predictions differ: by sets, and against the runs themselves."""

import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest

from jaxprune import run_sweep
from jaxprune.errors import SpecError
from jaxprune.method import mask_figures, mask_trace
from jaxprune.sweep import make_spec, store
from jaxprune.sweep.churn import packed, unpacked, with_churn


def test_a_trace_against_sets():
    """Expectation: the definitions, on sets of kept weights; the first round forgets what was."""
    rng = np.random.default_rng(0)
    drawn = [{'a': rng.random(50) < p, 'b': rng.random((4, 5)) < p} for p in (0.9, 0.3, 0.4, 0.3)]
    every = [{(path, *at) for path, m in masks.items() for at in np.argwhere(m)} for masks in drawn]
    every = [{(path, *map(int, at)) for path, *at in kept} for kept in every]
    dense = {path: jnp.ones(m.shape, bool) for path, m in drawn[0].items()}
    trace, before = mask_trace.begun(dense), dense
    figures = mask_figures(trace, dense)
    assert figures['mask_change'] == figures['mask_distance'] == 0 and figures['weights_used'] == 1
    for number, masks in enumerate(drawn):
        after = {path: jnp.asarray(m) for path, m in masks.items()}
        trace = mask_trace.followed(trace, before, after, jnp.int32(number))
        figures, before = mask_figures(trace, after), after
        now = every[number]
        assert float(figures['weights_used']) == pytest.approx(
            len(set().union(*every[: number + 1])) / 70
        )
        first = len(now ^ every[0]) / (len(now) + len(every[0]))
        assert float(figures['mask_distance']) == pytest.approx(first)
        if number:
            last = len(now ^ every[number - 1]) / (len(now) + len(every[number - 1]))
            assert float(figures['mask_change']) == pytest.approx(last)


def test_churn_by_hand():
    """Twins share seed and settings; a rewound run is compared with its twin's last step."""
    rows = [
        ('dense', 0, 1, [0, 1, 2, 3], 0.1),
        ('dense', 0, 2, [0, 1, 2, 0], 0.1),
        ('dense', 0, 2, [9, 9, 9, 9], 0.2),
        ('rigl', 0, 1, [0, 1, 2, 0], 0.1),
        ('rigl', 0, 2, [0, 1, 2, 0], 0.1),
        ('lottery', 0, 7, [1, 1, 1, 1], 0.1),
        ('rigl', 1, 2, [0, 1, 2, 0], 0.1),
    ]
    frame = pl.DataFrame({
        'method': [r[0] for r in rows], 'seed': [r[1] for r in rows], 'step': [r[2] for r in rows],
        'predictions': [packed(np.array(r[3])) for r in rows], 'rate': [r[4] for r in rows],
    })  # fmt: skip
    assert with_churn(frame, ['rate'])['churn'].to_list() == [0, 0, 0, 0.25, 0, 0.75, None]
    labels = np.array([0, 300, 65535])
    np.testing.assert_array_equal(unpacked(packed(labels)), labels)


def table(**record):
    return {
        'name': 'moving',
        'model': {'name': 'mlp', 'widths': [8]},
        'data': {'name': 'mnist_small', 'train_examples': 200, 'test_examples': 50},
        'train': {'epochs': 3, 'batch_size': 25},
        'record': record,
        'grid': {
            'method': [
                {'name': 'rigl', 'every': 0.5, 'end': 2},
                {'name': 'gmp', 'start': 1, 'every': 0.5, 'end': 2},
                {'name': 'magnitude'},
            ],
            'compression': [1, 4],
            'seed': [0, 1],
        },
    }


def test_a_sweep_records_them(tmp_path):
    """Expectation: what the methods are. GMP's first round keeps all and its second one a quarter,
    so the distance is (1 - 1/4) / (1 + 1/4); RigL has used more weights than it has."""
    results = run_sweep(make_spec(table(churn=True)), tmp_path / 'out')
    assert results.equals(store.read_results(tmp_path / 'out'))
    gmp = results.filter(pl.col('method') == 'gmp', pl.col('target_compression') == 4)
    assert gmp.filter(step=8)['mask_distance'].to_list() == [0, 0]
    np.testing.assert_allclose(gmp.filter(step=24)['mask_distance'], 0.6, atol=1e-3)
    np.testing.assert_allclose(gmp['weights_used'], 1)
    rigl = results.filter(pl.col('method') == 'rigl', pl.col('target_compression') == 4)
    assert (rigl['weights_used'] > rigl['density']).all()
    assert (rigl['weights_used'] < 0.6).all() and (rigl['mask_distance'] > 0).all()
    still = results.filter(pl.col('method').is_in(['magnitude', 'dense']))
    assert still['mask_change'].is_null().all()
    assert results.filter(method='dense')['churn'].to_list() == [0] * 6
    pruned = results.filter(pl.col('method') != 'dense')['churn']
    assert pruned.is_between(0, 1).all() and pruned.max() > 0
    # Where a run and its twin err differently, they label differently.
    ends = results.filter(step=24).join(
        results.filter(pl.col('method') == 'dense', pl.col('step') == 24), on='seed', suffix='_twin'
    )
    gap = (ends['test_accuracy'] - ends['test_accuracy_twin']).abs()
    assert (ends['churn'] >= gap - 1e-9).all()


def test_churn_needs_dense_runs():
    wrong = table(churn=True)
    wrong['grid']['compression'] = [4]
    with pytest.raises(SpecError, match=r'record\.churn: goes by the dense runs'):
        make_spec(wrong)
