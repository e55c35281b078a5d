"""Coupled groups as a table of text, and short names for tables and figures."""

import re
import textwrap
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxprune.structure.groups import Family, Member

#: Columns of a terminal that a table fits into, and of a list of members.
WIDTH = 120
_LIST = 38


def table(families: 'Sequence[Family]') -> str:
    """One row for each family: how many groups, of which kind, and what goes with each of them.

    A member is its path with the axis in brackets, and how many indices go with one group if it is
    more than one: `dense_0/kernel[0] x16`. `+3` are three more. 'with readers': zeros do not make
    such a group vanish, what reads it has to go too. Reasons why groups stay are numbered, below.
    """
    shared = shared_parents({m.path for f in families for m in f.members if m.role != 'state'})
    rows = [('groups', 'kind', 'made by', 'along', 'read by', 'may go')]
    reasons: dict[str, int] = {}
    for family in families:
        by_role = {role: [m for m in family.members if m.role == role] for role in ('out', 'in')}
        along = sum(m.role in ('along', 'state') for m in family.members)
        if family.reason:
            number = reasons.setdefault(short_reason(family.reason), len(reasons) + 1)
            may = f'no [{number}]'
        else:
            may = 'yes' if family.zero_invariant else 'with readers'
        made, read = (_listed(by_role[role], len(shared)) for role in ('out', 'in'))
        rows.append((str(family.size), family.kind, made, str(along or ''), read, may))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"paths are below '{shared}'"] if shared else []
    lines += [
        '  '.join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    for reason, number in reasons.items():
        indent = ' ' * len(f'[{number}] ')
        lines += textwrap.wrap(f'[{number}] {reason}', WIDTH, subsequent_indent=indent)
    return '\n'.join(lines)


def shared_parents(paths: Collection[str]) -> str:
    """The parents that all paths have in common, with a '/' at the end; '' if there is none."""
    parents = [path.split('/')[:-1] for path in paths]
    shared: list[str] = []
    for names in zip(*parents, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ''.join(f'{name}/' for name in shared)


def _listed(members: 'Sequence[Member]', skipped: int) -> str:
    """As many members as fit, `conv/kernel[3], ...`, and how many more there are."""
    shown: list[str] = []
    for i, member in enumerate(members):
        name, rest = member.path[skipped:], f'[{member.axis}]{_each(member)}'
        more = f' +{len(members) - i - 1}' if i + 1 < len(members) else ''
        if not shown:
            name = shortened(name, _LIST - len(rest) - len(more))
        elif len(', '.join([*shown, name + rest])) + len(more) > _LIST:
            return f'{", ".join(shown)} +{len(members) - i}'
        shown.append(name + rest)
    return ', '.join(shown)


def _each(member: 'Member') -> str:
    """How many indices go with one group, where it is more than one."""
    count = len(member.indices[0])
    return f' x{count}' if count > 1 else ''


def shortened(name: str, length: int) -> str:
    """A name with dots in its middle if it is longer than that; its end tells more."""
    if len(name) <= length:
        return name
    head = max(1, length // 4)
    return f'{name[:head]}…{name[len(name) - (length - head - 1) :]}'


def short_reason(reason: str) -> str:
    """Why groups stay: the operation and the scope or line, without folders and functions."""
    reason = re.sub(r' at \S+ \([^)]*\) in (\S+)', r' in \1', reason)
    return re.sub(r' at (?:\S*/)?([^/\s:]+:\d+)[:\d]* \([^)]*\)', r' at \1', reason)
