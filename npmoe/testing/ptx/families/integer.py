"""Integer arithmetic, logic, shifts and bit fields."""

from __future__ import annotations

from collections.abc import Callable

from npmoe.testing.ptx.context import Context
from npmoe.testing.ptx.scalar_types import value_type
from npmoe.testing.ptx.syntax import Instruction

__all__ = ["HANDLERS", "emit_carry", "emit_integer", "is_carry"]

WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
# prmt modes: the selector for each value of c[1:0].
PRMT_MODES = {
    "f4e": (0x3210, 0x4321, 0x5432, 0x6543),
    "b4e": (0x5670, 0x6701, 0x7012, 0x0123),
    "rc8": (0x0000, 0x1111, 0x2222, 0x3333),
    "ecl": (0x3210, 0x3211, 0x3222, 0x3333),
    "ecr": (0x0000, 0x1110, 0x2210, 0x3210),
    "rc16": (0x1010, 0x3232, 0x1010, 0x3232),
}


def emit_integer(c: Context, i: Instruction) -> str:
    """``add.s32``, ``mul.wide.u32``, ``min.u64``, ``and.b32``, ...: one helper each."""
    parts = i.parts
    name, kind = parts[0], parts[-1]
    middle = set(parts[1:-1])
    operands = i.operands[1:]
    if is_carry(i):
        return emit_carry(c, i)
    helper = {
        "and": "and_",
        "or": "or_",
        "xor": "xor_",
        "not": "not_",
        "min": "min_",
        "max": "max_",
    }.get(name, name)
    helper = {"abs": "abs_", "div": "div_", "rem": "rem_"}.get(helper, helper)
    if name in {"mul", "mad"}:
        form = next((m for m in ("lo", "hi", "wide") if m in middle), "lo")
        middle.discard(form)
        helper = f"{name}_{form}"
        if form == "wide":
            return _emit_wide(c, i, helper, kind)
    if "sat" in middle:
        middle.discard("sat")
        helper += "_sat"
    if middle or kind not in INTEGER_TYPES.get(name, ANY):
        raise c.unsupported()
    if kind == "pred":
        return _emit_predicate_logic(c, i)
    args = c.values(operands, kind)
    guard = ""
    if name in {"div", "rem"}:
        guard = f"if (({c.value(operands[1], kind)}) == 0) stop_division(T, {c.site}); "
    return guard + c.assign(i.operands[0], kind, f"{helper}<{value_type(kind)}>({args})")


ANY = {"u16", "s16", "u32", "s32", "u64", "s64"}
LOGIC = {"b16", "b32", "b64", "pred"}
SIGNED = {"s16", "s32", "s64"}
INTEGER_TYPES = {
    "and": LOGIC, "or": LOGIC, "xor": LOGIC, "not": LOGIC,
    "cnot": {"b16", "b32", "b64"}, "neg": SIGNED, "abs": SIGNED,
    "add": ANY, "sub": ANY, "sad": ANY,
}  # fmt: skip


def _emit_wide(c: Context, i: Instruction, helper: str, kind: str) -> str:
    """``mul.wide`` and ``mad.wide``: the result is twice as wide."""
    if kind not in WIDE:
        raise c.unsupported()
    args = c.values(i.operands[1:3], kind)
    if helper == "mad_wide":
        args += ", " + c.value(i.operands[3], WIDE[kind])
    return c.assign(i.operands[0], WIDE[kind], f"{helper}<{kind}>({args})")


def _emit_predicate_logic(c: Context, i: Instruction) -> str:
    """``and.pred`` and its like."""
    name, values = i.parts[0], [c.value(o, "pred") for o in i.operands[1:]]
    sign = {"and": " && ", "or": " || ", "xor": " != "}
    return c.assign(
        i.operands[0], "pred", f"!{values[0]}" if name == "not" else sign[name].join(values)
    )


def is_carry(i: Instruction) -> bool:
    """Whether the instruction reads or writes the carry flag."""
    return "cc" in i.parts or i.parts[0] in {"addc", "subc", "madc"}


def emit_carry(c: Context, i: Instruction) -> str:
    """``add.cc``, ``addc``, ``mad.lo.cc``, ...: through 128 bits."""
    name, kind = i.parts[0], i.parts[-1]
    base, carry_in = name.removesuffix("c"), name in {"addc", "subc", "madc"}
    if base not in {"add", "sub", "mad"} or kind not in {"u32", "s32", "u64", "s64"}:
        raise c.unsupported()
    unsigned, width = kind.replace("s", "u"), kind[1:]
    c.fields["carry"] = "bool"
    values = [f"(u128)({c.value(o, unsigned)})" for o in i.operands[1:]]
    extra = "(u128)R.carry" if carry_in else "(u128)0"
    if base == "mad":
        form = "hi" if "hi" in i.parts else "lo"
        product = f"mul_{form}<{value_type(kind)}>({c.values(i.operands[1:3], kind)})"
        values = [f"(u128)({unsigned}){product}", values[2]]
    sign = "-" if base == "sub" else "+"
    out = f"u128 x_ = {values[0]} {sign} {values[1]} {sign} {extra}; "
    if "cc" in i.parts:
        out += f"R.carry = (x_ >> {width}) & 1; "
    return "{ " + out + c.assign(i.operands[0], unsigned, f"({unsigned})x_") + " }"


def _emit_shift(c: Context, i: Instruction) -> str:
    """``shl.b32``, ``shr.s64``: the amount is always 32 bits."""
    kind = i.parts[-1]
    args = f"{c.value(i.operands[1], kind)}, {c.value(i.operands[2], 'u32')}"
    return c.assign(i.operands[0], kind, f"{i.parts[0]}<{value_type(kind)}>({args})")


def _emit_funnel(c: Context, i: Instruction) -> str:
    """``shf.l.wrap.b32``."""
    _, side, mode, kind = i.parts
    return c.assign(i.operands[0], kind, f"shf_{side}_{mode}({c.values(i.operands[1:], 'u32')})")


def _emit_count(c: Context, i: Instruction) -> str:
    """``popc``, ``clz``: the result is 32 bits."""
    return c.assign(i.operands[0], "u32", f"{i.parts[0]}({c.value(i.operands[1], i.parts[-1])})")


def _emit_bfind(c: Context, i: Instruction) -> str:
    """``bfind{.shiftamt}.u32``."""
    kind, shift = i.parts[-1], "true" if "shiftamt" in i.parts else "false"
    value = c.value(i.operands[1], kind)
    return c.assign(i.operands[0], "u32", f"bfind<{value_type(kind)}>({value}, {shift})")


def _emit_field(c: Context, i: Instruction) -> str:
    """``bfe``, ``bfi``: positions and lengths are 32 bits."""
    kind, name = i.parts[-1], i.parts[0]
    wide = 1 if name == "bfe" else 2
    args = [c.value(o, kind if k < wide else "u32") for k, o in enumerate(i.operands[1:])]
    return c.assign(i.operands[0], kind, f"{name}<{value_type(kind)}>({', '.join(args)})")


def _emit_plain(helper: str) -> Callable[[Context, Instruction], str]:
    """Give an instruction of 32 bit operands with a helper of the same shape."""

    def emit(c: Context, i: Instruction) -> str:
        return c.assign(i.operands[0], "u32", f"{helper}({c.values(i.operands[1:], 'u32')})")

    return emit


def _emit_brev(c: Context, i: Instruction) -> str:
    """``brev.b32``."""
    kind = i.parts[-1]
    return c.assign(
        i.operands[0], kind, f"brev<{value_type(kind)}>({c.value(i.operands[1], kind)})"
    )


def _emit_prmt(c: Context, i: Instruction) -> str:
    """``prmt.b32`` with its six named modes."""
    args = c.values(i.operands[1:], "u32")
    if len(i.parts) == 2:
        return c.assign(i.operands[0], "u32", f"prmt({args})")
    table = ", ".join(map(str, PRMT_MODES[i.parts[2]]))
    call = c.assign(i.operands[0], "u32", f"prmt_mode({args}, table_)")
    return f"{{ static const u16 table_[4] = {{{table}}}; {call} }}"


def _emit_24(c: Context, i: Instruction) -> str:
    """``mul24.lo`` and ``mad24.lo``."""
    if "hi" in i.parts or i.parts[-1] != "u32":
        raise c.unsupported()
    return c.assign(i.operands[0], "u32", f"{i.parts[0]}({c.values(i.operands[1:], 'u32')})")


def _emit_dp4a(c: Context, i: Instruction) -> str:
    """``dp4a.s32.u32``."""
    signs = ", ".join("true" if p[0] == "s" else "false" for p in i.parts[1:3])
    return c.assign(i.operands[0], "u32", f"dp4a({c.values(i.operands[1:], 'u32')}, {signs})")


def _emit_szext(c: Context, i: Instruction) -> str:
    """``szext.wrap`` and ``szext.clamp``."""
    signed = "true" if i.parts[-1] == "s32" else "false"
    count = c.value(i.operands[2], "u32")
    if "wrap" in i.parts:
        count = f"({count} & 31)"
    return c.assign(
        i.operands[0], "u32", f"szext({c.value(i.operands[1], 'u32')}, {count}, {signed})"
    )


HANDLERS: dict[str, Callable[[Context, Instruction], str]] = {
    **dict.fromkeys(("div", "rem", "and", "or", "xor", "not", "cnot", "sad"), emit_integer),
    **dict.fromkeys(("addc", "subc", "madc", "mad"), emit_integer),
    **dict.fromkeys(("shl", "shr"), _emit_shift),
    **dict.fromkeys(("popc", "clz"), _emit_count),
    **dict.fromkeys(("bfe", "bfi"), _emit_field),
    **dict.fromkeys(("mul24", "mad24"), _emit_24),
    "shf": _emit_funnel,
    "bfind": _emit_bfind,
    "brev": _emit_brev,
    "prmt": _emit_prmt,
    "lop3": _emit_plain("lop3"),
    "bmsk": _emit_plain("bmsk"),
    "dp4a": _emit_dp4a,
    "szext": _emit_szext,
}
