"""Where variables lie: each alone in its own slot of the address space (see runtime/device.hpp)."""

from __future__ import annotations

from dataclasses import dataclass

from npmoe.testing.ptx.syntax import Function, Module, Variable

__all__ = ["FIRST_SLOT", "MemoryLayout", "Placed", "parameter_offsets", "slot_base"]

SLOT_BITS, WINDOW_BITS = 40, 20
SHARED_SLOT, LOCAL_SLOT, PARAM_SLOT, FIRST_SLOT = 1, 2, 3, 4
WINDOWS = {"shared": SHARED_SLOT, "local": LOCAL_SLOT}
LARGEST = 1 << (WINDOW_BITS - 1)


def slot_base(slot: int) -> int:
    """Give the address of what lies in a slot: its middle, so that underflows stay inside."""
    return slot << SLOT_BITS | 1 << (SLOT_BITS - 1)


def window_base(slot: int, align: int) -> int:
    """Give the same in the shared or local window; aligned as declared, and not by luck better."""
    middle = slot << WINDOW_BITS | 1 << (WINDOW_BITS - 1)
    return middle + (align if align < 128 else 0)


def parameter_offsets(function: Function) -> tuple[dict[str, int], int]:
    """Offsets of the parameters of an entry, and their bytes together."""
    offsets, at = {}, 0
    for p in function.parameters:
        at = -(-at // p.align) * p.align
        offsets[p.name] = at
        at += p.size
    return offsets, at


@dataclass(frozen=True, slots=True)
class Placed:
    """A variable and its address; `dynamic` for extern shared memory."""

    variable: Variable
    base: int
    dynamic: bool = False


class MemoryLayout:
    """Addresses of the variables of a module for one kernel.

    `global_` holds module variables in global and const space; `windowed` what each block or thread
    has for itself.
    """

    def __init__(self, module: Module, functions: list[Function]) -> None:
        self.entry = functions[0]
        self.offsets, self.parameter_bytes = parameter_offsets(self.entry)
        self.global_: list[Placed] = []
        self.windowed: list[Placed] = []
        self._where: dict[tuple[str, str], int] = {}
        self._slots = {"shared": 0, "local": 0}
        self._dynamic: int | None = None
        for v in module.variables.values():
            self._place("", v)
        for f in functions:
            for v in f.variables.values():
                self._place(f.name, v)

    def _place(self, function: str, v: Variable) -> None:
        """Give a variable its slot."""
        if v.space in {"global", "const"}:
            base = slot_base(FIRST_SLOT + len(self.global_))
            self.global_.append(Placed(v, base))
        elif v.space in WINDOWS:
            dynamic = v.space == "shared" and v.extern
            if dynamic and self._dynamic is not None:
                self._where[function, v.name] = self._dynamic
                return
            self._slots[v.space] += 1
            base = window_base(self._slots[v.space], v.align)
            self.windowed.append(Placed(v, base, dynamic))
            if dynamic:
                self._dynamic = base
        else:
            return
        self._where[function, v.name] = base

    def address(self, function: Function, name: str) -> int | None:
        """Give the address of a name as `function` sees it; None if it has none."""
        for owner in (function.name, ""):
            if (owner, name) in self._where:
                return self._where[owner, name]
        if function is self.entry and name in self.offsets:
            return slot_base(PARAM_SLOT) + self.offsets[name]
        return None

    @property
    def first_free_slot(self) -> int:
        """The slot of the first array argument."""
        return FIRST_SLOT + len(self.global_)
