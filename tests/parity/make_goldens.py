"""Write goldens/<family>.npz from the installed torch and transformers: python make_goldens.py.

A file holds one vector of all values and a description with shapes: one member per array would
double its size.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from families import FAMILIES
from parity_upstream import run_case

FOLDER = Path(__file__).parent / "goldens"
CANDIDATES, CHOSEN = 120, 3
GROUPS = ("params", "grads")
ARRAYS = ("hidden_states", "grad_output", "output", "topk_ids", "topk_weights")


def size_of(case: dict) -> int:
    return sum(a.size for group in GROUPS for a in case[group].values())


def traits(case: dict) -> set[str]:
    """Say which settings a case exercises; continuous ones do not count."""
    fields = case["overrides"]
    counted = {k: v for k, v in fields.items() if isinstance(v, bool | str) or k == "renorm_p"}
    for name in ("num_groups", "renorm_eps", "shared_intermediate_size", "router_bias"):
        counted[name] = fields.get(name, 0) > (1 if name == "num_groups" else 1e-6)
    counted["limited"] = fields.get("topk_group", 1) < fields.get("num_groups", 1)
    counted["several"] = case["sizes"]["top_k"] > 1
    return {f"{k}={v}" for k, v in counted.items()}


def choose(cases: list[dict]) -> list[dict]:
    """Pick the smaller cases that together exercise the most settings."""
    left = [c for c in cases if len(c["topk_ids"]) >= 4 and c["sizes"]["num_experts"] >= 3]
    left = sorted(left, key=size_of)[:30]
    chosen: list[dict] = []
    seen: set[str] = set()
    while len(chosen) < CHOSEN:
        best = max(left, key=lambda c: (len(traits(c) - seen), c["sizes"]["top_k"], -size_of(c)))
        left.remove(best)
        seen |= traits(best)
        chosen.append(best)
    return chosen


def flattened(case: dict) -> tuple[dict, list[np.ndarray]]:
    """Separate a case into a description with shapes, and its arrays in that order."""
    arrays = {key: case[key] for key in ARRAYS}
    for group in GROUPS:
        arrays |= {f"{group}/{key}": array for key, array in case[group].items()}
    plain = ("family", "seed", "sizes", "overrides", "replay", "drops")
    described = {key: case[key] for key in plain}
    described["shapes"] = {key: array.shape for key, array in arrays.items()}
    return described, [np.ravel(array).astype(np.float64) for array in arrays.values()]


def main() -> None:
    for name, family in FAMILIES.items():
        cases = choose([run_case(name, s, family.build, raised=True) for s in range(CANDIDATES)])
        described, arrays = zip(*map(flattened, cases), strict=True)
        about = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "cases": described,
        }
        np.savez_compressed(
            FOLDER / f"{name}.npz",
            about=np.array(json.dumps(about)),
            values=np.concatenate([a for case in arrays for a in case]),
        )


if __name__ == "__main__":
    main()
