"""MODELLED bounds: the time a case would take at the least on a card that is not here.

Nothing in this module was measured: it combines data sheets (`card_sheets.py`), static figures of
the compiled kernels (`kernel_figures.json`) and uniform routing. README.md has the assumptions.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npmoe.benchmark.card_sheets import CardSheet
from npmoe.benchmark.cases import Case, Direction
from npmoe.benchmark.uniform_load import UniformLoad
from npmoe.errors import RangeError

FIGURES = Path(__file__).with_name("kernel_figures.json")
# Multiply-adds that one instruction of a warp makes.
MULTIPLY_ADDS = {"FFMA": 32, "HMMA.1688": 1024, "HMMA.16816": 2048}
# float16 has bfloat16's instructions; what is compiled for sm_80 runs on sm_86 and sm_89.
_PRECISIONS = {"float32": "float32", "tf32": "tf32", "bfloat16": "bfloat16", "float16": "bfloat16"}
_ARCHITECTURES = {"sm_86": "sm_80", "sm_89": "sm_80"}
_ITEMSIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
_SCHEDULERS = 4  # of a multiprocessor: instructions of warps per clock
_REGISTERS, _REGISTER_UNIT, _WARP_UNIT = 65536, 256, 4
_RESERVED_SHARED, _SHARED_UNIT = 1024, 128


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFigures:
    """One variant of a kernel, compiled: what the model needs of it."""

    threads: int
    shared: int
    registers: int
    instructions_per_multiply: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelledLaunch:
    """The terms of one kernel of a case; every time is MODELLED.

    Attributes
    ----------
    name : str
    flops : float
        Twice the multiply-adds that the result needs.
    padding : float
        Multiply-adds that are made, for each that is needed.
    blocks : float
        Expected blocks of threads.
    resident : int
        Blocks that a multiprocessor holds at once.
    waves : float
        Blocks over all that the card holds at once.
    imbalance : float
        Blocks of the busiest multiprocessor over the mean, if they are spread evenly.
    math_seconds, issue_seconds : float
        Of the padded work on all multiprocessors: multiplications, and instructions.
    memory_seconds : float
    """

    name: str
    flops: float = 0.0
    padding: float = 1.0
    blocks: float = 0.0
    resident: int = 0
    waves: float = 0.0
    imbalance: float = 1.0
    math_seconds: float = 0.0
    issue_seconds: float = 0.0
    memory_seconds: float

    @property
    def seconds(self) -> float:
        """The largest term; the busiest multiprocessor sets the first two."""
        return max(self.imbalance * max(self.math_seconds, self.issue_seconds), self.memory_seconds)

    @property
    def bound_by(self) -> str:
        """Which term that is."""
        if self.memory_seconds == self.seconds:
            return "memory"
        return "math" if self.math_seconds >= self.issue_seconds else "issue"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelledCase:
    """A case on a card: kernels one after another; every time is MODELLED."""

    case: Case
    direction: Direction
    card: CardSheet
    precision: str
    weights: str
    block_size: int
    launches: tuple[ModelledLaunch, ...]

    @property
    def note(self) -> str:
        """What is special about the card's rate, if its tensor cores are used."""
        return "" if self.precision == "float32" else self.card.note

    @property
    def seconds(self) -> float:
        """The bound: the sum over kernels."""
        return sum(launch.seconds for launch in self.launches)

    @property
    def flops(self) -> float:
        """Flops that the result needs."""
        return sum(launch.flops for launch in self.launches)

    @property
    def padding(self) -> float:
        """Multiply-adds that are made, for each that is needed."""
        return sum(launch.flops * launch.padding for launch in self.launches) / self.flops

    @property
    def bound_by(self) -> str:
        """The term that sets most of the time."""
        shares: dict[str, float] = {}
        for launch in self.launches:
            shares[launch.bound_by] = shares.get(launch.bound_by, 0.0) + launch.seconds
        return max(shares, key=lambda name: shares[name])

    def total(self, term: str) -> float:
        """Sum one of the terms over the kernels."""
        return float(sum(getattr(launch, term) for launch in self.launches))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "modelled": True,
            "case": dataclasses.asdict(self.case),
            "direction": self.direction,
            "card": dataclasses.asdict(self.card),
            "note": self.note,
            "precision": self.precision,
            "weights": self.weights,
            "block_size": self.block_size,
            "modelled_seconds": self.seconds,
            "flops": self.flops,
            "padding": self.padding,
            "bound_by": self.bound_by,
            "launches": [
                dataclasses.asdict(launch)
                | {"modelled_seconds": launch.seconds, "bound_by": launch.bound_by}
                for launch in self.launches
            ],
        }


@functools.cache
def read_figures() -> dict[str, Any]:
    """Return the figures of the compiled kernels, by precision."""
    found: dict[str, Any] = json.loads(FIGURES.read_text(encoding="utf-8"))
    return found


def occupancy(card: CardSheet, kernel: KernelFigures) -> int:
    """Return how many blocks of a kernel a multiprocessor holds at once.

    References
    ----------
    CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": registers are
    given to warps in units of 256, to 4 warps at a time; shared memory in units of 128 bytes, of
    which a block's first 1024 are the system's.
    """
    warps = kernel.threads // 32
    of_warp = _up(kernel.registers * 32, _REGISTER_UNIT)
    by_registers = _REGISTERS // of_warp // _WARP_UNIT * _WARP_UNIT // warps
    by_shared = card.shared // _up(kernel.shared + _RESERVED_SHARED, _SHARED_UNIT)
    return min(by_registers, by_shared, card.threads // kernel.threads, card.blocks)


def model_case(
    case: Case,
    direction: Direction,
    card: CardSheet,
    precision: str = "float32",
    weights: str = "float32",
) -> ModelledCase:
    """Return the MODELLED bound of a case on a card, and its terms.

    Parameters
    ----------
    case : Case
    direction : {"forward", "forward+backward"}
    card : CardSheet
    precision : {"float32", "tf32", "bfloat16", "float16"}
        The option of the backend "cupy".
    weights : {"float32", "bfloat16", "float16"}
        Dtype in which the experts' weights are given.

    Returns
    -------
    ModelledCase

    Raises
    ------
    RangeError
        For an unknown precision.
    """
    if precision not in _PRECISIONS:
        raise RangeError(
            f"bench: --precision must be one of {', '.join(_PRECISIONS)} with --modelled, got "
            f"{precision!r}. Figures of other kernels are not kept."
        )
    return _Model(case, card, precision, weights).run(direction)


class _Model:
    """One case on one card, kernel by kernel."""

    def __init__(self, case: Case, card: CardSheet, precision: str, weights: str) -> None:
        self.case, self.card, self.precision, self.weights = case, card, precision, weights
        self.tiling = read_figures()[_PRECISIONS[precision]]
        self.load = UniformLoad(case)
        self.block_size = self._choose_block_size()
        stored = {"tf32": "float32"}.get(precision, precision)
        # The kernels of float32 widen half weights as they read them; the others copy them first.
        self.casts_weights = precision != "float32" and weights != stored
        self.operand = _ITEMSIZES[stored]
        self.weight = _ITEMSIZES[weights if precision == "float32" else stored]

    def run(self, direction: Direction) -> ModelledCase:
        """Return all launches of a call."""
        launches = self._forward(save=direction != "forward")
        if direction != "forward":
            launches += self._backward()
        return ModelledCase(
            case=self.case,
            direction=direction,
            card=self.card,
            precision=self.precision,
            weights=self.weights,
            block_size=self.block_size,
            launches=tuple(launches),
        )

    def _forward(self, *, save: bool) -> list[ModelledLaunch]:
        T, H, I, _, _ = self.case.sizes
        R = self.load.num_rows
        saved = R * 2 * I * 4 if save else 0
        return [
            *self._casts(T * H),
            self._product("gate_up", 2 * I, H, T * H, R * I * self.operand + saved),
            self._product("down", H, I, R * I, R * H * 4),
            self._moves("combine", (R + T) * H * 4),
        ]

    def _backward(self) -> list[ModelledLaunch]:
        T, H, I, _, _ = self.case.sizes
        R = self.load.num_rows
        return [
            *self._casts(2 * T * H),
            self._product("down_back", I, H, T * H, R * 2 * I * 4 + R * 3 * I * self.operand),
            self._gradient("down_wgrad", H, I, T * H, R * I),
            self._gradient("gate_up_wgrad", 2 * I, H, R * 2 * I, T * H),
            self._product("gate_up_back", H, 2 * I, R * 2 * I, R * H * 4),
            self._moves("combine", (R + T) * H * 4),
        ]

    def _product(
        self, name: str, columns: int, depth: int, num_read: int, others: float
    ) -> ModelledLaunch:
        """Model a product of rows; `num_read` elements are its rows, `others` bytes beside."""
        tiles = math.ceil(columns / self.tiling["tile_n"])
        blocks = self.load.blocks(self.block_size)
        padded = blocks * self.block_size * tiles * self.tiling["tile_n"]
        weights = self.load.used_experts * columns * depth * self.weight
        return self._launch(
            f"{name}/{self.block_size}",
            self.load.num_rows * columns * depth,
            padded * _up(depth, self.tiling["depth"]),
            blocks * tiles,
            weights + self._reads(num_read, tiles) + others,
        )

    def _gradient(
        self, name: str, rows: int, columns: int, num_left: int, num_right: int
    ) -> ModelledLaunch:
        """Model the gradient of weights (E, rows, columns), of so many elements on either side."""
        height, width = self.tiling["wgrad_tile"]
        down, across = math.ceil(rows / height), math.ceil(columns / width)
        depth = self.load.blocks(self.tiling["depth"]) * self.tiling["depth"]
        read = (num_left + num_right) * self.operand
        if read / self.load.used_experts > self.card.l2:  # experts come one after another
            read = (num_left * across + num_right * down) * self.operand
        return self._launch(
            name,
            self.load.num_rows * rows * columns,
            depth * down * height * across * width,
            self.case.num_experts * down * across,
            read + self.case.num_experts * rows * columns * 4,
        )

    def _launch(
        self, name: str, needed: int, padded: float, blocks: float, moved: float
    ) -> ModelledLaunch:
        """Combine multiply-adds, blocks and bytes."""
        card, kernel = self.card, self._kernel(name)
        resident = occupancy(card, kernel)
        per_processor = blocks / card.multiprocessors
        multiplies = padded / MULTIPLY_ADDS[self.tiling["multiply"]]
        slots = _SCHEDULERS * card.multiprocessors * card.clock
        return ModelledLaunch(
            name=name,
            flops=2.0 * needed,
            padding=padded / needed,
            blocks=blocks,
            resident=resident,
            waves=per_processor / resident,
            imbalance=math.ceil(per_processor) / per_processor,
            math_seconds=padded / self._rate(),
            issue_seconds=multiplies * kernel.instructions_per_multiply / slots,
            memory_seconds=moved / card.memory,
        )

    def _moves(self, name: str, num_bytes: float) -> ModelledLaunch:
        return ModelledLaunch(name=name, memory_seconds=num_bytes / self.card.memory)

    def _casts(self, num_rounded: int) -> list[ModelledLaunch]:
        """Model the copies that are made of what is not stored as it is multiplied."""
        moved = 0.0
        if self.operand != 4:
            moved += num_rounded * (4 + self.operand)
        if self.casts_weights:
            moved += self.case.num_weights * (_ITEMSIZES[self.weights] + self.operand)
        return [self._moves("cast", moved)] if moved else []

    def _reads(self, num_elements: int, times: int) -> float:
        """Return bytes of rows that are read by `times` tiles, from L2 if they fit there."""
        num_bytes = num_elements * self.operand
        return num_bytes if num_bytes <= self.card.l2 else num_bytes * times

    def _rate(self) -> float:
        """Return multiply-adds per second."""
        card, kind = self.card, self.tiling["multiply"]
        if kind == "FFMA":
            return card.multiprocessors * card.float32_fma * card.clock
        per_clock = card.tensor_fma / (2 if kind == "HMMA.1688" else 1)
        share = 1.0 if card.mma_sync_share is None else card.mma_sync_share
        return card.multiprocessors * per_clock * share * card.tensor_clock

    def _kernel(self, name: str) -> KernelFigures:
        size = name.partition("/")[2] or "wgrad"
        arch = _ARCHITECTURES.get(self.card.arch, self.card.arch)
        registers, static, instructions, multiplies = self.tiling["kernels"][name][arch]
        return KernelFigures(
            threads=self.tiling["threads"][size],
            shared=static + self.tiling["dynamic_shared"][size],
            registers=registers,
            instructions_per_multiply=instructions / multiplies,
        )

    def _choose_block_size(self) -> int:
        """Return the smallest size that holds twice an expert's mean, as the backend does."""
        mean = self.load.num_rows / self.case.num_experts
        sizes: list[int] = self.tiling["block_sizes"]
        return next((size for size in sizes if size >= 2 * mean), sizes[-1])


def _up(n: int, unit: int) -> int:
    """Round up to a multiple."""
    return -(-n // unit) * unit
