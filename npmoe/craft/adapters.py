"""Low-rank adapters on the experts: a few parameters that move a frozen layer.

Expert e computes with ``W_e + scale * B_e A_e`` in place of each of its two matrices. Either the
sum is made (`merge_adapters`), and the layer costs what it did before; or it is not
(`attach_adapters`, `AdapterBackend`), and the layer's own matrices stay as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from npmoe import ops
from npmoe._checks import Axes, check_float, check_same_dtype, require
from npmoe._typing import Array, HostArray
from npmoe.backends.reference import ReferenceBackend
from npmoe.config import MoEConfig
from npmoe.dispatch import DispatchPlan
from npmoe.errors import DTypeError, RangeError
from npmoe.params import MoEParams

_MATRICES = {"gate_up": "gate_up_proj", "down": "down_proj"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertAdapters:
    """Factors of every expert's low-rank change, or their gradients; r is the rank.

    The tree functions of `npmoe.tree` walk it, so AdamW trains it as it trains a model.

    Attributes
    ----------
    gate_up_a : (E, r, H) float array
    gate_up_b : (E, 2I, r) float array
        (E, I, r) for experts without a gate half.
    down_a : (E, r, I) float array
    down_b : (E, H, r) float array
    """

    gate_up_a: HostArray
    gate_up_b: HostArray
    down_a: HostArray
    down_b: HostArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdaptedMatrix:
    """Matrices (E, M, N) of all experts with their low-rank change beside them, not added."""

    base: Array
    a: HostArray
    b: HostArray
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """(E, M, N)."""
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        """That of the base."""
        return self.base.dtype


class AdapterBackend(ReferenceBackend):
    """The reference verbs, which also multiply by an `AdaptedMatrix`.

    ``y = W x + scale * B (A x)``: 2*R*r*(M + N) flops more than without adapters, and no matrix
    of the size of W is made in the forward pass.
    """

    name: ClassVar[str] = "adapters"
    accelerates: ClassVar[frozenset[str]] = frozenset({"grouped_gemm"})

    def grouped_gemm(
        self,
        x: Array,
        weight: Array,
        plan: DispatchPlan,
        *,
        bias: Array | None = None,
        transposed: bool = False,
    ) -> Array:
        """Multiply each expert's rows by its matrix; see `npmoe.ops.grouped_gemm`."""
        if not isinstance(weight, AdaptedMatrix):
            return ops.grouped_gemm(x, weight, plan, bias=bias, transposed=transposed)
        y = ops.grouped_gemm(x, weight.base, plan, bias=bias, transposed=transposed)
        first, last = (weight.b, weight.a) if transposed else (weight.a, weight.b)
        narrow = ops.grouped_gemm(x, first, plan, transposed=transposed)  # (R, r)
        y += ops.grouped_gemm(
            narrow * x.dtype.type(weight.scale), last, plan, transposed=transposed
        )
        return y


def init_adapters(
    cfg: MoEConfig, rank: int, rng: int | np.random.Generator = 0, dtype: str = "float32"
) -> ExpertAdapters:
    """Draw adapters that change nothing yet: A normal with deviation 1/sqrt(fan-in), B zero.

    Parameters
    ----------
    cfg : MoEConfig
    rank : int
        r, at least 1.
    rng : int or Generator
        A of every expert is drawn from one stream, in the order of the fields.
    dtype : {"float32", "float64"}

    Returns
    -------
    ExpertAdapters

    Raises
    ------
    RangeError
        If the rank is below 1.
    DTypeError
        For another dtype.

    References
    ----------
    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
    """
    require(rank >= 1, f"init_adapters: rank must be at least 1, got {rank}.")
    if dtype not in ("float32", "float64"):
        raise DTypeError(f"init_adapters: dtype must be 'float32' or 'float64', got {dtype!r}.")
    generator = np.random.default_rng(rng)
    E, H, I = cfg.num_experts, cfg.hidden_size, cfg.intermediate_size

    def draw(size: int) -> HostArray:
        values: HostArray = generator.standard_normal((E, rank, size)) / math.sqrt(size)
        return values.astype(dtype)

    return ExpertAdapters(
        gate_up_a=draw(H),
        gate_up_b=np.zeros((E, cfg.gate_up_size, rank), dtype),
        down_a=draw(I),
        down_b=np.zeros((E, H, rank), dtype),
    )


def attach_adapters(params: MoEParams, adapters: ExpertAdapters, *, scale: float) -> MoEParams:
    """Return parameters that compute with the adapters, for ``backend=AdapterBackend()``.

    Parameters
    ----------
    params : MoEParams
        Of the layer; its arrays are shared, not copied. The two expert matrices may be float16
        or bfloat16 beside float32 adapters.
    adapters : ExpertAdapters
    scale : float
        Multiplies the change; alpha / r in the paper.

    Returns
    -------
    MoEParams
        With `AdaptedMatrix` in place of the two expert matrices. Other backends refuse it.

    Raises
    ------
    ShapeError, DTypeError
        If the adapters do not fit the layer.
    RangeError
        If the scale is not finite.
    """
    _check("attach_adapters", params, adapters, scale)
    return replace(
        params,
        **{
            field: AdaptedMatrix(
                base=getattr(params, field),
                a=getattr(adapters, f"{name}_a"),
                b=getattr(adapters, f"{name}_b"),
                scale=scale,
            )
            for name, field in _MATRICES.items()
        },
    )


def merge_adapters(params: MoEParams, adapters: ExpertAdapters, *, scale: float) -> MoEParams:
    """Return parameters with the change added: ``W + scale * B A`` for every expert.

    Parameters
    ----------
    params, adapters, scale
        As for `attach_adapters`; nothing is changed. Keep `params`: a sum that was rounded cannot
        be taken apart again, so the way back is `unmerge_adapters`, which returns them.

    Returns
    -------
    MoEParams
        Two new matrices, of the dtype of the adapters; the other arrays are shared. Any backend
        runs it.

    Raises
    ------
    ShapeError, DTypeError, RangeError
        As `attach_adapters`.

    Notes
    -----
    **Cost**: 2*E*r*M*N flops per matrix, once. **Accuracy**: gamma_{r+2} of |W| + scale |B||A|.
    **Order**: bitwise reproducible for one BLAS and thread count. Adapters that are zero in B
    leave every bit as it was (-0 may become 0).
    """
    _check("merge_adapters", params, adapters, scale)
    return replace(
        params,
        **{
            field: _merged(
                getattr(params, field),
                getattr(adapters, f"{name}_a"),
                getattr(adapters, f"{name}_b"),
                scale,
            )
            for name, field in _MATRICES.items()
        },
    )


def merge_adapters_backward(
    grads: MoEParams, adapters: ExpertAdapters, *, scale: float
) -> ExpertAdapters:
    """Return the gradients of the adapters from those of the merged matrices.

    ``grad_B = scale * grad_W A^T``, ``grad_A = scale * B^T grad_W``. The gradient of the base is
    grad_W itself; it is frozen, so nobody asks for it.

    Parameters
    ----------
    grads : MoEParams
        What `moe_backward` returned, for merged parameters or attached ones.
    adapters, scale
        As in the forward pass.

    Returns
    -------
    ExpertAdapters
        New arrays.

    Raises
    ------
    ShapeError, DTypeError, RangeError
        As `attach_adapters`.
    """
    _check("merge_adapters_backward", grads, adapters, scale, label="grads")
    grad_gate_up = _scaled(grads.gate_up_proj, scale)
    grad_down = _scaled(grads.down_proj, scale)
    return ExpertAdapters(
        gate_up_a=adapters.gate_up_b.swapaxes(1, 2) @ grad_gate_up,
        gate_up_b=grad_gate_up @ adapters.gate_up_a.swapaxes(1, 2),
        down_a=adapters.down_b.swapaxes(1, 2) @ grad_down,
        down_b=grad_down @ adapters.down_a.swapaxes(1, 2),
    )


def unmerge_adapters(
    merged: MoEParams, params: MoEParams, adapters: ExpertAdapters, *, scale: float
) -> MoEParams:
    """Return the parameters that were merged, bit for bit.

    ``unmerge_adapters(merge_adapters(p, a), p, a)`` is p itself. Subtracting the change from the
    merged matrices would give other bits; so the base is kept, and this function proves that
    nothing is lost by going back to it: it merges again and compares.

    Parameters
    ----------
    merged : MoEParams
        From `merge_adapters`.
    params, adapters, scale
        What it was merged from.

    Returns
    -------
    MoEParams
        `params` itself.

    Raises
    ------
    RangeError
        If merging again gives other bits: the merged matrices were trained on, or come from
        another base, other adapters or another scale.
    """
    again = merge_adapters(params, adapters, scale=scale)
    for field in _MATRICES.values():
        one, other = getattr(again, field), getattr(merged, field)
        if one.dtype != other.dtype or one.shape != other.shape or one.tobytes() != other.tobytes():
            raise RangeError(
                f"unmerge_adapters: merged.{field} must be what merge_adapters gives for params, "
                "adapters and scale, got other bits. Was it changed after merging? Going back "
                "would lose that."
            )
    return params


def _merged(base: HostArray, a: HostArray, b: HostArray, scale: float) -> HostArray:
    total: HostArray = _scaled(b, scale) @ a
    total += base.astype(total.dtype)
    return total


def _scaled(array: HostArray, scale: float) -> HostArray:
    product: HostArray = array * array.dtype.type(scale)
    return product


def _check(
    function: str, params: MoEParams, adapters: ExpertAdapters, scale: float, label: str = "params"
) -> None:
    """Raise unless the adapters fit the expert matrices."""
    require(math.isfinite(scale), f"{function}: scale must be finite, got {scale}.")
    axes = Axes(function)
    axes.check(f"{label}.gate_up_proj", params.gate_up_proj, "E", "Wide", "H")
    axes.check(f"{label}.down_proj", params.down_proj, "E", "H", "I")
    axes.check("adapters.gate_up_a", adapters.gate_up_a, "E", "Rank", "H")
    axes.check("adapters.gate_up_b", adapters.gate_up_b, "E", "Wide", "Rank")
    axes.check("adapters.down_a", adapters.down_a, "E", "Rank", "I")
    axes.check("adapters.down_b", adapters.down_b, "E", "H", "Rank")
    dtype, half = params.router_weight.dtype, params.gate_up_proj.dtype.itemsize == 2
    source = f"{label}.router_weight" if half else f"{label}.gate_up_proj"
    for name in ExpertAdapters.__dataclass_fields__:
        array = getattr(adapters, name)
        check_float(function, f"adapters.{name}", array)
        check_same_dtype(function, f"adapters.{name}", array, dtype, source)
