"""A kernel as C++: one resumable function over a struct of registers.

A thread that must wait, or that the scheduler interrupts, stores the number of a resume point and
returns; called again, it jumps there. Calls of device functions are jumps with a stack of resume
points, so that no thread needs a stack of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from npmoe.testing.ptx.context import Context
from npmoe.testing.ptx.definedness import suspicious_registers
from npmoe.testing.ptx.errors import PtxUnsupportedError
from npmoe.testing.ptx.families import HANDLERS
from npmoe.testing.ptx.families.control import ASSERTIONS, callee_name, label_name
from npmoe.testing.ptx.memory_layout import MemoryLayout
from npmoe.testing.ptx.syntax import Function, Instruction, Label, Module

__all__ = ["KernelCode", "translate_kernel"]

# After these a new counter begins: what follows may run less often.
BLOCK_ENDS = {"bra", "brx", "call", "ret", "exit", "trap"}


@dataclass(slots=True)
class KernelCode:
    """The C++ of a kernel and what is needed to launch it and to read its counters.

    The runtime knows instructions by number: n is ``sites[n - 1]``. Of these, `instructions` are
    the original ones, each with the number of its counter in `counter_of`; those of edits are not
    counted. `variants` numbers the edits from 1.
    """

    entry: Function
    cpp: str
    layout: MemoryLayout
    sites: list[Instruction]
    instructions: tuple[Instruction, ...]
    counter_of: tuple[int, ...]
    counters: int
    register_names: list[str]
    variants: dict[str, int]


def reachable_functions(module: Module, entry: str) -> list[Function]:
    """Give the entry and the device functions it can call; raises for recursion."""
    order: list[Function] = []
    path: list[str] = []

    def visit(name: str, line: int) -> None:
        if name in path:
            raise PtxUnsupportedError(
                f"translate: the call at PTX line {line} makes {name} recursive, "
                "which is not supported."
            )
        function = module.functions[name]
        path.append(name)
        if function not in order:
            order.append(function)
        for i in function.instructions:
            callee = callee_name(i) if i.parts[0] == "call" else None
            if callee in module.functions and callee is not None:
                visit(callee, i.line)
            elif i.parts[0] == "call" and callee not in ASSERTIONS:
                what = (
                    f"calls {callee}, which has no body in this module" if callee else "is indirect"
                )
                raise PtxUnsupportedError(
                    f"translate: the call at PTX line {i.line} {what} ({i.text}). "
                    "Compile the kernel without it."
                )
        path.pop()

    visit(entry, 0)
    return order


def translate_kernel(module: Module, entry: str, number: int) -> KernelCode:
    """Write the C++ for one entry.

    Parameters
    ----------
    module : Module
    entry : str
        Name of the entry.
    number : int
        Tells the kernels of one translation unit apart.

    Returns
    -------
    KernelCode

    Raises
    ------
    PtxUnsupportedError
        For the first instruction that no family knows.
    """
    functions = reachable_functions(module, entry)
    layout = MemoryLayout(module, functions)
    c = Context(layout, functions, {f.name: suspicious_registers(f) for f in functions})
    counters: list[list[int]] = []
    body = [line for f in functions for line in _emit_function(c, f, counters)]
    cases = " ".join(f"case {p}: goto P{p};" for p in range(1, c.resume_points + 1))
    members = "\n".join(_member(name, kind) for name, kind in sorted(c.fields.items()))
    flags = " ".join(f"R.{name} = false;" for name in sorted(c.fields) if name.startswith("dk"))
    cpp = "\n".join(
        [
            f"struct Registers{number} {{\n{members}\n}};",
            f"static Status run{number}(Thread& T, void* registers, u64* N) {{",
            f"Registers{number}& R = *(Registers{number}*)registers; (void)R;",
            "dispatch: switch (T.pc) { case 0: break; " + cases,
            "default: __builtin_unreachable(); }",
            flags,
            *body,
            "return EXITED; }",
        ]
    )
    counted = sorted((site, k) for k, sites in enumerate(counters) for site in sites)
    return KernelCode(
        entry=functions[0],
        cpp=cpp,
        layout=layout,
        sites=c.sites,
        instructions=tuple(c.sites[site - 1] for site, _ in counted),
        counter_of=tuple(k for _, k in counted),
        counters=len(counters),
        register_names=c.register_names,
        variants=c.variants,
    )


def _member(name: str, kind: str) -> str:
    """One field of the struct of registers; call areas are arrays of bytes."""
    return f"alignas(16) u8 {name}{kind};" if kind[0] == "[" else f"{kind} {name};"


def _emit_function(c: Context, f: Function, counters: list[list[int]]) -> list[str]:
    """Give the statements of a function, with its counters."""
    c.f = f
    out = [f"F{c.order[f.name]}:;"]
    fresh = True
    current: list[int] = []
    for at, item in enumerate(f.body):
        if isinstance(item, Label):
            out.append(f"{label_name(c, item.name)}:;")
            fresh = True
            continue
        if fresh:
            current = []
            counters.append(current)
            out.append(f"N[{len(counters) - 1}]++;")
            fresh = False
        code = _emit_guarded(c, item, counters, current)
        for name, instead in f.edits.get(at, {}).items():
            other = " ".join(_emit_guarded(c, i, counters, None) for i in instead)
            code = f"if (T.launch->variant == {c.variant(name)}) {{ {other} }} else {{ {code} }}"
        out.append(code)
        fresh = item.parts[0] in BLOCK_ENDS
    out.append(
        "return EXITED;" if f is c.functions[0] else "T.pc = T.returns[--T.depth]; goto dispatch;"
    )
    return out


def _emit_guarded(
    c: Context, i: Instruction, counters: list[list[int]], current: list[int] | None
) -> str:
    """Give the statements of an instruction; `current` is the counter that it shares, if any."""
    code = _emit_instruction(c, i)
    if i.predicate is None:
        if current is not None:
            current.append(c.site)
        return code
    count = ""
    if current is not None:
        counters.append([c.site])
        count = f"N[{len(counters) - 1}]++; "
    test = c.value(i.predicate, "pred")
    checks = " ".join(c.checks)
    c.checks.clear()
    return f"{checks} if ({'!' if i.negated else ''}{test}) {{ {count}{code} }}"


def _emit_instruction(c: Context, i: Instruction) -> str:
    """Give the statements of an instruction without its guard."""
    c.begin(i)
    handler = HANDLERS.get(i.parts[0])
    if handler is None:
        raise c.unsupported()
    try:
        code = handler(c, i)
    except (IndexError, KeyError, ValueError) as mistake:
        raise c.unsupported(f"its form is not known ({mistake})") from mistake
    if c.checks:
        code = " ".join(dict.fromkeys(c.checks)) + " " + code
        c.checks.clear()
    return code
