"""Pictures of a run and of a routing (extra ``cli``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from npmoe._figures import new_figure as _figure
from npmoe._figures import save_figure as _save
from npmoe._typing import HostArray
from npmoe.block_plots import blocks_text, plot_blocks
from npmoe.routing_plots import plot_drops, plot_load, plot_routing
from npmoe.training.data import CHARACTER_CLASSES, character_class

__all__ = [
    "blocks_text",
    "plot_blocks",
    "plot_curves",
    "plot_drops",
    "plot_experts",
    "plot_load",
    "plot_routing",
]


def plot_curves(
    records: list[dict[str, Any]], path: str | Path, *, unit: str = "nats per character"
) -> None:
    """Draw loss, learning rate, load imbalance and drop rate over the steps of a log.

    Parameters
    ----------
    records : list of dict
        As `npmoe.training.read_log` returns them.
    path : path
        A PNG file.
    unit : str
        Of the loss.

    Raises
    ------
    BackendUnavailableError
        If matplotlib is not installed.
    CheckpointError
        If the file cannot be written; an earlier picture is intact.
    """
    figure, axes = _figure(2, 2, (10, 6.5))
    steps = [r["step"] for r in records]
    loss, rate, imbalance, drops = axes.ravel()
    loss.plot(steps, [r["cross_entropy"] for r in records], lw=1, label="training batch")
    evaluated = [r for r in records if "val_loss" in r]
    if evaluated:
        loss.plot(
            [r["step"] for r in evaluated],
            [r["val_loss"] for r in evaluated],
            "o-",
            label=f"validation (last {evaluated[-1]['val_loss']:.3f})",
        )
    loss.set(title="Loss", ylabel=unit)
    tested = [r for r in evaluated if "val_accuracy" in r]
    if tested:
        accuracy = loss.twinx()
        accuracy.set_zorder(-1)  # behind the legend
        loss.patch.set_visible(False)
        values = [100 * r["val_accuracy"] for r in tested]
        accuracy.plot([r["step"] for r in tested], values, "s--", color="tab:green")
        accuracy.set(ylabel=f"test accuracy % (green, last {values[-1]:.2f})")
    loss.legend(loc="center right" if tested else "best")
    rate.plot(steps, [r["learning_rate"] for r in records], color="tab:green")
    rate.set(title="Learning rate and gradient norm", ylabel="learning rate")
    norm = rate.twinx()
    norm.plot(steps, [r["grad_norm"] for r in records], lw=0.7, color="tab:gray")
    norm.set(ylabel="gradient norm (gray)", yscale="log")
    values = [r["load_imbalance"] for r in records]
    imbalance.plot(steps, values, color="tab:red")
    top = max(0.1, 1.05 * max(values, default=0.0))
    imbalance.set(title="Load imbalance", ylabel="MaxVio, mean over layers", ylim=(0, top))
    values = [100 * r["drop_rate"] for r in records]
    drops.plot(steps, values, color="tab:purple")
    top = max(1.0, 1.05 * max(values, default=0.0))
    drops.set(title="Dropped routes", ylabel="%", ylim=(0, top))
    for axis in axes.ravel():
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    _save(figure, path)


def plot_experts(
    records: list[dict[str, Any]], served: HostArray, characters: str, path: str | Path
) -> None:
    """Draw the load of every expert over time, and which character classes each one serves.

    One row of two panels per MoE layer: the share of choices of each expert at every logged step,
    and, over the validation text, how the choices for each class of characters are spread over
    the experts (rows sum to 1).

    Parameters
    ----------
    records : list of dict
        As `npmoe.training.read_log` returns them.
    served : (MoE layers, V, E) int array
        `Evaluation.served`.
    characters : str
        The vocabulary, in the order of its ids.
    path : path
        A PNG file.

    Raises
    ------
    BackendUnavailableError
        If matplotlib is not installed.
    CheckpointError
        If the file cannot be written; an earlier picture is intact.
    """
    layers, _, num_experts = served.shape
    class_ids = np.array([CHARACTER_CLASSES.index(character_class(c)) for c in characters])
    present = [c for c in range(len(CHARACTER_CLASSES)) if served[:, class_ids == c].any()]
    figure, axes = _figure(layers, 2, (11, 1.0 + 2.4 * layers))
    steps = np.array([r["step"] for r in records])
    load = np.array([r["tokens_per_expert"] for r in records], dtype=float)  # (N, layers, E)
    load /= np.maximum(load.sum(axis=2, keepdims=True), 1)
    for layer in range(layers):
        over_time, classes = axes[layer]
        image = over_time.imshow(
            load[:, layer].T,
            aspect="auto",
            vmin=0,
            vmax=max(2 / num_experts, float(load.max())),
            extent=(0, steps[-1], num_experts - 0.5, -0.5),
            interpolation="nearest",
        )
        over_time.set(title=f"MoE layer {layer}: share of choices", xlabel="step", ylabel="expert")
        figure.colorbar(image, ax=over_time)
        table = np.array([served[layer, class_ids == c].sum(axis=0) for c in present], dtype=float)
        table /= np.maximum(table.sum(axis=1, keepdims=True), 1)
        image = classes.imshow(table, aspect="auto", vmin=0, vmax=max(0.5, float(table.max())))
        classes.set(title=f"MoE layer {layer}: experts of each class", xlabel="expert")
        classes.set_yticks(range(len(present)), [CHARACTER_CLASSES[c] for c in present])
        figure.colorbar(image, ax=classes)
    _save(figure, path)
