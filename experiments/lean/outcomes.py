"""Tables, verdicts and figures of the study, from its measurements."""

from typing import NamedTuple

import numpy as np
import polars as pl
from descent import DENSE, METHODS
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from shapes import CLASSES
from where import KEPT

from jaxprune.report import markdown, style
from jaxprune.report.text import number
from jaxprune.stats import student_interval

HEAD = """\
# Outcomes of the study of LEAN

Intervals: Student's, of 95 %, for the mean over seeds; differences are paired by seed. The
network, and what all this says: [README](README.md)."""
#: Shares of tables, in %; the rounds whose targets are nearest stand for them.
SHARES = (50, 20, 10, 5, 2, 1, 0.5)
LEAN = 'LEAN'
#: Pruning of single kernels, each by itself.
SINGLE = ('operator norm', 'L1 norm')
#: Levels of IoU, in % of the dense network's.
LEVELS = (98, 95, 90, 80, 70, 60)
#: Shares in % of the figure with examples.
SHOWN = (5, 1)


class Tables(NamedTuple):
    """What was measured.

    Attributes:
      rounds: the columns of `descent`, with `method` and `seed`.
      where: those of `where_kept`, with `seed`.
      examples: some test images and facts, see `examples_of`.
    """

    rounds: pl.DataFrame
    where: pl.DataFrame
    examples: pl.DataFrame


def targets(rounds: pl.DataFrame) -> list[float]:
    """The targets nearest to `SHARES`, each once, falling."""
    every = rounds.filter(pl.col('target') < 99.9)['target'].unique().to_numpy()
    near = {every[np.abs(np.log(every / share)).argmin()] for share in SHARES}
    return sorted(map(float, near), reverse=True)


def values(rounds: pl.DataFrame, method: str, target: float, column: str) -> np.ndarray:
    """By seed."""
    own = rounds.filter((pl.col('method') == method) & ((pl.col('target') - target).abs() < 1e-6))
    return own.sort('seed')[column].to_numpy()


def written(tables: Tables, side: int) -> str:
    """Everything as markdown."""
    rounds = tables.rounds
    parts = [
        HEAD,
        quality_text(rounds, tables.examples),
        shares_text(rounds),
        better_text(rounds),
        fewer_text(rounds),
        lost_text(rounds),
        where_text(tables.where, side),
    ]
    return '\n\n'.join(parts) + '\n'


def quality_text(rounds: pl.DataFrame, examples: pl.DataFrame) -> str:
    background = examples['background'][0]
    lines = [
        f'## Quality by share of the {examples["convolutions"][0]:,} convolutions',
        '',
        'Columns: the target of a round. Fewer are left where some are on no path any more: see '
        'the next table. A network that calls everything background has a mean IoU of '
        f'{background / len(CLASSES):.1f} % and an accuracy of {background:.1f} %.',
    ]
    for column, what in (('iou', 'Mean IoU (%)'), ('accuracy', 'Pixel accuracy (%)')):
        rows = [
            [
                method,
                *(
                    markdown.interval(values(rounds, method, t, column), 1)
                    for t in _columns(rounds)
                ),
            ]
            for method in (DENSE, *METHODS)
        ]
        lines += ['', f'{what}:', '', markdown.table(['', *_heads(rounds)], rows)]
    return '\n'.join(lines)


def _columns(rounds: pl.DataFrame) -> list[float]:
    return [100.0, *targets(rounds)]


def _heads(rounds: pl.DataFrame) -> list[str]:
    return [f'{number(float(f"{t:.2g}"))} %' for t in _columns(rounds)]


def shares_text(rounds: pl.DataFrame) -> str:
    rows = []
    for method in METHODS:
        cells = []
        for target in targets(rounds):
            found = values(rounds, method, target, 'share')
            cells.append(f'{found.mean():.2f} ({found.min():.2f} to {found.max():.2f})')
        rows.append([method, *cells])
    return '\n'.join(
        [
            '## What is really left (%)',
            '',
            'Mean over seeds, and the smallest and the largest: convolutions on a path from the '
            'image to the output. A round that finds fewer than it is to keep prunes nothing.',
            '',
            markdown.table(['to keep', *_heads(rounds)[1:]], rows),
        ]
    )


def better_text(rounds: pl.DataFrame) -> str:
    rows = [
        [f'{LEAN} above {other}']
        + [
            markdown.verdict(
                values(rounds, LEAN, target, 'iou') - values(rounds, other, target, 'iou'), 1
            )
            for target in targets(rounds)
        ]
        for other in METHODS
        if other != LEAN
    ]
    return '\n'.join(
        [
            '## Is LEAN better at the same target?',
            '',
            'Points of mean IoU: "holds" if the interval lies above zero, "reversed" if below, '
            '"open" if neither.',
            '',
            markdown.table(['', *_heads(rounds)[1:]], rows),
        ]
    )


def fewest(rounds: pl.DataFrame, method: str, level: float) -> np.ndarray:
    """The share left by the last round before the IoU first falls below `level` % of that before
    pruning; by seed."""
    found = []
    for _, own in (
        rounds.filter(pl.col('method') == method).sort('seed').group_by('seed', maintain_order=True)
    ):
        own = own.sort('target', descending=True)
        enough = own['iou'].to_numpy() >= level / 100 * own['iou'][0]
        last = len(own) if enough.all() else int(np.argmin(enough))
        found.append(own['share'][last - 1])
    return np.array(found, float)


def fewer_text(rounds: pl.DataFrame) -> str:
    rows = []
    for level in LEVELS:
        least = {method: fewest(rounds, method, level) for method in METHODS}
        cells = [f'{np.exp(np.log(least[m]).mean()):.2f}' for m in METHODS]
        for other in SINGLE:
            gain = np.log(least[other] / least[LEAN])
            low, high = np.exp(student_interval(gain))
            word = 'holds' if low > 1 else 'reversed' if high < 1 else 'open'
            cells.append(f'{word}, {np.exp(gain.mean()):.2f} [{low:.2f}, {high:.2f}]')
        rows.append([f'{level} %', *cells])
    head = ['of the IoU before pruning', *METHODS, *(f'{other} / {LEAN}' for other in SINGLE)]
    return '\n'.join(
        [
            '## How many convolutions does a quality need?',
            '',
            'The share really left (%) by the last round before the IoU first falls below this '
            'part of that before pruning, the geometric mean over seeds. Last: how many times '
            'fewer LEAN needs than single kernels do; "holds" if the interval lies above 1. '
            'Published: 1.7 to 12.',
            '',
            markdown.table(head, rows),
        ]
    )


def lost_text(rounds: pl.DataFrame) -> str:
    rows = []
    for column, what in (('iou', 'mean IoU'), ('accuracy', 'pixel accuracy')):
        for base, name in ((None, 'before pruning'), (DENSE, f'{DENSE}, trained as long')):
            cells = []
            for target in targets(rounds):
                before = (
                    values(rounds, DENSE, 100.0, column)
                    if base is None
                    else values(rounds, base, target, column)
                )
                lost = before - values(rounds, LEAN, target, column)
                low, _ = student_interval(lost)
                word = 'lost' if low > 0 else 'not significant'
                cells.append(f'{word}, {markdown.difference(lost, 1)}')
            rows.append([f'{what}, {name}', *cells])
    return '\n'.join(
        [
            '## What does LEAN lose?',
            '',
            'Points less than a network with all convolutions; "lost" if the interval lies above '
            'zero. Published: none significant at 0.5 to 2 %, on some tasks.',
            '',
            markdown.table(['', *_heads(rounds)[1:]], rows),
        ]
    )


def where_text(where: pl.DataFrame, side: int) -> str:
    rows, scales = [], sorted(where['scale'].unique())
    for method in ('dense', *METHODS):
        own = where.filter(pl.col('method') == method)
        of_seed = [frame.sort('scale') for _, frame in own.group_by('seed', maintain_order=True)]
        kept = np.stack([frame['kept'].to_numpy() for frame in of_seed])
        skips = np.array([frame['skips'].sum() for frame in of_seed])
        rows.append([method, *(f'{count:.1f}' for count in (kept.sum(1).mean(), *kept.mean(0)))])
        rows[-1].append(f'{skips.mean():.1f}')
    sides = [side // 2**k for k in scales]
    head = ['', 'all', *(f'on {n} x {n}' for n in sides), 'read a skip connection']
    return '\n'.join(
        [
            f'## Where are {100 * KEPT:g} %, kept in one round?',
            '',
            'Convolutions of the trained networks on a path before any retraining, the mean over '
            'seeds: all, those on maps of each size, and those that read what the way down passed '
            'on.',
            '',
            markdown.table(head, rows),
        ]
    )


# --- figures ------------------------------------------------------------------------------------


def figures(tables: Tables, side: int) -> dict[str, bytes]:
    """Name -> PNG."""
    return {
        'lean': draw_curves(tables.rounds, tables.examples),
        'examples': draw_examples(tables.rounds, tables.examples, side),
    }


def draw_curves(rounds: pl.DataFrame, examples: pl.DataFrame) -> bytes:
    """Quality against the share left, and the share left against the target."""
    styles = style.lines(tuple(METHODS))
    every = np.sort(rounds['target'].unique().to_numpy())[::-1]
    nothing = examples['background'][0] / len(CLASSES)
    with style.context():
        drawing = style.figure(style.WIDTH, 4.4)
        grid = drawing.add_gridspec(1, 2, width_ratios=(3, 2))
        left, right = (drawing.add_subplot(grid[0, k]) for k in range(2))
        for name in METHODS:
            iou, share = (
                np.stack([values(rounds, name, t, column) for t in every])
                for column in ('iou', 'share')
            )
            _band(left, share.mean(1), iou, student_interval(iou), styles[name], name)
            _band(right, every, share, (share.min(1), share.max(1)), styles[name], name)
        dense = np.array([values(rounds, DENSE, t, 'iou').mean() for t in every])
        left.plot(every, dense, color=style.INK, linewidth=0.8, label=f'{DENSE}, trained as long')
        quiet = {'color': style.QUIET, 'linewidth': 0.8}
        left.axhline(nothing, **quiet, linestyle=':', label='all background')
        right.plot(every, every, **quiet, linestyle='--')
        left.set_ylim(nothing - 6, dense.max() + 6)
        left.set_ylabel('mean IoU (%)')
        right.set_ylabel('convolutions on a path (%)')
        left.set_xlabel('convolutions on a path (%)')
        right.set_xlabel('target (%); dashed: none is redundant')
        ticks = [100, 50, 20, 10, 5, 2, 1, 0.5, 0.2]
        right.set_yscale('log')
        right.set_ylim(0.15, 120)
        right.set_yticks(ticks, [f'{t:g}' for t in ticks])
        for axes in (left, right):
            axes.set_xscale('log')
            axes.invert_xaxis()
            shown = ticks if axes is left else ticks[:-1]
            axes.set_xticks(shown, [f'{t:g}' for t in shown])
            axes.minorticks_off()
        handles, labels = left.get_legend_handles_labels()
        drawing.legend(handles, labels, loc='outside upper center', ncols=4)
        return style.png(drawing)


def _band(
    axes: Axes,
    x: np.ndarray,
    found: np.ndarray,
    ends: tuple[np.ndarray, np.ndarray],
    props: dict,
    label: str,
) -> None:
    """The mean over seeds in a band; a logarithmic axis has no place for zero."""
    at = x > 0
    low, high = np.maximum(ends, 1e-3)
    axes.plot(x[at], found.mean(1)[at], **props, markersize=4.5, label=label)
    axes.fill_between(x[at], low[at], high[at], color=props['color'], alpha=0.13, linewidth=0)


#: Colours of `CLASSES` in pictures.
_LABELS = ListedColormap(['#e8e8e8', '#0072B2', '#D55E00'])


def draw_examples(rounds: pl.DataFrame, examples: pl.DataFrame, side: int) -> bytes:
    """Test images, the truth, and labels by networks of the first seed."""
    first = rounds.filter(pl.col('seed') == rounds['seed'].min())
    every = targets(rounds)
    shown = [min(every, key=lambda t, s=share: abs(np.log(t / s))) for share in SHOWN]
    methods = [method for method in METHODS if method != 'random']
    columns = [(DENSE, 100.0), *((m, t) for t in dict.fromkeys(shown) for m in methods)]
    count = len(examples)
    with style.context():
        drawing = style.figure(style.WIDTH, 0.7 + 0.86 * count)
        grid = drawing.subplots(count, 2 + len(columns), squeeze=False)
        for row in range(count):
            image = np.frombuffer(examples['image'][row], np.float32).reshape(side, side, 3)
            grid[row, 0].imshow(np.clip(0.25 * image + 0.5, 0, 1))
            _labels(grid[row, 1], examples['truth'][row], side)
            for place, (method, target) in enumerate(columns, 2):
                labels = _of(first, method, target)[row * side**2 : (row + 1) * side**2]
                _labels(grid[row, place], labels, side)
        heads = ['image', 'truth', 'dense']
        heads += [f'{style.wrapped(m, 11)}\n{number(float(f"{t:.2g}"))} %' for m, t in columns[1:]]
        for axes, head in zip(grid[0], heads, strict=True):
            axes.set_title(head, fontsize=8)
        for axes in grid.flat:
            axes.set_axis_off()
        return style.png(drawing)


def _of(rounds: pl.DataFrame, method: str, target: float) -> bytes:
    own = rounds.filter((pl.col('method') == method) & ((pl.col('target') - target).abs() < 1e-6))
    return own['labels'][0]


def _labels(axes: Axes, labels: bytes, side: int) -> None:
    found = np.frombuffer(labels, np.uint8).reshape(side, side)
    axes.imshow(found, cmap=_LABELS, vmin=0, vmax=len(CLASSES) - 1, interpolation='nearest')
