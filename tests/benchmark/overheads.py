"""What the Numba layer spends beside its products: its share, and how it grows with T and E.

Run as a script on a quiet machine: `PYTHONPATH=. python tests/benchmark/overheads.py`.
"""

# ruff: noqa: T201
from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

import npmoe

RNG = np.random.default_rng(0)
BACKEND = npmoe.get_backend("numba")


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def draw(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype("float32")


def compare_with_products(T: int, H: int, I: int, E: int, K: int, rounds: int = 15) -> str:
    """Time a layer, and its two products alone on the same rows, in turn."""
    cfg = npmoe.MoEConfig(hidden_size=H, intermediate_size=I, num_experts=E, top_k=K)
    params, x = npmoe.init_params(cfg), draw(T, H)
    _, saved = npmoe.moe_forward(x, params, cfg, BACKEND)
    plan = saved.plan
    rows, act = BACKEND.gather_rows(x, plan), draw(plan.num_rows, I)
    shares, layers = [], []
    for _ in range(rounds):
        layer, _ = seconds(lambda: npmoe.moe_forward(x, params, cfg, BACKEND, save=False))
        first, _ = seconds(lambda: BACKEND.grouped_gemm(rows, params.gate_up_proj, plan))
        second, _ = seconds(lambda: BACKEND.grouped_gemm(act, params.down_proj, plan))
        layers.append(layer)
        shares.append(1 - (first + second) / layer)
    quartiles = np.percentile(shares, (25, 50, 75)) * 100
    return (
        f"T={T} H={H} I={I} E={E} K={K}: layer {median(layers) * 1e3:.1f} ms, of which beside "
        f"the products {quartiles[1]:.1f} % (quartiles {quartiles[0]:.1f}, {quartiles[2]:.1f})"
    )


def time_parts(T: int, H: int, E: int, K: int = 2, *, router: bool) -> np.ndarray:
    """Return milliseconds of plan, gather, combine and, if wanted, router, once."""
    ids = RNG.integers(0, E, (T, K)).astype(np.int32)
    x, weights = draw(T, H), RNG.random((T, K)).astype("float32")
    plan_s, plan = seconds(lambda: BACKEND.plan_dispatch(ids, num_experts=E))
    gather_s, rows = seconds(lambda: BACKEND.gather_rows(x, plan))
    combine_s, _ = seconds(lambda: BACKEND.combine_rows(rows, plan, topk_weights=weights))
    found = [plan_s, gather_s, combine_s]
    if router:
        cfg = npmoe.MoEConfig(hidden_size=H, intermediate_size=8, num_experts=E, top_k=K)
        logits = draw(T, E)
        found.append(seconds(lambda: BACKEND.route(logits, cfg))[0])
    return np.array(found) * 1e3


def main() -> None:
    print(compare_with_products(4096, 512, 1024, 8, 2))
    print("\nT: microseconds per token of plan, gather, combine, router (H=64, E=8, K=2)")
    lengths = (1024, 2048, 4096, 8192, 16384)
    found = {T: [] for T in lengths}
    for _ in range(25):
        for T in lengths:
            found[T].append(time_parts(T, 64, 8, router=True) / T * 1e3)
    for T in lengths:
        print(f"{T:6}", np.median(found[T], axis=0).round(4), f"{sum(np.median(found[T], 0)):.3f}")
    for T, H in ((8192, 64), (8192, 128), (2048, 512)):
        print(f"\nE: plan + gather + combine, T={T} H={H} K=2, beside E=8 in the same round")
        times = {E: [] for E in (8, 64, 512, 4096)}
        for _ in range(25):
            for E, kept in times.items():
                kept.append(time_parts(T, H, E, router=False))
        base = np.array(times[8]).sum(1)
        for E, kept in times.items():
            ratio = median(np.array(kept).sum(1) / base)
            print(f"{E:6}", np.median(kept, axis=0).round(3), "ms, times", round(ratio, 2))


if __name__ == "__main__":
    main()
