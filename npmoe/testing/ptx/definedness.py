"""Registers that may be read before they are written: found once, then watched at run time.

A forward analysis gives for every instruction the registers that every path to it has written. A
read of any other register is possible trouble: it and whatever is copied from it by ``mov`` get a
flag in the generated code. Kernels without such reads, nearly all, pay nothing.
"""

from __future__ import annotations

from collections import deque

from npmoe.testing.ptx.syntax import (
    Address,
    Function,
    Instruction,
    Label,
    Negated,
    Operand,
    Pair,
    Register,
    Symbol,
    Vector,
)

__all__ = ["registers_read", "registers_written", "suspicious_registers"]

NO_RESULT = {
    "st", "red", "bra", "brx", "barrier", "cp", "ret", "exit", "trap", "membar", "fence",
    "prefetch", "prefetchu", "stmatrix", "nanosleep", "brkpt", "pmevent", "setmaxnreg",
}  # fmt: skip
ENDS = {"bra", "brx", "ret", "exit", "trap"}


def _registers(operand: Operand) -> list[str]:
    """Give the registers in an operand."""
    if isinstance(operand, Register):
        return [] if operand.name == "_" else [operand.name]
    if isinstance(operand, Vector):
        return [r for item in operand.items for r in _registers(item)]
    if isinstance(operand, Pair):
        return _registers(operand.first) + _registers(operand.second)
    if isinstance(operand, Negated):
        return _registers(operand.of)
    if isinstance(operand, Address):
        return _registers(operand.base) if operand.base is not None else []
    return []


def _split(i: Instruction) -> tuple[list[Operand], list[Operand]]:
    """Results and sources of an instruction."""
    name = i.parts[0]
    operands = list(i.operands)
    if name == "call":
        at = next((k for k, o in enumerate(operands) if isinstance(o, Symbol)), 0)
        return operands[:at], operands[at:]
    if name in NO_RESULT or (name == "bar" and "red" not in i.parts):
        return [], operands
    return operands[:1], operands[1:]


def registers_written(i: Instruction) -> list[str]:
    """Give the registers that an instruction writes, if its guard lets it."""
    return [r for o in _split(i)[0] for r in _registers(o)]


def registers_read(i: Instruction) -> list[str]:
    """Give the registers that an instruction reads, its guard included."""
    guard = [i.predicate.name] if i.predicate else []
    return guard + [r for o in _split(i)[1] for r in _registers(o)]


def _always_written(f: Function, at: int) -> list[str]:
    """Give the registers that item `at` writes whatever its guard and its edits are."""
    item = f.body[at]
    if not isinstance(item, Instruction) or item.predicate is not None:
        return []
    out = registers_written(item)
    for edit in f.edits.get(at, {}).values():
        made = {r for i in edit if i.predicate is None for r in registers_written(i)}
        out = [r for r in out if r in made]
    return out


def _all_read(f: Function, at: int) -> list[str]:
    """Give the registers that item `at` or one of its edits reads."""
    item = f.body[at]
    if isinstance(item, Label):
        return []
    every = [item, *(i for edit in f.edits.get(at, {}).values() for i in edit)]
    return [r for i in every for r in registers_read(i)]


def _successors(f: Function, at: int, labels: dict[str, int]) -> list[int]:
    """Give the items of the body that may come after item `at`."""
    item = f.body[at]
    following = [at + 1] if at + 1 < len(f.body) else []
    if isinstance(item, Label) or item.parts[0] not in ENDS:
        return following
    every = [item, *(i for edit in f.edits.get(at, {}).values() for i in edit)]
    targets: list[int] = []
    for o in (o for i in every for o in i.operands):
        if isinstance(o, Symbol):
            targets += [labels[n] for n in f.tables.get(o.name, (o.name,)) if n in labels]
    return targets + following if item.predicate is not None or at in f.edits else targets


def suspicious_registers(f: Function) -> set[str]:
    """Give registers whose definition must be tested at run time."""
    numbers = {name: 1 << k for k, name in enumerate(f.registers)}
    labels = {item.name: k for k, item in enumerate(f.body) if isinstance(item, Label)}
    everything = (1 << len(numbers)) - 1
    before = [everything] * len(f.body)
    if not f.body:
        return set()
    before[0] = 0
    queue = deque([0])
    reached = {0}
    while queue:
        at = queue.popleft()
        after = before[at]
        for r in _always_written(f, at):
            after |= numbers.get(r, 0)
        for k in _successors(f, at, labels):
            merged = before[k] & after
            if merged != before[k] or k not in reached:
                before[k] = merged
                reached.add(k)
                queue.append(k)
    found: set[str] = set()
    for at in reached:
        if isinstance(f.body[at], Instruction):
            found.update(
                r for r in _all_read(f, at) if r in numbers and not before[at] & numbers[r]
            )
    return _with_copies(f, found)


def _with_copies(f: Function, found: set[str]) -> set[str]:
    """Add what ``mov`` copies from them: a copy of nothing is no mistake until it is used."""
    while True:
        more = {
            r
            for i in f.instructions
            if i.parts[0] == "mov" and found.intersection(registers_read(i))
            for r in registers_written(i)
        } - found
        if not more:
            return found
        found |= more
