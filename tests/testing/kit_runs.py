"""What the tests of the kit's larger kinds share: subjects, bounds, and subjects that break."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from kit_reproducers import reproduces

import npmoe
from npmoe import MoEConfig, MoEParams
from npmoe._half import HALF_DTYPES
from npmoe.dispatch import plan_dispatch
from npmoe.experts import compose_backward, compose_forward
from npmoe.testing.conformance.case import Case, Effort, Kind
from npmoe.testing.conformance.moe_cases import moe_config
from npmoe.testing.conformance.report import Report
from npmoe.testing.faults.fault import Fault


def _experts_setup(w1: Any, w2: Any, ids: Any) -> tuple[Any, Any, Any]:
    E, H, I = w2.shape
    K = min(ids.shape[1], E)
    cfg = MoEConfig(hidden_size=H, intermediate_size=I, num_experts=E, top_k=K)
    params = MoEParams(router_weight=np.zeros((E, H), w1.dtype), gate_up_proj=w1, down_proj=w2)
    return cfg, params, plan_dispatch(ids, num_experts=E)


def experts_subjects(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return our expert core as plain functions: "numpy" is fused, "reference" composed."""
    run = npmoe.get_backend(name)
    fused = name == "numpy"

    def start(x: Any, params: Any, plan: Any, w: Any, cfg: Any) -> Any:
        if fused:
            return run.experts_forward(x, params, plan, w, cfg)
        return compose_forward(run, x, params, plan, w, cfg)

    def forward(
        hidden_states: Any, gate_up_proj: Any, down_proj: Any, topk_weights: Any, topk_ids: Any
    ) -> Any:
        cfg, params, plan = _experts_setup(gate_up_proj, down_proj, topk_ids)
        return start(hidden_states, params, plan, topk_weights, cfg)[0]

    def backward(
        grad_output: Any,
        hidden_states: Any,
        gate_up_proj: Any,
        down_proj: Any,
        topk_weights: Any,
        topk_ids: Any,
    ) -> Any:
        cfg, params, plan = _experts_setup(gate_up_proj, down_proj, topk_ids)
        gate_up = start(hidden_states, params, plan, topk_weights, cfg)[1]
        arguments = (grad_output, hidden_states, gate_up, params, plan, topk_weights, cfg)
        g = run.experts_backward(*arguments) if fused else compose_backward(run, *arguments)
        return g.hidden_states, g.gate_up_proj, g.down_proj, g.topk_weights

    return forward, backward


def moe_subjects(preset: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return our layer as plain functions."""

    def setup(router: Any, w1: Any, w2: Any, top_k: int) -> tuple[Any, Any]:
        E, H, I = w2.shape
        params = MoEParams(router_weight=router, gate_up_proj=w1, down_proj=w2)
        return params, moe_config(preset, H, I, E, top_k)

    def forward(
        hidden_states: Any, router_weight: Any, gate_up_proj: Any, down_proj: Any, top_k: int
    ) -> Any:
        params, cfg = setup(router_weight, gate_up_proj, down_proj, top_k)
        return npmoe.moe_forward(hidden_states, params, cfg, save=False)[0]

    def backward(
        grad_output: Any,
        hidden_states: Any,
        router_weight: Any,
        gate_up_proj: Any,
        down_proj: Any,
        top_k: int,
    ) -> Any:
        params, cfg = setup(router_weight, gate_up_proj, down_proj, top_k)
        g = npmoe.moe_backward(
            grad_output, npmoe.moe_forward(hidden_states, params, cfg)[1], params
        )
        return g.hidden_states, g.router_weight, g.gate_up_proj, g.down_proj

    return forward, backward


def assert_dies(fault: Fault, report: Report, folder: Path) -> None:
    """Check that a report of the fault's own check has it, as a small case that a script shows."""
    assert [f.check for f in report.failures] == [fault.check], str(report)
    assert_small(report.failures[0].case)
    assert reproduces(report, folder)


def assert_small(case: Case) -> None:
    """Check that a shrunk case has few tokens, and few experts but where many are the point."""
    for name, axis in (("hidden_states", 0), ("topk_ids", 0), ("logits", 0)):
        if name in case.arguments:
            assert case.arguments[name].shape[axis] <= 4, case.note
    if "down_proj" in case.arguments:
        assert len(case.arguments["down_proj"]) in (1, 2, 3, 4, 257), case.note


def loose_bounds(kind: Kind, dtype: str, seed: int) -> list[str]:
    """Return the outputs of checks whose bound is not below 1 % of their largest value.

    A gradient that is 0 in all cases (that of a weight that is always 1) is measured by the others.
    """
    loose = []
    half = dtype if dtype in HALF_DTYPES else None
    effort = Effort(cases=6, quick=True, dtype="float32" if half else dtype, half=half)
    for check in (c for c in kind.checks if dtype in c.dtypes):
        bounds: dict[int, float] = {}
        sizes: dict[int, float] = {}
        for case in check.cases(np.random.default_rng(seed), effort):
            for i, want in enumerate(kind.expected(case)):
                sizes[i] = max(sizes.get(i, 0.0), float(np.abs(want.value).max(initial=0)))
                if want.bound is not None:
                    used = want.bound if want.free is None else np.where(want.free, 0, want.bound)
                    bounds[i] = max(bounds.get(i, 0.0), float(np.max(used, initial=0)))
        for i, bound in bounds.items():
            if not bound <= max(0.01 * (sizes[i] or max(sizes.values())), 1e-30):
                loose.append(f"{kind.name} {check.name} output {i}: {bound:.2g} of {sizes[i]:.2g}")
    return loose


def uncaught(kind: Kind, run: Callable[..., Report], right: Callable[..., Any]) -> list[str]:
    """Return the checks that none of a few brutal subjects fails."""
    breakers = [
        *(_changed(right, f) for f in (lambda a: a + 7, lambda a: a[..., :1], np.float16)),
        _drifting(right),
        _writing(right),
        _contiguous(right),
    ]
    names = [c.name for c in kind.checks]
    for breaker in breakers:
        report = run(breaker, only=names, quick=True)
        failed = {f.check for f in report.failures}
        names = [n for n in names if n not in failed]
    return names


def _tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def _changed(right: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda *arguments: tuple(change(a) for a in _tuple(right(*arguments)))


def _drifting(right: Callable[..., Any]) -> Callable[..., Any]:
    """Return another last bit at every call."""
    calls = iter(range(10**9))

    def subject(*arguments: Any) -> Any:
        n = next(calls)
        return tuple(a * (1 + n * np.finfo(a.dtype).eps) for a in _tuple(right(*arguments)))

    return subject


def _writing(right: Callable[..., Any]) -> Callable[..., Any]:
    def subject(*arguments: Any) -> Any:
        result = right(*(a.copy() if isinstance(a, np.ndarray) else a for a in arguments))
        arguments[0][...] = 0
        return result

    return subject


def _contiguous(right: Callable[..., Any]) -> Callable[..., Any]:
    """Read memory as if nothing were strided."""

    def flat(a: Any) -> Any:
        if not isinstance(a, np.ndarray) or a.flags.c_contiguous or a.base is None:
            return a
        return np.asarray(a.base).ravel()[: a.size].reshape(a.shape)

    return lambda *arguments: right(*(flat(a) for a in arguments))
