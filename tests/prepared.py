"""Where this machine keeps prepared data sets."""

import os
from pathlib import Path

import pytest


def prepared(*names: str) -> str:
    """The folder that holds every one of them, or a skipped test."""
    beside = Path(__file__).parents[2] / 'shared' / 'tfds'
    place = os.environ.get('TFDS_DATA_DIR') or str(beside)
    for name in names:
        if not (Path(place) / name).is_dir():
            pytest.skip(f'no prepared {name}: set TFDS_DATA_DIR')
    return place
