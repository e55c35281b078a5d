"""Specifications of compact networks: to train them on, or their shape from scratch."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxprune import data, tree
from jaxprune.errors import JaxpruneError, PruneError, quoted, shown
from jaxprune.problem import problem_from_flax
from jaxprune.structure import Compact
from jaxprune.sweep.load import load_spec, make_spec, resolved
from jaxprune.sweep.program import network
from jaxprune.sweep.spec import SweepSpec
from jaxprune.types import PyTree


def compact_spec(
    spec: SweepSpec | Mapping[str, Any] | str | Path, small: Compact
) -> dict[str, Any]:
    """The specification of a network's sweep with the widths of the network made compact.

        table = jp.compact_spec('dense.toml', small)
        jp.run_sweep(table)  # the same shape from scratch
        table['model']['params'] = 'small.safetensors'
        jp.run_sweep(table)  # from the parameters that `jp.save_compact` wrote

    `model.layer_widths` has every layer whose number of units differs from the usual one. The
    network of the new specification has exactly the shapes of the parameters, and with them it
    computes what `small.apply` does, if the old one described the network before.

    Args:
      spec: of the network before: a TOML file, a table with its keys, or a specification. Its
        `model.params` are left out.
      small: from `jp.compact` or `jp.load_compact`; parameters as `module.init` names them.

    Returns:
      A table with the keys of a specification: the one that was given with another [model], or else
      all keys with their values.

    Raises:
      PruneError: a layer that widths cannot express, such as heads with fewer dimensions.
      SpecError: the specification cannot be run.
    """
    if not isinstance(small, Compact):
        raise PruneError(f'compact_spec takes what jp.compact returns, not {shown(small)}')
    given = spec
    if isinstance(spec, (str, Path)):
        spec = load_spec(spec)
    elif not isinstance(spec, SweepSpec):
        spec = make_spec(spec)
    found, usual = _shapes(small.params), _shapes(_params(spec, {}))
    tree.check_same_paths('parameters of the compact network', found, usual)
    widths = _widths(found, usual)
    _check_padding(spec, small)
    try:
        made = _shapes(_params(spec, widths))
    except JaxpruneError as error:
        raise PruneError(f'the compact network is no {quoted(spec.model.name)}: {error}') from None
    for path, shape in found.items():
        if made[path] != shape:
            raise PruneError(
                f'{quoted(path)} of the compact network has shape {shape}, and {made[path]} in a '
                f'{quoted(spec.model.name)} of such widths: {_reason(path)}'
            )
    table = dict(given) if isinstance(given, Mapping) else resolved(spec)
    dropped = ('params', 'params_sha256', 'layer_widths')
    model = {key: value for key, value in table['model'].items() if key not in dropped}
    return {**table, 'model': {**model, **({'layer_widths': widths} if widths else {})}}


def _params(spec: SweepSpec, widths: Mapping[str, int]) -> PyTree:
    """The parameters of the network with these widths, as shapes."""
    spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, layer_widths=widths))
    net = problem_from_flax(network(spec), data.facts(spec.data.name).shape)
    return jax.eval_shape(net.init, jax.random.key(0))[0]


def _shapes(params: PyTree) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in tree.paths(params)}


def _widths(
    found: Mapping[str, tuple[int, ...]], usual: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    """The layers that have not as many units as usual, and how many they have."""
    widths = {}
    for path, shape in usual.items():
        layer, _, name = path.rpartition('/')
        axis = -1
        if name == 'kernel' and len(shape) == 3:  # of attention
            layer, _, part = layer.rpartition('/')
            if part != 'query':
                continue
            axis = 1
        same_rank = len(found[path]) == len(shape)
        if name == 'kernel' and same_rank and found[path][axis] != shape[axis]:
            widths[layer] = found[path][axis]
    return widths


def _check_padding(spec: SweepSpec, small: Compact) -> None:
    """Refuses shortcuts that pad maps with zeros where some of the maps are gone.

    As many zeros before as after is what the model has, and which of them are left no width says.
    """
    if spec.model.options.get('shortcut') != 'pad':
        return
    for path, axes in small.kept.items():
        layer = path.removesuffix('/kernel')
        if 3 in axes and layer.endswith(('stem_conv', '_b_conv')):
            raise PruneError(
                f"{quoted(layer)} has lost units, and with model.shortcut = 'pad' widths do not "
                "say which of them are padded: use 'projection', or keep them"
            )


def _reason(path: str) -> str:
    """What it is that widths do not say."""
    return 'heads keep all dimensions' if '/attention_' in path else 'no width makes it so'
