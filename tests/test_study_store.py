"""The directory of a comparison: parts while it runs, tables at the end, clear words if amiss."""

import copy
import json
import os

import numpy as np
import pandas as pd
import pytest

from soap_jax import study, trees
from soap_jax.study import files, store
from soap_jax.study.store import KEYS, Run, Store

PROTOCOL = {"learning_rates": [0.1, 1.0], "evaluations": 2, "steps": 4, "target_loss": 0.5}
PROTOCOL |= {"select": "validation_loss", "maximise": False}
RECORD = {
    "format": store.FORMAT,
    "protocol": PROTOCOL,
    "seeds": [0, 1],
    "methods": {
        name: {"label": name, "reference": "bp", "description": name, "periods": periods}
        for name, periods in (("sign", [1, 10]), ("bp", [0]))
    },
    "extended": [],
    "kernels": ["a", "b"],
    "examples": {"train": 40},
    "window": 1,
    "claims": [],
    "versions": {"soap_jax": "0", "jax": "1"},
    "device": {"platform": "cpu", "processor": "mine", "count": 2, "processes": 1},
    "settings": {"jax_default_prng_impl": "threefry2x32", "XLA_FLAGS": ""},
}
RUNS = [
    Run(name, rate, seed, period)
    for name, of in RECORD["methods"].items()
    for period in of["periods"]
    for rate in PROTOCOL["learning_rates"]
    for seed in RECORD["seeds"]
]
TABLES = ("runs.parquet", "runs.csv", "evaluations.parquet", "evaluations.csv", "losses.parquet")


def results_of(runs):
    """What the runs gave, every number of which says whose it is."""
    each = np.array([seed + 7 * rate + period for _, rate, seed, period in runs], np.float32)
    rows = {"validation_loss": each[:, None] / np.float32([1, 2, 3])}
    if runs[0].period:
        rows["weight_angle/b"] = each[:, None] + np.arange(3, dtype=np.float32)
    losses = each[:, None] / np.arange(1, 5, dtype=np.float32)
    return {"train_loss": losses, "evaluations": rows, "test": {"loss": each}}


def parts(size=3):
    """All runs, a few at a time, of one method and period."""
    for start in range(0, len(RUNS), 4):
        for i in range(start, start + 4, size):
            yield RUNS[i : min(i + size, start + 4)]


def record(**changes):
    return copy.deepcopy(RECORD) | changes


def begun(path, num=None, size=3):
    found = Store(path)
    found.begin(RECORD, RUNS)
    for runs in list(parts(size))[:num]:
        found.add(runs, results_of(runs))
    return found


def finish(found):
    found.finish(lambda tables: (tables, {"seconds": 1.0}))


def contents(path):
    return {name: (path / name).read_bytes() for name in TABLES}


@pytest.fixture
def finished(tmp_path):
    finish(begun(tmp_path / "out"))
    return tmp_path / "out"


def test_what_is_kept_is_what_was_done(tmp_path):
    begun(tmp_path, 4)
    found = Store(tmp_path)
    assert found.record == RECORD and not found.finished
    assert found.done() == {run for runs in list(parts())[:4] for run in runs}
    with pytest.raises(ValueError, match=r"holds 8 runs: the comparison is not finished\. Repeat"):
        found.read()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_tables_do_not_depend_on_how_runs_were_split_into_parts(size, finished, tmp_path):
    finish(begun(tmp_path / "other", size=size))
    assert contents(tmp_path / "other") == contents(finished)


def test_every_row_is_its_own_run(finished):
    tables = Store(finished).read()
    runs, angles = tables["runs"], tables["evaluations"]["weight_angle/b"]
    own = runs["seed"] + 7 * np.float32(runs["learning_rate"]) + runs["period"]
    np.testing.assert_array_equal(np.float32(runs["test_loss"]), np.float32(own))
    assert runs["method"].unique().tolist() == ["sign", "bp"]  # in the order asked for
    assert len(runs) == 2 * 2 * (2 + 1)
    assert angles.isna().equals(tables["evaluations"]["method"] == "bp")


def test_tables_are_read_as_they_were_written_and_nothing_else_stays(finished):
    found = Store(finished)
    assert found.finished and found.record["seconds"] == 1.0
    for name, table in found.read().items():
        if name != "losses":
            assert (finished / f"{name}.csv").read_text() == table.to_csv(index=False)
    assert {path.name for path in finished.iterdir()} == {*TABLES, "study.json"}


@pytest.mark.parametrize("added", [False, True], ids=["first", "added"])
@pytest.mark.parametrize("stop", range(8))
def test_finishing_goes_on_wherever_it_was_stopped(stop, added, finished, tmp_path, monkeypatch):
    """Before each file that `finish` writes, and amid the removal of what it was made of."""
    path, steps = tmp_path / "stopped", 0
    if added:  # a seed more than there was
        small = record(seeds=[0])
        found = Store(path)
        mine = [run for run in RUNS if run.seed == 0]
        found.begin(small, mine)
        for run in mine:
            found.add([run], results_of([run]))
        finish(found)
        found = Store(path)
        found.begin(RECORD, RUNS)
        for run in set(RUNS) - set(mine):
            found.add([run], results_of([run]))
    else:
        found = begun(path)

    def counted(real):
        def step(*args, **kwargs):
            nonlocal steps
            steps += 1
            if steps > stop:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomically", counted(files.write_atomically))
        patch.setattr("shutil.rmtree", counted(lambda path, **_: os.remove(next(path.iterdir()))))
        patch.setattr("pathlib.Path.unlink", counted(lambda path, **_: os.remove(path)))
        with pytest.raises(KeyboardInterrupt):
            finish(found)
    again = Store(path)
    again.begin(RECORD, RUNS)
    assert again.done() == set(RUNS)
    finish(again)
    assert contents(path) == contents(finished)
    assert {file.name for file in path.iterdir()} == {*TABLES, "study.json"}


def test_a_comparison_that_failed_before_its_first_run_blocks_nothing(tmp_path):
    begun(tmp_path, 0)
    Store(tmp_path).begin(record(seeds=[3]), [])
    assert Store(tmp_path).record["seeds"] == [3]


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("versions", {"jax": "0.1"}, r"versions\.jax: was 0\.1, is now 1"),
        ("device", {"processor": "other"}, "device.processor: was other"),
        ("device", {"platform": "gpu"}, "device.platform: was gpu"),
        ("device", {"count": 1}, "device.count: was 1"),
        ("protocol", {"steps": 3}, "protocol.steps: was 3, is now 4"),
        ("settings", {"jax_default_prng_impl": "rbg"}, "settings.jax_default_prng_impl: was rbg"),
        ("settings", {"XLA_FLAGS": "--fast"}, "settings.XLA_FLAGS: was --fast, is now not set"),
    ],
)
def test_runs_done_otherwise_are_not_mixed_with_ours(part, change, message, tmp_path):
    begun(tmp_path, 1)
    edit(tmp_path / "progress.json", lambda known: known[part].update(change))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.*")}
    with pytest.raises(ValueError, match=rf"runs with other settings \(.*{message}"):
        Store(tmp_path).begin(RECORD, RUNS)
    assert before == {file: file.read_bytes() for file in before}


def edit(path, change):
    known = json.loads(path.read_text())
    change(known)
    path.write_text(json.dumps(known))


@pytest.mark.parametrize("count", [2, 64])
def test_cpu_runs_go_on_with_any_number_of_devices_but_one_and_of_processes(count, tmp_path):
    begun(tmp_path, 1)
    device = RECORD["device"] | {"count": count, "processes": 8}
    Store(tmp_path).begin(record(device=device), RUNS)
    assert Store(tmp_path).record["device"]["count"] == count


def test_a_setting_that_was_not_noted_is_not_compared(tmp_path):
    begun(tmp_path, 1)
    edit(tmp_path / "progress.json", lambda known: known["settings"].pop("XLA_FLAGS"))
    Store(tmp_path).begin(RECORD, RUNS)
    assert "XLA_FLAGS" in Store(tmp_path).record["settings"]


@pytest.mark.parametrize("name", ["study.json", "progress.json"])
@pytest.mark.parametrize(
    "text", ["", '{"format": ', "[]", "{}", '{"versions": []}', '{"versions": 3}', "\0" * 99]
)
def test_a_damaged_record_is_named(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name} is not the record of a comparison \(.* as out"):
        Store(tmp_path)


@pytest.mark.parametrize("name", ["study.json", "progress.json"])
@pytest.mark.parametrize("found", [None, 1, store.FORMAT + 1, "2"])
def test_results_of_another_format_name_the_version_that_made_them(name, found, tmp_path):
    known = {"versions": {"soap_jax": "0.0.9"}} | ({"format": found} if found else {})
    (tmp_path / name).write_text(json.dumps(known))
    with pytest.raises(ValueError, match=r"of format \w+, made by soap_jax 0\.0\.9; .* reads"):
        Store(tmp_path)


def test_a_directory_without_a_comparison_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere holds no comparison"):
        study.load(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


NO_ARCHIVE = (
    b"\x93NUMPY\x01\0v\0{'descr': '<f8', 'fortran_order': False, 'shape': (0,), }" + b" " * 60
)


def save(**arrays):
    def write(file):
        kept = dict(np.load(file))
        np.savez(file, **{k: v for k, v in (kept | arrays).items() if v is not None})

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(b""), ""),
        (lambda file: file.write_bytes(b"no archive"), ""),
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), ""),
        (lambda file: file.write_bytes(NO_ARCHIVE), ""),
        (save(facts=None), "KeyError"),
        (save(facts=np.ones((2, 2))), ""),
        (save(train_loss=np.ones(9)), "differ in length"),
        (save(**{"test/loss": np.ones(9)}), "differ in length"),
        (save(**{"test/loss": None}), "expected the arrays"),
        (save(**{"no such/loss": np.ones(3)}), "expected the arrays"),
    ],
)
def test_a_damaged_part_is_named_and_deleting_it_mends_the_rest(damage, message, tmp_path):
    found = begun(tmp_path)
    file = sorted((tmp_path / "parts").iterdir())[0]
    damage(file)
    for use in (found.done, lambda: finish(found)):
        with pytest.raises(ValueError, match=rf"{file.name} is damaged .*{message}.*Delete it"):
            use()
    file.unlink()
    assert 0 < len(Store(tmp_path).done()) < len(RUNS)


def test_no_flipped_byte_of_a_part_goes_unnoticed(tmp_path):
    found = begun(tmp_path, 1)
    file = next((tmp_path / "parts").iterdir())
    good, rng = file.read_bytes(), np.random.default_rng(0)

    def loaded():
        [(runs, results)] = found._parts()
        return runs, {name: leaf.tobytes() for name, leaf in trees.named(results).items()}

    expected, noticed = loaded(), 0
    for _ in range(300):
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
        file.write_bytes(bad)
        try:
            assert loaded() == expected  # a byte that means nothing
        except ValueError:
            noticed += 1
    assert noticed > 200


def test_a_part_of_another_comparison_is_named(tmp_path):
    found = begun(tmp_path, 1)
    found.add([Run("fa", 0.1, 0, 0)], results_of([Run("fa", 0.1, 0, 0)]))
    (tmp_path / "parts" / ".nfs0001").write_text("the file system's own")
    with pytest.raises(ValueError, match=r"holds Run\(method='fa'.*, which is not a run of this"):
        found.begin(RECORD, RUNS)


def test_parts_without_a_word_on_how_they_were_done_are_refused(tmp_path):
    begun(tmp_path, 1)
    (tmp_path / "progress.json").unlink()
    with pytest.raises(ValueError, match=r"holds runs, but not progress\.json"):
        Store(tmp_path).begin(RECORD, RUNS)


@pytest.mark.parametrize("name", ["runs", "evaluations", "losses"])
@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.query("seed == 0 or method == 'sign'"),
        lambda table: pd.concat([table, table[-2:]]),
        lambda table: table.assign(period=table["period"] + 1),
        lambda table: table.drop(columns="seed"),
        lambda table: table[:0],
    ],
    ids=["fewer", "twice", "others", "no column", "none"],
)
def test_tables_of_other_runs_than_the_records_are_refused(name, change, finished):
    file = finished / f"{name}.parquet"
    change(pd.read_parquet(file)).to_parquet(file, index=False)
    with pytest.raises(ValueError, match=r"(runs|evaluations|losses)\b.*into a(nother| new) dir"):
        study.load(finished)


@pytest.mark.parametrize("damage", ["absent", "empty", "cut", "flipped"])
def test_a_damaged_table_is_named(damage, finished):
    file = finished / "evaluations.parquet"
    good = file.read_bytes()
    flipped = good[:200] + bytes(byte ^ 1 for byte in good[200:400]) + good[400:]
    file.write_bytes({"cut": good[: len(good) // 2], "flipped": flipped}.get(damage, b""))
    if damage == "absent":
        file.unlink()
    with pytest.raises(
        ValueError, match=r"(?s)evaluations\.parquet cannot be read .*another directory"
    ):
        study.load(finished)


def test_results_that_may_only_be_read_are_read(finished, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    for name in ("unlink", "mkdir"):
        monkeypatch.setattr(f"pathlib.Path.{name}", refuse)
    assert len(study.load(finished).runs) == len(RUNS)


# Rows of tables


def long_run(losses, **changes):
    """The row of a run with these losses, and its evaluations."""
    losses = np.asarray(losses, np.float32)[None]
    results = {"train_loss": losses, "evaluations": {}, "test": {}} | changes
    protocol = PROTOCOL | {"steps": losses.size}
    tables = store.tidy(RUNS[:1], results, record(window=11, protocol=protocol))
    return tables["runs"].iloc[0], tables["evaluations"]


def test_there_is_one_row_per_run_and_one_per_evaluation():
    tables = store.tidy(RUNS[:4], results_of(RUNS[:4]), RECORD)
    assert not tables["runs"].duplicated(KEYS).any() and len(tables["losses"]) == 4
    assert len(tables["evaluations"]) == 4 * 3
    assert not tables["evaluations"].duplicated([*KEYS, "step"]).any()


def test_the_training_loss_is_a_centred_moving_average_that_does_not_lag():
    falling = np.linspace(1, 0, 100)
    run, evaluations = long_run(falling)
    at_50 = evaluations.query("step == 50")["train_loss"].item()
    assert at_50 == pytest.approx(falling[49], abs=1e-6)
    assert run["steps_to_target"] == 51  # falling[50] is the first below 0.5


FLAT = np.full(100, 0.9)


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [
        (np.where(np.arange(100) == 20, 0.1, FLAT), False),  # the noise of a single batch
        (np.concatenate([FLAT[:30], [np.inf], np.full(69, 0.1)]), True),  # it came back
        (np.concatenate([FLAT[:30], np.full(70, np.nan)]), True),
        (np.full(100, 0.6), False),
        (np.concatenate([FLAT[:50], np.full(50, 2.0)]), True),  # finite, but far above its start
    ],
    ids=["noise", "came back", "stopped", "slow", "grew"],
)
def test_a_run_that_never_arrives_has_no_steps(losses, diverged):
    run, _ = long_run(losses)
    assert run["diverged"] == diverged and np.isnan(run["steps_to_target"])


def test_a_run_that_comes_down_again_is_not_diverged():
    assert not long_run(np.repeat([2.3, 150, 2, 1], 25))[0]["diverged"]


def test_a_run_that_breaks_in_the_last_update_is_diverged_too():
    broken = {"evaluations": {"validation_loss": np.array([[1.0, 1.0, np.inf]])}}
    assert long_run(FLAT, **broken)[0]["diverged"]
    assert long_run(FLAT, test={"loss": np.array([np.nan])})[0]["diverged"]


def test_numbers_are_float64_but_losses():
    tables = store.tidy(RUNS[:4], results_of(RUNS[:4]), RECORD)
    assert (
        tables["evaluations"]["validation_loss"].dtype == tables["runs"]["test_loss"].dtype == float
    )
    assert tables["losses"]["train_loss"][0].dtype == np.float32
