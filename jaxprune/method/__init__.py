"""Pruners: pure pairs `init`, `update`, called at pruning events; and their registry."""

from jaxprune.method.budget import cost_of, plan_groups
from jaxprune.method.by_name import get_pruner
from jaxprune.method.choices import (
    SCORED_ON,
    Choices,
    broken_rules,
    check_choices,
    usual_allocation,
)
from jaxprune.method.granularity import (
    COUPLED,
    GRANULARITIES,
    GROUP_ALLOCATIONS,
    check_granularity,
    competing,
    counted_as,
    limits,
    plural,
)
from jaxprune.method.lasting import WATCHED, Asked, watched, zero_groups
from jaxprune.method.mask_trace import MASK_FIGURES, mask_figures
from jaxprune.method.methods import METHODS, Method, method
from jaxprune.method.options import OPTIONS
from jaxprune.method.pruner import pruner
from jaxprune.method.repair import REPAIRS
from jaxprune.method.rounds import OnView, Rounds, host_calls, host_loop, prune_rounds, run_rounds

__all__ = [
    'COUPLED',
    'GRANULARITIES',
    'GROUP_ALLOCATIONS',
    'MASK_FIGURES',
    'METHODS',
    'OPTIONS',
    'REPAIRS',
    'SCORED_ON',
    'WATCHED',
    'Asked',
    'Choices',
    'Method',
    'OnView',
    'Rounds',
    'broken_rules',
    'check_choices',
    'check_granularity',
    'competing',
    'cost_of',
    'counted_as',
    'get_pruner',
    'host_calls',
    'host_loop',
    'limits',
    'mask_figures',
    'method',
    'plan_groups',
    'plural',
    'prune_rounds',
    'pruner',
    'run_rounds',
    'usual_allocation',
    'watched',
    'zero_groups',
]
