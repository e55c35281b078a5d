"""Many ways to prune while a network trains, against pruning before and after, in one command.

    python experiments/dynamic/study.py --out runs/dynamic

Runs the sweeps of this folder; a sweep that was interrupted goes on. Prints markdown, and writes it
with figures into the folder. `resnet20_full.toml` is not among them: it is for an accelerator.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / 'common'))

import polars as pl
from command import parser_of, publish
from outcomes import figures, written

import jaxprune as jp
from jaxprune.errors import JaxpruneError
from jaxprune.sweep import SweepSpec, keep_compiled, use_all_cores

HERE = Path(__file__).parent
#: Name -> its file, and what of it is replaced.
SWEEPS = {
    'lenet300100_fashion': ('lenet300100', []),
    'lenet300100_mnist': ('lenet300100', ['data.name="mnist"', 'grid.seed=[0, 1, 2]']),
    'lenet5': ('lenet5', []),
    'lenet5_mnist': ('lenet5', ['data.name="mnist"', 'grid.density=[1.0, 0.1, 0.02]']),
    'resnet20': ('resnet20', []),
}

#: What `--quick` runs: sweeps and methods.
QUICK_SWEEPS = ('lenet300100_fashion', 'lenet5')
QUICK = ('random, static', 'SNIP at init', 'lottery ticket', 'GMP', 'DPF', 'RigL')


def main() -> int:
    parser = parser_of(__doc__, 'runs/dynamic')
    arguments = parser.parse_args()
    use_all_cores()
    keep_compiled()
    try:
        sweeps = {
            name: run(name, arguments.out / name, arguments.data_dir, arguments.quick)
            for name in (QUICK_SWEEPS if arguments.quick else SWEEPS)
        }
    except JaxpruneError as error:
        raise SystemExit(str(error)) from None
    publish(arguments.out, written(sweeps), figures(sweeps))
    return 0


def run(name: str, out: Path, data_dir: str | None, quick: bool) -> pl.DataFrame:
    """The results of a finished sweep of this folder."""
    file, replaced = SWEEPS[name]
    spec = jp.load_spec(HERE / f'{file}.toml', replaced)
    return jp.run_sweep(small(spec) if quick else spec, out, data_dir=data_dir)


def small(spec: SweepSpec) -> SweepSpec:
    """Six methods, two seeds and densities, small batches: its numbers mean nothing."""
    steps = spec.data.train_examples // spec.train.batch_size  # of an epoch; clocks count them
    seeds, few = spec.grid.seed[:2], spec.grid.compression[:3]
    methods = tuple(m for m in spec.grid.method if m.label in QUICK)
    return dataclasses.replace(
        spec,
        data=dataclasses.replace(spec.data, train_examples=2 * steps, test_examples=100),
        train=dataclasses.replace(spec.train, batch_size=2),
        grid=dataclasses.replace(spec.grid, method=methods, seed=seeds, compression=few),
    )


if __name__ == '__main__':
    sys.exit(main())
