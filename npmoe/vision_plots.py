"""Pictures of a vision run (extra ``cli``)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from npmoe._figures import new_figure as _figure
from npmoe._figures import save_figure as _save
from npmoe._typing import HostArray
from npmoe.nn import split_patches
from npmoe.training.evaluate_images import VisionEvaluation

_COLUMNS = 4  # of a mosaic
_GAP = (0.85, 0.65, 0.35)  # no patch has this colour by chance


def plot_confusion(confusion: HostArray, path: str | Path) -> None:
    """Draw how many images of each class were taken for each class.

    Parameters
    ----------
    confusion : (V, V) int array
        `VisionEvaluation.confusion`.
    path : path
        A PNG file.

    Raises
    ------
    BackendUnavailableError
        If matplotlib is not installed.
    CheckpointError
        If the file cannot be written; an earlier picture is intact.
    """
    size = len(confusion)
    figure, axes = _figure(1, 1, (6.4, 6.0))
    axis = axes[0, 0]
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    axis.imshow(share, vmin=0, vmax=1, cmap="Blues")
    for row, column in np.ndindex(size, size):
        if confusion[row, column]:
            color = "white" if share[row, column] > 0.5 else "black"
            axis.text(
                column, row, str(confusion[row, column]), color=color, ha="center", va="center"
            )
    right, total = int(np.trace(confusion)), int(confusion.sum())
    axis.set(
        title=f"{right} of {total} test images right ({right / max(total, 1):.2%})",
        xlabel="taken for",
        ylabel="class",
        xticks=range(size),
        yticks=range(size),
    )
    _save(figure, path)


def plot_patches(
    evaluation: VisionEvaluation, images: HostArray, patch_size: int, path: str | Path
) -> None:
    """Draw which patches each expert takes: where they lie, and a mosaic of real ones.

    Two panels for every expert and MoE layer: the share of the expert in the weights at each
    place of the image, and the patches of `images` for which its weight was largest.

    Parameters
    ----------
    evaluation : VisionEvaluation
    images : (N, S, S, C) uint8 array
        The raw images that were evaluated.
    patch_size : int
    path : path
        A PNG file.

    Raises
    ------
    BackendUnavailableError
        If matplotlib is not installed.
    CheckpointError
        If the file cannot be written; an earlier picture is intact.
    """
    layers, length, experts = evaluation.weights.shape
    side = round(length**0.5)
    figure, axes = _figure(experts, 2 * layers, (0.4 + 2.4 * layers, 0.3 + 1.1 * experts))
    share = evaluation.weights / np.maximum(evaluation.weights.sum(axis=2, keepdims=True), 1e-12)
    brightest = max(int(images.max()), 1)
    for layer, expert in np.ndindex(layers, experts):
        places, mosaic = axes[expert, 2 * layer : 2 * layer + 2]
        places.imshow(share[layer, :, expert].reshape(side, side), vmin=0, vmax=share[layer].max())
        mosaic.imshow(_mosaic(evaluation.strongest[layer, expert], images, patch_size, brightest))
        for axis in (places, mosaic):
            axis.set(xticks=[], yticks=[])
        places.set_ylabel(f"expert {expert}", fontsize=8)
        if expert == 0:
            places.set_title(f"layer {layer}: where", fontsize=8)
            mosaic.set_title("strongest patches", fontsize=8)
    _save(figure, path)


def _mosaic(strongest: HostArray, images: HostArray, patch_size: int, brightest: int) -> HostArray:
    """Return patches (n, 2: image and place) (Y, X, 3) in rows of 4, values in 0..1."""
    channels = images.shape[3]
    rows = -(-len(strongest) // _COLUMNS)
    step = patch_size + 1
    canvas = np.empty((rows * step + 1, _COLUMNS * step + 1, 3))
    canvas[:] = _GAP
    for number, (image, place) in enumerate(strongest):
        if image < 0:
            continue
        patches = split_patches(images[image : image + 1].astype(np.float64), patch_size)
        patch = patches[0, place].reshape(patch_size, patch_size, channels) / brightest
        y, x = (step * n + 1 for n in divmod(number, _COLUMNS))
        canvas[y : y + patch_size, x : x + patch_size] = patch if channels == 3 else patch[..., :1]
    return canvas
