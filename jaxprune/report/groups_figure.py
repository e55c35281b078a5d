"""Coupled groups as a picture: layers from top to bottom, a rail for all that goes together."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from jaxprune.errors import PruneError, StoreError, quoted, shown
from jaxprune.files import write_whole
from jaxprune.report import style
from jaxprune.structure import Coupled, Family
from jaxprune.structure.group_table import shared_parents, short_reason, shortened

SUFFIXES = ('.svg', '.png')
_STAYS = '#8a8a8a'
_BOX = '#f1f1f1'
# All lengths are points.
_MARGIN, _SIZE, _SMALL = 10.0, 8.0, 7.5
_ROW, _QUIET_ROW, _PORT = 18.0, 13.0, 6.5
_PAD, _LANE, _AIR, _SWATCH = 6.0, 12.0, 18.0, 14.0
_LONGEST = 32  # characters of a name
_MOST_PIXELS = 60_000
_KINDS = {'unit': 'unit', 'head': 'head', 'head_dim': 'head dim'}
_ROLES = ('in', 'along', 'out')  # from the top of a layer to its bottom


class _Rail(NamedTuple):
    """A family of groups.

    Attributes:
      family: it.
      label: how many groups of which kind.
      colour, dash: of its lines; dashes tell rails of the same colour apart.
      ports: (layer, role) of each layer that has to do with it.
    """

    family: Family
    label: str
    colour: str
    dash: Any
    ports: list[tuple[str, str]]


class _Places(NamedTuple):
    """Where everything is, in points from the upper left corner.

    Attributes:
      rows: layer -> its top and bottom.
      ports: (layer, role, number of the rail) -> y.
      right: the right side of the layers.
      lanes: the x of each rail.
      ends: the top and the bottom of each rail.
      labels: the left side of the labels.
    """

    rows: dict[str, tuple[float, float]]
    ports: dict[tuple[str, str, int], float]
    right: float
    lanes: list[float]
    ends: list[tuple[float, float]]
    labels: float


def draw_groups(coupled: Coupled, file: str | os.PathLike | None = None) -> Figure:
    """Draws which layers' groups go together.

        jp.draw_groups(jp.groups(apply, params, x), 'groups.svg')

    Layers stand in forward order, from top to bottom. Each family of groups is a rail: a dot where
    a layer makes its units, an arrow into each layer that reads them, a ring where a norm or a bias
    follows them. What is on one rail goes together. Grey, hatched rails stay; the reason is below.

    Args:
      coupled: from `groups`.
      file: where to write it, as SVG or PNG by the suffix; written whole or not at all.

    Returns:
      The figure. It grows with the number of layers and families.

    Raises:
      PruneError: not what `groups` returns, or no group in it; a suffix other than '.svg', '.png'.
      StoreError: the file cannot be written.
    """
    if not isinstance(coupled, Coupled):
        raise PruneError(f'draw_groups takes what jp.groups returns, not {shown(coupled)}')
    if not coupled.families:
        raise PruneError('there is no group to draw: no parameter is part of a product')
    if file is not None and Path(file).suffix.lower() not in SUFFIXES:
        raise PruneError(f"{quoted(str(file))} must end in '.svg' or '.png'")
    rails, reasons = _rails(coupled)
    layers = _layers(coupled, rails)
    names, shared = _names(layers)
    notes = [f'[{i + 1}] {reason}' for i, reason in enumerate(reasons)]
    if shared:
        notes.insert(0, f"layers are below '{shortened(shared[:-1], _LONGEST)}'")
    with style.context():
        drawing = _drawn(layers, names, rails, notes)
    if file is not None:
        path = Path(file)
        content = _bytes(drawing, path.suffix.lower()[1:])
        try:
            write_whole(path, content)
        except OSError as error:
            raise StoreError(f'{path}: cannot be written ({error})') from error
    return drawing


def _bytes(drawing: Figure, kind: str) -> bytes:
    """The figure as a file; equal figures give equal bytes."""
    buffer = io.BytesIO()
    metadata = {'Date': None, 'Creator': None} if kind == 'svg' else {'Software': None}
    dpi = min(style.DPI, _MOST_PIXELS / max(drawing.get_size_inches()))
    with style.context(), matplotlib.rc_context({'svg.hashsalt': 'jaxprune'}):
        drawing.savefig(buffer, format=kind, dpi=dpi, metadata=metadata)
    return buffer.getvalue()


# --- what is drawn ------------------------------------------------------------------------------


def _layer(path: str) -> str:
    """The module of a parameter: its path without the last part."""
    parents = path.removesuffix('/value').rpartition('/')[0]
    return parents or path


def _rails(coupled: Coupled) -> tuple[list[_Rail], list[str]]:
    """A rail for each family, and the reasons why some stay."""
    free = sum(not f.reason for f in coupled.families)
    props = iter(style.lines([str(i) for i in range(free)]).values())
    rails, reasons = [], []
    for family in coupled.families:
        kind = _KINDS.get(family.kind, family.kind)
        label = f'{family.size} {kind}{"s" * (family.size != 1)}'
        colour, dash = _STAYS, '-'
        if family.reason:
            reason = short_reason(family.reason)
            reasons += [reason] * (reason not in reasons)
            label += f' stay{"s" * (family.size == 1)} [{reasons.index(reason) + 1}]'
        else:
            line = next(props)
            colour, dash = line['color'], line['linestyle']
            if not isinstance(dash, str):
                dash = (dash[0], tuple(length / 2 for length in dash[1]))  # rails are short
        ports = []
        for role in ('out', 'in', 'along'):
            for member in family.members:
                layer = _layer(member.path)
                known = any(name == layer for name, _ in ports)
                if member.role == role and (layer, role) not in ports:
                    ports += [(layer, role)] * (role != 'along' or not known)
        rails.append(_Rail(family, label, colour, dash, ports))
    return rails, reasons


def _layers(coupled: Coupled, rails: Sequence[_Rail]) -> list[str]:
    """The layers on rails, in forward order."""
    drawn = {layer for rail in rails for layer, _ in rail.ports}
    order = dict.fromkeys(_layer(path) for path, _ in coupled.coupling.roles)
    return [layer for layer in order if layer in drawn]


def _names(layers: Sequence[str]) -> tuple[dict[str, str], str]:
    """A short name of its own for each layer, and the parents that are left out."""
    shared = shared_parents(layers)
    longest = _LONGEST
    while True:
        names = {layer: shortened(layer.removeprefix(shared), longest) for layer in layers}
        if len(set(names.values())) == len(names) or longest > max(map(len, layers)):
            return names, shared
        longest += 1


# --- where it is --------------------------------------------------------------------------------


def _places(layers: Sequence[str], names: dict[str, str], rails: Sequence[_Rail]) -> _Places:
    at: dict[str, list[tuple[str, int]]] = {layer: [] for layer in layers}
    for number, rail in enumerate(rails):
        for layer, role in rail.ports:
            at[layer].append((role, number))
    rows, ports, y = {}, {}, _MARGIN
    for layer in layers:
        here = sorted(at[layer], key=lambda port: (_ROLES.index(port[0]), port[1]))
        quiet = all(role == 'along' for role, _ in here)
        height = max(_QUIET_ROW if quiet else _ROW, _PORT * len(here) + 5)
        rows[layer] = (y, y + height)
        for i, (role, number) in enumerate(here):
            ports[layer, role, number] = y + height / 2 + (i - (len(here) - 1) / 2) * _PORT
        y += height + 4
    widest = max(style.text_width(name, _SIZE) for name in names.values())
    # Letters on whole pixels may be a little wider than measured.
    right = _MARGIN + 1.06 * widest + 2 * _PAD
    ends = []
    for number, rail in enumerate(rails):
        used = [ports[layer, role, number] for layer, role in rail.ports]
        roles = {role for _, role in rail.ports}
        # What comes from outside, or goes there, has an end of its own.
        stays = bool(rail.family.reason)
        top = min(used) - _PORT * (stays and 'out' not in roles)
        bottom = max(used) + _PORT * (stays and 'in' not in roles)
        ends.append((top, bottom))
    lanes = [right + _AIR + _LANE * lane for lane in _lanes(ends)]
    return _Places(rows, ports, right, lanes, ends, max(lanes) + _AIR)


def _lanes(ends: Sequence[tuple[float, float]]) -> list[int]:
    """A lane for each rail, so that none meets another; short rails are next to the layers."""
    taken: list[list[tuple[float, float]]] = []
    lanes = [0] * len(ends)
    for i in sorted(range(len(ends)), key=lambda i: (ends[i][1] - ends[i][0], ends[i])):
        top, bottom = ends[i]
        for lane in range(len(taken) + 1):
            if lane == len(taken):
                taken.append([])
            if all(bottom + 4 < t or b + 4 < top for t, b in taken[lane]):
                taken[lane].append(ends[i])
                lanes[i] = lane
                break
    return lanes


# --- drawing ------------------------------------------------------------------------------------


def _drawn(
    layers: Sequence[str],
    names: dict[str, str],
    rails: Sequence[_Rail],
    notes: Sequence[str],
) -> Figure:
    places = _places(layers, names, rails)
    rows = _label_rows(places, rails)
    ends = [_label_width(rails, numbers) for numbers in rows.values()]
    signs = _signs(rails)
    width = max(places.labels + max(ends), _key_width(signs) + 2 * _MARGIN) + _MARGIN
    notes = [line for note in notes for line in _wrapped(note, width)]
    bottom = max(places.rows[layers[-1]][1], *(end for _, end in places.ends))
    height = bottom + 16 + 14 + 11 * len(notes) + _MARGIN
    drawing = Figure(figsize=(width / 72, height / 72))
    FigureCanvasAgg(drawing)
    axes = drawing.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    for layer in layers:
        _draw_layer(axes, places, layer, names[layer], rails)
    for number, rail in enumerate(rails):
        _draw_rail(axes, places, number, rail)
    for layer, numbers in rows.items():
        _draw_labels(axes, places, layer, numbers, rails)
    _draw_key(axes, bottom + 20, signs)
    for i, line in enumerate(notes):
        axes.text(
            _MARGIN, bottom + 34 + 11 * i, line, fontsize=_SMALL, va='center', color=style.QUIET
        )
    return drawing


def _draw_layer(axes: Axes, places: _Places, layer: str, name: str, rails: Sequence[_Rail]) -> None:
    top, bottom = places.rows[layer]
    follows = all(role == 'along' for rail in rails for other, role in rail.ports if other == layer)
    if not follows:
        size = (places.right - _MARGIN, bottom - top)
        box = FancyBboxPatch(
            (_MARGIN, top),
            *size,
            boxstyle='round,pad=0,rounding_size=3',
            facecolor=_BOX,
            edgecolor='#b5b5b5',
            linewidth=0.7,
            mutation_aspect=1,
        )
        axes.add_patch(box)
    axes.text(
        _MARGIN + _PAD,
        (top + bottom) / 2,
        name,
        fontsize=_SMALL if follows else _SIZE,
        color=style.QUIET if follows else style.INK,
        va='center_baseline',
    )


def _draw_rail(axes: Axes, places: _Places, number: int, rail: _Rail) -> None:
    x, (top, bottom), colour = places.lanes[number], places.ends[number], rail.colour
    if rail.family.reason:
        _draw_bar(axes, (x - 2.5, top), (5, bottom - top))
    else:
        axes.plot([x, x], [top, bottom], color='white', linewidth=4.6, zorder=2.5)
        axes.plot([x, x], [top, bottom], color=colour, linewidth=0.8, zorder=3)
        line = {'linestyle': rail.dash, 'solid_capstyle': 'round', 'dash_capstyle': 'butt'}
        axes.plot([x, x], [top, bottom], color=colour, linewidth=2.4, zorder=3, **line)
    for layer, role in rail.ports:
        y = places.ports[layer, role, number]
        thin = role == 'along'
        left = places.right + (4.5 if role == 'in' else 0)
        line = {'color': colour, 'linewidth': 0.6 if thin else 1.1, 'solid_capstyle': 'butt'}
        axes.plot([left, x], [y, y], zorder=2, **line)
        axes.plot([x - 4, x], [y, y], zorder=2.8, **line)  # over the rail's own white border
        marker = {'color': colour, 'zorder': 4, 'linestyle': 'none'}
        if role == 'in':
            axes.plot(places.right + 3, y, marker='<', markersize=5, **marker)
        elif role == 'out':
            axes.plot(x, y, marker='o', markersize=5.5, **marker)
        else:
            axes.plot(x, y, marker='o', markersize=3.6, markerfacecolor='white', **marker)


def _draw_bar(axes: Axes, corner: tuple[float, float], size: tuple[float, float]) -> None:
    """The hatched sign of groups that stay."""
    bar = Rectangle(corner, *size, facecolor='white', edgecolor=_STAYS)
    bar.set(hatch='//////', linewidth=0.6, zorder=3)
    axes.add_patch(bar)


def _label_rows(places: _Places, rails: Sequence[_Rail]) -> dict[str, list[int]]:
    """Layer -> the rails that begin there, and have their labels beside it."""
    rows: dict[str, list[tuple[float, int]]] = {}
    for number, rail in enumerate(rails):
        makers = [port for port in rail.ports if port[1] == 'out'] or rail.ports
        first = min(makers, key=lambda port: places.ports[*port, number])
        rows.setdefault(first[0], []).append((places.ports[*first, number], number))
    return {layer: [number for _, number in sorted(there)] for layer, there in rows.items()}


def _label_width(rails: Sequence[_Rail], numbers: Sequence[int]) -> float:
    return sum(_SWATCH + 4 + style.text_width(rails[n].label, _SIZE) + 12 for n in numbers)


def _draw_labels(
    axes: Axes, places: _Places, layer: str, numbers: Sequence[int], rails: Sequence[_Rail]
) -> None:
    x, (top, bottom) = places.labels, places.rows[layer]
    for number in numbers:
        rail = rails[number]
        y = (top + bottom) / 2
        if rail.family.reason:
            _draw_bar(axes, (x, y - 2.5), (_SWATCH, 5))
        else:
            line = {'color': rail.colour, 'linestyle': rail.dash, 'linewidth': 2.4}
            axes.plot([x, x + _SWATCH], [y, y], solid_capstyle='butt', **line)
        start = x + _SWATCH + 4
        axes.text(start, y, rail.label, fontsize=_SIZE, va='center_baseline', color=style.INK)
        x += _label_width(rails, [number])


_KEY = {'out': 'makes', 'in': 'reads', 'along': 'follows', 'stays': 'stays, see below'}


def _signs(rails: Sequence[_Rail]) -> list[str]:
    """The signs that are drawn."""
    used = {role for rail in rails for _, role in rail.ports}
    used |= {'stays' for rail in rails if rail.family.reason}
    return [sign for sign in _KEY if sign in used]


def _key_width(signs: Sequence[str]) -> float:
    return sum(style.text_width(_KEY[sign], _SMALL) + 30 for sign in signs)


def _draw_key(axes: Axes, y: float, signs: Sequence[str]) -> None:
    """What the signs mean, in one line."""
    x = _MARGIN
    for role in signs:
        words = _KEY[role]
        sign = {'color': style.QUIET, 'linestyle': 'none'}
        if role == 'stays':
            _draw_bar(axes, (x, y - 2.5), (12, 5))
        elif role == 'in':
            axes.plot(x + 6, y, marker='<', markersize=5, **sign)
        else:
            size, face = (5.5, style.QUIET) if role == 'out' else (3.6, 'white')
            axes.plot(x + 6, y, marker='o', markersize=size, markerfacecolor=face, **sign)
        axes.text(x + 16, y, words, fontsize=_SMALL, va='center_baseline', color=style.QUIET)
        x += style.text_width(words, _SMALL) + 30


def _wrapped(note: str, width: float) -> list[str]:
    """A note on lines that fit the figure."""
    first, *words = note.split()
    lines = [first]
    for word in words:
        longer = f'{lines[-1]} {word}'
        if style.text_width(longer, _SMALL) > width - 2 * _MARGIN:
            lines.append(f'      {word}')
        else:
            lines[-1] = longer
    return lines
