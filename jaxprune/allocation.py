"""Layerwise allocations: how a budget of weights is shared among layers.

Host code in double precision with exact integers: an allocation depends on static shapes only, and
float32 would lose counts from 2**24 weights on. A layer without any weight counts as dense.
"""

import decimal
import functools
import math
import operator
from collections.abc import Callable, Mapping

from jaxprune import arguments
from jaxprune.errors import PruneError, lookup, nearest, quoted

Shape = tuple[int, ...]
#: (shapes, density) -> path -> density of that layer, in [0, 1]. The shapes stand in forward
#: order, from the input to the output; some rules need it.
AllocationFn = Callable[[Mapping[str, Shape], float], dict[str, float]]


def check_density(density: float) -> None:
    """Raises PruneError unless 0 < density <= 1."""
    arguments.real('density', density)
    if not 0 < density <= 1:
        raise PruneError(f'density must be in (0, 1], not {density}')


def sizes(shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Path -> number of weights, in the order given.

    Raises:
      PruneError: there are none at all.
    """
    found = {path: math.prod(shape) for path, shape in shapes.items()}
    if not any(found.values()):
        raise PruneError('there are no prunable weights to share out')
    return found


def uniform(shapes: Mapping[str, Shape], density: float) -> dict[str, float]:
    """The same density in every layer."""
    _check(shapes, density)
    return dict.fromkeys(sorted(shapes), float(density))


def uniform_down(shapes: Mapping[str, Shape], density: float) -> dict[str, float]:
    """The same density in every layer, rounded down to whole counts, but one of each at least.

    What codes of filter pruning do: they remove `ceil((1 - density) * n)` of n filters, never all.
    """
    size = _check(shapes, density)
    # One part in 2**40 more, or a density of 0.3 would keep 2 of 10.
    kept = {path: max(math.floor(density * n * (1 + 2**-40)), 1) for path, n in size.items()}
    return _keyed(shapes, {path: kept[path] / n for path, n in size.items()})


def uniform_plus(shapes: Mapping[str, Shape], density: float) -> dict[str, float]:
    """The same density in every layer, except a dense first and a not too sparse last one.

    A first layer that is a convolution stays dense, the last layer keeps at least 20 %, and the
    others share the rest evenly (Gale et al., 2019, arXiv:1902.09574). A first layer of another
    kind is treated like those in the middle, as in the code of LAMP (Lee et al., 2021,
    arXiv:2010.07611); other code refuses such a network.

    Args:
      shapes: path -> shape in forward order; a convolution has four axes or more.
      density: overall density in (0, 1].

    Raises:
      PruneError: the budget is smaller than what the first and the last layer keep.
    """
    size = _check(shapes, density)
    total = sum(size.values())
    first, last = next(iter(size)), list(size)[-1]
    dense = {first: 1.0} if _is_convolution(shapes[first]) else {}
    kept_first = size[first] if dense else 0
    kept_last = 0 if last in dense else 0.2 * size[last]
    least = (kept_first + kept_last) / total
    if density < least:
        first_too = 'all of the first convolution and ' if dense else ''
        raise PruneError(
            f'uniform_plus keeps {first_too}20 % of the last layer: '
            f'density must be at least {_rounded_up(least)}, not {density:.3g}'
        )
    left, among = density * total - kept_first, total - kept_first
    share = left / among if among else 1.0
    if share >= 0.2:
        return _keyed(shapes, dict.fromkeys(size, share) | dense)
    middle = among - size[last]
    # Rounding may leave a little less than nothing.
    rest = max(left - kept_last, 0.0) / middle if middle else 0.0
    result = dict.fromkeys(size, rest) | dense | {last: 0.2}
    return _keyed(shapes, result)


def erdos_renyi(
    shapes: Mapping[str, Shape],
    density: float,
    *,
    kernel: bool = True,
    excess: str = 'rescale',
) -> dict[str, float]:
    """Erdős-Rényi densities, `d_l` proportional to sum(shape) / product(shape).

    Where a density would exceed 1, the rest of the budget goes elsewhere:

    - 'rescale' makes the layers of the largest density dense and rescales the others to share the
      rest of the budget (Evci et al., 2020, arXiv:1911.11134, and their code);
    - 'previous' passes what a layer cannot hold to the layer before it, from the last to the first
      (Vysogorets & Kempe, 2021, arXiv:2107.02306, in their code).

    Args:
      shapes: path -> shape, a dense kernel `(in, out)`, a convolution `(height, width, in, out)`;
        for 'previous' in forward order.
      density: overall density in (0, 1].
      kernel: count the spatial sides of a convolution in the sum too (ERK); without, ER.
      excess: 'rescale' or 'previous'.

    Raises:
      PruneError: with 'previous', the first layer would have to hold more than it can.
    """
    size = _check(shapes, density)
    # All sides of an ERK kernel count; plain ER counts the channels, the last two axes.
    sides = {path: (shapes[path] if kernel else shapes[path][-2:]) or (1,) for path in size}
    raw = {path: sum(sides[path]) / math.prod(sides[path]) for path in size}
    rule = lookup('excess', excess, _EXCESS)
    return _keyed(shapes, rule(size, raw, density))


def _rescaled(size: dict[str, int], raw: dict[str, float], density: float) -> dict[str, float]:
    """The largest layers dense, the rest of the budget by `raw`."""
    budget = density * sum(size.values())
    dense: set[str] = set()
    while True:
        sparse = [path for path in size if path not in dense]
        if not sparse:
            return dict.fromkeys(size, 1.0)
        left = budget - sum(size[path] for path in dense)
        scale = left / sum(raw[path] * size[path] for path in sparse)
        largest = max(raw[path] for path in sparse)
        if scale * largest <= 1:
            return {path: 1.0 if path in dense else scale * raw[path] for path in size}
        dense |= {path for path in sparse if raw[path] == largest}


def _pushed_back(size: dict[str, int], raw: dict[str, float], density: float) -> dict[str, float]:
    """Shares by `raw`; what a layer cannot hold goes to the one before it."""
    total = sum(size.values())
    scale = density * total / sum(raw[path] * size[path] for path in size)
    result, excess = {}, 0.0
    for path in reversed(size):
        wanted = scale * raw[path] * size[path] + excess
        excess = max(0.0, wanted - size[path])
        result[path] = min(wanted / size[path], 1.0)
    if excess > 1e-12 * total:
        raise PruneError(
            f"at density {density:.3g} the first layer '{path}' would have to keep {wanted:.0f} of "
            f"{size[path]} weights: ask for less, or use excess='rescale'"
        )
    return result


_EXCESS = {'rescale': _rescaled, 'previous': _pushed_back}


def igq(shapes: Mapping[str, Shape], density: float) -> dict[str, float]:
    """Ideal gas quotas, `d_l = 1 / (1 + F n_l)` with the force F that meets the budget.

    Layers are cylinders of gas, as long as they have weights, pressed together by one force: the
    larger a layer, the more it is compressed; at extreme sparsity all keep the same number
    (Vysogorets & Kempe, 2021, arXiv:2107.02306).

    Args:
      shapes: path -> shape, in any order.
      density: overall density in (0, 1].
    """
    size = _check(shapes, density)
    budget = density * sum(size.values())

    def kept(force):
        return math.fsum(n / (1 + force * n) for n in size.values())

    # The forces if all layers were as large as the largest, or as small as the smallest.
    single = (1 - density) / density
    low, high = single / max(size.values()), single / min(size.values())
    force = bisect(lambda force: kept(force) >= budget, low, high)
    return _keyed(shapes, {path: 1 / (1 + force * n) for path, n in size.items()})


def smart_ratio(
    shapes: Mapping[str, Shape], density: float, *, vgg: bool = False
) -> dict[str, float]:
    """Smart ratios: the later a convolution, the sparser; dense layers keep 30 %.

    With L layers in all, the l-th, if it is a convolution, gets `d_l` proportional to
    `(L - l + 1)**2 + (L - l + 1)`, the form for ResNets; VGGs divide that by `l**2`. What a
    convolution cannot hold goes to those after it (Su et al., 2020, arXiv:2009.11094). Once all
    convolutions are dense the remaining budget goes to the dense layers, evenly; the original keeps
    less than asked there.

    Args:
      shapes: path -> shape in forward order; a convolution has four axes or more, and all other
        layers count as dense ones.
      density: overall density in (0, 1].
      vgg: use the form for VGGs.

    Raises:
      PruneError: no layer is a convolution, or 30 % of the dense layers are the whole budget.
    """
    size = _check(shapes, density)
    convolutions = [path for path in size if _is_convolution(shapes[path])]
    if not convolutions:
        raise PruneError('smart_ratio is for networks with convolutions: no kernel has four axes')
    total, capacity = sum(size.values()), sum(size[path] for path in convolutions)
    budget, fixed = density * total, 0.3 * (total - capacity)
    if budget <= fixed:
        raise PruneError(
            f'smart_ratio keeps 30 % of every dense layer: '
            f'density must be above {_rounded_up(fixed / total)}, not {density:.3g}'
        )
    if budget >= capacity + fixed:
        evenly = (budget - capacity) / (total - capacity) if total > capacity else 1.0
        return _keyed(shapes, dict.fromkeys(size, evenly) | dict.fromkeys(convolutions, 1.0))
    # Counted from the output, 1 is the last layer; counted from the input, 1 is the first.
    back = {path: len(size) - i for i, path in enumerate(size)}
    ahead = {path: i + 1 if vgg else 1 for i, path in enumerate(size)}
    raw = {path: (back[path] ** 2 + back[path]) / ahead[path] ** 2 for path in convolutions}
    scale = (budget - fixed) / sum(raw[path] * size[path] for path in convolutions)
    result, excess = dict.fromkeys(size, 0.3), 0.0
    for path in convolutions:
        wanted = scale * raw[path] * size[path] + excess
        excess = max(0.0, wanted - size[path])
        result[path] = min(wanted / size[path], 1.0)
    return _keyed(shapes, result)


#: Rules that share a budget by shapes alone; their names may stand in a specification.
LAYERWISE: dict[str, AllocationFn] = {
    'uniform': uniform,
    'uniform_down': uniform_down,
    'uniform_plus': uniform_plus,
    'erk': erdos_renyi,
    'igq': igq,
    'smart_ratio': smart_ratio,
    'smart_ratio_vgg': functools.partial(smart_ratio, vgg=True),
}
#: Allocations whose counts are one number: 'global' ranks all layers together, 'lamp' shares the
#: number out by the weights themselves, when it prunes.
SHARED = ('global', 'lamp')
#: All allocations, with what they do.
ALLOCATIONS: dict[str, str] = {
    'global': 'one ranking over all layers',
    'uniform': 'the same density in every layer',
    'uniform_down': 'the same density, rounded down in each layer, as codes of filter pruning do',
    'uniform_plus': 'a dense first convolution, a fifth of the last layer at least, the rest '
    'evenly (Gale et al. 2019, arXiv:1902.09574)',
    'erk': 'Erdős-Rényi-Kernel: density of a layer by sum(shape) / product(shape) (Evci et al. '
    '2020, arXiv:1911.11134)',
    'igq': 'ideal gas quotas: large layers lose more, none is emptied (Vysogorets & Kempe 2021, '
    'arXiv:2107.02306)',
    'smart_ratio': 'densities that fall towards the output, 0.3 for the last layer (Su et al. '
    '2020, arXiv:2009.11094)',
    'smart_ratio_vgg': 'the same with the ratios of its authors for VGG (arXiv:2009.11094)',
    'lamp': 'a ranking over all layers by LAMP, the choice within a layer by the method (Lee et '
    'al. 2021, arXiv:2010.07611)',
}
#: Allocations that depend on the order of the layers: `shapes` must be in forward order.
ORDERED = ('uniform_plus', 'smart_ratio', 'smart_ratio_vgg')


def layerwise(name: str) -> AllocationFn:
    """The allocation rule of that name."""
    return lookup('allocation', name, LAYERWISE)


def round_counts(shapes: Mapping[str, Shape], densities: Mapping[str, float]) -> dict[str, int]:
    """Path -> round(density * size), each layer on its own (ties to even, as Python rounds)."""
    return {path: round(densities[path] * math.prod(shapes[path])) for path in sorted(shapes)}


def bounds(
    shapes: Mapping[str, Shape],
    floor: int | Mapping[str, int] = 0,
    cap: float | Mapping[str, float] = 1.0,
) -> tuple[dict[str, int], dict[str, int]]:
    """The fewest and the most weights that each layer may keep.

    Args:
      shapes: path -> shape of every prunable leaf.
      floor: fewest weights of a layer; a mapping may name some layers only.
      cap: largest density of a layer, in (0, 1], rounded down to whole weights; a mapping may name
        some layers only.

    Returns:
      `(fewest, most)`, each path -> integer in sorted path order.

    Raises:
      PruneError: a bound is out of range, names an unknown layer, or cannot be met.
    """
    size = dict(sorted(sizes(shapes).items()))
    for value in floor.values() if isinstance(floor, Mapping) else (floor,):
        if arguments.whole('floor', value) < 0:
            raise PruneError(f'floor must be a whole number of weights, not {value}')
    for value in cap.values() if isinstance(cap, Mapping) else (cap,):
        if not 0 < arguments.real('cap', value) <= 1:
            raise PruneError(f'cap must be a density in (0, 1], not {value}')
    caps = _per_layer('cap', cap, 1.0, size)
    fewest = {p: operator.index(n) for p, n in _per_layer('floor', floor, 0, size).items()}
    # One part in 2**50 more, or a cap of 0.29 would allow 28 of 100 weights.
    most = {p: min(n, math.floor(float(caps[p]) * n * (1 + 2**-50))) for p, n in size.items()}
    for path, n in size.items():
        if fewest[path] > n:
            raise PruneError(f"layer '{path}' has {n} weights, its floor is {fewest[path]}")
        if fewest[path] > most[path]:
            raise PruneError(
                f"layer '{path}' has a floor of {fewest[path]} weights, but its cap of "
                f'{caps[path]:.3g} allows {most[path]}'
            )
    return fewest, most


def bounded_counts(
    shapes: Mapping[str, Shape],
    densities: Mapping[str, float],
    fewest: Mapping[str, int],
    most: Mapping[str, int],
) -> dict[str, int]:
    """`round_counts` within bounds, with the same total.

    Where no count crosses a bound they are exactly those of `round_counts`. Otherwise all
    densities are multiplied by one factor, layers that cross a bound stand at it, and the factor
    is such that the total is unchanged; the largest remainders are rounded up.

    Args:
      shapes: path -> shape.
      densities: path -> density, as an allocation gives it.
      fewest: path -> lower bound, see `bounds`.
      most: path -> upper bound.

    Returns:
      path -> count. Their sum is that of `round_counts`, or the nearest that the bounds allow.
    """
    counts = round_counts(shapes, densities)
    if all(fewest[path] <= count <= most[path] for path, count in counts.items()):
        return counts
    total = min(max(sum(counts.values()), sum(fewest.values())), sum(most.values()))
    # Not quite zero: a layer without an allocation takes what all others have no room for.
    ask = {path: max(densities[path], 2**-60) * math.prod(shapes[path]) for path in counts}

    def targets(factor):
        return {path: min(max(factor * ask[path], fewest[path]), most[path]) for path in counts}

    largest = max(most[path] / ask[path] for path in counts if ask[path])
    factor = bisect(lambda factor: math.fsum(targets(factor).values()) <= total, 0.0, largest)
    target = targets(factor)
    counts = {path: math.floor(target[path]) for path in counts}
    remainders = sorted(counts, key=lambda path: counts[path] - target[path])
    for path in remainders[: total - sum(counts.values())]:
        counts[path] += 1
    return counts


def _check(shapes: Mapping[str, Shape], density: float) -> dict[str, int]:
    """The sizes of the layers that have weights, in the order given."""
    check_density(density)
    return {path: size for path, size in sizes(shapes).items() if size}


def _keyed(shapes: Mapping[str, Shape], densities: Mapping[str, float]) -> dict[str, float]:
    """Sorted by path, with the layers that have no weights."""
    return {path: densities.get(path, 1.0) for path in sorted(shapes)}


def _is_convolution(shape: Shape) -> bool:
    return len(shape) >= 4


def _per_layer(kind: str, bound, default, size: Mapping[str, int]) -> dict:
    """Path -> bound, from one value or from a mapping that names some of the layers."""
    if not isinstance(bound, Mapping):
        return dict.fromkeys(size, bound)
    for path in bound:
        if path not in size:
            raise PruneError(f'{kind} of an unknown layer {quoted(path)}: {nearest(path, size)}')
    return {path: bound.get(path, default) for path in size}


def _rounded_up(density: float) -> str:
    """Three digits, rounded up, so that the density printed is itself accepted."""
    context = decimal.Context(prec=3, rounding=decimal.ROUND_CEILING)
    return f'{float(context.create_decimal(repr(float(density)))):.3g}'


def bisect(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The last double between low and high where `holds` is true, if it turns false once.

    Halved until no double is left between, so that the precision is relative at any scale.
    """
    while low < (middle := (low + high) / 2) < high:
        if holds(middle):
            low = middle
        else:
            high = middle
    return low
