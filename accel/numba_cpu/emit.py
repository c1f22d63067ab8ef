"""LLVM IR for vectors: what Numba's language has no words for.

Every function takes the IR builder of an intrinsic under construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
BYTES = I8.as_pointer()


def scalar_type(dtype: types.Float) -> ir.Type:
    """Return the IR type of a Numba float type."""
    return ir.FloatType() if dtype == types.float32 else ir.DoubleType()


class Vectors:
    """Operations on vectors of `lanes` numbers of one float type."""

    def __init__(self, builder: Any, dtype: types.Float, lanes: int) -> None:
        self.builder = builder
        self.lanes = lanes
        self.scalar = scalar_type(dtype)
        self.type = ir.VectorType(self.scalar, lanes)
        self.bytes = int(dtype.bitwidth) // 8
        name = f"llvm.fma.v{lanes}f{dtype.bitwidth}"
        signature = ir.FunctionType(self.type, [self.type] * 3)
        self._fma = cgutils.get_or_insert_function(builder.module, signature, name)

    def zero(self) -> Any:
        """Return a vector of zeros."""
        return ir.Constant(self.type, [0.0] * self.lanes)

    def load(self, pointer: Any, offset: Any) -> Any:
        """Load from any address that suits one number."""
        address = self.builder.gep(pointer, [offset])
        loaded = self.builder.load(self.builder.bitcast(address, self.type.as_pointer()))
        loaded.align = self.bytes
        return loaded

    def store(self, value: Any, pointer: Any, offset: Any, *, stream: bool = False) -> None:
        """Store; `stream` past the caches, to an address that is a multiple of the vector."""
        address = self.builder.gep(pointer, [offset])
        stored = self.builder.store(value, self.builder.bitcast(address, self.type.as_pointer()))
        stored.align = self.bytes * self.lanes if stream else self.bytes
        if stream:
            one = self.builder.module.add_metadata([ir.Constant(I32, 1)])
            stored.set_metadata("nontemporal", one)

    def broadcast(self, number: Any) -> Any:
        """Return a vector with `number` in every lane."""
        undefined = ir.Constant(self.type, ir.Undefined)
        first = self.builder.insert_element(undefined, number, I32(0))
        return self.shuffle(first, undefined, [0] * self.lanes)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """Return a * b + c, rounded once."""
        return self.builder.call(self._fma, [a, b, c])

    def shuffle(self, a: Any, b: Any, lanes: Sequence[int]) -> Any:
        """Return the chosen lanes of a, then of b."""
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
        return self.builder.shuffle_vector(a, b, mask)

    def sums(self, vectors: Sequence[Any]) -> list[Any]:
        """Return the sum over the lanes of each vector, as numbers.

        Neighbouring lanes are added first, then neighbouring sums: one tree for all vectors.
        """
        found: list[Any] = []
        for start in range(0, len(vectors), self.lanes):
            group = list(vectors[start : start + self.lanes])
            count = len(group)
            while len(group) > 1:
                if len(group) % 2:
                    group.append(group[-1])
                group = [self._pair(a, b) for a, b in zip(group[::2], group[1::2], strict=True)]
            vector, width, chunk = group[0], self.lanes, 1
            while chunk < count:
                chunk *= 2
            while width > chunk:
                even = self.shuffle(vector, vector, range(0, width, 2))
                odd = self.shuffle(vector, vector, range(1, width, 2))
                vector, width = self.builder.fadd(even, odd), width // 2
            found += [self.builder.extract_element(vector, I32(i)) for i in range(count)]
        return found

    def _pair(self, a: Any, b: Any) -> Any:
        """Return sums of neighbours: those of a, then those of b."""
        even = self.shuffle(a, b, range(0, 2 * self.lanes, 2))
        odd = self.shuffle(a, b, range(1, 2 * self.lanes, 2))
        return self.builder.fadd(even, odd)

    def transpose(self, rows: Sequence[Any]) -> list[Any]:
        """Transpose a square of `lanes` vectors."""
        rows, n = list(rows), self.lanes
        half = n // 2
        while half:
            step = [i // half % 2 for i in range(n)]
            low = [i + n - half if s else i for i, s in enumerate(step)]
            high = [i + n if s else i + half for i, s in enumerate(step)]
            done = list(rows)
            for i in range(n):
                if not step[i]:
                    done[i] = self.shuffle(rows[i], rows[i + half], low)
                    done[i + half] = self.shuffle(rows[i], rows[i + half], high)
            rows, half = done, half // 2
        return rows


def data_pointer(context: Any, builder: Any, array_type: types.Array, array: Any) -> Any:
    """Return the address of an array's first number."""
    return context.make_array(array_type)(context, builder, array).data


def prefetch(builder: Any, pointer: Any, offset: Any) -> None:
    """Ask for the cache line of pointer[offset]; harmless for any address."""
    signature = ir.FunctionType(ir.VoidType(), [BYTES, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
    address = builder.bitcast(builder.gep(pointer, [offset]), BYTES)
    builder.call(function, [address, I32(0), I32(3), I32(1)])


def smaller(builder: Any, a: Any, b: Any) -> Any:
    """Return the smaller of two signed integers."""
    return builder.select(builder.icmp_signed("<", a, b), a, b)
