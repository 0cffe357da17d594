"""Named data sets: every source gives the same arrays, every bad file says what is wrong with it.

Traffic is loopback only. Tests with real files find them in `../shared/data` beside the repository,
or where SOAP_JAX_TEST_DATA points, and skip where there are none.
"""

import functools
import gzip
import hashlib
import http.server
import io
import lzma
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from soap_jax import _archives, data

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
REAL = pathlib.Path(os.environ.get("SOAP_JAX_TEST_DATA") or REPOSITORY.parent / "shared" / "data")
IDX = _archives.IDX_NAMES
NOWHERE = "http://127.0.0.1:9/"  # the discard port: nobody listens


def needs(*parts):
    path = REAL.joinpath(*parts)
    return pytest.mark.skipif(not path.exists(), reason=f"real data files not found: {path}")


@pytest.fixture(autouse=True)
def isolated(monkeypatch, tmp_path):
    """TFDS's directory is empty, no variable is set, and every published URL leads nowhere."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv(data.DATA_DIR_VARIABLE, raising=False)
    for name, archive in _archives.ARCHIVES.items():
        monkeypatch.setitem(_archives.ARCHIVES, name, archive._replace(url=NOWHERE))


def idx_bytes(array, type_code=8):
    header = bytes([0, 0, type_code, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.tobytes()


def gz(content):
    return gzip.compress(content, mtime=0)  # the same bytes at any time


def idx_gz(array):
    return gz(idx_bytes(array))


def small_arrays(seed=0, num=(7, 3)):
    rng = np.random.RandomState(seed)
    return [
        part
        for n in num
        for part in (rng.randint(0, 256, (n, 28, 28), np.uint8), rng.randint(0, 10, n, np.uint8))
    ]


def cifar_tar(records):
    """A tar.gz in the layout of cifar-10-binary.tar.gz, from `{member: records (n, 3073)}`."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for member, content in ({"readme.html": b"hello"} | records).items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{member}")
            info.size = len(bytes(content))
            tar.addfile(info, io.BytesIO(bytes(content)))
    return stream.getvalue()


def small_cifar(seed=0, n=4):
    rng = np.random.RandomState(seed)
    records = rng.randint(0, 256, (6, n, 3073), np.uint8)
    records[:, :, 0] %= 10
    names = ["test_batch.bin", *(f"data_batch_{i}.bin" for i in (3, 1, 2, 5, 4))]
    return dict(zip(names, records, strict=True))


@pytest.fixture
def publish(monkeypatch, tmp_path):
    """Makes given bytes the published files of a data set; returns the folder they lie in."""

    def publish(name, *contents):
        folder = tmp_path / "published" / name
        folder.mkdir(parents=True)
        archive = _archives.ARCHIVES[name]
        files = []
        for file, content in zip(archive.files, contents, strict=True):
            (folder / file.name).write_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
            files.append(file._replace(size=len(content), sha256=digest))
        monkeypatch.setitem(_archives.ARCHIVES, name, archive._replace(files=tuple(files)))
        return folder

    return publish


CUT = "the connection is lost half-way"


class Handler(http.server.SimpleHTTPRequestHandler):
    status = None

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.requests.append(self.path)
        if self.status == CUT:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"the first bytes")
        elif self.status is not None:
            self.send_error(self.status)
        else:
            super().do_GET()


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        pass  # a client that asks whether a file is there hangs up before all of it is sent


@pytest.fixture
def serve(monkeypatch):
    """Serves a folder on the loopback as a data set's URL; returns the server."""
    servers = []

    def serve(name, folder, status=None):
        handler = type("StatusHandler", (Handler,), {"status": status})
        server = Server(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
        server.requests = []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((server, thread))
        url = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setitem(_archives.ARCHIVES, name, _archives.ARCHIVES[name]._replace(url=url))
        return server

    yield serve
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


def assert_same_arrays(one, other):
    for a, b in zip((*one.train, *one.test), (*other.train, *other.test), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# --- names, digits, imports


def test_names_are_the_five_known_ones():
    assert data.NAMES == ("digits", "mnist", "fashion_mnist", "kmnist", "cifar10")


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'MNIST'; expected one of digits, mnist, .*cifar10"):
        data.load("MNIST")


def test_import_loads_neither_scikit_learn_nor_tfds():
    code = (
        "import sys, soap_jax.data\n"
        "print([m for m in ('sklearn', 'tensorflow_datasets', 'tensorflow') if m in sys.modules])"
    )
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stderr


@pytest.mark.parametrize("name, module", [("digits", "sklearn"), ("mnist", "tensorflow_datasets")])
def test_missing_module_leads_to_the_extra_that_has_it(name, module):
    code = f"import sys, soap_jax.data as d; sys.modules[{module!r}] = None; d.load({name!r})"
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert f"{name} needs the module {module}: pip install 'soap_jax[study]'" in out.stderr


def test_digits_are_all_there_once():
    dataset = data.load("digits")
    assert dataset.source.startswith("scikit-learn ")
    assert (dataset.num_classes, dataset.max_value) == (10, 16)
    images = np.concatenate([dataset.train.images, dataset.test.images])
    assert images.shape == (1797, 8, 8, 1) and images.dtype == np.uint8 and images.max() == 16
    assert dataset.train.labels.dtype == np.int32
    from sklearn import datasets

    expected = datasets.load_digits().data
    found = images.reshape(1797, 64)
    np.testing.assert_array_equal(found[np.lexsort(found.T)], expected[np.lexsort(expected.T)])


def test_digits_keep_a_fifth_of_each_class_for_testing():
    dataset = data.load("digits")
    test, train = np.bincount(dataset.test.labels), np.bincount(dataset.train.labels)
    np.testing.assert_array_equal(test, np.round(0.2 * (test + train)))


def test_digits_are_divided_the_same_way_for_ever():
    digest = hashlib.sha256(data.load("digits").test.images.tobytes()).hexdigest()
    assert digest[:16] == "e7c6867c42a1c081"


# --- the published files in a directory


def test_idx_directory_gives_what_was_written(publish):
    arrays = small_arrays()
    folder = publish("kmnist", *map(idx_gz, arrays))
    dataset = data.load("kmnist", data_dir=folder)
    for split, images, labels in zip(
        (dataset.train, dataset.test), arrays[::2], arrays[1::2], strict=True
    ):
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
        np.testing.assert_array_equal(split.images, images[..., np.newaxis])
        np.testing.assert_array_equal(split.labels, labels)
    assert (dataset.name, dataset.num_classes, dataset.max_value) == ("kmnist", 10, 255)
    assert dataset.source == f"idx directory sha256:{_archives.ARCHIVES['kmnist'].sha256}"


def test_directory_may_hold_one_folder_per_data_set(publish, monkeypatch):
    expected = data.load("mnist", data_dir=publish("mnist", *map(idx_gz, small_arrays())))
    root = publish("kmnist", *map(idx_gz, small_arrays(seed=1))).parent
    assert_same_arrays(data.load("mnist", data_dir=str(root)), expected)
    monkeypatch.setenv(data.DATA_DIR_VARIABLE, str(root))
    assert_same_arrays(data.load("mnist"), expected)


def test_data_dir_goes_before_the_environment_variable(publish, monkeypatch):
    folder = publish("mnist", *map(idx_gz, small_arrays()))
    monkeypatch.setenv(data.DATA_DIR_VARIABLE, str(folder))
    with pytest.raises(FileNotFoundError, match=r"data_dir is '.*'; expected a directory"):
        data.load("mnist", data_dir=folder / "absent")


def test_data_dir_without_the_files_names_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"lacks the files of mnist: {', '.join(IDX)}"):
        data.load("mnist", data_dir=tmp_path)


def test_directory_with_some_files_names_the_missing_ones(publish, monkeypatch):
    folder = publish("mnist", *map(idx_gz, small_arrays()))
    (folder / IDX[1]).unlink()
    (folder / IDX[2]).unlink()
    monkeypatch.setenv(data.DATA_DIR_VARIABLE, str(folder))
    with pytest.raises(FileNotFoundError, match=f"lacks {IDX[1]}, {IDX[2]}; expected all"):
        data.load("mnist")


def test_environment_variable_that_names_no_directory_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv(data.DATA_DIR_VARIABLE, str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match=r"SOAP_JAX_DATA_DIR is '.*absent'"):
        data.load("mnist")


@needs("mnist")
def test_real_mnist_from_its_directory():
    dataset = data.load("mnist", data_dir=REAL / "mnist")
    assert dataset.train.images.shape == (60000, 28, 28, 1)
    assert dataset.test.images.shape == (10000, 28, 28, 1)
    assert dataset.train.images.mean() == pytest.approx(33.318421, abs=1e-6)
    assert dataset.test.images.mean() == pytest.approx(33.791224, abs=1e-6)
    assert dataset.train.labels[:8].tolist() == [5, 0, 4, 1, 9, 2, 1, 3]


# --- bad files


def corrupted(which, content):
    contents = [*map(idx_gz, small_arrays())]
    contents[which] = content
    return contents


IMAGES, LABELS = small_arrays()[:2]


@pytest.mark.parametrize(
    "which, content, message",
    [
        (0, idx_bytes(IMAGES), "train-images.* is not a gzip file.*0000; expected 1f8b"),
        (1, b"", "train-labels.* is not a gzip file.*none; expected 1f8b"),
        (0, idx_gz(IMAGES)[:-300], "train-images.* is truncated: its compressed data ends"),
        (0, gz(idx_bytes(IMAGES)[:-1]), "has 5487 bytes of data; expected 5488"),
        (0, gz(idx_bytes(IMAGES) + b"x"), "has 5489 bytes of data; expected 5488"),
        (0, gz(idx_bytes(IMAGES)[:9]), "ends after 9 bytes, inside its 16-byte header"),
        (0, gz(b""), "starts with the bytes ; expected 00000803"),
        (0, idx_gz(LABELS), "starts with the bytes 00000801; expected 00000803.*swapped"),
        (1, idx_gz(IMAGES), "starts with the bytes 00000803; expected 00000801.*swapped"),
        (0, gz(idx_bytes(IMAGES, type_code=13)), "bytes 00000d03; expected 00000803"),
        (0, idx_gz(IMAGES)[:40] + b"damage" + idx_gz(IMAGES)[46:], "train-images.* is damaged"),
        (1, idx_gz(LABELS[:-1]), "7 images but train-labels.* 6 labels"),
        (3, idx_gz(LABELS), "t10k-images.* 3 images but t10k-labels.* 7 labels"),
        (1, idx_gz(LABELS + 10), "a label 1[0-9]; expected 0 to 9"),
        (0, idx_gz(IMAGES[:, 1:]), r"shape \(27, 28, 1\); expected \(28, 28, 1\)"),
    ],
    ids=lambda value: f"{len(value)} bytes" if isinstance(value, bytes) else None,
)
def test_bad_idx_file_says_what_is_wrong(publish, which, content, message):
    folder = publish("mnist", *corrupted(which, content))
    with pytest.raises(ValueError, match=message):
        data.load("mnist", data_dir=folder)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=60, deadline=None)
def test_every_truncation_of_an_idx_file_is_noticed(tmp_path_factory, draw):
    content = idx_gz(LABELS)
    path = tmp_path_factory.mktemp("cut") / "cut.gz"
    path.write_bytes(content[: draw.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ValueError, match=r"truncated|not a gzip file"):
        _archives.read_idx(path, ndim=1)


def test_wrong_checksum_names_the_file_and_both_sums(publish):
    folder = publish("mnist", *map(idx_gz, small_arrays()))
    other = idx_gz(255 - small_arrays()[2])
    (folder / IDX[2]).write_bytes(other)
    found, expected = hashlib.sha256(other).hexdigest(), _archives.ARCHIVES["mnist"].files[2].sha256
    with pytest.raises(ValueError, match=f"{IDX[2]} .*SHA-256 {found}.*expected {expected}.*again"):
        data.load("mnist", data_dir=folder)


def test_file_of_another_data_set_is_recognised(publish):
    publish("mnist", *map(idx_gz, small_arrays()))
    folder = publish("kmnist", *map(idx_gz, small_arrays(seed=1)))
    with pytest.raises(ValueError, match=r"wrong checksum.*It is the file of this name of kmnist"):
        data.load("mnist", data_dir=folder)


# --- unpacked files, and torchvision's folders


@pytest.fixture
def unpack(publish, monkeypatch):
    """Publishes small arrays as a data set and unpacks them, with or without known checksums."""

    def unpack(name, folder, *, known=True, seed=0):
        contents = [*map(idx_bytes, small_arrays(seed))]
        packed = publish(name, *map(gz, contents))
        archive = _archives.ARCHIVES[name]
        sums = [hashlib.md5(content).hexdigest() if known else "" for content in contents]
        files = [
            file._replace(unpacked_md5=md5) for file, md5 in zip(archive.files, sums, strict=True)
        ]
        monkeypatch.setitem(_archives.ARCHIVES, name, archive._replace(files=tuple(files)))
        folder.mkdir(parents=True)
        for file, content in zip(files, contents, strict=True):
            (folder / file.name.removesuffix(".gz")).write_bytes(content)
        return packed

    return unpack


@pytest.mark.parametrize(
    "name, inside",
    [
        ("mnist", "."),
        ("mnist", "mnist"),
        ("mnist", "MNIST/raw"),
        ("mnist", "raw"),
        ("fashion_mnist", "FashionMNIST/raw"),
        ("kmnist", "KMNIST/raw"),
    ],
)
def test_unpacked_files_are_the_packed_ones_wherever_they_lie(name, inside, unpack, tmp_path):
    packed = unpack(name, tmp_path / "root" / inside)
    dataset = data.load(name, data_dir=tmp_path / "root")
    expected = data.load(name, data_dir=packed)
    assert_same_arrays(dataset, expected)
    assert dataset.source == expected.source  # so a study may go on with the other
    (tmp_path / "root" / inside / IDX[1]).write_bytes((packed / IDX[1]).read_bytes())
    (tmp_path / "root" / inside / IDX[1].removesuffix(".gz")).write_bytes(b"")
    assert_same_arrays(data.load(name, data_dir=tmp_path / "root"), expected)  # packed go first


def test_unpacked_files_without_a_published_checksum_are_said_not_to_be_checked(unpack, tmp_path):
    unpack("kmnist", tmp_path / "one", known=False)
    source = data.load("kmnist", data_dir=tmp_path / "one").source
    assert source.startswith("idx directory unpacked and not checked sha256:")
    labels = tmp_path / "one" / IDX[1].removesuffix(".gz")
    content = bytearray(labels.read_bytes())
    content[-1] = (content[-1] + 1) % 10
    labels.write_bytes(content)
    assert data.load("kmnist", data_dir=tmp_path / "one").source != source


@pytest.mark.parametrize("asked", ["mnist", "kmnist"])
def test_unpacked_files_of_another_data_set_are_recognised(asked, unpack, tmp_path):
    unpack(asked, tmp_path / "own", known=asked == "mnist", seed=1)
    unpack("fashion_mnist", tmp_path / "other")
    with pytest.raises(ValueError, match=r"wrong checksum: MD5 .* of this name of fashion_mnist"):
        data.load(asked, data_dir=tmp_path / "other")


def test_an_unpacked_file_under_the_packed_name_says_how_to_call_it(publish):
    folder = publish("mnist", *corrupted(0, idx_bytes(IMAGES)))
    with pytest.raises(ValueError, match=r"not a gzip file.*unpacked, remove \.gz from its name"):
        data.load("mnist", data_dir=folder)


@needs("mnist")
def test_real_mnist_unpacked_in_torchvisions_folder(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name in IDX:
        content = gzip.decompress((REAL / "mnist" / name).read_bytes())
        (folder / name.removesuffix(".gz")).write_bytes(content)
    dataset = data.load("mnist", data_dir=tmp_path)
    expected = data.load("mnist", data_dir=REAL / "mnist")
    assert_same_arrays(dataset, expected)
    assert dataset.source == expected.source


# --- files that hold more than they should


def bomb(size):
    """A gzip file of zeros, a thousandth of its size."""
    return gzip.compress(bytes(2**20), 1) * (size // 2**20)


def peak_memory(call):
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("which", range(4))
def test_a_file_that_unpacks_to_more_than_the_published_one_is_refused_at_once(which, publish):
    folder = publish("mnist", *corrupted(which, bomb(2**30)))

    def load():
        with pytest.raises(ValueError, match=f"{IDX[which]} has more than [0-9]+ bytes"):
            data.load("mnist", data_dir=folder)

    assert peak_memory(load) < 150e6  # three times the largest file


def test_a_file_longer_than_the_published_one_is_refused_unread(publish, tmp_path, unpack):
    folder = publish("mnist", *map(idx_gz, small_arrays()))
    os.truncate(folder / IDX[1], 2**40)  # zeros after the end: gzip would skip them all
    with pytest.raises(ValueError, match=r"train-labels.* has more than 60008 bytes"):
        data.load("mnist", data_dir=folder)
    unpack("kmnist", tmp_path / "unpacked")
    os.truncate(tmp_path / "unpacked" / IDX[2].removesuffix(".gz"), 2**40)
    with pytest.raises(ValueError, match=r"t10k-images.* has more than 7840016 bytes"):
        data.load("kmnist", data_dir=tmp_path / "unpacked")


@pytest.mark.parametrize("member", ["readme.html", "data_batch_1.bin"])
def test_a_tar_file_that_unpacks_to_more_than_the_published_one_is_refused(
    member, publish, monkeypatch
):
    folder = publish("cifar10", cifar_tar(small_cifar() | {member: bytes(3073 * 1000)}))
    archive = _archives.ARCHIVES["cifar10"]
    data.load("cifar10", data_dir=folder)
    files = (archive.files[0]._replace(unpacked_size=10**6),)
    monkeypatch.setitem(_archives.ARCHIVES, "cifar10", archive._replace(files=files))
    with pytest.raises(ValueError, match="is longer, unpacked, than the published file"):
        data.load("cifar10", data_dir=folder)


# --- through TFDS


def test_tfds_gives_what_the_directory_gives(publish, serve, capfd):
    folder = publish("fashion_mnist", *map(idx_gz, small_arrays(num=(300, 50))))
    serve("fashion_mnist", folder)
    capfd.readouterr()
    dataset = data.load("fashion_mnist")
    assert capfd.readouterr() == ("", "")
    assert_same_arrays(dataset, data.load("fashion_mnist", data_dir=folder))
    assert dataset.source.startswith("tfds 4.")
    assert " soap_jax/fashion_mnist/1.0.0 sha256:" in dataset.source
    assert "tensorflow" not in sys.modules


def test_prepared_data_needs_no_network(publish, serve):
    server = serve("mnist", publish("mnist", *map(idx_gz, small_arrays())))
    first = data.load("mnist")
    num_requests = len(server.requests)
    assert_same_arrays(data.load("mnist"), first)
    assert len(server.requests) == num_requests


def test_downloaded_files_need_no_network(publish, serve, tmp_path):
    server = serve("mnist", publish("mnist", *map(idx_gz, small_arrays())))
    first = data.load("mnist")
    num_requests = len(server.requests)
    shutil.rmtree(tmp_path / "tfds" / "soap_jax")
    assert_same_arrays(data.load("mnist"), first)
    assert len(server.requests) == num_requests


def test_environment_variable_without_the_files_leads_to_tfds(publish, serve, monkeypatch):
    folder = publish("mnist", *map(idx_gz, small_arrays()))
    serve("mnist", folder)
    monkeypatch.setenv(data.DATA_DIR_VARIABLE, str(folder.parents[1]))
    assert data.load("mnist").source.startswith("tfds ")


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_without_network_or_files_the_error_is_immediate(name):
    files = ", ".join(file.name for file in _archives.ARCHIVES[name].files)
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=rf"{NOWHERE}.*\({files}\).*SOAP_JAX_DATA_DIR"):
        data.load(name)
    assert time.monotonic() - start < 10  # TFDS alone: 205 s


@pytest.mark.parametrize("status", [403, 404, 503])
def test_refusing_server_is_an_immediate_error(publish, serve, status):
    server = serve("mnist", publish("mnist", *map(idx_gz, small_arrays())), status=status)
    with pytest.raises(ConnectionError, match=rf"Cause: {status} .*{IDX[0]}\)"):
        data.load("mnist")
    assert len(server.requests) == 1


def test_connection_lost_half_way_is_an_immediate_error(publish, serve, tmp_path):
    serve("mnist", publish("mnist", *map(idx_gz, small_arrays())), status=CUT)
    with pytest.raises(ConnectionError, match=r"mnist is not prepared.*SOAP_JAX_DATA_DIR"):
        data.load("mnist")
    assert not (tmp_path / "tfds" / "soap_jax" / "mnist" / "1.0.0").exists()


def test_download_with_the_wrong_checksum_is_refused(publish, serve, tmp_path):
    folder = publish("mnist", *map(idx_gz, small_arrays()))
    (folder / IDX[1]).write_bytes(b"please log in to this network")
    serve("mnist", folder)
    with pytest.raises(ValueError, match=f"(?s)not the published one.*{IDX[1]}.*data_dir"):
        data.load("mnist")
    assert not (tmp_path / "tfds" / "soap_jax" / "mnist" / "1.0.0").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: next(folder.glob("*test.array_record*")).unlink(),
        lambda folder: os.truncate(next(folder.glob("*train.array_record*")), 4000),
        lambda folder: (folder / "dataset_info.json").unlink(),
    ],
    ids=["no shard", "truncated shard", "no info"],
)
def test_damaged_prepared_data_says_what_to_delete(publish, serve, tmp_path, damage):
    folder = publish("mnist", *map(idx_gz, small_arrays()))
    serve("mnist", folder)
    data.load("mnist")
    prepared = tmp_path / "tfds" / "soap_jax" / "mnist" / "1.0.0"
    damage(prepared)
    with pytest.raises(OSError, match=f"{prepared}.*cannot be read.*Delete that directory"):
        data.load("mnist")
    shutil.rmtree(prepared)
    assert_same_arrays(data.load("mnist"), data.load("mnist", data_dir=folder))


KILLED = """
import os, sys
from soap_jax import _archives, _tfds, data
_archives.ARCHIVES["mnist"] = eval(sys.argv[1], vars(_archives))
whole = _tfds.SoapJax._generate_examples
def part(self, images, labels):
    for key, example in whole(self, images, labels):
        yield key, example
        if key == 2 and len(images) == 3:  # inside the second split
            os.kill(os.getpid(), 9)
_tfds.SoapJax._generate_examples = part
data.load("mnist")
"""


def test_killed_preparation_leaves_nothing_that_is_taken_for_data(publish, serve, tmp_path):
    folder = publish("mnist", *map(idx_gz, small_arrays()))
    serve("mnist", folder)
    out = subprocess.run(
        [sys.executable, "-c", KILLED, repr(_archives.ARCHIVES["mnist"])],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert out.returncode == -9, out.stderr
    left = [path.name for path in (tmp_path / "tfds" / "soap_jax" / "mnist").iterdir()]
    assert len(left) == 1 and left[0].startswith("incomplete.")
    assert_same_arrays(data.load("mnist"), data.load("mnist", data_dir=folder))


def test_preparation_by_two_processes_at_once_is_harmless(publish, serve, monkeypatch):
    from soap_jax import _tfds

    folder = publish("mnist", *map(idx_gz, small_arrays()))
    serve("mnist", folder)
    whole = _tfds.SoapJax._split_generators

    def overtaken(self, dl_manager):
        monkeypatch.setattr(_tfds.SoapJax, "_split_generators", whole)
        data.load("mnist")  # the other process, faster
        return whole(self, dl_manager)

    monkeypatch.setattr(_tfds.SoapJax, "_split_generators", overtaken)
    assert_same_arrays(data.load("mnist"), data.load("mnist", data_dir=folder))


@needs("mnist")
def test_real_mnist_through_tfds_equals_its_directory(serve):
    serve("mnist", REAL / "mnist")
    dataset = data.load("mnist")
    assert dataset.source.startswith("tfds ")
    assert_same_arrays(dataset, data.load("mnist", data_dir=REAL / "mnist"))


# --- CIFAR-10


def test_cifar10_pixels_come_in_planes_and_batches_in_order(publish, serve):
    records = small_cifar()
    folder = publish("cifar10", cifar_tar(records))
    serve("cifar10", folder)
    dataset = data.load("cifar10")
    assert dataset.train.images.shape == (20, 32, 32, 3) and dataset.test.labels.shape == (4,)
    record = records["data_batch_2.bin"][3]  # the eighth training example
    assert dataset.train.labels[7] == record[0]
    for row, column, channel in [(0, 0, 0), (5, 31, 1), (31, 2, 2)]:
        pixel = record[1 + 1024 * channel + 32 * row + column]
        assert dataset.train.images[7, row, column, channel] == pixel
    assert_same_arrays(dataset, data.load("cifar10", data_dir=folder))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tar: tar[:-2000], "truncated, damaged or not a .tar.gz"),
        (lambda tar: b"hello", "truncated, damaged or not a .tar.gz"),
        (lambda tar: cifar_tar({"test_batch.bin": b"x" * 3073}), "lacks .*data_batch_1.bin, "),
        (
            lambda tar: cifar_tar(small_cifar() | {"data_batch_4.bin": b"x" * 3074}),
            "data_batch_4.bin in .* is 3074 bytes long; expected a multiple of 3073",
        ),
        (
            lambda tar: cifar_tar(small_cifar() | {"test_batch.bin": b"\x0b" * 3073}),
            "a label 11; expected 0 to 9",
        ),
    ],
)
def test_bad_cifar10_archive_says_what_is_wrong(publish, change, message):
    folder = publish("cifar10", change(cifar_tar(small_cifar())))
    with pytest.raises(ValueError, match=message):
        data.load("cifar10", data_dir=folder)


@needs("cifar10")
def test_real_cifar10_records_through_tfds(publish, serve):
    with lzma.open(REAL / "cifar10" / "test_batch_first1000.bin.xz") as stream:
        records = np.frombuffer(stream.read(), np.uint8).reshape(1000, 3073)
    parts = np.split(records, 5)  # stand in for the five training batches
    batches = {f"data_batch_{i}.bin": part for i, part in enumerate(parts, start=1)}
    serve("cifar10", publish("cifar10", cifar_tar(batches | {"test_batch.bin": records})))
    dataset = data.load("cifar10")
    assert_same_arrays(dataset, dataset._replace(train=dataset.test))
    assert dataset.test.labels[:5].tolist() == [3, 8, 8, 0, 6]  # cat, ship, ship, airplane, frog
    means = dataset.test.images.mean((0, 1, 2)) / 255
    # The published means of all images, red to blue; a thousand images give them to about 0.01.
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], atol=0.02)


# --- validation


def counted(n):
    return data.Split(np.arange(n, dtype=np.int32)[:, np.newaxis], np.arange(n, dtype=np.int32))


@hypothesis.given(st.integers(2, 60), st.integers(0, 2**32 - 1), st.data())
def test_validation_and_rest_are_a_partition_in_order(n, seed, draw):
    num = draw.draw(st.integers(1, n - 1))
    rest, validation = data.split_validation(counted(n), num, seed=seed)
    assert len(validation.labels) == num
    merged = np.concatenate([rest.labels, validation.labels])
    np.testing.assert_array_equal(np.sort(merged), np.arange(n))
    for part in (rest, validation):
        assert (np.diff(part.labels) > 0).all()
        np.testing.assert_array_equal(part.images[:, 0], part.labels)


def test_validation_is_the_same_for_ever_and_changes_with_the_seed():
    _, validation = data.split_validation(counted(20), 5)
    assert validation.labels.tolist() == [1, 8, 10, 18, 19]
    _, other = data.split_validation(counted(20), 5, seed=1)
    assert other.labels.tolist() != validation.labels.tolist()


@pytest.mark.parametrize("num", [-1, 0, 20, 21])
def test_validation_of_an_impossible_size_is_an_error(num):
    with pytest.raises(ValueError, match=f"num is {num}; expected 1 to 19"):
        data.split_validation(counted(20), num)
