"""Set before any test: two CPU devices, and one cache of compiled programs for the session."""

import os
import shutil
import tempfile
from pathlib import Path

import jax
import pytest

# So that sharding over the run axis is always exercised.
jax.config.update('jax_num_cpu_devices', 2)

# Tests build the same programs again and again, and compiling is what they wait for. Workers of
# pytest-xdist share what is compiled; the run's own id keeps runs apart.
_run = os.environ.get('PYTEST_XDIST_TESTRUNUID', str(os.getpid()))
_cache = Path(tempfile.gettempdir()) / f'jaxprune-tests-{_run}'
jax.config.update('jax_compilation_cache_dir', str(_cache))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
# What this machine was once found to be fast at is none of the tests' business.
os.environ['JAXPRUNE_CACHE_DIR'] = str(_cache.with_name(f'{_cache.name}-probes'))


def pytest_sessionfinish(session):
    """Deletes what was compiled and measured, when the last worker is done."""
    if not hasattr(session.config, 'workerinput'):
        uid = getattr(session.config.pluginmanager.getplugin('dsession'), 'nodemanager', None)
        name = uid.testrunuid if uid is not None else _run
        for kept in (f'jaxprune-tests-{name}', f'jaxprune-tests-{name}-probes'):
            shutil.rmtree(_cache.with_name(kept), ignore_errors=True)


@pytest.fixture(autouse=True)
def quick_compilation(request):
    """Compiles with few optimisations, three times as fast, but where a test is marked `optimised`.

    Results are the same up to rounding. Laws that hold bit for bit are tested on the programs that
    users run.
    """
    jax.config.update('jax_disable_most_optimizations', 'optimised' not in request.keywords)
    yield
    jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(autouse=True, scope='module')
def forgotten_programs():
    """Drops what a file compiled: by the end of a run it would fill gigabytes."""
    yield
    jax.clear_caches()
