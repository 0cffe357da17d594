"""Data of one's own, and what is wrong with them."""

import gzip
import lzma

import jax
import numpy as np
import pytest

import soap_jax
from soap_jax import _archives, data, models, tasks
from soap_jax.tasks import sequences

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
        ({"y_test": None}, "y_test is missing"),
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
            "x_test and y_test: inputs have dtype float64, or are not",
        ),
        ({"x_test": np.full((7, 4, 3), 1e300)}, "or are not finite as float32"),
        ({"x_train": np.full((20, 4, 3), "a")}, "inputs have dtype <U1"),
        ({"x_train": np.full((20, 4, 3), None)}, "cannot be read"),
        ({"x_train": np.zeros(20)}, "expected .examples, ...."),
        ({"x_train": np.ones((20, 4, 3), bool)}, "at least 5 training examples, not all"),
        (
            {"x_train": ARRAYS["x_train"][:4], "y_train": np.arange(4)},
            "at least 5 training examples",
        ),
    ],
)
def test_what_is_wrong_with_arrays_is_said(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tasks.read(save(tmp_path / "a.npz", **changes))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and then nothing", b"\x93NUMPY"])
def test_a_file_that_is_no_npz_is_named(content, tmp_path):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"a\.npz cannot be read .*; expected a file from np\.savez"
    ):
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


def test_binary_batches_of_cifar10_are_read_and_a_fifth_held_out(tmp_path):
    records = rng.integers(0, 256, (30, 3073), dtype=np.uint8)
    records[:, 0] = np.arange(30) % 10
    (tmp_path / "data_batch_1.bin.xz").write_bytes(lzma.compress(records[:20].tobytes()))
    (tmp_path / "data_batch_2.bin").write_bytes(records[20:].tobytes())
    part = tasks.read(tmp_path)
    assert part.train.images.shape == (24, 32, 32, 3) and len(part.test.labels) == 6
    np.testing.assert_array_equal(part.train.labels, records[:24, 0])
    assert (
        part.train.images[3, 5, 7].tolist() == records[3, 1:].reshape(3, 32, 32)[:, 5, 7].tolist()
    )
    (tmp_path / "test_batch.bin").write_bytes(records[:10].tobytes())
    whole = tasks.read(tmp_path)
    assert len(whole.train.labels) == 30 and len(whole.test.labels) == 10
    (tmp_path / "data_batch_2.bin.gz").write_bytes(gzip.compress(records[20:].tobytes()))
    assert len(tasks.read(tmp_path).train.labels) == 30  # packed and unpacked counts once
    (tmp_path / "data_batch_2.bin.gz").unlink()
    (tmp_path / "data_batch_2.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match=r"data_batch_2.bin is not a binary batch of CIFAR"):
        tasks.read(tmp_path)


def test_a_teachers_classes_are_all_there_and_the_student_is_another():
    task = tasks.teacher(10)
    share = np.bincount(task.test[1], minlength=10) / 2048
    assert share.min() > 0.03
    for key in (jax.random.key(0), *jax.random.split(jax.random.key(0), 3)):  # as studies do
        params = task.init(key)
        assert params["Dense_3"]["kernel"].shape == (64, 10)
        assert abs(float(task.metrics["accuracy"](params, task.test)) - 0.1) < 0.1
    x, labels = task.train(jax.random.key(1))
    assert x.shape == (64, 32) and labels.shape == (64,)
    broken = jax.tree.map(lambda leaf: leaf * np.nan, params)
    assert np.isnan(task.metrics["accuracy"](broken, task.test))
    with pytest.raises(ValueError, match="classes is 1; expected at least 2"):
        tasks.teacher(1)


def test_what_the_delayed_cue_asks_is_in_the_sequence():
    for cues in ((0,), (0, 3)):
        task = tasks.delayed_cue(6, cues=cues, noise=0.0)
        xs, answers = task.train(jax.random.key(0))
        assert xs.shape == (32, 7, 2)
        np.testing.assert_array_equal((xs[:, list(cues), 0] > 0).sum(1) % 2, answers)
        assert (xs[:, -1, 1] == 1).all() and not xs[:, :-1, 1].any()
    with pytest.raises(ValueError, match=r"cues is \(6,\); expected different steps"):
        tasks.delayed_cue(6, cues=(6,))


def test_the_loss_of_the_sines_is_the_sum_of_its_steps():
    task = tasks.sines()
    params, (h, targets) = task.init(jax.random.key(0)), task.train
    total = 0.0
    for target in targets.swapaxes(0, 1):
        h = sequences.sine_cell(params, h, None)
        total += sequences.sine_loss(params, h, target)
    np.testing.assert_allclose(task.loss(params, task.train), total, rtol=1e-5)


def test_text_is_read_from_a_file_and_held_out(tmp_path):
    path = tmp_path / "text"
    path.write_text("".join(chr(32 + i % 90) for i in range(2000)) + "ü" * 20)
    model = tasks.Transformer(1, 8, 2, 16)
    task = tasks.char_lm(path, model=model, batch_size=4)
    batch = task.train(jax.random.key(0))
    assert batch.shape == (4, 17) and ((np.diff(batch.astype(int)) - 1) % 90 == 0).all()
    assert (task.validation[-1] == ord("?")).sum() == 17  # no ASCII character
    params = task.init(jax.random.key(0))
    assert 4 < float(task.loss(params, batch)) < 7
    changed = batch.at[:, 9:].set(0)  # no character is predicted by what follows it
    early, late = (model.apply({"params": params}, x[:, :-1].astype(int)) for x in (batch, changed))
    np.testing.assert_array_equal(early[:, :9], late[:, :9])
    loss_dfa = soap_jax.with_direct_feedback(task.loss, model.layers, "logits")
    assert set(soap_jax.init_projections(jax.random.key(0), loss_dfa, params, batch)) == set(
        model.layers
    )
    path.write_text("short")
    with pytest.raises(ValueError, match="the text has 5 characters; expected at least 170"):
        tasks.char_lm(path, model=model)


def test_networks_of_images_are_the_ones_they_are_said_to_be():
    params = tasks.mlp(3, 8).init(jax.random.key(0))
    assert [leaf["kernel"].shape for leaf in params.values()] == [(64, 8), (8, 8), (8, 8), (8, 10)]
    images = rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    part = data.Split(images, (np.arange(40) % 10).astype(np.int32))
    cifar = data.Dataset("cifar", part, part, 10, 255, "made up")
    params = tasks.moskovitz_conv(cifar).init(jax.random.key(0))
    assert params["Conv_1"]["kernel"].shape == (5, 5, 64, 64)
    assert params["Dense_0"]["kernel"].shape == (576, 384)
    halved = tasks.small_conv(cifar).train.images
    assert halved.shape[1:] == (16, 16, 3)
    with pytest.raises(
        ValueError, match=r"images have the shape \(8, 8, 1\); expected at least 24"
    ):
        tasks.moskovitz_conv(data.load("digits"))
