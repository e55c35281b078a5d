"""Measurements of a chunk between its steps: test loss and accuracy, flow quantities, counts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxprune.method import mask_figures
from jaxprune.select import count_kept
from jaxprune.sweep.advance import Rows, Trainer
from jaxprune.sweep.device_data import DeviceData
from jaxprune.sweep.layout import jitted, on_host
from jaxprune.sweep.program import EVAL_BATCH, Program, Stage
from jaxprune.sweep.slots import Slots, in_parts
from jaxprune.sweep.strategy import Strategy
from jaxprune.types import Batch


class Recorded(NamedTuple):
    """What was recorded at one moment.

    Attributes:
      test: test losses and accuracies, each `(runs,)`, or None where they are not asked for.
      flow: quantity -> path -> values `(runs,)`.
    """

    test: tuple[np.ndarray, np.ndarray] | None
    flow: dict[str, dict[str, np.ndarray]]


class Observers(NamedTuple):
    """What may be asked of states.

    Attributes:
      evaluate: `(clock, rows, states, hooked=False) -> (test losses (runs,), accuracies (runs,))`.
      record: `(clock, rows, states, hooked=False) -> () -> Recorded`: what [record] asks for, still
        on the devices until the function that comes back is called.
      predict: `(clock, rows, states, hooked=False) -> labels (runs, examples)` of test examples.
      counts: `states -> (kept, active, gone, moved)`, see `Engine.counts`.
      tests: `() -> Batch` of all test examples, host arrays.
      compiled: the compiled functions by name.
    """

    evaluate: Callable[..., tuple[np.ndarray, np.ndarray]]
    record: Callable[..., Callable[[], Recorded]]
    predict: Callable[..., np.ndarray]
    counts: Callable[[Any], tuple[dict[str, np.ndarray], ...]]
    tests: Callable[[], Batch]
    compiled: dict[str, Callable]


def eval_indices(examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices `(batches, EVAL_BATCH)` of all test examples, and which of them are no padding."""
    size = min(EVAL_BATCH, examples)
    count = -(-examples // size)
    indices = np.arange(count * size, dtype=np.int32).reshape(count, size)
    return np.minimum(indices, examples - 1), indices < examples


def make_observers(
    strategy: Strategy,
    program: Program,
    mesh: Mesh,
    data: DeviceData,
    slots: Slots,
    trainer: Trainer,
    event_batching: str,
    at_once: int,
) -> Observers:
    """The observers of a program.

    Args:
      data: on all devices of the mesh.
      event_batching: how runs are batched where XLA's own convolution is used.
      at_once: most rows of such a call.
    """
    indices, valid = eval_indices(data.test.labels.shape[0])
    hosted = strategy.stepping == 'host'
    evaluations, predictions, flows = {}, {}, {}
    for hooked, stage in program.stages.items():
        whole = stage.evaluate if hosted else _evaluate_all(stage, indices, valid)
        axes = (None, None, 0, 0, *((None, None) if hosted else ()))
        evaluations[hooked] = jitted(whole, axes, strategy.batching, mesh)
        axes = (None, None, 0, 0, None)
        predictions[hooked] = jitted(stage.predict, axes, strategy.batching, mesh)
        if stage.flow is not None:
            axes = (None, None, 0, 0, 0)
            flows[hooked] = jitted(stage.flow, axes, strategy.batching, mesh)
    counting = jitted(_counting(program), (0, 0), event_batching, mesh)

    def sums(clock: int, rows: Rows, states: Any, hooked: bool) -> list[list]:
        """Sums over the test set, slot by slot, still on the devices."""
        parts = [(indices, valid)] if not hosted else list(zip(indices, valid, strict=True))
        return [
            [
                evaluations[hooked](np.int32(clock), data, hyper, state, *(at if hosted else ()))
                for at in parts
            ]
            for (_, hyper), state in zip(trainer.by_slot(rows), states, strict=True)
        ]

    def tested(found: list[list]) -> tuple[np.ndarray, np.ndarray]:
        per_slot = [np.array(of_slot, np.float32).sum(0) for of_slot in on_host(found)]
        loss, correct = np.concatenate(per_slot, axis=1)
        return loss / valid.sum(), correct / valid.sum()

    def record(clock, rows, states, hooked=False):
        tests = sums(clock, rows, states, hooked) if program.record.evaluate else None
        measured = [
            flows[hooked](np.int32(clock), data, keys, hyper, state)
            for (keys, hyper), state in zip(trainer.by_slot(rows), states, strict=True)
            if flows
        ]

        def fetched() -> Recorded:
            return Recorded(
                None if tests is None else tested(tests), slots.join(measured) if flows else {}
            )

        return fetched

    def counts(states):
        found = []
        for seen in ((state.masks, state.trace) for state in states):
            if event_batching == strategy.batching:
                found.append(on_host(counting(*seen)))
                continue
            runs = len(jax.tree.leaves(seen)[0])
            for chosen, real in in_parts(range(runs), min(at_once, runs)):
                each = on_host(counting(*slots.take(seen, chosen)))
                found.append(jax.tree.map(lambda leaf, real=real: leaf[:real], each))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)

    def predict(clock, rows, states, hooked=False):
        parts = zip(trainer.by_slot(rows), states, strict=True)
        labels = [
            [predictions[hooked](np.int32(clock), data, hyper, state, at) for at in indices]
            for (_, hyper), state in parts
        ]
        of_slots = [np.concatenate(of_slot, axis=1) for of_slot in on_host(labels)]
        return np.concatenate(of_slots)[:, : valid.sum()]

    compiled = {'counts': counting}
    compiled |= {f'evaluate{" hooked" * hooked}': fn for hooked, fn in evaluations.items()}
    return Observers(
        evaluate=lambda clock, rows, states, hooked=False: tested(
            sums(clock, rows, states, hooked)
        ),
        record=record,
        predict=predict,
        counts=counts,
        tests=lambda: _all_tests(program, data, indices, valid),
        compiled=compiled,
    )


def _all_tests(program: Program, data: DeviceData, indices: np.ndarray, valid: np.ndarray) -> Batch:
    """All test examples as the network sees them, host arrays."""
    fetch = jax.jit(program.tests)
    parts = [on_host(fetch(data, jnp.asarray(at))) for at in indices]
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    return jax.tree.map(lambda leaf: leaf[: valid.sum()], whole)


def _counting(program: Program) -> Callable:
    """`(masks, trace) -> (kept, active, gone, moved)` of a run, see `Engine.counts`."""
    return lambda masks, trace: (
        count_kept(masks),
        count_kept(program.connect(masks)),
        program.compact().gone(masks),
        mask_figures(trace, masks) if trace else {},
    )


def _evaluate_all(stage: Stage, indices: np.ndarray, valid: np.ndarray) -> Callable:
    """`(clock, data, hyper, state) -> (sum of losses, number correct)` over all test batches."""

    def evaluate_all(clock, data, hyper, state):
        def body(total, at):
            return jax.tree.map(
                jnp.add, total, stage.evaluate(clock, data, hyper, state, *at)
            ), None

        zero = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))
        return jax.lax.scan(body, zero, (jnp.asarray(indices), jnp.asarray(valid)))[0]

    return evaluate_all
