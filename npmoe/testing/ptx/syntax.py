"""What a PTX module is made of, as plain data: functions, variables, instructions, operands.

Every name is unique within its function: the parser has resolved the scopes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = [
    "Address",
    "Edit",
    "Function",
    "Immediate",
    "Instruction",
    "Label",
    "Module",
    "Negated",
    "Opaque",
    "Operand",
    "Pair",
    "Parameter",
    "Register",
    "SourceLine",
    "Symbol",
    "Variable",
    "Vector",
]


@dataclass(frozen=True, slots=True)
class Register:
    """A register of the function, or a special register such as ``%tid.x``."""

    name: str


@dataclass(frozen=True, slots=True)
class Immediate:
    """A constant as it is written: ``-1``, ``0x1F``, ``0f3F800000``, ``1.5``."""

    text: str


@dataclass(frozen=True, slots=True)
class Symbol:
    """The name of a variable, parameter, function or label."""

    name: str


@dataclass(frozen=True, slots=True)
class Address:
    """``[base + offset]``; `base` is None for a constant address."""

    base: Register | Symbol | None
    offset: int


@dataclass(frozen=True, slots=True)
class Vector:
    """``{a, b, ...}``, also the argument lists of ``call``."""

    items: tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """``a|b``: two destinations."""

    first: Operand
    second: Operand


@dataclass(frozen=True, slots=True)
class Negated:
    """``!p`` or ``-x``."""

    of: Operand


@dataclass(frozen=True, slots=True)
class Opaque:
    """An operand in brackets of a form that no supported instruction has: textures, tensor maps."""

    text: str


Operand = Register | Immediate | Symbol | Address | Vector | Pair | Negated | Opaque


@dataclass(frozen=True, slots=True)
class SourceLine:
    """Where the compiler says that an instruction comes from."""

    file: str
    line: int


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction.

    Parameters
    ----------
    line : int
        1-based line of the PTX text on which it starts.
    text : str
        The instruction as it is written, in one line, without the semicolon.
    opcode : str
        With its modifiers: ``ld.global.v4.f32``.
    operands : tuple of Operand
    predicate : Register, optional
        The guard; None when there is none.
    negated : bool
        Whether the guard is ``@!p``.
    source : SourceLine, optional
        From ``.loc``.
    """

    line: int
    text: str
    opcode: str
    operands: tuple[Operand, ...]
    predicate: Register | None = None
    negated: bool = False
    source: SourceLine | None = None

    @property
    def parts(self) -> list[str]:
        """The opcode split at its dots."""
        return self.opcode.split(".")


@dataclass(frozen=True, slots=True)
class Edit:
    """Another text for one line, as mutation tests make them.

    Parameters
    ----------
    line : int
        1-based PTX line; all instructions that start on it are replaced.
    text : str
        Instructions with their semicolons, none to delete the line. It sees the names of the line's
        scope and may declare registers of its own; labels are not allowed.
    """

    line: int
    text: str


@dataclass(frozen=True, slots=True)
class Label:
    """A place to branch to."""

    name: str
    line: int


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a function: type without the dot, bytes, alignment, elements (0: scalar)."""

    name: str
    type: str
    size: int
    align: int
    elements: int


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable in a state space; `initial` holds its bytes, None where it has no initialiser."""

    name: str
    space: str
    type: str
    size: int
    align: int
    initial: bytes | None = None
    extern: bool = False


@dataclass(slots=True)
class Function:
    """An entry or a device function.

    `registers` maps each register to its type, `variables` holds what is declared inside (shared,
    local and the ``.param`` areas of calls), `tables` the targets of ``brx.idx``. `edits` maps
    places in the body to what stands there instead, by the name of the edit. `directives` are those
    of the header, ``.maxntid 128, 1, 1`` and its like.
    """

    name: str
    line: int
    is_entry: bool
    parameters: tuple[Parameter, ...]
    returns: tuple[Parameter, ...]
    body: list[Instruction | Label] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    tables: dict[str, tuple[str, ...]] = field(default_factory=dict)
    directives: list[str] = field(default_factory=list)
    edits: dict[int, dict[str, list[Instruction]]] = field(default_factory=dict)

    @property
    def instructions(self) -> list[Instruction]:
        """The body without its labels."""
        return [item for item in self.body if isinstance(item, Instruction)]


@dataclass(slots=True)
class Module:
    """A parsed PTX text.

    `functions` holds everything with a body by name, entries included; `declared` the names of
    functions that are only declared; `variables` those of module scope.
    """

    text: str
    version: str
    target: str
    functions: dict[str, Function]
    declared: set[str]
    variables: dict[str, Variable]

    @property
    def entries(self) -> dict[str, Function]:
        """The kernels by name."""
        return {name: f for name, f in self.functions.items() if f.is_entry}

    @property
    def lines(self) -> list[str]:
        """The lines of the text; line n of a message is ``lines[n - 1]``."""
        return self.text.split("\n")
