"""Whether a block plan, of whatever kernel, is what its routes require."""

from __future__ import annotations

from typing import Any

import numpy as np

from npmoe._checks import Axes, check_integer_ids
from npmoe._typing import HostArray
from npmoe.errors import PlanError
from npmoe.plans.blocks import (
    BlockDialect,
    InvalidRoutes,
    check_dialect,
    check_expert_map,
    check_size,
)
from npmoe.plans.invariants import (
    INVARIANTS,
    Contract,
    Findings,
    PlanFinding,
    check_blocks,
    check_lengths,
    read_integers,
)

__all__ = ["INVARIANTS", "PlanFinding", "validate_batched_plan", "validate_plan"]


def validate_plan(
    plan: Any,
    *,
    topk_ids: HostArray,
    block_size: int,
    num_experts: int,
    dialect: BlockDialect = "vllm",
    expert_map: HostArray | None = None,
    invalid: InvalidRoutes = "keep",
    pad_sorted_ids: bool = False,
    strict_tail: bool = False,
    stable: bool = False,
    row_stride: int | None = None,
) -> list[PlanFinding]:
    """Name every invariant of a block plan that is broken, with its first place.

    INVARIANTS says what each means. Rows and blocks behind num_tokens_post_padded are looked at
    only with `strict_tail`, the order of routes inside an expert only with `stable`.

    Parameters
    ----------
    plan : BlockPlan, or any three arrays
        Anything at all; what cannot be read is a finding.
    topk_ids, block_size, num_experts, dialect, expert_map, invalid, pad_sorted_ids
        As `align_block_size` takes them: the question to which the plan is an answer.
    strict_tail, stable : bool
        Check "tail" and "I8" too.
    row_stride : int, optional
        Elements between the rows that a kernel addresses by route in int32: "I7" says if they are
        too many.

    Returns
    -------
    list of PlanFinding
        One for each kind of mistake; empty if the plan is right.

    Raises
    ------
    DTypeError, ShapeError, RangeError, PlanError
        If the question is wrong, as in `align_block_size`; never for the plan.

    Notes
    -----
    **Cost**: O(P log P) with `stable`, else O(P), on the host. The contract is computed from
    `topk_ids` alone, without sorting.

    Examples
    --------
    >>> import numpy as np
    >>> plan = ([1, 4, 6, 6, 3, 6, 6, 6, 0, 2, 6, 6], [0, 1, 1], [12])
    >>> plan = tuple(np.array(a, np.int32) for a in plan)
    >>> ids = np.array([[2, 0], [2, 1], [0, 2]])
    >>> for finding in validate_plan(plan, topk_ids=ids, block_size=4, num_experts=4):
    ...     print(finding)
    I7: sorted_token_ids must have length 18, got 12.
    I7: expert_ids must have length 5, got 3.
    I1: route 5 (token 2, slot 1; expert id 2) is in no block.
    I3: expert_ids[2] must be 2, since block 2 holds route 0 (token 0, slot 0; expert id 2), got 1.
    """
    topk_ids = np.asarray(topk_ids)
    function = "validate_plan"
    check_integer_ids(function, "topk_ids", topk_ids)
    Axes(function).check("topk_ids", topk_ids, "T", "K")
    B = check_size(function, "block_size", block_size)
    E = check_size(function, "num_experts", num_experts)
    local_ids = None if expert_map is None else check_expert_map(function, expert_map, E)
    check_dialect(function, dialect, invalid, has_map=local_ids is not None)

    findings = Findings()
    num_routes = topk_ids.size
    if row_stride is not None and num_routes * row_stride >= 2**31:
        findings.add(
            "I7",
            f"{num_routes} routes times a stride of {row_stride} must stay below 2**31, got "
            f"{num_routes * row_stride}: compute addresses in int64",
        )
    arrays = _unpack(plan, findings)
    if dialect == "naive":
        _check_naive(arrays, topk_ids, B, E, findings)
        return findings.found
    buckets, labels = _buckets(topk_ids.reshape(-1), E, dialect, local_ids, invalid)
    rows = num_routes + (E + (dialect == "sglang")) * (B - 1)
    if pad_sorted_ids:
        rows += -rows % B
    if dialect != "sglang" and num_routes < E:
        rows = min(rows, num_routes * B)

    def route_name(route: int) -> str:
        t, k = divmod(route, topk_ids.shape[1])
        return f"route {route} (token {t}, slot {k}; expert id {topk_ids[t, k]})"

    def bucket_name(bucket: int) -> str:
        if labels[bucket] < 0:
            return (
                "the routes without an expert here" if dialect == "sglang" else f"expert {bucket}"
            )
        return f"expert {labels[bucket] if dialect == 'sglang' else bucket}"

    contract = Contract(
        buckets=buckets,
        labels=labels,
        block_size=B,
        rows=rows,
        tail=int(labels[0]) if dialect == "vllm_old_tail" else -1,
        route_name=route_name,
        bucket_name=bucket_name,
    )
    _check(arrays, contract, findings, strict_tail=strict_tail, stable=stable)
    return findings.found


def validate_batched_plan(
    plan: Any,
    *,
    tokens_per_expert: HostArray,
    max_tokens: int,
    block_size: int,
    strict_tail: bool = False,
    stable: bool = False,
) -> list[PlanFinding]:
    """Name every broken invariant of a plan over experts' buffers, as `validate_plan` does.

    Parameters
    ----------
    plan : BlockPlan, or any three arrays
        Anything at all.
    tokens_per_expert, max_tokens, block_size
        As `align_block_size_batched` takes them.
    strict_tail, stable : bool
        Check "tail" and "I8" too.

    Returns
    -------
    list of PlanFinding
        Empty if the plan is right.

    Raises
    ------
    DTypeError, ShapeError, RangeError, PlanError
        If the question is wrong; never for the plan.
    """
    function = "validate_batched_plan"
    counts = np.asarray(tokens_per_expert)
    check_integer_ids(function, "tokens_per_expert", counts)
    Axes(function).check("tokens_per_expert", counts, "E")
    M = check_size(function, "max_tokens", max_tokens)
    B = check_size(function, "block_size", block_size)
    if counts.size and (counts.min() < 0 or counts.max() > M):
        raise PlanError(
            f"{function}: tokens_per_expert must lie in 0..{M}, got {counts.min()}..{counts.max()}."
            " The bound is max_tokens."
        )
    E = counts.shape[0]
    owner, place = np.divmod(np.arange(E * M), M)
    contract = Contract(
        buckets=np.where(place < counts[owner], owner, -1),
        labels=np.arange(E),
        block_size=B,
        rows=E * (M + -M % B),
        tail=-1,
        route_name=lambda route: f"row {route % M} of expert {route // M}'s buffer",
        bucket_name=lambda bucket: f"expert {bucket}",
    )
    findings = Findings()
    arrays = _unpack(plan, findings)
    _check(arrays, contract, findings, strict_tail=strict_tail, stable=stable)
    return findings.found


def _unpack(plan: Any, findings: Findings) -> tuple[Any, Any, Any] | None:
    """Return the three parts of a plan, by name or by place."""
    names = ("sorted_token_ids", "expert_ids", "num_tokens_post_padded")
    if all(hasattr(plan, name) for name in names):
        return plan.sorted_token_ids, plan.expert_ids, plan.num_tokens_post_padded
    if isinstance(plan, tuple | list) and len(plan) == len(names):
        return plan[0], plan[1], plan[2]
    got = f"{len(plan)} parts" if isinstance(plan, tuple | list) else type(plan).__name__
    findings.add("I7", f"the plan must be {', '.join(names)}, got {got}")
    return None


def _buckets(
    flat: HostArray,
    num_experts: int,
    dialect: BlockDialect,
    local_ids: HostArray | None,
    invalid: InvalidRoutes,
) -> tuple[HostArray, HostArray]:
    """Return the bucket of every route, -1 for none, and what expert_ids says for every bucket."""
    experts = np.arange(num_experts)
    valid = (flat >= 0) & (flat < num_experts)
    chosen = flat[valid].astype(np.int64)
    buckets = np.full(flat.shape, -1)
    if dialect == "sglang":
        buckets[valid] = (chosen if local_ids is None else local_ids[chosen]) + 1
        buckets[flat == -1] = 0
        return buckets, np.arange(-1, num_experts)
    if local_ids is not None and invalid == "drop":
        buckets[valid] = local_ids[chosen]
        return buckets, experts
    buckets[valid] = chosen
    return buckets, experts if local_ids is None else local_ids


def _check(
    arrays: tuple[Any, Any, Any] | None,
    contract: Contract,
    findings: Findings,
    *,
    strict_tail: bool,
    stable: bool,
) -> None:
    if contract.rows >= 2**31:
        findings.add("I7", f"rows must be fewer than 2**31, got {contract.rows}: split the batch")
        return
    if arrays is None:
        return
    sorted_ids = read_integers("sorted_token_ids", arrays[0], findings)
    experts = read_integers("expert_ids", arrays[1], findings)
    post_padded = _read_post_padded(arrays[2], findings)
    if sorted_ids is None or experts is None:
        return
    check_lengths(sorted_ids, experts, contract, findings)
    check_blocks(
        sorted_ids,
        experts,
        post_padded,
        contract,
        findings,
        strict_tail=strict_tail,
        stable=stable,
    )


def _read_post_padded(value: object, findings: Findings) -> int | None:
    array = read_integers("num_tokens_post_padded", value, findings)
    if array is None:
        return None
    if array.shape[0] != 1:
        findings.add("I7", f"num_tokens_post_padded must have length 1, got {array.shape[0]}")
    return int(array[0]) if array.size else None


def _check_naive(
    arrays: tuple[Any, Any, Any] | None,
    topk_ids: HostArray,
    block_size: int,
    num_experts: int,
    findings: Findings,
) -> None:
    """Check one route per block: no sorted ids, and route r in block r."""
    flat, required = topk_ids.reshape(-1), topk_ids.size * block_size
    if required >= 2**31:
        findings.add("I7", f"rows must be fewer than 2**31, got {required}: split the batch")
        return
    if arrays is None:
        return
    if arrays[0] is not None:
        findings.add("I7", "sorted_token_ids must be None in dialect naive, got an array")
    experts = read_integers("expert_ids", arrays[1], findings)
    post_padded = _read_post_padded(arrays[2], findings)
    if post_padded is not None and post_padded != required:
        findings.add(
            "I4",
            f"num_tokens_post_padded must be {required}, for {flat.size} routes times "
            f"{block_size}, got {post_padded}",
        )
    if experts is None:
        return
    if experts.shape != flat.shape:
        findings.add("I7", f"expert_ids must have length {flat.size}, got {experts.size}")
    known = min(flat.size, experts.size)
    valid = (flat >= 0) & (flat < num_experts)
    wanted = np.where(valid, flat.astype(np.int64), -1)[:known]
    for invariant, where in (("I3", valid), ("I1", ~valid)):
        wrong = np.flatnonzero((experts[:known] != wanted) & where[:known])
        if wrong.size:
            b = int(wrong[0])
            findings.add(
                invariant,
                f"expert_ids[{b}] must be {wanted[b]}, since route {b} has expert id {flat[b]}, "
                f"got {experts[b]}",
                wrong.size,
            )
