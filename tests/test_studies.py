"""The studies run as their READMEs say, in small."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from prepared import prepared

from jaxprune.sweep.store import read_results

EXPERIMENTS = Path(__file__).parent.parent / 'experiments'
#: The command line of this checkout.
SWEEP = 'import sys; from jaxprune.cli import main; sys.exit(main(sys.argv[1:]))'


def run(*command, cwd=None) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def load(path):
    """A script of a study, as a module."""
    found = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_gradient_flow(tmp_path):
    """Expectation: dense runs of `measures.py` are the sweep's, also when forced to another way of
    training; every figure and section is there; a directory without measures, and one given twice,
    give one line."""
    folder = EXPERIMENTS / 'gradient_flow'
    small = ['data.train_examples=1000', 'data.test_examples=300', 'train.epochs=7']
    small += ['train.milestones=[4,6]', 'grid.seed=[0,1]', 'prune.samples_per_class=5']
    sets = [part for value in small for part in ('--set', value)]
    sets += ['--set', 'engine.batching="unroll"']  # not what a dense net is trained by else
    out, measures = tmp_path / 'net', tmp_path / 'net_measures'
    run('-c', SWEEP, 'sweep', folder / 'lenet300100.toml', '--out', out, *sets)
    command = [folder / 'outcomes.py', out, '--out', tmp_path / 'written' / 'outcomes.md']
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().endswith('run measures.py first')
    run(folder / 'measures.py', out)
    done = subprocess.run(
        [sys.executable, *command[:2], out, *command[2:]], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.strip().endswith('give every network once')
    text = run(*command)
    assert text.count('\n## ') == 6 and 'nan' not in text
    drawn = {path.name for path in (tmp_path / 'written').glob('*.png')}
    expected = ('accuracy', 'correlations', 'scatter', 'removal', 'norms')
    assert drawn == {f'{name}.png' for name in expected}
    dense = read_results(out).filter(pl.col('label') == 'dense')
    ends = pl.read_parquet(measures / 'pruned.parquet').filter(pl.col('measure') == 'loss')
    for epoch in (1, 3, 7):
        ours = ends.filter(pl.col('epoch') == epoch).sort('seed')
        theirs = dense.filter(pl.col('epoch') == epoch).sort('seed')
        assert ours['dense_accuracy'].to_list() == theirs['test_accuracy'].to_list()


@pytest.mark.slow
def test_isometry(tmp_path):
    """Expectation: pruning lowers the singular values of the trained network, OrthP makes those of
    the linear dense one exactly 1; three times the epochs are so many. A directory given twice, and
    one with runs missing, give one line."""
    folder = EXPERIMENTS / 'isometry'
    small = ['data.train_examples=500', 'data.test_examples=200', 'train.epochs=6']
    small += ['grid.every_method.start=6', 'grid.seed=[0,1]', 'grid.density=[1,0.5]']
    sets = [part for value in small for part in ('--set', value)]
    out = tmp_path / 'net'
    run('-c', SWEEP, 'sweep', folder / 'mlp7_linear.toml', '--out', out, *sets)
    command = [folder / 'outcomes.py', out, '--out', tmp_path / 'outcomes.md']
    text = run(*command)
    assert (tmp_path / 'isometry.png').exists() and '### MLP-7-Linear' in text
    rows = load(folder / 'outcomes.py').load([out])
    ends = {
        'dense': 0,
        'L1, 0.01': 30,
        'L1, 0.001': 30,
        'L1 + OrthP, 0.01': 30,
        'L1 + OrthP, 0.001': 30,
        'L1, 0.001, 3 x the epochs': 90,
    }
    for label, epochs in ends.items():
        of = rows.filter(pl.col('label') == label).sort('seed', 'epoch')
        assert of['seed'].to_list() == [0] * (epochs + 1) + [1] * (epochs + 1)
        assert of['epoch'].to_list() == 2 * list(range(epochs + 1))
    start = rows.filter(pl.col('epoch') == 0)
    values = {label: of.sort('seed')['jsv_mean'] for (label,), of in start.group_by('label')}
    assert (values['L1, 0.01'] < 0.5 * values['dense']).all()
    assert values['L1, 0.01'].to_list() == values['L1, 0.001'].to_list()
    assert (values['L1 + OrthP, 0.01'] - 1).abs().max() < 1e-5
    twice = [sys.executable, folder / 'outcomes.py', out, out]
    done = subprocess.run(twice, capture_output=True, text=True)
    assert done.returncode == 1 and 'give every network once' in done.stderr
    next(iter((out / 'results').iterdir())).unlink()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 1 and 'finish the sweep' in done.stderr


@pytest.mark.script
def test_shapley_and_taylor(tmp_path):
    """Expectation: every curve of a layer begins at the dense loss and ends at that without the
    layer, whatever ranks it; areas are sums over a layer's removals; what is fine-tuned is better
    than what was just pruned; a second call measures nothing anew. The slope along a gate is the
    same before and after a ReLU, which is homogeneous, and without a norm also before that; the
    second study trains nothing, and its exact changes are the scores that the first one has."""
    folder, out = EXPERIMENTS / 'shapley', tmp_path / 'shapley'
    place = ('--data-dir', prepared('cifar10', 'mnist'))
    text = run(folder / 'study.py', '--quick', '--out', out, *place)
    drawn = {path.name for path in out.glob('*.png')}
    assert drawn == {'curves.png', 'areas.png', 'finetuning.png'} and text.count('\n## ') == 5
    (parts,) = out.glob('parts_*')
    found = pl.read_parquet(parts / 'lenet5_curves_1.parquet')
    layers = found.filter(pl.col('layer') != '*').group_by('layer', 'removed')
    ends = layers.agg(spread=pl.col('loss').max() - pl.col('loss').min(), units=pl.first('units'))
    same = ends.filter((pl.col('removed') == 0) | (pl.col('removed') == pl.col('units')))
    assert len(same) == 8 and same['spread'].max() == 0
    assert ends['spread'].max() > 0.1
    area = _areas(found.filter((pl.col('method') == 'APoZ') & (pl.col('examples') == 200)))
    other = pl.read_parquet(parts / 'lenet5_curves_0.parquet')
    both = (
        area + _areas(other.filter((pl.col('method') == 'APoZ') & (pl.col('examples') == 200)))
    ) / 2
    line = next(line for line in text.splitlines() if line.startswith('| LeNet-5, MNIST | APoZ |'))
    assert line.split('|')[4].split()[0] == f'{both:.3f}'
    tuned = pl.read_parquet(parts / 'lenet5_finetuned.parquet')
    assert tuned['tuned_loss'].mean() < tuned['loss'].mean()
    command = [sys.executable, folder / 'study.py', '--quick', '--out', out, *place]
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.stdout == text and ' of CPU time' not in again.stderr

    nets = sorted(path.name for path in (out / 'nets').iterdir())
    other = tmp_path / 'taylor'
    taylor = EXPERIMENTS / 'taylor' / 'study.py'
    text = run(taylor, '--quick', '--out', other, '--nets', out / 'nets', *place)
    assert sorted(path.name for path in (out / 'nets').iterdir()) == nets
    assert {path.name for path in other.glob('*.png')} == {'correlations.png', 'scatter.png'}
    (folder,) = (path for path in other.iterdir() if path.is_dir())
    for net in ('small_vgg', 'lenet5'):
        of = {n: f for (n,), f in pl.read_parquet(folder / f'{net}_1.parquet').group_by('estimate')}
        values = {n: f.sort('depth', 'unit')['signed'].to_numpy() for n, f in of.items()}
        first = values['Taylor 1']
        np.testing.assert_allclose(
            values['Taylor 1, after the ReLU'], first, atol=1e-5 * np.abs(first).max()
        )
        before = values['Taylor 1, before the norm']
        assert np.allclose(before, first, atol=1e-4 * np.abs(first).max()) == (net == 'lenet5')
        scores = pl.read_parquet(parts / f'{net}_scores_1.parquet')
        left = scores.filter((pl.col('method') == 'leave one out') & (pl.col('examples') == 200))
        exact = left.sort('layer', 'unit')['score'].to_numpy()
        np.testing.assert_allclose(values['oracle'], exact, atol=1e-6)


def _areas(curves: pl.DataFrame) -> float:
    """By the definition, in a loop."""
    total, units = 0.0, 0
    for (_,), own in curves.filter(pl.col('layer') != '*').group_by('layer'):
        losses = own.sort('removed')['loss'].to_list()
        total += sum(loss - losses[0] for loss in losses)
        units += len(losses) - 1
    return total / units


@pytest.fixture
def shapley_study(monkeypatch):
    """The modules of the study can be imported."""
    monkeypatch.syspath_prepend(EXPERIMENTS / 'shapley')
    return load(EXPERIMENTS / 'shapley' / 'curves.py')


def test_what_a_ranking_leaves(shapley_study):
    """Expectation: the lowest go first, of equal ones the lower number; the best of each layer
    stays; norms count relative to the mean of their layer: 2 of (2, 6) is half of its mean 4, and
    0.9 of (0.9, 1.1) nine tenths of 1."""
    prefixes, kept_units = shapley_study.prefixes, shapley_study.kept_units
    left = prefixes(np.array([3.0, 1.0, 2.0, 1.0]), np.array([0, 1, 2, 4]))
    assert left.tolist() == [[1, 1, 1, 1], [1, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]]
    ranking = load(EXPERIMENTS / 'shapley' / 'scores.py').Ranking
    scores = {'a': np.array([2.0, 6.0]), 'b': np.array([0.9, 1.1])}
    kept = kept_units(ranking('weight norm', 0, 0, scores), 0.25)
    assert {k: v.tolist() for k, v in kept.items()} == {'a': [False, True], 'b': [True, True]}
    kept = kept_units(ranking('Shapley', 100, 0, scores), 0.25)
    assert {k: v.tolist() for k, v in kept.items()} == {'a': [True, True], 'b': [False, True]}
    kept = kept_units(ranking('Shapley', 100, 0, scores), 1.0)
    assert {k: v.tolist() for k, v in kept.items()} == {'a': [False, True], 'b': [False, True]}
