"""What the instruction families write C++ with: operands, results, addresses, places to resume.

One `Context` serves one kernel: its entry and every device function that it calls. Registers live
in a struct for each thread, as bits; they become values where an instruction reads them as some
type.
"""

from __future__ import annotations

import re

from npmoe.testing.ptx.errors import PtxSyntaxError, PtxUnsupportedError
from npmoe.testing.ptx.initialisers import float_bits
from npmoe.testing.ptx.memory_layout import MemoryLayout
from npmoe.testing.ptx.scalar_types import is_float, register_type, size_of, value_type
from npmoe.testing.ptx.syntax import (
    Address,
    Function,
    Immediate,
    Instruction,
    Negated,
    Operand,
    Pair,
    Register,
    Symbol,
    Vector,
)

__all__ = ["Context"]

AXES = {"x": 0, "y": 1, "z": 2}
SPECIAL = {
    "%laneid": "T.lane",
    "%warpid": "T.warp",
    "%nwarpid": "((ntid(T, 0) * ntid(T, 1) * ntid(T, 2) + 31) / 32)",
    "%lanemask_eq": "(1u << T.lane)",
    "%lanemask_lt": "((1u << T.lane) - 1)",
    "%lanemask_le": "((2u << T.lane) - 1)",
    "%lanemask_gt": "~((2u << T.lane) - 1)",
    "%lanemask_ge": "~((1u << T.lane) - 1)",
    "%clock": "(u32)clock_now(T)",
    "%clock_hi": "(u32)(clock_now(T) >> 32)",
    "%clock64": "clock_now(T)",
    "%globaltimer": "clock_now(T)",
    "%smid": "0u",
    "%nsmid": "1u",
    "%gridid": "0ull",
    "%dynamic_smem_size": "T.launch->dynamic_shared",
    "WARP_SZ": "32u",
}
SPACES = ("global", "shared", "local", "const", "param")


class Context:
    """State of the translation of one kernel.

    Parameters
    ----------
    layout : MemoryLayout
        Addresses of all variables.
    functions : list of Function
        The entry first, then the device functions that it can reach.
    tracked : dict of set of str
        For each function, the registers whose definition is tested at run time.
    """

    def __init__(
        self, layout: MemoryLayout, functions: list[Function], tracked: dict[str, set[str]]
    ) -> None:
        self.layout, self.functions, self.tracked = layout, functions, tracked
        self.order = {f.name: k for k, f in enumerate(functions)}
        self.f = functions[0]
        self.i = Instruction(0, "", "", ())
        self.fields: dict[str, str] = {}
        self.register_names: list[str] = []
        self.register_numbers: dict[str, int] = {}
        self.resume_points = 0
        self.checks: list[str] = []
        self.sites: list[Instruction] = []
        self.variants: dict[str, int] = {}

    def begin(self, i: Instruction) -> None:
        """Turn to the next instruction; it gets the next number."""
        self.i = i
        self.sites.append(i)
        self.checks.clear()

    @property
    def site(self) -> int:
        """The number by which the runtime knows the current instruction, from 1."""
        return len(self.sites)

    def variant(self, name: str) -> int:
        """Give the number of an edit, from 1."""
        return self.variants.setdefault(name, len(self.variants) + 1)

    def unsupported(self, what: str = "") -> PtxUnsupportedError:
        """Give the error to raise for the current instruction."""
        return PtxUnsupportedError(
            f"translate: the instruction '{self.i.opcode}' (PTX line {self.i.line}: {self.i.text}) "
            f"is not supported{': ' + what if what else ''}. Add it to a module in "
            "npmoe/testing/ptx/families, or compile the kernel without it."
        )

    # Registers

    def storage(self, name: str) -> str:
        """Give the field of a register in the struct of the thread."""
        k = self.order[self.f.name]
        kind = self.f.registers.get(name)
        if kind is None:
            raise PtxSyntaxError(
                f"translate: register {name} at PTX line {self.i.line} is not declared."
            )
        plain = re.sub(r"\W", "_", name.replace("@", "_s"))
        member = f"k{k}{plain if plain.startswith('_') else '_' + plain}"
        self.fields[member] = "bool" if kind == "pred" else register_type(kind)
        return f"R.{member}"

    def is_tracked(self, name: str) -> bool:
        """Whether a read of the register must be tested."""
        return name in self.tracked[self.f.name]

    def defined_flag(self, name: str) -> str:
        """Give the field that says whether a tracked register was written."""
        member = "d" + self.storage(name)[2:]
        self.fields[member] = "bool"
        return f"R.{member}"

    def number_of(self, name: str) -> int:
        """Give the number under which the runtime reports a register."""
        if name not in self.register_numbers:
            self.register_numbers[name] = len(self.register_names)
            self.register_names.append(name)
        return self.register_numbers[name]

    def special(self, name: str) -> str | None:
        """Give the expression for a special register."""
        found = re.fullmatch(r"%(tid|ntid|ctaid|nctaid)\.([xyz])", name)
        if found:
            axis = AXES[found[2]]
            return f"T.tid[{axis}]" if found[1] == "tid" else f"{found[1]}(T, {axis})"
        return SPECIAL.get(name)

    # Values

    def raw(self, operand: Operand, kind: str) -> str:
        """Give the bits of an operand, as an integer expression."""
        if isinstance(operand, Register):
            special = self.special(operand.name)
            if special is not None and operand.name not in self.f.registers:
                return special
            if operand.name not in self.f.registers:
                raise self.unsupported(f"special register {operand.name}")
            if self.is_tracked(operand.name):
                flag, number = self.defined_flag(operand.name), self.number_of(operand.name)
                self.checks.append(f"if (!{flag}) stop_undefined(T, {self.site}, {number});")
            return self.storage(operand.name)
        if isinstance(operand, Immediate):
            return self.immediate(operand.text, kind)
        if isinstance(operand, Symbol):
            if operand.name in SPECIAL:
                return SPECIAL[operand.name]
            return f"{self.symbol_address(operand.name):#x}ull"
        if isinstance(operand, Address) and isinstance(operand.base, Symbol):
            return f"{self.symbol_address(operand.base.name) + operand.offset:#x}ull"
        raise self.unsupported(f"operand {operand}")

    def immediate(self, text: str, kind: str) -> str:
        """Give the bits of a constant used as `kind`."""
        if re.match(r"[+-]?0[fd]", text, re.IGNORECASE) or (
            re.search(r"[.eE]", text) and not text.lstrip("+-").lower().startswith("0x")
        ):
            wide = size_of(kind) == 8
            return f"{float_bits(text, 64 if wide else 32):#x}{'ull' if wide else 'u'}"
        value = int(text.rstrip("U"), 0)
        if is_float(kind):
            wide = kind == "f64"
            return f"{float_bits(str(value), 64 if wide else 32):#x}{'ull' if wide else 'u'}"
        return f"{value % (1 << 64):#x}ull"

    def value(self, operand: Operand, kind: str) -> str:
        """Give an operand as a C++ value of PTX type `kind`; predicates are bools."""
        if kind == "pred":
            if isinstance(operand, Negated):
                return f"!{self.value(operand.of, kind)}"
            if isinstance(operand, Immediate):
                return "true" if int(operand.text, 0) else "false"
            return self.raw(operand, kind)
        if isinstance(operand, Negated):
            return f"({value_type(kind)})-{self.value(operand.of, kind)}"
        raw = self.raw(operand, kind)
        if is_float(kind):
            return f"bits<{kind}>((u{8 * size_of(kind)}){raw})"
        return f"({value_type(kind)}){raw}"

    def values(self, operands: tuple[Operand, ...], kind: str) -> str:
        """Several operands of one type, for an argument list."""
        return ", ".join(self.value(o, kind) for o in operands)

    def assign(self, operand: Operand, kind: str, expression: str) -> str:
        """Statements that write a value of PTX type `kind` to a destination."""
        if not isinstance(operand, Register):
            raise self.unsupported(f"destination {operand}")
        if operand.name == "_":
            return f"(void)({expression});"
        target = self.storage(operand.name)
        member = self.fields[target[2:]]
        if is_float(kind):
            expression = f"bits<u{8 * size_of(kind)}>({expression})"
        cast = "" if member == "bool" else f"({member})"
        flag = (
            f" {self.defined_flag(operand.name)} = true;" if self.is_tracked(operand.name) else ""
        )
        return f"{target} = {cast}({expression});{flag}"

    def pieces(self, operand: Operand) -> tuple[Operand, ...]:
        """Give the members of a vector, or the operand alone."""
        return operand.items if isinstance(operand, Vector) else (operand,)

    def pair(self, operand: Operand) -> tuple[Operand, Operand | None]:
        """Both destinations of ``a|b``."""
        if isinstance(operand, Pair):
            return operand.first, operand.second
        return operand, None

    # Addresses

    def symbol_address(self, name: str) -> int:
        """Give the address of a variable, in its own state space."""
        found = self.layout.address(self.f, name)
        if found is None:
            raise self.unsupported(f"the name {name}")
        return found

    def address(self, operand: Operand) -> str:
        """Give the address that ``[base + offset]`` means, as u64."""
        if not isinstance(operand, Address):
            raise self.unsupported(f"address {operand}")
        if operand.base is None:
            return f"{operand.offset % (1 << 64):#x}ull"
        if isinstance(operand.base, Symbol):
            return f"{self.symbol_address(operand.base.name) + operand.offset:#x}ull"
        base = self.raw(operand.base, "u64")
        if not operand.offset:
            return f"(u64){base}"
        if self.f.registers.get(operand.base.name) in {"b32", "u32", "s32"}:
            return f"(u64)(u32)({base} + {operand.offset % (1 << 32):#x}u)"
        return f"({base} + {operand.offset % (1 << 64):#x}ull)"

    def space(self) -> str:
        """Give the state space named by the opcode: GLOBAL, SHARED, ..., GENERIC."""
        for part in self.i.parts:
            name, _, of = part.partition("::")
            if name in SPACES:
                if of == "cluster":
                    raise self.unsupported("clusters")
                return name.upper()
        return "GENERIC"

    # Places to resume

    def new_point(self) -> int:
        """Give a new resume point."""
        self.resume_points += 1
        return self.resume_points

    def preempt(self) -> str:
        """Statements that let the scheduler run another thread here."""
        p = self.new_point()
        return (
            f"if (--T.budget < 0) {{ T.pc = {p}; T.wait_site = {self.site}; return PREEMPTED; "
            f"}} P{p}:;"
        )

    def wait(self, condition: str) -> str:
        """Statements that suspend the thread until `condition` was made true by others."""
        p = self.new_point()
        return f"if (!{condition}) {{ T.pc = {p}; return WAITING; }} P{p}:;"
