"""`model.params`: a file of parameters from which all runs of a sweep start."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import tree
from jaxprune.errors import JaxpruneError, SpecError, StoreError, quoted
from jaxprune.export import load_arrays
from jaxprune.sweep.spec import ModelSpec
from jaxprune.types import Key, Problem, PyTree


def located(model: ModelSpec, folder: Path, source: str) -> ModelSpec:
    """The section with the absolute path of its file and the hash of the content.

    A hash that stands there already is kept: `starting_from` compares it.

    Args:
      folder: where relative paths begin.

    Raises:
      SpecError: there is no such file.
    """
    if not model.params:
        if model.params_sha256:
            raise SpecError(f'{source}: model.params_sha256: goes with model.params')
        return model
    try:
        file = os.path.abspath(folder / model.params)
        found = model.params_sha256 or _hash_of(file)
    except JaxpruneError as error:
        raise SpecError(f'{source}: model.params: {" ".join(str(error).split())}') from None
    return dataclasses.replace(model, params=file, params_sha256=found)


def same_content(model: ModelSpec) -> ModelSpec:
    """The section as far as results depend on it: what is in the file counts, not where it lies."""
    return dataclasses.replace(model, params='')


def starting_from(net: Problem, model: ModelSpec) -> Problem:
    """The network with the parameters and statistics of the section's file in place of drawn ones.

    Raises:
      SpecError: the file is broken, was changed, or does not fit the network.
    """
    if not model.params:
        return net
    arrays = _arrays(model.params, model.params_sha256)
    params, state = jax.eval_shape(net.init, jax.random.key(0))
    wanted = [*_named('params', params), *_named('model_state', state)]
    for name, leaf in wanted:
        if name not in arrays:
            raise SpecError(f'model.params: {quoted(name)} is not in {model.params}')
        if arrays[name].shape != leaf.shape:
            raise SpecError(
                f'model.params: {quoted(name)} has shape {arrays[name].shape} in the file and '
                f'{leaf.shape} in the model'
            )
        if not jnp.issubdtype(arrays[name].dtype, jnp.floating):
            raise SpecError(f'model.params: {quoted(name)} holds {arrays[name].dtype}')
        if not np.isfinite(arrays[name].astype(np.float32)).all():
            raise SpecError(f'model.params: {quoted(name)} holds numbers that are not finite')
    if more := sorted(set(arrays) - {name for name, _ in wanted}):
        raise SpecError(f'model.params: the model has no {quoted(more[0])}')

    def init(key: Key) -> tuple[PyTree, PyTree]:
        del key  # the same for all runs
        leaves = [jnp.asarray(arrays[name], leaf.dtype) for name, leaf in wanted]
        return jax.tree.unflatten(jax.tree.structure((params, state)), leaves)

    return net._replace(init=init)


def _named(prefix: str, leaves: PyTree) -> list[tuple[str, Any]]:
    return [(f'{prefix}/{path}', leaf) for path, leaf in tree.paths(leaves)]


@functools.lru_cache(maxsize=1)
def _arrays(file: str, sha256: str) -> Mapping[str, np.ndarray]:
    """The arrays in a file of this content; kept, as every program of a sweep asks for them."""
    try:
        if _hash_of(file) != sha256:
            raise StoreError(f'{file}: is not the file of model.params_sha256: it was changed')
        return load_arrays(file)
    except JaxpruneError as error:
        raise SpecError(f'model.params: {error}') from None


def _hash_of(file: str) -> str:
    try:
        with open(file, 'rb') as opened:
            return hashlib.file_digest(opened, 'sha256').hexdigest()
    except FileNotFoundError:
        raise StoreError(f'{file}: no such file') from None
    except (OSError, ValueError) as error:  # such as a null in the name
        raise StoreError(f'{file}: cannot be read ({error})') from None
