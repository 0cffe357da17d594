"""The image data sets through TensorFlow Datasets (TFDS), without TensorFlow.

TFDS's own builders of these data sets need TensorFlow. `SoapJax` does not: it downloads the
published files with TFDS, which checks their checksums, reads them with NumPy, and stores the
examples as ArrayRecord files, unshuffled, in `soap_jax/<name>` in TFDS's data directory. Importing
this module imports TFDS, so only `soap_jax.data` imports it, and only if needed.
"""

import contextlib
import io
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import requests
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums, download_manager, resource

from soap_jax import _archives

Examples = Iterator[tuple[int, dict[str, np.ndarray]]]

CONNECT_TIMEOUT = 5.0  # seconds


class SoapJax(tfds.core.GeneratorBasedBuilder):
    """A TFDS builder with one config per data set of `soap_jax._archives.ARCHIVES`."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name=name) for name in _archives.ARCHIVES]

    @property
    def archive(self) -> _archives.Archive:
        """The published files of this config."""
        return _archives.ARCHIVES[self.builder_config.name]

    @property
    def url_infos(self) -> dict[str, checksums.UrlInfo]:
        """The checksums that TFDS verifies; by default it would read them from a file."""
        return {
            self.archive.url + file.name: checksums.UrlInfo(
                tfds.core.utils.Size(file.size), file.sha256, file.name
            )
            for file in self.archive.files
        }

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Tensor(
            shape=self.archive.image_shape,
            dtype=np.uint8,
            encoding=tfds.features.Encoding.BYTES,  # else one protobuf integer per pixel
        )
        label = tfds.features.Tensor(shape=(), dtype=np.int32)
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({"image": image, "label": label}),
            disable_shuffling=True,  # the published order, so that every source gives equal arrays
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
        try:
            self._check_reachable(dl_manager.download_dir)
            paths = dl_manager.download(list(self.url_infos))
        except (requests.RequestException, tfds.download.DownloadError) as error:
            raise self._connection_error(error) from error
        arrays = _archives.read(self.builder_config.name, paths)
        return {split: self._generate_examples(*pair) for split, pair in arrays.items()}

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Examples:
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield i, {"image": image, "label": label}

    def _check_reachable(self, download_dir: pathlib.Path) -> None:
        """Requests each missing file once, since TFDS would retry for minutes before it fails."""
        for url, info in self.url_infos.items():
            path = download_dir / self.name / resource.get_dl_fname(url, info.checksum)
            if not resource.is_locally_cached(path):
                with requests.get(url, stream=True, timeout=CONNECT_TIMEOUT) as response:
                    response.raise_for_status()

    def _connection_error(self, error: Exception) -> ConnectionError:
        files = ", ".join(file.name for file in self.archive.files)
        return ConnectionError(
            f"{self.builder_config.name} is not prepared in TFDS's directory "
            f"{self.data_dir_root}, and cannot be downloaded from {self.archive.url}. Connect to "
            f"the network and try again; or put the original files ({files}) in a directory and "
            "pass it as data_dir, or set the environment variable SOAP_JAX_DATA_DIR to it. "
            f"(Cause: {error})"
        )


def load(name: str) -> tuple[dict[str, _archives.Arrays], str]:
    """Loads a data set; the first call downloads and prepares it.

    Args:
        name: a key of `soap_jax._archives.ARCHIVES`.

    Returns:
        `{"train": (images, labels), "test": (images, labels)}`, as `_archives.read` returns them,
        and the source.

    Raises:
        ConnectionError: if the data set is not prepared and its files cannot be downloaded.
        OSError: if the prepared data set is damaged.
        ValueError: if a downloaded file is not the published one.
    """
    builder = _builder(name)
    if not builder.data_path.exists():
        _prepare(builder)
        builder = _builder(name)
    try:
        splits = {split: _read_split(builder, split) for split in ("train", "test")}
    except Exception as error:  # TFDS and ArrayRecord may raise any exception
        raise OSError(
            f"{builder.data_path}, the prepared data set {name}, cannot be read ({error}). "
            "Delete that directory and try again."
        ) from error
    source = f"tfds {tfds.__version__} {builder.info.full_name} sha256:{builder.archive.sha256}"
    return splits, source


def _builder(name: str) -> SoapJax:
    # TFDS reads the variable at import; here a later change counts too.
    data_dir = os.environ.get("TFDS_DATA_DIR") or None
    return SoapJax(config=name, data_dir=data_dir, file_format="array_record")


def _prepare(builder: SoapJax) -> None:
    config = tfds.download.DownloadConfig(try_download_gcs=False, force_checksums_validation=True)
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints a message
            builder.download_and_prepare(download_config=config)
    except download_manager.NonMatchingChecksumError as error:
        raise ValueError(
            f"a file downloaded for {builder.builder_config.name} is not the published one: "
            f"{error}\nA proxy may have replaced it. Put the original files in a directory and "
            "pass it as data_dir."
        ) from error
    except OSError:
        if not builder.data_path.exists():  # otherwise another process has prepared it
            raise


def _read_split(builder: SoapJax, split: str) -> _archives.Arrays:
    source = builder.as_data_source(split)
    images = np.empty((len(source), *builder.archive.image_shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    batch = 4096  # limits the memory of decoded examples
    for start in range(0, len(source), batch):
        indices = range(start, min(start + batch, len(source)))
        for i, example in zip(indices, source.__getitems__(indices), strict=True):
            images[i], labels[i] = example["image"], example["label"]
    return images, labels
