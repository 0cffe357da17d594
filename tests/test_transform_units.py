"""Which units a backward pass keeps apart: labels against Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from soap_jax.transform import units
from soap_jax.transform.units import Local, Mixed

N = 3
UNITS = Local(0, N)
C = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (4, N)), jnp.float32)
SQUARE = jnp.asarray(np.random.default_rng(1).uniform(1, 2, (N, N)), jnp.float32)


def one_by_one(bar):
    return lax.fori_loop(0, 2, lambda i, bar: 2 * bar, bar)


def by_rows(bar):
    return lax.dot_general(jnp.stack([C, C]), jnp.stack([bar, bar]), (((2,), (1,)), ((0,), (0,))))


KEPT = {  # functions of a cotangent `(N,)`, and the axis that counts its units
    "elementwise": (lambda bar: -2 * bar / 3 + jnp.where(C[0] > 1.5, bar, 0), 0),
    "cast": (lambda bar: bar.astype(jnp.bfloat16), 0),
    "outer product": (lambda bar: C[0][:, None] * bar, 1),
    "outer product of matrices": (lambda bar: jnp.outer(bar, C[:, 0]), 0),
    "product along other axes": (lambda bar: C @ (C[0][:, None] * bar[None]), 1),
    "product on the other side": (lambda bar: (bar[:, None] * C[0]) @ C.T, 0),
    "batched": (lambda bar: jnp.einsum("ij,ikj->ijk", C[:, :1] * bar, jnp.ones((4, 2, N))), 1),
    "batched by units": (lambda bar: jnp.einsum("u,un->un", bar, SQUARE), 0),
    "transposed": (lambda bar: (C * bar).T, 0),
    "summed over others": (lambda bar: (C * bar).sum(0), 0),
    "gates": (lambda bar: jnp.concatenate([bar, 2 * bar, jnp.zeros(N)]), 0),
    "gates padded": (lambda bar: jnp.pad(bar, (N, 2 * N)), 0),
    "gates by slices": (lambda bar: jnp.tile(bar, 4)[N : 3 * N], 0),
    "gates by splitting": (lambda bar: jnp.split(jnp.tile(bar, 4), 4)[2], 0),
    "gates as an axis": (lambda bar: (C * bar).reshape(2, 2, N)[1], 1),
    "gates in one axis": (lambda bar: (C * bar).reshape(2, 2 * N), 1),
    "gates apart again": (lambda bar: (C * bar).reshape(-1).reshape(2, 2, 1, N, 1), 3),
    "gates stacked": (lambda bar: jnp.stack([bar, 2 * bar], 1), 0),
    "gates stacked first": (lambda bar: jnp.stack([bar, 2 * bar]), 1),
    "gates unstacked": (lambda bar: jnp.unstack(C * bar)[3], 0),
    "put into zeros": (
        lambda bar: lax.dynamic_update_slice(jnp.zeros((4, N)), bar[None], (2, 0)),
        1,
    ),
    "read backwards along gates": (lambda bar: (C * bar)[::-1], 1),
    "inside jit": (lambda bar: jax.jit(lambda b: 2 * b[None])(bar), 1),
    "inside checkpoint": (lambda bar: jax.checkpoint(lambda b: b[:, None] * C[0])(bar), 0),
}

MET = {
    "sum": (lambda bar: bar.sum(), "reduce_sum"),
    "product": (lambda bar: SQUARE @ bar, "dot_general"),
    "batched product": (by_rows, "dot_general"),
    "both ways": (lambda bar: bar[:, None] + bar[None], "add"),
    "backwards": (lambda bar: bar[::-1], "rev"),
    "shifted": (lambda bar: jnp.pad(bar, (1, 0))[:N], "pad"),
    "part": (lambda bar: bar[1:], "slice"),
    "gates interleaved": (lambda bar: (bar[:, None] * C[0]).reshape(-1), "reshape"),
    "gates unlike": (lambda bar: jnp.concatenate([bar, jnp.zeros(1), bar]), "concatenate"),
    "put into the middle": (
        lambda bar: lax.dynamic_update_slice(jnp.zeros(9), bar, (2,)),
        "dynamic_update_slice",
    ),
    "looked up": (lambda bar: bar[jnp.argsort(C[0])], "gather"),
    "loop": (one_by_one, "scan"),
    "running sum": (jnp.cumsum, "cumsum"),
    "nonlinear": (jnp.tanh, "tanh"),
    "squared": (lambda bar: bar * bar, "mul"),
    "divided by itself": (lambda bar: 1 / bar, "div"),
    "clipped": (lambda bar: jnp.where(bar > 1, 1.0, bar), "select_n"),
    "after being mixed": (lambda bar: 2 * jnp.tile(bar.sum()[None], N), "reduce_sum"),
}


def labels(f, *inputs):
    closed = jax.make_jaxpr(f)(*[jnp.ones(N) for _ in inputs])
    return units.read(closed, inputs)


@pytest.mark.parametrize("name", KEPT)
def test_what_is_local_depends_on_one_unit_by_its_index(name):
    f, axis = KEPT[name]
    with jax.numpy_rank_promotion("allow"):
        assert labels(f, UNITS) == [Local(axis, N)]
        jacobian = np.asarray(jax.jacfwd(f)(jnp.ones(N)), np.float32)
    index = np.indices(jacobian.shape)
    assert not jacobian[index[axis] % N != index[-1]].any()
    assert jacobian.any()


@pytest.mark.parametrize("name", MET)
def test_where_units_meet_is_remembered(name):
    f, primitive = MET[name]
    with jax.numpy_rank_promotion("allow"):
        (label,) = labels(f, UNITS)
    assert isinstance(label, Mixed) and label.primitive == primitive
    if primitive not in ("cumsum", "pad", "tanh"):  # of JAX's own lines
        assert "test_transform_units.py" in label.line


def test_what_is_multiplied_by_zeros_depends_on_nothing():
    def f(bar, zeros, other):
        moved = jnp.concatenate([zeros, zeros]).reshape(N, 2).astype(jnp.float32)
        moved = lax.stop_gradient(moved)[jnp.argsort(other)]
        return bar @ moved, bar * zeros + other, bar @ jnp.zeros((N, 2)), zeros + bar

    found = labels(f, UNITS, "zero", "free")
    assert found == ["zero", "free", "zero", UNITS]


def test_what_a_cotangent_does_not_reach_is_free():
    assert labels(lambda bar, x: (x.sum(), jnp.tanh(x), bar), UNITS, "free") == [
        "free", "free", UNITS
    ]  # fmt: skip
    assert [units.depends(label) for label in (UNITS, Mixed("", ""), "free", "zero")] == [
        True, True, False, False
    ]  # fmt: skip
