"""`study.compare` on models of every library, and on methods of one's own."""

import dataclasses
import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from flax import nnx

import soap_jax
from soap_jax import direct, ops, perturbation, study

SHORT = {"seeds": 3, "steps": 24, "batch_size": 8, "evaluations": 3}


def numbers():
    return np.random.default_rng(0)


def squares(y, target):
    return jnp.mean((y - target) ** 2)


def right(logits, labels):
    return jnp.mean(logits.argmax(-1) == labels)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def parts(*arrays):
    """Training, validation and test examples."""
    sizes = {"train": slice(40), "validation": slice(40, 56), "test": slice(56, None)}
    return {name: tuple(array[of] for array in arrays) for name, of in sizes.items()}


class Conv(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3), strides=2)(x))
        x = nn.relu(nn.Dense(8)(nn.relu(x).reshape(len(x), -1)))
        return nn.Dense(2)(nn.Dropout(0.1, deterministic=not train)(x))


def conv():
    """Linen, with batch normalisation and dropout: stripes that stand or lie."""
    model = Conv()
    labels = numbers().integers(0, 2, 72)
    rows = np.broadcast_to((np.arange(6) % 2)[:, None], (6, 6))
    images = np.where(labels[:, None, None], rows, rows.T) + numbers().normal(size=(72, 6, 6)) / 2
    images = images[..., None].astype(np.float32)
    start = functools.partial(model.init, x=images[:1], train=False)

    def loss(params, state, batch, key):
        variables, rngs = {"params": params, "batch_stats": state}, {"dropout": key}
        options = {"train": True, "mutable": "batch_stats", "rngs": rngs}
        logits, new = model.apply(variables, batch[0], **options)
        return cross_entropy(logits, batch[1]), new["batch_stats"]

    def accuracy(params, state, batch):
        variables = {"params": params, "batch_stats": state}
        return right(model.apply(variables, batch[0], train=False), batch[1])

    return study.Task(
        init=lambda key: start(key)["params"],
        init_state=lambda key: start(key)["batch_stats"],
        loss=loss,
        metrics={"accuracy": accuracy},
        **parts(images, labels),
    )


def equinox():
    """A regression without metrics."""
    _, static = eqx.partition(make_mlp(jax.random.key(0)), eqx.is_inexact_array)
    x = numbers().uniform(-1, 1, (72, 2)).astype(np.float32)

    def loss(params, batch):
        return squares(jax.vmap(eqx.combine(params, static))(batch[0]), batch[1])

    return study.Task(
        init=lambda key: eqx.filter(make_mlp(key), eqx.is_inexact_array),
        loss=loss,
        **parts(x, np.sin(3 * x[:, :1]) * x[:, 1:]),
    )


def make_mlp(key):
    return eqx.nn.MLP(2, 1, width_size=8, depth=2, activation=jnp.tanh, key=key)


def lstm():
    """Linen, a scan over time: the largest of a sequence's numbers."""
    model = nn.Sequential([nn.RNN(nn.OptimizedLSTMCell(6)), lambda h: h[:, -1], nn.Dense(1)])
    x = numbers().uniform(size=(72, 5, 1)).astype(np.float32)
    return study.Task(
        init=lambda key: model.init(key, x[:1])["params"],
        loss=lambda params, batch: squares(model.apply({"params": params}, batch[0]), batch[1]),
        **parts(x, x.max(1)),
    )


class Transformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.mlp = nnx.Sequential(
            nnx.Linear(8, 12, rngs=rngs), nnx.gelu, nnx.Linear(12, 8, rngs=rngs)
        )
        self.readout = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        x = x + self.attention(x)
        return self.readout(x + self.mlp(x))


def transformer():
    """NNX: the same token at each place of a sequence, reversed; metrics, no test examples."""
    graph = nnx.graphdef(Transformer(nnx.Rngs(0)))
    ids = numbers().integers(0, 5, (72, 4))
    arrays = parts(ids, ids[:, ::-1].copy())
    del arrays["test"]
    return study.Task(
        init=lambda key: nnx.state(Transformer(nnx.Rngs(key)), nnx.Param),
        loss=lambda params, batch: cross_entropy(nnx.merge(graph, params)(batch[0]), batch[1]),
        metrics={"accuracy": lambda p, batch: right(nnx.merge(graph, p)(batch[0]), batch[1])},
        **arrays,
    )


def plain():
    """A function, and training data alone, in a dict."""
    x = numbers().normal(size=(48, 3)).astype(np.float32)
    y = np.tanh(2 * x[:, :1] - x[:, 1:2])

    def loss(params, batch):
        h = jnp.tanh(jnp.tanh(batch["x"] @ params["a"]) @ params["b"])
        return squares(h @ params["c"], batch["y"])

    return study.Task(init=draw, loss=loss, train={"x": x, "y": y})


def draw(key):
    shapes = {"a": (3, 8), "b": (8, 6), "c": (6, 1)}
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(key, shape) / np.sqrt(shape[0])
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def generated():
    """Batches that the task makes."""

    def train(key):
        x = jax.random.normal(key, (8, 3))
        return {"x": x, "y": jnp.tanh(2 * x[:, :1] - x[:, 1:2])}

    return study.Task(init=draw, loss=plain().loss, train=train)


TASKS = {f.__name__: f for f in (conv, equinox, lstm, transformer, plain, generated)}
HIDDEN = {  # a kernel that errors pass, of each
    "conv": "Dense_0/kernel",
    "equinox": "layers/1/weight",
    "lstm": "layers_0/cell/hg/kernel",
    "transformer": "attention/value/kernel",
    "plain": "b",
    "generated": "b",
}


@pytest.mark.parametrize("name", TASKS)
def test_any_model(name, tmp_path):
    task, out = TASKS[name](), tmp_path / "results"
    result = study.compare(task, ["bp", "fa"], learning_rates=(0.02, 0.1), out=out, **SHORT)
    runs, evaluations = result.runs, result.evaluations
    assert len(runs) == 2 * 2 * 3 and len(evaluations) == 4 * len(runs)
    assert not runs.diverged.any() and np.isfinite(runs.train_loss).all()
    assert all(len(losses) == 24 for losses in result.losses.train_loss)
    for part in {"validation", "test"} & task.examples.keys():
        for metric in ("loss", *task.metrics):
            assert np.isfinite(runs[f"{part}_{metric}"]).all()
    at = {
        method: evaluations[(evaluations.method == method) & (evaluations.step == 0)]
        for method in ("bp", "fa")
    }
    for column in ("gradient_angle", "error_angle"):
        first = f"{column}/{result.kernels[0]}"
        assert at["bp"][first].max() < 1 < at["fa"][first].min()
    angles = at["fa"][f"weight_angle/{HIDDEN[name]}"]
    assert angles.between(30, 150).all()
    np.testing.assert_allclose(at["fa"][f"norm_ratio/{HIDDEN[name]}"], 1, rtol=0.5)
    np.testing.assert_array_equal(at["bp"].train_loss, at["fa"].train_loss)
    summary = result.summary()
    assert list(summary.method) == ["bp", "fa"]
    score = next(column for column in summary if column.endswith("_low"))
    assert (summary[score] <= summary[score.removesuffix("_low")]).all()
    loaded = study.load(out)
    pd.testing.assert_frame_equal(loaded.runs, runs)
    pd.testing.assert_frame_equal(loaded.summary(), summary)
    loaded.report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "backprop" in page and "FA, fixed feedback" in page


def tables(result):
    return result.runs, result.evaluations, result.losses


class Stop(Exception):
    pass


def test_step_by_step_from_python_goes_on_where_it_was_interrupted(tmp_path):
    def interrupt(method, done, *_):
        if method == "fa" and done:
            raise Stop

    arguments = {"learning_rates": (0.05, 0.1), **SHORT}
    methods = ["bp", "fa", "sign_norm"]
    task = conv()
    with pytest.raises(Stop):
        study.compare(task, methods, out=tmp_path, on_progress=interrupt, **arguments)
    trained = {"bp": set(), "fa": set(), "sign_norm": set()}
    again = study.compare(
        task,
        methods,
        out=tmp_path,
        on_progress=lambda method, done, *_: trained[method].add(done or 0),
        **arguments,
    )
    assert trained["bp"] <= {0, 6} and max(trained["sign_norm"]) == 6
    whole = study.compare(task, methods, **arguments)
    for a, b in zip(tables(again), tables(whole), strict=True):
        pd.testing.assert_frame_equal(a, b, rtol=1e-4)


# Methods of one's own


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlipSigns(soap_jax.Rule):
    """Gives a share of the signs of B, drawn anew, those of W."""

    share: float = 0.3

    def __call__(self, kernel, feedback, key):
        chosen = jax.random.bernoulli(key, self.share, kernel.shape)
        return jnp.where(chosen, jnp.copysign(feedback, kernel), feedback)


def dfa_loss(params, projections, batch):
    a = jnp.tanh(batch["x"] @ params["a"])
    b = jnp.tanh(ops.detach(a) @ params["b"])
    y = direct.direct_feedback(ops.detach(b) @ params["c"], (a, b), projections)
    return squares(y, batch["y"])


def dfa_projections(key, params, batch):
    del batch
    keys = jax.random.split(key)
    return tuple(
        jax.random.normal(k, (1, params[name].shape[1])) for k, name in zip(keys, "ab", strict=True)
    )


def decayed(learning_rate):
    return optax.chain(optax.add_decayed_weights(0.1), optax.sgd(learning_rate))


OWN = {
    "flip": study.Method(
        rule=FlipSigns(period=2), label="some signs", isolates="signs, one by one"
    ),
    "dfa": study.Method(loss=dfa_loss, init_feedback=dfa_projections, reference="fa"),
    "kp": study.Method(rule=soap_jax.Fixed(), feedback_bar="kernel"),
    "transport": study.Method(rule=soap_jax.Transport(period=1)),
}


@pytest.fixture(scope="module")
def own():
    return study.compare(
        plain(),
        {"bp": "bp", "fa": "fa", **OWN},
        learning_rates=(0.05, 0.2),
        optimizer=decayed,
        target_loss=0.3,
        claims=[
            study.Claim("flip", "some signs are no faster", [study.Ratio("flip", within=(0.9, 9))])
        ],
        **SHORT | {"seeds": 4, "steps": 60},
    )


def of(result, method, table="evaluations"):
    rows = getattr(result, table)
    return rows[rows.method == method].drop(columns="method").reset_index(drop=True)


def test_transport_at_each_step_is_backprop(own):
    np.testing.assert_array_equal(
        np.stack(of(own, "transport", "losses").train_loss),
        np.stack(of(own, "bp", "losses").train_loss),
    )
    columns = ["steps_to_target", "train_loss"]
    pd.testing.assert_frame_equal(
        of(own, "transport", "runs")[columns], of(own, "bp", "runs")[columns]
    )
    measured = [c for c in own.evaluations if c.startswith(("gradient_angle", "weight_angle"))]
    assert (of(own, "transport")[measured] < 0.1).all(axis=None)


def test_all_methods_start_from_the_same_loss(own):
    first = own.losses.assign(first=own.losses.train_loss.str[0]).groupby("seed")["first"]
    np.testing.assert_allclose(first.max(), first.min(), rtol=1e-6)  # by several programs
    assert first.min().nunique() == 4


def test_own_methods_do_as_they_say(own):
    def last(method, column):
        rows = of(own, method)
        return rows[rows.step == rows.step.max()][column]

    def first(method, column):
        rows = of(own, method)
        return rows[rows.step == 0][column]

    for method in ("flip", "kp"):
        assert (last(method, "weight_angle/b").to_numpy()
                < first(method, "weight_angle/b").to_numpy()).all()  # fmt: skip
    np.testing.assert_allclose(last("fa", "norm_ratio/b") > 1, True)  # only W decays
    assert of(own, "dfa")["weight_angle/b"].isna().all()
    assert (first("dfa", "gradient_angle/a") > 5).all()
    assert (first("dfa", "error_angle/a") > 5).all()


def test_own_methods_get_all_that_the_librarys_get(own, tmp_path):
    own.report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for word in ("some signs", "signs, one by one", "some signs are no faster", "dfa", "kp"):
        assert word in page
    summary = own.summary().set_index("method")
    assert {"flip", "dfa", "kp", "transport"} <= set(summary.index)
    assert own.ratio("transport", "bp").value == 1
    estimate = own.ratio("flip", "bp")
    assert estimate.low <= estimate.value <= estimate.high
    (finding,) = own.judge()
    assert finding.key == "flip" and not finding.exploratory
    (other,) = own.judge([study.Claim("flip", "no faster", [study.Ratio("flip", within=(0.1, 9))])])
    assert other.exploratory


# Perturbation


def tapped_losses(tap, params, batch):
    a = jnp.tanh(tap("a", batch["x"] @ params["a"]))
    b = jnp.tanh(tap("b", a @ params["b"]))
    return jnp.mean((tap("y", b @ params["c"]) - batch["y"]) ** 2, axis=-1)


def by_nodes(params, feedback, batch, key, step, learning_rate):
    del feedback, step, learning_rate
    return perturbation.node_perturbation(tapped_losses)(params, batch, key=key)


def test_methods_of_perturbation_learn_beside_backprop():
    methods = {
        "bp": "bp",
        "forward": "forward_gradient",
        "weight": study.Method(
            estimator=functools.partial(perturbation.weight_perturbation, directions=8)
        ),
        "node": study.Method(gradient=by_nodes, label="node perturbation"),
    }
    sizes = SHORT | {"seeds": 2, "steps": 240}
    result = study.compare(plain(), methods, learning_rates=(0.01,), **sizes)
    losses = {name: np.stack(of(result, name, "losses").train_loss) for name in methods}
    for curves in losses.values():
        np.testing.assert_allclose(curves[:, 0], losses["bp"][:, 0], rtol=1e-6)
        assert curves[:, -60:].mean() < 0.8 * curves[:, :6].mean()
    angles = {name: of(result, name)["gradient_angle/a"] for name in methods}
    assert angles["forward"].between(45, 135).all()  # one direction among 78
    assert angles["weight"].mean() < angles["forward"].mean()
    for column in ("error_angle/a", "weight_angle/b"):
        assert of(result, "forward")[column].isna().all()
    said = {name: method["description"] for name, method in result.methods.items()}
    assert said["forward"] == "estimator=forward_gradient"
    assert said["weight"] == "estimator=weight_perturbation(directions=8)"


def test_estimators_take_the_state_of_a_model_and_the_key_of_its_loss():
    def loss(params, state, batch, key):
        h = jnp.tanh(batch["x"] @ params["a"])
        h *= jax.random.bernoulli(key, 0.9, h.shape) / 0.9
        return squares(h @ params["c"], batch["y"]), state + 1

    def start(key):
        params = draw(key)
        return {"a": params["a"], "c": params["b"][:, :1]}

    task = dataclasses.replace(plain(), init=start, init_state=lambda key: jnp.int32(0), loss=loss)
    result = study.compare(
        task,
        ["forward_gradient", "weight_perturbation"],
        learning_rates=(0.01,),
        **SHORT | {"seeds": 2, "steps": 300},
    )
    for name in result.methods:
        losses = np.stack(of(result, name, "losses").train_loss)
        assert losses[:, -60:].mean() < losses[:, :60].mean(), name


def test_refuses_held_out_examples_that_the_loss_does_not_take():
    task = dataclasses.replace(plain(), validation={"x": np.ones((4, 3), np.float32)})
    with pytest.raises(ValueError, match="loss, on examples of validation, raises KeyError: 'y'"):
        study.compare(task, ["bp", "fa"], learning_rates=(0.1,), **SHORT)
