"""A sweep's directory: begun with a plan that never changes, or opened again."""

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxprune import files
from jaxprune.errors import ReadError, StoreError, first_line
from jaxprune.sweep import store
from jaxprune.sweep.load import identity, read_spec, to_toml
from jaxprune.sweep.provenance import provenance
from jaxprune.sweep.spec import FORMAT, SweepSpec

#: Why a directory of an older format does not go on.
_OLDER = {
    2: 'it says when rounds happen with other keys',
    3: 'it records nothing at step 0',
    4: 'its methods have fewer keys, and its tables fewer columns',
    5: 'its plan is one of a single machine',
}


def open_sweep(spec: SweepSpec, out: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Makes or re-opens a sweep's directory, and returns the plan that holds.

    The first plan stays: of several processes that begin a sweep at once, one writes it. [engine]
    may differ from session to session; the last one says how chunks are trained from now on.

    Raises:
      StoreError: the directory holds another sweep, or cannot be written.
    """
    store.make_directory(out)
    if not files.is_remote(out):
        files.remove_abandoned(out)
    # Through JSON, as another session reads it.
    stored = json.loads(json.dumps(plan))
    if (out / 'plan.json').exists() or not store.create_json(out / 'plan.json', stored):
        stored = stored_plan(out)
        _check_same(spec, out, stored, plan)
    store.write_session(out, provenance(spec, datetime.datetime.now(datetime.UTC)))
    store.write_bytes(out / 'spec.toml', to_toml(spec).encode())
    return stored


def stored_plan(out: Path) -> dict[str, Any]:
    """The plan of a sweep's directory.

    Raises:
      StoreError: there is none that this version can go on with.
    """
    plan = store.read_plan(out)
    written = plan.get('format')
    if isinstance(written, int) and written > FORMAT:
        raise StoreError(
            f'{out} holds a sweep of format {written}, by a newer jaxprune; this version knows '
            f'formats up to {FORMAT}: install the newer one'
        )
    if written != FORMAT:
        raise StoreError(
            f'{out} holds a sweep of format {written}, and this version of jaxprune writes format '
            f'{FORMAT}: {_OLDER.get(written, _OLDER[2])}. Choose another --out'
        )
    return plan


def stored_spec(out: Path) -> SweepSpec:
    """The specification of a sweep's directory; ask for the plan first, which has its format.

    Raises:
      StoreError: there is none.
    """
    try:
        return read_spec((out / 'spec.toml').read_bytes(), f'{out}/spec.toml')
    except FileNotFoundError:
        raise StoreError(f'{out} is not a sweep directory: it has no spec.toml') from None
    except (OSError, *store.refusals(out)) as error:
        raise ReadError(f'{out}/spec.toml: cannot be read ({first_line(error)})') from error


def _check_same(
    spec: SweepSpec, out: Path, stored: Mapping[str, Any], plan: Mapping[str, Any]
) -> None:
    """Is the plan in the directory one of this specification, by this version?"""
    if (out / 'spec.toml').exists():
        before = stored_spec(out)
        if identity(before) != identity(spec):
            why = 'see its spec.toml'
            if before.model.params and before.model.params_sha256 != spec.model.params_sha256:
                why = 'the file of model.params holds other numbers'
            raise StoreError(f'{out} holds another sweep ({why}): choose another --out')
    elif stored.get('spec') != plan['spec']:
        raise StoreError(f'{out} holds another sweep: choose another --out')
    ids, now = ({p['id'] for p in table['programs']} for table in (stored, plan))
    if stored.get('spec') != plan['spec'] or ids != now:
        raise StoreError(f'{out} was written by another version of jaxprune: choose another --out')
