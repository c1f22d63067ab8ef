"""Dispatch plans as other programs keep them, and back: the layouts that list rows by expert.

``to_x`` takes a plan apart, ``from_x`` builds one; tables over experts are in `plan_tables`. What a
layout does not hold has to be given: usually T and K, and the order of rows for those that are
offsets alone. A capacity and its slots are in none of them. A plan's rows ascend inside an expert,
so rows of a program whose sort is not stable come out in another order than they went in.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from npmoe._checks import Axes, check_integer_ids
from npmoe._typing import HostArray
from npmoe.dispatch import DispatchPlan
from npmoe.errors import PlanError
from npmoe.plans.blocks import check_size


class MegaBlocksPlan(NamedTuple):
    """What MegaBlocks' dropless layer sorts by.

    Attributes
    ----------
    indices, bin_ids : (R,) int32 array
        Route and expert of every row.
    bins, padded_bins : (E,) int32 array
        Where experts end; the same with every expert padded to whole blocks.
    """

    indices: HostArray
    bin_ids: HostArray
    bins: HostArray
    padded_bins: HostArray


class ScatterMoEPlan(NamedTuple):
    """What ScatterMoE sorts by.

    Attributes
    ----------
    sorted_expert_idxs, sorted_scattered_idxs : (R,) int32 array
        Expert and route of every row.
    expert_offsets : (E,) int32 array
        Where experts end.
    """

    sorted_expert_idxs: HostArray
    sorted_scattered_idxs: HostArray
    expert_offsets: HostArray


class SonicPlan(NamedTuple):
    """What SonicMoE sorts by; kept routes are numbered by token, without gaps.

    Attributes
    ----------
    expert_frequency_offset : (E+1,) int32 array
        Where experts begin.
    x_gather_idx, s_scatter_idx : (R,) int32 array
        Token and kept route of every row.
    s_reverse_scatter_idx : (R,) int32 array
        The row of every kept route.
    num_activated_expert_per_token_offset : (T+1,) int32 array
        Where the kept routes of tokens begin.
    """

    expert_frequency_offset: HostArray
    x_gather_idx: HostArray
    s_scatter_idx: HostArray
    s_reverse_scatter_idx: HostArray
    num_activated_expert_per_token_offset: HostArray


def to_megablocks(plan: DispatchPlan, *, block_size: int = 128) -> MegaBlocksPlan:
    """Return a plan as MegaBlocks' ``indices_and_padded_bins`` does.

    Parameters
    ----------
    plan : DispatchPlan
        On the host.
    block_size : int
        To which `padded_bins` rounds every expert.

    Returns
    -------
    MegaBlocksPlan
        Lost: T and K.
    """
    B = check_size("to_megablocks", "block_size", block_size)
    counts = plan.tokens_per_expert
    padded = np.cumsum(-(-counts // B) * B)
    return MegaBlocksPlan(
        _routes(plan), _experts(plan), plan.expert_offsets[1:].copy(), padded.astype(np.int32)
    )


def from_megablocks(layout: MegaBlocksPlan, *, num_tokens: int, top_k: int) -> DispatchPlan:
    """Return the plan of MegaBlocks' arrays, of which `padded_bins` says nothing new.

    Parameters
    ----------
    layout : MegaBlocksPlan
    num_tokens, top_k : int
        T and K.

    Returns
    -------
    DispatchPlan
        Dropless.

    Raises
    ------
    PlanError
        If the arrays contradict each other, or are not of T*K routes.
    """
    plan = _from_ends("from_megablocks", "bins", layout.bins, layout.indices, num_tokens, top_k)
    _check_experts("from_megablocks", "bin_ids", layout.bin_ids, plan)
    return plan


def to_scattermoe(plan: DispatchPlan) -> ScatterMoEPlan:
    """Return a plan as ScatterMoE's ``flatten_and_sort`` and ``padded_block_indices`` do.

    Parameters
    ----------
    plan : DispatchPlan
        On the host.

    Returns
    -------
    ScatterMoEPlan
        Lost: T and K.
    """
    return ScatterMoEPlan(_experts(plan), _routes(plan), plan.expert_offsets[1:].copy())


def from_scattermoe(layout: ScatterMoEPlan, *, num_tokens: int, top_k: int) -> DispatchPlan:
    """Return the plan of ScatterMoE's arrays.

    Parameters
    ----------
    layout : ScatterMoEPlan
    num_tokens, top_k : int
        T and K.

    Returns
    -------
    DispatchPlan
        Dropless.

    Raises
    ------
    PlanError
        If the arrays contradict each other, or are not of T*K routes.
    """
    function = "from_scattermoe"
    routes = layout.sorted_scattered_idxs
    plan = _from_ends(function, "expert_offsets", layout.expert_offsets, routes, num_tokens, top_k)
    _check_experts(function, "sorted_expert_idxs", layout.sorted_expert_idxs, plan)
    return plan


def to_sonic(plan: DispatchPlan) -> SonicPlan:
    """Return a plan as SonicMoE keeps it.

    Parameters
    ----------
    plan : DispatchPlan
        On the host.

    Returns
    -------
    SonicPlan
        Lost where routes have no row: in which slots of their tokens the kept ones were. The
        weights that go with it are those of kept routes, in order.
    """
    kept = plan.row_ids >= 0  # (T, K)
    number = np.cumsum(kept) - 1  # of every route among the kept ones
    return SonicPlan(
        expert_frequency_offset=plan.expert_offsets.copy(),
        x_gather_idx=plan.token_ids[: plan.num_rows].copy(),
        s_scatter_idx=number[plan.pair_ids[: plan.num_rows]].astype(np.int32),
        s_reverse_scatter_idx=plan.row_ids[kept],
        num_activated_expert_per_token_offset=_offsets(kept.sum(axis=1)),
    )


def from_sonic(layout: SonicPlan, *, top_k: int | None = None) -> DispatchPlan:
    """Return the plan of SonicMoE's arrays; each token's routes take its first slots.

    Parameters
    ----------
    layout : SonicPlan
    top_k : int, optional
        K; None is the largest number of experts of a token.

    Returns
    -------
    DispatchPlan
        Dropless.

    Raises
    ------
    PlanError
        If the arrays contradict each other, or a token has more than K experts.
    """
    function = "from_sonic"
    name = "num_activated_expert_per_token_offset"
    starts = _read(function, name, layout.num_activated_expert_per_token_offset)
    _check_offsets(function, name, starts)
    per_token = np.diff(starts)
    most = int(per_token.max(initial=0))
    K = most if top_k is None else check_size(function, "top_k", top_k)
    if most > K:
        raise PlanError(
            f"{function}: top_k must be at least {most}, got {K}. A token has so many experts."
        )
    tokens = np.repeat(np.arange(per_token.shape[0]), per_token)  # of every kept route
    numbers = _read(function, "s_scatter_idx", layout.s_scatter_idx)
    _check_routes(function, "s_scatter_idx", numbers, tokens.shape[0])
    rows = np.empty(tokens.shape[0], np.int64)
    rows[numbers] = np.arange(numbers.shape[0])
    for name, given, expected in (
        ("x_gather_idx", layout.x_gather_idx, tokens[numbers]),
        ("s_reverse_scatter_idx", layout.s_reverse_scatter_idx, rows),
    ):
        _check_equal(function, name, _read(function, name, given), expected, "s_scatter_idx")
    slots = np.arange(tokens.shape[0]) - starts[tokens]
    routes = (tokens * K + slots)[numbers]
    offsets = layout.expert_frequency_offset
    return plan_from_rows(
        function, "expert_frequency_offset", offsets, routes, per_token.shape[0], K
    )


def to_torch_offsets(plan: DispatchPlan) -> HostArray:
    """Return where every expert's rows end (E,) int32: ``offs`` of torch's grouped_mm.

    Parameters
    ----------
    plan : DispatchPlan
        On the host. Lost: which route every row is, T and K.

    Returns
    -------
    (E,) int32 array
        New.

    Examples
    --------
    >>> from npmoe.dispatch import plan_dispatch
    >>> plan = plan_dispatch(np.array([[2, 0], [2, 1], [0, 2]]), num_experts=4)
    >>> to_torch_offsets(plan).tolist(), to_group_sizes(plan).tolist()
    ([2, 3, 6, 6], [2, 1, 3, 0])
    """
    return np.array(plan.expert_offsets[1:], np.int32)


def from_torch_offsets(
    offsets: HostArray, pair_ids: HostArray, *, num_tokens: int, top_k: int
) -> DispatchPlan:
    """Return the plan of ends of experts and of the route of every row.

    Parameters
    ----------
    offsets : (E,) int array
        Where every expert's rows end.
    pair_ids : (R,) int array
        The route ``t*K + k`` of every row.
    num_tokens, top_k : int
        T and K.

    Returns
    -------
    DispatchPlan
        Dropless.

    Raises
    ------
    PlanError
        If the offsets fall or do not end at R, or routes repeat or are not of T*K.
    """
    return _from_ends("from_torch_offsets", "offsets", offsets, pair_ids, num_tokens, top_k)


def to_group_sizes(plan: DispatchPlan) -> HostArray:
    """Return how many rows every expert has (E,) int32: ``group_sizes`` of jax.lax.ragged_dot.

    Parameters
    ----------
    plan : DispatchPlan
        On the host. Lost: which route every row is, T and K.

    Returns
    -------
    (E,) int32 array
        New.
    """
    return np.array(plan.tokens_per_expert, np.int32)


def from_group_sizes(
    group_sizes: HostArray, pair_ids: HostArray, *, num_tokens: int, top_k: int
) -> DispatchPlan:
    """Return the plan of sizes of experts and of the route of every row.

    Parameters
    ----------
    group_sizes : (E,) int array
        Rows of every expert.
    pair_ids : (R,) int array
        The route ``t*K + k`` of every row.
    num_tokens, top_k : int
        T and K.

    Returns
    -------
    DispatchPlan
        Dropless.

    Raises
    ------
    PlanError
        If a size is negative or they do not add up to R, or routes repeat or are not of T*K.
    """
    function = "from_group_sizes"
    sizes = _read(function, "group_sizes", group_sizes)
    offsets = np.append(0, np.cumsum(sizes))
    return plan_from_rows(function, "group_sizes", offsets, pair_ids, num_tokens, top_k)


def plan_from_rows(
    function: str,
    name: str,
    expert_offsets: HostArray,
    pair_ids: HostArray,
    num_tokens: int,
    top_k: int,
) -> DispatchPlan:
    """Return the plan of rows (R,) listed by expert, or raise; `name` is where offsets are from."""
    offsets = _read(function, name, expert_offsets)
    _check_offsets(function, name, offsets)
    routes = _read(function, "the routes of rows", pair_ids)
    _check_routes(function, "the routes of rows", routes, num_tokens * top_k)
    if offsets[-1] != routes.shape[0]:
        raise PlanError(
            f"{function}: {name} must end at the number of rows {routes.shape[0]}, got "
            f"{offsets[-1]}."
        )
    experts = np.repeat(np.arange(offsets.shape[0] - 1), np.diff(offsets))
    routes = routes[np.lexsort((routes, experts))]
    row_ids = np.full(num_tokens * top_k, -1, np.int32)
    row_ids[routes] = np.arange(routes.shape[0], dtype=np.int32)
    return DispatchPlan(
        pair_ids=routes.astype(np.int32),
        token_ids=(routes // max(top_k, 1)).astype(np.int32),
        row_ids=row_ids.reshape(num_tokens, top_k),
        expert_offsets=offsets.astype(np.int32),
        num_tokens=num_tokens,
        top_k=top_k,
    )


def _from_ends(
    function: str, name: str, ends: HostArray, routes: HostArray, num_tokens: int, top_k: int
) -> DispatchPlan:
    offsets = np.append(0, _read(function, name, ends))
    return plan_from_rows(function, name, offsets, routes, num_tokens, top_k)


def _routes(plan: DispatchPlan) -> HostArray:
    return np.array(plan.pair_ids[: plan.num_rows], np.int32)


def _experts(plan: DispatchPlan) -> HostArray:
    """Return the expert of every row (R,) int32."""
    return np.repeat(np.arange(plan.num_experts, dtype=np.int32), plan.tokens_per_expert)


def _offsets(counts: HostArray) -> HostArray:
    return np.append(0, np.cumsum(counts)).astype(np.int32)


def _read(function: str, name: str, array: HostArray) -> HostArray:
    """Return an int64 vector, or raise."""
    array = np.asarray(array)
    check_integer_ids(function, name, array)
    Axes(function).check(name, array, "R")
    return array.astype(np.int64)


def _check_offsets(function: str, name: str, offsets: HostArray) -> None:
    if offsets.size and offsets[0] == 0 and (np.diff(offsets) >= 0).all():
        return
    raise PlanError(f"{function}: {name} must not fall below 0 or what is before, got {offsets}.")


def _check_routes(function: str, name: str, routes: HostArray, num_routes: int) -> None:
    outside = routes[(routes < 0) | (routes >= num_routes)]
    if outside.size:
        raise PlanError(f"{function}: {name} must lie in 0..{num_routes - 1}, got {outside[0]}.")
    repeated = np.flatnonzero(np.bincount(routes, minlength=1) > 1)
    if repeated.size:
        raise PlanError(f"{function}: {name} must be distinct, got {repeated[0]} twice.")


def _check_experts(function: str, name: str, given: HostArray, plan: DispatchPlan) -> None:
    _check_equal(function, name, _read(function, name, given), _experts(plan), "the offsets")


def _check_equal(
    function: str, name: str, given: HostArray, expected: HostArray, source: str
) -> None:
    if not np.array_equal(given, expected):
        raise PlanError(
            f"{function}: {name} must be {_short(expected)}, got {_short(given)}. It is bound by "
            f"{source}."
        )


def _short(array: HostArray) -> str:
    return np.array2string(array, threshold=16, edgeitems=4, separator=", ")
