"""mov, ld, st, cvta, isspacep, prefetch: data without arithmetic."""

from __future__ import annotations

from collections.abc import Callable

from npmoe.testing.ptx.context import Context
from npmoe.testing.ptx.scalar_types import is_float, register_type, size_of, value_type
from npmoe.testing.ptx.syntax import Address, Instruction, Operand, Register, Symbol, Vector

__all__ = ["HANDLERS", "access_flags"]

ORDERS = {
    "weak": "", "volatile": "STRONG", "relaxed": "STRONG", "mmio": "STRONG",
    "acquire": "STRONG | ACQUIRE", "release": "STRONG | RELEASE", "acq_rel": "STRONG | ACQUIRE | "
                                                                             "RELEASE",
}  # fmt: skip
SCOPES = {"cta", "gpu", "sys"}
CACHES = {"ca", "cg", "cs", "lu", "cv", "nc", "wb", "wt"}
SLOTS = {"shared": "SHARED_SLOT", "local": "LOCAL_SLOT", "param": "PARAM_SLOT"}


def access_flags(i: Instruction, kind: str) -> str:
    """Give the C++ Access of an instruction: read or write, its order and its scope."""
    out = [kind]
    for part in i.parts[1:]:
        if ORDERS.get(part):
            out.append(ORDERS[part])
    if "cta" in i.parts:
        out.append("CTA_SCOPE")
    return " | ".join(out)


def _check_modifiers(c: Context, i: Instruction) -> int:
    """Raise for modifiers that would change what is done; the number of elements of a vector."""
    count = 1
    for part in i.parts[1:-1]:
        name = part.partition("::")[0]
        if part in {"v2", "v4", "v8"}:
            count = int(part[1])
        elif not (
            part in ORDERS or part in SCOPES or part in CACHES or part.startswith(("L1::", "L2::"))
            or name in {"global", "shared", "local", "const", "param"}
        ):  # fmt: skip
            raise c.unsupported(f"modifier .{part}")
    return count


def _own_parameter(c: Context, operand: Address) -> str | None:
    """Give the host address of a parameter or of a call area; None if it is computed."""
    if not isinstance(operand.base, Symbol):
        return None
    name = operand.base.name
    if c.f is c.functions[0] and name in c.layout.offsets:
        return f"(T.params + {c.layout.offsets[name] + operand.offset})"
    return f"(R.{c_area(c, name)} + {operand.offset})"


def c_area(c: Context, name: str) -> str:
    """Give the field that holds a ``.param`` area of the current function."""
    sizes = {v.name: v.size for v in c.f.variables.values() if v.space == "param"}
    sizes |= {p.name: p.size for p in (*c.f.parameters, *c.f.returns)}
    if name not in sizes:
        raise c.unsupported(f"the name {name}")
    member = f"a{c.order[c.f.name]}_{name.replace('@', '_s').replace('$', '_').replace('%', '_')}"
    c.fields[member] = f"[{max(sizes[name], 1)}]"
    return member


def _emit_ld(c: Context, i: Instruction) -> str:
    """``ld{.order}{.scope}{.space}{.cache}{.vector}.type d, [a]``."""
    count, kind = _check_modifiers(c, i), i.parts[-1]
    size, cpp = size_of(kind), value_type(kind)
    address = i.operands[1]
    targets = c.pieces(i.operands[0])
    if len(targets) != count or not isinstance(address, Address):
        raise c.unsupported()
    space = c.space()
    host = _own_parameter(c, address) if space == "PARAM" else None
    head = f"const u8* a_ = {host};" if host else ""
    if not host:
        order = access_flags(i, "READ")
        head = (
            f"const u8* a_ = read<{size * count}>(T, {space}, {c.address(address)}, {c.site}, "
            f"{order});"
        )
    loads = " ".join(
        c.assign(t, kind, f"get<{cpp}>(a_ + {k * size})") for k, t in enumerate(targets)
    )
    stop = "" if space in {"PARAM", "LOCAL", "CONST"} else c.preempt() + " "
    return f"{stop}{{ {head} {loads} }}"


def _emit_st(c: Context, i: Instruction) -> str:
    """``st{.order}{.scope}{.space}{.cache}{.vector}.type [a], b``."""
    count, kind = _check_modifiers(c, i), i.parts[-1]
    size, cpp = size_of(kind), value_type(kind)
    address = i.operands[0]
    sources = c.pieces(i.operands[1])
    if len(sources) != count or not isinstance(address, Address):
        raise c.unsupported()
    space = c.space()
    if space == "PARAM":
        host = _own_parameter(c, address)
        if host is None or host.startswith("(T.params"):
            raise c.unsupported("a write to a computed parameter address")
        return " ".join(
            f"put<{cpp}>({host} + {k * size}, {c.value(s, kind)});" for k, s in enumerate(sources)
        )
    puts = " ".join(
        f"put<{cpp}>(v_ + {k * size}, {c.value(s, kind)});" for k, s in enumerate(sources)
    )
    order = access_flags(i, "WRITE")
    call = f"write<{size * count}>(T, {space}, {c.address(address)}, v_, {c.site}, {order});"
    stop = "" if space == "LOCAL" else c.preempt() + " "
    return f"{stop}{{ u8 v_[{size * count}]; {puts} {call} }}"


def _emit_mov(c: Context, i: Instruction) -> str:
    """``mov``: registers, constants, addresses; packing and unpacking of vectors."""
    kind = i.parts[-1]
    target, source = i.operands
    if isinstance(source, Vector):
        return _emit_pack(c, target, source, kind)
    if isinstance(target, Vector):
        return _emit_unpack(c, target, source, kind)
    if isinstance(source, Register) and isinstance(target, Register) and _copies_doubt(c, source):
        c.checks.clear()
        flags = f"{c.defined_flag(target.name)} = {c.defined_flag(source.name)};"
        return f"{c.storage(target.name)} = {c.storage(source.name)}; {flags}"
    kind = "b16" if kind in {"f16", "bf16"} else "b32" if kind in {"f16x2", "bf16x2"} else kind
    if kind == "pred":
        return c.assign(target, "pred", c.value(source, "pred"))
    if is_float(kind):  # bits, so that NaN payloads stay
        return c.assign(
            target, f"b{8 * size_of(kind)}", f"({register_type(kind)}){c.raw(source, kind)}"
        )
    return c.assign(target, kind, c.value(source, kind))


def _copies_doubt(c: Context, source: Register) -> bool:
    """Tell whether the source may be undefined: the copy is no use of it (see definedness.py)."""
    return source.name in c.f.registers and c.is_tracked(source.name)


def _emit_pack(c: Context, target: Operand, source: Vector, kind: str) -> str:
    """``mov.b64 d, {a, b}``."""
    width, n = size_of(kind) * 8, len(source.items)
    part = width // n
    terms = [
        f"(u{width})(u{part}){c.raw(s, f'b{part}')} << {k * part}"
        for k, s in enumerate(source.items)
    ]
    return c.assign(target, kind, " | ".join(terms))


def _emit_unpack(c: Context, target: Vector, source: Operand, kind: str) -> str:
    """``mov.b64 {a, b}, d``."""
    width, n = size_of(kind) * 8, len(target.items)
    part = width // n
    out = [f"u{width} x_ = (u{width}){c.raw(source, kind)};"]
    out += [
        c.assign(t, f"b{part}", f"(u{part})(x_ >> {k * part})") for k, t in enumerate(target.items)
    ]
    return "{ " + " ".join(out) + " }"


def _emit_cvta(c: Context, i: Instruction) -> str:
    """``cvta{.to}.space``: only shared and local windows have addresses of their own."""
    space = next(
        (
            p.partition("::")[0]
            for p in i.parts[1:]
            if p.partition("::")[0] in {*SLOTS, "global", "const"}
        ),
        "",
    )
    kind = i.parts[-1]
    value = f"(u64){c.raw(i.operands[1], kind)}"
    if space in {"shared", "local"}:
        if "to" in i.parts:
            value = f"to_window(T, {value}, {SLOTS[space]}, {c.site})"
        else:
            value = f"(window({SLOTS[space]}) | ({value}))"
    return c.assign(i.operands[0], kind, value)


def _emit_isspacep(c: Context, i: Instruction) -> str:
    """``isspacep.shared p, a``."""
    space = i.parts[1].partition("::")[0]
    slot = f"((u64)({c.value(i.operands[1], 'u64')}) >> SLOT_BITS)"
    if space == "const":
        raise c.unsupported()
    test = f"{slot} == {SLOTS[space]}" if space in SLOTS else f"{slot} >= FIRST_SLOT"
    return c.assign(i.operands[0], "pred", test)


def _emit_nothing(_c: Context, _i: Instruction) -> str:
    """``prefetch``, ``nanosleep`` and other hints: nothing that can be seen."""
    return ";"


HANDLERS: dict[str, Callable[[Context, Instruction], str]] = {
    "mov": _emit_mov,
    "ld": _emit_ld,
    "ldu": _emit_ld,
    "st": _emit_st,
    "cvta": _emit_cvta,
    "isspacep": _emit_isspacep,
    **dict.fromkeys(("prefetch", "prefetchu", "nanosleep", "pmevent", "setmaxnreg"), _emit_nothing),
}
