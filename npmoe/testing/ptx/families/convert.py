"""cvt between every pair of types that the other families know."""

from __future__ import annotations

from collections.abc import Callable

from npmoe.testing.ptx.context import Context
from npmoe.testing.ptx.families.floating import HALVES, MODES, flag, rounding
from npmoe.testing.ptx.scalar_types import size_of, value_type
from npmoe.testing.ptx.syntax import Instruction

__all__ = ["HANDLERS"]

INTEGER_MODES = {"rni": "RN", "rzi": "RZ", "rmi": "RM", "rpi": "RP"}
KNOWN = {*MODES, *INTEGER_MODES, "ftz", "sat", "relu", "satfinite"}
FLOATS = {"f32", "f64"}


def _emit_cvt(c: Context, i: Instruction) -> str:
    """``cvt{.mode}{.ftz}{.sat}.to.from``."""
    to, source = i.parts[-2], i.parts[-1]
    modifiers = i.parts[1:-2]
    if unknown := [m for m in modifiers if m not in KNOWN]:
        raise c.unsupported(f"modifier .{unknown[0]}")
    if to in {"f16x2", "bf16x2"} and source == "f32" and len(i.operands) == 3:
        low = _to_half(i, to, f"(f64){c.value(i.operands[2], 'f32')}", modifiers)
        high = _to_half(i, to, f"(f64){c.value(i.operands[1], 'f32')}", modifiers)
        return c.assign(i.operands[0], "b32", f"pair({low}, {high})")
    if to == "tf32":
        if (
            source != "f32"
            or ("rna" not in modifiers and "rn" not in modifiers)
            or "relu" in modifiers
        ):
            raise c.unsupported()
        mode = "RNA" if "rna" in modifiers else "RN"
        value = f"bits<u32>(encode_tf32({c.value(i.operands[1], 'f32')}, {mode}))"
        return c.assign(i.operands[0], "b32", value)
    kinds = {*FLOATS, "f16", "bf16", *(f"{s}{w}" for s in "us" for w in (8, 16, 32, 64))}
    if to not in kinds or source not in kinds or "satfinite" in modifiers:
        raise c.unsupported()
    if to in FLOATS:
        return c.assign(i.operands[0], to, _to_float(c, i, to, source, modifiers))
    if to in HALVES:
        value = f"(f64)({_as_float(c, i, source, modifiers)})"
        whole = next((INTEGER_MODES[m] for m in modifiers if m in INTEGER_MODES), None)
        if whole:
            value = f"round_integer({value}, {whole})"
        return c.assign(i.operands[0], "b16", _to_half(i, to, value, modifiers))
    return c.assign(i.operands[0], to, _to_integer(c, i, to, source, modifiers))


def _to_half(i: Instruction, to: str, value: str, modifiers: list[str]) -> str:
    """Give a double as the bits of a half type."""
    half = HALVES[to]
    sat, relu = flag("sat" in modifiers), flag("relu" in modifiers)
    return f"hfinish<{half}, false, {sat}, {relu}>({half}::encode({value}, {rounding(i.parts)}))"


def _as_float(c: Context, i: Instruction, source: str, modifiers: list[str]) -> str:
    """Give a source of any type as f32 or f64 that holds it exactly (64 bit integers: rounded)."""
    if source in FLOATS:
        ftz = flag("ftz" in modifiers and source == "f32")
        return f"flush<{ftz}>({c.value(i.operands[1], source)})"
    if source in HALVES:
        return f"{HALVES[source]}::value({c.value(i.operands[1], 'b16')})"
    return f"(f64)({c.value(i.operands[1], source)})"


def _to_float(c: Context, i: Instruction, to: str, source: str, modifiers: list[str]) -> str:
    """Give a value as f32 or f64."""
    ftz, sat = flag("ftz" in modifiers and to == "f32"), flag("sat" in modifiers)
    if source in FLOATS or source in HALVES:
        value = _as_float(c, i, source, modifiers)
        mode = next((m for m in modifiers if m in INTEGER_MODES), None)
        if mode:
            value = f"round_integer((f64)({value}), {INTEGER_MODES[mode]})"
        if to == "f32" and source == "f64":
            value = f"f64_to_f32({value}, {rounding(i.parts)})"
        return f"finish<{to}, {ftz}, {sat}>(({to})({value}))"
    unsigned = flag(source[0] == "u")
    wide = "u64" if source[0] == "u" else "s64"
    value = (
        f"integer_to_{to}((s64)({wide})({c.value(i.operands[1], source)}), {unsigned}, "
        f"{rounding(i.parts)})"
    )
    return f"finish<{to}, false, {sat}>({value})"


def _to_integer(c: Context, i: Instruction, to: str, source: str, modifiers: list[str]) -> str:
    """Give a value as an integer: floats are clamped, integers wrap unless ``.sat``."""
    if source in FLOATS or source in HALVES:
        mode = next((INTEGER_MODES[m] for m in modifiers if m in INTEGER_MODES), "RZ")
        value = _as_float(c, i, source, modifiers)
        return f"to_integer<{value_type(to)}, {flag(source == 'f64')}>((f64)({value}), {mode})"
    value = c.value(i.operands[1], source)
    if "sat" in modifiers:
        return f"clamp_integer<{value_type(to)}>({value})"
    # A wider destination is filled by the sign of the source, not of the destination.
    widen = value_type(source) if size_of(to) > size_of(source) else value_type(to)
    return f"({value_type(to)})({widen})({value})"


HANDLERS: dict[str, Callable[[Context, Instruction], str]] = {"cvt": _emit_cvt}
