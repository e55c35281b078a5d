"""Reports of made-up sweeps: numbers against NumPy, pages that stand alone, no text on text."""

import html.parser
import itertools
import math
import re
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from cases import MORE
from matplotlib.colors import to_rgb
from matplotlib.layout_engine import ConstrainedLayoutEngine

from jaxprune import report
from jaxprune.errors import StoreError
from jaxprune.report import (
    curves,
    effective_compression,
    heatmap,
    page,
    recorded,
    style,
    tables,
    terminal,
    text,
)
from jaxprune.stats import student_interval
from jaxprune.sweep import store
from jaxprune.sweep.timing import PHASES

PATHS = {'dense_0/kernel': 235_200, 'dense_1/kernel': 30_000, 'dense_2/kernel': 1_000}
LABELS = ['random (uniform)', 'random (ERK)', 'magnitude', 'SNIP', 'GraSP', 'SynFlow']
GRID = [2, 5, 10, 20, 50, 100, 200, 500, 1000]


class Sweep:
    """A made-up sweep: frames, and the accuracies and counts they were made from."""

    def __init__(
        self,
        labels=LABELS,
        grid=GRID,
        seeds=4,
        epochs=3,
        *,
        dense=True,
        extra=({},),
        paths=PATHS,
        gap=lambda label, compression, seed: 1.0,
    ):
        """`gap` is effective over direct compression; labels that end in 'effective' aim at it."""
        rng = np.random.default_rng(0)
        self.accuracy, self.kept, self.effective, rows, leaves = {}, {}, {}, [], []
        total = sum(paths.values())
        for extras in extra:
            jobs = [('dense', 1.0)] * dense
            jobs += [(label, float(c)) for label in labels for c in grid]
            for (label, compression), seed in itertools.product(jobs, range(seeds)):
                run = f'{label}-{compression:g}-{seed}-{"-".join(map(str, extras.values()))}'
                skill = 40.0 * 2 ** (labels.index(label) if label in labels else 9)
                accuracy = 0.1 + 0.88 / (1 + (compression / skill) ** 2) + rng.normal(0, 0.004)
                kept = [max(1, round(size / compression)) for size in paths.values()]
                if label == 'magnitude' and (compression, seed) in ((200, 1), (500, 0), (500, 1)):
                    kept[1] = 0
                aimed = label.endswith('effective')
                factor = gap(label, compression, seed) if label in labels else 1.0
                factor = np.inf if 0 in kept else factor
                if aimed and np.isfinite(factor):
                    kept = [
                        min(size, math.ceil(factor * size / compression)) for size in paths.values()
                    ]
                if np.isinf(factor):
                    accuracy = 0.1
                direct = total / sum(kept)
                self.accuracy[run], self.kept[run] = accuracy, kept
                self.effective[run] = effective = direct * factor
                active = [round(k / factor) for k in kept]
                leaves += [
                    (run, *leaf) for leaf in zip(paths, paths.values(), kept, active, strict=True)
                ]
                row = {
                    'run_id': run,
                    'model': 'lenet_300_100',
                    'dataset': 'mnist',
                    'label': label,
                    'method': label.partition(' ')[0].lower(),
                    'allocation': 'global',
                    'seed': seed,
                    'target': 'effective' if aimed else 'direct',
                    'target_compression': compression,
                    'density': sum(kept) / total,
                    'compression': direct,
                    'effective_compression': effective,
                    'learning_rate': 0.1,
                    'weight_decay': 5e-4,
                }
                for epoch in range(epochs):
                    done = (epoch + 1) / epochs
                    rows.append(
                        row
                        | {
                            'step': 100 * epoch,
                            'epoch': epoch,
                            'train_loss': 2.3 * (1 - 0.9 * done * accuracy),
                            'test_loss': 2.4 * (1 - 0.9 * done * accuracy),
                            'test_accuracy': accuracy * done,
                        }
                        | extras
                    )
        schema = store.RESULTS | dict.fromkeys(extra[0], pl.Float64)
        self.results = pl.DataFrame(rows, schema=schema)
        self.layers = pl.DataFrame(leaves, schema=store.LAYERS, orient='row')
        self.runs = list(self.accuracy)

    def spoil(self, run, column='train_loss', value=float('nan')):
        """Overwrites the last evaluation of a run."""
        last = (pl.col('run_id') == run) & (pl.col('step') == self.results['step'].max())
        self.results = self.results.with_columns(
            pl.when(last).then(value).otherwise(column).alias(column)
        )
        return self

    def write(self, out, unfinished=0, per_chunk=7):
        """Stores the sweep, the last `unfinished` chunks left out."""
        chunks = [
            {'id': f'c{i:03}', 'runs': self.runs[first : first + per_chunk]}
            for i, first in enumerate(range(0, len(self.runs), per_chunk))
        ]
        plan = {'name': 'made <up> & odd', 'runs': self.runs, 'chunks': chunks, 'programs': []}
        store.write_json(out / 'plan.json', plan)
        for chunk in chunks[: len(chunks) - unfinished]:
            mine = pl.col('run_id').is_in(chunk['runs'])
            made = store.Chunk(
                self.results.filter(mine).drop('churn'),
                self.layers.filter(mine),
                pl.DataFrame(schema=store.CURVES),
                pl.DataFrame(schema=store.FLOW),
                dict.fromkeys((*PHASES, 'run_steps'), 1.0),
            )
            store.write_chunk(out, chunk['id'], made)
        sessions = [{'started': 'monday', 'runs': 3}, {'started': 'tuesday', 'runs': 4}]
        record = {
            'versions': {'jax': '0.10.2'},
            'git': {'commit': 'c0ffee', 'dirty': False, 'diff': None},
            'device': 'cpu <two>',
            'seeds': [0, 1, 2],
            'nothing': {},
        }
        for session in sessions:
            store.write_session(out, {**record, 'session': session})
        store.write_bytes(out / 'spec.toml', b'name = "made up"\n[grid]\nseed = [0, 1, 2, 3]\n')
        return out


def signs(words):
    """`10x` with the sign for times."""
    return re.sub(r'(?<=\d)x', '\N{MULTIPLICATION SIGN}', words)


class Page(html.parser.HTMLParser):
    """Tags, attributes and words of a page; complains about tags that do not match."""

    VOID = frozenset({'meta', 'img', 'link', 'br'})

    def __init__(self, path):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(path.read_text(encoding='utf-8'))
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if 'style' not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return ' '.join(' '.join(self.words).split())


@pytest.fixture
def words_only(monkeypatch):
    """Leaves out layout and pixels, the slowest parts, where a test is about words or files."""
    monkeypatch.setattr(style, 'png', lambda drawing: b'\x89PNG')
    monkeypatch.setattr(ConstrainedLayoutEngine, 'execute', lambda engine, drawing: None)


@pytest.fixture
def few_pixels(monkeypatch):
    """Draws everything, but coarsely, once, and lays out only what has to be measured."""

    def coarse(drawing):
        drawing.set_layout_engine('none')
        drawing.set_dpi(30)
        with style.context():
            drawing.canvas.draw()
        return b'\x89PNG'

    monkeypatch.setattr(style, 'png', coarse)


# Tables


def test_final_takes_the_last_step_whatever_the_order():
    sweep = Sweep(seeds=2)
    shuffled = sweep.results.sample(fraction=1.0, shuffle=True, seed=1)
    final = tables.final(shuffled)
    assert sorted(final['run_id']) == sorted(sweep.runs)
    for row in final.iter_rows(named=True):
        assert row['epoch'] == 2
        assert row['test_accuracy'] == sweep.accuracy[row['run_id']]
    assert tables.final(sweep.results)['run_id'].to_list() == sweep.runs


def test_summary_against_numpy():
    sweep = Sweep()
    summary = tables.summary(sweep.results, sweep.layers)
    assert summary.columns[0] == 'label'
    assert summary.height == 1 + len(LABELS) * len(GRID)
    assert summary['label'].unique(maintain_order=True).to_list() == ['dense', *LABELS]
    dense = np.array([sweep.accuracy[f'dense-1-{seed}-'] for seed in range(4)])
    for row in summary.iter_rows(named=True):
        runs = [f'{row["label"]}-{row["target_compression"]:g}-{seed}-' for seed in range(4)]
        accuracy = np.array([sweep.accuracy[run] for run in runs])
        kept = np.array([sweep.kept[run] for run in runs])
        assert row['seeds'] == 4
        assert row['accuracy'] == pytest.approx(accuracy.mean())
        bounds = row['accuracy_low'], row['accuracy_high']
        assert bounds == pytest.approx(student_interval(accuracy))
        direct = sum(PATHS.values()) / kept.sum(1)
        assert row['compression'] == pytest.approx(np.exp(np.log(direct).mean()))
        connected = direct[(kept > 0).all(1)]
        assert row['disconnected'] == 4 - len(connected)
        assert row['effective_compression'] == pytest.approx(np.exp(np.log(connected).mean()))
        assert row['collapsed'] == (kept == 0).any(1).sum()
        assert row['diverged'] == 0
        if row['method'] == 'dense':
            assert row['deficit'] is None and row['pairs'] == 0
            continue
        assert row['pairs'] == 4
        assert row['deficit'] == pytest.approx((dense - accuracy).mean())
        bounds = row['deficit_low'], row['deficit_high']
        assert bounds == pytest.approx(student_interval(dense - accuracy))
    assert summary['collapsed'].sum() == 3


def test_differences_pair_equal_seeds_only():
    sweep = Sweep(['SNIP'], [10], seeds=4)
    results = sweep.results.filter(~pl.col('run_id').is_in(['dense-1-0-', 'SNIP-10-3-']))
    row = tables.summary(results, sweep.layers).row(1, named=True)
    pairs = [sweep.accuracy[f'dense-1-{s}-'] - sweep.accuracy[f'SNIP-10-{s}-'] for s in (1, 2)]
    assert (row['seeds'], row['pairs']) == (3, 2)
    assert row['deficit'] == pytest.approx(np.mean(pairs))


def test_one_seed_has_no_interval_and_no_dense_no_difference():
    sweep = Sweep(['SNIP'], [10, 20], seeds=1)
    summary = tables.summary(sweep.results, sweep.layers)
    assert summary['accuracy_low'].is_null().all() and summary['deficit_high'].is_null().all()
    assert summary['deficit'].null_count() == 1
    sweep = Sweep(['SNIP'], [10, 20], dense=False)
    summary = tables.summary(sweep.results, sweep.layers)
    assert summary['deficit'].is_null().all()
    assert tables.breaking_points(summary)['compared'].to_list() == [False]


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_diverged_runs_are_flagged_and_only_finite_accuracies_averaged(value):
    sweep = Sweep(['SNIP'], [10], seeds=3).spoil('SNIP-10-1-', value=value)
    row = tables.summary(sweep.results, sweep.layers).row(1, named=True)
    values = [sweep.accuracy[f'SNIP-10-{seed}-'] for seed in range(3)]
    assert row['diverged'] == 1 and row['accuracy'] == pytest.approx(np.mean(values))
    sweep.spoil('SNIP-10-1-', 'test_accuracy', value)
    row = tables.summary(sweep.results, sweep.layers).row(1, named=True)
    assert (row['seeds'], row['pairs'], row['diverged']) == (3, 2, 1)
    assert row['accuracy'] == pytest.approx(np.mean([values[0], values[2]]))


def test_a_loss_that_was_not_measured_is_no_divergence():
    sweep = Sweep(['SNIP'], [10]).spoil('SNIP-10-1-', 'train_loss', None)
    assert not tables.final(sweep.results)['diverged'].any()


def test_collapsed_lists_runs_and_layers():
    sweep = Sweep()
    collapsed = tables.collapsed(sweep.results, sweep.layers)
    runs = ['magnitude-200-1-', 'magnitude-500-0-', 'magnitude-500-1-']
    assert collapsed['run_id'].to_list() == runs
    assert collapsed['layers'].to_list() == [['dense_1/kernel']] * 3


def test_breaking_points():
    rows = [
        ('A', 2.0, 0.002, 0, 0, 0),
        ('A', 5.0, 0.013, 0, 0, 0),
        ('A', 10.0, 0.01, 0, 0, 1),
        ('A', 20.0, 0.05, 2, 0, 4),
        ('A', 50.0, 0.8, 4, 0, 4),
        ('B', 2.0, 0.3, 0, 0, 0),
        ('B', 5.0, None, 0, 4, None),
        ('C', 2.0, -0.01, 0, 0, 0),
    ]
    columns = ['label', 'target_compression', 'deficit', 'collapsed', 'diverged', 'disconnected']
    summary = pl.DataFrame(rows, schema=columns, orient='row').with_columns(
        method=pl.col('label').str.to_lowercase()
    )
    first, second, third = tables.breaking_points(summary).to_dicts()
    assert first == {
        'label': 'A',
        'tested': 50.0,
        'compared': True,
        'within_1': 10.0,
        'missed_1': [5.0],
        'within_5': 20.0,
        'missed_5': [],
        'collapsed': 20.0,
        'disconnected': 10.0,
        'traced': True,
    }
    assert (second['disconnected'], second['traced']) == (None, False)
    assert (second['within_1'], second['within_5'], second['collapsed']) == (None, None, None)
    assert (third['within_1'], third['tested']) == (2.0, 2.0)
    sentences = dict(text.breaking_sentences(tables.breaking_points(summary)))
    assert sentences['A'] == (
        'within 1 point of dense up to 10\N{MULTIPLICATION SIGN} (though not at '
        '5\N{MULTIPLICATION SIGN}); within 5 points of dense up to 20\N{MULTIPLICATION SIGN}; '
        'first disconnected run at 10\N{MULTIPLICATION SIGN}, first run with an empty layer at '
        '20\N{MULTIPLICATION SIGN}.'
    )
    assert sentences['B'].startswith('within 1 point of dense at no compression tested;')
    assert 'the largest tested' in sentences['C']


@pytest.mark.parametrize(
    ('collapsed', 'disconnected', 'traced', 'words'),
    [
        (None, None, True, 'no run lost a whole layer or was disconnected'),
        (None, None, False, 'no run lost a whole layer (a net can be cut in two without that)'),
        (None, 30.0, True, 'first disconnected run at 30x, though none lost a whole layer'),
        (30.0, None, True, 'first run with an empty layer at 30x, but no run was disconnected'),
        (30.0, None, False, 'first run with an empty layer at 30x'),
        (30.0, 30.0, True, 'first run with an empty layer, and first disconnected one, at 30x'),
        (
            *(10.0, 30.0, True),
            'first run with an empty layer at 10x, first disconnected run at 30x',
        ),
    ],
)
def test_what_is_said_of_lost_layers_and_lost_paths(collapsed, disconnected, traced, words):
    """Expectation: a layer and every path are lost independently where there are skip connections;
    only what was computed may be denied."""
    points = {f'within_{limit}': [10.0] for limit in tables.LIMITS}
    points |= {f'missed_{limit}': [[]] for limit in tables.LIMITS}
    points |= {'label': ['A'], 'tested': [100.0], 'compared': [True], 'traced': [traced]}
    points |= {'collapsed': [collapsed], 'disconnected': [disconnected]}
    [(_, sentence)] = text.breaking_sentences(pl.DataFrame(points))
    assert sentence.endswith(signs(f'; {words}.'))


@pytest.mark.parametrize(
    ('column', 'values'),
    [
        ('learning_rate', (0.1, 0.01)),
        ('weight_decay', (0.0, 5e-4)),
        ('momentum', (0.0, 0.9)),
    ],
)
def test_what_is_trained_differently_is_never_averaged(column, values):
    sweep = Sweep(['SNIP'], [10, 20], extra=[{column: value} for value in values])
    if column == 'momentum':
        assert 'momentum' not in store.RESULTS
    summary = tables.summary(sweep.results, sweep.layers)
    assert summary.columns[0] == column and summary.height == 2 * 3
    assert summary[column].is_sorted()
    for row in summary.iter_rows(named=True):
        prefix = f'{row["label"]}-{row["target_compression"]:g}'
        runs = [f'{prefix}-{seed}-{row[column]}' for seed in range(4)]
        assert row['seeds'] == 4
        assert row['accuracy'] == pytest.approx(np.mean([sweep.accuracy[run] for run in runs]))
        if row['label'] == 'SNIP':
            dense = [sweep.accuracy[f'dense-1-{seed}-{row[column]}'] for seed in range(4)]
            assert row['deficit'] == pytest.approx(np.mean(dense) - row['accuracy'])
    assert tables.breaking_points(summary).height == 2


def test_learning_and_densities_against_numpy():
    sweep = Sweep(['magnitude'], [100, 200]).spoil('magnitude-100-0-')
    learning = tables.learning(sweep.results)
    for row in learning.iter_rows(named=True):
        same = (
            (pl.col('label') == row['label'])
            & (pl.col('target_compression') == row['target_compression'])
            & (pl.col('epoch') == row['time'])
        )
        for column in ('train_loss', 'test_accuracy'):
            values = sweep.results.filter(same)[column].to_numpy()
            assert row[column] == pytest.approx(np.nanmean(values))
    assert learning.height == 3 * 3

    densities = tables.densities(sweep.results, sweep.layers)
    for row in densities.iter_rows(named=True):
        place = list(PATHS).index(row['path'])
        prefix = f'{row["label"]}-{row["target_compression"]:g}'
        kept = np.array([sweep.kept[f'{prefix}-{seed}-'][place] for seed in range(4)])
        assert row['density'] == pytest.approx(kept.mean() / row['size'])
        assert (row['empty'], row['seeds']) == ((kept == 0).sum(), 4)


def test_several_evaluations_in_an_epoch_are_told_apart_by_step():
    sweep = Sweep(['SNIP'], [10])
    assert tables.time_unit(sweep.results) == 'epoch'
    assert tables.time_unit(sweep.results.with_columns(epoch=pl.col('epoch') // 2)) == 'step'


def test_evenly():
    assert tables.evenly([1, 2, 3], 5) == [1, 2, 3]
    assert tables.evenly(list(range(40)), 12)[0] == 0
    assert tables.evenly(list(range(40)), 12)[-1] == 39
    for count in range(12, 60):
        chosen = tables.evenly(list(range(count)), 12)
        assert len(set(chosen)) == 12 and np.ptp(np.diff(chosen)) <= 1


@pytest.mark.parametrize(
    ('compression', 'plain', 'removed'),
    [
        (1, '1', '0'),
        (2, '2', '50'),
        (2.5, '2.5', '60'),
        (10 / 3, '3.33', '70'),
        (64, '64', '98.4'),
        (1000, '1000', '99.9'),
        (1234.5, '1234', '99.919'),
        (100_000, '100000', '99.999'),
    ],
)
def test_numbers(compression, plain, removed):
    assert text.number(compression) == plain
    assert text.sparsity(compression) == removed


def test_percent_has_no_minus_zero():
    assert text.percent(-0.00001) == '0.00'
    assert text.percent(-0.0123) == '\N{MINUS SIGN}1.23'
    assert text.percent(None) == text.percent(float('nan')) == text.NONE


# Effective compression

# LeNet-300-100 pruned at random, median effective compression of 20 seeds, as computed with the
# definition of arXiv:2107.02306.
IGQ = {10: 10.0, 30: 30.0, 100: 102.2, 300: 436.0, 1000: 5300.0}
UNIFORM = {10: 10.41, 30: 51.5, 100: 1036.0, 300: 2.5e4}
RANDOM = ['random (uniform)', 'random (IGQ)', 'random (IGQ) to effective', 'SynFlow']


def gap(label, compression, seed):
    """Effective over direct compression; the last seed is cut in two before the others."""
    if label == 'random (IGQ) to effective':
        return 1 + compression / 1000
    if label not in ('random (uniform)', 'random (IGQ)'):
        return 1.0
    table = UNIFORM if label == 'random (uniform)' else IGQ
    if compression not in table or (compression == max(table) and seed == 3):
        return np.inf
    ratio = table[compression] / compression
    return ratio ** (1 + 0.1 * (seed - 1.5))


def test_disconnected_runs_are_counted_and_not_averaged():
    """Expectation: the definition; the mean of logarithms over the connected runs, by NumPy."""
    sweep = Sweep(RANDOM, [100, 300, 1000, 3000], gap=gap)
    summary = tables.summary(sweep.results, sweep.layers)
    counts = []
    for row in summary.iter_rows(named=True):
        runs = [f'{row["label"]}-{row["target_compression"]:g}-{seed}-' for seed in range(4)]
        values = np.array([sweep.effective[run] for run in runs])
        finite = values[np.isfinite(values)]
        assert row['disconnected'] == 4 - len(finite)
        assert row['target'] == ('effective' if row['label'].endswith('effective') else 'direct')
        counts.append(row['disconnected'])
        if len(finite):
            expected = np.exp(np.log(finite).mean())
            assert row['effective_compression'] == pytest.approx(expected)
        else:
            assert row['effective_compression'] is None
    assert set(counts) == {0, 1, 4}
    assert tables.settings(sweep.results) == []


@pytest.mark.parametrize('value', [None, float('nan')])
def test_what_was_not_computed_is_neither_connected_nor_disconnected(value):
    """Expectation: no number, no point, no verdict; runs that have values keep theirs."""
    sweep = Sweep(RANDOM[:2], [100, 300, 1000], seeds=2, gap=gap)
    unknown = pl.col('label') == 'random (IGQ)'
    column = pl.when(unknown).then(pl.lit(value, pl.Float64)).otherwise('effective_compression')
    sweep.results = sweep.results.with_columns(effective_compression=column)
    summary = tables.summary(sweep.results, sweep.layers)
    assert summary.filter(unknown)['disconnected'].is_null().all()
    assert summary.filter(~unknown)['disconnected'].is_not_null().all()
    assert tables.connectivity(sweep.results).filter(unknown).is_empty()
    assert [label for label, _ in text.effective_sentences(summary)] == ['random (uniform)']


def test_no_figure_where_nothing_was_computed(tmp_path, words_only):
    """Expectation: the page says so, and earlier figures of ours are gone."""
    sweep = Sweep(['SNIP'], [10], seeds=1, epochs=1)
    sweep.results = sweep.results.with_columns(effective_compression=pl.lit(None, pl.Float64))
    for name in ('accuracy_effective', 'effective_compression'):
        store.write_bytes(tmp_path / 'figures' / f'{name}.png', b'\x89PNG')
    made = check_page(sweep.write(tmp_path))
    assert 'Effective compression was not computed for these runs.' in made.text
    assert not list((tmp_path / 'figures').glob('*effective*'))
    assert 'disconnected run' not in made.text and 'No run was disconnected' not in made.text


def test_points_are_split_into_connected_and_disconnected_runs():
    """Expectation: NumPy over the runs of either kind; accuracy 0.1 is that of disconnected ones in
    this made-up sweep; effective is never below direct compression, whatever is averaged."""
    sweep = Sweep(RANDOM, [100, 300, 1000], gap=gap)
    frame = tables.connectivity(sweep.results)
    assert (frame['effective_compression'] >= frame['compression'] * (1 - 1e-12)).all()
    for row in frame.iter_rows(named=True):
        runs = [f'{row["label"]}-{row["target_compression"]:g}-{seed}-' for seed in range(4)]
        runs = [run for run in runs if np.isinf(sweep.effective[run]) == row['disconnected']]
        values = np.array([sweep.effective[run] for run in runs])
        assert (row['runs'], row['seeds']) == (len(runs), 4)
        assert (row['effective_low'], row['effective_high']) == (values.min(), values.max())
        assert row['accuracy'] == pytest.approx(np.mean([sweep.accuracy[run] for run in runs]))
        if row['disconnected']:
            assert row['accuracy'] == pytest.approx(0.1)
    split = frame.filter(pl.col('runs') < 4)
    assert split['label'].to_list() == ['random (uniform)'] * 2 + ['random (IGQ)'] * 2
    assert split['disconnected'].to_list() == [False, True] * 2 and split['runs'].to_list() == [
        *(3, 1),
        *(3, 1),
    ]
    assert tables.labels(frame) == RANDOM


def test_a_run_without_any_weight_is_drawn_at_its_target():
    """Expectation: an infinite direct compression has no place on an axis; its target has."""
    sweep = Sweep(['SNIP'], [10, 20], seeds=1, gap=lambda *_: np.inf)
    sweep.results = sweep.results.with_columns(
        compression=pl.when(pl.col('label') == 'SNIP').then(np.inf).otherwise('compression')
    )
    row = tables.summary(sweep.results, sweep.layers).row(1, named=True)
    assert row['compression'] == np.inf and text.number(row['compression']) == text.INFINITE
    frame = tables.connectivity(sweep.results).filter(pl.col('label') == 'SNIP')
    assert frame['compression'].to_list() == pytest.approx([10, 20])
    for drawing, _ in page.figures(sweep.results, sweep.layers).values():
        check_no_overlap(drawing)


def test_sentences_about_effective_compression():
    """Expectation: the two tables above. Over all four seeds the mean is the table's number; over
    three, its ratio to direct has the exponent 0.95: 1000 * 5.3^0.95 = 4876, 300 * 83.3^0.95 =
    20044. Aimed at c, direct is c / (1 + c / 1000), a little more where the last layer is full."""
    sweep = Sweep([*RANDOM, 'GraSP'], [10, 30, 100, 300, 1000, 3000], gap=gap)
    summary = tables.summary(sweep.results, sweep.layers)
    sentences = dict(text.effective_sentences(summary))
    assert list(sentences) == [*RANDOM, 'GraSP']
    assert sentences['random (IGQ)'] == signs(
        'effective equals direct within 5 % up to 100x; 436x at 300x; 4880x at 1000x where '
        'connected; first disconnected run at 1000x (1 of 4).'
    )
    assert sentences['random (uniform)'] == signs(
        'effective equals direct within 5 % up to 10x; 51.5x at 30x; 20000x at 300x where '
        'connected; first disconnected run at 300x (1 of 4).'
    )
    assert sentences['SynFlow'] == signs(
        'effective equals direct within 5 % up to 3000x, the largest tested.'
    )
    assert sentences['random (IGQ) to effective'] == signs(
        'pruned to a given effective compression; effective equals direct within 5 % up to 30x; '
        '100x effective at 90.9x direct; 2990x effective at 748x direct.'
    )
    for factor, words in (
        (np.inf, 'first disconnected run at 10x (4 of 4).'),
        (2.0, 'effective exceeds direct by more than 5 % already at 10x; 20x at 10x.'),
    ):
        one = Sweep(['SNIP'], [10], gap=lambda *_, factor=factor: factor)
        [(_, sentence)] = text.effective_sentences(tables.summary(one.results, one.layers))
        assert sentence == signs(words)


def drawn_lines(axes, **props):
    """Data of the lines with more than one point and these properties, `[(x, y), ...]`."""
    return [
        line.get_xydata().T
        for line in axes.lines
        if len(line.get_xdata()) > 1
        and all(getattr(line, f'get_{k}')() == v for k, v in props.items())
    ]


def test_accuracy_is_drawn_over_both_compressions():
    """Expectation: the rows of the tables; the strip holds each disconnected point once."""
    sweep = Sweep(RANDOM, [10, 100, 300, 1000], gap=gap)
    summary = tables.summary(sweep.results, sweep.layers)
    frame = tables.connectivity(sweep.results)
    drawing = effective_compression.accuracy(frame, summary, [{}], style.lines(RANDOM))
    axes, strip = drawing.axes
    for label, props in style.lines(RANDOM).items():
        solid, dashed = (
            drawn_lines(axes, color=props['color'], linestyle=kind) for kind in ('-', '--')
        )
        mine = pl.col('label') == label
        rows = frame.filter(mine, ~pl.col('disconnected'))
        [(x, y)] = solid
        assert x == pytest.approx([1, *rows['effective_compression']])
        assert y[1:] == pytest.approx(100 * rows['accuracy'].to_numpy())
        [(x, y)] = dashed
        assert x == pytest.approx([1, *summary.filter(mine)['compression']])
        assert y[1:] == pytest.approx(100 * summary.filter(mine)['accuracy'].to_numpy())
    points = [line for line in strip.lines if len(line.get_xdata()) == 1]
    assert len(points) == frame['disconnected'].sum() == 3
    half = [line.get_fillstyle() == 'left' for line in points]
    assert half == [True, False, True]
    words = check_no_overlap(drawing)
    assert f'{text.INFINITE}\ndisconnected' in words

    plain = Sweep(['SNIP', 'SynFlow'], [10, 100], seeds=1)
    frame, summary = (
        tables.connectivity(plain.results),
        tables.summary(plain.results, plain.layers),
    )
    styles = style.lines(['SNIP', 'SynFlow'])
    assert len(effective_compression.accuracy(frame, summary, [{}], styles).axes) == 1


def test_effective_is_drawn_over_direct_compression():
    """Expectation: the rows of the table; what is disconnected is in the strip above."""
    sweep = Sweep(RANDOM, [10, 100, 300, 1000], gap=gap)
    frame = tables.connectivity(sweep.results)
    # A label more in the sweep, of which nothing is known, takes no one's colour and no place.
    styles = style.lines(['unknown', *RANDOM])
    drawing = effective_compression.compressions(frame, [{}], styles)
    axes, strip = drawing.axes
    for label in RANDOM:
        rows = frame.filter(pl.col('label') == label, ~pl.col('disconnected'))
        [(x, y)] = drawn_lines(axes, color=styles[label]['color'])
        assert x == pytest.approx(rows['compression'].to_numpy())
        assert y == pytest.approx(rows['effective_compression'].to_numpy())
    cut = frame.filter('disconnected')
    places = [line.get_xdata()[0] for line in strip.lines]
    assert places == pytest.approx(cut['compression'].to_list())
    # One line of the strip per label.
    assert len({line.get_ydata()[0] for line in strip.lines}) == cut['label'].n_unique() == 2
    assert 'unknown' not in check_no_overlap(drawing)


def test_captions_say_what_differs(words_only):
    """Expectation: the four situations that the captions distinguish, one sweep each."""

    def captions(**options):
        sweep = Sweep(seeds=2, epochs=1, **options)
        drawn = page.figures(sweep.results, sweep.layers.clear())
        return [words['caption'] for _, words in drawn.values()], drawn

    (first, second, third), drawn = captions(labels=['SNIP'], grid=[10, 20])
    assert 'target' not in first and 'the dashed lines are covered' in second
    assert 'No run is more than a percent off the diagonal.' in third
    assert 'disconnected' not in second + third
    assert drawn['accuracy'][0].get_supxlabel().startswith('compression (')

    rates = [{'learning_rate': rate} for rate in (0.1, 0.01)]
    (first, second, third), drawn = captions(labels=RANDOM, grid=[10, 100], gap=gap, extra=rates)
    assert 'The target is effective compression for random (IGQ) to effective, direct' in first
    assert drawn['accuracy'][0].get_supxlabel().startswith('target compression (direct, eff')
    assert 'more than a percent' not in third and 'covered' not in second
    assert third.endswith('The same in every setting, so it is drawn once.')
    assert len(drawn['effective_compression'][0].axes) == 1
    assert len(drawn['accuracy_effective'][0].axes) == 2

    (first, _, _), drawn = captions(labels=RANDOM[2:3], grid=[10], gap=gap)
    assert 'target' not in first
    assert drawn['accuracy'][0].get_supxlabel().startswith('effective compression')


def test_table_for_the_terminal():
    """Expectation: the largest compression's effective one; `!` where a run failed."""
    sweep = Sweep(RANDOM, [100, 300], gap=gap)
    table = terminal.summary_table(tables.summary(sweep.results, sweep.layers))
    assert [column.header for column in table.columns] == [
        *('method', '1', '100', '300', 'effective at 300')
    ]
    cells = [list(column.cells) for column in table.columns]
    assert cells[4] == ['', '20048, ∞ in 1', '436', '300', '300']
    assert [cell.endswith('!') for cell in cells[3]] == [False, True, False, False, False]
    assert 'every path' in table.caption


def test_round_values():
    """Expectation: by hand."""
    assert style.round_values(1, 100) == [1, 2, 5, 10, 20, 50, 100]
    assert style.round_values(19.999, 250) == [20, 50, 100, 200]
    assert style.round_values(13, 15) == [13, 15] and style.round_values(10, 10) == [10]
    # A round value just beyond the data has its tick.
    limits, ticks = effective_compression._ends([12, 9859])
    assert limits == (12, 10000) and ticks[0] == 20 and ticks[-1] == 10000
    assert effective_compression._ends([13, 15]) == ((13, 15), [13, 15])
    values = style.round_values(1, 1000)
    wide, narrow = ([step * i for i in range(10)] for step in (30, 9))
    assert style.regular(values, wide, [20] * 10) == list(range(10))
    assert style.regular(values, narrow, [20] * 10) == [0, 3, 6, 9]


# The page


def check_page(out):
    """Writes the report of `out` and checks what holds for every report; returns the page."""
    path = report.write(out)
    assert path == out / 'report.html'
    made = Page(path)
    # Offline: every resource is inside the file.
    for tag, attributes in made.tags:
        assert tag not in ('script', 'link', 'iframe', 'object', 'embed')
        for name, value in attributes.items():
            assert not name.startswith('on')
            if name in ('src', 'srcset', 'href', 'data', 'poster', 'background'):
                assert value.startswith('data:image/png;base64,')
    content = path.read_text(encoding='utf-8')
    assert 'http://' not in content and 'https://' not in content
    assert 'url(' not in content and '@import' not in content
    images = [attributes for tag, attributes in made.tags if tag == 'img']
    files = sorted((out / 'figures').iterdir())
    assert len(images) == len(files) >= 1
    assert all(len(attributes['alt']) > 20 for attributes in images)
    assert all(file.read_bytes().startswith(b'\x89PNG') for file in files)
    return made


def test_a_finished_sweep(tmp_path, few_pixels):
    made = check_page(Sweep().spoil('GraSP-50-2-').write(tmp_path))
    names = [file.name for file in sorted((tmp_path / 'figures').iterdir())]
    assert names == [
        *('accuracy.png', 'accuracy_effective.png', 'effective_compression.png'),
        *('layers.png', 'learning_accuracy.png', 'learning_loss.png'),
    ]
    assert f'{4 + 4 * 54} of {4 + 4 * 54} runs finished.' in made.text
    assert 'made <up> & odd' in made.text
    for words in (
        'Collapsed: 3 runs lost a whole layer',
        'Disconnected: 3 runs have no path from input to output left',
        'magnitude: 200x (1 of 4), 500x (2 of 4)',
        'Diverged: 1 run ended',
        'magnitude-500-1- magnitude 500 1 dense_1/kernel',
        f'commit c0ffee diff {text.NONE} dirty False',
        'device cpu <two>',
        'seeds 0, 1, 2',
        'started tuesday',
        'seed = [0, 1, 2, 3]',
    ):
        assert signs(words) in made.text
    summary = tables.summary(store.read_results(tmp_path), store.read_layers(tmp_path))
    for row in summary.iter_rows(named=True):
        assert f'{100 * row["accuracy"]:.2f}' in made.text
    assert not list(tmp_path.rglob('*.tmp'))


@pytest.mark.more
def test_equal_sweeps_give_equal_bytes(tmp_path):
    sweep = Sweep(['SNIP'], [10], seeds=2)
    for name in 'ab':
        check_page(sweep.write(tmp_path / name))
    first, second = (tmp_path / name / 'report.html' for name in 'ab')
    assert first.read_bytes() == second.read_bytes()


def test_an_unfinished_sweep_says_so_first(tmp_path, words_only):
    made = check_page(Sweep(['SNIP', 'GraSP']).write(tmp_path, unfinished=2))
    words = made.text
    assert '63 of 76 runs finished.' in words
    assert words.index('runs finished') < words.index('Accuracy against compression')


def test_stale_figures_go_and_foreign_ones_stay(tmp_path, words_only):
    Sweep(['SNIP'], [10]).write(tmp_path)
    for name in ('layers_3.png', 'mine.png'):
        store.write_bytes(tmp_path / 'figures' / name, b'\x89PNG')
    report.write(tmp_path)
    names = {path.name for path in (tmp_path / 'figures').iterdir()}
    assert 'mine.png' in names and 'layers_3.png' not in names


@pytest.mark.more
@pytest.mark.parametrize(
    'sweep',
    [
        pytest.param(Sweep([], [], seeds=2), id='only dense'),
        pytest.param(Sweep(['SNIP'], [10], seeds=1, epochs=1), id='one of everything', marks=MORE),
        pytest.param(Sweep(['SNIP'], [10], dense=False, seeds=2), id='no dense', marks=MORE),
        pytest.param(Sweep(['SNIP'], [1, 2], seeds=2), id='method at 1', marks=MORE),
        pytest.param(
            Sweep(['SNIP'], [10, 20], seeds=2).spoil('SNIP-10-0-', 'test_accuracy'),
            id='one accuracy lost',
            marks=MORE,
        ),
        pytest.param(
            Sweep(['SNIP'], [10], seeds=1).spoil('SNIP-10-0-', 'test_accuracy'),
            id='no accuracy at all',
        ),
        pytest.param(
            Sweep(['SNIP'], [10], seeds=1).spoil('dense-1-0-', 'test_accuracy'),
            id='dense lost',
            marks=MORE,
        ),
        pytest.param(Sweep(['magnitude'], [500], seeds=2), id='all collapsed'),
    ],
)
def test_odd_sweeps(tmp_path, sweep, few_pixels):
    check_page(sweep.write(tmp_path))


def test_settings_get_a_panel_each_and_say_when_there_are_too_many(tmp_path, words_only):
    extra = [{'learning_rate': rate, 'momentum': m} for rate in (0.1, 0.01) for m in (0.0, 0.9)]
    sweep = Sweep(['SNIP'], [10, 20], seeds=2, extra=extra, epochs=1)
    made = check_page(sweep.write(tmp_path / 'four'))
    assert made.text.count('learning rate 0.01, momentum 0.9') >= 3
    assert (tmp_path / 'four' / 'figures' / 'layers_4.png').exists()

    extra = [{'learning_rate': 0.01 * i} for i in range(1, 9)]
    sweep = Sweep(['SNIP'], [10], seeds=2, extra=extra, epochs=1)
    made = check_page(sweep.write(tmp_path / 'eight'))
    assert 'Of 8 settings 6 are drawn' in made.text
    for i in range(1, 9):
        assert f'learning rate {0.01 * i:g}' in made.text
    assert not (tmp_path / 'eight' / 'figures' / 'layers_7.png').exists()


def test_nothing_finished_or_no_sweep_is_a_clear_error(tmp_path):
    out = Sweep(['SNIP'], [10]).write(tmp_path / 'sweep', unfinished=2)
    with pytest.raises(StoreError, match='no run has finished yet'):
        report.write(out)
    assert not (out / 'report.html').exists() and not (out / 'figures').exists()
    with pytest.raises(StoreError, match=r'plan\.json'):
        report.write(tmp_path)
    (out / 'spec.toml').unlink()
    with pytest.raises(StoreError, match=r'spec\.toml'):
        report.write(out)


@pytest.mark.more
def test_drawing_leaves_matplotlib_as_it_was(tmp_path):
    code = f"""
import sys
from pathlib import Path
from jaxprune.report import tables
assert 'matplotlib' not in sys.modules
import matplotlib
# Merely reading the entry 'backend' imports pyplot.
def current():
    return {{k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != 'backend'}}
matplotlib.rcParams['lines.linewidth'] = 7
before = current()
from jaxprune.report import page, style
style.DPI = 30
page.write(Path({str(tmp_path)!r}))
assert current() == before
assert 'matplotlib.pyplot' not in sys.modules
"""
    Sweep(['SNIP'], [10], seeds=2).write(tmp_path)
    subprocess.run([sys.executable, '-W', 'error', '-c', code], check=True)


# No text on text


def text_boxes(drawing):
    """`(words, box)` of every visible text of a figure, by the renderer that draws it."""
    drawing.draw_without_rendering()
    renderer = drawing.canvas.get_renderer()
    texts = [*drawing.texts]
    for legend in drawing.legends:
        texts += legend.get_texts()
    above = [child for axes in drawing.axes for child in axes.child_axes]
    for axes in [*drawing.axes, *above]:
        texts += [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if low <= tick.get_loc() <= high:
                    texts += [label for label in (tick.label1, tick.label2) if label.get_visible()]
    return [
        (item.get_text(), item.get_window_extent(renderer))
        for item in texts
        if item is not None and item.get_visible() and item.get_text().strip()
    ]


def check_no_overlap(drawing):
    boxes = text_boxes(drawing)
    assert len(boxes) > 4
    corners = np.array([box.extents for _, box in boxes])
    low, high = corners[:, None, :2], corners[:, None, 2:]
    both = np.minimum(high, high.swapaxes(0, 1)) - np.maximum(low, low.swapaxes(0, 1))
    overlap = np.argwhere(np.triu((both > 0.5).all(-1), 1))
    assert not len(overlap), [(boxes[i][0], boxes[j][0]) for i, j in overlap[:5]]
    width, height = drawing.get_size_inches() * drawing.dpi
    outside = (corners[:, :2] < -1).any(1) | (corners[:, 2:] > [width + 1, height + 1]).any(1)
    assert not outside.any(), [boxes[i][0] for i in np.flatnonzero(outside)]
    return {words for words, _ in boxes}


def some(default, more, *slow):
    """Counts to draw: by default, as further instances, and as slow tests."""
    return [
        default,
        *(pytest.param(n, marks=MORE) for n in more),
        *(pytest.param(n, marks=pytest.mark.slow) for n in slow),
    ]


def names(count):
    return [
        [*LABELS, *(f'{label}, iterative, ten rounds' for label in LABELS)][i] for i in range(count)
    ]


@pytest.mark.parametrize('count', some(12, [1, 5], 2, 3, 4, *range(6, 12)))
def test_texts_of_the_headline_do_not_touch(count):
    sweep = Sweep(names(count), seeds=2).spoil(f'{LABELS[0]}-50-0-')
    summary = tables.summary(sweep.results, sweep.layers)
    words = check_no_overlap(curves.accuracy(summary, [{}]))
    assert {'dense', *map(style.wrapped, names(count))} <= words
    # Every compression of the usual grid is labelled, and so is its sparsity.
    assert {text.number(value) for value in [1, *GRID]} <= words
    assert {'0', '50', '90', '99', '99.9'} <= words


@pytest.mark.parametrize('count', some(2, [40], 1, 5, 17))
def test_texts_of_any_grid_do_not_touch(count):
    grid = sorted({float(value) for value in np.geomspace(1.3, 12_345, count)})
    sweep = Sweep(LABELS[:3], grid, seeds=2, epochs=2)
    drawn = page.figures(sweep.results, sweep.layers)
    assert len(drawn) == 6
    for drawing, words in drawn.values():
        check_no_overlap(drawing)
        assert ('12 of 40 evenly chosen' in words['caption']) == (
            count == 40 and words['section'] == 'learning'
        )


@pytest.mark.parametrize('count', some(6, [1, 12]))
def test_texts_of_learning_curves_and_layers_do_not_touch(count):
    sweep = Sweep(names(count), seeds=2, epochs=12)
    learning = tables.learning(sweep.results)
    for column in ('test_accuracy', 'train_loss'):
        check_no_overlap(curves.learning(learning, column, 'epoch', style.lines(names(count))))
    check_no_overlap(heatmap.layers(tables.densities(sweep.results, sweep.layers))[0])


@MORE
def test_texts_of_many_settings_do_not_touch():
    extra = [{'learning_rate': 0.1 / i, 'weight_decay': 1e-4, 'momentum': 0.9} for i in range(1, 4)]
    sweep = Sweep(LABELS[:2], [10, 500, 1000], seeds=2, epochs=2, extra=extra)
    drawn = page.figures(sweep.results, sweep.layers)
    assert {'learning_loss_3', 'layers_3'} <= set(drawn)
    for name, (drawing, _) in drawn.items():
        if not name.endswith(('_2', '_3')):  # the same texts for every setting
            check_no_overlap(drawing)


@pytest.mark.more
def test_texts_of_effective_compression_do_not_touch():
    """Expectation: figures with strips at their fullest, several settings with narrow panels."""

    def cut(label, compression, seed):
        return np.inf if compression > 100 else 1.0 + seed

    labels = [*RANDOM, *names(12)[2:10]]
    rates = [{'learning_rate': rate} for rate in (0.1, 0.01, 0.001)]
    for sweep in (
        Sweep(labels, [10, 100, 1000, 10_000], seeds=2, epochs=1, gap=cut),
        Sweep(RANDOM, [10, 100, 300], seeds=4, epochs=1, gap=gap, extra=rates),
    ):
        frame, summary = (
            tables.connectivity(sweep.results),
            tables.summary(sweep.results, sweep.layers),
        )
        settings = [setting for setting, _ in tables.split(frame, tables.settings(sweep.results))]
        styles = style.lines(tables.labels(summary))
        check_no_overlap(effective_compression.accuracy(frame, summary, settings, styles))
        check_no_overlap(effective_compression.compressions(frame, settings, styles))


@pytest.mark.parametrize('count', some(13, [161]))
def test_texts_of_deep_networks_do_not_touch(count):
    paths = {f'stage_{i // 9}/block_{i % 9}/conv/kernel': 1000 * (i + 1) for i in range(count)}
    sweep = Sweep(LABELS[:2], GRID[::2], seeds=1, paths=paths)
    densities = tables.densities(sweep.results, sweep.layers)
    drawing, complete = heatmap.layers(densities)
    assert complete == (count <= 80)
    check_no_overlap(drawing)


def test_colours_markers_and_dashes_tell_a_dozen_methods_apart():
    styles = style.lines(names(12))
    assert len({(props['color'], str(props['linestyle'])) for props in styles.values()}) == 12
    assert len({props['marker'] for props in styles.values()}) == 12


def test_no_colour_deficiency_confuses_the_added_colours():
    """Expectation: distances in CIELAB after the simulation of Machado et al. (2009) at full
    severity; the first six colours of ten are Okabe's and Ito's own."""
    deficiencies = np.reshape(
        [
            *(1, 0, 0, 0, 1, 0, 0, 0, 1),
            *(0.152286, 1.052583, -0.204868, 0.114503, 0.786281, 0.099216),
            *(-0.003882, -0.048116, 1.051998),
            *(0.367322, 0.860646, -0.227968, 0.280085, 0.672501, 0.047413),
            *(-0.011820, 0.042940, 0.968881),
            *(1.255528, -0.076749, -0.178779, -0.078411, 0.930809, 0.147602),
            *(0.004733, 0.691367, 0.303900),
        ],
        (4, 3, 3),
    )
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    styles = style.lines([str(i) for i in range(10)]).values()
    colours = np.array([to_rgb(props['color']) for props in styles] + [to_rgb(style.INK)])
    light = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    assert len(np.unique(colours, axis=0)) == 11
    linear = np.clip(light @ deficiencies.swapaxes(1, 2), 0, 1)
    scaled = linear @ to_xyz.T / [0.9505, 1, 1.089]
    x, y, z = np.where(scaled > 0.008856, np.cbrt(scaled), 7.787 * scaled + 16 / 116).T
    lab = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)]).T
    apart = np.linalg.norm(lab[:, :, None] - lab[:, None], axis=-1) + 1e9 * np.eye(11)
    assert apart.min() == apart[:, :6, :6].min() > 15


def test_curves_recorded_along_training_are_drawn(words_only):
    """Expectation: the recorded steps by step, accuracy where there is any; without a record the
    evaluations as before.
    """
    sweep = Sweep(['SNIP'], [10])
    runs = sweep.results['run_id'].unique(maintain_order=True)
    last = sweep.results['step'].max()
    curves = pl.DataFrame(
        [[run, step, 1, float(step), None, None] for run in runs for step in (1, 2, last)],
        schema=store.CURVES,
        orient='row',
    )
    rows = tables.along(sweep.results, curves)
    assert tables.time_unit(rows) == 'step' and len(rows) == 3 * len(runs)
    ends = rows.filter(pl.col('step') == last).sort('run_id')
    wanted = sweep.results.filter(pl.col('step') == last).sort('run_id')
    assert ends['test_accuracy'].to_list() == wanted['test_accuracy'].to_list()
    assert ends['train_loss'].to_list() == [float(last)] * len(runs)
    assert rows.filter(pl.col('step') == 1)['test_accuracy'].null_count() == len(runs)
    assert tables.learning(rows)['time'].unique().sort().to_list() == [1, 2, last]
    assert tables.along(sweep.results, curves.clear()) is sweep.results
    drawn = page.figures(sweep.results, sweep.layers, curves)
    assert 'against the step' in drawn['learning_loss'][1]['caption']


def test_recorded_quantities_as_a_network():
    """Expectation: norms as the root of the sum of squares, rates as sums, others as means, a value
    of the whole network as it is; means over seeds, without what is not finite."""

    rows = [
        *[('a', 1, 0, path, 'weight_norm', value) for path, value in (('x', 3.0), ('y', 4.0))],
        *[('a', 1, 0, path, 'norm_rate', value) for path, value in (('x', 3.0), ('y', -4.0))],
        *[('a', 1, 0, path, 'imbalance', value) for path, value in (('x', 3.0), ('y', 4.0))],
        *[('a', 1, 0, path, 'pearson_magnitude_loss', v) for path, v in (('x', 0.3), ('*', 0.5))],
        ('b', 1, 0, '*', 'pearson_magnitude_loss', 0.7),
        ('c', 1, 0, '*', 'pearson_magnitude_loss', math.nan),
    ]
    flows = pl.DataFrame(rows, schema=store.FLOW, orient='row')
    found = recorded.whole(flows).filter(pl.col('run_id') == 'a')
    assert dict(found.select('quantity', 'value').iter_rows()) == {
        'weight_norm': 5.0, 'norm_rate': -1.0, 'imbalance': 3.5, 'pearson_magnitude_loss': 0.5
    }  # fmt: skip
    results = pl.DataFrame(
        {
            'run_id': ['a', 'b', 'c'],
            'label': ['snip'] * 3,
            'method': ['snip'] * 3,
            'target_compression': [4.0] * 3,
            'learning_rate': [0.1] * 3,
        }
    )
    mean = recorded.means(results, flows).filter(pl.col('quantity') == 'pearson_magnitude_loss')
    assert mean['value'].to_list() == [0.6]
    drawing = recorded.quantities(recorded.means(results, flows), {'snip': {'color': 'k'}})
    assert len(drawing.axes) == 4 and all(axes.has_data() for axes in drawing.axes)


def test_values_before_and_after_a_round_stay_apart():
    """Expectation: by hand: two moments at one step, no mean of the two, no training loss after."""
    rows = [('a', 10, rounds, 'x', 'weight_norm', 3.0 + rounds) for rounds in (0, 1)]
    flows = pl.DataFrame(rows, schema=store.FLOW, orient='row')
    assert recorded.whole(flows).select('rounds', 'value').rows() == [(0, 3.0), (1, 4.0)]
    results = pl.DataFrame(
        {
            'run_id': ['a'] * 2, 'label': ['magnitude'] * 2, 'method': ['magnitude'] * 2,
            'target': ['direct'] * 2, 'target_compression': [4.0] * 2, 'step': [10, 20],
            'epoch': [1, 2], 'train_loss': [1.0, 0.5], 'test_loss': [1.0, 0.5],
            'test_accuracy': [0.8, 0.9],
        }
    )  # fmt: skip
    curves = pl.DataFrame(
        [('a', 10, 0, 1.0, 1.0, 0.8), ('a', 10, 1, None, 2.0, 0.4), ('a', 20, 1, 0.5, 0.5, 0.9)],
        schema=store.CURVES,
        orient='row',
    )
    drawn = tables.learning(tables.along(results, curves))
    assert drawn.select('time', 'rounds', 'train_loss', 'test_accuracy').rows() == [
        (1, 0, 1.0, 0.8),
        (1, 1, None, 0.4),
        (2, 1, 0.5, 0.9),
    ]
