"""Does the MoE pay? Equal tokens, equal active parameters, three seeds each.

Eight experts, two per token, against a dense model whose feed-forward is as wide as two experts
(and a little wider, to make up for the router). About three minutes per run on two cores.

    python examples/04_moe_vs_dense.py --out runs/moe_vs_dense
"""

import argparse
from pathlib import Path

from npmoe.training import (
    RunFolder,
    default_workers,
    language_recipe,
    python_topics_text,
    train,
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/moe_vs_dense", help="folder for the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=default_workers())
    options = parser.parse_args()
    text = python_topics_text()
    losses = {"moe": [], "dense": []}
    for seed in range(options.seeds):
        for name, values in losses.items():
            config = language_recipe(
                text, "pydoc_data.topics", steps=options.steps, seed=seed, dense=name == "dense"
            )
            folder = RunFolder.create(Path(options.out) / f"{name}-{seed}")
            result = train(config, text, folder, workers=options.workers)
            values.append(result.evaluation.loss)
            print(f"{name:5s} seed {seed}: validation loss {values[-1]:.4f}", flush=True)
    means = {name: sum(values) / len(values) for name, values in losses.items()}
    spread = max(max(v) - min(v) for v in losses.values())
    advantage = means["dense"] - means["moe"]
    print(f"mean: MoE {means['moe']:.4f}, dense {means['dense']:.4f} nats per character")
    print(f"advantage of the MoE {advantage:.4f}, largest seed spread {spread:.4f}: ", end="")
    print("it exceeds the spread" if advantage > spread else "it does NOT exceed the spread")


if __name__ == "__main__":
    main()
