"""Figures of machine code, read from what nvdisasm says of a cubin."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

_LABEL = re.compile(r"\s*(\.L_\w+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


@dataclass(frozen=True, slots=True)
class Machine:
    """Instructions by name, and each loop by the first and the last of them."""

    opcodes: list[str]
    loops: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class SassCounts:
    """Of one kernel; the main loop is the smallest loop that holds every HMMA."""

    instructions: int
    hmma: int
    local: int  # LDL and STL
    loop_instructions: int
    loop_hmma: int

    @property
    def per_mma(self) -> float:
        return self.loop_instructions / self.loop_hmma if self.loop_hmma else float("inf")


def find_nvdisasm() -> str | None:
    """Give the program: on the path, or of the wheel nvidia-cuda-nvdisasm."""
    found = shutil.which("nvdisasm")
    if found:
        return found
    try:
        files = metadata.files("nvidia-cuda-nvdisasm") or []
    except metadata.PackageNotFoundError:
        return None
    return next((str(f.locate()) for f in files if f.name == "nvdisasm"), None)


def disassemble(cubin: bytes, nvdisasm: str) -> str:
    """Return machine code as text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        done = subprocess.run(
            [nvdisasm, "-c", str(path)], capture_output=True, text=True, check=True
        )
    return done.stdout


def read_machine(text: str) -> Machine:
    """Find instructions, labels and the branches that go back."""
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    branches: list[tuple[str, int]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif instruction := _INSTRUCTION.match(line):
            words = instruction[1].split()
            name = words[1] if words[0].startswith("@") else words[0]
            target = _TARGET.search(instruction[1]) if name.startswith("BRA") else None
            if target:
                branches.append((target[1], len(opcodes)))
            opcodes.append(name)
    loops = [(labels[label], last) for label, last in branches if labels[label] <= last]
    return Machine(opcodes, loops)


def count_instructions(text: str) -> SassCounts:
    """Count, in the text of one kernel."""
    machine = read_machine(text)
    hmma = [i for i, name in enumerate(machine.opcodes) if name.startswith("HMMA")]
    around = [
        (last - first + 1, first, last)
        for first, last in machine.loops
        if hmma and first <= hmma[0] and hmma[-1] <= last
    ]
    size, first, last = min(around, default=(0, 0, -1))
    return SassCounts(
        instructions=len(machine.opcodes),
        hmma=len(hmma),
        local=sum(name.startswith(("LDL", "STL")) for name in machine.opcodes),
        loop_instructions=size,
        loop_hmma=sum(first <= i <= last for i in hmma),
    )
