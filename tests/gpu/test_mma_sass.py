"""Machine code of the tensor-core kernels: one loop holds all mma, at few instructions each."""

# ruff: noqa: E402  # imports follow what they need
from __future__ import annotations

from dataclasses import replace

import pytest
from compile_gates import asked_kernels
from emulation import need_emulation, need_tables
from sass_counts import count_instructions, read_machine

need_emulation()

import kernel_ratchets
from kernel_ratchets import (
    MMA_FILES,
    MOST_PER_MMA,
    Figures,
    check_variants,
    draw_variants,
    find_faults,
    read_table,
)

from accel.device.kernel import Kernel


def variants(aligned: int) -> list[Kernel]:
    """List the variants whose rows begin at 16 bytes, or the others."""
    return [
        k for k in asked_kernels()
        if k.file in MMA_FILES and dict(k.options)["ALIGNED"] == aligned
    ]  # fmt: skip


def product(kernel: Kernel) -> tuple[str, str | int]:
    """Give what the main loop multiplies."""
    return kernel.file, dict(kernel.options)["OPERAND"]


@pytest.mark.parametrize("aligned", [1, 0])
def test_a_sample_is_within_limits_and_as_in_the_table(aligned: int) -> None:
    pairs = draw_variants(variants(aligned), product, seed=aligned)
    assert len(pairs) == 6
    check_variants(pairs)


def test_no_aligned_variant_has_more_than_twelve_instructions_per_mma() -> None:
    aligned, other = ({str(kernel) for kernel in variants(n)} for n in (1, 0))
    assert len(aligned) == len(other) == 72
    per_mma = {key: figures.per_mma for key, figures in read_table().items()}
    assert 11 < max(n for (name, _), n in per_mma.items() if name in aligned) <= MOST_PER_MMA
    assert max(n for (name, _), n in per_mma.items() if name in other) > MOST_PER_MMA


def test_limits_of_the_main_loop_can_be_missed() -> None:
    aligned, other = (asked_kernels()[variants(a)[0]] for a in (1, 0))
    good = Figures(128, 1000, 0, loop_instructions=384, loop_mma=32)
    worse = replace(good, loop_instructions=385)
    assert find_faults(aligned, good) == find_faults(other, good) == []
    assert find_faults(aligned, worse) == ["12.03 instructions per mma"]
    assert find_faults(other, worse) == []
    without = replace(good, loop_instructions=0, loop_mma=0)
    assert "no loop that holds all mma" in find_faults(other, without)


def test_a_longer_loop_than_in_the_table_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    need_tables()
    ((kernel, arch),) = draw_variants(variants(1)[:1], product, seed=0)
    lower = dict(read_table())
    known = lower[str(kernel), arch]
    lower[str(kernel), arch] = replace(known, loop_instructions=known.loop_instructions - 1)
    monkeypatch.setattr(kernel_ratchets, "read_table", lambda: lower)
    count = known.loop_instructions
    with pytest.raises(AssertionError, match=f"loop_instructions {count - 1} -> {count}"):
        check_variants([(kernel, arch)])


SASS = """
.L_x_1:
        /*0000*/                   LDSM.16.M88.4 R12, [R3] ;
        /*0010*/              @P1 BRA `(.L_x_3) ;
.L_x_2:
        /*0020*/                   HMMA.16816.F32.BF16 R20, R24, R26, R20 ;
        /*0030*/              @P0 BRA `(.L_x_2) ;
        /*0040*/                   HMMA.16816.F32.BF16 R20, R24, R26, R20 ;
.L_x_3:
        /*0050*/                   STL [R1], R20 ;
        /*0060*/             @!P0 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
"""


def test_counting() -> None:
    machine = read_machine(SASS)
    assert machine.opcodes[2:5] == ["HMMA.16816.F32.BF16", "BRA", "HMMA.16816.F32.BF16"]
    assert machine.loops == [(2, 3), (0, 6)]
    counts = count_instructions(SASS)
    assert (counts.instructions, counts.hmma, counts.local) == (8, 2, 1)
    assert (counts.loop_instructions, counts.loop_hmma) == (7, 2)
    assert counts.per_mma == 3.5
    # A second loop with mma: none holds all.
    split = SASS.replace("`(.L_x_1)", "`(.L_x_3)")
    assert count_instructions(split).loop_hmma == 0
