"""Choices to be put into blocks, and one plan to be spoiled."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from npmoe import BlockPlan, validate_plan

OPTIONS = [
    ("vllm", False, "keep"),
    ("vllm", True, "keep"),
    ("vllm", True, "drop"),
    ("vllm_old_tail", False, "keep"),
    ("vllm_old_tail", True, "keep"),
    ("vllm_old_tail", True, "drop"),
    ("sglang", False, "keep"),
    ("sglang", True, "keep"),
    ("naive", False, "keep"),
]


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Experts with 0, 1, B-1, B, B+1 and 2B routes, ids that are none, and a map."""
    E = draw(st.sampled_from([1, 3, 4, 257, 1025]))
    B = draw(st.sampled_from([1, 2, 3, 4, 16]))
    K = draw(st.sampled_from([1, 2, 3, 8, 32]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if draw(st.integers(0, 9)) == 0:
        flat = np.empty(0, np.int64)
    else:
        some = rng.choice(E, size=min(E, 5), replace=False)
        flat = np.repeat(some, rng.choice([0, 1, B - 1, B, B + 1, 2 * B], size=some.shape))
        strange = rng.choice([-1, -1, -2, -(2**31), E, E + 1, 2**31 - 1], size=rng.integers(0, 4))
        flat = np.append(flat, strange)
        flat = np.append(flat, np.full(-flat.size % K, -1))
    ids = rng.permutation(flat).reshape(-1, K).astype(np.int32)
    numbers = rng.permutation(E)
    numbers[rng.random(E) < 0.4] = -1
    return {"topk_ids": ids, "block_size": B, "num_experts": E, "expert_map": numbers}


# Expert 0 has B routes, 1 none, 2 has B+1, 3 has one; routes 10 and 11 have no expert.
IDS = np.array([[2, 0], [2, 0], [0, 2], [0, 2], [2, 3], [-1, 4]], np.int32)
QUESTION: dict[str, Any] = {"topk_ids": IDS, "block_size": 4, "num_experts": 4}
N = IDS.size
RIGHT = [[1, 3, 4, 6], [0, 2, 5, 7], [8, N, N, N], [9, N, N, N]]
EXPERTS = [0, 2, 2, 3]


def build(
    rows: list[list[int]] = RIGHT,
    experts: list[int] = EXPERTS,
    post_padded: int | None = None,
    *,
    length: int = N + 4 * 3,
    blocks: int = 6,
    filler: int = N,
    tail: int = -1,
) -> BlockPlan:
    """Return a plan of given blocks, right but for what is given otherwise."""
    flat = [r for block in rows for r in block]
    post_padded = len(flat) if post_padded is None else post_padded
    return BlockPlan(
        np.array(flat + [filler] * (length - len(flat)), np.int32),
        np.array(experts + [tail] * (blocks - len(experts)), np.int32),
        np.array([post_padded], np.int32),
    )


def names(plan: Any, **changes: Any) -> set[str]:
    return {f.invariant for f in validate_plan(plan, **{**QUESTION, **changes})}


def texts(plan: Any, **changes: Any) -> list[str]:
    return [str(f) for f in validate_plan(plan, **{**QUESTION, **changes})]
