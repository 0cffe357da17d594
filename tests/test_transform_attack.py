"""Programs that tried to send an error through weights, and what became of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.ode import odeint

from soap_jax import explain, with_feedback


def draw(*shape, seed=0):
    values = np.random.default_rng([seed, *shape]).standard_normal(shape)
    return jnp.asarray(values, jnp.float32)


PARAMS = {"w": draw(3, 3), "v": draw(3, 3, seed=1)}
X, MASK = draw(4, 3), jnp.asarray(np.tri(3), jnp.float32)

MIXED = {  # v has no feedback: a mask makes no activation of it
    "multiplied": lambda p, m: p["w"] * (m * p["v"]),
    "added": lambda p, m: p["w"] + m * p["v"],
    "changed, then multiplied": lambda p, m: p["w"] * jnp.tanh(m * p["v"]),
    "masked by a sum": lambda p, m: p["w"] * (m + p["v"]),
    "multiplied to a constant": lambda p, m: p["w"] * ((m * p["v"]) @ jnp.eye(3)),
}


@pytest.mark.parametrize("name", MIXED)
def test_a_masked_param_mixed_into_a_kernel_is_refused_as_the_param_is(name):
    def loss(p, x, m):
        return jnp.sum(x @ MIXED[name](p, m)) + jnp.sum(x @ p["w"])

    grad = jax.grad(with_feedback(loss), 2)
    with pytest.raises(ValueError, match=r"kernel at \['w'\] itself.*\['v'\]"):
        jax.eval_shape(grad, PARAMS, {"w": PARAMS["v"]}, X, MASK)


def elsewhere(loss, x, *args):
    """A linear function's gradient by x, at other kernels with the same feedback."""
    changed = PARAMS | {"w": PARAMS["w"] + 1}
    feedback = {"w": draw(3, 3, seed=2)}
    grad = jax.jit(jax.grad(with_feedback(loss), 2))
    return grad(PARAMS, feedback, x, *args), grad(changed, feedback, x, *args)


LAID_OUT = {
    "a mask in an einsum": lambda p, m: jnp.einsum("ij,ij->ij", p["w"], m),
    "a mask of columns in an einsum": lambda p, m: jnp.einsum("ij,j->ij", p["w"], m[1]),
    "a choice of a choice": lambda p, m: jnp.where(
        m > 0, jnp.where(m > 0, p["w"], 0), jnp.where(m > 0, 0, p["v"])
    ),
}


@pytest.mark.parametrize("name", LAID_OUT)
def test_a_masked_kernel_keeps_its_feedback(name):
    one, other = elsewhere(
        lambda p, x, m: jnp.sum((x @ LAID_OUT[name](p, m)) @ jnp.arange(3.0)), X, MASK
    )
    np.testing.assert_array_equal(one, other)


def test_members_that_choose_a_kernel_each_have_its_feedback():
    def loss(p, x, i):
        def one(x, i):
            return x @ lax.cond(i > 0, lambda: p["w"], lambda: p["v"])

        return jnp.sum(jax.vmap(one)(x, i))

    one, other = elsewhere(loss, X, jnp.array([0, 1, 1, 0]))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("rows", [lambda w, i: w[i], lambda w, i: jnp.tanh(w)[i]])
def test_looked_up_rows_that_a_scan_makes_an_activation_serve_as_a_last_layer_too(rows):
    def loss(p, ids):
        h = rows(p["w"], ids)
        h, _ = lax.scan(lambda h, _: (h + jnp.tanh(h @ p["v"]), None), h, None, length=2)
        return jnp.sum(jnp.sin(h @ p["w"].T))

    ids = jnp.array([0, 2, 1, 2])
    assert explain(loss, PARAMS, ids)["w"].effect == "feedback"
    equal = jax.grad(with_feedback(loss))(PARAMS, PARAMS, ids)
    jax.tree.map(np.testing.assert_array_equal, equal, jax.grad(loss)(PARAMS, ids))
    zero = jax.grad(with_feedback(loss))(PARAMS, {"w": jnp.zeros((3, 3))}, ids)
    assert not np.any(zero["v"])


def test_a_number_made_of_part_of_a_kernel_is_refused():
    def loss(p, x):
        part = lax.reduce_window(p["w"], -jnp.inf, lax.max, (2, 2), (3, 3), "VALID")
        return jnp.sum(x * part) + jnp.sum(x @ p["w"])

    with pytest.raises(ValueError, match=r"kernel at \['w'\] itself"):
        jax.eval_shape(jax.grad(with_feedback(loss), 2), PARAMS, {"w": PARAMS["v"]}, X)


def test_a_penalty_of_masked_weights_is_exact():
    def loss(p, x, m):
        return jnp.sum(jnp.tanh(x) @ p["w"]) + jnp.sum((p["w"] * m) ** 2) + jnp.sum(m * p["v"])

    ours = jax.grad(with_feedback(loss))(PARAMS, {"w": PARAMS["v"]}, X, MASK)
    jax.tree.map(np.testing.assert_allclose, ours, jax.grad(loss)(PARAMS, X, MASK))


@jax.custom_vjp
def product(x, w):
    return x @ w


product.defvjp(lambda x, w: (x @ w, (x, w)), lambda xw, g: (g @ jnp.tanh(xw[1]).T, xw[0].T @ g))


def test_a_cotangent_that_no_one_asks_for_passes_nothing():
    """Of data, in the backward pass of a function that has its own."""

    def loss(p, x):
        return jnp.sum(jnp.sin(product(x, p["w"]) @ p["v"]))

    assert [(row.path, row.effect) for row in explain(loss, PARAMS, X)] == [
        (("w",), "no effect"),
        (("v",), "feedback"),
    ]


@jax.custom_vjp
def flagged(x, w):
    return x @ w


def flagged_bwd(residuals, g):
    x, w, flag = residuals
    return (g @ w.T if flag else g), x.T @ g


flagged.defvjp(lambda x, w: (x @ w, (x, w, True)), flagged_bwd)


def test_a_backward_pass_may_branch_on_flags_among_its_residuals():
    def loss(p, x):
        return jnp.sum(jnp.sin(flagged(x, p["w"])))

    one = jax.grad(with_feedback(loss), 2)(PARAMS, {"w": PARAMS["w"]}, X)
    np.testing.assert_allclose(one, jax.grad(loss, 1)(PARAMS, X), rtol=1e-6)
    assert not np.any(jax.grad(with_feedback(loss), 2)(PARAMS, {"w": jnp.zeros((3, 3))}, X))


# Data mixed into weights: an activation or weights, so no error goes through them in silence

NET = {"w": draw(3, 3) / 2, "o": draw(3, 2, seed=3)}


def unrolled(p, x):
    """A recurrent net that starts at a constant and to which its input is added."""
    h = jnp.zeros_like(x)
    for _ in range(3):
        h = jnp.tanh(h @ p["w"] + x)
    return h


AMBIGUOUS = {
    "a state that starts at zero": unrolled,
    "one unit": lambda p, x: unrolled({"w": p["w"][:1, :1]}, x[:1, :1]),
    "a kernel that scales data twice": lambda p, x: jnp.tanh(jnp.tanh(x * p["w"][:1]) * p["w"][:1]),
    "a square that scales data": lambda p, x: (x * p["w"][:1] * p["w"][:1] - 1) ** 2,
    "a first layer that is solved": lambda p, x: jnp.linalg.solve(p["w"], x.T),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
@pytest.mark.parametrize("readout", [False, True])
def test_no_feedback_is_accepted_and_ignored(name, readout):
    def loss(p, x):
        h = AMBIGUOUS[name](p, x)
        return jnp.sum(jnp.tanh(h) @ p["o"][: h.shape[-1]] if readout and h.shape[-1] < 4 else h)

    assert explain(loss, NET, X)["w"].effect == "backprop"
    with pytest.raises(ValueError, match=r"kernel at \['w'\] itself|at \['w'\] would do nothing"):
        jax.eval_shape(jax.grad(with_feedback(loss)), NET, {"w": NET["w"], "o": None}, X)


def test_a_state_that_starts_at_an_argument_goes_through_feedback():
    def loss(p, x, h):
        for _ in range(3):
            h = jnp.tanh(h @ p["w"] + x)
        return jnp.sum(h @ p["o"])

    assert explain(loss, NET, X, X)["w"].effect == "feedback"


NOISY = {  # a is an argument
    "noise": lambda w, a: w + a,
    "a base": lambda w, a: a - 0.1 * w,
    "rows": lambda w, a: w.at[0].set(a[0]),
    "a choice": lambda w, a: jnp.where(a > 0, w, a),
    "bounds": lambda w, a: jnp.clip(w, -a, a),
    "a mask in tanh": lambda w, a: jnp.tanh(w * a),
}


@pytest.mark.parametrize("name", NOISY)
def test_weights_with_data_in_them_are_said_to_be_backprop(name):
    def loss(p, x, a):
        h = jnp.tanh(x @ p["v"])
        return jnp.sum(jnp.tanh(h @ NOISY[name](p["w"], a)))

    row = explain(loss, PARAMS, X, MASK)["w"]
    assert row.effect == "backprop" and any(use.problem for use in row.uses)


def decoder(p, y):
    """Latents are params, so that there is no data before the loss."""
    return jnp.sum((jnp.tanh(jnp.tanh(p["z"] @ p["w"]) @ p["v"]) @ p["o"] - y) ** 2)


def coordinates(p, y):
    grid = jnp.linspace(-1, 1, 12).reshape(4, 3)
    return jnp.sum((jnp.sin(jnp.sin(grid @ p["w"]) @ p["v"]) @ p["o"] - y) ** 2)


def cores(p, y):
    return jnp.sum((jnp.einsum("bi,ij,jk,kl->bl", X + y[:, :1], p["w"], p["v"], p["o"]) - y) ** 2)


@pytest.mark.parametrize("loss", [decoder, coordinates, cores])
def test_what_an_explanation_selects_is_not_refused(loss):
    params = PARAMS | {"o": NET["o"], "z": X}
    found = explain(loss, params, draw(4, 2))
    feedback = {k: v if found[k].effect == "feedback" else None for k, v in params.items()}
    jax.eval_shape(jax.grad(with_feedback(loss)), params, feedback, draw(4, 2))
    given = explain(loss, params, draw(4, 2), feedback=feedback)
    assert all(given[k].effect == "feedback" for k, v in feedback.items() if v is not None)


@jax.custom_vjp
def integrate(h, w):
    """Two steps of Euler's method; the backward pass goes back through the states themselves."""
    for _ in range(2):
        h = h + 0.1 * jnp.tanh(h @ w)
    return h


def integrate_bwd(residuals, h_bar):
    h, w = residuals
    both, w_bar = jnp.concatenate([h, h_bar]), 0.0
    for _ in range(2):
        h, h_bar = jnp.split(both, 2)
        h = h - 0.1 * jnp.tanh(h @ w)
        z_bar = 0.1 * (1 - jnp.tanh(h @ w) ** 2) * h_bar
        both, w_bar = jnp.concatenate([h, h_bar + z_bar @ w.T]), w_bar + h.T @ z_bar
    return jnp.split(both, 2)[1], w_bar


integrate.defvjp(lambda h, w: ((h := integrate(h, w)), (h, w)), integrate_bwd)


def ode(h, w):
    return odeint(lambda h, t, w: jnp.tanh(h @ w), h, jnp.array([0.0, 1.0]), w)[-1]


@pytest.mark.parametrize("middle", [ode, integrate])
def test_a_backward_pass_that_joins_errors_with_states_is_refused(middle):
    """It computes states again, with weights, from an array that also has errors."""

    def loss(p, x):
        return jnp.sum(jnp.sin(middle(jnp.tanh(x @ p["v"]), p["w"])) @ p["o"])

    params = PARAMS | {"o": NET["o"]}
    assert explain(loss, params, X)["w"].effect == "backprop"
    grad = jax.grad(with_feedback(loss))
    jax.eval_shape(grad, params, {"w": None, "v": None, "o": NET["o"]}, X)
    with pytest.raises(ValueError, match="an error is joined with values that are no errors"):
        jax.eval_shape(grad, params, {"w": PARAMS["w"], "v": None, "o": NET["o"]}, X)
