"""What the study says should come out, from finished sweeps and measures, with numbers.

    cd experiments/gradient_flow && python outcomes.py ../../runs/lenet5 ../../runs/vgg13

Each directory is a finished sweep of this folder; the tables of `measures.py` lie in the directory
of the same name with `_measures` behind it. Prints markdown (`--out` writes it), and draws
`accuracy.png`, `correlations.png`, `removal.png` and `norms.png` beside it.

An expectation "holds" if the 95 % interval of the mean difference over seeds, paired by seed, lies
on its side of zero, is "reversed" if it lies on the other, and "open" otherwise. Intervals are
percentile bootstraps: of three seeds no more than their range.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

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
    'θᵀg, θᵀHg, T = 200': ('pearson', 'θᵀHg with θᵀg at T = 200: correlation'),
}


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
    text = '\n\n'.join(parts) + '\n'
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

    def add(name: str, frame: pl.DataFrame) -> None:
        parts.setdefault(name, []).append(frame)

    for directory in directories:
        results = store.read_results(directory)
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
        kinds = results.select('run_id', net='model').unique()
        add('flow', store.read_flow(directory).join(kinds, on='run_id'))
        measures = directory.with_name(f'{directory.name}_measures')
        for name in ('agreement', 'pruned', 'removed', 'filters'):
            if not (measures / f'{name}.parquet').exists():
                raise SystemExit(f'{measures}: no {name}.parquet: run measures.py first')
            add(name, pl.read_parquet(measures / f'{name}.parquet'))
    return {name: pl.concat(found, how='diagonal_relaxed') for name, found in parts.items()}


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
            others = np.mean(
                [found[m] for m in MEASURES if m not in ('magnitude', 'biased loss')], 0
            )
            for measure in ('magnitude', 'biased loss'):
                said = markdown.verdict(others - found[measure])
                verdicts.append(f'  - {NAMES[net]}, rounds {rounds}, {measure}: {said}')
    lines += [markdown.table(['net', 'rounds', *MEASURES], rows), '']
    return '\n'.join([*lines, '- **faster than the mean of the other four** (loss):', *verdicts])


def correlations(frames: dict[str, pl.DataFrame], nets: Sequence[str]) -> str:
    """Outcome 3."""
    rows = []
    for net in nets:
        for pair, (kind, title) in PAIRS.items():
            for level in ('weight', 'filter'):
                found = _agreements(frames['agreement'], net, pair, level, kind)
                cells = [f'{v.mean():.2f} ({v.min():.2f} to {v.max():.2f})' for _, v in found]
                rows.append([NAMES[net], title, level, *cells])
    stages = ['before training', 'after 1 epoch', 'half-way', 'at the end']
    return '\n'.join(
        ['## 3. Correlations along dense training', '', 'Mean and range over seeds, all layers '
         'together.', '', markdown.table(['net', 'measures', 'of each', *stages], rows)]
    )  # fmt: skip


def right_after(frames: dict[str, pl.DataFrame], nets: Sequence[str]) -> str:
    """Outcome 4."""
    rows = []
    for net in nets:
        here = frames['pruned'].filter(pl.col('net') == net)
        for epoch in sorted(set(here['epoch'])):
            then = here.filter(pl.col('epoch') == epoch)
            cells = []
            for measure in MEASURES:
                of = then.filter(pl.col('measure') == measure)
                cells.append(f'{of["loss"].mean():.2f} / {100 * of["accuracy"].mean():.1f}')
            dense = f'{then["dense_loss"].mean():.2f} / {100 * then["dense_accuracy"].mean():.1f}'
            rows.append([NAMES[net], epoch, dense, *cells])
    head = ['net', 'epochs trained', 'dense', *MEASURES]
    return '\n'.join(
        ['## 4. Right after pruning in one shot, before any retraining', '',
         'Test loss / test accuracy (%), means over seeds.', '', markdown.table(head, rows)]
    )  # fmt: skip


def early_layers(frames: dict[str, pl.DataFrame], nets: Sequence[str]) -> str:
    """Outcome 5."""
    rows, verdicts = [], []
    for net in nets:
        shares = _early_shares(frames['removed'].filter(pl.col('net') == net))
        for epoch in sorted(set(shares['epoch'])):
            found = {
                m: shares.filter((pl.col('epoch') == epoch) & (pl.col('measure') == m))
                .sort('seed')['early'].to_numpy()
                for m in MEASURES
            }  # fmt: skip
            rows.append([NAMES[net], epoch, *(f'{100 * found[m].mean():.0f}' for m in MEASURES)])
            rest = np.mean([found[m] for m in MEASURES if not m.startswith('increase')], 0)
            for measure in ('increase, T = 200', 'increase, T = 1'):
                said = markdown.verdict(100 * (found[measure] - rest))
                verdicts.append(f'  - {NAMES[net]}, after {epoch} epochs, {measure}: {said}')
    lines = [
        '## 5. Which layers lose their filters',
        '',
        'Share of the filters of the first half of the layers that one-shot pruning removes (%).',
        '',
        markdown.table(['net', 'epochs trained', *MEASURES], rows),
        '',
        '- **increase removes more of the early layers than the other measures** (points):',
        *verdicts,
    ]
    return '\n'.join(lines)


def norms(frames: dict[str, pl.DataFrame], nets: Sequence[str]) -> str:
    """Outcome 6."""
    whole = _network_norms(frames)
    rows = []
    for net in nets:
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
            'Pruned in one round; means over seeds.',
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


def _agreements(frame: pl.DataFrame, net: str, pair: str, level: str, kind: str):
    here = frame.filter(
        (pl.col('net') == net)
        & (pl.col('pair') == pair)
        & (pl.col('level') == level)
        & (pl.col('kind') == kind)
        & (pl.col('path') == '*')
    )
    return [
        (epoch, here.filter(pl.col('epoch') == epoch).sort('seed')['value'].to_numpy())
        for epoch in sorted(set(here['epoch']))
    ]


def _early_shares(removed: pl.DataFrame) -> pl.DataFrame:
    half = (removed['depth'].max() + 1) / 2
    early = removed.filter(pl.col('depth') < half)
    sums = early.group_by('epoch', 'measure', 'seed').agg(pl.col('removed', 'units').sum())
    return sums.with_columns(early=pl.col('removed') / pl.col('units'))


def _network_norms(frames: dict[str, pl.DataFrame]) -> pl.DataFrame:
    """Norms over all layers together, per run and step."""
    runs = frames['runs'].select('run_id', 'measure', 'rounds', 'seed').unique()
    wanted = frames['flow'].filter(pl.col('quantity').is_in(list(QUANTITIES)))
    whole = wanted.group_by('net', 'run_id', 'step', 'quantity').agg(
        value=(pl.col('value') ** 2).sum().sqrt()
    )
    return whole.join(runs, on='run_id')


# --- figures ----------------------------------------------------------------------------------


def draw_accuracy(frames: dict[str, pl.DataFrame], nets: Sequence[str]) -> bytes:
    """Final accuracy of every measure, and training losses after pruning in one round."""
    last, looks = _last(frames['runs']), style.lines(MEASURES)
    with style.context():
        drawing = style.figure(style.WIDTH, 2.9 * len(nets))
        grid = drawing.add_gridspec(len(nets), 2, width_ratios=[1.25, 1])
        for row, net in enumerate(nets):
            axes = drawing.add_subplot(grid[row, 0])
            dense = last.filter((pl.col('net') == net) & (pl.col('measure') == 'dense'))['accuracy']
            axes.axvline(dense.mean(), color=style.INK, linewidth=0.8)
            for place, measure in enumerate(MEASURES):
                for rounds, shift in ((1, -0.17), (5, 0.17)):
                    values = _by_seed(last, net, measure, rounds, 'accuracy')
                    filled = looks[measure]['color'] if rounds == 5 else 'white'
                    axes.plot(values, np.full(len(values), place + shift), 'o', markersize=4.5,
                              color=looks[measure]['color'], markerfacecolor=filled)  # fmt: skip
                    axes.plot([values.mean()] * 2, [place + shift - 0.13, place + shift + 0.13],
                              color=looks[measure]['color'], linewidth=1.6)  # fmt: skip
            axes.set_yticks(range(len(MEASURES)), MEASURES)
            axes.invert_yaxis()
            axes.set_title(f'{NAMES[net]}: 1 round (open), 5 rounds (filled); line: dense')
            axes.set_xlabel('test accuracy at the end (%)')
            right = drawing.add_subplot(grid[row, 1])
            here = frames['runs'].filter((pl.col('net') == net) & (pl.col('rounds') == 1))
            for measure in MEASURES:
                curve = _means(here.filter(pl.col('measure') == measure), 'epoch', 'train_loss')
                right.plot(*curve, **{**looks[measure], 'marker': ''}, label=measure)
            right.set_yscale('log')
            right.set_xlabel('epoch (pruned in one round after the first)')
            right.set_ylabel('training loss')
            if not row:
                right.legend(frameon=False, ncols=2, fontsize=8)
        return style.png(drawing)


def draw_correlations(frames: dict[str, pl.DataFrame], nets: Sequence[str]) -> bytes:
    """Correlations along training, and the filters behind them."""
    with style.context():
        drawing = style.figure(style.WIDTH, 3.0 + 2.6 * len(nets))
        grid = drawing.add_gridspec(1 + len(nets), 3, height_ratios=[1.15, *[1] * len(nets)])
        looks = style.lines([NAMES[net] for net in nets])
        for column, (pair, (kind, title)) in enumerate(PAIRS.items()):
            axes = drawing.add_subplot(grid[0, column])
            for net in nets:
                for level in ('filter', 'weight'):
                    found = _agreements(frames['agreement'], net, pair, level, kind)
                    look = {**looks[NAMES[net]], 'linestyle': '-' if level == 'filter' else ':'}
                    label = NAMES[net] if level == 'filter' else None
                    axes.plot(range(len(found)), [v.mean() for _, v in found], **look, label=label)
                    axes.fill_between(range(len(found)), [v.min() for _, v in found],
                                      [v.max() for _, v in found], color=look['color'],
                                      alpha=0.12, linewidth=0)  # fmt: skip
            axes.set_xticks(range(4), ['start', '1 epoch', 'half', 'end'])
            axes.set_ylim(-1.05, 1.05)
            axes.axhline(0, color=style.QUIET, linewidth=0.6)
            axes.set_title(title + '\n(filters solid, weights dotted)', fontsize=9)
            if not column:
                axes.legend(frameon=False, fontsize=8, loc='lower left')
        for row, net in enumerate(nets, 1):
            here = frames['filters'].filter(pl.col('net') == net)
            epochs = sorted(set(here['epoch']))
            for column, epoch in enumerate((epochs[0], epochs[1], epochs[-1])):
                axes = drawing.add_subplot(grid[row, column])
                _scatter(
                    axes, here.filter(pl.col('epoch') == epoch), f'{NAMES[net]}, {epoch} epochs'
                )
        return style.png(drawing)


def _scatter(axes: Axes, filters: pl.DataFrame, title: str) -> None:
    """Loss preservation against magnitude, a point per filter, darker = nearer to the output."""
    paths = list(dict.fromkeys(filters['path']))
    for depth, path in enumerate(paths):
        here = filters.filter((pl.col('path') == path) & (pl.col('loss') > 0))
        shade = 0.85 - 0.75 * depth / max(len(paths) - 1, 1)
        axes.plot(here['magnitude'].sqrt(), here['loss'], '.', markersize=3.5, color=str(shade))
    axes.set_yscale('log')
    axes.set_title(title, fontsize=9)
    axes.set_xlabel('‖θ‖ of a filter')
    axes.set_ylabel('Σ|θ g|')


def draw_removal(frames: dict[str, pl.DataFrame], nets: Sequence[str]) -> bytes:
    """Loss right after pruning by how trained the net is; share of each layer removed."""
    looks = style.lines(MEASURES)
    with style.context():
        drawing = style.figure(style.WIDTH, 2.9 * len(nets))
        grid = drawing.add_gridspec(len(nets), 2, width_ratios=[1, 1.3])
        for row, net in enumerate(nets):
            axes = drawing.add_subplot(grid[row, 0])
            here = frames['pruned'].filter(pl.col('net') == net)
            for measure in MEASURES:
                of = here.filter(pl.col('measure') == measure)
                x, y = _means(of, 'epoch', 'loss')
                axes.plot(range(len(x)), y, **looks[measure], label=measure)
            dense = _means(here, 'epoch', 'dense_loss')[1]
            axes.plot(range(len(dense)), dense, color=style.INK, label='dense')
            axes.set_yscale('log')
            axes.set_xticks(range(4), ['start', '1 epoch', 'half', 'end'])
            axes.set_title(f'{NAMES[net]}: test loss right after pruning')
            if not row:
                axes.legend(frameon=False, fontsize=7.5, ncols=2)
            right = drawing.add_subplot(grid[row, 1])
            gone = frames['removed'].filter((pl.col('net') == net) & (pl.col('epoch') == 1))
            for measure in MEASURES:
                of = gone.filter(pl.col('measure') == measure).with_columns(
                    share=100 * pl.col('removed') / pl.col('units')
                )
                right.plot(*_means(of, 'depth', 'share'), **{**looks[measure], 'markersize': 3})
            right.set_title('share of each layer removed after 1 epoch (%)')
            right.set_xlabel('layer, input first')
            right.xaxis.set_major_locator(MaxNLocator(integer=True))
            right.set_ylim(-3, 103)
        return style.png(drawing)


def draw_norms(frames: dict[str, pl.DataFrame], nets: Sequence[str]) -> bytes:
    """Norms of the whole network along training, pruned in one round."""
    whole, looks = _network_norms(frames), style.lines(MEASURES)
    with style.context():
        drawing = style.figure(style.WIDTH, 2.7 * len(nets))
        grid = drawing.add_gridspec(len(nets), 3)
        for row, net in enumerate(nets):
            for column, (quantity, title) in enumerate(QUANTITIES.items()):
                axes = drawing.add_subplot(grid[row, column])
                here = whole.filter((pl.col('net') == net) & (pl.col('quantity') == quantity))
                for measure in ('dense', *MEASURES):
                    of = here.filter(
                        (pl.col('measure') == measure) & (pl.col('rounds').fill_null(1) == 1)
                    )
                    look = looks.get(measure, {'color': style.INK})
                    axes.plot(*_means(of, 'step', 'value'), **{**look, 'marker': ''}, label=measure)
                axes.set_title(f'{NAMES[net]}: {title}')
                axes.set_xlabel('step')
                if column == 2:
                    axes.set_yscale('log')
                if not row and not column:
                    axes.legend(frameon=False, fontsize=7)
        return style.png(drawing)


def _means(frame: pl.DataFrame, x: str, y: str) -> tuple[list, list]:
    """Means over seeds at every x."""
    found = frame.group_by(x).agg(pl.col(y).mean()).sort(x)
    return found[x].to_list(), found[y].to_list()


FIGURES = {
    'accuracy': draw_accuracy,
    'correlations': draw_correlations,
    'removal': draw_removal,
    'norms': draw_norms,
}


if __name__ == '__main__':
    sys.exit(main())
