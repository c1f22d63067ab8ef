"""Handwritten digits: every way of routing, and a dense model of equal active parameters.

Trains each variant on the digits that come with npmoe (1,438 images, moved by up to one pixel) and
tests it on the other 359. About a minute per run on two cores.

    python examples/07_digits.py --out runs/digits
"""

import argparse
import os
import time
from pathlib import Path

from npmoe.training import RunFolder, Trainer, default_workers, train, uci_digits, vision_recipe
from npmoe.training.loop import single_threaded_blas

# Two experts of eight per patch, or as much work; top-1 does half of it, all experts four times.
VARIANTS = {
    "dense model": {"dense": True},
    "top-2": {},
    "top-1 (Switch)": {"top_k": 1, "capacity_factor": "1.25"},
    "batch priority": {"routing": "batch_priority"},
    "expert choice": {"routing": "expert_choice"},
    "soft": {"routing": "soft"},
    "all experts": {"routing": "dense"},
}
TIMED_STEPS = 10


def step_seconds(config, data):
    """Return processor seconds per step on one core, which a busy machine hardly changes."""
    trainer = Trainer(config, data.train)
    with single_threaded_blas():
        trainer.step()
        start = time.process_time()
        for _ in range(config.steps - 1):
            trainer.step()
    trainer.close()
    return (time.process_time() - start) / (config.steps - 1)


def processor_seconds():
    """Return what this process and the workers that have ended took."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def mean(values):
    return sum(values) / len(values)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/digits", help="folder for the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--workers", type=int, default=default_workers())
    options = parser.parse_args()
    data = uci_digits()
    rows = []
    for number, name in enumerate(options.variants):
        runs, seconds, parameters = [], [], 0
        for seed in range(options.seeds):
            config = vision_recipe(data, steps=options.steps, seed=seed, **VARIANTS[name])
            folder = RunFolder.create(Path(options.out) / f"{number}-{seed}")
            start, before = time.perf_counter(), processor_seconds()
            result = train(config, data, folder, workers=options.workers)
            seconds.append(time.perf_counter() - start)
            runs.append(result.evaluation)
            parameters = result.num_parameters
            print(
                f"{name}, seed {seed}: {runs[-1].accuracy:.2%} in {seconds[-1]:.0f} s, "
                f"{processor_seconds() - before:.0f} s of processors",
                flush=True,
            )
        timed = vision_recipe(data, steps=min(options.steps, TIMED_STEPS) + 1, **VARIANTS[name])
        rows.append(
            f"| {name} | {' '.join(f'{100 * r.accuracy:.2f}' for r in runs)} "
            f"| {100 * mean([r.accuracy for r in runs]):.2f} "
            f"| {mean([r.loss for r in runs]):.3f} "
            f"| {1000 * step_seconds(timed, data):.0f} "
            f"| {mean([r.drop_rate for r in runs]):.1%} "
            f"| {mean([r.load_imbalance for r in runs]):.2f} | {parameters:,} |"
        )
    print(
        "\n| | test accuracy % | mean | loss | CPU ms per step | dropped | imbalance | parameters |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
