"""What the study of isometry says should come out, from the table of `study.py`, with numbers.

    python experiments/isometry/outcomes.py runs/isometry --out runs/isometry/outcomes.md

Prints markdown, writes it, and draws `isometry.png` beside it. Differences are paired by seed;
intervals are 95 % percentile bootstraps of their mean. "holds" and "reversed" mean that the
interval lies on one side of zero.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import scipy.stats

from jaxprune.report import markdown, style

REPAIRS = ('L1', 'L1 + OrthP')
RATES = (1e-2, 1e-3)
COLOURS = {1e-2: '#D55E00', 1e-3: '#0072B2'}


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
    text = '\n\n'.join(parts) + '\n'
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
    arms = ended.filter(pl.col('epochs') == pl.col('epochs').min().over('net'))
    seeds = arms.group_by('net', 'ratio', 'repair', 'rate').agg(pl.col('seed').sort())
    if seeds.height % (len(REPAIRS) * len(RATES)) or seeds['seed'].n_unique() > 1:
        raise SystemExit('some arms lack runs: finish study.py with the same seeds for all')
    return frame


def spectra(frame: pl.DataFrame, nets: Sequence[str]) -> str:
    """Mean singular values right after pruning, before and after the repair."""
    rows, notes = [], []
    for net in nets:
        start = frame.filter((pl.col('net') == net) & (pl.col('epoch') == 0))
        for repair in REPAIRS:
            cells, means = [], []
            for ratio in _ratios(frame):
                here = start.filter((pl.col('ratio') == ratio) & (pl.col('repair') == repair))
                if here.is_empty():  # a ratio of other nets
                    cells.append('')
                    continue
                means.append(here['jsv_mean'].mean())
                cells.append(f'{means[-1]:.3g}')
            rows.append([net, repair, *cells])
            if repair == 'L1':
                falls = all(a > b for a, b in itertools.pairwise(means))
                notes.append(f'- {net}: {"falls" if falls else "does not fall"} with every ratio')
    head = ['net', '', *(f'{r:g}' for r in _ratios(frame))]
    return '\n'.join(
        ['## Mean singular value of the Jacobian right after pruning', '', 'Means over seeds.', '',
         markdown.table(head, rows), '', *notes]
    )  # fmt: skip


def gaps(frame: pl.DataFrame, nets: Sequence[str]) -> str:
    """Final accuracies, and how much of the gap between the rates a repair or more time closes."""
    lines = ['## Final accuracy, and the gap between the learning rates', '']
    for net in nets:
        here = frame.filter(pl.col('net') == net)
        short = here['epochs'].min()
        last = here.filter(pl.col('epoch') == pl.col('epochs'))
        rows, said = [], []
        for ratio in _ratios(here):
            at = {
                (repair, rate): _by_seed(last, ratio, repair, rate, short)
                for repair in REPAIRS
                for rate in RATES
            }
            plain, repaired = (at[r, RATES[0]] - at[r, RATES[1]] for r in REPAIRS)
            cells = [markdown.spread(a, 1) for a in at.values()]
            longer = here['epochs'].max()
            more = ''
            if longer > short:
                slow = _by_seed(last, ratio, 'L1', RATES[1], longer)
                more = markdown.spread(slow, 1)
            rows.append(
                [
                    f'{ratio:g}',
                    *cells,
                    more,
                    markdown.difference(plain, 1),
                    markdown.difference(repaired, 1),
                ]
            )
            said.append(f'  - {ratio:g}: {markdown.verdict(abs(plain) - abs(repaired), 1)}')
        head = ['removed', *(f'{repair}, {rate:g}' for repair in REPAIRS for rate in RATES),
                'L1, 0.001, longer', 'gap, L1', 'gap, L1 + OrthP']  # fmt: skip
        lines += [f'### {net}', '', markdown.table(head, rows), '',
                  '- **the gap is smaller with OrthP, whichever rate is ahead** (points):', *said,
                  '']  # fmt: skip
    return '\n'.join(lines).rstrip()


def trainability(frame: pl.DataFrame, nets: Sequence[str]) -> str:
    """Does accuracy over the first stage of the schedule track the final one?"""
    lines = [
        '## Trainability accuracy',
        '',
        'Mean accuracy over the epochs before the first decay, against the final one: rank '
        'correlation over all runs of the same schedule (arXiv:2301.05219, eq. 1).',
        '',
    ]
    for net in nets:
        here = frame.filter((pl.col('net') == net) & (pl.col('epochs') == pl.col('epochs').min()))
        key = ['seed', 'ratio', 'repair', 'rate']
        early = here.filter((pl.col('epoch') > 0) & (pl.col('epoch') <= pl.col('epochs') / 3))
        both = early.group_by(key).agg(early=pl.col('accuracy').mean()).join(
            here.filter(pl.col('epoch') == pl.col('epochs')), on=key
        )  # fmt: skip
        found = []
        for rate in RATES:
            of = both.filter(pl.col('rate') == rate)
            found.append(
                f'{scipy.stats.spearmanr(of["early"], of["accuracy"])[0]:.2f} from {rate:g}'
            )
        lines.append(f'- {net}: {", ".join(found)}')
    return '\n'.join(lines)


def draw(frame: pl.DataFrame, nets: Sequence[str]) -> bytes:
    """Per net: spectra and accuracies by ratio; how the spectrum comes back while training."""
    with style.context():
        drawing = style.figure(style.WIDTH, 2.7 * len(nets))
        grid = drawing.add_gridspec(len(nets), 3)
        for row, net in enumerate(nets):
            here = frame.filter(
                (pl.col('net') == net) & (pl.col('epochs') == pl.col('epochs').min())
            )
            ratios = _ratios(here)
            left, middle, right = (drawing.add_subplot(grid[row, i]) for i in range(3))
            start = here.filter(pl.col('epoch') == 0)
            last = here.filter(pl.col('epoch') == pl.col('epochs'))
            for repair, line in zip(REPAIRS, ('-', '--'), strict=True):
                of = start.filter(pl.col('repair') == repair).group_by('ratio')
                means = of.agg(pl.col('jsv_mean').mean()).sort('ratio')
                left.plot(means['ratio'], means['jsv_mean'], line, marker='o', markersize=4,
                          color=style.INK, label=repair)  # fmt: skip
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
            for axes in (left, middle):
                axes.set_xlabel('share of filters removed')
            if not row:
                left.legend(frameon=False, fontsize=8, handlelength=4)
                middle.legend(frameon=False, fontsize=7, handlelength=4)
        return style.png(drawing)


def _ratios(frame: pl.DataFrame) -> list[float]:
    return sorted(set(frame['ratio']))


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
