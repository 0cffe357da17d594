"""Every row of docs/methods.md, and every block of the guides to methods, works as it stands."""

import functools
import pathlib
import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import markdown_blocks as blocks
import numpy as np
import optax
import pytest
from flax import nnx

import soap_jax
from soap_jax import activity, direct, initializers, local, metrics, ops, recording
from soap_jax.ops import detach

DOCS = pathlib.Path(__file__).parents[1] / "docs"
GUIDES = [f"guides/{name}.md" for name in ("learned", "direct", "time-local", "metrics")]
GUIDE = "\n".join((DOCS / name).read_text() for name in ["methods.md", *GUIDES])
ROWS = re.findall(r"^\| .* \| `(.*)` \|$", GUIDE, re.MULTILINE)
GIVEN = ("cell", "cell_loss", "tapped_loss", "loss", "params", "weights", "feedback", "key", "step")
GIVEN += ("x", "labels", "cell_params", "B", "h0", "xs", "targets")  # a reader's own
X = jax.random.normal(jax.random.key(1), (8, 32))
LABELS = jnp.arange(8) % 10


def loss(params, x, labels):
    h = jnp.tanh(x @ params["first"]["kernel"])
    h = jnp.tanh(h @ params["second"]["kernel"])
    logits = h @ params["third"]["kernel"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def cell(params, h, x):
    return jnp.tanh(h @ params["recurrent"] + x @ params["in"])


def cell_loss(params, h, target):
    return jnp.sum((h @ params["out"] - target) ** 2)


def draw(key, *shape):
    return jax.random.normal(key, shape) / jnp.sqrt(shape[0])


def tapped_loss(tap, params, x, labels):
    h = tap("h", jnp.tanh(x @ params["first"]["kernel"]))
    h = jnp.tanh(h @ params["second"]["kernel"])
    logits = h @ params["third"]["kernel"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def names():
    """What the guide's code may refer to."""
    keys = jax.random.split(jax.random.key(0), 4)
    first, second, third = draw(keys[0], 32, 64), draw(keys[1], 64, 64), draw(keys[2], 64, 10)
    params = {"first": {"kernel": first}, "second": {"kernel": second}, "third": {"kernel": third}}
    state = soap_jax.init_feedback(keys[3], params, where=["second/*", "third/*"])
    public = {name: getattr(soap_jax, name) for name in soap_jax.__all__}
    cell_keys = jax.random.split(keys[3], 4)
    shapes = {"recurrent": (5, 5), "in": (32, 5), "out": (5, 2)}
    recurrent = {
        "cell_params": {
            n: draw(k, *s) for (n, s), k in zip(shapes.items(), cell_keys, strict=False)
        },
        "B": draw(cell_keys[3], 5, 2),
        "h0": jnp.zeros((8, 5)),
        "xs": jnp.stack([X, X[::-1], 2 * X]),
        "targets": jnp.ones((3, 8, 2)),
    }
    return (
        public
        | recurrent
        | {
            "soap_jax": soap_jax,
            "functools": functools,
            "nn": nn,
            "nnx": nnx,
            "jax": jax,
            "jnp": jnp,
            "optax": optax,
            "detach": detach,
            "loss": loss,
            "cell": cell,
            "cell_loss": cell_loss,
            "tapped_loss": tapped_loss,
            "params": params,
            "weights": {"w1": first, "w2": second, "w3": third},
            "feedback": state.feedback,
            "key": jax.random.key(2),
            "step": 0,
            "x": X,
            "labels": LABELS,
        }
    )


def gradient_of(value, known):
    """One gradient (or updates, or draw) of whatever a row of the table makes."""
    params, feedback = known["params"], known["feedback"]
    if isinstance(value, soap_jax.Rule):
        state = soap_jax.init_feedback(known["key"], params, value, where=["second/*", "third/*"])
        state = soap_jax.sync_feedback(params, state, 0)
        return jax.grad(soap_jax.with_feedback(loss))(params, state.feedback, X, LABELS)
    if isinstance(value, optax.GradientTransformation):
        learnt = params, feedback
        grads = jax.grad(soap_jax.with_feedback(loss))(params, feedback, X, LABELS)
        return value.update((grads, None), value.init(learnt), learnt)[0]
    if callable(value) and value.__name__ == "loss":  # through `with_feedback`, by feedback
        return jax.grad(value, argnums=1)(params, feedback, X, LABELS)
    if callable(value) and value.__module__ == "soap_jax.temporal":
        known = names()
        sequence = (known[name] for name in ("h0", "xs", "targets"))
        return value(known["cell_params"], {"out": known["B"]}, *sequence)[1]
    if callable(value) and value.__module__ == "soap_jax.perturbation":
        return value(params, X, LABELS, key=known["key"])[1]
    if callable(value):
        return value(params, X, LABELS, step=0)[1]
    return value


@pytest.mark.parametrize(
    "row", [row for row in ROWS if "jax.nn" not in row and "lambda" not in row]
)
def test_every_row_of_the_tables_runs(row):
    if row.startswith("metrics."):
        assert all(callable(getattr(metrics, name)) for name in re.findall(r"metrics\.(\w+)", row))
        return
    known = names()

    def run(hidden):
        known["activations"] = [hidden, hidden]
        known["activation"] = hidden
        known["output"] = detach(hidden) @ known["params"]["third"]["kernel"]
        known["projection"] = direct.draw_projection(known["key"], 10, 64)
        known["projections"] = [known["projection"]] * 2
        known["targets"] = jax.nn.one_hot(LABELS, 10)
        return eval(row, known)

    if "direct_" in row:
        found = jax.grad(lambda hidden: run(hidden).sum())(jnp.ones((8, 64)))
    elif row.startswith("initializers."):
        found = eval(row, known)
        found = found(known["key"], (64, 10), jnp.float32) if callable(found) else found
    else:
        found = gradient_of(eval(row, known), known)
    leaves = jax.tree.leaves(found)
    assert leaves and all(np.isfinite(leaf).all() for leaf in leaves)
    assert any(np.any(leaf != 0) for leaf in leaves)


@pytest.mark.parametrize("row", [row for row in ROWS if "jax.nn" in row or "lambda" in row])
def test_every_initialiser_draws_feedback(row):
    known = names()
    state = soap_jax.init_feedback(
        known["key"], known["params"], initializer=eval(row, known), where="third/*"
    )
    assert np.std(state.feedback["third"]["kernel"]) > 0


def test_the_table_names_every_rule_and_every_local_loss():
    table = "\n".join(ROWS)
    for base, offered in ((soap_jax.Rule, soap_jax.rules), (ops.LocalLoss, local)):
        for name, value in vars(offered).items():
            public = isinstance(value, type) and issubclass(value, base) and value is not base
            if public and not name.startswith("_"):
                assert f"{name}(" in table
    for name in (
        "direct_feedback(",
        "direct_target(",
        "kolen_pollack(",
        "activity.value_and_grad(",
    ):
        assert name in table
    assert {name for name in vars(initializers) if name in ("sparse", "low_rank", "scaled")} == {
        name for name in ("sparse", "low_rank", "scaled") if f"initializers.{name}(" in table
    }


@pytest.fixture(scope="module")
def known():
    """The names after all blocks have run, one after the other; each page has its imports."""
    given = {name: value for name, value in names().items() if name in GIVEN}
    known = dict(given)
    for guide in GUIDES:
        arrays = {name: value for name, value in known.items() if not callable(value)}
        page = given | {n: v for n, v in arrays.items() if not isinstance(v, types.ModuleType)}
        for block in blocks.python((DOCS / guide).read_text()):
            exec(block.code, page)
        known |= page
    return known


def test_every_block_runs(known):
    assert np.isfinite(known["value"]) and known["curves"].step.tolist() == list(
        range(0, 1000, 100)
    )
    assert recording.Row is type(known["curves"])
    kept = known["keep_norms"](jax.tree.map(lambda w: 3 * w, known["params"]), known["params"])
    close(kept, known["params"])
    zeros, ones = {"bias": jnp.zeros(3)}, {"bias": jnp.ones(3)}
    close(known["keep_norms"](ones, zeros), ones)
    assert activity.untapped("h", 1) == 1
    assert len(known["angles"]) == 2 and all(np.isfinite(a).all() for a in known["angles"])
    values = known["curves"].values
    assert np.isfinite(values["gradient_angle/first/kernel"]).all()


def test_flaxs_models_of_the_guide_learn_in_every_layer(known):
    for model in (known["MLP"](), known["Deep"]()):
        variables = model.init(known["key"], X)
        assert set(variables) == {"params", "projection"}
        grads = jax.grad(lambda p, m=model, v=variables: jnp.sum(m.apply({**v, "params": p}, X)))(
            variables["params"]
        )
        assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))
    grads = nnx.grad(lambda model: jnp.sum(model(X)))(known["NNXMLP"](nnx.Rngs(0)))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_slips_do_what_the_guide_says():
    known = names()
    params, weights = known["params"], known["weights"]
    projection = direct.draw_projection(known["key"], 10, 64)

    def by_w2(cut, join, target=lambda h: None):
        def f(w2):
            h2 = jnp.tanh(X @ weights["w1"] @ w2)
            target(h2)
            output = cut(h2) @ weights["w3"]
            output = join(output, h2)
            return optax.softmax_cross_entropy_with_integer_labels(output, LABELS).mean()

        return jax.grad(f)(weights["w2"])

    def joined(output, h):
        return soap_jax.direct_feedback(output, h, projection)

    def dropped(output, h):
        joined(output, h)
        return output

    dfa, backprop = by_w2(detach, joined), by_w2(lambda h: h, lambda output, h: output)
    close(by_w2(lambda h: h, joined), dfa + backprop)
    assert not np.any(by_w2(detach, lambda output, h: joined(output, detach(h))))
    assert not np.any(by_w2(detach, dropped))
    targets = jax.nn.one_hot(LABELS, 10)
    target = functools.partial(soap_jax.direct_target, target=targets, projection=projection)
    close(by_w2(lambda h: h, lambda output, h: output, target), backprop)

    gradient = jax.grad(soap_jax.with_feedback(loss), argnums=1)
    feedback_bar = gradient(params, known["feedback"], X, LABELS)
    assert not any(map(np.any, jax.tree.leaves(feedback_bar)))


def close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)  # float32: sums of two gradients


def test_the_guide_knows_every_method_of_the_study():
    from soap_jax.study import METHODS

    papers = {paper for method in METHODS.values() for paper in method.paper.split("; ") if paper}
    assert {paper for paper in papers if paper not in GUIDE} == set()
