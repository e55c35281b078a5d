"""Movement against magnitude when a transformer is fine-tuned, in one command.

    python experiments/movement/study.py --out runs/movement

Trains a transformer on Fashion-MNIST, then the sweep of `finetune.toml` on MNIST from its weights.
What was trained before is kept. Prints markdown, and writes it with a figure into the folder.
"""

import dataclasses
import sys
import tomllib
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / 'common'))

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
from by_density import by_seed, densities, last_rows
from command import parser_of, publish
from matplotlib.figure import Figure

import jaxprune as jp
from jaxprune import data, nn, tree
from jaxprune.errors import JaxpruneError
from jaxprune.report import markdown, style
from jaxprune.sweep import SweepSpec, keep_compiled, to_toml, use_all_cores

HERE = Path(__file__).parent
HEAD = """\
# Outcomes of the movement study

Intervals: Student's, of 95 %, for the mean over seeds; differences are paired by seed. "Holds" and
"reversed": the interval lies above or below zero; else "open". Networks and their recipe:
[README](README.md)."""
MAGNITUDE, RIVALS = 'magnitude', ('movement', 'soft movement')
#: Of the training before: images, passes over them, images in a batch, peak rate of Adam.
EXAMPLES, PASSES, BATCH, RATE = 20_000, 10, 64, 1e-3


def main() -> int:
    parser = parser_of(__doc__, 'runs/movement')
    arguments = parser.parse_args()
    out, quick = arguments.out, arguments.quick
    try:
        use_all_cores()
        keep_compiled()
        spec = jp.load_spec(HERE / 'finetune.toml')
        spec = small(spec) if quick else spec
        file = out / 'trained.safetensors'
        if not file.exists():
            out.mkdir(parents=True, exist_ok=True)
            train_before(file, spec, arguments.data_dir, 640 if quick else EXAMPLES)
        model = dataclasses.replace(spec.model, params=str(file.resolve()))
        table = table_of(dataclasses.replace(spec, model=model))
        results = jp.run_sweep(jp.make_spec(table), out / 'sweep', data_dir=arguments.data_dir)
    except JaxpruneError as error:
        raise SystemExit(str(error)) from None
    rows = last_rows(results)
    publish(out, written(rows), {'accuracy': style.png(accuracy_figure(rows))})
    return 0


def table_of(spec: SweepSpec) -> dict:
    """The specification as the table of a file, so that the file of weights is read."""
    return tomllib.loads(to_toml(spec))


def small(spec: SweepSpec) -> SweepSpec:
    """Two seeds and densities, and few images: its numbers mean nothing."""
    options = {**spec.model.options, 'dim': 8, 'depth': 1}
    grid = dataclasses.replace(
        spec.grid, seed=spec.grid.seed[:2], compression=spec.grid.compression[:3]
    )
    return dataclasses.replace(
        spec,
        model=dataclasses.replace(spec.model, options=options),
        data=dataclasses.replace(spec.data, train_examples=3200, test_examples=100),
        grid=grid,
    )


def train_before(file: Path, spec: SweepSpec, data_dir: str | None, examples: int) -> None:
    """Trains the network on the other task and writes its weights."""
    known = data.load('fashion_mnist', data_dir)
    module = nn.build(spec.model.name, known.classes, **spec.model.options)
    net = jp.problem_from_flax(module, known.train.images.shape[1:])

    def pixels(images):
        return (images.astype(jnp.float32) / 255 - jnp.array(known.mean)) / jnp.array(known.std)

    x, y = jnp.asarray(known.train.images[:examples]), jnp.asarray(known.train.labels[:examples])
    params, _ = jax.jit(net.init)(jax.random.key(0))
    steps = examples // BATCH * PASSES
    tx = optax.adam(optax.cosine_decay_schedule(RATE, steps))

    def loss(params, at):
        logits, _ = net.apply(params, {}, pixels(x[at]), train=True, key=None)
        return jp.cross_entropy(logits, y[at]).mean()

    @jax.jit
    def step(params, state, at):
        updates, state = tx.update(jax.grad(loss)(params, at), state)
        return optax.apply_updates(params, updates), state

    state, rng = tx.init(params), np.random.default_rng(0)
    for _ in range(PASSES):
        for at in rng.permutation(examples)[: examples // BATCH * BATCH].reshape(-1, BATCH):
            params, state = step(params, state, at)
    test = pixels(jnp.asarray(known.test.images[:2000]))
    logits, _ = net.apply(params, {}, test, train=False, key=None)
    right = float((logits.argmax(-1) == known.test.labels[:2000]).mean())
    print(f'trained on Fashion-MNIST: test accuracy {100 * right:.1f} %', flush=True)

    def apply(params, x):
        return net.apply(params, {}, x, train=False, key=None)[0]

    whole = jp.compact(apply, params, tree.ones(tree.pick(params, tree.kernels)), test[:1])
    jp.save_compact(file, whole, test[:1])


# --- tables and the figure ------------------------------------------------------------------------


def written(rows: pl.DataFrame) -> str:
    """Accuracies, and points above magnitude, as markdown."""
    every = densities(rows)
    head = ['method', *(f'{p:g} %' for p in every)]
    accuracy = [
        [label, *(markdown.interval(by_seed(rows, label, p), 1) for p in every)]
        for label in (MAGNITUDE, *RIVALS)
    ]
    above = [
        [
            label,
            *(
                markdown.verdict(by_seed(rows, label, p) - by_seed(rows, MAGNITUDE, p), 1)
                for p in every
            ),
        ]
        for label in RIVALS
    ]
    dense = markdown.interval(by_seed(rows, 'dense'), 1)
    parts = [
        HEAD,
        '## Accuracy',
        f'Test accuracy on MNIST in % by density; dense: {dense}.',
        markdown.table(head, accuracy),
        '## Points above magnitude',
        'The paper has less than nothing at high densities and a gain below 15 %.',
        markdown.table(head, above),
    ]
    return '\n\n'.join(parts) + '\n'


def accuracy_figure(rows: pl.DataFrame) -> Figure:
    labels, every = (MAGNITUDE, *RIVALS), densities(rows)
    styles = style.lines(labels)
    with style.context():
        drawing = style.figure(style.WIDTH, 3.4)
        axes = drawing.subplots()
        dense = by_seed(rows, 'dense').mean()
        axes.axhline(dense, color='0.5', linewidth=0.8)
        axes.annotate('dense', (every[0], dense), (0, 3), textcoords='offset points')
        for label in labels:
            values = [by_seed(rows, label, p) for p in every]
            axes.plot(every, [v.mean() for v in values], **styles[label], label=label)
            axes.fill_between(
                every,
                [v.min() for v in values],
                [v.max() for v in values],
                color=styles[label]['color'],
                alpha=0.2,
                linewidth=0,
            )
        axes.set_xscale('log')
        axes.invert_xaxis()
        axes.set_xticks(every, labels=[f'{p:g}' for p in every])
        axes.set_xticks([], minor=True)
        axes.set_xlabel('density (%); bands: smallest to largest of the seeds')
        axes.set_ylabel('test accuracy on MNIST (%)')
        drawing.legend(loc='outside upper center', ncols=3, frameon=False)
        return drawing


if __name__ == '__main__':
    sys.exit(main())
