"""The dense feed-forward block: one expert that every token goes to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from npmoe import ops
from npmoe._typing import HostArray
from npmoe.activations import ACTIVATIONS, Activation, bind_activation
from npmoe.errors import RangeError
from npmoe.nn._inputs import Inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class MLPParams:
    """Parameters of `mlp`, or their gradients; the biases may be None.

    gate_up_proj : (2I, H) float array
        Gate in the first half; (I, H) for an activation without a gate half.
    down_proj : (H, I) float array
    gate_up_bias : (2I,) or (I,) float array or None
    down_bias : (H,) float array or None
    """

    gate_up_proj: HostArray
    down_proj: HostArray
    gate_up_bias: HostArray | None = None
    down_bias: HostArray | None = None


def init_mlp_params(
    hidden_size: int,
    intermediate_size: int,
    activation: str,
    rng: int | np.random.Generator,
    dtype: str = "float32",
    *,
    bias: bool = False,
    output_scale: float = 1.0,
) -> MLPParams:
    """Draw weights of standard deviation 1/sqrt(fan-in); biases are zero.

    Parameters
    ----------
    hidden_size, intermediate_size : int
        H and I.
    activation : str
        A key of `npmoe.activations.ACTIVATIONS`; alpha and limit are the published ones.
    rng : int or Generator
    dtype : {"float32", "float64"}
        Values are drawn in float64 and rounded.
    bias : bool
        Whether there are biases.
    output_scale : float
        Multiplies down_proj.

    Returns
    -------
    MLPParams

    Raises
    ------
    RangeError
        If the activation is unknown.
    """
    wide = intermediate_size * (2 if _activation("init_mlp_params", activation).gated else 1)
    generator = np.random.default_rng(rng)
    gate_up = generator.standard_normal((wide, hidden_size))
    gate_up /= math.sqrt(hidden_size)
    down = generator.standard_normal((hidden_size, intermediate_size))
    down *= output_scale / math.sqrt(intermediate_size)
    return MLPParams(
        gate_up_proj=gate_up.astype(dtype),
        down_proj=down.astype(dtype),
        gate_up_bias=np.zeros(wide, dtype) if bias else None,
        down_bias=np.zeros(hidden_size, dtype) if bias else None,
    )


def mlp(x: HostArray, params: MLPParams, activation: str) -> tuple[HostArray, HostArray]:
    """Return down_proj act(gate_up_proj x + gate_up_bias) + down_bias of every row.

    Parameters
    ----------
    x : (..., H) float array
    params : MLPParams
    activation : str
        A key of `npmoe.activations.ACTIVATIONS`; alpha and limit are the published ones.

    Returns
    -------
    y : (..., H) float array
    gate_up : (T, 2I) or (T, I) float array
        The pre-activation, for the backward. Both new.

    Raises
    ------
    ShapeError, DTypeError
    RangeError
        If the activation is unknown.

    Notes
    -----
    **Cost**: 6*T*H*I flops if gated, else 4*T*H*I.
    """
    act, rows = _check("mlp", x, params, activation)
    gate_up = ops.linear(rows, params.gate_up_proj, params.gate_up_bias)
    y = ops.linear(act.forward(gate_up), params.down_proj, params.down_bias)
    return y.reshape(x.shape), gate_up


def mlp_backward(
    grad_y: HostArray, x: HostArray, gate_up: HostArray, params: MLPParams, activation: str
) -> tuple[HostArray, MLPParams]:
    """Return the gradients of `mlp`; the activation is computed again from `gate_up`.

    Parameters
    ----------
    grad_y : (..., H) float array
    x, params, activation
        As given to `mlp`.
    gate_up : (T, 2I) or (T, I) float array
        As returned by it.

    Returns
    -------
    grad_x : (..., H) float array
    grad_params : MLPParams
        None where the parameter is None. All new.

    Raises
    ------
    ShapeError, DTypeError, RangeError

    Notes
    -----
    **Cost**: twice the flops of `mlp`, and the activation again.
    """
    act, rows = _check("mlp_backward", x, params, activation, grad_y=grad_y, gate_up=gate_up)
    grad_rows = grad_y.reshape(rows.shape)
    hidden, grad_pre = act.recompute_and_backward(grad_rows @ params.down_proj, gate_up)
    grad_down = grad_rows.T @ hidden
    grad_down_bias = None if params.down_bias is None else grad_rows.sum(axis=0)
    grad_x, grad_gate_up, grad_gate_up_bias = ops.linear_backward(
        grad_pre, rows, params.gate_up_proj, params.gate_up_bias
    )
    return grad_x.reshape(x.shape), MLPParams(
        gate_up_proj=grad_gate_up,
        down_proj=grad_down,
        gate_up_bias=grad_gate_up_bias,
        down_bias=grad_down_bias,
    )


def _activation(function: str, name: str) -> Activation:
    if name not in ACTIVATIONS:
        raise RangeError(
            f"{function}: activation must be one of {', '.join(map(repr, ACTIVATIONS))}, "
            f"got {name!r}."
        )
    return bind_activation(name)


def _check(
    function: str,
    x: HostArray,
    params: MLPParams,
    activation: str,
    *,
    grad_y: HostArray | None = None,
    gate_up: HostArray | None = None,
) -> tuple[Activation, HostArray]:
    """Check everything; return the activation and x as rows (T, H)."""
    act = _activation(function, activation)
    wide = "2*I" if act.gated else "I"
    inputs = Inputs(function)
    inputs.check("params.down_proj", params.down_proj, "H", "I")
    inputs.check("params.gate_up_proj", params.gate_up_proj, wide, "H")
    if params.gate_up_bias is not None:
        inputs.check("params.gate_up_bias", params.gate_up_bias, wide)
    if params.down_bias is not None:
        inputs.check("params.down_bias", params.down_bias, "H")
    rows = inputs.rows("x", x, "H")
    if grad_y is not None:
        inputs.rows_like("grad_y", grad_y, x.shape[:-1], "H")
    if gate_up is not None:
        inputs.axes.bind(f"x {x.shape}", T=rows.shape[0])
        inputs.check("gate_up", gate_up, "T", wide)
    return act, rows
