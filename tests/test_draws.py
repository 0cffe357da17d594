"""Draws: the numbers of `jax.random`, without its loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from soap_jax import draws

SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 4, 5), (0, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
def test_uniform_has_the_bits_of_jax_random(shape, seed):
    key = jax.random.fold_in(jax.random.key(seed), 5)
    got = jax.jit(draws.uniform, static_argnums=1)(key, shape)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, jax.random.uniform(key, shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_normal_is_that_of_jax_random(shape):
    key = jax.random.key(3)
    # Fused otherwise, the polynomial of the inverse error function rounds otherwise.
    got = jax.jit(draws.normal, static_argnums=1)(key, shape)
    np.testing.assert_allclose(got, jax.random.normal(key, shape), rtol=1e-5, atol=1e-6)


def test_signs_are_those_of_uniform_numbers_about_a_half():
    key = jax.random.key(3)
    got = jax.jit(draws.signs, static_argnums=1)(key, (999, 7))
    np.testing.assert_array_equal(got, jnp.where(jax.random.uniform(key, (999, 7)) < 0.5, 1, -1))
    assert abs(got.mean()) < 5 / np.sqrt(got.size)


def test_batched_keys_draw_what_each_draws():
    keys = jax.random.split(jax.random.key(1), 4)
    together = jax.vmap(lambda key: draws.uniform(key, (3, 2)))(keys)
    np.testing.assert_array_equal(together, jnp.stack([draws.uniform(key, (3, 2)) for key in keys]))


def test_keys_of_other_generators_draw_by_jax_random():
    key = jax.random.key(1, impl="rbg")
    np.testing.assert_array_equal(draws.uniform(key, (4, 3)), jax.random.uniform(key, (4, 3)))


def test_double_precision_mode_changes_nothing():
    expected = draws.uniform(jax.random.key(1), (5,))
    with jax.enable_x64(True):
        got = draws.uniform(jax.random.key(1), (5,))
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, expected)


def test_no_loop_is_compiled():
    text = jax.jit(draws.normal, static_argnums=1).lower(jax.random.key(0), (64, 64)).as_text()
    assert "while" not in text
    # What it replaces has one on CPU; if this fails, `draws` is no longer needed.
    plain = jax.jit(lambda key: jax.random.normal(key, (64, 64)))
    assert "while" in plain.trace(jax.random.key(0)).lower(lowering_platforms=("cpu",)).as_text()
