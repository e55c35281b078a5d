"""How well estimates know the loss without a unit: their correlations with the exact change.

    python experiments/taylor/study.py --out runs/taylor --nets runs/shapley/nets

The networks are those of `experiments/shapley`, trained here unless they are there. Finished
parts are kept in the output folder: a second call goes on from there. Prints markdown, and
writes it with two figures into the folder.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import polars as pl

sys.path += [str(Path(__file__).parent.parent / other) for other in ('shapley', 'common')]

from command import parser_of, publish
from correlations import figures, written
from estimates import make_estimates
from parts import folder_of, part
from trained import FULL, QUICK, TITLES, Settings, spec_hashes, trained_net

from jaxprune.errors import JaxpruneError
from jaxprune.sweep import keep_compiled, use_all_cores


def main() -> int:
    parser = parser_of(__doc__, 'runs/taylor')
    parser.add_argument(
        '--nets', type=Path, default=Path('runs/shapley/nets'), help='folder of trained networks'
    )
    parser.add_argument('--net', action='append', choices=TITLES, help='these only; both without')
    arguments = parser.parse_args()
    use_all_cores()
    keep_compiled()
    settings = QUICK if arguments.quick else FULL
    try:
        table = measured(settings, arguments)
    except JaxpruneError as error:
        raise SystemExit(str(error)) from None
    publish(arguments.out, written(table), figures(table))
    return 0


def measured(settings: Settings, arguments: argparse.Namespace) -> pl.DataFrame:
    """The estimates of all units, networks and seeds; parts that are on disk are read."""
    folder, frames = folder_of(arguments.out, settings, *spec_hashes(settings)), []
    for name in arguments.net or TITLES:
        net = trained_net(name, settings, arguments.nets, arguments.data_dir)
        estimates = make_estimates(net, settings)
        for number, seed in enumerate(net.seeds):
            frame = part(folder / f'{name}_{seed}.parquet', partial(estimates, number))
            frames.append(frame.with_columns(net=pl.lit(name), seed=seed))
    return pl.concat(frames)


if __name__ == '__main__':
    sys.exit(main())
