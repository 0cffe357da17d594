"""The cut keeps a function's structure, and says where it cannot be made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from soap_jax import direct_feedback, init_projections, with_direct_feedback, with_feedback
from soap_jax.ops import detach

KEY = jax.random.key(0)
BATCH, STEPS, IN, WIDTH, OUT = 5, 7, 3, 4, 2


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


X, Y, XS = draw(0, BATCH, IN), draw(1, BATCH, OUT), draw(2, STEPS, BATCH, IN)
PARAMS = {"in": draw(3, IN, WIDTH), "u": draw(4, WIDTH, WIDTH), "out": draw(5, WIDTH, OUT)}
P = {"h": draw(6, OUT, WIDTH)}


def equations(jaxpr, name):
    """The equations of a primitive, at any depth."""
    found = []
    for eqn in jaxpr.eqns:
        found += [eqn] * (eqn.primitive.name == name)
        for value in eqn.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(inner, core.ClosedJaxpr):
                    found += equations(inner.jaxpr, name)
                elif isinstance(inner, core.Jaxpr):
                    found += equations(inner, name)
    return found


def lines_of(f, *args):
    return jax.jit(f).lower(*args).as_text(debug_info=True)


# Structure


def loss_of_steps(params, xs, wrap=lambda f: f):
    @wrap
    def step(h, x):
        h = checkpoint_name(jnp.tanh(x @ params["in"] + h @ params["u"]), "h")
        return h, checkpoint_name(h @ params["out"], "z")

    return jnp.mean(lax.scan(step, jnp.zeros((BATCH, WIDTH)), xs)[1] ** 2)


def test_no_error_goes_back_through_time():
    """The backward scan carries the gradients of the params alone."""
    loss = with_direct_feedback(loss_of_steps, "h", "z")
    forward, backward = equations(jax.make_jaxpr(jax.grad(loss))(PARAMS, P, XS).jaxpr, "scan")
    assert not forward.params["reverse"] and backward.params["reverse"]
    carried = backward.outvars[: len(PARAMS)]
    assert len(backward.outvars) == len(PARAMS)
    assert sorted(v.aval.shape for v in carried) == sorted(w.shape for w in PARAMS.values())
    through_time = jax.make_jaxpr(jax.grad(loss_of_steps))(PARAMS, XS).jaxpr
    assert len(equations(through_time, "scan")[-1].outvars) == len(PARAMS) + 1


def test_a_scan_a_checkpoint_and_a_jit_are_kept_with_their_options():
    policy = jax.checkpoint_policies.save_only_these_names("block")

    def loss(params, x):
        @jax.jit
        def named_block(h, w):
            return checkpoint_name(jnp.tanh(h @ w), "block")

        def body(h, w):
            return jax.checkpoint(named_block, policy=policy, prevent_cse=False)(h, w), None

        h, _ = lax.scan(body, x, params["blocks"], reverse=True, unroll=2)
        return jnp.mean(checkpoint_name(h @ params["out"], "z") ** 2)

    params = {"blocks": draw(1, 6, IN, IN), "out": draw(2, IN, OUT)}
    loss_dfa = with_direct_feedback(loss, "block", "z", stacked="blocks")
    projections = init_projections(KEY, loss_dfa, params, X)
    before = jax.make_jaxpr(loss)(params, X).jaxpr
    after = jax.make_jaxpr(loss_dfa)(params, projections, X).jaxpr
    for name, options in {
        "scan": ("length", "reverse", "unroll"),
        "remat2": ("policy", "prevent_cse"),
        "checkpoint": ("policy", "prevent_cse"),
        "jit": ("name", "inline"),
        "name": ("name",),
    }.items():
        ours, theirs = (
            [[eqn.params[option] for option in options] for eqn in equations(jaxpr, name)]
            for jaxpr in (after, before)
        )
        assert ours == theirs
    assert equations(after, "scan") and equations(after, "name") and equations(after, "jit")


def test_custom_derivatives_are_kept():
    @jax.custom_vjp
    def doubled(x):
        return x

    doubled.defvjp(lambda x: (x, None), lambda _, x_bar: (2 * x_bar,))

    @jax.custom_jvp
    def tripled(x):
        return x

    tripled.defjvp(lambda primals, tangents: (primals[0], 3 * tangents[0]))

    def loss(params, times):
        h = checkpoint_name(times(X @ params["in"]), "h")
        return jnp.mean(checkpoint_name(times(h @ params["out"]), "z") ** 2)

    once, six = (
        jax.grad(with_direct_feedback(lambda p, f=f: loss(p, f), "h", "z"))(PARAMS, P)
        for f in (lambda x: x, lambda x: doubled(tripled(x)))
    )
    np.testing.assert_allclose(six["out"], 6 * once["out"], rtol=1e-5)
    np.testing.assert_allclose(six["in"], 6 * once["in"], rtol=1e-5)


def test_profiles_show_the_lines_of_the_model_and_the_scope_of_direct_feedback():
    def loss(params, x):
        with jax.named_scope("my_block"):
            h = checkpoint_name(jnp.tanh(x @ params["in"]), "h")
        return jnp.mean(checkpoint_name(h @ params["out"], "z") ** 2)

    text = lines_of(jax.grad(with_direct_feedback(loss, "h", "z")), PARAMS, P, X)
    assert "jvp(my_block)/tanh" in text and "test_transform_cut.py" in text
    assert "jit(loss)/transpose(jvp(direct_feedback))" in text


def test_a_new_batch_does_not_retrace():
    traces = []

    def loss(params, x):
        traces.append(None)
        h = checkpoint_name(jnp.tanh(x @ params["in"]), "h")
        return jnp.mean(checkpoint_name(h @ params["out"], "z") ** 2)

    step = jax.jit(jax.grad(with_direct_feedback(loss, "h", "z")))
    step(PARAMS, P, X), step(PARAMS, {"h": P["h"] + 1}, X + 1)
    assert len(traces) == 1


def test_inside_shard_map_it_is_per_device():
    mesh = Mesh(np.array(jax.devices()[:1]), "d")

    def loss(params, x):
        h = checkpoint_name(jnp.tanh(x @ params["in"]), "h")
        return jnp.mean(checkpoint_name(h @ params["out"], "z") ** 2)

    loss_dfa = with_direct_feedback(loss, "h", "z")

    def step(params, projections, x):
        return jax.tree.map(lambda g: lax.pmean(g, "d"), jax.grad(loss_dfa)(params, projections, x))

    split = jax.shard_map(step, mesh=mesh, in_specs=(Spec(), Spec(), Spec("d")), out_specs=Spec())
    actual, expected = jax.jit(split)(PARAMS, P, X), jax.jit(jax.grad(loss_dfa))(PARAMS, P, X)
    for name, g in actual.items():
        if name != "u":
            np.testing.assert_allclose(g, expected[name], rtol=1e-5, atol=1e-6)


# Where it cannot be made


@jax.custom_vjp
def by_vjp(w, x):
    return checkpoint_name(x @ w, "h")


by_vjp.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, y_bar: (r[1].T @ y_bar, y_bar @ r[0].T))


@jax.custom_jvp
def by_jvp(w, x):
    return checkpoint_name(x @ w, "h")


by_jvp.defjvp(lambda primals, tangents: (by_jvp(*primals), primals[1] @ tangents[0]))


def by_cond(w, x):
    return lax.cond(x.sum() > 0, lambda: checkpoint_name(x @ w, "h"), lambda: x @ w)


def by_while(w, x):
    def body(h):
        return checkpoint_name(h + x @ w, "h")

    return lax.while_loop(lambda h: h.sum() < 0, body, x @ w)


def by_shard_map(w, x):
    mesh = Mesh(np.array(jax.devices()[:1]), "d")
    named = jax.shard_map(
        lambda w, x: checkpoint_name(x @ w, "h"), mesh=mesh, in_specs=Spec(), out_specs=Spec()
    )
    return named(w, x)


def by_with_feedback(w, x):
    return with_feedback(lambda w, x: checkpoint_name(x @ w, "h"))(w, None, x)


def by_loop(w, x):
    for _ in range(2):
        x = checkpoint_name(x @ w @ w.T, "h")
    return x @ w


def by_two_calls(w, x):
    block = jax.jit(lambda x: checkpoint_name(x @ w @ w.T, "h"))
    return block(block(x)) @ w


def by_a_tree(w, x):
    return sum(checkpoint_name((x @ w, x @ w), "h"))


def unused(w, x):
    h = x @ w
    checkpoint_name(h, "h")
    return h


def not_named(w, x):
    return checkpoint_name(x @ w, "other")


LINE = r"test_transform_cut\.py:\d+"


@pytest.mark.parametrize(
    "block, message",
    [
        (by_vjp, rf"the tap 'h' at .*{LINE}.* is inside custom_vjp_call at .*{LINE}.*Name its"),
        (by_jvp, rf"the tap 'h' at .*{LINE}.* is inside custom_jvp_call at .*{LINE}.*Name its"),
        (by_cond, rf"the tap 'h' at .*{LINE}.* is inside cond at .*{LINE}.*Name its result"),
        (by_while, rf"the tap 'h' at .*{LINE}.* is inside while at .*{LINE}.*lax.scan"),
        (by_shard_map, rf"the tap 'h' at .*{LINE}.* inside shard_map at .*{LINE}.* inside shard_m"),
        (by_with_feedback, rf"the tap 'h' at .*{LINE}.*call with_feedback on the result"),
        (by_loop, rf"the tap 'h' occurs 2 times, at .*{LINE}.*its own name"),
        (by_two_calls, rf"the tap 'h' occurs 2 times, at .*{LINE}.*its own name"),
        (by_a_tree, r"the tap 'h' occurs 2 times, .*In a tree, name each array separately"),
        (unused, rf"the tap 'h' at .*{LINE}.* is not used\. Use the result of checkpoint_name"),
        (not_named, r"the tap 'h' does not occur: the function names 'other', 'z'"),
    ],
)
def test_a_tap_that_cannot_be_cut_is_named_with_its_line(block, message):
    def loss(params, x):
        return jnp.mean(checkpoint_name(block(params["in"], x), "z") ** 2)

    loss_dfa = with_direct_feedback(loss, "h", "z")
    with pytest.raises(ValueError, match=message):
        loss_dfa(PARAMS, P, X)
    with pytest.raises(ValueError, match=message):
        init_projections(KEY, loss_dfa, PARAMS, X)


def test_an_output_before_a_tap_is_named_with_both_lines():
    def before(params, x):
        z = checkpoint_name(x @ params["in"], "z")
        return jnp.mean(checkpoint_name(z, "h") ** 2)

    def in_a_step(params, xs):
        def step(h, x):
            z = checkpoint_name(h @ params["out"], "z")
            return checkpoint_name(jnp.tanh(x @ params["in"] + h @ params["u"]), "h"), z

        return jnp.mean(lax.scan(step, jnp.zeros((BATCH, WIDTH)), xs)[1] ** 2)

    for loss, x in ((before, X), (in_a_step, XS)):
        with pytest.raises(ValueError, match=f"'z' at .*{LINE}.* before the tap 'h' at .*{LINE}"):
            with_direct_feedback(loss, "h", "z")(PARAMS, P, x)


def test_an_output_that_the_loss_does_not_use_is_refused_though_it_is_returned():
    def loss(params, x):
        h = checkpoint_name(jnp.tanh(x @ params["in"]), "h")
        z = h @ params["out"]
        return jnp.mean(z**2), checkpoint_name(z, "z")

    with pytest.raises(ValueError, match=f"does not depend on the output 'z' at .*{LINE}"):
        with_direct_feedback(loss, "h", "z")(PARAMS, P, X)
    both = with_direct_feedback(lambda *args: loss(*args)[1], "h", "z")
    assert both(PARAMS, P, X).shape == (BATCH, OUT)  # no scalar: any output will do


def test_values_that_are_no_activations_are_refused():
    def rounded(params, x):
        h = checkpoint_name((x @ params["in"]).astype(jnp.int32), "h")
        return jnp.mean(checkpoint_name(h.astype(jnp.float32) @ params["out"], "z") ** 2)

    def scalar(params, x):
        h = checkpoint_name(x @ params["in"], "h")
        return checkpoint_name(jnp.sum(h), "z")

    for loss, message in ((rounded, r"dtype int32.*'h' at"), (scalar, r"is a scalar.*'h' at")):
        with pytest.raises(ValueError, match=message):
            with_direct_feedback(loss, "h", "z")(PARAMS, P, X)


def test_a_scan_without_the_output_wants_to_know_what_it_runs_over():
    def loss(params, xs):
        def step(h, x):
            h = jnp.tanh(x @ params["in"] + h @ params["u"])
            return checkpoint_name(h, "h"), None

        h, _ = lax.scan(step, jnp.zeros((BATCH, WIDTH)), xs)
        return jnp.mean(checkpoint_name(h @ params["out"], "z") ** 2)

    def twice(params, xs):
        return lax.scan(lambda total, xs: (total + loss(params, xs), None), 0.0, xs)[0]

    def outside(params, xs):
        def step(h, _):
            return checkpoint_name(h @ params["u"], "h"), None

        def steps(h, x):
            return lax.scan(step, h + x @ params["in"], None, 2)[0], None

        h, _ = lax.scan(steps, jnp.zeros((BATCH, WIDTH)), xs)
        return jnp.mean(checkpoint_name(h @ params["out"], "z") ** 2)

    with pytest.raises(ValueError, match=f"'h' at .*{LINE}.* inside a scan at .*{LINE}.*'blocks'"):
        with_direct_feedback(loss, "h", "z")(PARAMS, P, XS)
    with pytest.raises(ValueError, match=r"values are \(5, 4\) in each iteration.*0 or 1"):
        with_direct_feedback(loss, "h", "z", stacked=3)(PARAMS, P, XS)
    with pytest.raises(ValueError, match=f"'h' at .*{LINE}.* inside 2 scans"):
        with_direct_feedback(outside, "h", "z", stacked=1)(PARAMS, P, XS)
    several = with_direct_feedback(twice, "h", "z", stacked={"h": "time"})  # losses in a scan
    assert init_projections(KEY, several, PARAMS, XS[None])["h"].shape == (OUT, WIDTH)


def test_a_tap_in_one_branch_of_the_net_gets_the_error_as_well():
    """An auxiliary block on no way to the output: direct feedback needs none."""

    def loss(params, x):
        h = checkpoint_name(jnp.tanh(x @ params["in"]), "h")
        return jnp.mean(checkpoint_name(x @ params["in"] @ params["out"], "z") ** 2), h

    def hand(params, projections, x):
        h = jnp.tanh(x @ params["in"])
        z = direct_feedback(x @ params["in"] @ params["out"], h, projections["h"])
        return jnp.mean(z**2), detach(h)

    ours, theirs = (
        jax.jit(jax.grad(f, has_aux=True))(PARAMS, P, X)[0]
        for f in (with_direct_feedback(loss, "h", "z"), hand)
    )
    for name, g in ours.items():
        np.testing.assert_allclose(g, theirs[name], rtol=1e-5, atol=1e-6)
