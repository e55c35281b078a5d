"""Which entries of parameters act together, found by trying: it knows nothing of the traced graph.

An entry is alive if the outputs change with it: its derivative, in float64 and for several random
networks, is not zero. A slice depends on another one if whether it is alive depends on whether the
other one is zero, whatever else is zero. What is coupled must depend on each other, and nothing
that dies with a group may be missing from it.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from structured_fuzz import arguments

#: Networks that are tried: an entry is dead if it is dead in all of them.
DRAWS = 12


class Slice(NamedTuple):
    """Indices along an axis of a parameter."""

    path: str
    axis: int
    role: str
    indices: tuple[int, ...]

    def of(self, arrays):
        """The slice, with its axis first."""
        return np.moveaxis(arrays[self.path], self.axis, 0)[list(self.indices)]

    def clear(self, arrays):
        np.moveaxis(arrays[self.path], self.axis, 0)[list(self.indices)] = 0


class Oracle:
    """Tries a network whose parameters are a dict of arrays."""

    def __init__(self, case, rng):
        self._case = case
        shapes = {k: np.shape(a) for k, a in case.params.items()}
        self._drawn = [
            {k: rng.normal(size=s) / np.sqrt(max((*s[:1], 2))) for k, s in shapes.items()}
            for _ in range(DRAWS)
        ]
        outputs = jax.eval_shape(case.apply, *arguments(case.params, case.state, case.x))
        weights = [rng.normal(size=o.shape) for o in jax.tree.leaves(outputs)]

        def total(params):
            out = case.apply(*arguments(params, case.state, case.x))
            return sum(jnp.vdot(w, o) for w, o in zip(weights, jax.tree.leaves(out), strict=True))

        self._slopes = jax.jit(lambda stack: jax.lax.map(jax.grad(total), stack, batch_size=64))

    def alive(self, configurations):
        """For each list of slices that are zero: path -> which entries are alive."""
        networks = []
        for zeroed in configurations:
            for drawn in self._drawn:
                arrays = {k: a.copy() for k, a in drawn.items()}
                for one in zeroed:
                    one.clear(arrays)
                networks.append(arrays)
        size = -(-len(networks) // 64) * 64  # whole batches: one program
        networks += networks[:1] * (size - len(networks))
        step, found = 1024, []
        for first in range(0, size, step):
            part = networks[first : first + step]
            part += part[:1] * ((step if size > step else size) - len(part))
            stack = {k: np.stack([n[k] for n in part]) for k in part[0]}
            slopes = jax.tree.map(np.asarray, self._slopes(stack))
            found.append({k: np.abs(a) > 1e-12 for k, a in slopes.items()})
        every = {k: np.concatenate([f[k] for f in found]) for k in found[0]}
        return [
            {k: a[i * DRAWS : (i + 1) * DRAWS].any(0) for k, a in every.items()}
            for i in range(len(configurations))
        ]


def slices_of(family, number, apart):
    """The slices of a group; `apart`: every index is one."""
    made = []
    for m in family.members:
        if m.role != 'state':
            at = tuple(map(int, m.indices[number]))
            made += [Slice(m.path, m.axis, m.role, (i,)) for i in at] if apart else [
                Slice(m.path, m.axis, m.role, at)
            ]  # fmt: skip
    return made


def marked(slices, shapes):
    """Path -> which entries are in these slices."""
    made = {k: np.zeros(s, bool) for k, s in shapes.items()}
    for one in slices:
        np.moveaxis(made[one.path], one.axis, 0)[list(one.indices)] = True
    return made


def faults(case, families, rng, apart=True):
    """What is wrong with the groups of a network, in words."""
    oracle, shapes = Oracle(case, rng), {k: np.shape(a) for k, a in case.params.items()}
    groups = [(f, n) for f in families if not f.reason for n in sorted({0, f.size - 1})]
    plans, configurations = [], [[]]
    for family, number in groups:
        own = slices_of(family, number, apart and family.kind == 'unit')
        silent = [s for s in own if s.role != 'in']
        tries = _tries(len(own), rng) if len(own) <= 8 else []
        zeroed = [[own[i] for i in sorted(t)] for t in tries]
        plans.append((family, number, own, len(configurations), tries))
        configurations += [own, silent, *zeroed]
    found = oracle.alive(configurations)
    dense, wrong = found[0], []
    for family, number, own, at, tries in plans:
        name = f'group {number} of {family.name}'
        gone, quiet, states = found[at], found[at + 1], found[at + 2 : at + 2 + len(tries)]
        claimed = marked(own, shapes)
        wrong += [
            f'{name}: part of {k} dies with it and is not in it'
            for k in shapes
            if (dense[k] & ~gone[k] & ~claimed[k]).any()
        ]
        readers = [s for s in own if s.role == 'in']
        if not family.zero_invariant:
            # Where an array is repeated, what makes one copy does not silence it: slices go
            # together because their axis is one, whatever is zero.
            continue
        wrong += [f'{name}: {s} hears others' for s in readers if s.of(quiet).any()]
        if tries and not _connected(own, tries, states):
            wrong.append(f'{name}: its slices do not depend on each other')
    return wrong


def _tries(count, rng):
    """Sets of slices that are zero, and each with one more."""
    everything = set(range(count))
    few = [set(t) for n in range(min(count, 3) + 1) for t in itertools.combinations(everything, n)]
    bases = [set(), *(set(np.flatnonzero(rng.integers(0, 2, count)).tolist()) for _ in range(4))]
    made = {frozenset(everything - t) for t in few} | {frozenset(b) for b in bases}
    made |= {frozenset({*b, j}) for b in bases for j in everything - b}
    return sorted(made, key=sorted)


def _connected(own, tries, states):
    """Are all slices linked by dependences?"""
    alive = {
        (t, i): own[i].of(state).any()
        for t, state in zip(tries, states, strict=True)
        for i in range(len(own))
        if i not in t
    }
    ever = {i for (_, i), is_alive in alive.items() if is_alive}  # others read constants
    root = list(range(len(own)))

    def find(i):
        while root[i] != i:
            i = root[i]
        return i

    for t, i in alive:
        for j in range(len(own)):
            other = t | {j}
            if j != i and j not in t and (other, i) in alive and alive[other, i] != alive[t, i]:
                root[find(i)] = find(j)
    return len({find(i) for i in ever}) <= 1
