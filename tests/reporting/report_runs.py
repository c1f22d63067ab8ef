"""Runs with known logs, for the tests of the report."""

from __future__ import annotations

import numpy as np

from npmoe.training import JsonlLog, RunFolder, language_recipe
from npmoe.training.log import specialisation

TEXT = "The quick brown fox jumps over 12 lazy dogs;\n" * 30
LAYERS, EXPERTS = 2, 4


def records(steps=range(10, 51, 10)):
    """Return a complete log: expert 3 of layer 1 dies after step 20, layer 0 drops a quarter."""
    rng = np.random.default_rng(0)
    for step in steps:
        chosen = np.array([[40, 30, 20, 10], [50, 25, 25, 0 if step > 20 else 8]])
        kept = np.minimum(chosen, [[25], [100]])
        record = {
            "step": step,
            "cross_entropy": 3.0 - step / 100,
            "auxiliary": 0.1,
            "learning_rate": 1e-3,
            "grad_norm": float(np.exp(rng.standard_normal())),
            "drop_rate": float(1 - kept.sum() / chosen.sum()),
            "load_imbalance": 0.8,
            "tokens_per_expert": chosen,
            "kept_per_expert": kept,
            "router_entropy": np.array([1.25, 0.5]),
            "selection_bias_range": np.array([[-0.1, 0.2], [-0.3, 0.4]]) * step,
            "tokens_per_second": 1000.0,
        }
        if step % 20 == 0:
            served = np.arange(LAYERS * 3 * EXPERTS).reshape(LAYERS, 3, EXPERTS)
            record["val_loss"] = 2.5
            record["specialisation"] = specialisation(served, ["lower", "upper", "digit"])
        yield record


def make_run(path, content, *, steps=50, **options) -> RunFolder:
    """Write a run's config and log."""
    config = language_recipe(
        TEXT, "text.txt", steps=steps, num_experts=EXPERTS, num_layers=LAYERS, **options
    )
    folder = RunFolder.create(path)
    folder.config.write_text(config.to_json(), encoding="utf-8")
    log = JsonlLog(folder.log)
    for record in content:
        log.append(record)
    return folder


def without(content, *names):
    """Drop fields, as older logs do."""
    return ({k: v for k, v in r.items() if k not in names} for r in content)
