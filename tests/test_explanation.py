"""`explain` tells the truth: what it says of a kernel is what its gradients show."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import soap_jax
from soap_jax import explain, init_feedback, linen, with_feedback

KEY = jax.random.key(3)


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.fold_in(KEY, seed), shape)


def effects(explanation):
    return {"/".join(row.path): row.effect for row in explanation}


def gradient_depends_on(fun, params, path, *args):
    """Whether some gradient changes with the feedback of one kernel, all others being exact."""
    gradient = jax.jit(jax.grad(with_feedback(fun)))
    states = (init_feedback(jax.random.key(seed), params, where=path) for seed in range(2))
    one, other = (jax.tree.leaves(gradient(params, state.feedback, *args)) for state in states)
    return not all(map(np.array_equal, one, other))


# Every function takes these params; none calls them what Flax would.
PARAMS = {name: draw(5, 5, seed=i) / 2 for i, name in enumerate(("a", "b", "c"))} | {
    "bias": draw(5, seed=9)
}
X = draw(4, 5, seed=10)


def mlp(params, x):
    h = jnp.tanh(jnp.tanh(x @ params["a"] + params["bias"][None]) @ params["b"])
    return jnp.sum((h @ params["c"]) ** 2)


def last_layer_unused_by_the_loss(params, x):
    h = jnp.tanh(x @ params["a"]) @ params["b"]
    return jnp.sum(h**2) + jnp.sum(lax.stop_gradient(jnp.tanh(h) @ params["c"]))


def detached_in_the_middle(params, x):
    h = lax.stop_gradient(jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]))
    return jnp.sum((h @ params["c"]) ** 2)


def recurrent(params, x):
    def step(h, x_t):
        return jnp.tanh(x_t @ params["a"] + h @ params["b"]), None

    h, _ = lax.scan(step, jnp.zeros(5), x)
    return jnp.sum(h @ params["c"])


def shared(params, x):
    h = jnp.tanh(jnp.tanh(x @ params["a"]) @ params["a"].T)
    return jnp.sum((h @ params["b"]) ** 2) + 0.1 * jnp.sum(params["c"] @ h.T)


CASES = {
    mlp: {"a": "no effect", "b": "feedback", "c": "feedback"},
    last_layer_unused_by_the_loss: {"a": "no effect", "b": "feedback", "c": "no effect"},
    detached_in_the_middle: {"a": "no effect", "b": "no effect", "c": "no effect"},
    recurrent: {"a": "no effect", "b": "feedback", "c": "feedback"},
    shared: {"a": "feedback", "b": "feedback", "c": "feedback"},
}


@pytest.mark.parametrize("fun", CASES, ids=lambda fun: fun.__name__)
def test_the_effect_is_what_gradients_show(fun):
    assert effects(explain(fun, PARAMS, X)) == CASES[fun]
    for name, effect in CASES[fun].items():
        assert gradient_depends_on(fun, PARAMS, name, X) == (effect == "feedback"), name


def test_a_kernel_without_feedback_goes_through_backprop():
    feedback = {"a": None, "b": PARAMS["b"], "c": None}
    found = explain(mlp, PARAMS, X, feedback=feedback)
    assert effects(found) == {"a": "no effect", "b": "feedback", "c": "backprop"}
    assert [row.nbytes for row in found] == [0, 100, 0]
    assert set(effects(explain(mlp, PARAMS, X, feedback={})).values()) == {"no effect", "backprop"}


def test_memory_is_counted_where_feedback_is_stored():
    feedback = {"a": PARAMS["a"], "b": PARAMS["b"]}
    assert [row.nbytes for row in explain(mlp, PARAMS, X, feedback=feedback)] == [100, 100, 0]
    assert [row.nbytes for row in explain(mlp, PARAMS, X)] == [0, 100, 100]


def test_a_user_reads_it_before_a_run():
    params = {"in": {"kernel": jnp.ones((784, 256)), "bias": jnp.ones(256)}}
    params["out"] = {"kernel": jnp.ones((256, 10)), "scale": jnp.ones(256)}

    def loss(params, x):
        h = jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"][None])
        return jnp.sum((h * params["out"]["scale"][None]) @ params["out"]["kernel"])

    assert (
        str(explain(loss, params, jnp.ones((64, 784))))
        == """\
 kernel       effect      product       operands           feedback
 ──────────────────────────────────────────────────────────────────
 in/kernel    no effect   dot_general   64×784 · 784×256          -
 out/kernel   feedback    dot_general   64×256 · 256×10     10.2 kB

2 kernels: 1 no effect, 1 feedback; 10.2 kB of feedback.
No kernels, exact gradients: 1 bias (add), 1 scale (mul)."""
    )


def test_what_stands_in_the_way_is_told_with_its_line():
    def loss(params, x):
        h = jnp.tanh(x @ params["a"]) @ jnp.tanh(params["b"])
        return jnp.sum(h @ params["c"])

    params = {"a": PARAMS["a"], "b": PARAMS["b"], "c": PARAMS["c"]}
    given = explain(loss, params, X, feedback={"b": PARAMS["b"], "c": PARAMS["c"]})
    assert effects(given) == {"a": "no effect", "b": "error", "c": "feedback"}
    assert "b: tanh at " in str(given) and "test_explanation.py" in str(given)
    # Nobody asked for feedback there: then it is plain backprop, and says why it stays that.
    named = {f"{name}/kernel": {"kernel": leaf} for name, leaf in params.items()}
    open_question = explain(
        lambda p, x: loss({k[0]: v["kernel"] for k, v in p.items()}, x), named, X
    )
    assert list(effects(open_question).values()) == ["no effect", "backprop", "feedback"]
    assert "tanh at " in str(open_question)


def test_an_embedding_that_is_only_looked_up_needs_no_feedback():
    class Net(nn.Module):
        tied: bool

        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(11, 5)
            h = nn.tanh(nn.Dense(5, name="dense")(embed(ids)))
            return embed.attend(h) if self.tied else nn.Dense(3, name="head")(h)

    ids = jnp.arange(4)
    found = {}
    for tied in (True, False):
        model = Net(tied)
        params = model.init(KEY, ids)["params"]
        explanation = explain(lambda p, model=model: model.apply({"params": p}, ids), params)
        found[tied] = effects(explanation)
    assert found[True] == {"Embed_0/embedding": "feedback", "dense/kernel": "feedback"}
    assert found[False] == {"dense/kernel": "feedback", "head/kernel": "feedback"}


def test_weights_that_only_meet_each_other_are_named():
    def loss(params, x):
        return jnp.sum((x @ (params["a"] @ params["b"])) @ jnp.tanh(params["c"]))

    explanation = explain(loss, PARAMS, X)
    assert effects(explanation) == dict.fromkeys("abc", "backprop")
    for path, place in {"a": "dot_general", "b": "dot_general", "c": "tanh"}.items():
        told = (
            rf"{path}: {place} at \S*test_explanation.py\S* \(.*?\), which is exact, as in backprop"
        )
        assert re.search(told, " ".join(str(explanation).split()))
    with pytest.raises(ValueError, match=r"where.* selects none"):
        init_feedback(KEY, PARAMS, where=explanation)


def used_twice(params, x):
    """b in a proper product and, changed, in another."""
    h = jnp.tanh(x @ params["a"])
    return jnp.sum(jnp.sin(h @ params["b"]) + jnp.sin(h @ jnp.tanh(params["b"])) @ params["c"])


def gradient_inside(params, x):
    """The loss is made of a gradient, in which c is a cotangent's product with ones."""

    def u(x):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) @ params["c"])

    return jnp.sum(jax.vmap(jax.grad(u))(x) ** 2)


@pytest.mark.parametrize(("fun", "path"), [(used_twice, "b"), (gradient_inside, "c")])
def test_an_error_that_also_goes_through_the_kernel_itself_is_backprop(fun, path):
    explanation = explain(fun, PARAMS, X)
    assert explanation[path].effect == "backprop"
    jax.grad(with_feedback(fun))(PARAMS, init_feedback(KEY, PARAMS, where=explanation).feedback, X)


def test_layers_with_feedback_of_their_own_are_told_from_backprop():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(linen.FeedbackDense(5, name="first")(x))
            x = nn.tanh(linen.FeedbackDense(4, name="own")(x))
            x = nn.RNN(nn.SimpleCell(4, name="cell"))(x[None])[0]
            return linen.FeedbackDense(3, name="head")(x)

    variables = Net().init(KEY, X)

    def loss(params, feedback, x):
        return Net().apply({"params": params, "feedback": feedback}, x).sum()

    params, own = variables["params"], variables["feedback"]
    found = effects(explain(loss, params, own, X))
    assert found == {
        "cell/h/kernel": "feedback",
        "cell/i/kernel": "feedback",
        "first/kernel": "no effect",
        "head/kernel": "own feedback",
        "own/kernel": "own feedback",
    }
    as_it_is = effects(explain(loss, params, own, X, feedback={}))
    assert as_it_is == found | {"cell/h/kernel": "backprop", "cell/i/kernel": "backprop"}
    state = init_feedback(KEY, params, where=explain(loss, params, own, X))
    jax.grad(with_feedback(loss))(params, state.feedback, own, X)
    twice = explain(loss, params, own, X, feedback={"head": {"kernel": params["head"]["kernel"]}})
    assert twice["head/kernel"].effect == "error"
    with pytest.raises(ValueError, match=r"\['own'\]\['kernel'\] belongs to a layer that has"):
        with_feedback(loss)(params, {"own": {"kernel": params["own"]["kernel"]}}, own, X)


def test_init_feedback_takes_the_explanation():
    explanation = explain(mlp, PARAMS, X)
    state = init_feedback(KEY, PARAMS, soap_jax.SignSync(magnitude="unit"), where=explanation)
    assert jax.tree.map(jnp.shape, state.feedback) == {
        "a": None, "b": (5, 5), "c": (5, 5), "bias": None
    }  # fmt: skip
    jax.grad(with_feedback(mlp))(PARAMS, state.feedback, X)
    assert effects(explain(mlp, PARAMS, X, feedback=state.feedback)) == CASES[mlp]


def test_an_explanation_that_names_nothing_selects_nothing():
    explanation = explain(detached_in_the_middle, PARAMS, X)
    with pytest.raises(ValueError, match="no leaf of params gets feedback"):
        init_feedback(KEY, PARAMS, where=explanation)


def test_nothing_is_computed():
    shapes = {"a": jax.ShapeDtypeStruct((10**6, 10**6), jnp.bfloat16)}
    shapes["b"] = jax.ShapeDtypeStruct((10**6, 3), jnp.float32)

    def loss(params, x):
        return jnp.sum((x @ params["a"]).astype(jnp.float32) @ params["b"])

    found = explain(loss, shapes, jax.ShapeDtypeStruct((7, 10**6), jnp.bfloat16))
    assert effects(found) == {"a": "no effect", "b": "feedback"}
    assert found["b"].nbytes == 12 * 10**6 and found["a"].dtype == jnp.bfloat16
    signs = {"b": jax.ShapeDtypeStruct((10**6, 3), jnp.int8)}
    found = explain(loss, shapes, jax.ShapeDtypeStruct((7, 10**6), jnp.bfloat16), feedback=signs)
    assert found["b"].nbytes == 3 * 10**6 and found["a"].nbytes == 0


def test_rows_are_found_by_name():
    explanation = explain(mlp, PARAMS, X)
    assert explanation["b"].path == ("b",) and explanation["b"].shape == (5, 5)
    assert len(explanation) == 3 and explanation.others == {("bias",): "add"}
    with pytest.raises(KeyError, match=r"bias.*a, b, c"):
        explanation["bias"]


def test_arguments_of_all_kinds_pass():
    def loss(params, x, mode, *, key, scale=1.0):
        assert mode == "train" and scale == 2.0
        mask = jax.random.bernoulli(key, 0.5, x.shape)
        return mlp(params, jnp.where(mask, x, 0)) * scale, {"mode": mode, "x": x}

    found = explain(loss, PARAMS, X, "train", key=KEY, scale=2.0)
    assert effects(found) == CASES[mlp]


def test_an_auxiliary_output_has_no_cotangent():
    def loss(params, x):
        h = jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"])
        return jnp.sum(h), h @ params["c"]

    assert effects(explain(loss, PARAMS, X))["c"] == "feedback"
    found = effects(explain(loss, PARAMS, X, has_aux=True))
    assert found == {"a": "no effect", "b": "feedback", "c": "no effect"}


def test_params_may_hold_integers_and_functions():
    params = PARAMS | {"steps": jnp.array(3), "activation": jnp.tanh}

    def loss(params, x):
        return mlp(params, params["activation"](x)) + params["steps"]

    assert effects(explain(loss, params, X)) == CASES[mlp]


def test_unfitting_feedback_is_refused():
    with pytest.raises(ValueError, match=r"\['b'\] has shape \(3,\); expected \(5, 5\)"):
        explain(mlp, PARAMS, X, feedback={"b": jnp.ones(3)})


def test_every_use_of_a_shared_kernel_is_listed():
    found = explain(shared, PARAMS, X)["a"]
    assert [use.primitive for use in found.uses] == ["dot_general"] * 2
    assert "and 1 more" in str(explain(shared, PARAMS, X))
