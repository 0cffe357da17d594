"""Data of one's own, and what is wrong with them."""

import gzip

import numpy as np
import pytest

from soap_jax import _archives, data, models, tasks

rng = np.random.default_rng(0)
ARRAYS = {
    "x_train": rng.integers(0, 256, (20, 4, 3), dtype=np.uint8),
    "y_train": np.arange(20) % 4,
    "x_test": rng.integers(0, 256, (7, 4, 3), dtype=np.uint8),
    "y_test": np.arange(7) % 4,
}


def save(path, **changes):
    arrays = {k: v for k, v in (ARRAYS | changes).items() if v is not None}
    np.savez(path, **arrays)
    return path


def test_a_file_of_ones_own_becomes_a_data_set(tmp_path):
    read = tasks.read(save(tmp_path / "mine.npz"))
    assert read.name == "mine" and read.num_classes == 4 and read.max_value == 255
    assert read.train.images.shape == (20, 4, 3, 1) and read.train.images.dtype == np.uint8
    assert read.train.labels.dtype == np.int32
    np.testing.assert_array_equal(read.test.images[..., 0], ARRAYS["x_test"])
    assert read.source.startswith("mine.npz sha256:")
    other = tasks.read(save(tmp_path / "mine.npz", y_test=np.arange(7) % 3))
    assert other.source != read.source


def test_floats_stay_floats_and_unit_inputs_end_at_one(tmp_path):
    x = rng.normal(size=(20, 5))
    read = tasks.read(save(tmp_path / "a.npz", x_train=x, x_test=x[:7]))
    assert read.train.images.dtype == np.float32 and read.train.images.shape == (20, 5)
    scaled = tasks.scaling(read, "unit")(read.train.images)
    assert float(abs(scaled).max()) == 1.0
    task = tasks.classification(models.MLP((3, 4), feedback=False), read)
    assert task.examples == {"train": 16, "validation": 4, "test": 7}
    train = tasks.scaling(read)(task.train.images)
    np.testing.assert_allclose([train.mean(), train.std()], [0, 1], atol=1e-6)


def test_labels_of_strange_integer_types_and_idx_files_of_any_size(tmp_path):
    names = [name.removesuffix(".gz") for name in _archives.IDX_NAMES]
    for name, array in zip(names, ARRAYS.values(), strict=True):
        array = array.astype(np.uint8)
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        (tmp_path / name).write_bytes(header + array.tobytes())
    unpacked = tasks.read(tmp_path)
    (tmp_path / f"{names[0]}.gz").write_bytes(gzip.compress((tmp_path / names[0]).read_bytes()))
    (tmp_path / names[0]).unlink()
    packed = tasks.read(tmp_path)
    np.testing.assert_array_equal(packed.train.images[..., 0], ARRAYS["x_train"])
    assert packed.source == unpacked.source
    (tmp_path / names[3]).unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks t10k-labels-idx1-ubyte\.gz; expected"):
        tasks.read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "it lacks y_test"),
        ({"y_train": np.arange(19)}, r"y_train have the shapes \(20, 4, 3\) and \(19,\)"),
        ({"x_test": np.zeros((7, 4, 2))}, r"shape \(20, 4, 3, 1\) and x_test \(7, 4, 2, 1\)"),
        ({"y_train": np.arange(20.0)}, "labels are float64, 0.0 to 19.0; expected integers"),
        ({"y_test": np.arange(7) - 1}, "labels are int64, -1 to 5; expected integers from 0"),
        ({"y_train": np.arange(20) % 3 + 1}, "1 to 3 in y_train and 0 to 3 in y_test; expected"),
        ({"y_train": np.arange(20) % 2}, "0 to 1 in y_train and 0 to 3 in y_test; expected"),
        ({"x_test": np.ones((7, 4, 3))}, "x_train is kept as uint8 and x_test as float32"),
        (
            {"y_test": np.arange(7) + 10**9},
            "labels are int64, 10.* to 10.*; expected integers from 0 to 65535",
        ),
        (
            {"x_test": np.full((7, 4, 3), np.nan)},
            "x_test and y_test: inputs are of float64, or not",
        ),
        ({"x_test": np.full((7, 4, 3), 1e300)}, "or not finite as float32"),
        ({"x_train": np.full((20, 4, 3), "a")}, "inputs are of <U1"),
        ({"x_train": np.full((20, 4, 3), None)}, "cannot be read"),
        ({"x_train": np.zeros(20)}, "expected .examples, ...."),
        ({"x_train": np.ones((20, 4, 3), bool)}, "to train on that differ"),
        ({"x_train": ARRAYS["x_train"][:4], "y_train": np.arange(4)}, "at least 5 to train on"),
    ],
)
def test_what_is_wrong_with_arrays_is_said(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tasks.read(save(tmp_path / "a.npz", **changes))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and then nothing", b"\x93NUMPY"])
def test_a_file_that_is_no_npz_is_named(content, tmp_path):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz cannot be read .*; expected a file by np\.savez"):
        tasks.read(tmp_path / "a.npz")
    np.save(tmp_path / "b.npy", np.zeros(3))
    with pytest.raises(ValueError, match="cannot be read"):
        tasks.read(tmp_path / "b.npy")
    with pytest.raises(FileNotFoundError):
        tasks.read(tmp_path / "c.npz")


def test_the_split_is_always_the_same():
    digits = data.load("digits")
    train, validation, test = tasks.split(digits)
    rest, held_out = data.split_validation(digits.train, 287)
    np.testing.assert_array_equal(train.labels, rest.labels)
    np.testing.assert_array_equal(validation.images, held_out.images)
    assert test is digits.test
