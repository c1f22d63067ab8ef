"""What the threads of a warp do together, and barriers of the block."""

from __future__ import annotations

from collections.abc import Callable

from npmoe.testing.ptx.context import Context
from npmoe.testing.ptx.scalar_types import size_of
from npmoe.testing.ptx.syntax import Instruction, Operand

__all__ = ["HANDLERS", "collective"]

SHUFFLES = {"up": "SHFL_UP", "down": "SHFL_DOWN", "bfly": "SHFL_BFLY", "idx": "SHFL_IDX"}
VOTES = {"all": "VOTE_ALL", "any": "VOTE_ANY", "uni": "VOTE_UNI", "ballot": "VOTE_BALLOT"}
REDUCTIONS = {"popc": "RED_POPC", "and": "RED_AND", "or": "RED_OR"}


def collective(
    c: Context, operation: str, inputs: list[str], mask: str, form: int = 0, aligned: bool = False
) -> str:
    """Put operands where the warp finds them and wait for the others."""
    puts = " ".join(f"T.in[{k}] = {value};" for k, value in enumerate(inputs))
    flag = "true" if aligned else "false"
    return f"{puts} {c.wait(f'collective(T, {operation}, {form}, {mask}, {c.site}, {flag})')}"


def _emit_shfl(c: Context, i: Instruction) -> str:
    """``shfl.sync.mode.b32 d{|p}, a, b, c, mask``."""
    if len(i.parts) != 4 or i.parts[1] != "sync" or i.parts[2] not in SHUFFLES:
        raise c.unsupported()
    first, second = c.pair(i.operands[0])
    a, b, control, mask = (c.value(o, "u32") for o in i.operands[1:5])
    out = collective(c, SHUFFLES[i.parts[2]], [a, b, control], mask)
    out += " " + c.assign(first, "b32", "T.out[0]")
    return out if second is None else f"{out} {c.assign(second, 'pred', 'T.out[1] != 0')}"


def _emit_vote(c: Context, i: Instruction) -> str:
    """``vote.sync.ballot.b32 d, p, mask`` and its like."""
    if i.parts[1] != "sync":
        raise c.unsupported()
    out = collective(
        c, VOTES[i.parts[2]], [c.value(i.operands[1], "pred")], c.value(i.operands[2], "u32")
    )
    kind = i.parts[-1]
    return (
        f"{out} {c.assign(i.operands[0], kind, 'T.out[0]' if kind == 'b32' else 'T.out[0] != 0')}"
    )


def _emit_match(c: Context, i: Instruction) -> str:
    """``match.any.sync.b32 d, a, mask``; ``match.all`` may also give a predicate."""
    kind, operation = i.parts[-1], "MATCH_ANY" if i.parts[1] == "any" else "MATCH_ALL"
    value = f"(u64)({c.value(i.operands[1], kind)})"
    first, second = c.pair(i.operands[0])
    inputs = [f"(u32)({value})", f"(u32)(({value}) >> 32)"]
    out = collective(c, operation, inputs, c.value(i.operands[2], "u32"), size_of(kind))
    out += " " + c.assign(first, "b32", "T.out[0]")
    return out if second is None else f"{out} {c.assign(second, 'pred', 'T.out[1] != 0')}"


def _emit_redux(c: Context, i: Instruction) -> str:
    """``redux.sync.add.u32 d, a, mask``."""
    _, _, operation, kind = i.parts
    name = f"REDUX_{operation.upper()}"
    if operation in {"min", "max"}:
        name += "_S" if kind == "s32" else "_U"
    out = collective(c, name, [c.value(i.operands[1], "u32")], c.value(i.operands[2], "u32"))
    return f"{out} {c.assign(i.operands[0], 'b32', 'T.out[0]')}"


def _emit_elect(c: Context, i: Instruction) -> str:
    """``elect.sync d|p, mask``: the lowest lane."""
    first, second = c.pair(i.operands[0])
    out = collective(c, "ELECT", [], c.value(i.operands[1], "u32"))
    out += " " + c.assign(first, "b32", "T.out[0]")
    return out if second is None else f"{out} {c.assign(second, 'pred', 'T.out[1] != 0')}"


def _emit_activemask(c: Context, i: Instruction) -> str:
    """``activemask.b32 d``."""
    return c.assign(i.operands[0], "b32", "resident_lanes(T)")


def _emit_bar(c: Context, i: Instruction) -> str:
    """``bar.sync``, ``bar.arrive``, ``bar.red``, ``bar.warp.sync`` and ``barrier{.cta}``."""
    parts = [p for p in i.parts[1:] if p != "cta"]
    if parts[0] == "warp":
        return collective(c, "SYNC_WARP", [], c.value(i.operands[0], "u32"))
    if parts[0] not in {"sync", "arrive", "red"} or "cluster" in parts:
        raise c.unsupported()
    aligned = "true" if i.parts[0] == "bar" or "aligned" in parts else "false"
    if parts[0] == "red":
        return _emit_bar_red(c, i, aligned)
    identity, count = _barrier_operands(c, i.operands)
    call = f"barrier_{parts[0]}(T, {identity}, {count}, {c.site}, {aligned})"
    return c.wait(call) if parts[0] == "sync" else f"{call};"


def _barrier_operands(c: Context, operands: tuple[Operand, ...]) -> tuple[str, str]:
    """Give the number of the barrier and how many threads it takes (0: all)."""
    return c.value(operands[0], "u32"), c.value(operands[1], "u32") if len(operands) > 1 else "0"


def _emit_bar_red(c: Context, i: Instruction, aligned: str) -> str:
    """``bar.red.popc.u32 d, a{, b}, {!}c``."""
    reduction = next(REDUCTIONS[p] for p in i.parts if p in REDUCTIONS)
    identity, count = _barrier_operands(c, i.operands[1:-1])
    value = c.value(i.operands[-1], "pred")
    out = c.wait(
        f"barrier_reduce(T, {identity}, {count}, {c.site}, {aligned}, {reduction}, {value})"
    )
    if reduction == "RED_POPC":
        return f"{out} {c.assign(i.operands[0], 'u32', 'T.out[0]')}"
    return f"{out} {c.assign(i.operands[0], 'pred', 'T.out[0] != 0')}"


HANDLERS: dict[str, Callable[[Context, Instruction], str]] = {
    "shfl": _emit_shfl,
    "vote": _emit_vote,
    "match": _emit_match,
    "redux": _emit_redux,
    "elect": _emit_elect,
    "activemask": _emit_activemask,
    "bar": _emit_bar,
    "barrier": _emit_bar,
}
