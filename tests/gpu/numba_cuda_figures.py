"""Figures of the Python kernels beside their CUDA C++ twins, from ptxas and nvdisasm.

`PYTHONPATH=. python` this file prints the table of `accel/README.md`. Its last column is MODELLED,
by `npmoe.benchmark`, from the static figures of the others: nothing was timed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from compile_gates import find_cuobjdump, read_usage
from sass_counts import count_instructions, disassemble, find_nvdisasm

from accel.cupy_raw import nvrtc
from accel.device.kernel import Kernel
from accel.device.products import STORE
from accel.numba_cuda.compiling import compile_kernel
from npmoe.benchmark import modelled, parse_case
from npmoe.benchmark.card_sheets import find_sheet
from npmoe.benchmark.cases import Direction

ROOMS = {"numba_cuda": ".py", "kernels": ".cu"}
CARD = "A100"
ARCH = find_sheet(CARD).arch
_REAL = ("REAL", "float")


def _launches() -> Any:
    """Return the module that knows what the model's launches are compiled from."""
    path = Path(__file__).parents[1] / "benchmark" / "kernel_figures.py"
    spec = importlib.util.spec_from_file_location("kernel_figures_for_numba", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


LAUNCHES = _launches()


def product(
    epilogue: int = STORE, *, gated: int = 0, gather: int = 0, transposed: int = 0,
    block: int = 64, real: str = "float", weight: str = "float",
) -> Kernel:  # fmt: skip
    """Return a variant of the grouped product."""
    options = {
        "REAL": real, "WEIGHT": weight, "EPILOGUE": epilogue, "GATED": gated, "GATHER": gather,
        "TRANSPOSED": transposed, "BLOCK_M": block,
    }  # fmt: skip
    return Kernel("grouped_simt", "grouped_gemm", tuple(options.items()))


# The products of a step by the names that the model has for them, /rows of a block; and where
# each is looked at: a case, a direction.
_STEP: tuple[str, Direction] = ("prefill_mixtral", "forward+backward")
_DECODE: tuple[str, Direction] = ("decode16_mixtral", "forward")
BOUND_BY_SIZE = {"64": _STEP, "": _STEP, "16": _DECODE}
PRODUCTS: dict[str, Kernel] = {
    name: launch.kernel
    for name, launch in sorted(
        LAUNCHES.variants("float32").items(), key=lambda v: v[1].kernel.entry
    )
    if name in ("gate_up/16", "down/16") or not name.endswith("/16")
}
PLAN = tuple(
    Kernel("plan", entry)
    for entry in ("count_routes", "scan_experts", "place_routes", "scan_blocks", "fill_blocks")
)
ROWS = tuple(
    Kernel("rows", entry, (_REAL,))
    for entry in (
        "gather_rows", "scale_rows", "spread_experts", "combine_rows", "row_dot", "finish_weights",
        "activation", "activation_backward",
    )
)  # fmt: skip
SEGMENTS = Kernel("rows", "segment_sum", (_REAL, ("OPERAND", "float")))
ROUTER = Kernel("router", "route_rows", (_REAL,))
SUBJECTS = (*PLAN, *ROWS, SEGMENTS, ROUTER, *PRODUCTS.values())


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one kernel's machine code; `loop` is that of a product, instructions and multiply-adds."""

    registers: int
    shared: int
    local: int
    instructions: int
    loop: tuple[int, int] | None

    @property
    def per_add(self) -> float:
        """Instructions of the main loop, the filling of panels among them, per multiply-add."""
        return self.loop[0] / self.loop[1] if self.loop else 0.0


def assemble(text: str, arch: str) -> bytes:
    """Return the cubin of PTX; a spill is an error."""
    program = shutil.which("ptxas")
    assert program is not None
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(text, encoding="utf-8")
        subprocess.run(
            [program, "--warn-on-spills", "-Werror", f"-arch={arch}", str(source), "-o",
             str(target)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return target.read_bytes()


def measure(text: str, kernel: Kernel, arch: str = ARCH) -> Figures:
    """Assemble one entry of a PTX text and count."""
    cubin = assemble(text, arch)
    disassembler, dumper = find_nvdisasm(), find_cuobjdump()
    assert disassembler is not None
    assert dumper is not None
    machine = section(disassemble(cubin, disassembler), kernel.entry)
    usage = read_usage(cubin, dumper)[kernel.entry]
    loop = None
    for launch in LAUNCHES.variants("float32").values():
        if launch.kernel == kernel:
            loop = LAUNCHES.main_loop(machine, LAUNCHES.stage_multiplies("float32", launch))
    return Figures(
        registers=usage.registers,
        shared=usage.shared,
        local=usage.local + usage.stack,
        instructions=count_instructions(machine).instructions,
        loop=loop,
    )


@cache
def measure_numba(kernel: Kernel) -> Figures:
    """Count in what ptxas makes of a kernel in Python."""
    return measure(compile_kernel(kernel, ARCH), kernel)


def section(machine: str, entry: str) -> str:
    """Return the machine code of one entry."""
    parts = re.split(r"(?m)^\s*\.section\s+\.text\.(\w+)", machine)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[entry]


def code_lines(kernel: Kernel, room: str) -> int:
    """Count the lines of a kernel's file that hold code or comments."""
    path = Path(__file__).parents[2] / "accel" / room / (kernel.file + ROOMS[room])
    return sum(bool(line.strip()) for line in path.read_text(encoding="utf-8").splitlines())


@contextlib.contextmanager
def _figures_of(kernels: Mapping[str, Figures]) -> Iterator[None]:
    """Let the model see these products instead of the kept ones of CUDA C++."""
    known = modelled.read_figures()
    rows = {}
    for name, f in kernels.items():
        assert f.loop is not None
        rows[name] = {ARCH: [f.registers, f.shared, *f.loop]}
    changed = {**known, "float32": {**known["float32"], "kernels": rows}}
    with mock.patch.object(modelled, "read_figures", return_value=changed):
        yield


def bound(name: str, kernels: Mapping[str, Figures] | None = None) -> modelled.ModelledLaunch:
    """Return the MODELLED launch of a product on `CARD`, in the case that it is looked at in.

    `kernels` are figures of all products of that case; default: the twins' of CUDA C++, as kept.
    """
    case, direction = BOUND_BY_SIZE[name.partition("/")[2]]
    with contextlib.nullcontext() if kernels is None else _figures_of(kernels):
        found = modelled.model_case(parse_case(case), direction, find_sheet(CARD))
    return next(launch for launch in found.launches if launch.name == name)


def _bounds(name: str) -> str:
    """Return the last cell of a product."""
    figures = {n: measure_numba(k) for n, k in PRODUCTS.items()}
    mine, twin = bound(name, figures), bound(name)
    sides = [f"{1e3 * side.seconds:.3f} {side.bound_by}" for side in (mine, twin)]
    return " / ".join(sides)


def table() -> str:
    """Return the rows, as Markdown."""
    out = [
        "| kernel | lines of its file | registers | shared bytes | instructions | "
        f"per multiply-add | MODELLED ms, {CARD} |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    names = {kernel: name for name, kernel in PRODUCTS.items()}
    for kernel in SUBJECTS:
        mine = measure_numba(kernel)
        twin = measure(nvrtc.compile_kernel(kernel, ARCH).decode(), kernel)
        pairs = [
            (code_lines(kernel, "numba_cuda"), code_lines(kernel, "kernels")),
            *(
                (getattr(mine, n), getattr(twin, n))
                for n in ("registers", "shared", "instructions")
            ),
        ]
        cells = [f"{a:,} / {b:,}" for a, b in pairs]
        name = names.get(kernel)
        cells += ["", ""] if name is None else [
            f"{mine.per_add:.2f} / {twin.per_add:.2f}", _bounds(name)
        ]  # fmt: skip
        called = f"`{kernel.entry}`" + ("" if name is None else f" {name}")
        if kernel.entry in ("count_routes", "route_rows"):
            cells[2] = "dynamic"
        out.append(f"| {called} | {' | '.join(cells)} |")
    return "\n".join(out)


if __name__ == "__main__":
    print(table())  # noqa: T201
