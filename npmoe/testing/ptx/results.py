"""What a launch tells besides the arrays: coverage, counts of instructions, memory traffic."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from npmoe.errors import RangeError
from npmoe.testing.ptx.syntax import Instruction

__all__ = ["Coverage", "LaunchResult", "Traffic"]


@dataclass(frozen=True, slots=True)
class Coverage:
    """How often each instruction of a kernel ran.

    Parameters
    ----------
    kernel : str
    instructions : tuple of Instruction
        All that the kernel can execute, those of its device functions included.
    counts : tuple of int
        For each, how many threads executed it, summed. A guarded instruction counts where its guard
        let it.

    Notes
    -----
    ``a + b`` adds two of the same kernel, so that a sweep of launches gives one coverage.
    """

    kernel: str
    instructions: tuple[Instruction, ...]
    counts: tuple[int, ...]

    @property
    def fraction(self) -> float:
        """Executed instructions by all."""
        return sum(n > 0 for n in self.counts) / len(self.counts) if self.counts else 1.0

    @property
    def missed(self) -> tuple[Instruction, ...]:
        """The instructions that never ran."""
        return tuple(i for i, n in zip(self.instructions, self.counts, strict=True) if not n)

    def __add__(self, other: Coverage) -> Coverage:
        """Coverage of both."""
        if [i.text for i in self.instructions] != [i.text for i in other.instructions]:
            raise RangeError(
                f"Coverage: other must be of the same kernel as {self.kernel}, got {other.kernel} "
                f"with {len(other.instructions)} instructions against {len(self.instructions)}. "
                "Add coverage of one text only."
            )
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return Coverage(self.kernel, self.instructions, counts)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Memory traffic of one instruction in one state space.

    Parameters
    ----------
    instruction : Instruction
    space : str
        "shared" or "global".
    requests : int
        Executions by a warp.
    transactions : int
        Shared: passes over the banks, so that transactions / ideal is the mean conflict degree.
        Global: sectors of 32 bytes.
    ideal : int
        The least number for the same bytes.
    worst : int
        Shared: the largest degree of one request. Global: the most sectors of one request.
    bytes : int
        What the threads asked for, together.
    """

    instruction: Instruction
    space: str
    requests: int
    transactions: int
    ideal: int
    worst: int
    bytes: int


@dataclass(frozen=True, slots=True)
class LaunchResult:
    """What a launch without findings gives; the arrays have been updated in place.

    Parameters
    ----------
    coverage : Coverage
    barriers, collectives, async_copies : int
        Barriers completed, warp operations performed, cp.async issued.
    traffic : tuple of Traffic
        By instruction; empty unless the launch asked for it.
    """

    coverage: Coverage
    barriers: int
    collectives: int
    async_copies: int
    traffic: tuple[Traffic, ...] = ()

    @property
    def instructions(self) -> int:
        """Instructions executed, summed over threads."""
        return sum(self.coverage.counts)

    @property
    def opcodes(self) -> dict[str, int]:
        """The same by opcode, most frequent first."""
        out: Counter[str] = Counter()
        for i, n in zip(self.coverage.instructions, self.coverage.counts, strict=True):
            out[i.opcode] += n
        return {name: n for name, n in out.most_common() if n}

    def bank_conflicts(self) -> tuple[Traffic, ...]:
        """List the shared accesses that needed more passes than the least."""
        return tuple(t for t in self.traffic if t.space == "shared" and t.transactions > t.ideal)

    def uncoalesced(self) -> tuple[Traffic, ...]:
        """List the global accesses that touched more sectors than the least."""
        return tuple(t for t in self.traffic if t.space == "global" and t.transactions > t.ideal)
