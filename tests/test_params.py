"""Initial parameters: shapes, sizes and the streams that they are drawn from."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import npmoe
from npmoe import DTypeError, MoEConfig
from npmoe.tree import named_arrays

CFG = MoEConfig(
    hidden_size=4,
    intermediate_size=6,
    num_experts=3,
    top_k=2,
    router_bias=True,
    expert_bias=True,
)


def test_init_params() -> None:
    cfg = dataclasses.replace(CFG, hidden_size=64, intermediate_size=32, num_experts=4)
    params = npmoe.init_params(cfg, 0)
    assert {n: a.shape for n, a in named_arrays(params)} == {
        "router_weight": (4, 64),
        "gate_up_proj": (4, 64, 64),
        "down_proj": (4, 64, 32),
        "router_bias": (4,),
        "gate_up_bias": (4, 64),
        "down_bias": (4, 64),
    }
    assert {a.dtype for _, a in named_arrays(params)} == {np.dtype("float32")}
    for name, fan_in in (("router_weight", 64), ("gate_up_proj", 64), ("down_proj", 32)):
        values = getattr(params, name).astype(float)
        # Standard deviation of a sample's variance: sqrt(2 / n).
        ratio = (values**2).mean() * fan_in
        assert abs(ratio - 1) <= 5 * np.sqrt(2 / values.size)
    for name in ("router_bias", "gate_up_bias", "down_bias"):
        assert not getattr(params, name).any()


def test_init_params_streams() -> None:
    small = npmoe.init_params(CFG, 7, "float64")
    large = npmoe.init_params(dataclasses.replace(CFG, num_experts=5), 7, "float64")
    for name in ("gate_up_proj", "down_proj"):
        assert getattr(small, name).tobytes() == getattr(large, name)[:3].tobytes()
        first, second = getattr(small, name)[:2]
        assert not (first == second).any()
    seeds = [7, np.random.SeedSequence(7)]
    drawn = [npmoe.init_params(CFG, s, "float64").gate_up_proj.tobytes() for s in seeds]
    assert drawn[0] == drawn[1]
    generators = [np.random.default_rng(3) for _ in range(2)]
    one, two = (npmoe.init_params(CFG, g).gate_up_proj.tobytes() for g in generators)
    assert one == two != npmoe.init_params(CFG, generators[0]).gate_up_proj.tobytes()
    rounded = npmoe.init_params(CFG, 7, "float32").gate_up_proj
    np.testing.assert_array_equal(rounded, small.gate_up_proj.astype("float32"))


def test_init_params_dtype() -> None:
    with pytest.raises(DTypeError) as caught:
        npmoe.init_params(CFG, 0, "float16")
    assert str(caught.value) == "init_params: dtype must be 'float32' or 'float64', got 'float16'."
