"""What a block-sparse product gains over a dense one, and what pivoting does to a pruned network.

    python experiments/bench/blocks.py --out blocks.md

Two parts; without an option both of them. No data are needed beyond the digits that are shipped.

  --products  `x @ W` with a random share of the blocks of W, by `structure.block_product`, against
              the dense product of the same size: how many times as fast, measured in turns. Beside
              it the same matrix without blocks, as BCSR and BCOO of `jax.experimental.sparse`
  --pivoting  LeNet-300-100, trained on the digits, 95 % of its weights pruned by magnitude, and
              trained again. How its kernels fill blocks as they are and after `structure.pivot`:
              blocks that hold anything, the sum of |W| that the best blocks hold, the time of
              their product, and test accuracy with these blocks alone

A product that does not equal the dense one is marked WRONG, and the exit status is 1. Half an hour
on two cores; `--quick` takes the smallest of everything.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import sparse
from tables import Table, check_out, measure

import jaxprune as jp
from jaxprune import data, nn, structure, tree
from jaxprune.pattern import block_counts, block_top_k
from jaxprune.structure.latency import in_turns

SIZES = (512, 1024, 2048, 4096)
SIDES = (16, 32, 64, 128)
DENSITIES = (0.05, 0.1, 0.2, 0.5)
BATCHES = (1, 128)
#: Numbers that a sparse product without blocks makes before it adds them up; more take minutes.
MOST_SPARSE = 2**26
#: Rounding stays below it.
LARGEST_ERROR = 1e-4
#: Blocks kept of each kernel of LeNet-300-100.
KEPT = (0.1, 0.25)
PRUNED_TO = 0.05


def main() -> None:
    parts = {'products': products, 'pivoting': pivoting}
    measure(parse(), parts, 'a product is wrong, see the tables')


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--products', action='store_true', help='block-sparse against dense')
    add('--pivoting', action='store_true', help='LeNet-300-100 in blocks')
    add('--sizes', nargs='+', type=int, choices=SIZES, default=list(SIZES), metavar='SIZE',
        help='only these of the products: ' + ', '.join(map(str, SIZES)))  # fmt: skip
    add('--repeats', type=int, default=20, help='timed calls of a product (default 20)')
    add('--out', help='a markdown file for the tables, written anew after every row')
    add('--quick', action='store_true', help='a minute, to see whether all runs')
    settings = parser.parse_args()
    if settings.quick:
        settings.repeats = 2
    if settings.repeats < 1:
        parser.error('--repeats must be above 0')
    check_out(parser, settings.out)
    return settings


# --- products -------------------------------------------------------------------------------------


def products(settings, tables: list[Table], notes: list[str], publish: Callable) -> None:
    table = Table(
        'Block-sparse against dense products',
        'Square matrices, blocks at random. How many times as fast as the dense product: medians of'
        ' ratios in turns. BCSR and BCOO hold the same matrix as single weights; left out where'
        f' they would make more than {MOST_SPARSE:,} products of numbers. Error: the largest'
        ' difference from the dense product, over its largest number.',
        ('size', 'block', 'density', 'batch', 'dense ms', 'blocks', 'BCSR', 'BCOO', 'error'), [],
    )  # fmt: skip
    tables.append(table)
    quick = settings.quick
    for size in settings.sizes[:1] if quick else settings.sizes:
        for side in SIDES[-1:] if quick else SIDES:
            for density in DENSITIES[1:2] if quick else DENSITIES:
                weights, mask = drawn(size, side, density)
                for batch in BATCHES[:1] if quick else BATCHES:
                    row = {'size': size, 'block': side, 'density': density, 'batch': batch}
                    table.rows.append(row | timed(weights, mask, side, batch, settings.repeats))
                    print(table.rows[-1], flush=True)
                    publish()


def drawn(size: int, side: int, density: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and a mask of whole blocks at random."""
    rng, grid = np.random.default_rng(0), size // side
    chosen = np.zeros(grid * grid, bool)
    chosen[rng.permutation(grid * grid)[: round(density * grid * grid)]] = True
    mask = np.kron(chosen.reshape(grid, grid), np.ones((side, side), bool))
    return rng.standard_normal((size, size), np.float32) / np.float32(np.sqrt(size)), mask


def timed(
    weights: np.ndarray, mask: np.ndarray, side: int, batch: int, repeats: int, peers: bool = True
) -> dict[str, str]:
    """One row: the dense product and the others in turns."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((batch, len(weights)), np.float32))
    masked = jnp.asarray(np.where(mask, weights, 0))
    calls = {'dense ms': call(jnp.matmul, x, masked)}
    blocks = structure.blocks_of(weights, mask, (side, side))
    calls['blocks'] = call(structure.block_product, x, blocks)
    if peers and batch * int(mask.sum()) <= MOST_SPARSE:
        for name, kind in (('BCSR', sparse.BCSR), ('BCOO', sparse.BCOO)):
            held = kind.fromdense(masked.T, nse=int(mask.sum()))
            calls[name] = call(transposed, x, held)
    # The reference at full precision on the host: products on tensor cores round to three digits.
    expected = np.asarray(x, np.float64) @ np.asarray(masked, np.float64)
    with jax.default_matmul_precision('highest'):
        found = np.asarray(jax.jit(structure.block_product)(x, blocks))
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    times = dict(zip(calls, in_turns(list(calls.values()), repeats), strict=True))
    dense = times.pop('dense ms')
    row = {'dense ms': f'{1e3 * statistics.median(dense):.3g}'}
    row |= {name: f'{ratio(dense, mine):.2f}' for name, mine in times.items()}
    return row | {'error': f'{error:.0e}{" WRONG" if error > LARGEST_ERROR else ""}'}


def transposed(x: jax.Array, held: Any) -> jax.Array:
    """`x @ W` with a sparse transpose of W: the product that the formats have."""
    return (held @ x.T).T


def call(function: Callable[..., jax.Array], *arguments: Any) -> Callable[[], jax.Array]:
    """A compiled function with its arguments."""
    return functools.partial(jax.jit(function), *arguments)


def ratio(dense: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(dense, other, strict=True))


# --- pivoting -------------------------------------------------------------------------------------


class Digits(NamedTuple):
    """LeNet-300-100 on the digits.

    Attributes:
      apply: `(params, x) -> logits`.
      params: as initialised.
      images: a few, to read its groups with.
      train: `(params, masks) -> params` after some epochs of Adam; None for no masks.
      accuracy: of parameters, on the 2,000 test images, as text.
    """

    apply: Callable[..., jax.Array]
    params: Any
    images: jax.Array
    train: Callable[[Any, Any], Any]
    accuracy: Callable[[Any], str]


def pivoting(settings, tables: list[Table], notes: list[str], publish: Callable) -> None:
    table = Table(
        'Pivoting LeNet-300-100 at 95 % sparsity',
        'Occupied: of all blocks, those that hold a weight that is kept, as the kernel is and after'
        ' pivoting; fill: of their entries, those that are kept. Mass: what the given share of'
        ' blocks holds of the sum of kept |W|. x dense: how many times as fast as the dense product'
        ' these blocks are, batch 128.',
        ('kernel', 'block', 'blocks kept', 'occupied', 'pivoted', 'fill', 'pivoted fill', 'mass',
         'pivoted mass', 'x dense', 'pivoted x dense', 'search s'), [],
    )  # fmt: skip
    accuracies = Table(
        'Accuracy of the best blocks alone',
        'The two large kernels keep the best blocks of what pruning left. In place: as the network'
        ' is. Network: units reordered by `structure.pivot_network`, pixels in place.'
        ' Matrix: rows and columns of each kernel by `structure.pivot`, which a network would have'
        ' to undo between its layers. Trained: the same after as many epochs as before.',
        ('block', 'blocks kept', *(f'{way}{then}' for way in ('in place', 'network', 'matrix')
                                   for then in ('', ', trained'))), [],
    )  # fmt: skip
    tables += [table, accuracies]
    digits = on_digits(1 if settings.quick else 10)
    dense = digits.train(digits.params, None)
    pruned = jp.prune(dense, 'magnitude', PRUNED_TO)
    params = digits.train(pruned.params, pruned.masks)
    notes.append(
        f'test accuracy: {digits.accuracy(dense)} dense, {digits.accuracy(pruned.params)} pruned,'
        f' {digits.accuracy(params)} trained again'
    )
    large = {path: pruned.masks[path] for path in ('dense_0/kernel', 'dense_1/kernel')}
    coupled = jp.groups(digits.apply, params, digits.images)
    for side in (32,) if settings.quick else (8, 16, 32):
        for density in KEPT[-1:] if settings.quick else KEPT:
            in_place, matrix = {}, {}
            for path in large:
                weights = np.asarray(jp.pick(params)[path])
                row, in_place[path], matrix[path] = gathered(
                    weights, side, density, settings.repeats
                )
                table.rows.append({'kernel': path, 'block': side, 'blocks kept': density} | row)
                print(table.rows[-1], flush=True)
                publish()
            moved = structure.pivot_network(
                coupled, params, large, (side, side), density=density, seed=0
            )
            weights = jp.pick(moved.params)
            network = {path: best_mask(np.abs(weights[path]), side, density) for path in large}
            row = {'block': side, 'blocks kept': density}
            for way, start, masks in (
                ('in place', params, in_place),
                ('network', moved.params, network),
                ('matrix', params, matrix),
            ):
                # What pruning left of other kernels, and of the blocks, stays as it is.
                start = jp.apply_masks(start, masks)
                kept = {path: leaf != 0 for path, leaf in jp.pick(start).items()}
                row[way] = digits.accuracy(start)
                row[f'{way}, trained'] = digits.accuracy(digits.train(start, kept))
            accuracies.rows.append(row)
            print(accuracies.rows[-1], flush=True)
            publish()


def gathered(
    weights: np.ndarray, side: int, density: float, repeats: int
) -> tuple[dict[str, str], np.ndarray, np.ndarray]:
    """One row, and the masks of the best blocks as the kernel is and after pivoting."""
    began = time.perf_counter()
    found = structure.pivot(np.abs(weights), (side, side), density=density, seed=0)
    seconds = time.perf_counter() - began
    plain = best_mask(np.abs(weights), side, density)
    order = np.ix_(found.rows, found.columns)
    times = [
        timed(some, mask, side, 128, repeats, peers=False)
        for some, mask in ((weights, plain), (weights[order], found.mask[order]))
    ]
    row = {
        'occupied': f'{found.before.block_density:.1%}',
        'pivoted': f'{found.after.block_density:.1%}',
        'fill': f'{found.before.fill:.1%}',
        'pivoted fill': f'{found.after.fill:.1%}',
        'mass': f'{found.kept_before:.1%}',
        'pivoted mass': f'{found.kept_after:.1%}',
        'x dense': times[0]['blocks'],
        'pivoted x dense': times[1]['blocks'],
        'search s': f'{seconds:.1f}{" WRONG" * any("WRONG" in t["error"] for t in times)}',
    }
    return row, plain, found.mask


def best_mask(scores: np.ndarray, side: int, density: float) -> np.ndarray:
    """The best blocks of a kernel as it is, by their means."""
    counts = block_counts({'w': scores.shape}, density, block=(side, side))
    masks = block_top_k({'w': jnp.asarray(scores)}, counts, block=(side, side), reduce='mean')
    return np.asarray(masks['w'])


def on_digits(epochs: int) -> Digits:
    """LeNet-300-100, to be trained for so many epochs of 10,000 images at a time."""
    digits = data.load('mnist_small')

    def prepared(split: data.Split) -> tuple[jax.Array, jax.Array]:
        images = jnp.asarray((split.images / 255 - 0.13) / 0.31, jnp.float32)
        return images, jnp.asarray(split.labels)

    (x, y), (test_x, test_y) = prepared(digits.train), prepared(digits.test)
    module, optimizer = nn.MLP((300, 100), classes=10), jp.sparse(optax.adam(1e-3))
    params = module.init(jax.random.key(0), x[:1])['params']

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return module.apply({'params': params}, x)

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        logits = apply(params, x[batch])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[batch]).mean()

    @jax.jit
    def trained(params: Any, masks: Any, batches: jax.Array) -> Any:
        def step(carry: Any, batch: jax.Array) -> tuple[Any, None]:
            params, state = carry
            grads = jax.grad(loss)(params, batch)
            updates, state = optimizer.update(grads, state, params, masks=masks)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), batches)[0][0]

    rng = np.random.default_rng(0)
    batches = np.concatenate([rng.permutation(len(x)).reshape(-1, 100) for _ in range(epochs)])

    def train(params: Any, masks: Any) -> Any:
        return trained(params, tree.ones(jp.pick(params)) if masks is None else masks, batches)

    def accuracy(params: Any) -> str:
        return f'{float((apply(params, test_x).argmax(1) == test_y).mean()):.2%}'

    return Digits(apply, params, x[:2], train, accuracy)


if __name__ == '__main__':
    main()
