"""Where the units of a family are in a traced program: where they are made, and where read.

A value is followed from the product that makes it, through operations on single entries, as long as
the rest of the program knows the unit by one array. Such an array is a place for a gate.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxprune.structure.coupling import Coupling, Visit, may_go, walk
from jaxprune.structure.groups import Coupled, Family
from jaxprune.structure.labelled import Labelled
from jaxprune.structure.operations import NARY, UNARY
from jaxprune.structure.units import Axis, found

#: After the product and its bias; after all that is affine; after all operations on single entries;
#: where the next layer reads it.
PLACES = ('output', 'norm', 'activation', 'read')
_PRODUCTS = frozenset({'dot_general', 'conv_general_dilated'})
_CUSTOM = frozenset({'custom_jvp_call', 'custom_vjp_call'})
_ENTRYWISE = UNARY | NARY | _CUSTOM | {'select_n'}
#: Of the operations on single entries, those that are affine in one operand.
_AFFINE = frozenset({'add', 'sub', 'mul', 'div', 'neg', 'add_any', 'convert_element_type', 'copy'})


class Site(NamedTuple):
    """An array of the program that has the units of a family along an axis.

    Attributes:
      family: its name.
      number: of the family's sites, in the order of the program.
      taken: the array is among what an operation takes; else among what it makes.
      position: which of those it is.
      axis: of the array.
      numbers: for each index the number of its group; the number of groups where it has none.
      inside: the operation is inside a loop or a branch.
    """

    family: str
    number: int
    taken: bool
    position: int
    axis: int
    numbers: np.ndarray
    inside: bool


def sites(coupled: Coupled, place: str, names: Collection[str]) -> dict[int, list[Site]]:
    """The sites of some families, by the `id` of the visit of `coupled.coupling.visits`."""
    read = coupled.coupling
    families = [family for family in coupled.families if family.name in names]
    made: dict[int, list[Site]] = {}
    counts = dict.fromkeys(names, 0)

    def add(visit: Visit, family: Family, taken: bool, position: int, inside: bool) -> None:
        value = (visit.operands if taken else visit.results)[position]
        axis, numbers = _axis_of(read, value, family)
        own = made.setdefault(id(visit), [])
        if any(s[0] == family.name and s[2:5] == (taken, position, axis) for s in own):
            return  # two layers that make it meet in one array
        own.append(Site(family.name, counts[family.name], taken, position, axis, numbers, inside))
        counts[family.name] += 1

    for visits, inside in _bodies(read.visits):
        for j, visit in enumerate(visits):
            for family in families:
                if place == 'read':
                    for i in _reads(read, visit, family):
                        add(visit, family, True, i, inside)
                elif _makes(read, visit, family):
                    add(_placed(read, visits, j, family, place), family, False, 0, inside)
    return made


def loud(coupled: Coupled, found_sites: Mapping[int, list[Site]]) -> set[int]:
    """The units that still act if their arrays at all of their sites are zero.

    So it is if a bias comes later, of a sum or of the norm behind a depthwise convolution.
    """
    read, made = coupled.coupling, set[int]()
    silenced = {
        key: [(site.position, site.axis) for site in own if not site.taken]
        for key, own in found_sites.items()
    }

    def hear(axis: Axis, where: str) -> None:
        made.update(read.units.parts_of(found(axis).units))

    walk(read, lambda source: False, may_go(read), hear, silenced)
    return made


def _bodies(visits: list[Visit], inside: bool = False) -> Iterator[tuple[list[Visit], bool]]:
    """The operations of the program, and those of each loop, branch and checkpoint."""
    yield visits, inside
    for visit in visits:
        if visit.name not in _CUSTOM:
            for body in visit.inside:
                yield from _bodies(body, True)


def _axis_of(
    read: Coupling, value: Labelled, family: Family
) -> tuple[int, np.ndarray] | tuple[None, None]:
    """The axis of an array along which a family's units lie, and the group of each index."""
    number = {unit: n for n, unit in enumerate(family.units)}
    for i, axis in enumerate(map(found, value.axes)):
        if axis.units is None:
            continue
        distinct, inverse = np.unique(read.units.roots(axis.units), return_inverse=True)
        own = [[number[p] for p in read.units.parts(int(u)) if p in number] for u in distinct]
        if any(own) and all(len(n) <= 1 for n in own):
            each = np.array([n[0] if n else family.size for n in own], np.int32)
            return i, each[inverse]
    return None, None


def _sources(value: Labelled) -> set[tuple[str, int]]:
    return {source for sources in value.sources for source in sources}


def _members(family: Family, role: str) -> set[tuple[str, int]]:
    return {(m.path, m.axis) for m in family.members if m.role == role}


def _makes(read: Coupling, visit: Visit, family: Family) -> bool:
    """Does this operation make the units, of a parameter and what comes from the inputs?"""
    if not visit.results or visit.inside or all(value.given for value in visit.operands):
        return False  # what a loop or a checkpoint makes is made inside
    makers = _members(family, 'out')
    met = any(value.given and makers & _sources(value) for value in visit.operands)
    return met and _axis_of(read, visit.results[0], family)[0] is not None


def _reads(read: Coupling, visit: Visit, family: Family) -> list[int]:
    """Which operands of a product have the units that one of its parameters reads."""
    if visit.name not in _PRODUCTS:
        return []
    readers = _members(family, 'in') | _members(family, 'out')  # a tied weight does both
    if not any(value.given and readers & _sources(value) for value in visit.operands):
        return []
    return [
        i
        for i, value in enumerate(visit.operands)
        if not value.given and _axis_of(read, value, family)[0] is not None
    ]


def _placed(
    read: Coupling, visits: Sequence[Visit], first: int, family: Family, place: str
) -> Visit:
    """The operation after which a gate sits, for units that one of them makes."""
    steps = list(_chain(visits, first))
    if place == 'activation':
        return steps[-1][0]
    if place == 'output':
        bias = steps[1:2] and _adds_parameter(read, steps[1][0], steps[0][0].results[0])
        return steps[1][0] if bias else steps[0][0]
    last = steps[0][0]
    for visit, affine in steps[1:]:
        if not affine:
            break
        last = visit
    return last


def _adds_parameter(read: Coupling, visit: Visit, value: Labelled) -> bool:
    others = [other for other in visit.operands if other is not value]
    return visit.name == 'add' and bool(others) and all(_sources(other) for other in others)


def _chain(visits: Sequence[Visit], first: int) -> Iterator[tuple[Visit, bool]]:
    """The operations after which one array alone stands for what the first of them makes.

    Yields each with whether all since the one before is affine.
    """
    start = visits[first].results[0]
    shape = _shape(start)
    last = _last_uses(visits)
    alive: dict[int, Labelled] = {id(start): start}
    affine = True
    yield visits[first], True
    for j in range(first + 1, len(visits)):
        visit = visits[j]
        mine = [value for value in visit.operands if id(value) in alive]
        if not mine:
            continue
        others = [value for value in visit.operands if id(value) not in alive]
        single = len(visit.results) == 1 and _shape(visit.results[0]) == shape
        if visit.name not in _ENTRYWISE or not single or not all(o.given for o in others):
            return
        result = visit.results[0]
        affine = (
            affine and visit.name in _AFFINE and len(mine) == 1 and not _inverts(visit, mine[0])
        )
        alive[id(result)] = result
        if all(key == id(result) or last.get(key, -1) <= j for key in alive):
            yield visit, affine
            alive, affine = {id(result): result}, True


def _inverts(visit: Visit, value: Labelled) -> bool:
    """Is the value what something is divided by?"""
    return visit.name == 'div' and visit.operands[1] is value


def _shape(value: Labelled) -> tuple[int, ...]:
    return tuple(axis.size for axis in value.axes)


def _last_uses(visits: Sequence[Visit]) -> Mapping[int, int]:
    """The `id` of each array -> the last operation that takes it."""
    return {id(value): j for j, visit in enumerate(visits) for value in visit.operands}
