"""The files of numbers from published code, see `golden/README.md`."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
#: The full files if they lie beside the checkout, else the slim copies kept with the tests.
FOLDERS = (HERE.parents[1] / 'shared' / 'golden', HERE / 'golden')


@functools.cache
def golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of a file; the test is skipped where there is none."""
    for folder in FOLDERS:
        if (folder / f'{name}.npz').exists():
            return dict(np.load(folder / f'{name}.npz'))
    pytest.skip(f'{name}.npz is neither in ' + ' nor in '.join(map(str, FOLDERS)))


def numbered_shapes(rows: np.ndarray) -> dict[str, tuple[int, ...]]:
    """Rows are kh, kw, in, out, where zeros stand for no spatial sides.

    A number in front keeps the file's order when sorted.
    """
    return {f'{i:02}': tuple(n for n in row if n) for i, row in enumerate(rows.tolist())}


@functools.cache
def described(name: str) -> dict:
    """What lies beside a file's arrays as JSON."""
    for folder in FOLDERS:
        if (folder / f'{name}.json').exists():
            return json.loads((folder / f'{name}.json').read_text())
    pytest.skip(f'{name}.json is neither in ' + ' nor in '.join(map(str, FOLDERS)))
