"""Small mistakes planted in the compiled kernels are noticed by the sweep's launches."""

# ruff: noqa: E402  # imports follow what they need
from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import pytest
from emulation import need_emulation

need_emulation()

from device_sweep import Mutants
from equivalents import EQUIVALENTS, argument_for
from mutants import BOUNDARY, SYNCHRONISATION, Mutant, draw_mutants, edits_of, find_mutants
from sweep_catalog import Target, mutated_targets
from test_cupy_sweep import code_of, sharpen

from accel.cupy_raw.nvrtc import emulated_ptx
from accel.device.emulated import EmulatedDevice
from npmoe.testing import ptx

TARGETS = mutated_targets()
# In CI: so many kernels, and so many boundary mutants of each beside all of synchronisation.
KERNELS, MUTANTS = 6, 16


@dataclass
class Tally:
    """What became of mutants."""

    caught: Counter[str] = field(default_factory=Counter)
    equivalent: Counter[str] = field(default_factory=Counter)
    alive: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Demand all of synchronisation, and 95 % of the boundary mutants that can be noticed."""
        lost = [m for m in self.alive if m.startswith(SYNCHRONISATION)]
        assert not lost, "\n".join(lost)
        found = sum(self.caught[kind] for kind in BOUNDARY)
        live = found + len(self.alive)
        assert found >= 0.95 * live, f"{found} of {live} caught:\n" + "\n".join(self.alive)


@lru_cache(maxsize=64)
def unreached(target: Target) -> frozenset[int]:
    """Return the PTX lines that no sharp case runs; `uncovered.py` says why of each."""
    coverage = sharpen(target, "in-order").coverage
    return frozenset(
        i.line for k, c in coverage.items() if k.entry == target.entry for i in c.missed
    )


def judge(target: Target, chosen: int | None, seed: int, tally: Tally) -> None:
    """Run the sharp cases, then all, on mutants of a target."""
    device = EmulatedDevice(emulated_ptx)
    kernel = target.kernel(device)
    every = find_mutants(emulated_ptx(kernel)[0], kernel.entry)
    mutants = every
    if chosen is not None:
        boundary = draw_mutants([m for m in every if not m.synchronises], chosen, seed)
        mutants = [m for m in every if m.synchronises] + boundary
    cases, planted = list(target.sharp()), Mutants(device, kernel, mutants)
    assert planted.noticed(None, cases) is None
    if chosen is None:
        assert planted.noticed(None, target.full()) is None
    for mutant in mutants:
        if planted.noticed(mutant, cases):
            tally.caught[mutant.kind] += 1
            continue
        i = mutant.instruction
        why = argument_for(kernel.entry, mutant.kind, code_of(i), i.text)
        if not mutant.synchronises and (why is not None or i.line in unreached(target)):
            tally.equivalent[mutant.kind] += 1
        elif chosen is not None or not planted.noticed(mutant, target.full()):
            tally.alive.append(f"{mutant.kind} in {target.name}: {mutant} in `{code_of(i)}`")
        else:
            tally.caught[mutant.kind] += 1


@pytest.mark.parametrize("seed", [1])
def test_a_sample_of_mutants_is_noticed(seed: int) -> None:
    tally = Tally()
    for target in random.Random(seed).sample(TARGETS, KERNELS):
        judge(target, MUTANTS, seed, tally)
    tally.check()
    assert sum(tally.caught.values()) >= 70
    assert tally.caught["barrier deleted"] >= 1


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", [2, 3])
def test_other_samples_are_noticed(seed: int) -> None:
    tally = Tally()
    for target in random.Random(seed).sample(TARGETS, KERNELS):
        judge(target, MUTANTS, seed, tally)
    tally.check()


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_all_mutants_are_noticed(target: Target) -> None:
    tally = Tally()
    judge(target, None, 0, tally)
    tally.check()


def test_every_argument_is_one() -> None:
    assert all(len(e.why) > 30 for e in EQUIVALENTS)
    assert not any(e.fits("place_routes", "barrier deleted", "__syncwarp();", "bar.warp.sync -1")
                   for e in EQUIVALENTS)  # fmt: skip


KERNEL = """.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 out, .param .u32 n)
{
    .shared .align 4 .b32 s[32];
    .reg .pred %p<2>; .reg .b32 %r<8>; .reg .b64 %rd<6>;
    ld.param.u64 %rd1, [out];
    ld.param.u32 %r1, [n];
    mov.u32 %r2, %tid.x;
    mul.wide.u32 %rd2, %r2, 4;
    mov.u64 %rd3, s;
    add.s64 %rd4, %rd3, %rd2;
    st.shared.u32 [%rd4], %r2;
    bar.sync 0;
    setp.lt.s32 %p1, %r2, %r1;
    @!%p1 bra DONE;
    ld.shared.u32 %r3, [s+4];
    add.s32 %r3, %r3, 7;
    atom.global.add.u32 %r4, [%rd1], %r3;
    red.global.max.u32 [%rd1+4], %r4;
DONE:
    ret;
}
"""


def small(mutant: Mutant | None, module: ptx.CompiledModule) -> list[int]:
    out = np.zeros(2, np.uint32)
    edit = None if mutant is None else mutant.name
    module.launch("k", 1, 8, [out, 5], edit=edit, limit=10_000)
    return [int(v) for v in out]


def test_mutants_of_a_small_kernel_each_change_it() -> None:
    mutants = find_mutants(KERNEL, "k")
    assert Counter(m.kind for m in mutants) == {
        "barrier deleted": 1, "atomic made plain": 2, "comparison flipped": 1, "guard dropped": 1,
        "guard negated": 1, "constant moved": 2, "address moved": 8, "access dropped": 2,
    }  # fmt: skip
    assert len({m.name for m in mutants}) == len(mutants)
    module = ptx.load(KERNEL, ["k"], edits=edits_of(mutants))
    right = small(None, module)
    assert right == [40, 32]
    survivors = []
    for mutant in mutants:
        try:
            if small(mutant, module) == right:
                survivors.append(mutant)
        except ptx.PtxFinding:
            pass
    # The maximum of what atom returned is the last but one sum: all are noticed.
    assert not survivors, [str(m) for m in survivors]


def test_waits_are_loosened_and_flips_go_both_ways() -> None:
    text = KERNEL.replace("bar.sync 0;", "cp.async.wait_group 1;\n    cp.async.wait_all;")
    kinds = {m.edit.text: m.kind for m in find_mutants(text, "k")}
    assert kinds["cp.async.wait_group 2;"] == "wait loosened"
    assert any(m.kind == "wait loosened" and not m.edit.text for m in find_mutants(text, "k"))
    for one, other in (("lt", "le"), ("le", "lt"), ("ge", "gt"), ("gt", "ge")):
        flipped = find_mutants(KERNEL.replace("setp.lt", f"setp.{one}"), "k")
        texts = [m.edit.text for m in flipped if m.kind == "comparison flipped"]
        assert texts == [f"setp.{other}.s32 %p1, %r2, %r1;"]


def test_drawing_is_repeatable_and_takes_every_kind() -> None:
    mutants = find_mutants(KERNEL, "k")
    first, again, other = (draw_mutants(mutants, 9, seed) for seed in (1, 1, 2))
    assert [m.name for m in first] == [m.name for m in again]
    assert [m.name for m in first] != [m.name for m in other]
    assert {m.kind for m in first} == {m.kind for m in mutants}
    assert len(draw_mutants(mutants, 99, 1)) == len(mutants)
