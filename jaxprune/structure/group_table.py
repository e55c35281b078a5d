"""Coupled groups as a table of text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxprune.structure.groups import Family, Member

#: Members that a row names; the others are counted.
_NAMED = 3


def table(families: 'Sequence[Family]') -> str:
    """One row for each family: how many groups, of which kind, and what goes with each of them."""
    rows = [('groups', 'kind', 'made by', 'goes along', 'read by', 'may go')]
    for family in families:
        by_role = {role: [m for m in family.members if m.role == role] for role in ('out', 'in')}
        rest = [m for m in family.members if m.role in ('along', 'state')]
        may = family.reason and f'no: {family.reason}'
        may = may or ('yes' if family.zero_invariant else 'yes, with what reads it')
        listed = (_listed(members) for members in (by_role['out'], rest, by_role['in']))
        rows.append((str(family.size), family.kind, *listed, may))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = [
        '  '.join([*(cell.ljust(n) for cell, n in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    ]
    return '\n'.join(line.rstrip() for line in lines)


def _listed(members: 'Sequence[Member]') -> str:
    """`conv/kernel[3], ...`: the axis of each member in brackets."""
    named = [f'{m.path}[{m.axis}]{_each(m)}' for m in members[:_NAMED]]
    if len(members) > _NAMED:
        named.append(f'{len(members) - _NAMED} more')
    return ', '.join(named)


def _each(member: 'Member') -> str:
    """How many indices go with one group, where it is more than one."""
    count = len(member.indices[0])
    return f' x{count}' if count > 1 else ''
