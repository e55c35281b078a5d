"""Set before any test: two CPU devices, and one cache of compiled programs for the session."""

import tempfile

import jax

# So that sharding over the run axis is always exercised.
jax.config.update('jax_num_cpu_devices', 2)

# Tests build the same programs again and again, and compiling is what they wait for.
_cache = tempfile.TemporaryDirectory(prefix='jaxprune-tests-')
jax.config.update('jax_compilation_cache_dir', _cache.name)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
