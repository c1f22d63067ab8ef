"""The product over padded blocks, as fused kernels do it: ``check_block_gemm``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Unpack

import numpy as np

from npmoe._typing import HostArray
from npmoe.naive.blocks import align_block_size
from npmoe.testing.bounds import gamma
from npmoe.testing.conformance.case import Case, Check, Effort, Expected, Kind
from npmoe.testing.conformance.common import float_expected, hygiene_checks, judge_values
from npmoe.testing.conformance.draw import (
    NO_RESERVE,
    Values,
    draw_ids,
    draw_values,
    far_apart,
    kept_parts,
    sizes,
)
from npmoe.testing.conformance.report import Report
from npmoe.testing.conformance.runner import COMPARISON, Settings, run_checks

Generator = Callable[[np.random.Generator, Effort], Iterator[Case]]
Change = Callable[[np.random.Generator, Case], Case]
Shape = tuple[int, int, int, int, int, int]  # T, K, E, N, M, B
_PLAIN = {"expert_map": None, "tail": "clean", "reverse": False}


def _build(a: HostArray, w: HostArray, weights: HostArray | None, options: dict[str, Any]) -> Case:
    """Return the case whose plan follows from topk_ids, block_size and expert_map in options."""
    ids, B, local_ids = (options[n] for n in ("topk_ids", "block_size", "expert_map"))
    (T, K), R = ids.shape, ids.size
    E = len(w) if local_ids is None else len(local_ids)
    plan = align_block_size(ids.tolist(), B, E, local_ids, pad_sorted_ids=True)
    rows, experts = np.array(plan[0], np.int32), np.array(plan[1], np.int32)
    if options["reverse"]:
        owner = np.append(ids.ravel(), -9)[rows]
        for e in np.unique(ids):
            rows[owner == e] = rows[owner == e][::-1]
    if options["tail"] != "clean":  # what a buffer may hold that nobody cleared
        rows, experts = np.append(rows, np.full(B, R, np.int32)), np.append(experts, np.int32(-1))
        behind, blocks = len(rows) - plan[2], plan[2] // B
        if options["tail"] == "routes" and R:
            rows[plan[2] :] = np.arange(behind) % R
            experts[blocks:] = np.arange(len(experts) - blocks) % 2 - 1
        else:
            rows[plan[2] :] = 2**30 + np.arange(behind)
            experts[blocks:] = 2**30
    arguments: dict[str, Any] = {"a": a, "w": w, "sorted_token_ids": rows, "expert_ids": experts}
    arguments["num_tokens_post_padded"] = np.array([plan[2]], np.int32)
    arguments["top_k"] = 1 if options["second"] else K
    if weights is not None:
        arguments["topk_weights"] = weights.reshape(-1, arguments["top_k"])
    note = f"T={T} E={E} K={K} B={B} N={a.shape[1]} M={w.shape[1]}, {plan[2] // B} blocks"
    return Case(
        arguments=arguments, note=note + ", second product" * options["second"], options=options
    )


def _make(
    rng: np.random.Generator,
    shape: Shape,
    values: Values,
    dtype: str,
    *,
    weights: bool = False,
    second: bool = False,
) -> Case:
    T, K, E, N, M, B = shape
    drawn = None
    if weights:  # all different, none of them 1
        drawn = rng.permutation(T * K).astype(dtype).reshape(T, K) + 2
        if values == "normal":
            drawn = draw_values(rng, (T, K), values, dtype)
    options = {"topk_ids": draw_ids(rng, T, E, K), "block_size": B, "second": second, **_PLAIN}
    return _build(
        draw_values(rng, (T * K if second else T, N), values, dtype),
        draw_values(rng, (E, M, N), values, dtype),
        drawn,
        options | {"exact": values == "integers"},
    )


def _rebuild(
    case: Case, *, a: HostArray | None = None, w: HostArray | None = None, **options: Any
) -> Case:
    given = case.arguments
    return _build(
        given["a"] if a is None else a,
        given["w"] if w is None else w,
        options.pop("weights", given.get("topk_weights")),
        case.options | options,
    )


def _expected(case: Case) -> tuple[Expected, ...]:
    a, w, rows, experts, post_padded, top_k, *rest = case.arguments.values()
    (total,), R, N = post_padded.tolist(), len(a) * top_k, a.shape[1]
    value, size = np.zeros((R, w.shape[1])), np.zeros((R, w.shape[1]))
    free = np.ones(value.shape, bool)
    if total:
        B = len(rows) // len(experts)
        routes, owner = rows[:total], np.repeat(experts[: total // B], B)
        routes, owner = routes[routes < R], owner[routes < R]
        free[routes] = False
        for e in np.unique(owner[owner >= 0]):
            mine = routes[owner == e]
            x, y = a[mine // top_k].astype(np.float64), w[e].T.astype(np.float64)
            scale = rest[0].reshape(-1)[mine, None].astype(np.float64) if rest else np.float64(1)
            value[mine] = (x @ y) * scale
            size[mine] = (np.abs(x) @ np.abs(y)) * np.abs(scale)
    # N products, N-1 sums and the weight, for the program and for the truth.
    bound = (gamma(N + 1, a.dtype) + gamma(N + 1, np.float64)) * size
    want = float_expected(value, bound, case, dtype=str(a.dtype))
    return (Expected(value=want.value, bound=want.bound, free=free, dtype=want.dtype),)


def _reductions(case: Case) -> Iterator[Case]:
    """Fewer tokens, then slots, experts, rows per block, narrower, then plainer plans."""
    a, w, ids = case.arguments["a"], case.arguments["w"], case.options["topk_ids"]
    weights, local_ids = case.arguments.get("topk_weights"), case.options["expert_map"]
    (T, K), B = ids.shape, case.options["block_size"]

    def take(tokens: Any, slots: Any) -> Case:
        """Keep some tokens and slots, with what belongs to them."""
        x = a.reshape(T, K, -1)[tokens][:, slots] if case.options["second"] else a[tokens]
        y = None if weights is None else weights.reshape(T, K)[tokens][:, slots]
        return _rebuild(
            case, a=x.reshape(-1, a.shape[1]), weights=y, topk_ids=ids[tokens][:, slots]
        )

    for kept in kept_parts(T):
        yield take(kept, slice(None))
    for kept in kept_parts(K):
        yield take(slice(None), kept)
    E = len(w) if local_ids is None else len(local_ids)
    unused = np.setdiff1d(np.arange(E), ids)
    for gone in (unused, *unused[:8, None]) if len(unused) > 1 else (unused,):
        if not 0 < len(gone) < E:
            continue
        fewer = (ids - (ids[..., None] > gone).sum(axis=-1)).astype(np.int32)
        if local_ids is None:
            yield _rebuild(case, w=np.delete(w, gone, axis=0), topk_ids=fewer)
        else:
            yield _rebuild(case, topk_ids=fewer, expert_map=np.delete(local_ids, gone))
    for smaller in {1, B // 2} - {0, B} if ids.size <= 1024 else ():  # blocks cost time
        yield _rebuild(case, block_size=smaller)
    if a.shape[1] == w.shape[1] > 1:
        for n in (a.shape[1] // 2, a.shape[1] - 1):
            yield _rebuild(case, a=a[:, :n], w=w[:, :n, :n])
    if a.shape[1] > 1:
        yield _rebuild(case, a=a[:, : a.shape[1] // 2], w=w[:, :, : a.shape[1] // 2])
    if w.shape[1] > 1:
        yield _rebuild(case, w=w[:, : w.shape[1] // 2])
    if weights is not None:
        yield _rebuild(case, weights=None)
    if case.options["reverse"]:
        yield _rebuild(case, reverse=False)


def _drawn(
    values: Values, change: Change | None = None, *, weights: bool = False, second: bool = False
) -> Generator:
    """Cases of growing size, each changed."""

    def generate(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
        for i, (rows, experts, n, m) in enumerate(sizes(rng, effort)):
            K = min(experts, (1, 2, 3, 4, 8)[i % 5])
            shape = (-(-rows // K), K, experts, n, m, (1, 2, 4, 3, 16, 8)[i % 6])
            case = _make(rng, shape, values, effort.dtype, weights=weights, second=second)
            yield case if change is None else change(rng, case)

    return generate


def _shaped(*shapes: Shape, tail: str = "clean") -> Generator:
    def generate(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
        for shape in shapes:
            yield _rebuild(_make(rng, shape, "integers", effort.dtype), tail=tail)

    return generate


def _three_slots(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
    """Tokens that differ, three slots each: route 1 is of token 0."""
    for T, E in ((1, 3), (2, 3), (3, 4), (7, 5)):
        case = _make(rng, (T, 3, E, 2, 2, 2), "integers", effort.dtype)
        a = np.arange(1, 2 * T + 1, dtype=effort.dtype).reshape(T, 2)
        yield _rebuild(case, a=a, w=np.abs(case.arguments["w"]) + 1)


def _never_zero(case: Case) -> Case:
    """Return the case with products that are not 0, so that a row unwritten or doubled shows."""
    return _rebuild(case, a=np.abs(case.arguments["a"]) + 1, w=np.abs(case.arguments["w"]) + 1)


def _last_route_first(_rng: np.random.Generator, case: Case) -> Case:
    """Send the last route to expert 0: padding of a later block would overwrite it."""
    ids = case.options["topk_ids"].copy()
    here = ids[-1] == 0
    ids[-1][here] = ids[-1, -1]
    ids[-1, -1] = 0
    B = max(case.options["block_size"], 2)
    return _never_zero(_rebuild(case, topk_ids=ids, block_size=B))


def _experts_elsewhere(rng: np.random.Generator, case: Case) -> Case:
    """Put half of the experts elsewhere; tokens and weights of only those are NaN."""
    w, ids, E = case.arguments["w"], case.options["topk_ids"], len(case.arguments["w"])
    local_ids = np.full(E, -1, np.int32)
    here = rng.permutation(E)[: E // 2]
    local_ids[here] = np.arange(len(here))
    case = _rebuild(_never_zero(case), expert_map=local_ids, w=np.abs(w[: max(1, len(here))]) + 1)
    elsewhere = local_ids[ids] < 0
    a, weights = case.arguments["a"].copy(), case.arguments["topk_weights"].copy()
    a[elsewhere.all(axis=1)] = np.nan
    weights[elsewhere] = np.nan
    return _rebuild(case, a=a, weights=weights)


def _numbered_anyhow(rng: np.random.Generator, case: Case) -> Case:
    """Permute by a map: expert_ids come in any order."""
    E = len(case.arguments["w"])
    return _rebuild(_never_zero(case), expert_map=rng.permutation(E).astype(np.int32))


def _some_routes_nowhere(rng: np.random.Generator, case: Case) -> Case:
    """Ids of no expert: their routes are in no block, and rows of tokens without others NaN."""
    ids, E = case.options["topk_ids"].copy(), len(case.arguments["w"])
    nowhere = rng.random(ids.shape) < 0.4
    ids[nowhere] = rng.choice([-1, E, E + 7], int(nowhere.sum()))
    a = case.arguments["a"].copy()
    a[nowhere.all(axis=1)] = np.nan
    return _rebuild(case, a=a, topk_ids=ids)


def _unused_weights_are_nan(_rng: np.random.Generator, case: Case) -> Case:
    ids, w = case.options["topk_ids"] // 2 * 2, case.arguments["w"].copy()
    w[np.setdiff1d(np.arange(len(w)), ids)] = np.nan
    return _rebuild(case, w=w, topk_ids=ids)


def _huge_scales(_rng: np.random.Generator, case: Case) -> Case:
    a, w = case.arguments["a"], case.arguments["w"]
    return _rebuild(case, a=a * a.dtype.type(2.0**60), w=w * w.dtype.type(2.0**-70))


def _rows_far_apart(rng: np.random.Generator, effort: Effort) -> Iterator[Case]:
    """Tokens and experts so far apart that their offsets need more than 32 bits."""
    case = _never_zero(_make(rng, (3, 1, 3, 2, 2, 2), "integers", effort.dtype))
    case = _rebuild(case, topk_ids=np.array([[2], [0], [1]], np.int32))
    far = far_apart(case.arguments["a"], case.arguments["w"])
    if far is not None:
        yield case.replace(a=far[0], w=far[1])


_FAR = f"""\
import mmap

step = 2**30 * arguments[0].itemsize  # bytes between tokens, and between experts
flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | {NO_RESERVE}
room = mmap.mmap(-1, 2 * step + 2**16, flags=flags)
far = []
for x, start in zip(map(np.ascontiguousarray, arguments[:2]), (0, 2**15)):
    far.append(np.ndarray(x.shape, x.dtype, room, start, (step, *x.strides[1:])))
    far[-1][...] = x
got = (target(*far, *arguments[2:]),)
"""
_CHECKS: tuple[tuple[str, str, Generator], ...] = (
    ("integers-are-exact", "every route meets its token and the expert of its block",
     _drawn("integers")),
    ("within-rounding", "normal values stay within gamma_N of the sum of absolute products: no "
     "reduced precision", _drawn("normal", weights=True)),
    ("token-is-route-over-top-k", "route r reads row r // top_k of a", _three_slots),
    ("second-product-reads-routes", "with top_k = 1, route r reads row r of a",
     _drawn("integers", second=True)),
    ("weights-are-of-routes", "the product of route r is multiplied by topk_weights.ravel()[r], "
     "once", _drawn("integers", weights=True)),
    ("second-product-weights", "with top_k = 1 as well", _drawn("integers", weights=True,
     second=True)),
    ("padding-writes-nothing", "rows with the sentinel are no route: not the last one either",
     _drawn("integers", _last_route_first)),
    ("blocks-without-expert-are-zero", "routes in a block of expert -1 get exact zeros, whatever "
     "their tokens and weights hold", _drawn("integers", _experts_elsewhere, weights=True)),
    ("experts-in-any-order", "expert_ids alone says which weights a block takes",
     _drawn("integers", _numbered_anyhow)),
    ("rows-behind-the-last-block", "routes and blocks behind num_tokens_post_padded mean nothing",
     _drawn("integers", lambda _, case: _rebuild(_never_zero(case), tail="routes"))),
    ("garbage-behind-the-last-block", "numbers of nothing behind num_tokens_post_padded are not "
     "used as indices", _drawn("integers", lambda _, case: _rebuild(case, tail="wild"))),
    ("routes-in-no-block", "the others are right where ids of no expert have left holes",
     _drawn("integers", _some_routes_nowhere)),
    ("unused-weights-are-not-read", "NaN in weights of experts without block reaches no output",
     _drawn("integers", _unused_weights_are_nan)),
    ("order-in-blocks-is-free", "routes of an expert in descending order are as good",
     _drawn("integers", lambda _, case: _rebuild(_never_zero(case), reverse=True))),
    ("no-tokens", "zero tokens give an empty result, with empty and with dirty buffers",
     lambda rng, effort: (
         case
         for tail in ("clean", "wild")
         for case in _shaped((0, 2, 4, 3, 2, 4), (0, 1, 1, 1, 1, 16), tail=tail)(rng, effort)
     )),
    ("square-is-not-transposed", "with M = N a transposed matrix still fits: it must not be used",
     _shaped((1, 1, 1, 2, 2, 1), (4, 2, 3, 5, 5, 4), (9, 2, 4, 16, 16, 16))),
    ("more-experts-than-a-block", "257 and 1,025 experts: no limit at 256 or 1,024",
     _shaped((20, 4, 257, 2, 1, 4), (64, 8, 1025, 1, 2, 2))),
    ("every-block-size", "blocks of 1 to 256 rows, powers of two and not, full, partial and one "
     "more", _shaped(*((t, 2, 3, 2, 3, b) for b in (1, 2, 3, 7, 16) for t in (b, b + 1)),
                     *((2 * b + 3, 1, 2, 1, 2, b) for b in (17, 24, 32, 64, 100, 128, 256)))),
    ("edges-of-tiles", "widths one below, at and above 16, 32, 64 and 128",
     _shaped(*((4, 2, 2, n, m, 4) for n, m in ((15, 17), (16, 16), (17, 1), (31, 33))),
             *((5, 2, 2, n, m, 16) for n, m in ((65, 63), (64, 64), (127, 129), (129, 1))))),
    ("routes-beyond-16-bits", "more than 65,536 routes: numbers are not cut",
     _shaped((66_001, 1, 2, 1, 1, 256))),
    ("offsets-beyond-32-bits", "token 2 and expert 2 begin 2^31 elements behind the first",
     _rows_far_apart),
    ("range-is-kept", "values of 2^60 times 2^-70: nothing passes through a format of less range",
     _drawn("integers", _huge_scales)),
)  # fmt: skip

BLOCK_GEMM = Kind(
    name="block_gemm",
    signature="fn(a (T,N), w (E,M,N), sorted_token_ids (P,), expert_ids (P/B,), "
    "num_tokens_post_padded (1,), top_k, topk_weights (T,K) = None) -> (T*K,M)",
    expected=_expected,
    checks=(
        *(
            Check(
                name=name,
                about=about,
                cases=cases,
                judge=judge_values(_expected),
                script=(lambda _: _FAR + COMPARISON) if cases is _rows_far_apart else None,
            )
            for name, about, cases in _CHECKS
        ),
        *hygiene_checks(_drawn("integers", weights=True), _expected),
    ),
    reductions=_reductions,
)


def check_block_gemm(fn: Callable[..., Any], **settings: Unpack[Settings]) -> Report:
    """Check ``fn(a, w, sorted_token_ids, expert_ids, num_tokens_post_padded, top_k, ...)``.

    The shapes are (T,N), (E,M,N), (P,), (P/B,), (1,), a number, and (T,K) for topk_weights, which
    is left out if there are none; the result is (T*K,M). Row r must be
    ``w[e] @ a[r // top_k]``, times ``topk_weights.ravel()[r]``, if r is in a block of expert e;
    0 if that is -1; anything if it is in none. P is a multiple of the block size B. Keywords are
    those of `run_checks`.
    """
    return run_checks(BLOCK_GEMM, fn, **settings)
