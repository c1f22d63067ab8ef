"""Machine code of the tensor-core kernels: mma there, no local memory, and no figure gets worse."""

from __future__ import annotations

import pytest
from emulation import need_emulation, need_tables
from sass_counts import count_instructions, find_nvdisasm
from sass_ratchets import ARCHITECTURES, SUBJECTS, Figures, measure, read_table

need_emulation()
if find_nvdisasm() is None:
    pytest.skip(
        "needs nvdisasm: pip install nvidia-cuda-nvdisasm, or on the path", allow_module_level=True
    )
TABLE = read_table()
PAIRS = [(name, arch) for name in SUBJECTS for arch in ARCHITECTURES]
# tf32, 16 rows, weights with the depth last: of some 200 instructions for 16 mma, 80 round to tf32
# and 32 load right fragments, one register each. Unaligned variants copy element by element.
EXCEPTIONS = {
    "float-STORE-16-transposed-aligned",
    "float-ACTIVATE_BACKWARD-16-gated-gather-transposed-aligned",
}


def check(name: str, arch: str) -> None:
    got, known = measure(name, arch), TABLE[name, arch]
    assert got.loop_hmma == known.loop_hmma > 0
    assert got.local == 0
    assert got.registers <= 255
    need_tables()
    assert got.loop_instructions <= known.loop_instructions
    assert got.registers <= known.registers


@pytest.mark.parametrize(("name", "arch"), PAIRS[::19])
def test_no_worse(name, arch):
    check(name, arch)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "arch"), PAIRS)
def test_none_worse(name, arch):
    check(name, arch)


def test_table_is_complete():
    assert set(TABLE) == set(PAIRS)
    assert all(figures.local == 0 and figures.loop_hmma > 0 for figures in TABLE.values())


def test_twelve_instructions_per_mma():
    over = {
        name
        for (name, _), figures in TABLE.items()
        if figures.per_mma > 12 and name.endswith("-aligned")
    }
    assert over == EXCEPTIONS


SASS = """
.L_x_1:
        /*0000*/                   LDSM.16.M88.4 R12, [R3] ;
.L_x_2:
        /*0010*/                   HMMA.16816.F32.BF16 R20, R24, R26, R20 ;
        /*0020*/              @P0 BRA `(.L_x_2) ;
        /*0030*/                   HMMA.16816.F32.BF16 R20, R24, R26, R20 ;
        /*0040*/                   STL [R1], R20 ;
        /*0050*/             @!P0 BRA `(.L_x_1) ;
        /*0060*/                   EXIT ;
"""


def test_counting():
    counts = count_instructions(SASS)
    assert (counts.instructions, counts.hmma, counts.local) == (7, 2, 1)
    assert (counts.loop_instructions, counts.loop_hmma) == (6, 2)
    assert Figures(6, 2, 32, 1).per_mma == 3.0
