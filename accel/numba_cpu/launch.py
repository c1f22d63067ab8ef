"""From arrays to kernels: sizes of tasks and scratch, and the calls."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numba
import numpy as np

from npmoe._typing import HostArray
from npmoe.dispatch import DispatchPlan
from npmoe.params import MoEParams

from ..curve import Curve
from . import backward, forward, rows
from .host import ROWS, VECTORS, lanes
from .products import DEPTH
from .team import Team, address, aligned_empty

# Up to so many rows of one expert its weights are streamed past the rows (the skinny form);
# beyond, rows are laid out for the wide one.
SKINNY_ROWS = 16
# Numbers, in units of 4 bytes, of a block of rows or of a task's weights: half of a usual
# second-level cache.
_CACHE = 2**18
_MOST_ROWS = 512
_MOST_OUTPUTS = 240
_BACK_OUTPUTS = 256
# Of a weight gradient: outputs of a task, at least; where an expert has few rows, so many that
# they hold as many numbers of these rows, but not all; columns of a task.
_GRADIENT_OUTPUTS = 192
_GRADIENT_STRIP = 2**17
_GRADIENT_MOST = 516
_GRADIENT_COLUMNS = 256
_GRADIENT_PANELS = 2**16
# A group of experts has at most as many rows as the largest, and so large a share of all.
_SHARE = 16
# Bytes of temporary arrays kept between calls; beyond, every call takes and frees its own.
_KEPT = 2**22
# Work of fewer multiplications is not worth waking a thread for.
SMALL = 2**18


def flat(array: HostArray) -> HostArray:
    """Return the numbers in C order, as one writable axis that kernels do not write to.

    A view, unless the array is strided, misaligned or of foreign byte order. Half precision comes
    as its bits.
    """
    if not (array.flags.c_contiguous and array.flags.aligned and array.dtype.isnative):
        array = np.array(array, array.dtype.newbyteorder("="), order="C")
    if array.dtype.itemsize == 2:
        array = array.view(np.uint16)
    if not array.flags.writeable and array.size:
        # The same memory: a kernel compiled for read-only arrays would be another kernel.
        memory: Any = (ctypes.c_char * array.nbytes).from_address(address(array))
        memory.owner = array  # a thread may outlive an interrupted call
        return np.ndarray(array.size, array.dtype, buffer=memoryview(memory))
    return array.reshape(-1) if array.flags.writeable else np.empty(0, array.dtype)


def half_code(array: HostArray) -> int:
    """Return 0 for full precision, 1 for float16, 2 for bfloat16."""
    if array.dtype.itemsize != 2:
        return 0
    return 1 if array.dtype == np.float16 else 2


NO_IDS = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class Group:
    """Experts first..last and the CSR offsets of all."""

    offsets: HostArray
    first: int
    last: int

    @property
    def num_rows(self) -> int:
        """Rows of these experts."""
        return int(self.offsets[self.last]) - int(self.offsets[self.first])

    @property
    def base(self) -> int:
        """Their first row."""
        return int(self.offsets[self.first])


class Engine:
    """The products, for one float type.

    Parameters
    ----------
    team : Team
    dtype : float32 or float64
    skinny_rows : int
        Largest number of rows for the skinny form.
    """

    def __init__(self, team: Team, dtype: Any, skinny_rows: int) -> None:
        self.team = team
        self.dtype = np.dtype(dtype)
        self.lanes: int = lanes(numba.from_dtype(self.dtype))
        self.panel: int = VECTORS * self.lanes
        self.skinny_rows = skinny_rows
        self.skinny_rest = self.lanes // 2 if skinny_rows else 0
        self.none = np.zeros(0, self.dtype)
        self._kept: list[HostArray] = []
        self._cache: int = _CACHE * 4 // self.dtype.itemsize

    def project(
        self, x: HostArray, depth: int, weight: HostArray, group: Group, y: HostArray, *,
        bias: HostArray | None = None,
    ) -> None:  # fmt: skip
        """Write y = x @ weight[e].T + bias[e] for weight (E, outputs, depth)."""
        outputs = weight.shape[1]
        tasks = self._tasks(group, outputs, self._step(depth), self._block(depth))
        stages = np.zeros((2, rows.STAGE), np.int64)
        stages[0, rows.KIND], stages[1, rows.BEGIN] = rows.PROJECT, len(tasks)
        none, w, half = self.none, flat(weight), half_code(weight)
        self._run_forward(
            tasks, stages, x, depth, NO_IDS, none, w, 0, half, none, 0, False, none, none, none,
            False, none, none, 0, False, w, depth, outputs, half, self._maybe(bias), none, y,
            NO_IDS, 0, none, none, work=group.num_rows * depth * outputs,
        )  # fmt: skip

    def run_experts(
        self, x: HostArray, plan: DispatchPlan, params: MoEParams, curve: Curve, weights: HostArray,
        position: str, topk_weights: HostArray, dropout: HostArray | None,
        gate_up: HostArray | None, out: HostArray,
    ) -> None:  # fmt: skip
        """Write the experts' output (T, H), eq. (3) to (5), and gate_up (R, 2I) if it is there."""
        hidden, inner = params.down_proj.shape[1:]
        wide_size = params.gate_up_proj.shape[1]
        offsets, num_rows = flat(plan.expert_offsets), plan.num_rows
        ends, num_groups, slot = self.groups(offsets)
        shape, out_shape = self._shape(hidden), self._shape(inner, hidden)
        blocks = len(offsets) - 1 + 2 * num_rows // min(shape[1], out_shape[1])
        most = blocks * (-(-inner // shape[0]) - (-hidden // out_shape[0]))
        tasks = np.empty((most + -(-plan.num_tokens // rows.STEP), rows.TASK), np.int64)
        stages = np.zeros((2 * num_groups + 2, rows.STAGE), np.int64)
        count = rows.cut_forward(
            offsets, ends, num_groups, inner, *shape, hidden, *out_shape, self.skinny_rows,
            self.skinny_rest, self.lanes, plan.num_tokens, tasks, stages,
        )  # fmt: skip
        none, w1, w2 = self.none, params.gate_up_proj, params.down_proj
        slot *= inner
        slots = min(num_groups, rows.SLOTS)
        with self.temporary(num_rows * hidden, slots * slot) as (y, act):
            self._run_forward(
                tasks[:count], stages, flat(x), hidden, flat(plan.token_ids),
                weights if position == "input" else none, flat(w1), wide_size, half_code(w1),
                self._maybe(params.gate_up_bias), curve.kind, curve.gated, curve.settings,
                self._maybe(dropout), weights if position == "mid" else none, gate_up is not None,
                self._maybe(gate_up), act, slot, True, flat(w2), inner, hidden, half_code(w2),
                self._maybe(params.down_bias), weights if position == "mid" else none, y,
                flat(plan.row_ids), plan.top_k,
                flat(topk_weights) if position == "output" else none, flat(out),
                work=num_rows * hidden * (wide_size + inner),
            )  # fmt: skip

    def _run_forward(
        self, tasks: HostArray, stages: HostArray, x: HostArray, hidden: int, *args: Any, work: int
    ) -> None:
        step, block = self._shape(hidden)
        room = max(block, self.skinny_rows) * hidden
        step = max(step, _MOST_OUTPUTS)
        products = 2 * step * max(self.panel, self.skinny_rows)
        self.team.run(
            forward.run_forward, tasks, stages, self.panel, self.lanes, room, x, hidden, *args,
            dtype=self.dtype, room=room + products + ROWS * DEPTH, small=work < SMALL,
            stages=len(stages) - 1,
        )  # fmt: skip

    @contextmanager
    def temporary(self, *sizes: int) -> Iterator[list[HostArray]]:
        """Lend memory for the time of one call: arrays of so many numbers, at cache lines.

        Fresh memory is slow, since the system clears it page by page. What a call used is kept for
        the next one, up to `_KEPT` bytes; a call that finds it taken by another thread, or that
        was interrupted while threads still write, has its own and leaves none.
        """
        line = 64 // self.dtype.itemsize
        ends = list(accumulate(-(-size // line) * line for size in sizes))
        try:
            memory = self._kept.pop()
        except IndexError:
            memory = self.none
        if memory.size < ends[-1]:
            memory = self.none  # or both would stand beside each other
            memory = self.empty(ends[-1])
        yield [memory[begin : begin + size]
               for begin, size in zip([0, *ends], sizes, strict=False)]  # fmt: skip
        if memory.nbytes <= _KEPT and not self._kept:
            self._kept.append(memory)

    def release(self) -> None:
        """Free what `temporary` keeps."""
        self._kept.clear()

    def project_back(
        self, a: HostArray, base: int, weight: HostArray, group: Group, y: HostArray
    ) -> None:
        """Run `backward.project_back` for weight (E, depth, outputs)."""
        _, depth, outputs = weight.shape
        step = self._back_step(group)
        tasks = self._tasks(group, outputs, step, _MOST_ROWS)
        room = _MOST_ROWS * step
        self.team.run(
            backward.project_back, tasks, self.panel, self.lanes, room, a, base, depth,
            flat(weight), outputs, half_code(weight), y,
            dtype=self.dtype, room=room + backward.BACK_DEPTH * step,
            small=group.num_rows * depth * outputs < SMALL,
        )  # fmt: skip

    def project_back_and_activate(
        self, grad: HostArray, token_ids: HostArray, weight: HostArray, group: Group,
        curve: Curve, gate_up: HostArray, act: HostArray, grad_gate_up: HostArray,
        partial: HostArray, *, row_weights: HostArray | None, dropout: HostArray | None,
    ) -> None:  # fmt: skip
        """Run `backward.project_back_and_activate` for weight (E, H, I)."""
        _, depth, inner = weight.shape
        block, step = self._block(depth), self._back_step(group)
        tasks = self._tasks(group, inner, step, block)
        room = block * step
        self.team.run(
            backward.project_back_and_activate, tasks, self.panel, self.lanes, room, grad, depth,
            token_ids, flat(weight), inner, half_code(weight), self._maybe(row_weights),
            self._maybe(dropout), gate_up, curve.kind, curve.gated, curve.settings, group.base,
            step, act, grad_gate_up, partial,
            dtype=self.dtype, room=room + backward.BACK_DEPTH * step + block * depth,
            small=group.num_rows * depth * inner < SMALL,
        )  # fmt: skip

    def num_ranges(self, inner: int) -> int:
        """Return into how many ranges the backward activation cuts its outputs at most."""
        return -(-inner // self._least_back_step)

    def weight_gradient(
        self, a: HostArray, b: HostArray, group: Group, out: HostArray, *, accumulate: bool,
        a_tokens: HostArray = NO_IDS, a_scale: HostArray | None = None,
        b_tokens: HostArray = NO_IDS, b_scale: HostArray | None = None,
    ) -> None:  # fmt: skip
        """Run `backward.weight_gradient` into out (E, M, N)."""
        _, a_width, b_width = out.shape
        experts = group.last - group.first
        most = -(-a_width // _GRADIENT_OUTPUTS) * -(-b_width // _GRADIENT_COLUMNS)
        tasks = np.empty((experts * most, rows.TASK), np.int64)
        count = rows.cut_gradient_tasks(
            group.offsets, group.first, group.last, a_width, b_width, _GRADIENT_OUTPUTS,
            _GRADIENT_MOST, _GRADIENT_STRIP, _GRADIENT_COLUMNS, self.panel, _GRADIENT_PANELS, tasks,
        )  # fmt: skip
        line = 64 // self.dtype.itemsize
        stream = b_width % line == 0 and address(out) % 64 == 0
        room = backward.GRADIENT_DEPTH * _GRADIENT_OUTPUTS + ROWS * self.panel
        panels = max(backward.GRADIENT_DEPTH * self.panel, _GRADIENT_PANELS)
        self.team.run(
            backward.weight_gradient, tasks[:count], self.panel, self.lanes, room, a, a_width,
            a_tokens, self._maybe(a_scale), b, b_width, b_tokens, self._maybe(b_scale), group.base,
            accumulate, stream, out.reshape(-1),
            dtype=self.dtype, room=room + panels,
            small=group.num_rows * a_width * b_width + count * b_width < SMALL,
        )  # fmt: skip

    def over_rows(self, kernel: Any, *args: Any, numbers: int, room: int = 1) -> None:
        """Run a kernel of `rows`; `numbers` says how many it touches."""
        self.team.run(kernel, *args, dtype=self.dtype, room=room, small=numbers < SMALL)

    def groups(self, offsets: HostArray, least: int = 0) -> tuple[HostArray, int, int]:
        """Return the ends of groups of experts, their number, and the padded rows of the largest.

        A group has at most `least` rows, or those of the largest expert and a share of all.
        """
        ends = np.empty(len(offsets), np.int64)
        count, padded = rows.group_experts(offsets, least, _SHARE, self.lanes, ends)
        return ends, count, padded

    def _shape(self, depth: int, outputs: int = 0) -> tuple[int, int]:
        """Return the most outputs and rows of a task; rows go by the other product's depth."""
        return self._step(depth), self._block(outputs or depth)

    def empty(self, *shape: int) -> HostArray:
        """Return a new array that begins at a cache line."""
        return aligned_empty(shape, self.dtype)

    def _back_step(self, group: Group) -> int:
        """Return the outputs of a task of the backward pass: multiples of the panel.

        Long rows of weights where few tokens meet them; else tasks enough for all threads.
        """
        many = group.num_rows > self.panel * (group.last - group.first)
        return self._least_back_step if many else 2 * self._least_back_step

    @property
    def _least_back_step(self) -> int:
        return max(_BACK_OUTPUTS // self.panel, 1) * self.panel

    def _block(self, depth: int) -> int:
        """Return the rows gathered at once: at least one panel, at most what the cache takes."""
        most = min(_MOST_ROWS, self._cache // max(depth, 1))
        return max(most // self.panel, 1) * self.panel

    def _step(self, depth: int) -> int:
        """Return the outputs of a task: a multiple of the tile and of the lanes."""
        return min(max(self._cache // max(depth, 1) // 48, 1) * 48, _MOST_OUTPUTS)

    def _tasks(self, group: Group, outputs: int, step: int, block: int) -> HostArray:
        args = (group.offsets, group.first, group.last, outputs, step, block, self.skinny_rows,
                self.skinny_rest, self.lanes)  # fmt: skip
        blocks = group.last - group.first + group.num_rows // (block // 2)
        guess = blocks * -(-outputs // step)
        tasks = np.empty((guess, rows.TASK), np.int64)
        return tasks[: rows.cut_tasks(*args, tasks)]

    def _maybe(self, array: HostArray | None) -> HostArray:
        return self.none if array is None else flat(array)
