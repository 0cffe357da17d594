"""Initialisers for feedback and projections: how many entries, which rank, what size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from soap_jax import direct, init_feedback, initializers

KEY = jax.random.key(0)
SHAPE = (3, 4, 5, 17)  # a convolution's kernel: the matrix (60, 17)
each_initializer = pytest.mark.parametrize(
    "initializer",
    [initializers.sparse(0.3, axis=-2), initializers.low_rank(2), initializers.scaled(3.0)],
    ids=["sparse", "low_rank", "scaled"],
)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def draw(initializer, key, shape, dtype=jnp.float32):
    return initializer(key, shape, dtype)


@each_initializer
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_draw_has_the_shape_and_dtype_that_were_asked_for(initializer, dtype):
    drawn = draw(initializer, KEY, SHAPE, dtype)
    assert (drawn.shape, drawn.dtype) == (SHAPE, dtype)
    assert not np.array_equal(drawn, draw(initializer, jax.random.key(1), SHAPE, dtype))


@each_initializer
def test_each_serves_wherever_an_initializer_does(initializer):
    params = {"kernel": jnp.ones((12, 9))}
    feedback = init_feedback(KEY, params, initializer=initializer).feedback["kernel"]
    assert feedback.shape == (12, 9)
    projection = direct.draw_projection(KEY, 10, (4, 3), initializer=initializer)
    np.testing.assert_array_equal(projection, initializer(KEY, (10, 12)).reshape(10, 4, 3))


@pytest.mark.parametrize(
    "density, axis, kept", [(0.1, -2, 6), (0.3, -1, 5), (1e-6, -2, 1), (0.01, -1, 1)]
)
def test_sparse_keeps_so_many_entries_of_every_line(density, axis, kept):
    matrix = np.asarray(draw(initializers.sparse(density, axis=axis), KEY, SHAPE)).reshape(60, 17)
    np.testing.assert_array_equal((matrix != 0).sum(axis), kept)
    places = np.unique((matrix != 0).argmax(axis))
    assert len(places) > 1  # not the same in every line


def test_sparse_keeps_the_root_mean_square():
    ones = jax.nn.initializers.ones
    for axis in (-2, -1):
        matrix = draw(initializers.sparse(0.1, ones, axis=axis), KEY, (40, 30))
        np.testing.assert_allclose(np.square(matrix).mean(axis), 1.0, rtol=1e-6)


def test_sparse_chooses_every_place_equally_often():
    ones = jax.nn.initializers.ones
    matrix = np.asarray(draw(initializers.sparse(0.25, ones, axis=-2), KEY, (8, 20_000))) > 0
    # 20,000 draws of one place with probability 1/4: a standard error of 0.003.
    np.testing.assert_allclose(matrix.mean(1), 0.25, atol=0.015)


def test_sparse_at_full_density_is_the_initializers_own_draw():
    entries_key, _ = jax.random.split(KEY)
    expected = initializers.glorot_normal(entries_key, SHAPE)
    np.testing.assert_array_equal(initializers.sparse(1.0, axis=-2)(KEY, SHAPE), expected)


@pytest.mark.parametrize("rank", [1, 3, 17])
def test_low_rank_has_that_rank_and_its_initializers_size(rank):
    he = jax.nn.initializers.he_normal()
    matrix = np.asarray(draw(initializers.low_rank(rank, he), KEY, SHAPE)).reshape(60, 17)
    singular = np.linalg.svd(matrix, compute_uv=False)
    assert (singular > 1e-5 * singular[0]).sum() == rank
    size_key, *_ = jax.random.split(KEY, 3)
    np.testing.assert_allclose(
        np.square(matrix).mean(), np.square(he(size_key, SHAPE)).mean(), 1e-5
    )


def test_scaled_multiplies_a_draw():
    expected = 3 * initializers.glorot_normal(KEY, SHAPE)
    np.testing.assert_array_equal(initializers.scaled(3.0)(KEY, SHAPE), expected)


def test_a_draw_takes_a_sharding(mesh):
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    drawn = initializers.scaled(2.0)(KEY, (3, 8), jnp.float32, sharding)
    assert drawn.sharding == sharding
    np.testing.assert_array_equal(drawn, initializers.scaled(2.0)(KEY, (3, 8)))


def test_initializers_nest():
    nested = initializers.scaled(2.0, initializers.sparse(0.5, initializers.low_rank(1), axis=-2))
    drawn = draw(nested, KEY, (6, 5))
    np.testing.assert_array_equal((np.asarray(drawn) != 0).sum(0), 3)


# Errors


@pytest.mark.parametrize("density", [0, -0.5, 1.5, float("nan")])
def test_a_density_that_is_no_share_raises(density):
    with pytest.raises(ValueError, match=r"density is .*; expected a share"):
        initializers.sparse(density, axis=-1)


def test_matched_projections_fit_the_kernels_and_matched_kernels_the_projections():
    shapes = [(20, 16), (16, 12), (12, 5)]
    trained = [jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes)]
    projections, kernels = initializers.match_projections(trained)
    assert [p.shape for p in projections] == [(5, 20), (5, 16), (5, 12)]
    np.testing.assert_array_equal(projections[-1], trained[-1].T)
    np.testing.assert_array_equal(kernels[-1], trained[-1])
    for i in range(2):
        above = projections[i + 1]
        np.testing.assert_allclose(kernels[i], projections[i].T @ above, rtol=1e-5, atol=1e-5)
        off = trained[i] - kernels[i]  # least squares: nothing is left in the rows of `above`
        np.testing.assert_allclose(off @ above.T, np.zeros((len(off), 5)), atol=1e-4)


def test_matched_projections_send_the_error_of_backprop_where_they_can():
    """With orthonormal projections the matched linear network's errors are backprop's."""
    last = jnp.linalg.qr(jax.random.normal(KEY, (12, 5)))[0]
    trained = [jax.random.normal(jax.random.key(1), (16, 5)) @ last.T, last]
    (below, above), kernels = initializers.match_projections(trained)
    np.testing.assert_allclose(kernels[0], trained[0], rtol=1e-4, atol=1e-5)
    error = jax.random.normal(jax.random.key(2), (3, 5))
    np.testing.assert_allclose(error @ above, error @ kernels[1].T, rtol=1e-5, atol=1e-6)
    by_backprop = error @ kernels[1].T @ kernels[0].T
    np.testing.assert_allclose(error @ below, by_backprop, rtol=1e-4, atol=1e-4)


def test_records_tell_initialisers_apart():
    named = {
        initializers.low_rank(3).__qualname__,
        initializers.low_rank(3, jax.nn.initializers.ones).__qualname__,
        initializers.sparse(0.5, axis=-1).__qualname__,
        initializers.sparse(0.5, axis=-2).__qualname__,
        initializers.scaled(2.0).__qualname__,
        initializers.scaled(3.0).__qualname__,
    }
    assert len(named) == 6


@pytest.mark.parametrize("rtol", [1.0, -0.1, "1e-6", None])
def test_a_tolerance_that_is_no_share_raises(rtol):
    with pytest.raises(ValueError, match=r"rtol is .*; expected a number"):
        initializers.match_projections([jnp.ones((3, 2))], rtol=rtol)


@pytest.mark.parametrize("shapes", [[], [(3, 4), (5, 2)], [(3, 4, 5)], [(3,)]])
def test_kernels_that_are_no_chain_raise(shapes):
    with pytest.raises(ValueError, match=r"kernels have the shapes .*; expected matrices"):
        initializers.match_projections([jnp.ones(shape) for shape in shapes])


def test_sparse_along_another_axis_raises():
    with pytest.raises(ValueError, match=r"axis is 0; expected -2 \(columns\) or -1 \(rows\)"):
        initializers.sparse(0.5, axis=0)


def test_a_rank_below_one_raises():
    with pytest.raises(ValueError, match=r"rank is 0; expected an integer, 1 or more"):
        initializers.low_rank(0)


def test_a_rank_above_the_matrixs_smaller_side_raises():
    with pytest.raises(ValueError, match=r"rank is 18; expected at most 17.*\(60, 17\)"):
        initializers.low_rank(18)(KEY, SHAPE)
    with pytest.raises(ValueError, match=r"cannot draw feedback.*at most 2"):
        init_feedback(KEY, {"kernel": jnp.ones((2, 3))}, initializer=initializers.low_rank(3))


@pytest.mark.parametrize("gain", [0, -1.0, float("inf"), float("nan")])
def test_a_gain_that_is_not_positive_and_finite_raises(gain):
    with pytest.raises(ValueError, match=r"gain is .*; expected a positive, finite number"):
        initializers.scaled(gain)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: initializers.sparse("0.5", axis=-1), "density is '0.5'; expected a share"),
        (lambda: initializers.sparse(float("nan"), axis=-1), "density is nan; expected a share"),
        (lambda: initializers.low_rank(1.5), "rank is 1.5; expected an integer, 1 or more"),
        (lambda: initializers.scaled("2"), "gain is '2'; expected a positive, finite number"),
        (lambda: initializers.scaled(float("nan")), "gain is nan; expected a positive"),
    ],
)
def test_what_is_no_number_raises(make, message):
    with pytest.raises(ValueError, match=message):
        make()
