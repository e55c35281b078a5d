"""Quantities of gradient flow: pure functions of a network at one moment.

norms     how large weights and gradients are, leaf by leaf
registry  the quantities that a specification may record along training
"""

from jaxprune.flow.norms import gradient_norm, weight_norm
from jaxprune.flow.registry import QUANTITIES, Measure, Quantity, quantity

__all__ = ['QUANTITIES', 'Measure', 'Quantity', 'gradient_norm', 'quantity', 'weight_norm']
