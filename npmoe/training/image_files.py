"""Reading MNIST and CIFAR-10 in the binary formats in which they are published; no pickles."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from npmoe._typing import HostArray
from npmoe.errors import DataError
from npmoe.training.images import ImageData, LabelledImages

_IDX_UINT8 = 8
_CIFAR_SHAPE = (3, 32, 32)
_CIFAR_TRAIN = tuple(f"data_batch_{n}.bin" for n in range(1, 6))
_CIFAR_TEST = "test_batch.bin"
_MNIST = {
    part: (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
    for part, prefix in (("train", "train"), ("test", "t10k"))
}
_NUM_CLASSES = 10


def read_images(folder: str | Path) -> ImageData:
    """Return the MNIST or CIFAR-10 images of a folder, told apart by the names of its files.

    Parameters
    ----------
    folder : path
        Holds ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the same for ``t10k``
        (each also with ``.gz``), or ``data_batch_1.bin`` to 5 (at least the first) and
        ``test_batch.bin``.

    Returns
    -------
    ImageData

    Raises
    ------
    DataError
        If the folder holds neither, or a file is missing, truncated or of another format.
    """
    path = Path(folder)
    if not path.is_dir():
        raise DataError(
            f"read_images: folder must be a folder that can be read, got {path}. Give the one with "
            "the files of MNIST or CIFAR-10."
        )
    source = str(path.resolve())
    if (path / _CIFAR_TRAIN[0]).exists():
        names = [name for name in _CIFAR_TRAIN if (path / name).exists()]
        parts = [read_cifar10(path / name) for name in names]
        train = LabelledImages(
            images=np.concatenate([p.images for p in parts]),
            labels=np.concatenate([p.labels for p in parts]),
            num_classes=_NUM_CLASSES,
        )
        return ImageData(train=train, test=read_cifar10(path / _CIFAR_TEST), source=source)
    if any((path / name).exists() for name in _with_gz(_MNIST["train"][0])):
        found = {part: _read_mnist(path, *names) for part, names in _MNIST.items()}
        return ImageData(train=found["train"], test=found["test"], source=source)
    raise DataError(
        f"read_images: folder must hold {_MNIST['train'][0]} (MNIST, also .gz) or "
        f"{_CIFAR_TRAIN[0]} (CIFAR-10, binary version), got {path} without either. Unpack the "
        "published files there."
    )


def read_cifar10(path: str | Path) -> LabelledImages:
    """Return the images of one file of CIFAR-10's binary version.

    A record is a byte for the class and 3,072 for the red, green and blue plane, row by row.

    Raises
    ------
    DataError
        If the file cannot be read, is empty, torn, or holds a class above 9.

    References
    ----------
    Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images".
    """
    content = _read(Path(path), "read_cifar10")
    size = 1 + math.prod(_CIFAR_SHAPE)
    if not content or len(content) % size:
        raise DataError(
            f"read_cifar10: {path} must hold whole records of {size:,} bytes, got "
            f"{len(content):,} bytes. It is truncated or no CIFAR-10 file: download it again."
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    labels = records[:, 0].astype(np.int64)
    _check_labels("read_cifar10", path, labels)
    planes = records[:, 1:].reshape(-1, *_CIFAR_SHAPE)
    return LabelledImages(
        images=np.ascontiguousarray(planes.transpose(0, 2, 3, 1)),
        labels=labels,
        num_classes=_NUM_CLASSES,
    )


def read_idx(path: str | Path, num_axes: int) -> HostArray:
    """Return the bytes of an IDX file, the format of MNIST, also if compressed by gzip.

    Two zero bytes, 8 for unsigned bytes, the number of axes, each size in four bytes (the highest
    first), and the values.

    Parameters
    ----------
    path : path
        Decompressed if it ends in ".gz".
    num_axes : int
        3 for images, 1 for labels.

    Returns
    -------
    uint8 array
        Read-only.

    Raises
    ------
    DataError
        If the file cannot be read, has another magic number, or another length than it says.

    References
    ----------
    LeCun, Cortes and Burges, "The MNIST database of handwritten digits".
    """
    content = _read(Path(path), "read_idx")
    magic = bytes([0, 0, _IDX_UINT8, num_axes])
    header = 4 + 4 * num_axes
    if content[:4] != magic:
        raise DataError(
            f"read_idx: {path} must begin with the magic number 0x{magic.hex()} (unsigned bytes, "
            f"{num_axes} ax{'i' if num_axes == 1 else 'e'}s), got 0x{content[:4].hex()}. "
            "It is another kind of file, or damaged."
        )
    shape = tuple(
        int.from_bytes(content[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(num_axes)
    )
    needed = header + math.prod(shape)
    if len(content) != needed:
        raise DataError(
            f"read_idx: {path} must hold {needed:,} bytes for the sizes {shape} in its header, got "
            f"{len(content):,}. It is truncated or damaged: download it again."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _read_mnist(folder: Path, images_name: str, labels_name: str) -> LabelledImages:
    images_path, labels_path = (_existing(folder, n) for n in (images_name, labels_name))
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1).astype(np.int64)
    if len(images) != len(labels):
        raise DataError(
            f"read_images: {labels_path} must hold a label for each of the {len(images):,} images "
            f"of {images_path.name}, got {len(labels):,}. They belong to different sets."
        )
    if images.shape[1] != images.shape[2]:
        raise DataError(
            f"read_images: {images_path} must hold square images, got sides of {images.shape[1]} "
            f"and {images.shape[2]}."
        )
    _check_labels("read_images", labels_path, labels)
    return LabelledImages(images=images[..., None], labels=labels, num_classes=_NUM_CLASSES)


def _with_gz(name: str) -> tuple[str, str]:
    return name, f"{name}.gz"


def _existing(folder: Path, name: str) -> Path:
    """Return the file or its compressed twin; the plain name if there is neither."""
    return next((folder / n for n in _with_gz(name) if (folder / n).exists()), folder / name)


def _check_labels(function: str, path: str | Path, labels: HostArray) -> None:
    wrong = np.flatnonzero(labels >= _NUM_CLASSES)
    if wrong.size:
        raise DataError(
            f"{function}: {path} must hold labels in 0..{_NUM_CLASSES - 1}, got "
            f"{labels[wrong[0]]} for image {wrong[0]}. It is damaged, or another set."
        )


def _read(path: Path, function: str) -> bytes:
    """Return the content of a file, decompressed if its name ends in .gz."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{function}: {path} must be a whole gzip file, got a damaged one ({error}). "
            "Download it again."
        ) from error
    except OSError as error:
        raise DataError(
            f"{function}: {path} could not be read: {error.strerror}. Give the folder with all "
            "published files."
        ) from error
