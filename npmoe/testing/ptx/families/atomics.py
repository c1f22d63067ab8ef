"""atom, red, membar, fence."""

from __future__ import annotations

from collections.abc import Callable

from npmoe.testing.ptx.context import Context
from npmoe.testing.ptx.families.data import access_flags
from npmoe.testing.ptx.scalar_types import value_type
from npmoe.testing.ptx.syntax import Instruction

__all__ = ["HANDLERS"]

OPERATIONS = {
    "min": "AtomMin", "max": "AtomMax", "and": "AtomAnd", "or": "AtomOr", "xor": "AtomXor",
    "exch": "AtomExch", "cas": "AtomCas", "inc": "AtomInc", "dec": "AtomDec",
}  # fmt: skip
ADD = {
    "f32": "AtomFloatAdd", "f64": "AtomFloatAdd",
    "f16": "AtomHalfAdd<Half>", "bf16": "AtomHalfAdd<Bf16>",
    "f16x2": "AtomPairAdd<Half>", "bf16x2": "AtomPairAdd<Bf16>",
}  # fmt: skip
KNOWN = {"relaxed", "acquire", "release", "acq_rel", "cta", "gpu", "sys", "noftz"}


def _emit_atom(c: Context, i: Instruction) -> str:
    """``atom{.order}{.scope}{.space}.op.type d, [a], b{, c}`` and ``red``, which has no d."""
    kind = i.parts[-1]
    operation = next((p for p in i.parts[1:-1] if p == "add" or p in OPERATIONS), None)
    for part in i.parts[1:-1]:
        name = part.partition("::")[0]
        if part != operation and part not in KNOWN and name not in {"global", "shared"}:
            raise c.unsupported(f"modifier .{part}")
    integers = {"u32", "s32", "u64", "s64", "b32", "b64", "b16"}
    if operation is None or (kind not in integers and (operation != "add" or kind not in ADD)):
        raise c.unsupported()
    function = ADD.get(kind, "AtomAdd") if operation == "add" else OPERATIONS[operation]
    at = 0 if i.parts[0] == "red" else 1
    cpp = value_type(kind)
    b = c.value(i.operands[at + 1], kind)
    extra = c.value(i.operands[at + 2], kind) if operation == "cas" else f"({cpp})0"
    order = access_flags(i, "WRITE | RMW | STRONG")
    call = (
        f"atomic<{cpp}, {function}>(T, {c.space()}, {c.address(i.operands[at])}, {b}, {extra}, "
        f"{c.site}, {order})"
    )
    done = c.assign(i.operands[0], kind, call) if at else f"{call};"
    return f"{c.preempt()} {done}"


def _emit_fence(c: Context, i: Instruction) -> str:
    """``membar.gl``, ``fence.acq_rel.gpu``; proxies are not modelled."""
    parts = i.parts[1:]
    if not set(parts) <= {"cta", "gl", "gpu", "sys", "sc", "acq_rel", "acquire", "release"}:
        raise c.unsupported()
    return f"fence(T, {c.site}, {'true' if 'cta' in parts else 'false'});"


HANDLERS: dict[str, Callable[[Context, Instruction], str]] = {
    "atom": _emit_atom,
    "red": _emit_atom,
    "membar": _emit_fence,
    "fence": _emit_fence,
}
