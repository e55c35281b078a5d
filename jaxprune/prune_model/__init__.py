"""One call that prunes someone's own model: `jp.prune`."""

from jaxprune.prune_model.call import Pruned, prune
from jaxprune.prune_model.summary import Leaf, Report

__all__ = ['Leaf', 'Pruned', 'Report', 'prune']
