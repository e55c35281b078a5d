"""Scores: pure functions `(key, view, batches) -> scores`, high = keep. One file per family."""

from jaxprune.score.activations import ACTIVATION_MEASURES, activation_score
from jaxprune.score.coalitions import exact_shapley, leave_one_out
from jaxprune.score.coupled import COUPLED_MEASURES, coupled_score
from jaxprune.score.edges import edge_sensitivities, edge_sensitivity
from jaxprune.score.fisher import fisher
from jaxprune.score.force import force
from jaxprune.score.gate_taylor import gate_taylor
from jaxprune.score.gradient_norm import gradient_norm
from jaxprune.score.grasp import grasp
from jaxprune.score.group_importance import (
    GROUP_MEASURES,
    group_decay,
    group_importance,
    group_values,
)
from jaxprune.score.importance import MEASURES, importance
from jaxprune.score.lamp import lamp
from jaxprune.score.layers import Layer, forward_layers
from jaxprune.score.lookahead import lookahead
from jaxprune.score.magnitude import magnitude
from jaxprune.score.ntk_sap import ntk_sap
from jaxprune.score.pfp import pfp, pfp_sample
from jaxprune.score.pfp_budget import Channels, pfp_allocation, pfp_channels, pfp_proposal
from jaxprune.score.products import Product, products
from jaxprune.score.prospr import prospr
from jaxprune.score.random import random
from jaxprune.score.ranked_like import ranked_like
from jaxprune.score.sample_sizes import draws_for, expected_unique, sample_complexity
from jaxprune.score.settled import shapley_until_settled
from jaxprune.score.shapley import ShapleyValues, shapley
from jaxprune.score.sipp import Rows, sipp, sipp_allocation, sipp_rows, sipp_sample
from jaxprune.score.snip import snip
from jaxprune.score.synflow import synflow
from jaxprune.score.taylor import taylor
from jaxprune.score.unit_loss import unit_leave_one_out, unit_shapley, unit_shapley_values

__all__ = [
    'ACTIVATION_MEASURES',
    'COUPLED_MEASURES',
    'GROUP_MEASURES',
    'MEASURES',
    'Channels',
    'Layer',
    'Product',
    'Rows',
    'ShapleyValues',
    'activation_score',
    'coupled_score',
    'draws_for',
    'edge_sensitivities',
    'edge_sensitivity',
    'exact_shapley',
    'expected_unique',
    'fisher',
    'force',
    'forward_layers',
    'gate_taylor',
    'gradient_norm',
    'grasp',
    'group_decay',
    'group_importance',
    'group_values',
    'importance',
    'lamp',
    'leave_one_out',
    'lookahead',
    'magnitude',
    'ntk_sap',
    'pfp',
    'pfp_allocation',
    'pfp_channels',
    'pfp_proposal',
    'pfp_sample',
    'products',
    'prospr',
    'random',
    'ranked_like',
    'sample_complexity',
    'shapley',
    'shapley_until_settled',
    'sipp',
    'sipp_allocation',
    'sipp_rows',
    'sipp_sample',
    'snip',
    'synflow',
    'taylor',
    'unit_leave_one_out',
    'unit_shapley',
    'unit_shapley_values',
]
