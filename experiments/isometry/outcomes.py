"""What the study of isometry says should come out, from the table of `study.py`, with numbers.

    python experiments/isometry/outcomes.py runs/isometry --out runs/isometry/outcomes.md

Prints markdown, writes it, and draws `isometry.png` beside it. Differences are paired by seed;
intervals are Student's, of 95 %, for their mean. "holds" and "reversed" mean that the interval lies
on one side of zero.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import scipy.stats
from matplotlib.ticker import MaxNLocator

from jaxprune.report import markdown, style

DENSE = 'dense'
REPAIRS = ('L1', 'L1 + OrthP')
RATES = (1e-2, 1e-3)
COLOURS = {1e-2: '#D55E00', 1e-3: '#0072B2'}


HEAD = """\
# Outcomes of the study of isometry

Intervals: Student's, of 95 %, for the mean over seeds of differences paired by seed. The networks,
and what all this says: [README](README.md)."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('directories', nargs='+', type=Path, help='what study.py wrote to')
    parser.add_argument('--out', type=Path, default=Path('outcomes.md'), help='a markdown file')
    arguments = parser.parse_args()
    frame = load(arguments.directories)
    nets = list(dict.fromkeys(frame['net']))
    parts = [spectra(frame, nets), gaps(frame, nets), trainability(frame, nets)]
    text = '\n\n'.join([HEAD, *parts]) + '\n'
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text)
    arguments.out.with_name('isometry.png').write_bytes(draw(frame, nets))
    print(text)
    return 0


def load(directories: Sequence[Path]) -> pl.DataFrame:
    """The rows of all directories, each run once."""
    for directory in directories:
        if not (directory / 'runs.parquet').exists():
            raise SystemExit(f'{directory}: no runs.parquet: run study.py first')
    frame = pl.concat(pl.read_parquet(found / 'runs.parquet') for found in directories)
    run = ['net', 'seed', 'ratio', 'repair', 'rate', 'epochs']
    if frame.select(*run, 'epoch').is_duplicated().any():
        raise SystemExit('some runs are there twice: give every directory and network once')
    whole = pl.col('epoch').max() == pl.col('epochs').first()
    ended = frame.group_by(run).agg(whole=whole).filter('whole')
    arms = ended.filter(
        (pl.col('repair') != DENSE) & (pl.col('epochs') == pl.col('epochs').min().over('net'))
    )
    seeds = arms.group_by('net', 'ratio', 'repair', 'rate').agg(pl.col('seed').sort())
    if seeds.height % (len(REPAIRS) * len(RATES)) or seeds['seed'].n_unique() > 1:
        raise SystemExit('some arms lack runs: finish study.py with the same seeds for all')
    return frame


def spectra(frame: pl.DataFrame, nets: Sequence[str]) -> str:
    """Singular values of the trained network, and right after pruning without and with repair."""
    start, ratios = frame.filter(pl.col('epoch') == 0), _ratios(frame)
    lines = []
    for title, column, mean in (
        ('Mean singular value of the Jacobian right after pruning', 'jsv_mean', pl.Expr.mean),
        ('Its condition number', 'jsv_condition', pl.Expr.median),
    ):
        rows = []
        for net, repair in itertools.product(nets, REPAIRS):
            here = _pruned(start.filter(pl.col('net') == net), repair)
            found = dict(here.group_by('ratio').agg(mean(pl.col(column))).iter_rows())
            rows.append([net, repair, *(_short(found.get(ratio)) for ratio in (0.0, *ratios))])
        of = 'Means' if mean is pl.Expr.mean else 'Medians'
        said = f'{of} over seeds, by share of filters removed; 0: the trained network.'
        head = ['net', '', 0, *(f'{r:g}' for r in ratios)]
        lines += [f'## {title}', '', said, '', markdown.table(head, rows), '']
    return '\n'.join(lines).rstrip()


def _pruned(start: pl.DataFrame, repair: str) -> pl.DataFrame:
    """Right after pruning, with this repair; without any, the trained network is ratio 0."""
    return start.filter(pl.col('repair').is_in([repair, DENSE] if repair == 'L1' else [repair]))


def _short(value: float | None) -> str:
    """Three digits; nothing for a ratio that only other nets have."""
    return '' if value is None else f'{value:.3g}'


def gaps(frame: pl.DataFrame, nets: Sequence[str]) -> str:
    """Final accuracies, and how much of the gap between the rates a repair or more time closes."""
    lines = ['## Final accuracy, and the gap between the learning rates', '']
    for net in nets:
        here = frame.filter((pl.col('net') == net) & (pl.col('repair') != DENSE))
        short, longer = here['epochs'].min(), here['epochs'].max()
        last = here.filter(pl.col('epoch') == pl.col('epochs'))
        rows, said, repairing = [], [], []
        for ratio in _ratios(here):
            at = {
                (repair, rate): _by_seed(last, ratio, repair, rate, short)
                for repair in REPAIRS
                for rate in RATES
            }
            plain, repaired = (at[r, RATES[0]] - at[r, RATES[1]] for r in REPAIRS)
            cells = [markdown.spread(a, 1) for a in at.values()]
            left = [markdown.difference(plain, 1), markdown.difference(repaired, 1)]
            if longer > short:
                slow = _by_seed(last, ratio, 'L1', RATES[1], longer)
                cells.append(markdown.spread(slow, 1))
                left.append(markdown.difference(at['L1', RATES[0]] - slow, 1))
            rows.append([f'{ratio:g}', *cells, *left])
            # Sizes of mean gaps: of seeds one by one, noise alone would have a size.
            sizes = np.sign(plain.mean()) * plain - np.sign(repaired.mean()) * repaired
            said.append(f'  - {ratio:g}: {markdown.verdict(sizes, 1)}')
            gained = [
                f'from {rate:g} {markdown.verdict(at[REPAIRS[1], rate] - at[REPAIRS[0], rate], 1)}'
                for rate in RATES
            ]
            repairing.append(f'  - {ratio:g}: {"; ".join(gained)}')
        times = f'L1, {RATES[1]:g}, {longer / short:g} x the epochs'
        more = [times] if longer > short else []
        head = ['removed', *(f'{repair}, {rate:g}' for repair in REPAIRS for rate in RATES), *more,
                'gap, L1', 'gap, L1 + OrthP', *(f'gap to {name}' for name in more)]  # fmt: skip
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
    for net in nets:
        here = frame.filter((pl.col('net') == net) & (pl.col('repair') != DENSE))
        here = here.filter(pl.col('epochs') == pl.col('epochs').min())
        key = ['seed', 'ratio', 'repair', 'rate']
        early = here.filter((pl.col('epoch') > 0) & (pl.col('epoch') <= pl.col('epochs') / 3))
        both = early.group_by(key).agg(early=pl.col('accuracy').mean()).join(
            here.filter(pl.col('epoch') == pl.col('epochs')), on=key
        )  # fmt: skip
        found = []
        for repair, rate in itertools.product(REPAIRS, RATES):
            of = both.filter((pl.col('repair') == repair) & (pl.col('rate') == rate))
            rank = scipy.stats.spearmanr(of['early'], of['accuracy'])[0]
            found.append(f'{repair} from {rate:g} {rank:.2f}')
        lines.append(f'- {net}: {"; ".join(found)}')
    return '\n'.join(lines)


def draw(frame: pl.DataFrame, nets: Sequence[str]) -> bytes:
    """Per net: spectra and accuracies by ratio; how the spectrum comes back while training."""
    with style.context():
        drawing = style.figure(style.WIDTH, 0.6 + 2.5 * len(nets))
        grid = drawing.add_gridspec(len(nets), 3)
        for row, net in enumerate(nets):
            here = frame.filter(pl.col('net') == net)
            here = here.filter(pl.col('epochs') == pl.col('epochs').min())
            ratios = _ratios(here)
            left, middle, right = (drawing.add_subplot(grid[row, i]) for i in range(3))
            start = here.filter(pl.col('epoch') == 0)
            last = here.filter(pl.col('epoch') == pl.col('epochs'))
            for repair, line in zip(REPAIRS, ('-', '--'), strict=True):
                of = _pruned(start, repair).group_by('ratio')
                means = of.agg(pl.col('jsv_mean').mean()).sort('ratio')
                left.plot(means['ratio'], means['jsv_mean'], line, marker='o', markersize=4,
                          color=style.INK)  # fmt: skip
                for rate in RATES:
                    values = [_by_seed(last, r, repair, rate, here['epochs'].min()) for r in ratios]
                    label = f'{repair}, from {rate:g}'
                    middle.plot(ratios, [v.mean() for v in values], line, marker='o', markersize=4,
                                color=COLOURS[rate], label=label)  # fmt: skip
                    middle.fill_between(ratios, [v.min() for v in values],
                                        [v.max() for v in values], color=COLOURS[rate],
                                        alpha=0.12, linewidth=0)  # fmt: skip
                    middle_ratio = min(ratios, key=lambda r: abs(r - 0.7))
                    along = here.filter(
                        (pl.col('ratio') == middle_ratio)
                        & (pl.col('repair') == repair)
                        & (pl.col('rate') == rate)
                    )
                    curve = along.group_by('epoch').agg(pl.col('jsv_mean').mean()).sort('epoch')
                    right.plot(curve['epoch'], curve['jsv_mean'], line, color=COLOURS[rate])
            left.set_yscale('log')
            right.set_yscale('log')
            left.set_title(f'{net}: mean singular value')
            middle.set_title('accuracy after fine-tuning (%)')
            right.set_title(f'mean singular value, {middle_ratio:g} removed')
            right.set_xlabel('epoch of fine-tuning')
            right.xaxis.set_major_locator(MaxNLocator(integer=True))
            for axes in (left, middle):
                axes.set_xlabel('share of filters removed')
        handles, labels = middle.get_legend_handles_labels()
        drawing.legend(handles, labels, loc='outside upper center', ncols=4, handlelength=4)
        return style.png(drawing)


def _ratios(frame: pl.DataFrame) -> list[float]:
    return sorted(set(frame.filter(pl.col('repair') != DENSE)['ratio']))


def _by_seed(
    frame: pl.DataFrame, ratio: float, repair: str, rate: float, epochs: int
) -> np.ndarray:
    found = frame.filter(
        (pl.col('ratio') == ratio)
        & (pl.col('repair') == repair)
        & (pl.col('rate') == rate)
        & (pl.col('epochs') == epochs)
    )
    return found.sort('seed')['accuracy'].to_numpy()


if __name__ == '__main__':
    sys.exit(main())
