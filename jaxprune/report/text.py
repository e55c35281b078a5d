"""Numbers and sentences for readers."""

import math

import polars as pl

from jaxprune.report import tables

NONE = '\N{EN DASH}'
"""Where nothing was measured."""

INFINITE = '\N{INFINITY}'
"""The effective compression of a network that is cut in two."""

CLOSE = 0.05
"""The relative excess of effective over direct compression below which they count as equal."""


def number(value: float) -> str:
    """A compression in plain digits: `1000`, `2.5`, `3.33`, `∞`; never an exponent."""
    if math.isinf(value):
        return INFINITE
    if math.isclose(value, round(value), rel_tol=1e-6):
        return str(round(value))
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f'{value:.{digits}f}'
    return text.rstrip('0').rstrip('.') if '.' in text else text


def times(value: float) -> str:
    """A compression with its sign: `20×`."""
    return f'{number(value)}\N{MULTIPLICATION SIGN}'


def about(value: float) -> str:
    """A measured compression with its sign, in three digits: `17200×`."""
    return times(float(f'{value:.3g}'))


def sparsity(compression: float) -> str:
    """Percent of weights removed, with enough digits to differ from 100: `99.9`."""
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


def effective(row: dict) -> str:
    """Effective compression in a row of `tables.summary`: `436`, `5300, ∞ in 2` or `∞`."""
    value, disconnected = row['effective_compression'], row['disconnected']
    if value is None:
        return INFINITE if disconnected else NONE
    return number(value) + (f', {INFINITE} in {disconnected}' if disconnected else '')


def setting_name(setting: dict) -> str:
    """`learning rate 0.1, weight decay 0.0005`."""

    def show(value):
        return f'{value:g}' if isinstance(value, float) else str(value)

    return ', '.join(f'{k.replace("_", " ")} {show(v)}' for k, v in setting.items())


def _within(row: dict, limit: int) -> str:
    points = plural(limit, 'point')
    best = row[f'within_{limit}']
    if best is None:
        return f'within {points} of dense at no compression tested'
    missed = [times(value) for value in row[f'missed_{limit}']]
    caveat = f' (though not at {", ".join(missed)})' if missed else ''
    end = ', the largest tested' if best == row['tested'] else ''
    return f'within {points} of dense up to {times(best)}{end}{caveat}'


def _losses(row: dict) -> str:
    """Where a run first lost a layer, or every path from input to output."""
    empty, cut = row['collapsed'], row['disconnected']
    if empty is None and cut is None:
        if row['traced']:
            return 'no run lost a whole layer or was disconnected'
        return 'no run lost a whole layer (a net can be cut in two without that)'
    if cut is None:
        connected = ', but no run was disconnected' if row['traced'] else ''
        return f'first run with an empty layer at {times(empty)}{connected}'
    if empty is None:
        return f'first disconnected run at {times(cut)}, though none lost a whole layer'
    if empty == cut:
        return f'first run with an empty layer, and first disconnected one, at {times(cut)}'
    # In order of appearance: a network with skip connections survives the loss of a layer.
    both = sorted([(empty, 'first run with an empty layer'), (cut, 'first disconnected run')])
    return ', '.join(f'{name} at {times(value)}' for value, name in both)


def breaking_sentences(points: pl.DataFrame) -> list[tuple[str, str]]:
    """The rows of `tables.breaking_points` in words: `[(label, sentence), ...]`."""
    sentences = []
    for row in points.iter_rows(named=True):
        if row['compared']:
            parts = [_within(row, limit) for limit in tables.LIMITS]
        else:
            parts = ['not compared: no seed has both a dense run and a run with a finite accuracy']
        parts.append(_losses(row))
        sentences.append((row['label'], '; '.join(parts) + '.'))
    return sentences


def effective_sentences(summary: pl.DataFrame) -> list[tuple[str, str]]:
    """How effective and direct compression differ, in words: `[(label, sentence), ...]`.

    Args:
      summary: rows of `tables.summary` for one setting.
    """
    rows = summary.filter(pl.col('method') != tables.DENSE, pl.col('disconnected').is_not_null())
    return [
        (part['label'][0], '; '.join(_difference(part.to_dicts())) + '.')
        for part in rows.partition_by('label', maintain_order=True)
    ]


def _difference(rows: list[dict]) -> list[str]:
    """The parts of the sentence about one label; rows with rising target compression."""
    aimed = rows[0]['target'] == 'effective'

    def apart(row):
        effective = row['effective_compression']
        return effective is not None and effective > (1 + CLOSE) * row['compression']

    differs = [row['disconnected'] > 0 or apart(row) for row in rows]
    same = differs.index(True) if True in differs else len(rows)
    parts = ['pruned to a given effective compression'] if aimed else []
    if same == 0 and apart(rows[0]):
        start = f'effective exceeds direct by more than {percent(CLOSE, 0)} % already at'
        parts.append(f'{start} {times(rows[0]["target_compression"])}')
    if same > 0:
        end = ', the largest tested' if same == len(rows) else ''
        upto = times(rows[same - 1]['target_compression'])
        equal = f'effective equals direct within {percent(CLOSE, 0)} %'
        parts.append(f'{equal} up to {upto}{end}')
    beyond = [row for row in rows[same:] if apart(row)]
    for row in beyond[:1] + beyond[1:][-1:]:
        some = ' where connected' if row['disconnected'] else ''
        effective = about(row['effective_compression'])
        if aimed:
            parts.append(f'{effective} effective at {about(row["compression"])} direct{some}')
        else:
            parts.append(f'{effective} at {times(row["target_compression"])}{some}')
    cut = next((row for row in rows if row['disconnected']), None)
    if cut:
        count = f'{cut["disconnected"]} of {cut["seeds"]}'
        parts.append(f'first disconnected run at {times(cut["target_compression"])} ({count})')
    return parts


def disconnected_sentences(summary: pl.DataFrame) -> list[tuple[str, str]]:
    """How many runs of which label are disconnected: `[(label, '300× (1 of 3), ...'), ...]`.

    Args:
      summary: rows of `tables.summary` for one setting.
    """
    rows = summary.filter(pl.col('disconnected') > 0)
    return [
        (
            part['label'][0],
            ', '.join(
                f'{times(row["target_compression"])} ({row["disconnected"]} of {row["seeds"]})'
                for row in part.iter_rows(named=True)
            ),
        )
        for part in rows.partition_by('label', maintain_order=True)
    ]
