"""What a method removes at a time, from its name in a specification."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxprune.allocation import Shape
from jaxprune.errors import PruneError, nearest, quoted, shown
from jaxprune.pattern import block_groups, kernel_groups, n_of_m_groups, single_weights
from jaxprune.structure.channel_graph import graph_of, window_sides
from jaxprune.structure.groups import Coupled, product_axes
from jaxprune.structure.unit_groups import unit_groups
from jaxprune.types import Groups

#: Name -> the kinds of coupled groups that compete.
COUPLED = {
    'unit': ('unit',),
    'head': ('head',),
    'head_dim': ('head_dim',),
    'group': ('unit', 'head'),
}
#: What competes by a name of its own.
_NAMES = ('weight', 'kernel', *COUPLED)
#: Names, and examples of the two patterns.
GRANULARITIES = (*_NAMES, '2:4', '8x128')
#: How anything but single weights is shared out among layers.
GROUP_ALLOCATIONS = ('global', 'uniform', 'uniform_down')
#: What is counted, for messages and labels.
_PLURALS = {
    'kernel': 'kernels',
    'unit': 'units',
    'head': 'heads',
    'head_dim': 'head dimensions',
    'group': 'groups',
}


def plural(granularity: str) -> str:
    """What a density counts: 'units', 'heads', 'blocks', 'weights'."""
    if _numbers(granularity) and 'x' in granularity:
        return 'blocks'
    return _PLURALS.get(granularity, 'weights')


def counted_as(granularity: str) -> str:
    """`plural`, with the rule where one holds a density down."""
    pattern = _numbers(granularity) and ':' in granularity
    return f'weights (granularity {granularity})' if pattern else plural(granularity)


def check_granularity(granularity: str) -> None:
    """Raises PruneError unless it is a name, n:m with n <= m, or a block such as 8x128."""
    if granularity in _NAMES:
        return
    numbers = _numbers(granularity)
    if numbers is None:
        valid = nearest(granularity, _NAMES)
        raise PruneError(
            f'unknown granularity {shown(granularity)}: {valid}, n:m as 2:4, blocks as 8x128'
        )
    first, second = numbers
    if ':' in granularity and not 1 <= first <= second:
        raise PruneError(f'granularity {quoted(granularity)}: expected n:m with 1 <= n <= m')
    if not (first and second):
        raise PruneError(f'granularity {quoted(granularity)}: a block has sides of at least 1')


def _numbers(granularity: object) -> tuple[int, int] | None:
    text = granularity if isinstance(granularity, str) else ''
    found = re.fullmatch(r'([0-9]{1,9})[:x]([0-9]{1,9})', text)
    return None if found is None else (int(found[1]), int(found[2]))


def competing(
    granularity: str,
    shapes: Mapping[str, Shape],
    read: Callable[[], Coupled] | None = None,
    keep_all_units: str = '',
) -> Groups:
    """What competes under a granularity.

    Args:
      granularity: 'weight'; 'kernel', all taps of a convolution from one input to one output, or a
        weight of a dense layer; 'unit' (neurons and filters), 'head', 'head_dim', 'group' (units
        and heads), each with everything that goes along; n:m, such as '2:4'; or blocks of inputs x
        outputs, such as '8x128'.
      shapes: path -> shape of every prunable leaf, in forward order if it is known.
      read: reads the coupled groups of the network. Without it kernels, n:m and blocks take the
        last two axes of a kernel for inputs and outputs.
      keep_all_units: see `unit_groups`.

    Raises:
      PruneError: an unknown granularity, one that needs the network, nothing that could go.
    """
    check_granularity(granularity)
    if granularity == 'weight':
        return single_weights(shapes)
    if granularity in COUPLED:
        if read is None:
            raise PruneError(f"granularity '{granularity}' needs the network and an input")
        return unit_groups(read(), shapes, COUPLED[granularity], keep_all_units, granularity)
    if granularity == 'kernel':
        return kernel_groups(shapes, None if read is None else _sides(read(), shapes))
    first, second = _numbers(granularity)
    roles = {} if read is None else product_axes(read(), shapes)
    inputs = {path: roles.get(path, (-2, -1))[0] for path in shapes}
    if ':' in granularity:
        return n_of_m_groups(shapes, first, second, inputs)
    return block_groups(shapes, (first, second), {p: roles.get(p, (-2, -1)) for p in shapes})


def _sides(coupled: Coupled, shapes: Mapping[str, Shape]) -> dict[str, tuple[int, ...]]:
    """Path -> the sides of a kernel's window; none where no product tells."""
    sides = window_sides(graph_of(coupled.coupling))
    return {path: sides.get(path, ()) for path in shapes}


Bound = int | Mapping[str, int]
Cap = float | Mapping[str, float]


def limits(groups: Groups, floor: Bound = 0, share: float = 0.0, cap: Cap = 1.0) -> tuple[Any, Any]:
    """The floor and the cap of every layer, for counts and selections.

    Args:
      groups: what competes.
      floor: fewest groups of a layer; one number for all holds as far as a layer has that many.
      share: in [0, 1); a layer of n groups keeps `int(share n) + 1` at least, if it is above 0. The
        gradient-flow study has 0.05.
      cap: largest density of a layer; n of every m allow n/m at most.
    """
    sizes = {name: math.prod(shape) for name, shape in groups.shapes.items()}
    if share or (isinstance(floor, int) and floor and groups.kind != 'weight'):
        least = dict.fromkeys(sizes, floor) if isinstance(floor, int) else floor
        floor = {
            name: min(max(least.get(name, 0), int(share * n) + 1 if share else 0), n)
            for name, n in sizes.items()
        }
    if groups.most is not None:
        own = cap if isinstance(cap, Mapping) else dict.fromkeys(sizes, cap)
        cap = {n: min(own.get(n, 1.0), groups.most[n] / max(sizes[n], 1)) for n in sizes}
    return floor, cap
