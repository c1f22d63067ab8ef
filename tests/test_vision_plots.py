"""The pictures of a vision run show its evaluation."""

from __future__ import annotations

import numpy as np
import pytest

from npmoe import plots, vision_plots
from npmoe.errors import CheckpointError
from npmoe.training import VisionEvaluation

image = pytest.importorskip("matplotlib.image")

IMAGES = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4, 1)


def make_evaluation(experts=3, layers=2):
    weights = np.arange(layers * 4 * experts, dtype=float).reshape(layers, 4, experts)
    strongest = np.full((layers, experts, 16, 2), -1)
    strongest[:, :, 0] = (2, 3)
    strongest[-1, -2 % experts, 5] = (1, 0)
    return VisionEvaluation(
        loss=1.0,
        served=np.ones((layers, 4, experts), int),
        dropped=0,
        confusion=np.array([[5, 1], [0, 4]]),
        weights=weights,
        strongest=strongest,
    )


@pytest.fixture
def drawn(monkeypatch):
    """Return the figures as they are when they are saved."""
    figures = []
    save = vision_plots._save
    monkeypatch.setattr(
        vision_plots, "_save", lambda figure, path: (figures.append(figure), save(figure, path))
    )
    return figures


def test_confusion(tmp_path, drawn):
    vision_plots.plot_confusion(make_evaluation().confusion, tmp_path / "confusion.png")
    (axis,) = drawn[0].axes
    assert axis.get_title() == "9 of 10 test images right (90.00%)"
    shares = np.asarray(axis.get_images()[0].get_array())
    assert shares.tolist() == [[5 / 6, 1 / 6], [0, 1]]
    texts = {t.get_position(): t.get_text() for t in axis.texts}
    assert texts == {(0, 0): "5", (1, 0): "1", (1, 1): "4"}
    assert image.imread(tmp_path / "confusion.png").std() > 0.02


def test_a_class_without_images(tmp_path, drawn):
    vision_plots.plot_confusion(np.zeros((2, 2), int), tmp_path / "confusion.png")
    assert drawn[0].axes[0].get_title() == "0 of 0 test images right (0.00%)"


def test_patches(tmp_path, drawn):
    evaluation = make_evaluation()
    vision_plots.plot_patches(evaluation, IMAGES, 2, tmp_path / "patches.png")
    axes = np.array(drawn[0].axes).reshape(3, 4)
    titles = [a.get_title() for a in axes[0]]
    assert titles == ["layer 0: where", "strongest patches", "layer 1: where", "strongest patches"]
    share = np.asarray(axes[1, 2].get_images()[0].get_array())
    assert share.tolist() == [[13 / 39, 16 / 48], [19 / 57, 22 / 66]]
    mosaic = np.asarray(axes[1, 3].get_images()[0].get_array())
    assert mosaic.shape == (13, 13, 3)
    # The last patch of the last image comes first, the first one of image 1 sixth.
    for channel in range(3):
        assert np.array_equal(mosaic[1:3, 1:3, channel], IMAGES[2, 2:, 2:, 0] / 47)
        assert np.array_equal(mosaic[4:6, 4:6, channel], IMAGES[1, :2, :2, 0] / 47)
    empty = np.ones((13, 13), bool)
    empty[1:3, 1:3] = empty[4:6, 4:6] = False
    assert (mosaic[empty] == vision_plots._GAP).all()
    assert image.imread(tmp_path / "patches.png").std() > 0.02


def test_patches_in_colour(tmp_path, drawn):
    colours = np.concatenate([IMAGES, IMAGES + 1, IMAGES + 2], axis=3)
    vision_plots.plot_patches(make_evaluation(1, 1), colours, 2, tmp_path / "patches.png")
    mosaic = np.asarray(drawn[0].axes[1].get_images()[0].get_array())
    assert np.array_equal(mosaic[1:3, 1:3], colours[2, 2:, 2:] / 49)


def test_the_accuracy_stands_beside_the_loss(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(
        plots,
        "_save",
        lambda figure, _: titles.extend((a.get_ylabel(), len(a.get_lines())) for a in figure.axes),
    )
    record = {
        "step": 5,
        "cross_entropy": 1.0,
        "learning_rate": 0.1,
        "grad_norm": 1.0,
        "load_imbalance": 0.0,
        "drop_rate": 0.0,
        "val_loss": 0.5,
        "val_accuracy": 0.9833,
    }
    plots.plot_curves([record], tmp_path / "curves.png", unit="nats per image")
    assert ("nats per image", 2) in titles
    assert ("test accuracy % (green, last 98.33)", 1) in titles


def test_a_picture_that_cannot_be_written(tmp_path):
    path = tmp_path / "missing" / "confusion.png"
    with pytest.raises(CheckpointError, match=r"^plots: .*confusion\.png could not be written: No"):
        vision_plots.plot_confusion(np.eye(2, dtype=int), path)
