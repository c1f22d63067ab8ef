"""Routings to be sorted into blocks: what `check_align` asks, and how it asks for less."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from npmoe._typing import HostArray
from npmoe.testing.conformance.case import Case, Effort
from npmoe.testing.conformance.draw import draw_ids, kept_parts, sizes, strided

Generator = Callable[[np.random.Generator, Effort], Iterator[Case]]
Alteration = Callable[[np.random.Generator, Case], Case]
BLOCK_SIZES = (1, 2, 4, 3, 16, 8, 5, 64)
LOADS = ("spread", "one-expert", "empty-first", "empty-last", "every-other")


def make_case(
    topk_ids: HostArray, block_size: int, num_experts: int, expert_map: HostArray | None = None
) -> Case:
    """Return the case; subjects get no expert_map if there is none."""
    arguments: dict[str, Any] = {
        "topk_ids": topk_ids.astype(np.int32),
        "block_size": block_size,
        "num_experts": num_experts,
    }
    if expert_map is not None:
        arguments["expert_map"] = expert_map.astype(np.int32)
    T, K = topk_ids.shape
    note = f"T={T} K={K} E={num_experts} B={block_size}"
    if expert_map is not None:
        note += f", {int((expert_map >= 0).sum())} experts here"
    return Case(arguments=arguments, note=note, options={})


def change(case: Case, **arguments: Any) -> Case:
    """Return the case with other arguments, and the note that fits them."""
    return make_case(**(case.arguments | arguments))


def draw_loaded_ids(
    rng: np.random.Generator, tokens: int, experts: int, top_k: int, load: str
) -> HostArray:
    """Return ids (T, K) of the experts that a load allows; K may become smaller."""
    allowed = np.arange(experts)
    if load == "one-expert":
        allowed = allowed[[int(rng.integers(experts))]]
    elif load == "empty-first":
        allowed = allowed[experts // 2 :]
    elif load == "empty-last":
        allowed = allowed[: (experts + 1) // 2]
    elif load == "every-other":
        allowed = allowed[int(rng.integers(2)) if experts > 1 else 0 :: 2]
    return allowed[draw_ids(rng, tokens, len(allowed), min(top_k, len(allowed)))]


def drawn(*loads: str, alter: Alteration | None = None) -> Generator:
    """Return a generator of routings of growing size."""

    def generate(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
        for i, (routes, experts, _, _) in enumerate(sizes(rng, effort)):
            K = min(experts, (1, 2, 3, 4, 8)[i % 5])
            load = loads[i % len(loads)]
            ids = draw_loaded_ids(rng, -(-routes // K), experts, K, load)
            case = make_case(ids, BLOCK_SIZES[(i + i // 5) % 8], experts)
            yield case if alter is None else alter(rng, case)

    return generate


def counted(*wanted: tuple[int, tuple[int, ...]]) -> Generator:
    """Return a generator of routings with given block sizes and routes per expert."""

    def generate(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
        del effort
        for block_size, counts in wanted:
            ids = np.repeat(np.arange(len(counts)), counts)
            yield make_case(rng.permutation(ids)[:, None], block_size, len(counts))

    return generate


def shaped(*wanted: tuple[int, int, int, int]) -> Generator:
    """Return a generator of given (T, K, E, B); the first and the last expert have routes."""

    def generate(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
        del effort
        for T, K, E, B in wanted:
            ids = draw_ids(rng, T, E, K)
            if T:
                ids[0] = np.arange(K)
                ids[-1] = np.arange(E)[E - K :]
            yield make_case(ids, B, E)

    return generate


def chained(*generators: Generator) -> Generator:
    """Return a generator of one after the other."""

    def generate(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
        for one in generators:
            yield from one(rng, effort)

    return generate


def no_tokens(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
    """Yield zero tokens, and tokens of which all ids are of no expert."""
    del rng, effort
    for E, B in ((1, 1), (4, 4), (3, 16), (257, 8)):
        yield make_case(np.zeros((0, 2), np.int32), B, E)
    for E, B in ((1, 1), (4, 4)):
        yield make_case(np.full((2, 2), -1, np.int32), B, E)


def with_minus_one(rng: np.random.Generator, case: Case) -> Case:
    """Return the case with ids of -1 here and there."""
    return _with_ids(rng, case, [-1])


def with_ids_out_of_range(rng: np.random.Generator, case: Case) -> Case:
    """Return the case with ids of E and more, and less than -1, here and there."""
    E = case.arguments["num_experts"]
    return _with_ids(rng, case, [E, E, E + 1, E + 100, -2, -E - 1, 2**31 - 1])


def _with_ids(rng: np.random.Generator, case: Case, ids: list[int]) -> Case:
    topk_ids = case.arguments["topk_ids"].copy()
    where = rng.random(topk_ids.shape) < 0.4
    where[0, 0] = True
    topk_ids[where] = rng.choice(ids, int(where.sum()))
    return change(case, topk_ids=topk_ids)


def with_map(rng: np.random.Generator, case: Case) -> Case:
    """Return the case with some experts on other ranks: none, half, or all of them."""
    E = case.arguments["num_experts"]
    local_ids = np.full(E, -1, np.int32)
    here = rng.permutation(E)[: (E // 2, E, (E + 1) // 2, 0)[int(rng.integers(4))]]
    # In order, as ranks number their experts, or in any order, as replicas are numbered.
    local_ids[np.sort(here) if rng.random() < 0.5 else here] = np.arange(len(here))
    return change(case, expert_map=local_ids)


def with_map_and_minus_one(rng: np.random.Generator, case: Case) -> Case:
    """Return the case with ids of -1, and the last expert on this rank."""
    E = case.arguments["num_experts"]
    here = rng.random(E) < 0.5
    here[-1] = True
    case = change(case, expert_map=np.where(here, np.cumsum(here) - 1, -1))
    return with_minus_one(rng, case)


def with_duplicates(rng: np.random.Generator, case: Case) -> Case:
    """Return the case with every token's first expert in two slots."""
    ids = case.arguments["topk_ids"]
    return change(case, topk_ids=rng.permuted(np.concatenate([ids, ids[:, :1]], axis=1), axis=1))


def with_gaps(rng: np.random.Generator, case: Case) -> Case:
    """Return the case with ids that do not lie side by side in memory."""
    del rng
    return case.replace(topk_ids=strided(case.arguments["topk_ids"]))


def reductions(case: Case) -> Iterator[Case]:
    """Yield fewer tokens, slots and experts, smaller blocks, and no map."""
    ids, B, E = (case.arguments[n] for n in ("topk_ids", "block_size", "num_experts"))
    local_ids = case.arguments.get("expert_map")
    T, K = ids.shape
    for kept in kept_parts(T):
        yield change(case, topk_ids=ids[kept])
    for kept in kept_parts(K):
        yield change(case, topk_ids=ids[:, kept])
    unused = np.setdiff1d(np.arange(E), ids)
    halves = np.array_split(unused, 2) if len(unused) > 1 else []
    singles = unused[:8, None] if len(unused) > 2 else ()
    for gone in (unused, *halves, *singles):
        if 0 < len(gone) < E:
            yield _without_experts(case, gone)
    if local_ids is not None:
        yield make_case(ids, B, E)
    for smaller in sorted({1, 2, B // 2, B - 1} & set(range(1, B))):
        yield change(case, block_size=smaller)


def _without_experts(case: Case, gone: HostArray) -> Case:
    ids, E = case.arguments["topk_ids"], case.arguments["num_experts"]
    local_ids = case.arguments.get("expert_map")
    # Ids behind them move down, also those that are too large.
    fewer = ids - np.searchsorted(gone, ids, side="left")
    if local_ids is None:
        return change(case, topk_ids=fewer, num_experts=E - len(gone))
    left = np.delete(local_ids, gone)
    freed = np.sort(local_ids[gone])
    freed = freed[freed >= 0]
    left = np.where(left >= 0, left - np.searchsorted(freed, left), -1)
    return change(case, topk_ids=fewer, num_experts=E - len(gone), expert_map=left)
