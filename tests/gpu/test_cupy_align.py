"""The GPU align, held to vLLM's contract by the conformance kit; run from its PTX."""

# ruff: noqa: E402  # imports follow what they need
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from emulation import need_emulation

need_emulation()

from accel.cupy_raw.nvrtc import emulated_ptx
from accel.device.emulated import EmulatedDevice
from accel.device.plans import moe_align_block_size
from npmoe.errors import DTypeError, RangeError, UnsupportedError
from npmoe.testing import check_align

IDS = np.array([[2, 0], [2, 1], [0, 2]], np.int32)


def align_on(device: EmulatedDevice, invalid: Any = "keep") -> Any:
    """Return the align of a device as a function of NumPy arrays."""

    def align(ids: Any, block_size: int, experts: int, expert_map: Any = None) -> Any:
        mapped = None if expert_map is None else device.asarray(expert_map.astype(np.int32))
        found = moe_align_block_size(
            device, device.asarray(ids.astype(np.int32)), block_size, experts, mapped,
            "keep" if mapped is None else invalid,
        )  # fmt: skip
        return tuple(map(device.asnumpy, found))

    return align


def test_the_contract() -> None:
    device = EmulatedDevice(emulated_ptx)
    report = check_align(align_on(device), stable=True, strict_tail=True, quick=True)
    assert report.passed, str(report)
    assert sum(device.launches.values()) > 500


def test_routes_to_other_ranks_are_dropped() -> None:
    device = EmulatedDevice(emulated_ptx, schedule=5)
    names = ["expert-map", "minus-one-with-a-map", "stable-order", "strict-tail"]
    report = check_align(
        align_on(device, "drop"), stable=True, strict_tail=True, invalid="drop", only=names
    )
    assert report.passed, str(report)


@pytest.mark.exhaustive
@pytest.mark.parametrize("invalid", ["keep", "drop"])
@pytest.mark.parametrize("schedule", ["in-order", "reversed", 9])
def test_the_whole_contract(invalid: Any, schedule: str | int) -> None:
    device = EmulatedDevice(emulated_ptx, schedule=schedule)
    report = check_align(
        align_on(device, invalid), stable=True, strict_tail=True, invalid=invalid, seed=1
    )
    assert report.passed, str(report)


def test_a_wrong_align_fails() -> None:
    right = align_on(EmulatedDevice(emulated_ptx))

    def without_sentinel(*args: Any) -> Any:
        rows, experts, total = right(*args)
        return np.where(rows == args[0].size, 0, rows), experts, total

    report = check_align(without_sentinel, quick=True, only=["sentinel-is-num-routes"])
    assert not report.passed


def test_the_example_of_the_reference() -> None:
    rows, experts, total = align_on(EmulatedDevice(emulated_ptx))(IDS, 4, 4)
    assert rows[:12].reshape(3, 4).tolist() == [[1, 4, 6, 6], [3, 6, 6, 6], [0, 2, 5, 6]]
    assert experts.tolist() == [0, 1, 2, -1, -1]
    assert total.tolist() == [12]


def test_bad_arguments() -> None:
    device = EmulatedDevice(emulated_ptx)
    ids = device.asarray(IDS)
    with pytest.raises(DTypeError, match="topk_ids must have dtype int32, got int64"):
        moe_align_block_size(device, device.asarray(IDS.astype(np.int64)), 4, 4)
    with pytest.raises(DTypeError, match="expert_map must have dtype int32, got int64"):
        moe_align_block_size(device, ids, 4, 4, device.asarray(np.zeros(4, np.int64)))
    with pytest.raises(RangeError, match="invalid must be 'keep' without an expert_map"):
        moe_align_block_size(device, ids, 4, 4, invalid="drop")
    with pytest.raises(UnsupportedError, match="num_experts must be at most 12288 on a GPU"):
        moe_align_block_size(device, ids, 4, 12289)
