"""Small launches through the host code of `accel.device`, judged against NumPy.

A `Case` runs one host function on an `EmulatedDevice` and raises AssertionError where a result is
out of bound, or a `PtxFinding`. Data are integers, and results compared with ==, or float64 balls
(`npmoe.testing.balls`) hold the error bounds. `SCHEDULES` are the orders of threads. `Mutants` runs
cases on changed kernels.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mutants import Mutant, edits_of

from accel.device.emulated import EmulatedDevice
from accel.device.kernel import Kernel
from accel.device.plans import Blocks, most_blocks
from accel.loopback import LoopbackArray
from npmoe.dispatch import DispatchPlan
from npmoe.plans.blocks import fill_blocks
from npmoe.testing import ptx
from npmoe.testing.balls import Ball, Model
from npmoe.testing.bounds import assert_within

SCHEDULES: tuple[str | int, ...] = ("in-order", "reversed", 7)
# Accesses and backward branches of a mutant; the unchanged kernels stay below it.
LIMIT = 16_000_000
# Of the instructions of a kernel, what the sharp cases run at least.
LEAST = 0.95


@dataclass(frozen=True, slots=True)
class Case:
    """One call of a host function, and the judgement of what it returned."""

    name: str
    run: Callable[[EmulatedDevice], None]

    def __str__(self) -> str:
        return self.name


class Mutants:
    """A kernel with its mutants in one compilation, in the place of the kernel on a device."""

    def __init__(self, device: EmulatedDevice, kernel: Kernel, mutants: Sequence[Mutant]) -> None:
        text, entry = device._compile(kernel)
        self._module = ptx.load(text, [entry], edits=edits_of(mutants))
        self._device, self._kernel, self._entry = device, kernel, entry
        self._mutant: Mutant | None = None

    def launch(self, *args: Any, **kwargs: Any) -> ptx.LaunchResult:
        """Launch the mutant that is being judged, or the unchanged kernel."""
        edit = None if self._mutant is None else self._mutant.name
        return self._module.launch(*args, **kwargs, limit=LIMIT, edit=edit)

    def noticed(self, mutant: Mutant | None, cases: Iterable[Case]) -> str | None:
        """Run cases until one notices the mutant; say which and how, or None.

        None is the unchanged kernel: cases that it does not pass notice every mutant.
        """
        modules, self._mutant = self._device._modules, mutant
        before = modules.get(self._kernel)
        modules[self._kernel] = self, self._entry  # type: ignore[assignment]
        try:
            for case in cases:
                try:
                    case.run(self._device)
                except ptx.PtxFinding as found:
                    return f"{case}: {found.kind}"
                except AssertionError:
                    return f"{case}: wrong result"
        finally:
            del modules[self._kernel]
            if before is not None:
                modules[self._kernel] = before
        return None


def check_lines(
    what: object,
    coverage: ptx.Coverage,
    code_of: Callable[[ptx.Instruction], str],
    allowed: dict[str, int],
) -> None:
    """Compare what did not run with a table, both ways, and hold it to `LEAST`."""
    missed = Counter(map(code_of, coverage.missed))
    shown = "\n".join(f"{code_of(i)!r}: {i.text}" for i in coverage.missed)
    assert dict(missed) == allowed, f"{what} misses {dict(missed)}, listed {allowed}\n{shown}"
    assert coverage.fraction >= LEAST, f"{what}: {coverage.fraction}"


def put(x: np.ndarray | None) -> Any:
    """Return an array of the device."""
    return None if x is None else LoopbackArray(x)


@dataclass(frozen=True, slots=True)
class Routes:
    """Routes sorted by expert: empty experts, and routes without a row."""

    top_k: int
    experts: int
    owners: np.ndarray  # (T*K,), -1: no row

    @property
    def pairs(self) -> np.ndarray:
        """Routes in order of rows (R,)."""
        order = np.argsort(self.owners, kind="stable")
        return order[np.count_nonzero(self.owners < 0) :]

    @property
    def tokens(self) -> int:
        return len(self.owners) // self.top_k

    @property
    def offsets(self) -> np.ndarray:
        counts = np.bincount(self.owners[self.owners >= 0], minlength=self.experts)
        return np.concatenate([[0], np.cumsum(counts)])

    def plan(self) -> DispatchPlan:
        """Return the plan on the device, as `count_plan` makes it."""
        pairs, T = self.pairs, len(self.owners)
        rows, padded = np.full(T, -1), np.full(T, -1)
        rows[pairs], padded[: len(pairs)] = np.arange(len(pairs)), pairs
        tokens = np.where(padded >= 0, padded // self.top_k, -1)
        as_int = functools.partial(np.asarray, dtype=np.int32)
        return DispatchPlan(
            pair_ids=put(as_int(padded)),
            token_ids=put(as_int(tokens)),
            row_ids=put(as_int(rows.reshape(-1, self.top_k))),
            expert_offsets=put(as_int(self.offsets)),
            num_tokens=self.tokens,
            top_k=self.top_k,
        )

    def blocks(self, block_size: int, labels: np.ndarray | None = None) -> Blocks:
        """Return the block view on the device, as `view_blocks` makes it."""
        labels = np.arange(self.experts) if labels is None else labels
        buckets = np.where(self.owners < 0, self.experts, self.owners)
        most = most_blocks(len(self.owners), self.experts, block_size)
        found = fill_blocks(buckets, labels, block_size, most * block_size, -1)
        return Blocks(*map(put, found), block_size, most)


def draw_routes(
    rng: np.random.Generator, tokens: int, top_k: int, experts: int, absent: float = 0.15
) -> Routes:
    """Draw owners: some experts stay empty, and some routes have none."""
    busy = rng.permutation(experts)[: max(1, experts - experts // 3)]
    owners = rng.choice(busy, tokens * top_k)
    owners[rng.random(len(owners)) < absent] = -1
    return Routes(top_k, experts, owners)


def draw(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, scale: float | None
) -> np.ndarray:
    """Draw small integers if there is no scale, else normal numbers."""
    values = rng.integers(-2, 3, shape) if scale is None else rng.standard_normal(shape) * scale
    return values.astype(dtype)


def exactly(x: np.ndarray, dtype: Any) -> Ball:
    """Return a ball around numbers that both sides have."""
    return Ball.exact(x.astype(np.float64), Model.of(dtype))


def judge(got: Any, expected: Ball, what: str, *, exact: bool = False, written: Any = None) -> None:
    """Compare rows that should be written, and that others were not: they still hold NaN."""
    host = got._host
    written = np.arange(len(expected.mid)) if written is None else np.flatnonzero(written)
    others = np.ones(len(host), bool)
    others[written] = False
    assert np.isnan(host[others]).all(), f"{what}: rows were written that mean nothing"
    mine, ball = host[written], expected[written]
    if exact:
        wrong = mine != ball.mid
        assert mine.shape == ball.mid.shape, (what, mine.shape)
        assert not wrong.any(), (what, np.argwhere(wrong)[:4])
    else:
        assert_within(mine.astype(np.float64), ball.mid, ball.rad, what)
