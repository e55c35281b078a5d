"""What `jaxprune` offers, by purpose, and where each name lives; `lazy_loader` reads this."""

# one call; and what it is made of: scores, selections, pruners, counts
# rooms, so that `jaxprune.tree.pick` needs no other import
from . import data as data
from . import errors as errors
from . import flow as flow
from . import method as method
from . import nn as nn
from . import optim as optim
from . import plan as plan
from . import problem as problem
from . import schedule as schedule
from . import score as score
from . import select as select
from . import structure as structure
from . import sweep as sweep
from . import tree as tree
from . import types as types
from .errors import JaxpruneError as JaxpruneError
from .errors import PruneError as PruneError
from .export import load_compact as load_compact
from .export import save_compact as save_compact
from .method import METHODS as METHODS
from .method import competing as competing
from .method import get_pruner as get_pruner
from .method import prune_rounds as prune_rounds
from .method import pruner as pruner
from .optim import mask_opt_state as mask_opt_state
from .optim import sparse as sparse
from .plan import keep_counts as keep_counts
from .plan import plan_rounds as plan_rounds
from .problem import cross_entropy as cross_entropy
from .problem import problem_from_flax as problem_from_flax
from .problem import problem_from_functions as problem_from_functions
from .problem import view as view
from .prune_model import prune as prune

# training and sweeps
from .prune_model.train_once import train_once as train_once
from .prune_model.train_sparse import train_sparse as train_sparse
from .report.groups_figure import draw_groups as draw_groups
from .score import grasp as grasp
from .score import magnitude as magnitude
from .score import random as random
from .score import snip as snip
from .score import synflow as synflow
from .select import count_kept as count_kept
from .select import global_top_k as global_top_k
from .select import layerwise_top_k as layerwise_top_k
from .select import top_k_mask as top_k_mask
from .structure import compact as compact

# paths through a pruned network
from .structure import connectivity as connectivity
from .structure import cost as cost
from .structure import effective_compression as effective_compression
from .structure import effective_mask as effective_mask

# what must be removed together, and a network without it
from .structure import groups as groups
from .sweep import compact_spec as compact_spec
from .sweep import load_spec as load_spec
from .sweep import make_spec as make_spec
from .sweep import run_sweep as run_sweep
from .sweep import use_all_cores as use_all_cores
from .tree import apply_masks as apply_masks
from .tree import kernels as kernels

# trees and problems
from .tree import pick as pick
from .tree import put as put
from .tree import rules as rules
from .tree import shapes as shapes

# types and errors
from .types import Batch as Batch
from .types import Problem as Problem
from .types import Pruner as Pruner
from .types import View as View
