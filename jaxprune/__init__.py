"""Neural-network pruning research in JAX: many seeds, sparsities and methods in one program.

A mask is data, a method is a pure function, a run is a row of an array.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxprune.errors import JaxpruneError, PruneError
from jaxprune.method import METHODS, competing, get_pruner, prune_rounds, pruner
from jaxprune.plan import keep_counts, plan_rounds
from jaxprune.problem import (
    cross_entropy,
    problem_from_flax,
    problem_from_functions,
    view,
)
from jaxprune.prune_model import prune
from jaxprune.score import grasp, magnitude, random, snip, synflow
from jaxprune.select import count_kept, global_top_k, layerwise_top_k, top_k_mask
from jaxprune.structure import (
    compact,
    connectivity,
    cost,
    effective_compression,
    effective_mask,
    groups,
)
from jaxprune.tree import apply_masks, kernels, pick, put, rules, shapes
from jaxprune.types import Batch, Problem, Pruner, View

if TYPE_CHECKING:
    from jaxprune.export import load_compact, save_compact
    from jaxprune.optim import mask_opt_state, sparse
    from jaxprune.prune_model.train_once import train_once
    from jaxprune.report.groups_figure import draw_groups
    from jaxprune.sweep import compact_spec, load_spec, make_spec, run_sweep, use_all_cores

#: Loaded on first use: they need what a mask alone does not, such as optax, flax or polars.
_LAZY = {
    'load_compact': 'jaxprune.export',
    'save_compact': 'jaxprune.export',
    'draw_groups': 'jaxprune.report.groups_figure',
    'mask_opt_state': 'jaxprune.optim',
    'sparse': 'jaxprune.optim',
    'train_once': 'jaxprune.prune_model.train_once',
    'compact_spec': 'jaxprune.sweep',
    'load_spec': 'jaxprune.sweep',
    'make_spec': 'jaxprune.sweep',
    'run_sweep': 'jaxprune.sweep',
    'use_all_cores': 'jaxprune.sweep',
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'jaxprune' has no attribute '{name}'")


__all__ = [  # noqa: RUF022 (grouped by purpose)
    # one call; and what it is made of: scores, selections, pruners, counts
    'prune',
    'grasp',
    'magnitude',
    'random',
    'snip',
    'synflow',
    'global_top_k',
    'layerwise_top_k',
    'top_k_mask',
    'pruner',
    'get_pruner',
    'competing',
    'METHODS',
    'plan_rounds',
    'prune_rounds',
    'keep_counts',
    # paths through a pruned network
    'connectivity',
    'effective_mask',
    'effective_compression',
    # what must be removed together, and a network without it
    'groups',
    'draw_groups',
    'compact',
    'cost',
    'save_compact',
    'load_compact',
    'compact_spec',
    # trees and problems
    'pick',
    'put',
    'apply_masks',
    'kernels',
    'rules',
    'shapes',
    'count_kept',
    'problem_from_flax',
    'problem_from_functions',
    'view',
    'cross_entropy',
    # training and sweeps
    'train_once',
    'sparse',
    'mask_opt_state',
    'load_spec',
    'make_spec',
    'run_sweep',
    'use_all_cores',
    # types and errors
    'Batch',
    'Problem',
    'Pruner',
    'View',
    'JaxpruneError',
    'PruneError',
]
