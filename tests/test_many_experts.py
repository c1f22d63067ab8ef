"""2,048 experts and top-1: everything but the products and the router stays small."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

import npmoe
from npmoe import MoEConfig, MoEParams, ops
from npmoe.dispatch import plan_dispatch

CFG = MoEConfig(hidden_size=64, intermediate_size=256, num_experts=2048, top_k=1)


@pytest.fixture(scope="module")
def params() -> MoEParams:
    rng = np.random.default_rng(0)
    return MoEParams(
        router_weight=rng.standard_normal((2048, 64), np.float32),
        gate_up_proj=rng.standard_normal((2048, 512, 64), np.float32),
        down_proj=rng.standard_normal((2048, 64, 256), np.float32),
    )


def seconds(call: Callable[[], object]) -> float:
    """Return the shorter of two runs, in processor time."""
    runs = []
    for _ in range(2):
        start = time.process_time()
        call()
        runs.append(time.process_time() - start)
    return min(runs)


def test_plan_gather_and_combine_are_a_small_share(params: MoEParams) -> None:
    """Measured on 2 cores: 0.6 to 0.8 % of the forward pass; the bar is 15 %."""
    x = np.random.default_rng(0).standard_normal((16384, 64)).astype(np.float32)
    _, saved = npmoe.moe_forward(x, params, CFG)
    assert saved is not None
    plan, weights = saved.plan, saved.routing.topk_weights
    parts = (
        seconds(lambda: plan_dispatch(saved.routing.topk_ids, num_experts=2048))
        + seconds(lambda: ops.gather_rows(x, plan))
        + seconds(lambda: ops.combine_rows(x, plan, topk_weights=weights))
    )
    assert parts < 0.15 * seconds(lambda: npmoe.moe_forward(x, params, CFG))


def test_memory_beside_logits_and_probs_grows_with_the_tokens_alone(params: MoEParams) -> None:
    per_token = {}
    for num_tokens in (1024, 4096):
        x = np.random.default_rng(0).standard_normal((num_tokens, 64)).astype(np.float32)
        tracemalloc.start()
        try:
            _, saved = npmoe.moe_forward(x, params, CFG)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert saved is not None
        arrays = 2 * num_tokens * CFG.num_experts * 4  # logits and probs
        per_token[num_tokens] = (peak - arrays) / num_tokens
    # gate_up 2I, expert outputs H and the sum H in float32, ids, rows and the like.
    assert per_token[4096] < 4 * (2 * 256 + 2 * 64) + 512
    # What does not grow with T, such as one block of rows, is small.
    assert (per_token[1024] - per_token[4096]) * 1024 < 4e6
