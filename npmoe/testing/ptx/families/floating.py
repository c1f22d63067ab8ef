"""f32 and f64 arithmetic, the half types, and the names that integers share with them."""

from __future__ import annotations

from collections.abc import Callable

from npmoe.testing.ptx.context import Context
from npmoe.testing.ptx.families.integer import emit_integer
from npmoe.testing.ptx.syntax import Instruction

__all__ = ["HANDLERS", "rounding"]

MODES = {"rn": "RN", "rz": "RZ", "rm": "RM", "rp": "RP", "rna": "RNA"}
HALVES = {"f16": "Half", "f16x2": "Half", "bf16": "Bf16", "bf16x2": "Bf16"}
FUNCTIONS = {
    "ex2": "FN_EX2", "lg2": "FN_LG2", "sin": "FN_SIN", "cos": "FN_COS",
    "tanh": "FN_TANH", "rsqrt": "FN_RSQRT",
}  # fmt: skip
TESTS = {
    "finite": "T_FINITE", "infinite": "T_INFINITE", "number": "T_NUMBER",
    "notanumber": "T_NOTANUMBER", "normal": "T_NORMAL", "subnormal": "T_SUBNORMAL",
}  # fmt: skip


def rounding(parts: list[str]) -> str:
    """Give the rounding mode named in an opcode; to nearest even where there is none."""
    return next((MODES[p] for p in parts if p in MODES), "RN")


def flag(value: bool) -> str:
    """Give a C++ bool."""
    return "true" if value else "false"


def check_modifiers(c: Context, known: set[str]) -> None:
    """Raise for a modifier that the family does not know."""
    for part in c.i.parts[1:-1]:
        if part not in known:
            raise c.unsupported(f"modifier .{part}")


def _emit_arithmetic(c: Context, i: Instruction) -> str:
    """``add``, ``sub``, ``mul``, ``fma`` and ``mad`` of any type."""
    parts, kind = i.parts, i.parts[-1]
    if kind in HALVES:
        return _emit_half(c, i)
    if kind not in {"f32", "f64"}:
        return emit_integer(c, i)
    check_modifiers(c, {"rn", "rz", "rm", "rp", "ftz", "sat"})
    name = "fma" if parts[0] == "mad" else parts[0]
    call = f"f{name}<{kind}, {rounding(parts)}, {flag('ftz' in parts)}, {flag('sat' in parts)}>"
    return c.assign(i.operands[0], kind, f"{call}({c.values(i.operands[1:], kind)})")


def _emit_half(c: Context, i: Instruction) -> str:
    """Arithmetic of f16 and bf16, one or two in a register."""
    parts, kind = i.parts, i.parts[-1]
    check_modifiers(c, {"rn", "ftz", "sat", "relu", "NaN", "noftz"})
    name, half = parts[0], HALVES[kind]
    ftz, sat, relu = (flag(p in parts) for p in ("ftz", "sat", "relu"))
    if name in {"neg", "abs"}:
        call = f"h{name}"
    elif name in {"min", "max"}:
        call = f"h{name}<{half}, {ftz}, {flag('NaN' in parts)}>"
    else:
        call = f"h{'fma' if name == 'mad' else name}<{half}, {ftz}, {sat}, {relu}>"
    sources = [c.value(o, "b32" if kind.endswith("x2") else "b16") for o in i.operands[1:]]
    if not kind.endswith("x2"):
        return c.assign(i.operands[0], "b16", f"{call}({', '.join(sources)})")
    low = ", ".join(f"low_half({s})" for s in sources)
    high = ", ".join(f"high_half({s})" for s in sources)
    return c.assign(i.operands[0], "b32", f"pair({call}({low}), {call}({high}))")


def _emit_extremum(c: Context, i: Instruction) -> str:
    """``min`` and ``max``, with two or three operands."""
    parts, kind = i.parts, i.parts[-1]
    if kind in HALVES:
        return _emit_half(c, i)
    if kind not in {"f32", "f64"}:
        return emit_integer(c, i)
    check_modifiers(c, {"ftz", "NaN"})
    call = f"f{parts[0]}_<{kind}, {flag('ftz' in parts)}, {flag('NaN' in parts)}, false>"
    values = [c.value(o, kind) for o in i.operands[1:]]
    out = f"{call}({values[0]}, {values[1]})"
    if len(values) == 3:
        out = f"{call}({out}, {values[2]})"
    return c.assign(i.operands[0], kind, out)


def _emit_sign(c: Context, i: Instruction) -> str:
    """``neg`` and ``abs``."""
    parts, kind = i.parts, i.parts[-1]
    if kind in HALVES:
        return _emit_half(c, i)
    if kind not in {"f32", "f64"}:
        return emit_integer(c, i)
    check_modifiers(c, {"ftz"})
    helper = "fneg" if parts[0] == "neg" else "fabs_"
    value = f"flush<{flag('ftz' in parts)}>({c.value(i.operands[1], kind)})"
    return c.assign(i.operands[0], kind, f"{helper}({value})")


def _emit_divide(c: Context, i: Instruction) -> str:
    """``div`` of any type; ``.approx`` and ``.full`` of f32."""
    parts, kind = i.parts, i.parts[-1]
    if kind not in {"f32", "f64"}:
        return emit_integer(c, i)
    check_modifiers(c, {"rn", "rz", "rm", "rp", "ftz", "approx", "full"})
    ftz, args = flag("ftz" in parts), c.values(i.operands[1:], kind)
    if "approx" in parts:
        return c.assign(i.operands[0], kind, f"fdiv_approx<{ftz}>({args})")
    return c.assign(i.operands[0], kind, f"fdiv<{kind}, {rounding(parts)}, {ftz}, false>({args})")


def _emit_root(c: Context, i: Instruction) -> str:
    """``rcp`` and ``sqrt``: ``.approx`` is evaluated as ``.rn``."""
    parts, kind = i.parts, i.parts[-1]
    check_modifiers(c, {"rn", "rz", "rm", "rp", "ftz", "approx"})
    call = f"f{parts[0]}<{kind}, {rounding(parts)}, {flag('ftz' in parts)}, false>"
    return c.assign(i.operands[0], kind, f"{call}({c.value(i.operands[1], kind)})")


def _emit_function(c: Context, i: Instruction) -> str:
    """``ex2``, ``lg2``, ``sin``, ``cos``, ``tanh``, ``rsqrt``: approximate by definition."""
    parts, kind = i.parts, i.parts[-1]
    check_modifiers(c, {"ftz", "approx"})
    code = FUNCTIONS[parts[0]]
    if kind in HALVES:
        half = HALVES[kind]
        if not kind.endswith("x2"):
            return c.assign(
                i.operands[0], "b16", f"happrox<{half}>({code}, {c.value(i.operands[1], 'b16')})"
            )
        v = c.value(i.operands[1], "b32")
        out = (
            f"pair(happrox<{half}>({code}, low_half({v})), happrox<{half}>({code}, high_half({v})))"
        )
        return c.assign(i.operands[0], "b32", out)
    call = f"approx<{kind}, {flag('ftz' in parts)}>({code}, {c.value(i.operands[1], kind)})"
    return c.assign(i.operands[0], kind, call)


def _emit_copysign(c: Context, i: Instruction) -> str:
    """``copysign d, a, b``: the size of b with the sign of a."""
    kind = i.parts[-1]
    return c.assign(i.operands[0], kind, f"copysign_({c.values(i.operands[1:], kind)})")


def _emit_testp(c: Context, i: Instruction) -> str:
    """``testp.finite.f32`` and its like."""
    _, test, kind = i.parts
    return c.assign(i.operands[0], "pred", f"testp({TESTS[test]}, {c.value(i.operands[1], kind)})")


HANDLERS: dict[str, Callable[[Context, Instruction], str]] = {
    **dict.fromkeys(("add", "sub", "mul", "fma", "mad"), _emit_arithmetic),
    **dict.fromkeys(("min", "max"), _emit_extremum),
    **dict.fromkeys(("neg", "abs"), _emit_sign),
    **dict.fromkeys(("rcp", "sqrt"), _emit_root),
    **dict.fromkeys(FUNCTIONS, _emit_function),
    "div": _emit_divide,
    "copysign": _emit_copysign,
    "testp": _emit_testp,
}
