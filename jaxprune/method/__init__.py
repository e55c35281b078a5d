"""Pruners: pure pairs `init`, `update`, called at pruning events; and their registry."""

from jaxprune.method.by_name import get_pruner
from jaxprune.method.choices import SCORED_ON, Choices, broken_rules, check_choices
from jaxprune.method.methods import METHODS, Method, method
from jaxprune.method.options import OPTIONS
from jaxprune.method.pruner import pruner
from jaxprune.method.repair import REPAIRS
from jaxprune.method.rounds import OnView, Rounds, host_loop, prune_rounds, run_rounds
from jaxprune.method.unit_pruning import (
    GRANULARITIES,
    UNIT_ALLOCATIONS,
    alike,
    unit_floor,
    unit_select,
    unit_shapes,
)

__all__ = [
    'GRANULARITIES',
    'METHODS',
    'OPTIONS',
    'REPAIRS',
    'SCORED_ON',
    'UNIT_ALLOCATIONS',
    'Choices',
    'Method',
    'OnView',
    'Rounds',
    'alike',
    'broken_rules',
    'check_choices',
    'get_pruner',
    'host_loop',
    'method',
    'prune_rounds',
    'pruner',
    'run_rounds',
    'unit_floor',
    'unit_select',
    'unit_shapes',
]
