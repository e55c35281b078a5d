"""Pruners: pure pairs `init`, `update`, called at pruning events; and their registry."""

from jaxprune.method.pruner import pruner
from jaxprune.method.registry import METHODS, Method, build, method
from jaxprune.method.units import GRANULARITIES, alike, unit_floor, unit_select, unit_shapes

__all__ = [
    'GRANULARITIES',
    'METHODS',
    'Method',
    'alike',
    'build',
    'method',
    'pruner',
    'unit_floor',
    'unit_select',
    'unit_shapes',
]
