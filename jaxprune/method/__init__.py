"""Pruners: pure pairs `init`, `update`, called at pruning events; and their registry."""

from jaxprune.method.methods import METHODS, Method, get_pruner, method
from jaxprune.method.pruner import pruner
from jaxprune.method.unit_pruning import GRANULARITIES, alike, unit_floor, unit_select, unit_shapes

__all__ = [
    'GRANULARITIES',
    'METHODS',
    'Method',
    'alike',
    'get_pruner',
    'method',
    'pruner',
    'unit_floor',
    'unit_select',
    'unit_shapes',
]
