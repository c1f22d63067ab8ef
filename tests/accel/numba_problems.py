"""Experts, rows and buffers for tests of the Numba backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import npmoe
from npmoe import MoEConfig, MoEParams
from npmoe.activations import ACTIVATIONS
from npmoe.backends import ExpertGrads
from npmoe.dispatch import DispatchPlan, plan_dispatch
from npmoe.experts import compose_backward, compose_forward

CANARY = -12345.0
FIELDS = ("hidden_states", "topk_weights", "gate_up_proj", "down_proj", "gate_up_bias", "down_bias")


def plan_of(counts: Sequence[int], seed: int = 0) -> DispatchPlan:
    """Return a plan of one slot per token, with so many rows for each expert, in random order."""
    ids = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    np.random.default_rng(seed).shuffle(ids)
    return plan_dispatch(ids[:, None], num_experts=len(counts))


def spread_plan(tokens: int, experts: int, top_k: int, seed: int = 0) -> DispatchPlan:
    """Return a plan of distinct random experts for every token."""
    rng = np.random.default_rng(seed)
    ids = rng.permuted(np.tile(np.arange(experts, dtype=np.int32), (tokens, 1)), axis=1)
    return plan_dispatch(ids[:, :top_k], num_experts=experts)


@dataclass(frozen=True)
class Experts:
    """Everything that the fused pair takes."""

    cfg: MoEConfig
    params: MoEParams
    plan: DispatchPlan
    x: np.ndarray
    topk_weights: np.ndarray
    grad_output: np.ndarray
    dropout: np.ndarray | None = None

    def astype(self, dtype: Any, matrices: Any = None) -> Experts:
        """Convert all arrays, the experts' matrices to a dtype of their own."""
        matrices = dtype if matrices is None else matrices
        p = self.params
        params = MoEParams(
            router_weight=p.router_weight.astype(dtype),
            gate_up_proj=p.gate_up_proj.astype(matrices),
            down_proj=p.down_proj.astype(matrices),
            gate_up_bias=None if p.gate_up_bias is None else p.gate_up_bias.astype(dtype),
            down_bias=None if p.down_bias is None else p.down_bias.astype(dtype),
        )
        return Experts(
            self.cfg,
            params,
            self.plan,
            self.x.astype(dtype),
            self.topk_weights.astype(dtype),
            self.grad_output.astype(dtype),
            None if self.dropout is None else self.dropout.astype(dtype),
        )


def draw_experts(
    plan: DispatchPlan,
    hidden: int,
    inner: int,
    *,
    activation: str = "reglu",
    integers: bool = True,
    bias: bool = False,
    position: str = "output",
    dropout: bool = False,
    seed: int = 0,
) -> Experts:
    """Return float64 experts; integers from -1 to 1 keep every result of a ReLU exact."""
    rng = np.random.default_rng((seed, hidden, inner))
    cfg = MoEConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_experts=max(plan.num_experts, 1),
        top_k=min(max(plan.top_k, 1), max(plan.num_experts, 1)),
        activation=activation,
        expert_bias=bias,
        weight_position=position,
    )
    wide = 2 * inner if ACTIVATIONS[activation].gated else inner
    E = plan.num_experts

    def draw(*shape: int, fan_in: int = 1) -> np.ndarray:
        if integers:
            return rng.integers(-1, 1, shape, endpoint=True).astype(float)
        return rng.standard_normal(shape) / np.sqrt(fan_in)

    params = MoEParams(
        router_weight=np.zeros((E, hidden)),
        gate_up_proj=draw(E, wide, hidden, fan_in=hidden),
        down_proj=draw(E, hidden, inner, fan_in=inner),
        gate_up_bias=draw(E, wide) if bias else None,
        down_bias=draw(E, hidden) if bias else None,
    )
    shape = (plan.num_tokens, plan.top_k)
    weights = rng.integers(1, 2, shape, endpoint=True) if integers else rng.random(shape)
    keep = rng.integers(0, 1, (plan.num_rows, inner), endpoint=True) * 2.0
    return Experts(
        cfg,
        params,
        plan,
        draw(plan.num_tokens, hidden),
        weights.astype(float),
        draw(plan.num_tokens, hidden),
        keep if dropout else None,
    )


def run_experts(
    backend: Any, case: Experts, *, out: Any = None, accumulate: bool = False
) -> dict[str, np.ndarray]:
    """Run the fused pair, or the composed one of a backend without it; results by name."""
    args = (case.params, case.plan, case.topk_weights, case.cfg)
    options = {"dropout": case.dropout}
    if hasattr(backend, "experts_forward"):
        output, gate_up = backend.experts_forward(case.x, *args, **options)
        grads: ExpertGrads = backend.experts_backward(
            case.grad_output, case.x, gate_up, *args, out=out, accumulate=accumulate, **options
        )
    else:
        output, gate_up = compose_forward(backend, case.x, *args, **options)
        grads = compose_backward(
            backend, case.grad_output, case.x, gate_up, *args, out=out, accumulate=accumulate,
            **options,
        )  # fmt: skip
    found = {"output": output, "gate_up": gate_up}
    found |= {name: getattr(grads, name) for name in FIELDS}
    return {name: value for name, value in found.items() if value is not None}


def expected_experts(case: Experts) -> dict[str, np.ndarray]:
    """Return what the reference makes of the case, in float64."""
    wide = case.astype(np.float64)
    return run_experts(npmoe.get_backend("reference"), wide)


def assert_equal_numbers(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    """Check that exact results are the same numbers."""
    assert sorted(got) == sorted(want)
    for name, value in got.items():
        np.testing.assert_array_equal(value, want[name], err_msg=name)


def bits(found: dict[str, np.ndarray]) -> dict[str, bytes]:
    """Return the bytes of every result."""
    return {name: value.tobytes() for name, value in found.items()}


def misaligned(array: np.ndarray) -> np.ndarray:
    """Return a copy whose numbers begin one byte beside where they should."""
    room = bytearray(array.nbytes + 1)
    copy = np.frombuffer(room, array.dtype, array.size, offset=1).reshape(array.shape)
    copy[...] = array
    assert not copy.flags.aligned or not array.size or array.itemsize == 1
    return copy


def in_a_record(array: np.ndarray) -> np.ndarray:
    """Return a copy that is a field of packed records: strided and misaligned."""
    room = np.zeros(array.shape, [("mark", "u1"), ("value", array.dtype)])
    room["value"] = array
    return room["value"]


def strided(array: np.ndarray) -> np.ndarray:
    """Return a copy that takes every second place of each row."""
    room = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    room.view(np.uint8)[...] = 0xFF
    room[..., ::2] = array
    return room[..., ::2]


def read_only(array: np.ndarray) -> np.ndarray:
    """Return a copy that cannot be written."""
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def foreign(array: np.ndarray) -> np.ndarray:
    """Return a copy of the other byte order."""
    return array.astype(array.dtype.newbyteorder("S"))


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "strided": strided,
    "fortran": lambda a: np.asfortranarray(a.copy()),
    "reversed": lambda a: a[..., ::-1].copy()[..., ::-1],
    "read_only": read_only,
    "misaligned": misaligned,
    "misaligned_read_only": lambda a: np.frombuffer(
        b"x" + a.tobytes(), a.dtype, a.size, offset=1
    ).reshape(a.shape),
    "in_a_record": in_a_record,
}
