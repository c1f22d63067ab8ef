"""Cases of `accel/kernels/plan.cu`: the counting sort, and the view in blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from device_sweep import Case, Routes, put

from accel.device.emulated import EmulatedDevice
from accel.device.plans import count_plan, most_blocks, view_blocks
from npmoe.plans.blocks import fill_blocks


@dataclass(frozen=True)
class Sort:
    """One plan. Ids beyond `ids` up to `legal` are identity experts; `wrong` ids are illegal."""

    tokens: int
    top_k: int
    ids: int
    block: int = 16
    identity: int = 0
    mapped: bool = False  # an expert_map gives a third of the ids, in another order, numbers
    absent: float = 0.0
    wrong: tuple[int, ...] = ()
    crowd: bool = False  # all routes of one expert
    ramp: bool = False  # later experts have more routes, so that no two sums are equal
    labels: bool = False
    entries: int | None = None
    seed: int = 0

    def _draw(self) -> tuple[np.ndarray, np.ndarray | None, int]:
        rng = np.random.default_rng([self.seed, self.tokens, self.top_k, self.ids])
        legal = self.ids + self.identity
        ids = rng.integers(0, legal, self.tokens * self.top_k)
        if self.ramp:
            ids = (self.ids * np.sqrt(rng.random(len(ids)))).astype(int)
        if self.crowd:
            ids[:] = rng.integers(0, self.ids)
        ids[rng.random(len(ids)) < self.absent] = -1
        ids[len(ids) - len(self.wrong) :] = self.wrong
        expert_map, experts = None, self.ids
        if self.mapped:
            experts = max(1, self.ids // 3)
            expert_map = np.full(self.ids, -1)
            chosen = rng.permutation(self.ids)[:experts]
            expert_map[chosen] = rng.permutation(experts)
        return ids, expert_map, experts

    def run(self, device: EmulatedDevice) -> None:
        """Sort, view in blocks, and compare every array."""
        ids, expert_map, experts = self._draw()
        known = (ids >= 0) & (ids < self.ids)
        owners = np.where(known, ids, -1)
        if expert_map is not None:
            owners = np.where(known, expert_map[np.where(known, ids, 0)], -1)
        want = Routes(self.top_k, experts, owners)
        illegal = device.zeros(2, np.int32)
        got = count_plan(
            device, put(ids.astype(np.int32).reshape(-1, self.top_k)), num_ids=self.ids,
            num_experts=experts, num_legal=self.ids + self.identity, illegal=illegal[:1],
            expert_map=None if expert_map is None else put(expert_map.astype(np.int32)),
        )  # fmt: skip
        expected = want.plan()
        for name in ("expert_offsets", "pair_ids", "token_ids", "row_ids"):
            mine, theirs = getattr(got, name)._host, getattr(expected, name)._host
            assert mine.dtype == np.int32, name
            assert np.array_equal(mine, theirs), (str(self), name)
        assert illegal._host.tolist() == [int(bool(self.wrong)), 0], (str(self), "illegal")
        labels = np.random.default_rng(1).permutation(experts)
        labels[::3] = -1
        if not self.labels:
            labels = np.arange(experts)
        blocks = view_blocks(
            device, expected, self.block, entries=self.entries,
            labels=put(labels.astype(np.int32)) if self.labels else None,
        )  # fmt: skip
        most = most_blocks(len(ids), experts, self.block)
        length = most * self.block if self.entries is None else self.entries
        buckets = np.where(owners < 0, experts, owners)
        for name, theirs in fill_blocks(buckets, labels, self.block, length, -1)._asdict().items():
            mine = getattr(blocks, name)._host
            assert np.array_equal(mine, theirs), (str(self), name)
        assert blocks.most == most

    def __str__(self) -> str:
        flags = [f for f in ("mapped", "crowd", "labels") if getattr(self, f)]
        return f"plan {self.tokens}x{self.top_k} E{self.ids} B{self.block} {' '.join(flags)}"

    @property
    def case(self) -> Case:
        return Case(str(self), self.run)


def _at_the_edge() -> Iterator[Sort]:
    """Yield plans with one id at an edge: in either copy of an unrolled loop, with a map or not."""
    for mapped in (False, True):
        for routes in (12, 300):
            yield Sort(routes, 1, 5, wrong=(-2,), mapped=mapped)
            yield Sort(routes, 1, 5, wrong=(5,), mapped=mapped, seed=1)
            yield Sort(routes, 1, 5, wrong=(8,), identity=3, mapped=mapped, seed=2)
            yield Sort(routes, 1, 5, identity=1, mapped=mapped, absent=0.1, seed=3)
    for at in range(6):
        yield Sort(300, 1, 3, mapped=True, seed=10 + at)  # the map's one expert is any of three


# Chunks of 512 routes, loops over 256 and 1024 experts unrolled by 4, both ends of each.
SHARP: tuple[Sort, ...] = (
    Sort(11, 3, 5, absent=0.2, identity=2),
    Sort(171, 3, 7, wrong=(-2, 9, 8), block=64),
    Sort(3, 2, 1100, 1, entries=6),
    Sort(1500, 2, 1100, 1, ramp=True),
    Sort(512, 1, 300, mapped=True, absent=0.1),
    Sort(1030, 2, 33, 4, labels=True, absent=0.1),
    *_at_the_edge(),
    Sort(40, 1, 1, crowd=True, labels=True),
    Sort(4, 2, 2060, 2, mapped=True, labels=True, entries=15),
    Sort(700, 6, 3, 16, crowd=True),
    Sort(1, 1, 1, wrong=(1,)),
    Sort(1, 2, 4, wrong=(-2, -1)),
    Sort(20, 2, 3, wrong=(-7, -7, -7, -7)),
    Sort(300, 2, 2, wrong=(-7,) * 300),
    Sort(200, 2, 9, wrong=(-7,) * 300, mapped=True),
    Sort(2000, 1, 5),
    Sort(3, 1, 2600, block=64),
    Sort(3, 1, 3500, seed=1),
    Sort(3, 1, 4097, seed=2),
    Sort(5400, 1, 2, 64),
    Sort(0, 2, 3),
    Sort(70, 2, 1024, crowd=True),
    Sort(70, 2, 1025, crowd=True, seed=1),
)


def all_sorts() -> Iterator[Sort]:
    """Yield the sharp ones, and lengths around every edge."""
    yield from SHARP
    edges = [base + k for base in (32, 64, 256, 512, 1024, 1536, 2048) for k in (-1, 0, 1)]
    for k, routes in enumerate(edges):
        yield Sort(routes, 1, (1, 2, 5, 300)[k % 4], (1, 16, 64)[k % 3], absent=0.1 * (k % 2))
    for k, experts in enumerate([*edges, 4096]):
        yield Sort(30, 1 + k % 3, experts, (16, 64)[k % 2], mapped=k % 2 == 0, labels=k % 3 == 0)
    for k in range(24):
        one = Sort(9 + k, 1 + k % 4, 1 + k % 9, (16, 64, 3)[k % 3], k % 3, seed=k)
        yield replace(one, absent=0.2, mapped=k % 2 == 0, labels=k % 5 == 0)
    yield Sort(2600, 2, 3, mapped=True, seed=3)  # more than eight chunks
