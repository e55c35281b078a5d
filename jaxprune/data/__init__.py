"""Data sets as plain arrays: read on the host once, then drawn, augmented and normalised on device.

A data set is a value (`Dataset`); what runs inside compiled programs are pure functions of keys.
"""

from jaxprune.data.augment import AUGMENTATIONS, Augmentation, augmentation, flip, pad_crop
from jaxprune.data.device import (
    DeviceSplit,
    FetchFn,
    balanced_indices,
    class_balanced,
    epoch_order,
    fetcher,
    to_device,
)
from jaxprune.data.sets import FACTS, Dataset, Facts, Split, facts, load

__all__ = [
    'AUGMENTATIONS',
    'FACTS',
    'Augmentation',
    'Dataset',
    'DeviceSplit',
    'Facts',
    'FetchFn',
    'Split',
    'augmentation',
    'balanced_indices',
    'class_balanced',
    'epoch_order',
    'facts',
    'fetcher',
    'flip',
    'load',
    'pad_crop',
    'to_device',
]
