"""Runs that share one training program, and how it is trained."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

from jaxprune.errors import JaxpruneError, SpecError, StoreError, first_line
from jaxprune.sweep.grid import (
    Run,
    digest,
    one_of_each_method,
    program_settings,
    representative,
    runs,
)
from jaxprune.sweep.initial_params import same_content
from jaxprune.sweep.parse import plain
from jaxprune.sweep.probe import Measured, remembered
from jaxprune.sweep.program import Program, make_program
from jaxprune.sweep.spec import SweepSpec
from jaxprune.sweep.strategy import Strategy, forced, usual


class Group(NamedTuple):
    """Runs that share one training program.

    Attributes:
      id: hash of what makes the program.
      settings: its static settings, see `program_settings`.
      strategy: how its runs are trained.
      chosen: why so: 'measured', 'usual' or 'forced'.
      measured: what was measured of the strategy on this machine, None if it never was.
      runs: its runs, sorted so that chunks hold few methods.
      program: its functions, convolving natively.
    """

    id: str
    settings: dict[str, Any]
    strategy: Strategy
    chosen: str
    measured: Measured | None
    runs: list[Run]
    program: Program


def groups_of(spec: SweepSpec, source: str = 'spec') -> list[Group]:
    """The runs of a specification by training program, in order of first appearance.

    Raises:
      SpecError: a model or an optimizer refuses its arguments.
    """
    return [_group(spec, key, members, source) for key, members in _by_program(spec).items()]


def group_of(spec: SweepSpec, program: str) -> Group:
    """One of the groups, without making the others.

    Raises:
      StoreError: no run of the specification has this program.
    """
    members = _by_program(spec).get(program)
    if not members:
        raise StoreError(f'no run has the program {program}: another version made this plan')
    return _group(spec, program, members, 'spec.toml')


def _by_program(spec: SweepSpec) -> dict[str, list[Run]]:
    by_key: dict[str, list[Run]] = {}
    network = [plain(same_content(spec.model)), plain(spec.data)]
    every = runs(spec)
    keys = {
        (id(run.method), id(run.train)): digest([*network, program_settings(run)])
        for run in one_of_each_method(every)
    }
    for run in every:
        by_key.setdefault(keys[id(run.method), id(run.train)], []).append(run)
    return by_key


def _group(spec: SweepSpec, key: str, members: list[Run], source: str) -> Group:
    with library_errors(source):
        run = representative(members)
        program = make_program(spec, run)
        choice = _choice(spec, program, run)
    return Group(key, program_settings(run), *choice, members, program)


def chosen_anew(spec: SweepSpec, groups: Sequence[Group]) -> list[Group]:
    """The groups with the strategies that are fastest by what has been measured since."""
    fields = ('strategy', 'chosen', 'measured')
    return [
        group._replace(
            **dict(zip(fields, _choice(spec, group.program, group.runs[0]), strict=True))
        )
        for group in groups
    ]


def _choice(spec: SweepSpec, program: Program, run: Run) -> tuple[Strategy, str, Measured | None]:
    """The fastest strategy measured here that [engine] allows, or else the usual one."""
    devices = jax.device_count()
    # What each of several hosts remembers may differ, and all must train alike.
    known = remembered(spec, run) if jax.process_count() == 1 else []
    allowed = [m for m in known if forced(m.strategy, spec.engine, devices) == m.strategy]
    if allowed and not allowed[0].error:
        return allowed[0].strategy, 'measured', allowed[0]
    best = usual(program.convolves, jax.default_backend(), devices)
    taken = forced(best, spec.engine, devices)
    return taken, 'usual' if taken == best else 'forced', None


@contextlib.contextmanager
def library_errors(source: str) -> Iterator[None]:
    """Whatever a model or an optimizer refuses, as a SpecError."""
    try:
        yield
    except JaxpruneError as error:
        raise SpecError(f'{source}: {error}') from None
    except Exception as error:
        # An argument that optax or flax refuses; its own message says which.
        raise SpecError(
            f'{source}: model or train: refused by the library: {first_line(error)}'
        ) from error
