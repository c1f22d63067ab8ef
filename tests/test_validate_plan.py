"""The validator: right plans pass, and every mistake is found under its own name.

Mistakes are planted in a plain builder of plans, so that each is one that a kernel could make.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from block_problems import EXPERTS, IDS, OPTIONS, QUESTION, RIGHT, N, build, names, problems, texts
from hypothesis import given
from hypothesis import strategies as st

import npmoe
from npmoe import naive, validate_batched_plan, validate_plan
from npmoe.naive import blocks as definition
from npmoe.plans.blocks import BlockPlan, align_block_size, align_block_size_batched
from npmoe.plans.validation import INVARIANTS


def test_the_builder_builds_the_right_plan() -> None:
    right, ours = build(), align_block_size(**QUESTION)
    for a, b in zip(right, ours, strict=True):
        np.testing.assert_array_equal(a, b)
    assert validate_plan(right, **QUESTION, strict_tail=True, stable=True) == []
    assert list(INVARIANTS) == [*(f"I{i}" for i in range(1, 9)), "tail"]


@pytest.mark.parametrize(("dialect", "mapped", "invalid"), OPTIONS)
@given(problem=problems(), padded=st.booleans())
def test_right_plans_have_no_findings(
    dialect: Any, mapped: bool, invalid: Any, problem: dict[str, Any], padded: bool
) -> None:
    question = {**problem, "dialect": dialect, "invalid": invalid, "pad_sorted_ids": padded}
    if not mapped:
        question["expert_map"] = None
    rows, experts, post_padded = definition.align_block_size(**question)
    plan = (
        None if rows is None else np.array(rows, np.int32),
        np.array(experts, np.int32),
        np.array([post_padded], np.int32),
    )
    assert validate_plan(plan, **question, strict_tail=True, stable=True) == []
    assert validate_plan(list(plan), **question) == []
    if not mapped and dialect != "naive" and len(experts) > post_padded // problem["block_size"]:
        other = "vllm" if dialect == "vllm_old_tail" else "vllm_old_tail"
        if dialect != "sglang":
            question["dialect"] = other
            assert validate_plan(plan, **question, stable=True) == []
            (finding,) = validate_plan(plan, **question, strict_tail=True)
            assert finding.invariant == "tail"


@given(
    counts=st.lists(st.integers(0, 9), max_size=6),
    more=st.integers(0, 4),
    block_size=st.integers(1, 5),
)
def test_right_batched_plans_have_no_findings(
    counts: list[int], more: int, block_size: int
) -> None:
    question: dict[str, Any] = {
        "tokens_per_expert": np.array(counts, np.int64),
        "max_tokens": max([1, *counts]) + more,
        "block_size": block_size,
    }
    plan = align_block_size_batched(**question)
    assert validate_batched_plan(plan, **question, strict_tail=True, stable=True) == []


def faults() -> dict[str, tuple[BlockPlan, set[str]]]:
    """Return plans that are wrong in one way each, and the invariants that are broken."""
    sentinel = {s: [[s if r == N else r for r in block] for block in RIGHT] for s in (-1, 0, 9, 13)}
    idle = [N] * 4
    rows, post = RIGHT, 16
    swapped = [[1, 3, 4, 6], [9, 2, 5, 7], [8, N, N, N], [0, N, N, N]]
    tokens = [[r if r == N else r // 2 for r in block] for block in RIGHT]
    return {
        "K35 the sentinel is -1": (build(sentinel[-1], filler=-1), {"I2"}),
        "K35 the sentinel is 0": (build(sentinel[0], filler=0), {"I1", "I3"}),
        "K35 the sentinel is a route": (build(sentinel[9], filler=9), {"I1", "I3"}),
        "K35 the sentinel is T*K + 1": (build(sentinel[13], filler=13), {"I2"}),
        "K36 a block more for a full multiple": (
            build([rows[0], idle, *rows[1:]], [0, 0, 2, 2, 3]),
            {"I4", "I6"},
        ),
        "K36 a block for an empty expert": (
            build([rows[0], idle, *rows[1:]], [0, 1, 2, 2, 3]),
            {"I4", "I6"},
        ),
        "K36 n // B blocks": (build([rows[0], rows[1]], [0, 2]), {"I1", "I4"}),
        "K39 the id E is taken for expert 3": (
            build([*rows[:3], [9, 11, N, N]]),
            {"I1"},
        ),
        "K39 -1 is taken for the last expert": (
            build([*rows[:3], [9, 10, N, N]]),
            {"I1"},
        ),
        "K40 tokens instead of routes": (build(tokens), {"I1", "I3"}),
        "post_padded counts routes": (build(post_padded=10), {"I4"}),
        "post_padded counts blocks": (build(post_padded=4), {"I1", "I4"}),
        "post_padded is the allocation": (build(post_padded=N + 12), {"I4", "I6"}),
        "post_padded is a row short": (build(post_padded=post - 1), {"I4"}),
        "post_padded is a row long": (build(post_padded=post + 1), {"I4"}),
        "post_padded is negative": (build(post_padded=-(2**31)), {"I4"}),
        "post_padded is a block short": (build(post_padded=post - 4), {"I1", "I4"}),
        "post_padded is a block long": (build(post_padded=post + 4), {"I4", "I6"}),
        "a route is missing": (build([*rows[:3], [N] * 4]), {"I1", "I6"}),
        "a route is missing beside another": (build([[1, 3, 4, N], *rows[1:]]), {"I1"}),
        "a route is there twice": (build([*rows[:2], [8, 8, N, N], rows[3]]), {"I1"}),
        "routes of two experts swapped": (build(swapped), {"I3"}),
        "an expert begins in another's padding": (
            build([*rows[:2], [8, 9, N, N]], [0, 2, 2]),
            {"I3", "I4"},
        ),
        "padding in front": (build([*rows[:3], [N, N, N, 9]]), {"I2"}),
        "padding inside": (build([*rows[:2], [N, 8, N, N], rows[3]]), {"I2"}),
        "experts fall": (build([rows[i] for i in (3, 1, 2, 0)], EXPERTS[::-1]), {"I5"}),
        "two experts change places": (
            build([rows[0], rows[3], *rows[1:3]], [0, 3, 2, 2]),
            {"I5"},
        ),
        "expert_ids are one too high": (build(experts=[1, 3, 3, 4]), {"I3"}),
        "expert_ids count blocks": (build(experts=[0, 1, 2, 3]), {"I3"}),
        "expert_ids are not written": (build(experts=[]), {"I3"}),
        "expert_ids of one block": (build(experts=[0, 2, 3, 3]), {"I3"}),
        "an expert is spread over too many blocks": (
            build([[1, 3, N, N], [4, 6, N, N], *rows[1:]], [0, 0, 2, 2, 3]),
            {"I4", "I6"},
        ),
        "the buffer has E*B rows": (build(length=N + 16), {"I7"}),
        "the buffer has no row to spare": (build(length=16), {"I7"}),
        "the buffer is a row short": (build(length=N + 11), {"I7"}),
        "expert_ids round down": (build(blocks=5), {"I7"}),
        "int64": (BlockPlan(*(a.astype(np.int64) for a in build())), {"I7"}),
        "float32": (BlockPlan(*(a.astype(np.float32) for a in build())), {"I7"}),
        "uint32": (BlockPlan(*(a.astype(np.uint32) for a in build())), {"I7"}),
        "two axes": (build()._replace(expert_ids=build().expert_ids[:, None]), {"I7"}),
        "post_padded is a number": (
            build()._replace(num_tokens_post_padded=np.int32(16)),
            {"I7"},
        ),
        "post_padded for each expert": (
            build()._replace(num_tokens_post_padded=np.array([16, 16], np.int32)),
            {"I7"},
        ),
        "no post_padded": (
            build()._replace(num_tokens_post_padded=np.empty(0, np.int32)),
            {"I7"},
        ),
        "no sorted ids": (build()._replace(sorted_token_ids=None), {"I7"}),
    }


@pytest.mark.parametrize("name", faults())
def test_a_fault_breaks_its_invariants_and_no_others(name: str) -> None:
    plan, broken = faults()[name]
    assert names(plan) == broken
    assert names(plan, stable=True) == broken


def test_an_unstable_order_is_wrong_only_if_it_has_to_be_stable() -> None:
    inside = build([[1, 4, 3, 6], *RIGHT[1:]])
    across = build([RIGHT[0], [0, 2, 5, 8], [7, N, N, N], RIGHT[3]])
    for plan in (inside, across):
        assert names(plan) == set()
        assert names(plan, stable=True) == {"I8"}


@pytest.mark.parametrize(("filler", "tail"), [(N, 0), (N, 3), (0, -1), (-1, -1), (12345, 99)])
def test_the_tail_is_looked_at_only_on_request(filler: int, tail: int) -> None:
    plan = build(filler=filler, tail=tail)
    assert names(plan) == names(plan, dialect="vllm_old_tail") == set()
    wrong = {"tail"} if (filler, tail) != (N, -1) else set()
    assert names(plan, strict_tail=True) == wrong
    old = {"tail"} if (filler, tail) != (N, 0) else set()
    assert names(plan, strict_tail=True, dialect="vllm_old_tail") == old


def test_addresses_that_overflow() -> None:
    assert names(build(), row_stride=(2**31 - 1) // N) == set()
    assert names(build(), row_stride=2**31 // N + 1) == {"I7"}
    assert "compute addresses in int64" in texts(build(), row_stride=2**28)[0]
    ids, plan = IDS, build()
    big = validate_plan(plan, topk_ids=ids, block_size=2**30, num_experts=4)
    assert [str(f) for f in big] == [
        f"I7: rows must be fewer than 2**31, got {N + 4 * (2**30 - 1)}: split the batch."
    ]
    (one,) = validate_plan(plan, topk_ids=ids, block_size=2**30, num_experts=4, dialect="naive")
    assert one.invariant == "I7"


@pytest.mark.parametrize("num_experts", [1025, 2048])
def test_more_experts_than_a_scan_of_1024_holds(num_experts: int) -> None:
    ids = np.arange(num_experts - 8, num_experts)[:, None]
    question: dict[str, Any] = {"topk_ids": ids, "block_size": 4, "num_experts": num_experts}
    right = align_block_size(**question)
    assert validate_plan(right, **question, strict_tail=True, stable=True) == []
    cut = align_block_size(np.where(ids < 1024, ids, -1), 4, num_experts)
    assert {f.invariant for f in validate_plan(cut, **question)} == {"I1", "I4"}
    wrapped = right._replace(expert_ids=right.expert_ids % 1024)
    found = validate_plan(wrapped, **question)
    assert [f.invariant for f in found] == ["I3"]


@pytest.mark.parametrize("shape", [(0, 2), (0, 1), (3, 0)])
@pytest.mark.parametrize("dialect", ["vllm", "sglang", "naive"])
def test_no_routes(shape: tuple[int, int], dialect: Any) -> None:
    question: dict[str, Any] = {
        "topk_ids": np.empty(shape, np.int32),
        "block_size": 4,
        "num_experts": 3,
        "dialect": dialect,
    }
    plan = align_block_size(**question)
    assert validate_plan(plan, **question, strict_tail=True, stable=True) == []
    one = plan._replace(num_tokens_post_padded=np.array([4], np.int32))
    assert "I4" in {f.invariant for f in validate_plan(one, **question)}


MAPPED: list[tuple[dict[str, Any], dict[str, Any], set[str]]] = [
    # The question, what the kernel took it for, and what that breaks.
    ({"invalid": "keep"}, {"expert_map": None}, {"I3"}),
    ({"invalid": "drop"}, {"invalid": "keep"}, {"I1", "I4", "I5"}),
    ({"invalid": "keep"}, {"invalid": "drop"}, {"I1", "I4", "I5"}),
    ({"expert_map": [1, 0, -1, 2]}, {"expert_map": [0, 1, -1, 2]}, {"I3"}),
    ({"expert_map": None, "dialect": "sglang"}, {"dialect": "vllm"}, {"I1", "I4", "I7"}),
    ({"expert_map": None}, {"dialect": "sglang"}, {"I1", "I4", "I7"}),
]


@pytest.mark.parametrize(("asked", "answered", "broken"), MAPPED)
def test_another_question_was_answered(
    asked: dict[str, Any], answered: dict[str, Any], broken: set[str]
) -> None:
    question = {**QUESTION, "expert_map": [1, -1, 0, -1], **asked}
    plan = align_block_size(**{**question, **answered})
    assert {f.invariant for f in validate_plan(plan, **question)} == broken
    assert validate_plan(align_block_size(**question), **question) == []


def test_expert_ids_that_index_a_map_with_their_tail() -> None:
    numbers = np.array([0, -1, -1, 1])
    plan = align_block_size(**QUESTION, expert_map=numbers)
    wrapped = plan.expert_ids.copy()
    wrapped[4:] = numbers[-1]
    wrong = plan._replace(expert_ids=wrapped)
    assert names(wrong, expert_map=numbers) == set()
    assert names(wrong, expert_map=numbers, strict_tail=True) == {"tail"}


def naive_plan() -> BlockPlan:
    return BlockPlan(None, np.array([2, 0, 2, 0, 0, 2, 0, 2, 2, 3, -1, -1], np.int32), [N * 4])


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({"sorted_token_ids": np.arange(N, dtype=np.int32)}, {"I7"}),
        ({"num_tokens_post_padded": np.array([N], np.int32)}, {"I4"}),
        ({"expert_ids": np.array([2, 0, 2, 0, 0, 2, 0, 2, 2, 3, -1, 4], np.int32)}, {"I1"}),
        ({"expert_ids": np.array([0, 2, 2, 0, 0, 2, 0, 2, 2, 3, -1, -1], np.int32)}, {"I3"}),
        ({"expert_ids": np.array([2, 0, 2, 0, 0, 2, 0, 2, 2, 3, -1], np.int32)}, {"I7"}),
        ({"expert_ids": "nothing"}, {"I7"}),
    ],
)
def test_one_route_per_block(change: dict[str, Any], broken: set[str]) -> None:
    right = naive_plan()._replace(num_tokens_post_padded=np.array([N * 4], np.int32))
    assert names(right, dialect="naive", strict_tail=True, stable=True) == set()
    assert names(right._replace(**change), dialect="naive") == broken


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        (lambda s, e, p: s.__setitem__(0, 2), {"I1"}),  # a row that is not valid
        (lambda s, e, p: s.__setitem__(2, -1), {"I2"}),
        (lambda s, e, p: s.__setitem__(slice(0, 6, 4), [4, 0]), {"I3"}),
        (lambda s, e, p: p.__setitem__(0, 4), {"I1", "I4"}),
        (lambda s, e, p: e.__setitem__(0, 1), {"I3"}),
    ],
)
def test_batched_faults(change: Callable[..., None], broken: set[str]) -> None:
    question: dict[str, Any] = {"tokens_per_expert": [2, 3], "max_tokens": 4, "block_size": 4}
    plan = align_block_size_batched(**question)
    change(*plan)
    assert {f.invariant for f in validate_batched_plan(plan, **question)} == broken


@given(data=st.data())
def test_any_other_value_of_any_entry_is_found(data: st.DataObject) -> None:
    """Nothing in a plan is free, except behind the last block."""
    problem = {**data.draw(problems()), "expert_map": None}
    dialect = data.draw(st.sampled_from(["vllm", "vllm_old_tail", "sglang"]))
    question = {**problem, "dialect": dialect}
    parts = [np.copy(a) for a in align_block_size(**question)]
    part = data.draw(st.sampled_from([i for i, a in enumerate(parts) if a.size]))
    at = data.draw(st.integers(0, parts[part].size - 1))
    close = st.integers(-3, 3).map(lambda d: int(parts[part][at]) + d)
    value = data.draw(close | st.integers(-(2**31), 2**31 - 1))
    value = min(max(value, -(2**31)), 2**31 - 1)
    post_padded, same = int(parts[2][0]), value == parts[part][at]
    parts[part][at] = value
    found = validate_plan(parts, **question, strict_tail=True, stable=True)
    assert (found == []) == same
    behind = (post_padded, post_padded // problem["block_size"], 1)[part]
    if at >= behind:
        assert validate_plan(parts, **question) == []


def test_the_validator_does_not_ask_our_own_alignment(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError

    for name in ("align_block_size", "fill_blocks", "rows_allocated", "one_route_blocks"):
        monkeypatch.setattr(npmoe.plans.blocks, name, refuse)
    assert validate_plan(build(), **QUESTION) == []
    assert naive.blocks is definition
