"""Tidy tables, statistics, figures and one offline page from a sweep directory.

tables     frames of a sweep -> summary frames
text       numbers and sentences for readers
style      colours, ticks, PNG bytes
curves     accuracy and learning curves
size       accuracy against parameters and operations of compact networks
effective_compression  accuracy against effective compression; this against direct compression
margin     strips beside an axis, for points that have no place on it
heatmap    density of every layer
recorded   quantities recorded along training
page       everything together as HTML
groups_figure  coupled groups of a network, `jp.draw_groups`
terminal   the summary as a table
markdown   tables and verdicts for the scripts of studies
"""

from pathlib import Path


def write(out: Path) -> Path:
    """Writes `report.html` and `figures/*.png` of a sweep, finished or not.

    Args:
      out: the sweep directory, see `jaxprune.sweep.store`.

    Returns:
      The path of `report.html`.

    Raises:
      StoreError: not a sweep directory, or no run has finished yet.
    """
    # The drawing libraries load with the first report, not with the command line.
    from jaxprune.report import page
    from jaxprune.sweep import store

    return page.write(store.place(out))
