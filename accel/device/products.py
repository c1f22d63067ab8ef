"""Launches of the grouped products: `grouped_gemm` and `grouped_wgrad` of a tiling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from npmoe._half import named_dtype
from npmoe._typing import Array
from npmoe.dispatch import DispatchPlan

from ..curve import Curve
from .kernel import Device, InOut, Kernel, Out
from .plans import Blocks, view_blocks
from .tilings import SIMT, Tiling, element_name, real_name

STORE, ROUTED, ACTIVATE, ACTIVATE_BACKWARD = range(4)
NO_GATHER, GATHER_X, GATHER_GRAD = range(3)
_I = np.int32


@dataclass(frozen=True, slots=True)
class Products:
    """The grouped products of one plan, on one device, in one tiling and dtype."""

    device: Device
    tiling: Tiling
    plan: DispatchPlan
    blocks: Blocks
    dtype: Any

    @classmethod
    def of(cls, device: Device, tiling: Tiling, plan: DispatchPlan, dtype: Any) -> Products:
        """Return those of a plan, with the block size for its load."""
        if tiling.operand is not None and np.dtype(dtype) == np.float64:
            tiling = SIMT  # nothing is rounded to less than a half of what it is
        size = tiling.block_size(plan.num_tokens * plan.top_k, plan.num_experts)
        return cls(device, tiling, plan, view_blocks(device, plan, size), np.dtype(dtype))

    def operand(self, x: Array) -> Array:
        """Return an array as the products multiply it."""
        x = self.device.contiguous(x)
        stored = self.tiling.stored
        return x if stored is None or stored == x.dtype.name else cast(self.device, x, stored)

    @property
    def operand_dtype(self) -> Any:
        """Element type of rows that a product writes for another product."""
        stored = self.tiling.stored
        return self.dtype if stored is None else named_dtype("cupy", stored, "cuda13")

    def column_tiles(self, columns: int) -> int:
        """Return the tiles of so many columns."""
        return -(-columns // self.tiling.tile_n)

    def multiply(
        self,
        x: Array,
        weight: Array,
        epilogue: int,
        *,
        gather: bool = False,
        transposed: bool = False,
        bias: Array | None = None,
        topk_weights: Array | None = None,
        y: Array | None = None,
        act: Array | None = None,
        grad_y: Array | None = None,
        dots: Array | None = None,
        curve: Curve | None = None,
    ) -> None:
        """Launch `grouped_gemm`; `accel/kernels/grouped.cuh` says what each epilogue writes."""
        weight = self.operand(weight)
        depth = weight.shape[1] if transposed else weight.shape[2]
        columns = weight.shape[2] if transposed else weight.shape[1]
        gated = curve is not None and curve.gated
        # Of y, or of the y whose activation is meant.
        width = 2 * columns if gated and epilogue == ACTIVATE_BACKWARD else columns
        tiles = self.column_tiles(columns)
        if self.blocks.most == 0 or tiles == 0:
            return
        real = self.dtype.type
        kind = 0 if curve is None else curve.kind
        settings = np.zeros(5) if curve is None else curve.settings
        self.device.launch(
            self._kernel(self.tiling.grouped, "grouped_gemm", x, weight, {
                "EPILOGUE": epilogue, "GATED": int(gated), "GATHER": int(gather),
                "TRANSPOSED": int(transposed), "BLOCK_M": self.blocks.block_size,
            }),
            (self.blocks.most, tiles), self.tiling.threads(self.blocks.block_size),
            [x, weight, *self.blocks[:3], self.device.contiguous(self.plan.row_ids),
             _I(self.plan.num_tokens * self.plan.top_k), _I(self.plan.top_k), _I(width), _I(depth),
             bias, topk_weights, y if epilogue == ACTIVATE_BACKWARD else _out(y),
             *map(_out, (act, grad_y, dots)), _I(kind),
             *map(real, settings)],
            self.tiling.shared_mem(self.blocks.block_size),
        )  # fmt: skip

    def weight_gradient(
        self, grad_y: Array, x: Array, gather: int, out: Array, accumulate: bool
    ) -> None:
        """Launch `grouped_wgrad`: out (E, M, N) from rows (R, M) and (R, N), or tokens'."""
        E, M, N = out.shape
        rows, columns = self.tiling.wgrad_tile
        if out.size == 0:
            return
        self.device.launch(
            self._kernel(self.tiling.wgrad, "grouped_wgrad", x, grad_y, {"GATHER": gather}),
            (-(-N // columns), -(-M // rows), E), self.tiling.wgrad_threads,
            [grad_y, x, self.device.contiguous(self.plan.pair_ids),
             self.device.contiguous(self.plan.expert_offsets), _I(self.plan.top_k), _I(M), _I(N),
             InOut(out) if accumulate else Out(out), _I(accumulate)],
            self.tiling.wgrad_shared_mem,
        )  # fmt: skip

    def _kernel(
        self, file: str, entry: str, x: Array, weight: Array, options: dict[str, str | int]
    ) -> Kernel:
        types: dict[str, str | int] = {"REAL": real_name(self.dtype)}
        if self.tiling.stored is not None:
            types["OPERAND"] = element_name(x.dtype)
            step = self.tiling.alignment
            types["ALIGNED"] = int(
                all(
                    a.shape[-1] * a.dtype.itemsize % step == 0 and self.device.is_aligned(a, step)
                    for a in (x, weight)
                )
            )
        elif entry == "grouped_gemm":
            types["WEIGHT"] = element_name(weight.dtype)
        return Kernel(file, entry, (*types.items(), *options.items()))


def _out(array: Array | None) -> Out | None:
    return None if array is None else Out(array)


def cast(device: Device, x: Array, dtype: Any) -> Array:
    """Return a copy of x, rounded to half precision."""
    y = device.empty(x.shape, named_dtype("cupy", str(dtype), "cuda13"))
    if x.size:
        options = (
            ("REAL", real_name("float64" if x.dtype == np.float64 else "float32")),
            ("WEIGHT", element_name(x.dtype)),
            ("CAST_TO", element_name(y.dtype)),
        )
        grid = (-(-x.size // 256),)
        device.launch(Kernel("rows", "cast", options), grid, 256, [x, np.int64(x.size), Out(y)])
    return y
