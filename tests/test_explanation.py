"""`explain` tells the truth: what it says of a kernel is what its gradients show."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import soap_jax
from soap_jax import explain, init_feedback, linen, ops, trees, with_feedback

KEY = jax.random.key(3)


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.fold_in(KEY, seed), shape)


def effects(explanation):
    return {"/".join(row.path): row.effect for row in explanation}


def like(leaf):
    """Feedback, by NumPy, which compiles nothing."""
    return jnp.asarray(np.random.default_rng(leaf.size).normal(size=leaf.shape), leaf.dtype)


def only(params, path):
    """Random feedback of one param alone; the others go through backprop."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: like(leaf) if "/".join(trees.path_of(keys)) == path else None, params
    )


def outcome(fun, params, path, *args):
    """What `with_feedback` makes of one param's feedback: "refused", "changes" or "nothing"."""

    @jax.jit
    def both(params, feedback):
        gradient = jax.grad(with_feedback(fun), allow_int=True)
        return gradient(params, feedback, *args), jax.grad(fun, allow_int=True)(params, *args)

    try:
        ours, exact = both(params, only(params, path))
    except ValueError as error:
        assert "itself, not through its feedback" in str(error) or "do nothing" in str(error)
        return "refused"
    # Clearly, since the two programs round differently.
    close = all(
        np.allclose(a, b, rtol=1e-3, atol=1e-3)
        for a, b in zip(*map(jax.tree.leaves, (ours, exact)), strict=True)
    )
    return "nothing" if close else "changes"


def assert_true(fun, params, *args):
    """Every row is what the gradients show; and what `explain` says of that feedback alone."""
    for row in explain(fun, params, *args):
        path = "/".join(row.path)
        found = outcome(fun, params, path, *args)
        scales = all("elementwise" in use.problem for use in row.uses)
        expected = {
            "feedback": {"changes"},
            "backprop": {"changes" if scales else "refused"},
            "not needed": {"refused", "nothing"},
            "no effect": {"refused", "nothing"},
        }[row.effect]
        assert found in expected, (path, row.effect, found)
        alone = explain(fun, params, *args, feedback=only(params, path))[path].effect
        assert alone == {"changes": "feedback", "refused": "error", "nothing": "no effect"}[found]


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
    mlp: {"a": "no effect", "bias": "not needed", "b": "feedback", "c": "feedback"},
    last_layer_unused_by_the_loss: {
        "a": "no effect",
        "b": "feedback",
        "c": "no effect",
        "bias": "no effect",
    },
    detached_in_the_middle: {
        "a": "no effect",
        "b": "no effect",
        "c": "no effect",
        "bias": "no effect",
    },
    recurrent: {"a": "no effect", "b": "feedback", "c": "feedback", "bias": "no effect"},
    shared: {"a": "feedback", "b": "feedback", "c": "feedback", "bias": "no effect"},
}


@pytest.mark.parametrize("fun", CASES, ids=lambda fun: fun.__name__)
def test_the_effect_is_what_gradients_show(fun):
    assert effects(explain(fun, PARAMS, X)) == CASES[fun]
    assert_true(fun, PARAMS, X)


def between(middle):
    """`middle(h, b, c)` between two layers, of which a is the first."""

    def fun(params, x):
        h = jnp.tanh(x @ params["a"])
        h = jnp.sin(middle(h, params["b"], params["c"]))
        return jnp.sum((h @ params["d"]) ** 2) + 0.1 * jnp.sum(params["a"] ** 2)

    return fun


def loop(body):
    return lambda h, b, c: lax.fori_loop(0, 2, lambda _, h: jnp.tanh(body(h, b, c)), h)


@jax.custom_vjp
def layer(params, h):
    """It takes params that it does not use."""
    return jnp.tanh(h @ params["b"])


layer.defvjp(
    lambda params, h: jax.vjp(lambda params, h: jnp.tanh(h @ params["b"]), params, h),
    lambda vjp, y_bar: vjp(y_bar),
)

MIDDLES = {  # (h, b, c) -> h, the effects of b and c
    "two layers": (lambda h, b, c: jnp.tanh(h @ b) @ c, "feedback", "feedback"),
    "a product of two": (lambda h, b, c: h @ (b @ c), "backprop", "backprop"),
    "a sum of two": (lambda h, b, c: h @ (b + c), "backprop", "backprop"),
    "a complex sum": (lambda h, b, c: jnp.real(h @ (b + 1j * c)), "backprop", "backprop"),
    "joined": (lambda h, b, c: h @ jnp.concatenate([b[:2], c[2:]]), "feedback", "feedback"),
    "centred": (lambda h, b, c: h @ (b - b.mean(0, keepdims=True)) @ c, "backprop", "feedback"),
    "changed": (lambda h, b, c: h @ jnp.tanh(b) @ c, "backprop", "feedback"),
    "masked by themselves": (lambda h, b, c: h @ jax.nn.relu(b) @ c, "backprop", "feedback"),
    "changed and not": (lambda h, b, c: h @ b + h @ jnp.tanh(b) @ c, "backprop", "feedback"),
    "normalised": (lambda h, b, c: h @ (b / jnp.linalg.norm(b)) @ c, "backprop", "feedback"),
    "a scale": (lambda h, b, c: (h * b[:1]) @ c, "backprop", "feedback"),
    "a quotient": (
        lambda h, b, c: lax.stop_gradient(h) / (3 + b[:1]) @ c,
        "backprop",
        "feedback",
    ),
    "a bias": (lambda h, b, c: (h + b[:1]) @ c, "not needed", "feedback"),
    "a scale and a product": (lambda h, b, c: (h * b[:1]) @ b @ c, "feedback", "feedback"),
    "a number": (lambda h, b, c: h @ c * jnp.linalg.norm(b), "not needed", "feedback"),
    "a loop": (loop(lambda h, b, c: h @ b + c[:1]), "feedback", "not needed"),
    "a loop that scales": (loop(lambda h, b, c: h @ b * c[:1]), "feedback", "backprop"),
    "a loop over a sum": (loop(lambda h, b, c: h @ (b + c)), "backprop", "backprop"),
    "a branch": (
        lambda h, b, c: lax.cond(h[0, 0] > 0, lambda h: h @ b @ c, lambda h: h @ c @ b, h),
        "feedback",
        "feedback",
    ),
    "a branch that weights choose": (
        lambda h, b, c: lax.cond(b[0, 0] > 0, lambda h: h @ c, lambda h: -h @ c, h),
        "backprop",
        "feedback",
    ),
    "remat and jit": (
        jax.checkpoint(jax.jit(lambda h, b, c: jnp.tanh(h @ b) @ c)),
        "feedback",
        "feedback",
    ),
    "a derivative of its own": (
        lambda h, b, c: layer({"b": b, "c": c}, h) @ c,
        "feedback",
        "feedback",
    ),
    "stopped": (lambda h, b, c: lax.stop_gradient(h @ b) @ c, "no effect", "no effect"),
    "a gradient": (
        lambda h, b, c: jax.vmap(jax.grad(lambda h: jnp.sum(jnp.tanh(h @ b) @ c)))(h),
        None,
        None,
    ),
}


@pytest.mark.parametrize("name", MIDDLES)
@pytest.mark.filterwarnings("ignore:Casting complex values")  # JAX 0.8, of its own derivative
def test_the_effect_is_what_gradients_show_in_the_middle(name):
    middle, *expected = MIDDLES[name]
    fun, params = between(middle), {k: draw(5, 5, seed=i) / 2 for i, k in enumerate("abcd")}
    found = effects(explain(fun, params, X))
    if None not in expected:
        assert [found["b"], found["c"]] == expected
    assert found["d"] == "feedback"
    assert_true(fun, params, X)


def test_a_kernel_without_feedback_goes_through_backprop():
    feedback = {"a": None, "b": PARAMS["b"], "c": None}
    found = explain(mlp, PARAMS, X, feedback=feedback)
    assert effects(found) == CASES[mlp] | {"c": "backprop"}
    assert [row.nbytes for row in found] == [0, 0, 100, 0]
    without = CASES[mlp] | {"b": "backprop", "c": "backprop"}
    assert effects(explain(mlp, PARAMS, X, feedback={})) == without


def test_memory_is_counted_where_feedback_is_stored():
    feedback = {"a": PARAMS["a"], "b": PARAMS["b"]}
    assert [row.nbytes for row in explain(mlp, PARAMS, X, feedback=feedback)] == [100, 0, 100, 0]
    assert [row.nbytes for row in explain(mlp, PARAMS, X)] == [0, 0, 100, 100]


def test_a_user_reads_it_before_a_run():
    def loss(params, x):
        for block in params["blocks"]:
            x = jnp.tanh(x @ block["kernel"] + block["bias"])
        return jnp.sum((x * params["scale"][None]) @ params["out"])

    blocks = [{"kernel": jnp.ones((256, 256)), "bias": jnp.ones((1, 256))} for _ in range(12)]
    params = {"blocks": blocks, "scale": jnp.ones(256), "out": jnp.ones((256, 10))}
    printed = str(explain(loss, params, jnp.ones((64, 256)))).splitlines()
    assert printed[:9] == TABLE.splitlines()
    assert " ".join(printed[9:]).startswith("scale scales activations ")


TABLE = """\
 param                        effect      used in       operands           feedback
 ──────────────────────────────────────────────────────────────────────────────────
 blocks/0/kernel              no effect   dot_general   64×256 · 256×256          -
 blocks/*/kernel (11 times)   feedback    dot_general   64×256 · 256×256     2.9 MB
 scale                        backprop    mul           64×256 · 1×256            -
 out                          feedback    dot_general   64×256 · 256×10     10.2 kB

26 params: 1 no effect, 12 not needed, 12 feedback, 1 backprop; 2.9 MB of feedback.
Not needed, since no error passes through them: 12 bias (add)."""


HALF = jnp.bfloat16


def in_half(params, x):
    """A model with float32 params that computes in bfloat16, but for its head."""
    h = jnp.tanh(x.astype(HALF) @ params["a"].astype(HALF))
    for block in params["blocks"]:
        h = jnp.tanh(h @ block["kernel"].astype(HALF))
    return jnp.sum(h.astype(jnp.float32) @ params["out"])


def test_the_dtype_in_which_products_take_feedback_is_told_where_it_is_another():
    blocks = [{"kernel": jnp.ones((16, 16))} for _ in range(3)]
    params = {"a": jnp.ones((5, 16)), "blocks": blocks, "out": jnp.ones((16, 3))}
    found = explain(in_half, params, X)
    assert str(found) == HALF_TABLE
    assert [str(row.used) for row in found] == ["bfloat16"] * 4 + ["float32"]
    state = init_feedback(KEY, params, where=found, dtype="used")
    found = explain(in_half, params, X, feedback=state.feedback)
    assert "1.5 kB bfloat16\n" in str(found) and "used as" not in str(found)
    signs = init_feedback(KEY, params, where=found, dtype=jnp.int8).feedback
    assert "768 bytes int8, used as bfloat16\n" in str(explain(in_half, params, X, feedback=signs))


HALF_TABLE = """\
 param                       effect      used in       operands                       feedback
 ─────────────────────────────────────────────────────────────────────────────────────────────
 a                           no effect   dot_general   4×5 · 5×16                            -
 blocks/*/kernel (3 times)   feedback    dot_general   4×16 · 16×16   3.1 kB, used as bfloat16
 out                         feedback    dot_general   4×16 · 16×3                   192 bytes

5 params: 1 no effect, 4 feedback; 3.3 kB of feedback."""


def half(w):
    return w.astype(HALF)


USES = {  # (h, w, mask) -> h, and the dtype in which w's feedback is computed with
    "cast": (lambda h, w, mask: half(h) @ half(w), "bfloat16"),
    "moved and cast": (lambda h, w, mask: half(h) @ half(w.T[::-1].reshape(5, 5)), "bfloat16"),
    "cast and back": (lambda h, w, mask: h @ half(w).astype(jnp.float32), "float32"),
    "masked and cast": (lambda h, w, mask: half(h) @ half(w * mask), "float32"),
    "cast and masked": (lambda h, w, mask: half(h) @ (half(w) * half(mask)), "bfloat16"),
    "twice": (lambda h, w, mask: half(half(h) @ half(w)) + half(h @ w), "float32"),
    "elementwise": (lambda h, w, mask: half(h) * half(w[:1]) @ half(w), "bfloat16"),
    "penalised": (lambda h, w, mask: half(h) @ half(w) + half(jnp.sum(w**2)), "bfloat16"),
    "a loop": (
        lambda h, w, mask: lax.fori_loop(0, 2, lambda _, h: jnp.tanh(h @ half(w)), half(h)),
        "bfloat16",
    ),
    "remat and jit": (jax.checkpoint(jax.jit(lambda h, w, mask: half(h) @ half(w))), "bfloat16"),
    "a branch": (
        lambda h, w, mask: lax.cond(h[0, 0] > 0, lambda w: half(h) @ half(w), lambda w: half(h), w),
        "bfloat16",
    ),
    "a derivative of its own": (lambda h, w, mask: layer({"b": half(w)}, half(h)), "bfloat16"),
    "wider": (lambda h, w, mask: half(h).astype(jnp.float32) @ w, "float32"),
}


@pytest.mark.parametrize("name", USES)
def test_feedback_stored_as_it_is_used_gives_the_bits_of_its_kernels_dtype(name):
    middle, expected = USES[name]

    def loss(params, x, mask):
        h = middle(jnp.tanh(x @ params["a"]), params["b"], mask)
        return jnp.sum(jnp.sin(h.astype(jnp.float32) @ params["c"]))

    params, mask = {k: PARAMS[k] for k in "abc"}, draw(5, 5, seed=7)
    found = explain(loss, params, X, mask)
    assert effects(found) == {"a": "no effect", "b": "feedback", "c": "feedback"}
    assert [str(found[k].used) for k in "bc"] == [expected, "float32"]
    wide, stored = (init_feedback(KEY, params, where=found, dtype=d) for d in (None, "used"))
    assert [str(stored.feedback[k].dtype) for k in "bc"] == [expected, "float32"]
    gradient = jax.jit(jax.grad(with_feedback(loss)))
    got, same = (gradient(params, state.feedback, X, mask) for state in (stored, wide))
    jax.tree.map(np.testing.assert_array_equal, got, same)
    assert np.abs(got["a"]).max() > 0


def test_own_feedback_is_used_in_the_layers_dtype():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            mask = np.tril(np.ones((3, 5, 5), np.float32))
            x = nn.tanh(linen.FeedbackDense(5, name="half", dtype=HALF)(x))
            x = nn.tanh(linen.FeedbackConv(5, 3, name="masked", dtype=HALF, mask=mask)(x))
            hooked = nn.Dense(
                5, name="hooked", dtype=HALF, dot_general_cls=linen.FeedbackDotGeneral
            )
            return linen.FeedbackDense(3, name="full")(hooked(x).astype(jnp.float32))

    variables = Net().init(KEY, X)

    def loss(params, feedback, x):
        x = jnp.tanh(x @ params["first"])
        return Net().apply({"params": params["net"], "feedback": feedback}, x).sum()

    params = {"first": PARAMS["a"], "net": variables["params"]}
    found = explain(loss, params, variables["feedback"], X)
    used = {"half": "bfloat16", "masked": "float32", "hooked": "bfloat16", "full": "float32"}
    for name, dtype in used.items():
        row = found[f"net/{name}/kernel"]
        assert (row.effect, str(row.used)) == ("own feedback", dtype)
    assert str(found).count("used as bfloat16") == 2


def told(explanation):
    """What is printed, in one line."""
    return " ".join(str(explanation).split())


def test_what_stands_in_the_way_is_told_with_its_line():
    def loss(params, x):
        h = jnp.tanh(x @ params["a"]) @ jnp.tanh(params["b"])
        return jnp.sum(h @ params["c"])

    expected = {"a": "no effect", "b": "backprop", "c": "feedback"}
    params = {name: PARAMS[name] for name in expected}
    place = (
        r"b: dot_general at \S*test_explanation.py\S* \(.*?\), after tanh at \S*test_explanation.py"
    )
    open_question = explain(loss, params, X)
    assert effects(open_question) == expected and re.search(place, told(open_question))
    given = explain(loss, params, X, feedback={"b": PARAMS["b"], "c": PARAMS["c"]})
    assert effects(given) == expected | {"b": "error"} and re.search(place, told(given))
    kept = explain(loss, params, X, feedback={"c": PARAMS["c"]})
    assert effects(kept) == expected and re.search(place, told(kept))


def test_a_param_that_scales_elementwise_gets_feedback_where_it_is_named():
    fun, params = between(MIDDLES["a scale"][0]), {k: PARAMS[k[0]] for k in ("a", "b", "c")}
    params["d"] = PARAMS["a"]
    explanation = explain(fun, params, X)
    assert (
        "scales activations elementwise; to give it feedback, name it in `where`: where=["
        in told(explanation)
    )
    assert init_feedback(KEY, params, where=explanation).feedback["b"] is None
    state = init_feedback(KEY, params, where="b", initializer="matched")
    assert explain(fun, params, X, feedback=state.feedback)["b"].effect == "feedback"


def test_a_table_has_two_notes_a_line_at_most():
    def loss(params, x):
        for _ in range(5):
            x = jnp.sin(x @ params["a"])
            x = jnp.sin(x @ jnp.tanh(params["b"])) + jnp.sin(x @ jnp.cos(params["b"]))
            x = jnp.sin(x @ jnp.exp(params["b"]))
        return jnp.sum(x)

    found = explain(loss, PARAMS, X)
    assert len(found["b"].uses) > 2 and told(found).count("b: dot_general at") == 2


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
        explanation = explain(
            lambda p, ids, model=model: model.apply({"params": p}, ids), params, ids
        )
        found[tied] = effects(explanation)
    both = {"dense/kernel": "feedback", "dense/bias": "not needed"}
    assert found[True] == both | {"Embed_0/embedding": "feedback"}
    assert found[False].pop("Embed_0/embedding") in ("not needed", "no effect")
    assert found[False] == both | {"head/kernel": "feedback", "head/bias": "not needed"}


def test_weights_that_only_meet_each_other_are_named():
    def loss(params, x):
        return jnp.sum((x @ (params["a"] @ params["b"])) @ jnp.tanh(params["c"]))

    explanation = explain(loss, PARAMS, X)
    assert effects(explanation) == dict.fromkeys("abc", "backprop") | {"bias": "no effect"}
    for path, other in {
        "a": r".*?\(\['b'\]\)",
        "b": r".*?\(\['a'\]\)",
        "c": ", after tanh at",
    }.items():
        assert re.search(
            rf"{path}: dot_general at \S*test_explanation.py\S* \([^)]*\){other}", told(explanation)
        )
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
    biases = {f"{name}/bias": "not needed" for name in ("first", "own", "cell/i", "head")}
    found = effects(explain(loss, params, own, X))
    assert found == biases | {
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
    assert [row.path for row in explanation] == [("a",), ("bias",), ("b",), ("c",)]
    with pytest.raises(KeyError, match=r"'scale' is not a param.*a, bias, b, c"):
        explanation["scale"]


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
    assert found == {"a": "no effect", "b": "feedback", "c": "no effect", "bias": "no effect"}


def test_params_may_hold_integers_and_functions():
    params = PARAMS | {"steps": jnp.array(3), "activation": jnp.tanh}

    def loss(params, x):
        return mlp(params, params["activation"](x)) + params["steps"]

    assert effects(explain(loss, params, X)) == CASES[mlp]


def test_unfitting_feedback_is_refused():
    with pytest.raises(ValueError, match=r"\['b'\] has shape \(3,\); expected \(5, 5\)"):
        explain(mlp, PARAMS, X, feedback={"b": jnp.ones(3)})


def test_every_use_of_a_shared_kernel_is_listed():
    params = {name: PARAMS[name[0]] for name in ("a", "b", "c")} | {"d": PARAMS["a"]}
    explanation = explain(between(lambda h, b, c: jnp.tanh(h @ b @ c) @ b.T), params, X)
    assert [use.primitive for use in explanation["b"].uses] == ["dot_general"] * 2
    assert "and 1 more" in str(explanation)


# Direct feedback: how gradients come about

DIRECT = {name: draw(4, 4, seed=20 + i) / 2 for i, name in enumerate("abco")} | {
    "bias": draw(4, seed=30),
    "idle": draw(4, seed=31),
    "stack": draw(3, 4, 4, seed=32),
}
IN, OUT = draw(6, 4, seed=33), draw(6, 4, seed=34)


def head(params, h):
    return jnp.mean((checkpoint_name(h @ params["o"], "z") - OUT) ** 2)


def tap(h, name="h"):
    return checkpoint_name(jnp.tanh(h), name)


def two_blocks(params, x):
    return head(params, tap(tap(x @ params["a"] + params["bias"][None]) @ params["b"], "h2"))


def unwired(params, x):
    h = lax.stop_gradient(jnp.tanh(x @ params["a"]))
    return head(params, tap(h @ params["b"]))


def branches_named_alone(params, x):
    s = x @ params["a"]
    return head(params, s + tap(s @ params["b"]))


def penalised(params, x):
    return head(params, tap(x @ params["a"])) + jnp.sum(params["a"] ** 2) + params["c"].sum()


def tied(params, x):
    return head(params, tap(tap(x @ params["a"]) @ params["b"], "h2") @ params["a"])


def early_loss(params, x):
    h = x @ params["a"]
    return head(params, tap(h)) + jnp.mean(h**2)


def scanned(params, x):
    return head(params, lax.scan(lambda h, w: (tap(h @ w), None), x, params["stack"])[0])


def carried(params, xs):
    def step(h, x):
        h = tap(x @ params["a"] + h @ params["b"])
        return h, checkpoint_name(h @ params["o"], "z")

    zs = lax.scan(step, jnp.zeros((6, 4)), jnp.stack([xs, -xs, 2 * xs]))[1]
    return jnp.mean((zs - OUT[None]) ** 2)


def through_everything(params, x):
    @jax.custom_vjp
    def own(x):
        return jnp.sin(x)

    own.defvjp(lambda x: (jnp.sin(x), x), lambda x, y_bar: (jnp.cos(x) * y_bar,))
    h = jax.checkpoint(lambda x: own(x @ params["a"]))(x)
    h = lax.cond(h.sum() > 0, lambda h: h @ params["b"], lambda h: -h @ params["b"], h)
    h = jax.jit(tap)(h)
    h = lax.fori_loop(0, 2, lambda _, h: jnp.tanh(h + params["bias"][None]), h)
    return head(params, h)


BY_NAMES = {
    two_blocks: (("h", "h2"), {"a": "direct", "bias": "direct", "b": "direct", "o": "exact"}),
    unwired: (("h",), {"b": "direct", "o": "exact"}),
    branches_named_alone: (("h",), {"a": "mixed", "b": "direct", "o": "exact"}),
    penalised: (("h",), {"a": "mixed", "c": "exact", "o": "exact"}),
    tied: (("h", "h2"), {"a": "mixed", "b": "direct", "o": "exact"}),
    early_loss: (("h",), {"a": "mixed", "o": "exact"}),
    scanned: (("h",), {"stack": "direct", "o": "exact"}),
    carried: (("h",), {"a": "direct", "b": "direct", "o": "exact"}),
    through_everything: (
        ("h",),
        {"a": "direct", "b": "direct", "bias": "exact", "o": "exact"},
    ),
}


@pytest.mark.parametrize("fun", BY_NAMES, ids=lambda fun: fun.__name__)
def test_gradients_are_as_they_are_said_to_be(fun):
    """None is zero, exact is backprop's, direct has nothing but the projections' errors."""
    taps, expected = BY_NAMES[fun]
    loss_dfa = soap_jax.with_direct_feedback(fun, taps, "z", stacked="blocks")
    projections = soap_jax.init_projections(KEY, loss_dfa, DIRECT, IN)
    found = {row.path[0]: row.gradient for row in explain(loss_dfa, DIRECT, projections, IN)}
    assert found == dict.fromkeys(DIRECT, "none") | expected

    step = jax.jit(jax.grad(loss_dfa))
    one, other, zero = (
        step(DIRECT, jax.tree.map(lambda p, c=c: c * p, projections), IN) for c in (1, -2, 0)
    )
    backprop = jax.jit(jax.grad(fun))(DIRECT, IN)
    for name, gradient in found.items():
        changes = not np.allclose(one[name], other[name], rtol=1e-4, atol=1e-7)
        assert changes == (gradient in ("direct", "mixed")), name
        assert np.any(zero[name] != 0) == (gradient in ("exact", "mixed")), name
        if gradient in ("exact", "none"):
            np.testing.assert_allclose(one[name], backprop[name], rtol=1e-4, atol=1e-7)
        if gradient == "none":
            assert not np.any(one[name])
    plain = explain(loss_dfa, DIRECT, None, IN)  # no projections: backprop
    assert {row.gradient for row in plain} <= {"exact", "none"}
    assert [row.effect for row in plain] == [row.effect for row in explain(fun, DIRECT, IN)]


def test_direct_feedback_by_hand_is_explained_as_well():
    projection = draw(4, 4, seed=40)

    def forgotten(params, x):  # the second block is joined to nothing
        h = jnp.tanh(x @ params["a"])
        h2 = jnp.tanh(ops.detach(h) @ params["b"])
        z = soap_jax.direct_feedback(ops.detach(h2) @ params["o"], h, projection)
        return jnp.mean((z - OUT) ** 2)

    def targets(params, x):
        h = soap_jax.direct_target(jnp.tanh(x @ params["a"]), OUT, projection)
        h = soap_jax.direct_target(jnp.tanh(h @ params["b"]), OUT, projection)
        return jnp.mean((h @ params["o"] - OUT) ** 2)

    def each_example(params, x):
        def one(x, y):
            h = jnp.tanh(x @ params["a"])
            z = soap_jax.direct_feedback(ops.detach(h) @ params["o"], h, projection)
            return jnp.mean((z - y) ** 2)

        return jax.vmap(one)(x, OUT).mean()

    for fun, expected in {
        forgotten: {"a": "direct", "o": "exact"},
        targets: {"a": "direct", "b": "direct", "o": "exact"},
        each_example: {"a": "direct", "o": "exact"},
    }.items():
        found = {row.path[0]: row.gradient for row in explain(fun, DIRECT, IN)}
        assert found == dict.fromkeys(DIRECT, "none") | expected


def test_projections_among_the_params_get_no_error():
    """As a Linen model's variables may be handed over whole."""

    def loss(params, x):
        h = jnp.tanh(x @ params["a"])
        z = soap_jax.direct_feedback(ops.detach(h) @ params["o"], h, params["b"])
        return jnp.mean((z - OUT) ** 2)

    assert explain(loss, DIRECT, IN)["b"].gradient == "none"
    assert not np.any(jax.grad(loss)(DIRECT, IN)["b"])


def test_layers_that_draw_their_projections_are_explained():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.tanh(nn.Dense(5)(x))
            lost = nn.tanh(nn.Dense(5)(ops.detach(h)))
            return linen.DirectFeedback()(nn.Dense(4)(ops.detach(lost)), [h])

    variables = Net().init(KEY, IN)

    def loss(params, projection, x):
        return jnp.mean(Net().apply({"params": params, "projection": projection}, x) ** 2)

    explanation = explain(loss, variables["params"], variables["projection"], IN)
    assert {row.path[0]: row.gradient for row in explanation} == {
        "Dense_0": "direct",
        "Dense_1": "none",
        "Dense_2": "exact",
    }
    assert "No error reaches Dense_1/kernel, Dense_1/bias." in re.sub(r"\s+", " ", str(explanation))


def test_gradients_are_printed_if_not_all_are_exact():
    used = {name: DIRECT[name] for name in "abo"}
    loss_dfa = soap_jax.with_direct_feedback(branches_named_alone, "h", "z")
    projections = soap_jax.init_projections(KEY, loss_dfa, used, IN)
    printed = re.sub(r"\s+", " ", str(explain(loss_dfa, used, projections, IN)))
    assert "Gradients: 1 direct, 1 mixed, 1 exact." in printed
    assert "Direct feedback and an error around it reach a." in printed
    assert "Gradients" not in str(explain(branches_named_alone, used, IN))
    assert "Gradients: 3 exact, 4 none." in re.sub(
        r"\s+", " ", str(explain(branches_named_alone, DIRECT, IN))
    )


def test_of_a_function_with_aux_the_loss_alone_counts():
    def loss(params, x):
        h = tap(x @ params["a"])
        return head(params, h), jnp.sum(params["b"]) + h.sum()

    loss_dfa = soap_jax.with_direct_feedback(loss, "h", "z")
    projections = soap_jax.init_projections(KEY, loss_dfa, DIRECT, IN)
    for has_aux, expected in ((True, "none"), (False, "exact")):
        row = explain(loss_dfa, DIRECT, projections, IN, has_aux=has_aux)["b"]
        assert row.gradient == expected


def test_functions_as_projections_are_explained():
    loss_dfa = soap_jax.with_direct_feedback(two_blocks, ("h", "h2"), "z")
    projections = {"h": lambda error, shape, key: jnp.zeros(shape), "h2": jax.random.key(0)}
    found = explain(loss_dfa, DIRECT, projections, IN)
    assert found["a"].gradient == found["b"].gradient == "direct"
