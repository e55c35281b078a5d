"""Single kernels on long paths against single kernels by their norm, in a small U-Net.

    python experiments/lean/study.py --out runs/lean

Trains U-Nets that find shapes drawn over CIFAR-10 images, and prunes them in rounds down to 0.5 %
of their convolutions: by LEAN, by norms of single kernels, by norms of whole filters, at random.
Finished parts are kept in the output folder: a second call goes on from there. Prints markdown,
and writes it with two figures into the folder.
"""

import functools
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import polars as pl

sys.path.append(str(Path(__file__).parent.parent / 'common'))

from command import parser_of, publish
from descent import DENSE, METHODS, Schedule, convolutions, descent, make_shrink
from outcomes import Tables, figures, written
from parts import folder_of, part
from shapes import CLASSES, Drawn, drawn_sets
from training import Net, make_measure, make_train
from unet import unet_problem
from where import where_kept

import jaxprune as jp
from jaxprune import data
from jaxprune.errors import JaxpruneError
from jaxprune.sweep import keep_compiled
from jaxprune.types import Masks, PyTree

SIDE = 32


class Settings(NamedTuple):
    """Sizes of the study.

    Attributes:
      widths: channels of the U-Net at each scale.
      train: images to train on.
      test: images to test on.
      batch: images of a training step.
      steps: of training before pruning.
      rate: of that training at its start.
      schedule: the rounds of pruning.
      seeds: of initial weights, order of images and random masks.
    """

    widths: tuple[int, ...]
    train: int
    test: int
    batch: int
    steps: int
    rate: float
    schedule: Schedule
    seeds: tuple[int, ...]


FULL = Settings(
    widths=(8, 16, 32),
    train=6000,
    test=500,
    batch=16,
    steps=1000,
    rate=5e-3,
    schedule=Schedule(last=0.005, rounds=16, steps=80, rate=4e-3, shown=4),
    seeds=(0, 1, 2, 3, 4),
)
#: Everything once, for a test; its numbers mean nothing.
QUICK = FULL._replace(
    train=400,
    test=100,
    steps=100,
    schedule=FULL.schedule._replace(last=0.05, rounds=4, steps=12),
    seeds=(0, 1),
)


def main() -> int:
    parser = parser_of(__doc__, 'runs/lean')
    arguments = parser.parse_args()
    keep_compiled()
    settings = QUICK if arguments.quick else FULL
    try:
        tables = measured(settings, arguments.out, arguments.data_dir)
    except JaxpruneError as error:
        raise SystemExit(str(error)) from None
    publish(arguments.out, written(tables, SIDE), figures(tables, SIDE))
    return 0


def measured(settings: Settings, out: Path, data_dir: str | None) -> Tables:
    """All tables; parts that are on disk are read."""
    folder = folder_of(out, settings)
    problem = unet_problem(settings.widths, len(CLASSES), SIDE)

    def all_kept(params: PyTree) -> Masks:
        shapes = jp.shapes(jp.pick(params, problem.prunable))
        return {path: np.ones(shape, bool) for path, shape in shapes.items()}

    @functools.cache
    def sets() -> tuple[Drawn, Drawn]:
        return drawn_sets(data.load('cifar10', data_dir), settings.train, settings.test)

    @functools.cache
    def tools():
        train, test = sets()
        return make_train(problem, train, settings.batch), make_measure(problem, test)

    @functools.cache
    def trained(seed: int) -> tuple[Net, Masks]:
        """The network of a seed, and masks of all ones."""
        net = Net(*jax.jit(problem.init)(jax.random.key(seed)))
        masks = all_kept(net.params)
        draw = np.random.default_rng([seed, 0])
        return tools()[0](net, masks, draw, settings.steps, settings.rate), masks

    shrink = functools.cache(lambda method: make_shrink(problem, method, SIDE))

    def rounds_of(method: str, seed: int) -> pl.DataFrame:
        dense, masks = trained(seed)
        train, measure = tools()
        draw = np.random.default_rng([seed, 1])  # the same images for all methods
        by = None if method == DENSE else shrink(method)
        key = jax.random.key(seed)
        return descent(dense, key, draw, settings.schedule, by, train, measure, masks)

    def where(seed: int) -> pl.DataFrame:
        shrinks = {method: shrink(method) for method in METHODS}
        return where_kept(*trained(seed), jax.random.key(seed), shrinks, settings.widths)

    frames, places = [], []
    for seed in settings.seeds:
        frame = part(folder / f'where_{seed}.parquet', functools.partial(where, seed))
        places.append(frame.with_columns(seed=seed))
        for method in (DENSE, *METHODS):
            name = f'{method.replace(" ", "_")}_{seed}.parquet'
            frame = part(folder / name, functools.partial(rounds_of, method, seed))
            frames.append(frame.with_columns(method=pl.lit(method), seed=seed))

    def examples() -> pl.DataFrame:
        params, _ = jax.eval_shape(problem.init, jax.random.key(0))
        return examples_of(sets()[1], settings.schedule.shown, convolutions(all_kept(params)))

    shown = part(folder / 'examples.parquet', examples)
    return Tables(pl.concat(frames), pl.concat(places), shown)


def examples_of(test: Drawn, count: int, size: int) -> pl.DataFrame:
    """A row per image: `image`, bytes of float32, and `truth`, bytes of uint8; and what all share:
    `background`, that part of all test pixels in %, and `convolutions` of the network."""
    return pl.DataFrame(
        {
            'image': [image.tobytes() for image in test.images[:count]],
            'truth': [truth.astype(np.uint8).tobytes() for truth in test.truth[:count]],
            'background': 100 * float((test.truth == 0).mean()),
            'convolutions': size,
        }
    )


if __name__ == '__main__':
    sys.exit(main())
