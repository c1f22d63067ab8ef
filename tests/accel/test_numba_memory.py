"""What a training step takes beside its inputs and results, against the analytic count."""

# ruff: noqa: E402  # imports follow what they need
from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from needs import need_numba

need_numba()

import npmoe
from npmoe import MoEConfig, MoEGrads

# T, H, I, E, K
SIZES = {
    "medium": (512, 128, 256, 8, 2),
    "many experts": (512, 128, 64, 64, 8),
    "wide": (1024, 256, 512, 8, 2),
    "too large to be kept": (2048, 512, 768, 8, 2),
}


def extra_floats(size: tuple[int, ...], dtype: str = "float32", **options: Any) -> dict[str, float]:
    """Return the peak of a forward and backward pass beyond what it returns, and the count.

    In numbers of the dtype. Gradients of parameters are the caller's arrays; scratch has grown.
    Temporary arrays are made anew, the backward pass's after the forward pass's.
    """
    T, H, I, E, K = size
    cfg = MoEConfig(hidden_size=H, intermediate_size=I, num_experts=E, top_k=K)
    params = npmoe.init_params(cfg, dtype=dtype)
    rng = np.random.default_rng(0)
    x, grad = (rng.standard_normal((T, H)).astype(dtype) for _ in range(2))
    backend = npmoe.get_backend("numba", num_threads=2, **options)
    _, saved = npmoe.moe_forward(x, params, cfg, backend)
    out = npmoe.moe_backward(grad, saved, params).params()
    del saved
    backend.release()
    tracemalloc.start()
    try:
        output, saved = npmoe.moe_forward(x, params, cfg, backend)
        grads = npmoe.moe_backward(grad, saved, params, out=out)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    routing, plan = saved.routing, saved.plan
    for name in MoEGrads.__dataclass_fields__:
        value = getattr(grads, name)
        assert name == "hidden_states" or value is getattr(out, name)
    del output  # which the count has, like the gradient of the input
    returned = [getattr(routing, n) for n in type(routing).__dataclass_fields__]
    returned += [getattr(plan, n) for n in type(plan).__dataclass_fields__]
    arrays = {id(a): a.nbytes for a in returned if isinstance(a, np.ndarray)}
    item = np.dtype(dtype).itemsize
    kept = sum(memory.nbytes for memory in backend._engines[np.dtype(dtype)]._kept)
    backend.release()
    assert not backend._engines[np.dtype(dtype)]._kept
    rows = plan.num_rows
    most = int(plan.tokens_per_expert.max())
    return {
        "extra": (peak - sum(arrays.values())) / item,
        "count": 2 * I * rows + H * rows + 2 * H * T + most * (3 * I + H),
        "gate_up": 2 * I * rows,
        "kept": kept / item,
    }


@pytest.mark.parametrize("name", SIZES)
def test_extra_memory_of_a_training_step(name: str) -> None:
    found = extra_floats(SIZES[name])
    # What small calls keep for the next one stands beside the end of the backward pass.
    assert found["extra"] <= 1.1 * found["count"] + found["kept"], found
    assert found["kept"] * 4 <= 2**22
    assert (found["kept"] == 0) == (name == "too large to be kept")
    assert found["extra"] > found["gate_up"]  # it is saved: less cannot have been measured


def test_scratch_is_kept_between_calls_and_does_not_grow() -> None:
    backend = npmoe.get_backend("numba", num_threads=2)
    cfg = MoEConfig(hidden_size=64, intermediate_size=96, num_experts=4, top_k=2)
    params = npmoe.init_params(cfg)
    x = np.ones((300, 64), np.float32)
    team = backend._engines[x.dtype].team
    sizes = []
    for _ in range(3):
        _, saved = npmoe.moe_forward(x, params, cfg, backend)
        npmoe.moe_backward(x, saved, params)
        sizes.append({k: v.shape for k, v in team._scratch.items()})
    assert sizes[0] == sizes[1] == sizes[2]
