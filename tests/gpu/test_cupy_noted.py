"""What is wrong with contents is noted by the kernels on the device, and raised where it waits."""

# ruff: noqa: E402  # imports follow what they need
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from emulation import need_emulation

need_emulation()

import npmoe
from accel.cupy_raw import EmulatedCupyBackend
from npmoe.errors import PlanError, RangeError

CFG = npmoe.MoEConfig(hidden_size=4, intermediate_size=4, num_experts=3, top_k=2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite(value: float) -> None:
    backend = EmulatedCupyBackend()
    logits = np.zeros((5, 3), np.float32)
    logits[3, 1] = value
    routing = backend.route(backend.asarray(logits), CFG)  # does not raise
    with pytest.raises(RangeError, match="router_logits must have a finite largest value"):
        backend.asnumpy(routing.probs)
    backend.synchronize()  # said once


@pytest.mark.parametrize("value", [-2, 3, 2**31 - 1])
def test_illegal_ids(value: int) -> None:
    backend = EmulatedCupyBackend()
    ids = np.array([[0, 1], [2, value]], np.int32)
    plan: Any = backend.plan_dispatch(backend.asarray(ids), num_experts=3)
    with pytest.raises(PlanError, match=r"topk_ids must lie in -1\.\.num_experts-1"):
        backend.synchronize()
    assert backend.asnumpy(plan.row_ids).tolist() == [[0, 1], [2, -1]]


def test_legal_contents_note_nothing() -> None:
    backend = EmulatedCupyBackend()
    ids = np.array([[0, -1], [2, 1]], np.int32)
    backend.plan_dispatch(backend.asarray(ids), num_experts=3)
    backend.route(backend.asarray(np.array([[0.0, -np.inf, 1.0]], np.float32)), CFG)
    backend.synchronize()
