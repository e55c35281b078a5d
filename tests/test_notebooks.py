"""The notebooks run from top to bottom, in an empty directory, and draw what they say."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.script
NOTEBOOKS = sorted((Path(__file__).parent.parent / 'notebooks').glob('*.py'))
#: Runs a notebook without a window; every figure shown must have something in it.
RUN = """
import runpy, sys
import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
drawn = []
def show():
    for number in plt.get_fignums():
        figure = plt.figure(number)
        figure.canvas.draw()
        drawn.append(all(ax.has_data() for ax in figure.axes))
    plt.close('all')
plt.show = show
runpy.run_path(sys.argv[1], run_name='__main__')
assert drawn and all(drawn) and not plt.get_fignums(), drawn
"""


def test_there_are_notebooks():
    assert [path.name[:2] for path in NOTEBOOKS] == [f'{i:02}' for i in range(1, 13)]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, tmp_path):
    """Cells in percent format, markdown first; no warning that a reader would have to explain."""
    cells = path.read_text().split('\n# %%')
    assert cells[1].startswith(' [markdown]\n# # ') and len(cells) > 4
    done = subprocess.run(
        [sys.executable, '-W', 'error::RuntimeWarning', '-c', RUN, path],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
