"""Labelled images: the digits that come along, batches, augmentation, normalisation."""

from __future__ import annotations

import numpy as np
import pytest

from npmoe.errors import DataError, DTypeError, RangeError, ShapeError
from npmoe.training import ImageData, LabelledImages, image_batch, images, uci_digits
from npmoe.training.images import channel_statistics, normalize_images, shift_images


def labelled(count=7, side=4, channels=1, seed=0):
    rng = np.random.default_rng(seed)
    return LabelledImages(
        images=rng.integers(1, 256, (count, side, side, channels), dtype=np.uint8),
        labels=rng.integers(0, 3, count),
        num_classes=3,
    )


# --- the digits


def test_the_digits_are_those_of_uci():
    data = uci_digits()
    assert (len(data.train), len(data.test), data.train.num_classes) == (1438, 359, 10)
    both = np.concatenate([data.train.images, data.test.images])
    assert both.shape == (1797, 8, 8, 1)
    assert (both.min(), both.max()) == (0, 16)
    labels = np.concatenate([data.train.labels, data.test.labels])
    # Counts of the published test part, optdigits.tes.
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    # Its first record, a zero.
    with np.load(images._DIGITS_FILE, allow_pickle=False) as file:
        assert file["images"][0, 0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]
        assert file["images"][0, 7].tolist() == [0, 0, 6, 13, 10, 0, 0, 0]
        assert file["labels"][:10].tolist() == list(range(10))


def test_the_split_is_stratified_and_disjoint():
    data = uci_digits()
    shares = np.bincount(data.test.labels) / np.bincount(
        np.concatenate([data.train.labels, data.test.labels])
    )
    assert (np.abs(shares - 0.2) < 0.5 / 174).all()
    with np.load(images._DIGITS_FILE, allow_pickle=False) as file:
        test = file["test_indices"]
    assert len(set(test.tolist())) == 359
    assert test.max() < 1797
    assert images._DIGITS_FILE.stat().st_size < 100_000


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 torn", b"no archive"])
def test_a_damaged_file_of_digits_is_named(tmp_path, monkeypatch, content):
    path = tmp_path / "uci_digits.npz"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(images, "_DIGITS_FILE", path)
    with pytest.raises(DataError, match=r"^uci_digits: .*uci_digits\.npz could not be read .*Inst"):
        uci_digits()


def test_the_hash_tells_data_apart():
    data = uci_digits()
    same = ImageData(train=data.train, test=data.test, source="elsewhere")
    assert data.sha256() == same.sha256()
    changed = data.train.images.copy()
    changed[5, 3, 3] ^= 1
    one = LabelledImages(images=changed, labels=data.train.labels, num_classes=10)
    labels = data.test.labels.copy()
    labels[0] = (labels[0] + 1) % 10
    two = LabelledImages(images=data.test.images, labels=labels, num_classes=10)
    hashes = {
        data.sha256(),
        ImageData(train=one, test=data.test, source="x").sha256(),
        ImageData(train=data.train, test=two, source="x").sha256(),
        ImageData(train=data.test, test=data.train, source="x").sha256(),
    }
    assert len(hashes) == 4


# --- batches


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 16])
def test_every_epoch_shows_every_image_once(batch_size):
    data = labelled()
    stream = []
    for step in range(40):
        pixels, labels = image_batch(data, batch_size, 3, step)
        assert pixels.shape == (batch_size, 4, 4, 1)
        for image, label in zip(pixels, labels, strict=True):
            (place,) = [n for n in range(7) if np.array_equal(data.images[n], image)]
            assert label == data.labels[place]
            stream.append(place)
    epochs = [tuple(stream[i : i + 7]) for i in range(0, len(stream) - 6, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) > 0.8 * len(epochs) or len(epochs) < 8


def test_a_batch_is_a_function_of_its_arguments():
    data = labelled(30)

    def drawn(seed, step, shift=1):
        return image_batch(data, 8, seed, step, max_shift=shift)[0].tobytes()

    assert drawn(0, 5) == drawn(0, 5)
    assert len({drawn(0, 5), drawn(1, 5), drawn(0, 6), drawn(0, 5, 0)}) == 4


def test_shifts_by_loops():
    data = labelled(9, side=4, channels=2)
    shifts = np.array([(dy, dx) for dy in (-2, 0, 1) for dx in (-1, 0, 3)])
    found = shift_images(data.images, shifts)
    want = np.zeros_like(found)
    for n, (dy, dx) in enumerate(shifts):
        for y in range(4):
            for x in range(4):
                if 0 <= y - dy < 4 and 0 <= x - dx < 4:
                    want[n, y, x] = data.images[n, y - dy, x - dx]
    assert np.array_equal(found, want)


def test_shifts_are_drawn_evenly():
    """Find each image's shift again, by trying all of them."""
    data = labelled(1, side=5)
    counts = {}
    for step in range(60):
        pixels, _ = image_batch(data, 4, 0, step, max_shift=1)
        for image in pixels:
            (pair,) = [
                (dy, dx)
                for dy in (-1, 0, 1)
                for dx in (-1, 0, 1)
                if np.array_equal(shift_images(data.images, np.array([(dy, dx)]))[0], image)
            ]
            counts[pair] = counts.get(pair, 0) + 1
    assert len(counts) == 9
    mean = 240 / 9
    assert all(abs(n - mean) <= 5 * np.sqrt(mean) for n in counts.values())


def test_normalised_channels():
    data = labelled(50, channels=3)
    mean, std = channel_statistics(data.images)
    for channel in range(3):
        values = [float(v) for v in data.images[..., channel].ravel()]
        assert mean[channel] == pytest.approx(sum(values) / len(values), rel=1e-14)
        variance = sum((v - mean[channel]) ** 2 for v in values) / len(values)
        assert std[channel] == pytest.approx(variance**0.5, rel=1e-13)
    scaled = normalize_images(data.images, mean, std)
    assert scaled.dtype == np.float32
    # An image value, the mean and the deviation are rounded once each, then two operations.
    want = (data.images - np.array(mean)) / np.array(std)
    bound = 4 * 2.0**-24 * (np.abs(want) + np.abs(np.array(mean) / np.array(std)))
    assert (np.abs(scaled - want) <= bound).all()
    assert channel_statistics(np.full((2, 2, 2, 1), 7, np.uint8)) == ((7.0,), (1.0,))


# --- what is refused


def test_wrong_images_and_labels():
    data = labelled()
    good = {"images": data.images, "labels": data.labels, "num_classes": 3}
    for change, error, words in [
        (
            {"labels": np.array([0, 1, 2, 3, 0, 0, 0])},
            DataError,
            r"labels must lie in 0\.\.2, got 3",
        ),
        (
            {"labels": np.array([0, -1, 2, 0, 0, 0, 0])},
            DataError,
            r"labels must lie in 0\.\.2, got -1 for image 1",
        ),
        ({"labels": data.labels[1:]}, ShapeError, r"labels must have shape \(N,\) = \(7,\), got"),
        ({"labels": data.labels.astype("f8")}, DTypeError, "labels must be an integer array"),
        ({"images": data.images[:, 1:]}, ShapeError, "images must be square, a uint8 array"),
        ({"images": data.images.astype("f4")}, ShapeError, "images must be square, a uint8 array"),
        ({"images": data.images[..., 0]}, ShapeError, "images must be square, a uint8 array"),
        (
            {"images": data.images[:0], "labels": data.labels[:0]},
            DataError,
            "images must hold at least one image, got none",
        ),
    ]:
        with pytest.raises(error, match=f"^LabelledImages: {words}"):
            LabelledImages(**{**good, **change})
    with pytest.raises(
        ShapeError,
        match=r"^ImageData: test must hold images of shape \(4, 4, 1\) and 3 classes, as train "
        r"does, got \(5, 5, 1\) and 3\.$",
    ):
        ImageData(train=data, test=labelled(side=5), source="x")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"step": -1}, "step must be at least 0, got -1"),
        ({"max_shift": -1}, "max_shift must be at least 0, got -1"),
        ({"max_shift": 4}, "max_shift must be below 4, got 4"),
    ],
)
def test_wrong_numbers(change, words):
    with pytest.raises(RangeError, match=f"^image_batch: {words}"):
        image_batch(labelled(), **{"batch_size": 1, "seed": 0, "step": 0, **change})
