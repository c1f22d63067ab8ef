"""The npmoe side of a parity case: run it and compare output, routing and every gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

import npmoe
from npmoe import naive

Case = dict[str, Any]
FLOAT64_BOUND = 1e-12  # upstream in float64 throughout; the worst seen is 1.4e-14
FLOAT32_BOUND = 5e-6  # upstream with its own float32 parts


def config_of(case: Case) -> npmoe.MoEConfig:
    """Make the configuration: the preset of the family plus the case's overrides."""
    return npmoe.preset(case["family"], **case["sizes"], **case["overrides"])


def check_close(name: str, ours: np.ndarray, theirs: np.ndarray, bound: float, floor: float = 0.0):
    """Fail unless the largest error is within bound times the largest reference value."""
    assert ours.shape == theirs.shape, f"{name}: shape {ours.shape}, upstream {theirs.shape}"
    if not theirs.size:
        return
    error = float(np.max(np.abs(ours - theirs)))
    limit = bound * max(float(np.max(np.abs(theirs))), floor)
    if not (error <= limit):
        raise AssertionError(f"{name}: error {error:.3g} above {limit:.3g}")


def by_id(ids: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort every row by expert id."""
    order = np.argsort(ids, axis=1, kind="stable")
    return np.take_along_axis(ids, order, 1), np.take_along_axis(weights, order, 1)


def constant_weights(cfg: npmoe.MoEConfig) -> bool:
    """Whether every weight is the same number, so that the router's gradient is pure rounding."""
    softmax_of_one = cfg.router_order == "topk_score" and cfg.score_fn == "softmax"
    return cfg.top_k == 1 and (cfg.renormalize or softmax_of_one)


def run_npmoe(case: Case, cfg: npmoe.MoEConfig, backend: str) -> tuple[Any, ...]:
    """Return output, ids (-1 where dropped), weights and gradients; "naive" is the definition."""
    params = npmoe.MoEParams(**case["params"])
    hidden, grad_output = case["hidden_states"], case["grad_output"]
    replayed = case["topk_ids"] if case["replay"] else None
    if backend == "naive":
        flat = hidden.reshape(-1, hidden.shape[-1])
        given = {"topk_ids": replayed, "sequence_length": hidden.shape[1]}
        result = naive.moe_forward(flat, params, cfg, **given)
        grads = naive.moe_backward(grad_output.reshape(flat.shape), flat, params, cfg, **given)
        grads = dataclasses.replace(grads, hidden_states=grads.hidden_states.reshape(hidden.shape))
        output, ids, kept = result.output.reshape(hidden.shape), result.topk_ids, result.kept
        return output, np.where(kept, ids, -1), result.topk_weights, grads
    if replayed is not None:
        replayed = replayed.reshape(*hidden.shape[:-1], -1)
    output, saved = npmoe.moe_forward(hidden, params, cfg, backend=backend, topk_ids=replayed)
    grads = npmoe.moe_backward(grad_output, saved, params)
    ids = saved.routing.topk_ids
    identity = ids >= cfg.num_experts  # these have no row in the plan and are never dropped
    ids = np.where((saved.plan.row_ids >= 0) | identity, ids, -1)
    return output, ids, saved.routing.topk_weights, grads


def check_case(
    case: Case, *, backend: str, bound: float, cfg: npmoe.MoEConfig | None = None
) -> None:
    """Compare one case with upstream; raise AssertionError naming the first difference."""
    cfg = cfg or config_of(case)
    output, ids, weights, grads = run_npmoe(case, cfg, backend)
    ids, weights = by_id(ids, weights)
    upstream_ids, upstream_weights = by_id(case["topk_ids"], case["topk_weights"])
    assert np.array_equal(ids, upstream_ids), f"topk_ids: {ids}, upstream {upstream_ids}"
    kept = ids >= 0
    check_close("topk_weights", weights[kept], upstream_weights[kept], bound)
    check_close("output", output, case["output"], bound)
    for name, theirs, ours in gradients(case, grads):
        pure_rounding = name in ("router_weight", "router_bias") and constant_weights(cfg)
        floor = 1.0 if pure_rounding else 0.0
        check_close(f"grad {name}", ours, theirs, bound, floor)


def gradients(case: Case, grads: Any) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Pair upstream's gradients with ours; a gradient that only one side has is an error."""
    names = {n for n in (*case["params"], "hidden_states") if n != "selection_bias"}
    assert set(case["grads"]) == names, f"upstream has {set(case['grads'])}, parameters {names}"
    assert grads.selection_bias is None
    for name in sorted(names):
        yield name, case["grads"][name], getattr(grads, name)
