"""Gates: a number for each unit that multiplies it, in any traced network and none of its code.

A gate of one changes nothing, a gate of zero removes the unit, and the slope of the loss along a
gate is what the unit contributes to it (Molchanov et al., 2019, arXiv:1906.10771).
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn, Literal

from jaxprune.errors import PruneError, check_choice, nearest, quoted
from jaxprune.structure.coupling import Coupling, Visit, coupling
from jaxprune.structure.groups import Coupled, found_in
from jaxprune.structure.resized import Left, resized
from jaxprune.structure.sites import PLACES, Site, loud, sites
from jaxprune.types import Gates, PyTree

#: What happens to an array at a site.
_Change = Callable[[Site, Any], Any]


def gates(coupled: Coupled, place: str = 'norm', families: Collection[str] | None = None) -> Gates:
    """Puts a gate on every unit of some families.

        read = jp.groups(apply, params, x)
        gated = jp.structure.gates(read, 'activation')
        ones = {name: jnp.ones(n) for name, n in gated.sizes.items()}
        slopes = jax.grad(lambda g: loss(gated.apply(g, params, x)))(ones)

    Layers whose units go together, as in a residual sum, share a gate. It sits in each of them, so
    its slope is the sum of theirs; where two of them are multiplied, as in a gated unit, it counts
    twice, and 'read' is the place to compare such units with others. Any number of examples fits.

    Args:
      coupled: the groups of a function.
      place: 'output', after the product that makes a unit and its bias, where a norm behind it
        makes something of zero again; 'norm', after whatever else is affine (Taylor's importance
        is best there); 'activation', after all operations on single entries; 'read', on what the
        next products with parameters read, where heads of attention have their gates. Without
        such operations a place is the one before it.
      families: their names; None for all that may go and have such a place.

    Raises:
      PruneError: another place; a family that there is not, or that has no such place; when
        applied, units that still act behind a gate of zero, since a bias comes later.
    """
    check_choice('place', place, PLACES)
    known = {family.name: family for family in coupled.families}
    chosen = [f.name for f in coupled.families if not f.reason] if families is None else families
    if missing := next((name for name in chosen if name not in known), None):
        near = nearest(missing, known)
        raise PruneError(f'there is no family of groups {quoted(missing)}: {near}')
    sizes = {name: known[name].size for name in chosen}
    ordered: dict[str, list[Site]] = {name: [] for name in sizes}
    where = sites(coupled, place, sizes)
    for site in (s for own in where.values() for s in own):
        ordered[site.family].append(site)
    lost = [name for name, own in ordered.items() if not own]
    if lost and families is not None:
        raise PruneError(f"{quoted(lost[0])} has no place '{place}' for a gate")
    for name in lost:  # such as dimensions of queries, which no parameter reads
        del sizes[name], ordered[name]
    # At 'read' nothing is left to prove, and at 'output' a norm may follow.
    proved = place in ('read', 'output')
    acting = functools.cache(lambda: frozenset() if proved else loud(coupled, where))
    run = _runner(coupled.coupling, place, sizes)

    def apply(values: Mapping[str, jax.Array], params: PyTree, x: PyTree, *states: PyTree):
        _check_gates(values, ordered, sizes)
        _check_silent(coupled, place, acting(), values)

        def gate(site: Site, array: jax.Array) -> jax.Array:
            own = values[site.family]
            own = jnp.asarray(own[site.number] if isinstance(own, (list, tuple)) else own)
            longer = lax.concatenate([own, np.ones(1, own.dtype)], 0)
            factor = lax.reshape(longer[site.numbers], _along(site, array))
            return array * factor.astype(array.dtype)

        return run(gate, values, (params, x, *states))

    def activations(params: PyTree, x: PyTree, *states: PyTree) -> dict[str, list[jax.Array]]:
        seen: dict[str, list[jax.Array]] = {name: [] for name in sizes}

        def note(site: Site, array: jax.Array) -> jax.Array:
            seen[site.family].append(array)
            return array

        _outside(ordered)
        run(note, sizes, (params, x, *states))
        return seen

    def shifted(shifts: Mapping[str, Sequence[jax.Array]], params: PyTree, x: PyTree, *states):
        _outside({name: ordered[name] for name in shifts})
        return run(
            lambda site, array: array + shifts[site.family][site.number],
            shifts,
            (params, x, *states),
        )

    def by_unit(arrays: Mapping[str, Sequence[jax.Array]]) -> dict[str, jax.Array]:
        return {
            name: sum(
                _summed(array, site, sizes[name])
                for array, site in zip(own, ordered[name], strict=True)
            )
            for name, own in arrays.items()
        }

    def tail(names: Collection[str], params: PyTree, x: PyTree, *states: PyTree) -> Callable:
        like = {name: jnp.ones(sizes[name]) for name in names}
        return _tail(apply, like, params, x, *states)

    counts = {name: len(own) for name, own in ordered.items()}
    return Gates(sizes, counts, apply, activations, shifted, by_unit, tail)


def _runner(
    read: Coupling, place: str, names: Mapping[str, int]
) -> Callable[[_Change, Collection[str], Sequence[PyTree]], PyTree]:
    """`(change, names, arguments) -> outputs` of the program with changes at its sites."""

    @functools.cache
    def program(structure: Any, leaves: tuple) -> tuple[Coupling, dict[int, list[Site]]]:
        args = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
        again = coupling(read.forward, *args, sliced=read.sliced, unknown=read.unknown)
        return again, sites(found_in(again), place, names)

    def run(change: _Change, chosen: Collection[str], arguments: Sequence[PyTree]) -> PyTree:
        leaves, structure = jax.tree.flatten(tuple(arguments))
        leaves = [jnp.asarray(leaf) for leaf in leaves]
        again, where = program(structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))

        def touch(visit: Visit, arrays: list[Any], taken: bool) -> list[Any]:
            for site in where.get(id(visit), ()):
                if site.taken == taken and site.family in chosen:
                    arrays[site.position] = change(site, arrays[site.position])
            return arrays

        made = resized(again, Left(again, ()), touch)(*leaves)
        return jax.tree.unflatten(jax.tree.structure(again.traced.outputs), made)

    return run


def _along(site: Site, array: jax.Array) -> list[int]:
    """The shape of a vector that is broadcast along the axis of a site."""
    return [n if i == site.axis else 1 for i, n in enumerate(array.shape)]


def _summed(array: jax.Array, site: Site, size: int) -> jax.Array:
    """The sum over everything but the units: `(units,)`."""
    others = tuple(i for i in range(array.ndim) if i != site.axis)
    return jax.ops.segment_sum(array.sum(others), site.numbers, size + 1)[:size]


def _check_silent(
    coupled: Coupled, place: str, acting: Collection[int], names: Collection[str]
) -> None:
    """Raises PruneError where a gate of zero does not remove the unit."""
    for family in coupled.families:
        if family.name in names and acting & set(family.units):
            raise PruneError(
                f"{quoted(family.name)} still acts behind a gate at place '{place}', as where a "
                "bias is added to a sum: take place = 'read'"
            )


def _check_gates(
    values: Mapping[str, Any], ordered: Mapping[str, Sequence[Site]], sizes: Mapping[str, int]
) -> None:
    """Raises PruneError for gates of unknown layers or of other numbers."""
    for name, own in values.items():
        if name not in sizes:
            raise PruneError(f'there is no layer {quoted(name)} with gates: {nearest(name, sizes)}')
        parts = own if isinstance(own, (list, tuple)) else [own] * len(ordered[name])
        if len(parts) != len(ordered[name]):
            raise PruneError(
                f'{quoted(name)} has {len(ordered[name])} places, not {len(parts)}: one array for '
                'all, or a list with one for each'
            )
        for part in parts:
            if jnp.shape(part) != (sizes[name],):
                raise PruneError(
                    f'gates of {quoted(name)} have the shape ({sizes[name]},), not '
                    f'{jnp.shape(part)}'
                )


def _outside(ordered: Mapping[str, Sequence[Site]]) -> None:
    for name, own in ordered.items():
        if any(site.inside for site in own):
            raise PruneError(
                f'{quoted(name)} is made inside a loop: its values are many, take gates'
            )


def _tail(apply: Callable[..., PyTree], like: PyTree, *args: PyTree) -> Callable[[PyTree], PyTree]:
    """`gates -> outputs`; what does not depend on the gates is computed once, here."""

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        leaf = jnp.asarray(leaf)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    traced, outputs = jax.make_jaxpr(apply, return_shape=True)(*jax.tree.map(shape, (like, *args)))
    jaxpr, count = traced.jaxpr, len(jax.tree.leaves(like))
    moving = set(jaxpr.invars[:count])
    head: list[JaxprEqn] = []
    rest: list[JaxprEqn] = []
    for equation in jaxpr.eqns:
        depends = any(not isinstance(v, Literal) and v in moving for v in equation.invars)
        (rest if depends else head).append(equation)
        moving.update(equation.outvars if depends else ())
    fixed = dict(zip(jaxpr.constvars, traced.consts, strict=True))
    fixed |= dict(zip(jaxpr.invars[count:], jax.tree.leaves(args), strict=True))
    known = _evaluated(head, fixed)

    def outputs_of(gates: PyTree) -> PyTree:
        leaves = [
            jnp.asarray(leaf).astype(var.aval.dtype)
            for leaf, var in zip(jax.tree.leaves(gates), jaxpr.invars[:count], strict=True)
        ]
        given = dict(zip(jaxpr.invars[:count], leaves, strict=True))
        values = _evaluated(rest, known | given)
        leaves = [v.val if isinstance(v, Literal) else values[v] for v in jaxpr.outvars]
        return jax.tree.unflatten(jax.tree.structure(outputs), leaves)

    return outputs_of


def _evaluated(equations: Sequence[JaxprEqn], values: Mapping[Any, Any]) -> dict[Any, Any]:
    """The values of variables after some equations."""
    values = dict(values)
    for equation in equations:
        arrays = [v.val if isinstance(v, Literal) else values[v] for v in equation.invars]
        params = equation.primitive.get_bind_params(equation.params)
        made = equation.primitive.bind(*arrays, **params)
        made = made if equation.primitive.multiple_results else [made]
        values.update(zip(equation.outvars, made, strict=True))
    return values
