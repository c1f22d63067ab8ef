"""The vision half of ``npmoe train``: its options, data and pictures."""

from __future__ import annotations

import argparse
from typing import Any

from npmoe import plots, vision_plots
from npmoe.backends import Backend
from npmoe.training import (
    ImageData,
    RunFolder,
    TrainResult,
    VisionEvaluation,
    VisionTrainConfig,
    read_images,
    read_log,
    uci_digits,
    vision_recipe,
)
from npmoe.training.images import DIGITS
from npmoe.training.vision_recipe import DEFAULT_STEPS, ROUTINGS

OPTIONS = {"patch_size": "patch_size", "routing": "routing"}
SOURCES = ("images",)
UNIT, TOKENS = "image", "patches"
STEPS = DEFAULT_STEPS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this task."""
    vision = parser.add_argument_group(
        "vision",
        f"With --task vision, --steps is {DEFAULT_STEPS} by default, --layers 3 and "
        "--batch-size 64.",
    )
    vision.add_argument(
        "--images", metavar="DIR", help="folder with MNIST or CIFAR-10 files (the digits)"
    )
    vision.add_argument("--patch-size", type=int, metavar="P", help="(2 for the digits)")
    vision.add_argument("--routing", choices=list(ROUTINGS), help="(top_k)")


def load(options: argparse.Namespace, config: VisionTrainConfig | None) -> tuple[ImageData, str]:
    """Return the images and where they come from: an option, the run, or the digits."""
    source = DIGITS if config is None else config.data_source
    path = options.images or source
    data = uci_digits() if path == DIGITS else read_images(path)
    return data, data.source


def source_of(config: VisionTrainConfig) -> str:
    """Return where a run's images came from."""
    return config.data_source


def recipe(data: ImageData, _: str, **given: Any) -> VisionTrainConfig:
    """Return the config of a run."""
    return vision_recipe(data, **given)


def draw(
    config: VisionTrainConfig, folder: RunFolder, result: TrainResult, data: ImageData
) -> None:
    """Draw the curves, the confusion matrix and the patches of each expert."""
    evaluation = _evaluation(result)
    plots.plot_curves(read_log(folder.log), folder.curves, unit=f"nats per {UNIT}")
    vision_plots.plot_confusion(evaluation.confusion, folder.confusion)
    if config.model.moe is not None:
        vision_plots.plot_patches(
            evaluation, data.test.images, config.model.patch_size, folder.patches
        )


def summary(result: TrainResult) -> dict[str, Any]:
    """Return what this task adds to the summary."""
    return {"test_accuracy": _evaluation(result).accuracy}


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what this task prints first."""
    return [("test accuracy", f"{summary['test_accuracy']:.2%}")]


def print_sample(_: VisionTrainConfig, __: TrainResult, ___: Backend) -> None:
    """Print nothing: a classifier writes no samples."""


def _evaluation(result: TrainResult) -> VisionEvaluation:
    if not isinstance(result.evaluation, VisionEvaluation):
        raise AssertionError  # a finished vision run has one
    return result.evaluation
