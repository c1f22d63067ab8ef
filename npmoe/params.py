"""Parameters and gradients of one MoE layer, and their initialisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from npmoe._checks import Axes, check_float, check_same_dtype
from npmoe._half import is_half
from npmoe._typing import Array, HostArray
from npmoe.config import MoEConfig
from npmoe.errors import DTypeError, ShapeError

# The shared expert's stream; spawn keys of the experts are far below.
_SHARED_STREAM = 2**31


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MoEParams:
    """Parameters of one layer; a field is None where the config has no such parameter.

    N is E plus the identity experts (`MoEConfig.router_size`); C the slots per expert of soft
    routing; S the size of the shared expert. What holds 2I or 2S rows holds I or S for an
    activation without a gate half.

    All arrays share the dtype of the layer's input, float32 or float64. Beside float32 the two
    matrices of the routed experts, gate_up_proj and down_proj, may both be float16 or both
    bfloat16 (of the package ml_dtypes): storage, read as the float32 numbers that they are, one
    expert at a time.

    Attributes
    ----------
    router_weight : (N, H) float array
        (E*C, H) for soft routing, expert by expert.
    gate_up_proj : (E, 2I, H) float array, or half precision
        Gate in the first half.
    down_proj : (E, H, I) float array, or half precision
        Of the dtype of gate_up_proj.
    router_bias : (N,) float array or None
    selection_bias : (N,) float array or None
        Takes part in the choice alone and has no gradient.
    gate_up_bias : (E, 2I) float array or None
    down_bias : (E, H) float array or None
    shared_gate_up_proj : (2S, H) float array or None
    shared_down_proj : (H, S) float array or None
    shared_gate_weight : (1, H) float array or None
    output_bias : (H,) float array or None
    soft_scale : () float array or None
    """

    router_weight: Array
    gate_up_proj: Array
    down_proj: Array
    router_bias: Array | None = None
    selection_bias: Array | None = None
    gate_up_bias: Array | None = None
    down_bias: Array | None = None
    shared_gate_up_proj: Array | None = None
    shared_down_proj: Array | None = None
    shared_gate_weight: Array | None = None
    output_bias: Array | None = None
    soft_scale: Array | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MoEGrads(MoEParams):
    """Gradients: the fields of MoEParams, and that of the layer's input.

    A field is None exactly where the parameter is None; `selection_bias` always is. The dtype is
    that of the layer's input, also for gradients of expert matrices in half precision.

    Attributes
    ----------
    hidden_states : (..., H) float array
    """

    hidden_states: Array

    def params(self) -> MoEParams:
        """Return the parameter gradients alone, without that of the input."""
        return MoEParams(**{n: getattr(self, n) for n in MoEParams.__dataclass_fields__})


def init_params(
    cfg: MoEConfig,
    rng: int | np.random.Generator | np.random.SeedSequence = 0,
    dtype: str = "float32",
) -> MoEParams:
    """Draw initial parameters.

    Weights are normal with standard deviation 1/sqrt(fan-in), biases zero, soft_scale one.

    Parameters
    ----------
    cfg : MoEConfig
    rng : int, Generator or SeedSequence
        The router, each expert and the shared expert get a stream of their own, so that adding
        experts never changes the first ones.
    dtype : {"float32", "float64"}
        Values are drawn in float64 and rounded. For expert matrices in half precision, draw
        float32 and convert gate_up_proj and down_proj with astype.

    Returns
    -------
    MoEParams
        NumPy arrays, new.

    Raises
    ------
    DTypeError
        For another dtype.
    """
    if dtype not in ("float32", "float64"):
        raise DTypeError(f"init_params: dtype must be 'float32' or 'float64', got {dtype!r}.")
    E, H, I, S = (
        cfg.num_experts,
        cfg.hidden_size,
        cfg.intermediate_size,
        cfg.shared_intermediate_size,
    )
    wide, N = cfg.gate_up_size, cfg.router_size
    if isinstance(rng, np.random.Generator):
        rng = int(rng.integers(2**63))
    seeds = rng if isinstance(rng, np.random.SeedSequence) else np.random.SeedSequence(rng)
    streams = [np.random.default_rng(s) for s in seeds.spawn(E + 1)]
    gate_up = np.empty((E, wide, H), dtype)
    down = np.empty((E, H, I), dtype)
    for e, stream in enumerate(streams[1:]):
        gate_up[e] = stream.standard_normal((wide, H)) / np.sqrt(H)
        down[e] = stream.standard_normal((H, I)) / np.sqrt(I)
    shared = np.random.default_rng(
        np.random.SeedSequence(seeds.entropy, spawn_key=(*seeds.spawn_key, _SHARED_STREAM))
    )

    def draw_shared(*shape: int) -> HostArray | None:
        if not S:
            return None
        return np.asarray(shared.standard_normal(shape) / np.sqrt(shape[1]), dtype)

    def zeros(present: bool, *shape: int) -> HostArray | None:
        return np.zeros(shape, dtype) if present else None

    return MoEParams(
        router_weight=(streams[0].standard_normal((N, H)) / np.sqrt(H)).astype(dtype),
        router_bias=zeros(cfg.router_bias, N),
        selection_bias=zeros(cfg.selection_bias, N),
        gate_up_proj=gate_up,
        down_proj=down,
        gate_up_bias=zeros(cfg.expert_bias, E, wide),
        down_bias=zeros(cfg.expert_bias, E, H),
        shared_gate_up_proj=draw_shared(cfg.shared_gate_up_size, H),
        shared_down_proj=draw_shared(H, S),
        shared_gate_weight=draw_shared(1, H) if cfg.shared_gated else None,
        output_bias=zeros(cfg.output_bias, H),
        soft_scale=np.ones((), dtype) if cfg.routing == "soft" else None,
    )


# The option that decides whether a parameter exists, for messages.
_OPTIONS = {
    "router_bias": "router_bias",
    "selection_bias": "selection_bias",
    "gate_up_bias": "expert_bias",
    "down_bias": "expert_bias",
    "shared_gate_up_proj": "shared_intermediate_size",
    "shared_down_proj": "shared_intermediate_size",
    "shared_gate_weight": "shared_gated",
    "output_bias": "output_bias",
    "soft_scale": "routing",
}


def param_axes(cfg: MoEConfig) -> dict[str, tuple[str, ...]]:
    """Return the axes of every parameter that this config has."""
    wide = "2*I" if cfg.gated else "I"
    rows = "E*C" if cfg.routing == "soft" else "N" if cfg.num_identity_experts else "E"
    axes: dict[str, tuple[str, ...]] = {
        "router_weight": (rows, "H"),
        "gate_up_proj": ("E", wide, "H"),
        "down_proj": ("E", "H", "I"),
    }
    optional: tuple[tuple[bool, str, tuple[str, ...]], ...] = (
        (cfg.router_bias, "router_bias", (rows,)),
        (cfg.selection_bias, "selection_bias", (rows,)),
        (cfg.expert_bias, "gate_up_bias", ("E", wide)),
        (cfg.expert_bias, "down_bias", ("E", "H")),
        (cfg.output_bias, "output_bias", ("H",)),
        (cfg.routing == "soft", "soft_scale", ()),
    )
    axes |= {name: letters for present, name, letters in optional if present}
    if cfg.shared_intermediate_size:
        gated = cfg.shared_gate_up_size > cfg.shared_intermediate_size
        axes["shared_gate_up_proj"] = ("2*S" if gated else "S", "H")
        axes["shared_down_proj"] = ("H", "S")
        if cfg.shared_gated:
            axes["shared_gate_weight"] = ("1", "H")
    return axes


def num_active_parameters(cfg: MoEConfig) -> int:
    """Return how many parameters one token meets: the router, K experts, the shared expert."""
    H, S = cfg.hidden_size, cfg.shared_intermediate_size
    experts = cfg.num_experts if cfg.routing == "dense" else cfg.top_k
    one = cfg.gate_up_size * H + H * cfg.intermediate_size
    one += cfg.expert_bias * (cfg.gate_up_size + H)
    shared = cfg.shared_gate_up_size * H + H * S + cfg.shared_gated * H
    return cfg.router_size * (H + cfg.router_bias) + experts * one + shared + cfg.output_bias * H


def check_params(
    function: str, params: MoEParams, cfg: MoEConfig, dtype: Any, source: str, label: str = "params"
) -> None:
    """Raise ShapeError or DTypeError unless `params` fits `cfg` and `dtype`.

    With label "out" it is a place for gradients, which has no selection_bias.
    """
    axes = Axes(function)
    axes.bind("cfg", E=cfg.num_experts, H=cfg.hidden_size, I=cfg.intermediate_size)
    if cfg.num_identity_experts:
        axes.bind("cfg.num_experts + cfg.num_identity_experts", N=cfg.router_size)
    if cfg.routing == "soft":
        axes.bind("cfg.expert_capacity", C=cfg.expert_capacity or 0)
    if cfg.shared_intermediate_size:
        axes.bind("cfg.shared_intermediate_size", S=cfg.shared_intermediate_size)
    expected = param_axes(cfg)
    for name in MoEParams.__dataclass_fields__:
        array = getattr(params, name)
        if name == "selection_bias" and label == "out":
            continue
        if (array is None) != (name not in expected):
            state = "an array" if array is None else "None"
            got = "None" if array is None else "an array"
            option = _OPTIONS.get(name)
            why = f"cfg.{option} is {getattr(cfg, option)!r}." if option else "Every config has it."
            raise ShapeError(f"{function}: {label}.{name} must be {state}, got {got}. {why}")
        if array is None:
            continue
        what = f"{label}.{name}"
        matrix = name in ("gate_up_proj", "down_proj")
        if matrix:
            _check_matrix_dtype(function, what, array, dtype, source)
        else:
            check_float(function, what, array)
        axes.check(what, array, *expected[name])
        if not (matrix and is_half(array.dtype)):
            check_same_dtype(function, what, array, dtype, source)
    first = f"{label}.gate_up_proj"
    check_same_dtype(
        function, f"{label}.down_proj", params.down_proj, params.gate_up_proj.dtype, first
    )


def _check_matrix_dtype(function: str, what: str, array: Any, dtype: Any, source: str) -> None:
    """Raise DTypeError unless a matrix of the routed experts is float, or half beside float32."""
    given = getattr(array, "dtype", None)
    if not is_half(given):
        check_float(function, what, array)
    elif what.startswith("out."):
        raise DTypeError(
            f"{function}: {what} must have dtype {dtype}, got {given}. Gradients of expert "
            f"weights have the dtype of {source}. Allocate it with that dtype."
        )
    elif dtype != np.float32:
        raise DTypeError(
            f"{function}: {what} must have dtype {dtype}, got {given}. The dtype is bound by "
            f"{source}; expert weights in half precision need float32 there. Convert one of them "
            "with astype."
        )
