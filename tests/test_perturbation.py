"""Gradients by perturbation: exact over a basis, unbiased with the variance that theory says."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import soap_jax
from soap_jax import activity, draws, training
from soap_jax.perturbation import forward_gradient, node_perturbation, weight_perturbation

KEY = jax.random.key(5)
RNG = np.random.default_rng(0)
X = RNG.standard_normal((7, 4)).astype(np.float32)
Y = RNG.standard_normal((7, 2)).astype(np.float32)
PARAMS = {
    "a": jnp.asarray(RNG.standard_normal((4, 5)) / 2, jnp.float32),
    "b": jnp.asarray(RNG.standard_normal((5, 2)) / 2, jnp.float32),
}


def losses(tap, params, x, y):
    """Of each example; the output of both layers is tapped."""
    h = jnp.tanh(tap("a", x @ params["a"]))
    return jnp.mean((tap("b", h @ params["b"]) - y) ** 2, axis=-1)


def tapped(tap, params, x, y):
    return jnp.mean(losses(tap, params, x, y))


loss = functools.partial(tapped, activity.untapped)
GRADIENT = jax.grad(loss)(PARAMS, X, Y)
MAKERS = {
    "forward": functools.partial(forward_gradient, loss),
    "weight": functools.partial(weight_perturbation, loss),
    "node": functools.partial(node_perturbation, tapped),
    "node by example": functools.partial(node_perturbation, losses),
}
each = pytest.mark.parametrize("name", MAKERS)


def basis(key, shape):
    """All axes of what is perturbed, once each; of mean square 1."""
    num = shape[0]
    return jnp.sqrt(num) * jnp.eye(num).reshape(shape)


def squared_distance(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(np.sum((np.asarray(x, float) - np.asarray(y, float)) ** 2) for x, y in pairs)


# Exact over a basis


def of_one_leaf(w, x):
    return jnp.sum((x @ w) ** 2) + jnp.sum(w)  # quadratic: differences are exact


@pytest.mark.parametrize("method", [forward_gradient, weight_perturbation])
def test_directions_that_are_a_basis_give_the_gradient(method):
    w = PARAMS["a"]
    options = {"scale": 0.5} if method is weight_perturbation else {}
    grad_fn = method(of_one_leaf, directions=w.size, sampler=basis, **options)
    value, found = jax.jit(grad_fn)(w, X, key=KEY)
    expected_value, expected = jax.value_and_grad(of_one_leaf)(w, X)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    # Differences of losses of about 100, over steps of 2, in float32.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-4)


def test_a_basis_of_the_nodes_gives_the_gradient():
    def of_examples(tap, w, x):
        return jnp.sum(tap("y", x @ w) ** 2, axis=-1)

    def each_example(key, shape):  # the same basis of its own units for every example
        num, batch, units = shape
        assert num == units
        one = jnp.sqrt(num) * jnp.eye(num)
        return jnp.broadcast_to(one[:, None], (num, batch, units))

    w = PARAMS["a"]
    expected = jax.grad(lambda w: jnp.mean(of_examples(activity.untapped, w, X)))(w)
    by_example = node_perturbation(of_examples, scale=0.5, directions=5, sampler=each_example)
    of_all = node_perturbation(
        lambda *args: jnp.mean(of_examples(*args)), scale=0.5, directions=7 * 5, sampler=basis
    )
    for grad_fn in (by_example, of_all):
        _, found = jax.jit(grad_fn)(w, X, key=KEY)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


# By hand


def numpy_losses(params, x, y, noise=None):
    shift = noise or {"a": 0, "b": 0}
    h = np.tanh(x @ params["a"] + shift["a"])
    return np.mean((h @ params["b"] + shift["b"] - y) ** 2, -1)


def test_weight_perturbation_by_hand():
    grad_fn = weight_perturbation(loss, scale=0.1, directions=2)
    _, found = jax.jit(grad_fn)(PARAMS, X, Y, key=KEY)
    keys = jax.random.split(KEY)
    params = {name: np.asarray(w, float) for name, w in PARAMS.items()}
    v = {
        name: np.asarray(draws.signs(key, (2, *params[name].shape)))
        for name, key in zip("ab", keys, strict=True)
    }
    expected = {name: 0.0 for name in "ab"}
    for i in range(2):
        up, down = (
            numpy_losses({n: w + s * v[n][i] for n, w in params.items()}, X, Y).mean()
            for s in (0.1, -0.1)
        )
        for name in "ab":
            expected[name] = expected[name] + (up - down) / 0.2 * v[name][i] / 2
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by_example", [True, False])
def test_node_perturbation_by_hand(by_example):
    grad_fn = node_perturbation(losses if by_example else tapped, scale=0.1)
    _, found = jax.jit(grad_fn)(PARAMS, X, Y, key=KEY)
    keys = jax.random.split(KEY)
    params = {name: np.asarray(w, float) for name, w in PARAMS.items()}
    noise = {"a": draws.normal(keys[0], (1, 7, 5))[0], "b": draws.normal(keys[1], (1, 7, 2))[0]}
    noise = {name: np.asarray(xi, float) for name, xi in noise.items()}
    up, down = (
        numpy_losses(params, X, Y, {n: s * xi for n, xi in noise.items()}) for s in (0.1, -0.1)
    )
    slopes = (up - down) / 0.2
    slopes = slopes[:, None] / 7 if by_example else slopes.mean()
    h = np.tanh(X @ params["a"])
    expected = {"a": X.T @ (slopes * noise["a"]), "b": h.T @ (slopes * noise["b"])}
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


def test_params_after_the_last_tap_have_their_exact_gradient():
    def without_the_outputs_tap(tap, params, x, y):
        return tapped(lambda name, a: tap(name, a) if name == "a" else a, params, x, y)

    _, found = jax.jit(node_perturbation(without_the_outputs_tap))(PARAMS, X, Y, key=KEY)
    np.testing.assert_allclose(found["b"], GRADIENT["b"], rtol=1e-5, atol=1e-6)
    assert np.abs(found["a"] - GRADIENT["a"]).max() > 1e-3


# Unbiased, and as noisy as theory says


def variances():
    """`(method, E |g - ∇L|²)` of one direction, on losses that are quadratic in what is moved."""
    target = jnp.arange(1.0, 9.0)

    def quadratic(w):
        return jnp.sum((w - target) ** 2) / 2  # the gradient at 0: -target

    def outputs(tap, w, by_example):
        values = (tap("y", X[:, :1] * w[None]) - target[None]) ** 2
        return jnp.sum(values, -1) if by_example else jnp.sum(values) / 7

    w, square = jnp.zeros(8), float(jnp.sum(target**2))
    error = np.tile(-2 * np.asarray(target) / 7, (7, 1))  # of the mean loss, example by example
    x2 = np.asarray(X[:, 0], float) ** 2
    # W_bar = Σ_b x_b s_b ξ_b: by example N + 1 = 9 times each |x_b e_b|². One slope s of the whole
    # batch is normal with all of |e|², and weighs z = Σ_b x_b ξ_b: E s²z² = E s² E z² + 2 g².
    own = (error**2).sum(1)
    by_example = 9 * (x2 * own).sum()
    gradient = (np.asarray(X[:, :1], float) * error).sum(0)
    of_all = 8 * x2.sum() * own.sum() + (gradient**2).sum()
    return {
        "forward": (functools.partial(forward_gradient, quadratic), (w,), 9 * square),
        "forward, signs": (
            functools.partial(forward_gradient, quadratic, sampler=draws.signs), (w,), 7 * square
        ),
        "weight": (functools.partial(weight_perturbation, quadratic), (w,), 7 * square),
        "weight, normal": (
            functools.partial(weight_perturbation, quadratic, sampler=jax.random.normal),
            (w,),
            9 * square,
        ),
        "node": (
            functools.partial(node_perturbation, functools.partial(outputs, by_example=False)),
            (w,),
            of_all,
        ),
        "node by example": (
            functools.partial(node_perturbation, functools.partial(outputs, by_example=True)),
            (w,),
            by_example,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", variances())
def test_estimates_are_unbiased_and_as_noisy_as_theory_says(name):
    make, args, variance = variances()[name]
    options = {} if "forward" in name else {"scale": 0.5}
    num = 20_000
    grad_fn = jax.jit(jax.vmap(lambda key: make(**options)(*args, key=key)[1]))
    found = np.asarray(grad_fn(jax.random.split(KEY, num)), float)
    expected = -np.arange(1.0, 9.0) * (2 * X[:, 0].mean() if "node" in name else 1)
    off = np.sum((found.mean(0) - expected) ** 2)
    # The mean of 20,000 has the variance / 20,000, over 8 entries: three times that is far beyond.
    assert off < 3 * variance / num
    spread = np.mean(np.sum((found - expected) ** 2, -1))
    np.testing.assert_allclose(spread, variance, rtol=0.05)  # fourth moments: some 1 %


def test_n_directions_have_an_nth_of_the_variance():
    keys = jax.random.split(KEY, 3000)

    def spread(directions):
        grad_fn = forward_gradient(of_one_leaf, directions=directions)
        found = jax.jit(jax.vmap(lambda key: grad_fn(PARAMS["a"], X, key=key)[1]))(keys)
        expected = jax.grad(of_one_leaf)(PARAMS["a"], X)
        return np.mean(np.sum((np.asarray(found) - np.asarray(expected)) ** 2, (1, 2)))

    np.testing.assert_allclose(spread(1) / spread(5), 5, rtol=0.15)


def test_node_perturbation_by_example_is_less_noisy_than_by_the_batch_and_than_by_weights():
    keys = jax.random.split(KEY, 500)

    def noise(name):
        found = jax.jit(jax.vmap(lambda key: MAKERS[name]()(PARAMS, X, Y, key=key)[1]))(keys)
        return sum(np.sum(np.var(found[layer], axis=0)) for layer in found)

    found = {name: noise(name) for name in MAKERS}
    assert found["node by example"] < found["node"] / 3
    assert found["node by example"] < found["weight"] / 2


# What is asked of all


@each
def test_the_value_is_the_loss_and_aux_is_that_of_the_unchanged_loss(name):
    def with_aux(of):
        def fun(*args):
            value = of(*args)
            return value, {"loss": jnp.mean(value), "x": args[-2]}

        return fun

    of, method = {
        "forward": (loss, forward_gradient),
        "weight": (loss, weight_perturbation),
        "node": (tapped, node_perturbation),
        "node by example": (losses, node_perturbation),
    }[name]
    grad_fn = method(with_aux(of), directions=3, has_aux=True)
    (value, aux), gradient = jax.jit(grad_fn)(PARAMS, X, Y, key=KEY)
    np.testing.assert_allclose(value, loss(PARAMS, X, Y), rtol=1e-6)
    np.testing.assert_allclose(aux["loss"], value, rtol=1e-6)
    np.testing.assert_array_equal(aux["x"], X)
    plain_value, plain = jax.jit(method(of, directions=3))(PARAMS, X, Y, key=KEY)
    np.testing.assert_allclose(plain_value, value, rtol=1e-6)
    chex.assert_trees_all_close(plain, gradient, rtol=1e-3, atol=1e-3)  # of differences


@each
def test_under_vmap_and_scan_each_is_as_alone(name):
    grad_fn = MAKERS[name]()
    keys = jax.random.split(KEY, 3)
    alone = [jax.jit(grad_fn)(PARAMS, X, Y, key=key)[1] for key in keys]
    alone = jax.tree.map(lambda *g: jnp.stack(g), *alone)
    together = jax.jit(jax.vmap(lambda key: grad_fn(PARAMS, X, Y, key=key)[1]))(keys)
    scanned = jax.jit(lambda: lax.map(lambda key: grad_fn(PARAMS, X, Y, key=key)[1], keys))()
    # Differences over 2e-3 of losses of about 1 have four digits.
    chex.assert_trees_all_close((together, scanned), (alone, alone), rtol=1e-2, atol=1e-2)


@each
def test_gradients_have_the_dtype_of_params(name):
    args = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), (PARAMS, X, Y))
    options = {} if name == "forward" else {"scale": 0.1}
    grad_fn = MAKERS[name](directions=4000, **options)
    value, found = jax.jit(grad_fn)(*args, key=KEY)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, args[0])
    np.testing.assert_allclose(float(value), loss(PARAMS, X, Y), rtol=0.02)
    whole = squared_distance(GRADIENT, jax.tree.map(jnp.zeros_like, GRADIENT))
    assert squared_distance(found, GRADIENT) < 0.03 * whole  # 31 / 4000, and rounding


def test_raw_keys_and_other_samplers_will_do():
    grad_fn = jax.jit(forward_gradient(loss, sampler=jax.random.rademacher))
    typed, raw = grad_fn(PARAMS, X, Y, key=KEY), grad_fn(PARAMS, X, Y, key=jax.random.key_data(KEY))
    chex.assert_trees_all_equal(typed, raw)
    other = grad_fn(PARAMS, X, Y, key=jax.random.key(6))
    assert not np.array_equal(typed[1]["a"], other[1]["a"])


def test_params_may_be_numbers():
    for grad_fn in (forward_gradient(abs), weight_perturbation(abs)):
        value, gradient = grad_fn(-3.0, key=KEY)
        assert value == 3 and float(gradient) < 0


def test_a_loss_that_draws_draws_the_same_in_all_evaluations():
    def noisy(w, key):
        return jnp.sum(w**2) + 100 * jax.random.normal(key)

    w = jnp.array([1.0, -2.0, 0.5])
    grad_fn = weight_perturbation(noisy, scale=0.5, directions=3, sampler=basis)
    _, found = jax.jit(grad_fn)(w, jax.random.key(1), key=KEY)
    np.testing.assert_allclose(found, 2 * w, atol=1e-3)


def test_forward_gradients_go_through_loops_and_conditionals():
    def through(w, x):
        h, _ = lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, length=3)
        h = lax.cond(jnp.sum(x) > 0, jnp.sin, jnp.cos, h)
        return jnp.sum(jax.jit(jax.nn.relu)(h)) + lax.while_loop(
            lambda c: c[0] < 2, lambda c: (c[0] + 1, jnp.sum(w) * c[1]), (0, 1.0)
        )[1]  # fmt: skip

    w = PARAMS["a"] @ PARAMS["a"].T
    grad_fn = forward_gradient(through, directions=16, sampler=basis)
    value, found = jax.jit(grad_fn)(w, X, key=KEY)
    expected = jax.jacfwd(through)(w, X)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(value, through(w, X), rtol=1e-6)


def test_weight_perturbation_asks_for_no_derivative():
    """A loss that rounds, behind a callback; forward gradients refuse what is reverse alone."""

    def on_a_device(w):
        return np.float32(np.round(100 * np.sum(w**2)) / 100)

    def device(w):
        return jax.pure_callback(
            on_a_device, jax.ShapeDtypeStruct((), jnp.float32), w, vmap_method="sequential"
        )

    w = jnp.array([1.0, -2.0, 0.5])
    grad_fn = weight_perturbation(device, scale=0.5, directions=3, sampler=basis)
    np.testing.assert_allclose(jax.jit(grad_fn)(w, key=KEY)[1], 2 * w, atol=0.05)
    through = soap_jax.with_feedback(loss)
    grad_fn = forward_gradient(lambda params, x, y: through(params, {"b": params["b"]}, x, y))
    with pytest.raises(TypeError, match="forward-mode"):
        grad_fn(PARAMS, X, Y, key=KEY)


@pytest.mark.parametrize("name", ["forward", "weight", "node by example"])
def test_a_batch_may_be_spread_over_an_explicit_mesh(name, mesh):
    x, y = X[:4], Y[:4]
    expected = jax.jit(MAKERS[name]())(PARAMS, x, y, key=KEY)
    x, y = jax.device_put((x, y), NamedSharding(mesh, P("data", None)))
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    found = jax.jit(MAKERS[name]())(params, x, y, key=KEY)
    chex.assert_trees_all_close(found, expected, rtol=1e-2, atol=1e-2)


@each
def test_each_learns_in_a_scanned_loop(name):
    grad_fn = MAKERS[name](directions=4)
    optimizer = optax.sgd(0.02)

    def gradient(params, feedback, batch, *, step):
        return grad_fn(params, *batch, key=jax.random.fold_in(KEY, step))

    step = training.make_gradient_step(gradient, optimizer)
    state = training.init_train_state(PARAMS, optimizer)
    _, curve = jax.jit(lambda s: lax.scan(lambda s, _: step(s, (X, Y)), s, length=400))(state)
    assert curve[-20:].mean() < 0.6 * curve[0]


# Errors


@pytest.mark.parametrize("method", [forward_gradient, weight_perturbation, node_perturbation])
def test_numbers_out_of_range_raise(method):
    for directions in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="directions is"):
            method(loss, directions=directions)
    with pytest.raises(ValueError, match=r"sampler is 3; expected a function \(key, shape\)"):
        method(loss, sampler=3)
    if method is not forward_gradient:
        for scale in (0.0, -1e-3, "small", np.inf):
            with pytest.raises(ValueError, match=r"scale is .*; expected a positive number"):
                method(loss, scale=scale)


def test_a_scale_may_be_traced():
    def at(scale):
        return weight_perturbation(of_one_leaf, scale=scale)(PARAMS["a"], X, key=KEY)[1]

    for scale in (0.1, 1.0):  # quadratic: any scale gives the same
        np.testing.assert_allclose(jax.jit(at)(scale), at(0.5), rtol=1e-3, atol=1e-2)


def test_params_without_slopes_raise():
    params = {"w": jnp.ones(3), "steps": jnp.arange(2)}
    with pytest.raises(ValueError, match=r"\['steps'\] is int..; expected real floating-point"):
        weight_perturbation(lambda p: jnp.sum(p["w"]))(params, key=KEY)
    with pytest.raises(ValueError, match=r"params is complex64; expected real floating-point"):
        forward_gradient(lambda w: jnp.sum(jnp.abs(w)))(jnp.ones(2, jnp.complex64), key=KEY)


def test_keys_and_draws_that_do_not_fit_raise():
    with pytest.raises(ValueError, match="key is 3; expected one PRNG key"):
        forward_gradient(loss)(PARAMS, X, Y, key=3)
    grad_fn = forward_gradient(loss, sampler=lambda key, shape: jnp.ones(shape[1:]))
    with pytest.raises(ValueError, match=r"sampler drew \(4, 5\); expected \(1, 4, 5\)"):
        grad_fn(PARAMS, X, Y, key=KEY)


def test_taps_that_do_not_fit_raise():
    with pytest.raises(ValueError, match="the loss taps nothing"):
        node_perturbation(lambda tap, params, x, y: loss(params, x, y))(PARAMS, X, Y, key=KEY)

    def features_first(tap, params, x, y):
        return losses(lambda name, a: tap(name, a.T).T, params, x, y)

    message = r"the loss has the shape \(7,\) and taps have \{'a': \(5, 7\), 'b': \(2, 7\)\}"
    with pytest.raises(ValueError, match=message):
        node_perturbation(features_first)(PARAMS, X, Y, key=KEY)

    def of_outputs(tap, params, x, y):
        return (tap("b", x @ params["a"] @ params["b"]) - y) ** 2

    with pytest.raises(ValueError, match=r"the loss has the shape \(7, 2\)"):
        node_perturbation(of_outputs)(PARAMS, X, Y, key=KEY)
