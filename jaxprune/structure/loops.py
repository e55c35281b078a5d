"""Paths through a `lax.scan`, followed in a scan: tracing them costs the same at any length.

The arrays of a value (where it is live, what a mask keeps, a known number) run through the loop as
a carry of its own and may differ from step to step. What kind of value it is must not: `_join`
finds the kind that holds before every step.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn

from jaxprune.jaxpr import EquationRule, ScanRule, scan_counts
from jaxprune.structure.patterns import low_of, shut_of
from jaxprune.structure.values import Const, Signal, Weight, array_of

Value = Const | Weight | Signal


def through_scans(rule: EquationRule, roots: itertools.count) -> ScanRule:
    """The scan rule of `interpret` for values of `liveness`.

    The result is that of the unrolled loop, but for two things that are not looked for from one
    step to the next: normalisation by a statistic that was carried, and products with factors
    that are never negative where the carry may be both. There more weights count as active.

    Args:
      rule: that of `liveness`, for a loop that no input and no weight enters.
      roots: gives every new tensor its number.
    """

    def scan(
        equation: JaxprEqn, given: list[Value], step: Callable[[list[Value]], list[Value]]
    ) -> list[Value] | None:
        if not equation.params['length']:
            return None
        known = [array_of(value) is not None for value in given]
        if all(known):
            return list(rule(equation, given))
        n_consts, n_carry = scan_counts(equation)
        first = n_consts + n_carry
        consts, carry, stacks = given[:n_consts], given[n_consts:first], given[first:]
        avals = [atom.aval for atom in equation.invars]
        changing = _changing(equation, n_consts, n_carry)
        rows = [_renumbered(value, roots) for value in stacks]
        row_parts = [_parts(v, v, aval) for v, aval in zip(stacks, avals[first:], strict=True)]

        def run(carried: Sequence[Value], row: list[Any]) -> list[Value]:
            """One step, from the changing part of the carry and the arrays of a row."""
            before = list(carry)
            for place, value in zip(changing, carried, strict=True):
                before[place] = value
            slices = [_with(kind, parts) for kind, parts in zip(rows, row, strict=True)]
            return step([*consts, *before, *slices])

        of_carry = [avals[n_consts + place] for place in changing]
        start = [carry[place] for place in changing]
        kinds = _stable_kinds(run, start, of_carry, row_parts, changing, roots)
        if kinds is None:
            return None
        outputs: list[Value] = []

        def body(carried, row):
            made = run(list(map(_with, kinds, carried)), row)
            outputs[:] = made[n_carry:]
            after = [
                _parts(kind, made[place], aval)
                for kind, place, aval in zip(kinds, changing, of_carry, strict=True)
            ]
            out_avals = [v.aval for v in equation.params['jaxpr'].jaxpr.outvars[n_carry:]]
            return after, [_parts(v, v, aval) for v, aval in zip(outputs, out_avals, strict=True)]

        begin = [_parts(k, v, aval) for k, v, aval in zip(kinds, start, of_carry, strict=True)]
        last, stacked = lax.scan(
            body,
            begin,
            row_parts,
            length=equation.params['length'],
            reverse=equation.params['reverse'],
        )
        ends = list(carry)
        for place, kind, parts in zip(changing, kinds, last, strict=True):
            ends[place] = _renumbered(_with(kind, parts), roots)
        tops = [_stack(v, parts, roots) for v, parts in zip(outputs, stacked, strict=True)]
        return [*ends, *tops]

    return scan


def _changing(equation: JaxprEqn, n_consts: int, n_carry: int) -> list[int]:
    """The places of the carry that a step does not hand on as they are."""
    body = equation.params['jaxpr'].jaxpr
    before, after = body.invars[n_consts : n_consts + n_carry], body.outvars[:n_carry]
    return [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a is not b]


def _stable_kinds(
    run: Callable[..., list[Value]],
    start: Sequence[Value],
    avals: Sequence[Any],
    row_parts: Any,
    changing: Sequence[int],
    roots: itertools.count,
) -> list[Value] | None:
    """Kinds of the carry that hold before every step; None where there are none."""
    row = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), row_parts)

    def after(kinds: list[Value], values: Sequence[Value] | None) -> list[Value | None]:
        made: list[Value] = []

        def once(arrays, row):
            carried = list(map(_with, kinds, arrays)) if values is None else values
            made[:] = run(carried, row)
            return ()

        shapes = [_abstract(kind, aval) for kind, aval in zip(kinds, avals, strict=True)]
        jax.eval_shape(once, shapes, row)
        return [_join(kind, made[i], roots) for kind, i in zip(kinds, changing, strict=True)]

    kinds = [_anonymous(value, roots) for value in start]
    # The first step has numbers: a state of zeros times a weight is zero, and no path.
    joined = after(kinds, start)
    while not any(kind is None for kind in joined):
        kinds, joined = joined, after(joined, None)
        if [_label(a) for a in kinds] == [b and _label(b) for b in joined]:
            return kinds
    return None


# --- values taken apart into arrays, which may differ from step to step, and the rest -----------


def _anonymous(value: Value, roots: itertools.count) -> Value:
    """The kind of a carried value: True in place of its arrays, and no ties to other tensors."""
    if isinstance(value, Weight):
        return value._replace(kept=True)
    shut, low = (None if p is None else True for p in (value.shut, value.low))
    if isinstance(value, Signal):
        return Signal(True, next(roots), open=value.open, shut=shut, low=low)
    array = value.value  # a random key has no number to carry
    numeric = array is not None and jnp.issubdtype(jnp.result_type(array), np.generic)
    return Const(True if numeric else None, mixed=value.mixed, shut=shut, low=low)


def _label(kind: Value) -> Value:
    """What must not change from step to step."""
    return kind._replace(root=0) if isinstance(kind, Signal) else kind


def _join(a: Value, b: Value, roots: itertools.count) -> Value | None:
    """The kind that covers both kinds; None if there is none."""
    b = _anonymous(b, roots)
    if isinstance(a, Weight) or isinstance(b, Weight):
        return a if a == b else None
    # What is known of a number is known as a pattern too, and False where it is not.
    shut, low = (
        True if pattern(a) or pattern(b) else None
        for pattern in (lambda v: _has(v, v.shut), lambda v: _has(v, v.low))
    )
    if isinstance(a, Const) and isinstance(b, Const):
        mixed = tuple(dict.fromkeys((*a.mixed, *b.mixed)))
        if a.value and b.value:
            return Const(True, mixed=mixed)
        return Const(mixed=mixed, shut=shut, low=low)
    signals = [v for v in (a, b) if isinstance(v, Signal)]
    root = a.root if isinstance(a, Signal) else next(roots)
    return Signal(True, root, open=all(v.open for v in signals), shut=shut, low=low)


def _has(value: Value, pattern: Any) -> bool:
    return pattern is not None or (isinstance(value, Const) and value.value is not None)


def _abstract(kind: Value, aval: Any) -> tuple[Any, Any, Any]:
    """Shapes of the arrays of a kind."""
    if isinstance(kind, Const):
        main = jax.ShapeDtypeStruct(aval.shape, aval.dtype) if kind.value else None
    else:
        main = jax.ShapeDtypeStruct(aval.shape, jnp.float32)
    if isinstance(kind, Weight):
        return main, None, None
    mask = jax.ShapeDtypeStruct(aval.shape, bool)
    return main, *(None if p is None else mask for p in (kind.shut, kind.low))


def _parts(kind: Value, value: Value, aval: Any) -> tuple[Any, Any, Any]:
    """The arrays of a value, as a kind that covers it has them."""
    if isinstance(kind, Weight):
        return value.kept, None, None
    if isinstance(kind, Const) and kind.value is not None:
        return jnp.asarray(value.value, aval.dtype), None, None
    main = None
    if isinstance(kind, Signal):
        live = value.live if isinstance(value, Signal) else jnp.zeros(aval.shape)
        main = jnp.broadcast_to(live, aval.shape).astype(jnp.float32)
    found = (kind.shut, shut_of(value, aval)), (kind.low, low_of(value, aval))
    patterns = (
        None if has is None else jnp.broadcast_to(False if p is None else p, aval.shape)
        for has, p in found
    )
    return main, *patterns


def _with(kind: Value, parts: tuple[Any, Any, Any]) -> Value:
    """A value of a kind with its arrays."""
    main, shut, low = parts
    if isinstance(kind, Weight):
        return kind._replace(kept=main)
    if isinstance(kind, Signal):
        return kind._replace(live=main, shut=shut, low=low)
    return kind._replace(value=main, shut=shut, low=low)


def _renumbered(value: Value, roots: itertools.count) -> Value:
    """The same kind of value as a tensor of its own."""
    return value._replace(root=next(roots)) if isinstance(value, Signal) else value


def _stack(row: Value, parts: tuple[Any, Any, Any], roots: itertools.count) -> Value:
    """The rows of all steps as one tensor."""
    if isinstance(row, Signal):
        return Signal(parts[0], next(roots), shut=parts[1], low=parts[2])
    stacked = _with(row, parts)
    return stacked._replace(source=None) if isinstance(stacked, Const) else stacked
