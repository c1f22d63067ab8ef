"""Findings as Python sees them: what, where in the PTX and in the source, who, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from npmoe.errors import NpmoeError
from npmoe.testing.ptx.binding import CFinding, CWho
from npmoe.testing.ptx.syntax import Instruction

if TYPE_CHECKING:
    from npmoe.testing.ptx.arguments import Buffer
    from npmoe.testing.ptx.memory_layout import Placed

__all__ = ["KINDS", "Place", "PtxFinding", "make_finding"]

KINDS = (
    "nothing", "race", "out-of-bounds", "misaligned", "uninitialized", "read-only", "async",
    "barrier-divergence", "deadlock", "warp-divergence", "undefined-register", "division-by-zero",
    "trap", "no-progress", "bad-call",
)  # fmt: skip
SPACES = ("generic", "global", "shared", "local", "const", "param")
WRITE, STRONG, CTA_SCOPE, RMW, ASYNC = 1, 2, 16, 32, 64
NOBODY = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Place:
    """A thread at a PTX line (0: unknown); `block` and `thread` are (x, y, z)."""

    block: tuple[int, int, int]
    thread: tuple[int, int, int]
    line: int

    def __str__(self) -> str:
        return f"thread {self.thread} of block {self.block}"


class PtxFinding(NpmoeError):
    """What a checker found while a kernel ran.

    Parameters
    ----------
    message : str
    kind : str
        One of `KINDS`: "race", "out-of-bounds", ...
    kernel : str
        Name of the entry.
    place : Place
        The thread that was executing, with its PTX line.
    other : Place or None
        The other thread, where there is one.
    space : str
        State space of the access; "" where none was made.
    buffer : int or None
        Position of the array in `args`, for global memory of the caller.
    name : str
        The allocation: "args[2]", or the name of a PTX variable.
    offset : int or None
        Bytes from the beginning of the allocation; may be negative.
    """

    def __init__(
        self,
        message: str,
        *,
        kind: str,
        kernel: str,
        place: Place,
        other: Place | None = None,
        space: str = "",
        buffer: int | None = None,
        name: str = "",
        offset: int | None = None,
    ) -> None:
        super().__init__(message)
        self.kind, self.kernel, self.place, self.other = kind, kernel, place, other
        self.space, self.buffer, self.name, self.offset = space, buffer, name, offset

    def __reduce__(self) -> tuple[Callable[..., PtxFinding], tuple[str, dict[str, Any]]]:
        return _restore, (str(self), dict(vars(self)))


def _restore(message: str, fields: dict[str, Any]) -> PtxFinding:
    """Make a finding again that went from one process to another."""
    return PtxFinding(message, **fields)


@dataclass(frozen=True, slots=True)
class Report:
    """What a message is written from: the raw finding and what its numbers mean."""

    raw: CFinding
    kernel: str
    sites: Sequence[Instruction]
    buffers: Sequence[Buffer]
    variables: Sequence[Placed]
    register_names: Sequence[str]

    def line(self, site: int) -> str:
        """Give an instruction in words: its PTX line, its text and its source."""
        if not site:
            return "an unknown line"
        i = self.sites[site - 1]
        source = f", {i.source.file}:{i.source.line}" if i.source else ""
        return f"PTX line {i.line} `{i.text}`{source}"

    def place(self, raw: CWho, site: int) -> Place:
        """Give a thread of the runtime as a Place."""
        b, t = tuple(raw.block), tuple(raw.thread)
        return Place(
            (b[0], b[1], b[2]), (t[0], t[1], t[2]), self.sites[site - 1].line if site else 0
        )

    @property
    def name(self) -> str:
        """The allocation that was touched."""
        if self.raw.buffer == NOBODY:
            return ""
        if SPACES[self.raw.space] == "param":
            return "the kernel's parameters"
        if self.raw.buffer < len(self.variables):
            name: str = self.variables[self.raw.buffer].variable.name
            return name
        return f"args[{self.buffers[self.raw.buffer - len(self.variables)].number}]"

    @property
    def buffer(self) -> int | None:
        """The position in `args`, if it was an argument."""
        at = self.raw.buffer - len(self.variables)
        if self.raw.buffer == NOBODY or SPACES[self.raw.space] != "global" or at < 0:
            return None
        number: int = self.buffers[at].number
        return number

    @property
    def where(self) -> str:
        """Memory space, allocation and offset in words."""
        r, space = self.raw, SPACES[self.raw.space]
        if r.buffer == NOBODY:
            return f"{space} memory at address {r.address:#x}, which is in no allocation"
        element = ""
        if self.buffer is not None and r.offset >= 0:
            array = self.buffers[r.buffer - len(self.variables)].array
            if array.dtype.itemsize:
                element = (
                    f" (element {r.offset // array.dtype.itemsize} of {array.size} {array.dtype})"
                )
        return f"{self.name} in {space} memory, byte offset {r.offset} of {r.extent}{element}"


def describe_access(flags: int) -> str:
    """Give an access in words."""
    if flags & RMW:
        return "an atomic" + (" of cta scope" if flags & CTA_SCOPE else "")
    if flags & ASYNC:
        return "the asynchronous write of cp.async"
    return ("a strong " if flags & STRONG else "a ") + ("write" if flags & WRITE else "read")


def _race(r: Report) -> str:
    a, b = r.raw.access, r.raw.other_access
    same = " Both write the same value, which is a race all the same." if r.raw.same_value else ""
    blocks = tuple(r.raw.who.block) != tuple(r.raw.other.block)
    if blocks and (a | b) & CTA_SCOPE:
        advice = "Widen the scope of the atomic to .gpu."
    elif blocks:
        advice = (
            "Blocks are not ordered: use atomics for both, give each block its own elements, "
            "or publish with "
            "a fence, an atomic flag and a fence."
        )
    elif (a | b) & RMW and not (a & b & RMW):
        advice = "Make both atomic, or put a barrier between them."
    else:
        advice = (
            "Put a __syncthreads() (bar.sync), or within one warp a __syncwarp(), between them."
        )
    other = r.place(r.raw.other, r.raw.other_site)
    return (
        f"data race on {r.where}: {describe_access(a)} of {r.raw.size} bytes is not ordered after "
        f"{describe_access(b)} by {other} at {r.line(r.raw.other_site)}.{same} {advice}"
    )


def _bounds(r: Report) -> str:
    verb = "writes" if r.raw.access & WRITE else "reads"
    return (
        f"{verb} {r.raw.size} bytes outside: {r.where}. Guard the access by the length, "
        "or make the buffer longer."
    )


def _misaligned(r: Report) -> str:
    return (
        f"misaligned access of {r.raw.size} bytes: {r.where}. "
        "Addresses of such an access must be multiples of "
        f"{r.raw.size} (shared memory is aligned as it is declared, no better)."
    )


def _uninitialized(r: Report) -> str:
    return (
        f"reads {r.raw.size} bytes of which some were never written: {r.where}. Write them first, "
        "or read fewer."
    )


def _read_only(r: Report) -> str:
    return f"writes to a read-only allocation: {r.where}. Pass a writeable array, or do not write."


def _async(r: Report) -> str:
    verb = "writes to" if r.raw.access & WRITE else "reads"
    return (
        f"{verb} bytes that cp.async at {r.line(r.raw.other_site)} has not delivered: {r.where}. "
        "The thread that "
        "issued the copy must execute cp.async.wait_group (or wait_all) for its group, "
        "then all a barrier."
    )


def _groups(r: Report) -> str:
    """Give the threads of the block by what they wait for."""
    out = []
    for g in r.raw.group[: r.raw.groups]:
        threads = f"{g.count} thread{'s' if g.count > 1 else ''} (first {tuple(g.first)})"
        if g.state == 0:
            out.append(f"{threads} exited")
        elif g.state == 1:
            out.append(f"{threads} wait at barrier {g.key}, {r.line(g.site)}")
        else:
            out.append(f"{threads} wait with membermask {g.key:#010x} at {r.line(g.site)}")
    return "; ".join(out)


def _stuck(r: Report) -> str:
    if r.raw.has_other:
        other = r.place(r.raw.other, r.raw.other_site)
        at = f" is at {r.line(r.raw.other_site)}" if r.raw.other_site else " has not come to it"
        return (
            f"{_note(r)}: {other}{at}. Every thread of the warp must take the same way to a "
            "barrier."
        )
    if not r.raw.groups:
        return f"{_note(r)} at {r.line(r.raw.other_site)}. All threads must agree on a barrier."
    return (
        f"nobody in the block can go on: {_groups(r)}. Every thread that a barrier or a "
        "membermask counts on must "
        "come to it: move it out of the branch, or do not return before it."
    )


def _warp(r: Report) -> str:
    if r.raw.groups:
        return _stuck(r)
    other = (
        f": {r.place(r.raw.other, 0)} is at {r.line(r.raw.other_site)}" if r.raw.has_other else ""
    )
    return (
        f"{_note(r)}{other}. Name in membermask exactly the threads that execute the instruction."
    )


def _undefined(r: Report) -> str:
    name = r.register_names[r.raw.register_].split("@")[0]
    return (
        f"reads register {name}, which this thread has not written. "
        "Some path leads here without setting it."
    )


def _division(r: Report) -> str:
    return f"integer division by zero in {r.kernel}, whose result is undefined. Guard the divisor."


def _trap(_r: Report) -> str:
    return (
        "the kernel stopped itself (trap, or an assertion that failed). "
        "The condition that leads here holds."
    )


def _no_progress(r: Report) -> str:
    return (
        f"the kernel does not come to its end: {_note(r)}. It spins on something that nobody "
        "writes, or "
        "needs a larger limit=."
    )


def _bad_call(r: Report) -> str:
    return f"{_note(r)}. The PTX manual does not allow it."


def _note(r: Report) -> str:
    return bytes(r.raw.note).decode()


TEXTS: dict[str, Callable[[Report], str]] = {
    "race": _race,
    "out-of-bounds": lambda r: f"{_note(r)}." if r.raw.note else _bounds(r),
    "misaligned": _misaligned,
    "uninitialized": _uninitialized,
    "read-only": _read_only,
    "async": _async,
    "barrier-divergence": _stuck,
    "deadlock": _stuck,
    "warp-divergence": _warp,
    "undefined-register": _undefined,
    "division-by-zero": _division,
    "trap": _trap,
    "no-progress": _no_progress,
    "bad-call": _bad_call,
}


def make_finding(r: Report) -> PtxFinding:
    """Turn what the runtime reports into the exception."""
    kind = KINDS[r.raw.kind]
    place = r.place(r.raw.who, r.raw.site)
    text = TEXTS[kind](r)
    message = f"{r.kernel}: [{kind}] {r.line(r.raw.site)}, {place}: {text}"
    touched = bool(r.raw.size)
    return PtxFinding(
        message,
        kind=kind,
        kernel=r.kernel,
        place=place,
        other=r.place(r.raw.other, r.raw.other_site) if r.raw.has_other else None,
        space=SPACES[r.raw.space] if touched else "",
        buffer=r.buffer if touched else None,
        name=r.name if touched else "",
        offset=r.raw.offset if touched and r.raw.buffer != NOBODY else None,
    )
