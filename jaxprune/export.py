"""Compact networks in files that run without jaxprune, and without the code of the network.

One file in the safetensors format holds the parameters, the statistics and the function, the last
as bytes of `jax.export`. Any program with jax and safetensors runs it:

    tensors = safetensors.numpy.load_file('small.safetensors')
    program = jax.export.deserialize(bytearray(tensors.pop('program')))
    program.call(tensors, x)
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from jaxprune import tree
from jaxprune.errors import PruneError, StoreError, first_line, quoted, shown
from jaxprune.files import write_whole
from jaxprune.structure import Compact
from jaxprune.types import PyTree

#: Where the function is to run; those for which it cannot be lowered are left out.
_PLATFORMS = ('cpu', 'cuda', 'tpu')
_FORMAT = 'jaxprune compact 1'
#: The metadata under the names of safetensors, whose values are text.
_KEY = 'compact'
_PROGRAM, _PARAMS, _STATE = 'program', 'params/', 'model_state/'


class Saved(NamedTuple):
    """What `save_compact` wrote.

    Attributes:
      file: where.
      size: of the file, in bytes.
      batch: the number of examples that the function takes; None for any.
      platforms: where it runs: 'cpu', 'cuda' (NVIDIA), 'tpu'.
      notes: what it does not do, and why.
    """

    file: Path
    size: int
    batch: int | None
    platforms: tuple[str, ...]
    notes: tuple[str, ...]


def save_compact(
    file: str | os.PathLike, small: Compact, x: PyTree, *, vjp_order: int = 0
) -> Saved:
    """Writes a compact network as one safetensors file, with its function.

        jp.save_compact('small.safetensors', small, x)

    The file is written whole or not at all. It has arrays `params/PATH` and `model_state/PATH`,
    `program` (the function, see above), and JSON in its metadata: which indices are kept, how many
    groups were removed, shapes and types of the inputs. The function takes any number of examples
    if the first axes of all inputs agree and it can be traced so; else as many as `x` has. The
    optimizer's state is not written.

    Args:
      file: its path; a file that stands there is replaced.
      small: from `compact`.
      x: inputs, arrays or shapes.
      vjp_order: how often the function can be differentiated when it is loaded.

    Raises:
      PruneError: not a compact network; inputs that it does not take; arrays of a type that
        safetensors lacks; inputs or outputs in containers that `jax.export` cannot write.
      StoreError: the file cannot be written.
    """
    if not isinstance(small, Compact):
        raise PruneError(f'save_compact takes what jp.compact returns, not {shown(small)}')
    tensors = _tensors(small)
    program, notes = _program(small, tensors, x)
    try:
        code = program.serialize(vjp_order=vjp_order)
    except Exception as error:
        raise PruneError(
            f'the function cannot be written: {_line(error)}; inputs and outputs must be arrays in '
            'dicts, lists or tuples'
        ) from error
    inputs = program.in_avals[len(tensors) :]
    tensors[_PROGRAM] = np.frombuffer(code, np.uint8)
    header = {
        'format': _FORMAT,
        'jax': jax.__version__,
        'inputs': [{'shape': list(map(_size, a.shape)), 'dtype': str(a.dtype)} for a in inputs],
        'platforms': list(program.platforms),
        'notes': notes,
        'params': _skeleton(small.params),
        'model_state': _skeleton(small.model_state),
        'kept': {
            path: {str(axis): at.tolist() for axis, at in axes.items()}
            for path, axes in small.kept.items()
        },
        'removed': small.removed,
        'sha256': _digest(tensors),
    }
    content = _serialized(tensors, header)
    try:
        write_whole(Path(file), content)
    except OSError as error:
        raise StoreError(f'{file}: cannot be written ({error})') from error
    is_open = any(not isinstance(n, int) for a in inputs for n in a.shape)
    first = next((a.shape[0] for a in inputs if a.shape), None)
    batch = None if is_open else first
    return Saved(Path(file), len(content), batch, tuple(program.platforms), tuple(notes))


def load_arrays(file: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a file that `save_compact` wrote: `params/PATH` and `model_state/PATH`.

    Raises:
      StoreError: see `load_compact`.
    """
    tensors, _ = _read(Path(file))
    return {name: array for name, array in tensors.items() if name != _PROGRAM}


def load_compact(file: str | os.PathLike) -> Compact:
    """Reads a compact network that `save_compact` wrote.

    Its `apply` is the saved function: it can be jitted, takes other parameters of the same paths
    and shapes, and can be differentiated as often as it was saved for. Trees are dicts, lists and
    tuples as they were; containers of other types become dicts by path.

    Raises:
      StoreError: no such file, or one that is broken, or that `save_compact` did not write; a
        number type that jax does not have switched on.
    """
    tensors, header = _read(Path(file))
    try:
        program = export.deserialize(bytearray(tensors.pop(_PROGRAM).tobytes()))
    except Exception as error:
        raise StoreError(
            f'{file}: this jax {jax.__version__} cannot read the function of jax {header["jax"]} '
            f'({_line(error)})'
        ) from error
    arrays = {name: jnp.asarray(a) for name, a in tensors.items()}
    for name, array in tensors.items():
        if arrays[name].dtype != array.dtype:
            raise StoreError(
                f"{file}: {quoted(name)} has {array.dtype}: switch on 'jax_enable_x64' first"
            )
    kept = {
        path: {int(axis): np.asarray(at, np.int64) for axis, at in axes.items()}
        for path, axes in header['kept'].items()
    }
    params = _tree(header['params'], arrays, _PARAMS)
    state = _tree(header['model_state'], arrays, _STATE)
    return Compact(_applied(program, arrays), params, state, None, kept, header['removed'])


# --- the function -------------------------------------------------------------------------------


def _program(
    small: Compact, tensors: Mapping[str, np.ndarray], x: PyTree
) -> tuple[export.Exported, list[str]]:
    """The function of `(tensors, x)`, for any number of examples if it can be, and notes."""
    params, state = (jax.tree.structure(t) for t in (small.params, small.model_state))
    order = [list(_named(t, p)) for t, p in ((small.params, _PARAMS), (small.model_state, _STATE))]

    def call(tensors: Mapping[str, jax.Array], x: PyTree) -> PyTree:
        ours, theirs = ([tensors[name] for name in names] for names in order)
        states = () if small.model_state is None else (jax.tree.unflatten(state, theirs),)
        return small.apply(jax.tree.unflatten(params, ours), *states, x)

    shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in tensors.items()}
    given = jax.eval_shape(lambda x: x, x)
    notes = []
    firsts = {s.shape[:1] for s in jax.tree.leaves(given)}
    if len(firsts) == 1 and () not in firsts:
        [b] = export.symbolic_shape('b')
        opened = jax.tree.map(lambda s: jax.ShapeDtypeStruct((b, *s.shape[1:]), s.dtype), given)
        try:
            return _lowered(call, (shapes, opened), notes), notes
        except Exception as error:  # whatever a function makes of a size that is not a number
            notes = [f'it takes as many examples as it was saved with: {_line(error)}']
    else:
        notes = ['it takes inputs of these shapes only: their first axes differ']
    try:
        return _lowered(call, (shapes, given), notes), notes
    except PruneError:
        raise
    except Exception as error:
        raise PruneError(f'the function cannot be exported: {_line(error)}') from error


def _lowered(call: Callable, arguments: tuple, notes: list[str]) -> export.Exported:
    """The function for all platforms that it can be lowered for; notes name the others."""

    def on(*platforms: str) -> export.Exported:
        return export.export(jax.jit(call), platforms=platforms)(*arguments)

    try:
        return on(*_PLATFORMS)
    except Exception as error:
        missing: dict[str, str] = {}
        for platform in _PLATFORMS:
            try:
                on(platform)
            except Exception as reason:
                missing[platform] = _line(reason)
        if len(missing) == len(_PLATFORMS):
            raise error
    notes += [f'it does not run on {platform}: {reason}' for platform, reason in missing.items()]
    return on(*(p for p in _PLATFORMS if p not in missing))


def _applied(program: export.Exported, tensors: Mapping[str, jax.Array]) -> Callable[..., PyTree]:
    """`(params, x) -> outputs`, with the state between them if there is one."""
    arguments, _ = jax.tree.unflatten(program.in_tree, program.in_avals)
    shapes, inputs = arguments
    stateful = any(name.startswith(_STATE) for name in tensors)

    def apply(params: PyTree, *rest: PyTree) -> PyTree:
        if len(rest) != 1 + stateful:
            raise PruneError(f'apply takes {"params, model_state, x" if stateful else "params, x"}')
        *states, x = rest
        given = _named(params, _PARAMS)
        for state in states:
            given |= _named(state, _STATE)
        tree.check_same_paths('arrays', given, shapes)
        for name, leaf in given.items():
            _check(name, leaf, shapes[name])
        if jax.tree.structure(x) != jax.tree.structure(inputs):
            raise PruneError(f'the input has another structure than {shown(inputs)}')
        sizes = set()
        for (path, leaf), aval in zip(tree.paths(x), jax.tree.leaves(inputs), strict=True):
            sizes.add(_check(path or 'x', leaf, aval))
        if len(sizes - {None}) > 1:
            raise PruneError(f'the inputs have {sorted(sizes - {None})} examples: not as many each')
        return program.call(given, jax.tree.map(jnp.asarray, x))

    return apply


def _check(name: str, leaf: Any, aval: Any) -> int | None:
    """Raises PruneError unless an array is what the function takes; the size left open."""
    shape, dtype = jnp.shape(leaf), jax.dtypes.canonicalize_dtype(jnp.result_type(leaf))
    pairs = list(zip(shape, aval.shape, strict=False))
    fits = len(shape) == len(aval.shape) and all(
        a == b if isinstance(b, int) else not isinstance(a, int) or a > 0 for a, b in pairs
    )
    if not fits or dtype != aval.dtype:
        wanted = ', '.join(str(_size(n)) for n in aval.shape)
        raise PruneError(
            f'{quoted(name)} is {dtype} of shape {tuple(shape)}: the function takes {aval.dtype} '
            f'of shape ({wanted})'
        )
    return next((a for a, b in pairs if not isinstance(b, int)), None)


# --- the file -----------------------------------------------------------------------------------


def _tensors(small: Compact) -> dict[str, np.ndarray]:
    """The arrays of a network by their names in the file."""
    named = _named(small.params, _PARAMS) | _named(small.model_state, _STATE)
    for name, leaf in named.items():
        if jax.dtypes.issubdtype(jnp.result_type(leaf), jax.dtypes.extended):
            raise PruneError(f'{quoted(name)} has {leaf.dtype}, which no file holds')
    # Not `ascontiguousarray`: it makes a number an array of one axis.
    return {name: np.asarray(leaf, order='C') for name, leaf in named.items()}


def _named(leaves: PyTree, prefix: str) -> dict[str, Any]:
    return {prefix + path: leaf for path, leaf in tree.paths(leaves)}


def _size(n: Any) -> int | str:
    return n if isinstance(n, int) else str(n)


def _line(error: BaseException) -> str:
    return first_line(error)[:200]


def _digest(tensors: Mapping[str, np.ndarray]) -> str:
    made = hashlib.sha256()
    for name, array in sorted(tensors.items()):
        made.update(f'{name} {array.dtype} {array.shape} '.encode())
        made.update(np.asarray(array, order='C').tobytes())
    return made.hexdigest()


def _serialized(tensors: Mapping[str, np.ndarray], header: dict[str, Any]) -> bytes:
    from safetensors import SafetensorError
    from safetensors.numpy import save

    try:
        return save(dict(tensors), {_KEY: json.dumps(header, sort_keys=True)})
    except SafetensorError as error:
        raise PruneError(f'the arrays cannot be written: {_line(error)}') from error


def _read(file: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the metadata of a file.

    Raises:
      StoreError: see `load_compact`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework='np') as opened:
            text = (opened.metadata() or {}).get(_KEY)
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise StoreError(f'{file}: no such file') from None
    except OSError as error:
        raise StoreError(f'{file}: cannot be read ({error})') from error
    except SafetensorError as error:
        raise StoreError(f'{file}: broken, or no safetensors file ({_line(error)})') from error
    try:
        header = json.loads(text or '{}')
    except ValueError:
        raise StoreError(f'{file}: its metadata are broken') from None
    if header.get('format') != _FORMAT:
        raise StoreError(f"{file}: not a file of save_compact, or of another version than '1'")
    if header.get('sha256') != _digest(tensors):
        raise StoreError(f'{file}: broken: its arrays are not those that were written')
    return tensors, header


# --- trees --------------------------------------------------------------------------------------


def _skeleton(leaves: PyTree) -> Any:
    """A tree as JSON: its leaves are their paths, its containers `{}` or `[type, ...]`.

    With containers of other types than dict, list and tuple: dicts by path.
    """
    names = [path for path, _ in tree.paths(leaves)]

    def written(node: Any) -> Any:
        if node is None or isinstance(node, str):
            return node
        if type(node) is dict and all(isinstance(k, str) for k in node):
            return {key: written(value) for key, value in node.items()}
        if type(node) in (list, tuple):
            return [type(node).__name__, *map(written, node)]
        raise TypeError

    try:
        return written(jax.tree.unflatten(jax.tree.structure(leaves), names))
    except TypeError:
        return _by_path(names)


def _by_path(names: Sequence[str]) -> dict[str, Any]:
    """Nested dicts with a leaf at each path."""
    made: dict[str, Any] = {}
    for name in names:
        *parents, last = name.split('/')
        inner = made
        for key in parents:
            inner = inner.setdefault(key, {})
        inner[last] = name
    return made


def _tree(skeleton: Any, arrays: Mapping[str, Any], prefix: str) -> PyTree:
    """The tree that `_skeleton` wrote, with its arrays."""
    if skeleton is None:
        return None
    if isinstance(skeleton, str):
        return arrays[prefix + skeleton]
    if isinstance(skeleton, dict):
        return {key: _tree(value, arrays, prefix) for key, value in skeleton.items()}
    made = [_tree(value, arrays, prefix) for value in skeleton[1:]]
    return tuple(made) if skeleton[0] == 'tuple' else made
