"""Two kernels in Numba's own CUDA simulator, which runs them as plain Python."""

from __future__ import annotations

import os
import subprocess
import sys

from numba_cuda_cases import need_numba_cuda

need_numba_cuda()

PROGRAM = """
import numpy as np
from numba import cuda
from accel.numba_cuda import plan, rows

def run(kernel, grid, threads, args, shared=0):
    cuda.jit(kernel)[grid, threads, 0, shared](*args)

i = np.int32
x = np.arange(12, dtype=np.float32).reshape(4, 3)
token_ids = np.array([2, 0, 3, -1], i)
out = np.full((4, 3), 7, np.float32)
run(rows.gather_rows("float"), 4, 128, [x, token_ids, i(3), out])
assert (out[:3] == x[[2, 0, 3]]).all(), out
assert (out[3] == 7).all(), out

ids = np.array([2, 0, 2, 1, 0, 2, -1, 9], i)
counts, illegal = np.full((1, 4), 55, i), np.zeros(1, i)
run(plan.count_routes, 1, 256, [ids, np.empty(0, i), i(8), i(4), i(4), i(4), counts, illegal], 16)
assert counts.tolist() == [[2, 1, 3, 0]], counts
assert illegal[0] == 1
print("agreed")
"""


def test_simulator() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "agreed"
