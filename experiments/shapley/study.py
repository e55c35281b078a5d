"""Shapley values against other rankings of units: curves, areas, fine-tuning, an untrained net.

    python experiments/shapley/study.py --out runs/shapley

Trains small VGGs on CIFAR-10 and LeNet-5s on digits, ranks their units by nine methods on 100, 300
and 1000 training examples, removes them in that order, and measures what is lost. Finished parts
are kept in the output folder: a second call goes on from there. Prints markdown, and writes it with
three figures into the folder.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

sys.path.append(str(Path(__file__).parent.parent / 'common'))

from command import parser_of, publish
from curves import kept_units, removal_curves
from outcomes import figures, written
from parts import folder_of, part
from scores import Ranking, make_rankings, rankings_of, table_of
from trained import FULL, QUICK, TITLES, Net, Settings, finetuned, spec_hashes, trained_net
from untrained import demonstration

from jaxprune.errors import JaxpruneError
from jaxprune.sweep import keep_compiled, use_all_cores


def main() -> int:
    parser = parser_of(__doc__, 'runs/shapley')
    parser.add_argument('--net', action='append', choices=TITLES, help='these only; both without')
    arguments = parser.parse_args()
    use_all_cores()
    keep_compiled()
    settings = QUICK if arguments.quick else FULL
    try:
        tables = measured(
            settings, arguments.net or list(TITLES), arguments.out, arguments.data_dir
        )
    except JaxpruneError as error:
        raise SystemExit(str(error)) from None
    publish(arguments.out, written(tables, settings), figures(tables, settings))
    return 0


def measured(
    settings: Settings, names: Sequence[str], out: Path, data_dir: str | None
) -> dict[str, pl.DataFrame]:
    """The tables 'curves', 'finetuned', 'left', 'untrained'; parts that are on disk are read."""
    folder = folder_of(out, settings, *spec_hashes(settings))
    curves, finetuned_rows, left = [], [], []
    for name in names:
        net = trained_net(name, settings, out / 'nets', data_dir)
        scored, scores = make_rankings(net, settings), []
        for number, seed in enumerate(net.seeds):
            make = partial(lambda score, i: table_of(score(i)), scored, number)
            scores.append(part(folder / f'{name}_scores_{seed}.parquet', make))
            make = partial(removal_curves, net, number, rankings_of(scores[-1]), settings)
            frame = part(folder / f'{name}_curves_{seed}.parquet', make)
            curves.append(frame.with_columns(net=pl.lit(name), seed=seed))
        make = partial(after_finetuning, net, scores, settings)
        frame = part(folder / f'{name}_finetuned.parquet', make)
        finetuned_rows.append(frame.with_columns(net=pl.lit(name)))
        left.append(units_left(net, scores, settings).with_columns(net=pl.lit(name)))
    untrained = part(folder / 'untrained.parquet', partial(demonstration, settings))
    return {
        'curves': pl.concat(curves),
        'finetuned': pl.concat(finetuned_rows),
        'left': pl.concat(left),
        'untrained': untrained,
    }


def tuned_rankings(scores: pl.DataFrame, settings: Settings) -> list[Ranking]:
    """Those of all examples; the first of the random ones."""
    most = (0, max(settings.examples))
    return [r for r in rankings_of(scores) if not r.draw and r.examples in most]


def units_left(net: Net, scores: Sequence[pl.DataFrame], settings: Settings) -> pl.DataFrame:
    """A row per seed, method, share of the units removed and layer: `units` that are left."""
    rows = [
        (seed, ranking.method, share, layer, int(own.sum()))
        for seed, table in zip(net.seeds, scores, strict=True)
        for ranking in tuned_rankings(table, settings)
        for share in settings.shares
        for layer, own in kept_units(ranking, share).items()
    ]
    return pl.DataFrame(rows, schema=['seed', 'method', 'share', 'layer', 'units'], orient='row')


def after_finetuning(net: Net, scores: Sequence[pl.DataFrame], settings: Settings) -> pl.DataFrame:
    """A row per network: `seed`, `method`, `share` of the units removed; `loss`, `accuracy` (%)
    right after that, and `tuned_loss`, `tuned_accuracy` after fine-tuning.

    Rankings are those of all examples; the first of the random ones. 'dense' has all units.
    """
    dense = {layer: np.ones(shape, bool) for layer, shape in net.units.shapes.items()}
    names, kept = [], []
    for number, seed in enumerate(net.seeds):
        names.append((seed, 'dense', 0.0))
        kept.append((number, dense))
        for ranking in tuned_rankings(scores[number], settings):
            for share in settings.shares:
                names.append((seed, ranking.method, share))
                kept.append((number, kept_units(ranking, share)))
    before, after = finetuned(net, kept, settings)
    schema = ['seed', 'method', 'share', 'loss', 'accuracy', 'tuned_loss', 'tuned_accuracy']
    rows = [(*n, *map(float, (*b, *a))) for n, b, a in zip(names, before, after, strict=True)]
    return pl.DataFrame(rows, schema=schema, orient='row')


if __name__ == '__main__':
    sys.exit(main())
