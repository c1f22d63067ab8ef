"""Figures of the Python kernels beside their CUDA C++ twins, from ptxas and nvdisasm.

`PYTHONPATH=. python` this file prints the table of `accel/README.md`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from compile_gates import find_cuobjdump, read_usage
from sass_counts import count_instructions, disassemble, find_nvdisasm

from accel.cupy_raw import nvrtc
from accel.device.kernel import Kernel
from accel.device.products import ACTIVATE, ACTIVATE_BACKWARD, STORE
from accel.numba_cuda.compiling import compile_kernel

ROOMS = {"numba_cuda": ".py", "kernels": ".cu"}
_REAL = ("REAL", "float")


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
GRADIENT = Kernel("wgrad_simt", "grouped_wgrad", (_REAL, ("GATHER", 1)))
ROUTER = Kernel("router", "route_rows", (_REAL,))
SUBJECTS = (
    *PLAN, *ROWS, SEGMENTS, product(), product(block=16),
    product(ACTIVATE, gated=1, gather=1),
    product(ACTIVATE_BACKWARD, gated=1, gather=1, transposed=1), GRADIENT, ROUTER,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one kernel's machine code; `per_add` is 0 where no loop holds all multiply-adds."""

    registers: int
    shared: int
    local: int
    instructions: int
    per_add: float


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


def measure(text: str, entry: str, arch: str = "sm_80") -> Figures:
    """Assemble one entry of a PTX text and count."""
    cubin = assemble(text, arch)
    disassembler, dumper = find_nvdisasm(), find_cuobjdump()
    assert disassembler is not None
    assert dumper is not None
    # The loop of all FFMA is sought, as that of all HMMA elsewhere.
    machine = section(disassemble(cubin, disassembler), entry)
    counts = count_instructions(machine.replace(" FFMA", " HMMA").replace(" DFMA", " HMMA"))
    usage = read_usage(cubin, dumper)[entry]
    return Figures(
        registers=usage.registers,
        shared=usage.shared,
        local=usage.local + usage.stack,
        instructions=counts.instructions,
        per_add=counts.loop_instructions / counts.loop_hmma if counts.loop_hmma else 0.0,
    )


def section(machine: str, entry: str) -> str:
    """Return the machine code of one entry."""
    parts = re.split(r"(?m)^\s*\.section\s+\.text\.(\w+)", machine)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[entry]


def code_lines(kernel: Kernel, room: str) -> int:
    """Count the lines of a kernel's file that hold code or comments."""
    path = Path(__file__).parents[2] / "accel" / room / (kernel.file + ROOMS[room])
    return sum(bool(line.strip()) for line in path.read_text(encoding="utf-8").splitlines())


def table() -> str:
    """Return the rows, as Markdown."""
    out = [
        "| kernel | lines of its file | registers | shared bytes | instructions | "
        "per multiply-add |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kernel in SUBJECTS:
        mine = measure(compile_kernel(kernel), kernel.entry)
        twin = measure(nvrtc.compile_kernel(kernel).decode(), kernel.entry)
        pairs = [
            (code_lines(kernel, "numba_cuda"), code_lines(kernel, "kernels")),
            *(
                (getattr(mine, n), getattr(twin, n))
                for n in ("registers", "shared", "instructions")
            ),
        ]
        adds = "" if not mine.per_add else f"{mine.per_add:.2f} / {twin.per_add:.2f}"
        cells = " | ".join(f"{a} / {b}" for a, b in pairs)
        out.append(f"| `{kernel}` | {cells} | {adds} |")
    return "\n".join(out)


if __name__ == "__main__":
    print(table())  # noqa: T201
