"""Mutants of compiled PTX: one instruction changed, as small mistakes in a kernel would change it.

They work on any PTX text. Two groups:

synchronisation   a barrier (of block, warp or membermask) deleted, an atomic made of plain
                  accesses, a cp.async wait loosened; every one of these must be caught
boundary          a comparison flipped (lt and le, ge and gt), a branch's or instruction's guard
                  dropped or negated, a constant of add, mad or an address moved by one, a load,
                  store or copy dropped

What a mutant does is an `npmoe.testing.ptx.Edit`, so that all mutants of a kernel are alternatives
in one compilation.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from npmoe.testing import ptx
from npmoe.testing.ptx.syntax import Address, Immediate

SYNCHRONISATION = ("barrier deleted", "atomic made plain", "wait loosened")
BOUNDARY = (
    "comparison flipped",
    "guard dropped",
    "guard negated",
    "constant moved",
    "address moved",
    "access dropped",
)
KINDS = SYNCHRONISATION + BOUNDARY
_FLIPS = {
    **{"lt": "le", "le": "lt", "ge": "gt", "gt": "ge"},
    **{"lo": "ls", "ls": "lo", "hs": "hi", "hi": "hs"},
    **{"ltu": "leu", "leu": "ltu", "geu": "gtu", "gtu": "geu"},
}
_BARRIERS = ("bar.sync", "barrier.sync", "barrier.cta.sync", "bar.warp.sync")
# What stands for `old op value` where an atomic becomes plain accesses.
_PLAIN = {"add", "and", "or", "xor", "min", "max"}
_INTEGER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)$")


@dataclass(frozen=True, slots=True)
class Mutant:
    """One changed instruction."""

    name: str  # unique in its text
    kind: str
    instruction: ptx.Instruction
    edit: ptx.Edit

    @property
    def synchronises(self) -> bool:
        return self.kind in SYNCHRONISATION

    def __str__(self) -> str:
        i = self.instruction
        where = f" ({i.source.file}:{i.source.line})" if i.source else ""
        return f"{self.kind}: PTX line {i.line}, {i.text} -> {self.edit.text or 'nothing'}{where}"


def find_mutants(text: str, entry: str) -> list[Mutant]:
    """List all mutants of an entry, in the order of its lines."""
    instructions = ptx.parse(text).entries[entry].instructions
    by_line: dict[int, list[ptx.Instruction]] = {}
    for i in instructions:
        by_line.setdefault(i.line, []).append(i)
    found = []
    for i in instructions:
        for number, (kind, changed) in enumerate(_changes(i)):
            # An edit replaces the whole line, and so repeats what else stands there.
            whole = " ".join(
                changed if other is i else f"{_guarded(other)};" for other in by_line[i.line]
            )
            at = f"{i.line}.{by_line[i.line].index(i)}"
            name = f"{at}.{number} {kind}"
            found.append(Mutant(name, kind, i, ptx.Edit(i.line, whole.strip())))
    return found


def edits_of(mutants: Sequence[Mutant]) -> dict[str, ptx.Edit]:
    """Return them as `npmoe.testing.ptx.load` takes them."""
    return {m.name: m.edit for m in mutants}


def draw_mutants(mutants: Sequence[Mutant], count: int, seed: int) -> list[Mutant]:
    """Draw so many: kinds in turn, so that rare ones are there, and lines at random."""
    rng = random.Random(seed)
    piles = {kind: [m for m in mutants if m.kind == kind] for kind in KINDS}
    for pile in piles.values():
        rng.shuffle(pile)
    drawn: list[Mutant] = []
    while len(drawn) < count and any(piles.values()):
        for pile in piles.values():
            if pile and len(drawn) < count:
                drawn.append(pile.pop())
    return drawn


def _guarded(i: ptx.Instruction, guard: str | None = None) -> str:
    """Return an instruction with its guard, or with another one."""
    bare = i.text.split(None, 1)[1] if i.text.startswith("@") else i.text
    if guard is None:
        guard = "" if i.predicate is None else f"@{'!' * i.negated}{i.predicate.name} "
    return guard + bare


def _changes(i: ptx.Instruction) -> Iterator[tuple[str, str]]:
    """Yield kind and new text for each way to change an instruction."""
    parts = i.parts
    if i.opcode.startswith(_BARRIERS):
        yield "barrier deleted", ""
    elif parts[0] in ("atom", "red") and (plain := _without_atomic(i)):
        yield "atomic made plain", plain
    elif i.opcode == "cp.async.wait_group":
        yield "wait loosened", f"cp.async.wait_group {int(i.operands[0].text) + 1};"  # type: ignore[union-attr]
    elif i.opcode == "cp.async.wait_all":
        yield "wait loosened", ""
    if i.predicate is not None:
        other = f"@{'!' * (not i.negated)}{i.predicate.name} "
        yield "guard dropped", f"{_guarded(i, '')};"
        yield "guard negated", f"{_guarded(i, other)};"
    if parts[0] == "setp":
        for k, part in enumerate(parts):
            if part in _FLIPS:
                flipped = ".".join([*parts[:k], _FLIPS[part], *parts[k + 1 :]])
                yield "comparison flipped", f"{_guarded(i).replace(i.opcode, flipped, 1)};"
    yield from _moved(i)
    copies = parts[0] in ("ld", "st", "ldu", "ldmatrix") or i.opcode.startswith("cp.async.c")
    if copies and "param" not in parts and not i.opcode.startswith("cp.async.commit"):
        yield "access dropped", ""


def _moved(i: ptx.Instruction) -> Iterator[tuple[str, str]]:
    """Yield the instruction with a constant one larger and one smaller."""
    guard, opcode = i.predicate is not None and i.text.split(None, 1)[0] + " ", i.opcode
    operands = _operand_texts(i)
    last = i.operands[-1] if i.operands else None
    if i.parts[0] in ("add", "mad") and isinstance(last, Immediate) and _INTEGER.match(last.text):
        for step in (1, -1):
            new = ", ".join([*operands[:-1], str(int(last.text, 0) + step)])
            yield "constant moved", f"{guard or ''}{opcode} {new};"
    if "param" in i.parts or i.parts[0] not in ("ld", "st", "atom", "red"):
        return
    size = _access_bytes(i)
    for k, operand in enumerate(i.operands):
        if isinstance(operand, Address) and operand.base is not None:
            for step in (size, -size):
                moved = f"[{operand.base.name}+{operand.offset + step}]"
                new = ", ".join([*operands[:k], moved, *operands[k + 1 :]])
                yield "address moved", f"{guard or ''}{opcode} {new};"


def _access_bytes(i: ptx.Instruction) -> int:
    """Return the bytes that a load or store moves."""
    bits = int(re.sub(r"\D", "", i.parts[-1]))
    lanes = next((int(p[1:]) for p in i.parts if p in ("v2", "v4", "v8")), 1)
    return bits // 8 * lanes


def _operand_texts(i: ptx.Instruction) -> list[str]:
    """Return the operands as they are written."""
    bare = i.text.split(None, 1)[1] if i.text.startswith("@") else i.text
    rest = bare.split(None, 1)[1] if len(bare.split(None, 1)) > 1 else ""
    out, depth, start = [], 0, 0
    for at, letter in enumerate(rest):
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and depth == 0:
            out.append(rest[start:at].strip())
            start = at + 1
    return [*out, rest[start:].strip()] if rest.strip() else out


def _without_atomic(i: ptx.Instruction) -> str | None:
    """Return load, operation and store instead of an atomic; None for what has no such form."""
    parts, operands = i.parts, _operand_texts(i)
    space = next((p for p in parts if p in ("global", "shared")), None)
    space = "" if space is None else f".{space}"
    name = next((p for p in parts[1:] if p in _PLAIN | {"exch"}), None)
    if name is None or i.predicate is not None:
        return None
    kind = parts[-1]
    address, value = operands[-2:]
    store = f"st{space}.{kind} {address}, "
    old = operands[0] if parts[0] == "atom" and operands[0] != "_" else None
    keep = f" mov.{kind} {old}, %mutant_old;" if old else ""
    load = f".reg .{kind} %mutant_old; ld{space}.{kind} %mutant_old, {address};"
    if name == "exch":
        return f"{load if old else ''} {store}{value};{keep}".strip()
    form = f"{name}.{kind}" if name in ("add", "min", "max") else f"{name}.b{kind[1:]}"
    work = f" .reg .{kind} %mutant_new; {form} %mutant_new, %mutant_old, {value};"
    return f"{load}{work} {store}%mutant_new;{keep}"
