"""Balancing by a selection bias, by an auxiliary loss, and not at all: MaxVio over the steps.

Trains the default language model three times, draws how far the busiest expert of each step is
above the mean (MaxVio, mean over layers), and prints what each way costs in validation loss. The
loss reaches the router's gradient; the bias (Wang et al., 2024, arXiv:2408.15664, algorithm 1)
moves after each step and only changes which experts are chosen.

    python examples/13_selection_bias.py --out runs/selection_bias
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from npmoe.stats import max_violation
from npmoe.training import (
    RunFolder,
    default_workers,
    language_recipe,
    python_topics_text,
    read_log,
    train,
    with_options,
)

WAYS = {"loss": "auxiliary loss", "bias": "selection bias", "none": "neither"}
LAST = 100  # steps that count as the end of a run


def smooth(values, width):
    """Return means over up to `width` neighbours."""
    ones = np.ones(min(width, len(values)))
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def draw(logs, path):
    """Draw MaxVio over the steps, every logged step thin and their mean over 100 steps thick."""
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    colours = ("tab:orange", "tab:blue", "tab:gray")
    for colour, (name, records) in zip(colours, logs.items(), strict=True):
        steps = [r["step"] for r in records]
        values = [r["load_imbalance"] for r in records]
        axis.plot(steps, values, color=colour, lw=0.6, alpha=0.4)
        axis.plot(steps, smooth(values, 10), color=colour, lw=2, label=WAYS[name])
    axis.axhline(0.2, color="black", lw=0.8, ls=":")
    axis.set(xlabel="step", ylabel="MaxVio of a step", yscale="log")
    axis.set_title("How far the busiest expert is above the mean")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/selection_bias", help="folder for runs and picture")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--workers", type=int, default=default_workers())
    options = parser.parse_args()
    out = Path(options.out)
    text = python_topics_text()
    logs = {}
    for name, title in WAYS.items():
        config = language_recipe(text, "pydoc_data.topics", steps=options.steps)
        folder = RunFolder.create(out / name)
        loss = train(
            with_options(config, balance=name), text, folder, workers=options.workers
        ).evaluation.loss
        logs[name] = records = [r for r in read_log(folder.log) if "step" in r]
        last = [r for r in records if r["step"] > options.steps - LAST]
        together = np.sum([r["tokens_per_expert"] for r in last], axis=0)
        print(
            f"{title:15} validation loss {loss:.4f}, in the last {LAST} steps "
            f"MaxVio of a step {np.mean([r['load_imbalance'] for r in last]):.3f}, "
            f"of all of them together {np.mean([max_violation(c) for c in together]):.3f}",
            flush=True,
        )
    draw(logs, out / "selection_bias.png")
    print(f"picture: {out / 'selection_bias.png'}")


if __name__ == "__main__":
    main()
