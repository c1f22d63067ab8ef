"""Bounds, alignment, initialisation, permission, cp.async: mistakes and their repaired twins."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_cases import SCHEDULES, find, kernel, needs_compiler, run

from npmoe.testing import ptx

pytestmark = [needs_compiler, pytest.mark.parametrize("schedule", SCHEDULES)]
OWN = "mul.wide.u32 %rd5, %r1, 4; add.s64 %rd6, %rd1, %rd5;"
SHARED = ".shared .align 16 .b8 s[256]; .shared .align 16 .b8 next[256];"
OWN_SHARED = "mov.u32 %r4, s; shl.b32 %r5, %r1, 2; add.u32 %r5, %r4, %r5; mov.u32 %r10, 5;"


def test_global_out_of_bounds(schedule):
    text = kernel(OWN + "ld.global.u32 %r3, [%rd6];")
    run(text, 1, 32, [np.zeros(32, np.uint32)], schedule=schedule)
    found = find(text, 1, 32, [np.zeros(31, np.uint32)], "out-of-bounds", schedule=schedule)
    assert (found.space, found.buffer, found.name, found.offset) == ("global", 0, "args[0]", 124)
    assert found.place.thread == (31, 0, 0)
    assert (
        "reads 4 bytes outside: args[0] in global memory, byte offset 124 of 124 (element 31 of "
        "31 uint32)" in str(found)
    )


def test_global_underflow_is_named_after_its_own_buffer(schedule):
    text = kernel(OWN + "st.global.u32 [%rd6+-4], %r1;", ".u64 p0, .u64 p1")
    found = find(
        text,
        1,
        1,
        [np.zeros(4, np.uint32), np.zeros(4, np.uint32)],
        "out-of-bounds",
        schedule=schedule,
    )
    assert (found.buffer, found.offset) == (0, -4)
    assert "writes 4 bytes outside" in str(found)


def test_buffers_are_never_neighbours(schedule):
    """From args[0], no 32 bit offset reaches args[1]."""
    text = kernel(
        "ld.param.u32 %r3, [n]; cvt.s64.s32 %rd5, %r3; add.s64 %rd6, %rd1, %rd5; "
        "ld.global.u8 %h1, [%rd6];",
        ".u64 p0, .u64 p1, .u32 n",
    )
    buffers = [np.zeros(16, np.uint8), np.zeros(1 << 20, np.uint8)]
    for offset in (16, 4096, 2**31 - 1, -1, -(2**31)):
        found = find(text, 1, 1, [*buffers, offset], "out-of-bounds", schedule=schedule)
        assert (found.buffer, found.offset) == (0, offset)
    run(text, 1, 1, [*buffers, 15], schedule=schedule)


def test_an_overflow_of_32_bit_address_arithmetic(schedule):
    """2**30 * 4 wraps to 0 in 32 bits; the wide product leaves the buffer."""
    wide = kernel(
        "mov.u32 %r3, 0x40000000; mul.wide.u32 %rd5, %r3, 4; add.s64 %rd6, %rd1, %rd5; "
        "ld.global.u32 %r4, [%rd6];"
    )
    assert (
        find(wide, 1, 1, [np.zeros(4, np.uint32)], "out-of-bounds", schedule=schedule).offset
        == 2**32
    )


@pytest.mark.parametrize("address", ["[0]", "[1024]", "[%rd7]"])
def test_wild_addresses(schedule, address):
    text = kernel(f"mov.u64 %rd7, 0x123456789ABCDEF0; ld.global.u32 %r3, {address};")
    found = find(text, 1, 1, [None], "out-of-bounds", schedule=schedule)
    assert (found.buffer, found.offset) == (None, None)
    assert "which is in no allocation" in str(found)


def test_shared_out_of_bounds_does_not_reach_the_next_variable(schedule):
    text = OWN_SHARED + "st.shared.u32 [%r5+{by}], %r10;"
    run(kernel(text.format(by=0), declarations=SHARED), 1, 64, [None], schedule=schedule)
    found = find(
        kernel(text.format(by=4), declarations=SHARED),
        1,
        64,
        [None],
        "out-of-bounds",
        schedule=schedule,
    )
    assert (found.space, found.name, found.offset) == ("shared", "s", 256)


def test_dynamic_shared_memory_is_as_long_as_the_launch_says(schedule):
    declared = f"{'.extern .shared .align 16 .b8 dyn[];'}"
    text = kernel(OWN_SHARED.replace(" s;", " dyn;") + "st.shared.u32 [%r5], %r10;").replace(
        ".visible", declared + "\n.visible"
    )
    run(text, 1, 64, [None], shared_mem=256, schedule=schedule)
    found = find(text, 1, 64, [None], "out-of-bounds", shared_mem=252, schedule=schedule)
    assert (found.name, found.offset) == ("dyn", 252)
    assert find(text, 1, 64, [None], "out-of-bounds", schedule=schedule).name == "dyn"


def test_local_out_of_bounds(schedule):
    text = "mov.u64 %rd5, depot; mov.u32 %r10, 1; st.local.u32 [%rd5+{by}], %r10;"
    declared = ".local .align 8 .b8 depot[16];"
    run(kernel(text.format(by=12), declarations=declared), 1, 32, [None], schedule=schedule)
    found = find(
        kernel(text.format(by=16), declarations=declared),
        1,
        32,
        [None],
        "out-of-bounds",
        schedule=schedule,
    )
    assert (found.space, found.name, found.offset) == ("local", "depot", 16)


@pytest.mark.parametrize(
    ("size", "kind"), [(2, "u16"), (4, "f32"), (8, "u64"), (8, "v2.u32"), (16, "v4.f32")]
)
def test_misaligned(schedule, size, kind):
    registers = {
        "u16": "%h1",
        "f32": "%f1",
        "u64": "%rd8",
        "v2.u32": "{%r4, %r5}",
        "v4.f32": "{%f1, %f2, %f3, %f4}",
    }
    text = "add.s64 %rd6, %rd1, {by}; ld.global.{kind} {registers}, [%rd6];"
    array = np.zeros(64, np.uint8)
    run(
        kernel(text.format(by=size, kind=kind, registers=registers[kind])),
        1,
        1,
        [array],
        schedule=schedule,
    )
    bad = kernel(text.format(by=size // 2, kind=kind, registers=registers[kind]))
    found = find(bad, 1, 1, [array], "misaligned", schedule=schedule)
    assert found.offset == size // 2
    assert f"must be multiples of {size}" in str(found)


def test_shared_memory_is_aligned_no_better_than_declared(schedule):
    text = "mov.u32 %r4, s; st.shared.v4.u32 [%r4], {%r1, %r1, %r1, %r1};"
    run(kernel(text, declarations=SHARED), 1, 1, [None], schedule=schedule)
    find(
        kernel(text, declarations=".shared .align 8 .b8 s[256];"),
        1,
        1,
        [None],
        "misaligned",
        schedule=schedule,
    )


def test_uninitialized_shared(schedule):
    text = OWN_SHARED + "{first} ld.shared.u32 %r11, [%r5];"
    run(
        kernel(text.format(first="st.shared.u32 [%r5], %r10;"), declarations=SHARED),
        1,
        32,
        [None],
        schedule=schedule,
    )
    found = find(
        kernel(text.format(first=""), declarations=SHARED),
        1,
        32,
        [None],
        "uninitialized",
        schedule=schedule,
    )
    assert (found.space, found.name) == ("shared", "s")
    half = kernel(
        text.format(first="cvt.u16.u32 %h1, %r1; st.shared.u16 [%r5], %h1;"), declarations=SHARED
    )
    find(half, 1, 32, [None], "uninitialized", schedule=schedule)


def test_shared_memory_is_fresh_in_every_block(schedule):
    text = kernel(
        OWN_SHARED
        + "setp.eq.u32 %p1, %r2, 0; @%p1 st.shared.u32 [%r5], %r10; ld.shared.u32 %r11, [%r5];",
        declarations=SHARED,
    )
    run(text, 1, 32, [None], schedule=schedule)
    assert find(text, 2, 32, [None], "uninitialized", schedule=schedule).place.block == (1, 0, 0)


def test_uninitialized_local(schedule):
    text = (
        "mov.u64 %rd5, depot; mov.u32 %r10, 1; st.local.u32 [%rd5], %r10; ld.local.u32 %r11, "
        "[%rd5+{by}];"
    )
    declared = ".local .align 8 .b8 depot[16];"
    run(kernel(text.format(by=0), declarations=declared), 1, 32, [None], schedule=schedule)
    assert (
        find(
            kernel(text.format(by=4), declarations=declared),
            1,
            32,
            [None],
            "uninitialized",
            schedule=schedule,
        ).name
        == "depot"
    )


def test_uninitialized_global(schedule):
    text = kernel(OWN + "ld.global.u32 %r3, [%rd6];")
    run(text, 1, 32, [np.zeros(32, np.uint32)], schedule=schedule)
    found = find(
        text,
        1,
        32,
        [ptx.Uninitialized(np.zeros(32, np.uint32))],
        "uninitialized",
        schedule=schedule,
    )
    assert found.buffer == 0
    written = kernel(OWN + "st.global.u32 [%rd6], %r1; ld.global.u32 %r3, [%rd6];")
    run(written, 1, 32, [ptx.Uninitialized(np.zeros(32, np.uint32))], schedule=schedule)


def test_an_atomic_reads_too(schedule):
    text = kernel("red.global.add.u32 [%rd1], 1;")
    find(
        text, 1, 32, [ptx.Uninitialized(np.zeros(1, np.uint32))], "uninitialized", schedule=schedule
    )


def test_read_only(schedule):
    text = kernel(OWN + "st.global.u32 [%rd6], %r1;")
    array = np.zeros(32, np.uint32)
    found = find(text, 1, 32, [ptx.ReadOnly(array)], "read-only", schedule=schedule)
    assert "writes to a read-only allocation: args[0]" in str(found)
    assert not array.any()
    array.flags.writeable = False
    find(text, 1, 32, [array], "read-only", schedule=schedule)
    find(
        kernel("red.global.add.u32 [%rd1], 1;"),
        1,
        32,
        [ptx.ReadOnly(np.zeros(1, np.uint32))],
        "read-only",
        schedule=schedule,
    )
    run(text, 1, 32, [np.zeros(32, np.uint32)], schedule=schedule)


def test_constants_cannot_be_written(schedule):
    text = kernel("mov.u64 %rd5, table; cvta.const.u64 %rd5, %rd5; st.u32 [%rd5], %r1;").replace(
        ".visible", ".const .align 4 .u32 table[2] = {1, 2};\n.visible"
    )
    assert find(text, 1, 1, [None], "read-only", schedule=schedule).name == "table"


def test_undefined_registers(schedule):
    text = "setp.lt.u32 %p1, %r1, 16; @%p1 mov.u32 %r20, 3; {copy} {use}"
    use = "add.u32 %r22, %r21, 1;"
    found = find(
        kernel(text.format(copy="mov.u32 %r21, %r20;", use=use)),
        1,
        32,
        [None],
        "undefined-register",
        schedule=schedule,
    )
    assert "reads register %r21" in str(found)
    assert found.place.thread[0] >= 16
    run(kernel(text.format(copy="mov.u32 %r21, %r20;", use="")), 1, 32, [None], schedule=schedule)
    run(
        kernel(text.format(copy="mov.u32 %r21, %r20;", use="@%p1 " + use)),
        1,
        32,
        [None],
        schedule=schedule,
    )
    found = find(
        kernel("setp.lt.u32 %p1, %r30, 3;"), 1, 32, [None], "undefined-register", schedule=schedule
    )
    assert "%r30" in str(found)
    find(kernel("@%p5 mov.u32 %r4, 1;"), 1, 32, [None], "undefined-register", schedule=schedule)


def test_division_by_zero(schedule):
    text = kernel("sub.u32 %r3, %r1, 5; rem.u32 %r4, 7, %r3;")
    run(text, 1, 5, [None], schedule=schedule)
    found = find(text, 1, 6, [None], "division-by-zero", schedule=schedule)
    assert found.place.thread == (5, 0, 0)


def test_trap(schedule):
    text = kernel("setp.eq.u32 %p1, %r1, 3; @%p1 trap;")
    run(text, 1, 3, [None], schedule=schedule)
    assert find(text, 1, 4, [None], "trap", schedule=schedule).place.thread == (3, 0, 0)


COPY = """
mul.wide.u32 %rd5, %r1, 16; add.s64 %rd6, %rd1, %rd5; mov.u32 %r4, s; shl.b32 %r5, %r1, 4;
add.u32 %r5, %r4, %r5;
xor.b32 %r6, %r1, 1; shl.b32 %r6, %r6, 4; add.u32 %r6, %r4, %r6;
cp.async.cg.shared.global [%r5], [%rd6], 16;
cp.async.commit_group;
"""
STAGES = ".shared .align 16 .b8 s[1024];"
DATA = np.arange(64, dtype=np.uint32)


def async_pair(rest: str) -> str:
    return kernel(COPY + rest, declarations=STAGES)


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ("ld.shared.u32 %r7, [%r5];", "cp.async.wait_group 0; ld.shared.u32 %r7, [%r5];"),
        (
            "cp.async.wait_group 1; ld.shared.u32 %r7, [%r5];",
            "cp.async.wait_all; ld.shared.u32 %r7, [%r5];",
        ),
        (
            "bar.sync 0; ld.shared.u32 %r7, [%r6];",
            "cp.async.wait_group 0; bar.sync 0; ld.shared.u32 %r7, [%r6];",
        ),
        ("st.shared.u32 [%r5], %r1;", "cp.async.wait_group 0; st.shared.u32 [%r5], %r1;"),
        (
            "cp.async.cg.shared.global [%r5], [%rd6], 16;",
            "cp.async.wait_group 0; cp.async.cg.shared.global [%r5], [%rd6], 16;",
        ),
    ],
)
def test_async_copy_before_its_wait(schedule, bad, good):
    found = find(async_pair(bad), 1, 16, [DATA], "async", schedule=schedule)
    assert found.space == "shared"
    assert "cp.async.cg.shared.global [%r5], [%rd6], 16` has not delivered" in str(found)
    run(async_pair(good), 1, 16, [DATA], schedule=schedule)


def test_waiting_is_for_the_thread_that_issued(schedule):
    """After the wait, others still need a barrier: without it they race or see it in flight."""
    with pytest.raises(ptx.PtxFinding) as caught:
        run(
            async_pair("cp.async.wait_group 0; ld.shared.u32 %r7, [%r6];"),
            1,
            16,
            [DATA],
            schedule=schedule,
        )
    assert caught.value.kind in {"race", "async", "uninitialized"}
    run(
        async_pair("cp.async.wait_group 0; bar.warp.sync -1; ld.shared.u32 %r7, [%r6];"),
        1,
        16,
        [DATA],
        schedule=schedule,
    )


def test_a_stage_that_is_still_read(schedule):
    """The next copy into a stage must come after the barrier that ends its reading."""
    text = (
        "cp.async.wait_group 0; bar.sync 0; ld.shared.u32 %r7, [%r6]; "
        "{between} cp.async.cg.shared.global [%r5], [%rd6], 16;"
    )
    with pytest.raises(
        ptx.PtxFinding, match=r"the asynchronous write of cp.async|has not delivered"
    ) as caught:
        run(async_pair(text.format(between="")), 1, 16, [DATA], schedule=schedule)
    assert caught.value.kind in {"race", "async"}  # who reads late sees the copy in flight
    run(async_pair(text.format(between="bar.sync 0;")), 1, 16, [DATA], schedule=schedule)


def test_the_source_of_a_copy_is_checked(schedule):
    found = find(
        async_pair("cp.async.wait_all;"), 1, 16, [DATA[:60]], "out-of-bounds", schedule=schedule
    )
    assert (found.buffer, found.offset) == (0, 240)
    run(async_pair("cp.async.wait_all;"), 1, 15, [DATA[:60]], schedule=schedule)


@pytest.mark.parametrize(
    "spin",
    [
        "LOOP: bra LOOP;",
        "LOOP: ld.volatile.global.u32 %r3, [%rd1]; setp.eq.u32 %p1, %r3, 0; @%p1 bra LOOP;",
    ],
)
def test_no_progress(schedule, spin):
    found = find(
        kernel(spin),
        1,
        32,
        [np.zeros(1, np.uint32)],
        "no-progress",
        schedule=schedule,
        limit=300_000,
    )
    assert "does not come to its end" in str(found)


def test_spinning_on_what_another_thread_writes(schedule):
    """A flag within a block, and one between blocks, in whichever order they are started."""
    spin = """
setp.ne.u32 %p2, {who}, 1; @%p2 bra WRITE;
LOOP: ld.acquire.gpu.global.u32 %r3, [%rd1]; setp.eq.u32 %p1, %r3, 0; @%p1 bra LOOP;
bra.uni DONE;
WRITE: mov.u32 %r4, 1; setp.eq.u32 %p1, {who}, 0; @%p1 st.release.gpu.global.u32 [%rd1], %r4;
DONE:"""
    run(kernel(spin.format(who="%r1")), 1, 33, [np.zeros(1, np.uint32)], schedule=schedule)
    run(kernel(spin.format(who="%r2")), 2, 1, [np.zeros(1, np.uint32)], schedule=schedule)
    swapped = spin.replace("%p2, {who}, 1;", "%p2, {who}, 0;").replace(
        "%p1, {who}, 0;", "%p1, {who}, 1;"
    )
    run(kernel(swapped.format(who="%r2")), 2, 1, [np.zeros(1, np.uint32)], schedule=schedule)
