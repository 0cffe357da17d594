"""Settings that every test shares, made before JAX starts its backends."""

import gc
import importlib.metadata
import os
import pathlib

# Most of the time goes into compiling. With XLA_FLAGS= in the environment XLA does as by default.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jax") < "0.11":  # XLA ends a process at a flag that it lacks
    QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", QUICK)

# What was compiled is kept for the next run, for all workers and subprocesses. JAX finds it by the
# program, versions, flags and processor, and compiles anew what it cannot read. It is off with
# JAX_ENABLE_COMPILATION_CACHE=0 and emptied by pytest's own --cache-clear.
COMPILED = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "d" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")

MOST_MAPS = 30_000
"""With more, the next module starts with JAX's caches empty."""

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(scope="module", autouse=True)
def memory_maps_are_left():
    """Compiled programs take memory maps, of which Linux grants a process 65,530 by default."""
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="module", autouse=True)
def nothing_older_is_collected():
    """Garbage is not looked for in what earlier modules left, JAX's caches above all."""
    gc.collect()
    gc.freeze()


def make_mesh(axis_type):
    if jax.device_count() < 4:
        pytest.skip("needs four devices: JAX was started elsewhere, or runs on an accelerator")
    return jax.make_mesh((4,), ("data",), axis_types=(axis_type,))


@pytest.fixture
def auto_mesh():
    """Four devices along an axis "data", whose shardings the compiler chooses."""
    return make_mesh(jax.sharding.AxisType.Auto)


@pytest.fixture
def explicit_mesh():
    """Four devices along an axis "data", whose shardings are part of the types."""
    return make_mesh(jax.sharding.AxisType.Explicit)


@pytest.fixture
def mesh(explicit_mesh):
    """`explicit_mesh`, as the current mesh."""
    with jax.set_mesh(explicit_mesh):
        yield explicit_mesh
