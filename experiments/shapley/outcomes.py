"""Tables, verdicts and figures of the study, from its measurements."""

from collections.abc import Sequence

import numpy as np
import polars as pl
from curves import WHOLE
from matplotlib.axes import Axes
from scores import METHODS, WITHOUT_DATA
from trained import TITLES, Settings

from jaxprune.report import markdown, style
from jaxprune.stats import student_interval

HEAD = """\
# Outcomes of the study of Shapley values

Intervals: Student's, of 95 %, for the mean over seeds; differences are paired by seed. A seed
is a network: all of them are scored on the same examples. The networks, and what all this says:
[README](README.md)."""
SHAPLEY, SPARED, RANDOM = 'Shapley', 'Shapley, mean + 2 std', 'random'
#: Methods whose intervals are drawn: nine of them would hide each other.
BANDS = (SPARED, RANDOM)
#: Shares at which curves of layers of different sizes are averaged.
GRID = np.linspace(0, 1, 41)


def written(tables: dict[str, pl.DataFrame], settings: Settings) -> str:
    """Everything as markdown."""
    nets = [net for net in TITLES if net in set(tables['curves']['net'])]
    parts = [
        HEAD,
        areas_text(tables['curves'], nets, settings),
        claims_text(tables['curves'], nets, settings),
        global_text(tables['finetuned'], nets, settings),
        left_text(tables['left'], nets, settings),
        random_text(tables['finetuned'], nets, settings),
        untrained_text(tables['untrained'], settings),
    ]
    return '\n\n'.join(parts) + '\n'


# --- areas --------------------------------------------------------------------------------------


def areas(curves: pl.DataFrame, net: str, method: str, examples: int) -> np.ndarray:
    """`Σ (loss_k - loss_0)` over the removals of each layer, over the number of units; by seed.

    Random rankings are averaged over their draws.
    """
    own = curves.filter(
        (pl.col('net') == net)
        & (pl.col('method') == method)
        & (pl.col('examples') == (0 if method in WITHOUT_DATA else examples))
        & (pl.col('layer') != WHOLE)
    )
    layers = own.group_by('seed', 'draw', 'layer').agg(
        area=(pl.col('loss') - pl.col('loss').get(pl.col('removed').arg_min())).sum(),
        units=pl.col('units').first(),
    )
    draws = layers.group_by('seed', 'draw').agg(area=pl.col('area').sum() / pl.col('units').sum())
    return draws.group_by('seed').agg(pl.col('area').mean()).sort('seed')['area'].to_numpy()


def areas_text(curves: pl.DataFrame, nets: Sequence[str], settings: Settings) -> str:
    rows = []
    for net in nets:
        for method in METHODS:
            counts = [0] if method in WITHOUT_DATA else settings.examples
            cells = [markdown.interval(areas(curves, net, method, count), 3) for count in counts]
            rows.append(
                [TITLES[net], method, *(cells * len(settings.examples))[: len(settings.examples)]]
            )
    head = ['net', 'ranked by', *(f'{count} examples' for count in settings.examples)]
    return '\n'.join(
        [
            '## Layer by layer, without fine-tuning: the area under the curve',
            '',
            'The mean increase of the test loss over all removals, lower is better.',
            '',
            markdown.table(head, rows),
        ]
    )


def claims_text(curves: pl.DataFrame, nets: Sequence[str], settings: Settings) -> str:
    """The paper's order of areas, one difference after another."""
    pairs = [(SHAPLEY, other) for other in METHODS if other not in (SHAPLEY, SPARED)]
    pairs += [
        (SPARED, SHAPLEY),
        (SPARED, RANDOM),
        ('Taylor, absolute', 'Taylor, signed'),
        (RANDOM, 'APoZ'),
        (RANDOM, 'Taylor, signed'),
        ('weight norm', RANDOM),
        ('sensitivity', RANDOM),
        ('Taylor, absolute', RANDOM),
        ('leave one out', RANDOM),
    ]
    rows = []
    for better, worse in pairs:
        for net in nets:
            cells = [
                markdown.verdict(
                    areas(curves, net, worse, count) - areas(curves, net, better, count), 3
                )
                for count in settings.examples
            ]
            rows.append([f'{better} below {worse}', TITLES[net], *cells])
    fewest, most = min(settings.examples), max(settings.examples)
    gains = [
        [
            f'{method}: {most} below {fewest} examples',
            TITLES[net],
            markdown.verdict(
                areas(curves, net, method, fewest) - areas(curves, net, method, most), 3
            ),
            *[''] * (len(settings.examples) - 1),
        ]
        for method in METHODS
        if method not in WITHOUT_DATA
        for net in nets
    ]
    head = ['area', 'net', *(f'{count} examples' for count in settings.examples)]
    return '\n'.join(
        [
            '## Which area is smaller',
            '',
            'The second minus the first: "holds" if the interval lies above zero, "reversed" if '
            'below, "open" if neither.',
            '',
            markdown.table(head, rows + gains),
        ]
    )


# --- the whole network --------------------------------------------------------------------------


def tuned(frame: pl.DataFrame, net: str, method: str, share: float, column: str) -> np.ndarray:
    """By seed."""
    own = frame.filter(
        (pl.col('net') == net)
        & (pl.col('method') == method)
        & ((pl.col('share') - share).abs() < 1e-6)
    )
    return own.sort('seed')[column].to_numpy()


def global_text(frame: pl.DataFrame, nets: Sequence[str], settings: Settings) -> str:
    rows = []
    for net in nets:
        dense = [
            markdown.interval(tuned(frame, net, 'dense', 0, column), 1)
            for column in ('accuracy', 'tuned_accuracy')
        ]
        rows.append([TITLES[net], 'nothing removed', *(dense * len(settings.shares))])
        for method in METHODS:
            cells = [
                markdown.interval(tuned(frame, net, method, share, column), 1)
                for share in settings.shares
                for column in ('accuracy', 'tuned_accuracy')
            ]
            rows.append([TITLES[net], method, *cells])
    return '\n'.join(
        [
            '## All layers in one ranking: test accuracy (%) before and after fine-tuning',
            '',
            f'Scores of {max(settings.examples)} examples, one random ranking. Weight norms are '
            'divided by the mean of their layer, other scores are compared as is. Every layer '
            'keeps its best unit.',
            '',
            markdown.table(_share_head(settings), rows),
        ]
    )


def left_text(frame: pl.DataFrame, nets: Sequence[str], settings: Settings) -> str:
    """Units of each layer that a ranking of all layers leaves."""
    share = settings.shares[len(settings.shares) // 2]
    rows = []
    for net in nets:
        own = frame.filter((pl.col('net') == net) & ((pl.col('share') - share).abs() < 1e-6))
        for method in METHODS:
            of = own.filter(pl.col('method') == method)
            layers = of.group_by('layer', maintain_order=True).agg(pl.col('units').mean())
            rows.append([TITLES[net], method, ', '.join(f'{n:.1f}' for n in layers['units'])])
    return '\n'.join(
        [
            f'## Units left in each layer at {100 * share:g} %',
            '',
            'From the input to the output, means over seeds.',
            '',
            markdown.table(['net', 'ranked by', 'units'], rows),
        ]
    )


def random_text(frame: pl.DataFrame, nets: Sequence[str], settings: Settings) -> str:
    """Is a ranking better than a random one, before and after fine-tuning?"""
    rows = []
    for net in nets:
        for method in METHODS:
            if method == RANDOM:
                continue
            cells = [
                markdown.verdict(
                    tuned(frame, net, method, share, column)
                    - tuned(frame, net, RANDOM, share, column),
                    1,
                )
                for share in settings.shares
                for column in ('accuracy', 'tuned_accuracy')
            ]
            rows.append([TITLES[net], method, *cells])
    return '\n'.join(
        [
            '## More accurate than random?',
            '',
            'Points of test accuracy above the network pruned at random.',
            '',
            markdown.table(_share_head(settings), rows),
        ]
    )


def _share_head(settings: Settings) -> list[str]:
    """Of a table with a column before and after fine-tuning for each share."""
    head = ['net', 'ranked by']
    for share in settings.shares:
        head += [f'{100 * share:g} % removed', f'{100 * share:g} %, fine-tuned']
    return head


# --- the untrained network ----------------------------------------------------------------------


def untrained_text(frame: pl.DataFrame, settings: Settings) -> str:
    rows = []
    for (stage,), own in frame.group_by('stage', maintain_order=True):
        values = [own.sort('seed')[c].to_numpy() for c in ('accuracy', 'left', 'first', 'last')]
        rows.append([stage, *(markdown.interval(v, 1) for v in values)])
    head = ['', 'test accuracy (%)', 'parameters left (%)', 'units of layer 1', 'units of layer 2']
    width = settings.untrained_width
    return '\n'.join(
        [
            '## An untrained network without its units of negative Shapley value',
            '',
            f'784-{width}-{width}-10, leaky ReLUs, random weights.',
            '',
            markdown.table(head, rows),
        ]
    )


# --- figures ------------------------------------------------------------------------------------


def figures(tables: dict[str, pl.DataFrame], settings: Settings) -> dict[str, bytes]:
    """Name -> PNG."""
    nets = [net for net in TITLES if net in set(tables['curves']['net'])]
    return {
        'curves': draw_curves(tables['curves'], nets, settings),
        'areas': draw_areas(tables['curves'], nets, settings),
        'finetuning': draw_finetuning(tables['finetuned'], nets, settings),
    }


def draw_curves(curves: pl.DataFrame, nets: Sequence[str], settings: Settings) -> bytes:
    """Loss against the share of units removed, layer by layer and in the whole network."""
    styles = style.lines(METHODS)
    with style.context():
        drawing = style.figure(style.WIDTH, 0.7 + 3.4 * len(nets))
        grid = drawing.add_gridspec(len(nets), 2)
        for row, net in enumerate(nets):
            for column, (of, title) in enumerate(
                ((layer_curve, 'one layer at a time'), (whole_curve, 'all layers in one ranking'))
            ):
                axes = drawing.add_subplot(grid[row, column])
                means = []
                for method in METHODS:
                    count = 0 if method in WITHOUT_DATA else max(settings.examples)
                    share, losses = of(curves, net, method, count)
                    _band(axes, share, losses, styles[method], method, method in BANDS)
                    means.append(losses.mean(0))
                _loss_axis(axes, np.stack(means))
                axes.set_title(f'{TITLES[net]}: {title}')
                axes.set_xlabel('units removed (%)')
                axes.set_ylabel('increase of the loss (log above 0.1)')
        handles, labels = axes.get_legend_handles_labels()
        drawing.legend(handles, labels, loc='outside upper center', ncols=5)
        return style.png(drawing)


def layer_curve(
    curves: pl.DataFrame, net: str, method: str, examples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Shares in %, and increases `(seeds, shares)`: means over layers, weighted by their units."""
    own = _of(curves, net, method, examples).filter(pl.col('layer') != WHOLE)
    seeds = []
    for _, of_seed in own.group_by('seed', maintain_order=True):
        total, units = np.zeros(len(GRID)), 0
        for _, curve in of_seed.group_by('draw', 'layer', maintain_order=True):
            curve = curve.sort('removed')
            loss, size = curve['loss'].to_numpy(), curve['units'][0]
            total += size * np.interp(GRID, curve['removed'] / size, loss - loss[0])
            units += size
        seeds.append(total / units)
    return 100 * GRID, np.stack(seeds)


def whole_curve(
    curves: pl.DataFrame, net: str, method: str, examples: int
) -> tuple[np.ndarray, np.ndarray]:
    """The same of all layers together."""
    own = _of(curves, net, method, examples).filter(pl.col('layer') == WHOLE)
    share = 100 * np.sort(own['removed'].unique().to_numpy()) / own['units'][0]
    seeds = []
    for _, of_seed in own.group_by('seed', maintain_order=True):
        loss = of_seed.group_by('removed').agg(pl.col('loss').mean()).sort('removed')['loss']
        seeds.append(loss.to_numpy() - loss[0])
    return share, np.stack(seeds)


def _of(curves: pl.DataFrame, net: str, method: str, examples: int) -> pl.DataFrame:
    return curves.filter(
        (pl.col('net') == net) & (pl.col('method') == method) & (pl.col('examples') == examples)
    )


def _band(
    axes: Axes, x: np.ndarray, values: np.ndarray, props: dict, label: str, filled: bool
) -> None:
    """The mean over seeds, with its interval if asked."""
    low, high = student_interval(values.T)
    every = max(len(x) // 8, 1)
    axes.plot(x, values.mean(0), **props, markersize=4, markevery=every, label=label)
    if filled:
        axes.fill_between(x, low, high, color=props['color'], alpha=0.13, linewidth=0)


def _loss_axis(axes: Axes, means: np.ndarray) -> None:
    """Logarithmic above 0.1, linear below; made for the means, as intervals may be much wider."""
    low, high = 1.5 * min(means.min(), -0.02), 1.5 * max(means.max(), 0.1)
    axes.set_yscale('symlog', linthresh=0.1)
    axes.set_ylim(low, high)
    decades = [sign * 10.0**power for sign in (1, -1) for power in range(-1, 6)]
    ticks = [value for value in (0, *decades) if low <= value <= high]
    axes.set_yticks(ticks, [f'{value:g}' for value in ticks])
    axes.set_yticks([], minor=True)


def draw_areas(curves: pl.DataFrame, nets: Sequence[str], settings: Settings) -> bytes:
    """The areas of all methods with their intervals, by the number of examples."""
    sizes = settings.examples
    shades = [str(0.72 - 0.72 * i / max(len(sizes) - 1, 1)) for i in range(len(sizes))]
    with style.context():
        drawing = style.figure(style.WIDTH, 4.2)
        grid = drawing.add_gridspec(1, len(nets))
        for column, net in enumerate(nets):
            axes = drawing.add_subplot(grid[0, column])
            for place, method in enumerate(METHODS):
                alone = method in WITHOUT_DATA
                for i, count in enumerate(sizes[-1:] if alone else sizes):
                    values = areas(curves, net, method, count)
                    shift = 0 if alone else 0.24 * (i - (len(sizes) - 1) / 2)
                    shade = '#0072B2' if alone else shades[i]
                    label = None if place else f'{count} examples'
                    _dot(axes, place + shift, values, shade, True, label)
            axes.plot([], [], 'o', color='#0072B2', label='without data')
            axes.set_yticks(range(len(METHODS)), METHODS)
            axes.invert_yaxis()
            axes.set_xlim(left=0)
            axes.set_title(TITLES[net])
            axes.set_xlabel('mean increase of the test loss over all removals')
        handles, labels = axes.get_legend_handles_labels()
        drawing.legend(handles, labels, loc='outside upper center', ncols=len(labels))
        return style.png(drawing)


def _dot(
    axes: Axes, place: float, values: np.ndarray, color: str, filled: bool, label: str | None
) -> None:
    low, high = student_interval(values)
    axes.plot([low, high], [place, place], color=color, linewidth=1.2)
    face = color if filled else 'white'
    axes.plot(
        values.mean(), place, 'o', color=color, markerfacecolor=face, markersize=5, label=label
    )


def draw_finetuning(frame: pl.DataFrame, nets: Sequence[str], settings: Settings) -> bytes:
    """Accuracy of every method before and after fine-tuning."""
    styles = style.lines(METHODS)
    with style.context():
        drawing = style.figure(style.WIDTH, 0.6 + 2.7 * len(nets))
        grid = drawing.add_gridspec(len(nets), len(settings.shares))
        for row, net in enumerate(nets):
            for column, share in enumerate(settings.shares):
                axes = drawing.add_subplot(grid[row, column])
                dense = tuned(frame, net, 'dense', 0, 'tuned_accuracy').mean()
                axes.axvline(dense, color=style.INK, linewidth=0.8)
                for place, method in enumerate(METHODS):
                    for name, shift in (('accuracy', -0.15), ('tuned_accuracy', 0.15)):
                        values = tuned(frame, net, method, share, name)
                        color = styles[method]['color']
                        _dot(axes, place + shift, values, color, name != 'accuracy', None)
                axes.set_yticks(
                    range(len(METHODS)), METHODS if column == 0 else [''] * len(METHODS)
                )
                axes.invert_yaxis()
                axes.set_xlim(0, 102)
                axes.set_title(f'{TITLES[net]}: {100 * share:g} % removed')
                axes.set_xlabel('test accuracy (%)')
        axes.plot([], [], 'o', color=style.INK, markerfacecolor='white', label='pruned')
        axes.plot([], [], 'o', color=style.INK, label='fine-tuned')
        axes.plot([], [], '-', color=style.INK, linewidth=0.8, label='dense, fine-tuned')
        handles, labels = axes.get_legend_handles_labels()
        drawing.legend(handles, labels, loc='outside upper center', ncols=3)
        return style.png(drawing)
