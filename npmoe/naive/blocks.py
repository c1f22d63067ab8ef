"""Routes in padded blocks of one expert each, and as one route per block."""

from __future__ import annotations

from npmoe._typing import HostArray

Blocks = tuple[list[int] | None, list[int], int]


def align_block_size(
    topk_ids: HostArray,
    block_size: int,
    num_experts: int,
    expert_map: HostArray | None = None,
    dialect: str = "vllm",
    invalid: str = "keep",
    pad_sorted_ids: bool = False,
) -> Blocks:
    """Return sorted_token_ids, expert_ids and num_tokens_post_padded as plain lists and a number.

    "vllm"           experts one after the other, the lists padded with T*K and -1,
    "vllm_old_tail"  the same, padded with T*K and the number of expert 0,
    "sglang"         first the routes of no expert (-1), then the experts,
    "naive"          one route per block.
    `expert_map` numbers experts; those of other ranks are numbered -1. With invalid="drop" they
    have no blocks, and the others stand in the order of their numbers.
    """
    flat = [int(e) for row in topk_ids for e in row]
    number = list(range(num_experts)) if expert_map is None else [int(n) for n in expert_map]
    if dialect == "naive":
        return None, [e if 0 <= e < num_experts else -1 for e in flat], len(flat) * block_size

    groups: list[tuple[int, list[int]]] = []  # the expert's number, and its routes
    for e in range(num_experts):
        groups.append((number[e], [r for r, chosen in enumerate(flat) if chosen == e]))
    if dialect == "sglang":
        no_expert = [
            r
            for r, chosen in enumerate(flat)
            if chosen == -1 or (0 <= chosen < num_experts and number[chosen] == -1)
        ]
        groups = [(-1, no_expert), *sorted(g for g in groups if g[0] != -1)]
    elif invalid == "drop":
        groups = sorted(g for g in groups if g[0] != -1)

    num_buckets = num_experts + 1 if dialect == "sglang" else num_experts
    length = len(flat) + num_buckets * (block_size - 1)
    while pad_sorted_ids and length % block_size != 0:
        length += 1
    if dialect != "sglang" and len(flat) < num_experts:
        length = min(length, len(flat) * block_size)
    tail = number[0] if dialect == "vllm_old_tail" and invalid == "keep" else -1
    if dialect == "vllm_old_tail" and invalid == "drop":
        tail = 0
    return in_blocks(groups, block_size, len(flat), length, tail)


def align_block_size_batched(
    tokens_per_expert: HostArray, max_tokens: int, block_size: int
) -> Blocks:
    """Return the same of buffers (E, max_tokens) of which the first rows are valid."""
    num_experts = len(tokens_per_expert)
    groups = []
    for e in range(num_experts):
        groups.append((e, [e * max_tokens + i for i in range(int(tokens_per_expert[e]))]))
    per_expert = max_tokens
    while per_expert % block_size != 0:
        per_expert += 1
    length = num_experts * per_expert
    return in_blocks(groups, block_size, num_experts * max_tokens, length, -1)


def in_blocks(
    groups: list[tuple[int, list[int]]], block_size: int, sentinel: int, length: int, tail: int
) -> Blocks:
    """Return every group padded to whole blocks, and both lists padded to their lengths."""
    rows: list[int] = []
    experts: list[int] = []
    for e, routes in groups:
        for i, r in enumerate(routes):
            if i % block_size == 0:
                experts.append(e)
            rows.append(r)
        while len(rows) % block_size != 0:
            rows.append(sentinel)
    post_padded = len(rows)
    while len(rows) < length:
        rows.append(sentinel)
    while len(experts) * block_size < length:
        experts.append(tail)
    return rows, experts, post_padded
