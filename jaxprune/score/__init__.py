"""Scores: pure functions `(key, view, batches) -> scores`, high = keep. One file per family."""

from jaxprune.score.grasp import grasp
from jaxprune.score.magnitude import magnitude
from jaxprune.score.random import random
from jaxprune.score.snip import snip
from jaxprune.score.synflow import synflow

__all__ = ['grasp', 'magnitude', 'random', 'snip', 'synflow']
