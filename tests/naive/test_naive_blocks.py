"""The definition of blocks on examples worked by hand, and of vLLM's documentation."""

from __future__ import annotations

import numpy as np
import pytest

from npmoe.naive.blocks import align_block_size, align_block_size_batched

EXAMPLE = np.array([[2, 0], [2, 1], [0, 2]])
HOLES = np.array([[2, -1], [4, 2], [-7, 0], [1, -1]])  # E = 4, so that 4 is no expert


@pytest.mark.parametrize("dialect", ["vllm", "vllm_old_tail"])
def test_worked_example(dialect):
    tail = -1 if dialect == "vllm" else 0
    rows = [1, 4, 6, 6, 3, 6, 6, 6, 0, 2, 5, 6, *[6] * 6]
    assert align_block_size(EXAMPLE, 4, 4, None, dialect) == (rows, [0, 1, 2, tail, tail], 12)


def test_the_example_of_vllm():
    ids = np.array([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]])
    rows, experts, post_padded = align_block_size(ids, 4, 5)
    assert rows == [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12, *[12] * 11]
    assert (experts, post_padded) == ([1, 2, 3, 4, -1, -1, -1], 16)


def test_the_batched_example_of_vllm():
    rows, experts, post_padded = align_block_size_batched(np.array([2, 3, 0, 6, 8]), 8, 4)
    blocks = [0, 1, 40, 40, 8, 9, 10, 40, 24, 25, 26, 27, 28, 29, 40, 40, *range(32, 40)]
    assert rows == [*blocks, *[40] * 16]
    assert (experts, post_padded) == ([0, 1, 3, 3, 4, 4, -1, -1, -1, -1], 24)


def test_routes_without_an_expert():
    # Routes 2 and 4 have ids that are none; 1 and 7 have -1.
    assert align_block_size(HOLES, 2, 4) == (
        [5, 8, 6, 8, 0, 3, *[8] * 6],
        [0, 1, 2, -1, -1, -1],
        6,
    )
    assert align_block_size(HOLES, 2, 4, None, "sglang") == (
        [1, 7, 5, 8, 6, 8, 0, 3, *[8] * 5],
        [-1, 0, 1, 2, -1, -1, -1],
        8,
    )
    assert align_block_size(HOLES, 2, 4, None, "naive") == (
        None,
        [2, -1, -1, 2, -1, 0, 1, -1],
        16,
    )


def test_experts_of_other_ranks():
    expert_map = np.array([1, -1, 0, -1])
    keep = align_block_size(EXAMPLE, 2, 4, expert_map)
    assert keep == ([1, 4, 3, 6, 0, 2, 5, 6, 6, 6], [1, -1, 0, 0, -1], 8)
    drop = align_block_size(EXAMPLE, 2, 4, expert_map, invalid="drop")
    assert drop == ([0, 2, 5, 6, 1, 4, 6, 6, 6, 6], [0, 0, 1, -1, -1], 6)
    assert align_block_size(EXAMPLE, 2, 4, expert_map, "vllm_old_tail")[1] == [1, -1, 0, 0, 1]
    old = align_block_size(EXAMPLE, 2, 4, expert_map, "vllm_old_tail", "drop")
    assert old[1] == [0, 0, 1, 0, 0]
    sglang = align_block_size(EXAMPLE, 2, 4, expert_map, "sglang")
    assert sglang == ([3, 6, 0, 2, 5, 6, 1, 4, 6, 6, 6], [-1, 0, 0, 1, -1, -1], 8)


def test_lengths():
    assert len(align_block_size(EXAMPLE, 4, 4, pad_sorted_ids=True)[0]) == 20
    assert len(align_block_size(EXAMPLE, 4, 7)[0]) == 24  # 6 * 4 < 6 + 7 * 3
    assert align_block_size(EXAMPLE[:0], 4, 7) == ([], [], 0)
    assert align_block_size(EXAMPLE[:0], 2, 2, None, "sglang") == ([0] * 3, [-1, -1], 0)
