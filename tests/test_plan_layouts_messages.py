"""What the conversions of plans say of contradictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from npmoe.dispatch import plan_dispatch
from npmoe.errors import DTypeError, PlanError, RangeError, ShapeError
from npmoe.plans.layouts import (
    MegaBlocksPlan,
    from_group_sizes,
    from_megablocks,
    from_scattermoe,
    from_sonic,
    from_torch_offsets,
    to_megablocks,
    to_scattermoe,
    to_sonic,
)
from npmoe.plans.tables import (
    from_blocks,
    from_capacity_slots,
    from_routing_map,
    from_routing_probs,
    to_blocks,
    to_routing_map,
    to_routing_probs,
)

EXAMPLE = np.array([[2, 0], [2, 1], [0, 2]], np.int32)
PLAN = plan_dispatch(EXAMPLE, num_experts=4)
SIZES = {"num_tokens": 3, "top_k": 2}

MEGA, SCATTER, SONIC = to_megablocks(PLAN), to_scattermoe(PLAN), to_sonic(PLAN)
BLOCKS = to_blocks(PLAN, block_size=2)
I32 = np.int32


def changed(layout: Any, field: str, at: int, value: int) -> Any:
    array = getattr(layout, field).copy()
    array[at] = value
    return layout._replace(**{field: array})


CONTRADICTIONS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: from_megablocks(changed(MEGA, "indices", 0, 6), **SIZES),
        PlanError,
        "from_megablocks: the routes of rows must lie in 0..5, got 6.",
    ),
    (
        lambda: from_megablocks(changed(MEGA, "indices", 0, -1), **SIZES),
        PlanError,
        "from_megablocks: the routes of rows must lie in 0..5, got -1.",
    ),
    (
        lambda: from_megablocks(changed(MEGA, "indices", 0, 4), **SIZES),
        PlanError,
        "from_megablocks: the routes of rows must be distinct, got 4 twice.",
    ),
    (
        lambda: from_megablocks(changed(MEGA, "bins", 0, 4), **SIZES),
        PlanError,
        "from_megablocks: bins must not fall below 0 or what is before, got [0 4 3 6 6].",
    ),
    (
        lambda: from_megablocks(changed(MEGA, "bins", 3, 7), **SIZES),
        PlanError,
        "from_megablocks: bins must end at the number of rows 6, got 7.",
    ),
    (
        lambda: from_megablocks(changed(MEGA, "bin_ids", 1, 1), **SIZES),
        PlanError,
        "from_megablocks: bin_ids must be [0, 0, 1, 2, 2, 2], got [0, 1, 1, 2, 2, 2]. It is bound "
        "by the offsets.",
    ),
    (
        lambda: from_megablocks(MEGA._replace(indices=MEGA.indices * 1.0), **SIZES),
        DTypeError,
        "from_megablocks: the routes of rows must be an integer array, got float64.",
    ),
    (
        lambda: from_megablocks(MegaBlocksPlan(*(a[None] for a in MEGA)), **SIZES),
        ShapeError,
        "from_megablocks: bins must have shape (R,) = (R,), got (1, 4).",
    ),
    (
        lambda: from_scattermoe(changed(SCATTER, "sorted_expert_idxs", 5, 3), **SIZES),
        PlanError,
        "from_scattermoe: sorted_expert_idxs must be [0, 0, 1, 2, 2, 2], got [0, 0, 1, 2, 2, 3]. "
        "It is bound by the offsets.",
    ),
    (
        lambda: from_sonic(changed(SONIC, "x_gather_idx", 0, 1)),
        PlanError,
        "from_sonic: x_gather_idx must be [0, 2, 1, 0, 1, 2], got [1, 2, 1, 0, 1, 2]. It is bound "
        "by s_scatter_idx.",
    ),
    (
        lambda: from_sonic(changed(SONIC, "s_reverse_scatter_idx", 0, 1)),
        PlanError,
        "from_sonic: s_reverse_scatter_idx must be [3, 0, 4, 2, 1, 5], got [1, 0, 4, 2, 1, 5]. It "
        "is bound by s_scatter_idx.",
    ),
    (
        lambda: from_sonic(SONIC._replace(s_scatter_idx=np.array([1, 4, 3, 0, 2], I32))),
        PlanError,
        "from_sonic: x_gather_idx must be [0, 2, 1, 0, 1], got [0, 2, 1, 0, 1, 2]. It is bound by "
        "s_scatter_idx.",
    ),
    (
        lambda: from_sonic(changed(SONIC, "s_scatter_idx", 0, 0)),
        PlanError,
        "from_sonic: s_scatter_idx must be distinct, got 0 twice.",
    ),
    (
        lambda: from_sonic(changed(SONIC, "num_activated_expert_per_token_offset", 0, 1)),
        PlanError,
        "from_sonic: num_activated_expert_per_token_offset must not fall below 0 or what is "
        "before, got [1 2 4 6].",
    ),
    (
        lambda: from_sonic(changed(SONIC, "expert_frequency_offset", 4, 7)),
        PlanError,
        "from_sonic: expert_frequency_offset must end at the number of rows 6, got 7.",
    ),
    (
        lambda: from_sonic(SONIC, top_k=1),
        PlanError,
        "from_sonic: top_k must be at least 2, got 1. A token has so many experts.",
    ),
    (
        lambda: from_torch_offsets(np.array([2, 1]), PLAN.pair_ids, **SIZES),
        PlanError,
        "from_torch_offsets: offsets must not fall below 0 or what is before, got [0 2 1].",
    ),
    (
        lambda: from_group_sizes(np.array([2, -1, 5]), PLAN.pair_ids, **SIZES),
        PlanError,
        "from_group_sizes: group_sizes must not fall below 0 or what is before, got [0 2 1 6].",
    ),
    (
        lambda: from_group_sizes(np.array([2, 1]), PLAN.pair_ids, **SIZES),
        PlanError,
        "from_group_sizes: group_sizes must end at the number of rows 6, got 3.",
    ),
    (
        lambda: to_megablocks(PLAN, block_size=0),
        RangeError,
        "to_megablocks: block_size must be at least 1, got 0.",
    ),
    (
        lambda: to_blocks(PLAN, block_size=2, dialect="sgl"),
        RangeError,
        "to_blocks: dialect must be one of vllm, vllm_old_tail, sglang, naive, got 'sgl'.",
    ),
    (
        lambda: to_blocks(PLAN, block_size=2**30),
        PlanError,
        "to_blocks: block_size must leave fewer than 2**31 rows, got 4294967298. Split the batch.",
    ),
    (
        lambda: to_blocks(PLAN, block_size=2**30, dialect="naive"),
        PlanError,
        "to_blocks: block_size must leave fewer than 2**31 rows, got 6442450944. Split the batch.",
    ),
    (
        lambda: from_blocks(BLOCKS, block_size=2, num_experts=2, **SIZES),
        PlanError,
        "from_blocks: expert_ids must lie in -1..1, got 0..2.",
    ),
    (
        lambda: from_blocks(
            changed(BLOCKS, "num_tokens_post_padded", 0, 7), block_size=2, num_experts=4, **SIZES
        ),
        PlanError,
        "from_blocks: num_tokens_post_padded must be whole blocks of 2 in both arrays, got 7.",
    ),
    (
        lambda: from_blocks(
            changed(BLOCKS, "num_tokens_post_padded", 0, 70), block_size=2, num_experts=4, **SIZES
        ),
        PlanError,
        "from_blocks: num_tokens_post_padded must be whole blocks of 2 in both arrays, got 70.",
    ),
    (
        lambda: from_blocks(
            changed(BLOCKS, "sorted_token_ids", 0, 4), block_size=2, num_experts=4, **SIZES
        ),
        PlanError,
        "from_blocks: the routes of rows must be distinct, got 4 twice.",
    ),
    (
        lambda: from_blocks(
            to_blocks(PLAN, block_size=2, dialect="naive"),
            block_size=2,
            num_experts=4,
            num_tokens=4,
            top_k=2,
        ),
        PlanError,
        "from_blocks: expert_ids must have 8 entries, one for each route, got 6.",
    ),
    (
        lambda: to_routing_map(plan_dispatch(np.array([[1, 1]], I32), num_experts=2)),
        PlanError,
        "to_routing_map: plan must give a token each expert once, got 2 rows for 1 pairs.",
    ),
    (
        lambda: from_routing_map(np.ones((2, 3), bool), top_k=2),
        PlanError,
        "from_routing_map: top_k must be at least 3, got 2. A token has so many experts.",
    ),
    (
        lambda: from_routing_map(np.ones(3, bool)),
        ShapeError,
        "from_routing_map: routing_map must have shape (T, E) = (T, E), got (3,).",
    ),
    (
        lambda: to_routing_probs(PLAN, np.ones((3, 3))),
        ShapeError,
        "to_routing_probs: topk_weights must have shape (T, K) = (3, 2), got (3, 3). T, K are "
        "bound by the plan.",
    ),
    (
        lambda: from_routing_probs(np.ones((3, 3)), PLAN),
        ShapeError,
        "from_routing_probs: probs must have shape (T, E) = (3, 4), got (3, 3). T, E are bound by "
        "the plan.",
    ),
    (
        lambda: from_capacity_slots(np.zeros((1, 2), int), num_tokens=1, top_k=1),
        ShapeError,
        "from_capacity_slots: table must have shape (S, E, C), got (1, 2). S is 1 without "
        "sequences.",
    ),
    (
        lambda: from_capacity_slots(np.zeros((1, 1, 1)), num_tokens=1, top_k=1),
        DTypeError,
        "from_capacity_slots: table must be an integer array, got float64.",
    ),
    (
        lambda: from_capacity_slots(np.array([[[0, 0]]]), num_tokens=1, top_k=1),
        PlanError,
        "from_capacity_slots: the routes of rows must be distinct, got 0 twice.",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), CONTRADICTIONS)
def test_contradictions(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def test_a_long_array_is_shortened_in_a_message() -> None:
    ids = np.zeros((40, 1), I32)
    layout = to_scattermoe(plan_dispatch(ids, num_experts=2))
    with pytest.raises(PlanError, match=r"must be \[0, 0, 0, 0, \.\.\., 0, 0, 0, 0\], got \[1, 0"):
        from_scattermoe(changed(layout, "sorted_expert_idxs", 0, 1), num_tokens=40, top_k=1)
