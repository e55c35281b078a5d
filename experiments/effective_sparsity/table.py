"""How connected pruned networks are before any training, against known numbers.

    python experiments/effective_sparsity/table.py

LeNet-300-100: 20 randomly pruned networks per allocation and compression, then global magnitude and
SynFlow. Prints what was found beside what is expected; exits with 1 if one of them is off.
No data are needed.
"""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from jaxprune import nn, structure
from jaxprune.rng import stream
from jaxprune.types import Counts, Key, Masks

INPUT = (28, 28, 1)
LENET = jp.problem_from_flax(nn.build('lenet300100', 10), INPUT)
SHAPES = structure.forward_shapes(LENET, INPUT)
SIZE = sum(math.prod(shape) for shape in SHAPES.values())
CONNECT = structure.connectivity_of(LENET, INPUT)

LAYERWISE = ('uniform', 'erk', 'igq')
#: Networks per cell of the table; SynFlow, 100 times as costly, has fewer.
SEEDS, FLOW_SEEDS = 20, 5


class Known(NamedTuple):
    """Effective compressions of 20 networks, from an independent implementation.

    Attributes:
      median: of the 20.
      low: the smallest.
      high: the largest; infinite where a network is disconnected.
      disconnected: how many are; None where that was not written down.
      digit: half a unit of the last digit that was written down.
    """

    median: float
    low: float
    high: float
    disconnected: int | None = 0
    digit: float = 0.0


class Flow(NamedTuple):
    """What one network pruned by SynFlow keeps, from an independent implementation.

    Attributes:
      kept: weights in all.
      active: those of them on a path from input to output.
      layers: kept weights of each layer.
    """

    kept: int
    active: int
    layers: tuple[int, int, int]


_INF = math.inf
#: Direct compression -> what random pruning with each of `LAYERWISE` gives.
RANDOM = {
    10: (
        Known(10.41, 10.35, 10.59, digit=0.005),
        Known(10.0, 10.0, 10.0, digit=0.005),
        Known(10.0, 10.0, 10.0, digit=0.005),
    ),
    30: (
        Known(51.5, 47.7, 56.1, digit=0.05),
        Known(30.0, 30.0, 30.07, digit=0.05),
        Known(30.0, 30.0, 30.0, digit=0.05),
    ),
    100: (Known(1036, 778, 1386), Known(114, 110, 122), Known(102.2, 101.6, 103.4)),
    300: (Known(2.5e4, 8.6e3, _INF, None), Known(832, 712, 972), Known(436, 410, 452)),
    1000: (
        Known(_INF, 0, _INF, 14),
        Known(1.7e4, 9.9e3, 3.8e4),
        Known(5.3e3, 3.8e3, 8.9e3),
    ),
    3000: (Known(_INF, 0, _INF, 20), Known(_INF, 0, _INF, 15), Known(_INF, 0, _INF, 12)),
}

#: Direct compression -> what SynFlow gives in 100 rounds.
SYNFLOW = {
    100: Flow(2662, 2662, (1275, 784, 603)),
    1000: Flow(266, 265, (122, 48, 96)),
    10000: Flow(27, 27, (9, 8, 10)),
}

#: Direct compression -> effective compression of one network pruned by global magnitude.
MAGNITUDE = {10: 10.0, 30: 30.0, 100: 111.0, 1000: _INF}


# --- what is measured -----------------------------------------------------------------------------


def start(seed: jax.Array) -> tuple[Key, jp.View]:
    """A key, and a network with kernels from N(0, 4 / (fan_in + fan_out)) and zero biases."""
    key = jax.random.key(seed)
    params, _ = LENET.init(key)
    kernels = {
        path: math.sqrt(4 / sum(shape)) * jax.random.normal(stream(key, path), shape)
        for path, shape in SHAPES.items()
    }
    return key, jp.view(LENET, jp.put(params, kernels))


def counted(masks: Masks) -> dict[str, jax.Array]:
    """How many weights of each layer are kept and how many of these are active, `(3,)` each."""
    both = {'kept': jp.count_kept(masks), 'active': jp.count_kept(CONNECT(masks))}
    return {name: jnp.stack([of[path] for path in SHAPES]) for name, of in both.items()}


def _everywhere(network: Callable, plans: Sequence[Counts], seeds: int) -> Any:
    """`network(seed, plan)` of every plan and seed, in one program; leaves `(plans, seeds, ...)`.

    One network after another: on CPU that is twice as fast as `vmap`, as the layers fit a cache.
    """
    stacked = jax.tree.map(lambda *leaves: jnp.stack(list(map(jnp.int32, leaves))), *plans)

    def every_seed(plan):
        return jax.lax.map(lambda seed: network(seed, plan), jnp.arange(seeds))

    return jax.device_get(jax.jit(lambda plans: jax.lax.map(every_seed, plans))(stacked))


def _one_shot(method: str, allocation: str, plans: Sequence[Counts], seeds: int) -> Any:
    pruner = jp.get_pruner(LENET, method, allocation=allocation)

    def network(seed, counts):
        key, view = start(seed)
        return counted(pruner.update(key, (), view, counts, None)[1])

    return _everywhere(network, plans, seeds)


def prune_at_random(compressions: Sequence[float], seeds: int = SEEDS) -> np.ndarray:
    """Active weights of randomly pruned networks, `(compressions, allocations, seeds)`."""
    # An allocation is nothing but counts: one program serves all three.
    plans = [
        jp.keep_counts(SHAPES, 1 / c, allocation) for c in compressions for allocation in LAYERWISE
    ]
    active = _one_shot('random', 'uniform', plans, seeds)['active']
    return active.sum(axis=-1).reshape(len(compressions), len(LAYERWISE), seeds)


def prune_by_magnitude(compressions: Sequence[float], seeds: int = SEEDS) -> dict[str, np.ndarray]:
    """`counted` of networks pruned by global magnitude, `(compressions, seeds, 3)` each."""
    plans = [jp.keep_counts(SHAPES, 1 / c) for c in compressions]
    return _one_shot('magnitude', 'global', plans, seeds)


def prune_by_synflow(compressions: Sequence[float], seeds: int = FLOW_SEEDS, rounds: int = 100):
    """Masks, with leading axes `(compressions, seeds)`, and the counts of `counted`."""
    pruner = jp.get_pruner(LENET, 'synflow')

    def network(seed, plan):
        key, view = start(seed)
        view, _ = jp.prune_rounds(pruner, key, view, plan, _one_input(jnp.float32))
        return view.masks, counted(view.masks)

    plans = [jp.plan_rounds(SHAPES, 1 / c, rounds=rounds).counts for c in compressions]
    return _everywhere(network, plans, seeds)


def layer_flows(seed: int, masks: Masks) -> np.ndarray:
    """The sum of SynFlow's scores in each layer of a pruned network, `(3,)`, float64."""
    _, view = start(jnp.int32(seed))
    score = jp.synflow(LENET)

    @jax.jit
    def sums(params, masks):
        view = jp.view(LENET, params, masks=masks)
        scores = score(jax.random.key(0), view, _one_input(jnp.float64))
        return jnp.stack([scores[path].sum() for path in SHAPES])

    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), view.params)
        return np.asarray(sums(params, masks))


def _one_input(dtype) -> jp.Batch:
    """SynFlow uses the shape of an input only."""
    return jp.Batch(jnp.zeros((1, 1, *INPUT), dtype), jnp.zeros((1, 1), jnp.int32))


# --- comparison with the known numbers ------------------------------------------------------------
#
# Two implementations draw different networks, so they can only agree up to
# sampling. 20 numbers of one distribution have a range of 3.7 standard deviations, and the
# medians of two such samples differ by 0.4 of one (each has 1.25 / sqrt(20)): on a logarithmic
# scale and up to rounding, medians must agree to a third of the known range, three such steps.
# Where the range is open above, its lower half counts twice. Numbers of disconnected networks
# must be compatible at p = 0.01 (Fisher's exact test); where more than half of the networks are
# disconnected, the median is not informative.


def compression(active: np.ndarray) -> np.ndarray:
    """Weights before / active weights, infinite without any."""
    with np.errstate(divide='ignore'):
        return SIZE / active


def off(known: Known, active: np.ndarray) -> list[str]:
    """What is wrong with the active weights of a sample of networks, in words."""
    found = compression(active)
    median, cut = float(np.median(found)), int(np.isinf(found).sum())
    wrong = []
    if math.isfinite(known.median):
        high = known.high if math.isfinite(known.high) else known.median**2 / known.low
        factor = (high / known.low) ** (1 / 3)
        least, most = known.median / factor - known.digit, known.median * factor + known.digit
        if not least <= median <= most:
            wrong.append(f'median {median:.4g} is not in {least:.4g} to {most:.4g}')
    if known.disconnected is not None:
        p = same_rate(cut, len(found), known.disconnected, 20)
        if p < 0.01:
            wrong.append(
                f'{cut} of {len(found)} disconnected, not about {known.disconnected} of 20'
            )
    return wrong


def same_rate(a: int, n: int, b: int, m: int) -> float:
    """Two-sided p of Fisher's exact test: `a` of `n` and `b` of `m` have one probability."""

    def chance(x):
        return math.comb(n, x) * math.comb(m, a + b - x) / math.comb(n + m, a + b)

    possible = map(chance, range(max(0, a + b - m), min(n, a + b) + 1))
    return sum(p for p in possible if p <= chance(a) * (1 + 1e-9))


def flow_off(known: Flow, kept: np.ndarray, active: np.ndarray) -> list[str]:
    """What is wrong with networks pruned by SynFlow, from `counted`, `(seeds, 3)` each.

    Every one keeps the planned number, and all but a few of these are active: the last cut may
    leave weights dangling, two per hundred at most. A layer's number varies from network to
    network by less than its square root, so the median must be within two of these.
    """
    wrong = []
    if not (kept.sum(axis=1) == known.kept).all():
        wrong.append(f'keeps {kept.sum(axis=1).tolist()}, not {known.kept}')
    if not (active.sum(axis=1) >= 0.98 * known.kept).all():
        wrong.append(f'only {active.sum(axis=1).tolist()} are active, of {known.kept}')
    for layer, (median, expected) in enumerate(zip(np.median(kept, 0), known.layers, strict=True)):
        if abs(median - expected) > 2 * math.sqrt(expected):
            wrong.append(f'layer {layer} keeps {median:g}, not about {expected}')
    return wrong


def magnitude_off(known: float, active: np.ndarray) -> list[str]:
    """What is wrong with networks pruned by global magnitude, active weights `(seeds,)`.

    The known number is of one network: it must be within four standard deviations of their
    mean, on the logarithmic scale; or most networks must be disconnected as it is.
    """
    found = compression(active)
    if math.isinf(known):
        return [] if math.isinf(np.median(found)) else ['most networks are connected']
    logs = np.log(found)
    near = abs(math.log(known) - logs.mean()) <= 4 * logs.std(ddof=1) + 0.05 / known
    return [] if near else [f'mean {np.exp(logs.mean()):.4g}, not about {known:g}']


# --- the table ------------------------------------------------------------------------------------


def main() -> int:
    wrong = [*print_random(), *print_magnitude(), *print_synflow()]
    for line in wrong:
        print('OFF:', line)
    print('all as expected' if not wrong else f'{len(wrong)} off')
    return 1 if wrong else 0


def print_random() -> list[str]:
    print(f'random, {SEEDS} networks each: effective compression, median (range), ∞ = disconnected')
    print(f'{"direct":>6}  {"allocation":<10} {"found":<34} expected')
    wrong = []
    for compressed, knowns, row in zip(
        RANDOM, RANDOM.values(), prune_at_random(list(RANDOM)), strict=True
    ):
        for allocation, known, active in zip(LAYERWISE, knowns, row, strict=True):
            found = compression(active)
            cut = int(np.isinf(found).sum())
            result = summary(float(np.median(found)), found.min(), found.max(), cut)
            expected = summary(known.median, known.low, known.high, known.disconnected)
            print(f'{compressed:>6}  {allocation:<10} {result:<34} {expected}')
            wrong += [f'random, {allocation}, {compressed}: {line}' for line in off(known, active)]
    return wrong


def summary(median: float, low: float, high: float, cut: int | None) -> str:
    if math.isinf(median):
        return f'∞ in {cut} of {SEEDS}'
    ends = f'{short(low)} to {short(high)}'
    return f'{short(median)} ({ends})' + (f', ∞ in {cut}' if cut else '')


def short(value: float) -> str:
    return '∞' if math.isinf(value) else f'{value:.4g}' if value < 1e4 else f'{value:,.0f}'


def print_magnitude() -> list[str]:
    found = prune_by_magnitude(list(MAGNITUDE))
    print(f'\nglobal magnitude of initial weights, {SEEDS} networks each; the expected is of one')
    print(
        f'{"direct":>6}  {"effective compression":<34} {"expected":<9} weights per layer (medians)'
    )
    wrong = []
    for i, (compressed, known) in enumerate(MAGNITUDE.items()):
        active = found['active'][i].sum(axis=-1)
        values = compression(active)
        cut = int(np.isinf(values).sum())
        result = summary(float(np.median(values)), values.min(), values.max(), cut)
        layers = ', '.join(f'{n:g}' for n in np.median(found['kept'][i], axis=0))
        print(f'{compressed:>6}  {result:<34} {short(known):<9} {layers}')
        wrong += [f'magnitude, {compressed}: {line}' for line in magnitude_off(known, active)]
    return wrong


def print_synflow() -> list[str]:
    masks, found = prune_by_synflow(list(SYNFLOW))
    print(f'\nSynFlow, 100 rounds, {FLOW_SEEDS} networks each; the expected is of one')
    print(
        f'{"direct":>6}  {"kept":>4}  {"active":<28}  {"weights per layer (medians)":<27}  expected'
    )
    wrong, sums = [], []
    for i, (compressed, known) in enumerate(SYNFLOW.items()):
        kept, active = found['kept'][i], found['active'][i]
        result = ', '.join(map(str, active.sum(axis=1)))
        layers = ', '.join(f'{n:g}' for n in np.median(kept, axis=0))
        expected = f'{known.active} of {known.kept} active, {", ".join(map(str, known.layers))}'
        print(f'{compressed:>6}  {kept[0].sum():>4}  {result:<28}  {layers:<24}  {expected}')
        wrong += [f'SynFlow, {compressed}: {line}' for line in flow_off(known, kept, active)]
        flows = layer_flows(0, {path: mask[i, 0] for path, mask in masks.items()})
        sums.append(np.ptp(flows) / flows.max())
        if not sums[-1] < 1e-12:
            wrong.append(f'SynFlow, {compressed}: the layers have sums of scores {flows}')
    print(f'The scores of every layer have one sum (conservation): to {max(sums):.0e} of it.')
    return wrong


if __name__ == '__main__':
    sys.exit(main())
