"""The published files of the image data sets: their addresses and checksums, and their readers.

Every file is checked by its size and SHA-256, so files from any mirror give the same data. IDX
files may be unpacked; then they are checked by their MD5. Of a longer file only the length of the
published file is read. The readers use only NumPy and the standard library.
"""

import gzip
import hashlib
import os
import pathlib
import tarfile
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Arrays = tuple[np.ndarray, np.ndarray]  # images `(n, height, width, channels)`, labels `(n,)`


class File(NamedTuple):
    """One published file.

    Attributes:
        name: its name, the same on every mirror.
        size: its length in bytes.
        sha256: its SHA-256, in hexadecimal.
        unpacked_size: an upper bound of its unpacked length in bytes.
        unpacked_md5: the published MD5 of its unpacked content; empty if unknown.
    """

    name: str
    size: int
    sha256: str
    unpacked_size: int
    unpacked_md5: str = ""


class Archive(NamedTuple):
    """The published files of one data set.

    Attributes:
        url: the address of their folder, ending in a slash.
        files: four IDX files (train images, train labels, test images, test labels), or one tar.gz.
        image_shape: `(height, width, channels)`.
    """

    url: str
    files: tuple[File, ...]
    image_shape: tuple[int, int, int]

    @property
    def kind(self) -> str:
        """The kind of files, "idx" or "tar.gz"."""
        return "idx" if self.files[0].name in IDX_NAMES else "tar.gz"

    @property
    def sha256(self) -> str:
        """A short checksum of the content of all files, in their order."""
        return hashlib.sha256("".join(f.sha256 for f in self.files).encode()).hexdigest()[:16]


NUM_CLASSES = 10

IDX_NAMES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


_IDX_SIZES = (16 + 60000 * 784, 8 + 60000, 16 + 10000 * 784, 8 + 10000)


def _idx_archive(
    url: str, *sizes_and_sums: tuple[int, str], md5: Sequence[str] = ("",) * 4
) -> Archive:
    files = tuple(
        File(name, *rest, unpacked_size, unpacked_md5)
        for name, rest, unpacked_size, unpacked_md5 in zip(
            IDX_NAMES, sizes_and_sums, _IDX_SIZES, md5, strict=True
        )
    )
    return Archive(url, files, (28, 28, 1))


# Sizes and SHA-256 are those in TensorFlow Datasets for the data sets of the same names.
ARCHIVES: dict[str, Archive] = {
    "mnist": _idx_archive(
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        (9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
        (28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
        (1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
        (4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
        md5=(
            "6bbc9ace898e44ae57da46a324031adb",
            "a25bea736e30d166cdddb491f175f624",
            "2646ac647ad5339dbf082846283269ea",
            "27ae3e4e09519cfbb04c329615203637",
        ),
    ),
    "fashion_mnist": _idx_archive(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        (26421880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
        (29515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
        (4422102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
        (5148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
        md5=(
            "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            "9018921c3c673c538a1fc5bad174d6f9",
            "8181f5470baa50b63fa0f6fddb340f0a",
            "15d484375f8d13e6eb1aabb0c3f46965",
        ),
    ),
    "kmnist": _idx_archive(
        "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
        (18165135, "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4"),
        (29497, "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17"),
        (3041136, "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5"),
        (5120, "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c"),
    ),
    "cifar10": Archive(
        "https://www.cs.toronto.edu/~kriz/",
        (
            File(
                "cifar-10-binary.tar.gz",
                170052171,
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
                60000 * 3073 + 2**20,  # the records, and the other content of the tar file
            ),
        ),
        (32, 32, 3),
    ),
}


def read(name: str, paths: Sequence[os.PathLike[str]]) -> dict[str, Arrays]:
    """Reads and checks the files of a data set.

    Args:
        name: a key of `ARCHIVES`.
        paths: the paths of its files, in the order of `Archive.files`; IDX files as published, or
            unpacked, with names without `.gz`.

    Returns:
        `{"train": (images, labels), "test": (images, labels)}`: images uint8
        `(n, height, width, channels)`, labels int32 `(n,)`, in the published order.

    Raises:
        ValueError: if a file is damaged, is another file, or images and labels do not fit.
    """
    local = [pathlib.Path(path) for path in paths]
    if name == "cifar10":
        arrays = _read_cifar10(local[0], ARCHIVES[name].files[0].unpacked_size)
    else:
        most = [file.unpacked_size for file in ARCHIVES[name].files]
        arrays = {
            "train": _read_idx_pair(local[:2], most[:2]),
            "test": _read_idx_pair(local[2:], most[2:]),
        }
    for images, labels in arrays.values():
        expected = ARCHIVES[name].image_shape
        if images.shape[1:] != expected:
            raise ValueError(
                f"{local[0]} has images of shape {images.shape[1:]}; expected {expected}, the "
                f"shape for {name}."
            )
        if labels.size and labels.max() >= NUM_CLASSES:
            raise ValueError(
                f"{local[0].parent} has a label {labels.max()}; expected 0 to {NUM_CLASSES - 1}."
            )
    for file, path in zip(ARCHIVES[name].files, local, strict=True):
        # Checked last, since the errors above describe a damaged file better.
        (_check_md5 if _is_unpacked(path) else _check_sha256)(name, file, path)
    return arrays


def content(name: str, paths: Sequence[os.PathLike[str]]) -> str:
    """A short checksum of files that `read` accepts, the same for packed and unpacked files.

    Args:
        name: a key of `ARCHIVES`.
        paths: as in `read`.

    Returns:
        `sha256:...`, with a note if there is no published checksum of an unpacked file.
    """
    archive, local = ARCHIVES[name], [pathlib.Path(path) for path in paths]
    if all(
        f.unpacked_md5 or not _is_unpacked(p) for f, p in zip(archive.files, local, strict=True)
    ):
        return f"sha256:{archive.sha256}"
    found = hashlib.sha256("".join(_digest(path, "sha256") for path in local).encode()).hexdigest()
    return f"unpacked and not checked sha256:{found[:16]}"


def read_idx(path: pathlib.Path, *, ndim: int, most: int = 2**31) -> np.ndarray:
    """Reads one IDX file of unsigned bytes, packed or unpacked.

    The format is two zero bytes, a type code (8: unsigned byte), the number of dimensions, each
    dimension as a big-endian 32-bit number, then the values in row-major order.

    Args:
        path: the file.
        ndim: the number of dimensions it must have.
        most: the largest unpacked length in bytes that is accepted.

    Returns:
        The values, uint8, with the shape in the file's header.

    Raises:
        ValueError: if the file is not gzip, not IDX, of another type or rank, or of the wrong
            length.
    """
    content = _read_at_most(path, most)
    magic, expected = content[:4], bytes([0, 0, 8, ndim])
    if magic != expected:
        raise ValueError(
            f"{path} starts with the bytes {magic.hex()}; expected {expected.hex()}, an IDX file "
            f"of unsigned bytes with {ndim} dimension(s). Are images and labels swapped?"
        )
    header = 4 + 4 * ndim
    if len(content) < header:
        raise ValueError(
            f"{path} is truncated: it ends after {len(content)} bytes, inside its {header}-byte "
            "header. Download it again."
        )
    shape = tuple(int(size) for size in np.frombuffer(content[4:header], ">u4"))
    num_bytes = int(np.prod(shape, dtype=np.int64))
    if len(content) - header != num_bytes:
        raise ValueError(
            f"{path} has {len(content) - header} bytes of data; expected {num_bytes}, since its "
            f"header states the shape {shape}. Download it again."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


def _is_unpacked(path: pathlib.Path) -> bool:
    return f"{path.name}.gz" in IDX_NAMES


def _read_at_most(path: pathlib.Path, most: int) -> bytes:
    """Returns the unpacked content of a file; raises ValueError if it is longer than `most`."""
    size = path.stat().st_size
    too_large = ValueError(
        f"{path} has more than {most} bytes, the unpacked length of the published file. "
        "Download it again."
    )
    if size > most:  # a packed file is shorter than its content
        raise too_large
    if _is_unpacked(path):
        return path.read_bytes()
    with path.open("rb") as stream:
        start = stream.read(2)
    if start != b"\x1f\x8b":
        raise ValueError(
            f"{path} is not a gzip file: it starts with the bytes {start.hex() or 'none'}; "
            "expected 1f8b. Use the original file; or, if it is unpacked, remove .gz from its name."
        )
    try:
        with gzip.open(path) as unpacked:
            content = unpacked.read(most + 1)
    except EOFError as error:
        raise ValueError(
            f"{path} is truncated: its compressed data ends too early, after {size} bytes. "
            "Download it again."
        ) from error
    except (OSError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}). Download it again.") from error
    if len(content) > most:
        raise too_large
    return content


def _read_idx_pair(paths: Sequence[pathlib.Path], most: Sequence[int]) -> Arrays:
    images_path, labels_path = paths
    images = read_idx(images_path, ndim=3, most=most[0])
    labels = read_idx(labels_path, ndim=1, most=most[1])
    if len(images) != len(labels):
        raise ValueError(
            f"{images_path} has {len(images)} images but {labels_path.name} next to it has "
            f"{len(labels)} labels; expected the same number. Use the files of one split."
        )
    return images[..., np.newaxis], labels.astype(np.int32)


CIFAR10_MEMBERS = {
    "train": [f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)],
    "test": ["cifar-10-batches-bin/test_batch.bin"],
}


class _AtMost:
    """A stream that raises ValueError after `most` bytes."""

    def __init__(self, stream, most: int, path: pathlib.Path):
        self.stream, self.left, self.path = stream, most, path

    def read(self, size: int) -> bytes:
        content = self.stream.read(size)
        self.left -= len(content)
        if self.left < 0:
            raise ValueError(
                f"{self.path} is longer, unpacked, than the published file. Download it again."
            )
        return content


def _read_cifar10(path: pathlib.Path, most: int) -> dict[str, Arrays]:
    wanted = {member for members in CIFAR10_MEMBERS.values() for member in members}
    records = {}
    try:
        with (
            gzip.open(path) as unpacked,
            tarfile.open(fileobj=_AtMost(unpacked, most, path), mode="r|") as tar,  # type: ignore[call-overload]
        ):
            for member in tar:  # in file order, since seeking back would decompress again
                if member.name in wanted and (stream := tar.extractfile(member)) is not None:
                    records[member.name] = _cifar10_records(path, member.name, stream.read())
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"{path} is truncated, damaged or not a .tar.gz file ({error}); expected CIFAR-10's "
            "binary version. Download it again."
        ) from error
    if missing := sorted(wanted - records.keys()):
        raise ValueError(
            f"{path} lacks {', '.join(missing)}; expected CIFAR-10's binary version, not the one "
            "for Python or MATLAB. Download it again."
        )
    return {
        split: _cifar10_arrays(np.concatenate([records[member] for member in members]))
        for split, members in CIFAR10_MEMBERS.items()
    }


def _cifar10_records(path: pathlib.Path, member: str, content: bytes) -> np.ndarray:
    """Records of 1 label byte and 3072 pixels: red, green, blue planes of 32 x 32, row-major."""
    if not content or len(content) % 3073:
        raise ValueError(
            f"{member} in {path} is {len(content)} bytes long; expected a multiple of 3073, the "
            "length of one record. Download the file again."
        )
    return np.frombuffer(content, np.uint8).reshape(-1, 3073)


def _cifar10_arrays(records: np.ndarray) -> Arrays:
    planes = records[:, 1:].reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), records[:, 0].astype(np.int32)


def _digest(path: pathlib.Path, algorithm: str) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()


def _check_sha256(name: str, file: File, path: pathlib.Path) -> None:
    found = _digest(path, "sha256")
    if found != file.sha256:
        raise ValueError(
            f"{path} has the wrong checksum: SHA-256 {found} ({path.stat().st_size} bytes); "
            f"expected {file.sha256} ({file.size} bytes), as published for {name}. "
            + _whose(found, "sha256", name, file)
        )


def _check_md5(name: str, file: File, path: pathlib.Path) -> None:
    """Raises ValueError for a wrong MD5; if none is published, for one of another data set."""
    found = _digest(path, "md5")
    others = {f.unpacked_md5 for archive in ARCHIVES.values() for f in archive.files}
    if found != file.unpacked_md5 and (file.unpacked_md5 or found in others):
        raise ValueError(
            f"{path} has the wrong checksum: MD5 {found}; expected "
            f"{file.unpacked_md5 or 'that'} of {name}. {_whose(found, 'unpacked_md5', name, file)}"
        )


def _whose(found: str, checksum: str, name: str, file: File) -> str:
    """A hint: the data set that the file belongs to, or the address of the right file."""
    for other, archive in ARCHIVES.items():
        if any(getattr(f, checksum) == found for f in archive.files):
            return f"It is the file of this name of {other}."
    return f"Download it again from {ARCHIVES[name].url}{file.name}."
