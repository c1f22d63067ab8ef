"""The arrays of a case: the same for every implementation, and routed alike by all of them."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

import numpy as np

from npmoe._half import named_dtype
from npmoe._typing import Array, HostArray
from npmoe.backends import Backend
from npmoe.benchmark.cases import Case
from npmoe.config import MoEConfig
from npmoe.model_presets import preset
from npmoe.params import MoEParams
from npmoe.testing.bounds import unit_roundoff
from npmoe.tree import map_arrays

# Errors of dot products with random signs stay below this multiple of u*sqrt(n) (Higham and Mary).
_CONFIDENCE = 6.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inputs:
    """A case as the layer takes it: Mixtral's router, and the gradient of the output.

    `operands` is what the experts' products may round to (`npmoe.backends.Backend`).
    """

    case: Case
    cfg: MoEConfig
    params: MoEParams
    hidden_states: Array  # (T, H)
    grad_output: Array  # (T, H)
    operands: str | None = None


def make_inputs(
    case: Case, dtype: str, weights: str | None = None, operands: str | None = None
) -> Inputs:
    """Draw the arrays of a case, always the same.

    Weights are normal with standard deviation 1/sqrt(fan-in), tokens standard normal. A token
    whose last chosen and first rejected expert are within rounding of each other is drawn anew:
    then every implementation makes the same choice, and outputs can be compared.

    Parameters
    ----------
    case : Case
    dtype : {"float32", "float64"}
    weights : {"float16", "bfloat16"}, optional
        Dtype of the experts' weights beside float32, if it is another.
    operands : {"tf32", "bfloat16", "float16"}, optional
        What the experts' products may round to.

    Returns
    -------
    Inputs
        The weights are shared by cases of the same sizes; nobody may write to them.
    """
    T, H, I, E, K = case.sizes
    params = _weights(H, I, E, dtype, dtype if weights is None else weights)
    rng = np.random.default_rng((1, T))
    x = rng.standard_normal((T, H), dtype=np.dtype(dtype).type)
    again = _unclear(x, params.router_weight, K)
    while again.size:
        x[again] = rng.standard_normal((again.size, H), dtype=np.dtype(dtype).type)
        again = again[_unclear(x[again], params.router_weight, K)]
    return Inputs(
        case=case,
        cfg=preset("mixtral", hidden_size=H, intermediate_size=I, num_experts=E, top_k=K),
        params=params,
        hidden_states=x,
        grad_output=rng.standard_normal((T, H), dtype=np.dtype(dtype).type),
        operands=operands,
    )


def move_inputs(inputs: Inputs, backend: Backend) -> Inputs:
    """Return the same on the backend's device."""
    return dataclasses.replace(
        inputs,
        params=map_arrays(lambda _, x: backend.asarray(x), inputs.params),
        hidden_states=backend.asarray(inputs.hidden_states),
        grad_output=backend.asarray(inputs.grad_output),
    )


@functools.lru_cache(maxsize=1)
def _weights(H: int, I: int, E: int, dtype: str, experts: str) -> MoEParams:
    rng = np.random.default_rng(0)

    def draw(stored: str, *shape: int) -> HostArray:
        values = rng.standard_normal(shape, dtype=np.dtype(dtype).type)
        values /= math.sqrt(shape[-1])
        return values.astype(named_dtype("bench", stored, "numba"), copy=False)

    return MoEParams(
        router_weight=draw(dtype, E, H),
        gate_up_proj=draw(experts, E, 2 * I, H),
        down_proj=draw(experts, E, H, I),
    )


def _unclear(x: HostArray, router_weight: HostArray, top_k: int) -> HostArray:
    """Return the rows whose choice rounding could change."""
    num_experts, H = router_weight.shape
    if top_k == num_experts:
        return np.empty(0, np.int64)
    logits = np.partition(x @ router_weight.T, (-top_k - 1, -top_k), axis=1)
    gap = logits[:, -top_k] - logits[:, -top_k - 1]
    size = (np.abs(x) @ np.abs(router_weight).T).max(axis=1)
    # Peers take the softmax in float32 whatever the dtype is.
    error = _CONFIDENCE * unit_roundoff("float32") * (math.sqrt(H) * size + 4.0)
    return np.flatnonzero(~(gap > 2.0 * error))
