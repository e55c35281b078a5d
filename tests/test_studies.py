"""The studies of gradient flow and isometry run as their READMEs say, in small."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from jaxprune.sweep.store import read_results

EXPERIMENTS = Path(__file__).parent.parent / 'experiments'
pytestmark = pytest.mark.slow
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
