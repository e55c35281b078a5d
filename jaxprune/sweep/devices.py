"""The machine: how many devices, how much memory, where things are kept between sweeps."""

import hashlib
import os
import platform
from pathlib import Path

import jax


def cores() -> int:
    """CPU cores this process may use."""
    if hasattr(os, 'sched_getaffinity'):  # Linux; respects containers' and schedulers' limits
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use_all_cores() -> None:
    """Makes one CPU device per core, so that a sweep splits its runs over them.

    Call it before JAX computes anything. A number of devices that the environment or the user
    has set already is left alone; accelerators are not touched.
    """
    forced = 'xla_force_host_platform_device_count' in os.environ.get('XLA_FLAGS', '')
    if not forced and jax.config.jax_num_cpu_devices < 1:
        jax.config.update('jax_num_cpu_devices', cores())


def cache_directory() -> Path:
    """What is kept between sweeps: `$JAXPRUNE_CACHE_DIR`, or the user's cache directory."""
    given = os.environ.get('JAXPRUNE_CACHE_DIR')
    if given:
        return Path(given)
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'jaxprune'


def keep_compiled() -> None:
    """Keeps compiled programs on disk, so that the next sweep of the kind need not compile.

    What the environment or the user has set up already is left alone.
    """
    if jax.config.jax_compilation_cache_dir is None:
        place = cache_directory() / 'compiled' / processor()
        jax.config.update('jax_compilation_cache_dir', str(place))
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)


def processor() -> str:
    """A hash of what the processor can do: programs compiled for one may crash another."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        able = sorted({line for line in lines if line.startswith(('flags', 'Features'))})
    except OSError:
        able = [platform.machine(), platform.node()]
    return hashlib.sha256('\n'.join(able).encode()).hexdigest()[:12]


def memory_limit() -> int:
    """Bytes that one device may use; on CPU, its share of the machine's memory."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if 'bytes_limit' in stats:
        return stats['bytes_limit']
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // jax.local_device_count()


def out_of_memory(error: Exception) -> bool:
    """Was more memory asked for than there is, by JAX or by Python?"""
    return isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error)
