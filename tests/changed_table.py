"""Nested tables for tests of specifications."""

import copy


def changed(table, **values):
    """A copy with `section__key=value` replaced."""
    table = copy.deepcopy(table)
    for name, value in values.items():
        *outer, last = name.split('__')
        inner = table
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return table
