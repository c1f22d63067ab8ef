"""ldmatrix, stmatrix, movmatrix, mma.sync and cp.async."""

from __future__ import annotations

from collections.abc import Callable

from npmoe.testing.ptx.context import Context
from npmoe.testing.ptx.families.warp import collective
from npmoe.testing.ptx.syntax import Instruction, Register

__all__ = ["HANDLERS"]

TRANSPOSED = 8
TYPES = {"f16": 0x100, "bf16": 0x200, "tf32": 0x400}
F16_ACCUMULATE = 0x800
# shape -> (k, types); registers of A and B follow from them.
SHAPES = {
    "m16n8k16": (16, {"f16", "bf16"}),
    "m16n8k8": (8, {"f16", "bf16", "tf32"}),
    "m16n8k4": (4, {"tf32"}),
}
ALL = "~0u"


def _matrix_form(c: Context, i: Instruction) -> tuple[int, int]:
    """Give the number of 8 by 8 matrices, and the form word."""
    if "m8n8" not in i.parts or i.parts[-1] != "b16" or "cluster" in i.opcode:
        raise c.unsupported()
    count = next((int(p[1]) for p in i.parts if p in {"x1", "x2", "x4"}), 0)
    if not count:
        raise c.unsupported()
    return count, count | (TRANSPOSED if "trans" in i.parts else 0)


def _emit_ldmatrix(c: Context, i: Instruction) -> str:
    """``ldmatrix.sync.aligned.m8n8.x4{.trans}.shared.b16 {r...}, [a]``."""
    count, form = _matrix_form(c, i)
    address = c.address(i.operands[1])
    out = c.preempt() + " "
    out += collective(
        c, "LDMATRIX", [f"(u32)({address})", f"(u32)(({address}) >> 32)"], ALL, form, aligned=True
    )
    targets = c.pieces(i.operands[0])
    if len(targets) != count:
        raise c.unsupported()
    return out + " " + " ".join(c.assign(t, "b32", f"T.out[{k}]") for k, t in enumerate(targets))


def _emit_stmatrix(c: Context, i: Instruction) -> str:
    """``stmatrix.sync.aligned.m8n8.x4{.trans}.shared.b16 [a], {r...}``."""
    _, form = _matrix_form(c, i)
    address = c.address(i.operands[0])
    values = [c.value(o, "b32") for o in c.pieces(i.operands[1])]
    inputs = [f"(u32)({address})", f"(u32)(({address}) >> 32)", *values]
    return c.preempt() + " " + collective(c, "STMATRIX", inputs, ALL, form, aligned=True)


def _emit_movmatrix(c: Context, i: Instruction) -> str:
    """``movmatrix.sync.aligned.m8n8.trans.b16 d, a``."""
    out = collective(c, "MOVMATRIX", [c.value(i.operands[1], "b32")], ALL, aligned=True)
    return f"{out} {c.assign(i.operands[0], 'b32', 'T.out[0]')}"


def _emit_mma(c: Context, i: Instruction) -> str:
    """``mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 d, a, b, c``."""
    parts = i.parts
    if parts[1:3] != ["sync", "aligned"] or parts[3] not in SHAPES or parts[4:6] != ["row", "col"]:
        raise c.unsupported()
    depth, types = SHAPES[parts[3]]
    d, a, b, accumulate = parts[-4:]
    if len(parts) != 10 or a != b or a not in types or d != accumulate or d not in {"f32", "f16"}:
        raise c.unsupported()
    if d == "f16" and a != "f16":
        raise c.unsupported()
    registers = [[c.value(o, "b32") for o in c.pieces(operand)] for operand in i.operands[1:]]
    per_a = depth // 2 if a == "tf32" else depth // 4
    wanted = [per_a, per_a // 2, 4 if d == "f32" else 2]
    if [len(r) for r in registers] != wanted:
        raise c.unsupported("the number of registers does not fit the shape")
    slots = {0: registers[0], 4: registers[1], 6: registers[2]}
    puts = " ".join(f"T.in[{at + k}] = {v};" for at, vs in slots.items() for k, v in enumerate(vs))
    form = depth | TYPES[a] | (F16_ACCUMULATE if d == "f16" else 0)
    out = f"{puts} {collective(c, 'MMA', [], ALL, form, aligned=True)}"
    targets = c.pieces(i.operands[0])
    return out + " " + " ".join(c.assign(t, "b32", f"T.out[{k}]") for k, t in enumerate(targets))


def _emit_cp(c: Context, i: Instruction) -> str:
    """``cp.async``: the copy, ``commit_group``, ``wait_group`` and ``wait_all``."""
    parts = i.parts
    if parts[1:] == ["async", "commit_group"]:
        return "async_commit(T);"
    if parts[1:] == ["async", "wait_group"]:
        return f"async_wait(T, {c.value(i.operands[0], 'u32')}, false);"
    if parts[1:] == ["async", "wait_all"]:
        return "async_wait(T, 0, true);"
    if parts[1] != "async" or parts[2] not in {"ca", "cg"} or not {"global"} & set(parts):
        raise c.unsupported()
    size = c.value(i.operands[2], "u32")
    source_size = size
    extra = list(i.operands[3:])
    if any(p == "L2::cache_hint" for p in parts):
        extra.pop()
    if extra and isinstance(extra[0], Register) and c.f.registers.get(extra[0].name) == "pred":
        source_size = f"({c.value(extra[0], 'pred')} ? 0u : {size})"
    elif extra:
        source_size = c.value(extra[0], "u32")
    to, source = c.address(i.operands[0]), c.address(i.operands[1])
    return f"{c.preempt()} async_copy(T, (u32)({to}), {source}, {size}, {source_size}, {c.site});"


HANDLERS: dict[str, Callable[[Context, Instruction], str]] = {
    "ldmatrix": _emit_ldmatrix,
    "stmatrix": _emit_stmatrix,
    "movmatrix": _emit_movmatrix,
    "mma": _emit_mma,
    "cp": _emit_cp,
}
