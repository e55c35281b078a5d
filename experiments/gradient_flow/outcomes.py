"""The outcomes that the study expects, checked on finished sweeps and measures.

    cd experiments/gradient_flow && python outcomes.py ../../runs/lenet5 ../../runs/vgg13

Each directory is a finished sweep of this folder; the tables of `measures.py` lie in the directory
of the same name with `_measures` behind it. Prints markdown (`--out` writes it), and draws
`accuracy.png`, `correlations.png`, `scatter.png`, `removal.png` and `norms.png` beside it.

An expectation "holds" if the 95 % interval of the mean difference over seeds, paired by seed, lies
on its side of zero, is "reversed" if it lies on the other, and "open" otherwise. Intervals are
Student's; nothing is corrected for how many there are.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from measures import beside

from jaxprune.errors import JaxpruneError
from jaxprune.report import markdown, style, tables
from jaxprune.sweep import store

MEASURES = [
    'magnitude',
    'loss',
    'biased loss',
    'increase, T = 200',
    'increase, T = 1',
    'preservation',
]
INCREASES = ('increase, T = 200', 'increase, T = 1')
OTHERS = tuple(m for m in MEASURES if m not in INCREASES)
ROUNDS = (1, 5)
NAMES = {
    'lenet300100': 'LeNet-300-100',
    'lenet5': 'LeNet-5',
    'vgg13': 'VGG-13',
    'mobilenet': 'MobileNet',
    'resnet56': 'ResNet-56',
}
#: Pair of measures -> what it is called.
PAIRS = {
    'magnitude, loss': ('spearman', 'Σ|θ g| with ‖θ‖²: rank correlation'),
    'θᵀg, θᵀHg': ('pearson', 'θᵀHg with θᵀg: correlation'),
    'θᵀg, θᵀHg, both T = 200': ('pearson', 'θᵀHg with θᵀg, both at T = 200: correlation'),
    'θᵀg, θᵀHg, T = 1 and 200': ('pearson', 'θᵀHg at T = 200 with θᵀg at T = 1: correlation'),
}


HEAD = """# Outcomes of the study, one by one

"Holds" and "reversed": the 95 % interval (Student's) of the mean difference over seeds, paired by
seed, lies above or below zero; else "open". One in twenty such intervals misses; nothing is
corrected for how many there are. The nets and their recipe: [README](README.md)."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('directories', nargs='+', type=Path, help='finished sweeps')
    parser.add_argument('--out', type=Path, default=Path('outcomes.md'), help='a markdown file')
    arguments = parser.parse_args()
    try:
        frames = load(arguments.directories)
    except JaxpruneError as error:
        raise SystemExit(str(error)) from None
    nets = [net for net in NAMES if net in set(frames['runs']['net'])]
    parts = [
        final_accuracy(frames, nets),
        convergence(frames, nets),
        correlations(frames, nets),
        right_after(frames, nets),
        early_layers(frames, nets),
        norms(frames, nets),
    ]
    text = '\n\n'.join([HEAD, *parts]) + '\n'
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text)
    for name, draw in FIGURES.items():
        path = arguments.out.with_name(f'{name}.png')
        path.write_bytes(draw(frames, nets))
        print(f'figure: {path}')
    print(text)
    return 0


def load(directories: Sequence[Path]) -> dict[str, pl.DataFrame]:
    """Table -> rows of all nets; `runs` has one row per run and evaluation."""
    parts: dict[str, list[pl.DataFrame]] = {}
    nets: list[str] = []

    def add(name: str, frame: pl.DataFrame) -> None:
        parts.setdefault(name, []).append(frame)

    for directory in directories:
        results = store.read_results(directory)
        if (net := results['model'][0]) not in NAMES:
            raise SystemExit(f'{directory}: {net} is none of {", ".join(NAMES)}')
        if net in nets:
            raise SystemExit(f'{directory}: another sweep of {net}: give every network once')
        nets.append(net)
        if broken := results.filter(pl.col('error').is_not_null()).height:
            raise SystemExit(f'{directory}: {broken} rows have no valid mask')
        named = results.select(
            'run_id', 'seed', 'epoch', 'train_loss', 'test_loss', 'compression',
            net='model', label='label', accuracy=100 * pl.col('test_accuracy'),
        )  # fmt: skip
        split = pl.col('label').str.extract_groups(r'^(?<measure>.*), (?<rounds>\d+)$')
        add('runs', named.with_columns(split.alias('split')).unnest('split').with_columns(
            measure=pl.when(pl.col('label') == tables.DENSE).then(pl.lit('dense'))
            .otherwise('measure'),
            rounds=pl.col('rounds').cast(pl.Int64),
        ))  # fmt: skip
        check_whole(directory, parts['runs'][-1])
        kinds = results.select('run_id', net='model').unique()
        add('flow', store.read_flow(directory).join(kinds, on='run_id'))
        measures = beside(directory)
        for name in ('agreement', 'pruned', 'removed', 'filters'):
            if not (measures / f'{name}.parquet').exists():
                raise SystemExit(f'{measures}: no {name}.parquet: run measures.py first')
            add(name, pl.read_parquet(measures / f'{name}.parquet'))
    return {name: pl.concat(found, how='diagonal_relaxed') for name, found in parts.items()}


def check_whole(directory: Path, runs: pl.DataFrame) -> None:
    """Differences are paired by seed: all of them must be there for every measure."""
    ends = runs.filter(pl.col('epoch') == pl.col('epoch').max())
    arms = ends.group_by('measure', 'rounds').agg(pl.col('seed').sort())
    expected = 1 + len(MEASURES) * len(ROUNDS)
    if arms.height < expected or arms['seed'].n_unique() > 1:
        raise SystemExit(f'{directory}: some runs are missing: finish the sweep')
    if len(arms['seed'][0]) < 2:
        raise SystemExit(f'{directory}: intervals need two seeds or more')


# --- the list ---------------------------------------------------------------------------------


def final_accuracy(frames: dict[str, pl.DataFrame], nets: Sequence[str]) -> str:
    """Outcome 1."""
    last = _last(frames['runs'])
    rows = []
    for net in nets:
        here = last.filter(pl.col('net') == net)
        dense = here.filter(pl.col('measure') == 'dense')['accuracy'].mean()
        for rounds in ROUNDS:
            means = [
                here.filter((pl.col('measure') == m) & (pl.col('rounds') == rounds))['accuracy']
                for m in MEASURES
            ]
            cells = [markdown.spread(m.to_numpy()) for m in means]
            rows.append([NAMES[net], rounds, f'{dense:.2f}', *cells])
    lines = [
        '## 1. Final accuracy',
        '',
        markdown.table(['net', 'rounds', 'dense', *MEASURES], rows),
        '',
    ]
    for better, worse in (
        ('biased loss', 'loss'),
        ('preservation', 'increase, T = 200'),
        ('preservation', 'increase, T = 1'),
    ):
        lines.append(f'- **{better} above {worse}** (points):')
        for net in nets:
            for rounds in ROUNDS:
                one, other = (_by_seed(last, net, m, rounds, 'accuracy') for m in (better, worse))
                lines.append(f'  - {NAMES[net]}, rounds {rounds}: {markdown.verdict(one - other)}')
    lines.append('- **more rounds help** (points from 1 round to 5):')
    for net in nets:
        gains = []
        for m in MEASURES:
            one, five = (_by_seed(last, net, m, rounds, 'accuracy') for rounds in ROUNDS)
            gains.append(f'{m} {markdown.difference(five - one)}')
        lines.append(f'  - {NAMES[net]}: ' + '; '.join(gains))
    lines.append(
        '- **more rounds narrow the gaps** (best less worst of the four measures but increase; '
        'points from 5 rounds to 1):'
    )
    for net in nets:
        found = np.array(
            [[_by_seed(last, net, m, rounds, 'accuracy') for m in OTHERS] for rounds in ROUNDS]
        )
        one, five = np.ptp(found, axis=1)
        lines.append(f'  - {NAMES[net]}: {markdown.verdict(one - five)}')
    return '\n'.join(lines)


def convergence(frames: dict[str, pl.DataFrame], nets: Sequence[str]) -> str:
    """Outcome 2."""
    sums = _training_sums(frames['runs'])
    lines = [
        '## 2. Who converges fastest',
        '',
        'Sum of the mean training losses of the epochs after the last round, small = fast.',
        '',
    ]
    rows, verdicts = [], []
    for net in nets:
        for rounds in ROUNDS:
            found = {m: _by_seed(sums, net, m, rounds, 'total') for m in MEASURES}
            rows.append([NAMES[net], rounds, *(f'{found[m].mean():.2f}' for m in MEASURES)])
            order = sorted(MEASURES, key=lambda m: found[m].mean())
            best = next(m for m in order if m not in ('magnitude', 'biased loss'))
            for measure in ('magnitude', 'biased loss'):
                verdict = markdown.verdict(found[best] - found[measure])
                verdicts.append(
                    f'  - {NAMES[net]}, rounds {rounds}, {measure}: place '
                    f'{order.index(measure) + 1} of 6; against {best}: {verdict}'
                )
    lines += [markdown.table(['net', 'rounds', *MEASURES], rows), '']
    lines.append('- **faster than the fastest of the other four** (sum of losses):')
    return '\n'.join([*lines, *verdicts])


def correlations(frames: dict[str, pl.DataFrame], nets: Sequence[str]) -> str:
    """Outcome 3."""
    rows = []
    for net in nets:
        for pair, (kind, title) in PAIRS.items():
            for level in ('weight', 'filter'):
                found = _agreements(frames['agreement'], net, pair, level, kind)
                layers = _agreements(frames['agreement'], net, pair, level, kind, layers=True)
                cells = [
                    f'{v.mean():.2f} ({v.min():.2f} to {v.max():.2f}); {within.mean():.2f}'
                    for (_, v), (_, within) in zip(found, layers, strict=True)
                ]
                rows.append([NAMES[net], title, level, *cells])
    stages = ['before training', 'after 1 epoch', 'half-way', 'at the end']
    head = ['net', 'measures', 'of each', *stages]
    return '\n'.join(
        ['## 3. Correlations along dense training', '', 'All layers together: mean and range over '
         'seeds; then the mean of the layers, each on its own.', '', markdown.table(head, rows)]
    )  # fmt: skip


def right_after(frames: dict[str, pl.DataFrame], nets: Sequence[str]) -> str:
    """Outcome 4."""
    rows, growing, most = [], [], []
    for net in nets:
        here = frames['pruned'].filter(pl.col('net') == net).sort('seed')
        for epoch in sorted(set(here['epoch'])):
            then = here.filter(pl.col('epoch') == epoch)
            cells = []
            for measure in MEASURES:
                of = then.filter(pl.col('measure') == measure)
                cells.append(f'{of["loss"].mean():.2f} / {100 * of["accuracy"].mean():.1f}')
            dense = f'{then["dense_loss"].mean():.2f} / {100 * then["dense_accuracy"].mean():.1f}'
            rows.append([NAMES[net], epoch, dense, *cells])
        raised = {
            (epoch, m): (of['loss'] - of['dense_loss']).to_numpy()
            for (epoch, m), of in here.group_by('epoch', 'measure')
        }
        _, early, _, end = sorted(set(here['epoch']))
        more = [f'{m} {markdown.difference(raised[end, m] - raised[early, m])}' for m in MEASURES]
        growing.append(f'  - {NAMES[net]}: ' + '; '.join(more))
        for epoch, measure in itertools.product((early, end), INCREASES):
            worst = max(OTHERS, key=lambda m: raised[epoch, m].mean())
            verdict = markdown.verdict(raised[epoch, measure] - raised[epoch, worst])
            most.append(
                f'  - {NAMES[net]}, after {epoch} epochs, {measure}: against {worst}: {verdict}'
            )
    head = ['net', 'epochs trained', 'dense', *MEASURES]
    return '\n'.join(
        ['## 4. Right after pruning in one shot, before any retraining', '',
         'Test loss / test accuracy (%), means over seeds.', '', markdown.table(head, rows), '',
         '- **what pruning adds to the test loss grows with training** (from after 1 epoch to the '
         'end):', *growing,
         '- **increase raises the loss most** (against the worst of the four others):',
         *most]
    )  # fmt: skip


def early_layers(frames: dict[str, pl.DataFrame], nets: Sequence[str]) -> str:
    """Outcome 5."""
    rows, verdicts = [], []
    for net in nets:
        shares = _early_shares(frames['removed'].filter(pl.col('net') == net)).sort('seed')
        stages = sorted(set(shares['epoch']))
        for epoch in stages:
            then = shares.filter(pl.col('epoch') == epoch)
            found = {m: then.filter(pl.col('measure') == m)['early'].to_numpy() for m in MEASURES}
            overall = then['overall'].to_numpy().mean()
            cells = [f'{found[m].mean():.0f}' for m in MEASURES]
            rows.append([NAMES[net], epoch, f'{overall:.0f}', *cells])
            if epoch not in (stages[1], stages[-1]):
                continue
            for measure in INCREASES:
                differences = [f'all layers {markdown.difference(found[measure] - overall, 1)}']
                differences += [
                    f'{m} {markdown.difference(found[measure] - found[m], 1)}' for m in OTHERS
                ]
                verdicts.append(
                    f'  - {NAMES[net]}, after {epoch} epochs, {measure}: ' + '; '.join(differences)
                )
    lines = [
        '## 5. Which layers lose their filters',
        '',
        'Share of the filters of the first half of the layers that one-shot pruning removes (%), '
        'and of all layers, the same for every measure.',
        '',
        markdown.table(['net', 'epochs trained', 'all layers', *MEASURES], rows),
        '',
        '- **increase removes mostly early layers** (points, against the share of all layers and '
        'against what the other measures remove of the early ones):',
        *verdicts,
    ]
    return '\n'.join(lines)


def norms(frames: dict[str, pl.DataFrame], nets: Sequence[str]) -> str:
    """Outcome 6."""
    whole, last = _network_norms(frames), _last(frames['runs'])
    rows = []
    for net in nets:
        left = [100 / _by_seed(last, net, measure, 1, 'compression').mean() for measure in MEASURES]
        rows.append([NAMES[net], 'weights left (%)', '', 100, *(f'{share:.3g}' for share in left)])
        for quantity, title in QUANTITIES.items():
            here = whole.filter((pl.col('net') == net) & (pl.col('quantity') == quantity))
            steps = sorted(set(here['step']))
            for name, step in (
                ('after the first pruned epoch', steps[1]),
                ('at the end', steps[-1]),
            ):
                then = here.filter((pl.col('step') == step) & (pl.col('rounds').fill_null(1) == 1))
                value = dict(then.group_by('measure').agg(pl.col('value').mean()).iter_rows())
                cells = [f'{value[m]:.3g}' for m in ('dense', *MEASURES)]
                rows.append([NAMES[net], title, name, *cells])
    head = ['net', 'of the weights in force', '', 'dense', *MEASURES]
    return '\n'.join(
        [
            '## 6. Norms',
            '',
            'Pruned in one round; means over seeds. Measures keep equally many filters, not '
            'weights, so sums over weights differ for that alone.',
            '',
            markdown.table(head, rows),
        ]
    )


QUANTITIES = {
    'weight_norm': '‖w‖',
    'distance_from_initial': '‖w - w(0)‖',
    'gradient_norm': '‖g‖',
}


# --- helpers ----------------------------------------------------------------------------------


def _last(runs: pl.DataFrame) -> pl.DataFrame:
    return runs.filter(pl.col('epoch') == pl.col('epoch').max().over('net'))


def _by_seed(frame: pl.DataFrame, net: str, measure: str, rounds: int, column: str) -> np.ndarray:
    found = frame.filter(
        (pl.col('net') == net) & (pl.col('measure') == measure) & (pl.col('rounds') == rounds)
    )
    return found.sort('seed')[column].to_numpy()


def _training_sums(runs: pl.DataFrame) -> pl.DataFrame:
    after = runs.filter(pl.col('rounds').is_not_null() & (pl.col('epoch') > pl.col('rounds')))
    return after.group_by('net', 'measure', 'rounds', 'seed').agg(total=pl.col('train_loss').sum())


def _agreements(
    frame: pl.DataFrame, net: str, pair: str, level: str, kind: str, *, layers: bool = False
) -> list[tuple[int, np.ndarray]]:
    """Epoch -> a value per seed: of all layers together, or the mean over layers."""
    here = frame.filter(
        (pl.col('net') == net)
        & (pl.col('pair') == pair)
        & (pl.col('level') == level)
        & (pl.col('kind') == kind)
        & ((pl.col('path') != '*') if layers else (pl.col('path') == '*'))
    )
    means = here.group_by('epoch', 'seed').agg(pl.col('value').mean()).sort('epoch', 'seed')
    return [
        (epoch, of['value'].to_numpy())
        for (epoch,), of in means.group_by('epoch', maintain_order=True)
    ]


def _early_shares(removed: pl.DataFrame) -> pl.DataFrame:
    """Percent removed of the first half of the layers, and of all."""
    half = (removed['depth'].max() + 1) / 2
    share = 100 * pl.col('removed').sum() / pl.col('units').sum()
    by = removed.group_by('epoch', 'measure', 'seed')
    early = removed.filter(pl.col('depth') < half).group_by('epoch', 'measure', 'seed')
    return early.agg(early=share).join(by.agg(overall=share), on=['epoch', 'measure', 'seed'])


def _network_norms(frames: dict[str, pl.DataFrame]) -> pl.DataFrame:
    """Norms over all layers together, per run and step."""
    runs = frames['runs'].select('run_id', 'measure', 'rounds', 'seed').unique()
    wanted = frames['flow'].filter(pl.col('quantity').is_in(list(QUANTITIES)))
    whole = wanted.group_by('net', 'run_id', 'step', 'quantity').agg(
        value=(pl.col('value') ** 2).sum().sqrt()
    )
    return whole.join(runs, on='run_id')


# --- figures ----------------------------------------------------------------------------------

STAGES = ('start', '1 epoch', 'half', 'end')


def draw_accuracy(frames: dict[str, pl.DataFrame], nets: Sequence[str]) -> bytes:
    """Final accuracy of every measure, and training losses after pruning in one round."""
    last, styles = _last(frames['runs']), style.lines(MEASURES)
    with style.context():
        drawing = style.figure(style.WIDTH, 0.5 + 2.7 * len(nets))
        grid = drawing.add_gridspec(len(nets), 2, width_ratios=[1.25, 1])
        for row, net in enumerate(nets):
            axes = drawing.add_subplot(grid[row, 0])
            dense = last.filter((pl.col('net') == net) & (pl.col('measure') == 'dense'))['accuracy']
            axes.axvline(dense.mean(), color=style.INK, linewidth=0.8)
            for place, measure in enumerate(MEASURES):
                for rounds, shift in ((1, -0.17), (5, 0.17)):
                    values = _by_seed(last, net, measure, rounds, 'accuracy')
                    filled = styles[measure]['color'] if rounds == 5 else 'white'
                    axes.plot(values, np.full(len(values), place + shift), 'o', markersize=4.5,
                              color=styles[measure]['color'], markerfacecolor=filled)  # fmt: skip
                    axes.plot([values.mean()] * 2, [place + shift - 0.13, place + shift + 0.13],
                              color=styles[measure]['color'], linewidth=1.6)  # fmt: skip
            axes.set_yticks(range(len(MEASURES)), MEASURES)
            axes.invert_yaxis()
            axes.set_title(f'{NAMES[net]}: 1 round (open), 5 rounds (filled); line: dense')
            axes.set_xlabel('test accuracy at the end (%)')
            right = drawing.add_subplot(grid[row, 1])
            here = frames['runs'].filter(
                (pl.col('net') == net) & (pl.col('rounds').fill_null(1) == 1)
            )
            _curves(right, here, styles, 'epoch', 'train_loss')
            right.set_yscale('log')
            right.set_title(f'{NAMES[net]}: training loss, pruned in 1 round')
            right.set_xlabel('epoch (pruned after the first)')
        _legend(drawing, right)
        return style.png(drawing)


def draw_correlations(frames: dict[str, pl.DataFrame], nets: Sequence[str]) -> bytes:
    """Correlations along training."""
    styles = style.lines([NAMES[net] for net in nets])
    with style.context():
        drawing = style.figure(style.WIDTH, 7.0)
        grid = drawing.add_gridspec(2, 2)
        for place, (pair, (kind, title)) in enumerate(PAIRS.items()):
            axes = drawing.add_subplot(grid[place // 2, place % 2])
            for net in nets:
                for level in ('filter', 'weight'):
                    found = _agreements(frames['agreement'], net, pair, level, kind)
                    props = {**styles[NAMES[net]], 'linestyle': '-' if level == 'filter' else ':'}
                    label = NAMES[net] if level == 'filter' else None
                    axes.plot(range(len(found)), [v.mean() for _, v in found], **props, label=label)
                    axes.fill_between(range(len(found)), [v.min() for _, v in found],
                                      [v.max() for _, v in found], color=props['color'],
                                      alpha=0.12, linewidth=0)  # fmt: skip
            axes.set_xticks(range(len(STAGES)), STAGES)
            axes.set_ylim(-1.05, 1.05)
            axes.axhline(0, color=style.QUIET, linewidth=0.6)
            axes.set_title(title)
            axes.set_xlabel('of dense training; filters solid, weights dotted, shade: seeds')
        _legend(drawing, axes)
        return style.png(drawing)


def draw_scatter(frames: dict[str, pl.DataFrame], nets: Sequence[str]) -> bytes:
    """The filters of the first seed behind the correlations."""
    pairs = (('‖θ‖', 'Σ|θ g|'), ('θᵀg', 'θᵀHg'))
    with style.context():
        drawing = style.figure(style.WIDTH, 0.5 + 2.1 * len(nets))
        grid = drawing.add_gridspec(len(nets), 4)
        for row, net in enumerate(nets):
            here = frames['filters'].filter(pl.col('net') == net)
            here = here.with_columns(pl.col('‖θ‖²').sqrt().alias('‖θ‖'))
            _, early, _, end = sorted(set(here['epoch']))
            for column, ((x, y), epoch) in enumerate(itertools.product(pairs, (early, end))):
                axes = drawing.add_subplot(grid[row, column])
                _scatter(axes, here.filter(pl.col('epoch') == epoch), x, y)
                axes.set_title(f'{NAMES[net]}, {STAGES[1] if epoch == early else STAGES[3]}')
        drawing.suptitle('A point per filter, paler: nearer to the input', fontsize=10)
        return style.png(drawing)


def _scatter(axes: Axes, filters: pl.DataFrame, x: str, y: str) -> None:
    paths = list(dict.fromkeys(filters['path']))
    signed = filters[y].min() < 0
    for depth, path in enumerate(paths):
        here = filters.filter((pl.col('path') == path) & (signed | (pl.col(y) > 0)))
        shade = 0.75 - 0.75 * depth / max(len(paths) - 1, 1)
        axes.plot(here[x], here[y], '.', markersize=3, color=str(shade))
    if signed:
        axes.ticklabel_format(scilimits=(-2, 3))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(3))
    else:
        axes.set_yscale('log')
    axes.set_xlabel(f'{x} of a filter')
    axes.set_ylabel(y)


def draw_removal(frames: dict[str, pl.DataFrame], nets: Sequence[str]) -> bytes:
    """Loss right after pruning by how trained the net is; share of each layer removed."""
    styles = style.lines(MEASURES)
    with style.context():
        drawing = style.figure(style.WIDTH, 0.5 + 2.5 * len(nets))
        grid = drawing.add_gridspec(len(nets), 3)
        for row, net in enumerate(nets):
            axes = drawing.add_subplot(grid[row, 0])
            here = frames['pruned'].filter(pl.col('net') == net)
            stages = sorted(set(here['epoch']))
            numbered = pl.col('epoch').replace_strict(dict(zip(stages, range(4), strict=True)))
            dense = here.unique(['epoch', 'seed']).select(
                'epoch', measure=pl.lit('dense'), loss='dense_loss'
            )
            losses = pl.concat([here.select('epoch', 'measure', 'loss'), dense])
            _curves(axes, losses.with_columns(numbered), styles, 'epoch', 'loss')
            axes.set_yscale('log')
            axes.set_xticks(range(len(STAGES)), STAGES)
            axes.set_xlabel('of dense training')
            axes.set_title(f'{NAMES[net]}: test loss when pruned')
            for column, epoch in ((1, stages[1]), (2, stages[-1])):
                axes = drawing.add_subplot(grid[row, column])
                gone = frames['removed'].filter((pl.col('net') == net) & (pl.col('epoch') == epoch))
                step = -(-(gone['depth'].max() + 1) // 14)  # more points than that are a tangle
                # Numbered from 1; several together stand at their middle.
                place = pl.col('depth') // step * step + (step + 1) / 2
                shares = gone.group_by('measure', 'seed', place.alias('depth')).agg(
                    share=100 * pl.col('removed').sum() / pl.col('units').sum()
                )
                _curves(axes, shares, styles, 'depth', 'share', markersize=3)
                when = 'after 1 epoch' if column == 1 else 'at the end'
                axes.set_title(f'% removed, {when}')
                together = f' ({step} together)' if step > 1 else ''
                axes.set_xlabel(f'layer, input first{together}')
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
                axes.set_ylim(-3, 103)
        _legend(drawing, drawing.axes[0])
        return style.png(drawing)


def draw_norms(frames: dict[str, pl.DataFrame], nets: Sequence[str]) -> bytes:
    """Norms of the whole network along training, pruned in one round."""
    whole, styles = _network_norms(frames), style.lines(MEASURES)
    with style.context():
        drawing = style.figure(style.WIDTH, 0.5 + 2.5 * len(nets))
        grid = drawing.add_gridspec(len(nets), 3)
        for row, net in enumerate(nets):
            for column, (quantity, title) in enumerate(QUANTITIES.items()):
                axes = drawing.add_subplot(grid[row, column])
                here = whole.filter(
                    (pl.col('net') == net)
                    & (pl.col('quantity') == quantity)
                    & (pl.col('rounds').fill_null(1) == 1)
                )
                _curves(axes, here, styles, 'step', 'value')
                axes.set_title(f'{NAMES[net]}: {title}')
                axes.set_xlabel('step')
                if column == 2:
                    axes.set_yscale('log')
        _legend(drawing, axes)
        return style.png(drawing)


def _curves(
    axes: Axes, frame: pl.DataFrame, styles: dict, x: str, y: str, markersize: float = 0
) -> None:
    """Means over seeds of every measure, and of the dense net where it is there."""
    for measure in ('dense', *MEASURES):
        props = styles.get(measure, {'color': style.INK, 'marker': 'o'})
        of = frame.filter(pl.col('measure') == measure)
        if of.height:
            axes.plot(*_means(of, x, y), **{**props, 'markersize': markersize}, label=measure)


def _legend(drawing: Figure, axes: Axes) -> None:
    """One for all panels, above them."""
    handles, labels = axes.get_legend_handles_labels()
    drawing.legend(handles, labels, loc='outside upper center', ncols=len(labels), fontsize=8.5)


def _means(frame: pl.DataFrame, x: str, y: str) -> tuple[list, list]:
    """Means over seeds at every x."""
    found = frame.group_by(x).agg(pl.col(y).mean()).sort(x)
    return found[x].to_list(), found[y].to_list()


FIGURES = {
    'accuracy': draw_accuracy,
    'correlations': draw_correlations,
    'scatter': draw_scatter,
    'removal': draw_removal,
    'norms': draw_norms,
}


if __name__ == '__main__':
    sys.exit(main())
