"""The validator on garbage, which it names and never chokes on, and the words it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from block_problems import EXPERTS, IDS, QUESTION, RIGHT, N, build, names, problems, texts
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from npmoe import align_block_size, validate_batched_plan, validate_plan
from npmoe.errors import DTypeError, PlanError, RangeError, ShapeError
from npmoe.plans.validation import INVARIANTS

GARBAGE = (
    hnp.arrays(
        st.sampled_from(
            ["i1", "u1", "i2", "i4", "i8", "u8", "f2", "f4", "f8", "?", "c8", "O", "U2"]
        ),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=30),
    )
    | hnp.arrays(
        np.float64,
        st.integers(0, 30),
        elements=st.sampled_from([np.nan, np.inf, -np.inf, 1e300, 2.0**62, 2.0**63, 0.5, 3.0, -1]),
    )
    | hnp.arrays(np.int32, st.integers(0, 30), elements=st.integers(-3, 15))
    | st.none()
    | st.text(max_size=3)
    | st.recursive(st.integers() | st.floats(), st.lists, max_leaves=6)
)


@given(plan=st.tuples(GARBAGE, GARBAGE, GARBAGE), question=problems(), mapped=st.booleans())
def test_garbage_is_named_and_never_raises(
    plan: Any, question: dict[str, Any], mapped: bool
) -> None:
    question = question if mapped else {**question, "expert_map": None}
    for dialect in ("vllm", "sglang") if mapped else ("vllm", "vllm_old_tail", "sglang", "naive"):
        options = {**question, "dialect": dialect}
        found = validate_plan(plan, **options, strict_tail=True, stable=True)
        assert {f.invariant for f in found} <= set(INVARIANTS)
        if question["topk_ids"].size:
            assert found
    counted = {"tokens_per_expert": [2, 0, 5], "max_tokens": 5, "block_size": 2}
    assert validate_batched_plan(plan, **counted, strict_tail=True, stable=True)


@given(entry=GARBAGE, part=st.integers(0, 2))
def test_one_part_of_a_right_plan_is_garbage(entry: Any, part: int) -> None:
    parts: list[Any] = list(build())
    parts[part] = entry
    names(parts, strict_tail=True, stable=True)
    assert names(parts, strict_tail=True, stable=True)


class NoArray:
    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise RuntimeError("on another device")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (None, "got NoneType."),
        (7, "got int."),
        ((), "got 0 parts."),
        ([1, 2], "got 2 parts."),
        ({"sorted_token_ids": 1}, "got dict."),
    ],
)
def test_what_is_no_plan(plan: Any, message: str) -> None:
    wanted = "I7: the plan must be sorted_token_ids, expert_ids, num_tokens_post_padded, "
    assert texts(plan) == texts(plan, dialect="naive") == [wanted + message]


@pytest.mark.parametrize(
    ("plan", "lines"),
    [
        (
            build([*RIGHT[:2], [9, 8, N, N], [1, N, N, 7]]),
            [
                "I1: route 1 (token 0, slot 1; expert id 0) is in rows 0 and 12 (1 more like it).",
                "I2: row 15 (block 3) holds route 7 (token 3, slot 1; expert id 2) behind padding.",
                "I3: block 2 is of expert 3, but its row 9 holds route 8 (token 4, slot 0; expert "
                "id 2), of expert 2 (1 more like it).",
                "I3: expert_ids[2] must be 3, since block 2 holds route 9 (token 4, slot 1; expert "
                "id 3), got 2 (1 more like it).",
            ],
        ),
        (
            build([RIGHT[i] for i in (3, 1, 2, 0)], EXPERTS[::-1]),
            ["I5: block 1 is of expert 2, behind block 0 of expert 3 (1 more like it)."],
        ),
        (
            build([*RIGHT[:3], [11, -5, N, N]]),
            [
                "I1: route 9 (token 4, slot 1; expert id 3) is in no block.",
                "I1: route 11 (token 5, slot 1; expert id 4) must be in no block, but is in row "
                "12.",
                "I2: row 13 (block 3) holds -5, neither a route (0..11) nor the sentinel 12.",
            ],
        ),
        (
            build([RIGHT[0], [N] * 4, *RIGHT[1:]], [0, 1, 2, 2, 3]),
            [
                "I4: num_tokens_post_padded must be 16, for 4 blocks of 4, got 20.",
                "I6: block 1 holds no route, with expert_ids[1] = 1.",
            ],
        ),
        (
            build([[1, 3, N, N], [4, 6, N, N], *RIGHT[1:]], [0, 0, 2, 2, 3]),
            [
                "I4: num_tokens_post_padded must be 16, for 4 blocks of 4, got 20.",
                "I6: expert 0 has 2 blocks with routes, and needs 1.",
            ],
        ),
        (
            (NoArray(), np.zeros(6, "f4"), [[16]]),
            [
                "I7: sorted_token_ids must be an int32 array, got NoArray (on another device).",
                "I7: expert_ids must have dtype int32, got float32.",
                "I7: num_tokens_post_padded must have dtype int32, got int64.",
                "I7: num_tokens_post_padded must have one axis, got shape (1, 1).",
            ],
        ),
        (
            build()._replace(sorted_token_ids=np.array([1, np.nan, 4, 6, *[0.5] * 20])),
            [
                "I7: sorted_token_ids must have dtype int32, got float64.",
                "I7: sorted_token_ids[1] must be an int32, got nan (20 more like it).",
                "I1: route 0 (token 0, slot 0; expert id 2) is in no block (6 more like it).",
                "I2: row 1 (block 0) holds no integer, neither a route (0..11) nor the sentinel 12 "
                "(12 more like it).",
                "I2: row 2 (block 0) holds route 4 (token 2, slot 0; expert id 0) behind padding "
                "(1 more like it).",
                "I6: block 1 holds no route, with expert_ids[1] = 2 (2 more like it).",
                "tail: sorted_token_ids[16] must be 12, got no integer (7 more like it).",
            ],
        ),
        (
            build([[4, 3, 1, 6], *RIGHT[1:]], filler=0, tail=5),
            [
                "I8: row 1 holds route 3 (token 1, slot 1; expert id 0), behind route 4 (token 2, "
                "slot 0; expert id 0) in row 0 (1 more like it).",
                "tail: sorted_token_ids[16] must be 12, got 0 (7 more like it).",
                "tail: expert_ids[4] must be -1, got 5 (1 more like it).",
            ],
        ),
    ],
)
def test_messages(plan: Any, lines: list[str]) -> None:
    assert texts(plan, strict_tail=True, stable=True) == lines


def test_an_integer_that_fits_no_int64_is_named() -> None:
    rows = np.array([2**63 + 1, *[N] * 23], np.uint64)
    assert texts(build()._replace(sorted_token_ids=rows))[:2] == [
        "I7: sorted_token_ids must have dtype int32, got uint64.",
        "I7: sorted_token_ids[0] must be an int32, got 9223372036854775809.",
    ]


def test_names_of_experts_under_a_map_and_of_filtered_routes() -> None:
    plan = align_block_size(**QUESTION, dialect="sglang")
    assert plan.sorted_token_ids is not None
    plan.sorted_token_ids[5] = 10  # was 3; 10 is the one route with id -1
    assert texts(plan, dialect="sglang") == [
        "I1: route 3 (token 1, slot 1; expert id 0) is in no block.",
        "I1: route 10 (token 5, slot 0; expert id -1) is in rows 0 and 5.",
        "I3: block 1 is of expert 0, but its row 5 holds route 10 (token 5, slot 0; expert id -1), "
        "of the routes without an expert here.",
    ]
    plan = align_block_size(**QUESTION, expert_map=[1, -1, -1, 0])
    plan.expert_ids[2] = 2
    assert texts(plan, expert_map=[1, -1, -1, 0]) == [
        "I3: expert_ids[2] must be -1, since block 2 holds route 8 (token 4, slot 0; expert id 2), "
        "got 2."
    ]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"topk_ids": IDS * 1.0}, DTypeError, "topk_ids must be an integer array, got float64."),
        ({"topk_ids": IDS[0]}, ShapeError, "topk_ids must have shape (T, K) = (T, K), got (2,)."),
        ({"block_size": 0}, RangeError, "block_size must be at least 1, got 0."),
        (
            {"dialect": "x"},
            RangeError,
            "dialect must be one of vllm, vllm_old_tail, sglang, naive, got 'x'.",
        ),
        (
            {"expert_map": [0, 0, 1, 2]},
            PlanError,
            "expert_map must give every expert its own number, got 0 for experts 0 and 1.",
        ),
    ],
)
def test_a_wrong_question_raises(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        validate_plan(build(), **{**QUESTION, **changes})
    assert str(caught.value) == f"validate_plan: {message}"


def test_a_wrong_batched_question_raises() -> None:
    with pytest.raises(PlanError) as caught:
        validate_batched_plan((), tokens_per_expert=[1, 5], max_tokens=4, block_size=2)
    assert str(caught.value) == (
        "validate_batched_plan: tokens_per_expert must lie in 0..4, got 1..5. The bound is "
        "max_tokens."
    )
