"""Run the backend on arrays that end, or begin, where memory may not be touched: a script.

``python guarded_runs.py after|before|plant``; a read or write beside an array ends the process.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numba_problems import Experts, draw_experts, plan_of, run_experts

import npmoe
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


def main() -> None:
    if sys.argv[1] == "plant":
        array = guard(np.ones(5), "after")
        ctypes.cast(array.ctypes.data + array.nbytes, ctypes.POINTER(ctypes.c_double))[0]
        return
    sizes = [(1, 1), (5, 3), (15, 17), (16, 48), (33, 64), (63, 65), (100, 97)]
    sys.stdout.write(f"{run(sys.argv[1], sizes)}\n")


if __name__ == "__main__":
    main()
