"""The report of a sweep: one offline HTML file, and its figures as PNG."""

import base64
import importlib.resources
import re
from pathlib import Path

import jinja2
import polars as pl
from matplotlib.figure import Figure

from jaxprune.errors import StoreError
from jaxprune.method import MASK_FIGURES
from jaxprune.report import (
    curves,
    effective_compression,
    heatmap,
    recorded,
    size,
    style,
    tables,
    text,
)
from jaxprune.sweep import store

MOST_SETTINGS = 6
"""Settings that get figures; tables and sentences always hold all of them."""

_OURS = re.compile(
    r'(accuracy|accuracy_size|accuracy_effective|effective_compression|learning_accuracy|'
    r'learning_loss|layers|flow)'
    r'(_\d+)?\.png'
)


def write(out: Path) -> Path:
    """Writes the report of the sweep directory `out`; see `jaxprune.report.write`."""
    plan = store.read_json(out / 'plan.json')
    provenance = store.read_provenance(out)
    try:
        spec = (out / 'spec.toml').read_text(encoding='utf-8')
    except FileNotFoundError:
        raise StoreError(f'{out} is not a sweep directory: it has no spec.toml') from None
    results, layers = store.read_results(out), store.read_layers(out)
    if results.is_empty():
        raise StoreError(f'{out}: no run has finished yet, so there is nothing to report')

    drawn = figures(results, layers, store.read_curves(out), store.read_flow(out))
    images = {name: style.png(drawing) for name, (drawing, _) in drawn.items()}
    for name, content in images.items():
        store.write_bytes(out / 'figures' / f'{name}.png', content)
    for path in (out / 'figures').glob('*.png'):
        # Left by an earlier report on fewer runs or settings; files of the reader's own stay.
        if _OURS.fullmatch(path.name) and path.stem not in images:
            path.unlink()
    # A hundred pixels of the page per inch; the PNG itself is finer, for print and sharp screens.
    pictures = {
        name: {
            'source': base64.b64encode(images[name]).decode('ascii'),
            'width': round(drawing.get_figwidth() * 100),
            'height': round(drawing.get_figheight() * 100),
        }
        | words
        for name, (drawing, words) in drawn.items()
    }
    page = html(
        title=str(plan.get('name') or out.resolve().name),
        total=len(plan['runs']),
        results=results,
        layers=layers,
        pictures=pictures,
        provenance=provenance,
        spec=spec,
    )
    store.write_bytes(out / 'report.html', page.encode())
    return out / 'report.html'


def figures(
    results: pl.DataFrame,
    layers: pl.DataFrame,
    along: pl.DataFrame | None = None,
    flows: pl.DataFrame | None = None,
) -> dict[str, tuple[Figure, dict]]:
    """Draws everything.

    Args:
      along: rows of `store.read_curves`, if there are any.
      flows: rows of `store.read_flow`, if there are any.

    Returns:
      `{name: (figure, words)}` in the order of the page; `words` holds `section`, `alt`, `caption`.
    """
    summary = tables.summary(results, layers)
    keys = tables.settings(results)
    every = [setting for setting, _ in tables.split(summary, keys)]
    settings = tables.evenly(every, MOST_SETTINGS)
    styles = style.lines(tables.labels(summary))
    some = (
        f' Of {len(every)} settings {len(settings)} are drawn, evenly chosen; the table has all.'
        if len(settings) < len(every)
        else ''
    )

    drawn = {'accuracy': (curves.accuracy(summary, settings), _accuracy_words(summary, some))}
    drawn |= _size_figure(results, settings, styles, some)
    drawn |= _effective_figures(results, summary, every, settings, some)
    evaluated = results if along is None else tables.along(results, along)
    learning = tables.learning(evaluated)
    densities = tables.densities(results, layers)
    unit = tables.time_unit(evaluated)
    masks = recorded.of_masks(results)
    quantities = None if flows is None or flows.is_empty() else recorded.means(results, flows)
    for i, setting in enumerate(settings, start=1):
        suffix = f'_{i}' if keys else ''
        where = f' Setting: {text.setting_name(setting)}.' if keys else ''
        part = tables.at(learning, setting)
        if part['time'].n_unique() > 1:
            for column, name in (('test_accuracy', 'accuracy'), ('train_loss', 'loss')):
                if part[column].is_not_null().any():
                    drawing = curves.learning(part, column, unit, styles)
                    words = _learning_words(part, column, unit, where)
                    drawn[f'learning_{name}{suffix}'] = drawing, words
        if quantities is not None:
            part = tables.at(quantities, setting)
            drawn[f'flow{suffix}'] = recorded.quantities(part, styles), _flow_words(part, where)
        part = tables.at(masks, setting)
        if part.filter(pl.col('method') != tables.DENSE).height:
            drawn[f'masks{suffix}'] = recorded.quantities(part, styles), _mask_words(part, where)
        part = tables.at(densities, setting)
        if part.filter(pl.col('method') != tables.DENSE).height:
            drawing, complete = heatmap.layers(part)
            drawn[f'layers{suffix}'] = drawing, _layers_words(part, complete, where)
    return drawn


def _size_figure(
    results: pl.DataFrame, settings: list[dict], styles: dict, some: str
) -> dict[str, tuple[Figure, dict]]:
    """Accuracy against parameters and operations of compact networks, if any is smaller."""
    known = tables.sizes(results)
    parts = [(setting, tables.at(known, setting)) for setting in settings]
    parts = [(setting, part) for setting, part in parts if not part.is_empty()]
    frame = pl.concat([known.clear(), *(part for _, part in parts)])
    if size.smaller(frame).is_empty():
        return {}
    drawing = size.accuracy(frame, [setting for setting, _ in parts], styles)
    return {'accuracy_size': (drawing, _size_words(frame, some))}


def _effective_figures(
    results: pl.DataFrame, summary: pl.DataFrame, every: list[dict], settings: list[dict], some: str
) -> dict[str, tuple[Figure, dict]]:
    """Accuracy against effective compression, and this against direct compression."""
    styles = style.lines(tables.labels(summary))
    known = tables.connectivity(results)
    frame = pl.concat(tables.at(known, setting) for setting in settings)
    if frame.filter(pl.col('method') != tables.DENSE).is_empty():
        return {}
    drawn = {}
    summary = pl.concat(tables.at(summary, setting) for setting in settings)
    if summary['accuracy'].is_not_null().any():
        drawing = effective_compression.accuracy(frame, summary, settings, styles)
        drawn['accuracy_effective'] = drawing, _accuracy_effective_words(frame, some)
    # Most methods prune before they train, so what is trained differently makes no difference.
    alike = len(every) > 1 and effective_compression.alike(known, every)
    drawing = effective_compression.compressions(frame, settings[:1] if alike else settings, styles)
    where = ' The same in every setting, so it is drawn once.' if alike else some
    drawn['effective_compression'] = drawing, _compressions_words(frame, where)
    return drawn


def _aims(frame: pl.DataFrame) -> str:
    """Which labels have effective compressions as targets, where others have not."""
    labels = tables.labels(frame.filter(pl.col('target') == 'effective'))
    if not labels or len(labels) == len(tables.labels(frame)):
        return ''
    return f' The target is effective compression for {", ".join(labels)}, direct for the rest.'


def _bands(frame: pl.DataFrame) -> str:
    """The meaning of the bands of a figure of accuracies."""
    if frame['seeds'].max() == 1:
        return 'One seed per point, so no band.'
    return 'Band: 95 % Student interval of the mean over seeds.'


def _accuracy_words(summary: pl.DataFrame, some: str) -> dict:
    parts = ['Mean test accuracy after training.', _bands(summary)]
    if tables.DENSE in summary['method']:
        parts.append(
            'Dashed: the dense control, which is also where every curve starts, at compression 1.'
        )
    else:
        parts.append('No run of the dense control has finished.')
    if summary['collapsed'].sum():
        parts.append('Hollow markers: at least one seed lost every weight of a whole layer.')
    if summary['diverged'].sum():
        parts.append('Crosses: the loss of at least one seed is no longer a finite number.')
    count = len(tables.labels(summary))
    return {
        'section': 'accuracy',
        'alt': f'Line chart of test accuracy against compression on a logarithmic axis, '
        f'{text.plural(count, "method")}; the numbers are in the table below.',
        'caption': ' '.join(parts) + _aims(summary) + some,
    }


_BY_CHANCE = ', except where they happen to remove whole groups'


def _size_words(frame: pl.DataFrame, some: str) -> dict:
    frame = frame.filter(pl.col('accuracy').is_not_null())
    parts = [
        'Mean test accuracy after training. Left: against parameters, right: against operations, '
        'each of the dense network over those of the compact one.',
        _bands(frame),
    ]
    if tables.DENSE in frame['method']:
        parts.append('Dashed: the dense control.')
    large = size.as_large(frame)
    if not large.is_empty():
        low, high = (
            text.percent(end, 1) for end in (large['accuracy'].min(), large['accuracy'].max())
        )
        weights = pl.col('target').is_in(['direct', 'effective'])
        if not large.filter(weights).is_empty():
            chance = '' if size.smaller(frame).filter(weights).is_empty() else _BY_CHANCE
            words = 'Masks on single weights leave the compact network as large as the dense one'
            parts.append(f'{words}{chance}.')
        parts.append(
            f'The strip at the left belongs to both panels, at {text.times(1)}: runs that are less '
            'than a percent smaller, a point per compression, in the order of the legend; their '
            'accuracy is ' + (f'{low} %.' if low == high else f'between {low} and {high} %.')
        )
    if frame['disconnected'].any():
        parts.append('At the right, off the scale: disconnected runs, in the order of the legend.')
    if frame.filter(pl.col('runs') < pl.col('seeds')).height:
        parts.append('Half-filled: only some of the seeds are connected, or disconnected.')
    if frame['diverged'].sum():
        parts.append('Crosses: the loss of at least one seed is no longer a finite number.')
    return {
        'section': 'size',
        'alt': 'Two line charts of test accuracy, against compression by parameters and against '
        'theoretical speed-up, both on logarithmic axes; the numbers are in the table below.',
        'caption': ' '.join(parts) + some,
    }


def _apart(frame: pl.DataFrame) -> bool:
    """Does effective compression differ from direct by more than a percent anywhere?"""
    pruned = frame.filter(pl.col('method') != tables.DENSE)
    gap = pruned['effective_high'] / pruned['compression']
    return bool((gap > 1.01).any())


def _accuracy_effective_words(frame: pl.DataFrame, some: str) -> dict:
    parts = [
        'The same accuracies: solid against effective compression, dashed and thin against direct '
        'compression.'
    ]
    if not _apart(frame):
        parts.append('They differ by no more than a percent, so the dashed lines are covered.')
    if frame['disconnected'].any():
        parts.append(
            'At the right, off the scale: runs that are disconnected, in the order of the legend.'
        )
    if frame.filter(pl.col('runs') < pl.col('seeds')).height:
        parts.append(
            'Where only some seeds are disconnected, the point is split into two half-filled ones, '
            'each the mean over its own seeds; dashed lines are means over all.'
        )
    parts.append(_bands(frame))
    return {
        'section': 'effective',
        'alt': 'Line chart of test accuracy against effective compression on a logarithmic axis, '
        'and against direct compression for comparison; the numbers are in the table below.',
        'caption': ' '.join(parts) + some,
    }


def _compressions_words(frame: pl.DataFrame, where: str) -> dict:
    parts = ['Effective against direct compression as achieved, geometric means over seeds.']
    if frame['seeds'].max() > 1:
        parts.append('Bars and bands: smallest and largest seed.')
    if not _apart(frame):
        parts.append('No run is more than a percent off the diagonal.')
    if frame['disconnected'].any():
        parts.append('At the top, off the scale: disconnected runs.')
    if frame.filter(pl.col('runs') < pl.col('seeds')).height:
        parts.append('Half-filled: some of the seeds are disconnected; means are over the others.')
    dense = frame.filter(pl.col('method') == tables.DENSE)['effective_compression'].max()
    if dense is not None and dense > 1.001:
        parts.append(
            f'The dense network itself is at {text.about(dense)}: some of its weights lie on no '
            'path, for instance entries of a kernel that only ever see padding.'
        )
    return {
        'section': 'effective',
        'alt': 'Line chart of effective against direct compression, both axes logarithmic; the '
        'numbers are in the table below.',
        'caption': ' '.join(parts) + where,
    }


def _learning_words(part: pl.DataFrame, column: str, unit: str, where: str) -> dict:
    chosen, among = curves.panel_compressions(part)
    what = {'test_accuracy': 'Test accuracy', 'train_loss': 'Training loss'}[column]
    some = f', {len(chosen)} of {among} evenly chosen' if len(chosen) < among else ''
    dense = ' Dashed: dense.' if tables.DENSE in part['method'] else ''
    return {
        'section': 'learning',
        'alt': f'Small line charts of {what.lower()} against the {unit}, one per compression.',
        'caption': f'{what} against the {unit}, mean over seeds; '
        f'one panel per compression{some}.{dense} Values that are not finite are left out.'
        f'{_aims(part)}{where}',
    }


#: What each row of the figure of masks shows.
_MASK_ROWS = {
    'density': 'share of weights that the mask keeps',
    **MASK_FIGURES,
    'churn': 'share of the test set that the run labels otherwise than the dense run of its seed',
}


def _mask_words(part: pl.DataFrame, where: str) -> dict:
    names = part['quantity'].unique(maintain_order=True)
    meant = '; '.join(f'{name.replace("_", " ")}: {_MASK_ROWS[name]}' for name in names)
    return {
        'section': 'learning',
        'alt': 'What masks and predictions have done by each evaluation, a line for each method.',
        'caption': 'At each evaluation, mean over seeds; a column per compression. '
        f'{meant}.{where}',
    }


def _flow_words(part: pl.DataFrame, where: str) -> dict:
    names = part['quantity'].unique(maintain_order=True).to_list()
    many = part.filter(pl.col('method') != tables.DENSE)['target_compression'].n_unique()
    some = (
        f', {recorded.MOST_COLUMNS} of {many} evenly chosen' if many > recorded.MOST_COLUMNS else ''
    )
    dense = ' Dashed: dense.' if tables.DENSE in part['method'] else ''
    return {
        'section': 'learning',
        'alt': f'Small line charts against the step, {text.plural(len(names), "quantity")} by '
        'compression.',
        'caption': 'Quantities recorded along training, mean over seeds; layers together (norms as '
        f'the root of the sum of squares); a column per compression{some}.{dense} Layer by layer '
        f'they are in flow/.{where}',
    }


def _layers_words(part: pl.DataFrame, complete: bool, where: str) -> dict:
    some = '' if complete else ' Of many layers an even choice is drawn.'
    cross = ' A cross marks layers without any weight left in at least one seed.'
    return {
        'section': 'layers',
        'alt': 'Heat maps of the share of weights kept, layers by compressions, one per method.',
        'caption': 'Weights kept, in percent of each layer (its size in brackets), mean over '
        f'seeds.{cross if part["empty"].sum() else ""}{some}{_aims(part)}{where}',
    }


def _row(row: dict, keys: list[str]) -> dict:
    """A row of the table as text."""
    deficit = row['deficit'] is not None
    return {
        'setting': text.setting_name({key: row[key] for key in keys}),
        'label': row['label'],
        'target': text.number(row['target_compression']),
        'achieved': text.number(row['compression']),
        'effective': text.effective(row),
        'compact': text.NONE if row['params_ratio'] is None else text.number(row['params_ratio']),
        'speedup': text.NONE if row['speedup'] is None else f'{row["speedup"]:.2f}',
        'disconnected': bool(row['disconnected']),
        'seeds': row['seeds'],
        'accuracy': text.percent(row['accuracy']),
        'interval': text.interval(row['accuracy_low'], row['accuracy_high']),
        'deficit': text.percent(row['deficit']) if deficit else text.NONE,
        'deficit_interval': text.interval(row['deficit_low'], row['deficit_high']),
        # Shown only where it is not all of them.
        'pairs': row['pairs'] if deficit and row['pairs'] < row['seeds'] else None,
        'collapsed': row['collapsed'],
        'diverged': row['diverged'],
    }


def _failed(results: pl.DataFrame, layers: pl.DataFrame, keys: list[str]) -> tuple[list, list]:
    """Collapsed and diverged runs, as text."""

    def show(row):
        return {
            'run_id': row['run_id'],
            'setting': text.setting_name({key: row[key] for key in keys}),
            'label': row['label'],
            'compression': text.number(row['target_compression']),
            'seed': row['seed'],
            # What is wrong with the run: the layers it lost, or why it has no finite numbers.
            'note': ', '.join(row.get('layers', [])) or row.get('error') or 'training diverged',
        }

    collapsed = tables.collapsed(results, layers)
    diverged = tables.final(results).filter('diverged')
    return (
        [show(row) for row in collapsed.iter_rows(named=True)],
        [show(row) for row in diverged.iter_rows(named=True)],
    )


def html(
    *,
    title: str,
    total: int,
    results: pl.DataFrame,
    layers: pl.DataFrame,
    pictures: dict[str, dict],
    provenance: dict,
    spec: str,
) -> str:
    """Fills the template.

    Args:
      title: name of the sweep.
      total: number of planned runs.
      results: rows of `store.read_results`.
      layers: rows of `store.read_layers`.
      pictures: `{name: {section, alt, caption, source, width, height}}`, sources in base64.
      provenance: printed whole, whatever is in it.
      spec: text of the specification.
    """
    summary = tables.summary(results, layers)
    keys = tables.settings(results)
    points = tables.breaking_points(summary)

    def by_setting(sentences, frame):
        parts = tables.split(frame, keys)
        return [(text.setting_name(setting), sentences(part)) for setting, part in parts]

    collapsed, diverged = _failed(results, layers, keys)
    template = importlib.resources.files('jaxprune.report').joinpath('page.html')
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template.read_text(encoding='utf-8')).render(
        title=title,
        total=total,
        done=results['run_id'].n_unique(),
        models=results['model'].unique(maintain_order=True).to_list(),
        datasets=results['dataset'].unique(maintain_order=True).to_list(),
        seeds=results['seed'].n_unique(),
        settings=keys,
        rows=[_row(row, keys) for row in summary.iter_rows(named=True)],
        verdicts=by_setting(text.breaking_sentences, points),
        differences=by_setting(text.effective_sentences, summary),
        disconnections=by_setting(text.disconnected_sentences, summary),
        disconnected=summary['disconnected'].sum(),
        smaller=any((summary[ratio] > 1.005).any() for ratio in ('params_ratio', 'speedup')),
        traced=summary['disconnected'].is_not_null().all(),
        labelled=bool(tables.labels(summary)),
        aims=_aims(summary),
        collapsed=collapsed,
        diverged=diverged,
        pictures=pictures,
        provenance=provenance,
        spec=spec,
    )
