"""Parameters and gradients of one MoE layer, and their initialisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from npmoe._checks import Axes, check_float, check_same_dtype
from npmoe._typing import Array
from npmoe.config import MoEConfig
from npmoe.errors import DTypeError, ShapeError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MoEParams:
    """Parameters of one layer; a field is None where the config has no such parameter.

    Attributes
    ----------
    router_weight : (E, H) float array
    gate_up_proj : (E, 2I, H) float array
        Gate in the first half; (E, I, H) for experts without a gate half.
    down_proj : (E, H, I) float array
    router_bias : (E,) float array or None
    gate_up_bias : (E, 2I) float array or None
    down_bias : (E, H) float array or None
    """

    router_weight: Array
    gate_up_proj: Array
    down_proj: Array
    router_bias: Array | None = None
    gate_up_bias: Array | None = None
    down_bias: Array | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MoEGrads(MoEParams):
    """Gradients: the fields of MoEParams, and that of the layer's input.

    A field is None exactly where the parameter is None.

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

    Weights are normal with standard deviation 1/sqrt(fan-in), biases zero.

    Parameters
    ----------
    cfg : MoEConfig
    rng : int, Generator or SeedSequence
        The router and each expert get a stream of their own, so that adding experts never
        changes the first ones.
    dtype : {"float32", "float64"}
        Values are drawn in float64 and rounded.

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
    E, H, I = cfg.num_experts, cfg.hidden_size, cfg.intermediate_size
    wide = cfg.gate_up_size
    if isinstance(rng, np.random.Generator):
        rng = int(rng.integers(2**63))
    seeds = rng if isinstance(rng, np.random.SeedSequence) else np.random.SeedSequence(rng)
    streams = [np.random.default_rng(s) for s in seeds.spawn(E + 1)]
    gate_up = np.empty((E, wide, H), dtype)
    down = np.empty((E, H, I), dtype)
    for e, stream in enumerate(streams[1:]):
        gate_up[e] = stream.standard_normal((wide, H)) / np.sqrt(H)
        down[e] = stream.standard_normal((H, I)) / np.sqrt(I)
    return MoEParams(
        router_weight=(streams[0].standard_normal((E, H)) / np.sqrt(H)).astype(dtype),
        router_bias=np.zeros(E, dtype) if cfg.router_bias else None,
        gate_up_proj=gate_up,
        down_proj=down,
        gate_up_bias=np.zeros((E, wide), dtype) if cfg.expert_bias else None,
        down_bias=np.zeros((E, H), dtype) if cfg.expert_bias else None,
    )


def param_axes(cfg: MoEConfig) -> dict[str, tuple[str, ...]]:
    """Return the axes of every parameter that this config has."""
    wide = "2*I" if cfg.gated else "I"
    axes: dict[str, tuple[str, ...]] = {
        "router_weight": ("E", "H"),
        "gate_up_proj": ("E", wide, "H"),
        "down_proj": ("E", "H", "I"),
    }
    if cfg.router_bias:
        axes["router_bias"] = ("E",)
    if cfg.expert_bias:
        axes["gate_up_bias"] = ("E", wide)
        axes["down_bias"] = ("E", "H")
    return axes


def check_params(
    function: str, params: MoEParams, cfg: MoEConfig, dtype: Any, source: str, label: str = "params"
) -> None:
    """Raise ShapeError or DTypeError unless `params` fits `cfg` and `dtype`."""
    axes = Axes(function)
    axes.bind("cfg", E=cfg.num_experts, H=cfg.hidden_size, I=cfg.intermediate_size)
    expected = param_axes(cfg)
    for name in MoEParams.__dataclass_fields__:
        array = getattr(params, name)
        if (array is None) != (name not in expected):
            state = "an array" if array is None else "None"
            got = "None" if array is None else "an array"
            option = "router_bias" if name == "router_bias" else "expert_bias"
            is_bias = name.endswith("bias")
            why = f"cfg.{option} is {getattr(cfg, option)}." if is_bias else "Every config has it."
            raise ShapeError(f"{function}: {label}.{name} must be {state}, got {got}. {why}")
        if array is not None:
            check_float(function, f"{label}.{name}", array)
            axes.check(f"{label}.{name}", array, *expected[name])
            check_same_dtype(function, f"{label}.{name}", array, dtype, source)
