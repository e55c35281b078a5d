"""Random architectures for coupled groups: what is drawn, how it is masked, and what must hold.

An architecture is a list of blocks and a seed. Blocks are in `structured_fuzz_blocks`: plain
functions of an array with a channel axis. They draw their choices from a generator of their own, so
that a network is the same function whenever it is traced. Widths come from a few small numbers:
axes often coincide.
"""

import re
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from jaxprune import tree
from jaxprune.errors import PruneError

#: Most axes are as long as some other axis.
WIDTHS = (2, 3, 4, 4, 6, 8)


class Signal(NamedTuple):
    """An activation: an array whose first axis is the batch, and the axis of its channels."""

    x: Any
    c: int

    @property
    def width(self):
        return self.x.shape[self.c]

    @property
    def space(self):
        """The axes that are neither batch nor channels."""
        return [i for i in range(1, self.x.ndim) if i != self.c]

    def along(self, vector):
        """A vector over the channels, in the rank of the signal."""
        return vector.reshape([-1 if i == self.c else 1 for i in range(self.x.ndim)])

    def last(self):
        """The array with its channels last."""
        return jnp.moveaxis(self.x, self.c, -1)

    def like(self, last):
        """The same layout, from an array with channels last."""
        return Signal(jnp.moveaxis(last, -1, self.c), self.c)


class Net:
    """The parameters and statistics of a network: shapes are noted first, arrays read later."""

    def __init__(self, arrays=None, states=None, dtype=jnp.float32):
        self.arrays, self.states, self.dtype = arrays, states, dtype
        self.shapes, self.state_shapes = {}, {}
        self.scope = []

    def inside(self, name):
        """A part of the network with names of its own."""
        part = Net.__new__(Net)
        part.__dict__.update(self.__dict__, scope=[*self.scope, name])
        return part

    def rng(self):
        """A generator of its own for each part."""
        return np.random.default_rng(zlib.crc32('/'.join(map(str, self.scope)).encode()))

    def param(self, name, *shape):
        return self._read('.'.join([*self.scope[1:], name]), shape, self.arrays, self.shapes)

    def state(self, name, *shape):
        return self._read('.'.join([*self.scope[1:], name]), shape, self.states, self.state_shapes)

    def _read(self, name, shape, arrays, shapes):
        if arrays is not None:
            return arrays[name]
        shapes[name] = shape
        return jnp.zeros(shape, self.dtype)


class Case(NamedTuple):
    """A network with arguments.

    Attributes:
      apply: `(params, x)`, or `(params, state, x)` if there is a state.
      params, state, x: its arguments, NumPy arrays.
      name: what it is made of.
      trains: it returns the next state too.
    """

    apply: Any
    params: Any
    state: Any
    x: Any
    name: str
    trains: bool = False


def drawn(rng, choices):
    return choices[rng.integers(len(choices))]


def plain(seed, dtype=np.float32, choices=None, most=4):
    """A random network of plain functions, of these blocks."""
    import structured_fuzz_more  # noqa: F401, adds to the blocks
    from structured_fuzz_blocks import BLOCKS
    from structured_fuzz_loops import ends, starts

    rng = np.random.default_rng(seed)
    start, end = drawn(rng, starts), drawn(rng, ends)
    blocks = [drawn(rng, choices or list(BLOCKS)) for _ in range(rng.integers(1, most + 1))]

    def run(net, x):
        root = net.inside(seed)
        signal = start(root.inside('start'), x)
        for i, name in enumerate(blocks):
            part = root.inside(f'{i}{name}')
            signal = BLOCKS[name](part, part.rng(), signal)
        return end(root.inside('end'), signal)

    x = start.input(rng)
    net = Net(dtype=dtype)
    jax.eval_shape(lambda x: run(net, x), jax.ShapeDtypeStruct(*_described(x, dtype)))
    values = np.random.default_rng(seed + 1)
    params = {k: values.normal(size=s) / np.sqrt(max((*s[:1], 2))) for k, s in net.shapes.items()}
    state = {k: values.uniform(0.5, 1.5, size=s) for k, s in net.state_shapes.items()}
    params, state = ({k: a.astype(dtype) for k, a in t.items()} for t in (params, state))
    x = x.astype(dtype) if x.dtype.kind == 'f' else x

    if state:
        apply = lambda params, state, x: run(Net(params, state, dtype), x)  # noqa: E731
    else:
        apply = lambda params, x: run(Net(params, {}, dtype), x)  # noqa: E731
    name = f'{seed}: {start.__name__} {" ".join(blocks)} {end.__name__}'
    return Case(apply, params, state or None, x, name)


def _described(x, dtype):
    return x.shape, dtype if x.dtype.kind == 'f' else x.dtype


def random_masks(case, families, rng, share=0.4, kernels_only=False):
    """Masks that prune some groups of every family, and how many they are."""
    masks = {path: np.ones(np.shape(leaf), bool) for path, leaf in tree.paths(case.params)}
    gone = 0
    for family in families:
        if family.reason:
            continue
        count = min(rng.binomial(family.size, share), family.size - 1)
        for n in rng.choice(family.size, count, replace=False):
            gone += 1
            cut(masks, family, n)
    if kernels_only:
        masks = {path: mask for path, mask in masks.items() if mask.ndim > 1}
    return masks, gone


def cut(masks, family, number):
    """Prunes a group in all masks."""
    for m in family.members:
        if m.role != 'state':
            np.moveaxis(masks[m.path], m.axis, 0)[m.indices[number]] = False


def used(apply, params, x):
    """The parameters that a function reads, without the others."""

    class Noting(dict):
        def __getitem__(self, key):
            read.add(key)
            return super().__getitem__(key)

    read = set()
    jax.eval_shape(lambda x: apply(Noting(params), x), x)
    return {k: a for k, a in params.items() if k in read}


class Outcome(NamedTuple):
    """What became of a case: groups removed, the largest relative error, or why it was refused."""

    removed: int = 0
    error: float = 0.0
    refused: str = ''


def arguments(params, state, x):
    return (params, x) if state is None else (params, state, x)


#: What masks prune: all slices of random groups, those of them in kernels, or slices at random.
MASKS = ('groups', 'kernels', 'ragged')


def ragged_masks(case, families, rng):
    """Some groups, some of their slices only, and slices that belong to nothing."""
    masks, gone = random_masks(case, families, rng, share=0.3)
    for mask in masks.values():
        if mask.ndim and rng.integers(2):
            lines = np.moveaxis(mask, int(rng.integers(mask.ndim)), 0)
            lines[rng.random(len(lines)) < 0.3] = False
        if rng.integers(4) == 0:
            mask[rng.random(mask.shape) < 0.3] = True
    return {path: mask for path, mask in masks.items() if rng.integers(5)}, gone


def compared(case, rng, kind='groups'):
    """The compact network beside the masked one, by random masks of a kind."""
    partial = 'keep' if kind == 'ragged' else 'refuse'
    try:
        found = jp.groups(case.apply, case.params, case.x, case.state)
        if kind == 'ragged':
            masks, gone = ragged_masks(case, found.families, rng)
        else:
            masks, gone = random_masks(case, found.families, rng, kernels_only=kind == 'kernels')
        small = jp.compact(
            case.apply, case.params, masks, case.x, model_state=case.state, partial=partial
        )
    except PruneError as error:
        assert '\n' not in str(error), error
        return Outcome(refused=str(error))
    assert kind != 'groups' or sum(small.removed.values()) == gone, (small.removed, gone)
    masked = tree.apply_masks(case.params, masks)
    want = jax.jit(case.apply)(*arguments(masked, case.state, case.x))
    got = jax.jit(small.apply)(*arguments(small.params, small.model_state, case.x))
    if case.trains:  # the next state is cut as the state is
        out, state = want
        cut = jp.compact(case.apply, case.params, masks, case.x, model_state=state, partial=partial)
        want = out, cut.model_state
    return Outcome(sum(small.removed.values()), largest_error(got, want))


def largest_error(got, want):
    """The largest difference relative to the largest entry; nan where only one is finite."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape and a.dtype == b.dtype
        if a.size:
            assert np.isfinite(b).all(), 'the masked network is not finite'
            worst = max(worst, float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-3)))
    return worst


def kind_of(refusal):
    """A refusal without names, numbers and places."""
    text = re.sub(r"'[^']*'|\S+\.py\S*|\([^)]*\)", '_', refusal)
    return re.sub(r'\d+', 'N', text)[:110]
