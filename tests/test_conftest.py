"""What the tests share does not decide what they find."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache


def compute():
    """A function of its own for JAX, compiled at every call; the same program every time."""
    return float(jax.jit(lambda x: jnp.sin(3 * x) + 1)(0.5))


@pytest.fixture
def cache(tmp_path):
    """An empty compilation cache."""
    if not jax.config.jax_enable_compilation_cache:
        pytest.skip("the compilation cache is off")
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    compilation_cache.reset_cache()
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


@pytest.mark.parametrize("left", [b"", b"half", None], ids=["empty", "other", "cut"])
def test_programs_that_were_half_written_are_compiled_anew(cache, left):
    """As a killed worker, or one that is still writing, leaves them: warnings, never errors."""
    value = compute()
    (path,) = cache.glob("jit__lambda*-cache")
    path.write_bytes(path.read_bytes()[:-20] if left is None else left)
    assert compute() == value
