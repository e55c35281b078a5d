"""Reads data sets that TFDS prepared as ArrayRecord files, without TensorFlow.

TFDS itself can read several formats. Only ArrayRecord is accepted here: it needs no TensorFlow, and
the parquet files that TFDS 4.9.10 writes silently lose examples.
"""

import io
import os
import re
from pathlib import Path

import numpy as np

from jaxprune.errors import DataError

# Records fetched at a time: enough to amortise the call, few enough that a split's compressed and
# decoded images are never in memory together.
_BLOCK = 4096


def read(name: str, split: str, data_dir: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Reads one split of a prepared image classification set.

    Args:
      name: the TFDS name of the set, for instance 'mnist'.
      split: 'train' or 'test'.
      data_dir: see `find`.

    Returns:
      uint8 images `(n, height, width, channels)` and int32 labels `(n,)`, in the files' order.

    Raises:
      DataError: nothing is prepared there, it is in another format, or it cannot be read whole.
    """
    folder = find(name, data_dir)
    # Imported here because it takes a third of a second, which embedded data need not pay.
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(folder)
        stored = builder.info.file_format
        if stored is not None and stored.value == 'array_record':
            # TFDS would decode with OpenCV or Pillow and warn about its choice; bytes are faster.
            bare = {'image': tfds.decode.SkipDecoding()}
            source = builder.as_data_source(split=split, decoders=bare)
            return _decode(source, builder.info.features['image'].shape)
    except ImportError:
        raise  # A broken installation; telling people to rebuild their data would mislead them.
    except Exception as error:  # Readers below raise anything from RuntimeError to protobuf errors.
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
        raise DataError(
            f'{name} ({split}) in {folder} cannot be read ({reason});'
            f' delete that folder and {_how(name, folder.parents[1])}'
        ) from error
    raise DataError(
        f'{name} in {folder} is stored as {stored.value if stored else "an unknown format"},'
        f' not as array_record; delete that folder and {_how(name, folder.parents[1])}'
    )


def find(name: str, data_dir: str | None = None) -> Path:
    """The folder of the newest prepared version of a data set.

    Args:
      name: the TFDS name of the set.
      data_dir: the only folder that is searched, if given; by default `$TFDS_DATA_DIR` if that is
        set, then `~/tensorflow_datasets`.

    Returns:
      `place / name / version`, a folder that holds a `dataset_info.json`.

    Raises:
      DataError: no place has it; the message names the places and the commands that prepare it.
    """
    if data_dir:
        candidates = [data_dir]
    else:
        candidates = [os.environ.get('TFDS_DATA_DIR'), '~/tensorflow_datasets']
    places = [Path(place).expanduser() for place in candidates if place]
    for place in places:
        # TFDS prepares into `3.0.1.incomplete...` and renames at the end: those are not versions.
        versions = [
            info.parent
            for info in (place / name).glob('*/dataset_info.json')
            if re.fullmatch(r'\d+\.\d+\.\d+', info.parent.name)
        ]
        if versions:
            return max(versions, key=lambda v: [int(number) for number in v.name.split('.')])
    looked = ', '.join(map(str, places))
    raise DataError(f'no prepared {name} in {looked}; {_how(name, places[0])}')


def _how(name: str, place: Path) -> str:
    return (
        "prepare it with: pip install 'tensorflow>=2.18' &&"
        f' tfds build {name} --file_format=array_record --data_dir={place}'
    )


def _decode(source, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image

    images = np.empty((len(source), *shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    for start in range(0, len(source), _BLOCK):
        block = range(start, min(start + _BLOCK, len(source)))
        for i, record in zip(block, source.__getitems__(list(block)), strict=True):
            with Image.open(io.BytesIO(record['image'])) as image:
                # The reshape adds the channel of a grey image, and fails for any other surprise.
                images[i] = np.asarray(image).reshape(shape)
            labels[i] = record['label']
    return images, labels
