"""Prediction churn: how many test examples a run labels otherwise than its dense twin.

Twins have the same seed and the same training settings. A results file keeps the predictions of
each evaluation, where [record] churn asks for them; readers get the churn in their place.
"""

import base64
import zlib
from collections.abc import Sequence

import numpy as np
import polars as pl

#: What results files have, and what readers get in its place.
PREDICTIONS, CHURN = 'predictions', 'churn'


def packed(labels: np.ndarray) -> str:
    """Predicted labels `(examples,)` as text."""
    return base64.b64encode(zlib.compress(labels.astype('<u2').tobytes())).decode()


def unpacked(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), '<u2')


def with_churn(frame: pl.DataFrame, settings: Sequence[str]) -> pl.DataFrame:
    """A results table with `churn` in place of `predictions`.

    The twin's predictions are those of the same step, or of its last one where it has no such step:
    rewound runs train longer. Null where either is not known.

    Args:
      settings: columns in which twins agree, besides the seed.
    """
    if PREDICTIONS not in frame.columns:
        return frame
    values = [None] * len(frame)
    if frame[PREDICTIONS].null_count() < len(frame):
        twins: dict[tuple, dict[int, np.ndarray]] = {}
        rows = list(frame.select('method', 'seed', 'step', PREDICTIONS, *settings).iter_rows())
        for name, seed, step, text, *rest in rows:
            if name == 'dense' and text is not None:
                twins.setdefault((seed, *rest), {})[step] = unpacked(text)
        for i, (_, seed, step, text, *rest) in enumerate(rows):
            of_twin = twins.get((seed, *rest))
            if text is not None and of_twin:
                other = of_twin.get(step, of_twin[max(of_twin)])
                values[i] = float((unpacked(text) != other).mean())
    at = frame.columns.index(PREDICTIONS)
    return frame.drop(PREDICTIONS).insert_column(at, pl.Series(CHURN, values, pl.Float64))
