"""The table of machine-code figures; `PYTHONPATH=. python` this file writes it anew, in minutes."""

from __future__ import annotations

import itertools
import json
from dataclasses import astuple, dataclass
from pathlib import Path

from kernel_runs import TYPES, Variant, WeightGradient
from sass_counts import count_instructions, count_registers, disassemble, find_nvdisasm

from accel.cupy_raw.nvrtc import compile_kernel

TABLE = Path(__file__).with_name("sass_ratchets.json")
ARCHITECTURES = ("sm_80", "sm_90", "sm_120")
# The main loop knows nothing of the epilogue; registers do, so the widest epilogue is there too.
SUBJECTS: dict[str, Variant | WeightGradient] = {
    str(v): v
    for v in (
        *(
            Variant(operand, *form, gather, transposed, block, aligned)
            for (*form, gather), operand, transposed, block, aligned in itertools.product(
                (("STORE", False, False), ("ACTIVATE_BACKWARD", True, True)),
                TYPES, (False, True), (16, 64, 128), (True, False),
            )
        ),
        *(WeightGradient(*c) for c in itertools.product(TYPES, (0, 1), (True, False))),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Figures:
    """What must not grow: instructions of the main loop for its mma, registers, local accesses."""

    loop_instructions: int
    loop_hmma: int
    registers: int
    local: int

    @property
    def per_mma(self) -> float:
        return self.loop_instructions / self.loop_hmma if self.loop_hmma else float("inf")


def measure(name: str, arch: str) -> Figures:
    """Compile and count."""
    program = find_nvdisasm()
    assert program is not None
    cubin = compile_kernel(SUBJECTS[name].kernel, arch, "cubin")
    counts = count_instructions(disassemble(cubin, program))
    assert counts.loop_hmma == counts.hmma
    return Figures(counts.loop_instructions, counts.loop_hmma, count_registers(cubin), counts.local)


def read_table() -> dict[tuple[str, str], Figures]:
    """Give the figures by variant and architecture."""
    data = json.loads(TABLE.read_text(encoding="utf-8"))
    return {
        (name, arch): Figures(*figures)
        for name, row in data["figures"].items()
        for arch, figures in row.items()
    }


def write_table() -> None:
    """Measure everything."""
    lines = [
        f'    "{name}": '
        + json.dumps({arch: astuple(measure(name, arch)) for arch in ARCHITECTURES})
        for name in SUBJECTS
    ]
    text = (
        '{\n  "columns": ["loop_instructions", "loop_hmma", "registers", "local"],\n'
        '  "figures": {\n' + ",\n".join(lines) + "\n  }\n}\n"
    )
    TABLE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_table()
