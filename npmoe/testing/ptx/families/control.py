"""bra, brx, call, ret, exit, trap."""

from __future__ import annotations

import re
from collections.abc import Callable

from npmoe.testing.ptx.context import Context
from npmoe.testing.ptx.families.data import c_area
from npmoe.testing.ptx.scalar_types import value_type
from npmoe.testing.ptx.syntax import Function, Instruction, Label, Operand, Symbol, Vector

__all__ = ["ASSERTIONS", "HANDLERS", "callee_name", "label_name"]

# Device functions that only report a failed assertion.
ASSERTIONS = {"__assertfail", "__assert_fail"}


def label_name(c: Context, name: str) -> str:
    """Give the C++ label of a PTX label of the current function."""
    return f"L{c.order[c.f.name]}_" + re.sub(r"\W", "_", name.replace("@", "_s"))


def callee_name(i: Instruction) -> str | None:
    """Give the name of the function that a ``call`` calls; None for an indirect one."""
    return next((o.name for o in i.operands if isinstance(o, Symbol)), None)


def _goto(c: Context, i: Instruction, name: str) -> str:
    """Give a branch; backward ones ask the scheduler first, so that spinning threads give way."""
    lines = {item.name: item.line for item in c.f.body if isinstance(item, Label)}
    if name not in lines:
        raise c.unsupported(f"the label {name}")
    stop = c.preempt() + " " if lines[name] <= i.line else ""
    return f"{stop}goto {label_name(c, name)};"


def _emit_bra(c: Context, i: Instruction) -> str:
    """``bra{.uni} label``."""
    target = i.operands[0]
    if not isinstance(target, Symbol):
        raise c.unsupported()
    return _goto(c, i, target.name)


def _emit_brx(c: Context, i: Instruction) -> str:
    """``brx.idx r, table``."""
    table = i.operands[1]
    if not isinstance(table, Symbol) or table.name not in c.f.tables:
        raise c.unsupported()
    value = c.value(i.operands[0], "u32")
    cases = " ".join(f"case {k}: {_goto(c, i, t)}" for k, t in enumerate(c.f.tables[table.name]))
    return f"switch ({value}) {{ {cases} default: stop_branch(T, {c.site}, {value}); }}"


def _emit_return(c: Context, _i: Instruction) -> str:
    """``ret``: the thread ends, or the caller goes on."""
    if c.f is c.functions[0]:
        return "return EXITED;"
    return "T.pc = T.returns[--T.depth]; goto dispatch;"


def _copy_in(c: Context, callee: Function, k: int, actual: Operand) -> str:
    """Hand one argument over."""
    formal = callee.parameters[k]
    target = _field(c, callee, formal.name)
    if isinstance(actual, Symbol):
        return f"memcpy(R.{target}, R.{c_area(c, actual.name)}, {formal.size});"
    return f"put<{value_type(formal.type)}>(R.{target}, {c.value(actual, formal.type)});"


def _field(c: Context, callee: Function, name: str) -> str:
    """Give the field of a parameter of another function."""
    here, c.f = c.f, callee
    field = c_area(c, name)
    c.f = here
    return field


def _emit_call(c: Context, i: Instruction) -> str:
    """``call (results), function, (arguments)``."""
    name = callee_name(i)
    if name in ASSERTIONS:
        return f"stop_trap(T, {c.site});"
    callee = next((f for f in c.functions if f.name == name), None)
    if callee is None:
        raise c.unsupported(
            "the function has no body in this module" if name else "an indirect call"
        )
    at = next(k for k, o in enumerate(i.operands) if isinstance(o, Symbol))
    results = i.operands[0].items if at and isinstance(i.operands[0], Vector) else ()
    last = i.operands[-1]
    arguments = last.items if len(i.operands) > at + 1 and isinstance(last, Vector) else ()
    if len(arguments) != len(callee.parameters) or len(results) != len(callee.returns):
        raise c.unsupported("the arguments do not fit the function")
    out = [_copy_in(c, callee, k, a) for k, a in enumerate(arguments)]
    p = c.new_point()
    entry = f"F{c.order[callee.name]}"
    out.append(
        f"if (T.depth >= 16) stop_depth(T, {c.site}); T.returns[T.depth++] = {p}; goto {entry}; "
        f"P{p}:;"
    )
    for formal, actual in zip(callee.returns, results, strict=True):
        source = _field(c, callee, formal.name)
        if isinstance(actual, Symbol):
            out.append(f"memcpy(R.{c_area(c, actual.name)}, R.{source}, {formal.size});")
        else:
            out.append(c.assign(actual, formal.type, f"get<{value_type(formal.type)}>(R.{source})"))
    return " ".join(out)


HANDLERS: dict[str, Callable[[Context, Instruction], str]] = {
    "bra": _emit_bra,
    "brx": _emit_brx,
    "call": _emit_call,
    "ret": _emit_return,
    "exit": lambda _c, _i: "return EXITED;",
    "trap": lambda c, _i: f"stop_trap(T, {c.site});",
    "brkpt": lambda c, _i: f"stop_trap(T, {c.site});",
}
