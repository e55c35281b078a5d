"""The quantities a specification may record along training. To add one: a file, a line, a test."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.errors import lookup
from jaxprune.flow import conservation, curvature, isometry, norms, ntk
from jaxprune.flow.agreement import agreement
from jaxprune.flow.measure import MeasureFn
from jaxprune.score.derivatives import parameters
from jaxprune.score.importance import importance
from jaxprune.score.loss import examples, split
from jaxprune.types import GLOBAL, Batch, Batches, Key, Problem, View

_Arrays = dict[str, jax.Array]
_MakeMeasure = Callable[[Problem, Sequence[str]], MeasureFn[_Arrays]]

#: Most examples of a tangent kernel: its Jacobian has a row of all parameters for each.
NTK_EXAMPLES = 32


class Quantity(NamedTuple):
    """A quantity's registry entry.

    Attributes:
      make: `(problem, paths) -> measure`; the paths of the prunable leaves in forward order.
      description: what it is, in a few words.
      needs_data: does it need batches?
      needs_initial: does it need the initial weights?
      together: how figures combine the layers into one value: 'norm' (root of the sum of squares),
        'sum', 'mean', or '*' where the network has a value of its own.
    """

    make: _MakeMeasure
    description: str
    needs_data: bool = True
    needs_initial: bool = False
    together: str = '*'


def _of(make: Callable, **options) -> _MakeMeasure:
    """A quantity that does not depend on the order of the layers."""
    return lambda problem, paths: make(problem, **options)


def _part(make: Callable, take: Callable, **options) -> _MakeMeasure:
    """A quantity that is a part of what a function measures: one scalar, or one per path."""

    def build(problem: Problem, paths: Sequence[str]) -> MeasureFn[_Arrays]:
        measured = make(problem, **options)

        def measure(key: Key, view: View, batches: Batches | None) -> _Arrays:
            found = take(measured(key, view, batches))
            return found if isinstance(found, dict) else {GLOBAL: found}

        return measure

    return build


def _imbalance(problem: Problem, paths: Sequence[str]) -> MeasureFn[_Arrays]:
    def measure(key: Key, view: View, batches: Batches | None) -> _Arrays:
        params = parameters(view)
        named = [f'{path.removesuffix("kernel")}bias' for path in paths]
        biases = [name if name in params else None for name in named]
        return conservation.imbalance(view, paths, biases=biases)

    return measure


def _ntk(take: Callable) -> _MakeMeasure:
    """A number of the tangent kernel of the sum of logits, at examples spread over all classes."""

    def make(problem: Problem) -> MeasureFn[ntk.KernelSpectrum]:
        kernel = ntk.tangent_kernel(problem, outputs='sum')

        def measure(key: Key, view: View, batches: Batches | None) -> ntk.KernelSpectrum:
            inputs = examples(batches, 'a tangent kernel')
            labels = jnp.concatenate([batch.y for batch in split(batches)])
            # The golden ratio's multiples spread evenly whatever the order of the classes.
            places = {int(i * 0.6180339887 % 1 * labels.size) for i in range(NTK_EXAMPLES)}
            some = np.array(sorted(places))
            few = Batch(inputs[None, some], labels[None, some])
            return ntk.kernel_spectrum(kernel(key, view, few))

        return measure

    return _part(make, take)


def _agreement(orders: tuple[int, int], kind: str) -> _MakeMeasure:
    """Agreement between importances of two orders, over unpruned weights, running statistics."""

    def make(problem: Problem) -> MeasureFn[_Arrays]:
        # Magnitude and loss preservation are compared as sizes, the signed measures as they are.
        mode = 'sum_of_abs' if 0 in orders else 'signed'
        one, other = (importance(problem, order=order, mode=mode) for order in orders)

        def measure(key: Key, view: View, batches: Batches | None) -> _Arrays:
            found = agreement(one(key, view, batches), other(key, view, batches), view.masks)
            return getattr(found, kind)

        return measure

    return _of(make)


def _spectral_norm(problem: Problem) -> MeasureFn[_Arrays]:
    def measure(key: Key, view: View, batches: Batches | None) -> _Arrays:
        return {path: s[0] for path, s in isometry.kernel_singular_values(view).items()}

    return measure


def _jsv(name: str) -> _MakeMeasure:
    return _part(
        isometry.jacobian_singular_values,
        lambda values: getattr(isometry.isometry_of(values), name),
    )


_AGREEMENTS = {
    f'{kind}_{name}': Quantity(_agreement(orders, kind), f'{text}, {what}')
    for name, orders, what in (
        ('magnitude_loss', (0, 1), 'of w² with |w g|'),
        ('loss_gradient_norm', (1, 2), 'of w g with w Hg'),
    )
    for kind, text in (
        ('pearson', 'correlation'),
        ('spearman', 'rank correlation'),
        ('overlap', 'share of the top tenth in common'),
    )
}

QUANTITIES: dict[str, Quantity] = {
    'weight_norm': Quantity(_of(norms.weight_norm), '‖w‖', needs_data=False, together='norm'),
    'gradient_norm': Quantity(_of(norms.gradient_norm), '‖g‖', together='norm'),
    'distance_from_initial': Quantity(
        _of(norms.distance_from_initial),
        '‖w - w(0)‖',
        needs_data=False,
        needs_initial=True,
        together='norm',
    ),
    'norm_rate': Quantity(
        _part(norms.norm_dynamics, lambda found: found.first, second=False),
        'd‖w‖²/dt = -2 wᵀg, of the loss without weight decay',
        together='sum',
    ),
    'norm_acceleration': Quantity(
        _part(norms.norm_dynamics, lambda found: found.second),
        'd²‖w‖²/dt² = 2‖g‖² + 2 wᵀHg, without weight decay',
        together='sum',
    ),
    'saliency_drift': Quantity(
        _part(norms.norm_dynamics, norms.saliency_drift),
        'd(wᵀg)/dt = -‖g‖² - wᵀHg, without weight decay',
        together='sum',
    ),
    'imbalance': Quantity(
        _imbalance,
        '‖W_l‖² - ‖W_(l+1)‖², kept by the flow of ReLU nets',
        needs_data=False,
        together='mean',
    ),
    'radial_gradient': Quantity(
        _of(conservation.radial_gradient),
        'cos(w, g) of filters, 0 before batch norm',
        together='mean',
    ),
    'gradient_curvature': Quantity(_of(curvature.gradient_curvature), 'gᵀHg'),
    'hessian_largest': Quantity(
        _part(curvature.hessian_eigenvalues, lambda found: found[0]),
        'top eigenvalue of the Hessian',
    ),
    'hessian_trace': Quantity(_part(curvature.hessian_trace, lambda found: found), 'tr H'),
    'ntk_trace': Quantity(_ntk(lambda found: found.trace), 'tr K of the tangent kernel'),
    'ntk_largest': Quantity(_ntk(lambda found: found.largest), 'its largest eigenvalue'),
    'ntk_condition': Quantity(_ntk(lambda found: found.condition), 'largest over smallest'),
    'ntk_effective_rank': Quantity(_ntk(lambda found: found.effective_rank), '(tr K)² / tr K²'),
    'jsv_mean': Quantity(_jsv('mean'), 'singular values of the Jacobian, inputs to logits: mean'),
    'jsv_std': Quantity(_jsv('std'), 'their standard deviation'),
    'jsv_largest': Quantity(_jsv('largest'), 'the largest of them'),
    'jsv_smallest': Quantity(_jsv('smallest'), 'the smallest of them'),
    'jsv_condition': Quantity(_jsv('condition'), 'largest over smallest, mean over examples'),
    'jsv_deviation': Quantity(_jsv('deviation'), 'the mean of (s - 1)²'),
    'spectral_norm': Quantity(
        _of(_spectral_norm),
        'largest singular value of each kernel',
        needs_data=False,
        together='mean',
    ),
    **_AGREEMENTS,
}


def quantity(name: str) -> Quantity:
    """The registry entry of a quantity."""
    return lookup('quantity', name, QUANTITIES)
