"""Networks that are pruned while they train, against prune-then-fine-tune, in one command.

    python experiments/oto/study.py --out runs/oto

Runs the sweeps of this folder, `vgg`, `lenet5`, `transformer` and `penalties`; a sweep that was
interrupted goes on. Prints markdown, and writes it with figures into the folder.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / 'common'))

from command import parser_of, publish
from outcomes import Sweep, figures, written

import jaxprune as jp
from jaxprune.errors import JaxpruneError
from jaxprune.sweep import SweepSpec, store

HERE = Path(__file__).parent
SWEEPS = ('vgg', 'lenet5', 'transformer', 'penalties')


def main() -> int:
    parser = parser_of(__doc__, 'runs/oto')
    arguments = parser.parse_args()
    try:
        sweeps = {
            name: run(name, arguments.out / name, arguments.data_dir, arguments.quick)
            for name in SWEEPS
        }
    except JaxpruneError as error:
        raise SystemExit(str(error)) from None
    publish(arguments.out, written(sweeps), figures(sweeps))
    return 0


def run(name: str, out: Path, data_dir: str | None, quick: bool) -> Sweep:
    """A finished sweep of this folder."""
    spec = jp.load_spec(HERE / f'{name}.toml')
    if quick:
        spec = small(spec)
    results = jp.run_sweep(spec, out, data_dir=data_dir)
    return Sweep(results, store.read_flow(out))


def small(spec: SweepSpec) -> SweepSpec:
    """Two seeds, one density, small networks and a few steps; its numbers mean nothing."""
    less = {'small_vgg': {'widths': [6]}, 'transformer': {'dim': 8, 'depth': 1}}
    options = {**spec.model.options, **less.get(spec.model.name, {})}
    seeds = spec.grid.seed[:2]
    return dataclasses.replace(
        spec,
        model=dataclasses.replace(spec.model, options=options),
        data=dataclasses.replace(spec.data, train_examples=320, test_examples=100),
        grid=dataclasses.replace(spec.grid, seed=seeds, compression=spec.grid.compression[:2]),
        record=dataclasses.replace(spec.record, compact_seeds=seeds),
    )


if __name__ == '__main__':
    sys.exit(main())
