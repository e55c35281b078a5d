"""What a traced network is made of: paths through its kept weights, and what they leave out."""

from jaxprune.structure.block_product import Blocks, block_product, blocks_of
from jaxprune.structure.channel_graph import ChannelGraph, channel_graph
from jaxprune.structure.compact import Compact, compact
from jaxprune.structure.connectivity import Connect, connectivity
from jaxprune.structure.cost import COSTS, Cost, cost, cost_of_kept, cost_shares
from jaxprune.structure.effective_masks import (
    compression,
    connectivity_of,
    dead_units,
    effective_compression,
    effective_mask,
    forward_of,
    forward_shapes,
    groups_of,
    shapes_in_order,
)
from jaxprune.structure.fold import Folded, fold_constants
from jaxprune.structure.forward_order import forward_order
from jaxprune.structure.gates import gates
from jaxprune.structure.groups import KINDS, Coupled, Family, Member, groups
from jaxprune.structure.latency import latency, latency_ratio
from jaxprune.structure.longest_paths import path_order
from jaxprune.structure.permuted import permuted, permuted_masks, permuted_moments
from jaxprune.structure.pivot_network import Pivoted, pivot_network
from jaxprune.structure.pivoting import Occupancy, Pivot, channel_scores, occupancy, pivot
from jaxprune.structure.sites import PLACES
from jaxprune.structure.target import (
    TARGETS,
    Chain,
    Ranking,
    active_wanted,
    chain,
    effective_top_k,
    prune_to_active,
    rounds_before,
)
from jaxprune.structure.unit_groups import silent_when_unread

__all__ = [
    'COSTS',
    'KINDS',
    'PLACES',
    'TARGETS',
    'Blocks',
    'Chain',
    'ChannelGraph',
    'Compact',
    'Connect',
    'Cost',
    'Coupled',
    'Family',
    'Folded',
    'Member',
    'Occupancy',
    'Pivot',
    'Pivoted',
    'Ranking',
    'active_wanted',
    'block_product',
    'blocks_of',
    'chain',
    'channel_graph',
    'channel_scores',
    'compact',
    'compression',
    'connectivity',
    'connectivity_of',
    'cost',
    'cost_of_kept',
    'cost_shares',
    'dead_units',
    'effective_compression',
    'effective_mask',
    'effective_top_k',
    'fold_constants',
    'forward_of',
    'forward_order',
    'forward_shapes',
    'gates',
    'groups',
    'groups_of',
    'latency',
    'latency_ratio',
    'occupancy',
    'path_order',
    'permuted',
    'permuted_masks',
    'permuted_moments',
    'pivot',
    'pivot_network',
    'prune_to_active',
    'rounds_before',
    'shapes_in_order',
    'silent_when_unread',
]
