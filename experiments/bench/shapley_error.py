"""The error of each estimator of Shapley values against evaluations, for `shapley.py`.

Exact values come from all coalitions. The estimators look the losses of the same coalitions up in a
table, so that many seeds cost little.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from shapley_ways import case_from, game_of, images, problem_of
from tables import Table

from jaxprune import data, nn
from jaxprune.score.coalitions import evaluated, exact_shapley
from jaxprune.score.shapley import shapley

#: Net -> module, number of the layer.
TRAINED: dict[str, tuple[Callable[[], Any], int]] = {
    'LeNet-5, second convolution, 16 units': (lambda: nn.build('lenet5', 10), 1),
    'MLP (100, 12), second layer, 12 units': (lambda: nn.MLP((100, 12), 10), 1),
}
QUICK = {'MLP (32, 8), second layer, 8 units': (lambda: nn.MLP((32, 8), 10), 1)}
#: Most orders of an estimate.
MOST = 256


class Estimator(NamedTuple):
    """Its options for n units; `together` orders are drawn at a time, `tolerance` is a share."""

    options: dict[str, Any]
    together: int = 1
    tolerance: float | None = None


def estimators(n: int) -> dict[str, Estimator]:
    few = max(2, n // 4)
    return {
        'permutation': Estimator({'estimator': 'permutation'}),
        'antithetic': Estimator({'estimator': 'antithetic'}, 2),
        f'stratified, {n} strata': Estimator({'estimator': 'stratified'}, n),
        f'stratified, {few} strata': Estimator({'estimator': 'stratified', 'strata': few}, few),
        'truncated, 1 %': Estimator({'estimator': 'truncated'}, 1, 0.01),
        'truncated, 10 %': Estimator({'estimator': 'truncated'}, 1, 0.1),
    }


class Point(NamedTuple):
    orders: int
    evaluations: float
    error: float


def errors(settings, tables: list[Table], notes: list[str], publish: Callable) -> None:
    """Table and figure."""
    table = Table(
        'Error against evaluations',
        'Root mean squared error over the units, averaged over seeds, in % of the root mean square'
        ' of the exact values. x permutation: over the error of independent orders with as many'
        ' evaluations (by their power law). Power: of evaluations, fitted to the error. Truncated:'
        ' the tolerance in % of the loss without all units, less that with all; evaluations on'
        ' average.',
        ('layer', 'estimator', 'orders', 'evaluations', 'error %', 'x permutation', 'power'), [],
    )  # fmt: skip
    tables.append(table)
    curves: dict[str, dict[str, list[Point]]] = {}
    for name, (make, layer) in (QUICK if settings.quick else TRAINED).items():
        losses, accuracy = trained_game(make, layer, 200 if settings.quick else 500)
        n = int(np.log2(len(losses)))
        notes.append(f'{name}: {accuracy:.1%} of the test digits are right, {len(losses):,} losses')
        curves[name] = measured(
            losses, n, settings.keys, *((16, 8) if settings.quick else (MOST, 2))
        )
        law = curves[name]['permutation']
        constant = np.exp(np.mean([np.log(p.error * p.evaluations**0.5) for p in law]))
        for estimator, points in curves[name].items():
            some = points[::-1][:: 2 if len(points) > 3 else 1][2::-1]
            beside = [p.error * p.evaluations**0.5 / constant for p in some]
            table.rows.append({
                'layer': name, 'estimator': estimator,
                'orders': ', '.join(str(p.orders) for p in some),
                'evaluations': ', '.join(f'{p.evaluations:.0f}' for p in some),
                'error %': ', '.join(f'{100 * p.error:.3g}' for p in some),
                'x permutation': ', '.join(f'{each:.2f}' for each in beside),
                'power': power(points),
            })  # fmt: skip
            print(table.rows[-1], flush=True)
        publish()
    if settings.out:
        figure_of(curves, Path(settings.out).with_suffix('.png'))


def power(points: list[Point]) -> str:
    """Of evaluations, fitted to the error."""
    if len(points) < 2:
        return ''
    logs = np.log([(point.evaluations, point.error) for point in points])
    return f'{np.polyfit(*logs.T, 1)[0]:.2f}'


def trained_game(make: Callable[[], Any], layer: int, steps: int) -> tuple[np.ndarray, float]:
    """Mean losses of all coalitions `(2**n,)` of a trained layer, and the network's accuracy.

    Of 200 digits that it was not trained on. Credits are linear in losses: the mean loss has the
    mean values.
    """
    digits = data.load('mnist_small')
    train, test = images(digits.train, len(digits.train.labels)), images(digits.test, 2000)
    problem = problem_of(make)
    params, state = jax.jit(problem.init)(jax.random.key(0))
    params = trained(problem, params, state, train, steps)
    logits = jax.jit(lambda p: problem.apply(p, state, test.x, train=False, key=None)[0])(params)
    accuracy = float((logits.argmax(-1) == test.y).mean())
    some = jax.tree.map(lambda leaf: leaf[:200], test)
    case = case_from('', problem, params, state, some, layer, 1)
    game, rows = game_of(case), np.arange(2**case.n)[:, None] >> np.arange(case.n) & 1 == 1
    every = jax.jit(lambda masks: evaluated(lambda m: game(m).mean()[None], masks, 64))
    return np.asarray(every(rows))[:, 0], accuracy


def trained(problem, params, state, train, steps: int):
    """Adam, batches of 64. A loop of Python: XLA's CPU is slow at gradients inside of its own."""
    tx = optax.adam(2e-3)

    @jax.jit
    def step(params, opt_state, x, y):
        def loss(params):
            logits, _ = problem.apply(params, state, x, train=True, key=None)
            return problem.loss(logits, y).mean()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for at in np.random.default_rng(0).integers(0, len(train.y), (steps, 64)):
        params, opt_state = step(params, opt_state, train.x[at], train.y[at])
    return params


def measured(
    losses: np.ndarray, n: int, keys: int, most: int, factor: int
) -> dict[str, list[Point]]:
    """Estimator -> its errors, relative to the root mean square of the exact values.

    Args:
      losses: of all coalitions of n units.
      keys: seeds that are averaged over.
      most: orders at most; an estimate has `factor` times as many as the one before.
    """
    table, bits = jnp.asarray(losses), 2 ** np.arange(n)

    def game(mask: jax.Array) -> jax.Array:
        return table[mask @ bits][None]

    exact = np.asarray(jax.jit(lambda: exact_shapley(game, n))())[:, 0]
    seeds = jax.random.split(jax.random.key(1), keys)
    found: dict[str, list[Point]] = {}
    for name, (options, together, share) in estimators(n).items():
        given = {} if share is None else {'tolerance': share * float(losses[0] - losses[-1])}
        points, count = [], together
        while count <= most:

            def one(key, count=count, options=options, given=given):
                made = shapley(game, n, key, permutations=count, batch_size=1, **options, **given)
                return made.mean, made.evaluations

            means, evaluations = jax.jit(jax.vmap(one))(seeds)
            error = np.sqrt(np.mean((np.asarray(means) - exact) ** 2, axis=1)).mean()
            scale = np.sqrt(np.mean(exact**2))
            points.append(Point(count, float(np.mean(evaluations)), float(error / scale)))
            count *= factor
        found[name] = points
    return found


def figure_of(curves: dict[str, dict[str, list[Point]]], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(5 * len(curves), 3.9), layout='constrained')
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for ax, (title, estimates) in zip(panels, curves.items(), strict=True):
        for number, (name, points) in enumerate(estimates.items()):
            x, y = [p.evaluations for p in points], [100 * p.error for p in points]
            ax.loglog(x, y, f'{"os^vDX"[number]}-', markersize=4, label=name)
        ax.set(title=title, xlabel='evaluations')
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter('{x:g}')
            axis.set_minor_locator(NullLocator())
        ax.grid(alpha=0.3)
        ax.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel('error (% of the root mean square value)')
    figure.savefig(path, dpi=150)
