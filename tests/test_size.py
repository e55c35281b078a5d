"""Compact networks in the report: ratios against NumPy, structured beside unstructured methods."""

import itertools

import matplotlib.colors
import numpy as np
import polars as pl
import pytest
from test_report import Sweep, check_no_overlap, check_page, drawn_lines, few_pixels, words_only

from jaxprune.report import page, size, style, tables, text
from jaxprune.sweep import store

__all__ = ['few_pixels', 'words_only']  # fixtures
PARAMS, FLOPS = 266_610, 532_810
"""Of the dense network, LeNet-300-100: biases count."""

WEIGHTS, UNITS = ['SNIP', 'SynFlow'], ['magnitude (units)', 'Taylor (units)']
COLUMNS = ('params_compact', 'flops_compact', 'speedup_theoretical')


def costs(label, compression, seed):
    """Of a made-up compact network: single weights, and dense, save nothing."""
    if not label.endswith('(units)'):
        return PARAMS, FLOPS
    saved = compression ** (1 + 0.1 * seed)
    return round(PARAMS / saved), round(FLOPS / saved**0.5)


def counted(sweep, costs=costs, scale=lambda row: 1):
    """Fills in what compact networks cost; `scale` makes a setting's network larger."""
    found = []
    for row in sweep.results.iter_rows(named=True):
        params, flops = costs(row['label'], row['target_compression'], row['seed'])
        if params is None:
            found.append((None, None, None))
        else:
            found.append((scale(row) * params, scale(row) * flops, FLOPS / flops))
    schema = {name: store.RESULTS[name] for name in COLUMNS}
    columns = pl.DataFrame(found, schema=schema, orient='row')
    aims = pl.when(pl.col('label').str.ends_with('(units)')).then(pl.lit('units'))
    sweep.results = sweep.results.with_columns(
        *columns.get_columns(), target=aims.otherwise('target')
    )
    return sweep


def made(labels=(*WEIGHTS, *UNITS), grid=(2, 8), costs=costs, **options):
    return counted(Sweep(list(labels), list(grid), **({'seeds': 3, 'epochs': 1} | options)), costs)


def cut(label, compression, seed):
    """Effective over direct compression: of two labels, one seed and then all are cut in two."""
    if label == 'Taylor (units)' and compression >= 8:
        return np.inf if compression > 8 or seed == 0 else 1.0
    return np.inf if label == 'SynFlow' and compression > 8 else 1.0


def figure(sweep):
    """The figure and its words, without the other figures of the page; `(None, None)` if none."""
    results = sweep.results
    every = [
        setting for setting, _ in tables.split(tables.sizes(results), tables.settings(results))
    ]
    settings = tables.evenly(every, page.MOST_SETTINGS)
    styles = style.lines(tables.labels(tables.final(results)))
    return page._size_figure(results, settings, styles, '').get('accuracy_size', (None, None))


def markers(axes):
    """Label's colour, x and y of every point but the dense one."""
    return [
        (line.get_color(), line.get_xdata()[0], line.get_ydata()[0])
        for line in axes.lines
        if line.get_marker() != 'None' and line.get_color() != style.INK
    ]


# Tables


def test_ratios_against_numpy():
    """Expectation: NumPy over the runs that are connected, or that are not; the dense network of a
    setting, here three times as large in the second, has its own parameters."""
    extra = [{'width': 1.0}, {'width': 3.0}]
    sweep = Sweep([*WEIGHTS, *UNITS], [2, 8, 32], seeds=3, epochs=2, extra=extra, gap=cut)
    counted(sweep, scale=lambda row: int(row['width']))
    frame = tables.sizes(sweep.results)
    assert frame.columns[0] == 'width' and frame['width'].is_sorted()
    for row in frame.iter_rows(named=True):
        of_point = row['label'], row['target_compression']
        runs = {s: f'{of_point[0]}-{of_point[1]:g}-{s}-{row["width"]}' for s in range(3)}
        lost = {s: np.isinf(sweep.effective[run]) for s, run in runs.items()}
        seeds = [s for s in range(3) if lost[s] == row['disconnected']]
        assert (row['runs'], row['seeds']) == (len(seeds), 3)
        accuracy = np.mean([sweep.accuracy[runs[s]] for s in seeds])
        assert row['accuracy'] == pytest.approx(accuracy)
        if row['disconnected']:
            assert row['params_ratio'] is None and row['speedup'] is None
            continue
        found = np.array([costs(*of_point, s) for s in seeds])
        wanted = np.exp(np.log([PARAMS, FLOPS] / found).mean(0))
        assert (row['params_ratio'], row['speedup']) == pytest.approx(tuple(wanted))
    assert frame.filter('disconnected')['runs'].to_list() == [3, 1, 3] * 2
    assert tables.labels(frame) == [*WEIGHTS, *UNITS]
    # The table of the page has the same ratios.
    keys = ['width', 'label', 'target_compression']
    summary = tables.summary(sweep.results, sweep.layers)
    both = summary.join(frame.filter(~pl.col('disconnected')), on=keys, how='left')
    for ratio in ('params_ratio', 'speedup'):
        assert both[ratio].equals(both[f'{ratio}_right'].rename(ratio))
    assert both['params_ratio'].null_count() == 4


def test_what_is_not_known_is_left_out(words_only):
    """Expectation: no row without counts, and none in a setting whose control has not finished."""

    def some(label, compression, seed):
        return (None, None) if label == UNITS[0] else costs(label, compression, seed)

    sweep = made(costs=some)
    assert tables.labels(tables.sizes(sweep.results)) == [*WEIGHTS, UNITS[1]]
    extra = [{'width': 1.0}, {'width': 3.0}]
    sweep = made(extra=extra)
    late = (pl.col('width') == 3.0) & (pl.col('method') == 'dense')
    sweep.results = sweep.results.filter(~late)
    assert tables.sizes(sweep.results)['width'].unique().to_list() == [1.0]
    summary = tables.summary(sweep.results, sweep.layers)
    unknown = summary.filter(pl.col('params_ratio').is_null())
    assert unknown['width'].unique().to_list() == [3.0] and unknown['speedup'].null_count() == 0
    drawing, _ = figure(sweep)
    # A strip and two panels: one setting only.
    assert len(drawing.axes) == 3


# The figure


@pytest.fixture(scope='module')
def full():
    """A sweep with everything a figure may show, drawn once: `(sweep, drawing, words, texts)`."""
    sweep = made(grid=[2, 8, 32], gap=cut).spoil('magnitude (units)-8-1-')
    drawing, words = figure(sweep)
    return sweep, drawing, words, check_no_overlap(drawing)


def test_lines_are_the_rows_of_the_table(full):
    """Expectation: the rows of `tables.sizes`, in the colours of the other figures; what saves
    nothing is in the strip at the left and nowhere else, disconnected runs at the right."""
    sweep, drawing, _, _ = full
    left, params, speed, right = drawing.axes
    frame = tables.sizes(sweep.results)
    # The control goes across all of them.
    assert all(len(drawn_lines(axes, color=style.INK)) == 1 for axes in drawing.axes)
    styles = style.lines(tables.labels(frame))
    for label, props in styles.items():
        rows = frame.filter(pl.col('label') == label, ~pl.col('disconnected'))
        y = 100 * rows['accuracy'].to_numpy()
        for axes, ratio in ((params, 'params_ratio'), (speed, 'speedup')):
            lines = drawn_lines(axes, color=props['color'])
            points = [point[1:] for point in markers(axes) if point[0] == props['color']]
            if label in WEIGHTS:
                assert not lines and not points
                continue
            np.testing.assert_allclose(points, np.array([rows[ratio], y]).T)
            [line] = lines
            assert line[0] == pytest.approx([1, *rows[ratio]]) and line[1][1:] == pytest.approx(y)
        here = [point[2] for point in markers(left) if point[0] == props['color']]
        assert here == pytest.approx(y if label in WEIGHTS else [])
        gone = frame.filter(pl.col('label') == label, 'disconnected')
        there = [point[2] for point in markers(right) if point[0] == props['color']]
        assert there == pytest.approx(100 * gone['accuracy'].to_numpy())
    # One column of a strip per label.
    assert len({x for _, x, _ in markers(left)}) == len({x for _, x, _ in markers(right)}) == 2
    bands = [matplotlib.colors.to_hex(c.get_facecolor()[0]) for c in params.collections]
    assert bands == [styles[label]['color'].lower() for label in UNITS]


def test_its_texts_and_its_caption(full):
    """Expectation: by hand; the range of the strip by NumPy."""
    sweep, drawing, words, texts = full
    assert {'dense', *map(style.wrapped, (*WEIGHTS, *UNITS))} <= texts
    assert {f'{text.times(1)}\nas dense', f'{text.INFINITE}\ndisconnected'} <= texts
    flags = ['half-filled: only some of the seeds', 'cross: a seed diverged']
    assert set(map(style.wrapped, flags)) <= texts
    assert not drawing.axes[1].yaxis.get_label_text() and drawing.get_supylabel()
    caption = words['caption']
    assert words['section'] == 'size'
    lone = 'Masks on single weights leave the compact network as large as the dense one.'
    assert lone in caption
    stay = [('SNIP', 2), ('SNIP', 8), ('SNIP', 32), ('SynFlow', 2), ('SynFlow', 8)]
    means = [np.mean([sweep.accuracy[f'{m}-{c}-{s}-'] for s in range(3)]) for m, c in stay]
    assert f'between {100 * min(means):.1f} and {100 * max(means):.1f} %' in caption
    for part in ('Dashed: the dense', '95 % Student', 'disconnected runs', 'Half-fi', 'Crosses'):
        assert part in caption


def test_weights_that_take_a_group_along_by_chance(words_only):
    """Expectation: a point in the strip where nothing is saved, points on the axes elsewhere, and
    no line from the dense network over the strip."""

    def lucky(label, compression, seed):
        if label == 'SNIP' and compression > 2:
            return PARAMS // 2, round(FLOPS / 1.2)
        return (PARAMS - 131, FLOPS - 262) if label == 'SNIP' else costs(label, compression, seed)

    drawing, words = figure(made(['SNIP', 'SynFlow'], [2, 8, 32], lucky))
    left, params, speed = drawing.axes
    colour = style.lines(['SNIP'])['SNIP']['color']
    assert [x for c, x, _ in markers(params) if c == colour] == pytest.approx([2, 2])
    assert [x for c, x, _ in markers(speed) if c == colour] == pytest.approx([1.2, 1.2], 1e-5)
    assert len([c for c, *_ in markers(left) if c == colour]) == 1
    [(x, _)] = drawn_lines(params, color=colour)
    assert x == pytest.approx([2, 2])
    assert 'as large as the dense one, except where they happen to remove' in words['caption']
    assert 'disconnected' not in words['caption']


def test_one_seed_and_one_accuracy(words_only):
    """Expectation: no band, no interval, one number in the caption, no strip that is not needed."""
    drawing, words = figure(made(['SNIP', UNITS[0]], [8], seeds=1))
    assert 'One seed per point, so no band.' in words['caption']
    assert 'between' not in words['caption'] and ' %.' in words['caption']
    assert len(drawing.axes) == 3 and not drawing.axes[0].collections
    drawing, words = figure(made([UNITS[0]], [8]))
    assert len(drawing.axes) == 2 and 'strip' not in words['caption']
    assert 'Masks on single weights' not in words['caption']


def unknown(label, compression, seed):
    return None, None


def whole(label, compression, seed):
    return PARAMS, FLOPS


def barely(label, compression, seed):
    return (PARAMS, FLOPS) if label == 'dense' else (PARAMS - 131, FLOPS - 262)


@pytest.mark.parametrize(
    'sweep',
    [
        made(WEIGHTS),
        made(costs=unknown),
        made(costs=whole),
        made(costs=barely),
        made(dense=False),
        made(gap=lambda label, *_: np.inf if label in UNITS else 1.0),
        made(UNITS, [8], seeds=1).spoil(f'{UNITS[0]}-8-0-', 'test_accuracy')
        .spoil(f'{UNITS[1]}-8-0-', 'test_accuracy'),
        made([], []),
    ],
    ids=[
        'weights only', 'not counted', 'nothing gone', 'a unit gone', 'no control',
        'all cut in two', 'no accuracy', 'only dense',
    ],
)  # fmt: skip
def test_no_figure_where_nothing_got_smaller(sweep):
    """Expectation: a figure whose panels would be empty is not there."""
    assert figure(sweep) == (None, None)


def test_lost_accuracies_leave_the_rest(words_only):
    """Expectation: null and NaN accuracies are no points; a control without one draws no line."""
    sweep = made([UNITS[0]], [2, 8], seeds=1)
    sweep.spoil(f'{UNITS[0]}-2-0-', 'test_accuracy').spoil('dense-1-0-', 'test_accuracy', None)
    drawing, words = figure(sweep)
    params, _ = drawing.axes
    assert [x for _, x, _ in markers(params)] == pytest.approx([8], rel=1e-4)
    assert 'dense control' not in words['caption']
    assert [line for line in params.lines if line.get_color() == style.INK] == []


def test_older_sweeps_and_the_page(tmp_path, words_only):
    """Expectation: files without the columns make the page they made; with them the page has the
    figure after the headline, and the ratio in its table; a figure that is stale goes."""
    sweep = made()
    check_page(sweep.write(tmp_path / 'new'))
    made_page = check_page(tmp_path / 'new')
    words = made_page.text
    ids = [attributes['id'] for tag, attributes in made_page.tags if tag == 'figure']
    assert ids[:3] == ['accuracy', 'accuracy_size', 'accuracy_effective']
    assert 'Size of the compact network' in words
    assert 'target direct effective compact' in words
    assert f'{UNITS[0]} 8' in words
    ratio = np.exp(np.mean([np.log(PARAMS / costs(UNITS[0], 8, s)[0]) for s in range(3)]))
    assert f' {text.number(ratio)} ' in words

    old = tmp_path / 'old'
    store.write_bytes(old / 'figures' / 'accuracy_size.png', b'\x89PNG')
    Sweep(['SNIP'], [10], seeds=2).write(old)
    for path in (old / 'results').iterdir():
        pl.read_parquet(path).drop(COLUMNS).write_parquet(path)
    words = check_page(old).text
    assert not (old / 'figures' / 'accuracy_size.png').exists()
    assert 'compact' not in words and 'speedup' not in words


def test_many_settings(words_only):
    """Expectation: a line of panels for each of the six settings that are drawn."""
    extra = [{'learning_rate': 0.01 * i} for i in range(1, 9)]
    sweep = made(['SNIP', UNITS[0]], [8], extra=extra)
    drawing, words = page.figures(sweep.results, sweep.layers.clear())['accuracy_size']
    assert len(drawing.axes) == 3 * page.MOST_SETTINGS
    assert words['caption'].endswith('Of 8 settings 6 are drawn, evenly chosen; the table has all.')
    titles = [axes.get_title(loc='left') for axes in drawing.axes]
    assert [t for t in titles if t] == [f'learning rate {0.01 * i:g}' for i in (1, 2, 4, 5, 7, 8)]


def test_texts_do_not_touch_where_there_is_little_room():
    """Expectation: both strips at their fullest, long names, two settings with long names."""
    methods = itertools.product(('SNIP', 'magnitude', 'SynFlow'), ('weights', 'units'))
    labels = [f'{name}, ten rounds ({kind})' for name, kind in methods]
    extra = [{'learning_rate': 0.1 / i, 'weight_decay': i / 9, 'momentum': i / 7} for i in (1, 3)]

    def cut(label, compression, seed):
        return np.inf if compression > 8 else 1.0

    check_no_overlap(figure(made(labels, [2, 8, 12_345], extra=extra, seeds=2, gap=cut))[0])


def test_equal_sweeps_give_equal_bytes(monkeypatch):
    monkeypatch.setattr(style, 'DPI', 40)
    drawn = [figure(made([WEIGHTS[0], UNITS[0]], [8], seeds=2))[0] for _ in range(2)]
    first, second = map(style.png, drawn)
    assert first == second


@pytest.mark.parametrize(
    ('high', 'end', 'ticks'),
    [
        (1.02, 1.1, [1, 1.1]),
        (1.43, 1.5, [1, 1.1, 1.2, 1.3, 1.4, 1.5]),
        (2.44, 2.5, [1, 1.2, 1.5, 2, 2.5]),
        (4.5, 4.5, [1, 1.5, 2, 3, 4]),
        (9.9, 10, [1, 1.5, 2, 3, 4, 6, 8, 10]),
        (53, 53, [1, 2, 5, 10, 20, 50]),
        (985, 1000, [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]),
    ],
)
def test_ticks_of_small_and_large_ratios(high, end, ticks):
    """Expectation: by hand: two ticks at least, and an end that is a round value if one is near."""
    found = size._ticks(high)
    assert found[0] == pytest.approx(end) and found[1] == pytest.approx(ticks)
