"""Matrix pivoting of a whole network: one order for each family of coupled units."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxprune import arguments, tree
from jaxprune.allocation import check_density
from jaxprune.errors import PruneError
from jaxprune.pattern import n_blocks
from jaxprune.structure.block_search import Place, Problem, Target, kept_mass, search
from jaxprune.structure.groups import Coupled, Family, product_axes
from jaxprune.structure.permuted import index_maps, moved_tree, permuted_masks, probe
from jaxprune.structure.pivoting import Occupancy, channel_scores, occupancy, share
from jaxprune.types import Masks, PyTree


class Pivoted(NamedTuple):
    """A network whose units lie in an order that gathers what is worth keeping in blocks.

    Attributes:
      params: the parameters in the new order; the network computes what it did.
      model_state: the statistics in the new order; None if there are none.
      masks: the masks in the new order.
      orders: family -> its permutation, for `permuted_masks` and `permuted_moments`.
      stays: family -> why it stays in its order, of those that lie in a kernel.
      kept_before: path -> the share of the kernel's mass in its best blocks, in the old order.
      kept_after: the same in the new order.
      before: path -> how the kernel's weights that are kept fill its blocks, in the old order.
      after: the same in the new order.
    """

    params: PyTree
    model_state: PyTree
    masks: Masks
    orders: dict[str, np.ndarray]
    stays: dict[str, str]
    kept_before: dict[str, float]
    kept_after: dict[str, float]
    before: dict[str, Occupancy]
    after: dict[str, Occupancy]


def pivot_network(
    coupled: Coupled,
    params: PyTree,
    masks: Masks,
    block: tuple[int, int],
    *,
    density: float,
    seed: int,
    power: float = 1.0,
    restarts: int = 2,
    model_state: PyTree = None,
) -> Pivoted:
    """Reorders the units of a network so that few blocks of its kernels hold much of their mass.

    A channel is a column of the kernels that make it and a row of those that read it, so a family
    has one order, judged by all kernels that it lies in: the sum of what their best blocks hold.
    One family after the other is improved, as `pivot` does with rows and columns; it says more on
    the search. The new network computes what the old one did. To keep whole blocks of it:

        pivoted = pivot_network(jp.groups(apply, params, x), params, masks, (8, 8),
                                density=0.25, seed=0)
        blocks = jp.prune(pivoted.params, 'magnitude', 0.25, granularity='8x8')

    The mass of a kernel is that of `channel_scores`: taps of a convolution are added up, since all
    of them have the same channels. Axes are those of the products that use it; kernels without
    inputs and outputs of their own, such as depthwise and tied ones, only move along. The sum of
    all kernels does not fall, but a single one may lose.

    That units may change places is tried, see `permuted`: the traced program runs some 25 times or
    more on the CPU, so read the groups with a small batch.

    Args:
      coupled: the groups of the network; units that a norm runs over may move where they were read
        with `normalisation='sliced'`.
      params: all parameters.
      masks: path -> bool array of each kernel that counts; all True where nothing is pruned.
      block: inputs and outputs of a block; a side that is longer than a kernel's is cut to it.
      density: the fraction of blocks kept in each kernel, in (0, 1], but one block at least.
      seed: of the random starts.
      power: 1 for |W|, 2 for W².
      restarts: how many random starts.
      model_state: batch statistics and the like.

    Raises:
      PruneError: masks that do not fit, or none of a kernel with inputs and outputs; weights that
        are not finite; no family whose order could change; a density out of range.
    """
    arguments.least(0, seed=seed, restarts=restarts)
    tree.check_masks(params, masks)
    # A tied kernel, read both ways, has no inputs and outputs of its own.
    axes = {path: own for path, own in product_axes(coupled, masks).items() if own[0] != own[1]}
    if not axes:
        raise PruneError('masks hold no kernel with inputs and outputs: there is nothing to gather')
    leaves = dict(tree.paths(params))
    matrices = {
        path: channel_scores(np.where(masks[path], leaves[path], 0), axes[path], power=power)
        for path in axes
    }
    check_density(density)
    targets = [_target(path, matrix, block, density) for path, matrix in matrices.items()]
    differs, rng = probe(coupled), np.random.default_rng(seed)
    families, stays = _movable(coupled, axes, differs, rng)
    orders = tuple(_places(family, axes) for family in families)
    given = list(matrices.values())
    found = search(Problem(tuple(targets), orders), given, rng, restarts)
    chosen = {
        family.name: order
        for family, order in zip(families, found.orders, strict=True)
        if not np.array_equal(order, np.arange(family.size))
    }
    if why := differs(chosen):
        raise PruneError(f'units that seemed interchangeable are not: {why}')
    maps = index_maps(coupled, chosen)
    return Pivoted(
        moved_tree(params, maps),
        moved_tree(model_state, maps),
        permuted_masks(coupled, masks, chosen),
        chosen,
        stays,
        dict(zip(axes, _shares(given, targets), strict=True)),
        dict(zip(axes, _shares(found.matrices, targets), strict=True)),
        dict(zip(axes, _occupancies(given, targets), strict=True)),
        dict(zip(axes, _occupancies(found.matrices, targets), strict=True)),
    )


def _target(path: str, matrix: np.ndarray, block: tuple[int, int], density: float) -> Target:
    if not np.isfinite(matrix).all():
        raise PruneError(f"weights of '{path}' are NaN or infinite")
    count = max(1, round(density * n_blocks(matrix.shape, block)))
    return Target(tuple(map(min, block, matrix.shape)), count)


def _movable(
    coupled: Coupled,
    axes: Mapping[str, tuple[int, int]],
    differs: Callable[[Mapping[str, np.ndarray]], str],
    rng: np.random.Generator,
) -> tuple[list[Family], dict[str, str]]:
    """The families in kernels whose units may change places, and why the others may not."""
    there = [family for family in coupled.families if _places(family, axes)]
    stays = {family.name: family.reason for family in there if family.reason}
    free = {family.name: family for family in there if not family.reason}
    trial = {name: rng.permutation(family.size) for name, family in free.items()}
    if differs(trial):  # all at once is quick; one of them, or more, is the reason
        for name, order in trial.items():
            if why := differs({name: order}):
                stays[name] = f'its units are not interchangeable: {why}'
    movable = [family for name, family in free.items() if name not in stays]
    if not movable:
        reasons = '; '.join(f"'{name}': {why}" for name, why in list(stays.items())[:3])
        raise PruneError(f'no units could change places ({reasons})')
    return movable, stays


def _places(family: Family, axes: Mapping[str, tuple[int, int]]) -> tuple[Place, ...]:
    """Where the units of a family lie in the kernels."""
    numbers = {path: number for number, path in enumerate(axes)}
    return tuple(
        Place(numbers[m.path], axes[m.path].index(m.axis), np.stack(m.indices))
        for m in family.members
        if m.axis in axes.get(m.path, ())
    )


def _shares(matrices: Sequence[np.ndarray], targets: Sequence[Target]) -> list[float]:
    """Of each matrix the share of its mass in the best blocks."""
    totals = [float(matrix.sum()) for matrix in matrices]
    kept = [kept_mass(m, t) for m, t in zip(matrices, targets, strict=True)]
    return [share(k, total) for k, total in zip(kept, totals, strict=True)]


def _occupancies(matrices: Sequence[np.ndarray], targets: Sequence[Target]) -> list[Occupancy]:
    return [occupancy(m, t.block) for m, t in zip(matrices, targets, strict=True)]
