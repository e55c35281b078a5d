"""The studies run as their READMEs say, in small."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import polars as pl
import pytest
from prepared import prepared

import jaxprune as jp
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


@pytest.mark.slow
def test_shapley_and_taylor(tmp_path):
    """Expectation: every curve of a layer begins at the dense loss and ends at that without the
    layer, whatever ranks it; half of all 226 units are left at 50 %; areas are sums over a layer's
    removals; what is fine-tuned is better than what was just pruned; a second call measures nothing
    anew. The slope along a gate is the same before and after a ReLU, which is homogeneous, and
    without a norm also before that; the second study trains nothing, and its exact changes are the
    scores that the first one has."""
    folder, out = EXPERIMENTS / 'shapley', tmp_path / 'shapley'
    place = ('--data-dir', prepared('cifar10', 'mnist'))
    text = run(folder / 'study.py', '--quick', '--out', out, *place)
    drawn = {path.name for path in out.glob('*.png')}
    assert drawn == {'curves.png', 'areas.png', 'finetuning.png'} and text.count('\n## ') == 6
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
    rows = [line.split('|') for line in text.splitlines() if line.count('|') == 4]
    left = [row[3].split(',') for row in rows if row[1].strip() == 'LeNet-5, MNIST']
    assert len(left) == 9 and all(abs(sum(map(float, row)) - 226 / 2) < 0.3 for row in left)
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


@pytest.mark.slow
def test_lean_study(tmp_path):
    """Expectation: all methods of a seed begin at the same dense network; no round leaves more than
    its target or brings anything back, and the control keeps all; tables have the means of the
    measurements; the dense networks find shapes, and with half of the convolutions those find more
    that were not pruned at random; a second call measures nothing anew."""
    out = tmp_path / 'lean'
    place = ('--data-dir', prepared('cifar10'))
    command = [EXPERIMENTS / 'lean' / 'study.py', '--quick', '--out', out, *place]
    text = run(*command)
    assert {path.name for path in out.glob('*.png')} == {'lean.png', 'examples.png'}
    assert text == (out / 'outcomes.md').read_text() + '\n' and text.count('\n## ') == 6
    (parts,) = out.glob('parts_*')
    found = {path.stem: pl.read_parquet(path) for path in parts.glob('*_[01].parquet')}
    where = pl.concat([found.pop('where_0'), found.pop('where_1')])
    assert len(found) == 12 and where.filter(pl.col('method') == 'dense')['kept'].sum() == 2 * 3288
    assert where.filter(pl.col('method') == 'LEAN')['kept'].sum() <= 2 * 164
    background = pl.read_parquet(parts / 'examples.parquet')['background'][0]
    for name, rounds in found.items():
        dense = found[f'not_pruned_{name[-1]}']
        assert rounds.row(0) == dense.row(0) and rounds['accuracy'][0] > background + 5
        if name.startswith('not_pruned'):
            assert (rounds['share'] == 100).all()
            continue
        assert (rounds['share'] <= rounds['target'] + 0.02).all()  # half a convolution of 3288
        assert (rounds['share'].diff().drop_nulls() <= 0).all() and rounds['share'][-1] < 5.1
    for seed in (0, 1):
        half = {name: found[f'{name}_{seed}']['iou'][1] for name in ('LEAN', 'L1_norm', 'random')}
        assert min(half['LEAN'], half['L1_norm']) > half['random'] + 2
    line = next(line for line in text.splitlines() if line.startswith('| L1 norm | '))
    mean = sum(found[f'L1_norm_{seed}']['iou'][1] for seed in (0, 1)) / 2
    assert line.split('|')[3].split()[0] == f'{mean:.1f}'
    again = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert again.stdout == text and ' of CPU time' not in again.stderr


@pytest.fixture
def lean_study(monkeypatch):
    """Imports a module of the study by its name."""
    monkeypatch.syspath_prepend(EXPERIMENTS / 'lean')
    return importlib.import_module


@pytest.mark.more
def test_lean_study_prunes_and_cuts_off(lean_study):
    """Expectation: NumPy. The largest kernels by the sum of absolute values are kept; those that
    are dropped beyond these do nothing, as norms have no shift yet and outputs stay the same. Of
    filters every layer keeps the largest by the same sum over all its inputs."""
    problem = lean_study('unet').unet_problem((2, 4), 3, 8)
    descent, training = lean_study('descent'), lean_study('training')
    net = training.Net(*jax.jit(problem.init)(jax.random.key(3)))
    weights = jax.device_get(jp.pick(net.params, problem.prunable))
    assert 'head/kernel' not in weights and len(weights) == 6
    dense = {path: np.ones(w.shape, bool) for path, w in weights.items()}
    total = descent.convolutions(dense)
    assert total == 2 * 3 + 2 * 2 + 4 * 2 + 4 * 4 + 2 * (2 + 4) + 2 * 2
    key, wanted = jax.random.key(0), 20
    masks = descent.make_shrink(problem, 'L1 norm', 8)(key, net, dense, wanted)
    norms = {path: abs(w).sum((0, 1), keepdims=True) for path, w in weights.items()}
    bound = np.sort(np.concatenate([n.ravel() for n in norms.values()]))[-wanted]
    largest = {p: np.broadcast_to(norms[p] >= bound, w.shape) for p, w in weights.items()}
    assert all((masks[path] <= largest[path]).all() for path in masks)
    assert 0 < descent.convolutions(masks) < descent.convolutions(largest) == wanted
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype('f')
    scores = jax.jit(lambda p: problem.apply(p, net.model_state, x, train=False, key=None)[0])
    one, other = (scores(jp.apply_masks(net.params, m)) for m in (masks, largest))
    assert np.ptp(one) > 0.01
    np.testing.assert_allclose(one, other, atol=1e-6)
    again = descent.make_shrink(problem, 'LEAN', 8)(key, net, masks, wanted)
    assert again is masks  # fewer are left than are to be kept

    masks = descent.make_shrink(problem, 'filters by L1 norm', 8)(key, net, dense, 10)
    assert descent.convolutions(masks) == 3 + 1 + 1 + 1 + 2 + 1
    for path, mask in masks.items():
        (kept,) = mask.any((0, 1, 2)).nonzero()
        assert kept.tolist() == [norms[path].sum((0, 1, 2)).argmax()]


def test_lean_study_scores_pixels(lean_study):
    """Expectation: by hand. Of the pixels that have or get a class 2 of 3, 3 of 4 and none are
    right. Outside of shapes an image is itself and noise, inside of circles it is not."""
    labels, truth = np.array([[0, 1, 1], [0, 1, 0]]), np.array([[0, 1, 1], [1, 1, 0]])
    mean_iou = lean_study('training').mean_iou
    assert mean_iou(labels, truth) == pytest.approx(100 * (2 / 3 + 3 / 4 + 0) / 3)
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    drawn = lean_study('shapes').drawn_over(images, draw)
    change = (0.25 * drawn.images + 0.5) - images / 255
    outside = change[drawn.truth == 0]
    assert abs(outside.std() - 0.05) < 2e-3 and change[drawn.truth == 1].std() > 0.2
    assert set(np.unique(drawn.truth)) == {0, 1, 2} and 0.1 < (drawn.truth > 0).mean() < 0.4


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


@pytest.mark.slow
def test_only_train_once(tmp_path):
    """Expectation: HESSO's groups are zero before anything is cut, so that the compact network is
    the full one; all sections and figures are there; a second call trains nothing."""
    folder, out = EXPERIMENTS / 'oto', tmp_path / 'oto'
    command = [folder / 'study.py', '--quick', '--out', out]
    command += ['--data-dir', prepared('cifar10', 'fashion_mnist')]
    text = run(*command)
    assert text.count('\n## ') == 4
    assert {path.stem for path in out.glob('*.png')} == {'accuracy', 'zero_groups', 'penalties'}
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in text.splitlines()]
    hesso = [row for row in rows if len(row) == 9 and row[0] == 'HESSO']
    assert len(hesso) == 3
    for row in hesso:
        assert row[5] == '100 %' and row[6] == row[7] and float(row[8]) < 1e-4
    stamps = {path: path.stat().st_mtime for path in out.rglob('results/*')}
    assert run(*command) == text
    assert stamps == {path: path.stat().st_mtime for path in out.rglob('results/*')}


@pytest.mark.slow
def test_dynamic(tmp_path):
    """Expectation: all sections and figures are there, with a line for each method; tickets take
    their budget five times; a second call trains nothing."""
    folder, out = EXPERIMENTS / 'dynamic', tmp_path / 'dynamic'
    command = [folder / 'study.py', '--quick', '--out', out]
    command += ['--data-dir', prepared('fashion_mnist')]
    text = run(*command)
    assert text.count('\n## ') == 2 and text.count('\n### ') == 4
    assert {path.stem for path in out.glob('*.png')} == {'accuracy', 'masks'}
    first = text.split('\n## ')[1]
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in first.splitlines()]
    steps = {row[0]: int(row[3]) for row in rows if len(row) == 6 and row[3].isdigit()}
    assert steps == {
        **dict.fromkeys(('random, static', 'SNIP at init', 'GMP', 'DPF', 'RigL'), 1000),
        'lottery ticket': 1000 + 4 * 950,
    }
    stamps = {path: path.stat().st_mtime for path in out.rglob('results/*')}
    assert run(*command) == text
    assert stamps == {path: path.stat().st_mtime for path in out.rglob('results/*')}


@pytest.mark.script
def test_movement(tmp_path):
    """Expectation: both tables are there, and runs begin with the weights trained before."""
    folder, out = EXPERIMENTS / 'movement', tmp_path / 'movement'
    data = prepared('mnist', 'fashion_mnist')
    text = run(folder / 'study.py', '--quick', '--out', out, '--data-dir', data)
    assert text.count('\n## ') == 2 and (out / 'accuracy.png').exists()
    assert 'trained.safetensors' in (out / 'sweep' / 'spec.toml').read_text()


@pytest.mark.slow
def test_tpu_alignment(tmp_path):
    """Expectation: rounding up keeps more operations; all sections and the figure are there."""
    folder, out = EXPERIMENTS / 'tpu_alignment', tmp_path / 'tpu'
    text = run(
        folder / 'study.py', '--quick', '--out', out, '--data-dir', prepared('fashion_mnist')
    )
    assert text.count('\n## ') == 2 and (out / 'alignment.png').exists()
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in text.splitlines()]
    rows = [row for row in rows if len(row) == 7 and row[0].endswith('%')]
    assert len(rows) == 2 * 3 + 2 * 2
    for target in ('70 %', '50 %'):
        free, *_, wide = (row for row in rows[:6] if row[0] == target)
        assert float(free[4]) <= float(wide[4]) and float(free[5]) <= float(wide[5])
