"""MNIST and CIFAR-10 in their published formats, from tiny files made here."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from npmoe.errors import DataError
from npmoe.training import read_cifar10, read_idx, read_images

MNIST = {
    "train-images-idx3-ubyte": (3, (5, 4, 4)),
    "train-labels-idx1-ubyte": (1, (5,)),
    "t10k-images-idx3-ubyte": (3, (2, 4, 4)),
    "t10k-labels-idx1-ubyte": (1, (2,)),
}


def idx(array):
    """Spell an array as IDX, byte by byte."""
    content = bytearray([0, 0, 8, array.ndim])
    for size in array.shape:
        content += bytes([size >> 24 & 255, size >> 16 & 255, size >> 8 & 255, size & 255])
    return bytes(content + array.astype(np.uint8).tobytes())


def drawn(shape, seed=0):
    top = 10 if len(shape) == 1 else 256
    return np.random.default_rng(seed).integers(0, top, shape, dtype=np.uint8)


def mnist(folder, *, compressed=False, **replaced):
    """Write a tiny MNIST; `replaced` gives the bytes of some files, by their first two words."""
    folder.mkdir(exist_ok=True)
    for seed, (name, (_, shape)) in enumerate(MNIST.items()):
        content = idx(drawn(shape, seed))
        content = replaced.get("_".join(name.split("-")[:2]), content)
        path = folder / (f"{name}.gz" if compressed else name)
        path.write_bytes(gzip.compress(content) if compressed else content)
    return folder


def cifar(folder, names=("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin"), count=3):
    folder.mkdir(exist_ok=True)
    planes = {}
    for seed, name in enumerate(names):
        images = drawn((count, 3, 32, 32), seed)
        labels = drawn((count,), seed)
        records = [
            bytes([label]) + image.tobytes() for label, image in zip(labels, images, strict=True)
        ]
        (folder / name).write_bytes(b"".join(records))
        planes[name] = labels, images
    return folder, planes


@pytest.mark.parametrize("compressed", [False, True])
def test_mnist(tmp_path, compressed):
    data = read_images(mnist(tmp_path / "mnist", compressed=compressed))
    assert data.source == str(tmp_path / "mnist")
    for seed, part in ((0, data.train), (2, data.test)):
        name = "train" if seed == 0 else "t10k"
        want = drawn(MNIST[f"{name}-images-idx3-ubyte"][1], seed)
        assert np.array_equal(part.images[..., 0], want)
        assert np.array_equal(part.labels, drawn((len(want),), seed + 1))
        assert part.num_classes == 10


def test_cifar(tmp_path):
    folder, planes = cifar(tmp_path / "cifar")
    data = read_images(folder)
    first, second, test = planes.values()
    assert np.array_equal(data.train.labels, np.concatenate([first[0], second[0]]))
    assert np.array_equal(data.test.labels, test[0])
    for image, colours in zip(
        data.train.images, np.concatenate([first[1], second[1]]), strict=True
    ):
        for channel in range(3):
            assert np.array_equal(image[..., channel], colours[channel])
    assert data.train.images.shape == (6, 32, 32, 3)


def test_a_published_header_is_read_to_the_letter(tmp_path):
    """The first 16 bytes of MNIST's training images, as its page gives them."""
    path = tmp_path / "head"
    header = bytes.fromhex("000008030000ea600000001c0000001c")
    path.write_bytes(header + bytes(60000 * 28 * 28))
    assert read_idx(path, 3).shape == (60000, 28, 28)


# --- damaged


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", r"must begin with the magic number 0x00000803 .*3 axes\), got 0x\. It is another"),
        (idx(drawn((5,))), r"must begin with the magic number 0x00000803 .*, got 0x00000801"),
        (
            b"\0\0\x0d\x03" + bytes(20),
            r"must begin with the magic .*, got 0x00000d03",
        ),
        (b"\x1f\x8b\x08\x00", r"must begin with the magic number 0x00000803 .*, got 0x1f8b0800"),
        (idx(drawn((5, 4, 4)))[:-1], r"must hold 96 bytes for the sizes \(5, 4, 4\) .* got 95"),
        (
            idx(drawn((5, 4, 4))) + b"x",
            r"must hold 96 bytes .*, got 97\. It is truncated",
        ),
        (idx(drawn((5, 4, 4)))[:10], r"must hold .* bytes for the sizes .*, got 10"),
        (b"\0\0\x08\x03" + b"\xff" * 12, r"must hold .* bytes for the sizes \(4294967295, "),
    ],
)
def test_damaged_idx_files(tmp_path, content, words):
    folder = mnist(tmp_path / "mnist", train_images=content)
    with pytest.raises(DataError, match=rf"^read_idx: .*train-images-idx3-ubyte {words}"):
        read_images(folder)


def test_damaged_gzip_files(tmp_path):
    folder = mnist(tmp_path / "mnist", compressed=True)
    path = folder / "train-labels-idx1-ubyte.gz"
    whole = path.read_bytes()
    for content in (whole[:-9], whole[:12], b"plain", whole[:12] + b"\xff" * 8 + whole[20:], b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"^read_idx: .*labels.*\.gz must (be a whole|begin)"):
            read_images(folder)


def test_mnist_that_does_not_fit_together(tmp_path):
    folder = mnist(tmp_path / "a", train_labels=idx(drawn((4,))))
    with pytest.raises(
        DataError,
        match=r"^read_images: .*train-labels.* a label for each of the 5 .*, got 4",
    ):
        read_images(folder)
    folder = mnist(tmp_path / "b", t10k_labels=idx(np.array([3, 10])))
    with pytest.raises(
        DataError, match=r"^read_images: .*t10k-labels.* labels in 0\.\.9, got 10 for image 1\."
    ):
        read_images(folder)
    folder = mnist(tmp_path / "c", t10k_images=idx(drawn((2, 4, 5))))
    with pytest.raises(DataError, match=r"must hold square images, got sides of 4 and 5"):
        read_images(folder)
    folder = mnist(tmp_path / "d")
    (folder / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(DataError, match=r"^read_idx: .*t10k-images-idx3-ubyte could not be"):
        read_images(folder)


def test_damaged_cifar_files(tmp_path):
    folder, _ = cifar(tmp_path / "cifar")
    path = folder / "data_batch_2.bin"
    whole = path.read_bytes()
    for content, words in [
        (whole[:-1], r"must hold whole records of 3,073 bytes, got 9,218 bytes\. It is truncated"),
        (b"", "must hold whole records of 3,073 bytes, got 0 bytes"),
        (
            whole[:3073] + b"\x0a" + whole[3074:],
            r"labels in 0\.\.9, got 10 for image 1\.",
        ),
    ]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"^read_cifar10: .*data_batch_2\.bin .*{words}"):
            read_images(folder)
    path.write_bytes(whole)
    (folder / "test_batch.bin").unlink()
    with pytest.raises(DataError, match=r"^read_cifar10: .*test_batch\.bin could not be read: No"):
        read_images(folder)
    with pytest.raises(DataError, match=r"could not be read: Is a directory"):
        read_cifar10(tmp_path)


def test_folders_without_images(tmp_path):
    with pytest.raises(DataError, match=r"^read_images: folder must hold train-images-idx3"):
        read_images(tmp_path)
    # The Python version of CIFAR-10, whose files are pickles, is not opened.
    (tmp_path / "data_batch_1").write_bytes(b"\x80\x04.")
    with pytest.raises(DataError, match=r"data_batch_1\.bin \(CIFAR-10, binary version\), got"):
        read_images(tmp_path)
    for path in (tmp_path / "nothing", tmp_path / "data_batch_1"):
        with pytest.raises(DataError, match=r"^read_images: folder must be a folder that can"):
            read_images(path)
