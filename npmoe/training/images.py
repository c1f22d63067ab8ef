"""Labelled images: the type, the digits that come with npmoe, and batches without saved state."""

from __future__ import annotations

import functools
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from npmoe._checks import check_integer_ids, require
from npmoe._typing import HostArray
from npmoe.errors import DataError, ShapeError

DIGITS = "digits"
_DIGITS_FILE = Path(__file__).with_name("uci_digits.npz")
# Keeps the order of images apart from other streams made from the same seed.
_STREAM = int.from_bytes(b"imgs", "big")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelledImages:
    """Square images and what each shows.

    Parameters
    ----------
    images : (N, S, S, C) uint8 array
    labels : (N,) int array
        Below num_classes.
    num_classes : int

    Raises
    ------
    ShapeError, DataError
        If they do not fit each other, there is none, or a label is out of range.
    """

    images: HostArray
    labels: HostArray
    num_classes: int

    def __post_init__(self) -> None:
        """Check shapes and labels."""
        shape = self.images.shape
        if len(shape) != 4 or shape[1] != shape[2] or self.images.dtype != np.uint8:
            raise ShapeError(
                "LabelledImages: images must be square, a uint8 array (N, S, S, C), got "
                f"{self.images.dtype} {shape}."
            )
        check_integer_ids("LabelledImages", "labels", self.labels)
        if self.labels.shape != shape[:1]:
            raise ShapeError(
                f"LabelledImages: labels must have shape (N,) = ({shape[0]},), got "
                f"{self.labels.shape}. N is bound by images."
            )
        if not shape[0]:
            raise DataError("LabelledImages: images must hold at least one image, got none.")
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= self.num_classes))
        if wrong.size:
            raise DataError(
                f"LabelledImages: labels must lie in 0..{self.num_classes - 1}, got "
                f"{self.labels[wrong[0]]} for image {wrong[0]}."
            )

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels)

    def select(self, places: HostArray | slice) -> LabelledImages:
        """Return some of the images, in the order of `places`."""
        return LabelledImages(
            images=self.images[places], labels=self.labels[places], num_classes=self.num_classes
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageData:
    """What a vision run is given: images to train on, others to test on, and where they are from.

    Raises
    ------
    ShapeError
        If the two parts have images of different shapes.
    """

    train: LabelledImages
    test: LabelledImages
    source: str

    def __post_init__(self) -> None:
        """Check that the parts fit each other."""
        shapes = self.train.images.shape[1:], self.test.images.shape[1:]
        if shapes[0] != shapes[1] or self.train.num_classes != self.test.num_classes:
            raise ShapeError(
                f"ImageData: test must hold images of shape {shapes[0]} and "
                f"{self.train.num_classes} classes, as train does, got {shapes[1]} and "
                f"{self.test.num_classes}."
            )

    def sha256(self) -> str:
        """Return the hash by which a resumed run knows its images."""
        digest = hashlib.sha256()
        for part in (self.train, self.test):
            digest.update(repr((part.images.shape, part.num_classes)).encode())
            digest.update(np.ascontiguousarray(part.images).data)
            digest.update(part.labels.astype("<i8").data)
        return digest.hexdigest()


def uci_digits() -> ImageData:
    """Return the handwritten digits that come with npmoe: 1,438 to train on, 359 to test on.

    8x8 images of 43 people's digits, with values 0..16: the test part of "Optical Recognition of
    Handwritten Digits", E. Alpaydin and C. Kaynak 1998, UCI Machine Learning Repository,
    doi 10.24432/C50P49, CC BY 4.0. The split is stratified, a fifth of every class, and stored as
    indices in the file.

    Raises
    ------
    DataError
        If the file is missing or damaged.
    """
    try:
        content = io.BytesIO(_DIGITS_FILE.read_bytes())
        with np.load(content, allow_pickle=False) as file:
            images, labels, test = file["images"], file["labels"], file["test_indices"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise DataError(
            f"uci_digits: {_DIGITS_FILE} could not be read ({error}). Install npmoe again."
        ) from error
    data = LabelledImages(images=images[..., None], labels=labels.astype(np.int64), num_classes=10)
    is_test = np.zeros(len(labels), bool)
    is_test[test] = True
    return ImageData(
        train=data.select(np.flatnonzero(~is_test)),
        test=data.select(np.flatnonzero(is_test)),
        source=DIGITS,
    )


def channel_statistics(images: HostArray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of (N, S, S, C); 1 where it is 0."""
    rows = images.reshape(-1, images.shape[-1])
    std = rows.std(axis=0, dtype=np.float64)
    return tuple(rows.mean(axis=0, dtype=np.float64).tolist()), tuple(
        np.where(std > 0, std, 1.0).tolist()
    )


def normalize_images(
    images: HostArray, mean: tuple[float, ...], std: tuple[float, ...], dtype: str = "float32"
) -> HostArray:
    """Return (images - mean) / std by channel, (N, S, S, C) of `dtype`; new."""
    shifted = images.astype(dtype)
    shifted -= np.array(mean, dtype)
    shifted /= np.array(std, dtype)
    return shifted


def image_batch(
    data: LabelledImages, batch_size: int, seed: int, step: int, *, max_shift: int = 0
) -> tuple[HostArray, HostArray]:
    """Return the raw images and labels of one training step, a function of its arguments only.

    Every epoch runs through all images in an order of its own; a batch may cross into the next
    epoch. With `max_shift` m, each image is moved by dy and dx drawn from -m..m, and 0 moves in.

    Parameters
    ----------
    data : LabelledImages
    batch_size : int
        B.
    seed, step : int
        Not negative.
    max_shift : int
        Below the side of an image.

    Returns
    -------
    tuple of (B, S, S, C) uint8 array and (B,) int array
        New memory.

    Raises
    ------
    RangeError
        If a number is out of range.
    """
    side = data.images.shape[1]
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
        ("step", step, 0),
        ("max_shift", max_shift, 0),
    ):
        require(value >= least, f"image_batch: {name} must be at least {least}, got {value}.")
    require(max_shift < side, f"image_batch: max_shift must be below {side}, got {max_shift}.")
    numbers = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    epochs, places = np.divmod(numbers, len(data))
    chosen = np.empty(batch_size, np.int64)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        here = epochs == epoch
        chosen[here] = _epoch_order(len(data), seed, epoch)[places[here]]
    images = data.images[chosen]
    if max_shift:
        rng = np.random.default_rng(np.random.SeedSequence([_STREAM, seed, step, 1]))
        images = shift_images(images, rng.integers(-max_shift, max_shift + 1, (batch_size, 2)))
    return images, data.labels[chosen]


def shift_images(images: HostArray, shifts: HostArray) -> HostArray:
    """Move each image (N, S, S, C) down and right by its pair of `shifts` (N, 2); 0 moves in."""
    count, side = images.shape[:2]
    most = int(np.abs(shifts).max(initial=0))
    padded = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)))
    rows, columns = (np.arange(side) + most - shifts[:, axis, None] for axis in (0, 1))
    return padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


@functools.lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> HostArray:
    """Return the order of all images in one epoch."""
    order = np.random.default_rng(np.random.SeedSequence([_STREAM, seed, epoch])).permutation(count)
    order.flags.writeable = False
    return order
