"""Statements to a module: declarations, scopes, instructions and their operands."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

from npmoe.errors import RangeError
from npmoe.testing.ptx.errors import PtxSyntaxError
from npmoe.testing.ptx.initialisers import pack_initialiser
from npmoe.testing.ptx.lexer import Statement, split_statements
from npmoe.testing.ptx.scalar_types import size_of
from npmoe.testing.ptx.syntax import (
    Address,
    Edit,
    Function,
    Immediate,
    Instruction,
    Label,
    Module,
    Negated,
    Opaque,
    Operand,
    Pair,
    Parameter,
    Register,
    SourceLine,
    Symbol,
    Variable,
    Vector,
)

__all__ = ["parse"]

NAME = r"[A-Za-z_$%][\w$]*"
VARIABLE = re.compile(
    r"(?P<link>(?:\.(?:visible|extern|weak|common)\s+)*)\.(?P<space>shared|local|global|const|param)"
    r"(?:\s*\.align\s+(?P<align>\d+))?(?:\s*\.attribute\([^)]*\))?(?:\s*\.v(?P<vector>[24]))?\s*\.(?P<type>[busf]\d+|pred)"
    rf"(?:\s*\.ptr[^,;)]*?)?\s+(?P<name>{NAME})\s*(?P<dims>(?:\[\s*\d*\s*\])*)\s*(?:=\s*(?P<init>.*))?$"
)
FUNCTION = re.compile(
    rf"(?P<link>(?:\.\w+\s+)*?)\.(?P<kind>entry|func)\s*(?:\((?P<returns>[^)]*)\)\s*)?(?P<name>{NAME})\s*"
    r"(?:\((?P<params>[^)]*)\))?\s*(?P<directives>.*)$"
)
GUARD = re.compile(rf"@(!?)\s*({NAME})\s+")
REGISTERS = re.compile(r"\.reg\s*(?:\.v[24]\s*)?\.(\w+)\s+(.*)$")
NUMBER = re.compile(
    r"[+-]?(0[xX][0-9a-fA-F]+|0[fFdD][0-9a-fA-F]+|0[bB][01]+|\d[\d.]*(?:[eE][+-]?\d+)?)U?$"
)


@lru_cache(maxsize=32)
def parse(ptx: str, edits: tuple[tuple[str, Edit], ...] = ()) -> Module:
    """Read a PTX text.

    Parameters
    ----------
    ptx : str
    edits : tuple of (str, Edit), optional
        Named alternatives for single lines; they are read along, and end in `Function.edits`.

    Returns
    -------
    Module
        Shared between calls with the same text: do not change it.

    Raises
    ------
    PtxSyntaxError
        If the text cannot be read; the message has the line.
    RangeError
        If there is no instruction on the line of an edit.
    """
    module = Module(ptx, "", "", {}, set(), {})
    statements = split_statements(ptx)
    by_line: dict[int, list[tuple[str, Edit]]] = {}
    for name, edit in edits:
        by_line.setdefault(edit.line, []).append((name, edit))
    files: dict[int, str] = {}
    for s in statements:  # nvcc writes them at the end
        _read_file(s, files)
    for s in statements:
        word = s.text.split(" ", 1)[0]
        if word in {".version", ".target"}:
            setattr(module, word[1:], s.text.split(" ", 1)[1].strip())
        elif re.search(r"\.(entry|func)\b", s.text):
            _read_function(s, module, files, by_line)
        elif word in {".address_size", ".file", ".section", ".loc", ".pragma", ".alias"} or s.label:
            continue
        elif found := VARIABLE.match(s.text):
            variable = _make_variable(found, s.line)
            module.variables[variable.name] = variable
        else:
            raise PtxSyntaxError(f"parse: PTX line {s.line} is not understood: {s.text[:120]}")
    edited = {i.line for f in module.functions.values() for i in f.instructions}
    for name, edit in edits:
        if edit.line not in edited:
            raise RangeError(
                f"parse: the edit '{name}' must be of a line with an instruction, got {edit.line}. "
                "Lines count from 1, and instructions that span several belong to their first."
            )
    if not module.functions:
        raise PtxSyntaxError("parse: ptx must hold a function, got none. Is this PTX?")
    return module


def _read_file(s: Statement, files: dict[int, str]) -> None:
    """Note ``.file 1 "path"``."""
    found = re.match(r"\.file\s+(\d+)\s+\"([^\"]*)\"", s.text)
    if found:
        files[int(found[1])] = found[2]


def _make_variable(found: re.Match[str], line: int) -> Variable:
    """Give a variable from a matched declaration."""
    count = 1
    dims = re.findall(r"\[\s*(\d*)\s*\]", found["dims"] or "")
    for d in dims:
        count *= int(d or 0)
    unit = size_of(found["type"]) * int(found["vector"] or 1)
    align = int(found["align"] or unit)
    initial = pack_initialiser(found["init"], found["type"], line) if found["init"] else None
    if initial is not None and dims and not dims[0]:
        count = len(initial) // unit
    if initial is not None:
        initial = initial.ljust(count * unit, b"\0")
    return Variable(
        found["name"],
        found["space"],
        found["type"],
        count * unit,
        align,
        initial,
        extern="extern" in found["link"],
    )


def _read_parameters(text: str | None, line: int) -> tuple[Parameter, ...]:
    """Give the parameters of a function header."""
    out = []
    for piece in (text or "").split(","):
        if not piece.strip():
            continue
        words = piece.strip()
        if words.startswith(".reg"):
            raise PtxSyntaxError(
                f"parse: .reg parameters (PTX line {line}) are not read; use .param."
            )
        found = VARIABLE.match(words)
        if not found:
            raise PtxSyntaxError(
                f"parse: the parameter '{words}' at PTX line {line} is not understood."
            )
        v = _make_variable(found, line)
        elements = v.size // size_of(v.type) if found["dims"] else 0
        out.append(Parameter(v.name, v.type, v.size, v.align, elements))
    return tuple(out)


def _read_function(
    s: Statement,
    module: Module,
    files: dict[int, str],
    edits: dict[int, list[tuple[str, Edit]]],
) -> None:
    """Add a function, or note its declaration."""
    found = FUNCTION.match(s.text)
    if not found:
        raise PtxSyntaxError(
            f"parse: the function at PTX line {s.line} is not understood: {s.text[:120]}"
        )
    name = found["name"]
    if s.block is None:
        module.declared.add(name)
        return
    function = Function(
        name,
        s.line,
        found["kind"] == "entry",
        _read_parameters(found["params"], s.line),
        _read_parameters(found["returns"], s.line),
        directives=re.findall(r"\.\w+[^.]*", found["directives"]),
    )
    module.functions[name] = function
    _Body(function, files, edits).read(s.block, _Scope())


@dataclass(slots=True)
class _Scope:
    """Names declared between two braces, and those around it."""

    names: dict[str, str] = field(default_factory=dict)
    ranges: dict[str, tuple[int, str]] = field(default_factory=dict)
    outer: _Scope | None = None

    def find(self, name: str) -> str | None:
        """Give the unique name behind `name`; None where it was not declared in a scope."""
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            found = re.match(r"(.*?)(\d+)$", name)
            for prefix in {found[1], name.rstrip("0123456789")} if found else ():
                if prefix in scope.ranges and int(name[len(prefix) :]) < scope.ranges[prefix][0]:
                    return name + scope.ranges[prefix][1]
            scope = scope.outer
        return None


class _Body:
    """Reads the body of one function."""

    def __init__(
        self, function: Function, files: dict[int, str], edits: dict[int, list[tuple[str, Edit]]]
    ) -> None:
        self.f, self.files, self.edits = function, files, edits
        self.source: SourceLine | None = None
        self.scopes = 0
        self.pending: tuple[str, int] | None = None

    def read(self, block: list[Statement], scope: _Scope) -> None:
        """Read a block: first what it declares, then what it does."""
        suffix = f"@{self.scopes}" if self.scopes else ""
        self.scopes += 1
        for s in block:
            if s.label:
                scope.names[s.text] = s.text + suffix
            elif s.text.startswith(".reg"):
                self.declare_registers(s, scope, suffix)
            elif s.block is None and (found := VARIABLE.match(s.text)):
                v = _make_variable(found, s.line)
                unique = v.name + suffix
                scope.names[v.name] = unique
                self.f.variables[unique] = Variable(
                    unique, v.space, v.type, v.size, v.align, v.initial, v.extern
                )
        for s in block:
            if s.block is not None:
                self.read(s.block, _Scope(outer=scope))
            elif s.label:
                self.pending = (scope.names[s.text], s.line)
                self.f.body.append(Label(*self.pending))
            elif s.text.startswith("."):
                self.directive(s, scope)
            else:
                self.f.body.append(self.instruction(s, scope))
                if s.line in self.edits:
                    self.read_edits(s.line, scope)

    def read_edits(self, line: int, scope: _Scope) -> None:
        """Read what may stand in place of a line; only its first instruction is replaced by it."""
        here = len(self.f.body) - 1
        first = not any(
            isinstance(item, Instruction) and item.line == line for item in self.f.body[:here]
        )
        self.f.edits[here] = {}
        for name, edit in self.edits[line]:
            inner = _Body(self.f, self.files, {})
            inner.scopes, inner.source, body = self.scopes + 1, self.source, self.f.body
            self.f.body = []
            block = split_statements(edit.text) if first else []
            for s in block:
                s.line = line
            inner.read(block, _Scope(outer=scope))
            self.f.edits[here][name] = [i for i in self.f.body if isinstance(i, Instruction)]
            if len(self.f.edits[here][name]) < len(self.f.body):
                raise PtxSyntaxError(f"parse: the edit '{name}' of PTX line {line} has a label.")
            self.f.body, self.scopes = body, inner.scopes

    def declare_registers(self, s: Statement, scope: _Scope, suffix: str) -> None:
        """``.reg .b32 %r<6>, a, b``."""
        found = REGISTERS.match(s.text)
        if not found:
            raise PtxSyntaxError(f"parse: PTX line {s.line} is not understood: {s.text}")
        for piece in found[2].split(","):
            name = piece.strip()
            many = re.match(rf"({NAME})\s*<(\d+)>$", name)
            if many:
                scope.ranges[many[1]] = (int(many[2]), suffix)
                self.f.registers.update(
                    (f"{many[1]}{i}{suffix}", found[1]) for i in range(int(many[2]))
                )
            else:
                scope.names[name] = name + suffix
                self.f.registers[name + suffix] = found[1]

    def directive(self, s: Statement, scope: _Scope) -> None:
        """Everything that begins with a dot and is not an instruction."""
        word = "." + s.text[1:].split(" ", 1)[0].split(".", 1)[0]
        if word == ".loc":
            numbers = re.findall(r"\d+", s.text)
            file = self.files.get(int(numbers[0]), f"file {numbers[0]}")
            self.source = SourceLine(file, int(numbers[1])) if int(numbers[1]) else None
        elif word == ".branchtargets":
            if self.pending is None:
                raise PtxSyntaxError(f"parse: .branchtargets at PTX line {s.line} has no label.")
            names = [n.strip() for n in s.text.split(" ", 1)[1].split(",")]
            self.f.tables[self.pending[0]] = tuple(scope.find(n) or n for n in names)
        elif word == ".file":
            _read_file(s, self.files)
        elif word not in {".reg", ".pragma", ".callprototype", ".section"} and not VARIABLE.match(
            s.text
        ):
            raise PtxSyntaxError(f"parse: PTX line {s.line} is not understood: {s.text[:120]}")

    def instruction(self, s: Statement, scope: _Scope) -> Instruction:
        """One instruction with its guard and operands."""
        text, predicate, negated = s.text, None, False
        if found := GUARD.match(text):
            negated = bool(found[1])
            predicate = Register(scope.find(found[2]) or found[2])
            text = text[found.end() :]
        opcode, _, rest = text.partition(" ")
        operands = tuple(self.operand(piece, scope, s.line) for piece in split_operands(rest))
        return Instruction(s.line, s.text, opcode, operands, predicate, negated, self.source)

    def operand(self, text: str, scope: _Scope, line: int) -> Operand:
        """One operand."""
        if text[0] == "{" or text[0] == "(":
            return Vector(tuple(self.operand(p, scope, line) for p in split_operands(text[1:-1])))
        if text[0] == "[":
            return self.address(text[1:-1].strip(), scope, line)
        if "|" in text:
            first, second = text.split("|")
            return Pair(
                self.operand(first.strip(), scope, line), self.operand(second.strip(), scope, line)
            )
        if text[0] == "!":
            return Negated(self.operand(text[1:].strip(), scope, line))
        if NUMBER.match(text):
            return Immediate(text)
        unique = scope.find(text) or text
        if unique in self.f.registers or text.startswith("%") or text == "_":
            return Register(unique)
        if text[0] == "-":
            return Negated(self.operand(text[1:].strip(), scope, line))
        if re.fullmatch(NAME, text):
            return Symbol(unique)
        if plus := re.fullmatch(rf"({NAME})\s*\+\s*(\d+)", text):
            return Address(Symbol(scope.find(plus[1]) or plus[1]), int(plus[2]))
        raise PtxSyntaxError(f"parse: the operand '{text}' at PTX line {line} is not understood.")

    def address(self, text: str, scope: _Scope, line: int) -> Address | Opaque:
        """Give ``[base]``, ``[base+8]``, ``[base+-8]`` or ``[1024]``."""
        found = re.fullmatch(rf"({NAME})\s*(?:([+-])\s*(-?\w+))?", text)
        if found:
            base = self.operand(found[1], scope, line)
            offset = int(found[3], 0) if found[3] else 0
            if isinstance(base, Register | Symbol):
                return Address(base, -offset if found[2] == "-" else offset)
        if NUMBER.match(text):
            return Address(None, int(text.rstrip("U"), 0))
        return Opaque(text)


def split_operands(text: str) -> list[str]:
    """Split at the commas that are not inside brackets."""
    out, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "{[(":
            depth += 1
        elif c in "}])":
            depth -= 1
        elif c == "," and not depth:
            out.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*out, last] if last or out else []
