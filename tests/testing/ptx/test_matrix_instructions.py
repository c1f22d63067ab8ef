"""ldmatrix, stmatrix, movmatrix, mma.sync: whole tiles of integers, compared with NumPy exactly."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_cases import SCHEDULES, find, kernel, needs_compiler

from npmoe.testing import ptx

pytestmark = needs_compiler
SHARED = ".shared .align 16 .b8 tile[512];"
# Copy in[0:512] to shared, 16 bytes a thread; then %r5 is the address of row (tid) of 16 bytes.
FILL = """
mul.wide.u32 %rd5, %r1, 16; add.s64 %rd6, %rd1, %rd5;
ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%rd6];
mov.u32 %r4, tile; shl.b32 %r5, %r1, 4; add.u32 %r5, %r4, %r5;
st.shared.v4.u32 [%r5], {%r10, %r11, %r12, %r13}; bar.sync 0;
"""
STORE = "add.s64 %rd7, %rd2, %rd5; st.global.v4.u32 [%rd7], {%r20, %r21, %r22, %r23};"
ZERO = "mov.u32 %r20, 0; mov.u32 %r21, 0; mov.u32 %r22, 0; mov.u32 %r23, 0;"
# Kernels may use inline tiles in any order of lanes: all addresses are valid for x1 and x2 too.
REGS = {1: "{%r20}", 2: "{%r20, %r21}", 4: "{%r20, %r21, %r22, %r23}"}


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Exact for small integers."""
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def expected_ldmatrix(data: np.ndarray, count: int, trans: bool) -> np.ndarray:
    """(32, 4) registers, by the fragment layout of the manual."""
    m = data.reshape(4, 8, 8)
    out = np.zeros((32, 4), np.uint32)
    for lane in range(32):
        for k in range(count):
            tile = m[k].T if trans else m[k]
            low, high = (int(v) for v in tile[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2])
            out[lane, k] = high << 16 | low
    return out


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, trans, schedule):
    suffix = ".trans" if trans else ""
    text = kernel(
        f"{FILL} {ZERO} ldmatrix.sync.aligned.m8n8.x{count}{suffix}.shared.b16 {REGS[count]}, "
        f"[%r5]; {STORE}",
        ".u64 p0, .u64 p1", SHARED,
    )  # fmt: skip
    data = np.arange(256, dtype=np.uint16) * 3 + 1
    out = np.zeros((32, 4), np.uint32)
    ptx.launch(text, "k", 1, 32, [data, out], schedule=schedule)
    assert (out == expected_ldmatrix(data, count, trans)).all()


def test_stmatrix_undoes_ldmatrix():
    for suffix in ("", ".trans"):
        text = kernel(
            f"""{FILL} ldmatrix.sync.aligned.m8n8.x4{suffix}.shared.b16 {REGS[4]}, [%r5];
            bar.warp.sync -1;
            stmatrix.sync.aligned.m8n8.x4{suffix}.shared.b16 [%r5], {REGS[4]}; bar.warp.sync -1;
            ld.shared.v4.u32 {{%r20, %r21, %r22, %r23}}, [%r5]; {STORE}""",
            ".u64 p0, .u64 p1",
            SHARED,
        )
        data = np.arange(256, dtype=np.uint16) * 7
        out = np.zeros(256, np.uint16)
        ptx.launch(text, "k", 1, 32, [data, out])
        assert (out == data).all()


def test_movmatrix_transposes():
    text = kernel(
        f"""{FILL} {ZERO} ldmatrix.sync.aligned.m8n8.x1.shared.b16 {REGS[1]}, [%r5];
        movmatrix.sync.aligned.m8n8.trans.b16 %r20, %r20; {STORE}""",
        ".u64 p0, .u64 p1", SHARED,
    )  # fmt: skip
    data = np.arange(256, dtype=np.uint16)
    out = np.zeros((32, 4), np.uint32)
    ptx.launch(text, "k", 1, 32, [data, out])
    assert (out == expected_ldmatrix(data, 1, True)).all()


# name -> (depth, element type, accumulator, registers of A and B)
MMA = {
    "m16n8k16.row.col.f32.bf16.bf16.f32": (16, "bf16", "f32", 4, 2),
    "m16n8k16.row.col.f32.f16.f16.f32": (16, "f16", "f32", 4, 2),
    "m16n8k16.row.col.f16.f16.f16.f16": (16, "f16", "f16", 4, 2),
    "m16n8k8.row.col.f32.bf16.bf16.f32": (8, "bf16", "f32", 2, 1),
    "m16n8k8.row.col.f32.f16.f16.f32": (8, "f16", "f32", 2, 1),
    "m16n8k8.row.col.f32.tf32.tf32.f32": (8, "tf32", "f32", 4, 2),
    "m16n8k4.row.col.f32.tf32.tf32.f32": (4, "tf32", "f32", 2, 1),
}


def fragments(
    a: np.ndarray, b: np.ndarray, kind: str, na: int, nb: int
) -> tuple[np.ndarray, np.ndarray]:
    """Registers of A (16, k) and B (k, 8) for each lane, by the manual's figures."""
    lanes_a, lanes_b = np.zeros((32, na), np.uint32), np.zeros((32, nb), np.uint32)
    for lane in range(32):
        g, q = divmod(lane, 4)
        for i in range(na):
            row = g + 8 * (i % 2)
            if kind == "tf32":
                lanes_a[lane, i] = a[row, q + 4 * (i // 2)].astype(np.float32).view(np.uint32)
            else:
                pair = halves(a[row, 2 * q + 8 * (i // 2) : 2 * q + 8 * (i // 2) + 2], kind)
                lanes_a[lane, i] = int(pair[1]) << 16 | int(pair[0])
        for i in range(nb):
            if kind == "tf32":
                lanes_b[lane, i] = b[q + 4 * i, g].astype(np.float32).view(np.uint32)
            else:
                pair = halves(b[2 * q + 8 * i : 2 * q + 8 * i + 2, g], kind)
                lanes_b[lane, i] = int(pair[1]) << 16 | int(pair[0])
    return lanes_a, lanes_b


def halves(x: np.ndarray, kind: str) -> np.ndarray:
    return to_bf16(x) if kind == "bf16" else x.astype(np.float16).view(np.uint16)


def mma_text(name: str, na: int, nb: int, nc: int) -> str:
    """in: per lane A, B, C words, 16 words apart; out: D words, 4 apart."""
    words = [
        *(f"%r{10 + i}" for i in range(na)),
        *(f"%r{14 + i}" for i in range(nb)),
        *(f"%r{16 + i}" for i in range(nc)),
    ]
    loads = " ".join(f"ld.global.u32 {w}, [%rd6+{4 * k}];" for k, w in enumerate(words))
    a, b, c = words[:na], words[na : na + nb], words[na + nb :]
    d = [f"%r{20 + i}" for i in range(nc)]
    lists = ", ".join("{" + ", ".join(x) + "}" for x in (d, a, b, c))
    return kernel(
        f"""shl.b32 %r5, %r1, 6; cvt.u64.u32 %rd5, %r5; add.s64 %rd6, %rd1, %rd5; {loads}
        {ZERO} mma.sync.aligned.{name} {lists};
        shr.u64 %rd5, %rd5, 2; {STORE}""",
        ".u64 p0, .u64 p1",
    )  # fmt: skip


@pytest.mark.parametrize("name", MMA)
def test_mma(name):
    depth, kind, accumulator, na, nb = MMA[name]
    rng = np.random.default_rng(3)
    a, b = rng.integers(-4, 5, (16, depth)), rng.integers(-4, 5, (depth, 8))
    c = rng.integers(-9, 10, (16, 8))
    lanes_a, lanes_b = fragments(a, b, kind, na, nb)
    nc = 4 if accumulator == "f32" else 2
    given, out = np.zeros((32, 16), np.uint32), np.zeros((32, 4), np.uint32)
    given[:, :na], given[:, na : na + nb] = lanes_a, lanes_b
    place = [
        (lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2) for lane in range(32) for i in range(4)
    ]
    values = np.array([c[p] for p in place]).reshape(32, 4)
    if accumulator == "f32":
        given[:, na + nb : na + nb + 4] = values.astype(np.float32).view(np.uint32)
    else:
        given[:, na + nb : na + nb + 2] = values.astype(np.float16).view(np.uint32)
    ptx.launch(mma_text(name, na, nb, nc), "k", 1, 32, [given, out])
    got = (
        out.view(np.float32)
        if accumulator == "f32"
        else np.ascontiguousarray(out[:, :2]).view(np.float16)
    )
    assert (got.reshape(-1) == np.array([(a @ b + c)[p] for p in place])).all()


def test_tf32_operands_lose_their_low_bits():
    text = mma_text("m16n8k4.row.col.f32.tf32.tf32.f32", 2, 1, 4)
    given, out = np.zeros((32, 16), np.uint32), np.zeros((32, 4), np.uint32)
    given[:, :2] = np.float32(1 + 2.0**-11).view(np.uint32)
    given[:, 2] = np.float32(1).view(np.uint32)
    ptx.launch(text, "k", 1, 32, [given, out])
    assert (out.view(np.float32) == 4).all()


MATRIX_BODY = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20,%r21,%r22,%r23}, [%r5];"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ldmatrix_must_be_executed_by_the_whole_warp(schedule):
    bad = FILL + "setp.eq.u32 %p1, %r1, 7; @%p1 ret;" + MATRIX_BODY
    found = find(
        kernel(bad, declarations=SHARED),
        1,
        32,
        [np.zeros(256, np.uint16)],
        "warp-divergence",
        schedule=schedule,
    )
    assert "lane 7 has exited" in str(found)
    good = FILL + MATRIX_BODY
    ptx.launch(
        kernel(good, declarations=SHARED), "k", 1, 32, [np.zeros(256, np.uint16)], schedule=schedule
    )


def test_ldmatrix_needs_32_threads():
    found = find(
        kernel(FILL + MATRIX_BODY, declarations=SHARED),
        1,
        16,
        [np.zeros(256, np.uint16)],
        "warp-divergence",
    )
    assert "lane 16 does not exist" in str(found)


def test_ldmatrix_rows_are_checked():
    moved = FILL + "add.u32 %r5, %r5, BY;" + MATRIX_BODY
    data = [np.zeros(256, np.uint16)]
    found = find(kernel(moved.replace("BY", "8"), declarations=SHARED), 1, 32, data, "misaligned")
    assert found.space == "shared"
    found = find(
        kernel(moved.replace("BY", "16"), declarations=SHARED), 1, 32, data, "out-of-bounds"
    )
    assert (found.name, found.offset, found.place.thread) == ("tile", 512, (31, 0, 0))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ldmatrix_needs_a_barrier_after_the_writes(schedule):
    bad = FILL.replace("bar.sync 0;", "") + MATRIX_BODY
    found = find(
        kernel(bad, declarations=SHARED),
        1,
        32,
        [np.zeros(256, np.uint16)],
        "race",
        schedule=schedule,
    )
    assert found.other is not None
    assert found.other.thread != found.place.thread


def test_bank_conflicts_of_ldmatrix():
    """Rows of 16 bytes side by side have no conflicts; 64 bytes apart, four rows share banks."""
    wide = SHARED.replace("512", "2048")
    fill = (
        "mov.u32 %r4, tile; shl.b32 %r5, %r1, {shift}; add.u32 %r5, %r4, %r5; mov.u32 %r10, 0; "
        "st.shared.v4.u32 [%r5], {{%r10,%r10,%r10,%r10}}; bar.sync 0;"
    )
    for shift, degree in ((4, 1), (5, 2), (6, 4)):
        text = kernel(fill.format(shift=shift) + MATRIX_BODY, declarations=wide)
        result = ptx.launch(text, "k", 1, 32, [None], traffic=True)
        load = next(t for t in result.traffic if t.instruction.parts[0] == "ldmatrix")
        assert (load.requests, load.ideal, load.transactions, load.worst) == (
            1,
            4,
            4 * degree,
            degree,
        )
