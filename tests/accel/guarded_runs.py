"""Run the backend on arrays that end, or begin, where memory may not be touched: a script.

``python guarded_runs.py after|before|plant``; a read or write beside an array ends the process.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numba_problems import Experts, draw_experts, plan_of, run_experts

import npmoe
from accel.numba_cpu import launch, team
from npmoe import MoEParams

PAGE = mmap.PAGESIZE
_keep: list[Any] = []


def guard(array: np.ndarray, side: str) -> np.ndarray:
    """Return a copy with a forbidden page right after it, or right before."""
    size = -(-max(array.nbytes, 1) // PAGE) * PAGE
    memory = mmap.mmap(-1, size + PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    forbidden = start + size if side == "after" else start
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(forbidden), ctypes.c_size_t(PAGE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    first = size - array.nbytes if side == "after" else PAGE
    copy = np.frombuffer(memory, array.dtype, array.size, offset=first).reshape(array.shape)
    copy[...] = array
    _keep.append(memory)
    return copy


def guarded(case: Experts, side: str) -> Experts:
    p = case.params
    arrays = {n: getattr(p, n) for n in MoEParams.__dataclass_fields__}
    plan = case.plan
    names = ("pair_ids", "token_ids", "row_ids", "expert_offsets")
    return Experts(
        case.cfg,
        MoEParams(**{n: None if a is None else guard(a, side) for n, a in arrays.items()}),
        type(plan)(
            **{n: guard(getattr(plan, n), side) for n in names},
            num_tokens=plan.num_tokens,
            top_k=plan.top_k,
        ),
        guard(case.x, side),
        guard(case.topk_weights, side),
        guard(case.grad_output, side),
        None if case.dropout is None else guard(case.dropout, side),
    )


def run(side: str, sizes: Sequence[tuple[int, int]]) -> int:
    backend = npmoe.get_backend("numba")
    done = 0
    for hidden, inner in sizes:
        for stored in ("float32", "float64", "float16"):
            dtype = "float64" if stored == "float64" else "float32"
            case = draw_experts(
                plan_of([1, 0, 4, 16, 17, 70]), hidden, inner, bias=True, dropout=True,
                position=("output", "mid", "input")[hidden % 3],
            ).astype(dtype, stored)  # fmt: skip
            fenced = guarded(case, side)
            plain = run_experts(backend, case)
            shapes = {n: getattr(case.params, n).shape
                      for n in ("router_weight", "gate_up_proj", "down_proj", "gate_up_bias",
                                "down_bias")}  # fmt: skip
            out = MoEParams(**{n: guard(np.zeros(s, dtype), side) for n, s in shapes.items()})
            found = run_experts(backend, fenced, out=out)
            for name, value in plain.items():
                assert value.tobytes() == found[name].tobytes(), name
            x, plan = fenced.x, fenced.plan
            backend.linear(x, guard(np.ones((7, hidden), dtype), side), None)
            backend.combine_rows(guard(backend.gather_rows(x, plan), side), plan)
            backend.plan_dispatch(guard(np.arange(30, dtype=np.int32).reshape(10, 3) % 5, side),
                                  num_experts=5)  # fmt: skip
            done += 1
    return done


@contextmanager
def fenced_memory(side: str) -> Iterator[None]:
    """Let the backend's own arrays and scratch end, or begin, at a forbidden page too."""
    originals = np.empty, launch.aligned_empty, team.aligned_empty
    empty = np.empty

    def fenced(shape: Any, dtype: Any = float) -> np.ndarray:
        return guard(empty(shape, dtype), side)

    np.empty = launch.aligned_empty = team.aligned_empty = fenced
    try:
        yield
    finally:
        np.empty, launch.aligned_empty, team.aligned_empty = originals


def run_model_verbs(side: str, shapes: Sequence[tuple[int, ...]]) -> int:
    done = 0
    for number, (heads, kv_heads, length, keys, size) in enumerate(shapes):
        for dtype in ("float32", "float64"):
            rng = np.random.default_rng(number)
            q, grad = (rng.standard_normal((2, heads, length, size)).astype(dtype)
                       for _ in range(2))  # fmt: skip
            k, v = (rng.standard_normal((2, kv_heads, keys, size)).astype(dtype)
                    for _ in range(2))  # fmt: skip
            fenced = [guard(a, side) for a in (grad, q, k, v)]
            weight = guard(q[0, 0, 0], side)
            backend: Any = npmoe.get_backend("numba", num_threads=1)
            plain = backend.nn
            for kind in ("causal", "full")[keys < length :]:
                out, saved = getattr(plain, f"{kind}_attention")(q, k, v)
                grads = getattr(plain, f"{kind}_attention_backward")(grad, q, k, v, saved)
                # Scratch of exactly the room that this problem asks for, and of no other thread.
                fresh: Any = npmoe.get_backend("numba", num_threads=1)
                with fenced_memory(side):
                    found, kept = getattr(fresh.nn, f"{kind}_attention")(*fenced[1:])
                fresh = npmoe.get_backend("numba", num_threads=1)
                with fenced_memory(side):
                    found_grads = getattr(fresh.nn, f"{kind}_attention_backward")(*fenced, kept)
                for got, want in zip((found, *found_grads), (out, *grads), strict=True):
                    np.testing.assert_array_equal(got, want)
            with fenced_memory(side):
                y = plain.rms_norm(fenced[1], weight)
                grads = plain.rms_norm_backward(*fenced[:2], weight)
            np.testing.assert_array_equal(y, plain.rms_norm(q, weight))
            for got, want in zip(grads, plain.rms_norm_backward(grad, q, weight), strict=True):
                np.testing.assert_array_equal(got, want)
            done += 1
    return done


def main() -> None:
    if sys.argv[1] == "plant":
        array = guard(np.ones(5), "after")
        ctypes.cast(array.ctypes.data + array.nbytes, ctypes.POINTER(ctypes.c_double))[0]
        return
    sizes = [(1, 1), (5, 3), (15, 17), (16, 48), (33, 64), (63, 65), (100, 97)]
    shapes = [(1, 1, 1, 1, 1), (4, 2, 31, 33, 17), (2, 2, 30, 32, 16), (2, 1, 61, 97, 33),
              (1, 1, 7, 64, 130), (3, 1, 40, 5, 15), (2, 2, 64, 64, 32)]  # fmt: skip
    done = run(sys.argv[1], sizes) + run_model_verbs(sys.argv[1], shapes)
    sys.stdout.write(f"{done}\n")


if __name__ == "__main__":
    main()
