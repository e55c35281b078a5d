"""Gradient flow and dynamical isometry: functions of a network at one moment.

Most are factories: `problem -> measure`, and a measure is a pure function
`(key, view, batches) -> arrays`, for `jit` and for `vmap` over seeds, masks and checkpoints;
measures of the effect of a mask are functions `(key, view, masks, batches)`. Pruned weights do not
move under the flow. Every path is that of a parameter; '*' stands for the whole network.

Norms, their derivatives and curvature use batch statistics, as training does, unless `train=False`.
Importances and the effect of masks use running statistics, as the studies do, unless `train=True`.
`weight_norm`, `gradient_norm` and distances are those of kernels; derivatives of norms, curvature
and tangent kernels are with respect to all parameters.

measure       the types of the functions that are returned
norms         weights, gradients, distances; norms to second order in time, measured and predicted
conservation  quantities that the flow conserves
mask_effect   change of loss, gradient and first-order evolution by a mask, exact and predicted
agreement     of two measures of importance, on values, ranks, top entries
curvature     of the loss: along the gradient, top eigenvalues, trace, spectral density
ntk           the neural tangent kernel
isometry      singular values of Jacobians and kernels
orthogonal    OrthP, penalties and TPP: isometry restored, or preserved
speed         how fast a network trains; how much two of them disagree
krylov        spectra from matrix-vector products
quantities    the quantities that a specification may record along training
"""

from jaxprune.flow.agreement import Agreement, agreement, pearson, spearman, top_overlap
from jaxprune.flow.conservation import imbalance, radial_gradient, unit_imbalance
from jaxprune.flow.curvature import (
    Density,
    gradient_curvature,
    hessian_eigenvalues,
    hessian_trace,
    smoothed,
    spectral_density,
)
from jaxprune.flow.isometry import (
    Isometry,
    isometry_of,
    jacobian,
    jacobian_singular_values,
    kernel_singular_values,
    largest_jacobian_singular_values,
)
from jaxprune.flow.mask_effect import (
    Change,
    EvolutionError,
    GradientChange,
    evolution_error,
    gradient_norm_change,
    loss_change,
)
from jaxprune.flow.measure import MaskMeasureFn, MeasureFn
from jaxprune.flow.norms import (
    NormDynamics,
    displacement,
    distance_from_initial,
    distance_rate,
    gradient_norm,
    measured_change,
    norm_dynamics,
    predicted_change,
    saliency_drift,
    weight_norm,
)
from jaxprune.flow.ntk import (
    KernelSpectrum,
    kernel_distance,
    kernel_spectrum,
    ntk_largest,
    ntk_trace,
    tangent_kernel,
)
from jaxprune.flow.orthogonal import (
    GAINS,
    approximately_orthogonal,
    conv_orthogonality,
    kernel_orthogonality,
    orthogonalised,
    orthp,
    tpp_gradients,
    tpp_penalty,
    tpp_strength,
)
from jaxprune.flow.quantities import QUANTITIES, Quantity, quantity
from jaxprune.flow.speed import churn, steps_to_loss, training_speed
from jaxprune.score.operators import conv_singular_values, slice_norms

__all__ = [
    'GAINS',
    'QUANTITIES',
    'Agreement',
    'Change',
    'Density',
    'EvolutionError',
    'GradientChange',
    'Isometry',
    'KernelSpectrum',
    'MaskMeasureFn',
    'MeasureFn',
    'NormDynamics',
    'Quantity',
    'agreement',
    'approximately_orthogonal',
    'churn',
    'conv_orthogonality',
    'conv_singular_values',
    'displacement',
    'distance_from_initial',
    'distance_rate',
    'evolution_error',
    'gradient_curvature',
    'gradient_norm',
    'gradient_norm_change',
    'hessian_eigenvalues',
    'hessian_trace',
    'imbalance',
    'isometry_of',
    'jacobian',
    'jacobian_singular_values',
    'kernel_distance',
    'kernel_orthogonality',
    'kernel_singular_values',
    'kernel_spectrum',
    'largest_jacobian_singular_values',
    'loss_change',
    'measured_change',
    'norm_dynamics',
    'ntk_largest',
    'ntk_trace',
    'orthogonalised',
    'orthp',
    'pearson',
    'predicted_change',
    'quantity',
    'radial_gradient',
    'saliency_drift',
    'slice_norms',
    'smoothed',
    'spearman',
    'spectral_density',
    'steps_to_loss',
    'tangent_kernel',
    'top_overlap',
    'tpp_gradients',
    'tpp_penalty',
    'tpp_strength',
    'training_speed',
    'unit_imbalance',
    'weight_norm',
]
