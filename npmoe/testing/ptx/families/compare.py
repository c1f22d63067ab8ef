"""setp, set, selp, slct."""

from __future__ import annotations

from collections.abc import Callable

from npmoe.testing.ptx.context import Context
from npmoe.testing.ptx.families.floating import HALVES, flag
from npmoe.testing.ptx.scalar_types import is_float
from npmoe.testing.ptx.syntax import Instruction

__all__ = ["HANDLERS"]

ORDERED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
UNSIGNED = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
UNORDERED = {"equ": "==", "neu": "!=", "ltu": "<", "leu": "<=", "gtu": ">", "geu": ">="}
JOIN = {"and": "&&", "or": "||", "xor": "!="}


def _compare(c: Context, i: Instruction, test: str, kind: str, half: str = "") -> str:
    """Give the comparison of the first two sources as a C++ bool; `half` of a packed pair."""
    halves = HALVES.get(kind)
    ftz = flag("ftz" in i.parts)
    if halves:
        sources = [c.value(o, "b32" if half else "b16") for o in i.operands[1:3]]
        if half:
            sources = [f"{half}_half({v})" for v in sources]
        a, b = (f"{halves}::value(hflush<{halves}, {ftz}>({v}))" for v in sources)
    elif is_float(kind):
        a, b = (f"flush<{ftz}>({c.value(o, kind)})" for o in i.operands[1:3])
    else:
        if test in UNSIGNED:
            kind = "u" + kind[1:]
        a, b = (f"({c.value(o, kind)})" for o in i.operands[1:3])
    nan = f"({a} != {a} || {b} != {b})"
    if test in ORDERED or test in UNSIGNED:
        # The C++ != is true for NaN; PTX ne is not.
        extra = f" && !{nan}" if test == "ne" and (halves or is_float(kind)) else ""
        return f"({a} {ORDERED.get(test) or UNSIGNED[test]} {b}{extra})"
    if test in UNORDERED:
        return f"({a} {UNORDERED[test]} {b} || {nan})"
    if test in {"num", "nan"}:
        return nan if test == "nan" else f"!{nan}"
    raise c.unsupported(f"comparison .{test}")


def _tests(c: Context, i: Instruction, kinds: int) -> tuple[str, str | None]:
    """Give the comparison and the operation that joins it to a predicate."""
    middle = [p for p in i.parts[1:-kinds] if p != "ftz"]
    if not middle or len(middle) > 2 or (len(middle) == 2 and middle[1] not in JOIN):
        raise c.unsupported()
    return middle[0], middle[1] if len(middle) == 2 else None


def _emit_setp(c: Context, i: Instruction) -> str:
    """``setp.lt{.and}.s32 p{|q}, a, b{, {!}c}``; of packed pairs q is about the upper half."""
    test, join = _tests(c, i, 1)
    first, second = c.pair(i.operands[0])
    kind = i.parts[-1]
    if kind.endswith("x2"):
        out = f"bool x_ = {_compare(c, i, test, kind, 'low')}; "
        out += f"bool y_ = {_compare(c, i, test, kind, 'high')}; "
    else:
        out = f"bool x_ = {_compare(c, i, test, kind)}; bool y_ = !x_; "
    values = "x_", "y_"
    if join:
        out += f"bool c_ = {c.value(i.operands[3], 'pred')}; "
        values = f"(x_ {JOIN[join]} c_)", f"(y_ {JOIN[join]} c_)"
    out += c.assign(first, "pred", values[0])
    if second is not None:
        out += " " + c.assign(second, "pred", values[1])
    return f"{{ {out} }}"


def _emit_set(c: Context, i: Instruction) -> str:
    """``set.lt.u32.f32``: all ones, or 1.0 of a floating-point result, where it holds."""
    test, join = _tests(c, i, 2)
    to, kind = i.parts[-2:]
    joined = f" {JOIN[join]} {c.value(i.operands[3], 'pred')}" if join else ""
    if kind.endswith("x2"):
        if to not in HALVES and to != "u32":
            raise c.unsupported()
        one = f"(u16){HALVES[to]}::ONE" if to in HALVES else "(u16)0xffff"
        low, high = (
            f"(({_compare(c, i, test, kind, half)}{joined}) ? {one} : (u16)0)"
            for half in ("low", "high")
        )
        return c.assign(i.operands[0], "b32", f"pair({low}, {high})")
    value = f"({_compare(c, i, test, kind)}{joined})"
    if to in {"f16", "bf16"}:
        return c.assign(i.operands[0], "b16", f"{value} ? (u16){HALVES[to]}::ONE : (u16)0")
    if to == "f32":
        return c.assign(i.operands[0], to, f"{value} ? 1.0f : 0.0f")
    if to not in {"u32", "s32"}:
        raise c.unsupported()
    return c.assign(i.operands[0], "u32", f"{value} ? ~0u : 0u")


def _emit_selp(c: Context, i: Instruction) -> str:
    """``selp.b32 d, a, b, p``."""
    kind = i.parts[-1]
    kind = "b16" if kind in {"f16", "bf16"} else kind
    a, b = (c.value(o, kind) for o in i.operands[1:3])
    return c.assign(i.operands[0], kind, f"{c.value(i.operands[3], 'pred')} ? {a} : {b}")


def _emit_slct(c: Context, i: Instruction) -> str:
    """``slct.b32.s32 d, a, b, c``: a where c >= 0."""
    kind, test = i.parts[-2:]
    a, b = (c.value(o, kind) for o in i.operands[1:3])
    value = c.value(i.operands[3], test)
    if test == "f32":
        value = f"flush<{flag('ftz' in i.parts)}>({value})"
    return c.assign(i.operands[0], kind, f"{value} >= 0 ? {a} : {b}")


HANDLERS: dict[str, Callable[[Context, Instruction], str]] = {
    "setp": _emit_setp,
    "set": _emit_set,
    "selp": _emit_selp,
    "slct": _emit_slct,
}
