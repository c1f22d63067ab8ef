"""Forward and backward read nothing back from the device, which would wait for it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from compile_gates import RecordingDevice

import npmoe
from accel.cupy_raw import CupyBackend
from accel.loopback import LoopbackArray
from npmoe import tree

READS = ("__bool__", "__int__", "__index__", "__float__", "__array__", "item", "tolist")


class CountingDevice(RecordingDevice):
    """A device that counts copies to the host and waits."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def asnumpy(self, x: LoopbackArray) -> Any:
        """Count a copy."""
        self.waits["asnumpy"] += 1
        return super().asnumpy(x)

    def synchronize(self) -> None:
        """Count a wait."""
        self.waits["synchronize"] += 1


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> CountingDevice:
    counting = CountingDevice()
    for name in READS:
        real = getattr(LoopbackArray, name, None)

        def read(self: LoopbackArray, *args: Any, _name: str = name, _real: Any = real) -> Any:
            counting.waits[_name] += 1
            return getattr(self._host, _name)(*args) if _real is None else _real(self, *args)

        monkeypatch.setattr(LoopbackArray, name, read, raising=False)
    return counting


CONFIGS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "renormalized": {"renormalize": True, "routed_scaling_factor": 2.0},
    "topk_score": {"router_order": "topk_score"},
    "sigmoid": {"score_fn": "sigmoid", "renormalize": True},
    "selection bias": {"score_fn": "sigmoid", "selection_bias": True},
    "shared expert": {"shared_intermediate_size": 5, "shared_gated": True},
    "biases": {"expert_bias": True, "router_bias": True, "output_bias": True},
    "clamp": {"nan_policy": "clamp"},
    "drop": {"nan_policy": "drop"},
    "identity experts": {"num_identity_experts": 2},
    "plain activation": {"activation": "gelu"},
    "mid": {"weight_position": "mid"},
}


@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "masked"])
@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_is_read_back(name: str, masked: bool, device: CountingDevice) -> None:
    cfg = npmoe.MoEConfig(
        hidden_size=8, intermediate_size=6, num_experts=4, top_k=2, **CONFIGS[name]
    )
    backend = CupyBackend(launcher=device)
    params = tree.map_arrays(lambda _, x: backend.asarray(x), npmoe.init_params(cfg))
    x = backend.asarray(np.ones((2, 5, 8), np.float32))
    mask = backend.asarray(np.arange(10).reshape(2, 5) % 3 > 0) if masked else None
    device.waits.clear()
    out, saved = npmoe.moe_forward(x, params, cfg, backend=backend, token_mask=mask)
    npmoe.moe_backward(out, saved, params)
    assert len(device.asked) > 10
    assert not device.waits, dict(device.waits)


def test_the_counter_counts(device: CountingDevice) -> None:
    x = LoopbackArray(np.array(3))
    assert (bool(x), int(x), float(x), [0, 1, 2, 4][x]) == (True, 3, 3.0, 4)
    x.tolist()
    CupyBackend(launcher=device).synchronize()
    counted = {"__bool__", "__int__", "__float__", "__index__", "tolist", "asnumpy", "synchronize"}
    assert counted <= set(device.waits)


def test_a_layer_that_must_wait_is_seen_to_wait(device: CountingDevice) -> None:
    cfg = npmoe.MoEConfig(
        hidden_size=8, intermediate_size=6, num_experts=4, top_k=2, capacity_factor=1.0
    )
    backend = CupyBackend(launcher=device)
    params = tree.map_arrays(lambda _, x: backend.asarray(x), npmoe.init_params(cfg))
    npmoe.moe_forward(backend.asarray(np.ones((5, 8), np.float32)), params, cfg, backend=backend)
    assert device.waits
