"""The studies of gradient flow and isometry run as their READMEs say, in small."""

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
    """Expectation: OrthP starts from singular values of exactly 1, in linear dense nets only;
    pruning lowers those of the trained nets, which are there once per seed."""
    folder = EXPERIMENTS / 'isometry'
    study = [folder / 'study.py', '--out', tmp_path, '--seeds', 2, '--epochs', 3, '--ratios', 0.5]
    run(*study, '--nets', 'MLP-7-Linear', 'LeNet-5-ReLU', '--longer', 2)
    text = run(folder / 'outcomes.py', tmp_path, '--out', tmp_path / 'outcomes.md')
    assert (tmp_path / 'isometry.png').exists() and '### LeNet-5-ReLU' in text
    twice = [sys.executable, folder / 'outcomes.py', tmp_path, tmp_path]
    done = subprocess.run(twice, capture_output=True, text=True)
    assert done.returncode == 1 and 'some runs are there twice' in done.stderr
    frame = pl.read_parquet(tmp_path / 'runs.parquet').filter(pl.col('epoch') == 0)
    repaired = frame.filter(pl.col('repair') == 'L1 + OrthP')
    linear = repaired.filter(pl.col('net') == 'MLP-7-Linear')
    assert (linear['jsv_mean'] - 1).abs().max() < 1e-5
    assert (repaired.filter(pl.col('net') != 'MLP-7-Linear')['jsv_mean'] - 1).abs().min() > 0.01
    before = frame.filter((pl.col('repair') == 'L1') & (pl.col('net') == 'MLP-7-Linear'))
    assert before['jsv_mean'].max() < 0.5
    dense = frame.filter((pl.col('repair') == 'dense') & (pl.col('net') == 'MLP-7-Linear'))
    assert dense['seed'].to_list() == [0, 1] and dense['jsv_mean'].min() > 0.5
