"""Numbers of units that hardware likes, against any numbers: what is lost, and what is gained.

    python experiments/tpu_alignment/study.py --out runs/tpu_alignment

Runs the two sweeps of this folder; one that was interrupted goes on. Prints markdown, and writes it
with a figure into the folder. Latency is measured on this CPU, tiles are counted for a TPU.
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).parent.parent / 'common'))

from command import parser_of, publish

import jaxprune as jp
from jaxprune.errors import JaxpruneError
from jaxprune.report import markdown, style

HERE = Path(__file__).parent
NAMES = {'mlp': '784-512-512-10, Fashion-MNIST', 'vgg': 'VGG with 96 filters, Fashion-MNIST'}
FREE = 'free'
HEAD = """\
# Outcomes: numbers of units that fit tiles

HESSO removes units until a share is left. In one ranking a layer keeps any number of them ("free"),
or the number is rounded up to a multiple. Accuracy: of the compact network, points above "free" at
the same target, paired by seed. FLOPs and padded FLOPs, of one image: times those of the dense
network; padded are those of matrix products with sides rounded up to tiles of 8 x 128, as a TPU
computes them. Times as fast: measured on this CPU, 64 images, the dense network over the compact
one. Intervals: Student's, of 95 %."""


def main() -> int:
    parser = parser_of(__doc__, 'runs/tpu_alignment')
    arguments = parser.parse_args()
    try:
        sweeps = {
            name: run(name, arguments.out / name, arguments.data_dir, arguments.quick)
            for name in NAMES
        }
    except JaxpruneError as error:
        raise SystemExit(str(error)) from None
    publish(arguments.out, written(sweeps), {'alignment': style.png(figure(sweeps))})
    return 0


def run(name: str, out: Path, data_dir: str | None, quick: bool) -> pl.DataFrame:
    """The last rows of a finished sweep of this folder."""
    spec = jp.load_spec(HERE / f'{name}.toml')
    if quick:
        seeds = spec.grid.seed[:2]
        spec = dataclasses.replace(
            spec,
            data=dataclasses.replace(spec.data, train_examples=640, test_examples=100),
            grid=dataclasses.replace(spec.grid, seed=seeds, compression=spec.grid.compression[:3]),
            record=dataclasses.replace(spec.record, compact_seeds=seeds),
        )
    results = jp.run_sweep(spec, out, data_dir=data_dir)
    return results.filter(pl.col('step') == pl.col('step').max())


def written(sweeps: Mapping[str, pl.DataFrame]) -> str:
    parts = [HEAD]
    for name, rows in sweeps.items():
        parts += [f'## {NAMES[name]}', table(rows)]
    return '\n\n'.join(parts) + '\n'


def table(rows: pl.DataFrame) -> str:
    dense = rows.filter(pl.col('method') == 'dense').row(0, named=True)
    head = ('target', 'units', 'accuracy in %', 'above free', 'FLOPs', 'padded FLOPs',
            'times as fast')  # fmt: skip
    lines = []
    for compression in compressions(rows):
        for label in labels(rows):
            own = part(rows, label, compression)
            more = own['compact_accuracy'] - part(rows, FREE, compression)['compact_accuracy']
            lines.append([
                f'{100 / compression:.0f} %', label,
                markdown.interval(100 * own['compact_accuracy'].to_numpy(), 1),
                '' if label == FREE else markdown.difference(100 * more.to_numpy(), 1),
                f'{own["flops_compact"].mean() / dense["flops_compact"]:.3f}',
                f'{own["padded_flops_compact"].mean() / dense["padded_flops_compact"]:.3f}',
                markdown.interval(own['latency_ratio'].to_numpy(), 2),
            ])  # fmt: skip
    return markdown.table(head, lines)


def compressions(rows: pl.DataFrame) -> list[float]:
    return sorted(set(rows.filter(pl.col('method') != 'dense')['target_compression']))


def labels(rows: pl.DataFrame) -> list[str]:
    found = set(rows['label'])
    return [label for label in (FREE, 'multiples of 8', 'multiples of 128') if label in found]


def part(rows: pl.DataFrame, label: str, compression: float) -> pl.DataFrame:
    own = rows.filter(pl.col('label') == label, pl.col('target_compression') == compression)
    return own.sort('seed')


def figure(sweeps: Mapping[str, pl.DataFrame]) -> Figure:
    """Accuracy against FLOPs, and against padded FLOPs."""
    columns = {'flops_compact': 'FLOPs', 'padded_flops_compact': 'padded FLOPs'}
    styles = style.lines((FREE, 'multiples of 8', 'multiples of 128'))
    with style.context():
        drawing = style.figure(style.WIDTH, 5.6)
        grid = drawing.subplots(len(sweeps), 2, sharey='row')
        shown = {}
        for panels, (name, rows) in zip(np.atleast_2d(grid), sweeps.items(), strict=True):
            dense = rows.filter(pl.col('method') == 'dense')
            for axes, (column, title) in zip(panels, columns.items(), strict=True):
                for label in labels(rows):
                    points = [part(rows, label, c) for c in compressions(rows)]
                    x = [p[column].mean() / dense[column][0] for p in points]
                    y = [100 * p['compact_accuracy'].mean() for p in points]
                    shown[label] = axes.plot(x, y, **styles[label])[0]
                axes.axhline(100 * dense['test_accuracy'].mean(), color='0.5', linewidth=0.8)
                axes.set_xlabel(f'{title}, of the dense network')
            panels[0].set_title(NAMES[name])
            panels[0].set_ylabel('test accuracy (%)')
        drawing.legend(shown.values(), shown, loc='outside upper center', ncols=3, frameon=False)
        return drawing


if __name__ == '__main__':
    sys.exit(main())
