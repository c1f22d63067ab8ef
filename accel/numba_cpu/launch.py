"""From arrays to kernels: sizes of tasks and scratch, and the calls."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from npmoe._typing import HostArray

from . import backward, forward, rows
from .curves import Curve
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
_BACK_OUTPUTS = 512
_GRADIENT_OUTPUTS = 192
_GRADIENT_PANELS = 2**16
# Work of fewer multiplications is not worth waking a thread for.
_SMALL = 2**18


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
        memory = (ctypes.c_char * array.nbytes).from_address(address(array))
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
        self._cache: int = _CACHE * 4 // self.dtype.itemsize

    def project(
        self, x: HostArray, depth: int, weight: HostArray, group: Group, y: HostArray, *,
        rows_depth: int = 0, token_ids: HostArray = NO_IDS, bias: HostArray | None = None,
        bias_scale: HostArray | None = None,
    ) -> None:  # fmt: skip
        """Run `forward.project` for weight (E, outputs, depth).

        With `rows_depth`, x is as `project_and_activate` left it, and this was its depth.
        """
        packed = rows_depth > 0
        outputs = weight.shape[1]
        block, step = self._block(rows_depth or depth), self._step(depth)
        room = 0 if packed else max(block, self.skinny_rows) * depth
        tasks = self._tasks(group, outputs, step, block)
        self.team.run(
            forward.project, tasks, self.panel, self.lanes, room, x, packed, depth, token_ids,
            self.none, flat(weight), outputs, half_code(weight), self._maybe(bias),
            self._maybe(bias_scale), y,
            dtype=self.dtype, room=room + step * self.panel + ROWS * DEPTH,
            small=group.num_rows * depth * outputs < _SMALL,
        )  # fmt: skip

    def project_and_activate(
        self, x: HostArray, depth: int, token_ids: HostArray, weight: HostArray, group: Group,
        curve: Curve, gate_up: HostArray, act: HostArray, *, row_scale: HostArray | None,
        bias: HostArray | None, dropout: HostArray | None, act_scale: HostArray | None, save: bool,
    ) -> None:  # fmt: skip
        """Run `forward.project_and_activate` for weight (E, 2I, depth)."""
        wide_size = weight.shape[1]
        inner = wide_size // 2 if curve.gated else wide_size
        block, step = self._block(depth), self._step(depth)
        room = max(block, self.skinny_rows) * depth
        tasks = self._tasks(group, inner, step, block)
        self.team.run(
            forward.project_and_activate, tasks, self.panel, self.lanes, room, x, depth, token_ids,
            self._maybe(row_scale), flat(weight), wide_size, half_code(weight), self._maybe(bias),
            curve.kind, curve.gated, curve.settings, self._maybe(dropout), self._maybe(act_scale),
            save, 0 if save else group.base, gate_up, act,
            dtype=self.dtype, room=room + 2 * step * self.panel + ROWS * DEPTH,
            small=group.num_rows * depth * wide_size < _SMALL,
        )  # fmt: skip

    def project_back(
        self, a: HostArray, base: int, weight: HostArray, group: Group, y: HostArray
    ) -> None:
        """Run `backward.project_back` for weight (E, depth, outputs)."""
        _, depth, outputs = weight.shape
        tasks = self._tasks(group, outputs, self._back_step, _MOST_ROWS)
        room = _MOST_ROWS * self._back_step
        self.team.run(
            backward.project_back, tasks, self.panel, self.lanes, room, a, base, depth,
            flat(weight), outputs, half_code(weight), y,
            dtype=self.dtype, room=room + backward.BACK_DEPTH * self._back_step,
            small=group.num_rows * depth * outputs < _SMALL,
        )  # fmt: skip

    def project_back_and_activate(
        self, grad: HostArray, token_ids: HostArray, weight: HostArray, group: Group,
        curve: Curve, gate_up: HostArray, act: HostArray, grad_gate_up: HostArray,
        partial: HostArray, *, row_weights: HostArray | None, dropout: HostArray | None,
    ) -> None:  # fmt: skip
        """Run `backward.project_back_and_activate` for weight (E, H, I)."""
        _, depth, inner = weight.shape
        block, step = self._block(depth), self._back_step
        tasks = self._tasks(group, inner, step, block)
        room = block * step
        self.team.run(
            backward.project_back_and_activate, tasks, self.panel, self.lanes, room, grad, depth,
            token_ids, flat(weight), inner, half_code(weight), self._maybe(row_weights),
            self._maybe(dropout), gate_up, curve.kind, curve.gated, curve.settings, group.base,
            step, act, grad_gate_up, partial,
            dtype=self.dtype, room=room + backward.BACK_DEPTH * step + block * depth,
            small=group.num_rows * depth * inner < _SMALL,
        )  # fmt: skip

    def num_ranges(self, inner: int) -> int:
        """Return into how many ranges the backward activation cuts its outputs."""
        return -(-inner // self._back_step)

    def weight_gradient(
        self, a: HostArray, b: HostArray, group: Group, out: HostArray, *, accumulate: bool,
        a_tokens: HostArray = NO_IDS, a_scale: HostArray | None = None,
        b_tokens: HostArray = NO_IDS, b_scale: HostArray | None = None,
    ) -> None:  # fmt: skip
        """Run `backward.weight_gradient` into out (E, M, N)."""
        _, a_width, b_width = out.shape
        tasks = np.empty(
            ((group.last - group.first) * -(-a_width // _GRADIENT_OUTPUTS), forward.TASK), np.int64
        )
        rows.cut_gradient_tasks(
            group.offsets, group.first, group.last, a_width, _GRADIENT_OUTPUTS, tasks
        )
        line = 64 // self.dtype.itemsize
        stream = b_width % line == 0 and address(out) % 64 == 0
        room = backward.GRADIENT_DEPTH * _GRADIENT_OUTPUTS + ROWS * self.panel
        panels = max(backward.GRADIENT_DEPTH * self.panel, _GRADIENT_PANELS)
        self.team.run(
            backward.weight_gradient, tasks, self.panel, self.lanes, room, a, a_width, a_tokens,
            self._maybe(a_scale), b, b_width, b_tokens, self._maybe(b_scale), group.base,
            accumulate, stream, out.reshape(-1),
            dtype=self.dtype, room=room + panels,
            small=group.num_rows * a_width * b_width + len(tasks) * b_width < _SMALL,
        )  # fmt: skip

    def over_rows(self, kernel: Any, *args: Any, numbers: int, room: int = 1) -> None:
        """Run a kernel of `rows`; `numbers` says how many it touches."""
        self.team.run(kernel, *args, dtype=self.dtype, room=room, small=numbers < _SMALL)

    def padded_rows(self, group: Group) -> int:
        """Return the rows of the group with every expert's rounded up to the lanes."""
        counts = (
            group.offsets[group.first + 1 : group.last + 1]
            - group.offsets[group.first : group.last]
        )
        return int((-(-counts // self.lanes)).sum()) * self.lanes

    def empty(self, *shape: int) -> HostArray:
        """Return a new array that begins at a cache line."""
        return aligned_empty(shape, self.dtype)

    @property
    def _back_step(self) -> int:
        return _BACK_OUTPUTS // self.panel * self.panel

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
        tasks = np.empty((guess, forward.TASK), np.int64)
        return tasks[: rows.cut_tasks(*args, tasks)]

    def _maybe(self, array: HostArray | None) -> HostArray:
        return self.none if array is None else flat(array)
