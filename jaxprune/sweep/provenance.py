"""Where results come from: versions, git state, device, seeds, command."""

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from jaxprune.sweep.spec import FORMAT, SweepSpec

_PACKAGES = ('jaxprune', 'jax', 'jaxlib', 'flax', 'optax', 'numpy', 'polars', 'tensorflow-datasets')


def provenance(spec: SweepSpec, now: datetime.datetime) -> dict[str, Any]:
    """A JSON-ready record; its 'session' is what differs from one start to the next."""
    return {
        'format': FORMAT,
        'name': spec.name,
        'seeds': list(spec.grid.seed),
        'session': {
            'started': now.isoformat(timespec='seconds'),
            'command': shlex.join(sys.argv),
            'versions': versions(),
            'git': git_state(Path(__file__).parent),
            'device': device_facts(),
            'environment': {
                key: value
                for key, value in sorted(os.environ.items())
                if key.startswith(('JAX_', 'XLA_'))
            },
        },
    }


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that numbers may depend on."""
    return {
        'python': platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }


def device_facts() -> dict[str, Any]:
    """What this process computes on."""
    device = jax.local_devices()[0]
    return {
        'platform': device.platform,
        'kind': device.device_kind,
        'count': jax.local_device_count(),
        'cpus': os.cpu_count(),
        'machine': platform.machine(),
        'system': platform.platform(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state(directory: Path) -> dict[str, Any] | None:
    """Commit and uncommitted changes of the checkout that holds a directory, None outside one."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ['git', *arguments], cwd=directory, capture_output=True, text=True, timeout=10
        )
        if done.returncode:
            raise OSError(done.stderr)
        return done.stdout.strip()

    try:
        # Installed into site-packages of a project's own environment, the checkout around it is
        # somebody else's: only a tracked package file makes it ours.
        git('ls-files', '--error-unmatch', str(Path(__file__)))
        return {
            'commit': git('rev-parse', 'HEAD'),
            'dirty': bool(git('status', '--porcelain', '--untracked-files=no')),
        }
    except (OSError, subprocess.TimeoutExpired):
        return None
