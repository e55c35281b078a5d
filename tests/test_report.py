"""Reports of made-up sweeps: numbers against NumPy, pages that stand alone, no text on text."""

import html.parser
import itertools
import subprocess
import sys

import numpy as np
import polars as pl
import pytest

from jaxprune import report
from jaxprune.errors import StoreError
from jaxprune.report import curves, heatmap, page, style, tables, text
from jaxprune.stats import bootstrap_interval
from jaxprune.sweep import store

PATHS = {'dense_0/kernel': 235_200, 'dense_1/kernel': 30_000, 'dense_2/kernel': 1_000}
LABELS = ['random (uniform)', 'random (ERK)', 'magnitude', 'SNIP', 'GraSP', 'SynFlow']
GRID = [2, 5, 10, 20, 50, 100, 200, 500, 1000]


class Sweep:
    """A made-up sweep: frames, and the accuracies and counts they were made from."""

    def __init__(
        self, labels=LABELS, grid=GRID, seeds=4, epochs=3, *, dense=True, extra=({},), paths=PATHS
    ):
        rng = np.random.default_rng(0)
        self.accuracy, self.kept, rows, leaves = {}, {}, [], []
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
                self.accuracy[run], self.kept[run] = accuracy, kept
                leaves += [(run, *leaf) for leaf in zip(paths, paths.values(), kept, strict=True)]
                row = {
                    'run_id': run,
                    'model': 'lenet_300_100',
                    'dataset': 'mnist',
                    'label': label,
                    'method': label.partition(' ')[0].lower(),
                    'allocation': 'global',
                    'seed': seed,
                    'target_compression': compression,
                    'density': 1 / compression,
                    'compression': total / sum(kept),
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
            frames = self.results.filter(mine), self.layers.filter(mine)
            store.write_chunk(out, chunk['id'], *frames)
        sessions = [{'started': 'monday', 'runs': 3}, {'started': 'tuesday', 'runs': 4}]
        provenance = {
            'versions': {'jax': '0.10.2'},
            'git': {'commit': 'c0ffee', 'dirty': False, 'diff': None},
            'device': 'cpu <two>',
            'seeds': [0, 1, 2],
            'sessions': sessions,
            'nothing': {},
        }
        store.write_json(out / 'provenance.json', provenance)
        store.write_bytes(out / 'spec.toml', b'name = "made up"\n[grid]\nseed = [0, 1, 2, 3]\n')
        return out


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
        assert bounds == pytest.approx(bootstrap_interval(accuracy))
        assert row['compression'] == pytest.approx((sum(PATHS.values()) / kept.sum(1)).mean())
        assert row['collapsed'] == (kept == 0).any(1).sum()
        assert row['diverged'] == 0
        if row['method'] == 'dense':
            assert row['deficit'] is None and row['pairs'] == 0
            continue
        assert row['pairs'] == 4
        assert row['deficit'] == pytest.approx((dense - accuracy).mean())
        bounds = row['deficit_low'], row['deficit_high']
        assert bounds == pytest.approx(bootstrap_interval(dense - accuracy))
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
        ('A', 2.0, 0.002, 0, 0),
        ('A', 5.0, 0.013, 0, 0),
        ('A', 10.0, 0.01, 0, 0),
        ('A', 20.0, 0.05, 2, 0),
        ('A', 50.0, 0.8, 4, 0),
        ('B', 2.0, 0.3, 0, 0),
        ('B', 5.0, None, 0, 4),
        ('C', 2.0, -0.01, 0, 0),
    ]
    columns = ['label', 'target_compression', 'deficit', 'collapsed', 'diverged']
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
    }
    assert (second['within_1'], second['within_5'], second['collapsed']) == (None, None, None)
    assert (third['within_1'], third['tested']) == (2.0, 2.0)
    sentences = dict(text.breaking_sentences(tables.breaking_points(summary)))
    assert sentences['A'] == (
        'within 1 point of dense up to 10\N{MULTIPLICATION SIGN} (though not at '
        '5\N{MULTIPLICATION SIGN}); within 5 points of dense up to 20\N{MULTIPLICATION SIGN}; '
        'first run with an empty layer at 20\N{MULTIPLICATION SIGN}.'
    )
    assert sentences['B'].startswith('at no compression tested within 1 point of dense;')
    assert 'the largest tested' in sentences['C']


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


def test_a_finished_sweep(tmp_path):
    made = check_page(Sweep().spoil('GraSP-50-2-').write(tmp_path))
    names = [file.name for file in sorted((tmp_path / 'figures').iterdir())]
    assert names == ['accuracy.png', 'layers.png', 'learning_accuracy.png', 'learning_loss.png']
    assert f'{4 + 4 * 54} of {4 + 4 * 54} runs finished.' in made.text
    assert 'made <up> & odd' in made.text
    for words in (
        'Collapsed: 3 runs lost a whole layer',
        'Diverged: 1 run ended',
        'magnitude-500-1- magnitude 500 1 dense_1/kernel',
        f'commit c0ffee diff {text.NONE} dirty False',
        'device cpu <two>',
        'seeds 0, 1, 2',
        'started tuesday',
        'seed = [0, 1, 2, 3]',
    ):
        assert words in made.text
    summary = tables.summary(store.read_results(tmp_path), store.read_layers(tmp_path))
    for row in summary.iter_rows(named=True):
        assert f'{100 * row["accuracy"]:.2f}' in made.text
    assert not list(tmp_path.rglob('*.tmp'))


def test_equal_sweeps_give_equal_bytes(tmp_path):
    sweep = Sweep(['SNIP', 'GraSP'], [10, 100])
    first, second = (report.write(sweep.write(tmp_path / name)) for name in 'ab')
    assert first.read_bytes() == second.read_bytes()


def test_an_unfinished_sweep_says_so_first(tmp_path):
    made = check_page(Sweep(['SNIP', 'GraSP']).write(tmp_path, unfinished=2))
    words = made.text
    assert '63 of 76 runs finished.' in words
    assert words.index('runs finished') < words.index('Accuracy against compression')


def test_stale_figures_go_and_foreign_ones_stay(tmp_path):
    Sweep(['SNIP'], [10]).write(tmp_path)
    for name in ('layers_3.png', 'mine.png'):
        store.write_bytes(tmp_path / 'figures' / name, b'\x89PNG')
    report.write(tmp_path)
    names = {path.name for path in (tmp_path / 'figures').iterdir()}
    assert 'mine.png' in names and 'layers_3.png' not in names


@pytest.mark.parametrize(
    'sweep',
    [
        Sweep([], [], seeds=2),
        Sweep(['SNIP'], [10], seeds=1, epochs=1),
        Sweep(['SNIP'], [10], dense=False, seeds=2),
        Sweep(['SNIP'], [1, 2], seeds=2),
        Sweep(['SNIP'], [10, 20], seeds=2).spoil('SNIP-10-0-', 'test_accuracy'),
        Sweep(['SNIP'], [10], seeds=1).spoil('SNIP-10-0-', 'test_accuracy'),
        Sweep(['SNIP'], [10], seeds=1).spoil('dense-1-0-', 'test_accuracy'),
        Sweep(['magnitude'], [500], seeds=2),
    ],
    ids=[
        'only dense',
        'one of everything',
        'no dense',
        'method at 1',
        'one accuracy lost',
        'no accuracy at all',
        'dense lost',
        'all collapsed',
    ],
)
def test_odd_sweeps(tmp_path, sweep):
    check_page(sweep.write(tmp_path))


def test_settings_get_a_panel_each_and_say_when_there_are_too_many(tmp_path):
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
from jaxprune import report
report.write(Path({str(tmp_path)!r}))
assert current() == before
assert 'matplotlib.pyplot' not in sys.modules
"""
    Sweep(['SNIP'], [10], seeds=1).write(tmp_path)
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


def names(count):
    return [
        [*LABELS, *(f'{label}, iterative, ten rounds' for label in LABELS)][i] for i in range(count)
    ]


@pytest.mark.parametrize('count', range(1, 13))
def test_texts_of_the_headline_do_not_touch(count):
    sweep = Sweep(names(count), seeds=2).spoil(f'{LABELS[0]}-50-0-')
    summary = tables.summary(sweep.results, sweep.layers)
    words = check_no_overlap(curves.accuracy(summary, [{}]))
    assert {'dense', *map(style.wrapped, names(count))} <= words
    # Every compression of the usual grid is labelled, and so is its sparsity.
    assert {text.number(value) for value in [1, *GRID]} <= words
    assert {'0', '50', '90', '99', '99.9'} <= words


@pytest.mark.parametrize('count', [1, 2, 5, 17, 40])
def test_texts_of_any_grid_do_not_touch(count):
    grid = sorted({float(value) for value in np.geomspace(1.3, 12_345, count)})
    sweep = Sweep(LABELS[:3], grid, seeds=2, epochs=2)
    drawn = page.figures(sweep.results, sweep.layers)
    assert len(drawn) == 4
    for drawing, words in drawn.values():
        check_no_overlap(drawing)
        assert ('12 of 40 evenly chosen' in words['caption']) == (
            count == 40 and words['section'] == 'learning'
        )


@pytest.mark.parametrize('count', [1, 6, 12])
def test_texts_of_learning_curves_and_layers_do_not_touch(count):
    sweep = Sweep(names(count), seeds=2, epochs=12)
    for drawing, _ in page.figures(sweep.results, sweep.layers).values():
        check_no_overlap(drawing)


def test_texts_of_many_settings_do_not_touch():
    extra = [{'learning_rate': 0.1 / i, 'weight_decay': 1e-4, 'momentum': 0.9} for i in range(1, 4)]
    sweep = Sweep(LABELS[:2], [10, 500, 1000], seeds=2, epochs=2, extra=extra)
    for drawing, _ in page.figures(sweep.results, sweep.layers).values():
        check_no_overlap(drawing)


@pytest.mark.parametrize('count', [13, 161])
def test_texts_of_deep_networks_do_not_touch(count):
    paths = {f'stage_{i // 9}/block_{i % 9}/conv/kernel': 1000 * (i + 1) for i in range(count)}
    sweep = Sweep(LABELS[:2], GRID[::2], seeds=1, paths=paths)
    densities = tables.densities(sweep.results, sweep.layers)
    drawing, complete = heatmap.layers(densities)
    assert complete == (count <= 80)
    check_no_overlap(drawing)


def test_colours_markers_and_dashes_tell_a_dozen_methods_apart():
    looks = style.lines(names(12))
    assert len({(look['color'], str(look['linestyle'])) for look in looks.values()}) == 12
    assert len({look['marker'] for look in looks.values()}) == 12
