"""Upcycle a dense checkpoint: the same function with experts, trained on from there.

A dense language model is trained, each of its feed-forward layers is cut in two and copied four
times into eight experts of which every token takes two: as much work per token as before. The
upcycled model starts where the dense one ended, and is then trained for the same number of steps
as the dense one again, and as an MoE drawn at random (Komatsuzaki et al. 2023; He et al. 2024).

    python examples/09_sparse_upcycling.py --out runs/upcycling
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from npmoe.craft import upcycle_model
from npmoe.models import language_forward
from npmoe.training import (
    CharVocabulary,
    RunFolder,
    default_workers,
    evaluate,
    language_recipe,
    load_trained,
    python_topics_text,
    split_text,
    train,
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/upcycling", help="folder for the runs")
    parser.add_argument("--steps", type=int, default=300, help="before, and again after")
    parser.add_argument("--workers", type=int, default=default_workers())
    options = parser.parse_args()
    text = python_topics_text()
    recipe = language_recipe(
        text, "pydoc_data.topics", steps=options.steps, num_layers=2, context_length=64
    )
    moe = replace(recipe.model.moe, intermediate_size=64)
    dense_model = replace(
        recipe.model, moe=None, dense_intermediate_size=128, activation=moe.activation
    )

    def run(name, model, initial=None):
        config = replace(recipe, model=model, seed=int(initial is not None))
        folder = RunFolder.create(Path(options.out) / name)
        train(config, text, folder, workers=options.workers, initial=initial)
        return load_trained(folder)[1]

    _, held_out = split_text(
        CharVocabulary(recipe.characters).encode(text), dense_model.context_length
    )

    def report(name, params, model):
        print(f"{name:34} validation loss {evaluate(params, model, held_out).loss:.4f}", flush=True)

    dense = run("dense", dense_model)
    sparse, sparse_model = upcycle_model(dense, dense_model, moe)
    ids = held_out[: 4 * 64].reshape(4, 64)
    before, _ = language_forward(ids, dense, dense_model)
    after, _ = language_forward(ids, sparse, sparse_model)
    difference = np.abs(after - before).max() / np.abs(before).max()
    print(f"logits after upcycling differ by {difference:.1e} of the largest (float32: 1.2e-07)")
    report("dense", dense, dense_model)
    report("upcycled, not trained", sparse, sparse_model)
    report("dense, trained again", run("again", dense_model, dense), dense_model)
    report("upcycled, trained", run("upcycled", sparse_model, sparse), sparse_model)
    report("MoE drawn at random, as long", run("scratch", sparse_model), sparse_model)


if __name__ == "__main__":
    main()
