"""The invariants of a block plan, checked on any arrays without trusting them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from npmoe._typing import HostArray

INVARIANTS = {
    "I1": "every valid route is in exactly one row, and no other route is in any",
    "I2": "padding is the sentinel, and only at the end of a block",
    "I3": "a block has one expert, the one that expert_ids names",
    "I4": "num_tokens_post_padded is the sum of ceil(n_e / B) * B",
    "I5": "experts ascend from block to block",
    "I6": "an expert has no more blocks than it needs, and none without routes",
    "I7": "dtypes, shapes and lengths are those of the contract and fit int32",
    "I8": "routes ascend inside an expert (only if stable)",
    "tail": "what lies behind the last block is filled as the dialect says (only if strict_tail)",
}
_UNREADABLE = -(2**62)  # stands for an entry that is no integer: neither a route nor a sentinel


@dataclass(frozen=True, slots=True)
class PlanFinding:
    """One broken invariant of a plan.

    Attributes
    ----------
    invariant : str
        "I1" to "I8" or "tail": a key of INVARIANTS.
    message : str
        The first place where it is broken, and how often it is.
    """

    invariant: str
    message: str

    def __str__(self) -> str:
        """Return both in one line."""
        return f"{self.invariant}: {self.message}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """What a plan of given routes has to be.

    Attributes
    ----------
    buckets : (N,) int64 array
        Where every route belongs, -1 for nowhere; N is the sentinel. Buckets ascend in a plan.
    labels : (G,) int64 array
        What expert_ids holds for every bucket.
    block_size, rows : int
        B, and the length of sorted_token_ids.
    tail : int
        What expert_ids holds behind the last block.
    route_name, bucket_name : callable
        A route and a bucket in words.
    """

    buckets: HostArray
    labels: HostArray
    block_size: int
    rows: int
    tail: int
    route_name: Callable[[int], str]
    bucket_name: Callable[[int], str]


class Findings:
    """The findings so far: one for each kind of mistake, with its first place."""

    def __init__(self) -> None:
        self.found: list[PlanFinding] = []

    def add(self, invariant: str, message: str, count: int = 1) -> None:
        """Add one finding for `count` places of which `message` names the first."""
        more = "" if count == 1 else f" ({count - 1} more like it)"
        self.found.append(PlanFinding(invariant, f"{message}{more}."))

    def has(self, *invariants: str) -> bool:
        """Return whether any of these is broken."""
        return any(f.invariant in invariants for f in self.found)


def read_integers(name: str, value: object, findings: Findings) -> HostArray | None:
    """Return any value as (n,) int64, reporting what is wrong with it; None if nothing is left."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, OverflowError, RuntimeError, BufferError) as error:
        findings.add("I7", f"{name} must be an int32 array, got {type(value).__name__} ({error})")
        return None
    if array.dtype != np.int32:
        findings.add("I7", f"{name} must have dtype int32, got {array.dtype}")
    if array.ndim != 1:
        findings.add("I7", f"{name} must have one axis, got shape {array.shape}")
    if array.dtype.kind not in "iufb":
        return None
    array = array.reshape(-1)
    if array.dtype.kind == "f":
        with np.errstate(all="ignore"):
            array = array.astype(np.float64)
            whole = (array == np.trunc(array)) & (np.abs(array) <= 2.0**62)
    else:
        whole = (array <= 2**62) & (array >= -(2**62))
    bad = np.flatnonzero(~whole)
    if bad.size:
        findings.add("I7", f"{name}[{bad[0]}] must be an int32, got {array[bad[0]]}", bad.size)
    return np.where(whole, np.where(whole, array, 0).astype(np.int64), _UNREADABLE)


def _shown(value: int) -> str:
    return "no integer" if value == _UNREADABLE else str(value)


def check_lengths(
    rows: HostArray, experts: HostArray, contract: Contract, findings: Findings
) -> None:
    """Report wrong lengths of sorted_token_ids and expert_ids."""
    blocks = -(-contract.rows // contract.block_size)
    for name, length, required in (
        ("sorted_token_ids", rows.shape[0], contract.rows),
        ("expert_ids", experts.shape[0], blocks),
    ):
        if length != required:
            findings.add("I7", f"{name} must have length {required}, got {length}")


def check_blocks(
    sorted_ids: HostArray,
    experts: HostArray,
    post_padded: int | None,
    contract: Contract,
    findings: Findings,
    *,
    strict_tail: bool,
    stable: bool,
) -> None:
    """Report every broken invariant but I7 of readable arrays of any length and content."""
    B, N, buckets = contract.block_size, contract.buckets.shape[0], contract.buckets
    routes_of = np.bincount(buckets[buckets >= 0], minlength=contract.labels.shape[0])
    blocks_of = -(-routes_of // B)
    required = int(blocks_of.sum()) * B
    if post_padded is not None and post_padded != required:
        findings.add(
            "I4",
            f"num_tokens_post_padded must be {required}, for {required // B} blocks of {B}, got "
            f"{post_padded}",
        )
    # A number of rows that cannot be one says nothing about the blocks: look at all that should be.
    extent = required if post_padded is None else post_padded
    if not 0 <= extent <= sorted_ids.shape[0] or extent % B:
        extent = min(required, sorted_ids.shape[0] // B * B)
    table = sorted_ids[:extent].reshape(-1, B)
    is_route = (table >= 0) & (table < N)
    bucket = np.full(table.shape, -1)  # also of routes that belong nowhere
    bucket[is_route] = buckets[table[is_route]]

    _check_routes(sorted_ids[:extent], contract, findings)
    _check_padding(table, is_route, contract, findings)
    leader = np.argmax(bucket >= 0, axis=1) if table.size else np.zeros(table.shape[0], np.int64)
    leading = np.take_along_axis(bucket, leader[:, None], axis=1)[:, 0]  # -1: no valid route
    _check_experts(table, bucket, leader, leading, experts, contract, findings)
    mixed = ((bucket >= 0) & (bucket != leading[:, None])).any(axis=1)
    _check_order(np.where(mixed, -1, leading), contract, findings)
    _check_number_of_blocks(is_route, leading, experts, blocks_of, contract, findings)
    if stable and not findings.has("I1", "I3"):
        _check_stable(table, bucket, contract, findings)
    if strict_tail:
        _check_tail(sorted_ids, experts, extent, contract, findings)


def _check_routes(rows: HostArray, contract: Contract, findings: Findings) -> None:
    N, name = contract.buckets.shape[0], contract.route_name
    valid = contract.buckets >= 0
    times = np.bincount(rows[(rows >= 0) & (rows < N)], minlength=N)
    missing = np.flatnonzero(valid & (times == 0))
    if missing.size:
        findings.add("I1", f"{name(int(missing[0]))} is in no block", missing.size)
    repeated = np.flatnonzero(valid & (times > 1))
    if repeated.size:
        first, second = np.flatnonzero(rows == repeated[0])[:2].tolist()
        findings.add(
            "I1", f"{name(int(repeated[0]))} is in rows {first} and {second}", repeated.size
        )
    unwanted = np.flatnonzero(~valid & (times > 0))
    if unwanted.size:
        row = int(np.flatnonzero(rows == unwanted[0])[0])
        findings.add(
            "I1",
            f"{name(int(unwanted[0]))} must be in no block, but is in row {row}",
            unwanted.size,
        )


def _check_padding(
    table: HostArray, is_route: HostArray, contract: Contract, findings: Findings
) -> None:
    N, B = contract.buckets.shape[0], contract.block_size
    strange = np.argwhere(~is_route & (table != N))
    if strange.size:
        b, i = strange[0].tolist()
        findings.add(
            "I2",
            f"row {b * B + i} (block {b}) holds {_shown(table[b, i])}, neither a route "
            f"(0..{N - 1}) nor the sentinel {N}",
            len(strange),
        )
    after = np.argwhere(is_route & (np.cumsum(~is_route, axis=1) > 0))
    if after.size:
        b, i = after[0].tolist()
        findings.add(
            "I2",
            f"row {b * B + i} (block {b}) holds {contract.route_name(int(table[b, i]))} behind "
            "padding",
            len(after),
        )


def _check_experts(
    table: HostArray,
    bucket: HostArray,
    leader: HostArray,
    leading: HostArray,
    experts: HostArray,
    contract: Contract,
    findings: Findings,
) -> None:
    B = contract.block_size
    mixed = np.argwhere((bucket >= 0) & (bucket != leading[:, None]))
    if mixed.size:
        b, i = mixed[0].tolist()
        findings.add(
            "I3",
            f"block {b} is of {contract.bucket_name(int(leading[b]))}, but its row {b * B + i} "
            f"holds {contract.route_name(int(table[b, i]))}, of "
            f"{contract.bucket_name(int(bucket[b, i]))}",
            len(mixed),
        )
    known = min(experts.shape[0], leading.shape[0])
    labels = contract.labels[leading[:known]]
    wrong = np.flatnonzero((leading[:known] >= 0) & (experts[:known] != labels))
    if wrong.size:
        b = int(wrong[0])
        route = contract.route_name(int(table[b, leader[b]]))
        findings.add(
            "I3",
            f"expert_ids[{b}] must be {labels[b]}, since block {b} holds {route}, got "
            f"{_shown(experts[b])}",
            wrong.size,
        )


def _check_order(leading: HostArray, contract: Contract, findings: Findings) -> None:
    used = np.flatnonzero(leading >= 0)
    falling = np.flatnonzero(np.diff(leading[used]) < 0)
    if falling.size:
        a, b = used[falling[0]], used[falling[0] + 1]
        findings.add(
            "I5",
            f"block {b} is of {contract.bucket_name(int(leading[b]))}, behind block {a} of "
            f"{contract.bucket_name(int(leading[a]))}",
            falling.size,
        )


def _check_number_of_blocks(
    is_route: HostArray,
    leading: HostArray,
    experts: HostArray,
    blocks_of: HostArray,
    contract: Contract,
    findings: Findings,
) -> None:
    idle = np.flatnonzero(~is_route.any(axis=1))
    if idle.size:
        b = int(idle[0])
        given = f", with expert_ids[{b}] = {_shown(experts[b])}" if b < experts.shape[0] else ""
        findings.add("I6", f"block {b} holds no route{given}", idle.size)
    if findings.has("I1", "I3"):
        return  # a block of mixed or repeated routes is nobody's
    used = np.bincount(leading[leading >= 0], minlength=blocks_of.shape[0])
    many = np.flatnonzero(used > blocks_of)
    if many.size:
        g = int(many[0])
        findings.add(
            "I6",
            f"{contract.bucket_name(g)} has {used[g]} blocks with routes, and needs {blocks_of[g]}",
            many.size,
        )


def _check_stable(
    table: HostArray, bucket: HostArray, contract: Contract, findings: Findings
) -> None:
    rows = np.flatnonzero(bucket >= 0)  # of all rows, block after block
    rows = rows[np.argsort(bucket.reshape(-1)[rows], kind="stable")]
    routes, owners = table.reshape(-1)[rows], bucket.reshape(-1)[rows]
    falling = np.flatnonzero((np.diff(routes) < 0) & (np.diff(owners) == 0))
    if falling.size:
        i = falling[0]
        findings.add(
            "I8",
            f"row {rows[i + 1]} holds {contract.route_name(int(routes[i + 1]))}, behind "
            f"{contract.route_name(int(routes[i]))} in row {rows[i]}",
            falling.size,
        )


def _check_tail(
    sorted_ids: HostArray, experts: HostArray, extent: int, contract: Contract, findings: Findings
) -> None:
    for name, array, start, filler in (
        ("sorted_token_ids", sorted_ids, extent, contract.buckets.shape[0]),
        ("expert_ids", experts, extent // contract.block_size, contract.tail),
    ):
        wrong = np.flatnonzero(array[start:] != filler)
        if wrong.size:
            at = start + int(wrong[0])
            findings.add(
                "tail", f"{name}[{at}] must be {filler}, got {_shown(array[at])}", wrong.size
            )
