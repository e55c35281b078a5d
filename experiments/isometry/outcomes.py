"""What the study of isometry says should come out, from its finished sweeps, with numbers.

    python experiments/isometry/outcomes.py runs/mlp7_linear runs/mlp7_relu

Each directory is a finished sweep of this folder. Prints markdown, writes it to `--out`, and draws
`isometry.png` beside it. Differences are paired by seed; intervals are Student's, of 95 %, for
their mean. "holds" and "reversed" mean that the interval lies on one side of zero.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
from matplotlib.ticker import MaxNLocator

from jaxprune.errors import JaxpruneError
from jaxprune.report import markdown, style, tables
from jaxprune.sweep import store

REPAIRS = ('L1', 'L1 + OrthP')
FAST, SLOW = '0.01', '0.001'
#: The arms that every net has, by the labels of the specifications.
ARMS = [f'{repair}, {rate}' for repair in REPAIRS for rate in (FAST, SLOW)]
LONGER = f'L1, {SLOW}, 3 x the epochs'
COLOURS = {FAST: '#D55E00', SLOW: '#0072B2'}
#: An arm of each repair: right after pruning the rates do not differ.
PRUNED = {repair: f'{repair}, {FAST}' for repair in REPAIRS}

HEAD = """\
# Outcomes of the study of isometry

Intervals: Student's, of 95 %, for the mean over seeds of differences paired by seed. The networks,
and what all this says: [README](README.md)."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('directories', nargs='+', type=Path, help='finished sweeps')
    parser.add_argument('--out', type=Path, default=Path('outcomes.md'), help='a markdown file')
    arguments = parser.parse_args()
    try:
        frame = load(arguments.directories)
    except JaxpruneError as error:
        raise SystemExit(str(error)) from None
    nets = list(dict.fromkeys(frame['net']))
    parts = [spectra(frame, nets), gaps(frame, nets), trainability(frame, nets)]
    text = '\n\n'.join([HEAD, *parts]) + '\n'
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text)
    arguments.out.with_name('isometry.png').write_bytes(draw(frame, nets))
    print(text)
    return 0


def load(directories: Sequence[Path]) -> pl.DataFrame:
    """A row per run and epoch of fine-tuning, from right after pruning (0) on.

    Columns: `net`, `label`, `seed`, `ratio` (the share of filters removed), `epoch`, `epochs` (of
    fine-tuning in all), `accuracy` in %, and `jsv_mean` and so on. The dense networks have one row,
    for the end of their training, with ratio and epoch 0.
    """
    frames: dict[str, pl.DataFrame] = {}
    for directory in directories:
        plan = store.read_plan(directory)
        net, wanted = plan['name'], {run['label'] for run in plan['runs']}
        if net in frames:
            raise SystemExit(f'{directory}: another sweep of {net}: give every network once')
        if missing := {tables.DENSE, *ARMS} - wanted:
            raise SystemExit(f'{directory}: not a sweep of this study: no {min(missing)}')
        frames[net] = rows_of(directory, len(plan['runs'])).select(
            pl.lit(net).alias('net'), pl.all()
        )
    return pl.concat(frames.values())


def rows_of(directory: Path, runs: int) -> pl.DataFrame:
    """The rows of one sweep of so many runs."""
    results = store.read_results(directory)
    if (done := results['run_id'].n_unique()) < runs:
        raise SystemExit(f'{directory}: {done} of {runs} runs are there: finish the sweep')
    if broken := results.filter(pl.col('error').is_not_null()).height:
        raise SystemExit(f'{directory}: {broken} rows have no valid mask')
    each = tables.final(results).select(
        'run_id', 'label', 'seed',
        ratio=(1 - 1 / pl.col('target_compression')).round(6),
        last=pl.col('step'), steps=pl.col('step') // pl.col('epoch'),
    )  # fmt: skip
    spectrum = store.read_flow(directory).pivot(
        'quantity', index=['run_id', 'step', 'rounds'], values='value'
    )
    rows = store.read_curves(directory).join(spectrum, on=['run_id', 'step', 'rounds'])
    rows = rows.join(each, on='run_id', maintain_order='left')
    pruned = pl.col('rounds') > 0
    start = pl.col('step').filter(pruned).min().over('run_id')
    dense = (pl.col('label') == tables.DENSE) & (pl.col('step') == pl.col('last'))
    epoch = ((pl.col('step') - start) // pl.col('steps')).fill_null(0)
    return rows.with_columns(epoch=epoch).filter(pruned | dense).select(
        'label', 'seed', 'ratio', 'epoch', pl.col('epoch').max().over('run_id').alias('epochs'),
        'jsv_mean', 'jsv_condition', 'jsv_smallest', accuracy=100 * pl.col('test_accuracy'),
    )  # fmt: skip


def spectra(frame: pl.DataFrame, nets: Sequence[str]) -> str:
    """Singular values of the trained network, and right after pruning without and with repair."""
    ratios = sorted(set(frame['ratio']))
    lines = []
    for title, column, mean, of in (
        ('Mean singular value of the Jacobian right after pruning', 'jsv_mean', pl.mean, 'Means'),
        ('Its condition number', 'jsv_condition', pl.median, 'Medians'),
    ):
        rows = []
        for net in nets:
            for repair in REPAIRS:
                here = just_pruned(frame.filter(pl.col('net') == net), repair)
                found = dict(here.group_by('ratio').agg(mean(column)).iter_rows())
                rows.append([net, repair, *(_short(found.get(ratio)) for ratio in ratios)])
        said = f'{of} over seeds, by share of filters removed; 0: the trained network.'
        head = ['net', '', *(f'{r:g}' for r in ratios)]
        lines += [f'## {title}', '', said, '', markdown.table(head, rows), '']
    return '\n'.join(lines).rstrip()


def just_pruned(frame: pl.DataFrame, repair: str) -> pl.DataFrame:
    """Right after pruning, with this repair; without any, the trained network is ratio 0."""
    labels = [PRUNED[repair], *([tables.DENSE] if repair == 'L1' else [])]
    return frame.filter((pl.col('epoch') == 0) & pl.col('label').is_in(labels))


def _short(value: float | None) -> str:
    """Three digits; nothing for a ratio that only other nets have."""
    return '' if value is None else f'{value:.3g}'


def gaps(frame: pl.DataFrame, nets: Sequence[str]) -> str:
    """Final accuracies, and how much of the gap between the rates a repair or more time closes."""
    lines = ['## Final accuracy, and the gap between the learning rates', '']
    for net in nets:
        last = frame.filter((pl.col('net') == net) & (pl.col('epoch') == pl.col('epochs')))
        more = [LONGER] if LONGER in set(last['label']) else []
        rows, said, repairing = [], [], []
        for ratio in _ratios(last):
            at = {label: _by_seed(last, ratio, label) for label in [*ARMS, *more]}
            plain, repaired = (at[f'{r}, {FAST}'] - at[f'{r}, {SLOW}'] for r in REPAIRS)
            left = [plain, repaired, *(at[ARMS[0]] - at[label] for label in more)]
            cells = [markdown.spread(values, 1) for values in at.values()]
            rows.append([f'{ratio:g}', *cells, *(markdown.difference(gap, 1) for gap in left)])
            # Sizes of mean gaps: of seeds one by one, noise alone would have a size.
            sizes = np.sign(plain.mean()) * plain - np.sign(repaired.mean()) * repaired
            said.append(f'  - {ratio:g}: {markdown.verdict(sizes, 1)}')
            gained = {rate: at[f'{REPAIRS[1]}, {rate}'] - at[f'L1, {rate}'] for rate in COLOURS}
            found = [f'from {rate} {markdown.verdict(by, 1)}' for rate, by in gained.items()]
            repairing.append(f'  - {ratio:g}: {"; ".join(found)}')
        head = ['removed', *at, 'gap, L1', 'gap, L1 + OrthP', *(f'gap to {name}' for name in more)]
        lines += [f'### {net}', '', markdown.table(head, rows), '',
                  '- **the gap is smaller with OrthP, whichever rate is ahead** (points):', *said,
                  '- **OrthP raises the final accuracy** (points):', *repairing, '']  # fmt: skip
    return '\n'.join(lines).rstrip()


def trainability(frame: pl.DataFrame, nets: Sequence[str]) -> str:
    """Does accuracy over the first stage of the schedule track the final one?"""
    lines = [
        '## Trainability accuracy',
        '',
        'Mean accuracy over the epochs before the first decay, against the final one: rank '
        'correlation over ratios and seeds of the same schedule (arXiv:2301.05219, eq. 1).',
        '',
    ]
    first = (pl.col('epoch') > 0) & (pl.col('epoch') <= pl.col('epochs') / 3)
    accuracy = pl.col('accuracy')
    both = frame.group_by('net', 'label', 'ratio', 'seed').agg(
        early=accuracy.filter(first).mean(), last=accuracy.sort_by('epoch').last()
    )
    for net in nets:
        found = []
        for label in ARMS:
            of = both.filter((pl.col('net') == net) & (pl.col('label') == label))
            ranks = of.select(pl.corr(pl.col('early').rank(), pl.col('last').rank())).item()
            found.append(f'{label.replace(",", " from")} {ranks:.2f}')
        lines.append(f'- {net}: {"; ".join(found)}')
    return '\n'.join(lines)


def draw(frame: pl.DataFrame, nets: Sequence[str]) -> bytes:
    """Per net: spectra and accuracies by ratio; how the spectrum comes back while training."""
    with style.context():
        drawing = style.figure(style.WIDTH, 0.6 + 2.5 * len(nets))
        grid = drawing.add_gridspec(len(nets), 3)
        for row, net in enumerate(nets):
            here = frame.filter(pl.col('net') == net)
            last = here.filter(pl.col('epoch') == pl.col('epochs'))
            ratios = _ratios(here)
            shown = min(ratios, key=lambda r: abs(r - 0.7))
            left, middle, right = (drawing.add_subplot(grid[row, i]) for i in range(3))
            for repair, line in zip(REPAIRS, ('-', '--'), strict=True):
                means = _means(just_pruned(here, repair), 'ratio')
                left.plot(*means, line, marker='o', markersize=4, color=style.INK)
                for rate, colour in COLOURS.items():
                    label = f'{repair}, {rate}'
                    values = [_by_seed(last, ratio, label) for ratio in ratios]
                    middle.plot(ratios, [v.mean() for v in values], line, marker='o', markersize=4,
                                color=colour, label=f'{repair}, from {rate}')  # fmt: skip
                    middle.fill_between(ratios, [v.min() for v in values],
                                        [v.max() for v in values], color=colour, alpha=0.12,
                                        linewidth=0)  # fmt: skip
                    along = (pl.col('label') == label) & (pl.col('ratio') == shown)
                    right.plot(*_means(here.filter(along), 'epoch'), line, color=colour)
            left.set_yscale('log')
            right.set_yscale('log')
            left.set_title(f'{net}: mean singular value')
            middle.set_title('accuracy after fine-tuning (%)')
            right.set_title(f'mean singular value, {shown:g} removed')
            right.set_xlabel('epoch of fine-tuning')
            right.xaxis.set_major_locator(MaxNLocator(integer=True))
            for axes in (left, middle):
                axes.set_xlabel('share of filters removed')
        handles, labels = middle.get_legend_handles_labels()
        drawing.legend(handles, labels, loc='outside upper center', ncols=4, handlelength=4)
        return style.png(drawing)


def _means(frame: pl.DataFrame, along: str) -> tuple[pl.Series, pl.Series]:
    """Values of a column, and mean singular values there."""
    means = frame.group_by(along).agg(pl.mean('jsv_mean')).sort(along)
    return means[along], means['jsv_mean']


def _ratios(frame: pl.DataFrame) -> list[float]:
    return sorted(set(frame['ratio']) - {0.0})


def _by_seed(frame: pl.DataFrame, ratio: float, label: str) -> np.ndarray:
    found = frame.filter((pl.col('ratio') == ratio) & (pl.col('label') == label))
    return found.sort('seed')['accuracy'].to_numpy()


if __name__ == '__main__':
    sys.exit(main())
