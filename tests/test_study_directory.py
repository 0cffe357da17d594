"""The directory of a study: parts while it runs, tables at the end, clear words if it is amiss."""

import dataclasses
import json
import os
import pathlib

import numpy as np
import pandas as pd
import pytest
from soap_jax.study.config import StudyConfig
from soap_jax.study.directory import ResultsDir

from soap_jax import data
from soap_jax.study import experiment, files, results

CONFIG = StudyConfig(
    methods=("sign", "bp"),
    learning_rates=(0.1, 1.0),
    seeds=2,
    periods=(1, 10),
    epochs=1,
    batch_size=8,
    evaluations=2,
    hidden=(3,),
)
TABLES = ("runs.parquet", "runs.csv", "evaluations.parquet", "evaluations.csv", "losses.parquet")


def examples(num):
    return data.Split(np.zeros((num, 2, 2), np.uint8), np.zeros(num, np.int32))


def facts(config=CONFIG):
    return results.provenance(config, data.Dataset("toy", examples(40), examples(5), 3, 16, "toy"))


def record(points):
    """What the runs gave, every number of which says whose it is."""
    each = np.array([s + 7 * r + t for s, r, t in points], np.float32)
    angle = {"weight_angle/Dense_1": each[:, None] + np.arange(3, dtype=np.float32)}
    rows = {"validation_loss": each[:, None] / np.float32([1, 2, 3])}
    return experiment.Record(
        train_loss=each[:, None] / np.arange(1, 5, dtype=np.float32),
        evaluations=rows
        | {"validation_accuracy": rows["validation_loss"] / 9}
        | (angle if points[0].period else {}),
        test_loss=each,
        test_accuracy=each / 9,
    )


def chunks(size=3):
    """All parts of a study, each of one method and period."""
    for method in CONFIG.methods:
        points = experiment.points_of(CONFIG, method)
        for period in CONFIG.periods_of(method):
            same = [point for point in points if point.period == period]
            for start in range(0, len(same), size):
                yield method, same[start : start + size]


def begun(path, parts=None, **changes):
    directory = ResultsDir(path, dataclasses.replace(CONFIG, **changes))
    directory.begin(facts(directory.config))
    for method, points in list(chunks())[:parts]:
        directory.add(method, points, record(points))
    return directory


def contents(path, names=TABLES):
    return {name: (path / name).read_bytes() for name in names}


@pytest.fixture
def finished(tmp_path):
    begun(tmp_path / "out").finish(seconds=1.0)
    return tmp_path / "out"


def test_what_is_kept_is_what_was_done_whatever_the_order(tmp_path):
    directory = begun(tmp_path, parts=4)
    other = ResultsDir(tmp_path)
    assert other.config == CONFIG and not other.finished
    for method in CONFIG.methods:
        done = {point for name, part in list(chunks())[:4] for point in part if name == method}
        assert set(directory.done(method)) == set(other.done(method)) == done


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_tables_do_not_depend_on_how_runs_were_split_into_parts(size, finished, tmp_path):
    directory = begun(tmp_path / "other", parts=0)
    for method, points in reversed(list(chunks(size))):
        directory.add(method, points, record(points))
    directory.finish(seconds=2.0)
    assert contents(tmp_path / "other") == contents(finished)


def test_every_row_is_its_own_run(finished):
    runs = ResultsDir(finished).read()["runs"]
    own = runs["seed"] + 7 * np.float32(runs["learning_rate"]) + runs["period"]
    np.testing.assert_array_equal(np.float32(runs["test_loss"]), np.float32(own))
    assert runs["method"].unique().tolist() == ["sign", "bp"]  # in the order asked for
    assert len(runs) == 2 * 2 * (2 + 1)


def test_tables_are_read_as_they_were_written_and_nothing_else_stays(tmp_path):
    written = begun(tmp_path).finish(seconds=1.0, runs_before=0)
    again = ResultsDir(tmp_path, CONFIG)
    assert again.finished and again.facts["seconds"] == 1.0
    read = again.read()
    for name, table in written.items():
        pd.testing.assert_frame_equal(read[name], table, check_exact=True)
        if name != "losses":
            assert (tmp_path / f"{name}.csv").read_text() == read[name].to_csv(index=False)
    assert {path.name for path in tmp_path.iterdir()} == {*TABLES, "study.json"}


def test_an_unfinished_study_says_how_far_it_is(tmp_path):
    begun(tmp_path, parts=3)
    with pytest.raises(ValueError, match=r"holds 7 of 12 runs: the study is not finished\. The"):
        ResultsDir(tmp_path).read()


@pytest.mark.parametrize("stop", range(8))
def test_finishing_goes_on_wherever_it_was_stopped(stop, finished, tmp_path, monkeypatch):
    """Before each file that `finish` writes, and amid the removal of what it was made of."""
    path = tmp_path / "stopped"
    directory = begun(path)
    steps = 0

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
        patch.setattr("pathlib.Path.unlink", counted(pathlib.Path.unlink))
        with pytest.raises(KeyboardInterrupt):
            directory.finish(seconds=1.0)
    again = ResultsDir(path, CONFIG)
    assert again.finished == (stop >= 6)
    if not again.finished:
        again.begin(facts())
        again.finish(seconds=1.0)
    again.read()
    assert contents(path) == contents(finished)
    assert {file.name for file in path.iterdir()} == {*TABLES, "study.json"}


def test_another_configurations_results_are_refused(finished, tmp_path):
    begun(tmp_path / "begun", parts=1)
    for path in (finished, tmp_path / "begun"):
        before = {file: file.read_bytes() for file in path.rglob("*.*") if file.is_file()}
        with pytest.raises(
            ValueError, match=r"another configuration's results \(seeds: 2 there, 3"
        ):
            ResultsDir(path, dataclasses.replace(CONFIG, seeds=3))
        assert before == {file: file.read_bytes() for file in before}


def test_a_study_that_failed_before_its_first_run_blocks_nothing(tmp_path):
    begun(tmp_path, parts=0)
    other = ResultsDir(tmp_path, dataclasses.replace(CONFIG, seeds=3))
    other.begin(facts(other.config))
    assert ResultsDir(tmp_path).config.seeds == 3


def test_a_setting_that_this_version_does_not_know_is_another_configuration(finished):
    change_json(finished / "study.json", lambda known: known["config"].update(dropout=0.5))
    with pytest.raises(ValueError, match=r"\(dropout: 0\.5 there, None now\)"):
        ResultsDir(finished, CONFIG)
    with pytest.raises(ValueError, match="a configuration that this version does not know"):
        ResultsDir(finished)


@pytest.mark.parametrize("name", ["study.json", "progress.json"])
def test_a_study_that_says_nothing_of_weight_decay_had_none(name, finished, tmp_path):
    path = finished if name == "study.json" else begun(tmp_path / "begun", parts=1).path
    change_json(path / name, lambda known: known["config"].pop("weight_decay"))
    assert ResultsDir(path).config == ResultsDir(path, CONFIG).config == CONFIG
    if name == "progress.json":
        assert not begun(path).finished  # it goes on


def change_json(path, change):
    known = json.loads(path.read_text())
    change(known)
    path.write_text(json.dumps(known))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda known: known["versions"].update(jax="0.1"), r"versions\.jax: 0\.1 there"),
        (lambda known: known.update(data_source="elsewhere"), "data_source: elsewhere there, toy"),
        (lambda known: known["device"].update(processor="other"), "device.processor: other"),
        (lambda known: known["device"].update(platform="gpu"), "device.platform: gpu"),
        (lambda known: known["device"].update(count=1), "device.count: 1 there"),
        (lambda known: known.pop("rules"), "rules: not set there"),
        (
            lambda known: known["settings"].update(jax_default_prng_impl="rbg"),
            "settings.jax_default_prng_impl: rbg there, threefry2x32 now",
        ),
        (
            lambda known: known["settings"].update(jax_default_matmul_precision="bfloat16"),
            "settings.jax_default_matmul_precision: bfloat16 there, not set now",
        ),
        (
            lambda known: known["settings"].update(XLA_FLAGS="--xla_cpu_enable_fast_math=true"),
            "settings.XLA_FLAGS: --xla_cpu_enable_fast_math=true there, ",
        ),
    ],
)
def test_runs_done_under_other_circumstances_are_not_mixed_with_ours(change, message, tmp_path):
    begun(tmp_path, parts=1)
    change_json(tmp_path / "progress.json", change)
    with pytest.raises(ValueError, match=rf"done under other circumstances \(.*{message}"):
        begun(tmp_path)


@pytest.mark.parametrize("count", [2, 64])
def test_cpu_runs_go_on_with_any_number_of_devices_but_one_and_of_processes(count, tmp_path):
    begun(tmp_path, parts=1)
    change_json(
        tmp_path / "progress.json", lambda known: known["device"].update(count=count, processes=8)
    )
    assert not begun(tmp_path).finished


@pytest.mark.parametrize("name", ["study.json", "progress.json"])
@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"config": ',
        "[]",
        "{}",
        '{"config": {}}',
        '{"config": 3, "versions": {"soap_jax": "1"}}',
        '{"config": {}, "versions": []}',
        "\0" * 99,
    ],
)
def test_a_damaged_description_is_named(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name} is not the description of a study \(.*--out"):
        ResultsDir(tmp_path, CONFIG)


@pytest.mark.parametrize("name", ["study.json", "progress.json"])
@pytest.mark.parametrize("found", [None, 1, 3, "2"])
def test_results_of_another_format_name_the_version_that_made_them(name, found, tmp_path):
    known = {"config": {"period": 1}, "versions": {"soap_jax": "0.0.9"}}
    (tmp_path / name).write_text(json.dumps(known | ({"format": found} if found else {})))
    for config in (CONFIG, None):
        with pytest.raises(ValueError, match=r"of format \w+, made by soap_jax 0\.0\.9; .* reads"):
            ResultsDir(tmp_path, config)


def test_a_directory_without_a_study_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere holds no study"):
        ResultsDir(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def part_of(path):
    return sorted((path / "parts").iterdir())[0]


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
        (lambda file: file.write_bytes(b""), "is damaged"),
        (lambda file: file.write_bytes(b"no archive"), "is damaged"),
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), "is damaged"),
        (lambda file: file.write_bytes(NO_ARCHIVE), "is damaged"),
        (save(points=None), r"is damaged \(KeyError"),
        (save(train_loss=None), "is damaged .*train_loss"),
        (save(more=np.ones(2)), "is damaged .*"),
        (save(test_loss=np.ones(9)), "is damaged .*not of one length"),
        (save(points=np.ones((2, 2))), "is damaged"),
        (save(points=np.array([[5, 0.1, 0], [1, 0.1, 0], [0, 1.0, 0]])), r"Point\(seed=5.* no run"),
        (save(points=np.array([[0, 0.1, 0], [0, 0.1, 0], [0, 1.0, 0]])), "Point.* another part"),
    ],
)
def test_a_damaged_part_is_named_and_deleting_it_mends_the_study(damage, message, tmp_path):
    begun(tmp_path)
    file = part_of(tmp_path)
    damage(file)
    directory = ResultsDir(tmp_path, CONFIG)
    for use in (lambda: directory.done("bp"), lambda: directory.finish(seconds=1.0)):
        with pytest.raises(ValueError, match=rf"{file.name} .*{message}.*Delete it") as got:
            use()
        assert str(file) in str(got.value)
    file.unlink()
    assert len(directory.done("bp")) == 1


def test_no_flipped_byte_of_a_part_goes_unnoticed(tmp_path):
    begun(tmp_path, parts=1)
    file = part_of(tmp_path)
    good, rng = file.read_bytes(), np.random.default_rng(0)

    def loaded():
        [(points, record)] = ResultsDir(tmp_path)._parts("sign")
        leaves = [record.train_loss, record.test_loss, record.test_accuracy]
        leaves += [record.evaluations[name] for name in sorted(record.evaluations)]
        return points, sorted(record.evaluations), [leaf.tobytes() for leaf in leaves]

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


def test_a_part_of_no_method_of_the_study_is_named(tmp_path):
    directory = begun(tmp_path, parts=1)
    part_of(tmp_path).rename(tmp_path / "parts" / "fa-0-0.1-0.npz")
    (tmp_path / "parts" / ".nfs0001").write_text("the file system's own")
    with pytest.raises(ValueError, match=r"fa-0-0\.1-0\.npz is of no method of this study"):
        directory.begin(facts())


def test_parts_without_a_word_on_how_they_were_done_are_refused(tmp_path):
    begun(tmp_path, parts=1)
    (tmp_path / "progress.json").unlink()
    with pytest.raises(ValueError, match=r"holds runs, but not progress\.json"):
        begun(tmp_path)


def test_a_run_that_is_missing_is_not_made_up(tmp_path):
    directory = begun(tmp_path, parts=4)
    with pytest.raises(ValueError, match=r"runs are not .*: 4 missing, such as \('bp', 0, 0\.1, 0"):
        directory.finish(seconds=1.0)
    assert not directory.finished and len(directory.done("sign")) == 8


@pytest.mark.parametrize("name", ["runs", "evaluations", "losses"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.query("seed == 0 or method == 'sign'"), "2 missing, such as"),
        (lambda table: pd.concat([table, table[-2:]]), r"not there \d times, such as \('bp'"),
        (lambda table: table.assign(period=table["period"] + 1), "of another configuration"),
        (lambda table: table.drop(columns=["seed", "train_loss"]), "columns seed, train_loss"),
        (lambda table: table[:0], "12 missing"),
    ],
)
def test_tables_of_other_runs_than_the_configurations_are_refused(name, change, message, finished):
    file = finished / f"{name}.parquet"
    change(pd.read_parquet(file)).to_parquet(file, index=False)
    with pytest.raises(ValueError, match=rf"{name}.*{message}.*into another directory"):
        ResultsDir(finished).read()


def test_a_table_of_another_study_is_refused(finished, tmp_path):
    other = tmp_path / "other"
    directory = ResultsDir(other, dataclasses.replace(CONFIG, methods=("bp",)))
    directory.begin(facts(directory.config))
    for method, points in list(chunks())[4:]:
        directory.add(method, points, record(points))
    directory.finish(seconds=1.0)
    (other / "runs.parquet").rename(finished / "runs.parquet")
    with pytest.raises(ValueError, match="8 missing, such as"):
        ResultsDir(finished).read()


@pytest.mark.parametrize("damage", ["absent", "empty", "cut", "flipped"])
def test_a_damaged_table_is_named(damage, finished):
    file = finished / "evaluations.parquet"
    good = file.read_bytes()
    file.write_bytes(
        {
            "absent": b"",
            "empty": b"",
            "cut": good[: len(good) // 2],
            "flipped": good[:200] + bytes(byte ^ 1 for byte in good[200:400]) + good[400:],
        }[damage]
    )
    if damage == "absent":
        file.unlink()
    with pytest.raises(
        ValueError, match=r"(?s)evaluations\.parquet cannot be read .*another directory"
    ):
        ResultsDir(finished).read()


def test_results_that_may_only_be_read_are_read(finished, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    assert len(ResultsDir(finished).read()["runs"]) == 12
