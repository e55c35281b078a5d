"""Set before any test: two CPU devices, quick compilation, compiled programs kept between runs."""

import gc
import os
import shutil
import tempfile
from pathlib import Path

import jax
import pytest

from jaxprune.cli import main
from jaxprune.sweep.devices import processor

# Compiling is what tests wait for. With few optimisations it takes a third of the time; XLA's newer
# code generator takes twice as long (jax 0.12 has no other). JAXPRUNE_TEST_AS_USERS=1 compiles as
# users do.
QUICK = not os.environ.get('JAXPRUNE_TEST_AS_USERS')
if QUICK and jax.__version_info__[:2] == (0, 10):
    quick = '--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {quick}'

# Tracing makes many objects that live on: looking for garbage less often saves a tenth.
gc.set_threshold(200_000, 20, 100)

# So that sharding over the run axis is always exercised.
jax.config.update('jax_num_cpu_devices', 2)

# Tests build the same programs again and again, in this run and in the next one. A program's key
# holds all that it depends on, so a change of the code never meets an old program.
COMPILED = Path(__file__).parents[1] / '.pytest_cache' / 'compiled' / processor()
_OPTIONS = {
    'jax_disable_most_optimizations': QUICK,
    'jax_traceback_in_locations_limit': 0,
    'jax_compilation_cache_dir': str(COMPILED),
    'jax_persistent_cache_min_compile_time_secs': 0.0,
    'jax_persistent_cache_min_entry_size_bytes': -1,
}
for name, value in _OPTIONS.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)  # for processes that tests start
#: Beyond this the programs of changes long ago are thrown away.
_MOST_BYTES = 4 * 2**30
# What this machine was once found to be fast at is none of the tests' business.
_run = os.environ.get('PYTEST_XDIST_TESTRUNUID', str(os.getpid()))
_probes = Path(tempfile.gettempdir()) / f'jaxprune-tests-{_run}'
os.environ['JAXPRUNE_CACHE_DIR'] = str(_probes)


#: Marks of cases that the default run leaves out.
OTHER_RUNS = ('slow', 'script', 'more')
#: Programs that one case may have compiled, or read from disk. Operations outside of `jax.jit` are
#: a program each: 280 of them took nine seconds. `@pytest.mark.programs(n)` allows a case more.
#: Counted with one version of jax: another may cut the same functions into other programs.
MOST_PROGRAMS = 100
_COUNTED = jax.__version_info__[:2] == (0, 10)
_programs = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, duration, **_: name.endswith('backend_compile_duration') and _programs.append(name)
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Fails a case that has more programs compiled than it may; fixtures do not count."""
    _programs.clear()
    result = yield
    marker = item.get_closest_marker('programs')
    most = marker.args[0] if marker else MOST_PROGRAMS
    elsewhere = any(map(item.get_closest_marker, OTHER_RUNS))
    if _COUNTED and not elsewhere and len(_programs) > most:
        pytest.fail(
            f'{len(_programs)} programs were compiled, at most {most} are expected: use jit'
        )
    return result


def pytest_collection_modifyitems(config, items):
    """Leaves out what starts clusters, such as slow cases of it, unless it is asked for by name."""
    if 'fleet' in config.option.markexpr:
        return
    clusters = [item for item in items if item.get_closest_marker('fleet')]
    items[:] = [item for item in items if item not in clusters]
    config.hook.pytest_deselected(items=clusters)


def pytest_sessionfinish(session):
    """Deletes what was measured, and compiled programs if they are many; the last worker does."""
    if hasattr(session.config, 'workerinput'):
        return
    manager = getattr(session.config.pluginmanager.getplugin('dsession'), 'nodemanager', None)
    name = _run if manager is None else manager.testrunuid
    shutil.rmtree(_probes.with_name(f'jaxprune-tests-{name}'), ignore_errors=True)
    if sum(path.stat().st_size for path in COMPILED.rglob('*') if path.is_file()) > _MOST_BYTES:
        shutil.rmtree(COMPILED, ignore_errors=True)


@pytest.fixture(autouse=True)
def optimised_compilation(request):
    """Compiles as users do where a test is marked `optimised`: laws that hold bit for bit.

    Everything else compiles quickly; its results are the same up to rounding.
    """
    quick = QUICK and 'optimised' not in request.keywords
    jax.config.update('jax_disable_most_optimizations', quick)
    yield
    jax.config.update('jax_disable_most_optimizations', QUICK)


@pytest.fixture(autouse=True, scope='module')
def forgotten_programs():
    """Drops what a file compiled: by the end of a run it would fill gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command line in this process; returns code, stdout, stderr."""
    monkeypatch.setattr('jaxprune.sweep.use_all_cores', lambda: None)  # only before JAX wakes up

    def run(*arguments):
        code = main(list(map(str, arguments)))
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the sweep that a file's fixture `finished` made, to be broken."""
    return Path(shutil.copytree(finished[0], tmp_path / 'copy'))


@pytest.fixture
def quick_trials(monkeypatch, tmp_path):
    """Trials of strategies take a moment and are remembered in a directory of their own."""
    monkeypatch.setattr('jaxprune.sweep.probe._SECONDS', 0.02)
    monkeypatch.setenv('JAXPRUNE_CACHE_DIR', str(tmp_path / 'cache'))
    return tmp_path / 'cache'
