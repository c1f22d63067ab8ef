"""The conformance kit, in every dtype, without an expected failure."""

# ruff: noqa: E402  # imports follow what they need
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from needs import need_numba

need_numba()

import npmoe
from npmoe.backends import FusedExperts
from npmoe.routed_path import forward_experts
from npmoe.testing import check_backend
from npmoe.testing.conformance.case import WITH_HALVES


@pytest.mark.parametrize("dtype", WITH_HALVES)
def test_the_kit(dtype: str) -> None:
    report = check_backend("numba", quick=True, dtype=dtype)
    assert report.passed, str(report)
    ran = [r for r in report.results if r.status != "not run"]  # some say nothing on halves
    assert {r.status for r in ran} == {"passed"}, str(report)
    assert len(ran) > 10


@pytest.mark.parametrize("options", [{"batch_invariant": True}, {"num_threads": 1}], ids=str)
def test_the_kit_with_options(options: dict[str, Any]) -> None:
    report = check_backend(npmoe.get_backend("numba", **options), quick=True, seed=1)
    assert report.passed, str(report)


def test_the_fused_pair_is_offered() -> None:
    assert isinstance(npmoe.get_backend("numba"), FusedExperts)


def test_compiling_is_never_silent(tmp_path: Path) -> None:
    """With nothing on disk the error stream names kernels; with everything there it is silent."""
    code = (
        "import numpy as np, npmoe\n"
        "x = np.ones((2, 3), np.float32)\n"
        "print(npmoe.get_backend('numba').linear(x, x).tolist())"
    )
    said = []
    for _ in range(2):
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=environment,
            check=True,
        )
        assert done.stdout == "[[3.0, 3.0], [3.0, 3.0]]\n"
        said.append(done.stderr)
    assert "npmoe: compiling kernels, once on this machine: run_forward\n" in said[0]
    assert said[1] == ""


@pytest.mark.parametrize("backend", ["numba", "numpy", "reference"])
def test_without_save_no_pre_activation_is_kept(backend: str) -> None:
    cfg = npmoe.MoEConfig(hidden_size=4, intermediate_size=8, num_experts=3, top_k=2)
    params, x = npmoe.init_params(cfg), np.ones((5, 4), np.float32)
    run = npmoe.get_backend(backend)
    plan = run.plan_dispatch(np.tile(np.array([[0, 2]], np.int32), (5, 1)), num_experts=3)
    weights = np.ones((5, 2), np.float32)
    forward = forward_experts(run)
    kept, gate_up = forward(x, params, plan, weights, cfg, save=True)
    output, nothing = forward(x, params, plan, weights, cfg, save=False)
    assert gate_up.shape == (10, 16)
    assert nothing is None
    assert output.tobytes() == kept.tobytes()


@pytest.mark.parametrize("num_tokens", [3, 60])
def test_weights_of_unused_experts_are_not_read(num_tokens: int) -> None:
    """NaN there reaches neither the output nor a gradient, in the skinny form or the wide one."""
    cfg = npmoe.MoEConfig(hidden_size=70, intermediate_size=33, num_experts=4, top_k=1)
    params = npmoe.init_params(cfg)
    params.gate_up_proj[[0, 2]] = np.nan
    params.down_proj[[0, 2]] = np.nan
    x = np.random.default_rng(0).standard_normal((num_tokens, 70)).astype(np.float32)
    ids = np.where(np.arange(num_tokens) % 2, 1, 3).astype(np.int32)[:, None]
    output, saved = npmoe.moe_forward(x, params, cfg, "numba", topk_ids=ids)
    grads = npmoe.moe_backward(x, saved, params)
    for name in ("hidden_states", "router_weight", "gate_up_proj", "down_proj"):
        assert np.isfinite(getattr(grads, name)).all(), name
    assert np.isfinite(output).all()
    assert not grads.gate_up_proj[[0, 2]].any()
    assert grads.gate_up_proj[[1, 3]].any(axis=(1, 2)).all()
