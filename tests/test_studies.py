"""Every study in `studies/` runs, on data that are made up where its own are not there."""

import gzip
import os
import pathlib
import runpy

import jax
import numpy as np
import optax
import pytest

from soap_jax import _archives, study
from soap_jax.study import methods as registry
from soap_jax.study import preset

STUDIES = sorted((pathlib.Path(__file__).parent.parent / "studies").glob("*.py"))
assert STUDIES, "the directory studies/ is empty"


@pytest.fixture(scope="session")
def made_up(tmp_path_factory):
    """Noise in the formats of MNIST and CIFAR-10."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in ("mnist", "cifar10"):
        (root / name).mkdir()
    for name, size in zip(_archives.IDX_NAMES, (700, 700, 50, 50), strict=True):
        shape = (size, 28, 28) if "images" in name else (size,)
        array = rng.integers(0, 256 if "images" in name else 10, shape, np.uint8)
        header = bytes([0, 0, 8, array.ndim]) + np.array(shape, ">u4").tobytes()
        (root / "mnist" / name).write_bytes(gzip.compress(header + array.tobytes()))
    records = rng.integers(0, 256, (400, 3073), np.uint8)
    records[:, 0] %= 10
    (root / "cifar10" / "data_batch_1.bin").write_bytes(records.tobytes())
    return root


@pytest.fixture(autouse=True)
def forgotten():
    """Keeps no program: these are large, and JAX 0.10.2 crashed where it wrote one to its cache."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)
    yield
    jax.config.update(name, before)
    jax.clear_caches()


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_runs_at_reduced_size(path, made_up, monkeypatch):
    """Its first task and three of its methods; the others differ in size and in rule alone."""
    monkeypatch.setenv("SOAP_JAX_DATA_DIR", str(made_up))
    monkeypatch.chdir(made_up)  # no study may need where it is called
    found = runpy.run_path(str(path))
    options = {field: found[field] for field in preset.Protocol.__annotations__ if field in found}
    options |= {"learning_rates": options["learning_rates"][:1], "seeds": 2, "steps": 2}
    options |= {
        "evaluations": 1,
        "chunk_size": None,
        "batch_size": min(options.get("batch_size", 16), 16),
    }
    options.pop("epochs", None)
    task = found["task"] if "task" in found else next(iter(found["tasks"].values()))
    chosen = {name: found[name] for name in ("select", "maximise", "optimizer") if name in found}
    methods = registry.resolve(found["methods"])
    methods = {name: methods[name] for name in dict.fromkeys(("bp", *list(methods)[-2:]))}
    result = study.compare(
        task,
        methods,
        claims=found.get("claims", ()),
        **({"optimizer": optax.sgd} | chosen | options),
    )
    runs = result.runs
    assert set(runs.method) == set(methods) and np.isfinite(runs.train_loss).all()
    verdicts = {finding.verdict for finding in result.judge()}
    assert verdicts <= {"holds", "fails", "undecided", "not testable here"}
    assert preset.Protocol(**options).smaller(found["smaller"])  # for --quick
    assert os.environ["SOAP_JAX_DATA_DIR"] not in str(result.record["protocol"])
