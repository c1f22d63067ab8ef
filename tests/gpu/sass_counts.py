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
_REGISTERS = b"\x04\x2f\x08\x00"  # in .nv.info: attribute REGCOUNT, then symbol and count


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


def count_registers(cubin: bytes) -> int:
    """Return the registers of a thread, of a cubin with one kernel."""
    at = cubin.index(_REGISTERS) + len(_REGISTERS) + 4
    return int.from_bytes(cubin[at : at + 4], "little")


def disassemble(cubin: bytes, nvdisasm: str) -> str:
    """Return machine code as text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        done = subprocess.run(
            [nvdisasm, "-c", str(path)], capture_output=True, text=True, check=True
        )
    return done.stdout


def count_instructions(text: str) -> SassCounts:
    """Count, in the text of one kernel."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif instruction := _INSTRUCTION.match(line):
            code.append(instruction[1])
    opcodes = [c.split()[1] if c.startswith("@") else c.split()[0] for c in code]
    hmma = [i for i, name in enumerate(opcodes) if name.startswith("HMMA")]
    loops = []
    for last, (instruction, name) in enumerate(zip(code, opcodes, strict=True)):
        target = _TARGET.search(instruction) if name.startswith("BRA") else None
        first = labels[target[1]] if target else last + 1
        if hmma and first <= hmma[0] and hmma[-1] <= last:
            loops.append((last - first + 1, first, last))
    size, first, last = min(loops, default=(0, 0, -1))
    return SassCounts(
        instructions=len(code),
        hmma=len(hmma),
        local=sum(name.startswith(("LDL", "STL")) for name in opcodes),
        loop_instructions=size,
        loop_hmma=sum(first <= i <= last for i in hmma),
    )
