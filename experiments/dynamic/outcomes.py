"""Tables, verdicts and figures of the study, from the results of its sweeps."""

from collections.abc import Mapping

import polars as pl
from by_density import by_seed, densities, last_rows
from matplotlib.figure import Figure

from jaxprune.report import markdown, style

HEAD = """\
# Outcomes of the dynamic study

Intervals: Student's, of 95 %, for the mean over seeds; differences are paired by seed. "Holds" and
"reversed": the interval lies above or below zero; else "open". Nothing is corrected for how many
intervals there are. Networks, methods and their recipe: [README](README.md)."""

NAMES = {
    'lenet300100_fashion': 'LeNet-300-100, Fashion-MNIST',
    'lenet300100_mnist': 'LeNet-300-100, MNIST',
    'lenet5': 'LeNet-5, Fashion-MNIST',
    'lenet5_mnist': 'LeNet-5, MNIST',
    'resnet20': 'ResNet-20 at a quarter of its width, CIFAR-10',
}
STATIC, TICKET = 'random, static', 'lottery ticket'
BEFORE = (STATIC, 'magnitude at init', 'SNIP at init', 'SynFlow at init')
AFTER = ('prune, then fine-tune', TICKET)
MOVING = ('GMP', 'DPF', 'straight-through', 'AC/DC', 'SET', 'RigL', 'Top-KAST', 'movement')
PULLING = ('soft movement', 'STR', 'GReg-1', 'GReg-2', 'SPP', 'IncReg', 'ADMM')
GROUPS = {
    'masks move': MOVING,
    'weights are pulled': PULLING,
    'before and after training': (*BEFORE, *AFTER),
}
EVERY = (*BEFORE, *AFTER, *MOVING, *PULLING)
#: How many points below dense still count as near it.
NEAR = 1.0
#: The density of the figure of masks.
SHOWN = 0.05


def written(sweeps: Mapping[str, pl.DataFrame]) -> str:
    """All tables and verdicts as markdown."""
    parts = [HEAD]
    for name, results in sweeps.items():
        rows, title = last_rows(results), NAMES[name]
        parts += [f'## {title}', accuracy_table(rows)]
        parts += ['### While training against before it', against_before(rows)]
        parts += ['### Expectations', expectations(rows)]
    return '\n\n'.join(parts) + '\n'


def present(rows: pl.DataFrame, labels=EVERY) -> list[str]:
    return [label for label in labels if label in set(rows['label'])]


def accuracy_table(rows: pl.DataFrame) -> str:
    """Accuracy by density; steps; what masks and predictions have done at the lowest density."""
    every = densities(rows)
    smallest = every[-1]
    head = ['method', *(f'{p:g} %' for p in every), 'steps', 'weights used', 'churn']
    table = []
    for label in present(rows):
        own = rows.filter(pl.col('label') == label, pl.col('percent') == smallest)
        used, churn = own['weights_used'].mean(), own['churn'].mean()
        table.append([
            label,
            *(markdown.interval(by_seed(rows, label, p), 1) for p in every),
            own['step'].max(),
            '' if used is None else f'{100 * used:.0f} %',
            '' if churn is None else f'{100 * churn:.0f} %',
        ])  # fmt: skip
    dense = markdown.interval(by_seed(rows, 'dense'), 1)
    said = (
        f'Test accuracy in % by density; dense: {dense}. Weights used since the first round, and '
        f'test images labelled otherwise than by the dense twin, at {smallest:g} %.'
    )
    return f'{said}\n\n{markdown.table(head, table)}'


def best_before(rows: pl.DataFrame, percent: float) -> str:
    """The method before training with the best mean."""
    return max(present(rows, BEFORE), key=lambda label: by_seed(rows, label, percent).mean())


def against_before(rows: pl.DataFrame) -> str:
    """Each method that acts during training minus the best one before it, at equal density."""
    every = densities(rows)
    rivals = {p: best_before(rows, p) for p in every}
    table = [
        [
            label,
            *(
                markdown.verdict(by_seed(rows, label, p) - by_seed(rows, rivals[p], p), 1)
                for p in every
            ),
        ]
        for label in present(rows, (*MOVING, *PULLING))
    ]
    said = 'Points of accuracy above the best method before training: ' + ', '.join(
        f'{rival} at {p:g} %' for p, rival in rivals.items()
    )
    return f'{said}.\n\n{markdown.table(["method", *(f"{p:g} %" for p in every)], table)}'


def expectations(rows: pl.DataFrame) -> str:
    """What the papers let one expect, as a list of verdicts."""
    dense, lines = by_seed(rows, 'dense'), []
    for label in present(rows, ('DPF', 'GMP')):
        gap = by_seed(rows, label, 10.0) - dense
        lines.append(
            f'- {label} at 10 % is at most {NEAR:g} point below dense: '
            f'{markdown.verdict(gap + NEAR, 1).split(",")[0]}, {markdown.difference(gap, 1)}'
        )
    for p in densities(rows):
        others = [label for label in present(rows) if label != STATIC]
        low = min(others, key=lambda label, p=p: by_seed(rows, label, p).mean())
        margin = by_seed(rows, low, p) - by_seed(rows, STATIC, p)
        lines.append(
            f'- {STATIC} is the worst at {p:g} %, next to {low}: {markdown.verdict(margin, 1)}'
        )
    if TICKET in set(rows['label']):
        longer = rows.filter(label=TICKET)['step'].max() / rows.filter(label='GMP')['step'].max()
        for p in densities(rows):
            more = by_seed(rows, TICKET, p) - by_seed(rows, 'GMP', p)
            lines.append(
                f'- {TICKET}, {longer:.1f} times the steps, above GMP at {p:g} %: '
                f'{markdown.verdict(more, 1)}'
            )
    return '\n'.join(lines)


# --- figures ------------------------------------------------------------------------------------


def figures(sweeps: Mapping[str, pl.DataFrame]) -> dict[str, bytes]:
    rows = {name: last_rows(results) for name, results in sweeps.items()}
    return {
        'accuracy': style.png(accuracy_figure(rows)),
        'masks': style.png(masks_figure(rows['lenet300100_fashion'])),
    }


def accuracy_figure(sweeps: Mapping[str, pl.DataFrame]) -> Figure:
    """Accuracy against density: a row for each network, a column for each group of methods."""
    drawn = [name for name in NAMES if name in sweeps and len(densities(sweeps[name])) > 1]
    with style.context():
        drawing = style.figure(style.WIDTH, 2.7 * len(drawn) + 1.6)
        grid = drawing.subplots(len(drawn), len(GROUPS), sharey='row', squeeze=False)
        for column, (title, labels) in enumerate(GROUPS.items()):
            styles, shown = style.lines(labels), {}
            for line, name in enumerate(drawn):
                axes, rows = grid[line, column], sweeps[name]
                dense = by_seed(rows, 'dense').mean()
                axes.axhline(dense, color='0.5', linewidth=0.8)
                axes.annotate('dense', (1, dense), (-2, 2), xycoords=('axes fraction', 'data'),
                              textcoords='offset points', ha='right', color='0.5',
                              fontsize='small')  # fmt: skip
                for label in present(rows, labels):
                    every = densities(rows)
                    means = [by_seed(rows, label, p).mean() for p in every]
                    shown[label] = axes.plot(every, means, **styles[label])[0]
                axes.set_xscale('log')
                axes.invert_xaxis()
                axes.set_xticks(every, labels=[f'{p:g}' for p in every])
                axes.set_xticks([], minor=True)
                if not column:
                    axes.set_ylabel(f'{NAMES[name]}\ntest accuracy (%)')
            grid[0, column].set_title(title)
            grid[-1, column].set_xlabel('density (%)')
            grid[-1, column].legend(
                shown.values(), shown, loc='upper center', bbox_to_anchor=(0.5, -0.28),
                ncols=2, frameon=False, fontsize='small',
            )  # fmt: skip
        for line, name in enumerate(drawn):
            rows = sweeps[name]
            every = [
                by_seed(rows, label, p).mean() for label in present(rows) for p in densities(rows)
            ]
            top = by_seed(rows, 'dense').mean()
            # Methods that fail would flatten all others. Above the dense line is room for its name.
            grid[line, 0].set_ylim(max(min(every), top - 22) - 1, top + 2)
        return drawing


def masks_figure(rows: pl.DataFrame) -> Figure:
    """Accuracy, churn and weights used at one density: a line of dots for each method."""
    near = min(densities(rows), key=lambda p: abs(p - 100 * SHOWN))
    own = rows.filter(pl.col('percent') == near)
    titles = {
        'test_accuracy': f'test accuracy (%), density {near:g} %',
        'churn': 'churn against the dense twin (%)',
        'weights_used': 'weights ever used (%)',
    }
    order = sorted(present(own), key=lambda label: by_seed(own, label, near).mean())
    with style.context():
        drawing = style.figure(style.WIDTH, 0.2 * len(order) + 1.2)
        panels = drawing.subplots(1, len(titles), sharey=True)
        for axes, (column, title) in zip(panels, titles.items(), strict=True):
            for group, labels in GROUPS.items():
                mine = own.filter(pl.col('label').is_in(labels), pl.col(column).is_not_null())
                places = [order.index(label) for label in mine['label']]
                axes.plot(100 * mine[column], places, 'o', markersize=3, label=group)
            axes.set_xlabel(title)
        panels[0].set_yticks(range(len(order)), labels=order)
        drawing.legend(*panels[0].get_legend_handles_labels(), loc='outside upper center',
                       ncols=3, frameon=False)  # fmt: skip
        return drawing
