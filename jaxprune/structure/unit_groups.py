"""Coupled units and heads as what competes: sums over what makes them, masks of all that goes."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import arguments
from jaxprune.errors import PruneError, quoted
from jaxprune.structure.channel_graph import graph_of, window_sides
from jaxprune.structure.cost import cost_shares
from jaxprune.structure.coupling import may_go, walk
from jaxprune.structure.gates import gates
from jaxprune.structure.groups import Coupled, Family, Member
from jaxprune.structure.labelled import Source
from jaxprune.structure.units import Axis, found
from jaxprune.types import Groups, Masks, Own, Scores, Weights

Shape = tuple[int, ...]


def unit_groups(
    coupled: Coupled,
    shapes: Mapping[str, Shape],
    kinds: Collection[str] = ('unit',),
    keep_all_units: str = '',
    name: str = 'unit',
) -> Groups:
    """The coupled groups of a network as what competes.

    A group's score is the sum over the prunable weights that make it, its own slices and not those
    that read it. If it goes, all prunable weights that belong to it go: what makes it, what follows
    it, and what reads it.

    Args:
      coupled: the groups of the network.
      shapes: path -> shape of every prunable leaf.
      kinds: which groups compete, some of `KINDS`.
      keep_all_units: a regular expression; layers whose path it matches anywhere keep all units.
      name: of this choice, as a specification has it.

    Raises:
      PruneError: nothing may go, with the reasons; a wrong expression, or one without a match.
    """
    kept_whole = _matching(coupled.families, keep_all_units)
    competing, reasons = [], {}
    heard = _heard(coupled, lambda source: source[0] in shapes)
    for family in coupled.families:
        makers = [m for m in family.members if m.role == 'out']
        if family.kind not in kinds or not makers:
            continue
        missing = next((m.path for m in makers if m.path not in shapes), None)
        if family.reason:
            reasons[family.name] = family.reason
        elif missing is not None:
            reasons[family.name] = f"'{missing}' is not prunable"
        elif heard.intersection(family.units):
            readers = (m.path for m in family.members if m.role == 'in' and m.path not in shapes)
            reader = next(readers, None)
            why = f"'{reader}' reads it" if reader else 'a bias without a mask would still act'
            reasons[family.name] = f'{why}: make it prunable as well, see prunable='
        elif family.name not in kept_whole:
            competing.append(family)
    if not competing:
        why = '; '.join(f"'{path}': {reason}" for path, reason in list(reasons.items())[:3])
        raise PruneError(f'there is no {name} that could be pruned' + (f' ({why})' if why else ''))
    lengths = {
        (path, i): axis.size
        for path, axes in coupled.coupling.parameter_axes.items()
        for i, axis in enumerate(axes)
    }
    names = [family.name for family in competing]
    return _groups_of(competing, shapes, lengths, name)._replace(
        families={family.name: family for family in competing},
        gates=functools.cache(lambda place: gates(coupled, place, names)),
        shares=functools.cache(lambda: cost_shares(coupled, names)),
        kinds=functools.cache(lambda: _kinds(coupled, competing)),
    )


def _kinds(coupled: Coupled, families: Sequence[Family]) -> dict[str, str]:
    """Layer -> what it is; a convolution if a kernel that makes it has a window."""
    windows = {path for path, sides in window_sides(graph_of(coupled.coupling)).items() if sides}

    def kind(family: Family) -> str:
        makers = {m.path for m in family.members if m.role == 'out'}
        return 'conv' if makers & windows else 'dense'

    return {f.name: kind(f) if f.kind == 'unit' else f.kind for f in families}


def _groups_of(
    families: Sequence[Family],
    shapes: Mapping[str, Shape],
    lengths: Mapping[tuple[str, int], int],
    name: str,
) -> Groups:
    makers = [
        (family.name, member, _table(member))
        for family in families
        for member in family.members
        if member.role == 'out'
    ]
    maps: dict[str, list[tuple[str, int, np.ndarray]]] = {path: [] for path in shapes}
    own: dict[str, Own] = {}
    for family in families:
        for member in family.members:
            if member.path in shapes:
                at = _numbers(member, shapes[member.path][member.axis])
                maps[member.path].append((family.name, member.axis, at))
            if member.role in ('out', 'along'):
                at = _numbers(member, lengths[member.path, member.axis])
                own[member.path] = Own(member.axis, family.name, at, member.role == 'out')

    def gather(values: Weights) -> Scores:
        sums: Scores = {}
        for layer, member, table in makers:
            leaf = values[member.path]
            others = tuple(i for i in range(leaf.ndim) if i != member.axis)
            each = leaf.sum(others)[table].sum(1)
            sums[layer] = sums[layer] + each if layer in sums else each
        return sums

    def alive(masks: Masks) -> Masks:
        counted = gather({path: mask.astype(jnp.int32) for path, mask in masks.items()})
        return {layer: count > 0 for layer, count in counted.items()}

    def spread(chosen: Masks) -> Masks:
        longer = {layer: jnp.append(kept, True) for layer, kept in chosen.items()}
        return {path: _mask(shape, maps[path], longer) for path, shape in shapes.items()}

    sizes = {family.name: (family.size,) for family in families}
    return Groups(name, sizes, gather, alive, spread, own=own)


def _mask(
    shape: Shape, maps: Sequence[tuple[str, int, np.ndarray]], kept: Mapping[str, jax.Array]
) -> jax.Array:
    """A leaf's mask: an entry stays if all groups that it belongs to stay."""
    mask = jnp.ones(shape, bool)
    for layer, axis, numbers in maps:
        along = kept[layer][numbers]
        mask &= along.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return mask


def _table(member: Member) -> np.ndarray:
    """`(groups, indices of each)`."""
    return np.stack(member.indices).astype(np.int32)


def _numbers(member: Member, length: int) -> np.ndarray:
    """For each index of the axis its group; the number of groups where it belongs to none."""
    numbers = np.full(length, len(member.indices), np.int32)
    for number, at in enumerate(member.indices):
        numbers[at] = number
    return numbers


def silent_when_unread(coupled: Coupled, shapes: Mapping[str, Shape]) -> set[str]:
    """The families whose groups can be cut out as soon as nothing of what reads them is kept.

    Args:
      coupled: the groups of the network.
      shapes: path -> shape of every prunable leaf; all that reads such a group is among them.
    """
    readers = {(p, i) for (p, i), roles in coupled.coupling.roles.items() if 'in' in roles}
    heard = _heard(coupled, lambda source: source in readers)
    return {
        family.name
        for family in coupled.families
        if not family.reason
        and not heard.intersection(family.units)
        and any(m.role == 'in' for m in family.members)
        and all(m.path in shapes for m in family.members if m.role == 'in')
    }


def _heard(coupled: Coupled, silent: Callable[[Source], bool]) -> set[int]:
    """Units that still act where only some parameters are masked.

    Args:
      silent: is a parameter zero along an axis where its units go?
    """
    read, heard = coupled.coupling, set[int]()

    def hear(axis: Axis, where: str) -> None:
        heard.update(read.units.parts_of(found(axis).units))

    walk(read, silent, may_go(read), hear)
    return heard


def _matching(families: Sequence[Family], pattern: str) -> set[str]:
    """The families with a maker whose path a regular expression matches."""
    if not pattern:
        return set()
    search = arguments.expression('keep_all_units', pattern)
    makers = {f.name: [m.path for m in f.members if m.role == 'out'] for f in families}
    matched = {name for name, paths in makers.items() if any(map(search, paths))}
    if not matched:
        there = ', '.join(dict.fromkeys(path for paths in makers.values() for path in paths))
        raise PruneError(f'keep_all_units: {quoted(pattern)} matches no layer; there are: {there}')
    return matched
