"""Layerwise quotas: how a budget of weights is shared among layers.

Host code with exact integers: a quota depends on static shapes only, and float32 would lose
counts from 2**24 weights on.
"""

import math
from collections.abc import Callable, Mapping

from jaxprune.errors import PruneError, nearest

Shape = tuple[int, ...]
#: (shapes, density) -> path -> density of that layer, in [0, 1].
QuotaFn = Callable[[Mapping[str, Shape], float], dict[str, float]]


def check_density(density: float) -> None:
    """Raises PruneError unless 0 < density <= 1."""
    if not 0 < density <= 1:
        raise PruneError(f'density must be in (0, 1], not {density}')


def uniform(shapes: Mapping[str, Shape], density: float) -> dict[str, float]:
    """The same density in every layer."""
    check_density(density)
    return dict.fromkeys(sorted(shapes), float(density))


def erdos_renyi(
    shapes: Mapping[str, Shape], density: float, *, kernel: bool = True
) -> dict[str, float]:
    """Erdős-Rényi densities, `d_l` proportional to sum(shape) / product(shape).

    Layers whose density would pass 1 are made dense, the largest first and equal ones together,
    and the rest of the budget is shared anew among the others (Evci et al., 2020,
    arXiv:1911.11134, and their code).

    Args:
      shapes: path -> shape, a dense kernel `(in, out)`, a convolution `(height, width, in, out)`.
      density: overall density in (0, 1].
      kernel: count the spatial sides of a convolution in the sum too (ERK); without, ER.
    """
    check_density(density)
    size = {path: math.prod(shape) for path, shape in shapes.items()}
    # All sides of an ERK kernel count; plain ER looks at the channels, the last two axes.
    raw = {
        path: sum(shape if kernel else shape[-2:]) / math.prod(shape if kernel else shape[-2:])
        for path, shape in shapes.items()
    }
    budget = density * sum(size.values())
    dense: set[str] = set()
    while True:
        sparse = [path for path in shapes if path not in dense]
        if not sparse:
            return dict.fromkeys(sorted(shapes), 1.0)
        left = budget - sum(size[path] for path in dense)
        scale = left / sum(raw[path] * size[path] for path in sparse)
        largest = max(raw[path] for path in sparse)
        if scale * largest <= 1:
            break
        dense |= {path for path in sparse if raw[path] == largest}
    return {path: 1.0 if path in dense else scale * raw[path] for path in sorted(shapes)}


#: Names of the allocations a specification may ask for; 'global' ranks all layers together.
QUOTAS: dict[str, QuotaFn] = {'uniform': uniform, 'erk': erdos_renyi}
ALLOCATIONS = ('global', *QUOTAS)


def quota(name: str) -> QuotaFn:
    """The quota rule of that name."""
    if name not in QUOTAS:
        raise PruneError(f"unknown quota '{name}': {nearest(name, QUOTAS)}")
    return QUOTAS[name]


def round_counts(shapes: Mapping[str, Shape], densities: Mapping[str, float]) -> dict[str, int]:
    """Path -> round(density * size), each layer on its own (ties to even, as Python rounds)."""
    return {path: round(densities[path] * math.prod(shapes[path])) for path in sorted(shapes)}
