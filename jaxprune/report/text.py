"""Numbers and sentences as a reader sees them."""

import math

import polars as pl

from jaxprune.report import tables

NONE = '\N{EN DASH}'
"""Where nothing was measured."""


def number(value: float) -> str:
    """A compression in plain digits: `1000`, `2.5`, `3.33`; never an exponent."""
    if math.isclose(value, round(value), rel_tol=1e-6):
        return str(round(value))
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f'{value:.{digits}f}'
    return text.rstrip('0').rstrip('.') if '.' in text else text


def times(value: float) -> str:
    """A compression with its sign: `20×`."""
    return f'{number(value)}\N{MULTIPLICATION SIGN}'


def sparsity(compression: float) -> str:
    """Percent of weights removed, with the digits that tell it from 100: `99.9`."""
    digits = max(1, math.ceil(math.log10(compression)) - 1)
    text = f'{100 * (1 - 1 / compression):.{digits}f}'
    return text.rstrip('0').rstrip('.')


def percent(share: float | None, digits: int = 2) -> str:
    """A share of one in percent, without the sign; a dash where nothing was measured."""
    if share is None or not math.isfinite(share):
        return NONE
    value = round(100 * share, digits) + 0.0  # adding zero turns minus zero into zero
    return f'{value:.{digits}f}'.replace('-', '\N{MINUS SIGN}')


def interval(low: float | None, high: float | None) -> str:
    """`[97.80, 98.10]`, or nothing where there is no interval."""
    return '' if low is None or high is None else f'[{percent(low)}, {percent(high)}]'


def plural(count: int, noun: str) -> str:
    """`1 seed`, `4 seeds`."""
    return f'{count} {noun}' if count == 1 else f'{count} {noun}s'


def setting_name(setting: dict) -> str:
    """`learning rate 0.1, weight decay 0.0005`."""

    def show(value):
        return f'{value:g}' if isinstance(value, float) else str(value)

    return ', '.join(f'{k.replace("_", " ")} {show(v)}' for k, v in setting.items())


def _within(row: dict, limit: int) -> str:
    points = plural(limit, 'point')
    best = row[f'within_{limit}']
    if best is None:
        return f'at no compression tested within {points} of dense'
    missed = [times(value) for value in row[f'missed_{limit}']]
    caveat = f' (though not at {", ".join(missed)})' if missed else ''
    end = ', the largest tested' if best == row['tested'] else ''
    return f'within {points} of dense up to {times(best)}{end}{caveat}'


def breaking_sentences(points: pl.DataFrame) -> list[tuple[str, str]]:
    """What `tables.breaking_points` says, in words: `[(label, sentence), ...]`."""
    sentences = []
    for row in points.iter_rows(named=True):
        if row['compared']:
            parts = [_within(row, limit) for limit in tables.LIMITS]
        else:
            parts = ['not compared: no seed has both a dense run and a run with a finite accuracy']
        first = row['collapsed']
        parts.append(
            'no run lost a whole layer (a net can be cut in two without that)'
            if first is None
            else f'first run with an empty layer at {times(first)}'
        )
        sentences.append((row['label'], '; '.join(parts) + '.'))
    return sentences
