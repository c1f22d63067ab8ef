"""The few words that Python lacks in a kernel; none is ever a call.

Integers in kernels are int64, as Numba makes them; so are addresses. Two of Python's habits cost
instructions on every access, and are put off here: ``x[-1]`` means the last element, and ``//``
rounds down. `natural` says that a number is not negative, so that neither can happen.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from numba import config, cuda
from numba.cuda.types import float32, float64, int32, int64, uint16, uint32

ALL_LANES = 0xFFFFFFFF
WARP = 32

# Lines of PTX are those of the function itself, not of the kernel that calls it. Numba's simulator
# makes no PTX and does not know the option.
_LINES = {} if config.ENABLE_CUDASIM else {"lineinfo": True}
inline = cuda.jit(device=True, **_LINES)

# Options of a variant by the names of the CUDA C++ kernels; half precision comes as bits.
TYPES = {"float": float32, "double": float64, "half16": uint16, "bfloat16": uint16}


def bounds(threads: int, blocks: int | None = None) -> Any:
    """Mark a kernel with its threads, and the blocks of them that must fit a multiprocessor."""

    def mark(kernel: Any) -> Any:
        kernel.launch_bounds = (threads,) if blocks is None else (threads, blocks)
        return kernel

    return mark


@inline
def natural(i):
    """Say that i is in 0..2**32-1: its sign is dropped, and the compiler knows."""
    return int64(uint32(i))


@inline
def quotient(a, b):
    """Divide a in 0..2**32-1 by b in 1..2**31-1, in 32 bits and with no check of b."""
    return natural(a) // (((b - 1) & 0x7FFFFFFF) + 1)


@inline
def expert_of_entry(first, num_experts, entry):
    """Return the last expert whose first entry, a row or a block, is at most `entry`."""
    low, high = 0, num_experts - 1
    while low < high:
        middle = natural(low + high + 1) >> 1
        if first[middle] <= entry:
            low = middle
        else:
            high = middle - 1
    return natural(low)


@inline
def warp_sum(x):
    """Add up what the lanes of a warp bring, in one tree."""
    step = WARP // 2
    while step > 0:
        x += cuda.shfl_xor_sync(ALL_LANES, x, step)
        step >>= 1
    return x


@lru_cache(maxsize=4)
def widen_of(WEIGHT: str) -> Any:
    """Return the function that makes a number of a stored element."""
    if WEIGHT == "half16":

        @inline
        def widen(bits):
            return cuda.libdevice.half2float(bits)

    elif WEIGHT == "bfloat16":

        @inline
        def widen(bits):
            return cuda.libdevice.int_as_float(int32(bits) << 16)

    else:

        @inline
        def widen(x):
            return x

    return widen
