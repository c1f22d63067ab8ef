"""The block view: every dialect is its definition, and the contract of lengths and dtypes."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from block_problems import OPTIONS, problems
from hypothesis import given
from hypothesis import strategies as st

import npmoe
from npmoe.errors import DTypeError, PlanError, RangeError, ShapeError
from npmoe.naive import blocks as definition
from npmoe.plans.blocks import align_block_size, align_block_size_batched
from npmoe.plans.expert_maps import make_expert_map

EXAMPLE = np.array([[2, 0], [2, 1], [0, 2]], np.int32)


def lists(blocks: npmoe.BlockPlan) -> tuple[Any, ...]:
    rows = None if blocks.sorted_token_ids is None else blocks.sorted_token_ids.tolist()
    (post_padded,) = blocks.num_tokens_post_padded.tolist()
    return rows, blocks.expert_ids.tolist(), post_padded


def check_dtypes(blocks: npmoe.BlockPlan) -> None:
    for array in blocks:
        assert array is None or (array.dtype == np.int32 and array.ndim == 1)


@pytest.mark.parametrize(("dialect", "mapped", "invalid"), OPTIONS)
@given(problem=problems(), padded=st.booleans())
def test_every_dialect_is_its_definition(
    dialect: Any, mapped: bool, invalid: Any, problem: dict[str, Any], padded: bool
) -> None:
    arguments = {**problem, "dialect": dialect, "invalid": invalid, "pad_sorted_ids": padded}
    if not mapped:
        arguments["expert_map"] = None
    before = problem["topk_ids"].copy()
    blocks = align_block_size(**arguments)
    check_dtypes(blocks)
    assert lists(blocks) == definition.align_block_size(**arguments)
    np.testing.assert_array_equal(problem["topk_ids"], before)


@given(
    counts=st.lists(st.integers(0, 9), max_size=6),
    more=st.integers(0, 4),
    block_size=st.integers(1, 5),
)
def test_batched_is_its_definition(counts: list[int], more: int, block_size: int) -> None:
    arguments = (np.array(counts, np.int64), max([1, *counts]) + more, block_size)
    blocks = align_block_size_batched(*arguments)
    check_dtypes(blocks)
    assert lists(blocks) == definition.align_block_size_batched(*arguments)


def test_worked_example() -> None:
    blocks = npmoe.align_block_size(EXAMPLE, 4, 4)
    assert blocks.sorted_token_ids is not None
    assert blocks.sorted_token_ids[:12].reshape(3, 4).tolist() == [
        [1, 4, 6, 6],
        [3, 6, 6, 6],
        [0, 2, 5, 6],
    ]
    assert blocks.sorted_token_ids[12:].tolist() == [6] * 6
    assert blocks.expert_ids.tolist() == [0, 1, 2, -1, -1]
    assert blocks.num_tokens_post_padded.tolist() == [12]
    sorted_token_ids, expert_ids, num_tokens_post_padded = blocks
    assert sorted_token_ids is blocks.sorted_token_ids
    assert (expert_ids.shape, num_tokens_post_padded.shape) == ((5,), (1,))


def test_the_sentinel_counts_routes_that_have_no_row() -> None:
    blocks = align_block_size(np.array([[-1, 1], [5, -1]]), 2, 2)
    assert lists(blocks) == ([1, 4, 4, 4, 4, 4], [1, -1, -1], 2)


@pytest.mark.parametrize("num_experts", [65534, 65535, 65536, 70000])
def test_as_many_experts_as_sixteen_bits_hold(num_experts: int) -> None:
    ids = np.array([[num_experts - 1, 0], [num_experts, -1], [num_experts - 1, 65535]])
    last = [0, 4, 5] if num_experts == 65536 else [0, 4]
    blocks = align_block_size(ids, 4, num_experts)
    assert blocks.sorted_token_ids is not None
    assert blocks.sorted_token_ids[:4].tolist() == [1, 6, 6, 6]
    rows = blocks.sorted_token_ids[4:].tolist()
    if num_experts == 70000:
        assert rows[:4] == [5, 6, 6, 6]
        rows = rows[4:]
    assert [r for r in rows if r != 6] == last
    assert blocks.expert_ids.max() == num_experts - 1
    sglang = align_block_size(ids, 4, num_experts, dialect="sglang")
    assert sglang.sorted_token_ids is not None
    assert sglang.sorted_token_ids[:8].tolist() == [3, 6, 6, 6, 1, 6, 6, 6]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int64", "uint64", ">i4"])
@pytest.mark.parametrize("dialect", ["vllm", "sglang", "naive"])
def test_any_integers(dtype: str, dialect: Any) -> None:
    ids = EXAMPLE.astype(dtype)
    ids[0, 1] = 0 if np.dtype(dtype).kind == "u" else -1
    for num_experts in (2, 3, 300):
        got = align_block_size(ids, 2, num_experts, dialect=dialect)
        assert lists(got) == definition.align_block_size(ids, 2, num_experts, None, dialect)


def test_an_id_that_would_wrap_around_to_minus_one() -> None:
    ids = np.array([[2**64 - 1, 2**32], [2**63, 1]], np.uint64)
    assert align_block_size(ids, 1, 4, dialect="sglang").expert_ids.tolist()[:2] == [1, -1]
    assert align_block_size(ids, 1, 4).num_tokens_post_padded.tolist() == [1]


def test_strided_and_read_only_ids() -> None:
    wide = np.arange(24, dtype=np.int32).reshape(4, 6) % 5
    wide.flags.writeable = False
    for view in (wide[::2, ::-2], wide.T):
        assert lists(align_block_size(view, 2, 5)) == definition.align_block_size(view, 2, 5)


def test_time_does_not_grow_with_experts_times_routes() -> None:
    ids = np.random.default_rng(0).integers(0, 2048, (2048, 8)).astype(np.int32)
    times = []
    for _ in range(5):
        start = time.process_time()
        align_block_size(ids, 64, 2048)
        times.append(time.process_time() - start)
    assert min(times) < 0.02


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"topk_ids": EXAMPLE.astype(float)},
        DTypeError,
        "topk_ids must be an integer array, got float64.",
    ),
    (
        {"topk_ids": EXAMPLE[0]},
        ShapeError,
        "topk_ids must have shape (T, K) = (T, K), got (2,).",
    ),
    ({"block_size": 0}, RangeError, "block_size must be at least 1, got 0."),
    ({"block_size": 2.0}, DTypeError, "block_size must be an integer, got 2.0."),
    ({"num_experts": -1}, RangeError, "num_experts must be at least 1, got -1."),
    (
        {"dialect": "vlm"},
        RangeError,
        "dialect must be one of vllm, vllm_old_tail, sglang, naive, got 'vlm'.",
    ),
    ({"invalid": "skip"}, RangeError, "invalid must be 'keep' or 'drop', got 'skip'."),
    (
        {"invalid": "drop"},
        RangeError,
        "invalid must be 'keep' without an expert_map and in dialect 'sglang', got 'drop'. "
        "It says what becomes of routes to experts of other ranks.",
    ),
    (
        {"invalid": "drop", "dialect": "sglang", "expert_map": [0, 1, -1, -1]},
        RangeError,
        "invalid must be 'keep' without an expert_map and in dialect 'sglang', got 'drop'. "
        "It says what becomes of routes to experts of other ranks.",
    ),
    (
        {"dialect": "naive", "expert_map": [0, 1, -1, -1]},
        RangeError,
        "expert_map must be None in dialect 'naive', got one. Every route has a block there.",
    ),
    (
        {"expert_map": [0, 1, -1]},
        ShapeError,
        "expert_map must have shape (E,) = (4,), got (3,). E is bound by num_experts.",
    ),
    (
        {"expert_map": [0, 1, -1, 4]},
        PlanError,
        "expert_map must lie in -1..3, got 4 for expert 3. -1 means an expert of another rank.",
    ),
    (
        {"expert_map": [0, -1, -1, 0]},
        PlanError,
        "expert_map must give every expert its own number, got 0 for experts 0 and 3.",
    ),
    (
        {"expert_map": [0.0, 1.0, 2.0, 3.0]},
        DTypeError,
        "expert_map must be an integer array, got float64.",
    ),
    (
        {"block_size": 2**30},
        PlanError,
        "block_size must leave fewer than 2**31 rows, got 4294967298. Split the batch.",
    ),
    (
        {"block_size": 2**30, "dialect": "naive"},
        PlanError,
        "block_size must leave fewer than 2**31 rows, got 6442450944. Split the batch.",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_messages(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"topk_ids": EXAMPLE, "block_size": 4, "num_experts": 4}
    with pytest.raises(error) as caught:
        align_block_size(**{**arguments, **changes})
    assert str(caught.value) == f"align_block_size: {message}"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"tokens_per_expert": [1, 5]},
            PlanError,
            "tokens_per_expert must lie in 0..4, got 5 for expert 1. The bound is max_tokens.",
        ),
        (
            {"tokens_per_expert": [-1, 5]},
            PlanError,
            "tokens_per_expert must lie in 0..4, got -1 for expert 0. The bound is max_tokens.",
        ),
        (
            {"tokens_per_expert": [[1]]},
            ShapeError,
            "tokens_per_expert must have shape (E,) = (E,), got (1, 1).",
        ),
        (
            {"tokens_per_expert": [0.5]},
            DTypeError,
            "tokens_per_expert must be an integer array, got float64.",
        ),
        ({"max_tokens": 0}, RangeError, "max_tokens must be at least 1, got 0."),
        ({"block_size": 0}, RangeError, "block_size must be at least 1, got 0."),
        (
            {"block_size": 2**30},
            PlanError,
            "block_size must leave fewer than 2**31 rows, got 2147483648. Split the batch.",
        ),
    ],
)
def test_batched_messages(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"tokens_per_expert": [1, 2], "max_tokens": 4, "block_size": 2}
    with pytest.raises(error) as caught:
        align_block_size_batched(**{**arguments, **changes})
    assert str(caught.value) == f"align_block_size_batched: {message}"


@pytest.mark.parametrize("placement", ["linear", "round_robin"])
@pytest.mark.parametrize(("num_experts", "num_ranks"), [(1, 1), (8, 2), (7, 3), (5, 8), (257, 16)])
def test_every_expert_has_one_rank_and_one_number(
    num_experts: int, num_ranks: int, placement: Any
) -> None:
    maps = [
        make_expert_map(num_experts, num_ranks, rank, placement=placement)
        for rank in range(num_ranks)
    ]
    homes = np.array(maps) >= 0
    assert (homes.sum(axis=0) == 1).all()
    sizes = homes.sum(axis=1)
    more = num_experts % num_ranks
    assert sizes.tolist() == [num_experts // num_ranks + (r < more) for r in range(num_ranks)]
    for numbers, size in zip(maps, sizes, strict=True):
        assert numbers.dtype == np.int32
        assert numbers[numbers >= 0].tolist() == list(range(size))
    rank_of = homes.argmax(axis=0)
    if placement == "linear":
        assert rank_of.tolist() == sorted(rank_of)
    else:
        assert rank_of.tolist() == [e % num_ranks for e in range(num_experts)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 2, 2), "rank must lie in 0..1, got 2."),
        ((4, 2, -1), "rank must lie in 0..1, got -1."),
        ((0, 2, 0), "num_experts must be at least 1, got 0."),
        ((4, 0, 0), "num_ranks must be at least 1, got 0."),
        ((4, 2, 0, "random"), "placement must be 'linear' or 'round_robin', got 'random'."),
    ],
)
def test_expert_map_messages(arguments: Any, message: str) -> None:
    with pytest.raises(RangeError) as caught:
        make_expert_map(*arguments[:3], **({"placement": arguments[3]} if arguments[3:] else {}))
    assert str(caught.value) == f"make_expert_map: {message}"


@pytest.mark.parametrize("invalid", ["keep", "drop"])
def test_ranks_together_hold_every_route_once(invalid: Any) -> None:
    ids = np.random.default_rng(1).integers(0, 7, (20, 3))
    found = []
    for rank in range(3):
        numbers = make_expert_map(7, 3, rank)
        blocks = align_block_size(ids, 4, 7, numbers, invalid=invalid)
        assert blocks.sorted_token_ids is not None
        post = int(blocks.num_tokens_post_padded[0])
        rows = blocks.sorted_token_ids[:post].reshape(-1, 4)
        mine = rows[blocks.expert_ids[: len(rows)] >= 0]
        found += mine[mine < 60].tolist()
    assert sorted(found) == list(range(60))
