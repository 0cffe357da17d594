"""`study.compare` under inputs that its authors did not think of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest

import soap_jax
from soap_jax import study, sweeps

SHORT = {"learning_rates": (0.1,), "seeds": 2, "steps": 4, "batch_size": 4, "evaluations": 2}
X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
DATA = {"x": X, "y": X[:, :1]}
DRAWN = np.random.default_rng(1)


def init(key):
    keys = jax.random.split(key)
    return {"a": jax.random.normal(keys[0], (3, 4)), "b": jax.random.normal(keys[1], (4, 1))}


def loss(params, batch):
    return jnp.mean((jnp.tanh(batch["x"] @ params["a"]) @ params["b"] - batch["y"]) ** 2)


def make(**changes):
    return study.Task(**{"init": init, "loss": loss, "train": DATA, **changes})


@pytest.fixture
def untrained(monkeypatch):
    """Traces as ever, but makes up the results."""

    def iterate(run, points, *, args, done, on_progress, **_):
        if not (missing := sorted({*range(len(points))} - {*done})):
            return
        on_progress(len(missing), len(points))
        integer, real = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
        shapes = jax.eval_shape(run, integer, real, integer, integer, args[1])
        yield sweeps.Part(
            missing, jax.tree.map(lambda x: np.full((len(missing), *x.shape), 0.5, x.dtype), shapes)
        )

    monkeypatch.setattr(sweeps, "iterate", iterate)


def compare(task=None, methods=("fa",), **options):
    return study.compare(task or make(), methods, **{**SHORT, **options})


GOOD = {
    "numpy's numbers": {
        "seeds": np.arange(2),
        "learning_rates": np.array([0.1, 0.2], np.float32),
        "steps": np.int64(4),
        "batch_size": np.int32(4),
        "evaluations": np.int16(2),
        "eval_batch_size": np.int64(3),
        "periods": np.array([1, 2]),
        "target_loss": np.float32(0.5),
    },
    "jax's numbers": {"seeds": jnp.arange(2), "learning_rates": jnp.array([0.1])},
    "iterators": {"seeds": (i for i in (5, 3)), "learning_rates": (r for r in (0.1, 0.2))},
    "numpy's count": {"seeds": np.int64(2)},
    "one update": {"steps": 1},
    "one claim": {"claims": study.Ratio("fa", within=(0, 2))},
    "tables": {
        "task": make(train={"x": pd.DataFrame(X), "y": pd.DataFrame(X[:, :1])}),
    },
    "bytes in another order": {"task": make(train={"x": X.astype(">f4"), "y": X[:, :1]})},
    "keys": {"task": make(train={**DATA, "key": jax.random.split(jax.random.key(0), 8)})},
    "paths as parts of names": {"methods": {"..": "fa", "a b": "bp", "ü": "fa"}},
}


@pytest.mark.parametrize("name", GOOD)
def test_takes_whatever_says_it_clearly(name, untrained, tmp_path):
    result = compare(out=tmp_path / "a b", keep_params=True, **GOOD[name])
    assert set(result.summary()["method"]) == set(result.methods)
    (finding,) = result.judge([study.Difference("fa", metric="no such", within=(0, 1))])
    assert finding.verdict == "not testable here"


REFUSED = {
    "no task": ({"task": DATA}, "expected a soap_jax.study.Task"),
    "no count": ({"seeds": 2.0}, "seeds is 2.0"),
    "words": ({"learning_rates": "0.1"}, "learning_rates has '0'"),
    "evaluation": ({"eval_batch_size": -3}, "eval_batch_size is -3"),
    "chunk": ({"chunk_size": 0}, "chunk_size is 0"),
    "memory": ({"memory_limit": "1GB"}, "memory_limit is '1GB'"),
    "target": ({"target_loss": "low"}, "target_loss is 'low'"),
    "extend": ({"extend": 1.5}, "extend is 1.5"),
    "record": ({"record": {"note": {1}}}, "cannot be stored as JSON"),
    "claims": ({"claims": ["fa"]}, "expected a list of Claims"),
    "the worst rate": (
        {"task": make(validation=DATA, metrics={"m": loss}), "select": "validation_m"},
        "maximise is None",
    ),
    "init raises": ({"task": make(init=lambda key: key["x"])}, "init raises"),
    "init draws": (
        {
            "task": make(
                init=lambda key: {"a": init(key)["a"] * DRAWN.normal(), "b": init(key)["b"]}
            )
        },
        "init is not pure",
    ),
    "examples draw": (
        {"task": make(train=lambda key: {"x": X[:4] * DRAWN.normal(), "y": X[:4, :1]})},
        "train is not pure",
    ),
    "loss raises": ({"task": make(loss=lambda params, batch: params["no"])}, "loss raises Key"),
    "no state": (
        {"task": make(init_state=lambda key: 0, loss=lambda p, s, b, k: loss(p, b))},
        "loss raises TypeError",
    ),
    "integers learnt": (
        {"task": make(init=lambda key: init(key) | {"n": jnp.arange(3)})},
        r"init gives int32 at \['n'\]",
    ),
    "a name of no file": ({"methods": {"a\0b": "fa"}}, "printable"),
    "a long name": ({"methods": {"a" * 300: "fa"}}, "at most 100 bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_the_rest_before_training(name, tmp_path):
    def trains(*_):
        raise AssertionError

    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        compare(out=tmp_path, on_progress=trains, **options)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array(["a"] * 8), "ndarray of <U1"),
        (np.array([None] * 8), "ndarray of object"),
        (np.ma.masked_array(X, X > 1), "MaskedArray"),
        (np.arange(8) + 2**40, r"integers that are too large for int32 at \["),
    ],
)
def test_refuses_arrays_that_are_no_numbers_to_jax(array, message):
    with pytest.raises(ValueError, match=message):
        make(train={**DATA, "more": array})


def test_words_are_words():
    with pytest.raises(ValueError, match="label is 3"):
        study.Method(rule=soap_jax.Fixed(), label=3)


def twice(params, feedback, batch):
    return 2 * loss(params, batch)


def once(params, feedback, batch):
    return loss(params, batch)


once.__qualname__ = twice.__qualname__
MADE = {"x": X[:4], "y": X[:4, :1]}


def of_constant(array):
    return jax.jit(lambda params, batch: loss(params, batch) + jnp.mean(jnp.asarray(array)))


CODE = {
    "optimizer": [{"optimizer": lambda r, m=m: optax.sgd(r, momentum=m)} for m in (0.5, 0.9)],
    "init": [
        {"task": make(init=lambda k, s=s: jax.tree.map(lambda x: s * x, init(k)))} for s in (1, 2)
    ],
    "metric": [
        {"task": make(validation=DATA, metrics={"m": lambda p, b, s=s: s * loss(p, b)})}
        for s in (1, 2)
    ],
    "examples": [
        {"task": make(train=lambda k, s=s: jax.tree.map(lambda x: s * x, MADE))} for s in (1, 2)
    ],
    "method": [{"methods": {"m": study.Method(loss=of)}} for of in (once, twice)],
    "constant of a jitted loss": [{"task": make(loss=of_constant(x))} for x in (X[:4], X[4:])],
}


@pytest.mark.parametrize("name", CODE)
def test_runs_of_other_code_are_not_mixed(name, untrained, tmp_path):
    before, now = CODE[name]
    compare(out=tmp_path, **before)
    with pytest.raises(ValueError, match="other settings"):
        compare(out=tmp_path, **now)


def test_code_that_only_moved_is_the_same(untrained, tmp_path):
    def method():
        return {"m": study.Method(loss=functools.partial(once))}

    options = {"methods": method(), "optimizer": lambda rate: optax.sgd(rate)}
    compare(out=tmp_path, **options)
    trained = []
    options = {"methods": method(), "optimizer": (lambda rate: optax.sgd(rate))}
    compare(out=tmp_path, on_progress=lambda _, done, *__: trained.append(done), **options)
    assert trained == [None]


def test_params_are_kept_by_any_name_and_of_any_type(untrained, tmp_path, monkeypatch):
    def of_names(params, batch):
        params = {name: leaf.astype(jnp.float32) for name, leaf in params.items()}
        return loss({"a": params["file"], "b": params["facts"]}, batch)

    def names(key):
        return {"file": init(key)["a"].astype(jnp.bfloat16), "facts": init(key)["b"]}

    monkeypatch.chdir(tmp_path)
    result = compare(make(init=names, loss=of_names), out="results", keep_params=True)
    monkeypatch.chdir("/")
    params = result.params("fa", 0.1, 1)
    assert {name: leaf.dtype for name, leaf in params.items()} == dict.fromkeys(
        ("file", "facts"), np.float32
    )
    np.testing.assert_array_equal(params["file"], np.full((3, 4), 0.5))
