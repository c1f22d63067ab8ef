"""Figures of every kernel variant on every architecture; `PYTHONPATH=. python` this file, half an
hour, writes the table anew."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, fields
from functools import cache
from pathlib import Path

import pytest
from compile_gates import ARCHITECTURES, Launch, asked_kernels, find_cuobjdump, read_usage
from emulation import is_required, need_tables
from sass_counts import count_instructions, disassemble, find_nvdisasm

from accel.cupy_raw.nvrtc import compile_kernel
from accel.device.kernel import Kernel

TABLE = Path(__file__).with_name("kernel_ratchets.json")
MMA_FILES = ("grouped_mma", "wgrad_mma")
MOST_PER_MMA = 12  # where rows begin at 16 bytes; others copy element by element
# Of a multiprocessor, and what one block may have of it on sm_86, 89 and 120.
MOST_REGISTERS, MOST_SHARED = 65536, 99 * 1024


@dataclass(frozen=True, slots=True)
class Figures:
    """What compilers make of one variant.

    `shared` are static bytes, with the 1024 that compilers reserve from sm_90 on; `local` counts
    bytes of stack and local memory, and accesses to it; the loop is that of all mma.
    """

    registers: int
    shared: int
    local: int
    loop_instructions: int = 0
    loop_mma: int = 0

    @property
    def per_mma(self) -> float:
        """Instructions of the main loop for each mma in it."""
        return self.loop_instructions / self.loop_mma if self.loop_mma else float("inf")


def need_disassembly() -> None:
    """Skip without the programs that read machine code; fail if NPMOE_REQUIRE names the extra."""
    if find_cuobjdump() is None or find_nvdisasm() is None:
        stop = pytest.fail if is_required() else pytest.skip
        stop("needs cuobjdump and nvdisasm, on the path or of the extra npmoe[emulate]")


def measure(kernel: Kernel, arch: str) -> Figures:
    """Compile and count."""
    cuobjdump, nvdisasm = find_cuobjdump(), find_nvdisasm()
    assert cuobjdump is not None
    assert nvdisasm is not None
    cubin = compile_kernel(kernel, arch, "cubin")
    usage = read_usage(cubin, cuobjdump)[kernel.entry]
    local = usage.stack + usage.local
    if kernel.file not in MMA_FILES:
        return Figures(usage.registers, usage.shared, local)
    counts = count_instructions(disassemble(cubin, nvdisasm))
    return Figures(
        usage.registers, usage.shared, local + counts.local, counts.loop_instructions,
        counts.loop_hmma,
    )  # fmt: skip


def find_faults(launch: Launch, figures: Figures) -> list[str]:
    """Say what no compiler may make of a variant."""
    of_block = 8 * -(-figures.registers // 8) * launch.threads  # they are given in eights
    shared = launch.shared_mem + figures.shared
    mma = launch.kernel.file in MMA_FILES
    aligned = dict(launch.kernel.options).get("ALIGNED") == 1
    faults = {
        f"{figures.local} bytes of local memory, or accesses": figures.local > 0,
        f"{of_block} registers of a block": of_block > MOST_REGISTERS,
        f"{shared} shared bytes": shared > MOST_SHARED,
        "no loop that holds all mma": mma and figures.loop_mma == 0,
        f"{figures.per_mma:.2f} instructions per mma": aligned and figures.per_mma > MOST_PER_MMA,
    }
    return [text for text, wrong in faults.items() if wrong]


def find_changes(figures: Figures, known: Figures | None) -> list[str]:
    """Say what differs from the table: what is better belongs there too."""
    if known is None:
        return ["not in the table"]
    return [
        f"{field.name} {old} -> {new}"
        for field in fields(Figures)
        if (new := getattr(figures, field.name)) != (old := getattr(known, field.name))
    ]


def check_variants(pairs: Iterable[tuple[Kernel, str]]) -> None:
    """Compile, hold to the limits, and to the table if it is of this compiler."""
    need_disassembly()
    measured = {(kernel, arch): measure(kernel, arch) for kernel, arch in pairs}
    asked = asked_kernels()
    faults = [
        f"{kernel} for {arch}: {fault}"
        for (kernel, arch), figures in measured.items()
        for fault in find_faults(asked[kernel], figures)
    ]
    assert not faults, "\n".join(faults)
    need_tables()
    table = read_table()
    changes = [
        f"{kernel} for {arch}: {change}"
        for (kernel, arch), figures in measured.items()
        for change in find_changes(figures, table.get((str(kernel), arch)))
    ]
    assert not changes, "\n".join([*changes, "PYTHONPATH=. python tests/gpu/kernel_ratchets.py"])


def draw_variants(
    kernels: Iterable[Kernel], group: Callable[[Kernel], Hashable], seed: int
) -> list[tuple[Kernel, str]]:
    """Draw one variant of each group, for one architecture."""
    rng = random.Random(seed)
    groups: dict[Hashable, list[Kernel]] = {}
    for kernel in sorted(kernels, key=str):
        groups.setdefault(group(kernel), []).append(kernel)
    return [(rng.choice(of), rng.choice(ARCHITECTURES)) for of in groups.values()]


@cache
def read_table() -> dict[tuple[str, str], Figures]:
    """Give the figures by variant and architecture."""
    data = json.loads(TABLE.read_text(encoding="utf-8"))
    return {
        (name, f"sm_{number}"): Figures(*figures)
        for name, row in data["figures"].items()
        for numbers, figures in row.items()
        for number in numbers.split()
    }


def _measure_row(kernel: Kernel) -> str:
    """Return a line of the table: architectures with equal figures stand together."""
    equal: dict[tuple[int, ...], list[str]] = {}
    for arch in ARCHITECTURES:
        figures = astuple(measure(kernel, arch))
        count = len(figures) if kernel.file in MMA_FILES else 3
        equal.setdefault(figures[:count], []).append(arch.removeprefix("sm_"))
    row = {" ".join(numbers): figures for figures, numbers in equal.items()}
    return f"    {json.dumps(str(kernel))}: {json.dumps(row)}"


def write_table() -> None:
    """Measure everything."""
    with ProcessPoolExecutor(2) as pool:
        lines = list(pool.map(_measure_row, sorted(asked_kernels(), key=str)))
    columns = json.dumps([field.name for field in fields(Figures)])
    TABLE.write_text(
        f'{{\n  "columns": {columns},\n  "figures": {{\n' + ",\n".join(lines) + "\n  }\n}\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    write_table()
